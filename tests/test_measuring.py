"""A setup is measured as it would be run: real tiny models, and functions where that tells more."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper

from edged import measuring
from edged.errors import Code
from edged.measuring import measure, no_result
from edged.runtimes import operators
from edged.runtimes.base import LoadCancel, Model, RunFailed, create_runtime
from edged.worker import load_request
from tests import zoo
from tests.operator_tables import table_of, write_into
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


# ---- another runtime


FLOATS = (
    "Mul-14(FP32,FP32=)",
    "Add-14(FP32,FP32=)",
    "Relu-14(FP32)",
    "ReduceMean-18(FP32,INT64=; keepdims=0)",
)
BESIDE = (
    *("Mul-14(INT64,INT64)", "Add-14(INT64,INT64)", "Div-14(INT64,INT64=)", "Mod-13(INT64,INT64=)"),
    *("Div-14(INT32,INT32)", "Gather-13(FP32=,INT64)", "Add-14(FP32,FP32)", "Mul-14(FP32,FP32)"),
)


@pytest.fixture(scope="module")
def operators_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A table of this machine's runtimes with the operators of the models below."""
    folder = tmp_path_factory.mktemp("operators")
    write_into(folder, table_of(*FLOATS, *BESIDE))
    return str(folder)


def other_runtime(path: Path, operators_dir: str, **settings: Any) -> dict[str, Any]:
    """OpenVINO measured beside ONNX Runtime."""
    return measured(path, setup(runtime="openvino"), operators_dir=operators_dir, **settings)


node = helper.make_node
N = [("n", "INT64", [1])]
R = [("r", "INT64", [1])]
WRONG: dict[str, Any] = {
    "area": zoo.elementwise(node("Mul", ["n", "n"], ["r"]), side=16, inputs=N, outputs=R),
    "sum": zoo.elementwise(node("Add", ["n", "n"], ["r"]), side=16, inputs=N, outputs=R),
    "milliseconds": zoo.elementwise(
        node("Div", ["n", "hour"], ["h"]),
        node("Mod", ["h", "day"], ["r"]),
        side=16,
        inputs=N,
        outputs=R,
        constants={"hour": np.int64(3_600_000), "day": np.int64(24)},
    ),
    "word beyond the table": zoo.elementwise(
        node("Gather", ["table", "n"], ["e"]),
        node("Add", ["score", "e"], ["r"]),
        side=16,
        inputs=N,
        outputs=[("r", "FP32", [1])],
        constants={"table": np.arange(1, 11, dtype="f4")},
    ),
    "divided by zero": zoo.elementwise(
        node("Div", ["a", "b"], ["r"]),
        side=16,
        inputs=[("a", "INT32", [1]), ("b", "INT32", [1])],
        outputs=[("r", "INT32", [1])],
    ),
    "a replaced constant": zoo.elementwise(
        node("Mul", ["score", "gain"], ["r"]),
        side=16,
        outputs=[("r", "FP32", [1])],
        constants={"gain": np.float32([2])},
        overridable=["gain"],
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_another_runtime_answers_wrongly_keeps_the_model(
    tmp_path: Path, operators_dir: str, kind: str
) -> None:
    """Whatever the owner says of NaN; ones and normal numbers agree in each of these."""
    path = zoo.write(tmp_path / "m.onnx", WRONG[kind])
    result = other_runtime(path, operators_dir, finite_inputs=True)
    assert (result["agrees"], result["proven"], result["remedy"]) == (False, False, ""), result
    assert result["obstacles"]


@pytest.mark.parametrize("kind", WRONG)
def test_the_models_own_answers_tell_it_without_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The two halves of the proof stand for themselves: here nothing is known of the operators."""
    monkeypatch.setattr(measuring, "judge", lambda *_: ())
    path = zoo.write(tmp_path / "m.onnx", WRONG[kind])
    result = other_runtime(path, "", finite_inputs=True)
    assert not result["agrees"], result


def test_nan_keeps_the_model_until_the_owner_says_that_it_never_comes(
    tmp_path: Path, operators_dir: str
) -> None:
    """Both times with the figures, so that the owner sees what the word would bring."""
    path = zoo.write(tmp_path / "m.onnx", zoo.elementwise(side=16))
    result = other_runtime(path, operators_dir)
    assert not result["agrees"]
    assert "Relu-14(FP32) differs on NaN, Inf or denormals" in result["why"]
    assert "finite_inputs = true" in result["remedy"]
    assert result["reference_p50_us"] > 0
    assert result["candidate_p50_us"] > 0
    result = other_runtime(path, operators_dir, finite_inputs=True)
    assert (result["agrees"], result["proven"], result["obstacles"]) == (True, True, []), result
    assert "at the edges" in result["why"]


def test_without_a_table_nothing_moves_and_the_gain_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on another version of a runtime, or another kind of processor; what would change it is said."""
    monkeypatch.setattr(operators, "_FOLDER", tmp_path)  # the tables that come with edged may hold here
    write_into(tmp_path / "operators", replace(table_of("Relu-14(FP32)"), instructions="z80"))
    path = zoo.write(tmp_path / "m.onnx", zoo.elementwise(side=16))
    result = other_runtime(path, str(tmp_path / "operators"), finite_inputs=True)
    assert "no table of operators" in result["why"]
    assert "it was made on z80" in result["why"]
    assert "edgectl operators" in result["remedy"]
    assert (result["agrees"], result["proven"]) == (False, False)
    assert result["candidate_p50_us"] > 0
