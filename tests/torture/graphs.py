"""Random small graphs over the operators that keep rows apart, and over some that do not.

A graph grows from its inputs: each step takes a tensor that is there and adds an operator, with random
attributes, axes and constants. What a step makes of a tensor's shape is kept as a tuple of numbers and of
``N`` and ``S``: rows, and a free dimension. Steps are not kept from mixing rows: axes are drawn from all,
views are confused, tensors are scaled by the largest of all. The generator knows nothing of what the
reader of graphs thinks of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

__all__ = ["RandomGraph", "random_graph"]

Shape = tuple[int | str, ...]

VOCABULARY = 40
"""Entries of a table that token ids index."""

_UNARY = (
    *("Abs", "Neg", "Relu", "Sigmoid", "Tanh", "Exp", "Floor", "Ceil", "Sign", "Softplus", "Softsign", "Erf"),
    *("Sin", "Cos", "Atan", "LeakyRelu", "Elu", "Selu", "HardSigmoid", "HardSwish", "Sqrt", "Log", "Round"),
    *("Reciprocal", "ThresholdedRelu", "Celu", "Mish", "Identity"),
)
_BINARY = ("Add", "Sub", "Mul", "Div", "Max", "Min", "Pow", "PRelu")
_REDUCE = (
    "ReduceMax",
    "ReduceMin",
    "ReduceMean",
    "ReduceSum",
    "ReduceL1",
    "ReduceL2",
    "ReduceLogSumExp",
    "ReduceProd",
)


@dataclass(frozen=True)
class Tensor:
    """A tensor of a graph that grows."""

    name: str
    type: int
    shape: Shape


@dataclass(frozen=True)
class RandomGraph:
    """A model, and what its inputs are."""

    model: onnx.ModelProto
    inputs: dict[str, Tensor]
    operators: tuple[str, ...]


@dataclass
class _Growing:
    rng: np.random.Generator
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    count: int = 0

    def name(self) -> str:
        self.count += 1
        return f"t{self.count}"

    def pick(self, *items: Any) -> Any:
        return items[int(self.rng.integers(len(items)))]

    def constant(self, array: Any) -> str:
        name = self.name()
        self.constants.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def whole(self, *numbers: int) -> str:
        return self.constant(np.array(numbers, np.int64))

    def floats(self, *shape: int) -> str:
        return self.constant(self.rng.standard_normal(shape).astype(np.float32))

    def node(self, op: str, inputs: list[str], outputs: int = 1, **attributes: Any) -> list[str]:
        names = [self.name() for _ in range(outputs)]
        self.nodes.append(helper.make_node(op, inputs, names, name=f"{op}_{names[0]}", **attributes))
        return names

    def keep(self, name: str, like: Tensor, shape: Shape | None = None, type_: int | None = None) -> bool:
        shape_ = like.shape if shape is None else shape
        self.tensors.append(Tensor(name, like.type if type_ is None else type_, shape_))
        return True

    def some(self, *, rank: tuple[int, ...] = (), float_: bool = True) -> Tensor | None:
        """A tensor of one of these ranks, newer ones more often."""
        fitting = [
            t
            for t in self.tensors
            if (t.type == TensorProto.FLOAT) == float_ and (not rank or len(t.shape) in rank)
        ]
        if not fitting:
            return None
        return fitting[-1] if self.rng.random() < 0.7 else fitting[int(self.rng.integers(len(fitting)))]


Step = Callable[[_Growing], bool]


def _unary(g: _Growing) -> bool:
    x = g.some()
    return x is not None and g.keep(g.node(g.pick(*_UNARY), [x.name])[0], x)


def _binary_constant(g: _Growing) -> bool:
    x = g.some()
    if x is None:
        return False
    shape = [
        d if isinstance(d, int) and g.rng.random() < 0.6 else 1 for d in x.shape[-int(g.rng.integers(1, 4)) :]
    ]
    return g.keep(g.node(g.pick(*_BINARY), [x.name, g.floats(*shape)])[0], x)


def _binary(g: _Growing) -> bool:
    x = g.some()
    if x is None:
        return False
    same = [t for t in g.tensors if t.shape == x.shape and t.type == x.type]
    other = same[int(g.rng.integers(len(same)))]
    return g.keep(g.node(g.pick(*_BINARY[:6]), [x.name, other.name])[0], x)


def _broadcast(g: _Growing) -> bool:
    """A tensor beside what was reduced of it: with or without its dimension, which may put rows elsewhere."""
    x = g.some(rank=(2, 3, 4))
    if x is None:
        return False
    axis = int(g.rng.integers(len(x.shape)))
    keep = int(g.rng.random() < 0.8)
    (reduced,) = g.node("ReduceSum", [x.name, g.whole(axis)], keepdims=keep)
    if not keep and (axis or len(set(x.shape)) != len(x.shape)):
        return False
    if not keep and x.shape[1:] != x.shape[-len(x.shape) + 1 :]:
        return False
    return g.keep(g.node(g.pick("Add", "Sub", "Mul"), [x.name, reduced])[0], x)


def _reduce(g: _Growing) -> bool:
    x = g.some(rank=(2, 3, 4))
    if x is None:
        return False
    axis, keep = int(g.rng.integers(len(x.shape))), int(g.rng.random() < 0.5)
    shape = tuple(1 if n == axis else d for n, d in enumerate(x.shape) if keep or n != axis)
    op = g.pick(*_REDUCE)
    return g.keep(g.node(op, [x.name, g.whole(axis)], keepdims=keep)[0], x, shape)


def _scaled(g: _Growing) -> bool:
    """By the largest of all, or of all but one axis: rows are mixed where theirs is among them."""
    x = g.some(rank=(2, 3, 4))
    if x is None:
        return False
    axes = [n for n in range(len(x.shape)) if n or g.rng.random() < 0.5]
    (largest,) = g.node("ReduceMax", [g.node("Abs", [x.name])[0], g.whole(*axes)], keepdims=1)
    (safe,) = g.node("Add", [largest, g.constant(np.float32(0.1))])
    return g.keep(g.node("Div", [x.name, safe])[0], x)


def _softmax(g: _Growing) -> bool:
    x = g.some(rank=(2, 3, 4))
    op = g.pick("Softmax", "LogSoftmax", "Hardmax", "LpNormalization")
    return x is not None and g.keep(g.node(op, [x.name], axis=int(g.rng.integers(len(x.shape))))[0], x)


def _transpose(g: _Growing) -> bool:
    x = g.some(rank=(2, 3, 4))
    if x is None:
        return False
    perm = [int(n) for n in g.rng.permutation(len(x.shape))]
    return g.keep(g.node("Transpose", [x.name], perm=perm)[0], x, tuple(x.shape[n] for n in perm))


def _matmul(g: _Growing) -> bool:
    x = g.some(rank=(2, 3, 4))
    if x is None or not isinstance(x.shape[-1], int):
        return False
    wide = int(g.rng.integers(1, 6))
    return g.keep(g.node("MatMul", [x.name, g.floats(x.shape[-1], wide)])[0], x, (*x.shape[:-1], wide))


def _self_product(g: _Growing) -> bool:
    """Scores of a tensor with itself, as attention has them: rows with rows where it has two dimensions."""
    x = g.some(rank=(2, 3))
    if x is None:
        return False
    perm = [*range(len(x.shape) - 2), len(x.shape) - 1, len(x.shape) - 2]
    (turned,) = g.node("Transpose", [x.name], perm=perm)
    (scores,) = g.node("MatMul", [x.name, turned])
    (weights,) = g.node("Softmax", [scores], axis=-1)
    return g.keep(g.node("MatMul", [weights, x.name])[0], x)


def _gemm(g: _Growing) -> bool:
    x = g.some(rank=(2,))
    if x is None or not isinstance(x.shape[1], int):
        return False
    wide = int(g.rng.integers(1, 6))
    weights = g.floats(wide, x.shape[1])
    return g.keep(g.node("Gemm", [x.name, weights, g.floats(wide)], transB=1)[0], x, (x.shape[0], wide))


def _view(g: _Growing) -> bool:
    """Two axes read in each other's order: what was meant was a transpose."""
    x = g.some(rank=(2, 3))
    if x is None:
        return False
    order = [int(n) for n in g.rng.permutation(len(x.shape))]
    (shape,) = g.node("Shape", [x.name])
    (turned,) = g.node("Gather", [shape, g.whole(*order)])
    return g.keep(g.node("Reshape", [x.name, turned])[0], x, tuple(x.shape[n] for n in order))


