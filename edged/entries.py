"""What follows from the models folder, and from an administrator who asks for a load or an unload.

Pure. Each entry of the folder has a track. An entry that came or changed is staged first, as a private copy;
only then is it clear whether its content is new, and a new content becomes an instance that waits to load. A
content that failed is not tried again until someone asks, or other bytes come.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from edged.errors import NotFound
from edged.events import Log, Publish, Scan, Stage
from edged.instances import Failure, Surroundings, Track, state_event
from edged.lifecycle import Lifecycle
from edged.registry import Registry
from edged.repository import Entry, Folder, Snapshot
from edged.wire import cut

__all__ = ["Entries"]

_PASSING = frozenset({"CHANGED_WHILE_COPYING", "BEING_WRITTEN"})
"""Someone is still copying: no fault, and nothing to tell."""

STAGE_RETRY_S = 2.0
"""How soon an entry is looked at again whose copy was disturbed."""


class Entries:
    """Turns what happens to entries into what happens to their tracks."""

    def __init__(self, around: Surroundings, *, registry: Registry, lifecycle: Lifecycle) -> None:
        self._around = around
        self._registry = registry
        self._lifecycle = lifecycle
        self._retirement = lifecycle.retirement
        self._folder = Folder(settle_s=around.config.loading.settle_s)

    @property
    def settle_s(self) -> float:
        """How long files must rest before they are taken."""
        return self._folder.settle_s

    @settle_s.setter
    def settle_s(self, seconds: float) -> None:
        self._folder.settle_s = seconds

    def restore(self, last_good: Iterable[tuple[Entry, Any]]) -> None:
        """What served when the daemon last ran; used where the folder's content is bad or gone."""
        for entry, staged in last_good:
            self._track(entry).last_good = (entry, staged)
        self._folder.expect(self._registry.tracks)

    def _track(self, entry: Entry) -> Track:
        return self._registry.tracks.setdefault(entry.key, Track(entry.name, entry.version))

    # ------------------------------------------------------------------ the folder

    def on_scanned(self, snapshot: Snapshot, now_s: float, wall_s: float) -> None:
        """The folder was looked at."""
        changes = self._folder.observe(snapshot, now_s, wall_s=wall_s)
        self._registry.folder.scanned = True
        self._registry.folder.resting = changes.recheck_after_s is not None
        self._health(changes.fault or "")
        for entry in changes.refused:
            reason, message = entry.problem or ("NAME_CLASH", "")
            self._log_refused(entry, reason, message)
        for entry in (*changes.changed, *changes.settings_changed):
            self._changed(entry, now_s)
        for key in changes.removed:
            self._retirement.remove(key, now_s)
        for key in changes.superseded:
            self._superseded(key, now_s)
        if changes.fault is not None:
            for track in list(self._registry.tracks.values()):
                if track.entry is None:
                    self._lifecycle.bring_back(track, now_s)
        if changes.recheck_after_s is not None:
            self._around.emit(Scan(changes.recheck_after_s))
        self._lifecycle.step(now_s)

    def _health(self, fault: str) -> None:
        folder = self._registry.folder
        if fault == folder.fault:
            return
        folder.fault = fault
        path = str(self._around.config.server.models)
        if fault:
            self._around.emit(Log("folder_fault", {"REASON": fault, "PATH": path}))
        else:
            self._around.emit(Log("folder_healed", {"PATH": path}))
        state = "folder_fault" if fault else "folder_ok"
        self._around.emit(Publish("server.state", {"state": state, "reason": fault}))

    def _log_refused(self, entry: Entry, reason: str, message: str) -> None:
        fields = {"MODEL": entry.name, "REASON": reason, "DETAIL": message}
        self._around.emit(Log("entry_refused", fields))

    def _changed(self, entry: Entry, now_s: float) -> None:
        track = self._track(entry)
        track.entry = entry
        track.superseded = False
        if entry.problem is not None:
            self._log_refused(entry, *entry.problem)
            self._lifecycle.note_failure(track, Failure(*entry.problem), now_s)
            return
        track.unloaded = False
        self._around.emit(Stage(entry))

    def _superseded(self, key: tuple[str, int | None], now_s: float) -> None:
        """Another version of the same name came in its place: it serves until that one does."""
        track = self._registry.tracks.get(key)
        if track is None:
            return
        others = [t for t in self._registry.named(track.name) if t is not track]
        if track.serving is None or any(t.serving is not None for t in others):
            self._retirement.remove(key, now_s)
        else:
            track.superseded = True

    # ------------------------------------------------------------------ private copies

    def on_staged(self, entry: Entry, staged: Any, quarantined: bool, now_s: float) -> None:
        """A private copy of an entry is in the store."""
        track = self._registry.tracks.get(entry.key)
        if track is None or track.entry != entry or track.unloaded:
            return
        asked, track.asked = track.asked, False
        if self._is_served(track, entry, staged):
            self._serves_already(track, now_s)
        elif track.incoming is not None and track.incoming.is_of(entry, staged):
            return
        elif not asked and track.failure is not None and track.failure.is_of(entry, staged):
            self._lifecycle.bring_back(track, now_s)
        else:
            self._retirement.abandon_incoming(track, now_s)
            track.failure = None
            if quarantined and not asked:
                self._quarantined(track, entry, staged, now_s)
            else:
                self._lifecycle.enter(track, entry, staged)
        self._lifecycle.step(now_s)

    def _is_served(self, track: Track, entry: Entry, staged: Any) -> bool:
        serving = track.serving
        if serving is None:
            return False
        return serving.is_of(entry, staged) or self._lifecycle.adopt(serving, entry, staged)

    def _serves_already(self, track: Track, now_s: float) -> None:
        """The folder is back at what serves: what was on its way from there, or failed, no longer matters."""
        self._retirement.abandon_incoming(track, now_s)
        if track.failure is not None and track.serving is not None:
            track.failure = None
            self._around.emit(track.serving.event())

    def _quarantined(self, track: Track, entry: Entry, staged: Any, now_s: float) -> None:
        message = (
            "loading it was cut short twice by the end of the daemon or the machine; "
            f"`edgectl load {track.name}` tries again, other content is tried by itself"
        )
        failure = Failure("MODEL_QUARANTINED", message, staged.digest, staged.version, entry.settings)
        self._lifecycle.note_failure(track, failure, now_s, kind="model_quarantined")

    def on_stage_failed(self, entry: Entry, reason: str, message: str, again: bool, now_s: float) -> None:
        """An entry could not be copied; `again` when it makes sense to look again by itself."""
        track = self._registry.tracks.get(entry.key)
        if track is None or track.entry != entry:
            return
        if again:
            self._folder.forget(entry.key)
            self._around.emit(Scan(STAGE_RETRY_S))
            if reason in _PASSING and track.failure is None:
                track.failure = Failure(reason, message)
            if reason in _PASSING or (track.failure is not None and track.failure.reason == reason):
                self._lifecycle.bring_back(track, now_s)
                self._lifecycle.step(now_s)
                return
        self._log_refused(entry, reason, message)
        self._lifecycle.note_failure(track, Failure(reason, message), now_s)

    # ------------------------------------------------------------------ trying again

    def load(self, name: str) -> None:
        """Tries a model again: quarantine and an earlier failure or unload are forgotten."""
        tracks = self._registry.named(name)
        if not tracks:
            self._around.emit(Scan(0.0))
            raise NotFound(
                f"no model '{cut(name)}' in the folder; `edgectl put FILE` publishes one",
                reason="MODEL_NOT_FOUND",
            )
        for track in tracks:
            track.unloaded = False
            self._look_again(track)
        self._around.emit(Scan(0.0))

    def _look_again(self, track: Track) -> None:
        track.asked = True
        self._folder.forget(track.key)

    def unload(self, name: str, now_s: float) -> None:
        """Stops serving a model until it is asked for, or its bytes change."""
        tracks = self._registry.named(name)
        if not tracks:
            raise NotFound(f"no model '{cut(name)}'", reason="MODEL_NOT_FOUND")
        for track in tracks:
            track.unloaded = True
            self._retirement.abandon_incoming(track, now_s)
            if track.serving is not None:
                self._retirement.drain(track.serving, "MODEL_UNLOADED", "unloaded by request", now_s)
            self._around.emit(Log("model_unloaded", {"MODEL": name}))
            self._around.emit(state_event(name, track.explicit_version, "UNAVAILABLE", "MODEL_UNLOADED"))
        self._registry.changed()
        self._lifecycle.step(now_s)

    def retry_for_device(self) -> None:
        """A device works now: models that were refused for want of one are tried again."""
        for track in self._registry.tracks.values():
            refused = track.failure is not None and track.failure.reason == "DEVICE_UNAVAILABLE"
            if refused and track.entry is not None:
                self._look_again(track)
                self._around.emit(Scan(0.0))
