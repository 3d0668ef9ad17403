"""The worker process: runs models, and as little else as it can.

Three threads. The main thread only serves the data socket: receive a run, view its inputs in the shared
slot, run, write the outputs behind them, answer. The control thread takes loads, cancels and the rest, and
hands loads to a loader thread, so that a model can be loaded, or its load withdrawn, while others run. They
share no lock on the way of a request: what both touch is a plain attribute with one writer.

A worker trusts its supervisor and nobody else; the model it runs may kill it at any time, and must not be
able to do more than that. Runs on Python 3.10 too, with numpy, msgpack and a runtime.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import json
import mmap
import os
import resource
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import msgpack
import numpy as np

from edged import agreement, arrays
from edged.arena import ALIGN_BYTES, SlotMap, aligned
from edged.errors import Code, EdgedError, Internal, InvalidArgument
from edged.runtimes.base import (
    DTYPES,
    LoadCancel,
    LoadFailed,
    LoadRequest,
    Model,
    RunFailed,
    Runtime,
    clean_text,
    create_runtime,
    silence_telemetry,
)
from edged.runtimes.onnxfile import steady_inputs

__all__ = ["Worker", "WorkerSettings", "close_other_fds", "confine", "main", "run_worker"]

PACKET_BYTES_MAX = 256 * 1024
"""Room for any packet: the kernel's default bound is 212,960 bytes."""

INLINE_REPLY_BYTES_MAX = 150_000
"""A reply beyond this goes through the slot; well below what the socket takes."""

LARGE_REPLY_BYTES_MAX = 16 << 20
"""Of one reply's sequences and maps: they stand in the reply's header, which its client reads at once."""

CANCELLED_MAX = 4096
"""Cancels kept for runs that have not begun; more than any queue between the two can hold."""

CANCEL_TRIES, CANCEL_PAUSE_S = 25, 0.002
"""A cancel that meets a run before the runtime has begun it is lost, so it is said again for 50 ms."""

OOM_SCORE = 500
"""Under memory pressure the kernel should take a worker, never the supervisor."""

SPIN_S = 600e-6
"""How long the next request is looked for without sleeping, while they come that fast one after the other."""

REGION_WAIT_S = 2.0
"""How long a run waits for a region that the control thread has not been given yet: the two have sockets of
their own, and whichever is read first."""

IN_PLACE = frozenset({"FP16", "BF16", "FP32", "FP64"})
"""What may be read where the client can change it, if the model only computes with it. An integer may be an
index, and one that changes between a runtime's check and its use reads beyond the tensor."""

EXIT_FATAL = 70
"""The device failed under the process (EX_SOFTWARE): the supervisor starts another."""


@dataclass(frozen=True)
class WorkerSettings:
    """What a worker is born with."""

    runtime: str
    data_fd: int
    control_fd: int
    parent_pid: int
    data_bytes: int | None = None
    file_bytes: int | None = None


@dataclass
class _Loaded:
    model: Model
    output_names: list[str]
    datatypes: dict[str, str]
    optional_outputs: frozenset[str]
    steady_inputs: frozenset[str]
    """What the model reads may change while it runs."""


