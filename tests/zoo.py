"""The models that tests and benchmarks use, built from nothing but `onnx.helper`.

Owns no state but a cache folder for the three real graphs, which are dear to make. A builder returns an
`onnx.ModelProto`; `write` puts one where the daemon looks, atomically as a careful publisher would. No
builder runs a model: the ones that kill their runtime are data here, and nothing else.

    zoo.write(models / "tiny.onnx", zoo.mlp(seed=7))
    zoo.write(models / "v.onnx", zoo.versioned(3))        # every element of `version` is 3.0
    path = zoo.real("squeezenet")                         # made once, then from the cache
"""

from __future__ import annotations

import itertools
import math
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

__all__ = [
    "INT64_MIN",
    "NUMPY_TYPES",
    "ONNX_TYPES",
    "REAL_MODELS",
    "cache_dir",
    "conv_net",
    "depth_to_space_overflow",
    "elementwise",
    "ep_context",
    "external_data",
    "failing",
    "free_rank",
    "fully_conv",
    "identity",
    "image_mean",
    "many",
    "memory_bomb",
    "memory_bomb_at_run",
    "mlp",
    "nonzero",
    "only_one",
    "openvino_killer",
    "optional_input",
    "optional_output",
    "real",
    "scalar_rate",
    "scalar_sum",
    "sequence_output",
    "sigfpe",
    "sigfpe_at_run",
    "sklearn_zipmap",
    "slow",
    "square",
    "string_concat",
    "top_k",
    "versioned",
    "with_free_rows",
    "write",
    "zipmap",
]

ONNX_TYPES: dict[str, int] = {
    "BOOL": TensorProto.BOOL,
    "INT8": TensorProto.INT8,
    "INT16": TensorProto.INT16,
    "INT32": TensorProto.INT32,
    "INT64": TensorProto.INT64,
    "UINT8": TensorProto.UINT8,
    "UINT16": TensorProto.UINT16,
    "UINT32": TensorProto.UINT32,
    "UINT64": TensorProto.UINT64,
    "FP16": TensorProto.FLOAT16,
    "FP32": TensorProto.FLOAT,
    "FP64": TensorProto.DOUBLE,
    "BF16": TensorProto.BFLOAT16,
    "BYTES": TensorProto.STRING,
}
"""Each datatype of the protocol and the ONNX element type that carries it."""

NUMPY_TYPES: dict[str, str] = {
    "BOOL": "bool",
    "INT8": "int8",
    "INT16": "int16",
    "INT32": "int32",
    "INT64": "int64",
    "UINT8": "uint8",
    "UINT16": "uint16",
    "UINT32": "uint32",
    "UINT64": "uint64",
    "FP16": "float16",
    "FP32": "float32",
    "FP64": "float64",
    "BYTES": "object",
}
"""Each datatype that numpy has, and its name there; BF16 is not one of them."""

REAL_MODELS = ("resnet50", "squeezenet", "shufflenet")
"""The names that `real` knows."""

INT64_MIN = -(2**63)
"""Divided by -1 it has no answer, and the processor ends the process."""

_OPSET = 20
_IR_VERSION = 9  # goes with opset 20; every runtime that the project names reads it
_REAL_FORMAT = 1  # part of the cache's file names: raise it when `real` writes something else

Shape = Sequence[int | str | None] | None


def write(path: Path, model: onnx.ModelProto | bytes) -> Path:
    """Publishes a model at `path` by a rename, so that no reader sees half of it; makes the folders above.

    The temporary name starts with a dot, which the daemon's folder rules never look at.
    """
    data = model if isinstance(model, bytes) else model.SerializeToString()
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, temporary = tempfile.mkstemp(prefix=".", dir=path.parent)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return path


def _model(
    nodes: Iterable[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    constants: Mapping[str, NDArray[Any]] | None = None,
    *,
    name: str = "zoo",
    domains: Sequence[tuple[str, int]] = (),
) -> onnx.ModelProto:
    initializers = [numpy_helper.from_array(array, key) for key, array in (constants or {}).items()]
    graph = helper.make_graph(list(nodes), name, list(inputs), list(outputs), initializers)
    opsets = [helper.make_opsetid("", _OPSET)] + [helper.make_opsetid(d, v) for d, v in domains]
    return helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION, producer_name="edged-zoo")


def _value(name: str, datatype: str, shape: Shape) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, ONNX_TYPES[datatype], shape)


