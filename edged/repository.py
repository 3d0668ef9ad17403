"""The models folder: what lies in it now, and what of that has changed and come to rest.

`scan` reads a folder into a `Snapshot` and never raises for anything that it finds there: what cannot be
served becomes an `Entry` with a `problem` that says why. `Folder` compares snapshots. It is told the time,
holds no file and starts nothing, so a day of copying, renaming and unmounting can be replayed in a test.

The folder belongs to other people. Nothing in it is trusted: names are checked, links must stay beneath
the root, and only regular files are ever opened (`open_regular`), so that a pipe or a device node with
the name of a model cannot hold the daemon up.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from edged.config import (
    SETTINGS_BYTES_MAX,
    VERSION_MAX,
    ConfigError,
    ModelSettings,
    parse_model_settings,
)

__all__ = [
    "CHECKSUMS_NAME",
    "GOLDEN_NAME",
    "IGNORED_SUFFIXES",
    "Entry",
    "FileStamp",
    "Folder",
    "FolderChanges",
    "Key",
    "Snapshot",
    "UnsafeFileError",
    "open_regular",
    "scan",
]

Key = tuple[str, int | None]
"""A model's name and, where the folder says one, its version."""

IGNORED_SUFFIXES = ("~", ".tmp", ".part", ".partial", ".filepart", ".crdownload", ".swp")
"""What copying and editing programs call their unfinished work."""
CHECKSUMS_NAME = "SHA256SUMS"
GOLDEN_NAME = "golden"

_NAME_RE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,127}")
_VERSION_RE = re.compile(r"[1-9][0-9]{0,9}")
_IGNORED_NAMES = ("lost+found",)  # the root of every ext file system has one
_FOREIGN_SUFFIXES = (".pt", ".pth", ".tflite", ".h5", ".keras", ".engine", ".plan", ".gguf", ".safetensors")
_ENTRIES_MAX = 4096
"""Names in the root; more is not a folder of models, and each costs a stat at every scan."""
_BUNDLE_FILES_MAX = 4096
_BUNDLE_DEPTH_MAX = 8
_SHOWN_CHARS_MAX = 128
_PROBLEMS_THAT_KEEP = frozenset({"SETTINGS_INVALID", "UNREADABLE", "NAME_CLASH"})
"""With one of these nothing can be said about a name's other versions, so none counts as removed."""


@dataclass(frozen=True)
class FileStamp:
    """One regular file as stat saw it, links followed; `path` is relative to the root."""

    path: str
    device: int
    inode: int
    size_bytes: int
    mtime_ns: int
    ctime_ns: int


@dataclass(frozen=True)
class Entry:
    """One model, or one version of one, that the folder offers.

    `model_file` and `base` are relative to the root; staged paths are relative to `base`. `files` is all
    that is to be staged, `SHA256SUMS` included, the settings not. `problem` is (reason, message) of what
    keeps the entry from being served; an entry with a problem may have no files.
    """

    name: str
    version: int | None
    format: str
    model_file: str
    base: str
    files: tuple[FileStamp, ...] = ()
    settings_file: FileStamp | None = None
    settings: ModelSettings = field(default_factory=ModelSettings)
    problem: tuple[str, str] | None = None

    @property
    def key(self) -> Key:
        """What identifies the entry between snapshots."""
        return (self.name, self.version)

    @property
    def source(self) -> str:
        """The name in the root that the entry came from; two sources may claim one model's name."""
        return self.model_file.split("/", 1)[0]


@dataclass(frozen=True)
class Snapshot:
    """The folder at one moment, the `versions` policies applied.

    `fault` is a sentence when the root could not be read; then `entries` is empty and means nothing.
    `rivals` claim names that `entries` already has from another source.
    """

    root: str
    fault: str | None = None
    root_id: tuple[int, int] | None = None
    entries: Mapping[Key, Entry] = field(default_factory=dict)
    rivals: tuple[Entry, ...] = ()


# ---- opening what strangers have put there --------------------------------------------------------------


class UnsafeFileError(Exception):
    """Not a regular file beneath the root; the message says what it is."""


