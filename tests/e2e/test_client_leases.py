"""The shipped clients' leases against the real daemon: what an app gets unasked, and what it can ask for."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from edged import AsyncClient, Client, InferenceSession, errors
from edged.arrays import RawTensor
from tests import zoo
from tests.e2e.harness import WAIT_S, Daemon, running_daemon, until

pytestmark = pytest.mark.e2e

MODELS = {
    "floats.onnx": zoo.identity("FP32"),
    "halves.onnx": zoo.identity("FP16"),
    "bytes.onnx": zoo.identity("UINT8"),
    "words.onnx": zoo.string_concat(),
    "mlp.onnx": zoo.mlp(),
}
N = 300_000


def powers() -> onnx.ModelProto:
    """`x` FP32 [n,n] to its 25th power: a second and more for a large one."""
    value = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", "n"]) for name in "xy"]
    names = ["x", *(f"p{at}" for at in range(23)), "y"]
    nodes = [helper.make_node("MatMul", [a, "x"], [b]) for a, b in itertools.pairwise(names)]
    graph = helper.make_graph(nodes, "powers", value[:1], value[1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One daemon for the module."""
    models = {**MODELS, "powers.onnx": powers()}
    with running_daemon(tmp_path_factory.mktemp("leases"), models=models) as daemon:
        yield daemon


@pytest.fixture
def client(daemon: Daemon) -> Iterator[Client]:
    """A client of the test's own, which leaves no lease behind."""
    with Client(daemon.endpoint, timeout=WAIT_S) as client:
        yield client
    until(lambda: lent(daemon)["regions"] == 0, what="all leases have come back")


def lent(daemon: Daemon) -> dict[str, int]:
    """What the daemon says about leases."""
    leases: dict[str, int] = daemon.client.server_status()["leases"]
    return leases


def test_large_arrays_go_by_lease_without_being_asked_to(daemon: Daemon, client: Client) -> None:
    """Floats, which are read in place, halves and integers, strings; one buffer serves them all."""
    rng = np.random.default_rng(1)
    for model, dtype in (("floats", np.float32), ("halves", np.float16), ("bytes", np.uint8)):
        for _ in range(3):
            x = (rng.random(500_000) * 100).astype(dtype)
            assert (client.infer(model, {"x": x})["y"] == x).all()
    words = np.array([f"{n:06}" for n in range(50_000)])
    got = client.infer("words", {"a": words, "b": words})["y"]
    assert got[-1] in ("049999049999", b"049999049999")
    assert 1 <= lent(daemon)["regions"] <= 2


def test_an_app_makes_its_tensors_in_a_lease_and_finds_its_outputs_there(client: Client) -> None:
    """Nothing goes through a socket; the result is a view of what was given, in the output's real size."""
    with client.lease(12 * N) as lease:
        x, y = lease.array(N), lease.array(2 * N, offset=4 * N)
        for n in range(5):
            x[:], y[:] = np.arange(N) + n, -1
            result = client.infer("floats", {"x": x}, out={"y": y})
            assert result["y"].shape == (N,)
            assert np.shares_memory(result["y"], y)
            assert (y[:N] == x).all()
            assert (y[N:] == -1).all()
        raw = RawTensor("FP32", (N,), x.view(np.uint8).data)
        assert (client.infer("floats", {"x": raw})["y"] == x).all()
    result["y"][:] = 5  # Still memory, though no longer the daemon's.
    assert (client.infer("floats", {"x": x})["y"] == x).all()


def test_an_output_that_has_no_place_is_refused(client: Client) -> None:
    """Too large for its array, or nothing that lies in memory; and the lease serves on."""
    with client.lease(8 * N) as lease:
        x, y = lease.array(N), lease.array(N, offset=4 * N)
        with pytest.raises(errors.InvalidArgument) as error:
            client.infer("floats", {"x": x}, out={"y": y[:10]})
        assert error.value.reason == "OUTPUT_DOES_NOT_FIT"
        with pytest.raises(errors.InvalidArgument):
            client.infer("words", {"a": ["a"], "b": ["b"]}, out={"y": y})
        x[:] = 3
        assert (client.infer("floats", {"x": x}, outputs=["y"], out={"y": y})["y"] == 3).all()
        small = client.infer("mlp", {"x": np.ones((2, 64), np.float32)})
        name = next(iter(small))
        there = client.infer("mlp", {"x": np.ones((2, 64), np.float32)}, out={name: y})
        np.testing.assert_array_equal(there[name], small[name])


