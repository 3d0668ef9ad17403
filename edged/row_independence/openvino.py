"""Rules for OpenVINO's own operators, for models that come as its IR.

Most are ONNX's under other names; where attributes or inputs stand elsewhere, the rule sees a node rewritten
to ONNX's form. `OPENVINO` has a row for each. Names and inputs are those of OpenVINO's operation sets.
Runs on Python 3.10 too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from edged.row_independence.compute import COMPUTE, cast, convolution, elementwise, product_of, turned
from edged.row_independence.layout import LAYOUT
from edged.row_independence.node import At, Rule
from edged.row_independence.sizes import ONE, Size
from edged.row_independence.values import Changes, Mixes, Value, fixed, numbers_of

__all__ = ["OPENVINO"]

_ALONG = "works along the axis of the rows"
_LATEST = 23
"""The opset in whose form the rules of ONNX are asked."""


def _as(op: str, *, attributes: Mapping[str, str] | None = None, **added: Any) -> Rule:
    """ONNX's rule for `op`; `attributes`: its name for each of OpenVINO's that it knows by another."""
    rule = COMPUTE.get(op) or LAYOUT[op]

    def as_onnx(at: At) -> Sequence[Value]:
        return rule(_rewritten(at, op, {**_renamed(at, attributes or {}), **added}))

    return as_onnx


def _renamed(at: At, names: Mapping[str, str]) -> dict[str, Any]:
    found = {names.get(name, name): value for name, value in at.node.attributes.items()}
    return {name: int(value) if isinstance(value, bool) else value for name, value in found.items()}


def _rewritten(
    at: At, op: str, attributes: Mapping[str, Any], inputs: Sequence[Value | None] | None = None
) -> At:
    node = replace(at.node, op=op, domain="", attributes=dict(attributes))
    return replace(at, node=node, opset=_LATEST, inputs=at.inputs if inputs is None else inputs)


def _matmul(at: At) -> Sequence[Value]:
    a, b = at.need(0), at.need(1)
    if at.node.attributes.get("transpose_a") and not (a.dims is not None and a.rank == 1):
        a = turned(a)
    if at.node.attributes.get("transpose_b") and not (b.dims is not None and b.rank == 1):
        b = turned(b)
    return [product_of(at, a, b)]


_AUTO_PAD = {"explicit": "NOTSET", "same_upper": "SAME_UPPER", "same_lower": "SAME_LOWER", "valid": "VALID"}


def _window(at: At, **added: Any) -> dict[str, Any]:
    """The attributes of a window as ONNX has them."""
    found = at.node.attributes
    pads = (*found.get("pads_begin", ()), *found.get("pads_end", ()))
    how = _AUTO_PAD.get(str(found.get("auto_pad", "explicit")))
    if how is None:
        raise Mixes("pads in an unknown way")
    window = {"strides": found.get("strides"), "dilations": found.get("dilations"), "auto_pad": how}
    if len(pads):
        window["pads"] = pads
    if "kernel" in found:
        window["kernel_shape"] = found["kernel"]
    if found.get("rounding_type") == "ceil":
        window["ceil_mode"] = 1
    elif "rounding_type" in found and found["rounding_type"] != "floor":
        window["ceil_mode"] = 1  # ceil_torch: its size is not worked out either
    return {**{name: value for name, value in window.items() if value is not None}, **added}


def _convolution(at: At) -> Sequence[Value]:
    x, weights = at.need(0), at.need(1)
    if at.node.op == "GroupConvolution" and weights.dims is not None:
        groups, *rest = weights.dims
        weights = replace(weights, dims=(groups * rest[0], *rest[1:]))
    return [convolution(_rewritten(at, "Conv", _window(at)), x, weights)]


def _backwards(at: At) -> Sequence[Value]:
    """ConvolutionBackpropData and GroupConvolutionBackpropData."""
    x = at.need(0)
    fixed(at.get(1), "weights")
    fixed(at.get(2), "shape")
    if x.dims is None:
        return [Value(None)]
    if x.axis not in (None, 0):
        raise Mixes(_ALONG)
    return [x.shaped((x.size(0), *at.fresh(x.rank - 1)), x.axis)]


def _pool(at: At) -> Sequence[Value]:
    """A second output, where a MaxPool has one, is not read: the places in it are counted over all rows."""
    (found,) = COMPUTE["MaxPool"](_rewritten(at, "MaxPool", _window(at)))
    return [found] * len(at.node.outputs)


def _batch_norm(at: At) -> Sequence[Value]:
    x = at.need(0)
    for place in range(1, len(at.inputs)):
        fixed(at.get(place), "parameters")
    if x.axis == 1 or x.rank < 2:  # of a single dimension it is the older form's scale, which comes first
        raise Mixes(_ALONG)
    return [x.like()]


def _over_axes(at: At) -> Sequence[Value]:
    """MVN, NormalizeL2, LRN: the axes are an input."""
    x = at.need(0)
    axes = numbers_of(at.get(1), "axes")
    if x.axis is not None and (axes is None or x.axis in {x.counted(axis) for axis in axes}):
        raise Mixes(_ALONG)
    return [x.like()]


def _transpose(at: At) -> Sequence[Value]:
    order = numbers_of(at.get(1), "order")
    return LAYOUT["Transpose"](_rewritten(at, "Transpose", {"perm": order} if order else {}, at.inputs[:1]))


def _reshape(at: At) -> Sequence[Value]:
    copies = bool(at.node.attributes.get("special_zero"))
    return LAYOUT["Reshape"](_rewritten(at, "Reshape", {"allowzero": int(not copies)}))


def _split(at: At) -> Sequence[Value]:
    """Split and VariadicSplit: the axis is an input, and the lengths are."""
    axis = numbers_of(at.get(1), "axis")
    if axis is None:
        raise Mixes("has no axis")
    inputs = [at.need(0), at.get(2)]
    return LAYOUT["Split"](_rewritten(at, "Split", {"axis": axis[0]}, inputs))


def _slice(at: At) -> Sequence[Value]:
    inputs = [at.get(0), at.get(1), at.get(2), at.get(4), at.get(3)]
    return LAYOUT["Slice"](_rewritten(at, "Slice", {}, inputs))


def _strided_slice(at: At) -> Sequence[Value]:
    """Bounds and masks for each axis from the first on; new axes and an ellipsis are not followed."""
    x, start, end, steps = at.need(0), at.need(1), at.need(2), at.get(3)
    masks = {
        name: tuple(int(bit) for bit in at.node.attributes.get(f"{name}_mask", ()) or ())
        for name in ("begin", "end", "new_axis", "shrink_axis", "ellipsis")
    }
    if any(masks["new_axis"]) or any(masks["ellipsis"]):
        raise Mixes("has new axes or an ellipsis, which are not followed")
    if start.axis is not None or end.axis is not None or start.numbers is None or end.numbers is None:
        raise Mixes("has bounds that are not known before it runs")
    forwards = steps is None or all(step > 0 for step in numbers_of(steps, "steps") or ())
    if not forwards and any(any(bits) for bits in masks.values()):
        raise Mixes("goes backwards with bounds left out, which is not followed")
    if any(first and one for first, one in zip(masks["begin"], masks["shrink_axis"])):  # noqa: B905 - to the shorter
        raise Mixes("takes a place whose number is left out")
    count = len(start.numbers)
    every = Size(2**31 - 1)

    def masked(values: Sequence[Size | None], name: str, free: Size) -> tuple[Size | None, ...]:
        bits = (*masks[name], *(0,) * count)
        return tuple(free if bits[n] else value for n, value in enumerate(values))

    begins = masked(start.numbers, "begin", Size(0))
    ends = masked(end.numbers, "end", every)
    shrunk = [n for n, bit in enumerate(masks["shrink_axis"][:count]) if bit]
    for n in shrunk:
        first = begins[n]
        if first is None or first.known is None:
            raise Mixes("takes a place that is not known before it runs")
        ends = (*ends[:n], Size(first.known + 1) if first.known != -1 else every, *ends[n + 1 :])
    length = (Size(count),)
    inputs: list[Value | None] = [x, Value(length, numbers=begins), Value(length, numbers=ends), None, steps]
    (found,) = LAYOUT["Slice"](_rewritten(at, "Slice", {}, inputs))
    if not shrunk:
        return [found]
    axes = Value((Size(len(shrunk)),), numbers=tuple(Size(n) for n in shrunk))
    return LAYOUT["Squeeze"](_rewritten(at, "Squeeze", {}, [found, axes]))


def _gather(at: At) -> Sequence[Value]:
    axis = numbers_of(at.get(2), "axis")
    if axis is None or at.node.attributes.get("batch_dims"):
        raise Mixes("has a form that is not followed")
    return LAYOUT["Gather"](_rewritten(at, "Gather", {"axis": axis[0]}, at.inputs[:2]))


def _broadcast(at: At) -> Sequence[Value]:
    if str(at.node.attributes.get("mode", "numpy")) not in ("numpy", "bidirectional"):
        raise Mixes("has a form that is not followed")
    return LAYOUT["Expand"](_rewritten(at, "Expand", {}, at.inputs[:2]))


def _pad(at: At) -> Sequence[Value]:
    begin, end = fixed(at.need(1), "pads"), fixed(at.need(2), "pads")
    if begin is None or end is None or begin.numbers is None or end.numbers is None:
        raise Mixes("has pads that are not known before it runs")
    both = (*begin.numbers, *end.numbers)
    pads = Value((Size(len(both)),), numbers=both)
    return LAYOUT["Pad"](_rewritten(at, "Pad", {}, [at.need(0), pads, at.get(3)]))


def _interpolate(at: At) -> Sequence[Value]:
    """Along the axes that are an input, or all: the rows' must not be among them."""
    x = at.need(0)
    for place in range(1, len(at.inputs)):
        fixed(at.get(place), "sizes")
    if any((*at.node.attributes.get("pads_begin", ()), *at.node.attributes.get("pads_end", ()))):
        raise Mixes("pads before it resizes, which is not followed")
    if x.dims is None:
        return [Value(None)]
    axes = None
    if len(at.inputs) > 2:
        axes = numbers_of(at.get(len(at.inputs) - 1), "axes")
    counted = set(range(x.rank)) if axes is None else {x.counted(axis) for axis in axes}
    if x.axis in counted:
        raise Mixes("resizes the axis of the rows, or does not say before it runs that it does not")
    return [x.shaped([at.names.fresh() if n in counted else d for n, d in enumerate(x.dims)], x.axis)]


