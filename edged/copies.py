"""A private copy in the store, and whether its bytes still are those that its name says.

A copy is a directory `DIGEST/` with the files of a content below `files/` and beside them `manifest.json`,
which has each file's size and SHA-256. DIGEST is made of that list alone, so a manifest that has changed
shows by itself, and a file that has changed shows when it is read.

`check_copy` reads. It hashes through the page cache, by descriptor, so what it sees are the very pages that a
worker maps from the same files; what comes off the disk again later, when pages were given up for want of
memory, and memory that goes bad are not covered. Nothing here writes, and nothing has a state: it may be
called from any thread.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

__all__ = [
    "FILES",
    "MANIFEST",
    "DamagedCopyError",
    "Manifest",
    "bundle_digest",
    "check_copy",
    "content_bytes",
    "hash_file",
    "looks_whole",
    "read_manifest",
]

Manifest = Mapping[str, tuple[int, str]]
"""Size and SHA-256 of each file of a content, by its path."""

MANIFEST = "manifest.json"
FILES = "files"

_CHUNK_BYTES = 1 << 20
"""Read and hashed at once: large enough that the calls cost nothing, small enough to stay in the caches."""

_DAMAGE = frozenset(
    {
        *(errno.EIO, errno.EBADMSG, errno.EUCLEAN, errno.ENODATA),
        *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP),
    }
)
"""Errors that tell of the copy or the disk below it. Any other (too many open files, no memory) tells of this
process, and is no reason to give a copy up."""


class DamagedCopyError(Exception):
    """A copy is not what its name says; the text says which file, and how it shows."""


def bundle_digest(manifest: Manifest) -> str:
    """A content's name: the one file's own SHA-256, else the SHA-256 over names, sizes and sums."""
    if list(manifest) == ["model.onnx"]:
        return manifest["model.onnx"][1]
    listing = "".join(f"{path}\0{size}\0{sha256}\n" for path, (size, sha256) in sorted(manifest.items()))
    return hashlib.sha256(f"edged bundle 1\n{listing}".encode("utf-8", "surrogateescape")).hexdigest()


def read_manifest(copy: Path) -> dict[str, tuple[int, str]]:
    """The files of the copy in the directory `copy`; empty unless its name can be made of them."""
    try:
        return _parse_manifest((copy / MANIFEST).read_bytes(), copy.name)
    except OSError:
        return {}


def _parse_manifest(text: bytes, digest: str) -> dict[str, tuple[int, str]]:
    try:
        manifest = {str(path): (int(size), str(sha256)) for path, (size, sha256) in json.loads(text).items()}
        return manifest if bundle_digest(manifest) == digest else {}
    except (ValueError, TypeError, AttributeError, RecursionError):
        return {}


def content_bytes(manifest: Manifest) -> int:
    """What all files take together."""
    return sum(size_bytes for size_bytes, _ in manifest.values())


def looks_whole(copy: Path) -> bool:
    """Whether each file is there with its size, and is a file of ours that has no second name. Reads none."""
    manifest = read_manifest(copy)
    try:
        for path, (size_bytes, _) in manifest.items():
            _check_status(path, os.lstat(copy / FILES / path), size_bytes)
    except (OSError, DamagedCopyError):
        return False
    return bool(manifest)


def check_copy(copy: Path) -> None:
    """Reads and hashes all of a copy. Raises DamagedCopyError; OSError when it could not be found out."""
    with _told(MANIFEST):
        manifest = _parse_manifest((copy / MANIFEST).read_bytes(), copy.name)
    if not manifest:
        raise DamagedCopyError(f"its {MANIFEST} has changed")
    for path, (size_bytes, sha256) in manifest.items():
        with _told(path):
            found = _hash_whole(copy / FILES / path, path, size_bytes)
        if found != sha256:
            raise DamagedCopyError(f"{path} has other bytes than were stored: {_short(found, sha256)}")


@contextlib.contextmanager
def _told(path: str) -> Iterator[None]:
    """Raises DamagedCopyError in place of an error that tells of the file or its disk."""
    try:
        yield
    except OSError as error:
        if error.errno in _DAMAGE:
            raise DamagedCopyError(f"{path} cannot be read: {error.strerror}") from error
        raise


def _hash_whole(file: Path, path: str, size_bytes: int) -> str:
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        _check_status(path, os.fstat(descriptor), size_bytes)
        return hash_file(descriptor)
    finally:
        os.close(descriptor)


def _check_status(path: str, status: os.stat_result, size_bytes: int) -> None:
    if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1 or status.st_uid != os.geteuid():
        raise DamagedCopyError(f"{path} is not the daemon's alone any more")
    if status.st_size != size_bytes:
        raise DamagedCopyError(f"{path} has {status.st_size} bytes, {size_bytes} were stored")


def _short(found: str, wanted: str) -> str:
    return f"SHA-256 {found[:12]}…, wanted {wanted[:12]}…"


def hash_file(descriptor: int) -> str:
    """The SHA-256 of a file, read from its beginning; the descriptor's position stays where it is."""
    # Twice the readahead: a card delivers its full speed only to long reads.
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    digest = hashlib.sha256()
    offset = 0
    while piece := os.pread(descriptor, _CHUNK_BYTES, offset):
        digest.update(piece)
        offset += len(piece)
    return digest.hexdigest()
