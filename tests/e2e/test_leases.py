"""Leases with the real daemon, and a client that is a socket, a descriptor and a mapping, nothing more."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import psutil
import pytest

from tests import zoo
from tests.e2e.harness import WAIT_S, Daemon, Raw, code_of, descendants, running_daemon, until
from tests.e2e.lanes import Lane


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One daemon for all tests here that do no harm to it."""
    models = {
        "same.onnx": zoo.identity("FP32", [None]),
        "ints.onnx": zoo.identity("INT64", [None]),
        "text.onnx": zoo.identity("BYTES", [None]),
        "flags.onnx": zoo.identity("BOOL", [None]),
        "slow.onnx": zoo.slow(40_000),
        "gather.onnx": zoo.failing(),
        "sort.onnx": zoo.top_k(2000),
    }
    root = tmp_path_factory.mktemp("leases")
    with running_daemon(root, {"EDGED_LIMITS_LEASE_BYTES": "8MiB"}, models=models) as daemon:
        for name in models:
            daemon.wait_ready(name.removesuffix(".onnx"))
        yield daemon


@pytest.fixture
def raw(daemon: Daemon) -> Iterator[Raw]:
    with daemon.raw() as raw:
        yield raw


@pytest.fixture
def lane(daemon: Daemon) -> Iterator[Lane]:
    with Lane(daemon) as lane:
        yield lane


def leases(daemon: Daemon) -> dict[str, int]:
    """What the daemon says of its leases."""
    found: dict[str, int] = daemon.client.server_status()["leases"]
    return found


def test_an_input_is_read_where_it_lies_and_an_output_lands_there(raw: Raw, lane: Lane) -> None:
    """Nothing but names travels: the numbers are written and read in the client's own mapping."""
    region = lane.acquire(8192)
    x, y = region.array((16,)), region.array((16,), offset=4096)
    for turn in range(3):
        x[:] = np.arange(16) + turn
        reply = raw.infer(
            "same",
            [region.tensor("x", (16,), "FP32", 64)],
            outputs=[{"name": "y", "parameters": region.where(4096, 4096)}],
        )
        (output,) = reply["outputs"]
        assert "data" not in output
        assert output["shape"] == [16]
        assert output["parameters"] == region.where(64, 4096)
        np.testing.assert_array_equal(y, np.arange(16) + turn)
        assert "warnings" not in reply["parameters"]


def test_other_requests_see_the_same_memory_at_once(raw: Raw, lane: Lane) -> None:
    """Several tensors lie in one region, many requests are in flight on it, and each gets its own part."""
    region = lane.acquire(64 * 64)
    region.array((64, 16))[:] = np.arange(64)[:, None]
    for row in range(64):
        header = {"method": "model_infer", "id": row, "model_name": "same"}
        header["inputs"] = [region.tensor("x", (16,), "FP32", 64, 64 * row)]
        raw.send(header)
    for _ in range(64):
        reply, _ = raw.receive()
        got = np.frombuffer(reply["outputs"][0]["data"], np.float32)
        np.testing.assert_array_equal(got, np.full(16, reply["id"]))


@pytest.mark.parametrize(
    ("model", "datatype", "raw_bytes", "count"),
    [
        ("ints", "INT64", np.arange(5).tobytes(), 5),
        ("flags", "BOOL", b"\0\1\1", 3),
        ("text", "BYTES", b"\1\0\0\0a\0\0\0\0", 2),
        ("same", "FP32", b"", 0),
    ],
)
def test_every_kind_of_input_may_lie_in_a_region(
    raw: Raw, lane: Lane, model: str, datatype: str, raw_bytes: bytes, count: int
) -> None:
    """Also at an offset that suits no element."""
    region = lane.acquire(4096)
    for offset in (0, 64, 3):
        region.memory[offset : offset + len(raw_bytes)] = raw_bytes
        reply = raw.infer(model, [region.tensor("x", (count,), datatype, len(raw_bytes), offset)])
        assert reply["outputs"][0]["data"] == raw_bytes


