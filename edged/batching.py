"""Whether rows of different requests may share a run, and up to how many it is worth it.

Two requests may only be put together if neither can change the other's answer. That is proved on the model
itself when it has loaded: rows run one by one and together must agree by `agreement`'s rule, at every size
that is tried, in more than one order. Among them are zeros, ones and one row twice, for a model whose output
depends on the data (NonZero, Unique) has as many rows as there are numbers in a random input, but not then;
and a row of large numbers, for a model that scales by the largest of all.

Owns the proof and the times that it takes along. It loads nothing and decides nothing for the core, which
looks at every batch's outputs once more. Runs on Python 3.10 too.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from edged import agreement
from edged.agreement import Bounds, Sample, disagreement
from edged.runtimes.base import DTYPES, Model, RunFailed
from edged.tensors import ITEM_BYTES, TensorSpec

__all__ = ["Batch", "NotBatchable", "explore", "run_us"]

SIZES = (2, 4, 8, 16, 32, 64)
"""What is tried without being asked: 64 requests that wait at once are rare on a device."""

BUDGET_S = 0.5
"""What trying may take at each load, unless the owner asks for a size of his own."""

GAIN_MIN = 1.1
"""Rows per second over those of the size before; less is not worth the longer wait of each request."""

ROWS, ROWS_MIN = 8, 4
"""Different rows that take part; the fewer only where one run takes long."""

LOUD, LOUD_AT = 100.0, 1
"""How much larger the numbers of one row are, and which it is: of a batch of two, too. What is scaled by the
largest number of a whole batch, as models are that quantise as they go, then takes the others' digits away,
and shows also where a tenth of them may differ."""

ROW_BY_ROW_MAX = 8
"""Up to this size each row is compared by itself; beyond it that takes longer than the runs, and the rule's
bound on the largest difference sees one row among many."""

SLOT_S, RUNS_MAX = 0.01, 50
"""How long, and how often, a size is timed."""

RUNS_PER_SIZE = 4
"""What a size costs at the least, where rows gain nothing together: three orders and one timed run."""

BYTES_MAX = 64 << 20
"""Of one batch's inputs and outputs; beyond it memory's speed is the limit and rows gain nothing together."""


class NotBatchable(Exception):
    """Rows do not stand alone; the text says which tensor shows it."""


@dataclass(frozen=True)
class Batch:
    """`max` rows of different requests may share a run, 1 for none; `times_us`: (rows, µs), as tried."""

    max: int
    times_us: tuple[tuple[int, float], ...]
    why: str

    @classmethod
    def from_wire(cls, wire: object) -> Batch | None:
        """As the supervisor remembers it; None for what is no result of `explore`."""
        if not isinstance(wire, Mapping):
            return None
        most, times, why = wire.get("max"), wire.get("times_us"), wire.get("why")
        try:
            rows = tuple((int(rows), float(us)) for rows, us in times)  # type: ignore[union-attr]  # tried
        except (TypeError, ValueError):
            return None
        if type(most) is not int or not 1 <= most <= SIZES[-1] or not rows or not isinstance(why, str):
            return None
        return cls(most, rows, why)

    def to_wire(self) -> dict[str, Any]:
        """As the supervisor is told."""
        return {"max": self.max, "times_us": [list(t) for t in self.times_us], "why": self.why}


def explore(
    model: Model,
    samples: Sequence[Sample],
    *,
    wanted: int | None,
    bounds: Bounds,
    check: Callable[[], None] = lambda: None,
) -> Batch:
    """Proves and times batches of a model that is loaded; `check` is called between runs and may raise.

    With `wanted`, the owner's size, this size is proved whatever it takes and allowed whatever it gains.
    Raises NotBatchable for rows that do not stand alone, RunFailed for a run that failed.
    """
    obstacle = _obstacle(model)
    if obstacle:
        raise NotBatchable(obstacle)
    began_s = time.monotonic()
    trial = _Trial(model, _rows(model.inputs, samples), bounds, check)
    trial.run_alone(began_s + BUDGET_S / 4)
    trial.time(1)
    best = 1
    for size in _sizes(wanted):
        left_us = (began_s + BUDGET_S - time.monotonic()) * 1e6
        if size != wanted and RUNS_PER_SIZE * size * trial.row_us(best) > left_us:
            if wanted is None:
                return trial.verdict(best, f"{size} rows together take longer than trying may")
            continue
        if wanted is None and size * trial.row_bytes > BYTES_MAX:
            return trial.verdict(best, f"{size} rows together take more memory than trying may")
        try:
            trial.prove(size)
            trial.time(size)
        except RunFailed as e:
            if wanted is not None or e.fatal or e.reason != "MEMORY_LIMIT":
                raise
            return trial.verdict(best, f"{size} rows together: {e.message}")
        if wanted is None and trial.row_us(best) / trial.row_us(size) < GAIN_MIN:
            for again in (best, size):  # what else runs on the machine must not decide
                trial.time(again)
            gain = trial.row_us(best) / trial.row_us(size)
            if gain < GAIN_MIN:
                return trial.verdict(best, f"{size} rows together: {gain:.2f} × the rows/s of {best}")
        best = size
    why = "the largest size that is tried" if wanted is None else "the size that the settings name, proved"
    return trial.verdict(best, why)


def run_us(model: Model, feeds: Mapping[str, Any], names: Sequence[str]) -> tuple[float, float]:
    """(least, median) of what a run takes in µs, from as many as a short while allows."""
    taken: list[int] = []
    until = time.monotonic() + SLOT_S
    while not taken or (len(taken) < RUNS_MAX and time.monotonic() < until):
        began = time.perf_counter_ns()
        model.run(feeds, names)
        taken.append(time.perf_counter_ns() - began)
    taken.sort()
    return taken[0] / 1e3, taken[len(taken) // 2] / 1e3


class _Trial:
    """The rows, what each is answered with alone, and what the sizes took."""

    def __init__(
        self,
        model: Model,
        rows: Sequence[Mapping[str, Any]],
        bounds: Bounds,
        check: Callable[[], None],
    ) -> None:
        self.row_bytes = 0
        """Of one row's inputs and outputs."""
        self._model = model
        self._names = [spec.name for spec in model.outputs]
        self._datatypes = [spec.datatype for spec in model.outputs]
        self._rows = list(rows)
        self._bounds = bounds
        self._check = check
        self._alone: list[list[Any]] = []
        self._least_us: dict[int, float] = {}
        self._median_us: dict[int, float] = {}

    def run_alone(self, until_s: float) -> None:
        """Runs the rows one by one, all of them if they take no longer than that."""
        for row in self._rows:
            if len(self._alone) >= ROWS_MIN and time.monotonic() > until_s:
                break
            self._check()
            self._alone.append(self._answer_alone(row))
        del self._rows[len(self._alone) :]
        self.row_bytes = sum(array.nbytes for array in self._rows[0].values())
        self.row_bytes += sum(value.nbytes for value in self._alone[0])
        if agreement.is_constant(self._alone):
            raise NotBatchable("the model answers the same to every input, which proves nothing")

    def _answer_alone(self, row: Mapping[str, Any]) -> list[Any]:
        at = len(self._alone)
        try:
            return self._answer(row, 1)
        except RunFailed as e:
            if at != LOUD_AT or e.fatal:
                raise
            self._rows[at] = self._rows[0]  # such numbers are none that the model takes
            return self._alone[0]

    def prove(self, size: int) -> None:
        """Runs `size` rows together, in three orders; each must be answered as it is alone."""
        for step in (1, 2, -1):
            self._check()
            order = [(place * step) % len(self._rows) for place in range(size)]
            together = self._answer(self._together(order), size)
            for at, (name, datatype) in enumerate(zip(self._names, self._datatypes)):  # noqa: B905 - one each
                alone = [self._alone[row][at] for row in order]
                why = self._difference(order, alone, together[at], datatype)
                if why:
                    raise NotBatchable(f"output '{name}' of a row among {size} is not as it is alone: {why}")

    def _difference(
        self, order: Sequence[int], alone: Sequence[Any], together: Any, datatype: str
    ) -> str | None:
        groups = [[place] for place in range(len(order))]
        if len(order) > ROW_BY_ROW_MAX:
            # Beside the loud row nothing that the others lose would show.
            groups = [
                [p for p, row in enumerate(order) if (row == LOUD_AT) is loud] for loud in (True, False)
            ]
        for group in filter(None, groups):
            one_by_one = np.concatenate([alone[place] for place in group])
            why = disagreement(one_by_one, together[group], datatype, self._bounds)
            if why:
                return why
        return None

    def time(self, size: int) -> None:
        """Finds what a batch of this size takes."""
        self._check()
        feeds = self._together([place % len(self._rows) for place in range(size)])
        least_us, median_us = run_us(self._model, feeds, self._names)
        self._least_us[size] = min(least_us, self._least_us.get(size, math.inf))
        self._median_us[size] = min(median_us, self._median_us.get(size, math.inf))

    def row_us(self, size: int) -> float:
        """What one row takes in a batch of this size, at the least."""
        return self._least_us[size] / size

    def verdict(self, rows: int, why: str) -> Batch:
        """What came of it; the memory of the sizes that will not be run again is given back."""
        self._model.shrink()
        for _ in range(2):  # the first gives back, the second has what a run needs at hand again
            self._model.run(self._rows[0], self._names)
        return Batch(rows, tuple((n, round(us, 1)) for n, us in self._median_us.items()), why)

    def _together(self, order: Sequence[int]) -> dict[str, Any]:
        return {name: np.concatenate([self._rows[at][name] for at in order]) for name in self._rows[0]}

    def _answer(self, feeds: Mapping[str, Any], rows: int) -> list[Any]:
        values = self._model.run(feeds, self._names)
        for name, value in zip(self._names, values):  # noqa: B905 - one for each name
            if not isinstance(value, np.ndarray) or not value.shape or value.shape[0] != rows:
                shape = list(value.shape) if isinstance(value, np.ndarray) else None
                raise NotBatchable(f"output '{name}' of {rows} rows has the shape {shape}")
        return values


