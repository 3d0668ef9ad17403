"""Rows share a run only where each is answered as it would be alone; the times say whether it pays."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper, numpy_helper

from edged import batching
from edged.agreement import NoInputs, Sample
from edged.batching import Batch, NotBatchable, Rules, explore
from edged.errors import Code
from edged.process import Spawner
from edged.row_independence import Reading
from edged.runtimes.base import RunFailed
from edged.tensors import TensorSpec
from tests import zoo
from tests.test_runtimes import load, save, value
from tests.worker_helpers import Handle

RUNTIMES = ["onnxruntime", "openvino"]

RULES = Rules(Reading("", {}))
"""The graph's word is given, so that the trial alone has to find out."""


@pytest.fixture(scope="module")
def spawner() -> Iterator[Spawner]:
    with Spawner(pythons={}, environ=os.environ) as spawner:
        yield spawner


def rows_of(
    shape: list[Any], *nodes: Any, constants: dict[str, Any] | None = None, before: Any = None
) -> Callable[[Path], Path]:
    """Writes a graph from `x` [N,4] to `y` of this shape."""
    initializers = [numpy_helper.from_array(array, name) for name, array in (constants or {}).items()]
    every = [*([] if before is None else [before]), *nodes]
    return lambda path: save(path, every, [value("x", ["N", 4])], [value("y", shape)], initializers)


def node(kind: str, inputs: str, output: str, **attributes: Any) -> Any:
    """A node, by the names of what it takes."""
    return helper.make_node(kind, inputs.split(), [output], **attributes)


def recurrent(path: Path) -> Path:
    """An LSTM whose first dimension is time, declared as if it were a batch."""
    rng = np.random.default_rng(0)
    weights = [numpy_helper.from_array(rng.normal(0, 0.5, (1, 12, 3)).astype("f4"), name) for name in "wr"]
    lstm = helper.make_node("LSTM", ["x", "w", "r"], ["states"], hidden_size=3)
    squeeze = node("Squeeze", "states axes", "y")
    axes = numpy_helper.from_array(np.array([1], np.int64), "axes")
    return save(path, [lstm, squeeze], [value("x", ["N", 1, 3])], [value("y", ["N", 1, 3])], [*weights, axes])


MIX_ROWS: dict[str, Callable[[Path], Path]] = {
    "softmax over the rows": rows_of(["N", 4], node("Softmax", "x", "y", axis=0)),
    "normalised over the rows": rows_of(
        ["N", 4],
        node("ReduceMean", "x", "mean", axes=[0], keepdims=1),
        node("Sub", "x mean", "y"),
    ),
    "recurrent": recurrent,
    "product of rows": rows_of(
        ["N", 4],
        node("Transpose", "x", "t", perm=[1, 0]),
        node("MatMul", "x t", "p"),
        node("MatMul", "p x", "y"),
    ),
    "running sum": rows_of(
        ["N", 4], node("CumSum", "x axis", "y"), constants={"axis": np.array(0, np.int64)}
    ),
    "rows that depend on the data": rows_of(
        [None, 2],
        node("NonZero", "x", "i"),
        node("Transpose", "i", "t", perm=[1, 0]),
        node("Cast", "t", "y", to=1),
    ),
    "different rows": rows_of([None, 4], node("Unique", "x", "y", axis=0)),
    "neighbours": rows_of(
        ["N", 4],
        node("Unsqueeze", "x axes", "picture"),
        node("MaxPool", "picture", "pooled", kernel_shape=[3, 1], pads=[1, 0, 1, 0]),
        node("Squeeze", "pooled axes", "y"),
        constants={"axes": np.array([0, 1], np.int64)},
    ),
}


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("name", MIX_ROWS)
def test_rows_that_do_not_stand_alone_are_found(runtime: str, name: str, tmp_path: Path) -> None:
    """Whatever couples rows, or makes of rows another number of them, is refused in words."""
    model = load(runtime, MIX_ROWS[name](tmp_path / "m.onnx"))
    for wanted in (None, 8):
        with pytest.raises(NotBatchable):
            explore(model, [], rules=RULES, wanted=wanted)


