"""Private, content-addressed copies of models, and the books about them.

A model is never loaded from the folder that people write to. `Store.stage` copies it into a temporary
directory, hashes what arrived, makes it durable and publishes it by one rename, so that a content
directory is complete or not there at all, whatever moment the power fails. Its name is the SHA-256 of
what it holds. The books (which content was last good, which numbers were given, which attempts to load
were begun, what was chosen by measuring, what the probes found) are JSON, each replaced whole.

That a copy was whole once says nothing about today, for cards rot. `copies` finds out whether it still is.
One that is not is set aside (`set_aside`): it stays for an operator to look at, and goes first to make room.

Runs on one helper thread, since it waits for disks; nothing here is called by two threads at once.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edged.config import ConfigError, ModelSettings
from edged.copies import (
    FILES,
    MANIFEST,
    Manifest,
    bundle_digest,
    content_bytes,
    hash_file,
    looks_whole,
    read_manifest,
)
from edged.repository import (
    CHECKSUMS_NAME,
    GOLDEN_NAME,
    Entry,
    FileStamp,
    UnsafeFileError,
    open_regular,
)
from edged.sizes import is_record

__all__ = ["LastGood", "Staged", "Store", "StoreError", "content_digest", "is_being_written"]

_FICLONE = 0x40049409
"""ioctl_ficlone(2); fcntl has no name for it before Python 3.12."""
_COPY_BYTES = 8 << 20
_CHECKSUMS_BYTES_MAX = 1 << 20
_INTERRUPTIONS_MAX = 2
"""A content during whose load the daemon died this often is quarantined: once may have been the power."""
_INTERRUPTIONS_GOOD_MAX = 8
"""The same for a content that has served: a supply that flaps at boot is likelier than a change of heart."""
_DAMAGED_MAX = 4
"""Copies that are set aside: enough to see whether one bit or a whole card is bad. The oldest goes."""
_HISTORY_MAX = 64
"""Contents of one model whose version numbers are remembered, long after their copies were evicted."""
_KEYS_MAX = 8192
_CHOICES_MAX = 512
_SIZES_MAX = 256
"""Contents whose requests' sizes are kept: at most 64 KB each, mostly 200 bytes."""
_ATTEMPTS_MAX = 1024
_VERDICTS_MAX = 64
_COARSE_S = 2.0
"""Where files have whole seconds (FAT: every other), a change this soon after the last does not show."""
_CHECKSUM_RE = re.compile(r"([0-9a-fA-F]{64}) [ *](?:\./)?(.+)")
_NETWORK_FILE_SYSTEMS = ("nfs", "cifs", "smb", "fuse", "9p", "ceph", "afs", "lustre", "gfs", "ocfs")


class StoreError(Exception):
    """Staging failed, nothing was left behind; `reason` is for programs, `message` for people."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(f"{message} [{reason}]")
        self.reason = reason
        self.message = message


@dataclass(frozen=True)
class Staged:
    """A complete private copy.

    `digest` is the file's own SHA-256 for a model of a single file, else the SHA-256 over the list of
    its files. `version` is what the folder says, else the number given to this content. `known_good`
    says that this content has served under this name before, `interrupted` how often in a row the daemon
    ended while it was loaded.
    """

    digest: str
    path: Path
    model_path: Path
    golden_dir: Path | None
    size_bytes: int
    version: int
    known_good: bool
    interrupted: int = 0


@dataclass(frozen=True)
class LastGood:
    """What served last under a name; `explicit_version` is the folder's number where it gave one."""

    name: str
    version: int
    explicit_version: int | None
    digest: str
    format: str
    settings: ModelSettings
    staged: Staged


# ---- is somebody writing? -------------------------------------------------------------------------------


def is_being_written(descriptor: int) -> bool:
    """Whether some process has the file open for writing, as far as the kernel can tell.

    A read lease (fcntl(2), F_SETLEASE) is refused with EAGAIN while there is a writer. It is given back at
    once: holding it would make writers wait. Where leases do not exist, are not ours to take (another
    user's file, without CAP_LEASE) or are refused always (network file systems), the answer is False, and
    only the settle time and the comparison after copying protect.
    """
    try:
        # A lease that is broken while held raises SIGIO, which would end the process; SIGURG is ignored.
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError as error:
        return error.errno == errno.EAGAIN and not _is_on_network(descriptor)
    fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return False


def _is_on_network(descriptor: int) -> bool:
    try:
        info = Path(f"/proc/self/fdinfo/{descriptor}").read_text()
        mount_id = info.split("mnt_id:", 1)[1].split(None, 1)[0]
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            if line.split(" ", 1)[0] == mount_id:
                return line.rsplit(" - ", 1)[1].startswith(_NETWORK_FILE_SYSTEMS)
    except (OSError, IndexError, UnicodeDecodeError):
        return False
    return False


# ---- durable files --------------------------------------------------------------------------------------


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_durably(path: Path, data: bytes, mode: int) -> None:
    """Replaces a file whole. After a failed fsync the new file is dropped, never synced again."""
    temporary = path.with_name(f".{path.name}.new")
    try:
        with open(
            temporary, "wb", opener=lambda name, flags: os.open(name, flags | os.O_CLOEXEC, mode)
        ) as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


