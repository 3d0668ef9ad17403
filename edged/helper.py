"""The thread that touches the disk, so that the supervisor's loop never waits for it.

Tasks run one after the other in the order in which they were given; what each returns goes back to the
loop as an event. What can wait is done once when nothing else has been given for a moment, however often it
was asked for. Nothing else is shared between the two threads.
"""

from __future__ import annotations

import queue
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edged.events import Event

__all__ = ["Helper", "Mailbox"]

Task = Callable[[], Sequence[Event]]

REST_S = 0.2
"""Nothing was given for this long: the models of a start or of an update are through."""


class Mailbox:
    """Where other threads leave events for the loop; `wake` makes the loop look."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._events: deque[Event] = deque()
        self._wake = wake

    def put(self, event: Event) -> None:
        """From any thread."""
        self._events.append(event)
        self._wake()

    def take(self) -> Event | None:
        """The oldest event, or None."""
        try:
            return self._events.popleft()
        except IndexError:
            return None


@dataclass(frozen=True)
class _Given:
    task: Task
    otherwise: Sequence[Event]
    key: str = ""
    """Of a task that can wait."""


class Helper:
    """One thread and its tasks. `on_bug` is told the traceback of a task that raised, in this thread."""

    def __init__(self, name: str, mailbox: Mailbox, on_bug: Callable[[str], None]) -> None:
        self._mailbox = mailbox
        self._on_bug = on_bug
        self._tasks: queue.SimpleQueue[_Given | None] = queue.SimpleQueue()
        self._later: dict[str, Task] = {}
        self._busy_since_s: float | None = None
        self._thread = threading.Thread(target=self._work, name=f"edged-{name}", daemon=True)
        self._thread.start()

    def give(self, task: Task, *, otherwise: Sequence[Event] = ()) -> None:
        """Has a task done; `otherwise` is what becomes of it when it raises, so that nobody waits for it.

        The queue is bounded by what the core has under way: one task for each model.
        """
        self._tasks.put(_Given(task, otherwise))

    def give_later(self, key: str, task: Task) -> None:
        """Has a task done at rest, or at the end; of several with one key only the last."""
        self._tasks.put(_Given(task, (), key))

    def busy_s(self, now_s: float) -> float:
        """How long it has been at its present task; 0 when it has none."""
        since_s = self._busy_since_s
        return 0.0 if since_s is None else max(0.0, now_s - since_s)

    def _work(self) -> None:
        while True:
            try:
                given = self._tasks.get(timeout=REST_S if self._later else None)
            except queue.Empty:
                self._rest()
                continue
            if given is None:
                self._rest()
                return
            if given.key:
                self._later[given.key] = given.task
            else:
                self._do(given.task, given.otherwise)

    def _rest(self) -> None:
        later, self._later = self._later, {}
        for task in later.values():
            self._do(task, ())

    def _do(self, task: Task, otherwise: Sequence[Event]) -> None:
        self._busy_since_s = time.monotonic()
        try:
            events = task()
        except Exception:  # noqa: BLE001 - the edge of the thread: a task's bug must not end it
            self._on_bug(traceback.format_exc())
            events = otherwise
        self._busy_since_s = None
        for event in events:
            self._mailbox.put(event)

    def close(self, timeout_s: float) -> None:
        """Ends the thread after the tasks that it has; waits no longer than `timeout_s`."""
        self._tasks.put(None)
        self._thread.join(timeout_s)
