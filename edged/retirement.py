"""How an instance ends: let it finish, take it out of its worker, forget it.

Pure. What serves is drained: it takes no more requests, finishes those it has, and goes when the last is
answered or its time is up. What is still on its way in is abandoned on the spot. A track whose entry is gone
for good ends with all its instances.
"""

from __future__ import annotations

from collections.abc import Callable

from edged.errors import Unavailable
from edged.events import Collect, EndAttempt, ForgetModel, Log
from edged.instances import LOADS, Hooks, Instance, InstanceState, Surroundings, Track, state_event
from edged.registry import Registry
from edged.turns import Turns
from edged.workers import Workers

__all__ = ["Retirement"]

DRAIN_S = 30.0
"""How long an old instance may take to finish what it has; its longest request is bounded too."""

STOPPED_RETRY_MS = 500
"""When to ask again where a copy is made again: as for a model that is being copied for the first time."""


class Retirement:
    """Ends instances and tracks."""

    def __init__(
        self,
        around: Surroundings,
        *,
        registry: Registry,
        workers: Workers,
        turns: Turns,
        hooks: Hooks,
        ended: Callable[[float], None],
    ) -> None:
        self._around = around
        self._registry = registry
        self._workers = workers
        self._turns = turns
        self._hooks = hooks
        self._ended = ended
        """Called with the time when an instance has ended: there is room for another's turn."""

    # ------------------------------------------------------------------ what serves

    def drain(self, instance: Instance, reason: str, message: str, now_s: float) -> None:
        """Lets a serving instance finish what it has; nothing new comes to it."""
        track = instance.track
        if track.serving is instance:
            track.serving = None
        track.draining.append(instance)
        started = instance.state is InstanceState.READY
        if instance.state in LOADS:
            self._workers.stop_load(instance, now_s)
        instance.move(InstanceState.DRAINING, reason, message)
        instance.due_s = now_s + DRAIN_S
        self._registry.changed()
        if not started:
            self._hooks.flush(instance, Unavailable(f"model '{instance.name}': {message}", reason=reason))
        self.check_drained(instance, now_s)

    def stop(self, instance: Instance, reason: str, message: str, now_s: float) -> None:
        """Ends an instance that is not to answer any more: what it has gets an error at once."""
        if instance.state is not InstanceState.DRAINING:
            self.drain(instance, reason, message, now_s)
        self._hooks.flush(instance, Unavailable(message, reason=reason, retry_after_ms=STOPPED_RETRY_MS))
        self.check_drained(instance, now_s)

    def check_drained(self, instance: Instance, now_s: float) -> None:
        """Ends a draining instance once nothing waits or runs for it."""
        if instance.state is not InstanceState.DRAINING or self._hooks.busy(instance):
            return
        self._workers.unload(instance, now_s)
        instance.move(InstanceState.GONE, instance.reason, instance.message)
        instance.track.draining.remove(instance)
        self._around.emit(Log("model_retired", instance.log_fields()))
        self.forget(instance)
        self._around.emit(Collect(self._registry.digests_in_use()))
        self._ended(now_s)

    def overdue(self, instance: Instance, now_s: float) -> None:
        """A draining instance's time is up."""
        message = f"model '{instance.name}' was replaced and did not finish in {DRAIN_S:g} s"
        self._hooks.flush(instance, Unavailable(message, reason="MODEL_RETIRED"))
        worker = self._workers.of(instance)
        if worker is not None and not worker.shared:
            self._workers.kill(worker, "did not finish its last requests", now_s)
        else:
            self.check_drained(instance, now_s)

    def worker_gone(self, instance: Instance, text: str, now_s: float) -> None:
        """A draining instance's worker has ended under it."""
        message = f"model '{instance.name}' was being replaced when {text}"
        self._hooks.flush(instance, Unavailable(message, reason="WORKER_CRASHED", retry_after_ms=0))
        self.check_drained(instance, now_s)

    # ------------------------------------------------------------------ what is on its way, and tracks

    def abandon_incoming(
        self,
        track: Track,
        now_s: float,
        reason: str = "SUPERSEDED",
        message: str = "other content took its place",
    ) -> None:
        """Gives up what is on its way to serve, wherever it has got to."""
        instance, track.incoming = track.incoming, None
        if instance is None:
            return
        if instance.state in LOADS:
            self._workers.stop_load(instance, now_s)
            self._around.emit(EndAttempt(instance.staged.digest))
        elif instance.state is InstanceState.PREPARING:
            self._around.emit(EndAttempt(instance.staged.digest))
        instance.move(InstanceState.GONE, reason, message)
        self.forget(instance)

    def remove(self, key: tuple[str, int | None], now_s: float) -> None:
        """An entry is gone for good, and with it its track and all that serves for it."""
        track = self._registry.tracks.pop(key, None)
        if track is None:
            return
        self.abandon_incoming(track, now_s)
        if track.serving is not None:
            self.drain(track.serving, "MODEL_REMOVED", "its file was removed from the folder", now_s)
        self._around.emit(Log("model_removed", {"MODEL": track.name}))
        self._around.emit(ForgetModel(*key))
        self._around.emit(state_event(track.name, track.explicit_version, "UNAVAILABLE", "MODEL_REMOVED"))
        self._registry.changed()
        rest = self._registry.named(track.name)
        if rest and all(other.superseded for other in rest):
            # They only waited for this one to take their place.
            self.remove(rest[0].key, now_s)

    def forget(self, instance: Instance) -> None:
        """Strikes an instance from every table."""
        self._registry.instances.pop(instance.id, None)
        self._turns.drop(instance)
        self._hooks.forget(instance)
