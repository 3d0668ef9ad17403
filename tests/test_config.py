"""Settings: precedence, system and user paths, and errors that say where and what would be right."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from edged import units
from edged.config import (
    Config,
    ConfigError,
    GoldenInline,
    ModelSettings,
    Tolerance,
    load_config,
    parse_model_settings,
    render_documentation,
)

DOCUMENT = Path(__file__).parent.parent / "docs" / "configuration.md"


def load(
    tmp_path: Path, text: str | None = None, environ: dict[str, str] | None = None, **flags: object
) -> Config:
    """The configuration from a file with this text, below a home of its own."""
    file = None
    if text is not None:
        file = tmp_path / "edged.toml"
        file.write_text(text)
    return load_config(flags=flags, environ={"HOME": str(tmp_path), **(environ or {})}, file=file)


def problem(tmp_path: Path, text: str | None = None, **environ: str) -> str:
    """The message with which a configuration is refused."""
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, environ)
    assert "\n" not in caught.value.message
    return caught.value.message


# ---- where things lie


def test_paths_of_a_user_are_xdgs(tmp_path: Path) -> None:
    """Without systemd every path hangs below the XDG defaults, and a session has its socket there."""
    server = load(tmp_path, environ={"XDG_RUNTIME_DIR": "/run/user/7"}).server
    assert server.endpoint == "ipc:///run/user/7/edged/edged.sock"
    assert server.models == tmp_path / ".local/share/edged/models"
    assert server.state_dir == tmp_path / ".local/state/edged"
    assert server.cache_dir == tmp_path / ".cache/edged"


def test_without_a_session_the_socket_is_in_the_state_directory(tmp_path: Path) -> None:
    """A user without XDG_RUNTIME_DIR gets a private run directory."""
    environ = {"XDG_STATE_HOME": "/s", "XDG_RUNTIME_DIR": "relative/is/ignored"}
    assert load(tmp_path, environ=environ).server.endpoint == "ipc:///s/edged/run/edged.sock"


def test_paths_of_a_service_are_systemds(tmp_path: Path) -> None:
    """systemd's directories win over XDG, the first of several is taken, and edged.toml is found there."""
    (tmp_path / "edged.toml").write_text('[log]\nlevel = "debug"\n')
    environ = {
        "STATE_DIRECTORY": "/var/lib/edged:/var/lib/other",
        "RUNTIME_DIRECTORY": "/run/edged",
        "CACHE_DIRECTORY": "/var/cache/edged",
        "CONFIGURATION_DIRECTORY": str(tmp_path),
        "XDG_STATE_HOME": "/no",
        "XDG_RUNTIME_DIR": "/no",
    }
    config = load(tmp_path, environ=environ)
    assert config.server.endpoint == "ipc:///run/edged/edged.sock"
    assert config.server.models == Path("/var/lib/edged/models")
    assert config.server.state_dir == Path("/var/lib/edged")
    assert config.server.cache_dir == Path("/var/cache/edged")
    assert config.log.level == "debug"


def test_a_file_that_was_asked_for_must_exist(tmp_path: Path) -> None:
    """--config and EDGED_CONFIG name a file that must be there; the default one need not."""
    load(tmp_path)
    with pytest.raises(ConfigError, match="there is no such file"):
        load_config(flags={}, environ={"HOME": str(tmp_path)}, file=tmp_path / "none.toml")
    assert "there is no such file" in problem(tmp_path, EDGED_CONFIG=str(tmp_path / "none.toml"))


def test_relative_paths_are_relative_to_who_says_them(tmp_path: Path) -> None:
    """In the file relative to the file, in a flag to the working directory, and ~ is the home."""
    text = '[server]\nmodels = "m/../models"\nstate_dir = "~/state"\n'
    server = load(tmp_path, text, **{"server.cache_dir": "c"}).server
    assert server.models == tmp_path / "models"
    assert server.state_dir == tmp_path / "state"
    assert server.cache_dir == Path.cwd() / "c"


# ---- precedence


