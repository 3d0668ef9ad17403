"""Rules for operators that move elements and compute shapes, but compute nothing with the numbers.

`LAYOUT` has a row for each. Operator names and their inputs are those of the ONNX standard.
Runs on Python 3.10 too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from edged.row_independence.node import At, Rule
from edged.row_independence.sizes import ONE, ROWS, Names, Size, product
from edged.row_independence.values import (
    NUMBERS_MAX,
    Mixes,
    Numbering,
    Numbers,
    Value,
    aligned,
    fixed,
    numbers_of,
    reshaped,
    rows_at,
)

__all__ = ["LAYOUT", "axes_of", "constant_value"]

_ALONG = "works along the axis of the rows"

_END = 10**9
"""A Slice that ends there or later ends where the tensor does: how exporters write `no end`."""


_COUNTING = ("int64", "int32", "bool")
"""What numbers are followed in. Narrower ones wrap round at sizes that there are."""

_KNOWN_MAX, _FACTOR_MAX, _SYMBOLS_MAX = (1 << 31) - 1, 1 << 24, 4
"""Of numbers that a graph computes: beyond them 32 bits may wrap round, or what they stand for is no size."""


def constant_value(shape: tuple[int, ...], values: object) -> Value:
    """A tensor of the file; `values` is a small array or None."""
    numbers: Numbers | None = None
    dtype = getattr(values, "dtype", None)
    kind = getattr(dtype, "kind", "")
    if (
        values is not None
        and len(shape) < 2
        and getattr(dtype, "name", "") in _COUNTING
        and product(map(Size, shape)).factor <= NUMBERS_MAX
    ):
        numbers = tuple(Size(int(each)) for each in values.reshape(-1).tolist())  # type: ignore[attr-defined]
    ones = None
    if values is not None and len(shape) == 1 and kind == "f" and shape[0] <= NUMBERS_MAX:
        ones = tuple(each == 1.0 for each in values.tolist())  # type: ignore[attr-defined]  # an array
    return Value(tuple(Size(d) for d in shape), numbers=numbers, ones=ones)


def axes_of(at: At, *, input_at: int, since: int) -> tuple[int, ...] | None:
    """Axes that are an attribute before an opset and an input from then on; None where they are left out."""
    if at.opset >= since:
        return numbers_of(at.get(input_at), "axes")
    return at.integers("axes")


# ------------------------------------------------------------------ shapes as numbers


def _constant(at: At) -> Sequence[Value]:
    tensor = at.constant("value")
    if tensor is not None:
        return [constant_value(tensor.shape, tensor.values)]
    for name in ("value_int", "value_ints"):
        value = at.attribute(name, None)
        if isinstance(value, int):
            return [Value((), numbers=(Size(value),))]
        if isinstance(value, tuple) and len(value) <= NUMBERS_MAX:
            return [Value((Size(len(value)),), numbers=tuple(Size(int(each)) for each in value))]
    if at.attribute("value_float", None) is not None or at.attribute("value_string", None) is not None:
        return [Value(())]
    for name in ("value_ints", "value_floats", "value_strings"):
        value = at.attribute(name, None)
        if isinstance(value, tuple):
            return [Value((Size(len(value)),))]
    return [Value(None)]


def _shape(at: At) -> Sequence[Value]:
    x = at.need(0)
    if x.dims is None:
        return [Value((at.names.fresh(),))]
    dims = x.dims[at.integer("start", 0) : at.attribute("end", None)]
    return [Value((Size(len(dims)),), numbers=dims)]


def _size(at: At) -> Sequence[Value]:
    x = at.need(0)
    return [Value((), numbers=(None if x.dims is None else product(x.dims),))]


def _range(at: At) -> Sequence[Value]:
    given = [at.need(n) for n in range(3)]
    ends = [v.numbers[0] if v.numbers else None for v in given]
    if ends == [Size(0), ROWS, ONE]:
        return [replace(rows_at((ROWS,), 0), numbering=Numbering.OWN)]
    if any(v.counts_rows for v in given):
        raise Mixes("counts the rows")
    for v in given:
        fixed(v, "bounds")
    if ends[0] == Size(0) and ends[2] == ONE and ends[1] is not None:
        return [Value((ends[1],))]
    return [Value((at.names.fresh(),))]


def _constant_of_shape(at: At) -> Sequence[Value]:
    shape = at.need(0)
    if shape.axis is not None:
        raise Mixes("takes its shape from the rows")
    tensor = at.constant("value")
    filling = None if tensor is None else tensor.values
    return [_filled(shape, at, 0 if filling is None and tensor is None else filling)]


def _filled(shape: Value, at: At, filling: object) -> Value:
    """A tensor whose elements are all the same, of a shape that is computed."""
    if shape.numbers is None:
        count = shape.dims[0].known if shape.dims else None
        return Value(None if count is None or count > NUMBERS_MAX else tuple(at.fresh(count)))
    dims = tuple(at.names.fresh() if n is None else n for n in shape.numbers)
    if any(d.has_rows for d in dims):
        return rows_at(dims, next(n for n, d in enumerate(dims) if d.has_rows))
    count = product(dims).known
    narrow = getattr(getattr(filling, "dtype", None), "name", "int64") not in _COUNTING
    whole = filling.reshape(-1).tolist()[0] if hasattr(filling, "reshape") and not narrow else filling
    if len(dims) < 2 and count is not None and count <= NUMBERS_MAX and isinstance(whole, int):
        return Value(dims, numbers=(Size(int(whole)),) * count)
    return Value(dims)


# ------------------------------------------------------------------ the same elements in another shape


def _reshape(at: At) -> Sequence[Value]:
    x, shape = at.need(0), at.get(1)
    wanted: Numbers | None
    if at.opset < 5:
        listed = at.integers("shape")
        wanted = None if listed is None else tuple(Size(n) for n in listed)
    else:
        if shape is None or shape.axis is not None:
            raise Mixes("takes its shape from the rows")
        wanted = shape.numbers
    if x.axis is None and (wanted is None or x.dims is None or None in wanted):
        count = (
            len(wanted)
            if wanted is not None
            else None
            if shape is None or not shape.dims
            else shape.dims[0].known
        )
        if wanted is not None and any(n is not None and n.has_rows for n in wanted):
            raise Mixes("gives a constant the shape of the rows")
        return [Value(None if count is None else tuple(at.fresh(count)), source=x.source)]
    if wanted is None or None in wanted:
        raise Mixes("has a new shape that is not known before it runs")
    dims = _resolved(at, x, [n for n in wanted if n is not None])
    return [reshaped(x, dims)]


def _resolved(at: At, x: Value, wanted: Sequence[Size]) -> list[Size]:
    """A Reshape's numbers as sizes: 0 takes the size at its place, -1 what is left."""
    dims: list[Size] = []
    for place, size in enumerate(wanted):
        if size.known == 0 and not at.integer("allowzero", 0):
            if place >= x.rank:
                raise Mixes("copies a size that is not there")
            size = x.size(place)
        elif size.known != -1 and not size.positive:
            raise Mixes("has a new shape that is not known before it runs")
        dims.append(size)
    if Size(-1) in dims:
        at_open = dims.index(Size(-1))
        rest = [size for place, size in enumerate(dims) if place != at_open]
        left = product(x.dims or ()).over(product(rest))
        if left is None and (x.axis is None or any(size.has_rows for size in rest)):
            left = at.names.fresh()
        if left is None:
            raise Mixes("has a new shape that cannot be shown to hold the same elements")
        dims[at_open] = left
    return dims


