"""The measurement of one setup of a model beside the one that serves, in a process of its own.

Loads both, says what stands against the candidate by the model's graph (`proof`), compares their answers by
the rule of `agreement`, and runs them in turns, each as it would be run: as many threads as it has instances,
each asking again as soon as it is answered. What is not allowed to serve is timed all the same, so that its
owner sees what it would bring. It decides nothing: it says what it saw. Runs on Python 3.10 too.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edged.agreement import (
    FAST,
    FULL,
    MAGNITUDES,
    Bounds,
    NoInputs,
    disagreement,
    edges,
    is_constant,
    is_finite,
    read_golden,
)
from edged.madeup import Choice, choose
from edged.proof import Obstacle, judge, sentence
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


EDGE_INPUTS_MAX = 16
"""A model of more inputs is tried at the edges of all of them at once only: each takes a dozen runs."""

ALIKE = "large and all alike"

OBSTACLES_MAX, OBSTACLE_CHARS_MAX = 20, 400
"""Of what is told of a measurement: an owner reads the first, and the books keep them."""


def no_result(why: str) -> dict[str, Any]:
    """A measurement that proves nothing: the reference stays."""
    names = [f"{side}_{figure}" for side in ("reference", "candidate") for figure in _Side.FIGURES]
    return {
        **dict.fromkeys(names),
        "agrees": False,
        "proven": False,
        "why": why,
        "obstacles": [],
        "remedy": "",
        "runs": 0,
        "size": None,
    }


def measure(
    load: Callable[[Mapping[str, Any]], Model],
    settings: Mapping[str, Any],
    owner_inputs: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Loads reference and candidate, compares their answers and times them in turns.

    `settings` is the control channel's `measure` map, `owner_inputs` what came with it. What agrees is timed,
    and so is what only its graph speaks against.
    """
    bounds = FAST if settings["candidate"].get("precision") == "fast" else FULL
    alike = _are_alike(settings["reference"], settings["candidate"])
    reference = load(settings["reference"])
    replaceable = frozenset(s.name for s in reference.inputs if s.optional)
    against = () if alike or "runtime" not in settings["reference"] else judge(settings, replaceable)
    try:
        candidate = load(settings["candidate"])
    except Exception as e:  # noqa: BLE001 - a candidate that does not load is an answer, not an accident
        reference.close()
        return no_result(f"the candidate does not load: {clean_text(e)}")
    try:
        samples = read_golden(
            settings.get("golden_dir"), settings.get("golden") or (), reference.inputs, reference.outputs
        )
        choice = choose(reference, samples, settings, owner_inputs)
        pair = _Pair(reference, candidate, bounds, finite_only=bool(settings.get("finite_inputs")))
        agrees, proven, why, feeds = pair.compare(choice, with_edges=not alike and not against)
        if alike and agrees and feeds is not None:
            proven, why = True, "the same runtime on the same device"
        if against:
            agrees, proven, why = (
                False,
                False,
                "; ".join(filter(None, (sentence(against), pair.disagreement))),
            )
        size = None if feeds is None else choice.size_of(feeds)
        if agrees and size is not None and size["source"] == LEAST:
            proven, why = False, f"{why}; nothing is decided at free dimensions of 1: {NO_SIZE}"
        verdict = {"agrees": agrees, "proven": proven, "why": why, **_told(against, pair.disagreement)}
        if feeds is None:
            return {**no_result(why), **verdict}
        try:
            return {**_timed(reference, candidate, feeds, settings), **verdict, "size": size}
        except (RunFailed, NoInputs) as e:
            why = f"it raises under load: {e.message}" if isinstance(e, RunFailed) else str(e)
            return {**no_result(why), **_told(against, pair.disagreement)}
    finally:
        candidate.close()
        reference.close()


def _told(against: Sequence[Obstacle], disagreement: str) -> dict[str, Any]:
    """What stands in the way, one by one, and what the owner can say so that it does not."""
    found = [*([disagreement] if disagreement else []), *(str(each) for each in against)]
    remedies = {each.remedy for each in against} | ({""} if disagreement else set())
    return {
        "obstacles": [each[:OBSTACLE_CHARS_MAX] for each in found[:OBSTACLES_MAX]],
        "remedy": remedies.pop() if len(remedies) == 1 else "",
    }


