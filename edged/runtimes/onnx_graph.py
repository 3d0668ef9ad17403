"""An ONNX file as a graph that can be reasoned about, read without the `onnx` package.

The package that reads such files is not installed where models run, and a runtime tells little of what it
loaded. So this reads the file's protobuf form itself (onnx.proto, IR version 3 and later): nodes with their
attributes and subgraphs, the small constants, declared shapes. Large weights are skipped by their length: a
file of a gigabyte costs as much as its nodes.

It also answers what needs nothing more: which inputs may be read while somebody else writes to them
(`steady_inputs`); which tensors have no declared rank (`unranked`), since ONNX Runtime's Python interface
shows those like scalars; and what the file says of itself (`metadata`), for a runtime that does not tell it.

A file that cannot be read so raises ValueError: the runtime may have taken it, but nothing is known about it.
Owns the reading; what follows from a graph is decided elsewhere. Runs on Python 3.10 too.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

__all__ = [
    "Constant",
    "Graph",
    "Node",
    "ValueInfo",
    "metadata",
    "read_graph",
    "seen_by",
    "steady_inputs",
    "unranked",
]

VALUES_MAX = 4096
"""Elements of a constant whose values are kept: sizes and axes have a few, weights have more."""

NODES_MAX = 200_000
"""With those of subgraphs and of functions that are written out. The largest networks have some thousand."""

DEPTH_MAX = 32
"""Of subgraphs in subgraphs and functions in functions."""

DATATYPES = {
    1: "FP32",
    2: "UINT8",
    3: "INT8",
    4: "UINT16",
    5: "INT16",
    6: "INT32",
    7: "INT64",
    8: "BYTES",
    9: "BOOL",
    10: "FP16",
    11: "FP64",
    12: "UINT32",
    13: "UINT64",
    16: "BF16",
}
"""TensorProto.DataType and the protocol's name of it; what is not in here is shown as ``""``."""

_NUMPY: dict[str, str] = {
    "FP32": "<f4",
    "UINT8": "u1",
    "INT8": "i1",
    "UINT16": "<u2",
    "INT16": "<i2",
    "INT32": "<i4",
    "INT64": "<i8",
    "BOOL": "?",
    "FP16": "<f2",
    "FP64": "<f8",
    "UINT32": "<u4",
    "UINT64": "<u8",
}

Dimension = int | str | None
"""A size, a symbol's name, or None for one of which nothing is said."""


@dataclass(frozen=True)
class Constant:
    """A tensor of the file. `values` is None where it is large, external or of a type that numpy lacks, or
    booleans that are neither 0 nor 1."""

    datatype: str
    shape: tuple[int, ...]
    values: Any = None


@dataclass(frozen=True)
class ValueInfo:
    """What is declared of a tensor: `shape` is None where nothing is, and so for what is no tensor."""

    name: str
    kind: str
    """``tensor``, ``sequence``, ``map``, ``optional``, ``sparse`` or ``""``."""
    datatype: str = ""
    shape: tuple[Dimension, ...] | None = None


@dataclass(frozen=True)
class Node:
    """An operator at work. An input or output that is left out has the name ``""``."""

    op: str
    domain: str
    """``""`` for ONNX's own operators, whose other spelling is ``ai.onnx``."""
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]
    """int, float, str or bytes (what is not UTF-8), `Constant`, `Graph`, or a tuple of one of these."""

    @property
    def label(self) -> str:
        """What people find the node by."""
        return f"{self.op} '{self.name or (self.outputs[0] if self.outputs else '')}'"

    def integer(self, name: str) -> int:
        """An attribute that is a whole number, 0 where it is left out or is none."""
        value = self.attributes.get(name)
        return value if isinstance(value, int) else 0

    @property
    def graphs(self) -> tuple[Graph, ...]:
        """Its subgraphs."""
        found: list[Graph] = []
        for value in self.attributes.values():
            found += [
                each for each in (value if isinstance(value, tuple) else (value,)) if isinstance(each, Graph)
            ]
        return tuple(found)


