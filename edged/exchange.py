"""One connection's requests in flight, shared by threads: what every kind of link has in common.

Threads share a link without a thread of its own, whose two extra wake-ups would cost more than all of
the client's Python. Every use of the socket happens under one lock, and never blocks. Of the threads
that wait for replies one leads: it sleeps in poll(2) on the link's descriptors, outside the lock, so that
others can send meanwhile; it hands the others their replies, and when it has its own it passes the lead on.

How bytes travel is the links' own: `link` has ZeroMQ, `lanelink` the fast lane.
"""

from __future__ import annotations

import contextlib
import enum
import os
import select
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgpack

from edged.clientwire import HEADER_BYTES_MAX, Request
from edged.errors import Code, DeadlineExceeded, InvalidArgument, Unavailable

__all__ = ["Exchange", "LinkState", "Pending", "timeout_us"]

_ANSWERED_EARLY = (Code.DEADLINE_EXCEEDED.value, Code.CANCELLED.value)
"""Errors that a daemon may answer with while the model still runs."""


class LinkState(enum.Enum):
    """A link's life; it never goes back."""

    OPENING = "opening"
    OPEN = "open"
    LOST = "lost"


class Pending:
    """One request in flight: settled by its reply (`header`, `frames`) or by the link's loss (`lost`).

    `wake` is called once, under the link's lock, when that happens; a waiting thread has a `baton` instead.
    `release` is the request's, and called under the lock as soon as the link knows; it must not block.
    """

    __slots__ = ("baton", "frames", "header", "id", "lost", "release", "wake")

    def __init__(self, wake: Callable[[], None] | None = None) -> None:
        self.id = 0
        self.header: dict[str, Any] | None = None
        self.frames: Sequence[Any] = ()
        self.lost = False
        self.wake = wake
        self.baton: threading.Lock | None = None
        self.release: Callable[[bool], None] | None = None

    @property
    def settled(self) -> bool:
        """Whether there is something to read."""
        return self.header is not None or self.lost

    def let_go(self) -> None:
        """Ends the request's hold on its memory, which the daemon may read until it has answered.

        And beyond, where it answers without waiting for the run: at a deadline, and when cancelled.
        """
        release, self.release = self.release, None
        if release is not None:
            error = (self.header or {}).get("error")
            code = error.get("code") if isinstance(error, Mapping) else None
            release(self.header is not None and code not in _ANSWERED_EARLY)

    def reply(self, path: str) -> dict[str, Any]:
        """The reply's header. Raises Unavailable when the link was lost, DeadlineExceeded when none came."""
        if self.header is not None:
            return self.header
        if self.lost:
            raise Unavailable(
                f"the connection to {path} was lost while the request was in flight; it may have run",
                reason="CONNECTION_LOST",
            )
        raise DeadlineExceeded(f"{path} did not answer in time", reason="CLIENT_DEADLINE")


