"""What a tensor is on the wire: shapes, sizes, BYTES elements and lists of elements."""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edged.errors import InvalidArgument
from edged.tensors import (
    DATATYPES,
    ITEM_BYTES,
    TENSOR_BYTES_MAX,
    TensorSpec,
    check_bytes_elements,
    check_shape,
    element_count,
    pack_list,
    shape_text,
    tensor_nbytes,
)

NUMPY = {
    "BOOL": np.bool_,
    "INT8": np.int8,
    "INT16": np.int16,
    "INT32": np.int32,
    "INT64": np.int64,
    "UINT8": np.uint8,
    "UINT16": np.uint16,
    "UINT32": np.uint32,
    "UINT64": np.uint64,
    "FP16": np.float16,
    "FP32": np.float32,
    "FP64": np.float64,
}


def refused(what: Any, *args: Any) -> InvalidArgument:
    """The refusal of a call."""
    with pytest.raises(InvalidArgument) as caught:
        what(*args)
    return caught.value


def test_a_spec_survives_the_wire() -> None:
    """`from_wire` is the inverse of `to_wire`, with a free rank and with names too."""
    for spec in (
        TensorSpec("x", "FP32", (1, -1)),
        TensorSpec("x", "BYTES", None, optional=True),
        TensorSpec("x", "INT64", (-1, 3), dim_names=("batch", None)),
        TensorSpec("y", "SEQUENCE", None),
    ):
        assert TensorSpec.from_wire(spec.to_wire()) == spec
    assert TensorSpec("x", "FP32", (2,)).to_wire() == {"name": "x", "datatype": "FP32", "shape": [2]}


def test_a_shape_reads_as_people_write_it() -> None:
    """Free dimensions are a question mark, a free rank three dots."""
    assert shape_text((1, -1, 3)) == "[1,?,3]"
    assert shape_text(None) == "[...]"
    assert shape_text(()) == "[]"


@given(st.lists(st.integers(0, 50), max_size=5))
def test_the_count_of_elements_is_the_product(shape: list[int]) -> None:
    """As for numpy, a scalar's included."""
    assert element_count("x", shape) == math.prod(shape)
    assert tensor_nbytes("x", "FP64", shape) == 8 * math.prod(shape)


@pytest.mark.parametrize(
    "shape", [[-1], [2, -3], [2**41], [2**40, 2**40], [0, 2**64 - 1], [2**63] * 16, [2**21, 2**21]]
)
def test_shapes_that_no_memory_holds_are_refused(shape: list[int]) -> None:
    """Negative, beyond any memory, or hidden behind a zero."""
    error = refused(element_count, "x", shape)
    assert error.reason == "BAD_SHAPE"
    assert "input 'x'" in error.message


def test_the_largest_count_is_still_one() -> None:
    """The bound itself is within it."""
    assert element_count("x", [TENSOR_BYTES_MAX]) == TENSOR_BYTES_MAX


@pytest.mark.parametrize(
    ("spec", "shape", "fits"),
    [
        ((1, 3), [1, 3], True),
        ((-1, 3), [7, 3], True),
        ((-1, 3), [7, 4], False),
        ((1, 3), [3], False),
        ((), [], True),
        ((), [1], True),
        ((), [1, 1], True),
        ((), [2], False),
        ((), [0], False),
        ((), [1, -1], False),
        ((1,), [], False),
        ((-1,), [], False),
        (None, [9, 9, 9], True),
    ],
)
def test_a_shape_fits_its_spec_or_is_refused(spec: Any, shape: list[int], fits: bool) -> None:
    """Rank and fixed dimensions must agree; the message shows both shapes."""
    wanted = TensorSpec("x", "FP32", spec)
    if fits:
        check_shape(wanted, shape)
        return
    error = refused(check_shape, wanted, shape)
    assert error.reason == "BAD_SHAPE"
    assert shape_text(spec) in error.message
    assert shape_text(shape) in error.message


@given(st.lists(st.binary(max_size=20), max_size=10))
def test_bytes_elements_are_counted_exactly(elements: list[bytes]) -> None:
    """As many as the shape says, no less and no more, and none cut off at the end."""
    raw = b"".join(struct.pack("<I", len(e)) + e for e in elements)
    check_bytes_elements("x", raw, len(elements))
    check_bytes_elements("x", memoryview(raw), len(elements))
    assert pack_list("x", "BYTES", elements, [len(elements)]) == raw
    for wrong in (len(elements) - 1, len(elements) + 1):
        assert refused(check_bytes_elements, "x", raw, wrong).reason == "BAD_BYTES"
    if raw:
        assert refused(check_bytes_elements, "x", raw[:-1], len(elements)).reason == "BAD_BYTES"
        assert refused(check_bytes_elements, "x", raw + b"\0", len(elements)).reason == "BAD_BYTES"


