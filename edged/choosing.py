"""How a model is run best: measured when nobody asks, or when its owner does; decided here.

Pure. A model serves first, as was remembered or inherited or on the first device that works. When the daemon
is idle, what its owner left open is measured beside it, one setup at a time in a process of its own (`setups`
says which and what follows); a request that arrives stops that at once, and the next idle time has to be
longer before it is tried again. An owner may also ask for it (`edgectl tune`), with an aim and a budget: that
goes on while requests come, at a low priority, and its end changes nothing until the owner says so. One
measurement is made at a time, none while memory is short.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from edged.errors import InvalidArgument, NotFound, ResourceExhausted, Unavailable
from edged.events import Log, Publish, StartMeasure, StopMeasure
from edged.instances import Instance, InstanceState, Surroundings
from edged.lifecycle import Lifecycle
from edged.messages import TensorData
from edged.placement import Placement
from edged.registry import Registry
from edged.setups import (
    AIMS,
    Figures,
    Setup,
    Space,
    best,
    estimate_count,
    next_setup,
    pareto,
    reference_figures,
)
from edged.sizes import LEAST
from edged.workers import Workers

__all__ = ["Chooser", "Given", "Tune", "TuneState"]

IDLE_FIRST_S, IDLE_MAX_S = 2.0, 3600.0
"""No request for this long before measuring; doubled each time a request stopped it."""

BUDGET_S = 3.0
"""Of measuring, for each pair, when nobody has asked for it."""

SLICE_MIN_S, SLICE_MAX_S = 0.2, 5.0
"""Of an owner's budget, for each pair: below it noise decides, above it others had better be tried."""

BUDGET_MIN_S, BUDGET_MAX_S = 0.1, 3600.0
"""What an owner may give: a test needs little, and an hour tries whatever there is many times."""

LIMIT_S = 90.0
"""After which a measurement is given up: two loads and the budget fit many times over."""

GAIN_MIN_US = 50.0
"""What another device must save beside a tenth of the time, where nobody has asked for it."""

REQUESTS_MIN = 16
"""Before a choice that was made at guessed sizes is made again at theirs: fewer may have been a trial."""

ASKED_S = 30.0
"""An owner's tool that has not asked for so long is gone, and with it the reason to measure."""

NICE = 10
"""How far a measurement that goes on beside requests stands back behind them (nice(2))."""


class TuneState(enum.Enum):
    """How far an owner's measurement is."""

    MEASURING = "measuring"
    MEASURED = "measured"
    APPLYING = "applying"
    APPLIED = "applied"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True)
class Given:
    """What an owner wants a model measured with: whole inputs, the shapes of some, or neither."""

    inputs: tuple[TensorData, ...] = ()
    shapes: Mapping[str, list[int]] = field(default_factory=dict)


@dataclass(eq=False)
class Tune:
    """A measurement that an owner has asked for."""

    id: int
    instance: Instance
    space: Space
    started_s: float
    budget_s: float
    asked_s: float
    """When its owner's tool was last heard of."""
    sizes: Mapping[str, Any]
    """At which all its setups are measured, as `Workers.measure_spec` wants it."""
    inputs: tuple[TensorData, ...]
    state: TuneState = TuneState.MEASURING
    reason: str = ""
    message: str = ""
    results: dict[Setup, dict[str, Any]] = field(default_factory=dict)
    best: Setup | None = None
    best_unproven: Setup | None = None
    """What would be the best if its owner took every answer for good; None where that is no other."""
    requests: int = 0
    """That came while it measured, and cost it some truth."""
    ended_s: float | None = None
    incoming: Instance | None = None

    def figures(self) -> dict[Setup, Figures]:
        """What is known, the current setup included."""
        return _figures(self.space.current, self.results)


