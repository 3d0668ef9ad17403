"""What is the same for all packages of one build, and a package's files on their way."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PACKAGING = HERE.parent


class BuildError(Exception):
    """The packages cannot be built; the text says what to do."""


class Unreachable(Exception):
    """The wheels cannot be fetched, for want of a network or because the index has them no longer."""


@dataclass(frozen=True)
class Release:
    """What a release decides: its Python, its C library, and how its packages' versions end."""

    python: str
    glibc: int
    """The minor of 2.x: wheels for any older one run there."""
    suffix: str
    units: str
    """Where its tools look for packages' units; Debian 12's look in /lib alone."""

    @property
    def abi(self) -> str:
        return "cp" + self.python.replace(".", "")

    @property
    def next_python(self) -> str:
        major, minor = self.python.split(".")
        return f"{major}.{int(minor) + 1}"


RELEASES = {
    "bookworm": Release("3.11", 36, "~deb12", "lib/systemd/system"),
    "trixie": Release("3.13", 41, "~deb13", "usr/lib/systemd/system"),
    "noble": Release("3.12", 39, "~ubuntu24.04", "usr/lib/systemd/system"),
}

MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}
"""Debian's names of architectures, and those in wheels."""

PREFIX = "usr/lib/edged"
"""A virtual environment's layout; `edged.sites` looks for runtimes in `runtimes/` in it."""


@dataclass
class Tree:
    """A package's files on their way, and what was learned about them."""

    root: Path
    wheels: list[tuple[str, str, str]] = field(default_factory=list)
    """Name of the file, its SHA-256, the licence that its metadata names."""
    dropped_bytes: dict[str, int] = field(default_factory=dict)

    def put(self, path: str, text: str, mode: int = 0o644) -> None:
        """Writes a file of text."""
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, "utf-8")
        target.chmod(mode)

    def copy(self, source: Path, path: str, mode: int = 0o644) -> None:
        """Copies a file."""
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        target.chmod(mode)

    def link(self, path: str, to: str) -> None:
        """Makes a symbolic link."""
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(to)


@dataclass(frozen=True)
class Build:
    """What is the same for all packages of one build."""

    release: Release
    release_name: str
    arch: str
    version: str
    epoch: int
    cache: Path
    work: Path
    compression: str
    python: str = sys.executable

    @property
    def machine(self) -> str:
        return MACHINES[self.arch]

    @property
    def sites(self) -> str:
        """Where the environment's own libraries lie."""
        return f"{PREFIX}/lib/python{self.release.python}/site-packages"
