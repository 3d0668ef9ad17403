"""The disk's threads: a disk that hangs over one thing does not hold up the others, and shows."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from edged.config import Config, ServerConfig
from edged.disk import SMALL_BYTES_MAX, Disk
from edged.events import (
    CopyHashed,
    CopySetAside,
    Event,
    FolderScanned,
    HashCopy,
    Scan,
    SetAside,
    Stage,
    Staged,
)
from edged.helper import Mailbox
from tests.e2e.harness import until

WAIT_S = 30.0


class Journal:
    """What was said."""

    def __init__(self) -> None:
        self.said: list[tuple[str, dict[str, object]]] = []

    def emit(self, kind: str, /, **fields: object) -> None:
        self.said.append((kind, fields))


class Rig:
    """A disk on scratch folders, and what it reports."""

    def __init__(self, root: Path) -> None:
        self.models = root / "models"
        self.models.mkdir()
        server = ServerConfig("ipc:///nowhere/edged.sock", self.models, root / "state", root / "cache")
        self.journal = Journal()
        self.bugs: list[str] = []
        self._woken = threading.Semaphore(0)
        self._mailbox = Mailbox(self._woken.release)
        config = Config(server)
        config = replace(config, resources=replace(config.resources, disk_free_min_bytes=0))
        self.disk = Disk(config, journal=self.journal, mailbox=self._mailbox, on_bug=self.bugs.append)

    def next(self) -> Event:
        """The next event that is not for the disk alone."""
        while True:
            assert self._woken.acquire(timeout=WAIT_S), "no word from the disk"
            event = self._mailbox.take()
            assert event is not None
            if not self.disk.takes(event):
                return event

    def staged(self, name: str, data: bytes) -> Staged:
        """A model of these bytes, dropped and copied."""
        (self.models / f"{name}.onnx").write_bytes(data)
        self.disk.scan(Scan(0.0))
        self.disk.tick(time.monotonic())
        scanned = self.next()
        assert isinstance(scanned, FolderScanned)
        self.disk.stage(Stage(scanned.snapshot.entries[name, None]))
        staged = self.next()
        assert isinstance(staged, Staged)
        return staged


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path)
    with made.disk:
        yield made
        made.disk.end()
    assert not made.bugs


def test_a_copy_is_hashed_and_its_damage_told(rig: Rig) -> None:
    """Sound, then with one bit changed, then set aside, when what served before it is looked up."""
    copy = rig.staged("m", b"weights").staged
    rig.disk.hash_copy(HashCopy(7, copy.digest, copy.size_bytes))
    assert rig.next() == CopyHashed(7)
    copy.model_path.chmod(0o640)
    copy.model_path.write_bytes(b"weighTs")
    rig.disk.hash_copy(HashCopy(8, copy.digest, copy.size_bytes))
    told = rig.next()
    assert isinstance(told, CopyHashed)
    assert (told.instance, told.reason) == (8, "COPY_DAMAGED")
    assert "model.onnx has other bytes" in told.message
    rig.disk.set_aside(SetAside(copy.digest))
    assert rig.next() == CopySetAside(copy.digest, ())
    assert not copy.model_path.exists()


def test_a_copy_that_staging_finds_incomplete_is_kept_and_told(rig: Rig) -> None:
    """Nothing is taken out of use without a word, whoever found out."""
    first = rig.staged("m", b"weights").staged
    first.model_path.chmod(0o640)
    first.model_path.write_bytes(b"cut")
    again = rig.staged("m", b"weights").staged
    assert again.model_path.read_bytes() == b"weights"
    ((kind, fields),) = rig.journal.said
    assert (kind, fields["MODEL"]) == ("copy_damaged", "m")
    assert str(fields["DETAIL"]).startswith(f"{first.digest}: a file is missing, was cut")
    assert rig.disk.store.set_aside(first.digest) is not None


@pytest.mark.parametrize("size_bytes", [SMALL_BYTES_MAX, SMALL_BYTES_MAX + 1])
def test_a_hash_that_hangs_holds_up_neither_the_folder_nor_the_other_kind(rig: Rig, size_bytes: int) -> None:
    """A large copy on a slow card must not keep small models from serving, nor new files from being seen."""
    hanging, other = rig.staged("hangs", b"one").staged, rig.staged("other", b"two").staged
    # Opening a FIFO waits for a writer, as reading from a disk that hangs does.
    hanging.model_path.unlink()
    os.mkfifo(hanging.model_path)
    rig.disk.hash_copy(HashCopy(1, hanging.digest, size_bytes))
    other_size = SMALL_BYTES_MAX + 1 if size_bytes <= SMALL_BYTES_MAX else 1
    rig.disk.hash_copy(HashCopy(2, other.digest, other_size))
    assert rig.next() == CopyHashed(2)
    assert rig.staged("third", b"three").staged.model_path.read_bytes() == b"three"
    until(lambda: rig.disk.busy_s(time.monotonic()) > 0, what="the hash that hangs shows")
    with hanging.model_path.open("wb"):
        told = rig.next()
    assert isinstance(told, CopyHashed)
    assert (told.instance, told.reason) == (1, "COPY_DAMAGED")
