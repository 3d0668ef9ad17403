"""What happens when more is asked than there is, and who is hurt by it.

Open loops: requests come when they come, each with a deadline, and its time runs from the intended send. The
driver shares the machine, so the model runs on one thread and leaves the other core to everybody else.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

from hdrh.histogram import HdrHistogram

from bench import overhead
from bench.crowd import Crowd
from bench.harness import PINNED, Daemon
from bench.load import Ask, Effort, closed, median, percentile, turns
from bench.pipeline import AT_ONCE_S, Outcome
from bench.report import Claim, Progress, Section, at_least, at_most, micros, run_alone, table
from bench.targets import Target, opened
from tests import zoo

COMMAND = "python -m bench.overload"
DRIVERS = 2
IN_FLIGHT = 16
"""Of each driver, to find the capacity: never an empty queue, and far from its bound."""
DEADLINE_RUNS = 20.0
"""A request's deadline in lengths of a run: a queue of some depth is useful, an endless one is not."""
TWICE, MOST = 2.0, 0.8
ROUNDS = 3
FLOOD_IN_FLIGHT = 200
"""As many as one client may have out, nearly."""
FILL_S = 0.2
"""In which those who fill the queue have surely filled it."""

GOODPUT_GOAL, REFUSE_GOAL_MS, MET_GOAL, BESIDE_GOAL = 0.9, 5.0, 0.999, 1.1

SHAPE = (1, 3, 96, 96)


def measure(progress: Progress, effort: Effort) -> Section:
    """The capacity; twice of it and four fifths of it offered; and one client beside one that floods."""
    with ExitStack() as stack:
        daemon = Daemon()
        stack.callback(daemon.close)
        daemon.put("net", zoo.conv_net(seed=9), PINNED + "threads = 1\n")
        daemon.start()
        net = Target("client", daemon.endpoint, "net", shape=SHAPE)
        drivers = stack.enter_context(Crowd([net] * DRIVERS))
        quiet = stack.enter_context(opened(net))
        progress("overload: capacity")
        loaded = _loaded(daemon, drivers, progress, effort)
        beside = _beside(stack, net, quiet, progress, effort)
    rows, claims, codes = loaded
    beside_rows, beside_claims, run_ms = beside
    loads = ("offered", "sent", "in time", "late", "refused", "goodput/s", "× peak", "p50 ms", "p99 ms")
    loads += ("refusal p99 ms", "behind ms", "ran in vain")
    text = f"""
A CNN of about {run_ms:.1f} ms on one thread. Capacity is what {DRIVERS} clients with {IN_FLIGHT} requests out
each get answered. Then requests come as a Poisson process, seeded, each with a deadline of {DEADLINE_RUNS:g}
runs' length from its intended send; goodput is what is answered within it. "Behind" is by how much the driver
itself sent too late (p99). "Ran in vain" counts runs whose result nobody could use any more, by the daemon's
statistics.

{table(loads, rows)}

How the others were refused at twice the capacity: {codes}.

One client that asks one request after the other, alone and while another keeps {FLOOD_IN_FLIGHT} requests out
all the time:

{table(("who asks", "beside", "p50 µs", "p99 µs", "over alone, p99 µs"), beside_rows)}
"""
    return Section("Overload, fairness and priorities", COMMAND, text, [*claims, *beside_claims])


@dataclass(frozen=True)
class Loaded:
    """What became of one load in all its rounds."""

    total: Outcome
    goodput_hz: float
    over_peak: float
    in_vain: int


def _loaded(
    daemon: Daemon, drivers: Crowd, progress: Progress, effort: Effort
) -> tuple[list[tuple[object, ...]], list[Claim], str]:
    rounds = min(ROUNDS, effort.slots)
    twice = _rounds(daemon, drivers, "twice the capacity", TWICE, rounds, progress, effort)
    most = _rounds(daemon, drivers, "80 % of the capacity", MOST, rounds, progress, effort)
    admitted = most.total.sent - most.total.at_once
    claims = [
        at_least("twice the capacity offered, goodput over the peak", twice.over_peak, GOODPUT_GOAL),
        at_most("the same, time to refuse, p99", _quantile_ms(twice.total.refusal, 99), REFUSE_GOAL_MS, "ms"),
        Claim(
            "the same, expired requests that ran (counting those whose time was over when they ended)",
            "0",
            str(twice.in_vain),
            twice.in_vain == 0,
        ),
        at_least(
            "80 % of the capacity offered, admitted requests that meet their deadline",
            most.total.in_time / max(1, admitted),
            MET_GOAL,
            "of all",
            note=f"{most.total.in_time} of {admitted}; {most.total.at_once} more were refused at once",
        ),
    ]
    rows = [("twice the capacity", *_row(twice)), ("80 % of the capacity", *_row(most))]
    codes = ", ".join(f"{count} × `{code}`" for code, count in twice.total.codes.most_common())
    codes += f"; {twice.total.at_once} of them within {AT_ONCE_S * 1e3:g} ms"
    return rows, claims, codes


