"""Which sizes requests had is counted within bounds, kept over restarts, and nobody's to push out alone."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edged.messages import TensorData
from edged.sizes import (
    COUNT_MAX,
    DIMENSIONS_MAX,
    MEASURED_MAX,
    PLACES,
    PLACES_OF_ONE,
    SAVE_S,
    SizeTable,
    are_shapes,
    fit,
    have_free,
    is_size,
    shapes_text,
    size_text,
    told,
)
from edged.tensors import TensorSpec

APP, OTHER, HOSTILE = 1000, 1001, 1002


def inputs(*dims: int, name: str = "x") -> list[TensorData]:
    """The inputs of a request with one tensor of this shape."""
    return [TensorData(name, "FP32", list(dims), b"")]


def noted(table: SizeTable, times: int, *dims: int, uid: int = APP) -> None:
    for _ in range(times):
        table.note(inputs(*dims), uid)


def counts(table: SizeTable) -> dict[tuple[int, ...], int]:
    """The counted shapes of `x`."""
    return {shapes["x"]: count for shapes, count in table.ranked()}


def test_the_most_frequent_size_comes_first() -> None:
    """And no more are handed on than a measurement takes."""
    table = SizeTable()
    for times, side in ((3, 32), (9, 640), (5, 320), (1, 8)):
        noted(table, times, 1, 3, side, side)
    assert table.most() == [{"x": [1, 3, side, side]} for side in (640, 320, 32)]
    assert len(table.most()) == MEASURED_MAX
    assert (table.count, len(table)) == (18, 4)


def test_the_shapes_of_all_inputs_are_one_size() -> None:
    """A request is counted once, whatever it has of inputs."""
    table = SizeTable()
    table.note([*inputs(1, 128, name="ids"), *inputs(1, 128, name="mask")], APP)
    table.note([*inputs(1, 128, name="ids"), *inputs(1, 64, name="mask")], APP)
    assert table.ranked() == [
        ({"ids": (1, 128), "mask": (1, 128)}, 1),
        ({"ids": (1, 128), "mask": (1, 64)}, 1),
    ]


def test_a_new_size_each_time_wears_out_one_place() -> None:
    """Of however many there are: what apps ask for keeps its place and its count."""
    table = SizeTable()
    noted(table, 100, 1, 3, 640, 640)
    noted(table, 50, 1, 3, 320, 320, uid=OTHER)
    for width in range(1, 10_000):
        noted(table, 1, 1, 3, 1, width, uid=HOSTILE)
    found = counts(table)
    assert (found[1, 3, 640, 640], found[1, 3, 320, 320]) == (100, 50)
    assert len(table) == 2 + PLACES_OF_ONE


def test_nobody_has_all_places() -> None:
    """One user's sizes compete with his own, however often he asks for them."""
    table = SizeTable()
    for width in range(1, 3 * PLACES):
        noted(table, 1000, width, uid=HOSTILE)
    assert len(table) == PLACES_OF_ONE
    for width in range(100, 100 + PLACES):
        noted(table, 1, width)
    assert len(table) == PLACES
    assert sum(1 for dims in counts(table) if dims[0] >= 100) == PLACES - PLACES_OF_ONE


def test_a_full_table_gives_a_place_for_as_many_requests_as_it_had() -> None:
    """So a size is pushed out only by what is asked for as often."""
    table = SizeTable()
    for width in range(1, PLACES + 1):
        noted(table, 10 + width, width, uid=APP + width)
    noted(table, 10, 99, uid=HOSTILE)
    assert (99,) not in counts(table)
    noted(table, 1, 99, uid=HOSTILE)
    assert counts(table)[99,] == 1
    assert (1,) not in counts(table)
    assert {width: counts(table)[width,] for width in (2, 8)} == {2: 12, 8: 18}


