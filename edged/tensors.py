"""What a tensor is on the wire: datatypes, specs, and the checks of shape and size.

Pure, and without numpy: the supervisor moves bytes and never looks into them, so it need not carry
numpy's memory. Datatypes and their raw form (little-endian, row-major, BYTES elements as a 4-byte
length and the bytes) are the Open Inference Protocol's. `arrays` turns these bytes into numpy arrays
on the client's and the worker's side. Runs on Python 3.10 too.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from edged.errors import InvalidArgument

__all__ = [
    "DATATYPES",
    "ITEM_BYTES",
    "TENSOR_BYTES_MAX",
    "TensorSpec",
    "check_bytes_elements",
    "check_shape",
    "element_count",
    "pack_list",
    "shape_text",
    "tensor_nbytes",
]

ITEM_BYTES: dict[str, int] = {
    "BOOL": 1,
    "INT8": 1,
    "INT16": 2,
    "INT32": 4,
    "INT64": 8,
    "UINT8": 1,
    "UINT16": 2,
    "UINT32": 4,
    "UINT64": 8,
    "FP16": 2,
    "FP32": 4,
    "FP64": 8,
    "BF16": 2,
}
"""Bytes of one element of each datatype of fixed size."""

DATATYPES: tuple[str, ...] = (*ITEM_BYTES, "BYTES")
"""Every datatype that a request's tensor may have."""

TENSOR_BYTES_MAX = 1 << 40
"""Beyond this a shape's product is nonsense, whatever the limits say; keeps the arithmetic honest."""

_STRUCT_CODE = {
    "INT8": "b",
    "INT16": "h",
    "INT32": "i",
    "INT64": "q",
    "UINT8": "B",
    "UINT16": "H",
    "UINT32": "I",
    "UINT64": "Q",
    "FP16": "e",
    "FP32": "f",
    "FP64": "d",
}


@dataclass(frozen=True)
class TensorSpec:
    """One input or output as the model declares it.

    `shape` has -1 for a dimension that is free, and is None where even the rank is free. `datatype` is
    one of `DATATYPES`, or `SEQUENCE`, `MAP`, `OPTIONAL` for an output that is no tensor. `optional` is
    true for an input that may be left out. `dim_names` names the free dimensions where the model does.
    """

    name: str
    datatype: str
    shape: tuple[int, ...] | None
    optional: bool = False
    dim_names: tuple[str | None, ...] = ()

    def to_wire(self) -> dict[str, Any]:
        """As OIP's model metadata wants it: `{name, datatype, shape}`; a free rank is a shape of nil."""
        wire: dict[str, Any] = {
            "name": self.name,
            "datatype": self.datatype,
            "shape": None if self.shape is None else list(self.shape),
        }
        if self.optional:
            wire["optional"] = True
        if any(self.dim_names):
            wire["dim_names"] = list(self.dim_names)
        return wire

    @classmethod
    def from_wire(cls, wire: dict[str, Any]) -> TensorSpec:
        """The inverse of `to_wire`."""
        shape = wire["shape"]
        return cls(
            name=wire["name"],
            datatype=wire["datatype"],
            shape=None if shape is None else tuple(shape),
            optional=bool(wire.get("optional", False)),
            dim_names=tuple(wire.get("dim_names", ())),
        )


def shape_text(shape: Sequence[int] | None) -> str:
    """`[1,3,?,?]`, as messages show a shape; `[...]` where the rank is free."""
    if shape is None:
        return "[...]"
    return "[" + ",".join("?" if d < 0 else str(d) for d in shape) + "]"


def element_count(name: str, shape: Sequence[int]) -> int:
    """The product of the dimensions.

    Raises InvalidArgument for a negative dimension or a product beyond any machine's memory.
    """
    count = 1
    for dim in shape:
        if dim < 0:
            raise InvalidArgument(
                f"input '{name}': shape {list(shape)} has a negative dimension; send the real sizes",
                reason="BAD_SHAPE",
            )
        count *= dim
    if count > TENSOR_BYTES_MAX or any(d > TENSOR_BYTES_MAX for d in shape):
        raise InvalidArgument(
            f"input '{name}': shape {list(shape)} has more elements than any memory holds", reason="BAD_SHAPE"
        )
    return count


def tensor_nbytes(name: str, datatype: str, shape: Sequence[int]) -> int:
    """Bytes that a tensor of fixed-size elements has; the caller has ruled out BYTES."""
    return element_count(name, shape) * ITEM_BYTES[datatype]


