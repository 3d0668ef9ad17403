"""What a person types as an input becomes the array that the model declares.

`NAME=@file.npy`, `NAME=@file.json`, `NAME=@picture.png`, or JSON in place; `@file.npz` is several inputs at
once, each under its name or under `inputs/NAME`, as a golden sample has them. The declared datatype decides
the element type. A change of type is made only where no value changes but by a float's rounding, and said; a
missing or free dimension is filled in only where there is one way to do it.
"""

from __future__ import annotations

import json
import math
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edged.arrays import dtype_of
from edged.cli.images import IMAGE_SUFFIXES, ImageError, picture
from edged.errors import InvalidArgument
from edged.plain import plain_values
from edged.tensors import TensorSpec, check_shape, element_count, shape_text

__all__ = ["InputError", "json_values", "read_inputs", "read_shapes", "synthetic"]

_DIMENSION = re.compile(r"[1-9][0-9]{0,19}")

_FLOATS = "fV"
"""numpy's kinds of the floats here: its own, and ml_dtypes' bfloat16."""


class InputError(Exception):
    """An input can not be made from what was given; the message says what would do."""


def read_inputs(
    given: Sequence[str],
    specs: Sequence[TensorSpec],
    *,
    image_scale: float | None,
    note: Callable[[str], None],
) -> dict[str, NDArray[Any]]:
    """The arrays for `-i` arguments; `note` gets a sentence for each conversion that was made."""
    by_name = {spec.name: spec for spec in specs}
    arrays: dict[str, NDArray[Any]] = {}
    for text in given:
        if text.startswith("@") and text.endswith(".npz"):
            found = _read_npz(Path(text[1:]).expanduser(), by_name, note)
        else:
            name, value = _split(text, by_name)
            found = {name: _read(by_name[name], value, image_scale, note)}
        for name in found.keys() & arrays.keys():
            raise InputError(f"input '{name}' is given twice")
        arrays |= found
    missing = [s.name for s in specs if s.name not in arrays and not s.optional]
    if missing:
        wanted = "; ".join(
            f"-i {n}=… ({by_name[n].datatype} {shape_text(by_name[n].shape)})" for n in missing
        )
        raise InputError(f"the model needs more inputs: {wanted}")
    return arrays


def _split(text: str, by_name: Mapping[str, TensorSpec]) -> tuple[str, str]:
    """Name and value. A name may hold '='; the longest that the model has wins. With a single input, its
    name may be left out."""
    names = [n for n in by_name if text.startswith(f"{n}=")]
    if names:
        name = max(names, key=len)
        return name, text[len(name) + 1 :]
    if len(by_name) == 1 and (text.startswith("@") or "=" not in text):
        return next(iter(by_name)), text
    known = ", ".join(by_name) or "none"
    raise InputError(f"'{text[:60]}' names no input of this model; it has: {known}")


def _read(
    spec: TensorSpec, value: str, image_scale: float | None, note: Callable[[str], None]
) -> NDArray[Any]:
    if not value.startswith("@"):
        return _from_json(spec, value, "the command line", note)
    path = Path(value[1:]).expanduser()
    try:
        if path.suffix == ".npy":
            return _fit(spec, np.load(path, allow_pickle=False), note)
        if path.suffix == ".json":
            return _from_json(spec, path.read_text(), str(path), note)
        if path.suffix.lower() in IMAGE_SUFFIXES:
            array = picture(spec.name, path, shape=spec.shape, dtype=_dtype(spec), scale=image_scale)
            return _fit(spec, array, note)
    except ImageError as e:
        raise InputError(str(e)) from None
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"input '{spec.name}': {path} could not be read: {e}") from None
    except (ValueError, EOFError) as e:
        raise InputError(f"input '{spec.name}': {path} is no array that can be read: {e}") from None
    raise InputError(f"input '{spec.name}': {path.name} is none of .npy, .json, {', '.join(IMAGE_SUFFIXES)}")


def _read_npz(
    path: Path, by_name: Mapping[str, TensorSpec], note: Callable[[str], None]
) -> dict[str, NDArray[Any]]:
    """The inputs in an .npz; a golden sample's `outputs/NAME` are none of them."""
    found: dict[str, NDArray[Any]] = {}
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            for key in file.files:
                name = key.removeprefix("inputs/")
                if key.startswith("outputs/") and key not in by_name:
                    continue
                if name not in by_name:
                    known = ", ".join(by_name) or "none"
                    raise InputError(f"{path}: '{key[:60]}' is no input of this model; it has: {known}")
                found[name] = _fit(by_name[name], file[key], note)
    except OSError as e:
        raise InputError(f"{path} could not be read: {e}") from None
    except (ValueError, TypeError, EOFError, zipfile.BadZipFile) as e:
        raise InputError(f"{path} is no .npz that can be read: {e}") from None
    return found


def read_shapes(given: Sequence[str], specs: Sequence[TensorSpec]) -> dict[str, list[int]]:
    """The shapes of `--shape` arguments, `NAME=1x3x640x640` or with commas; each fits its input."""
    by_name = {spec.name: spec for spec in specs}
    shapes: dict[str, list[int]] = {}
    for text in given:
        name, _, dims = text.rpartition("=")
        parts = dims.replace(",", "x").split("x") if dims else []
        if not name or not all(_DIMENSION.fullmatch(part) for part in parts):
            raise InputError(f"--shape takes NAME=1x3x224x224, not '{text[:60]}'")
        if name not in by_name:
            known = ", ".join(by_name) or "none"
            raise InputError(f"--shape names no input of this model: '{name[:60]}'; it has: {known}")
        if name in shapes:
            raise InputError(f"--shape names '{name}' twice")
        shapes[name] = [int(part) for part in parts]
        try:
            element_count(name, shapes[name])
            check_shape(by_name[name], shapes[name])
        except InvalidArgument as e:
            raise InputError(f"--shape: {e.message}") from None
    return shapes


