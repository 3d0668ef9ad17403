"""The lease socket with real peers: what they send, what they do not read, and what they get."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import resource
import select
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from edged import lanes as lanes_module
from edged.lanes import Closed, Lanes, Opened, Packet
from edged.transport import TransportError
from edged.wire import LANE_PACKET_BYTES_MAX

WAIT_S = 10.0


@pytest.fixture
def lanes(tmp_path: Path) -> Iterator[Lanes]:
    """A listener on a path of its own."""
    with Lanes(str(tmp_path / "lease.sock"), refusal=b"too many", connections_max=3) as lanes:
        yield lanes


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    """Closes the peers."""
    with contextlib.ExitStack() as stack:
        yield stack


def connect(lanes: Lanes, stack: contextlib.ExitStack) -> socket.socket:
    """A peer."""
    made = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
    made.settimeout(WAIT_S)
    made.connect(lanes._listener.getsockname())
    return made


def turn(lanes: Lanes) -> list[Opened | Packet | Closed]:
    """What comes in next, by waiting on the descriptor as the daemon's loop does."""
    ready, _, _ = select.select([lanes.fd], [], [], WAIT_S)
    assert ready, "nothing came in"
    return lanes.turn()


def idle(lanes: Lanes) -> bool:
    """Whether the daemon's loop may sleep."""
    return not select.select([lanes.fd], [], [], 0)[0]


def opened(lanes: Lanes, stack: contextlib.ExitStack) -> tuple[socket.socket, int]:
    """A peer and the number of its connection."""
    peer = connect(lanes, stack)
    (event,) = turn(lanes)
    assert isinstance(event, Opened)
    return peer, event.connection


def test_a_peer_is_known_by_the_kernels_word(lanes: Lanes, stack: contextlib.ExitStack) -> None:
    """Its uid, gid and pid come with each packet."""
    peer, connection = opened(lanes, stack)
    peer.send(b"hello")
    (packet,) = turn(lanes)
    assert packet == Packet(connection, lanes_module.Peer(os.getuid(), os.getgid(), os.getpid()), b"hello")
    lanes.send(connection, b"answer")
    assert peer.recv(100) == b"answer"
    assert idle(lanes)


def test_what_is_written_into_memory_that_went_out(lanes: Lanes, stack: contextlib.ExitStack) -> None:
    """Its holder sees it; nothing is written beyond the end, whoever asks for it."""
    peer, connection = opened(lanes, stack)
    lanes.grant(connection, b"yours", 7, 1 << 20)
    _, (fd,), _, _ = socket.recv_fds(peer, 100, 1)
    stack.callback(os.close, fd)
    lanes.write(7, 5, b"")
    lanes.write(7, 4096, b"abc" * 100_000)
    with mmap.mmap(fd, 1 << 20) as memory:
        assert memory[4096 : 4096 + 300_000] == b"abc" * 100_000
        assert not any(memory[:4096])
    with pytest.raises(OSError, match="permitted"):
        lanes.write(7, (1 << 20) - 1, b"ab")
    assert os.fstat(fd).st_size == 1 << 20


def test_memory_goes_out_sealed_and_shared(lanes: Lanes, stack: contextlib.ExitStack) -> None:
    """Neither side can change its size, so that neither can make the other's reads fault."""
    peer, connection = opened(lanes, stack)
    lanes.grant(connection, b"yours", 7, 8192)
    raw, fds, _, _ = socket.recv_fds(peer, 100, 2)
    assert (raw, len(fds)) == (b"yours", 1)
    (fd,) = fds
    stack.callback(os.close, fd)
    assert os.fstat(fd).st_size == 8192
    wanted = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
    assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) == wanted
    for size in (0, 16384):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size)
    theirs, ours = mmap.mmap(fd, 8192), mmap.mmap(lanes.region_fd(7), 8192)
    theirs[100:105] = b"hello"
    assert ours[100:105] == b"hello"
    assert not os.get_inheritable(lanes.region_fd(7))


def test_a_peer_that_ends_is_told_once(lanes: Lanes, stack: contextlib.ExitStack) -> None:
    """After what it has sent, whether it closes, shuts its side, or sends an empty packet."""
    for end in (lambda p: p.close(), lambda p: p.shutdown(socket.SHUT_WR), lambda p: p.send(b"")):
        peer, connection = opened(lanes, stack)
        peer.send(b"last word")
        end(peer)
        (word,) = turn(lanes)
        assert isinstance(word, Packet)
        assert turn(lanes) == [Closed(connection)]
        assert idle(lanes)


