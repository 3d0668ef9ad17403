"""A model's way: from an entry of the folder to an instance that serves, and out again.

Pure: takes events and the time, emits effects. The parts and their words:

- A *track* is what one entry of the folder stands for, for as long as the entry is there. It points to the
  instance that serves and, beside it, to the one that is on its way in. Traffic moves from one to the
  other in a single assignment; until then, and for good when the new one fails, the old one serves.
- An *instance* is one content, under one set of settings, on one device. It lives by the table
  `instances.MOVES`; every state carries a reason.
- A *worker* is a process. CPU instances have one each; GPU-like devices, and models that ask for it, share.

Loads take turns, one per device, so that a folder of twenty does not storm a small board. A worker that dies
is started again, at once the first time and then with a growing pause; what waited for it keeps waiting only
while that is a matter of moments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from edged import resources
from edged.config import Config, ModelSettings
from edged.devices import Candidate, Verdict, matches, plan
from edged.errors import EdgedError, NotFound, Unavailable
from edged.events import (
    CancelLoad,
    Collect,
    Effect,
    EndAttempt,
    EndWorker,
    ForgetModel,
    KillWorker,
    LoadInstance,
    Log,
    MarkGood,
    PrepareLoad,
    Probe,
    Publish,
    Ready,
    RememberChoice,
    Scan,
    Stage,
    StartWorker,
    UnloadInstance,
)
from edged.instances import SLOTS_PER_WORKER, Failure, Instance, InstanceState, Machine, Track, Worker
from edged.repository import Entry, Folder, Snapshot
from edged.tensors import TensorSpec
from edged.wire import cut

__all__ = ["Hooks", "Lifecycle"]

PROBE_WAIT_S = 2.0
"""How long the first loads wait for a better device's verdict before they start on one that works."""

DRAIN_S = 30.0
"""How long an old instance may take to finish what it has; its longest request is bounded too."""

WORKER_END_S = 3.0
"""From asking a worker to exit until it is killed: a runtime's teardown takes tens of milliseconds."""

BACKOFF_FIRST_S, BACKOFF_MAX_S = 0.5, 60.0
"""The pause before a restart: none after the first crash, then doubling."""

STABLE_S = 60.0
"""A worker that served this long has recovered; the next crash is a first one again."""

RUN_HUNG = "a run did not stop when told to"

MEMORY_RETRY_S = 5.0
"""How often a load that was refused for memory is considered again."""

_PASSING = frozenset({"CHANGED_WHILE_COPYING", "BEING_WRITTEN"})
"""Someone is still copying: no fault, and nothing to tell."""

LOAD_PATIENCE_S = 10.0
"""A load that takes longer than this no longer holds up the others of its device: it may be hanging."""

STAGE_RETRY_S = 2.0
"""How soon an entry is looked at again whose copy was disturbed."""


class Hooks(Protocol):
    """What the core does for the lifecycle."""

    def busy(self, instance: Instance) -> bool:
        """Whether jobs wait or run for it."""

    def flush(self, instance: Instance, error: EdgedError) -> None:
        """Answers everything that waits for it."""

    def forget(self, instance: Instance) -> None:
        """It is gone; nothing waits for it any more."""


