"""Rules for operators that compute: element by element, along axes, by products, windows and steps.

`COMPUTE` has a row for each. Operator names and their inputs are those of the ONNX standard and, where said,
of ONNX Runtime's own domain. Runs on Python 3.10 too.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace

from edged.row_independence import layout
from edged.row_independence.layout import axes_of, compare, each, note_limit, numbers
from edged.row_independence.node import At, Rule
from edged.row_independence.sizes import ONE, Size, product
from edged.row_independence.values import Changes, Mixes, Value, aligned, fixed, numbers_of
from edged.runtimes.onnx_graph import Node

__all__ = [
    "CLASSIC",
    "COMPUTE",
    "CONTRIBUTED",
    "EXACT",
    "MIXERS",
    "breaks",
    "cast",
    "convolution",
    "elementwise",
    "keeps_numbers",
    "product_of",
    "turned",
]

_ALONG = "works along the axis of the rows"

MIXERS = {
    "DynamicQuantizeLinear": "quantises by the smallest and the largest number of all rows",
    "DynamicQuantizeMatMul": "quantises by the smallest and the largest number of all rows",
    "DynamicQuantizeLSTM": "quantises by the smallest and the largest number of all rows",
    "NonMaxSuppression": "gives boxes of all rows in one list",
    "NonZero": "gives places of all rows in one list",
    "RoiAlign": "takes from its indices which row each box is of",
    "MaxRoiPool": "takes from its boxes which row each is of",
    "Unique": "gives the different elements of all rows in one list",
    "RandomNormal": "is random",
    "RandomNormalLike": "is random",
    "RandomUniform": "is random",
    "RandomUniformLike": "is random",
    "Bernoulli": "is random",
    "Multinomial": "is random",
}
"""Operators that are known to make one of many rows, or to give another answer each time, and how."""


EXACT = frozenset(
    {
        # ONNX's
        *("Abs", "Add", "And", "ArgMax", "ArgMin", "ArrayFeatureExtractor", "Binarizer", "BitShift"),
        *("BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "Cast", "CastLike", "Ceil", "Clip"),
        *("Compress", "Concat", "Constant", "ConstantOfShape", "ConvInteger", "DepthToSpace", "Div"),
        *("Dropout", "Equal", "Expand", "EyeLike", "FeatureVectorizer", "Flatten", "Floor", "Gather"),
        *("GatherElements", "GatherND", "GlobalMaxPool", "Greater", "GreaterOrEqual", "Hardmax"),
        *("Identity", "If", "Imputer", "IsInf", "IsNaN", "LabelEncoder", "LeakyRelu", "Less"),
        *("LessOrEqual", "Loop", "MatMulInteger", "Max", "MaxPool", "Min", "Mul", "Neg", "Not"),
        *("OneHot", "Or", "PRelu", "Pad", "QuantizeLinear", "Range", "Reciprocal", "ReduceMax"),
        *("ReduceMin", "Relu", "Reshape", "ReverseSequence", "Round", "Scan", "ScatterElements"),
        *("Shape", "Sign", "Size", "Slice", "SpaceToDepth", "Split", "Sqrt", "Squeeze", "Sub"),
        *("ThresholdedRelu", "Tile", "TopK", "Transpose", "Trilu", "Unsqueeze", "Where", "Xor"),
        # OpenVINO's
        *("Broadcast", "Ceiling", "Clamp", "Convert", "Divide", "GreaterEqual", "LessEqual"),
        *("LogicalAnd", "LogicalNot", "LogicalOr", "LogicalXor", "Maximum", "Minimum", "Multiply"),
        *("Negative", "NotEqual", "Select", "ShapeOf", "StridedSlice", "Subtract", "VariadicSplit"),
    }
)
"""Operators that move elements, compare, or compute by one operation, which IEEE 754 rounds in one way only.
What all others give may depend in its last place on how many rows are computed at once."""

_BREAKS = frozenset(
    {
        *("ArgMax", "ArgMin", "Binarizer", "Ceil", "Equal", "Floor", "Greater", "GreaterOrEqual", "Hardmax"),
        *("LabelEncoder", "Less", "LessOrEqual", "Mod", "QuantizeLinear", "Round", "Shrink", "Sign"),
        *("Imputer", "OneHot", "OneHotEncoder"),
        *("ThresholdedRelu", "TopK", "TreeEnsemble", "TreeEnsembleRegressor", "Sin", "Cos", "Tan"),
        *("Ceiling", "FakeQuantize", "FloorMod", "GreaterEqual", "LessEqual", "NotEqual"),
    }
)
"""Operators that can make two answers of numbers that differ in the last place."""

_CHOOSE = frozenset({"LinearClassifier", "SVMClassifier", "TreeEnsembleClassifier"})
"""Those that add up and choose the largest in one."""

_SMALL = frozenset({"Elu", "Selu", "Celu"})
"""exp(x) - 1: next to zero the last place of one is a large part of what is left."""


_BY_PLACE = frozenset({"ReduceMax", "ReduceMin", "Hardmax", "ReduceLogicalAnd", "ReduceLogicalOr"})
"""Which of several numbers is the largest depends on their order where one is NaN."""


def breaks(node: Node, *, rounded: bool, finite: bool) -> str:
    """How it can make two answers of what is the same but for the place in a batch; empty where it cannot.

    `rounded`: whether it reads numbers that may differ in the last place; `finite`: whether none is NaN.
    """
    if node.op in _BY_PLACE and not finite:
        return "takes NaN for the largest by where it stands; finite_inputs = true says that none comes"
    if node.op in _CHOOSE:
        return "chooses by a sum, which the runtime may round otherwise for more rows"
    if node.op in _SMALL:
        return "gives small numbers that the runtime rounds otherwise at another place of a batch"
    if not rounded:
        return ""
    whole = node.op in _BREAKS or (node.op == "GridSample" and node.attributes.get("mode") == "nearest")
    if node.op in ("Cast", "CastLike"):
        whole = node.integer("to") not in _FLOATS
    elif node.op == "Convert":
        whole = not str(node.attributes.get("destination_type", "")).startswith(("f", "bf"))
    return "can make another answer of what the runtime rounds otherwise for more rows" if whole else ""


_FLOATS = (1, 10, 11, 16)
"""TensorProto.DataType of floats."""


# ------------------------------------------------------------------ element by element


def elementwise(at: At) -> Sequence[Value]:
    """Inputs that are broadcast against each other; one output."""
    return [aligned(at.given, at.names)]


_WIDE = {6: "i32", 7: "i64"}
"""TensorProto.DataType of the integers as which a shape's numbers stay what they are."""