class _Book:
    """One JSON object on disk, replaced whole at each change; a damaged one is set aside."""

    def __init__(self, path: Path, check: Callable[[Any], None]) -> None:
        self.path = path
        self.notice: str | None = None
        self.data: dict[str, Any] = {}
        try:
            data = json.loads(path.read_bytes())
            if not isinstance(data, dict):
                raise ValueError("not an object")
        except FileNotFoundError:
            return
        except (OSError, ValueError, RecursionError) as error:
            aside = path.with_suffix(".damaged")
            with contextlib.suppress(OSError):
                os.replace(path, aside)
            self.notice = f"{path} is damaged ({str(error)[:120]}): set aside as {aside.name}, begun anew"
            return
        strange = ""
        for key, value in data.items():
            try:
                check(value)
                self.data[key] = value
            except (ValueError, TypeError, KeyError, AttributeError, ConfigError) as error:
                strange = f"{key}: {error!s:.120}"
        if strange:
            # Another version of edged may have written it: the other records are none the worse for it.
            aside = path.with_suffix(".damaged")
            with contextlib.suppress(OSError):
                shutil.copyfile(path, aside)
            left_out = len(data) - len(self.data)
            self.notice = f"{path}: {left_out} records cannot be read ({strange}): kept in {aside.name} only"

    def save(self) -> None:
        try:
            _write_durably(self.path, json.dumps(self.data, separators=(",", ":")).encode(), 0o600)
        except OSError as error:
            raise _store_failure(error, self.path.parent, 0) from error


def _check_model_record(value: Any) -> None:
    """Raises when a record of the models' book is not of the shape that this module writes."""
    _check_number(value["next"])
    for content in value["contents"]:
        _check_digest(content["digest"])
        _check_number(content["version"])
        if "served" in content:
            _check_served(content["served"])
        if not isinstance(content["good"], bool) or not isinstance(content["kept"], bool):
            raise ValueError("a flag is no boolean")
    seen = value.get("seen")
    if seen is not None:
        _check_digest(seen["stamps"])
        _check_digest(seen["digest"])
    last = value["last_good"]
    if last is not None:
        _check_digest(last["digest"])
        _check_number(last["version"])
        _check_served(last)


def _check_served(value: Any) -> None:
    """Raises when what is remembered of how a content served is not of the shape that is written here."""
    if not isinstance(value["format"], str):
        raise ValueError("a format is no text")
    ModelSettings.from_wire(value["settings"])


def _is_as_written(served: Mapping[str, Any]) -> bool:
    """Whether a record of how a content served is the one that was written; an older edged wrote no sum."""
    return bool(served.get("sum", _sum_of(served)) == _sum_of(served))


