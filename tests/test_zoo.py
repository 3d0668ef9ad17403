"""The models of the zoo do what the other tests take for granted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # only effective before the import
import onnxruntime as ort

from tests import zoo


def session(model: onnx.ModelProto | bytes) -> ort.InferenceSession:
    """A quiet session on the CPU."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    data = model if isinstance(model, bytes) else model.SerializeToString()
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def run(model: onnx.ModelProto, **feeds: Any) -> list[Any]:
    """Every output of one run."""
    outputs: list[Any] = session(model).run(None, feeds)
    return outputs


def load_in_child(path: Path, *, runtime: str = "onnxruntime") -> int:
    """How a process ends that loads the model: 0, or the negative number of a signal."""
    program = {
        "onnxruntime": "import sys, onnxruntime as o; o.InferenceSession(sys.argv[1])",
        "openvino": (
            "import sys; sys.modules['openvino_telemetry'] = None\n"
            "import openvino as o; o.Core().compile_model(sys.argv[1], 'CPU')"
        ),
    }[runtime]
    command = [sys.executable, "-c", f"import resource; resource.setrlimit(4, (0, 0))\n{program}", str(path)]
    return subprocess.run(command, capture_output=True, timeout=60, check=False).returncode


def test_mlp_is_the_same_for_a_seed_and_another_for_another() -> None:
    """The seed alone decides the weights, and the answers are probabilities that depend on the input."""
    x = np.random.default_rng(0).normal(0, 1, (5, 64)).astype(np.float32)
    assert zoo.mlp(seed=1).SerializeToString() == zoo.mlp(seed=1).SerializeToString()
    (first,) = run(zoo.mlp(seed=1), x=x)
    (second,) = run(zoo.mlp(seed=2), x=x)
    assert first.shape == (5, 10)
    assert np.allclose(first.sum(axis=1), 1, atol=1e-5)
    assert not np.allclose(first[0], first[1])
    assert not np.allclose(first, second)


@pytest.mark.parametrize("datatype", zoo.ONNX_TYPES)
def test_identity_loads_for_every_datatype(datatype: str) -> None:
    """Each datatype has an identity, and what numpy can hold comes back as it went in."""
    loaded = session(zoo.identity(datatype, [2]))
    if datatype == "BF16":
        return  # numpy has no such type; the worker's tests carry it as raw bytes
    x = np.array(["a", "b"] if datatype == "BYTES" else [0, 1], dtype=zoo.NUMPY_TYPES[datatype])
    (y,) = loaded.run(None, {"x": x})
    assert y.tolist() == x.tolist()


def test_identity_of_a_scalar_and_of_nothing() -> None:
    """Rank zero and length zero are both legal."""
    (scalar,) = run(zoo.identity("FP32", []), x=np.array(2.5, np.float32))
    assert scalar.shape == ()
    (nothing,) = run(zoo.identity("FP32", ["N", 3]), x=np.zeros((0, 3), np.float32))
    assert nothing.shape == (0, 3)


def test_versioned_tells_its_number_in_every_element() -> None:
    """No element of an answer can be taken for another version's."""
    version, total = run(zoo.versioned(7, width=33), x=np.full((2, 4), 0.5, np.float32))
    assert version.shape == (2, 33)
    assert (version == 7).all()
    assert (total == 9).all()


def test_shapes_that_depend_on_the_input() -> None:
    """Free rank, data-dependent shapes, a scalar output, a defaulted input, many of everything."""
    (cube,) = run(zoo.free_rank(), x=np.ones((2, 1, 3), np.float32))
    assert (cube == 2).all()
    (where,) = run(zoo.nonzero(), x=np.array([0, 1, 0, 1], np.float32))
    assert where.tolist() == [[1, 3]]
    (total,) = run(zoo.scalar_sum(), x=np.zeros(0, np.float32))
    assert total.shape == ()
    (biased,) = run(zoo.optional_input(), x=np.zeros(2, np.float32))
    assert biased.tolist() == [5, 5]
    several = run(zoo.many(3), **{f"x{i}": np.zeros(1, np.float32) for i in range(3)})
    assert [y.item() for y in several] == [0, 1, 2]
    (mean,) = run(zoo.image_mean(), x=np.ones((1, 3, 224, 224), np.float32))
    assert mean.shape == (1, 3)


