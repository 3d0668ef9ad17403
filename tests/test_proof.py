"""What a graph says against a move: by a table of operators, and by what reaches what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto as T
from onnx import helper, numpy_helper

from edged.proof import FINITE_INPUTS, Obstacle, judge, obstacles, sentence
from edged.runtimes import operators
from edged.runtimes.onnx_graph import read_graph
from edged.runtimes.operators import Row, Side, Table, read_table
from tests import zoo

AGREES = Row("", "", ("FP32",), frozenset({"axis", "perm"}))
RELU, NAN = "Relu-14(FP32)", "NaN: NaN in other places"
FINITE_ONLY = Row("", NAN, ("FP32",))
ROWS = {
    "Add-14(FP32,FP32=)": AGREES,
    "Add-14(FP32,FP32)": AGREES,
    "Concat-13(FP32...)": AGREES,
    "Gather-13(FP32,INT64=)": AGREES,
    "Reshape-19(FP32,INT64#)": AGREES,
    "Reshape-19(FP32,INT64=)": AGREES,
    "Relu-14(FP32)": FINITE_ONLY,
    "Mul-14(INT64,INT64)": Row("beyond 2^31: openvino refuses what onnxruntime answers", "", ("INT64",)),
    "Cast-19(INT64; to=1)": AGREES,
}
TABLE = Table((Side("a", "1", "CPU"), Side("b", "1", "CPU")), "x", ROWS)

node = helper.make_node


def graph(
    tmp_path: Path,
    nodes: Sequence[onnx.NodeProto],
    *,
    inputs: Mapping[str, int] | None = None,
    constants: Mapping[str, Any] | None = None,
    outputs: Sequence[str] = ("y",),
    opset: int = 20,
    domain: str = "",
) -> Any:
    """A graph as it is read from a file."""
    model = helper.make_model(
        helper.make_graph(
            list(nodes),
            "g",
            [helper.make_tensor_value_info(n, t, ["N", 4]) for n, t in (inputs or {"x": T.FLOAT}).items()],
            [helper.make_tensor_value_info(n, T.FLOAT, None) for n in outputs],
            [numpy_helper.from_array(np.asarray(value), n) for n, value in (constants or {}).items()],
        ),
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid("com.example", 1)],
        ir_version=9,
    )
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    return read_graph(str(path))


def told(found: Any, *, finite: bool = False) -> list[str]:
    """The obstacles of a graph, as sentences."""
    return [str(each) for each in obstacles(found, TABLE, finite_inputs=finite)]


def test_a_graph_of_operators_that_agree_has_nothing_against_it(tmp_path: Path) -> None:
    """The one case in which a model may be moved at all."""
    found = graph(tmp_path, [node("Add", ["x", "c"], ["y"])], constants={"c": np.float32(1)})
    assert told(found) == []


def test_nan_is_asked_for_unless_the_owner_says_that_it_never_comes(tmp_path: Path) -> None:
    """And it is said that this word would be enough."""
    found = graph(tmp_path, [node("Relu", ["x"], ["r"]), node("Relu", ["r"], ["y"])])
    (obstacle,) = obstacles(found, TABLE, finite_inputs=False)
    assert obstacle == Obstacle(f"{RELU} differs on NaN, Inf or denormals ({NAN})", FINITE_INPUTS, 2)
    assert sentence([obstacle]).endswith(f"(2 nodes); {FINITE_INPUTS}")
    assert told(found, finite=True) == []


def test_the_owners_word_is_not_offered_where_it_is_not_enough(tmp_path: Path) -> None:
    """What nobody can allow stands first."""
    nodes = [node("Relu", ["x"], ["y"]), node("Mul", ["n", "n"], ["z"])]
    found = graph(tmp_path, nodes, inputs={"x": T.FLOAT, "n": T.INT64}, outputs=["y", "z"])
    both = obstacles(found, TABLE, finite_inputs=False)
    assert [each.remedy for each in both] == ["", FINITE_INPUTS]
    assert "Mul-14(INT64,INT64) disagrees (beyond 2^31" in sentence(both)
    assert FINITE_INPUTS not in sentence(both)
    assert len(told(found, finite=True)) == 1


def test_sizes_that_are_computed_from_shapes_are_in_nobodys_way(tmp_path: Path) -> None:
    """INT64 arithmetic and positions, as every exporter writes them around a Reshape."""
    nodes = [
        node("Shape", ["x"], ["s"]),
        node("Gather", ["s", "zero"], ["n"]),
        node("Mul", ["n", "two"], ["m"]),
        node("Unsqueeze", ["m", "axes"], ["u"]),
        node("Concat", ["u", "rest"], ["shape"], axis=0),
        node("Reshape", ["x", "shape"], ["y"]),
    ]
    constants = {"zero": np.int64(0), "two": np.int64(2), "axes": np.array([0]), "rest": np.array([-1])}
    assert told(graph(tmp_path, nodes, constants=constants)) == []


def test_what_is_computed_from_constants_is_compared_by_running_it(tmp_path: Path) -> None:
    """It is the same in every run; what the operators are called does not count."""
    nodes = [
        node("Constant", [], ["a"], value=numpy_helper.from_array(np.float32([1, 2]))),
        node("Erf", ["a"], ["b"]),
        node("Add", ["x", "b"], ["y"]),
    ]
    assert told(graph(tmp_path, nodes)) == []


def test_a_constant_that_a_request_may_replace_is_data(tmp_path: Path) -> None:
    """What is in it then is not what was compared."""
    found = graph(tmp_path, [node("Add", ["x", "c"], ["y"])], constants={"c": np.float32(1)})
    rows = {"Add-14(FP32,FP32=)": AGREES}
    table = Table(TABLE.sides, "x", rows)
    assert obstacles(found, table, finite_inputs=False) == ()
    (obstacle,) = obstacles(found, table, finite_inputs=False, replaceable=frozenset("c"))
    assert obstacle.why == "Add-14(FP32,FP32) was not tried"


def test_what_no_output_depends_on_counts_too(tmp_path: Path) -> None:
    """ONNX Runtime runs it, and refuses what it refuses; OpenVINO leaves it out."""
    nodes = [node("Add", ["x", "x"], ["unused"]), node("Add", ["x", "x"], ["y"])]
    (found,) = told(graph(tmp_path, nodes))
    assert found.startswith("Add 'unused' is needed by no output")


@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        ([node("Mul", ["n", "n"], ["y"])], "Mul-14(INT64,INT64) disagrees"),
        ([node("Add", ["n", "n"], ["y"])], "Add-14(INT64,INT64) was not tried"),
        ([node("Gather", ["table", "n"], ["y"])], "Gather-13(FP32=,INT64) was not tried"),
        ([node("Reshape", ["x", "n"], ["y"])], "takes its input 2, a size or a position, from the data"),
        ([node("Add", ["d", "d"], ["y"])], "Add of FP64"),
        ([node("Concat", ["x", "table"], ["y"], axis=0)], "Concat-13(FP32|FP32=...) was not tried"),
        ([node("Concat", ["x", "x"], ["y"], axis=0, other=1)], "was not tried with other"),
        ([node("RandomNormalLike", ["x"], ["y"])], "RandomNormalLike-1(FP32) was not tried"),
        ([node("RandomNormal", [], ["y"], shape=[1])], "RandomNormal-1() was not tried"),
        (
            [node("Relu", ["x"], ["y"], domain="com.example")],
            "com.example.Relu is no operator",
        ),
        ([node("NoSuchThing", ["x"], ["y"])], "NoSuchThing is no operator that was tried"),
        ([node("Add", ["e", "e"], ["y"])], "was not tried"),
    ],
    ids=repr,
)
def test_what_was_not_shown_to_agree_keeps_a_model_where_it_is(
    tmp_path: Path, nodes: list[onnx.NodeProto], words: str
) -> None:
    """Whatever it is; the owner's word on NaN changes nothing about it."""
    inputs = {"x": T.FLOAT, "n": T.INT64, "d": T.DOUBLE}
    found = graph(tmp_path, nodes, inputs=inputs, constants={"table": np.ones((3, 4), "f4")})
    (text,) = told(found, finite=True)
    assert words in text


