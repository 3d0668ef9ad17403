"""Nothing is cut off: metadata to the last character, replies of any size, and words beyond a bound."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import onnxruntime as ort
import pytest

from edged import AsyncClient, Client, InferenceSession, errors
from edged.properties import METADATA_BYTES_MAX
from tests import zoo
from tests.e2e.harness import WAIT_S, Daemon, Edgectl, Raw, code_of, running_daemon, until
from tests.e2e.lanes import Lane
from tests.zmtp import Sleeper

pytestmark = pytest.mark.e2e

MIB = 1 << 20
MESSAGE_BYTES = 72 * MIB
"""The bound of replies here: more than is kept for a client that does not read."""

ALPHABET = "\n".join(chr(0x4E00 + n) for n in range(13_245))
LONG = "".join(chr(0x4E00 + n % 20_000) for n in range(340_000))
SAID = {
    "ocr": {"character": ALPHABET, "version": "8.1", "empty": ""},
    "long": {"character": LONG},
    "chatty": {"character": LONG, "more": "x" * MIB, "labels": "a,b"},
}
MODELS: dict[str, Any] = {f"{name}.onnx": zoo.saying(said) for name, said in SAID.items()}
MODELS |= {"big.onnx": zoo.expand(), "texts.onnx": zoo.expand("BYTES"), "zip.onnx": zoo.zipmap()}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One daemon for all tests here; that it survives each of them is part of them."""
    settings = {"EDGED_LIMITS_MESSAGE_BYTES": "72MiB", "EDGED_LIMITS_LEASE_BYTES": "512MiB"}
    with running_daemon(tmp_path_factory.mktemp("whole"), settings, models=MODELS) as daemon:
        pid = daemon.pid
        for name in MODELS:
            daemon.wait_ready(name.removesuffix(".onnx"))
        yield daemon
        assert daemon.process.poll() is None
        assert daemon.pid == pid
        assert '"daemon_bug"' not in daemon.log()
        assert '"client_slow"' not in daemon.log()
        assert all(row["restarts"] == 0 for row in daemon.rows() if row["serving"])


@pytest.fixture
def raw(daemon: Daemon) -> Iterator[Raw]:
    with daemon.raw() as raw:
        yield raw


@pytest.fixture
def lane(daemon: Daemon) -> Iterator[Lane]:
    with Lane(daemon) as lane:
        yield lane


def asked(count: int, request_id: Any = 1, **fields: Any) -> dict[str, Any]:
    """A run of `big` that answers so many floats."""
    return {
        "method": "model_infer",
        "id": request_id,
        "model_name": "big",
        "inputs": [
            {"name": "x", "datatype": "FP32", "shape": [1], "data": struct.pack("<f", 1.5)},
            {"name": "count", "datatype": "INT64", "shape": [1], "data": [count]},
        ],
        **fields,
    }


def counts(daemon: Daemon, name: str = "big") -> tuple[int, int]:
    """How many requests succeeded and failed, by the statistics."""
    (stats,) = daemon.client.statistics(name)
    assert stats["latency_us"]["count"] == stats["inference_stats"]["success"]["count"]
    return stats["inference_stats"]["success"]["count"], stats["inference_stats"]["fail"]["count"]


# ---- metadata -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ocr", "long"])
def test_metadata_comes_whole_to_every_client(daemon: Daemon, raw: Raw, name: str) -> None:
    """As the file has it, and as ONNX Runtime tells it."""
    said = SAID[name]
    properties = raw.call("model_metadata", model_name=name)["properties"]
    assert said.items() <= properties.items()
    assert daemon.client.model_metadata(name)["properties"] == properties

    async def ask() -> dict[str, Any]:
        async with AsyncClient(daemon.endpoint, timeout=WAIT_S) as client:
            return await client.model_metadata(name)

    assert asyncio.run(ask())["properties"] == properties
    theirs = ort.InferenceSession(daemon.models / f"{name}.onnx").get_modelmeta()
    with InferenceSession(name, endpoint=daemon.endpoint) as session:
        mine = session.get_modelmeta()
    assert mine.custom_metadata_map == theirs.custom_metadata_map == said
    for key in ("producer_name", "graph_name", "domain", "description", "graph_description", "version"):
        assert getattr(mine, key) == getattr(theirs, key)


