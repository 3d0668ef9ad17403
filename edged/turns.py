"""Whose turn it is to load: a few at a time on each device, and none that memory has no room for.

Pure. Loads take turns so that a folder of twenty does not storm a small board. Two kinds are told apart from
the rest. A *light* load, of a small content that has served before, takes tens of milliseconds on one core
and mostly waits for others (a fork, a file, a word back), so as many of them as there are CPUs may go beside
each other and beside the one large load. A *suspect*, during whose load the daemon ended before, goes alone:
should it take the daemon with it again, nobody else is blamed. This holds the queue and answers whether an
instance may begin; beginning is the lifecycle's.
"""

from __future__ import annotations

import math

from edged import resources
from edged.events import Log
from edged.instances import Instance, InstanceState, Surroundings
from edged.registry import Registry
from edged.workers import Workers

__all__ = ["Turns"]

LOAD_PATIENCE_S = 10.0
"""A load that takes longer than this no longer holds up the others of its device: it may be hanging."""

MEMORY_RETRY_S = 5.0
"""How often a load that was refused for memory is considered again."""

LIGHT_BYTES_MAX = 4 << 20
"""A content beyond this takes a real part of a small board's memory and time to load."""

RUNTIME_BYTES = 64 * 1024 * 1024
"""What a runtime takes beside the model, at the least."""


class Turns:
    """The queue of instances that wait to load."""

    def __init__(self, around: Surroundings, *, registry: Registry, workers: Workers) -> None:
        self.queue: list[Instance] = []
        self._around = around
        self._registry = registry
        self._workers = workers
        self._memory_retry_s = math.inf
        self._patience_ends_s = math.inf
        """When a load that takes long lets the next one begin."""

    def drop(self, instance: Instance) -> None:
        """An instance waits no longer."""
        if instance in self.queue:
            self.queue.remove(instance)

    def waiting(self) -> list[Instance]:
        """Those to ask about now, the oldest first."""
        self._patience_ends_s = math.inf
        return list(self.queue)

    def device_free(self, instance: Instance, now_s: float) -> bool:
        """Whether its device has room for one more load; one that takes long no longer counts."""
        device, light = instance.plan[0].device, _is_light(instance)
        suspects = bool(instance.staged.interrupted)
        alike = others = 0
        for other in self._registry.instances.values():
            if other is instance or not self._holds_up(other, now_s):
                continue
            others += 1
            suspects = suspects or bool(other.staged.interrupted)
            if other.candidate is not None and other.candidate.device == device:
                alike += _is_light(other) is light
        if suspects:
            return not others
        concurrency = self._around.config.loading.concurrency
        return alike < (max(concurrency, self._around.machine.cpus) if light else concurrency)

    def _holds_up(self, instance: Instance, now_s: float) -> bool:
        """Whether an instance is being loaded, and not so slowly that nobody should wait for it."""
        if instance.state is InstanceState.PREPARING:
            return True
        if instance.state is not InstanceState.LOADING:
            return False
        patience_ends_s = instance.load_started_s + LOAD_PATIENCE_S
        if now_s >= patience_ends_s:
            return False
        self._patience_ends_s = min(self._patience_ends_s, patience_ends_s)
        return True

    def memory_allows(self, instance: Instance, now_s: float) -> bool:
        """Whether there is memory for it; if not, its reason says how much is missing."""
        guard = self._around.guard
        if guard is None:
            return True
        allowed, sentence = resources.may_load(guard, self._needed_bytes(instance))
        refused_before = instance.reason == "MEMORY_PRESSURE"
        if allowed:
            if refused_before:
                instance.reason, instance.message = "", ""
            return True
        if not refused_before:
            fields = {**instance.log_fields(), "REASON": "MEMORY_PRESSURE", "DETAIL": sentence}
            self._around.emit(Log("load_refused", fields))
        instance.reason, instance.message = "MEMORY_PRESSURE", sentence
        self._memory_retry_s = now_s + MEMORY_RETRY_S
        return False

    def _needed_bytes(self, instance: Instance) -> int:
        """What a load will take: as much as the version before, else its size twice and the runtime's own."""
        serving = instance.track.serving
        worker = None if serving is None else self._workers.of(serving)
        if worker is not None and worker.rss_bytes and not worker.shared:
            # One that takes the place of the version before needs only what that one did not.
            return 0 if instance.settings.swap == "replace" else worker.rss_bytes
        size: int = instance.staged.size_bytes
        return 2 * size + RUNTIME_BYTES

    def tick(self, now_s: float) -> None:
        """Loads that were refused for memory are to be considered again."""
        if self._memory_retry_s <= now_s:
            self._memory_retry_s = math.inf

    def next_due_s(self) -> float | None:
        """When the queue should be looked at again, without anything else having happened."""
        due = min(self._memory_retry_s, self._patience_ends_s)
        return None if due == math.inf else due


def _is_light(instance: Instance) -> bool:
    """Whether its load is a matter of moments, as far as can be known before."""
    staged = instance.staged
    return bool(staged.known_good and staged.size_bytes <= LIGHT_BYTES_MAX)
