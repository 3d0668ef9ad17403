"""What a runtime does not tell of an ONNX file.

Which inputs may be read while somebody else writes to them: those whose numbers cannot lead an operator
anywhere (`steady_inputs`). And which inputs and outputs have no declared rank (`unranked`): its Python
interface shows a tensor of any rank and a scalar alike, with the shape []. The file tells them apart: one has
no shape at all, the other a shape of no dimensions (onnx.proto, `TypeProto.Tensor.shape`). And what the free
dimensions are called (`dim_names`), which OpenVINO forgets.

So this walks the file's outer fields, skipping what it does not want by its length. It never builds the
model, and takes a file that it cannot walk for one that says nothing: the runtime has loaded it.

Runs on Python 3.10 too.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

__all__ = ["dim_names", "steady_inputs", "unranked"]

# Field numbers of onnx.proto.
_MODEL_GRAPH = 7
_GRAPH_NODE, _GRAPH_INPUT, _GRAPH_OUTPUT = 1, 11, 12
_NODE_INPUT, _NODE_OUTPUT, _NODE_OP, _NODE_ATTRIBUTE, _NODE_DOMAIN = 1, 2, 4, 5, 7
_ATTRIBUTE_GRAPHS = (6, 11)
_VALUE_NAME, _VALUE_TYPE = 1, 2
_TYPE_TENSOR = 1
_TENSOR_SHAPE = 2
_SHAPE_DIM = 1
_DIM_PARAM = 2

_COMPUTE = frozenset(
    b"Conv ConvTranspose Gemm MatMul AveragePool GlobalAveragePool GlobalMaxPool MaxPool BatchNormalization "
    b"InstanceNormalization LayerNormalization Sigmoid Tanh Softmax Exp Sqrt LSTM GRU".split()
)
"""What they read decides what they compute, never where they read; and their outputs are new memory."""

_PASS = frozenset(
    b"Identity Reshape Flatten Squeeze Unsqueeze Dropout Transpose Cast Add Sub Mul Div Relu LeakyRelu Clip "
    b"Neg Concat Split Slice Pad Expand QuantizeLinear DequantizeLinear".split()
)
"""Likewise, but a runtime may leave them out, or make input and output one: what they feed counts too."""

# Wire types of protobuf.
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def unranked(path: str) -> frozenset[str]:
    """The graph's inputs and outputs that are tensors without a declared rank."""
    with Path(path).open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            return frozenset(_unranked(data))
        except (IndexError, ValueError):
            return frozenset()


def dim_names(path: str) -> dict[str, tuple[str | None, ...]]:
    """For each of the graph's inputs and outputs that has a rank, what its free dimensions are called."""
    with Path(path).open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            return dict(_dim_names(data))
        except (IndexError, ValueError):
            return {}


def steady_inputs(path: str) -> frozenset[str]:
    """The graph's inputs of which every number may change at any moment of a run without harm.

    A sort that finds its numbers changed leaves its bounds, and so does an index that was checked before; a
    convolution or a product only computes something else. So these are the inputs that reach nothing but
    operators of the second kind.
    """
    with Path(path).open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            return frozenset(name.decode() for name in _steady(data))
        except (IndexError, ValueError):
            return frozenset()


def _steady(data: mmap.mmap) -> set[bytes]:
    graphs = [(at, end) for field, at, end in _fields(data, 0, len(data)) if field == _MODEL_GRAPH]
    inputs: set[bytes] = set()
    for graph in graphs:
        for field, at, end in _fields(data, *graph):
            if field == _GRAPH_INPUT:
                inputs.update(data[a:b] for number, a, b in _fields(data, at, end) if number == _VALUE_NAME)
    origins = {name: {name} for name in inputs}
    """By a tensor's name, the inputs that it may be."""
    unsteady: set[bytes] = set()
    for graph in graphs:
        for field, at, end in _fields(data, *graph):
            if field == _GRAPH_NODE:
                unsteady |= _misled(data, at, end, origins)
    return inputs - unsteady


def _misled(data: mmap.mmap, at: int, end: int, origins: dict[bytes, set[bytes]]) -> set[bytes]:
    """The inputs that may mislead a node; what it passes on is added to `origins`."""
    parts = list(_fields(data, at, end))
    read: set[bytes] = set()
    for number, a, b in parts:
        if number == _NODE_INPUT:
            read |= origins.get(data[a:b], set())
        elif number == _NODE_ATTRIBUTE:
            for kind, graph_at, graph_end in _fields(data, a, b):
                if kind in _ATTRIBUTE_GRAPHS:
                    # It sees the tensors around it. Where a name's bytes stand it may be meant.
                    read |= _mentioned(data, graph_at, graph_end, origins)
    if not read:
        return read
    op = b"".join(data[a:b] for number, a, b in parts if number == _NODE_OP)
    domain = b"".join(data[a:b] for number, a, b in parts if number == _NODE_DOMAIN)
    if domain not in (b"", b"ai.onnx") or op not in _COMPUTE | _PASS:
        return read
    if op in _PASS:
        for number, a, b in parts:
            if number == _NODE_OUTPUT:
                origins[data[a:b]] = origins.get(data[a:b], set()) | read
    return set()


def _mentioned(data: mmap.mmap, at: int, end: int, origins: dict[bytes, set[bytes]]) -> set[bytes]:
    return {o for name, found in origins.items() if data.find(name, at, end) >= 0 for o in found}


def _unranked(data: mmap.mmap) -> Iterator[str]:
    for name, at, end in _values(data):
        if not _ranked(data, at, end):
            yield name


def _dim_names(data: mmap.mmap) -> Iterator[tuple[str, tuple[str | None, ...]]]:
    for name, at, end in _values(data):
        shapes = [
            shape
            for number, a, b in _fields(data, at, end)
            if number == _TYPE_TENSOR
            for field, *shape in _fields(data, a, b)
            if field == _TENSOR_SHAPE
        ]
        for shape_at, shape_end in shapes:
            dims = [(a, b) for number, a, b in _fields(data, shape_at, shape_end) if number == _SHAPE_DIM]
            yield name, tuple(_dim_name(data, a, b) for a, b in dims)


def _dim_name(data: mmap.mmap, at: int, end: int) -> str | None:
    names = [
        data[a:b].decode("utf-8", "replace")
        for number, a, b in _fields(data, at, end)
        if number == _DIM_PARAM
    ]
    return names[-1] if names and names[-1] else None


def _values(data: mmap.mmap) -> Iterator[tuple[str, int, int]]:
    """Each input and output of the graph that has a name and a type, and where the type lies."""
    for field, graph_at, graph_end in _fields(data, 0, len(data)):
        if field != _MODEL_GRAPH:
            continue
        for kind, at, end in _fields(data, graph_at, graph_end):
            if kind in (_GRAPH_INPUT, _GRAPH_OUTPUT):
                value = {number: (a, b) for number, a, b in _fields(data, at, end)}
                if _VALUE_NAME in value and _VALUE_TYPE in value:
                    name_at, name_end = value[_VALUE_NAME]
                    yield data[name_at:name_end].decode("utf-8", "replace"), *value[_VALUE_TYPE]


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
