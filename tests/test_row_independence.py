"""Whether rows stand alone is read off the graph; the node that mixes them, or is not known, is named."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.backend.test.case.node import collect_testcases

from edged.row_independence import changes, read_rows
from edged.row_independence.sizes import ONE, ROWS, Names, Size, product
from edged.row_independence.values import Mixes, Value, reshaped
from edged.runtimes.onnx_graph import read_graph
from edged.runtimes.openvino_graph import graph_of
from tests import zoo

F, I64, U8 = TensorProto.FLOAT, TensorProto.INT64, TensorProto.UINT8


def node(op: str, inputs: str, outputs: str, domain: str = "", **attributes: Any) -> onnx.NodeProto:
    """A node by the names of what it reads and writes; ``_`` is left out."""
    names = ["" if name == "_" else name for name in inputs.split()]
    return helper.make_node(op, names, outputs.split(), domain=domain, **attributes)


def model(
    nodes: Sequence[onnx.NodeProto],
    inputs: dict[str, tuple[int, Sequence[Any]]],
    outputs: Sequence[str] = ("y",),
    *,
    opset: int = 17,
    **constants: Any,
) -> onnx.ModelProto:
    """A model of these nodes, whose outputs declare nothing but a free first dimension."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(n, t, s) for n, (t, s) in inputs.items()],
        [helper.make_tensor_value_info(n, F, None) for n in outputs],
        [numpy_helper.from_array(np.asarray(a), n) for n, a in constants.items()],
    )
    opsets = [helper.make_opsetid(d, v) for d, v in (("", opset), ("ai.onnx.ml", 3), ("com.microsoft", 1))]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def why(folder: Path, proto: onnx.ModelProto) -> str:
    """Why the rows may not share a run; empty where they may."""
    return read_rows(read_graph(str(zoo.write(folder / "m.onnx", proto)))).why


X = {"x": (F, ["N", 4])}
SEQUENCE = {"x": (F, ["N", "step", 8])}
IMAGE = {"x": (F, ["N", 3, 8, 8])}


def i64(*numbers: int) -> Any:
    """A constant of whole numbers."""
    return np.array(numbers, np.int64)


def floats(*shape: int) -> Any:
    """A constant of floats."""
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def quantised() -> onnx.ModelProto:
    """Numbers that are quantised by the largest of all rows."""
    return model(
        [
            node("DynamicQuantizeLinear", "x", "q s z"),
            node("MatMulInteger", "q w z", "a"),
            node("Cast", "a", "f", to=F),
            node("Mul", "f s", "y"),
        ],
        X,
        w=np.ones((4, 2), np.int8),
    )


def branching(condition: str, *before: onnx.NodeProto) -> onnx.ModelProto:
    """An If over two branches that both keep rows apart."""
    branches = {
        name: helper.make_graph([node(op, "x", "b")], name, [], [helper.make_tensor_value_info("b", F, None)])
        for name, op in (("then_branch", "Relu"), ("else_branch", "Neg"))
    }
    return model([*before, node("If", condition, "y", **branches)], X, go=np.array(True), zero=floats(1) * 0)


def deciding(condition: str, *before: onnx.NodeProto, **constants: Any) -> onnx.ModelProto:
    """An If whose first branch keeps rows apart and whose other mixes them: what decides must be known."""
    out = [helper.make_tensor_value_info("b", F, None)]
    branches = {
        "then_branch": helper.make_graph([node("Relu", "x", "b")], "t", [], out),
        "else_branch": helper.make_graph([node("Softmax", "x", "b", axis=0)], "e", [], out),
    }
    return model([*before, node("If", condition, "y", **branches)], X, **constants)


def growing(size: str | None) -> onnx.ModelProto:
    """A Loop whose tensor is as wide as the input in its first turn only, and mixes rows in the others."""
    out = [helper.make_tensor_value_info("r", F, None)]
    branches = {
        "then_branch": helper.make_graph([node("Relu", "a", "r")], "t", [], out),
        "else_branch": helper.make_graph([node("Softmax", "a", "r", axis=0)], "e", [], out),
    }
    nodes = [
        node("Identity", "c", "d"),
        *(node("Shape", f"{of}", f"{of}s") for of in "ax"),
        *(node("Gather", f"{of}s one", f"{of}w") for of in "ax"),
        node("Equal", "aw xw", "same"),
        node("If", "same", "either", **branches),
        node("Concat", "either either", "b", axis=1),
    ]
    values = [("i", I64, []), ("c", TensorProto.BOOL, []), ("a", F, None), ("d", TensorProto.BOOL, [])]
    i, c, a, d = (helper.make_tensor_value_info(*each) for each in values)
    body = helper.make_graph(nodes, "body", [i, c, a], [d, helper.make_tensor_value_info("b", F, None)])
    loop = node("Loop", "turns _ x", "y", body=body)
    return model([loop], {"x": (F, ["N", size])}, turns=np.array(3), one=np.array(1))


def without_version() -> onnx.ModelProto:
    """A runtime takes its latest operators for those of a domain whose version the file does not say."""
    proto = model([node("Slice", "x a b a", "f"), node("Sub", "x f", "y")], X, a=i64(0), b=i64(1))
    del proto.opset_import[:]
    proto.opset_import.append(helper.make_opsetid("ai.onnx.ml", 3))
    return proto


