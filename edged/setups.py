"""How a model may be run: runtime × device × threads × instances × batch, what was measured, which is best.

Pure. A *setup* is one such combination. `next_setup` says what to measure next, given what is known; `best`
says what follows. Both serve the measurement that the daemon makes when it is idle and the one that an owner
asks for, which differ in their aim:

- `auto`: first the device by the time of one request (`Space.gain_us`); then, where the owner left the number
  of instances open, the one that gives the most rows a second while a run under full load takes at most
  `LATENCY_FACTOR` times as long (p99) as with a single instance, so that nobody who asks alone pays much for
  it.
- `latency`: the shortest time of a request (p50). One instance, unless the owner has pinned more.
- `throughput`: the most rows a second, whatever a single request then takes; the batch is measured too.

Timings are noisy. Only a gain of `GAIN` is one, and of those that are within `TIE` of the best the one that
takes the fewest threads, then the shortest time, is taken. Each figure was taken in turns with the setup that
serves; `Figures` are scaled by what that one reached in the same minute, so that a machine that slows down
meanwhile slows nobody down in the comparison.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from edged.devices import Candidate

__all__ = [
    "AIMS",
    "GAIN",
    "Figures",
    "Setup",
    "Space",
    "best",
    "estimate_count",
    "next_setup",
    "pareto",
    "reference_figures",
]

AIMS = ("latency", "throughput")
"""What an owner may aim for; the daemon's own aim is `auto`."""

GAIN = 0.10
"""A switch must save a tenth of the time, or give a tenth more: less is noise, and a swap is not free."""

TIE = 0.05
"""Setups this close to each other are alike: repeated measurements of one differ by as much."""

LATENCY_FACTOR = 2.0
"""How much longer a run may take under full load than with one instance, where nobody has set an aim."""

NEAR = 1.5
"""A device this much slower than the best at one request is not tried in other shapes."""

BATCHES = (2, 4, 8, 16, 32, 64)
"""Rows of a run; the worker proves that rows stand alone before it really puts requests together."""

THREADS_MAX, INSTANCES_MAX, BATCH_MAX = 1024, 64, 1024
"""What a remembered setup may say; a record beyond it is not ours."""


@dataclass(frozen=True, order=True)
class Setup:
    """One way to run a model. `threads` are each instance's; a `max_batch` of 0 is found out at the load."""

    candidate: Candidate
    threads: int
    instances: int = 1
    max_batch: int = 0

    def __str__(self) -> str:
        shape = f"{self.threads} thread{'s' if self.threads != 1 else ''}"
        if self.instances != 1:
            shape = f"{self.instances} × {shape}"
        return f"{self.candidate}, {shape}" + (f", batch {self.max_batch}" if self.max_batch else "")

    def to_wire(self) -> dict[str, Any]:
        """For the books, for reports and for people's tools."""
        return {
            "runtime": self.candidate.runtime,
            "device": self.candidate.device,
            "threads": self.threads,
            "instances": self.instances,
            "max_batch_size": self.max_batch or None,
        }

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any], *, threads: int) -> Setup | None:
        """From a book that this or another version of edged wrote; `threads` where it names none."""
        found = (
            _whole(wire.get("threads"), threads, THREADS_MAX),
            _whole(wire.get("instances"), 1, INSTANCES_MAX),
            _whole(wire.get("max_batch_size"), 0, BATCH_MAX),
        )
        runtime, device = wire.get("runtime"), wire.get("device")
        if None in found or not isinstance(runtime, str) or not isinstance(device, str):
            return None
        threads_each, instances, max_batch = (value or 0 for value in found)
        return cls(Candidate(runtime, device), threads_each, instances, max_batch)


def _whole(value: object, absent: int, most: int) -> int | None:
    """A number from 1 to `most`, `absent` for none, None for what is neither."""
    if value is None:
        return absent
    return value if type(value) is int and 1 <= value <= most else None


