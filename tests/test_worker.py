"""The worker answers every run exactly once, whatever the model, and a bad model gets no further than it."""

from __future__ import annotations

import mmap
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edged import arrays
from edged.arena import Arena
from edged.process import Spawner, WorkerGone
from edged.properties import METADATA_BYTES_MAX
from edged.runner import LARGE_FORGOTTEN_RUNS, LARGE_REPLY_BYTES_MAX, Runner
from edged.testing import write_fake_model
from tests.operator_tables import table_of, write_into
from tests.test_runtimes import long_model, save, value, zipmap_model
from tests.worker_helpers import WAIT_S, Handle

X = np.arange(6, dtype=np.float32).reshape(3, 2)


@pytest.fixture(scope="module")
def spawner() -> Iterator[Spawner]:
    with Spawner(pythons={}, environ=os.environ) as spawner:
        yield spawner


@pytest.fixture
def worker(spawner: Spawner) -> Iterator[Handle]:
    with Handle(spawner) as worker:
        yield worker


@pytest.fixture
def fake(spawner: Spawner) -> Iterator[Handle]:
    with Handle(spawner, "fake") as worker:
        yield worker


def fake_model(path: Path, **behaviour: Any) -> Path:
    return write_fake_model(path / "m.fake", inputs={"x": ("FP32", (-1, 2))}, **behaviour)


def identity(path: Path, datatype: int = TensorProto.FLOAT, shape: tuple[int, ...] = (-1,)) -> Path:
    node = helper.make_node("Identity", ["x"], ["y"])
    return save(path / "m.onnx", [node], [value("x", shape, datatype)], [value("y", shape, datatype)])


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(
    ("datatype", "array"),
    [
        (TensorProto.FLOAT, np.array([1.5, -0.0, np.nan], np.float32)),
        (TensorProto.DOUBLE, np.array([1.5], np.float64)),
        (TensorProto.FLOAT16, np.array([1.5, 6e4], np.float16)),
        (TensorProto.INT8, np.array([-128, 127], np.int8)),
        (TensorProto.INT64, np.array([-1, 7], np.int64)),
        (TensorProto.UINT64, np.array([7], np.uint64)),
        (TensorProto.BOOL, np.array([True, False])),
        (TensorProto.FLOAT, np.empty(0, np.float32)),
    ],
    ids=lambda v: v.dtype.name + str(v.size) if isinstance(v, np.ndarray) else "",
)
def test_tensors_come_back_bit_by_bit(
    spawner: Spawner, tmp_path: Path, runtime: str, datatype: int, array: Any
) -> None:
    """Every datatype goes through socket, slot and runtime unchanged."""
    with Handle(spawner, runtime) as worker:
        assert worker.load(identity(tmp_path, datatype))[0] == "loaded"
        got = worker.infer({"x": array})["y"]
        assert got.dtype == array.dtype
        assert got.tobytes() == array.tobytes()


def test_strings_and_scalars(worker: Handle, tmp_path: Path) -> None:
    """BYTES tensors carry UTF-8 strings, and a scalar has no dimensions on either way."""
    assert worker.load(identity(tmp_path, TensorProto.STRING))[0] == "loaded"
    assert worker.infer({"x": np.array([b"a", "å".encode(), b""], object)})["y"].tolist() == [
        b"a",
        "å".encode(),
        b"",
    ]
    assert worker.load(identity(tmp_path, shape=()), instance=2)[0] == "loaded"
    got = worker.infer({"x": np.array(2.5, np.float32)}, instance=2)["y"]
    assert (got.shape, float(got)) == ((), 2.5)


def test_sequence_of_maps(worker: Handle, tmp_path: Path) -> None:
    """A classifier with a ZipMap answers a list of lists of pairs."""
    assert worker.load(zipmap_model(tmp_path / "m.onnx"))[0] == "loaded"
    outputs = worker.infer({"x": np.zeros((1, 3), np.float32)})
    datatype, data = outputs["probabilities"]
    assert datatype == "SEQUENCE"
    assert data[0]["datatype"] == "MAP"
    assert [pair[0] for pair in data[0]["data"]] == [0, 1, 2]