NUMBER = (node("Shape", "x", "s"), node("Gather", "s nought", "n"))
"""How many rows there are, as `n`."""


def looping(body_op: str, carried: str = "x", **attributes: Any) -> onnx.ModelProto:
    """A Loop in which a tensor goes round."""
    values = [
        ("i", I64, []),
        ("c", TensorProto.BOOL, []),
        ("a", F, None),
        ("d", TensorProto.BOOL, []),
        ("b", F, None),
    ]
    i, c, a, d, b = (helper.make_tensor_value_info(*each) for each in values)
    body = helper.make_graph(
        [node("Identity", "c", "d"), node(body_op, "a", "b", **attributes)], "body", [i, c, a], [d, b]
    )
    return model([node("Loop", f"turns _ {carried}", "y", body=body)], X, turns=np.array(3))


def scanning(axis: int) -> onnx.ModelProto:
    """A Scan that adds up along an axis."""
    values = [("s", F, None), ("e", F, None), ("t", F, None), ("o", F, None)]
    s, e, t, o = (helper.make_tensor_value_info(*each) for each in values)
    body = helper.make_graph([node("Add", "s e", "t"), node("Identity", "t", "o")], "body", [s, e], [t, o])
    nodes = [
        node("ReduceSum", f"x {'one' if axis else 'nought'}", "zero", keepdims=0),
        node("Scan", "zero x", "y all", body=body, num_scan_inputs=1, scan_input_axes=[axis]),
    ]
    return model(nodes, X, one=i64(1), nought=i64(0))


def attention(*, mixed: bool = False) -> onnx.ModelProto:
    """A layer of a transformer as PyTorch's exporter writes it: shapes are computed from the input's."""
    heads = [
        node("Shape", "x", "shape"),
        node("Gather", "shape zero", "n"),
        node("Gather", "shape one", "step"),
        node("Unsqueeze", "n first", "n1"),
        node("Unsqueeze", "step first", "step1"),
        node("Concat", "n1 step1 two wide" if not mixed else "step1 n1 two wide", "split", axis=0),
        node("Concat", "n1 step1 eight", "joined", axis=0),
    ]
    for name in "qkv":
        heads += [
            node("MatMul", f"x w{name}", f"{name}0"),
            node("Reshape", f"{name}0 split", f"{name}1"),
            node("Transpose", f"{name}1", f"{name}2", perm=[0, 2, 1, 3] if name != "k" else [0, 2, 3, 1]),
        ]
    heads += [
        node("MatMul", "q2 k2", "scores"),
        node("Softmax", "scores", "weights", axis=-1),
        node("MatMul", "weights v2", "mixed"),
        node("Transpose", "mixed", "back", perm=[0, 2, 1, 3]),
        node("Reshape", "back joined", "flat"),
        node("Add", "flat x", "sum"),
        node("LayerNormalization", "sum gain bias", "y", axis=-1),
    ]
    return model(
        heads,
        SEQUENCE,
        zero=np.array(0),
        one=np.array(1),
        first=i64(0),
        two=i64(2),
        wide=i64(4),
        eight=i64(8),
        wq=floats(8, 8),
        wk=floats(8, 8),
        wv=floats(8, 8),
        gain=np.ones(8, np.float32),
        bias=np.zeros(8, np.float32),
    )