def test_flags_over_environment_over_file_over_defaults(tmp_path: Path) -> None:
    """Each layer wins over the next; None counts as not given."""
    text = '[log]\nlevel = "error"\n[loading]\nrescan = "10s"\nsettle = "3s"\n[limits]\nrank = 4\n'
    environ = {"EDGED_LOG_LEVEL": "warning", "EDGED_LOADING_RESCAN": "20s"}
    config = load(tmp_path, text, environ, log_level="debug", **{"loading.rescan": None})
    assert config.log.level == "debug"
    assert config.loading.rescan_s == 20
    assert config.loading.settle_s == 3
    assert config.limits.rank == 4
    assert config.limits.tensors == 256


def test_short_variables_and_lists_from_the_environment(tmp_path: Path) -> None:
    """EDGED_MODELS and EDGED_ENDPOINT are the short names; lists are comma-separated, sizes have units."""
    environ = {
        "EDGED_MODELS": "/m",
        "EDGED_ENDPOINT": "ipc:///e/edged.sock",
        "EDGED_DEVICES_ORDER": "cpu, openvino:GPU.1",
        "EDGED_LIMITS_QUEUE_BYTES": "1GB",
        "EDGED_RESOURCES_MEMORY": "1073741824",
        "EDGED_RUNTIMES_ONNXRUNTIME_PYTHON": "/usr/bin/python3.10",
    }
    config = load(tmp_path, environ=environ)
    assert config.server.models == Path("/m")
    assert config.server.endpoint == "ipc:///e/edged.sock"
    assert config.devices.order == ("cpu", "openvino:GPU.1")
    assert config.limits.queue_bytes == 10**9
    assert config.resources.memory == 1 << 30
    assert config.runtimes["onnxruntime"].python == "/usr/bin/python3.10"
    assert config.runtimes["openvino"].python is None


def test_runtimes_python_from_the_file(tmp_path: Path) -> None:
    """[runtimes.NAME] names the interpreter of that runtime's workers."""
    config = load(tmp_path, '[runtimes.onnxruntime]\npython = "/opt/vendor/bin/python3"\n')
    assert config.runtimes["onnxruntime"].python == "/opt/vendor/bin/python3"


# ---- errors


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ('[log]\nlevel = "info"\n\n[loading]\nsetle = 1\n', 5, "`loading.setle`. Did you mean `settle`?"),
        ("[loadin]\nsettle = 1\n", 1, "unknown section `loadin`. Did you mean `loading`?"),
        ("settle = 1\n", 1, "unknown key `settle`. It belongs into [loading]."),
        ("[server]\nsettle = 1\n", 2, "`server.settle`. It belongs into [loading]."),
        ("# settle\n[loading]\nsettle = 'x'\n", 3, "`loading.settle` must be a duration from 0s"),
        ("[loading]\nsettle = true\n", 2, "not True"),
        ("[loading]\nsettle = nan\n", 2, "not nan"),
        ("[loading]\nsettle = -1\n", 2, "not -1"),
        ("[loading]\nconcurrency = 1.5\n", 2, "must be a whole number from 1 to 64, not 1.5"),
        ("loading.concurrency = 0\n", 1, "must be a whole number"),
        ("[limits]\nqueue_bytes = '5 parsecs'\n", 2, "must be a size"),
        ('[server]\nendpoint = "tcp://*:5555"\n', 2, "must be ipc:// and an absolute path"),
        (f'[server]\nendpoint = "ipc:///{"x" * 120}"\n', 2, "at most 107 bytes"),
        ('[server]\nendpoint = "ipc:///run/e/my.sock"\n', 2, "must end in /edged.sock"),
        ('[devices]\norder = [\n  "cpu",\n  "cudda",\n]\n', 2, "must be a device such as"),
        ("[runtimes.onxruntime]\npython = '/p'\n", 1, "Did you mean `onnxruntime`?"),
        ("[runtimes.openvino]\npyhton = '/p'\n", 2, "Did you mean `python`?"),
        ("[log]\nlevel = \n", 2, "not TOML"),
        ('[log]\nlevel = "info"\nlevel = "debug"\n', 3, "not TOML"),
        ("log = 3\n", 1, "`log` must be a table"),
        ('[log]\n"a\\nb" = 1\n', 2, "unknown key"),
    ],
)
def test_a_wrong_file_is_refused_with_its_line(tmp_path: Path, text: str, line: int, words: str) -> None:
    """The message names the file, the line, the key, what is wanted, and the nearest known key."""
    message = problem(tmp_path, text)
    assert message.startswith(f"{tmp_path / 'edged.toml'}, line {line}: ")
    assert words in message


