"""Whether a request can be run at all: its tensors against the model's spec, its references to leased memory.

Pure. Everything that is wrong with a request raises the error that is its answer; what comes out is fit to be
queued. `parts` collects the pieces of leased memory that were named, for the caller to hold.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import islice
from typing import Any

import msgspec

from edged.errors import InvalidArgument
from edged.events import RequestArrived
from edged.instances import Instance
from edged.messages import InputTensor, RegionPart, TensorData
from edged.regions import Regions
from edged.scheduler import ShapeKey
from edged.sizes import are_shapes
from edged.tensors import ITEM_BYTES, TensorSpec, check_shape, element_count, shape_text
from edged.wire import cut, input_data, leased_input, region_reference

__all__ = ["checked_inputs", "checked_outputs", "checked_shapes", "rows_and_key"]

NAMES_MAX = 20
"""Of a model's inputs or outputs in an error; `model_metadata` has all."""


def checked_inputs(
    instance: Instance, event: RequestArrived, regions: Regions, parts: list[RegionPart]
) -> list[TensorData]:
    """A request's inputs, each as the model wants it; nothing is missing."""
    specs = instance.inputs
    found = []
    for tensor in event.request.inputs:
        spec = specs.get(tensor.name)
        if spec is None and not tensor.name:
            spec = _only_input(instance, event)
            tensor = msgspec.structs.replace(tensor, name=spec.name)
        if spec is None:
            raise _unknown_input(instance, tensor.name)
        if tensor.datatype != spec.datatype:
            raise InvalidArgument(
                f"input '{tensor.name}': expected {spec.datatype}, got {tensor.datatype}",
                reason="BAD_DATATYPE",
            )
        check_shape(spec, tensor.shape)
        if tensor.parameters is None:
            found.append(input_data(tensor, event.frames))
        else:
            found.append(_input_with_parameters(tensor, event, regions, parts))
    if len(found) < len(specs):
        _check_missing(instance, found)
    return found


def _only_input(instance: Instance, event: RequestArrived) -> TensorSpec:
    """The input that a tensor without a name is for: where there is a choice, none is made."""
    specs = instance.inputs
    names = [name for name, spec in specs.items() if not spec.optional] or list(specs)
    if len(names) != 1 or len(event.request.inputs) != 1:
        listed = ", ".join(f"'{name}' {s.datatype} {shape_text(s.shape)}" for name, s in specs.items())
        raise InvalidArgument(
            f"an input without a name is for a model of one input; name each of those of model "
            f"'{instance.name}': {listed or 'it has none'}",
            reason="INPUT_NOT_NAMED",
        )
    return specs[names[0]]


def _check_missing(instance: Instance, found: list[TensorData]) -> None:
    missing = instance.required.difference([t.name for t in found])
    if missing:
        name = min(missing)
        spec = instance.inputs[name]
        raise InvalidArgument(
            f"input '{name}' is missing: {spec.datatype} {shape_text(spec.shape)}",
            reason="MISSING_INPUT",
        )


def _input_with_parameters(
    tensor: InputTensor, event: RequestArrived, regions: Regions, parts: list[RegionPart]
) -> TensorData:
    reference = region_reference(tensor.parameters, f"input '{tensor.name}'")
    if reference is None:
        return input_data(tensor, event.frames)
    part = regions.resolve(event.peer.uid, reference)
    parts.append(part)
    return leased_input(tensor, part)


def checked_outputs(
    instance: Instance, event: RequestArrived, regions: Regions, parts: list[RegionPart]
) -> tuple[list[str] | None, dict[str, RegionPart] | None]:
    """Which outputs are wanted, and which of them in leased memory."""
    wanted = event.request.outputs
    if wanted is None:
        return None, None
    names = [ref.name for ref in wanted]
    for name in names:
        if name not in instance.outputs:
            raise InvalidArgument(
                f"model '{instance.name}' has no output '{cut(name)}'; it has {_some(instance.outputs)}",
                reason="UNKNOWN_OUTPUT",
            )
    if len(set(names)) != len(names):
        raise InvalidArgument("an output is asked for twice", reason="DUPLICATE_OUTPUT")
    into: dict[str, RegionPart] | None = None
    for ref in wanted:
        if ref.parameters is None:
            continue
        reference = region_reference(ref.parameters, f"output '{ref.name}'")
        if reference is None:
            continue
        datatype = instance.outputs[ref.name].datatype
        if datatype not in ITEM_BYTES:
            raise InvalidArgument(
                f"output '{ref.name}' is {datatype}, whose size nobody knows before; "
                "only tensors of numbers can land in a region",
                reason="BAD_REGION",
            )
        part = regions.resolve(event.peer.uid, reference)
        parts.append(part)
        into = into or {}
        into[ref.name] = part
    return names, into


def _some(names: Collection[str]) -> str:
    """Names for people; all of them may be more than an answer has room for."""
    shown = ", ".join(f"'{cut(name)}'" for name in islice(names, NAMES_MAX))
    return shown if len(names) <= NAMES_MAX else f"{shown} and {len(names) - NAMES_MAX} more"


def checked_shapes(instance: Instance, wire: object, *, bytes_max: int) -> dict[str, list[int]]:
    """The shapes that an owner wants some of a model's inputs to have, `{name: [dimension, …]}`."""
    if not isinstance(wire, Mapping) or not are_shapes(wire):
        raise InvalidArgument(
            "shapes must be a map of an input's name to a list of its dimensions", reason="BAD_PARAMETER"
        )
    found: dict[str, list[int]] = {}
    nbytes = 0
    for name, shape in wire.items():
        spec = instance.inputs.get(name)
        if spec is None:
            raise _unknown_input(instance, name)
        check_shape(spec, shape)
        count = element_count(cut(name), shape)
        nbytes += count * ITEM_BYTES.get(spec.datatype, 1)
        if not count or nbytes > bytes_max:
            most = f"more than the {bytes_max} bytes of limits.message_bytes" if count else "no element"
            raise InvalidArgument(
                f"input '{cut(name)}': shape {shape_text(shape)} has {most}; name one that requests may have",
                reason="BAD_SHAPE",
            )
        found[name] = list(shape)
    return found


def _unknown_input(instance: Instance, name: str) -> InvalidArgument:
    return InvalidArgument(
        f"model '{instance.name}' has no input '{cut(name)}'; it has {_some(instance.inputs)}",
        reason="UNKNOWN_INPUT",
    )


def rows_and_key(
    inputs: list[TensorData], outputs: list[str] | None, declared: Mapping[str, TensorSpec]
) -> tuple[int, ShapeKey | None]:
    """A request's rows, and what it has in common with those that it may share a run with.

    The key is None where the inputs differ in their first dimension, or have none: it runs by itself. Rows of
    nothing are none: a shape alone could claim any number of them. Nor do inputs share a run whose sizes
    differ where the model has one name for them: that rows stand alone was read off the names.
    """
    shape = inputs[0].shape if inputs else None
    if not shape or 0 in shape:
        return 1, None
    rows = shape[0]
    sizes: dict[str, int] = {}
    key: list[Any] = [None if outputs is None else tuple(outputs)]
    for tensor in inputs:
        shape = tensor.shape
        if not shape or shape[0] != rows or tensor.datatype not in ITEM_BYTES:
            return rows, None
        key.append((tensor.name, tensor.datatype, *shape[1:]))
        spec = declared.get(tensor.name)
        for name, size in zip(spec.dim_names[1:] if spec else (), shape[1:], strict=False):  # few have names
            if name and sizes.setdefault(name, size) != size:
                return rows, None
    return rows, tuple(key)
