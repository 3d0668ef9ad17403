"""The store: exactly what was seen or nothing, durable or not there, and books that survive damage."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edged import store as module
from edged.config import ModelSettings
from edged.copies import DamagedCopyError, check_copy
from edged.repository import Entry, FileStamp, scan
from edged.store import Staged, Store, StoreError, content_digest, is_being_written

REPOSITORY = Path(__file__).parent.parent


def put(root: Path, path: str, data: bytes) -> Path:
    """A file below the root, its directories made."""
    target = root / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(data)
    return target


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def find(root: Path, name: str = "net", version: int | None = None) -> Entry:
    """The entry as a scan sees it now."""
    entry = scan(root).entries[name, version]
    assert entry.problem is None
    return entry


def open_store(
    tmp_path: Path, *, keep_versions: int = 2, max_bytes: int | None = None, disk_free_min_bytes: int = 0
) -> Store:
    return Store(
        tmp_path / "state",
        keep_versions=keep_versions,
        max_bytes=max_bytes,
        disk_free_min_bytes=disk_free_min_bytes,
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    path = tmp_path / "models"
    path.mkdir()
    return path


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_store(tmp_path) as store:
        yield store


def stage(store: Store, root: Path, data: bytes, name: str = "net") -> Staged:
    """NAME.onnx with these bytes, staged."""
    put(root, f"{name}.onnx", data)
    return store.stage(root, find(root, name))


def mark(store: Store, staged: Staged, name: str = "net", version: int | None = None) -> None:
    settings = ModelSettings(threads=2).to_wire()
    store.mark_good(name, version, staged.digest, entry_format="onnx", settings_wire=settings)


def refusal(store: Store, root: Path, entry: Entry) -> StoreError:
    """The error of a stage that must fail, and that must leave nothing behind."""
    before = contents(store)
    with pytest.raises(StoreError) as caught:
        store.stage(root, entry)
    assert contents(store) == before
    assert list(store._temporary.iterdir()) == []
    return caught.value


def contents(store: Store) -> set[str]:
    return {path.name for path in store._contents.iterdir()}


# ---- what a copy is


def test_a_single_file_is_known_by_its_own_sha256(store: Store, root: Path) -> None:
    """NAME.onnx and NAME/model.onnx with the same bytes are the same content."""
    staged = stage(store, root, b"weights")
    assert staged.digest == sha256(b"weights")
    assert staged.model_path.read_bytes() == b"weights"
    assert (staged.size_bytes, staged.version, staged.known_good, staged.golden_dir) == (7, 1, False, None)
    put(root, "other/model.onnx", b"weights")
    assert store.stage(root, find(root, "other")).path == staged.path


def test_a_bundle_keeps_its_shape(store: Store, root: Path) -> None:
    """External data and golden samples lie beside the model as they did; any of them changes the content."""
    put(root, "net/model.onnx", b"graph")
    put(root, "net/deep/weights.bin", b"1")
    put(root, "net/golden/0.json", b"{}")
    put(root, "net/manifest.json", b"theirs")
    first = store.stage(root, find(root))
    assert (first.path / "deep/weights.bin").read_bytes() == b"1"
    assert (first.path / "manifest.json").read_bytes() == b"theirs"
    assert first.golden_dir == first.path / "golden"
    put(root, "net/deep/weights.bin", b"2")
    second = store.stage(root, find(root))
    assert second.digest != first.digest
    assert (first.version, second.version) == (1, 2)


def test_openvino_ir_is_renamed_together(store: Store, root: Path) -> None:
    """NAME.xml and NAME.bin stay a pair whatever NAME is, so that the name is no part of the content."""
    for name in ("a", "b"):
        put(root, f"{name}.xml", b"<net/>")
        put(root, f"{name}.bin", b"weights")
    first, second = (store.stage(root, find(root, name)) for name in ("a", "b"))
    assert first.path == second.path
    assert first.model_path.name == "model.xml"
    assert (first.path / "model.bin").read_bytes() == b"weights"


def test_copies_are_private_and_have_one_name(store: Store, root: Path) -> None:
    """Files are 0440 with one link, directories 0700; a source with many links is copied all the same."""
    source = put(root, "net.onnx", b"weights")
    os.link(source, root / ".second-name")
    staged = store.stage(root, find(root))
    status = staged.model_path.stat()
    assert (stat.S_IMODE(status.st_mode), status.st_nlink) == (0o440, 1)
    assert status.st_ino != source.stat().st_ino
    for directory in (staged.path, *list(staged.path.parents)[:3]):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700


def test_the_same_content_is_not_copied_twice(
    store: Store, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new file with old bytes costs reading, not writing, and is no new version."""
    first = stage(store, root, b"weights")

    def no_copy(*_: object) -> int:
        raise AssertionError("copied again")

    monkeypatch.setattr(module, "_clone_or_copy", no_copy)
    assert stage(store, root, b"weights") == first