@dataclass(frozen=True)
class _Measurement:
    id: int
    instance: Instance
    setup: Setup
    until_s: float
    tune: Tune | None


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
        self.tune: Tune | None = None
        """The last that an owner asked for, whatever has become of it."""
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

    @property
    def _tuning(self) -> Tune | None:
        tune = self.tune
        return tune if tune is not None and tune.state is TuneState.MEASURING else None

    def note_request(self, now_s: float) -> None:
        """A request came in: the device is needed."""
        self._last_request_s = now_s
        running = self._running
        if running is None:
            return
        if running.tune is not None:
            running.tune.requests += 1
            return
        self._stop()
        self._idle_needed_s = min(IDLE_MAX_S, 2 * self._idle_needed_s)

    def _stop(self) -> None:
        if self._running is not None:
            self._around.emit(StopMeasure(self._running.id))
            self._running = None

    # ------------------------------------------------------------------ time

    def next_due_s(self) -> float | None:
        """When `step` may have something to do; None when everything is chosen."""
        tune = self._tuning
        due = [] if tune is None else [tune.asked_s + ASKED_S]
        if self._running is not None:
            due.append(self._running.until_s)
        elif tune is None and self._lifecycle.ready and (self._placement.unverified or self._next()):
            due.append(self._last_request_s + self._idle_needed_s)
        return min(due, default=None)

    def step(self, now_s: float) -> None:
        """Starts the next measurement when it is time."""
        if self._running is not None and now_s >= self._running.until_s:
            running = self._running
            self._stop()
            self._note(running, _nothing("took too long"), now_s)
        self._follow(now_s)
        self._reconsider()
        if self._tuning is not None:
            self._step_tune(self._tuning, now_s)
        if self._running is not None or self._tuning is not None:
            return
        if now_s < self._last_request_s + self._idle_needed_s or not self._lifecycle.ready:
            return
        if self._placement.unverified:
            self._placement.verify()
            return
        found = self._next()
        if found is not None:
            self._start(*found, None, BUDGET_S, now_s)

    def _start(
        self, instance: Instance, setup: Setup, tune: Tune | None, budget_s: float, now_s: float
    ) -> None:
        self._ids += 1
        self._running = _Measurement(self._ids, instance, setup, now_s + LIMIT_S, tune)
        if tune is None and not instance.measured:
            instance.measured_shapes = instance.sizes.most() if instance.sizes else []
        spec = self._workers.measure_spec(
            instance,
            setup,
            budget_s=budget_s,
            nice=0 if tune is None else NICE,
            batches=tune is not None and tune.space.aim == "throughput",
            sizes={"shapes": instance.measured_shapes} if tune is None else tune.sizes,
        )
        # Both load the model in that process.
        data_bytes = 2 * self._workers.memory_max_bytes(instance.settings)
        inputs = () if tune is None else tune.inputs
        self._around.emit(StartMeasure(self._ids, spec, data_bytes, inputs))

    # ------------------------------------------------------------------ when nobody asks

    def _next(self) -> tuple[Instance, Setup] | None:
        tracks = self._registry.tracks.values()
        if self._placement.verifying or any(t.incoming is not None for t in tracks):
            return None
        if self._around.guard is not None and self._around.guard.level > 0:
            return None
        for instance in [t.serving for t in tracks if t.serving is not None]:
            setup = self._unmeasured(instance)
            if setup is not None:
                return instance, setup
        return None

    def _unmeasured(self, instance: Instance) -> Setup | None:
        if instance.settled or instance.state is not InstanceState.READY:
            return None
        space = self._space(instance, "auto")
        return next_setup(space, _figures(space.current, instance.measured))

    def _reconsider(self) -> None:
        """What was chosen at sizes that were guessed is open again when requests have told theirs."""
        for track in self._registry.tracks.values():
            instance = track.serving
            if (
                instance is not None
                and instance.settled
                and instance.record.get("guessed") is True
                and instance.record.get("source") == "measured"
                and instance.sizes
                and instance.sizes.count >= REQUESTS_MIN
            ):
                instance.settled = False
                instance.measured.clear()
                if not instance.pinned:
                    instance.choice = "default"

    def _space(self, instance: Instance, aim: str) -> Space:
        settings = instance.settings
        current = self._workers.setup_of(instance, instance.plan[0])
        instances: int | None
        if settings.isolation == "shared":
            instances = 1
        elif isinstance(settings.instances, int):
            instances = settings.instances
        elif aim == "auto" and settings.instances is None:
            instances = current.instances
        else:
            instances = None
        chosen = aim == "auto" and instance.pinned
        return Space(
            candidates=(current.candidate,) if chosen else self._placement.comparable(instance),
            current=current,
            cpus=self._around.machine.cpus,
            aim=aim,
            threads=settings.threads,
            instances=instances,
            batch=settings.max_batch_size,
            rows_free=all(spec.shape and spec.shape[0] < 0 for spec in instance.inputs.values()),
            gain_us=GAIN_MIN_US if aim == "auto" else 0.0,
        )

    def on_measured(self, measure: int, result: dict[str, Any] | None, how: str, now_s: float) -> None:
        """A measurement has ended; one that was stopped does not count."""
        running = self._running
        if running is None or running.id != measure:
            return
        self._running = None
        self._note(running, result or _nothing(how), now_s)

    def _note(self, running: _Measurement, result: dict[str, Any], now_s: float) -> None:
        instance, setup, tune = running.instance, running.setup, running.tune
        if self._registry.instances.get(instance.id) is not instance:
            return
        self._log("choice_measured", instance, setup, _sentence(result))
        if tune is not None:
            tune.results[setup] = result
            self._publish(tune, now_s, setup)
            return
        instance.measured[setup] = result
        if self._unmeasured(instance) is None:
            self._conclude(instance, now_s)

    def _conclude(self, instance: Instance, now_s: float) -> None:
        space = self._space(instance, "auto")
        figures = _figures(space.current, instance.measured)
        found = best(space, figures)
        instance.settled = True
        if not instance.pinned:
            instance.choice = "measured"
        guessed = not instance.measured_shapes and _at_guesses(instance.measured.values())
        self._placement.remember(instance, found, "measured", guessed=guessed)
        if found != space.current:
            now, then = figures[space.current], figures[found]
            text = f"{_gain(now, then)} {space.current}: {_sentence(instance.measured[found])}"
            self._log("choice_switched", instance, found, text)
            self._lifecycle.switch(instance, found, instance.choice, now_s)

    def _log(self, kind: str, instance: Instance, setup: Setup, detail: str) -> None:
        fields = {**instance.log_fields(), "RUNTIME": setup.candidate.runtime}
        fields |= {"DEVICE": setup.candidate.device, "DETAIL": f"{setup}: {detail}"}
        self._around.emit(Log(kind, fields))

    # ------------------------------------------------------------------ when the owner asks

    def start_tune(
        self, instance: Instance, *, aim: str, budget_s: float, given: Given, now_s: float
    ) -> Tune:
        """Begins an owner's measurement of a model that serves.

        Raises InvalidArgument, ResourceExhausted while memory is short, Unavailable while there is another
        or while the model is on its way somewhere else already.
        """
        if aim not in AIMS:
            raise InvalidArgument(f"aim must be one of {', '.join(AIMS)}", reason="BAD_PARAMETER")
        if not BUDGET_MIN_S <= budget_s <= BUDGET_MAX_S:
            text = f"the budget must be from {BUDGET_MIN_S:g} s to {BUDGET_MAX_S:g} s"
            raise InvalidArgument(text, reason="BAD_PARAMETER")
        busy = self._tuning
        if busy is not None:
            text = f"model '{busy.instance.name}' is being tuned; one at a time"
            raise Unavailable(text, reason="TUNE_RUNNING", retry_after_ms=5000)
        problem = self._problem(instance)
        if problem is not None:
            reason, message = problem
            if reason == "MEMORY_PRESSURE":
                raise ResourceExhausted(message, reason=reason, retry_after_ms=5000)
            raise Unavailable(message, reason=reason, retry_after_ms=1000)
        self._stop()
        self._ids += 1
        space = self._space(instance, aim)
        sizes: dict[str, Any] = {"shapes": instance.sizes.most() if instance.sizes else []}
        if given.shapes:
            sizes["owner_shapes"] = given.shapes
        self.tune = Tune(self._ids, instance, space, now_s, budget_s, now_s, sizes, given.inputs)
        self._publish(self.tune, now_s, None)
        self._step_tune(self.tune, now_s)
        return self.tune

    def find_tune(self, number: object, now_s: float) -> Tune:
        """The tune of this number, whose owner has just asked. Raises NotFound."""
        if self.tune is None or self.tune.id != number:
            raise NotFound(f"no tune {number!r}; another one has begun since", reason="NO_TUNE")
        self.tune.asked_s = now_s
        return self.tune

    def cancel_tune(self, tune: Tune, now_s: float) -> None:
        """Ends it; everything is as it was before. Without effect on one that has ended."""
        if tune.state in (TuneState.MEASURING, TuneState.MEASURED):
            self._end(tune, TuneState.CANCELLED, "CANCELLED", "cancelled by its owner", now_s)

    def apply_tune(self, tune: Tune, now_s: float, *, unproven: bool = False) -> None:
        """Has the model run as was found to be the best, beside how it runs now until that one is ready.

        With `unproven` that may be a setup whose answers are not shown to be the same: the owner's word.
        Raises Unavailable when there is nothing to apply, or the model is not what was measured any more.
        """
        if unproven and tune.best_unproven is not None and tune.state is TuneState.MEASURED:
            tune.best = tune.best_unproven
        if tune.state is not TuneState.MEASURED or tune.best is None:
            text = f"there is nothing to apply: the tune is {tune.state.value}"
            raise Unavailable(text, reason="NOT_MEASURED")
        problem = self._problem(tune.instance)
        if problem is not None:
            raise Unavailable(problem[1], reason=problem[0], retry_after_ms=1000)
        instance, found = tune.instance, tune.best
        self._placement.remember(instance, found, "tuned")
        instance.settled = True
        if found == self._workers.setup_of(instance, instance.plan[0]):
            instance.choice, instance.setup = "tuned", found
            self._end(tune, TuneState.APPLIED, "", "the model runs so already", now_s)
            return
        self._log("choice_switched", instance, found, f"tuned for {tune.space.aim}")
        tune.state = TuneState.APPLYING
        tune.incoming = self._lifecycle.switch(instance, found, "tuned", now_s)
        self._follow(now_s)

    def _problem(self, instance: Instance) -> tuple[str, str] | None:
        """Why a model cannot be tuned now; None when it can."""
        name, track = instance.name, instance.track
        guard = self._around.guard
        if guard is not None and guard.level > 0:
            return "MEMORY_PRESSURE", f"the device is short: {'; '.join(guard.reasons)}"
        if track.serving is not instance or instance.state is not InstanceState.READY:
            return "MODEL_CHANGED", f"model '{name}' does not serve as it did"
        if track.incoming is not None:
            return "MODEL_LOADING", f"model '{name}' is being loaded; ask again when it has settled"
        return None

    def _step_tune(self, tune: Tune, now_s: float) -> None:
        problem = self._problem(tune.instance)
        if problem is not None:
            self._end(tune, TuneState.FAILED, *problem, now_s)
        elif now_s >= tune.asked_s + ASKED_S:
            text = f"nobody has asked about it for {ASKED_S:g} s"
            self._end(tune, TuneState.CANCELLED, "OWNER_GONE", text, now_s)
        elif self._running is None:
            left_s = tune.started_s + tune.budget_s - now_s
            setup = next_setup(tune.space, tune.figures()) if left_s > 0 or not tune.results else None
            if setup is None:
                self._measured(tune, now_s)
                return
            slice_s = tune.budget_s / max(1, estimate_count(tune.space))
            self._start(tune.instance, setup, tune, min(SLICE_MAX_S, max(SLICE_MIN_S, slice_s)), now_s)

    def _measured(self, tune: Tune, now_s: float) -> None:
        figures = tune.figures()
        tune.best = best(tune.space, figures)
        # As if every one that was timed answered as it should.
        trusted = {s: replace(f, agrees=True, proven=True) for s, f in figures.items()}
        found = best(tune.space, trusted)
        tune.best_unproven = None if found in (tune.best, tune.space.current) else found
        text = "" if tune.results else "there is nothing to choose from: one device, one way to run it"
        self._end(tune, TuneState.MEASURED, "", text, now_s)

    def _end(self, tune: Tune, state: TuneState, reason: str, message: str, now_s: float) -> None:
        if self._running is not None and self._running.tune is tune:
            self._stop()
        tune.state, tune.reason, tune.message, tune.ended_s = state, reason, message, now_s
        tune.inputs = ()  # they may be as large as a request, and nothing is measured any more
        self._publish(tune, now_s, None)

    def _follow(self, now_s: float) -> None:
        """What has become of an instance that was to run as tuned."""
        tune = self.tune
        if tune is None or tune.state is not TuneState.APPLYING:
            return
        new = tune.incoming
        if new is not None and new.track.serving is new:
            self._end(tune, TuneState.APPLIED, "", "", now_s)
        elif new is None or new.track.incoming is not new:
            message = "it was given up" if new is None else new.message or "it was given up"
            self._end(tune, TuneState.FAILED, "SWITCH_FAILED", message, now_s)

    def _publish(self, tune: Tune, now_s: float, setup: Setup | None) -> None:
        payload = {
            "tune": tune.id,
            "name": tune.instance.name,
            "state": tune.state.value,
            "reason": tune.reason,
            "elapsed_s": round(now_s - tune.started_s, 3),
            "budget_s": tune.budget_s,
            **({} if setup is None else setup.to_wire()),
        }
        self._around.emit(Publish("model.tune", payload))

    def report(self, tune: Tune, now_s: float) -> dict[str, Any]:
        """Everything about a tune, for its owner's tool."""
        figures = tune.figures()
        front = pareto(figures)
        running = self._running
        measuring = running.setup if running is not None and running.tune is tune else None
        ended_s = now_s if tune.ended_s is None else tune.ended_s
        return {
            "id": tune.id,
            "name": tune.instance.name,
            "version": str(tune.instance.version),
            "sha256": tune.instance.staged.digest,
            "aim": tune.space.aim,
            "budget_s": tune.budget_s,
            "elapsed_s": round(ended_s - tune.started_s, 3),
            "setups_max": estimate_count(tune.space),
            "state": tune.state.value,
            "reason": tune.reason,
            "message": tune.message,
            "requests": tune.requests,
            "measuring": None if measuring is None else measuring.to_wire(),
            "current": tune.space.current.to_wire(),
            "best": None if tune.best is None else tune.best.to_wire(),
            "best_unproven": None if tune.best_unproven is None else tune.best_unproven.to_wire(),
            "rows": [
                {
                    **setup.to_wire(),
                    "p50_us": f.p50_us or None,
                    "p99_us": f.p99_us or None,
                    "rows_s": f.rows_s or None,
                    "agrees": f.agrees,
                    "proven": f.proven,
                    "why": f.why,
                    "size": tune.results.get(setup, {}).get("size"),
                    "obstacles": list(tune.results.get(setup, {}).get("obstacles") or ()),
                    "remedy": str(tune.results.get(setup, {}).get("remedy", "")),
                    "pareto": setup in front,
                    "current": setup == tune.space.current,
                    "best": setup == tune.best,
                }
                for setup, f in figures.items()
            ],
        }