def _flatten(at: At) -> Sequence[Value]:
    x = at.need(0)
    if x.dims is None:
        return [Value(tuple(at.fresh(2)), source=x.source)]
    axis = at.integer("axis", 1)
    axis = axis + x.rank if axis < 0 else axis
    return [reshaped(x, (product(x.dims[:axis]), product(x.dims[axis:])))]


def _squeeze(at: At) -> Sequence[Value]:
    x = at.need(0)
    axes = axes_of(at, input_at=1, since=13)
    if x.dims is None:
        return [Value(None, source=x.source)]
    if axes is None:
        if x.axis is not None or any(d.symbols for d in x.dims):
            raise Mixes("leaves out whichever dimensions are 1, which a single row's is too")
        axes = tuple(n for n, d in enumerate(x.dims) if d == ONE)
    gone = {x.counted(axis) for axis in axes}
    if x.axis in gone:
        raise Mixes("leaves out the axis of the rows")
    return [_moved(x, [n for n in range(x.rank) if n not in gone])]


def _unsqueeze(at: At) -> Sequence[Value]:
    x = at.need(0)
    axes = axes_of(at, input_at=1, since=13)
    if axes is None:
        raise Mixes("has no axes")
    if x.dims is None:
        return [Value(None, source=x.source)]
    rank = x.rank + len(axes)
    if any(not -rank <= axis < rank for axis in axes):
        raise Mixes("names an axis that is not there")
    new = {axis % rank for axis in axes}
    kept = iter(range(x.rank))
    return [_moved(x, [None if n in new else next(kept) for n in range(rank)])]


