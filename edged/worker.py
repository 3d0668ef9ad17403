"""The worker process: runs models, and as little else as it can.

The main thread, and as many more as the model has instances, are run threads: they serve the data socket and
do nothing else (`runner`). The control thread takes loads, cancels and the rest, and hands loads to a loader
thread, so that a model can be loaded, or its load withdrawn, while others run.

A worker trusts its supervisor and nobody else; the model it runs may kill it at any time, and must not be
able to do more than that. Runs on Python 3.10 too, with numpy, msgpack and a runtime.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import mmap
import os
import resource
import signal
import socket
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import msgpack
import numpy as np

from edged import agreement, arrays, batching, madeup
from edged.errors import Code
from edged.measuring import measure, no_result
from edged.properties import METADATA_BYTES_MAX, TENSORS_BYTES_MAX, largest, metadata_bytes
from edged.row_independence import Reading, changes, read_rows
from edged.runner import PACKET_BYTES_MAX, Loaded, Runner
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
from edged.runtimes.onnx_graph import Graph, steady_inputs
from edged.sizes import MEASURED_MAX, told
from edged.trial_rows import Sizes

__all__ = ["Worker", "WorkerSettings", "close_other_fds", "confine", "main", "run_worker"]

OOM_SCORE = 500
"""Under memory pressure the kernel should take a worker, never the supervisor."""

TRIAL_MAX_S = 3.0
"""After which a run of made-up rows is ended: the trial of batches plans for half a second."""

PART_BYTES = 128 * 1024
"""Of a long answer in one packet: well below what the socket takes, 212,960 bytes."""

TIMED_RUN_MAX_S = 0.25
"""A warm-up that took no longer is followed by runs whose time is what a request can expect."""


@dataclass(frozen=True)
class WorkerSettings:
    """What a worker is born with."""

    runtime: str
    data_fd: int
    control_fd: int
    parent_pid: int
    data_bytes: int | None = None
    file_bytes: int | None = None


class Worker:
    """The control thread, the loads, and the run threads that `serve` is one of."""

    def __init__(
        self, data: socket.socket, control: socket.socket, runtimes: Mapping[str, Runtime] | None = None
    ) -> None:
        self._control = control
        self._runtimes: dict[str, Runtime] = dict(runtimes or {})
        self._runner = Runner(data)
        self._loads: dict[int, LoadCancel] = {}
        self._loader_turn = threading.Lock()  # one load at a time, off every request's way

    def serve(self) -> None:
        """Serves runs until the supervisor hangs up."""
        self._runner.serve()

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
            self._runner.add_slot(packet[1], fds.pop())
        elif kind == "region":
            self._runner.add_region(packet[1], fds.pop())
        elif kind == "region_gone":
            self._runner.drop_region(packet[1])
        elif kind == "load":
            self._loads[packet[1]] = cancel = LoadCancel()
            self._start(self._load, packet[1], packet[2], cancel)
        elif kind == "measure":
            self._start(self._measure, packet[1], fds.pop() if fds else None)
        elif kind == "cancel_load":
            if packet[1] in self._loads:
                self._loads[packet[1]].cancel()
        elif kind == "cancel":
            self._runner.cancel(packet[1])
        elif kind == "unload":
            threading.Thread(target=self._unload, args=(packet[1],), name="unloader", daemon=True).start()
        elif kind == "shrink":
            self._runner.shrink()
            _trim_heap()
        elif kind == "exit":
            os._exit(0)
        for fd in fds:
            os.close(fd)

    def _unload(self, instance: int) -> None:
        loaded = self._runner.take_out(instance)
        if loaded is not None:
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

    def _say_whole(self, instance: int, packet: list[Any]) -> None:
        """The answer to a load, in parts where it is larger than a packet.

        No memory is passed for it: what a worker passes may be anything, and hold up who closes it.
        """
        raw = msgpack.packb(packet)
        if len(raw) > PART_BYTES:
            for at in range(0, len(raw), PART_BYTES):
                self._say(["part", instance, raw[at : at + PART_BYTES]])
            packet = ["whole", instance]
        self._say(packet)

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
        self._say_whole(instance, reply)

    def _load_and_prove(self, instance: int, settings: dict[str, Any], cancel: LoadCancel) -> list[Any]:
        runtime = self._runtime(settings["runtime"])
        began = time.perf_counter()
        cancel.check()
        model = runtime.load(load_request(settings), cancel)
        load_ms = (time.perf_counter() - began) * 1e3
        graph = _graph(runtime, settings)
        moody = changes(graph) if isinstance(graph, Graph) else ""
        try:
            tensors = _tensors(model)
            samples = agreement.read_golden(
                settings.get("golden_dir"), settings.get("golden") or (), model.inputs, model.outputs
            )
            began = time.perf_counter()
            warm = _warm_up(model, samples, settings, cancel, timed=not moody)
            warmup_ms = (time.perf_counter() - began) * 1e3
            checked = agreement.check_golden(model, samples, tolerance=settings.get("tolerance") or {})
            batch = _known_batch(settings, warm)
            if batch is None:
                self._say(["proving", instance])
                batch = _find_batch(model, graph, samples, settings, warm, cancel)
        except agreement.GoldenMismatch as e:
            model.close()
            raise LoadFailed("GOLDEN_MISMATCH", str(e)) from e
        except BaseException:
            model.close()
            raise
        cancel.check()
        self._runner.widen(model.instances)
        self._runner.models[instance] = Loaded(
            model,
            [s.name for s in model.outputs],
            {s.name: s.datatype for s in model.outputs},
            frozenset(s.name for s in model.outputs if s.datatype == "OPTIONAL"),
            steady_inputs(graph) if isinstance(graph, Graph) and _is_onnx(settings) else frozenset(),
        )
        return [
            "loaded",
            instance,
            {
                **tensors,
                **_told(model.metadata),
                "device": model.device,
                "runtime": runtime.name,
                "runtime_version": runtime.version,
                "precision": model.precision,
                "threads": model.threads,
                "instances": model.instances,
                "batch": batch.to_wire(),
                "changes": moody,
                "load_ms": load_ms,
                "warmup_ms": warmup_ms,
                "warmup_note": warm.note,
                "golden": checked,
                "golden_shapes": _golden_shapes(samples),
                "rss_bytes": rss_bytes(),
                "fallback_reason": model.fallback_reason,
            },
        ]

    def _measure(self, settings: dict[str, Any], inputs_fd: int | None) -> None:
        def load(part: Mapping[str, Any]) -> Model:
            runtime = self._runtime(part["runtime"])
            return runtime.load(load_request({**settings, **part}), LoadCancel())

        os.nice(settings.get("nice") or 0)
        try:
            owner_inputs = None
            if inputs_fd is not None:
                owner_inputs = read_inputs(inputs_fd, settings["owner_inputs"])
            result = measure(load, settings, owner_inputs)
        except Exception as e:  # noqa: BLE001 - the worker's edge: a measurement that fails says so and no more
            result = no_result(f"the measurement failed: {clean_text(e)}")
        self._say(["measured", result])


def _tensors(model: Model) -> dict[str, Any]:
    """A model's inputs and outputs. Raises LoadFailed for more of them than are told."""
    found = {
        "inputs": [s.to_wire() for s in model.inputs],
        "outputs": [s.to_wire() for s in model.outputs],
    }
    nbytes = len(msgpack.packb(found))
    if nbytes > TENSORS_BYTES_MAX:
        raise LoadFailed(
            "MODEL_UNSUPPORTED",
            f"names and shapes of its {len(model.inputs)} inputs and {len(model.outputs)} outputs take "
            f"{nbytes} bytes, the limit is {TENSORS_BYTES_MAX}; export it with fewer, or with shorter names",
            code=Code.UNIMPLEMENTED,
        )
    return found


