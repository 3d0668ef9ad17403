"""A file system seen from some root: the machine's own, or a directory that a test has filled.

Owns how a path is read there and how numbers become names of users and groups; everything that may fail does
so quietly, as None or an empty text, since what cannot be read is a fact too. Users come from /etc/passwd and
/etc/group alone: the service's are made there (sysusers.d), and a directory service may hang on a bad day.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from edged.cli.health.facts import Account, Node

__all__ = ["Root"]

_READ_BYTES_MAX = 1 << 20
"""No text that we read is longer; ld.so.cache is about 100 KB."""


class Root:
    """The files below `path`."""

    def __init__(self, path: Path = Path("/")) -> None:
        self.path = path

    def at(self, path: str | Path) -> Path:
        """Where this absolute path really is."""
        return self.path / str(path).lstrip("/")

    def bytes(self, path: str | Path) -> bytes:
        """The beginning of a file; empty where it cannot be read."""
        try:
            with open(os.open(self.at(path), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as stream:
                return stream.read(_READ_BYTES_MAX) or b""
        except OSError:
            return b""

    def text(self, path: str | Path) -> str:
        """A file's text without the white space around it; empty where it cannot be read."""
        return self.bytes(path).decode("utf-8", "replace").strip("\0 \t\r\n")

    def number(self, path: str | Path, base: int = 10) -> int | None:
        """A file that holds one number."""
        return whole(self.text(path), base)

    def link(self, path: str | Path) -> str:
        """Where a link points; empty for anything else."""
        with contextlib.suppress(OSError):
            return os.readlink(self.at(path))
        return ""

    def glob(self, pattern: str) -> Iterator[str]:
        """The absolute paths that match, in order."""
        for found in sorted(self.path.glob(pattern.lstrip("/"))):
            yield f"/{found.relative_to(self.path)}"

    def node(self, path: str | Path) -> Node | None:
        """Whom it belongs to; None where it is not there or cannot be looked at."""
        with contextlib.suppress(OSError):
            return self.look(path)
        return None

    def look(self, path: str | Path) -> Node:
        """As `node`; raises OSError."""
        status = os.stat(self.at(path))
        return Node(
            str(path),
            stat.S_IMODE(status.st_mode),
            status.st_uid,
            self.user_name(status.st_uid),
            self.group_name(status.st_gid),
        )

    @cached_property
    def _users(self) -> dict[str, tuple[int, int]]:
        return {
            name: (uid, gid)
            for name, _, number, group, *_ in _colons(self.text("/etc/passwd"), 5)
            if (uid := whole(number)) is not None and (gid := whole(group)) is not None
        }

    @cached_property
    def groups(self) -> dict[str, tuple[int, tuple[str, ...]]]:
        """Number and members of each group."""
        return {
            name: (gid, tuple(filter(None, members.split(","))))
            for name, _, number, members, *_ in _colons(self.text("/etc/group"), 4)
            if (gid := whole(number)) is not None
        }

    def user_name(self, uid: int) -> str:
        """The user's name, else the number."""
        return next((name for name, (number, _) in self._users.items() if number == uid), str(uid))

    def group_name(self, gid: int) -> str:
        """The group's name, else the number."""
        return next((name for name, (number, _) in self.groups.items() if number == gid), str(gid))

    def account(self, name: str) -> Account | None:
        """A user with the groups that a new login or a service's start would give it."""
        if name not in self._users:
            return None
        uid, gid = self._users[name]
        joined = [group for group, (_, members) in self.groups.items() if name in members]
        return Account(name, uid, tuple(dict.fromkeys([self.group_name(gid), *joined])))

    def account_of(self, uid: int, gids: list[int]) -> Account:
        """What a process is that has these numbers."""
        return Account(self.user_name(uid), uid, tuple(dict.fromkeys(self.group_name(gid) for gid in gids)))


def _colons(text: str, fields: int) -> Iterator[list[str]]:
    for line in text.splitlines():
        parts = line.split(":")
        if len(parts) >= fields and not line.startswith("#"):
            yield parts


def whole(text: str, base: int = 10) -> int | None:
    """A whole number, or None for what is none."""
    with contextlib.suppress(ValueError):
        return int(text.strip(), base)
    return None