def keeps_numbers(node: Node) -> bool:
    """Whether it changes the type of whole numbers and leaves what they are."""
    return _WIDE.get(node.integer("to"), "") != "" or (
        node.op == "Convert" and node.attributes.get("destination_type") in _WIDE.values()
    )


def cast(at: At) -> Sequence[Value]:
    """Cast, and OpenVINO's Convert."""
    x = at.need(0)
    wide = at.node.integer("to") == 7 or at.node.attributes.get("destination_type") == "i64"
    fits = wide or all(n is None or layout.may_be_computed(n) for n in x.numbers or ())
    if keeps_numbers(at.node) and fits:
        return [replace(x, ones=None)]
    # A quotient of floats is not that of whole numbers, a narrow integer wraps round, a boolean is 1 or 0.
    return [replace(x, numbers=None, ones=None)]


def _identity(at: At) -> Sequence[Value]:
    return [at.need(0)]


def _first_alone(at: At) -> Sequence[Value]:
    """The others are single numbers or a type: Clip's bounds, CastLike's other tensor."""
    for value in at.inputs[1:]:
        fixed(value, "bounds")
    return [at.need(0).like()]


def _first_of_two(at: At) -> Sequence[Value]:
    """CastLike: of the other tensor only the type is read."""
    return [replace(at.need(0), numbers=None, ones=None)]


def _dropout(at: At) -> Sequence[Value]:
    if at.opset < 7 and not at.integer("is_test", 0):
        raise Changes("is in training mode, where it is random")
    training = numbers_of(at.get(2), "training mode")
    if training is not None and training != (0,):
        raise Changes("is in training mode, where it is random")
    return [at.need(0).like()] * len(at.node.outputs)


def _quantise(at: At) -> Sequence[Value]:
    """QuantizeLinear and DequantizeLinear: one scale, or one for each place along an axis."""
    x = at.need(0)
    scale = fixed(at.need(1), "scale")
    fixed(at.get(2), "zero point")
    if x.axis is not None:
        if scale is None or scale.dims is None:
            raise Mixes("has a scale of unknown shape")
        axis = x.counted(at.integer("axis", 1)) if scale.dims else None
        if len(scale.dims) > 1 or (axis == x.axis and scale.dims != (ONE,)):
            raise Mixes("has another scale for each row")
    return [x.like()]


# ------------------------------------------------------------------ along axes


def _softmax(at: At) -> Sequence[Value]:
    """Softmax, LogSoftmax, Hardmax: over one axis, before version 13 over it and all behind it."""
    x = at.need(0)
    if x.axis is None:
        return [x.like()]
    axis = x.counted(at.integer("axis", 1 if at.opset < 13 else -1))
    if x.axis == axis or (at.opset < 13 and x.axis > axis):
        raise Mixes(_ALONG)
    return [x.like()]


def _one_axis(absent: int) -> Rule:
    """Something is done along one axis, and the shape stays."""

    def rule(at: At) -> Sequence[Value]:
        x = at.need(0)
        if x.axis is not None and x.counted(at.integer("axis", absent)) == x.axis:
            raise Mixes(_ALONG)
        return [x.like()]

    return rule


def _cumulative(at: At) -> Sequence[Value]:
    x = at.need(0)
    axis = numbers_of(at.get(1), "axis")
    if x.axis is not None and (axis is None or x.counted(axis[0]) == x.axis):
        raise Mixes(_ALONG)
    return [x.like()]


def _reduce(since: int) -> Rule:
    """Over the axes that are named, or over all; `since`: the opset in which axes became an input."""

    def rule(at: At) -> Sequence[Value]:
        x = at.need(0)
        axes = axes_of(at, input_at=1, since=since)
        if x.dims is None:
            return [Value(None)]
        if not axes:
            if axes is not None and at.opset >= since and at.integer("noop_with_empty_axes", 0):
                return [x.like()]
            if axes is None and at.integer("noop_with_empty_axes", 0) and at.opset >= since:
                return [x.like()]
            axes = tuple(range(x.rank))
        gone = {x.counted(axis) for axis in axes}
        if x.axis in gone:
            raise Mixes(_ALONG)
        return [_without(x, gone, keep=bool(at.integer("keepdims", 1)))]

    return rule


def _without(x: Value, gone: set[int], *, keep: bool) -> Value:
    if keep:
        return x.shaped([ONE if n in gone else x.size(n) for n in range(x.rank)], x.axis)
    left = [n for n in range(x.rank) if n not in gone]
    return x.shaped([x.size(n) for n in left], None if x.axis is None else left.index(x.axis))