def _merge(g: _Growing) -> bool:
    """Rows and the free dimension become one, are worked on, and are two again, in either order."""
    x = g.some(rank=(3,))
    if x is None or x.shape[:2] != ("N", "S") or not isinstance(x.shape[2], int):
        return False
    (shape,) = g.node("Shape", [x.name])
    (flat,) = g.node("Reshape", [x.name, g.whole(-1, x.shape[2])])
    wide = int(g.rng.integers(1, 5))
    (worked,) = g.node("MatMul", [flat, g.floats(x.shape[2], wide)])
    order = [0, 1] if g.rng.random() < 0.7 else [1, 0]
    (front,) = g.node("Gather", [shape, g.whole(*order)])
    (back,) = g.node("Concat", [front, g.whole(wide)], axis=0)
    return g.keep(g.node("Reshape", [worked, back])[0], x, (*("NS"[n] for n in order), wide))


def _flatten(g: _Growing) -> bool:
    x = g.some(rank=(3, 4))
    if x is None or not all(isinstance(d, int) for d in x.shape[1:]):
        return False
    size = int(np.prod([int(d) for d in x.shape[1:]]))
    return g.keep(g.node("Flatten", [x.name], axis=1)[0], x, (x.shape[0], size))


def _split_heads(g: _Growing) -> bool:
    x = g.some(rank=(2, 3))
    if x is None or not isinstance(x.shape[-1], int) or x.shape[-1] % 2:
        return False
    half = x.shape[-1] // 2
    sizes = g.whole(*[0] * (len(x.shape) - 1), 2, half)
    return g.keep(g.node("Reshape", [x.name, sizes])[0], x, (*x.shape[:-1], 2, half))