@pytest.mark.parametrize("datatype", NUMPY)
def test_lists_pack_as_numpy_lays_them_out(datatype: str) -> None:
    """Flat or nested as the shape is, every datatype of fixed size."""
    array = (np.arange(12) % (2 if datatype == "BOOL" else 12)).astype(NUMPY[datatype]).reshape(2, 3, 2)
    assert pack_list("x", datatype, array.tolist(), [2, 3, 2]) == array.tobytes()
    assert pack_list("x", datatype, array.ravel().tolist(), [2, 3, 2]) == array.tobytes()
    assert len(array.tobytes()) == tensor_nbytes("x", datatype, [2, 3, 2])


@pytest.mark.parametrize(
    ("value", "pattern"),
    [
        (1.0, 0x3F80),
        (-2.5, 0xC020),
        (math.inf, 0x7F80),
        (1.00390625, 0x3F80),  # halfway between two: to the even one
        (1.01171875, 0x3F82),  # halfway: up to the even one
        (3.4e38, 0x7F80),
        (0, 0),
    ],
)
def test_bf16_rounds_to_nearest_even(value: float, pattern: int) -> None:
    """The upper half of the FP32 pattern."""
    assert pack_list("x", "BF16", [value], [1]) == struct.pack("<H", pattern)


def test_bf16_keeps_nan_a_nan() -> None:
    """Rounding must not turn it into infinity."""
    (bits,) = struct.unpack("<H", pack_list("x", "BF16", [math.nan], [1]))
    assert bits & 0x7F80 == 0x7F80
    assert bits & 0x7F


def test_text_and_bytes_are_both_elements_of_bytes() -> None:
    """A str goes as UTF-8."""
    assert pack_list("x", "BYTES", ["ü", b"\xff"], [2]) == b"\x02\0\0\0\xc3\xbc\x01\0\0\0\xff"


@pytest.mark.parametrize(
    ("datatype", "data", "shape"),
    [
        ("INT8", [128], [1]),
        ("INT8", [-129], [1]),
        ("UINT8", [-1], [1]),
        ("UINT64", [2**64], [1]),
        ("INT32", [1.0], [1]),
        ("INT32", ["1"], [1]),
        ("INT32", [None], [1]),
        ("FP32", ["1.0"], [1]),
        ("FP32", [1e39], [1]),
        ("FP16", [70000.0], [1]),
        ("BF16", ["abc"], [1]),
        ("BF16", ["1.5"], [1]),
        ("BF16", [1e39], [1]),
        ("BF16", [None], [1]),
        ("FP64", [10**400], [1]),
        ("FP64", [{}], [1]),
        ("BOOL", [2], [1]),
        ("BOOL", ["y" * 5000], [1]),
        ("BOOL", [1.0], [1]),
        ("BYTES", [1], [1]),
        ("BYTES", ["\ud800"], [1]),
        ("FP32", [1, 2, 3], [2]),
        ("FP32", [], [1]),
        ("FP32", [[1, 2, 3], [4]], [2, 2]),
        ("FP32", [[1], [2]], [2]),
        ("FP32", [1, [2]], [2]),
        ("FP32", [[1, 2], [3, 4]], [4]),
        ("FP32", [[1, 2, 3, 4]], [2, 2]),
        ("FP32", [[[1]], [2]], [2, 1]),
        ("FP32", [[1, 2], [3, 4]], [2, 2, 1]),
        ("FP32", [[]], []),
    ],
)
def test_what_does_not_fit_is_refused_and_never_bent(datatype: str, data: Any, shape: list[int]) -> None:
    """Out of range, of another kind, too many, ragged: the input's name and no long text of the client's."""
    error = refused(pack_list, "x", datatype, data, shape)
    assert error.reason == "BAD_DATA"
    assert "input 'x'" in error.message
    assert len(error.message) < 300


def test_a_list_nested_deeper_than_any_shape_is_refused() -> None:
    """Depth is bounded by the rank, not by Python's stack."""
    data: list[Any] = []
    for _ in range(500):
        data = [data]
    assert refused(pack_list, "x", "FP32", data, [1] * 16).reason == "BAD_DATA"


@pytest.mark.parametrize("shape", [[0], [2, 0], [0, 3], [2, 0, 3]])
def test_empty_tensors_are_legal(shape: list[int]) -> None:
    """As numpy writes them, and flat."""
    data = np.zeros(shape, np.float32).tolist()
    assert pack_list("x", "FP32", data, shape) == b""
    assert pack_list("x", "FP32", [], shape) == b""


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=10,
)


@given(st.sampled_from(DATATYPES), st.lists(ANYTHING, max_size=5), st.lists(st.integers(-1, 4), max_size=3))
def test_any_list_packs_to_its_size_or_is_refused(datatype: str, data: list[Any], shape: list[int]) -> None:
    """Bytes of exactly the right length, or InvalidArgument; nothing else."""
    try:
        raw = pack_list("x", datatype, data, shape)
    except InvalidArgument:
        return
    if datatype in ITEM_BYTES:
        assert len(raw) == tensor_nbytes("x", datatype, shape)
    else:
        check_bytes_elements("x", raw, element_count("x", shape))
