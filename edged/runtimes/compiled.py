"""Models as a runtime has optimised them, kept for the next start in a private part of the cache directory.

What is kept is as good as code: a runtime does not check it as it checks a model. So an entry is used only
if it lies in a directory of our own that nobody else can enter, is a plain file of ours, and has the hash
that was written beside it when it was made; what is hashed is what is loaded, by one descriptor. Its name
is a hash of all that can change it. Entries are published by a rename and never written again, so a mapped
one stays as it is. The directory is bounded: what was used longest ago goes. Runs on Python 3.10 too.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import stat
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

__all__ = ["BYTES_MAX", "Kept", "cache_folder", "cpu_identity", "key_of", "prune"]

BYTES_MAX = 2 << 30
"""Of all entries of one directory: some twenty networks of 100 MB."""

FREE_MIN_BYTES = 512 << 20
"""Of the disk: below it nothing is kept. The store's own bound is lower, and not to be met for a cache."""

TEMPORARY_MAX_S = 3600.0
"""The age of what a process that ended in the middle left behind; no load takes so long."""

_CHUNK_BYTES = 1 << 20
_NOTE_BYTES_MAX = 8 << 20
"""Room for a model's metadata at its bound, a mebibyte, of which JSON may make six."""


def key_of(parts: Mapping[str, Any]) -> str:
    """The name of an entry, of everything that it depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def cpu_identity() -> str:
    """What a runtime's choice of kernels and layouts may depend on."""
    found = [platform.machine()]
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("model name", "flags", "Features", "CPU implementer", "CPU part"):
                found.append(value.strip())
            elif not line and len(found) > 1:
                break  # the first processor is told
    return "|".join(found)


def cache_folder(parent: Path, name: str) -> Path | None:
    """A runtime's part of the cache directory, made if it is not there; None when it is not ours alone."""
    folder = parent / name
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder if _is_private(os.lstat(folder), stat.S_ISDIR) else None
    except OSError:
        return None


class Kept:
    """One runtime's part of the cache directory."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @contextlib.contextmanager
    def find(self, key: str) -> Iterator[tuple[str, Any] | None]:
        """An entry as (path to load, its note), for the length of the `with`; None when none is good."""
        try:
            fd = os.open(self._folder / key, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            yield None
            return
        try:
            note = self._check(key, fd)
            yield None if note is None else (f"/proc/self/fd/{fd}", note["note"])
        finally:
            os.close(fd)

    def _check(self, key: str, fd: int) -> dict[str, Any] | None:
        try:
            if not _is_private(os.lstat(self._folder), stat.S_ISDIR):
                return None
            found = os.fstat(fd)
            if not _is_private(found, stat.S_ISREG) or found.st_nlink != 1:
                return None
            with (self._folder / f"{key}.json").open("rb") as file:
                note = json.loads(file.read(_NOTE_BYTES_MAX))
            if note["bytes"] != found.st_size or note["sha256"] != _sha256(fd):
                return None
            os.utime(fd)  # used now
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return dict(note)

    def begin(self, key: str, size_bytes: int) -> Path | None:
        """Where to write an entry of about this size; None when there is no place for it."""
        try:
            if size_bytes > BYTES_MAX or cache_folder(self._folder.parent, self._folder.name) is None:
                return None
            disk = os.statvfs(self._folder)
            if disk.f_bavail * disk.f_frsize < FREE_MIN_BYTES + size_bytes:
                return None
            prune(self._folder, bytes_max=BYTES_MAX - size_bytes)
        except OSError:
            return None
        return self._folder / f".{key}.{os.getpid()}"

    def publish(self, temporary: Path, key: str, note: Any) -> None:
        """Makes an entry of what was written there, with a note that `find` gives back."""
        with contextlib.suppress(OSError):
            fd = os.open(temporary, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                os.fchmod(fd, 0o600)
                text = json.dumps({"sha256": _sha256(fd), "bytes": os.fstat(fd).st_size, "note": note})
            finally:
                os.close(fd)
            if len(text) > _NOTE_BYTES_MAX:  # it would be no entry when it is read
                temporary.unlink()
                return
            beside = temporary.with_name(f"{temporary.name}.json")
            beside.touch(mode=0o600)
            beside.write_text(text)
            os.replace(beside, self._folder / f"{key}.json")
            os.replace(temporary, self._folder / key)

    @staticmethod
    def discard(temporary: Path) -> None:
        """Nothing will come of it."""
        with contextlib.suppress(OSError):
            temporary.unlink()


def prune(folder: Path, *, bytes_max: int) -> None:
    """Deletes what was used longest ago until no more than that is left, and what was never finished."""
    entries = []
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            found = path.lstat()
            if path.name.startswith(".") and time.time() - found.st_mtime > TEMPORARY_MAX_S:
                path.unlink()
            elif not path.name.startswith(".") and path.suffix != ".json" and stat.S_ISREG(found.st_mode):
                entries.append((found.st_mtime, found.st_size, path))
    total = sum(size for _, size, _ in entries)
    for _, size, path in sorted(entries):
        if total <= bytes_max:
            return
        for each in (path, path.with_name(f"{path.name}.json")):
            with contextlib.suppress(OSError):
                each.unlink()
        total -= size


def _is_private(found: os.stat_result, kind: Any) -> bool:
    """Whether it is of this kind, ours, and nobody else may write to it, or enter it."""
    others = 0o077 if kind is stat.S_ISDIR else 0o022
    return bool(kind(found.st_mode)) and found.st_uid == os.geteuid() and not found.st_mode & others


def _sha256(fd: int) -> str:
    digest = hashlib.sha256()
    at = 0
    while chunk := os.pread(fd, _CHUNK_BYTES, at):
        digest.update(chunk)
        at += len(chunk)
    return digest.hexdigest()
