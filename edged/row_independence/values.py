"""What is known of a tensor while a graph is read: its shape, and where the rows lie in it.

A tensor either is the same whatever the rows hold and however many there are (`axis` is None), or it has the
rows along one axis: its slice number i there depends on row i of the model's inputs and on nothing else. A
Reshape may have merged the axis with others: then its size is ``before · rows · after``, in the order of the
elements. A tensor of neither kind has no value here; a rule that would make one raises `Mixes`.

Small tensors that were computed from shapes carry their numbers, which may name the number of rows.
Runs on Python 3.10 too.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, replace

from edged.row_independence.sizes import ONE, ROWS, Names, Size, product

__all__ = ["Changes", "Mixes", "Numbering", "Value", "aligned", "fixed", "numbers_of", "reshaped", "rows_at"]

NUMBERS_MAX = 64
"""Numbers that are followed one by one: shapes have a few. What is longer is data."""

Numbers = tuple[Size | None, ...]
"""None is a number that is not known, and the same however many rows there are."""


class Mixes(Exception):
    """Rows do not stand alone here, or it cannot be shown that they do; the text says why."""

    whatever_it_reads = False
    """Whether that is so for constants too: what is random, or changes by being run."""


class Numbering(enum.Enum):
    """What a tensor knows of where its rows stand."""

    NONE = ""
    OWN = "own"
    """Each element is its row's number."""
    OWN_FIRST = "own first"
    """Of the numbers along the last axis the first is the row's own."""
    SOMEHOW = "somehow"
    """It was computed from that: only its shape may be used."""


class Changes(Mixes):
    """The same inputs give another answer each time, or each run changes the next."""

    whatever_it_reads = True


@dataclass(frozen=True)
class Value:
    """A tensor as far as it is known. `dims` is None where not even the rank is known."""

    dims: tuple[Size, ...] | None
    axis: int | None = None
    before: Size = ONE
    after: Size = ONE
    numbers: Numbers | None = None
    """In order, of a tensor of at most one dimension."""
    ones: tuple[bool, ...] | None = None
    """Which numbers of a constant of floats are exactly 1: scales, of which only that matters."""
    numbering: Numbering = Numbering.NONE
    rounded: bool = False
    """Whether it holds numbers that a runtime may round otherwise when it computes more rows at once."""
    source: str = ""
    """The model's input whose elements these are, unchanged and in whatever shape."""

    @property
    def rank(self) -> int:
        """The number of dimensions. Raises Mixes where it is not known."""
        if self.dims is None:
            raise Mixes("has an input of unknown rank")
        return len(self.dims)

    @property
    def counts_rows(self) -> bool:
        """Whether its numbers change with how many rows there are."""
        return self.numbers is not None and any(n is not None and n.has_rows for n in self.numbers)

    def size(self, axis: int) -> Size:
        """Of one dimension."""
        assert self.dims is not None
        return self.dims[axis]

    def counted(self, axis: int) -> int:
        """An axis counted from the front. Raises Mixes for one that the tensor does not have."""
        if not -self.rank <= axis < self.rank:
            raise Mixes(f"names axis {axis} of {self.rank}")
        return axis % self.rank

    def shaped(self, dims: Sequence[Size], axis: int | None = None) -> Value:
        """Another tensor with the rows laid the same way, along `axis` if they are in this one."""
        return replace(
            self,
            dims=tuple(dims),
            axis=None if self.axis is None else axis,
            numbers=None,
            ones=None,
            source="",
        )

    def like(self) -> Value:
        """Another tensor of this shape and with the rows at the same place."""
        return replace(self, numbers=None, ones=None, source="")


def rows_at(dims: Sequence[Size], axis: int) -> Value:
    """A tensor whose dimension `axis` counts the rows; what it has more than them lies inside of each."""
    after = dims[axis].over(ROWS)
    if after is None or after.has_rows or any(d.has_rows for at, d in enumerate(dims) if at != axis):
        raise Mixes("has a shape in which the rows cannot be told apart")
    return Value(tuple(dims), axis, ONE, after)


def fixed(value: Value | None, what: str) -> Value | None:
    """An input that must be the same for all rows. Raises Mixes where it is not."""
    if value is None:
        return None
    if value.axis is not None:
        raise Mixes(f"takes its {what} from the rows")
    if value.counts_rows:
        raise Mixes(f"takes its {what} from how many rows there are")
    return value


def numbers_of(value: Value | None, what: str) -> tuple[int, ...] | None:
    """The known whole numbers of an input; None where it is left out.

    Raises Mixes where they are not the same in every run.
    """
    if fixed(value, what) is None or value is None:
        return None
    known = [] if value.numbers is None else [n.known for n in value.numbers if n is not None]
    if value.numbers is None or len(known) != len(value.numbers) or None in known:
        raise Mixes(f"has a {what} that is not known before it runs")
    return tuple(n for n in known if n is not None)


def aligned(values: Sequence[Value], names: Names) -> Value:
    """What an operator gives that works element by element, with its inputs broadcast (numpy's rules)."""
    with_rows = [v for v in values if v.axis is not None]
    if not with_rows and any(v.dims is None for v in values):
        return Value(None)
    rank = max(v.rank for v in values)
    dims = [
        _broadcast([v.size(at) for v in values if (at := v.rank - back) >= 0], names)
        for back in range(rank, 0, -1)
    ]
    if not with_rows:
        return Value(tuple(dims))
    first = with_rows[0]
    assert first.axis is not None
    back = first.rank - first.axis
    for v in values:
        at = v.rank - back
        if v.axis is None:
            if at >= 0 and v.size(at) != ONE:
                raise Mixes(f"puts the rows beside a constant that has {v.size(at)} there")
        elif at != v.axis:
            raise Mixes("puts the rows of one input beside another axis of the other")
        elif (v.before, v.after) != (first.before, first.after):
            raise Mixes("puts rows beside each other that lie in different orders")
    axis = rank - back
    dims[axis] = first.size(first.axis)
    return Value(tuple(dims), axis, first.before, first.after)


def _broadcast(sizes: Sequence[Size], names: Names) -> Size:
    found = {size for size in sizes if size != ONE}
    if not found:
        return ONE
    if len(found) == 1:
        return found.pop()
    known = {size for size in found if size.known is not None}
    return known.pop() if len(known) == 1 else names.fresh()


def reshaped(value: Value, dims: Sequence[Size]) -> Value:
    """The same elements in the same order in another shape.

    Raises Mixes where a row's elements do not stay together: the rows must have before them and after them
    what they had.
    """
    if value.axis is None:
        if any(d.has_rows for d in dims):
            raise Mixes("gives a constant the shape of the rows")
        return Value(tuple(dims), numbers=value.numbers if len(dims) < 2 else None, source=value.source)
    assert value.dims is not None
    outer = product(value.dims[: value.axis]) * value.before
    for axis, size in enumerate(dims):
        if not size.has_rows:
            continue
        # What stands before the rows must be what did. Then so must what stands behind, or there are not as
        # many elements, which a runtime refuses however many rows there are.
        before = outer.over(product(dims[:axis]))
        after = None if before is None else size.over(before * ROWS)
        if before is None or after is None or after.has_rows:
            break
        return replace(value, dims=tuple(dims), axis=axis, before=before, after=after, numbers=None)
    if not any(size.has_rows for size in dims):
        raise Mixes("has a new shape that is the same however many rows there are")
    raise Mixes("cuts rows apart, or lays them between each other's elements")
