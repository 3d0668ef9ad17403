"""Requests against the real daemon, by a client that knows the protocol and nothing of our code."""

from __future__ import annotations

import math
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import zoo
from tests.e2e.harness import Daemon, Raw, code_of, until

pytestmark = pytest.mark.e2e

FOREVER = 2**40
"""Rounds of the slow model: days of work."""

SHARED = 'isolation = "shared"\n'
ORT = 'runtime = "onnxruntime"\n'
OPENVINO = 'runtime = "openvino"\n'

MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "numbered": (lambda: zoo.versioned(1), ORT),
    "slow": (zoo.slow, ORT),
    "mean": (zoo.image_mean, ORT + SHARED),
    "scalar": (lambda: zoo.identity("FP32", []), ORT + SHARED),
    "sum": (zoo.scalar_sum, ORT + SHARED),
    "free": (zoo.free_rank, ORT + SHARED),
    "nonzero": (zoo.nonzero, ORT + SHARED),
    "many": (lambda: zoo.many(100), ORT + SHARED),
    "optional": (zoo.optional_input, ORT + SHARED),
    "concat": (zoo.string_concat, ORT + SHARED),
    "failing": (zoo.failing, ORT + SHARED),
    "zipmap_int": (zoo.zipmap, ORT + SHARED),
    "zipmap_str": (lambda: zoo.zipmap(("cat", "dog", "owl")), ORT + SHARED),
    "sklearn": (zoo.sklearn_zipmap, ORT + SHARED),
    "sequence": (zoo.sequence_output, ORT + SHARED),
    "maybe": (zoo.optional_output, ORT + SHARED),
    **{
        f"{runtime[:2]}_{datatype}": (
            lambda datatype=datatype: zoo.identity(datatype),
            f'runtime = "{runtime}"\npolicy = "require"\n{SHARED}',
        )
        for runtime in ("onnxruntime", "openvino")
        for datatype in zoo.ONNX_TYPES
    },
}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One daemon for the whole module; it has no reason to fall over in between."""
    with Daemon(tmp_path_factory.mktemp("serving"), {"EDGED_DEVICES_EXCLUDE": "cuda"}) as daemon:
        for name, (make, settings) in MODELS.items():
            zoo.write(daemon.models / f"{name}.toml", settings.encode())
            zoo.write(daemon.models / f"{name}.onnx", make())
        pid = daemon.start().pid
        yield daemon
        assert daemon.process.poll() is None
        assert daemon.pid == pid
        assert '"daemon_bug"' not in daemon.log()


@pytest.fixture
def raw(daemon: Daemon) -> Iterator[Raw]:
    """A DEALER of the test's own."""
    with daemon.raw() as client:
        yield client


def fp32(name: str, values: list[float], shape: list[int] | None = None) -> dict[str, Any]:
    """An FP32 input inline."""
    return {
        "name": name,
        "datatype": "FP32",
        "shape": [len(values)] if shape is None else shape,
        "data": struct.pack(f"<{len(values)}f", *values),
    }


def slow_inputs(trips: int) -> list[dict[str, Any]]:
    """The slow model's inputs."""
    return [
        fp32("x", [0.5] * 256, [1, 256]),
        {"name": "trips", "datatype": "INT64", "shape": [], "data": struct.pack("<q", trips)},
    ]


def slow_request(request_id: int | str, trips: int, **parameters: Any) -> dict[str, Any]:
    """A request of the slow model."""
    return {
        "method": "model_infer",
        "id": request_id,
        "model_name": "slow",
        "inputs": slow_inputs(trips),
        "parameters": parameters,
    }


def wait_in_flight(daemon: Daemon, running: int, queued: int = 0) -> None:
    """Waits until the slow model's worker has so many requests, and its queue so many more."""

    def there() -> bool:
        row = daemon.serving("slow")
        return row is not None and row["in_flight"] == running and row["queue"] == queued

    until(there, what=f"{running} running and {queued} queued")


