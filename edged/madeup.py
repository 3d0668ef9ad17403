"""The inputs that a model is measured with: where they come from, of which sizes, and which it refused.

For the worker's side. In this order: what the owner gave for this measurement, golden samples, the sizes that
requests really had, typical ones. A model may refuse a made-up size: that says nothing against it, the next
one is tried, and the refusal is reported. If only free dimensions of 1 are left the model is still run, but
nothing is decided by it. Runs on Python 3.10 too.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edged.agreement import NoInputs, Sample, synthetic_inputs
from edged.runtimes.base import Model, RunFailed
from edged.sizes import LEAST, MEASURED_MAX, Shapes, fit, have_free, shapes_text, told
from edged.tensors import TensorSpec
from edged.typical import least, typical

__all__ = ["Choice", "choose", "made_up_samples", "shapes_of", "sizes_to_try"]

MORE_S = 1.0
"""After which no further size is tried: a slow model needs what is left of the limit to be timed in."""

KINDS = ("ones", "normal")
"""The values of made-up inputs, as `agreement` has them."""

_NOTE_MAX = 200
"""Characters of what is said about refused sizes."""


@dataclass
class Choice:
    """The inputs to measure with, in the order in which they count."""

    samples: list[Sample] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    """Of each sample, a word of `sizes.SOURCES`."""
    refused: list[str] = field(default_factory=list)
    """Sizes that the model did not take, and what it said."""
    made_up: bool = False
    """Whether made-up inputs are among them."""

    def add(self, source: str, *samples: Sample) -> None:
        """Takes samples of one source."""
        self.samples += samples
        self.sources += [source] * len(samples)

    def size_of(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """What is told of the size of these inputs, which are one of the samples'."""
        at = next(n for n, sample in enumerate(self.samples) if sample.inputs is inputs)
        shapes = told(shapes_of(inputs))
        return {"source": self.sources[at], "shapes": shapes, "note": "; ".join(self.refused)[:_NOTE_MAX]}


def made_up_samples(
    specs: Sequence[TensorSpec], shapes: Mapping[str, Sequence[int]], kinds: Sequence[str] = KINDS
) -> list[Sample]:
    """A sample of each kind with inputs of these shapes. Raises NoInputs for what cannot be made up."""
    return [Sample(kind, synthetic_inputs(specs, kind, shapes=shapes), {}) for kind in kinds]


def sizes_to_try(specs: Sequence[TensorSpec], settings: Mapping[str, Any]) -> list[tuple[str, Shapes]]:
    """(source, shapes) to make inputs up with, the best first and the least telling last.

    `settings` may have `owner_shapes`, of some inputs or all, and `shapes`, those that requests had most.
    """
    if not have_free(specs):
        return [("declared", least(specs))]
    owner = settings.get("owner_shapes")
    if owner:
        return [("owner", shapes) for shapes in typical(specs, owner)]
    sizes: list[tuple[str, Shapes]] = []
    for shapes in settings.get("shapes") or ():
        if fit(shapes, specs) and len(sizes) < MEASURED_MAX:
            sizes.append(("requests", {name: tuple(shape) for name, shape in shapes.items()}))
    sizes += [("typical", shapes) for shapes in typical(specs)]
    return [*sizes, (LEAST, least(specs))]


def shapes_of(inputs: Mapping[str, Any]) -> Shapes:
    """The shapes of arrays."""
    return {name: tuple(np.shape(value)) for name, value in inputs.items()}


def choose(
    model: Model,
    golden: Sequence[Sample],
    settings: Mapping[str, Any],
    owner_inputs: Mapping[str, Any] | None = None,
    *,
    more_s: float = MORE_S,
) -> Choice:
    """What to compare and time a model with, which is run to find out what it takes.

    Beside given samples, values are made up at the same size and at those that requests had: runtimes that
    agree at one size may not at another. Without any of these the first typical size that the model takes
    must do. Raises RunFailed when the device is broken.
    """
    choice = Choice()
    began_s = time.monotonic()
    sizes = sizes_to_try(model.inputs, settings)
    if owner_inputs is not None:
        choice.add("owner", Sample("the inputs that its owner gave", owner_inputs, {}))
    elif settings.get("owner_shapes"):
        _try_first(model, sizes, choice)
        if not choice.samples:
            return choice
    choice.add("golden", *golden)
    if not choice.samples:
        asked = [size for size in sizes if size[0] == "requests"]
        guesses = [size for size in sizes if size[0] != "requests"]
    else:
        first = choice.sources[0], shapes_of(choice.samples[0].inputs)
        asked = [size for size in sizes if size[0] == "requests" and size[1] != first[1]]
        asked = asked if choice.made_up else [first, *asked]
        guesses = []
    for source, shapes in asked:
        if not choice.made_up or time.monotonic() - began_s < more_s:
            _try(model, source, shapes, choice)
    _try_first(model, guesses, choice)
    return choice


def _try_first(model: Model, sizes: Sequence[tuple[str, Shapes]], choice: Choice) -> None:
    """Adds the first of these sizes that the model takes, unless some made-up inputs are there already."""
    for source, shapes in sizes:
        if not choice.made_up:
            _try(model, source, shapes, choice)


def _try(model: Model, source: str, shapes: Shapes, choice: Choice) -> None:
    """Adds the made-up inputs of one size that the model takes."""
    names = [spec.name for spec in model.outputs]
    where = f" at {shapes_text(shapes)}" if choice.made_up else ""
    taken, why = [], ""
    try:
        for sample in made_up_samples(model.inputs, shapes):
            try:
                model.run(sample.inputs, names)
                taken.append(Sample(f"{sample.name}{where}", sample.inputs, {}))
            except RunFailed as e:
                if e.fatal:
                    raise
                why = e.message
    except NoInputs as e:
        why = str(e)
    if taken:
        choice.add(source, *taken)
        choice.made_up = True
    else:
        choice.refused.append(f"{shapes_text(shapes)} was refused: {why}")
