"""Other servers beside edged: the same ONNX files, the same client processes, in turns.

    python -m bench.peers [--quick]
    python -m bench.peers --setup [NAME ...]      # makes an environment for each, from PyPI

What cannot be installed or does not serve here is told with the reason; see bench/environments.py.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from math import nan

from bench.crowd import Crowd
from bench.environments import PEERS, Peer, PeerFailed, served, setup
from bench.harness import Daemon
from bench.load import Effort, interleaved, median, percentile, turns
from bench.overhead import CLIENTS, IMAGE
from bench.report import (
    Claim,
    Progress,
    Section,
    at_least,
    at_most,
    micros,
    not_measured,
    run_alone,
    table,
)
from bench.targets import Target, opened
from tests import zoo

COMMAND = "make bench-peers"
PACED_HZ = 1000.0
TINY = (1, 64)

ZEROMQ, FAST_LANE = "edged over ZeroMQ", "edged over the fast lane"
ALONE = "no server: ONNX Runtime in process"
APP, BARE = "from array to array", "made beforehand"
"""The clients: what an app in Python has, and as little as can be, to see the server."""

GOALS: dict[str, tuple[float, float | None, float]] = {
    ZEROMQ: (0.85, None, 2.1),
    FAST_LANE: (0.25, 0.65, 3.0),
}
"""Over FastAPI's: round trip in a closed loop, paced, and requests/s of several clients."""

YARDSTICK = "FastAPI"


