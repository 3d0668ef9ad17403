"""Memory that two processes share: it grows from either side, and neither can hurt the other with it."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from edged.arena import ALIGN_BYTES, SLOT_BYTES_MIN, Arena, ArenaBoundsError, SlotMap, aligned
from edged.errors import ResourceExhausted


@pytest.fixture
def arena() -> Iterator[Arena]:
    with Arena(2, bytes_max=1 << 24) as arena:
        yield arena


@pytest.fixture
def theirs(arena: Arena) -> Iterator[SlotMap]:
    slots = SlotMap()
    for slot in range(arena.slots):
        slots.add(slot, os.dup(arena.fd(slot)))
    yield slots
    slots.close()


def test_what_one_writes_the_other_reads(arena: Arena, theirs: SlotMap) -> None:
    """Both sides see the same bytes, in each slot its own."""
    arena.slot_view(0, 5)[:5] = b"hello"
    theirs.buffer(1, 5)[:5] = b"world"
    assert theirs.buffer(0, 5)[:5] == b"hello"
    assert bytes(arena.read(1, 0, 5)) == b"world"


def test_supervisor_grows_a_slot(arena: Arena, theirs: SlotMap) -> None:
    """The worker follows when the supervisor has grown a slot."""
    arena.slot_view(0, 1 << 20)[(1 << 20) - 1] = 7
    assert theirs.buffer(0, 1 << 20)[(1 << 20) - 1] == 7


def test_worker_grows_a_slot(arena: Arena, theirs: SlotMap) -> None:
    """The supervisor follows when the worker has grown a slot."""
    theirs.buffer(0, 1 << 20)[(1 << 20) - 1] = 7
    assert arena.read(0, (1 << 20) - 1, 1)[0] == 7


def test_view_outlives_growth_and_close(arena: Arena) -> None:
    """Bytes that are being sent stay readable, whatever happens to the slot."""
    arena.slot_view(0, 5)[:5] = b"hello"
    view = arena.read(0, 0, 5)
    arena.slot_view(0, 1 << 20)
    arena.close()
    assert bytes(view) == b"hello"


def test_view_of_a_reply_is_read_only(arena: Arena) -> None:
    """What a worker wrote cannot be changed by accident."""
    assert arena.read(0, 0, 4).readonly


@pytest.mark.parametrize(
    ("slot", "offset", "nbytes"),
    [
        (0, 0, SLOT_BYTES_MIN + 1),
        (0, SLOT_BYTES_MIN, 1),
        (0, -1, 1),
        (0, 0, -1),
        (2, 0, 1),
        (-1, 0, 1),
        (0, 1 << 63, 1),
    ],
)
def test_bytes_outside_the_slot_are_refused(arena: Arena, slot: int, offset: int, nbytes: int) -> None:
    """A worker cannot make the supervisor read what is not there."""
    with pytest.raises(ArenaBoundsError):
        arena.read(slot, offset, nbytes)


def test_slot_has_a_bound(arena: Arena) -> None:
    """Inputs beyond the bound are refused in words."""
    with pytest.raises(ResourceExhausted, match=str(1 << 24)):
        arena.slot_view(0, (1 << 24) + 1)
    assert len(arena.slot_view(0, 1 << 24)) == 1 << 24


def test_nobody_can_shrink_a_slot(arena: Arena) -> None:
    """A worker that truncates its slot would kill its reader: the kernel forbids it, and new seals too."""
    with pytest.raises(PermissionError):
        os.ftruncate(arena.fd(0), 0)
    with pytest.raises(PermissionError):
        fcntl.fcntl(arena.fd(0), fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)


def test_memory_is_given_back(arena: Arena, theirs: SlotMap) -> None:
    """A slot that was large takes no memory after it was shrunk, and can be used again."""
    arena.slot_view(0, 1 << 23)[:] = b"x" * (1 << 23)
    assert arena.memory_bytes() >= 1 << 23
    arena.shrink(0)
    assert arena.memory_bytes() == 0
    arena.slot_view(0, 5)[:5] = b"hello"
    assert theirs.buffer(0, 5)[:5] == b"hello"


def test_close_leaves_no_descriptors() -> None:
    """An arena that is gone has left no descriptor behind."""
    before = len(os.listdir("/proc/self/fd"))
    with Arena(8, bytes_max=1 << 20) as arena:
        arena.slot_view(3, 1 << 20)
        arena.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_workers_file_limit_bounds_a_slot(arena: Arena) -> None:
    """A worker that wants more than its RLIMIT_FSIZE gets a typed error, not a signal."""
    program = (
        "import resource, sys\n"
        "from edged.arena import SlotMap\n"
        "from edged.errors import ResourceExhausted\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "slots = SlotMap(); slots.add(0, int(sys.argv[1]))\n"
        "slots.buffer(0, 1 << 20)\n"
        "try:\n"
        "    slots.buffer(0, (1 << 20) + 1)\n"
        "except ResourceExhausted as e:\n"
        "    print(e.reason)\n"
    )
    fd = arena.fd(0)
    out = subprocess.run(
        [sys.executable, "-c", program, str(fd)], pass_fds=[fd], capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "OUTPUT_TOO_LARGE"


@pytest.mark.parametrize(
    ("offset", "want"), [(0, 0), (1, ALIGN_BYTES), (ALIGN_BYTES, ALIGN_BYTES), (65, 128)]
)
def test_alignment(offset: int, want: int) -> None:
    """Tensors begin at multiples of a cache line."""
    assert aligned(offset) == want