def mlp(
    sizes: Sequence[int] = (64, 32, 10), *, seed: int = 0, batch: int | str = "N", softmax: bool = True
) -> onnx.ModelProto:
    """A fully connected network `x` FP32 [N,64] → `y` FP32 [N,10]; its weights follow from `seed` alone."""
    rng = np.random.default_rng(seed)
    nodes: list[onnx.NodeProto] = []
    constants: dict[str, NDArray[Any]] = {}
    last = "x"
    for layer, (rows, columns) in enumerate(itertools.pairwise(sizes)):
        weight = rng.normal(0, math.sqrt(2 / rows), (rows, columns)).astype(np.float32)
        constants[f"w{layer}"] = weight
        constants[f"b{layer}"] = rng.normal(0, 0.1, columns).astype(np.float32)
        nodes.append(helper.make_node("Gemm", [last, f"w{layer}", f"b{layer}"], [f"h{layer}"]))
        last = f"h{layer}"
        if layer < len(sizes) - 2:
            nodes.append(helper.make_node("Relu", [last], [f"r{layer}"]))
            last = f"r{layer}"
    nodes.append(helper.make_node("Softmax" if softmax else "Identity", [last], ["y"]))
    return _model(
        nodes, [_value("x", "FP32", [batch, sizes[0]])], [_value("y", "FP32", [batch, sizes[-1]])], constants
    )


def square(width: int, *, seed: int = 0) -> onnx.ModelProto:
    """`x` FP32 [N,width] times a random square matrix → `y` FP32 [N,width]: 4·width² bytes of weights."""
    weights = np.random.default_rng(seed).standard_normal((width, width), np.float32)
    return _model(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        [_value("x", "FP32", ["N", width])],
        [_value("y", "FP32", ["N", width])],
        {"w": weights},
        name=f"square_{width}",
    )


def conv_net(*, seed: int = 0, side: int = 96) -> onnx.ModelProto:
    """A small convolutional network `x` FP32 [N,3,side,side] → `y` FP32 [N,10], some 0.35 GFLOP a row."""
    rng = np.random.default_rng(seed)
    nodes: list[onnx.NodeProto] = []
    constants: dict[str, NDArray[Any]] = {}
    last = "x"
    for layer, (inputs, outputs, stride) in enumerate(((3, 32, 2), (32, 64, 1), (64, 128, 2), (128, 128, 1))):
        scale = math.sqrt(2 / (9 * inputs))
        constants[f"w{layer}"] = rng.normal(0, scale, (outputs, inputs, 3, 3)).astype(np.float32)
        nodes.append(
            helper.make_node(
                "Conv", [last, f"w{layer}"], [f"c{layer}"], pads=[1, 1, 1, 1], strides=[stride, stride]
            )
        )
        nodes.append(helper.make_node("Relu", [f"c{layer}"], [f"r{layer}"]))
        last = f"r{layer}"
    constants["w"] = rng.normal(0, 0.1, (128, 10)).astype(np.float32)
    nodes.append(helper.make_node("GlobalAveragePool", [last], ["pooled"]))
    nodes.append(helper.make_node("Flatten", ["pooled"], ["flat"]))
    nodes.append(helper.make_node("MatMul", ["flat", "w"], ["y"]))
    return _model(
        nodes, [_value("x", "FP32", ["N", 3, side, side])], [_value("y", "FP32", ["N", 10])], constants
    )