def test_an_oversize_packet_is_cut_and_said_to_be(lanes: Lanes, stack: contextlib.ExitStack) -> None:
    """What follows is read as ever."""
    peer, _ = opened(lanes, stack)
    packets = []
    for size in (LANE_PACKET_BYTES_MAX, LANE_PACKET_BYTES_MAX + 1, 2 * LANE_PACKET_BYTES_MAX, 1):
        peer.send(b"x" * size)
        packets += [p for p in turn(lanes) if isinstance(p, Packet)]
    assert [len(p.raw) for p in packets] == [LANE_PACKET_BYTES_MAX, *[LANE_PACKET_BYTES_MAX + 1] * 2, 1]


def test_descriptors_from_a_peer_are_not_kept(lanes: Lanes, stack: contextlib.ExitStack) -> None:
    """A client's memory is never taken, and its descriptors fill no table."""
    peer, _ = opened(lanes, stack)
    before = len(os.listdir("/proc/self/fd"))
    socket.send_fds(peer, [b"take this"], [0, 1, 2])
    (packet,) = turn(lanes)
    assert isinstance(packet, Packet)
    assert packet.raw == b"take this"
    assert len(os.listdir("/proc/self/fd")) == before


def test_one_packet_of_a_flooding_peer_in_each_turn(lanes: Lanes, stack: contextlib.ExitStack) -> None:
    """A quiet one is not kept waiting."""
    flood, loud = opened(lanes, stack)
    quiet, calm = opened(lanes, stack)
    for _ in range(50):
        flood.send(b"again")
    quiet.send(b"please")
    found = turn(lanes)
    assert sorted(p.connection for p in found if isinstance(p, Packet)) == [loud, calm]


def test_who_does_not_read_is_not_read_from(lanes: Lanes, stack: contextlib.ExitStack) -> None:
    """One reply waits for room; with it, so does its descriptor. Nothing is lost when the peer reads."""
    peer, connection = opened(lanes, stack)
    sent = 0
    while not lanes._lanes[connection].waiting:
        peer.send(b"more")
        (packet,) = turn(lanes)
        assert isinstance(packet, Packet)
        sent += 1
        if sent % 2:
            lanes.grant(connection, b"%d" % sent, sent, 4096)
            lanes.free(sent)
        else:
            lanes.send(connection, b"%d" % sent)
        assert sent < 2000
    peer.send(b"not yet")
    assert idle(lanes)
    got = []
    while len(got) < sent:
        raw, fds, _, _ = socket.recv_fds(peer, 100, 1)
        got.append(int(raw))
        assert len(fds) == len(got) % 2
        for fd in fds:
            os.close(fd)
        if not idle(lanes) and lanes._lanes[connection].waiting:
            assert lanes.turn() == []
    assert got == list(range(1, sent + 1))
    (packet,) = turn(lanes)
    assert isinstance(packet, Packet)
    assert packet.raw == b"not yet"


def test_who_never_reads_and_ends_leaves_nothing(lanes: Lanes, stack: contextlib.ExitStack) -> None:
    """The descriptor of the reply that waited is closed."""
    before = len(os.listdir("/proc/self/fd"))
    with contextlib.ExitStack() as mine:
        peer, connection = opened(lanes, mine)
        region = 0
        while not lanes._lanes[connection].waiting:
            region += 1
            lanes.grant(connection, b"take it", region, 4096)
        peer.close()
        assert turn(lanes) == [Closed(connection)]
        for each in range(1, region + 1):
            lanes.free(each)
    assert len(os.listdir("/proc/self/fd")) == before


def stuffed(lanes: Lanes, connection: int, raw: bytes = b"r" * 1000) -> int:
    """Sends replies that nobody reads until one waits; how many."""
    sent = 0
    while not lanes._lanes[connection].waiting:
        lanes.send(connection, raw)
        sent += 1
        assert sent < 2000
    return sent


def test_replies_that_wait_come_in_order(lanes: Lanes, stack: contextlib.ExitStack) -> None:
    """Several may, of requests that were in flight together; each is kept as it was when it was sent."""
    peer, connection = opened(lanes, stack)
    scratch = bytearray(1000)
    sent = 0
    while len(lanes._lanes[connection].waiting) < 50:
        scratch[:4] = sent.to_bytes(4, "little")
        lanes.send(connection, memoryview(scratch))
        sent += 1
    scratch[:] = bytes(1000)
    got: list[int] = []
    while len(got) < sent:
        got.append(int.from_bytes(peer.recv(2000)[:4], "little"))
        if not idle(lanes):
            assert lanes.turn() == []
    assert got == list(range(sent))
    assert lanes._waiting_bytes == lanes._lanes[connection].waiting_bytes == 0
    peer.send(b"read again")
    (packet,) = turn(lanes)
    assert isinstance(packet, Packet)


