"""Several requests at once in one worker: batches, and instances that run beside each other."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edged import Client
from tests import zoo
from tests.e2e.harness import WAIT_S, Daemon, Raw, code_of, until

pytestmark = pytest.mark.e2e

FOREVER = 2**40
"""Rounds of the slow model: days of work."""

ORT = 'runtime = "onnxruntime"\n'

MOODY = 'max_batch_size = 8\nrows = "independent"\n'
"""Its loop turns as often as the row with the most says, which changes no answer: so its owner vouches."""


def moody() -> onnx.ModelProto:
    """`x` FP32 [N,4] → `y`, twice `x`: rows stand alone, but what stands in them decides about the run.

    The largest of the first column is how often a loop goes round, the second column indexes a table of ten
    rows, beyond which the run fails. A -8 in the third ends the process.
    """
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["go_on"]),
            helper.make_node("Tanh", ["state"], ["next"]),
        ],
        "round",
        [
            helper.make_tensor_value_info("round_number", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", TensorProto.FLOAT, [1]),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, [1]),
        ],
    )
    constants = {
        "first": np.array([0], np.int64),
        "second": np.array([1], np.int64),
        "third": np.array([2], np.int64),
        "seven": np.array([7], np.int64),
        "least": np.array([zoo.INT64_MIN]),
        "true": np.array(True),
        "zero": np.zeros(1, np.float32),
        "two": np.array([2], np.float32),
        "table": np.zeros((10, 1), np.float32),
    }
    nodes = [
        helper.make_node("Gather", ["x", "first"], ["rounds_of"], axis=1),
        helper.make_node("ReduceMax", ["rounds_of"], ["most"], keepdims=0),
        helper.make_node("Cast", ["most"], ["trips"], to=TensorProto.INT64),
        helper.make_node("Loop", ["trips", "true", "zero"], ["nothing"], body=body),
        helper.make_node("Gather", ["x", "second"], ["index_of"], axis=1),
        helper.make_node("Cast", ["index_of"], ["index"], to=TensorProto.INT64),
        helper.make_node("Squeeze", ["index", "one_axis"], ["flat"]),
        helper.make_node("Gather", ["table", "flat"], ["entry"], axis=0),
        helper.make_node("Mul", ["x", "two"], ["twice"]),
        helper.make_node("Add", ["twice", "nothing"], ["later"]),
        helper.make_node("Gather", ["x", "third"], ["divisor_of"], axis=1),
        helper.make_node("Cast", ["divisor_of"], ["whole"], to=TensorProto.INT64),
        helper.make_node("Add", ["whole", "seven"], ["divisor"]),
        helper.make_node("Div", ["least", "divisor"], ["quotient"]),
        helper.make_node("Cast", ["quotient"], ["much"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["much", "zero"], ["little"]),
        helper.make_node("Add", ["later", "entry"], ["latest"]),
        helper.make_node("Add", ["latest", "little"], ["y"]),
    ]
    constants["one_axis"] = np.array([1], np.int64)
    graph = helper.make_graph(
        nodes,
        "moody",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def deadly() -> onnx.ModelProto:
    """`d` INT64 [N] → `y`, the smallest integer divided by 2d - 1: a d of 0 ends the process."""
    graph = helper.make_graph(
        [
            helper.make_node("Mul", ["d", "two"], ["double"]),
            helper.make_node("Sub", ["double", "one"], ["divisor"]),
            helper.make_node("Div", ["least", "divisor"], ["y"]),
        ],
        "deadly",
        [helper.make_tensor_value_info("d", TensorProto.INT64, ["N"])],
        [helper.make_tensor_value_info("y", TensorProto.INT64, ["N"])],
        [
            numpy_helper.from_array(np.array([number], np.int64), name)
            for name, number in (("two", 2), ("one", 1), ("least", zoo.INT64_MIN))
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One daemon for the whole module."""
    folder: Path = tmp_path_factory.mktemp("batches")
    with Daemon(folder, {"EDGED_DEVICES_EXCLUDE": "cuda"}) as daemon:
        zoo.write(daemon.models / "wide.toml", (ORT + "instances = 2\n").encode())
        zoo.write(daemon.models / "wide.onnx", zoo.slow())
        zoo.write(daemon.models / "shared.toml", (ORT + 'instances = 2\nisolation = "shared"\n').encode())
        zoo.write(daemon.models / "shared.onnx", zoo.scalar_sum())
        zoo.write(daemon.models / "moody.toml", (ORT + MOODY).encode())
        zoo.write(daemon.models / "moody.onnx", moody())
        zoo.write(daemon.models / "deadly.toml", ORT.encode())
        zoo.write(daemon.models / "deadly.onnx", deadly())
        zoo.write(daemon.models / "words.onnx", zoo.string_concat())
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


def rows(*values: list[float]) -> bytes:
    """Rows of the moody model."""
    return np.array(values, np.float32).tobytes()