def _concat(g: _Growing) -> bool:
    x = g.some()
    if x is None or not x.shape:
        return False
    axis = int(g.rng.integers(len(x.shape)))
    same = [t for t in g.tensors if t.shape == x.shape and t.type == x.type]
    other = same[int(g.rng.integers(len(same)))]
    size = x.shape[axis]
    if not isinstance(size, int):
        # Both halves of a Split are as long as it was before only where they are joined and cut again.
        (joined,) = g.node("Concat", [x.name, other.name], axis=axis)
        (first, _) = g.node("Split", [joined], 2, axis=axis, num_outputs=2)
        return g.keep(first, x)
    shape = tuple(2 * size if n == axis else d for n, d in enumerate(x.shape))
    return g.keep(g.node("Concat", [x.name, other.name], axis=axis)[0], x, shape)


def _slice(g: _Growing) -> bool:
    x = g.some(rank=(2, 3, 4))
    if x is None:
        return False
    axis = int(g.rng.integers(len(x.shape)))
    size = x.shape[axis]
    if isinstance(size, int):
        if size < 2:
            return False
        start = int(g.rng.integers(0, size - 1))
        shape = tuple(size - start if n == axis else d for n, d in enumerate(x.shape))
        bounds = [g.whole(start), g.whole(2**31 - 1), g.whole(axis)]
        return g.keep(g.node("Slice", [x.name, *bounds])[0], x, shape)
    backwards = [g.whole(-1), g.whole(-(2**31)), g.whole(axis), g.whole(-1)]
    return g.keep(g.node("Slice", [x.name, *backwards])[0], x)


def _pick_one(g: _Growing) -> bool:
    """One place along an axis, taken from everything there: the first row's, where the axis is theirs."""
    x = g.some(rank=(2, 3))
    if x is None:
        return False
    axis = int(g.rng.integers(len(x.shape)))
    (one,) = g.node("Gather", [x.name, g.whole(0)], axis=axis)
    return g.keep(g.node("Sub", [x.name, one])[0], x)


def _gather_elements(g: _Growing) -> bool:
    x = g.some(rank=(2, 3))
    if x is None:
        return False
    axis = int(g.rng.integers(len(x.shape)))
    (places,) = g.node("ArgMax", [x.name], axis=axis, keepdims=1)
    shape = tuple(1 if n == axis else d for n, d in enumerate(x.shape))
    return g.keep(g.node("GatherElements", [x.name, places], axis=axis)[0], x, shape)


def _look_up(g: _Growing) -> bool:
    x = g.some(float_=False)
    if x is None or len(x.shape) > 3 or x.type != TensorProto.INT64:
        return False
    (places,) = g.node("Mod", [x.name, g.whole(VOCABULARY)])
    wide = int(g.rng.integers(2, 6))
    table = g.floats(VOCABULARY, wide)
    return g.keep(g.node("Gather", [table, places])[0], x, (*x.shape, wide), TensorProto.FLOAT)