def test_the_same_files_are_not_read_again_in_the_next_life(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By their stamps they are what they were; touched, they are hashed, and a damaged copy is made anew."""
    with open_store(tmp_path) as store:
        first = stage(store, root, b"weights")
    hashed: list[int] = []
    read = module.hash_file
    monkeypatch.setattr(module, "hash_file", lambda fd: hashed.append(fd) or read(fd))
    with open_store(tmp_path) as store:
        assert store.stage(root, find(root)) == first
        assert not hashed
        os.utime(root / "net.onnx")
        assert store.stage(root, find(root)) == first
        assert len(hashed) == 1
        (first.model_path.parent / "model.onnx").unlink()
        assert store.stage(root, find(root)).digest == first.digest
        assert first.model_path.read_bytes() == b"weights"
        assert stage(store, root, b"other 7").digest == sha256(b"other 7")


def test_stamps_of_whole_seconds_tell_nothing_about_files_of_just_now(root: Path) -> None:
    """A file system that counts in seconds may hide a change within the same one."""

    def source(ctime_s: float) -> module._Source:
        return module._Source("", FileStamp("net.onnx", 1, 1, 1, 1, int(ctime_s * 1e9)), "model.onnx")

    now_s = int(time.time())
    assert not module._is_telling([source(now_s)])
    assert module._is_telling([source(now_s + 0.25)])
    assert module._is_telling([source(now_s - 60)])


def test_a_copy_with_a_second_name_or_another_size_is_made_anew(store: Store, root: Path) -> None:
    """What is no longer ours alone, or was cut, is not trusted."""
    staged = stage(store, root, b"weights")
    inode = staged.model_path.stat().st_ino
    os.link(staged.model_path, root.parent / "second-name")
    assert stage(store, root, b"weights").model_path.stat().st_ino != inode
    staged.model_path.chmod(0o640)
    os.truncate(staged.model_path, 3)
    assert stage(store, root, b"weights").model_path.read_bytes() == b"weights"


@pytest.mark.parametrize("number", [errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP])
def test_copies_by_hand_where_the_kernel_cannot(
    store: Store, root: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Without reflinks and copy_file_range the bytes arrive all the same."""

    def refuse(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(module.os, "copy_file_range", refuse)
    data = os.urandom(3 << 20)
    assert stage(store, root, data).digest == sha256(data)


# ---- files that are not at rest


def test_a_file_that_is_open_for_writing_is_not_taken(store: Store, root: Path) -> None:
    """While a writer has it open the copy is refused as BEING_WRITTEN; afterwards it is taken."""
    path = put(root, "net.onnx", b"half")
    with open(path, "ab"):
        assert refusal(store, root, find(root)).reason == "BEING_WRITTEN"
    assert store.stage(root, find(root)).digest == sha256(b"half")


def test_a_writer_is_seen_and_never_made_to_wait(root: Path) -> None:
    """The lease is given back at once: a writer that comes afterwards opens without waiting."""
    path = put(root, "net.onnx", b"x")
    descriptor = os.open(path, os.O_RDONLY)
    try:
        assert not is_being_written(descriptor)
        assert fcntl.fcntl(descriptor, fcntl.F_GETLEASE) == fcntl.F_UNLCK
        with open(path, "ab"):
            assert is_being_written(descriptor)
    finally:
        os.close(descriptor)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become a user without rights")
def test_another_users_file_is_left_to_the_settle_time(root: Path) -> None:
    """Where a lease is not ours to take, nothing is claimed about writers."""
    path = put(root, "net.onnx", b"x")
    path.chmod(0o644)
    program = (
        "import os, sys, edged.store as s\n"
        "descriptor = os.open(sys.argv[1], os.O_RDONLY)\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "print(s.is_being_written(descriptor))\n"
    )
    with open(path, "ab"):
        command = [sys.executable, "-c", program, path]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert done.stdout == "False\n"


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.write_bytes(b"other"),
        lambda path: path.write_bytes(b"a longer one"),
        lambda path: os.truncate(path, 2),
        lambda path: (path.with_name("new").write_bytes(b"other"), os.rename(path.with_name("new"), path)),
        lambda path: path.unlink(),
    ],
    ids=["overwritten", "longer", "cut", "replaced", "removed"],
)
@pytest.mark.parametrize("moment", ["before", "while"])
def test_what_changes_around_copying_is_refused(
    store: Store, root: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], object], moment: str
) -> None:
    """Before the copy or in the middle of it: what is not what was seen is CHANGED_WHILE_COPYING."""
    path = put(root, "net/model.onnx", b"first")
    os.utime(path, (1, 1))  # or a change in the same tick of the kernel's clock would have the same stamp
    put(root, "net/weights.bin", b"data")
    entry = find(root)
    copy = module._clone_or_copy

    def copy_then_change(source: int, target: int, size_bytes: int) -> int:
        copied_bytes = copy(source, target, size_bytes)
        if size_bytes == len(b"data"):  # the second file of the bundle
            change(path)
        return copied_bytes

    if moment == "before":
        change(path)
    else:
        monkeypatch.setattr(module, "_clone_or_copy", copy_then_change)
    assert refusal(store, root, entry).reason == "CHANGED_WHILE_COPYING"