def _sum_of(served: Mapping[str, Any]) -> str:
    """What shows a bit that changed in a record of settings, golden samples and tolerances among them."""
    plain = {key: served[key] for key in ("digest", "version", "format", "settings") if key in served}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _check_number(value: object) -> None:
    """Raises ValueError unless the value is a number above zero."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{value!r} is no number from 1")


def _check_digest(value: object) -> None:
    if not isinstance(value, str) or re.fullmatch(r"[0-9a-f]{64}", value) is None:
        raise ValueError("a digest is none")


def _check_choice(value: Any) -> None:
    if not isinstance(value, dict):
        raise ValueError("a choice is no object")


def _check_sizes(value: Any) -> None:
    if not isinstance(value, list) or not value or not all(is_record(record) for record in value):
        raise ValueError("sizes are none")


def _check_verdict(value: Any) -> None:
    if not isinstance(value["mark"], str) or not value["mark"]:
        raise ValueError("a mark is no text")
    if not all(isinstance(text, str) for text in value["verdict"].values()):
        raise ValueError("a verdict is none")


def _store_failure(error: OSError, where: Path, needed_bytes: int, keep_free_bytes: int = 0) -> StoreError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _disk_full(where, needed_bytes, keep_free_bytes)
    return StoreError("STORE_FAILED", f"copying into the store at {where} failed: {error.strerror}")


def _disk_full(where: Path, needed_bytes: int, keep_free_bytes: int) -> StoreError:
    return StoreError(
        "DISK_FULL",
        f"{needed_bytes} bytes are needed, {_free_bytes(where)} are free on the disk of {where}, of which "
        f"{keep_free_bytes} are to stay free: make room, or lower [resources] disk_free_min",
    )


def _free_bytes(where: Path) -> int:
    status = os.statvfs(where)
    return status.f_bavail * status.f_frsize


# ---- the store ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """One file of the folder, as the snapshot saw it, and where it goes."""

    root: str
    stamp: FileStamp
    target: str


def content_digest(root: Path, entry: Entry) -> str:
    """What `Store.stage` would call the entry's content, without a copy: the `sha256` that the daemon tells.

    Raises StoreError as staging would for what is wrong with the files themselves: CHANGED_WHILE_COPYING,
    BEING_WRITTEN, CHECKSUM_MISMATCH, UNREADABLE, UNSAFE_FILE.
    """
    sources, payload = _sources(root, entry)
    sums = _sums(payload)
    _check_sources(sources)
    _verify_checksums(entry, sources, sums)
    return bundle_digest(_listing(payload, sums))


class Store:
    """The private copies below `state_dir/store` and the books beside them. A context manager.

    Raises StoreError("STATE_DIR_BUSY") while another daemon owns the directory. `notices` says what was
    found damaged at the start.
    """

    def __init__(
        self, state_dir: Path, *, keep_versions: int, max_bytes: int | None, disk_free_min_bytes: int
    ) -> None:
        self._root = state_dir / "store"
        self._contents = self._root / "contents"
        self._temporary = self._root / "temporary"
        self._damaged = self._root / "damaged"
        self._keep_versions = keep_versions
        self._max_bytes = max_bytes
        self._disk_free_min_bytes = disk_free_min_bytes
        self._in_use: set[str] = set()
        self._distrusted: set[str] = set()
        """Copies that are damaged and could not be set aside: the disk may have gone read-only."""
        self.replaced: list[str] = []
        """Contents whose copy staging found incomplete and set aside; the one who stages tells of them."""
        self._open_attempts: dict[str, int] = {}
        self._attempts_behind = False
        try:
            own = (self._root, self._contents, self._temporary, self._damaged)
            for directory in (state_dir, *own):
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            for directory in own:
                directory.chmod(0o700)
            self._lock = _lock_directory(state_dir)
        except OSError as error:
            message = f"the state directory {state_dir} cannot be used: {error.strerror}"
            raise StoreError("STATE_DIR_UNUSABLE", message) from error
        self._clean_temporary()
        self._models = _Book(self._root / "models.json", _check_model_record)
        self._attempts = _Book(self._root / "attempts.json", _check_number)
        self._choices = _Book(self._root / "choices.json", _check_choice)
        self._verdicts = _Book(self._root / "verdicts.json", _check_verdict)
        self._sizes = _Book(self._root / "sizes.json", _check_sizes)
        self._interrupted: dict[str, int] = dict(self._attempts.data)
        books = (self._models, self._attempts, self._choices, self._verdicts, self._sizes)
        self.notices: tuple[str, ...] = tuple(book.notice for book in books if book.notice is not None)

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends this life's attempts, for a stop is no crash, and gives the directory back."""
        if self._lock < 0:
            return
        try:
            for digest in list(self._open_attempts):
                self._open_attempts[digest] = 1
                self.end_attempt(digest)
            self.rest()
        finally:
            os.close(self._lock)
            self._lock = -1

    def _clean_temporary(self) -> None:
        for left in self._temporary.iterdir():
            shutil.rmtree(left, ignore_errors=True)

    # ---- staging

    def stage(self, root: Path, entry: Entry) -> Staged:
        """A private copy of all files of the entry, of exactly the bytes that the snapshot saw.

        The same content is not copied twice. Raises StoreError: CHANGED_WHILE_COPYING and BEING_WRITTEN
        (look again later), CHECKSUM_MISMATCH, UNREADABLE, UNSAFE_FILE, FILE_DAMAGED, TOO_LARGE, DISK_FULL
        (with needed and free bytes), STORE_FAILED. Whatever fails, nothing is left behind.
        """
        sources, payload = _sources(root, entry)
        size_bytes = sum(source.stamp.size_bytes for source in payload)
        if self._max_bytes is not None and size_bytes > self._max_bytes:
            raise StoreError(
                "TOO_LARGE",
                f"{entry.model_file} needs {size_bytes} bytes, [store] max_bytes is {self._max_bytes}",
            )
        _check_sources(sources)
        digest = self._seen(entry, payload) or self._find_content(entry, payload)
        if digest is not None:
            _check_sources(sources)
            _verify_checksums(
                entry, sources, {path: sum_ for path, (_, sum_) in self._manifest(digest).items()}
            )
        else:
            self._make_room(size_bytes)
            digest = self._copy(entry, sources, payload, size_bytes)
        self._in_use.add(digest)
        return self._register(entry, payload, digest)

    def _seen(self, entry: Entry, payload: list[_Source]) -> str | None:
        """The digest of a copy of these very files, hashed in an earlier life."""
        digest = self._known_as(entry, payload)
        if digest is None:
            return None
        shape = {path: size for path, (size, _) in self._manifest(digest).items()}
        return digest if shape == _shape(payload) and self._is_intact(digest) else None

    def _known_as(self, entry: Entry, payload: list[_Source]) -> str | None:
        """What these very files (device, inode, size and both times) held when they were hashed last."""
        record = self._models.data.get(_book_key(entry.name, entry.version))
        seen = None if record is None else record.get("seen")
        if seen is None or seen["stamps"] != _stamps(payload):
            return None
        digest: str = seen["digest"]
        return digest

    def _check_unrotten(self, entry: Entry, payload: list[_Source], digest: str) -> None:
        """Raises when the folder's files have other bytes than before though nobody has written to them."""
        known = self._known_as(entry, payload)
        if known is not None and known != digest:
            raise StoreError(
                "FILE_DAMAGED",
                f"{entry.model_file} has other bytes ({digest[:12]}…) than when it was taken "
                f"({known[:12]}…), but its times say that nobody has written to it: its disk is failing. "
                f"Copy it there again, and look at the disk (dmesg)",
            )

    def _find_content(self, entry: Entry, payload: list[_Source]) -> str | None:
        """The digest of a content that is there already; the sources are only read when one may match."""
        shape = _shape(payload)
        candidates = {
            digest
            for digest in self._digests()
            if shape == {path: size for path, (size, _) in self._manifest(digest).items()}
        }
        if not candidates:
            return None
        digest = bundle_digest(_listing(payload, _sums(payload)))
        if digest not in candidates or not self._is_intact(digest):
            return None
        self._check_unrotten(entry, payload, digest)
        return digest

    def _copy(self, entry: Entry, sources: list[_Source], payload: list[_Source], size_bytes: int) -> str:
        try:
            temporary = Path(tempfile.mkdtemp(dir=self._temporary))
        except OSError as error:
            raise self._failure(error, size_bytes) from error
        try:
            manifest: dict[str, tuple[int, str]] = {}
            for source in payload:
                target = temporary / FILES / source.target
                target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                manifest[source.target] = (source.stamp.size_bytes, _copy_file(source, target))
            _check_sources(sources)
            sums = {path: sum_ for path, (_, sum_) in manifest.items()}
            _verify_checksums(entry, sources, sums)
            digest = bundle_digest(manifest)
            self._check_unrotten(entry, payload, digest)
            _write_durably(temporary / MANIFEST, json.dumps(manifest).encode(), 0o440)
            for directory, _names, _files in os.walk(temporary, topdown=False):
                _sync_directory(Path(directory))
            self._publish(temporary, digest)
        except OSError as error:
            raise self._failure(error, size_bytes) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return digest

    def _publish(self, temporary: Path, digest: str) -> None:
        target = self._contents / digest
        if target.exists():
            if self._is_intact(digest):
                return
            self.set_aside(digest)
            self.replaced.append(digest)
        os.rename(temporary, target)
        self._distrusted.discard(digest)
        _sync_directory(self._contents)

    def _failure(self, error: OSError, needed_bytes: int) -> StoreError:
        return _store_failure(error, self._root, needed_bytes, self._disk_free_min_bytes)

    # ---- contents

    def _digests(self) -> Iterator[str]:
        for path in self._contents.iterdir():
            if re.fullmatch(r"[0-9a-f]{64}", path.name):
                yield path.name

    def copy_path(self, digest: str) -> Path:
        """Where a content's copy lies, or would lie."""
        return self._contents / digest

    def _manifest(self, digest: str) -> dict[str, tuple[int, str]]:
        return read_manifest(self._contents / digest)

    def _is_intact(self, digest: str) -> bool:
        return digest not in self._distrusted and looks_whole(self._contents / digest)

    def set_aside(self, digest: str) -> Path | None:
        """Takes a damaged copy out of use, in one step; where it is now, None when there was none.

        It is kept for whoever looks into it, until as many others have followed or the room is needed.
        Raises StoreError when the disk does not take the change.
        """
        if not (self._contents / digest).exists():
            return None
        grave = self._damaged / digest
        self._distrusted.add(digest)
        try:
            if grave.exists():
                self._delete(grave)
            os.rename(self._contents / digest, grave)
            os.utime(grave)
            _sync_directory(self._damaged)
            _sync_directory(self._contents)
        except OSError as error:
            message = f"the damaged copy {digest} cannot be moved to {self._damaged}: {error.strerror}"
            raise StoreError("STORE_FAILED", message) from error
        self._distrusted.discard(digest)
        for oldest in self._set_aside()[:-_DAMAGED_MAX]:
            self._delete(oldest)
        return grave

    def _set_aside(self) -> list[Path]:
        """The damaged copies that are kept, the oldest first."""
        return sorted(self._damaged.iterdir(), key=lambda path: (os.lstat(path).st_mtime_ns, path.name))

    def _remove_content(self, digest: str) -> None:
        self._delete(self._contents / digest)

    def _delete(self, copy: Path) -> None:
        """Moves a copy out of sight in one step, then deletes it at leisure."""
        try:
            grave = Path(tempfile.mkdtemp(dir=self._temporary))
            os.rename(copy, grave / copy.name)
        except OSError:
            # A full disk may refuse even a directory; deleting in place is completed by the next collect.
            shutil.rmtree(copy, ignore_errors=True)
            return
        shutil.rmtree(grave, ignore_errors=True)

    def _content_bytes(self, digest: str) -> int:
        return content_bytes(self._manifest(digest))

    def _make_room(self, needed_bytes: int) -> None:
        """Deletes damaged copies, then old contents, until the new one fits.

        What serves, what was last good and what is fallen back on stays.
        """
        removable = self._set_aside() + [self._contents / digest for digest in self._evictable(set())]
        while (shortage := self._shortage(needed_bytes)) is not None:
            if not removable:
                raise shortage
            self._delete(removable.pop(0))

    def _shortage(self, needed_bytes: int) -> StoreError | None:
        """What keeps a content of this size from fitting now; None when it fits."""
        if self._max_bytes is not None:
            left_bytes = self._max_bytes - sum(self._content_bytes(digest) for digest in self._digests())
            if needed_bytes > left_bytes:
                return StoreError(
                    "STORE_FULL",
                    f"{needed_bytes} bytes are needed, {max(0, left_bytes)} are free of [store] max_bytes = "
                    f"{self._max_bytes}, and all that is stored serves or was last good: raise it",
                )
        if _free_bytes(self._root) - needed_bytes < self._disk_free_min_bytes:
            return _disk_full(self._root, needed_bytes, self._disk_free_min_bytes)
        return None

    def _evictable(self, kept: set[str]) -> list[str]:
        """Contents that may go, the longest unused first."""
        protected = self._in_use | kept
        protected |= {
            record["last_good"]["digest"]
            for record in self._models.data.values()
            if record["last_good"] is not None
        }
        free = [digest for digest in self._digests() if digest not in protected]
        return sorted(free, key=lambda digest: (os.stat(self._contents / digest).st_mtime_ns, digest))

    def collect(self, in_use: set[str]) -> None:
        """Evicts what is neither in use (serving or loading), nor last good, nor among the versions kept."""
        self._in_use = set(in_use)
        kept: set[str] = set()
        for record in self._models.data.values():
            recent = [content["digest"] for content in record["contents"] if content["kept"]]
            kept.update(recent[-self._keep_versions :])
        for digest in self._evictable(kept):
            self._remove_content(digest)
        if self._max_bytes is not None:
            spare = self._evictable(set())
            used_bytes = sum(self._content_bytes(digest) for digest in self._digests())
            while spare and used_bytes > self._max_bytes:
                used_bytes -= self._content_bytes(spare[0])
                self._remove_content(spare.pop(0))

    # ---- the models' book

    def _register(self, entry: Entry, payload: list[_Source], digest: str) -> Staged:
        """Gives the content its version number and remembers that it was seen under this name."""
        key = _book_key(entry.name, entry.version)
        record = self._models.data.pop(key, None) or {"next": 1, "contents": [], "last_good": None}
        before = json.dumps(record)
        if _is_telling(payload):
            record["seen"] = {"stamps": _stamps(payload), "digest": digest}
        else:
            record.pop("seen", None)
        contents = record["contents"]
        known = next((content for content in contents if content["digest"] == digest), None)
        if known is None:
            number = entry.version if entry.version is not None else record["next"]
            record["next"] = max(record["next"], number) + 1 if entry.version is None else record["next"]
            known = {"digest": digest, "version": number, "good": False, "kept": True}
        else:
            contents.remove(known)
            known["kept"] = True
        contents.append(known)
        del contents[:-_HISTORY_MAX]
        self._models.data[key] = record  # at the end: the book is in order of use
        self._drop_oldest_records()
        if json.dumps(record) != before:  # its place alone is not worth a wait for the disk
            self._models.save()
        return self._staged(digest, known["version"], known["good"])

    def _drop_oldest_records(self) -> None:
        spare = [key for key, record in self._models.data.items() if record["last_good"] is None]
        for key in spare[: max(0, len(self._models.data) - _KEYS_MAX)]:
            del self._models.data[key]

    def _staged(self, digest: str, version: int, known_good: bool) -> Staged:
        path = self._contents / digest / FILES
        manifest = self._manifest(digest)
        model = "model.onnx" if "model.onnx" in manifest else "model.xml"
        has_golden = any(name.startswith(f"{GOLDEN_NAME}/") for name in manifest)
        return Staged(
            digest=digest,
            path=path,
            model_path=path / model,
            golden_dir=path / GOLDEN_NAME if has_golden else None,
            size_bytes=content_bytes(manifest),
            version=version,
            known_good=known_good,
            interrupted=self._interrupted.get(digest, 0),
        )

    def mark_good(
        self,
        name: str,
        version: int | None,
        digest: str,
        *,
        entry_format: str,
        settings_wire: Mapping[str, Any],
    ) -> None:
        """The content serves: it is what a restart falls back to. `version` is the entry's own, or None."""
        record = self._models.data[_book_key(name, version)]
        served: dict[str, Any] = {"format": entry_format, "settings": dict(settings_wire)}
        for content in record["contents"]:
            if content["digest"] == digest:
                content["good"] = True
                content["served"] = {**served, "sum": _sum_of(served)}
                last = {"digest": digest, "version": content["version"], **served}
                last["sum"] = _sum_of(last)
                if record["last_good"] != last:
                    record["last_good"] = last
                    for old in record["contents"][: -self._keep_versions]:
                        old.pop("served", None)  # its copy goes, too
                    self._models.save()
                return
        raise KeyError(digest)

    def forget_model(self, name: str, version: int | None) -> None:
        """The entry was deleted: nothing of it is kept but the numbers that were given."""
        record = self._models.data.get(_book_key(name, version))
        if record is None:
            return
        record["last_good"] = None
        for content in record["contents"]:
            content["kept"] = False
        self._models.save()

    def set_limits(self, *, keep_versions: int, max_bytes: int | None, disk_free_min_bytes: int) -> None:
        """Takes other bounds; they count from the next copy on."""
        self._keep_versions = keep_versions
        self._max_bytes = max_bytes
        self._disk_free_min_bytes = disk_free_min_bytes

    def last_good(self) -> list[LastGood]:
        """What served when the daemon last ran, or where that copy is not there the good one before it."""
        found = []
        for key, record in self._models.data.items():
            last = record["last_good"]
            if last is None:
                continue
            if _is_as_written(last) and self._is_intact(last["digest"]):
                found.append(self._as_served(key, last["digest"], last["version"], last))
                continue
            before = self._good_before(key, record)
            found += [] if before is None else [before]
            instead = "nothing" if before is None else f"version {before.version}"
            self.notices += (
                f"the last good copy of {key} (version {last['version']}) or the record of its settings is "
                f"missing or damaged: unless the models folder has it, {instead} can serve in its place",
            )
        return found

    def without(self, digest: str) -> list[LastGood]:
        """What each model that had this content served before it, where the store still has that."""
        found = [
            self._good_before(key, record)
            for key, record in self._models.data.items()
            if any(content["digest"] == digest for content in record["contents"])
        ]
        return [each for each in found if each is not None]

    def _good_before(self, key: str, record: Mapping[str, Any]) -> LastGood | None:
        """The newest content that served under this name and whose copy is there."""
        for content in reversed(record["contents"]):
            if content["good"] and content["kept"] and self._is_intact(content["digest"]):
                # What was marked by an edged before this has no settings of its own.
                served = content.get("served") or record["last_good"]
                if served is not None and _is_as_written(served):
                    return self._as_served(key, content["digest"], content["version"], served)
        return None

    def _as_served(self, key: str, digest: str, version: int, served: Mapping[str, Any]) -> LastGood:
        name, _, explicit = key.partition("/")
        self._in_use.add(digest)
        return LastGood(
            name=name,
            version=version,
            explicit_version=int(explicit) if explicit else None,
            digest=digest,
            format=served["format"],
            settings=ModelSettings.from_wire(served["settings"]),
            staged=self._staged(digest, version, known_good=True),
        )

    # ---- attempts and choices

    def begin_attempt(self, digest: str) -> int:
        """Notes durably that this content is about to be loaded; how many earlier attempts never ended."""
        if digest not in self._open_attempts:
            self._attempts.data[digest] = self._interrupted.get(digest, 0) + 1
            for oldest in list(self._attempts.data)[:-_ATTEMPTS_MAX]:
                del self._attempts.data[oldest]
            self._save_attempts()
        self._open_attempts[digest] = self._open_attempts.get(digest, 0) + 1
        return self._interrupted.get(digest, 0)

    def end_attempt(self, digest: str) -> None:
        """The load came to an end, good or bad, and the daemon lives: the count starts again.

        That of a content which has served may wait for the next attempt or for `rest` to be written: should
        the power fail before, one interruption of the eight that it is given is counted, and a start with
        many models waits half as often for the disk.
        """
        open_count = self._open_attempts.get(digest, 0)
        if open_count > 1:
            self._open_attempts[digest] = open_count - 1
            return
        self._open_attempts.pop(digest, None)
        self._interrupted.pop(digest, None)
        if self._attempts.data.pop(digest, None) is not None:
            self._attempts_behind = True
        if not self._has_served(digest):
            self.rest()

    def rest(self) -> None:
        """Writes what was left for a quiet moment."""
        if self._attempts_behind:
            self._save_attempts()

    def _save_attempts(self) -> None:
        self._attempts.save()
        self._attempts_behind = False

    def _has_served(self, digest: str) -> bool:
        return any(
            each["digest"] == digest and each["good"]
            for record in self._models.data.values()
            for each in record["contents"]
        )

    def quarantined(self, digest: str) -> bool:
        """Whether the daemon died in this content's load too often in a row: it may be what kills it."""
        most = _INTERRUPTIONS_GOOD_MAX if self._has_served(digest) else _INTERRUPTIONS_MAX
        return self._interrupted.get(digest, 0) >= most

    def clear_quarantine(self, digest: str) -> None:
        """Forgets the interrupted attempts of a content."""
        self._interrupted.pop(digest, None)
        if self._attempts.data.pop(digest, None) is not None:
            self._save_attempts()

    def remember_choice(self, key: str, choice: dict[str, Any]) -> None:
        """Keeps what was found by measuring; the longest unused goes when there are too many."""
        self._choices.data.pop(key, None)
        self._choices.data[key] = choice
        for oldest in list(self._choices.data)[:-_CHOICES_MAX]:
            del self._choices.data[oldest]
        self._choices.save()

    def remember_sizes(self, digest: str, sizes: list[dict[str, Any]]) -> None:
        """Keeps which sizes a content's requests had; the longest unused goes when there are too many."""
        self._sizes.data.pop(digest, None)
        self._sizes.data[digest] = sizes
        for oldest in list(self._sizes.data)[:-_SIZES_MAX]:
            del self._sizes.data[oldest]
        self._sizes.save()

    def recall_sizes(self, digest: str) -> list[dict[str, Any]] | None:
        """What `remember_sizes` kept of this content."""
        sizes = self._sizes.data.pop(digest, None)
        if sizes is None:
            return None
        self._sizes.data[digest] = sizes
        return list(sizes)

    def remember_verdict(self, device: str, mark: str, verdict: dict[str, str]) -> None:
        """Keeps what a probe found out, for as long as `mark` says that nothing has changed since."""
        record = {"mark": mark, "verdict": verdict}
        if self._verdicts.data.get(device) != record:
            self._verdicts.data[device] = record
            for oldest in list(self._verdicts.data)[:-_VERDICTS_MAX]:
                del self._verdicts.data[oldest]
            self._verdicts.save()

    def forget_verdict(self, device: str) -> None:
        """Nothing is known of a device any more."""
        if self._verdicts.data.pop(device, None) is not None:
            self._verdicts.save()

    def recall_verdict(self, device: str, mark: str) -> dict[str, str] | None:
        """What `remember_verdict` kept, if it was under this mark."""
        record = self._verdicts.data.get(device)
        return dict(record["verdict"]) if record is not None and record["mark"] == mark else None

    def recall_choice(self, key: str) -> dict[str, Any] | None:
        """What `remember_choice` kept under this key."""
        choice = self._choices.data.pop(key, None)
        if not isinstance(choice, dict):
            return None
        self._choices.data[key] = choice
        return choice


