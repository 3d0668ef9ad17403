"""The fast lane with the real daemon: requests on lease.sock itself, from clients good and bad."""

from __future__ import annotations

import contextlib
import os
import random
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest

from tests import zoo
from tests.e2e.harness import WAIT_S, Daemon, Raw, code_of, running_daemon, until
from tests.e2e.lanes import Lane

pytestmark = pytest.mark.e2e

PINNED = b'runtime = "onnxruntime"\n'


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One daemon for all tests here; that it survives each of them is part of them."""
    models = {
        "same.onnx": zoo.identity("FP32", [None]),
        "words.onnx": zoo.identity("BYTES", [None]),
        "many.onnx": zoo.many(),
        "zip.onnx": zoo.zipmap(),
        "endless.onnx": zoo.slow(),
        "slow.onnx": zoo.slow(20_000),
    }
    settings = {"EDGED_LIMITS_INFLIGHT_PER_CLIENT": "64"}
    with running_daemon(tmp_path_factory.mktemp("lane"), settings, models=models) as daemon:
        pid = daemon.pid
        for name in models:
            daemon.wait_ready(name.removesuffix(".onnx"))
        yield daemon
        assert daemon.process.poll() is None
        assert daemon.pid == pid
        assert '"daemon_bug"' not in daemon.log()


@pytest.fixture
def lane(daemon: Daemon) -> Iterator[Lane]:
    with Lane(daemon) as lane:
        yield lane


@pytest.fixture
def raw(daemon: Daemon) -> Iterator[Raw]:
    with daemon.raw() as raw:
        yield raw


def floats(count: int, value: float = 0.5) -> dict[str, Any]:
    """An input for the model `same`."""
    return {
        "name": "x",
        "datatype": "FP32",
        "shape": [count],
        "data": np.full(count, value, np.float32).tobytes(),
    }


TRIPS = {"name": "trips", "datatype": "INT64", "shape": [], "data": [2**40]}


def a_run(model: str, request_id: Any, **fields: Any) -> dict[str, Any]:
    """A run of `slow` or `endless`."""
    inputs: list[dict[str, Any]] = [{"name": "x", "datatype": "FP32", "shape": [1, 256], "data": bytes(1024)}]
    if model == "endless":
        inputs.append(TRIPS)
    return {"method": "model_infer", "id": request_id, "model_name": model, "inputs": inputs, **fields}


def steady(header: dict[str, Any]) -> dict[str, Any]:
    """A reply without what differs from one time to the next."""
    header = dict(header)
    if "parameters" in header:
        header["parameters"] = {k: v for k, v in header["parameters"].items() if not k.endswith("_us")}
    return header


CALLS: list[dict[str, Any]] = [
    {"method": "server_live"},
    {"method": "server_ready", "id": "text"},
    {"method": "server_metadata"},
    {"method": "model_ready", "model_name": "same"},
    {"method": "model_ready", "model_name": "none"},
    {"method": "model_metadata", "model_name": "zip"},
    {"method": "repository_index"},
    {"method": "cancel", "cancel_id": 12345},
    {"method": "server_status"},
    {"method": "repository_model_unload", "model_name": "same"},
    {"method": "log_settings"},
    {"method": "dance"},
    {"v": 9, "method": "server_live"},
    {"method": "model_infer", "model_name": "none", "inputs": [floats(1)]},
    {"method": "model_infer", "model_name": "same", "model_version": "7", "inputs": [floats(1)]},
    {"method": "model_infer", "model_name": "same", "inputs": [floats(4)]},
    {"method": "model_infer", "model_name": "same", "inputs": [floats(0)]},
    {"method": "model_infer", "model_name": "same", "inputs": [{**floats(1), "data": [0.25]}]},
    {"method": "model_infer", "model_name": "same", "inputs": [{**floats(3), "shape": [4]}]},
    {"method": "model_infer", "model_name": "same", "inputs": [floats(1), floats(1)]},
    {"method": "model_infer", "model_name": "same", "inputs": []},
    {"method": "model_infer", "model_name": "same", "inputs": [{**floats(1), "parameters": {"odd": 1}}]},
    {"method": "model_infer", "model_name": "same", "inputs": [floats(1)], "parameters": {"odd": 1}},
    {"method": "model_infer", "model_name": "same", "inputs": [floats(1)], "parameters": {"timeout": -1}},
    {"method": "model_infer", "model_name": "same", "inputs": [floats(1)], "outputs": [{"name": "z"}]},
    {"method": "model_infer", "model_name": "same", "inputs": [floats(1)], "must_understand": ["odd"]},
    {
        "method": "model_infer",
        "model_name": "words",
        "inputs": [{"name": "x", "datatype": "BYTES", "shape": [2], "data": ["ä", b"\xff"]}],
    },
    {
        "method": "model_infer",
        "model_name": "many",
        "inputs": [{**floats(2), "name": f"x{i}"} for i in range(12)],
        "outputs": [{"name": "y3"}, {"name": "y1"}],
    },
]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: str(call["method"]))
def test_the_same_answers_as_over_zeromq(lane: Lane, raw: Raw, call: dict[str, Any]) -> None:
    """To the byte, but for the times in them."""
    request = {"id": 8, **call}
    by_lane, over_zeromq = steady(lane.ask(request)), steady(raw.ask(request))
    assert msgpack.packb(by_lane) == msgpack.packb(over_zeromq)
    assert by_lane["id"] == request["id"]


def test_a_request_without_an_id_is_answered_without_one(lane: Lane) -> None:
    """As everywhere."""
    reply = lane.ask({"method": "model_infer", "model_name": "same", "inputs": [floats(1)]})
    assert reply["id"] is None
    assert "error" not in reply


def test_frames_are_what_it_has_not(lane: Lane) -> None:
    """The error says what to do instead."""
    x = {"name": "x", "datatype": "FP32", "shape": [1], "frame": 0}
    reply = lane.infer("same", [x])
    assert code_of(reply) == ("INVALID_ARGUMENT", "MISSING_FRAME")
    assert "region" in reply["error"]["message"]


@pytest.mark.parametrize("count", [5000, 16_000])
def test_what_fits_into_the_packet_is_inline(lane: Lane, count: int) -> None:
    """Also what would be a frame over ZeroMQ."""
    reply = lane.infer("same", [floats(count)])
    assert reply["outputs"][0]["data"] == floats(count)["data"]


def test_an_output_too_large_for_the_packet_may_land_in_a_region(lane: Lane) -> None:
    """Without one it is refused; the connection serves on."""
    count = 100_000
    region = lane.acquire(8 * count)
    region.array((count,))[:] = np.arange(count)
    x = region.tensor("x", (count,), "FP32", 4 * count)
    reply = lane.infer("same", [x])
    assert code_of(reply) == ("RESOURCE_EXHAUSTED", "REPLY_TOO_LARGE")
    assert "region" in reply["error"]["message"]
    wanted = [{"name": "y", "parameters": region.where(4 * count, 4 * count)}]
    reply = lane.infer("same", [x], outputs=wanted)
    assert reply["outputs"][0]["parameters"] == wanted[0]["parameters"]
    assert region.array((count,), offset=4 * count)[-1] == count - 1


def test_a_region_of_one_lane_serves_another_of_the_same_user(daemon: Daemon, lane: Lane) -> None:
    """It belongs to the uid, and ends with the connection that took it."""
    with Lane(daemon) as owner:
        region = owner.acquire(4096)
        region.array((4,))[:] = 7
        x = region.tensor("x", (4,), "FP32", 16)
        assert lane.infer("same", [x])["outputs"][0]["data"] == np.full(4, 7, np.float32).tobytes()
    until(lambda: "error" in lane.infer("same", [x]), what="it ends")
    assert code_of(lane.infer("same", [x])) == ("NOT_FOUND", "REGION_NOT_FOUND")


def test_many_in_flight_on_one_lane(lane: Lane) -> None:
    """Each is answered once, with its own answer; beyond the bound they are refused."""
    lane.send(a_run("slow", "first"))
    for number in range(100):
        lane.send(
            {"method": "model_infer", "id": number, "model_name": "same", "inputs": [floats(1, number)]}
        )
    replies = [lane.receive() for _ in range(101)]
    by_id = {reply["id"]: reply for reply in replies}
    assert len(by_id) == 101
    assert "error" not in by_id.pop("first")
    for number, reply in by_id.items():
        if "error" in reply:
            assert code_of(reply) == ("RESOURCE_EXHAUSTED", "TOO_MANY_IN_FLIGHT")
        else:
            assert reply["outputs"][0]["data"] == floats(1, number)["data"]


def test_an_id_twice_in_flight(daemon: Daemon, lane: Lane) -> None:
    """On one lane it is refused; on another, and over ZeroMQ, it is another's."""
    with Lane(daemon) as other, daemon.raw() as raw:
        for client in (lane, other, raw):
            client.send(a_run("endless", 1))
        lane.send(a_run("endless", 1))
        assert code_of(lane.receive()) == ("ALREADY_EXISTS", "DUPLICATE_ID")
        for client in (lane, other, raw):
            client.send({"method": "cancel", "id": 2, "cancel_id": 1})
        for client in (lane, other):
            answers = {reply["id"]: reply for reply in (client.receive(), client.receive())}
            assert answers[2]["cancelled"] is True
            assert code_of(answers[1]) == ("CANCELLED", "CANCELLED_BY_CLIENT")
        answers = {reply["id"]: reply for reply in (raw.receive()[0], raw.receive()[0])}
        assert code_of(answers[1]) == ("CANCELLED", "CANCELLED_BY_CLIENT")


