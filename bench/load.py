"""How load is made and told: closed, paced and open loops, and slots that take turns.

Owns no process and no socket: something to `Ask` comes in, seconds go out. Three loops, since they answer
three questions. Closed: the next request goes out when the answer is there; what does one request cost?
Paced: one at each tick, as a camera or a control loop asks; what does it cost one who sleeps in between?
Open: requests come when they come, as from many apps, and each one's time runs from the moment at which it
was meant to be sent, so that a stall is felt by all who would have come in it.

What is compared takes turns in short slots, so that whatever else the machine does meets all alike; between
two slots there is a pause, since a runtime's threads spin on for a while and would slow whoever comes next.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

__all__ = [
    "FULL",
    "QUICK",
    "Ask",
    "Effort",
    "closed",
    "interleaved",
    "median",
    "paced",
    "percentile",
    "poisson_s",
    "turns",
]

PACED_SLOT_RUNS_MIN = 10
"""A slot at 50 Hz lasts 200 ms at least, whatever the effort."""

Ask = Callable[[], object]
"""One request and its answer."""

_T = TypeVar("_T")


@dataclass(frozen=True)
class Effort:
    """How much is measured: so many slots of so many seconds for each of what is compared."""

    slots: int
    slot_s: float
    open_s: float
    """Of one open-loop run, which a slot is too short for."""
    swaps: int
    """New versions of a model under load."""
    everything: bool = True
    """Else one network of each kind, and one other server, instead of all."""
    pause_s: float = 0.1
    """Between two slots: ONNX Runtime's threads spin for milliseconds after a run; this is well beyond."""


FULL = Effort(slots=12, slot_s=0.4, open_s=6.0, swaps=190)
"""What the published figures are made of."""

QUICK = Effort(slots=2, slot_s=0.1, open_s=0.5, swaps=4, pause_s=0.02, everything=False)
"""To see that everything works; its figures are worth little."""


def percentile(samples: Sequence[float], share: float) -> float:
    """The sample below which `share` of all lie: 0.5 is the median, no interpolation."""
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def median(samples: Sequence[float]) -> float:
    """The middle one."""
    return percentile(samples, 0.5)


def poisson_s(rate_hz: float, seconds: float, seed: int) -> list[float]:
    """When requests of a Poisson process are meant to be sent, in seconds from the start."""
    rng = random.Random(seed)
    times: list[float] = []
    at = rng.expovariate(rate_hz)
    while at < seconds:
        times.append(at)
        at += rng.expovariate(rate_hz)
    return times


def closed(ask: Ask, seconds: float) -> list[float]:
    """Asks again as soon as the answer is there, for so long and at least twice; each round trip in seconds.

    The first one finds caches cold and threads asleep, and is left out.
    """
    ask()
    times: list[float] = []
    clock = time.perf_counter
    end = clock() + seconds
    while True:
        began = clock()
        ask()
        now = clock()
        times.append(now - began)
        if now >= end:
            return times


def paced(ask: Ask, seconds: float, rate_hz: float) -> list[float]:
    """Asks at each tick, or as soon as it can when one was missed; each round trip in seconds."""
    times: list[float] = []
    clock = time.perf_counter
    start = clock()
    for tick in range(max(2, int(seconds * rate_hz))):
        delay = start + tick / rate_hz - clock()
        if delay > 0:
            time.sleep(delay)
        began = clock()
        ask()
        times.append(clock() - began)
    return times[1:]


def turns(variants: Mapping[str, Callable[[], _T]], effort: Effort) -> dict[str, list[_T]]:
    """Gives each variant its slots, in turns: what each slot gave. The first one warms up and is left out."""
    given: dict[str, list[_T]] = {name: [] for name in variants}
    for turn in range(effort.slots + 1):
        for name, slot in variants.items():
            result = slot()
            if turn:
                given[name].append(result)
            time.sleep(effort.pause_s)
    return given


def interleaved(
    variants: Mapping[str, Ask], effort: Effort, rate_hz: float | None = None
) -> dict[str, list[float]]:
    """The round trips of each variant in seconds, closed or paced, slot by slot in turns."""

    def slot(ask: Ask) -> list[float]:
        if rate_hz is None:
            return closed(ask, effort.slot_s)
        return paced(ask, max(effort.slot_s, PACED_SLOT_RUNS_MIN / rate_hz), rate_hz)

    slots = turns({name: partial(slot, ask) for name, ask in variants.items()}, effort)
    return {name: [seconds for samples in slots[name] for seconds in samples] for name in variants}
