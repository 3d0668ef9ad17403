"""A bit flips in the store: no answer ever comes from it, and what is good comes back, and it is said."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edged import Client
from edged.errors import EdgedError, Unavailable
from tests import zoo
from tests.e2e.harness import Daemon, Edgectl, ones, running_daemon, until, whole_number

pytestmark = pytest.mark.e2e


def stored(daemon: Daemon, digest: str, name: str = "model.onnx") -> Path:
    """A file of a content's copy in the store."""
    return daemon.state / "store" / "contents" / digest / "files" / name


def rot(path: Path, wanted: bytes, at: int = 0) -> None:
    """Flips one bit, `at` bytes into the first `wanted` of a file, which keeps its size, inode and mtime."""
    where = path.read_bytes().index(wanted) + at
    status = path.stat()
    path.chmod(0o640)
    with path.open("r+b") as stream:
        stream.seek(where)
        byte = stream.read(1)[0]
        stream.seek(where)
        stream.write(bytes([byte ^ 0x10]))
    path.chmod(0o440)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def rot_number(daemon: Daemon, digest: str, number: float) -> None:
    """Has the stored copy of a `zoo.versioned` model answer another number."""
    rot(stored(daemon, digest), np.float32(number).tobytes(), 2)


@contextlib.contextmanager
def asking(daemon: Daemon, name: str = "m") -> Iterator[set[float]]:
    """Asks a `zoo.versioned` model all the time, from before the daemon starts; what it answered."""
    seen: set[float] = set()
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            with contextlib.suppress(EdgedError, OSError), Client(daemon.endpoint, timeout=2.0) as client:
                while not done.is_set():
                    try:
                        seen.add(whole_number(client.infer(name, {"x": ones()})))
                    except Unavailable:
                        done.wait(0.002)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


def told(daemon: Daemon, kind: str) -> list[dict[str, str]]:
    """The records of one kind in the daemon's log."""
    lines = [json.loads(line) for line in daemon.log().splitlines() if line.startswith("{")]
    return [line for line in lines if line.get("event") == kind]


def digest_of(daemon: Daemon, name: str = "m") -> str:
    """The content that serves."""
    return str(daemon.wait_ready(name)["sha256"])


def damaged(daemon: Daemon) -> set[str]:
    """The copies that were set aside."""
    return {path.name for path in (daemon.state / "store" / "damaged").iterdir()}


# ---------------------------------------------------------------------- rotten while the daemon was off


