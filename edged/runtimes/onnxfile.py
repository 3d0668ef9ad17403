"""What ONNX Runtime does not tell of an ONNX file: which inputs and outputs have no declared rank.

Its Python interface shows a tensor of any rank and a scalar alike, with the shape []. The file tells them
apart: one has no shape at all, the other a shape of no dimensions (onnx.proto, `TypeProto.Tensor.shape`). So
this walks the file's outermost fields, skipping every node and weight by its length. It never builds the
model, and takes a file that it cannot walk for one that says nothing: the runtime has loaded it.

Runs on Python 3.10 too.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

__all__ = ["unranked"]

# Field numbers of onnx.proto.
_MODEL_GRAPH = 7
_GRAPH_INPUT, _GRAPH_OUTPUT = 11, 12
_VALUE_NAME, _VALUE_TYPE = 1, 2
_TYPE_TENSOR = 1
_TENSOR_SHAPE = 2

# Wire types of protobuf.
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def unranked(path: str) -> frozenset[str]:
    """The graph's inputs and outputs that are tensors without a declared rank."""
    with Path(path).open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            return frozenset(_unranked(data))
        except (IndexError, ValueError):
            return frozenset()


def _unranked(data: mmap.mmap) -> Iterator[str]:
    for field, graph_at, graph_end in _fields(data, 0, len(data)):
        if field != _MODEL_GRAPH:
            continue
        for kind, at, end in _fields(data, graph_at, graph_end):
            if kind in (_GRAPH_INPUT, _GRAPH_OUTPUT):
                value = {number: (a, b) for number, a, b in _fields(data, at, end)}
                if _VALUE_NAME in value and _VALUE_TYPE in value and not _ranked(data, *value[_VALUE_TYPE]):
                    name_at, name_end = value[_VALUE_NAME]
                    yield data[name_at:name_end].decode("utf-8", "replace")


def _ranked(data: mmap.mmap, at: int, end: int) -> bool:
    """Whether a type is something else than a tensor of any rank."""
    for number, a, b in _fields(data, at, end):
        if number == _TYPE_TENSOR:
            return any(field == _TENSOR_SHAPE for field, _, _ in _fields(data, a, b))
    return True


def _fields(data: mmap.mmap, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Each field's number, and where its content lies."""
    while at < end:
        key, at = _varint(data, at)
        wire = key & 7
        if wire == _BYTES:
            length, at = _varint(data, at)
        elif wire == _VARINT:
            _, after = _varint(data, at)
            length = after - at
        elif wire in (_FIXED64, _FIXED32):
            length = 8 if wire == _FIXED64 else 4
        else:
            raise ValueError("a wire type that ONNX does not use")
        if at + length > end:
            raise ValueError("a field that ends behind its message")
        yield key >> 3, at, at + length
        at += length


def _varint(data: mmap.mmap, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than 64 bits")
