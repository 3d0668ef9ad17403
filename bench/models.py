"""Real networks through the daemon, against ONNX Runtime with its defaults called in process.

Both are asked in turn with pauses between: ONNX Runtime's threads spin on for a while after a run, and
would slow whoever comes next. The weights are random, since the graphs come without; the work is the same.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # only effective before the import
import numpy as np
import onnxruntime as ort

from bench.harness import Daemon
from bench.report import Claim, Progress, Section, percentile, run_alone, table
from edged import Client
from edged.clientwire import InferResult
from tests import zoo

COMMAND = "python -m bench.models"
ROUNDS = 30
RUNS = 6
PAUSE_S = 0.1
INPUTS = 16
FACTOR_MAX = 1.05
HELD_TO_IT = ("resnet50", "squeezenet")
CHOICE_TIMEOUT_S = 180.0


def measure(progress: Progress) -> Section:
    """Each network in FP32 as `auto` chose, and with `precision = "fast"`."""
    daemon = Daemon(ready_timeout_s=120)
    try:
        for name in zoo.REAL_MODELS:
            data = zoo.real(name).read_bytes()
            zoo.write(daemon.models / f"{name}.onnx", data)
            zoo.write(daemon.models / f"{name}-fast.onnx", data)
            (daemon.models / f"{name}-fast.toml").write_text('precision = "fast"\n')
        daemon.start()
        with daemon.client(timeout_s=120) as client:
            chosen = _wait_chosen(client, progress)
            parts = [_one(client, name, progress) for name in zoo.REAL_MODELS]
    finally:
        daemon.close()
    claims = tuple(
        Claim(
            f"{name}, FP32, p50 at most {FACTOR_MAX} × ONNX Runtime in process",
            f"{part['factor']:.2f} ×",
            part["factor"] <= FACTOR_MAX,
        )
        for name, part in zip(zoo.REAL_MODELS, parts, strict=True)
        if name in HELD_TO_IT
    )
    times = table(
        ("network", "served", "on", "p50 ms", "p99 ms", "of it compute", "× in process"),
        [row for p in parts for row in p["rows"]],
    )
    moved = table(
        ("network", "served", "relative L2, median", "largest difference of a probability", "same top class"),
        [row for p in parts for row in p["moved"]],
    )
    text = f"""
Batch of one, 1×3×224×224 FP32, one request at a time; {ROUNDS} rounds in which each variant has {RUNS}
runs and then a pause of {PAUSE_S * 1000:.0f} ms. "In process" is ONNX Runtime in the client's own process,
every option at its default. "Of it compute" is the median time in the runtime, as the replies say; the rest
is the way there and back. Seeded random weights on the graphs that the `onnx` package ships.

{times}

How far the answers are from ONNX Runtime's, over {INPUTS} inputs:

{moved}

What the daemon chose and why: {chosen}
"""
    return Section("Real networks", COMMAND, text, claims)


def _wait_chosen(client: Client, progress: Progress) -> str:
    """Waits until the daemon has measured its choice for every model, and tells what it chose."""
    deadline = time.monotonic() + CHOICE_TIMEOUT_S
    while True:
        models = client.server_status()["models"]
        waiting = [
            m["name"] for m in models if not m["measured"] and m["choice"] not in ("pinned", "remembered")
        ]
        if not waiting or time.monotonic() > deadline:
            break
        progress(f"models: the daemon still measures {', '.join(waiting)}")
        time.sleep(3)
    return "; ".join(
        f"{m['name']}: {m['runtime']} on {m['device']} in {m['precision']} ({m['choice']})"
        + "".join(f", {c['runtime']} on {c['device']} {_measured(c)}" for c in m["measured"])
        for m in models
    )


def _measured(candidate: dict[str, Any]) -> str:
    time_us = candidate.get("p50_us")
    return f"{'?' if time_us is None else round(time_us)} µs ({candidate.get('why') or 'agrees'})"


def _one(client: Client, name: str, progress: Progress) -> dict[str, Any]:
    progress(f"models: {name}")
    session = ort.InferenceSession(str(zoo.real(name)))
    feed, output = session.get_inputs()[0].name, session.get_outputs()[0].name
    images = [_image(seed) for seed in range(INPUTS)]
    variants: dict[str, Callable[[np.ndarray], Any]] = {
        "in process": lambda x: session.run(None, {feed: x}),
        'edged, `precision = "f32"`': lambda x: client.infer(name, {feed: x}),
        'edged, `precision = "fast"`': lambda x: client.infer(f"{name}-fast", {feed: x}),
    }
    times, computes = _interleave(variants, images)
    base = percentile(times["in process"], 0.5)
    rows, moved, factor = [], [], 0.0
    truth = [session.run(None, {feed: x})[0].ravel() for x in images]
    for variant, ask in variants.items():
        p50, p99 = (percentile(times[variant], share) for share in (0.5, 0.99))
        where = "CPU, onnxruntime"
        if variant != "in process":
            results = [ask(x) for x in images]
            where = f"{results[0].device}, {results[0].runtime}, {results[0].precision}"
            moved.append((name, variant, *_distance(truth, [r[output].ravel() for r in results])))
        if "f32" in variant:
            factor = p50 / base
        inside = f"{percentile(computes[variant], 0.5):.2f}" if computes[variant] else "all"
        rows.append(
            (name, variant, where, f"{p50 * 1e3:.2f}", f"{p99 * 1e3:.2f}", inside, f"{p50 / base:.2f}")
        )
    return {"rows": rows, "moved": moved, "factor": factor}


def _interleave(
    variants: dict[str, Callable[[np.ndarray], Any]], images: list[np.ndarray]
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Round trips in seconds, and what the runtime took of them, as the daemon's replies say, in ms."""
    times: dict[str, list[float]] = {variant: [] for variant in variants}
    computes: dict[str, list[float]] = {variant: [] for variant in variants}
    for round_number in range(ROUNDS + 1):
        for variant, ask in variants.items():
            for run in range(RUNS):
                began = time.perf_counter()
                result = ask(images[run % len(images)])
                if round_number and run:  # the first round and each slot's first run warm up
                    times[variant].append(time.perf_counter() - began)
                    if isinstance(result, InferResult):
                        computes[variant].append(result.compute_us / 1000)
            time.sleep(PAUSE_S)
    return times, computes


def _image(seed: int) -> np.ndarray:
    """A smooth random picture: white noise would look alike to a network whatever its seed."""
    rng = np.random.default_rng(seed)
    coarse = rng.normal(0, 1.5, (3, 8, 8))
    picture = np.kron(coarse, np.ones((28, 28))) + rng.normal(0, 0.2, (3, 224, 224))
    return picture[np.newaxis].astype(np.float32)


def _distance(truth: list[np.ndarray], answers: list[np.ndarray]) -> tuple[str, str, str]:
    relative = [float(np.linalg.norm(a - t) / np.linalg.norm(t)) for a, t in zip(answers, truth, strict=True)]
    largest = max(float(np.abs(a - t).max()) for a, t in zip(answers, truth, strict=True))
    same = sum(int(a.argmax() == t.argmax()) for a, t in zip(answers, truth, strict=True))
    return f"{percentile(relative, 0.5):.1e}", f"{largest:.1e}", f"{same} of {len(truth)}"


if __name__ == "__main__":
    run_alone(measure)