def fully_conv(*, seed: int = 0, multiple: int = 1) -> onnx.ModelProto:
    """A convolutional network of free height and width, `x` FP32 [N,3,H,W] → `y` FP32 [N,4,H,W].

    It takes only heights and widths that are multiples of `multiple`, as networks that halve them do.
    """
    rng = np.random.default_rng(seed)
    constants: dict[str, NDArray[Any]] = {
        "w": rng.normal(0, 0.3, (4, 3, 3, 3)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"]),
    ]
    if multiple > 1:
        constants["shape"] = np.array([0, 0, 0, -1, multiple], np.int64)
        nodes += [
            # A reshape to so many columns, and then rows, raises where they are no whole number.
            helper.make_node("Reshape", ["r", "shape"], ["columns"]),
            helper.make_node("Transpose", ["r"], ["turned"], perm=[0, 1, 3, 2]),
            helper.make_node("Reshape", ["turned", "shape"], ["rows"]),
            helper.make_node("ReduceMax", ["columns"], ["a"], keepdims=0),
            helper.make_node("ReduceMax", ["rows"], ["b"], keepdims=0),
            helper.make_node("Max", ["a", "b"], ["largest"]),
            helper.make_node("Min", ["r", "largest"], ["y"]),
        ]
    else:
        nodes.append(helper.make_node("Identity", ["r"], ["y"]))
    return _model(
        nodes,
        [_value("x", "FP32", ["N", 3, "H", "W"])],
        [_value("y", "FP32", ["N", 4, "H", "W"])],
        constants,
    )


def only_one() -> onnx.ModelProto:
    """Declares free sizes, `x` FP32 [N,M] → `y` FP32 [1], and takes a single element only."""
    return _model(
        [helper.make_node("Reshape", ["x", "one"], ["y"])],
        [_value("x", "FP32", ["N", "M"])],
        [_value("y", "FP32", [1])],
        {"one": np.array([1], np.int64)},
    )


def identity(datatype: str = "FP32", shape: Shape = ("N",)) -> onnx.ModelProto:
    """Returns `x` as `y`: `datatype` is the protocol's name, `shape` may be [] for a scalar."""
    return _model(
        [helper.make_node("Identity", ["x"], ["y"])],
        [_value("x", datatype, shape)],
        [_value("y", datatype, shape)],
    )


def elementwise(
    *extra: onnx.NodeProto,
    rounds: int = 40,
    side: int = 256,
    inputs: Sequence[tuple[str, str, Shape]] = (),
    outputs: Sequence[tuple[str, str, Shape]] = (),
    constants: Mapping[str, NDArray[Any]] | None = None,
    overridable: Sequence[str] = (),
) -> onnx.ModelProto:
    """`x` FP32 [1,3,side,side] → `score` FP32 [1] by many operators on single elements, beside them `extra`.

    One runtime runs each of them over the whole picture, another all of them on one element after the other:
    it takes a fraction of the time. What is in `overridable` are constants that a request may replace.
    """
    nodes: list[onnx.NodeProto] = []
    last = "x"
    for n in range(rounds):
        nodes.append(helper.make_node("Mul", [last, "factor"], [f"m{n}"]))
        nodes.append(helper.make_node("Add", [f"m{n}", "summand"], [f"a{n}"]))
        nodes.append(helper.make_node("Relu", [f"a{n}"], [f"r{n}"]))
        last = f"r{n}"
    nodes.append(helper.make_node("ReduceMean", [last, "axes"], ["score"], keepdims=0))
    given = {
        "factor": np.float32(0.9),
        "summand": np.float32(0.05),
        "axes": np.array([1, 2, 3]),
        **(constants or {}),
    }
    more = [_value(n, "FP32", list(np.shape(given[n]))) for n in overridable]
    return _model(
        [*nodes, *extra],
        [_value("x", "FP32", [1, 3, side, side]), *(_value(*each) for each in inputs), *more],
        [_value("score", "FP32", [1]), *(_value(*each) for each in outputs)],
        {name: np.asarray(value) for name, value in given.items()},
    )


def versioned(number: float, *, width: int = 256) -> onnx.ModelProto:
    """A model whose answer tells which version gave it.

    `x` FP32 [N,4] → `version` FP32 [N,width], every element exactly `number`, and `sum` FP32 [N,1], the
    sum of the row plus `number`: an answer put together from two versions shows in either.
    """
    return _model(
        [
            helper.make_node("ReduceSum", ["x", "axis"], ["row"], keepdims=1),
            helper.make_node("Add", ["row", "number"], ["sum"]),
            helper.make_node("Mul", ["row", "zeros"], ["nothing"]),
            helper.make_node("Add", ["nothing", "number"], ["version"]),
        ],
        [_value("x", "FP32", ["N", 4])],
        [_value("version", "FP32", ["N", width]), _value("sum", "FP32", ["N", 1])],
        {
            "axis": np.array([1], np.int64),
            "number": np.array([number], np.float32),
            "zeros": np.zeros((1, width), np.float32),
        },
        name=f"versioned_{number}",
    )


def image_mean(side: int = 224) -> onnx.ModelProto:
    """`x` FP32 [1,3,side,side], 602 KB → `y` FP32 [1,3]: next to no work, so the way there is measured."""
    return _model(
        [
            helper.make_node("GlobalAveragePool", ["x"], ["pooled"]),
            helper.make_node("Flatten", ["pooled"], ["y"]),
        ],
        [_value("x", "FP32", [1, 3, side, side])],
        [_value("y", "FP32", [1, 3])],
    )


def scalar_sum() -> onnx.ModelProto:
    """`x` FP32 [N] → `y` FP32 [], the sum: a scalar output, and zero for an input of no elements."""
    return _model(
        [helper.make_node("ReduceSum", ["x"], ["y"], keepdims=0)],
        [_value("x", "FP32", ["N"])],
        [_value("y", "FP32", [])],
    )


def scalar_rate(*, echo: bool = False) -> onnx.ModelProto:
    """`x` FP32 [batch, N], `sr` INT64 [], a scalar → `y`, x divided by sr; with `echo` also sr as `rate`."""
    nodes = [helper.make_node("Cast", ["sr"], ["s"], to=TensorProto.FLOAT)]
    nodes.append(helper.make_node("Div", ["x", "s"], ["y"]))
    outputs = [_value("y", "FP32", ["batch", "N"])]
    if echo:
        nodes.append(helper.make_node("Identity", ["sr"], ["rate"]))
        outputs.append(_value("rate", "INT64", []))
    return _model(nodes, [_value("x", "FP32", ["batch", "N"]), _value("sr", "INT64", [])], outputs)


def free_rank() -> onnx.ModelProto:
    """`x` FP32 of any rank → `y`, twice that: not even the number of dimensions is declared."""
    return _model(
        [helper.make_node("Add", ["x", "x"], ["y"])], [_value("x", "FP32", None)], [_value("y", "FP32", None)]
    )


def nonzero() -> onnx.ModelProto:
    """`x` FP32 [N] → `y` INT64 [1,K]: K depends on the data, and may be zero."""
    return _model(
        [helper.make_node("NonZero", ["x"], ["y"])],
        [_value("x", "FP32", ["N"])],
        [_value("y", "INT64", [1, "K"])],
    )


def many(count: int = 12) -> onnx.ModelProto:
    """`x0` … FP32 [N] → `y0` …, where each `y` is its `x` plus its index."""
    return _model(
        [helper.make_node("Add", [f"x{i}", f"c{i}"], [f"y{i}"]) for i in range(count)],
        [_value(f"x{i}", "FP32", ["N"]) for i in range(count)],
        [_value(f"y{i}", "FP32", ["N"]) for i in range(count)],
        {f"c{i}": np.array([i], np.float32) for i in range(count)},
    )


def optional_input() -> onnx.ModelProto:
    """`x` FP32 [N] + `bias` FP32 [1] → `y`; `bias` may be left out, then it is 5."""
    return _model(
        [helper.make_node("Add", ["x", "bias"], ["y"])],
        [_value("x", "FP32", ["N"]), _value("bias", "FP32", [1])],
        [_value("y", "FP32", ["N"])],
        {"bias": np.array([5], np.float32)},
    )


def string_concat() -> onnx.ModelProto:
    """`a`, `b` BYTES [N] → `y` BYTES [N], element by element one after the other."""
    return _model(
        [helper.make_node("StringConcat", ["a", "b"], ["y"])],
        [_value("a", "BYTES", ["N"]), _value("b", "BYTES", ["N"])],
        [_value("y", "BYTES", ["N"])],
    )


def failing() -> onnx.ModelProto:
    """`x` FP32 [N], `i` INT64 [K] → `y`: loads well, raises at run time for an index not there."""
    return _model(
        [helper.make_node("Gather", ["x", "i"], ["y"])],
        [_value("x", "FP32", ["N"]), _value("i", "INT64", ["K"])],
        [_value("y", "FP32", ["K"])],
    )


def expand(datatype: str = "FP32") -> onnx.ModelProto:
    """`x` [1] and `count` INT64 [1] → `y`, so many times `x`: an answer as large as one asks for."""
    return _model(
        [helper.make_node("Tile", ["x", "count"], ["y"])],
        [_value("x", datatype, [1]), _value("count", "INT64", [1])],
        [_value("y", datatype, ["N"])],
    )


def saying(metadata: Mapping[str, str], *, version: int | None = 7) -> onnx.ModelProto:
    """An identity with metadata of its own, and with every field of a model file."""
    model = identity()
    helper.set_model_props(model, dict(metadata))
    model.domain, model.doc_string, model.graph.doc_string = "zoo.edged", "what it is", "what its graph is"
    if version is not None:
        model.model_version = version
    return model


def top_k(count: int) -> onnx.ModelProto:
    """`x` FP32 [N] → the `count` largest as `y` FP32 [count], with their places `i` INT64 [count]."""
    return _model(
        [helper.make_node("TopK", ["x", "count"], ["y", "i"], axis=0)],
        [_value("x", "FP32", ["N"])],
        [_value("y", "FP32", [count]), _value("i", "INT64", [count])],
        {"count": np.array([count], np.int64)},
    )


def zipmap(labels: Sequence[int] | Sequence[str] = (0, 1, 2)) -> onnx.ModelProto:
    """A linear classifier as scikit-learn's converter writes it: `label` and a sequence of maps.

    `x` FP32 [N,4] → `label` (INT64 or BYTES) [N], `probabilities` sequence(map(label → FP32)).
    """
    rng = np.random.default_rng(3)
    strings = isinstance(labels[0], str)
    coefficients = rng.normal(0, 1, (len(labels), 4)).astype(np.float32)
    kind = "classlabels_strings" if strings else "classlabels_ints"
    map_kind = "classlabels_strings" if strings else "classlabels_int64s"
    key = TensorProto.STRING if strings else TensorProto.INT64
    value = helper.make_tensor_type_proto(TensorProto.FLOAT, None)
    entry = helper.make_sequence_type_proto(helper.make_map_type_proto(key, value))
    return _model(
        [
            helper.make_node(
                "LinearClassifier",
                ["x"],
                ["label", "scores"],
                domain="ai.onnx.ml",
                coefficients=coefficients.ravel().tolist(),
                intercepts=[0.0] * len(labels),
                post_transform="SOFTMAX",
                multi_class=1,
                **{kind: list(labels)},
            ),
            helper.make_node(
                "ZipMap", ["scores"], ["probabilities"], domain="ai.onnx.ml", **{map_kind: list(labels)}
            ),
        ],
        [_value("x", "FP32", ["N", 4])],
        [
            _value("label", "BYTES" if strings else "INT64", ["N"]),
            helper.make_value_info("probabilities", entry),
        ],
        domains=[("ai.onnx.ml", 1)],
    )


def sklearn_zipmap() -> onnx.ModelProto:
    """What scikit-learn's own converter makes of a logistic regression on the iris data, ZipMap included."""
    from skl2onnx import to_onnx
    from sklearn.datasets import load_iris
    from sklearn.linear_model import LogisticRegression

    data = load_iris()
    classifier = LogisticRegression(max_iter=500).fit(data.data, data.target)
    model = to_onnx(classifier, data.data[:1].astype(np.float32), target_opset=15)
    assert isinstance(model, onnx.ModelProto)
    return model


def sequence_output() -> onnx.ModelProto:
    """`x` FP32 [N] → `parts`, a sequence of two tensors: `x`, and `x` doubled."""
    entry = helper.make_sequence_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, ["N"]))
    return _model(
        [
            helper.make_node("Add", ["x", "x"], ["twice"]),
            helper.make_node("SequenceConstruct", ["x", "twice"], ["parts"]),
        ],
        [_value("x", "FP32", ["N"])],
        [helper.make_value_info("parts", entry)],
    )


