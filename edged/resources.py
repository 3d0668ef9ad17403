"""What the device's condition means for edged: a sample and limits in, a verdict out.

Pure: no psutil, no /proc, no clock. A ladder of measures with growing force: warn, refuse new loads,
shrink arenas, shed. Each measure that holds says so in a sentence with its figures, which operators see
unchanged in `edgectl status` and in the log.

Climbing is immediate, since memory runs out within a second; going down needs every measure to clear its
bound by a margin, so that a device at its limit does not flap. Disk space only ever warns here: what
needs it, staging, is refused by the store with its own figures, and a full disk is no reason not to serve
what is already on it.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

__all__ = [
    "Level",
    "ResourceLimits",
    "Sample",
    "Verdict",
    "WorkerSample",
    "format_bytes",
    "judge",
    "may_load",
]

#: A measure that held goes on holding until it is this much clear of its bound.
EASED: Final = 0.9
#: Shares of the memory edged may use, at which each step begins.
BUDGET_WARN: Final = 0.9
BUDGET_REFUSE: Final = 1.0
#: Shares of the machine's or the cgroup's memory that are left, below which each step begins. The kernel
#: reclaims and swaps long before zero, and an OOM kill follows shortly after 3 %.
LEFT_WARN: Final = 0.15
LEFT_REFUSE: Final = 0.10
LEFT_SHRINK: Final = 0.06
LEFT_SHED: Final = 0.03
#: Multiples of `memory_pressure` (share of time some task waits for memory).
PRESSURE_WARN: Final = 0.5
PRESSURE_SHRINK: Final = 1.5
#: Degrees below the limit at which a warning begins; chips throttle within that span.
TEMPERATURE_MARGIN_C: Final = 10.0
#: A disk warns at this multiple of what must stay free.
DISK_WARN: Final = 2.0


@dataclass(frozen=True, slots=True)
class WorkerSample:
    """One worker process; `rss_bytes` counts pages it shares with others in full."""

    pid: int
    rss_bytes: int


@dataclass(frozen=True, slots=True)
class Sample:
    """The device at one moment. None stands for what this machine does not tell.

    The cgroup's figures are those of the ancestor with the least room; `cgroup_current_bytes` leaves out
    file pages that the kernel can drop at once.
    """

    memory_total_bytes: int
    memory_available_bytes: int
    cgroup_limit_bytes: int | None
    cgroup_current_bytes: int | None
    psi_some_avg10: float | None
    psi_full_avg10: float | None
    cpu_percent: float
    load1: float
    cpus: int
    temperature_c: float | None
    throttled: bool | None
    disk_free_bytes: int | None
    supervisor_rss_bytes: int
    workers: tuple[WorkerSample, ...]

    @property
    def used_bytes(self) -> int:
        """What edged's own processes hold."""
        return self.supervisor_rss_bytes + sum(worker.rss_bytes for worker in self.workers)


@dataclass(frozen=True, slots=True)
class ResourceLimits:
    """`memory_bytes` is what edged's processes may use together; `memory_pressure` is PSI's some avg10
    in percent, 0 for not to be judged; temperatures are in degrees Celsius."""

    memory_bytes: int
    memory_pressure: float
    disk_free_min_bytes: int
    temperature_max_c: float


class Level(enum.IntEnum):
    """The steps of the ladder; each includes those before it."""

    OK = 0
    WARN = 1
    REFUSE_LOADS = 2
    SHRINK = 3
    SHED = 4


@dataclass(frozen=True, slots=True)
class Verdict:
    """The device's condition and what may be done.

    `level` is about the device as a whole. `over_budget` lists workers to be ended whatever the level,
    the largest first: those over their own budget in two samples running, or in one when the device is at
    `SHED`. `suspects` are those over it in this sample, for the next judgement.
    """

    level: Level
    reasons: tuple[str, ...]
    free_for_models_bytes: int
    over_budget: tuple[int, ...] = ()
    suspects: tuple[int, ...] = ()


def judge(
    sample: Sample, limits: ResourceLimits, *, budgets: Mapping[int, int], previous: Verdict | None
) -> Verdict:
    """Judge a sample.

    `budgets` maps a worker's pid to the bytes it may use; a worker without one is never over it.
    `previous` is the verdict on the sample before, None for the first.
    """
    measures = list(_measures(sample, limits, slack=1.0))
    level = max((step for step, _ in measures), default=Level.OK)
    if previous is not None and level < previous.level:
        eased = list(_measures(sample, limits, slack=EASED))
        held = max((step for step, _ in eased), default=Level.OK)
        if held > level:
            measures, level = eased, min(held, previous.level)
    suspects = _suspects(sample, budgets)
    before = previous.suspects if previous is not None else ()
    return Verdict(
        level=level,
        reasons=tuple(sentence for _, sentence in sorted(measures, key=lambda m: -m[0])),
        free_for_models_bytes=_free_bytes(sample, limits),
        over_budget=suspects if level is Level.SHED else tuple(p for p in suspects if p in before),
        suspects=suspects,
    )


def may_load(verdict: Verdict, needed_bytes: int) -> tuple[bool, str]:
    """Whether a model that needs `needed_bytes` may be loaded now, and the sentence that says why (not).

    A refusal holds for the moment only: ask again when a later verdict is better.
    """
    needed, free = format_bytes(needed_bytes), format_bytes(verdict.free_for_models_bytes)
    figures = f"{needed} needed, {free} free for models"
    if verdict.level >= Level.REFUSE_LOADS:
        return False, f"no model is loaded while {verdict.reasons[0]} ({figures})"
    if needed_bytes > verdict.free_for_models_bytes:
        return False, f"not enough memory: {figures}; unload a model or raise resources.memory"
    return True, figures