def test_a_deadline(lane: Lane) -> None:
    """It is kept here too."""
    reply = lane.ask(a_run("endless", 1, parameters={"timeout": 50_000}))
    assert code_of(reply) == ("DEADLINE_EXCEEDED", "DEADLINE_PASSED")


def in_flight(daemon: Daemon, model: str) -> int:
    """Jobs that wait or run."""
    return sum(row["in_flight"] for row in daemon.rows(model))


def test_what_a_lane_asked_ends_with_it(daemon: Daemon) -> None:
    """What runs is stopped, what waits never runs, and others are served."""
    before = daemon.client.statistics("endless")[0]["execution_count"]
    lane = Lane(daemon)
    for number in range(5):
        lane.send(a_run("endless", number))
    until(lambda: in_flight(daemon, "endless"), what="they are in flight")
    lane.close()
    until(lambda: not in_flight(daemon, "endless"), what="they are withdrawn")
    stats = daemon.client.statistics("endless")[0]
    assert stats["execution_count"] == before
    assert stats["inference_stats"]["cancel"]["count"] >= 5


KILLED = """
import mmap, os, socket, sys, msgpack
lane = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
lane.connect(sys.argv[1])
lane.send(msgpack.packb({"method": "lease_acquire", "id": 1, "byte_size": 1 << 20}))
raw, fds, _, _ = socket.recv_fds(lane, 65536, 1)
where = {"shared_memory_region": msgpack.unpackb(raw)["region"], "shared_memory_byte_size": 1024}
x = {"name": "x", "datatype": "FP32", "shape": [1, 256], "parameters": where}
for number in range(4):
    inputs = [x, {"name": "trips", "datatype": "INT64", "shape": [], "data": [2**40]}]
    request = {"method": "model_infer", "id": number, "model_name": "endless", "inputs": inputs}
    lane.send(msgpack.packb(request))
print("asked", flush=True)
lane.recv(65536)
"""


