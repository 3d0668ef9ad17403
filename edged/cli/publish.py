"""Publishing a model into the models folder: all of it appears, or nothing has changed.

The copies are made under hidden names in the folder itself (the daemon never looks at those), written out
to the disk, and only then take their places by rename. What was there is swapped out in the same system
call (`renameat2` with RENAME_EXCHANGE), so at every moment the name stands for one whole model, and
swapping once more undoes it. Where the file system can not exchange, the old entry is moved aside first;
a directory is then away for the time between two renames, which is far below the daemon's settle time.

Owns nothing but the folder's names: it never opens a model to look into it, and never talks to the daemon.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from edged.cli.tables import bytes_text

__all__ = ["BUNDLE_FILES_MAX", "LEFTOVER_AGE_S", "NAME", "NAME_RULE", "PublishError", "Published", "publish"]

BUNDLE_FILES_MAX = 10_000
"""More files than any model has; more likely someone named a home directory."""

_CHUNK_BYTES = 1 << 20

NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,127}")
NAME_RULE = "letters, digits, '_', '-' and '.', 1 to 128 of them, not starting with '.'"

_SKIPPED_SUFFIXES = ("~", ".tmp", ".part", ".partial", ".filepart", ".crdownload", ".swp")
"""What the daemon never looks at; not copied, and refused as a model's name."""

LEFTOVER_AGE_S = 24 * 3600
"""No copy into a models folder takes a day."""

_TEMP = re.compile(r"\..+\.[0-9]+\.[0-9a-f]{8}(\.part)?(\.old)?\.part")

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_CANNOT_EXCHANGE = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM}


class PublishError(Exception):
    """The model was not published, and the folder is as it was; the message says why and what to do."""


@dataclass(frozen=True)
class Published:
    """What now stands in the folder. `unchanged`: exactly these bytes and settings were there before."""

    name: str
    path: Path
    size_bytes: int
    settings: Path | None
    replaced: bool
    unchanged: bool


@dataclass(frozen=True)
class _Item:
    """One entry of the folder that this publication writes."""

    source: Path
    target: Path
    extra: Path | None = None  # settings that go into a bundle as its model.toml


def publish(
    source: Path, models: Path, *, name: str | None = None, settings: Path | None = None
) -> Published:
    """Puts the model file or bundle directory `source` into the folder `models`.

    A `.xml` takes its `.bin` along. Raises PublishError with nothing changed.
    """
    items, model_name = _plan(source, models, name=name, settings=settings)
    try:
        folder = models.stat()
        _remove_leftovers(models)
        _require_space(items, models)
        return _carry_out(items, model_name, models, folder)
    except OSError as e:
        raise PublishError(_os_text(e, models)) from None


def _plan(source: Path, models: Path, *, name: str | None, settings: Path | None) -> tuple[list[_Item], str]:
    """What is to be written, checked as far as the names go."""
    if not models.is_dir():
        raise PublishError(f"the models folder {models} is not there; name it with --models DIR")
    if not source.exists():
        raise PublishError(f"{source} is not there")
    if settings is not None and not settings.is_file():
        raise PublishError(f"the settings file {settings} is not there")
    is_bundle = source.is_dir()
    if not is_bundle and source.suffix not in (".onnx", ".xml"):
        raise PublishError(
            f"{source.name} is no model: put takes a .onnx, a .xml with its .bin, or a directory"
        )
    model_name = name if name is not None else (source.resolve().name if is_bundle else source.stem)
    if not NAME.fullmatch(model_name) or model_name.endswith(_SKIPPED_SUFFIXES):
        raise PublishError(f"{model_name!r} can not name a model: {NAME_RULE}; choose one with --name")
    _refuse_clash(models, model_name, "" if is_bundle else source.suffix)
    items = []
    if is_bundle:
        items.append(_Item(source, models / model_name, extra=settings))
        return items, model_name
    if settings is not None:
        items.append(_Item(settings, models / f"{model_name}.toml"))
    if source.suffix == ".xml":
        weights = source.with_suffix(".bin")
        if not weights.is_file():
            raise PublishError(f"{source.name} needs its weights beside it: {weights} is not there")
        items.append(_Item(weights, models / f"{model_name}.bin"))
    items.append(_Item(source, models / f"{model_name}{source.suffix}"))
    return items, model_name


