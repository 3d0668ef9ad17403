"""The text file and the HTTP server of the metrics: real files, real sockets, clients that misbehave."""

from __future__ import annotations

import os
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from edged.config import MetricsConfig
from edged.exporter import Exporter, MetricsServer, TextFile, in_memory

PAGE = "# HELP edged_ready x.\n# TYPE edged_ready gauge\nedged_ready 1\n"


def test_the_file_is_whole_and_everybody_s_to_read(tmp_path: Path) -> None:
    """Whatever the umask; readers never see half of it, and the temporary name is none that is collected."""
    before = os.umask(0o077)
    try:
        file = TextFile(tmp_path / "metrics" / "edged.prom")
        file.write("one\n")
        with file.path.open() as reader:
            file.write(PAGE)
            assert reader.read() == "one\n"
    finally:
        os.umask(before)
    assert file.path.read_text() == PAGE
    assert file.path.stat().st_mode & 0o777 == 0o644
    assert file.path.parent.stat().st_mode & 0o777 == 0o755
    assert [p.name for p in file.path.parent.iterdir()] == ["edged.prom"]
    file.remove()
    assert not list(file.path.parent.iterdir())


def test_what_a_killed_daemon_left_is_in_nobody_s_way(tmp_path: Path) -> None:
    """A temporary file, or a link that somebody put in its place, which is not followed."""
    target = tmp_path / "precious"
    target.write_text("precious")
    (tmp_path / ".edged.prom.new").symlink_to(target)
    TextFile(tmp_path / "edged.prom").write(PAGE)
    assert target.read_text() == "precious"
    assert (tmp_path / "edged.prom").read_text() == PAGE


def test_memory_is_told_from_disk(tmp_path: Path) -> None:
    """By the table of mounts; a folder that is yet to be made is judged by the one it will be in."""
    device = os.stat(tmp_path).st_dev
    for kind, expected in (("tmpfs", True), ("ext4", False)):
        table = tmp_path / kind
        table.write_text(
            "22 1 0:9999 / /x rw - proc proc rw\n"
            f"23 1 {os.major(device)}:{os.minor(device)} / /y rw,noexec shared:5 - {kind} none rw\n"
        )
        assert in_memory(tmp_path / "not" / "yet", table) is expected
    assert not in_memory(tmp_path, tmp_path / "no-table")


class Log:
    """What was told to the log."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, dict[str, object]]] = []

    def __call__(self, kind: str, fields: Mapping[str, object]) -> None:
        self.lines.append((kind, dict(fields)))

    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.lines]


def exporter(log: Log, aside: Callable[[Callable[[], None]], None] = lambda task: task()) -> Exporter:
    return Exporter(emit=log, ask=lambda: PAGE, aside=aside)


def test_the_file_is_written_at_its_interval_and_taken_away_at_the_end(tmp_path: Path) -> None:
    """A new path by a reload leaves nothing at the old one."""
    log = Log()
    made = exporter(log)
    old, new = tmp_path / "a.prom", tmp_path / "b.prom"
    made.configure(MetricsConfig(textfile=old, interval_s=15), 100.0)
    assert made.due_s == 100.0
    made.write(lambda now_s: f"{now_s}\n", 100.0)
    assert (old.read_text(), made.due_s) == ("100.0\n", 115.0)
    made.configure(MetricsConfig(textfile=new, interval_s=60), 101.0)
    assert not old.exists()
    made.write(lambda _: PAGE, 101.0)
    assert (new.read_text(), made.due_s) == (PAGE, 161.0)
    made.configure(MetricsConfig(), 102.0)
    assert made.due_s == float("inf")
    made.close()
    assert not list(tmp_path.iterdir())
    assert set(log.kinds()) <= {"metrics_on_disk"}


def test_a_disk_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread writes there, one write at a time, and the log says that it is a disk."""
    monkeypatch.setattr("edged.exporter.in_memory", lambda _: False)
    log = Log()
    given: list[Callable[[], None]] = []
    made = exporter(log, given.append)
    made.configure(MetricsConfig(textfile=tmp_path / "a.prom"), 0.0)
    made.write(lambda _: PAGE, 0.0)
    made.write(lambda _: PAGE, 15.0)
    assert len(given) == 1
    assert not (tmp_path / "a.prom").exists()
    given.pop()()
    assert (tmp_path / "a.prom").read_text() == PAGE
    made.write(lambda _: PAGE, 30.0)
    assert len(given) == 1
    assert log.kinds() == ["metrics_on_disk"]