# ---- leaves ---------------------------------------------------------------------------------------------


def _lock_directory(state_dir: Path) -> int:
    descriptor = os.open(state_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
        os.close(descriptor)
        message = f"the state directory {state_dir} belongs to another edged that runs (process {owner})"
        raise StoreError("STATE_DIR_BUSY", message) from None
    with contextlib.suppress(OSError):  # A full disk has no room for the pid, which only messages show.
        os.ftruncate(descriptor, os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0))
    return descriptor


def _book_key(name: str, version: int | None) -> str:
    return name if version is None else f"{name}/{version}"


def _sources(root: Path, entry: Entry) -> tuple[list[_Source], list[_Source]]:
    """All files of the entry, and those that are its content: the list of checksums is none of it."""
    real_root = os.path.realpath(root)
    sources = [_Source(real_root, stamp, _target(entry, stamp)) for stamp in entry.files]
    return sources, [source for source in sources if source.target != CHECKSUMS_NAME]


def _shape(payload: list[_Source]) -> dict[str, int]:
    return {source.target: source.stamp.size_bytes for source in payload}


def _stamps(payload: list[_Source]) -> str:
    """What tells these files from any others, and from themselves after a change, in one figure."""
    rows = [
        (s.target, s.stamp.device, s.stamp.inode, s.stamp.size_bytes, s.stamp.mtime_ns, s.stamp.ctime_ns)
        for s in sorted(payload, key=lambda source: source.target)
    ]
    return hashlib.sha256(json.dumps(rows).encode("utf-8", "surrogateescape")).hexdigest()


