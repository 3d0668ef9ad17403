"""A real daemon in a folder of its own, and a client that is nothing but pyzmq and msgpack.

Owns the daemon's process, which it starts, watches and ends by its own pid, and the socket on which the
daemon tells a service manager how it is. Nothing here sleeps to synchronise: what can be heard is waited for
(READY, an event, the end of a process), what cannot is asked for again until it is so, and each wait ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import msgpack
import psutil
import pytest
import zmq

from edged import Client
from edged.cli.edgectl import main as edgectl_main
from edged.errors import Unavailable

__all__ = ["ROOT", "WAIT_S", "Daemon", "Edgectl", "Raw", "code_of", "descendants", "running_daemon", "until"]

ROOT = Path(__file__).resolve().parents[2]
"""The repository."""

WAIT_S = float(os.environ.get("EDGED_TEST_WAIT_S", "60"))
"""The bound of each wait: generous, since the machine may be busy; a passing test needs a fraction of it."""

POLL_S = 0.02

_T = TypeVar("_T")


def until(question: Callable[[], _T], *, what: str | Callable[[], str], timeout_s: float = WAIT_S) -> _T:
    """Asks `question` until the answer is true and returns it; fails the test after `timeout_s`."""
    end = time.monotonic() + timeout_s
    while True:
        answer = question()
        if answer:
            return answer
        if time.monotonic() >= end:
            pytest.fail(f"not within {timeout_s:g} s: {what if isinstance(what, str) else what()}")
        select.select([], [], [], POLL_S)


class Raw:
    """A client of the wire and nothing else: a DEALER, or with `req=True` a REQ."""

    def __init__(self, endpoint: str, *, req: bool = False, correlate: bool = False) -> None:
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.REQ if req else zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        if correlate:
            self.socket.setsockopt(zmq.REQ_RELAXED, 1)
            self.socket.setsockopt(zmq.REQ_CORRELATE, 1)
        self.socket.connect(endpoint)
        self._ids = 0

    def send(self, header: Any, frames: Sequence[bytes] = ()) -> None:
        """Sends a header (bytes as they are, anything else as msgpack) and its tensor frames."""
        head = header if isinstance(header, bytes) else msgpack.packb(header)
        self.socket.send_multipart([head, *frames])

    def receive(self, timeout_s: float = WAIT_S) -> tuple[dict[str, Any], list[bytes]]:
        """The next reply: its header and its frames."""
        if not self.socket.poll(round(timeout_s * 1000)):
            pytest.fail(f"no reply within {timeout_s:g} s")
        head, *frames = self.socket.recv_multipart()
        return msgpack.unpackb(head, strict_map_key=False), frames

    def quiet(self, timeout_s: float = 0.05) -> bool:
        """Whether no further reply is there."""
        return not self.socket.poll(round(timeout_s * 1000))

    def ask(self, header: Any, frames: Sequence[bytes] = ()) -> dict[str, Any]:
        """One request, and the header of its reply."""
        self.send(header, frames)
        return self.receive()[0]

    def call(self, method: str, **fields: Any) -> dict[str, Any]:
        """A request of `method` with an id of its own; the reply must carry that id."""
        self._ids += 1
        reply = self.ask({"method": method, "id": self._ids, **fields})
        assert reply.pop("id") == self._ids
        return reply

    def infer(self, model: str, inputs: Sequence[Mapping[str, Any]], **fields: Any) -> dict[str, Any]:
        """An inference with everything inline."""
        return self.call("model_infer", model_name=model, inputs=list(inputs), **fields)

    def close(self) -> None:
        """Ends the connection."""
        self.socket.close()
        self._context.term()

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Edgectl:
    """Runs edgectl in this process and reads what it printed."""

    def __init__(self, endpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
        self._endpoint = endpoint
        self._capsys = capsys

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        """Exit status, stdout, stderr."""
        code = edgectl_main([*arguments, "--endpoint", self._endpoint])
        out, err = self._capsys.readouterr()
        return code, out, err

    def json(self, *arguments: str, code: int = 0) -> Any:
        """The JSON document that it printed."""
        found, out, err = self(*arguments, "--json")
        assert found == code, (out, err)
        return json.loads(out)


def code_of(reply: Mapping[str, Any]) -> tuple[str, str]:
    """The code and the reason of an error reply; fails the test for any other."""
    assert "error" in reply, reply
    return reply["error"]["code"], reply["error"].get("reason", "")


class Daemon:
    """A daemon whose folders all lie below `root`; started and ended as often as a test wants."""

    def __init__(
        self, root: Path, settings: Mapping[str, str] | None = None, *, arguments: Sequence[str] = ()
    ) -> None:
        self.root = root
        self.models = root / "models"
        self.state = root / "state"
        self.cache = root / "cache"
        self.run_dir = root / "run"
        self.endpoint = f"ipc://{self.run_dir}/edged.sock"
        self.admin = f"ipc://{self.run_dir}/admin.sock"
        self.log_path = root / "log"
        self.notices: list[dict[str, str]] = []
        """What the daemon told its service manager, one map a message."""
        self._settings = dict(settings or {})
        self._arguments = list(arguments)
        self._process: subprocess.Popen[bytes] | None = None
        self._client: Client | None = None
        root.mkdir(parents=True, exist_ok=True)
        if not self.models.exists():
            self.models.mkdir()
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._notify.bind(str(root / "notify"))
        self._notify.settimeout(WAIT_S)

    def environ(self) -> dict[str, str]:
        """The daemon's environment. Measuring other runtimes is off: a switch in the middle is not wanted."""
        return {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "NOTIFY_SOCKET": str(self.root / "notify"),
            "EDGED_LOADING_SETTLE": "100ms",
            "EDGED_DEVICES_EXCLUDE": "openvino",
            **self._settings,
        }

    def command(self) -> list[str]:
        """The daemon's command line."""
        return [
            sys.executable,
            *("-m", "edged.cli.edged"),
            *("--models", str(self.models), "--endpoint", self.endpoint),
            *("--state-dir", str(self.state), "--cache-dir", str(self.cache), "--log-format", "json"),
            *self._arguments,
        ]

    def spawn(self, prefix: Sequence[str] = ()) -> subprocess.Popen[bytes]:
        """Starts the process and does not wait for READY."""
        self.notices.clear()
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [*prefix, *self.command()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environ(),
                cwd=self.root,
            )
        return self._process

    def start(self, prefix: Sequence[str] = ()) -> Daemon:
        """Starts the daemon and waits for its READY."""
        self.spawn(prefix)
        self.heard("READY")
        return self

    def heard(self, key: str) -> dict[str, str]:
        """Waits for the next notice that has `key`; fails when the daemon ends first."""
        process = self.process
        pidfd = os.pidfd_open(process.pid)
        end = time.monotonic() + WAIT_S
        try:
            while True:
                ready, _, _ = select.select([self._notify, pidfd], [], [], max(0.0, end - time.monotonic()))
                if self._notify in ready:
                    text = self._notify.recv(65536).decode()
                    notice = dict(line.partition("=")[::2] for line in text.splitlines())
                    self.notices.append(notice)
                    if key in notice:
                        return notice
                elif ready or time.monotonic() >= end:
                    what = f"ended with {process.wait()}" if ready else "did not in time"
                    pytest.fail(f"waited for {key}; the daemon {what}:\n{self.log()[-4000:]}")
        finally:
            os.close(pidfd)

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The supervisor's process."""
        assert self._process is not None
        return self._process

    @property
    def pid(self) -> int:
        """The supervisor's pid."""
        return self.process.pid

    @property
    def client(self) -> Client:
        """One client for the test's own questions, made at first use."""
        if self._client is None:
            self._client = Client(self.endpoint, timeout=WAIT_S)
        return self._client

    def raw(self, *, req: bool = False, correlate: bool = False) -> Raw:
        """A new connection to the socket for inference."""
        return Raw(self.endpoint, req=req, correlate=correlate)

    def log(self) -> str:
        """All that the daemon has logged."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def rows(self, name: str | None = None) -> list[dict[str, Any]]:
        """The models of `server_status`."""
        return [m for m in self.client.server_status()["models"] if name in (None, m["name"])]

    def serving(self, name: str) -> dict[str, Any] | None:
        """The row of the version that serves."""
        return next((m for m in self.rows(name) if m["serving"]), None)

    def wait_row(self, name: str, wanted: Callable[[dict[str, Any]], object], what: str) -> dict[str, Any]:
        """Waits until a row of this model is as wanted."""

        def found() -> dict[str, Any] | None:
            return next((row for row in self.rows(name) if wanted(row)), None)

        return until(lambda: found() or {}, what=lambda: f"{name}: {what}; {self.rows(name)}")

    def wait_ready(self, name: str) -> dict[str, Any]:
        """Waits until a version of this model serves."""
        return self.wait_row(name, lambda r: r["serving"] and r["state"] == "READY" and r["pid"], "serves")

    def wait_refused(self, name: str, reason: str = "") -> dict[str, Any]:
        """Waits until some content of this model is refused."""
        return self.wait_row(
            name,
            lambda r: r["state"] == "UNAVAILABLE" and not r["serving"] and reason in ("", r["reason"]),
            f"is refused {reason}",
        )

    def number(self, name: str = "m") -> float:
        """What a `zoo.versioned` model answers; each answer must be of one version only."""
        answer = self.client.infer(name, {"x": ones()})
        return whole_number(answer)

    def wait_number(self, number: float, name: str = "m", *, gap: bool = False) -> None:
        """Waits until a `zoo.versioned` model answers `number`; a version that serves must answer.

        With `gap` it may leave between the look at its row and the question, as with `swap = "replace"`.
        """
        seen: list[float] = []

        def asked() -> bool:
            if self.serving(name) is None:
                return False
            try:
                seen[:] = [self.number(name)]
            except Unavailable:
                if not gap:
                    raise
                return False
            return seen[0] == number

        until(asked, what=lambda: f"{name} answers {number}; it answered {seen}, {self.rows(name)}")

    def wait_gone(self, name: str) -> None:
        """Waits until the daemon knows nothing of this model any more."""
        until(lambda: not self.rows(name), what=f"{name} is gone")

    def signal(self, number: int) -> None:
        """Sends the daemon a signal."""
        self.process.send_signal(number)

    def wait_end(self) -> int:
        """Waits for the daemon's end; its exit status."""
        return self.process.wait(WAIT_S)

    def stop(self) -> int:
        """Ends the daemon as a service manager would; its exit status."""
        self.forget_client()
        if self.process.poll() is None:
            self.signal(signal.SIGTERM)
        return self.wait_end()

    def forget_client(self) -> None:
        """Closes the client of the test's own questions."""
        if self._client is not None:
            self._client.close()
            self._client = None

    def close(self) -> None:
        """Ends whatever is left."""
        self.forget_client()
        if self._process is not None and self._process.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                children = psutil.Process(self.pid).children(recursive=True)
                self.signal(signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(20)
                for process in [*children, psutil.Process(self.pid)]:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()
            self._process.wait(20)
        self._notify.close()

    def __enter__(self) -> Daemon:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            sys.stderr.write(f"--- the daemon's log\n{self.log()[-12000:]}\n")
        self.close()


@contextlib.contextmanager
def running_daemon(
    root: Path,
    settings: Mapping[str, str] | None = None,
    *,
    arguments: Sequence[str] = (),
    models: Mapping[str, Any] | None = None,
) -> Iterator[Daemon]:
    """A daemon that has said READY with `models`, a map of file names to what `zoo` makes."""
    from tests import zoo

    with Daemon(root, settings, arguments=arguments) as daemon:
        for name, model in (models or {}).items():
            zoo.write(daemon.models / name, model)
        yield daemon.start()


def ones() -> Any:
    """The input of a `zoo.versioned` model."""
    import numpy as np

    return np.ones((1, 4), np.float32)


def whole_number(answer: Mapping[str, Any]) -> float:
    """The number in a `zoo.versioned` model's answer to `ones`, which must be the same everywhere."""
    number = float(answer["version"].flat[0])
    assert (answer["version"] == number).all()
    assert float(answer["sum"][0, 0]) == number + 4
    return number


def descendants(pid: int) -> list[psutil.Process]:
    """Every process below `pid`."""
    return psutil.Process(pid).children(recursive=True)
