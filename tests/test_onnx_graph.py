"""An ONNX file is read as the `onnx` package reads it, or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.backend.test.case.node import collect_testcases

from edged.runtimes.onnx_graph import (
    DATATYPES,
    Constant,
    Graph,
    metadata,
    read_graph,
    steady_inputs,
    unranked,
)
from tests import zoo


def same_value(ours: Any, theirs: onnx.AttributeProto) -> bool:
    """Whether an attribute was read as the package reads it."""
    wanted = helper.get_attribute_value(theirs)
    if isinstance(wanted, onnx.TypeProto):
        return ours is None
    if isinstance(wanted, onnx.TensorProto):
        return same_constant(ours, wanted)
    if isinstance(wanted, onnx.GraphProto):
        assert_same(ours, wanted)
        return True
    if isinstance(wanted, bytes):
        return ours in (wanted, wanted.decode("utf-8", "replace"))
    if isinstance(wanted, (int, float)):
        return type(ours) is type(wanted) and (ours == wanted or ours != ours)
    if all(isinstance(each, (int, float)) for each in wanted):
        return np.array_equal(ours, list(wanted))
    return len(ours) == len(wanted)


def same_constant(ours: Constant, theirs: onnx.TensorProto) -> bool:
    """Whether a tensor was read as the package reads it."""
    if ours.shape != tuple(theirs.dims) or ours.datatype != DATATYPES.get(theirs.data_type, ""):
        return False
    if ours.values is None:
        return True
    return np.array_equal(ours.values, numpy_helper.to_array(theirs), equal_nan=ours.values.dtype.kind == "f")


def assert_same(ours: Graph, theirs: onnx.GraphProto) -> None:
    """A graph is what the package reads; nodes in order, each with all that it has."""
    assert len(ours.nodes) == len(theirs.node)
    for mine, node in zip(ours.nodes, theirs.node, strict=True):
        domain = "" if node.domain == "ai.onnx" else node.domain
        assert (mine.op, mine.name, mine.domain) == (node.op_type, node.name, domain)
        assert (list(mine.inputs), list(mine.outputs)) == (list(node.input), list(node.output))
        assert mine.attributes.keys() == {a.name for a in node.attribute}
        assert all(same_value(mine.attributes[a.name], a) for a in node.attribute), mine
    assert ours.initializers.keys() == {t.name for t in theirs.initializer} | {
        t.values.name for t in theirs.sparse_initializer
    }
    assert all(same_constant(ours.initializers[t.name], t) for t in theirs.initializer)
    for mine_values, values in ((ours.inputs, theirs.input), (ours.outputs, theirs.output)):
        for info, value in zip(mine_values, values, strict=True):
            assert info.name == value.name
            if value.type.HasField("tensor_type"):
                tensor = value.type.tensor_type
                assert (info.kind, info.datatype) == ("tensor", DATATYPES.get(tensor.elem_type, ""))
                dims = tuple(
                    d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in tensor.shape.dim
                )
                assert info.shape == (dims if tensor.HasField("shape") else None)


@pytest.mark.filterwarnings("ignore")  # the package's own cases divide by zero and overflow on purpose
def test_every_node_model_of_onnx_is_read_as_the_package_reads_it(tmp_path: Path) -> None:
    """All operators, attributes and types that the standard's own tests have, subgraphs too."""
    cases = collect_testcases(None)
    assert len(cases) > 1000
    for case in cases:
        model = case.model
        if model.functions:
            continue
        ours = read_graph(str(zoo.write(tmp_path / "m.onnx", model)))
        assert_same(ours, model.graph)
        assert ours.opsets == {
            "" if each.domain == "ai.onnx" else each.domain: each.version for each in model.opset_import
        }