def test_reply_too_large_for_a_packet(worker: Handle, tmp_path: Path) -> None:
    """Thousands of maps, more than a packet holds, come by way of the slot."""
    assert worker.load(zipmap_model(tmp_path / "m.onnx"))[0] == "loaded"
    outputs = worker.infer({"x": np.zeros((5000, 3), np.float32)})
    assert len(outputs["probabilities"][1]) == 5000
    assert outputs["label"].shape == (5000,)


@pytest.mark.parametrize("beyond", [-1, 0, 1])
def test_the_bound_of_sequences_and_maps_is_exact(beyond: int) -> None:
    """Up to it they go by way of the slot, beyond it the error says how to ask; the supervisor reads them."""
    size = LARGE_REPLY_BYTES_MAX + beyond
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs, Arena(1, bytes_max=1 << 26) as arena:
        runner = Runner(theirs)
        runner.add_slot(0, os.dup(arena.fd(0)))
        reply = ["done", 3, 0, [["s", "SEQUENCE", None, None, None, b""]], 5]
        overhead = len(msgpack.packb(reply)) + 3  # the length of so many bytes takes five, of none two
        reply[3] = [["s", "SEQUENCE", None, None, None, bytes(size - overhead)]]
        raw = msgpack.packb(reply)
        assert len(raw) == size
        answer = runner._large_reply(reply, raw, [["x", "FP32", [1], 0, 4]])
        if beyond > 0:
            assert answer[:5] == ["failed", 3, 0, "RESOURCE_EXHAUSTED", "OUTPUT_TOO_LARGE"]
            assert str(LARGE_REPLY_BYTES_MAX) in answer[5]
        else:
            assert answer == ["done_large", 3, 0, 64, size]
            assert bytes(arena.read(0, 64, size)) == raw


def test_an_error_with_the_longest_names_is_answered(worker: Handle, tmp_path: Path) -> None:
    """What an error repeats of a model may be more than a packet holds: it is for people, and cut."""
    name = "n" * 160_000
    node = helper.make_node("Identity", [name], ["y"])
    texts = TensorProto.STRING
    path = save(tmp_path / "m.onnx", [node], [value(name, [1], texts)], [value("y", [1], texts)])
    assert worker.load(path, warmup=0, max_batch_size=1)[0] == "loaded"
    worker.send({name: np.array([b"\xff"], object)})
    failed = worker.answer()
    assert failed[3:5] == ["INVALID_ARGUMENT", "BAD_BYTES"]
    assert failed[5] == f"input '{name}"[:2000] + "…"
    assert worker.infer({name: np.array([b"good"], object)})["y"].tolist() == [b"good"]


def test_only_the_outputs_that_were_asked_for(worker: Handle, tmp_path: Path) -> None:
    """Names choose the outputs and their order; a name that is none is the request's fault."""
    assert worker.load(zipmap_model(tmp_path / "m.onnx"))[0] == "loaded"
    assert list(worker.infer({"x": np.zeros((1, 3), np.float32)}, outputs=["label"])) == ["label"]
    worker.send({"x": np.zeros((1, 3), np.float32)}, outputs=["nobody"])
    assert worker.answer()[3] == "INVALID_ARGUMENT"


def test_slots_grow_for_input_and_output(spawner: Spawner, tmp_path: Path) -> None:
    """Megabytes go in and out of a slot that was born small, and the slot is given back."""
    with Handle(spawner, "fake") as worker:
        assert worker.load(fake_model(tmp_path))[0] == "loaded"
        big = np.arange(1_000_000, dtype=np.float32).reshape(-1, 2)
        np.testing.assert_array_equal(worker.infer({"x": big})["x"], big)
        arena = worker.process.arena
        assert arena.memory_bytes() >= 8_000_000
        arena.shrink(0)
        assert arena.memory_bytes() < 1_000_000
        np.testing.assert_array_equal(worker.infer({"x": X})["x"], X)