@dataclass(frozen=True)
class Graph:
    """A graph; functions of the file are written out in the place of the nodes that call them."""

    nodes: tuple[Node, ...]
    initializers: Mapping[str, Constant]
    inputs: tuple[ValueInfo, ...]
    """As the file lists them: older files list initializers among them, which are then optional inputs."""
    outputs: tuple[ValueInfo, ...]
    opsets: Mapping[str, int]
    """Versions by domain; those of the model, in subgraphs too."""


@dataclass(frozen=True)
class _Function:
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[Node, ...]
    defaults: Mapping[str, Any]


@dataclass(frozen=True)
class _Reference:
    """An attribute of a function's node that stands for one of the function's own."""

    name: str


def read_graph(path: str) -> Graph:
    """The main graph of an ONNX file.

    Raises ValueError for what is no such file or is beyond the bounds above, OSError where it cannot be read.
    """
    return _read(path, _Reader.model)


def metadata(path: str) -> tuple[dict[str, str], dict[str, str]]:
    """The file's fields and its own metadata, as ONNX Runtime tells them; empty for an unreadable file."""
    try:
        return _read(path, _Reader.metadata)
    except ValueError:
        return {}, {}


_T = TypeVar("_T")


def _read(path: str, what: Callable[[_Reader], _T]) -> _T:
    with Path(path).open("rb") as f:
        try:
            data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError as e:  # an empty file cannot be mapped
            raise ValueError("the file is empty") from e
        with data:
            try:
                return what(_Reader(data))
            except (LookupError, struct.error, UnicodeDecodeError, OverflowError) as e:
                raise ValueError(f"not a readable ONNX file: {e}") from e


# ------------------------------------------------------------------ protobuf

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
"""Wire types of protobuf."""

_Span = tuple[int, int]
_Fields = Mapping[int, "list[tuple[int, int, int]]"]