def test_a_link_turned_outwards_after_the_scan_is_refused(store: Store, root: Path) -> None:
    """What is opened is judged by where it really lies, and a pipe does not hold the store up."""
    path = put(root, "net.onnx", b"x")
    entry = find(root)
    path.unlink()
    os.symlink("/etc/passwd", path)
    assert refusal(store, root, entry).reason == "UNSAFE_FILE"
    path.unlink()
    os.mkfifo(path)
    assert refusal(store, root, entry).reason == "UNSAFE_FILE"


# ---- sums


def test_sums_tell_a_stalled_copy_from_a_finished_one(store: Store, root: Path) -> None:
    """A bundle with SHA256SUMS is taken only when every file is named, there, and as it says."""

    def sums(**files: bytes) -> None:
        lines = [f"{sha256(data)}  {name.replace('_', '.', 1)}\n" for name, data in files.items()]
        put(root, "net/SHA256SUMS", "".join(lines).encode())

    put(root, "net/model.onnx", b"gra")
    sums(model_onnx=b"graph", weights_bin=b"w")
    assert refusal(store, root, find(root)).reason == "CHECKSUM_MISMATCH"
    put(root, "net/model.onnx", b"graph")
    assert "not there" in refusal(store, root, find(root)).message
    put(root, "net/weights.bin", b"w")
    staged = store.stage(root, find(root))
    assert not (staged.path / "SHA256SUMS").exists()
    put(root, "net/more.bin", b"m")
    assert "not named" in refusal(store, root, find(root)).message
    (root / "net/more.bin").unlink()
    sums(model_onnx=b"other", weights_bin=b"w")
    assert refusal(store, root, find(root)).reason == "CHECKSUM_MISMATCH"
    put(root, "net/SHA256SUMS", b"nonsense\n")
    assert "line 1" in refusal(store, root, find(root)).message


def test_sums_do_not_change_the_content(store: Store, root: Path) -> None:
    """With and without SHA256SUMS, and with sums that name the settings, the content is the same."""
    put(root, "net/model.onnx", b"graph")
    bare = store.stage(root, find(root))
    put(root, "net/model.toml", b"threads = 1\n")
    lines = f"{sha256(b'graph')} *./model.onnx\n{sha256(b'threads = 1' + bytes([10]))}  model.toml\n"
    put(root, "net/SHA256SUMS", lines.encode())
    assert store.stage(root, find(root)) == bare
    put(root, "net/model.toml", b"threads = 2\n")
    assert refusal(store, root, find(root)).reason == "CHECKSUM_MISMATCH"


def test_the_digest_can_be_had_without_a_copy(store: Store, root: Path) -> None:
    """Whoever publishes names the content as the store will, for every kind of entry."""
    put(root, "file.onnx", b"graph")
    put(root, "ir.xml", b"<net/>")
    put(root, "ir.bin", b"weights")
    put(root, "bundle/model.onnx", b"graph")
    put(root, "bundle/golden/0.json", b"{}")
    put(root, "bundle/model.toml", b"threads = 1\n")
    put(root, "many/3/model.onnx", b"three")
    put(root, "sums/model.onnx", b"graph")
    put(root, "sums/weights.bin", b"w")
    lines = f"{sha256(b'graph')}  model.onnx\n{sha256(b'w')}  weights.bin\n"
    put(root, "sums/SHA256SUMS", lines.encode())
    for name, version in (("file", None), ("ir", None), ("bundle", None), ("many", 3), ("sums", None)):
        entry = find(root, name, version)
        assert content_digest(root, entry) == store.stage(root, entry).digest
    put(root, "sums/weights.bin", b"v")
    with pytest.raises(StoreError, match="CHECKSUM_MISMATCH"):
        content_digest(root, find(root, "sums"))


# ---- room


def test_too_little_room_is_refused_with_figures(tmp_path: Path, root: Path) -> None:
    """Before anything is copied: needed and free bytes are in the message."""
    with open_store(tmp_path, disk_free_min_bytes=1 << 60) as store:
        put(root, "net.onnx", b"x" * 1234)
        error = refusal(store, root, find(root))
    assert error.reason == "DISK_FULL"
    assert "1234 bytes are needed" in error.message
    assert "are free" in error.message


