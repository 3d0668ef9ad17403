"""The rows that a model is tried on, to see that none changes another's answer.

Made up so that what couples rows shows: ordinary numbers, a row a hundred times as large and one a
thousandth, some with NaN and infinities at a few places or many, zeros, ones, and one row twice, for a model
whose output depends on the data (NonZero, Unique) has as many rows as there are numbers in a random input,
but not then. Integers are spread as far as the model takes them: what scales by the largest of a batch, or
counts to it, does not show with zeros and ones. Free dimensions have sizes above 1, at least two different
ones: a view that mistakes one axis for another is right with 1.

Owns the making. Pure but for numpy; runs on Python 3.10 too.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from edged.agreement import NoInputs, Sample
from edged.runtimes.base import DTYPES
from edged.tensors import TensorSpec

__all__ = ["SIZES", "SPREADS", "STEP_NAN", "Kind", "Row", "Sizes", "golden_rows", "make_rows", "sizes_to_try"]


class Kind(enum.Enum):
    """What a row is; those of one kind are looked at by themselves, since loud numbers drown others."""

    PLAIN = "plain"
    LOUD = "loud"
    QUIET = "quiet"
    FAINT = "faint"
    NAN = "nan"


LOUD, QUIET, FAINT = 100.0, 1e-3, 1e-6
"""How much larger, or smaller, the numbers of a row are. What is scaled by the largest number of a whole
batch, as models are that quantise as they go, takes the others' digits away beside the loud one; the small
ones show what is rounded by a step that is the same for all numbers."""

STEP_NAN = 4
"""How many rows the first of NaN is behind the first."""

SPREADS = (1 << 20, 30_000, 1_000, 100, 1)
"""How far integers go, the first that the model takes: numbers that are only computed with, tokens of a large
vocabulary and of a small one, labels, flags. Bytes go as far as they can."""

SIZES = ((3, 5, 4), (5, 4, 7), (32, 64), (64, 32), (32,), (64,), (8,), (16,), (128,), (224,))
"""For the free dimensions in order, over and over; the first that the model takes. Small ones cost little;
networks of convolutions want multiples of 32, some want all alike."""

ELEMENTS_MAX = 1 << 24
"""Of the inputs of one made-up row: a dozen of them are held at once."""

SEEDS = 10
"""Of numbers that differ."""

Sizes = Mapping[str, tuple[int, ...]]
"""A row's shape by input, the first dimension left out."""

Row = dict[str, Any]


def sizes_to_try(
    specs: Sequence[TensorSpec], golden: Sequence[Row], likely: Sequence[Sizes]
) -> Iterator[tuple[Sizes, Row | None]]:
    """Shapes of a row that differ: those of golden rows, each with its row, likely ones, and made-up ones."""
    seen = set()
    own = [({spec.name: tuple(row[spec.name].shape[1:]) for spec in specs}, row) for row in golden]
    made_up = [*likely, *(_sizes(specs, choice) for choice in SIZES)]
    for sizes, row in (*own, *((each, None) for each in made_up)):
        key = tuple(sizes.values())
        if key not in seen:
            seen.add(key)
            yield sizes, row


def _sizes(specs: Sequence[TensorSpec], choice: Sequence[int]) -> Sizes:
    """Dimensions of one name have one size; those without are alike where they stand at the same place."""
    known: dict[str | int, int] = {}
    found = {}
    for spec in specs:
        sizes = []
        for axis, size in enumerate(spec.shape or ()):
            if axis == 0:
                continue
            if size >= 0:
                sizes.append(size)
                continue
            name = spec.dim_names[axis] if spec.dim_names else None
            key: str | int = name or axis
            sizes.append(known.setdefault(key, choice[len(known) % len(choice)]))
        found[spec.name] = tuple(sizes)
    return found


def golden_rows(specs: Sequence[TensorSpec], samples: Sequence[Sample]) -> list[Row]:
    """The first row of each golden sample that is a batch of rows."""
    found = []
    for sample in samples:
        inputs = sample.inputs
        if not all(spec.name in inputs and inputs[spec.name].ndim for spec in specs):
            continue
        if len({inputs[spec.name].shape[0] for spec in specs} - {0}) == 1:
            found.append({spec.name: inputs[spec.name][:1] for spec in specs})
    return found


