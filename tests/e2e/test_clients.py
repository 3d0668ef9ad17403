"""The shipped clients against the real daemon."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from edged import AsyncClient, Client, InferenceSession, errors
from edged.binding import OrtValue
from tests import zoo
from tests.e2e.harness import WAIT_S, Daemon, ones, running_daemon, until, whole_number

pytestmark = pytest.mark.e2e

MODELS = {
    "numbered.onnx": zoo.versioned(1),
    "mlp.onnx": zoo.mlp(),
    "slow.onnx": zoo.slow(),
    "words.onnx": zoo.string_concat(),
    "zipmap.onnx": zoo.zipmap(("cat", "dog")),
    "big.onnx": zoo.identity("FP32"),
    "rate.onnx": zoo.scalar_rate(echo=True),
    "half.onnx": zoo.identity("BF16"),
}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One daemon for the module."""
    with running_daemon(tmp_path_factory.mktemp("clients"), models=MODELS) as daemon:
        yield daemon


@pytest.fixture
def client(daemon: Daemon) -> Iterator[Client]:
    """A client of the test's own."""
    with Client(daemon.endpoint, timeout=WAIT_S) as client:
        yield client


def slow_inputs(trips: int) -> dict[str, object]:
    """The slow model's inputs."""
    return {"x": np.ones((1, 256), np.float32), "trips": np.array(trips, np.int64)}


def test_arrays_lists_and_strings_go_there_and_back(client: Client) -> None:
    """Small ones and large ones, and the answer knows how it was made."""
    answer = client.infer("numbered", {"x": ones()})
    assert whole_number(answer) == 1
    assert (answer.model_name, answer.model_version, answer.runtime) == ("numbered", "1", "onnxruntime")
    assert answer.compute_us >= 0
    assert client.infer("numbered", {"x": [[1, 1, 1, 1]]}, outputs=["sum"])["sum"].tolist() == [[5.0]]
    big = np.arange(1_000_000, dtype=np.float32)
    assert (client.infer("big", {"x": big})["y"] == big).all()
    assert (client.infer("big", {"x": big[::-2]})["y"] == big[::-2]).all()
    feeds = {"a": ["grü", ""], "b": [b"n", "x"]}
    assert client.infer("words", feeds)["y"].tolist() == ["grün", "x"]
    assert client.infer("words", feeds, decode_strings=False)["y"].tolist() == ["grün".encode(), b"x"]
    maps = client.infer("zipmap", {"x": np.ones((2, 4), np.float32)})["probabilities"]
    assert len(maps) == 2


def test_an_array_alone_is_the_only_input(daemon: Daemon, client: Client) -> None:
    """By the lane, by ZeroMQ, in a lease, as a list; of several inputs the error names them."""
    x = np.float32([[1, 2, 3, 4]])
    with Client(daemon.endpoint, timeout=WAIT_S, fast=False) as plain:
        for asked in (client, plain):
            for given in (x, x.tolist(), memoryview(x)):
                assert asked.infer("numbered", given)["sum"].tolist() == [[11.0]]
            assert asked.submit("numbered", x).result()["sum"].tolist() == [[11.0]]
            big = np.arange(1_000_000, dtype=np.float32)
            assert (asked.infer("big", big)["y"] == big).all()
            with pytest.raises(errors.InvalidArgument, match="expected FP32, got FP64"):
                asked.infer("numbered", x.astype(np.float64))
            for several in (x, [1.0, 2.0], [x, np.array(2)]):
                with pytest.raises(errors.InvalidArgument, match=r"'x'.*'sr'") as caught:
                    asked.infer("rate", several)
                assert caught.value.reason == "INPUT_NOT_NAMED"
    with client.lease(1 << 20) as lease:
        leased = lease.array(100_000)
        leased[:] = 3
        assert (client.infer("big", leased)["y"] == leased).all()

    async def run() -> float:
        async with AsyncClient(daemon.endpoint, timeout=WAIT_S) as asking:
            return float((await asking.infer("numbered", x))["sum"][0, 0])

    assert asyncio.run(run()) == 11.0


def test_one_element_is_a_scalar_as_it_is_for_onnx_runtime(daemon: Daemon, client: Client) -> None:
    """Where the model declares one, and answers in the shapes that ONNX Runtime gives; never the reverse."""
    theirs = ort.InferenceSession(zoo.scalar_rate(echo=True).SerializeToString())
    x = np.float32([[16000, 8000], [4000, 2000]])
    with InferenceSession("rate", endpoint=daemon.endpoint) as ours:
        for sr in (np.array(16000), np.array([16000]), np.array([[16000]]), np.array([[[16000]]]), [16000]):
            got, want = (session.run(None, {"x": x, "sr": sr}) for session in (ours, theirs))
            for value, wanted in zip(got, want, strict=True):
                np.testing.assert_array_equal(value, wanted, strict=True)
        for sr in (np.array([], np.int64), np.array([1, 2])):
            with pytest.raises(errors.InvalidArgument, match=r"expected 0 dimensions \[\]"):
                ours.run(None, {"x": x, "sr": sr})
    with pytest.raises(errors.InvalidArgument, match="expected 1 dimension"):
        client.infer("big", np.array(1, np.float32))


