"""Ray Serve: its HTTP proxy in front of one replica, raw bytes both ways."""

from __future__ import annotations

import sys

import ray
from ray import serve
from sessions import load
from starlette.requests import Request
from starlette.responses import Response


@serve.deployment(num_replicas=1, max_ongoing_requests=100, ray_actor_options={"num_cpus": 0})
class Models:
    """What Ray Serve asks for."""

    def __init__(self, folder: str) -> None:
        self._models = load(folder)

    async def __call__(self, request: Request) -> Response:
        """One run."""
        answer = self._models[request.url.path.strip("/")].run(await request.body())
        return Response(answer, media_type="application/octet-stream")


if __name__ == "__main__":
    ray.init(
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        _node_ip_address="127.0.0.1",
        logging_level="error",
        runtime_env={"env_vars": {"PYTHONPATH": sys.path[0]}},
    )
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[2])})
    serve.run(Models.bind(sys.argv[1]), blocking=True)