def _is_telling(payload: list[_Source]) -> bool:
    """Whether a change from now on is bound to show in the stamps: they are fine enough, or old enough."""
    coarse_ns = [s.stamp.ctime_ns for s in payload if s.stamp.ctime_ns % 1_000_000_000 == 0]
    return not coarse_ns or time.time() - max(coarse_ns) / 1e9 > _COARSE_S


def _sums(payload: list[_Source]) -> dict[str, str]:
    sums = {}
    for source in payload:
        with _opened(source) as descriptor:
            sums[source.target] = hash_file(descriptor)
    return sums


def _target(entry: Entry, stamp: FileStamp) -> str:
    """Where a file lies in the content. NAME.onnx becomes model.onnx, so that its name is no part of it."""
    if entry.base:
        return stamp.path.removeprefix(f"{entry.base}/")
    return f"model{os.path.splitext(stamp.path)[1]}"


def _is_same(status: os.stat_result, stamp: FileStamp) -> bool:
    seen = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return seen == (stamp.device, stamp.inode, stamp.size_bytes, stamp.mtime_ns, stamp.ctime_ns)


def _changed(path: str) -> StoreError:
    return StoreError("CHANGED_WHILE_COPYING", f"{path} changed while it was copied: it is looked at again")


@contextlib.contextmanager
def _opened(source: _Source) -> Iterator[int]:
    """A descriptor of the very file that the snapshot saw, untouched and without a writer, before and after.

    Files are opened one after the other: a bundle may have thousands.
    """
    path = source.stamp.path
    try:
        descriptor = open_regular(f"{source.root}/{path}", source.root)
    except UnsafeFileError as error:
        raise StoreError("UNSAFE_FILE", f"{path} {error}") from None
    except FileNotFoundError:
        raise _changed(path) from None
    except OSError as error:
        raise StoreError("UNREADABLE", f"{path} cannot be read: {error.strerror}") from None
    try:
        _check_source(source, descriptor)
        yield descriptor
        _check_source(source, descriptor)
    finally:
        os.close(descriptor)


