"""Leases on the client's side, against a small peer that lends real memory.

What the daemon itself does with leases is in `e2e/test_client_leases.py`; here are the peers that misbehave.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import gc
import mmap
import os
import socket as unix
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest

from edged import AsyncClient, Client, errors, lease
from edged.arrays import RawTensor
from tests.test_client import Peer

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
LARGE = 300_000


class LendingPeer(Peer):
    """A peer with a lease.sock. `refuse`, `unsealed` and `mute` say how it misbehaves."""

    def __init__(self, directory: Path) -> None:
        self.regions: dict[str, mmap.mmap] = {}
        self.asked: list[dict[str, Any]] = []
        self.refuse = ""
        self.unsealed = self.mute = self.forgetful = False
        self.changed = threading.Condition()
        self._lease_path = directory / "lease.sock"
        self._connections: list[unix.socket] = []
        self._threads: list[threading.Thread] = []
        super().__init__(directory)
        self._listener = unix.socket(unix.AF_UNIX, unix.SOCK_SEQPACKET)
        self._listener.bind(str(self._lease_path))
        self._listener.listen(16)
        self._start(self._accept)

    def _start(self, target: Callable[..., None], *args: Any) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._connections.append(connection)
            self._start(self._lend, connection)

    def _lend(self, connection: unix.socket) -> None:
        mine: set[str] = set()
        with contextlib.suppress(OSError):
            self._answer(connection, mine)
        with self.changed:
            for name in mine:
                self.regions.pop(name, None)
            self.changed.notify_all()

    def _answer(self, connection: unix.socket, mine: set[str]) -> None:
        while packet := connection.recv(65536):
            request = msgpack.unpackb(packet)
            with self.changed:
                self.asked.append(request)
                if request["method"] == "lease_release":
                    self.regions.pop(request["region"], None)
                    mine.discard(request["region"])
                self.changed.notify_all()
            if not request["method"].startswith("lease_"):  # it has no fast lane, as older daemons have none
                error = {"code": "UNIMPLEMENTED", "message": "no", "reason": "WRONG_SOCKET"}
                connection.send(msgpack.packb({"id": request["id"], "error": error}))
            elif request["method"] == "lease_release":
                connection.send(msgpack.packb({"id": request["id"]}))
            elif self.refuse:
                error = {"code": "RESOURCE_EXHAUSTED", "message": "no", "reason": self.refuse}
                connection.send(msgpack.packb({"id": request["id"], "error": error}))
            elif not self.mute:
                name = os.urandom(16).hex()
                size = -(-request["byte_size"] // 4096) * 4096
                fd = os.memfd_create("lease", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
                os.ftruncate(fd, size)
                if not self.unsealed:
                    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
                self.regions[name] = mmap.mmap(fd, size)
                mine.add(name)
                answer = {"id": request["id"], "region": name, "byte_size": size}
                unix.send_fds(connection, [msgpack.packb(answer)], [fd])
                os.close(fd)

    def reply(self, request: dict[str, Any], frames: list[bytes]) -> list[Any]:
        for tensor in request.get("inputs", ()):
            where = tensor.get("parameters")
            if where:
                region = self.regions.get(where["shared_memory_region"])
                if region is None or self.forgetful:
                    error = {"code": "NOT_FOUND", "message": "no region", "reason": "REGION_NOT_FOUND"}
                    return [{"error": error}]
                start, size = where["shared_memory_offset"], where["shared_memory_byte_size"]
                tensor["data"] = region[start : start + size]
        return super().reply(request, frames)

    def wait(self, question: Callable[[], bool]) -> None:
        """Waits until what happens on lease.sock makes the answer true."""
        with self.changed:
            assert self.changed.wait_for(question, 10)

    def methods(self, name: str) -> list[dict[str, Any]]:
        return [request for request in self.asked if request["method"] == name]

    def hang_up(self) -> None:
        """Ends the lease connections; the next is taken as ever."""
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(unix.SHUT_RDWR)

    def places(self, at: int = -1) -> list[dict[str, Any] | None]:
        """Where the inputs of a request lay."""
        infers = [request for request in self.seen if request["method"] == "model_infer"]
        return [tensor.get("parameters") for tensor in infers[at]["inputs"]]

    def regions_named(self) -> list[str]:
        """The region of each request's first input, in order."""
        infers = [request for request in self.seen if request["method"] == "model_infer"]
        return [r["inputs"][0]["parameters"]["shared_memory_region"] for r in infers]

    def stop(self) -> None:
        super().stop()
        with contextlib.suppress(OSError):
            self._listener.shutdown(unix.SHUT_RDWR)
        self.hang_up()
        for thread in self._threads:
            thread.join(10)
        for each in (self._listener, *self._connections):
            each.close()


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[LendingPeer]:
    peer = LendingPeer(tmp_path)
    yield peer
    peer.stop()