def check_shape(spec: TensorSpec, shape: Sequence[int]) -> None:
    """Raises InvalidArgument unless `shape` fits the spec's.

    One element of any rank is a scalar's value: ONNX Runtime takes it, and apps feed it. A scalar is not one
    row, though: where the model wants a dimension, ONNX Runtime insists on it.
    """
    want = spec.shape
    if want is None:
        return
    if not want and all(dim == 1 for dim in shape):
        return
    if len(shape) != len(want):
        raise InvalidArgument(
            f"input '{spec.name}': expected {len(want)} dimensions {shape_text(want)}, "
            f"got {len(shape)} {shape_text(shape)}",
            reason="BAD_SHAPE",
        )
    for have, need in zip(shape, want):  # noqa: B905 - lengths were compared above; strict= costs on the hot path
        if need >= 0 and have != need:
            raise InvalidArgument(
                f"input '{spec.name}': expected shape {shape_text(want)}, got {shape_text(shape)}",
                reason="BAD_SHAPE",
            )


def check_bytes_elements(name: str, raw: bytes | memoryview, count: int) -> None:
    """Raises InvalidArgument unless `raw` is exactly `count` length-prefixed elements."""
    at, end, seen = 0, len(raw), 0
    while at < end:
        if seen == count:
            raise InvalidArgument(
                f"input '{name}': the shape holds {count} BYTES elements, the data more", reason="BAD_BYTES"
            )
        if end - at < 4:
            raise InvalidArgument(
                f"input '{name}': BYTES data ends inside a length, after element {seen}", reason="BAD_BYTES"
            )
        (length,) = struct.unpack_from("<I", raw, at)
        at += 4
        if length > end - at:
            raise InvalidArgument(
                f"input '{name}': BYTES element {seen} says {length} bytes, {end - at} are left",
                reason="BAD_BYTES",
            )
        at += length
        seen += 1
    if seen != count:
        raise InvalidArgument(
            f"input '{name}': the shape holds {count} BYTES elements, the data {seen}", reason="BAD_BYTES"
        )


def _flatten(name: str, data: Sequence[Any], shape: Sequence[int], depth: int = 0) -> Iterator[Any]:
    """The elements of a list that is flat, or nested exactly as its shape is."""
    nested = sum(1 for item in data if isinstance(item, (list, tuple)))
    last = len(shape) - 1
    if not nested and depth == 0:
        yield from data
        return
    if depth > last or len(data) != shape[depth] or nested != (0 if depth == last else len(data)):
        raise InvalidArgument(
            f"input '{name}': data is not nested as its shape {shape_text(shape)} says; "
            "send it flat, or as lists of lists of those sizes",
            reason="BAD_DATA",
        )
    for item in data:
        if nested:
            yield from _flatten(name, item, shape, depth + 1)
        else:
            yield item


def pack_list(name: str, datatype: str, data: Sequence[Any], shape: Sequence[int]) -> bytes:
    """The raw bytes of a tensor sent as a list, flat or nested.

    Raises InvalidArgument when the count is wrong or an element does not fit the datatype: nothing is
    rounded or cut except what a float of that width rounds.
    """
    count = element_count(name, shape)
    flat = list(_flatten(name, data, shape))
    if len(flat) != count:
        raise InvalidArgument(
            f"input '{name}': shape {shape_text(shape)} holds {count} elements, data has {len(flat)}",
            reason="BAD_DATA",
        )
    try:
        return _pack_flat(datatype, flat)
    except (struct.error, OverflowError, TypeError, UnicodeEncodeError) as e:
        raise InvalidArgument(
            f"input '{name}': an element of data is not a {datatype}: {e}", reason="BAD_DATA"
        ) from None


def _pack_flat(datatype: str, flat: list[Any]) -> bytes:
    if datatype == "BYTES":
        parts = []
        for item in flat:
            raw = item.encode() if isinstance(item, str) else item
            if not isinstance(raw, bytes):
                raise TypeError(f"{type(item).__name__} where str or bin is needed")
            parts.append(struct.pack("<I", len(raw)) + raw)
        return b"".join(parts)
    if datatype == "BOOL":
        for item in flat:
            if not isinstance(item, bool) and (type(item) is not int or item not in (0, 1)):
                raise TypeError(f"{type(item).__name__} where true or false is needed")
        return bytes(1 if item else 0 for item in flat)
    if datatype == "BF16":
        return b"".join([struct.pack("<H", _bf16(item)) for item in flat])
    return struct.pack(f"<{len(flat)}{_STRUCT_CODE[datatype]}", *flat)


def _bf16(value: float) -> int:
    """The upper half of the FP32 pattern, rounded to nearest even; NaN stays NaN."""
    bits = int.from_bytes(struct.pack("<f", value), "little")
    if value != value:
        return (bits >> 16) | 0x0040
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF
