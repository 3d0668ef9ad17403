"""Follows the rows from a graph's inputs to its outputs, node by node. Runs on Python 3.10 too."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from edged.row_independence.compute import (
    CLASSIC,
    COMPUTE,
    CONTRIBUTED,
    EXACT,
    MIXERS,
    breaks,
    keeps_numbers,
)
from edged.row_independence.layout import LAYOUT, constant_value
from edged.row_independence.node import At, Rule
from edged.row_independence.openvino import OPENVINO
from edged.row_independence.sizes import ONE, ROWS, Names, Size
from edged.row_independence.values import Changes, Mixes, Numbering, Value, fixed
from edged.runtimes.onnx_graph import Graph, Node, ValueInfo, seen_by

__all__ = ["Reading", "changes", "read_rows"]

WHOLE = frozenset(
    {"BOOL", "INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64"},
)
"""Datatypes that have no NaN."""

STEPS_MAX = 50_000
"""Nodes that are followed, those of loops more than once; that takes about a second, and no network of the
field has a tenth of it."""

NAMES_PER_STEP = 256
"""A subgraph sees the names around it: to hand on so many takes less than to follow a node."""

INPUTS_PER_STEP = 4
"""Of a node: what has thousands takes as long as many nodes."""

RANK_MAX = 16
"""Dimensions of a tensor; networks have up to eight."""

LOOP_TRIES = 4
"""How often a loop's body is followed until what goes round in it has settled; two are the rule."""

TABLES: dict[str, Mapping[str, Rule]] = {
    "": {**LAYOUT, **COMPUTE},
    "ai.onnx.ml": CLASSIC,
    "openvino": OPENVINO,
    "com.microsoft": {**CONTRIBUTED, **{name: COMPUTE[name] for name in ("LayerNormalization",)}},
}
"""By domain. ONNX Runtime takes some operators of its own domain under ONNX's names."""

_NUMPY_SINCE = 7
"""The opset from which on operators broadcast as numpy does, and not along an axis that they name."""

_SIZES_READ: dict[str, tuple[int, ...]] = {
    "Shape": (0,),
    "Size": (0,),
    "ConstantOfShape": (0,),
    "Reshape": (1,),
    "Expand": (1,),
    "Tile": (1,),
    "Slice": (1, 2),
    "Resize": (3,),
    "Range": (1,),
    # OpenVINO's
    "ShapeOf": (0,),
    "Broadcast": (1,),
    "StridedSlice": (1, 2),
}
"""By operator, the inputs whose rule looks at numbers that count the rows. Nothing else may read such."""


@dataclass(frozen=True)
class Reading:
    """What a graph says of its rows."""

    why: str
    """Why they cannot share a run, with the node that shows it; empty where they can."""
    limits: Mapping[str, int]
    """By input, how many entries the tables have that it is an index of."""


def changes(graph: Graph) -> str:
    """The node, and how, that makes a model answer the same inputs otherwise each time; empty for none.

    It is random, or in training mode: then each run may change the next one's answer.
    """
    for node in graph.nodes:
        training = node.op == "BatchNormalization" and not node.domain and node.integer("training_mode")
        if training:
            return f"{node.label} is in training mode: each run may change the next one's answer"
        if "random" in MIXERS.get(node.op, ""):
            return f"{node.label} is random: the same inputs are answered otherwise each time"
        for sub in node.graphs:
            if found := changes(sub):
                return found
    return ""


def read_rows(graph: Graph, *, finite: bool = False) -> Reading:
    """Whether each row of every output depends on that row of the inputs alone, and not on its place either.

    `finite`: no input is NaN or infinite, as none is where all are whole numbers.
    """
    whole = all(v.datatype in WHOLE for v in graph.inputs if v.name not in graph.initializers)
    walk = _Walk(graph, finite or whole)
    try:
        walk.outputs()
    except (Mixes, ValueError) as e:
        return Reading(str(e), walk.limits)
    return Reading("", walk.limits)


class _Walk:
    def __init__(self, graph: Graph, finite: bool) -> None:
        self.limits: dict[str, int] = {}
        self._graph = graph
        self._finite = finite
        self._names = Names()
        self._steps = 0
        self._needed: dict[int, tuple[Node, ...]] = {}
        """By a graph's identity: loops are followed more than once."""

    def outputs(self) -> None:
        graph = self._graph
        known = {}
        for declared in graph.inputs:
            if declared.name not in graph.initializers:
                known[declared.name] = self._input(declared)
        for output, value in zip(graph.outputs, self._run(graph, known)):  # noqa: B905 - one each
            if value.numbering is not Numbering.NONE:
                raise Mixes(f"output '{output.name}' depends on where a row stands")
            if value.axis is None:
                raise Mixes(f"output '{output.name}' does not depend on the rows")
            if (value.axis, value.before, value.after) != (0, ONE, ONE):
                raise Mixes(f"output '{output.name}' has not one entry for each row")

    def _input(self, value: ValueInfo) -> Value:
        if value.kind != "tensor" or value.shape is None:
            raise Mixes(f"input '{value.name}' has no declared shape")
        if not value.shape or isinstance(value.shape[0], int):
            raise Mixes(f"input '{value.name}' has no free first dimension")
        firsts = {v.shape[0] for v in self._graph.inputs if v.shape}
        dims = [ROWS]
        for size in value.shape[1:]:
            if isinstance(size, str) and size in firsts:
                raise Mixes(f"input '{value.name}' has the number of rows as another dimension too")
            if isinstance(size, int):
                dims.append(Size(size))
            else:
                dims.append(self._names.fresh() if size is None else self._names.of_dimension(size))
        return Value(tuple(dims), 0, source=value.name)

    # ------------------------------------------------------------------ nodes

    def _run(self, graph: Graph, around: Mapping[str, Value]) -> list[Value]:
        """The graph's outputs. `around` is what is known where it stands, its own inputs included."""
        known = dict(around)
        self._steps += len(around) // NAMES_PER_STEP + len(graph.initializers)
        if id(graph) not in self._needed:
            self._needed[id(graph)] = tuple(_needed(graph))
        for name, constant in graph.initializers.items():
            known[name] = constant_value(constant.shape, constant.values)
        for node in self._needed[id(graph)]:
            self._steps += 1 + len(node.inputs) // INPUTS_PER_STEP
            if self._steps > STEPS_MAX:
                raise Mixes("the graph takes too long to follow")
            try:
                given = [_of(known, name) if name else None for name in node.inputs]
                found = self._outputs_of(node, given, known)
                rounded = any(v is not None and v.rounded for v in given)
                two = breaks(node, rounded=rounded, finite=self._finite)
                if two and any(value.axis is not None for value in found):
                    raise Mixes(two)
                rounded = rounded or node.op not in EXACT
                numbering = _numbering(node, given)
                for name, value in zip(node.outputs, found):  # noqa: B905 - some are left out at the end
                    if name:
                        known[name] = _noted(_checked(value), rounded, numbering or value.numbering)
            except Mixes as e:
                raise type(e)(f"{node.label} {e}") from e
            except (LookupError, TypeError, AttributeError) as e:
                # Rules take the inputs and attributes for granted that an operator must have.
                raise Mixes(f"{node.label} is of a form that is not followed") from e
        return [_of(known, output.name) for output in graph.outputs]

    def _outputs_of(
        self, node: Node, given: Sequence[Value | None], known: Mapping[str, Value]
    ) -> Sequence[Value]:
        if node.op in MIXERS:
            raise (Changes if "random" in MIXERS[node.op] else Mixes)(MIXERS[node.op])
        if not node.domain and node.op in _CONTROL:
            return _CONTROL[node.op](self, node, given, known)
        table = TABLES.get(node.domain)
        if table is None:
            raise Mixes(f"is of the domain '{node.domain}', of which nothing is known")
        rule = table.get(node.op)
        same = not any(v is not None and (v.axis is not None or v.counts_rows) for v in given)
        if rule is None or node.graphs:
            if same and not node.graphs and node.domain in ("", "ai.onnx.ml"):
                return [Value(None)] * len(node.outputs)
            raise Mixes("is not in the table of operators that keep rows apart")
        opset = self._graph.opsets.get(node.domain)
        if opset is None:
            if not node.domain:
                raise Mixes("is of a version that the file does not say")
            opset = 1
        if (opset < _NUMPY_SINCE and not node.domain and node.integer("broadcast")) or str(
            node.attributes.get("auto_broadcast", "numpy")
        ) not in ("numpy", "none"):
            raise Mixes("broadcasts in a way that is not followed")
        try:
            found = rule(At(node, given, opset, self._names, self.limits))
        except Mixes as e:
            if same and not e.whatever_it_reads:
                return [Value(None)] * len(node.outputs)  # the same for all rows, whatever it is
            raise
        if len(found) < len(node.outputs):
            raise Mixes("has outputs that are not followed")
        _check_counts(node, given, found)
        return found

    # ------------------------------------------------------------------ subgraphs

    def _if(self, node: Node, given: Sequence[Value | None], known: Mapping[str, Value]) -> Sequence[Value]:
        condition = fixed(given[0] if given else None, "condition")
        then, otherwise = node.attributes.get("then_branch"), node.attributes.get("else_branch")
        if not isinstance(then, Graph) or not isinstance(otherwise, Graph) or condition is None:
            raise Mixes("has not two branches")
        taken = condition.numbers[0].known if condition.numbers and condition.numbers[0] else None
        if taken is not None:
            return self._run(then if taken else otherwise, known)
        both = self._run(then, known), self._run(otherwise, known)
        return [self._either(a, b) for a, b in zip(*both)]  # noqa: B905 - as many, or a runtime refuses it

    def _loop(self, node: Node, given: Sequence[Value | None], known: Mapping[str, Value]) -> Sequence[Value]:
        if len(given) < 2:
            raise Mixes("has no body")
        fixed(given[0], "number of turns")
        fixed(given[1], "condition")
        body = node.attributes.get("body")
        start = [value for value in given[2:] if value is not None]
        if not isinstance(body, Graph) or len(body.inputs) != 2 + len(start):
            raise Mixes("has no body")
        settled, found = self._settled(body, known, [Value(()), Value(())], start, [])
        fixed(found[0], "condition")
        every = found[1 + len(start) :]
        return [*settled, *(self._gathered(value, 0) for value in every)]

    def _scan(self, node: Node, given: Sequence[Value | None], known: Mapping[str, Value]) -> Sequence[Value]:
        body, count = node.attributes.get("body"), node.attributes.get("num_scan_inputs")
        if self._graph.opsets.get("", 1) < 9 or not isinstance(body, Graph) or type(count) is not int:
            raise Mixes("is of a form that is not followed")
        values = [value for value in given if value is not None]
        start, lines = values[: len(values) - count], values[len(values) - count :]
        axes = node.attributes.get("scan_input_axes") or (0,) * count
        slices = []
        for value, axis in zip(lines, axes):  # noqa: B905 - as many, or a runtime refuses it
            at = value.counted(axis)
            if at == value.axis:
                raise Mixes("goes along the axis of the rows")
            dims = [value.size(n) for n in range(value.rank) if n != at]
            moved = value.axis is not None and value.axis > at
            slices.append(value.shaped(dims, (value.axis or 0) - moved))
        settled, found = self._settled(body, known, [], start, slices)
        every = found[len(start) :]
        places = node.attributes.get("scan_output_axes") or (0,) * len(every)
        return [*settled, *(self._gathered(v, at) for v, at in zip(every, places))]  # noqa: B905 - likewise

    def _settled(
        self,
        body: Graph,
        known: Mapping[str, Value],
        before: Sequence[Value],
        start: Sequence[Value],
        after: Sequence[Value],
    ) -> tuple[list[Value], list[Value]]:
        """What goes round in a loop, as it is in every turn, and all that the body gives."""
        if any(value.counts_rows for value in start):
            raise Mixes("begins with how many rows there are")
        state = [value.like() for value in start]
        begun = self._names.count
        skipped = 1 if before else 0  # the condition
        for _ in range(LOOP_TRIES):
            names = [value.name for value in body.inputs]
            found = self._run(body, {**known, **dict(zip(names, (*before, *state, *after)))})  # noqa: B905
            then = [self._either(a, b) for a, b in zip(state, found[skipped:])]  # noqa: B905 - likewise
            if all(_holds(a, b, begun) for a, b in zip(state, then)):  # noqa: B905 - as many
                return then, found
            state = then
        raise Mixes("does not settle")

    def _either(self, a: Value, b: Value) -> Value:
        """What is known of a tensor that is one of two."""
        if a == b:
            return a
        if (a.axis, a.before, a.after) != (b.axis, b.before, b.after):
            raise Mixes("has rows in one case and none in the other, or lays them in another way")
        if a.counts_rows or b.counts_rows:
            raise Mixes("computes with how many rows there are")
        if a.dims is None or b.dims is None or len(a.dims) != len(b.dims):
            if a.axis is not None:
                raise Mixes("has another rank in one case than in the other")
            return Value(None)
        dims = [x if x == y else self._names.fresh() for x, y in zip(a.dims, b.dims)]  # noqa: B905 - as many
        found = _noted(a.shaped(dims, a.axis), b.rounded, a.numbering)
        if a.numbering is not b.numbering:
            raise Mixes("computes with where a row stands")
        return found

    def _gathered(self, value: Value, at: int) -> Value:
        """The outputs of all turns, one behind the other along a new axis."""
        if value.dims is None:
            return Value(None)
        at = at + value.rank + 1 if at < 0 else at
        dims = [*value.dims[:at], self._names.fresh(), *value.dims[at:]]
        moved = value.axis is not None and value.axis >= at
        return value.shaped(dims, (value.axis or 0) + moved)


_CONTROL = {"If": _Walk._if, "Loop": _Walk._loop, "Scan": _Walk._scan}


def _holds(state: Value, then: Value, begun: int) -> bool:
    """Whether what was followed of a turn is true of the next one too: where the rows lie, and each size.

    A size may change from turn to turn where the turn was followed with a symbol that nothing else has: one
    of those that were given since `begun`.
    """
    if (state.axis, state.before, state.after) != (then.axis, then.before, then.after):
        return False
    if (state.rounded, state.numbering) != (then.rounded, then.numbering):
        return False
    if state.dims is None or then.dims is None:
        return state.dims is then.dims
    return len(state.dims) == len(then.dims) and all(
        a == b or a.given_since(begun)
        for a, b in zip(state.dims, then.dims)  # noqa: B905 - as many
    )


def _noted(value: Value, rounded: bool, numbering: Numbering) -> Value:
    """A tensor of rows, with what its operator's inputs say of it."""
    if value.axis is None:
        return value
    return replace(value, rounded=value.rounded or rounded, numbering=numbering)


def _numbering(node: Node, given: Sequence[Value | None]) -> Numbering | None:
    """What is known of an output by what its inputs know of where rows stand; None where none does."""
    notes = [Numbering.NONE if v is None else v.numbering for v in given]
    if not any(note is not Numbering.NONE for note in notes):
        return None
    first = given[0]
    others = all(note is Numbering.NONE for note in notes[1:])
    if node.op in ("Gather", "GatherND") and first is not None and first.axis is not None:
        # Their rules have looked: each row looks up its own.
        return Numbering.NONE if notes[0] is Numbering.NONE else Numbering.SOMEHOW
    if (node.op == "Identity" or (node.op == "Cast" and keeps_numbers(node))) and others:
        return notes[0]
    if node.op in ("Unsqueeze", "Squeeze", "Expand") and notes[0] is Numbering.OWN and others:
        return Numbering.OWN
    if node.op == "Concat" and notes[0] is Numbering.OWN and others and first is not None:
        last = first.counted(node.integer("axis")) == first.rank - 1
        return Numbering.OWN_FIRST if last and first.size(-1) == ONE else Numbering.SOMEHOW
    return Numbering.SOMEHOW


def _of(known: Mapping[str, Value], name: str) -> Value:
    found = known.get(name)
    if found is None:
        raise Mixes(f"reads '{name}', which nothing has written")
    return found


def _checked(value: Value) -> Value:
    """A tensor that is of one of the two kinds. Raises Mixes where its shape has rows and it does not."""
    if value.dims is not None and len(value.dims) > RANK_MAX:
        raise Mixes(f"has more than {RANK_MAX} dimensions")
    for at, size in enumerate(value.dims or ()):
        if size.has_rows != (at == value.axis):
            raise Mixes("has a shape that counts the rows in a way that is not followed")
    if value.axis is not None and value.size(value.axis) != value.before * ROWS * value.after:
        raise Mixes("has a shape that counts the rows in a way that is not followed")
    return value


def _check_counts(node: Node, given: Sequence[Value | None], found: Sequence[Value]) -> None:
    """Raises Mixes where numbers that count the rows have become what is not followed."""
    may = _SIZES_READ.get(node.op, ())
    if any(v is not None and v.counts_rows and at not in may for at, v in enumerate(given)) and any(
        v.numbers is None for v in found
    ):
        raise Mixes("computes with how many rows there are")


def _needed(graph: Graph) -> Iterable[Node]:
    """The nodes on a way to an output, in order."""
    wanted = {output.name for output in graph.outputs}
    kept = []
    for node in reversed(graph.nodes):
        if wanted.intersection(node.outputs):
            wanted.update(node.inputs)
            for sub in node.graphs:
                wanted.update(seen_by(sub))
            kept.append(node)
    return reversed(kept)