def test_numbers_that_are_scaled_by_the_whole_batch_are_found(tmp_path: Path) -> None:
    """A model that quantises as it goes takes its scale from all rows: one that is loud drowns the others."""
    make = rows_of(
        ["N", 4],
        node("MatMulInteger", "q weights zero", "sums"),
        node("Cast", "sums", "large", to=1),
        node("Mul", "large scale", "y"),
        constants={"weights": np.arange(16, dtype=np.int8).reshape(4, 4)},
        before=helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "scale", "zero"]),
    )
    model = load("onnxruntime", make(tmp_path / "m.onnx"))
    for wanted in (None, 2, 64):
        with pytest.raises(NotBatchable, match="is not as it is alone"):
            explore(model, [], rules=RULES, wanted=wanted)


def test_a_model_that_does_not_take_large_numbers_is_proved_without(tmp_path: Path) -> None:
    """One whose input is an index, say; what it does with those that it takes is proved all the same."""
    make = rows_of(
        ["N", 4, 2],
        node("Cast", "x", "index", to=7),
        node("Gather", "table index", "y", axis=0),
        constants={"table": np.arange(20, dtype=np.float32).reshape(10, 2)},
    )
    model = load("onnxruntime", make(tmp_path / "m.onnx"))
    with pytest.raises(RunFailed):
        model.run({"x": np.full((1, 4), 100, np.float32)}, ["y"])
    assert explore(model, [], rules=RULES, wanted=4).max == 4


