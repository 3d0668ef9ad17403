"""The clients against a small real ROUTER that speaks the protocol.

`Peer` answers as the daemon does, but knows only one model, `double`. The tests that would say more
against the daemon are marked: they are those that restart it.
"""

from __future__ import annotations

import asyncio
import json
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import zmq

from edged import AsyncClient, Client, errors
from edged.arrays import RawTensor, from_raw, value_to_wire
from edged.clientwire import infer_request, question, read_infer, socket_paths, typed_inputs

LARGE = np.arange(300_000, dtype=np.float32)


class Peer:
    """A daemon's sockets, answered by one thread. `hold` keeps requests unanswered until `release`."""

    def __init__(self, directory: Path) -> None:
        self.endpoint = f"ipc://{directory}/edged.sock"
        self.seen: list[dict[str, Any]] = []
        self.hold = False
        self.held: list[tuple[bytes, dict[str, Any], list[Any]]] = []
        self.arrived = threading.Semaphore(0)
        self._context = zmq.Context()
        self._router = self._socket(zmq.ROUTER, directory / "edged.sock")
        self._admin = self._socket(zmq.ROUTER, directory / "admin.sock")
        self._events = self._socket(zmq.XPUB, directory / "events.sock")
        self._stop_fd = os.eventfd(0)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _socket(self, kind: int, path: Path) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        socket.linger = 0
        path.unlink(missing_ok=True)
        socket.bind(f"ipc://{path}")
        return socket

    def _serve(self) -> None:
        poller = zmq.Poller()
        for socket in (self._router, self._admin, self._events, self._stop_fd):
            poller.register(socket, zmq.POLLIN)
        while True:
            for socket, _ in poller.poll():
                if socket == self._stop_fd:
                    for end in (self._router, self._admin, self._events):
                        end.close()
                    self._context.term()
                    return
                if socket is self._events:
                    topic = socket.recv()[1:].decode() or "model.state"
                    body = {"seq": 1, "instance_id": "a", "name": "double"}
                    socket.send_multipart([topic.encode(), msgpack.packb(body)])
                    continue
                route, header, *frames = socket.recv_multipart()
                request = msgpack.unpackb(header)
                self.seen.append(request)
                self.answer(socket, route, request, frames)
                self.arrived.release()

    def answer(self, socket: Any, route: bytes, request: dict[str, Any], frames: list[bytes]) -> None:
        if request["method"] == "cancel":
            held = [h for h in self.held if h[1]["id"] == request["cancel_id"]]
            for entry in held:
                self.held.remove(entry)
                error = {"code": "CANCELLED", "message": "withdrawn"}
                socket.send_multipart([route, msgpack.packb({"id": entry[1]["id"], "error": error})])
            socket.send_multipart([route, msgpack.packb({"id": request["id"]})])
        elif self.hold and request["method"] == "model_infer":
            self.held.append((route, request, frames))
        else:
            header, *tensors = self.reply(request, frames)
            socket.send_multipart([route, msgpack.packb({"id": request["id"], **header}), *tensors])
            if self.held and not self.hold:
                held, self.held = self.held, []
                for entry in reversed(held):
                    self.answer(socket, *entry)

    def reply(self, request: dict[str, Any], frames: list[bytes]) -> list[Any]:
        spec = {"name": "x", "datatype": "FP32", "shape": [-1]}
        plain: dict[str, dict[str, Any]] = {
            "server_live": {"live": True},
            "server_ready": {"ready": True},
            "server_metadata": {"name": "edged", "version": "0", "extensions": [], "instance_id": "a"},
            "model_ready": {"name": "double", "ready": True},
            "model_metadata": {"name": "double", "inputs": [spec], "outputs": [spec], "properties": {}},
            "model_statistics": {"model_stats": [{"name": "double"}]},
            "repository_index": {"models": [{"name": "double", "state": "READY"}]},
            "repository_model_load": {},
            "repository_model_unload": {},
            "server_status": {"state": "ready"},
            "log_settings": {"settings": request.get("settings", {"level": "info"})},
        }
        if request["method"] != "model_infer":
            return [plain[request["method"]]]
        name = request["model_name"]
        if name == "values":
            outputs = []
            for out, value in (("seq", [{0: 0.25, 1: 0.75}]), ("map", {"a": 1.0}), ("opt", None)):
                datatype, data = value_to_wire(value)
                outputs.append({"name": out, "datatype": datatype, "data": data})
            return [_infer_reply(outputs)]
        if name == "broken":
            return [_infer_reply([{"name": "y", "datatype": "FP32", "shape": [3], "data": b"abcd"}])]
        if name != "double":
            message = f"model '{name}' is not in the folder"
            return [{"error": {"code": "NOT_FOUND", "message": message, "reason": "MODEL_NOT_FOUND"}}]
        outputs, tensors = [], []
        for tensor in request["inputs"]:
            raw = frames[tensor["frame"]] if "frame" in tensor else tensor["data"]
            array = from_raw(tensor["datatype"], tensor["shape"], raw)
            raw = raw if array.dtype == object else (array * 2).tobytes()
            out = {"name": tensor["name"], "datatype": tensor["datatype"], "shape": tensor["shape"]}
            if len(raw) > 16384:
                out["frame"] = len(tensors)
                tensors.append(raw)
            else:
                out["data"] = raw
            outputs.append(out)
        return [_infer_reply(outputs), *tensors]

    def stop(self) -> None:
        if self._thread.is_alive():
            os.eventfd_write(self._stop_fd, 1)
            self._thread.join(10)
            os.close(self._stop_fd)