def test_a_key_is_found_behind_strings_and_arrays_that_look_like_it(tmp_path: Path) -> None:
    """Text within multi-line values is not taken for keys."""
    text = '[server]\nmodels = """/a\n[loading]\nsettle = 1\n"""\n[devices]\norder = [ # [\n"cpu"]\n'
    text += '[loading]\nsettle = "no"\n'
    assert "line 10: `loading.settle`" in problem(tmp_path, text)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("EDGED_LOG_LEVL", "Did you mean $EDGED_LOG_LEVEL?"),
        ("EDGED_LOGS_LEVEL", "Did you mean $EDGED_LOG_LEVEL?"),
        ("EDGED_LIMITS_TENSOR", "Did you mean $EDGED_LIMITS_TENSORS?"),
    ],
)
def test_a_misspelt_variable_is_refused(tmp_path: Path, name: str, words: str) -> None:
    """What looks like one of ours but is none is an error; others' variables are left alone."""
    assert words in problem(tmp_path, **{name: "1"})
    load(tmp_path, environ={"EDGED_SCRATCH_OF_SOMEBODY": "1", "EDGEDX": "2"})


def test_a_wrong_value_in_variable_or_flag_is_refused_by_its_name(tmp_path: Path) -> None:
    """The variable or the flag is named as the user wrote it."""
    assert problem(tmp_path, EDGED_LOG_LEVEL="loud").startswith("$EDGED_LOG_LEVEL must be one of")
    with pytest.raises(ConfigError, match="--log-level must be one of"):
        load(tmp_path, log_level="loud")
    with pytest.raises(ConfigError, match=r"--log-levle: unknown setting. Did you mean `log_level`"):
        load(tmp_path, log_levle="info")


def test_files_that_are_no_text_are_refused(tmp_path: Path) -> None:
    """Bytes that are not UTF-8, a directory, a pipe and too many bytes: each is a sentence, none hangs."""
    for name, make in {
        "latin": lambda path: path.write_bytes(b'[log]\nlevel = "\xe4"\n'),
        "directory": lambda path: path.mkdir(),
        "huge": lambda path: path.write_text("# " * 200_000),
        "digits": lambda path: path.write_text("[limits]\nrank = " + "9" * 9999),
        "deep": lambda path: path.write_text("x = " + "[" * 5000 + "]" * 5000),
    }.items():
        make(tmp_path / name)
        with pytest.raises(ConfigError, match=str(tmp_path / name)):
            load_config(flags={}, environ={"HOME": "/"}, file=tmp_path / name)


# ---- a model's settings


def test_model_settings_of_every_key() -> None:
    """Each key of a model's TOML arrives in its field, and through the wire form too."""
    settings = parse_model_settings(
        """
device = "openvino:GPU"
policy = "require"
precision = "fast"
runtime = "openvino"
threads = 2
instances = 3
tolerance = { rtol = 0.01, atol = 1 }
isolation = "shared"
swap = "replace"
memory_max = "512MiB"
timeout = "90s"
queue_length = 8
versions = [3, 1, 3]
warmup = 0
[[golden]]
inputs = { x = [[1.0, 2.0]] }
outputs = { label = ["seven"] }
[[golden]]
[golden.inputs]
x = [[0, 1]]
[golden.outputs]
label = ["one"]
""",
        source="m.toml",
    )
    assert settings == ModelSettings(
        device="openvino:GPU",
        policy="require",
        precision="fast",
        runtime="openvino",
        threads=2,
        instances=3,
        tolerance=Tolerance(rtol=0.01, atol=1),
        isolation="shared",
        swap="replace",
        memory_max_bytes=512 << 20,
        timeout_s=90,
        queue_length=8,
        versions=(1, 3),
        warmup=0,
        golden=(
            GoldenInline({"x": [[1.0, 2.0]]}, {"label": ["seven"]}),
            GoldenInline({"x": [[0, 1]]}, {"label": ["one"]}),
        ),
    )
    assert ModelSettings.from_wire(json.loads(json.dumps(settings.to_wire()))) == settings


