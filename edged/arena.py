"""The memory that a worker and the supervisor share: one memfd per slot.

Owns the descriptors, their mappings and every bounds check on them. A slot holds one run: the inputs lie
from 0 on, each aligned to `ALIGN_BYTES`, and the worker writes the outputs behind them. Either side may
grow a slot, neither can shrink it (`F_SEAL_SHRINK`), so that no reader of a mapping can be killed by
SIGBUS. Memory goes back by punching the pages out: the size stays, the pages do not.

The supervisor has an `Arena`, the worker a `SlotMap`. Neither knows what the bytes mean. Free of numpy;
runs on Python 3.10 too.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import resource

from edged.errors import ResourceExhausted

__all__ = ["ALIGN_BYTES", "SLOT_BYTES_MIN", "Arena", "ArenaBoundsError", "SlotMap", "aligned"]

ALIGN_BYTES = 64
"""A cache line, and what the runtimes want in order to read an input in place."""

SLOT_BYTES_MIN = 1 << 16
"""What a slot is born with: address space only, since a memfd has no page that was not touched."""

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL


class ArenaBoundsError(Exception):
    """The other side named bytes that the slot does not have: a fault of that side, never a request's."""


def aligned(offset: int) -> int:
    """The first aligned offset at or behind `offset`."""
    return (offset + ALIGN_BYTES - 1) & -ALIGN_BYTES


def _grown(nbytes: int, bytes_max: int) -> int:
    """The size to grow to for `nbytes`: the next power of two, so that a slot grows seldom."""
    return min(max(SLOT_BYTES_MIN, 1 << (nbytes - 1).bit_length()), bytes_max)


class Arena:
    """The supervisor's side: `slots` memfds of at most `bytes_max` bytes each; a context manager.

    A view that was handed out keeps its mapping alive, also beyond growth and `close`.
    """

    def __init__(self, slots: int, *, bytes_max: int) -> None:
        self.slots = 0
        self.bytes_max = max(bytes_max, SLOT_BYTES_MIN)
        self._fds: list[int] = []
        self._maps: list[mmap.mmap] = []
        self._views: list[memoryview] = []
        try:
            for _ in range(slots):
                self.add_slot()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Arena:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Arena slots={self.slots} sizes={[len(m) for m in self._maps]}>"

    def add_slot(self) -> int:
        """One slot more; its number. Raises OSError when the system has no memory or descriptor for it."""
        slot = self.slots
        fd = os.memfd_create(f"edged-slot-{slot}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, SLOT_BYTES_MIN)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            mapped = mmap.mmap(fd, SLOT_BYTES_MIN)
        except OSError:
            os.close(fd)
            raise
        self._fds.append(fd)
        self._maps.append(mapped)
        self._views.append(memoryview(mapped))
        self.slots += 1
        return slot

    def fd(self, slot: int) -> int:
        """The slot's descriptor, to be passed to the worker once."""
        return self._fds[slot]

    def size_bytes(self, slot: int) -> int:
        """The slot's address space as mapped here; its memory may be less."""
        return len(self._maps[slot])

    def slot_view(self, slot: int, nbytes: int) -> memoryview:
        """A writable view of the slot's first bytes, at least `nbytes` long.

        Raises ResourceExhausted when the slot may not grow so far.
        """
        if nbytes > len(self._maps[slot]):
            if nbytes > self.bytes_max:
                raise ResourceExhausted(
                    f"the inputs take {nbytes} bytes, one run may have {self.bytes_max}",
                    reason="INPUT_TOO_LARGE",
                )
            if nbytes > os.fstat(self._fds[slot]).st_size:
                os.ftruncate(self._fds[slot], _grown(nbytes, self.bytes_max))
            self._remap(slot)
        return self._views[slot]

    def read(self, slot: int, offset: int, nbytes: int) -> memoryview:
        """A read-only view of bytes that the worker wrote.

        Raises ArenaBoundsError for anything that is not wholly inside the slot.
        """
        if not (0 <= slot < self.slots and offset >= 0 and nbytes >= 0):
            raise ArenaBoundsError(f"slot {slot}, offset {offset}, {nbytes} bytes")
        if offset + nbytes > len(self._maps[slot]):
            if offset + nbytes > os.fstat(self._fds[slot]).st_size:
                raise ArenaBoundsError(f"slot {slot} ends before {offset} + {nbytes}")
            self._remap(slot)
        return self._views[slot][offset : offset + nbytes].toreadonly()

    def shrink(self, slot: int) -> None:
        """Gives the slot's memory back; what it held reads as zeros. Only while no run uses the slot."""
        if self.size_bytes(slot) < os.fstat(self._fds[slot]).st_size:
            self._remap(slot)
        self._maps[slot].madvise(mmap.MADV_REMOVE)

    def memory_bytes(self) -> int:
        """The memory that the slots really take."""
        return sum(os.fstat(fd).st_blocks * 512 for fd in self._fds)

    def close(self) -> None:
        """Closes the descriptors; idempotent. The memory goes with the last view and the worker."""
        self._views.clear()
        self._maps.clear()
        while self._fds:
            os.close(self._fds.pop())

    def _remap(self, slot: int) -> None:
        """Maps the slot anew at its present size; older mappings live as long as their views."""
        self._maps[slot] = mmap.mmap(self._fds[slot], os.fstat(self._fds[slot]).st_size)
        self._views[slot] = memoryview(self._maps[slot])


class SlotMap:
    """The worker's side: maps the slots that the supervisor passed."""

    def __init__(self) -> None:
        self._fds: dict[int, int] = {}
        self._maps: dict[int, mmap.mmap] = {}

    def add(self, slot: int, fd: int) -> None:
        """Takes over a slot's descriptor."""
        mapped = mmap.mmap(fd, os.fstat(fd).st_size)
        old = self._fds.pop(slot, None)
        self._fds[slot] = fd
        self._maps[slot] = mapped
        if old is not None:
            os.close(old)

    def buffer(self, slot: int, nbytes: int) -> mmap.mmap:
        """The slot's mapping, at least `nbytes` long; grows the slot when it is shorter.

        Raises ResourceExhausted when the process's file limit forbids that.
        """
        mapped = self._maps[slot]
        if nbytes <= len(mapped):
            return mapped
        fd = self._fds[slot]
        if nbytes > os.fstat(fd).st_size:
            limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
            bytes_max = limit if limit != resource.RLIM_INFINITY else 1 << 62
            try:
                os.ftruncate(fd, max(nbytes, _grown(nbytes, bytes_max)))
            except OSError:
                raise ResourceExhausted(
                    f"inputs and outputs of this run take {nbytes} bytes, one run may have {bytes_max}; "
                    "ask for fewer outputs or send a smaller input",
                    reason="OUTPUT_TOO_LARGE",
                ) from None
        mapped = mmap.mmap(fd, os.fstat(fd).st_size)
        self._maps[slot] = mapped
        return mapped

    def close(self) -> None:
        """Closes the descriptors; idempotent."""
        self._maps.clear()
        while self._fds:
            os.close(self._fds.popitem()[1])