def _infer_reply(outputs: list[Any]) -> dict[str, Any]:
    parameters = {
        "device": "CPU",
        "runtime": "onnxruntime",
        "precision": "f32",
        "queue_us": 1,
        "compute_us": 2,
    }
    return {"model_name": "double", "model_version": "7", "outputs": outputs, "parameters": parameters}


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[Peer]:
    peer = Peer(tmp_path)
    yield peer
    peer.stop()


@pytest.fixture
def client(peer: Peer) -> Iterator[Client]:
    with Client(peer.endpoint, timeout=10) as client:
        yield client


def test_infer_returns_arrays_and_says_how(client: Client) -> None:
    """The result is a mapping of the caller's own arrays, and knows version, device and timings."""
    result = client.infer("double", {"x": np.float32([1, 2]), "big": LARGE})
    assert list(result) == ["x", "big"]
    assert result["x"].tolist() == [2.0, 4.0]
    np.testing.assert_array_equal(result["big"], LARGE * 2)
    assert (result.model_version, result.device, result.runtime, result.precision) == (
        "7",
        "CPU",
        "onnxruntime",
        "f32",
    )
    assert (result.queue_us, result.compute_us, result.fallback_reason, result.warnings) == (1, 2, None, [])
    result["x"][0] = 5
    result["big"][0] = 5


def test_small_tensors_go_inline_and_large_ones_in_frames(client: Client, peer: Peer) -> None:
    """The header stays under its limit however many small tensors there are."""
    inputs = {f"i{at}": np.zeros(4000, np.float32) for at in range(6)}
    client.infer("double", inputs)
    sent = peer.seen[-1]["inputs"]
    assert [("frame" in tensor) for tensor in sent] == [False, False, False, True, True, True]
    assert [tensor["frame"] for tensor in sent[3:]] == [0, 1, 2]


def test_parameters_reach_the_wire(client: Client, peer: Peer) -> None:
    """Version, outputs, priority and the timeout in µs stand where the protocol has them."""
    x = np.zeros(1, np.float32)
    client.infer("double", {"x": x}, version=7, outputs=["x"], timeout=2, priority=3)
    header = peer.seen[-1]
    assert (header["model_version"], header["outputs"]) == ("7", [{"name": "x"}])
    assert header["parameters"]["priority"] == 3
    assert 1_000_000 < header["parameters"]["timeout"] <= 2_000_000


