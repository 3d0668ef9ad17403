"""The daemon: the loop that turns what happens into events and carries out the core's effects.

The only module that composes. One thread, no locks: the loop waits on one epoll (the ROUTERs' descriptors,
those of the children, the wake-up of other threads, signals), makes an event of each thing that it finds,
asks the core, and does what the core says. It never runs a model and never parses a model file (`children`
do), and never waits for a disk (`disk` does, on a thread).
"""

from __future__ import annotations

import contextlib
import gc
import math
import mmap
import os
import platform
import queue
import resource
import secrets
import select
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import zmq

from edged import sites, wire
from edged.arena import ArenaBoundsError
from edged.cache import Answer, Keep
from edged.catalog import LevelName
from edged.children import Children
from edged.config import OPERATORS_DIR, Config, ConfigError
from edged.core import Core, Identity
from edged.devices import Candidate, Verdict, matches
from edged.disk import Disk, entry_of
from edged.errors import EdgedError, Internal, InvalidArgument, ResourceExhausted
from edged.events import (
    BadMessage,
    CancelLoad,
    CancelRun,
    Collect,
    ConfigChanged,
    DevicesChanged,
    Effect,
    EndAttempt,
    EndWorker,
    Event,
    Exit,
    ForgetModel,
    FreeRegion,
    GrantRegion,
    HashCopy,
    InstanceLoadFailed,
    Kept,
    KeptSent,
    KillWorker,
    LandReply,
    LaneClosed,
    LaneOpened,
    LanePacket,
    LoadInstance,
    Log,
    MarkGood,
    Measured,
    PrepareLoad,
    Probe,
    Publish,
    Ready,
    RegionFailed,
    RememberChoice,
    RememberSizes,
    RememberVerdict,
    Reply,
    RequestArrived,
    RunFailed,
    Sampled,
    Scan,
    SendKept,
    SendResult,
    SetAside,
    SetLogLevel,
    ShrinkWorkers,
    ShutdownAsked,
    Stage,
    StartMeasure,
    StartRun,
    StartWorker,
    StopMeasure,
    Tick,
    UnloadInstance,
    Unsent,
)
from edged.events import WorkerGone as WorkerGoneEvent
from edged.exporter import Exporter
from edged.heartbeat import Heartbeat
from edged.helper import Mailbox
from edged.instances import Machine
from edged.journal import Journal, RateLimiter
from edged.lanes import CONNECTIONS_MAX, Lanes, Opened, Packet
from edged.messages import Envelope, Route
from edged.metrics import Metrics
from edged.pressure import PressureWatch
from edged.reloading import Reload, compare
from edged.runtimes.operators import fingerprint
from edged.scheduler import Job
from edged.store import StoreError
from edged.system import Notifier, Sampler, available_cpus, memory_limit_bytes, pressure_files
from edged.transport import Incoming, Router, SocketDir, TransportError, bind_events
from edged.version import __version__

__all__ = ["Daemon", "main"]

MESSAGES_PER_TURN = 32
"""Taken from one ROUTER before the workers have their turn."""

EXACT_S = 0.05
"""Waits up to this long end to the microsecond; epoll_wait(2), which has one system call less, rounds up to
the next millisecond. The moment to hand a run over (`runs.AHEAD_MIN_S`) would be past by then."""

FLUSH_S, FLUSH_MAX_S = 0.005, 0.25
"""How often replies that a slow client had no room for are tried again, at first and when nothing moves."""

REGIONS_MAX = 4096
"""Leased regions in all, or a quarter of the descriptors that the daemon may have: with none left, libzmq
ends the process."""

PRESSED_PAUSE_S = 1.0
"""Between two looks of the guard for memory pressure's sake: whoever tells of it may tell all the time."""

PRESSED_QUIET_S = 600.0
"""After so long without pressure the log tells of it again."""

PAGE_S = 1.5
"""How long a reader of metrics is kept waiting for the loop."""

STOP_S = 10.0
"""What a stop may take beyond `server.shutdown_grace`: the workers' ends, and the helper's last task."""

DISK_STALLED_S = 120.0
"""A task of the helper's that takes longer is told of; copying a large model from a card takes a minute."""

_HOW_MADE = frozenset({"device", "runtime", "precision", "fallback_reason"})
"""Of a reply's parameters those that are as true of a kept answer; the others are of one run."""

_EXIT_BUSY = 75
"""EX_TEMPFAIL of sysexits.h: another daemon has the sockets or the state directory."""


