"""Nothing that the daemon does by itself changes an answer: no other request, no state, no warm-up."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edged import Client
from tests import zoo
from tests.e2e.harness import WAIT_S, Daemon, Edgectl

pytestmark = pytest.mark.e2e

IN_FLIGHT, ROUNDS = 48, 3
"""Requests of each of two clients that are out at once, so that whatever may share a run does."""

F, I64, U8 = TensorProto.FLOAT, TensorProto.INT64, TensorProto.UINT8


def model(nodes: list[onnx.NodeProto], inputs: dict[str, Any], shape: list[Any], **constants: Any) -> Any:
    """A model with one output `y`; `inputs` are datatype and shape by name."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, *each) for name, each in inputs.items()],
        [helper.make_tensor_value_info("y", F, shape)],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def node(op: str, inputs: str, outputs: str, **attributes: Any) -> onnx.NodeProto:
    """A node by the names of what it reads and writes."""
    return helper.make_node(op, inputs.split(), outputs.split(), **attributes)


def quantised(source: str) -> list[onnx.NodeProto]:
    """A product of numbers that are quantised as they come, by the largest of all rows."""
    return [
        node("DynamicQuantizeLinear", source, "q s z"),
        node("MatMulInteger", "q w z", "sums"),
        node("Cast", "sums", "f", to=F),
        node("Mul", "f s", "y"),
    ]


def weights(*shape: int) -> Any:
    """Eight bits each."""
    return np.random.default_rng(1).integers(-127, 127, shape).astype(np.int8)


def tokens() -> Any:
    """Sentences, of which the ones with rare tokens are loud."""
    table = np.random.default_rng(0).standard_normal((64, 16)).astype(np.float32)
    table[32:] *= 60
    nodes = [node("Gather", "table ids", "e"), node("ReduceMean", "e", "mean", axes=[1], keepdims=0)]
    inputs = {"ids": (I64, ["batch", "seq"])}
    return model([*nodes, *quantised("mean")], inputs, ["batch", 8], table=table, w=weights(16, 8))


def picture() -> Any:
    """Bytes, of which bright pictures are loud."""
    nodes = [node("Cast", "x", "xf", to=F), *quantised("xf")]
    return model(nodes, {"x": (U8, ["batch", 16])}, ["batch", 8], w=weights(16, 8))


def longest() -> Any:
    """Sums that are divided by the longest of all lengths."""
    nodes = [
        node("ReduceMax", "n", "most", keepdims=1),
        node("Cast", "most", "d", to=F),
        node("ReduceSum", "x axis", "sum", keepdims=0),
        node("Div", "sum d", "y"),
    ]
    inputs = {"x": (F, ["batch", 4]), "n": (I64, ["batch"])}
    return model(nodes, inputs, ["batch"], axis=np.array([1]))


def view() -> Any:
    """The step read where the batch is: right for one row, and for one step."""
    nodes = [
        node("Shape", "x", "s"),
        node("Gather", "s order", "turned"),
        node("Reshape", "x turned", "v"),
        node("ReduceMean", "v", "y", axes=[0], keepdims=0),
    ]
    return model(nodes, {"x": (F, ["batch", "step", 4])}, ["batch", 4], order=np.array([1, 0, 2]))


def pooled() -> Any:
    """Rows that do stand alone, of two inputs whose first dimensions have different names."""
    nodes = [
        node("Gather", "table ids", "e"),
        node("Cast", "mask", "m", to=F),
        node("Unsqueeze", "m last", "m1"),
        node("Mul", "e m1", "kept"),
        node("ReduceSum", "kept axis", "y", keepdims=0),
    ]
    inputs = {"ids": (I64, ["unk__1", "seq"]), "mask": (I64, ["unk__2", "seq"])}
    table = np.random.default_rng(2).standard_normal((64, 8)).astype(np.float32)
    return model(nodes, inputs, ["unk__3", 8], table=table, last=np.array([-1]), axis=np.array([1]))


def training() -> Any:
    """A normalisation that was exported as it was trained."""
    ones = {name: np.ones(2, np.float32) for name in "gbmv"}
    nodes = [node("BatchNormalization", "x g b m v", "y rm rv", training_mode=1)]
    return model(nodes, {"x": (F, ["batch", 2, 3])}, ["batch", 2, 3], **ones)


def random_row(name: str, seed: int, loud: bool) -> dict[str, Any]:
    """A request of one row; two clients ask alike but for how loud they are."""
    rng = np.random.default_rng(seed)
    return {
        "tokens": {"ids": rng.integers(32, 64, (1, 3)) if loud else rng.integers(0, 32, (1, 3))},
        "picture": {"x": rng.integers(0, 256 if loud else 4, (1, 16)).astype(np.uint8)},
        "longest": {"x": np.ones((1, 4), np.float32), "n": np.array([50 if loud else 2])},
        "view": {"x": (5.0 * loud + rng.standard_normal((1, 6, 4))).astype(np.float32)},
        "pooled": {"ids": rng.integers(0, 64, (1, 5)), "mask": np.ones((1, 5), np.int64)},
    }[name]


