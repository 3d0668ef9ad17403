"""BentoML: a service with one API, tensors as base64 in JSON and raw bytes back.

Its pickled protocol, which would be leaner, is refused by its own public server.
"""

from __future__ import annotations

import base64
import os
import sys

import bentoml
from sessions import load


@bentoml.service(workers=1, traffic={"timeout": 60}, metrics={"enabled": False})
class Models:
    """What BentoML asks for."""

    def __init__(self) -> None:
        self._models = load(os.environ["MODELS_FOLDER"])

    @bentoml.api(route="/infer")
    def infer(self, name: str, data: str) -> bytes:
        """One run."""
        return self._models[name].run(base64.b64decode(data))


if __name__ == "__main__":
    os.environ["MODELS_FOLDER"] = sys.argv[1]
    folder = os.path.dirname(os.path.abspath(__file__))
    command = [sys.executable, "-m", "bentoml", "serve", "bentoml_server:Models", "--working-dir", folder]
    command += ["--host", "127.0.0.1", "--port", sys.argv[2]]
    os.execv(sys.executable, command)
