"""Results as plain Python values, for what knows neither numpy nor bytes: JSON, a web framework's answer.

Owns the one form that each value takes, so that a client's `to_dict` and edgectl's `--json` agree. Nothing is
rounded, and what JSON has no word for becomes a string as protobuf's JSON mapping has it: "NaN", "Infinity",
"-Infinity"; a null would say that there is no value.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

__all__ = ["base64_text", "plain_values"]


def base64_text(data: bytes) -> str:
    """Bytes as protobuf's JSON mapping writes them."""
    return base64.b64encode(data).decode()


def plain_values(value: Any, *, bytes_text: Callable[[bytes], str] = base64_text, bf16: bool = False) -> Any:
    """`value` made of dict, list, str, int, float, bool and None alone.

    Arrays become (nested) lists and a scalar its value; keys of maps become strings, as JSON has no others.
    Of a float each digit stays. With `bf16`, arrays of uint16 hold BF16 as bits, which is how they come where
    ml_dtypes is not installed.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return plain_array(value)
        if isinstance(value, np.generic):
            return plain_array(np.asarray(value))
        if isinstance(value, Mapping):
            return {str(plain(key)): plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple, set, frozenset)):
            return [plain(item) for item in value]
        if isinstance(value, (bytes, bytearray, memoryview)):
            return bytes_text(bytes(value))
        if isinstance(value, float) and not math.isfinite(value):
            return "NaN" if value != value else ("Infinity" if value > 0 else "-Infinity")
        return value

    def plain_array(array: np.ndarray[Any, Any]) -> Any:
        if bf16 and array.dtype == np.uint16:
            array = (array.astype(np.uint32) << 16).view(np.float32)
        elif array.dtype.name == "bfloat16":
            array = array.astype(np.float32)  # each BF16 is an FP32
        if array.dtype.kind in "biu" or (array.dtype.kind == "f" and bool(np.isfinite(array).all())):
            return array.tolist()
        return plain(array.tolist())

    return plain(value)
