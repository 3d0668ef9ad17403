"""Other servers beside edged: the same ONNX files, the same client processes, in turns.

    python -m bench.peers [--quick]
    python -m bench.peers --setup [NAME ...]      # makes an environment for each, from PyPI

Each has an environment of its own below .venv-peers/. What cannot be installed or does not serve here is told
with the reason. Nothing leaves 127.0.0.1, and what the servers would tell their makers is switched off.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from bench.crowd import Crowd
from bench.harness import ROOT, Daemon
from bench.load import Effort, interleaved, median, percentile, turns
from bench.overhead import CLIENTS, IMAGE, has_fast_lane
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
ENVIRONMENTS = ROOT / ".venv-peers"
SERVERS = ROOT / "bench" / "peer_servers"
START_TIMEOUT_S = 90.0
INSTALL_TIMEOUT_S = 900.0
PACED_HZ = 1000.0

QUIET = {
    "ORT_DISABLE_TELEMETRY": "1",
    "BENTOML_DO_NOT_TRACK": "True",
    "RAY_USAGE_STATS_ENABLED": "0",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "LITSERVE_DISABLE_TELEMETRY": "1",
}
"""What keeps them from telling anybody anything."""

ZEROMQ, FAST_LANE = "edged over ZeroMQ", "edged over the fast lane"
ALONE = "no server: ONNX Runtime in process"
APP, BARE = "from array to array", "made beforehand"
"""The clients: what an app in Python has, and as little as can be, to see the server."""

GOALS = {ZEROMQ: (0.85, None, 2.1), FAST_LANE: (0.25, 0.65, 3.0)}
"""Over FastAPI's: round trip in a closed loop, paced, and requests/s of several clients."""


@dataclass(frozen=True)
class Peer:
    """One of the others; `ways` are the kinds of address that are tried, of which the best counts."""

    name: str
    title: str
    requirements: tuple[str, ...]
    ways: tuple[str, ...] = ("tcp",)
    path: str = "{model}"
    """Of the URL."""
    headers: tuple[str, ...] = ()

    @property
    def python(self) -> Path:
        """The interpreter of its environment."""
        return ENVIRONMENTS / self.name / "bin" / "python"

    @property
    def refusal(self) -> Path:
        """Where it stands why it could not be installed."""
        return ENVIRONMENTS / f"{self.name}.failed"


RUNTIME = ("onnxruntime", "numpy")
PEERS = (
    Peer(
        "fastapi",
        "FastAPI",
        ("fastapi", "uvicorn", "uvloop", "httptools", *RUNTIME),
        ("unix", "tcp"),
    ),
)
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
        for peer in PEERS:
            for way in peer.ways:
                title = peer.title + (f", {way}" if len(peer.ways) > 1 else "")
                try:
                    progress(f"peers: starting {title}")
                    addresses[title] = (peer, stack.enter_context(_served(peer, way, daemon)))
                except PeerFailed as e:
                    missing[title] = str(e)
        tables, claims = _compare(stack, daemon, addresses, progress, effort)
    told = "".join(f"- {title}: {why}\n" for title, why in missing.items())
    text = f"""
The same ONNX files behind each, on ONNX Runtime with its defaults (edged's settings are its own, pinned to
ONNX Runtime in FP32), in {effort.slots} slots of {effort.slot_s:g} s each in turns. Two clients ask each of
them. One is what an app in Python has, with an array that it sends and an array that it gets: `edged.Client`,
and Python's own HTTP client over one connection that is kept. The other has its message made beforehand and
looks at nothing in the answer: a bare DEALER, and a bare socket. Goals are held by the first kind. Triton
with its ONNX Runtime backend, measured once beside such a FastAPI, stood at 0.89 × its round trip and 2.05 ×
its requests/s with 4 clients on a tiny model.

{tables}

{"Not measured:" if told else "All that were tried are in the tables."}

{told}"""
    return Section("Beside other servers", COMMAND, text, claims)


class PeerFailed(Exception):
    """Why one of the others cannot be measured here."""


def _compare(
    stack: ExitStack,
    daemon: Daemon,
    addresses: dict[str, tuple[Peer, str]],
    progress: Progress,
    effort: Effort,
) -> tuple[str, list[Claim]]:
    def asked(model: str, shape: tuple[int, ...], *, bare: bool) -> dict[str, Target]:
        """Everybody by an app's client, from array to array, or with a message made beforehand."""
        served = Target("frames" if bare else "client", daemon.endpoint, model, shape=shape)
        with daemon.client() as client:
            served = replace(served, input_name=client.model_metadata(model)["inputs"][0]["name"])
        targets = {ZEROMQ: served}
        if has_fast_lane() and not bare:
            targets[FAST_LANE] = replace(served, way="fast")
        for title, (peer, address) in addresses.items():
            way, path = "http" if bare else "post", peer.path.format(model=model)
            targets[title] = Target(way, address, path, shape=shape, headers=peer.headers)
        return targets

    measured: dict[str, Figures] = {}
    for kind in (APP, BARE):
        progress(f"peers: tiny model, {kind}")
        targets = asked("tiny", (1, 64), bare=kind == BARE)
        asks = {name: stack.enter_context(opened(target)) for name, target in targets.items()}
        measured[kind] = Figures(
            interleaved(asks, effort), interleaved(asks, effort, PACED_HZ), _crowds(targets, effort)
        )
    tables = [_tiny_table(measured)]
    for model, title in (("large", "602 KB input, next to no work"), ("shufflenet", "ShuffleNet")):
        progress(f"peers: {model}")
        targets = asked(model, IMAGE, bare=False)
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


