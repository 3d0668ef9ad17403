"""The model that proves that a device runs: a convolution and a matrix product with a known answer.

Written out byte by byte in ONNX's protobuf form, because the package that builds models is not installed
where models run. A convolution is in it since on CUDA it needs a library of its own (cuDNN), and numbers so
small that any precision gives them exactly. Runs on Python 3.10 too.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from edged.runtimes.base import LoadCancel, LoadRequest, Model, Runtime

__all__ = ["run_tiny_model", "tiny_model"]

_FLOAT = 1
_OPSET, _IR_VERSION = 13, 7
"""Old enough for every runtime of the last years."""


def run_tiny_model(runtime: Runtime, device: str, *, precision: str = "f32") -> Model:
    """Loads and runs it there. Raises what the runtime raises, ArithmeticError for a wrong answer."""
    fd = os.memfd_create("edged-tiny.onnx", os.MFD_CLOEXEC)
    try:
        os.write(fd, tiny_model())
        model = runtime.load(
            LoadRequest(path=f"/proc/self/fd/{fd}", device=device, precision=precision), LoadCancel()
        )
    finally:
        os.close(fd)
    picture = np.arange(16, dtype=np.float32).reshape(1, 1, 4, 4)
    for _ in range(2):  # a device can answer once and hang on the second run
        (answer,) = model.run({"x": picture}, ["y"])
    # The kernel takes each 3×3 patch's centre, the matrix adds the four and takes the first.
    if answer.shape != (1, 2) or not np.array_equal(answer, [[5 + 6 + 9 + 10, 5]]):
        raise ArithmeticError(f"{device} answered {np.asarray(answer).tolist()} instead of [[30, 5]]")
    return model


def tiny_model() -> bytes:
    """The file's bytes."""
    kernel = np.zeros((1, 1, 3, 3), np.float32)
    kernel[0, 0, 1, 1] = 1
    matrix = np.array([[1, 1], [1, 0], [1, 0], [1, 0]], np.float32)
    graph = b"".join(
        (
            _field(1, _node("Conv", ["x", "k"], "c")),
            _field(1, _node("Relu", ["c"], "r")),
            _field(1, _node("Flatten", ["r"], "f")),
            _field(1, _node("MatMul", ["f", "m"], "y")),
            _field(2, b"tiny"),
            _field(5, _initializer("k", kernel)),
            _field(5, _initializer("m", matrix)),
            _field(11, _value("x", (1, 1, 4, 4))),
            _field(12, _value("y", (1, 2))),
        )
    )
    return _number(1, _IR_VERSION) + _field(7, graph) + _field(8, _number(2, _OPSET))


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*out, value))


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _field(field: int, payload: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(payload)) + payload


def _node(kind: str, inputs: Sequence[str], output: str) -> bytes:
    named = b"".join(_field(1, name.encode()) for name in inputs)
    return named + _field(2, output.encode()) + _field(4, kind.encode())


def _initializer(name: str, array: np.ndarray) -> bytes:
    dims = b"".join(_number(1, d) for d in array.shape)
    return dims + _number(2, _FLOAT) + _field(8, name.encode()) + _field(9, array.tobytes())


def _value(name: str, shape: Sequence[int]) -> bytes:
    dims = b"".join(_field(1, _number(1, d)) for d in shape)
    return _field(1, name.encode()) + _field(2, _field(1, _number(1, _FLOAT) + _field(2, dims)))
