"""What a model is measured with: whose inputs, of which sizes, and what follows from a refusal."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edged.agreement import Sample
from edged.children import inputs_memfd
from edged.errors import Code, InvalidArgument
from edged.madeup import choose, made_up_samples, sizes_to_try
from edged.measuring import measure
from edged.messages import TensorData
from edged.runtimes.base import RunFailed
from edged.sizes import DIMENSIONS_MAX, is_size
from edged.tensors import TensorSpec
from edged.worker import read_inputs
from tests import zoo
from tests.test_agreement import Function
from tests.test_measuring import measured, setup

PICTURE = TensorSpec("x", "FP32", (-1, 3, -1, -1), dim_names=("N", None, "H", "W"))


class Picky(Function):
    """A model of pictures that takes some sizes, and knows which it was run at."""

    def __init__(self, takes: Callable[[tuple[int, ...]], bool], spec: TensorSpec = PICTURE) -> None:
        super().__init__(self._answer)
        self.inputs = (spec,)
        self.ran: list[tuple[int, ...]] = []
        self._takes = takes

    def _answer(self, x: Any) -> Any:
        self.ran.append(x.shape)
        if not self._takes(x.shape):
            raise RunFailed(Code.INTERNAL, "RUNTIME_ERROR", "a layer does not take that")
        return x


def timed(model: Picky, golden: Sequence[Sample] = (), **settings: Any) -> tuple[str, tuple[int, ...], str]:
    """(source, shape, note) of what a model would be timed with."""
    choice = choose(model, golden, settings)
    size = choice.size_of(choice.samples[0].inputs)
    assert is_size(size)
    return size["source"], tuple(size["shapes"]["x"]), size["note"]


def sample(*shape: int) -> Sample:
    return Sample("golden sample a.npz", {"x": np.ones(shape, np.float32)}, {})


def test_golden_samples_come_before_requests_and_those_before_guesses() -> None:
    """Each is timed on the first of what is known."""
    asked = [{"x": [1, 3, 48, 80]}, {"x": [1, 3, 64, 64]}]
    golden = [sample(1, 3, 32, 40)]
    assert timed(Picky(bool), golden, shapes=asked)[:2] == ("golden", (1, 3, 32, 40))
    assert timed(Picky(bool), shapes=asked)[:2] == ("requests", (1, 3, 48, 80))
    assert timed(Picky(bool))[:2] == ("typical", (1, 3, 224, 224))
    assert timed(Picky(bool, TensorSpec("x", "FP32", (1, 4))))[:2] == ("declared", (1, 4))
    owner = {"owner_shapes": {"x": [2, 3, 8, 8]}}
    assert timed(Picky(bool), shapes=asked, **owner)[:2] == ("owner", (2, 3, 8, 8))


def test_answers_are_compared_at_every_size_that_is_known() -> None:
    """Runtimes that agree at one size may not at another; no guess is added to what is known."""
    model = Picky(bool)
    asked = [{"x": [1, 3, 48, 80]}, {"x": [1, 3, 64, 64]}]
    choice = choose(model, [sample(1, 3, 32, 40)], {"shapes": asked})
    assert [(s, x.name) for s, x in zip(choice.sources, choice.samples, strict=True)] == [
        ("golden", "golden sample a.npz"),
        ("golden", "ones"),
        ("golden", "normal"),
        ("requests", "ones at x [1,3,48,80]"),
        ("requests", "normal at x [1,3,48,80]"),
        ("requests", "ones at x [1,3,64,64]"),
        ("requests", "normal at x [1,3,64,64]"),
    ]
    assert set(model.ran) == {(1, 3, 32, 40), (1, 3, 48, 80), (1, 3, 64, 64)}


def test_a_slow_model_is_compared_at_the_first_size_only() -> None:
    """The others would take the time that is there to measure it."""
    asked = [{"x": [1, 3, 48, 80]}, {"x": [1, 3, 64, 64]}]
    model = Picky(bool)
    choice = choose(model, [], {"shapes": asked}, more_s=0.0)
    assert choice.sources == ["requests", "requests"]
    assert set(model.ran) == {(1, 3, 48, 80)}


def test_owners_inputs_come_first_of_all() -> None:
    """With others made up at their size, since one answer proves nothing."""
    x = np.full((1, 3, 5, 7), 0.5, np.float32)
    choice = choose(Picky(bool), [sample(1, 3, 32, 40)], {}, {"x": x})
    assert choice.samples[0].inputs["x"] is x
    assert choice.size_of(choice.samples[0].inputs)["source"] == "owner"
    assert [s.inputs["x"].shape for s in choice.samples] == [x.shape, (1, 3, 32, 40), x.shape, x.shape]


def test_a_size_that_is_refused_gives_way_to_the_next_and_is_said() -> None:
    """A made-up size is nobody's word: the model is not condemned for it."""
    source, shape, note = timed(Picky(lambda shape: shape[2] % 64 == 0))
    assert (source, shape) == ("typical", (1, 3, 640, 640))
    assert note == "x [1,3,224,224] was refused: a layer does not take that"
    source, shape, note = timed(Picky(lambda shape: shape[2] > 100), shapes=[{"x": [1, 3, 9, 9]}])
    assert (source, shape) == ("typical", (1, 3, 224, 224))
    assert "x [1,3,9,9] was refused" in note