def test_conv_net_answers_each_row_by_itself() -> None:
    """The batch is a dynamic dimension, and a row's answer does not depend on its neighbours."""
    x = np.random.default_rng(0).normal(0, 1, (3, 3, 32, 32)).astype(np.float32)
    (together,) = run(zoo.conv_net(seed=1, side=32), x=x)
    (alone,) = run(zoo.conv_net(seed=1, side=32), x=x[1:2])
    assert together.shape == (3, 10)
    assert np.allclose(together[1], alone[0], rtol=1e-4, atol=1e-4)
    assert not np.allclose(together[0], together[1])


def test_strings() -> None:
    """Strings go in and come out."""
    (joined,) = run(zoo.string_concat(), a=np.array(["ab", ""], object), b=np.array(["ä", "d"], object))
    assert joined.tolist() == ["abä", "d"]


@pytest.mark.parametrize("labels", [(10, 20, 30), ("cat", "dog")])
def test_zipmap_gives_a_map_for_each_row(labels: tuple[Any, ...]) -> None:
    """The converter's classic answer: a label, and label → probability for each row."""
    label, probabilities = run(zoo.zipmap(labels), x=np.eye(4, dtype=np.float32)[:2])
    assert len(label) == len(probabilities) == 2
    assert set(probabilities[0]) == set(labels)
    assert sum(probabilities[0].values()) == pytest.approx(1, abs=1e-5)


def test_zipmap_of_scikit_learn() -> None:
    """The real converter's model gives maps too."""
    loaded = session(zoo.sklearn_zipmap())
    feeds = {loaded.get_inputs()[0].name: np.array([[5.1, 3.5, 1.4, 0.2]], np.float32)}
    label, probabilities = loaded.run(None, feeds)
    assert label.tolist() == [0]
    assert set(probabilities[0]) == {0, 1, 2}


def test_sequence_and_optional_outputs() -> None:
    """Outputs that are no tensors."""
    x = np.array([1, 2], np.float32)
    (parts,) = run(zoo.sequence_output(), x=x)
    assert [p.tolist() for p in parts] == [[1, 2], [2, 4]]
    (maybe,) = run(zoo.optional_output(), x=x)
    assert maybe.tolist() == [1, 2]


def test_slow_takes_its_trips_from_the_request_or_its_maker() -> None:
    """Both forms run the same loop."""
    x = np.ones((1, 16), np.float32)
    (asked,) = run(zoo.slow(width=16), x=x, trips=np.array(4, np.int64))
    (fixed,) = run(zoo.slow(4, width=16), x=x)
    assert np.array_equal(asked, fixed)
    assert not np.array_equal(asked, run(zoo.slow(5, width=16), x=x)[0])


def test_failing_raises_at_run_time_only() -> None:
    """It loads, and a wrong index is the runtime's error."""
    loaded = session(zoo.failing())
    with pytest.raises(Exception, match="indices"):
        loaded.run(None, {"x": np.zeros(2, np.float32), "i": np.array([9], np.int64)})


def test_external_data_is_read_from_beside_the_model(tmp_path: Path) -> None:
    """The bundle has two files and needs both."""
    path = zoo.external_data(tmp_path / "bundle", scale=3)
    assert sorted(p.name for p in path.parent.iterdir()) == ["model.onnx", "weights.bin"]
    (y,) = ort.InferenceSession(str(path)).run(None, {"x": np.ones((1, 64), np.float32)})
    assert (y == 3).all()
    (path.parent / "weights.bin").unlink()
    with pytest.raises(Exception, match=r"weights\.bin"):
        ort.InferenceSession(str(path))


