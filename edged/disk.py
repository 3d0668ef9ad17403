"""What the daemon does with disks: looks at the models folder, keeps copies, and writes its books.

Owns the store, the watcher and the one thread on which all of that happens, since a disk may take its time or
hang. Two more do nothing but hash copies that are being loaded, one of them the small ones: a large copy
takes a card half a minute, in which neither a new file nor a small model is to wait. Nothing here decides: an
effect of the core's becomes a task, what comes of it an event in the mailbox.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from edged.config import Config
from edged.copies import DamagedCopyError, check_copy
from edged.events import (
    CopyHashed,
    CopySetAside,
    EndAttempt,
    Event,
    FolderScanned,
    HashCopy,
    LoadPrepared,
    MarkGood,
    PrepareLoad,
    RememberSizes,
    Scan,
    SetAside,
    Stage,
    Staged,
    StageFailed,
)
from edged.helper import Helper, Mailbox
from edged.repository import Entry, Snapshot, scan
from edged.store import LastGood, Store, StoreError
from edged.watcher import Watcher

__all__ = ["Disk", "entry_of"]

SCAN_DEBOUNCE_S = 0.05
"""From a touch of the folder until it is looked at, so that a burst of events is one scan."""

FAULT_RESCAN_S = 2.0
"""How often a folder that is gone is looked for: nothing tells when its mount comes back."""

SMALL_BYTES_MAX = 4 << 20
"""A copy up to this size is hashed in moments, from any disk; it is not to wait behind one that is not."""

END_S = 5.0
"""How long the last task has when the daemon stops."""


class _LookAgain(Event, frozen=True):
    """From the watcher: the folder was touched."""


class _Journal(Protocol):
    def emit(self, kind: str, /, **fields: object) -> None: ...


class Disk:
    """The folder, the store and the thread between them and the loop; a context manager.

    Raises StoreError when the state or the cache directory cannot be had.
    """

    def __init__(
        self, config: Config, *, journal: _Journal, mailbox: Mailbox, on_bug: Callable[[str], None]
    ) -> None:
        self._config = config
        self._journal = journal
        self._mailbox = mailbox
        self._stack = contextlib.ExitStack()
        self.store = Store(
            config.server.state_dir,
            keep_versions=config.store.keep_versions,
            max_bytes=config.store.max_bytes,
            disk_free_min_bytes=config.resources.disk_free_min_bytes,
        )
        self._stack.callback(self.store.close)
        try:
            _make_cache(config)
            self._helper = Helper("store", mailbox, on_bug)
            self._hasher = Helper("hasher", mailbox, on_bug)
            self._small_hasher = Helper("small-hasher", mailbox, on_bug)
            for hasher in (self._hasher, self._small_hasher):
                self._stack.callback(hasher.close, 0.0)  # what it still reads is of use to nobody
            self._watcher = Watcher(config.server.models, lambda: mailbox.put(_LookAgain()))
            self._watcher.start()
            self._stack.callback(self._watcher.stop)
        except BaseException:
            self._stack.close()
            raise
        self._watcher_fault: str | None = None
        self._scan_at_s: float | None = 0.0
        self._scanning = False
        self._rescan_at_s = time.monotonic() + config.loading.rescan_s

    def __enter__(self) -> Disk:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the folder and the store; idempotent. `end` comes first."""
        self._stack.close()

    def end(self) -> None:
        """Does what has been given still, within bounds."""
        self._helper.close(END_S)

    def configure(self, config: Config) -> None:
        """Other settings are in force."""
        self._config = config
        self.in_store(
            lambda s: s.set_limits(
                keep_versions=config.store.keep_versions,
                max_bytes=config.store.max_bytes,
                disk_free_min_bytes=config.resources.disk_free_min_bytes,
            )
        )

    def last_good(self) -> Sequence[LastGood]:
        """What served when the daemon last ran."""
        served = self.store.last_good()
        if not served:
            # Nothing ever served from there, so no mount is missing: the first start makes the folder.
            with contextlib.suppress(OSError):
                self._config.server.models.mkdir(parents=True, exist_ok=True)
        return served

    def busy_s(self, now_s: float) -> float:
        """How long a thread has been at its present task: a disk that hangs shows here."""
        return max(each.busy_s(now_s) for each in (self._helper, self._hasher, self._small_hasher))

    # ------------------------------------------------------------------ the folder

    @property
    def due_s(self) -> float:
        """When `tick` has something to do."""
        return math.inf if self._scan_at_s is None or self._scanning else self._scan_at_s

    def tick(self, now_s: float) -> None:
        """Has the folder looked at."""
        if self._scanning:
            return
        self._scan_at_s = None
        self._scanning = True
        unseen = Snapshot(str(self._config.server.models), fault="a fault of edged hides it; see the log")
        self._helper.give(self._scan_task, otherwise=[FolderScanned(unseen, time.time())])

    def look_after(self, now_s: float) -> None:
        """Once in a while: events are a hint and no more, so the folder is looked at without one, too."""
        if self._scan_at_s is None and now_s >= self._rescan_at_s:
            self._scan_at_s = now_s

    def scan(self, effect: Scan) -> None:
        at_s = time.monotonic() + effect.after_s
        self._scan_at_s = at_s if self._scan_at_s is None else min(at_s, self._scan_at_s)

    def takes(self, event: Event) -> bool:
        """Whether an event of the mailbox was for the disk alone; one that is not may still be heard here."""
        if isinstance(event, _LookAgain):
            self.scan(Scan(SCAN_DEBOUNCE_S))
            return True
        if isinstance(event, FolderScanned):
            self._scanning = False
            rescan_s = self._config.loading.rescan_s
            if event.snapshot.fault is not None:
                rescan_s = min(rescan_s, FAULT_RESCAN_S)
            self._rescan_at_s = time.monotonic() + rescan_s
        return False

    def _scan_task(self) -> list[Event]:
        self._watcher.check()
        fault = self._watcher.fault
        if fault is not None and fault != self._watcher_fault and self._config.server.models.exists():
            self._journal.emit("folder_polled", REASON=fault)
        self._watcher_fault = fault
        return [FolderScanned(scan(self._config.server.models), time.time())]

    # ------------------------------------------------------------------ the store

    def stage(self, effect: Stage) -> None:
        entry, root = effect.entry, self._config.server.models

        def task() -> list[Event]:
            try:
                staged = self.store.stage(root, entry)
            except StoreError as e:
                again = e.reason in ("CHANGED_WHILE_COPYING", "BEING_WRITTEN", "DISK_FULL")
                return [StageFailed(entry, e.reason, e.message, again)]
            while self.store.replaced:
                detail = (
                    f"{self.store.replaced.pop()}: a file is missing, was cut or is not the daemon's alone"
                )
                self._journal.emit("copy_damaged", MODEL=entry.name, DETAIL=detail)
            return [Staged(entry, staged, self.store.quarantined(staged.digest))]

        failed = StageFailed(entry, "STORE_FAILED", "it could not be copied; the log says why", False)
        self._helper.give(task, otherwise=[failed])

    def prepare_load(self, effect: PrepareLoad) -> None:
        def task() -> list[Event]:
            try:
                self.store.begin_attempt(effect.digest)
            except StoreError as e:
                # A full disk is no reason not to serve: only a machine that dies of this load is not told on.
                self._journal.emit("store_failed", REASON=e.reason, DETAIL=e.message)
            choice = self.store.recall_choice(effect.choice_key)
            sizes = self.store.recall_sizes(effect.digest)
            return [LoadPrepared(effect.instance, choice, sizes)]

        self._helper.give(task, otherwise=[LoadPrepared(effect.instance, None)])

    def hash_copy(self, effect: HashCopy) -> None:
        """Reads what a worker is loading meanwhile: of the same files, so mostly out of the page cache."""
        copy = self.store.copy_path(effect.digest)

        def task() -> list[Event]:
            try:
                check_copy(copy)
            except DamagedCopyError as e:
                return [CopyHashed(effect.instance, "COPY_DAMAGED", str(e))]
            except OSError as e:
                return [CopyHashed(effect.instance, "COPY_UNREADABLE", e.strerror or str(e))]
            return [CopyHashed(effect.instance)]

        hasher = self._small_hasher if effect.size_bytes <= SMALL_BYTES_MAX else self._hasher
        failed = CopyHashed(effect.instance, "COPY_UNREADABLE", "a fault of edged; the log says which")
        hasher.give(task, otherwise=[failed])

    def set_aside(self, effect: SetAside) -> None:
        def task() -> list[Event]:
            try:
                self.store.set_aside(effect.digest)
            except StoreError as e:
                self._journal.emit("store_failed", REASON=e.reason, DETAIL=e.message)
            before = tuple((entry_of(good), good.staged) for good in self.store.without(effect.digest))
            return [CopySetAside(effect.digest, before)]

        self._helper.give(task, otherwise=[CopySetAside(effect.digest)])

    def mark_good(self, effect: MarkGood) -> None:
        entry, digest = effect.entry, effect.staged.digest
        settings = entry.settings.to_wire()
        self.in_store(
            lambda s: s.mark_good(
                entry.name, entry.version, digest, entry_format=entry.format, settings_wire=settings
            )
        )

    def end_attempt(self, effect: EndAttempt) -> None:
        self.in_store(lambda s: s.end_attempt(effect.digest))
        self.in_store(lambda s: s.rest(), later="attempts")

    def remember_sizes(self, effect: RememberSizes) -> None:
        """The sizes of a content's requests for the next start."""
        self.in_store(
            lambda s: s.remember_sizes(effect.digest, effect.sizes), later=f"sizes of {effect.digest}"
        )

    def remember_verdict(self, device: str, mark: str, verdict: Mapping[str, str] | None) -> None:
        """A probe's verdict for the next start, while `mark` is the same; None forgets what is there."""
        if verdict is None or not mark:
            self.in_store(lambda s: s.forget_verdict(device), later=device)
        else:
            kept = dict(verdict)
            self.in_store(lambda s: s.remember_verdict(device, mark, kept), later=device)

    def in_store(self, call: Callable[[Store], object], *, later: str = "") -> None:
        """A change of the store's books that brings no event; `later`, when it can wait, says what it is."""

        def task() -> list[Event]:
            try:
                call(self.store)
            except StoreError as e:
                self._journal.emit("store_failed", REASON=e.reason, DETAIL=e.message)
            return []

        if later:
            self._helper.give_later(later, task)
        else:
            self._helper.give(task)


def entry_of(good: LastGood) -> Entry:
    """The entry as it was when it served; the folder may have another by now."""
    return Entry(good.name, good.explicit_version, good.format, "", "", settings=good.settings)


def _make_cache(config: Config) -> None:
    try:
        config.server.cache_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as e:
        text = f"{config.server.cache_dir} cannot be made: {e.strerror}; name another by cache_dir"
        raise StoreError("CACHE_DIR_UNUSABLE", text) from None