def test_functions_stand_where_they_are_called(tmp_path: Path) -> None:
    """Their nodes have the names and the attributes of the call; a function within a function too."""
    inner = helper.make_function(
        "own",
        "Leaky",
        ["a"],
        ["b"],
        [helper.make_node("LeakyRelu", ["a"], ["b"])],
        [helper.make_opsetid("", 17)],
        ["alpha"],
    )
    inner.node[0].attribute.add(name="alpha", type=onnx.AttributeProto.FLOAT, ref_attr_name="alpha")
    outer = helper.make_function(
        "own",
        "Twice",
        ["a"],
        ["b"],
        [
            helper.make_node("Leaky", ["a"], ["m"], domain="own", alpha=0.5),
            helper.make_node("Leaky", ["m"], ["b"], domain="own", alpha=0.25),
        ],
        [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)],
    )
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N"]) for n in "xy"]
    model = helper.make_model(
        helper.make_graph(
            [helper.make_node("Twice", ["x"], ["y"], domain="own")], "g", values[:1], values[1:]
        ),
        functions=[inner, outer],
        opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("own", 1)],
    )
    nodes = read_graph(str(zoo.write(tmp_path / "f.onnx", model))).nodes
    assert [node.op for node in nodes] == ["LeakyRelu", "LeakyRelu"]
    assert [node.attributes["alpha"] for node in nodes] == [0.5, 0.25]
    assert nodes[0].inputs == ("x",)
    assert nodes[0].outputs == nodes[1].inputs
    assert nodes[1].outputs == ("y",)


def call_itself() -> onnx.ModelProto:
    """A function without an end."""
    body = [helper.make_node("F", ["a"], ["b"], domain="own")]
    function = helper.make_function("own", "F", ["a"], ["b"], body, [helper.make_opsetid("own", 1)])
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N"]) for n in "xy"]
    call = helper.make_node("F", ["x"], ["y"], domain="own")
    return helper.make_model(helper.make_graph([call], "g", values[:1], values[1:]), functions=[function])


def disguised() -> onnx.ModelProto:
    """A function by the name of an operator: whichever of the two is run, one reader would be wrong."""
    body = [helper.make_node("Identity", ["a"], ["b"])]
    function = helper.make_function("", "Softmax", ["a"], ["b"], body, [helper.make_opsetid("", 17)])
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N"]) for n in "xy"]
    call = helper.make_node("Softmax", ["x"], ["y"])
    return helper.make_model(helper.make_graph([call], "g", values[:1], values[1:]), functions=[function])


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (call_itself(), "functions deeper than"),
        (disguised(), "runtime's own operator"),
        (b"", "empty"),
        (b"hello, world", "a wire type that ONNX does not use"),
    ],
    ids=["a function that calls itself", "a function like an operator", "empty", "text"],
)
def test_what_cannot_be_read_is_refused(tmp_path: Path, model: Any, why: str) -> None:
    """ValueError, with the reason."""
    with pytest.raises(ValueError, match=why):
        read_graph(str(zoo.write(tmp_path / "m.onnx", model)))


def field(number: int, wire: int, content: bytes) -> bytes:
    """A field of a message in protobuf's own form: its number, its wire type and what follows them."""
    key = number << 3 | wire
    return bytes([key] if key < 128 else [key & 127 | 128, key >> 7]) + content


def message(number: int, *fields: bytes) -> bytes:
    """A message within another."""
    content = b"".join(fields)
    size = len(content)
    return field(number, 2, bytes([size & 127 | 128, size >> 7]) + content)


def softmax(*attribute: bytes, dimension: bytes = field(1, 0, b"\4"), more: bytes = b"") -> bytes:
    """A file of one node, whose attribute `axis` has these fields, and whose input has this dimension."""
    text = [message(1, b"x"), message(2, b"y"), message(4, b"Softmax")]
    node = message(1, *text, message(5, message(1, b"axis"), *attribute))
    shape = message(2, message(1, message(2, b"N")), message(1, dimension))
    value = message(2, message(1, field(1, 0, b"\1"), shape))
    graph = message(7, node, message(11, message(1, b"x"), value), message(12, message(1, b"y"), value), more)
    return field(1, 0, b"\x08") + message(8, field(2, 0, b"\x11")) + graph


