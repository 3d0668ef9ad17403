"""The other servers' environments and processes: made from PyPI, started, heard of, ended.

Each has an environment of its own below .venv-peers/, and a program in bench/peer_servers/ that it runs.
Nothing that they do leaves 127.0.0.1, and what they would tell their makers is switched off. Which of them
there are is decided here; what is measured is not.
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
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.harness import ROOT
from bench.targets import Target, opened

__all__ = ["PEERS", "Peer", "PeerFailed", "check_set_up", "served", "setup"]

ENVIRONMENTS = ROOT / ".venv-peers"
SERVERS = ROOT / "bench" / "peer_servers"
START_TIMEOUT_S = 90.0
INSTALL_TIMEOUT_S = 900.0
QUIET = {
    "ORT_DISABLE_TELEMETRY": "1",
    "BENTOML_DO_NOT_TRACK": "True",
    "RAY_USAGE_STATS_ENABLED": "0",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "LITSERVE_DISABLE_TELEMETRY": "1",
}
"""What keeps them from telling anybody anything."""


class PeerFailed(Exception):
    """Why one of the others cannot be measured here."""


@dataclass(frozen=True)
class Peer:
    """One of the others; `ways` are the kinds of address that are tried, of which the best counts."""

    name: str
    title: str
    requirements: tuple[str, ...]
    ways: tuple[str, ...] = ("tcp",)
    path: str = "{model}"
    """Of the URL."""
    body: str = "raw"
    """The form of a request; see Target."""
    interpreter: str = sys.executable
    """The Python that its environment is made from."""

    @property
    def python(self) -> Path:
        """The interpreter of its environment."""
        return ENVIRONMENTS / self.name / "bin" / "python"

    @property
    def refusal(self) -> Path:
        """Where it stands why it could not be installed."""
        return ENVIRONMENTS / f"{self.name}.failed"


DEBIAN_PYTHON = "/usr/bin/python3"
RUNTIME = ("onnxruntime", "numpy")
PEERS = (
    Peer(
        "fastapi",
        "FastAPI",
        ("fastapi", "uvicorn", "uvloop", "httptools", *RUNTIME),
        ("unix", "tcp"),
    ),
    Peer("litserve", "LitServe", ("litserve", *RUNTIME), path="predict", body="json"),
    Peer("bentoml", "BentoML", ("bentoml", *RUNTIME), path="infer", body="json"),
    # Newer ones of uvloop have left out what it calls.
    Peer("mlserver", "MLServer", ("mlserver", "uvloop<0.22", *RUNTIME), body="grpc"),
    Peer(
        "pytriton",
        "PyTriton",
        ("nvidia-pytriton", *RUNTIME),
        path="v2/models/{model}/infer",
        body="triton",
        # It brings a Python of its own that runs our library: one of a later patch release does not fit it.
        interpreter=DEBIAN_PYTHON if Path(DEBIAN_PYTHON).exists() else sys.executable,
    ),
    Peer("ray", "Ray Serve", ("ray[serve]", *RUNTIME)),
)


def check_set_up(peer: Peer) -> None:
    """Raises PeerFailed for one that has no environment, with the reason that stands where it would be."""
    if not peer.python.exists():
        raise PeerFailed(
            peer.refusal.read_text().strip() if peer.refusal.exists() else "not set up: make bench-peers"
        )


@contextmanager
def served(peer: Peer, way: str, models: Path, folder: Path) -> Iterator[str]:
    """The address of a running one that serves `models`, once it has answered; raises PeerFailed.

    `folder` is for its socket and its log.
    """
    check_set_up(peer)
    if way == "unix":
        argument = endpoint = f"unix:{folder}/{peer.name}.sock"
    else:
        port = _free_port()
        argument, endpoint = str(port), f"127.0.0.1:{port}"
    log = folder / f"{peer.name}-{way}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(peer.python), str(SERVERS / f"{peer.name}_server.py"), str(models), argument],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=folder,
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
        target = Target("post", endpoint, "tiny", path=peer.path, body=peer.body)
        try:
            with opened(target) as ask:
                ask()
                return
        except Exception as e:  # noqa: BLE001 - each library of theirs has errors of its own for "not yet"
            why = f"it did not answer within {START_TIMEOUT_S:g} s: {e}"
            time.sleep(0.2)
    words = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    last = next((line for line in reversed(words) if "Error" in line), words[-1] if words else "none")
    raise PeerFailed(f"{why}; its last words: {last[:300]}")


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
            why = _failure([peer.interpreter, "-m", "venv", str(folder)])
            why = why or _failure([*pip, *peer.requirements])
        except subprocess.TimeoutExpired:
            why = f"not within {INSTALL_TIMEOUT_S:g} s"
        peer.refusal.unlink(missing_ok=True)
        if why:
            shutil.rmtree(folder, ignore_errors=True)
            peer.refusal.write_text(f"it does not install here: {why[:300]}\n")
            print(f"{peer.title} does not install here: {why}", file=sys.stderr, flush=True)


def _failure(command: Sequence[str]) -> str:
    """The last line that a command complained with; empty when all is well."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S, check=False)
    return (done.stderr or done.stdout).strip().splitlines()[-1] if done.returncode else ""
