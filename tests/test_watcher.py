"""The watcher says "look again" for every way in which a file can come, and outlives its folder."""

from __future__ import annotations

import ctypes
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from edged import inotify
from edged import watcher as module
from edged.cli import publish
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


def test_reading_is_no_event(root: Path) -> None:
    """Our own scans and copies ring nothing, or each scan would be the cause of the next."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        assert libc.inotify_add_watch(descriptor, os.fsencode(root), ctypes.c_uint32(inotify._MASK)) > 0
        (root / "old.onnx").read_bytes()
        assert sorted(os.listdir(root)) == ["net", "old.onnx"]
        with pytest.raises(BlockingIOError):  # the kernel queues an event before the call returns
            os.read(descriptor, 4096)
    finally:
        os.close(descriptor)


def bundle(at: Path, content: bytes) -> Path:
    """A bundle with directories in it, as `edgectl put` writes one under a hidden name."""
    (at / "golden" / "0").mkdir(parents=True)
    (at / "golden" / "0" / "x.npy").write_bytes(content)
    (at / "model.onnx").write_bytes(content)
    return at


def exchange(one: Path, other: Path) -> None:
    """Two names change places in one system call."""
    publish._renameat2(one, other, publish._RENAME_EXCHANGE)


def test_directories_that_change_places_stay_watched(root: Path, bell: Bell, watcher: Watcher) -> None:
    """Each exchange rings at once, and so does what is changed in the new directory afterwards."""
    bundle(root / "digits", b"first")
    threads: list[str] = []
    for turn in range(20):
        watcher.check()
        bell.hush()
        fresh = bundle(root / f".digits.{turn}.part", b"next")
        bell.hush()
        exchange(fresh, root / "digits")
        assert bell.wait()
        shutil.rmtree(fresh)
        watcher.check()
        bell.hush()
        (root / "digits" / "golden" / "0" / "x.npy").write_bytes(b"changed")
        assert bell.wait()
        threads.append(str(sorted(thread.name for thread in threading.enumerate())))
    assert len(set(threads)) == 1  # one and the same thread has lived through it
    assert watcher.fault is None


def test_what_rings_while_directories_come_and_go_under_load_is_the_last_change(root: Path) -> None:
    """Whoever looks at each ring, as the daemon does, ends up having seen the last state."""
    rings = threading.Semaphore(0)
    faults: list[OSError] = []

    def churn(name: str) -> None:
        try:
            place = bundle(root / name, b"0")
            for turn in range(60):
                fresh = bundle(root / f".{name}.{turn}.part", b"next")
                exchange(fresh, place)
                shutil.rmtree(fresh)
                os.rename(place, root / f"{name}.moved")
                if turn % 3 == 0:
                    shutil.rmtree(root / f"{name}.moved")
                    bundle(place, b"again")
                else:
                    os.rename(root / f"{name}.moved", place)
            (place / "golden" / "0" / "last").write_bytes(b"last")
        except OSError as fault:  # shown by the test's own thread
            faults.append(fault)

    names = ("a", "b", "c")
    with Watcher(root, rings.release) as watcher:
        writers = [threading.Thread(target=churn, args=(name,)) for name in names]
        for writer in writers:
            writer.start()
        seen: set[str] = set()
        while len(seen) < len(names):
            assert rings.acquire(timeout=WAIT_S), f"nothing rang any more; seen {seen}, {faults}"
            watcher.check()
            seen = {n for n in names if (root / n / "golden" / "0" / "last").exists()}
        for writer in writers:
            writer.join(WAIT_S)
        assert not faults
        assert watcher.fault is None


def test_a_link_in_a_circle_is_followed_once(root: Path, bell: Bell) -> None:
    """Links within the folder are followed, those that lead out of it or round and round do no harm."""
    (root / "net" / "again").symlink_to(root)
    (root / "out").symlink_to("/usr")
    with Watcher(root, bell) as watcher:
        assert watcher.fault is None
        assert len(watcher._watches) == 2


def test_more_directories_than_can_be_watched_are_said(
    root: Path, bell: Bell, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rest is seen at the rescan, and the root still rings."""
    monkeypatch.setattr(module, "_DIRECTORIES_MAX", 2)
    (root / "more").mkdir()
    with Watcher(root, bell) as watcher:
        assert "more than 2 directories" in (watcher.fault or "")
        bell.hush()
        (root / "new.onnx").write_bytes(b"x")
        assert bell.wait()


def test_a_thread_that_died_is_replaced_by_the_next_check(
    root: Path, bell: Bell, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever ends the thread, the next check has events come again, and stop does not raise."""
    died = threading.Event()
    monkeypatch.setattr(threading, "excepthook", lambda _args: died.set())
    may_fail = True

    def notify() -> None:
        if may_fail and threading.current_thread().name == "inotify":
            raise RuntimeError("not quick and not safe")
        bell()

    with Watcher(root, notify) as watcher:
        (root / "new.onnx").write_bytes(b"x")
        assert died.wait(WAIT_S)
        assert watcher._inotify is not None
        watcher._inotify._thread.join(WAIT_S)
        may_fail = False
        bell.hush()
        watcher.check()
        assert bell.wait()
        bell.hush()
        (root / "newer.onnx").write_bytes(b"x")
        assert bell.wait()
        may_fail = True
        died.clear()
        (root / "newest.onnx").write_bytes(b"x")
        assert died.wait(WAIT_S)


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

    def no_more_watches(_notify: object) -> None:
        raise OSError(28, "inotify watch limit reached")

    monkeypatch.setattr(module, "Inotify", no_more_watches)
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
