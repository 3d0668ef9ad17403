"""The moves of instances: waiting, loading, serving, failing, restarting.

Pure: takes events and the time, emits effects. The words are those of `instances`. Traffic moves from one
instance to the next in a single assignment (`_take_over`); until then, and for good when the new one fails,
the old one serves. How instances end is `retirement`'s, whose turn it is to load `turns`'s.

A worker that dies is started again, at once the first time and then with a growing pause; what waited for it
keeps waiting only while that is a matter of moments.

Each load is of a stored copy, which is hashed while the worker loads (`_hash`). However the load ends,
nothing follows from it before the hash is there (`_hold`): a rotten copy may load and answer wrongly, or
fail, and then its content is not to blame. One that is found rotten is copied again from the models folder,
if that still has the content; else what served before comes back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from edged.devices import Candidate, matches
from edged.errors import Unavailable
from edged.events import (
    Collect,
    EndAttempt,
    HashCopy,
    Log,
    MarkGood,
    PrepareLoad,
    Publish,
    Ready,
    SetAside,
    Stage,
)
from edged.instances import (
    LOADS,
    CopyState,
    Failure,
    Hooks,
    Instance,
    InstanceState,
    Surroundings,
    Track,
    Worker,
    state_event,
)
from edged.placement import Placement, after_failure
from edged.registry import Registry
from edged.repository import Entry
from edged.retirement import Retirement
from edged.runs import RUN_HUNG
from edged.setups import Setup
from edged.sizes import SizeTable
from edged.turns import Turns
from edged.workers import Workers

__all__ = ["Lifecycle"]

STABLE_S = 60.0
"""A worker that served this long has recovered; the next crash is a first one again."""

CRASHES_TO_MOVE = 2
"""An instance that crashed more often than this in a row is tried on the next device of its plan."""

PATIENCE_S = 0.5
"""What waits for a worker waits through a pause as short as this: a batch that ended its worker is run again
one by one, and the one that is to blame ends it a second time, with its neighbours still waiting."""

LOAD_TIMED_OUT = "load time-out"

SPOILT_MAX = 3
"""A copy that was made so often and came out damaged each time: the disk is to blame, and making another only
wears it out."""

_HOW = ("runtime", "device", "threads", "instances", "max_batch_size")
"""The settings that say how a model is run, which may also be found by measuring."""


class Lifecycle:
    """Moves instances."""

    def __init__(
        self,
        around: Surroundings,
        *,
        registry: Registry,
        workers: Workers,
        placement: Placement,
        hooks: Hooks,
        now_s: float,
    ) -> None:
        self.ready = False
        """Whether everything that was in the folder at the start serves, or is known not to."""
        self.turns = Turns(around, registry=registry, workers=workers)
        self.retirement = Retirement(
            around, registry=registry, workers=workers, turns=self.turns, hooks=hooks, ended=self.step
        )
        self._around = around
        self._registry = registry
        self._workers = workers
        self._placement = placement
        self._hooks = hooks
        self._started_s = now_s
        self._ids = 0
        self._rounds = 0
        """Asked of `step` since it began; 0 when it is not running."""

    # ------------------------------------------------------------------ coming in

    def enter(
        self, track: Track, entry: Entry, staged: Any, setup: Setup | None = None, choice: str = ""
    ) -> Instance:
        """A new instance, which waits for its turn to load, to run as `setup` says because of `choice`."""
        self._ids += 1
        instance = Instance(self._ids, track, entry, staged, entry.settings)
        before = track.serving
        if before is not None and before.sizes is not None:
            same = before.staged.digest == staged.digest
            instance.sizes = before.sizes if same else before.sizes.copied()
        if setup is not None:
            instance.setup, instance.choice, instance.settled = setup, choice, True
        elif instance.pinned:
            instance.choice = "pinned"
        elif before is not None and before.candidate in self._placement.plan_for(instance).candidates[:1]:
            # Only where it would run anyhow: that the version before answered alike on another runtime proves
            # nothing about this one, and neither does it that its rows could share a run.
            chosen = before.setup or Setup(before.candidate, self._around.machine.cpus)
            instance.setup = replace(chosen, candidate=before.candidate, max_batch=0)
            instance.choice = "inherited"
        track.incoming = instance
        self._registry.instances[instance.id] = instance
        self.turns.queue.append(instance)
        self._around.emit(instance.event())
        return instance

    def switch(self, instance: Instance, setup: Setup, choice: str, now_s: float) -> Instance | None:
        """Loads a serving instance's content beside itself as was measured to be better."""
        track = instance.track
        if track.serving is not instance or track.incoming is not None:
            return None
        new = self.enter(track, instance.entry, instance.staged, setup, choice)
        new.measured = dict(instance.measured)
        self.step(now_s)
        return new

    def adopt(self, instance: Instance, entry: Entry, staged: Any) -> bool:
        """Takes new settings over without a load, where they only say how the same content runs anyhow."""
        new, old = entry.settings, instance.settings
        if instance.state is not InstanceState.READY or instance.staged.digest != staged.digest:
            return False
        if replace(old, **{name: getattr(new, name) for name in _HOW}) != new or instance.fallback_reason:
            return False
        other = Instance(0, instance.track, entry, staged, new, setup=instance.setup)
        found = self._placement.plan_for(other)
        if not found.candidates or found.candidates[0] != instance.plan[0]:
            return False
        if self._workers.setup_of(other, found.candidates[0]) != self._setup(instance):
            return False
        instance.entry, instance.settings, instance.plan = entry, new, found.candidates
        if instance.pinned:
            instance.choice = "pinned"
        self._around.emit(MarkGood(entry, instance.staged))
        return True

    def _setup(self, instance: Instance) -> Setup:
        return self._workers.setup_of(instance, instance.plan[0])

    def offer_device(self, candidate: Candidate) -> None:
        """A device came, or works again: who fell back from it returns, who may choose compares anew."""
        for track in self._registry.tracks.values():
            instance = track.serving
            if instance is None or instance.state is not InstanceState.READY or track.incoming is not None:
                continue
            if not instance.pinned and instance.settled:
                instance.choice, instance.settled = "default", False
            elif (
                instance.pinned
                and instance.fallback_reason
                and matches(instance.settings.device, candidate)
                and instance.settings.runtime in (None, candidate.runtime)
            ):
                self.enter(track, instance.entry, instance.staged)

    # ------------------------------------------------------------------ waiting

    def step(self, now_s: float) -> None:
        """Starts the loads whose turn has come, and says when the daemon is ready.

        What it does leads back here (a refusal makes another's turn): that is one more round of the loop, not
        a call within the call, which would find the queue changed under its feet.
        """
        self._rounds += 1
        if self._rounds > 1:
            return
        try:
            done = 0
            while done < self._rounds:
                done = self._rounds
                for instance in self.turns.waiting():
                    if instance.state is InstanceState.WAITING:
                        self._begin(instance, now_s)
        finally:
            self._rounds = 0
        self._say_ready(now_s)

    def _begin(self, instance: Instance, now_s: float) -> None:
        """Starts a waiting instance's load if it may."""
        if not self._plan(instance, now_s) or not self.turns.device_free(instance, now_s):
            return
        if not instance.makes_room and not self.turns.memory_allows(instance, now_s):
            return
        if instance.settings.swap == "replace" and not self._make_room(instance, now_s):
            return
        self.turns.drop(instance)
        instance.move(InstanceState.PREPARING, "MODEL_LOADING", "recording the attempt")
        key = self._placement.choice_key(instance)
        self._around.emit(PrepareLoad(instance.id, instance.staged.digest, key))
        self._hash(instance)

    def _plan(self, instance: Instance, now_s: float) -> bool:
        """Sets the instance's candidates; False while a verdict is waited for, or when there are none."""
        found = self._placement.plan_for(instance)
        if found.waiting:
            instance.message = "waiting for the devices' verdicts"
            return False
        if not found.candidates:
            self._fail(instance, "DEVICE_UNAVAILABLE", f"{found.refusal}; see `edgectl devices`", now_s)
            return False
        instance.plan = found.candidates
        instance.fallback_reason = found.missing
        if instance.preferred is not None and found.candidates[0] != instance.preferred:
            instance.choice, instance.settled = "pinned" if instance.pinned else "default", False
        return True

    def _make_room(self, instance: Instance, now_s: float) -> bool:
        """Ends the version before an instance that is not to load beside it; whether it has ended."""
        track = instance.track
        instance.makes_room = True
        if track.serving is not None:
            track.last_good = (track.serving.entry, track.serving.staged)
            self.retirement.drain(track.serving, "MODEL_LOADING", "making room for its next version", now_s)
        if track.draining:
            instance.message = "waiting for the version before to end"
        return not track.draining

    def _say_ready(self, now_s: float) -> None:
        if self.ready:
            return
        if self._registry.settled() or now_s >= self._startup_ends_s():
            self.ready = True
            self._around.emit(Ready())
            self._around.emit(Publish("server.state", {"state": "ready"}))

    def _startup_ends_s(self) -> float:
        return self._started_s + self._around.config.server.startup_wait_s

    # ------------------------------------------------------------------ loading

    def on_load_prepared(
        self, instance_id: int, choice: Mapping[str, Any] | None, sizes: object, now_s: float
    ) -> None:
        """The attempt is on record; start the worker."""
        instance = self._registry.instances.get(instance_id)
        if instance is None or instance.state is not InstanceState.PREPARING:
            return
        if choice is not None:
            instance.record = choice
            self._placement.recall(instance, choice)
        if not instance.sizes:
            instance.sizes = SizeTable.from_wire(sizes)
        self._start_load(instance, now_s)

    def _hash(self, instance: Instance) -> None:
        """Has the copy hashed beside the load; once, however many devices the load is tried on."""
        if instance.copy is CopyState.UNKNOWN:
            instance.copy = CopyState.HASHING
            self._around.emit(HashCopy(instance.id, instance.staged.digest, instance.staged.size_bytes))

    def _start_load(self, instance: Instance, now_s: float) -> None:
        self._hash(instance)
        candidate = instance.plan[0]
        instance.move(InstanceState.LOADING, "MODEL_LOADING", f"loading on {candidate}")
        instance.due_s = now_s + self._around.config.loading.timeout_s
        instance.load_started_s = now_s
        worker = self._workers.enter(instance, candidate)
        fields = {**instance.log_fields(), "RUNTIME": candidate.runtime, "DEVICE": candidate.device}
        self._around.emit(Log("model_loading", fields))
        if instance.track.serving is instance and instance.info:
            known = instance.info.get("batch")  # back to where it was: nothing to prove, and requests wait
        elif self.ready:
            known = None
        else:
            # At the start many load at once, which takes longest and is the worst moment to time anything.
            known = self._placement.known_batch(instance, self._setup(instance))
        self._workers.load(instance, worker, known)
        self._around.emit(instance.event())

    def on_proving(self, worker_id: int, instance_id: int) -> None:
        """A worker has loaded an instance and tries batches: what ends it now is no fault of the model's."""
        instance = self._registry.instances.get(instance_id)
        if instance is not None and instance.worker == worker_id:
            instance.proving = worker_id

    def on_loaded(self, instance_id: int, info: dict[str, Any], now_s: float) -> None:
        """A worker has loaded, warmed up and proved an instance: it serves from now on."""
        instance = self._registry.instances.get(instance_id)
        if instance is None or instance.state is not InstanceState.LOADING:
            return
        if instance.copy is CopyState.HASHING:
            self._hold(instance, info)
            return
        instance.learn(info)
        self._placement.note_batch(instance, self._setup(instance))
        instance.due_s = None
        instance.ready_s = now_s
        instance.move(InstanceState.READY, "", self._workers.remark(instance))
        worker = self._workers.of(instance)
        if worker is not None:
            worker.rss_bytes = max(worker.rss_bytes, int(info.get("rss_bytes") or 0))
        fields = {
            **instance.log_fields(),
            "RUNTIME": str(info["runtime"]),
            "DEVICE": str(info["device"]),
            "DURATION_MS": str(round((now_s - instance.load_started_s) * 1000)),
        }
        if instance.fallback_reason:
            settings = instance.settings
            wanted = {"WANTED": " on ".join(filter(None, (settings.device, settings.runtime)))}
            reason = {"REASON": instance.fallback_reason}
            self._around.emit(Log("device_fallback", {**fields, **wanted, **reason}))
        if instance.track.serving is instance:
            self._around.emit(Log("worker_restarted", fields))
        else:
            self._take_over(instance, fields, now_s)
        self._registry.changed()
        self._around.emit(instance.event())
        self.step(now_s)

    def _hold(self, instance: Instance, outcome: dict[str, Any] | tuple[str, str]) -> None:
        """A load has ended before its copy was hashed: nothing follows from it until then."""
        instance.outcome = outcome
        if instance.state is not InstanceState.HASHING:
            text = "its load has ended; its stored copy is still being hashed"
            instance.move(InstanceState.HASHING, "MODEL_LOADING", text)

    def _go_on(self, instance: Instance, now_s: float) -> None:
        """Does what was held, if anything was."""
        outcome = instance.outcome
        if outcome is None:
            return
        instance.move(InstanceState.LOADING, "MODEL_LOADING", "its stored copy is sound")
        if isinstance(outcome, tuple):
            self.on_load_failed(instance.id, *outcome, now_s)
        else:
            self.on_loaded(instance.id, outcome, now_s)

    def _take_over(self, instance: Instance, fields: dict[str, str], now_s: float) -> None:
        """An instance takes the place of the one that served, if any did."""
        track = instance.track
        old, track.serving, track.incoming = track.serving, instance, None
        track.last_good = None
        track.spoilt = 0
        instance.crashes = 0
        if track.failure is not None and track.entry is not None and instance.entry == track.entry:
            track.failure = None
        self._around.emit(EndAttempt(instance.staged.digest))
        self._around.emit(MarkGood(instance.entry, instance.staged))
        if old is None:
            self._around.emit(Log("model_ready", fields))
        else:
            self._around.emit(Log("model_swapped", {**fields, "PREVIOUS_VERSION": str(old.version)}))
            if old.version == instance.version and old.staged.digest == instance.staged.digest:
                instance.stats = old.stats
            self.retirement.drain(old, "MODEL_RETIRED", f"version {instance.version} serves now", now_s)
        for other in self._registry.named(track.name):
            if other.superseded and other is not track:
                self.retirement.remove(other.key, now_s)
        self._around.emit(Collect(self._registry.digests_in_use()))

    # ------------------------------------------------------------------ failing

    def on_load_failed(self, instance_id: int, reason: str, message: str, now_s: float) -> None:
        """A candidate could not load an instance: the next one, or the end."""
        instance = self._registry.instances.get(instance_id)
        if instance is None or instance.state not in LOADS:
            return
        self._workers.leave(instance, now_s)
        if instance.copy is CopyState.HASHING:
            self._hold(instance, (reason, message))
            return
        serving = instance.track.serving
        if serving is instance:
            self._crashed(instance, reason, message, now_s)
            return
        candidate = instance.plan[0]
        instance.errors.append((candidate, reason, message))
        if reason == "DEVICE_FAILED":
            self._placement.probe(candidate)
        rest = after_failure(instance.plan, reason)
        if reason == "NOT_BATCHABLE" and instance.setup is not None and instance.setup.max_batch:
            # The batch was chosen, not asked for: it is no reason not to serve.
            instance.setup = replace(instance.setup, max_batch=0)
            self._start_load(instance, now_s)
        elif serving is not None and serving.is_of(instance.entry, instance.staged):
            self._stay(serving, instance, message)
            self.step(now_s)
        elif rest:
            instance.plan = rest
            instance.choice, instance.settled = "pinned" if instance.pinned else "default", False
            instance.fallback_reason = instance.fallback_reason or f"{candidate}: {message}"
            self._start_load(instance, now_s)
        else:
            _, reason, message = instance.errors[0]
            self._fail(instance, reason, message, now_s)

    def _stay(self, serving: Instance, instance: Instance, message: str) -> None:
        """A switch to a faster device failed: what serves goes on serving, and nothing is wrong with it."""
        setup = self._setup(instance)
        instance.move(InstanceState.FAILED, "SWITCH_FAILED", message)
        instance.track.incoming = None
        self._around.emit(EndAttempt(instance.staged.digest))
        self.retirement.forget(instance)
        serving.measured[setup] = {**serving.measured.get(setup, {}), "agrees": False, "why": message}
        where = {"RUNTIME": setup.candidate.runtime, "DEVICE": setup.candidate.device}
        fields = {**serving.log_fields(), **where}
        self._around.emit(Log("choice_measured", {**fields, "DETAIL": message}))
        if serving.choice in ("default", "inherited"):
            serving.choice = "measured"
        serving.settled = True
        self._placement.remember(serving, self._setup(serving), serving.choice)

    def _fail(self, instance: Instance, reason: str, message: str, now_s: float) -> None:
        track = instance.track
        instance.move(InstanceState.FAILED, reason, message)
        self._around.emit(EndAttempt(instance.staged.digest))
        self.retirement.forget(instance)
        if track.incoming is instance:
            track.incoming = None
        failure = Failure(reason, message, instance.staged.digest, instance.version, instance.settings)
        if self._registry.tracks.get(track.key) is track:
            self.note_failure(track, failure, now_s)

    def note_failure(self, track: Track, failure: Failure, now_s: float, kind: str = "model_failed") -> None:
        """A content of a track does not serve: say so, and see what can; `kind` is the log's."""
        track.failure = failure
        fields = {"MODEL": track.name, "REASON": failure.reason, "DETAIL": failure.message}
        if failure.version is not None:
            fields["MODEL_VERSION"] = str(failure.version)
        self._around.emit(Log(kind, fields))
        event = state_event(track.name, failure.version, "UNAVAILABLE", failure.reason, failure.digest)
        self._around.emit(event)
        self.bring_back(track, now_s)
        self.step(now_s)

    def bring_back(self, track: Track, now_s: float) -> None:
        """Where nothing serves, loads the last good content, unless that is what just failed."""
        if track.last_good is None or track.serving is not None or track.incoming is not None:
            return
        if track.unloaded:
            return
        entry, staged = track.last_good
        if track.failure is not None and track.failure.is_of(entry, staged):
            track.last_good = None
            return
        why = self._registry.folder.fault if track.failure is None else track.failure.message
        fields = {"MODEL": track.name, "MODEL_VERSION": str(staged.version), "REASON": why}
        self._around.emit(Log("model_restored", fields))
        self.enter(track, entry, staged)
        self.step(now_s)

    # ------------------------------------------------------------------ copies that rot

    def on_copy_hashed(self, instance: Instance, reason: str, message: str, now_s: float) -> None:
        """What the copy is worth that an instance is loaded from."""
        if not reason:
            instance.copy = CopyState.SOUND
            self._go_on(instance, now_s)
        elif reason == "COPY_DAMAGED":
            self._copy_damaged(instance.staged.digest, message, now_s)
        else:
            instance.copy = CopyState.UNKNOWN
            again = f"`edgectl load {instance.name}` tries again"
            self._unproved(instance, f"its stored copy could not be hashed: {message}; {again}", now_s)

    def _unproved(self, instance: Instance, message: str, now_s: float) -> None:
        """Nobody can say whether an instance's copy is sound, so it cannot serve."""
        self._workers.stop_load(instance, now_s)
        if instance.track.serving is instance:
            self._crashed(instance, "COPY_UNREADABLE", message, now_s)
        elif instance.track.incoming is instance:
            self._fail(instance, "COPY_UNREADABLE", message, now_s)

    def _copy_damaged(self, digest: str, detail: str, now_s: float) -> None:
        """A content's copy is not what it was: nothing that was loaded from it answers any more."""
        self._around.emit(SetAside(digest))
        for track in list(self._registry.tracks.values()):
            if track.last_good is not None and track.last_good[1].digest == digest:
                track.last_good = None
            hurt = [i for i in track.instances() if i.staged.digest == digest]
            if hurt:
                self._spoilt(track, hurt, detail, now_s)
        self._registry.changed()
        self.step(now_s)

    def _spoilt(self, track: Track, hurt: list[Instance], detail: str, now_s: float) -> None:
        """Ends what a track has from a damaged copy, and has the copy made again if that can be."""
        first = hurt[0]
        text = f"its stored copy is damaged: {detail}"
        fields = {**first.log_fields(), "DETAIL": f"{first.staged.digest}: {detail}"}
        self._around.emit(Log("copy_damaged", fields))
        live = [i for i in hurt if i is track.serving or i is track.incoming]
        for instance in hurt:
            if instance is track.incoming:
                self.retirement.abandon_incoming(track, now_s, "COPY_DAMAGED", text)
            else:
                message = f"model '{track.name}': {text}"
                self.retirement.stop(instance, "COPY_DAMAGED", message, now_s)
        digest = first.staged.digest
        self._around.emit(state_event(track.name, first.version, "UNAVAILABLE", "COPY_DAMAGED", digest))
        if not live or track.incoming is not None or track.failure is not None:
            return  # Something else is on its way, or the folder's content is refused for its own sake.
        track.spoilt += 1
        if track.entry is not None and track.spoilt <= SPOILT_MAX:
            # Without a failure the track is one that is being copied; that is what it says of itself.
            self._around.emit(Stage(track.entry))
            return
        again = f"`edgectl load {track.name}` tries again; see whether the disk fails (dmesg)"
        track.lost = Failure("COPY_DAMAGED", f"{text}; {again}", digest, first.version)

    def on_copy_set_aside(self, digest: str, before: Sequence[tuple[Entry, Any]], now_s: float) -> None:
        """A damaged copy is out of use; `before` is what the models that had it can fall back on."""
        found = {entry.key: (entry, staged) for entry, staged in before}
        for track in list(self._registry.tracks.values()):
            if track.serving is None and track.last_good is None:
                track.last_good = found.get(track.key)
            if track.lost is not None and track.lost.digest == digest:
                lost, track.lost = track.lost, None
                if track.incoming is None and track.failure is None and not track.unloaded:
                    self.note_failure(track, lost, now_s)
            elif track.failure is not None and track.key in found:
                self.bring_back(track, now_s)
        self.step(now_s)

    # ------------------------------------------------------------------ crashing and restarting

    def on_worker_gone(self, worker_id: int, how: str, now_s: float) -> None:
        """A worker's process has ended. The core has dealt with its runs before."""
        worker = self._workers.gone(worker_id)
        if worker is None:
            return
        why = worker.killed_for or how
        for instance_id in sorted(worker.instances):
            instance = self._registry.instances.get(instance_id)
            if instance is not None:
                instance.worker = None
                self._lost_worker(instance, worker, why, now_s)
        if not worker.instances:
            for about in worker.about.values():
                fields = {**about, "PID": str(worker.pid or 0), "REASON": why}
                self._around.emit(Log("worker_exited", fields))
        self.step(now_s)

    def _lost_worker(self, instance: Instance, worker: Worker, why: str, now_s: float) -> None:
        text = f"its worker ended: {why}"
        proving, instance.proving = instance.proving == worker.id, None
        tried = instance.settings.max_batch_size is None and not instance.never_batched
        if proving and tried and instance.state in LOADS:
            instance.never_batched = f"its worker ended when batches were tried: {why}"
            fields = {**instance.log_fields(), "DETAIL": instance.never_batched}
            self._around.emit(Log("batch_refused", fields))
            self._start_load(instance, now_s)
            return
        if instance.state is InstanceState.LOADING and instance.sizes:
            # It may have died of the warm-up at a size that requests had, which is no reason not to serve.
            instance.sizes = SizeTable()
            self._start_load(instance, now_s)
            return
        if instance.state is InstanceState.DRAINING:
            self.retirement.worker_gone(instance, text, now_s)
        elif instance.track.serving is instance:
            kind = "worker_hung" if worker.killed_for == RUN_HUNG else "worker_crashed"
            fields = {**instance.log_fields(), "RUNTIME": worker.runtime, "DEVICE": worker.device}
            self._around.emit(Log(kind, {**fields, "PID": str(worker.pid or 0), "REASON": why}))
            self._crashed(instance, "WORKER_CRASHED", text, now_s)
        elif instance.state in LOADS:
            self._lost_while_loading(instance, worker, why, now_s)

    def _lost_while_loading(self, instance: Instance, worker: Worker, why: str, now_s: float) -> None:
        timed_out = why == LOAD_TIMED_OUT
        # The tick that ran its time out has cleared its due time; a neighbour's still runs.
        own = not timed_out or instance.due_s is None
        if len(worker.instances) > 1 and (not own or not instance.crashes):
            # Its neighbours may be to blame: once, or for another's time-out, it is tried again.
            instance.crashes += own
            self._start_load(instance, now_s)
            return
        reason = "MODEL_LOAD_TIMEOUT" if timed_out else "WORKER_CRASHED"
        message = f"while loading on {instance.plan[0]} its worker ended: {why}"
        self.on_load_failed(instance.id, reason, message, now_s)

    def _crashed(self, instance: Instance, reason: str, message: str, now_s: float) -> None:
        """The serving instance lost its worker, or could not get it back."""
        if instance.copy is CopyState.SOUND:
            instance.copy = CopyState.UNKNOWN  # it is read from the disk again, so it is hashed again
        self._count_crash(instance, reason, message, now_s)
        pause_s = instance.backoff_s() if instance.crashes > 1 else 0.0
        when = f" in {pause_s:g} s" if pause_s else " now"
        instance.move(InstanceState.RESTARTING, reason, f"{message}; it is started again{when}")
        instance.due_s = now_s + pause_s
        self._registry.changed()
        self._around.emit(instance.event())
        if not pause_s:
            self._start_load(instance, now_s)
            return
        pause_ms = round(pause_s * 1000)
        fields = {**instance.log_fields(), "DURATION_MS": str(pause_ms), "REASON": message}
        self._around.emit(Log("worker_restarting", fields))
        if pause_s <= PATIENCE_S:
            return
        text = f"model '{instance.name}': {instance.message}"
        self._hooks.flush(instance, Unavailable(text, reason=reason, retry_after_ms=pause_ms))

    def _count_crash(self, instance: Instance, reason: str, message: str, now_s: float) -> None:
        """Counts a crash; one too many in a row moves the instance to its plan's next device."""
        if now_s - instance.ready_s > STABLE_S and instance.state is InstanceState.READY:
            instance.crashes = 0
        instance.crashes += 1
        instance.restarts += 1
        failed, *rest = instance.plan
        if reason == "DEVICE_FAILED" or failed.gpu_like:
            self._placement.probe(failed)
        if instance.crashes > CRASHES_TO_MOVE and rest:
            instance.plan = (*rest, failed)
            instance.fallback_reason = f"{failed}: {message}"

    # ------------------------------------------------------------------ time

    def tick(self, now_s: float) -> None:
        """Whatever is due."""
        for instance in list(self._registry.instances.values()):
            if instance.due_s is not None and instance.due_s <= now_s:
                instance.due_s = None
                self._due(instance, now_s)
        self._workers.tick(now_s)
        self.turns.tick(now_s)
        self._placement.tick(now_s)
        self.step(now_s)

    def _due(self, instance: Instance, now_s: float) -> None:
        if instance.state is InstanceState.LOADING:
            worker = self._workers.of(instance)
            if worker is not None:
                self._workers.kill(worker, LOAD_TIMED_OUT, now_s)
        elif instance.state is InstanceState.HASHING:
            limit_s = self._around.config.loading.timeout_s
            late = f"its stored copy was not hashed within [loading] timeout = {limit_s:g} s"
            text = f"{late}: does its disk hang? `edgectl load {instance.name}` tries again"
            self._unproved(instance, text, now_s)
        elif instance.state is InstanceState.RESTARTING:
            self._start_load(instance, now_s)
        elif instance.state is InstanceState.DRAINING:
            self.retirement.overdue(instance, now_s)

    def next_due_s(self) -> float | None:
        """When `tick` has something to do, at the earliest."""
        due = [i.due_s for i in self._registry.instances.values()]
        due += [self._workers.next_due_s(), self.turns.next_due_s(), self._placement.next_due_s()]
        if not self.ready:
            due.append(self._startup_ends_s())
        return min((each for each in due if each is not None), default=None)