def _check_source(source: _Source, descriptor: int) -> None:
    if not _is_same(os.fstat(descriptor), source.stamp):
        raise _changed(source.stamp.path)
    if is_being_written(descriptor):
        raise StoreError("BEING_WRITTEN", f"{source.stamp.path} is open for writing: it is looked at again")


def _check_sources(sources: list[_Source]) -> None:
    """Raises unless all paths together still lead to the files that the snapshot saw."""
    for source in sources:
        with _opened(source):
            pass


def _copy_file(source: _Source, target: Path) -> str:
    """Copies one file durably and returns the SHA-256 of what arrived."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    with _opened(source) as descriptor, open(os.open(target, flags, 0o440), "rb+", buffering=0) as stream:
        os.fchmod(stream.fileno(), 0o440)
        if _clone_or_copy(descriptor, stream.fileno(), source.stamp.size_bytes) != source.stamp.size_bytes:
            raise _changed(source.stamp.path)
        os.fsync(stream.fileno())
        return hash_file(stream.fileno())


def _clone_or_copy(source: int, target: int, size_bytes: int) -> int:
    """Shares the blocks where the file system can, else copies in the kernel, else by hand."""
    try:
        fcntl.ioctl(target, _FICLONE, source)
        return os.fstat(target).st_size
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
    copied_bytes = 0
    with contextlib.suppress(_CannotCopyInKernel):
        while copied_bytes < size_bytes:
            step = _copy_in_kernel(source, target, min(_COPY_BYTES, size_bytes - copied_bytes), copied_bytes)
            if step == 0:
                break
            copied_bytes += step
    while copied_bytes < size_bytes:
        piece = os.pread(source, min(_COPY_BYTES, size_bytes - copied_bytes), copied_bytes)
        if not piece:
            break
        copied_bytes += os.pwrite(target, piece, copied_bytes)
    return copied_bytes


class _CannotCopyInKernel(Exception):
    """copy_file_range does not serve this pair of files."""


def _copy_in_kernel(source: int, target: int, length: int, offset: int) -> int:
    try:
        return os.copy_file_range(source, target, length, offset, offset)
    except OSError as error:
        if error.errno in (
            errno.EXDEV,
            errno.EINVAL,
            errno.ENOSYS,
            errno.EOPNOTSUPP,
            errno.EPERM,
            errno.EBADF,
        ):
            raise _CannotCopyInKernel from error
        raise


def _listing(payload: list[_Source], sums: Mapping[str, str]) -> Manifest:
    return {source.target: (source.stamp.size_bytes, sums[source.target]) for source in payload}


def _verify_checksums(entry: Entry, sources: list[_Source], sums: Mapping[str, str]) -> None:
    """Holds the content against the bundle's SHA256SUMS, where there is one."""
    listed = next((source for source in sources if source.target == CHECKSUMS_NAME), None)
    if listed is None:
        return
    wanted = _read_checksums(listed)
    found = dict(sums)
    if "model.toml" in wanted:
        with contextlib.suppress(OSError, UnsafeFileError):
            descriptor = open_regular(f"{listed.root}/{entry.base}/model.toml", listed.root)
            with open(descriptor, "rb") as stream:
                found["model.toml"] = hashlib.file_digest(stream, "sha256").hexdigest()
    for path in sorted(wanted.keys() | found.keys()):
        where = f"{entry.base}/{path}"[:200]
        if path not in wanted:
            raise StoreError("CHECKSUM_MISMATCH", f"{where} is not named in its {CHECKSUMS_NAME}")
        if path not in found:
            raise StoreError(
                "CHECKSUM_MISMATCH",
                f"{CHECKSUMS_NAME} names {where}, which is not there: still being copied?",
            )
        if wanted[path] != found[path]:
            raise StoreError(
                "CHECKSUM_MISMATCH",
                f"{where} is not what its {CHECKSUMS_NAME} says: {found[path][:12]}…, wanted "
                f"{wanted[path][:12]}…; still being copied?",
            )


def _read_checksums(source: _Source) -> dict[str, str]:
    """The path and SHA-256 of each line that sha256sum has written."""
    if source.stamp.size_bytes > _CHECKSUMS_BYTES_MAX:
        raise StoreError(
            "CHECKSUM_MISMATCH", f"{source.stamp.path} is larger than {_CHECKSUMS_BYTES_MAX} bytes"
        )
    with _opened(source) as descriptor:
        raw = os.pread(descriptor, _CHECKSUMS_BYTES_MAX, 0)
    text = raw.decode("utf-8", "surrogateescape")
    wanted = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        match = _CHECKSUM_RE.fullmatch(line)
        if match is None:
            message = f"{source.stamp.path}, line {number}: not as sha256sum writes it"
            raise StoreError("CHECKSUM_MISMATCH", message)
        wanted[match[2]] = match[1].lower()
    return wanted
