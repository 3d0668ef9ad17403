"""The ZeroMQ sockets: two ROUTERs that take requests, one PUB that tells events.

Owns the sockets' files (their lock, modes and removal), receiving within bounds, and sending without ever
waiting: a reply that a slow client has no room for is kept, within a bound, and tried again. Knows frames
and routes, not what they mean.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import grp
import os
import stat
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import zmq
import zmq.backend

from edged.errors import ResourceExhausted
from edged.messages import Envelope, Peer

__all__ = ["Incoming", "Router", "SocketDir", "TransportError", "bind_events"]

RECEIVE_HWM = 64
"""Messages that libzmq holds for us of each client; low, since it counts messages and not bytes."""

SEND_HWM = 128
"""Replies that libzmq holds for each client."""

BACKLOG_BYTES_MAX = 64 * 1024 * 1024
BACKLOG_REPLIES_MAX = 4096
"""Replies kept for one client that does not read, before further ones are refused."""

BACKLOG_TOTAL_BYTES_MAX = 512 * 1024 * 1024
"""The same for all clients together. A reply larger than `BACKLOG_BYTES_MAX` goes by itself: a client has at
most one at libzmq and one kept, and for these all that libzmq holds counts too. There it
is never less than two messages of the largest size and some small ones."""

TRACKED_BYTES_MIN = 256 * 1024
"""Frames from this size on are counted until the client has taken them; of others the number is bounded."""

LARGE_CLIENTS_MIN = 64
"""Clients with counted frames from which on it is looked who of them has taken his: seldom enough to cost
nothing, often enough that those who come once and go are not kept for ever."""

# The calls of each request, without pyzmq's conveniences: those cost as much again.
_get: Any = zmq.backend.Socket.get
_recv: Any = zmq.backend.Socket.recv
_send: Any = zmq.backend.Socket.send
_EVENTS, _POLLIN, _NOBLOCK, _SNDMORE = int(zmq.EVENTS), int(zmq.POLLIN), int(zmq.NOBLOCK), int(zmq.SNDMORE)

PEERS_MAX = 8192
"""Peers remembered by what the kernel says of them; then the memory starts anew."""

NOBODY = Peer(-1, -1, 0)
"""A peer of whom the kernel said nothing; it owns nothing."""


class TransportError(Exception):
    """The sockets cannot be had; the message says what to do."""


class SocketDir:
    """The directory of the sockets, held under a lock for as long as the daemon lives.

    The lock comes first, since a second ZeroMQ bind on a path takes it from its owner without a word.
    """

    def __init__(self, endpoint: str, *, system: bool) -> None:
        self.path = Path(endpoint.removeprefix("ipc://")).parent
        self.infer = f"ipc://{self.path / 'edged.sock'}"
        self.admin = f"ipc://{self.path / 'admin.sock'}"
        self.events = f"ipc://{self.path / 'events.sock'}"
        self.lease = str(self.path / "lease.sock")
        self._system = system
        try:
            self.path.mkdir(mode=0o755 if system else 0o700, parents=True, exist_ok=True)
            mode = self.path.stat().st_mode
            if mode & stat.S_IWOTH:
                raise TransportError(f"{self.path} is writable by everybody; choose a directory that is not")
            self._lock = os.open(self.path / "edged.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as e:
            raise TransportError(f"cannot use {self.path} for the sockets: {e.strerror}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise TransportError(
                f"another edged serves in {self.path}; stop it (`systemctl stop edged`), or give this one "
                "its own --endpoint and --state-dir"
            ) from None

    def claim(self, endpoint: str, group: str) -> None:
        """Gives a bound socket its owner group and mode: the group's for a service, else one user's."""
        path = endpoint.removeprefix("ipc://")
        mode = 0o600
        if self._system:
            # Without that group, or without the right to give the file to it, the socket stays the owner's.
            with contextlib.suppress(KeyError, PermissionError):
                os.chown(path, -1, grp.getgrnam(group).gr_gid)
                mode = 0o660
        os.chmod(path, mode)

    def close(self) -> None:
        """Removes the sockets and gives up the lock, whose file stays: removing it would let two lock two."""
        for endpoint in (self.infer, self.admin, self.events, self.lease):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(endpoint.removeprefix("ipc://"))
        os.close(self._lock)


class Incoming(msgspec.Struct, frozen=True, gc=False):
    """One message: where the reply goes, who sent it, and its frames without the envelope."""

    route: Envelope
    peer: Peer
    frames: list[Any]


@dataclass
class _Backlog:
    replies: deque[list[Any]] = field(default_factory=deque)
    nbytes: int = 0
    oversize_bytes: int = 0
    """Of these, in the one reply that is larger than the bound of all others."""


class Router:
    """A ROUTER on an ipc path. `name` is `infer` or `admin`."""

    def __init__(
        self, context: zmq.Context[Any], name: str, endpoint: str, *, frame_bytes_max: int, frames_max: int
    ) -> None:
        self.name = name
        self._frames_max = frames_max
        self._total_bytes_max = max(BACKLOG_TOTAL_BYTES_MAX, 2 * frame_bytes_max + BACKLOG_BYTES_MAX)
        self._socket = socket = context.socket(zmq.ROUTER)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        # libzmq hangs up on a frame above its limit, without a word: what is a little too large gets one.
        socket.setsockopt(zmq.MAXMSGSIZE, 2 * frame_bytes_max)
        socket.setsockopt(zmq.RCVHWM, RECEIVE_HWM)
        socket.setsockopt(zmq.SNDHWM, SEND_HWM)
        socket.setsockopt(zmq.LINGER, 200)
        umask = os.umask(0o177)
        try:
            socket.bind(endpoint)
        except zmq.ZMQError as e:
            socket.close(0)
            raise TransportError(f"cannot bind {endpoint}: {e.strerror}") from None
        finally:
            os.umask(umask)
        self.fd: int = socket.getsockopt(zmq.FD)
        self._peers: dict[str, Peer] = {}
        self._backlogs: dict[bytes, _Backlog] = {}
        self._backlog_bytes = 0
        self._oversize_bytes = 0
        self._large: dict[bytes, list[tuple[Any, int]]] = {}
        self._large_swept_at = LARGE_CLIENTS_MIN
        self.dropped_replies = 0
        """Replies that were refused for want of room, as the word of that then was."""

    def readable(self) -> bool:
        """Whether a message waits. To be asked before each wait on `fd`, which tells of changes only."""
        return bool(_get(self._socket, _EVENTS) & _POLLIN)

    def receive(self) -> Incoming | None:
        """The next message, or None."""
        socket = self._socket
        try:
            identity = _recv(socket, _NOBLOCK, False)
        except zmq.Again:
            return None
        frames: list[Any] = []
        more: bool = identity.more
        last: Any = identity
        while more:
            last = _recv(socket, _NOBLOCK, False)
            more = last.more
            # Frames beyond the bound are read, so that the socket stays in step, and dropped.
            if len(frames) < self._frames_max + 4:
                frames.append(last.buffer)
        name = identity.bytes
        route: Envelope = (name,)
        if frames and len(frames[0]) == 0:
            route = (name, b"")
            del frames[0]
        elif len(frames) > 1 and len(frames[0]) == 4 and len(frames[1]) == 0:
            # REQ with REQ_CORRELATE puts a number before its delimiter (zmq_setsockopt(3)).
            route = (name, bytes(frames[0]), b"")
            del frames[:2]
        return Incoming(route, self._peer(last), frames)

    def _peer(self, frame: Any) -> Peer:
        # By what the kernel says, not by the route, which a client may choose and another choose again.
        try:
            address = frame.get("Peer-Address")
        except zmq.ZMQError:
            return NOBODY
        peer = self._peers.get(address)
        if peer is None:
            if len(self._peers) >= PEERS_MAX:
                self._peers.clear()
            peer = self._peers[address] = _parse_peer(address)
        return peer

    def send(self, route: Envelope, frames: Sequence[bytes | memoryview]) -> None:
        """Sends a reply, now or when the client has room. A client that is gone loses it.

        Raises ResourceExhausted when the client has left so much unread that there is no room to keep it.
        """
        name = route[0]
        backlog = self._backlogs.get(name)
        size = sum([len(f) for f in frames])
        if backlog is None:
            if size < TRACKED_BYTES_MIN and name not in self._large:
                if self._try(route, frames):
                    return
            elif self._may_go(self._unread_bytes(name), size) and self._try(route, frames):
                return
        size += sum([len(part) for part in route])
        if not self._may_keep(backlog or _Backlog(), size):
            unread = self._unread_bytes(name) + (0 if backlog is None else backlog.nbytes)
            raise ResourceExhausted(
                f"no room for a reply of {size} bytes: {unread} wait for this client, {self._held_bytes()} "
                "for all; read before asking for more, or have large outputs land in leased memory",
                reason="REPLIES_UNREAD",
            )
        if backlog is None:
            backlog = self._backlogs[name] = _Backlog()
        backlog.nbytes += size
        self._backlog_bytes += size
        if size > BACKLOG_BYTES_MAX:
            backlog.oversize_bytes = size
            self._oversize_bytes += size
        # The frames may lie in memory that is used again as soon as this returns.
        backlog.replies.append([*route, *[bytes(f) for f in frames]])

    def _may_go(self, unread: int, size: int) -> bool:
        """Whether libzmq may hold so much more for a client; what is beyond the bound goes by itself."""
        if unread + size <= BACKLOG_BYTES_MAX:
            return True
        return not unread and self._held_bytes() + size <= self._total_bytes_max

    def _may_keep(self, backlog: _Backlog, size: int) -> bool:
        """Whether a reply may wait for a client, behind what waits already."""
        if len(backlog.replies) >= BACKLOG_REPLIES_MAX:
            return False
        if size > BACKLOG_BYTES_MAX:
            return not backlog.oversize_bytes and self._held_bytes() + size <= self._total_bytes_max
        others = self._backlog_bytes - self._oversize_bytes
        return (
            backlog.nbytes - backlog.oversize_bytes + size <= BACKLOG_BYTES_MAX
            and others + size <= BACKLOG_TOTAL_BYTES_MAX
        )

    def _held_bytes(self) -> int:
        """What waits for all clients, here and in libzmq."""
        return self._backlog_bytes + sum([self._unread_bytes(name) for name in list(self._large)])

    def _unread_bytes(self, name: bytes) -> int:
        """Of the large frames that libzmq still holds for this client: its own bound counts only messages."""
        left = [(tracker, size) for tracker, size in self._large.get(name, ()) if not tracker.done]
        if left:
            self._large[name] = left
        else:
            self._large.pop(name, None)
        return sum(size for _, size in left)

    def _sweep_large(self) -> None:
        """Forgets clients that have taken theirs, or are gone: nobody asks about those again."""
        for name in list(self._large):
            self._unread_bytes(name)
        self._large_swept_at = max(LARGE_CLIENTS_MIN, 2 * len(self._large))

    def _try(self, route: Envelope, frames: Sequence[bytes | memoryview]) -> bool:
        socket = self._socket
        try:
            for part in route:
                _send(socket, part, _NOBLOCK | _SNDMORE)
            last = len(frames) - 1
            for at, frame in enumerate(frames):
                flags = _NOBLOCK if at == last else _NOBLOCK | _SNDMORE
                if len(frame) < TRACKED_BYTES_MIN:
                    _send(socket, frame, flags)
                else:
                    tracker = _send(socket, bytes(frame), flags, False, True)
                    if len(self._large) >= self._large_swept_at:
                        self._sweep_large()
                    self._large.setdefault(route[0], []).append((tracker, len(frame)))
        except zmq.Again:
            return False
        except zmq.ZMQError as e:
            if e.errno != errno.EHOSTUNREACH:
                raise
        return True

    @property
    def has_backlog(self) -> bool:
        """Whether replies wait for slow clients; then `flush` wants to be called now and then."""
        return bool(self._backlogs)

    def flush(self) -> bool:
        """Tries again to send what slow clients had no room for; whether anything went."""
        moved = False
        for identity, backlog in list(self._backlogs.items()):
            while backlog.replies:
                parts = backlog.replies[0]
                size = sum([len(p) for p in parts])
                unread = self._unread_bytes(identity)
                if unread and unread + size > BACKLOG_BYTES_MAX:
                    break
                if not self._try(tuple(parts[:1]), parts[1:]):
                    break
                backlog.replies.popleft()
                backlog.nbytes -= size
                self._backlog_bytes -= size
                if size > BACKLOG_BYTES_MAX:
                    backlog.oversize_bytes = 0
                    self._oversize_bytes -= size
                moved = True
            if not backlog.replies:
                del self._backlogs[identity]
        return moved

    def close(self) -> None:
        """Ends the socket; replies under way have 200 ms."""
        self._socket.close()


def _parse_peer(address: str) -> Peer:
    """`localhost:uid:gid:pid`, which libzmq attaches by SO_PEERCRED to every message on ipc."""
    try:
        _, uid, gid, pid = address.rsplit(":", 3)
        return Peer(int(uid), int(gid), int(pid))
    except ValueError:
        return NOBODY


def bind_events(context: zmq.Context[Any], endpoint: str) -> zmq.Socket[Any]:
    """The PUB socket. A subscriber that does not read loses events; nobody else is slowed."""
    socket: zmq.Socket[Any] = context.socket(zmq.PUB)
    socket.setsockopt(zmq.SNDHWM, 1000)
    socket.setsockopt(zmq.MAXMSGSIZE, 4096)
    socket.setsockopt(zmq.LINGER, 200)
    umask = os.umask(0o177)
    try:
        socket.bind(endpoint)
    except zmq.ZMQError as e:
        socket.close(0)
        raise TransportError(f"cannot bind {endpoint}: {e.strerror}") from None
    finally:
        os.umask(umask)
    return socket