def output(reply: dict[str, Any], name: str, frames: list[bytes] | None = None) -> dict[str, Any]:
    """The output of this name."""
    assert "error" not in reply, reply
    return next(o for o in reply["outputs"] if o["name"] == name)


# ---------------------------------------------------------------------- methods


def test_every_core_method_answers_in_the_terms_of_the_open_inference_protocol(raw: Raw) -> None:
    """Health, metadata, statistics and the index have the protocol's fields."""
    assert raw.call("server_live") == {"live": True}
    assert raw.call("server_ready") == {"ready": True}
    metadata = raw.call("server_metadata")
    assert metadata["name"] == "edged"
    assert metadata["protocol_versions"] == [1]
    assert {"statistics", "model_repository", "cancel"} <= set(metadata["extensions"])
    assert metadata["limits"]["header_bytes"] == 65536
    assert metadata["instance_id"]
    assert raw.call("model_ready", model_name="sum") == {"name": "sum", "ready": True}

    model = raw.call("model_metadata", model_name="sum")
    assert (model["name"], model["versions"], model["state"]) == ("sum", ["1"], "READY")
    assert [(i["name"], i["datatype"], i["shape"]) for i in model["inputs"]] == [("x", "FP32", [-1])]
    assert [(o["name"], o["datatype"], o["shape"]) for o in model["outputs"]] == [("y", "FP32", [])]

    rows = raw.call("repository_index")["models"]
    assert {r["name"] for r in rows if r["state"] == "READY"} >= set(MODELS) - {"op_BYTES", "op_BF16"}
    assert all({"name", "version", "state", "reason"} <= set(r) for r in rows)


def test_statistics_count_what_was_served_refused_and_cancelled(daemon: Daemon, raw: Raw) -> None:
    """Each outcome has its own count, in the names of the statistics extension."""
    before = raw.call("model_statistics", model_name="failing")["model_stats"][0]
    index = {"name": "i", "datatype": "INT64", "shape": [1], "data": [0]}
    raw.infer("failing", [fp32("x", [1.0]), index])
    raw.infer("failing", [fp32("x", [1.0]), {**index, "data": [99]}])
    raw.infer("failing", [fp32("x", [1.0])])
    after = raw.call("model_statistics", model_name="failing")["model_stats"][0]

    def more(kind: str) -> int:
        return int(after["inference_stats"][kind]["count"] - before["inference_stats"][kind]["count"])

    assert after["inference_count"] - before["inference_count"] == 1
    assert (more("success"), more("fail"), more("reject"), more("cancel")) == (1, 1, 1, 0)
    assert after["last_inference"] / 1000 == pytest.approx(time.time(), abs=300)
    assert len(raw.call("model_statistics")["model_stats"]) > 10


def test_the_admin_socket_tells_status_and_sets_the_log(daemon: Daemon) -> None:
    """`server_status`, `log_settings`, and what both sockets answer."""
    with Raw(daemon.admin) as admin:
        assert admin.call("server_live") == {"live": True}
        status = admin.call("server_status")
        assert status["pid"] == daemon.pid
        assert status["state"] == "ready"
        assert status["models_fault"] is None
        assert status["resources"]["sample"]["memory_total_bytes"] > 0
        assert {(d["runtime"], d["device"], d["status"]) for d in status["devices"]} >= {
            ("onnxruntime", "CPU", "ok")
        }
        assert admin.call("log_settings", settings={"level": "info"})["settings"]["level"] == "info"
        assert code_of(admin.call("log_settings", settings={"level": "loud"}))[0] == "INVALID_ARGUMENT"
        assert code_of(admin.call("model_infer", model_name="sum")) == ("UNIMPLEMENTED", "WRONG_SOCKET")


def test_administration_is_not_to_be_had_on_the_socket_for_everybody(raw: Raw) -> None:
    """Load, unload and status belong to admin.sock, and the answer says so."""
    for method in ("repository_model_load", "repository_model_unload", "server_status", "log_settings"):
        reply = raw.call(method, model_name="sum")
        assert code_of(reply) == ("UNIMPLEMENTED", "WRONG_SOCKET")
        assert "admin.sock" in reply["error"]["message"]