def _refuse_clash(models: Path, name: str, suffix: str) -> None:
    """Two entries of one name: the daemon would refuse the second, so it is refused here."""
    for other in {"", ".onnx", ".xml"} - {suffix}:
        if os.path.lexists(models / f"{name}{other}"):
            raise PublishError(
                f"the folder has {name}{other or '/'} already, and a name stands for one model: "
                f"remove it first, or choose another with --name"
            )


def _require_space(items: list[_Item], models: Path) -> None:
    needed = sum(size for item in items for size in _sizes(item.source))
    free = shutil.disk_usage(models).free
    if needed > free:
        raise PublishError(
            f"the disk is too full: {bytes_text(needed)} needed, {bytes_text(free)} free in {models}"
        )


def _sizes(source: Path) -> Iterator[int]:
    if source.is_dir():
        for path, _ in _walk(source):
            yield path.stat().st_size
    else:
        yield source.stat().st_size


def _walk(root: Path) -> Iterator[tuple[Path, Path]]:
    """Every file of a bundle with its place in it; raises for what is no file."""
    seen = 0
    pending = [root]
    while pending:
        directory = pending.pop()
        for entry in sorted(os.scandir(directory), key=lambda e: e.name):
            if entry.name.startswith(".") or entry.name.endswith(_SKIPPED_SUFFIXES):
                continue
            path = Path(entry.path)
            if entry.is_dir(follow_symlinks=False):
                pending.append(path)
                continue
            if not stat.S_ISREG(path.stat().st_mode):
                raise PublishError(f"{path} is neither a file nor a directory; a bundle holds nothing else")
            seen += 1
            if seen > BUNDLE_FILES_MAX:
                raise PublishError(f"{root} holds more than {BUNDLE_FILES_MAX} files; is it really a model?")
            yield path, path.relative_to(root)


def _carry_out(items: list[_Item], name: str, models: Path, folder: os.stat_result) -> Published:
    token = f"{os.getpid()}.{secrets.token_hex(4)}"
    temps = [models / f".{item.target.name}.{token}.part" for item in items]
    try:
        copies = [_copy(item, temp, folder) for item, temp in zip(items, temps, strict=True)]
        before = [_digest_of(item.target) for item in items]
        done: list[tuple[Path, Path, bool]] = []
        try:
            for item, temp in zip(items, temps, strict=True):
                done.append((temp, item.target, _swap_in(temp, item.target)))
        except BaseException:  # Ctrl-C too: new settings beside an old model would be a third thing
            for temp, target, replaced in reversed(done):
                _swap_out(temp, target, replaced)
            raise
        _fsync_dir(models)
    finally:
        for temp in temps:
            _remove(temp)
    return Published(
        name=name,
        path=items[-1].target,
        size_bytes=sum(size for _, size in copies),
        settings=_settings_path(items),
        replaced=done[-1][2],
        unchanged=[digest for digest, _ in copies] == before,
    )


def _settings_path(items: list[_Item]) -> Path | None:
    for item in items:
        if item.extra is not None:
            return item.target / "model.toml"
        if item.target.suffix == ".toml":
            return item.target
    return None


def _copy(item: _Item, temp: Path, folder: os.stat_result) -> tuple[str, int]:
    """Copies one entry to its hidden name, durably; returns the digest and size of what was written."""
    if not item.source.is_dir():
        return _copy_file(item.source, temp, folder)
    temp.mkdir()
    _like_folder(temp, folder, directory=True)
    files = {relative: path for path, relative in _walk(item.source)}
    if item.extra is not None:
        files[Path("model.toml")] = item.extra
    if not files:
        raise PublishError(f"{item.source} is empty; a bundle holds model.onnx, or VERSION/model.onnx")
    directories = {parent for relative in files for parent in relative.parents} - {Path()}
    for relative in sorted(directories):
        (temp / relative).mkdir(exist_ok=True)
        _like_folder(temp / relative, folder, directory=True)
    tree, size = hashlib.sha256(), 0
    for relative in sorted(files):
        digest, count = _copy_file(files[relative], temp / relative, folder)
        tree.update(f"{relative}\0{digest}\n".encode())
        size += count
    for relative in sorted(directories, reverse=True):
        _fsync_dir(temp / relative)
    _fsync_dir(temp)
    return tree.hexdigest(), size