AXIS = (field(3, 0, b"\1"), field(20, 0, b"\2"))
BOOLEAN = (field(2, 0, b"\x09"), message(8, b"go"))


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (softmax(*AXIS, message(3, b"\0")), "a number of another kind"),
        (softmax(*AXIS, message(20, b"\2")), "a number of another kind"),
        (softmax(AXIS[0], field(20, 0, b"\x82\x80\x80\x80\x10")), "a type that is none"),
        (softmax(AXIS[0], field(20, 0, b"\x63")), "of an unknown type"),
        (softmax(*AXIS) + b"\xba\x80\x80\x80\x10\0", "a field's number that is none"),
        (softmax(*AXIS, dimension=field(1, 0, b"\4") + message(2, b"step")), "a number and a name"),
        (softmax(*AXIS, more=2 * message(5, *BOOLEAN, message(9, b"\1"))), "constant 'go' stands twice"),
        (
            softmax(*AXIS, more=message(5, field(2, 0, b"\1"), message(8, b"y"), message(9, b"\0" * 4))),
            "twice",
        ),
        (softmax(field(20, 0, b"\4")), "not a readable ONNX file"),
    ],
    ids=[
        "a number as bytes",
        "a type as bytes",
        "a type of more bits than protobuf reads",
        "a type that is not known",
        "a field of more bits than protobuf reads",
        "two forms of a dimension",
        "two constants of one name",
        "a constant that a node writes",
        "a tensor that is not there",
    ],
)
def test_what_another_reader_may_read_otherwise_is_refused(tmp_path: Path, model: bytes, why: str) -> None:
    """What is proved of a graph must be proved of the one that the runtime runs."""
    (axis,) = read_graph(str(zoo.write(tmp_path / "plain.onnx", softmax(*AXIS)))).nodes
    assert axis.attributes == {"axis": 1}
    with pytest.raises(ValueError, match=why):
        read_graph(str(zoo.write(tmp_path / "m.onnx", model)))


@pytest.mark.parametrize("content", [field(5, 0, b"\x80\2"), message(9, b"\2")], ids=["a number", "a byte"])
def test_a_boolean_that_is_neither_0_nor_1_is_not_known(tmp_path: Path, content: bytes) -> None:
    """What a runtime takes it for is its own matter; the rest of the file is read."""
    path = zoo.write(tmp_path / "m.onnx", softmax(*AXIS, more=message(5, *BOOLEAN, content)))
    assert read_graph(str(path)).initializers["go"].values is None


def of_another_version() -> onnx.ModelProto:
    """A function whose Softmax is not the model's."""
    body = [helper.make_node("Softmax", ["a"], ["b"], axis=1)]
    function = helper.make_function("own", "F", ["a"], ["b"], body, [helper.make_opsetid("", 11)])
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", 4]) for n in "xy"]
    graph = helper.make_graph(
        [helper.make_node("F", ["x"], ["y"], domain="own")], "g", values[:1], values[1:]
    )
    return helper.make_model(graph, functions=[function], opset_imports=[helper.make_opsetid("", 17)])


def in_a_function_s_name() -> onnx.ModelProto:
    """A tensor by the name that the call's own would be written under."""
    body = [helper.make_node("Relu", ["a"], ["t"]), helper.make_node("Relu", ["t"], ["b"])]
    function = helper.make_function("own", "F", ["a"], ["b"], body, [helper.make_opsetid("", 17)])
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", 4]) for n in "xy"]
    nodes = [
        helper.make_node("Neg", ["x"], ["F#1/t"]),
        helper.make_node("F", ["x"], ["f"], domain="own"),
        helper.make_node("Add", ["f", "F#1/t"], ["y"]),
    ]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:])
    return helper.make_model(graph, functions=[function], opset_imports=[helper.make_opsetid("", 17)])


def with_two_versions() -> onnx.ModelProto:
    """The same domain by both of its names."""
    proto = zoo.mlp(seed=1)
    proto.opset_import.append(helper.make_opsetid("ai.onnx", 11))
    return proto


def with_an_attribute_twice() -> onnx.ModelProto:
    """Of which a reader may take either."""
    proto = zoo.mlp(seed=1)
    proto.graph.node[0].attribute.extend([helper.make_attribute("axis", n) for n in (0, 1)])
    return proto


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (of_another_version(), "another version"),
        (in_a_function_s_name(), "written twice"),
        (with_two_versions(), "two versions of the domain"),
        (with_an_attribute_twice(), "attribute 'axis' stands twice"),
    ],
    ids=["a function's version", "a function's names", "a domain twice", "an attribute twice"],
)
def test_what_may_mean_two_things_is_refused(tmp_path: Path, model: onnx.ModelProto, why: str) -> None:
    """Whichever of the two is run, one reader would be wrong."""
    with pytest.raises(ValueError, match=why):
        read_graph(str(zoo.write(tmp_path / "m.onnx", model)))


