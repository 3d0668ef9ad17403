"""A real daemon on scratch folders, for the benchmarks and the tests of the examples.

Owns one temporary folder and the daemon process that lives in it; ends both, whatever happens in between.
Readiness is heard on a notify socket of its own, as systemd would hear it. Nothing here sleeps to
synchronise, and every wait has an end.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import onnx
import psutil

from edged import Client
from tests import zoo

__all__ = ["PINNED", "ROOT", "CpuUse", "Daemon", "memory_bytes", "open_descriptors"]

ROOT = Path(__file__).resolve().parent.parent
"""The repository."""

PINNED = 'runtime = "onnxruntime"\ndevice = "cpu"\n'
"""Settings of a model for which nothing is measured beside what we measure."""

_CHOICE_TIMEOUT_S = 240.0
_CHOICE_POLL_S = 1.0

_STOP_WAIT_S = 20.0


class Daemon:
    """`with Daemon() as daemon:` is a daemon that has said READY, serving `daemon.models`.

    `seed` names a models folder to copy from; files may be put into `daemon.models` before and after the
    start. `settings` are environment variables such as `EDGED_LOADING_SETTLE`; `program` is what the
    interpreter is given to become the daemon.
    """

    def __init__(
        self,
        seed: Path | None = None,
        *,
        settings: Mapping[str, str] | None = None,
        log_level: str = "warning",
        ready_timeout_s: float = 60.0,
        program: Sequence[str] = ("-m", "edged.cli.edged"),
    ) -> None:
        # Below /tmp whatever TMPDIR says: a socket's path has 107 bytes at most.
        self.root = Path(tempfile.mkdtemp(prefix="edged-", dir="/tmp"))
        self.models = self.root / "models"
        self.endpoint = f"ipc://{self.root}/run/edged.sock"
        self.log_path = self.root / "log"
        self.started_ns = 0
        self.ready_ns = 0
        self._settings = dict(settings or {})
        self._log_level = log_level
        self._ready_timeout_s = ready_timeout_s
        self.program = tuple(program)
        self._process: subprocess.Popen[bytes] | None = None
        self._notify: socket.socket | None = None
        (self.root / "run").mkdir(mode=0o700)
        if seed is None:
            self.models.mkdir()
        else:
            shutil.copytree(seed, self.models)

    def __repr__(self) -> str:
        state = "not started" if self._process is None else f"pid {self._process.pid}"
        return f"<Daemon {self.endpoint} {state}>"

    def __enter__(self) -> Daemon:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            with contextlib.suppress(OSError):
                sys.stderr.write(self.log_path.read_text(errors="replace")[-8000:])
        self.close()

    @property
    def pid(self) -> int:
        """The supervisor's."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Starts the daemon, once or again, and waits until it says READY; RuntimeError if it ends before."""
        if self._notify is None:
            self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            self._notify.bind(str(self.root / "notify"))
        environ = {
            **os.environ,
            "NOTIFY_SOCKET": str(self.root / "notify"),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "EDGED_SERVER_STATE_DIR": str(self.root / "state"),
            "EDGED_SERVER_CACHE_DIR": str(self.root / "cache"),
            **self._settings,
        }
        command = [sys.executable, *self.program, "--models", str(self.models)]
        command += ["--endpoint", self.endpoint, "--log-level", self._log_level]
        with self.log_path.open("ab") as log:
            self.started_ns = time.monotonic_ns()
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environ, cwd=self.root
            )
        self._wait_ready()

    def _wait_ready(self) -> None:
        assert self._process is not None
        assert self._notify is not None
        deadline = time.monotonic() + self._ready_timeout_s
        pidfd = os.pidfd_open(self._process.pid)
        try:
            while True:
                left = deadline - time.monotonic()
                readable, _, _ = select.select([self._notify.fileno(), pidfd], [], [], max(0.0, left))
                if self._notify.fileno() in readable:
                    if b"READY=1" in self._notify.recv(65536).split(b"\n"):
                        self.ready_ns = time.monotonic_ns()
                        return
                    continue
                what = "ended" if pidfd in readable else f"is not ready after {self._ready_timeout_s:g} s"
                tail = self.log_path.read_text(errors="replace")[-4000:]
                raise RuntimeError(f"the daemon {what}; its last lines:\n{tail}")
        finally:
            os.close(pidfd)

    def put(self, name: str, model: onnx.ModelProto | bytes, settings: str = PINNED) -> str:
        """Puts a model into the folder, its settings first; returns the model's file."""
        (self.models / f"{name}.toml").write_text(settings)
        return str(zoo.write(self.models / f"{name}.onnx", model))

    def wait_chosen(self, progress: Callable[[str], None]) -> list[dict[str, Any]]:
        """Waits until the daemon has measured its choice for every model, bounded; the status of them all."""
        deadline = time.monotonic() + _CHOICE_TIMEOUT_S
        said = ""
        while True:
            models: list[dict[str, Any]] = self.status()["models"]
            waiting = ", ".join(
                m["name"] for m in models if not m["measured"] and m["choice"] not in ("pinned", "remembered")
            )
            if not waiting or time.monotonic() > deadline:
                return models
            if waiting != said:
                said = waiting
                progress(f"the daemon still measures {waiting}")
            time.sleep(_CHOICE_POLL_S)

    def cpu(self) -> CpuUse:
        """Begins to count what CPU time the daemon's processes take; see CpuUse."""
        return CpuUse(self.processes(), self.pid)

    def client(self, timeout_s: float = 60.0) -> Client:
        """A client of this daemon; the caller closes it."""
        return Client(self.endpoint, timeout=timeout_s)

    def processes(self) -> list[psutil.Process]:
        """The supervisor first, then everything below it that is alive."""
        supervisor = psutil.Process(self.pid)
        return [supervisor, *supervisor.children(recursive=True)]

    def status(self) -> dict[str, Any]:
        """The daemon's own account of itself."""
        with self.client() as client:
            return dict(client.server_status())

    def stop(self) -> int:
        """Ends the daemon as systemd would and returns its exit status; kills it after 20 seconds."""
        if self._process is None:
            return 0
        process, self._process = self._process, None
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            return process.wait(_STOP_WAIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return -signal.SIGKILL

    def close(self) -> None:
        """Ends the daemon and removes the scratch folder."""
        self.stop()
        if self._notify is not None:
            self._notify.close()
            self._notify = None
        shutil.rmtree(self.root, ignore_errors=True)


class CpuUse:
    """CPU time of the daemon's processes from here on; `supervisor` and `others`, in CPUs."""

    def __init__(self, processes: list[psutil.Process], supervisor: int) -> None:
        self._supervisor = supervisor
        self._processes = processes
        self._before = {process.pid: _cpu_s(process) for process in processes}
        self._began = time.monotonic()

    def read(self) -> tuple[float, float]:
        """How many CPUs the supervisor, and all other processes together, have kept busy since."""
        seconds = time.monotonic() - self._began
        used = {p.pid: _cpu_s(p) - self._before[p.pid] for p in self._processes if p.is_running()}
        own = used.pop(self._supervisor, 0.0)
        return own / seconds, sum(used.values()) / seconds


def _cpu_s(process: psutil.Process) -> float:
    with contextlib.suppress(psutil.NoSuchProcess):
        times = process.cpu_times()
        return float(times.user + times.system)
    return 0.0


def open_descriptors(processes: list[psutil.Process]) -> int:
    """How many files all of them have open together."""
    return sum(_each(processes, lambda p: p.num_fds()))


def memory_bytes(processes: list[psutil.Process]) -> int:
    """The proportional memory (PSS) of all of them together: shared pages count once."""
    return sum(_each(processes, lambda p: p.memory_full_info().pss))


def _each(processes: list[psutil.Process], figure: Any) -> Iterator[int]:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            yield figure(process)