def _moved(x: Value, places: Sequence[int | None]) -> Value:
    """Another order of the dimensions; None is a new one of 1."""
    axis = None if x.axis is None else places.index(x.axis)
    dims = tuple(ONE if n is None else x.size(n) for n in places)
    return replace(x, dims=dims, axis=axis, numbers=x.numbers if len(dims) < 2 else None, ones=None)


def _transpose(at: At) -> Sequence[Value]:
    x = at.need(0)
    perm = at.integers("perm")
    if x.dims is None:
        return [Value(None, source=x.source)]
    places = list(reversed(range(x.rank))) if perm is None else [x.counted(n) for n in perm]
    if sorted(places) != list(range(x.rank)):
        raise Mixes("has no permutation of its axes")
    return [_moved(x, list(places))]


def _expand(at: At) -> Sequence[Value]:
    x, shape = at.need(0), at.need(1)
    if shape.axis is not None:
        raise Mixes("takes its shape from the rows")
    if shape.numbers is None or x.dims is None:
        if x.axis is not None:
            raise Mixes("has a new shape that is not known before it runs")
        return [Value(None, source=x.source)]
    dims = tuple(at.names.fresh() if n is None else n for n in shape.numbers)
    counted = [n for n, d in enumerate(dims) if d.has_rows]
    if not counted:
        return [replace(aligned([x.like(), Value(dims)], at.names), source=x.source)]
    if x.axis is None:
        return [replace(aligned([x.like(), rows_at(dims, counted[0])], at.names), source=x.source)]
    place = x.axis + len(dims) - x.rank
    if counted != [place] or dims[place] != x.size(x.axis):
        raise Mixes("repeats rows, or lays them along another axis")
    with_rows = Value(dims, place, x.before, x.after)
    return [replace(aligned([x.like(), with_rows], at.names), source=x.source)]


def _tile(at: At) -> Sequence[Value]:
    x, repeats = at.need(0), at.need(1)
    if repeats.axis is not None:
        raise Mixes("takes its repeats from the rows")
    if x.dims is None or repeats.numbers is None or None in repeats.numbers:
        if x.axis is None and not repeats.counts_rows:
            return [Value(None if x.dims is None else tuple(at.fresh(x.rank)), source=x.source)]
        raise Mixes("repeats rows a number of times that is not known before it runs")
    times = [n for n in repeats.numbers if n is not None]
    if len(times) != x.rank:
        raise Mixes("has not a number of repeats for each axis")
    dims = tuple(d * t for d, t in zip(x.dims, times))  # noqa: B905 - as many, see above
    if x.axis is not None:
        if times[x.axis] != ONE or any(t.has_rows for t in times):
            raise Mixes("repeats the rows")
        return [replace(x, dims=dims, numbers=None, ones=None)]
    counted = [n for n, t in enumerate(times) if t.has_rows]
    if not counted:
        return [Value(dims, source=x.source)]
    if x.size(counted[0]) != ONE:
        raise Mixes("repeats a constant for each row, more than one line of it")
    return [replace(rows_at(dims, counted[0]), source=x.source)]


