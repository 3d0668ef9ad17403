"""The daemon's processes: workers, probes, and the one measurement.

Owns every child and its descriptors: starts it, carries packets to it and turns what it says into events,
finds out how it ended, and reaps it. It decides nothing: which worker runs what is the core's word, which
comes as an effect; what happened goes back as an event. Whatever a child says was checked by `process`; what
it says about memory is checked here against what it really has.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import select
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from edged.arena import ArenaBoundsError
from edged.assembly import batch_bytes, inputs_bytes, place_batch, place_inputs
from edged.errors import ResourceExhausted
from edged.events import (
    Event,
    InstanceLoaded,
    InstanceLoadFailed,
    InstanceProving,
    LoadInstance,
    Measured,
    Probe,
    Probed,
    RunDone,
    RunFailed,
    SendResult,
    StartMeasure,
    StartRun,
    StartWorker,
    StopMeasure,
    WorkerGone,
    WorkerHello,
)
from edged.messages import RegionPart, TensorData
from edged.process import ProbeProcess, Spawner, WorkerLimits, WorkerProcess
from edged.process import WorkerGone as HungUp
from edged.scheduler import Job
from edged.wire import Output

__all__ = ["Children", "Loop"]

REAP_S = 0.005
"""How often a worker that hung up is asked how it ended: the kernel may still be freeing its memory."""

REAP_MAX_S = 2.0
"""After which one that hung up and lives on is killed."""

END_S = 1.0
"""How long children have to end by themselves when the daemon stops."""

DEADLINE_NS_MAX = (1 << 63) - 1
"""A run's deadline on the wire to its worker: whoever gives a request longer than 292 years gives it this."""


def inputs_memfd(inputs: Sequence[TensorData]) -> tuple[int, list[list[Any]]]:
    """A memfd that holds these inputs, and where in it each of them lies. Raises OSError."""
    size = inputs_bytes(inputs)
    fd = os.memfd_create("edged-inputs", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, max(1, size))
        with mmap.mmap(fd, max(1, size)) as memory, memoryview(memory) as view:
            rows, _ = place_inputs(view, inputs)
    except BaseException:
        os.close(fd)
        raise
    return fd, rows


class Loop(Protocol):
    """Where descriptors are waited for."""

    def watch(self, fd: int, ready: Callable[[], None]) -> None:
        """Calls `ready` whenever `fd` is readable."""

    def unwatch(self, fd: int) -> None:
        """No longer; harmless for a descriptor that is not watched."""


class _Reaping:
    """A worker that hung up, until the kernel has told how it ended."""

    def __init__(self, worker: int, process: WorkerProcess, now_s: float) -> None:
        self.worker = worker
        self.process = process
        self.kill_at_s = now_s + REAP_MAX_S


