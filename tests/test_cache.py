"""Kept answers: the same question finds them, nothing else does, and they never take more than they may."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edged.cache import ENTRY_BYTES, Answer, Keep, ResponseCache, question
from edged.messages import TensorData


def tensor(raw: bytes = b"\0" * 8, name: str = "x", datatype: str = "FP32", shape: Any = (2,)) -> TensorData:
    """An input."""
    return TensorData(name, datatype, list(shape), raw)


def answer(size: int) -> Answer:
    """An answer whose one output has so many bytes."""
    return Answer((("y", "UINT8", [size], b"\1" * size),), {"device": "CPU"})


def keep(number: int, bytes_max: int = 1 << 20) -> Keep:
    """How the answer to the question of this number is kept."""
    return Keep(b"%d" % number, bytes_max)


def test_questions_that_differ_in_anything_differ() -> None:
    """Bytes, names, datatypes, shapes, wanted outputs, and where one input ends and the next begins."""
    asked = [
        question([tensor()], None),
        question([tensor(b"\0" * 7 + b"\1")], None),
        question([tensor(name="z")], None),
        question([tensor(datatype="INT32")], None),
        question([tensor(shape=(1, 2))], None),
        question([tensor()], ["y"]),
        question([tensor()], []),
        question([tensor()], ["y", "z"]),
        question([tensor()], ["z", "y"]),
        question([tensor()], ["y', 'z"]),
        question([], None),
        question([tensor(b"ab", "x", "BYTES", (1,)), tensor(b"c", "y", "BYTES", (1,))], None),
        question([tensor(b"a", "x", "BYTES", (1,)), tensor(b"bc", "y", "BYTES", (1,))], None),
    ]
    assert len(set(asked)) == len(asked)
    assert question([tensor(bytearray(8))], None) == asked[0]  # type: ignore[arg-type] # any buffer will do


def test_an_answer_lives_as_long_as_it_is_told() -> None:
    """With no time to live for good, else up to its end and not at it."""
    cache = ResponseCache(1 << 20)
    cache.put(1, keep(1), answer(10), ttl_s=5.0, now_s=100.0)
    cache.put(1, keep(2), answer(10), now_s=100.0)
    assert cache.get(1, b"1", 104.9) == answer(10)
    assert cache.get(1, b"1", 105.0) is None
    assert cache.get(1, b"2", 1e12) == answer(10)
    assert cache.get(2, b"2", 0.0) is None, "another model's question is another"
    assert cache.snapshot() == {"entries": 1, "bytes": ENTRY_BYTES + 10}


def test_the_one_used_longest_ago_goes_first() -> None:
    """Within what the model may keep."""
    cache = ResponseCache(1 << 20)
    bound = 3 * (ENTRY_BYTES + 10)
    for number in (1, 2, 3):
        cache.put(1, keep(number, bound), answer(10), now_s=0.0)
    cache.get(1, b"1", 0.0)
    cache.put(1, keep(4, bound), answer(10), now_s=0.0)
    assert [cache.get(1, b"%d" % n, 0.0) is not None for n in (1, 2, 3, 4)] == [True, False, True, True]


def test_what_is_too_large_is_not_kept_and_pushes_nothing_out() -> None:
    """Larger than its model's bound, or than all models'."""
    cache = ResponseCache(50_000)
    cache.put(1, keep(1), answer(10), now_s=0.0)
    cache.put(1, keep(2, 2000), answer(5000), now_s=0.0)
    cache.put(1, keep(3), answer(60_000), now_s=0.0)
    assert cache.snapshot() == {"entries": 1, "bytes": ENTRY_BYTES + 10}


def test_all_models_together_have_a_bound() -> None:
    """The one that keeps the most gives way, also when the bound is made smaller."""
    cache = ResponseCache(10 * (ENTRY_BYTES + 10))
    for number in range(9):
        cache.put(1, keep(number), answer(10), now_s=0.0)
    cache.put(2, keep(1), answer(10), now_s=0.0)
    cache.put(2, keep(2), answer(10), now_s=0.0)
    assert (cache.snapshot(1)["entries"], cache.snapshot(2)["entries"]) == (8, 2)
    cache.bytes_max = 4 * (ENTRY_BYTES + 10)
    cache.shrink()
    assert (cache.snapshot(1)["entries"], cache.snapshot(2)["entries"]) == (2, 2)
    cache.drop(1)
    cache.drop(9)
    assert cache.snapshot() == cache.snapshot(2)
    cache.clear()
    assert cache.snapshot() == {"entries": 0, "bytes": 0}


@pytest.mark.parametrize("bytes_max", [0, 5000, 20_000])
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["put", "get", "drop"]),
            st.integers(1, 3),
            st.integers(0, 6),
            st.integers(0, 4000),
        ),
        max_size=60,
    )
)
def test_the_accounts_are_exact(bytes_max: int, steps: list[tuple[str, int, int, int]]) -> None:
    """Bytes and entries agree with what can be got, after every step, and the bounds hold."""
    cache = ResponseCache(bytes_max)
    for now_s, (what, instance, number, size) in enumerate(steps):
        if what == "put":
            ttl_s = 5.0 if size % 2 else None
            cache.put(instance, keep(number, 9000), answer(size), ttl_s=ttl_s, now_s=float(now_s))
        elif what == "drop":
            cache.drop(instance)
        else:
            cache.get(instance, b"%d" % number, float(now_s))
        kept = {i: cache._kept[i].answers for i in cache._kept}
        sizes = {i: sum(each.nbytes for _, each in found.values()) for i, found in kept.items()}
        assert cache.snapshot()["bytes"] == sum(sizes.values()) == cache._bytes <= bytes_max
        assert all(cache.snapshot(i)["bytes"] == size <= 9000 for i, size in sizes.items())
