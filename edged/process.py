"""The supervisor's side of its child processes: starting, talking, ending, and reading how they ended.

Owns templates, workers and probes, and every descriptor between them and the supervisor. It never blocks: a
spawn is a message to a template or an exec, what comes back is read when it is there. It imports neither
numpy nor a runtime. It decides nothing about when to start, kill or give up.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import math
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import msgspec

from edged import sites
from edged.arena import Arena, ArenaBoundsError
from edged.sizes import MEASURED_MAX, are_shapes, is_size
from edged.tensors import TensorSpec

__all__ = ["ProbeProcess", "Spawner", "WorkerGone", "WorkerLimits", "WorkerProcess"]

PACKET_BYTES_MAX = 256 * 1024
"""Room for any packet: the kernel's default bound is 212,960 bytes."""

PACKETS_PER_TURN = 64
"""Read from one worker before others have their turn."""

LARGE_REPLY_BYTES_MAX = 17 << 20
"""Of one reply that came by way of the slot: a little more than a worker allows itself."""

LOADED_BYTES_MAX = 4 << 20
"""Of the answer to a load that comes in parts: twice what a worker allows itself for metadata and tensors,
since of the metadata it counts the characters alone."""

OBSTACLES_MAX = 64
"""Reasons against a move that a measurer may tell: it names far fewer."""

BATCH_TIMES_MAX = 64
"""Sizes of a batch that a worker may have tried; it tries seven and its owner's own."""

COMPUTE_NS_MAX = 1 << 50
"""A run of thirteen days: sums of what workers tell must fit into 64 bits for as long as the daemon lives."""

PROBE_REPLY_BYTES_MAX = 64 * 1024
"""Of a probe's verdict; what is beyond it is cut, which makes it unreadable and so a driver_error."""

_metadata_decoder = msgspec.msgpack.Decoder(dict[str, str])

_PR_SET_CHILD_SUBREAPER = 36
"""From linux/prctl.h."""

_PACKAGE = Path(__file__).resolve().parent

_BOOTSTRAP = """\
import importlib.util as u, sys
sys.path[:] = [*filter(None, sys.argv[2].split(':')), *filter(None, sys.path)]
s = u.spec_from_file_location('edged', sys.argv[1] + '/__init__.py', submodule_search_locations=[sys.argv[1]])
m = sys.modules['edged'] = u.module_from_spec(s); s.loader.exec_module(m)
__import__('edged.' + sys.argv[3], fromlist=['main']).main(sys.argv[4:])
"""
"""Runs a module of this very package in any interpreter; arguments: the package, site directories, module.

A vendor's Python must see our code, but not our site-packages with their numpy, so PYTHONPATH will not do;
and the current directory, which `-c` puts first, is nobody's place to import from.
"""

_QUIET = {
    "ORT_DISABLE_TELEMETRY": "1",
    # One thread in a template, so that forking it is safe; the runtimes have pools of their own.
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "1",
}

_NOT_FOR_CHILDREN = (
    "NOTIFY_SOCKET",
    "WATCHDOG_USEC",
    "WATCHDOG_PID",
    "LISTEN_FDS",
    "LISTEN_PID",
    "LISTEN_FDNAMES",
)
"""What systemd gave the supervisor, and nobody else."""


class WorkerGone(Exception):
    """The worker hung up, or sent what no worker sends; `WorkerProcess.reap` tells how it ended."""


@dataclass(frozen=True)
class WorkerLimits:
    """Bounds that the worker sets on itself before it sees a model.

    `data_bytes` is RLIMIT_DATA, None where a driver maps more than it uses (a GPU's). `file_bytes` is
    RLIMIT_FSIZE, which bounds how far a slot of the arena can grow.
    """

    data_bytes: int | None
    file_bytes: int


class _Template:
    """A template process as the spawner sees it."""

    def __init__(self, process: subprocess.Popen[bytes], orders: socket.socket) -> None:
        self.process = process
        self.orders = orders
        self.fault = ""

    def alive(self) -> bool:
        return self.process.poll() is None

    def close(self) -> None:
        self.orders.close()  # the template reads end of file and exits
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


