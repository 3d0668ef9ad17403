"""Whether rows of different requests may share a run, and up to how many it is worth it.

Two requests may only be put together if neither can change the other's answer. Two locks hold that. The
graph must say that rows stand alone (`row_independence`), or the model's owner. And the model itself must
answer rows alone as it does together: at every size that the scheduler may use, in several orders, with the
rows of `trial_rows`. Integers, booleans and the places of NaN must be equal; floats may differ by what the
runtime's own rounding gives when it multiplies more rows at once (`ROUNDING`), unless the owner wants them
bit for bit.

Owns the measured proof and the times that it takes along. It loads nothing and decides nothing for the core,
which looks at every batch's outputs once more. Runs on Python 3.10 too.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edged import agreement, trial_rows
from edged.agreement import Sample
from edged.row_independence import Reading
from edged.runtimes.base import Model, RunFailed
from edged.tensors import ITEM_BYTES
from edged.trial_rows import STEP_NAN, Kind, Row, Sizes

__all__ = ["Batch", "NotBatchable", "Rules", "explore", "run_us"]

SIZES = (2, 4, 8, 16, 32, 64)
"""What is tried without being asked: 64 requests that wait at once are rare on a device."""

BUDGET_S = 0.4
"""What trying may take at each load, unless the owner asks for a size of his own."""

BETWEEN_S, BETWEEN_WANTED_S = 0.3, 5.0
"""What proving the sizes between those that were tried may take besides: a load is longer by less than a
second; for an owner's own size by what he can be asked to wait for."""

GAIN_MIN = 1.1
"""Rows per second over those of the size before; less is not worth the longer wait of each request."""

ROWS_MIN = 5
"""Rows that take part where one run takes long: an ordinary one, twice, the loud, the quiet, one of NaN."""

SLOT_S, RUNS_MAX = 0.01, 50
"""How long, and how often, a size is timed."""

STEPS = (1, STEP_NAN, -1)
"""The orders of a size, as steps through the rows: all of them, one beside NaN, all the other way round."""

RUNS_PER_SIZE = 4
"""What a size costs at the least, where rows gain nothing together: three orders and one timed run."""

BYTES_MAX = 64 << 20
"""Of one batch's inputs and outputs; beyond it memory's speed is the limit and rows gain nothing together."""

ROUNDING = {"f32": 2e-5, "tf32": 2**-9, "f16": 2**-9, "bf16": 2**-7}
"""By the precision that a model is computed in: what two orders of the same additions may differ by, as a
part of the output's largest number. A product of two computed matrices, at another number of rows, comes to
2e-5 in FP32; the others are two units in the last place."""

_ROUNDING_OF_TYPE = {"FP16": 2**-9, "BF16": 2**-7}
"""By an output's datatype: the last place of what it is written in."""

FORM = 2
"""Counts up when more has to be proved than what is remembered was."""


class NotBatchable(Exception):
    """Rows do not stand alone; the text says which node or tensor shows it."""


@dataclass(frozen=True)
class Rules:
    """What the owner says of a model's rows, and what is known from its graph."""

    reading: Reading
    vouched: bool = False
    """The owner's word stands for both locks (`rows = "independent"`)."""
    exact: bool = False
    """Floats must be equal bit for bit."""
    finite: bool = False
    """NaN never comes, by the owner's word, and so takes no part."""


@dataclass(frozen=True)
class Batch:
    """`max` rows of different requests may share a run, 1 for none; `times_us`: (rows, µs), as tried."""

    max: int
    times_us: tuple[tuple[int, float], ...]
    why: str

    @classmethod
    def from_wire(cls, wire: object) -> Batch | None:
        """As the supervisor remembers it; None for what is no result of `explore`, or of an older rule's."""
        if not isinstance(wire, Mapping) or wire.get("form") != FORM:
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
        return {"max": self.max, "times_us": [list(t) for t in self.times_us], "why": self.why, "form": FORM}