def test_sigfpe_ends_its_process(tmp_path: Path) -> None:
    """The tiny file really does kill ONNX Runtime, or the tests of crashes would prove nothing."""
    path = zoo.write(tmp_path / "bad.onnx", zoo.sigfpe())
    assert path.stat().st_size < 200
    assert load_in_child(path) == -signal.SIGFPE


def test_sigfpe_at_run_is_a_good_model_until_the_poisoned_request() -> None:
    """It divides as it should; what ends the process is one pair of numbers, which is not tried here."""
    (y,) = run(zoo.sigfpe_at_run(), x=np.array([zoo.INT64_MIN]), d=np.array([2]))
    assert y.tolist() == [-(2**62)]


def test_openvino_killer_ends_its_process(tmp_path: Path) -> None:
    """The other tiny file kills OpenVINO, and ONNX Runtime refuses it."""
    pytest.importorskip("openvino")
    path = zoo.write(tmp_path / "bad.onnx", zoo.openvino_killer())
    assert load_in_child(path, runtime="openvino") == -signal.SIGSEGV
    assert load_in_child(path) == 1


def test_memory_bomb_is_small_on_disk_and_harmless_under_a_limit(tmp_path: Path) -> None:
    """The file is tiny; without a limit it takes gigabytes, under one its load or its first run fails."""
    path = zoo.write(tmp_path / "bomb.onnx", zoo.memory_bomb(1.5))
    assert path.stat().st_size < 500
    program = (
        "import resource, sys, onnxruntime as o\n"
        "limit = int(sys.argv[2])\n"
        "if limit: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))\n"
        "try: o.InferenceSession(sys.argv[1]).run(None, {})\n"
        "except Exception: print('refused')\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
    )

    def child(limit: int) -> list[str]:
        command = [sys.executable, "-c", program, str(path), str(limit)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.split()

    assert int(child(0)[-1]) > 1.5 * 2**30
    refused, peak = child(1 << 30)
    assert refused == "refused"
    assert int(peak) < 1.2 * 2**30


def test_memory_bomb_at_run_takes_what_the_request_asks() -> None:
    """It loads, and a small request is answered."""
    (y,) = run(zoo.memory_bomb_at_run(), n=np.array([5], np.int64))
    assert y.shape == (5,)


def test_ep_context_names_the_operator_to_refuse() -> None:
    """The node is where the daemon's check looks for it."""
    assert [n.op_type for n in zoo.ep_context().graph.node] == ["EPContext"]


def test_write_leaves_no_temporary_file_and_replaces(tmp_path: Path) -> None:
    """What is there afterwards is the whole model, and nothing beside it."""
    path = zoo.write(tmp_path / "deep" / "m.onnx", zoo.mlp(seed=1))
    zoo.write(path, zoo.mlp(seed=2))
    assert path.read_bytes() == zoo.mlp(seed=2).SerializeToString()
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("name", zoo.REAL_MODELS)
def test_real_graphs_answer_differently_for_different_inputs(name: str) -> None:
    """The graphs' answers are finite probabilities that depend on the input, unlike those shipped."""
    loaded = session(zoo.real(name).read_bytes())
    feed = loaded.get_inputs()[0]
    assert [i.name for i in loaded.get_inputs()] == [feed.name]
    rng = np.random.default_rng(5)
    answers = [
        loaded.run(None, {feed.name: (rng.normal(0, s, (1, 3, 224, 224))).astype("f")})[0].ravel()
        for s in (0.5, 2)
    ]
    assert np.isfinite(answers).all()
    assert answers[0].sum() == pytest.approx(1, abs=1e-3)
    assert answers[0].max() < 0.999
    assert np.linalg.norm(answers[0] - answers[1]) > 0.01 * np.linalg.norm(answers[0])