def _reduce_numbers(compute: str) -> Rule:
    """As `_reduce`, and of a shape's numbers the product or the sum."""
    plain = _reduce(13 if compute == "sum" else 18)

    def rule(at: At) -> Sequence[Value]:
        x = at.need(0)
        if x.numbers is None or None in x.numbers or x.rank != 1:
            return plain(at)
        if at.integer("noop_with_empty_axes", 0):
            return plain(at)
        whole = [n for n in x.numbers if n is not None]
        total: Size | None = product(whole) if compute == "product" else Size(0)
        if compute == "sum":
            total = layout.add(at, [Size(0), *whole])
        if total is not None and not layout.may_be_computed(total):
            return plain(at)
        dims = (ONE,) if at.integer("keepdims", 1) else ()
        return [Value(dims, numbers=None if total is None else (total,))]

    return rule


def _arg(at: At) -> Sequence[Value]:
    x = at.need(0)
    if x.dims is None:
        return [Value(None)]
    axis = x.counted(at.integer("axis", 0))
    if axis == x.axis:
        raise Mixes(_ALONG)
    return [_without(x, {axis}, keep=bool(at.integer("keepdims", 1)))]


def _top_k(at: At) -> Sequence[Value]:
    x = at.need(0)
    if x.dims is None:
        return [Value(None)] * 2
    axis = x.counted(at.integer("axis", -1))
    if axis == x.axis:
        raise Mixes(_ALONG)
    k: Size | None
    if at.opset < 10:
        k = Size(at.integer("k", 1))
    else:
        wanted = fixed(at.need(1), "number of places")
        k = wanted.numbers[0] if wanted is not None and wanted.numbers else None
    size = at.names.fresh() if k is None else k
    return [x.shaped([size if n == axis else d for n, d in enumerate(x.dims)], x.axis)] * 2


def _mean_variance(at: At) -> Sequence[Value]:
    x = at.need(0)
    axes = at.integers("axes") or (0, 2, 3)
    if x.axis is not None and x.axis in {x.counted(axis) for axis in axes}:
        raise Mixes(_ALONG)
    return [x.like()]


# ------------------------------------------------------------------ normalisations


def _parameters(at: At, *places: int) -> None:
    for place in places:
        fixed(at.get(place), "parameters")


def _batch_normalization(at: At) -> Sequence[Value]:
    x = at.need(0)
    _parameters(at, 1, 2, 3, 4)
    training = at.integer("training_mode", 0) or (at.opset < 7 and not at.integer("is_test", 0))
    if training or any(at.node.outputs[1:]):
        raise Changes("is in training mode, where it normalises over all rows and changes by being run")
    if x.axis == 1 or (x.axis is not None and not at.integer("spatial", 1)):
        raise Mixes(_ALONG)
    return [x.like()]


def _rows_first(parameters: int) -> Rule:
    """Each row is normalised by itself, with `parameters` more inputs that are the same for all."""

    def rule(at: At) -> Sequence[Value]:
        x = at.need(0)
        _parameters(at, *range(1, 1 + parameters))
        if x.axis not in (None, 0):
            raise Mixes(_ALONG)
        return [x.like()]

    return rule


def _layer_normalization(at: At) -> Sequence[Value]:
    """Over the last axes, from `axis` on; its mean and deviation are outputs too."""
    x = at.need(0)
    _parameters(at, 1, 2)
    if x.axis is None:
        return [x.like()] * max(1, len(at.node.outputs))
    axis = x.counted(at.integer("axis", -1))
    if x.axis >= axis:
        raise Mixes(_ALONG)
    for value in at.inputs[1:3]:
        if value is not None and aligned([x.like(), value], at.names).dims != x.dims:
            raise Mixes("has parameters of another shape")
    means = x.shaped([ONE if n >= axis else x.size(n) for n in range(x.rank)], x.axis)
    return [x.like(), means, means]


def _skip_layer_normalization(at: At) -> Sequence[Value]:
    """ONNX Runtime's: two inputs are added, then normalised over the last axis. The sum is output 3."""
    for value in at.inputs[2:]:
        fixed(value, "parameters")
    x = aligned([at.need(0), at.need(1)], at.names)
    if x.axis is not None and x.axis == x.rank - 1:
        raise Mixes(_ALONG)
    means = x.shaped([*(x.dims or ())[:-1], ONE], x.axis)
    return [x, means, means, x]


def _lrn(at: At) -> Sequence[Value]:
    x = at.need(0)
    if x.axis == 1:
        raise Mixes(_ALONG)
    return [x.like()]


# ------------------------------------------------------------------ products


def _matmul(at: At) -> Sequence[Value]:
    return [product_of(at, at.need(0), at.need(1))]


def product_of(at: At, a: Value, b: Value) -> Value:
    """numpy's matmul."""
    if a.axis is None and b.axis is None and (a.dims is None or b.dims is None):
        return Value(None)
    if a.rank == 1 or b.rank == 1:
        return _product_with_vector(a, b)
    if a.axis == a.rank - 1 or b.axis == b.rank - 2:
        raise Mixes("adds up over the rows")
    assert a.dims is not None
    assert b.dims is not None
    if a.axis == a.rank - 2 or b.axis == b.rank - 1:
        rows, other = (a, b) if a.axis == a.rank - 2 else (b, a)
        if other.axis is not None:
            raise Mixes("multiplies rows with each other")
        high = aligned([Value(a.dims[:-2]), Value(b.dims[:-2])], at.names).dims or ()
        dims = (*high, a.dims[-2], b.dims[-1])
        return rows.shaped(dims, len(dims) - 2 if rows is a else len(dims) - 1)
    parts = [v.shaped(v.dims[:-2], v.axis) for v in (a, b) if v.dims is not None]
    high_value = aligned(parts, at.names)
    return replace(high_value, dims=(*(high_value.dims or ()), a.dims[-2], b.dims[-1]))


