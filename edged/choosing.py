"""Which device is fastest for a model: measured when nobody asks, decided here.

Pure. A model with `device = "auto"` serves first, on the remembered or inherited choice or on the first
device that works. When the daemon is idle each other candidate is measured against the one that serves, in
a process of its own, and one pair at a time. The switch needs three things: the answers agree, the
comparison proves it, and the gain is real (`GAIN_MIN`, `GAIN_MIN_US`). A request that arrives stops the
measurement at once; the next idle time has to be longer before it is tried again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edged.devices import Candidate
from edged.events import Log, StartMeasure, StopMeasure
from edged.instances import Instance, InstanceState, Surroundings
from edged.lifecycle import Lifecycle
from edged.placement import Placement
from edged.registry import Registry
from edged.workers import Workers

__all__ = ["Chooser"]

IDLE_FIRST_S, IDLE_MAX_S = 2.0, 3600.0
"""No request for this long before measuring; doubled each time a request stopped it."""

BUDGET_S = 3.0
"""Of measuring, for each pair."""

LIMIT_S = 90.0
"""After which a measurement is given up: two loads and the budget fit many times over."""

GAIN_MIN, GAIN_MIN_US = 0.10, 50.0
"""A switch must save a tenth of the time and 50 µs: less is noise, and a swap is not free."""


@dataclass(frozen=True)
class _Measurement:
    id: int
    instance: int
    candidate: Candidate
    until_s: float


class Chooser:
    """Decides what to measure, and what follows from it."""

    def __init__(
        self,
        around: Surroundings,
        *,
        registry: Registry,
        workers: Workers,
        placement: Placement,
        lifecycle: Lifecycle,
        now_s: float,
    ) -> None:
        self._around = around
        self._registry = registry
        self._workers = workers
        self._placement = placement
        self._lifecycle = lifecycle
        self._last_request_s = now_s
        self._idle_needed_s = IDLE_FIRST_S
        self._running: _Measurement | None = None
        self._ids = 0

    @property
    def running(self) -> bool:
        """Whether a measurement is under way."""
        return self._running is not None

    def note_request(self, now_s: float) -> None:
        """A request came in: the device is needed."""
        self._last_request_s = now_s
        if self._running is not None:
            self._stop()
            self._idle_needed_s = min(IDLE_MAX_S, 2 * self._idle_needed_s)

    def _stop(self) -> None:
        if self._running is not None:
            self._around.emit(StopMeasure(self._running.id))
            self._running = None

    def next_due_s(self) -> float | None:
        """When `step` may have something to do; None when everything is chosen."""
        if self._running is not None:
            return self._running.until_s
        if not self._lifecycle.ready or not (self._placement.unverified or self._next()):
            return None
        return self._last_request_s + self._idle_needed_s

    def step(self, now_s: float) -> None:
        """Starts the next measurement when the daemon is idle."""
        if self._running is not None and now_s >= self._running.until_s:
            running = self._running
            self._stop()
            self._note(running, {"agrees": False, "proven": False, "why": "took too long"}, now_s)
        if self._running is not None:
            return
        if now_s < self._last_request_s + self._idle_needed_s or not self._lifecycle.ready:
            return
        if self._placement.unverified:
            self._placement.verify()
            return
        found = self._next()
        if found is None:
            return
        instance, candidate = found
        self._ids += 1
        self._running = _Measurement(self._ids, instance.id, candidate, now_s + LIMIT_S)
        spec = self._workers.measure_spec(instance, candidate, budget_s=BUDGET_S)
        # Both runtimes load the model in that process.
        data_bytes = 2 * self._workers.memory_max_bytes(instance.settings)
        self._around.emit(StartMeasure(self._ids, spec, data_bytes))

    def _next(self) -> tuple[Instance, Candidate] | None:
        tracks = self._registry.tracks.values()
        if self._placement.verifying or any(t.incoming is not None for t in tracks):
            return None
        if self._around.guard is not None and self._around.guard.level > 0:
            return None
        for instance in [t.serving for t in tracks if t.serving is not None]:
            if instance.state is InstanceState.READY and instance.choice in ("default", "inherited"):
                unmeasured = self._unmeasured(instance)
                if unmeasured:
                    return instance, unmeasured[0]
        return None

    def _unmeasured(self, instance: Instance) -> list[Candidate]:
        return [
            c
            for c in self._placement.comparable(instance)
            if c not in instance.measured and c != instance.plan[0]
        ]

    def on_measured(self, measure: int, result: dict[str, Any] | None, how: str, now_s: float) -> None:
        """A measurement has ended; one that was stopped does not count."""
        running = self._running
        if running is None or running.id != measure:
            return
        self._running = None
        self._note(running, result or {"agrees": False, "proven": False, "why": how}, now_s)

    def _note(self, running: _Measurement, result: dict[str, Any], now_s: float) -> None:
        instance = self._registry.instances.get(running.instance)
        if instance is None:
            return
        instance.measured[running.candidate] = result
        self._around.emit(
            Log(
                "choice_measured",
                {
                    **instance.log_fields(),
                    "RUNTIME": running.candidate.runtime,
                    "DEVICE": running.candidate.device,
                    "DETAIL": _sentence(result),
                },
            )
        )
        if not self._unmeasured(instance):
            self._conclude(instance, now_s)

    def _conclude(self, instance: Instance, now_s: float) -> None:
        best, gain = None, 0.0
        for candidate, result in instance.measured.items():
            found = _gain(result)
            if found > gain:
                best, gain = candidate, found
        chosen = best or instance.plan[0]
        self._placement.remember(instance, chosen)
        if best is None:
            instance.choice = "measured"
            return
        self._around.emit(
            Log(
                "choice_switched",
                {
                    **instance.log_fields(),
                    "RUNTIME": best.runtime,
                    "DEVICE": best.device,
                    "DETAIL": f"{gain:.0%} off {instance.plan[0]}: {_sentence(instance.measured[best])}",
                },
            )
        )
        self._lifecycle.switch(instance, best, now_s)


def _gain(result: dict[str, Any]) -> float:
    """The share of time that the candidate saves, or 0 when that is no reason to switch."""
    if not result.get("agrees") or not result.get("proven"):
        return 0.0
    reference, candidate = float(result["reference_p50_us"]), float(result["candidate_p50_us"])
    saved_us = reference - candidate
    if saved_us < GAIN_MIN_US or saved_us < GAIN_MIN * reference:
        return 0.0
    return saved_us / reference


def _sentence(result: dict[str, Any]) -> str:
    if "candidate_p50_us" in result and result["candidate_p50_us"] is not None:
        return (
            f"{result['candidate_p50_us']:.0f} µs against {result['reference_p50_us']:.0f} µs; "
            f"{result.get('why') or 'agrees'}"
        )
    return str(result.get("why", ""))
