"""A run's inputs in its slot: where each tensor lies, and a batch's rows next to each other.

Pure but for the bytes that it copies, each once, from the frame they came in to their place. What lies in
leased memory is not touched: a worker reads it there, or copies it into the place that a batch left for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edged.arena import aligned
from edged.messages import TensorData
from edged.scheduler import Job

__all__ = ["batch_bytes", "inputs_bytes", "place_batch", "place_inputs"]


def inputs_bytes(inputs: Sequence[TensorData]) -> int:
    """The room that one job's inputs take in a slot."""
    return sum([aligned(len(tensor.raw)) for tensor in inputs])


def place_inputs(view: memoryview, inputs: Sequence[TensorData]) -> tuple[list[list[Any]], bool]:
    """Copies one job's inputs into its slot; the packet's rows, and whether leased memory is among them."""
    at, rows, leased = 0, [], False
    for tensor in inputs:
        part = tensor.part
        if part is not None:
            leased = True
            rows.append([tensor.name, tensor.datatype, tensor.shape, part.offset, part.nbytes, part.region])
            continue
        size = len(tensor.raw)
        view[at : at + size] = tensor.raw
        rows.append([tensor.name, tensor.datatype, tensor.shape, at, size])
        at = aligned(at + size)
    return rows, leased


def batch_bytes(jobs: Sequence[Job]) -> int:
    """The room that the inputs of several jobs take in one slot, each input's rows without a gap."""
    return sum(
        aligned(sum(_size(tensor) for tensor in tensors)) for tensors in zip(*_tensors(jobs), strict=True)
    )


def place_batch(view: memoryview, jobs: Sequence[Job]) -> tuple[list[list[Any]], bool]:
    """As `place_inputs`, for the rows of several jobs whose inputs differ in the first dimension only."""
    at, rows, any_leased = 0, [], False
    for tensors in zip(*_tensors(jobs), strict=True):
        first, begin, copies = tensors[0], at, []
        for tensor in tensors:
            part, size = tensor.part, _size(tensor)
            if part is not None:
                copies.append([part.region, part.offset, at, size])
            else:
                view[at : at + size] = tensor.raw
            at += size
        shape = [sum(tensor.shape[0] for tensor in tensors), *first.shape[1:]]
        row: list[Any] = [first.name, first.datatype, shape, begin, at - begin]
        if copies:
            any_leased = True
            row += [None, copies]
        rows.append(row)
        at = aligned(at)
    return rows, any_leased


def _tensors(jobs: Sequence[Job]) -> list[list[TensorData]]:
    """Each job's inputs in the first one's order: who sent them chose his own."""
    order = [tensor.name for tensor in jobs[0].inputs]
    named = [{tensor.name: tensor for tensor in job.inputs} for job in jobs]
    return [[inputs[name] for name in order] for inputs in named]


def _size(tensor: TensorData) -> int:
    return len(tensor.raw) if tensor.part is None else tensor.part.nbytes
