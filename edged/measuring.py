"""The measurement of one setup of a model beside the one that serves, in a process of its own.

Loads both, compares their answers by the rule of `agreement`, then runs them in turns, each as it would be
run: as many threads as it has instances, each asking again as soon as it is answered. It decides nothing: it
says what it saw. Runs on Python 3.10 too.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edged.agreement import FAST, FULL, Bounds, NoInputs, disagreement, is_constant, read_golden
from edged.madeup import Choice, choose
from edged.runtimes.base import Model, RunFailed, clean_text
from edged.sizes import LEAST

__all__ = ["measure", "no_result"]

PAUSE_S = 0.1
"""Between two slots: a pool that still spins slows its neighbour."""

SLOT_S = 0.1
"""The longest that one side runs before the other has its turn, unless a single run takes longer."""

RUNS_PER_SLOT_MAX = 200
ROUNDS_MAX = 20
ROUNDS_MIN = 3
"""Bounds of a measurement beside its budget; the first round of each side warms up and is thrown away."""

NO_SIZE = "give a golden sample, or `edgectl tune` with -i or --shape"
"""What helps where no other size is known that the model takes."""

SHORT = 20
"""A slot is at most this part of the budget, so that a small one still has every round."""


def no_result(why: str) -> dict[str, Any]:
    """A measurement that proves nothing: the reference stays."""
    names = [f"{side}_{figure}" for side in ("reference", "candidate") for figure in _Side.FIGURES]
    return {**dict.fromkeys(names), "agrees": False, "proven": False, "why": why, "runs": 0, "size": None}


def measure(
    load: Callable[[Mapping[str, Any]], Model],
    settings: Mapping[str, Any],
    owner_inputs: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Loads reference and candidate, compares their answers, then times them in turns.

    `settings` is the control channel's `measure` map, `owner_inputs` what came with it. Only what agrees is
    timed.
    """
    bounds = FAST if settings["candidate"].get("precision") == "fast" else FULL
    reference = load(settings["reference"])
    try:
        candidate = load(settings["candidate"])
    except Exception as e:  # noqa: BLE001 - a candidate that does not load is an answer, not an accident
        reference.close()
        return no_result(f"the candidate does not load: {clean_text(e)}")
    try:
        if settings["candidate"].get("runtime") == "openvino" and any(
            s.datatype == "FP64" for s in (*reference.inputs, *reference.outputs)
        ):
            return no_result("this runtime computes FP64 in FP32")
        samples = read_golden(
            settings.get("golden_dir"), settings.get("golden") or (), reference.inputs, reference.outputs
        )
        choice = choose(reference, samples, settings, owner_inputs)
        agrees, proven, why, feeds = _compare(reference, candidate, choice, bounds)
        if agrees and feeds is not None and _are_alike(settings["reference"], settings["candidate"]):
            proven, why = True, "the same runtime on the same device"
        if not agrees or feeds is None:
            return {**no_result(why), "agrees": agrees, "proven": proven}
        size = choice.size_of(feeds)
        if size["source"] == LEAST:
            proven, why = False, f"{why}; nothing is decided at free dimensions of 1: {NO_SIZE}"
        try:
            sides = (
                _Side(reference, feeds, settings["reference"].get("rows") or 1),
                _Side(candidate, feeds, settings["candidate"].get("rows") or 1),
            )
            _race(sides, settings["budget_s"])
        except RunFailed as e:
            return no_result(f"it raises under load: {e.message}")
        except NoInputs as e:
            return no_result(str(e))
        figures = {
            f"{name}_{key}": value
            for name, side in zip(("reference", "candidate"), sides)  # noqa: B905 - two of each
            for key, value in side.figures().items()
        }
        runs = sum(len(side.times_ns) for side in sides)
        return {**figures, "agrees": agrees, "proven": proven, "why": why, "runs": runs, "size": size}
    finally:
        candidate.close()
        reference.close()


def _are_alike(reference: Mapping[str, Any], candidate: Mapping[str, Any]) -> bool:
    """Whether they differ in threads and the like only, so that there is nothing to prove."""
    keys = ("runtime", "device", "precision")
    return "runtime" in reference and all(reference.get(k) == candidate.get(k) for k in keys)


