"""Says "look again" when something happens in the models folder, and nothing more.

Events are a convenience, never the truth: they come late, in halves, or not at all (a full queue, a
network mount, a watch that died with its directory). So what an event says is thrown away, `notify` is
called, and whoever is notified scans.

Each directory of the folder has a watch of its own, and `check`, which is to be called before every scan,
lays them anew over what is there then. A directory is watched before it is listed: whatever comes later
rings, whatever came before is seen by the scan that follows, so none of exchanging, renaming, removing
and making directories can get between the two. No state is carried from one event to the next that could
be wrong after it. (watchdog's recursive observer carries some, and its thread dies of a KeyError when two
directories are exchanged; its polling observer is the fall-back here.)
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

from watchdog.events import FileSystemEvent, FileSystemEventHandler
from watchdog.observers.polling import PollingObserver

from edged.inotify import Inotify
from edged.repository import IGNORED_SUFFIXES

__all__ = ["Watcher"]

_POLL_S = 5.0
_STOP_S = 5.0
_DEPTH_MAX = 10
"""NAME/VERSION and the depth of directories that a bundle may have."""
_DIRECTORIES_MAX = 8192
"""The default of max_user_watches on small machines; beyond, changes wait for the rescan."""
_NOT_OURS = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.ELOOP, errno.ENAMETOOLONG})
"""What is wrong with one directory, and not with inotify."""


class Watcher:
    """Watches `root` and everything below it; a context manager that holds one inotify or one poller.

    `notify` is called from the watch's thread, and by `check` when there was something new to watch. It
    must be safe there and quick. `fault` is a sentence while the folder cannot be watched whole by
    inotify, else None. `check` and `stop` may be called from different threads.
    """

    def __init__(self, root: Path, notify: Callable[[], None]) -> None:
        self._root = root
        self._notify = notify
        self._lock = threading.Lock()
        self._stopped = True
        self._inotify: Inotify | None = None
        self._watches: frozenset[int] = frozenset()
        self._poller: _Poller | None = None
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
        self._stopped = False
        self.check()

    def stop(self) -> None:
        """Ends the watch; no `notify` comes afterwards. Never raises."""
        self._stopped = True
        # A `check` that hangs in a dead mount must not hold up the daemon's end.
        if self._lock.acquire(timeout=_STOP_S):
            try:
                self._disarm()
            finally:
                self._lock.release()

    def check(self) -> None:
        """Brings the watches in step with the directories that are there; to be called before each scan."""
        with self._lock:
            if self._stopped:
                return
            has_new = self._arm()
        if has_new:
            # What happened between the last scan and the new watch has made no event.
            self._notify()

    def _arm(self) -> bool:
        """Whether something is watched now that was not before."""
        root = os.path.realpath(self._root)  # the root may be a link; its directory is what is watched
        if not os.path.isdir(root):
            self._disarm()
            self.fault = f"the models folder {self._root} is not there: it is looked for at each rescan"
            return False
        if self._poller is not None and self._poller.serves(root):
            return False
        try:
            return self._lay_watches(root)
        except OSError as error:
            reason = f"inotify cannot watch {self._root}: {error.strerror or error}"
            self._disarm()
            if error.errno in _NOT_OURS:  # polling could not either; each check tries again
                self.fault = f"{reason}. Only the rescan is left"
                return False
            return self._fall_back_to_polling(root, reason)

    def _lay_watches(self, root: str) -> bool:
        if self._inotify is None or not self._inotify.is_alive:
            self._disarm()
            self._inotify = Inotify(self._notify)
        laid = set()
        self.fault = None
        for number in _watched(self._inotify, root):
            laid.add(number)
            if len(laid) >= _DIRECTORIES_MAX:
                self.fault = (
                    f"{self._root} holds more than {_DIRECTORIES_MAX} directories: "
                    "changes in the others are seen at the rescan only"
                )
                break
        before, self._watches = self._watches, frozenset(laid)
        for number in before - self._watches:
            self._inotify.unwatch(number)
        return bool(self._watches - before)

    def _fall_back_to_polling(self, root: str, reason: str) -> bool:
        try:
            self._poller = _Poller(root, self._notify)
        except OSError as error:
            self.fault = f"{reason}; polling fails too: {error.strerror or error}. Only the rescan is left"
            return False
        self.fault = (
            f"{reason}; it is polled every {_POLL_S:g} s instead. The limits are in "
            "/proc/sys/fs/inotify/max_user_watches and max_user_instances"
        )
        return True

    def _disarm(self) -> None:
        inotify, self._inotify, self._watches = self._inotify, None, frozenset()
        poller, self._poller = self._poller, None
        if inotify is not None:
            inotify.close()
        if poller is not None:
            poller.close()


def _watched(inotify: Inotify, root: str) -> Iterator[int]:
    """Watches the root and each directory below, and gives the numbers.

    Raises OSError where the root cannot be watched, or the kernel has no watches left.
    """
    pending = [(root, 0)]
    seen: set[int] = set()
    while pending:
        directory, depth = pending.pop()
        try:
            number = inotify.watch(directory)
        except OSError as error:
            if directory == root or error.errno not in _NOT_OURS:
                raise
            continue  # it went while we looked, or is not for us; the scan says so where it matters
        yield number
        if number in seen:  # links may lead in circles
            continue
        seen.add(number)
        if depth < _DEPTH_MAX:
            pending += [(path, depth + 1) for path in _directories(directory, root)]


def _directories(directory: str, root: str) -> list[str]:
    """The directories in a directory that may hold a part of a model.

    Hidden ones too: links lead into them. Not what `edgectl put` and other copying programs still write.
    """
    try:
        with os.scandir(directory) as found:
            return [
                entry.path
                for entry in found
                if not entry.name.endswith(IGNORED_SUFFIXES) and entry.is_dir() and _is_inside(entry, root)
            ]
    except OSError:
        return []


def _is_inside(entry: os.DirEntry[str], root: str) -> bool:
    return not entry.is_symlink() or os.path.realpath(entry.path).startswith(root.rstrip("/") + "/")


class _Poller(FileSystemEventHandler):
    """watchdog's polling observer, for where inotify cannot be had. Raises OSError."""

    def __init__(self, root: str, notify: Callable[[], None]) -> None:
        self._notify = notify
        self._root = root
        self._identity = _identity(root)
        self._observer = PollingObserver(timeout=_POLL_S)
        self._observer.schedule(self, root, recursive=True)
        self._observer.start()

    def on_any_event(self, event: FileSystemEvent) -> None:
        """Whatever it was: look again."""
        self._notify()

    def serves(self, root: str) -> bool:
        """Whether changes in this very directory are still noticed: an emitter dies with its directory, the
        observer does not."""
        emitters = list(self._observer.emitters)
        return (
            root == self._root
            and _identity(root) == self._identity
            and self._observer.is_alive()
            and bool(emitters)
            and all(emitter.is_alive() for emitter in emitters)
        )

    def close(self) -> None:
        """Ends the polling. Never raises: what is wrong with a watch must not become the daemon's end."""
        with contextlib.suppress(Exception):
            self._observer.stop()
        with contextlib.suppress(RuntimeError):
            self._observer.join(_STOP_S)


def _identity(root: str) -> tuple[int, int] | None:
    try:
        status = os.stat(root)
    except OSError:
        return None
    return (status.st_dev, status.st_ino)