class Worker:
    """The three threads and what they share."""

    def __init__(
        self, data: socket.socket, control: socket.socket, runtimes: Mapping[str, Runtime] | None = None
    ) -> None:
        self._data = data
        self._control = control
        self._runtimes: dict[str, Runtime] = dict(runtimes or {})
        self._slots = SlotMap()
        self._regions: dict[int, mmap.mmap] = {}
        self._region_came = threading.Condition()  # only for a run that is ahead of its region
        self._models: dict[int, _Loaded] = {}
        self._loads: dict[int, LoadCancel] = {}
        self._running: int | None = None
        self._running_model: Model | None = None
        self._cancelled: dict[int, None] = {}
        self._loader_turn = threading.Lock()  # one load at a time, off every request's way

    # The main thread.

    def serve(self) -> None:
        """Serves runs until the supervisor hangs up."""
        buffer = bytearray(PACKET_BYTES_MAX)
        view = memoryview(buffer)
        receive, send, unpack, pack = self._data.recv_into, self._data.send, msgpack.unpackb, msgpack.packb
        poller = select.poll()
        poller.register(self._data, select.POLLIN)
        may_spin = len(os.sched_getaffinity(0)) > 1
        replied_s, spins = 0.0, False
        while True:
            if spins:
                _spin(poller, replied_s + SPIN_S)
            size = receive(buffer)
            if size == 0:
                return
            # Whoever asked again so soon will do so once more; who comes at his own pace gains nothing by it.
            spins = may_spin and time.monotonic() - replied_s < SPIN_S
            packet = unpack(view[:size])
            reply = self._run(packet)
            raw = pack(reply)
            if len(raw) > INLINE_REPLY_BYTES_MAX:
                raw = pack(self._large_reply(reply, raw, packet[4]))
            send(raw)
            replied_s = time.monotonic()

    def _run(self, packet: list[Any]) -> list[Any]:
        into = packet.pop() if len(packet) == 7 else None
        _, run_id, instance, slot, inputs, wanted = packet
        self._running = run_id
        model: Model | None = None
        try:
            loaded = self._models[instance]
            self._running_model = model = loaded.model
            if self._cancelled and run_id in self._cancelled:
                return ["failed", run_id, slot, "CANCELLED", "CANCELLED", "the request was cancelled"]
            feeds: dict[str, Any] = {}
            if into is not None:
                inputs[:] = self._leased_feeds(feeds, inputs, loaded)
            end = max([offset + nbytes for _, _, _, offset, nbytes in inputs], default=0)
            buffer = self._slots.buffer(slot, end)
            for name, datatype, shape, offset, nbytes in inputs:
                dtype = DTYPES.get(datatype)
                if dtype is not None:
                    feeds[name] = np.ndarray(shape, dtype, buffer, offset)
                else:
                    feeds[name] = arrays.from_raw(datatype, shape, buffer[offset : offset + nbytes])
            names = wanted if wanted is not None else loaded.output_names
            began_ns = time.perf_counter_ns()
            values = model.run(feeds, names)
            compute_ns = time.perf_counter_ns() - began_ns
            return ["done", run_id, slot, self._write(slot, end, loaded, names, values, into), compute_ns]
        except Exception as e:  # noqa: BLE001 - the worker's edge: whatever a run raises becomes its answer
            return self._failed(run_id, instance, slot, e)
        finally:
            self._running = self._running_model = None
            if into is not None and model is not None:
                model.forget_inputs()
            if self._cancelled:
                self._cancelled.pop(run_id, None)

    def _leased_feeds(
        self, feeds: dict[str, Any], inputs: Sequence[list[Any]], loaded: _Loaded
    ) -> list[list[Any]]:
        """Feeds what lies in leased memory; returns the other inputs.

        The client can write while the model runs. So only what cannot mislead a runtime is read in place, and
        only where it is aligned as the runtimes want it; the rest is copied first and then looked at.
        """
        others: list[list[Any]] = []
        for row in inputs:
            if len(row) == 5:
                others.append(row)
                continue
            name, datatype, shape, offset, nbytes, region = row
            buffer = self._region(region)
            dtype = DTYPES.get(datatype)
            if dtype is None:
                feeds[name] = arrays.from_raw(datatype, shape, buffer[offset : offset + nbytes])
                continue
            array = np.ndarray(shape, dtype, buffer, offset)
            if datatype not in IN_PLACE or name not in loaded.steady_inputs or offset % ALIGN_BYTES:
                array = array.copy()
            if datatype == "BOOL" and array.size and array.view(np.uint8).max() > 1:
                raise InvalidArgument(f"input '{name}': a BOOL byte is 0 or 1", reason="BAD_DATA")
            feeds[name] = array
        return others

    def _region(self, region: int) -> mmap.mmap:
        """A region's mapping, of which the control thread may be about to hear."""
        found = self._regions.get(region)
        if found is None:
            with self._region_came:
                self._region_came.wait_for(lambda: region in self._regions, REGION_WAIT_S)
            found = self._regions.get(region)
        if found is None:
            raise Internal("the leased memory could not be mapped by the worker", reason="REGION_NOT_MAPPED")
        return found

    def _add_region(self, region: int, fd: int) -> None:
        try:
            mapped = mmap.mmap(fd, os.fstat(fd).st_size)
        except OSError:
            return  # no address space: the run that needs it says so, the worker goes on
        finally:
            os.close(fd)
        with self._region_came:
            self._regions[region] = mapped
            self._region_came.notify_all()

    def _write(
        self,
        slot: int,
        end: int,
        loaded: _Loaded,
        names: Sequence[str],
        values: Sequence[Any],
        into: Mapping[str, list[int]] | None,
    ) -> list[list[Any]]:
        """Puts the outputs behind the inputs, or where `into` says, and tells where they lie."""
        placed: list[list[Any]] = []
        writes: list[tuple[int, Any]] = []
        at = end
        landings: list[tuple[mmap.mmap, int, Any]] = []
        for name, value in zip(names, values):  # noqa: B905 - strict= is Python 3.10's, and costs on the hot path
            if not isinstance(value, np.ndarray) or name in loaded.optional_outputs:
                if isinstance(value, np.generic):
                    value = np.asarray(value)
                else:
                    datatype, data = arrays.value_to_wire(value)
                    # Packed already, so that the supervisor need not take millions of numbers apart.
                    placed.append([name, datatype, None, None, None, msgpack.packb(data)])
                    continue
            datatype = loaded.datatypes[name]
            raw: Any = value
            if DTYPES.get(datatype) != value.dtype or not value.flags.c_contiguous:
                datatype, _, raw = arrays.to_raw(value)
            nbytes = raw.nbytes if isinstance(raw, (np.ndarray, memoryview)) else len(raw)
            if into is not None and name in into:
                region, offset, bytes_max = into[name]
                if nbytes > bytes_max:
                    raise InvalidArgument(
                        f"output '{name}' has {nbytes} bytes, the place for it {bytes_max}; "
                        "name a larger piece of the region",
                        reason="OUTPUT_DOES_NOT_FIT",
                    )
                # The supervisor knows the place; the client's memory is none to be told an offset of.
                placed.append([name, datatype, value.shape, 0, nbytes])
                if nbytes:
                    landings.append((self._region(region), offset, raw))
                continue
            at = aligned(at)
            placed.append([name, datatype, value.shape, at, nbytes])
            if nbytes:
                writes.append((at, raw))
            at += nbytes
        if writes:
            buffer = self._slots.buffer(slot, at)
            for offset, raw in writes:
                if isinstance(raw, np.ndarray):
                    buffer[offset : offset + raw.nbytes] = raw.data
                else:
                    buffer[offset : offset + len(raw)] = raw
        for buffer, offset, raw in landings:
            nbytes = raw.nbytes if isinstance(raw, (np.ndarray, memoryview)) else len(raw)
            buffer[offset : offset + nbytes] = raw.data if isinstance(raw, np.ndarray) else raw
        return placed

    def _large_reply(self, reply: list[Any], raw: bytes, inputs: list[Any]) -> list[Any]:
        """A reply that is too large for a packet, put behind everything else in the slot."""
        _, run_id, slot = reply[:3]
        if len(raw) > LARGE_REPLY_BYTES_MAX:
            return [
                "failed",
                run_id,
                slot,
                "RESOURCE_EXHAUSTED",
                "OUTPUT_TOO_LARGE",
                f"sequence and map outputs take {len(raw)} bytes, {LARGE_REPLY_BYTES_MAX} may be returned; "
                "ask for fewer outputs",
            ]
        ends = [t[3] + t[4] for t in (*inputs, *reply[3]) if t[3] is not None]
        at = aligned(max(ends, default=0))
        try:
            self._slots.buffer(slot, at + len(raw))[at : at + len(raw)] = raw
        except EdgedError as e:
            return ["failed", run_id, slot, e.code.value, e.reason, e.message]
        return ["done_large", run_id, slot, at, len(raw)]

    def _failed(self, run_id: int, instance: int, slot: int, error: Exception) -> list[Any]:
        if isinstance(error, RunFailed):
            reply = ["failed", run_id, slot, error.code, error.reason, error.message]
            if error.fatal:
                self._data.send(msgpack.packb(reply))
                os._exit(EXIT_FATAL)
            return reply
        if isinstance(error, EdgedError):
            return ["failed", run_id, slot, error.code.value, error.reason, error.message]
        if isinstance(error, KeyError) and instance not in self._models:
            return ["failed", run_id, slot, "UNAVAILABLE", "MODEL_UNLOADED", "the model is not loaded here"]
        if isinstance(error, MemoryError):
            message = "the run needs more memory than the worker may have"
            return ["failed", run_id, slot, "RESOURCE_EXHAUSTED", "MEMORY_LIMIT", message]
        traceback.print_exception(type(error), error, error.__traceback__, file=sys.stderr)
        return ["failed", run_id, slot, "INTERNAL", "WORKER_ERROR", clean_text(error)]

    # The control thread.

    def start_control(self) -> None:
        """Starts the control thread, which greets the supervisor first."""
        self._say(["hello", os.getpid(), {n: r.version for n, r in self._runtimes.items()}])
        threading.Thread(target=self._serve_control, name="control", daemon=True).start()

    def _serve_control(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                raw, fds, _, _ = socket.recv_fds(self._control, PACKET_BYTES_MAX, 1)
                if not raw:
                    break
                self._command(msgpack.unpackb(raw, strict_map_key=False), fds)
        # Nobody is left to answer to, and the main thread may be deep in a run.
        os._exit(0)

    def _command(self, packet: list[Any], fds: list[int]) -> None:
        kind = packet[0]
        if kind == "slot":
            self._slots.add(packet[1], fds.pop())
        elif kind == "region":
            self._add_region(packet[1], fds.pop())
        elif kind == "region_gone":
            self._regions.pop(packet[1], None)  # unmapped with the last array that is still on it
        elif kind == "load":
            self._loads[packet[1]] = cancel = LoadCancel()
            self._start(self._load, packet[1], packet[2], cancel)
        elif kind == "measure":
            self._start(self._measure, packet[1])
        elif kind == "cancel_load":
            if packet[1] in self._loads:
                self._loads[packet[1]].cancel()
        elif kind == "cancel":
            self._cancel(packet[1])
        elif kind == "unload":
            threading.Thread(target=self._unload, args=(packet[1],), name="unloader", daemon=True).start()
        elif kind == "shrink":
            for loaded in list(self._models.values()):
                loaded.model.shrink()
            _trim_heap()
        elif kind == "exit":
            os._exit(0)
        for fd in fds:
            os.close(fd)

    def _cancel(self, run_id: int) -> None:
        while len(self._cancelled) >= CANCELLED_MAX:
            self._cancelled.pop(next(iter(self._cancelled)))
        self._cancelled[run_id] = None
        for _ in range(CANCEL_TRIES):
            model = self._running_model
            if self._running != run_id:
                return
            if model is not None:
                model.cancel()
            time.sleep(CANCEL_PAUSE_S)

    def _unload(self, instance: int) -> None:
        loaded = self._models.pop(instance, None)
        if loaded is not None:
            # Whatever began before it was taken away may use it; what begins now does not find it.
            going_on = self._running
            while going_on is not None and self._running == going_on:
                time.sleep(CANCEL_PAUSE_S)
            loaded.model.close()
            del loaded
            gc.collect()
            _trim_heap()
        self._say(["unloaded", instance])

    def _start(self, work: Any, *arguments: Any) -> None:
        def turn() -> None:
            with self._loader_turn:
                work(*arguments)

        threading.Thread(target=turn, name="loader", daemon=True).start()

    def _say(self, packet: list[Any]) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._control.send(msgpack.packb(packet))

    # The loader thread.

    def _runtime(self, name: str) -> Runtime:
        runtime = self._runtimes.get(name)
        if runtime is None:
            try:
                runtime = self._runtimes[name] = create_runtime(name)
            except (ImportError, KeyError) as e:
                raise LoadFailed(
                    "DEVICE_FAILED", f"runtime {name} is not installed: {e}", code=Code.UNAVAILABLE
                ) from e
        return runtime

    def _load(self, instance: int, settings: dict[str, Any], cancel: LoadCancel) -> None:
        timer = None
        timed_out = threading.Event()
        if settings.get("timeout_s"):

            def expire() -> None:
                timed_out.set()
                cancel.cancel()

            timer = threading.Timer(settings["timeout_s"], expire)
            timer.daemon = True
            timer.start()
        try:
            reply = self._load_and_prove(instance, settings, cancel)
        except LoadFailed as e:
            if timed_out.is_set() and e.reason == "LOAD_CANCELLED":
                e = LoadFailed(
                    "LOAD_TIMEOUT",
                    f"the load took longer than {settings['timeout_s']:g} s",
                    code=Code.DEADLINE_EXCEEDED,
                )
            reply = ["load_failed", instance, e.code, e.reason, e.message]
        except MemoryError:
            message = "loading needs more memory than the worker may have"
            reply = ["load_failed", instance, "RESOURCE_EXHAUSTED", "MEMORY_LIMIT", message]
        except Exception as e:  # noqa: BLE001 - the worker's edge: bad models raise anything at all
            reply = ["load_failed", instance, "FAILED_PRECONDITION", "MODEL_LOAD_FAILED", clean_text(e)]
        finally:
            if timer is not None:
                timer.cancel()
            self._loads.pop(instance, None)
        try:
            self._say(reply)
        except OSError as e:
            if e.errno != errno.EMSGSIZE:
                raise
            self._models.pop(instance).model.close()
            message = "its names, shapes and metadata take more room than a packet has (about 200 KB)"
            self._say(["load_failed", instance, "UNIMPLEMENTED", "MODEL_UNSUPPORTED", message])

    def _load_and_prove(self, instance: int, settings: dict[str, Any], cancel: LoadCancel) -> list[Any]:
        runtime = self._runtime(settings["runtime"])
        began = time.perf_counter()
        cancel.check()
        model = runtime.load(load_request(settings), cancel)
        load_ms = (time.perf_counter() - began) * 1e3
        try:
            samples = agreement.read_golden(
                settings.get("golden_dir"), settings.get("golden") or (), model.inputs, model.outputs
            )
            began = time.perf_counter()
            note = _warm_up(model, samples, settings.get("warmup", 1), cancel)
            warmup_ms = (time.perf_counter() - began) * 1e3
            checked = agreement.check_golden(model, samples, tolerance=settings.get("tolerance") or {})
        except agreement.GoldenMismatch as e:
            model.close()
            raise LoadFailed("GOLDEN_MISMATCH", str(e)) from e
        except BaseException:
            model.close()
            raise
        cancel.check()
        self._models[instance] = _Loaded(
            model,
            [s.name for s in model.outputs],
            {s.name: s.datatype for s in model.outputs},
            frozenset(s.name for s in model.outputs if s.datatype == "OPTIONAL"),
            steady_inputs(settings["path"]) if settings.get("format") == "onnx" else frozenset(),
        )
        return [
            "loaded",
            instance,
            {
                "inputs": [s.to_wire() for s in model.inputs],
                "outputs": [s.to_wire() for s in model.outputs],
                "metadata": model.metadata,
                "device": model.device,
                "runtime": runtime.name,
                "runtime_version": runtime.version,
                "precision": model.precision,
                "threads": model.threads,
                "load_ms": load_ms,
                "warmup_ms": warmup_ms,
                "warmup_note": note,
                "golden": checked,
                "rss_bytes": rss_bytes(),
                "fallback_reason": model.fallback_reason,
            },
        ]

    def _measure(self, settings: dict[str, Any]) -> None:
        def load(part: Mapping[str, Any]) -> Model:
            runtime = self._runtime(part["runtime"])
            return runtime.load(load_request({**settings, **part}), LoadCancel())

        try:
            result = agreement.measure(load, settings)
        except Exception as e:  # noqa: BLE001 - the worker's edge: a measurement that fails says so and no more
            result = agreement.no_result(f"the measurement failed: {clean_text(e)}")
        self._say(["measured", result])


def _warm_up(model: Model, samples: Sequence[agreement.Sample], runs: int, cancel: LoadCancel) -> str | None:
    """Runs the model, so that the first request does not pay; what goes wrong is only noted."""
    if runs < 1:
        return None
    names = [s.name for s in model.outputs]
    try:
        feeds = samples[0].inputs if samples else agreement.synthetic_inputs(model.inputs, "ones")
        for _ in range(runs):
            cancel.check()
            model.run(feeds, names)
    except RunFailed as e:
        if e.fatal:
            raise LoadFailed("DEVICE_FAILED", e.message, code=Code.UNAVAILABLE) from e
        if e.reason == "MEMORY_LIMIT":
            raise LoadFailed("MEMORY_LIMIT", e.message, code=Code.RESOURCE_EXHAUSTED) from e
        return e.message
    except agreement.NoInputs as e:
        return str(e)
    return None


def load_request(settings: Mapping[str, Any]) -> LoadRequest:
    """The runtime's part of a load's settings."""
    return LoadRequest(
        path=settings["path"],
        format=settings.get("format", "onnx"),
        device=settings.get("device", "CPU"),
        precision=settings.get("precision") or "f32",
        threads=settings.get("threads") or 1,
        cache_dir=settings.get("cache_dir"),
    )


def rss_bytes() -> int:
    """The resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _spin(poller: select.poll, until_s: float) -> None:
    """Returns when a packet is there, or at `until_s` (CLOCK_MONOTONIC)."""
    while not poller.poll(0) and time.monotonic() < until_s:
        os.sched_yield()


def _trim_heap() -> None:
    """Gives freed memory back to the system; glibc keeps it otherwise."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


_PR_SET_PDEATHSIG, _PR_SET_NAME, _PR_SET_NO_NEW_PRIVS = 1, 15, 38
"""From linux/prctl.h."""


def confine(settings: WorkerSettings) -> None:
    """Takes from this process what a worker does not need.

    It dies with the supervisor, gains no privileges, dumps no core, ignores the signals that a terminal or
    systemd send to the whole group (the supervisor decides when a worker ends), and has two sockets.
    """
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != settings.parent_pid:
        os._exit(0)  # the supervisor died before it could be watched
    prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    prctl(_PR_SET_NAME, f"edged:{settings.runtime}"[:15].encode(), 0, 0, 0)
    for ignored in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGXFSZ, signal.SIGPIPE):
        signal.signal(ignored, signal.SIG_IGN)
    os.dup2(2, 1)  # what a library prints is no answer to anybody
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for limit, value in (
        (resource.RLIMIT_DATA, settings.data_bytes),
        (resource.RLIMIT_FSIZE, settings.file_bytes),
    ):
        if value is not None:
            hard = resource.getrlimit(limit)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(limit, (value, value))
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE))