def explore(
    model: Model,
    samples: Sequence[Sample],
    *,
    rules: Rules,
    wanted: int | None,
    likely: Sequence[Sizes] = (),
    check: Callable[[], None] = lambda: None,
) -> Batch:
    """Proves and times batches of a model that is loaded; `check` is called between runs and may raise.

    `likely`: sizes of a row that requests have, the first of which is timed if there is no golden sample.
    With `wanted`, the owner's size, this size is proved whatever it takes and allowed whatever it gains.
    Raises NotBatchable for rows that do not stand alone, RunFailed for a run that failed.
    """
    obstacle = _obstacle(model) or ("" if rules.vouched else rules.reading.why)
    if obstacle:
        raise NotBatchable(obstacle)
    began_s = time.monotonic()
    trial = _Trial(model, samples, rules, check)
    trial.run_alone(likely, began_s + BUDGET_S / 4, math.inf if wanted else began_s + BUDGET_S)
    trial.time(1)
    best, why = _largest_that_gains(trial, wanted, began_s + BUDGET_S)
    proved = trial.prove_between(best, time.monotonic() + (BETWEEN_S if wanted is None else BETWEEN_WANTED_S))
    if proved < best:
        why = f"more rows than {proved} could not be proved at every size in the time there is"
    return trial.verdict(proved, why)


def _largest_that_gains(trial: _Trial, wanted: int | None, until_s: float) -> tuple[int, str]:
    best = 1
    for size in _sizes(wanted):
        left_us = (until_s - time.monotonic()) * 1e6
        if size != wanted and RUNS_PER_SIZE * trial.variants * size * trial.row_us(best) > left_us:
            if wanted is None:
                return best, f"{size} rows together take longer than trying may"
            continue
        if wanted is None and size * trial.row_bytes > BYTES_MAX:
            return best, f"{size} rows together take more memory than trying may"
        try:
            trial.prove(size)
            trial.time(size)
        except RunFailed as e:
            if wanted is not None or e.fatal or e.reason != "MEMORY_LIMIT":
                raise
            return best, f"{size} rows together: {e.message}"
        if wanted is None and trial.row_us(best) / trial.row_us(size) < GAIN_MIN:
            for again in (best, size):  # what else runs on the machine must not decide
                trial.time(again)
            gain = trial.row_us(best) / trial.row_us(size)
            if gain < GAIN_MIN:
                return best, f"{size} rows together: {gain:.2f} × the rows/s of {best}"
        best = size
    return best, "the largest size that is tried" if wanted is None else "the size that the settings name"


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


@dataclass
class _Variant:
    """Rows of one shape, and what each is answered with alone."""

    rows: list[tuple[Kind, Row]]
    alone: list[list[Any]]

    @property
    def is_constant(self) -> bool:
        """Whether all rows of numbers are answered alike."""
        finite = [a for (kind, _), a in zip(self.rows, self.alone) if kind is not Kind.NAN]  # noqa: B905 - as many
        return agreement.is_constant(finite)

    def joined(self, order: Sequence[int]) -> Row:
        """Rows one behind the other."""
        rows = [self.rows[at][1] for at in order]
        return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}

    def groups(self, order: Sequence[int]) -> Iterator[list[int]]:
        """The places of a batch by the kind of row that stands there."""
        for kind in Kind:
            group = [place for place, at in enumerate(order) if self.rows[at][0] is kind]
            if group:
                yield group


