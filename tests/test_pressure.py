"""systemd's memory-pressure protocol with real descriptors of each kind that it allows."""

from __future__ import annotations

import base64
import os
import select
import socket
from pathlib import Path

import pytest

from edged.pressure import TRIGGER, PressureWatch

FIRST = b"some 150000 1000000\0"


def environ(path: Path | str, first: bytes = FIRST) -> dict[str, str]:
    return {"MEMORY_PRESSURE_WATCH": str(path), "MEMORY_PRESSURE_WRITE": base64.b64encode(first).decode()}


def ready(watch: PressureWatch) -> bool:
    """Whether an epoll like the daemon's finds it, without waiting."""
    assert watch.fd is not None
    with select.epoll() as epoll:
        epoll.register(watch.fd, watch.events)
        return bool(epoll.poll(0))


def test_a_fifo_is_written_to_watched_and_emptied(tmp_path: Path) -> None:
    """It goes on after its writer has gone."""
    path = tmp_path / "fifo"
    os.mkfifo(path)
    manager = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    with PressureWatch(environ(path)) as watch:
        assert os.read(manager, 100) == FIRST
        assert not ready(watch)
        for _ in range(2):
            os.write(manager, b"x" * 5000)
            assert ready(watch)
            assert watch.take()
            assert not ready(watch)
        os.close(manager)
        assert not ready(watch)
        assert watch.fd is not None
        other = os.open(path, os.O_WRONLY)
        os.write(other, b"x")
        os.close(other)
        assert watch.take()
        assert not watch.take()


def test_a_fifo_that_nobody_reads_gives_back_what_was_written(tmp_path: Path) -> None:
    """Which is no pressure; what comes behind it is."""
    for told in (b"", b"!"):
        path = tmp_path / f"fifo{len(told)}"
        os.mkfifo(path)
        with PressureWatch(environ(path)) as watch:
            assert watch.fd is not None
            os.write(watch.fd, told)
            assert watch.take() == bool(told)
            assert not ready(watch)


def test_a_socket_is_connected_to_and_given_up_when_the_other_side_hangs_up(tmp_path: Path) -> None:
    """What came before the end still counts."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.bind(str(tmp_path / "socket"))
        server.listen()
        with PressureWatch(environ(tmp_path / "socket")) as watch:
            manager, _ = server.accept()
            assert manager.recv(100) == FIRST
            assert not ready(watch)
            manager.sendall(b"pressure")
            assert ready(watch)
            assert watch.take()
            manager.sendall(b"pressure")
            manager.close()
            assert ready(watch)
            assert watch.take()
            assert watch.fd is None or not watch.take()
            assert watch.fd is None


def test_the_kernel_s_own_file_takes_the_trigger() -> None:
    """PSI of this machine, where it has it: the descriptor is one that tells by urgent data."""
    psi = Path("/proc/pressure/memory")
    if not os.access(psi, os.W_OK):
        pytest.skip(f"{psi} cannot be written here")
    with PressureWatch({}, [Path("/nonexistent/memory.pressure"), psi]) as watch:
        assert watch.fd is not None
        assert watch.source == str(psi)
        assert watch.events == select.EPOLLPRI
        ready(watch)


def test_a_file_is_written_to_and_never_read(tmp_path: Path) -> None:
    """Its position stays behind what was written."""
    path = tmp_path / "memory.pressure"
    path.touch()
    with PressureWatch({"MEMORY_PRESSURE_WATCH": str(path)}, []) as watch:
        assert path.read_bytes() == b""
        assert watch.events == select.EPOLLPRI
    with PressureWatch({}, [path]) as watch:
        assert path.read_bytes() == TRIGGER
        assert watch.fd is not None
        assert os.lseek(watch.fd, 0, os.SEEK_CUR) == len(TRIGGER)


def test_it_can_be_turned_off(tmp_path: Path) -> None:
    """/dev/null says that nobody wants it, so nothing else is tried."""
    path = tmp_path / "memory.pressure"
    path.touch()
    with PressureWatch({"MEMORY_PRESSURE_WATCH": "/dev/null"}, [path]) as watch:
        assert watch.fd is None
        assert not watch.problem
        assert not watch.take()
    assert path.read_bytes() == b""


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (environ("/nonexistent/x"), "/nonexistent/x: No such file"),
        (environ("relative"), "absolute"),
        (environ("/"), "neither"),
        ({**environ("/nonexistent"), "MEMORY_PRESSURE_WRITE": "!"}, "Base64"),
    ],
)
def test_what_cannot_be_had_is_said_and_the_next_best_taken(
    tmp_path: Path, wanted: dict[str, str], said: str
) -> None:
    """A mistake of the service manager's, or one that has no such file."""
    path = tmp_path / "memory.pressure"
    path.touch()
    with PressureWatch(wanted, [path]) as watch:
        assert said in watch.problem
        assert watch.source == str(path)


def test_a_machine_that_tells_nothing_is_looked_at_on_a_timer_only(tmp_path: Path) -> None:
    """No descriptor, no complaint."""
    with PressureWatch({}, [tmp_path / "memory.pressure"]) as watch:
        assert watch.fd is None
        assert not watch.problem
