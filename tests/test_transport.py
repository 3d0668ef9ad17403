"""The sockets, with real ZeroMQ: envelopes, peers, slow readers, modes, and the lock."""

from __future__ import annotations

import contextlib
import os
import select
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from edged import transport
from edged.errors import ResourceExhausted
from edged.messages import Envelope
from edged.transport import Incoming, Router, SocketDir, TransportError, bind_events
from tests.zmtp import Sleeper

WAIT_MS = 10_000
_clients: list[zmq.Socket[Any]] = []


@pytest.fixture
def context() -> Iterator[zmq.Context[Any]]:
    """Ended after its sockets."""
    made: zmq.Context[Any] = zmq.Context()
    yield made
    while _clients:
        _clients.pop().close(0)
    made.term()


@pytest.fixture
def router(context: zmq.Context[Any], tmp_path: Path) -> Iterator[Router]:
    """A ROUTER on a path of its own."""
    made = Router(context, "infer", f"ipc://{tmp_path}/r.sock", frame_bytes_max=1 << 20, frames_max=4)
    yield made
    made.close()


def connect(context: zmq.Context[Any], router: Router, kind: int, **options: Any) -> zmq.Socket[Any]:
    """A client of that kind."""
    socket = context.socket(kind)
    _clients.append(socket)
    socket.linger = 0
    socket.rcvtimeo = WAIT_MS
    for name, value in options.items():
        setattr(socket, name, value)
    socket.connect(router_endpoint(router))
    return socket


def router_endpoint(router: Router) -> str:
    """Where it is bound."""
    found: bytes = router._socket.getsockopt(zmq.LAST_ENDPOINT)
    return found.decode().rstrip("\0")


def receive(router: Router) -> Incoming:
    """The next message, by waiting on the descriptor as the daemon's loop does."""
    until_s = time.monotonic() + WAIT_MS / 1000
    while time.monotonic() < until_s:
        if router.readable():
            message = router.receive()
            assert message is not None
            return message
        select.select([router.fd], [], [], 0.05)
    raise AssertionError("no message came")


@contextlib.contextmanager
def sleeping(router: Router) -> Iterator[tuple[Sleeper, Envelope]]:
    """A client that does not read, and where its replies go."""
    sleeper = Sleeper(router_endpoint(router).removeprefix("ipc://"))
    with contextlib.closing(sleeper):
        sleeper.send([b"header"])
        yield sleeper, receive(router).route


def sizes(router: Router, sleeper: Sleeper, count: int) -> list[int]:
    """The sizes of a client's next `count` replies, while what is kept is tried again."""
    return [len(frame) for _ in range(count) for frame in sleeper.receive(router.flush)]


def taken(router: Router, route: Any, nbytes: int) -> bool:
    """Whether a reply of so many bytes was sent, or kept to be."""
    try:
        router.send(route, [b"x" * nbytes])
    except ResourceExhausted:
        return False
    return True


def plain(message: Incoming) -> list[bytes]:
    """Its frames as bytes."""
    return [bytes(f) for f in message.frames]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (zmq.REQ, {}),
        (zmq.REQ, {"req_relaxed": 1, "req_correlate": 1}),
        (zmq.DEALER, {}),
    ],
)
def test_each_kind_of_client_gets_its_reply(
    context: zmq.Context[Any], router: Router, kind: int, options: dict[str, Any]
) -> None:
    """The envelope that the client's socket wants is taken off and put back."""
    client = connect(context, router, kind, **options)
    for turn in range(3):
        client.send_multipart([b"header", b"tensor %d" % turn])
        message = receive(router)
        assert plain(message) == [b"header", b"tensor %d" % turn]
        router.send(message.route, [b"reply", memoryview(b"bytes")])
        assert client.recv_multipart() == [b"reply", b"bytes"]


def test_a_dealer_may_send_a_delimiter(context: zmq.Context[Any], router: Router) -> None:
    """Its reply has one too."""
    client = connect(context, router, zmq.DEALER)
    client.send_multipart([b"", b"header", b""])
    message = receive(router)
    assert plain(message) == [b"header", b""]
    router.send(message.route, [b"reply"])
    assert client.recv_multipart() == [b"", b"reply"]


@pytest.mark.parametrize("frames", [[b""], [b"", b""], [b"abcd", b""], [b"abcd"]])
def test_odd_messages_can_all_be_answered(
    context: zmq.Context[Any], router: Router, frames: list[bytes]
) -> None:
    """An empty message, a lone delimiter, four bytes that look like REQ's number."""
    client = connect(context, router, zmq.DEALER)
    client.send_multipart(frames)
    message = receive(router)
    router.send(message.route, [b"reply"])
    assert client.recv_multipart()[-1] == b"reply"


