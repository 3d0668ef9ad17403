"""What serving costs: the daemon's round trip against a bare ZeroMQ echo of the same size.

Both are asked in turn, in short slots, by one client in one process, so that whatever else the machine
does meets both alike. The baseline is `bench.echo`: the same socket kinds, the same bytes, no work.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgpack
import numpy as np
import zmq

from bench.harness import ROOT, Daemon
from bench.report import Claim, Progress, Section, percentile, run_alone, table
from tests import zoo

COMMAND = "python -m bench.overhead"
SLOTS = 30
TINY_RUNS, LARGE_RUNS = 150, 40
TINY_FACTOR_MAX, LARGE_FACTOR_MAX = 2.5, 2.0
PINNED = 'runtime = "onnxruntime"\ndevice = "cpu"\n'

Ask = Callable[[], object]


def measure(progress: Progress) -> Section:
    """Round trips of a tiny model and of one with a large input."""
    with ExitStack() as stack:
        daemon = Daemon()
        stack.callback(daemon.close)
        for name, model in (("tiny", zoo.mlp(seed=1)), ("large", zoo.image_mean())):
            zoo.write(daemon.models / f"{name}.onnx", model)
            (daemon.models / f"{name}.toml").write_text(PINNED)  # nothing measures beside us
        daemon.start()
        client = stack.enter_context(daemon.client())
        rng = np.random.default_rng(0)
        tiny = rng.normal(0, 1, (1, 64)).astype(np.float32)
        large = rng.normal(0, 1, (1, 3, 224, 224)).astype(np.float32)
        tiny_frames, large_frames = _frames("tiny", tiny, inline=True), _frames("large", large, inline=False)
        served = stack.enter_context(_dealer(daemon.endpoint))
        echo = stack.enter_context(_echo(daemon.root / "run" / "echo.sock"))
        one_way = stack.enter_context(_echo(daemon.root / "run" / "oneway.sock", answer_bytes=256))

        progress("overhead: tiny model")
        tiny_times = _interleave(
            {
                "bare echo": lambda: _ask(echo, tiny_frames),
                "edged, frames made beforehand": lambda: _ask(served, tiny_frames),
                "edged, `Client.infer`": lambda: client.infer("tiny", {"x": tiny}),
            },
            TINY_RUNS,
        )
        progress("overhead: 602 KB input")
        large_times = _interleave(
            {
                "bare echo": lambda: _ask(echo, large_frames),
                "bare echo, small answer": lambda: _ask(one_way, large_frames),
                "edged, frames made beforehand": lambda: _ask(served, large_frames),
                "edged, `Client.infer`": lambda: client.infer("large", {"x": large}),
            },
            LARGE_RUNS,
        )
    return _section(tiny_times, large_times)


def _section(tiny: dict[str, list[float]], large: dict[str, list[float]]) -> Section:
    tiny_factor = _median(tiny["edged, `Client.infer`"]) / _median(tiny["bare echo"])
    large_factor = _median(large["edged, `Client.infer`"]) / _median(large["bare echo"])
    one_way_factor = _median(large["edged, `Client.infer`"]) / _median(large["bare echo, small answer"])
    text = f"""
One client, one request at a time, over ipc. The variants take turns, {SLOTS} slots each of {TINY_RUNS}
(tiny) or {LARGE_RUNS} (large) requests. The bare echo is a pyzmq ROUTER in a poll loop that sends back
what came.

A network of 64-32-10 units, about 0.4 KB each way:

{_rows(tiny)}

One input of 602 KB (1×3×224×224 FP32), an answer of 12 bytes; made beforehand it goes as a frame, while
`Client.infer` leases memory for it by itself. The echo sends all 602 KB back; "small
answer" is an echo that does not, which is the stricter of the two ({one_way_factor:.2f} × of it):

{_rows(large)}
"""
    return Section(
        "Serving overhead",
        COMMAND,
        text,
        (
            Claim(
                f"tiny model, p50 at most {TINY_FACTOR_MAX} × the echo",
                f"{tiny_factor:.2f} ×",
                tiny_factor <= TINY_FACTOR_MAX,
            ),
            Claim(
                f"602 KB input, p50 at most {LARGE_FACTOR_MAX:g} × the echo",
                f"{large_factor:.2f} ×",
                large_factor <= LARGE_FACTOR_MAX,
            ),
        ),
    )


def _rows(times: dict[str, list[float]]) -> str:
    base = _median(times["bare echo"])
    rows = [
        (
            name,
            f"{_median(samples) * 1e6:.0f}",
            f"{percentile(samples, 0.99) * 1e6:.0f}",
            f"{_median(samples) / base:.2f}",
        )
        for name, samples in times.items()
    ]
    return table(("round trip", "p50 µs", "p99 µs", "× echo"), rows)


def _median(samples: list[float]) -> float:
    return percentile(samples, 0.5)


def _interleave(variants: dict[str, Ask], runs: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in variants}
    for slot in range(SLOTS + 1):
        for name, ask in variants.items():
            samples = []
            for _ in range(runs):
                began = time.perf_counter()
                ask()
                samples.append(time.perf_counter() - began)
            if slot:  # the first slot warms everything up
                times[name] += samples
    return times


def _frames(model: str, array: np.ndarray, *, inline: bool) -> list[bytes]:
    tensor: dict[str, object] = {"name": "x", "datatype": "FP32", "shape": list(array.shape)}
    tensor.update({"data": array.tobytes()} if inline else {"frame": 0})
    header = {"v": 1, "method": "model_infer", "id": 1, "model_name": model, "inputs": [tensor]}
    frames = [msgpack.packb(header)]
    return frames if inline else [*frames, array.tobytes()]


def _ask(dealer: zmq.Socket[bytes], frames: list[bytes]) -> list[zmq.Frame]:
    dealer.send_multipart(frames, copy=False)
    return dealer.recv_multipart(copy=False)


@contextmanager
def _dealer(endpoint: str) -> Iterator[zmq.Socket[bytes]]:
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.RCVTIMEO, 30_000)
    socket.connect(endpoint)
    try:
        yield socket
    finally:
        socket.close()


@contextmanager
def _echo(path: Path, answer_bytes: int | None = None) -> Iterator[zmq.Socket[bytes]]:
    command = [sys.executable, "-m", "bench.echo", f"ipc://{path}"]
    command += [] if answer_bytes is None else [str(answer_bytes)]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, cwd=ROOT)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        with _dealer(f"ipc://{path}") as socket:
            yield socket
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


if __name__ == "__main__":
    run_alone(measure)
