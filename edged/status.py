"""What the daemon tells about itself: the replies of the methods that only read.

Pure: builds maps from the core's state, in the Open Inference Protocol's names where it has some.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from edged.errors import NotFound, ResourceExhausted
from edged.instances import Instance, InstanceState, Track
from edged.properties import METADATA_BYTES_MAX
from edged.registry import Registry
from edged.wire import PROTOCOL_VERSIONS, cut

if TYPE_CHECKING:
    from edged.core import Core

__all__ = [
    "StatusLine",
    "model_metadata",
    "model_statistics",
    "repository_index",
    "server_metadata",
    "server_status",
    "status_text",
]

EXTENSIONS = ("statistics", "model_repository", "cancel", "events", "logging", "shared_memory", "fast_lane")

STATUS_S = 2.0
"""How often the status line may change."""

RATE_S, RATE_MOVES, RATE_MIN = 10.0, 0.2, 1.0
"""Over how long requests per second are taken, the share by which they must move to be told anew, and what is
left untold: with a request now and then the line would come and go."""


def server_metadata(core: Core) -> dict[str, Any]:
    """Everything that a client must know to talk to this daemon."""
    return {
        "name": "edged",
        "version": core.identity.version,
        "extensions": list(EXTENSIONS),
        "protocol_versions": list(PROTOCOL_VERSIONS),
        "limits": _limits(core),
        "instance_id": core.identity.instance_id,
    }


def _limits(core: Core) -> dict[str, int]:
    return dataclasses.asdict(core.around.config.limits)


def model_metadata(registry: Registry, instance: Instance, *, properties: bool = True) -> dict[str, Any]:
    """OIP's model metadata; what the model says of itself comes in `properties`, whole.

    Raises ResourceExhausted where that is more than is told, unless it is not asked for.
    """
    versions = sorted(
        t.serving.version
        for t in registry.tracks.values()
        if t.name == instance.name and t.serving is not None and t.serving.admits
    )
    found: dict[str, Any] = {
        "name": instance.name,
        "versions": [str(v) for v in versions],
        "version": str(instance.version),
        "platform": f"{instance.info['runtime']}_{instance.entry.format.removeprefix('openvino_')}",
        "inputs": [spec.to_wire() for spec in instance.inputs.values()],
        "outputs": [spec.to_wire() for spec in instance.outputs.values()],
        "state": instance.oip_state(),
    }
    if properties:
        found["properties"] = _properties(instance)
    return found


def _properties(instance: Instance) -> msgspec.Raw:
    if "metadata_excess" in instance.info:
        nbytes, keys = instance.info["metadata_excess"]
        named = ", ".join(f"'{cut(key)}'" for key in keys)
        raise ResourceExhausted(
            f"model '{instance.name}' has {nbytes} bytes of metadata, at most {METADATA_BYTES_MAX} are told "
            f"(the largest: {named}); ask with the parameter 'properties' false for everything else, and "
            "keep what is so large in a file of the app's own",
            reason="METADATA_TOO_LARGE",
        )
    return msgspec.Raw(instance.info["metadata"])


def model_statistics(core: Core, name: str, version: str) -> list[dict[str, Any]]:
    """One entry for each version that serves; raises NotFound for a model that is not there."""
    registry = core.registry
    if name and name not in registry.names():
        raise NotFound(f"no model '{cut(name)}'", reason="MODEL_NOT_FOUND")
    return [
        t.serving.stats.to_wire(t.name, str(t.serving.version))
        for t in _ordered(registry.tracks.values())
        if t.serving is not None and name in ("", t.name) and version in ("", str(t.serving.version))
    ]


def repository_index(registry: Registry) -> list[dict[str, str]]:
    """Every version that is known, with its state and the reason."""
    rows = []
    for track in _ordered(registry.tracks.values()):
        rows += [
            _index_row(
                track.name,
                str(i.version),
                i.oip_state(),
                i.message or i.reason,
                i.staged.digest,
                i.settings.sha256(),
            )
            for i in track.instances()
        ]
        row = _failure_row(track)
        if row is not None:
            rows.append(row)
    return rows


def _failure_row(track: Track) -> dict[str, str] | None:
    """The row of what does not serve: a refused content beside the one that serves, or nothing at all."""
    failure = track.failure
    if failure is not None:
        version = "" if failure.version is None else str(failure.version)
        text = f"{failure.reason}: {failure.message}"
        settings = "" if failure.settings is None else failure.settings.sha256()
        return _index_row(track.name, version, "UNAVAILABLE", text, failure.digest, settings)
    if track.instances():
        return None
    version = "" if track.explicit_version is None else str(track.explicit_version)
    if track.unloaded:
        return _index_row(track.name, version, "UNAVAILABLE", "MODEL_UNLOADED: unloaded by request")
    return _index_row(track.name, version, "LOADING", "being copied into the store")


def _index_row(
    name: str, version: str, state: str, reason: str, digest: str = "", settings: str = ""
) -> dict[str, str]:
    return {
        "name": name,
        "version": version,
        "state": state,
        "reason": reason,
        "sha256": digest,
        "settings_sha256": settings,
    }


def _ordered(tracks: Iterable[Track]) -> list[Track]:
    return sorted(tracks, key=lambda t: (t.name, t.explicit_version or 0))


def server_status(core: Core, now_s: float, *, model: str = "") -> dict[str, Any]:
    """Everything that an operator may want to know; `model` names one whose `history` is wanted too.

    Raises NotFound for a model that is not there and never was, as far as is remembered.
    """
    registry, server = core.registry, core.around.config.server
    status: dict[str, Any] = {
        "name": "edged",
        "version": core.identity.version,
        "instance_id": core.identity.instance_id,
        "pid": core.identity.pid,
        "uptime_s": round(now_s - core.started_s, 3),
        "state": core.state,
        "endpoint": server.endpoint,
        "models_dir": str(server.models),
        "models_fault": registry.folder.fault or None,
        "state_dir": str(server.state_dir),
        "cache_dir": str(server.cache_dir),
        "devices": [
            {"runtime": c.runtime, "device": c.device, "status": "probing", "hint": "", "detail": ""}
            if v is None
            else v.to_wire()
            for c, v in core.placement.verdicts.items()
        ],
        "resources": _resources(core),
        "limits": _limits(core),
        "models": [row for t in _ordered(registry.tracks.values()) for row in _model_rows(core, t)],
        "workers": [
            {
                "pid": w.pid,
                "runtime": w.runtime,
                "device": w.device,
                "models": sorted(registry.instances[i].name for i in w.instances if i in registry.instances),
                "rss_bytes": w.rss_bytes,
            }
            for w in core.workers.table.values()
        ],
        "measuring": core.chooser.running,
        "tune": None if core.chooser.tune is None else core.chooser.report(core.chooser.tune, now_s),
        "clients": {
            "connections_with_requests": core.scheduler.clients,
            "in_flight": core.scheduler.in_flight,
            "refused": core.runs.counters["refused"],
        },
        "leases": core.regions.snapshot(),
        "cache": core.cache.snapshot(),
        "counters": core.counters | core.runs.counters,
    }
    if model:
        status["history"] = _history(core, model)
    return status


def _history(core: Core, model: str) -> list[dict[str, Any]]:
    happened = core.happenings.of(model)
    if not happened and model not in core.registry.names():
        raise NotFound(f"no model '{cut(model)}'; `edgectl models` lists them", reason="MODEL_NOT_FOUND")
    return [each.to_wire() for each in happened]


def _resources(core: Core) -> dict[str, Any]:
    guard, sample = core.around.guard, core.sample
    return {
        "level": "OK" if guard is None else guard.level.name,
        "reasons": [] if guard is None else list(guard.reasons),
        "free_for_models_bytes": None if guard is None else guard.free_for_models_bytes,
        "memory_limit_bytes": core.around.machine.memory_limit_bytes,
        "sample": None
        if sample is None
        else {k: v for k, v in dataclasses.asdict(sample).items() if k != "workers"},
    }


def _model_rows(core: Core, track: Track) -> list[dict[str, Any]]:
    rows = [_instance_row(core, track, instance) for instance in track.instances()]
    row = _failure_row(track)
    if row is not None:
        failure = track.failure
        rows.append(
            {
                **row,
                "serving": False,
                "reason": row["reason"] if failure is None else failure.reason,
                "message": row["reason"] if failure is None else failure.message,
                "sha256": "" if failure is None else failure.digest,
            }
        )
    return rows


def _instance_row(core: Core, track: Track, instance: Instance) -> dict[str, Any]:
    worker = core.workers.of(instance)
    candidate, info, stats = instance.candidate, instance.info, instance.stats
    return {
        "name": instance.name,
        "version": str(instance.version),
        "state": instance.oip_state(),
        "reason": instance.reason,
        "message": instance.message,
        "serving": track.serving is instance and instance.admits,
        "sha256": instance.staged.digest,
        "settings_sha256": instance.settings.sha256(),
        "size_bytes": instance.staged.size_bytes,
        "format": instance.entry.format,
        "runtime": "" if candidate is None else candidate.runtime,
        "device": str(info.get("device") or ("" if candidate is None else candidate.device)),
        "precision": str(info.get("precision", "")),
        "threads": info.get("threads", 0),
        "instances": info.get("instances", 0),
        "batch": info.get("batch"),
        "changes": info.get("changes") or None,
        "choice": instance.choice,
        "policy": instance.settings.policy,
        "fallback_reason": instance.fallback_reason or None,
        "pid": None if worker is None else worker.pid,
        "rss_bytes": 0 if worker is None else worker.rss_bytes,
        "queue": core.scheduler.queued(instance.id),
        "cache": None if instance.settings.cache is None else core.cache.snapshot(instance.id),
        "in_flight": core.runs.running(instance),
        "infer_count": stats.inference_count,
        "error_count": stats.error_count,
        "p50_us": stats.histogram.quantile_us(0.5),
        "p99_us": stats.histogram.quantile_us(0.99),
        "ready_ms": int((instance.ready_s + core.runs.epoch_offset_s) * 1000) if instance.ready_s else 0,
        "source": instance.entry.model_file,
        "settings": _settings(instance),
        "settings_file": None if instance.entry.settings_file is None else instance.entry.settings_file.path,
        "tried": [
            {"runtime": c.runtime, "device": c.device, "reason": reason, "message": message}
            for c, reason, message in instance.errors
        ],
        "crashes": instance.crashes,
        "restarts": instance.restarts,
        "sizes": _sizes(instance),
        "load_ms": info.get("load_ms", 0),
        "measured": [
            {
                **s.to_wire(),
                "p50_us": m.get("candidate_p50_us"),
                "p99_us": m.get("candidate_p99_us"),
                "rows_s": m.get("candidate_rows_s"),
                "reference_p50_us": m.get("reference_p50_us"),
                "agrees": bool(m.get("agrees")),
                "proven": bool(m.get("proven")),
                "size": m.get("size"),
                "why": str(m.get("why", "")),
                "obstacles": list(m.get("obstacles") or ()),
                "remedy": str(m.get("remedy", "")),
            }
            for s, m in instance.measured.items()
        ],
    }


def _sizes(instance: Instance) -> list[dict[str, Any]]:
    """What is known of the sizes of an instance's inputs, in the order in which it counts."""
    if instance.sizes is None:
        return []
    golden = instance.info.get("golden_shapes") or ()
    rows: list[dict[str, Any]] = [{"source": "golden", "shapes": shapes, "count": None} for shapes in golden]
    for shapes, count in instance.sizes.ranked():
        rows.append({"source": "requests", "shapes": {n: list(s) for n, s in shapes.items()}, "count": count})
    return rows


