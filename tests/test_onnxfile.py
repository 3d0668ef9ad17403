"""What an ONNX file says that a runtime does not: ranks, names, and inputs that may change in a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from edged.runtimes.onnxfile import dim_names, steady_inputs, unranked
from tests import zoo


def test_a_free_rank_is_told_from_a_scalar(tmp_path: Path) -> None:
    """No shape at all is a free rank; a shape of no dimensions is a scalar."""
    assert unranked(str(zoo.write(tmp_path / "free.onnx", zoo.free_rank()))) == {"x", "y"}
    assert unranked(str(zoo.write(tmp_path / "scalar.onnx", zoo.identity("FP32", [])))) == frozenset()
    assert unranked(str(zoo.write(tmp_path / "zipmap.onnx", zoo.zipmap()))) == frozenset()
    assert unranked(str(zoo.write(tmp_path / "slow.onnx", zoo.slow()))) == frozenset()


@pytest.mark.parametrize("shape", [["batch", 3, None, "W"], ["N"], [2, 3], []])
def test_both_runtimes_call_a_dimension_by_its_name(tmp_path: Path, shape: list[int | str | None]) -> None:
    """What an app reads in a shape must not depend on which runtime was found the fastest."""
    from edged.runtimes.base import LoadCancel, LoadRequest, create_runtime

    path = str(zoo.write(tmp_path / "m.onnx", zoo.identity("FP32", shape)))
    wanted = tuple(dim if isinstance(dim, str) else None for dim in shape)
    assert dim_names(path) == {"x": wanted, "y": wanted}
    for runtime in ("onnxruntime", "openvino"):
        model = create_runtime(runtime).load(LoadRequest(path), LoadCancel())
        for spec in (*model.inputs, *model.outputs):
            assert (spec.dim_names, spec.shape) == (
                wanted,
                tuple(dim if isinstance(dim, int) else -1 for dim in shape),
            )
    assert dim_names(str(zoo.write(tmp_path / "free.onnx", zoo.free_rank()))) == {}


def test_a_file_that_cannot_be_walked_says_nothing(tmp_path: Path) -> None:
    """Every truncation and every flipped byte gives a set, never an exception."""
    whole = zoo.free_rank().SerializeToString()
    for length in range(1, len(whole)):
        assert unranked(str(zoo.write(tmp_path / "cut.onnx", whole[:length]))) <= {"x", "y"}
    for at in range(len(whole)):
        bent = str(zoo.write(tmp_path / "bent.onnx", whole[:at] + b"\xff" + whole[at + 1 :]))
        unranked(bent)
        dim_names(bent)


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
    return steady_inputs(str(zoo.write(path / "m.onnx", graph(*nodes, inputs=inputs))))


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
    """Every truncation gives a set, never an exception."""
    whole = graph(("MatMul", "x w", "y", {})).SerializeToString()
    for length in range(1, len(whole)):
        steady_inputs(str(zoo.write(tmp_path / "cut.onnx", whole[:length])))


@pytest.mark.parametrize("name", ["squeezenet", "shufflenet"])
def test_image_models_are_read_in_place(name: str) -> None:
    """What leases are for."""
    assert steady_inputs(str(zoo.real(name)))
