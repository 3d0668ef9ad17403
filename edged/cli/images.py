"""A picture becomes a tensor of the shape and type that a model declares.

The rules, which `edgectl infer --help` repeats: the layout is read off the declared shape (1, 3 or 4
channels in the second place: NCHW, in the last: NHWC; two fixed dimensions: one grey picture; a row whose
length is a square: a flat grey picture); the picture is resized to the declared height and width, by its
own size where those are free; pixels are 0 to 255 for integers and 0 to 1 for floats, or 0 to `scale`.
Means and deviations are a model's own affair: prepare those in an `.npy`.

Needs pillow, which is imported only when a picture is really given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edged.tensors import shape_text

__all__ = ["IMAGE_SUFFIXES", "ImageError", "Layout", "layout_of", "picture"]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm")

PIXELS_MAX = 64_000_000
"""Larger pictures are refused before they are decoded: they would fill a small board's memory."""

_CHANNELS = (1, 3, 4)
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class ImageError(Exception):
    """The picture can not be turned into this input; the message says what would."""


@dataclass(frozen=True)
class Layout:
    """How a picture lies in a tensor. `order` is a permutation of H, W, C with N where there is a batch,
    or `flat`; height and width are None where the picture's own are taken."""

    order: str
    height: int | None
    width: int | None
    channels: int


def layout_of(name: str, shape: Sequence[int] | None) -> Layout:
    """The layout that a declared shape means (-1: free). Raises ImageError where it means none."""
    if shape is None:
        raise ImageError(f"input '{name}' declares no shape; give an .npy")
    dims = [None if d < 0 else d for d in shape]
    match dims:
        case [n, c, h, w] if n in (None, 1) and c in _CHANNELS:
            return Layout("NCHW", h, w, c or 3)
        case [n, h, w, c] if n in (None, 1) and c in _CHANNELS:
            return Layout("NHWC", h, w, c or 3)
        case [n, None, h, w] if n in (None, 1):
            return Layout("NCHW", h, w, 3)
        case [c, h, w] if c in _CHANNELS:
            return Layout("CHW", h, w, c or 3)
        case [h, w, c] if c in _CHANNELS:
            return Layout("HWC", h, w, c or 3)
        case [None, h, w]:
            return Layout("NHW", h, w, 1)
        case [n, int(length)] if n in (None, 1) and math.isqrt(length) ** 2 == length:
            side = math.isqrt(length)
            return Layout("flat", side, side, 1)
        case [h, w]:
            return Layout("HW", h, w, 1)
        case _:
            raise ImageError(f"input '{name}' of shape {shape_text(shape)} is no picture; give an .npy")


def picture(
    name: str, path: Path, *, shape: Sequence[int] | None, dtype: Any, scale: float | None
) -> NDArray[Any]:
    """The picture at `path` as an array of `dtype` for an input of `shape`."""
    layout = layout_of(name, shape)
    kind = np.dtype(dtype)
    if kind.kind not in "fui" or kind == np.int8:
        raise ImageError(f"input '{name}' takes {kind}, which no picture is; give an .npy")
    pixels = _pixels(path, layout)
    if kind.kind == "f":
        pixels = (pixels * np.float32((1.0 if scale is None else scale) / 255.0)).astype(kind)
    else:
        pixels = np.rint(pixels * ((255.0 if scale is None else scale) / 255.0)).astype(kind)
    return np.ascontiguousarray(_arrange(pixels, layout.order))


def _pixels(path: Path, layout: Layout) -> NDArray[Any]:
    """Height × width × channels, 0 to 255."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise ImageError(
            "pictures need pillow, which is not installed: `pip install pillow`, or give .npy or JSON"
        ) from None
    try:
        with Image.open(path) as image:
            if image.width * image.height > PIXELS_MAX:
                raise ImageError(
                    f"{path} has {image.width}×{image.height} pixels; at most {PIXELS_MAX} are read"
                )
            converted = image.convert(_MODES[layout.channels])
    except UnidentifiedImageError:
        raise ImageError(f"{path} is no picture that pillow knows") from None
    except (OSError, Image.DecompressionBombError) as e:
        raise ImageError(f"{path} could not be read: {e}") from None
    size = (layout.width or converted.width, layout.height or converted.height)
    if size != converted.size:
        converted = converted.resize(size, Image.Resampling.BILINEAR)
    array = np.asarray(converted)
    return array[:, :, None] if array.ndim == 2 else array


def _arrange(pixels: NDArray[Any], order: str) -> NDArray[Any]:
    match order:
        case "NCHW":
            return pixels.transpose(2, 0, 1)[None]
        case "NHWC":
            return pixels[None]
        case "CHW":
            return pixels.transpose(2, 0, 1)
        case "HWC":
            return pixels
        case "NHW":
            return pixels[None, :, :, 0]
        case "HW":
            return pixels[:, :, 0]
        case _:
            return pixels.reshape(1, -1)