def test_lists_and_scalars_take_the_models_datatype(client: Client, peer: Peer) -> None:
    """A Python list becomes what the model declares, and an element that does not fit is refused here."""
    assert client.infer("double", {"x": [1, 2.5]})["x"].tolist() == [2.0, 5.0]
    assert client.infer("double", {"x": 3})["x"].tolist() == [6.0]
    assert peer.seen[-1]["inputs"][0]["datatype"] == "FP32"
    metadata = {"inputs": [{"name": "x", "datatype": "INT8", "shape": [-1]}]}
    for value in ([1.5], [300], ["a"], [[1], [1, 2]]):
        with pytest.raises(errors.InvalidArgument, match="input 'x'"):
            typed_inputs({"x": value}, metadata)


def test_bytes_and_raw_tensors(client: Client) -> None:
    """Strings travel as BYTES, and bytes that are raw already as they are."""
    result = client.infer("double", {"s": np.array(["a", "ä"]), "r": RawTensor("INT8", (2,), b"\1\2")})
    assert result["s"].tolist() == ["a", "ä"]
    assert result["r"].tolist() == [2, 4]


def test_strings_are_str_or_by_choice_bytes(client: Client) -> None:
    """Of every shape; what is no text is lost in neither form: one is refused, the other has it."""
    given = np.array([["a", ""], ["zwölf", "\0"]], dtype=object)
    for shaped in (given, given[:0], given[0, 0:1].reshape(())):
        array = client.infer("double", {"s": shaped})["s"]
        assert (array.shape, array.tolist()) == (shaped.shape, shaped.tolist())
    as_bytes = client.infer("double", {"s": given}, decode_strings=False)["s"]
    assert as_bytes.tolist() == [[b"a", b""], ["zwölf".encode(), b"\0"]]
    odd = {"s": np.array(["fine", b"\xff\xfe"], dtype=object)}
    assert client.infer("double", odd, decode_strings=False)["s"].tolist() == [b"fine", b"\xff\xfe"]
    for ask in (client.infer, lambda *what: client.submit(*what).result()):
        with pytest.raises(errors.InvalidArgument, match=r"output 's': element 1.*decode_strings") as caught:
            ask("double", odd)
        assert caught.value.reason == "NOT_UTF8"
    assert client.submit("double", odd, decode_strings=False).result()["s"].tolist()[1] == b"\xff\xfe"


def test_an_array_alone_is_the_only_input(client: Client, peer: Peer) -> None:
    """As it is, whatever numpy makes an array of; a list as the model declares; nameless on the wire."""
    x = np.float32([1, 2])
    for given in (x, memoryview(x), RawTensor("FP32", (2,), x.tobytes()), [1, 2], (1.0, 2.0)):
        client.infer("double", given)
        (sent,) = peer.seen[-1]["inputs"]
        assert (sent["name"], sent["datatype"], sent["data"]) == ("", "FP32", x.tobytes())
        assert client.submit("double", given).result()[""].tolist() == [2.0, 4.0]
    client.infer("double", np.float64([1, 2]))
    assert peer.seen[-1]["inputs"][0]["datatype"] == "FP64"
    with pytest.raises(errors.InvalidArgument, match="the input"):
        client.infer("double", {1, 2})
    metadata = {"inputs": [{"name": name, "datatype": "FP32", "shape": [-1]} for name in ("a", "b")]}
    for several in ([1, 2], [x, x[:1]]):
        with pytest.raises(errors.InvalidArgument, match="'a', 'b'") as caught:
            typed_inputs({"": several}, metadata)
        assert caught.value.reason == "INPUT_NOT_NAMED"
    metadata["inputs"][0]["optional"] = True
    assert typed_inputs({"": [1, 2]}, metadata)[""].tolist() == [1.0, 2.0]