class Daemon:
    """Everything that the daemon holds, and its loop. Used by `main`; a context manager."""

    def __init__(self, config: Config, *, journal: Journal, reload: Callable[[], Config]) -> None:
        self._config = config
        self._journal = journal
        self._reload = reload
        self._stack = contextlib.ExitStack()
        self._running = True
        self._handlers: dict[type[Effect], Callable[[Any], None]] = {}
        self._fds: dict[int, Callable[[], None]] = {}
        self._limiter = RateLimiter()
        self._flush_at_s = math.inf
        self._flush_pause_s = FLUSH_S
        self._unasked: set[Router] = set()
        """ROUTERs that were used since they were last asked whether something waits."""

    def __enter__(self) -> Daemon:
        try:
            self._open()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    # ------------------------------------------------------------------ opening

    def _open(self) -> None:
        config, stack = self._config, self._stack
        now_s = time.monotonic()
        self._notifier = Notifier()
        stack.callback(self._notifier.close)
        self._epoll = select.epoll()
        stack.callback(self._epoll.close)
        self._dir = SocketDir(config.server.endpoint, system="RUNTIME_DIRECTORY" in os.environ)
        stack.callback(self._dir.close)
        self._open_wakeups()
        self._disk = Disk(config, journal=self._journal, mailbox=self._mailbox, on_bug=self._note_bug)
        stack.callback(self._disk.close)
        self._sampler = Sampler(config.server.state_dir)
        stack.callback(self._sampler.close)
        self._children = Children(
            loop=self,
            step=self._step,
            region_fd=lambda region: self._lanes.region_fd(region),
            pythons={name: r.python for name, r in config.runtimes.items() if r.python is not None},
            environ=os.environ,
            measure_file_bytes=4 * config.limits.message_bytes,
            probe_timeout_s=lambda: self._config.devices.probe_timeout_s,
        )
        stack.callback(self._children.close)
        self._handlers = self._effect_table()
        cpus = available_cpus()
        self._may_spin = cpus > 1
        machine = Machine(
            name=_cpu_name(),
            cpus=cpus,
            memory_limit_bytes=memory_limit_bytes(config.resources.memory),
            operators=fingerprint(str(config.server.state_dir / OPERATORS_DIR)),
        )
        self._core = Core(
            config,
            machine=machine,
            identity=Identity(__version__, secrets.token_hex(8), os.getpid()),
            now_s=now_s,
            epoch_offset_s=time.time() - now_s,
            page_bytes=mmap.PAGESIZE,
            regions_max=min(REGIONS_MAX, _descriptors_max() // 4),
        )
        self._open_sockets()
        self._open_lanes()
        self._metrics = Metrics()
        self._exporter = Exporter(
            emit=lambda kind, fields: self._journal.emit(kind, **fields),
            ask=self._ask_for_page,
            aside=lambda task: self._disk.in_store(lambda _: task()),
        )
        stack.callback(self._exporter.close)
        self._exporter.configure(config.metrics, now_s)
        self._open_pressure()
        self._sample_at_s = now_s
        self._heart = Heartbeat(self._notifier)
        self._well = True
        """Whether the core could handle the last tick."""
        self._notes: tuple[str, ...] = ()
        """What the last reload left to be said in the status."""
        self._disk_stalled = False
        self._devices_seen = _device_nodes()
        self._awake_s = _asleep_s()

    def _open_pressure(self) -> None:
        self._pressure = PressureWatch(os.environ, pressure_files())
        self._stack.callback(self._pressure.close)
        self._pressures = self._pressures_taken = 0
        self._pressed_at_s = -math.inf
        if self._pressure.problem:
            self._journal.emit("pressure_watch_failed", REASON=self._pressure.problem)
        if self._pressure.fd is not None:
            fd = self._pressure.fd
            self.watch(fd, lambda: self._pressed(fd), self._pressure.events)

    def _open_sockets(self) -> None:
        limits = self._config.limits
        context = zmq.Context(io_threads=1)
        self._stack.callback(context.term)
        self._routers: dict[str, Router] = {}
        for name, endpoint, group in (
            ("infer", self._dir.infer, "edged"),
            ("admin", self._dir.admin, "edged-admin"),
        ):
            router = Router(
                context, name, endpoint, frame_bytes_max=limits.message_bytes, frames_max=limits.frames
            )
            self._stack.callback(router.close)
            self._dir.claim(endpoint, group)
            self._routers[name] = router
            self._unasked.add(router)
            self.watch(router.fd, partial(self._unasked.add, router))
        self._events = bind_events(context, self._dir.events)
        self._stack.callback(self._events.close)
        self._dir.claim(self._dir.events, "edged")
        self._wire_limits = self._core.wire_limits

    def _open_lanes(self) -> None:
        error = ResourceExhausted(
            "too many connections to lease.sock; one is enough for a process", reason="TOO_MANY_CLIENTS"
        )
        self._lanes = Lanes(
            self._dir.lease,
            refusal=wire.encode({"id": None, "error": error.to_wire()}),
            connections_max=min(CONNECTIONS_MAX, _descriptors_max() // 8),
        )
        self._stack.callback(self._lanes.close)
        self._dir.claim(self._dir.lease, "edged")
        self.watch(self._lanes.fd, self._lanes_ready)

    def _open_wakeups(self) -> None:
        wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._stack.callback(os.close, wake)
        self._mailbox = Mailbox(lambda: os.eventfd_write(wake, 1))
        self.watch(wake, lambda: self._take_mail(wake))
        reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._stack.callback(os.close, reader)
        self._stack.callback(os.close, writer)
        old = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        self._stack.callback(signal.set_wakeup_fd, old)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            before = signal.signal(number, lambda *_: None)
            self._stack.callback(signal.signal, number, before)
        self.watch(reader, lambda: self._take_signals(reader))

    def watch(self, fd: int, ready: Callable[[], None], events: int = select.EPOLLIN) -> None:
        """Calls `ready` whenever `fd` is readable, or has what else `events` asks for."""
        self._fds[fd] = ready
        self._epoll.register(fd, events)

    def unwatch(self, fd: int) -> None:
        """No longer; a descriptor that is closed already has left by itself."""
        if self._fds.pop(fd, None) is not None:
            with contextlib.suppress(OSError):
                self._epoll.unregister(fd)

    # ------------------------------------------------------------------ the loop

    def run(self) -> None:
        """Serves until it is told to stop."""
        config = self._config
        self._journal.emit(
            "server_starting",
            VERSION=__version__,
            PID=os.getpid(),
            PATH=str(config.server.models),
            ENDPOINT=config.server.endpoint,
        )
        if sites.is_installed("onnxruntime") and "onnxruntime" not in config.runtimes:
            # Nearly every model starts there: importing it now saves the first load that time.
            self._children.spawner.start_template("onnxruntime")
        served = self._disk.last_good()
        self._core.entries.restore((entry_of(good), good.staged) for good in served)
        for notice in self._disk.store.notices:
            self._journal.emit("store_failed", DETAIL=notice)
        for candidate in self._unknown_devices():
            verdict = self._disk.store.recall_verdict(str(candidate), self._probe_mark(candidate.runtime))
            if verdict is not None:
                self._core.placement.assume(Verdict.from_wire(verdict))
            else:
                self._core.placement.probe(candidate)
        self._step(Tick())
        gc.collect()
        gc.freeze()
        while self._running:
            self._turn()
        self._stop()

    def _unknown_devices(self) -> list[Candidate]:
        """What there may be on this machine, was not excluded, and nobody has asked for yet."""
        found = [Candidate(runtime, device) for runtime, device in self._children.spawner.list_probes()]
        exclude, known = self._config.devices.exclude, self._core.placement.verdicts
        return [c for c in found if c not in known and not any(matches(token, c) for token in exclude)]

    def _turn(self) -> None:
        # A ROUTER's descriptor tells of changes only, and any use of the socket may swallow one: after each
        # use it is asked once more before the loop waits (zmq_getsockopt(3), ZMQ_FD).
        for router in tuple(self._unasked):
            if not self._receive(router):
                self._unasked.discard(router)
        while self._lanes.has_lost:  # hung up on while something was sent to them
            for closed in self._lanes.lost():
                self._step(LaneClosed(closed.connection))
        now_s = time.monotonic()
        if now_s >= self._next_s:
            self._timers(now_s)
        timeout_s = max(0.0, self._due_s() - now_s)
        if self._unasked:
            timeout_s = 0.0
        elif timeout_s and self._spin(now_s):
            return
        if 0.0 < timeout_s < EXACT_S:
            select.select([self._epoll.fileno()], [], [], timeout_s)
            timeout_s = 0.0
        self._serve(self._epoll.poll(timeout_s))

    def _serve(self, found: Sequence[tuple[int, int]]) -> None:
        fds = self._fds
        for fd, _ in found:
            ready = fds.get(fd)
            if ready is None:
                continue
            try:
                ready()
            except Exception:  # noqa: BLE001 - the loop's edge: what one descriptor brings ends no other
                self._note_bug(traceback.format_exc())
                self._children.kill_owner(fd)  # what stays readable would bring the same again

    def _spin(self, now_s: float) -> bool:
        """While a short run is out, looks for its answer without sleeping: a wake-up costs more than the run.

        True when something was found. Bounded by the core's estimate, and only where another CPU is free.
        """
        until_s = self._core.runs.spin_until_s
        if now_s >= until_s or not self._may_spin:
            return False
        poll = self._epoll.poll
        while time.monotonic() < until_s:
            found = poll(0)
            if found:
                self._serve(found)
                return True
            os.sched_yield()
        return False

    _next_s = 0.0
    """When `_timers` is to run at the latest; kept current by `_due_s`."""

    def _due_s(self) -> float:
        due = min(self._sample_at_s, self._children.reap_at_s, self._flush_at_s)
        due = min(due, self._exporter.due_s, self._heart.due_s, self._disk.due_s)
        core_due = self._core.next_due_s()
        if core_due is not None and core_due < due:
            due = core_due
        self._next_s = due
        return due

    def _timers(self, now_s: float) -> None:
        for due_s, task in (
            (self._flush_at_s, self._flush),
            (self._children.reap_at_s, self._children.reap),
            (self._disk.due_s, self._disk.tick),
            (self._sample_at_s, self._sample),
            (self._heart.due_s, self._beat),
            (self._exporter.due_s, self._write_metrics),
        ):
            if now_s < due_s:
                continue
            try:
                task(now_s)
            except Exception:  # noqa: BLE001 - the loop's edge: one timer's bug must not stop the others
                self._note_bug(traceback.format_exc())
        self._well = self._step(Tick())

    def _flush(self, now_s: float) -> None:
        """Tries again to send what slow clients had no room for; ever more seldom while nothing moves."""
        moved = False
        for router in self._routers.values():
            if router.has_backlog:
                moved = router.flush() or moved
                self._unasked.add(router)
        self._flush_pause_s = FLUSH_S if moved else min(FLUSH_MAX_S, 2 * self._flush_pause_s)
        waits = any(router.has_backlog for router in self._routers.values())
        self._flush_at_s = now_s + self._flush_pause_s if waits else math.inf

    def _step(self, event: Event) -> bool:
        """An event to the core, and the core's effects carried out; whether the core could handle it."""
        try:
            effects = self._core.handle(event, time.monotonic())
        except Exception:  # noqa: BLE001 - the loop's edge: a bug costs one event, not the daemon
            self._on_bug(event)
            return False
        handlers = self._handlers
        for effect in effects:
            try:
                handlers[type(effect)](effect)
            except Exception:  # noqa: BLE001 - as above; the other effects are still carried out
                self._on_bug(effect)
        return True

    def _on_bug(self, what: Event | Effect) -> None:
        """A bug is logged, and whoever waits for what did not happen is told."""
        incident = secrets.token_hex(4)
        self._note_bug(traceback.format_exc(), incident)
        text = f"a fault of edged; the log has it as incident {incident}"
        error = Internal(text, reason="DAEMON_BUG")
        match what:
            case RequestArrived(route=route, request=request):
                # Once admitted it is answered by what becomes of its run.
                if request.id is None or self._core.scheduler.find(route, request.id) is None:
                    self._reply(what.socket, route, {"id": request.id, "error": error.to_wire()})
            case SendKept(route=route, request_id=request_id):
                self._reply("infer", route, {"id": request_id, "error": error.to_wire()})
            case SendResult(job=job):
                self._reply("infer", job.route, {"id": job.request_id, "error": error.to_wire()})
            case LanePacket(connection=connection, request=asked):
                self._reply("infer", (connection,), {"id": asked.id, "error": error.to_wire()})
            case StartRun(worker=worker, run_id=run_id):
                self._step(RunFailed(worker, run_id, error.code.value, "DAEMON_BUG", text))
            case StartWorker(worker=worker):
                self._step(WorkerGoneEvent(worker, f"it could not be started: {text}"))
            case LoadInstance(worker=worker, instance=instance):
                self._step(InstanceLoadFailed(worker, instance, "INTERNAL", "DAEMON_BUG", text))
            case StartMeasure(measure=measure):
                self._step(Measured(measure, None, text))

    def _note_bug(self, text: str, incident: str = "") -> None:
        self._journal.emit("daemon_bug", DETAIL=text, INCIDENT=incident or None)

    # ------------------------------------------------------------------ what comes in

    def _receive(self, router: Router) -> bool:
        """Serves what waits at a ROUTER, within bounds; whether there may be more."""
        for _ in range(MESSAGES_PER_TURN):
            if not router.readable():
                return False
            message = router.receive()
            if message is not None:
                self._step(self._decode(router.name, message))
        return True

    def _decode(self, name: str, message: Incoming) -> Event:
        frames = message.frames
        try:
            if not frames:
                raise wire.WireError(
                    InvalidArgument("the message is empty; send a header", reason="EMPTY_MESSAGE"), None
                )
            tensors = frames[1:]
            request = wire.decode_request(frames[0], [len(f) for f in tensors], name, self._wire_limits)
        except wire.WireError as e:
            return BadMessage(message.route, name, message.peer, e.request_id, e.error)
        return RequestArrived(message.route, name, message.peer, request, tensors)

    def _lanes_ready(self) -> None:
        for found in self._lanes.turn():
            match found:
                case Opened(connection=connection, peer=peer):
                    self._step(LaneOpened(connection, peer))
                case Packet():
                    self._step(self._decode_lane(found))
                case _:
                    self._step(LaneClosed(found.connection))

    def _decode_lane(self, packet: Packet) -> Event:
        route = (packet.connection,)
        try:
            request = wire.decode_lane_request(packet.raw, self._wire_limits)
        except wire.WireError as e:
            return BadMessage(route, "infer", packet.peer, e.request_id, e.error)
        if request.method in wire.LEASE_METHODS:
            return LanePacket(packet.connection, packet.peer, request, secrets.token_hex(16))
        return RequestArrived(route, "infer", packet.peer, request)

    def _take_mail(self, fd: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(fd)
        while (event := self._mailbox.take()) is not None:
            if isinstance(event, _PageAsked):
                event.answer.put(self._page(time.monotonic()))
                continue
            if not self._disk.takes(event):
                self._step(event)

    def _pressed(self, fd: int) -> None:
        """The system asks for memory back: the guard looks now, and workers give back their reserves."""
        now_s = time.monotonic()
        if self._pressure.take():
            if now_s - self._pressed_at_s >= PRESSED_QUIET_S:
                self._journal.emit("memory_pressed", SOURCE=self._pressure.source)
            self._pressures += 1
            self._sample_at_s = min(self._sample_at_s, max(now_s, self._pressed_at_s + PRESSED_PAUSE_S))
            self._pressed_at_s = now_s
        if self._pressure.fd is None:
            self.unwatch(fd)

    def _take_signals(self, fd: int) -> None:
        for number in os.read(fd, 64):
            if number == signal.SIGHUP:
                self._reread()
            elif number in (signal.SIGTERM, signal.SIGINT):
                grace_s = self._config.server.shutdown_grace_s
                self._notifier.stopping("stopping: finishing what runs", longer_s=grace_s + STOP_S)
                self._step(ShutdownAsked())

    def _reread(self) -> None:
        # Before it is ready, or while it stops, READY=1 would say what is not so.
        told = self._core.state == "ready"
        if told:
            self._notifier.reloading("reading the configuration again")
        try:
            config = self._reload()
        except ConfigError as e:
            self._journal.emit("config_rejected", DETAIL=e.message)
            self._notes = ("the new configuration was refused (the journal says why)",)
        else:
            self._take_config(compare(self._config, config))
        if told:
            self._heart.ready(self._core, time.monotonic(), self._notes)

    def _take_config(self, found: Reload) -> None:
        config = found.config
        self._step(ConfigChanged(config, memory_limit_bytes(config.resources.memory)))
        self._wire_limits = self._core.wire_limits
        self._config = config
        self._exporter.configure(config.metrics, time.monotonic())
        self._disk.configure(config)
        for candidate in self._unknown_devices():
            self._core.placement.probe(candidate)
        self._step(Tick())
        live, waiting = ", ".join(found.live), ", ".join(found.waiting)
        self._notes = (f"a restart is needed for {waiting}",) if waiting else ()
        self._journal.emit("config_reloaded", CHANGED=live or None, NEEDS_RESTART=waiting or None)

    # ------------------------------------------------------------------ what goes out

    def _send_result(self, effect: SendResult) -> None:
        try:
            outputs, landed = self._children.outputs(effect)
        except ArenaBoundsError as e:
            self._note_bug(str(e))
            error = Internal(
                f"model '{effect.name}': its worker's answer was out of bounds", reason="WORKER_FAULT"
            )
            self._step(_unsent(effect, error))
            return
        job = effect.job
        frames = wire.encode_infer_reply(
            job.request_id,
            effect.name,
            effect.version,
            outputs,
            effect.parameters,
            landed,
            in_one=type(job.route[0]) is int,
        )
        try:
            self._send("infer", job.route, frames)
        except ResourceExhausted as error:
            self._step(_unsent(effect, error))
            return
        if job.keep is not None:
            with contextlib.suppress(MemoryError):  # it is answered, and need not be kept
                self._keep(job, job.keep, outputs, effect.parameters)

    def _keep(self, job: Job, keep: Keep, outputs: Sequence[wire.Output], parameters: dict[str, Any]) -> None:
        """Copies an answer out of its slot, which is about to be used again."""
        began_ns = time.monotonic_ns()
        if sum([len(content) for *_, content in outputs]) > keep.bytes_max:
            return
        made = {k: v for k, v in parameters.items() if k in _HOW_MADE}
        copied = tuple((name, datatype, shape, bytes(content)) for name, datatype, shape, content in outputs)
        answer = Answer(copied, made)
        self._step(Kept(job.instance, keep, answer, time.monotonic_ns() - began_ns))

    def _send_kept(self, effect: SendKept) -> None:
        frames = wire.encode_infer_reply(
            effect.request_id,
            effect.name,
            effect.version,
            effect.outputs,
            effect.parameters,
            in_one=type(effect.route[0]) is int,
        )
        try:
            self._send("infer", effect.route, frames)
        except ResourceExhausted as error:
            route, asked = effect.route, effect.request_id
            self._step(Unsent(route, asked, effect.instance, effect.arrived_s, error))
            return
        took_ns = int((time.monotonic() - effect.arrived_s) * 1e9)
        self._step(KeptSent(effect.instance, effect.rows, max(0, took_ns)))

    def _reply(self, socket: str, route: Route, header: dict[str, Any]) -> None:
        try:
            self._send(socket, route, [wire.encode(header)])
        except ResourceExhausted as error:
            try:
                self._send(socket, route, [wire.encode({"id": header["id"], "error": error.to_wire()})])
            except ResourceExhausted:  # by now a client that does not read: there is no room for a word
                self._routers[socket].dropped_replies += 1

    def _send(self, socket: str, route: Route, frames: Sequence[bytes | memoryview]) -> None:
        """Sends a reply the way that its request came: to a lane, or over one of the ROUTERs.

        Raises ResourceExhausted for one that does not fit there.
        """
        connection = route[0]
        if isinstance(connection, int):
            wire.check_lane_reply(frames)
            self._lanes.send(connection, frames[0])
            return
        router = self._routers[socket]
        router.send(cast(Envelope, route), frames)
        self._unasked.add(router)
        if router.has_backlog and self._flush_at_s == math.inf:
            self._flush_pause_s = FLUSH_S
            self._flush_at_s = time.monotonic() + FLUSH_S

    def _land_reply(self, effect: LandReply) -> None:
        header = effect.header
        try:
            self._lanes.write(effect.part.region, effect.part.offset, effect.raw)
        except OSError as e:
            error = ResourceExhausted(f"no memory for the reply: {e.strerror}", reason="OUT_OF_MEMORY")
            header = {"id": header["id"], "error": error.to_wire()}
        self._reply(effect.socket, effect.route, header)

    # ------------------------------------------------------------------ leases

    def _grant_region(self, effect: GrantRegion) -> None:
        header = {"id": effect.request_id, "region": effect.name, "byte_size": effect.nbytes}
        try:
            self._lanes.grant(effect.connection, wire.encode(header), effect.region, effect.nbytes)
        except OSError as e:  # no memory, no descriptors
            self._step(RegionFailed(effect.connection, effect.request_id, effect.name, e.strerror or str(e)))

    def _free_region(self, effect: FreeRegion) -> None:
        self._lanes.free(effect.region)
        self._children.forget_region(effect.region)

    def _shrink(self) -> None:
        # Only free slots: the others are in use.
        self._children.shrink({w.id: w.free_slots for w in self._core.workers.table.values()})

    # ------------------------------------------------------------------ devices

    def _remember_verdict(self, effect: RememberVerdict) -> None:
        device, mark = f"{effect.runtime}:{effect.device}", self._probe_mark(effect.runtime)
        self._disk.remember_verdict(device, mark, effect.verdict)

    def _probe_mark(self, runtime: str) -> str:
        """What a probe's verdict depends on, as far as it shows from here; empty when that is not enough."""
        installed = self._children.spawner.installed_mark(runtime)
        if not installed:
            return ""
        release = os.uname().release
        return "|".join((__version__, installed, release, _cpu_name(), *sorted(_device_nodes())))

    # ------------------------------------------------------------------ metrics

    def _page(self, now_s: float) -> str:
        outside = {
            "edged_log_dropped_total": self._journal.dropped,
            "edged_memory_pressure_events_total": self._pressures,
            "edged_disk_busy_seconds": round(self._disk.busy_s(now_s), 3),
        }
        return self._metrics.render(self._core, now_s, outside)

    def _write_metrics(self, now_s: float) -> None:
        self._exporter.write(self._page, now_s)

    def _ask_for_page(self) -> str | None:
        """From the server's thread: the loop renders, since nobody else may look at the core."""
        answer: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._mailbox.put(_PageAsked(answer))
        try:
            return answer.get(timeout=PAGE_S)
        except queue.Empty:
            return None

    # ------------------------------------------------------------------ time

    def _sample(self, now_s: float) -> None:
        core = self._core
        self._sample_at_s = now_s + self._config.resources.sample_s
        core.runs.epoch_offset_s = time.time() - now_s
        pids = [w.pid for w in core.workers.table.values() if w.pid is not None]
        pressed, self._pressures_taken = self._pressures > self._pressures_taken, self._pressures
        self._step(Sampled(self._sampler.sample(pids), pressed))
        self._lanes.rested()
        for runtime, pid in self._children.look_after(now_s).items():
            self._journal.emit("template_crashed", RUNTIME=runtime, PID=pid)
        nodes, asleep_s = _device_nodes(), _asleep_s()
        if nodes != self._devices_seen or asleep_s > self._awake_s + 5.0:
            self._devices_seen = nodes
            self._step(DevicesChanged())
        self._awake_s = asleep_s
        for summary in self._limiter.due(now_s):
            self._journal.emit("client_misbehaves_count", REASON=str(summary.key), COUNT=summary.count)
        for router in self._routers.values():
            if router.dropped_replies:
                self._journal.emit("client_slow", COUNT=router.dropped_replies)
                router.dropped_replies = 0
        self._disk.look_after(now_s)

    def _beat(self, now_s: float) -> None:
        busy_s, notes = self._disk.busy_s(now_s), self._notes
        if busy_s >= DISK_STALLED_S:
            notes = (*notes, f"a disk has not answered for {busy_s // 60:.0f} minutes")
        at_most_s = self._config.resources.sample_s
        self._heart.beat(self._core, now_s, at_most_s=at_most_s, well=self._well, notes=notes)
        if (busy_s >= DISK_STALLED_S) != self._disk_stalled:
            self._disk_stalled = not self._disk_stalled
            if self._disk_stalled:
                self._journal.emit("disk_stalled", DURATION_MS=round(busy_s * 1000))
            else:
                self._journal.emit("disk_answers")

    # ------------------------------------------------------------------ effects

    def _effect_table(self) -> dict[type[Effect], Callable[[Any], None]]:
        children, disk = self._children, self._disk
        return {
            Reply: lambda e: self._reply(e.socket, e.route, e.header),
            LandReply: self._land_reply,
            SendResult: self._send_result,
            SendKept: self._send_kept,
            StartRun: children.start_run,
            GrantRegion: self._grant_region,
            FreeRegion: self._free_region,
            CancelRun: lambda e: children.tell(e.worker, ["cancel", e.run_id]),
            StartWorker: children.start_worker,
            LoadInstance: children.load,
            CancelLoad: lambda e: children.tell(e.worker, ["cancel_load", e.instance]),
            UnloadInstance: lambda e: children.tell(e.worker, ["unload", e.instance]),
            EndWorker: lambda e: children.tell(e.worker, ["exit"]),
            KillWorker: lambda e: children.kill(e.worker),
            ShrinkWorkers: lambda _: self._shrink(),
            Stage: disk.stage,
            PrepareLoad: disk.prepare_load,
            HashCopy: disk.hash_copy,
            SetAside: disk.set_aside,
            EndAttempt: disk.end_attempt,
            MarkGood: disk.mark_good,
            ForgetModel: lambda e: disk.in_store(lambda s: s.forget_model(e.name, e.version)),
            RememberChoice: lambda e: disk.in_store(lambda s: s.remember_choice(e.key, e.choice)),
            RememberSizes: disk.remember_sizes,
            RememberVerdict: self._remember_verdict,
            Collect: lambda e: disk.in_store(lambda s: s.collect(set(e.in_use)), later="collect"),
            Scan: disk.scan,
            Probe: children.probe,
            StartMeasure: children.start_measure,
            StopMeasure: children.stop_measure,
            Publish: self._publish,
            Log: self._log,
            SetLogLevel: self._set_log_level,
            Ready: lambda _: self._ready(),
            Exit: lambda _: self._exit(),
        }

    def _publish(self, effect: Publish) -> None:
        effect.payload["time_ns"] = time.time_ns()
        with contextlib.suppress(zmq.Again):
            self._events.send_multipart(
                [effect.topic.encode(), wire.encode(effect.payload)], zmq.NOBLOCK, copy=True
            )

    def _log(self, effect: Log) -> None:
        fields = effect.fields
        if effect.kind in ("client_misbehaves", "request_internal_error"):
            by = f"uid {fields['CLIENT_UID']}" if "CLIENT_UID" in fields else f"model {fields.get('MODEL')}"
            key = f"{fields.get('REASON')} by {by}"
            if not self._limiter.admit(key, time.monotonic()):
                return
        self._journal.emit(effect.kind, **fields)

    def _set_log_level(self, effect: SetLogLevel) -> None:
        self._journal.set_level(cast(LevelName, effect.level))
        self._journal.emit("log_level_changed", LEVEL=effect.level)

    def _ready(self) -> None:
        took_ms = round((time.monotonic() - self._core.started_s) * 1000)
        text = self._heart.ready(self._core, time.monotonic(), self._notes)
        self._journal.emit("server_ready", DURATION_MS=took_ms, DETAIL=text)

    def _exit(self) -> None:
        self._running = False

    # ------------------------------------------------------------------ stopping

    def _stop(self) -> None:
        """Ends every child; the sockets and locks go with the stack."""
        self._children.end()
        self._disk.end()
        self._children.wait_ended()
        self._journal.emit("server_stopped")


def _unsent(effect: SendResult, error: EdgedError) -> Unsent:
    """A result that its client gets an error for."""
    job = effect.job
    return Unsent(job.route, job.request_id, job.instance, job.arrived_s, error, effect.counted)


class _PageAsked(Event, frozen=True):
    """From the server of metrics: somebody wants to read them."""

    answer: Any
    """A `queue.SimpleQueue` that gets the page."""


def _descriptors_max() -> int:
    """How many descriptors this process may have."""
    soft: int = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return soft if soft != resource.RLIM_INFINITY else 1 << 20


def _cpu_name() -> str:
    """What the processor calls itself; part of the key of remembered choices."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as f:
        for line in f:
            if line.startswith(("model name", "Model")):
                return line.partition(":")[2].strip()
    return platform.machine()


def _device_nodes() -> frozenset[str]:
    """The device nodes that accelerators come with; a change means that verdicts may be stale."""
    found: list[str] = []
    for folder, prefix in (("/dev", "nvidia"), ("/dev/dri", "renderD"), ("/dev/accel", "accel")):
        with contextlib.suppress(OSError):
            found += [f"{folder}/{n}" for n in os.listdir(folder) if n.startswith(prefix)]
    return frozenset(found)


def _asleep_s() -> float:
    """Time that the machine has been suspended; it grows at each resume."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - time.monotonic()


def main(config: Config, *, reload: Callable[[], Config]) -> int:
    """Runs the daemon in the foreground; returns the exit code."""
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    journal = Journal(cast(LevelName, config.log.level), config.log.format)
    try:
        with Daemon(config, journal=journal, reload=reload) as daemon:
            daemon.run()
    except (TransportError, StoreError) as e:
        journal.emit("server_failed", DETAIL=str(e))
        return _EXIT_BUSY
    finally:
        journal.close()
    return 0