def _one_hot(at: At) -> Sequence[Value]:
    fixed(at.get(3), "values")
    axis = at.node.attributes.get("axis", -1)
    return LAYOUT["OneHot"](_rewritten(at, "OneHot", {"axis": axis}, at.inputs[:3]))


def _sequence(states: int) -> Rule:
    """LSTMSequence (2), GRUSequence and RNNSequence (1): rows come first everywhere."""

    def rule(at: At) -> Sequence[Value]:
        with_rows = [at.need(n) for n in range(2 + states)]
        for place in range(2 + states, len(at.inputs)):
            fixed(at.get(place), "weights")
        if any((v.axis, v.before, v.after) != (0, ONE, ONE) for v in with_rows):
            raise Mixes("has an input that is not each row's own")
        x, state = with_rows[0], with_rows[1]
        every = (x.size(0), state.size(1), x.size(1), state.size(2))
        return [x.shaped(every, 0), *[state.like()] * states]

    return rule


def _keeps_state(at: At) -> Sequence[Value]:
    raise Changes("keeps a state, which is one for all rows")


_KEEP = {"keep_dims": "keepdims"}


def _reduce(op: str) -> Rule:
    """ONNX's, but that nothing is reduced where no axes are named."""
    rule = _as(op, attributes=_KEEP)

    def over_named(at: At) -> Sequence[Value]:
        return rule(at) if numbers_of(at.need(1), "axes") else [at.need(0).like()]

    return over_named


