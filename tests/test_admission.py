"""Whether a request can be run, and what it may share a run with."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from edged.admission import checked_inputs, rows_and_key
from edged.errors import InvalidArgument
from edged.events import RequestArrived
from edged.messages import InputTensor, Peer, RegionPart, Request, TensorData
from edged.regions import Regions
from edged.tensors import TensorSpec


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
    found, key = rows_and_key(inputs, None, {})
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
    assert rows_and_key(inputs, None, {}) == (1, None)


def test_what_may_share_a_run_has_the_same_key() -> None:
    """Names, order, datatypes, other dimensions and the wanted outputs, in their order, tell them apart."""
    kinds = [
        rows_and_key([tensor("x", 1, 2), tensor("y", 1, 2)], None, {}),
        rows_and_key([tensor("y", 1, 2), tensor("x", 1, 2)], None, {}),
        rows_and_key([tensor("x", 1, 2)], None, {}),
        rows_and_key([tensor("x", 1, 2, datatype="INT32"), tensor("y", 1, 2)], None, {}),
        rows_and_key([tensor("x", 1, 3), tensor("y", 1, 2)], None, {}),
        rows_and_key([tensor("x", 1, 2, 1), tensor("y", 1, 2)], None, {}),
        rows_and_key([tensor("x", 1, 2), tensor("y", 1, 2)], [], {}),
        rows_and_key([tensor("x", 1, 2), tensor("y", 1, 2)], ["a", "b"], {}),
        rows_and_key([tensor("x", 1, 2), tensor("y", 1, 2)], ["b", "a"], {}),
    ]
    assert len({key for _, key in kinds}) == len(kinds)
    assert rows_and_key([tensor("x", 5, 2), tensor("y", 5, 2)], None, {})[1] == kinds[0][1]
    assert rows_and_key([tensor("x", 1, 2), tensor("y", 2, 2)], None, {})[1] is None
    assert rows_and_key([tensor("x", 1, datatype="BYTES")], None, {})[1] is None


def test_sizes_that_contradict_their_names_share_no_run() -> None:
    """That rows stand alone was read off a graph in which one name is one size."""
    declared = {
        "x": TensorSpec("x", "FP32", (-1, -1, 4), dim_names=("N", "step", None)),
        "y": TensorSpec("y", "FP32", (-1, -1, -1), dim_names=("M", "step", "wide")),
    }
    alike = [tensor("x", 1, 3, 4), tensor("y", 1, 3, 7)]
    apart = [tensor("x", 1, 3, 4), tensor("y", 1, 6, 7)]
    assert rows_and_key(alike, None, declared)[1] is not None
    assert rows_and_key(apart, None, declared) == (1, None)


def admitted(specs: list[TensorSpec], *tensors: InputTensor) -> list[TensorData]:
    """The inputs of a request as a model of these specs gets them."""
    inputs = {spec.name: spec for spec in specs}
    required = frozenset(spec.name for spec in specs if not spec.optional)
    instance: Any = SimpleNamespace(name="m", inputs=inputs, required=required)
    request = Request("model_infer", inputs=list(tensors))
    regions = Regions(bytes_per_uid=0, per_connection=0, count_max=0)
    return checked_inputs(instance, RequestArrived((1,), "edged.sock", Peer(0, 0, 1), request), regions, [])


X, SCALAR = TensorSpec("x", "FP32", (-1,)), TensorSpec("s", "INT64", ())
SPARE = TensorSpec("b", "FP32", (1,), optional=True)
NAMELESS = InputTensor("", "FP32", [1], b"\0\0\0\0")


@pytest.mark.parametrize("specs", [[X], [X, SPARE], [SPARE]])
def test_a_model_of_one_input_knows_which_is_meant(specs: list[TensorSpec]) -> None:
    """The one that must be given, or the only one there is; from there on it has its name."""
    assert admitted(specs, NAMELESS) == [TensorData(specs[0].name, "FP32", [1], b"\0\0\0\0")]


@pytest.mark.parametrize("specs", [[X, SCALAR], [SPARE, TensorSpec("c", "FP32", None, optional=True)], []])
def test_of_several_inputs_none_is_guessed(specs: list[TensorSpec]) -> None:
    """The error has their names, to be used."""
    with pytest.raises(InvalidArgument) as caught:
        admitted(specs, NAMELESS)
    assert caught.value.reason == "INPUT_NOT_NAMED"
    assert all(f"'{spec.name}'" in caught.value.message for spec in specs)


def test_a_nameless_input_stands_alone() -> None:
    """Beside a named one it could be meant for either."""
    with pytest.raises(InvalidArgument) as caught:
        admitted([X, SPARE], NAMELESS, InputTensor("b", "FP32", [1], b"\0\0\0\0"))
    assert caught.value.reason == "INPUT_NOT_NAMED"


@pytest.mark.parametrize("shape", [[], [1], [1, 1]])
def test_one_element_of_any_rank_is_a_scalar_s_value(shape: list[int]) -> None:
    """It goes to the runtime in the shape that it came in, which an answer may show."""
    (found,) = admitted([SCALAR], InputTensor("s", "INT64", shape, bytes(8)))
    assert (found.shape, found.raw) == (shape, bytes(8))
