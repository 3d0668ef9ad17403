"""What serving costs: edged's round trip against a bare ZeroMQ echo of the same size, and against no server.

All are asked in turn, in short slots, by one client in one process. The echo is `bench.echo`: the same kinds
of socket, the same bytes, no work. Several clients are processes of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import msgpack

from bench.crowd import Crowd, Slot
from bench.harness import ROOT, Daemon
from bench.load import Effort, interleaved, median, percentile, turns
from bench.report import (
    Claim,
    Progress,
    Section,
    at_most,
    micros,
    run_alone,
    table,
)
from bench.targets import Target, input_of, opened
from edged import InferResult
from tests import zoo

COMMAND = "python -m bench.overhead"
CLIENTS = 4
RATES_HZ = (50.0, 1000.0)
IMAGE = (1, 3, 224, 224)
VIDEO_SIDE = 720
ANSWER_BYTES = 256
"""What an echo with a small answer sends in place of a large tensor: about as much as edged's reply has."""

TINY_GOAL, FRAME_GOAL, LEASE_GOAL_MS, VIDEO_GOAL = 1.5, 1.6, 0.35, 1.2
COMPUTE_RUNS = 50

BUSY = 0.85
"""From so much of a CPU on, a process is what binds; the rest is its waiting for the one before it."""

Times = dict[str, list[float]]


def measure(progress: Progress, effort: Effort) -> Section:
    """Round trips of a tiny model, and of some with a large input; one client and several."""
    with ExitStack() as stack:
        daemon = Daemon()
        stack.callback(daemon.close)
        daemon.put("tiny", zoo.mlp(seed=1))
        large_file = daemon.put("large", zoo.image_mean())
        daemon.put("video", zoo.image_mean(VIDEO_SIDE))
        daemon.start()
        tiny = Target("client", daemon.endpoint, "tiny")
        parts = [
            _tiny(stack, daemon, tiny, progress, effort),
            _large(stack, daemon, large_file, progress, effort),
            _video(stack, tiny, progress, effort),
            _crowds(stack, daemon, tiny, progress, effort),
        ]
    text = "\n\n".join(text for text, _ in parts)
    return Section("Serving overhead", COMMAND, text, [claim for _, claims in parts for claim in claims])


def _tiny(
    stack: ExitStack, daemon: Daemon, tiny: Target, progress: Progress, effort: Effort
) -> tuple[str, list[Claim]]:
    echo = stack.enter_context(echo_server(daemon.root / "run" / "echo.sock"))
    targets = {
        "bare echo": Target("frames", echo, "tiny"),
        "edged over ZeroMQ, message made beforehand": replace(tiny, way="frames"),
        "edged over ZeroMQ, `Client(fast=False)`": replace(tiny, way="zeromq"),
        "edged over the fast lane, packet made beforehand": replace(tiny, way="packets"),
        "edged over the fast lane, `Client`": tiny,
    }
    asks = {name: stack.enter_context(opened(target)) for name, target in targets.items()}
    progress("overhead: tiny model, closed loop")
    times = {"closed loop": interleaved(asks, effort)}
    for rate_hz in RATES_HZ:
        progress(f"overhead: tiny model, {rate_hz:g} Hz")
        times[f"{rate_hz:g} Hz"] = interleaved(asks, effort, rate_hz)
    closed_loop = times["closed loop"]
    text = f"""
One client, one request at a time, over ipc; each variant has {effort.slots} slots of {effort.slot_s:g} s in
turns. A network of 64-32-10 units, about 0.4 KB each way. The bare echo is a pyzmq ROUTER in a poll loop that
sends back what came. Paced, the client sleeps until its next tick, and everyone else has gone to sleep too.

{_loops(times)}
"""
    echo_s = median(closed_loop["bare echo"])
    factor = median(closed_loop["edged over ZeroMQ, `Client(fast=False)`"]) / echo_s
    bare = median(closed_loop["edged over ZeroMQ, message made beforehand"]) / echo_s
    claim = at_most(
        "tiny model, one client over ZeroMQ, round trip over the bare echo's",
        factor,
        TINY_GOAL,
        note=f"{bare:.2f} × with the message made beforehand, as the echo's is",
    )
    return text, [claim]