class _Reader:
    """Walks one mapped file. Field numbers are those of onnx.proto."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._nodes = 0

    # Fields.

    def _fields(self, spans: Sequence[_Span]) -> dict[int, list[tuple[int, int, int]]]:
        """By number, each occurrence's wire type and where it lies.

        A singular message that stands twice is one message whose fields are those of both, so several
        spans can make one message.
        """
        found: dict[int, list[tuple[int, int, int]]] = {}
        for at, end in spans:
            for number, wire, a, b in self._walk(at, end):
                found.setdefault(number, []).append((wire, a, b))
        return found

    def _walk(self, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
        data = self._data
        while at < end:
            key, at = self._varint(at)
            if not 8 <= key < 1 << 32:
                raise ValueError("a field's number that is none")
            wire = key & 7
            if wire == _BYTES:
                length, at = self._varint(at)
            elif wire == _VARINT:
                length = self._varint(at)[1] - at
            elif wire in (_FIXED64, _FIXED32):
                length = 8 if wire == _FIXED64 else 4
            else:
                raise ValueError("a wire type that ONNX does not use")
            if at + length > end or at + length > len(data):
                raise ValueError("a field that ends behind its message")
            yield key >> 3, wire, at, at + length
            at += length

    def _varint(self, at: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            byte = self._data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value & 0xFFFFFFFFFFFFFFFF, at
            shift += 7
            if shift > 63:
                raise ValueError("a number of more than 64 bits")

    def _one(self, occurrences: Sequence[tuple[int, int, int]]) -> int:
        """A number that stands once. The last is the one that counts."""
        if any(wire != _VARINT for wire, _, _ in occurrences):
            raise ValueError("a number of another kind than ONNX has it")
        return self._int(occurrences[-1][1])

    def _kind(self, occurrences: Sequence[tuple[int, int, int]]) -> int:
        """One of an enumeration, of which protobuf reads 32 bits."""
        found = self._one(occurrences)
        if not 0 <= found < 1 << 31:
            raise ValueError("a type that is none")
        return found

    def _int(self, at: int) -> int:
        value = self._varint(at)[0]
        return value - (1 << 64) if value >= 1 << 63 else value

    def _ints(self, occurrences: Sequence[tuple[int, int, int]]) -> list[int]:
        """A repeated number, packed or not."""
        found = []
        for wire, a, b in occurrences:
            if wire == _VARINT:
                found.append(self._int(a))
                continue
            if wire != _BYTES:
                raise ValueError("a number of another kind than ONNX has it")
            while a < b:
                found.append(self._int(a))
                a = self._varint(a)[1]
        return found

    def _floats(self, occurrences: Sequence[tuple[int, int, int]], form: str = "f") -> list[float]:
        found: list[float] = []
        for wire, a, b in occurrences:
            if wire not in (_BYTES, _FIXED32 if form == "f" else _FIXED64):
                raise ValueError("a number of another kind than ONNX has it")
            found += [each for (each,) in struct.iter_unpack("<" + form, self._data[a:b])]
        return found

    def _text(self, fields: Mapping[int, list[tuple[int, int, int]]], number: int) -> str:
        found = self._texts(fields.get(number, ()))
        return found[-1] if found else ""

    def _texts(self, occurrences: Sequence[tuple[int, int, int]]) -> tuple[str, ...]:
        return tuple(self._data[a:b].decode() for a, b in self._spans(occurrences))

    @staticmethod
    def _spans(occurrences: Sequence[tuple[int, int, int]]) -> list[_Span]:
        if any(wire != _BYTES for wire, _, _ in occurrences):
            raise ValueError("a message of another kind than ONNX has it")
        return [(a, b) for _, a, b in occurrences]

    # Messages.

    def model(self) -> Graph:
        fields = self._fields([(0, len(self._data))])
        if 7 not in fields:
            raise ValueError("not a readable ONNX file: it has no graph")
        opsets = self._opsets(fields.get(8, ()))
        graph = self._graph(self._spans(fields[7]), opsets, 0)
        functions = {}
        for span in self._spans(fields.get(25, ())):
            key, function = self._function(span, opsets.get(""))
            functions[key] = function
        _check_order(graph)
        if functions:
            graph = _written_out(graph, functions)
            _check_order(graph)  # names that a body's nodes were given may be the file's too
        return graph

    def metadata(self) -> tuple[dict[str, str], dict[str, str]]:
        """Producer and the like by ONNX Runtime's names, and the pairs that are the file's own."""
        fields = self._fields([(0, len(self._data))])
        graph = self._fields(self._spans(fields.get(7, ())))
        texts = {name: (fields, at) for at, name in _MODEL_TEXTS}
        texts |= {name: (graph, at) for at, name in _GRAPH_TEXTS}
        found = {name: self._any_text(*where) for name, where in texts.items() if where[1] in where[0]}
        version = self._int(fields[5][-1][1]) if 5 in fields else -1
        if version >= 0:
            found["version"] = str(version)
        own = {}
        for span in self._spans(fields.get(14, ())):
            entry = self._fields([span])
            own[self._any_text(entry, 1)] = self._any_text(entry, 2)
        return found, own

    def _any_text(self, fields: _Fields, number: int) -> str:
        """A text of which no byte is lost where it is not UTF-8."""
        if number not in fields:
            return ""
        _, a, b = fields[number][-1]
        return self._data[a:b].decode("utf-8", "backslashreplace")

    def _opsets(self, occurrences: Sequence[tuple[int, int, int]]) -> dict[str, int]:
        found: dict[str, int] = {}
        for span in self._spans(occurrences):
            fields = self._fields([span])
            domain, version = _domain(self._text(fields, 1)), self._one(fields[2]) if 2 in fields else 0
            if found.setdefault(domain, version) != version:
                raise ValueError(f"two versions of the domain '{domain}'")
        return found

    def _graph(self, spans: Sequence[_Span], opsets: Mapping[str, int], depth: int) -> Graph:
        if depth > DEPTH_MAX:
            raise ValueError(f"subgraphs deeper than {DEPTH_MAX}")
        fields = self._fields(spans)
        initializers = {}
        for span in self._spans(fields.get(5, ())):
            name, constant = self._tensor([span])
            if name in initializers:
                raise ValueError(f"constant '{name}' stands twice")
            initializers[name] = constant
        for span in self._spans(fields.get(15, ())):
            name, constant = self._sparse([span])
            if name in initializers:
                raise ValueError(f"constant '{name}' stands twice")
            initializers[name] = constant
        return Graph(
            nodes=tuple(self._node(span, opsets, depth) for span in self._spans(fields.get(1, ()))),
            initializers=initializers,
            inputs=tuple(self._value(span) for span in self._spans(fields.get(11, ()))),
            outputs=tuple(self._value(span) for span in self._spans(fields.get(12, ()))),
            opsets=opsets,
        )

    def _function(self, span: _Span, version: int | None) -> tuple[tuple[str, str, str], _Function]:
        fields = self._fields([span])
        opsets = self._opsets(fields.get(9, ()))
        defaults: dict[str, Any] = {}
        for attribute in self._spans(fields.get(11, ())):
            name, value = self._attribute([attribute], opsets, 1)
            defaults[name] = value
        key = (_domain(self._text(fields, 10)), self._text(fields, 1), self._text(fields, 13))
        if key[0] in _STANDARD:
            raise ValueError(f"a function that has the name of a runtime's own operator: {key[1]}")
        if opsets.get("", version) != version:
            raise ValueError(f"function {key[1]} is of another version of the operators than the model")
        return key, _Function(
            inputs=self._texts(fields.get(4, ())),
            outputs=self._texts(fields.get(5, ())),
            nodes=tuple(self._node(each, opsets, 1) for each in self._spans(fields.get(7, ()))),
            defaults=defaults,
        )

    def _node(self, span: _Span, opsets: Mapping[str, int], depth: int) -> Node:
        self._nodes += 1
        if self._nodes > NODES_MAX:
            raise ValueError(f"more than {NODES_MAX} nodes")
        fields = self._fields([span])
        attributes: dict[str, Any] = {}
        for attribute in self._spans(fields.get(5, ())):
            name, value = self._attribute([attribute], opsets, depth)
            if name in attributes:
                raise ValueError(f"attribute '{name}' stands twice")
            attributes[name] = value
        return Node(
            op=self._text(fields, 4),
            domain=_domain(self._text(fields, 7)),
            name=self._text(fields, 3),
            inputs=self._texts(fields.get(1, ())),
            outputs=self._texts(fields.get(2, ())),
            attributes=attributes,
        )

    def _attribute(self, spans: Sequence[_Span], opsets: Mapping[str, int], depth: int) -> tuple[str, Any]:
        fields = self._fields(spans)
        name = self._text(fields, 1)
        if 21 in fields:
            return name, _Reference(self._text(fields, 21))
        kind = self._kind(fields[20]) if 20 in fields else _kind_of(fields)
        if kind == 1:
            if any(wire != _FIXED32 for wire, _, _ in fields.get(2, ())):
                raise ValueError("a number of another kind than ONNX has it")
            return name, self._floats(fields[2])[-1] if 2 in fields else 0.0
        if kind == 2:
            return name, self._one(fields[3]) if 3 in fields else 0
        if kind == 3:
            return name, _text_or_bytes(self._data[slice(*self._spans(fields[4])[-1])]) if 4 in fields else ""
        if kind == 4:
            return name, self._tensor(self._spans(fields[5]))[1]
        if kind == 5:
            return name, self._graph(self._spans(fields[6]), opsets, depth + 1)
        if kind == 6:
            return name, tuple(self._floats(fields.get(7, ())))
        if kind == 7:
            return name, tuple(self._ints(fields.get(8, ())))
        if kind == 8:
            return name, tuple(_text_or_bytes(self._data[a:b]) for a, b in self._spans(fields.get(9, ())))
        if kind == 9:
            return name, tuple(self._tensor([span])[1] for span in self._spans(fields.get(10, ())))
        if kind == 10:
            spans = self._spans(fields.get(11, ()))
            return name, tuple(self._graph([span], opsets, depth + 1) for span in spans)
        if kind == 11:
            return name, self._sparse(self._spans(fields[22]))[1]
        if kind in _OF_TYPES:
            return name, None  # known to be there, and no more
        raise ValueError(f"attribute '{name}' is of an unknown type")

    def _tensor(self, spans: Sequence[_Span]) -> tuple[str, Constant]:
        fields = self._fields(spans)
        datatype = DATATYPES.get(self._kind(fields[2]) if 2 in fields else 0, "")
        shape = tuple(self._ints(fields.get(1, ())))
        if any(size < 0 for size in shape):
            raise ValueError("a constant with a negative size")
        values = None if 13 in fields else self._values(fields, datatype, shape)
        return self._text(fields, 8), Constant(datatype, shape, values)

    def _values(
        self, fields: Mapping[int, list[tuple[int, int, int]]], datatype: str, shape: tuple[int, ...]
    ) -> Any:
        count = 1
        for size in shape:
            count *= size
        if count > VALUES_MAX or datatype not in _NUMPY:
            return None
        dtype = np.dtype(_NUMPY[datatype])
        if 9 in fields:
            a, b = self._spans(fields[9])[-1]
            if datatype == "BOOL" and not {*self._data[a:b]} <= {0, 1}:
                return None  # whether it is true, and as which number, is the runtime's
            values = np.frombuffer(self._data[a:b], dtype)
        elif datatype == "FP32":
            values = np.array(self._floats(fields.get(4, ())), dtype)
        elif datatype == "FP64":
            values = np.array(self._floats(fields.get(10, ()), "d"), dtype)
        elif datatype == "FP16":
            bits = [each & 0xFFFF for each in self._ints(fields.get(5, ()))]
            values = np.array(bits, "<u2").view(dtype)
        else:
            number = {"INT64": 7, "UINT64": 11, "UINT32": 11}.get(datatype, 5)
            whole = self._ints(fields.get(number, ()))
            if datatype == "BOOL" and not {*whole} <= {0, 1}:
                return None
            mask = (1 << 8 * dtype.itemsize) - 1
            raw = b"".join((each & mask).to_bytes(dtype.itemsize, "little") for each in whole)
            values = np.frombuffer(raw, dtype)
        if values.size != count:
            raise ValueError("a constant that has not as many values as its shape says")
        return values.reshape(shape)

    def _sparse(self, spans: Sequence[_Span]) -> tuple[str, Constant]:
        fields = self._fields(spans)
        name, values = self._tensor(self._spans(fields.get(1, ())))
        return name, Constant(values.datatype, tuple(self._ints(fields.get(3, ()))))

    def _value(self, span: _Span) -> ValueInfo:
        fields = self._fields([span])
        name = self._text(fields, 1)
        kinds = self._fields(self._spans(fields.get(2, ())))
        kind, *others = [k for number, k in _TYPES.items() if number in kinds] or [""]
        if others:
            raise ValueError(f"'{name}' has two types")
        if kind != "tensor":
            return ValueInfo(name, kind)
        tensor = self._fields(self._spans(kinds[1]))
        datatype = DATATYPES.get(self._kind(tensor[1]) if 1 in tensor else 0, "")
        if 2 not in tensor:
            return ValueInfo(name, kind, datatype)
        dims = self._fields(self._spans(tensor[2])).get(1, ())
        return ValueInfo(name, kind, datatype, tuple(self._dimension(each) for each in self._spans(dims)))

    def _dimension(self, span: _Span) -> Dimension:
        fields = self._fields([span])
        if 1 in fields and 2 in fields:
            raise ValueError("a dimension that is a number and a name")
        if 1 in fields:
            size = self._one(fields[1])
            return size if size >= 0 else None
        return self._text(fields, 2) or None


_STANDARD = ("", "ai.onnx.ml", "ai.onnx.training", "ai.onnx.preview.training", "com.microsoft")
"""Domains of which a runtime has kernels of its own: with a function of the same name one must guess."""

_MODEL_TEXTS = ((2, "producer_name"), (4, "domain"), (6, "description"))
_GRAPH_TEXTS = ((2, "graph_name"), (10, "graph_description"))
"""Fields of ModelProto and GraphProto, and ONNX Runtime's names for them."""

