"""A run's inputs lie in the slot as the worker expects: aligned, and a batch's rows without a gap."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from edged.arena import ALIGN_BYTES
from edged.assembly import batch_bytes, inputs_bytes, place_batch, place_inputs
from edged.messages import Peer, RegionPart, TensorData
from edged.scheduler import Job


def tensor(name: str, array: Any, part: RegionPart | None = None) -> TensorData:
    """An input with its bytes, or with the place where they lie."""
    raw = b"" if part is not None else array.tobytes()
    return TensorData(name, "FP32", list(array.shape), raw, part)


def job(*inputs: TensorData) -> Job:
    """A job with these inputs."""
    return Job(
        route=(b"c",),
        request_id=1,
        peer=Peer(0, 0, 0),
        instance=1,
        inputs=list(inputs),
        outputs=None,
        nbytes=0,
        arrived_s=0.0,
        deadline_s=math.inf,
        priority=5,
        warnings=[],
    )


def seen(view: memoryview, row: list[Any]) -> Any:
    """What the worker reads for a row."""
    _, _, shape, offset, nbytes = row[:5]
    return np.frombuffer(view[offset : offset + nbytes], np.float32).reshape(shape)


A = np.arange(14, dtype=np.float32).reshape(2, 7)
B = np.arange(3, dtype=np.float32).reshape(1, 3)


def test_one_jobs_inputs() -> None:
    """Each tensor begins at an aligned offset, and the room asked for is the room used."""
    inputs = [tensor("a", A), tensor("b", B)]
    view = memoryview(bytearray(inputs_bytes(inputs)))
    rows, leased = place_inputs(view, inputs)
    assert not leased
    assert [row[3] % ALIGN_BYTES for row in rows] == [0, 0]
    np.testing.assert_array_equal(seen(view, rows[0]), A)
    np.testing.assert_array_equal(seen(view, rows[1]), B)


def test_leased_inputs_take_no_room() -> None:
    """What lies in a region is named where it lies."""
    inputs = [tensor("a", A, RegionPart(7, "r", 192, 56)), tensor("b", B)]
    rows, leased = place_inputs(memoryview(bytearray(inputs_bytes(inputs))), inputs)
    assert leased
    assert rows == [["a", "FP32", [2, 7], 192, 56, 7], ["b", "FP32", [1, 3], 0, 12]]


def test_a_batchs_rows_lie_next_to_each_other() -> None:
    """Every input's rows in the jobs' order, whatever order a client sent its inputs in."""
    jobs = [job(tensor("a", A), tensor("b", B)), job(tensor("b", B + 10), tensor("a", A + 100))]
    view = memoryview(bytearray(batch_bytes(jobs)))
    rows, leased = place_batch(view, jobs)
    assert not leased
    assert [row[:3] for row in rows] == [["a", "FP32", [4, 7]], ["b", "FP32", [2, 3]]]
    np.testing.assert_array_equal(seen(view, rows[0]), np.concatenate([A, A + 100]))
    np.testing.assert_array_equal(seen(view, rows[1]), np.concatenate([B, B + 10]))
    assert rows[1][3] % ALIGN_BYTES == 0


@pytest.mark.parametrize("leased_at", [0, 1, 2])
def test_a_leased_row_of_a_batch_has_its_place(leased_at: int) -> None:
    """The rows around it are placed, and the worker is told what to copy from where to where."""
    tensors = [tensor("a", A + n) for n in range(3)]
    tensors[leased_at] = tensor("a", A, RegionPart(7, "r", 192, 56))
    jobs = [job(t) for t in tensors]
    view = memoryview(bytearray(batch_bytes(jobs)))
    rows, leased = place_batch(view, jobs)
    assert leased
    at = 56 * leased_at
    assert rows == [["a", "FP32", [6, 7], 0, 168, None, [[7, 192, at, 56]]]]
    placed = seen(view, rows[0]).reshape(3, 2, 7)
    for n in range(3):
        np.testing.assert_array_equal(placed[n], A + n if n != leased_at else A * 0)
