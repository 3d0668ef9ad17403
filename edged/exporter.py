"""How the metrics page gets to Prometheus: a text file for node_exporter, and by choice an answer to HTTP.

Owns the file, which is exchanged as a whole and taken away at an orderly end: a stale one means that the
daemon did not end in order. Owns the server too, a thread that takes one connection at a time and gives each
two seconds; it asks the loop for the page, so an answer proves that the loop runs. Neither is worth the
daemon: what goes wrong here is told once and everything else goes on.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import select
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from edged.config import MetricsConfig

__all__ = ["Exporter", "MetricsServer", "TextFile", "in_memory"]

CONNECTION_S: Final = 2.0
"""For one request and its answer; those of other clients wait meanwhile."""

REQUEST_BYTES_MAX: Final = 4096
"""Prometheus' requests have about 300."""

BACKLOG: Final = 8
"""Connections that may wait; a Prometheus makes one at a time."""

_IN_MEMORY: Final = frozenset({"tmpfs", "ramfs"})

Emit = Callable[[str, Mapping[str, object]], None]
"""Tells the log: a kind of its catalog, and fields."""


class TextFile:
    """A file that readers see only whole, and that everybody may read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fresh = path.with_name(f".{path.name}.new")

    def write(self, text: str) -> None:
        """Puts `text` in the place of what was there. Raises OSError."""
        # The modes by chmod: the service's umask keeps everything else of ours from others.
        if not self.path.parent.is_dir():
            self.path.parent.mkdir(parents=True)
            self.path.parent.chmod(0o755)
        with contextlib.suppress(FileNotFoundError):
            self._fresh.unlink()
        fd = os.open(self._fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        with open(fd, "w", encoding="utf-8") as file:
            file.write(text)
            os.fchmod(fd, 0o644)
        self._fresh.rename(self.path)

    def remove(self) -> None:
        """No figures are better than old ones."""
        for path in (self.path, self._fresh):
            with contextlib.suppress(OSError):
                path.unlink()


def in_memory(folder: Path, mounts: Path = Path("/proc/self/mountinfo")) -> bool:
    """Whether files in `folder`, or in what there is of it, are kept in memory and wear no disk."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        device = os.stat(folder).st_dev
        lines = mounts.read_text("utf-8", "replace").splitlines()
    except OSError:
        return False
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in lines:
        # proc(5): the third field is the device, the file system's type is the first behind the dash.
        head, _, tail = line.partition(" - ")
        if head.split()[2] == wanted:
            return tail.split()[0] in _IN_MEMORY
    return False


