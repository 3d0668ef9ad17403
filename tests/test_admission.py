"""Whether a request can be run, and what it may share a run with."""

from __future__ import annotations

import pytest

from edged.admission import rows_and_key
from edged.messages import RegionPart, TensorData


def tensor(name: str, *shape: int, datatype: str = "FP32", part: RegionPart | None = None) -> TensorData:
    """A tensor of this shape; its bytes are nobody's matter here."""
    return TensorData(name, datatype, list(shape), b"", part)


@pytest.mark.parametrize(
    ("inputs", "rows"),
    [
        ([tensor("x", 3, 2)], 3),
        ([tensor("x", 3, 2), tensor("y", 3)], 3),
        ([tensor("x", 3, 2, part=RegionPart(1, "r", 0, 24))], 3),
    ],
)
def test_rows_are_the_first_dimension(inputs: list[TensorData], rows: int) -> None:
    """Where all inputs have it, they may share a run with those of the same other dimensions."""
    found, key = rows_and_key(inputs, None)
    assert (found, key is not None) == (rows, True)


@pytest.mark.parametrize(
    "inputs",
    [
        [],
        [tensor("x")],
        [tensor("x", 0, 4)],
        [tensor("x", 2**40, 0)],
        [tensor("x", 2**40, 0), tensor("y", 1, 3)],
    ],
)
def test_rows_of_nothing_are_none(inputs: list[TensorData]) -> None:
    """A shape alone claims any number of rows, which would count for statistics, estimates and fairness."""
    assert rows_and_key(inputs, None) == (1, None)


def test_what_may_share_a_run_has_the_same_key() -> None:
    """Names, order, datatypes, other dimensions and the wanted outputs, in their order, tell them apart."""
    kinds = [
        rows_and_key([tensor("x", 1, 2), tensor("y", 1, 2)], None),
        rows_and_key([tensor("y", 1, 2), tensor("x", 1, 2)], None),
        rows_and_key([tensor("x", 1, 2)], None),
        rows_and_key([tensor("x", 1, 2, datatype="INT32"), tensor("y", 1, 2)], None),
        rows_and_key([tensor("x", 1, 3), tensor("y", 1, 2)], None),
        rows_and_key([tensor("x", 1, 2, 1), tensor("y", 1, 2)], None),
        rows_and_key([tensor("x", 1, 2), tensor("y", 1, 2)], []),
        rows_and_key([tensor("x", 1, 2), tensor("y", 1, 2)], ["a", "b"]),
        rows_and_key([tensor("x", 1, 2), tensor("y", 1, 2)], ["b", "a"]),
    ]
    assert len({key for _, key in kinds}) == len(kinds)
    assert rows_and_key([tensor("x", 5, 2), tensor("y", 5, 2)], None)[1] == kinds[0][1]
    assert rows_and_key([tensor("x", 1, 2), tensor("y", 2, 2)], None)[1] is None
    assert rows_and_key([tensor("x", 1, datatype="BYTES")], None)[1] is None
