"""What stands against moving a model to another runtime, as far as its graph says.

A model may be moved by itself only where each operator between an input and an output is one on which the two
runtimes were shown to agree (`runtimes.operators`). This walks the graph once and says what is not so, and
what would change it. It runs nothing: what the model itself answers is `measuring`'s to compare.

What is computed from shapes alone is not between an input and an output: it is as large as tensors get, and
no number of a request leads there. Nor is what is computed from the file's constants: it is the same in every
run, so that comparing a few runs compares it. Runs on Python 3.10 too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edged.runtimes.base import clean_text, create_runtime
from edged.runtimes.onnx_graph import DATATYPES, Constant, Graph, Node, read_graph
from edged.runtimes.operators import (
    BOUNDED,
    CONSTANT,
    DATA,
    Given,
    Row,
    Schema,
    Side,
    Table,
    find_table,
    load_schemas,
    numbers_of,
    signature,
)

__all__ = ["FINITE_INPUTS", "Obstacle", "judge", "obstacles", "sentence"]

FINITE_INPUTS = "finite_inputs = true in the model's settings would allow it"
"""What would change it, for people."""

SHOWN_MAX = 3
"""Obstacles in one sentence; a reader wants to know the kind, not each node."""

_RANDOM = frozenset(
    ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli")
)


@dataclass(frozen=True)
class Obstacle:
    """One reason, for people; what would change it, if the owner can say so; how many nodes have it."""

    why: str
    remedy: str = ""
    nodes: int = 1

    def __str__(self) -> str:
        return self.why + (f" ({self.nodes} nodes)" if self.nodes > 1 else "")


def sentence(found: Sequence[Obstacle]) -> str:
    """All of it in one line. What nobody can allow stands first; a remedy is named where it is enough."""
    text = "; ".join(str(each) for each in found[:SHOWN_MAX])
    if len(found) > SHOWN_MAX:
        text += f"; and {len(found) - SHOWN_MAX} more of the kind"
    remedies = {each.remedy for each in found}
    if len(remedies) == 1 and "" not in remedies:
        text += f"; {remedies.pop()}"
    return text


def judge(settings: Mapping[str, Any], replaceable: frozenset[str] = frozenset()) -> tuple[Obstacle, ...]:
    """What stands against the candidate of a measurement (the control channel's `measure` map).

    `replaceable` are the constants that the reference lets a request replace.
    """
    one, other = settings["reference"], settings["candidate"]
    sides = [
        Side.of(each["runtime"], create_runtime(each["runtime"]).version, each["device"])
        for each in (one, other)
    ]
    table, why = find_table(sides[0], sides[1], settings.get("operators_dir"))
    if table is None:
        text = f"there is no table of operators for {sides[0]} and {sides[1]} here: {why}"
        return (Obstacle(text, f"`{_command(one, other)}` makes one on this device"),)
    if settings.get("format") != "onnx":
        return (Obstacle("only ONNX models can be compared operator by operator"),)
    try:
        graph = read_graph(settings["path"])
    except (ValueError, OSError) as e:
        return (Obstacle(f"its graph cannot be read: {clean_text(e)}"),)
    return obstacles(graph, table, finite_inputs=bool(settings.get("finite_inputs")), replaceable=replaceable)


def _command(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """What makes the table of these two."""
    text = "edgectl operators"
    for name, part, default in (
        ("reference", one, "onnxruntime:CPU"),
        ("candidate", other, "openvino:CPU"),
    ):
        side = f"{part['runtime']}:{part['device']}"
        text += "" if side == default else f" --{name} {side}"
    return text


def obstacles(
    graph: Graph,
    table: Table,
    *,
    finite_inputs: bool,
    replaceable: frozenset[str] = frozenset(),
) -> tuple[Obstacle, ...]:
    """What stands against it by the table, each kind once, what nobody can allow first."""
    found: dict[tuple[str, str], int] = {}
    walk = _Walk(graph, table, finite_inputs, replaceable)
    for obstacle in walk.obstacles():
        key = (obstacle.why, obstacle.remedy)
        found[key] = found.get(key, 0) + 1
    listed = [Obstacle(why, remedy, nodes) for (why, remedy), nodes in found.items()]
    return tuple(sorted(listed, key=lambda each: bool(each.remedy)))


class _Walk:
    """From the graph's inputs to its outputs, with what is known of each tensor."""

    def __init__(self, graph: Graph, table: Table, finite_inputs: bool, replaceable: frozenset[str]) -> None:
        self._graph, self._table, self._schemas = graph, table, load_schemas()
        self._finite_inputs = finite_inputs
        self._nodes = (
            graph.nodes
        )  # those that no output needs too: ONNX Runtime runs them, and they may refuse
        self._read = {value.name for value in graph.outputs}
        for node in self._nodes:
            self._read.update(node.inputs)
            self._read.update(name for sub in node.graphs for name in _mentioned(sub))
        self._read.discard("")
        self._ranks = _ranks(graph, self._nodes)
        self._known: dict[str, Given] = {
            value.name: Given(value.datatype if value.kind == "tensor" else "") for value in graph.inputs
        }
        for name, constant in graph.initializers.items():
            origin = DATA if name in replaceable else CONSTANT
            self._known[name] = Given(constant.datatype, origin)

    def obstacles(self) -> Iterator[Obstacle]:
        used = _used(self._graph)
        for node in self._nodes:
            yield from self._node(node)
            if node.op != "Constant" and not used.intersection(filter(None, node.outputs)):
                yield Obstacle(
                    f"{node.label} is needed by no output: ONNX Runtime runs it all the same and may refuse, "
                    "OpenVINO leaves it out; export the model without it"
                )

    def _node(self, node: Node) -> Iterator[Obstacle]:
        inputs = [self._known.get(name, Given("")) if name else None for name in node.inputs]
        origins = {each.origin for each in inputs if each is not None}
        found = self._schemas.find(node.op, node.domain, self._graph.opsets.get(node.domain, 0))
        if not node.graphs and node.op not in _RANDOM and not node.domain:
            if node.op in ("Shape", "Size") and origins:
                self._write(node, ["INT64"], CONSTANT if origins == {CONSTANT} else BOUNDED)
                return
            if node.op == "Tile" and BOUNDED in origins:
                # Beside what it then does not fit ONNX Runtime refuses, and OpenVINO answers.
                yield Obstacle("Tile by a number that is computed from shapes was not tried")
            if DATA not in origins:
                datatypes = _datatypes(node, found[1], inputs) if found else []
                self._write(node, datatypes, BOUNDED if BOUNDED in origins else CONSTANT)
                return
        row = None
        if node.graphs:
            yield Obstacle(f"{node.op} has a graph of its own, which is not looked into")
        elif found is None:
            name = f"{node.domain}.{node.op}" if node.domain else node.op
            yield Obstacle(f"{name} is no operator that was tried")
        else:
            row, reason = self._row(node, *found, inputs)
            if reason is not None:
                yield reason
        outputs = _datatypes(node, found[1], inputs) if found else []
        self._write(node, list(row.outputs) if row else outputs, DATA)

    def _write(self, node: Node, datatypes: Sequence[str], origin: str) -> None:
        for n, name in enumerate(node.outputs):
            # More outputs than are known are of the last one's type: those of a variadic output.
            datatype = datatypes[min(n, len(datatypes) - 1)] if datatypes else ""
            self._known[name] = Given(datatype, origin)

    def _row(
        self, node: Node, since: int, schema: Schema, inputs: Sequence[Given | None]
    ) -> tuple[Row | None, Obstacle | None]:
        """The row that a node is a case of, and what is against it."""
        if any(each is not None and each.datatype == "FP64" for each in inputs):
            return None, Obstacle(f"{node.op} of FP64, which OpenVINO computes in FP32")
        for n, each in enumerate(inputs):
            if each is not None and each.origin == DATA and schema.is_parameter(n):
                return None, Obstacle(
                    f"{node.op} takes its input {n + 1}, a size or a position, from the data"
                )
        if node.op == "Pad" and self._may_cut(node):
            return None, Obstacle("Pad with pads below zero, which cut, was not tried")
        row = None
        for given in _readings(inputs, schema):
            name = self._name(node, since, schema, given)
            row = self._table.rows.get(name)
            if row is not None:
                break
        if row is None:
            name = self._name(node, since, schema, inputs)
            return None, Obstacle(f"{name} was not tried")
        untried = numbers_of(schema, node.attributes) - row.numbers
        if untried:
            return row, Obstacle(f"{name} was not tried with {', '.join(sorted(untried))}")
        if row.finite:
            return row, Obstacle(f"{name} disagrees ({row.finite})")
        if row.nonfinite and not self._finite_inputs:
            return row, Obstacle(f"{name} differs on NaN, Inf or denormals ({row.nonfinite})", FINITE_INPUTS)
        return row, None

    def _may_cut(self, node: Node) -> bool:
        """Whether a Pad may take away what it then has nothing left to copy from: then runtimes differ."""
        pads = node.attributes.get("pads")
        if pads is None and len(node.inputs) > 1:
            constant = self._graph.initializers.get(node.inputs[1])
            pads = (
                None if constant is None or constant.values is None else constant.values.reshape(-1).tolist()
            )
        if pads is None:
            return bool(node.attributes.get("mode", "constant") != "constant")
        return any(pad < 0 for pad in pads)

    def _name(self, node: Node, since: int, schema: Schema, inputs: Sequence[Given | None]) -> str:
        used = [n for n, name in enumerate(node.outputs) if name in self._read]
        return signature(
            node.op,
            since,
            schema,
            inputs=inputs,
            outputs=used,
            attributes=node.attributes,
            rank=self._ranks.get(node.outputs[0]),
        )


def _readings(inputs: Sequence[Given | None], schema: Schema) -> Iterator[list[Given | None]]:
    """The inputs as a row may have them.

    What comes from shapes is tried as such where it is whole numbers; what was shown of all data holds for it
    too, and is all there is for floats.
    """
    yield list(inputs)
    if any(each is not None and each.origin == BOUNDED for each in inputs):
        yield [
            Given(each.datatype, DATA)
            if each is not None and each.origin == BOUNDED and not schema.is_parameter(n)
            else each
            for n, each in enumerate(inputs)
        ]


def _used(graph: Graph) -> set[str]:
    """The tensors that an output depends on."""
    wanted = {value.name for value in graph.outputs}
    for node in reversed(graph.nodes):
        if wanted.intersection(node.outputs):
            wanted.update(name for name in node.inputs if name)
            for sub in node.graphs:
                wanted.update(_mentioned(sub))
    return wanted


def _mentioned(graph: Graph) -> Iterable[str]:
    yield from (value.name for value in graph.outputs)
    for node in graph.nodes:
        yield from node.inputs
        for sub in node.graphs:
            yield from _mentioned(sub)


_BROADCAST = frozenset(("Add", "Sub", "Mul", "Div", "Pow", "Where", "Max", "Min", "Sum", "MatMul"))
"""Their output has as many dimensions as the input that has the most."""

_AS_FIRST = frozenset(
    (
        "Cast",
        "Clip",
        "Concat",
        "Dropout",
        "Identity",
        "LogSoftmax",
        "Pad",
        "Relu",
        "Slice",
        "Softmax",
        "Split",
    )
)
"""Theirs has as many as their first input."""


def _ranks(graph: Graph, nodes: Sequence[Node]) -> dict[str, int]:
    """How many dimensions tensors have, as far as the file tells without much ado."""
    known = {v.name: len(v.shape) for v in (*graph.inputs, *graph.outputs) if v.shape is not None}
    known.update({name: len(constant.shape) for name, constant in graph.initializers.items()})
    for node in reversed(nodes):
        if node.op == "Identity" and node.outputs[0] in known:
            known.setdefault(node.inputs[0], known[node.outputs[0]])
    for node in nodes:
        rank = _rank(node, [known.get(name) for name in node.inputs if name])
        if rank is not None:
            known.setdefault(node.outputs[0], rank)
    return known


def _rank(node: Node, given: Sequence[int | None]) -> int | None:
    ranks = [rank for rank in given if rank is not None]
    axes, perm, value = (node.attributes.get(name) for name in ("axes", "perm", "value"))
    if isinstance(value, Constant) and node.op == "Constant":
        return len(value.shape)
    if node.op == "Transpose" and isinstance(perm, tuple):
        return len(perm)
    if node.op in ("Flatten", "Gemm"):
        return 2
    if node.op in ("Squeeze", "Unsqueeze") and isinstance(axes, tuple) and ranks:
        return ranks[0] + (len(axes) if node.op == "Unsqueeze" else -len(axes))
    if node.op in _BROADCAST and len(ranks) == len(given):
        return max(ranks, default=None)
    return given[0] if node.op in _AS_FIRST and given else None


def _datatypes(node: Node, schema: Schema, inputs: Sequence[Given | None]) -> list[str]:
    """The outputs' datatypes by the operator's definition; ``""`` where that leaves them open."""
    bound: dict[str, str] = {}
    for n, each in enumerate(inputs):
        if each is not None:
            bound.setdefault(schema.type_of(n), each.datatype)
    return [kind if kind in _DATATYPES else bound.get(kind) or _by_attribute(node) for kind in schema.outputs]


_DATATYPES = frozenset(
    [
        *("FP32", "FP16", "FP64", "BF16", "BOOL", "BYTES"),
        *(f"{sign}INT{bits}" for sign in ("", "U") for bits in (8, 16, 32, 64)),
    ]
)


def _by_attribute(node: Node) -> str:
    """Where an attribute names the type (`Cast`) or has it (`Constant`, `ConstantOfShape`)."""
    for name in ("to", "dtype"):
        if isinstance(node.attributes.get(name), int):
            return DATATYPES.get(node.attributes[name], "")
    value = node.attributes.get("value")
    if isinstance(value, Constant):
        return value.datatype
    if node.op == "ConstantOfShape":
        return "FP32"
    for name, datatype in (("value_float", "FP32"), ("value_int", "INT64")):
        if any(given in node.attributes for given in (name, f"{name}s")):
            return datatype
    return ""