class _Trial:
    """The rows, and what the sizes took. The first variant's are those that are timed."""

    def __init__(
        self, model: Model, samples: Sequence[Sample], rules: Rules, check: Callable[[], None]
    ) -> None:
        self.row_bytes = 0
        """Of one row's inputs and outputs."""
        self._model = model
        self._samples = samples
        self._rules = rules
        self._check = check
        self._names = [spec.name for spec in model.outputs]
        self._datatypes = [spec.datatype for spec in model.outputs]
        self._variants: list[_Variant] = []
        self._proved: set[int] = {1}
        self._least_us: dict[int, float] = {}
        self._median_us: dict[int, float] = {}
        self._apart = 0.0
        """The largest difference of floats so far, as a part of the output's largest number."""
        self._saw = ""
        """What spoke against the owner's word."""

    @property
    def variants(self) -> int:
        """How many shapes of rows take part."""
        return len(self._variants)

    # ------------------------------------------------------------------ rows alone

    def run_alone(self, likely: Sequence[Sizes], until_s: float, last_s: float) -> None:
        """Finds shapes and numbers that the model takes, and runs the rows one by one.

        More rows than the least number only until `until_s`. Raises NotBatchable where it takes no shapes,
        where a single row takes so long that the others would not be done by `last_s`, or where the answers
        prove nothing.
        """
        specs = self._model.inputs
        free = any(size < 0 for spec in specs for size in (spec.shape or ())[1:])
        wanted = 2 if free else 1
        golden = trial_rows.golden_rows(specs, self._samples)
        refused: RunFailed | None = None
        for sizes, first in trial_rows.sizes_to_try(specs, golden, likely):
            if time.monotonic() > last_s:
                raise NotBatchable("looking for sizes that the model takes lasts too long")
            try:
                self._variants.append(self._variant(sizes, first, until_s, last_s))
            except RunFailed as e:
                if e.fatal:
                    raise
                refused = e
            if len(self._variants) == wanted:
                break
        if not self._variants and refused is not None:
            raise refused
        if len(self._variants) < wanted and not self._rules.vouched:
            raise NotBatchable(
                "its free dimensions must be tried at two sizes, and so many were not found that the model "
                "takes; golden samples of two sizes would show them"
            )
        answers = self._variants[0].alone
        self.row_bytes = sum(array.nbytes for array in self._variants[0].rows[0][1].values())
        self.row_bytes += sum(value.nbytes for value in answers[0])
        if not self._rules.vouched and any(each.is_constant for each in self._variants):
            raise NotBatchable("the model answers the same to every input, which proves nothing")

    def _variant(self, sizes: Sizes, first: Row | None, until_s: float, last_s: float) -> _Variant:
        """Rows of these sizes, integers as far as the model takes them. Raises RunFailed if it takes none."""
        refused: RunFailed | None = None
        for spread in trial_rows.SPREADS if self._has_integers else trial_rows.SPREADS[:1]:
            rows = trial_rows.make_rows(
                self._model.inputs,
                sizes,
                spread=spread,
                limits=self._rules.reading.limits,
                finite=self._rules.finite,
                first=first,
            )
            try:
                return self._answered(rows, until_s, last_s)
            except RunFailed as e:
                if e.fatal:
                    raise
                refused = e
        assert refused is not None
        raise refused

    def _answered(self, rows: list[tuple[Kind, Row]], until_s: float, last_s: float) -> _Variant:
        alone: list[list[Any]] = []
        began_s = time.monotonic()
        for at, (kind, row) in enumerate(rows):
            if len(alone) >= ROWS_MIN and time.monotonic() > until_s:
                break
            self._check()
            if at == 1 and (now_s := time.monotonic()) + (ROWS_MIN - 1) * (now_s - began_s) > last_s:
                raise NotBatchable(f"a row takes {(now_s - began_s) * 1e3:.0f} ms, so trying takes too long")
            try:
                alone.append(self._answer(row, 1))
            except RunFailed as e:
                # Such numbers are none that the model takes; integers may only be too large.
                if kind is Kind.PLAIN or e.fatal or self._has_integers:
                    raise
                rows[at] = rows[0]
                alone.append(alone[0])
        return _Variant(rows[: len(alone)], alone)

    @property
    def _has_integers(self) -> bool:
        return not all(spec.datatype in ("FP16", "BF16", "FP32", "FP64") for spec in self._model.inputs)

    # ------------------------------------------------------------------ rows together

    def prove(self, size: int) -> None:
        """Runs `size` rows together, in each order; each must be answered as it is alone."""
        for variant in self._variants:
            for step in STEPS:
                self._prove(variant, size, step)
        self._proved.add(size)

    def prove_between(self, best: int, until_s: float) -> int:
        """Proves the sizes up to `best` that were not tried; up to which all are, by then."""
        for size in range(2, best + 1):
            if size in self._proved:
                continue
            if time.monotonic() > until_s:
                return size - 1
            for at, variant in enumerate(self._variants):
                self._prove(variant, size, 1 if (size + at) % 2 else -1)
        return best

    def _prove(self, variant: _Variant, size: int, step: int) -> None:
        self._check()
        order = [(place * step) % len(variant.rows) for place in range(size)]
        together = self._answer(variant.joined(order), size)
        for at, (name, datatype) in enumerate(zip(self._names, self._datatypes)):  # noqa: B905 - one each
            for group in variant.groups(order):
                alone = np.concatenate([variant.alone[order[place]][at] for place in group])
                why = self._difference(alone, together[at][group], datatype)
                if not why:
                    continue
                why = f"output '{name}' of a row among {size} is not as it is alone: {why}"
                if not self._rules.vouched:
                    raise NotBatchable(why)
                self._saw = self._saw or why

    def _difference(self, alone: Any, together: Any, datatype: str) -> str:
        """Why these are not the same answer; empty where they are."""
        if alone.shape != together.shape or alone.dtype != together.dtype:
            return f"{together.dtype} {list(together.shape)} for {alone.dtype} {list(alone.shape)}"
        if alone.tobytes() == together.tobytes():
            return ""
        if datatype == "BF16":
            alone, together = ((x.astype("u4") << 16).view("f4") for x in (alone, together))
        if alone.dtype.kind != "f":
            wrong = np.count_nonzero(alone != together)
            return f"{wrong} of {alone.size} elements differ"
        if self._rules.exact:
            return f"not bit for bit, by up to {_apart(alone, together)[1]:.1g}, which exact = true asks for"
        same_places, apart, largest = _apart(alone, together)
        if not same_places:
            return "NaN or infinities in other places"
        allowed = max(
            ROUNDING.get(self._model.precision, ROUNDING["f32"]), _ROUNDING_OF_TYPE.get(datatype, 0.0)
        )
        if apart > allowed * largest:
            return f"a difference of {apart:.3g}, at most {allowed * largest:.3g} may be"
        self._apart = max(self._apart, apart / largest)
        return ""

    def time(self, size: int) -> None:
        """Finds what a batch of this size takes."""
        self._check()
        variant = self._variants[0]
        feeds = variant.joined([place % len(variant.rows) for place in range(size)])
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
            self._model.run(self._variants[0].rows[0][1], self._names)
        if self._rules.vouched:
            why += "; rows stand alone by the owner's word"
            why += f", though {self._saw}" if self._saw else ""
        elif self._apart:
            why += f"; floats differ by up to {self._apart:.1g} of the largest from what they are alone"
        times = tuple((n, round(us, 1)) for n, us in self._median_us.items() if n <= rows or n in SIZES)
        return Batch(rows, times, why)

    def _answer(self, feeds: Mapping[str, Any], rows: int) -> list[Any]:
        values = self._model.run(feeds, self._names)
        for name, value in zip(self._names, values):  # noqa: B905 - one for each name
            if not isinstance(value, np.ndarray) or not value.shape or value.shape[0] != rows:
                shape = list(value.shape) if isinstance(value, np.ndarray) else None
                raise NotBatchable(f"output '{name}' of {rows} rows has the shape {shape}")
        return values


def _apart(alone: Any, together: Any) -> tuple[bool, float, float]:
    """Whether NaN and infinities are at the same places; the largest difference; the largest number."""
    a, b = alone.astype("f8"), together.astype("f8")
    odd = ~np.isfinite(a) | ~np.isfinite(b)
    same = bool(np.array_equal(a[odd], b[odd], equal_nan=True))
    a, b = a[~odd], b[~odd]
    if a.size == 0:
        return same, 0.0, 1.0
    largest = float(np.abs(a).max())
    return same, float(np.abs(a - b).max()), largest or 1.0


def _sizes(wanted: int | None) -> list[int]:
    return list(SIZES) if wanted is None else [*[size for size in SIZES if size < wanted], wanted]


def _obstacle(model: Model) -> str:
    """What in the declared shapes and types forbids batches; empty when nothing does."""
    for kind, specs in (("input", model.inputs), ("output", model.outputs)):
        for spec in specs:
            if spec.datatype not in ITEM_BYTES:
                return f"{kind} '{spec.name}' is {spec.datatype}, whose size is not fixed"
            if not spec.shape or spec.shape[0] != -1:
                return f"{kind} '{spec.name}' has no free first dimension"
    return "" if model.inputs and model.outputs else "there is nothing to put together"
