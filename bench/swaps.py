"""Two hundred new versions of a model under constant load: nothing fails, nothing mixes, nothing leaks.

The model answers with its own version's number in every element, so an answer put together from two
versions, or one that says another version than it came from, shows.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.harness import Daemon, memory_bytes, open_descriptors
from bench.load import Effort, percentile
from bench.report import Claim, Progress, Section, run_alone, table
from edged.errors import EdgedError
from tests import zoo

COMMAND = "python -m bench.swaps"
WARM_SWAPS = 10
CLIENTS = 4
SWAP_TIMEOUT_S = 30.0
SETTLE = "50ms"
MEMORY_GROWTH_MAX = 0.10
QUIET_TIMEOUT_S = 60.0


class Load:
    """Clients that ask one request after the other, and check every answer."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._stop = threading.Event()
        self._changed = threading.Condition()
        self.answers = 0
        self.newest = 0
        self.failed: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._number_of: dict[str, int] = {}
        self._threads = [threading.Thread(target=self._run, args=(seed,)) for seed in range(CLIENTS)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def wait_number(self, number: int) -> bool:
        """Waits for an answer of version `number`."""
        with self._changed:
            return self._changed.wait_for(lambda: self.newest >= number, SWAP_TIMEOUT_S)

    def _run(self, seed: int) -> None:
        x = np.random.default_rng(seed).integers(-8, 8, (2, 4)).astype(np.float32)
        row_sums = x.sum(axis=1)
        with self._daemon.client() as client:
            while not self._stop.is_set():
                try:
                    result = client.infer("m", {"x": x})
                except EdgedError as error:
                    with self._changed:
                        self.failed[f"{error.code.value}/{error.reason}"] += 1
                    continue
                except Exception as error:  # noqa: BLE001 - counted: whatever it is, it is a failed request
                    with self._changed:
                        self.failed[repr(error)[:100]] += 1
                    continue
                self._check(result, row_sums)

    def _check(self, result: Any, row_sums: np.ndarray) -> None:
        numbers = np.unique(result["version"])
        number = int(numbers[0])
        with self._changed:
            self.answers += 1
            if len(numbers) != 1 or not np.array_equal(result["sum"].ravel(), row_sums + number):
                self.wrong.append(f"mixed: {numbers[:4]}")
            elif self._number_of.setdefault(str(result.model_version), number) != number:
                self.wrong.append(f"version {result.model_version} answered {number}")
            if number > self.newest:
                self.newest = number
                self._changed.notify_all()


def measure(progress: Progress, effort: Effort) -> Section:
    """Swaps while four clients ask, and counts."""
    daemon = Daemon(settings={"EDGED_LOADING_SETTLE": SETTLE})
    zoo.write(daemon.models / "m.onnx", zoo.versioned(1))
    # Pinned: each version would be measured against the other runtimes, which is not what is watched here.
    (daemon.models / "m.toml").write_text('runtime = "onnxruntime"\ndevice = "cpu"\n')
    swaps = WARM_SWAPS + effort.swaps
    look_after = (WARM_SWAPS, WARM_SWAPS + effort.swaps // 2, swaps)
    times_s: list[float] = []
    looks: list[Look] = []
    stuck = 0
    try:
        daemon.start()
        with Load(daemon) as load:
            for swap in range(1, swaps + 1):
                began = time.monotonic()
                zoo.write(daemon.models / "m.onnx", zoo.versioned(swap + 1))
                stuck += not load.wait_number(swap + 1)
                times_s.append(time.monotonic() - began)
                if swap in look_after:
                    looks.append(_look(daemon, looks))
                if swap % 20 == 0:
                    progress(f"swaps: {swap} of {swaps}, {load.answers} answers")
    finally:
        daemon.close()
    return _section(load, times_s, stuck, dict(zip(look_after, looks, strict=True)))


@dataclass(frozen=True)
class Look:
    """The daemon and everything below it at one moment, still under load."""

    processes: int
    descriptors: int
    supervisor_mib: float
    others_mib: float


def _look(daemon: Daemon, before: list[Look]) -> Look:
    """Waits until retired workers are gone, and looks."""
    deadline = time.monotonic() + QUIET_TIMEOUT_S
    while True:
        processes = daemon.processes()
        look = Look(
            len(processes),
            open_descriptors(processes),
            memory_bytes(processes[:1]) / 2**20,
            memory_bytes(processes[1:]) / 2**20,
        )
        calm = len(daemon.status()["workers"]) == 1
        if before:
            calm = (
                calm and look.descriptors <= before[0].descriptors and look.processes <= before[0].processes
            )
        if calm or time.monotonic() > deadline:
            return look
        time.sleep(0.2)


def _section(load: Load, times_s: list[float], stuck: int, looks: dict[int, Look]) -> Section:
    first, *_, last = looks.values()
    growth = (last.supervisor_mib + last.others_mib) / (first.supervisor_mib + first.others_mib) - 1
    p50_ms, longest_ms = percentile(times_s, 0.5) * 1000, max(times_s) * 1000
    figures = table(
        ("the daemon and its workers", *(f"after {swaps} swaps" for swaps in looks)),
        [
            ("processes", *(look.processes for look in looks.values())),
            ("open descriptors", *(look.descriptors for look in looks.values())),
            ("supervisor's memory (PSS), MiB", *(f"{look.supervisor_mib:.1f}" for look in looks.values())),
            ("all others' memory (PSS), MiB", *(f"{look.others_mib:.1f}" for look in looks.values())),
        ],
    )
    text = f"""
A new version dropped into the folder {len(times_s)} times, each as soon as the one before has answered, while
{CLIENTS} clients ask without a pause: {load.answers:,} answers, each checked in every element. From the
file's rename to the first answer of the new version: p50 {p50_ms:.0f} ms, longest {longest_ms:.0f} ms,
of which {SETTLE} are the settle time.

{figures}
"""
    return Section(
        "Swaps under load",
        COMMAND,
        text,
        (
            Claim(
                f"versions that came to serve, of {len(times_s)}",
                "all",
                str(len(times_s) - stuck),
                not stuck,
            ),
            Claim("failed requests", "0", _counted(load.failed.total(), dict(load.failed)), not load.failed),
            Claim("wrong answers", "0", _counted(len(load.wrong), load.wrong[:3]), not load.wrong),
            Claim(
                "growth of open descriptors",
                "none",
                f"{last.descriptors - first.descriptors:+d}",
                last.descriptors <= first.descriptors,
            ),
            Claim(
                "growth of memory",
                f"at most {MEMORY_GROWTH_MAX:.0%}",
                f"{growth:+.1%}",
                growth <= MEMORY_GROWTH_MAX,
            ),
        ),
    )


def _counted(number: int, examples: object) -> str:
    return f"{number} {examples}" if number else "0"


if __name__ == "__main__":
    run_alone(measure)
