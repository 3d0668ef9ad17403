"""The lease socket: a unix SEQPACKET listener, its connections, and the memory that goes out over them.

Owns the listener, one socket for each peer, and the memfd of each region. It reads one packet of each peer
and turn, within bounds, and never waits: replies that a peer does not take are kept, within bounds, and it is
not read from until it has them; beyond the bounds it is hung up on. So whoever floods or sleeps slows nobody
but himself. An epoll of its own holds all of it, so that the daemon's loop watches one descriptor. Knows
packets and peers, not what they mean.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import socket
import struct
import termios
from collections import Counter, deque
from dataclasses import dataclass, field

import msgspec

from edged.messages import Peer
from edged.transport import TransportError
from edged.wire import LANE_PACKET_BYTES_MAX

__all__ = ["CONNECTIONS_MAX", "Closed", "Lanes", "Opened", "Packet"]

CONNECTIONS_MAX = 256
"""Peers at once: each takes a descriptor. A process that asks by lane and leases memory has two."""

CONNECTIONS_PER_UID_MAX = 64
"""Of one user, so that one alone cannot take all of them."""

ACCEPTS_PER_TURN = 8
"""New peers before those that are there have their turn."""

PEERS_PER_TURN = 16
"""Packets read before the daemon's other sockets have their turn."""

SEND_BUFFER_BYTES = LANE_PACKET_BYTES_MAX
"""Of the kernel's memory, which doubles it, for replies that a peer does not read: the largest fits."""

DESCRIPTORS_UNREAD_BYTES_MAX = SEND_BUFFER_BYTES // 2
"""What may lie unread before a reply with a descriptor: there is a bound on how many of those may be under
way (ETOOMANYREFS), which the workers' share. A quarter of the room, below which epoll calls it writable."""

WAITING_REPLIES_MAX = 1024
WAITING_BYTES_MAX = 4 * 1024 * 1024
"""Replies kept for one peer that does not read, before it is hung up on. Only what was in flight can come to
lie here; these are 64 of the largest, and four times what a client may have in flight by default."""

WAITING_TOTAL_BYTES_MAX = 64 * 1024 * 1024
"""The same for all peers together."""

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_INT = struct.Struct("i")
_CREDENTIALS = struct.Struct("iII")  # struct ucred: pid, uid, gid


class Opened(msgspec.Struct, frozen=True):
    """A peer connected."""

    connection: int
    peer: Peer


class Packet(msgspec.Struct, frozen=True):
    """A peer's packet; one that is longer than may be is cut off one byte later."""

    connection: int
    peer: Peer
    raw: bytes


class Closed(msgspec.Struct, frozen=True):
    """A peer is gone."""

    connection: int


@dataclass
class _Lane:
    connection: int
    peer: Peer
    socket: socket.socket
    waiting: deque[tuple[bytes | memoryview, int | None]] = field(default_factory=deque)
    """Replies, and descriptors of ours with them, that the peer has no room for yet."""
    waiting_bytes: int = 0


