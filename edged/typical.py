"""Typical sizes of a model's free dimensions, where neither a request nor a golden sample tells them.

Pure. On an input of 1 × 1 pixels a model's overheads are measured, and which of two runtimes is faster there
says nothing about pictures. Rank, datatype and the fixed dimensions tell what an input most likely is: a
picture, tokens, sound, frames. A model may refuse a guess, because its layers need a multiple of 64 or know
only 16 positions; then the next one is tried. Runs on Python 3.10 too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from edged.sizes import Shapes
from edged.tensors import ITEM_BYTES, TensorSpec

__all__ = ["least", "typical"]

INPUT_BYTES_MAX = 64 << 20
"""Of all inputs of one size that is guessed: a guess must not take the memory that requests need."""

SIDES = (224, 640, 320, 64)
"""Height and width of a picture: what classifiers take, what detectors take, then smaller ones."""

LINE_SIDES = (320, 640, 224, 64)
"""The one that is free where the other is fixed, as of a line of text."""

TOKENS = (128, 64, 16, 8)
"""Of a text; the smaller ones for models that know no more positions."""

SAMPLES = (16_000, 4_096, 512, 64)
"""Of sound: a second at 16 kHz; the smaller ones for a row of features."""

FRAMES = (128, 64, 16, 8)
"""Steps of a sequence of features."""

FEATURES = (64, 64, 16, 8)
MAPS = (32, 16, 8, 4)
"""Sizes of what is no picture: the inside of a network, kept states."""

VIDEO_FRAMES, VIDEO_SIDES = (16, 8, 8, 4), (112, 112, 64, 32)

GUESSES = 4
"""As many as each of these has."""

CHANNELS = (1, 3, 4)

_BATCHES = ("n", "b", "bs")
_FLOATS = ("FP16", "FP32", "FP64", "BF16")


def typical(specs: Sequence[TensorSpec], known: Mapping[str, Sequence[int]] | None = None) -> list[Shapes]:
    """The sizes to try, the likeliest first; one for a model that leaves nothing open.

    `known` are the shapes of some inputs, which hold. Dimensions of one name have one size. Optional inputs
    are left out unless they are known. Empty where nothing can be guessed: a free rank, or only sizes beyond
    `INPUT_BYTES_MAX`.
    """
    given = {name: tuple(shape) for name, shape in (known or {}).items()}
    found: list[Shapes] = []
    for guess in range(GUESSES):
        shapes = _all(specs, given, guess)
        if shapes is not None and shapes not in found and _nbytes(specs, shapes, given) <= INPUT_BYTES_MAX:
            found.append(shapes)
    return found


def least(specs: Sequence[TensorSpec]) -> Shapes:
    """Every free dimension 1, a free rank none: what any model can be fed with, and what decides nothing."""
    return {s.name: tuple(1 if d < 0 else d for d in s.shape or ()) for s in specs if not s.optional}


def _all(specs: Sequence[TensorSpec], given: Shapes, guess: int) -> Shapes | None:
    sizes: dict[str, int] = {}
    for spec in specs:
        for name, dim, size in zip(_names(spec), spec.shape or (), given.get(spec.name, ())):  # noqa: B905 - the shortest
            if name and dim < 0:
                sizes.setdefault(name, size)
    shapes: Shapes = {}
    for spec in specs:
        if spec.name in given:
            shapes[spec.name] = given[spec.name]
        elif spec.optional:
            continue
        elif spec.shape is None:
            return None
        else:
            shapes[spec.name] = _named(spec, _one(spec, spec.shape, guess), sizes)
    return shapes


def _names(spec: TensorSpec) -> list[str | None]:
    """A name or None for each dimension, however many were told."""
    rank = len(spec.shape or ())
    return [*spec.dim_names, *[None] * rank][:rank]


def _named(spec: TensorSpec, shape: tuple[int, ...], sizes: dict[str, int]) -> tuple[int, ...]:
    """The shape with what names say: one name, one size; and a batch is one row wherever it stands."""
    found = []
    for declared, size, name in zip(spec.shape or (), shape, _names(spec)):  # noqa: B905 - one of each
        if declared < 0 and name:
            plain = name.lower()
            one_row = plain in _BATCHES or plain.startswith("batch")
            size = sizes.setdefault(name, 1 if one_row else size)
        found.append(size)
    return tuple(found)


def _one(spec: TensorSpec, shape: tuple[int, ...], guess: int) -> tuple[int, ...]:
    """One input's shape by its rank, datatype and fixed dimensions."""
    if spec.datatype == "BYTES":
        return _filled(shape, [1] * len(shape))
    is_float = spec.datatype in _FLOATS
    match len(shape):
        case 0:
            return ()
        case 1:
            return _filled(shape, [SAMPLES[guess] if is_float else 1])
        case 2:
            return _filled(shape, [1, (SAMPLES if is_float else TOKENS)[guess]])
        case 3:
            return _filled(shape, _three(spec, shape, guess))
        case 4:
            return _filled(shape, _four(shape, guess))
        case 5:
            side = VIDEO_SIDES[guess]
            return _filled(shape, [1, 3, VIDEO_FRAMES[guess], side, side])
        case rank:
            return _filled(shape, [1, *[MAPS[-1]] * (rank - 1)])


def _three(spec: TensorSpec, shape: Sequence[int], guess: int) -> list[int]:
    side = SIDES[guess]
    if shape[0] in CHANNELS[1:] and shape[1] < 0 and shape[2] < 0:
        return [0, side, side]  # one picture, channels first
    if spec.datatype == "UINT8" and shape[2] in CHANNELS and shape[0] < 0 and shape[1] < 0:
        return [side, side, 0]  # one picture as cameras give it
    if shape[1] >= 0:
        return [1, 0, FRAMES[guess]]  # features first, as of a spectrogram
    return [1, FRAMES[guess], FEATURES[guess]]


def _four(shape: Sequence[int], guess: int) -> list[int]:
    height, width = (1, 2) if shape[3] in CHANNELS and shape[1] not in CHANNELS else (2, 3)
    channels = 3 if height == 1 else 1
    if shape[channels] >= 0 and shape[channels] not in CHANNELS:
        return [1, *[MAPS[guess]] * 3]
    side = (SIDES if shape[height] < 0 and shape[width] < 0 else LINE_SIDES)[guess]
    sizes = [1, side, side, side]
    sizes[channels] = 3
    return sizes


def _filled(declared: Sequence[int], sizes: Sequence[int]) -> tuple[int, ...]:
    return tuple(size if dim < 0 else dim for dim, size in zip(declared, sizes))  # noqa: B905 - one of each


def _nbytes(specs: Sequence[TensorSpec], shapes: Shapes, given: Shapes) -> int:
    """Bytes of what is guessed; what is known is its owner's to answer for."""
    return sum(
        math.prod(shapes[spec.name]) * ITEM_BYTES.get(spec.datatype, 1)
        for spec in specs
        if spec.name in shapes and spec.name not in given
    )
