"""What a model's free dimensions mostly are, by rank, datatype and what is fixed."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edged.sizes import fit
from edged.tensors import ITEM_BYTES, TensorSpec
from edged.typical import GUESSES, INPUT_BYTES_MAX, least, typical


def first(datatype: str, *shape: int, names: tuple[str | None, ...] = ()) -> tuple[int, ...]:
    """The likeliest shape of a model with one input."""
    return typical([TensorSpec("x", datatype, shape, dim_names=names)])[0]["x"]


@pytest.mark.parametrize(
    ("datatype", "declared", "likely"),
    [
        ("FP32", (-1, 3, -1, -1), (1, 3, 224, 224)),
        ("UINT8", (-1, -1, -1, 3), (1, 224, 224, 3)),
        ("FP16", (-1, 1, -1, -1), (1, 1, 224, 224)),
        ("FP32", (-1, -1, -1, -1), (1, 3, 224, 224)),
        ("FP32", (-1, 3, 416, 416), (1, 3, 416, 416)),
        ("FP32", (-1, 3, 48, -1), (1, 3, 48, 320)),
        ("FP32", (2, 3, -1, -1), (2, 3, 224, 224)),
        ("FP32", (-1, 12, -1, 64), (1, 12, 32, 64)),
        ("FP32", (3, -1, -1), (3, 224, 224)),
        ("UINT8", (-1, -1, 3), (224, 224, 3)),
        ("FP32", (-1, -1, 3), (1, 128, 3)),
        ("FP32", (-1, 80, -1), (1, 80, 128)),
        ("FP32", (-1, -1, 40), (1, 128, 40)),
        ("INT64", (-1, -1), (1, 128)),
        ("INT64", (-1, 77), (1, 77)),
        ("FP32", (-1, -1), (1, 16_000)),
        ("FP32", (-1, 512), (1, 512)),
        ("FP32", (-1,), (16_000,)),
        ("INT64", (-1,), (1,)),
        ("BYTES", (-1, -1), (1, 1)),
        ("FP32", (), ()),
        ("FP32", (-1, 3, -1, -1, -1), (1, 3, 16, 112, 112)),
        ("FP32", (-1, -1, 2, -1, -1, -1), (1, 4, 2, 4, 4, 4)),
    ],
)
def test_rank_datatype_and_what_is_fixed_tell(
    datatype: str, declared: tuple[int, ...], likely: tuple[int, ...]
) -> None:
    """Pictures, tokens, sound, frames, kept states; what is fixed stays."""
    assert first(datatype, *declared) == likely


def test_one_name_is_one_size() -> None:
    """Over all inputs, and within one; a batch is one row wherever it stands."""
    ids = TensorSpec("ids", "INT64", (-1, -1), dim_names=("batch", "seq"))
    state = TensorSpec("state", "FP32", (2, -1, -1), dim_names=(None, "batch_size", "seq"))
    assert typical([ids, state])[0] == {"ids": (1, 128), "state": (2, 1, 128)}
    square = TensorSpec("x", "FP32", (-1, 3, -1, -1), dim_names=("N", None, "side", "side"))
    assert [shapes["x"][2:] for shapes in typical([square])] == [(n, n) for n in (224, 640, 320, 64)]
    assert first("FP32", -1, names=("N",)) == (1,)


def test_what_is_known_holds_and_names_carry_it() -> None:
    """An owner who names one input's shape need not repeat it for its neighbours."""
    specs = [
        TensorSpec("ids", "INT64", (-1, -1), dim_names=("b", "s")),
        TensorSpec("mask", "INT64", (-1, -1), dim_names=("b", "s")),
        TensorSpec("extra", "FP32", (-1,), optional=True),
    ]
    assert typical(specs, {"mask": [2, 77]}) == [{"ids": (2, 77), "mask": (2, 77)}]
    assert typical(specs, {"extra": [5]})[0] == {"ids": (1, 128), "mask": (1, 128), "extra": (5,)}


def test_other_guesses_follow_the_first() -> None:
    """For a model that refuses it; one that leaves nothing open, or only rows, has a single size."""
    assert [s["x"][2] for s in typical([TensorSpec("x", "FP32", (1, 3, -1, -1))])] == [224, 640, 320, 64]
    assert typical([TensorSpec("x", "FP32", (-1, 64))]) == [{"x": (1, 64)}]
    assert typical([TensorSpec("x", "FP32", (1, 64))]) == [{"x": (1, 64)}]


def test_a_guess_takes_no_more_than_its_memory() -> None:
    """One beyond the bound is left out; where nothing is left, and for a free rank, there is none."""
    wide = TensorSpec("x", "FP32", (-1, 3, 9000, -1))
    assert [shapes["x"][3] for shapes in typical([wide])] == [320, 224, 64]
    assert not typical([TensorSpec("x", "FP32", (-1, 1 << 30))])
    assert not typical([TensorSpec("x", "FP32", None)])
    assert least([TensorSpec("x", "FP32", None), TensorSpec("y", "FP32", (-1, 3))]) == {"x": (), "y": (1, 3)}
    assert typical([wide], {"x": [1, 3, 9000, 4096]}) == [{"x": (1, 3, 9000, 4096)}]


@given(
    st.lists(
        st.builds(
            TensorSpec,
            st.sampled_from("abc"),
            st.sampled_from((*ITEM_BYTES, "BYTES")),
            st.lists(st.sampled_from((-1, -1, 0, 1, 3, 80)), max_size=7).map(tuple),
            st.booleans(),
            st.lists(st.sampled_from((None, "N", "h", "w")), max_size=9).map(tuple),
        ),
        max_size=3,
        unique_by=lambda spec: spec.name,
    )
)
def test_every_guess_is_one_that_would_be_admitted(specs: list[TensorSpec]) -> None:
    """Whatever a model declares: few, of the declared shapes, and within the bound."""
    found = typical(specs)
    assert len(found) <= GUESSES
    for shapes in (*found, least(specs)):
        assert fit(shapes, specs)
    by_name = {spec.name: spec for spec in specs}
    for shapes in found:
        sizes = [math.prod(s) * ITEM_BYTES.get(by_name[n].datatype, 1) for n, s in shapes.items()]
        assert sum(sizes) <= INPUT_BYTES_MAX
