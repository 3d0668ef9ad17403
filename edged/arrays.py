"""numpy arrays to and from the protocol's raw tensors.

Owns every conversion between an array and bytes, on the client's side and on the worker's, so that the
two cannot disagree: raw tensors are little-endian, row-major and contiguous, a BYTES element is a 4-byte
little-endian length and the bytes. What already lies that way in memory is passed on as a view, not
copied. Never does I/O and never decides where bytes travel. Runs on Python 3.10 too.

Values that no tensor can hold (ONNX sequences, maps, absent optionals) go through `value_to_wire` and
`value_from_wire`, in the form that the protocol gives them.
"""

from __future__ import annotations

import importlib
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from edged.errors import InvalidArgument

__all__ = [
    "DTYPES",
    "VALUE_DATATYPES",
    "Array",
    "Buffer",
    "RawTensor",
    "datatype_of",
    "dtype_of",
    "from_raw",
    "to_raw",
    "value_from_wire",
    "value_to_wire",
]

Array = npt.NDArray[Any]
Buffer = bytes | bytearray | memoryview

VALUE_DATATYPES = ("SEQUENCE", "MAP", "OPTIONAL")
"""The datatypes of outputs that are no tensors."""

_COPY_BYTES_MAX = 16 * 1024
"""Up to this size a copy (under 1 µs) costs less than making a view of the array's memory."""

_VALUE_DEPTH_MAX = 8
"""ONNX nests types two or three deep; this only stops a hostile or broken reply."""

DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype("?"),
    "INT8": np.dtype("i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "UINT8": np.dtype("u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
"""How each datatype of fixed size is seen by numpy, which has no BF16."""
_DATATYPES: dict[np.dtype[Any], str] = {dtype: datatype for datatype, dtype in DTYPES.items()}

_LENGTH = struct.Struct("<I")


class RawTensor(NamedTuple):
    """A tensor whose bytes are already in the protocol's raw form.

    For datatypes that numpy has no dtype for (BF16 without ml_dtypes), and for forwarding bytes as they are.
    """

    datatype: str
    shape: tuple[int, ...]
    data: Buffer


def dtype_of(datatype: str) -> np.dtype[Any]:
    """The numpy dtype of a datatype.

    `object` for BYTES; for BF16 ml_dtypes' bfloat16 where that is installed, else uint16.
    Raises InvalidArgument for a datatype that is none of the protocol's.
    """
    dtype = DTYPES.get(datatype)
    if dtype is not None:
        return dtype
    if datatype == "BYTES":
        return np.dtype(object)
    if datatype == "BF16":
        return _bf16_dtype()
    raise InvalidArgument(f"datatype {datatype!r} is none of the protocol's", reason="BAD_DATATYPE")


def datatype_of(dtype: np.dtype[Any]) -> str:
    """The protocol's datatype for a numpy dtype, whatever its byte order.

    Raises InvalidArgument for a dtype that no model takes (complex, dates, records).
    """
    datatype = _DATATYPES.get(dtype) or _DATATYPES.get(dtype.newbyteorder("<"))
    if datatype is not None:
        return datatype
    if dtype.kind in "SUOT":
        return "BYTES"
    if dtype.name == "bfloat16":
        return "BF16"
    raise InvalidArgument(
        f"no datatype of the protocol holds numpy's {dtype}; convert the array first", reason="BAD_DATATYPE"
    )


def to_raw(array: Array) -> tuple[str, list[int], Buffer]:
    """An array as `(datatype, shape, raw bytes)`.

    A large contiguous little-endian array is not copied: the buffer is a view of its memory. Big-endian and
    strided arrays are converted. Arrays of str, bytes or objects become BYTES (str as UTF-8).
    Raises InvalidArgument for a dtype or an element that has no datatype.
    """
    datatype = _DATATYPES.get(array.dtype)
    if datatype is None:
        datatype = datatype_of(array.dtype)
        if datatype == "BYTES":
            return datatype, list(array.shape), _pack_bytes(array)
        if datatype == "BF16":
            array = np.ascontiguousarray(array).view(np.uint16).reshape(array.shape)
        else:
            array = array.astype(DTYPES[datatype])
    if array.nbytes <= _COPY_BYTES_MAX:
        return datatype, list(array.shape), array.tobytes()
    # By way of uint8, since memoryview.cast knows neither float16 nor arrays without elements.
    return datatype, list(array.shape), np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def from_raw(datatype: str, shape: Sequence[int], buffer: Buffer) -> Array:
    """The array that `buffer` holds: a view, as read-only as the buffer is.

    Only BYTES becomes a new array, of `bytes` objects. BF16 is ml_dtypes' bfloat16 where that is
    installed, else uint16. Raises InvalidArgument when the bytes do not fit datatype and shape.
    """
    dtype = DTYPES.get(datatype)
    try:
        if dtype is not None:
            return np.frombuffer(buffer, dtype).reshape(shape)
        if datatype == "BYTES":
            return _unpack_bytes(buffer).reshape(shape)
        return np.frombuffer(buffer, dtype_of(datatype)).reshape(shape)
    except ValueError as e:
        raise InvalidArgument(
            f"{len(buffer)} bytes are not a {datatype} tensor of shape {list(shape)}: {e}",
            reason="BAD_BYTES" if datatype == "BYTES" else "BAD_DATA",
        ) from None


def _bf16_dtype() -> np.dtype[Any]:
    try:
        bfloat16: npt.DTypeLike = importlib.import_module("ml_dtypes").bfloat16
    except ImportError:
        bfloat16 = "<u2"
    return np.dtype(bfloat16)


def _pack_bytes(array: Array) -> bytes:
    parts: list[bytes] = []
    for at, item in enumerate(array.ravel().tolist()):
        if isinstance(item, str):
            item = item.encode()
        elif not isinstance(item, bytes):
            raise InvalidArgument(
                f"element {at} of an array of objects is a {type(item).__name__}; "
                "a BYTES tensor holds str or bytes",
                reason="BAD_DATA",
            )
        parts.append(_LENGTH.pack(len(item)))
        parts.append(item)
    return b"".join(parts)


def _unpack_bytes(buffer: Buffer) -> Array:
    raw = bytes(buffer)
    items: list[bytes] = []
    at, end = 0, len(raw)
    while at < end:
        if end - at < _LENGTH.size:
            raise ValueError(f"element {len(items)} ends inside its length")
        (length,) = _LENGTH.unpack_from(raw, at)
        at += _LENGTH.size
        if length > end - at:
            raise ValueError(f"element {len(items)} says {length} bytes, {end - at} are left")
        items.append(raw[at : at + length])
        at += length
    array = np.empty(len(items), dtype=object)
    array[:] = items
    return array


def value_to_wire(value: Any) -> tuple[str, Any]:
    """A sequence, map or absent optional as `(datatype, data)`, ready for msgpack.

    SEQUENCE is a list of elements, MAP a list of `[key, element]` pairs, OPTIONAL nil or an element.
    An element is a plain scalar (bool, int, float, str, bytes), or a map: `{datatype, data}` for a nested
    value, `{datatype, shape, data}` for a tensor. Raises InvalidArgument for anything else.
    """
    if value is None:
        return "OPTIONAL", None
    if isinstance(value, Mapping):
        return "MAP", [[_element_to_wire(k), _element_to_wire(v)] for k, v in value.items()]
    if isinstance(value, (list, tuple)):
        return "SEQUENCE", [_element_to_wire(item) for item in value]
    return "OPTIONAL", _element_to_wire(value)


def _element_to_wire(value: Any) -> Any:
    if isinstance(value, (bool, int, float, str, bytes)) and not isinstance(value, np.generic):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        datatype, shape, data = to_raw(value)
        return {"datatype": datatype, "shape": shape, "data": data}
    if value is None or isinstance(value, (Mapping, list, tuple)):
        datatype, data = value_to_wire(value)
        return {"datatype": datatype, "data": data}
    raise InvalidArgument(f"an output holds a {type(value).__name__}, which has no form on the wire")


def value_from_wire(
    datatype: str, data: Any, tensor: Callable[[Mapping[str, Any]], Array], depth: int = 0
) -> Any:
    """The list, dict or value that `value_to_wire` wrote, as ONNX Runtime gives it.

    `tensor` reads a tensor map (its bytes may lie in a frame that only the caller knows).
    Raises InvalidArgument for what is not such a value.
    """
    if depth > _VALUE_DEPTH_MAX:
        raise InvalidArgument("a value is nested too deep", reason="BAD_DATA")

    def element(item: Any) -> Any:
        if not isinstance(item, Mapping):
            return item
        kind = item.get("datatype", "")
        if kind in VALUE_DATATYPES:
            return value_from_wire(kind, item.get("data"), tensor, depth + 1)
        return tensor(item)

    try:
        if datatype == "SEQUENCE":
            return [element(item) for item in data]
        if datatype == "MAP":
            return {element(key): element(value) for key, value in data}
        if datatype == "OPTIONAL":
            return element(data)
    except (TypeError, ValueError) as e:
        raise InvalidArgument(f"the data of a {datatype} is malformed: {e}", reason="BAD_DATA") from None
    raise InvalidArgument(f"datatype {datatype!r} is no sequence, map or optional", reason="BAD_DATATYPE")