def _squeeze(at: At) -> Sequence[Value]:
    (found,) = LAYOUT["Squeeze"](_rewritten(at, "Squeeze", {}))
    x = at.need(0)
    if at.node.attributes.get("allow_axis_skip") and x.dims is not None:
        gone = {x.counted(axis) for axis in numbers_of(at.get(1), "axes") or ()}
        if any(x.size(axis) != ONE for axis in gone):
            raise Mixes("leaves an axis out only if it is 1")
    return [found]


def _prelu(at: At) -> Sequence[Value]:
    """Slopes of one dimension are for the second axis."""
    x, slope = at.need(0), at.need(1)
    if slope.dims is None or len(slope.dims) != 1 or slope.dims == (ONE,) or x.dims is None or x.rank < 2:
        return elementwise(at)
    fixed(slope, "slopes")
    if x.axis == 1:
        raise Mixes("has another slope for each row")
    return [x.like()]


_ELEMENTWISE = (
    *("Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "Ceiling", "Clamp", "Cos", "Cosh", "Elu"),
    *("Erf", "Exp", "FakeQuantize", "Floor", "FloorMod", "Gelu", "HSigmoid", "HSwish", "HardSigmoid", "Log"),
    *("LogicalXor", "Mish", "Mod", "Negative", "NotEqual", "Power", "Relu", "Round", "Selu"),
    *("Sigmoid", "Sign", "Sin", "Sinh", "SoftPlus", "SoftSign", "Sqrt", "SquaredDifference", "Swish", "Tan"),
    *("Tanh", "IsNaN", "IsInf", "IsFinite"),
)
_REDUCE = {
    "ReduceL1": "ReduceL1",
    "ReduceL2": "ReduceL2",
    "ReduceLogicalAnd": "ReduceMin",
    "ReduceLogicalOr": "ReduceMax",
    "ReduceMax": "ReduceMax",
    "ReduceMean": "ReduceMean",
    "ReduceMin": "ReduceMin",
    "ReduceProd": "ReduceProd",
    "ReduceSum": "ReduceSum",
}

OPENVINO: dict[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE, elementwise),
    **{name: _reduce(op) for name, op in _REDUCE.items()},
    "Add": _as("Add"),
    "Assign": _keeps_state,
    "AvgPool": _pool,
    "BatchNormInference": _batch_norm,
    "Broadcast": _broadcast,
    "Concat": _as("Concat"),
    "Convert": cast,
    "Convolution": _convolution,
    "ConvolutionBackpropData": _backwards,
    "CumSum": _as("CumSum"),
    "DepthToSpace": _as("DepthToSpace", attributes={"block_size": "blocksize"}),
    "Divide": _as("Div"),
    "Equal": _as("Equal"),
    "GRUSequence": _sequence(1),
    "Gather": _gather,
    "GatherElements": _as("GatherElements"),
    "Greater": _as("Greater"),
    "GreaterEqual": _as("GreaterOrEqual"),
    "GroupConvolution": _convolution,
    "GroupConvolutionBackpropData": _backwards,
    "Identity": _as("Identity"),
    "Interpolate": _interpolate,
    "LRN": _over_axes,
    "LSTMSequence": _sequence(2),
    "Less": _as("Less"),
    "LessEqual": _as("LessOrEqual"),
    "LogSoftmax": _as("LogSoftmax"),
    "LogicalAnd": _as("And"),
    "LogicalNot": _as("Not"),
    "LogicalOr": _as("Or"),
    "MVN": _over_axes,
    "MatMul": _matmul,
    "MaxPool": _pool,
    "Maximum": elementwise,
    "Minimum": elementwise,
    "Multiply": _as("Mul"),
    "NormalizeL2": _over_axes,
    "OneHot": _one_hot,
    "PRelu": _prelu,
    "Pad": _pad,
    "RNNSequence": _sequence(1),
    "Range": _as("Range"),
    "ReadValue": _keeps_state,
    "Reshape": _reshape,
    "Select": _as("Where"),
    "ShapeOf": _as("Shape"),
    "Slice": _slice,
    "Softmax": _as("Softmax"),
    "SpaceToDepth": _as("SpaceToDepth", attributes={"block_size": "blocksize"}),
    "Split": _split,
    "Squeeze": _squeeze,
    "StridedSlice": _strided_slice,
    "Subtract": _as("Sub"),
    "Tile": _as("Tile"),
    "TopK": _as("TopK"),
    "Transpose": _transpose,
    "Unsqueeze": _as("Unsqueeze"),
    "VariadicSplit": _split,
}
"""The domain ``openvino``."""