@pytest.mark.parametrize(
    ("model", "datatype", "raw_bytes", "count", "reason"),
    [
        ("flags", "BOOL", b"\0\2", 2, "BAD_DATA"),
        ("text", "BYTES", b"\xff\xff\xff\xffa", 1, "BAD"),
        ("text", "BYTES", b"\1\0\0\0a", 2, "BAD"),
        ("ints", "INT64", b"\0" * 8, 2, "BAD_SIZE"),
    ],
)
def test_bytes_that_are_no_tensor(
    raw: Raw, lane: Lane, model: str, datatype: str, raw_bytes: bytes, count: int, reason: str
) -> None:
    """The request's fault, found by the worker where the daemon does not look."""
    region = lane.acquire(4096)
    region.memory[: len(raw_bytes)] = raw_bytes
    code, why = code_of(raw.infer(model, [region.tensor("x", (count,), datatype, len(raw_bytes))]))
    assert code == "INVALID_ARGUMENT"
    assert why.startswith(reason)


@pytest.mark.parametrize(
    ("offset", "nbytes", "reason"),
    [
        (4096, 64, "BAD_REGION"),
        (4064, 64, "BAD_REGION"),
        (2**63 - 1, 64, "BAD_REGION"),
        (2**63, 64, "BAD_REGION"),
        (2**64 - 64, 64, "BAD_REGION"),
        (-64, 64, "BAD_REGION"),
        (True, 64, "BAD_REGION"),
        (0.0, 64, "BAD_REGION"),
        (0, 2**63 - 1, "BAD_REGION"),
        (0, 60, "BAD_SIZE"),
        (0, -64, "BAD_REGION"),
        (0, None, "BAD_REGION"),
    ],
)
def test_nothing_outside_the_region_can_be_named(
    raw: Raw, lane: Lane, offset: Any, nbytes: Any, reason: str
) -> None:
    """Neither as an input nor as the place of an output."""
    region = lane.acquire(4096)
    tensor = region.tensor("x", (16,), "FP32", nbytes, offset)
    assert code_of(raw.infer("same", [tensor])) == ("INVALID_ARGUMENT", reason)
    if reason == "BAD_REGION":
        outputs = [{"name": "y", "parameters": region.where(nbytes, offset)}]
        x = [region.tensor("x", (16,), "FP32", 64)]
        assert code_of(raw.infer("same", x, outputs=outputs)) == ("INVALID_ARGUMENT", reason)


def test_an_output_that_does_not_fit_fails_its_request(raw: Raw, lane: Lane) -> None:
    """Nothing is written behind its place, and the next request is served."""
    region = lane.acquire(4096)
    region.array((32,))[:] = 7
    x = [region.tensor("x", (16,), "FP32", 64)]
    outputs = [{"name": "y", "parameters": region.where(60, 1024)}]
    assert code_of(raw.infer("same", x, outputs=outputs)) == ("INVALID_ARGUMENT", "OUTPUT_DOES_NOT_FIT")
    assert region.memory[1024:1100] == b"\0" * 76
    outputs = [{"name": "y", "parameters": region.where(64, 1024)}]
    assert "error" not in raw.infer("same", x, outputs=outputs)


def test_an_output_of_no_fixed_size_stays_in_the_reply(raw: Raw, lane: Lane) -> None:
    """Only tensors of numbers can land."""
    region = lane.acquire(4096)
    x = {"name": "x", "datatype": "BYTES", "shape": [1], "data": ["a"]}
    outputs = [{"name": "y", "parameters": region.where(64)}]
    assert code_of(raw.infer("text", [x], outputs=outputs)) == ("INVALID_ARGUMENT", "BAD_REGION")