def test_a_reply_says_where_and_how_it_was_made(raw: Raw) -> None:
    """Device, runtime, precision and times stand in each reply."""
    reply = raw.infer("sum", [fp32("x", [1.0, 2.0])])
    assert (reply["model_name"], reply["model_version"]) == ("sum", "1")
    parameters = reply["parameters"]
    assert parameters["device"] == "CPU"
    assert parameters["runtime"] == "onnxruntime"
    assert parameters["precision"] == "f32"
    assert parameters["batch_size"] == 1
    assert parameters["compute_us"] >= 0
    assert parameters["queue_us"] >= 0
    assert "fallback_reason" not in parameters
    if "error" not in (reply := raw.infer("op_FP32", [fp32("x", [1.0])])):
        assert reply["parameters"]["runtime"] == "openvino"


# ---------------------------------------------------------------------- sockets


@pytest.mark.parametrize("correlate", [False, True], ids=["plain", "correlated"])
def test_a_req_socket_is_served(daemon: Daemon, correlate: bool) -> None:
    """REQ with its empty delimiter, with and without the correlation number."""
    with daemon.raw(req=True, correlate=correlate) as client:
        for number in range(3):
            reply = client.infer("sum", [fp32("x", [number, 1.0])])
            assert struct.unpack("<f", output(reply, "y")["data"]) == (number + 1.0,)


def test_many_requests_in_flight_on_one_socket_are_each_answered_once(raw: Raw) -> None:
    """200 requests are sent before a reply is read; every id comes back once, with its own answer."""
    for number in range(200):
        inputs = [fp32("x", [float(number)])]
        raw.send({"method": "model_infer", "id": f"n{number}", "model_name": "sum", "inputs": inputs})
    answers = {}
    for _ in range(200):
        reply, _ = raw.receive()
        answers[reply["id"]] = struct.unpack("<f", output(reply, "y")["data"])[0]
    assert answers == {f"n{n}": float(n) for n in range(200)}
    assert raw.quiet()


def test_a_fast_model_overtakes_a_slow_one_on_the_same_socket(daemon: Daemon, raw: Raw) -> None:
    """Requests of one connection do not wait for each other's models."""
    raw.send(slow_request("slow", FOREVER))
    wait_in_flight(daemon, 1)
    raw.send({"method": "model_infer", "id": "fast", "model_name": "sum", "inputs": [fp32("x", [3.0])]})
    reply, _ = raw.receive()
    assert reply["id"] == "fast"
    assert output(reply, "y")
    raw.send({"method": "cancel", "id": "c", "cancel_id": "slow"})
    assert {raw.receive()[0]["id"], raw.receive()[0]["id"]} == {"c", "slow"}


def test_an_id_may_be_a_number_a_text_or_missing(raw: Raw) -> None:
    """It comes back as it was sent; twice in flight is refused."""
    for request_id in ("a", "", 0, 2**53 - 1, None):
        assert raw.ask({"method": "server_live", "id": request_id})["id"] == request_id
    assert raw.ask({"method": "server_live"})["id"] is None
    raw.send(slow_request("twin", FOREVER))
    raw.send(slow_request("twin", 1))
    reply, _ = raw.receive()
    assert code_of(reply) == ("ALREADY_EXISTS", "DUPLICATE_ID")
    raw.send({"method": "cancel", "id": "c", "cancel_id": "twin"})
    replies = [raw.receive()[0], raw.receive()[0]]
    assert sorted("error" in r for r in replies) == [False, True]


# ---------------------------------------------------------------------- cancel, deadlines, priorities