def _at_guesses(results: Iterable[Mapping[str, Any]]) -> bool:
    """Whether measurements had nothing better than typical sizes to go by."""
    sizes = [result["size"] for result in results if result.get("size")]
    return bool(sizes) and all(size["source"] in ("typical", LEAST) for size in sizes)


def _nothing(why: str) -> dict[str, Any]:
    return {"agrees": False, "proven": False, "why": why}


def _figures(current: Setup, results: dict[Setup, dict[str, Any]]) -> dict[Setup, Figures]:
    """What the results say, in one scale; the serving setup was the other side of each of them."""
    reference = reference_figures(results.values())
    found = {} if reference is None else {current: reference}
    return found | {s: Figures.of(r, reference) for s, r in results.items() if s != current}


def _gain(now: Figures, then: Figures) -> str:
    if then.p50_us < now.p50_us:
        return f"{1 - then.p50_us / now.p50_us:.0%} off"
    return f"{then.rows_s / now.rows_s - 1:.0%} more rows a second than"


def _sentence(result: dict[str, Any]) -> str:
    why = str(result.get("why", ""))
    if result.get("candidate_p50_us") is None:
        return why
    return f"{_speed(result, 'candidate')} against {_speed(result, 'reference')}; {why or 'agrees'}"


def _speed(result: dict[str, Any], side: str) -> str:
    rows_s = result.get(f"{side}_rows_s")
    return f"{result[f'{side}_p50_us']:.0f} µs" + ("" if rows_s is None else f" ({rows_s:.0f} rows/s)")
