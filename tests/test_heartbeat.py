"""What the service manager hears: a real notify socket, the simulated world, and time that the test moves."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from edged.events import Sampled
from edged.heartbeat import EXTEND_BY_S, EXTEND_EVERY_S, Heartbeat
from edged.system import Notifier
from tests.world import MIB, World, sample


class Manager:
    """systemd's end of the socket."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))
        self.socket.setblocking(False)
        self.environ = {"NOTIFY_SOCKET": str(path), "WATCHDOG_USEC": "30000000"}

    def heard(self) -> list[dict[str, str]]:
        """All that was said since the last look."""
        found = []
        try:
            while True:
                lines = self.socket.recv(4096).decode().splitlines()
                found.append(dict(line.partition("=")[::2] for line in lines))
        except BlockingIOError:
            return found


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    there = Manager(tmp_path / "notify")
    yield there
    there.socket.close()


def serving(*names: str) -> World:
    world = World()
    for name in names:
        world.put(name)
    world.settle()
    return world


def beat(heart: Heartbeat, world: World, *, well: bool = True, notes: tuple[str, ...] = ()) -> None:
    heart.beat(world.core, world.now_s, at_most_s=1.0, well=well, notes=notes)


def pass_time(heart: Heartbeat, world: World, seconds: int) -> None:
    for _ in range(seconds):
        world.now_s += 1.0
        beat(heart, world)


def test_an_idle_daemon_wakes_the_manager_for_the_watchdog_alone(manager: Manager) -> None:
    """Ten minutes: no status, and a word every 7.5 s or so, half as long as systemd asks for."""
    world = serving("m")
    with Notifier(manager.environ) as notifier:
        heart = Heartbeat(notifier)
        beat(heart, world)
        assert "1 of 1 model ready" in next(n["STATUS"] for n in manager.heard() if "STATUS" in n)
        heard = []
        for _ in range(20):  # the socket holds no more than ten
            pass_time(heart, world, 30)
            heard += manager.heard()
    assert all(notice == {"WATCHDOG": "1"} for notice in heard)
    assert 600 / 8 <= len(heard) <= 600 / 7.5


def test_a_core_that_can_handle_nothing_does_not_live(manager: Manager) -> None:
    """The loop goes round, but the watchdog hears nothing until a tick has worked again."""
    world = serving()
    with Notifier(manager.environ) as notifier:
        heart = Heartbeat(notifier)
        for _ in range(60):
            world.now_s += 1.0
            beat(heart, world, well=False)
        assert not [n for n in manager.heard() if "WATCHDOG" in n]
        beat(heart, world)
        assert [n for n in manager.heard() if "WATCHDOG" in n]


def test_a_start_is_given_more_time_for_as_long_as_it_goes_on(manager: Manager) -> None:
    """Every ten seconds half a minute more, until the daemon is ready; with what it waits for."""
    world = World()
    world.hold_loads = True
    world.put("m")
    world.settle()
    assert world.core.state == "starting"
    with Notifier(manager.environ) as notifier:
        heart = Heartbeat(notifier)
        pass_time(heart, world, 16)
        extended = [n for n in manager.heard() if "EXTEND_TIMEOUT_USEC" in n]
        assert {n["EXTEND_TIMEOUT_USEC"] for n in extended} == {str(round(EXTEND_BY_S * 1e6))}
        assert len(extended) == 2
        assert extended[0]["STATUS"].startswith("starting: 0 of 1 model ready; 1 loading")
        assert EXTEND_EVERY_S * 2 < EXTEND_BY_S
        world.pass_time(30)
        assert world.core.state == "ready"
        heart.ready(world.core, world.now_s)
        assert manager.heard()[-1]["READY"] == "1"
        pass_time(heart, world, 30)
        assert not [n for n in manager.heard() if "EXTEND_TIMEOUT_USEC" in n]


def answer(world: World, count: int) -> None:
    for _ in range(count):
        world.infer("m")
        world.finish_runs()
        world.settle()


def test_requests_per_second_are_told_when_they_move(manager: Manager) -> None:
    """A steady load is told once; its end is told, too."""
    world = serving("m")
    with Notifier(manager.environ) as notifier:
        heart = Heartbeat(notifier)
        beat(heart, world)
        manager.heard()
        for second in range(50):
            answer(world, 4 + second % 2)
            world.now_s += 1.0
            beat(heart, world)
        told = [n["STATUS"] for n in manager.heard() if "STATUS" in n]
        assert len(told) == 1
        assert "; 4.5 requests/s" in told[0]
        pass_time(heart, world, 30)
        told = [n["STATUS"] for n in manager.heard() if "STATUS" in n]
        assert "requests/s" not in told[-1]
        assert len(told) <= 2


def test_a_request_now_and_then_changes_nothing(manager: Manager) -> None:
    """One every fifteen seconds: the line stays, and systemd sleeps."""
    world = serving("m")
    with Notifier(manager.environ) as notifier:
        heart = Heartbeat(notifier)
        beat(heart, world)
        for _ in range(8):
            manager.heard()
            answer(world, 1)
            pass_time(heart, world, 15)
            assert not [n for n in manager.heard() if "STATUS" in n]


def test_pressure_is_told_by_its_level(manager: Manager) -> None:
    """The sentence with which it began stays, since its figures change with every look."""
    world = serving("m")
    with Notifier(manager.environ) as notifier:
        heart = Heartbeat(notifier)
        beat(heart, world)
        assert "; pressure OK" in manager.heard()[-1]["STATUS"]
        for free in range(1000, 1030):
            world.send(Sampled(sample(free=free * MIB)))
            pass_time(heart, world, 1)
        told = [n["STATUS"] for n in manager.heard() if "STATUS" in n]
        assert len(told) == 1
        assert "pressure REFUSE_LOADS: 10" in told[0]


def test_what_the_loop_has_to_add_is_told(manager: Manager) -> None:
    """A restart that is needed, a disk that hangs; and no longer when it is over."""
    world = serving()
    with Notifier(manager.environ) as notifier:
        heart = Heartbeat(notifier)
        assert heart.ready(world.core, world.now_s, ["a restart is needed for limits.frames"]).endswith(
            "; a restart is needed for limits.frames"
        )
        manager.heard()
        for notes in (("a disk has not answered for 2 minutes",), ()):
            world.now_s += 3.0
            beat(heart, world, notes=notes)
            assert (notes[0] if notes else "pressure OK") in manager.heard()[-1]["STATUS"]