def test_frames_beyond_the_bound_are_dropped_and_the_socket_stays_in_step(
    context: zmq.Context[Any], router: Router
) -> None:
    """More than any legal message has is kept, so that the wire can refuse it; not all of it."""
    client = connect(context, router, zmq.DEALER)
    client.send_multipart([b"h", *[b"t"] * 500])
    client.send(b"next")
    assert 5 < len(receive(router).frames) <= 8
    assert plain(receive(router)) == [b"next"]


def test_a_message_that_is_too_large_costs_the_connection_only(
    context: zmq.Context[Any], router: Router
) -> None:
    """Beyond twice the bound libzmq hangs up; others are served, and so is the client that comes again."""
    client = connect(context, router, zmq.DEALER)
    client.send(b"x" * ((2 << 20) + 1))
    other = connect(context, router, zmq.DEALER)
    other.send(b"small")
    assert plain(receive(router)) == [b"small"]
    client.send(b"again")
    assert plain(receive(router)) == [b"again"]


def test_the_peer_is_the_kernels_word(context: zmq.Context[Any], router: Router) -> None:
    """User, group and process of the other end, at the first message and at later ones."""
    for kind, options in ((zmq.DEALER, {}), (zmq.DEALER, {"routing_id": b"own"}), (zmq.REQ, {})):
        client = connect(context, router, kind, **options)
        client.send(b"header")
        peer = receive(router).peer
        assert (peer.uid, peer.gid, peer.pid) == (os.getuid(), os.getgid(), os.getpid())


def test_nothing_waits_is_none(router: Router) -> None:
    """Receiving never blocks."""
    assert not router.readable()
    assert router.receive() is None


def test_a_reply_to_a_client_that_is_gone_is_dropped(context: zmq.Context[Any], router: Router) -> None:
    """And nothing is kept for it."""
    router.send((b"\0nobody",), [b"reply"])
    assert not router.has_backlog


def test_replies_to_a_slow_reader_are_kept_in_order(context: zmq.Context[Any], router: Router) -> None:
    """Beyond what libzmq holds they wait here, copied, and go out when there is room; nobody else waits."""
    slow = connect(context, router, zmq.DEALER, rcvhwm=1, rcvbuf=4096)
    slow.send(b"header")
    route = receive(router).route
    count = 600
    for number in range(count):
        buffer = bytearray(b"%06d" % number + b"x" * 20_000)
        router.send(route, [memoryview(buffer)])
        buffer[:6] = b"reused"[:6]
    assert router.has_backlog
    quick = connect(context, router, zmq.DEALER)
    quick.send(b"header")
    router.send(receive(router).route, [b"reply"])
    assert quick.recv() == b"reply"
    seen = []
    until_s = time.monotonic() + WAIT_MS / 1000
    while len(seen) < count and time.monotonic() < until_s:
        router.flush()
        while slow.poll(5):
            seen.append(slow.recv()[:6])
    assert seen == [b"%06d" % n for n in range(count)]
    assert not router.has_backlog
    assert router.dropped_replies == 0


