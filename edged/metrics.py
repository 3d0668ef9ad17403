"""The core's state as Prometheus reads it: text, version 0.0.4.

Pure. `edged.families` lists everything that is told; a name that is not there cannot be rendered. Labels are
models, versions, devices and closed sets of words: nothing that a client can invent.

Latency is a histogram and not a set of quantiles: quantiles since the start say nothing of the last minutes
and cannot be put together over versions, while of a histogram's buckets Prometheus makes either. Its bounds
are powers of two, at which the daemon's own finer buckets can be cut exactly.

What has been counted for a version is kept for as long as one of its instances is there, so that a counter
does not fall when an instance is replaced by another of the same version (new settings, another device).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Final

from edged.families import FAMILIES
from edged.instances import Instance, InstanceState, Track
from edged.statistics import ModelStatistics
from edged.wire import PROTOCOL_VERSIONS

if TYPE_CHECKING:
    from edged.core import Core

__all__ = ["BUCKET_POWERS", "Metrics"]

#: Upper bounds of the latency histogram, 64 µs to 67 s, as powers of two of a microsecond.
BUCKET_POWERS: Final = range(6, 27)

#: Upper bounds of the histogram of batches: the sizes that batching tries.
BATCH_BOUNDS: Final = (1, 2, 4, 8, 16, 32, 64)

_BOUNDS: Final = tuple(f"{2**power / 1e6:.8g}" for power in BUCKET_POWERS)
"""The same in seconds, without digits that say nothing."""

_MODEL: Final = ("model", "version")
_STATES: Final = ("READY", "LOADING", "UNLOADING", "UNAVAILABLE")


class _Page:
    """The text under construction: samples in the order of their families."""

    def __init__(self, daemon: str = "") -> None:
        self._common = f'daemon="{_escaped(daemon)}"' if daemon else ""
        self._lines: dict[str, list[str]] = {name: [] for name in FAMILIES}

    def add(
        self,
        name: str,
        value: float | None,
        labels: Mapping[str, str] | None = None,
    ) -> None:
        """One sample; what is None is not known and left out."""
        if value is None:
            return
        figure = repr(value) if isinstance(value, float) else str(int(value))
        pairs = self._pairs(labels or {})
        self._lines[name].append(f"{name}{{{pairs}}} {figure}" if pairs else f"{name} {figure}")

    def histogram(
        self, name: str, labels: Mapping[str, str], buckets: Iterable[tuple[str, int]], *, total: float
    ) -> None:
        """A histogram: how many were up to each bound, the last being all of them, and their sum."""
        pairs, lines, count = self._pairs(labels), self._lines[name], 0
        for bound, count in buckets:
            lines.append(f'{name}_bucket{{{pairs},le="{bound}"}} {count}')
        lines.append(f"{name}_sum{{{pairs}}} {total!r}")
        lines.append(f"{name}_count{{{pairs}}} {count}")

    def _pairs(self, labels: Mapping[str, str]) -> str:
        pairs = [f'{key}="{_escaped(text)}"' for key, text in labels.items()]
        return ",".join([self._common, *pairs] if self._common else pairs)

    def text(self) -> str:
        parts = []
        for name, lines in self._lines.items():
            if lines:
                family = FAMILIES[name]
                parts += [f"# HELP {name} {family.help}.", f"# TYPE {name} {family.type}", *lines]
        return "\n".join(parts) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


class _Counted:
    """Everything that was counted for one version, by instances of now and of before."""

    def __init__(self) -> None:
        self._before: ModelStatistics | None = None
        self._restarts_before = 0
        self._alive: dict[int, Instance] = {}

    def take(self, instances: Iterable[Instance]) -> tuple[ModelStatistics, int]:
        """Statistics and restarts of these and of all that were there before them."""
        alive = {instance.id: instance for instance in instances}
        # One that takes over from another of the same content goes on with its figures: they count once.
        goes_on = {id(instance.stats) for instance in alive.values()}
        for gone in [self._alive[key] for key in self._alive.keys() - alive.keys()]:
            self._restarts_before += gone.restarts
            if id(gone.stats) not in goes_on:
                self._before = self._before or ModelStatistics()
                self._before.merge(gone.stats)
                goes_on.add(id(gone.stats))
        self._alive = alive
        restarts = self._restarts_before + sum(each.restarts for each in alive.values())
        every = list({id(each.stats): each.stats for each in alive.values()}.values())
        if len(every) == 1 and self._before is None:
            return every[0], restarts
        found = ModelStatistics()
        for statistics in (self._before, *every) if self._before is not None else every:
            found.merge(statistics)
        return found, restarts


class Metrics:
    """Renders the core's state; remembers only what keeps counters from falling."""

    def __init__(self) -> None:
        self._counted: dict[tuple[str, str], _Counted] = {}

    def render(self, core: Core, now_s: float, outside: Mapping[str, float]) -> str:
        """The page; `outside` has the figures that the core does not know, by family."""
        page = _Page(core.around.config.metrics.name)
        self._daemon(page, core, now_s)
        for name, value in outside.items():
            page.add(name, value)
        self._models(page, core)
        _device(page, core)
        return page.text()

    # ------------------------------------------------------------------ the daemon

    @staticmethod
    def _daemon(page: _Page, core: Core, now_s: float) -> None:
        epoch_s = core.runs.epoch_offset_s
        info = {"version": core.identity.version, "protocol": str(max(PROTOCOL_VERSIONS))}
        page.add("edged_build_info", 1, info)
        page.add("edged_start_time_seconds", round(core.started_s + epoch_s, 3))
        page.add("edged_metrics_time_seconds", round(now_s + epoch_s, 3))
        page.add("edged_ready", core.state == "ready")
        page.add("edged_requests_total", core.counters["requests"])
        page.add("edged_inferences_total", core.runs.counters["inferences"])
        for (code, reason), count in core.runs.refusals.counts.items():
            page.add("edged_refusals_total", count, {"code": code, "reason": reason})
        page.add("edged_bad_messages_total", core.counters["bad_messages"])
        page.add("edged_damaged_copies_total", core.counters["damaged_copies"])
        page.add("edged_requests_in_flight", core.scheduler.in_flight)
        page.add("edged_clients", core.scheduler.clients)
        leases = core.regions.snapshot()
        page.add("edged_lease_connections", leases["connections"])
        page.add("edged_leased_regions", leases["regions"])
        page.add("edged_leased_bytes", leases["bytes"])
        page.add("edged_folder_fault", bool(core.registry.folder.fault))

    # ------------------------------------------------------------------ models

    def _models(self, page: _Page, core: Core) -> None:
        tracks: dict[str, list[Track]] = {}
        for track in core.registry.tracks.values():
            tracks.setdefault(track.name, []).append(track)
        alive: dict[tuple[str, str], list[Instance]] = {}
        for name in sorted(tracks):
            mine = tracks[name]
            if not all(t.unloaded for t in mine):
                serves = any(t.serving is not None and t.serving.admits for t in mine)
                page.add("edged_model_serving", serves, {"model": name})
                page.add("edged_model_refused", any(t.failure is not None for t in mine), {"model": name})
            for track in mine:
                for instance in track.instances():
                    alive.setdefault((name, str(instance.version)), []).append(instance)
        self._counted = {key: self._counted.get(key) or _Counted() for key in alive}
        for key, instances in alive.items():
            labels = dict(zip(_MODEL, key, strict=True))
            counted, restarts = self._counted[key].take(instances)
            _gauges(page, core, instances, labels)
            _counters(page, counted, labels)
            page.add("edged_model_restarts_total", restarts, labels)