# ------------------------------------------------------------------ some elements of a tensor, or of several


def _concat(at: At) -> Sequence[Value]:
    parts = at.given
    if any(p.dims is None for p in parts):
        if any(p.axis is not None for p in parts):
            raise Mixes("has an input of unknown rank")
        return [Value(None)]
    first = parts[0]
    axis = first.counted(at.integer("axis", 1 if at.opset < 4 else 0))
    if any(p.rank != first.rank for p in parts):
        raise Mixes("has inputs of different ranks")
    length = _sum([p.size(axis) for p in parts], at.names)
    dims = [length if n == axis else first.size(n) for n in range(first.rank)]
    with_rows = [p for p in parts if p.axis is not None]
    if with_rows:
        laid = with_rows[0]
        if any((p.axis, p.before, p.after) != (laid.axis, laid.before, laid.after) for p in parts):
            raise Mixes("joins rows with what is not laid like them")
        if laid.axis == axis:
            raise Mixes("joins rows one after the other")
        return [laid.shaped(dims, laid.axis)]
    numbers: Numbers | None = None
    ones: tuple[bool, ...] | None = None
    if first.rank == 1 and length.known is not None and length.known <= NUMBERS_MAX:
        if all(p.numbers is not None for p in parts):
            numbers = tuple(n for p in parts for n in p.numbers or ())
        ones = tuple(n for p in parts for n in p.ones or (False,) * p.size(0).factor)
    return [Value(tuple(dims), numbers=numbers, ones=ones)]


def _sum(sizes: Sequence[Size], names: Names) -> Size:
    known = [size.known for size in sizes]
    whole = [n for n in known if n is not None]
    if len(whole) == len(sizes):
        return Size(sum(whole))
    found = sizes[0]
    for size in sizes[1:]:
        found = names.of_expression("sum", found, size)
    return found


