"""What may share a run and what may be moved to another runtime: of ONNX's own tests, and of real networks.

No times but those that a proof adds to a load. The other figures are counts: how much is left of batching and
of the choice of a runtime when every answer has to stay what it is.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.backend.test.case.node import collect_testcases

from bench.load import Effort
from bench.report import Claim, Progress, Section, run_alone, table
from edged import madeup
from edged.agreement import NoInputs
from edged.batching import NotBatchable, Rules, explore
from edged.proof import judge
from edged.row_independence import Reading, read_rows
from edged.runtimes.base import LoadCancel, LoadFailed, LoadRequest, RunFailed, create_runtime
from edged.runtimes.onnx_graph import read_graph
from tests import zoo
from tests.apps.wheels import MAGIKA, MINILM, RAPIDOCR, silero_network
from tests.test_row_independence import cases

COMMAND = "python -m bench.answers"
ROWS = 4
"""Up to which rows of ONNX's own tests are put together."""
PROOF_MAX_S = 1.0


def measure(progress: Progress, effort: Effort) -> Section:
    """Counts and lists; the proofs of real networks are timed."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ONNX's own tests overflow on purpose
        progress("answers: batches of ONNX's node tests")
        batched = _node_tests(Path(folder), effort)
        progress("answers: moves of ONNX's node tests")
        moved = _node_moves(Path(folder), effort)
        rows, slowest_s = [], 0.0
        for name, path in _networks(Path(folder)):
            progress(f"answers: {name}")
            row, proof_s = _network(name, path)
            rows.append(row)
            slowest_s = max(slowest_s, proof_s)
    claims = [
        Claim(
            "what proving that rows stand alone adds to a load, at most",
            f"at most {PROOF_MAX_S:g} s",
            f"{slowest_s:.2f} s",
            slowest_s <= PROOF_MAX_S,
        )
    ]
    against = ", ".join(f"{op} {count}" for op, count in batched["against"].most_common(12))
    text = f"""
ONNX's node tests as models of rows: the first input alone has a free first dimension, or all that
have as many rows do; {batched["models"]} models, of which ONNX Runtime runs {batched["run"]}.
By the trial alone, which is how edged decided before it read graphs (with better inputs now),
{batched["trial"]} would be batched; the graphs of {batched["reading"]} say that rows stand alone;
both hold for **{batched["both"]}**. The most frequent reasons against, by operator: {against}.

Of the same package's {moved["models"]} node models as they are, {moved["any"]} may move from ONNX Runtime to
OpenVINO on this machine's table, and {moved["finite"]} where no input is NaN or infinite.

Real networks, on the CPU, two threads. "Up to" is how many rows may share a run, by themselves and, in
brackets, when the owner asks for 8:

{table(("network", "rows may share a run", "up to", "proof, s", "moves", "moves with `finite_inputs`"), rows)}
"""
    return Section("Right answers", COMMAND, text, tuple(claims))


def _node_tests(folder: Path, effort: Effort) -> dict[str, Any]:
    found: Counter[str] = Counter()
    against: Counter[str] = Counter()
    runtime = create_runtime("onnxruntime")
    for number, (_, proto, _) in enumerate(cases()):
        if not effort.everything and number % 20:
            continue
        found["models"] += 1
        path = str(zoo.write(folder / "node.onnx", proto))
        try:
            reading = read_rows(read_graph(path))
            model = runtime.load(LoadRequest(path), LoadCancel())
        except (ValueError, LoadFailed):
            continue
        found["run"] += 1
        found["reading"] += not reading.why
        alone = _is_batched(model, Rules(Reading("", reading.limits)))
        found["trial"] += alone
        found["both"] += alone and not reading.why
        if reading.why:
            against[reading.why.split()[0]] += 1
        model.close()
    return {**found, "against": against}


def _is_batched(model: Any, rules: Rules) -> bool:
    try:
        return explore(model, [], rules=rules, wanted=ROWS).max > 1
    except (NotBatchable, RunFailed, NoInputs):
        return False


def _node_moves(folder: Path, effort: Effort) -> dict[str, int]:
    found: Counter[str] = Counter()
    for number, case in enumerate(collect_testcases(None)):
        if not effort.everything and number % 20:
            continue
        found["models"] += 1
        path = str(zoo.write(folder / "node.onnx", case.model))
        for word, finite in (("any", False), ("finite", True)):
            found[word] += not judge(_settings(path, finite=finite))
    return dict(found)


def _settings(path: str, *, finite: bool) -> dict[str, Any]:
    sides = {name: {"runtime": name, "device": "CPU"} for name in ("onnxruntime", "openvino")}
    return {
        "path": path,
        "format": "onnx",
        "reference": sides["onnxruntime"],
        "candidate": sides["openvino"],
        "finite_inputs": finite,
    }


def _networks(folder: Path) -> Iterator[tuple[str, Path]]:
    """Real networks; what cannot be fetched here is left out, and the table is that much shorter."""
    for name in zoo.REAL_MODELS:
        if name != "squeezenet":
            model = zoo.with_free_rows(zoo.real(name))
            yield f"{name}, of free rows", zoo.write(folder / f"{name}.onnx", model)
    yield "MLP, 64-256-10", zoo.write(folder / "mlp.onnx", zoo.mlp((64, 256, 10)))
    for wheel in (MAGIKA, RAPIDOCR, MINILM):
        for name in wheel.networks:
            try:
                yield f"{wheel.requirement}: {name}", wheel.network(name)
            except pytest.skip.Exception:
                continue
    with contextlib.suppress(pytest.skip.Exception):
        yield "Silero VAD", silero_network()
    for name, model in _forests().items():
        yield name, zoo.write(folder / "forest.onnx", model)


def _forests() -> Mapping[str, onnx.ModelProto]:
    from skl2onnx import to_onnx
    from sklearn.datasets import load_iris
    from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor

    x, y = load_iris(return_X_y=True)
    x = x.astype(np.float32)
    made = {
        "a forest that classifies": RandomForestClassifier(20, random_state=0),
        "a forest that regresses": RandomForestRegressor(20, random_state=0),
    }
    return {
        name: to_onnx(forest.fit(x, y), x[:1], options={"zipmap": False} if "class" in name else None)
        for name, forest in made.items()
    }


def _network(name: str, path: Path) -> tuple[tuple[str, ...], float]:
    runtime = create_runtime("onnxruntime")
    request = LoadRequest(str(path), threads=2)
    model = runtime.load(request, LoadCancel())
    likely = [
        {n: tuple(shape)[1:] for n, shape in shapes.items()}
        for source, shapes in reversed(madeup.sizes_to_try(model.inputs, {}))
        if source == "typical"
    ]
    began_s = time.monotonic()
    reading = read_rows(runtime.graph(request))
    found: list[str] = []
    why = ""
    for wanted in (None, 8):
        try:
            batch = explore(model, [], rules=Rules(reading), wanted=wanted, likely=likely)
            found.append(str(batch.max))
            why = why or batch.why
        except (NotBatchable, RunFailed, NoInputs) as e:
            found.append("–")
            why = why or str(e)
        if wanted is None:
            proof_s = time.monotonic() - began_s
    yes = "yes" if found[1] != "–" else "no"
    moves = [_moves(judge(_settings(str(path), finite=finite))) for finite in (False, True)]
    return (name, f"{yes}: {why}", f"{found[0]} ({found[1]})", f"{proof_s:.2f}", *moves), proof_s


def _moves(against: Any) -> str:
    return f"no: {against[0]}" if against else "may"


if __name__ == "__main__":
    run_alone(measure)
