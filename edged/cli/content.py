"""What stands in the models folder under a name, named as the daemon will name it.

The daemon's own `scan` and digest are asked, so that `edgectl put` knows what it has published by the same
words in which the daemon tells its verdict, and a refusal that the folder alone decides needs no daemon.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edged.repository import Entry, scan
from edged.store import StoreError, content_digest

__all__ = ["Content", "Standing", "contents", "standing"]


@dataclass(frozen=True)
class Content:
    """One model, or one version of one, by what the daemon knows it by: the SHA-256 of its files, and of its
    settings as they are read. `version` is the folder's own, None where it gives none."""

    version: int | None
    sha256: str
    settings_sha256: str


@dataclass(frozen=True)
class Standing:
    """The entries of one name in the folder, versions policy applied; no entries: nothing is there.

    `problem` is (reason, message) of what keeps them from being served.
    """

    entries: tuple[Entry, ...] = ()
    problem: tuple[str, str] | None = None


def standing(models: Path, source: str) -> Standing:
    """What `source`, a name in the folder, stands for."""
    snapshot = scan(models)
    if snapshot.fault is not None:
        return Standing(problem=("FOLDER_FAULT", snapshot.fault))
    everything = (*snapshot.entries.values(), *snapshot.rivals)
    found = tuple(entry for entry in everything if entry.source == source)
    problem = next((entry.problem for entry in found if entry.problem is not None), None)
    return Standing(found, problem)


def contents(models: Path, found: Standing) -> tuple[tuple[Content, ...], tuple[str, str] | None]:
    """The contents of what was found, or what is wrong with its files as (reason, message)."""
    if found.problem is not None:
        return (), found.problem
    if not found.entries:
        return (), ("NOT_A_MODEL", "nothing in the models folder is a model under this name")
    try:
        return tuple(
            Content(e.version, content_digest(models, e), e.settings.sha256()) for e in found.entries
        ), None
    except StoreError as error:
        return (), (error.reason, error.message)
