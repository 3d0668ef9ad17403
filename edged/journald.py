"""journald's own protocol, spoken without ever waiting longer than asked.

Owns one datagram socket to journald and the form of an entry (https://systemd.io/JOURNAL_NATIVE_PROTOCOL).
Not through systemd-python: its `send` waits for as long as journald does not read and keeps the
interpreter's lock while it waits (version 235), so a journald that hangs would stop every thread of the
daemon; and it calls an entry that went nowhere sent. What could not be sent is told here, with the difference
that matters to the caller: a journald that does not read now will, one that is not there may never.
"""

from __future__ import annotations

import array
import contextlib
import enum
import errno
import fcntl
import os
import select
import socket
import struct
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Final, Self

__all__ = ["SOCKET", "JournalSocket", "Outcome", "encode_entry"]

SOCKET: Final = Path("/run/systemd/journal/socket")

#: As much as the kernel lets us ask for without privileges; an entry beyond it travels as a memfd.
_SNDBUF_BYTES: Final = 8 << 20

#: A datagram that is larger than the socket's buffer is refused with one of these.
_TOO_LARGE: Final = frozenset({errno.EMSGSIZE, errno.ENOBUFS})


class Outcome(enum.Enum):
    """What became of an entry."""

    SENT = "sent"
    FULL = "full"
    """journald has not read for as long as the caller would wait; it is there and may read later."""
    ABSENT = "absent"
    """Nobody listens."""


def encode_entry(fields: Mapping[str, object]) -> bytes:
    """One entry; a value with a line break is preceded by its length, any other stands behind a `=`."""
    parts: list[bytes] = []
    for name, value in fields.items():
        data = str(value).encode("utf-8", "backslashreplace")
        if b"\n" in data:
            parts += [name.encode(), b"\n", struct.pack("<Q", len(data)), data, b"\n"]
        else:
            parts += [name.encode(), b"=", data, b"\n"]
    return b"".join(parts)


class JournalSocket:
    """A way to journald that comes back by itself when journald does. One thread at a time."""

    def __init__(self, path: Path = SOCKET) -> None:
        self._path = path
        self._socket: socket.socket | None = None
        self._file = (0, 0)

    @property
    def present(self) -> bool:
        """Whether somebody listens, as far as can be told without sending anything."""
        return self._connected() is not None

    def send(self, entry: bytes, *, timeout_s: float = 0.0) -> Outcome:
        """Sends one entry, and waits for room no longer than `timeout_s`."""
        # Twice: the first error of a connection may tell of a journald that has been replaced since.
        for _ in range(2):
            connection = self._connected()
            if connection is None:
                return Outcome.ABSENT
            try:
                if not _has_room(connection, timeout_s):
                    return Outcome.FULL
                _send_whole(connection, entry)
            except OSError as e:
                if e.errno == errno.EAGAIN:  # another process took the room that was there
                    return Outcome.FULL
                self.close()
            else:
                return Outcome.SENT
        return Outcome.ABSENT

    def _connected(self) -> socket.socket | None:
        # A connection outlives the file: without this look, a successor at the same path would be missed for
        # as long as somebody holds the old socket open.
        try:
            found = self._path.stat()
        except OSError:
            self.close()
            return None
        if self._socket is None or self._file != (found.st_dev, found.st_ino):
            self.close()
            self._file = (found.st_dev, found.st_ino)
            self._socket = self._connect()
        return self._socket

    def _connect(self) -> socket.socket | None:
        fresh = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        fresh.setblocking(False)
        with contextlib.suppress(OSError):
            fresh.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SNDBUF_BYTES)
        try:
            fresh.connect(str(self._path))
        except OSError:
            fresh.close()
            return None
        return fresh

    def close(self) -> None:
        """Ends the connection; the next entry makes another."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _has_room(connection: socket.socket, timeout_s: float) -> bool:
    """Whether journald's queue takes another entry; the kernel tells that of connected sockets only."""
    poll = select.poll()
    poll.register(connection, select.POLLOUT)
    return bool(poll.poll(round(timeout_s * 1000)))


def _send_whole(connection: socket.socket, entry: bytes) -> None:
    try:
        connection.send(entry, socket.MSG_NOSIGNAL)
    except OSError as e:
        if e.errno not in _TOO_LARGE:
            raise
        _send_memfd(connection, entry)


def _send_memfd(connection: socket.socket, entry: bytes) -> None:
    """An entry that is too large for a datagram: an empty one with a sealed memfd."""
    fd = os.memfd_create("edged-journal", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        left = memoryview(entry)
        while left:
            left = left[os.write(fd, left) :]
        seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        passed = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))
        connection.sendmsg([b""], [passed], socket.MSG_NOSIGNAL)
    finally:
        os.close(fd)