def _product_with_vector(a: Value, b: Value) -> Value:
    matrix, vector = (a, b) if b.rank == 1 else (b, a)
    fixed(vector, "vector")
    summed = matrix.rank - 1 if matrix is a else matrix.rank - 2
    if matrix.rank == 1:
        fixed(matrix, "vector")
        return Value(())
    if matrix.axis == summed:
        raise Mixes("adds up over the rows")
    return _without(matrix, {summed}, keep=False)


def _matmul_integer(at: At) -> Sequence[Value]:
    a_zero = fixed(at.get(2), "zero point")
    b_zero = fixed(at.get(3), "zero point")
    a, b = at.need(0), at.need(1)
    _single(a_zero if a.axis == a.rank - 2 else None)
    _single(b_zero if b.axis == b.rank - 1 else None)
    return [product_of(at, a, b)]


def _single(value: Value | None) -> None:
    """Where rows lie along the axis that has parameters of its own for each place, there must be one."""
    if value is not None and value.dims not in ((), (ONE,)):
        raise Mixes("has another scale for each row")


def _qlinear_matmul(at: At) -> Sequence[Value]:
    for place in (1, 2, 4, 5, 6, 7):
        fixed(at.get(place), "scale")
    a, b = at.need(0), at.need(3)
    for place in (1, 2) if a.axis is not None and a.axis == a.rank - 2 else ():
        _single(at.get(place))
    for place in (4, 5) if b.axis is not None and b.axis == b.rank - 1 else ():
        _single(at.get(place))
    for place in (6, 7) if a.axis is not None or b.axis is not None else ():
        _single(at.get(place))
    return [product_of(at, a, b)]


def _gemm(at: At) -> Sequence[Value]:
    a, b = at.need(0), at.need(1)
    if at.integer("transA", 0):
        a = turned(a)
    if at.integer("transB", 0):
        b = turned(b)
    found = product_of(at, a, b)
    c = at.get(2)
    if c is None or found.dims is None:
        return [found]
    summed = aligned([found, c], at.names)
    if summed.axis != found.axis or summed.rank != found.rank:
        raise Mixes("adds a tensor that is laid in another way than the product")
    return [found]


def turned(x: Value) -> Value:
    """The last two axes swapped."""
    if x.dims is None:
        return x
    if x.rank < 2:
        raise Mixes("turns a vector")
    places = [*range(x.rank - 2), x.rank - 1, x.rank - 2]
    axis = None if x.axis is None else places.index(x.axis)
    return x.shaped([x.size(n) for n in places], axis)


def _fused_matmul(at: At) -> Sequence[Value]:
    if at.integer("transBatchA", 0) or at.integer("transBatchB", 0):
        raise Mixes("is turned in a way that is not followed")
    a, b = at.need(0), at.need(1)
    a = turned(a) if at.integer("transA", 0) else a
    b = turned(b) if at.integer("transB", 0) else b
    return [product_of(at, a, b)]


def _einsum(at: At) -> Sequence[Value]:
    equation = str(at.attribute("equation", "")).replace(" ", "")
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    given = at.given
    if not arrow or "." in equation or len(terms) != len(given):
        raise Mixes("has an equation that is not followed")
    sizes: dict[str, Size] = {}
    label, laid = "", None
    for term, value in zip(terms, given):  # noqa: B905 - as many, see above
        if value.dims is None:
            if any(v.axis is not None for v in given):
                raise Mixes("has an input of unknown rank")
            return [Value(None)]
        if len(term) != value.rank or len(set(term)) != len(term):
            raise Mixes("has an equation that is not followed")
        sizes.update(zip(term, value.dims))  # noqa: B905 - as many, see above
        if value.axis is not None:
            mine = term[value.axis]
            if laid is not None and (mine, value.before, value.after) != (label, laid.before, laid.after):
                raise Mixes("multiplies rows with each other")
            label, laid = mine, value
    if not sizes.keys() >= set(right):
        raise Mixes("has an equation that is not followed")
    if laid is None:
        return [Value(tuple(sizes[each_label] for each_label in right))]
    if any(label in term for term, v in zip(terms, given) if v.axis is None):  # noqa: B905 - as many
        raise Mixes("puts the rows beside a constant that has as many")
    if label not in right:
        raise Mixes("adds up over the rows")
    assert laid.axis is not None
    sizes[label] = laid.size(laid.axis)
    return [laid.shaped([sizes[each_label] for each_label in right], right.index(label))]


# ------------------------------------------------------------------ windows