def _settings(instance: Instance) -> dict[str, Any]:
    """What the model's settings say beyond the defaults; of golden samples only how many."""
    plain = instance.settings.to_wire()
    if "golden" in plain:
        plain["golden"] = len(plain["golden"])
    return plain


def status_text(core: Core, *, pressure: str, rate_per_s: float = 0.0, notes: Sequence[str] = ()) -> str:
    """One line for `systemctl status`."""
    tracks = [t for t in core.registry.tracks.values() if not t.unloaded]
    ready = [t.serving for t in tracks if t.serving is not None and t.serving.state is InstanceState.READY]
    failed = sum(1 for t in tracks if t.failure is not None)
    loading = sum(1 for t in tracks if t.incoming is not None)
    devices = sorted({f"{i.info['runtime']} {i.info['device']}" for i in ready})
    parts = [f"{len(ready)} of {len(tracks)} model{'' if len(tracks) == 1 else 's'} ready"]
    if devices:
        parts[0] += f" on {', '.join(devices)}"
    if loading:
        parts.append(f"{loading} loading")
    if failed:
        parts.append(f"{failed} refused (`edgectl models` says why)")
    fallen = sum(1 for i in ready if i.fallback_reason)
    if fallen:
        parts.append(f"{fallen} not on the device asked for")
    parts.append(f"pressure {pressure}")
    if rate_per_s:
        parts.append(f"{_figure(rate_per_s)} requests/s")
    if core.registry.folder.fault:
        parts.append(core.registry.folder.fault)
    text = "; ".join([*parts, *notes])
    return text if core.state == "ready" else f"{core.state}: {text}"