def test_a_running_and_a_waiting_request_can_be_cancelled(daemon: Daemon, raw: Raw) -> None:
    """Both answer CANCELLED at once, and the worker goes on without a restart."""
    for request_id in ("running", "next", "waiting"):
        raw.send(slow_request(request_id, FOREVER))
    wait_in_flight(daemon, 2, 1)
    for request_id in ("waiting", "running", "next"):
        raw.send({"method": "cancel", "id": f"cancel {request_id}", "cancel_id": request_id})
        replies = {r["id"]: r for r in (raw.receive()[0], raw.receive()[0])}
        assert code_of(replies[request_id]) == ("CANCELLED", "CANCELLED_BY_CLIENT")
        assert replies[f"cancel {request_id}"]["cancelled"] is True
    assert output(raw.infer("slow", slow_inputs(1)), "y")["shape"] == [1, 256]
    row = daemon.serving("slow")
    assert row is not None
    assert row["restarts"] == 0


def test_only_ones_own_requests_can_be_cancelled(daemon: Daemon, raw: Raw) -> None:
    """An id of another connection, or of none, is not found."""
    raw.send(slow_request("mine", FOREVER))
    wait_in_flight(daemon, 1)
    with daemon.raw() as stranger:
        assert code_of(stranger.call("cancel", cancel_id="mine")) == ("NOT_FOUND", "NOT_IN_FLIGHT")
    assert raw.quiet()
    raw.send({"method": "cancel", "id": "c", "cancel_id": "mine"})
    assert {raw.receive()[0]["id"], raw.receive()[0]["id"]} == {"c", "mine"}
    assert code_of(raw.call("cancel", cancel_id="mine")) == ("NOT_FOUND", "NOT_IN_FLIGHT")


def test_a_timeout_ends_what_runs_and_what_waits(daemon: Daemon, raw: Raw) -> None:
    """DEADLINE_EXCEEDED comes in time for both, and the run is stopped so that others have the worker."""
    for request_id in ("running", "next", "waiting"):
        raw.send(slow_request(request_id, FOREVER, timeout=200_000))
    replies = {r["id"]: r for r in (raw.receive()[0] for _ in range(3))}
    assert {code_of(r) for r in replies.values()} == {("DEADLINE_EXCEEDED", "DEADLINE_PASSED")}
    assert "while it ran" in replies["running"]["error"]["message"]
    assert "while it waited" in replies["waiting"]["error"]["message"]
    assert "outputs" in raw.infer("slow", slow_inputs(1))


def test_a_deadline_counts_the_time_on_the_way(raw: Raw) -> None:
    """One that has passed on arrival is refused; one ahead is served."""
    ask = {"inputs": [fp32("x", [1.0])]}
    past = {"deadline_ns": time.monotonic_ns() - 1_000_000}
    reply = raw.call("model_infer", model_name="sum", parameters=past, **ask)
    assert code_of(reply) == ("DEADLINE_EXCEEDED", "EXPIRED_ON_ARRIVAL")
    ahead = {"deadline_ns": time.monotonic_ns() + 60_000_000_000}
    assert "outputs" in raw.call("model_infer", model_name="sum", parameters=ahead, **ask)


def test_the_queue_is_ordered_by_priority_then_by_arrival(daemon: Daemon, raw: Raw) -> None:
    """1 goes first and 9 last, whatever came first; none given is in the middle."""
    raw.send(slow_request("running", FOREVER))
    wait_in_flight(daemon, 1)
    raw.send(slow_request("at the worker", 1))
    wait_in_flight(daemon, 2)
    for request_id, priority in (("last", 9), ("middle", 0), ("middle too", 5), ("first", 1)):
        raw.send(slow_request(request_id, 1, priority=priority))
    wait_in_flight(daemon, 2, 4)
    raw.send({"method": "cancel", "id": "c", "cancel_id": "running"})
    order = [raw.receive()[0]["id"] for _ in range(7)]
    assert [i for i in order if i not in ("running", "c")] == [
        "at the worker",
        "first",
        "middle",
        "middle too",
        "last",
    ]