_TYPES = {1: "tensor", 4: "sequence", 5: "map", 9: "optional", 8: "sparse"}
"""The fields of TypeProto."""


_OF_TYPES = (12, 13, 14)
"""SPARSE_TENSORS, TYPE_PROTO and TYPE_PROTOS of AttributeProto.AttributeType."""


def _kind_of(fields: Mapping[int, Any]) -> int:
    """An attribute's type where the file does not say it, as files before IR version 3 do not."""
    order = {2: 1, 3: 2, 4: 3, 5: 4, 6: 5, 7: 6, 8: 7, 9: 8, 10: 9, 11: 10, 22: 11}
    return next((kind for number, kind in order.items() if number in fields), 0)


def _check_order(graph: Graph) -> None:
    """Raises ValueError where a node reads what a later one writes, or two write the same.

    ONNX wants nodes in an order in which they can be run, and every name written once. Walking a graph once,
    from its start to its end, relies on that.
    """
    later = [name for node in graph.nodes for name in node.outputs if name]
    unwritten = set(later)
    if len(unwritten) != len(later) or not unwritten.isdisjoint(graph.initializers):
        raise ValueError("a tensor is written twice")
    for node in graph.nodes:
        early = unwritten.intersection(
            (*node.inputs, *(name for sub in node.graphs for name in seen_by(sub)))
        )
        if early:
            raise ValueError(f"{node.label} reads '{min(early)}' before it is written")
        for sub in node.graphs:
            _check_order(sub)
        unwritten.difference_update(node.outputs)