def test_counts_fade_when_one_is_full() -> None:
    """What was true long ago is outweighed by half as many requests, and rare sizes go."""
    table = SizeTable()
    noted(table, 1, 8)
    noted(table, 1000, 32)
    noted(table, COUNT_MAX, 640)
    assert counts(table) == {(640,): COUNT_MAX // 2, (32,): 500}


@pytest.mark.parametrize(
    "tensors",
    [
        inputs(1, 0, 4),
        [TensorData(f"x{n}", "FP32", [1] * 16, b"") for n in range(DIMENSIONS_MAX // 16)],
    ],
    ids=["nothing in it", "too many dimensions"],
)
def test_what_cannot_be_measured_or_is_too_large_to_keep_is_not_counted(tensors: list[TensorData]) -> None:
    """And it takes nothing off what is there, however often it comes."""
    table = SizeTable()
    for width in range(1, PLACES + 1):
        noted(table, 1, width, uid=width)
    for _ in range(100):
        table.note(tensors, HOSTILE)
    assert counts(table) == {(width,): 1 for width in range(1, PLACES + 1)}


@given(st.lists(st.tuples(st.integers(0, 3), st.lists(st.integers(0, 3), max_size=3)), max_size=200))
def test_the_table_stays_small_and_true(requests: list[tuple[int, list[int]]]) -> None:
    """Whatever is asked: bounded, no more counted than came, and nobody above his share."""
    table = SizeTable()
    came: dict[tuple[int, ...], int] = {}
    for uid, dims in requests:
        table.note(inputs(*dims), uid)
        came[tuple(dims)] = came.get(tuple(dims), 0) + 1
    assert len(table) <= PLACES
    assert all(1 <= count <= came[dims] and 0 not in dims for dims, count in counts(table).items())
    brought = [record["uid"] for record in table.to_save(0.0) or ()]
    assert all(brought.count(uid) <= PLACES_OF_ONE for uid in brought)
    again = SizeTable.from_wire(json.loads(json.dumps(table.to_save(0.0, last=True) or [])))
    assert len(again) in (0, len(table))


def test_a_table_is_the_same_after_the_book() -> None:
    """With its counts and who brought each; what is read is not written again at once."""
    table = SizeTable()
    noted(table, 5, 1, 3, 640, 640)
    noted(table, 7, 1, 3, 320, 320, uid=OTHER)
    wire = json.loads(json.dumps(table.to_save(10.0)))
    again = SizeTable.from_wire(wire)
    assert again.ranked() == table.ranked()
    assert again.to_save(10.0) is None
    noted(again, 12, 1, 3, 320, 320)
    assert again.to_save(10.0) == [{**wire[0], "count": 19}, wire[1]]


def test_a_table_is_written_rarely() -> None:
    """When the order is another or the counts have doubled, and not before the last write is old; the last
    write of all waits for nothing but that."""
    table = SizeTable()
    assert table.to_save(0.0, last=True) is None
    noted(table, 4, 640)
    assert table.to_save(0.0) is not None
    noted(table, 3, 640)
    assert table.to_save(SAVE_S) is None
    noted(table, 1, 640)
    assert table.to_save(SAVE_S - 1.0) is None
    assert table.to_save(SAVE_S) is not None
    noted(table, 1, 32, uid=OTHER)
    assert table.to_save(SAVE_S + 1.0) is None
    assert table.to_save(SAVE_S + 1.0, last=True) is not None
    assert table.to_save(SAVE_S + 1.0, last=True) is None


GOOD = {"shapes": {"x": [1, 4]}, "count": 2, "uid": 0}


@pytest.mark.parametrize(
    "bad",
    [
        None,
        7,
        {},
        {**GOOD, "count": 0},
        {**GOOD, "count": True},
        {**GOOD, "count": COUNT_MAX + 1},
        {**GOOD, "uid": "root"},
        {**GOOD, "shapes": []},
        {**GOOD, "shapes": {"x": 4}},
        {**GOOD, "shapes": {"x": [0, 4]}},
        {**GOOD, "shapes": {"x": [-1]}},
        {**GOOD, "shapes": {"x": [1.5]}},
        {**GOOD, "shapes": {"x": [1 << 60]}},
        {**GOOD, "shapes": {"x": [1] * (DIMENSIONS_MAX + 1)}},
        {**GOOD, "shapes": {1: [1]}},
    ],
)
def test_garbage_of_the_book_is_left_out(bad: Any) -> None:
    """The other records are none the worse for it, and a book of anything at all is an empty table."""
    assert SizeTable.from_wire([bad, GOOD]).ranked() == [({"x": (1, 4)}, 2)]
    assert not SizeTable.from_wire(bad)
    assert len(SizeTable.from_wire([{**GOOD, "shapes": {"x": [n]}} for n in range(1, 99)])) == PLACES


def test_another_content_begins_with_what_fits_it() -> None:
    """Its table is its own, and sizes that it does not take are gone."""
    table = SizeTable()
    noted(table, 3, 1, 3, 640, 640)
    noted(table, 9, 1, 1, 28, 28)
    new = table.copied()
    new.keep_fitting({"x": TensorSpec("x", "FP32", (-1, 3, -1, -1))})
    noted(new, 1, 1, 3, 640, 640)
    assert (counts(new), counts(table)) == (
        {(1, 3, 640, 640): 4},
        {(1, 1, 28, 28): 9, (1, 3, 640, 640): 3},
    )


def test_sizes_fit_as_requests_are_admitted() -> None:
    """Every input that must be there, none that is not the model's, and each in its declared shape."""
    specs = [TensorSpec("x", "FP32", (-1, 4)), TensorSpec("o", "FP32", (1,), optional=True)]
    assert fit({"x": [2, 4]}, specs)
    assert fit({"x": [2, 4], "o": [1]}, specs)
    for shapes in (
        {},
        {"o": [1]},
        {"x": [2, 5]},
        {"x": [4]},
        {"x": [2, 4], "y": [1]},
        {"x": [2, 4], "o": [2]},
    ):
        assert not fit(shapes, specs)
    assert fit({"r": [1, 2, 3]}, [TensorSpec("r", "FP32", None)])
    assert have_free(specs)
    assert have_free([TensorSpec("r", "FP32", None)])
    assert not have_free([TensorSpec("x", "FP32", (1, 4)), TensorSpec("s", "FP32", ())])


def test_of_too_many_inputs_the_first_are_told() -> None:
    """What is sent stays small, and what a worker sends passes its check."""
    many = {f"x{n}": [1] * 15 for n in range(1000)}
    assert list(told(many)) == [f"x{n}" for n in range(DIMENSIONS_MAX // 16)]
    assert is_size({"source": "golden", "shapes": told(many), "note": ""})
    assert not is_size({"source": "golden", "shapes": many, "note": ""})
    assert is_size({"source": "declared", "shapes": told({}), "note": ""})


def test_a_size_reads_as_a_phrase() -> None:
    """With its source, what was refused before it, and not all of a hundred inputs."""
    size = {"source": "requests", "shapes": {"x": [1, 3, 4, 4], "n": []}, "note": ""}
    assert size_text(size) == "x [1,3,4,4], n [], as most requests had it"
    assert size_text({**size, "source": "typical", "note": "x [1,3,9,9] was refused: why"}).endswith(
        "for want of requests and golden samples (x [1,3,9,9] was refused: why)"
    )
    assert shapes_text({f"k{n}": [1] for n in range(100)}) == "k0 [1], k1 [1], k2 [1], k3 [1] and 96 more"


@pytest.mark.parametrize(
    ("wire", "good"),
    [
        ({"source": "owner", "shapes": {"x": [1]}, "note": ""}, True),
        ({"source": "elsewhere", "shapes": {"x": [1]}, "note": ""}, False),
        ({"source": "owner", "shapes": {"x": [-1]}, "note": ""}, False),
        ({"source": "owner", "shapes": {"x": [1]}, "note": 7}, False),
        ({"source": [], "shapes": {"x": [1]}, "note": ""}, False),
        ("owner", False),
    ],
)
def test_what_a_worker_says_of_sizes_is_checked(wire: Any, good: bool) -> None:
    """It is kept and shown, so it must be what it seems."""
    assert is_size(wire) == good
    assert not are_shapes({"x": [True]})
