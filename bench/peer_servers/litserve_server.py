"""LitServe: the server in one process, the model in a worker of its own, tensors as base64 in JSON."""

from __future__ import annotations

import base64
import sys
from typing import Any

import litserve
from sessions import load


class Api(litserve.LitAPI):
    """What LitServe asks for."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self._folder = folder

    def setup(self, device: str) -> None:
        """Called in the worker."""
        self._models = load(self._folder)

    def decode_request(self, request: dict[str, str], **_: Any) -> tuple[str, bytes]:
        """JSON to what `predict` takes."""
        return request["name"], base64.b64decode(request["data"])

    def predict(self, x: tuple[str, bytes], **_: Any) -> bytes:
        """One run."""
        return self._models[x[0]].run(x[1])

    def encode_response(self, output: bytes, **_: Any) -> dict[str, str]:
        """What `predict` gave to JSON."""
        return {"data": base64.b64encode(output).decode()}


if __name__ == "__main__":
    server = litserve.LitServer(Api(sys.argv[1]), accelerator="cpu", workers_per_device=1)
    server.run(
        host="127.0.0.1",
        port=int(sys.argv[2]),
        log_level="warning",
        access_log=False,
        generate_client_file=False,
    )