def _domain(text: str) -> str:
    return "" if text == "ai.onnx" else text


def _text_or_bytes(raw: bytes) -> str | bytes:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw


# ------------------------------------------------------------------ functions

_Functions = Mapping[tuple[str, str, str], _Function]


def _written_out(graph: Graph, functions: _Functions) -> Graph:
    """The graph with the bodies of functions in place of their calls."""
    return _Writer(functions).graph(graph, 0)


class _Writer:
    def __init__(self, functions: _Functions) -> None:
        self._functions = functions
        self._names = {(domain, name) for domain, name, _ in functions}
        self._calls = 0
        self._nodes = 0

    def graph(self, graph: Graph, depth: int) -> Graph:
        return replace(graph, nodes=tuple(self._nodes_of(graph.nodes, depth)))

    def _nodes_of(self, nodes: Sequence[Node], depth: int) -> Iterator[Node]:
        if depth > DEPTH_MAX:
            raise ValueError(f"functions deeper than {DEPTH_MAX}")
        for node in nodes:
            self._nodes += 1
            if self._nodes > NODES_MAX:
                raise ValueError(f"more than {NODES_MAX} nodes")
            if (node.domain, node.op) in self._names:
                yield from self._nodes_of(self._body(node), depth + 1)
            else:
                attributes = {name: self._value(value, depth) for name, value in node.attributes.items()}
                yield replace(node, attributes=attributes)

    def _value(self, value: Any, depth: int) -> Any:
        if isinstance(value, Graph):
            return self.graph(value, depth + 1)
        if isinstance(value, tuple) and any(isinstance(each, Graph) for each in value):
            return tuple(self._value(each, depth) for each in value)
        return value

    def _body(self, call: Node) -> list[Node]:
        found = [
            f for (domain, name, _), f in self._functions.items() if (domain, name) == (call.domain, call.op)
        ]
        if len(found) != 1:
            raise ValueError(f"function {call.op} has several forms")
        function = found[0]
        self._calls += 1
        names = dict.fromkeys(function.inputs, "")
        names.update(zip(function.inputs, call.inputs))  # noqa: B905 - inputs at the end may be left out
        own = dict(zip(function.outputs, call.outputs))  # noqa: B905 - likewise
        prefix = f"{call.op}#{self._calls}/"
        given = {**function.defaults, **call.attributes}
        return [_renamed(node, names, own, prefix, given) for node in function.nodes]


