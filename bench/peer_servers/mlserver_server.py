"""MLServer: gRPC with raw tensors, the model inline in its one process (no parallel workers)."""

from __future__ import annotations

import asyncio
import socket
import sys

import numpy as np
from mlserver import MLModel, MLServer, ModelSettings, Settings
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse
from sessions import Model, load

_models: dict[str, Model] = {}


class OnnxModel(MLModel):
    """What MLServer asks for."""

    async def load(self) -> bool:
        """It is loaded already."""
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """One run."""
        array = NumpyCodec.decode_input(payload.inputs[0])
        answer = _models[self.name].run_array(np.asarray(array, np.float32))
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("y", answer)])


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


async def _serve(folder: str, port: int) -> None:
    _models.update(load(folder))
    settings = Settings(
        host="127.0.0.1",
        grpc_port=port,
        http_port=_free_port(),
        metrics_endpoint=None,
        parallel_workers=0,
        use_structured_logging=False,
        debug=False,
        logging_settings=None,
    )
    await MLServer(settings).start([ModelSettings(name=name, implementation=OnnxModel) for name in _models])


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1], int(sys.argv[2])))
