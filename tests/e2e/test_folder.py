"""What people and tools do to a models folder, each ending in the right state."""

from __future__ import annotations

import contextlib
import hashlib
import os
import select
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edged.errors import EdgedError
from tests import zoo
from tests.e2e.harness import Daemon, ones, running_daemon, until, whole_number

pytestmark = pytest.mark.e2e

ORT = b'runtime = "onnxruntime"\n'


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One daemon for the module; each test has model names of its own."""
    with running_daemon(tmp_path_factory.mktemp("folder")) as daemon:
        pid = daemon.pid
        yield daemon
        assert daemon.process.poll() is None
        assert daemon.pid == pid
        assert '"daemon_bug"' not in daemon.log()


def version_of(daemon: Daemon, name: str) -> str:
    """The version that serves."""
    row = daemon.serving(name)
    assert row is not None
    return str(row["version"])


def blob(number: float) -> bytes:
    """The bytes of a model that answers `number`."""
    return zoo.versioned(number).SerializeToString()


def pause(seconds: float) -> None:
    """Time that a slow writer takes between two pieces: part of what is tested, and nothing is waited for."""
    select.select([], [], [], seconds)


# ---------------------------------------------------------------------- single files


def test_a_file_moved_in_is_served(daemon: Daemon) -> None:
    """The hash in the status is the file's own."""
    outside = zoo.write(daemon.root / "moved.onnx", zoo.versioned(1))
    outside.rename(daemon.models / "moved.onnx")
    row = daemon.wait_ready("moved")
    assert row["sha256"] == hashlib.sha256(blob(1)).hexdigest()
    assert daemon.number("moved") == 1


def test_a_file_copied_in_slowly_is_served_when_it_is_whole(daemon: Daemon) -> None:
    """While a writer holds it open it is neither loaded nor called bad."""
    whole, path = blob(2), daemon.models / "slowly.onnx"
    with path.open("wb") as f:
        f.write(whole[:500])
        f.flush()
        row = daemon.wait_row("slowly", lambda r: r["reason"] == "BEING_WRITTEN", "is being written")
        assert not row["serving"]
        f.write(whole[500:900])
        f.flush()
        os.fsync(f.fileno())
        f.write(whole[900:])
    daemon.wait_number(2, "slowly")
    lines = [line for line in daemon.log().splitlines() if '"slowly"' in line]
    assert not any('"model_failed"' in line or '"entry_refused"' in line for line in lines), lines


def test_a_file_overwritten_in_place_never_serves_a_mixture(daemon: Daemon) -> None:
    """The old version serves until the new one is whole, however the pieces come."""
    path = zoo.write(daemon.models / "inplace.onnx", zoo.versioned(1))
    daemon.wait_ready("inplace")
    new = blob(2)
    with path.open("r+b") as f:
        for at in range(0, len(new), 300):
            f.write(new[at : at + 300])
            f.flush()
            pause(0.15)  # longer than the settle time: only the open descriptor tells that more will come
            assert daemon.number("inplace") == 1
        f.truncate()
    daemon.wait_number(2, "inplace")
    assert version_of(daemon, "inplace") == "2"


