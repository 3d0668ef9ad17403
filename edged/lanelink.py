"""The fast lane from the client's side: requests as packets on `lease.sock`, without ZeroMQ.

A unix socket is level-triggered, wakes nobody but who waits, and says at once when the daemon is gone. What
does not fit into a packet, and what the daemon will not take on this socket, goes over ZeroMQ: `client`
decides that, by `NotByLane`.

No spinning here: while two processes of the daemon's look for their next packet without sleeping, a third
that does so takes a core from them where there are two (measured: 168 µs with it, 158 without).
"""

from __future__ import annotations

import contextlib
import enum
import errno
import os
import select
import socket as unix
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from edged.clientwire import Request
from edged.exchange import Exchange, LinkState, Pending

__all__ = ["LANE_RETRY_S", "LANE_SOCKET", "LaneLink", "NotByLane", "Scope", "raise_if_refused"]

LANE_SOCKET = "lease.sock"

LANE_RETRY_S = 1.0
"""For how long requests go over ZeroMQ after a daemon has not taken one on the lane."""

_PACKET_BYTES_MAX = 64 * 1024
"""The protocol's bound, either way; it is the header's too."""

_FLAGS = unix.MSG_DONTWAIT | unix.MSG_NOSIGNAL


class Scope(enum.Enum):
    """For what it holds that something does not go by lane."""

    REQUEST = "request"
    MODEL = "model"
    DAEMON = "daemon"


_REFUSALS = {
    "WRONG_SOCKET": Scope.DAEMON,
    "UNKNOWN_METHOD": Scope.DAEMON,
    "TOO_MANY_CLIENTS": Scope.DAEMON,
    "REPLY_TOO_LARGE": Scope.MODEL,
}


class NotByLane(Exception):
    """A request must go over ZeroMQ, and `scope` says what else."""

    def __init__(self, scope: Scope) -> None:
        super().__init__(scope.value)
        self.scope = scope


def raise_if_refused(header: Mapping[str, Any]) -> None:
    """Raises NotByLane if a reply says no more than that the request is to be sent over another socket."""
    error = header.get("error")
    scope = _REFUSALS.get(str(error.get("reason"))) if isinstance(error, Mapping) else None
    if scope is not None:
        raise NotByLane(scope)


class LaneLink(Exchange):
    """A connection to the `lease.sock` beside `path`, which it keeps as its name. Raises NotByLane."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        try:
            self._socket = unix.socket(unix.AF_UNIX, unix.SOCK_SEQPACKET | unix.SOCK_NONBLOCK)
        except OSError:
            raise NotByLane(Scope.DAEMON) from None
        weakref.finalize(self, self._socket.close)
        if self._socket.connect_ex(os.path.join(os.path.dirname(path), LANE_SOCKET)):
            self._socket.close()
            raise NotByLane(Scope.DAEMON)
        self.answered = False
        """Whether a request was answered: a daemon that hangs up before that does not take us."""
        self.state = LinkState.OPEN
        self._poll.register(self._socket, select.POLLIN)
        _alive.add(self)

    def ask(self, request: Request, pending: Pending, until: float) -> bool:
        """`post` and `wait` in one, where nothing else is in flight; else, or where it cannot be sent, False.

        The usual case has its own code because each model's run leaves the caches cold: a step that is not
        taken here saves about a microsecond. Other threads may join meanwhile: this one leads, as in `wait`.
        """
        try:
            with self._lock:
                remaining_s = until - time.monotonic()
                timeout_us = int(remaining_s * 1e6)
                if self.state is not LinkState.OPEN or self._pendings or self._leader or timeout_us <= 0:
                    return False
                self._last_id = pending.id = self._last_id + 1
                packed = request.packed(pending.id, timeout_us, self._packer)
                if len(packed) > _PACKET_BYTES_MAX or not self._send(packed, request.frames):
                    return False
                pending.release = request.release
                self._pendings[pending.id] = self._leader = pending
                self._leader_sleeps = True
            self._sleep(remaining_s)
            with self._lock:
                self._leader_sleeps = False
                if pending.header is None:
                    self._drain()
                if pending.header is not None:
                    self._pass_lead(pending)
                    return True
            self.wait(pending, until)
        except BaseException:  # As by an interrupt: nobody is to wait for one who has gone.
            self._leave(pending)
            self.forget(pending)
            raise
        return True

    def _send(self, header: bytes, frames: Sequence[Any]) -> bool:
        if frames:
            raise NotByLane(Scope.REQUEST)
        try:
            self._socket.send(header, _FLAGS)
        except OSError as e:
            if e.errno != errno.EAGAIN:
                self.state = LinkState.LOST
            return False
        return True

    def _drain(self) -> None:
        # With nothing in flight nothing is to come but the end, which the next `_send` finds out, and late
        # replies, which the next request's wait takes before they can fill the socket.
        while self._pendings and self.state is not LinkState.LOST:
            try:
                packet = self._socket.recv(_PACKET_BYTES_MAX, unix.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError:
                packet = b""
            if not packet:
                self.state = LinkState.LOST
                break
            self.answered |= self._settle(packet, ())
        if self.state is LinkState.LOST:
            self._lose_pendings()

    def _close_sockets(self) -> None:
        self.state = LinkState.LOST
        # A thread may still wait for it in poll(2), which a close alone would not end.
        with contextlib.suppress(OSError):
            self._socket.shutdown(unix.SHUT_RDWR)
        self._socket.close()

    def _abandon(self) -> None:
        """In a forked child: the connection is the parent's, and so are the requests in flight."""
        self.state = LinkState.LOST
        self._lock = threading.Lock()
        self._pendings = {}
        self._socket.close()


_alive: weakref.WeakSet[LaneLink] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for link in list(_alive):
        link._abandon()


os.register_at_fork(after_in_child=_after_fork_in_child)
