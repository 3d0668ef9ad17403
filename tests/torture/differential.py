"""One random graph: through edged's proofs, beside hostile neighbours and on the other runtime.

The judge is ONNX Runtime in this process. What is compared are answers, never verdicts: whatever a proof lets
through must answer as the judge does, and refuse what it refuses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import TensorProto

from edged import batching
from edged.agreement import FULL, NoInputs, disagreement
from edged.batching import NotBatchable, Rules, explore
from edged.measuring import measure
from edged.proof import judge as judge_by_table
from edged.row_independence import Reading, read_rows
from edged.runtimes.base import LoadCancel, LoadFailed, LoadRequest, RunFailed, create_runtime
from edged.runtimes.onnx_graph import Graph
from tests import zoo
from tests.torture.graphs import RandomGraph, Tensor, random_graph

__all__ = ["Outcome", "try_graph"]

MOVE_BUDGET_S = 0.01
"""What timing the other runtime may take: it is not what is tried here."""

ASKED = 16
"""Requests of a moved graph."""

SIZE = 5
"""Up to which rows are put together."""

BATCHES = 12
"""Of hostile rows, for each graph whose rows may share a run."""


@dataclass(frozen=True)
class Outcome:
    """What came of a graph: `batched` where its rows may share a run; `why` not; `wrong`: what differed."""

    seed: int
    loads: bool = False
    batched: bool = False
    moved: bool = False
    why: str = ""
    wrong: str = ""


def try_graph(
    seed: int,
    folder: Path,
    *,
    reading: bool = True,
    trial: bool = True,
    table: bool = True,
    compared: bool = True,
) -> Outcome:
    """Proves a graph as a load and a measurement do, then tries to catch it out.

    Without `reading` or `trial`, the locks of batches, or `table` and `compared`, those of another runtime,
    what is let through is wrong somewhere: that each is needed is a test too.
    """
    graph = random_graph(seed)
    path = str(zoo.write(folder / "random.onnx", graph.model))
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    runtime = create_runtime("onnxruntime")
    request = LoadRequest(path)
    try:
        judge = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        model = runtime.load(request, LoadCancel())
    except (LoadFailed, Exception):  # noqa: BLE001 - a graph that the runtime refuses serves nobody
        return Outcome(seed)
    names = [o.name for o in judge.get_outputs()]
    rng = np.random.default_rng(seed + 1)
    for _ in range(4):
        feeds = {name: _row(rng, tensor, 3, 1) for name, tensor in graph.inputs.items()}
        alone = _ask(judge, names, feeds)
        if alone is None:
            continue
        served = model.run(feeds, names)
        for name, a, b in zip(names, alone, served, strict=True):
            if a.tobytes() != b.tobytes() or a.shape != b.shape:
                return Outcome(seed, True, wrong=f"alone, output {name} is not bit for bit what it should be")
    outcome = _rows(
        seed, rng, judge, model, graph, runtime.graph(request), names, reading=reading, trial=trial
    )
    if outcome.wrong:
        return outcome
    return _moved(outcome, rng, judge, graph, path, names, table=table, compared=compared)


def _rows(
    seed: int,
    rng: np.random.Generator,
    judge: Any,
    model: Any,
    graph: RandomGraph,
    file: Graph,
    names: Sequence[str],
    *,
    reading: bool,
    trial: bool,
) -> Outcome:
    read = read_rows(file)
    rules = Rules(
        read if reading else Reading("", read.limits), vouched=not trial and not (reading and read.why)
    )
    try:
        explore(model, [], rules=rules, wanted=SIZE)
    except NotBatchable as e:
        return Outcome(seed, True, why=str(e))
    except (RunFailed, NoInputs) as e:
        return Outcome(seed, True, why=f"a run of made-up rows failed: {e}")
    return Outcome(seed, True, True, wrong=_caught_out(rng, judge, model, names, graph.inputs))


def _moved(
    outcome: Outcome,
    rng: np.random.Generator,
    judge: Any,
    graph: RandomGraph,
    path: str,
    names: Sequence[str],
    *,
    table: bool,
    compared: bool,
) -> Outcome:
    """Whether it may run on OpenVINO, and if so, whether it answers there as it does here.

    For every second graph the owner's word stands that no input is NaN or infinite, and none is.
    """
    finite = outcome.seed % 2 == 1
    sides = {
        name: {"runtime": name, "device": "CPU", "precision": "f32", "threads": 1}
        for name in ("onnxruntime", "openvino")
    }
    settings = {
        "path": path,
        "format": "onnx",
        "reference": sides["onnxruntime"],
        "candidate": sides["openvino"],
        "finite_inputs": finite,
        "budget_s": MOVE_BUDGET_S,
    }
    if table and judge_by_table(settings):
        return outcome
    if compared:
        found = measure(lambda part: _loaded(path, part), settings)
        if not (found["agrees"] and found["proven"]):
            return outcome
    try:
        other = _loaded(path, sides["openvino"])
    except LoadFailed:
        return outcome
    for _ in range(ASKED):
        steps, count = int(rng.choice([1, 2, 4, 7])), int(rng.choice([1, 1, 2]))
        feeds = {
            name: _row(rng, tensor, steps, count, finite=finite) for name, tensor in graph.inputs.items()
        }
        want = _ask(judge, names, feeds)
        try:
            got = other.run(feeds, list(names))
        except RunFailed:
            if want is not None:
                return replace(outcome, moved=True, wrong="moved: refused, where it was answered before")
            continue
        if want is None:
            return replace(outcome, moved=True, wrong="moved: answered, where it was refused before")
        if finite and not all(a.dtype.kind != "f" or np.isfinite(a).all() for a in want):
            continue  # such an answer comes of no input that the owner has spoken of
        for name, a, b in zip(names, want, got, strict=True):
            why = disagreement(a, b, "", FULL)
            if why:
                return replace(outcome, moved=True, wrong=f"moved: output {name}: {why}")
    return replace(outcome, moved=True)


def _loaded(path: str, part: Mapping[str, Any]) -> Any:
    runtime = create_runtime(part["runtime"])
    return runtime.load(LoadRequest(path, device=part["device"], threads=part["threads"]), LoadCancel())


def _caught_out(
    rng: np.random.Generator, judge: Any, model: Any, names: Sequence[str], inputs: dict[str, Tensor]
) -> str:
    for _ in range(BATCHES):
        steps = int(rng.choice([1, 2, 4, 7]))
        rows: list[dict[str, Any]] = []
        answers: list[list[Any]] = []
        while sum(len(next(iter(r.values()))) for r in rows) < SIZE - 1 and len(rows) < SIZE:
            count = int(rng.choice([1, 1, 1, 2]))
            feeds = {name: _row(rng, tensor, steps, count) for name, tensor in inputs.items()}
            alone = _ask(judge, names, feeds)
            if alone is None:
                break
            rows.append(feeds)
            answers.append(alone)
        if len(rows) < 2:
            continue
        joined = {name: np.concatenate([r[name] for r in rows]) for name in inputs}
        try:
            together = model.run(joined, list(names))
        except RunFailed:
            continue  # then each is run by itself
        at = 0
        for feeds, alone in zip(rows, answers, strict=True):
            count = len(next(iter(feeds.values())))
            for name, a, b in zip(names, alone, together, strict=True):
                why = _differ(a, b[at : at + count])
                if why:
                    return f"output {name} of {count} row(s) among {len(rows)} requests: {why}"
            at += count
    return ""


def _differ(alone: Any, together: Any) -> str:
    if alone.shape != together.shape:
        return f"shape {list(together.shape)} for {list(alone.shape)}"
    if alone.dtype.kind != "f":
        return "" if np.array_equal(alone, together) else "other integers"
    a, b = alone.astype("f8"), together.astype("f8")
    odd = ~np.isfinite(a) | ~np.isfinite(b)
    if not np.array_equal(a[odd], b[odd], equal_nan=True):
        return "NaN or infinities at other places"
    a, b = a[~odd], b[~odd]
    if not a.size:
        return ""
    largest, apart = float(np.abs(a).max()), float(np.abs(a - b).max())
    bound = batching.ROUNDING["f32"] * largest
    return "" if apart <= bound else f"{apart:.3g} apart, of {largest:.3g}"


def _ask(judge: Any, names: Sequence[str], feeds: dict[str, Any]) -> list[Any] | None:
    try:
        return judge.run(list(names), feeds)  # type: ignore[no-any-return]  # untyped library
    except Exception:  # noqa: BLE001 - what it refuses is no answer to compare with
        return None


def _row(rng: np.random.Generator, tensor: Tensor, steps: int, count: int, *, finite: bool = False) -> Any:
    """Inputs of `count` rows: ordinary, quiet, loud, at the edges of their type."""
    shape = [count, *(steps if d == "S" else d for d in tensor.shape[1:])]
    if tensor.type == TensorProto.UINT8:
        return rng.integers(0, int(rng.choice([2, 4, 256])), shape).astype(np.uint8)
    if tensor.type == TensorProto.INT64:
        return rng.integers(0, int(rng.choice([2, 5, 40, 1000, 1 << 31])), shape)
    kind = int(rng.integers(10))
    x = rng.standard_normal(shape)
    if kind == 4:
        x *= 100
    elif kind == 5:
        x *= 1e4
    elif kind == 6:
        x = np.full(shape, rng.choice([0.0, 1.0, -1.0, 1e-40, 1e30]))
    elif kind == 7 and not finite:
        x.reshape(-1)[int(rng.integers(x.size))] = rng.choice([np.nan, np.inf, -np.inf])
    elif kind == 8:
        x = np.abs(x)
    elif kind == 9:
        x *= 1e-3
    return x.astype(np.float32)