def test_what_the_owner_names_is_not_replaced() -> None:
    """He is told that the model refuses it; a guess in its place would be another measurement."""
    choice = choose(Picky(lambda _: False), [], {"owner_shapes": {"x": [1, 3, 9, 9]}})
    assert not choice.samples
    assert choice.refused == ["x [1,3,9,9] was refused: a layer does not take that"]


def test_where_only_ones_are_left_it_is_run_on_them() -> None:
    """So that its answers are compared at least."""
    assert timed(Picky(lambda shape: shape[2] == 1))[:2] == ("least", (1, 3, 1, 1))
    free_rank = Picky(lambda _: True, TensorSpec("x", "FP32", None))
    assert timed(free_rank)[:2] == ("least", ())


def test_a_broken_device_is_no_refusal() -> None:
    """The process must end, so the next size is not tried."""

    def breaks(_: tuple[int, ...]) -> bool:
        raise RunFailed(Code.UNAVAILABLE, "DEVICE_FAILED", "gone", fatal=True)

    model = Picky(breaks)
    with pytest.raises(RunFailed, match="gone"):
        choose(model, [], {})
    assert len(model.ran) == 1


def test_shapes_that_the_model_does_not_take_by_its_own_word_are_not_tried() -> None:
    """They were another content's; nor are more tried than a measurement is meant to take."""
    asked: list[dict[str, Any]] = [{"x": [1, 4, 8, 8]}, {"y": [1]}, {"x": [1, 3, 8]}]
    asked += [{"x": [1, 3, side, side]} for side in range(8, 16)]
    found = [shapes for source, shapes in sizes_to_try([PICTURE], {"shapes": asked}) if source == "requests"]
    assert found == [{"x": (1, 3, side, side)} for side in (8, 9, 10)]


def test_a_size_of_very_many_inputs_can_be_told() -> None:
    """A worker's word on it passes the supervisor's check."""
    model = Picky(bool)
    model.inputs = tuple(TensorSpec(f"x{n}", "FP32", (-1, 2)) for n in range(DIMENSIONS_MAX))
    model._function = lambda x: x
    inputs = made_up_samples(model.inputs, {s.name: (1, 2) for s in model.inputs})[0].inputs
    choice = choose(Picky(bool), [], {}, inputs)
    assert is_size(choice.size_of(inputs))


def test_made_up_inputs_are_of_the_asked_for_shapes() -> None:
    """Of both kinds, and with an optional input only where it has a shape."""
    specs = [PICTURE, TensorSpec("o", "INT64", (-1,), optional=True)]
    ones, normal = made_up_samples(specs, {"x": (1, 3, 4, 5)})
    assert ones.inputs.keys() == normal.inputs.keys() == {"x"}
    assert (ones.inputs["x"].shape, float(ones.inputs["x"].min())) == ((1, 3, 4, 5), 1.0)
    assert normal.inputs["x"].std() > 0.5
    (both,) = made_up_samples(specs, {"x": (1, 3, 4, 5), "o": (7,)}, ["ones"])
    assert both.inputs["o"].shape == (7,)


