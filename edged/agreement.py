"""Whether two answers agree, and whether that proves anything.

Owns the rule by which a model may be moved from one runtime to another, and the golden samples that a model
brings along. It decides nothing: it says what it saw, and the core switches or does not.

The rule, from comparing two runtimes over the ONNX node tests: golden samples first; then ones; then normally
distributed numbers with integers in {0, 1}; then what parts runtimes (`edges`). Shapes, dtypes and the
pattern of NaN and infinities must be equal, floats within a relative L2 norm and a maximum, everything else
exactly, and what one refuses the other must refuse. A constant answer, or inputs that raise, prove nothing.
Samples alone let real disagreements pass, so this is one half of what a move needs; `proof` has the other.
Runs on Python 3.10 too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edged import arrays
from edged.errors import InvalidArgument
from edged.runtimes.base import DTYPES, Model, RunFailed, clean_text
from edged.tensors import TensorSpec, pack_list

__all__ = [
    "FAST",
    "FULL",
    "MAGNITUDES",
    "Bounds",
    "GoldenMismatch",
    "NoInputs",
    "Sample",
    "check_golden",
    "disagreement",
    "edges",
    "is_constant",
    "is_finite",
    "read_golden",
    "synthetic_inputs",
]


@dataclass(frozen=True)
class Bounds:
    """How far floats may be apart: the relative L2 norm of the difference, and its largest element.

    The latter is bounded by `max_relative` of the largest reference value plus `max_absolute`.
    """

    l2_relative: float
    max_relative: float
    max_absolute: float


FULL = Bounds(1e-3, 1e-3, 1e-5)
"""Runtimes that compute as the model says stay far below this, bf16 is far above."""

FAST = Bounds(0.1, 0.1, 1e-3)
"""For models whose owner chose `precision = "fast"`: what bf16 and fp16 do to a network, and not more."""

MAGNITUDES = frozenset(("beyond 2^24", "beyond 2^24, negative", "large", "largest", "smallest"))
"""Of the `edges` of floats those that the 16 bits of `precision = "fast"` need not tell apart."""

GOLDEN_SAMPLES_MAX = 64
"""Of one model: they are run at each load."""

SYNTHETIC_ELEMENTS_MAX = 1 << 26
"""Of one made-up input: a model whose declared shape is beyond it is not fed."""


class GoldenMismatch(Exception):
    """The model does not give the answers that its owner says it gives."""


class NoInputs(Exception):
    """No input can be made up for this model."""


@dataclass(frozen=True)
class Sample:
    """Inputs and, where the owner gave them, the outputs that belong to them."""

    name: str
    inputs: Mapping[str, Any]
    outputs: Mapping[str, Any]


def read_golden(
    folder: str | None,
    inline: Sequence[Mapping[str, Any]],
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
) -> list[Sample]:
    """The samples of a model: `*.npz` in `folder`, and those of its settings.

    Raises GoldenMismatch for a sample that cannot be read or names what the model does not have: a check
    that cannot be made is not a check that passed.
    """
    specs_in, specs_out = {s.name: s for s in inputs}, {s.name: s for s in outputs}
    samples = []
    files = sorted(Path(folder).glob("*.npz")) if folder else []
    if len(files) + len(inline) > GOLDEN_SAMPLES_MAX:
        raise GoldenMismatch(
            f"{len(files) + len(inline)} golden samples, at most {GOLDEN_SAMPLES_MAX} may be given"
        )
    for path in files:
        samples.append(_read_npz(path, specs_in, specs_out))
    for number, item in enumerate(inline, 1):
        name = f"golden sample {number} of the settings"
        samples.append(
            Sample(
                name,
                {k: _from_list(name, specs_in, k, v) for k, v in (item.get("inputs") or {}).items()},
                {k: _from_list(name, specs_out, k, v) for k, v in (item.get("outputs") or {}).items()},
            )
        )
    return samples


def _read_npz(path: Path, specs_in: Mapping[str, TensorSpec], specs_out: Mapping[str, TensorSpec]) -> Sample:
    name = f"golden sample {path.name}"
    inputs: dict[str, Any] = {}
    outputs: dict[str, Any] = {}
    try:
        # Never a pickle: samples come from the models folder, and unpickling would run what they say.
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            for key in file.files:
                kind, _, tensor = key.partition("/")
                if kind == "inputs" and tensor in specs_in:
                    inputs[tensor] = _as_fed(file[key], specs_in[tensor])
                elif kind == "outputs" and tensor in specs_out:
                    outputs[tensor] = _as_fed(file[key], specs_out[tensor])
                else:
                    raise GoldenMismatch(
                        f"{name}: {key!r} is neither inputs/NAME nor outputs/NAME with a name of the model"
                    )
    except (GoldenMismatch, MemoryError):
        raise
    except Exception as e:
        raise GoldenMismatch(f"{name} cannot be read: {clean_text(e)}") from e
    return Sample(name, inputs, outputs)


def _as_fed(array: Any, spec: TensorSpec) -> Any:
    """A stored array in the form that `Model.run` takes and gives."""
    if spec.datatype == "BYTES":
        datatype, shape, raw = arrays.to_raw(array)
        return arrays.from_raw(datatype, shape, raw)
    return np.ascontiguousarray(array).reshape(array.shape)


def _from_list(sample: str, specs: Mapping[str, TensorSpec], name: str, data: Any) -> Any:
    spec = specs.get(name)
    if spec is None:
        raise GoldenMismatch(f"{sample}: the model has no {name!r}, it has {', '.join(map(repr, specs))}")
    shape: list[int] = []
    level = data
    while isinstance(level, (list, tuple)):
        shape.append(len(level))
        level = level[0] if level else None
    try:
        raw = pack_list(name, spec.datatype, data if isinstance(data, (list, tuple)) else [data], shape)
    except (InvalidArgument, KeyError) as e:
        raise GoldenMismatch(f"{sample}: {clean_text(e)}") from e
    if spec.datatype == "BYTES":
        return arrays.from_raw("BYTES", shape, raw)
    return np.frombuffer(raw, DTYPES[spec.datatype]).reshape(shape)


def check_golden(model: Model, samples: Sequence[Sample], *, tolerance: Mapping[str, float]) -> int:
    """Runs every sample that has outputs; how many were checked. Raises GoldenMismatch with the figure."""
    rtol, atol = tolerance.get("rtol", 1e-3), tolerance.get("atol", 1e-4)
    checked = 0
    for sample in samples:
        if not sample.outputs:
            continue
        names = list(sample.outputs)
        try:
            got = model.run(sample.inputs, names)
        except RunFailed as e:
            raise GoldenMismatch(f"{sample.name}: the model raised: {e.message}") from e
        for name, value in zip(names, got):  # noqa: B905 - Python 3.10 has it, mypy knows the lengths are equal
            why = _golden_difference(sample.outputs[name], value, rtol, atol)
            if why:
                raise GoldenMismatch(f"{sample.name}, output {name!r}: {why}")
        checked += 1
    return checked


def _golden_difference(want: Any, got: Any, rtol: float, atol: float) -> str | None:
    if not isinstance(got, np.ndarray):
        return f"the model gives a {type(got).__name__}, which no golden sample can hold"
    if want.shape != got.shape:
        return f"shape {list(got.shape)}, expected {list(want.shape)}"
    if want.dtype.kind != "f" or got.dtype.kind != "f":
        wrong = np.count_nonzero(_comparable(want) != _comparable(got))
        return f"{wrong} of {want.size} elements differ" if wrong else None
    with np.errstate(all="ignore"):
        off = np.abs(got.astype("f8") - want.astype("f8"))
        bad = ~(off <= atol + rtol * np.abs(want.astype("f8"))) & ~(np.isnan(got) & np.isnan(want))
        bad &= ~(np.isinf(got) & (got == want))
    if not bad.any():
        return None
    worst = np.nanmax(np.where(bad, off, 0))
    return (
        f"{np.count_nonzero(bad)} of {want.size} elements differ by up to {worst:.3g} "
        f"(rtol {rtol:g}, atol {atol:g})"
    )


def _comparable(array: Any) -> Any:
    """Strings as bytes, whatever the runtime gives; the rest as it is."""
    if array.dtype.kind in "OSU":
        flat = [e.encode() if isinstance(e, str) else e for e in array.reshape(-1).tolist()]
        out = np.empty(len(flat), object)
        out[:] = flat
        return out.reshape(array.shape)
    return array


def synthetic_inputs(
    specs: Sequence[TensorSpec],
    kind: str,
    *,
    seed: int = 0,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, Any]:
    """Made-up inputs: `ones`, or `normal` with integers in {0, 1}.

    Of these `shapes`; without one, a free dimension is 1 and an optional input is left out.

    Integers stay that small because they are often sizes: up to 100 they made one node take 2.2 GB.
    Raises NoInputs for a model that cannot be fed.
    """
    # Only where it is wanted: numpy imports its generators late, and a warm-up with ones saves these 15 ms.
    rng = np.random.default_rng(seed) if kind == "normal" else None
    feeds: dict[str, Any] = {}
    for spec in specs:
        given = None if shapes is None else shapes.get(spec.name)
        if spec.optional and given is None:
            continue
        shape = tuple(1 if d < 0 else d for d in spec.shape or ()) if given is None else tuple(given)
        if math.prod(shape) > SYNTHETIC_ELEMENTS_MAX:
            raise NoInputs(f"input {spec.name!r} has {math.prod(shape)} elements, too many to make up")
        feeds[spec.name] = _synthetic(spec.datatype, shape, kind, rng)
    return feeds


def _synthetic(datatype: str, shape: tuple[int, ...], kind: str, rng: Any) -> Any:
    if datatype == "BYTES":
        out = np.empty(shape, object)
        out[...] = b"1" if kind == "ones" else b"0"
        return out
    dtype = DTYPES.get(datatype)
    if dtype is None:
        raise NoInputs(f"an input of {datatype} cannot be made up")
    if datatype == "BF16":
        values = np.ones(shape, "f4") if kind == "ones" else np.asarray(rng.standard_normal(shape), "f4")
        return np.asarray(values.view("u4") >> 16).astype("u2").reshape(shape)
    if kind == "ones":
        return np.ones(shape, dtype)
    if dtype.kind == "f":
        return np.asarray(rng.standard_normal(shape)).astype(dtype)
    return np.asarray(rng.integers(0, 2, shape)).astype(dtype)


def edges(array: Any) -> Iterator[tuple[str, Any]]:
    """What a tensor like this may hold at worst, each with its name: what is known to part runtimes."""
    if array.size == 0 or array.dtype.kind not in "fbiu":
        return
    if array.dtype.kind == "f":
        with np.errstate(all="ignore"):
            found = list(_float_edges(array))
        yield from found
    elif array.dtype.kind == "b":
        yield "all true", np.ones_like(array)
        yield "all false", np.zeros_like(array)
    else:
        yield from _integer_edges(array)


def _float_edges(array: Any) -> Iterator[tuple[str, Any]]:
    info = np.finfo(array.dtype)
    for name, value in (("NaN", np.nan), ("Inf", np.inf), ("-Inf", -np.inf)):
        yield name, _planted(array, value)
    yield "NaN and Inf among others", _tiled(array, [np.nan, 1.5, np.inf, -2, -np.inf, 0, info.max, 0.25])
    yield "zeros", _tiled(array, [0.0, -0.0])
    for name, factor in (("small", 1e-3), ("faint", 1e-6), ("loud", 100.0)):
        # What is divided by a norm, with something added to it against zero, is another number where it is
        # small; where it is loud, what an exponential makes of it comes next to nothing.
        yield name, array * array.dtype.type(factor)
    small = float(info.smallest_subnormal)
    yield "denormals", _tiled(array, [small, -8 * small, float(info.tiny) / 2, float(info.tiny)])
    if info.bits > 16:
        wide = [2**24 + 1, 2**25 + 3, 2**31, 2**32 - 1, 1e10]
        yield "beyond 2^24", _tiled(array, wide)
        yield "beyond 2^24, negative", _tiled(array, [-each for each in wide])
        yield "large", array * array.dtype.type(2.0**60)
    yield "largest", _planted(array, info.max)
    yield "smallest", _planted(array, info.min)


def _integer_edges(array: Any) -> Iterator[tuple[str, Any]]:
    info = np.iinfo(array.dtype)
    yield "largest and smallest", _tiled(array, [info.max, info.min])
    yield "zeros", np.zeros_like(array)
    yield "out of range", _planted(array, 100)
    if info.min < 0:
        yield "negative", _tiled(array, [-1, -2])
        yield "out of range, negative", _planted(array, -100)
    if info.max > 2**24 + 1:
        yield "beyond 2^24", _tiled(array, [2**24 + 1, 2**24 + 3, 2**30 + 1])
    if info.max > 2**32:
        yield "beyond 2^31", _tiled(array, [2**31, 2**31 + 1, 2**53 + 1])


def _planted(array: Any, value: Any) -> Any:
    """A few elements, at both ends and in the middle, among what is there."""
    out = array.copy()
    out.reshape(-1)[[0, array.size // 2, array.size - 1]] = value
    return out


def _tiled(array: Any, values: Sequence[Any]) -> Any:
    return np.resize(np.array(values).astype(array.dtype), array.shape)


def is_finite(values: Any) -> bool:
    """Whether there is neither NaN nor an infinity among the floats of these arrays."""
    return all(
        bool(np.isfinite(each).all())
        for each in values
        if isinstance(each, np.ndarray) and each.dtype.kind == "f"
    )


def disagreement(reference: Any, candidate: Any, datatype: str, bounds: Bounds = FULL) -> str | None:
    """Why two values of an output do not agree by the rule, or None when they do."""
    if not isinstance(reference, np.ndarray) or not isinstance(candidate, np.ndarray):
        return _value_disagreement(reference, candidate, bounds)
    if reference.shape != candidate.shape:
        return f"shape {list(candidate.shape)} where the reference has {list(reference.shape)}"
    a, b = _comparable(reference), _comparable(candidate)
    if a.dtype != b.dtype:
        return f"dtype {b.dtype} where the reference has {a.dtype}"
    if datatype == "BF16":
        a, b = ((x.astype("u4") << 16).view("f4") for x in (a, b))
    if a.dtype.kind != "f":
        wrong = np.count_nonzero(a != b)
        return f"{wrong} of {a.size} elements differ" if wrong else None
    return _float_disagreement(a.astype("f8"), b.astype("f8"), bounds)


def _float_disagreement(a: Any, b: Any, bounds: Bounds) -> str | None:
    if not np.array_equal(np.isnan(a), np.isnan(b)):
        return "NaN in other places"
    infinite = np.isinf(a) | np.isinf(b)
    if not np.array_equal(a[infinite], b[infinite]):
        return "infinities in other places"
    known = np.isfinite(a)
    a, b = a[known], b[known]
    if a.size == 0:
        return None
    off = np.abs(a - b)
    norm, off_norm = float(np.linalg.norm(a)), float(np.linalg.norm(off))
    largest, bound = float(off.max()), bounds.max_relative * float(np.abs(a).max()) + bounds.max_absolute
    if largest > bound:
        return f"a difference of {largest:.3g}, at most {bound:.3g} may be"
    # Where the reference is almost nothing, the bound on single elements is the one that means something.
    if off_norm > bounds.l2_relative * norm and norm > bounds.max_absolute * math.sqrt(a.size):
        return f"a relative L2 difference of {off_norm / norm:.3g}, at most {bounds.l2_relative:g} may be"
    return None


def _value_disagreement(a: Any, b: Any, bounds: Bounds) -> str | None:
    """Sequences and maps: the same structure and keys, and floats by the rule."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        if list(a) != list(b):
            return "a map with other keys"
        return _first(_value_disagreement(a[k], b[k], bounds) for k in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        if len(a) != len(b):
            return f"a sequence of {len(b)} where the reference has {len(a)}"
        return _first(
            _value_disagreement(x, y, bounds)
            for x, y in zip(a, b)  # noqa: B905 - lengths compared above
        )
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return disagreement(a, b, "FP32" if a.dtype.kind == "f" else "", bounds)
    if isinstance(a, float) and isinstance(b, float):
        return _float_disagreement(np.array([a]), np.array([b]), bounds)
    return None if type(a) is type(b) and a == b else "another value or type"


def _first(reasons: Any) -> str | None:
    return next((r for r in reasons if r), None)


def is_constant(values_by_sample: Sequence[Sequence[Any]]) -> bool:
    """Whether every sample got the same answer: then agreeing with it is no proof."""
    first = values_by_sample[0]
    return all(
        all(_value_or_array_equal(a, b) for a, b in zip(first, other))  # noqa: B905 - the same outputs each time
        for other in values_by_sample[1:]
    )


def _value_or_array_equal(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        x, y = _comparable(a), _comparable(b)
        return x.shape == y.shape and bool(np.all((x == y) | ((x != x) & (y != y))))
    return _value_disagreement(a, b, FULL) is None
