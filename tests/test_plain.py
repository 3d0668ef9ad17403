"""Plain values: what JSON takes, with nothing lost on the way."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from edged.plain import plain_values


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (np.float32(0.1), float(np.float32(0.1))),
        (np.float16([65504, 6e-8]), [65504.0, float(np.float16(6e-8))]),
        (np.float64([[1e308], [5e-324]]), [[1e308], [5e-324]]),
        (np.float32([1, np.nan, -np.inf]), [1.0, "NaN", "-Infinity"]),
        (np.array(np.inf), "Infinity"),
        (np.uint64([2**64 - 1]), [2**64 - 1]),
        (np.array([True, False]), [True, False]),
        (np.zeros((0, 3)), []),
        (np.array("text"), "text"),
        (np.array([b"\xff", "a"], dtype=object), ["/w==", "a"]),
        ([{np.int64(7): np.float32(0.5)}], [{"7": 0.5}]),
        ({"deep": [None, (1, [math.nan])]}, {"deep": [None, [1, ["NaN"]]]}),
        (np.uint16([0x3F80]), [0x3F80]),
    ],
)
def test_each_kind_of_value_has_one_form(value: Any, plain: Any) -> None:
    """The same after a round trip through JSON that allows nothing beyond the standard."""
    found = plain_values(value)
    assert found == plain
    assert type(found) is type(plain)
    assert json.loads(json.dumps(found, allow_nan=False)) == plain


def test_bf16_is_numbers_in_either_dress() -> None:
    """ml_dtypes' arrays, and bits where it is not installed, exactly as FP32 has them."""
    bits = np.uint16([0x3F80, 0x4049, 0x7F80, 0xFF80, 0x7FC0, 0x8000])
    want = [1.0, 3.140625, "Infinity", "-Infinity", "NaN", -0.0]
    assert plain_values(bits, bf16=True) == want
    assert plain_values([{"a": bits}], bf16=True) == [{"a": want}]
    ml_dtypes = pytest.importorskip("ml_dtypes")
    assert plain_values(bits.view(ml_dtypes.bfloat16)) == want