def make_rows(
    specs: Sequence[TensorSpec],
    sizes: Sizes,
    *,
    spread: int,
    limits: Mapping[str, int],
    finite: bool,
    first: Row | None = None,
) -> list[tuple[Kind, Row]]:
    """Single rows of these sizes; integers up to `spread`, or as far as a table goes that they index.

    `finite`: none is NaN or infinite. `first` takes part as it is. Raises NoInputs for a model that cannot be
    fed.
    """
    count = sum(math.prod(sizes[spec.name]) for spec in specs)
    if count > ELEMENTS_MAX:
        raise NoInputs(f"a row has {count} elements, too many to make up")

    def filled(make: Callable[[tuple[int, ...]], Any], whole: Callable[[tuple[int, ...], int], Any]) -> Row:
        row = {}
        for spec in specs:
            shape = (1, *sizes[spec.name])
            dtype = DTYPES[spec.datatype]
            if spec.datatype == "BF16" or dtype.kind == "f":
                row[spec.name] = _as_floats(make(shape), spec.datatype)
            else:
                most = min(spread, limits.get(spec.name, spread + 1) - 1, _largest(dtype))
                row[spec.name] = whole(shape, most).astype(dtype)
        return row

    def numbers(seed: int, factor: float = 1.0) -> Row:
        return filled(lambda shape: factor * _numbers(seed, shape), partial(_integers, seed))

    def odd(seed: int, *values: float, step: int, last: bool = False) -> tuple[Kind, Row]:
        if finite:
            return Kind.PLAIN, numbers(seed)
        make = partial(_odd, seed, values, step, last)
        return Kind.NAN, filled(make, partial(_integers, seed))

    first = first or numbers(0)
    loud = filled(lambda shape: LOUD * _numbers(9, shape), lambda shape, most: np.full(shape, most))
    quiet = filled(lambda shape: QUIET * _numbers(8, shape), lambda shape, most: np.full(shape, min(2, most)))
    zeros = filled(np.zeros, lambda shape, most: np.zeros(shape, np.int64))
    ones = filled(np.ones, lambda shape, most: np.full(shape, min(1, most)))
    return [
        (Kind.PLAIN, first),
        (Kind.LOUD, loud),
        (Kind.PLAIN, first),
        (Kind.QUIET, quiet),
        odd(5, np.nan, step=2),
        (Kind.PLAIN, zeros),
        odd(6, np.nan, step=0),
        (Kind.PLAIN, numbers(1)),
        odd(7, np.nan, step=0, last=True),
        (Kind.PLAIN, ones),
        odd(4, np.inf, -np.inf, step=3),
        (Kind.PLAIN, numbers(2)),
        (Kind.FAINT, numbers(3, FAINT)),
    ]


def _largest(dtype: np.dtype[Any]) -> int:
    return 1 if dtype.kind == "b" else int(np.iinfo(dtype).max)


def _odd(seed: int, values: Sequence[float], step: int, last: bool, shape: tuple[int, ...]) -> Any:
    """Ordinary numbers, but for the first, or the last, and every so many on from there."""
    numbers = _numbers(seed, shape)
    flat = numbers.reshape(-1)
    places = np.arange(0, flat.size, step or max(1, flat.size))
    flat[flat.size - 1 - places if last else places] = np.resize(values, places.size)
    return numbers


def _integers(seed: int, shape: tuple[int, ...], most: int) -> Any:
    """From 0 to `most`, both among them where there is room."""
    bits = _bits(seed, shape).astype(np.int64)
    values = bits % (most + 1)
    flat = values.reshape(-1)
    if flat.size > 2:
        flat[seed % flat.size], flat[(seed + 1) % flat.size] = most, 0
    return values


def _numbers(seed: int, shape: tuple[int, ...]) -> Any:
    """Numbers of mean 0 and variance 1, the same for a seed everywhere."""
    return (_bits(seed, shape) / 2.0**31 - 1.0) * math.sqrt(3)


def _bits(seed: int, shape: tuple[int, ...]) -> Any:
    """A hash of the place (the finaliser of MurmurHash3): numpy's generators take 15 ms to import."""
    bits = np.arange(1 + seed, 1 + seed + math.prod(shape) * SEEDS, SEEDS, dtype=np.uint32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        bits = (bits ^ (bits >> np.uint32(shift))) * np.uint32(factor)
    return bits.reshape(shape)


def _as_floats(values: Any, datatype: str) -> Any:
    if datatype == "BF16":
        return (values.astype("f4").view("u4") >> 16).astype("u2").reshape(values.shape)
    return values.astype(DTYPES[datatype])