class Lanes:
    """The listener on `path` and everything behind it; a context manager.

    `refusal` is sent to a peer that is one too many.
    """

    def __init__(self, path: str, *, refusal: bytes, connections_max: int = CONNECTIONS_MAX) -> None:
        self._refusal = refusal
        self._connections_max = connections_max
        self._lanes: dict[int, _Lane] = {}
        self._by_fd: dict[int, _Lane] = {}
        self._per_uid: Counter[int] = Counter()
        self._regions: dict[int, int] = {}
        self._serial = 0
        self._lost: list[Closed] = []
        self._waiting_bytes = 0
        self._resting = False
        self._epoll = select.epoll()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        umask = os.umask(0o177)
        try:
            # Only the holder of the directory's lock comes here: what lies there is a dead daemon's.
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            self._listener.bind(path)
            self._listener.listen(64)
        except OSError as e:
            self.close()
            raise TransportError(f"cannot bind {path}: {e.strerror}") from None
        finally:
            os.umask(umask)
        self._epoll.register(self._listener, select.EPOLLIN)

    def __enter__(self) -> Lanes:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Lanes connections={len(self._lanes)} regions={len(self._regions)}>"

    @property
    def fd(self) -> int:
        """Readable while there is something to do for `turn`."""
        return self._epoll.fileno()

    def turn(self) -> list[Opened | Packet | Closed]:
        """What came in: at most one packet of each peer."""
        found: list[Opened | Packet | Closed] = []
        for fd, events in self._epoll.poll(0, PEERS_PER_TURN):
            lane = self._by_fd.get(fd)
            if lane is None:
                if fd == self._listener.fileno():
                    self._accept(found)
            elif events & (select.EPOLLERR | select.EPOLLHUP) and not events & select.EPOLLIN:
                self._hang_up(lane)
            elif lane.waiting:
                self._send_waiting(lane)
            else:
                self._receive(lane, found)
        return found + self.lost()

    @property
    def has_lost(self) -> bool:
        """Whether `lost` has something to tell."""
        return bool(self._lost)

    def lost(self) -> list[Closed]:
        """The peers that were hung up on since this was asked."""
        lost, self._lost = self._lost, []
        return lost

    def send(self, connection: int, raw: bytes | memoryview) -> None:
        """Sends a reply, now or when the peer has room. A peer that is gone loses it."""
        lane = self._lanes.get(connection)
        if lane is not None:
            self._send(lane, raw, None)

    def grant(self, connection: int, raw: bytes, region: int, nbytes: int) -> None:
        """Makes a region's memory and sends it with its reply. Raises OSError when it cannot be had."""
        fd = os.memfd_create(f"edged-lease-{region}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, nbytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            self._regions[region] = fd
        except BaseException:
            os.close(fd)
            raise
        lane = self._lanes.get(connection)
        if lane is not None:
            self._send(lane, raw, fd)

    def region_fd(self, region: int) -> int:
        """A region's descriptor, to be passed to a worker once."""
        return self._regions[region]

    def write(self, region: int, offset: int, raw: bytes) -> None:
        """Writes into a region, whose size nobody can change. Raises OSError for want of memory."""
        fd, rest = self._regions[region], memoryview(raw)
        while rest:
            written = os.pwrite(fd, rest, offset)
            offset, rest = offset + written, rest[written:]

    def free(self, region: int) -> None:
        """Lets go of a region's memory, which lives on as long as its client maps it."""
        fd = self._regions.pop(region, None)
        if fd is not None:
            os.close(fd)

    def rested(self) -> None:
        """Looks for new peers again, after there were no descriptors left for one."""
        if self._resting:
            self._resting = False
            self._epoll.register(self._listener, select.EPOLLIN)

    def close(self) -> None:
        """Hangs up on everybody and lets go of all memory; idempotent."""
        for lane in list(self._lanes.values()):
            self._hang_up(lane)
        while self._regions:
            os.close(self._regions.popitem()[1])
        self._listener.close()
        self._epoll.close()

    def _accept(self, found: list[Opened | Packet | Closed]) -> None:
        for _ in range(ACCEPTS_PER_TURN):
            try:
                peer_socket, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as e:
                if e.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    # The peer would stay readable, and the loop would turn for nothing.
                    self._epoll.unregister(self._listener)
                    self._resting = True
                return
            peer_socket.setblocking(False)
            pid, uid, gid = _CREDENTIALS.unpack(
                peer_socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            )
            if len(self._lanes) >= self._connections_max or self._per_uid[uid] >= CONNECTIONS_PER_UID_MAX:
                with peer_socket, contextlib.suppress(OSError):
                    peer_socket.send(self._refusal)
                continue
            peer_socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
            self._serial += 1
            lane = _Lane(self._serial, Peer(uid, gid, pid), peer_socket)
            self._lanes[lane.connection] = self._by_fd[peer_socket.fileno()] = lane
            self._per_uid[uid] += 1
            self._epoll.register(peer_socket, select.EPOLLIN)
            found.append(Opened(lane.connection, lane.peer))

    def _receive(self, lane: _Lane, found: list[Opened | Packet | Closed]) -> None:
        try:
            # Of descriptors that a peer passes, recv(2) takes none: the kernel closes them.
            raw = lane.socket.recv(LANE_PACKET_BYTES_MAX + 1)
        except BlockingIOError:
            return
        except OSError:
            raw = b""
        if not raw:  # an empty packet cannot be told from the end
            self._hang_up(lane)
            return
        found.append(Packet(lane.connection, lane.peer, raw))

    def _send(self, lane: _Lane, raw: bytes | memoryview, fd: int | None) -> None:
        if not lane.waiting:
            try:
                self._transmit(lane, raw, fd)
            except OSError as e:
                if e.errno != errno.EAGAIN:
                    self._hang_up(lane)
                    return
                self._epoll.modify(lane.socket, select.EPOLLOUT)
            else:
                return
        nbytes = len(raw)
        if (
            len(lane.waiting) >= WAITING_REPLIES_MAX
            or lane.waiting_bytes + nbytes > WAITING_BYTES_MAX
            or self._waiting_bytes + nbytes > WAITING_TOTAL_BYTES_MAX
        ):
            self._hang_up(lane)
            return
        # The reply may lie in memory that is used again as soon as this returns.
        lane.waiting.append((bytes(raw), None if fd is None else os.dup(fd)))
        lane.waiting_bytes += nbytes
        self._waiting_bytes += nbytes

    def _send_waiting(self, lane: _Lane) -> None:
        while lane.waiting:
            raw, fd = lane.waiting[0]
            try:
                self._transmit(lane, raw, fd)
            except BlockingIOError:
                return
            except OSError:
                self._hang_up(lane)
                return
            self._forget_waiting(lane)
        self._epoll.modify(lane.socket, select.EPOLLIN)

    def _forget_waiting(self, lane: _Lane) -> None:
        raw, fd = lane.waiting.popleft()
        lane.waiting_bytes -= len(raw)
        self._waiting_bytes -= len(raw)
        if fd is not None:
            os.close(fd)

    def _transmit(self, lane: _Lane, raw: bytes | memoryview, fd: int | None) -> None:
        if fd is None:
            lane.socket.send(raw)
        elif _unread_bytes(lane.socket) > DESCRIPTORS_UNREAD_BYTES_MAX:
            raise BlockingIOError(errno.EAGAIN, "too much is unread for a descriptor")
        else:
            socket.send_fds(lane.socket, [raw], [fd])

    def _hang_up(self, lane: _Lane) -> None:
        """The peer is gone, or shall be; said once."""
        if self._lanes.pop(lane.connection, None) is None:
            return
        del self._by_fd[lane.socket.fileno()]
        self._epoll.unregister(lane.socket)
        self._per_uid[lane.peer.uid] -= 1
        if not self._per_uid[lane.peer.uid]:
            del self._per_uid[lane.peer.uid]
        while lane.waiting:
            self._forget_waiting(lane)
        lane.socket.close()
        self._lost.append(Closed(lane.connection))


def _unread_bytes(peer: socket.socket) -> int:
    """What the peer has not read of what was sent to it, in the kernel's memory (SIOCOUTQ)."""
    return int(_INT.unpack(fcntl.ioctl(peer, termios.TIOCOUTQ, bytes(_INT.size)))[0])