class Spawner:
    """Starts workers and probes; a context manager.

    `pythons` names the interpreter of a runtime that has one of its own; `environ` is what children get.
    """

    def __init__(self, *, pythons: Mapping[str, str], environ: Mapping[str, str]) -> None:
        self._pythons = dict(pythons)
        self._environ = {k: v for k, v in environ.items() if k not in _NOT_FOR_CHILDREN} | _QUIET
        self._templates: dict[str, _Template] = {}
        self._forked: dict[int, WorkerProcess] = {}
        self._spawned = 0
        # So that a worker whose forking parent has exited becomes the supervisor's child.
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    def __enter__(self) -> Spawner:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the templates; workers are their owners' to close. Idempotent."""
        while self._templates:
            self._templates.popitem()[1].close()

    def spawn(self, runtime: str, *, gpu: bool, limits: WorkerLimits, slots: int) -> WorkerProcess:
        """Starts a worker and returns at once; it says hello when it is ready.

        Forked from the runtime's template, or exec'd for a GPU, whose driver must not be forked. To be
        called from the main thread only: the kernel ends workers when the thread that made them ends.
        """
        return self._exec(runtime, limits, slots) if gpu else self._fork(runtime, limits, slots)

    def spawn_measurer(self, *, limits: WorkerLimits) -> WorkerProcess:
        """Starts a worker that has no runtime yet and can load several: for `measure`."""
        return self._exec("", limits, 1)

    def start_template(self, runtime: str) -> None:
        """Starts a runtime's template ahead of the first spawn, so that this one need not wait for it."""
        self._template(runtime)

    def drain(self) -> None:
        """Reads what the templates have said: the pids of workers, and what went wrong."""
        for runtime, template in list(self._templates.items()):
            self._drain(template)
            if not template.alive():
                self._drain(template)
                del self._templates[runtime]
                for worker in [w for w in self._forked.values() if w.template is template]:
                    worker.template_ended(template.fault or describe_exit(template.process.returncode))
                    del self._forked[worker.spawn_id]
                template.close()

    def templates(self) -> dict[str, int]:
        """The pid of each runtime's template that runs."""
        return {runtime: t.process.pid for runtime, t in self._templates.items() if t.alive()}

    def list_probes(self) -> tuple[tuple[str, str], ...]:
        """What to try, as (runtime, device), from the device nodes that are there: none is opened."""
        cards = [p for p in Path("/dev").glob("nvidia[0-9]*") if p.name[6:].isdecimal()]
        renderers = list(Path("/dev/dri").glob("renderD*"))
        return (
            ("onnxruntime", "CPU"),
            *(("onnxruntime", f"CUDA:{n}") for n in range(max(1, len(cards)))),
            ("openvino", "CPU"),
            *(("openvino", f"GPU.{n}") for n in range(max(1, len(renderers)))),
            ("openvino", "NPU"),
        )

    def installed_mark(self, runtime: str) -> str:
        """What changes when a runtime is installed anew; empty for one that another interpreter has.

        Taken from the package's first file, without importing it.
        """
        if self._pythons.get(runtime, sys.executable) != sys.executable:
            return ""
        origin = sites.origin(runtime)
        if origin is None:
            return "not installed"
        try:
            status = os.stat(origin)
        except OSError:
            return ""
        return f"{origin} {status.st_ino} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"

    def probe(self, runtime: str, device: str) -> ProbeProcess:
        """Tries a device in a child of its own. A runtime that is not installed costs no process."""
        python = self._pythons.get(runtime, sys.executable)
        if python == sys.executable and not sites.is_installed(runtime):
            return ProbeProcess.answered(runtime, device, not_installed(runtime, device))
        reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            settings = {"runtime": runtime, "device": device, "fd": writer}
            process = self._start(runtime, "runtimes.detect", settings, (writer,))
        except OSError as e:
            os.close(reader)
            return ProbeProcess.answered(
                runtime,
                device,
                verdict(runtime, device, "driver_error", detail=f"no child could be started: {e}"),
            )
        finally:
            os.close(writer)
        return ProbeProcess(runtime, device, reader, process)

    def _sites(self, runtime: str) -> list[str]:
        # A vendor's interpreter has its own runtime, and ours would not fit it.
        return [] if runtime in self._pythons else sites.site_paths(runtime)

    def _start(
        self, runtime: str, module: str, settings: Mapping[str, Any], fds: Sequence[int]
    ) -> subprocess.Popen[bytes]:
        python = self._pythons.get(runtime, sys.executable)
        return subprocess.Popen(
            [python, *bootstrap(module, self._sites(runtime)), json.dumps(settings)],
            stdin=subprocess.DEVNULL,
            env=self._environ,
            pass_fds=tuple(fds),
        )

    def _exec(self, runtime: str, limits: WorkerLimits, slots: int) -> WorkerProcess:
        worker, data, control = _pair(runtime, limits, slots)
        settings = _settings(runtime, limits) | {"data_fd": data.fileno(), "control_fd": control.fileno()}
        with data, control:
            try:
                worker.process = self._start(runtime, "worker", settings, (data.fileno(), control.fileno()))
                worker.pid = worker.process.pid
            except OSError as e:
                worker.template_ended(f"no process could be started: {e}")
        return worker

    def _fork(self, runtime: str, limits: WorkerLimits, slots: int) -> WorkerProcess:
        self.drain()
        worker, data, control = _pair(runtime, limits, slots)
        self._spawned += 1
        with data, control:
            try:
                template = self._template(runtime)
                worker.spawn_id, worker.template, worker.spawner = self._spawned, template, self
                order = msgpack.packb(["spawn", self._spawned, _settings(runtime, limits)])
                socket.send_fds(template.orders, [order], [data.fileno(), control.fileno()])
                self._forked[self._spawned] = worker
            except OSError as e:
                worker.template_ended(f"the template of {runtime} takes no orders: {e}")
        return worker

    def _template(self, runtime: str) -> _Template:
        template = self._templates.get(runtime)
        if template is not None and template.alive():
            return template
        self.drain()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            again = bootstrap("worker", self._sites(runtime))
            settings = {"runtime": runtime, "fd": theirs.fileno(), "bootstrap": again}
            try:
                process = self._start(runtime, "template", settings, (theirs.fileno(),))
            except OSError:
                ours.close()
                raise
        ours.setblocking(False)
        self._templates[runtime] = _Template(process, ours)
        return self._templates[runtime]

    def _drain(self, template: _Template) -> None:
        with contextlib.suppress(OSError):  # BlockingIOError: nothing more is there
            while raw := template.orders.recv(PACKET_BYTES_MAX):
                packet = msgpack.unpackb(raw)
                if packet[0] == "forked":
                    worker = self._forked.pop(packet[1], None)
                    if worker is not None:
                        worker.is_born(packet[2])
                elif packet[0] == "fork_failed":
                    worker = self._forked.pop(packet[1], None)
                    if worker is not None:
                        worker.template_ended(f"the template could not fork: {packet[2]}")
                elif packet[0] == "broken":
                    template.fault = packet[1]