def test_a_region_that_is_released_is_not_there(raw: Raw, lane: Lane, daemon: Daemon) -> None:
    """Nor one that never was; the client's own mapping goes on."""
    region = lane.acquire(4096)
    tensor = region.tensor("x", (16,), "FP32", 64)
    assert "error" not in raw.infer("same", [tensor])
    assert lane.release(region.name) == {"id": 2}
    gone = raw.infer("same", [tensor])
    assert code_of(gone) == ("NOT_FOUND", "REGION_NOT_FOUND")
    region.name = "0" * 32
    made_up = raw.infer("same", [region.tensor("x", (16,), "FP32", 64)])
    assert made_up["error"] == gone["error"]
    assert code_of(lane.release(region.name)) == ("NOT_FOUND", "REGION_NOT_FOUND")
    region.memory[0] = 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_another_users_region_is_as_one_that_never_was(daemon: Daemon, raw: Raw, lane: Lane) -> None:
    """Whoever is told a name that is not his learns nothing from it."""
    region = lane.acquire(4096)
    tensor = region.tensor("x", (16,), "FP32", 64)
    for path in (daemon.run_dir, *daemon.run_dir.parents):
        if not path.stat().st_mode & 0o001:
            path.chmod(path.stat().st_mode | 0o011)
    (daemon.run_dir / "edged.sock").chmod(0o666)
    asked = as_nobody(daemon.endpoint, [tensor, {**tensor, "parameters": {**region.where(64), **MADE_UP}}])
    assert asked[0] == asked[1]
    assert asked[0]["code"] == "NOT_FOUND"
    assert asked[0]["reason"] == "REGION_NOT_FOUND"
    assert "error" not in raw.infer("same", [tensor])


MADE_UP = {"shared_memory_region": "f" * 32}

NOBODY = """
import msgpack, os, sys, zmq
os.setgroups([]); os.setgid(65534); os.setuid(65534)
endpoint, tensors = msgpack.unpackb(sys.stdin.buffer.read())
socket = zmq.Context().socket(zmq.DEALER)
socket.linger = 0
socket.connect(endpoint)
errors = []
for at, tensor in enumerate(tensors):
    header = {"method": "model_infer", "id": at, "model_name": "same", "inputs": [tensor]}
    socket.send(msgpack.packb(header))
    assert socket.poll(60000)
    errors.append(msgpack.unpackb(socket.recv())["error"])
sys.stdout.buffer.write(msgpack.packb(errors))
"""


def as_nobody(endpoint: str, tensors: list[Any]) -> list[dict[str, Any]]:
    """The errors that another user gets for these inputs."""
    run = subprocess.run(
        [sys.executable, "-c", NOBODY],
        input=msgpack.packb([endpoint, tensors]),
        capture_output=True,
        check=False,
        timeout=WAIT_S,
    )
    assert run.returncode == 0, run.stderr.decode()
    errors: list[dict[str, Any]] = msgpack.unpackb(run.stdout)
    return errors


def test_the_quota_is_the_uids_and_comes_back(daemon: Daemon, lane: Lane) -> None:
    """Over all connections; what is refused is said with figures."""
    limits = daemon.client.server_metadata()["limits"]
    assert limits["lease_bytes"] == 8 << 20
    lane.acquire(6 << 20)
    with Lane(daemon) as second:
        header, fds = second.call("lease_acquire", byte_size=3 << 20)
        assert code_of(header) == ("RESOURCE_EXHAUSTED", "LEASE_QUOTA")
        assert not fds
        region = second.acquire(2 << 20)
        assert code_of(second.call("lease_acquire", byte_size=1)[0]) == ("RESOURCE_EXHAUSTED", "LEASE_QUOTA")
        second.release(region.name)
        second.acquire(1 << 20)


def test_a_connection_has_a_bounded_number_of_regions(daemon: Daemon, lane: Lane) -> None:
    """Each costs the daemon a descriptor."""
    for _ in range(daemon.client.server_metadata()["limits"]["leases"]):
        lane.acquire(1)
    assert code_of(lane.call("lease_acquire", byte_size=1)[0]) == ("RESOURCE_EXHAUSTED", "LEASE_QUOTA")