def test_a_result_is_an_answer_of_a_web_handler(client: Client) -> None:
    """Strict JSON, whatever the model gives."""
    maps = client.infer("zipmap", np.ones((1, 4), np.float32)).to_dict()
    assert json.loads(json.dumps(maps, allow_nan=False)) == maps
    assert set(maps["probabilities"][0]) == {"cat", "dog"}
    assert maps["label"][0] in ("cat", "dog")
    assert client.infer("big", np.float32([np.nan, 1])).to_dict() == {"y": ["NaN", 1.0]}
    assert client.infer("half", [1.5, 2]).to_dict() == {"y": [1.5, 2.0]}


def test_each_code_is_an_exception_of_its_own(client: Client) -> None:
    """What the daemon refuses is raised as what it said."""
    with pytest.raises(errors.NotFound):
        client.infer("nobody", {"x": ones()})
    with pytest.raises(errors.InvalidArgument, match="expected FP32"):
        client.infer("numbered", {"x": ones().astype(np.float64)})
    with pytest.raises(errors.DeadlineExceeded):
        client.infer("slow", slow_inputs(2**40), timeout=0.2)
    assert whole_number(client.infer("numbered", {"x": ones()})) == 1


def test_several_are_in_flight_from_one_thread_and_from_many(client: Client) -> None:
    """Each gets its own answer, and one can be cancelled."""
    pending = [client.submit("numbered", {"x": np.full((1, 4), n, np.float32)}) for n in range(50)]
    assert [float(p.result()["sum"][0, 0]) for p in pending] == [4.0 * n + 1 for n in range(50)]
    endless = client.submit("slow", slow_inputs(2**40))
    endless.cancel()
    with pytest.raises(errors.Cancelled):
        endless.result()
    wrong: list[float] = []

    def ask(number: int) -> None:
        for _ in range(20):
            got = float(client.infer("numbered", {"x": np.full((1, 4), number, np.float32)})["sum"][0, 0])
            if got != 4.0 * number + 1:
                wrong.append(got)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert wrong == []


def test_questions_about_the_daemon_and_its_models(daemon: Daemon, client: Client) -> None:
    """Every method of the client, each once."""
    assert client.server_live()
    assert client.server_ready()
    assert client.server_metadata()["name"] == "edged"
    assert client.model_ready("mlp")
    assert client.model_metadata("mlp")["inputs"][0]["name"] == "x"
    assert client.statistics("mlp")[0]["name"] == "mlp"
    assert {r["name"] for r in client.repository_index()} == {n.removesuffix(".onnx") for n in MODELS}
    assert client.server_status()["pid"] == daemon.pid
    assert client.log_settings("info")
    client.unload("words")
    until(lambda: not client.model_ready("words"), what="it is unloaded")
    client.load("words")
    until(lambda: client.model_ready("words"), what="it is back")


def test_the_asyncio_client_does_the_same(daemon: Daemon) -> None:
    """Fifty at once on one loop, errors, a cancelled task."""

    async def run() -> None:
        async with AsyncClient(daemon.endpoint, timeout=WAIT_S) as client:
            answers = await asyncio.gather(
                *(client.infer("numbered", {"x": np.full((1, 4), n, np.float32)}) for n in range(50))
            )
            assert [float(a["sum"][0, 0]) for a in answers] == [4.0 * n + 1 for n in range(50)]
            assert await client.server_ready()
            with pytest.raises(errors.NotFound):
                await client.infer("nobody", {"x": ones()})
            task = asyncio.create_task(client.infer("slow", slow_inputs(2**40)))
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(asyncio.shield(task), 0.2)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert (await client.model_metadata("mlp"))["name"] == "mlp"

    asyncio.run(run())
    until(
        lambda: daemon.client.server_status()["clients"]["in_flight"] == 0,
        what="the cancelled task's request has ended in the daemon too",
    )


def test_a_session_stands_in_for_onnx_runtime_s(daemon: Daemon) -> None:
    """The same numbers, names and shapes as the library gives."""
    session = InferenceSession("mlp", endpoint=daemon.endpoint)
    real = ort.InferenceSession(zoo.mlp().SerializeToString(), providers=["CPUExecutionProvider"])
    assert [(i.name, i.type) for i in session.get_inputs()] == [(i.name, i.type) for i in real.get_inputs()]
    assert [o.name for o in session.get_outputs()] == [o.name for o in real.get_outputs()]
    x = np.random.default_rng(1).normal(size=(3, 64)).astype(np.float32)
    np.testing.assert_allclose(session.run(None, {"x": x})[0], real.run(None, {"x": x})[0], rtol=1e-5)
    assert session.get_providers()


