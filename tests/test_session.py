"""InferenceSession beside ONNX Runtime's own, on the same model."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import zmq

import edged
from edged import InferenceSession, errors
from edged.arrays import from_raw, to_raw, value_to_wire
from edged.session import model_of

ort = pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")


@pytest.fixture(scope="module")
def model() -> bytes:
    """Floats of a named and a free dimension in, floats, strings and a sequence out."""
    from onnx import TensorProto, helper

    nodes = [
        helper.make_node("Mul", ["x", "factor"], ["y"]),
        helper.make_node("Identity", ["words"], ["said"]),
        helper.make_node("SequenceConstruct", ["x", "y"], ["both"]),
    ]
    graph = helper.make_graph(
        nodes,
        "graph-name",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 2]),
            helper.make_tensor_value_info("words", TensorProto.STRING, [None]),
        ],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 2]),
            helper.make_tensor_value_info("said", TensorProto.STRING, [None]),
            helper.make_tensor_sequence_value_info("both", TensorProto.FLOAT, None),
        ],
        [helper.make_tensor("factor", TensorProto.FLOAT, [1], [2.0])],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    made.producer_name = "producer"
    made.model_version = 3
    helper.set_model_props(made, {"labels": "a,b"})
    return bytes(made.SerializeToString())


@pytest.fixture
def endpoint(tmp_path: Path, model: bytes) -> Iterator[str]:
    """A peer that runs the model with ONNX Runtime and speaks the protocol."""
    endpoint = f"ipc://{tmp_path}/edged.sock"
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.linger = 0
    router.bind(endpoint)
    stopper, stop = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    stopper.bind("inproc://stop")
    stop.connect("inproc://stop")
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])

    def serve() -> None:
        poller = zmq.Poller()
        poller.register(router, zmq.POLLIN)
        poller.register(stopper, zmq.POLLIN)
        while stopper not in dict(poller.poll()):
            route, header, *frames = router.recv_multipart()
            request = msgpack.unpackb(header)
            reply = _answer(session, request, frames)
            router.send_multipart([route, msgpack.packb({"id": request["id"], **reply})])

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield endpoint
    stop.send(b"")
    thread.join(10)
    for socket in (router, stopper, stop):
        socket.close(0)
    context.term()


def _answer(session: Any, request: dict[str, Any], frames: list[bytes]) -> dict[str, Any]:
    if request["model_name"] != "words":
        return {"error": {"code": "NOT_FOUND", "message": "no such model"}}
    if request["method"] == "model_metadata":
        inputs = [
            {"name": "x", "datatype": "FP32", "shape": [-1, 2], "dim_names": ["batch", None]},
            {"name": "words", "datatype": "BYTES", "shape": [-1]},
        ]
        outputs = [
            {"name": "y", "datatype": "FP32", "shape": [-1, 2], "dim_names": ["batch", None]},
            {"name": "said", "datatype": "BYTES", "shape": [-1]},
            {"name": "both", "datatype": "SEQUENCE", "shape": None},
        ]
        properties = {
            "producer_name": "producer",
            "graph_name": "graph-name",
            "version": "3",
            "labels": "a,b",
        }
        return {"name": "words", "inputs": inputs, "outputs": outputs, "properties": properties}
    feeds = {t["name"]: from_raw(t["datatype"], t["shape"], t["data"]) for t in request["inputs"]}
    feeds["words"] = np.array([w.decode() for w in feeds["words"]], dtype=object)
    names = [o["name"] for o in request.get("outputs", ())] or [o.name for o in session.get_outputs()]
    listed = []
    for name, value in zip(names, session.run(names, feeds), strict=True):
        if isinstance(value, list):
            datatype, data = value_to_wire(value)
            listed.append({"name": name, "datatype": datatype, "data": data})
        else:
            datatype, shape, data = to_raw(value)
            listed.append({"name": name, "datatype": datatype, "shape": shape, "data": data})
    parameters = {"device": "CPU", "runtime": "onnxruntime"}
    return {"model_name": "words", "model_version": "1", "outputs": listed, "parameters": parameters}


@pytest.fixture
def feeds() -> dict[str, Any]:
    return {
        "x": np.float32([[1, 2], [3, 4]]),
        "words": np.array(["one", "zwölf"], dtype=object),
    }


def test_run_gives_what_onnx_runtime_gives(endpoint: str, model: bytes, feeds: dict[str, Any]) -> None:
    """Same values, same dtypes, same Python types, for all outputs and for some in another order."""
    theirs = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    with InferenceSession("models/words.onnx", endpoint=endpoint) as ours:
        for names in (None, ["both", "y"], ["said"]):
            for got, want in zip(ours.run(names, feeds), theirs.run(names, feeds), strict=True):
                assert type(got) is type(want)
                if isinstance(want, list):
                    for g, w in zip(got, want, strict=True):
                        np.testing.assert_array_equal(g, w)
                else:
                    assert got.dtype == want.dtype
                    assert got.tolist() == want.tolist()
        assert ours.get_providers() == theirs.get_providers()
        assert ours.last_result is not None
        assert ours.last_result.device == "CPU"


def test_inputs_outputs_and_metadata_are_described_alike(endpoint: str, model: bytes) -> None:
    """Names, shapes with named and free dimensions, types and the model's own metadata."""
    theirs = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    with InferenceSession("words", None, ["CPUExecutionProvider"], endpoint=endpoint) as ours:
        for got, want in zip(
            ours.get_inputs() + ours.get_outputs(), theirs.get_inputs() + theirs.get_outputs(), strict=True
        ):
            assert (got.name, got.shape) == (want.name, want.shape)
            assert got.type == want.type or got.type == "seq(unknown)"
        mine, real = ours.get_modelmeta(), theirs.get_modelmeta()
        for key in ("producer_name", "graph_name", "version", "custom_metadata_map"):
            assert getattr(mine, key) == getattr(real, key)


def test_a_missing_input_is_the_same_error(endpoint: str, model: bytes, feeds: dict[str, Any]) -> None:
    """ValueError that names the input."""
    del feeds["x"]
    with (
        InferenceSession("words", endpoint=endpoint) as session,
        pytest.raises(ValueError, match=r"Required inputs \(\['x'\]\) are missing"),
    ):
        session.run(None, feeds)


def test_a_model_that_is_not_there(endpoint: str) -> None:
    """The constructor says so, and bytes are refused with what to do instead."""
    with pytest.raises(errors.NotFound):
        InferenceSession("none", endpoint=endpoint)
    with pytest.raises(errors.InvalidArgument, match="edgectl put"):
        InferenceSession(b"\x08\x08")  # type: ignore[arg-type]  # that is the mistake in question


@pytest.mark.parametrize(
    ("path", "model"),
    [
        ("digits", ("digits", None)),
        ("digits.onnx", ("digits", None)),
        ("/var/lib/edged/models/digits.onnx", ("digits", None)),
        ("models/resnet50/model.onnx", ("resnet50", None)),
        ("models/resnet50/12/model.xml", ("resnet50", "12")),
        ("yolo.v8", ("yolo.v8", None)),
        (Path("yolo.v8.onnx"), ("yolo.v8", None)),
        ("model.onnx", ("model", None)),
    ],
)
def test_names_from_paths(path: str | Path, model: tuple[str, str | None]) -> None:
    """The folder's forms lead back to name and version."""
    assert model_of(path) == model


def test_the_package_exports_it() -> None:
    """One line is what an app changes."""
    assert edged.InferenceSession is InferenceSession
