"""The daemon's processes: what a worker said is told in its order, also when it has hung up meanwhile."""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any

import msgpack
import pytest

from edged.arena import Arena
from edged.children import Children
from edged.events import Event, RunDone, SendResult, StartRun
from edged.messages import Peer, TensorData
from edged.process import WorkerProcess
from edged.scheduler import Job


class Watched:
    """The loop's part: what is watched, and nothing waits."""

    def __init__(self) -> None:
        self.fds: dict[int, Callable[[], None]] = {}

    def watch(self, fd: int, ready: Callable[[], None]) -> None:
        """Notes it."""
        self.fds[fd] = ready

    def unwatch(self, fd: int) -> None:
        """Forgets it."""
        self.fds.pop(fd, None)


class Bench:
    """Children with one worker, whose ends of the sockets the test holds."""

    def __init__(self) -> None:
        self.loop, self.told = Watched(), list[Event]()
        self.answer: Callable[[Event], None] = lambda _: None
        self.children = Children(
            loop=self.loop,
            step=self.step,
            region_fd=lambda _: -1,
            pythons={},
            environ=os.environ,
            measure_file_bytes=1 << 20,
            probe_timeout_s=lambda: 1.0,
        )
        data, self.data = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        control, self.control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (data, control):
            end.setblocking(False)
        self.process = WorkerProcess("none", Arena(2, bytes_max=1 << 20), data, control)
        self.children._workers[1] = self.process
        self.control_ready = lambda: self.children._on_control(1, self.process)
        self.loop.watch(self.process.control_fd, self.control_ready)

    def step(self, event: Event) -> None:
        """As the daemon's: the event is told, and what follows from it is done before anything else."""
        self.told.append(event)
        self.answer(event)

    def start(self, run_id: int, *, deadline_s: float = math.inf) -> None:
        """Has the worker given a run."""
        effect = StartRun(1, run_id, 7, run_id % 2, [a_job()], 1, deadline_s)
        self.children.start_run(effect)

    def hang_up(self) -> None:
        """The worker ends, with all its sockets at once."""
        self.data.close()
        self.control.close()

    def close(self) -> None:
        """Whatever is left."""
        self.hang_up()
        self.process.close()


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.close()


def a_job() -> Job:
    """A request of one small tensor."""
    x = TensorData("x", "FP32", [1], b"\0\0\x80?")
    return Job((b"c",), 1, Peer(0, 0, 1), 7, [x], None, 4, 0.0, math.inf, 5, [])


def test_what_was_done_before_the_end_is_told_though_more_is_dispatched_meanwhile(bench: Bench) -> None:
    """A finished run makes the core dispatch the next to a worker that is gone: nobody's answer is lost."""
    seen: list[Any] = []
    for run_id in (2, 3):
        bench.start(run_id)
        done = ["done", run_id, run_id % 2, [["y", "FP32", [1], 0, 4]], 1000]
        bench.data.send(msgpack.packb(done))

    def core(event: Event) -> None:
        if isinstance(event, RunDone):
            effect = SendResult(a_job(), "m", "1", 1, event.run_id % 2, event.outputs, {}, (1, 0, 0, 0))
            seen.append([bytes(output[3]) for output in bench.children.outputs(effect)[0]])
            bench.start(event.run_id + 10)

    bench.answer = core
    bench.hang_up()
    bench.control_ready()
    assert seen == [[b"\0\0\x80?"], [b"\0\0\x80?"]]
    assert not bench.loop.fds
    assert repr(bench.children) == "<Children workers=0 probes=0>"


@pytest.mark.parametrize("deadline_s", [math.inf, 5.0, 2.0**63 / 1e6])
def test_a_deadline_reaches_the_worker_however_far_it_is(bench: Bench, deadline_s: float) -> None:
    """The longest time that the protocol takes is more nanoseconds than its integers hold."""
    bench.start(2, deadline_s=deadline_s)
    packet = msgpack.unpackb(bench.data.recv(4096))
    assert packet[:5] == [
        "run",
        2,
        7,
        0,
        0 if deadline_s == math.inf else min(int(deadline_s * 1e9), 2**63 - 1),
    ]
    assert not bench.told
