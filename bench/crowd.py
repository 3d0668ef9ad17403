"""Client processes that work at the same time: started once, then given one slot after the other.

Several clients are several processes, since threads would share one interpreter and the figure would be
Python's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from bench.harness import ROOT
from bench.pipeline import Outcome
from bench.targets import Target

__all__ = ["Crowd", "Slot"]

_HEAD_START_S = 0.02
"""Between the order and the first request: all have read their order by then."""


@dataclass(frozen=True)
class Slot:
    """What a crowd did together in one slot."""

    requests_hz: float
    latencies_s: tuple[float, ...]
    cpu_s: float
    """That the client processes took themselves."""


class Crowd:
    """`with Crowd([target] * 4) as crowd:` are four apps; a context manager that ends them."""

    def __init__(self, targets: Sequence[Target]) -> None:
        self._targets = targets
        self._processes: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Crowd:
        try:
            for target in self._targets:
                self._processes.append(_spawn(target))
            for process in self._processes:
                line = _line(process)
                if line != "ready":
                    raise RuntimeError(f"a client process said {line!r}")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends them all."""
        for process in self._processes:
            process.kill()
            process.communicate()
        self._processes = []

    def closed(self, seconds: float) -> Slot:
        """Each asks again as soon as its answer is there."""
        return _together(self._order({"do": "closed", "seconds": seconds}))

    def paced(self, seconds: float, rate_hz: float) -> Slot:
        """Each asks at its ticks."""
        return _together(self._order({"do": "paced", "seconds": seconds, "rate_hz": rate_hz}))

    def saturate(self, in_flight: int, seconds: float) -> Slot:
        """Each keeps so many requests out."""
        return _together(self._order({"do": "saturate", "in_flight": in_flight, "seconds": seconds}))

    def open_loop(self, rate_hz: float, seconds: float, *, deadline_s: float | None, seed: int) -> Outcome:
        """A Poisson process of `rate_hz`, each client having its share of it and a seed of its own."""
        order = {"do": "open", "rate_hz": rate_hz / len(self._processes), "seconds": seconds}
        return Outcome.merged(self._order({**order, "deadline_s": deadline_s}, seed))

    def begin_open_loop(self, rate_hz: float, seconds: float, *, deadline_s: float | None, seed: int) -> None:
        """The same for one that works while others are measured; `end_open_loop` waits for its end."""
        order = {"do": "open", "rate_hz": rate_hz / len(self._processes), "seconds": seconds}
        self._begin({**order, "deadline_s": deadline_s}, seed)

    def end_open_loop(self) -> Outcome:
        """What became of the requests of `begin_open_loop`."""
        return Outcome.merged(self._end())

    def begin_saturate(self, in_flight: int, seconds: float) -> None:
        """Each keeps so many requests out while others are measured; `end_saturate` waits for its end."""
        self._begin({"do": "saturate", "in_flight": in_flight, "seconds": seconds}, 0)

    def end_saturate(self) -> Slot:
        """What was answered since `begin_saturate`."""
        return _together(self._end())

    def _order(self, order: dict[str, Any], seed: int = 0) -> list[dict[str, Any]]:
        self._begin(order, seed)
        return self._end()

    def _begin(self, order: dict[str, Any], seed: int) -> None:
        begin_ns = time.monotonic_ns() + round(_HEAD_START_S * 1e9)
        for number, process in enumerate(self._processes):
            assert process.stdin is not None
            line = json.dumps({**order, "begin_ns": begin_ns, "seed": 1000 * seed + number})
            process.stdin.write(line + "\n")
            process.stdin.flush()

    def _end(self) -> list[dict[str, Any]]:
        return [json.loads(_line(process)) for process in self._processes]


def _spawn(target: Target) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.agent"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdin is not None
    process.stdin.write(target.to_json() + "\n")
    process.stdin.flush()
    return process


def _line(process: subprocess.Popen[str]) -> str:
    """Its next line. No client waits for ever: whatever it waits for has a timeout, and then it ends."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"a client process ended with {process.wait()}; its words are on stderr")
    return line.rstrip("\n")


def _together(answers: Sequence[dict[str, Any]]) -> Slot:
    return Slot(
        sum(answer["count"] / answer["seconds"] for answer in answers),
        tuple(t / 1e6 for answer in answers for t in answer.get("latencies_us", ())),
        sum(answer["cpu_s"] for answer in answers),
    )
