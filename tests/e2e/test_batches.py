"""Several requests at once in one worker: instances that run beside each other."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import zoo
from tests.e2e.harness import Daemon, Raw, code_of

pytestmark = pytest.mark.e2e

FOREVER = 2**40
"""Rounds of the slow model: days of work."""

ORT = 'runtime = "onnxruntime"\n'


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One daemon for the whole module."""
    folder: Path = tmp_path_factory.mktemp("batches")
    with Daemon(folder, {"EDGED_DEVICES_EXCLUDE": "cuda"}) as daemon:
        zoo.write(daemon.models / "wide.toml", (ORT + "instances = 2\n").encode())
        zoo.write(daemon.models / "wide.onnx", zoo.slow())
        zoo.write(daemon.models / "shared.toml", (ORT + 'instances = 2\nisolation = "shared"\n').encode())
        zoo.write(daemon.models / "shared.onnx", zoo.scalar_sum())
        daemon.start()
        yield daemon
        assert '"daemon_bug"' not in daemon.log()


@pytest.fixture
def raw(daemon: Daemon) -> Iterator[Raw]:
    """A DEALER of the test's own."""
    with daemon.raw() as client:
        yield client


def slow_request(request_id: str, model: str, trips: int, **parameters: Any) -> dict[str, Any]:
    """A request of the slow model."""
    x = {"name": "x", "datatype": "FP32", "shape": [1, 256], "data": struct.pack("<f", 0.5) * 256}
    trips_tensor = {"name": "trips", "datatype": "INT64", "shape": [], "data": struct.pack("<q", trips)}
    return {
        "method": "model_infer",
        "id": request_id,
        "model_name": model,
        "inputs": [x, trips_tensor],
        "parameters": parameters,
    }


def test_two_instances_run_beside_each_other(daemon: Daemon, raw: Raw) -> None:
    """A request is answered while another that never ends runs before it; a cancel ends only its own."""
    daemon.wait_ready("wide")
    raw.send(slow_request("forever", "wide", FOREVER))
    raw.send(slow_request("short", "wide", 1))
    reply, _ = raw.receive()
    assert (reply["id"], "error" in reply) == ("short", False)
    raw.send(slow_request("second", "wide", FOREVER))
    raw.send(slow_request("waits", "wide", 1))
    raw.send({"method": "cancel", "id": 7, "cancel_id": "second"})
    answered = {reply["id"]: reply for reply, _ in (raw.receive() for _ in range(3))}
    assert code_of(answered["second"])[0] == "CANCELLED"
    assert "error" not in answered["waits"]
    raw.send({"method": "cancel", "id": 8, "cancel_id": "forever"})
    answered = {reply["id"]: reply for reply, _ in (raw.receive() for _ in range(2))}
    assert code_of(answered["forever"])[0] == "CANCELLED"


def test_the_threads_are_divided_among_the_instances(daemon: Daemon) -> None:
    """The status tells the instances and the threads of each."""
    row = daemon.wait_ready("wide")
    assert row["instances"] == 2
    assert row["threads"] >= 1


def test_instances_of_what_shares_a_process_are_told_to_be_without_effect(daemon: Daemon) -> None:
    """What the owner asked for and does not get is said where he looks."""
    row = daemon.wait_ready("shared")
    assert row["instances"] == 1
    assert "instances = 2 has no effect" in row["message"]