@pytest.mark.parametrize("bound", ["WAITING_REPLIES_MAX", "WAITING_BYTES_MAX", "WAITING_TOTAL_BYTES_MAX"])
def test_beyond_the_bounds_it_is_hung_up_on(
    lanes: Lanes, stack: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch, bound: str
) -> None:
    """One that never reads, and no other; nothing of it is left."""
    monkeypatch.setattr(lanes_module, bound, 10 if bound == "WAITING_REPLIES_MAX" else 10_500)
    peer, connection = opened(lanes, stack)
    other, calm = opened(lanes, stack)
    stuffed(lanes, connection)
    for _ in range(9):
        lanes.send(connection, b"r" * 1000)
    assert not lanes.has_lost
    lanes.send(connection, b"r" * 1000)
    assert lanes.has_lost
    assert lanes.lost() == [Closed(connection)]
    assert lanes._waiting_bytes == 0
    lanes.send(calm, b"fine")
    assert other.recv(10) == b"fine"
    while peer.recv(2000):
        pass
    assert idle(lanes)


def test_few_descriptors_lie_unread(lanes: Lanes, stack: contextlib.ExitStack) -> None:
    """The kernel bounds how many may be under way in all, and the workers' count too."""
    peer, connection = opened(lanes, stack)
    region = 0
    while not lanes._lanes[connection].waiting:
        region += 1
        lanes.grant(connection, b"take it", region, 4096)
    assert region < 100
    assert idle(lanes)
    for _ in range(region):
        raw, fds, _, _ = socket.recv_fds(peer, 100, 1)
        assert (raw, len(fds)) == (b"take it", 1)
        os.close(fds[0])
        if not idle(lanes):
            lanes.turn()
    assert not lanes._lanes[connection].waiting


def test_one_peer_too_many_is_told_so(lanes: Lanes, stack: contextlib.ExitStack) -> None:
    """And there is room again when another one ends."""
    first, connection = opened(lanes, stack)
    opened(lanes, stack)
    opened(lanes, stack)
    extra = connect(lanes, stack)
    assert turn(lanes) == []
    assert extra.recv(100) == b"too many"
    assert extra.recv(100) == b""
    first.close()
    assert turn(lanes) == [Closed(connection)]
    opened(lanes, stack)


def test_no_user_takes_all_the_room(
    tmp_path: Path, stack: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One uid has a bound of its own."""
    monkeypatch.setattr(lanes_module, "CONNECTIONS_PER_UID_MAX", 1)
    with Lanes(str(tmp_path / "l.sock"), refusal=b"no") as lanes:
        opened(lanes, stack)
        extra = connect(lanes, stack)
        assert turn(lanes) == []
        assert extra.recv(100) == b"no"


def test_without_descriptors_the_listener_rests(lanes: Lanes, stack: contextlib.ExitStack) -> None:
    """The loop does not turn for a peer that cannot be taken; later it is."""
    connect(lanes, stack)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert not idle(lanes)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        assert lanes.turn() == []
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert idle(lanes)
    lanes.rested()
    (event,) = turn(lanes)
    assert isinstance(event, Opened)


def test_a_socket_that_a_dead_daemon_left_is_replaced(tmp_path: Path, stack: contextlib.ExitStack) -> None:
    """Its mode lets nobody in but the owner until it is said who may."""
    path = tmp_path / "lease.sock"
    dead = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
    dead.bind(str(path))
    with Lanes(str(path), refusal=b"") as lanes:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        opened(lanes, stack)


def test_a_path_that_cannot_be_had(tmp_path: Path) -> None:
    """The message names it."""
    with pytest.raises(TransportError, match="nowhere"):
        Lanes(str(tmp_path / "nowhere" / "lease.sock"), refusal=b"")


def test_a_reply_to_who_is_gone_is_lost(lanes: Lanes, stack: contextlib.ExitStack) -> None:
    """Also when nobody has told yet that it is."""
    peer, connection = opened(lanes, stack)
    peer.close()
    lanes.send(connection, b"too late")
    assert lanes.lost() == [Closed(connection)]
    lanes.send(connection, b"later still")
    lanes.grant(connection, b"and this", 1, 4096)
    assert lanes.lost() == []