def test_a_client_that_is_killed_leaves_nothing(daemon: Daemon) -> None:
    """Neither requests nor memory, though its runs used it."""
    command = [sys.executable, "-c", KILLED, str(daemon.run_dir / "lease.sock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == b"asked\n"
        until(lambda: in_flight(daemon, "endless"), what="they are in flight")
        assert daemon.client.server_status()["leases"]["bytes"] >= 1 << 20
        os.kill(client.pid, signal.SIGKILL)
    until(lambda: not in_flight(daemon, "endless"), what="they are withdrawn")
    until(lambda: not daemon.client.server_status()["leases"]["regions"], what="the memory is reclaimed")


@pytest.mark.parametrize("count", [200, 16_000])
def test_who_floods_with_requests_and_never_reads_slows_nobody(
    daemon: Daemon, lane: Lane, raw: Raw, count: int
) -> None:
    """The daemon stops reading it; once it reads, each that was taken is answered, large or small."""
    with Lane(daemon) as flood:
        x = flood.acquire(4 * count).tensor("x", (count,), "FP32", 4 * count)
        flood.socket.setblocking(False)
        sent = 0
        while True:
            packet = {"method": "model_infer", "id": sent, "model_name": "same", "inputs": [x]}
            try:
                flood.send(packet)
            except BlockingIOError:
                if not select.select([], [flood.socket], [], 0.3)[1]:
                    break
                continue
            sent += 1
            assert sent < 50_000
        for _ in range(20):
            assert "error" not in lane.infer("same", [floats(1)])
            assert "error" not in raw.infer("same", [floats(1)])
        flood.socket.settimeout(WAIT_S)
        answered = [flood.receive()["id"] for _ in range(sent)]
        assert sorted(answered) == list(range(sent))
        flood.send({"method": "server_live", "id": "still"})
        assert flood.receive() == {"id": "still", "live": True}


def test_garbage_ends_nothing(daemon: Daemon, lane: Lane, raw: Raw) -> None:
    """Noise, damaged requests, and packets that are too large: each is answered, and the loop turns on."""
    rng = random.Random(20)
    good = msgpack.packb({"method": "model_infer", "id": 1, "model_name": "same", "inputs": [floats(8)]})
    with Lane(daemon) as hostile:
        for step in range(1500):
            if step % 3 == 0:
                packet = bytearray(rng.randbytes(rng.choice((1, 7, 100, 3000))))
            else:
                packet = bytearray(good)
                for _ in range(rng.randint(1, 4)):
                    at = rng.randrange(len(packet))
                    packet[at : at + rng.randint(0, 2)] = rng.randbytes(rng.randint(0, 3))
            hostile.send(bytes(packet) or b"\0")
            reply = hostile.receive()
            assert "id" in reply
            assert "error" in reply or "outputs" in reply or "live" in reply
        for packet in (b"\x91" * 60_000, b"x" * 65_537, b"x" * 150_000, good + b"x" * 70_000):
            hostile.send(packet)
            assert hostile.receive()["error"]["reason"] in ("BAD_HEADER", "HEADER_TOO_LARGE")
        for packet in (good, good[:20], b"\xc1"):
            socket.send_fds(hostile.socket, [packet], [0, 1, 2])
            assert "id" in hostile.receive()
    assert "error" not in lane.infer("same", [floats(1)])
    assert "error" not in raw.infer("same", [floats(1)])


def test_lanes_that_come_and_go_leave_no_descriptor(daemon: Daemon, lane: Lane) -> None:
    """In the middle of requests, with replies unread, with half a thought."""
    assert "error" not in lane.infer("same", [floats(1)])
    before = len(os.listdir(f"/proc/{daemon.pid}/fd"))
    for number in range(100):
        with Lane(daemon) as brief, contextlib.suppress(BrokenPipeError):
            for _ in range(number % 5):
                brief.send({"method": "model_infer", "model_name": "same", "inputs": [floats(100)]})
    until(lambda: len(os.listdir(f"/proc/{daemon.pid}/fd")) <= before, what="all are closed")
    assert "error" not in lane.infer("same", [floats(1)])


def test_a_daemon_that_stops_answers_first(tmp_path: Path) -> None:
    """What is in flight is answered, then the connection ends."""
    settings = {"EDGED_SERVER_SHUTDOWN_GRACE": "300ms"}
    with running_daemon(tmp_path, settings, models={"endless.onnx": zoo.slow()}) as daemon:
        daemon.wait_ready("endless")
        with Lane(daemon) as lane:
            lane.send(a_run("endless", 1))
            until(lambda: in_flight(daemon, "endless"), what="it is in flight")
            daemon.forget_client()
            daemon.signal(signal.SIGTERM)
            assert code_of(lane.receive()) == ("UNAVAILABLE", "SERVER_STOPPING")
            assert lane.socket.recv(100) == b""
            assert daemon.wait_end() == 0