class Exchange:
    """A connection to `path` with many requests in flight; see the module's text for how threads share it."""

    edge_triggered = False
    """Whether a descriptor tells of changes only: then whoever used the socket must look for himself."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.state = LinkState.OPENING
        self._lock = threading.Lock()
        self._pendings: dict[int, Pending] = {}
        self._last_id = 0
        self._packer = msgpack.Packer()
        self._leader: Pending | None = None
        self._leader_sleeps = False
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        weakref.finalize(self, os.close, self._wake_fd)  # Not in close(): a leader may still be polling it.
        self._poll = select.poll()
        self._poll.register(self._wake_fd, select.POLLIN)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.path} {self.state.value}>"

    def post(self, request: Request, pending: Pending, timeout_us: int | None = None) -> bool:
        """Sends without blocking; whether it was sent. If not, the link is lost, or full for now.

        Raises InvalidArgument for a header that is too large.
        """
        with self._lock:
            if self.state is not LinkState.OPEN:
                return False
            self._last_id = pending.id = self._last_id + 1
            packed = request.packed(pending.id, timeout_us, self._packer)
            _check_length(packed)
            if not self._send(packed, request.frames):
                self._doubt()
                self._drain()
                return False
            self._pendings[pending.id] = pending
            pending.release = request.release
            if self.edge_triggered and (self._leader_sleeps or pending.wake is not None):
                self._drain()
            return True

    def cancel(self, pending: Pending) -> None:
        """Asks the daemon to withdraw a request; what becomes of it is the request's own reply."""
        with self._lock:
            if self.state is LinkState.OPEN and pending.id in self._pendings:
                self._last_id += 1
                header = {"method": "cancel", "id": self._last_id, "cancel_id": pending.id}
                self._send(self._packer.pack(header), ())
                self._drain()

    def wait(self, pending: Pending, until: float) -> bool:
        """Blocks until the request is settled or `until` (monotonic seconds); whether it is settled.

        A request that is not settled stays in flight: `forget` it, or wait again.
        """
        look = self.edge_triggered  # else poll(2) tells at once of what has come already
        try:
            while True:
                with self._lock:
                    if self._leader is pending:
                        self._leader_sleeps = False
                    remaining_s = until - time.monotonic()
                    if not pending.settled and (look or remaining_s <= 0):
                        self._drain()
                    if pending.settled or remaining_s <= 0:
                        break
                    leads = self._leader is None or self._leader is pending
                    if leads:
                        self._leader = pending
                        self._leader_sleeps = True
                        pending.baton = None  # Who leads is woken in poll(2), not by a baton.
                    elif pending.baton is None:
                        pending.baton = threading.Lock()
                        pending.baton.acquire()
                if leads:
                    self._sleep(remaining_s)
                elif pending.baton is not None:
                    pending.baton.acquire(timeout=min(remaining_s, threading.TIMEOUT_MAX))
                look = True
            self._leave(pending)
        except BaseException:  # An interrupt, maybe while leaving: nobody is to follow one who is gone.
            self._leave(pending)
            raise
        return pending.settled

    def _leave(self, pending: Pending) -> None:
        if self._leader is pending or self._pendings:
            with self._lock:
                pending.baton = None
                self._pass_lead(pending)

    def forget(self, pending: Pending) -> None:
        """Lets go of a request: its reply, should it come, is dropped."""
        if pending.id in self._pendings:
            with self._lock:
                if self._pendings.pop(pending.id, None) is not None:
                    pending.let_go()

    def drain(self) -> None:
        """Settles whatever has arrived; for an event loop, when one of `fds` is readable."""
        with self._lock:
            self._doubt()
            self._drain()

    def close(self) -> None:
        """Ends the connection; what is in flight is lost."""
        with self._lock:
            self._close_sockets()
            self._lose_pendings()

    # What follows runs under the lock, `_sleep` excepted.

    def _send(self, header: bytes, frames: Sequence[Any]) -> bool:
        """Sends without blocking; whether it was sent."""
        raise NotImplementedError

    def _doubt(self) -> None:
        """Something may have happened to the connection: the next `_drain` is to find out."""

    def _drain(self) -> None:
        """Settles whatever has arrived, and everything if the connection is lost."""
        raise NotImplementedError

    def _close_sockets(self) -> None:
        raise NotImplementedError

    def _settle(self, packed: bytes | memoryview, frames: Sequence[Any]) -> bool:
        """A reply has come; whether it says to which request."""
        try:
            header = msgpack.unpackb(packed, strict_map_key=False)
        except ValueError:
            return False  # No id can be read from it, so its request meets its deadline.
        if not isinstance(header, dict):
            return False
        request_id = header.get("id")
        pending = self._pendings.pop(request_id, None) if isinstance(request_id, int) else None
        if request_id is None and len(self._pendings) == 1:
            # The daemon could not decode a request; with one in flight it is clear which.
            _, pending = self._pendings.popitem()
        if pending is not None:
            pending.header = header
            pending.frames = frames
            if pending.release is not None:
                pending.let_go()
            self._wake(pending)
        return request_id is not None

    def _lose_pendings(self) -> None:
        lost = list(self._pendings.values())
        self._pendings.clear()
        for pending in lost:
            pending.lost = True
            pending.let_go()
            self._wake(pending)

    def _wake(self, pending: Pending) -> None:
        if pending.wake is not None:
            pending.wake()
        elif pending.baton is not None:
            if pending.baton.locked():
                pending.baton.release()
        elif pending is self._leader and self._leader_sleeps:
            os.eventfd_write(self._wake_fd, 1)

    def _pass_lead(self, leaver: Pending) -> None:
        if self._leader is leaver:
            self._leader = None
            self._leader_sleeps = False
        if self._leader is None:
            for pending in self._pendings.values():
                if pending.baton is not None and pending is not leaver:
                    self._wake(pending)
                    return

    def _sleep(self, timeout_s: float) -> None:
        for fd, _ in self._poll.poll(timeout_s * 1000):
            if fd == self._wake_fd:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(fd)
            else:
                self._readable(fd)

    def _readable(self, fd: int) -> None:
        """One of the link's descriptors has something, seen outside the lock."""


def _check_length(packed: bytes) -> None:
    if len(packed) > HEADER_BYTES_MAX:
        raise InvalidArgument(
            f"the request's header has {len(packed)} bytes, the limit is {HEADER_BYTES_MAX}: "
            "names, shapes and inline values must fit into it",
            reason="HEADER_TOO_LARGE",
        )


def timeout_us(until: float) -> int:
    """What is left until `until` (monotonic seconds), as the protocol's `timeout` counts it."""
    return max(1, int((until - time.monotonic()) * 1e6))
