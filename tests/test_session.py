"""InferenceSession beside ONNX Runtime's own, on the same model."""

from __future__ import annotations

import inspect
import queue
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
from edged.binding import IOBinding, OrtValue
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
    try:
        values = session.run(names, feeds)
    except Exception as e:  # noqa: BLE001 - ONNX Runtime's have no common base; the daemon answers like this
        return {"error": {"code": "INVALID_ARGUMENT", "message": str(e), "reason": "REFUSED_BY_RUNTIME"}}
    for name, value in zip(names, values, strict=True):
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
            if got.type == want.type:
                assert str(got) == str(want)
        mine, real = ours.get_modelmeta(), theirs.get_modelmeta()
        for key in ("producer_name", "graph_name", "version", "custom_metadata_map"):
            assert getattr(mine, key) == getattr(real, key)


@pytest.fixture
def theirs(model: bytes) -> Any:
    """ONNX Runtime's own session."""
    return ort.InferenceSession(model, providers=["CPUExecutionProvider"])


@pytest.fixture
def ours(endpoint: str) -> Iterator[InferenceSession]:
    """What stands in for it."""
    with InferenceSession("words", endpoint=endpoint) as session:
        yield session


NOT_HERE = {
    "end_profiling",
    "get_input_epdevices",
    "get_input_memory_infos",
    "get_output_memory_infos",
    "get_profiling_start_time_ns",
    "get_provider_graph_assignment_info",
    "get_tuning_results",
    "release_captured_graph",
    "run_with_ortvaluevector",
    "set_ep_dynamic_options",
    "set_tuning_results",
}
"""What has no counterpart: a call says so."""


def public(kind: type) -> set[str]:
    """The public names of a class."""
    return {name for name in dir(kind) if not name.startswith("_")}


def test_every_public_method_of_onnx_runtime_s_session_is_handled(ours: InferenceSession) -> None:
    """It takes the same arguments by the same names, or raises a typed error that says what to do instead."""
    methods = public(ort.InferenceSession)
    assert {"run", "run_async", "run_with_iobinding", "io_binding", "run_with_ort_values"} <= methods
    for name in sorted(methods):
        assert hasattr(ours, name), f"onnxruntime {ort.__version__} has {name}: decide what it is here"
        if name in NOT_HERE:
            with pytest.raises(errors.Unimplemented, match="; ") as caught:
                getattr(ours, name)(1, 2, named=3)
            assert caught.value.reason == "NOT_IN_A_SESSION"
            continue
        wanted = list(inspect.signature(getattr(ort.InferenceSession, name)).parameters)
        assert list(inspect.signature(getattr(InferenceSession, name)).parameters) == wanted, name
    assert NOT_HERE & methods, "none of those that are refused exists any more"
    wanted = list(inspect.signature(ort.InferenceSession.__init__).parameters)[:5]
    assert list(inspect.signature(InferenceSession.__init__).parameters)[:5] == wanted


def test_bindings_and_values_have_onnx_runtime_s_methods() -> None:
    """By name and arguments; of OrtValue but those that make one of another library's memory."""
    made_elsewhere = {
        "as_sparse_tensor",
        "from_dlpack",
        "ort_value_from_sparse_tensor",
        "ortvalue_from_numpy_with_onnx_type",
    }
    for mine, real in ((IOBinding, ort.IOBinding), (OrtValue, ort.OrtValue)):
        for name in public(real) - made_elsewhere:
            have, want = (list(inspect.signature(getattr(c, name)).parameters) for c in (mine, real))
            assert have == [each for each in want if each != "memory_info"], name  # a device's, by a plug-in


def test_run_takes_ort_values_and_an_output_twice(
    ours: InferenceSession, theirs: Any, feeds: dict[str, Any]
) -> None:
    """As ONNX Runtime's does."""
    feeds["x"] = ort.OrtValue.ortvalue_from_numpy(feeds["x"])
    got, want = (session.run(["y", "said", "y"], feeds) for session in (ours, theirs))
    assert [value.tolist() for value in got] == [value.tolist() for value in want]
    feeds["x"] = OrtValue.ortvalue_from_numpy(np.float32([[1, 2], [3, 4]]))
    assert ours.run(["y"], feeds)[0].tolist() == want[0].tolist()