def _large(
    stack: ExitStack, daemon: Daemon, file: str, progress: Progress, effort: Effort
) -> tuple[str, list[Claim]]:
    progress("overhead: 602 KB input")
    echo = stack.enter_context(echo_server(daemon.root / "run" / "large.sock"))
    one_way = stack.enter_context(echo_server(daemon.root / "run" / "oneway.sock", ANSWER_BYTES))
    large = Target("frames", daemon.endpoint, "large", shape=IMAGE)
    targets = {
        "bare echo": replace(large, endpoint=echo),
        "bare echo, small answer": replace(large, endpoint=one_way),
        "edged, in a frame": large,
        "edged, `Client` (leases memory by itself)": replace(large, way="client"),
        "edged, `Client`, input in the app's lease": replace(large, way="lease"),
        "no server: ONNX Runtime in process": replace(large, way="settings", model=file),
    }
    asks = {name: stack.enter_context(opened(target)) for name, target in targets.items()}
    times = interleaved(asks, effort)
    model_s = compute_s(large)
    frame_s = median(times["edged, in a frame"]) - model_s
    in_process_s = median(times["no server: ONNX Runtime in process"])
    lease_ms = (median(times["edged, `Client`, input in the app's lease"]) - in_process_s) * 1e3
    own_ms = (median(times["edged, `Client` (leases memory by itself)"]) - in_process_s) * 1e3
    text = f"""
One input of 602 KB (1×3×224×224 FP32), an answer of 12 bytes. The model takes the mean of each plane, which
is {micros(model_s)} µs of each of edged's round trips, as its replies say. The echo sends all 602 KB back;
the one with a small answer does not.

{_rows(times, "bare echo")}
"""
    strict = frame_s / median(times["bare echo, small answer"])
    return text, [
        at_most(
            "602 KB in a frame, model time off, over its echo",
            frame_s / median(times["bare echo"]),
            FRAME_GOAL,
            note=f"{strict:.2f} × of an echo with a small answer",
        ),
        at_most(
            "602 KB by lease, what the round trip takes beyond the runtime in process",
            lease_ms,
            LEASE_GOAL_MS,
            "ms",
            note=f"{own_ms:.2f} ms when the client copies into a lease of its own",
        ),
    ]


def _video(stack: ExitStack, tiny: Target, progress: Progress, effort: Effort) -> tuple[str, list[Claim]]:
    progress("overhead: 6.2 MB input")
    shape = (1, 3, VIDEO_SIDE, VIDEO_SIDE)
    video = replace(tiny, way="lease", model="video", shape=shape)
    targets = {
        "tiny model, inline": tiny,
        "6.2 MB, input in the app's lease": video,
        "6.2 MB, `Client` (leases memory by itself)": replace(video, way="client"),
    }
    asks = {name: stack.enter_context(opened(target)) for name, target in targets.items()}
    times = interleaved(asks, effort)
    tiny_model_s, model_s = compute_s(tiny), compute_s(video)
    off = {
        name: median(samples) - (tiny_model_s if name.startswith("tiny") else model_s)
        for name, samples in times.items()
    }
    rows = [
        (name, micros(median(samples)), micros(percentile(samples, 0.99)), micros(off[name]))
        for name, samples in times.items()
    ]
    megabytes = input_of(video).nbytes / 1e6
    text = f"""
One input of {megabytes:.1f} MB (1×3×{VIDEO_SIDE}×{VIDEO_SIDE} FP32), mean of each plane again,
{micros(model_s)} µs of model time.

{table(("round trip", "p50 µs", "p99 µs", "p50 µs, model time off"), rows)}
"""
    factor = off["6.2 MB, input in the app's lease"] / off["tiny model, inline"]
    return text, [
        at_most("6.2 MB by lease over the tiny model's round trip, model time off both", factor, VIDEO_GOAL)
    ]


def compute_s(target: Target) -> float:
    """The median time that the runtime takes when edged is asked in this way, as its replies say."""
    taken_us = []
    with opened(target) as ask:
        for _ in range(COMPUTE_RUNS):
            answer = ask()
            if not isinstance(answer, InferResult):
                answer = InferResult({}, "", "", msgpack.unpackb(bytes(answer[0]))["parameters"])
            taken_us.append(answer.compute_us)
    return median(taken_us) / 1e6


