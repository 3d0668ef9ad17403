"""MLPerf's LoadGen drives edged, and the bare runtime: its four scenarios, in its own words.

LoadGen decides when a query comes and how it is judged; a system under test only says when each sample is
done. Its runs are short here, far below what a submission asks for, so its verdict on a run's validity is not
used: the same short run of both in turns gives a ratio. See the MLPerf Inference rules for what the scenarios
mean.
"""

from __future__ import annotations

import queue
import re
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from bench.harness import Daemon
from bench.load import Effort, median, turns
from bench.report import Claim, Progress, Section, not_measured, run_alone, table
from bench.targets import Ask, Target, opened
from tests import zoo

COMMAND = "python -m bench.loadgen"
NETWORK = "resnet50"
SAMPLES = 16
"""Of the query sample library; the input is the same for all, and neither side remembers any."""
THREADS = 4
"""Samples of one query, or queries, that edged is asked at the same time."""
SERVER_LOAD = 0.7
"""Queries/s of the Server scenario over what the bare runtime does in Offline."""
OFFLINE_HZ = 25.0
"""About what this network does on two cores: so large is the one query of Offline."""
ROUNDS = 2

SCENARIOS = {
    "SingleStream": ("90.00 percentile latency (ns)", 1e-6, "ms, p90"),
    "MultiStream": ("99.00 percentile latency (ns)", 1e-6, "ms, p99 of 8 samples"),
    "Offline": ("Samples per second", 1.0, "samples/s"),
    "Server": ("99.00 percentile latency (ns)", 1e-6, "ms, p99"),
}
"""What LoadGen's summary calls each scenario's figure, in which unit it is shown, and what it is."""


def measure(progress: Progress, effort: Effort) -> Section:
    """Each scenario with both."""
    try:
        import mlperf_loadgen
    except ImportError:
        claim = not_measured("MLPerf LoadGen", "a ratio", "mlcommons-loadgen is not installed: edged[bench]")
        return Section("MLPerf LoadGen", COMMAND, "", (claim,))
    with ExitStack() as stack:
        daemon = Daemon(ready_timeout_s=120)
        stack.callback(daemon.close)
        file = daemon.put(NETWORK, zoo.real(NETWORK).read_bytes())
        daemon.start()
        with daemon.client() as client:
            feed = client.model_metadata(NETWORK)["inputs"][0]["name"]
        served = Target("client", daemon.endpoint, NETWORK, input_name=feed, shape=(1, 3, 224, 224))
        threads = int(daemon.status()["models"][0]["threads"])
        in_process = replace(served, way="settings", model=file, threads=threads)
        edged = _System(stack.enter_context(opened(served)), THREADS)
        bare = _System(stack.enter_context(opened(in_process)), 1)
        figures: dict[str, dict[str, float]] = {}
        for scenario in SCENARIOS:
            progress(f"loadgen: {scenario}")
            rate_hz = SERVER_LOAD * figures["Offline"]["bare"] if scenario == "Server" else 0.0
            runs = {
                name: partial(_run, mlperf_loadgen, system, scenario, effort.open_s / 2, rate_hz)
                for name, system in (("bare", bare), ("edged", edged))
            }
            each = turns(runs, replace(effort, slots=min(ROUNDS, effort.slots)))
            figures[scenario] = {name: median(values) for name, values in each.items()}
    rows, claims = [], []
    for scenario, (_, _, unit) in SCENARIOS.items():
        bare_figure, edged_figure = figures[scenario]["bare"], figures[scenario]["edged"]
        ratio = f"{edged_figure / bare_figure:.2f} ×"
        rows.append((scenario, unit, f"{bare_figure:.2f}", f"{edged_figure:.2f}", ratio))
        claims.append(Claim(f"{scenario}, {unit}, edged over the bare runtime", "told", ratio, None))
    text = f"""
LoadGen {_version()} in the client's process, ResNet-50 with random weights, FP32, one sample a run. The bare
runtime is ONNX Runtime with the worker's settings in that same process, on one thread that asks it; edged is
asked by `Client` from {THREADS} threads. {ROUNDS} runs of {effort.open_s / 2:g} s each in turns after one to
warm up. Server comes at {SERVER_LOAD:.0%} of what the bare runtime does in Offline.

{table(("scenario", "figure", "bare", "edged", "edged over bare"), rows)}
"""
    return Section("MLPerf LoadGen", COMMAND, text, claims)


@dataclass(frozen=True)
class _System:
    """A system under test: how it is asked, and by how many at the same time."""

    ask: Ask
    threads: int


def _run(lg: Any, system: _System, scenario: str, seconds: float, rate_hz: float) -> float:
    """One run of LoadGen; the scenario's figure from its summary."""
    settings = lg.TestSettings()
    settings.scenario = getattr(lg.TestScenario, scenario)
    settings.mode = lg.TestMode.PerformanceOnly
    settings.min_duration_ms = settings.max_duration_ms = round(seconds * 1000)
    settings.min_query_count = 1
    settings.multi_stream_samples_per_query = 8
    settings.server_target_qps = max(1.0, rate_hz)
    settings.offline_expected_qps = OFFLINE_HZ
    with ExitStack() as stack:
        issue = stack.enter_context(_issuing(lg, system, inline=scenario == "SingleStream"))
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        log = lg.LogSettings()
        log.log_output = lg.LogOutputSettings()
        log.log_output.outdir = folder
        log.log_output.copy_summary_to_stdout = False
        sut = lg.ConstructSUT(issue, lambda: None)
        library = lg.ConstructQSL(SAMPLES, SAMPLES, lambda _: None, lambda _: None)
        try:
            lg.StartTestWithLogSettings(sut, library, settings, log)
        finally:
            lg.DestroyQSL(library)
            lg.DestroySUT(sut)
        return figure_of((Path(folder) / "mlperf_log_summary.txt").read_text(), scenario)


def figure_of(summary: str, scenario: str) -> float:
    """What LoadGen's summary says that a scenario came to; raises RuntimeError when it does not say."""
    label, scale, _ = SCENARIOS[scenario]
    found = re.search(rf"^{re.escape(label)}\s*: *([0-9.e+]+)", summary, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"LoadGen's summary has no {label!r}:\n{summary}")
    return float(found[1]) * scale


@contextmanager
def _issuing(lg: Any, system: _System, *, inline: bool) -> Iterator[Callable[[Sequence[Any]], None]]:
    """How queries are issued: asked by whoever issues, or handed to threads that end with the block."""
    waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def ask(sample: Any) -> None:
        system.ask()
        lg.QuerySamplesComplete([lg.QuerySampleResponse(sample.id, 0, 0)])

    def work() -> None:
        while (sample := waiting.get()) is not None:
            ask(sample)

    def issue(samples: Sequence[Any]) -> None:
        for sample in samples:
            if inline:
                ask(sample)
            else:
                waiting.put(sample)

    threads = [] if inline else [threading.Thread(target=work) for _ in range(system.threads)]
    for thread in threads:
        thread.start()
    try:
        yield issue
    finally:
        for _ in threads:
            waiting.put(None)
        for thread in threads:
            thread.join()


def _version() -> str:
    from importlib.metadata import version

    return version("mlcommons-loadgen")


if __name__ == "__main__":
    run_alone(measure)