def test_run_async_calls_back_as_onnx_runtime_s_does(
    ours: InferenceSession, theirs: Any, feeds: dict[str, Any]
) -> None:
    """With results, user data and no error; or without results and with what was wrong."""
    bad = {**feeds, "x": np.ones((1, 3), np.float32)}
    calls: queue.Queue[tuple[Any, ...]] = queue.Queue()
    seen = []
    for session in (ours, theirs):
        session.run_async(["y"], feeds, lambda *what: calls.put(what), "user data")
        (got,), data, error = calls.get(timeout=30)
        assert (got.tolist(), data, error) == ([[2.0, 4.0], [6.0, 8.0]], "user data", "")
        session.run_async(["y"], bad, lambda *what: calls.put(what), None)
        results, data, error = calls.get(timeout=30)
        assert (results, data) == ([], None)
        assert "invalid dimensions for input: x" in error
        with pytest.raises(ValueError, match=r"Required inputs \(\['words'\]\)"):
            session.run_async(["y"], {"x": feeds["x"]}, lambda *what: calls.put(what), None)
        seen.append(calls.qsize())
    assert seen == [0, 0]


def test_close_ends_runs_that_wait(ours: InferenceSession, feeds: dict[str, Any]) -> None:
    """Each is called back, whether it came in time or not."""
    calls: queue.Queue[str] = queue.Queue()
    for _ in range(40):
        ours.run_async(["y"], feeds, lambda _results, _data, error: calls.put(error), None)
    ours.close()
    errors_seen = [calls.get(timeout=30) for _ in range(40)]
    assert all(error == "" or "UNAVAILABLE" in error or "closed" in error for error in errors_seen)
    ours.run_async(["y"], feeds, lambda _results, _data, error: calls.put(error), None)
    assert "the client is closed" in calls.get(timeout=30)


def test_what_a_binding_cannot_do_is_a_typed_error(ours: InferenceSession, feeds: dict[str, Any]) -> None:
    """Another's binding, nothing to answer, a device's memory, memory without a type."""
    binding = ours.io_binding()
    with pytest.raises(ValueError, match="the session that created it"):
        ours.run_with_iobinding(IOBinding(object()))
    with pytest.raises(errors.InvalidArgument, match="no output is bound"):
        ours.run_with_iobinding(binding)
    for bind in (
        lambda: binding.bind_input("x", "cuda", 0, np.float32, [1], 4096),
        lambda: binding.bind_output("y", "cuda", 0, np.float32, [1], 4096),
        lambda: ours.create_ortvalue_from_shape_and_type([1], np.float32, "cuda"),
        lambda: OrtValue.ortvalue_from_numpy(np.ones(1), "cuda"),
    ):
        with pytest.raises(errors.Unimplemented, match="lease") as caught:
            bind()
        assert caught.value.reason == "DEVICE_MEMORY"
    for kind in (16, object, "nonsense", None):
        with pytest.raises(errors.InvalidArgument, match="element type"):
            binding.bind_output("y", "cpu", 0, kind, [1], 4096)
    made = ours.create_ortvalue_from_shape_and_type([2, 2], 1, "cpu")
    assert (made.numpy().dtype, made.shape(), made.tensor_size_in_bytes()) == (np.float32, [2, 2], 16)
    (both,) = ours.run_with_ort_values(["both"], feeds)
    assert both.is_tensor_sequence()
    assert not both.is_tensor()
    with pytest.raises(errors.InvalidArgument, match="holds a list"):
        both.numpy()


def test_settings_of_onnx_runtime_s_own_change_nothing(endpoint: str, theirs: Any) -> None:
    """They are taken, since apps give them, and change nothing."""
    options = ort.SessionOptions()
    with InferenceSession("words", options, endpoint=endpoint) as session:
        assert session.get_session_options() is options
        session.set_providers(["CUDAExecutionProvider"], [{"device_id": 0}])
        session.disable_fallback()
        session.enable_fallback()
        assert session.get_providers() == theirs.get_providers()
        assert session.get_provider_options() == theirs.get_provider_options()
    with (
        InferenceSession(path_or_bytes="words", endpoint=endpoint) as session,
        pytest.raises(errors.Unimplemented, match="without options"),
    ):
        session.get_session_options()


def test_a_missing_input_is_the_same_error(endpoint: str, model: bytes, feeds: dict[str, Any]) -> None:
    """ValueError that names the input."""
    del feeds["x"]
    with (
        InferenceSession("words", endpoint=endpoint) as session,
        pytest.raises(ValueError, match=r"Required inputs \(\['x'\]\) are missing"),
    ):
        session.run(None, feeds)


def test_a_feed_without_names_is_refused(ours: InferenceSession, feeds: dict[str, Any]) -> None:
    """As ONNX Runtime does, but in words."""
    with pytest.raises(errors.InvalidArgument, match="a dict of names and arrays"):
        ours.run(None, feeds["x"])


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
