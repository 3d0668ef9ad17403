"""What a model says of itself: fields and metadata of its own, neither hidden by the other, and the bound."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edged.properties import FIELDS, METADATA_BYTES_MAX, largest, merged, metadata_bytes, parted

TEXT = st.text(max_size=5)
KEYS = st.sampled_from([*FIELDS, *(f"model.{name}" for name in FIELDS), "labels", ""]) | TEXT


@given(st.dictionaries(st.sampled_from(FIELDS), TEXT), st.dictionaries(KEYS, TEXT))
def test_what_is_a_files_own_is_never_lost(fields: dict[str, str], own: dict[str, str]) -> None:
    """Whatever its keys are called; empty values too."""
    properties = merged(fields, own)
    assert own.items() <= properties.items()


@given(st.dictionaries(st.sampled_from(FIELDS), TEXT), st.dictionaries(KEYS, TEXT))
def test_both_are_told_apart_again(fields: dict[str, str], own: dict[str, str]) -> None:
    """Unless the metadata itself has keys of the form that is for this."""
    if any(key.startswith("model.") for key in own):
        return
    assert parted(merged(fields, own)) == ({name: fields.get(name, "") for name in FIELDS}, own)


def test_a_key_of_ones_own_that_is_called_like_a_field() -> None:
    """As exporters write them: both are there, each under a name that says whose it is."""
    properties = merged({"version": "7", "producer_name": "torch"}, {"version": "8.1", "description": "mine"})
    assert properties == {
        "producer_name": "torch",
        "model.version": "7",
        "model.description": "",
        "version": "8.1",
        "description": "mine",
    }


@pytest.mark.parametrize(
    ("metadata", "named"),
    [
        ({"a": "x" * (METADATA_BYTES_MAX - 1)}, []),
        ({"a": "x" * METADATA_BYTES_MAX}, ["a"]),
        ({"a": "ä" * (METADATA_BYTES_MAX // 2)}, ["a"]),
        ({"small": "x", "a": "x" * METADATA_BYTES_MAX, "b": "x" * (METADATA_BYTES_MAX + 1)}, ["b", "a"]),
        ({f"key{n:02}": "x" * (1 << 17) for n in range(40)}, [f"key{n:02}" for n in range(8)]),
        ({"k" * 100: "x" * METADATA_BYTES_MAX}, ["k" * 64 + "…"]),
    ],
)
def test_the_keys_that_are_named(metadata: dict[str, str], named: list[str]) -> None:
    """The largest, until the rest would fit; few, and short."""
    assert (metadata_bytes(metadata) > METADATA_BYTES_MAX) == bool(named)
    assert largest(metadata) == named