def _as_floats(g: _Growing) -> bool:
    x = g.some(float_=False)
    if x is None:
        return False
    (found,) = g.node("Cast", [x.name], to=TensorProto.FLOAT)
    if g.rng.random() < 0.5:
        (found,) = g.node("Mul", [found, g.constant(np.float32(0.01))])
    return g.keep(found, x, None, TensorProto.FLOAT)


def _integers(g: _Growing) -> bool:
    x = g.some(float_=False)
    if x is None or x.type != TensorProto.INT64:
        return False
    op = g.pick("Add", "Mul", "Sub", "Max", "Mod", "Div")
    return g.keep(g.node(op, [x.name, g.whole(int(g.rng.integers(1, 9)))])[0], x)


def _counted(g: _Growing) -> bool:
    """By how many rows, or steps, there are."""
    x = g.some(rank=(2, 3))
    if x is None:
        return False
    (shape,) = g.node("Shape", [x.name])
    (size,) = g.node("Gather", [shape, g.whole(int(g.rng.integers(len(x.shape))))])
    (number,) = g.node("Cast", [size], to=TensorProto.FLOAT)
    return g.keep(g.node(g.pick("Div", "Mul", "Add"), [x.name, number])[0], x)


def _numbered(g: _Growing) -> bool:
    """Positions along an axis are added: of the steps, or of the rows."""
    x = g.some(rank=(2, 3))
    if x is None:
        return False
    axis = int(g.rng.integers(len(x.shape)))
    (shape,) = g.node("Shape", [x.name])
    (size,) = g.node("Gather", [shape, g.constant(np.int64(axis))])
    (places,) = g.node("Range", [g.constant(np.int64(0)), size, g.constant(np.int64(1))])
    (numbers,) = g.node("Cast", [places], to=TensorProto.FLOAT)
    sizes = [-1 if n == axis else 1 for n in range(len(x.shape))]
    (column,) = g.node("Reshape", [numbers, g.whole(*sizes)])
    return g.keep(g.node("Add", [x.name, column])[0], x)


def _expanded(g: _Growing) -> bool:
    x = g.some(rank=(2, 3))
    if x is None:
        return False
    last = x.shape[-1] if isinstance(x.shape[-1], int) else 1
    (shape,) = g.node("Shape", [x.name])
    (wide,) = g.node("Expand", [g.floats(last), shape])
    return g.keep(g.node("Add", [x.name, wide])[0], x)


def _quantised(g: _Growing) -> bool:
    x = g.some(rank=(2, 3))
    if x is None or not isinstance(x.shape[-1], int):
        return False
    wide = int(g.rng.integers(1, 5))
    weights = g.constant(g.rng.integers(-128, 127, (x.shape[-1], wide)).astype(np.int8))
    if g.rng.random() < 0.5:
        q, scale, zero = g.node("DynamicQuantizeLinear", [x.name], 3)
    else:
        scale, zero = g.constant(np.float32(0.05)), g.constant(np.uint8(100))
        (q,) = g.node("QuantizeLinear", [x.name, scale, zero])
    (sums,) = g.node("MatMulInteger", [q, weights, zero])
    (numbers,) = g.node("Cast", [sums], to=TensorProto.FLOAT)
    return g.keep(g.node("Mul", [numbers, scale])[0], x, (*x.shape[:-1], wide))


def _running_sum(g: _Growing) -> bool:
    x = g.some(rank=(2, 3))
    if x is None:
        return False
    return g.keep(g.node("CumSum", [x.name, g.constant(np.int64(int(g.rng.integers(len(x.shape)))))])[0], x)


def _top(g: _Growing) -> bool:
    x = g.some(rank=(2, 3))
    if x is None:
        return False
    axis = int(g.rng.integers(len(x.shape)))
    if not isinstance(x.shape[axis], int):
        return False
    values, _ = g.node("TopK", [x.name, g.whole(1)], 2, axis=axis)
    return g.keep(values, x, tuple(1 if n == axis else d for n, d in enumerate(x.shape)))


def _layer_norm(g: _Growing) -> bool:
    x = g.some(rank=(2, 3))
    if x is None or not isinstance(x.shape[-1], int):
        return False
    return g.keep(
        g.node("LayerNormalization", [x.name, g.floats(x.shape[-1]), g.floats(x.shape[-1])], axis=-1)[0], x
    )