def _told(metadata: Mapping[str, str]) -> dict[str, Any]:
    """A model's metadata, packed, since the supervisor only hands it on; or that it is too much."""
    nbytes = metadata_bytes(metadata)
    if nbytes > METADATA_BYTES_MAX:
        return {"metadata_excess": [nbytes, largest(metadata)]}
    return {"metadata": msgpack.packb(metadata)}


def read_inputs(fd: int, rows: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """The inputs in a memfd, which is closed: `rows` are (name, datatype, shape, offset, bytes).

    Raises InvalidArgument for BYTES that are none; the supervisor leaves many of them to the worker.
    """
    try:
        size = os.fstat(fd).st_size
        with mmap.mmap(fd, size, prot=mmap.PROT_READ) as memory:
            raw = memory.read(size)
    finally:
        os.close(fd)
    feeds: dict[str, Any] = {}
    for name, datatype, shape, offset, nbytes in rows:
        dtype = DTYPES.get(datatype)
        if dtype is None:
            feeds[name] = arrays.from_raw(datatype, shape, raw[offset : offset + nbytes])
        else:
            # A copy of its own: what a runtime is given must be aligned, and some write to it.
            feeds[name] = np.ndarray(shape, dtype, raw, offset).copy()
    return feeds


@dataclass(frozen=True)
class _Warmed:
    """How the warm-up went: what a run takes, and what went wrong."""

    us: float | None = None
    note: str | None = None


def _graph(runtime: Runtime, settings: Mapping[str, Any]) -> Graph | str:
    """What the model's file says it does, or why that is not known."""
    try:
        return runtime.graph(load_request(settings))
    except (ValueError, OSError) as e:
        return f"its graph cannot be read: {clean_text(e)}"


def _is_onnx(settings: Mapping[str, Any]) -> bool:
    return bool(settings.get("format", "onnx") == "onnx")


def _golden_shapes(samples: Sequence[agreement.Sample]) -> list[dict[str, list[int]]]:
    """The sizes of the golden samples, each once, for those who measure from outside."""
    found: list[dict[str, list[int]]] = []
    for sample in samples:
        shapes = told(madeup.shapes_of(sample.inputs))
        if shapes not in found and len(found) < MEASURED_MAX:
            found.append(shapes)
    return found


def _warm_up(
    model: Model,
    samples: Sequence[agreement.Sample],
    settings: Mapping[str, Any],
    cancel: LoadCancel,
    *,
    timed: bool,
) -> _Warmed:
    """Runs the model, so that the first request does not pay; what goes wrong is only noted.

    On a golden sample, else at the size that requests had most; where none is known a guess would cost the
    load more than it is worth, so free dimensions are 1, and larger only for a model that refuses that. With
    `timed` it is run for a short while more, to know what a request can expect.
    """
    runs = settings.get("warmup", 1)
    if runs < 1:
        return _Warmed(note="there is to be no warm-up")
    if samples:
        return _warm_up_on(model, samples[0].inputs, runs, cancel, timed=timed)
    sizes = madeup.sizes_to_try(model.inputs, settings)
    asked = [shapes for source, shapes in sizes if source == "requests"]
    guesses = [shapes for source, shapes in sizes if source == "typical"]
    smallest = sizes[-1][1]
    warm = _Warmed(note="there is no size to warm up at")
    for shapes in (*asked, smallest, *reversed(guesses)):
        try:
            feeds = agreement.synthetic_inputs(model.inputs, "ones", shapes=shapes)
            warm = _warm_up_on(model, feeds, runs, cancel, timed=timed)
        except agreement.NoInputs as e:
            warm = _Warmed(note=str(e))
        except LoadFailed as e:
            if e.reason != "MEMORY_LIMIT" or shapes == smallest:
                raise
            warm = _Warmed(note=e.message)
        if warm.note is None:
            break
    return warm


def _warm_up_on(
    model: Model, feeds: Mapping[str, Any], runs: int, cancel: LoadCancel, *, timed: bool
) -> _Warmed:
    names = [s.name for s in model.outputs]
    try:
        for _ in range(runs):
            cancel.check()
            began = time.perf_counter()
            model.run(feeds, names)
            taken_s = time.perf_counter() - began
        if timed and taken_s < TIMED_RUN_MAX_S:
            # Else the first run's time, with all that happens only once, must do.
            taken_s = batching.run_us(model, feeds, names)[1] / 1e6
    except RunFailed as e:
        if e.fatal:
            raise LoadFailed("DEVICE_FAILED", e.message, code=Code.UNAVAILABLE) from e
        if e.reason == "MEMORY_LIMIT":
            raise LoadFailed("MEMORY_LIMIT", e.message, code=Code.RESOURCE_EXHAUSTED) from e
        return _Warmed(note=e.message)
    return _Warmed(us=taken_s * 1e6)


def _known_batch(settings: Mapping[str, Any], warm: _Warmed) -> batching.Batch | None:
    """What need not be proved: the owner wants no batches, or a load before this one found it out."""
    wanted = settings.get("max_batch_size")
    if wanted == 1:
        alone = () if warm.us is None else ((1, round(warm.us, 1)),)
        return batching.Batch(1, alone, "max_batch_size is 1")
    known = batching.Batch.from_wire(settings.get("known_batch"))
    return known if known is not None and wanted in (None, known.max) else None


def _find_batch(
    model: Model,
    graph: Graph | str,
    samples: Sequence[agreement.Sample],
    settings: Mapping[str, Any],
    warm: _Warmed,
    cancel: LoadCancel,
) -> batching.Batch:
    """How many rows of different requests may share a run. Raises LoadFailed when the owner wants more."""
    wanted = settings.get("max_batch_size")
    alone = () if warm.us is None else ((1, round(warm.us, 1)),)
    if warm.note:
        why = warm.note
    else:
        finite = bool(settings.get("finite_inputs"))
        rules = batching.Rules(
            read_rows(graph, finite=finite) if isinstance(graph, Graph) else Reading(graph, {}),
            vouched=settings.get("rows") == "independent",
            exact=bool(settings.get("exact")),
            finite=finite,
        )
        timer = threading.Timer(TRIAL_MAX_S, model.cancel)
        timer.daemon = True
        if wanted is None:
            timer.start()
        try:
            return batching.explore(
                model,
                samples,
                rules=rules,
                wanted=wanted,
                likely=_likely_sizes(model, settings),
                check=cancel.check,
            )
        except (batching.NotBatchable, agreement.NoInputs) as e:
            why = str(e)
        except RunFailed as e:
            if e.fatal:
                raise LoadFailed("DEVICE_FAILED", e.message, code=Code.UNAVAILABLE) from e
            why = f"a run of made-up rows failed: {e.message}"
        finally:
            timer.cancel()
    if wanted is not None:
        raise LoadFailed("NOT_BATCHABLE", f"max_batch_size = {wanted} cannot be had: {why}")
    return batching.Batch(1, alone, why)


def _likely_sizes(model: Model, settings: Mapping[str, Any]) -> list[Sizes]:
    """Sizes of a row: what requests had, else typical ones, the smallest first, which cost a load the least.

    Where nothing is known of requests, a size that gains nothing from sharing runs must not keep smaller ones
    from it: what runs take is learned as they come.
    """
    names = {spec.name for spec in model.inputs}
    sizes = [each for each in madeup.sizes_to_try(model.inputs, settings) if set(each[1]) == names]
    known = [shapes for source, shapes in sizes if source == "requests"]
    guesses = [shapes for source, shapes in sizes if source == "typical"]
    return [
        {name: tuple(shape)[1:] for name, shape in shapes.items()} for shapes in (*known, *reversed(guesses))
    ]


def load_request(settings: Mapping[str, Any]) -> LoadRequest:
    """The runtime's part of a load's settings."""
    return LoadRequest(
        path=settings["path"],
        format=settings.get("format", "onnx"),
        device=settings.get("device", "CPU"),
        precision=settings.get("precision") or "f32",
        threads=settings.get("threads") or 1,
        instances=settings.get("instances") or 1,
        cache_dir=settings.get("cache_dir"),
        content=settings.get("content") or "",
    )


def rss_bytes() -> int:
    """The resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


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