class WorkerProcess:
    """A worker: two sockets, the arena, and what is known of the process.

    `pid` is None until the template or the worker itself has said it.
    """

    def __init__(self, runtime: str, arena: Arena, data: socket.socket, control: socket.socket) -> None:
        self.runtime = runtime
        self.arena = arena
        self.pid: int | None = None
        self.process: subprocess.Popen[bytes] | None = None
        self.spawner: Spawner | None = None
        self.template: _Template | None = None
        self.spawn_id = 0
        self.regions: set[int] = set()
        """Leased regions that the worker has been given."""
        self._data = data
        self._control = control
        self.data_fd = data.fileno()
        self.control_fd = control.fileno()
        self._ended: str | None = None
        self._kill_asked = False
        self._fault = ""
        self._buffer = bytearray(PACKET_BYTES_MAX)
        self._runs: set[int] = set()
        self._loads: set[int] = set()
        """What it was given and has not answered: it may speak of nothing else."""
        self._parts = bytearray()
        self._parts_of: int | None = None
        """The load whose answer comes in parts, and what came; a worker loads one model at a time."""

    def __repr__(self) -> str:
        return f"<WorkerProcess {self.runtime} pid={self.pid} {self._ended or 'running'}>"

    def widen(self, concurrency: int) -> bool:
        """Gives the worker slots for so many runs at once and one more; False when its socket is full.

        It never has fewer again. Raises WorkerGone, and OSError when the system has no memory for them.
        """
        while self.arena.slots < concurrency + 1:
            slot = self.arena.add_slot()
            if not self.send_control(["slot", slot], self.arena.fd(slot)):
                return False
        return True

    def send_run(self, packet: list[Any]) -> bool:
        """Sends a run; False when the worker's socket is full. Raises WorkerGone."""
        self._runs.add(packet[1])
        return self._send(self._data, msgpack.packb(packet), None)

    def send_control(self, packet: list[Any], fd: int | None = None) -> bool:
        """Sends a command; False when the worker's socket is full. Raises WorkerGone."""
        if packet[0] == "load":
            self._loads.add(packet[1])
        return self._send(self._control, msgpack.packb(packet), fd)

    def recv_data(self) -> list[list[Any]]:
        """The answers that are there, at most `PACKETS_PER_TURN`, each to a run that this worker was given.

        Raises WorkerGone when it hung up, or said what no worker says; then it is killed too.
        """
        packets = self._receive(self._data)
        try:
            for at, packet in enumerate(packets):
                if packet[0] == "done_large":
                    packet = packets[at] = self._read_large(packet)
                _check_answer(packet)
                self._runs.remove(packet[1])
        except (KeyError, TypeError, ValueError, WorkerGone) as e:
            raise self._gone_wrong(e) from None
        return packets

    def recv_control(self) -> list[list[Any]]:
        """What the control thread has said. Raises WorkerGone as `recv_data` does."""
        heard = []
        try:
            for packet in self._receive(self._control):
                if packet[0] == "part":
                    self._add_part(*packet[1:])
                    continue
                if packet[0] == "whole":
                    packet = self._put_together(*packet[1:])
                _check_word(packet)
                if packet[0] == "hello":
                    if self.pid is None:
                        self.is_born(packet[1])
                    packet[1] = self.pid  # the template's or the first word: later it can be no other one
                elif packet[0] in ("loaded", "load_failed", "proving"):
                    if packet[1] not in self._loads:
                        continue  # another worker's, or withdrawn
                    if packet[0] != "proving":
                        self._loads.remove(packet[1])
                    if packet[0] == "loaded" and packet[2]["instances"] >= self.arena.slots:
                        raise ValueError(
                            f"{packet[2]['instances']} runs at once, with {self.arena.slots} slots"
                        )
                heard.append(packet)
        except (AttributeError, KeyError, TypeError, ValueError) as e:
            raise self._gone_wrong(e) from None
        return heard

    def _add_part(self, instance: int, raw: bytes) -> None:
        """Keeps a part of a long answer. Raises ValueError beyond the bound, or for no load of ours."""
        if type(raw) is not bytes or instance not in self._loads:
            raise ValueError("a part of no load's answer")
        if instance != self._parts_of:
            self._parts_of, self._parts = instance, bytearray()
        if len(self._parts) + len(raw) > LOADED_BYTES_MAX:
            raise ValueError(f"an answer of more than {LOADED_BYTES_MAX} bytes")
        self._parts += raw

    def _put_together(self, instance: int) -> list[Any]:
        """The answer to a load whose parts have all come. Raises ValueError."""
        parts, self._parts = self._parts, bytearray()
        of, self._parts_of = self._parts_of, None
        try:
            packet = _unpack(memoryview(parts))
        except WorkerGone as e:
            raise ValueError(str(e)) from None
        if instance != of or packet[:2] != ["loaded", instance]:
            raise ValueError("parts that are no load's answer")
        return packet

    def _gone_wrong(self, error: Exception) -> WorkerGone:
        """It said what no worker says: whatever it is by now, it is ended."""
        self.kill()
        self._fault = f"it sent what no worker sends: {str(error)[:200]}"
        return WorkerGone(f"worker {self.pid}: {self._fault}")

    def kill(self) -> None:
        """Ends the process now; idempotent, also before its pid is known."""
        self._kill_asked = True
        if self._ended is None and self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def reap(self) -> str | None:
        """How the process ended (`exit 0`, `killed by SIGSEGV`), or None while it runs."""
        if self._ended is None:
            if self.process is not None:
                status = self.process.poll()
                self._ended = None if status is None else describe_exit(status)
            elif self.pid is None:
                if self.spawner is not None:
                    self.spawner.drain()
            else:
                self._ended = _wait(self.pid)
            if self._ended is not None and self._fault:
                self._ended = f"{self._fault}; {self._ended}"
        return self._ended

    def close(self) -> None:
        """Closes the sockets, at which the worker exits, and the arena; idempotent."""
        self._data.close()
        self._control.close()
        self.arena.close()

    def is_born(self, pid: int) -> None:
        """The pid became known; the spawner's and the hello's way to say so."""
        self.pid = pid
        if self._kill_asked:
            self.kill()

    def template_ended(self, why: str) -> None:
        """There is no process and there will be none; the spawner's way to say so."""
        if self.pid is None:
            self._ended = why

    def _send(self, to: socket.socket, raw: bytes, fd: int | None) -> bool:
        try:
            if fd is None:
                to.send(raw)
            else:
                socket.send_fds(to, [raw], [fd])
        except BlockingIOError:
            return False
        except OSError as e:
            if e.errno == errno.EMSGSIZE:
                raise
            raise WorkerGone(f"worker {self.pid} hung up: {e.strerror}") from None
        return True

    def _receive(self, source: socket.socket) -> list[list[Any]]:
        packets: list[list[Any]] = []
        reset = False
        while len(packets) < PACKETS_PER_TURN:
            try:
                size = source.recv_into(self._buffer)
            except BlockingIOError:
                break
            except OSError as e:
                if e.errno == errno.ECONNRESET and not reset:
                    # It ended with something unread; the kernel says so before it gives what it had said.
                    reset = True
                    continue
                return self._hang_up(packets, e.strerror or str(e))
            if size == 0:
                return self._hang_up(packets, "end of file")
            try:
                packets.append(_unpack(memoryview(self._buffer)[:size]))
            except WorkerGone as e:
                raise self._gone_wrong(e) from None
        return packets

    def _hang_up(self, packets: list[list[Any]], why: str) -> list[list[Any]]:
        """What was said before the end is still told; the next call raises."""
        if packets:
            return packets
        raise WorkerGone(f"worker {self.pid} hung up: {why}")

    def _read_large(self, packet: list[Any]) -> list[Any]:
        try:
            _, run_id, slot, offset, nbytes = packet
            if nbytes > LARGE_REPLY_BYTES_MAX:
                raise ValueError(f"a reply of {nbytes} bytes")
            done = _unpack(self.arena.read(slot, offset, nbytes))
        except (ArenaBoundsError, ValueError, TypeError) as e:
            raise WorkerGone(f"worker {self.pid} sent a reply that is none: {e}") from None
        if done[:3] != ["done", run_id, slot]:
            raise WorkerGone(f"worker {self.pid} sent a reply to another run")
        return done