def _crowds(
    stack: ExitStack, daemon: Daemon, tiny: Target, progress: Progress, effort: Effort
) -> tuple[str, list[Claim]]:
    ways = {"ZeroMQ": replace(tiny, way="zeromq"), "fast lane": tiny}
    rows, claims = [], []
    for way, target in ways.items():
        progress(f"overhead: 1 and {CLIENTS} clients, {way}")
        one, many = stack.enter_context(Crowd([target])), stack.enter_context(Crowd([target] * CLIENTS))
        crowds = {"1 client": one, f"{CLIENTS} clients": many}
        slots = turns(
            {name: partial(_watched, daemon, crowd, effort.slot_s) for name, crowd in crowds.items()},
            effort,
        )
        rate = {name: median([done.requests_hz for done, _ in each]) for name, each in slots.items()}
        busy = {
            name: [median(column) for column in zip(*(b for _, b in each), strict=True)]
            for name, each in slots.items()
        }
        for name, each in slots.items():
            latencies = [t for done, _ in each for t in done.latencies_s]
            rows.append(
                (
                    f"{way}, {name}",
                    f"{rate[name]:,.0f}",
                    micros(median(latencies)),
                    micros(percentile(latencies, 0.99)),
                    *(f"{share:.2f}" for share in busy[name]),
                )
            )
        factor = rate[f"{CLIENTS} clients"] / rate["1 client"]
        figure = f"{factor:.2f} × ({_limit(busy[f'{CLIENTS} clients'])})"
        text = f"tiny model, {CLIENTS} clients' requests/s over one's, {way}"
        claims.append(Claim(text, "as high as the cores allow", figure, None))
    text = f"""
The tiny model again, by client processes that ask without a pause; CPUs kept busy by the supervisor, by the
worker and its like, and by the clients themselves, of {os.cpu_count()}.

{table(("closed loop", "requests/s", "p50 µs", "p99 µs", "supervisor", "worker", "clients"), rows)}
"""
    return text, claims


def _watched(daemon: Daemon, crowd: Crowd, seconds: float) -> tuple[Slot, tuple[float, float, float]]:
    """A slot, and how many CPUs the supervisor, all other processes of edged's, and the clients kept busy."""
    cpu = daemon.cpu()
    done = crowd.closed(seconds)
    return done, (*cpu.read(), done.cpu_s / seconds)


def _limit(busy: Sequence[float]) -> str:
    supervisor, worker, clients = busy
    if supervisor + worker + clients >= BUSY * (os.cpu_count() or 1):
        names = f"supervisor {supervisor:.2f}, worker {worker:.2f}, clients {clients:.2f}"
        return f"every core is busy: {names}"
    if supervisor >= BUSY:
        return f"the supervisor's one thread binds, {supervisor:.2f} of a core"
    if worker >= BUSY:
        return f"the worker binds, {worker:.2f} of a core"
    return f"wake-ups bind: {supervisor + worker + clients:.2f} of {os.cpu_count()} CPUs busy"


def _loops(times: Mapping[str, Times]) -> str:
    rows = []
    for loop, variants in times.items():
        base = median(variants["bare echo"])
        for name, samples in variants.items():
            factor = f"{median(samples) / base:.2f}"
            rows.append((name, loop, micros(median(samples)), micros(percentile(samples, 0.99)), factor))
    return table(("round trip", "load", "p50 µs", "p99 µs", "× echo"), rows)


def _rows(times: Times, base: str) -> str:
    rows = [
        (
            name,
            micros(median(samples)),
            micros(percentile(samples, 0.99)),
            f"{median(samples) / median(times[base]):.2f}",
        )
        for name, samples in times.items()
    ]
    return table(("round trip", "p50 µs", "p99 µs", "× echo"), rows)


@contextmanager
def echo_server(path: Path, answer_bytes: int | None = None) -> Iterator[str]:
    """The endpoint of a bare echo in a process of its own."""
    command = [sys.executable, "-m", "bench.echo", f"ipc://{path}"]
    command += [] if answer_bytes is None else [str(answer_bytes)]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, cwd=ROOT)
    try:
        assert process.stdout is not None
        if process.stdout.readline() != b"ready\n":
            raise RuntimeError("the echo did not start; its words are on stderr")
        yield f"ipc://{path}"
    finally:
        process.kill()
        process.communicate()


if __name__ == "__main__":
    run_alone(measure)