def _images(g: _Growing) -> bool:
    """Convolutions, pools and normalisations, over pictures or over whatever has their rank."""
    x = g.some(rank=(3, 4))
    if x is None or not isinstance(x.shape[1], int):
        return False
    count = len(x.shape) - 2
    what = g.pick(
        "Conv", "MaxPool", "AveragePool", "BatchNormalization", "InstanceNormalization", "GlobalAveragePool"
    )
    channels = x.shape[1]
    if what == "Conv":
        wide = int(g.rng.integers(1, 4))
        weights = g.floats(wide, channels, *[3] * count)
        (found,) = g.node("Conv", [x.name, weights], kernel_shape=[3] * count, pads=[1] * (2 * count))
        return g.keep(found, x, (x.shape[0], wide, *x.shape[2:]))
    if what in ("MaxPool", "AveragePool"):
        (found,) = g.node(what, [x.name], kernel_shape=[3] * count, pads=[1] * (2 * count))
        return g.keep(found, x)
    if what == "GlobalAveragePool":
        return g.keep(g.node(what, [x.name])[0], x, (*x.shape[:2], *[1] * count))
    parameters = [g.floats(channels), g.floats(channels)]
    if what == "BatchNormalization":
        parameters += [g.floats(channels), g.constant(g.rng.random(channels).astype(np.float32) + 0.5)]
    return g.keep(g.node(what, [x.name, *parameters])[0], x)


def _recurrent(g: _Growing) -> bool:
    """Over the steps of each row, or, where it was not turned round, over the rows."""
    x = g.some(rank=(3,))
    if x is None or not isinstance(x.shape[2], int):
        return False
    op, gates = g.pick(("LSTM", 4), ("GRU", 3), ("RNN", 1))
    hidden = int(g.rng.integers(1, 4))
    weights = [g.floats(1, gates * hidden, x.shape[2]), g.floats(1, gates * hidden, hidden)]
    if g.rng.random() < 0.7:
        weights.append(g.floats(1, 2 * gates * hidden))
    if g.rng.random() < 0.7:
        (turned,) = g.node("Transpose", [x.name], perm=[1, 0, 2])
        (states,) = g.node(op, [turned, *weights], hidden_size=hidden)
        (flat,) = g.node("Squeeze", [states, g.whole(1)])
        return g.keep(g.node("Transpose", [flat], perm=[1, 0, 2])[0], x, (*x.shape[:2], hidden))
    (states,) = g.node(op, [x.name, *weights], hidden_size=hidden)
    return g.keep(g.node("Squeeze", [states, g.whole(1)])[0], x, (*x.shape[:2], hidden))


def _where(g: _Growing) -> bool:
    x = g.some()
    if x is None:
        return False
    (mask,) = g.node(g.pick("Greater", "Less", "GreaterOrEqual"), [x.name, g.constant(np.float32(0.1))])
    (other,) = g.node(g.pick("Neg", "Relu", "Identity"), [x.name])
    return g.keep(g.node("Where", [mask, x.name, other])[0], x)


def _padded(g: _Growing) -> bool:
    x = g.some(rank=(2, 3))
    if x is None:
        return False
    axis = int(g.rng.integers(len(x.shape)))
    size = x.shape[axis]
    if not isinstance(size, int):
        return False
    pads = [0] * (2 * len(x.shape))
    pads[axis] = 1
    return g.keep(
        g.node("Pad", [x.name, g.whole(*pads)])[0],
        x,
        tuple(size + 1 if n == axis else d for n, d in enumerate(x.shape)),
    )


def _named_product(g: _Growing) -> bool:
    x = g.some(rank=(3,))
    if x is None or not isinstance(x.shape[2], int):
        return False
    if g.rng.random() < 0.6:
        (found,) = g.node("Einsum", [x.name, g.floats(x.shape[2], 3)], equation="abc,cd->abd")
        return g.keep(found, x, (*x.shape[:2], 3))
    a, b, c = x.shape
    equation, shape = g.pick(
        ("abc,abd->acd", (a, c, c)), ("abc,abc->abc", (a, b, c)), ("abc,adc->abd", (a, b, b))
    )
    return g.keep(g.node("Einsum", [x.name, x.name], equation=equation)[0], x, shape)


