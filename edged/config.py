"""Settings of the daemon and of each model, checked once and then frozen.

Owns every key that `edged.toml`, `EDGED_*` and a model's own TOML may hold. One table names each key
with its kind, its field and its sentence; the checks and `docs/configuration.md` (`python -m
edged.config` prints it) are both made from that table, so they cannot part. Reads its one file and the
environment it is handed; no clock, no socket, no runtime.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import pwd
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from edged import units
from edged.units import Kind, ValueProblem, quoted

__all__ = [
    "SETTINGS_BYTES_MAX",
    "CacheSettings",
    "Config",
    "ConfigError",
    "DevicesConfig",
    "GoldenInline",
    "LimitsConfig",
    "LoadingConfig",
    "LogConfig",
    "MetricsConfig",
    "ModelSettings",
    "ResourcesConfig",
    "RuntimeConfig",
    "ServerConfig",
    "StoreConfig",
    "Tolerance",
    "flattened",
    "load_config",
    "parse_model_settings",
    "render_documentation",
]

RUNTIMES = ("onnxruntime", "openvino")
SETTINGS_BYTES_MAX = 256 * 1024
"""A file of settings holds some lines; golden samples beyond this belong into `golden/`."""
_SOCKET_PATH_BYTES_MAX = 107
"""sun_path's 108 bytes less the closing NUL (unix(7))."""
_SOCKET_NAME_LONGEST = "events.sock"
_GOLDEN_SAMPLES_MAX = 64
_GOLDEN_BYTES_MAX = 128 * 1024
"""They go to the worker in one packet, of which the kernel takes about 208 KB."""
_GOLDEN_DEPTH_MAX = 16  # the rank that the wire allows

BATCH_MAX = 1024
"""Beyond it no device of this size gains anything, and the slot's memory grows with it."""

_MIB = 1 << 20
_GIB = 1 << 30


class ConfigError(Exception):
    """A setting is wrong; the message names the file, the line, the key and what would be right."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


OPERATORS_DIR = "operators"
"""Where, below the state directory, the tables of operators are that were made on this device."""


@dataclass(frozen=True)
class ServerConfig:
    """`[server]`: where the daemon lives and how it starts and ends."""

    endpoint: str
    models: Path
    state_dir: Path
    cache_dir: Path
    startup_wait_s: float = 20.0
    shutdown_grace_s: float = 5.0


@dataclass(frozen=True)
class LimitsConfig:
    """`[limits]`: the bounds of what a client may send and have waiting."""

    header_bytes: int = 64 * 1024
    message_bytes: int = 256 * _MIB
    frames: int = 64
    tensors: int = 256
    rank: int = 16
    inflight_per_client: int = 256
    queue_length: int = 256
    queue_bytes: int = 512 * _MIB
    clients: int = 1024
    lease_bytes: int = 256 * _MIB
    leases: int = 64
    cache_bytes: int = 64 * _MIB


@dataclass(frozen=True)
class ResourcesConfig:
    """`[resources]`: what edged may take of the machine. `memory` is bytes (int) or a fraction (float)."""

    memory: int | float = 0.8
    memory_pressure: float = 20.0
    disk_free_min_bytes: int = 256 * _MIB
    temperature_max_c: float = 95.0
    sample_s: float = 1.0


@dataclass(frozen=True)
class DevicesConfig:
    """`[devices]`: which devices are tried, in which order."""

    order: tuple[str, ...] = ("cuda", "openvino:GPU", "openvino:NPU", "cpu", "openvino:CPU")
    exclude: tuple[str, ...] = ()
    probe_timeout_s: float = 30.0


@dataclass(frozen=True)
class LoadingConfig:
    """`[loading]`: how models get from the folder into service."""

    concurrency: int = 1
    timeout_s: float = 120.0
    rescan_s: float = 30.0
    settle_s: float = 1.0


@dataclass(frozen=True)
class StoreConfig:
    """`[store]`: the private copies."""

    keep_versions: int = 2
    max_bytes: int | None = None


@dataclass(frozen=True)
class LogConfig:
    """`[log]`: what is said, and how."""

    level: str = "info"
    format: str = "auto"


@dataclass(frozen=True)
class MetricsConfig:
    """`[metrics]`: where Prometheus finds them. `listen` is a host and a port; None is off for both."""

    textfile: Path | None = None
    interval_s: float = 15.0
    name: str = ""
    listen: tuple[str, int] | None = None


@dataclass(frozen=True)
class RuntimeConfig:
    """`[runtimes.NAME]`: the interpreter of this runtime's workers; None is the daemon's own."""

    python: str | None = None


@dataclass(frozen=True)
class Config:
    """Everything that `edged.toml`, the environment and the flags say, with the defaults filled in."""

    server: ServerConfig
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    resources: ResourcesConfig = field(default_factory=ResourcesConfig)
    devices: DevicesConfig = field(default_factory=DevicesConfig)
    loading: LoadingConfig = field(default_factory=LoadingConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    log: LogConfig = field(default_factory=LogConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    runtimes: Mapping[str, RuntimeConfig] = field(default_factory=dict)


@dataclass(frozen=True)
class Tolerance:
    """How far two answers may differ and still agree: `|a - b| <= atol + rtol * |b|`."""

    rtol: float = 1e-3
    atol: float = 1e-4


@dataclass(frozen=True)
class CacheSettings:
    """How many bytes of a model's answers are kept, and for how long; None is for as long as they fit."""

    bytes: int
    ttl_s: float | None = None


@dataclass(frozen=True)
class GoldenInline:
    """One known answer from a model's TOML: nested lists of numbers, booleans or strings by tensor name."""

    inputs: Mapping[str, Any]
    outputs: Mapping[str, Any]


