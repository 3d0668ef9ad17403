"""The client on the fast lane, against a small peer with both sockets that can misbehave on one of them.

What the daemon itself makes of lanes is in `e2e/test_lane.py`; `e2e/test_clients.py` goes over them too.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket as unix
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest

from edged import Client, errors
from edged import client as client_module
from edged.arrays import RawTensor
from edged.clientwire import InferPlan, Recipe, suit_recipe
from edged.lanelink import LaneLink
from tests.test_client import LARGE, Peer

SMALL = np.float32([1, 2])
PACKET_BYTES_MAX = 65_536


class LanePeer(Peer):
    """A peer that serves requests on lease.sock too. `mode` says how it behaves there."""

    def __init__(self, directory: Path) -> None:
        self.mode = ""
        self.by_lane: list[dict[str, Any]] = []
        self.held_by_lane: list[tuple[unix.socket, dict[str, Any]]] = []
        """Requests that `send_held` answers, where its mode is to hold them."""
        self.awake = threading.Event()
        """Until then it reads nothing, where its mode is to sleep."""
        self.lane_path = directory / "lease.sock"
        self.connections: list[unix.socket] = []
        self._going: list[threading.Thread] = []
        super().__init__(directory)
        self.listener = unix.socket(unix.AF_UNIX, unix.SOCK_SEQPACKET)
        self.listener.bind(str(self.lane_path))
        self.listener.listen(16)
        self._begin(self._accept)

    def _begin(self, target: Callable[..., None], *args: Any) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)
        self._going.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            self.connections.append(connection)
            if self.mode == "hangs up":
                connection.close()
            elif self.mode == "is full":
                error = {"code": "RESOURCE_EXHAUSTED", "message": "full", "reason": "TOO_MANY_CLIENTS"}
                connection.send(msgpack.packb({"id": None, "error": error}))
                connection.close()
            else:
                self._begin(self._serve_lane, connection)

    def _serve_lane(self, connection: unix.socket) -> None:
        kept: list[dict[str, Any]] = []
        if self.mode == "sleeps":
            connection.setsockopt(unix.SOL_SOCKET, unix.SO_SNDBUF, PACKET_BYTES_MAX)
            assert self.awake.wait(10)
        with contextlib.suppress(OSError):
            while packet := connection.recv(PACKET_BYTES_MAX):
                request = msgpack.unpackb(packet)
                if request["method"] == "lease_acquire":
                    error = {"code": "RESOURCE_EXHAUSTED", "message": "no", "reason": "LEASE_QUOTA"}
                    connection.send(msgpack.packb({"id": request["id"], "error": error}))
                    continue
                self.by_lane.append(request)
                if self.mode == "holds":
                    self.held_by_lane.append((connection, request))
                self.arrived.release()
                if self.mode in ("is silent", "holds"):
                    continue
                if self.mode == "says nonsense":
                    connection.send(b"\xc1")
                    continue
                if self.mode == "answers in reverse":
                    kept.append(request)
                    if len(kept) < 3:
                        continue
                for each in [*reversed(kept)] or [request]:
                    connection.send(self.lane_reply(each))
                kept = []
        connection.close()

    def lane_reply(self, request: dict[str, Any]) -> bytes:
        header, *tensors = self.reply(request, [])
        packed: bytes = msgpack.packb({"id": request["id"], **header})
        if tensors:
            error = {"code": "RESOURCE_EXHAUSTED", "message": "large", "reason": "REPLY_TOO_LARGE"}
            packed = msgpack.packb({"id": request["id"], "error": error})
        if self.mode == "is old":
            error = {"code": "UNIMPLEMENTED", "message": "no", "reason": "WRONG_SOCKET"}
            packed = msgpack.packb({"id": request["id"], "error": error})
        return packed

    def send_held(self, at: int) -> None:
        """Answers one of the requests that it holds, counted in the order in which they came."""
        connection, request = self.held_by_lane[at]
        connection.send(self.lane_reply(request))

    def stop(self) -> None:
        super().stop()
        for each in (self.listener, *self.connections):
            with contextlib.suppress(OSError):
                each.shutdown(unix.SHUT_RDWR)
            each.close()
        for thread in self._going:
            thread.join(10)

    @property
    def over_zeromq(self) -> list[dict[str, Any]]:
        """The inferences that came over the other socket."""
        return [request for request in self.seen if request["method"] == "model_infer"]


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[LanePeer]:
    peer = LanePeer(tmp_path)
    yield peer
    peer.stop()


@pytest.fixture
def client(peer: LanePeer) -> Iterator[Client]:
    with Client(peer.endpoint, timeout=10) as client:
        yield client


def drain(arrived: threading.Semaphore) -> None:
    """Forgets which requests have arrived."""
    while arrived.acquire(blocking=False):
        pass


def double(client: Client, value: float = 1, **kinds: Any) -> float:
    """What the model makes of a number."""
    return float(client.infer("double", {"x": np.float32([value])}, **kinds)["x"][0])


def test_small_requests_go_by_lane(client: Client, peer: LanePeer) -> None:
    """All of them, whatever they are made of, and ZeroMQ is not even connected."""
    assert double(client) == 2
    assert client.infer("double", {"x": RawTensor("FP32", (1,), b"\0\0\0\x40")})["x"][0] == 4
    assert client.infer("double", {"x": np.array(["a"])})["x"].tolist() == ["a"]
    assert client.infer("double", {"x": np.arange(9, dtype=">i4")[::2]})["x"].tolist() == [0, 4, 8, 12, 16]
    with pytest.raises(errors.NotFound, match="absent"):
        client.infer("absent", {"x": SMALL})
    assert len(peer.by_lane) == 5
    assert not peer.seen


def test_what_does_not_fit_goes_over_zeromq(client: Client, peer: LanePeer) -> None:
    """And so do questions, and everything where it is not wanted; the lane is for the rest still."""
    middle = np.arange(10_000, dtype=np.float32)
    np.testing.assert_array_equal(client.infer("double", {"x": middle})["x"], middle * 2)
    np.testing.assert_array_equal(client.infer("double", {"x": LARGE})["x"], LARGE * 2)
    assert client.server_live()
    with Client(peer.endpoint, timeout=10, fast=False) as other:
        assert double(other) == 2
    assert not peer.by_lane
    assert double(client) == 2
    assert len(peer.by_lane) == 1


def test_an_answer_that_does_not_fit_is_asked_for_again(client: Client, peer: LanePeer) -> None:
    """Over ZeroMQ, and the next time there at once."""

    def large(*_: Any) -> list[Any]:
        return [{"model_name": "double", "model_version": "1", "parameters": {}, "outputs": [out]}, bytes(8)]

    out = {"name": "y", "datatype": "FP32", "shape": [2], "frame": 0}
    peer.reply = large  # type: ignore[method-assign]  # every answer has a frame
    for _ in range(3):
        assert client.infer("double", {"x": SMALL})["y"].tolist() == [0, 0]
    assert len(peer.by_lane) == 1
    assert len(peer.over_zeromq) == 3


@pytest.mark.parametrize("mode", ["is old", "is full", "hangs up"])
def test_a_daemon_that_takes_no_requests_there(client: Client, peer: LanePeer, mode: str) -> None:
    """Is asked over ZeroMQ, without a word to the caller, and not again at each request."""
    peer.mode = mode
    for value in range(5):
        assert double(client, value) == 2 * value
    assert len(peer.over_zeromq) == 5
    assert len(peer.connections) <= 2
    assert len(peer.by_lane) <= 1


@pytest.mark.parametrize("mode", ["is full", "hangs up"])
def test_no_thread_fails_where_the_lane_is_not_served(peer: LanePeer, mode: str) -> None:
    """Threads that share the connection that is refused all go over ZeroMQ, whoever reads the refusal."""
    peer.mode = mode
    got: list[float] = []
    for _ in range(10):
        with Client(peer.endpoint, timeout=10) as client:
            together = threading.Barrier(6)

            def ask(client: Client = client, together: threading.Barrier = together) -> None:
                together.wait()
                got.append(double(client, 1))

            threads = [threading.Thread(target=ask) for _ in range(6)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(10)
    assert got == [2.0] * 60


def test_later_it_is_asked_again(client: Client, peer: LanePeer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it takes requests there now."""
    monkeypatch.setattr(client_module, "LANE_RETRY_S", 0.0)
    for mode in ("is full", "hangs up", "is old"):
        peer.mode = mode
        assert double(client) == 2
    peer.mode = ""
    assert double(client) == 2
    assert len(peer.over_zeromq) == 3