def _renamed(
    node: Node, names: dict[str, str], own: Mapping[str, str], prefix: str, given: Mapping[str, Any]
) -> Node:
    """A node of a function's body under the names of its call; what it writes is added to `names`."""
    inputs = tuple(name and names.get(name, prefix + name) for name in node.inputs)
    outputs = []
    for name in node.outputs:
        if name:
            names[name] = own.get(name) or prefix + name
        outputs.append(name and names[name])
    attributes: dict[str, Any] = {}
    for name, value in node.attributes.items():
        if isinstance(value, _Reference):
            if value.name not in given:
                continue  # an attribute that the call leaves out is left out here too
            value = given[value.name]
        elif _has_graph(value):
            # Its nodes see the names around it and references to attributes, at any depth.
            raise ValueError(f"a function with a subgraph in {node.op}")
        attributes[name] = value
    return replace(
        node, name=prefix + node.name, inputs=inputs, outputs=tuple(outputs), attributes=attributes
    )


def _has_graph(value: Any) -> bool:
    return any(isinstance(each, Graph) for each in (value if isinstance(value, tuple) else (value,)))


# ------------------------------------------------------------------ two questions

_COMPUTE = frozenset(
    {
        *("Conv", "ConvTranspose", "Gemm", "MatMul", "LSTM", "GRU"),
        *("AveragePool", "GlobalAveragePool", "GlobalMaxPool", "MaxPool"),
        *("BatchNormalization", "InstanceNormalization", "LayerNormalization"),
        *("Sigmoid", "Tanh", "Softmax", "Exp", "Sqrt"),
    }
)
"""What they read decides what they compute, never where they read; and their outputs are new memory."""