def test_parameters_that_are_not_known_are_named_or_refused(raw: Raw) -> None:
    """Ignored with a warning, unless the client says that they must be understood."""
    inputs = [fp32("x", [1.0])]
    reply = raw.infer("sum", inputs, parameters={"temperature": 1}, future_key=True)
    assert any("temperature" in warning for warning in reply["parameters"]["warnings"])
    reply = raw.infer("sum", inputs, parameters={"temperature": 1}, must_understand=["temperature"])
    assert code_of(reply) == ("UNIMPLEMENTED", "MUST_UNDERSTAND")
    assert "outputs" in raw.infer("sum", inputs, must_understand=["timeout", "inputs"])


def test_a_version_can_be_named(raw: Raw) -> None:
    """The serving one is served by its number; another is not found, and the answer says what there is."""
    inputs = [fp32("x", [1.0])]
    assert raw.infer("sum", inputs, model_version="1")["model_version"] == "1"
    reply = raw.infer("sum", inputs, model_version="7")
    assert code_of(reply) == ("NOT_FOUND", "VERSION_NOT_FOUND")
    assert "it serves 1" in reply["error"]["message"]


# ---------------------------------------------------------------------- tensors


def raw_values(datatype: str, *, narrow: bool) -> bytes:
    """Three elements of a datatype, the extremes among them, as they lie in memory.

    With `narrow` integers of 64 bits are such as fit into 32.
    """
    if datatype == "BYTES":
        return b"".join(struct.pack("<I", len(e)) + e for e in (b"", "grüße".encode(), b"x" * 300))
    if datatype == "BF16":
        return struct.pack("<3H", 0x3F80, 0xC2F7, 0x0000)
    if datatype == "BOOL":
        return b"\1\0\1"
    dtype = np.dtype(zoo.NUMPY_TYPES[datatype])
    if dtype.kind == "f":
        return np.array([math.pi, -1e-3, 0], dtype).tobytes()
    info = np.iinfo(np.int32 if narrow and dtype.itemsize == 8 else dtype)
    return np.array([0 if dtype.kind == "u" else info.min, info.max, 1], dtype).tobytes()


@pytest.mark.parametrize("datatype", list(zoo.ONNX_TYPES))
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_datatype_comes_back_bit_for_bit(daemon: Daemon, raw: Raw, runtime: str, datatype: str) -> None:
    """Inline and in a frame; what a runtime cannot take is refused when the model loads, with a reason."""
    name = f"{runtime[:2]}_{datatype}"
    if daemon.serving(name) is None:
        row = daemon.wait_refused(name)
        assert runtime == "openvino", row
        assert datatype in ("BYTES", "BF16"), row
        assert row["reason"]
        pytest.skip(f"OpenVINO does not take {datatype}: {row['reason']}: {row['message']}")
    data = raw_values(datatype, narrow=runtime == "openvino")
    tensor = {"name": "x", "datatype": datatype, "shape": [3]}
    for header, frames in (({**tensor, "data": data}, []), ({**tensor, "frame": 0}, [data])):
        raw.send({"method": "model_infer", "id": 1, "model_name": name, "inputs": [header]}, frames)
        reply, _ = raw.receive()
        answer = output(reply, "y")
        assert (answer["datatype"], answer["shape"]) == (datatype, [3])
        assert answer["data"] == data
        assert reply["parameters"]["runtime"] == runtime


@pytest.mark.parametrize("datatype", ["INT64", "UINT64"])
def test_an_integer_that_openvino_would_cut_off_is_refused(raw: Raw, datatype: str) -> None:
    """It computes 64 bits in 32; that is an error, and no wrong answer."""
    tensor = {"name": "x", "datatype": datatype, "shape": [2], "data": [1, 2**31]}
    reply = raw.infer(f"op_{datatype}", [tensor])
    assert code_of(reply) == ("INVALID_ARGUMENT", "OUT_OF_RANGE")
    assert "onnxruntime" in reply["error"]["message"]