def test_a_daemon_without_the_socket(tmp_path: Path) -> None:
    """Is asked over ZeroMQ."""
    peer = Peer(tmp_path)
    with Client(peer.endpoint, timeout=10) as client:
        assert double(client) == 2
    peer.stop()


def test_replies_in_any_order_to_many_threads(client: Client, peer: LanePeer) -> None:
    """Each gets its own; they share one connection."""
    peer.mode = "answers in reverse"
    got: dict[int, float] = {}

    def ask(value: int) -> None:
        got[value] = double(client, value)

    for round_ in range(20):
        threads = [threading.Thread(target=ask, args=(3 * round_ + at,)) for at in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
    assert got == {value: 2.0 * value for value in range(60)}
    assert len(peer.connections) == 1


@pytest.mark.parametrize("mode", ["is silent", "says nonsense"])
def test_a_deadline_passes(client: Client, peer: LanePeer, mode: str) -> None:
    """The caller is told in time, and what comes late or means nothing is dropped."""
    peer.mode = mode
    with pytest.raises(errors.DeadlineExceeded):
        double(client, timeout=0.05)
    peer.mode = ""
    assert double(client, 3) == 6


def test_late_replies_do_not_stop_the_lane_up(client: Client, peer: LanePeer) -> None:
    """A peer that reads no more until its replies are taken is relieved of those that came too late."""
    peer.mode = "sleeps"
    large = {f"x{at}": np.zeros(4096, np.float32) for at in range(3)}
    reasons = set()
    for _ in range(20):
        with pytest.raises(errors.DeadlineExceeded) as caught:
            client.infer("double", large, timeout=0.02)
        reasons.add(caught.value.reason)
    assert reasons == {"CLIENT_DEADLINE", "SOCKET_FULL"}
    peer.awake.set()
    assert double(client, 3) == 6
    assert not peer.seen


def test_a_connection_that_is_lost_is_made_anew(client: Client, peer: LanePeer) -> None:
    """Between requests nobody notices; a request in flight is sent once more."""
    assert double(client) == 2
    peer.connections[0].shutdown(unix.SHUT_RDWR)
    assert double(client, 2) == 4
    peer.mode = "is silent"
    got: list[float] = []
    thread = threading.Thread(target=lambda: got.append(double(client, 5)))
    drain(peer.arrived)
    thread.start()
    assert peer.arrived.acquire(timeout=10)
    peer.mode = ""
    peer.connections[-1].shutdown(unix.SHUT_RDWR)
    thread.join(10)
    assert got == [10.0]
    assert len(peer.connections) == 3
    assert not peer.seen


@pytest.mark.parametrize("answered", [(0, 1), (1, 0)])
def test_one_joins_while_another_waits(client: Client, peer: LanePeer, answered: tuple[int, int]) -> None:
    """Each gets its own reply, whichever comes first, and whoever reads it."""
    assert double(client) == 2
    peer.mode = "holds"
    got: dict[int, float] = {}

    def ask(value: int) -> None:
        got[value] = double(client, value)

    threads = [threading.Thread(target=ask, args=(value,)) for value in (0, 1)]
    drain(peer.arrived)
    for thread in threads:
        thread.start()
        assert peer.arrived.acquire(timeout=10)
    for value in answered:
        peer.send_held(value)
        threads[value].join(10)
        assert got[value] == 2 * value
    peer.mode = ""
    assert double(client, 5) == 10
    assert len(peer.connections) == 1


@pytest.mark.parametrize("short", [0, 1])
def test_the_time_of_one_is_over_while_another_waits(client: Client, peer: LanePeer, short: int) -> None:
    """Whether it is the one that leads or not, the other gets its reply."""
    assert double(client) == 2
    peer.mode = "holds"
    ends: dict[int, object] = {}

    def ask(at: int) -> None:
        try:
            ends[at] = double(client, at, timeout=0.5 if at == short else 10)
        except errors.EdgedError as e:
            ends[at] = type(e)

    threads = [threading.Thread(target=ask, args=(at,)) for at in (0, 1)]
    drain(peer.arrived)
    for thread in threads:
        thread.start()
        assert peer.arrived.acquire(timeout=10)
    threads[short].join(10)
    assert ends == {short: errors.DeadlineExceeded}
    other = 1 - short
    peer.send_held(other)
    threads[other].join(10)
    assert ends == {short: errors.DeadlineExceeded, other: 2.0 * other}
    peer.mode = ""
    assert double(client, 5) == 10
    assert len(peer.connections) == 1


@pytest.mark.parametrize("timeout", [1e-9, 1e-6])
def test_a_deadline_that_has_passed_already(client: Client, peer: LanePeer, timeout: float) -> None:
    """Is told at once, and breaks nothing."""
    assert double(client) == 2
    peer.mode = "is silent"
    for _ in range(20):
        with pytest.raises(errors.DeadlineExceeded):
            double(client, timeout=timeout)
    peer.mode = ""
    assert double(client, 3) == 6


def test_both_are_sent_again_when_the_connection_is_lost(client: Client, peer: LanePeer) -> None:
    """The one that leads and the one that joined it."""
    assert double(client) == 2
    peer.mode = "holds"
    got: list[float] = []
    threads = [threading.Thread(target=lambda: got.append(double(client, 4))) for _ in range(2)]
    drain(peer.arrived)
    for thread in threads:
        thread.start()
        assert peer.arrived.acquire(timeout=10)
    peer.mode = ""
    peer.connections[-1].shutdown(unix.SHUT_RDWR)
    for thread in threads:
        thread.join(10)
    assert got == [8.0, 8.0]
    assert len(peer.connections) == 2
    assert not peer.seen


@pytest.mark.parametrize("follows", [False, True])
def test_a_reply_that_is_read_by_another(
    peer: LanePeer, follows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wakes the one who leads though it came just before he sleeps; also one who followed another first."""
    with Client(peer.endpoint, timeout=60) as client:
        assert double(client) == 2
        peer.mode = "holds"
        got: list[float] = []
        threads = [threading.Thread(target=lambda: got.append(double(client, 3))) for _ in range(1 + follows)]
        link = client._links["lease.sock"]
        assert isinstance(link, LaneLink)
        sleep, sleeps, may_sleep = link._sleep, threading.Semaphore(0), threading.Semaphore(int(follows))

        def sleep_later(timeout_s: float) -> None:
            sleeps.release()
            assert may_sleep.acquire(timeout=10)
            sleep(timeout_s)

        monkeypatch.setattr(link, "_sleep", sleep_later)
        drain(peer.arrived)
        for thread in threads:
            thread.start()
            assert peer.arrived.acquire(timeout=10)
        if follows:
            assert sleeps.acquire(timeout=10)
            peer.send_held(0)
            threads[0].join(10)
        assert sleeps.acquire(timeout=10)
        with link._lock:
            peer.send_held(-1)
            link._drain()
            assert not link._pendings
        may_sleep.release()
        threads[-1].join(10)
        assert not threads[-1].is_alive()
        assert got == [6.0] * len(threads)
        monkeypatch.undo()
        peer.mode = ""
        assert double(client, 4) == 8


def test_an_interrupt_leaves_nothing_behind(client: Client, peer: LanePeer) -> None:
    """The lane goes on after it, for the same thread and for one that waits too."""
    assert double(client) == 2

    class Interrupted(Exception):
        pass

    def interrupt(*_: object) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        peer.mode = "holds"
        got: list[float] = []
        waits = threading.Thread(target=lambda: got.append(double(client, 3)))
        main = threading.get_ident()

        def join_and_interrupt() -> None:
            assert peer.arrived.acquire(timeout=10)  # the main thread's request, which leads
            waits.start()
            assert peer.arrived.acquire(timeout=10)
            signal.pthread_kill(main, signal.SIGUSR1)

        drain(peer.arrived)
        other = threading.Thread(target=join_and_interrupt)
        other.start()
        with pytest.raises(Interrupted):
            double(client, 2)
        other.join(10)
    finally:
        signal.signal(signal.SIGUSR1, before)
    link = client._links["lease.sock"]
    assert len(link._pendings) == 1
    peer.send_held(0)  # nobody's any more
    peer.send_held(1)
    waits.join(10)
    assert got == [6.0]
    peer.mode = ""
    assert double(client, 4) == 8
    assert link._leader is None
    assert not link._pendings
    assert len(peer.connections) == 1


def test_close_wakes_who_waits(client: Client, peer: LanePeer) -> None:
    """It raises Unavailable."""
    peer.mode = "is silent"
    caught: list[BaseException] = []

    def ask() -> None:
        try:
            double(client)
        except errors.EdgedError as e:
            caught.append(e)

    thread = threading.Thread(target=ask)
    thread.start()
    assert peer.arrived.acquire(timeout=10)
    client.close()
    thread.join(10)
    assert [type(e) for e in caught] == [errors.Unavailable]


def test_a_forked_child_has_a_lane_of_its_own(client: Client, peer: LanePeer) -> None:
    """And the parent keeps his."""
    assert double(client) == 2
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if double(client, 4) == 8 else 2
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert double(client, 3) == 6
    assert len(peer.connections) == 2
    assert not peer.seen


@pytest.mark.parametrize("version", [None, 3, "4"])
@pytest.mark.parametrize("outputs", [None, [], ["y", "z"]])
@pytest.mark.parametrize("priority", [0, 7])
def test_a_recipe_makes_what_the_plan_makes(
    version: str | int | None, outputs: list[str] | None, priority: int
) -> None:
    """Whatever the arrays: the same map, with other bytes for the same ints."""
    packer = msgpack.Packer()
    kinds: dict[str, Any] = {"version": version, "outputs": outputs, "priority": priority}
    for inputs in (
        {},
        {"x": SMALL},
        {"x": np.array(True), "ÿ" * 40: np.zeros((0, 3), np.int64)},
        {f"x{at}": np.arange(at, dtype=np.uint16) for at in range(20)},
        {"x": np.arange(12, dtype=np.float16).reshape(3, 4).T, "y": np.zeros((64, 64), np.float32)},
    ):
        assert suit_recipe(inputs)
        recipe = Recipe("m", inputs, **kinds)
        request = recipe.request({name: array.copy() for name, array in inputs.items()}, **kinds)
        assert request is not None
        for request_id, timeout_us in ((1, 1), (2**53 - 1, 2**40)):
            plan = InferPlan("m", inputs, **kinds).request().packed(request_id, timeout_us, packer)
            made = request.packed(request_id, timeout_us, packer)
            assert msgpack.unpackb(made) == msgpack.unpackb(plan)


@pytest.mark.parametrize(
    "value",
    [
        [1.0],
        3,
        np.float32(1),
        np.array(["a"]),
        np.array([1], object),
        np.zeros(2, ">f4"),
        np.zeros(4097, np.float32),
        np.ma.masked_array([1.0]),
        RawTensor("FP32", (0,), b""),
    ],
)
def test_what_no_recipe_is_for(value: Any) -> None:
    """Large arrays, and those whose bytes are not the wire's."""
    kinds: dict[str, Any] = {"version": None, "outputs": None, "priority": 0}
    assert not suit_recipe({"x": value})
    assert Recipe("m", {"x": np.zeros(4096, np.float32)}, **kinds).request({"x": value}, **kinds) is None


def test_small_arrays_that_are_large_together() -> None:
    """Are not for a recipe: what an inline tensor may have is bounded for all of a request's."""
    large = {f"x{at}": np.zeros(4096, np.float32) for at in range(4)}
    assert not suit_recipe(large)
    large.popitem()
    assert suit_recipe(large)


def test_forms_differ_where_requests_do() -> None:
    """In names and their order, datatypes and shapes, and all that is asked for; a model has its own."""
    x = np.zeros(4, np.float32)
    plain: dict[str, Any] = {"version": None, "outputs": None, "priority": 0}
    forms: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"x": x, "y": x}, plain),
        ({"y": x, "x": x}, plain),
        ({"x": x}, plain),
        ({"x": x.reshape(2, 2)}, plain),
        ({"x": x.view(np.int32)}, plain),
        ({"x": x}, {**plain, "version": "1"}),
        ({"x": x}, {**plain, "outputs": ["y"]}),
        ({"x": x}, {**plain, "outputs": []}),
        ({"x": x}, {**plain, "priority": 1}),
    ]
    for at, (inputs, kinds) in enumerate(forms):
        recipe = Recipe("m", inputs, **kinds)
        fitting = [recipe.request(other, **asked) is not None for other, asked in forms]
        assert fitting == [each == at for each in range(len(forms))]