def test_metadata_beyond_the_bound_is_an_error_and_costs_nothing_else(
    daemon: Daemon, raw: Raw, capsys: pytest.CaptureFixture[str]
) -> None:
    """It names the keys; the model serves, and all that needs no metadata goes on without."""
    reply = raw.call("model_metadata", model_name="chatty")
    assert code_of(reply) == ("RESOURCE_EXHAUSTED", "METADATA_TOO_LARGE")
    for part in ("(the largest: 'more')", str(METADATA_BYTES_MAX), "'properties' false"):
        assert part in reply["error"]["message"]
    without = raw.call("model_metadata", model_name="chatty", parameters={"properties": False})
    assert [spec["name"] for spec in without["inputs"]] == ["x"]
    assert "properties" not in without
    must = {"must_understand": ["properties"], "parameters": {"properties": False}}
    assert raw.call("model_metadata", model_name="chatty", **must) == without
    client = daemon.client
    with pytest.raises(errors.ResourceExhausted, match="'more'"):
        client.model_metadata("chatty")
    assert client.model_metadata("chatty", properties=False) == without
    assert client.infer("chatty", {"x": [1.0, 2.0]})["y"].tolist() == [1.0, 2.0]
    assert client.submit("chatty", {"x": [1.0, 2.0]}).result()["y"].tolist() == [1.0, 2.0]

    async def ask() -> Any:
        async with AsyncClient(daemon.endpoint, timeout=WAIT_S) as client:
            return await client.infer("chatty", {"x": [1.0, 2.0]})

    assert asyncio.run(ask())["y"].tolist() == [1.0, 2.0]
    with InferenceSession("chatty", endpoint=daemon.endpoint) as session:
        assert session.run(None, {"x": np.ones(1, np.float32)})[0].tolist() == [1.0]
        with pytest.raises(errors.ResourceExhausted, match="METADATA_TOO_LARGE"):
            session.get_modelmeta()
    code, out, err = Edgectl(daemon.endpoint, capsys)("infer", "chatty", "-i", "x=[1.0, 2.0]")
    assert code == 0, (out, err)


def test_metadata_by_lane(lane: Lane, raw: Raw) -> None:
    """What fits into a packet comes in it; what does not lands in memory, or is refused in words."""
    assert lane.call("model_metadata", model_name="ocr")[0]["properties"]["character"] == ALPHABET
    refused, _ = lane.call("model_metadata", model_name="long")
    assert code_of(refused) == ("RESOURCE_EXHAUSTED", "REPLY_TOO_LARGE")
    assert "parameters" in refused["error"]["message"]
    region = lane.acquire(2 * MIB)
    where = region.where(MIB + 4096, 64)
    told, fds = lane.call("model_metadata", model_name="long", parameters=where)
    assert not fds
    landed = told["parameters"]
    assert (landed["shared_memory_region"], landed["shared_memory_offset"]) == (region.name, 64)
    packed = region.memory[64 : 64 + landed["shared_memory_byte_size"]]
    header = msgpack.unpackb(packed)
    assert header.pop("id") == told["id"]
    assert header == raw.call("model_metadata", model_name="long")
    assert header["properties"]["character"] == LONG
    short = region.where(landed["shared_memory_byte_size"] - 1)
    refused, _ = lane.call("model_metadata", model_name="long", parameters=short)
    assert code_of(refused) == ("INVALID_ARGUMENT", "OUTPUT_DOES_NOT_FIT")
    assert str(landed["shared_memory_byte_size"]) in refused["error"]["message"]
    index, _ = lane.call("repository_index", parameters=region.where(MIB))
    header = msgpack.unpackb(region.memory[: index["parameters"]["shared_memory_byte_size"]])
    assert {row["name"] for row in header["models"]} == set(SAID) | {"big", "texts", "zip"}
    lane.release(region.name)
    gone, _ = lane.call("model_metadata", model_name="long", parameters=where)
    assert code_of(gone) == ("NOT_FOUND", "REGION_NOT_FOUND")


def test_a_second_start_tells_the_same(tmp_path: Path) -> None:
    """Metadata of a model that is kept as ONNX Runtime has optimised it is kept whole too."""
    model = zoo.mlp((64, 4096, 1024))
    zoo.onnx.helper.set_model_props(model, SAID["ocr"])
    assert len(model.SerializeToString()) > 4 << 20
    with Daemon(tmp_path) as daemon:
        zoo.write(daemon.models / "kept.onnx", model)
        for _ in range(2):
            daemon.start()
            daemon.wait_ready("kept")
            properties = daemon.client.model_metadata("kept")["properties"]
            assert SAID["ocr"].items() <= properties.items()
            until(lambda: list(daemon.cache.glob("onnxruntime/[0-9a-f]*")), what="it is kept")
            daemon.stop()