def optional_output() -> onnx.ModelProto:
    """`x` FP32 [N] → `maybe`, an optional that holds `x`."""
    inner = helper.make_tensor_type_proto(TensorProto.FLOAT, ["N"])
    return _model(
        [helper.make_node("Optional", ["x"], ["maybe"])],
        [_value("x", "FP32", ["N"])],
        [helper.make_value_info("maybe", helper.make_optional_type_proto(inner))],
    )


def slow(trips: int | None = None, *, width: int = 256) -> onnx.ModelProto:
    """A loop of `trips` products of `x` FP32 [1,width] with a matrix → `y` FP32 [1,width].

    With `trips` None the number comes with each request as the input `trips` INT64 []. One round is some
    10–30 µs at the default width. The loop has nodes to stop between, so a cancel takes effect; a number
    such as 2**40 is a model that never ends.
    """
    rng = np.random.default_rng(11)
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["state", "weight"], ["product"]),
            helper.make_node("Tanh", ["product"], ["next"]),
            helper.make_node("Identity", ["go"], ["go_on"]),
        ],
        "round",
        [
            helper.make_tensor_value_info("round_number", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            _value("state", "FP32", [1, width]),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            _value("next", "FP32", [1, width]),
        ],
        [numpy_helper.from_array(rng.normal(0, 1 / math.sqrt(width), (width, width)).astype("f"), "weight")],
    )
    inputs = [_value("x", "FP32", [1, width])]
    constants: dict[str, NDArray[Any]] = {"true": np.array(True)}
    if trips is None:
        inputs.append(_value("trips", "INT64", []))
    else:
        constants["trips"] = np.array(trips, np.int64)
    loop = helper.make_node("Loop", ["trips", "true", "x"], ["y"], body=body)
    return _model([loop], inputs, [_value("y", "FP32", [1, width])], constants)