def _gauges(page: _Page, core: Core, instances: list[Instance], labels: dict[str, str]) -> None:
    """What is so now. Of several instances of one version the first counts: the one that serves, if any."""
    first = instances[0]
    worker, info, candidate = core.workers.of(first), first.info, first.candidate
    state = first.oip_state()
    for each in _STATES:
        page.add("edged_model_state", each == state, {**labels, "state": each})
    if info and candidate is not None:
        where = {
            "runtime": str(info.get("runtime") or candidate.runtime),
            "device": str(info.get("device") or candidate.device),
            "precision": str(info.get("precision", "")),
            "choice": first.choice,
        }
        page.add("edged_model_info", 1, {**labels, **where})
    page.add("edged_model_fallback", bool(first.fallback_reason), labels)
    page.add("edged_model_queue_length", sum(core.scheduler.queued(i.id) for i in instances), labels)
    page.add("edged_model_running", sum(core.runs.running(i) for i in instances), labels)
    if "load_ms" in info:
        page.add("edged_model_load_seconds", info["load_ms"] / 1000, labels)
    if worker is not None and first.state is InstanceState.READY:
        page.add("edged_model_worker_memory_bytes", worker.rss_bytes, labels)


def _counters(page: _Page, counted: ModelStatistics, labels: dict[str, str]) -> None:
    sums, histogram = counted.sums, counted.histogram
    page.add("edged_model_inferences_total", counted.inference_count, labels)
    page.add("edged_model_executions_total", counted.execution_count, labels)
    for result in ("hit", "miss"):
        page.add("edged_model_cache_total", sums[f"cache_{result}"][0], {**labels, "result": result})
    for outcome, kind in (("failed", "fail"), ("cancelled", "cancel"), ("refused", "reject")):
        page.add("edged_model_errors_total", sums[kind][0], {**labels, "outcome": outcome})
    page.add("edged_model_queue_seconds_total", sums["queue"][1] / 1e9, labels)
    page.add("edged_model_compute_seconds_total", sums["compute_infer"][1] / 1e9, labels)
    last_ms = counted.last_inference_ms
    page.add("edged_model_last_inference_time_seconds", last_ms / 1000 if last_ms else None, labels)
    _batches(page, counted, labels)
    latency = [*zip(_BOUNDS, histogram.below(BUCKET_POWERS), strict=True), ("+Inf", histogram.count)]
    page.histogram("edged_model_latency_seconds", labels, latency, total=sums["success"][1] / 1e9)