def _copy_file(source: Path, target: Path, folder: os.stat_result) -> tuple[str, int]:
    with open(source, "rb") as reader, open(target, "xb") as writer:
        before = os.fstat(reader.fileno())
        digest = _pump(reader, writer)
        after = os.fstat(reader.fileno())
        if (before.st_size, before.st_mtime_ns) != (
            after.st_size,
            after.st_mtime_ns,
        ) or writer.tell() != after.st_size:
            raise PublishError(f"{source} changed while it was copied; put it again when it is whole")
        if after.st_size == 0 and source.suffix in (".onnx", ".xml"):
            raise PublishError(f"{source} is empty")
        writer.flush()
        _like_folder(target, folder, directory=False)
        os.fsync(writer.fileno())
    return digest, after.st_size


def _pump(reader: BinaryIO, writer: BinaryIO) -> str:
    digest = hashlib.sha256()
    while chunk := reader.read(_CHUNK_BYTES):
        digest.update(chunk)
        writer.write(chunk)
    return digest.hexdigest()


def _like_folder(path: Path, folder: os.stat_result, *, directory: bool) -> None:
    """Whoever may read the folder may read what is put there: the daemon is often another user, and root's
    umask need not let it."""
    os.chmod(path, (0o700 if directory else 0o600) | (folder.st_mode & (0o055 if directory else 0o044)))
    with contextlib.suppress(PermissionError):  # not a member of the folder's group: the mode has to do
        os.chown(path, -1, folder.st_gid)


def _digest_of(target: Path) -> str | None:
    """What `_copy` would have said of the entry that is there now; None when there is none to compare."""
    try:
        if target.is_symlink() or not target.is_dir():
            return _file_digest(target)
        tree = hashlib.sha256()
        for relative, path in sorted((relative, path) for path, relative in _walk(target)):
            tree.update(f"{relative}\0{_file_digest(path)}\n".encode())
        return tree.hexdigest()
    except (OSError, PublishError):
        return None


def _file_digest(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _swap_in(temp: Path, target: Path) -> bool:
    """`temp` takes the place of `target`; the old entry, if any, is then at `temp`. True: there was one."""
    try:
        _renameat2(temp, target, _RENAME_EXCHANGE)
        return True
    except FileNotFoundError:
        pass
    except OSError as e:
        if e.errno not in _CANNOT_EXCHANGE:
            raise
    if not os.path.lexists(target):
        os.rename(temp, target)
        return False
    aside = temp.with_name(f"{temp.name}.old.part")
    os.rename(target, aside)
    try:
        os.rename(temp, target)
    except OSError:
        os.rename(aside, target)
        raise
    os.rename(aside, temp)
    return True


def _swap_out(temp: Path, target: Path, replaced: bool) -> None:
    """Undoes `_swap_in`."""
    if replaced:
        _swap_in(temp, target)
    else:
        os.rename(target, temp)


def _renameat2(source: Path, target: Path, flags: int) -> None:
    """The system call that Python has no name for; ENOSYS where the C library has none either."""
    libc = ctypes.CDLL(None, use_errno=True)
    call = getattr(libc, "renameat2", None)
    if call is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), str(target))
    if call(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), ctypes.c_uint(flags)) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(target))


def _fsync_dir(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _remove(path: Path) -> None:
    """Takes away what is left at a hidden name; a symbolic link itself, never what it names."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _remove_leftovers(models: Path) -> None:
    """Takes away the hidden copies of puts that were killed; any that could still be at work is younger."""
    oldest_s = time.time() - LEFTOVER_AGE_S
    for entry in os.scandir(models):
        if _TEMP.fullmatch(entry.name) and entry.stat(follow_symlinks=False).st_ctime < oldest_s:
            _remove(Path(entry.path))


def _os_text(e: OSError, models: Path) -> str:
    match e.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return f"the disk is full: {models} could not take the copy; nothing was changed"
        case errno.EACCES | errno.EPERM if e.filename and str(e.filename).startswith(str(models)):
            return f"no permission to write into {models}: run this as its owner (sudo edgectl put …)"
        case _:
            return f"{e.filename or models}: {e.strerror}; nothing was changed"