def test_nodes_that_are_out_of_order_are_refused(tmp_path: Path) -> None:
    """Also what only a subgraph reads, and what is written twice."""
    late = graph(("Relu", "m", "y", {}), ("Relu", "x", "m", {}))
    body = helper.make_graph([helper.make_node("Relu", ["m"], ["b"])], "body", [], [])
    within = graph(("If", "c", "y", {"then_branch": body, "else_branch": body}), ("Relu", "x", "m", {}))
    for model in (late, within):
        with pytest.raises(ValueError, match="before it is written"):
            read_graph(str(zoo.write(tmp_path / "m.onnx", model)))
    twice = graph(("Relu", "x", "y", {}), ("Relu", "x", "y", {}))
    with pytest.raises(ValueError, match="written twice"):
        read_graph(str(zoo.write(tmp_path / "m.onnx", twice)))


def test_a_broken_file_is_a_value_error_and_nothing_else(tmp_path: Path) -> None:
    """Every truncation and every changed byte of a model with subgraphs, constants and functions."""
    whole = call_itself().SerializeToString() + zoo.mlp(seed=1).SerializeToString()[:400]
    body = helper.make_graph([helper.make_node("Relu", ["x"], ["b"])], "body", [], [])
    whole = graph(("If", "x", "y", {"then_branch": body, "else_branch": body})).SerializeToString() + whole
    for at in range(len(whole)):
        for bent in (
            whole[:at],
            whole[:at] + b"\xff" + whole[at + 1 :],
            whole[:at] + b"\x7a" + whole[at + 1 :],
        ):
            try:
                read_graph(str(zoo.write(tmp_path / "m.onnx", bent)))
            except ValueError:
                continue


@pytest.mark.parametrize("shape", [["batch", 3, None, "W"], ["N"], [2, 3], []])
def test_both_runtimes_call_a_dimension_by_its_name(tmp_path: Path, shape: list[int | str | None]) -> None:
    """What an app reads in a shape must not depend on which runtime was found the fastest."""
    from edged.runtimes.base import LoadCancel, LoadRequest, create_runtime

    path = str(zoo.write(tmp_path / "m.onnx", zoo.identity("FP32", shape)))
    wanted = tuple(dim if isinstance(dim, str) else None for dim in shape)
    for runtime in ("onnxruntime", "openvino"):
        model = create_runtime(runtime).load(LoadRequest(path), LoadCancel())
        for spec in (*model.inputs, *model.outputs):
            assert (spec.dim_names, spec.shape) == (
                wanted,
                tuple(dim if isinstance(dim, int) else -1 for dim in shape),
            )


def test_metadata_of_a_file_that_cannot_be_walked(tmp_path: Path) -> None:
    """Every truncation and every flipped byte gives texts, never an exception."""
    whole = zoo.saying({"labels": "cat"}, version=-1).SerializeToString()
    path = tmp_path / "m.onnx"
    fields, own = metadata(str(zoo.write(path, whole)))
    assert own == {"labels": "cat"}
    assert "version" not in fields  # ONNX Runtime does not tell of a negative one either
    for length in range(1, len(whole)):
        metadata(str(zoo.write(path, whole[:length])))
    for at in range(len(whole)):
        metadata(str(zoo.write(path, whole[:at] + b"\xff" + whole[at + 1 :])))
    latin = whole.replace(b"cat", b"c\xe4t")
    assert metadata(str(zoo.write(path, latin)))[1] == {"labels": r"c\xe4t"}


def test_a_free_rank_is_told_from_a_scalar(tmp_path: Path) -> None:
    """No shape at all is a free rank; a shape of no dimensions is a scalar."""
    assert unranked(str(zoo.write(tmp_path / "free.onnx", zoo.free_rank()))) == {"x", "y"}
    assert unranked(str(zoo.write(tmp_path / "scalar.onnx", zoo.identity("FP32", [])))) == frozenset()
    assert unranked(str(zoo.write(tmp_path / "zipmap.onnx", zoo.zipmap()))) == frozenset()
    assert unranked(str(zoo.write(tmp_path / "slow.onnx", zoo.slow()))) == frozenset()


def test_a_file_that_cannot_be_walked_says_nothing(tmp_path: Path) -> None:
    """Every truncation and every flipped byte gives a set, never an exception."""
    whole = zoo.free_rank().SerializeToString()
    for length in range(1, len(whole)):
        assert unranked(str(zoo.write(tmp_path / "cut.onnx", whole[:length]))) <= {"x", "y"}
    for at in range(len(whole)):
        unranked(str(zoo.write(tmp_path / "bent.onnx", whole[:at] + b"\xff" + whole[at + 1 :])))


