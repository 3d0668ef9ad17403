"""Kept answers, through the real daemon: the same bytes come back without a run, on both sockets."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import zoo
from tests.e2e.harness import Daemon, Raw

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One daemon for the whole module."""
    folder: Path = tmp_path_factory.mktemp("cache")
    with Daemon(folder, {"EDGED_DEVICES_EXCLUDE": "cuda"}) as daemon:
        settings = b'runtime = "onnxruntime"\n[cache]\nbytes = "1MiB"\nttl = "1h"\n'
        zoo.write(daemon.models / "kept.toml", settings)
        zoo.write(daemon.models / "kept.onnx", zoo.identity())
        daemon.start()
        daemon.wait_ready("kept")
        yield daemon
        assert '"daemon_bug"' not in daemon.log()


@pytest.fixture
def raw(daemon: Daemon) -> Iterator[Raw]:
    """A DEALER of the test's own."""
    with daemon.raw() as client:
        yield client


def ask(raw: Raw, request_id: int, values: list[float]) -> tuple[dict[str, Any], bytes]:
    """A reply's parameters and the output's bytes, wherever they are."""
    data = struct.pack(f"<{len(values)}f", *values)
    tensor = {"name": "x", "datatype": "FP32", "shape": [len(values)], "frame": 0}
    header = {"method": "model_infer", "id": request_id, "model_name": "kept", "inputs": [tensor]}
    raw.send(header, [data])
    reply, frames = raw.receive()
    assert (reply["id"], "error" in reply) == (request_id, False)
    (output,) = reply["outputs"]
    return reply["parameters"], output["data"] if "data" in output else frames[output["frame"]]


@pytest.mark.parametrize("length", [3, 20_000])
def test_the_same_inputs_again_are_answered_without_a_run(raw: Raw, length: int) -> None:
    """Small ones inline and large ones in a frame; other bytes are another question."""
    first, answer = ask(raw, 1, [1.5] * length)
    assert "cache" not in first
    again, kept = ask(raw, 2, [1.5] * length)
    assert (again["cache"], again["device"], again["compute_us"]) == ("hit", first["device"], 0)
    assert kept == answer
    other, different = ask(raw, 3, [2.5] * length)
    assert "cache" not in other
    assert different != answer


def test_hits_and_misses_are_counted(raw: Raw) -> None:
    """With their times, and without an execution for a hit."""
    before = raw.call("model_statistics", model_name="kept")["model_stats"][0]
    for request_id in range(3):
        ask(raw, request_id, [0.25, 7.0])
    after = raw.call("model_statistics", model_name="kept")["model_stats"][0]
    assert after["execution_count"] - before["execution_count"] == 1
    hits, misses = (
        {
            key: after["inference_stats"][kind][key] - before["inference_stats"][kind][key]
            for key in ("count", "ns")
        }
        for kind in ("cache_hit", "cache_miss")
    )
    assert (hits["count"], misses["count"]) == (2, 1)
    assert hits["ns"] > 0
    assert misses["ns"] > 0
