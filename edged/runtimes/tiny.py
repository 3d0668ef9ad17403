"""The model that proves that a device runs: a convolution and a matrix product with a known answer.

A convolution is in it since on CUDA it needs a library of its own (cuDNN), and the numbers are so small that
any precision gives them exactly. Runs on Python 3.10 too.
"""

from __future__ import annotations

import os

import numpy as np

from edged.runtimes.base import LoadCancel, LoadRequest, Model, Runtime
from edged.runtimes.onnx_writer import Operator, Port, write_model

__all__ = ["run_tiny_model", "tiny_model"]

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
    return write_model(
        (
            Operator("Conv", ["x", "k"], ["c"]),
            Operator("Relu", ["c"], ["r"]),
            Operator("Flatten", ["r"], ["f"]),
            Operator("MatMul", ["f", "m"], ["y"]),
        ),
        inputs=[Port("x", "FP32", (1, 1, 4, 4))],
        outputs=[Port("y", "FP32", (1, 2))],
        constants={"k": ("FP32", kernel), "m": ("FP32", matrix)},
        opsets={"": _OPSET},
        ir_version=_IR_VERSION,
    )