@pytest.fixture
def client(peer: LendingPeer) -> Iterator[Client]:
    with Client(peer.endpoint, timeout=10) as client:
        yield client


def large(value: float = 1.0) -> Any:
    """An array that goes by lease."""
    return np.full(LARGE, value, np.float32)


def doubled(client: Client, value: float = 1.0) -> None:
    """One right answer."""
    assert (client.infer("double", {"x": large(value)})["x"] == 2 * value).all()


def test_large_arrays_share_one_buffer_which_is_used_again(client: Client, peer: LendingPeer) -> None:
    """Each on a cache line of its own; the medium ones stay frames and the small ones inline."""
    inputs = {"a": large(1), "m": np.zeros(10_000, np.float32), "b": large(2), "s": np.zeros(2, np.float32)}
    for _ in range(3):
        result = client.infer("double", inputs)
        assert (result["a"] == 2).all()
        assert (result["b"] == 4).all()
    a, m, b, s = peer.places()
    assert (m, s) == (None, None)
    assert a is not None
    assert b is not None
    assert (a["shared_memory_offset"], b["shared_memory_offset"] % 64) == (0, 0)
    assert b["shared_memory_offset"] >= a["shared_memory_byte_size"] == 4 * LARGE
    assert len(set(peer.regions_named())) == 1
    assert len(peer.methods("lease_acquire")) == 1


def test_whatever_an_array_is_like_its_bytes_arrive_raw(client: Client) -> None:
    """Strided, big-endian, of half words, read-only, bytes ready made."""
    base = np.arange(LARGE * 2, dtype=np.float32)
    assert (client.infer("double", {"x": base[::-2]})["x"] == base[::-2] * 2).all()
    assert (client.infer("double", {"x": base.astype(">f4")})["x"] == base * 2).all()
    grid = base.reshape(600, 1000)
    assert (client.infer("double", {"x": grid.T})["x"] == grid.T * 2).all()
    halves = np.full(LARGE, 1.5, np.float16)
    assert (client.infer("double", {"x": halves})["x"] == 3).all()
    base.flags.writeable = False
    raw = RawTensor("FP32", base.shape, base.tobytes())
    assert (client.infer("double", {"x": raw, "y": base})["x"] == base * 2).all()


def test_requests_in_flight_have_a_buffer_each(client: Client, peer: LendingPeer) -> None:
    """And once answered the buffers serve the next, whether or not anybody reads the results."""
    peer.hold = True
    pending = [client.submit("double", {"x": large(n)}) for n in range(4)]
    for _ in pending:
        assert peer.arrived.acquire(timeout=10)
    assert len(set(peer.regions_named())) == 4
    peer.hold = False
    client.model_ready("double")
    for n, each in enumerate(pending):
        assert (each.result()["x"] == 2 * n).all()
    doubled(client)
    assert len(peer.methods("lease_acquire")) == 4


