"""What the daemon costs while nobody asks: CPU, memory, and how soon it serves after its start."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from bench.harness import Daemon, memory_bytes
from bench.load import Effort, median
from bench.report import Progress, Section, at_most, run_alone, table
from tests import zoo

COMMAND = "python -m bench.idle"
MODELS = 10
SIZES = ((64, 32, 10), (64, 128, 10), (64, 64, 64, 10), (32, 16, 4), (128, 256, 10))
STARTS = 5
"""With a full state directory, to have a median."""

CPU_GOAL_PERCENT, PSS_GOAL_MB, SUPERVISOR_GOAL_MB, READY_GOAL_S = 1.0, 20.0, 50.0, 3.0


def measure(progress: Progress, effort: Effort) -> Section:
    """Ten tiny models: a first start, further ones with all of them known, and the last of them idle."""
    daemon = Daemon()
    try:
        for number in range(MODELS):
            daemon.put(f"m{number}", zoo.mlp(SIZES[number % len(SIZES)], seed=number))
        daemon.start()
        first_s = _start_s(daemon)
        daemon.wait_chosen(progress)
        starts_s = []
        for _ in range(max(1, min(STARTS, effort.slots))):
            daemon.stop()
            daemon.start()
            starts_s.append(_start_s(daemon))
            progress(f"idle: READY after {starts_s[-1]:.2f} s")
        reading_s = _reading_s(daemon)
        watch_s = 4 * effort.open_s
        progress(f"idle: watching for {watch_s:.0f} s")
        time.sleep(1.0)  # what the start left to do is not idling
        before, began = _cpu_s(daemon.processes()), time.monotonic()
        time.sleep(watch_s)
        seconds = time.monotonic() - began
        processes = daemon.processes()
        after = _cpu_s(processes)
        used = {pid: 100 * (after[pid] - before.get(pid, 0.0)) / seconds for pid in after}
        pss_mb = {p.pid: memory_bytes([p]) / 1e6 for p in processes}
        rss_mb = {p.pid: p.memory_info().rss / 1e6 for p in processes}
        rows = [
            (
                _role(p, daemon.pid),
                f"{used.get(p.pid, 0):.2f} %",
                f"{rss_mb[p.pid]:.0f}",
                f"{pss_mb[p.pid]:.1f}",
            )
            for p in processes
        ]
        supervisor_mb = rss_mb[daemon.pid]
    finally:
        daemon.close()
    weights_mb = sum(_weights_bytes(SIZES[number % len(SIZES)]) for number in range(MODELS)) / 1e6
    each_mb = (sum(pss_mb.values()) - weights_mb) / MODELS
    text = f"""
{MODELS} networks of some few thousand weights ({weights_mb:.2f} MB together), each in a process of its own,
on ONNX Runtime. CPU time over {watch_s:.0f} s without a request, and memory: RSS counts what processes share
in each of them, PSS shares it out.

{table(("process", "CPU", "RSS MB", "PSS MB"), rows)}

From starting `edged` to READY: {first_s:.2f} s the first time, when nothing is known; {
        ", ".join(f"{s:.2f}" for s in starts_s)
    } s when all ten models are. Reading every file that such a start reads (the store's copies,
the books, the libraries that the processes map, warm in the page cache) takes {reading_s:.3f} s.
"""
    return Section(
        "Idle and start",
        COMMAND,
        text,
        (
            at_most(f"idle, {MODELS} models loaded", sum(used.values()), CPU_GOAL_PERCENT, "% of a core"),
            at_most(
                f"supervisor and {MODELS} tiny models, PSS per model beyond the weights",
                each_mb,
                PSS_GOAL_MB,
                "MB",
            ),
            at_most("the supervisor's RSS", supervisor_mb, SUPERVISOR_GOAL_MB, "MB"),
            at_most(
                f"from `edged` to READY, {MODELS} models known",
                median(starts_s),
                READY_GOAL_S,
                "s",
                note=f"{reading_s:.3f} s of it to read the files",
            ),
        ),
    )


def _start_s(daemon: Daemon) -> float:
    states = [m["state"] for m in daemon.status()["models"]]
    if states != ["READY"] * MODELS:
        raise RuntimeError(f"READY was said, but the models are {states}")
    return (daemon.ready_ns - daemon.started_ns) / 1e9


def _reading_s(daemon: Daemon) -> float:
    """To read what the daemon's processes have mapped, and its state and cache directories."""
    files = {path for process in daemon.processes() for path in _mapped(process)}
    for folder in ("state", "cache"):
        files |= {path for path in (daemon.root / folder).rglob("*") if path.is_file()}
    began = time.perf_counter()
    for path in files:
        with contextlib.suppress(OSError), path.open("rb", buffering=0) as file:
            while file.read(1 << 20):
                pass
    return time.perf_counter() - began


def _mapped(process: psutil.Process) -> set[Path]:
    with contextlib.suppress(psutil.NoSuchProcess):
        paths = {Path(m.path) for m in process.memory_maps() if m.path.startswith("/")}
        return {path for path in paths if path.is_file()}
    return set()


def _weights_bytes(sizes: Sequence[int]) -> int:
    return sum(4 * (rows * columns + columns) for rows, columns in itertools.pairwise(sizes))


def _cpu_s(processes: list[psutil.Process]) -> dict[int, float]:
    seconds = {}
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            seconds[process.pid] = times.user + times.system
    return seconds


def _role(process: psutil.Process, supervisor: int) -> str:
    if process.pid == supervisor:
        return "supervisor"
    return Path(process.name()).name


if __name__ == "__main__":
    run_alone(measure)
