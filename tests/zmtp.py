"""A DEALER that reads only what a test asks for: ZMTP 3 (rfc.zeromq.org/spec/23) without libzmq."""

from __future__ import annotations

import select
import socket
from collections.abc import Callable, Sequence

__all__ = ["Sleeper"]

_MORE, _LONG, _COMMAND = 1, 2, 4
_GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
_READY = b"\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"

WAIT_S = 60.0


class Sleeper:
    """A connection to a ROUTER at `path`; libzmq would read ahead, here the kernel holds some 200 KB."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(WAIT_S)
        self._socket.connect(path)
        self._socket.sendall(_GREETING)
        self._read(len(_GREETING))
        self._socket.sendall(bytes([_COMMAND, len(_READY)]) + _READY)
        self._frame()

    def send(self, frames: Sequence[bytes]) -> None:
        """Sends a message."""
        for at, frame in enumerate(frames):
            flags = _LONG | (_MORE if at < len(frames) - 1 else 0)
            self._socket.sendall(bytes([flags]) + len(frame).to_bytes(8, "big") + frame)

    def receive(self, meanwhile: Callable[[], object] | None = None) -> list[bytes]:
        """The next message; `meanwhile` is called again and again until it begins."""
        while meanwhile is not None and not select.select([self._socket], [], [], 0.01)[0]:
            meanwhile()
        frames, more = [], True
        while more:
            flags, body = self._frame()
            frames.append(body)
            more = bool(flags & _MORE)
        return frames

    def close(self) -> None:
        """Ends the connection."""
        self._socket.close()

    def _frame(self) -> tuple[int, bytes]:
        flags = self._read(1)[0]
        return flags, self._read(int.from_bytes(self._read(8 if flags & _LONG else 1), "big"))

    def _read(self, count: int) -> bytes:
        found = bytearray(count)
        view, at = memoryview(found), 0
        while at < count:
            got = self._socket.recv_into(view[at:])
            assert got, "the router hung up"
            at += got
        return bytes(found)