def test_an_index_that_a_cast_hides_is_still_data(tmp_path: Path) -> None:
    """What is computed from data is data, through any number of operators."""
    nodes = [node("Cast", ["n"], ["f"], to=1), node("Add", ["f", "f"], ["g"]), node("Relu", ["g"], ["y"])]
    found = graph(tmp_path, nodes, inputs={"n": T.INT64})
    assert told(found) == [f"{RELU} differs on NaN, Inf or denormals ({NAN})"]


def test_a_graph_within_a_node_is_not_looked_into(tmp_path: Path) -> None:
    """Which of its branches runs is the data's to say."""
    value = helper.make_tensor_value_info("b", T.FLOAT, None)
    branch = helper.make_graph([node("Add", ["x", "x"], ["b"])], "b", [], [value])
    nodes = [node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)]
    found = graph(tmp_path, nodes, constants={"c": np.array(True)})
    assert told(found, finite=True) == ["If has a graph of its own, which is not looked into"]


def test_an_output_that_nobody_reads_does_not_count(tmp_path: Path) -> None:
    """Exporters name them all; a runtime that answers the used one alike answers alike."""
    rows = {"Dropout-13(FP32)": AGREES, "Dropout-13(FP32; outputs=0+1)": Row("no", "", ("FP32", "BOOL"))}
    table = Table(TABLE.sides, "x", rows)
    nodes = [node("Dropout", ["x"], ["y", "mask"])]
    assert obstacles(graph(tmp_path, nodes), table, finite_inputs=False) == ()
    (obstacle,) = obstacles(graph(tmp_path, nodes, outputs=["y", "mask"]), table, finite_inputs=False)
    assert "outputs=0+1" in obstacle.why


