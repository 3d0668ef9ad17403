"""One connection of a client to one of the daemon's sockets, from its handshake until it is lost.

A link never reconnects. When the daemon goes, libzmq's monitor says so, every request in flight fails
as lost, and the client makes a new link: so a request belongs to one life of the daemon, a reply can
never come from another, and "sent, but lost" is told apart from "never sent".

How threads share it is `exchange`'s. libzmq's descriptors are edge-triggered: so whoever used the socket
asks for its events before letting go of the lock, and takes what has come.

The same object serves an event loop, which watches `fds` itself and calls `drain` when one is readable.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket as unix
import struct
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import msgpack
import zmq

from edged.clientwire import socket_paths
from edged.errors import PermissionDenied, Unavailable
from edged.exchange import Exchange, LinkState

__all__ = [
    "FULL_POLL_S",
    "RETURN_POLL_S",
    "RETURN_S_MAX",
    "EventLink",
    "Link",
    "find_socket",
]

RETURN_S_MAX = 10.0
"""How long a request whose connection was lost waits for the daemon to come back: a restart takes 3 s."""

RETURN_POLL_S = 0.05
"""How often it looks; a look is one connect(2)."""

FULL_POLL_S = 0.005
"""How often a request is tried again while the daemon does not read and the socket is full."""

_NOCOPY_BYTES_MIN = 1024 * 1024
"""Below this a copy is cheaper than pyzmq's collector thread, which each uncopied frame wakes."""

_HANDSHAKE_S_MAX = 5.0
"""A daemon that accepts but does not shake hands for this long is stuck."""

_EVENT_QUEUE_MAX = 1000
"""Events kept for a subscriber that does not read; libzmq drops what comes after."""

_MONITORED = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_CONNECT_RETRIED
    | zmq.EVENT_CLOSED
    | zmq.EVENT_DISCONNECTED
)
# As plain ints: operations on pyzmq's enums cost a microsecond each.
_EVENTS, _FD, _POLLIN = int(zmq.EVENTS), int(zmq.FD), int(zmq.POLLIN)
_NOBLOCK, _SNDMORE = int(zmq.NOBLOCK), int(zmq.SNDMORE)


class _Monitored:
    """A socket with its monitor: what DEALER and SUB links share."""

    def __init__(self, path: str, kind: int) -> None:
        self.path = path
        self.state = LinkState.OPENING
        self._orphaned = False
        self._lock = threading.Lock()
        self._socket = context().socket(kind)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RECONNECT_IVL, -1)
        self._monitor = self._socket.get_monitor_socket(_MONITORED)
        self._get: Callable[[int], Any] = self._socket.get
        self._fd: int = int(self._get(_FD))
        self._monitor_get: Callable[[int], Any] = self._monitor.get
        self._monitor_fd: int = int(self._monitor_get(_FD))
        _alive.add(self)

    @property
    def fds(self) -> tuple[int, int]:
        """The descriptors that become readable when `drain` has something to do."""
        return self._fd, self._monitor_fd

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.path} {self.state.value}>"

    def _connect(self) -> None:
        self._socket.connect(f"ipc://{self.path}")

    def _read_monitor(self) -> LinkState:
        """Follows the connection's state; reads until the monitor's descriptor is quiet."""
        while self.state is not LinkState.LOST and self._monitor_get(_EVENTS) & _POLLIN:
            (event,) = struct.unpack_from("=H", self._monitor.recv_multipart()[0])
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self.state = LinkState.OPEN
            else:
                self.state = LinkState.LOST
        return self.state

    def _abandon(self) -> None:
        """In a forked child: the sockets are the parent's, and a lock may have been held at the fork."""
        _orphans.extend((self._socket, self._monitor))
        self._lock = threading.Lock()
        self._orphaned = True

    def _close_sockets(self) -> None:
        self.state = LinkState.LOST
        if not self._orphaned and not self._socket.closed:
            self._socket.disable_monitor()
            self._monitor.close(0)
            self._socket.close(0)