def test_a_disk_that_fills_while_copying_leaves_nothing(
    store: Store, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ENOSPC in the middle is DISK_FULL, and the half copy is gone."""
    copy = module._clone_or_copy

    def fill(source: int, target: int, size_bytes: int) -> int:
        copy(source, target, size_bytes // 2)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "_clone_or_copy", fill)
    put(root, "net.onnx", b"x" * 4096)
    assert refusal(store, root, find(root)).reason == "DISK_FULL"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small tmpfs")
def test_a_disk_that_really_is_full(tmp_path: Path, root: Path) -> None:
    """On a file system of one megabyte, a model of two is refused and a small one still staged."""
    (tmp_path / "state").mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", tmp_path / "state"],
        capture_output=True,
        check=False,
    )
    if mounted.returncode != 0:
        pytest.skip("may not mount here")
    try:
        with open_store(tmp_path) as store:
            put(root, "net.onnx", os.urandom(2 << 20))
            assert refusal(store, root, find(root)).reason == "DISK_FULL"
            assert stage(store, root, b"small", "small").digest == sha256(b"small")
    finally:
        subprocess.run(["umount", tmp_path / "state"], check=True)


def test_the_quota_evicts_the_old_and_never_what_serves(tmp_path: Path, root: Path) -> None:
    """[store] max_bytes makes room by evicting, refuses what can never fit, and keeps the last good."""
    with open_store(tmp_path, max_bytes=2500 + (1 << 20)) as store:
        big = (1 << 20) - 1000
        good = stage(store, root, b"g" * 2000, "good")
        mark(store, good, "good")
        old = stage(store, root, b"o" * big)
        store.collect(set())
        stage(store, root, b"n" * big)
        assert contents(store) == {good.digest, sha256(b"n" * big)}
        assert old.digest not in contents(store)
        put(root, "net.onnx", b"m" * big)
        assert refusal(store, root, find(root)).reason == "STORE_FULL"  # the newest may be loading
        put(root, "net.onnx", b"h" * (1 << 21))
        assert refusal(store, root, find(root)).reason == "TOO_LARGE"


def test_collect_keeps_what_serves_what_was_good_and_the_newest(tmp_path: Path, root: Path) -> None:
    """Everything else goes, whatever the order of use."""
    with open_store(tmp_path, keep_versions=2) as store:
        staged = [stage(store, root, bytes([number])) for number in range(6)]
        mark(store, staged[1])
        store.collect({staged[0].digest})
        assert contents(store) == {staged[number].digest for number in (0, 1, 4, 5)}
        store.collect(set())
        assert contents(store) == {staged[number].digest for number in (1, 4, 5)}
        store.forget_model("net", None)
        store.collect(set())
        assert contents(store) == set()


# ---- versions and what was good


def test_each_new_content_has_the_next_number(tmp_path: Path, root: Path) -> None:
    """Numbers grow by one, survive restarts and removal, and the same bytes have the same number."""
    with open_store(tmp_path) as store:
        assert [stage(store, root, data).version for data in (b"a", b"b", b"a")] == [1, 2, 1]
        store.forget_model("net", None)
        store.collect(set())
    with open_store(tmp_path) as store:
        assert [stage(store, root, data).version for data in (b"c", b"b")] == [3, 2]
        put(root, "numbered/7/model.onnx", b"c")
        assert store.stage(root, find(root, "numbered", 7)).version == 7


def test_the_last_good_content_serves_after_a_restart(tmp_path: Path, root: Path) -> None:
    """What was marked good comes back with its settings, not what was staged since."""
    with open_store(tmp_path) as store:
        good = stage(store, root, b"good")
        mark(store, good)
        stage(store, root, b"bad")
        put(root, "numbered/7/model.onnx", b"seven")
        mark(store, store.stage(root, find(root, "numbered", 7)), "numbered", 7)
    with open_store(tmp_path) as store:
        first, second = store.last_good()
        assert (first.name, first.version, first.explicit_version, first.format) == ("net", 1, None, "onnx")
        assert first.settings == ModelSettings(threads=2)
        assert first.staged.known_good
        assert first.staged.model_path.read_bytes() == b"good"
        assert (second.name, second.version, second.explicit_version) == ("numbered", 7, 7)
        assert stage(store, root, b"good").known_good
        store.forget_model("net", None)
        assert [last.name for last in store.last_good()] == ["numbered"]


def test_a_last_good_copy_that_lost_a_file_is_said_and_left_out(tmp_path: Path, root: Path) -> None:
    """With nothing good before it nothing serves, and a notice says so."""
    with open_store(tmp_path) as store:
        staged = stage(store, root, b"good")
        mark(store, staged)
    staged.model_path.unlink()
    with open_store(tmp_path) as store:
        assert store.last_good() == []
        assert "net (version 1) or the record of its settings is missing or damaged" in store.notices[0]
        assert "nothing can serve" in store.notices[0]


def flip(path: Path, at: int = 0) -> None:
    """One bit of a file changes, as on a card that rots: neither its size nor its times do."""
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.chmod(0o640)
    path.write_bytes(data)
    path.chmod(0o440)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


# ---- damaged copies


def test_a_damaged_copy_is_set_aside_and_made_again_with_its_number(store: Store, root: Path) -> None:
    """The damaged bytes stay to be looked at; the folder's file, untouched since, is copied again."""
    staged = stage(store, root, b"weights")
    mark(store, staged)
    flip(staged.model_path)
    rotten = staged.model_path.read_bytes()
    grave = store.set_aside(staged.digest)
    assert grave is not None
    assert (grave / "files/model.onnx").read_bytes() == rotten
    assert contents(store) == set()
    again = store.stage(root, find(root))
    assert (again.digest, again.version, again.known_good) == (staged.digest, 1, True)
    assert again.model_path.read_bytes() == b"weights"
    assert store.set_aside("0" * 64) is None


def test_a_file_that_rotted_in_the_folder_is_no_new_version(store: Store, root: Path, tmp_path: Path) -> None:
    """Other bytes under the very stamps that were taken are refused; copied there again, they are taken."""
    staged = stage(store, root, b"weights")
    flip(staged.model_path)
    store.set_aside(staged.digest)
    record = store._models.data["net"]
    (root / "net.onnx").write_bytes(b"wEights")
    # As if the bit had changed below the file system, which tells of every write by a new time.
    record["seen"]["stamps"] = module._stamps(module._sources(root, find(root))[1])
    error = refusal(store, root, find(root))
    assert error.reason == "FILE_DAMAGED"
    assert "nobody has written to it" in error.message
    put(root, "net.onnx", b"weights")
    assert store.stage(root, find(root)).version == 1


def test_the_good_version_before_stands_in_with_its_own_settings(tmp_path: Path, root: Path) -> None:
    """Of three that served, the newest whose copy is there; what never served does not count."""
    with open_store(tmp_path, keep_versions=4) as store:
        staged = []
        for number, data in enumerate([b"one", b"two", b"three"], 1):
            staged.append(stage(store, root, data))
            settings = ModelSettings(threads=number).to_wire()
            store.mark_good("net", None, staged[-1].digest, entry_format="onnx", settings_wire=settings)
        stage(store, root, b"never served")
        store.set_aside(staged[2].digest)
        (before,) = store.without(staged[2].digest)
        assert (before.version, before.settings.threads, before.staged.known_good) == (2, 2, True)
        assert before.staged.model_path.read_bytes() == b"two"
    with open_store(tmp_path, keep_versions=4) as store:
        (last,) = store.last_good()
        assert (last.version, last.settings.threads) == (2, 2)
        assert "version 2 can serve in its place" in store.notices[0]
        store.collect(set())
        store.set_aside(staged[1].digest)
        assert [good.version for good in store.without(staged[1].digest)] == [1]
        store.set_aside(staged[0].digest)
        assert store.without(staged[0].digest) == []


def test_what_stands_in_is_not_evicted_for_the_copy_that_is_made_again(tmp_path: Path, root: Path) -> None:
    """Room is made of damaged copies first, and never of what is fallen back on."""
    with open_store(tmp_path, keep_versions=2, max_bytes=20) as store:
        for data in (b"version 1", b"version 2"):
            last = stage(store, root, data)
            mark(store, last)
        store.collect(set())
        store.set_aside(last.digest)
        (before,) = store.without(last.digest)
        with pytest.raises(StoreError, match="STORE_FULL"):
            stage(store, root, b"twelve bytes")
        assert before.staged.model_path.read_bytes() == b"version 1"
        assert not list(store._damaged.iterdir())


def test_few_damaged_copies_are_kept(store: Store, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dying card must not fill the disk with its own evidence: the oldest goes."""
    monkeypatch.setattr(module, "_DAMAGED_MAX", 2)
    digests = [stage(store, root, bytes([number])).digest for number in range(4)]
    for digest in digests:
        store.set_aside(digest)
    assert {path.name for path in store._damaged.iterdir()} == set(digests[-2:])


def test_a_damaged_copy_on_a_disk_that_takes_no_change_is_not_used(
    store: Store, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A card that fails often goes read-only; then its rotten copy cannot be moved, and is not trusted."""
    staged = stage(store, root, b"weights")
    mark(store, staged)

    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(module.os, "rename", refuse)
        with pytest.raises(StoreError, match="STORE_FAILED"):
            store.set_aside(staged.digest)
        with pytest.raises(StoreError, match="STORE_FAILED"):
            store.stage(root, find(root))
        assert store.last_good() == []
    assert store.stage(root, find(root)).digest == staged.digest
    assert [path.name for path in store._damaged.iterdir()] == [staged.digest]


def test_a_bit_in_the_record_of_settings_does_not_serve(tmp_path: Path, root: Path) -> None:
    """Golden samples and tolerances of a settings file are kept in the book, and must be what they were."""
    with open_store(tmp_path) as store:
        for data in (b"old", b"new"):
            mark(store, stage(store, root, data))
    path = tmp_path / "state" / "store" / "models.json"
    book = json.loads(path.read_bytes())
    assert book["net"]["last_good"]["settings"] == {"threads": 2}
    book["net"]["last_good"]["settings"]["threads"] = 3
    path.write_text(json.dumps(book))
    with open_store(tmp_path) as store:
        (last,) = store.last_good()
        assert (last.version, last.settings.threads) == (2, 2), "its second record is whole"
        assert "record of its settings" in store.notices[0]
    book["net"]["contents"][-1]["served"]["settings"]["threads"] = 3
    path.write_text(json.dumps(book))
    with open_store(tmp_path) as store:
        assert [(good.version, good.settings.threads) for good in store.last_good()] == [(1, 2)]
    for content in book["net"]["contents"]:
        del content["served"]
    del book["net"]["last_good"]["sum"]
    path.write_text(json.dumps(book))
    with open_store(tmp_path) as store:
        (last,) = store.last_good()
        assert (last.version, last.settings.threads) == (2, 3), "an edged before this one wrote no sums"


@pytest.mark.parametrize("step", ["rename", "_sync_directory", "utime"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_while_a_damaged_copy_is_replaced(tmp_path: Path, root: Path, step: str, when: str) -> None:
    """After kill -9 anywhere the damaged copy is where it was or aside, and a sound one can be made."""
    with open_store(tmp_path) as store:
        staged = stage(store, root, b"weights" * 10_000)
        mark(store, staged)
        flip(staged.model_path)
        aside = store._damaged / staged.digest
    program = f"""
import os, signal, sys, pathlib
import edged.store as s
from edged.repository import scan
owner = os if hasattr(os, "{step}") else s
real = getattr(owner, "{step}")
def deadly(*args, **kwargs):
    if "{when}" == "after":
        real(*args, **kwargs)
    os.kill(os.getpid(), signal.SIGKILL)
state, root, digest = map(pathlib.Path, sys.argv[1:])
store = s.Store(state, keep_versions=1, max_bytes=None, disk_free_min_bytes=0)
setattr(owner, "{step}", deadly)
store.set_aside(str(digest))
"""
    command = [sys.executable, "-c", program, tmp_path / "state", root, staged.digest]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == -signal.SIGKILL, done.stderr
    with open_store(tmp_path) as store:
        assert contents(store) | {path.name for path in store._damaged.iterdir()} == {staged.digest}
        if staged.digest in contents(store):
            with pytest.raises(DamagedCopyError):
                check_copy(store.copy_path(staged.digest))
            store.set_aside(staged.digest)
        again = store.stage(root, find(root))
        check_copy(store.copy_path(again.digest))
        assert (again.digest, again.version) == (staged.digest, 1)
        assert aside.exists()


# ---- books


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"net": "x"}', b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_book_is_set_aside_and_said(tmp_path: Path, root: Path, damage: bytes) -> None:
    """No damage keeps the daemon from starting; the damaged book stays for whoever wants to look."""
    with open_store(tmp_path) as store:
        mark(store, stage(store, root, b"x"))
    for book in ("models", "attempts", "choices", "sizes"):
        (tmp_path / "state" / "store" / f"{book}.json").write_bytes(damage)
    with open_store(tmp_path) as store:
        assert len(store.notices) == 4
        assert (tmp_path / "state" / "store" / "models.damaged").read_bytes() == damage
        assert stage(store, root, b"x").version == 1


def test_a_record_of_another_versions_costs_that_record_only(tmp_path: Path, root: Path) -> None:
    """After a step back to an older edged the models that it understands keep their numbers and copies."""
    with open_store(tmp_path) as store:
        mark(store, stage(store, root, b"x"))
        mark(store, stage(store, root, b"y", "other"), "other")
    path = tmp_path / "state" / "store" / "models.json"
    book = json.loads(path.read_bytes())
    book["net"]["last_good"]["settings"] = {"keep_alive": "5m"}
    path.write_text(json.dumps(book))
    with open_store(tmp_path) as store:
        assert [good.name for good in store.last_good()] == ["other"]
        assert len(store.notices) == 1
        assert "keep_alive" in store.notices[0]
        assert "net" in json.loads(path.with_suffix(".damaged").read_bytes())


def test_a_full_disk_does_not_keep_the_store_from_opening(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was last good must serve after a restart, whatever else has filled the disk."""
    with open_store(tmp_path) as store:
        mark(store, stage(store, root, b"x"))

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.os, "pwrite", full)
    with open_store(tmp_path) as store:
        assert [good.name for good in store.last_good()] == ["net"]


def test_a_book_is_replaced_whole(store: Store, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a sync fails the old book stays as it was and the new one is dropped."""
    store.remember_choice("key", {"runtime": "openvino"})
    book = store._root / "choices.json"
    before = book.read_bytes()

    def fail(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(module.os, "fsync", fail)
    with pytest.raises(StoreError, match="STORE_FAILED"):
        store.remember_choice("other", {})
    assert book.read_bytes() == before
    assert not list(store._root.glob(".*"))


def test_choices_are_remembered_and_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is used stays, the longest unused goes, and all survive a restart."""
    monkeypatch.setattr(module, "_CHOICES_MAX", 3)
    with open_store(tmp_path) as store:
        for key in ("a", "b", "c"):
            store.remember_choice(key, {"key": key})
        assert store.recall_choice("a") == {"key": "a"}
        store.remember_choice("d", {"key": "d"})
    with open_store(tmp_path) as store:
        assert store.recall_choice("b") is None
        assert [store.recall_choice(key) for key in "acd"] == [{"key": key} for key in "acd"]


def test_sizes_are_remembered_and_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By content; a record that is none costs that content's sizes only."""
    monkeypatch.setattr(module, "_SIZES_MAX", 3)
    sizes = [{"shapes": {"x": [1, 3, 640, 640]}, "count": 9, "uid": 0}]
    with open_store(tmp_path) as store:
        assert store.recall_sizes("a") is None
        for digest in ("a", "b", "c"):
            store.remember_sizes(digest, sizes)
        assert store.recall_sizes("a") == sizes
        store.remember_sizes("d", sizes)
    path = tmp_path / "state" / "store" / "sizes.json"
    book = json.loads(path.read_bytes())
    assert list(book) == ["c", "a", "d"]
    path.write_text(json.dumps({**book, "d": [{**sizes[0], "count": "many"}], "c": []}))
    with open_store(tmp_path) as store:
        assert [store.recall_sizes(digest) for digest in "abcd"] == [sizes, None, None, None]
        assert len(store.notices) == 1


def test_two_interrupted_attempts_quarantine_a_content(tmp_path: Path) -> None:
    """One crash may have been the power; after the second the content waits until someone asks."""
    digest = "a" * 64
    program = (
        "import os, sys, signal, pathlib, edged.store as s\n"
        "store = s.Store(pathlib.Path(sys.argv[1]), keep_versions=1, max_bytes=None, disk_free_min_bytes=0)\n"
        f"print(store.begin_attempt('{digest}'), store.begin_attempt('{digest}'), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    for earlier in (0, 1):
        with open_store(tmp_path) as store:
            assert not store.quarantined(digest)
        done = subprocess.run(
            [sys.executable, "-c", program, tmp_path / "state"],
            capture_output=True,
            text=True,
            cwd=REPOSITORY,
        )
        assert (done.returncode, done.stdout) == (-signal.SIGKILL, f"{earlier} {earlier}\n")
    with open_store(tmp_path) as store:
        assert store.quarantined(digest)
        store.clear_quarantine(digest)
        assert not store.quarantined(digest)
    with open_store(tmp_path) as store:
        assert not store.quarantined(digest)


def test_content_that_has_served_survives_more_power_cuts(tmp_path: Path, root: Path) -> None:
    """A supply that flaps at boot must not cost a model that served for months."""
    with open_store(tmp_path) as store:
        good = stage(store, root, b"good")
        mark(store, good)
    program = (
        "import os, sys, signal, pathlib, edged.store as s\n"
        "store = s.Store(pathlib.Path(sys.argv[1]), keep_versions=1, max_bytes=None, disk_free_min_bytes=0)\n"
        "store.begin_attempt(sys.argv[2])\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    for _ in range(8):
        with open_store(tmp_path) as store:
            assert not store.quarantined(good.digest)
        arguments = [sys.executable, "-c", program, tmp_path / "state", good.digest]
        assert subprocess.run(arguments, cwd=REPOSITORY).returncode == -signal.SIGKILL
    with open_store(tmp_path) as store:
        assert store.quarantined(good.digest)


def test_an_attempt_that_ends_or_a_clean_stop_counts_for_nothing(tmp_path: Path) -> None:
    """A load that failed, and a stop in the middle of a load, are no crashes."""
    for _ in range(3):
        with open_store(tmp_path) as store:
            assert store.begin_attempt("a" * 64) == 0
            store.end_attempt("a" * 64)
            assert store.begin_attempt("b" * 64) == 0
            assert store.begin_attempt("b" * 64) == 0


# ---- one owner, and sudden death


def test_the_end_of_a_good_contents_attempt_waits_for_a_quiet_moment(tmp_path: Path, root: Path) -> None:
    """Its beginning is on disk before the load, its end by `rest` or by the next beginning."""
    book = tmp_path / "state" / "store" / "attempts.json"
    with open_store(tmp_path) as store:
        good = stage(store, root, b"good").digest
        mark(store, stage(store, root, b"good"))
        new = stage(store, root, b"new", "other").digest
        store.begin_attempt(good)
        store.end_attempt(good)
        assert json.loads(book.read_bytes()) == {good: 1}
        store.begin_attempt(new)
        assert json.loads(book.read_bytes()) == {new: 1}
        store.end_attempt(new)
        assert json.loads(book.read_bytes()) == {}
        store.begin_attempt(good)
        store.end_attempt(good)
        store.rest()
        assert json.loads(book.read_bytes()) == {}


def test_verdicts_are_kept_while_nothing_changes(tmp_path: Path) -> None:
    """Under another mark there is none, and a record of another shape costs that record only."""
    verdict = {"runtime": "onnxruntime", "device": "CPU", "status": "ok"}
    with open_store(tmp_path) as store:
        store.remember_verdict("onnxruntime:CPU", "a", verdict)
        store.remember_verdict("onnxruntime:CUDA:0", "a", verdict)
        store.forget_verdict("onnxruntime:CUDA:0")
    with open_store(tmp_path) as store:
        assert store.recall_verdict("onnxruntime:CPU", "a") == verdict
        assert store.recall_verdict("onnxruntime:CPU", "b") is None
        assert store.recall_verdict("onnxruntime:CUDA:0", "a") is None
    book = tmp_path / "state" / "store" / "verdicts.json"
    book.write_text(json.dumps({**json.loads(book.read_text()), "x": {"mark": 7}, "y": []}))
    with open_store(tmp_path) as store:
        assert len(store.notices) == 1
        assert store.recall_verdict("onnxruntime:CPU", "a") == verdict


def test_a_state_directory_has_one_owner(tmp_path: Path) -> None:
    """A second daemon is refused with the process of the first; after its end the directory is free."""
    with open_store(tmp_path):
        with pytest.raises(StoreError, match=str(os.getpid())) as caught:
            open_store(tmp_path)
        assert caught.value.reason == "STATE_DIR_BUSY"
    open_store(tmp_path).close()


def test_a_state_directory_that_cannot_be_is_an_error_in_words(tmp_path: Path) -> None:
    """A file in its place is STATE_DIR_UNUSABLE."""
    put(tmp_path, "state", b"")
    with pytest.raises(StoreError) as caught:
        open_store(tmp_path)
    assert caught.value.reason == "STATE_DIR_UNUSABLE"


@pytest.mark.parametrize("step", ["_copy_file", "_sync_directory", "rename", "bundle_digest", "replace"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_at_any_step_of_publishing(tmp_path: Path, root: Path, step: str, when: str) -> None:
    """After kill -9 anywhere the next start finds a whole copy or none, and no litter."""
    put(root, "net/model.onnx", b"graph")
    put(root, "net/weights.bin", b"w" * 100_000)
    program = f"""
import os, signal, sys, pathlib
import edged.store as s
from edged.repository import scan
owner = os if hasattr(os, "{step}") else s
real = getattr(owner, "{step}")
def deadly(*args, **kwargs):
    if "{when}" == "after":
        real(*args, **kwargs)
    os.kill(os.getpid(), signal.SIGKILL)
state, root = map(pathlib.Path, sys.argv[1:])
store = s.Store(state, keep_versions=1, max_bytes=None, disk_free_min_bytes=0)
setattr(owner, "{step}", deadly)
store.stage(root, scan(root).entries["net", None])
"""
    command = [sys.executable, "-c", program, tmp_path / "state", root]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == -signal.SIGKILL, done.stderr
    with open_store(tmp_path) as store:
        assert store.notices == ()
        assert list(store._temporary.iterdir()) == []
        for digest in contents(store):
            check_copy(store.copy_path(digest))
        staged = store.stage(root, find(root))
        check_copy(store.copy_path(staged.digest))
        assert staged.version == 1
        store.collect(set())
        assert contents(store) == {staged.digest}
        assert json.loads((store._root / "models.json").read_bytes()).keys() == {"net"}


def test_an_unusable_source_is_said_not_raised(
    store: Store, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of the source's disk is a StoreError like any other."""
    put(root, "net.onnx", b"x")
    entry = find(root)

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(module, "open_regular", fail)
    assert refusal(store, root, entry).reason == "UNREADABLE"
