"""A real worker process in a test's hands: waits on real events, with a bound."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from edged import arrays
from edged.arena import aligned
from edged.process import Spawner, WorkerGone, WorkerLimits, WorkerProcess

WAIT_S = 60.0
"""Far beyond what anything takes, also on a machine that is busy."""


class Handle:
    """One worker; ended with the `with` block."""

    def __init__(
        self,
        spawner: Spawner,
        runtime: str = "onnxruntime",
        *,
        gpu: bool = False,
        data_bytes: int | None = None,
        file_bytes: int = 1 << 30,
        measurer: bool = False,
    ) -> None:
        limits = WorkerLimits(data_bytes, file_bytes)
        self.runtime = runtime
        self.process: WorkerProcess = (
            spawner.spawn_measurer(limits=limits)
            if measurer
            else spawner.spawn(runtime, gpu=gpu, limits=limits, slots=2)
        )
        self._runs = 0
        self._said: list[list[Any]] | None = None
        self._answers: list[list[Any]] = []

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.process.kill()
        self.process.close()
        self.ended()

    def control(self, kind: str) -> list[Any]:
        """The next packet of the control channel, which must be of this kind."""
        packet = self._next_said()
        assert packet[0] == kind, packet
        return packet

    def ask(self, *packet: Any) -> None:
        """Sends a command."""
        assert self.process.send_control(list(packet))

    def load(self, path: Path, instance: int = 1, **settings: Any) -> list[Any]:
        """Loads and returns what the worker says: loaded or load_failed."""
        if self._said is None:
            self.control("hello")
        wanted = {"path": str(path), "format": "onnx", "runtime": self.runtime, "device": "CPU", "threads": 1}
        assert self.process.widen(settings.get("instances", 1))
        self.ask("load", instance, {**wanted, **settings})
        return self._next_said()

    def _next_said(self) -> list[Any]:
        if self._said is None:
            self._said = []
        deadline = time.monotonic() + WAIT_S
        while not self._said:
            _wait_readable(self.process.control_fd, deadline)
            self._said += [said for said in self.process.recv_control() if said[0] != "proving"]
        return self._said.pop(0)

    def send(
        self,
        inputs: Mapping[str, Any],
        *,
        instance: int = 1,
        slot: int = 0,
        outputs: Any = None,
        deadline_ns: int = 0,
    ) -> int:
        """Sends a run; its id."""
        self._runs += 1
        placed, at = [], 0
        for name, array in inputs.items():
            datatype, shape, raw = arrays.to_raw(np.asarray(array))
            at = aligned(at)
            view = self.process.arena.slot_view(slot, at + len(raw))
            view[at : at + len(raw)] = raw
            placed.append([name, datatype, shape, at, len(raw)])
            at += len(raw)
        assert self.process.send_run(["run", self._runs, instance, slot, deadline_ns, placed, outputs])
        return self._runs

    def answer(self) -> list[Any]:
        """The next answer. Raises WorkerGone."""
        deadline = time.monotonic() + WAIT_S
        while not self._answers:
            _wait_readable(self.process.data_fd, deadline)
            self._answers += self.process.recv_data()
        return self._answers.pop(0)

    def infer(self, inputs: Mapping[str, Any], **where: Any) -> dict[str, Any]:
        """Runs and returns the outputs as arrays, or as (datatype, data) where they are none."""
        self.send(inputs, **where)
        packet = self.answer()
        assert packet[0] == "done", packet
        outputs: dict[str, Any] = {}
        for name, datatype, shape, offset, nbytes, *data in packet[3]:
            if data:
                outputs[name] = (datatype, msgpack.unpackb(data[0], strict_map_key=False))
            else:
                raw = self.process.arena.read(packet[2], offset, nbytes)
                outputs[name] = np.array(arrays.from_raw(datatype, shape, raw))
        return outputs

    def ended(self) -> str:
        """Waits until the process has ended, and how."""
        deadline = time.monotonic() + WAIT_S
        while True:
            how = self.process.reap()
            if how is not None:
                return how
            assert time.monotonic() < deadline, "the worker does not end"
            if self.process.pid is not None:
                _wait_exit(self.process.pid, deadline)
            else:
                time.sleep(0.005)  # the template has not yet said who it is: there is nothing to wait on

    def gone(self) -> str:
        """Waits for the hang-up, and then for the end."""
        deadline = time.monotonic() + WAIT_S
        try:
            while True:
                _wait_readable(self.process.data_fd, deadline)
                self.process.recv_data()
        except WorkerGone:
            return self.ended()


def _wait_readable(fd: int, deadline: float) -> None:
    ready, _, _ = select.select([fd], [], [], max(0.0, deadline - time.monotonic()))
    assert ready, "the worker says nothing"


def _wait_exit(pid: int, deadline: float) -> None:
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        select.select([fd], [], [], max(0.0, deadline - time.monotonic()))
    finally:
        os.close(fd)