def memory_bomb(gib: float = 4.0) -> onnx.ModelProto:
    """A few hundred bytes that take `gib` GiB when loaded, since the runtime folds them to constants.

    In pieces below 1 GiB, the size that ONNX Runtime does not fold from version 1.32 on. Under a limit of
    memory that version gives up folding and loads; then the first run fails.
    """
    pieces = math.ceil(gib / 0.5)
    elements = int(gib * 2**30 / 4 / pieces)
    return _model(
        [helper.make_node("ConstantOfShape", ["shape"], [f"y{i}"]) for i in range(pieces)],
        [],
        [_value(f"y{i}", "FP32", [elements]) for i in range(pieces)],
        {"shape": np.array([elements], np.int64)},
    )


def memory_bomb_at_run() -> onnx.ModelProto:
    """`n` INT64 [1] → `y` FP32 [n]: loads well, then takes as much as the request asks."""
    return _model(
        [helper.make_node("ConstantOfShape", ["n"], ["y"])],
        [_value("n", "INT64", [1])],
        [_value("y", "FP32", ["N"])],
    )


def sigfpe() -> onnx.ModelProto:
    """Ends ONNX Runtime with SIGFPE while it loads: it folds the smallest INT64 divided by -1."""
    return _model(
        [helper.make_node("Div", ["least", "minus_one"], ["y"])],
        [],
        [_value("y", "INT64", [1])],
        {"least": np.array([INT64_MIN]), "minus_one": np.array([-1])},
    )


