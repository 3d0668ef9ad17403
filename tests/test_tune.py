"""`edgectl tune` beside the daemon: the settings file it writes, the text and the plot it shows."""

from __future__ import annotations

import argparse
import os
import stat
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edged.cli.export import ExportError, edited, export, settings_for
from edged.cli.session import Failure, Session
from edged.cli.tables import clean
from edged.cli.tune import _accepted, _against, _settings_file, budget, plot, setup_text
from edged.config import parse_model_settings

SETUP = {"runtime": "openvino", "device": "CPU", "threads": 2, "instances": 4, "max_batch_size": 8}
WANTED = {"runtime": "openvino", "device": "openvino:CPU", "threads": 2, "instances": 4, "max_batch_size": 8}

OWNERS = """\
# Ours, do not touch.
threads = 16   # the whole machine

warmup = 3
device="auto" # whatever is there

# The answer that we know.
[[golden]]
inputs = { x = [1.0] }
outputs = { y = [2.0] }
"""


def test_an_export_keeps_every_comment_and_key_of_the_owners() -> None:
    """Only the lines of the keys change; new ones stand before the first table and its comment."""
    after = edited(OWNERS, WANTED)
    assert after == OWNERS.replace("threads = 16 ", "threads = 2 ").replace(
        'device="auto"', 'device="openvino:CPU"'
    ).replace(
        "\n# The answer",
        'runtime = "openvino"\ninstances = 4\nmax_batch_size = 8\n\n# The answer',
    )
    assert edited(after, WANTED) == after


@pytest.mark.parametrize(
    "text",
    [
        "threads = [1,\n 2]\n",
        'precision = """\nthreads = 3\n"""\nx = 1\n',
        '"threads" = 3\n',
        "threads = 1_6\n",
        "a.b = 1\n",
        "",
        "# only a comment",
        "warmup = 1\r\n[table]\r\nx = 1\r\n",
        "[table]\nthreads = 7\n",
    ],
)
def test_an_edit_says_what_was_wanted_or_is_refused(text: str) -> None:
    """Whatever the file looks like: never another key lost or changed."""
    before = tomllib.loads(text)
    try:
        after = tomllib.loads(edited(text, WANTED))
    except ExportError:
        return
    assert after == {**before, **WANTED}


@given(st.text(alphabet="ab=[]\"'#\n \r1.{}", max_size=60))
def test_no_text_makes_an_edit_lose_something(text: str) -> None:
    """Either exactly the keys are set, or the file is refused."""
    try:
        after = edited(text, {"threads": 2})
    except ExportError:
        return
    parsed = tomllib.loads(after.replace("\r\n", "\n"))
    assert parsed.pop("threads") == 2
    before = tomllib.loads(text.replace("\r\n", "\n"))
    before.pop("threads", None)
    assert parsed == before