class Lifecycle:
    """All tracks, instances and workers, and the one place that moves them."""

    def __init__(
        self, config: Config, *, machine: Machine, emit: Callable[[Effect], None], hooks: Hooks, now_s: float
    ) -> None:
        self.config = config
        self.machine = machine
        self.tracks: dict[tuple[str, int | None], Track] = {}
        self.instances: dict[int, Instance] = {}
        self.workers: dict[int, Worker] = {}
        self.verdicts: dict[Candidate, Verdict | None] = {}
        self._worked: set[Candidate] = set()
        self.verdict: resources.Verdict | None = None
        self.folder_fault = ""
        self.ready = False
        self.scanned = False
        self._resting = False
        """Whether something in the folder has changed too recently to be touched."""
        self._emit = emit
        self._hooks = hooks
        self._folder = Folder(settle_s=config.loading.settle_s)
        self._started_s = now_s
        self._ids = 0
        self._load_queue: list[Instance] = []
        self._rounds = 0
        """Asked of `step` since it began; 0 when it is not running."""
        self._making_room: set[int] = set()
        """Instances for whose sake the version before them was ended: they wait for no more memory."""
        self._probe_wait_s: float | None = now_s + PROBE_WAIT_S
        self._memory_retry_s: float | None = None
        self._queue_due_s = math.inf
        """When a load that takes long lets the next one begin."""
        self._routes: dict[tuple[str, str], Instance] = {}

    # ------------------------------------------------------------------ looking up

    def lookup(self, name: str, version: str) -> Instance:
        """The instance that serves `name`; raises NotFound, or Unavailable with the reason."""
        instance = self._routes.get((name, version))
        if instance is not None and instance.state is InstanceState.READY:
            return instance
        instance = self._resolve(name, version)
        if instance.state is InstanceState.READY and len(self._routes) < 4096:
            self._routes[name, version] = instance
        return instance

    def _named(self, name: str) -> list[Track]:
        return [t for t in self.tracks.values() if t.name == name]

    def _resolve(self, name: str, version: str) -> Instance:
        tracks = self._named(name)
        if not tracks:
            if not self.scanned:
                raise Unavailable(
                    "the daemon is starting and has not looked at its models yet; ask again shortly",
                    reason="SERVER_STARTING",
                    retry_after_ms=200,
                )
            raise NotFound(
                f"no model '{cut(name)}'; there are: {', '.join(sorted(self.names())[:20]) or 'none yet'}",
                reason="MODEL_NOT_FOUND",
            )
        admitting = [t.serving for t in tracks if t.serving is not None and t.serving.admits]
        if version:
            admitting = [i for i in admitting if str(i.version) == version]
            tracks = [t for t in tracks if self._may_have(t, version)]
            if not tracks:
                serves = [i for t in self._named(name) if (i := t.serving) is not None and i.admits]
                raise NotFound(
                    f"model '{name}' has no version '{cut(version)}'; "
                    f"it serves {', '.join(str(i.version) for i in serves) or 'none'}",
                    reason="VERSION_NOT_FOUND",
                )
        if admitting:
            return max(admitting, key=lambda i: i.version)
        raise self._unavailable(name, version, tracks)

    @staticmethod
    def _may_have(track: Track, version: str) -> bool:
        """Whether a track has this version, or nothing yet that would tell which it has."""
        if track.explicit_version is not None:
            return str(track.explicit_version) == version
        known = [i.version for i in (track.serving, track.incoming) if i is not None]
        if track.failure is not None and track.failure.version is not None:
            known.append(track.failure.version)
        return version in map(str, known) or not known

    def _unavailable(self, name: str, version: str, tracks: list[Track]) -> Unavailable:
        for track in tracks:
            for instance in (track.serving, track.incoming):
                if instance is None or version not in ("", str(instance.version)):
                    continue
                if instance is track.serving:
                    return Unavailable(
                        f"model '{name}': {instance.message}",
                        reason=instance.reason,
                        retry_after_ms=self._retry_ms(instance),
                    )
                text = instance.message or instance.state.value
                return Unavailable(
                    f"model '{name}' is loading ({text}); ask again shortly",
                    reason="MODEL_LOADING",
                    retry_after_ms=500,
                )
        for track in tracks:
            if track.unloaded:
                return Unavailable(
                    f"model '{name}' was unloaded; `edgectl load {name}` brings it back",
                    reason="MODEL_UNLOADED",
                )
            if track.failure is not None:
                return Unavailable(f"model '{name}': {track.failure.message}", reason=track.failure.reason)
        return Unavailable(
            f"model '{name}' is being copied; ask again shortly", reason="MODEL_LOADING", retry_after_ms=500
        )

    @staticmethod
    def _retry_ms(instance: Instance) -> int:
        return int(1000 * min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2 ** max(0, instance.crashes - 2)))

    def names(self) -> set[str]:
        """Every model that the folder has."""
        return {t.name for t in self.tracks.values()}

    def worker_of(self, instance: Instance) -> Worker | None:
        """The process that an instance is in."""
        return None if instance.worker is None else self.workers.get(instance.worker)

    # ------------------------------------------------------------------ the folder

    def restore(self, last_good: Iterable[tuple[Entry, Any]]) -> None:
        """What served when the daemon last ran; used where the folder's content is bad or gone."""
        for entry, staged in last_good:
            track = self.tracks.setdefault(entry.key, Track(entry.name, entry.version))
            track.last_good = (entry, staged)
        self._folder.expect(self.tracks)

    def on_scanned(self, snapshot: Snapshot, now_s: float, wall_s: float) -> None:
        """The folder was looked at."""
        changes = self._folder.observe(snapshot, now_s, wall_s=wall_s)
        self.scanned = True
        self._resting = changes.recheck_after_s is not None
        self._folder_health(changes.fault or "")
        for entry in changes.refused:
            reason, message = entry.problem or ("NAME_CLASH", "")
            self._emit(Log("entry_refused", {"MODEL": entry.name, "REASON": reason, "DETAIL": message}))
        for entry in (*changes.changed, *changes.settings_changed):
            self._entry_changed(entry, now_s)
        for key in changes.removed:
            self._entry_removed(key, now_s)
        for key in changes.superseded:
            self._entry_superseded(key, now_s)
        if changes.fault is not None:
            for track in list(self.tracks.values()):
                if track.entry is None:
                    self._bring_back(track, now_s)
        if changes.recheck_after_s is not None:
            self._emit(Scan(changes.recheck_after_s))
        self.step(now_s)

    def _folder_health(self, fault: str) -> None:
        if fault == self.folder_fault:
            return
        if fault:
            self._emit(Log("folder_fault", {"REASON": fault, "PATH": str(self.config.server.models)}))
        else:
            self._emit(Log("folder_healed", {"PATH": str(self.config.server.models)}))
        self.folder_fault = fault
        self._emit(
            Publish("server.state", {"state": "folder_fault" if fault else "folder_ok", "reason": fault})
        )

    def _entry_changed(self, entry: Entry, now_s: float) -> None:
        track = self.tracks.setdefault(entry.key, Track(entry.name, entry.version))
        track.entry = entry
        track.superseded = False
        if entry.problem is not None:
            reason, message = entry.problem
            self._emit(Log("entry_refused", {"MODEL": entry.name, "REASON": reason, "DETAIL": message}))
            self._note_failure(track, Failure(reason, message), now_s)
            return
        if track.unloaded:
            track.unloaded = False
        self._emit(Stage(entry))

    def _entry_removed(self, key: tuple[str, int | None], now_s: float) -> None:
        track = self.tracks.pop(key, None)
        if track is None:
            return
        self._abandon_incoming(track, now_s)
        if track.serving is not None:
            self._drain(track.serving, "MODEL_REMOVED", "its file was removed from the folder", now_s)
        self._emit(Log("model_removed", {"MODEL": track.name}))
        self._emit(ForgetModel(*key))
        self._publish_state(track.name, track.explicit_version, "UNAVAILABLE", "MODEL_REMOVED", "")
        self._changed()
        rest = self._named(track.name)
        if rest and all(other.superseded for other in rest):
            # They only waited for this one to take their place.
            self._entry_removed(rest[0].key, now_s)

    def _entry_superseded(self, key: tuple[str, int | None], now_s: float) -> None:
        """Another version of the same name came in its place: it serves until that one does."""
        track = self.tracks.get(key)
        if track is None:
            return
        others = [t for t in self._named(track.name) if t is not track]
        if track.serving is None or any(t.serving is not None for t in others):
            self._entry_removed(key, now_s)
        else:
            track.superseded = True

    def on_staged(self, entry: Entry, staged: Any, quarantined: bool, now_s: float) -> None:
        """A private copy of an entry is in the store."""
        track = self.tracks.get(entry.key)
        if track is None or track.entry != entry or track.unloaded:
            return
        asked, track.asked = track.asked, False
        current = track.serving
        if current is not None and self._same(current, entry, staged):
            self._abandon_incoming(track, now_s)
            if track.failure is not None:
                track.failure = None
                self._publish_instance(current)
            self.step(now_s)
            return
        if track.incoming is not None and self._same(track.incoming, entry, staged):
            return
        if not asked and track.failure is not None and self._failed_before(track.failure, entry, staged):
            self._after_failure(track, now_s)
            return
        self._abandon_incoming(track, now_s)
        track.failure = None
        if quarantined and not asked:
            self._note_failure(
                track,
                Failure(
                    "MODEL_QUARANTINED",
                    "loading it was cut short twice by the end of the daemon or the machine; "
                    f"`edgectl load {track.name}` tries again, other content is tried by itself",
                    staged.digest,
                    staged.version,
                    entry.settings,
                ),
                now_s,
                kind="model_quarantined",
            )
            return
        self._new_instance(track, entry, staged)
        self.step(now_s)

    @staticmethod
    def _same(instance: Instance, entry: Entry, staged: Any) -> bool:
        return instance.staged.digest == staged.digest and instance.settings == entry.settings

    @staticmethod
    def _failed_before(failure: Failure, entry: Entry, staged: Any) -> bool:
        return failure.digest == staged.digest and failure.settings == entry.settings

    def on_stage_failed(self, entry: Entry, reason: str, message: str, again: bool, now_s: float) -> None:
        """An entry could not be copied."""
        track = self.tracks.get(entry.key)
        if track is None or track.entry != entry:
            return
        if again:
            self._folder.forget(entry.key)
            self._emit(Scan(STAGE_RETRY_S))
            if reason in _PASSING and track.failure is None:
                track.failure = Failure(reason, message)
            if reason in _PASSING or (track.failure is not None and track.failure.reason == reason):
                self._after_failure(track, now_s)
                return
        self._emit(Log("entry_refused", {"MODEL": entry.name, "REASON": reason, "DETAIL": message}))
        self._note_failure(track, Failure(reason, message), now_s)

    def _note_failure(self, track: Track, failure: Failure, now_s: float, kind: str = "model_failed") -> None:
        track.failure = failure
        fields = {"MODEL": track.name, "REASON": failure.reason, "DETAIL": failure.message}
        if failure.version is not None:
            fields["MODEL_VERSION"] = str(failure.version)
        self._emit(Log(kind, fields))
        self._publish_state(track.name, failure.version, "UNAVAILABLE", failure.reason, failure.digest)
        self._after_failure(track, now_s)

    def _after_failure(self, track: Track, now_s: float) -> None:
        if track.serving is None and track.incoming is None:
            self._bring_back(track, now_s)
        self.step(now_s)

    def _bring_back(self, track: Track, now_s: float) -> None:
        """Loads the last good content, unless that is what just failed."""
        if (
            track.last_good is None
            or track.serving is not None
            or track.incoming is not None
            or track.unloaded
        ):
            return
        entry, staged = track.last_good
        if track.failure is not None and self._failed_before(track.failure, entry, staged):
            track.last_good = None
            return
        fields = {"MODEL": track.name, "MODEL_VERSION": str(staged.version)}
        why = self.folder_fault if track.failure is None else track.failure.message
        self._emit(Log("model_restored", {**fields, "REASON": why}))
        self._new_instance(track, entry, staged)
        self.step(now_s)

    # ------------------------------------------------------------------ asked by an administrator

    def load(self, name: str, now_s: float) -> None:
        """Tries a model again: quarantine and an earlier failure or unload are forgotten."""
        tracks = self._named(name)
        if not tracks:
            self._emit(Scan(0.0))
            raise NotFound(
                f"no model '{cut(name)}' in the folder; `edgectl put FILE` publishes one",
                reason="MODEL_NOT_FOUND",
            )
        for track in tracks:
            track.unloaded = False
            track.asked = True
            self._folder.forget(track.key)
        self._emit(Scan(0.0))

    def unload(self, name: str, now_s: float) -> None:
        """Stops serving a model until it is asked for, or its bytes change."""
        tracks = self._named(name)
        if not tracks:
            raise NotFound(f"no model '{cut(name)}'", reason="MODEL_NOT_FOUND")
        for track in tracks:
            track.unloaded = True
            self._abandon_incoming(track, now_s)
            if track.serving is not None:
                self._drain(track.serving, "MODEL_UNLOADED", "unloaded by request", now_s)
            self._emit(Log("model_unloaded", {"MODEL": name}))
            self._publish_state(name, track.explicit_version, "UNAVAILABLE", "MODEL_UNLOADED", "")
        self._changed()
        self.step(now_s)

    # ------------------------------------------------------------------ loading

    def _new_instance(
        self, track: Track, entry: Entry, staged: Any, preferred: Candidate | None = None, choice: str = ""
    ) -> Instance:
        self._ids += 1
        instance = Instance(self._ids, track, entry, staged, entry.settings)
        settings = entry.settings
        if settings.runtime is not None or settings.device != "auto":
            instance.choice = "pinned"
        elif preferred is not None:
            instance.preferred, instance.choice = preferred, choice
        elif track.serving is not None and track.serving.candidate is not None:
            instance.preferred, instance.choice = track.serving.candidate, "inherited"
        track.incoming = instance
        self.instances[instance.id] = instance
        self._load_queue.append(instance)
        self._publish_instance(instance)
        return instance

    def switch(self, instance: Instance, candidate: Candidate, now_s: float) -> None:
        """Loads a serving instance's content beside itself on a device that was measured to be faster."""
        track = instance.track
        if track.serving is instance and track.incoming is None:
            new = self._new_instance(track, instance.entry, instance.staged, candidate, "measured")
            new.measured = dict(instance.measured)
            self.step(now_s)

    def choice_key(self, instance: Instance) -> str:
        """What a measured choice is remembered under."""
        machine = self.machine
        parts = (instance.staged.digest, instance.settings.precision, machine.name, str(machine.cpus))
        return "|".join(parts)

    def remember(self, instance: Instance, candidate: Candidate) -> None:
        """Keeps a choice, and among what it was made."""
        compared = {str(c): version for c, version in self._working()}
        choice = {"runtime": candidate.runtime, "device": candidate.device, "compared": compared}
        self._emit(RememberChoice(self.choice_key(instance), choice))

    def _working(self) -> list[tuple[Candidate, str]]:
        """What is known to work, with its runtime's version."""
        return [
            (c, v.runtime_version) for c, v in self.verdicts.items() if v is not None and v.status == "ok"
        ]

    def _recall(self, choice: Mapping[str, Any]) -> Candidate | None:
        """A remembered choice, unless a device or another version has come that it was not compared with."""
        compared = choice.get("compared")
        if not isinstance(compared, Mapping):
            return None
        if any(compared.get(str(candidate)) != version for candidate, version in self._working()):
            return None
        return Candidate(str(choice.get("runtime")), str(choice.get("device")))

    def _plan(self, instance: Instance, now_s: float) -> bool:
        """Sets the instance's candidates; False while a verdict is waited for, or when there are none."""
        settings = instance.settings
        devices = self.config.devices
        found = plan(
            selector=settings.device,
            runtime=settings.runtime,
            policy=settings.policy,
            model_format=instance.entry.format,
            verdicts=self.verdicts,
            order=devices.order,
            exclude=devices.exclude,
            preferred=instance.preferred,
            may_wait=settings.device != "auto" or self._probe_wait_s is not None,
        )
        if found.waiting or (not found.candidates and None in self.verdicts.values()):
            instance.message = "waiting for the devices' verdicts"
            return False
        if not found.candidates:
            self._fail(instance, "DEVICE_UNAVAILABLE", f"{found.refusal}; see `edgectl devices`", now_s)
            return False
        instance.plan = found.candidates
        instance.fallback_reason = found.missing
        if instance.preferred is not None and found.candidates[0] != instance.preferred:
            instance.choice = "default"
        return True

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
                self._queue_due_s = math.inf
                for instance in list(self._load_queue):
                    if instance.state is InstanceState.WAITING:
                        self._begin(instance, now_s)
        finally:
            self._rounds = 0
        self._say_ready(now_s)

    def _begin(self, instance: Instance, now_s: float) -> None:
        """Starts a waiting instance's load if it may."""
        if not self._plan(instance, now_s) or not self._turn(instance, now_s):
            return
        track = instance.track
        if instance.settings.swap == "replace":
            if instance.id not in self._making_room and not self._memory_allows(instance, now_s):
                return
            self._making_room.add(instance.id)
            if track.serving is not None:
                track.last_good = (track.serving.entry, track.serving.staged)
                self._drain(track.serving, "MODEL_LOADING", "making room for its next version", now_s)
            if track.draining:
                instance.message = "waiting for the version before to end"
                return
        elif not self._memory_allows(instance, now_s):
            return
        self._load_queue.remove(instance)
        instance.move(InstanceState.PREPARING, "MODEL_LOADING", "recording the attempt")
        key = self.choice_key(instance)
        self._emit(PrepareLoad(instance.id, instance.staged.digest, key))

    def _turn(self, instance: Instance, now_s: float) -> bool:
        """Whether its device has room for one more load; one that takes long no longer counts."""
        device = instance.plan[0].device
        loading = 0
        for other in self.instances.values():
            if other.candidate is None or other.candidate.device != device:
                continue
            if other.state is InstanceState.PREPARING:
                loading += 1
            elif other.state is InstanceState.LOADING and now_s < other.load_started_s + LOAD_PATIENCE_S:
                loading += 1
                self._queue_due_s = min(self._queue_due_s, other.load_started_s + LOAD_PATIENCE_S)
        return loading < self.config.loading.concurrency

    def _memory_allows(self, instance: Instance, now_s: float) -> bool:
        if self.verdict is None:
            return True
        needed = self.needed_bytes(instance)
        allowed, sentence = resources.may_load(self.verdict, needed)
        if allowed:
            if instance.reason == "MEMORY_PRESSURE":
                instance.reason, instance.message = "", ""
            return True
        if instance.reason != "MEMORY_PRESSURE":
            self._emit(
                Log("load_refused", {"MODEL": instance.name, "REASON": "MEMORY_PRESSURE", "DETAIL": sentence})
            )
            instance.reason = "MEMORY_PRESSURE"
        instance.message = sentence
        self._memory_retry_s = now_s + MEMORY_RETRY_S
        return False

    def needed_bytes(self, instance: Instance) -> int:
        """What a load will take: as much as the version before, else its size twice and the runtime's own."""
        serving = instance.track.serving
        worker = None if serving is None else self.worker_of(serving)
        if worker is not None and worker.rss_bytes and not worker.shared:
            # One that takes the place of the version before needs only what that one did not.
            return 0 if instance.settings.swap == "replace" else worker.rss_bytes
        size: int = instance.staged.size_bytes
        return 2 * size + 64 * 1024 * 1024

    def on_load_prepared(self, instance_id: int, choice: Mapping[str, Any] | None, now_s: float) -> None:
        """The attempt is on record; start the worker."""
        instance = self.instances.get(instance_id)
        if instance is None or instance.state is not InstanceState.PREPARING:
            return
        if choice is not None and instance.choice in ("default", "inherited"):
            remembered = self._recall(choice)
            if remembered is not None and remembered in instance.plan:
                rest = tuple(c for c in instance.plan if c != remembered)
                instance.plan = (remembered, *rest)
                instance.choice = "remembered"
        self._start_load(instance, now_s)

    def _start_load(self, instance: Instance, now_s: float) -> None:
        candidate = instance.plan[0]
        settings = instance.settings
        timeout_s = self.config.loading.timeout_s
        instance.move(InstanceState.LOADING, "MODEL_LOADING", f"loading on {candidate}")
        instance.due_s = now_s + timeout_s
        instance.load_started_s = now_s
        worker = self._worker_for(instance, candidate)
        instance.worker = worker.id
        worker.instances.add(instance.id)
        self._emit(
            Log(
                "model_loading",
                {
                    "MODEL": instance.name,
                    "MODEL_VERSION": str(instance.version),
                    "RUNTIME": candidate.runtime,
                    "DEVICE": candidate.device,
                },
            )
        )
        spec = {
            **self.model_spec(instance),
            **self.where_spec(candidate, settings),
            "warmup": settings.warmup,
            "timeout_s": timeout_s,
        }
        self._emit(LoadInstance(worker.id, instance.id, spec))
        self._publish_instance(instance)

    def model_spec(self, instance: Instance) -> dict[str, Any]:
        """The part of a load that says what: the same for every device."""
        settings = instance.settings
        golden = instance.staged.golden_dir
        return {
            "path": str(instance.staged.model_path),
            "format": instance.entry.format,
            "cache_dir": str(self.config.server.cache_dir),
            "golden_dir": None if golden is None else str(golden),
            "golden": [{"inputs": dict(g.inputs), "outputs": dict(g.outputs)} for g in settings.golden],
            "tolerance": {"rtol": settings.tolerance.rtol, "atol": settings.tolerance.atol},
        }

    def where_spec(self, candidate: Candidate, settings: ModelSettings) -> dict[str, Any]:
        """The part of a load that says where and how."""
        return {
            "runtime": candidate.runtime,
            "device": candidate.device,
            "precision": settings.precision,
            "threads": settings.threads or self.machine.cpus,
        }

    def memory_max_bytes(self, settings: ModelSettings) -> int:
        """The bound of a model's worker."""
        return settings.memory_max_bytes or self.machine.memory_limit_bytes

    def _worker_for(self, instance: Instance, candidate: Candidate) -> Worker:
        shared = candidate.gpu_like or instance.settings.isolation == "shared"
        if shared:
            for worker in self.workers.values():
                same = (worker.runtime, worker.device) == (candidate.runtime, candidate.device)
                if worker.shared and same and worker.kill_at_s is None:
                    return worker
        self._ids += 1
        worker = Worker(self._ids, candidate.runtime, candidate.device, shared)
        bound = self.memory_max_bytes(instance.settings)
        # What a GPU's driver maps says nothing of memory used: there the guard's samples bound it.
        worker.memory_max_bytes = instance.settings.memory_max_bytes
        self.workers[worker.id] = worker
        self._emit(
            StartWorker(
                worker.id,
                candidate.runtime,
                candidate.gpu_like,
                None if candidate.gpu_like else bound,
                4 * self.config.limits.message_bytes,
                SLOTS_PER_WORKER,
            )
        )
        return worker

    def on_loaded(self, instance_id: int, info: dict[str, Any], now_s: float) -> None:
        """A worker has loaded, warmed up and proved an instance: it serves from now on."""
        instance = self.instances.get(instance_id)
        if instance is None or instance.state is not InstanceState.LOADING:
            return
        track = instance.track
        instance.info = info
        instance.inputs = {w["name"]: TensorSpec.from_wire(w) for w in info["inputs"]}
        instance.outputs = {w["name"]: TensorSpec.from_wire(w) for w in info["outputs"]}
        instance.required = frozenset(n for n, spec in instance.inputs.items() if not spec.optional)
        if info.get("fallback_reason"):
            instance.fallback_reason = str(info["fallback_reason"])
        instance.due_s = None
        instance.ready_s = now_s
        instance.move(InstanceState.READY, "", "")
        worker = self.worker_of(instance)
        if worker is not None:
            worker.rss_bytes = max(worker.rss_bytes, int(info.get("rss_bytes") or 0))
        fields = {
            "MODEL": instance.name,
            "MODEL_VERSION": str(instance.version),
            "RUNTIME": str(info["runtime"]),
            "DEVICE": str(info["device"]),
            "DURATION_MS": str(round((now_s - instance.load_started_s) * 1000)),
        }
        if instance.fallback_reason:
            self._emit(Log("device_fallback", {**fields, "REASON": instance.fallback_reason}))
        if track.serving is instance:
            self._emit(Log("worker_restarted", fields))
        else:
            self._take_over(track, instance, fields, now_s)
        self._changed()
        self._publish_instance(instance)
        self.step(now_s)

    def _take_over(self, track: Track, instance: Instance, fields: dict[str, str], now_s: float) -> None:
        old, track.serving, track.incoming = track.serving, instance, None
        track.last_good = None
        instance.crashes = 0
        if track.failure is not None and track.entry is not None and instance.entry == track.entry:
            track.failure = None
        self._emit(EndAttempt(instance.staged.digest))
        self._emit(MarkGood(instance.entry, instance.staged))
        self._emit(Log("model_ready" if old is None else "model_swapped", fields))
        if old is not None:
            if old.version == instance.version and old.staged.digest == instance.staged.digest:
                instance.stats = old.stats
            self._drain(old, "MODEL_RETIRED", f"version {instance.version} serves now", now_s)
        for other in self._named(track.name):
            if other.superseded and other is not track:
                self._entry_removed(other.key, now_s)
        self._emit(Collect(self._digests()))

    def _digests(self) -> frozenset[str]:
        used = {i.staged.digest for i in self.instances.values()}
        used.update(t.last_good[1].digest for t in self.tracks.values() if t.last_good is not None)
        return frozenset(used)

    def on_load_failed(self, instance_id: int, reason: str, message: str, now_s: float) -> None:
        """A candidate could not load an instance: the next one, or the end."""
        instance = self.instances.get(instance_id)
        if instance is None or instance.state is not InstanceState.LOADING:
            return
        self._leave_worker(instance, now_s)
        if instance.track.serving is instance:
            self._crashed(instance, reason, message, now_s)
            return
        candidate = instance.plan[0]
        instance.errors.append((candidate, reason, message))
        if reason == "DEVICE_FAILED":
            self.probe(candidate)
        serving = instance.track.serving
        if serving is not None and self._same(serving, instance.entry, instance.staged):
            self._stay(serving, instance, candidate, message)
            self.step(now_s)
            return
        # Another runtime may read what this one cannot; the same one elsewhere only mends a failed device.
        rest = [
            c
            for c in instance.plan[1:]
            if reason in ("DEVICE_FAILED", "WORKER_CRASHED", "MODEL_LOAD_TIMEOUT")
            or c.runtime != candidate.runtime
        ]
        if rest and reason != "MEMORY_LIMIT":
            instance.plan = tuple(rest)
            instance.choice = instance.choice if instance.choice == "pinned" else "default"
            instance.fallback_reason = instance.fallback_reason or f"{candidate}: {message}"
            self._start_load(instance, now_s)
            return
        _, reason, message = instance.errors[0]
        self._fail(instance, reason, message, now_s)

    def _fail(self, instance: Instance, reason: str, message: str, now_s: float) -> None:
        track = instance.track
        instance.move(InstanceState.FAILED, reason, message)
        self._emit(EndAttempt(instance.staged.digest))
        self._forget(instance)
        if track.incoming is instance:
            track.incoming = None
        failure = Failure(reason, message, instance.staged.digest, instance.version, instance.settings)
        if self.tracks.get(track.key) is track:
            self._note_failure(track, failure, now_s)

    def _stay(self, serving: Instance, instance: Instance, candidate: Candidate, message: str) -> None:
        """A switch to a faster device failed: what serves goes on serving, and nothing is wrong with it."""
        instance.move(InstanceState.FAILED, "SWITCH_FAILED", message)
        instance.track.incoming = None
        self._emit(EndAttempt(instance.staged.digest))
        self._forget(instance)
        serving.measured[candidate] = {**serving.measured.get(candidate, {}), "agrees": False, "why": message}
        fields = {"MODEL": serving.name, "RUNTIME": candidate.runtime, "DEVICE": candidate.device}
        self._emit(Log("choice_measured", {**fields, "DETAIL": message}))
        if serving.choice != "pinned":
            serving.choice = "measured"
            self.remember(serving, serving.plan[0])

    def _abandon_incoming(self, track: Track, now_s: float) -> None:
        instance, track.incoming = track.incoming, None
        if instance is None:
            return
        if instance.state is InstanceState.LOADING:
            self._stop_load(instance, now_s)
            self._emit(EndAttempt(instance.staged.digest))
        elif instance.state is InstanceState.PREPARING:
            self._emit(EndAttempt(instance.staged.digest))
        instance.move(InstanceState.GONE, "SUPERSEDED", "other content took its place")
        self._forget(instance)

    def _stop_load(self, instance: Instance, now_s: float) -> None:
        """Ends a load that is under way; a worker that others share lives on."""
        worker = self.worker_of(instance)
        if worker is None:
            return
        if worker.shared:
            self._emit(CancelLoad(worker.id, instance.id))
        else:
            self._kill(worker, "superseded", now_s)
        self._leave_worker(instance, now_s)

    # ------------------------------------------------------------------ ending

    def _drain(self, instance: Instance, reason: str, message: str, now_s: float) -> None:
        track = instance.track
        if track.serving is instance:
            track.serving = None
        track.draining.append(instance)
        started = instance.state is InstanceState.READY
        if instance.state is InstanceState.LOADING:
            self._stop_load(instance, now_s)
        instance.move(InstanceState.DRAINING, reason, message)
        instance.due_s = now_s + DRAIN_S
        self._changed()
        if not started:
            self._hooks.flush(instance, Unavailable(f"model '{instance.name}': {message}", reason=reason))
        self.check_drained(instance, now_s)

    def check_drained(self, instance: Instance, now_s: float) -> None:
        """Ends a draining instance once nothing waits or runs for it."""
        if instance.state is not InstanceState.DRAINING or self._hooks.busy(instance):
            return
        worker = self.worker_of(instance)
        if worker is not None:
            self._emit(UnloadInstance(worker.id, instance.id))
        self._leave_worker(instance, now_s)
        instance.move(InstanceState.GONE, instance.reason, instance.message)
        instance.track.draining.remove(instance)
        self._emit(Log("model_retired", {"MODEL": instance.name, "MODEL_VERSION": str(instance.version)}))
        self._forget(instance)
        self._emit(Collect(self._digests()))
        self.step(now_s)

    def _forget(self, instance: Instance) -> None:
        self.instances.pop(instance.id, None)
        if instance in self._load_queue:
            self._load_queue.remove(instance)
        self._making_room.discard(instance.id)
        self._hooks.forget(instance)

    def _leave_worker(self, instance: Instance, now_s: float) -> None:
        worker = self.worker_of(instance)
        instance.worker = None
        if worker is None:
            return
        worker.instances.discard(instance.id)
        if not worker.instances and worker.kill_at_s is None:
            worker.kill_at_s = now_s + WORKER_END_S
            self._emit(EndWorker(worker.id))

    def _kill(self, worker: Worker, why: str, now_s: float) -> None:
        worker.killed_for = worker.killed_for or why
        worker.kill_at_s = now_s + WORKER_END_S
        self._emit(KillWorker(worker.id))

    def kill_worker(self, worker_id: int, why: str, now_s: float) -> None:
        """Ends a worker that does not do as it is told; what follows is as after a crash."""
        worker = self.workers.get(worker_id)
        if worker is not None:
            self._kill(worker, why, now_s)

    def on_worker_gone(self, worker_id: int, how: str, now_s: float) -> None:
        """A worker's process has ended. The core has dealt with its runs before."""
        worker = self.workers.pop(worker_id, None)
        if worker is None:
            return
        why = worker.killed_for or how
        for instance_id in sorted(worker.instances):
            instance = self.instances.get(instance_id)
            if instance is None:
                continue
            instance.worker = None
            text = f"its worker ended: {why}"
            if instance.state is InstanceState.DRAINING:
                message = f"model '{instance.name}' was being replaced when {text}"
                self._hooks.flush(instance, Unavailable(message, reason="WORKER_CRASHED", retry_after_ms=0))
                self.check_drained(instance, now_s)
            elif instance.track.serving is instance:
                self._emit(
                    Log(
                        "worker_hung" if worker.killed_for == RUN_HUNG else "worker_crashed",
                        {
                            "MODEL": instance.name,
                            "MODEL_VERSION": str(instance.version),
                            "PID": str(worker.pid or 0),
                            "REASON": why,
                        },
                    )
                )
                self._crashed(instance, "WORKER_CRASHED", text, now_s)
            elif instance.state is InstanceState.LOADING:
                # The tick that ran its time out has cleared its due time; a neighbour's still runs.
                own = why != "load time-out" or instance.due_s is None
                if len(worker.instances) > 1 and (not own or not instance.crashes):
                    # Its neighbours may be to blame: once, or for another's time-out, it is tried again.
                    instance.crashes += own
                    self._start_load(instance, now_s)
                    continue
                reason = "MODEL_LOAD_TIMEOUT" if why == "load time-out" else "WORKER_CRASHED"
                self.on_load_failed(instance_id, reason, f"while loading on {instance.plan[0]} {text}", now_s)
        if not worker.instances:
            self._emit(Log("worker_exited", {"PID": str(worker.pid or 0), "REASON": why}))
        self.step(now_s)

    def _crashed(self, instance: Instance, reason: str, message: str, now_s: float) -> None:
        """The serving instance lost its worker, or could not get it back."""
        if now_s - instance.ready_s > STABLE_S and instance.state is InstanceState.READY:
            instance.crashes = 0
        instance.crashes += 1
        instance.restarts += 1
        if reason == "DEVICE_FAILED" or instance.plan[0].gpu_like:
            self.probe(instance.plan[0])
        if instance.crashes > 2 and len(instance.plan) > 1:
            skipped, *rest = instance.plan
            instance.plan = (*rest, skipped)
            instance.fallback_reason = f"{skipped}: {message}"
        pause_s = 0.0
        if instance.crashes > 1:
            pause_s = min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2 ** (instance.crashes - 2))
        instance.move(
            InstanceState.RESTARTING,
            reason,
            f"{message}; it is started again{f' in {pause_s:g} s' if pause_s else ' now'}",
        )
        instance.due_s = now_s + pause_s
        self._changed()
        self._publish_instance(instance)
        if pause_s:
            fields = {"MODEL": instance.name, "DURATION_MS": str(round(pause_s * 1000)), "REASON": message}
            self._emit(Log("worker_restarting", fields))
            self._hooks.flush(
                instance,
                Unavailable(
                    f"model '{instance.name}': {instance.message}",
                    reason=reason,
                    retry_after_ms=round(pause_s * 1000),
                ),
            )
        else:
            self._start_load(instance, now_s)

    # ------------------------------------------------------------------ devices and time

    def probe(self, candidate: Candidate) -> None:
        """Asks for a verdict, unless one is on its way."""
        if candidate not in self.verdicts or self.verdicts[candidate] is not None:
            self.verdicts[candidate] = None
            self._emit(Probe(candidate.runtime, candidate.device))

    def on_probed(self, verdict: Verdict, now_s: float) -> None:
        """A device's verdict."""
        self.verdicts[verdict.candidate] = verdict
        new = verdict.status == "ok" and verdict.candidate not in self._worked
        fields = {"RUNTIME": verdict.runtime, "DEVICE": verdict.device, "REASON": verdict.status}
        if verdict.status == "ok":
            self._worked.add(verdict.candidate)
        elif verdict.candidate in self._worked:
            self._worked.discard(verdict.candidate)
            self._emit(Log("device_lost", {**fields, "HINT": verdict.hint, "DETAIL": verdict.detail}))
        self._emit(
            Log("device_verdict", {**fields, "DETAIL": verdict.hint or verdict.detail or verdict.full_name})
        )
        self._emit(
            Publish(
                "device.state",
                {
                    "runtime": verdict.runtime,
                    "device": verdict.device,
                    "status": verdict.status,
                    "hint": verdict.hint,
                },
            )
        )
        if verdict.status == "ok":
            self._retry_for_device()
        if new and self.ready:
            self._offer_device(verdict.candidate)
        self.step(now_s)

    def _offer_device(self, candidate: Candidate) -> None:
        """A device came, or works again: who fell back from it returns, who may choose compares anew."""
        for track in self.tracks.values():
            instance = track.serving
            if instance is None or instance.state is not InstanceState.READY or track.incoming is not None:
                continue
            if instance.choice in ("measured", "remembered"):
                instance.choice = "default"
            elif (
                instance.choice == "pinned"
                and instance.fallback_reason
                and matches(instance.settings.device, candidate)
                and instance.settings.runtime in (None, candidate.runtime)
            ):
                self._new_instance(track, instance.entry, instance.staged)

    def _retry_for_device(self) -> None:
        """A device works now: models that were refused for want of one are tried again."""
        for track in self.tracks.values():
            if (
                track.failure is not None
                and track.failure.reason == "DEVICE_UNAVAILABLE"
                and track.entry is not None
            ):
                track.asked = True
                self._folder.forget(track.key)
                self._emit(Scan(0.0))

    def on_sampled(self, verdict: resources.Verdict, rss_bytes: Mapping[int, int], now_s: float) -> None:
        """The resource guard has looked."""
        self.verdict = verdict
        for worker in self.workers.values():
            if worker.pid is not None:
                worker.rss_bytes = rss_bytes.get(worker.pid, worker.rss_bytes)
                if worker.pid in verdict.over_budget and not worker.killed_for:
                    text = f"over its memory budget with {worker.rss_bytes} bytes"
                    self._emit(Log("worker_over_budget", {"PID": str(worker.pid), "REASON": text}))
                    self._kill(worker, text, now_s)

    def tick(self, now_s: float) -> None:
        """Whatever is due."""
        for instance in list(self.instances.values()):
            if instance.due_s is None or instance.due_s > now_s:
                continue
            instance.due_s = None
            if instance.state is InstanceState.LOADING:
                worker = self.worker_of(instance)
                if worker is not None:
                    self._kill(worker, "load time-out", now_s)
            elif instance.state is InstanceState.RESTARTING:
                self._start_load(instance, now_s)
            elif instance.state is InstanceState.DRAINING:
                error = Unavailable(
                    f"model '{instance.name}' was replaced and did not finish in {DRAIN_S:g} s",
                    reason="MODEL_RETIRED",
                )
                self._hooks.flush(instance, error)
                worker = self.worker_of(instance)
                if worker is not None and not worker.shared:
                    self._kill(worker, "did not finish its last requests", now_s)
                else:
                    self.check_drained(instance, now_s)
        for worker in self.workers.values():
            if worker.kill_at_s is not None and worker.kill_at_s <= now_s:
                self._kill(worker, "did not exit when asked", now_s)
        if self._memory_retry_s is not None and self._memory_retry_s <= now_s:
            self._memory_retry_s = None
        if self._probe_wait_s is not None and self._probe_wait_s <= now_s:
            self._probe_wait_s = None
        self.step(now_s)

    def next_due_s(self) -> float | None:
        """When `tick` has something to do, at the earliest."""
        due = [i.due_s for i in self.instances.values() if i.due_s is not None]
        due.extend(w.kill_at_s for w in self.workers.values() if w.kill_at_s is not None)
        if self._memory_retry_s is not None:
            due.append(self._memory_retry_s)
        if not self.ready:
            due.append(self._started_s + self.config.server.startup_wait_s)
        if self._probe_wait_s is not None:
            due.append(self._probe_wait_s)
        if self._queue_due_s != math.inf:
            due.append(self._queue_due_s)
        return min(due, default=None)

    def _say_ready(self, now_s: float) -> None:
        if self.ready:
            return
        settled = (self.scanned and not self._resting) and all(
            t.serving is not None
            or t.unloaded
            or (t.incoming is None and (t.failure is not None or t.entry is None))
            or (t.incoming is not None and t.incoming.reason == "MEMORY_PRESSURE")
            for t in self.tracks.values()
        )
        if settled or now_s >= self._started_s + self.config.server.startup_wait_s:
            self.ready = True
            self._emit(Ready())
            self._emit(Publish("server.state", {"state": "ready"}))

    # ------------------------------------------------------------------ telling

    def _changed(self) -> None:
        self._routes.clear()

    def _publish_instance(self, instance: Instance) -> None:
        self._publish_state(
            instance.name, instance.version, instance.oip_state(), instance.reason, instance.staged.digest
        )

    def _publish_state(self, name: str, version: int | None, state: str, reason: str, digest: str) -> None:
        self._emit(
            Publish(
                "model.state",
                {
                    "name": name,
                    "version": "" if version is None else str(version),
                    "state": state,
                    "reason": reason,
                    "sha256": digest,
                },
            )
        )
