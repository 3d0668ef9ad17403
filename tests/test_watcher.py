"""The watcher says "look again" for every way in which a file can come, and outlives its folder."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from watchdog.events import FileClosedEvent, FileClosedNoWriteEvent, FileOpenedEvent

from edged import watcher as module
from edged.watcher import Watcher

WAIT_S = 20.0


class Bell:
    """Counts calls, and waits for one."""

    def __init__(self) -> None:
        self.rung = threading.Event()

    def __call__(self) -> None:
        self.rung.set()

    def wait(self) -> bool:
        """Whether it rang since the last wait, within a bound."""
        return self.rung.wait(WAIT_S)

    def hush(self) -> None:
        """Forgets what rang so far."""
        self.rung.clear()


@pytest.fixture
def bell() -> Bell:
    return Bell()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    path = tmp_path / "models"
    (path / "net").mkdir(parents=True)
    (path / "old.onnx").write_bytes(b"old")
    return path


@pytest.fixture
def watcher(root: Path, bell: Bell) -> Iterator[Watcher]:
    with Watcher(root, bell) as watcher:
        assert watcher.fault is None
        assert bell.wait()  # a new watch says so itself, since it may have missed something
        bell.hush()
        yield watcher


def test_each_way_for_a_file_to_come_or_go_is_noticed(
    tmp_path: Path, root: Path, bell: Bell, watcher: Watcher
) -> None:
    """A write, a rename in, a hard link, a directory's file, a link swap, a removal: each rings."""

    def rename_in() -> None:
        (tmp_path / "new").write_bytes(b"x")
        os.rename(tmp_path / "new", root / "moved.onnx")

    def swap() -> None:
        os.symlink("net", root / "..tmp")
        os.rename(root / "..tmp", root / "..data")

    for change in (
        lambda: (root / "new.onnx").write_bytes(b"x"),
        rename_in,
        lambda: os.link(root / "old.onnx", root / "linked.onnx"),
        lambda: (root / "net" / "model.onnx").write_bytes(b"x"),
        swap,
        lambda: (root / "linked.onnx").unlink(),
        lambda: os.utime(root / "old.onnx", (1, 1)),
    ):
        bell.hush()
        change()
        assert bell.wait()


def test_reading_is_no_event() -> None:
    """Our own scans and copies ring nothing, or each scan would be the cause of the next."""
    rung: list[str] = []
    handler = module._Handler(lambda: rung.append("rung"))
    handler.dispatch(FileOpenedEvent("/models/net.onnx"))
    handler.dispatch(FileClosedNoWriteEvent("/models/net.onnx"))
    assert rung == []
    handler.dispatch(FileClosedEvent("/models/net.onnx"))
    assert rung == ["rung"]


def test_a_root_deleted_and_made_anew_is_watched_again(root: Path, bell: Bell, watcher: Watcher) -> None:
    """The watch dies with its directory; the check after it was made anew repairs it."""
    (root / "net").rmdir()
    (root / "old.onnx").unlink()
    root.rmdir()
    watcher.check()
    assert "is not there" in (watcher.fault or "")
    root.mkdir()
    watcher.check()
    assert watcher.fault is None
    bell.hush()
    (root / "new.onnx").write_bytes(b"x")
    assert bell.wait()


def test_a_root_exchanged_between_two_checks_is_watched_again(
    root: Path, bell: Bell, watcher: Watcher
) -> None:
    """Another directory under the same name is noticed although the old one still is watched."""
    os.rename(root, root.with_name("away"))
    root.mkdir()
    watcher.check()
    bell.hush()
    (root / "new.onnx").write_bytes(b"x")
    assert bell.wait()


def test_a_root_that_comes_later_is_watched(tmp_path: Path, bell: Bell) -> None:
    """Starting without the folder is no error; it is watched from the check that finds it."""
    root = tmp_path / "later"
    with Watcher(root, bell) as watcher:
        assert "is not there" in (watcher.fault or "")
        root.mkdir()
        watcher.check()
        assert watcher.fault is None
        assert bell.wait()  # what came before the watch made no event


def test_a_linked_root_is_followed(tmp_path: Path, root: Path, bell: Bell) -> None:
    """The folder may be a link to where it really is."""
    link = tmp_path / "link"
    os.symlink(root, link)
    with Watcher(link, bell) as watcher:
        assert watcher.fault is None
        bell.hush()
        (root / "new.onnx").write_bytes(b"x")
        assert bell.wait()


def test_without_inotify_it_polls_and_says_why(
    root: Path, bell: Bell, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the kernel's limit is reached the folder is polled, and the reason names the limit."""

    def no_more_watches() -> None:
        raise OSError(28, "inotify watch limit reached")

    monkeypatch.setattr(module, "Observer", no_more_watches)
    monkeypatch.setattr(module, "_POLL_S", 0.05)
    with Watcher(root, bell) as watcher:
        assert "inotify watch limit reached" in (watcher.fault or "")
        assert "max_user_watches" in (watcher.fault or "")
        bell.hush()
        (root / "new.onnx").write_bytes(b"x")
        assert bell.wait()
        watcher.check()
        assert "polled" in (watcher.fault or "")


def test_after_stop_nothing_rings(root: Path, bell: Bell) -> None:
    """Stopping joins the observer's thread; stopping twice is harmless."""
    before = threading.active_count()
    watcher = Watcher(root, bell)
    watcher.start()
    watcher.stop()
    watcher.stop()
    assert threading.active_count() == before
    bell.hush()
    (root / "new.onnx").write_bytes(b"x")
    assert not bell.rung.is_set()