def test_an_export_replaces_the_file_whole_and_keeps_its_mode(tmp_path: Path) -> None:
    """Through a link too; a second time there is nothing to do, and the file is not touched."""
    real = tmp_path / "elsewhere.toml"
    real.write_text(OWNERS)
    real.chmod(0o640)
    link = tmp_path / "m.toml"
    link.symlink_to(real)
    assert export(link, WANTED, within=tmp_path)
    assert link.is_symlink()
    assert stat.S_IMODE(real.stat().st_mode) == 0o640
    assert tomllib.loads(real.read_text())["instances"] == 4
    before = real.stat()
    assert not export(link, WANTED, within=tmp_path)
    assert (real.stat().st_ino, real.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert sorted(os.listdir(tmp_path)) == ["elsewhere.toml", "m.toml"]


@pytest.mark.parametrize("there", [True, False])
def test_an_export_does_not_leave_the_models_folder(tmp_path: Path, there: bool) -> None:
    """Whoever may put a link there must not have root, or its owner, write elsewhere or make a file there."""
    folder, outside = tmp_path / "models", tmp_path / "edged.toml"
    folder.mkdir()
    (folder / "m.toml").symlink_to(outside)
    if there:
        outside.write_text("[log]\n")
    with pytest.raises(ExportError, match=r"a link that leads out of .*write it by hand"):
        export(folder / "m.toml", WANTED, within=folder)
    assert outside.exists() == there
    assert not there or outside.read_text() == "[log]\n"


def test_an_export_makes_a_file_where_there_was_none(tmp_path: Path) -> None:
    """What the daemon can read it as is what was measured."""
    assert export(tmp_path / "m.toml", settings_for(SETUP), within=tmp_path)
    settings = parse_model_settings((tmp_path / "m.toml").read_text(), source="m.toml")
    assert (settings.runtime, settings.device, settings.threads) == ("openvino", "openvino:CPU", 2)
    assert (settings.instances, settings.max_batch_size) == (4, 8)


@pytest.mark.parametrize("content", [b"threads = \n", b"\xff\xfe", b'x = """\n'])
def test_what_cannot_be_parsed_is_refused_and_left_alone(tmp_path: Path, content: bytes) -> None:
    """With the lines to write by hand."""
    path = tmp_path / "m.toml"
    path.write_bytes(content)
    with pytest.raises(ExportError, match='write it by hand: runtime = "openvino"; '):
        export(path, WANTED, within=tmp_path)
    assert path.read_bytes() == content
    with pytest.raises(ExportError, match="nothing was changed"):
        export(tmp_path / "nowhere" / "m.toml", WANTED, within=tmp_path)


@pytest.mark.parametrize(
    ("runtime", "device", "selector"),
    [
        ("onnxruntime", "CPU", "cpu"),
        ("onnxruntime", "CUDA:1", "cuda:1"),
        ("openvino", "CPU", "openvino:CPU"),
        ("openvino", "GPU.0", "openvino:GPU.0"),
        ("openvino", "NPU", "openvino:NPU"),
    ],
)
def test_every_device_has_words_that_a_settings_file_knows(runtime: str, device: str, selector: str) -> None:
    """The parser of the settings takes them."""
    found = settings_for({**SETUP, "runtime": runtime, "device": device, "max_batch_size": None})
    assert (found["device"], "max_batch_size" in found) == (selector, False)
    text = edited("", found)
    assert parse_model_settings(text, source="m.toml").device == selector


def rows(*points: tuple[float, float], best: int = 0, current: int = 1) -> list[dict[str, Any]]:
    return [
        {"rows_s": x, "p50_us": y, "best": n == best, "current": n == current, "pareto": n == 2}
        for n, (x, y) in enumerate(points)
    ]


def test_the_plot_has_each_point_in_its_place() -> None:
    """The best and what serves stand out, also where they lie on others."""
    text = plot(rows((100, 1000), (50, 2000), (75, 1500), (100, 1000)), width=11, height=5)
    lines = text.splitlines()
    assert lines[0] == "2.00 ms |@"
    assert lines[2] == "        |     o"
    assert lines[4] == "1.00 ms |          *"
    assert "50" in lines[6]
    assert "100 rows/s" in lines[6]


def test_the_plot_takes_any_figures() -> None:
    """All the same, or over many orders of magnitude; it is never wider than asked for."""
    for points in ([(5, 5), (5, 5)], [(1, 1e6), (1e6, 1), (1e3, 1e3)]):
        lines = plot(rows(*points)).splitlines()
        assert max(map(len, lines)) <= 80
        assert "*" in "".join(lines[:12])


def test_a_budget_is_a_time() -> None:
    """With a unit or in seconds; anything else is refused in words."""
    assert [budget(text) for text in ("60s", "2m", "500ms", "3", "0.5h")] == [60, 120, 0.5, 3, 1800]
    for text in ("0", "-1s", "fast", "", "1d"):
        with pytest.raises(argparse.ArgumentTypeError):
            budget(text)


def test_a_setup_reads_as_a_sentence() -> None:
    """What is one is not said in the plural."""
    assert setup_text(SETUP) == "openvino on CPU, 4 × 2 threads, batch 8"
    assert setup_text({**SETUP, "instances": 1, "threads": 1, "max_batch_size": None}) == (
        "openvino on CPU, 1 thread"
    )


class Daemon:
    """What `edgectl tune` asks before it measures."""

    def __init__(self, models: Path, row: dict[str, Any]) -> None:
        self._status = {"models_dir": str(models), "models": [{"name": "m", "serving": True, **row}]}

    def server_status(self) -> dict[str, Any]:
        return self._status


def exported_to(models: Path, **row: Any) -> Path:
    """Where the choice of model `m` would be written."""
    with Session(endpoint=None, as_json=False, timeout_s=1.0) as session:
        session._client = Daemon(models, row)  # type: ignore[assignment]  # all of it that is asked here
        try:
            path, folder = _settings_file(session, "m")
            assert models == folder
            return path
        finally:
            session._client = None


def test_an_export_goes_to_the_models_own_settings_file(tmp_path: Path) -> None:
    """The one that it has, else the one that its kind of entry would have."""
    assert exported_to(tmp_path, settings_file="m.toml") == tmp_path / "m.toml"
    assert exported_to(tmp_path) == tmp_path / "m.toml"
    (tmp_path / "m").mkdir()
    assert exported_to(tmp_path) == tmp_path / "m" / "model.toml"
    with pytest.raises(Failure, match="does not serve"):
        exported_to(tmp_path, serving=False)


def test_a_bundle_whose_sums_name_its_settings_is_not_written_to(tmp_path: Path) -> None:
    """It would not pass any more, and the model would be gone."""
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "SHA256SUMS").write_text(f"{'0' * 64}  model.onnx\n")
    assert exported_to(tmp_path) == tmp_path / "m" / "model.toml"
    (tmp_path / "m" / "SHA256SUMS").write_text(f"{'0' * 64}  model.onnx\n{'0' * 64}  model.toml\n")
    with pytest.raises(Failure, match="export it where it is made"):
        exported_to(tmp_path)