def _rounds(
    daemon: Daemon,
    drivers: Crowd,
    name: str,
    factor: float,
    rounds: int,
    progress: Progress,
    effort: Effort,
) -> Loaded:
    """The peak, the load, the peak again, several times: a load is held against the peaks beside it."""
    outcomes, over_peak, before = [], [], _in_vain(daemon)
    peak_hz = _peak_hz(drivers, effort)
    for number in range(rounds):
        progress(f"overload: {name}, {factor * peak_hz:.0f} requests/s")
        outcome = drivers.open_loop(
            factor * peak_hz, effort.open_s / 2, deadline_s=DEADLINE_RUNS / peak_hz, seed=number
        )
        after_hz = _peak_hz(drivers, effort)
        outcomes.append(outcome)
        over_peak.append(outcome.goodput_hz / ((peak_hz + after_hz) / 2))
        peak_hz = after_hz
    total = Outcome.merged([outcome.to_wire() for outcome in outcomes])
    goodput_hz = median([outcome.goodput_hz for outcome in outcomes])
    return Loaded(total, goodput_hz, median(over_peak), _in_vain(daemon) - before)


def _peak_hz(drivers: Crowd, effort: Effort) -> float:
    time.sleep(effort.pause_s)
    return drivers.saturate(IN_FLIGHT, max(effort.slot_s, effort.open_s / 6)).requests_hz


def _in_vain(daemon: Daemon) -> int:
    """Rows that ran so far and were answered to nobody: their time was over when they began, or ended."""
    with daemon.client() as client:
        stats = client.statistics("net")[0]
    ran = sum(part["batch_size"] * part["compute_infer"]["count"] for part in stats["batch_stats"])
    return int(ran - stats["inference_count"])


def _quantile_ms(histogram: HdrHistogram, share: float) -> float:
    return float(histogram.get_value_at_percentile(share)) / 1e3


def _row(loaded: Loaded) -> tuple[object, ...]:
    outcome = loaded.total
    return (
        outcome.sent,
        outcome.in_time,
        outcome.late + outcome.unanswered,
        outcome.refused,
        f"{loaded.goodput_hz:.0f}",
        f"{loaded.over_peak:.2f}",
        f"{_quantile_ms(outcome.latency, 50):.1f}",
        f"{_quantile_ms(outcome.latency, 99):.1f}",
        f"{_quantile_ms(outcome.refusal, 99):.1f}",
        f"{outcome.behind_us / 1e3:.1f}",
        loaded.in_vain,
    )


def _beside(
    stack: ExitStack, net: Target, quiet: Ask, progress: Progress, effort: Effort
) -> tuple[list[tuple[object, ...]], list[Claim], float]:
    flood = stack.enter_context(Crowd([net]))
    background = stack.enter_context(Crowd([net] * DRIVERS))
    urgent = stack.enter_context(opened(replace(net, priority=1)))
    per_driver = FLOOD_IN_FLIGHT // DRIVERS
    seconds = max(effort.slot_s, effort.open_s / 4)
    variants = {
        "one client|nobody": partial(closed, quiet, seconds),
        "one client|one that floods": partial(_while, flood, FLOOD_IN_FLIGHT, quiet, seconds),
        "one of priority 1|nobody": partial(closed, urgent, seconds),
        f"one of priority 1|{DRIVERS} with {per_driver} out each": partial(
            _while, background, per_driver, urgent, seconds
        ),
    }
    progress("overload: one client beside others")
    slots = turns(variants, replace(effort, slots=max(1, effort.slots // 3)))
    times = {name: [seconds for slot in each for seconds in slot] for name, each in slots.items()}
    p99_s = {name: percentile(samples, 0.99) for name, samples in times.items()}
    run_s = overhead.compute_s(net)
    alone_s, flooded_s, urgent_alone_s, urgent_s = p99_s.values()
    rows: list[tuple[object, ...]] = []
    for name, samples in times.items():
        who, _, beside = name.partition("|")
        alone = alone_s if who == "one client" else urgent_alone_s
        over = "" if beside == "nobody" else f"{(p99_s[name] - alone) * 1e6:+,.0f}"
        rows.append((who, beside, micros(median(samples)), micros(p99_s[name]), over))
    return (
        rows,
        [
            at_most(
                "beside one that floods, another client's p99 beyond what it is alone",
                (flooded_s - alone_s) / run_s,
                1.0,
                "runs",
            ),
            at_most(
                "priority 1 under a full background load, p99 over (alone + one run)",
                urgent_s / (urgent_alone_s + run_s),
                BESIDE_GOAL,
            ),
        ],
        run_s * 1e3,
    )


def _while(others: Crowd, in_flight: int, ask: Ask, seconds: float) -> list[float]:
    """Round trips while others keep the daemon full, from before the first to after the last."""
    others.begin_saturate(in_flight, seconds + 2 * FILL_S)
    time.sleep(FILL_S)
    try:
        return closed(ask, seconds)
    finally:
        others.end_saturate()


if __name__ == "__main__":
    run_alone(measure)