def close_other_fds(keep: Sequence[int]) -> None:
    """Closes what was inherited; before a runtime is imported, which may open descriptors of its own."""
    for fd in [int(name) for name in os.listdir("/proc/self/fd")]:
        if fd > 2 and fd not in keep:
            with contextlib.suppress(OSError):  # the listing's own descriptor is closed by now
                os.close(fd)


def run_worker(settings: WorkerSettings, runtimes: Mapping[str, Runtime]) -> NoReturn:
    """Confines this process and serves until the supervisor hangs up; never returns."""
    status = 1
    try:
        confine(settings)
        with (
            socket.socket(fileno=settings.data_fd) as data,
            socket.socket(fileno=settings.control_fd) as control,
        ):
            gc.freeze()
            worker = Worker(data, control, runtimes)
            worker.start_control()
            worker.serve()
            status = 0
    except (ConnectionResetError, BrokenPipeError):
        status = 0
    except BaseException:  # noqa: BLE001 - the process's edge: said on stderr, which is the journal's
        traceback.print_exc()
    finally:
        # Destructors of a runtime's threads are no reason to linger, nor to crash on the way out.
        os._exit(status)


def main(arguments: Sequence[str]) -> NoReturn:
    """An exec'd worker: one argument, the settings as JSON."""
    silence_telemetry()
    settings = WorkerSettings(**json.loads(arguments[0]))
    close_other_fds((settings.data_fd, settings.control_fd))
    runtimes = {} if not settings.runtime else {settings.runtime: create_runtime(settings.runtime)}
    run_worker(settings, runtimes)
