"""Being told of memory pressure as it happens, beside the guard's look once a second.

systemd's protocol (https://systemd.io/PRESSURE, version 254 and later) names a file by
`$MEMORY_PRESSURE_WATCH` and what to write into it by `$MEMORY_PRESSURE_WRITE`. Without it a trigger is set
on the memory pressure of our own control group, else of the machine. Owns that one descriptor; what pressure
means, the guard decides. Where nothing of this can be had, there is no descriptor, and the guard's own look
is all.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import os
import select
import socket
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

__all__ = ["PressureWatch"]

TRIGGER: Final = b"some 200000 2000000\0"
"""Tasks waited 200 ms within two seconds: the default of systemd's own services. Unprivileged processes may
only set windows that are multiples of two seconds."""

_OFF: Final = "/dev/null"
_DRAIN_BYTES: Final = 4096


class PressureWatch:
    """One descriptor to poll for `events`; `fd` is None when nobody tells of pressure.

    `source` names where the word comes from, `problem` why what the service manager asked for cannot be had.
    """

    def __init__(self, environ: Mapping[str, str], groups: Sequence[Path] = ()) -> None:
        self.fd: int | None = None
        self.events = select.EPOLLPRI
        self.source = ""
        self.problem = ""
        self._drained = False
        self._own = b""
        wanted = environ.get("MEMORY_PRESSURE_WATCH", "")
        if wanted == _OFF:
            return
        if wanted:
            try:
                self._open(Path(wanted), _decoded(environ.get("MEMORY_PRESSURE_WRITE", "")))
            except (OSError, ValueError) as e:
                self.problem = f"{wanted}: {e.strerror if isinstance(e, OSError) and e.strerror else e}"
            else:
                return
        for path in groups:
            with contextlib.suppress(OSError):
                self._open(path, TRIGGER)
                return

    def _open(self, path: Path, first: bytes) -> None:
        if not path.is_absolute():
            raise ValueError("not an absolute path")
        mode = path.stat().st_mode
        if stat.S_ISSOCK(mode):
            fd = _connected(path)
        elif stat.S_ISREG(mode) or stat.S_ISFIFO(mode):
            # For writing as well: PSI takes its trigger that way, and a FIFO does not end with its writers.
            fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        else:
            raise ValueError("neither a file nor a FIFO nor a socket")
        try:
            if first:
                os.write(fd, first)
        except OSError:
            os.close(fd)
            raise
        self._drained = not stat.S_ISREG(mode)
        # In a FIFO that nobody reads, what we have written comes back to us, and is no pressure.
        self._own = first if stat.S_ISFIFO(mode) else b""
        self.events = select.EPOLLIN if self._drained else select.EPOLLPRI
        self.fd, self.source = fd, str(path)

    def take(self) -> bool:
        """When the descriptor was found ready: whether there is pressure. Closes what tells nothing more."""
        if self.fd is None:
            return False
        if not self._drained:
            # The look that found it ready took the word; only an error (the control group is gone) stays.
            look = select.poll()
            look.register(self.fd, 0)
            if look.poll(0):
                self.close()
                return False
            return True
        told = False
        try:
            while data := os.read(self.fd, _DRAIN_BYTES):
                told = told or data != self._own
                self._own = b""
                if len(data) < _DRAIN_BYTES:
                    return told
        except BlockingIOError:
            return told
        except OSError:
            pass
        self.close()
        return told

    def close(self) -> None:
        """Listens no more."""
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as e:
        raise ValueError(f"$MEMORY_PRESSURE_WRITE is not Base64 ({e})") from None


def _connected(path: Path) -> int:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as connection:
        connection.setblocking(False)
        connection.connect(str(path))
        return connection.detach()