def _split(at: At) -> Sequence[Value]:
    x = at.need(0)
    count = len(at.node.outputs)
    if x.dims is None:
        return [Value(None, source=x.source) for _ in range(count)]
    axis = x.counted(at.integer("axis", 0))
    if axis == x.axis:
        raise Mixes("gives rows to different outputs")
    lengths = at.integers("split") if at.opset < 13 else None
    if at.opset >= 13 and at.get(1) is not None:
        lengths = numbers_of(at.get(1), "split")
    whole = x.size(axis).known
    if lengths is None and whole is not None:
        part = -(-whole // count)
        lengths = tuple(min(part, whole - n * part) for n in range(count))
    if lengths is not None and min(lengths, default=0) < 0:
        lengths = None  # OpenVINO's `what is left`
    sizes = at.fresh(count) if lengths is None else [Size(n) for n in lengths]
    if len(sizes) != count:
        raise Mixes("has not a length for each output")
    found, start = [], 0
    for size in sizes:
        dims = [size if n == axis else d for n, d in enumerate(x.dims)]
        part_of = replace(x, dims=tuple(dims), numbers=None, ones=None)
        if x.numbers is not None and x.rank == 1:
            known = lengths is not None
            part_of = replace(part_of, numbers=x.numbers[start : start + size.factor] if known else None)
            start += size.factor
        found.append(part_of)
    return found


def _slice(at: At) -> Sequence[Value]:
    x = at.need(0)
    if x.dims is None:
        return [Value(None, source=x.source)]
    if at.opset < 10:
        starts, ends = at.integers("starts") or (), at.integers("ends") or ()
        axes, steps = at.integers("axes"), None
        start_sizes: Numbers = tuple(Size(n) for n in starts)
        end_sizes: Numbers = tuple(Size(n) for n in ends)
    else:
        start_sizes, end_sizes = _bounds(at, 1), _bounds(at, 2)
        axes, steps = numbers_of(at.get(3), "axes"), numbers_of(at.get(4), "steps")
    if axes is None:
        axes = tuple(range(len(start_sizes)))
    if steps is None:
        steps = (1,) * len(axes)
    if not len(axes) == len(start_sizes) == len(end_sizes) == len(steps):
        raise Mixes("has not a start and an end for each axis")
    dims, numbers = list(x.dims), x.numbers
    for axis, start, end, step in zip(axes, start_sizes, end_sizes, steps):  # noqa: B905 - as many, see above
        axis = x.counted(axis)
        size = x.size(axis)
        all_of_it = (
            start == Size(0)
            and step == 1
            and end is not None
            and (end == size or (end.known is not None and end.known >= _END))
        )
        if all_of_it:
            continue
        if axis == x.axis:
            raise Mixes("takes some of the rows")
        if any(bound is not None and bound.has_rows for bound in (start, end)):
            raise Mixes("cuts a tensor to how many rows there are")
        known = (size.known, start.known if start else None, end.known if end else None)
        if None not in known and step:
            stop = None if step < 0 and (known[2] or 0) < -(known[0] or 0) else known[2]
            part = slice(known[1], stop, step)
            dims[axis] = Size(len(range(*part.indices(known[0] or 0))))
            numbers = numbers[part] if numbers is not None else None
        else:
            dims[axis] = at.names.fresh()
            numbers = None
    return [replace(x, dims=tuple(dims), numbers=numbers, ones=None)]


def _bounds(at: At, place: int) -> Numbers:
    value = at.need(place)
    if value.axis is not None:
        raise Mixes("takes its bounds from the rows")
    if value.numbers is None:
        count = value.dims[0].known if value.dims else 1
        if count is None or count > NUMBERS_MAX:
            raise Mixes("has bounds that are not known before it runs")
        return (None,) * count
    # A bound that counts the rows is one of an axis that is cut so: there it is looked at again.
    return value.numbers


def _gather(at: At) -> Sequence[Value]:
    data, indices = at.need(0), at.need(1)
    if data.dims is None or indices.dims is None:
        if data.axis is not None or indices.axis is not None:
            raise Mixes("has an input of unknown rank")
        return [Value(None)]
    axis = data.counted(at.integer("axis", 0))
    dims = (*data.dims[:axis], *indices.dims, *data.dims[axis + 1 :])
    if indices.axis is not None:
        if data.axis is not None:
            if indices.numbering is not Numbering.OWN or axis != data.axis or data.size(axis) != ROWS:
                raise Mixes("looks up in the rows what other rows say")
            return [indices.shaped(dims, axis + indices.axis)]
        note_limit(at, indices, data.size(axis))
        return [indices.shaped(dims, axis + indices.axis)]
    if data.axis is not None:
        if axis == data.axis:
            raise Mixes("takes some of the rows")
        place = data.axis if data.axis < axis else data.axis - 1 + indices.rank
        return [data.shaped(dims, place)]
    if data.numbers is None:
        return [Value(dims)]
    picked = indices.numbers
    if picked is not None and all(n is not None and n.known is not None for n in picked):
        places = [n.known or 0 for n in picked if n is not None]
        if any(not -len(data.numbers) <= n < len(data.numbers) for n in places):
            raise Mixes("has an index out of range")
        return [Value(dims, numbers=tuple(data.numbers[n] for n in places) if len(dims) < 2 else None)]
    return [Value(dims)]


def note_limit(at: At, indices: Value, size: Size) -> None:
    """Remembers how far indices go that are a model's input."""
    if indices.source and size.known is not None:
        at.limits[indices.source] = min(size.known, at.limits.get(indices.source, size.known))


def _gather_elements(at: At) -> Sequence[Value]:
    """GatherElements and, with updates, ScatterElements: everything stays on its line along the axis."""
    given = at.given
    data = given[0]
    axis = data.counted(at.integer("axis", 0))
    with_rows = [v for v in given if v.axis is not None]
    if not with_rows:
        return [Value(given[1].dims if at.node.op == "GatherElements" else data.dims)]
    first = with_rows[0]
    if first.axis == axis:
        raise Mixes(_ALONG)
    # A constant, even one with a line for each row it could have, is as long as it is.
    if any((v.axis, v.before, v.after) != (first.axis, first.before, first.after) for v in given):
        raise Mixes("puts rows beside what is not laid like them")
    return [(given[1] if at.node.op == "GatherElements" else data).like()]


def _gather_nd(at: At) -> Sequence[Value]:
    data, indices = at.need(0), at.need(1)
    leading = at.integer("batch_dims", 0)
    if data.axis is None and indices.axis is None:
        return [Value(None)]
    depth = indices.size(indices.rank - 1).known
    if depth is None:
        raise Mixes("has indices of unknown depth")
    dims = (*indices.dims[:-1], *data.dims[leading + depth :])  # type: ignore[index]  # ranks are known
    if indices.axis is not None and indices.axis < indices.rank - 1:
        if indices.axis < leading:
            if (data.axis, data.before, data.after) != (indices.axis, indices.before, indices.after):
                raise Mixes("looks up in another row's elements")
        elif data.axis is not None and (
            indices.numbering is not Numbering.OWN_FIRST or leading or (data.axis, data.size(0)) != (0, ROWS)
        ):
            raise Mixes("looks up in the rows what other rows say")
        return [indices.shaped(dims, indices.axis)]
    raise Mixes("looks up along the axis of the rows")


def _scatter_nd(at: At) -> Sequence[Value]:
    if any(v.axis is not None for v in at.given):
        raise Mixes("writes to places that its indices name, which may be another row's")
    return [at.need(0).like()]


def _one_hot(at: At) -> Sequence[Value]:
    indices, depth = at.need(0), at.need(1)
    fixed(depth, "depth")
    fixed(at.get(2), "values")
    if indices.dims is None:
        return [Value(None)]
    axis = at.integer("axis", -1)
    axis = axis + indices.rank + 1 if axis < 0 else axis
    size = depth.numbers[0] if depth.numbers and depth.numbers[0] is not None else at.names.fresh()
    note_limit(at, indices, size)
    places: list[int | None] = list(range(indices.rank))
    places.insert(axis, None)
    found = _moved(indices, places)
    dims = tuple(size if n == axis else d for n, d in enumerate(found.dims or ()))
    return [found.shaped(dims, found.axis)]


def _pad(at: At) -> Sequence[Value]:
    x = at.need(0)
    if x.dims is None:
        return [Value(None)]
    pads: Numbers
    if at.opset < 11:
        pads = tuple(Size(n) for n in at.integers("pads") or at.integers("paddings") or ())
        axes = None
    else:
        value = fixed(at.need(1), "pads")
        pads = (None,) * (2 * x.rank) if value is None or value.numbers is None else value.numbers
        fixed(at.get(2), "value")
        axes = numbers_of(at.get(3), "axes")
    counted = list(range(x.rank)) if axes is None else [x.counted(n) for n in axes]
    if len(pads) != 2 * len(counted):
        raise Mixes("has not two pads for each axis")
    dims = list(x.dims)
    for place, axis in enumerate(counted):
        both = pads[place], pads[place + len(counted)]
        if both == (Size(0), Size(0)):
            continue
        if axis == x.axis:
            raise Mixes("pads the axis of the rows")
        known = [x.size(axis).known, *(n.known if n is not None else None for n in both)]
        whole = [n for n in known if n is not None]
        dims[axis] = Size(sum(whole)) if len(whole) == 3 else at.names.fresh()
    return [x.shaped(dims, x.axis)]


def _compress(at: At) -> Sequence[Value]:
    x = at.need(0)
    fixed(at.get(1), "condition")
    axis = at.attribute("axis", None)
    if axis is None or x.dims is None:
        if x.axis is not None:
            raise Mixes("picks elements of all rows together")
        return [Value((at.names.fresh(),))]
    axis = x.counted(int(axis))
    if axis == x.axis:
        raise Mixes("takes some of the rows")
    return [x.shaped([at.names.fresh() if n == axis else d for n, d in enumerate(x.dims)], x.axis)]


def _blocks(at: At) -> Sequence[Value]:
    """DepthToSpace and SpaceToDepth: N, C, H, W."""
    x = at.need(0)
    if x.axis not in (None, 0):
        raise Mixes(_ALONG)
    if x.dims is None:
        return [Value(None)]
    block = at.integer("blocksize", 0)
    if block < 1 or x.rank != 4:
        raise Mixes("has no blocks")
    n, c, h, w = x.dims
    one, area = Size(block), Size(block * block)
    if at.node.op == "DepthToSpace":
        deep, high, wide = c.over(area), h * one, w * one
    else:
        deep, high, wide = c * area, h.over(one) or at.names.fresh(), w.over(one) or at.names.fresh()
    return [x.shaped((n, deep or at.names.fresh(), high, wide), x.axis)]


def _trilu(at: At) -> Sequence[Value]:
    x = at.need(0)
    fixed(at.get(1), "diagonal")
    if x.axis is not None and x.axis >= x.rank - 2:
        raise Mixes(_ALONG)
    return [x.like()]


def _eye_like(at: At) -> Sequence[Value]:
    x = at.need(0)
    if x.axis is not None:
        raise Mixes("counts the rows")
    return [x.like()]


def _reverse_sequence(at: At) -> Sequence[Value]:
    x, lengths = at.need(0), at.need(1)
    batch, along = at.integer("batch_axis", 1), at.integer("time_axis", 0)
    if x.axis is None and lengths.axis is None:
        return [x.like()]
    if along == x.axis:
        raise Mixes(_ALONG)
    if x.axis == batch:
        if lengths.axis != 0 or (lengths.before, lengths.after) != (x.before, x.after):
            raise Mixes("has not a length for each row")
    elif lengths.axis is not None:
        raise Mixes("takes its lengths from the rows")
    return [x.like()]


# ------------------------------------------------------------------ numbers of shapes


def numbers(compute: Callable[[At, Sequence[Numbers]], Numbers], otherwise: Rule) -> Rule:
    """The rule of an operator that also computes with shapes: number by number where the inputs are such."""

    def rule(at: At) -> Sequence[Value]:
        given = at.given
        known = [v.numbers for v in given if v.numbers is not None]
        if len(known) != len(given) or any(v.rank > 1 for v in given):
            return otherwise(at)
        length = max(len(each) for each in known)
        if any(len(each) not in (1, length) for each in known):
            return otherwise(at)
        wide = [each * length if len(each) != length else each for each in known]
        rank = max(v.rank for v in given)
        found = compute(at, wide)
        return [
            Value(
                (Size(length),) if rank else (),
                numbers=found,
                source=given[0].source if len(given) == 1 else "",
            )
        ]

    return rule


def each(compute: Callable[[At, Sequence[Size]], Size | None]) -> Callable[[At, Sequence[Numbers]], Numbers]:
    """Number by number; what is not known of one gives what is not known."""

    def all_of(at: At, given: Sequence[Numbers]) -> Numbers:
        found: list[Size | None] = []
        for numbers_at in zip(*given):  # noqa: B905 - of one length
            whole = [n for n in numbers_at if n is not None]
            result = compute(at, whole) if len(whole) == len(numbers_at) else None
            if result is not None and result not in whole and not may_be_computed(result):
                result = None
            if result is None and any(n.has_rows for n in whole):
                raise Mixes("computes with how many rows there are")
            found.append(result)
        return tuple(found)

    return all_of


def may_be_computed(size: Size) -> bool:
    """Whether integers of 32 bits can hold it too, for all sizes that a tensor can have."""
    if size.known is not None:
        return abs(size.known) <= _KNOWN_MAX
    return abs(size.factor) <= _FACTOR_MAX and len(size.symbols) <= _SYMBOLS_MAX


def add(at: At, n: Sequence[Size]) -> Size | None:
    """Of whole numbers; a sum of sizes is a symbol of its own."""
    found = n[0]
    for other in n[1:]:
        found = _add(at, found, other)
    return found


def _add(at: At, a: Size, b: Size) -> Size:
    if a.known is not None and b.known is not None:
        return Size(a.known + b.known)
    if a.known == 0 or b.known == 0:
        return b if a.known == 0 else a
    if a.has_rows or b.has_rows:
        raise Mixes("computes with how many rows there are")
    return at.names.of_expression("sum", *sorted((a, b), key=str))


def subtract(at: At, n: Sequence[Size]) -> Size | None:
    """As `add`; a size less itself is 0."""
    a, b = n
    if a == b:
        return Size(0)
    if a.known is not None and b.known is not None:
        return Size(a.known - b.known)
    if b.known == 0:
        return a
    return None if a.has_rows or b.has_rows else at.names.of_expression("less", a, b)


def multiply(at: At, n: Sequence[Size]) -> Size | None:
    """Products are what sizes are."""
    return n[0] * n[1]


def divide(at: At, n: Sequence[Size]) -> Size | None:
    """Where nothing is left over, else a symbol. What is negative ONNX rounds up and OpenVINO down."""
    a, b = n
    exact = a.over(b)
    if exact is not None:
        return exact
    if a.known is not None and b.known:
        return Size(a.known // b.known) if (a.known < 0) == (b.known < 0) else None
    return None if a.has_rows or b.has_rows else at.names.of_expression("over", a, b)


def equal(at: At, n: Sequence[Size]) -> Size | None:
    """1 or 0 where that is certain: a dimension is never negative."""
    a, b = n
    if a == b:
        return ONE
    if a.known is not None and b.known is not None:
        return Size(0)
    if (a.positive and (b.known or 0) < 0) or (b.positive and (a.known or 0) < 0):
        return Size(0)
    return None


def compare(test: Callable[[int, int], bool]) -> Callable[[At, Sequence[Size]], Size | None]:
    """1 or 0 of two known numbers."""

    def rule(at: At, n: Sequence[Size]) -> Size | None:
        a, b = n[0].known, n[1].known
        return None if a is None or b is None else Size(int(test(a, b)))

    return rule


def where(at: At, n: Sequence[Size]) -> Size | None:
    """The second or the third, where the first is known."""
    if n[0].known is None:
        return n[1] if n[1] == n[2] else None
    return n[1] if n[0].known else n[2]


LAYOUT: dict[str, Rule] = {
    "Compress": _compress,
    "Concat": _concat,
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "DepthToSpace": _blocks,
    "Expand": _expand,
    "EyeLike": _eye_like,
    "Flatten": _flatten,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "OneHot": _one_hot,
    "Pad": _pad,
    "Range": _range,
    "Reshape": _reshape,
    "ReverseSequence": _reverse_sequence,
    "ScatterElements": _gather_elements,
    "ScatterND": _scatter_nd,
    "Shape": _shape,
    "Size": _size,
    "Slice": _slice,
    "SpaceToDepth": _blocks,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "Transpose": _transpose,
    "Trilu": _trilu,
    "Unsqueeze": _unsqueeze,
}