def _branch(g: _Growing) -> bool:
    """By how long an axis is, or by a constant: one branch may mix what the other keeps apart."""
    x = g.some(rank=(2, 3))
    if x is None:
        return False
    axis = int(g.rng.integers(len(x.shape)))
    (shape,) = g.node("Shape", [x.name])
    (size,) = g.node("Gather", [shape, g.constant(np.int64(axis))])
    kind = g.pick(TensorProto.INT64, TensorProto.INT32, TensorProto.UINT8, TensorProto.BOOL)
    (narrow,) = g.node("Cast", [size], to=kind)
    (wide,) = g.node("Cast", [narrow], to=TensorProto.INT64)
    (number,) = g.node(g.pick("Add", "Mul", "Div", "Sub"), [wide, g.constant(np.int64(g.pick(1, 2)))])
    other = g.pick(size, wide, g.constant(np.int64(g.pick(1, 3, 4))))
    (condition,) = g.node(g.pick("Equal", "Less"), [number, other])
    branches = {}
    for name in ("then_branch", "else_branch"):
        out = g.name()
        op, attributes = g.pick(
            ("Relu", {}), ("Neg", {}), ("Softmax", {"axis": int(g.rng.integers(len(x.shape)))})
        )
        branches[name] = helper.make_graph(
            [helper.make_node(op, [x.name], [out], **attributes)],
            name,
            [],
            [helper.make_tensor_value_info(out, x.type, None)],
        )
    return g.keep(g.node("If", [condition], **branches)[0], x)


def _loop(g: _Growing) -> bool:
    """A tensor goes round, and is worked on along an axis of its own or beside what is around."""
    x = g.some(rank=(2, 3))
    if x is None:
        return False
    i, c, a, d, b = (g.name() for _ in range(5))
    op, inputs, attributes = g.pick(
        ("Tanh", [a], {}),
        ("Softmax", [a], {"axis": int(g.rng.integers(len(x.shape)))}),
        ("Add", [a, x.name], {}),
        ("Max", [a, x.name], {}),
    )
    values = [(i, TensorProto.INT64), (c, TensorProto.BOOL), (a, x.type), (d, TensorProto.BOOL), (b, x.type)]
    takes = [helper.make_tensor_value_info(n, t, [] if n in (i, c) else None) for n, t in values[:3]]
    gives = [helper.make_tensor_value_info(n, t, [] if n == d else None) for n, t in values[3:]]
    nodes = [helper.make_node("Identity", [c], [d]), helper.make_node(op, inputs, [b], **attributes)]
    body = helper.make_graph(nodes, "body", takes, gives)
    return g.keep(g.node("Loop", [g.constant(np.int64(g.pick(0, 1, 3))), "", x.name], body=body)[0], x)


def _resized(g: _Growing) -> bool:
    """Along the last axis or along any, by scales or by sizes, in one of the ways that there are."""
    x = g.some(rank=(3, 4))
    if x is None:
        return False
    axis = int(g.rng.integers(len(x.shape))) if g.rng.random() < 0.3 else len(x.shape) - 1
    size = x.shape[axis]
    if not isinstance(size, int):
        return False
    how = {
        "mode": g.pick("nearest", "linear"),
        "nearest_mode": g.pick("floor", "ceil", "round_prefer_ceil", "round_prefer_floor"),
        "coordinate_transformation_mode": g.pick(
            "half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel", "tf_crop_and_resize"
        ),
    }
    scales = [2.0 if n == axis else 1.0 for n in range(len(x.shape))]
    region = [float(g.pick(0, 0.25)) for _ in x.shape] + [1.0] * len(x.shape)
    inputs = [g.constant(np.array(each, np.float32)) for each in (region, scales)]
    if g.rng.random() < 0.4:
        (shape,) = g.node("Shape", [x.name])
        ones = [2 if n == axis else 1 for n in range(len(x.shape))]
        inputs = [inputs[0], "", g.node("Mul", [shape, g.whole(*ones)])[0]]
        how["keep_aspect_ratio_policy"] = g.pick("stretch", "stretch", "not_larger", "not_smaller")
        if how["keep_aspect_ratio_policy"] == "not_larger":
            return g.keep(g.node("Resize", [x.name, *inputs], **how)[0], x)
        if how["keep_aspect_ratio_policy"] == "not_smaller":
            return False
    return g.keep(
        g.node("Resize", [x.name, *inputs], **how)[0],
        x,
        tuple(2 * size if n == axis else d for n, d in enumerate(x.shape)),
    )