def moody_request(request_id: str, data: bytes, **parameters: Any) -> dict[str, Any]:
    """A request of the moody model, with as many rows as there are bytes."""
    x = {"name": "x", "datatype": "FP32", "shape": [len(data) // 16, 4], "data": data}
    return {
        "method": "model_infer",
        "id": request_id,
        "model_name": "moody",
        "inputs": [x],
        "parameters": parameters,
    }


class Occupied:
    """The moody model's worker runs something without end, and has the next run at its socket.

    What comes until it is freed waits in the queue, and so is there for one batch.
    """

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._raw = daemon.raw()

    def __enter__(self) -> Occupied:
        daemon = self._daemon
        daemon.wait_ready("moody")
        self._raw.send(moody_request("endless", rows([2.0**40, 0, 0, 0])))
        self._wait(running=1, queued=0)
        self._raw.send(moody_request("next", rows([0, 0, 0, 0])))
        until(lambda: self._count() == 2, what="the second request came")
        return self

    def _count(self) -> int:
        row = self._daemon.serving("moody")
        return 0 if row is None else row["in_flight"] + row["queue"]

    def _wait(self, running: int, queued: int) -> None:
        def there() -> bool:
            row = self._daemon.serving("moody")
            return row is not None and (row["in_flight"], row["queue"]) == (running, queued)

        until(there, what=f"{running} running, {queued} queued")

    def free(self, waiting: int) -> None:
        """Ends the endless run when so many requests wait beside the first two."""
        until(lambda: self._count() == 2 + waiting, what=f"{waiting} requests wait")
        self._raw.send({"method": "cancel", "id": "stop", "cancel_id": "endless"})

    def __exit__(self, *_exc: object) -> None:
        self._raw.close()


def test_requests_of_two_clients_share_a_run(daemon: Daemon) -> None:
    """Each gets its own rows, and both are told how many ran together."""
    with Occupied(daemon) as occupied, daemon.raw() as one, daemon.raw() as other:
        one.send(moody_request("a", rows([0, 1, 2, 3])))
        other.send(moody_request("b", rows([0, 4, 5, 6], [0, 7, 8, 9])))
        occupied.free(waiting=2)
        (first, first_frames), (second, second_frames) = one.receive(), other.receive()
    for reply, frames, want in (
        (first, first_frames, [[0, 2, 4, 6]]),
        (second, second_frames, [[0, 8, 10, 12], [0, 14, 16, 18]]),
    ):
        assert "error" not in reply, reply
        assert reply["parameters"]["batch_size"] == 3
        output = reply["outputs"][0]
        raw = output["data"] if "data" in output else frames[0]
        assert output["shape"] == [len(want), 4]
        assert np.frombuffer(raw, np.float32).reshape(-1, 4).tolist() == want


def test_a_bad_row_of_a_batch_fails_alone(daemon: Daemon) -> None:
    """Its neighbour is answered, by itself."""
    with Occupied(daemon) as occupied, daemon.raw() as one, daemon.raw() as other:
        one.send(moody_request("good", rows([0, 1, 2, 3])))
        other.send(moody_request("bad", rows([0, 99, 0, 0])))
        occupied.free(waiting=2)
        good, bad = one.receive()[0], other.receive()[0]
    assert "error" in bad, bad
    assert "error" not in good, good
    assert good["parameters"]["batch_size"] == 1


def test_a_row_that_ends_the_worker_takes_no_neighbour_along(daemon: Daemon) -> None:
    """Both are run again by themselves, and only the deadly one is told of a crash."""
    with Occupied(daemon) as occupied, daemon.raw() as one, daemon.raw() as other:
        one.send(moody_request("good", rows([0, 1, 2, 3])))
        other.send(moody_request("deadly", rows([0, 0, -8, 0])))
        occupied.free(waiting=2)
        good, dead = one.receive()[0], other.receive()[0]
    assert code_of(dead) == ("UNAVAILABLE", "WORKER_CRASHED")
    assert "error" not in good, good
    assert good["parameters"]["batch_size"] == 1
    assert daemon.wait_ready("moody")["restarts"] >= 2


def test_leased_and_framed_rows_share_a_run(daemon: Daemon) -> None:
    """Rows that lie in leased memory are put beside those that came in a message."""
    with (
        Occupied(daemon) as occupied,
        daemon.raw() as other,
        Client(daemon.endpoint, timeout=WAIT_S) as client,
        client.lease(64) as lease,
        ThreadPoolExecutor(1) as pool,
    ):
        x = lease.array((1, 4))
        x[:] = [[0, 1, 2, 3]]
        asked = pool.submit(client.infer, "moody", {"x": x})
        other.send(moody_request("b", rows([0, 4, 5, 6])))
        occupied.free(waiting=2)
        reply, _ = other.receive()
        result = asked.result(WAIT_S)
    assert reply["parameters"]["batch_size"] == 2
    assert result.parameters["batch_size"] == 2
    assert result["y"].tolist() == [[0, 2, 4, 6]]


def test_the_trial_of_batches_may_end_the_worker(daemon: Daemon) -> None:
    """A model that made-up numbers are deadly to is loaded anew without batches, and serves."""
    row = daemon.wait_ready("deadly")
    assert row["batch"]["max"] == 1
    assert '"batch_refused"' in daemon.log()


def test_strings_are_never_batched(daemon: Daemon) -> None:
    """What has no fixed size stays by itself."""
    assert "BYTES" in daemon.wait_ready("words")["batch"]["why"]