# ---- in a measurement


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_free_model_is_measured_where_it_was_asked(tmp_path: Path, runtime: str) -> None:
    """Of pictures, not of single pixels, and the result says so."""
    path = zoo.write(tmp_path / "m.onnx", zoo.fully_conv(multiple=8))
    found = measured(path, setup(runtime=runtime), shapes=[{"x": [1, 3, 48, 80]}])
    assert found["candidate_p50_us"] > 0
    assert found["size"] == {"source": "requests", "shapes": {"x": [1, 3, 48, 80]}, "note": ""}
    found = measured(path, setup(runtime=runtime), shapes=[{"x": [1, 3, 49, 81]}])
    assert (found["size"]["source"], found["size"]["shapes"]) == ("typical", {"x": [1, 3, 224, 224]})
    assert "x [1,3,49,81] was refused" in found["size"]["note"]


def test_nothing_is_decided_at_single_elements(tmp_path: Path) -> None:
    """Not even how many threads: figures are there, and the reason why they prove nothing."""
    path = zoo.write(tmp_path / "m.onnx", zoo.only_one())
    found = measured(path, setup(threads=2))
    assert found["candidate_p50_us"] > 0
    assert (found["agrees"], found["proven"], found["size"]["source"]) == (True, False, "least")
    assert "nothing is decided at free dimensions of 1" in found["why"]
    assert "--shape" in found["why"]


def test_a_refused_size_of_the_owners_is_the_answer(tmp_path: Path) -> None:
    """Nothing is measured elsewhere in its place."""
    path = zoo.write(tmp_path / "m.onnx", zoo.fully_conv(multiple=8))
    found = measured(path, setup(threads=2), owner_shapes={"x": [1, 3, 9, 9]})
    assert (found["agrees"], found["proven"], found["size"]) == (False, False, None)
    assert found["why"].startswith("x [1,3,9,9] was refused: ")


def test_owners_inputs_are_timed_as_they_are() -> None:
    """The candidate gets their very values."""
    seen: list[Any] = []

    def candidate(x: Any) -> Any:
        seen.append(x)
        return x

    models = {"r": Function(lambda x: x), "c": Function(candidate)}
    x = np.array([[3.0, 1.0, 4.0, 1.0]], np.float32)
    spec = {"budget_s": 0, "reference": {"m": "r"}, "candidate": {"m": "c"}}
    found = measure(lambda part: models[part["m"]], spec, {"x": x})
    assert found["size"] == {"source": "owner", "shapes": {"x": [1, 4]}, "note": ""}
    assert seen[-1] is x


def test_rows_of_a_request_that_is_a_batch_are_counted() -> None:
    """Else a setup with batches of its own would be compared with a single row."""
    models = {"r": Function(lambda x: x), "c": Function(lambda x: x, seconds=0.002)}
    spec = {"budget_s": 0, "reference": {"m": "r"}, "candidate": {"m": "c"}, "shapes": [{"x": [16, 4]}]}
    found = measure(lambda part: models[part["m"]], spec)
    assert found["size"]["shapes"] == {"x": [16, 4]}
    runs_s = 1e6 / found["candidate_p50_us"]
    assert 4 < found["candidate_rows_s"] / runs_s <= 17


def test_inputs_come_in_a_memfd() -> None:
    """Each where its row says, strings too; the array is its own, and the descriptor is closed."""
    raw = np.arange(6, dtype=np.float32)
    fd, rows = inputs_memfd(
        [
            TensorData("s", "BYTES", [1], b"\2\0\0\0ab"),
            TensorData("x", "FP32", [2, 3], memoryview(raw).cast("B")),
            TensorData("none", "INT64", [0], b""),
        ]
    )
    feeds = read_inputs(fd, rows)
    assert feeds["s"].tolist() == [b"ab"]
    assert feeds["x"].tolist() == raw.reshape(2, 3).tolist()
    assert feeds["x"].flags.writeable
    assert feeds["none"].shape == (0,)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    fd, rows = inputs_memfd([TensorData("s", "BYTES", [1], b"\x09\0\0\0ab")])
    with pytest.raises(InvalidArgument):
        read_inputs(fd, rows)