@dataclass(frozen=True)
class Figures:
    """What a measurement found out about a setup, as if all had been measured beside the same reference."""

    p50_us: float = 0.0
    p99_us: float = 0.0
    rows_s: float = 0.0
    agrees: bool = False
    proven: bool = False
    why: str = ""

    @property
    def usable(self) -> bool:
        """Whether a model may be run so: its answers agree, and that proves something."""
        return self.agrees and self.proven and self.p50_us > 0 and self.rows_s > 0

    @classmethod
    def of(cls, result: Mapping[str, Any], reference: Figures | None) -> Figures:
        """From a measurer's result; `reference` is what the serving setup's figures were all in all."""
        verdict = bool(result.get("agrees")), bool(result.get("proven")), str(result.get("why") or "")
        p50, p99, rows = (_figure(result, f"candidate_{name}") for name in ("p50_us", "p99_us", "rows_s"))
        if not p50:
            return cls(0.0, 0.0, 0.0, *verdict)
        here = _figure(result, "reference_p50_us")
        scale = reference.p50_us / here if reference is not None and here and reference.p50_us else 1.0
        rows = rows or 1e6 / p50
        return cls(p50 * scale, (p99 or p50) * scale, rows / scale, *verdict)


def _figure(result: Mapping[str, Any], key: str) -> float:
    """A figure above zero, or 0 when there is none."""
    value = result.get(key)
    return float(value) if isinstance(value, (int, float)) and value > 0 else 0.0


def reference_figures(results: Iterable[Mapping[str, Any]]) -> Figures | None:
    """The serving setup's figures: the median over all measurements that it was the reference of."""
    rows = [r for r in results if _figure(r, "reference_p50_us")]
    if not rows:
        return None
    p50, p99, rows_s = (
        _median([f for r in rows if (f := _figure(r, f"reference_{name}"))])
        for name in ("p50_us", "p99_us", "rows_s")
    )
    return Figures(p50, p99 or p50, rows_s or 1e6 / p50, True, True, "it serves")


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2] if values else 0.0


