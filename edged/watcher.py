"""Says "look again" when something happens in the models folder, and nothing more.

Events are a convenience, never the truth: they come late, in halves, or not at all (a full queue, a
network mount, a watch that died with its directory). So what an event says is thrown away, `notify` is
called, and whoever is notified scans. `check` is called at every rescan and repairs the watch.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from watchdog.events import FileSystemEvent, FileSystemEventHandler
from watchdog.observers import Observer
from watchdog.observers.api import BaseObserver
from watchdog.observers.polling import PollingObserver

__all__ = ["Watcher"]

_POLL_S = 5.0
_STOP_S = 5.0
_READ_EVENTS = frozenset({"opened", "closed_no_write"})
"""Our own reading makes these; to notify for them would make each scan the cause of the next."""


class Watcher:
    """Watches `root` and everything below it; a context manager that holds one observer.

    `notify` is called from the observer's thread and must be safe there and quick. `fault` is a sentence
    while the folder cannot be watched by inotify, else None.
    """

    def __init__(self, root: Path, notify: Callable[[], None]) -> None:
        self._root = root
        self._notify = notify
        self._observer: BaseObserver | None = None
        self._watched: tuple[int, int] | None = None
        self.fault: str | None = None

    def __enter__(self) -> Watcher:
        self.start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Begins to watch; a root that is not there is watched from the first `check` that finds it."""
        self.check()

    def stop(self) -> None:
        """Ends the watch; no `notify` comes afterwards."""
        observer, self._observer, self._watched = self._observer, None, None
        if observer is None:
            return
        observer.unschedule_all()
        observer.stop()
        if observer.is_alive():
            observer.join(_STOP_S)

    def check(self) -> None:
        """Arms the watch anew when it is dead, or when the root is another directory than the one watched."""
        current = self._identity()
        if current is not None and current == self._watched and self._is_alive():
            return
        self.stop()
        if current is None:
            self.fault = f"the models folder {self._root} is not there: it is looked for at each rescan"
            return
        try:
            self._arm(Observer())
            self.fault = None
        except OSError as error:
            reason = f"inotify cannot watch {self._root}: {error.strerror or error}"
            self._fall_back_to_polling(reason)
        if self._observer is not None:
            self._watched = current
            # What happened between the last scan and the new watch has made no event.
            self._notify()

    def _fall_back_to_polling(self, reason: str) -> None:
        try:
            self._arm(PollingObserver(timeout=_POLL_S))
            self.fault = (
                f"{reason}; it is polled every {_POLL_S:g} s instead. The limits are in "
                "/proc/sys/fs/inotify/max_user_watches and max_user_instances"
            )
        except OSError as error:
            self.fault = f"{reason}; polling fails too: {error.strerror or error}. Only the rescan is left"

    def _arm(self, observer: BaseObserver) -> None:
        handler = _Handler(self._notify)
        try:
            # The root may be a link; the watch is on the directory that it leads to.
            observer.schedule(handler, os.path.realpath(self._root), recursive=True)
            observer.start()
        except BaseException:
            with contextlib.suppress(RuntimeError, OSError):
                observer.unschedule_all()
            raise
        self._observer = observer

    def _identity(self) -> tuple[int, int] | None:
        try:
            status = os.stat(self._root)
        except OSError:
            return None
        return (status.st_dev, status.st_ino)

    def _is_alive(self) -> bool:
        """Whether events can still come: an emitter dies with its directory, the observer does not."""
        observer = self._observer
        if observer is None or not observer.is_alive():
            return False
        emitters = list(observer.emitters)
        return bool(emitters) and all(emitter.is_alive() for emitter in emitters)


class _Handler(FileSystemEventHandler):
    """Turns every event that can mean a change into the same call."""

    def __init__(self, notify: Callable[[], None]) -> None:
        self._notify = notify

    def on_any_event(self, event: FileSystemEvent) -> None:
        if event.event_type not in _READ_EVENTS:
            self._notify()