def open_regular(path: str, real_root: str) -> int:
    """A descriptor for reading a regular file beneath `real_root` (a real path), links followed.

    The file is first opened with O_PATH, which neither waits for a pipe's other end nor touches a device,
    then judged by what was really opened, and only then opened for reading: nobody can exchange it in
    between. Raises UnsafeFileError or OSError.
    """
    handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        mode = os.fstat(handle).st_mode
        if not stat.S_ISREG(mode):
            raise UnsafeFileError(f"is {_kind(mode)}, not a file")
        real = os.readlink(f"/proc/self/fd/{handle}")
        if not _is_beneath(real, real_root):
            raise UnsafeFileError("is a link that leads out of the models folder")
        return os.open(f"/proc/self/fd/{handle}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    finally:
        os.close(handle)


def _is_beneath(real: str, real_root: str) -> bool:
    return real.startswith(real_root.rstrip("/") + "/")


def _kind(mode: int) -> str:
    if stat.S_ISDIR(mode):
        return "a directory"
    if stat.S_ISFIFO(mode):
        return "a pipe"
    if stat.S_ISSOCK(mode):
        return "a socket"
    return "a device" if stat.S_ISCHR(mode) or stat.S_ISBLK(mode) else "something else"


# ---- scan -----------------------------------------------------------------------------------------------


class _Problem(Exception):
    """Why the thing at hand cannot be served."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.pair = (reason, message)


def scan(root: os.PathLike[str] | str) -> Snapshot:
    """What lies in the folder now. Whatever is found becomes an entry, a problem or a fault."""
    shown = os.fspath(root)
    try:
        real_root = os.path.realpath(shown)
        names = _names(real_root)
        status = os.stat(real_root)
    except OSError as error:
        return Snapshot(shown, fault=f"the models folder {shown} cannot be read: {error.strerror}")
    if len(names) > _ENTRIES_MAX:
        fault = f"the models folder {shown} holds {len(names)} entries, more than {_ENTRIES_MAX}"
        return Snapshot(shown, fault=fault)
    claims: dict[str, list[tuple[Entry, ...]]] = {}
    present = set(names)
    for name in names:
        claim = _claim(real_root, name, present)
        if claim:
            claims.setdefault(claim[0].name, []).append(claim)
    entries: dict[Key, Entry] = {}
    rivals: list[Entry] = []
    for rival_claims in claims.values():
        # Whatever can be served comes first; among equals the order of names decides, so it is stable.
        first, *others = sorted(rival_claims, key=lambda claim: all(each.problem for each in claim))
        entries.update((entry.key, entry) for entry in first)
        rivals.extend(entry for claim in others for entry in claim)
    return Snapshot(shown, None, (status.st_dev, status.st_ino), entries, tuple(rivals))


def _names(directory: str) -> list[str]:
    with os.scandir(directory) as found:
        return sorted(entry.name for entry in found if not _is_ignored(entry.name))


def _is_ignored(name: str) -> bool:
    return name.startswith(".") or name.endswith(IGNORED_SUFFIXES) or name in _IGNORED_NAMES


def _shown(name: str) -> str:
    """A name from the folder as it may stand in a message, a log or a table."""
    plain = name if name.isprintable() and name.isascii() else ascii(name)[1:-1]
    return plain if len(plain) <= _SHOWN_CHARS_MAX else plain[: _SHOWN_CHARS_MAX - 3] + "..."


def _claim(root: str, file_name: str, present: set[str]) -> tuple[Entry, ...]:
    """The entries that one name in the root stands for: none, one, or one for each version."""
    stem, suffix = os.path.splitext(file_name)
    model_format = {".onnx": "onnx", ".xml": "openvino_ir"}.get(suffix)
    try:
        try:
            mode = os.stat(f"{root}/{file_name}").st_mode
        except OSError:
            mode = 0  # gone, a broken or looping link: judged where it matters, below
        if stat.S_ISDIR(mode) and model_format is None:
            return _directory_claim(root, file_name)
        if model_format is not None:
            return (_file_entry(root, stem, model_format, present),)
        if suffix.lower() in (*_FOREIGN_SUFFIXES, ".onnx"):
            raise _Problem("NOT_A_MODEL", f"{_shown(file_name)}: only .onnx and .xml with .bin are served")
        return ()
    except FileNotFoundError:
        return ()  # it went while we looked
    except _Problem as problem:
        pair = problem.pair
    except OSError as error:
        pair = ("UNREADABLE", f"{_shown(file_name)} cannot be read: {error.strerror}")
    name = _shown(file_name if model_format is None else stem)
    return (Entry(name, None, model_format or "onnx", _shown(file_name), "", problem=pair),)


def _check_name(name: str) -> None:
    if _NAME_RE.fullmatch(name) is None:
        raise _Problem(
            "NAME_INVALID",
            f"{_shown(name)!r} cannot be a model's name: rename it to 1 to 128 letters, digits, '_', '-' "
            "and '.', not starting with '.'",
        )


def _file_entry(root: str, stem: str, model_format: str, present: set[str]) -> Entry:
    """NAME.onnx, or NAME.xml with NAME.bin, and NAME.toml."""
    suffixes = (".onnx",) if model_format == "onnx" else (".xml", ".bin")
    _check_name(stem)
    files = []
    for suffix in suffixes:
        if stem + suffix not in present:
            raise _Problem("INCOMPLETE", f"{stem}.xml is there, {stem}{suffix} is not: put it beside it")
        files.append(_stamp(root, stem + suffix))
    entry = Entry(stem, None, model_format, stem + suffixes[0], "", tuple(files))
    settings_path = f"{stem}.toml" if f"{stem}.toml" in present else None
    return _with_settings(_checked(entry), root, settings_path)


def _stamp(root: str, path: str) -> FileStamp:
    """The stamp of a regular, readable file beneath the root; a _Problem for anything else."""
    full = f"{root}/{path}"
    try:
        status = os.stat(full)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not os.path.lexists(full):
            raise
        raise _Problem("UNREADABLE", f"{_shown(path)}: {_link_text(full)}{error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        reason = "NOT_A_MODEL" if stat.S_ISDIR(status.st_mode) else "UNSAFE_FILE"
        raise _Problem(reason, f"{_shown(path)} is {_kind(status.st_mode)}, not a file")
    if not _is_beneath(os.path.realpath(full), root):
        raise _Problem("UNSAFE_FILE", f"{_shown(path)} is a link that leads out of the models folder")
    if not os.access(full, os.R_OK, effective_ids=True):
        raise _Problem("UNREADABLE", f"{_shown(path)} may not be read by the daemon: give it read permission")
    return FileStamp(
        path, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
    )


def _link_text(full: str) -> str:
    return "a link whose target cannot be reached: " if os.path.islink(full) else ""


def _checked(entry: Entry) -> Entry:
    """The entry, or the entry with the problem that one of its model's files is empty."""
    for stamp in entry.files:
        is_model_file = stamp.path in (entry.model_file, entry.model_file.removesuffix(".xml") + ".bin")
        # An IR without weights has an empty .bin, and that is right.
        if is_model_file and stamp.size_bytes == 0 and not stamp.path.endswith(".bin"):
            return replace(entry, problem=("EMPTY_FILE", f"{stamp.path} is empty"))
    return entry


def _with_settings(entry: Entry, root: str, path: str | None) -> Entry:
    if path is None:
        return entry
    try:
        stamp = _stamp(root, path)
    except FileNotFoundError:
        return entry
    except _Problem as problem:
        return replace(entry, problem=entry.problem or ("SETTINGS_INVALID", problem.pair[1]))
    try:
        settings = parse_model_settings(_read_text(root, path), source=path)
    except ConfigError as error:
        problem_pair = entry.problem or ("SETTINGS_INVALID", error.message)
        return replace(entry, settings_file=stamp, problem=problem_pair)
    return replace(entry, settings_file=stamp, settings=settings)


def _read_text(root: str, path: str) -> str:
    try:
        with open(open_regular(f"{root}/{path}", root), "rb") as stream:
            raw = stream.read(SETTINGS_BYTES_MAX + 1)
    except (OSError, UnsafeFileError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    if len(raw) > SETTINGS_BYTES_MAX:
        raise ConfigError(f"{path}: is larger than {SETTINGS_BYTES_MAX} bytes")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path}, line {line}: not UTF-8, which TOML must be") from None


def _directory_claim(root: str, name: str) -> tuple[Entry, ...]:
    """NAME/model.onnx as one bundle, or NAME/3/model.onnx as one bundle for each version."""
    _check_name(name)
    children = _list_beneath(root, name)
    settings_path = f"{name}/model.toml" if "model.toml" in children else None
    versions = sorted(
        int(child)
        for child in children
        if _VERSION_RE.fullmatch(child) and os.path.isdir(f"{root}/{name}/{child}")
    )
    versions = [version for version in versions if version <= VERSION_MAX]
    has_model = {"model.onnx", "model.xml"} & set(children)
    if has_model and versions:
        raise _Problem(
            "NAME_CLASH", f"{name} holds both {min(has_model)} and version directories: keep one kind"
        )
    if has_model or not versions:
        return (_with_settings(_bundle(root, name, name, None), root, settings_path),)
    # The settings come first: they say which of the versions are wanted at all.
    probe = _with_settings(Entry(name, None, "onnx", f"{name}/model.onnx", name), root, settings_path)
    entries = []
    for version in _wanted(versions, probe.settings.versions):
        entry = _bundle(root, f"{name}/{version}", name, version)
        entries.append(
            replace(
                entry,
                settings_file=probe.settings_file,
                settings=probe.settings,
                problem=entry.problem or probe.problem,
            )
        )
    if not entries:
        problem = ("NOT_A_MODEL", f"{name} has none of the versions that its settings name")
        return (replace(probe, problem=probe.problem or problem),)
    return tuple(entries)


def _wanted(versions: list[int], policy: str | tuple[int, ...]) -> list[int]:
    """The versions that the policy serves, of those that are there (ascending)."""
    if isinstance(policy, tuple):
        return [version for version in versions if version in policy]
    return versions if policy == "all" else versions[-int(policy.removeprefix("latest:")) :]


def _list_beneath(root: str, path: str) -> list[str]:
    full = f"{root}/{path}"
    if not _is_beneath(os.path.realpath(full), root):
        raise _Problem("UNSAFE_FILE", f"{_shown(path)} is a link that leads out of the models folder")
    try:
        return _names(full)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _Problem("UNREADABLE", f"{_shown(path)} cannot be read: {error.strerror}") from None


def _bundle(root: str, base: str, name: str, version: int | None) -> Entry:
    """One directory with model.onnx or model.xml, and every other regular file in it."""
    entry = Entry(name, version, "onnx", f"{base}/model.onnx", base)
    try:
        files: list[FileStamp] = []
        for path in _walk(root, base, _BUNDLE_DEPTH_MAX):
            if len(files) >= _BUNDLE_FILES_MAX:
                raise _Problem("TOO_LARGE", f"{base} holds more than {_BUNDLE_FILES_MAX} files")
            files.append(_stamp(root, path))
    except (FileNotFoundError, _Problem) as problem:
        pair = (
            problem.pair
            if isinstance(problem, _Problem)
            else ("INCOMPLETE", f"{base} changed while it was read")
        )
        return replace(entry, problem=pair)
    entry = replace(entry, files=tuple(files))
    paths = {stamp.path for stamp in files}
    has_onnx, has_ir = f"{base}/model.onnx" in paths, f"{base}/model.xml" in paths
    if has_onnx and has_ir:
        return replace(entry, problem=("NAME_CLASH", f"{base} holds both model.onnx and model.xml: keep one"))
    if has_ir:
        entry = replace(entry, format="openvino_ir", model_file=f"{base}/model.xml")
        if f"{base}/model.bin" not in paths:
            return replace(entry, problem=("INCOMPLETE", f"{base}/model.xml is there, model.bin is not"))
        return _checked(entry)
    if not has_onnx:
        message = f"{base} holds no model: model.onnx, or model.xml with model.bin, is looked for"
        return replace(entry, problem=("NOT_A_MODEL", message))
    return _checked(entry)


def _walk(root: str, base: str, depth: int) -> Iterator[str]:
    """Every file's path below a directory, in order; the settings are no part of the content."""
    for name in _list_beneath(root, base):
        path = f"{base}/{name}"
        if os.path.isdir(f"{root}/{path}"):
            if depth == 0:
                raise _Problem(
                    "TOO_LARGE", f"{_shown(path)} lies deeper than {_BUNDLE_DEPTH_MAX} directories"
                )
            yield from _walk(root, path, depth - 1)
        elif name != "model.toml":
            yield path


# ---- what changed, and what has come to rest ------------------------------------------------------------


@dataclass(frozen=True)
class FolderChanges:
    """What one observation brought.

    `changed` are new entries and entries whose files differ, problems included; `settings_changed` are
    those of which only the settings differ. `removed` went from a healthy folder. `superseded` went
    because another version of the same name came: they are to serve until that one does. `refused` claim
    a name that another source has; each is told once. `recheck_after_s` says when something will have
    come to rest.
    """

    changed: tuple[Entry, ...] = ()
    settings_changed: tuple[Entry, ...] = ()
    removed: tuple[Key, ...] = ()
    superseded: tuple[Key, ...] = ()
    refused: tuple[Entry, ...] = ()
    fault: str | None = None
    recheck_after_s: float | None = None


class Folder:
    """Decides from one snapshot after another what changed. Whatever changes must first rest `settle_s`."""

    def __init__(self, *, settle_s: float) -> None:
        self.settle_s = settle_s
        self._root_id: tuple[int, int] | None = None
        self._known: dict[Key, Entry | None] = {}  # None: expected from an earlier life, not seen yet
        self._observation = 0
        self._known_since: dict[Key, int] = {}  # the observation that reported it
        self._pending: dict[Key, tuple[Entry, float]] = {}
        self._absent_since: dict[Key, tuple[int, float]] = {}  # the observation, and its time
        self._sources: dict[str, str] = {}
        self._refused: tuple[Entry, ...] = ()

    def expect(self, keys: Iterable[Key]) -> None:
        """Models that an earlier life of the daemon served from here; to be called before `observe`.

        Those that a healthy folder does not have are reported as removed. A folder without any entry
        while some are expected is a fault: it is more likely not mounted.
        """
        for key in keys:
            self._known.setdefault(key, None)

    def forget(self, key: Key) -> None:
        """Has the entry reported again once it has rested, for a failed stage or on request."""
        if key in self._known:
            self._known[key] = None
        self._pending.pop(key, None)

    def observe(self, snapshot: Snapshot, now_s: float, *, wall_s: float | None = None) -> FolderChanges:
        """What changed since the last observation and has rested; `now_s` is monotonic.

        With `wall_s` (seconds since the epoch) an entry whose files were all last touched long enough
        ago counts as rested at its first sight, so that a start need not wait for old files.
        """
        fault = snapshot.fault or self._root_fault(snapshot)
        if fault is not None:
            self._pending.clear()
            self._absent_since.clear()
            return FolderChanges(fault=fault)
        self._root_id = snapshot.root_id
        self._observation += 1
        entries, rivals = self._settle_rivalry(snapshot)
        changed, settings_changed = self._changes(entries, now_s, wall_s)
        removed, superseded = self._removals(entries, now_s)
        newly_refused = tuple(entry for entry in rivals if entry not in self._refused)
        self._refused = rivals
        return FolderChanges(
            changed,
            settings_changed,
            removed,
            superseded,
            newly_refused,
            recheck_after_s=self._recheck_after(now_s),
        )

    def _root_fault(self, snapshot: Snapshot) -> str | None:
        """An empty root in another place than before is the mount point, not the folder."""
        if snapshot.entries or snapshot.rivals or not self._known:
            return None
        if self._root_id is None and any(entry is None for entry in self._known.values()):
            count = len(self._known)
            return (
                f"the models folder {snapshot.root} is empty, but {count} served from it before: is it "
                "mounted? Nothing is removed; put a model there, or unload the old ones by edgectl"
            )
        if snapshot.root_id != self._root_id:
            return (
                f"the models folder {snapshot.root} is empty and not the directory that it was: is it "
                "mounted? Nothing is removed until it holds a model again"
            )
        return None

    def _settle_rivalry(self, snapshot: Snapshot) -> tuple[dict[Key, Entry], tuple[Entry, ...]]:
        """The entries with every contested name given to the source that had it before, and the losers."""
        sources = self._sources
        entries = dict(snapshot.entries)
        losers: list[Entry] = []
        returning = {each.name for each in snapshot.rivals if each.source == sources.get(each.name)}
        for entry in snapshot.entries.values():
            if entry.name in returning:
                del entries[entry.key]
                losers.append(entry)
        for entry in snapshot.rivals:
            if entry.name in returning and entry.source == sources[entry.name]:
                entries[entry.key] = entry
            else:
                losers.append(entry)
        holders = {entry.name: entry.source for entry in entries.values()}
        return entries, tuple(
            replace(
                entry,
                problem=(
                    "NAME_CLASH",
                    f"{entry.source}: the name {entry.name} belongs to {holders[entry.name]}; "
                    "rename or remove one",
                ),
            )
            for entry in losers
        )

    def _changes(
        self, entries: Mapping[Key, Entry], now_s: float, wall_s: float | None
    ) -> tuple[tuple[Entry, ...], tuple[Entry, ...]]:
        changed: list[Entry] = []
        settings_changed: list[Entry] = []
        self._pending = {key: each for key, each in self._pending.items() if key in entries}
        for key, entry in entries.items():
            known = self._known.get(key)
            if known == entry:
                self._pending.pop(key, None)
                continue
            seen, since_s = self._pending.get(key, (None, now_s))
            if seen != entry:
                since_s = now_s
                self._pending[key] = (entry, since_s)
            if now_s - since_s < self.settle_s and not self._has_rested(entry, wall_s):
                continue
            del self._pending[key]
            self._known[key] = entry
            self._known_since[key] = self._observation
            self._sources[entry.name] = entry.source
            same = known is not None and known.problem is None and known.files == entry.files
            (settings_changed if same and entry.problem is None else changed).append(entry)
        return tuple(changed), tuple(settings_changed)

    def _has_rested(self, entry: Entry, wall_s: float | None) -> bool:
        """Whether all files were last touched long ago; a change time cannot be set back by copying."""
        stamps = (*entry.files, *((entry.settings_file,) if entry.settings_file else ()))
        if wall_s is None or not stamps or entry.problem is not None:
            return False
        touched_s = max(max(stamp.ctime_ns, stamp.mtime_ns) for stamp in stamps) / 1e9
        return bool(wall_s - touched_s >= self.settle_s)

    def _removals(
        self, entries: Mapping[Key, Entry], now_s: float
    ) -> tuple[tuple[Key, ...], tuple[Key, ...]]:
        removed: list[Key] = []
        superseded: list[Key] = []
        undecided = {entry.name for entry, _ in self._pending.values()}
        undecided |= {
            each.name
            for each in entries.values()
            if each.problem is not None and each.problem[0] in _PROBLEMS_THAT_KEEP
        }
        for key in [key for key in self._known if key in self._absent_since and key in entries]:
            del self._absent_since[key]
        for key in [key for key in self._known if key not in entries]:
            since, since_s = self._absent_since.setdefault(key, (self._observation, now_s))
            if key[0] in undecided or now_s - since_s < self.settle_s:
                continue
            successors = [other for other in entries if other[0] == key[0]]
            came = any(self._known_since.get(other, -1) >= since for other in successors)
            (superseded if came else removed).append(key)
            del self._known[key], self._absent_since[key]
            self._known_since.pop(key, None)
            if not successors:
                self._sources.pop(key[0], None)
        return tuple(removed), tuple(superseded)

    def _recheck_after(self, now_s: float) -> float | None:
        waiting = [since_s for _, since_s in self._pending.values()]
        waiting += [since_s for _, since_s in self._absent_since.values() if now_s - since_s < self.settle_s]
        if not waiting:
            return None
        return max(0.01, min(since_s + self.settle_s - now_s for since_s in waiting))