def _sizes(wanted: int | None) -> list[int]:
    return list(SIZES) if wanted is None else [*[size for size in SIZES if size < wanted], wanted]


def _obstacle(model: Model) -> str:
    """What in the declared shapes and types forbids batches; empty when nothing does."""
    first_names = set()
    for kind, specs in (("input", model.inputs), ("output", model.outputs)):
        for spec in specs:
            if spec.datatype not in ITEM_BYTES:
                return f"{kind} '{spec.name}' is {spec.datatype}, whose size is not fixed"
            if not spec.shape or spec.shape[0] != -1:
                return f"{kind} '{spec.name}' has no free first dimension"
            if spec.dim_names and spec.dim_names[0]:
                first_names.add(spec.dim_names[0])
    if len(first_names) > 1:
        return f"the first dimensions have different names: {', '.join(sorted(first_names))}"
    return "" if model.inputs and model.outputs else "there is nothing to put together"


def _rows(specs: Sequence[TensorSpec], samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """Single rows, the most telling first: numbers, large ones, the first again, zeros, ones, others.

    Other free dimensions are as in the first golden sample, whose first row takes part, or 1.
    Raises NoInputs for a model that cannot be fed.
    """
    golden = _golden_row(specs, samples)
    like = golden or agreement.synthetic_inputs(specs, "ones")

    def filled(make: Callable[[tuple[int, ...]], Any]) -> dict[str, Any]:
        return {s.name: _cast(make(like[s.name].shape), s.datatype) for s in specs}

    numbers = [filled(partial(_numbers, seed)) for seed in range(ROWS - 4)]
    first = golden or numbers.pop()
    loud = filled(lambda shape: LOUD * _numbers(ROWS, shape))
    return [first, loud, first, filled(np.zeros), filled(np.ones), *numbers][:ROWS]


def _golden_row(specs: Sequence[TensorSpec], samples: Sequence[Sample]) -> dict[str, Any] | None:
    """The first row of the first golden sample, if it is a batch of rows."""
    if not samples:
        return None
    inputs = samples[0].inputs
    if not all(spec.name in inputs and inputs[spec.name].ndim for spec in specs):
        return None
    if len({inputs[spec.name].shape[0] for spec in specs} - {0}) != 1:
        return None
    return {spec.name: inputs[spec.name][:1] for spec in specs}


def _numbers(seed: int, shape: tuple[int, ...]) -> Any:
    """Numbers of mean 0 and variance 1, the same for a seed everywhere.

    A hash of the place (the finaliser of MurmurHash3): numpy's generators take 15 ms to import.
    """
    bits = np.arange(1 + seed, 1 + seed + math.prod(shape) * ROWS, ROWS, dtype=np.uint32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        bits = (bits ^ (bits >> np.uint32(shift))) * np.uint32(factor)
    return ((bits / 2.0**31 - 1.0) * math.sqrt(3)).reshape(shape)


def _cast(values: Any, datatype: str) -> Any:
    """As the datatype has it; integers and booleans become 0 or 1, since they are often sizes."""
    dtype = DTYPES[datatype]
    if datatype == "BF16":
        return (values.astype("f4").view("u4") >> 16).astype("u2").reshape(values.shape)
    return values.astype(dtype) if dtype.kind == "f" else (values > 0).astype(dtype)