@pytest.mark.parametrize("name", ["free", "scalar"])
def test_onnx_runtime_takes_the_file_s_word(tmp_path: Path, name: str) -> None:
    """The loaded model declares what the file does."""
    from edged.runtimes.base import LoadCancel, LoadRequest, create_runtime

    model = zoo.free_rank() if name == "free" else zoo.identity("FP32", [])
    path = zoo.write(tmp_path / "m.onnx", model)
    loaded = create_runtime("onnxruntime").load(LoadRequest(str(path)), LoadCancel())
    wanted = None if name == "free" else ()
    assert (loaded.inputs[0].shape, loaded.outputs[0].shape) == (wanted, wanted)


def graph(*nodes: Any, inputs: Sequence[str] = ("x",)) -> onnx.ModelProto:
    """A model of these nodes, each `(op, inputs, outputs, …attributes)`; no runtime need take it."""
    made = [helper.make_node(op, ins.split(), outs.split(), **rest) for op, ins, outs, rest in nodes]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N"]) for n in inputs]
    out = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N"])]
    return helper.make_model(helper.make_graph(made, "g", values, out))


def steady(path: Path, *nodes: Any, inputs: Sequence[str] = ("x",)) -> frozenset[str]:
    """What is said of a model of these nodes."""
    return steady_inputs(read_graph(str(zoo.write(path / "m.onnx", graph(*nodes, inputs=inputs)))))


def test_numbers_that_are_only_computed_with_may_change(tmp_path: Path) -> None:
    """Products and sums; what a sort or a lookup gets in the end may not, by whatever way it comes there."""
    assert steady(tmp_path, ("MatMul", "x w", "y", {})) == {"x"}
    assert steady(
        tmp_path, ("Sub", "x m", "a", {}), ("Conv", "a w", "b", {}), ("TopK", "b k", "y i", {})
    ) == {"x"}
    assert steady(tmp_path, ("TopK", "x k", "y i", {})) == frozenset()
    assert steady(tmp_path, ("Reshape", "x s", "a", {}), ("TopK", "a k", "y i", {})) == frozenset()
    assert steady(tmp_path, ("Mul", "x one", "a", {}), ("Sort", "a", "y", {})) == frozenset()
    assert steady(tmp_path, ("MatMul", "x w", "y", {}), ("Unique", "x", "z", {})) == frozenset()
    assert steady(tmp_path, ("MatMul", "x w", "y", {"domain": "com.vendor"})) == frozenset()


def test_each_input_is_judged_by_itself(tmp_path: Path) -> None:
    """Until they meet."""
    nodes = [("MatMul", "x w", "a", {}), ("Gather", "z a", "y", {})]
    assert steady(tmp_path, *nodes, inputs=("x", "z")) == {"x"}
    nodes = [("Add", "x z", "a", {}), ("TopK", "a k", "y i", {})]
    assert steady(tmp_path, *nodes, inputs=("x", "z")) == frozenset()


def test_a_subgraph_sees_what_is_around_it(tmp_path: Path) -> None:
    """Inside it no path is followed."""
    body = helper.make_graph([helper.make_node("TopK", ["x", "k"], ["b", "i"])], "body", [], [])
    branch = ("If", "c", "y", {"then_branch": body, "else_branch": body})
    assert steady(tmp_path, branch) == frozenset()
    other = helper.make_graph([helper.make_node("TopK", ["u", "k"], ["b", "i"])], "body", [], [])
    branch = ("If", "c", "q", {"then_branch": other, "else_branch": other})
    assert steady(tmp_path, branch, ("MatMul", "x w", "r", {})) == {"x"}
    assert steady(tmp_path, ("MatMul", "x w", "r", {}), ("ArgMax", "r", "y", {"axis": 0})) == {"x"}


def test_a_bent_file_is_steady_nowhere_or_says_so(tmp_path: Path) -> None:
    """Of what is left of a file no more is steady than of the whole."""
    whole = graph(("MatMul", "x w", "y", {})).SerializeToString()
    for length in range(1, len(whole)):
        try:
            left = read_graph(str(zoo.write(tmp_path / "cut.onnx", whole[:length])))
        except ValueError:
            continue
        assert steady_inputs(left) <= {"x"}


@pytest.mark.parametrize("name", ["squeezenet", "shufflenet"])
def test_image_models_are_read_in_place(name: str) -> None:
    """What leases are for."""
    assert steady_inputs(read_graph(str(zoo.real(name))))