def test_a_copy_that_stalls_closed_half_done_is_refused_and_then_served(daemon: Daemon) -> None:
    """A tool that closes between pieces: the half is refused, the old version serves on, then the whole."""
    zoo.write(daemon.models / "stalled.onnx", zoo.versioned(1))
    daemon.wait_ready("stalled")
    new = blob(2)
    path = daemon.models / "stalled.onnx"
    path.write_bytes(new[: len(new) // 2])
    daemon.wait_refused("stalled")
    assert daemon.number("stalled") == 1
    with path.open("ab") as f:
        f.write(new[len(new) // 2 :])
    daemon.wait_number(2, "stalled")
    assert len(daemon.rows("stalled")) == 1


def test_an_older_file_put_back_is_served_under_its_own_content(daemon: Daemon, tmp_path: Path) -> None:
    """`cp -p` of a backup: older time, other bytes. The content decides, not the time."""
    path = zoo.write(daemon.models / "older.onnx", zoo.versioned(1))
    os.utime(path, (1_000_000_000, 1_000_000_000))
    daemon.wait_number(1, "older")
    backup = shutil.copy2(path, tmp_path / "backup.onnx")
    zoo.write(path, zoo.versioned(2))
    daemon.wait_number(2, "older")
    subprocess.run(["cp", "-p", backup, path], check=True)
    daemon.wait_number(1, "older")
    assert path.stat().st_mtime == 1_000_000_000


def test_the_same_content_again_is_no_new_version(daemon: Daemon) -> None:
    """Touched, or replaced by a copy of itself: same version, same worker."""
    path = zoo.write(daemon.models / "again.onnx", zoo.versioned(1))
    before = daemon.wait_ready("again")
    zoo.write(path, zoo.versioned(1))
    path.touch()
    zoo.write(daemon.models / "after_again.onnx", zoo.versioned(3))
    daemon.wait_ready("after_again")
    pause(0.3)
    after = daemon.serving("again")
    assert after is not None
    assert (after["version"], after["pid"]) == (before["version"], before["pid"])


def test_a_file_removed_is_gone_and_its_worker_with_it(daemon: Daemon) -> None:
    """NOT_FOUND from then on, and the memory is given back."""
    path = zoo.write(daemon.models / "removed.onnx", zoo.versioned(1))
    pid = daemon.wait_ready("removed")["pid"]
    path.unlink()
    daemon.wait_gone("removed")
    with pytest.raises(EdgedError) as error:
        daemon.number("removed")
    assert error.value.code.value == "NOT_FOUND"
    until(lambda: not Path(f"/proc/{pid}").exists(), what="the worker has ended")


def test_a_file_renamed_serves_under_its_new_name(daemon: Daemon) -> None:
    """The old name is gone, the new one serves."""
    path = zoo.write(daemon.models / "old_name.onnx", zoo.versioned(4))
    daemon.wait_ready("old_name")
    path.rename(daemon.models / "new_name.onnx")
    daemon.wait_number(4, "new_name")
    daemon.wait_gone("old_name")


def test_names_of_files_that_are_on_their_way_are_not_looked_at(daemon: Daemon) -> None:
    """Dot files and the temporary names of copying tools."""
    names = [".hidden.onnx", "a.onnx.part", "a.onnx.tmp", "a.onnx~", "a.onnx.filepart", "a.onnx.crdownload"]
    for name in names:
        (daemon.models / name).write_bytes(b"half")
    zoo.write(daemon.models / "after_names.onnx", zoo.versioned(1))
    daemon.wait_ready("after_names")
    assert not [r for r in daemon.rows() if r["name"].startswith((".", "a."))]
    assert not daemon.rows("a")


def test_a_bad_new_version_leaves_the_old_one_serving_with_its_reason(daemon: Daemon) -> None:
    """Both rows show; removing the fault is enough."""
    path = zoo.write(daemon.models / "worse.onnx", zoo.versioned(1))
    daemon.wait_ready("worse")
    for bad in (b"", blob(2)[:700], bytes(4000)):
        zoo.write(path, bad)
        daemon.wait_row(
            "worse", lambda r: r["state"] == "UNAVAILABLE" and r["message"] != "", "shows the reason"
        )
        assert daemon.number("worse") == 1
    index = [r for r in daemon.client.repository_index() if r["name"] == "worse"]
    assert sorted(r["state"] for r in index) == ["READY", "UNAVAILABLE"]
    zoo.write(path, zoo.versioned(3))
    daemon.wait_number(3, "worse")
    assert [r["state"] for r in daemon.rows("worse")] == ["READY"]


def test_golden_samples_keep_a_wrong_model_out(daemon: Daemon) -> None:
    """A version that loads and answers otherwise than it must is refused; the old one serves."""
    inputs = "inputs = { x = [[1.0, 1.0, 1.0, 1.0]] }"
    golden = f"{ORT.decode()}[[golden]]\n{inputs}\noutputs = {{ sum = [[5.0]] }}\n"
    zoo.write(daemon.models / "proved.toml", golden.encode())
    path = zoo.write(daemon.models / "proved.onnx", zoo.versioned(1))
    daemon.wait_number(1, "proved")
    zoo.write(path, zoo.versioned(2))
    assert daemon.wait_refused("proved", "GOLDEN_MISMATCH")["message"]
    assert daemon.number("proved") == 1


def test_settings_that_change_are_taken_without_new_bytes(daemon: Daemon) -> None:
    """The same content under other settings is loaded anew beside the old."""
    zoo.write(daemon.models / "tuned.toml", ORT + b"threads = 1\n")
    zoo.write(daemon.models / "tuned.onnx", zoo.versioned(1))
    assert daemon.wait_ready("tuned")["threads"] == 1
    zoo.write(daemon.models / "tuned.toml", ORT + b"threads = 2\n")
    row = daemon.wait_row("tuned", lambda r: r["serving"] and r["threads"] == 2, "has two threads")
    assert row["version"] == "1"


# ---------------------------------------------------------------------- bundles


def test_a_bundle_with_external_data_and_a_change_of_the_data_alone(daemon: Daemon) -> None:
    """The weights are part of the content: other weights are another version."""
    folder = daemon.models / "bundle"
    away = daemon.root / "bundle"
    zoo.external_data(away, scale=2)
    away.rename(folder)
    daemon.wait_ready("bundle")
    x = {"x": np.ones((1, 64), np.float32)}
    assert (daemon.client.infer("bundle", x)["y"] == 2).all()
    before = version_of(daemon, "bundle")
    zoo.external_data(daemon.root / "other", scale=3)
    (daemon.root / "other" / "weights.bin").rename(folder / "weights.bin")
    until(
        lambda: (daemon.client.infer("bundle", x)["y"] == 3).all() and version_of(daemon, "bundle") != before,
        what="the new weights serve",
    )
    # What serves is a copy: the folder's file may be cut off under it.
    (folder / "weights.bin").write_bytes(b"")
    daemon.wait_refused("bundle")
    assert (daemon.client.infer("bundle", x)["y"] == 3).all()


def test_a_bundle_with_checksums_waits_until_they_match(daemon: Daemon) -> None:
    """SHA256SUMS tells a stalled copy from a finished one."""
    folder = daemon.models / "summed"
    folder.mkdir()
    digest = hashlib.sha256(blob(6)).hexdigest()
    (folder / "SHA256SUMS").write_text(f"{digest}  model.onnx\n")
    (folder / "model.onnx").write_bytes(blob(6)[:800])
    row = daemon.wait_refused("summed", "CHECKSUM_MISMATCH")
    assert "model.onnx" in row["message"]
    (folder / "model.onnx").write_bytes(blob(6))
    daemon.wait_number(6, "summed")


def test_version_directories_and_what_the_settings_say_of_them(daemon: Daemon) -> None:
    """The latest by default; with `all` each by its number; one that is gone falls back."""
    folder = daemon.models / "many"
    zoo.write(folder / "1" / "model.onnx", zoo.versioned(1))
    daemon.wait_number(1, "many")
    zoo.write(folder / "3" / "model.onnx", zoo.versioned(3))
    daemon.wait_number(3, "many")
    until(lambda: [r["version"] for r in daemon.rows("many")] == ["3"], what="only 3 is left")
    zoo.write(folder / "model.toml", b'versions = "all"\n')
    until(
        lambda: [r["version"] for r in daemon.rows("many") if r["serving"]] == ["1", "3"], what="both serve"
    )
    for version in (1, 3):
        assert whole_number(daemon.client.infer("many", {"x": ones()}, version=version)) == version
    assert daemon.number("many") == 3
    shutil.rmtree(folder / "3")
    daemon.wait_number(1, "many")
    assert daemon.client.model_metadata("many")["versions"] == ["1"]


def test_a_symlink_swapped_as_kubernetes_does(daemon: Daemon) -> None:
    """`..data` points to another directory by one rename; the file's own link never changes."""
    models = daemon.models
    zoo.write(models / "..2026_01" / "mounted.onnx", zoo.versioned(1))
    (models / "..data").symlink_to("..2026_01")
    (models / "mounted.onnx").symlink_to("..data/mounted.onnx")
    daemon.wait_number(1, "mounted")
    zoo.write(models / "..2026_02" / "mounted.onnx", zoo.versioned(2))
    (models / "..data_tmp").symlink_to("..2026_02")
    (models / "..data_tmp").rename(models / "..data")
    shutil.rmtree(models / "..2026_01")
    daemon.wait_number(2, "mounted")


def test_two_entries_of_one_name(daemon: Daemon) -> None:
    """The one that served goes on; the other is refused with a reason until the first goes."""
    zoo.write(daemon.models / "twice.onnx", zoo.versioned(1))
    daemon.wait_ready("twice")
    zoo.write(daemon.models / "twice" / "model.onnx", zoo.versioned(2))
    until(lambda: '"NAME_CLASH"' in daemon.log(), what="the clash is in the journal")
    assert daemon.number("twice") == 1
    (daemon.models / "twice.onnx").unlink()
    daemon.wait_number(2, "twice")


def test_an_openvino_ir_is_served_as_a_pair(tmp_path: Path) -> None:
    """NAME.xml with NAME.bin; the first without the second is refused until it comes."""
    with running_daemon(tmp_path, {"EDGED_DEVICES_EXCLUDE": "cuda"}) as daemon:
        onnx = zoo.write(tmp_path / "pair.onnx", zoo.versioned(7))
        script = (
            "import sys; sys.modules['openvino_telemetry'] = None; import openvino as ov; "
            "ov.save_model(ov.convert_model(sys.argv[1]), sys.argv[2], compress_to_fp16=False)"
        )
        command = [sys.executable, "-c", script, str(onnx), str(tmp_path / "pair.xml")]
        if subprocess.run(command, check=False, capture_output=True).returncode:
            pytest.skip("OpenVINO is not here to write an IR")
        (tmp_path / "pair.xml").rename(daemon.models / "pair.xml")
        daemon.wait_refused("pair")
        (tmp_path / "pair.bin").rename(daemon.models / "pair.bin")
        daemon.wait_number(7, "pair")
        row = daemon.wait_ready("pair")
        assert (row["runtime"], row["format"]) == ("openvino", "openvino_ir")


# ---------------------------------------------------------------------- the whole folder


def test_thirty_models_at_once(tmp_path: Path) -> None:
    """All are served, each by itself, and the daemon answers while they load."""
    with running_daemon(tmp_path, models={"first.onnx": zoo.versioned(1)}) as daemon:
        for number in range(30):
            zoo.write(daemon.models / f"m{number}.onnx", zoo.versioned(100 + number))
        until(lambda: sum(r["serving"] for r in daemon.rows()) == 31, what="thirty-one models serve")
        assert [daemon.number(f"m{n}") for n in range(30)] == [100 + n for n in range(30)]
        assert len({r["pid"] for r in daemon.rows()}) == 31
        shutil.rmtree(daemon.models)
        daemon.models.mkdir()
        until(lambda: not daemon.rows() or daemon.client.server_status()["models_fault"], what="it is seen")
        daemon.stop()


def test_a_root_that_vanishes_is_a_fault_and_no_deletion(tmp_path: Path) -> None:
    """Everything serves on, status says so, and when it is back nothing is loaded anew."""
    with running_daemon(tmp_path, models={"m.onnx": zoo.versioned(1)}) as daemon:
        before = daemon.wait_ready("m")
        away = tmp_path / "away"
        daemon.models.rename(away)
        until(lambda: daemon.client.server_status()["models_fault"], what="the fault is told")
        assert daemon.number() == 1
        away.rename(daemon.models)
        until(lambda: not daemon.client.server_status()["models_fault"], what="the fault is over")
        row = daemon.serving("m")
        assert row is not None
        assert (row["pid"], row["version"]) == (before["pid"], before["version"])
        zoo.write(daemon.models / "m.onnx", zoo.versioned(2))
        daemon.wait_number(2)
        daemon.models.rename(away)
        until(lambda: daemon.client.server_status()["models_fault"], what="the fault is told again")
        daemon.models.mkdir()
        zoo.write(daemon.models / "m.onnx", zoo.versioned(3))
        daemon.wait_number(3)
        assert {"folder_fault", "folder_healed"} <= {
            event for event in ("folder_fault", "folder_healed") if f'"{event}"' in daemon.log()
        }


@contextlib.contextmanager
def tmpfs(path: Path, size: str = "16m") -> Iterator[None]:
    """A file system of its own at `path`; skips the test where mounting is not allowed."""
    path.mkdir(exist_ok=True)
    mount(path, size)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", path], check=False, capture_output=True)


def mount(path: Path, size: str = "16m") -> None:
    """Mounts a tmpfs, or skips."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "edged-test", path]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no right to mount here: {done.stderr.strip()}")


def test_a_root_that_is_unmounted_and_mounted_again(tmp_path: Path) -> None:
    """An empty mount point is no folder whose models were deleted; new content is taken from a new mount."""
    models = tmp_path / "models"
    with tmpfs(models), running_daemon(tmp_path, models={"m.onnx": zoo.versioned(1)}) as daemon:
        subprocess.run(["umount", models], check=True)
        until(lambda: daemon.client.server_status()["models_fault"], what="the fault is told")
        assert daemon.number() == 1
        mount(models)
        zoo.write(models / "m.onnx", zoo.versioned(1))
        until(lambda: not daemon.client.server_status()["models_fault"], what="the fault is over")
        assert daemon.number() == 1
        zoo.write(models / "m.onnx", zoo.versioned(2))
        daemon.wait_number(2)
        daemon.stop()


def test_a_disk_that_is_full_while_staging(tmp_path: Path) -> None:
    """The new version is refused with the figures, the old one serves, and with room it is taken."""
    state = tmp_path / "state"
    settings = {"EDGED_RESOURCES_DISK_FREE_MIN": "0"}
    with (
        tmpfs(state, "2m"),
        running_daemon(tmp_path, settings, models={"m.onnx": zoo.versioned(1)}) as daemon,
    ):
        filler = state / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as f:
            while True:
                f.write(bytes(4096))
        big = zoo.versioned(2)
        big.doc_string = "x" * 200_000
        zoo.write(daemon.models / "m.onnx", big)
        row = daemon.wait_refused("m", "DISK_FULL")
        assert any(c.isdigit() for c in row["message"])
        assert daemon.number() == 1
        filler.unlink()
        daemon.wait_number(2)
        daemon.stop()


# ---------------------------------------------------------------------- restarts


@pytest.mark.parametrize("what", ["gone", "bad", "empty_file"])
def test_after_a_restart_the_last_good_content_serves(tmp_path: Path, what: str) -> None:
    """While the folder is gone or what lies in it cannot be served."""
    with running_daemon(tmp_path, models={"m.onnx": zoo.versioned(1)}) as daemon:
        zoo.write(daemon.models / "m.onnx", zoo.versioned(2))
        daemon.wait_number(2)
        digest = daemon.wait_ready("m")["sha256"]
        assert daemon.stop() == 0
        match what:
            case "gone":
                daemon.models.rename(tmp_path / "away")
            case "bad":
                zoo.write(daemon.models / "m.onnx", blob(3)[:600])
            case "empty_file":
                (daemon.models / "m.onnx").write_bytes(b"")
        daemon.start()
        row = daemon.wait_ready("m")
        assert (row["sha256"], row["version"]) == (digest, "2")
        assert daemon.number() == 2
        if what == "gone":
            assert daemon.client.server_status()["models_fault"]
            (tmp_path / "away").rename(daemon.models)
        else:
            assert daemon.wait_refused("m")["message"]
        zoo.write(daemon.models / "m.onnx", zoo.versioned(4))
        daemon.wait_number(4)
        assert version_of(daemon, "m") > "2"


def test_what_was_removed_while_the_daemon_was_down_is_gone(tmp_path: Path) -> None:
    """A healthy folder without the entry means that it was deleted; versions go on counting for the rest."""
    models = {"stays.onnx": zoo.versioned(1), "goes.onnx": zoo.versioned(2)}
    with running_daemon(tmp_path, models=models) as daemon:
        daemon.stop()
        (daemon.models / "goes.onnx").unlink()
        zoo.write(daemon.models / "stays.onnx", zoo.versioned(5))
        daemon.start()
        daemon.wait_number(5, "stays")
        assert version_of(daemon, "stays") == "2"
        daemon.wait_gone("goes")


def test_nothing_half_written_is_ever_served(daemon: Daemon) -> None:
    """A careless writer rewrites the file in place forty times while a client asks without a pause."""
    path = zoo.write(daemon.models / "careless.onnx", zoo.versioned(0))
    daemon.wait_ready("careless")
    seen: set[float] = set()
    done = threading.Event()
    faults: list[BaseException] = []

    def ask() -> None:
        from edged import Client

        try:
            with Client(daemon.endpoint, timeout=60) as client:
                while not done.is_set():
                    seen.add(whole_number(client.infer("careless", {"x": ones()})))
        except BaseException as e:  # noqa: BLE001 - told below, in the test's own thread
            faults.append(e)

    thread = threading.Thread(target=ask)
    thread.start()
    for number in range(1, 41):
        whole = blob(number)
        with path.open("r+b") as f:
            for at in range(0, len(whole), 400):
                f.write(whole[at : at + 400])
                f.flush()
                pause(0.002)
            f.truncate()
        pause(0.03 if number % 8 else 0.3)
    daemon.wait_number(40, "careless")
    done.set()
    thread.join(60)
    assert not faults
    assert seen <= set(range(41))
    assert {0, 40} <= seen