def _figure(rate_per_s: float) -> str:
    """Two digits that count: more would change all the time."""
    if rate_per_s >= 100:
        digits = len(str(int(rate_per_s))) - 2
        return str(round(rate_per_s / 10**digits) * 10**digits)
    return f"{rate_per_s:.2g}"


class StatusLine:
    """The line, and whether it has changed so that it is worth telling.

    The rate is the mean of the last seconds, shown anew when it has moved by a fifth or has come to an end.
    Pressure keeps the sentence with which its level began, since its figures change with each look.
    """

    def __init__(self) -> None:
        self.text = ""
        self._due_s = -math.inf
        self._level = 0
        self._pressure = "OK"
        self._rate_per_s = 0.0
        self._counted = 0
        self._counted_s = -math.inf

    def changed(self, core: Core, now_s: float, notes: Sequence[str] = ()) -> str | None:
        """The line if there is something new in it; not oftener than every `STATUS_S`."""
        if now_s < self._due_s:
            return None
        before = self.text
        text = self.fresh(core, now_s, notes)
        return text if text != before else None

    def fresh(self, core: Core, now_s: float, notes: Sequence[str] = ()) -> str:
        """The line of this moment."""
        self._due_s = now_s + STATUS_S
        self._take_rate(core.runs.counters["inferences"], now_s)
        guard = core.around.guard
        if guard is not None and guard.level != self._level:
            self._level = guard.level
            self._pressure = f"{guard.level.name}: {'; '.join(guard.reasons)}" if guard.level else "OK"
        self.text = status_text(core, pressure=self._pressure, rate_per_s=self._rate_per_s, notes=notes)
        return self.text

    def _take_rate(self, inferences: int, now_s: float) -> None:
        since_s = now_s - self._counted_s
        if since_s < RATE_S:
            return
        rate = (inferences - self._counted) / since_s
        self._counted, self._counted_s = inferences, now_s
        shown = self._rate_per_s
        if rate < RATE_MIN:
            self._rate_per_s = 0.0
        elif abs(rate - shown) > RATE_MOVES * shown:
            self._rate_per_s = rate