# ---- replies --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "nbytes",
    [64 * MIB - 4, 64 * MIB, 64 * MIB + 4, MESSAGE_BYTES - 4, MESSAGE_BYTES, MESSAGE_BYTES + 4],
)
def test_a_reply_comes_or_is_refused(daemon: Daemon, raw: Raw, nbytes: int) -> None:
    """Around what is kept for a client that does not read, and around what a message may have."""
    success, fail = counts(daemon)
    raw.send(asked(nbytes // 4))
    header, frames = raw.receive()
    if nbytes > MESSAGE_BYTES:
        assert code_of(header) == ("RESOURCE_EXHAUSTED", "REPLY_TOO_LARGE")
        for part in (str(nbytes), str(MESSAGE_BYTES), "leased memory"):
            assert part in header["error"]["message"]
        assert counts(daemon) == (success, fail + 1)
    else:
        assert header["outputs"][0]["frame"] == 0
        assert frames == [struct.pack("<f", 1.5) * (nbytes // 4)]
        assert counts(daemon) == (success + 1, fail)
    assert raw.quiet()


def test_leased_memory_is_the_way_out(daemon: Daemon) -> None:
    """What lands there is in no reply, so no bound of replies is for it."""
    count = MESSAGE_BYTES // 4 + 1000
    with Client(daemon.endpoint, timeout=WAIT_S) as client, client.lease(4 * count) as lease:
        y = lease.array((count,), np.float32)
        inputs = {"x": np.float32([2.5]), "count": np.int64([count])}
        with pytest.raises(errors.ResourceExhausted, match="REPLY_TOO_LARGE"):
            client.infer("big", inputs)
        assert client.infer("big", inputs, out={"y": y})["y"].shape == (count,)
        assert (y == 2.5).all()


def test_strings_of_every_size(daemon: Daemon, raw: Raw) -> None:
    """BYTES are counted as they are on the wire; by lane and by ZeroMQ alike."""
    word = b"w" * MIB
    for count in (60, 71, 72):
        raw.send(
            {
                "method": "model_infer",
                "id": count,
                "model_name": "texts",
                "inputs": [
                    {"name": "x", "datatype": "BYTES", "shape": [1], "frame": 0},
                    {"name": "count", "datatype": "INT64", "shape": [1], "data": [count]},
                ],
            },
            [struct.pack("<I", MIB) + word],
        )
        header, frames = raw.receive()
        if count == 72:
            assert code_of(header) == ("RESOURCE_EXHAUSTED", "REPLY_TOO_LARGE")
        else:
            assert frames == [(struct.pack("<I", MIB) + word) * count]
    assert counts(daemon, "texts") == (2, 1)


def test_a_reply_too_large_for_a_lane_is_a_failure(daemon: Daemon, lane: Lane) -> None:
    """Its client got an error, and so the statistics have it; sequences count as tensors do."""
    success, fail = counts(daemon)
    assert len(lane.ask(asked(16_000))["outputs"][0]["data"]) == 64_000
    assert code_of(lane.ask(asked(17_000))) == ("RESOURCE_EXHAUSTED", "REPLY_TOO_LARGE")
    assert counts(daemon) == (success + 1, fail + 1)
    region = lane.acquire(2000 * 16)
    x = region.tensor("x", (2000, 4), "FP32", 2000 * 16)
    assert code_of(lane.infer("zip", [x])) == ("RESOURCE_EXHAUSTED", "REPLY_TOO_LARGE")
    assert counts(daemon, "zip") == (0, 1)


def test_many_who_read_at_once_all_get_theirs(daemon: Daemon) -> None:
    """Each more than is kept for one that does not read."""
    success, fail = counts(daemon)
    count = 66 * MIB // 4

    def ask(number: int) -> bool:
        with Client(daemon.endpoint, timeout=WAIT_S, fast=False) as client:
            inputs = {"x": np.float32([number]), "count": np.int64([count])}
            y = client.infer("big", inputs)["y"]
            return bool(y.nbytes == 66 * MIB and (y == number).all())

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(ask, range(8)))
    after, failed = counts(daemon)
    assert (after - success, failed - fail) == (8, 0)


def test_one_who_does_not_read_is_bounded_told_and_alone(daemon: Daemon) -> None:
    """Beyond one on its way and one kept it gets errors in place of replies; each request has one answer."""
    success, fail = counts(daemon)
    with contextlib.closing(Sleeper(daemon.endpoint.removeprefix("ipc://"))) as sleeper:
        for number in range(5):
            sleeper.send([msgpack.packb(asked(66 * MIB // 4, number))])
        until(lambda: counts(daemon) == (success + 2, fail + 3), what="two wait, three were refused")
        with daemon.raw() as other:
            assert other.call("server_live")["live"]
            other.send(asked(MIB, "mine"))
            header, frames = other.receive()
            assert (header["id"], len(frames[0])) == ("mine", 4 * MIB)
        for number in range(2):
            head, frame = sleeper.receive()
            assert (msgpack.unpackb(head)["id"], len(frame)) == (number, 66 * MIB)
        for number in range(2, 5):
            (head,) = sleeper.receive()
            reply = msgpack.unpackb(head)
            assert (reply["id"], *code_of(reply)) == (number, "RESOURCE_EXHAUSTED", "REPLIES_UNREAD")
        sleeper.send([msgpack.packb(asked(66 * MIB // 4, "again"))])
        head, frame = sleeper.receive()
        assert (msgpack.unpackb(head)["id"], len(frame)) == ("again", 66 * MIB)