def _compare(
    reference: Model, candidate: Model, choice: Choice, bounds: Bounds
) -> tuple[bool, bool, str, Mapping[str, Any] | None]:
    """(agrees, proven, why, the inputs to time with): the first of the chosen ones that both answer."""
    specs = {s.name: s for s in reference.outputs}
    if [s.name for s in reference.inputs if not s.optional] != [
        s.name for s in candidate.inputs if not s.optional
    ] or list(specs) != [s.name for s in candidate.outputs]:
        return False, False, "the runtimes name the model's inputs and outputs differently", None
    tried = choice.samples
    answers: list[list[Any]] = []
    timed: Mapping[str, Any] | None = None
    notes = list(choice.refused)
    for sample in tried:
        try:
            want = reference.run(sample.inputs, list(specs))
        except RunFailed:
            notes.append(f"{sample.name}: the reference raises")
            continue
        try:
            got = candidate.run(sample.inputs, list(specs))
        except RunFailed as e:
            return False, False, f"{sample.name}: the candidate raises: {e.message}", None
        for (name, spec), a, b in zip(specs.items(), want, got):  # noqa: B905 - the same outputs were asked for
            why = disagreement(a, b, spec.datatype, bounds)
            if why:
                return False, False, f"{sample.name}, output {name!r}: {why}", None
        answers.append(want)
        timed = sample.inputs if timed is None else timed
    if timed is None:
        return False, False, "; ".join(notes) or "the model cannot be fed with made-up inputs", None
    if len(answers) < 2 or is_constant(answers):
        return True, False, "the reference answers the same to every input, which proves nothing", timed
    return True, True, f"{len(answers)} of {len(tried)} inputs agree", timed


@dataclass
class _Side:
    """A model under full load, and what was seen of it."""

    FIGURES = ("p50_us", "p99_us", "rows_s")

    model: Model
    feeds: Mapping[str, Any]
    rows: int
    times_ns: list[int] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.names = [s.name for s in self.model.outputs]
        if self.rows > 1:
            self.feeds = _widened(self.model, self.feeds, self.rows)
        else:
            self.rows = _rows(self.model, self.feeds)

    def slot(self, slot_s: float) -> tuple[list[int], float]:
        """Every instance runs without a pause; the times of the runs in ns, and rows a second."""
        results: list[list[int]] = [[] for _ in range(self.model.instances)]
        errors: list[RunFailed] = []
        start = threading.Barrier(len(results))
        began = time.perf_counter()

        def run(number: int) -> None:
            start.wait()
            try:
                results[number] = self._loop(number, slot_s)
            except RunFailed as e:
                errors.append(e)

        if len(results) == 1:
            run(0)
        else:
            threads = [threading.Thread(target=run, args=(n,)) for n in range(len(results))]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        took_s = time.perf_counter() - began
        if errors:
            raise errors[0]
        times = [each for result in results for each in result]
        return times, self.rows * len(times) / took_s

    def _loop(self, number: int, slot_s: float) -> list[int]:
        taken = []
        end = time.perf_counter() + slot_s
        for _ in range(RUNS_PER_SLOT_MAX):
            began = time.perf_counter_ns()
            self.model.run(self.feeds, self.names, number)
            taken.append(time.perf_counter_ns() - began)
            if time.perf_counter() > end:
                break
        return taken

    def figures(self) -> dict[str, float]:
        """p50 and p99 of a run in µs, and the median rate in rows a second."""
        times = sorted(self.times_ns)
        values = (
            times[len(times) // 2] / 1e3,
            times[math.ceil(0.99 * len(times)) - 1] / 1e3,
            sorted(self.rates)[len(self.rates) // 2],
        )
        return dict(zip(self.FIGURES, values))  # noqa: B905 - three of each


def _rows(model: Model, feeds: Mapping[str, Any]) -> int:
    """How many rows a request of this size has: it may be a batch of its sender's own making."""
    free = [s for s in model.inputs if s.name in feeds and s.shape and len(s.shape) > 1 and s.shape[0] < 0]
    rows = {len(feeds[spec.name]) for spec in free}
    return max(1, rows.pop()) if len(rows) == 1 else 1


def _widened(model: Model, feeds: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """The same inputs with `rows` rows. Raises NoInputs where a first dimension is not free."""
    found = {}
    for spec in model.inputs:
        if spec.name not in feeds:
            continue
        shape = spec.shape
        if not shape or shape[0] >= 0:
            raise NoInputs(f"input {spec.name!r} has no free first dimension to put several requests into")
        value = feeds[spec.name]
        if len(value) == 0:
            raise NoInputs(f"input {spec.name!r} has no row to repeat")
        found[spec.name] = np.ascontiguousarray(np.resize(value, (rows, *value.shape[1:])))
    return found


def _race(sides: Sequence[_Side], budget_s: float) -> None:
    """Runs the sides in turns with pauses, as far as the budget goes."""
    deadline = time.monotonic() + budget_s
    pause_s, slot_s = min(PAUSE_S, budget_s / SHORT), min(SLOT_S, budget_s / SHORT)
    for round_number in range(ROUNDS_MAX + 1):
        if round_number > ROUNDS_MIN and time.monotonic() > deadline:
            break
        for side in sides:
            time.sleep(pause_s)  # time is what is wanted: see PAUSE_S
            times, rate = side.slot(slot_s)
            if round_number:
                side.times_ns.extend(times)
                side.rates.append(rate)
