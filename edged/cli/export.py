"""A choice written into a model's settings file: its few lines change, everything else stays as it was.

The file is edited as text, since no TOML writer keeps comments, and the result is read back before it takes
the old one's place: it must say exactly what the old one said but for the keys that were written. What cannot
be edited so is refused, with the lines to write by hand. One rename puts it in place, with the old one's
mode.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import stat
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["ExportError", "edited", "export", "settings_for"]

BYTES_MAX = 1 << 20
"""Of a settings file: the daemon takes none that is larger."""

_HEADER = re.compile(r"\s*\[\[?[^\[\]]+\]\]?\s*(#.*)?")
_BLANK = re.compile(r"\s*(#.*)?")


class ExportError(Exception):
    """The settings file is as it was; the message says why and what to do."""


def settings_for(setup: Mapping[str, Any]) -> dict[str, Any]:
    """What a settings file says to have a model run as `setup`, a row of a tune's report."""
    runtime, device = str(setup["runtime"]), str(setup["device"])
    kind = device.partition(":")[0]
    if runtime == "openvino":
        selector = f"openvino:{device}"
    elif kind == "CUDA":
        selector = device.lower()
    else:
        selector = kind.lower()
    found = {
        "runtime": runtime,
        "device": selector,
        "threads": setup["threads"],
        "instances": setup["instances"],
    }
    if setup.get("max_batch_size"):
        found["max_batch_size"] = setup["max_batch_size"]
    return found


def export(path: Path, settings: Mapping[str, Any], *, within: Path) -> bool:
    """Writes top-level keys into a settings file, made if there is none; whether it changed anything.

    A link is followed inside the folder `within` only, as the daemon does: whoever may put one there need not
    be who runs this. Raises ExportError with the file as it was.
    """
    try:
        real = Path(os.path.realpath(path))
        if not real.is_relative_to(os.path.realpath(within)):
            raise ExportError(f"it is a link that leads out of {within}")
        before = _read(real)
        after = edited(before or "", settings)
        if after == before:
            return False
        _replace(real, after, None if before is None else real.stat())
        return True
    except OSError as e:
        raise ExportError(f"{e.filename or path}: {e.strerror}; nothing was changed") from None
    except ExportError as e:
        lines = "; ".join(f"{key} = {_toml(value)}" for key, value in settings.items())
        raise ExportError(f"{path}: {e}; write it by hand: {lines}") from None


def _read(path: Path) -> str | None:
    try:
        with open(path, "rb") as stream:
            raw = stream.read(BYTES_MAX + 1)
    except FileNotFoundError:
        return None
    if len(raw) > BYTES_MAX:
        raise ExportError(f"it is larger than {BYTES_MAX} bytes")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        raise ExportError("it is not UTF-8") from None


def edited(text: str, settings: Mapping[str, Any]) -> str:
    """`text` with these top-level keys set. Raises ExportError where lines alone cannot tell how."""
    before = _parse(text)
    wanted = {**before, **settings}
    if wanted == before:
        return text
    newline = "\r\n" if "\r\n" in text else "\n"
    lines = text.splitlines(keepends=True)
    if lines and not lines[-1].endswith(("\n", "\r")):
        lines[-1] += newline
    end = next((n for n, line in enumerate(lines) if _HEADER.fullmatch(line.rstrip("\r\n"))), len(lines))
    added = []
    for key, value in settings.items():
        if before.get(key) == value and type(before.get(key)) is type(value):
            continue
        at = next((n for n in range(end) if re.match(rf"\s*{key}\s*=", lines[n])), None)
        if at is None:
            added.append(f"{key} = {_toml(value)}{newline}")
        else:
            lines[at] = _with_value(lines[at], value)
    while end < len(lines) and end and _BLANK.fullmatch(lines[end - 1].rstrip("\r\n")):
        end -= 1  # a table's own comment stays with it
    lines[end:end] = added
    after = "".join(lines)
    if _parse(after) != wanted:
        raise ExportError("it is written in a way that cannot be edited line by line")
    return after


def _parse(text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text.replace("\r\n", "\n"))
    except tomllib.TOMLDecodeError as e:
        raise ExportError(f"it is no TOML: {e}") from None


def _with_value(line: str, value: Any) -> str:
    """A line `key = old  # comment` with another value."""
    match = re.fullmatch(r"(\s*[^=]+=\s*)(\"[^\"]*\"|'[^']*'|[^#\"'\s]+)(\s*(?:#[^\r\n]*)?)(\r?\n)", line)
    if match is None:
        raise ExportError(f"the line {line.strip()!r} cannot be edited")
    return f"{match[1]}{_toml(value)}{match[3]}{match[4]}"


def _toml(value: Any) -> str:
    return str(value) if isinstance(value, int) else f'"{value}"'


def _replace(path: Path, text: str, old: os.stat_result | None) -> None:
    folder = path.parent
    temporary = folder / f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.part"
    try:
        with open(temporary, "xb") as stream:
            stream.write(text.encode())
            stream.flush()
            _like(stream.fileno(), old or folder.stat(), made=old is None)
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _like(fd: int, model: os.stat_result, *, made: bool) -> None:
    """The old file's owner and mode; a new one can be read by whoever may read the folder."""
    with contextlib.suppress(PermissionError):  # not ours to give away: the mode has to do
        os.fchown(fd, -1 if made else model.st_uid, model.st_gid)
    os.fchmod(fd, 0o600 | (model.st_mode & 0o044) if made else stat.S_IMODE(model.st_mode))
