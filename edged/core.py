"""The one decider: an event and the time go in, effects come out.

Pure: no socket, no process, no file, no clock, no log. `Core.handle` is all that the daemon calls; everything
that can happen is an event, everything that is to be done an effect. The core itself owns the requests' way
in, up to their place in the queue; from there `scheduler` has their order and `runs` their runs and answers.
It puts together the modules that have the models' way and hands each event to its owner: to `entries` what
happened in the folder, to `lifecycle` what happened to an instance, to `placement` what happened to a device,
to `chooser` what was measured. Its promise: every request that it is given is answered exactly once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from edged import resources, status
from edged.admission import checked_inputs, checked_outputs, checked_shapes, rows_and_key
from edged.cache import Keep, ResponseCache, question
from edged.choosing import Chooser, Given
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
)
from edged.events import (
    BadMessage,
    ConfigChanged,
    CopyHashed,
    CopySetAside,
    DevicesChanged,
    Effect,
    Event,
    Exit,
    FolderScanned,
    FreeRegion,
    GrantRegion,
    InstanceLoaded,
    InstanceLoadFailed,
    InstanceProving,
    Kept,
    KeptSent,
    LandReply,
    LaneClosed,
    LaneOpened,
    LanePacket,
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
    SendKept,
    SetLogLevel,
    ShrinkWorkers,
    ShutdownAsked,
    Staged,
    StageFailed,
    Tick,
    UnloadInstance,
    Unsent,
    WorkerGone,
    WorkerHello,
)
from edged.happenings import Happenings
from edged.instances import Instance, InstanceState, Machine, Surroundings
from edged.lifecycle import Lifecycle
from edged.messages import Peer, RegionPart, TensorData
from edged.placement import Placement
from edged.regions import Regions
from edged.registry import Registry
from edged.runs import Runs
from edged.scheduler import Job, Scheduler
from edged.wire import (
    WireLimits,
    encode,
    landed_reply,
    region_reference,
    timing_parameters,
    unknown_parameters,
    wants_properties,
)
from edged.workers import Workers

__all__ = ["Core", "Identity"]

LOG_LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True)
class Identity:
    """Which daemon this is."""

    version: str
    instance_id: str
    pid: int


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
        self.stopping = False
        self.log_level = config.log.level
        self.sample: resources.Sample | None = None
        self.happenings = Happenings()
        self._now_s = now_s
        self.counters = {"requests": 0, "bad_messages": 0, "damaged_copies": 0}
        self._stop_at_s = math.inf
        self._seq = 0
        self._out: list[Effect] = []
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
        self.cache = ResponseCache(limits.cache_bytes)
        self.registry = Registry()
        self.workers = Workers(self.around)
        self.placement = Placement(self.around, now_s=now_s)
        self.runs = Runs(
            self.around,
            self._out.append,
            registry=self.registry,
            workers=self.workers,
            scheduler=self.scheduler,
            regions=self.regions,
            cache=self.cache,
            drained=self._check_drained,
            epoch_offset_s=epoch_offset_s,
        )
        self.lifecycle = Lifecycle(
            self.around,
            registry=self.registry,
            workers=self.workers,
            placement=self.placement,
            hooks=self.runs,
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
            RunDone: self.runs.on_done,
            RunFailed: self.runs.on_failed,
            Kept: self._on_kept,
            KeptSent: self._on_kept_sent,
            Unsent: self.runs.on_unsent,
            BadMessage: self._on_bad_message,
            LaneOpened: lambda e, _: self._on_lane(e),
            LanePacket: lambda e, _: self._on_lane(e),
            RegionFailed: lambda e, _: self._on_lane(e),
            LaneClosed: self._on_lane_closed,
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
        out = self._out.copy()
        self._out.clear()
        return out

    def next_due_s(self) -> float | None:
        """When the next Tick is wanted, at the latest; None when nothing is due."""
        due = min(self.runs.next_due_s(), self._stop_at_s)
        if self._slow_due_s is not None and self._slow_due_s < due:
            due = self._slow_due_s
        deadline = self.scheduler.next_deadline_s()
        if deadline is not None and deadline < due:
            due = deadline
        return None if due == math.inf else due

    def _check_drained(self, instance: Instance, now_s: float) -> None:
        """A job of a draining instance has ended."""
        self.lifecycle.retirement.check_drained(instance, now_s)
        self._slow_due_s = self._slow_due(now_s)

    def _slow_due(self, now_s: float) -> float | None:
        found = [d for d in (self.lifecycle.next_due_s(), self.chooser.next_due_s()) if d is not None]
        return min(found, default=None)

    def _emit(self, effect: Effect) -> None:
        if isinstance(effect, Publish):
            self._seq += 1
            effect.payload["seq"] = self._seq
            effect.payload["instance_id"] = self.identity.instance_id
        elif isinstance(effect, Log):
            self.happenings.note(effect.kind, effect.fields, self._now_s + self.runs.epoch_offset_s)
        self._out.append(effect)

    # ------------------------------------------------------------------ requests

    def _on_request(self, event: RequestArrived, now_s: float) -> None:
        request = event.request
        self.counters["requests"] += 1
        try:
            if request.method == "model_infer":
                self._infer(event, now_s)
            else:
                self._out.append(self._answer(event, now_s))
        except EdgedError as error:
            self.runs.refuse(event.route, event.socket, request.id, error)
            if isinstance(error, InvalidArgument):
                self._note_bad(event.peer, error)

    def _answer(self, event: RequestArrived, now_s: float) -> Effect:
        """The answer to a question; in leased memory if that is named, since a lane's packet is small."""
        request = event.request
        place = region_reference(request.parameters, request.method)
        part = None if place is None else self.regions.resolve(event.peer.uid, place)
        header = self._call(event, now_s)
        header["id"] = request.id
        if part is None:
            return Reply(event.route, event.socket, header)
        raw = encode(header)
        return LandReply(event.route, event.socket, part, raw, landed_reply(request.id, part, len(raw)))

    def _on_bad_message(self, event: BadMessage, now_s: float) -> None:
        self.counters["bad_messages"] += 1
        self.runs.refuse(event.route, event.socket, event.request_id, event.error)
        self._note_bad(event.peer, event.error)

    def _note_bad(self, peer: Peer, error: EdgedError) -> None:
        fields = {
            "CLIENT_UID": str(peer.uid),
            "CLIENT_PID": str(peer.pid),
            "REASON": error.reason or error.code.value,
            "DETAIL": error.message,
        }
        self._out.append(Log("client_misbehaves", fields))

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
        self.scheduler.check_room(event.route, request.id)
        parts: list[RegionPart] = []
        keep: Keep | None = None
        try:
            inputs = checked_inputs(instance, event, self.regions, parts)
            outputs, into = checked_outputs(instance, event, self.regions, parts)
        except EdgedError:
            instance.stats.failure("reject", 0)
            raise
        if instance.settings.cache is not None and not parts:
            keep = Keep(question(inputs, outputs), instance.settings.cache.bytes)
            if self._answer_kept(event, instance, inputs, keep, now_s):
                return
        peer = event.peer
        job = Job(
            route=event.route,
            request_id=request.id,
            peer=peer,
            instance=instance.id,
            inputs=inputs,
            outputs=outputs,
            nbytes=sum([len(t.raw) for t in inputs]),
            arrived_s=now_s,
            deadline_s=due_s,
            priority=priority,
            warnings=unknown_parameters(request),
            client=(peer.uid, peer.pid),
            keep=keep,
        )
        if parts:
            job.into = into
            job.regions = tuple({part.region for part in parts})
        if instance.batch_max > 1:
            job.rows, job.shape_key = rows_and_key(inputs, outputs, instance.inputs)
            if into:
                job.shape_key = None
        try:
            self.runs.submit(job, instance, now_s)
        except EdgedError:
            instance.stats.failure("reject", 0)
            raise

    # ------------------------------------------------------------------ kept answers

    def _answer_kept(
        self, event: RequestArrived, instance: Instance, inputs: list[TensorData], keep: Keep, now_s: float
    ) -> bool:
        """Answers with what is kept, if that is there."""
        answer = self.cache.get(instance.id, keep.digest, now_s)
        if answer is None:
            instance.stats.sums["cache_miss"][0] += 1
            return False
        rows = rows_and_key(inputs, None, instance.inputs)[0] if instance.batch_max > 1 else 1
        parameters = {**answer.parameters, "batch_size": rows, "queue_us": 0, "compute_us": 0, "cache": "hit"}
        warnings = unknown_parameters(event.request)
        if warnings:
            parameters["warnings"] = warnings
        self._out.append(
            SendKept(
                event.route,
                event.request.id,
                instance.id,
                instance.name,
                str(instance.version),
                rows,
                answer.outputs,
                parameters,
                now_s,
            )
        )
        return True

    def _on_kept(self, event: Kept, now_s: float) -> None:
        instance = self.registry.instances.get(event.instance)
        if instance is None or instance.settings.cache is None:
            return
        instance.stats.sums["cache_miss"][1] += event.ns
        guard = self.around.guard
        if guard is None or guard.level < resources.Level.SHRINK:
            ttl_s = instance.settings.cache.ttl_s
            self.cache.put(instance.id, event.keep, event.answer, ttl_s=ttl_s, now_s=now_s)

    def _on_kept_sent(self, event: KeptSent, now_s: float) -> None:
        self.runs.counters["inferences"] += 1
        instance = self.registry.instances.get(event.instance)
        if instance is not None:
            epoch_ms = int((now_s + self.runs.epoch_offset_s) * 1000)
            instance.stats.hit(rows=event.rows, total_ns=event.ns, epoch_ms=epoch_ms)

    # ------------------------------------------------------------------ leases

    def _on_lane(self, event: LaneOpened | LanePacket | RegionFailed) -> None:
        match event:
            case LaneOpened():
                self.regions.connect(event.connection, event.peer.uid)
            case LanePacket():
                try:
                    self._lease(event)
                except EdgedError as error:
                    self.runs.refuse((event.connection,), "infer", event.request.id, error)
                    if isinstance(error, InvalidArgument):
                        self._note_bad(event.peer, error)
            case RegionFailed():
                freed = self.regions.release(event.connection, event.name)
                self._out.extend([FreeRegion(each) for each in freed])
                failure = ResourceExhausted(f"no memory to lease: {event.why}", reason="OUT_OF_MEMORY")
                self.runs.refuse((event.connection,), "infer", event.request_id, failure)

    def _on_lane_closed(self, event: LaneClosed, now_s: float) -> None:
        """Nobody reads the answers any more: what is in flight is withdrawn, and its memory with it."""
        if self.scheduler.in_flight_of(event.connection):
            gone = Cancelled("its connection is gone", reason="CANCELLED_BY_CLIENT")
            for job in self.runs.jobs_of(event.connection):
                self.runs.withdraw(job, gone, now_s)
        self._out.extend([FreeRegion(each) for each in self.regions.disconnect(event.connection)])

    def _lease(self, event: LanePacket) -> None:
        request = event.request
        if request.method == "lease_release":
            freed = self.regions.release(event.connection, request.region or "")
            self._out.extend([FreeRegion(each) for each in freed])
            self._out.append(Reply((event.connection,), "infer", {"id": request.id}))
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

    # ------------------------------------------------------------------ time

    def _on_tick(self, event: Tick, now_s: float) -> None:
        if self.runs.tick(now_s):
            self._slow_due_s = self._slow_due(now_s)
        if self._slow_due_s is not None and now_s >= self._slow_due_s:
            self.lifecycle.tick(now_s)
            self.chooser.step(now_s)
            self._slow_due_s = self._slow_due(now_s)
        if self.stopping and now_s >= self._stop_at_s:
            self._answer_rest(now_s)

    def _maybe_exit(self) -> None:
        if not self.scheduler.in_flight and self._stop_at_s != math.inf:
            self._stop_at_s = math.inf
            self._out.append(Exit())

    def _answer_rest(self, now_s: float) -> None:
        error = Unavailable("the daemon is stopping", reason="SERVER_STOPPING", retry_after_ms=2000)
        for instance in list(self.registry.instances.values()):
            self.runs.flush(instance, error)

    # ------------------------------------------------------------------ everything that is not hot

    def _on_slow(self, event: Event, now_s: float) -> None:
        lifecycle, entries = self.lifecycle, self.entries
        match event:
            case InstanceLoaded(worker=worker_id, instance=instance, info=info):
                self._on_loaded(worker_id, instance, info, now_s)
            case InstanceProving(worker=worker, instance=instance):
                lifecycle.on_proving(worker, instance)
            case InstanceLoadFailed(instance=instance, reason=reason, message=message):
                lifecycle.on_load_failed(instance, reason, message, now_s)
            case WorkerHello(worker=worker_id, pid=pid):
                came = self.workers.table.get(worker_id)
                if came is not None:
                    came.pid = pid
                    for about in came.about.values():
                        self._emit(Log("worker_started", {**about, "PID": str(pid)}))
            case WorkerGone():
                self.runs.on_worker_gone(event, now_s)
                lifecycle.on_worker_gone(event.worker, event.how, now_s)
            case FolderScanned(snapshot=snapshot, wall_s=wall_s):
                entries.on_scanned(snapshot, now_s, wall_s)
            case Staged(entry=entry, staged=staged, quarantined=quarantined):
                entries.on_staged(entry, staged, quarantined, now_s)
            case StageFailed(entry=entry, reason=reason, message=message, again=again):
                entries.on_stage_failed(entry, reason, message, again, now_s)
            case LoadPrepared(instance=instance, choice=choice, sizes=sizes):
                lifecycle.on_load_prepared(instance, choice, sizes, now_s)
            case CopyHashed(instance=instance, reason=reason, message=message):
                self._on_copy_hashed(instance, reason, message, now_s)
            case CopySetAside(digest=digest, before=before):
                lifecycle.on_copy_set_aside(digest, before, now_s)
            case Probed(verdict=verdict):
                self._on_probed(Verdict.from_wire(verdict), now_s)
            case DevicesChanged():
                self.placement.reprobe()
            case Measured(measure=measure, result=result, how=how):
                self.chooser.on_measured(measure, result, how, now_s)
            case Sampled(sample=sample, pressed=pressed):
                self._on_sampled(sample, now_s, pressed=pressed)
            case ConfigChanged(config=config, memory_limit_bytes=limit_bytes):
                self._on_config(config, limit_bytes)
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
        worker.widen(int(info.get("instances", 1)))
        self.lifecycle.on_loaded(instance_id, info, now_s)
        self.runs.dispatch(worker, now_s)

    def _on_copy_hashed(self, instance_id: int, reason: str, message: str, now_s: float) -> None:
        instance = self.registry.instances.get(instance_id)
        if instance is None:
            return
        self.counters["damaged_copies"] += reason == "COPY_DAMAGED"
        self.lifecycle.on_copy_hashed(instance, reason, message, now_s)
        worker = self.workers.of(instance)
        if worker is not None:
            self.runs.dispatch(worker, now_s)  # requests may have waited for this

    def _on_probed(self, verdict: Verdict, now_s: float) -> None:
        came = self.placement.on_probed(verdict)
        if verdict.status == "ok":
            self.entries.retry_for_device()
        if came and self.lifecycle.ready:
            self.lifecycle.offer_device(verdict.candidate)
        self.lifecycle.step(now_s)

    def _on_sampled(self, sample: resources.Sample, now_s: float, *, pressed: bool) -> None:
        self.sample = sample
        self._keep_sizes(now_s)
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
            pressed = pressed or guard.level >= resources.Level.SHRINK
        if pressed:
            self._out.append(ShrinkWorkers())
            self.cache.clear()
        rss_bytes = {w.pid: w.rss_bytes for w in sample.workers}
        self.workers.on_sampled(rss_bytes, guard.over_budget, now_s)

    def _on_config(self, config: Config, memory_limit_bytes: int | None) -> None:
        """Tells those who keep a setting; everybody else looks it up when it is wanted."""
        old, self.around.config = self.around.config, config
        if memory_limit_bytes is not None:
            self.around.machine = replace(self.around.machine, memory_limit_bytes=memory_limit_bytes)
        self.entries.settle_s = config.loading.settle_s
        self.scheduler.queue_length = config.limits.queue_length
        self.scheduler.queue_bytes = config.limits.queue_bytes
        self.scheduler.inflight_per_client = config.limits.inflight_per_client
        self.scheduler.clients_max = config.limits.clients
        self.regions.bytes_per_uid = config.limits.lease_bytes
        self.regions.per_connection = config.limits.leases
        self.cache.bytes_max = config.limits.cache_bytes
        self.cache.shrink()
        if config.log.level != old.log.level:
            self._out.append(SetLogLevel(config.log.level))
        self._out.append(Scan(0.0))
        self.placement.reprobe()

    def _keep_sizes(self, now_s: float, *, last: bool = False) -> None:
        for track in self.registry.tracks.values():
            if track.serving is not None:
                self.placement.keep_sizes(track.serving, now_s, last=last)

    def _on_shutdown(self, now_s: float) -> None:
        if self.stopping:
            return
        self._keep_sizes(now_s, last=True)
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
                return status.model_metadata(self.registry, instance, properties=wants_properties(request))
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
            case "model_tune":
                return {"tune": self._tune(event, now_s)}
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
        self.runs.withdraw(job, Cancelled("withdrawn by the client", reason="CANCELLED_BY_CLIENT"), now_s)
        return {"cancelled": True}

    def _tune(self, event: RequestArrived, now_s: float) -> dict[str, Any]:
        """An owner's measurement: begun, asked about, cancelled, applied."""
        chooser, settings = self.chooser, event.request.settings or {}
        match settings.get("do"):
            case "start":
                if self.stopping:
                    raise Unavailable("the daemon is stopping", reason="SERVER_STOPPING")
                budget_ms = settings.get("budget_ms", 60_000)
                if type(budget_ms) is not int:
                    raise InvalidArgument("budget_ms must be an int", reason="BAD_PARAMETER")
                instance = self.registry.lookup(event.request.model_name, event.request.model_version)
                given = self._given(event, instance, settings)
                aim = str(settings.get("aim", "latency"))
                budget_s = budget_ms / 1000
                tune = chooser.start_tune(instance, aim=aim, budget_s=budget_s, given=given, now_s=now_s)
            case "status":
                tune = chooser.find_tune(settings.get("tune"), now_s)
            case "cancel":
                tune = chooser.find_tune(settings.get("tune"), now_s)
                chooser.cancel_tune(tune, now_s)
            case "apply":
                tune = chooser.find_tune(settings.get("tune"), now_s)
                chooser.apply_tune(tune, now_s, unproven=settings.get("unproven") is True)
            case _:
                text = "settings.do must be one of start, status, cancel, apply"
                raise InvalidArgument(text, reason="BAD_PARAMETER")
        self._slow_due_s = self._slow_due(now_s)
        return chooser.report(tune, now_s)

    def _given(self, event: RequestArrived, instance: Instance, settings: Mapping[str, Any]) -> Given:
        """What an owner wants a model measured with: inputs as of a request, or shapes; mostly neither."""
        shapes, inputs = settings.get("shapes"), event.request.inputs
        if shapes is None:
            parts: list[RegionPart] = []
            given = checked_inputs(instance, event, self.regions, parts) if inputs else []
            if parts:
                raise InvalidArgument("send the inputs as frames or data", reason="BAD_REGION")
            return Given(inputs=tuple(given))
        if inputs:
            raise InvalidArgument("send inputs or shapes; inputs have theirs", reason="BAD_PARAMETER")
        bytes_max = self.around.config.limits.message_bytes
        return Given(shapes=checked_shapes(instance, shapes, bytes_max=bytes_max))

    def _log_settings(self, event: RequestArrived) -> dict[str, Any]:
        wanted = (event.request.settings or {}).get("level")
        if wanted is not None:
            if wanted not in LOG_LEVELS:
                raise InvalidArgument(f"level must be one of {', '.join(LOG_LEVELS)}", reason="BAD_PARAMETER")
            self.log_level = wanted
            self._out.append(SetLogLevel(wanted))
        return {"settings": {"level": self.log_level}}