def test_a_result_as_plain_values(client: Client) -> None:
    """Fit for JSON as browsers read it, strict about numbers; BF16 as numbers with and without ml_dtypes."""
    bf16 = RawTensor("BF16", (2,), struct.pack("<2H", 0x3F80, 0x4049))
    feeds = {"x": np.float32([[0.5, np.nan], [np.inf, -np.inf]]), "s": np.array(["a", "b"], dtype=object)}
    feeds |= {"i": np.array(2**62), "half": np.float16([0.1])}
    plain = client.infer("double", feeds).to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain == {
        "x": [[1.0, "NaN"], ["Infinity", "-Infinity"]],
        "s": ["a", "b"],
        "i": -(2**63),  # twice 2^62, as INT64 has it
        "half": [float(np.float16(0.1) * 2)],
    }
    assert client.infer("values", {}).to_dict() == {
        "seq": [{"0": 0.25, "1": 0.75}],
        "map": {"a": 1.0},
        "opt": None,
    }
    odd = np.array([b"\xff", "é"], dtype=object)
    assert client.infer("double", {"s": odd}, decode_strings=False).to_dict() == {"s": ["/w==", "w6k="]}
    wire = {"name": "b", "datatype": "BF16", "shape": [2], "data": bf16.data}
    element = {key: wire[key] for key in ("datatype", "shape", "data")}
    nested = {"name": "n", "datatype": "SEQUENCE", "data": [element]}
    ints = {"name": "u", "datatype": "UINT16", "shape": [1], "data": b"\x80\x3f"}
    read = read_infer(_infer_reply([wire, nested, ints]), ())
    assert read.to_dict() == {"b": [1.0, 3.140625], "n": [[1.0, 3.140625]], "u": [0x3F80]}


def test_sequences_and_maps_are_lists_and_dicts(client: Client) -> None:
    """Values that are no tensors come back as ONNX Runtime gives them."""
    result = client.infer("values", {})
    assert dict(result) == {"seq": [{0: 0.25, 1: 0.75}], "map": {"a": 1.0}, "opt": None}


def test_the_daemons_error_is_raised_as_its_class(client: Client) -> None:
    """Code, reason and message arrive."""
    with pytest.raises(errors.NotFound, match="not in the folder") as caught:
        client.infer("none", {})
    assert caught.value.reason == "MODEL_NOT_FOUND"


def test_a_reply_that_breaks_the_protocol_is_internal(client: Client) -> None:
    """Never an array of something else, never a bare KeyError."""
    with pytest.raises(errors.Internal, match="breaks the protocol"):
        client.infer("broken", {})


def test_an_input_without_a_datatype_is_named(client: Client) -> None:
    """The message says which input, before anything is sent."""
    with pytest.raises(errors.InvalidArgument, match=r"input 'z'.*complex"):
        client.infer("double", {"z": np.zeros(1, complex)})


def test_a_header_that_is_too_large_is_refused_here(client: Client) -> None:
    """The daemon could only answer it with a nil id."""
    with pytest.raises(errors.InvalidArgument, match="header has"):
        client.infer("double", {"n" * 70_000: np.zeros(1, np.float32)})


def test_the_plain_methods(client: Client, peer: Peer) -> None:
    """Each method of the protocol asks the right socket and returns its fields."""
    assert client.server_live()
    assert client.server_ready()
    assert client.server_metadata()["instance_id"] == "a"
    assert client.model_ready("double")
    assert client.model_metadata("double", 7)["name"] == "double"
    assert peer.seen[-1]["model_version"] == "7"
    assert client.statistics("double") == [{"name": "double"}]
    assert client.repository_index() == [{"name": "double", "state": "READY"}]
    client.load("double")
    client.unload("double")
    assert client.server_status() == {"state": "ready"}
    assert client.log_settings("debug") == {"settings": {"level": "debug"}}
    ids = [header["id"] for header in peer.seen]
    assert all(isinstance(i, int) and 0 < i < 2**53 for i in ids)