class Children:
    """Every process below the daemon; `step` takes the events, `region_fd` gives a leased region's memory.

    `measure_file_bytes` bounds what a measurement's outputs may take.
    """

    def __init__(
        self,
        *,
        loop: Loop,
        step: Callable[[Event], object],
        region_fd: Callable[[int], int],
        pythons: Mapping[str, str],
        environ: Mapping[str, str],
        measure_file_bytes: int,
        probe_timeout_s: Callable[[], float],
    ) -> None:
        self._loop = loop
        self._step = step
        self._region_fd = region_fd
        self._measure_file_bytes = measure_file_bytes
        self._probe_timeout_s = probe_timeout_s
        self.spawner = Spawner(pythons=pythons, environ=environ)
        self._workers: dict[int, WorkerProcess] = {}
        self._owners: dict[int, WorkerProcess] = {}
        """Whose a descriptor is, for those that are a worker's."""
        self._hung_ups: set[int] = set()
        """Workers that hung up, while what they said before that is told: they are given nothing more."""
        self._reaping: list[_Reaping] = []
        self._doomed: list[WorkerProcess] = []
        self._probes: dict[ProbeProcess, float] = {}
        self._measure: tuple[int, WorkerProcess] | None = None
        self._templates: dict[str, int] = {}
        self.reap_at_s = math.inf
        """When `reap` is to be called, at the latest."""

    def __repr__(self) -> str:
        return f"<Children workers={len(self._workers)} probes={len(self._probes)}>"

    # ------------------------------------------------------------------ workers

    def start_worker(self, effect: StartWorker) -> None:
        limits = WorkerLimits(effect.data_bytes, effect.file_bytes)
        try:
            process = self.spawner.spawn(effect.runtime, gpu=effect.gpu, limits=limits, slots=effect.slots)
        except OSError as e:  # no memory, no descriptors
            self._step(WorkerGone(effect.worker, f"it could not be started: {e.strerror}"))
            return
        self._workers[effect.worker] = process
        self._owners[process.data_fd] = self._owners[process.control_fd] = process
        self._loop.watch(process.data_fd, lambda: self._on_data(effect.worker, process))
        self._loop.watch(process.control_fd, lambda: self._on_control(effect.worker, process))

    def load(self, effect: LoadInstance) -> None:
        """Tells a worker to load, and gives it before that a slot for each run that it may then be given."""
        process = self._workers.get(effect.worker)
        if process is None:
            return
        try:
            if not process.widen(effect.spec.get("instances", 1)):
                process.kill()  # its control thread has not read for hundreds of packets
        except OSError as e:  # no memory, no descriptors: the load fails, what is loaded serves on
            message = f"no memory to share with the worker: {e.strerror}"
            code = ResourceExhausted("").code.value
            self._step(InstanceLoadFailed(effect.worker, effect.instance, code, "MEMORY_LIMIT", message))
            return
        except HungUp:
            self._hung_up(effect.worker, process)
            return
        self.tell(effect.worker, ["load", effect.instance, effect.spec])

    def tell(self, worker: int, packet: list[Any]) -> None:
        """A word on a worker's control socket; one that is gone does not hear it."""
        process = self._workers.get(worker)
        if process is None:
            return
        try:
            if not process.send_control(packet):
                process.kill()  # its control thread has not read for hundreds of packets
        except HungUp:
            self._hung_up(worker, process)

    def kill(self, worker: int) -> None:
        """Ends a worker at once; its end is told when the kernel tells it."""
        process = self._workers.get(worker)
        if process is not None:
            process.kill()

    def kill_owner(self, fd: int) -> None:
        """Ends the worker whose descriptor brought what nobody can deal with."""
        process = self._owners.get(fd)
        if process is not None:
            process.kill()

    def _on_data(self, worker: int, process: WorkerProcess) -> None:
        try:
            packets = process.recv_data()
        except HungUp:
            self._hung_up(worker, process)
            return
        self._end_runs(worker, packets)

    def _end_runs(self, worker: int, packets: list[list[Any]]) -> None:
        for packet in packets:
            if packet[0] == "done":
                self._step(RunDone(worker, packet[1], packet[3], packet[4]))
            elif packet[0] == "failed":
                self._step(RunFailed(worker, packet[1], packet[3], packet[4], packet[5]))

    def _on_control(self, worker: int, process: WorkerProcess) -> None:
        try:
            packets = process.recv_control()
        except HungUp:
            self._hung_up(worker, process)
            return
        for packet in packets:
            match packet:
                case ["hello", pid, *_]:
                    self._step(WorkerHello(worker, pid))
                case ["proving", instance]:
                    self._step(InstanceProving(worker, instance))
                case ["loaded", instance, info]:
                    self._step(InstanceLoaded(worker, instance, info))
                case ["load_failed", instance, code, reason, message]:
                    self._step(InstanceLoadFailed(worker, instance, code, reason, message))

    def _hung_up(self, worker: int, process: WorkerProcess) -> None:
        if self._workers.get(worker) is not process or worker in self._hung_ups:
            return
        self._hung_ups.add(worker)
        # What the worker said before it ended is still told, and in its order.
        try:
            with contextlib.suppress(HungUp):
                while packets := process.recv_data():
                    self._end_runs(worker, packets)
        finally:
            self._hung_ups.discard(worker)
        for fd in (process.data_fd, process.control_fd):
            self._owners.pop(fd, None)
            self._loop.unwatch(fd)
        del self._workers[worker]
        self._reaping.append(_Reaping(worker, process, time.monotonic()))
        self.reap(time.monotonic())

    def reap(self, now_s: float) -> None:
        """Asks how those ended that hung up."""
        for reaping in list(self._reaping):
            how = reaping.process.reap()
            if how is None:
                if now_s >= reaping.kill_at_s:
                    reaping.process.kill()
                continue
            self._reaping.remove(reaping)
            reaping.process.close()
            self._step(WorkerGone(reaping.worker, how))
        for process in list(self._doomed):
            if process.reap() is not None:
                self._doomed.remove(process)
        self.reap_at_s = now_s + REAP_S if self._reaping or self._doomed else math.inf

    # ------------------------------------------------------------------ runs

    def start_run(self, effect: StartRun) -> None:
        """Puts the inputs into the slot's memory and tells the worker to run."""
        process = self._workers.get(effect.worker)
        if process is None or effect.worker in self._hung_ups:
            return  # It hung up; its end is about to be told, and answers this run.
        jobs = effect.jobs
        try:
            if len(jobs) == 1:
                inputs = jobs[0].inputs
                view = process.arena.slot_view(effect.slot, inputs_bytes(inputs))
                tensors, leased = place_inputs(view, inputs)
            else:
                view = process.arena.slot_view(effect.slot, batch_bytes(jobs))
                tensors, leased = place_batch(view, jobs)
            deadline_s = effect.deadline_s
            deadline_ns = 0 if deadline_s == math.inf else min(int(deadline_s * 1e9), DEADLINE_NS_MAX)
            packet = [
                "run",
                effect.run_id,
                effect.instance,
                effect.slot,
                deadline_ns,
                tensors,
                jobs[0].outputs,
            ]
            if leased or jobs[0].into is not None:
                packet.append(self._share_regions(process, jobs))
            if not process.send_run(packet):
                process.kill()  # one packet a slot outstanding at most: a full socket is a worker gone wrong
        except ResourceExhausted as e:
            self._step(RunFailed(effect.worker, effect.run_id, e.code.value, e.reason or "", e.message))
        except HungUp:
            self._hung_up(effect.worker, process)

    def _share_regions(self, process: WorkerProcess, jobs: Sequence[Job]) -> dict[str, list[int]]:
        """Gives a worker the leased memory that a run uses, each region once; returns where outputs go."""
        into = jobs[0].into or {}
        parts = [tensor.part for job in jobs for tensor in job.inputs if tensor.part is not None]
        for part in (*parts, *into.values()):
            if part.region not in process.regions:
                if not process.send_control(["region", part.region], self._region_fd(part.region)):
                    process.kill()  # its control thread has not read for hundreds of packets
                process.regions.add(part.region)
        return {name: [part.region, part.offset, part.nbytes] for name, part in into.items()}

    def forget_region(self, region: int) -> None:
        """Leased memory is gone: whoever maps it lets go of it."""
        for worker, process in list(self._workers.items()):
            if region in process.regions:
                process.regions.discard(region)
                self.tell(worker, ["region_gone", region])

    def outputs(self, effect: SendResult) -> tuple[list[Output], dict[str, RegionPart] | None]:
        """A run's outputs, viewed where the worker put them, and those that it put into leased memory.

        The views hold until the slot is used again. Raises ArenaBoundsError when the worker named bytes that
        it has not; it is then on its way to its end.
        """
        process = self._workers[effect.worker]
        outputs: list[Output] = []
        into = effect.job.into
        landed: dict[str, RegionPart] | None = None if into is None else {}
        try:
            for row in effect.outputs:
                if row[2] is None:
                    outputs.append((row[0], row[1], None, row[5]))
                elif into is not None and landed is not None and row[0] in into:
                    landed[row[0]] = _landed(into[row[0]], row[4])
                    outputs.append((row[0], row[1], row[2], b""))
                else:
                    outputs.append((row[0], row[1], row[2], process.arena.read(effect.slot, row[3], row[4])))
        except ArenaBoundsError as e:
            process.kill()
            raise ArenaBoundsError(f"worker {process.pid} named bytes that it has not: {e}") from None
        return outputs, landed

    def shrink(self, free_slots: Mapping[int, Iterable[int]]) -> None:
        """Every worker gives back the memory that it can, and the slots that are free are emptied."""
        for worker, process in list(self._workers.items()):
            self.tell(worker, ["shrink"])
            for slot in free_slots.get(worker, ()):
                process.arena.shrink(slot)

    # ------------------------------------------------------------------ probes

    def probe(self, effect: Probe) -> None:
        """Tries a device in a child with a time limit."""
        probe = self.spawner.probe(effect.runtime, effect.device)
        self._probes[probe] = time.monotonic() + self._probe_timeout_s()
        self._loop.watch(probe.fd, lambda: self._probe_ready(probe, probe.fd))

    def _probe_ready(self, probe: ProbeProcess, fd: int) -> None:
        # The child closes its end and then exits; until it has, the descriptor stays readable.
        verdict = probe.result()
        if verdict is None:
            return
        self._loop.unwatch(fd)
        self._probes.pop(probe, None)
        self._step(Probed(verdict))

    # ------------------------------------------------------------------ the measurement

    def start_measure(self, effect: StartMeasure) -> None:
        with contextlib.ExitStack() as stack:
            inputs: int | None = None
            spec = effect.spec
            if effect.inputs:
                try:
                    inputs, rows = inputs_memfd(effect.inputs)
                except OSError as e:
                    self._step(Measured(effect.measure, None, f"no memory for the inputs: {e.strerror}"))
                    return
                stack.callback(os.close, inputs)
                spec = {**spec, "owner_inputs": rows}
            self._start_measurer(effect, spec, inputs)

    def _start_measurer(self, effect: StartMeasure, spec: dict[str, Any], inputs: int | None) -> None:
        process = self.spawner.spawn_measurer(
            limits=WorkerLimits(effect.data_bytes, self._measure_file_bytes)
        )
        self._measure = (effect.measure, process)
        self._loop.watch(process.control_fd, lambda: self._measure_ready(effect.measure, process))
        with contextlib.suppress(HungUp):
            process.send_control(["measure", spec], inputs)

    def _measure_ready(self, measure: int, process: WorkerProcess) -> None:
        try:
            packets = process.recv_control()
        except HungUp:
            self._end_measure(process)
            self._step(Measured(measure, None, process.reap() or "its worker ended"))
            return
        for packet in packets:
            if packet[0] == "measured":
                self._end_measure(process)
                self._step(Measured(measure, packet[1]))
                return

    def _end_measure(self, process: WorkerProcess) -> None:
        self._measure = None
        self._loop.unwatch(process.control_fd)
        process.close()
        process.kill()
        self._doomed.append(process)
        self.reap_at_s = time.monotonic() + REAP_S

    def stop_measure(self, effect: StopMeasure) -> None:
        if self._measure is not None and self._measure[0] == effect.measure:
            self._end_measure(self._measure[1])

    # ------------------------------------------------------------------ time

    def look_after(self, now_s: float) -> dict[str, int]:
        """Once in a while: ends probes past their time; the templates that died, with their pids."""
        self.spawner.drain()
        templates = self.spawner.templates()
        died = {r: pid for r, pid in self._templates.items() if r not in templates}
        self._templates = templates
        for probe, until_s in list(self._probes.items()):
            if now_s >= until_s:
                probe.kill()
        return died

    def end(self) -> None:
        """Tells every child to end; `wait_ended` waits for it."""
        if self._measure is not None:
            self._end_measure(self._measure[1])
        for probe in self._probes:
            probe.close()
        for process in self._all():
            with contextlib.suppress(HungUp):
                process.send_control(["exit"])

    def wait_ended(self) -> None:
        """Waits for every child's end, and kills those that take too long."""
        processes = self._all()
        until_s = time.monotonic() + END_S
        while any(p.reap() is None for p in processes):
            if time.monotonic() >= until_s:
                for process in processes:
                    process.kill()
                until_s += END_S
            select.select([], [], [], REAP_S)
        for process in processes:
            process.close()

    def close(self) -> None:
        """Ends the templates; idempotent."""
        self.spawner.close()

    def _all(self) -> list[WorkerProcess]:
        return [*self._workers.values(), *[r.process for r in self._reaping], *self._doomed]


def _landed(place: RegionPart, nbytes: Any) -> RegionPart:
    """What of `place` a worker says that it has written. Raises ArenaBoundsError for more than it has."""
    if type(nbytes) is not int or not 0 <= nbytes <= place.nbytes:
        raise ArenaBoundsError(f"{nbytes} bytes of a region's part of {place.nbytes}")
    return RegionPart(place.region, place.name, place.offset, nbytes)