@dataclass(frozen=True)
class Space:
    """What may be tried: the devices, and what the owner has pinned (None: open)."""

    candidates: tuple[Candidate, ...]
    current: Setup
    cpus: int
    aim: str
    threads: int | None = None
    instances: int | None = 1
    batch: int | None = None
    rows_free: bool = True
    """Whether the model takes any number of rows at all."""
    gain_us: float = 0.0
    """What a device must save besides `GAIN`, in µs."""

    def base(self, candidate: Candidate) -> Setup:
        """A candidate as it is run when nothing was measured."""
        instances = 1 if candidate.gpu_like else self.instances or 1
        return Setup(candidate, self._threads(instances), instances, self.batch or 0)

    def _threads(self, instances: int) -> int:
        return self.threads or max(1, self.cpus // instances)

    def shapes(self, candidate: Candidate) -> Iterator[Setup]:
        """The ways to divide the CPUs; what shares a device does not divide it."""
        if candidate.gpu_like:
            return
        if self.aim == "latency":
            instances = self.instances or 1
            for threads in _halves(max(1, self.cpus // instances)):
                if self.threads in (None, threads):
                    yield Setup(candidate, threads, instances, self.batch or 0)
        else:
            for instances in reversed(_halves(min(self.cpus, INSTANCES_MAX))):
                if self.instances in (None, instances):
                    yield Setup(candidate, self._threads(instances), instances, self.batch or 0)


def _halves(most: int) -> list[int]:
    """`most`, its half, … 1."""
    found = [most]
    while found[-1] > 1:
        found.append(found[-1] // 2)
    return found


def next_setup(space: Space, done: Mapping[Setup, Figures]) -> Setup | None:
    """What to measure next, with the current setup or without in `done`; None when nothing is worth it."""
    for candidate in space.candidates:
        setup = space.base(candidate)
        if setup.candidate != space.current.candidate and not _has(done, setup.candidate):
            return setup
    for setup in _all_shapes(space, done):
        if setup not in done and setup != space.current:
            return setup
    return _next_batch(space, done)


def _has(done: Mapping[Setup, Figures], candidate: Candidate) -> bool:
    return any(setup.candidate == candidate for setup in done)


def _all_shapes(space: Space, done: Mapping[Setup, Figures]) -> Iterator[Setup]:
    """The shapes of those devices that may still win."""
    if space.aim == "auto" and space.instances is not None:
        return
    usable = {s: f for s, f in done.items() if f.usable}
    fastest = min((f.p50_us for f in usable.values()), default=0.0)
    for candidate in space.candidates:
        mine = [f.p50_us for s, f in usable.items() if s.candidate == candidate]
        if space.aim == "auto":
            worth = candidate == _device(space, done).candidate
        else:
            # Nothing is known of the serving one before something was measured beside it.
            worth = min(mine) <= NEAR * fastest if mine else candidate == space.current.candidate
        if worth:
            yield from space.shapes(candidate)


def _next_batch(space: Space, done: Mapping[Setup, Figures]) -> Setup | None:
    """The next size up of the best shape, while the last one gained something."""
    if space.aim != "throughput" or space.batch is not None or not space.rows_free:
        return None
    top = best(space, {s: f for s, f in done.items() if s.max_batch in (0, space.current.max_batch)})
    before = done.get(top)
    if before is None:
        return None
    for rows in BATCHES:
        setup = replace(top, max_batch=rows)
        if setup == space.current:
            continue
        figures = done.get(setup)
        if figures is None:
            return setup
        if not figures.usable or figures.rows_s < (1 + GAIN) * before.rows_s:
            return None
        before = figures
    return None


def estimate_count(space: Space) -> int:
    """How many setups there may be to measure, at the most; for a progress bar."""
    count = len(space.candidates)
    if space.aim != "auto" or space.instances is None:
        count += sum(1 for candidate in space.candidates for _ in space.shapes(candidate))
    if space.aim == "throughput" and space.batch is None and space.rows_free:
        count += len(BATCHES)
    return count


def best(space: Space, done: Mapping[Setup, Figures]) -> Setup:
    """What the model should be run as; the current setup unless something is better by `GAIN`."""
    if space.aim == "auto":
        return _best_auto(space, done)
    usable = {s: f for s, f in done.items() if f.usable}
    if not usable:
        return space.current
    if space.aim == "latency":
        top = min(f.p50_us for f in usable.values())
        alike = [s for s, f in usable.items() if f.p50_us <= (1 + TIE) * top]
    else:
        rows = max(f.rows_s for f in usable.values())
        alike = [s for s, f in usable.items() if f.rows_s >= (1 - TIE) * rows]
    found = min(alike, key=lambda s: (_cost(s), usable[s].p50_us, s))
    return found if _is_gain(space, done.get(space.current), usable[found]) else space.current


def _cost(setup: Setup) -> tuple[int, int]:
    return setup.threads * setup.instances, setup.max_batch


def _is_gain(space: Space, now: Figures | None, then: Figures) -> bool:
    if now is None:
        return True
    if space.aim == "latency":
        return then.p50_us <= (1 - GAIN) * now.p50_us
    return then.rows_s >= (1 + GAIN) * now.rows_s


def _device(space: Space, done: Mapping[Setup, Figures]) -> Setup:
    """The setup whose device answers one request the soonest, by a tenth and `gain_us`."""
    now = done.get(space.current)
    if now is None:
        return space.current
    found, p50_us = space.current, now.p50_us
    for setup, figures in done.items():
        saved_us = now.p50_us - figures.p50_us
        other = setup.candidate != space.current.candidate and setup == space.base(setup.candidate)
        gains = figures.usable and saved_us >= max(space.gain_us, GAIN * now.p50_us)
        if other and gains and figures.p50_us < p50_us:
            found, p50_us = setup, figures.p50_us
    return found


def _best_auto(space: Space, done: Mapping[Setup, Figures]) -> Setup:
    start = _device(space, done)
    if space.instances is not None or start.candidate.gpu_like:
        return start
    single = done.get(space.base(start.candidate)) or done.get(start)
    if single is None:
        return start
    bound_us = LATENCY_FACTOR * single.p99_us
    shapes = {
        s: f for s, f in done.items() if s.candidate == start.candidate and f.usable and f.p99_us <= bound_us
    }
    now = done.get(start)
    if not shapes or now is None:
        return start
    rows = max(f.rows_s for f in shapes.values())
    alike = [s for s, f in shapes.items() if f.rows_s >= (1 - TIE) * rows]
    found = min(alike, key=lambda s: (s.instances, shapes[s].p50_us, s))
    if start not in shapes:
        return found  # what serves is too slow under load
    return found if shapes[found].rows_s >= (1 + GAIN) * now.rows_s else start


def pareto(done: Mapping[Setup, Figures]) -> frozenset[Setup]:
    """The setups that no other one beats both in time and in rows a second."""
    usable = {s: f for s, f in done.items() if f.usable}
    return frozenset(
        s
        for s, f in usable.items()
        if not any(
            o.p50_us <= f.p50_us and o.rows_s >= f.rows_s and (o.p50_us, -o.rows_s) != (f.p50_us, -f.rows_s)
            for o in usable.values()
        )
    )
