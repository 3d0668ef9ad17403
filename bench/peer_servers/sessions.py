"""What every one of the other servers does with a request, so that only the servers differ."""

from __future__ import annotations

import os
from pathlib import Path

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # only effective before the import
import numpy as np
import onnxruntime as ort

__all__ = ["Model", "load"]


class Model:
    """A session, and raw bytes in and out."""

    def __init__(self, path: Path) -> None:
        self.name = path.stem
        self.session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        (spec,) = self.session.get_inputs()
        self.input_name: str = spec.name
        self.output_name: str = self.session.get_outputs()[0].name
        self.shape = tuple(d if isinstance(d, int) else -1 for d in spec.shape)

    def run(self, body: bytes) -> bytes:
        """One tensor's bytes in, one's out."""
        return self.run_array(np.frombuffer(body, np.float32).reshape(self.shape)).tobytes()

    def run_array(self, array: np.ndarray) -> np.ndarray:
        """The same for servers that speak arrays."""
        return self.session.run(None, {self.input_name: array})[0]


def load(folder: str) -> dict[str, Model]:
    """Every model of the folder, by name."""
    models = [Model(path) for path in sorted(Path(folder).glob("*.onnx"))]
    return {model.name: model for model in models}
