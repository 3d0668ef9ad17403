"""Sizes that are not known yet: whole numbers times symbols, one of which is the number of rows.

A dimension, or a number that a graph computes from its shapes, is a product such as ``8·rows·step``. Products
can be multiplied, divided where nothing is left over, and compared: two that look alike are the same number
in every run. What is no product (a sum, say) gets a symbol of its own, the same one for the same expression.
Runs on Python 3.10 too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["ONE", "ROWS", "Names", "Size", "product"]

_ROWS = "rows"
_FRESH = "?"
"""Begins the names of symbols of which nothing is known; a number follows."""

_SIGNED = "±"
"""Begins the names of symbols that may be zero or negative: a difference, a quotient."""

SYMBOLS_MAX = 64
"""In one product: a size has as many factors as a tensor has dimensions, unless it was made to be slow."""


@dataclass(frozen=True)
class Size:
    """A product: a whole number times symbols, which are sorted."""

    factor: int
    symbols: tuple[str, ...] = ()

    @property
    def has_rows(self) -> bool:
        """Whether it changes with the number of rows."""
        return _ROWS in self.symbols

    @property
    def known(self) -> int | None:
        """The number, if it is the same in every run."""
        return self.factor if not self.symbols else None

    @property
    def positive(self) -> bool:
        """Whether it is certain to be above zero, given that no dimension is empty."""
        return self.factor > 0 and not any(name.startswith(_SIGNED) for name in self.symbols)

    def given_since(self, count: int) -> bool:
        """Whether it is a symbol that `Names.fresh` has given after so many others."""
        if self.factor != 1 or len(self.symbols) != 1 or not self.symbols[0].startswith(_FRESH):
            return False
        return int(self.symbols[0][len(_FRESH) :]) > count

    def __mul__(self, other: Size) -> Size:
        if self.factor == 0 or other.factor == 0:
            return Size(0)
        symbols = tuple(sorted((*self.symbols, *other.symbols)))
        if len(symbols) > SYMBOLS_MAX:
            raise ValueError("a size with too many factors")
        return Size(self.factor * other.factor, symbols)

    def over(self, other: Size) -> Size | None:
        """The quotient, where it is a whole number whatever the symbols stand for."""
        if other.factor == 0 or self.factor % other.factor:
            return None
        left = list(self.symbols)
        for name in other.symbols:
            if name not in left:
                return None
            left.remove(name)
        return Size(self.factor // other.factor, tuple(left))

    def __str__(self) -> str:
        if not self.symbols:
            return str(self.factor)
        return "·".join((*([] if self.factor == 1 else [str(self.factor)]), *self.symbols))


ONE = Size(1)
ROWS = Size(1, (_ROWS,))
"""The number of rows that share a run."""


def product(sizes: Iterable[Size]) -> Size:
    """Of all; `ONE` of none."""
    found = ONE
    for size in sizes:
        found *= size
    return found


class Names:
    """Gives symbols their names; one for each graph that is read."""

    def __init__(self) -> None:
        self.count = 0
        """Of symbols that `fresh` has given."""
        self._expressions: dict[tuple[str, Size, Size], Size] = {}

    def of_dimension(self, name: str) -> Size:
        """The symbol of a dimension that the file names."""
        return Size(1, (f"dim:{name}",))

    def fresh(self) -> Size:
        """A dimension of which nothing is known, not even whether it is one that was seen before."""
        self.count += 1
        return Size(1, (f"{_FRESH}{self.count}",))

    def of_expression(self, kind: str, a: Size, b: Size) -> Size:
        """The symbol of what is computed from two sizes; it may be zero or negative unless it is a sum."""
        key = (kind, a, b)
        found = self._expressions.get(key)
        if found is None:
            signed = "" if kind == "sum" and a.positive and b.positive else _SIGNED
            found = self._expressions[key] = Size(1, (f"{signed}{kind}{len(self._expressions)}",))
        return found
