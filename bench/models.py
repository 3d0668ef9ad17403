"""Real networks through edged, against the runtimes called in process.

Two yardsticks. ONNX Runtime with its defaults, which is what an app has that calls it without a thought; and
the best that this machine has in process, with edged's own settings, which shows what serving alone costs.
The weights are random, since the graphs come without; the work is the same.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from bench.crowd import Crowd
from bench.harness import Daemon
from bench.load import Effort, interleaved, median, percentile, turns
from bench.report import Claim, Progress, Section, at_least, at_most, run_alone, table
from bench.targets import Target, opened
from edged import Client
from tests import zoo

COMMAND = "python -m bench.models"
CLIENTS = 4
INPUTS = 16
SHAPE = (1, 3, 224, 224)
F32_GOAL = 1.03
FAST_GOALS = {"resnet50": 0.6, "squeezenet": 0.6, "shufflenet": 0.95}
BEST_GOAL, BEST_FROM_MS = 1.05, 5.0
CROWD_GOALS = {"shufflenet": 1.8, "resnet50": 1.6}
INSTANCES = ("2", '"auto"')
"""Settings of a model that several clients ask at once."""

FINITE = "finite_inputs = true\n"
"""Pictures hold no NaN; without that word no network is moved to where a rectifier makes 0 of it."""

Row = dict[str, Any]


def measure(progress: Progress, effort: Effort) -> Section:
    """Each network in FP32 as `auto` chose and with `precision = "fast"`; then four clients, four apps."""
    with ExitStack() as stack:
        daemon = Daemon(ready_timeout_s=180)
        stack.callback(daemon.close)
        names = zoo.REAL_MODELS if effort.everything else zoo.REAL_MODELS[-1:]
        for name in names:
            data = zoo.real(name).read_bytes()
            daemon.put(name, data, FINITE)
            daemon.put(f"{name}-fast", data, f'{FINITE}precision = "fast"\n')
        daemon.start()
        chosen = daemon.wait_chosen(progress)
        of_model = {row["name"]: row for row in chosen if row["serving"]}
        with daemon.client(timeout_s=120) as client:
            parts = [_one(stack, client, daemon, of_model, name, progress, effort) for name in names]
    crowds = [_crowd(name, progress, effort) for name in CROWD_GOALS if name in names]
    claims = [claim for part in (*parts, *crowds) for claim in part["claims"]]
    alone = ("network", "by", "on", "p50 ms", "p99 ms", "compute", "× defaults")
    far = ("network", "served", "relative L2, median", "largest difference of a probability", "same class")
    together = ("network", "by", "on", "requests/s", "p50 ms", "p99 ms", "× four apps")
    text = f"""
Batch of one, 1×3×224×224 FP32, one request at a time; {effort.slots} slots of {effort.slot_s:g} s each in
turns, a pause between them. "Defaults" is ONNX Runtime in the client's own process with nothing set, "as
edged has it" the runtime that edged chose (and any other one) in the client's own process, loaded and run by
the worker's code. "Compute" is the median time in the runtime as the replies say. Seeded random weights on
the graphs that the `onnx` package ships.

{table(alone, [row for part in parts for row in part["rows"]])}

How far the answers are from ONNX Runtime's, over {INPUTS} inputs:

{table(far, [row for part in parts for row in part["moved"]])}

{CLIENTS} client processes that ask edged without a pause, against {CLIENTS} apps that each run ONNX Runtime
with its defaults in their own process:

{table(together, [row for crowd in crowds for row in crowd["rows"]])}