@pytest.mark.parametrize(
    ("packet", "code", "reason"),
    [
        ({"method": "lease_acquire", "id": 5, "byte_size": 0}, "INVALID_ARGUMENT", "BAD_REGION"),
        ({"method": "lease_acquire", "id": 5, "byte_size": -1}, "INVALID_ARGUMENT", "BAD_REGION"),
        ({"method": "lease_acquire", "id": 5, "byte_size": 2**63}, "INVALID_ARGUMENT", "BAD_REGION"),
        ({"method": "lease_acquire", "id": 5, "byte_size": 1 << 39}, "RESOURCE_EXHAUSTED", "LEASE_QUOTA"),
        ({"method": "server_status", "id": 5}, "UNIMPLEMENTED", "WRONG_SOCKET"),
        (b"\xc1", "INVALID_ARGUMENT", "BAD_HEADER"),
        (b"\x91" * 3000, "INVALID_ARGUMENT", "BAD_HEADER"),
        (b"x" * 65537, "RESOURCE_EXHAUSTED", "HEADER_TOO_LARGE"),
        (b"x" * 150_000, "RESOURCE_EXHAUSTED", "HEADER_TOO_LARGE"),
    ],
)
def test_bad_packets_are_answered(lane: Lane, packet: Any, code: str, reason: str) -> None:
    """And the connection serves on."""
    lane.socket.send(packet if isinstance(packet, bytes) else msgpack.packb(packet))
    header, fds = lane.reply(None if isinstance(packet, bytes) else 5)
    assert code_of(header) == (code, reason)
    assert not fds
    lane.acquire(1)


def test_a_client_dies_while_a_run_uses_its_region(daemon: Daemon) -> None:
    """The run finishes, and then the memory is reclaimed."""
    with daemon.raw() as raw:
        lane = Lane(daemon)
        region = lane.acquire(1 << 20)
        x = region.tensor("x", (1, 256), "FP32", 1024)
        raw.send({"method": "model_infer", "id": 1, "model_name": "slow", "inputs": [x]})
        until(lambda: daemon.rows("slow")[0]["in_flight"], what="it runs")
        lane.close()
        until(lambda: leases(daemon)["connections"] == 0, what="the connection is gone")
        assert leases(daemon)["bytes"] == 1 << 20
        with daemon.raw() as other:
            x = region.tensor("x", (16,), "FP32", 64)
            assert code_of(other.infer("same", [x])) == ("NOT_FOUND", "REGION_NOT_FOUND")
        reply, _ = raw.receive()
        assert "error" not in reply
        until(lambda: leases(daemon) == {"regions": 0, "bytes": 0, "connections": 0}, what="it is reclaimed")
        until(lambda: not mapped(daemon), what="nobody has it mapped")


def mapped(daemon: Daemon) -> list[str]:
    """Leased memory that the daemon or a child of it has open or mapped."""
    found = []
    for process in (psutil.Process(daemon.pid), *descendants(daemon.pid)):
        base = Path("/proc") / str(process.pid)
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found += [line for line in (base / "maps").read_text().splitlines() if "edged-lease" in line]
            for each in (base / "fd").iterdir():
                with contextlib.suppress(FileNotFoundError):
                    if "edged-lease" in str(each.readlink()):
                        found.append(str(each))
    return found


def descriptors(daemon: Daemon) -> int:
    """How many the daemon has open."""
    return len(os.listdir(f"/proc/{daemon.pid}/fd"))


def test_no_descriptor_and_no_mapping_is_left_of_many_leases(daemon: Daemon) -> None:
    """By release and by hang-up, each used by a run."""
    with daemon.raw() as raw, Lane(daemon) as lane:
        assert "error" not in raw.infer("flags", [{"name": "x", "datatype": "BOOL", "shape": [0]}])
        before = descriptors(daemon)
        for _ in range(150):
            region = lane.acquire(65536)
            assert "error" not in raw.infer("same", [region.tensor("x", (16,), "FP32", 64)])
            lane.release(region.name)
        for _ in range(50):
            with Lane(daemon) as other:
                region = other.acquire(65536)
                assert "error" not in raw.infer("same", [region.tensor("x", (16,), "FP32", 64)])
        until(lambda: leases(daemon)["regions"] == 0, what="all are reclaimed")
        until(lambda: not mapped(daemon), what=lambda: f"nothing is mapped: {mapped(daemon)}")
        until(lambda: descriptors(daemon) <= before, what=lambda: f"{descriptors(daemon)}, not {before}")


