"""A setup is measured as it would be run: real tiny models, and functions where that tells more."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edged.errors import Code
from edged.measuring import measure, no_result
from edged.runtimes.base import LoadCancel, Model, RunFailed, create_runtime
from edged.worker import load_request
from tests import zoo
from tests.test_agreement import Function

FIGURES = ("p50_us", "p99_us", "rows_s")


def setup(**changes: Any) -> dict[str, Any]:
    """A side of a measurement."""
    return {"runtime": "onnxruntime", "device": "CPU", "precision": "f32", "threads": 1, **changes}


def measured(path: Path, candidate: Mapping[str, Any], **settings: Any) -> dict[str, Any]:
    """Measures a real model file."""
    spec = {
        "path": str(path),
        "format": "onnx",
        "budget_s": 0.0,
        "reference": setup(),
        "candidate": candidate,
    }

    def load(part: Mapping[str, Any]) -> Model:
        runtime = create_runtime(part["runtime"])
        return runtime.load(load_request({**spec, **settings, **part}), LoadCancel())

    return measure(load, {**spec, **settings})


@pytest.mark.parametrize("changes", [{}, {"threads": 2}, {"instances": 2}, {"rows": 4}], ids=repr)
def test_a_real_model_has_all_figures_of_both_sides(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Whatever is varied; and the same runtime on the same device needs no proof."""
    path = zoo.write(tmp_path / "m.onnx", zoo.mlp())
    result = measured(path, setup(**changes))
    assert (result["agrees"], result["proven"]) == (True, True), result
    for side in ("reference", "candidate"):
        p50_us, p99_us, rows_s = (result[f"{side}_{name}"] for name in FIGURES)
        assert 0 < p50_us <= p99_us
        assert rows_s > 0
    assert result["runs"] > 0
    assert set(no_result("")) == set(result)


def test_rows_are_counted_and_a_model_with_fixed_rows_has_none_to_spare(tmp_path: Path) -> None:
    """A run of many rows counts as many; a first dimension that is not free is said."""
    path = zoo.write(tmp_path / "m.onnx", zoo.mlp())
    result = measured(path, setup(rows=64))
    assert result["candidate_rows_s"] > 32 * 1e6 / result["candidate_p99_us"] / 64
    fixed = zoo.write(tmp_path / "f.onnx", zoo.identity("FP32", (1, 4)))
    result = measured(fixed, setup(rows=2))
    assert not result["agrees"]
    assert "no free first dimension" in result["why"]


class Counting(Function):
    """A model of several instances that knows how many run at once, and waits until all do."""

    def __init__(self, instances: int) -> None:
        super().__init__(lambda x: x)
        self.instances = instances
        self.runs: set[int] = set()
        self._all = threading.Barrier(instances)
        self._ended = threading.Event()

    def run(
        self, feeds: Mapping[str, Any], output_names: Sequence[str], run: int = 0, *, borrowed: bool = False
    ) -> list[Any]:
        if threading.current_thread() is not threading.main_thread() and not self._ended.is_set():
            self._all.wait(10.0)
            self.runs.add(run)
            if len(self.runs) == self.instances:
                self._ended.set()
        return super().run(feeds, output_names)


def test_every_instance_runs_at_the_same_time() -> None:
    """Under full load, each with a number of its own, so that each can be told apart."""
    models = {"r": Function(lambda x: x), "c": Counting(3)}
    result = measure(
        lambda part: models[part["m"]], {"budget_s": 0, "reference": {"m": "r"}, "candidate": {"m": "c"}}
    )
    assert result["agrees"]
    assert models["c"].runs == {0, 1, 2}  # type: ignore[attr-defined]  # it is the Counting one


def test_a_model_that_raises_under_load_is_told() -> None:
    """It is a result: what serves goes on."""
    calls: list[int] = []

    def fails_later(x: Any) -> Any:
        calls.append(1)
        if len(calls) > 3:
            raise RunFailed(Code.RESOURCE_EXHAUSTED, "MEMORY_LIMIT", "no memory")
        return x

    models = {"r": Function(lambda x: x), "c": Function(fails_later)}
    result = measure(
        lambda part: models[part["m"]], {"budget_s": 0, "reference": {"m": "r"}, "candidate": {"m": "c"}}
    )
    assert not result["agrees"]
    assert result["why"] == "it raises under load: no memory"


def test_rows_are_made_by_repeating_what_is_there() -> None:
    """Of the inputs that the answers were compared with."""
    seen: list[tuple[int, ...]] = []

    def shape_of(x: Any) -> Any:
        seen.append(np.shape(x))
        return x

    models = {"r": Function(lambda x: x), "c": Function(shape_of)}
    measure(
        lambda part: models[part["m"]],
        {"budget_s": 0, "reference": {"m": "r"}, "candidate": {"m": "c", "rows": 5}},
    )
    assert set(seen) == {(1, 4), (5, 4)}