def test_a_list_of_values_is_packed_by_the_daemon(raw: Raw) -> None:
    """Flat or nested lists, for people and for languages without typed arrays."""
    tensor = {"name": "x", "datatype": "FP32", "shape": [2, 2]}
    for data in ([1, 2, 3, 4], [[1, 2], [3, 4]]):
        answer = output(raw.infer("free", [{**tensor, "data": data}]), "y")
        assert struct.unpack("<4f", answer["data"]) == (2, 4, 6, 8)
    words = [{"name": n, "datatype": "BYTES", "shape": [2], "data": ["ä" + n, b"\0"]} for n in "ab"]
    first, second = "äaäb".encode(), b"\0\0"
    wanted = struct.pack("<I", len(first)) + first + struct.pack("<I", len(second)) + second
    assert output(raw.infer("concat", words), "y")["data"] == wanted


def test_a_large_tensor_travels_in_a_frame_both_ways(raw: Raw) -> None:
    """602 KB in; 400 KB out."""
    image = np.arange(3 * 224 * 224, dtype=np.float32)
    header = {"name": "x", "datatype": "FP32", "shape": [1, 3, 224, 224], "frame": 0}
    raw.send({"method": "model_infer", "id": 1, "model_name": "mean", "inputs": [header]}, [image.tobytes()])
    reply, _ = raw.receive()
    means = np.frombuffer(output(reply, "y")["data"], "<f4")
    assert means == pytest.approx(image.reshape(3, -1).mean(1), rel=1e-4)

    values = np.arange(100_000, dtype=np.float32)
    header = {"name": "x", "datatype": "FP32", "shape": [100_000], "frame": 0}
    raw.send(
        {"method": "model_infer", "id": 2, "model_name": "on_FP32", "inputs": [header]}, [values.tobytes()]
    )
    reply, frames = raw.receive()
    assert output(reply, "y")["frame"] == 0
    assert frames == [values.tobytes()]


@pytest.mark.parametrize("shape", [[], [3], [2, 3], [0], [4, 0, 2], [1] * 8], ids=str)
def test_dimensions_may_be_free_none_or_empty(raw: Raw, shape: list[int]) -> None:
    """A model of free rank answers in the shape that was sent."""
    count = math.prod(shape)
    answer = output(raw.infer("free", [fp32("x", [1.5] * count, shape)]), "y")
    assert answer["shape"] == shape
    assert answer["data"] == struct.pack(f"<{count}f", *[3.0] * count)


def test_scalars_and_empty_tensors(raw: Raw) -> None:
    """A tensor of no bytes needs no data; a scalar has the shape []."""
    assert output(raw.infer("scalar", [fp32("x", [2.5], [])]), "y")["shape"] == []
    for empty in ({}, {"data": b""}, {"data": []}):
        tensor = {"name": "x", "datatype": "FP32", "shape": [0], **empty}
        answer = output(raw.infer("sum", [tensor]), "y")
        assert struct.unpack("<f", answer["data"]) == (0.0,)
    answer = output(raw.infer("nonzero", [fp32("x", [0.0, 0.0])]), "y")
    assert answer["shape"] == [1, 0]
    assert not answer.get("data")


def test_a_hundred_inputs_and_outputs(raw: Raw) -> None:
    """All, or the wanted ones in the wanted order."""
    inputs = [fp32(f"x{i}", [1.0, 2.0]) for i in range(100)]
    reply = raw.infer("many", inputs)
    assert [o["name"] for o in reply["outputs"]] == [f"y{i}" for i in range(100)]
    assert struct.unpack("<2f", output(reply, "y42")["data"]) == (43.0, 44.0)
    reply = raw.infer("many", inputs, outputs=[{"name": "y7"}, {"name": "y3"}])
    assert [o["name"] for o in reply["outputs"]] == ["y7", "y3"]
    assert struct.unpack("<2f", output(reply, "y3")["data"]) == (4.0, 5.0)