@pytest.mark.parametrize("how", ["timeout", "cancel"])
def test_a_buffer_that_may_still_be_read_is_never_used_again(
    client: Client, peer: LendingPeer, how: str
) -> None:
    """It goes back to the daemon, which knows when its run is over."""
    peer.hold = True
    pending = client.submit("double", {"x": large(5)}, timeout=10 if how == "cancel" else 0.2)
    assert peer.arrived.acquire(timeout=10)
    if how == "cancel":
        pending.cancel()
    with pytest.raises((errors.Cancelled, errors.DeadlineExceeded)):
        pending.result()
    peer.wait(lambda: len(peer.methods("lease_release")) == 1)
    peer.hold = False
    doubled(client)
    first, second = peer.regions_named()[0], peer.regions_named()[-1]
    assert first != second
    assert peer.methods("lease_release")[0]["region"] == first


def test_without_leases_frames_do(tmp_path: Path) -> None:
    """A daemon that lends nothing is asked as ever, and says so only to who wants a lease."""
    peer = Peer(tmp_path)
    try:
        with Client(peer.endpoint, timeout=10) as client:
            doubled(client)
            assert peer.seen[-1]["inputs"][0]["frame"] == 0
            with pytest.raises(errors.Unimplemented) as error:
                client.lease(4096)
            assert error.value.reason == "NO_LEASES"
    finally:
        peer.stop()


def test_a_refusal_makes_frames_and_is_not_asked_for_each_time(client: Client, peer: LendingPeer) -> None:
    """The quota is another app's to use up; this one does not notice."""
    peer.refuse = "LEASE_QUOTA"
    doubled(client)
    doubled(client)
    assert peer.seen[-1]["inputs"][0]["frame"] == 0
    assert len(peer.methods("lease_acquire")) == 1
    with pytest.raises(errors.ResourceExhausted) as error:
        client.lease(4096)
    assert error.value.reason == "LEASE_QUOTA"


