"""The one decider: an event and the time go in, effects come out.

Pure: no socket, no process, no file, no clock, no log. `Core.handle` is all that the daemon calls; everything
that can happen is an event, everything that is to be done an effect. The core itself owns the requests' way
(which the scheduler keeps in order). It puts together the modules that have the models' way and hands each
event to its owner: to `entries` what happened in the folder, to `lifecycle` what happened to an instance, to
`placement` what happened to a device, to `chooser` what was measured. Its promise: every request that it is
given is answered exactly once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from edged import resources, status
from edged.choosing import Chooser
from edged.config import Config
from edged.devices import Verdict
from edged.entries import Entries
from edged.errors import (
    Cancelled,
    DeadlineExceeded,
    EdgedError,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
    make_error,
)
from edged.events import (
    BadMessage,
    CancelRun,
    ConfigChanged,
    DevicesChanged,
    Effect,
    Event,
    Exit,
    FolderScanned,
    FreeRegion,
    GrantRegion,
    InstanceLoaded,
    InstanceLoadFailed,
    LaneBadPacket,
    LaneClosed,
    LaneOpened,
    LanePacket,
    LaneReply,
    LoadPrepared,
    Log,
    Measured,
    Probed,
    Publish,
    RegionFailed,
    Reply,
    RequestArrived,
    RunDone,
    RunFailed,
    Sampled,
    Scan,
    SendResult,
    SetLogLevel,
    ShrinkWorkers,
    ShutdownAsked,
    Staged,
    StageFailed,
    StartRun,
    Tick,
    UnloadInstance,
    WorkerGone,
    WorkerHello,
)
from edged.happenings import Happenings
from edged.instances import SLOTS_PER_WORKER, Instance, InstanceState, Machine, Surroundings, Worker
from edged.lifecycle import RUN_HUNG, Lifecycle
from edged.messages import InputTensor, Peer, RegionPart, RequestId, Route, TensorData
from edged.placement import Placement
from edged.regions import Regions
from edged.registry import Registry
from edged.scheduler import Job, JobState, Scheduler
from edged.tensors import ITEM_BYTES, check_shape, shape_text
from edged.wire import (
    WireLimits,
    cut,
    input_data,
    leased_input,
    region_reference,
    timing_parameters,
    unknown_parameters,
)
from edged.workers import Workers

__all__ = ["Core", "Identity"]

RUN_LIMIT_S = 120.0
"""The hard limit of a run when the model's settings name none: a hang must end."""

RUN_GRACE_S = 2.0
"""From asking the runtime to stop a run until its worker is killed."""

SPIN_RUN_MAX_S, SPIN_S = 100e-6, 150e-6
"""The runs whose answer is looked for without sleeping, and the most that each may cost the supervisor."""

LOG_LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True)
class Identity:
    """Which daemon this is."""

    version: str
    instance_id: str
    pid: int


@dataclass(eq=False)
class _Run:
    job: Job
    instance: Instance
    worker: Worker
    slot: int
    stop_at_s: float = math.inf
    kill_at_s: float = math.inf


