"""Settings of the daemon and of each model, checked once and then frozen.

Owns every key that `edged.toml`, `EDGED_*` and a model's own TOML may hold. One table names each key
with its type, its default and its sentence; the checks and `docs/configuration.md` are both made from
it, so they cannot part. Reads no clock, touches no socket, imports no runtime.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = [
    "Config",
    "ConfigError",
    "DevicesConfig",
    "GoldenInline",
    "LimitsConfig",
    "LoadingConfig",
    "LogConfig",
    "ModelSettings",
    "ResourcesConfig",
    "RuntimeConfig",
    "ServerConfig",
    "StoreConfig",
    "Tolerance",
    "load_config",
    "parse_model_settings",
]

_MIB = 1 << 20


class ConfigError(Exception):
    """A setting is wrong; the message names the file, the line, the key and what would be right."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


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
    runtimes: Mapping[str, RuntimeConfig] = field(default_factory=dict)


@dataclass(frozen=True)
class Tolerance:
    """How far two answers may differ and still agree: `|a - b| <= atol + rtol * |b|`."""

    rtol: float = 1e-3
    atol: float = 1e-4


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
    tolerance: Tolerance = Tolerance()
    isolation: str = "model"
    swap: str = "beside"
    memory_max_bytes: int | None = None
    timeout_s: float | None = None
    queue_length: int | None = None
    versions: str | tuple[int, ...] = "latest:1"
    warmup: int = 1
    golden: tuple[GoldenInline, ...] = ()

    def to_wire(self) -> dict[str, Any]:
        """A plain, JSON-able dict; `from_wire` gives the same settings back."""
        raise NotImplementedError

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> ModelSettings:
        """The settings that `to_wire` wrote; raises ConfigError for anything else."""
        raise NotImplementedError


def load_config(*, flags: Mapping[str, object], environ: Mapping[str, str], file: Path | None) -> Config:
    """The daemon's settings: flags over `EDGED_*` over the file over defaults."""
    raise NotImplementedError


def parse_model_settings(text: str, *, source: str) -> ModelSettings:
    """The settings of one model from the text of its TOML."""
    raise NotImplementedError