class Link(_Monitored, Exchange):
    """A DEALER connected to the daemon's socket at `path`. libzmq's descriptors are edge-triggered."""

    edge_triggered = True

    def __init__(self, path: str) -> None:
        Exchange.__init__(self, path)
        _Monitored.__init__(self, path, zmq.DEALER)
        self._socket.setsockopt(zmq.IMMEDIATE, 1)
        self._monitor_due = True
        for fd in self.fds:
            self._poll.register(fd, select.POLLIN)
        self._connect()

    def wait_open(self, until: float) -> None:
        """Blocks until the handshake is done. Raises Unavailable when it fails or is not done in time."""
        until = self.handshake_until(until)
        poll = select.poll()
        poll.register(self._monitor_fd, select.POLLIN)
        while True:
            self.check_open(expired=time.monotonic() >= until)
            if self.state is LinkState.OPEN:
                return
            poll.poll(max(0.0, until - time.monotonic()) * 1000)

    def handshake_until(self, until: float) -> float:
        """When the handshake must be done, for a call that ends at `until`."""
        return min(until, time.monotonic() + _HANDSHAKE_S_MAX)

    def check_open(self, *, expired: bool) -> None:
        """Follows the handshake. Raises Unavailable when it has failed, or is not done although expired."""
        with self._lock:
            if self.state is LinkState.OPENING:
                self._read_monitor()
            state = self.state
        if state is LinkState.LOST or (state is LinkState.OPENING and expired):
            raise Unavailable(
                f"{self.path} takes connections, but no edged daemon answers on it", reason="CONNECTION_LOST"
            )

    # What follows runs under the lock, `_readable` excepted.

    def _doubt(self) -> None:
        self._monitor_due = True

    def _readable(self, fd: int) -> None:
        if fd == self._monitor_fd:
            self._monitor_due = True

    def _send(self, header: bytes, frames: Sequence[Any]) -> bool:
        send = self._socket.send
        try:
            if not frames:
                send(header, _NOBLOCK)
                return True
            send(header, _NOBLOCK | _SNDMORE)
            last = len(frames) - 1
            for at, frame in enumerate(frames):
                flags = _NOBLOCK if at == last else _NOBLOCK | _SNDMORE
                send(frame, flags, copy=len(frame) < _NOCOPY_BYTES_MIN)
        except zmq.Again:
            return False
        return True

    def _drain(self) -> None:
        if self.state is LinkState.LOST:
            return
        get = self._get
        while get(_EVENTS) & _POLLIN:
            self._receive()
        if self._monitor_due:
            self._monitor_due = False
            if self._read_monitor() is LinkState.LOST:
                while get(_EVENTS) & _POLLIN:  # Replies that came before the connection went.
                    self._receive()
                self._lose_pendings()

    def _receive(self) -> None:
        frame = self._socket.recv(_NOBLOCK, copy=False)
        frames: list[Any] = self._socket.recv_multipart(_NOBLOCK, copy=False) if frame.more else []
        self._settle(frame.buffer, frames)


class EventLink(_Monitored):
    """A SUB connected to the daemon's events. One thread, or one event loop, at a time."""

    def __init__(self, path: str, topics: Sequence[str]) -> None:
        super().__init__(path, zmq.SUB)
        self._socket.setsockopt(zmq.RCVHWM, _EVENT_QUEUE_MAX)
        for topic in topics or ("",):
            self._socket.setsockopt(zmq.SUBSCRIBE, topic.encode())
        self._poll = select.poll()
        for fd in self.fds:
            self._poll.register(fd, select.POLLIN)
        self._connect()

    def take(self) -> tuple[str, dict[str, Any]] | None:
        """The next event if one is there. Raises Unavailable when the daemon is gone and all are read."""
        while self.state is not LinkState.LOST:
            while self._get(_EVENTS) & _POLLIN:
                frames = self._socket.recv_multipart(_NOBLOCK)
                with contextlib.suppress(ValueError):
                    body = msgpack.unpackb(frames[-1], strict_map_key=False)
                    if len(frames) == 2 and isinstance(body, dict):
                        return frames[0].decode(), body
            self._read_monitor()
            if not self._get(_EVENTS) & _POLLIN:
                break
        if self.state is LinkState.LOST:
            raise Unavailable(f"the daemon at {self.path} is gone", reason="CONNECTION_LOST")
        return None

    def wait(self, timeout_s: float | None) -> None:
        """Blocks until `take` may have something, or the time is over."""
        self._poll.poll(None if timeout_s is None else max(0.0, timeout_s) * 1000)

    def close(self) -> None:
        """Ends the subscription."""
        self._close_sockets()


def find_socket(endpoint: str | None, name: str) -> str:
    """The path of the first of the places in question where somebody listens.

    Asked of the kernel by connecting, which is immediate and truthful. Raises Unavailable when nobody
    listens anywhere, PermissionDenied when somebody does but may not be asked.
    """
    paths = socket_paths(endpoint, name, os.environ)
    denied: str | None = None
    for path in paths:
        with unix.socket(unix.AF_UNIX, unix.SOCK_STREAM | unix.SOCK_NONBLOCK) as probe:
            error = probe.connect_ex(path)
        if error in (0, errno.EAGAIN):  # EAGAIN: it listens, and its backlog is full.
            return path
        if error in (errno.EACCES, errno.EPERM):
            denied = denied or path
    if denied is not None:
        group = "edged-admin" if name == "admin.sock" else "edged"
        raise PermissionDenied(
            f"{denied} may not be opened by this user; join its group "
            f"(usually: sudo usermod -aG {group} $USER), then log in again",
            reason="SOCKET_PERMISSION",
        )
    raise Unavailable(
        f"no edged daemon answers at {' or '.join(paths)}; start one with 'systemctl start edged' or "
        "'edged --models DIR', or name its socket in EDGED_ENDPOINT",
        reason="DAEMON_NOT_RUNNING",
    )


_alive: weakref.WeakSet[_Monitored] = weakref.WeakSet()
_context: zmq.Context[zmq.Socket[bytes]] | None = None
_context_lock = threading.Lock()
_orphans: list[object] = []
"""What belonged to the parent of a fork: kept, so that no finaliser touches the parent's sockets."""


def context() -> zmq.Context[zmq.Socket[bytes]]:
    """This process's ZeroMQ context for clients: one I/O thread, made at the first connection."""
    global _context
    with _context_lock:
        if _context is None:
            _context = zmq.Context()
        return _context


def _after_fork_in_child() -> None:
    # libzmq's sockets and threads do not survive a fork: the child's clients find their links lost, and
    # make new ones in a new context. Requests that were in flight stay the parent's.
    global _context, _context_lock
    for link in list(_alive):
        link.state = LinkState.LOST
        link._abandon()
    _orphans.append(_context)
    _context = None
    _context_lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork_in_child)