def _timed(
    reference: Model, candidate: Model, feeds: Mapping[str, Any], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """The figures of both sides. Raises RunFailed, NoInputs."""
    sides = (
        _Side(reference, feeds, settings["reference"].get("rows") or 1),
        _Side(candidate, feeds, settings["candidate"].get("rows") or 1),
    )
    _race(sides, settings["budget_s"])
    figures = {
        f"{name}_{key}": value
        for name, side in zip(("reference", "candidate"), sides)  # noqa: B905 - two of each
        for key, value in side.figures().items()
    }
    return {**figures, "runs": sum(len(side.times_ns) for side in sides)}


def _are_alike(reference: Mapping[str, Any], candidate: Mapping[str, Any]) -> bool:
    """Whether they differ in threads and the like only, so that there is nothing to prove."""
    keys = ("runtime", "device", "precision")
    return "runtime" in reference and all(reference.get(k) == candidate.get(k) for k in keys)


_Told = tuple[bool, bool, str, "Mapping[str, Any] | None"]
"""Whether the answers agree, whether that proves anything, why, and the inputs to time with."""


class _Pair:
    """Two models that should answer the same."""

    def __init__(self, reference: Model, candidate: Model, bounds: Bounds, *, finite_only: bool) -> None:
        self._reference, self._candidate = reference, candidate
        self._bounds = bounds
        self._finite_only = finite_only
        """NaN and infinities never come, by the owner's word."""
        self._specs = {s.name: s for s in reference.outputs}
        self.disagreement = ""
        """The first that was seen."""

    def compare(self, choice: Choice, *, with_edges: bool) -> _Told:
        """The chosen inputs, in their order, then what parts runtimes."""
        ports = [(s.name, s.optional) for s in self._reference.inputs]
        if ports != [(s.name, s.optional) for s in self._candidate.inputs] or list(self._specs) != [
            s.name for s in self._candidate.outputs
        ]:
            return self._differ(self._ports())
        tried = choice.samples
        answers: list[list[Any]] = []
        base: Mapping[str, Any] | None = None
        notes = list(choice.refused)
        for sample in tried:
            want = self._ask(self._reference, sample.inputs)
            if isinstance(want, RunFailed):
                notes.append(f"{sample.name}: the reference raises")
            got = self._ask(self._candidate, sample.inputs)
            why = self._difference(want, got)
            if why:
                # What answers can be timed, even if it answers something else.
                return self._differ(
                    f"{sample.name}{why}", None if isinstance(got, RunFailed) else sample.inputs
                )
            if not isinstance(want, RunFailed):
                answers.append(want)
                base = sample.inputs if base is None else base
        if base is None:
            return False, False, "; ".join(notes) or "the model cannot be fed with made-up inputs", None
        edge_runs = 0
        for name, feeds in self._edges(tried[-1].inputs) if with_edges else ():
            why = self._difference(self._ask(self._reference, feeds), self._ask(self._candidate, feeds))
            if why:
                return self._differ(f"{name}{why}", base)
            edge_runs += 1
        if len(answers) < 2 or is_constant(answers):
            return True, False, "the reference answers the same to every input, which proves nothing", base
        text = f"{len(answers)} of {len(tried)} inputs agree"
        return True, True, text + (f", and {edge_runs} at the edges" if edge_runs else ""), base

    def _differ(self, why: str, feeds: Mapping[str, Any] | None = None) -> _Told:
        self.disagreement = why
        return False, False, why, feeds

    def _ports(self) -> str:
        """How their inputs and outputs are not the same."""
        there = {s.name for s in self._candidate.inputs}
        lost = [s.name for s in self._reference.inputs if s.optional and s.name not in there]
        if lost:
            names = ", ".join(repr(name) for name in lost[:3]) + (", …" if len(lost) > 3 else "")
            return (
                f"the candidate has no optional input {names}; "
                "export the model without initializers among its inputs"
            )
        return "the runtimes name the model's inputs and outputs differently"

    def _ask(self, model: Model, feeds: Mapping[str, Any]) -> list[Any] | RunFailed:
        try:
            return model.run(feeds, list(self._specs))
        except RunFailed as e:
            return e

    def _difference(self, want: list[Any] | RunFailed, got: list[Any] | RunFailed) -> str:
        """How an answer or a refusal differs from the other; empty when they agree, or need not."""
        if isinstance(want, RunFailed):
            if isinstance(got, RunFailed) or want.reason == "MEMORY_LIMIT":
                return ""
            return ": the candidate answers what the reference refuses"
        if isinstance(got, RunFailed):
            return f": the candidate raises: {got.message}"
        if self._finite_only and not is_finite(want):
            return ""
        for (name, spec), a, b in zip(self._specs.items(), want, got):  # noqa: B905 - the same were asked for
            why = disagreement(a, b, spec.datatype, self._bounds)
            if why:
                return f", output {name!r}: {why}"
        return ""

    def _edges(self, feeds: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Each input at its edges while the others are as they were, then all at once."""
        found = {
            name: {
                kind: array
                for kind, array in (*edges(value), *_alike(value))
                if not (self._finite_only and not is_finite([array]))
                and not (self._bounds is FAST and array.dtype.kind == "f" and kind in (*MAGNITUDES, ALIKE))
            }
            for name, value in feeds.items()
        }
        for name, each in found.items() if len(found) <= EDGE_INPUTS_MAX else ():
            for kind, array in each.items():
                yield f"{kind} in input {name!r}", {**feeds, name: array}
        if len(found) > 1:
            for kind in dict.fromkeys(kind for each in found.values() for kind in each):
                changed = {name: each[kind] for name, each in found.items() if kind in each}
                yield f"{kind} in all inputs", {**feeds, **changed}


def _alike(array: Any) -> Iterator[tuple[str, Any]]:
    """Large numbers that are all the same: what is normalised then has nothing but rounding to divide by.

    Of a model's inputs only: inside a network nothing looks like that, and no two runtimes agree on it.
    """
    if array.dtype in (np.float32, np.float64) and array.size:
        yield ALIKE, np.full_like(array, 1e30)


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