class ProbeProcess:
    """A device being tried. `fd` becomes readable when there is a verdict, or the child is gone."""

    def __init__(self, runtime: str, device: str, fd: int, process: subprocess.Popen[bytes] | None) -> None:
        self.runtime = runtime
        self.device = device
        self.fd = fd
        self._process = process
        self._raw = b""
        self._killed = False
        self._verdict: dict[str, Any] | None = None

    @classmethod
    def answered(cls, runtime: str, device: str, answer: Mapping[str, Any]) -> ProbeProcess:
        """A probe that needs no child, since the answer is known."""
        reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        os.write(writer, json.dumps(answer).encode())
        os.close(writer)
        return cls(runtime, device, reader, None)

    def result(self) -> dict[str, Any] | None:
        """The verdict, or None while the child is at it. Never blocks."""
        if self._verdict is None and self._at_end():
            status = 0
            if self._process is not None:
                polled = self._process.poll()
                if polled is None:
                    return None  # it has closed its end and is about to exit
                status = polled
            self._verdict = self._judge(status)
            self.close()
        return self._verdict

    def kill(self) -> None:
        """Ends a child that takes too long: its verdict is `timeout`."""
        self._killed = True
        if self._process is not None and self._process.poll() is None:
            self._process.kill()

    def close(self) -> None:
        """Closes the descriptor and ends the child; idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        if self._process is not None and self._process.poll() is None:
            self._process.kill()

    def _at_end(self) -> bool:
        with contextlib.suppress(BlockingIOError):
            while chunk := os.read(self.fd, PROBE_REPLY_BYTES_MAX):
                self._raw = (self._raw + chunk)[:PROBE_REPLY_BYTES_MAX]
            return True
        return False

    def _judge(self, status: int) -> dict[str, Any]:
        with contextlib.suppress(ValueError):
            answer = json.loads(self._raw)
            if isinstance(answer, dict) and answer.get("status"):
                return verdict(**answer)
        if self._killed:
            return verdict(
                self.runtime,
                self.device,
                "timeout",
                hint="the driver hangs; look at dmesg, then reload it or restart the machine",
                detail="the probe did not end within its time",
            )
        return verdict(
            self.runtime,
            self.device,
            "driver_error",
            hint="the driver or runtime crashed while a tiny model ran; look at dmesg and reinstall it",
            detail=f"the probe ended without a verdict: {describe_exit(status)}",
        )


def verdict(
    runtime: str,
    device: str,
    status: str,
    *,
    hint: str = "",
    detail: str = "",
    runtime_version: str = "",
    full_name: str = "",
    precision_fast: str = "",
) -> dict[str, Any]:
    """A verdict with every key that one has."""
    return {
        "runtime": runtime,
        "device": device,
        "status": status,
        "hint": hint,
        "detail": detail,
        "runtime_version": runtime_version,
        "full_name": full_name,
        "precision_fast": precision_fast,
    }


def not_installed(runtime: str, device: str) -> dict[str, Any]:
    """The verdict for a runtime that is not there, with how to get it."""
    return verdict(
        runtime,
        device,
        "not_installed",
        hint=sites.get_hint(runtime, device),
        detail=f"Python package {runtime} is not installed",
    )


def describe_exit(status: int) -> str:
    """A return code as subprocess has it, in words."""
    if status >= 0:
        return f"exit {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"


def bootstrap(module: str, paths: Sequence[str] = ()) -> list[str]:
    """The interpreter's arguments that run `edged.MODULE`'s main; its own argument comes after them.

    `paths` go in front of what the interpreter finds by itself.
    """
    # -B: a service writes nowhere but to its own directories.
    return ["-B", "-c", _BOOTSTRAP, str(_PACKAGE), os.pathsep.join(paths), module]


def _settings(runtime: str, limits: WorkerLimits) -> dict[str, Any]:
    return {
        "runtime": runtime,
        "parent_pid": os.getpid(),
        "data_bytes": limits.data_bytes,
        "file_bytes": limits.file_bytes,
    }


def _pair(
    runtime: str, limits: WorkerLimits, slots: int
) -> tuple[WorkerProcess, socket.socket, socket.socket]:
    """A worker that has no process yet, and its ends of the sockets; the slots are on their way already."""
    data, their_data = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    control, their_control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (data, control):
        end.setblocking(False)
    worker = WorkerProcess(runtime, Arena(slots, bytes_max=limits.file_bytes), data, control)
    for slot in range(slots):
        worker.send_control(["slot", slot], worker.arena.fd(slot))
    return worker, their_data, their_control


def _wait(pid: int) -> str | None:
    """How the child ended, or None. A child that the kernel has not given us yet still runs."""
    try:
        done, status = os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return "exit unknown"
        return None
    return describe_exit(os.waitstatus_to_exitcode(status)) if done == pid else None


def _unpack(raw: memoryview) -> list[Any]:
    try:
        # A timestamp becomes a float, since an encoder of ours may meet it again.
        packet = msgpack.unpackb(raw, strict_map_key=False, timestamp=1, ext_hook=_no_extension)
    except (ValueError, TypeError, RecursionError) as e:  # TypeError: a map's key that cannot be one
        raise WorkerGone(f"a worker sent what is not msgpack: {e}") from None
    if not isinstance(packet, list) or not packet:
        raise WorkerGone("a worker sent what is no packet")
    return packet


def _no_extension(code: int, data: bytes) -> None:
    raise ValueError(f"an extension of type {code}")


def _check_answer(packet: list[Any]) -> None:
    """Raises ValueError unless this is an answer to a run; its outputs are checked when they are sent."""
    if packet[0] == "done":
        _, run_id, _, outputs, compute_ns = packet
        timed = type(compute_ns) is int and 0 <= compute_ns < COMPUTE_NS_MAX
        if type(run_id) is int and type(outputs) is list and timed:
            return
    elif packet[0] == "failed":
        _, run_id, _, code, reason, message = packet
        texts = (code, message, "" if reason is None else reason)
        if type(run_id) is int and all(type(text) is str for text in texts):
            return
    raise ValueError(f"{str(packet)[:200]} is no answer")


def _is_batch(batch: Any) -> bool:
    """Whether this is what a worker says of batches: as the supervisor reckons with these figures."""
    times = batch["times_us"]
    return (
        type(batch["max"]) is int
        and batch["max"] >= 1
        and type(batch["why"]) is str
        and type(times) is list
        and len(times) <= BATCH_TIMES_MAX
        and all(type(rows) is int and rows >= 1 for rows, _ in times)
        and all(type(us) in (int, float) and 0 <= us < math.inf for _, us in times)
    )


def _is_metadata(info: Mapping[str, Any]) -> bool:
    """Whether it tells its metadata, which is handed on as it is, or by how much it is too large."""
    if "metadata_excess" in info:
        nbytes, keys = info["metadata_excess"]
        return type(nbytes) is int and type(keys) is list and all(type(key) is str for key in keys)
    try:
        _metadata_decoder.decode(info["metadata"])
    except msgspec.MsgspecError:
        return False
    return True


def _is_measurement(result: Any) -> bool:
    """Whether this is what a measurer says: figures that can be reckoned with, or none, and a sentence."""
    if type(result) is not dict:
        return False
    figures = [
        result.get(f"{side}_{figure}")
        for side in ("reference", "candidate")
        for figure in ("p50_us", "p99_us", "rows_s")
    ]
    known = [figure for figure in figures if figure is not None]
    return (
        len(known) in (0, len(figures))
        and all(type(figure) in (int, float) and 0 < figure < math.inf for figure in known)
        and type(result.get("why", "")) is str
        and all(type(result.get(word)) is bool for word in ("agrees", "proven"))
        and (result.get("size") is None or is_size(result["size"]))
        and type(result.get("remedy", "")) is str
        and _is_list_of_texts(result.get("obstacles", []))
    )


def _is_list_of_texts(value: Any) -> bool:
    return type(value) is list and len(value) <= OBSTACLES_MAX and all(type(text) is str for text in value)


def _check_word(packet: list[Any]) -> None:
    """Raises unless this is something that a worker says on its control socket."""
    kind = packet[0]
    if kind == "hello":
        good = type(packet[1:] and packet[1]) is int and packet[1] > 0
    elif kind == "loaded":
        _, instance, info = packet
        specs = [TensorSpec.from_wire(wire) for wire in (*info["inputs"], *info["outputs"])]
        texts = [info["runtime"], info["device"], info["precision"], *[s.name for s in specs]]
        texts += [s.datatype for s in specs]
        good = type(instance) is int and all(type(text) is str for text in texts)
        good &= all(type(d) is int for s in specs for d in s.shape or ())
        good &= type(info["instances"]) is int and info["instances"] >= 1
        good &= _is_batch(info["batch"])
        good &= type(info.get("changes") or "") is str
        good &= type(info.get("load_ms") or 0) in (int, float)
        good &= type(info.get("rss_bytes") or 0) is int and _is_metadata(info)
        golden = info.get("golden_shapes") or []
        good &= type(golden) is list and len(golden) <= MEASURED_MAX and all(map(are_shapes, golden))
    elif kind == "proving":
        good = len(packet) == 2 and type(packet[1]) is int
    elif kind == "load_failed":
        _, instance, *texts = packet
        good = type(instance) is int and len(texts) == 3 and all(type(text) is str for text in texts)
    elif kind == "measured":
        good = len(packet) == 2 and _is_measurement(packet[1])
    else:
        good = kind == "unloaded" and len(packet) == 2
    if not good:
        raise ValueError(f"{str(packet)[:200]} is no packet of a worker's")