class MetricsServer:
    """Answers `GET /metrics` on an address of this machine; a thread of its own until `close`.

    `ask` gives the page, or None when the loop did not answer in time. Raises OSError when the address
    cannot be had.
    """

    def __init__(self, address: tuple[str, int], ask: Callable[[], str | None]) -> None:
        self._ask = ask
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self._listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._listener.bind(address)
            self._listener.listen(BACKLOG)
            self._listener.setblocking(False)
            self._end = os.eventfd(0, os.EFD_CLOEXEC)
        except BaseException:
            self._listener.close()
            raise
        self._thread = threading.Thread(target=self._serve, name="edged-metrics", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """Where it listens."""
        port: int = self._listener.getsockname()[1]
        return port

    def _serve(self) -> None:
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        poll.register(self._end, select.POLLIN)
        while True:
            if any(fd == self._end for fd, _ in poll.poll()):
                return
            # A client that hung up while it waited, no descriptors left: the next one is served.
            with contextlib.suppress(OSError):
                connection, _ = self._listener.accept()
                with connection:
                    self._answer(connection)

    def _answer(self, connection: socket.socket) -> None:
        until_s = time.monotonic() + CONNECTION_S
        head = _read_head(connection, until_s)
        if head is None:
            return
        answer = _answer_to(head, self._ask)
        connection.settimeout(max(0.01, until_s - time.monotonic()))
        connection.sendall(answer)
        connection.shutdown(socket.SHUT_WR)

    def hang_up(self) -> None:
        """Takes no connection from now on; waits for nothing."""
        os.eventfd_write(self._end, 1)
        with contextlib.suppress(OSError):  # it has been hung up before
            self._listener.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Ends the thread; a client in the middle of its two seconds is waited for."""
        self.hang_up()
        self._thread.join(2 * CONNECTION_S)
        self._listener.close()
        if not self._thread.is_alive():
            os.close(self._end)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _read_head(connection: socket.socket, until_s: float) -> bytes | None:
    """A request up to its empty line, or as much of it as we read; None from a client too slow for us."""
    head = b""
    while b"\r\n\r\n" not in head and len(head) < REQUEST_BYTES_MAX:
        left_s = until_s - time.monotonic()
        if left_s <= 0:
            return None
        connection.settimeout(left_s)
        got = connection.recv(REQUEST_BYTES_MAX - len(head))
        if not got:
            return None
        head += got
    return head


#: A browser that was lured to us under another name sends that name: then a web page would be reading.
_HOST: Final = re.compile(rb"(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d{1,5})?", re.IGNORECASE)
_LINE: Final = re.compile(rb"([A-Z]{1,16}) (/[^ ]*) HTTP/1\.[01]")


def _answer_to(head: bytes, ask: Callable[[], str | None]) -> bytes:
    head, end, _ = head.partition(b"\r\n\r\n")
    first, *fields = head.split(b"\r\n")
    line = _LINE.fullmatch(first)
    hosts = [f.partition(b":")[2].strip() for f in fields if f.lower().startswith(b"host:")]
    if not end:
        return _reply(431, "Request Header Fields Too Large", "the request is too long\n")
    if line is None or len(hosts) != 1:
        return _reply(400, "Bad Request", "not a request that is understood here\n")
    if _HOST.fullmatch(hosts[0]) is None:
        return _reply(403, "Forbidden", "ask for this machine by localhost or its loopback address\n")
    if line[1] not in (b"GET", b"HEAD"):
        return _reply(405, "Method Not Allowed", "only GET\n", "Allow: GET, HEAD\r\n")
    if line[2].partition(b"?")[0] != b"/metrics":
        return _reply(404, "Not Found", "the metrics are at /metrics\n")
    page = ask()
    if page is None:
        return _reply(503, "Service Unavailable", "the daemon does not answer\n")
    return _reply(200, "OK", page, body=line[1] == b"GET")


def _reply(status: int, reason: str, text: str, extra: str = "", *, body: bool = True) -> bytes:
    data = text.encode()
    head = (
        f"HTTP/1.1 {status} {reason}\r\n"
        "Content-Type: text/plain; version=0.0.4; charset=utf-8\r\n"
        f"Content-Length: {len(data)}\r\n"
        "X-Content-Type-Options: nosniff\r\n"
        "Cache-Control: no-store\r\n"
        f"{extra}Connection: close\r\n\r\n"
    )
    return head.encode() + (data if body else b"")


class Exporter:
    """The file and the server as the settings want them.

    `ask` is the server's way to the page. `aside` runs a task in another thread and returns at once: for a
    file on a disk, or a client that is slow, which the loop must not wait for.
    """

    def __init__(
        self, *, emit: Emit, ask: Callable[[], str | None], aside: Callable[[Callable[[], None]], None]
    ) -> None:
        self._emit, self._ask, self._aside = emit, ask, aside
        self._config = MetricsConfig()
        self._file: TextFile | None = None
        self._server: MetricsServer | None = None
        self._inline = False
        self._busy = threading.Event()
        """Set while a write is with the other thread: at most one waits there."""
        self._failed = ""
        self.due_s = math.inf
        """When the file is to be written next."""

    def configure(self, config: MetricsConfig, now_s: float) -> None:
        """Takes new settings; what they did not change goes on."""
        before, self._config = self._config, config
        if config.textfile != before.textfile:
            self._open_file(config.textfile)
        self.due_s = math.inf if self._file is None else now_s
        if config.listen != before.listen:
            self._open_server(config.listen)

    def _open_file(self, path: Path | None) -> None:
        if self._file is not None:
            self._file.remove()
        self._file = None if path is None else TextFile(path)
        self._failed = ""
        self._inline = path is not None and in_memory(path.parent)
        if path is not None and not self._inline:
            self._emit("metrics_on_disk", {"PATH": str(path)})

    def _open_server(self, address: tuple[str, int] | None) -> None:
        if self._server is not None:
            # A client in the middle of its two seconds is waited for, and the loop must not be.
            self._server.hang_up()
            self._aside(self._server.close)
            self._server = None
        if address is None:
            return
        try:
            self._server = MetricsServer(address, self._ask)
        except OSError as e:
            where = f"{address[0]}:{address[1]}"
            self._emit("metrics_failed", {"ENDPOINT": where, "REASON": e.strerror or str(e)})

    def write(self, render: Callable[[float], str], now_s: float) -> None:
        """Sets when the file is due again, and writes it."""
        self.due_s = now_s + self._config.interval_s
        file = self._file
        if file is None or self._busy.is_set():
            return
        text = render(now_s)
        if self._inline:
            self._write(file, text)
            return
        self._busy.set()
        self._aside(lambda: self._write(file, text))

    def _write(self, file: TextFile, text: str) -> None:
        failed = ""
        try:
            file.write(text)
        except OSError as e:
            failed = e.strerror or str(e)
        finally:
            self._busy.clear()
        if failed and failed != self._failed:
            self._emit("metrics_failed", {"PATH": str(file.path), "REASON": failed})
        self._failed = failed

    def close(self) -> None:
        """Ends the server and takes the file away."""
        if self._server is not None:
            self._server.close()
            self._server = None
        if self._file is not None:
            self._file.remove()
            self._file = None
