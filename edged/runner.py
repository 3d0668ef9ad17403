"""The runs of a worker: threads that receive, run and answer, and the memory that they read and write.

Each run thread serves the one data socket: receive a run, view its inputs in the shared slot, run, write the
outputs behind them, answer. A packet goes to one of the threads that wait, answers are sent whole, and no
thread takes a lock on a request's way: what several touch is a dict of which each uses its own run's entry.
Loads, cancels and regions come from the worker's control thread. Runs on Python 3.10 too.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import socket
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np

from edged import arrays
from edged.arena import ALIGN_BYTES, SlotMap, aligned
from edged.errors import EdgedError, Internal, InvalidArgument
from edged.runtimes.base import DTYPES, Model, RunFailed, clean_text

__all__ = ["PACKET_BYTES_MAX", "Loaded", "Runner"]

PACKET_BYTES_MAX = 256 * 1024
"""Room for any packet: the kernel's default bound is 212,960 bytes."""

INLINE_REPLY_BYTES_MAX = 150_000
"""A reply beyond this goes through the slot; well below what the socket takes."""

LARGE_REPLY_BYTES_MAX = 16 << 20
"""Of one reply's sequences and maps: they stand in the reply's header, which its client reads at once."""

MESSAGE_CHARS_MAX = 2000
"""Of an error's message that takes more than a packet: it is for people."""

CANCELLED_MAX = 4096
"""Cancels kept for runs that have not begun; more than any queue between the two can hold."""

CANCEL_TRIES, CANCEL_PAUSE_S = 25, 0.002
"""A cancel that meets a run before the runtime has begun it is lost, so it is said again for 50 ms."""

SPIN_S = 600e-6
"""How long the next request is looked for without sleeping, while they come that fast one after the other."""

SWITCH_S = 0.0005
"""How long one of several run threads may hold the interpreter while another waits for it; Python's own 5 ms
are longer than many models run."""

REGION_WAIT_S = 2.0
"""How long a run waits for a region that the control thread has not been given yet: the two have sockets of
their own, and whichever is read first."""

IN_PLACE = frozenset({"FP16", "BF16", "FP32", "FP64"})
"""What may be read where the client can change it, if the model only computes with it. An integer may be an
index, and one that changes between a runtime's check and its use reads beyond the tensor."""

LARGE_TIMES, LARGE_BYTES_MIN, LARGE_FORGOTTEN_RUNS = 4, 1 << 20, 64
"""A run with inputs so many times larger than the others', and of at least that size, leaves the runtime with
memory that so many runs after it did not need: then it is given back. Sooner would make bursts slower."""

EXIT_FATAL = 70
"""The device failed under the process (EX_SOFTWARE): the supervisor starts another."""


@dataclass
class Loaded:
    """A model that is served, and what its runs must know of it."""

    model: Model
    output_names: list[str]
    datatypes: dict[str, str]
    optional_outputs: frozenset[str]
    steady_inputs: frozenset[str]
    """What the model reads may change while it runs."""
    most_bytes: int = 0
    """Of inputs, in the largest run since memory was given back."""
    runs_since: int = 0
    """Since one of about that size: then what it took is not needed again soon."""

    def note_size(self, nbytes: int) -> None:
        """Counts a run whose inputs take so much; gives memory back when the large ones are over."""
        if nbytes * LARGE_TIMES >= self.most_bytes:
            self.runs_since = 0
            if nbytes > self.most_bytes:
                self.most_bytes = nbytes
            return
        self.runs_since += 1
        if self.runs_since >= LARGE_FORGOTTEN_RUNS:
            if self.most_bytes >= LARGE_BYTES_MIN:
                self.model.shrink()
            self.most_bytes = nbytes