def test_several_in_flight_answered_out_of_order(client: Client, peer: Peer) -> None:
    """Each pending result gets its own reply whatever the order."""
    peer.hold = True
    pending = [client.submit("double", {"x": np.float32([at])}) for at in range(20)]
    for _ in pending:
        assert peer.arrived.acquire(timeout=10)
    assert not pending[0].done()
    peer.hold = False
    client.server_live()
    assert [p.result()["x"].tolist() for p in pending] == [[2.0 * at] for at in range(20)]
    assert pending[0].done()


def test_submit_copies_its_inputs(client: Client, peer: Peer) -> None:
    """The caller may reuse a buffer at once."""
    array = LARGE.copy()
    pending = client.submit("double", {"x": array})
    array[:] = -1
    np.testing.assert_array_equal(pending.result()["x"], LARGE * 2)


def test_cancel_raises_cancelled(client: Client, peer: Peer) -> None:
    """A withdrawn request is answered by the daemon, as CANCELLED."""
    peer.hold = True
    pending = client.submit("double", {"x": np.float32([1])})
    pending.cancel()
    with pytest.raises(errors.Cancelled):
        pending.result(timeout=10)


def test_the_deadline_is_kept_here_and_a_late_reply_dropped(client: Client, peer: Peer) -> None:
    """DeadlineExceeded comes in time, and the reply that follows disturbs nobody."""
    peer.hold = True
    began = time.monotonic()
    with pytest.raises(errors.DeadlineExceeded):
        client.infer("double", {"x": np.float32([1])}, timeout=0.05)
    assert time.monotonic() - began < 5
    peer.hold = False
    client.server_live()
    assert client.infer("double", {"x": np.float32([4])})["x"].tolist() == [8.0]


def test_a_result_can_be_asked_for_again(client: Client, peer: Peer) -> None:
    """TimeoutError of `result` leaves the request in flight."""
    peer.hold = True
    pending = client.submit("double", {"x": np.float32([1])})
    with pytest.raises(TimeoutError):
        pending.result(timeout=0.01)
    peer.hold = False
    client.server_live()
    assert pending.result()["x"].tolist() == [2.0]