def _batches(page: _Page, counted: ModelStatistics, labels: dict[str, str]) -> None:
    runs = {rows: count for rows, (count, _) in counted.batches.items()}
    buckets = [(str(b), sum([count for rows, count in runs.items() if rows <= b])) for b in BATCH_BOUNDS]
    buckets.append(("+Inf", sum(runs.values())))
    total = sum([rows * count for rows, count in runs.items()])
    page.histogram("edged_model_batch_rows", labels, buckets, total=total)


# ---------------------------------------------------------------------- the device


def _device(page: _Page, core: Core) -> None:
    for candidate, verdict in core.placement.verdicts.items():
        if verdict is not None:
            labels = {"runtime": candidate.runtime, "device": candidate.device}
            page.add("edged_device_ok", verdict.status == "ok", labels)
    guard, sample = core.around.guard, core.sample
    page.add("edged_memory_limit_bytes", core.around.machine.memory_limit_bytes)
    if guard is not None:
        page.add("edged_pressure_level", int(guard.level))
        page.add("edged_memory_free_for_models_bytes", guard.free_for_models_bytes)
    if sample is None:
        return
    for kind, percent in (("some", sample.psi_some_avg10), ("full", sample.psi_full_avg10)):
        share = None if percent is None else round(percent / 100, 6)
        page.add("edged_memory_pressure_ratio", share, {"kind": kind})
    page.add("edged_memory_bytes", sample.supervisor_rss_bytes, {"process": "supervisor"})
    workers_bytes = sum(worker.rss_bytes for worker in sample.workers)
    page.add("edged_memory_bytes", workers_bytes, {"process": "workers"})
    page.add("edged_temperature_celsius", sample.temperature_c)
    page.add("edged_throttled", sample.throttled)
    page.add("edged_disk_free_bytes", sample.disk_free_bytes)
