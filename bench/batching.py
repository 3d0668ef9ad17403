"""What putting requests together gives, and what having it on costs who comes alone.

The yardstick is the bare runtime fed by hand with whole batches of the size that suits it best, found in the
same run: nobody sends it requests, so what edged falls short of it is the price of being asked one row at a
time.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

import onnx

from bench.crowd import Crowd
from bench.harness import PINNED, Daemon
from bench.load import Ask, Effort, closed, interleaved, median, percentile, turns
from bench.report import Claim, Progress, Section, at_least, at_most, micros, run_alone, table
from bench.targets import Target, opened
from tests import zoo

COMMAND = "python -m bench.batching"
BATCHES = (1, 2, 4, 8, 16, 32, 64)
CLIENTS, IN_FLIGHT = 2, 64
"""Two processes with so many requests out each: twice the largest batch waits at any time."""

ALONE_GOAL = 1.02


@dataclass(frozen=True)
class Network:
    """One of those measured."""

    name: str
    model: onnx.ModelProto
    shape: tuple[int, ...]
    goal: float


def networks() -> tuple[Network, ...]:
    """One that gains from batches, since its weights are read once for all rows; one that does not."""
    return (
        Network("MLP", zoo.mlp((1024, 2048, 2048, 2048, 1024), seed=5), (1, 1024), 0.7),
        Network("CNN", zoo.conv_net(seed=5), (1, 3, 96, 96), 0.95),
    )


def measure(progress: Progress, effort: Effort) -> Section:
    """Throughput at saturation, and one client's round trip, with batching as it comes and off."""
    rows: list[tuple[object, ...]] = []
    alone: list[tuple[object, ...]] = []
    claims: list[Claim] = []
    for network in networks():
        with ExitStack() as stack:
            daemon = Daemon()
            stack.callback(daemon.close)
            file = daemon.put(network.name, network.model)
            daemon.put(f"{network.name}-off", network.model, PINNED + "max_batch_size = 1\n")
            daemon.put(f"{network.name}-two", network.model, PINNED + "instances = 2\n")
            daemon.start()
            served = Target("client", daemon.endpoint, network.name, shape=network.shape)
            claims.append(_saturated(stack, daemon, network, served, file, rows, progress, effort))
            claims.append(_alone(stack, network, served, alone, progress, effort))
    text = f"""
Two networks with a dynamic first dimension, FP32, on ONNX Runtime: an MLP of 1024-2048-2048-2048-1024 units,
whose 67 MB of weights have to come from memory for each run, and a CNN of four convolutions on 3×96×96. Every
request is one row; {CLIENTS} client processes keep {IN_FLIGHT} out each, with messages made beforehand. The
bare runtime has the worker's settings and is handed whole batches, {effort.slots} slots of {effort.slot_s:g}
s each in turns with edged. The goal is held by the best of edged's settings, which is named.

{table(("network", "who", "rows/s", "× the best batch", "rows a run"), rows)}

One client that asks one request at a time:

{table(("network", "batching", "p50 µs", "p99 µs"), alone)}
"""
    return Section("Batching", COMMAND, text, claims)


def _saturated(
    stack: ExitStack,
    daemon: Daemon,
    network: Network,
    served: Target,
    file: str,
    rows: list[tuple[object, ...]],
    progress: Progress,
    effort: Effort,
) -> Claim:
    progress(f"batching: {network.name}, saturated")
    bare = {}
    for batch in BATCHES:
        target = replace(
            served,
            way="settings",
            model=file,
            shape=(batch, *network.shape[1:]),
            threads=len(os.sched_getaffinity(0)),
        )
        bare[batch] = stack.enter_context(opened(target))
    variants = {
        f"bare, batch {batch}": partial(_rows_hz, ask, batch, effort.slot_s) for batch, ask in bare.items()
    }
    settings = {"edged": "", "edged, `instances = 2`": "-two", "edged, `max_batch_size = 1`": "-off"}
    for name, suffix in settings.items():
        crowd = stack.enter_context(Crowd([replace(served, model=network.name + suffix)] * CLIENTS))
        variants[name] = lambda crowd=crowd: crowd.saturate(IN_FLIGHT, effort.slot_s).requests_hz
    rate = {name: median(each) for name, each in turns(variants, effort).items()}
    best = max((name for name in rate if name.startswith("bare")), key=lambda name: rate[name])
    own = max(settings, key=lambda name: rate[name])
    together = {name: _rows_a_run(daemon, network.name + suffix) for name, suffix in settings.items()}
    for name, hz in rate.items():
        rows.append((network.name, name, f"{hz:,.0f}", f"{hz / rate[best]:.2f}", together.get(name, "")))
    text = f"{network.name} at saturation, rows/s over the bare runtime's at its best batch"
    return at_least(text, rate[own] / rate[best], network.goal, note=f"{own}, against {best}")


def _rows_hz(ask: Ask, batch: int, seconds: float) -> float:
    times = closed(ask, seconds)
    return batch * len(times) / sum(times)


def _rows_a_run(daemon: Daemon, name: str) -> str:
    """How many requests ran together on the average, by the daemon's own statistics."""
    with daemon.client() as client:
        stats = client.statistics(name)[0]
    return f"{stats['inference_count'] / max(1, stats['execution_count']):.1f}"


def _alone(
    stack: ExitStack,
    network: Network,
    served: Target,
    rows: list[tuple[object, ...]],
    progress: Progress,
    effort: Effort,
) -> Claim:
    progress(f"batching: {network.name}, one client")
    targets = {"automatic": served, "off": replace(served, model=f"{network.name}-off")}
    # Small differences want many turns.
    more = replace(effort, slots=2 * effort.slots)
    times = interleaved({name: stack.enter_context(opened(t)) for name, t in targets.items()}, more)
    for name, samples in times.items():
        rows.append((network.name, name, micros(median(samples)), micros(percentile(samples, 0.99))))
    factor = median(times["automatic"]) / median(times["off"])
    return at_most(f"{network.name}, one client, p50 with batching on over off", factor, ALONE_GOAL)


if __name__ == "__main__":
    run_alone(measure)