def test_a_rotten_copy_is_made_again_from_the_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Asked from its first moment on, the daemon gives the right answer or none; then all can be read up."""
    with running_daemon(tmp_path, models={"m.onnx": zoo.versioned(1001)}) as daemon:
        digest = digest_of(daemon)
        daemon.stop()
        rot_number(daemon, digest, 1001)
        with asking(daemon) as seen:
            daemon.start()
            row = daemon.wait_ready("m")
            until(lambda: seen, what="an answer")
        assert seen == {1001}
        assert (row["sha256"], row["version"]) == (digest, "1")
        (line,) = told(daemon, "copy_damaged")
        assert line["MODEL"] == "m"
        assert f"{digest}: model.onnx has other bytes" in line["DETAIL"]
        assert not told(daemon, "model_failed")
        assert damaged(daemon) == {digest}
        edgectl = Edgectl(daemon.admin, capsys)
        document = edgectl.json("explain", "m")
        assert "copy_damaged" in [each["event"] for each in document["history"]]
        _, text, _ = edgectl("status")
        assert "1 damaged" in text
        # The next start finds a sound copy and has nothing to say.
        daemon.stop()
        daemon.log_path.write_text("")
        daemon.start()
        daemon.wait_number(1001)
        assert not told(daemon, "copy_damaged")


def test_rot_that_keeps_a_copy_from_loading_is_not_held_against_the_model(tmp_path: Path) -> None:
    """The runtime refuses what it cannot parse; the reason is the disk, and the content is tried again."""
    with running_daemon(tmp_path, models={"m.onnx": zoo.versioned(1001)}) as daemon:
        digest = digest_of(daemon)
        daemon.stop()
        rot(stored(daemon, digest), stored(daemon, digest).read_bytes()[:4])
        daemon.start()
        daemon.wait_number(1001)
        assert not told(daemon, "model_failed")
        assert len(told(daemon, "copy_damaged")) == 1


@pytest.mark.parametrize("before", ["good", "rotten", "none"])
def test_only_in_the_store_and_rotten(tmp_path: Path, before: str) -> None:
    """Without the folder the version before serves if it is sound, else nothing, with the reason."""
    with running_daemon(tmp_path, models={"m.onnx": zoo.versioned(1001)}) as daemon:
        first = digest_of(daemon)
        numbers = {first: 1001}
        if before != "none":
            zoo.write(daemon.models / "m.onnx", zoo.versioned(1002))
            daemon.wait_number(1002)
            numbers[digest_of(daemon)] = 1002
        last = list(numbers)[-1]
        daemon.stop()
        daemon.models.rename(tmp_path / "away")
        for digest in numbers if before == "rotten" else [last]:
            rot_number(daemon, digest, numbers[digest])
        with asking(daemon) as seen:
            daemon.start()
            if before == "good":
                daemon.wait_number(1001)
                assert daemon.wait_ready("m")["version"] == "1"
            else:
                row = daemon.wait_refused("m", "COPY_DAMAGED")
                assert daemon.serving("m") is None
                assert "other bytes than were stored" in row["message"]
            aside = set(numbers) if before == "rotten" else {last}
            until(lambda: damaged(daemon) == aside, what=lambda: f"{aside} are set aside: {damaged(daemon)}")
            # The folder comes back with the content, and with it the number that it had.
            (tmp_path / "away").rename(daemon.models)
            daemon.wait_number(numbers[last])
            row = daemon.wait_ready("m")
            assert (row["sha256"], row["version"]) == (last, str(len(numbers)))
        assert seen <= {1001, 1002}


def test_rot_in_weights_beside_the_model(tmp_path: Path) -> None:
    """ONNX Runtime maps external data, and would answer from whatever is there."""
    with Daemon(tmp_path) as daemon:
        zoo.external_data(daemon.models / "m", scale=3)
        daemon.start()
        digest = digest_of(daemon)
        daemon.stop()
        rot(stored(daemon, digest, "weights.bin"), np.float32(3).tobytes(), 2)
        daemon.start()
        daemon.wait_ready("m")
        answer = daemon.client.infer("m", {"x": np.ones((1, 64), np.float32)})
        assert (answer["y"] == 3).all()
        (line,) = told(daemon, "copy_damaged")
        assert "weights.bin has other bytes" in line["DETAIL"]


def test_rot_in_the_weights_of_an_openvino_ir(tmp_path: Path) -> None:
    """OpenVINO maps the .bin of an IR."""
    with Daemon(tmp_path, {"EDGED_DEVICES_EXCLUDE": "cuda"}) as daemon:
        onnx = zoo.write(tmp_path / "m.onnx", zoo.versioned(1001))
        script = (
            "import sys; sys.modules['openvino_telemetry'] = None; import openvino as ov; "
            "ov.save_model(ov.convert_model(sys.argv[1]), sys.argv[2], compress_to_fp16=False)"
        )
        command = [sys.executable, "-c", script, str(onnx), str(daemon.models / "m.xml")]
        if subprocess.run(command, check=False, capture_output=True).returncode:
            pytest.skip("OpenVINO is not here to write an IR")
        daemon.start()
        daemon.wait_number(1001)
        digest = digest_of(daemon)
        daemon.stop()
        rot(stored(daemon, digest, "model.bin"), np.float32(1001).tobytes(), 2)
        with asking(daemon) as seen:
            daemon.start()
            daemon.wait_ready("m")
            until(lambda: seen, what="an answer")
        assert seen == {1001}
        (line,) = told(daemon, "copy_damaged")
        assert "model.bin has other bytes" in line["DETAIL"]


def test_rot_in_a_golden_sample_condemns_no_model(tmp_path: Path) -> None:
    """What a model is checked by may rot as well, and would then refuse a good one."""
    with Daemon(tmp_path) as daemon:
        golden = daemon.models / "m" / "golden"
        golden.mkdir(parents=True)
        zoo.write(daemon.models / "m" / "model.onnx", zoo.versioned(1001))
        sums = np.full((1, 1), 1005, np.float32)
        np.savez(golden / "0.npz", **{"inputs/x": ones(), "outputs/sum": sums})
        daemon.start()
        digest = digest_of(daemon)
        daemon.stop()
        rot(stored(daemon, digest, "golden/0.npz"), np.float32(1005).tobytes(), 2)
        daemon.start()
        daemon.wait_number(1001)
        assert not told(daemon, "model_failed")
        (line,) = told(daemon, "copy_damaged")
        assert "golden/0.npz has other bytes" in line["DETAIL"]


# ---------------------------------------------------------------------- rotten while it serves


def test_a_worker_that_is_started_again_does_not_load_rot(tmp_path: Path) -> None:
    """What serves has the bytes that were hashed; its restart reads the disk again, and hashes again."""
    with running_daemon(tmp_path, models={"m.onnx": zoo.versioned(1001)}) as daemon, asking(daemon) as seen:
        digest = digest_of(daemon)
        rot_number(daemon, digest, 1001)
        pid = daemon.wait_ready("m")["pid"]
        os.kill(pid, signal.SIGKILL)
        daemon.wait_row("m", lambda r: r["serving"] and r["pid"] not in (None, pid), "serves again")
        daemon.wait_number(1001)
        assert damaged(daemon) == {digest}
        assert seen == {1001}


def test_an_older_file_put_back_does_not_serve_its_rotten_copy(tmp_path: Path) -> None:
    """A rollback takes what the store has of the older version, if that is sound."""
    with running_daemon(tmp_path, models={"m.onnx": zoo.versioned(1001)}) as daemon, asking(daemon) as seen:
        first = digest_of(daemon)
        zoo.write(daemon.models / "m.onnx", zoo.versioned(1002))
        daemon.wait_number(1002)
        rot_number(daemon, first, 1001)
        zoo.write(daemon.models / "m.onnx", zoo.versioned(1001))
        daemon.wait_row("m", lambda r: r["serving"] and r["sha256"] == first and r["pid"], "is back")
        daemon.wait_number(1001)
        assert damaged(daemon) == {first}
        assert seen <= {1001, 1002}


def test_killed_in_the_middle_of_making_a_copy_again(tmp_path: Path) -> None:
    """Power cut after power cut, at whatever point of it: what is there in the end is right."""
    with running_daemon(tmp_path, models={"m.onnx": zoo.versioned(1001)}) as daemon:
        digest = digest_of(daemon)
        daemon.stop()
        with asking(daemon) as seen:
            for _ in range(3):
                copy = stored(daemon, digest)
                if copy.exists() and hashlib.sha256(copy.read_bytes()).hexdigest() == digest:
                    rot_number(daemon, digest, 1001)
                daemon.log_path.write_text("")
                daemon.spawn()
                until(
                    lambda: told(daemon, "copy_damaged") or told(daemon, "model_ready"),
                    what="the rot is found, or what was killed last time is made good",
                )
                daemon.process.kill()
                daemon.wait_end()
            daemon.log_path.write_text("")
            daemon.spawn()  # READY may have been said by one that was killed
            until(lambda: told(daemon, "model_ready"), what="it serves")
            daemon.wait_number(1001)
        assert seen <= {1001}
        assert digest_of(daemon) == digest