def test_who_floods_and_never_reads_slows_nobody(daemon: Daemon, raw: Raw) -> None:
    """Neither the requests of others nor their leases; and it can go on once it reads."""
    with Lane(daemon) as flood, Lane(daemon) as calm:
        flood.socket.setblocking(False)
        packet = msgpack.packb({"method": "lease_acquire", "id": 0, "byte_size": 1})
        sent = 0
        while True:
            try:
                flood.socket.send(packet)
            except BlockingIOError:
                # Full: the daemon has stopped reading what it could not answer.
                if not select.select([], [flood.socket], [], 0.3)[1]:
                    break
                continue
            sent += 1
            assert sent < 100_000
        region = calm.acquire(4096)
        for _ in range(20):
            assert "error" not in raw.infer("same", [region.tensor("x", (16,), "FP32", 64)])
        flood.socket.settimeout(WAIT_S)
        for _ in range(sent):
            for fd in flood.reply(0)[1]:
                os.close(fd)


def test_the_worker_dies_and_the_next_one_knows_the_region(daemon: Daemon, raw: Raw, lane: Lane) -> None:
    """A region belongs to the client, not to the process that read it."""
    region = lane.acquire(4096)
    tensor = region.tensor("x", (16,), "FP32", 64)
    assert "error" not in raw.infer("same", [tensor])
    pid = daemon.wait_ready("same")["pid"]
    os.kill(pid, signal.SIGKILL)
    daemon.wait_row("same", lambda r: r["pid"] not in (None, pid) and r["state"] == "READY", "is back")
    assert "error" not in raw.infer("same", [tensor])


FLIPPER = """
import mmap, os, sys
memory = mmap.mmap(int(sys.argv[1]), 65536)
print("begins", flush=True)
first, second = bytes.fromhex(sys.argv[2]) * 8192, bytes.fromhex(sys.argv[3]) * 8192
while True:
    memory[:] = first[:65536]
    memory[:] = second[:65536]
"""


@pytest.mark.parametrize(
    ("model", "inputs", "count", "first", "second"),
    [
        ("gather", ("i", "INT64", 8), 64, "0000000000010000", "0000000000000000"),
        ("sort", ("x", "FP32", 4), 4096, "0000c07f00000041", "000040400000803f"),
    ],
)
def test_memory_that_changes_while_the_model_runs(
    daemon: Daemon,
    raw: Raw,
    lane: Lane,
    model: str,
    inputs: tuple[str, str, int],
    count: int,
    first: str,
    second: str,
) -> None:
    """An index that is flipped after its check, and numbers that change under a sort, crash nothing.

    Read in place, either ends the worker with SIGSEGV within some thousand runs.
    """
    header, (fd,) = lane.call("lease_acquire", byte_size=65536)
    name, datatype, item = inputs
    tensor = {"name": name, "datatype": datatype, "shape": [count]}
    tensor["parameters"] = {
        "shared_memory_region": header["region"],
        "shared_memory_byte_size": count * item,
    }
    x = {"name": "x", "datatype": "FP32", "shape": [4], "data": [1.0, 2.0, 3.0, 4.0]}
    pid = daemon.wait_ready(model)["pid"]
    command = [sys.executable, "-c", FLIPPER, str(fd), first, second]
    with subprocess.Popen(command, pass_fds=[fd], stdout=subprocess.PIPE) as flipper:
        os.close(fd)
        assert flipper.stdout is not None
        flipper.stdout.readline()
        try:
            replies = [raw.infer(model, [x, tensor] if model == "gather" else [tensor]) for _ in range(1500)]
        finally:
            flipper.kill()
    assert {code_of(r)[1] for r in replies if "error" in r} <= {
        "RUNTIME_ERROR",
        "INVALID_INPUT",
        "REFUSED_BY_RUNTIME",
    }
    assert daemon.wait_ready(model)["pid"] == pid


def test_leases_end_with_the_daemon(tmp_path: Path) -> None:
    """The socket is gone, the client hears the end, and its own mapping stays readable."""
    with running_daemon(tmp_path) as daemon:
        assert "shared_memory" in daemon.client.server_metadata()["extensions"]
        lane = Lane(daemon)
        region = lane.acquire(4096)
        region.memory[0] = 9
        assert daemon.stop() == 0
        assert lane.socket.recv(1) == b""
        assert region.memory[0] == 9
        assert not (daemon.run_dir / "lease.sock").exists()
        lane.close()
