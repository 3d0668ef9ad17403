"""What the daemon costs while nobody asks: CPU, memory, and how soon it serves after its start."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import psutil

from bench.harness import ROOT, Daemon, memory_bytes
from bench.report import Claim, Progress, Section, percentile, run_alone, table
from tests import zoo

COMMAND = "python -m bench.idle"
WATCH_S = 20.0
STARTS = 5
CPU_PERCENT_MAX = 1.0
SUPERVISOR_MIB_MAX = 50.0
READY_S_MAX = 3.0
QUIET_TIMEOUT_S = 120.0


def measure(progress: Progress) -> Section:
    """Starts with three small models, several times; watches the last one while it idles."""
    starts_s = []
    for _ in range(STARTS - 1):
        with _three_models() as daemon:
            starts_s.append(_start_s(daemon))
        progress(f"idle: READY after {starts_s[-1]:.2f} s")
    with _three_models() as daemon:
        starts_s.append(_start_s(daemon))
        progress("idle: waiting until the daemon has measured its choices")
        _wait_quiet(daemon)
        progress(f"idle: watching for {WATCH_S:.0f} s")
        before = _cpu_s(daemon.processes())
        began = time.monotonic()
        time.sleep(WATCH_S)
        took_s = time.monotonic() - began
        processes = daemon.processes()
        after = _cpu_s(processes)
        rss_mib = processes[0].memory_info().rss / 2**20
        all_mib = memory_bytes(processes) / 2**20
        rows = [
            (
                _role(process, daemon.pid),
                f"{100 * (after[process.pid] - before.get(process.pid, 0)) / took_s:.2f} %",
                f"{process.memory_info().rss / 2**20:.0f}",
            )
            for process in processes
            if process.pid in after
        ]
    percent = 100 * sum(after[pid] - before.get(pid, 0) for pid in after) / took_s
    text = f"""
Three small models (the digit classifier, and networks of 64-32-10 and 64-128-10 units), an empty state
directory at each start. CPU time of the daemon and everything below it over {WATCH_S:.0f} s without a
request; memory of all processes together (PSS, shared pages once): {all_mib:.0f} MiB.

{table(("process", "CPU", "RSS MiB"), rows)}

From starting `edged` to READY, {STARTS} starts: {", ".join(f"{s:.2f}" for s in starts_s)} s.
"""
    ready_s = percentile(starts_s, 0.5)
    return Section(
        "Idle and start",
        COMMAND,
        text,
        (
            Claim(
                f"idle with three models, less than {CPU_PERCENT_MAX:g} % of one core",
                f"{percent:.2f} %",
                percent < CPU_PERCENT_MAX,
            ),
            Claim(
                f"supervisor's memory below {SUPERVISOR_MIB_MAX:g} MB RSS",
                f"{rss_mib * 2**20 / 1e6:.1f} MB",
                rss_mib * 2**20 / 1e6 < SUPERVISOR_MIB_MAX,
            ),
            Claim(
                f"from `edged` to READY in less than {READY_S_MAX:g} s",
                f"{ready_s:.2f} s (median)",
                ready_s < READY_S_MAX,
            ),
        ),
    )


def _three_models() -> Daemon:
    daemon = Daemon(ROOT / "models")
    zoo.write(daemon.models / "small.onnx", zoo.mlp(seed=1))
    zoo.write(daemon.models / "wide.onnx", zoo.mlp((64, 128, 10), seed=2))
    return daemon


def _start_s(daemon: Daemon) -> float:
    states = {m["name"]: m["state"] for m in daemon.status()["models"]}
    if set(states) != {"digits", "small", "wide"} or set(states.values()) != {"READY"}:
        raise RuntimeError(f"READY was said, but the models are {states}")
    return (daemon.ready_ns - daemon.started_ns) / 1e9


def _wait_quiet(daemon: Daemon) -> None:
    """Until the daemon has measured which runtime is the fastest for each model; bounded."""
    deadline = time.monotonic() + QUIET_TIMEOUT_S
    while time.monotonic() < deadline:
        if all(m["measured"] or m["choice"] in ("pinned", "remembered") for m in daemon.status()["models"]):
            return
        time.sleep(2)


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