def format_bytes(count: int) -> str:
    """`count` bytes for people: `512 B`, `1.5 GiB`."""
    value = float(count)
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while abs(value) >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return (
        f"{value:.0f} {units[0]}" if value == int(value) or abs(value) >= 100 else f"{value:.1f} {units[0]}"
    )


def _free_bytes(sample: Sample, limits: ResourceLimits) -> int:
    free = min(limits.memory_bytes - sample.used_bytes, sample.memory_available_bytes)
    if sample.cgroup_limit_bytes is not None and sample.cgroup_current_bytes is not None:
        free = min(free, sample.cgroup_limit_bytes - sample.cgroup_current_bytes)
    return max(0, free)


def _suspects(sample: Sample, budgets: Mapping[int, int]) -> tuple[int, ...]:
    over = [w for w in sample.workers if w.pid in budgets and w.rss_bytes > budgets[w.pid]]
    return tuple(worker.pid for worker in sorted(over, key=lambda w: -w.rss_bytes))


def _measures(sample: Sample, limits: ResourceLimits, *, slack: float) -> Iterator[tuple[Level, str]]:
    """Every measure that holds, with its step and its sentence; `slack` < 1 makes each hold for longer."""
    yield from _own_use(sample, limits, slack)
    yield from _left(
        "of the device's memory", sample.memory_available_bytes, sample.memory_total_bytes, slack
    )
    if sample.cgroup_limit_bytes is not None and sample.cgroup_current_bytes is not None:
        left = max(0, sample.cgroup_limit_bytes - sample.cgroup_current_bytes)
        yield from _left("of the control group's memory", left, sample.cgroup_limit_bytes, slack)
    yield from _pressure(sample, limits, slack)
    yield from _heat(sample, limits, slack)
    yield from _disk(sample, limits, slack)


def _own_use(sample: Sample, limits: ResourceLimits, slack: float) -> Iterator[tuple[Level, str]]:
    share = sample.used_bytes / max(1, limits.memory_bytes)
    if share < BUDGET_WARN * slack:
        return
    level = Level.REFUSE_LOADS if share >= BUDGET_REFUSE * slack else Level.WARN
    used, limit = format_bytes(sample.used_bytes), format_bytes(limits.memory_bytes)
    yield level, f"edged uses {used} of the {limit} it may"


def _left(what: str, left_bytes: int, total_bytes: int, slack: float) -> Iterator[tuple[Level, str]]:
    share = left_bytes / max(1, total_bytes) * slack
    steps = (
        (LEFT_SHED, Level.SHED),
        (LEFT_SHRINK, Level.SHRINK),
        (LEFT_REFUSE, Level.REFUSE_LOADS),
        (LEFT_WARN, Level.WARN),
    )
    level = next((step for bound, step in steps if share < bound), None)
    if level is not None:
        yield level, f"{format_bytes(left_bytes)} {what} are left, of {format_bytes(total_bytes)}"


def _pressure(sample: Sample, limits: ResourceLimits, slack: float) -> Iterator[tuple[Level, str]]:
    some, bound = sample.psi_some_avg10, limits.memory_pressure * slack
    # A bound of 0 switches the measure off: pressure itself is 0 on most days.
    if some is None or bound <= 0 or some < bound * PRESSURE_WARN:
        return
    full = sample.psi_full_avg10 or 0.0
    if full >= bound:
        level = Level.SHED
    elif some >= bound * PRESSURE_SHRINK:
        level = Level.SHRINK
    else:
        level = Level.REFUSE_LOADS if some >= bound else Level.WARN
    yield (
        level,
        f"tasks wait for memory {some:.0f} % of the time, all at once {full:.0f} % "
        f"(resources.memory_pressure is {limits.memory_pressure:g} %)",
    )


def _heat(sample: Sample, limits: ResourceLimits, slack: float) -> Iterator[tuple[Level, str]]:
    degrees = sample.temperature_c
    # A tenth of 95 degrees would hold a warning for ever: here the margin eases by degrees instead.
    easing = 0.0 if slack == 1.0 else TEMPERATURE_MARGIN_C / 4
    if degrees is not None and degrees >= limits.temperature_max_c - TEMPERATURE_MARGIN_C - easing:
        level = Level.REFUSE_LOADS if degrees >= limits.temperature_max_c - easing else Level.WARN
        yield level, f"the device is at {degrees:.0f} °C, its limit is {limits.temperature_max_c:.0f} °C"
    if sample.throttled:
        yield Level.WARN, "the device slows its processors down for heat or lack of power"


def _disk(sample: Sample, limits: ResourceLimits, slack: float) -> Iterator[tuple[Level, str]]:
    if sample.disk_free_bytes is None:
        yield Level.WARN, "the state directory's disk cannot be read"
    elif sample.disk_free_bytes * slack < limits.disk_free_min_bytes * DISK_WARN:
        free, least = format_bytes(sample.disk_free_bytes), format_bytes(limits.disk_free_min_bytes)
        yield Level.WARN, f"{free} are free on the state directory's disk, {least} must stay free"
