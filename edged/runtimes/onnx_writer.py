"""An ONNX file of a single operator, or of a few, written without the `onnx` package.

The package that builds models is not installed where models run. What is written here proves that a device
runs (`tiny`) and that two runtimes answer one operator alike (`trials`). Owns the protobuf form of what is
written (onnx.proto, IR version 8); reading is `onnx_graph`'s. Runs on Python 3.10 too.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edged.runtimes.onnx_graph import DATATYPES

__all__ = ["Attribute", "Operator", "Port", "write_model"]

IR_VERSION = 8
"""Of 2021: initializers are no inputs, and every runtime of the last years reads it."""

NUMBERS = {datatype: number for number, datatype in DATATYPES.items()}
"""TensorProto.DataType by the protocol's name."""

Attribute = int | float | str | tuple[Any, ...] | np.ndarray
"""A tuple holds numbers of one kind or strings; an array is a tensor."""


@dataclass(frozen=True)
class Port:
    """An input or output of the graph; no shape where it is None."""

    name: str
    datatype: str
    shape: tuple[int | None, ...] | None = None


@dataclass(frozen=True)
class Operator:
    """A node. A name of ``""`` leaves an input or output out."""

    op: str
    inputs: Sequence[str]
    outputs: Sequence[str]
    attributes: Mapping[str, Attribute] = field(default_factory=dict)
    domain: str = ""


def write_model(
    nodes: Iterable[Operator],
    *,
    inputs: Iterable[Port],
    outputs: Iterable[Port],
    constants: Mapping[str, tuple[str, np.ndarray]],
    opsets: Mapping[str, int],
    ir_version: int = IR_VERSION,
) -> bytes:
    """The file's bytes. `constants` are (datatype, values) by name; BF16's values are its bits."""
    graph = b"".join(
        (
            *(_field(1, _node(node)) for node in nodes),
            _field(2, b"graph"),
            *(_field(5, _tensor(name, *constant)) for name, constant in constants.items()),
            *(_field(11, _value(port)) for port in inputs),
            *(_field(12, _value(port)) for port in outputs),
        )
    )
    imports = (_field(8, _field(1, domain.encode()) + _number(2, n)) for domain, n in opsets.items())
    return _number(1, ir_version) + _field(7, graph) + b"".join(imports)


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1  # a negative number is written as its two's complement
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*out, value))


def _number(field_number: int, value: int) -> bytes:
    return _varint(field_number << 3) + _varint(value)


def _field(field_number: int, payload: bytes) -> bytes:
    return _varint(field_number << 3 | 2) + _varint(len(payload)) + payload


def _float(field_number: int, value: float) -> bytes:
    return _varint(field_number << 3 | 5) + struct.pack("<f", value)


def _node(node: Operator) -> bytes:
    return b"".join(
        (
            *(_field(1, name.encode()) for name in node.inputs),
            *(_field(2, name.encode()) for name in node.outputs),
            _field(4, node.op.encode()),
            *(_field(5, _attribute(name, value)) for name, value in node.attributes.items()),
            _field(7, node.domain.encode()),
        )
    )


def _attribute(name: str, value: Attribute) -> bytes:
    """The kinds of AttributeProto: FLOAT 1, INT 2, STRING 3, TENSOR 4, FLOATS 6, INTS 7, STRINGS 8."""
    if isinstance(value, float):
        kind, content = 1, _float(2, value)
    elif isinstance(value, int):
        kind, content = 2, _number(3, value)
    elif isinstance(value, str):
        kind, content = 3, _field(4, value.encode())
    elif isinstance(value, np.ndarray):
        kind, content = 4, _field(5, _tensor("", _datatype(value), value))
    elif any(isinstance(each, float) for each in value):
        kind, content = 6, b"".join(_float(7, each) for each in value)
    elif any(isinstance(each, str) for each in value):
        kind, content = 8, b"".join(_field(9, each.encode()) for each in value)
    else:
        kind, content = 7, b"".join(_number(8, each) for each in value)
    return _field(1, name.encode()) + content + _number(20, kind)


def _datatype(values: np.ndarray) -> str:
    names = {"f4": "FP32", "f8": "FP64", "f2": "FP16", "i8": "INT64", "i4": "INT32", "i2": "INT16"}
    names |= {"i1": "INT8", "u1": "UINT8", "u2": "UINT16", "u4": "UINT32", "u8": "UINT64", "b1": "BOOL"}
    return names[values.dtype.str[1:]]


def _tensor(name: str, datatype: str, values: np.ndarray) -> bytes:
    dims = b"".join(_number(1, size) for size in values.shape)
    raw = np.ascontiguousarray(values).tobytes()
    return dims + _number(2, NUMBERS[datatype]) + _field(8, name.encode()) + _field(9, raw)


def _value(port: Port) -> bytes:
    tensor = _number(1, NUMBERS[port.datatype])
    if port.shape is not None:
        tensor += _field(2, b"".join(_field(1, b"" if d is None else _number(1, d)) for d in port.shape))
    return _field(1, port.name.encode()) + _field(2, _field(1, tensor))