def test_the_backlog_of_a_slow_reader_is_bounded(
    context: zmq.Context[Any], router: Router, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond the bound replies are refused in words; the account of bytes is exact."""
    monkeypatch.setattr(transport, "BACKLOG_BYTES_MAX", 100_000)
    slow = connect(context, router, zmq.DEALER, rcvhwm=1, rcvbuf=4096)
    slow.send(b"header")
    route = receive(router).route
    refused = [not taken(router, route, 20_000) for _ in range(600)]
    assert refused[-1]
    assert not refused[0]
    (backlog,) = router._backlogs.values()
    assert backlog.nbytes == sum(len(part) for parts in backlog.replies for part in parts)
    assert backlog.nbytes <= 100_000
    while slow.poll(20):
        slow.recv()
        router.flush()
        assert all(b.nbytes > 0 for b in router._backlogs.values())


def test_large_replies_to_a_slow_reader_are_bounded_in_bytes(
    context: zmq.Context[Any], router: Router, monkeypatch: pytest.MonkeyPatch
) -> None:
    """libzmq's own bound counts messages; what it holds of large ones counts here until it is read."""
    monkeypatch.setattr(transport, "BACKLOG_BYTES_MAX", 4 << 20)
    slow = connect(context, router, zmq.DEALER, rcvhwm=1, rcvbuf=4096)
    slow.send(b"header")
    route = receive(router).route
    kept = sum(taken(router, route, 1 << 20) for _ in range(40))
    assert kept <= 2 * 4 + 3
    assert router._unread_bytes(route[0]) <= 4 << 20
    assert router._backlog_bytes <= 4 << 20
    until_s = time.monotonic() + WAIT_MS / 1000
    while kept and time.monotonic() < until_s:
        router.flush()
        while slow.poll(5):
            assert len(slow.recv()) == 1 << 20
            kept -= 1
    assert (kept, router.has_backlog, router._backlog_bytes) == (0, False, 0)


BOUND = 1 << 20
"""In place of 64 MiB in what follows."""


@pytest.fixture
def small_bounds(monkeypatch: pytest.MonkeyPatch, context: zmq.Context[Any], tmp_path: Path) -> Router:
    """A ROUTER that keeps 1 MiB for a client and 10 MiB for all."""
    monkeypatch.setattr(transport, "BACKLOG_BYTES_MAX", BOUND)
    monkeypatch.setattr(transport, "BACKLOG_TOTAL_BYTES_MAX", 10 * BOUND)
    return Router(context, "infer", f"ipc://{tmp_path}/b.sock", frame_bytes_max=4 * BOUND, frames_max=4)


@pytest.mark.parametrize("nbytes", [BOUND - 1, BOUND, BOUND + 1, 4 * BOUND])
def test_a_client_that_reads_gets_replies_of_any_size(
    context: zmq.Context[Any], small_bounds: Router, nbytes: int
) -> None:
    """Around the bound of what is kept, and beyond it: the bound is for those that do not read."""
    with contextlib.closing(small_bounds) as router:
        client = connect(context, router, zmq.DEALER)
        for turn in range(3):
            client.send(b"header")
            route = receive(router).route
            router.send(route, [b"h", bytes([turn]) * nbytes])
            until_s = time.monotonic() + WAIT_MS / 1000
            while not client.poll(5) and time.monotonic() < until_s:
                router.flush()  # the one before may not be known to be read yet; then this one waited
            assert client.recv_multipart() == [b"h", bytes([turn]) * nbytes]
        until_s = time.monotonic() + WAIT_MS / 1000
        while router._held_bytes() and time.monotonic() < until_s:  # libzmq's thread lets go of them
            select.select([], [], [], 0.005)
        assert (router._held_bytes(), router.has_backlog) == (0, False)


def test_one_reply_beyond_the_bound_goes_and_one_waits(
    context: zmq.Context[Any], small_bounds: Router
) -> None:
    """For each client. A third is refused, and small ones are still kept behind what waits, in order."""
    with contextlib.closing(small_bounds) as router:
        with sleeping(router) as (sleeper, route):
            assert [taken(router, route, 2 * BOUND + at) for at in range(3)] == [True, True, False]
            with pytest.raises(ResourceExhausted, match="read before asking for more") as refused:
                router.send(route, [bytes(BOUND + 1)])
            assert refused.value.reason == "REPLIES_UNREAD"
            assert [taken(router, route, 100 + at) for at in range(2)] == [True, True]
            assert sizes(router, sleeper, 4) == [2 * BOUND, 2 * BOUND + 1, 100, 101]
            assert (router._backlog_bytes, router._oversize_bytes, router.has_backlog) == (0, 0, False)
            assert taken(router, route, 4 * BOUND)
            assert sizes(router, sleeper, 1) == [4 * BOUND]
        assert router.dropped_replies == 0


def test_those_that_do_not_read_are_bounded_together_and_stop_nobody(
    context: zmq.Context[Any], small_bounds: Router
) -> None:
    """Beyond the bound of all, what is too large for one is refused; the rest is served as ever."""
    with contextlib.closing(small_bounds) as router, contextlib.ExitStack() as stack:
        routes = [stack.enter_context(sleeping(router))[1] for _ in range(5)]
        assert [taken(router, route, 3 * BOUND) for route in routes] == [True] * 3 + [False] * 2
        assert router._held_bytes() == 9 * BOUND
        reader = connect(context, router, zmq.DEALER)
        reader.send(b"header")
        route = receive(router).route
        assert not taken(router, route, 3 * BOUND)
        for nbytes in (100, BOUND):
            assert taken(router, route, nbytes)
            assert len(reader.recv()) == nbytes


def test_a_client_that_goes_frees_what_was_kept_for_it(small_bounds: Router) -> None:
    """What it left unread counts no longer, and another can have as much."""
    with contextlib.closing(small_bounds) as router:
        for _ in range(4):
            with sleeping(router) as (_, route):
                assert [taken(router, route, 4 * BOUND) for _ in range(3)] == [True, True, False]
            until_s = time.monotonic() + WAIT_MS / 1000
            while (router.has_backlog or router._held_bytes()) and time.monotonic() < until_s:
                router.flush()
                router.readable()  # as the daemon's loop asks, in which libzmq hears that the client is gone
                select.select([router.fd], [], [], 0.005)
            assert (router._held_bytes(), router.has_backlog) == (0, False)


def test_clients_that_come_once_are_not_kept(context: zmq.Context[Any], router: Router) -> None:
    """What was counted of a large reply goes when the reply has, though its client never comes again."""
    for _ in range(3 * transport.LARGE_CLIENTS_MIN):
        client = context.socket(zmq.DEALER)
        client.linger, client.rcvtimeo = 0, WAIT_MS
        client.connect(router_endpoint(router))
        client.send(b"header")
        router.send(receive(router).route, [b"x" * transport.TRACKED_BYTES_MIN])
        assert len(client.recv()) == transport.TRACKED_BYTES_MIN
        client.close()
    assert len(router._large) <= transport.LARGE_CLIENTS_MIN


# ---- the directory --------------------------------------------------------------------------------------


def test_the_sockets_belong_to_one_user(context: zmq.Context[Any], tmp_path: Path) -> None:
    """A private directory, sockets of mode 0600 from their first moment, gone after closing."""
    folder = SocketDir(f"ipc://{tmp_path}/run/edged.sock", system=False)
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    router = Router(context, "infer", folder.infer, frame_bytes_max=100, frames_max=1)
    events = bind_events(context, folder.events)
    for endpoint in (folder.infer, folder.events):
        path = Path(endpoint.removeprefix("ipc://"))
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        folder.claim(endpoint, "edged")
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    router.close()
    events.close(0)
    folder.close()
    assert [p.name for p in folder.path.iterdir()] == ["edged.lock"]


def test_a_service_without_its_group_keeps_its_sockets_to_itself(
    context: zmq.Context[Any], tmp_path: Path
) -> None:
    """A group that does not exist opens nothing."""
    folder = SocketDir(f"ipc://{tmp_path}/run/edged.sock", system=True)
    router = Router(context, "infer", folder.infer, frame_bytes_max=100, frames_max=1)
    folder.claim(folder.infer, "no-such-group-here")
    assert stat.S_IMODE((folder.path / "edged.sock").stat().st_mode) == 0o600
    router.close()
    folder.close()


def test_a_second_daemon_is_refused_and_takes_nothing(context: zmq.Context[Any], tmp_path: Path) -> None:
    """The lock comes before the bind; after the first has gone the second may."""
    endpoint = f"ipc://{tmp_path}/run/edged.sock"
    first = SocketDir(endpoint, system=False)
    router = Router(context, "infer", first.infer, frame_bytes_max=100, frames_max=1)
    with pytest.raises(TransportError, match="another edged serves"):
        SocketDir(endpoint, system=False)
    client = connect(context, router, zmq.DEALER)
    client.send(b"still here")
    assert plain(receive(router)) == [b"still here"]
    router.close()
    first.close()
    SocketDir(endpoint, system=False).close()


def test_a_directory_that_everybody_may_write_to_is_refused(tmp_path: Path) -> None:
    """Anyone could put a socket of their own in the daemon's place."""
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(TransportError, match="writable by everybody"):
        SocketDir(f"ipc://{folder}/edged.sock", system=False)


def test_a_directory_that_cannot_be_is_refused_in_words(context: zmq.Context[Any], tmp_path: Path) -> None:
    """A file in its place; a path longer than a socket's address."""
    (tmp_path / "file").write_text("")
    with pytest.raises(TransportError, match="cannot use"):
        SocketDir(f"ipc://{tmp_path}/file/edged.sock", system=False)
    long = f"ipc://{tmp_path}/{'x' * 120}"
    with pytest.raises(TransportError, match="cannot bind"):
        Router(context, "infer", long, frame_bytes_max=100, frames_max=1)


def test_a_subscriber_that_does_not_read_slows_nobody(context: zmq.Context[Any], tmp_path: Path) -> None:
    """It loses events; publishing goes on, and one who reads gets them."""
    endpoint = f"ipc://{tmp_path}/e.sock"
    publisher = bind_events(context, endpoint)
    _clients.append(publisher)
    sleeping, reading = context.socket(zmq.SUB), context.socket(zmq.SUB)
    for socket in (sleeping, reading):
        _clients.append(socket)
        socket.rcvhwm = 1 if socket is sleeping else 10_000
        socket.connect(endpoint)
        socket.subscribe(b"topic")
    until_s = time.monotonic() + WAIT_MS / 1000
    while not reading.poll(5) and time.monotonic() < until_s:
        publisher.send_multipart([b"topic", b"hello"], zmq.NOBLOCK)
    for _ in range(5000):
        publisher.send_multipart([b"topic", b"x" * 500], zmq.NOBLOCK)
    assert reading.poll(WAIT_MS)