@dataclass(frozen=True)
class Figures:
    """Of the tiny model, by who was asked."""

    closed_s: dict[str, list[float]]
    paced_s: dict[str, list[float]]
    many_hz: dict[str, float]

    def over(self, name: str) -> tuple[float, float, float]:
        """A server's figures over the yardstick's, by the way to it that is the better one in each figure."""
        others = [other for other in self.closed_s if other.startswith(YARDSTICK)]
        return (
            median(self.closed_s[name]) / min(median(self.closed_s[other]) for other in others),
            median(self.paced_s[name]) / min(median(self.paced_s[other]) for other in others),
            self.many_hz[name] / max(self.many_hz[other] for other in others),
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
        why = "" if name in figures.closed_s else "this version's client has none"
        if not any(other.startswith(YARDSTICK) for other in figures.closed_s):
            why = f"{YARDSTICK} is not set up or does not run: make bench-peers"
        if why:
            claims.append(not_measured(closed_text, f"at most {closed_goal} ×", why))
            claims.append(not_measured(many_text, f"at least {many_goal} ×", why))
            continue
        closed, paced, many = figures.over(name)
        notes = ["", "", ""]
        if name in bare.closed_s:
            notes = [f"{factor:.2f} × with all messages made beforehand" for factor in bare.over(name)]
        claims.append(at_most(closed_text, closed, closed_goal, note=notes[0]))
        if paced_goal is not None:
            claims.append(at_most(paced_text, paced, paced_goal, note=notes[1]))
        claims.append(at_least(many_text, many, many_goal, note=notes[2]))
    return claims


def check_set_up(peer: Peer) -> None:
    """Raises PeerFailed for one that has no environment, with the reason that stands where it would be."""
    if not peer.python.exists():
        raise PeerFailed(
            peer.refusal.read_text().strip() if peer.refusal.exists() else "not set up: make bench-peers"
        )


@contextmanager
def _served(peer: Peer, way: str, daemon: Daemon) -> Iterator[str]:
    """The address of a running one, once it has answered; raises PeerFailed."""
    check_set_up(peer)
    if way == "unix":
        argument = endpoint = f"unix:{daemon.root}/{peer.name}.sock"
    else:
        port = _free_port()
        argument, endpoint = str(port), f"127.0.0.1:{port}"
    log = daemon.root / f"{peer.name}-{way}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(peer.python), str(SERVERS / f"{peer.name}_server.py"), str(daemon.models), argument],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=daemon.root,
            env={**_environ(), **QUIET},
            start_new_session=True,
        )
    try:
        _wait_answer(peer, endpoint, process, log)
        yield endpoint
    finally:
        # Its own process group: some start others. They get a moment to end them in good order.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _environ() -> dict[str, str]:
    """Ours, without what would show it our packages."""
    return {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "EDGED"))}


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _wait_answer(peer: Peer, endpoint: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    why = "it did not answer"
    while time.monotonic() < deadline:
        if process.poll() is not None:
            why = f"it ended with {process.returncode}"
            break
        target = Target("http", endpoint, peer.path.format(model="tiny"), headers=peer.headers)
        try:
            with opened(target) as ask:
                ask()
                return
        except (OSError, RuntimeError) as e:
            why = f"it did not answer within {START_TIMEOUT_S:g} s: {e}"
            time.sleep(0.2)
    words = log.read_text(errors="replace").strip().splitlines()
    raise PeerFailed(f"{why}; its last words: {words[-1][:300] if words else 'none'}")


def setup(names: Sequence[str]) -> None:
    """Makes the environments of those named, or of all; what cannot be installed leaves its reason behind."""
    ENVIRONMENTS.mkdir(exist_ok=True)
    for peer in PEERS:
        if (names and peer.name not in names) or peer.python.exists():
            continue
        print(f"setting up {peer.title}", file=sys.stderr, flush=True)
        folder = ENVIRONMENTS / peer.name
        pip = [str(peer.python), "-m", "pip", "--disable-pip-version-check", "--no-input", "-q", "install"]
        try:
            subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, timeout=INSTALL_TIMEOUT_S)
            done = subprocess.run(
                [*pip, *peer.requirements],
                capture_output=True,
                text=True,
                timeout=INSTALL_TIMEOUT_S,
                check=False,
            )
            why = done.stderr.strip().splitlines()[-1] if done.returncode else ""
        except subprocess.TimeoutExpired:
            why = f"not within {INSTALL_TIMEOUT_S:g} s"
        peer.refusal.unlink(missing_ok=True)
        if why:
            shutil.rmtree(folder)
            peer.refusal.write_text(f"it does not install here: {why[:300]}\n")
            print(f"{peer.title} does not install here: {why}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    if "--setup" in sys.argv[1:]:
        setup([argument for argument in sys.argv[1:] if argument != "--setup"])
    else:
        run_alone(measure)
