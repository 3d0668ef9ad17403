"""The kernel's inotify(7): directories in, one call out whenever something in them has happened.

A set of watches on one descriptor and one thread that reads it. What the events say is dropped but for the
fact that there were some, so there are no paths to keep, no moves to pair and no tree to follow, and
nothing here can fall out of step with the file system: a directory that is exchanged, renamed or removed
is the caller's to see when it looks again. `watch` is idempotent, as the system call is: the same
directory has the same number for as long as it is watched, and another one never has.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import struct
import threading
from collections.abc import Callable

__all__ = ["Inotify"]

_IN_MODIFY, _IN_ATTRIB, _IN_CLOSE_WRITE = 0x2, 0x4, 0x8
_IN_MOVED_FROM, _IN_MOVED_TO, _IN_CREATE, _IN_DELETE = 0x40, 0x80, 0x100, 0x200
_IN_DELETE_SELF, _IN_MOVE_SELF, _IN_IGNORED = 0x400, 0x800, 0x8000
_IN_ONLYDIR, _IN_EXCL_UNLINK = 0x01000000, 0x04000000
_MASK = (
    _IN_MODIFY
    | _IN_ATTRIB
    | _IN_CLOSE_WRITE
    | _IN_MOVED_FROM
    | _IN_MOVED_TO
    | _IN_CREATE
    | _IN_DELETE
    | _IN_DELETE_SELF
    | _IN_MOVE_SELF
    | _IN_ONLYDIR
    | _IN_EXCL_UNLINK
)
"""Every way to change a directory or a file in it. Not opening and reading: our own scans do that, and
each would be the cause of the next. Overflow and unmount are told without being asked for."""

_HEADER = struct.Struct("iIII")  # struct inotify_event without its name: wd, mask, cookie, len
_READ_BYTES = 64 * 1024
_STOP_S = 5.0


class Inotify:
    """Calls `on_event` from its own thread, once for all events that are there together.

    `on_event` must be quick and safe there. Raises OSError when the kernel gives no further instance.
    """

    def __init__(self, on_event: Callable[[], None]) -> None:
        self._on_event = on_event
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = _checked(self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))
        self._stop_fd = -1
        try:
            self._stop_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            self._thread = threading.Thread(target=self._run, name="inotify", daemon=True)
            self._thread.start()
        except BaseException:
            self._close_descriptors()
            raise

    @property
    def is_alive(self) -> bool:
        """Whether events can still come."""
        return self._thread.is_alive()

    def watch(self, directory: str) -> int:
        """The number of the watch on a directory, links followed. Raises OSError."""
        return _checked(
            self._libc.inotify_add_watch(self._fd, os.fsencode(directory), ctypes.c_uint32(_MASK)), directory
        )

    def unwatch(self, number: int) -> None:
        """Ends a watch; one that ended with its directory is no error."""
        self._libc.inotify_rm_watch(self._fd, number)

    def close(self) -> None:
        """Ends the thread; `on_event` is not called any more. Never raises; twice is harmless."""
        if self._stop_fd < 0:
            return
        os.eventfd_write(self._stop_fd, 1)
        self._thread.join(_STOP_S)
        if not self._thread.is_alive():  # else it still reads them: they are closed by the process's end
            self._close_descriptors()

    def _close_descriptors(self) -> None:
        for fd in (self._fd, self._stop_fd):
            if fd >= 0:
                os.close(fd)
        self._fd = self._stop_fd = -1

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        poll.register(self._stop_fd, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll()}
            if self._stop_fd in ready:
                return
            if _tells_something(os.read(self._fd, _READ_BYTES)):
                self._on_event()


def _tells_something(events: bytes) -> bool:
    """Whether more happened than that watches ended: that is our own doing, or was told before."""
    offset = 0
    while offset < len(events):
        _number, mask, _cookie, name_bytes = _HEADER.unpack_from(events, offset)
        if mask & ~_IN_IGNORED:
            return True
        offset += _HEADER.size + name_bytes
    return False


def _checked(result: int, path: str | None = None) -> int:
    if result >= 0:
        return result
    code = ctypes.get_errno()
    text = {
        errno.ENOSPC: "the limit of inotify watches is reached",
        errno.EMFILE: "the limit of inotify instances, or of open files, is reached",
    }.get(code, os.strerror(code))
    raise OSError(code, text, path)