def test_the_refusal_names_the_output(tmp_path: Path) -> None:
    """The owner reads which output moved, among how many rows, and by how much."""
    model = load("onnxruntime", MIX_ROWS["running sum"](tmp_path / "m.onnx"))
    with pytest.raises(NotBatchable, match="output 'y' of a row among 2 is not as it is alone: a diff"):
        explore(model, [], rules=RULES, wanted=None)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (zoo.image_mean, "input 'x' has no free first dimension"),
        (zoo.scalar_sum, "output 'y' has no free first dimension"),
        (zoo.free_rank, "input 'x' has no free first dimension"),
        (zoo.string_concat, "input 'a' is BYTES"),
        (zoo.sequence_output, "output 'parts' is SEQUENCE"),
        (zoo.optional_output, "output 'maybe' is OPTIONAL"),
        (zoo.optional_input, "input 'bias' has no free first dimension"),
        (zoo.nonzero, "output 'y' has no free first dimension"),
        (zoo.memory_bomb_at_run, "input 'n' has no free first dimension"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_shapes_and_types_that_forbid_batches(make: Callable[[], Any], words: str, tmp_path: Path) -> None:
    """What the model declares is looked at before anything is run."""
    model = load("onnxruntime", zoo.write(tmp_path / "m.onnx", make()))
    with pytest.raises(NotBatchable, match=words):
        explore(model, [], rules=RULES, wanted=None)


def test_a_constant_answer_proves_nothing(tmp_path: Path) -> None:
    """A model that answers every row alike may do anything with rows."""
    make = rows_of(["N", 4], node("Mul", "x nought", "y"), constants={"nought": np.zeros((1, 4), np.float32)})
    with pytest.raises(NotBatchable, match="proves nothing"):
        explore(load("onnxruntime", make(tmp_path / "m.onnx")), [], rules=RULES, wanted=None)


def test_an_input_without_elements_takes_part(tmp_path: Path) -> None:
    """A list that may be empty is declared so in some models; there is nothing odd to put into it."""
    joined = helper.make_node("Concat", ["x", "z"], ["y"], axis=1)
    inputs = [value("x", ["N", 4]), value("z", ["N", 0])]
    model = load("onnxruntime", save(tmp_path / "m.onnx", [joined], inputs, [value("y", ["N", 4])]))
    assert explore(model, [], rules=Rules(Reading("", {})), wanted=4).max == 4


def test_rows_of_more_elements_than_are_made_up_are_refused(tmp_path: Path) -> None:
    """All inputs count together: a dozen rows of them are held at once."""
    names = [f"x{n}" for n in range(4)]
    inputs = [value(name, ["N", 1 << 23]) for name in names]
    total = helper.make_node("Sum", names, ["y"])
    model = load("onnxruntime", save(tmp_path / "m.onnx", [total], inputs, [value("y", ["N", 1 << 23])]))
    with pytest.raises(NoInputs, match="a row has 33554432 elements"):
        explore(model, [], rules=Rules(Reading("", {})), wanted=None)


def test_a_model_that_fails_on_made_up_rows_says_so() -> None:
    """What the runtime raises reaches the caller, who knows whether it matters."""
    model: Any = Slow(1e-3, 0.0)

    def run(feeds: Any, names: Any) -> Any:
        raise RunFailed(Code.INTERNAL, "RUNTIME_ERROR", "no such rows")

    model.run = run
    with pytest.raises(RunFailed, match="no such rows"):
        explore(model, [], rules=RULES, wanted=None)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_rows_that_stand_alone(runtime: str, tmp_path: Path) -> None:
    """A network whose rows share nothing is proved and timed; one row comes first."""
    model = load(runtime, zoo.write(tmp_path / "m.onnx", zoo.mlp((64, 256, 10))))
    found = explore(model, [], rules=RULES, wanted=8)
    assert found.times_us[0][0] == 1
    assert all(us > 0 for _, us in found.times_us)
    assert found.max == 8
    assert found.why


@pytest.mark.parametrize("wanted", [2, 6, 100])
def test_the_owners_size_is_proved_and_no_gain_is_asked_for(wanted: int, tmp_path: Path) -> None:
    """That size, and no larger one, whatever it takes."""
    model = load("onnxruntime", zoo.write(tmp_path / "m.onnx", zoo.mlp((64, 256, 10))))
    found = explore(model, [], rules=RULES, wanted=wanted)
    assert found.max == wanted
    assert wanted in dict(found.times_us)
    assert max(dict(found.times_us)) == wanted


class Slow:
    """A model whose rows share nothing, and whose runs take as long as a clock says that only they move."""

    def __init__(self, row_s: float, fixed_s: float) -> None:
        self.inputs = (TensorSpec("x", "FP32", (-1, 4)),)
        self.outputs = (TensorSpec("y", "FP32", (-1, 4)),)
        self.now_s = 0.0
        self.sizes: list[int] = []
        self._row_s, self._fixed_s = row_s, fixed_s

    def run(self, feeds: dict[str, Any], names: list[str]) -> list[Any]:
        rows = len(feeds["x"])
        self.sizes.append(rows)
        self.now_s += self._fixed_s + rows * self._row_s
        return [feeds["x"] * 2]

    def shrink(self) -> None:
        return


@pytest.mark.parametrize(
    ("row_s", "fixed_s", "best"),
    [(1e-6, 1e-3, 64), (2e-4, 1e-3, 32), (4e-3, 1e-5, 1)],
)
def test_the_largest_size_that_gains(
    row_s: float, fixed_s: float, best: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the clock: rows that cost next to nothing go on, those that cost as much as alone end the search."""
    model: Any = Slow(row_s, fixed_s)
    monkeypatch.setattr(batching.time, "monotonic", lambda: model.now_s)
    monkeypatch.setattr(batching.time, "perf_counter_ns", lambda: int(model.now_s * 1e9))
    found = explore(model, [], rules=RULES, wanted=None)
    assert found.max == best
    assert model.now_s < 2 * batching.BUDGET_S
    assert set(range(2, best + 1)) <= set(model.sizes), "each size that may be used was proved"


def test_what_takes_longer_than_trying_may_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the clock: one row is enough to see it."""
    model: Any = Slow(0.2, 0.0)
    monkeypatch.setattr(batching.time, "monotonic", lambda: model.now_s)
    with pytest.raises(NotBatchable, match="a row takes 200 ms"):
        explore(model, [], rules=RULES, wanted=None)
    assert model.sizes == [1]


def test_golden_rows_give_the_other_dimensions(tmp_path: Path) -> None:
    """A model that takes no size that would be made up is tried with that of its own samples."""
    path = save(
        tmp_path / "m.onnx",
        [node("Reshape", "x shape", "y")],
        [value("x", ["N", "K"])],
        [value("y", ["N", 11, "M"])],
        [numpy_helper.from_array(np.array([0, 11, -1], np.int64), "shape")],
    )
    model = load("onnxruntime", path)
    samples = [
        Sample("golden", {"x": np.arange(2 * size, dtype=np.float32).reshape(2, size)}, {})
        for size in (11, 22)
    ]
    with pytest.raises(RunFailed):
        explore(model, [], rules=RULES, wanted=2)
    with pytest.raises(NotBatchable, match="golden samples of two sizes"):
        explore(model, samples[:1], rules=RULES, wanted=2)
    assert explore(model, samples, rules=RULES, wanted=2).max == 2


@pytest.mark.parametrize("datatype", sorted(set(zoo.ONNX_TYPES) - {"BYTES"}))
def test_every_datatype_of_numbers(datatype: str, tmp_path: Path) -> None:
    """Rows of each can be made up and compared."""
    path = zoo.write(tmp_path / "m.onnx", zoo.identity(datatype, ("N", 3)))
    assert explore(load("onnxruntime", path), [], rules=RULES, wanted=4).max == 4


def test_a_worker_tells_what_it_found(spawner: Spawner, tmp_path: Path) -> None:
    """The figures come with the load; where there is no batch, the reason and the time of one run."""
    with Handle(spawner) as worker:
        loaded = worker.load(zoo.write(tmp_path / "a.onnx", zoo.mlp()), max_batch_size=16)
        assert loaded[2]["batch"]["max"] == 16
        loaded = worker.load(zoo.write(tmp_path / "b.onnx", zoo.image_mean()), instance=2)
        batch = loaded[2]["batch"]
        assert (batch["max"], [rows for rows, _ in batch["times_us"]]) == (1, [1])
        assert "no free first dimension" in batch["why"]
        loaded = worker.load(tmp_path / "a.onnx", instance=3, max_batch_size=1)
        assert loaded[2]["batch"]["max"] == 1
        loaded = worker.load(tmp_path / "a.onnx", instance=4, warmup=0)
        assert loaded[2]["batch"] == Batch(1, (), "there is to be no warm-up").to_wire()


def test_an_owners_size_that_cannot_be_had_fails_the_load(spawner: Spawner, tmp_path: Path) -> None:
    """Rather no model than one whose answers depend on who else asks."""
    with Handle(spawner) as worker:
        failed = worker.load(MIX_ROWS["running sum"](tmp_path / "m.onnx"), max_batch_size=4)
        assert (failed[0], failed[3]) == ("load_failed", "NOT_BATCHABLE")
        assert "CumSum 'y' works along the axis of the rows" in failed[4]
        loaded = worker.load(tmp_path / "m.onnx", instance=2)
        assert loaded[2]["batch"]["max"] == 1
        assert "CumSum 'y'" in loaded[2]["batch"]["why"]


def test_the_wire_form() -> None:
    """What the supervisor checks is what is sent."""
    assert Batch(4, ((1, 2.5), (4, 5.0)), "because").to_wire() == {
        "max": 4,
        "times_us": [[1, 2.5], [4, 5.0]],
        "why": "because",
        "form": batching.FORM,
    }


def test_what_is_remembered_is_not_proved_again(spawner: Spawner, tmp_path: Path) -> None:
    """The load says it as it was told; what is none of ours, or a size of the owner's, is proved as ever."""
    path = zoo.write(tmp_path / "a.onnx", zoo.mlp())
    known = Batch(32, ((1, 77.0), (32, 770.0)), "as remembered").to_wire()
    with Handle(spawner, "onnxruntime") as worker:
        assert worker.load(path, known_batch=known)[2]["batch"] == known
        assert worker.load(path, instance=2, known_batch={"max": 9000})[2]["batch"]["times_us"][0][1] != 77.0
        loaded = worker.load(path, instance=3, known_batch=known, max_batch_size=4)
        assert loaded[2]["batch"]["max"] == 4


@pytest.mark.parametrize(
    "wire",
    [
        None,
        [],
        {},
        {"max": True, "times_us": [[1, 2.0]], "why": "", "form": batching.FORM},
        {"max": 4, "times_us": [], "why": "", "form": batching.FORM},
        {"max": 4, "times_us": [[1]], "why": "", "form": batching.FORM},
        {"max": 4, "times_us": 3, "why": "", "form": batching.FORM},
        {"max": 4, "times_us": [[1, 2.0]], "why": 4, "form": batching.FORM},
        {"max": 0, "times_us": [[1, 2.0]], "why": "", "form": batching.FORM},
        {"max": 4, "times_us": [[1, 2.0]], "why": "", "form": batching.FORM - 1},
    ],
    ids=repr,
)
def test_a_record_of_another_shape_is_no_batch(wire: object) -> None:
    """The supervisor's book may be damaged."""
    assert Batch.from_wire(wire) is None