ALONE: dict[str, onnx.ModelProto] = {
    "a perceptron": zoo.mlp(seed=1),
    "flattened pictures": model(
        [
            node("Conv", "x w", "c", kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
            node("MaxPool", "c", "p", kernel_shape=[2, 2], strides=[2, 2]),
            node("Reshape", "p shape", "f"),
            node("Gemm", "f g", "y"),
        ],
        IMAGE,
        w=floats(5, 3, 3, 3),
        shape=i64(-1, 80),
        g=floats(80, 2),
    ),
    "a layer of a transformer": attention(),
    "rows in the middle": model(
        [
            node("Transpose", "x", "t", perm=[1, 0, 2]),
            node("MatMul", "t w", "m"),
            node("Softmax", "m", "s", axis=0),
            node("Transpose", "s", "y", perm=[1, 0, 2]),
        ],
        SEQUENCE,
        w=floats(8, 8),
    ),
    "a recurrent network, rows as its batch": model(
        [
            node("Transpose", "x", "t", perm=[1, 0, 2]),
            node("LSTM", "t w r", "states", hidden_size=3),
            node("Squeeze", "states one", "flat"),
            node("Transpose", "flat", "y", perm=[1, 0, 2]),
        ],
        SEQUENCE,
        w=floats(1, 12, 8),
        r=floats(1, 12, 3),
        one=i64(1),
    ),
    "initial states of a computed shape": model(
        [
            node("Shape", "x", "shape"),
            node("Gather", "shape zero", "n"),
            node("Unsqueeze", "n first", "n1"),
            node("Concat", "one n1 three", "state", axis=0),
            node("ConstantOfShape", "state", "h"),
            node("Transpose", "x", "t", perm=[1, 0, 2]),
            node("GRU", "t w r _ _ h", "_ last", hidden_size=3),
            node("Squeeze", "last first", "y"),
        ],
        SEQUENCE,
        zero=np.array(0),
        first=i64(0),
        one=i64(1),
        three=i64(3),
        w=floats(1, 9, 8),
        r=floats(1, 9, 3),
    ),
    "looked up, masked and averaged": model(
        [
            node("Gather", "table ids", "e"),
            node("Cast", "mask", "m", to=F),
            node("Unsqueeze", "m last", "m1"),
            node("Mul", "e m1", "masked"),
            node("ReduceSum", "masked one", "sum", keepdims=0),
            node("ReduceSum", "m one", "count", keepdims=1),
            node("Div", "sum count", "mean"),
            node("LpNormalization", "mean", "y"),
        ],
        {"ids": (I64, ["batch", "seq"]), "mask": (I64, ["batch_2", "seq"])},
        table=floats(50, 4),
        last=i64(-1),
        one=i64(1),
    ),
    "the best places": model([node("TopK", "x k", "y places")], X, k=i64(2)),
    "expanded to the input's shape": model(
        [node("Shape", "x", "s"), node("Expand", "c s", "e"), node("Add", "e x", "y")], X, c=floats(1, 4)
    ),
    "a branch whose condition is constant": branching("go"),
    "a branch by the size of a dimension": model(
        [
            *(node("Shape", "x", "s"), node("Gather", "s one", "step"), node("Equal", "step three", "short")),
            node(
                "If",
                "short",
                "y",
                then_branch=helper.make_graph(
                    [node("Relu", "x", "b")], "t", [], [helper.make_tensor_value_info("b", F, None)]
                ),
                else_branch=helper.make_graph(
                    [node("Neg", "x", "b")], "e", [], [helper.make_tensor_value_info("b", F, None)]
                ),
            ),
        ],
        SEQUENCE,
        one=np.array(1),
        three=np.array(3),
    ),
    "a loop that keeps rows apart": looping("Tanh"),
    "a scan along another axis": scanning(1),
    "resized pictures": model(
        [node("Resize", "x _ scales", "y", mode="nearest")], IMAGE, scales=np.array([1, 1, 2, 2], np.float32)
    ),
    "a product over named axes": model(
        [node("Einsum", "x w", "y", equation="bsd,de->bse")], SEQUENCE, w=floats(8, 3)
    ),
    "a part that no output needs": model([node("Relu", "x", "y"), node("ReduceMax", "x", "unused")], X),
    "looked up by each row's own number": model(
        [
            node("Shape", "x", "s"),
            node("Gather", "s nought", "n"),
            node("Gather", "s one", "m"),
            node("Range", "nought n one", "rows"),
            node("Range", "nought m one", "columns"),
            node("Unsqueeze", "rows behind", "r2"),
            node("Unsqueeze", "columns before", "c2"),
            node("Max", "r2 c2", "both"),
            node("Shape", "both", "shape"),
            *(node("Expand", f"{n} shape", f"{n}e") for n in ("r2", "c2")),
            *(node("Unsqueeze", f"{n}e last", f"{n}u") for n in ("r2", "c2")),
            node("Concat", "r2u c2u", "places", axis=-1),
            node("GatherND", "x places", "y"),
        ],
        {"x": (F, ["N", "M"])},
        nought=np.array(0),
        one=np.array(1),
        behind=i64(1),
        before=i64(0),
        last=i64(-1),
    ),
    "what is quantised by a constant": model(
        [
            node("QuantizeLinear", "x s z", "q"),
            node("MatMulInteger", "q w z", "a"),
            node("Cast", "a", "y", to=F),
        ],
        X,
        s=np.float32(0.1),
        z=np.uint8(3),
        w=np.ones((4, 2), np.int8),
    ),
    "a forest": model(
        [
            node(
                "TreeEnsembleRegressor",
                "x",
                "y",
                domain="ai.onnx.ml",
                n_targets=1,
                nodes_featureids=[0, 0, 0],
                nodes_falsenodeids=[2, 0, 0],
                nodes_truenodeids=[1, 0, 0],
                nodes_modes=["BRANCH_LEQ", "LEAF", "LEAF"],
                nodes_nodeids=[0, 1, 2],
                nodes_treeids=[0, 0, 0],
                nodes_values=[0.5, 0.0, 0.0],
                target_ids=[0, 0],
                target_nodeids=[1, 2],
                target_treeids=[0, 0],
                target_weights=[1.0, 2.0],
            )
        ],
        X,
    ),
    "inputs whose first dimensions have different names": model(
        [node("Add", "a b", "y")], {"a": (F, ["unk__214", 4]), "b": (F, ["unk__215", 4])}
    ),
}

TOGETHER: dict[str, tuple[onnx.ModelProto, str]] = {
    "quantised by all rows": (quantised(), "DynamicQuantizeLinear 'q' quantises by the smallest"),
    "scaled by the largest": (
        model([node("ReduceMax", "x", "m", keepdims=1), node("Div", "x m", "y")], X),
        "ReduceMax 'm' works along the axis of the rows",
    ),
    "softmax over the rows": (
        model([node("Softmax", "x", "y", axis=0)], X),
        "Softmax 'y' works along the axis of the rows",
    ),
    "an old softmax, which takes all behind its axis": (
        model(
            [node("Transpose", "x", "t"), node("Softmax", "t", "s", axis=0), node("Transpose", "s", "y")],
            X,
            opset=11,
        ),
        "Softmax 's' works along the axis of the rows",
    ),
    "a view instead of a transpose": (
        model(
            [
                node("Shape", "x", "s"),
                node("Gather", "s order", "t"),
                node("Reshape", "x t", "v"),
                node("ReduceMean", "v", "y", axes=[0], keepdims=0),
            ],
            SEQUENCE,
            order=i64(1, 0, 2),
        ),
        "Reshape 'v' cuts rows apart",
    ),
    "a view in the middle of a transformer": (attention(mixed=True), "Reshape 'q1' cuts rows apart"),
    "divided by how many there are": (
        model(
            [
                node("Shape", "x", "s"),
                node("Gather", "s zero", "n"),
                node("Cast", "n", "f", to=F),
                node("Div", "x f", "y"),
            ],
            X,
            zero=np.array(0),
        ),
        "Cast 'f' computes with how many rows there are",
    ),
    "numbered rows": (
        model(
            [
                node("Shape", "x", "s"),
                node("Gather", "s zero", "n"),
                node("Range", "zero n one", "r"),
                node("Gather", "table r", "y"),
            ],
            X,
            zero=np.array(0),
            one=np.array(1),
            table=floats(99, 4),
        ),
        "output 'y' depends on where a row stands",
    ),
    "another row's, by its number": (
        model(
            [
                node("Shape", "x", "s"),
                node("Gather", "s nought", "n"),
                node("Range", "nought n one", "rows"),
                node("Mul", "rows nought", "first"),
                node("Gather", "x first", "y"),
            ],
            X,
            nought=np.array(0),
            one=np.array(1),
        ),
        "Gather 'y' looks up in the rows what other rows say",
    ),
    "a table with an entry for each row": (
        model([node("Add", "x c", "y")], X, c=floats(8, 4)),
        "Add 'y' puts the rows beside a constant that has 8 there",
    ),
    "rows beside columns": (
        model(
            [node("ReduceSum", "x one", "s", keepdims=0), node("Add", "x s", "y")],
            {"x": (F, ["N", "M"])},
            one=i64(1),
        ),
        "Add 'y' puts the rows of one input beside another axis",
    ),
    "a product of rows": (
        model([node("Transpose", "x", "t"), node("MatMul", "x t", "p"), node("MatMul", "p x", "y")], X),
        "MatMul 'p' multiplies rows with each other",
    ),
    "a sum in a product": (
        model([node("Transpose", "x", "t"), node("MatMul", "t x", "p"), node("MatMul", "x p", "y")], X),
        "MatMul 'p' adds up over the rows",
    ),
    "the first row": (
        model([node("Gather", "x zero", "f"), node("Sub", "x f", "y")], X, zero=np.array(0)),
        "Gather 'f' takes some of the rows",
    ),
    "a recurrent network, rows as its time": (
        model(
            [node("LSTM", "x w r", "states", hidden_size=3), node("Squeeze", "states one", "y")],
            {"x": (F, ["N", 1, 8])},
            w=floats(1, 12, 8),
            r=floats(1, 12, 3),
            one=i64(1),
        ),
        "LSTM 'states' works along the axis of the rows",
    ),
    "a window over the rows": (
        model(
            [
                node("Unsqueeze", "x axes", "picture"),
                node("MaxPool", "picture", "pooled", kernel_shape=[3, 1], pads=[1, 0, 1, 0]),
                node("Squeeze", "pooled axes", "y"),
            ],
            X,
            axes=i64(0, 1),
        ),
        "MaxPool 'pooled' works along the axis of the rows",
    ),
    "places that are counted over all rows": (
        model([node("MaxPool", "x", "p y", kernel_shape=[2, 2])], IMAGE, ["y"]),
        "MaxPool 'p' gives places that are counted over all rows",
    ),
    "training": (
        model(
            [node("BatchNormalization", "x g b m v", "y rm rv", training_mode=1)],
            IMAGE,
            ["y"],
            **{name: np.ones(3, np.float32) for name in "gbmv"},
        ),
        "BatchNormalization 'y' is in training mode",
    ),
    "random": (
        model([node("RandomNormalLike", "x", "r"), node("Add", "x r", "y")], X),
        "RandomNormalLike 'r' is random",
    ),
    "random, of a constant": (
        model([node("RandomUniform", "", "r", shape=[1, 4]), node("Add", "x r", "y")], X),
        "RandomUniform 'r' is random",
    ),
    "a list of all rows": (
        model([node("NonZero", "x", "i"), node("Transpose", "i", "y")], X),
        "NonZero 'i' gives places",
    ),
    "an operator that is not known": (
        model([node("Det", "x", "y")], {"x": (F, ["N", 2, 2])}),
        "Det 'y' is not in the table",
    ),
    "a domain that is not known": (
        model([node("Thing", "x", "y", domain="my.own")], X),
        "Thing 'y' is of the domain 'my.own'",
    ),
    "a branch that the rows decide": (
        branching("c", node("ReduceMax", "x", "m", keepdims=0), node("Greater", "m zero", "c")),
        "ReduceMax 'm' works along",
    ),
    "a loop that mixes rows": (
        looping("Softmax", axis=0),
        "Loop 'y' Softmax 'b' works along the axis of the rows",
    ),
    "a scan along the rows": (scanning(0), "works along the axis of the rows"),
    "one batch size": (
        model([node("Reshape", "x shape", "y")], X, shape=i64(1, 2, 2)),
        "Reshape 'y' has a new shape that is the same however many rows there are",
    ),
    "rows out of the first axis": (
        model([node("Transpose", "x", "y")], X),
        "output 'y' has not one entry for each row",
    ),
    "nothing of the rows": (
        model([node("Relu", "c", "y")], X, c=floats(1, 4)),
        "output 'y' does not depend on the rows",
    ),
    "the number of rows twice": (
        model([node("Relu", "x", "y")], {"x": (F, ["N", "N"])}),
        "input 'x' has the number of rows as another dimension too",
    ),
    "a sum of the shape's numbers": (
        deciding(
            "c",
            *NUMBER,
            node("ReduceSum", "s", "t", keepdims=0),
            node("Equal", "t n", "c"),
            nought=np.array(0),
        ),
        "ReduceSum 't' computes with how many rows there are",
    ),
    "a sum over no axes": (
        deciding(
            "c",
            node("ReduceSum", "v", "t", noop_with_empty_axes=1),
            node("Gather", "t nought", "first"),
            node("Equal", "first three", "c"),
            v=i64(1, 2),
            nought=np.array(0),
            three=np.array(3),
        ),
        "If 'y' Softmax 'b' works along",
    ),
    **{
        f"a number as {name}": (
            deciding(
                "c",
                node("Cast", "k", "narrow", to=kind),
                node("Cast", "narrow", "wide", to=I64),
                node("Equal", "wide k", "c"),
                k=np.array(number),
            ),
            "If 'y' Softmax 'b' works along",
        )
        for name, kind, number in (
            ("a byte", U8, 300),
            ("a boolean", TensorProto.BOOL, 3),
            ("an integer of 32 bits", TensorProto.INT32, 2**32 + 1),
        )
    },
    "bytes that wrap round": (
        deciding(
            "c",
            node("Add", "a b", "t"),
            node("Cast", "t", "wide", to=I64),
            node("Equal", "wide k", "c"),
            a=np.uint8(255),
            b=np.uint8(1),
            k=np.array(256),
        ),
        "If 'y' Softmax 'b' works along",
    ),
    "a product that wraps round": (
        deciding(
            "c",
            node("Mul", "k k", "t"),
            node("Div", "t k", "u"),
            node("Equal", "u k", "c"),
            k=np.array(2**32),
        ),
        "If 'y' Softmax 'b' works along",
    ),
    "whether there are rows": (
        deciding(
            "c",
            *NUMBER,
            node("Cast", "n", "any", to=TensorProto.BOOL),
            node("Cast", "any", "one", to=I64),
            node("Equal", "one n", "c"),
            nought=np.array(0),
        ),
        "Cast 'any' computes with how many rows there are",
    ),
    "looked up by whether a row is the first": (
        model(
            [
                *NUMBER,
                node("Range", "nought n one", "rows"),
                node("Cast", "rows", "later", to=TensorProto.BOOL),
                node("Cast", "later", "places", to=I64),
                node("Gather", "x places", "y"),
            ],
            X,
            nought=np.array(0),
            one=np.array(1),
        ),
        "Gather 'y' looks up in the rows what other rows say",
    ),
    "a loop that is true of its first turn": (growing("wide?"), "Softmax 'r' works along"),
    "a loop over a size without a name": (growing(None), "Softmax 'r' works along"),
    "operators of an unknown version": (
        without_version(),
        "Slice 'f' is of a version that the file does not say",
    ),
    "broadcast along an axis that is named": (
        model([node("Add", "x c", "y", broadcast=1, axis=0)], X, opset=6, c=floats(4)),
        "Add 'y' broadcasts in a way that is not followed",
    ),
    "scales that were cut out of others": (
        model(
            [
                node("Slice", "k two four", "a"),
                node("Concat", "a ones", "scales", axis=0),
                node("Resize", "x _ scales", "y", mode="nearest"),
            ],
            IMAGE,
            k=np.array([1, 1, 2, 2], np.float32),
            ones=np.ones(2, np.float32),
            two=i64(2),
            four=i64(4),
        ),
        "Resize 'y' resizes the axis of the rows",
    ),
    "a region of the rows": (
        model(
            [
                node(
                    "Resize",
                    "x region scales",
                    "y",
                    mode="nearest",
                    coordinate_transformation_mode="tf_crop_and_resize",
                )
            ],
            IMAGE,
            region=np.array([0, 0, 0, 0, 0.5, 1, 1, 1], np.float32),
            scales=np.array([1, 1, 2, 2], np.float32),
        ),
        "Resize 'y' resizes the axis of the rows",
    ),
    "between what are no pictures": (
        model(
            [node("Resize", "x _ scales", "y", mode="linear")],
            {"x": (F, ["N", 2, 6])},
            scales=np.array([1, 1, 2], np.float32),
        ),
        "Resize 'y' computes between rows",
    ),
    "resized as its pictures are": (
        model(
            [
                node("Shape", "x", "s"),
                node("Gather", "s nought", "n"),
                node("Concat", "n small", "sizes", axis=0),
                node("Resize", "x _ _ sizes", "a", keep_aspect_ratio_policy="not_larger"),
                node("Resize", "a _ _ s", "y"),
            ],
            IMAGE,
            opset=18,
            nought=i64(0),
            small=i64(3, 4, 4),
        ),
        "Resize 'a' resizes the axis of the rows",
    ),
    "a value for each row that is missing": (
        model(
            [
                node("Transpose", "x", "t"),
                node("Imputer", "t", "i", domain="ai.onnx.ml", imputed_value_floats=[1.0, 2.0, 3.0]),
                node("Transpose", "i", "y"),
            ],
            X,
        ),
        "Imputer 'i' has another value for each row",
    ),
    "places of computed numbers": (
        model(
            [node("MatMul", "x w", "m"), node("OneHot", "m depth values", "y")],
            X,
            w=floats(4, 4),
            depth=np.array(5),
            values=floats(2),
        ),
        "OneHot 'y' can make another answer of what the runtime rounds",
    ),
    "the nearest of a computed place": (
        model(
            [
                node("Conv", "x w", "c", kernel_shape=[1, 1]),
                node("Transpose", "c", "grid", perm=[0, 2, 3, 1]),
                node("GridSample", "x grid", "y", mode="nearest"),
            ],
            IMAGE,
            w=floats(2, 3, 1, 1),
        ),
        "GridSample 'y' can make another answer of what the runtime rounds",
    ),
    "an equation of a letter that nothing has": (
        model([node("Einsum", "x", "y", equation="ab->az")], X),
        "Einsum 'y' has an equation that is not followed",
    ),
    "an operator without its inputs": (
        model(
            [node("Scan", "x", "y", body=zoo.mlp(seed=1).graph, num_scan_inputs=1, scan_input_axes=["a"])], X
        ),
        "Scan 'y' is of a form that is not followed",
    ),
    "written to places that the input names": (
        model(
            [node("ScatterND", "x i u", "y")],
            {"x": (F, ["N", 4]), "i": (I64, ["N", 1]), "u": (F, ["N", 4])},
        ),
        "ScatterND 'y' writes to places",
    ),
}


@pytest.mark.parametrize("name", ALONE)
def test_rows_that_stand_alone(name: str, tmp_path: Path) -> None:
    """The graph says so, and what it says is what ONNX Runtime does."""
    assert why(tmp_path, ALONE[name]) == ""
    session = ort.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    assert_alone(session, made_up(session, 5), name)


@pytest.mark.parametrize("name", TOGETHER)
def test_what_keeps_rows_from_sharing_a_run_is_named(name: str, tmp_path: Path) -> None:
    """The node, and what it does with the rows."""
    proto, words = TOGETHER[name]
    assert words in why(tmp_path, proto)


def made_up(session: ort.InferenceSession, rows: int) -> dict[str, Any]:
    """Inputs of so many rows, and of 3 in every other free dimension."""
    rng = np.random.default_rng(1)
    feeds: dict[str, Any] = {}
    for arg in session.get_inputs():
        shape = [rows, *(d if isinstance(d, int) else 3 for d in arg.shape[1:])]
        whole = rng.integers(1, 30, shape)
        feeds[arg.name] = whole if "int64" in arg.type else rng.standard_normal(shape).astype(np.float32)
    return feeds


def assert_alone(session: ort.InferenceSession, feeds: dict[str, Any], name: str) -> None:
    """Each row is answered as it is alone, within what rounding gives."""
    rows = len(next(iter(feeds.values())))
    together = session.run(None, feeds)
    for at in range(rows):
        alone = session.run(None, {k: a[at : at + 1] for k, a in feeds.items()})
        for a, b in zip(alone, together, strict=True):
            assert same(a, b[at : at + 1]), f"{name}: row {at}"


def same(alone: Any, together: Any) -> bool:
    """Equal, for floats within 2e-5 of the largest."""
    if alone.shape != together.shape or alone.dtype != together.dtype:
        return False
    if alone.dtype.kind != "f":
        return bool(np.array_equal(alone, together))
    a, b = alone.astype("f8"), together.astype("f8")
    known = np.isfinite(a)
    largest = np.abs(a[known]).max(initial=0.0)
    return np.array_equal(a[~known], b[~known], equal_nan=True) and bool(
        np.all(np.abs(a[known] - b[known]) <= 2e-5 * largest)
    )


def cases() -> Iterator[tuple[str, onnx.ModelProto, dict[str, Any]]]:
    """ONNX's node tests as models of rows: the first input alone, or all that have as many rows."""
    for case in collect_testcases(None):
        inputs = case.data_sets[0][0] if case.data_sets else []
        values = list(case.model.graph.input)
        if len(inputs) != len(values) or not all(isinstance(a, np.ndarray) for a in inputs):
            continue
        if not values or not inputs[0].ndim or not inputs[0].shape[0]:
            continue
        alike = [
            v.name
            for v, a in zip(values, inputs, strict=True)
            if a.shape[:1] == inputs[0].shape[:1] and v.type.tensor_type.shape.dim
        ]
        if alike[:1] != [values[0].name]:
            continue
        for names in [alike[:1], alike][: len(alike)]:
            proto = onnx.ModelProto()
            proto.CopyFrom(case.model)
            del proto.graph.input[:]
            for value, array in zip(values, inputs, strict=True):
                if value.name not in names:
                    proto.graph.initializer.append(numpy_helper.from_array(array, value.name))
                    continue
                first = proto.graph.input.add()
                first.CopyFrom(value)
                first.type.tensor_type.shape.dim[0].dim_param = "N"
            for output in proto.graph.output:
                if output.type.HasField("tensor_type"):
                    output.type.tensor_type.ClearField("shape")
            feeds = {v.name: a for v, a in zip(values, inputs, strict=True) if v.name in names}
            yield f"{case.name} of {len(names)}", proto, feeds


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the package's own cases divide by zero and overflow on purpose
def test_the_table_says_of_onnx_s_own_tests_what_the_runtime_does(tmp_path: Path) -> None:
    """Beside its own rows, loud and turned round, no row of any operator's test is answered otherwise."""
    checked, operators = 0, set()
    for name, proto, feeds in cases():
        try:
            graph = read_graph(str(zoo.write(tmp_path / "m.onnx", proto)))
        except ValueError:
            continue
        if read_rows(graph).why:
            continue
        try:
            options = ort.SessionOptions()
            options.log_severity_level = 4
            session = ort.InferenceSession(
                str(tmp_path / "m.onnx"), options, providers=["CPUExecutionProvider"]
            )
            alone = session.run(None, feeds)
        except Exception:  # noqa: BLE001 - what this runtime does not have proves nothing about the table
            continue
        loud = {k: (a[::-1] * (50 if a.dtype.kind == "f" else 1)).astype(a.dtype) for k, a in feeds.items()}
        together = session.run(None, {k: np.concatenate([a, loud[k]]) for k, a in feeds.items()})
        for a, b in zip(alone, together, strict=True):
            assert len(b) == 2 * len(a), name
            assert same(a, b[: len(a)]), name
        checked += 1
        operators |= {each.op for each in graph.nodes}
    assert checked > 700
    assert len(operators) > 120


def test_integers_that_are_looked_up_are_known_to_their_table(tmp_path: Path) -> None:
    """Through whatever moves them: that is how far a proof may go, and should."""
    nodes = [
        node("Cast", "ids", "i", to=TensorProto.INT32),
        node("Unsqueeze", "i one", "u"),
        node("Gather", "table u", "e"),
        node("ReduceSum", "e one", "y", keepdims=0),
    ]
    proto = model(nodes, {"ids": (I64, ["N", "step"])}, table=floats(77, 4), one=i64(1))
    reading = read_rows(read_graph(str(zoo.write(tmp_path / "m.onnx", proto))))
    assert (reading.why, dict(reading.limits)) == ("", {"ids": 77})


@pytest.mark.parametrize("name", ["training", "random", "random, of a constant"])
def test_what_changes_by_being_run_is_told(name: str, tmp_path: Path) -> None:
    """Wherever in the graph it is."""
    graph = read_graph(str(zoo.write(tmp_path / "m.onnx", TOGETHER[name][0])))
    assert TOGETHER[name][1].split()[0] in changes(graph)
    assert not changes(read_graph(str(zoo.write(tmp_path / "m.onnx", zoo.mlp(seed=1)))))


@pytest.mark.parametrize(
    ("dims", "axis", "into", "wanted"),
    [
        ((ROWS, Size(6), Size(4)), 0, (ROWS, Size(24)), 0),
        ((ROWS, Size(6), Size(4)), 0, (ROWS * Size(6), Size(4)), 0),
        ((ROWS, Size(6), Size(4)), 0, (ROWS * Size(24),), 0),
        ((ROWS, Size(6), Size(4)), 0, (ONE, ROWS, Size(24)), 1),
        ((Size(6), ROWS, Size(4)), 1, (Size(6) * ROWS, Size(4)), 0),
        ((Size(6), ROWS, Size(4)), 1, (Size(2), Size(3), ROWS * Size(2), Size(2)), 2),
        ((ROWS, Size(6), Size(4)), 0, (Size(6), ROWS, Size(4)), None),
        ((ROWS, Size(6), Size(4)), 0, (Size(2), ROWS * Size(12)), None),
        ((Size(6), ROWS, Size(4)), 1, (ROWS, Size(24)), None),
        ((ROWS, Size(6), Size(4)), 0, (Size(24), ROWS), None),
    ],
    ids=str,
)
def test_a_reshape_keeps_what_lies_before_and_behind_the_rows(
    dims: tuple[Size, ...], axis: int, into: tuple[Size, ...], wanted: int | None
) -> None:
    """Axes may be merged and split around the rows, in the order of the elements."""
    value = Value(dims, axis)
    if wanted is None:
        with pytest.raises(Mixes):
            reshaped(value, into)
        return
    found = reshaped(value, into)
    assert found.axis == wanted
    assert reshaped(found, dims) == value


def test_sizes_are_products() -> None:
    """They multiply, divide where nothing is left over, and are the same where they look the same."""
    names = Names()
    step = names.of_dimension("step")
    assert (ROWS * Size(6) * step).over(Size(3) * step) == ROWS * Size(2)
    assert (ROWS * Size(6)).over(Size(4)) is None
    assert ROWS.over(step) is None
    assert product([ROWS, Size(0)]) == Size(0)
    assert str(Size(2) * step * ROWS) == "2·dim:step·rows"
    assert names.fresh() != names.fresh()
    assert names.of_expression("sum", step, ONE) == names.of_expression("sum", step, ONE)
    assert names.of_expression("sum", step, ONE).positive
    assert not names.of_expression("less", step, ONE).positive


def test_a_graph_made_to_be_slow_is_given_up(tmp_path: Path) -> None:
    """Loops in loops that settle late are followed many times, up to a bound."""
    inner: list[onnx.NodeProto] = []
    for level in range(16):
        names = [("i", I64), ("c", TensorProto.BOOL), ("p", F), ("q", F)]
        takes = [helper.make_tensor_value_info(f"{n}{level}", t, None) for n, t in names]
        gives = [helper.make_tensor_value_info(f"{n}{level}x", t, None) for n, t in names[1:]]
        nodes = [
            node("Identity", f"c{level}", f"c{level}x"),
            node("Identity", f"q{level}", f"p{level}x"),
            node("Concat", f"q{level} {f'more{level - 1}' if level else f'q{level}'}", f"q{level}x", axis=0),
        ]
        body = helper.make_graph([*inner, *nodes], "body", takes, gives)
        inner = [node("Loop", "turns _ k k", f"out{level} more{level}", body=body)]
    proto = model(
        [*inner, node("ReduceMax", "more15", "m", keepdims=0), node("Add", "x m", "y")],
        X,
        turns=np.array(3),
        k=floats(2),
    )
    assert "the graph takes too long to follow" in why(tmp_path, proto)


def ov_model(kind: str) -> Any:
    """A small model in OpenVINO's own operators."""
    import openvino as ov
    from openvino import opset13 as op
    from openvino import opset15

    x = op.parameter([-1, 3, 8], np.float32, name="x")
    x.output(0).get_tensor().set_names({"x"})
    if kind == "alone":
        w = op.constant(floats(5, 8))
        y = op.relu(op.matmul(x, w, False, True))
        y = op.reshape(y, op.constant(i64(0, 15)), True)
        y = op.softmax(y, 1)
    elif kind == "over rows":
        y = op.softmax(x, 0)
    elif kind == "largest":
        y = op.divide(x, op.reduce_max(x, op.constant(i64(0, 1, 2)), True))
    elif kind == "view":
        shape = op.gather(op.shape_of(x), op.constant(i64(1, 0, 2)), op.constant(i64(0)))
        y = op.reduce_mean(op.reshape(x, shape, False), op.constant(i64(0)), False)
    elif kind == "sequence":
        zero = op.constant(np.zeros((1, 1, 4), np.float32))
        batch = op.gather(op.shape_of(x), op.constant(i64(0)), op.constant(i64(0)))
        state = op.broadcast(zero, op.concat([batch, op.constant(i64(1, 4))], 0))
        lengths = op.broadcast(op.constant(i64(3)), batch)
        weights = [op.constant(floats(1, 16, n)) for n in (8, 4)]
        cell = op.lstm_sequence(x, state, state, lengths, *weights, op.constant(floats(1, 16)), 4, "forward")
        y = cell.output(0)
    elif kind == "broadcast along an axis":
        y = op.add(x, op.constant(floats(4)), auto_broadcast="pdpd")
    elif kind == "padded and resized":
        three = op.constant(i64(3))
        along = op.constant(i64(1))
        y = op.interpolate(x, three, "nearest", "sizes", [1, 0, 0], [0, 0, 0], axes=along)
    elif kind == "slopes":
        y = op.transpose(
            op.prelu(op.transpose(x, op.constant(i64(1, 0, 2))), op.constant(floats(8))),
            op.constant(i64(1, 0, 2)),
        )
    elif kind == "squeezed where it can be":
        turned = op.transpose(x, op.constant(i64(1, 0, 2)))
        y = opset15.squeeze(turned, op.constant(i64(0)), allow_axis_skip=True)
    elif kind == "reduced over no axes":
        y = op.add(x, op.reduce_sum(op.constant(floats(4, 1, 1)), op.constant(i64()), True))
    elif kind == "backwards":
        bounds = [op.constant(i64(*each)) for each in ((0, 0), (0, 0), (1, -1))]
        y = op.strided_slice(op.reshape(x, op.constant(i64(0, 24)), True), *bounds, [1, 1], [1, 1])
    else:
        read = op.read_value(op.constant(np.zeros((1, 3, 8), np.float32)), "v", np.float32, [1, 3, 8])
        total = op.add(read, x)
        return ov.Model([op.result(total)], [op.assign(total, "v")], [x], kind)
    return ov.Model([op.result(y)], [x], kind)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("alone", ""),
        ("sequence", ""),
        ("over rows", "works along the axis of the rows"),
        ("largest", "works along the axis of the rows"),
        ("view", "cuts rows apart"),
        ("state", "keeps a state, which is one for all rows"),
        ("broadcast along an axis", "broadcasts in a way that is not followed"),
        ("padded and resized", "pads before it resizes"),
        ("slopes", "has another slope for each row"),
        ("squeezed where it can be", "leaves an axis out only if it is 1"),
        ("reduced over no axes", "puts the rows beside a constant that has 4 there"),
        ("backwards", "goes backwards with bounds left out"),
    ],
)
def test_an_ir_is_read_over_its_own_graph(kind: str, words: str) -> None:
    """The same rules hold for OpenVINO's operators."""
    found = read_rows(graph_of(ov_model(kind))).why
    assert words in found
    assert bool(words) == bool(found)