@pytest.mark.parametrize("how", ["unsealed", "mute"])
def test_memory_that_could_fault_and_no_answer_are_done_without(
    client: Client, peer: LendingPeer, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Unsealed memory could be cut off under the app; a lease.sock that is silent costs one short wait."""
    monkeypatch.setattr(lease, "_ANSWER_S_MAX", 0.1)
    setattr(peer, how, True)
    doubled(client)
    assert peer.seen[-1]["inputs"][0]["frame"] == 0
    with pytest.raises((errors.Internal, errors.Unavailable)):
        client.lease(4096)


def test_arrays_in_a_lease_are_named_and_not_sent(client: Client, peer: LendingPeer) -> None:
    """Whole, sliced or reshaped; not where they are strided, partly elsewhere, or small."""
    with client.lease(8 * LARGE) as mine:
        whole = mine.array(2 * LARGE)
        whole[:] = np.arange(2 * LARGE)
        assert (client.infer("double", {"x": whole})["x"] == whole * 2).all()
        part = whole[LARGE:].reshape(1000, -1)
        assert (client.infer("double", {"x": part})["x"] == part * 2).all()
        place = {"shared_memory_offset": 4 * LARGE, "shared_memory_byte_size": 4 * LARGE}
        assert peer.places() == [{"shared_memory_region": mine.region, **place}]
        raw = RawTensor("FP32", (LARGE,), whole[:LARGE].view(np.uint8).data)
        client.infer("double", {"x": raw, "y": whole[:10]})
        assert [p and p["shared_memory_region"] for p in peer.places()] == [mine.region, None]
        assert (client.infer("double", {"x": whole[::2]})["x"] == whole[::2] * 2).all()
        assert peer.regions_named()[-1] != mine.region
    assert len(peer.methods("lease_acquire")) == 2
    assert (client.infer("double", {"x": whole})["x"] == whole * 2).all()
    assert peer.regions_named()[-1] != mine.region


def test_many_leases_are_told_apart(client: Client, peer: LendingPeer) -> None:
    """By address, whatever was taken and given back between."""
    leases = [client.lease(32 * 1024) for _ in range(20)]
    arrays = [each.array(8 * 1024) for each in leases]
    for at, each in enumerate(leases):
        arrays[at][:] = at
        if at % 3 == 0:
            each.close()
    for at in range(20):
        assert (client.infer("double", {"x": arrays[at]})["x"] == 2 * at).all()
        place = peer.places()[0]
        assert (place and place["shared_memory_region"]) == (leases[at].region if at % 3 else None)


def test_a_lease_goes_back_with_its_last_array(client: Client, peer: LendingPeer) -> None:
    """An app that never closes loses nothing for ever."""
    array: Any = client.lease(4 * LARGE).array(LARGE)
    gc.collect()
    array[:] = 3
    client.infer("double", {"x": array})
    assert len(peer.regions) == 1
    del array
    gc.collect()
    peer.wait(lambda: not peer.regions)


def test_an_array_must_lie_in_the_lease(client: Client) -> None:
    """Bounds, alignment, and dtypes that are addresses."""
    mine = client.lease(5000)
    assert mine.nbytes == 8192
    assert mine.array((2, 3), np.int16, 4).shape == (2, 3)
    assert mine.array(0, offset=8192).nbytes == 0
    for shape, dtype, offset in (
        (2049, np.float32, 0),
        (1, np.float32, 8192),
        (1, np.float32, 2),
        (1, np.float32, -4),
        ((-1,), np.float32, 0),
        (1, object, 0),
    ):
        with pytest.raises(errors.InvalidArgument):
            mine.array(shape, dtype, offset)
    mine.close()
    mine.close()
    with pytest.raises(errors.FailedPrecondition):
        mine.array(1)
    for wrong in (0, -1, True, 1.5):
        with pytest.raises(errors.InvalidArgument):
            client.lease(wrong)  # type: ignore[arg-type]  # what it refuses


def test_after_a_hang_up_leases_are_lost_and_the_pool_begins_anew(client: Client, peer: LendingPeer) -> None:
    """Who holds one is told; who holds none notices nothing."""
    mine = client.lease(4 * LARGE)
    array = mine.array(LARGE)
    doubled(client)
    peer.hang_up()
    peer.wait(lambda: not peer.regions)
    assert mine.lost
    for use in (lambda: client.infer("double", {"x": array}), lambda: mine.array(1)):
        with pytest.raises(errors.Unavailable) as error:
            use()
        assert error.value.reason == "LEASE_LOST"
    doubled(client)
    assert len(set(peer.regions_named())) == 2
    with client.lease(4 * LARGE) as new:
        again = new.array(LARGE)
        again[:] = 4
        assert (client.infer("double", {"x": again})["x"] == 8).all()


def test_a_daemon_that_does_not_know_its_lease_is_asked_again_without(
    client: Client, peer: LendingPeer
) -> None:
    """A buffer's request is repeated with frames; an app's own lease is lost."""
    mine = client.lease(4 * LARGE)
    array = mine.array(LARGE)
    peer.forgetful = True
    doubled(client)
    assert peer.seen[-1]["inputs"][0]["frame"] == 0
    with pytest.raises(errors.Unavailable) as error:
        client.infer("double", {"x": array})
    assert error.value.reason == "LEASE_LOST"
    with pytest.raises(errors.Unavailable):
        client.submit("double", {"x": large()}).result()


def test_the_pool_is_bounded_and_makes_room(
    client: Client, peer: LendingPeer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What does not fit goes by frames; free buffers that are too small give way."""
    monkeypatch.setattr(lease, "_POOL_BYTES_MAX", 6 * 1024 * 1024)
    doubled(client)
    client.infer("double", {"x": np.zeros(1_500_000, np.float32)})
    assert len(peer.methods("lease_acquire")) == 2
    peer.wait(lambda: len(peer.regions) == 1)
    client.infer("double", {"x": np.zeros(3_000_000, np.float32)})
    assert peer.seen[-1]["inputs"][0]["frame"] == 0
    monkeypatch.setattr(lease, "_POOL_BUFFERS_MAX", 1)
    peer.hold = True
    pending = [client.submit("double", {"x": large(n)}) for n in range(3)]
    for _ in range(3):
        assert peer.arrived.acquire(timeout=10)
    peer.hold = False
    client.model_ready("double")
    assert [float(each.result()["x"][0]) for each in pending] == [0, 2, 4]
    assert [p is None for at in (-3, -2, -1) for p in peer.places(at)] == [False, True, True]


def test_a_buffer_long_unused_goes_back(
    client: Client, peer: LendingPeer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A burst does not hold its memory for ever."""
    peer.hold = True
    pending = [client.submit("double", {"x": large(n)}) for n in range(3)]
    for _ in range(3):
        assert peer.arrived.acquire(timeout=10)
    peer.hold = False
    client.model_ready("double")
    for each in pending:
        each.result()
    assert len(peer.regions) == 3
    monkeypatch.setattr(lease, "_IDLE_S_MAX", 0.0)
    doubled(client)
    peer.wait(lambda: len(peer.regions) == 1)


def test_threads_do_not_mix_their_tensors(client: Client) -> None:
    """Eight at once, each with numbers of its own."""
    wrong: list[object] = []

    def ask(number: int) -> None:
        try:
            for at in range(20):
                doubled(client, number * 100 + at)
        except (errors.EdgedError, AssertionError) as e:
            wrong.append(e)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []


def test_the_asyncio_client_does_the_same(peer: LendingPeer) -> None:
    """Buffers, leases of the app's, and a cancelled task's buffer that nobody gets."""

    async def run() -> None:
        async with AsyncClient(peer.endpoint, timeout=10) as client:
            answers = await asyncio.gather(*(client.infer("double", {"x": large(n)}) for n in range(12)))
            assert [float(a["x"][-1]) for a in answers] == [2.0 * n for n in range(12)]
            assert all(peer.places(at)[0] for at in range(12))
            with await client.lease(4 * LARGE) as mine:
                array = mine.array(LARGE)
                array[:] = 6
                assert ((await client.infer("double", {"x": array}))["x"] == 12).all()
                assert peer.regions_named()[-1] == mine.region
            peer.hold = True
            seen = len(peer.seen)
            task = client.submit("double", {"x": large()})
            deadline = time.monotonic() + 10
            while len(peer.seen) == seen and time.monotonic() < deadline:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            lost = peer.regions_named()[-1]
            peer.hold = False
            for n in range(3):
                assert ((await client.infer("double", {"x": large(n)}))["x"] == 2 * n).all()
                assert peer.regions_named()[-1] != lost
            assert lost not in client._leases._pool

    asyncio.run(run())


def test_a_forked_child_has_leases_of_its_own(client: Client, peer: LendingPeer) -> None:
    """The parent's are lost to it, and the parent's are not touched."""
    mine = client.lease(4 * LARGE)
    array = mine.array(LARGE)
    array[:] = 2
    doubled(client)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            with pytest.raises(errors.Unavailable, match="LEASE_LOST"):
                client.infer("double", {"x": array})
            doubled(client, 9)
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert len(set(peer.regions_named())) == 2
    assert not mine.lost
    assert (client.infer("double", {"x": array})["x"] == 4).all()
    doubled(client)
    assert peer.regions_named()[-1] == peer.regions_named()[0]


def test_outputs_want_arrays_of_a_lease(client: Client) -> None:
    """Anything else is refused before it is sent."""
    with client.lease(4 * LARGE) as mine:
        array = mine.array(LARGE)
        locked = array[:]
        locked.flags.writeable = False
        for wrong in (large(), array[::2], locked, [1.0]):
            with pytest.raises(errors.InvalidArgument) as error:
                client.infer("double", {"x": array}, out={"x": wrong})
            assert error.value.reason == "NOT_IN_LEASE"
        with pytest.raises(errors.InvalidArgument) as error:
            client.infer("double", {"x": array}, outputs=["x"], out={"y": array})
        assert error.value.reason == "UNKNOWN_OUTPUT"