@dataclass(frozen=True)
class ModelSettings:
    """What `NAME.toml` or `NAME/model.toml` says. None means: the daemon's own setting, or measured."""

    device: str = "auto"
    policy: str = "prefer"
    precision: str = "f32"
    runtime: str | None = None
    threads: int | None = None
    instances: int | str | None = None
    tolerance: Tolerance = Tolerance()
    isolation: str = "model"
    swap: str = "beside"
    memory_max_bytes: int | None = None
    timeout_s: float | None = None
    queue_length: int | None = None
    max_batch_size: int | None = None
    rows: str = "prove"
    exact: bool = False
    finite_inputs: bool = False
    max_queue_delay_s: float = 0.0
    cache: CacheSettings | None = None
    versions: str | tuple[int, ...] = "latest:1"
    warmup: int = 1
    golden: tuple[GoldenInline, ...] = ()

    def to_wire(self) -> dict[str, Any]:
        """A plain, JSON-able dict in the keys and kinds of the TOML; defaults are left out."""
        plain: dict[str, Any] = {}
        for key in _MODEL_KEYS:
            value = getattr(self, key.field)
            if value == getattr(_MODEL_DEFAULTS, key.field):
                continue
            match value:
                case CacheSettings():
                    ttl = {} if value.ttl_s is None else {"ttl": value.ttl_s}
                    plain[key.name] = {"bytes": value.bytes, **ttl}
                case Tolerance():
                    plain[key.name] = {"rtol": value.rtol, "atol": value.atol}
                case tuple():
                    plain[key.name] = [_golden_to_wire(each) for each in value]
                case _:
                    plain[key.name] = value
        return plain

    def sha256(self) -> str:
        """What these settings are known by: the same for every text that is read as the same settings."""
        plain = json.dumps(self.to_wire(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(plain.encode()).hexdigest()

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> ModelSettings:
        """The settings that `to_wire` wrote; raises ConfigError for anything else."""
        return _model_settings(wire, _Place("the saved settings", ""))


def _golden_to_wire(each: object) -> object:
    if isinstance(each, GoldenInline):
        return {"inputs": dict(each.inputs), "outputs": dict(each.outputs)}
    return each


# ---- the table ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Key:
    """One key: its name in TOML, the field it fills, its kind, its sentence."""

    name: str
    field: str
    kind: Kind
    text: str
    default_text: str = ""  # said in the documentation where the default depends on the machine


def _parse_endpoint(value: object) -> object:
    wants = "ipc:// and an absolute path, such as ipc:///run/edged/edged.sock"
    if not isinstance(value, str) or not value.startswith("ipc:///") or "\0" in value:
        raise ValueProblem(f"must be {wants}, not {quoted(value)}")
    longest = os.fsencode(str(Path(value.removeprefix("ipc://")).parent / _SOCKET_NAME_LONGEST))
    own = os.fsencode(value.removeprefix("ipc://"))
    if max(len(longest), len(own)) > _SOCKET_PATH_BYTES_MAX:
        raise ValueProblem(
            f"is too long: a socket's path has at most {_SOCKET_PATH_BYTES_MAX} bytes, "
            f"{quoted(value)} (with {_SOCKET_NAME_LONGEST} beside it) needs {max(len(longest), len(own))}"
        )
    if os.path.basename(value) != "edged.sock":
        raise ValueProblem(
            f"must end in /edged.sock, not be {quoted(value)}: only the directory can be chosen"
        )
    return value


def _parse_textfile(value: object) -> object:
    if value == "off":
        return None
    parsed = units.path().parse(value)
    if not str(parsed).endswith(".prom"):
        raise ValueProblem(f"must end in .prom, or node_exporter passes it over, not be {quoted(value)}")
    return parsed


_LISTEN_RE = re.compile(r"(?:(127(?:\.\d{1,3}){3})|\[(::1)\]):(\d{1,5})")


def _parse_listen(value: object) -> object:
    """Addresses of this machine alone: whoever can connect may read, and nobody is asked who he is."""
    wants = '"off", or a loopback address and a port such as "127.0.0.1:9633" or "[::1]:9633"'
    if value == "off":
        return None
    found = _LISTEN_RE.fullmatch(value) if isinstance(value, str) else None
    if (
        found is None
        or not 0 < int(found[3]) < 1 << 16
        or any(int(n) > 255 for n in (found[1] or "").split(".") if n)
    ):
        raise ValueProblem(f"must be {wants}, not {quoted(value)}")
    return found[1] or found[2], int(found[3])


def _show_listen(value: object) -> str:
    return '"off"' if not isinstance(value, tuple) else f'"{value[0]}:{value[1]}"'


def _parse_versions(value: object) -> object:
    wants = '"latest:N", "all" or a list of version numbers such as [1, 3]'
    if value == "all" or (isinstance(value, str) and re.fullmatch(r"latest:[1-9][0-9]{0,2}", value)):
        return value
    if isinstance(value, list | tuple) and 0 < len(value) <= 100:
        numbers = [each for each in value if isinstance(each, int) and not isinstance(each, bool)]
        if len(numbers) == len(value) and all(0 < each <= VERSION_MAX for each in numbers):
            return tuple(sorted(set(numbers)))
    raise ValueProblem(f"must be {wants}, not {quoted(value)}")


def _parse_tolerance(value: object) -> object:
    wants = "a table such as { rtol = 1e-3, atol = 1e-4 }"
    if not isinstance(value, Mapping) or not set(value) <= {"rtol", "atol"}:
        raise ValueProblem(f"must be {wants}, not {quoted(value)}")
    bounds = units.number(0, 1e6)
    try:
        parsed = {str(name): float(str(bounds.parse(each))) for name, each in value.items()}
    except ValueProblem as problem:
        raise ValueProblem(f"must be {wants}; each part {problem}") from None
    return Tolerance(**parsed)


def _parse_cache(value: object) -> object:
    wants = 'a table such as { bytes = "16MiB", ttl = "10s" }'
    if not isinstance(value, Mapping) or "bytes" not in value or not set(value) <= {"bytes", "ttl"}:
        raise ValueProblem(f"must be {wants}, not {quoted(value)}")
    try:
        nbytes = units.size(1024, 64 * _GIB).parse(value["bytes"])
        ttl_s = units.duration(0.001, 365 * 86400).parse(value["ttl"]) if "ttl" in value else None
    except ValueProblem as problem:
        raise ValueProblem(f"must be {wants}; a part {problem}") from None
    assert isinstance(nbytes, int)
    assert isinstance(ttl_s, float | None)
    return CacheSettings(nbytes, ttl_s)


def _parse_golden(value: object) -> object:
    wants = "[[golden]] tables, each with `inputs` and `outputs` by tensor name"
    if not isinstance(value, list | tuple) or len(value) > _GOLDEN_SAMPLES_MAX:
        raise ValueProblem(f"must be at most {_GOLDEN_SAMPLES_MAX} {wants}, not {quoted(value)}")
    samples = []
    packed_bytes = 0
    for number, sample in enumerate(value, 1):
        if not isinstance(sample, Mapping) or set(sample) != {"inputs", "outputs"}:
            raise ValueProblem(f"must be {wants}; number {number} is {quoted(sample)}")
        for side in ("inputs", "outputs"):
            tensors = sample[side]
            if not isinstance(tensors, Mapping) or not tensors:
                raise ValueProblem(f"number {number} must have a table of tensors as `{side}`")
            for name, data in tensors.items():
                packed_bytes += len(str(name).encode())
                packed_bytes += _check_nested(data, f"number {number}, `{side}.{str(name)[:64]}`", 0)
                if packed_bytes > _GOLDEN_BYTES_MAX:
                    raise ValueProblem(
                        f"number {number} and those before it take more than {_GOLDEN_BYTES_MAX} bytes, 9 "
                        "for each number: put them into golden/*.npz beside the model"
                    )
        samples.append(GoldenInline(dict(sample["inputs"]), dict(sample["outputs"])))
    return tuple(samples)


def _check_nested(data: object, where: str, depth: int) -> int:
    """About how many bytes it takes in a packet."""
    if depth > _GOLDEN_DEPTH_MAX:
        raise ValueProblem(f"{where} is nested deeper than {_GOLDEN_DEPTH_MAX} lists")
    if isinstance(data, list):
        return 5 + sum(_check_nested(each, where, depth + 1) for each in data)
    if not isinstance(data, bool | int | float | str):
        raise ValueProblem(f"{where} must hold numbers, booleans or strings, not {quoted(data)}")
    return 9 if not isinstance(data, str) else 5 + len(data.encode())


VERSION_MAX = (1 << 31) - 1
"""The largest version number: what a signed 32-bit integer of other servers' tools still takes."""

THREADS_MAX = 1024
"""Of one model, all its instances together: more than any machine of this kind has processors."""

INSTANCES_MAX = 64
"""Of one model: each has a thread and a slot of shared memory, and no device has more cores to give."""


_DEVICE = units.kind_of_text(
    'a device such as "cpu", "cuda", "cuda:1", "openvino:GPU", "openvino:GPU.1", "openvino:NPU"',
    r"cpu|cuda(:\d{1,3})?|openvino(:(CPU|NPU|GPU(\.\d{1,3})?))?",
)
_DEVICE_OR_AUTO = units.kind_of_text(
    '"auto" or a device such as "cpu", "cuda", "openvino", "openvino:GPU"',
    r"auto|cpu|cuda(:\d{1,3})?|openvino(:(CPU|NPU|GPU(\.\d{1,3})?))?",
)
_ENDPOINT = Kind("an ipc:// endpoint", _parse_endpoint, str, lambda value: f'"{value}"')
_TEXTFILE = Kind(
    'a path that ends in .prom, or "off"',
    _parse_textfile,
    str,
    lambda value: '"off"' if value is None else f'"{value}"',
)
_LISTEN = Kind(
    'a loopback address and a port such as "127.0.0.1:9633", or "off"', _parse_listen, str, _show_listen
)
_VERSIONS = Kind('"latest:N", "all" or a list of numbers', _parse_versions, str, lambda value: f'"{value}"')
_TOLERANCE = Kind(
    "a table of `rtol` and `atol`, each a number from 0",
    _parse_tolerance,
    str,
    lambda value: (
        f"{{ rtol = {value.rtol:g}, atol = {value.atol:g} }}" if isinstance(value, Tolerance) else ""
    ),
)
_CACHE = Kind(
    "a table of `bytes`, a size, and `ttl`, a duration that may be left out",
    _parse_cache,
    str,
    lambda value: "none",
)
_GOLDEN = Kind("tables, each with `inputs` and `outputs`", _parse_golden, str, lambda value: "none")

_SECTIONS: Mapping[str, tuple[str, type, tuple[_Key, ...]]] = {
    "server": (
        "Where the daemon lives and how it starts and ends.",
        ServerConfig,
        (
            _Key(
                "endpoint",
                "endpoint",
                _ENDPOINT,
                "The socket of the protocol; `admin.sock`, `events.sock` and `lease.sock` lie beside it.",
                "`$RUNTIME_DIRECTORY/edged.sock`, else `$XDG_RUNTIME_DIR/edged/edged.sock`, else "
                "`run/edged.sock` in the state directory",
            ),
            _Key(
                "models",
                "models",
                units.path(),
                "The folder that is watched.",
                "`$STATE_DIRECTORY/models`, else `$XDG_DATA_HOME/edged/models`",
            ),
            _Key(
                "state_dir",
                "state_dir",
                units.path(),
                "The private copies and the books; one daemon at a time.",
                "`$STATE_DIRECTORY`, else `$XDG_STATE_HOME/edged`",
            ),
            _Key(
                "cache_dir",
                "cache_dir",
                units.path(),
                "Compiled models; may be deleted while the daemon is stopped.",
                "`$CACHE_DIRECTORY`, else `cache` in `$STATE_DIRECTORY`, else `$XDG_CACHE_HOME/edged`",
            ),
            _Key(
                "startup_wait",
                "startup_wait_s",
                units.duration(0, 3600),
                "The daemon says it is ready at the latest then; models that still compile stay LOADING.",
            ),
            _Key(
                "shutdown_grace",
                "shutdown_grace_s",
                units.duration(0, 600),
                "How long a stop waits for what runs.",
            ),
        ),
    ),
    "limits": (
        "What a client may send and have waiting. Beyond a limit the answer is an error that names it.",
        LimitsConfig,
        (
            _Key("header_bytes", "header_bytes", units.size(1024, _MIB), "Bytes of a request's header."),
            _Key(
                "message_bytes",
                "message_bytes",
                units.size(64 * 1024, 16 * _GIB),
                "Bytes of a whole message, of a request and of a reply.",
            ),
            _Key("frames", "frames", units.whole(1, 1024), "Tensor frames of a message."),
            _Key("tensors", "tensors", units.whole(1, 4096), "Tensors of a request."),
            _Key("rank", "rank", units.whole(1, 64), "Dimensions of a tensor."),
            _Key(
                "inflight_per_client",
                "inflight_per_client",
                units.whole(1, 65536),
                "Unanswered requests of one client.",
            ),
            _Key("queue_length", "queue_length", units.whole(1, 65536), "Waiting requests of one model."),
            _Key(
                "queue_bytes",
                "queue_bytes",
                units.size(64 * 1024, 64 * _GIB),
                "Bytes of all waiting requests together; one client alone has at most half of them.",
            ),
            _Key("clients", "clients", units.whole(1, 65536), "Clients that are kept account of."),
            _Key(
                "lease_bytes",
                "lease_bytes",
                units.size(0, 64 * _GIB),
                "Bytes of shared memory that the processes of one user may lease together; 0 leases none.",
            ),
            _Key("leases", "leases", units.whole(1, 1024), "Leased regions of one connection."),
            _Key(
                "cache_bytes",
                "cache_bytes",
                units.size(0, 64 * _GIB),
                "Bytes of kept answers of all models together; a model keeps some only where its `cache` "
                "says so.",
            ),
        ),
    ),
    "resources": (
        "What edged may take of the machine, and from where on it refuses to load more.",
        ResourcesConfig,
        (
            _Key(
                "memory",
                "memory",
                units.memory(),
                "What the daemon and its workers may use, of the machine or of the cgroup's limit.",
            ),
            _Key(
                "memory_pressure",
                "memory_pressure",
                units.number(0, 100),
                "Memory pressure (PSI some, avg10, percent) from which on loads are refused.",
            ),
            _Key(
                "disk_free_min",
                "disk_free_min_bytes",
                units.size(),
                "Bytes that staging leaves free on the state directory's disk.",
            ),
            _Key(
                "temperature_max",
                "temperature_max_c",
                units.number(0, 150),
                "Degrees Celsius from which on loads are refused.",
            ),
            _Key("sample", "sample_s", units.duration(0.1, 60), "How often resources are sampled."),
        ),
    ),
    "devices": (
        "Which devices are tried, in which order.",
        DevicesConfig,
        (
            _Key(
                "order",
                "order",
                units.list_of(_DEVICE, length_max=32),
                'Where a model with `device = "auto"` starts: the first of these that works.',
            ),
            _Key("exclude", "exclude", units.list_of(_DEVICE, length_max=32), "Devices never to be used."),
            _Key(
                "probe_timeout",
                "probe_timeout_s",
                units.duration(1, 600),
                "How long the trial run on one device may take.",
            ),
        ),
    ),
    "loading": (
        "How models get from the folder into service.",
        LoadingConfig,
        (
            _Key(
                "concurrency", "concurrency", units.whole(1, 64), "Models loaded at the same time per device."
            ),
            _Key(
                "timeout",
                "timeout_s",
                units.duration(1, 3600),
                "How long one load may take, warm-up and golden samples included.",
            ),
            _Key(
                "rescan",
                "rescan_s",
                units.duration(1, 3600),
                "How often the folder is read without any event; events only make it sooner.",
            ),
            _Key(
                "settle",
                "settle_s",
                units.duration(0, 600),
                "How long files must stay as they are before they are taken.",
            ),
        ),
    ),
    "store": (
        "The private copies that models are served from.",
        StoreConfig,
        (
            _Key(
                "keep_versions",
                "keep_versions",
                units.whole(1, 100),
                "Contents kept of each model, the serving one included.",
            ),
            _Key(
                "max_bytes",
                "max_bytes",
                units.size(_MIB),
                "Bytes of all copies together; what serves and what was last good is never evicted.",
                "no limit but the disk",
            ),
        ),
    ),
    "log": (
        "What is said, and how.",
        LogConfig,
        (
            _Key("level", "level", units.choice("debug", "info", "warning", "error"), "From which level on."),
            _Key(
                "format",
                "format",
                units.choice("auto", "text", "json", "journal"),
                "`auto`: the journal under systemd, readable lines otherwise.",
            ),
        ),
    ),
    "metrics": (
        "Figures for Prometheus.",
        MetricsConfig,
        (
            _Key(
                "textfile",
                "textfile",
                _TEXTFILE,
                "Where node_exporter's textfile collector finds them; best in memory, as /run is.",
                "`$RUNTIME_DIRECTORY/metrics/edged.prom` under systemd, else off",
            ),
            _Key("interval", "interval_s", units.duration(1, 3600), "How often the file is written."),
            _Key(
                "name",
                "name",
                units.kind_of_text("at most 64 letters, digits, `_`, `-` and `.`", r"[A-Za-z0-9_.-]{0,64}"),
                "A label `daemon` on each figure, so that two daemons on one machine are told apart.",
                "the NAME of `edged@NAME.service`, else none",
            ),
            _Key(
                "listen",
                "listen",
                _LISTEN,
                "Where `GET /metrics` is answered. The unit's sandbox must be opened for it: "
                "`packaging/prometheus/metrics-http.conf`.",
            ),
        ),
    ),
}

_RUNTIME_KEYS: tuple[_Key, ...] = (
    _Key(
        "python",
        "python",
        units.path(),
        "The interpreter of this runtime's workers (Python 3.10 or later), for a vendor's own build.",
        "the daemon's own",
    ),
)

_MODEL_KEYS: tuple[_Key, ...] = (
    _Key("device", "device", _DEVICE_OR_AUTO, "Where the model runs."),
    _Key(
        "policy",
        "policy",
        units.choice("prefer", "require"),
        "`require`: rather UNAVAILABLE than on another device.",
    ),
    _Key(
        "precision",
        "precision",
        units.choice("f32", "fast"),
        "`f32`: as the model says; `fast`: what the device is fastest in. Each reply names what was used.",
    ),
    _Key("runtime", "runtime", units.choice(*RUNTIMES), "Pins the runtime.", "measured"),
    _Key(
        "threads",
        "threads",
        units.whole(1, THREADS_MAX),
        "Pins the threads of each instance; of all together at most 1024.",
        "the CPUs divided by the instances, or as tuned",
    ),
    _Key(
        "instances",
        "instances",
        units.whole_or("auto", 1, INSTANCES_MAX),
        "How many runs of the model are executed at once; `auto`: what gives the most rows a second on this "
        "machine while none takes twice as long.",
        "1, or as tuned",
    ),
    _Key("tolerance", "tolerance", _TOLERANCE, "How far answers may be from golden samples."),
    _Key(
        "isolation",
        "isolation",
        units.choice("model", "shared"),
        "`model`: a worker process of its own; `shared`: one together with other small models.",
    ),
    _Key(
        "swap",
        "swap",
        units.choice("beside", "replace"),
        "`beside`: the new version loads while the old one serves; `replace`: the old one is unloaded first.",
    ),
    _Key(
        "memory_max",
        "memory_max_bytes",
        units.size(_MIB),
        "What the model's worker may use; beyond it the worker is ended.",
        "what `[resources]` leaves",
    ),
    _Key(
        "timeout",
        "timeout_s",
        units.duration(1, 3600),
        "How long one run may take; a worker that does not stop then is ended.",
        "2 minutes",
    ),
    _Key(
        "queue_length",
        "queue_length",
        units.whole(1, 65536),
        "Requests that may wait for this model.",
        "`[limits] queue_length`",
    ),
    _Key(
        "max_batch_size",
        "max_batch_size",
        units.whole(1, BATCH_MAX),
        "Rows of different requests that may share a run; 1: never. Each content must first prove that its "
        "rows stand alone.",
        "measured",
    ),
    _Key(
        "rows",
        "rows",
        units.choice("prove", "independent"),
        "`prove`: requests share a run only where the model's graph and a trial show that no row changes "
        "another's answer; `independent`: its owner says so, for a model of which that cannot be shown.",
    ),
    _Key(
        "exact",
        "exact",
        units.flag(),
        "Requests share a run only where their answers are bit for bit what they are alone; else floats may "
        "differ by the runtime's own rounding, 2e-5 of the output's largest number in FP32.",
    ),
    _Key(
        "finite_inputs",
        "finite_inputs",
        units.flag(),
        "The owner's word that no input is NaN or infinite: then what a runtime makes of such keeps the "
        "model neither from sharing runs nor from another runtime.",
    ),
    _Key(
        "max_queue_delay",
        "max_queue_delay_s",
        units.duration(0, 10),
        "How long a request may be kept waiting for others to share its run, though the model is free.",
    ),
    _Key(
        "cache",
        "cache",
        _CACHE,
        "Answers that are kept, written `[cache]`: the same inputs again are answered without a run. What "
        "has inputs or outputs in leased memory is never kept.",
    ),
    _Key(
        "versions",
        "versions",
        _VERSIONS,
        "Which of the folder's version directories are served.",
    ),
    _Key("warmup", "warmup", units.whole(0, 100), "Runs before the model is called ready."),
    _Key(
        "golden",
        "golden",
        _GOLDEN,
        f"At most {_GOLDEN_SAMPLES_MAX} known answers, written `[[golden]]`; a content that fails one is not "
        "served.",
    ),
)

_MODEL_DEFAULTS = ModelSettings()

_SHORT_ENVIRONMENT = {"EDGED_ENDPOINT": ("server", "endpoint"), "EDGED_MODELS": ("server", "models")}
_OTHER_ENVIRONMENT = ("EDGED_CONFIG",)

# ---- where in a text a key stands -----------------------------------------------------------------------

_PART = r"""(?:[A-Za-z0-9_-]+|"(?:\\.|[^"\\])*"|'[^']*')"""
_DOTTED = rf"{_PART}(?:[ \t]*\.[ \t]*{_PART})*"
_HEADER_RE = re.compile(rf"[ \t]*(\[\[?)[ \t]*({_DOTTED})[ \t]*\]")
_ASSIGN_RE = re.compile(rf"[ \t]*({_DOTTED})[ \t]*=(.*)")
_PART_RE = re.compile(_PART)
_STRING_OR_COMMENT_RE = re.compile(r"""\"(?:\\.|[^"\\])*\"|'[^']*'|\#.*""")


def _parts(dotted: str) -> tuple[str, ...]:
    return tuple(_unquoted(part) for part in _PART_RE.findall(dotted))


def _unquoted(part: str) -> str:
    if "\\" not in part:
        return part.strip("\"'")
    try:
        return next(iter(tomllib.loads(f"{part} = 0")))
    except ValueError:  # not a key after all: this line lies within a string
        return part


def _statements(text: str) -> Iterator[tuple[int, tuple[str | int, ...]]]:
    """Each header and each assignment of a TOML text with its line, as a full path; values are skipped.

    tomllib keeps no positions. This need not understand TOML, only find lines in a text that tomllib
    has accepted: the worst that a misread line can do is to point a message elsewhere.
    """
    table: tuple[str | int, ...] = ()
    counts: dict[tuple[str, ...], int] = {}
    closing, depth = "", 0
    for number, line in enumerate(text.split("\n"), 1):
        if closing:
            closing = "" if closing in line else closing
            continue
        if depth > 0:
            depth += _bracket_balance(line)
            continue
        if header := _HEADER_RE.match(line):
            names = _parts(header[2])
            table = names
            if header[1] == "[[":
                counts[names] = counts.get(names, -1) + 1
                table = (*names, counts[names])
            yield number, table
        elif assign := _ASSIGN_RE.match(line):
            yield number, (*table, *_parts(assign[1]))
            value = assign[2].lstrip()
            if value[:3] in ('"""', "'''"):
                closing = "" if value[:3] in value[3:] else value[:3]
            else:
                depth = _bracket_balance(assign[2])


def _bracket_balance(line: str) -> int:
    bare = _STRING_OR_COMMENT_RE.sub("", line)
    return bare.count("[") + bare.count("{") - bare.count("]") - bare.count("}")


def _find_line(text: str, path: Sequence[str | int]) -> int | None:
    """The line of the statement that comes closest to `path`; None when nothing of it is there."""
    best_length, best_line = 0, None
    for number, statement in _statements(text):
        length = 0
        for want, have in zip(path, statement, strict=False):
            if want != have:
                break
            length += 1
        if length > best_length:
            best_length, best_line = length, number
    return best_line


@dataclass(frozen=True)
class _Place:
    """Where a value came from, so that an error can say it."""

    source: str
    text: str

    def error(self, path: Sequence[str | int], problem: str) -> ConfigError:
        line = _find_line(self.text, path) if self.text else None
        where = self.source if line is None else f"{self.source}, line {line}"
        return ConfigError(f"{where}: {problem}")


def _nearest(name: str, names: Sequence[str]) -> str:
    """` Did you mean …?` for the likeliest slip, or the list when there is none."""
    plain = name.lower().replace("-", "_")
    close = difflib.get_close_matches(plain[:64], names, n=1, cutoff=0.5)
    starts = [each for each in names if plain and (each.startswith(plain) or plain.startswith(each))]
    found = close or starts
    return f" Did you mean `{found[0]}`?" if found else f" Known are: {', '.join(sorted(names))}."


def _parse_toml(text: str, source: str) -> dict[str, Any]:
    """The text as tomllib reads it; every way in which that can fail becomes a ConfigError."""
    if len(text) > SETTINGS_BYTES_MAX:
        raise ConfigError(f"{source}: has {len(text)} characters; at most {SETTINGS_BYTES_MAX} are read")
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ConfigError(f"{source}: values are nested too deep") from None
    except ValueError as error:  # TOMLDecodeError, and int's own for a number of thousands of digits
        message = str(error)
        line = re.search(r"\(at line (\d+), column (\d+)\)", message)
        where = source if line is None else f"{source}, line {line[1]}"
        raise ConfigError(f"{where}: not TOML: {message[:200]}") from None


def _parse_table(
    table: object,
    keys: Sequence[_Key],
    place: _Place,
    path: tuple[str | int, ...],
    *,
    elsewhere: Mapping[str, str] | None = None,
) -> dict[str, object]:
    """The fields that a TOML table sets; unknown keys and wrong values are errors with their line."""
    title = ".".join(str(part) for part in path)
    if not isinstance(table, Mapping):
        raise place.error(path, f"`{title}` must be a table, [{title}], not {quoted(table)}.")
    by_name = {key.name: key for key in keys}
    parsed: dict[str, object] = {}
    for name, value in table.items():
        full = ".".join((*map(str, path), "")) + str(name)[:80]
        key = by_name.get(name)
        if key is None:
            other = (elsewhere or {}).get(name)
            hint = f" It belongs into [{other}]." if other else _nearest(str(name), list(by_name))
            raise place.error((*path, name), f"unknown key {_shown_key(full)}.{hint}")
        try:
            parsed[key.field] = key.kind.parse(value)
        except ValueProblem as problem:
            raise place.error((*path, name), f"{_shown_key(full)} {problem}.") from None
    return parsed


def _shown_key(name: str) -> str:
    return f"`{name}`" if name.isprintable() else quoted(name)


# ---- the daemon's settings ------------------------------------------------------------------------------


class _Paths:
    """The defaults that depend on the environment: systemd's directories, XDG's otherwise.

    The XDG Base Directory Specification says that a relative path in its variables is to be ignored.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ

    def home(self) -> Path:
        home = self._environ.get("HOME", "")
        if not home.startswith("/"):
            try:
                home = pwd.getpwuid(os.getuid()).pw_dir
            except KeyError:
                raise ConfigError(
                    "$HOME is not set and the user has no entry in the password database: set "
                    "EDGED_SERVER_STATE_DIR, EDGED_SERVER_CACHE_DIR, EDGED_MODELS and EDGED_ENDPOINT"
                ) from None
        return Path(home)

    def _systemd(self, variable: str) -> Path | None:
        first = self._environ.get(variable, "").split(":")[0]
        return Path(first) if first.startswith("/") else None

    def _xdg(self, variable: str, fallback: str) -> Path:
        value = self._environ.get(variable, "")
        return (Path(value) if value.startswith("/") else self.home() / fallback) / "edged"

    def models(self) -> Path:
        state = self._systemd("STATE_DIRECTORY")
        return state / "models" if state else self._xdg("XDG_DATA_HOME", ".local/share") / "models"

    def state_dir(self) -> Path:
        return self._systemd("STATE_DIRECTORY") or self._xdg("XDG_STATE_HOME", ".local/state")

    def cache_dir(self) -> Path:
        cache, state = self._systemd("CACHE_DIRECTORY"), self._systemd("STATE_DIRECTORY")
        return cache or (state / "cache" if state else self._xdg("XDG_CACHE_HOME", ".cache"))

    def endpoint(self, state_dir: Path) -> str:
        runtime = self._systemd("RUNTIME_DIRECTORY")
        if runtime is None:
            session = self._environ.get("XDG_RUNTIME_DIR", "")
            user_run = session.startswith("/") and self._systemd("STATE_DIRECTORY") is None
            runtime = Path(session) / "edged" if user_run else state_dir / "run"
        return f"ipc://{runtime / 'edged.sock'}"

    def daemon_name(self) -> str:
        """What the runtime directory of a further service, `edged-NAME`, is called after."""
        runtime = self._systemd("RUNTIME_DIRECTORY")
        name = runtime.name.removeprefix("edged-") if runtime else "edged"
        return name if name != "edged" and re.fullmatch(r"[A-Za-z0-9_.-]{0,64}", name) else ""

    def textfile(self) -> Path | None:
        runtime = self._systemd("RUNTIME_DIRECTORY")
        return runtime / "metrics" / "edged.prom" if runtime else None

    def file(self) -> Path:
        directory = self._systemd("CONFIGURATION_DIRECTORY")
        return (directory or self._xdg("XDG_CONFIG_HOME", ".config")) / "edged.toml"


def load_config(*, flags: Mapping[str, object], environ: Mapping[str, str], file: Path | None) -> Config:
    """The daemon's settings: flags over `EDGED_*` over the file over defaults.

    `flags` maps `"section.key"` (or `"section_key"`, `"endpoint"`, `"models"`) to a text or a value;
    None counts as not given. `file` is the one that was asked for and must be there; without it
    `$EDGED_CONFIG`, else `edged.toml` in `$CONFIGURATION_DIRECTORY` or the XDG directory is read if it
    exists. Raises ConfigError, whose message names the file, the line, the key and the nearest known one.
    """
    paths = _Paths(environ)
    values: dict[tuple[str, str], object] = {}
    runtimes: dict[str, object] = {}
    asked = (
        file if file is not None else Path(environ["EDGED_CONFIG"]) if environ.get("EDGED_CONFIG") else None
    )
    text = _read_config(asked or paths.file(), must_exist=asked is not None)
    if text is not None:
        where = (asked or paths.file()).absolute()
        _read_toml(text, _Place(str(where), text), where.parent, paths, values, runtimes)
    for origin, section, key, raw in (*_from_environment(environ), *_from_flags(flags)):
        try:
            value = key.kind.parse(key.kind.read(raw) if isinstance(raw, str) else raw)
        except ValueProblem as problem:
            raise ConfigError(f"{origin} {problem}.") from None
        value = _resolved(value, Path.cwd(), paths)
        if section.startswith("runtimes."):
            runtimes[section.removeprefix("runtimes.")] = value
        else:
            values[section, key.field] = value
    return _assemble(values, runtimes, paths)


def _read_config(path: Path, *, must_exist: bool) -> str | None:
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as stream:
            raw = stream.read(SETTINGS_BYTES_MAX + 1)
    except FileNotFoundError:
        if must_exist:
            raise ConfigError(f"{path}: there is no such file") from None
        return None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path}, line {line}: not UTF-8, which TOML must be") from None


def _read_toml(
    text: str,
    place: _Place,
    base: Path,
    paths: _Paths,
    values: dict[tuple[str, str], object],
    runtimes: dict[str, object],
) -> None:
    """Puts what the file sets into `values` and `runtimes`; relative paths are relative to the file."""
    elsewhere: dict[str, str] = {}
    for section, (_text, _type, keys) in _SECTIONS.items():
        for key in keys:
            elsewhere.setdefault(key.name, section)
    for section, table in _parse_toml(text, place.source).items():
        if section == "runtimes":
            if not isinstance(table, Mapping):
                raise place.error((section,), "`runtimes` must hold tables, [runtimes.NAME].")
            for name, entry in table.items():
                if name not in RUNTIMES:
                    problem = f"unknown runtime {_shown_key(str(name)[:80])}.{_nearest(str(name), RUNTIMES)}"
                    raise place.error((section, name), problem)
                parsed = _parse_table(entry, _RUNTIME_KEYS, place, (section, name))
                if "python" in parsed:
                    runtimes[name] = _resolved(parsed["python"], base, paths)
            continue
        if section not in _SECTIONS:
            hint = _nearest(section, [*_SECTIONS, "runtimes"])
            if not isinstance(table, Mapping) and section in elsewhere:
                hint = f" It belongs into [{elsewhere[section]}]."
            kind = "section" if isinstance(table, Mapping) else "key"
            raise place.error((section,), f"unknown {kind} {_shown_key(section[:80])}.{hint}")
        keys = _SECTIONS[section][2]
        for field_name, value in _parse_table(table, keys, place, (section,), elsewhere=elsewhere).items():
            values[section, field_name] = _resolved(value, base, paths)


def _resolved(value: object, base: Path, paths: _Paths) -> object:
    """A path made absolute: `~` is the user's home, a relative one hangs below `base`."""
    if not isinstance(value, Path):
        return value
    if value.parts[:1] == ("~",):
        value = paths.home().joinpath(*value.parts[1:])
    return Path(os.path.normpath(base / value))


def _environment_names() -> dict[str, tuple[str, _Key]]:
    names = {
        f"EDGED_{section}_{key.name}".upper(): (section, key)
        for section, (_text, _type, keys) in _SECTIONS.items()
        for key in keys
    }
    for runtime in RUNTIMES:
        for key in _RUNTIME_KEYS:
            names[f"EDGED_RUNTIMES_{runtime}_{key.name}".upper()] = (f"runtimes.{runtime}", key)
    for name, (section, key_name) in _SHORT_ENVIRONMENT.items():
        names[name] = (section, next(key for key in _SECTIONS[section][2] if key.name == key_name))
    return names


def _from_environment(environ: Mapping[str, str]) -> Iterator[tuple[str, str, _Key, object]]:
    """What the environment sets. The long name of a key comes after its short one, and wins."""
    names = _environment_names()
    sections = [*_SECTIONS, "runtimes"]
    for name in sorted(environ, key=lambda each: (each not in _SHORT_ENVIRONMENT, each)):
        if not name.startswith("EDGED_") or name in _OTHER_ENVIRONMENT:
            continue
        if name in names:
            section, key = names[name]
            yield f"${name}", section, key, environ[name]
            continue
        # Other programs may have names of their own here, so only what looks like one of ours is refused.
        first = name.split("_")[1].lower()
        if difflib.get_close_matches(first, sections, n=1, cutoff=0.7):
            raise ConfigError(f"${name[:80]}: unknown variable.{_nearest_variable(name, list(names))}")


def _nearest_variable(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name[:80], names, n=1, cutoff=0.5)
    return f" Did you mean ${close[0]}?" if close else ""


def _from_flags(flags: Mapping[str, object]) -> Iterator[tuple[str, str, _Key, object]]:
    names = {
        name.removeprefix("EDGED_").lower(): (section, key)
        for name, (section, key) in _environment_names().items()
    }
    for name, value in flags.items():
        if value is None:
            continue
        plain = name.removeprefix("--").replace(".", "_").replace("-", "_")
        shown = "--" + plain.replace("_", "-")
        if plain not in names:
            raise ConfigError(f"{shown}: unknown setting.{_nearest(plain, list(names))}")
        section, key = names[plain]
        yield shown, section, key, value


def _assemble(
    values: Mapping[tuple[str, str], object], runtimes: Mapping[str, object], paths: _Paths
) -> Config:
    filled: dict[str, dict[str, Any]] = {section: {} for section in _SECTIONS}
    for (section, field_name), value in values.items():
        filled[section][field_name] = value
    server = filled["server"]
    if "state_dir" not in server:
        server["state_dir"] = paths.state_dir()
    if "models" not in server:
        server["models"] = paths.models()
    if "cache_dir" not in server:
        server["cache_dir"] = paths.cache_dir()
    if "endpoint" not in server:
        try:
            server["endpoint"] = _parse_endpoint(paths.endpoint(server["state_dir"]))
        except ValueProblem as problem:
            raise ConfigError(f"the default endpoint {problem}. Set EDGED_ENDPOINT.") from None
    metrics = filled["metrics"]
    if "textfile" not in metrics:
        metrics["textfile"] = paths.textfile()
    if "name" not in metrics:
        metrics["name"] = paths.daemon_name()
    return Config(
        server=ServerConfig(**server),
        limits=LimitsConfig(**filled["limits"]),
        resources=ResourcesConfig(**filled["resources"]),
        devices=DevicesConfig(**filled["devices"]),
        loading=LoadingConfig(**filled["loading"]),
        store=StoreConfig(**filled["store"]),
        log=LogConfig(**filled["log"]),
        metrics=MetricsConfig(**metrics),
        runtimes={
            name: RuntimeConfig(str(runtimes[name]) if name in runtimes else None) for name in RUNTIMES
        },
    )


def flattened(config: Config) -> dict[str, object]:
    """Every setting by its name in `edged.toml`: `{"limits.frames": 64, …}`."""
    plain: dict[str, object] = {
        f"{section}.{key.name}": getattr(getattr(config, section), key.field)
        for section, (_text, _type, keys) in _SECTIONS.items()
        for key in keys
    }
    for runtime in RUNTIMES:
        for key in _RUNTIME_KEYS:
            plain[f"runtimes.{runtime}.{key.name}"] = getattr(config.runtimes.get(runtime), key.field, None)
    return plain


# ---- a model's settings ---------------------------------------------------------------------------------


def parse_model_settings(text: str, *, source: str) -> ModelSettings:
    """The settings of one model from the text of its TOML; `source` is how messages call the file.

    Raises ConfigError that names the source, the line, the key and the nearest known key.
    """
    return _model_settings(_parse_toml(text, source), _Place(source, text))


def _model_settings(table: Mapping[str, Any], place: _Place) -> ModelSettings:
    parsed: dict[str, Any] = _parse_table(table, _MODEL_KEYS, place, ())
    made = ModelSettings(**parsed)
    if isinstance(made.instances, int) and made.instances * (made.threads or 1) > THREADS_MAX:
        problem = f"`threads` × `instances` must be at most {THREADS_MAX}: each is started, not only counted."
        raise place.error(("threads",), problem)
    return made


# ---- documentation --------------------------------------------------------------------------------------

_INTRODUCTION = """\
# Settings and the models folder

<!-- Made by `python -m edged.config`; change the table in edged/config.py, not this file. -->

The daemon runs without any file. What is set comes from, the first wins: flags, the environment
(`EDGED_<SECTION>_<KEY>`, such as `EDGED_LOG_LEVEL=debug`; short forms `EDGED_ENDPOINT` and
`EDGED_MODELS`; lists are comma-separated), `edged.toml`, the defaults below. An unknown key, section or
variable is an error that names the file, the line and the nearest known key.

`edged.toml` is the file named by `--config` or `$EDGED_CONFIG`, else the one in
`$CONFIGURATION_DIRECTORY` (`/etc/edged` in the service), else `$XDG_CONFIG_HOME/edged/edged.toml`
(`~/.config/edged/edged.toml`). A relative path in it is relative to the file. Under systemd the paths
follow `$STATE_DIRECTORY` (`/var/lib/edged`), `$RUNTIME_DIRECTORY` (`/run/edged`) and `$CACHE_DIRECTORY`
(`/var/cache/edged`); otherwise the XDG directories, for root too.

- A **duration** is `"500ms"`, `"20s"`, `"2m"`, `"1h"`, or a number of seconds.
- A **size** is `"256MiB"`, `"2GB"`, or a number of bytes.

## edged.toml
"""

_FOLDER = """\
## The models folder

| in the folder | model, version |
| --- | --- |
| `NAME.onnx`, or `NAME.xml` with `NAME.bin`; `NAME.toml` beside it if settings are wanted | NAME; its \
version is a number that grows by one with each new content |
| `NAME/model.onnx` or `NAME/model.xml` with `NAME/model.bin`; external data, `model.toml`, `golden/` beside \
it | the same, as one bundle |
| `NAME/3/model.onnx` …, settings in `NAME/model.toml` | NAME, version 3; `versions` says which are served |

- A name is 1 to 128 letters, digits, `_`, `-` and `.`, and does not start with a dot. When two entries
  claim one name, the one that was there first goes on and the other is refused.
- Never looked at: names that begin with `.` or end with `~`, `.tmp`, `.part`, `.partial`, `.filepart`,
  `.crdownload` or `.swp`. Copying under such a name and renaming is the surest way to publish.
- Files are taken once they have stayed as they are for `[loading] settle` and no program has them open for
  writing. Where the file system cannot tell who writes (network mounts, files of another user), the settle
  time alone decides; a bundle with a `SHA256SUMS` is safe even there: it loads only when every sum matches
  and every file of the bundle but the settings is named.
- A new content is known by its SHA-256, not by its times: an older file put back counts, the same bytes
  again do not.
- Links may point anywhere beneath the folder, as Kubernetes' `..data` does, and nowhere else. Pipes,
  sockets and devices are refused.
- A folder that is missing, unreadable or suddenly another file system is a fault and removes nothing; an
  entry that goes from a healthy folder is removed from service.
- Each model's last good content is kept in the state directory and serves after a restart while the
  folder's is bad or gone.
- A content during whose load the daemon itself died twice is quarantined: it is not tried again until
  `edgectl load` asks for it or its bytes change. Once is forgiven, since that may have been the power.

## NAME.toml, NAME/model.toml

"""


def _render_rows(keys: Sequence[_Key], defaults: object) -> Iterator[str]:
    yield "| key | default | what it is |\n| --- | --- | --- |\n"
    for key in keys:
        default = key.default_text or f"`{key.kind.show(getattr(defaults, key.field))}`"
        wants = key.kind.wants[:1].upper() + key.kind.wants[1:]
        yield f"| `{key.name}` | {default} | {key.text} {wants}. |\n"


def render_documentation() -> str:
    """The text of docs/configuration.md."""
    parts = [_INTRODUCTION]
    for section, (text, cls, keys) in _SECTIONS.items():
        plain = {each.name: each.default for each in fields(cls)}
        parts.append(f"\n### [{section}]\n\n{text}\n\n")
        parts.extend(_render_rows(keys, _Defaults(plain)))
    parts.append(
        "\n### [runtimes.NAME]\n\nNAME is " + " or ".join(f"`{name}`" for name in RUNTIMES) + ".\n\n"
    )
    parts.extend(_render_rows(_RUNTIME_KEYS, RuntimeConfig()))
    parts.append("\n" + _FOLDER)
    parts.extend(_render_rows(_MODEL_KEYS, _MODEL_DEFAULTS))
    return "".join(parts)


class _Defaults:
    """A dataclass's plain defaults as attributes, for classes that cannot be made without arguments."""

    def __init__(self, defaults: Mapping[str, object]) -> None:
        self.__dict__.update(defaults)


if __name__ == "__main__":
    sys.stdout.write(render_documentation())