What edged chose, and what it measured for that: {"; ".join(_choice(row) for row in of_model.values())}.
"""
    return Section("Real networks", COMMAND, text, claims)


def _choice(row: Row) -> str:
    chosen = f"{row['name']}: {row['runtime']} on {row['device']} in {row['precision']} ({row['choice']})"
    for other in row["measured"]:
        time_us = round(other["p50_us"]) if other.get("p50_us") else "?"
        why = other.get("why") or "agrees"
        chosen += f", {other['runtime']} on {other['device']} {time_us} µs ({why})"
    return chosen


def _one(
    stack: ExitStack,
    client: Client,
    daemon: Daemon,
    of_model: dict[str, Row],
    name: str,
    progress: Progress,
    effort: Effort,
) -> dict[str, Any]:
    progress(f"models: {name}")
    metadata = client.model_metadata(name)
    feed, output = metadata["inputs"][0]["name"], metadata["outputs"][0]["name"]
    served = Target("client", daemon.endpoint, name, input_name=feed, shape=SHAPE)
    image = _image(0)
    first = {variant: client.infer(variant, {feed: image}) for variant in (name, f"{name}-fast")}
    path = str(zoo.real(name))
    threads = int(of_model[name].get("threads") or 1)
    targets = {
        "defaults": replace(served, way="defaults", model=path),
        "edged": served,
        'edged, `precision = "fast"`': replace(served, model=f"{name}-fast"),
    }
    for runtime in ("onnxruntime", "openvino"):
        targets[f"{runtime} as edged has it"] = replace(
            served, way="settings", model=path, runtime=runtime, threads=threads
        )
    times = interleaved(
        {variant: stack.enter_context(opened(target)) for variant, target in targets.items()}, effort
    )
    base_s = median(times["defaults"])
    best = min((v for v in targets if v.endswith("as edged has it")), key=lambda v: median(times[v]))
    rows, compute_ms = [], {"edged": name, 'edged, `precision = "fast"`': f"{name}-fast"}
    for variant, samples in times.items():
        where, inside = "CPU", "all"
        if variant in compute_ms:
            result = first[compute_ms[variant]]
            where = f"{result.device}, {result.runtime}, {result.precision}"
            inside = f"{_compute_ms(client, compute_ms[variant], feed, image):.2f}"
        factor = f"{median(samples) / base_s:.2f}"
        rows.append((name, variant, where, _ms(samples, 0.5), _ms(samples, 0.99), inside, factor))
    truth = _truth(path, feed, [_image(seed) for seed in range(INPUTS)])
    moved = [
        (name, variant, *_distance(truth, _answers(client, served_name, feed, output)))
        for variant, served_name in compute_ms.items()
    ]
    edged_s, best_s = median(times["edged"]), median(times[best])
    fast = median(times['edged, `precision = "fast"`']) / base_s
    claims = [
        at_most(
            f"{name}, FP32, p50 over ONNX Runtime in process with its defaults", edged_s / base_s, F32_GOAL
        ),
        at_most(
            f'{name}, `precision = "fast"`, the same',
            fast,
            FAST_GOALS[name],
            note=f"computed in {first[f'{name}-fast'].precision}",
        ),
    ]
    text = f"{name}, FP32, p50 over the best in process with the same settings ({best.split()[0]})"
    if best_s * 1e3 >= BEST_FROM_MS:
        claims.append(at_most(text, edged_s / best_s, BEST_GOAL))
    else:
        claims.append(
            Claim(
                text,
                f"at most {BEST_GOAL} × from {BEST_FROM_MS:g} ms on",
                f"{edged_s / best_s:.2f} × ({best_s * 1e3:.2f} ms)",
                None,
            )
        )
    return {"rows": rows, "moved": moved, "claims": claims}


def _crowd(name: str, progress: Progress, effort: Effort) -> dict[str, Any]:
    """Four clients of edged, with the settings there are, against four apps with a session each.

    A daemon of its own: each instance that only waits would still hold its memory and its threads.
    """
    with ExitStack() as stack:
        daemon = Daemon(ready_timeout_s=180)
        stack.callback(daemon.close)
        data = zoo.real(name).read_bytes()
        variants = {"edged": (name, FINITE)}
        for instances in INSTANCES:
            variants[f"edged, `instances = {instances}`"] = (
                f"{name}-{instances.strip(chr(34))}",
                f"{FINITE}instances = {instances}\n",
            )
        for served, settings in variants.values():
            daemon.put(served, data, settings)
        daemon.start()
        rows_of = {row["name"]: row for row in daemon.wait_chosen(progress) if row["serving"]}
        with daemon.client() as client:
            feed = client.model_metadata(name)["inputs"][0]["name"]
        app = Target("defaults", model=str(zoo.real(name)), input_name=feed, shape=SHAPE)
        targets = {f"{CLIENTS} apps with ONNX Runtime": app}
        for variant, (served, _) in variants.items():
            targets[variant] = replace(app, way="client", endpoint=daemon.endpoint, model=served)
        progress(f"models: {CLIENTS} clients, {name}")
        crowds = {
            variant: stack.enter_context(Crowd([target] * CLIENTS)) for variant, target in targets.items()
        }
        slot_s = max(effort.slot_s, 0.5)
        slots = turns({v: partial(crowd.closed, slot_s) for v, crowd in crowds.items()}, effort)
    rate = {variant: median([slot.requests_hz for slot in each]) for variant, each in slots.items()}
    base = f"{CLIENTS} apps with ONNX Runtime"
    rows = []
    for variant, each in slots.items():
        samples = [t for slot in each for t in slot.latencies_s]
        row = rows_of.get(variants[variant][0], {}) if variant in variants else {}
        where = f"{row['runtime']}, {row['precision']}" if row else "CPU"
        factor = f"{rate[variant] / rate[base]:.2f}"
        rows.append(
            (name, variant, where, f"{rate[variant]:.1f}", _ms(samples, 0.5), _ms(samples, 0.99), factor)
        )
    best = max(variants, key=lambda variant: rate[variant])
    claim = at_least(
        f"{name}, FP32, {CLIENTS} clients' requests/s over {CLIENTS} apps with ONNX Runtime",
        rate[best] / rate[base],
        CROWD_GOALS[name],
        note=best,
    )
    return {"rows": rows, "claims": [claim]}


def _ms(samples: list[float], share: float) -> str:
    return f"{percentile(samples, share) * 1e3:.2f}"


def _compute_ms(client: Client, model: str, feed: str, image: np.ndarray) -> float:
    return median([client.infer(model, {feed: image}).compute_us / 1e3 for _ in range(10)])


def _truth(path: str, feed: str, images: list[np.ndarray]) -> list[np.ndarray]:
    import onnxruntime as ort

    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    return [session.run(None, {feed: image})[0].ravel() for image in images]


def _answers(client: Client, model: str, feed: str, output: str) -> list[np.ndarray]:
    return [client.infer(model, {feed: _image(seed)})[output].ravel() for seed in range(INPUTS)]


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
    return f"{median(relative):.1e}", f"{largest:.1e}", f"{same} of {len(truth)}"


if __name__ == "__main__":
    run_alone(measure)