def test_output_beyond_the_file_limit(spawner: Spawner, tmp_path: Path) -> None:
    """An output that the slot may not hold is a typed error, and the worker goes on."""
    node = helper.make_node("Tile", ["x", "n"], ["y"])
    count = numpy_helper.from_array(np.array([1 << 20], np.int64), "n")
    path = save(tmp_path / "m.onnx", [node], [value("x", [-1])], [value("y", [-1])], [count])
    with Handle(spawner, file_bytes=1 << 20) as worker:
        assert worker.load(path, warmup=0)[0] == "loaded"
        worker.send({"x": np.ones(2, np.float32)})
        assert worker.answer()[3:5] == ["RESOURCE_EXHAUSTED", "OUTPUT_TOO_LARGE"]
        assert worker.infer({"x": np.empty(0, np.float32)})["y"].size == 0


def test_refused_input_leaves_the_worker_well(worker: Handle, tmp_path: Path) -> None:
    """What the runtime says about a wrong input is the request's fault, and the next run is answered."""
    assert worker.load(identity(tmp_path, shape=(2,)))[0] == "loaded"
    worker.send({"x": np.ones(3, np.float32)})
    failed = worker.answer()
    assert failed[0] == "failed"
    assert failed[3] == "INVALID_ARGUMENT"
    assert worker.infer({"x": np.ones(2, np.float32)})["y"].tolist() == [1.0, 1.0]


def test_unloaded_model_is_unavailable(fake: Handle, tmp_path: Path) -> None:
    """A run of what is not loaded, or no more, is answered."""
    assert fake.load(fake_model(tmp_path))[0] == "loaded"
    fake.ask("unload", 1)
    fake.control("unloaded")
    fake.send({"x": X})
    assert fake.answer()[3:5] == ["UNAVAILABLE", "MODEL_UNLOADED"]


def test_cancel_of_a_running_inference(worker: Handle, tmp_path: Path) -> None:
    """A run that would take minutes answers CANCELLED, and the worker goes on."""
    assert worker.load(long_model(tmp_path / "m.onnx"), warmup=0)[0] == "loaded"
    run = worker.send({"t0": np.zeros((1500, 1500), np.float32)})
    worker.ask("cancel", run)
    assert worker.answer()[:4] == ["failed", run, 0, "CANCELLED"]


def test_cancel_of_a_run_that_waits(fake: Handle, tmp_path: Path) -> None:
    """A run that waits behind another is answered CANCELLED without being run."""
    assert fake.load(fake_model(tmp_path, run="hang"), warmup=0)[0] == "loaded"
    first, second = fake.send({"x": X}), fake.send({"x": X}, slot=1)
    fake.ask("cancel", second)
    fake.ask("cancel", first)
    assert [fake.answer()[1:4] for _ in range(2)] == [[first, 0, "CANCELLED"], [second, 1, "CANCELLED"]]


def test_cancel_of_a_load(fake: Handle, tmp_path: Path) -> None:
    """A load that hangs is withdrawn, and the worker loads something else."""
    bad = write_fake_model(tmp_path / "bad", inputs={"x": ("FP32", (-1, 2))}, load="hang")
    fake.control("hello")
    fake.ask("load", 1, {"path": str(bad), "format": "fake", "runtime": "fake", "device": "CPU"})
    fake.ask("cancel_load", 1)
    assert fake.control("load_failed")[3] == "LOAD_CANCELLED"
    assert fake.load(fake_model(tmp_path))[0] == "loaded"


def test_load_that_takes_too_long(fake: Handle, tmp_path: Path) -> None:
    """A load beyond its time is given up as such."""
    failed = fake.load(fake_model(tmp_path, load="hang"), timeout_s=0.05)
    assert failed[:4] == ["load_failed", 1, "DEADLINE_EXCEEDED", "LOAD_TIMEOUT"]


def test_load_while_another_model_runs(fake: Handle, tmp_path: Path) -> None:
    """A load does not hold up the runs of a model that serves."""
    assert fake.load(fake_model(tmp_path))[0] == "loaded"
    hanging = write_fake_model(tmp_path / "bad", inputs={"x": ("FP32", (-1, 2))}, load="hang")
    fake.ask("load", 2, {"path": str(hanging), "format": "fake", "runtime": "fake", "device": "CPU"})
    np.testing.assert_array_equal(fake.infer({"x": X})["x"], X)
    fake.ask("cancel_load", 2)
    fake.control("load_failed")