def sigfpe_at_run() -> onnx.ModelProto:
    """`x` INT64 [N], `d` INT64 [N] → `y`, x / d: a good model, until a request divides `INT64_MIN` by -1."""
    return _model(
        [helper.make_node("Div", ["x", "d"], ["y"])],
        [_value("x", "INT64", ["N"]), _value("d", "INT64", ["N"])],
        [_value("y", "INT64", ["N"])],
    )


def depth_to_space_overflow() -> onnx.ModelProto:
    """A block size of 2**32: SIGFPE in ONNX Runtime up to 1.31, an error at load later."""
    return _model(
        [helper.make_node("DepthToSpace", ["x"], ["y"], blocksize=2**32)],
        [_value("x", "FP32", [1, 4, 1, 1])],
        [_value("y", "FP32", None)],
    )


def openvino_killer() -> onnx.ModelProto:
    """Ends OpenVINO with SIGSEGV while it loads: external data said to lie at an address in memory."""
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1024])
    weight.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "*/_ORT_MEM_ADDR_/*"), ("offset", "4096"), ("length", "4096")):
        weight.external_data.add(key=key, value=value)
    model = _model(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        [_value("x", "FP32", [1024])],
        [_value("y", "FP32", [1024])],
    )
    model.graph.initializer.append(weight)
    return model


def ep_context() -> onnx.ModelProto:
    """A node that would make a runtime load code compiled elsewhere; the daemon must refuse it."""
    node = helper.make_node(
        "EPContext", ["x"], ["y"], domain="com.microsoft", embed_mode=1, ep_cache_context=b"native code"
    )
    return _model(
        [node],
        [_value("x", "FP32", [1])],
        [_value("y", "FP32", [1])],
        domains=[("com.microsoft", 1)],
    )


def external_data(folder: Path, *, scale: float = 2.0, file: str = "weights.bin") -> Path:
    """Writes `folder`/model.onnx with its weights beside it: `x` FP32 [N,64] → `y`, `scale` times it."""
    folder.mkdir(parents=True, exist_ok=True)
    model = _model(
        [helper.make_node("Gemm", ["x", "w"], ["y"])],
        [_value("x", "FP32", ["N", 64])],
        [_value("y", "FP32", ["N", 64])],
        {"w": np.eye(64, dtype=np.float32) * np.float32(scale)},
    )
    (folder / file).unlink(missing_ok=True)  # onnx appends to what is there
    path = folder / "model.onnx"
    onnx.save_model(
        model,
        str(path),
        save_as_external_data=True,
        all_tensors_to_one_file=True,
        location=file,
        size_threshold=0,
    )
    return path