def _dtype(spec: TensorSpec) -> np.dtype[Any]:
    try:
        dtype = dtype_of(spec.datatype)
    except InvalidArgument as e:
        raise InputError(f"input '{spec.name}': {e.message}") from None
    if spec.datatype == "BF16" and dtype.kind == "u":
        raise InputError(f"input '{spec.name}' takes BF16, which numpy has only with `pip install ml_dtypes`")
    return dtype


def _from_json(spec: TensorSpec, text: str, where: str, note: Callable[[str], None]) -> NDArray[Any]:
    try:
        value = json.loads(text)
    except RecursionError:
        raise InputError(f"input '{spec.name}': the JSON from {where} is nested too deep") from None
    except ValueError as e:
        if spec.datatype == "BYTES" and where == "the command line":
            value = text
        else:
            raise InputError(f"input '{spec.name}': {where} is not JSON: {e}") from None
    try:
        if spec.datatype == "BYTES":
            return _fit(spec, np.array(value, dtype=object), note)
        array = np.array(value)
    except (ValueError, OverflowError) as e:
        raise InputError(f"input '{spec.name}': {where} is no regular array: {e}") from None
    if array.dtype.kind not in "biuf" and array.size:
        raise InputError(f"input '{spec.name}' takes {spec.datatype}, {where} has something else")
    return _fit(spec, array, lambda _: None)


def _fit(spec: TensorSpec, array: NDArray[Any], note: Callable[[str], None]) -> NDArray[Any]:
    shaped = _shaped(spec, _typed(spec, array, note), note)
    # ascontiguousarray would make a scalar one-dimensional.
    return shaped if shaped.flags.c_contiguous else np.ascontiguousarray(shaped)


def _typed(spec: TensorSpec, array: NDArray[Any], note: Callable[[str], None]) -> NDArray[Any]:
    """`array` in the declared type; refuses what would change a value."""
    want = _dtype(spec)
    if want.kind == "O":
        return array.astype(object)
    if array.dtype == want:
        return array
    if array.dtype.kind not in "biuf":
        raise InputError(f"input '{spec.name}' takes {spec.datatype}, the array is {array.dtype}")
    with np.errstate(all="ignore"):
        converted = array.astype(want)
        exact = want.kind in _FLOATS or array.size == 0 or bool(np.all(converted == array))
        lost = want.kind in _FLOATS and bool(np.any(np.isinf(converted) & np.isfinite(array)))
    if not exact or lost:
        raise InputError(
            f"input '{spec.name}' takes {spec.datatype}; some values of this {array.dtype} do not fit it"
        )
    note(f"input '{spec.name}': {array.dtype} was converted to {spec.datatype}")
    return converted


def _shaped(spec: TensorSpec, array: NDArray[Any], note: Callable[[str], None]) -> NDArray[Any]:
    """`array` with the declared number of dimensions, where it is clear how; else as it is, for the daemon
    to judge."""
    want = spec.shape
    if want is None or array.ndim == len(want):
        return array
    if array.ndim == len(want) - 1 and want[0] in (-1, 1) and _matches(array.shape, want[1:]):
        shape: tuple[int, ...] = (1, *array.shape)
    elif array.ndim <= 1 and -1 not in want and math.prod(want) == array.size:
        shape = tuple(want)
    elif array.ndim <= 1 and want.count(-1) == 1 and (rest := math.prod(d for d in want if d >= 0)) > 0:
        if array.size % rest:
            return array
        shape = tuple(array.size // rest if d < 0 else d for d in want)
    else:
        return array
    note(f"input '{spec.name}': shape {shape_text(array.shape)} was read as {shape_text(shape)}")
    return array.reshape(shape)


def _matches(have: Sequence[int], want: Sequence[int]) -> bool:
    return all(w < 0 or w == h for h, w in zip(have, want, strict=True))


def synthetic(
    specs: Sequence[TensorSpec], shapes: Mapping[str, Sequence[int]], seed: int = 0
) -> dict[str, NDArray[Any]]:
    """Inputs of these shapes for timing a model: normal floats, integers and booleans of 0 and 1, short
    strings. Without a shape an optional input is left out, and a free dimension is 1."""
    rng = np.random.default_rng(seed)
    arrays: dict[str, NDArray[Any]] = {}
    for spec in specs:
        if spec.optional and spec.name not in shapes:
            continue
        shape = tuple(shapes.get(spec.name, [1 if d < 0 else d for d in spec.shape or ()]))
        kind = _dtype(spec)
        if kind.kind == "O":
            arrays[spec.name] = np.full(shape, "edged", dtype=object)
        elif kind.kind in _FLOATS:
            arrays[spec.name] = rng.standard_normal(shape).astype(kind)
        else:
            arrays[spec.name] = rng.integers(0, 2, shape).astype(kind)
    return arrays


def json_values(value: Any) -> Any:
    """`value` for JSON as `plain_values` makes it, but bytes as text that a person can read."""
    return plain_values(value, bytes_text=lambda data: data.decode(errors="backslashreplace"))