def test_io_binding_reads_at_the_run_and_writes_where_it_was_told(daemon: Daemon) -> None:
    """Step by step beside ONNX Runtime's own: arrays, memory at an address, OrtValues of both makes."""
    theirs = ort.InferenceSession(zoo.scalar_rate(echo=True).SerializeToString())
    ours = InferenceSession("rate", endpoint=daemon.endpoint)
    for session, values in ((ours, OrtValue), (theirs, ort.OrtValue), (ours, ort.OrtValue)):
        x, y = np.float32([[1, 2], [3, 4]]), np.zeros((2, 2), np.float32)
        binding = session.io_binding()
        binding.bind_cpu_input("sr", np.array([2]))
        binding.bind_cpu_input("x", x)
        binding.bind_output("y")
        binding.bind_output("rate", "cpu")
        x[0, 0] = 10
        session.run_with_iobinding(binding)
        first, rate = binding.copy_outputs_to_cpu()
        assert (first.tolist(), rate.tolist()) == ([[5, 1], [1.5, 2]], [2])
        assert [value.shape() for value in binding.get_outputs()] == [[2, 2], [1]]
        (value, _) = binding.get_outputs()
        assert (value.data_type(), value.element_type(), value.device_name()) == ("tensor(float)", 1, "cpu")
        binding.clear_binding_outputs()
        assert binding.copy_outputs_to_cpu() == []

        binding.bind_input("x", "cpu", 0, np.float32, x.shape, x.ctypes.data)
        binding.bind_output("y", "cpu", 0, np.float32, y.shape, y.ctypes.data)
        binding.synchronize_inputs()
        session.run_with_iobinding(binding, None)
        binding.synchronize_outputs()
        assert y.tolist() == [[5, 1], [1.5, 2]]

        into = values.ortvalue_from_numpy(np.zeros((2, 2), np.float32))
        binding.bind_ortvalue_input("x", values.ortvalue_from_numpy(np.float32([[1, 1], [1, 1]])))
        binding.bind_ortvalue_output("y", into)
        session.run_with_iobinding(binding)
        assert into.numpy().tolist() == [[0.5, 0.5], [0.5, 0.5]]
        into.update_inplace(np.ones((2, 2), np.float32))
        assert into.numpy().tolist() == [[1, 1], [1, 1]]

        small = values.ortvalue_from_shape_and_type([1, 2], np.float32)
        binding.bind_ortvalue_output("y", small)
        with pytest.raises((errors.InvalidArgument, RuntimeError), match=r"shape|OUTPUT_DOES_NOT_FIT"):
            session.run_with_iobinding(binding)


def test_a_client_lives_through_a_restart_of_the_daemon(tmp_path: Path) -> None:
    """Gone: a typed error that says what to start. Back: the same object serves, and events go on."""
    with (
        running_daemon(tmp_path, models={"m.onnx": zoo.versioned(1)}) as daemon,
        Client(daemon.endpoint, timeout=WAIT_S) as client,
    ):
        assert whole_number(client.infer("m", {"x": ones()})) == 1
        before = client.server_metadata()["instance_id"]
        assert daemon.stop() == 0
        with pytest.raises(errors.Unavailable) as error:
            client.infer("m", {"x": ones()})
        assert error.value.reason == "DAEMON_NOT_RUNNING"
        assert not client.server_live()
        daemon.start()
        assert whole_number(client.infer("m", {"x": ones()})) == 1
        assert client.server_metadata()["instance_id"] != before


def test_a_request_over_a_killed_daemon_is_not_waited_for(tmp_path: Path) -> None:
    """What was in flight fails soon and typed, and not after its time-out."""
    with (
        running_daemon(tmp_path, models={"slow.onnx": zoo.slow()}) as daemon,
        Client(daemon.endpoint, timeout=600) as client,
    ):
        pending = client.submit("slow", slow_inputs(2**40))
        daemon.wait_row("slow", lambda r: r.get("in_flight") == 1, "it runs")
        daemon.process.kill()
        daemon.wait_end()
        with pytest.raises(errors.Unavailable):
            pending.result(WAIT_S)


def test_small_requests_take_the_fast_lane(daemon: Daemon) -> None:
    """And those in leases; the answers are those of ZeroMQ."""
    rng = np.random.default_rng(3)
    x = rng.normal(0, 1, (1, 64)).astype(np.float32)
    with (
        Client(daemon.endpoint, timeout=WAIT_S) as fast,
        Client(daemon.endpoint, timeout=WAIT_S, fast=False) as plain,
    ):
        for _ in range(3):
            assert (fast.infer("mlp", {"x": x})["y"] == plain.infer("mlp", {"x": x})["y"]).all()
        assert list(fast._links) == ["lease.sock"]
        assert list(plain._links) == ["edged.sock"]
        with fast.lease(1 << 20) as lease:
            given, into = lease.array(100_000), lease.array(100_000, offset=400_000)
            given[:] = np.arange(100_000)
            result = fast.infer("big", {"x": given}, out={"y": into})
            assert (into == given).all()
            assert result["y"].base is not None
        assert list(fast._links) == ["lease.sock"]
        large = rng.normal(0, 1, 200_000).astype(np.float32)
        for _ in range(2):  # its answer is larger than a packet
            assert (fast.infer("big", {"x": large})["y"] == large).all()
        assert list(fast._links) == ["lease.sock", "edged.sock"]
        with pytest.raises(errors.InvalidArgument, match="input 'x'"):
            fast.infer("mlp", {"x": x[:, :3]})
