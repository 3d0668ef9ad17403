"""What the service manager hears from a daemon that runs: that it lives, how it is, that its start goes on.

Owns when to say it, and says as little as it can: an idle daemon wakes nobody but for the watchdog, at a
quarter of its time. Fed by the loop alone, and only while the core can handle events. A thread that hangs on
a disk is no reason to kill what serves, since a new start would need that very disk: the status tells of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from edged.status import StatusLine
from edged.system import Notifier

if TYPE_CHECKING:
    from edged.core import Core

__all__ = ["Heartbeat"]

EXTEND_EVERY_S: Final = 10.0
EXTEND_BY_S: Final = 30.0
"""While models load at the start: the manager is asked for so much more time, every so often. The core ends
that by being ready after `server.startup_wait` at the latest."""


class Heartbeat:
    """Tells the service manager; `notifier` is where to."""

    def __init__(self, notifier: Notifier) -> None:
        self._notifier = notifier
        self._line = StatusLine()
        self._watchdog_s = -math.inf
        self._extend_s = -math.inf
        self._every_s = math.inf
        if notifier.watchdog_interval_s is not None:
            self._every_s = notifier.watchdog_interval_s / 2
        self.due_s = 0.0

    def beat(
        self, core: Core, now_s: float, *, at_most_s: float, well: bool, notes: Sequence[str] = ()
    ) -> None:
        """The loop has come round. `well`: and the core has handled an event; the next beat is due within
        `at_most_s`. `notes` are what else the status should say."""
        self.due_s = now_s + min(at_most_s, self._every_s)
        if well and now_s - self._watchdog_s >= self._every_s:
            self._watchdog_s = now_s
            self._notifier.watchdog()
        text = self._line.changed(core, now_s, notes)
        if core.state == "starting" and now_s - self._extend_s >= EXTEND_EVERY_S:
            self._extend_s = now_s
            self._notifier.starting(text or self._line.text, longer_s=EXTEND_BY_S)
        elif text is not None:
            self._notifier.status(text)

    def ready(self, core: Core, now_s: float, notes: Sequence[str] = ()) -> str:
        """Ready, or done with a reload; returns what was told."""
        text = self._line.fresh(core, now_s, notes)
        self._notifier.ready(text)
        return text
