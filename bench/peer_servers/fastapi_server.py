"""FastAPI on uvicorn with uvloop and httptools: one process, the model run inline in the handler.

Inline is what makes it the strongest of its kind: nothing is handed to another thread.
"""

from __future__ import annotations

import sys

import uvicorn
from fastapi import FastAPI, Request, Response
from sessions import load


def main(folder: str, address: str) -> None:
    """Serves until it is ended."""
    models = load(folder)
    app = FastAPI(openapi_url=None)

    @app.post("/{name}")
    async def infer(name: str, request: Request) -> Response:
        answer = models[name].run(await request.body())
        return Response(answer, media_type="application/octet-stream")

    where = (
        {"uds": address[5:]} if address.startswith("unix:") else {"host": "127.0.0.1", "port": int(address)}
    )
    uvicorn.run(app, loop="uvloop", http="httptools", access_log=False, log_level="warning", **where)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