class Runner:
    """The run threads and what they share."""

    def __init__(self, data: socket.socket) -> None:
        self.models: dict[int, Loaded] = {}
        """By instance; written by the loader and the control thread."""
        self._data = data
        self._slots = SlotMap()
        self._regions: dict[int, mmap.mmap] = {}
        self._region_came = threading.Condition()  # only for a run that is ahead of its region
        self._running: dict[int, Model | None] = {}
        """What runs now, by run; None until its model is known."""
        self._cancelled: dict[int, None] = {}
        self._threads = 1

    # ------------------------------------------------------------------ the run threads

    def widen(self, threads: int) -> None:
        """Has at least so many run threads, the one that calls `serve` among them; never fewer again."""
        while self._threads < threads:
            self._threads += 1
            sys.setswitchinterval(SWITCH_S)
            threading.Thread(target=self._serve_or_end, name=f"run-{self._threads}", daemon=True).start()

    def _serve_or_end(self) -> None:
        status = 1
        try:
            self.serve()
            status = 0
        except (ConnectionResetError, BrokenPipeError):
            status = 0
        except BaseException:  # noqa: BLE001 - the thread's edge: said on stderr, which is the journal's
            traceback.print_exc()
        finally:
            os._exit(status)  # a worker with a thread less would leave its share of the runs undone

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
                self._spin(poller, replied_s + SPIN_S)
            size = receive(buffer)
            if size == 0:
                return
            # Whoever asked again so soon will do so once more; who comes at his own pace gains nothing by it.
            spins = may_spin and time.monotonic() - replied_s < SPIN_S
            packet = unpack(view[:size])
            reply = self._run(packet)
            raw = pack(reply)
            if len(raw) > INLINE_REPLY_BYTES_MAX:
                raw = pack(self._large_reply(reply, raw, packet[5]))
            send(raw)
            replied_s = time.monotonic()

    def _spin(self, poller: select.poll, until_s: float) -> None:
        """Returns when a packet is there, at `until_s` (CLOCK_MONOTONIC), or when another thread runs.

        A processor that is looked at here is then one that a run may want.
        """
        running = self._running
        while not running and not poller.poll(0) and time.monotonic() < until_s:
            os.sched_yield()

    def _run(self, packet: list[Any]) -> list[Any]:
        into = packet.pop() if len(packet) == 8 else None
        _, run_id, instance, slot, deadline_ns, inputs, wanted = packet
        self._running[run_id] = None
        try:
            if deadline_ns and time.monotonic_ns() > deadline_ns:
                message = "the deadline passed before the worker came to it"
                return ["failed", run_id, slot, "DEADLINE_EXCEEDED", "DEADLINE_PASSED", message]
            loaded = self.models[instance]
            self._running[run_id] = model = loaded.model
            if self._cancelled and run_id in self._cancelled:
                return ["failed", run_id, slot, "CANCELLED", "CANCELLED", "the request was cancelled"]
            feeds: dict[str, Any] = {}
            if into is not None:
                inputs[:] = self._leased_feeds(feeds, slot, inputs, loaded)
            end = max([offset + nbytes for _, _, _, offset, nbytes in inputs], default=0)
            loaded.note_size(end)
            buffer = self._slots.buffer(slot, end)
            for name, datatype, shape, offset, nbytes in inputs:
                dtype = DTYPES.get(datatype)
                if dtype is not None:
                    feeds[name] = np.ndarray(shape, dtype, buffer, offset)
                else:
                    feeds[name] = arrays.from_raw(datatype, shape, buffer[offset : offset + nbytes])
            names = wanted if wanted is not None else loaded.output_names
            began_ns = time.perf_counter_ns()
            if into is None:
                values = model.run(feeds, names, run_id)
            else:
                values = model.run(feeds, names, run_id, borrowed=True)
            compute_ns = time.perf_counter_ns() - began_ns
            return ["done", run_id, slot, self._write(slot, end, loaded, names, values, into), compute_ns]
        except Exception as e:  # noqa: BLE001 - the worker's edge: whatever a run raises becomes its answer
            return self._failed(run_id, instance, slot, e)
        finally:
            del self._running[run_id]
            if self._cancelled:
                self._cancelled.pop(run_id, None)

    # ------------------------------------------------------------------ inputs

    def _leased_feeds(
        self, feeds: dict[str, Any], slot: int, inputs: Sequence[list[Any]], loaded: Loaded
    ) -> list[list[Any]]:
        """Feeds what lies in leased memory; returns the inputs that lie in the slot.

        The client can write while the model runs. So only what cannot mislead a runtime is read in place, and
        only where it is aligned as the runtimes want it; the rest is copied first and then looked at. A
        batch's parts are copied next to each other, into the places in the slot that were left for them.
        """
        others: list[list[Any]] = []
        for row in inputs:
            if len(row) == 5:
                others.append(row)
                continue
            if len(row) == 7:
                self._gather(slot, row)
                others.append(row[:5])
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
            if datatype == "BOOL":
                _check_bool(name, array)
            feeds[name] = array
        return others

    def _gather(self, slot: int, row: Sequence[Any]) -> None:
        """Copies those rows of a batch's input that lie in leased memory into the slot."""
        name, datatype, _, offset, nbytes, _, copies = row
        buffer = memoryview(self._slots.buffer(slot, offset + nbytes))
        for region, at, to, size in copies:
            buffer[to : to + size] = memoryview(self._region(region))[at : at + size]
            if datatype == "BOOL":
                _check_bool(name, np.frombuffer(buffer, np.bool_, size, to))

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

    # ------------------------------------------------------------------ outputs

    def _write(
        self,
        slot: int,
        end: int,
        loaded: Loaded,
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
        kind, run_id, slot = reply[:3]
        if kind == "failed":  # a sentence with names of the model's in it
            return [*reply[:5], reply[5][:MESSAGE_CHARS_MAX] + "…"]
        if len(raw) > LARGE_REPLY_BYTES_MAX:
            return [
                "failed",
                run_id,
                slot,
                "RESOURCE_EXHAUSTED",
                "OUTPUT_TOO_LARGE",
                f"sequence and map outputs take {len(raw)} bytes, {LARGE_REPLY_BYTES_MAX} may be returned; "
                "ask for fewer rows at once or for other outputs, or export the model without them (ZipMap)",
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
        if isinstance(error, KeyError) and instance not in self.models:
            return ["failed", run_id, slot, "UNAVAILABLE", "MODEL_UNLOADED", "the model is not loaded here"]
        if isinstance(error, MemoryError):
            message = "the run needs more memory than the worker may have"
            return ["failed", run_id, slot, "RESOURCE_EXHAUSTED", "MEMORY_LIMIT", message]
        traceback.print_exception(type(error), error, error.__traceback__, file=sys.stderr)
        return ["failed", run_id, slot, "INTERNAL", "WORKER_ERROR", clean_text(error)]

    # ------------------------------------------------------------------ what the control thread does

    def add_slot(self, slot: int, fd: int) -> None:
        """Takes over a slot's descriptor."""
        self._slots.add(slot, fd)

    def add_region(self, region: int, fd: int) -> None:
        """Maps leased memory; runs that are ahead of it go on."""
        try:
            mapped = mmap.mmap(fd, os.fstat(fd).st_size)
        except OSError:
            return  # no address space: the run that needs it says so, the worker goes on
        finally:
            os.close(fd)
        with self._region_came:
            self._regions[region] = mapped
            self._region_came.notify_all()

    def drop_region(self, region: int) -> None:
        """Leased memory is gone: it is unmapped with the last array that is still on it."""
        self._regions.pop(region, None)

    def cancel(self, run_id: int) -> None:
        """Ends a run, whether it has begun or not; harmless for one that is over."""
        while len(self._cancelled) >= CANCELLED_MAX:
            with contextlib.suppress(KeyError, RuntimeError, StopIteration):  # a run took its own away
                del self._cancelled[next(iter(self._cancelled))]
        self._cancelled[run_id] = None
        for _ in range(CANCEL_TRIES):
            model = self._running.get(run_id)
            if model is not None:
                model.cancel(run_id)
            elif run_id not in self._running:
                return
            # No runtime tells that a run can be cancelled from now on; CANCEL_TRIES bounds it.
            time.sleep(CANCEL_PAUSE_S)

    def take_out(self, instance: int) -> Loaded | None:
        """Takes a model away, and returns it when none of its runs is going on any more.

        A run tells nobody of its end but the supervisor, and must not wait for who might listen: so it is
        looked for. A run that never ends is the supervisor's to bound: at its limit the worker is killed.
        """
        loaded = self.models.pop(instance, None)
        if loaded is not None:
            # Whatever began before it was taken away may use it; what begins now does not find it.
            going_on = tuple(self._running)
            while any(run_id in self._running for run_id in going_on):
                time.sleep(CANCEL_PAUSE_S)
        return loaded

    def shrink(self) -> None:
        """Has every model give back what memory it can."""
        for loaded in list(self.models.values()):
            loaded.model.shrink()


def _check_bool(name: str, array: Any) -> None:
    if array.size and array.view(np.uint8).max() > 1:
        raise InvalidArgument(f"input '{name}': a BOOL byte is 0 or 1", reason="BAD_DATA")