class Core:
    """The state of the whole daemon, and what follows from each event."""

    def __init__(
        self,
        config: Config,
        *,
        machine: Machine,
        identity: Identity,
        now_s: float,
        epoch_offset_s: float = 0.0,
        page_bytes: int = 4096,
        regions_max: int = 256,
    ) -> None:
        self.around = Surroundings(config, machine, self._emit)
        self.identity = identity
        self.started_s = now_s
        self.epoch_offset_s = epoch_offset_s
        """Wall-clock time minus monotonic time; the daemon keeps it current."""
        self.stopping = False
        self.log_level = config.log.level
        self.spin_until_s = 0.0
        """Until then the answer of a short run is so near that sleeping for it would take longer."""
        self.sample: resources.Sample | None = None
        self.happenings = Happenings()
        self._now_s = now_s
        self.counters = {"requests": 0, "refused": 0, "bad_messages": 0, "inferences": 0}
        self._stop_at_s = math.inf
        self._seq = 0
        self._out: list[Effect] = []
        self._runs: dict[int, _Run] = {}
        self._run_ids = 0
        self._run_check_s = math.inf
        self._slow_due_s: float | None = None
        limits = config.limits
        self.scheduler = Scheduler(
            queue_length=limits.queue_length,
            queue_bytes=limits.queue_bytes,
            inflight_per_client=limits.inflight_per_client,
            clients=limits.clients,
        )
        self.regions = Regions(
            bytes_per_uid=limits.lease_bytes,
            per_connection=limits.leases,
            count_max=regions_max,
            page_bytes=page_bytes,
        )
        self.registry = Registry()
        self.workers = Workers(self.around)
        self.placement = Placement(self.around, now_s=now_s)
        self.lifecycle = Lifecycle(
            self.around,
            registry=self.registry,
            workers=self.workers,
            placement=self.placement,
            hooks=self,
            now_s=now_s,
        )
        self.entries = Entries(self.around, registry=self.registry, lifecycle=self.lifecycle)
        self.chooser = Chooser(
            self.around,
            registry=self.registry,
            workers=self.workers,
            placement=self.placement,
            lifecycle=self.lifecycle,
            now_s=now_s,
        )
        self._handlers: dict[type[Event], Callable[[Any, float], None]] = {
            RequestArrived: self._on_request,
            RunDone: self._on_run_done,
            RunFailed: self._on_run_failed,
            BadMessage: self._on_bad_message,
            LaneOpened: lambda e, _: self._on_lane(e),
            LanePacket: lambda e, _: self._on_lane(e),
            LaneBadPacket: lambda e, _: self._on_lane(e),
            RegionFailed: lambda e, _: self._on_lane(e),
            LaneClosed: lambda e, _: self._on_lane(e),
            Tick: self._on_tick,
        }

    @property
    def wire_limits(self) -> WireLimits:
        """The wire's bounds, from the settings."""
        limits = self.around.config.limits
        return WireLimits(
            limits.header_bytes, limits.message_bytes, limits.frames, limits.tensors, limits.rank
        )

    @property
    def state(self) -> str:
        """`starting`, `ready` or `stopping`."""
        if self.stopping:
            return "stopping"
        return "ready" if self.lifecycle.ready else "starting"

    def handle(self, event: Event, now_s: float) -> list[Effect]:
        """What follows from `event` at `now_s` (CLOCK_MONOTONIC, seconds)."""
        self._now_s = now_s
        handler = self._handlers.get(type(event))
        if handler is not None:
            handler(event, now_s)
        else:
            self._on_slow(event, now_s)
            self.chooser.step(now_s)
            self._slow_due_s = self._slow_due(now_s)
        if self.stopping:
            self._maybe_exit()
        out, self._out = self._out, []
        return out

    def next_due_s(self) -> float | None:
        """When the next Tick is wanted, at the latest; None when nothing is due."""
        due = self._run_check_s if self._slow_due_s is None else min(self._run_check_s, self._slow_due_s)
        deadline = self.scheduler.next_deadline_s()
        if deadline is not None and deadline < due:
            due = deadline
        due = min(due, self._stop_at_s)
        return None if due == math.inf else due

    def _slow_due(self, now_s: float) -> float | None:
        found = [d for d in (self.lifecycle.next_due_s(), self.chooser.next_due_s()) if d is not None]
        return min(found, default=None)

    def _emit(self, effect: Effect) -> None:
        if isinstance(effect, Publish):
            self._seq += 1
            effect.payload["seq"] = self._seq
            effect.payload["instance_id"] = self.identity.instance_id
        elif isinstance(effect, Log):
            self.happenings.note(effect.kind, effect.fields, self._now_s + self.epoch_offset_s)
        self._out.append(effect)

    # ------------------------------------------------------------------ requests

    def _on_request(self, event: RequestArrived, now_s: float) -> None:
        request = event.request
        self.counters["requests"] += 1
        try:
            if request.method == "model_infer":
                self._infer(event, now_s)
            else:
                header = self._call(event, now_s)
                header["id"] = request.id
                self._out.append(Reply(event.route, event.socket, header))
        except EdgedError as error:
            self._refuse(event.route, event.socket, request.id, error)
            if isinstance(error, InvalidArgument):
                self._note_bad(event.peer, error)

    def _on_bad_message(self, event: BadMessage, now_s: float) -> None:
        self.counters["bad_messages"] += 1
        self._refuse(event.route, event.socket, event.request_id, event.error)
        self._note_bad(event.peer, event.error)

    def _note_bad(self, peer: Peer, error: EdgedError) -> None:
        fields = {
            "CLIENT_UID": str(peer.uid),
            "CLIENT_PID": str(peer.pid),
            "REASON": error.reason or error.code.value,
            "DETAIL": error.message,
        }
        self._out.append(Log("client_misbehaves", fields))

    def _refuse(self, route: Route, socket: str, request_id: RequestId, error: EdgedError) -> None:
        self.counters["refused"] += 1
        self._out.append(Reply(route, socket, {"id": request_id, "error": error.to_wire()}))

    def _infer(self, event: RequestArrived, now_s: float) -> None:
        request = event.request
        if self.stopping:
            raise Unavailable("the daemon is stopping", reason="SERVER_STOPPING", retry_after_ms=2000)
        measuring = self.chooser.running
        self.chooser.note_request(now_s)
        if measuring:
            self._slow_due_s = self._slow_due(now_s)
        timeout_s, deadline_s, priority = timing_parameters(request)
        due_s = math.inf if timeout_s is None else now_s + timeout_s
        if deadline_s is not None:
            due_s = min(due_s, deadline_s)
            if due_s <= now_s:
                raise DeadlineExceeded("the request arrived after its deadline", reason="EXPIRED_ON_ARRIVAL")
        instance = self.registry.lookup(request.model_name, request.model_version)
        scheduler = self.scheduler
        scheduler.check_room(event.route, request.id)
        parts: list[RegionPart] = []
        try:
            inputs = self._inputs(instance, event, parts)
            outputs, into = self._outputs(instance, event, parts)
        except EdgedError:
            instance.stats.failure("reject", 0)
            raise
        job = Job(
            route=event.route,
            request_id=request.id,
            peer=event.peer,
            instance=instance.id,
            inputs=inputs,
            outputs=outputs,
            nbytes=sum([len(t.raw) for t in inputs]),
            arrived_s=now_s,
            deadline_s=due_s,
            priority=priority,
            warnings=unknown_parameters(request),
        )
        try:
            scheduler.admit(job, queue_length=instance.settings.queue_length, mean_run_s=instance.mean_run_s)
        except EdgedError:
            instance.stats.failure("reject", 0)
            raise
        if parts:
            job.into = into
            job.regions = tuple({part.region for part in parts})
            self.regions.hold(job.regions)
        worker = self.workers.table.get(instance.worker) if instance.worker is not None else None
        if worker is not None and worker.free_slots:
            self._dispatch(worker, now_s)

    def _inputs(self, instance: Instance, event: RequestArrived, parts: list[RegionPart]) -> list[TensorData]:
        specs = instance.inputs
        found = []
        for tensor in event.request.inputs:
            spec = specs.get(tensor.name)
            if spec is None:
                raise InvalidArgument(
                    f"model '{instance.name}' has no input '{cut(tensor.name)}'; it has "
                    + ", ".join(f"'{n}'" for n in specs),
                    reason="UNKNOWN_INPUT",
                )
            if tensor.datatype != spec.datatype:
                raise InvalidArgument(
                    f"input '{tensor.name}': expected {spec.datatype}, got {tensor.datatype}",
                    reason="BAD_DATATYPE",
                )
            check_shape(spec, tensor.shape)
            if tensor.parameters is None:
                found.append(input_data(tensor, event.frames))
            else:
                found.append(self._input_with_parameters(tensor, event, parts))
        if len(found) < len(specs):
            missing = instance.required.difference([t.name for t in found])
            if missing:
                name = min(missing)
                spec = specs[name]
                raise InvalidArgument(
                    f"input '{name}' is missing: {spec.datatype} {shape_text(spec.shape)}",
                    reason="MISSING_INPUT",
                )
        return found

    def _input_with_parameters(
        self, tensor: InputTensor, event: RequestArrived, parts: list[RegionPart]
    ) -> TensorData:
        reference = region_reference(tensor.parameters, f"input '{tensor.name}'")
        if reference is None:
            return input_data(tensor, event.frames)
        part = self.regions.resolve(event.peer.uid, reference)
        parts.append(part)
        return leased_input(tensor, part)

    def _outputs(
        self, instance: Instance, event: RequestArrived, parts: list[RegionPart]
    ) -> tuple[list[str] | None, dict[str, RegionPart] | None]:
        """Which outputs are wanted, and which of them in leased memory."""
        wanted = event.request.outputs
        if wanted is None:
            return None, None
        names = [ref.name for ref in wanted]
        for name in names:
            if name not in instance.outputs:
                raise InvalidArgument(
                    f"model '{instance.name}' has no output '{cut(name)}'; it has "
                    + ", ".join(f"'{n}'" for n in instance.outputs),
                    reason="UNKNOWN_OUTPUT",
                )
        if len(set(names)) != len(names):
            raise InvalidArgument("an output is asked for twice", reason="DUPLICATE_OUTPUT")
        into: dict[str, RegionPart] | None = None
        for ref in wanted:
            if ref.parameters is None:
                continue
            reference = region_reference(ref.parameters, f"output '{ref.name}'")
            if reference is None:
                continue
            datatype = instance.outputs[ref.name].datatype
            if datatype not in ITEM_BYTES:
                raise InvalidArgument(
                    f"output '{ref.name}' is {datatype}, whose size nobody knows before; "
                    "only tensors of numbers can land in a region",
                    reason="BAD_REGION",
                )
            part = self.regions.resolve(event.peer.uid, reference)
            parts.append(part)
            into = into or {}
            into[ref.name] = part
        return names, into

    # ------------------------------------------------------------------ leases

    def _drop(self, regions: tuple[int, ...]) -> None:
        """A request or a run has ended: what nobody leases and nobody uses any more is reclaimed."""
        self._out.extend([FreeRegion(each) for each in self.regions.drop(regions)])

    def _on_lane(self, event: LaneOpened | LanePacket | LaneBadPacket | RegionFailed | LaneClosed) -> None:
        match event:
            case LaneOpened():
                self.regions.connect(event.connection, event.peer.uid)
            case LanePacket():
                try:
                    self._lease(event)
                except EdgedError as error:
                    self._refuse_lane(event, event.request.id, error)
            case LaneBadPacket():
                self.counters["bad_messages"] += 1
                self._refuse_lane(event, event.request_id, event.error)
            case RegionFailed():
                freed = self.regions.release(event.connection, event.name)
                self._out.extend([FreeRegion(each) for each in freed])
                failure = ResourceExhausted(f"no memory to lease: {event.why}", reason="OUT_OF_MEMORY")
                header = {"id": event.request_id, "error": failure.to_wire()}
                self._out.append(LaneReply(event.connection, header))
            case LaneClosed():
                self._out.extend([FreeRegion(each) for each in self.regions.disconnect(event.connection)])

    def _lease(self, event: LanePacket) -> None:
        request = event.request
        if request.method == "lease_release":
            freed = self.regions.release(event.connection, request.region or "")
            self._out.extend([FreeRegion(each) for each in freed])
            self._out.append(LaneReply(event.connection, {"id": request.id}))
            return
        if self.stopping:
            raise Unavailable("the daemon is stopping", reason="SERVER_STOPPING", retry_after_ms=2000)
        guard = self.around.guard
        if guard is not None and guard.level >= resources.Level.REFUSE_LOADS:
            raise ResourceExhausted(
                f"memory is short: {'; '.join(guard.reasons)}; send the tensor as a frame",
                reason="MEMORY_PRESSURE",
                retry_after_ms=5000,
            )
        region = self.regions.acquire(event.connection, request.byte_size or 0, event.fresh_name)
        self._out.append(
            GrantRegion(event.connection, request.id, region.id, region.name, region.nbytes),
        )

    def _refuse_lane(
        self, event: LanePacket | LaneBadPacket, request_id: RequestId, error: EdgedError
    ) -> None:
        self.counters["refused"] += 1
        self._out.append(LaneReply(event.connection, {"id": request_id, "error": error.to_wire()}))
        if isinstance(error, InvalidArgument) or isinstance(event, LaneBadPacket):
            self._note_bad(event.peer, error)

    # ------------------------------------------------------------------ runs

    def _dispatch(self, worker: Worker, now_s: float) -> None:
        """Hands waiting jobs to a worker's free slots."""
        instances = self.registry.instances
        serving = [
            i
            for i in worker.instances
            if instances[i].state is InstanceState.READY or instances[i].state is InstanceState.DRAINING
        ]
        while worker.free_slots:
            job = self.scheduler.next(serving)
            if job is None:
                return
            instance = instances[job.instance]
            slot = worker.free_slots.pop()
            self._run_ids += 1
            run_id = self._run_ids
            job.run_id = run_id
            job.started_s = now_s
            if 0.0 < instance.mean_run_s < SPIN_RUN_MAX_S:
                self.spin_until_s = now_s + SPIN_S
            run = self._runs[run_id] = _Run(job, instance, worker, slot)
            if len(worker.free_slots) == SLOTS_PER_WORKER - 1:
                self._limit(run, now_s)
            if job.regions:
                self.regions.hold(job.regions)
            self._out.append(
                StartRun(worker.id, run_id, instance.id, slot, job.inputs, job.outputs, job.into)
            )

    def _limit(self, run: _Run, now_s: float) -> None:
        """A run's limit begins when it is the first at its worker: it is not blamed for those before it."""
        run.stop_at_s = now_s + (run.instance.settings.timeout_s or RUN_LIMIT_S)
        if run.stop_at_s < self._run_check_s:
            self._run_check_s = run.stop_at_s

    def _end_run(self, run_id: int, now_s: float) -> _Run | None:
        run = self._runs.pop(run_id, None)
        if run is not None:
            worker = run.worker
            worker.free_slots.append(run.slot)
            if len(worker.free_slots) < SLOTS_PER_WORKER:
                first = next(each for each in self._runs.values() if each.worker is worker)
                if first.stop_at_s == first.kill_at_s == math.inf:
                    self._limit(first, now_s)
            if not self._runs:
                self.spin_until_s = 0.0
            if run.job.regions:
                self._drop(run.job.regions)
        return run

    def _answered(self, job: Job) -> None:
        self.scheduler.answered(job)
        if job.regions:
            self._drop(job.regions)

    def _on_run_done(self, event: RunDone, now_s: float) -> None:
        run = self._end_run(event.run_id, now_s)
        if run is None:
            return
        job, instance = run.job, run.instance
        compute_s = event.compute_ns / 1e9
        mean = instance.mean_run_s
        instance.mean_run_s = compute_s if mean == 0.0 else mean + 0.1 * (compute_s - mean)
        if job.state is not JobState.ANSWERED:
            total_s = now_s - job.arrived_s
            queue_s = max(0.0, job.started_s - job.arrived_s)
            instance.stats.success(
                queue_ns=int(queue_s * 1e9),
                compute_ns=event.compute_ns,
                total_ns=int(total_s * 1e9),
                epoch_ms=int((now_s + self.epoch_offset_s) * 1000),
            )
            self.counters["inferences"] += 1
            parameters = {
                "device": instance.info["device"],
                "runtime": instance.info["runtime"],
                "precision": instance.info["precision"],
                "batch_size": 1,
                "queue_us": int(queue_s * 1e6),
                "compute_us": event.compute_ns // 1000,
            }
            if instance.fallback_reason:
                parameters["fallback_reason"] = instance.fallback_reason
            if job.warnings:
                parameters["warnings"] = job.warnings
            self._out.append(
                SendResult(
                    job,
                    instance.name,
                    str(instance.version),
                    run.worker.id,
                    run.slot,
                    event.outputs,
                    parameters,
                )
            )
            self._answered(job)
        self._after_run(run, now_s)

    def _on_run_failed(self, event: RunFailed, now_s: float) -> None:
        run = self._end_run(event.run_id, now_s)
        if run is None:
            return
        if run.job.state is not JobState.ANSWERED:
            error = make_error(
                event.code, f"model '{run.instance.name}': {event.message}", reason=event.reason
            )
            if event.code == "INTERNAL":
                self._out.append(
                    Log(
                        "request_internal_error",
                        {
                            "MODEL": run.instance.name,
                            "MODEL_VERSION": str(run.instance.version),
                            "REQUEST_ID": str(run.job.request_id),
                            "REASON": event.reason,
                            "DETAIL": event.message,
                        },
                    )
                )
            self._answer(run.job, run.instance, error, now_s)
        self._after_run(run, now_s)

    def _after_run(self, run: _Run, now_s: float) -> None:
        self._dispatch(run.worker, now_s)
        if run.instance.state is InstanceState.DRAINING:
            self.lifecycle.retirement.check_drained(run.instance, now_s)
            self._slow_due_s = self._slow_due(now_s)

    def _answer(self, job: Job, instance: Instance | None, error: EdgedError, now_s: float) -> None:
        """Answers a job with an error; its run, if it has one, ends on its own."""
        if instance is not None:
            kind = "cancel" if isinstance(error, Cancelled) else "fail"
            instance.stats.failure(kind, int((now_s - job.arrived_s) * 1e9))
        self._refuse(job.route, "infer", job.request_id, error)
        self._answered(job)

    def running(self, instance: Instance) -> int:
        """How many of an instance's runs are with its worker."""
        return sum(1 for run in self._runs.values() if run.instance is instance)

    # ------------------------------------------------------------------ hooks of those that move instances

    def busy(self, instance: Instance) -> bool:
        """Whether jobs wait or run for an instance."""
        return bool(self.scheduler.queued(instance.id) or self.running(instance))

    def flush(self, instance: Instance, error: EdgedError) -> None:
        """Answers everything that is in flight for an instance."""
        jobs = self.scheduler.waiting(instance.id)
        jobs += [
            run.job
            for run in self._runs.values()
            if run.instance is instance and run.job.state is not JobState.ANSWERED
        ]
        for job in jobs:
            self._answer(job, instance, error, job.arrived_s)

    def forget(self, instance: Instance) -> None:
        """An instance is gone."""
        self.scheduler.drop_queue(instance.id)

    def _worker_gone(self, event: WorkerGone, now_s: float) -> None:
        """The oldest run was the one that ran; those behind it had not begun and go back into their queue."""
        lost = [(run_id, run) for run_id, run in self._runs.items() if run.worker.id == event.worker]
        worker = self.workers.table.get(event.worker)
        why = event.how if worker is None else worker.killed_for or event.how
        for position, (run_id, run) in enumerate(lost):
            self._end_run(run_id, now_s)
            if run.job.state is JobState.ANSWERED:
                continue
            if position and run.instance.state is InstanceState.READY:
                self.scheduler.requeue(run.job)
                continue
            error = Unavailable(
                f"model '{run.instance.name}': the worker ended while this request ran ({why}); "
                "it is started again",
                reason="WORKER_CRASHED",
                retry_after_ms=500,
            )
            self._answer(run.job, run.instance, error, now_s)
        self.lifecycle.on_worker_gone(event.worker, event.how, now_s)

    # ------------------------------------------------------------------ time

    def _on_tick(self, event: Tick, now_s: float) -> None:
        instances = self.registry.instances
        for job in self.scheduler.expired(now_s):
            if job.state is JobState.RUNNING:
                run = self._runs.get(job.run_id)
                if run is not None:
                    self._out.append(CancelRun(run.worker.id, job.run_id))
            waited = "while it ran" if job.state is JobState.RUNNING else "while it waited"
            error = DeadlineExceeded(
                f"the deadline passed {waited}, {round((now_s - job.arrived_s) * 1000)} ms after it came",
                reason="DEADLINE_PASSED",
            )
            instance = instances.get(job.instance)
            self._answer(job, instance, error, now_s)
            if instance is not None and instance.state is InstanceState.DRAINING:
                self.lifecycle.retirement.check_drained(instance, now_s)
        if now_s >= self._run_check_s:
            self._check_runs(now_s)
        if self._slow_due_s is not None and now_s >= self._slow_due_s:
            self.lifecycle.tick(now_s)
            self.chooser.step(now_s)
            self._slow_due_s = self._slow_due(now_s)
        if self.stopping and now_s >= self._stop_at_s:
            self._answer_rest(now_s)

    def _check_runs(self, now_s: float) -> None:
        """Stops runs past their hard limit, and kills workers whose runs do not stop."""
        due = math.inf
        for run_id, run in list(self._runs.items()):
            if now_s >= run.kill_at_s:
                self.workers.kill(run.worker, RUN_HUNG, now_s)
                run.kill_at_s = math.inf
            elif now_s >= run.stop_at_s:
                run.stop_at_s, run.kill_at_s = math.inf, now_s + RUN_GRACE_S
                self._out.append(CancelRun(run.worker.id, run_id))
                if run.job.state is not JobState.ANSWERED:
                    limit_s = run.instance.settings.timeout_s or RUN_LIMIT_S
                    error = DeadlineExceeded(
                        f"model '{run.instance.name}' ran longer than its limit of {limit_s:g} s "
                        "(`timeout` in its settings)",
                        reason="RUN_TIMEOUT",
                    )
                    self._answer(run.job, run.instance, error, now_s)
            due = min(due, run.stop_at_s, run.kill_at_s)
        self._run_check_s = due
        self._slow_due_s = self._slow_due(now_s)

    def _maybe_exit(self) -> None:
        if not self.scheduler.in_flight and self._stop_at_s != math.inf:
            self._stop_at_s = math.inf
            self._out.append(Exit())

    def _answer_rest(self, now_s: float) -> None:
        error = Unavailable("the daemon is stopping", reason="SERVER_STOPPING", retry_after_ms=2000)
        for instance in list(self.registry.instances.values()):
            self.flush(instance, error)

    # ------------------------------------------------------------------ everything that is not hot

    def _on_slow(self, event: Event, now_s: float) -> None:
        lifecycle, entries = self.lifecycle, self.entries
        match event:
            case InstanceLoaded(worker=worker_id, instance=instance, info=info):
                self._on_loaded(worker_id, instance, info, now_s)
            case InstanceLoadFailed(instance=instance, reason=reason, message=message):
                lifecycle.on_load_failed(instance, reason, message, now_s)
            case WorkerHello(worker=worker_id, pid=pid):
                if worker_id in self.workers.table:
                    self.workers.table[worker_id].pid = pid
                    self._out.append(Log("worker_started", {"PID": str(pid)}))
            case WorkerGone():
                self._worker_gone(event, now_s)
            case FolderScanned(snapshot=snapshot, wall_s=wall_s):
                entries.on_scanned(snapshot, now_s, wall_s)
            case Staged(entry=entry, staged=staged, quarantined=quarantined):
                entries.on_staged(entry, staged, quarantined, now_s)
            case StageFailed(entry=entry, reason=reason, message=message, again=again):
                entries.on_stage_failed(entry, reason, message, again, now_s)
            case LoadPrepared(instance=instance, choice=choice):
                lifecycle.on_load_prepared(instance, choice, now_s)
            case Probed(verdict=verdict):
                self._on_probed(Verdict.from_wire(verdict), now_s)
            case DevicesChanged():
                self.placement.reprobe()
            case Measured(measure=measure, result=result, how=how):
                self.chooser.on_measured(measure, result, how, now_s)
            case Sampled(sample=sample):
                self._on_sampled(sample, now_s)
            case ConfigChanged(config=config):
                self._on_config(config)
            case ShutdownAsked():
                self._on_shutdown(now_s)
            case _:
                raise TypeError(f"no handler for {type(event).__name__}")

    def _on_loaded(self, worker_id: int, instance_id: int, info: dict[str, Any], now_s: float) -> None:
        instance = self.registry.instances.get(instance_id)
        worker = self.workers.table.get(worker_id)
        if worker is None:
            return
        if instance is None or instance.worker != worker_id or instance.state is not InstanceState.LOADING:
            # It was given up while the word was on its way: its memory must not stay behind.
            self._out.append(UnloadInstance(worker_id, instance_id))
            return
        self.lifecycle.on_loaded(instance_id, info, now_s)
        self._dispatch(worker, now_s)

    def _on_probed(self, verdict: Verdict, now_s: float) -> None:
        came = self.placement.on_probed(verdict)
        if verdict.status == "ok":
            self.entries.retry_for_device()
        if came and self.lifecycle.ready:
            self.lifecycle.offer_device(verdict.candidate)
        self.lifecycle.step(now_s)

    def _on_sampled(self, sample: resources.Sample, now_s: float) -> None:
        self.sample = sample
        settings = self.around.config.resources
        limits = resources.ResourceLimits(
            memory_bytes=self.around.machine.memory_limit_bytes,
            memory_pressure=settings.memory_pressure,
            disk_free_min_bytes=settings.disk_free_min_bytes,
            temperature_max_c=settings.temperature_max_c,
        )
        before = self.around.guard
        guard = resources.judge(sample, limits, budgets=self.workers.budgets(), previous=before)
        self.around.guard = guard
        if guard.level != (before.level if before is not None else resources.Level.OK):
            eased = before is not None and guard.level < before.level
            kind = "pressure_eased" if eased else "pressure_changed"
            self._out.append(Log(kind, {"LEVEL": guard.level.name, "REASON": "; ".join(guard.reasons)}))
            payload = {"level": guard.level.name, "reasons": list(guard.reasons)}
            self._emit(Publish("resource.pressure", payload))
            if guard.level >= resources.Level.SHRINK:
                self._out.append(ShrinkWorkers())
        rss_bytes = {w.pid: w.rss_bytes for w in sample.workers}
        self.workers.on_sampled(rss_bytes, guard.over_budget, now_s)

    def _on_config(self, config: Config) -> None:
        """What can change while running does; the rest needs a restart, and the log says which."""
        old, self.around.config = self.around.config, config
        self.scheduler.queue_length = config.limits.queue_length
        self.scheduler.queue_bytes = config.limits.queue_bytes
        self.scheduler.inflight_per_client = config.limits.inflight_per_client
        self.scheduler.clients_max = config.limits.clients
        self.regions.bytes_per_uid = config.limits.lease_bytes
        self.regions.per_connection = config.limits.leases
        if config.log.level != old.log.level:
            self._out.append(SetLogLevel(config.log.level))
        self._out.append(Scan(0.0))
        self.placement.reprobe()

    def _on_shutdown(self, now_s: float) -> None:
        if self.stopping:
            return
        self.stopping = True
        self._stop_at_s = now_s + self.around.config.server.shutdown_grace_s
        self._emit(Publish("server.state", {"state": "stopping"}))
        self._out.append(Log("server_stopping", {"DETAIL": f"{self.scheduler.in_flight} requests in flight"}))

    # ------------------------------------------------------------------ methods

    def _call(self, event: RequestArrived, now_s: float) -> dict[str, Any]:
        request = event.request
        match request.method:
            case "server_live":
                return {"live": True}
            case "server_ready":
                return {"ready": self.state == "ready"}
            case "server_metadata":
                return status.server_metadata(self)
            case "model_ready":
                return {"name": request.model_name, "ready": self._model_ready(event)}
            case "model_metadata":
                instance = self.registry.lookup(request.model_name, request.model_version)
                return status.model_metadata(self.registry, instance)
            case "model_statistics":
                return {
                    "model_stats": status.model_statistics(self, request.model_name, request.model_version)
                }
            case "repository_index":
                return {"models": status.repository_index(self.registry)}
            case "cancel":
                return self._cancel(event, now_s)
            case "repository_model_load":
                self.entries.load(request.model_name)
            case "repository_model_unload":
                self.entries.unload(request.model_name, now_s)
                self._slow_due_s = self._slow_due(now_s)
            case "server_status":
                return status.server_status(self, now_s, model=request.model_name)
            case "log_settings":
                return self._log_settings(event)
            case method:
                raise NotFound(f"method '{method}' has no handler")
        return {}

    def _model_ready(self, event: RequestArrived) -> bool:
        try:
            instance = self.registry.lookup(event.request.model_name, event.request.model_version)
        except Unavailable:
            return False
        return instance.state is InstanceState.READY

    def _cancel(self, event: RequestArrived, now_s: float) -> dict[str, Any]:
        wanted = event.request.cancel_id
        job = None if wanted is None else self.scheduler.find(event.route, wanted)
        if job is None:
            raise NotFound(
                f"no request with id {wanted!r} is in flight on this connection; it may be answered already",
                reason="NOT_IN_FLIGHT",
            )
        if job.state is JobState.RUNNING:
            self._out.append(CancelRun(self._runs[job.run_id].worker.id, job.run_id))
        instance = self.registry.instances.get(job.instance)
        self._answer(job, instance, Cancelled("withdrawn by the client", reason="CANCELLED_BY_CLIENT"), now_s)
        if instance is not None and instance.state is InstanceState.DRAINING:
            self.lifecycle.retirement.check_drained(instance, now_s)
        return {"cancelled": True}

    def _log_settings(self, event: RequestArrived) -> dict[str, Any]:
        wanted = (event.request.settings or {}).get("level")
        if wanted is not None:
            if wanted not in LOG_LEVELS:
                raise InvalidArgument(f"level must be one of {', '.join(LOG_LEVELS)}", reason="BAD_PARAMETER")
            self.log_level = wanted
            self._out.append(SetLogLevel(wanted))
        return {"settings": {"level": self.log_level}}