def cache_dir() -> Path:
    """Where models that are dear to make or fetch are kept; `EDGED_TEST_CACHE` names another place."""
    named = os.environ.get("EDGED_TEST_CACHE")
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "edged-tests"


def real(name: str, *, seed: int = 2026) -> Path:
    """A real network's graph with seeded random weights, as a file in the cache.

    `name` is one of `REAL_MODELS`. The graphs come with the `onnx` package, whose weights are all one
    constant, so that every input gives the same answer; here convolutions and products get He-scaled
    normal weights and normalisations plausible statistics, and the answer depends on the input. Input
    FP32 [1,3,224,224], output FP32 of 1000 classes, each named as the graph's makers did.
    """
    path = cache_dir() / f"{name}-{seed}-{_REAL_FORMAT}.onnx"
    if not path.exists():
        write(path, _with_random_weights(_light_graph(name), seed))
    return path


def with_free_rows(path: Path) -> onnx.ModelProto:
    """A model of one picture as one of any number of them: its Reshapes name no number of rows any more."""
    model = onnx.load(str(path))
    graph = model.graph
    for value in (*graph.input, *graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "N"
    shapes = {node.input[1] for node in graph.node if node.op_type == "Reshape"}
    for tensor in graph.initializer:
        if tensor.name in shapes:
            sizes = numpy_helper.to_array(tensor).copy()
            sizes[0] = 0  # as many as there are
            tensor.CopyFrom(numpy_helper.from_array(sizes, tensor.name))
    del graph.value_info[:]
    return model


def _light_graph(name: str) -> onnx.ModelProto:
    if name not in REAL_MODELS:
        raise ValueError(f"no real model {name!r}; there are {', '.join(REAL_MODELS)}")
    folder = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
    return onnx.load(str(folder / f"light_{name}.onnx"))


def _with_random_weights(model: onnx.ModelProto, seed: int) -> onnx.ModelProto:
    """Replaces every constant parameter, an initializer or a ConstantOfShape's, by a random one."""
    rng = np.random.default_rng(seed)
    graph = model.graph
    given = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    shapes: dict[str, tuple[int, ...]] = {k: a.shape for k, a in given.items() if a.dtype == np.float32}
    made = {n.output[0] for n in graph.node if n.op_type == "ConstantOfShape" and n.input[0] in given}
    for node in graph.node:
        if node.output[0] in made:
            shapes[node.output[0]] = tuple(int(d) for d in given[node.input[0]])

    kept = [node for node in graph.node if node.output[0] not in made]
    parameters: dict[str, NDArray[np.float32]] = {}
    for node in kept:
        for position, parameter in enumerate(node.input):
            if parameter in shapes and parameter not in parameters:
                parameters[parameter] = _random_parameter(rng, node, position, shapes[parameter])
    used = {name for node in kept for name in node.input}
    initializers = [numpy_helper.from_array(a, k) for k, a in parameters.items()]
    initializers += [t for t in graph.initializer if t.name in used and t.name not in parameters]
    constant = {t.name for t in initializers}
    inputs = [i for i in graph.input if i.name in used and i.name not in constant]
    fresh = helper.make_graph(kept, graph.name, inputs, list(graph.output), initializers)
    # From version 4 on, initializers need not be listed as inputs too, which would make them overridable.
    return helper.make_model(fresh, opset_imports=list(model.opset_import), ir_version=7)


def _random_parameter(
    rng: np.random.Generator, node: onnx.NodeProto, position: int, shape: tuple[int, ...]
) -> NDArray[np.float32]:
    match node.op_type, position:
        case ("Conv", 1):
            values = rng.normal(0, math.sqrt(2 / math.prod(shape[1:])), shape)
        case ("Gemm", 1):  # the last layer: smaller, or the softmax behind it is one class at 1.0
            values = rng.normal(0, 0.2 * math.sqrt(2 / shape[1]), shape)
        case ("BatchNormalization", 1):
            values = rng.uniform(0.5, 1.0, shape)
        case ("BatchNormalization", 4):
            values = rng.uniform(0.5, 1.5, shape)
        case _:
            values = rng.normal(0, 0.1, shape)
    return values.astype(np.float32)