def test_empty_settings_are_the_defaults() -> None:
    """An empty file changes nothing, and the wire form of defaults is empty."""
    assert parse_model_settings("", source="m.toml") == ModelSettings()
    assert ModelSettings().to_wire() == {}
    assert ModelSettings.from_wire({}) == ModelSettings()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('\ndevise = "cpu"\n', "m.toml, line 2: unknown key `devise`. Did you mean `device`?"),
        ('device = "gpu"\n', "m.toml, line 1: `device` must be"),
        ('device = "cpu"\nversions = "latest"\n', "line 2: `versions` must be"),
        ("versions = []\n", "`versions` must be"),
        ("versions = [true]\n", "`versions` must be"),
        ("tolerance = { rtl = 1 }\n", "`tolerance` must be a table such as"),
        ("tolerance = { rtol = -1 }\n", "each part must be a number"),
        ("tolerance = 3\n", "`tolerance` must be"),
        ("threads = 0\n", "from 1 to 1024"),
        ("instances = 64\nthreads = 17\n", "line 2: `threads` × `instances` must be at most 1024"),
        ("instances = 65\n", '"auto" or a whole number from 1 to 64'),
        ('instances = "many"\n', '"auto" or a whole number from 1 to 64'),
        ("golden = 1\n", "`golden` must be"),
        ("[[golden]]\ninputs = {x=[1]}\n", "number 1 is"),
        ("[[golden]]\ninputs = {}\noutputs = {y=[1]}\n", "must have a table of tensors as `inputs`"),
        (
            "[[golden]]\ninputs = {x=1979-05-27}\noutputs = {y=[1]}\n",
            "must hold numbers, booleans or strings",
        ),
        ("[[golden]]\ninputs = {x=" + "[" * 30 + "]" * 30 + "}\noutputs = {y=[1]}\n", "nested deeper"),
        ("golden = " + "[" * 3000 + "]" * 3000, "nested too deep"),
        ("x = " + "{a=" * 3000 + "1" + "}" * 3000, "nested too deep"),
        ("\x00", "not TOML"),
    ],
)
def test_wrong_model_settings_are_refused(text: str, words: str) -> None:
    """A model's TOML is refused with source, line, key and what would be right."""
    with pytest.raises(ConfigError) as caught:
        parse_model_settings(text, source="m.toml")
    assert words in caught.value.message
    assert len(caught.value.message) < 600


def test_wire_form_is_checked_too() -> None:
    """Settings from a damaged book are refused, not believed."""
    with pytest.raises(ConfigError, match="the saved settings"):
        ModelSettings.from_wire({"device": 3})


# ---- values and documentation


@pytest.mark.parametrize("seconds", [0.0, 0.5, 1.0, 20.0, 90.0, 120.0, 3600.0, 5400.0])
def test_durations_shown_are_read_back(seconds: float) -> None:
    """What the documentation shows is what the parser takes."""
    assert units.duration(0, 1e6).parse(units.show_duration(seconds)) == seconds


@pytest.mark.parametrize("size_bytes", [0, 1, 1000, 1024, 3 << 20, 1 << 40])
def test_sizes_shown_are_read_back(size_bytes: int) -> None:
    """What the documentation shows is what the parser takes."""
    assert units.size().parse(units.show_size(size_bytes)) == size_bytes


def test_every_default_passes_its_own_check(tmp_path: Path) -> None:
    """A file that says every default as the documentation shows it gives the defaults."""
    text, section = [], ""
    for line in render_documentation().split("## The models folder")[0].splitlines():
        if line.startswith("### ["):
            section = line[4:]
            text.append(section if "NAME" not in section else "")
        elif line.startswith("| `") and line.split(" | ")[1].strip("`") != line.split(" | ")[1]:
            key, default = line.split(" | ")[:2]
            if not default.startswith("`$"):
                text.append(f"{key.strip('|` ')} = {default.strip('`')}")
    assert len(text) > 30
    assert load(tmp_path, "\n".join(text)) == load(tmp_path)