def _window(at: At, size: Size, kernel: int, stride: int, dilation: int, pads: int) -> Size:
    if size.known is None:
        return at.names.fresh()
    return Size((size.known + pads - dilation * (kernel - 1) - 1) // stride + 1)


def _spatial(at: At, x: Value, kernel: Sequence[int] | None) -> list[Size]:
    """The sizes behind N and C after a window has been moved over them."""
    count = x.rank - 2
    if kernel is None or len(kernel) != count:
        return at.fresh(count)
    strides = at.integers("strides") or (1,) * count
    dilations = at.integers("dilations") or (1,) * count
    pads = at.integers("pads") or (0,) * (2 * count)
    how = at.attribute("auto_pad", "NOTSET")
    up = bool(at.integer("ceil_mode", 0))
    if len(strides) != count or len(dilations) != count or len(pads) != 2 * count or 0 in strides:
        raise Mixes("has not a stride for each axis")
    assert x.dims is not None
    if up:
        return at.fresh(count)  # how a last window that is not whole counts is the runtime's
    if how in ("SAME_UPPER", "SAME_LOWER"):
        known = [x.dims[2 + n].known for n in range(count)]
        return [
            at.names.fresh() if size is None else Size(-(-size // strides[n])) for n, size in enumerate(known)
        ]
    if how == "VALID":
        pads = (0,) * (2 * count)
    return [
        _window(at, x.dims[2 + n], kernel[n], strides[n], dilations[n], pads[n] + pads[n + count])
        for n in range(count)
    ]


def _images(x: Value) -> None:
    if x.axis not in (None, 0):
        raise Mixes(_ALONG)
    if x.rank < 3:
        raise Mixes("has an input without channels")


def convolution(at: At, x: Value, weights: Value) -> Value:
    """N, C, …: each row by itself, with weights that are the same for all."""
    fixed(weights, "weights")
    if x.axis is None and (x.dims is None or weights.dims is None):
        return Value(None)
    _images(x)
    kernel = at.integers("kernel_shape")
    if weights.dims is None:
        return x.shaped((x.size(0), *at.fresh(x.rank - 1)), x.axis)
    if kernel is None:
        known = [d.known for d in weights.dims[2:]]
        kernel = tuple(n for n in known if n is not None) if None not in known else None
    return x.shaped((x.size(0), weights.size(0), *_spatial(at, x, kernel)), x.axis)


def _conv(at: At) -> Sequence[Value]:
    fixed(at.get(2), "bias")
    found = convolution(at, at.need(0), at.need(1))
    added = at.get(3)  # ONNX Runtime's FusedConv
    return [found if added is None else replace(aligned([found, added], at.names), dims=found.dims)]


def _conv_integer(at: At) -> Sequence[Value]:
    _single(fixed(at.get(2), "zero point"))
    fixed(at.get(3), "zero point")
    return [convolution(at, at.need(0), at.need(1))]


def _qlinear_conv(at: At) -> Sequence[Value]:
    for place in (1, 2, 4, 5, 6, 7, 8):
        fixed(at.get(place), "scale")
    return [convolution(at, at.need(0), at.need(3))]


def _conv_transpose(at: At) -> Sequence[Value]:
    x, weights = at.need(0), fixed(at.need(1), "weights")
    fixed(at.get(2), "bias")
    if x.dims is None:
        return [Value(None)]
    _images(x)
    channels = at.names.fresh()
    if weights is not None and weights.dims is not None:
        channels = weights.size(1) * Size(at.integer("group", 1))
    return [x.shaped((x.size(0), channels, *at.fresh(x.rank - 2)), x.axis)]


def _pool(at: At) -> Sequence[Value]:
    x = at.need(0)
    if x.dims is None:
        return [Value(None)] * len(at.node.outputs)
    if len([name for name in at.node.outputs if name]) > 1:
        raise Mixes("gives places that are counted over all rows")
    _images(x)
    return [x.shaped((x.size(0), x.size(1), *_spatial(at, x, at.integers("kernel_shape"))), x.axis)]


def _global_pool(at: At) -> Sequence[Value]:
    x = at.need(0)
    if x.dims is None:
        return [Value(None)]
    _images(x)
    return [x.shaped((x.size(0), x.size(1), *(ONE for _ in range(x.rank - 2))), x.axis)]


def _resize(at: At) -> Sequence[Value]:
    """Resize and Upsample: the axis of the rows must be left as it is, by its scale or its size."""
    x = at.need(0)
    places = (
        {"roi": 1, "scales": 2, "sizes": 3} if at.node.op == "Resize" and at.opset >= 11 else {"scales": 1}
    )
    if at.node.op == "Upsample" and at.opset < 9:
        places = {}
    roi = at.get(places["roi"]) if "roi" in places else None
    fixed(roi, "region")
    axes = at.integers("axes")
    if x.dims is None:
        return [Value(None)]
    stretched = at.attribute("keep_aspect_ratio_policy", "stretch") == "stretch"
    if x.axis is not None and at.attribute("mode", "nearest") != "nearest" and (x.rank < 4 or x.axis > 1):
        # Only of pictures does a runtime leave the first two axes out. Along others it adds the neighbour
        # times zero, which is NaN where the neighbour is infinite or NaN.
        raise Mixes("computes between rows")
    counted = list(range(x.rank)) if axes is None else [x.counted(n) for n in axes]
    dims = [d if n not in counted else at.names.fresh() for n, d in enumerate(x.dims)]
    if x.axis is not None and x.axis in counted:
        place = counted.index(x.axis)
        if not stretched or not _leaves(at) or not _keeps(at, x, place, places):
            raise Mixes("resizes the axis of the rows, or does not say before it runs that it does not")
        dims[x.axis] = x.size(x.axis)
    sizes = at.get(places["sizes"]) if "sizes" in places else None
    if stretched and sizes is not None and sizes.numbers is not None and len(sizes.numbers) == len(counted):
        for axis, size in zip(counted, sizes.numbers):  # noqa: B905 - as many, see above
            if axis != x.axis and size is not None:
                if size.has_rows:
                    raise Mixes("takes a size from how many rows there are")
                dims[axis] = size
    return [x.shaped(dims, x.axis)]


def _leaves(at: At) -> bool:
    """Whether an axis that stays as long as it is stays what it is: not where a region is cut out of it."""
    how = at.attribute("coordinate_transformation_mode", "half_pixel")
    if how == "tf_half_pixel_for_nn":  # half a place on, and then down again
        down = at.attribute("nearest_mode", "round_prefer_floor") in ("round_prefer_floor", "floor")
        return down and at.attribute("mode", "nearest") == "nearest"
    return how in ("half_pixel", "half_pixel_symmetric", "pytorch_half_pixel", "align_corners", "asymmetric")


def _keeps(at: At, x: Value, place: int, places: dict[str, int]) -> bool:
    assert x.axis is not None
    sizes = at.get(places["sizes"]) if "sizes" in places else None
    if sizes is not None and sizes.dims != (Size(0),):
        if sizes.axis is not None:
            raise Mixes("takes its sizes from the rows")
        return (
            sizes.numbers is not None
            and place < len(sizes.numbers)
            and sizes.numbers[place] == x.size(x.axis)
        )
    if not places:
        listed = at.attribute("scales", ())
        return place < len(listed) and listed[place] == 1.0
    scales = fixed(at.get(places["scales"]), "scales")
    # Scales are fractions, whose values `Constant` has kept where they are the file's own.
    return scales is not None and scales.ones is not None and place < len(scales.ones) and scales.ones[place]


def _grid_sample(at: At) -> Sequence[Value]:
    x, grid = at.need(0), at.need(1)
    if x.axis is None and grid.axis is None:
        return [Value(None)]
    if (x.axis, x.before, x.after) != (grid.axis, grid.before, grid.after) or x.axis != 0:
        raise Mixes("has not a grid for each row")
    assert x.dims is not None
    assert grid.dims is not None
    return [x.shaped((*x.dims[:2], *grid.dims[1:-1]), 0)]


# ------------------------------------------------------------------ steps


def _recurrent(outputs: int) -> Rule:
    """RNN, GRU and LSTM: time is one axis of their input, the rows must be the other."""

    def rule(at: At) -> Sequence[Value]:
        x = at.need(0)
        lengths = at.get(4)
        states = [v for v in (at.get(5), at.get(6) if outputs == 3 else None) if v is not None]
        for place in (1, 2, 3, *((7,) if outputs == 3 else ())):
            fixed(at.get(place), "weights")
        with_rows = [v for v in (x, lengths, *states) if v is not None and v.axis is not None]
        if not with_rows:
            return [Value(None)] * outputs
        layout_ = at.integer("layout", 0)
        place = 0 if layout_ else 1
        first = with_rows[0]
        for value in (x, *states):
            if value.axis != place:
                raise Mixes(_ALONG if value.axis is not None else "has a state that is not each row's own")
        if lengths is not None and lengths.axis != 0:
            raise Mixes("has not a length for each row")
        if any((v.before, v.after) != (first.before, first.after) for v in with_rows):
            raise Mixes("puts rows beside each other that lie in different orders")
        rows, time = x.size(place), x.size(1 - place)
        directions = Size(2 if at.attribute("direction", "forward") == "bidirectional" else 1)
        hidden = Size(at.integer("hidden_size", 0)) if at.integer("hidden_size", 0) > 0 else at.names.fresh()
        if layout_:
            every, last = (rows, time, directions, hidden), (rows, directions, hidden)
            return [x.shaped(every, 0), *[x.shaped(last, 0)] * (outputs - 1)]
        every, last = (time, directions, rows, hidden), (directions, rows, hidden)
        return [x.shaped(every, 2), *[x.shaped(last, 1)] * (outputs - 1)]

    return rule


# ------------------------------------------------------------------ attention


def _attention(at: At) -> Sequence[Value]:
    """Attention of ONNX 23 on: queries, keys and values of each row, with a mask for each or for all."""
    q, k, v = (at.need(n) for n in range(3))
    if any((each_.axis, each_.before, each_.after) != (0, ONE, ONE) for each_ in (q, k, v)):
        raise Mixes("has not queries, keys and values for each row")
    for place in (4, 5):
        past = at.get(place)
        if past is not None and (past.axis, past.after) != (0, ONE):
            raise Mixes("has not a past for each row")
    mask = at.get(3)
    if mask is not None:
        if mask.axis is None and mask.rank == 4 and mask.size(0) != ONE:
            raise Mixes("has a mask that is not each row's own")
        if mask.axis is not None and (mask.axis, mask.rank, mask.after) != (0, 4, ONE):
            raise Mixes("has a mask that is not each row's own")
    lengths = at.get(6)
    if lengths is not None and lengths.axis != 0:
        raise Mixes("has not a length for each row")
    if len([name for name in at.node.outputs if name]) > 1:
        raise Mixes("has outputs beside the first, which are not followed")
    assert q.dims is not None
    if q.rank == 4:
        assert v.dims is not None
        return [q.shaped((*q.dims[:3], v.dims[3]), 0)]
    return [q.shaped((q.dims[0], q.dims[1], at.names.fresh()), 0)]


def _embed_layer_normalization(at: At) -> Sequence[Value]:
    """ONNX Runtime's: ids looked up, summed and normalised; the mask counts the tokens of each row."""
    ids, segments, mask = at.need(0), at.get(1), at.get(7)
    for place in (2, 3, 4, 5, 6):
        fixed(at.get(place), "tables")
    if at.get(8) is not None or (ids.axis, ids.rank, ids.after) != (0, 2, ONE):
        raise Mixes("has ids in a form that is not followed")
    for value in (segments, mask):
        if value is not None and (value.axis, value.rank, value.after) != (0, 2, ONE):
            raise Mixes("has not segments and a mask for each row")
    for value, table in ((ids, at.get(2)), (segments, at.get(4))):
        if value is not None and table is not None and table.dims is not None:
            note_limit(at, value, table.size(0))
    table = at.need(2)
    hidden = table.size(1) if table.dims is not None else at.names.fresh()
    assert ids.dims is not None
    found = ids.shaped((*ids.dims, hidden), 0)
    return [found, ids.shaped(ids.dims[:1], 0), found]


def _contributed_attention(at: At) -> Sequence[Value]:
    """ONNX Runtime's Attention: hidden states of each row, and a mask of raw values or of lengths."""
    x, mask = at.need(0), at.get(3)
    _parameters(at, 1, 2)
    if any(at.get(place) is not None for place in range(4, len(at.inputs))):
        raise Mixes("has inputs that are not followed")
    if (x.axis, x.rank, x.after) != (0, 3, ONE) or len([n for n in at.node.outputs if n]) > 1:
        raise Mixes("has a form that is not followed")
    if mask is not None and (mask.axis, mask.after) != (0, ONE):
        raise Mixes("has a mask that is not each row's own")
    bias = at.need(2)
    hidden = at.names.fresh()
    if bias.dims is not None and at.integers("qkv_hidden_sizes") is None:
        hidden = bias.size(0).over(Size(3)) or hidden
    assert x.dims is not None
    return [x.shaped((x.dims[0], x.dims[1], hidden), 0)]


def _multi_head_attention(at: At) -> Sequence[Value]:
    """ONNX Runtime's MultiHeadAttention, of hidden states that are not packed."""
    q, k, v = (at.get(n) for n in range(3))
    fixed(at.get(3), "bias")
    if any(at.get(place) is not None for place in range(6, len(at.inputs))):
        raise Mixes("has inputs that are not followed")
    if q is None or k is None or v is None or len([n for n in at.node.outputs if n]) > 1:
        raise Mixes("has a form that is not followed")
    if any((each_.axis, each_.rank, each_.after) != (0, 3, ONE) for each_ in (q, k, v)):
        raise Mixes("has not queries, keys and values for each row")
    for place in (4, 5):
        value = at.get(place)
        if value is None:
            continue
        alone = value.axis is None and value.rank == 4 and value.size(0) == ONE
        if not alone and (value.axis, value.after) != (0, ONE):
            raise Mixes("has a mask that is not each row's own")
    assert q.dims is not None
    assert v.dims is not None
    return [q.shaped((q.dims[0], q.dims[1], v.dims[2]), 0)]


# ------------------------------------------------------------------ classical models


def _table_rows(outputs: int, *, last: str) -> Rule:
    """One row of features, one answer; `last`: what the answer's second dimension is."""

    def rule(at: At) -> Sequence[Value]:
        x = at.need(0)
        if x.dims is None:
            return [Value(None)] * outputs
        if x.axis not in (None, 0) or x.after != ONE or (x.axis == 0 and x.rank != 2):
            raise Mixes(_ALONG)
        same = x.like()
        scores = x.shaped((x.size(0), at.names.fresh()), x.axis)
        if outputs == 2:
            return [x.shaped((x.size(0),), x.axis), scores]
        return [same if last == "same" else scores]

    return rule


def _feature_extractor(at: At) -> Sequence[Value]:
    x = at.need(0)
    fixed(at.get(1), "indices")
    if x.dims is None:
        return [Value(None)]
    if x.axis is not None and x.axis == x.rank - 1:
        raise Mixes("takes some of the rows")
    return [x.shaped((*x.dims[:-1], at.names.fresh()), x.axis)]


def _imputer(at: At) -> Sequence[Value]:
    """A value for each place along the second axis, or, of one dimension, along the first."""
    x = at.need(0)
    values = [at.attribute(f"imputed_value_{kind}", ()) for kind in ("floats", "int64s")]
    if x.axis is not None and (x.rank < 2 or x.axis) and any(len(each_) > 1 for each_ in values):
        raise Mixes("has another value for each row")
    return [x.like()]


def _one_hot_encoder(at: At) -> Sequence[Value]:
    x = at.need(0)
    if x.dims is None:
        return [Value(None)]
    return [x.shaped((*x.dims, at.names.fresh()), x.axis)]


def _feature_vectorizer(at: At) -> Sequence[Value]:
    given = at.given
    first = given[0]
    if any((v.axis, v.before, v.after) != (first.axis, first.before, first.after) for v in given):
        raise Mixes("joins rows with what is not laid like them")
    if first.dims is None:
        return [Value(None)]
    if (
        first.axis not in (None, 0)
        or first.after != ONE
        or (first.axis == 0 and any(v.rank != 2 for v in given))
    ):
        raise Mixes(_ALONG)
    return [first.shaped((first.size(0), at.names.fresh()), first.axis)]


# ------------------------------------------------------------------ the table

_ELEMENTWISE = (
    *("Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "Ceil", "Celu", "Cos", "Cosh", "Elu", "Erf"),
    *(
        "Exp",
        "Floor",
        "Gelu",
        "HardSigmoid",
        "HardSwish",
        "IsInf",
        "IsNaN",
        "LeakyRelu",
        "Log",
        "Mish",
        "Neg",
    ),
    *(
        "Reciprocal",
        "Relu",
        "Round",
        "Selu",
        "Shrink",
        "Sigmoid",
        "Sign",
        "Sin",
        "Sinh",
        "Softplus",
        "Softsign",
    ),
    *("Sqrt", "Swish", "Tan", "Tanh", "ThresholdedRelu", "BitwiseNot"),
    *("BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "Mean", "Mod", "Pow", "PRelu", "Sum", "Xor"),
)
_REDUCE = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "SumSquare")

COMPUTE: dict[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE, elementwise),
    **{f"Reduce{name}": _reduce(18) for name in _REDUCE},
    "ReduceSum": _reduce_numbers("sum"),
    "ReduceProd": _reduce_numbers("product"),
    "Add": numbers(each(layout.add), elementwise),
    "And": numbers(each(compare(lambda a, b: bool(a and b))), elementwise),
    "ArgMax": _arg,
    "ArgMin": _arg,
    "Attention": _attention,
    "AveragePool": _pool,
    "BatchNormalization": _batch_normalization,
    "Cast": cast,
    "CastLike": _first_of_two,
    "Clip": _first_alone,
    "Conv": _conv,
    "ConvInteger": _conv_integer,
    "ConvTranspose": _conv_transpose,
    "CumSum": _cumulative,
    "DequantizeLinear": _quantise,
    "Div": numbers(each(layout.divide), elementwise),
    "Dropout": _dropout,
    "Einsum": _einsum,
    "Equal": numbers(each(layout.equal), elementwise),
    "GRU": _recurrent(2),
    "Gemm": _gemm,
    "GlobalAveragePool": _global_pool,
    "GlobalLpPool": _global_pool,
    "GlobalMaxPool": _global_pool,
    "Greater": numbers(each(compare(operator.gt)), elementwise),
    "GreaterOrEqual": numbers(each(compare(operator.ge)), elementwise),
    "GridSample": _grid_sample,
    "GroupNormalization": _rows_first(2),
    "Hardmax": _softmax,
    "Identity": _identity,
    "InstanceNormalization": _rows_first(2),
    "LRN": _lrn,
    "LSTM": _recurrent(3),
    "LayerNormalization": _layer_normalization,
    "Less": numbers(each(compare(operator.lt)), elementwise),
    "LessOrEqual": numbers(each(compare(operator.le)), elementwise),
    "LogSoftmax": _softmax,
    "LpNormalization": _one_axis(-1),
    "LpPool": _pool,
    "MatMul": _matmul,
    "MatMulInteger": _matmul_integer,
    "Max": elementwise,
    "MaxPool": _pool,
    "MeanVarianceNormalization": _mean_variance,
    "Min": elementwise,
    "Mul": numbers(each(layout.multiply), elementwise),
    "Not": numbers(
        each(lambda at, n: None if n[0].known is None else Size(int(not n[0].known))), elementwise
    ),
    "Or": numbers(each(compare(lambda a, b: bool(a or b))), elementwise),
    "QLinearConv": _qlinear_conv,
    "QLinearMatMul": _qlinear_matmul,
    "QuantizeLinear": _quantise,
    "RMSNormalization": _layer_normalization,
    "RNN": _recurrent(2),
    "Resize": _resize,
    "Softmax": _softmax,
    "Sub": numbers(each(layout.subtract), elementwise),
    "TopK": _top_k,
    "Upsample": _resize,
    "Where": numbers(each(layout.where), elementwise),
}
"""ONNX's own domain."""

CLASSIC: dict[str, Rule] = {
    "ArrayFeatureExtractor": _feature_extractor,
    "Binarizer": elementwise,
    "CategoryMapper": elementwise,
    "FeatureVectorizer": _feature_vectorizer,
    "Imputer": _imputer,
    "LabelEncoder": elementwise,
    "LinearClassifier": _table_rows(2, last="scores"),
    "LinearRegressor": _table_rows(1, last="scores"),
    "Normalizer": _table_rows(1, last="same"),
    "OneHotEncoder": _one_hot_encoder,
    "SVMClassifier": _table_rows(2, last="scores"),
    "SVMRegressor": _table_rows(1, last="scores"),
    "Scaler": _table_rows(1, last="same"),
    "TreeEnsemble": _table_rows(1, last="scores"),
    "TreeEnsembleClassifier": _table_rows(2, last="scores"),
    "TreeEnsembleRegressor": _table_rows(1, last="scores"),
}
"""The domain ``ai.onnx.ml``."""


def _quantised_pair(at: At) -> Sequence[Value]:
    """ONNX Runtime's QLinearAdd and QLinearMul: two tensors, each with one scale and zero point."""
    for place in (1, 2, 4, 5, 6, 7):
        _single(fixed(at.get(place), "scale"))
    return [aligned([at.need(0), at.need(3)], at.names)]


def _quantised_alone(at: At) -> Sequence[Value]:
    """ONNX Runtime's QLinearSigmoid and QLinearLeakyRelu."""
    for place in (1, 2, 3, 4):
        _single(fixed(at.get(place), "scale"))
    return [at.need(0).like()]


def _quantised_pool(at: At) -> Sequence[Value]:
    """ONNX Runtime's QLinearAveragePool and QLinearGlobalAveragePool, where channels come second."""
    for place in (1, 2, 3, 4):
        _single(fixed(at.get(place), "scale"))
    if at.integer("channels_last", 0):
        raise Mixes("has its channels last, which is not followed")
    return _pool(at) if at.node.op == "QLinearAveragePool" else _global_pool(at)


CONTRIBUTED: dict[str, Rule] = {
    "Attention": _contributed_attention,
    "BiasGelu": elementwise,
    "EmbedLayerNormalization": _embed_layer_normalization,
    "FastGelu": elementwise,
    "FusedConv": _conv,
    "FusedMatMul": _fused_matmul,
    "Gelu": elementwise,
    "MultiHeadAttention": _multi_head_attention,
    "QLinearAdd": _quantised_pair,
    "QLinearAveragePool": _quantised_pool,
    "QLinearGlobalAveragePool": _quantised_pool,
    "QLinearLeakyRelu": _quantised_alone,
    "QLinearMul": _quantised_pair,
    "QLinearSigmoid": _quantised_alone,
    "QuickGelu": elementwise,
    "SkipLayerNormalization": _skip_layer_normalization,
}
"""The domain ``com.microsoft``."""
