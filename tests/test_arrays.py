"""arrays: every dtype survives the way to raw bytes and back."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from edged.arrays import dtype_of, from_raw, to_raw, value_from_wire, value_to_wire
from edged.errors import InvalidArgument
from edged.tensors import ITEM_BYTES, check_bytes_elements, pack_list

NUMERIC = [d for d in ITEM_BYTES if d != "BF16"]
SHAPES = [(), (0,), (3,), (2, 0, 4), (2, 3), (70, 130)]


@pytest.mark.parametrize("datatype", NUMERIC)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_numeric_arrays_come_back_equal(datatype: str, shape: tuple[int, ...]) -> None:
    """Each datatype and shape, small (copied) and large (a view), is the same after a round trip."""
    array = (np.arange(int(np.prod(shape))) % 2).reshape(shape).astype(dtype_of(datatype))
    name, dims, raw = to_raw(array)
    assert (name, dims) == (datatype, list(shape))
    assert len(raw) == array.size * ITEM_BYTES[datatype]
    back = from_raw(name, dims, raw)
    assert back.dtype == array.dtype
    np.testing.assert_array_equal(back, array)


def test_a_large_array_is_passed_on_as_a_view() -> None:
    """Neither direction copies a contiguous little-endian array."""
    array = np.zeros((64, 1024), np.float32)
    _, shape, raw = to_raw(array)
    back = from_raw("FP32", shape, raw)
    assert np.shares_memory(array, back)


def test_bytes_give_a_read_only_array() -> None:
    """What lies in an immutable buffer cannot be written through the array."""
    assert not from_raw("INT8", [3], b"abc").flags.writeable


@pytest.mark.parametrize("size", [6, 60_000])
def test_big_endian_and_strided_arrays_are_converted(size: int) -> None:
    """The bytes are little-endian and row-major whatever the array's own layout."""
    want = np.arange(size, dtype="<i4").reshape(2, -1)
    for array in (want.astype(">i4"), np.asfortranarray(want), np.repeat(want, 2, axis=1)[:, ::2]):
        datatype, shape, raw = to_raw(array)
        assert (datatype, shape, bytes(raw)) == ("INT32", list(want.shape), want.tobytes())


def test_aliases_of_a_dtype_are_known() -> None:
    """C's long long and long are both INT64 where they have 8 bytes."""
    assert to_raw(np.zeros(1, "q"))[0] == to_raw(np.zeros(1, "l"))[0] == "INT64"


@pytest.mark.parametrize(
    "array",
    [
        np.array([["a", "äö"], ["", "x\0y"]], dtype=object),
        np.array([[b"a", "äö".encode()], [b"", b"x\0y"]], dtype=object),
        np.array([["a", "äö"], ["", "x\0y"]]),
        np.array([[b"a", "äö".encode()], [b"", b"x\0y"]]),
    ],
    ids=["object-str", "object-bytes", "U", "S"],
)
def test_strings_become_bytes_elements(array: np.ndarray) -> None:
    """Each kind of string array is BYTES, in the form that the list form packs too."""
    datatype, shape, raw = to_raw(array)
    assert (datatype, shape) == ("BYTES", [2, 2])
    check_bytes_elements("x", bytes(raw), 4)
    assert bytes(raw) == pack_list("x", "BYTES", array.tolist(), [2, 2])
    assert from_raw(datatype, shape, raw).tolist() == [[b"a", "äö".encode()], [b"", b"x\0y"]]


def test_a_scalar_string_and_an_empty_string_tensor() -> None:
    """BYTES tensors of rank 0 and of no elements come back with their shapes."""
    for array in (np.array("word", dtype=object), np.empty((0, 2), dtype=object)):
        back = from_raw(*to_raw(array))
        assert back.shape == array.shape


def test_bf16_is_uint16_without_ml_dtypes() -> None:
    """The bit patterns are the same with ml_dtypes and without it."""
    bits = np.array([0x3F80, 0xC000], "<u2")
    code = (
        "import sys; sys.modules['ml_dtypes'] = None\n"
        "from edged.arrays import from_raw\n"
        "a = from_raw('BF16', [2], bytes.fromhex('803f00c0'))\n"
        "print(a.dtype, a.tolist())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == f"uint16 {bits.tolist()}"


def test_bf16_with_ml_dtypes() -> None:
    """With ml_dtypes a BF16 tensor is an array of numbers and goes back as BF16."""
    pytest.importorskip("ml_dtypes")
    array = from_raw("BF16", [2], bytes.fromhex("803f00c0"))
    assert array.astype(np.float32).tolist() == [1.0, -2.0]
    datatype, shape, raw = to_raw(array)
    assert (datatype, shape, bytes(raw)) == ("BF16", [2], bytes.fromhex("803f00c0"))


@pytest.mark.parametrize(
    "array",
    [np.zeros(1, complex), np.zeros(1, "M8[s]"), np.array([1, None], dtype=object)],
    ids=["complex", "date", "object-int"],
)
def test_what_has_no_datatype_is_refused(array: np.ndarray) -> None:
    """Nothing is converted by guessing."""
    with pytest.raises(InvalidArgument):
        to_raw(array)


@pytest.mark.parametrize(
    ("datatype", "shape", "raw"),
    [
        ("FP32", [2], b"1234567"),
        ("FP32", [3], b"12345678"),
        ("BYTES", [1], b"\x05\0\0\0ab"),
        ("BYTES", [1], b"\x05\0"),
        ("BYTES", [2], b"\x01\0\0\0a"),
        ("FP8", [1], b"a"),
    ],
)
def test_bytes_that_do_not_fit_are_refused(datatype: str, shape: list[int], raw: bytes) -> None:
    """A wrong length, count or datatype is InvalidArgument, not an array of something else."""
    with pytest.raises(InvalidArgument) as found:
        from_raw(datatype, shape, raw)
    assert found.value.reason == {"BYTES": "BAD_BYTES", "FP8": "BAD_DATATYPE"}.get(datatype, "BAD_DATA")


def _tensor(wire: object) -> np.ndarray:
    assert isinstance(wire, dict)
    return from_raw(wire["datatype"], wire["shape"], wire["data"])


@pytest.mark.parametrize(
    "value",
    [
        [{0: 0.25, 1: 0.75}, {0: 1.0, 1: 0.0}],
        {"cat": 0.5, "dog": 0.5},
        [1, 2.5, "three", b"four", True],
        [[1], []],
        None,
        [None, 1],
    ],
    ids=str,
)
def test_values_come_back_as_onnx_runtime_gives_them(value: object) -> None:
    """Sequences, maps with integer keys and absent optionals survive msgpack and back."""
    msgpack = pytest.importorskip("msgpack")
    datatype, data = msgpack.unpackb(msgpack.packb(value_to_wire(value)))
    assert value_from_wire(datatype, data, _tensor) == value


def test_a_sequence_of_tensors() -> None:
    """Tensors inside a sequence keep dtype and shape."""
    datatype, data = value_to_wire([np.float32([[1, 2]]), np.array(["a"], dtype=object)])
    first, second = value_from_wire(datatype, data, _tensor)
    assert first.dtype == np.float32
    assert first.tolist() == [[1.0, 2.0]]
    assert second.tolist() == [b"a"]


@pytest.mark.parametrize(
    ("datatype", "data"), [("SEQUENCE", 3), ("MAP", [1]), ("MAP", [[[], 1]]), ("FP32", [])]
)
def test_malformed_values_are_refused(datatype: str, data: object) -> None:
    """A reply that is not such a value is InvalidArgument."""
    with pytest.raises(InvalidArgument):
        value_from_wire(datatype, data, _tensor)