def _scattered(g: _Growing) -> bool:
    """The largest along an axis are written over, or added to."""
    x = g.some(rank=(2, 3))
    if x is None:
        return False
    axis = int(g.rng.integers(len(x.shape)))
    (places,) = g.node("ArgMax", [x.name], axis=axis, keepdims=1)
    (values,) = g.node("ReduceSum", [x.name, g.whole(axis)], keepdims=1)
    reduction = g.pick("none", "add", "max")
    return g.keep(g.node("ScatterElements", [x.name, places, values], axis=axis, reduction=reduction)[0], x)


def _gather_nd(g: _Growing) -> bool:
    """Each row's own element at a place that it names, or another row's."""
    x = g.some(rank=(2, 3))
    if x is None:
        return False
    leading = int(g.rng.integers(2))
    (places,) = g.node("ArgMax", [x.name], axis=1, keepdims=1)
    if len(x.shape) == 3:
        (places,) = g.node("ReduceMin", [places, g.whole(2)], keepdims=0)
    if not leading:
        (places,) = g.node("Mul", [places, g.whole(0)])
    return g.keep(g.node("GatherND", [x.name, places], batch_dims=leading)[0], x, (x.shape[0], *x.shape[2:]))


def _one_hot(g: _Growing) -> bool:
    x = g.some(rank=(2, 3))
    if x is None:
        return False
    axis = int(g.rng.integers(len(x.shape)))
    (places,) = g.node("ArgMax", [x.name], axis=axis, keepdims=0)
    rest = tuple(d for n, d in enumerate(x.shape) if n != axis)
    at = int(g.rng.integers(-1, len(rest) + 1))
    shape = list(rest)
    shape.insert(at if at >= 0 else len(rest), 5)
    values = g.constant(np.array([0, 1], np.float32))
    return g.keep(g.node("OneHot", [places, g.constant(np.int64(5)), values], axis=at)[0], x, tuple(shape))


def _tiled(g: _Growing) -> bool:
    """A line of constants for each place along an axis, the rows' too, or the tensor itself again."""
    x = g.some(rank=(2, 3))
    if x is None or not isinstance(x.shape[-1], int):
        return False
    if g.rng.random() < 0.5:
        axis = int(g.rng.integers(len(x.shape)))
        size = x.shape[axis]
        if not isinstance(size, int):
            return False
        times = [2 if n == axis else 1 for n in range(len(x.shape))]
        shape = tuple(2 * size if n == axis else d for n, d in enumerate(x.shape))
        return g.keep(g.node("Tile", [x.name, g.whole(*times)])[0], x, shape)
    (shape_of,) = g.node("Shape", [x.name])
    (first,) = g.node("Slice", [shape_of, g.whole(0), g.whole(1)])
    (times_of,) = g.node("Concat", [first, *[g.whole(1)] * (len(x.shape) - 1)], axis=0)
    line = g.floats(int(g.pick(1, 1, 2)), *[1] * (len(x.shape) - 2), x.shape[-1])
    (lines,) = g.node("Tile", [line, times_of])
    return g.keep(g.node("Add", [x.name, lines])[0], x)


def _bordered(g: _Growing) -> bool:
    """Padded by what is next to the edge, along any axis that has two places for it."""
    x = g.some(rank=(2, 3))
    if x is None:
        return False
    axis = int(g.rng.integers(len(x.shape)))
    pads = [0] * (2 * len(x.shape))
    pads[axis], pads[axis + len(x.shape)] = g.pick((1, 1), (1, 0), (1, -1))
    (wide,) = g.node("Pad", [x.name, g.whole(*pads)], mode=g.pick("edge", "reflect", "wrap"))
    more = pads[axis] + pads[axis + len(x.shape)]
    size = x.shape[axis]
    if not isinstance(size, int):
        return more == 0 and g.keep(wide, x)
    return g.keep(wide, x, tuple(size + more if n == axis else d for n, d in enumerate(x.shape)))


def _classic(g: _Growing) -> bool:
    """Operators of classical models, over features or over whatever has their rank."""
    x = g.some(rank=(1, 2))
    if x is None:
        return False
    op, attributes = g.pick(
        ("Imputer", {"imputed_value_floats": [float(n) for n in range(int(g.pick(1, 2, 3, 4)))]}),
        ("Scaler", {"offset": [0.5] * int(g.pick(1, 4)), "scale": [2.0] * int(g.pick(1, 4))}),
        ("Normalizer", {"norm": g.pick("MAX", "L1", "L2")}),
        ("Binarizer", {"threshold": 0.25}),
    )
    return g.keep(g.node(op, [x.name], domain="ai.onnx.ml", **attributes)[0], x)


