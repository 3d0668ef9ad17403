"""The sizes that a model's inputs really have, as far as its free dimensions leave them open.

Pure, and for both sides: the supervisor counts the shapes that answered requests had; workers and edgectl get
the most frequent ones, so that a model is measured on what it is used for. `typical` has what to take before
anybody has asked.

The table is small, and one client cannot fill it alone. A size that is in it is counted. A new size takes a
free place. If there is none it takes one count off the weakest size, and its place once that count is zero.
So a client that sends a new size each time holds a single place and displaces no other, and a size is pushed
out only by one that is asked for as often. One uid brings at most half of the sizes; beyond that its new ones
compete with its own. When one size has been counted `COUNT_MAX` times all counts are halved, so old habits
fade. Runs on Python 3.10 too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from edged.tensors import TensorSpec, shape_text

__all__ = [
    "LEAST",
    "MEASURED_MAX",
    "SOURCES",
    "Shapes",
    "SizeTable",
    "are_shapes",
    "fit",
    "have_free",
    "is_record",
    "is_size",
    "shapes_text",
    "size_text",
    "told",
]

Shapes = dict[str, tuple[int, ...]]
"""A shape for each input of a request, by its name."""

PLACES = 8
"""Sizes of one model that are counted: an app has one or two, several apps a few."""

PLACES_OF_ONE = PLACES // 2
"""Of those, how many one user may have brought."""

COUNT_MAX = 1 << 16
"""At which all counts are halved."""

DIMENSIONS_MAX = 512
"""Of all inputs of one size; it bounds what is kept and sent. A model with more is not counted."""

MEASURED_MAX = 3
"""Sizes that a measurement is handed: each costs runs, and the fourth is asked for rarely."""

SAVE_S = 600.0
"""Between two writes of one table, which cost the disk an fsync each."""

LEAST = "least"

SOURCES = {
    "owner": "as it was asked for",
    "golden": "as a golden sample has it",
    "requests": "as most requests had it",
    "typical": "typical of such inputs, for want of requests and golden samples",
    "declared": "as the model declares it",
    LEAST: "with free dimensions of 1, which decides nothing",
}
"""Where a size comes from, and how that is said."""

_NAMED_MAX = 4
"""Inputs that a sentence names."""

_DIMENSION_MAX = 1 << 40
"""Beyond this no dimension is one; as in `tensors`."""


class _Tensor(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> Sequence[int]: ...


_Key = tuple[tuple[Any, ...], ...]
"""(name, dimension, …) of each input, in the order in which they came."""


class SizeTable:
    """The sizes of one model's answered requests, with how often each came."""

    __slots__ = ("_next_save_s", "_places", "_saved", "_saved_count")

    def __init__(self) -> None:
        self._places: dict[_Key, list[int]] = {}
        """[count, uid that brought it] of each size."""
        self._saved: list[_Key] = []
        self._saved_count = 0
        self._next_save_s = -math.inf

    def __len__(self) -> int:
        return len(self._places)

    def note(self, inputs: Sequence[_Tensor], uid: int) -> None:
        """Counts the size of a request that was answered. The only call here on a request's way."""
        key = tuple([(tensor.name, *tensor.shape) for tensor in inputs])
        place = self._places.get(key)
        if place is None:
            self._bring(key, uid)
            return
        place[0] += 1
        if place[0] >= COUNT_MAX:
            self._fade()

    def _bring(self, key: _Key, uid: int) -> None:
        """A size that is not in the table: one loop, since a client may send a new one each time."""
        dimensions = 0
        for each in key:
            dimensions += len(each)
            if 0 in each:
                return  # nothing to measure
        if dimensions > DIMENSIONS_MAX:
            return
        own, weakest, weakest_own = 0, None, None
        places = self._places
        for place in places.values():
            if weakest is None or place[0] < weakest[0]:
                weakest = place
            if place[1] == uid:
                own += 1
                if weakest_own is None or place[0] < weakest_own[0]:
                    weakest_own = place
        rival = weakest if len(places) >= PLACES else None
        if own >= PLACES_OF_ONE:
            rival = weakest_own
        if rival is not None:
            rival[0] -= 1
            if rival[0]:
                return
            del places[next(each for each, place in places.items() if place is rival)]
        places[key] = [1, uid]

    def _fade(self) -> None:
        self._places = {key: [count // 2, uid] for key, (count, uid) in self._places.items() if count > 1}

    def _ranked(self) -> list[_Key]:
        return sorted(self._places, key=lambda key: -self._places[key][0])

    @property
    def count(self) -> int:
        """How many requests stand behind it, as far as they have not faded."""
        return sum([count for count, _ in self._places.values()])

    def ranked(self) -> list[tuple[Shapes, int]]:
        """The sizes and their counts, the most frequent first."""
        return [({name: tuple(dims) for name, *dims in k}, self._places[k][0]) for k in self._ranked()]

    def most(self) -> list[dict[str, list[int]]]:
        """The most frequent sizes, as a measurement is handed them."""
        return [{n: list(s) for n, s in shapes.items()} for shapes, _ in self.ranked()[:MEASURED_MAX]]

    def keep_fitting(self, specs: Mapping[str, TensorSpec]) -> None:
        """Drops the sizes that a model with these inputs does not take: they were another content's."""
        self._places = {
            key: place
            for key, place in self._places.items()
            if fit({name: dims for name, *dims in key}, specs.values())
        }

    def copied(self) -> SizeTable:
        """One of its own for another content, which begins with the same sizes."""
        new = SizeTable()
        new._places = {key: list(place) for key, place in self._places.items()}
        return new

    # ------------------------------------------------------------------ the book

    def to_save(self, now_s: float, *, last: bool = False) -> list[dict[str, Any]] | None:
        """What to write now; None while the next start would learn little that is new from it.

        A write is due when the order has changed or the counts have doubled, `SAVE_S` after the last one;
        with `last`, at once.
        """
        if not self._places or (now_s < self._next_save_s and not last):
            return None
        ranked, count = self._ranked(), self.count
        if ranked == self._saved and count < 2 * self._saved_count:
            return None
        self._saved, self._saved_count, self._next_save_s = ranked, count, now_s + SAVE_S
        return [
            {
                "shapes": {name: list(dims) for name, *dims in key},
                "count": self._places[key][0],
                "uid": self._places[key][1],
            }
            for key in ranked
        ]

    @classmethod
    def from_wire(cls, wire: object) -> SizeTable:
        """From a book that this or another version of edged wrote; what is no record is left out."""
        table = cls()
        for record in wire if isinstance(wire, list) else []:
            if is_record(record) and len(table._places) < PLACES:
                key = tuple((name, *dims) for name, dims in record["shapes"].items())
                table._places[key] = [record["count"], record["uid"]]
        table._saved, table._saved_count = table._ranked(), table.count
        return table


def is_record(wire: object) -> bool:
    """Whether this is one size as `to_save` writes it."""
    return (
        isinstance(wire, Mapping)
        and are_shapes(wire.get("shapes"))
        and all(dim >= 1 for dims in wire["shapes"].values() for dim in dims)
        and type(wire.get("count")) is int
        and 1 <= wire["count"] <= COUNT_MAX
        and type(wire.get("uid")) is int
    )


def are_shapes(wire: object) -> bool:
    """Whether this names a shape for each of some inputs, within the bounds of what is kept."""
    return (
        isinstance(wire, Mapping)
        and all(type(name) is str and type(dims) in (list, tuple) for name, dims in wire.items())
        and all(type(d) is int and 0 <= d <= _DIMENSION_MAX for dims in wire.values() for d in dims)
        and sum(1 + len(dims) for dims in wire.values()) <= DIMENSIONS_MAX
    )


def is_size(wire: object) -> bool:
    """Whether this is a size as a measurement tells it: `{source, shapes, note}`."""
    return (
        isinstance(wire, Mapping)
        and type(wire.get("source")) is str
        and wire["source"] in SOURCES
        and are_shapes(wire.get("shapes"))
        and type(wire.get("note")) is str
    )


def told(shapes: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """As many of these shapes as may be kept and sent, the first ones."""
    found: dict[str, list[int]] = {}
    left = DIMENSIONS_MAX
    for name, dims in shapes.items():
        left -= 1 + len(dims)
        if left < 0:
            break
        found[name] = list(dims)
    return found


def have_free(specs: Iterable[TensorSpec]) -> bool:
    """Whether the model leaves any size open."""
    return any(spec.shape is None or any(dim < 0 for dim in spec.shape) for spec in specs)


def fit(shapes: Mapping[str, Sequence[int]], specs: Iterable[TensorSpec]) -> bool:
    """Whether a request of these shapes would be admitted: no input missing, and none but the model's."""
    known = {spec.name: spec for spec in specs}
    return all(name in known and _fits(dims, known[name].shape) for name, dims in shapes.items()) and all(
        spec.optional or spec.name in shapes for spec in known.values()
    )


def _fits(have: Sequence[int], want: Sequence[int] | None) -> bool:
    if want is None:
        return True
    return len(have) == len(want) and all(w in (-1, h) for h, w in zip(have, want))  # noqa: B905 - lengths compared


def shapes_text(shapes: Mapping[str, Sequence[int]]) -> str:
    """`image [1,3,640,640], scale [1]`."""
    if not shapes:
        return "no inputs"
    named = [f"{name} {shape_text(dims)}" for name, dims in list(shapes.items())[:_NAMED_MAX]]
    more = len(shapes) - len(named)
    return ", ".join(named) + (f" and {more} more" if more else "")


def size_text(size: Mapping[str, Any]) -> str:
    """What a measurement's size and its source are, in one phrase for people."""
    source = str(size.get("source"))
    text = f"{shapes_text(size.get('shapes') or {})}, {SOURCES.get(source, source)}"
    return text + (f" ({size['note']})" if size.get("note") else "")
