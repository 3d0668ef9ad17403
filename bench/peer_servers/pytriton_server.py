"""PyTriton: Triton's front end with binary tensors over HTTP, the model in Python beside it, no batching."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from pytriton.decorators import sample
from pytriton.model_config import ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig
from sessions import Model, load


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _function(model: Model) -> Callable[..., Any]:
    @sample
    def infer(x: np.ndarray) -> dict[str, np.ndarray]:
        return {"y": model.run_array(x)}

    return infer


def main(folder: str, port: int) -> None:
    """Serves until it is ended."""
    config = TritonConfig(
        http_address="127.0.0.1",
        http_port=port,
        grpc_address="127.0.0.1",
        grpc_port=_free_port(),
        allow_metrics=False,
    )
    with Triton(config=config) as triton:
        for name, model in load(folder).items():
            rank = len(model.session.get_outputs()[0].shape)
            triton.bind(
                model_name=name,
                infer_func=_function(model),
                inputs=[Tensor(name="x", dtype=np.float32, shape=(-1,) * len(model.shape))],
                outputs=[Tensor(name="y", dtype=np.float32, shape=(-1,) * rank)],
                config=ModelConfig(batching=False),
            )
        triton.serve()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
