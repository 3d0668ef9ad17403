"""The thread that touches the disk, so that the supervisor's loop never waits for it.

Tasks run one after the other in the order in which they were given; what each returns goes back to the
loop as an event. Nothing else is shared between the two threads.
"""

from __future__ import annotations

import queue
import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence

from edged.events import Event

__all__ = ["Helper", "Mailbox"]

Task = Callable[[], Sequence[Event]]


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


class Helper:
    """One thread and its tasks. `on_bug` is told the traceback of a task that raised, in this thread."""

    def __init__(self, name: str, mailbox: Mailbox, on_bug: Callable[[str], None]) -> None:
        self._mailbox = mailbox
        self._on_bug = on_bug
        self._tasks: queue.SimpleQueue[tuple[Task, Sequence[Event]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"edged-{name}", daemon=True)
        self._thread.start()

    def give(self, task: Task, *, otherwise: Sequence[Event] = ()) -> None:
        """Has a task done; `otherwise` is what becomes of it when it raises, so that nobody waits for it.

        The queue is bounded by what the core has under way: one task for each model.
        """
        self._tasks.put((task, otherwise))

    def _work(self) -> None:
        while (given := self._tasks.get()) is not None:
            task, otherwise = given
            try:
                events = task()
            except Exception:  # noqa: BLE001 - the edge of the thread: a task's bug must not end it
                self._on_bug(traceback.format_exc())
                events = otherwise
            for event in events:
                self._mailbox.put(event)

    def close(self, timeout_s: float) -> None:
        """Ends the thread after the tasks that it has; waits no longer than `timeout_s`."""
        self._tasks.put(None)
        self._thread.join(timeout_s)