def saying(path: Path, metadata: dict[str, str]) -> Path:
    """A model with metadata of its own, and without any other."""
    model = onnx.load(identity(path))
    model.graph.name = ""
    helper.set_model_props(model, metadata)
    onnx.save(model, path / "saying.onnx")
    return path / "saying.onnx"


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("count", [10, 13_245, 300_000])
def test_metadata_comes_whole(spawner: Spawner, tmp_path: Path, runtime: str, count: int) -> None:
    """An alphabet in one value, to its last character, by whatever runtime."""
    alphabet = "\n".join(chr(0x4E00 + n % 20_000) for n in range(count))
    metadata = {"character": alphabet, "": "no key", "empty": ""}
    with Handle(spawner, runtime) as worker:
        answer = worker.load(saying(tmp_path, metadata))
        if len(alphabet.encode()) > METADATA_BYTES_MAX:
            excess = answer[2]["metadata_excess"]
            assert excess == [len("characterno keyempty") + len(alphabet.encode()), ["character"]]
        else:
            assert msgpack.unpackb(answer[2]["metadata"]) == metadata
        np.testing.assert_array_equal(worker.infer({"x": X.ravel()})["y"], X.ravel())


@pytest.mark.parametrize("beyond", [-1, 0, 1])
def test_the_bound_of_metadata_is_exact(worker: Handle, tmp_path: Path, beyond: int) -> None:
    """Its bytes as UTF-8, keys and values; one more and nothing is told but that, and the model serves."""
    size = METADATA_BYTES_MAX - 6 - 6 + beyond
    metadata = {"first": "x" * (size // 2), "second": "y" * (size - size // 2), "k": ""}
    answer = worker.load(saying(tmp_path, metadata))
    assert answer[0] == "loaded"
    if beyond > 0:
        assert answer[2]["metadata_excess"] == [METADATA_BYTES_MAX + 1, ["second"]]
    else:
        assert msgpack.unpackb(answer[2]["metadata"]) == metadata


def test_more_names_than_are_told_are_refused_in_words(worker: Handle, tmp_path: Path) -> None:
    """Names and shapes have a bound of their own: some hundred KB serve, a megabyte and more do not."""
    for count, told in ((1000, "loaded"), (6000, "load_failed")):
        names = [f"{n}-{'n' * 150}" for n in range(count)]
        nodes = [helper.make_node("Identity", ["x"], [name]) for name in names]
        path = save(tmp_path / "m.onnx", nodes, [value("x", [-1])], [value(name, [-1]) for name in names])
        answer = worker.load(path, instance=count, warmup=0, max_batch_size=1)
        assert answer[0] == told
        if told == "loaded":
            assert [spec["name"] for spec in answer[2]["outputs"]] == names
        else:
            assert answer[3] == "MODEL_UNSUPPORTED"
            assert "the limit is 1048576" in answer[4]


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("content", [b"", b"garbage" * 100, None], ids=["empty", "garbage", "truncated"])
def test_bad_files_are_load_failures(
    spawner: Spawner, tmp_path: Path, runtime: str, content: bytes | None
) -> None:
    """A file that is no model is refused in words, and the worker lives."""
    good = identity(tmp_path)
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(good.read_bytes()[:-9] if content is None else content)
    with Handle(spawner, runtime) as worker:
        failed = worker.load(bad)
        assert failed[0] == "load_failed"
        assert str(tmp_path) not in failed[4]
        assert worker.load(good, instance=2)[0] == "loaded"


def test_division_bomb_ends_only_its_worker(spawner: Spawner, worker: Handle, tmp_path: Path) -> None:
    """A DepthToSpace with a block of 2^32, which divides by zero in the runtime, hurts nobody else."""
    node = helper.make_node("DepthToSpace", ["x"], ["y"], blocksize=1 << 32)
    bomb = save(tmp_path / "bomb.onnx", [node], [value("x", [1, 4, 2, 2])], [value("y", [-1] * 4)])
    assert worker.load(identity(tmp_path))[0] == "loaded"
    with Handle(spawner) as victim:
        try:
            said = victim.load(bomb)
        except WorkerGone:
            assert victim.ended() == "killed by SIGFPE"
        else:
            assert said[0] == "load_failed"
    assert worker.infer({"x": np.ones(1, np.float32)})["y"].tolist() == [1.0]


def test_memory_bomb_is_a_typed_error(spawner: Spawner, tmp_path: Path) -> None:
    """A ConstantOfShape of gigabytes meets RLIMIT_DATA, and is told as what it is."""
    shape = numpy_helper.from_array(np.array([1 << 32], np.int64), "s")
    node = helper.make_node("ConstantOfShape", ["s"], ["y"])
    bomb = save(tmp_path / "bomb.onnx", [node], [], [value("y", [-1])], [shape])
    with Handle(spawner, data_bytes=400 << 20) as worker:
        said = worker.load(bomb)
        if said[0] == "loaded":
            worker.send({})
            said = worker.answer()
            assert said[3:5] == ["RESOURCE_EXHAUSTED", "MEMORY_LIMIT"]
        else:
            assert said[2:4] == ["RESOURCE_EXHAUSTED", "MEMORY_LIMIT"]
        assert worker.load(identity(tmp_path), instance=2)[0] == "loaded"


def test_model_that_eats_memory_while_it_runs(spawner: Spawner, tmp_path: Path) -> None:
    """A run without end to its memory is answered with MEMORY_LIMIT, and the worker lives."""
    with Handle(spawner, "fake", data_bytes=400 << 20) as worker:
        assert worker.load(fake_model(tmp_path, run="eat"), warmup=0)[0] == "loaded"
        worker.send({"x": X})
        assert worker.answer()[3:5] == ["RESOURCE_EXHAUSTED", "MEMORY_LIMIT"]
        assert worker.load(fake_model(tmp_path), instance=2)[0] == "loaded"
        np.testing.assert_array_equal(worker.infer({"x": X}, instance=2)["x"], X)


def test_warm_up_that_raises_is_only_noted(fake: Handle, tmp_path: Path) -> None:
    """A model that does not like made-up inputs loads all the same."""
    loaded = fake.load(fake_model(tmp_path, run="raise"))
    assert loaded[0] == "loaded"
    assert "as it was told" in loaded[2]["warmup_note"]


def golden(folder: Path, **arrays: Any) -> str:
    folder.mkdir()
    np.savez(folder / "one.npz", **{k.replace("__", "/"): v for k, v in arrays.items()})
    return str(folder)


def test_golden_samples_are_checked(fake: Handle, tmp_path: Path) -> None:
    """A model that answers as its samples say is loaded, and says how many were checked."""
    folder = golden(tmp_path / "golden", inputs__x=X, outputs__x=X)
    inline = [{"inputs": {"x": [[1, 2]]}, "outputs": {"x": [[1, 2]]}}]
    loaded = fake.load(fake_model(tmp_path), golden_dir=folder, golden=inline)
    assert loaded[0] == "loaded"
    assert loaded[2]["golden"] == 2


def test_golden_mismatch_is_a_load_failure_with_the_figure(fake: Handle, tmp_path: Path) -> None:
    """A model that answers otherwise is not served, and the message says by how much."""
    folder = golden(tmp_path / "golden", inputs__x=X, outputs__x=X)
    failed = fake.load(fake_model(tmp_path, run="double"), golden_dir=folder)
    assert failed[3] == "GOLDEN_MISMATCH"
    assert "5 of 6 elements differ by up to 5" in failed[4]


def test_golden_sample_that_names_nothing_is_a_load_failure(fake: Handle, tmp_path: Path) -> None:
    """A sample that cannot be checked is not one that passed."""
    folder = golden(tmp_path / "golden", inputs__nobody=X)
    assert fake.load(fake_model(tmp_path), golden_dir=folder)[3] == "GOLDEN_MISMATCH"


def test_measure_compares_two_runtimes(spawner: Spawner, tmp_path: Path) -> None:
    """A fresh worker times reference and candidate on the model itself, and says that they agree."""
    weight = np.random.default_rng(0).standard_normal((64, 10)).astype(np.float32)
    path = save(
        tmp_path / "m.onnx",
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        [value("x", [-1, 64])],
        [value("y", [-1, 10])],
        [numpy_helper.from_array(weight, "w")],
    )
    part = {"device": "CPU", "precision": "f32", "threads": 1}
    with Handle(spawner, measurer=True) as worker:
        worker.control("hello")
        settings = {
            "path": str(path),
            "format": "onnx",
            "reference": {"runtime": "onnxruntime", **part},
            "candidate": {"runtime": "openvino", **part},
            "budget_s": 0.5,
            "tolerance": {},
            "operators_dir": str(
                write_into(tmp_path / "operators", table_of("MatMul-13(FP32,FP32=)")).parent
            ),
            "finite_inputs": True,
        }
        worker.ask("measure", settings)
        result = worker.control("measured")[1]
    assert result["agrees"], result
    assert result["proven"], result
    assert result["reference_p50_us"] > 0
    assert result["candidate_p50_us"] > 0


class Leased:
    """A region that a worker was given."""

    def __init__(self, worker: Handle, number: int = 1, nbytes: int = 1 << 16) -> None:
        fd = os.memfd_create("edged-lease-test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, nbytes)
        self.number = number
        self.memory = mmap.mmap(fd, nbytes)
        self._worker, self._fd = worker, fd

    def give(self) -> Leased:
        """Passes it."""
        assert self._worker.process.send_control(["region", self.number], self._fd)
        os.close(self._fd)
        return self

    def row(self, name: str, array: Any, offset: int = 0) -> list[Any]:
        """Puts an input there; its row in the run's packet."""
        datatype, shape, raw = arrays.to_raw(np.asarray(array))
        self.memory[offset : offset + len(raw)] = bytes(raw)
        return [name, datatype, shape, offset, len(raw), self.number]

    def run(self, row: list[Any], into: dict[str, list[int]], run_id: int = 1) -> list[Any]:
        """Runs instance 1; the answer."""
        packet = ["run", run_id, 1, 0, 0, [row], None, into]
        assert self._worker.process.send_run(packet)
        return self._worker.answer()


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("offset", [0, 64, 3])
def test_leased_memory_is_read_and_written(
    spawner: Spawner, tmp_path: Path, runtime: str, offset: int
) -> None:
    """Input and output lie in one region; when it is taken back nothing of it stays mapped."""
    with Handle(spawner, runtime) as worker:
        assert worker.load(identity(tmp_path))[0] == "loaded"
        region = Leased(worker).give()
        x = np.arange(100, dtype=np.float32)
        answer = region.run(region.row("x", x, offset), {"y": [1, 8192, 400]})
        assert answer[:1] + answer[3] == ["done", ["y", "FP32", [100], 0, 400]]
        np.testing.assert_array_equal(np.frombuffer(region.memory, np.float32, 100, 8192), x)
        worker.ask("region_gone", 1)
        deadline = time.monotonic() + WAIT_S
        while "edged-lease" in Path(f"/proc/{worker.process.pid}/maps").read_text():
            assert time.monotonic() < deadline, "the region is still mapped"
            os.sched_yield()


def test_a_run_waits_for_its_region(worker: Handle, tmp_path: Path) -> None:
    """Two sockets have no order; whichever is read first, the run is served."""
    assert worker.load(identity(tmp_path))[0] == "loaded"
    region = Leased(worker)
    row = region.row("x", np.ones(3, np.float32))
    assert worker.process.send_run(["run", 1, 1, 0, 0, [row], None, {}])
    region.give()
    assert worker.answer()[0] == "done"


def test_a_region_that_never_comes(worker: Handle, tmp_path: Path) -> None:
    """The wait is bounded, and the next run is served."""
    assert worker.load(identity(tmp_path))[0] == "loaded"
    region = Leased(worker)
    answer = region.run(region.row("x", np.ones(3, np.float32)), {})
    assert answer[3:5] == ["INTERNAL", "REGION_NOT_MAPPED"]
    region.give()
    assert region.run(region.row("x", np.ones(3, np.float32)), {})[0] == "done"


def test_an_output_beyond_its_place_is_not_written(worker: Handle, tmp_path: Path) -> None:
    """The run fails, and the client's memory is as it was."""
    assert worker.load(identity(tmp_path))[0] == "loaded"
    region = Leased(worker).give()
    answer = region.run(region.row("x", np.ones(100, np.float32)), {"y": [1, 8192, 399]})
    assert answer[3:5] == ["INVALID_ARGUMENT", "OUTPUT_DOES_NOT_FIT"]
    assert region.memory[8192:8600] == b"\0" * 408


def test_a_large_reply_is_not_misled_by_offsets_in_a_region(worker: Handle, tmp_path: Path) -> None:
    """It goes behind what lies in the slot, however far out in a region the input was."""
    assert worker.load(zipmap_model(tmp_path / "m.onnx"))[0] == "loaded"
    region = Leased(worker, nbytes=1 << 28).give()
    row = region.row("x", np.zeros((5000, 3), np.float32), 1 << 27)
    answer = region.run(row, {"label": [1, 1 << 26, 40_000]})
    assert answer[0] == "done"
    assert worker.process.arena.memory_bytes() < 16 << 20
    rows = {each[0]: each for each in answer[3]}
    assert rows["label"][1:] == ["INT64", [5000], 0, 40_000]
    assert len(msgpack.unpackb(rows["probabilities"][5])) == 5000


def test_an_expired_run_is_not_run(fake: Handle, tmp_path: Path) -> None:
    """A packet that the worker comes to when nobody waits for it any more is answered at once."""
    assert fake.load(fake_model(tmp_path, run="crash"), warmup=0)[0] == "loaded"
    fake.send({"x": X}, deadline_ns=time.monotonic_ns() - 1)
    assert fake.answer()[3:5] == ["DEADLINE_EXCEEDED", "DEADLINE_PASSED"]


def test_a_deadline_to_come_does_not_hinder(fake: Handle, tmp_path: Path) -> None:
    """Before its deadline a run is run."""
    assert fake.load(fake_model(tmp_path))[0] == "loaded"
    deadline_ns = time.monotonic_ns() + 3600 * 10**9
    np.testing.assert_array_equal(fake.infer({"x": X}, deadline_ns=deadline_ns)["x"], X)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_batch_of_leased_and_framed_rows(spawner: Spawner, tmp_path: Path, runtime: str) -> None:
    """What lies in regions is copied between the rows that are in the slot already."""
    with Handle(spawner, runtime) as worker:
        assert worker.load(identity(tmp_path, shape=(-1, 100)))[0] == "loaded"
        x = np.arange(300, dtype=np.float32).reshape(3, 100)
        first, second = Leased(worker, 1), Leased(worker, 2)
        first.row("x", x[0], 64)
        second.row("x", x[2], 3)
        worker.process.arena.slot_view(0, 1200)[400:800] = x[1].tobytes()
        row = ["x", "FP32", [3, 100], 0, 1200, None, [[1, 64, 0, 400], [2, 3, 800, 400]]]
        assert worker.process.send_run(["run", 1, 1, 0, 0, [row], None, {}])
        first.give()
        second.give()
        answer = worker.answer()
        assert answer[0] == "done", answer
        _, datatype, shape, offset, nbytes = answer[3][0]
        assert (datatype, shape, nbytes) == ("FP32", [3, 100], 1200)
        got = np.frombuffer(worker.process.arena.read(0, offset, nbytes), np.float32).reshape(shape)
        np.testing.assert_array_equal(got, x)


def test_a_bad_boolean_of_a_batch_is_found_after_its_copy(worker: Handle, tmp_path: Path) -> None:
    """The client's memory is looked at only where the client cannot change it any more."""
    assert worker.load(identity(tmp_path, TensorProto.BOOL))[0] == "loaded"
    region = Leased(worker).give()
    region.memory[:2] = b"\x01\x02"
    row = ["x", "BOOL", [3], 0, 3, None, [[1, 0, 1, 2]]]
    assert region.run(row, {})[3:5] == ["INVALID_ARGUMENT", "BAD_DATA"]


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_instances_run_at_once_and_a_cancel_hits_its_own(
    spawner: Spawner, tmp_path: Path, runtime: str
) -> None:
    """Three runs of minutes at once: each is cancelled by its number, in another order than they came."""
    with Handle(spawner, runtime) as worker:
        loaded = worker.load(long_model(tmp_path / "m.onnx"), warmup=0, instances=3)
        assert loaded[2]["instances"] == 3
        x = {"t0": np.zeros((1500, 1500), np.float32)}
        runs = [worker.send(x, slot=slot) for slot in range(3)]
        for slot in (1, 2, 0):
            worker.ask("cancel", runs[slot])
            assert worker.answer()[:4] == ["failed", runs[slot], slot, "CANCELLED"]


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_runs_at_once_do_not_mix(spawner: Spawner, tmp_path: Path, runtime: str) -> None:
    """Hundreds of runs over three threads are each answered with their own numbers."""
    with Handle(spawner, runtime) as worker:
        assert worker.load(identity(tmp_path, shape=(-1, 4)), instances=3)[0] == "loaded"
        free, sent = list(range(4)), {}
        for number in range(400):
            if not free:
                free.append(check(worker, sent))
            slot = free.pop()
            x = np.full((1 + number % 3, 4), number, np.float32)
            sent[worker.send({"x": x}, slot=slot)] = x
        while sent:
            check(worker, sent)


def check(worker: Handle, sent: dict[int, Any]) -> int:
    """Compares the next answer with what was sent; its slot."""
    answer = worker.answer()
    assert answer[0] == "done", answer
    _, _, shape, offset, nbytes = answer[3][0]
    got = np.frombuffer(worker.process.arena.read(answer[2], offset, nbytes), np.float32).reshape(shape)
    np.testing.assert_array_equal(got, sent.pop(answer[1]))
    slot: int = answer[2]
    return slot


def test_memory_of_a_large_run_is_given_back(worker: Handle, tmp_path: Path) -> None:
    """Some runs after one that was much larger than the others, the runtime's memory is free again."""
    rng = np.random.default_rng(0)
    weights = [numpy_helper.from_array(rng.standard_normal((256, 256)).astype("f4"), f"w{n}") for n in (0, 1)]
    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("MatMul", ["b", "w1"], ["c"]),
        helper.make_node("ReduceMax", ["c"], ["y"], axes=[1], keepdims=1),
    ]
    path = save(tmp_path / "m.onnx", nodes, [value("x", [-1, 256])], [value("y", [-1, 1])], weights)
    assert worker.load(path)[0] == "loaded"
    small, large = np.ones((1, 256), np.float32), np.ones((60_000, 256), np.float32)
    worker.infer({"x": large})
    worker.process.arena.shrink(0)
    held = memory_bytes(worker)
    for _ in range(LARGE_FORGOTTEN_RUNS + 1):
        worker.infer({"x": small})
    assert memory_bytes(worker) < held - large.nbytes


def memory_bytes(worker: Handle) -> int:
    """The memory that is the worker's own."""
    for line in Path(f"/proc/{worker.process.pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Private_Dirty:"):
            return int(line.split()[1]) << 10
    raise AssertionError("no such line")


def test_an_unload_waits_for_all_runs(fake: Handle, tmp_path: Path) -> None:
    """A model is not taken apart under the runs that use it, on whichever thread."""
    assert fake.load(fake_model(tmp_path, run="hang"), warmup=0, instances=2)[0] == "loaded"
    runs = [fake.send({"x": X}, slot=slot) for slot in range(2)]
    fake.ask("unload", 1)
    for run in runs:
        fake.ask("cancel", run)
    # One that had not begun when the model was taken away is told so.
    answers = sorted(fake.answer() for _ in runs)
    assert [answer[1] for answer in answers] == runs
    assert {answer[3] for answer in answers} <= {"CANCELLED", "UNAVAILABLE"}
    fake.control("unloaded")