def test_a_file_that_cannot_be_written_is_said_once(tmp_path: Path) -> None:
    """And written as soon as it can be."""
    log = Log()
    made = exporter(log)
    (tmp_path / "in-the-way").touch()
    path = tmp_path / "in-the-way" / "edged.prom"
    made.configure(MetricsConfig(textfile=path), 0.0)
    for now_s in (0.0, 15.0, 30.0):
        made.write(lambda _: PAGE, now_s)
    assert log.kinds().count("metrics_failed") == 1
    (tmp_path / "in-the-way").unlink()
    made.write(lambda _: PAGE, 45.0)
    assert path.read_text() == PAGE


def test_an_address_that_is_taken_is_said_and_costs_nothing_else() -> None:
    """The daemon serves on without it."""
    log = Log()
    with MetricsServer(("127.0.0.1", 0), lambda: PAGE) as other:
        made = exporter(log)
        made.configure(MetricsConfig(listen=("127.0.0.1", other.port)), 0.0)
        assert log.kinds() == ["metrics_failed"]
        assert log.lines[0][1]["ENDPOINT"] == f"127.0.0.1:{other.port}"
        made.close()


def test_a_reload_waits_for_no_client_of_the_old_address() -> None:
    """Its end may take as long as a slow client: it is another thread's."""
    tasks: list[Callable[[], None]] = []
    made = exporter(Log(), tasks.append)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = free.getsockname()
    made.configure(MetricsConfig(listen=address), 0.0)
    with socket.create_connection(address, timeout=30):  # says nothing, and so is waited for
        made.configure(MetricsConfig(), 0.0)
        assert len(tasks) == 1
    tasks[0]()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address, timeout=30)
    made.close()


# ---------------------------------------------------------------------- HTTP


@pytest.fixture
def server() -> Iterator[MetricsServer]:
    with MetricsServer(("127.0.0.1", 0), lambda: PAGE) as there:
        yield there


def exchange(server: MetricsServer, request: bytes) -> tuple[int, bytes]:
    """Status and everything that came, until the server closed."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as client:
        client.sendall(request)
        got = b""
        while part := client.recv(65536):
            got += part
    return (int(got.split()[1]) if got else 0), got


def test_prometheus_gets_the_page(server: MetricsServer) -> None:
    """With the content type that it asks for."""
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics?x=1", timeout=30) as answer:
        assert answer.read().decode() == PAGE
        assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert answer.headers["Connection"] == "close"


@pytest.mark.parametrize(
    ("asked", "status"),
    [
        (b"GET /metrics HTTP/1.1\r\nHost: localhost:9633\r\n\r\n", 200),
        (b"GET /metrics HTTP/1.0\r\nhost: [::1]\r\n\r\n", 200),
        (b"HEAD /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", 200),
        (b"GET /metrics HTTP/1.1\r\nHost: evil.example\r\n\r\n", 403),
        (b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1.evil.example\r\n\r\n", 403),
        (b"GET /metrics HTTP/1.1\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nHost: evil\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
        (b"GET http://localhost/metrics HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"POST /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n", 405),
        (b"\x16\x03\x01\r\n\r\n", 400),
        ((b"GET /metrics HTTP/1.1\r\nX: " + b"x" * 8000)[:4096], 431),
    ],
)
def test_only_what_is_asked_properly_is_answered(server: MetricsServer, asked: bytes, status: int) -> None:
    """Another host's name is a page in a browser that was lured here; the rest are slips."""
    got, text = exchange(server, asked)
    assert got == status
    assert (PAGE.encode() in text) == (status == 200 and not asked.startswith(b"HEAD"))


def test_a_loop_that_stands_still_is_told() -> None:
    """503: whoever asks learns that the daemon is not well."""
    with MetricsServer(("127.0.0.1", 0), lambda: None) as still:
        assert exchange(still, b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")[0] == 503


def test_a_client_that_says_nothing_is_hung_up_on(server: MetricsServer) -> None:
    """It holds the others up for two seconds and no longer; one that hangs up itself costs nothing."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as mute:
        socket.create_connection(("127.0.0.1", server.port), timeout=30).close()
        assert exchange(server, b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")[0] == 200
        assert mute.recv(1) == b""


def test_closing_ends_the_thread_and_frees_the_port() -> None:
    """Also while a client is in the middle of its request."""
    before = threading.active_count()
    server = MetricsServer(("127.0.0.1", 0), lambda: PAGE)
    port = server.port
    with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
        client.sendall(b"GET /met")
        server.close()
    assert threading.active_count() == before
    with MetricsServer(("127.0.0.1", port), lambda: PAGE) as again:
        assert again.port == port


def test_version_six_is_spoken_too() -> None:
    """Where the machine has it."""
    try:
        server = MetricsServer(("::1", 0), lambda: PAGE)
    except OSError as e:
        pytest.skip(f"no IPv6 loopback here: {e}")
    with server, urllib.request.urlopen(f"http://[::1]:{server.port}/metrics", timeout=30) as answer:
        assert answer.read().decode() == PAGE