MODELS = {
    "tokens": (tokens, "DynamicQuantizeLinear 'q' quantises by"),
    "picture": (picture, "DynamicQuantizeLinear 'q' quantises by"),
    "longest": (longest, "ReduceMax 'most' works along the axis of the rows"),
    "view": (view, "Reshape 'v' cuts rows apart"),
    "pooled": (pooled, ""),
}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One daemon for the whole module."""
    folder: Path = tmp_path_factory.mktemp("answers")
    with Daemon(folder, {"EDGED_DEVICES_EXCLUDE": "cuda"}) as daemon:
        for name, (make, _) in MODELS.items():
            zoo.write(daemon.models / f"{name}.onnx", make())
        zoo.write(daemon.models / "training.onnx", training())
        zoo.write(daemon.models / "vouched.onnx", longest())
        zoo.write(daemon.models / "vouched.toml", b'rows = "independent"\nmax_batch_size = 4\n')
        zoo.write(daemon.models / "exact.onnx", pooled())
        zoo.write(daemon.models / "exact.toml", b"exact = true\nmax_batch_size = 4\n")
        state(daemon.models)
        daemon.start()
        yield daemon
        assert '"daemon_bug"' not in daemon.log()


def state(folder: Path) -> None:
    """An IR that adds up what it is asked."""
    ov = pytest.importorskip("openvino")
    from openvino import opset13 as op

    x = op.parameter([1, 3], np.float32, name="x")
    x.output(0).get_tensor().set_names({"x"})
    read = op.read_value(op.constant(np.zeros((1, 3), np.float32)), "v", np.float32, [1, 3])
    total = op.add(read, x)
    total.output(0).get_tensor().set_names({"y"})
    (folder / "state").mkdir()
    ov.save_model(
        ov.Model([op.result(total)], [op.assign(total, "v")], [x], "sum"),
        str(folder / "state" / "model.xml"),
        compress_to_fp16=False,
    )


@pytest.mark.parametrize("name", MODELS)
def test_no_request_changes_another_s_answer(
    daemon: Daemon, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """Two clients ask as fast as they can, one loudly; `explain` names what keeps their rows apart."""
    row = daemon.wait_ready(name)
    words = MODELS[name][1]
    with Client(daemon.endpoint, timeout=WAIT_S) as quiet, Client(daemon.endpoint, timeout=WAIT_S) as loud:
        asked = [random_row(name, seed, False) for seed in range(IN_FLIGHT)]
        alone = [quiet.infer(name, feeds)["y"] for feeds in asked]
        for _ in range(ROUNDS):
            out = []
            for seed, feeds in enumerate(asked):
                out.append(quiet.submit(name, feeds))
                out.append(loud.submit(name, random_row(name, seed, True)))
            for want, answer in zip(alone, out[::2], strict=True):
                np.testing.assert_allclose(answer.result()["y"], want, rtol=2e-5, atol=1e-6)
            for answer in out[1::2]:
                answer.result()
    assert words in row["batch"]["why"]
    assert (row["batch"]["max"] > 1) is not bool(words)
    if words:
        assert words in Edgectl(daemon.endpoint, capsys)("explain", name)[1]


def test_the_owner_can_vouch(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    """Then rows share a run, and it is told on whose word, and what spoke against it."""
    row = daemon.wait_ready("vouched")
    assert row["batch"]["max"] == 4
    text = Edgectl(daemon.endpoint, capsys)("explain", "vouched")[1]
    assert "rows stand alone by the owner's word" in text
    assert "though output 'y' of a row among 2 is not as it is alone" in text


def test_what_sums_in_one_order_is_exact(daemon: Daemon) -> None:
    """Equality bit for bit can be had where the runtime gives it."""
    assert daemon.wait_ready("exact")["batch"]["max"] == 4


def test_a_state_goes_on_over_no_request(daemon: Daemon) -> None:
    """Neither from the warm-up, nor from one client to another."""
    daemon.wait_ready("state")
    ones = np.ones((1, 3), np.float32)
    for _ in range(2):
        with Client(daemon.endpoint, timeout=WAIT_S) as client:
            for _ in range(2):
                assert client.infer("state", {"x": ones})["y"].tolist() == [[1.0, 1.0, 1.0]]


def test_what_changes_by_being_run_is_told(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    """And is not batched."""
    row = daemon.wait_ready("training")
    assert row["batch"]["max"] == 1
    text = Edgectl(daemon.endpoint, capsys)("explain", "training")[1]
    assert "BatchNormalization 'y' is in training mode: each run may change the next one's answer" in text