def test_a_softmax_over_the_last_axis_is_known_by_that(tmp_path: Path) -> None:
    """By number where the rank is not known: up to opset 12 the others are another operation."""
    rows = {"Softmax-11(FP32; axis=last)": AGREES}
    table = Table(TABLE.sides, "x", rows)
    for axis, shape, known in (
        (1, [None, 4], True),
        (-1, None, True),
        (1, [1, 2, 4], False),
    ):
        nodes = [node("Softmax", ["x"], ["y"], axis=axis)]
        model = onnx.load_from_string((graph(tmp_path, nodes, opset=12), tmp_path / "m.onnx")[1].read_bytes())
        del model.graph.output[:]
        model.graph.output.append(helper.make_tensor_value_info("y", T.FLOAT, shape))
        (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
        found = obstacles(read_graph(str(tmp_path / "m.onnx")), table, finite_inputs=False)
        assert (found == ()) == known, (axis, shape)


@pytest.mark.parametrize(
    ("nodes", "axis"),
    [
        ([node("Transpose", ["u"], ["s"], perm=[0, 2, 1])], 2),
        ([node("Flatten", ["u"], ["s"])], 1),
        (
            [
                node("Flatten", ["u"], ["f"]),
                node("MatMul", ["f", "w"], ["m"]),
                node("Add", ["m", "b"], ["s"]),
            ],
            1,
        ),
        ([node("Transpose", ["u"], ["t"], perm=[1, 0, 2]), node("Squeeze", ["t"], ["s"], axes=[0])], 1),
        ([node("Flatten", ["u"], ["f"]), node("Unsqueeze", ["f"], ["s"], axes=[0])], 2),
    ],
    ids=lambda value: " ".join(each.op_type for each in value) if isinstance(value, list) else str(value),
)
def test_ranks_are_followed_as_far_as_they_are_told(
    tmp_path: Path, nodes: list[onnx.NodeProto], axis: int
) -> None:
    """From weights and permutations on; nothing is known of the input here."""
    constants = {"w": np.ones((4, 2), "f4"), "b": np.ones(4, "f4")}
    for given, last in ((axis, True), (axis + 1, False)):
        softmax = [node("Softmax", ["s"], ["p"], axis=given), node("Relu", ["p"], ["y"])]
        found = graph(tmp_path, [node("Relu", ["x"], ["u"]), *nodes, *softmax], constants=constants, opset=12)
        found = replace(found, inputs=(replace(found.inputs[0], shape=None),))
        texts = " ".join(told(found))
        assert ("Softmax-11(FP32; axis=last)" in texts) == last
        assert (f"Softmax-11(FP32; axis={given})" in texts) == (not last)


def test_an_opset_to_come_is_not_known(tmp_path: Path) -> None:
    """The operator may be another one there."""
    found = graph(tmp_path, [node("Add", ["x", "x"], ["y"])], opset=1000)
    assert told(found) == ["Add is no operator that was tried"]


def test_a_pair_without_a_table_is_said_and_how_to_make_one(tmp_path: Path) -> None:
    """Also for the same runtime on another device."""
    zoo.write(tmp_path / "m.onnx", zoo.mlp())
    settings = {
        "path": str(tmp_path / "m.onnx"),
        "format": "onnx",
        "operators_dir": str(tmp_path),
        "reference": {"runtime": "onnxruntime", "device": "CPU"},
        "candidate": {"runtime": "onnxruntime", "device": "CUDA:0"},
    }
    (obstacle,) = judge(settings)
    assert "no table of operators for onnxruntime" in obstacle.why
    assert "CUDA here" in obstacle.why
    assert obstacle.remedy.startswith("`edgectl operators --candidate onnxruntime:CUDA:0` makes one")


def test_many_obstacles_are_one_sentence() -> None:
    """The first three, and how many more there are."""
    found = [Obstacle(f"{n} was not tried") for n in "abcde"]
    assert sentence(found) == "a was not tried; b was not tried; c was not tried; and 2 more of the kind"


def shipped() -> Table:
    """A table that comes with edged; what it says of a graph does not depend on this machine."""
    return read_table(sorted(operators._FOLDER.glob("operators-*.json"))[0], trusted=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.REAL_MODELS)
def test_real_networks_may_be_moved_by_the_owners_word_alone(name: str) -> None:
    """ResNet-50, SqueezeNet, ShuffleNet: nothing but NaN in a rectifier and its like stands against them."""
    found = read_graph(str(zoo.real(name)))
    assert obstacles(found, shipped(), finite_inputs=True) == ()
    against = obstacles(found, shipped(), finite_inputs=False)
    assert against
    assert {each.remedy for each in against} == {FINITE_INPUTS}


def test_the_shipped_table_knows_what_parts_the_runtimes() -> None:
    """The kinds of wrong answers that a move has given in silence."""
    rows = shipped().rows
    for name in (
        "Mul-14(INT64,INT64)",
        "Add-14(INT64,INT64)",
        "Mod-13(INT64,INT64)",
        "Div-14(INT32,INT32)",
        "Gather-13(FP32=,INT64)",
        "Cast-13(FP32; to=2)",
        "Sub-14(UINT8,UINT8)",
    ):
        assert rows[name].finite, name
    for name in (RELU, "MaxPool-12(FP32)", "Softmax-13(FP32; axis=last)", "Exp-13(FP32)"):
        assert not rows[name].finite, name
        assert rows[name].nonfinite, name


@pytest.mark.parametrize(
    ("pads", "mode"), [([0, -1, 0, 0], "edge"), ([0, -1, 0, 0], "constant"), (None, "edge")]
)
def test_pads_that_may_cut_are_not_moved(tmp_path: Path, pads: list[int] | None, mode: str) -> None:
    """Where nothing is left to copy from, one runtime refuses what the other answers."""
    nodes = [node("Pad", ["x", "pads"], ["y"], mode=mode)]
    constants = {} if pads is None else {"pads": np.array(pads)}
    if pads is None:
        nodes = [node("Shape", ["x"], ["s"]), node("Concat", ["s", "s"], ["pads"], axis=0), *nodes]
    found = told(graph(tmp_path, nodes, constants=constants))
    assert found == ["Pad with pads below zero, which cut, was not tried"]