_PASS = frozenset(
    {
        *("Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Concat", "Split", "Slice"),
        *("Dropout", "Cast", "Add", "Sub", "Mul", "Div", "Relu", "LeakyRelu", "Clip", "Neg", "Pad", "Expand"),
        *("QuantizeLinear", "DequantizeLinear"),
    }
)
"""Likewise, but a runtime may leave them out, or make input and output one: what they feed counts too."""


def unranked(path: str) -> frozenset[str]:
    """The graph's inputs and outputs that have no declared rank; empty for an unreadable file."""
    try:
        graph = read_graph(path)
    except ValueError:
        return frozenset()
    both = (*graph.inputs, *graph.outputs)
    return frozenset(v.name for v in both if v.kind == "tensor" and v.shape is None)


def steady_inputs(graph: Graph) -> frozenset[str]:
    """The graph's inputs of which every number may change at any moment of a run without harm.

    A sort that finds its numbers changed leaves its bounds, and so does an index that was checked before; a
    convolution or a product only computes something else. So these are the inputs that reach nothing but
    operators of the second kind.
    """
    inputs = {value.name for value in graph.inputs}
    origins = {name: {name} for name in inputs}
    """By a tensor's name, the inputs that it may be."""
    unsteady: set[str] = set()
    for node in graph.nodes:
        read = {o for name in node.inputs for o in origins.get(name, ())}
        within = {o for sub in node.graphs for name in seen_by(sub) for o in origins.get(name, ())}
        unsteady |= within
        if node.domain or node.op not in _COMPUTE | _PASS:
            unsteady |= read
        elif node.op in _PASS:
            for name in node.outputs:
                origins[name] = origins.get(name, set()) | read
    return frozenset(inputs - unsteady)


def seen_by(graph: Graph) -> Iterator[str]:
    """The names that a subgraph reads from around it, at any depth, its outputs' too."""
    own = {*graph.initializers, *(value.name for value in graph.inputs)}
    own.update(name for node in graph.nodes for name in node.outputs)
    for name in (value.name for value in graph.outputs):
        if name not in own:
            yield name
    for node in graph.nodes:
        for name in (*node.inputs, *(each for sub in node.graphs for each in seen_by(sub))):
            if name not in own:
                yield name