STEPS: tuple[tuple[Step, int], ...] = (
    (_unary, 6),
    (_binary_constant, 5),
    (_binary, 4),
    (_broadcast, 2),
    (_reduce, 3),
    (_scaled, 1),
    (_softmax, 3),
    (_transpose, 3),
    (_matmul, 4),
    (_self_product, 1),
    (_gemm, 3),
    (_view, 1),
    (_merge, 2),
    (_flatten, 2),
    (_split_heads, 2),
    (_concat, 2),
    (_slice, 2),
    (_pick_one, 1),
    (_gather_elements, 1),
    (_look_up, 4),
    (_as_floats, 2),
    (_integers, 2),
    (_counted, 1),
    (_numbered, 1),
    (_expanded, 1),
    (_quantised, 1),
    (_running_sum, 1),
    (_top, 1),
    (_layer_norm, 2),
    (_images, 4),
    (_recurrent, 2),
    (_where, 2),
    (_padded, 1),
    (_named_product, 1),
    (_branch, 1),
    (_loop, 1),
    (_resized, 1),
    (_scattered, 1),
    (_gather_nd, 1),
    (_one_hot, 1),
    (_tiled, 1),
    (_bordered, 1),
    (_classic, 1),
)
"""What may be added, and how often in comparison."""

_WEIGHTS = np.array([weight for _, weight in STEPS], float)


def _needed(nodes: list[onnx.NodeProto], wanted: set[str]) -> list[onnx.NodeProto]:
    """Without those that no output needs, as exporters leave them out."""
    kept: list[onnx.NodeProto] = []
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            wanted = {*wanted, *node.input, *(name for a in node.attribute for name in _read_within(a.g))}
            kept.append(node)
    return kept[::-1]


def _read_within(graph: onnx.GraphProto) -> set[str]:
    """The names that a subgraph reads, its own among them, at any depth."""
    found = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    for node in graph.node:
        for attribute in node.attribute:
            found |= _read_within(attribute.g)
    return found


def random_graph(seed: int) -> RandomGraph:
    """A model of two to ten steps, the same for a seed everywhere; a runtime may refuse it."""
    rng = np.random.default_rng(seed)
    g = _Growing(rng)
    first: list[Tensor] = [
        Tensor(
            "x",
            TensorProto.FLOAT,
            g.pick(("N", 4), ("N", "S", 4), ("N", 2, 6), ("N", 2, 4, 4), ("N", "S", 2, 3)),
        )
    ]
    kind = rng.random()
    if kind < 0.25:
        first = [Tensor("ids", TensorProto.INT64, ("N", "S"))]
    elif kind < 0.35:
        first.append(Tensor("ids", TensorProto.INT64, ("N", "S")))
    elif kind < 0.45:
        first = [Tensor("picture", TensorProto.UINT8, ("N", 6))]
    elif kind < 0.55:
        first.append(Tensor("lengths", TensorProto.INT64, ("N",)))
    g.tensors = list(first)
    for _ in range(int(rng.integers(2, 11))):
        at = rng.choice(len(STEPS), p=_WEIGHTS / _WEIGHTS.sum())
        STEPS[int(at)][0](g)
    grown = [t for t in g.tensors[len(first) :] if t.shape[:1] == ("N",)]
    outputs = grown[-1:] if rng.random() < 0.7 else grown[-2:]
    if not outputs:
        (name,) = g.node("Identity", [first[0].name])
        outputs = [Tensor(name, first[0].type, first[0].shape)]
    if rng.random() < 0.9:
        g.nodes = _needed(g.nodes, {t.name for t in outputs})
    firsts = {t.name: ("N" if rng.random() < 0.8 else f"N_{t.name}") for t in (*first, *outputs)}
    graph = helper.make_graph(
        g.nodes,
        f"graph{seed}",
        [helper.make_tensor_value_info(t.name, t.type, [firsts[t.name], *t.shape[1:]]) for t in first],
        [
            helper.make_tensor_value_info(t.name, t.type, [firsts[t.name], *[None] * (len(t.shape) - 1)])
            for t in outputs
        ],
        g.constants,
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 19), helper.make_opsetid("ai.onnx.ml", 3)], ir_version=9
    )
    return RandomGraph(model, {t.name: t for t in first}, tuple(n.op_type for n in g.nodes))