def unproven_report(**changes: Any) -> dict[str, Any]:
    """A report in which another runtime would be the best if its answers were taken for good."""
    current = {**SETUP, "runtime": "onnxruntime", "current": True, "agrees": True, "proven": True, "why": ""}
    other = {
        **SETUP,
        "current": False,
        "agrees": False,
        "proven": False,
        "why": "Relu differs; and more",
        "obstacles": ["Relu differs", "Mul of INT64 differs\x1b[2J"],
        "remedy": "say so",
    }
    return {"name": "m", "rows": [current, other, other], "best_unproven": SETUP, **changes}


def test_every_disagreement_is_shown_once_for_each_device() -> None:
    """With what would allow it; of a row without any the reason; of what is proven nothing."""
    hostile = clean("Mul of INT64 differs\x1b[2J")
    assert "\x1b" not in hostile
    assert _against(unproven_report()) == (
        f"not proven: openvino on CPU\n  - Relu differs\n  - {hostile}\n  - say so"
    )
    row = {**SETUP, "current": False, "agrees": True, "proven": False, "why": "a constant", "obstacles": []}
    assert _against(unproven_report(rows=[row])) == "not proven: openvino on CPU\n  - a constant"
    assert _against(unproven_report(rows=[{**row, "proven": True}])) == ""


@pytest.mark.parametrize(
    ("yes", "accept", "unproven", "applied"),
    [
        (True, True, SETUP, True),
        (True, False, SETUP, False),
        (False, True, SETUP, False),
        (True, True, None, False),
    ],
)
def test_what_is_not_proven_takes_a_flag_of_its_own(
    yes: bool, accept: bool, unproven: dict[str, Any] | None, applied: bool
) -> None:
    """Without a terminal `--yes` alone applies what is proven, and the flag alone nothing."""
    session = Session(endpoint=None, as_json=True, timeout_s=1.0)
    args = argparse.Namespace(yes=yes, accept_unproven=accept)
    assert _accepted(session, unproven_report(best_unproven=unproven), args) == applied