def test_what_was_asked_for_before_is_not_asked_for_again(client: Client, peer: LanePeer) -> None:
    """Whatever is changed between two requests to one client, its arrays and lists in place included."""
    wanted = ["x"]
    inputs = {"x": np.float32([1])}
    assert client.infer("double", inputs, outputs=wanted)["x"].tolist() == [2]
    wanted.append("y")
    inputs["x"][0] = 4
    assert client.infer("double", inputs, outputs=tuple(wanted))["x"].tolist() == [8]
    assert client.infer("double", {"x": np.int64([3])}, outputs=wanted, priority=2)["x"].tolist() == [6]
    with pytest.raises(errors.NotFound):
        client.infer("absent", inputs)
    assert [request.get("outputs") for request in peer.by_lane] == [
        [{"name": "x"}],
        [{"name": "x"}, {"name": "y"}],
        [{"name": "x"}, {"name": "y"}],
        None,
    ]
    assert [request["parameters"].get("priority") for request in peer.by_lane] == [None, None, 2, None]


def test_few_forms_are_kept(client: Client, peer: LanePeer) -> None:
    """An app whose shapes never repeat does not grow, nor one whose models do not."""
    for count in range(150):
        client.infer("double", {"x": np.zeros(count, np.float32)})
        assert len(client._recipes["double"]) <= client_module._RECIPES_MAX
    for count in range(150):
        with pytest.raises(errors.NotFound):
            client.infer(f"absent-{count}", {"x": SMALL})
        assert len(client._recipes) <= client_module._RECIPE_MODELS_MAX