def measure(progress: Progress, effort: Effort) -> Section:
    """All that are set up, beside edged: a tiny model, one with a large input, and ShuffleNet."""
    with ExitStack() as stack:
        daemon = Daemon(ready_timeout_s=120)
        stack.callback(daemon.close)
        daemon.put("tiny", zoo.mlp(seed=1))
        daemon.put("large", zoo.image_mean())
        daemon.put("shufflenet", zoo.real("shufflenet").read_bytes())
        daemon.start()
        missing: dict[str, str] = {}
        addresses: dict[str, tuple[Peer, str]] = {}
        yardstick, *others = PEERS
        for way in yardstick.ways:
            title = f"{yardstick.title}, {way}"
            try:
                progress(f"peers: starting {title}")
                addresses[title] = (
                    yardstick,
                    stack.enter_context(served(yardstick, way, daemon.models, daemon.root)),
                )
            except PeerFailed as e:
                missing[title] = str(e)
        tables, claims = _compare(stack, daemon, addresses, progress, effort)
        rows = []
        for peer in others if effort.everything else ():
            try:
                rows += _beside(
                    daemon, addresses, peer, progress, replace(effort, slots=max(1, effort.slots // 3))
                )
            except (PeerFailed, RuntimeError, OSError) as e:
                missing[peer.title] = str(e)
    head = (
        "the others, from array to array",
        "1 client, p50 µs",
        "× FastAPI",
        f"{CLIENTS} clients, requests/s",
    )
    head += ("× FastAPI", "602 KB, p50 µs", "× FastAPI")
    if rows:
        tables += f"\n\n{table(head, rows)}"
    told = "".join(f"- {title}: {why}\n" for title, why in missing.items())
    text = f"""
The same ONNX files behind each, on ONNX Runtime with its defaults (edged's settings are its own, pinned to
ONNX Runtime in FP32), in {effort.slots} slots of {effort.slot_s:g} s each in turns. Two clients ask each of
them. One is what an app in Python has, with an array that it sends and an array that it gets: `edged.Client`,
and Python's own HTTP client over one connection that is kept. The other has its message made beforehand and
looks at nothing in the answer: a bare DEALER or packet socket, and a bare stream socket. Goals are held by
the first kind; that Python's HTTP client sends head and body apart is part of it. Triton with its ONNX
Runtime backend, measured once beside such a FastAPI, stood at 0.89 × its round trip and 2.05 × its requests/s
with 4 clients on a tiny model.

{tables}

{"Not measured:" if told else "All that were tried are in the tables."}

{told}"""
    return Section("Beside other servers", COMMAND, text, claims)


def _compare(
    stack: ExitStack,
    daemon: Daemon,
    addresses: dict[str, tuple[Peer, str]],
    progress: Progress,
    effort: Effort,
) -> tuple[str, list[Claim]]:
    measured: dict[str, Figures] = {}
    for kind in (APP, BARE):
        progress(f"peers: tiny model, {kind}")
        targets = _asked(daemon, addresses, "tiny", TINY, bare=kind == BARE)
        asks = {name: stack.enter_context(opened(target)) for name, target in targets.items()}
        measured[kind] = Figures(
            interleaved(asks, effort), interleaved(asks, effort, PACED_HZ), _crowds(targets, effort)
        )
    tables = [_tiny_table(measured)]
    for model, title in (("large", "602 KB input, next to no work"), ("shufflenet", "ShuffleNet")):
        progress(f"peers: {model}")
        targets = _asked(daemon, addresses, model, IMAGE)
        file = str(daemon.models / f"{model}.onnx")
        feed = targets[ZEROMQ].input_name
        targets[ALONE] = Target("defaults", model=file, shape=IMAGE, input_name=feed)
        with ExitStack() as own:
            times = interleaved({name: own.enter_context(opened(t)) for name, t in targets.items()}, effort)
        base_s = median(times[ALONE])
        rows = []
        for name, each in times.items():
            over_ms = (median(each) - base_s) * 1e3
            rows.append((name, micros(median(each)), micros(percentile(each, 0.99)), f"{over_ms:.2f}"))
        tables.append(table((title, "1 client, p50 µs", "p99 µs", "ms over in process"), rows))
    return "\n\n".join(tables), _claims(measured)


def _asked(
    daemon: Daemon,
    addresses: dict[str, tuple[Peer, str]],
    model: str,
    shape: tuple[int, ...],
    *,
    bare: bool = False,
) -> dict[str, Target]:
    """Everybody by an app's client, from array to array, or with a message made beforehand."""
    served = Target("frames" if bare else "zeromq", daemon.endpoint, model, shape=shape)
    with daemon.client() as client:
        served = replace(served, input_name=client.model_metadata(model)["inputs"][0]["name"])
    targets = {ZEROMQ: served, FAST_LANE: replace(served, way="packets" if bare else "client")}
    for title, (peer, address) in addresses.items():
        way = "http" if bare else "post"
        targets[title] = Target(way, address, model, shape=shape, path=peer.path, body=peer.body)
    return targets


def _beside(
    daemon: Daemon,
    addresses: dict[str, tuple[Peer, str]],
    peer: Peer,
    progress: Progress,
    effort: Effort,
) -> list[tuple[object, ...]]:
    """One of the others, alone with the yardstick: some take much of the machine while they only wait."""
    progress(f"peers: {peer.title}")
    with ExitStack() as stack:
        both = {
            **addresses,
            peer.title: (peer, stack.enter_context(served(peer, peer.ways[0], daemon.models, daemon.root))),
        }
        figures = []
        for model, shape in (("tiny", TINY), ("large", IMAGE)):
            targets = _asked(daemon, both, model, shape)
            times = interleaved(
                {name: stack.enter_context(opened(target)) for name, target in targets.items()}, effort
            )
            many_hz = _crowds(targets, effort) if model == "tiny" else {}
            figures.append(Figures(times, times, many_hz))
    tiny, large = figures
    closed, _, many = tiny.over(peer.title)
    return [
        (
            peer.title,
            micros(median(tiny.closed_s[peer.title])),
            f"{closed:.2f}",
            f"{tiny.many_hz[peer.title]:,.0f}",
            f"{many:.2f}",
            micros(median(large.closed_s[peer.title])),
            f"{large.over(peer.title)[0]:.2f}",
        )
    ]


@dataclass(frozen=True)
class Figures:
    """Of the tiny model, by who was asked."""

    closed_s: dict[str, list[float]]
    paced_s: dict[str, list[float]]
    many_hz: dict[str, float]

    def over(self, name: str) -> tuple[float, float, float]:
        """A server's figures over the yardstick's, by the way to it that is the better one in each figure."""
        others = [other for other in self.closed_s if other.startswith(YARDSTICK)]
        if not others:
            return (nan, nan, nan)
        many = self.many_hz[name] / max(self.many_hz[other] for other in others) if self.many_hz else nan
        return (
            median(self.closed_s[name]) / min(median(self.closed_s[other]) for other in others),
            median(self.paced_s[name]) / min(median(self.paced_s[other]) for other in others),
            many,
        )


def _tiny_table(measured: dict[str, Figures]) -> str:
    rows = [
        (
            name,
            kind,
            micros(median(figures.closed_s[name])),
            micros(percentile(figures.closed_s[name], 0.99)),
            micros(median(figures.paced_s[name])),
            f"{figures.many_hz[name]:,.0f}",
        )
        for kind, figures in measured.items()
        for name in figures.closed_s
    ]
    paced = f"{PACED_HZ:g} Hz, p50 µs"
    many = f"{CLIENTS} clients, requests/s"
    return table(("tiny model", "client", "1 client, p50 µs", "p99 µs", paced, many), rows)


def _crowds(targets: dict[str, Target], effort: Effort) -> dict[str, float]:
    with ExitStack() as stack:
        crowds = {name: stack.enter_context(Crowd([target] * CLIENTS)) for name, target in targets.items()}
        slots = turns({name: partial(crowd.closed, effort.slot_s) for name, crowd in crowds.items()}, effort)
    return {name: median([slot.requests_hz for slot in each]) for name, each in slots.items()}


def _claims(measured: dict[str, Figures]) -> list[Claim]:
    """Like with like: an app's client against an app's client. The other kind is told beside it."""
    figures, bare = measured[APP], measured[BARE]
    claims = []
    for name, (closed_goal, paced_goal, many_goal) in GOALS.items():
        closed_text = f"tiny model, one client in a closed loop, {name}: round trip over {YARDSTICK}'s"
        paced_text = f"the same, paced at {PACED_HZ:g} Hz"
        many_text = f"tiny model, {CLIENTS} clients, {name}: requests/s over {YARDSTICK}'s"
        if not any(other.startswith(YARDSTICK) for other in figures.closed_s):
            why = f"{YARDSTICK} is not set up or does not run: make bench-peers"
            claims.append(not_measured(closed_text, f"at most {closed_goal} ×", why))
            claims.append(not_measured(many_text, f"at least {many_goal} ×", why))
            continue
        closed, paced, many = figures.over(name)
        notes = [f"{factor:.2f} × with all messages made beforehand" for factor in bare.over(name)]
        claims.append(at_most(closed_text, closed, closed_goal, note=notes[0]))
        if paced_goal is not None:
            claims.append(at_most(paced_text, paced, paced_goal, note=notes[1]))
        claims.append(at_least(many_text, many, many_goal, note=notes[2]))
    return claims


if __name__ == "__main__":
    if "--setup" in sys.argv[1:]:
        setup([argument for argument in sys.argv[1:] if argument != "--setup"])
    else:
        run_alone(measure)