def test_threads_share_a_client(client: Client) -> None:
    """Eight threads at once each get their own answers, and all get them."""
    failures: list[Exception] = []

    def ask(base: int) -> None:
        try:
            for at in range(200):
                value = base * 1000 + at
                assert client.infer("double", {"x": np.float32([value])})["x"][0] == 2 * value
        except (errors.EdgedError, AssertionError) as e:
            failures.append(e)

    threads = [threading.Thread(target=ask, args=(base,)) for base in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
    assert not any(thread.is_alive() for thread in threads)


def test_a_waiting_thread_does_not_block_others(client: Client, peer: Peer) -> None:
    """While the leading thread waits for a held reply, another asks and is answered; then it hands over."""
    peer.hold = True
    results: list[float] = []

    def ask(value: float) -> None:
        results.append(client.infer("double", {"x": np.float32([value])})["x"][0])

    threads = [threading.Thread(target=ask, args=(value,)) for value in (1.0, 2.0, 3.0)]
    for thread in threads:
        thread.start()
    for _ in threads:
        assert peer.arrived.acquire(timeout=10)
    assert client.server_live()
    peer.hold = False
    assert client.server_live()
    for thread in threads:
        thread.join(10)
    assert sorted(results) == [2.0, 4.0, 6.0]


def test_a_follower_whose_time_is_over_leaves_the_lead_to_others(client: Client, peer: Peer) -> None:
    """Deadlines of leader and follower pass independently, and the last one still gets its answer."""
    peer.hold = True
    outcomes: dict[float, str] = {}

    def ask(timeout: float) -> None:
        try:
            client.infer("double", {"x": np.float32([1])}, timeout=timeout)
            outcomes[timeout] = "answered"
        except errors.DeadlineExceeded:
            outcomes[timeout] = "late"

    threads = [threading.Thread(target=ask, args=(t,)) for t in (0.1, 0.2, 20.0)]
    for thread in threads:
        thread.start()
    for thread in threads[:2]:
        thread.join(10)
    peer.hold = False
    client.server_live()
    threads[2].join(10)
    assert outcomes == {0.1: "late", 0.2: "late", 20.0: "answered"}


def test_no_daemon_is_said_at_once_with_what_to_start(tmp_path: Path) -> None:
    """Neither a missing socket nor a stale one costs the caller its timeout."""
    stale = tmp_path / "edged.sock"
    with Client(f"ipc://{stale}", timeout=60) as client:
        for _ in range(2):
            with pytest.raises(errors.Unavailable, match="systemctl start edged") as caught:
                client.infer("double", {})
            assert caught.value.reason == "DAEMON_NOT_RUNNING"
            assert not client.server_live()
            peer = Peer(tmp_path)
            assert client.server_live()
            peer.stop()
            stale.touch()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may open every socket")
def test_a_socket_without_permission_names_the_group(peer: Peer, tmp_path: Path) -> None:
    """The error says which group to join."""
    (tmp_path / "edged.sock").chmod(0)
    with Client(peer.endpoint) as client, pytest.raises(errors.PermissionDenied, match="edged"):
        client.infer("double", {})


def test_an_idle_client_finds_a_restarted_daemon(peer: Peer, client: Client, tmp_path: Path) -> None:
    """Between two calls the daemon restarted: the next call just works. (To be run on the daemon too.)"""
    assert client.server_live()
    peer.stop()
    again = Peer(tmp_path)
    try:
        assert client.infer("double", {"x": np.float32([1])})["x"].tolist() == [2.0]
        client.load("double")
    finally:
        again.stop()


def test_infer_is_sent_again_after_a_restart(peer: Peer, client: Client, tmp_path: Path) -> None:
    """An inference in flight when the daemon goes is answered by the next. (To be run on the daemon too.)"""
    peer.hold = True
    results: list[Any] = []
    thread = threading.Thread(
        target=lambda: results.append(client.infer("double", {"x": np.float32([1])})["x"].tolist())
    )
    thread.start()
    assert peer.arrived.acquire(timeout=10)
    peer.stop()
    again = Peer(tmp_path)
    thread.join(10)
    again.stop()
    assert results == [[2.0]]
    assert len(again.seen) == 1


def test_a_submitted_request_is_lost_with_its_connection(peer: Peer, client: Client) -> None:
    """It fails at once as CONNECTION_LOST, long before its deadline. (To be run on the daemon too.)"""
    peer.hold = True
    pending = client.submit("double", {"x": np.float32([1])})
    assert peer.arrived.acquire(timeout=10)
    peer.stop()
    with pytest.raises(errors.Unavailable) as caught:
        pending.result(timeout=10)
    assert caught.value.reason == "CONNECTION_LOST"


def test_a_forked_child_connects_anew(client: Client, peer: Peer) -> None:
    """The child has its own connection, and the parent's goes on."""
    assert client.server_live()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if client.infer("double", {"x": np.float32([1])})["x"].tolist() == [2.0] else 2
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert client.infer("double", {"x": np.float32([3])})["x"].tolist() == [6.0]


def test_close_wakes_who_waits(client: Client, peer: Peer) -> None:
    """A closed client answers its waiting threads, and refuses further calls."""
    peer.hold = True
    caught: list[BaseException] = []

    def ask() -> None:
        try:
            client.infer("double", {"x": np.float32([1])})
        except errors.EdgedError as e:
            caught.append(e)

    thread = threading.Thread(target=ask)
    thread.start()
    assert peer.arrived.acquire(timeout=10)
    client.close()
    thread.join(10)
    assert [type(e) for e in caught] == [errors.Unavailable]
    with pytest.raises(errors.FailedPrecondition):
        client.infer("double", {})


def test_events_arrive_by_topic_and_end_in_time(client: Client) -> None:
    """A subscriber gets (topic, event), and its iterator ends when none comes for the timeout."""
    with client.events(["model.state"], timeout=5) as events:
        assert next(events) == ("model.state", {"seq": 1, "instance_id": "a", "name": "double"})
        events._timeout_s = 0.01
        assert list(events) == []


def test_events_end_with_the_daemon(client: Client, peer: Peer) -> None:
    """A daemon that goes is Unavailable, not silence."""
    with client.events(timeout=30) as events:
        next(events)
        peer.stop()
        with pytest.raises(errors.Unavailable):
            next(events)


@pytest.mark.parametrize("timeout", [0, -1, float("nan")])
def test_a_timeout_must_be_positive(client: Client, timeout: float) -> None:
    """Zero or less is a mistake, not a poll."""
    with pytest.raises(errors.InvalidArgument, match="timeout"):
        client.infer("double", {}, timeout=timeout)


def test_where_sockets_are_looked_for() -> None:
    """A named endpoint is the only one; the others lie beside it; unnamed, the user's come first."""
    home = {"HOME": "/home/a", "XDG_RUNTIME_DIR": "/run/user/1"}
    assert socket_paths(None, "edged.sock", home) == [
        "/run/user/1/edged/edged.sock",
        "/home/a/.local/state/edged/run/edged.sock",
        "/run/edged/edged.sock",
    ]
    named = {**home, "EDGED_ENDPOINT": "ipc:///d/my.sock"}
    assert socket_paths(None, "edged.sock", named) == ["/d/my.sock"]
    assert socket_paths(None, "admin.sock", named) == ["/d/admin.sock"]
    assert socket_paths("ipc:///e/x.sock", "edged.sock", named) == ["/e/x.sock"]
    for bad in ("tcp://h:1", "ipc://relative", "/run/edged/edged.sock", "ipc:///" + "d" * 120):
        with pytest.raises(errors.InvalidArgument):
            socket_paths(bad, "edged.sock", home)


def test_a_request_keeps_the_order_of_its_inputs() -> None:
    """Inputs stand in the header as the caller gave them."""
    request = infer_request("m", {name: np.zeros(1, np.int8) for name in "cab"})
    assert [tensor["name"] for tensor in request.header["inputs"]] == ["c", "a", "b"]


def _run(peer: Peer, use: Callable[[AsyncClient], Any]) -> Any:
    async def main() -> Any:
        async with AsyncClient(peer.endpoint, timeout=10) as client:
            return await use(client)

    return asyncio.run(main())


def test_async_many_at_once(peer: Peer) -> None:
    """Coroutines share one connection, each with its own answer, large and small."""

    async def use(client: AsyncClient) -> None:
        tasks = [client.submit("double", {"x": np.float32([at])}) for at in range(50)]
        big = await client.infer("double", {"x": LARGE})
        np.testing.assert_array_equal(big["x"], LARGE * 2)
        assert [(await task)["x"][0] for task in tasks] == [2.0 * at for at in range(50)]
        assert await client.server_live()
        assert await client.model_ready("double")
        assert (await client.infer("double", {"x": [1]}))["x"].tolist() == [2.0]
        assert await client.server_status() == {"state": "ready"}
        with pytest.raises(errors.NotFound):
            await client.infer("none", {})

    _run(peer, use)


def test_async_takes_and_gives_the_same_forms(peer: Peer) -> None:
    """An array or list alone, strings as str or bytes, a result as plain values."""

    async def use(client: AsyncClient) -> None:
        assert (await client.infer("double", np.float32([1])))[""].tolist() == [2.0]
        assert (await client.infer("double", [1.5]))[""].tolist() == [3.0]
        words = {"s": np.array(["ä"])}
        assert (await client.infer("double", words)).to_dict() == {"s": ["ä"]}
        assert (await client.submit("double", words, decode_strings=False))["s"].tolist() == ["ä".encode()]

    _run(peer, use)


def test_async_deadline_and_cancel(peer: Peer) -> None:
    """A coroutine's deadline is kept, and a cancelled one withdraws its request at the daemon."""

    async def use(client: AsyncClient) -> None:
        assert await client.server_live()
        peer.hold = True
        with pytest.raises(errors.DeadlineExceeded):
            await client.infer("double", {"x": np.float32([1])}, timeout=0.05)
        task = client.submit("double", {"x": np.float32([1])})
        for _ in range(3):
            assert await asyncio.to_thread(peer.arrived.acquire, timeout=10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(peer.arrived.acquire, timeout=10)
        assert peer.seen[-1]["method"] == "cancel"

    _run(peer, use)


def test_async_is_sent_again_after_a_restart(peer: Peer, tmp_path: Path) -> None:
    """As with the client of threads. (To be run on the daemon too.)"""

    async def use(client: AsyncClient) -> Any:
        peer.hold = True
        task = client.submit("double", {"x": np.float32([1])})
        assert await asyncio.to_thread(peer.arrived.acquire, timeout=10)
        await asyncio.to_thread(peer.stop)
        again = await asyncio.to_thread(Peer, tmp_path)
        try:
            return (await task)["x"].tolist()
        finally:
            await asyncio.to_thread(again.stop)

    assert _run(peer, use) == [2.0]


def test_async_from_one_loop_after_another(peer: Peer) -> None:
    """A client that outlives its event loop connects anew in the next."""
    client = AsyncClient(peer.endpoint)
    assert asyncio.run(client.server_live())
    assert asyncio.run(client.server_live())
    asyncio.run(client.close())


def test_async_events(peer: Peer) -> None:
    """Events are an asynchronous iterator that ends in time."""

    async def use(client: AsyncClient) -> list[Any]:
        async with client.events(["model.state"], timeout=0.5) as events:
            return [topic async for topic, _ in events]

    assert _run(peer, use) == ["model.state"]


def test_async_without_a_daemon(tmp_path: Path) -> None:
    """Said at once, to every coroutine that asks."""

    async def main() -> None:
        async with AsyncClient(f"ipc://{tmp_path}/edged.sock") as client:
            answers = await asyncio.gather(
                *(client.infer("double", {}) for _ in range(3)), return_exceptions=True
            )
            assert all(isinstance(a, errors.Unavailable) for a in answers)

    asyncio.run(main())


def test_the_protocols_worked_example_is_true() -> None:
    """The hex in docs/protocol.md decodes to what its margin says, and reads as a result."""
    text = (Path(__file__).parents[1] / "docs" / "protocol.md").read_text()
    blocks = [block for block in text.split("```") if block.startswith("\n85")]
    messages = []
    for block in blocks:
        columns = [line.partition("#")[0] for line in block.splitlines()]
        messages.append(msgpack.unpackb(bytes.fromhex("".join(columns))))
    request, reply = messages
    ours = infer_request("double", {"x": np.float32([1, 2.5])})
    assert request == {"v": 1, "id": 1, **{k: v for k, v in ours.header.items() if k != "parameters"}}
    assert read_infer(reply, [])["y"].tolist() == [2.0, 5.0]


def test_inputs_go_along_with_another_question_as_with_an_inference() -> None:
    """Small ones in the header, large ones as frames; without any there is none of both."""
    small, large = np.ones((1, 2), np.float32), np.ones((1, 3, 64, 64), np.float32)
    fields = {"settings": {"do": "start"}}
    request = question("model_tune", "m", None, fields, {"s": small, "x": large})
    assert (request.header["method"], request.header["model_name"]) == ("model_tune", "m")
    tensors = {tensor["name"]: tensor for tensor in request.header["inputs"]}
    assert (tensors["s"]["data"], tensors["x"]["frame"]) == (small.tobytes(), 0)
    assert [bytes(frame) for frame in request.frames] == [large.tobytes()]
    bare = question("model_tune", "m", None, fields)
    assert ("inputs" in bare.header, list(bare.frames)) == (False, [])