def test_documentation_is_up_to_date() -> None:
    """docs/configuration.md is what `python -m edged.config` prints; run that to renew it."""
    assert DOCUMENT.read_text() == render_documentation()
    printed = subprocess.run(
        [sys.executable, "-m", "edged.config"], capture_output=True, check=True, text=True
    )
    assert printed.stdout == render_documentation()


def test_settings_are_known_by_what_they_say() -> None:
    """Comments, order and defaults written out change nothing; a value does."""

    def sha256(text: str) -> str:
        return parse_model_settings(text, source="m.toml").sha256()

    assert sha256("") == sha256('device = "auto"  # the default')
    assert sha256("threads = 2\nwarmup = 3") == sha256("warmup = 3\nthreads = 2")
    assert len({sha256(""), sha256("threads = 2"), sha256("threads = 3"), sha256("versions = [1, 3]")}) == 4


def test_inline_golden_samples_fit_into_a_packet() -> None:
    """What does not is told where to go, instead of failing on its way to the worker."""
    numbers = ",".join(["1.5"] * 20_000)
    with pytest.raises(ConfigError, match=r"golden/\*\.npz"):
        parse_model_settings(f"[[golden]]\ninputs.x = [{numbers}]\noutputs.y = [1.0]\n", source="m.toml")


@pytest.mark.parametrize("listen", ["127.0.0.1:9633", "127.8.9.10:1", "[::1]:65535", "off"])
def test_metrics_listen_on_this_machine_only(tmp_path: Path, listen: str) -> None:
    """Loopback addresses with a port, both versions of IP, or nothing."""
    found = load_config(flags={"metrics.listen": listen}, environ={"HOME": str(tmp_path)}, file=None)
    assert (
        found.metrics.listen
        == {
            "127.0.0.1:9633": ("127.0.0.1", 9633),
            "127.8.9.10:1": ("127.8.9.10", 1),
            "[::1]:65535": ("::1", 65535),
            "off": None,
        }[listen]
    )


@pytest.mark.parametrize(
    "listen",
    [
        "0.0.0.0:1",
        "192.168.1.2:1",
        "[::]:1",
        "localhost:1",
        "127.0.0.1",
        "127.0.0.1:0",
        ":1",
        "127.0.0.1:65536",
        "127.0.0.256:1",
        "on",
    ],
)
def test_metrics_are_given_to_no_other_machine(tmp_path: Path, listen: str) -> None:
    """An address that others reach is refused when the settings are read."""
    with pytest.raises(ConfigError, match="loopback"):
        load_config(flags={"metrics.listen": listen}, environ={"HOME": str(tmp_path)}, file=None)


def test_the_metrics_file_is_on_in_the_service_and_off_elsewhere(tmp_path: Path) -> None:
    """In the runtime directory; it can be moved and turned off, and must have the name that is collected."""
    service = {"HOME": str(tmp_path), "RUNTIME_DIRECTORY": "/run/edged", "STATE_DIRECTORY": "/var/lib/edged"}

    def textfile(environ: dict[str, str], value: str | None = None) -> Path | None:
        return load_config(flags={"metrics.textfile": value}, environ=environ, file=None).metrics.textfile

    assert textfile(service) == Path("/run/edged/metrics/edged.prom")
    assert textfile({"HOME": str(tmp_path)}) is None
    assert textfile(service, "off") is None
    assert textfile(service, "/run/x/y.prom") == Path("/run/x/y.prom")
    with pytest.raises(ConfigError, match="prom"):
        textfile(service, "/run/x/y.txt")


def test_a_further_service_s_metrics_carry_its_name(tmp_path: Path) -> None:
    """From the runtime directory that `edged@NAME.service` has; the first service's carry none."""

    def name(runtime: str, **flags: str) -> str:
        environ = {"HOME": str(tmp_path), "RUNTIME_DIRECTORY": runtime, "STATE_DIRECTORY": "/var/lib/x"}
        return load_config(flags=flags, environ=environ, file=None).metrics.name

    assert name("/run/edged") == ""
    assert name("/run/edged-left") == "left"
    assert name("/run/edged-left", metrics_name="right") == "right"
    assert name("/run/edged-l\\x2dt") == ""