def test_the_quota_is_typed_for_a_lease_and_unseen_by_arrays(tmp_path: Path) -> None:
    """What this user's other apps hold is missing, and frames do."""
    settings = {"EDGED_LIMITS_LEASE_BYTES": str(4 << 20)}
    models = {"floats.onnx": MODELS["floats.onnx"]}
    with (
        running_daemon(tmp_path, settings, models=models) as daemon,
        Client(daemon.endpoint, timeout=WAIT_S) as client,
    ):
        with pytest.raises(errors.ResourceExhausted) as error:
            client.lease(5 << 20)
        assert error.value.reason == "LEASE_QUOTA"
        with client.lease(4 << 20):
            x = np.arange(N, dtype=np.float32)
            assert (client.infer("floats", {"x": x})["y"] == x).all()
            assert lent(daemon)["regions"] == 1


def test_threads_submissions_and_a_session_get_their_own_answers(daemon: Daemon, client: Client) -> None:
    """Whatever they share."""
    wrong: list[object] = []

    def ask(number: int) -> None:
        for at in range(10):
            x = np.full(N, number * 100 + at, np.float32)
            if not (client.infer("floats", {"x": x})["y"] == x).all():
                wrong.append((number, at))

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    x = np.empty(N, np.float32)
    pending = []
    for n in range(8):
        x[:] = n
        pending.append(client.submit("floats", {"x": x}))
    assert [float(each.result()["y"][-1]) for each in pending] == list(range(8))
    for thread in threads:
        thread.join(WAIT_S)
    assert wrong == []
    with InferenceSession("floats.onnx", endpoint=daemon.endpoint) as session:
        assert (session.run(None, {"x": x})[0] == x).all()
        assert session._client._leases._pool


def test_a_run_that_goes_on_after_its_time_is_over_keeps_its_memory(daemon: Daemon, client: Client) -> None:
    """Nobody else's tensor comes into it meanwhile, and it comes back when the run has ended."""
    square = np.zeros((1500, 1500), np.float32)
    with pytest.raises(errors.DeadlineExceeded):
        client.infer("powers", {"x": square}, timeout=0.1)
    assert client._leases._pool == {}
    x = np.ones(N, np.float32)
    assert (client.infer("floats", {"x": x})["y"] == x).all()
    until(lambda: lent(daemon)["regions"] == 1, what="the run has ended")


def test_the_asyncio_client_does_the_same(daemon: Daemon) -> None:
    """Many at once, and a lease of the app's."""

    async def run() -> None:
        async with AsyncClient(daemon.endpoint, timeout=WAIT_S) as client:
            arrays = [np.full(N, n, np.float32) for n in range(20)]
            answers = await asyncio.gather(*(client.infer("floats", {"x": x}) for x in arrays))
            assert [float(a["y"][-1]) for a in answers] == list(range(20))
            with await client.lease(8 * N) as lease:
                x, y = lease.array(N), lease.array(N, offset=4 * N)
                x[:] = 7
                result = await client.infer("floats", {"x": x}, out={"y": y})
                assert np.shares_memory(result["y"], y)
                assert (y == 7).all()

    asyncio.run(run())
    until(lambda: lent(daemon)["regions"] == 0, what="all leases have come back")


def test_a_restart_loses_leases_and_nothing_else(tmp_path: Path) -> None:
    """The app's own say so; large arrays go on as if nothing had been."""
    with (
        running_daemon(tmp_path, models={"floats.onnx": MODELS["floats.onnx"]}) as daemon,
        Client(daemon.endpoint, timeout=WAIT_S) as client,
    ):
        lease = client.lease(4 * N)
        mine = lease.array(N)
        mine[:] = 1
        x = np.arange(N, dtype=np.float32)
        for _ in range(2):
            assert (client.infer("floats", {"x": x})["y"] == x).all()
            daemon.process.kill()
            daemon.wait_end()
            assert lease.lost
            daemon.start()
            assert (client.infer("floats", {"x": x})["y"] == x).all()
            with pytest.raises(errors.Unavailable) as error:
                client.infer("floats", {"x": mine})
            assert error.value.reason == "LEASE_LOST"
            assert (client.infer("floats", {"x": mine.copy()})["y"] == 1).all()
        daemon.forget_client()