def test_an_optional_input_may_be_left_out(raw: Raw) -> None:
    """Metadata marks it, and the model's own value is used."""
    model = raw.call("model_metadata", model_name="optional")
    assert [i["name"] for i in model["inputs"] if i.get("optional")] == ["bias"]
    left_out = output(raw.infer("optional", [fp32("x", [1.0])]), "y")
    assert struct.unpack("<f", left_out["data"]) == (6.0,)
    given = output(raw.infer("optional", [fp32("x", [1.0]), fp32("bias", [2.0])]), "y")
    assert struct.unpack("<f", given["data"]) == (3.0,)


@pytest.mark.parametrize(
    ("model", "keys"),
    [("zipmap_int", [0, 1, 2]), ("zipmap_str", ["cat", "dog", "owl"]), ("sklearn", [0, 1, 2])],
)
def test_a_classifier_of_scikit_learn_gives_its_maps(raw: Raw, model: str, keys: list[Any]) -> None:
    """`probabilities` is a sequence of maps, each a list of pairs."""
    metadata = raw.call("model_metadata", model_name=model)
    name = metadata["inputs"][0]["name"]
    reply = raw.infer(model, [fp32(name, [5.1, 3.5, 1.4, 0.2] * 2, [2, 4])])
    answer = reply["outputs"][1]
    assert answer["datatype"] == "SEQUENCE"
    assert "shape" not in answer
    assert len(answer["data"]) == 2
    for entry in answer["data"]:
        pairs = entry["data"] if isinstance(entry, dict) else entry
        assert [k if isinstance(k, (int, str)) else bytes(k).decode() for k, _ in pairs] == keys
        assert sum(v for _, v in pairs) == pytest.approx(1.0, abs=1e-4)


def test_sequences_of_tensors_and_optionals(raw: Raw) -> None:
    """An element that is a tensor is a tensor map without a name."""
    answer = output(raw.infer("sequence", [fp32("x", [1.0, 2.0])]), "parts")
    assert answer["datatype"] == "SEQUENCE"
    assert [(t["datatype"], t["shape"]) for t in answer["data"]] == [("FP32", [2])] * 2
    assert [struct.unpack("<2f", t["data"]) for t in answer["data"]] == [(1.0, 2.0), (2.0, 4.0)]
    maybe = output(raw.infer("maybe", [fp32("x", [1.0])]), "maybe")
    assert maybe["datatype"] == "OPTIONAL"
    assert maybe["data"]["shape"] == [1]


def test_an_error_of_the_model_is_typed_and_the_next_request_is_served(raw: Raw) -> None:
    """An index beyond the data is the request's fault or the runtime's, never a made-up answer."""
    index = {"name": "i", "datatype": "INT64", "shape": [1], "data": [99]}
    code, reason = code_of(raw.infer("failing", [fp32("x", [1.0]), index]))
    assert code in ("INVALID_ARGUMENT", "INTERNAL")
    assert reason
    answer = output(raw.infer("failing", [fp32("x", [1.0]), {**index, "data": [0]}]), "y")
    assert struct.unpack("<f", answer["data"]) == (1.0,)


def test_a_full_queue_refuses_in_words_and_says_when_to_come_again(tmp_path: Path) -> None:
    """The bound is the model's setting; what was admitted is still answered."""
    with Daemon(tmp_path) as daemon:
        zoo.write(daemon.models / "slow.toml", b"queue_length = 3\n")
        zoo.write(daemon.models / "slow.onnx", zoo.slow())
        daemon.start()
        with daemon.raw() as raw:
            for number in range(10):
                raw.send(slow_request(number, FOREVER, timeout=1_000_000))
            replies = [raw.receive()[0] for _ in range(10)]
        refused = [r["error"] for r in replies if r["error"]["reason"] == "QUEUE_FULL"]
        assert {e["code"] for e in refused} == {"RESOURCE_EXHAUSTED"}
        assert all(e["retry_after_ms"] >= 1 for e in refused)
        late = [r["error"]["code"] for r in replies if r["error"]["reason"] != "QUEUE_FULL"]
        assert (len(refused), late) == (5, ["DEADLINE_EXCEEDED"] * 5)
