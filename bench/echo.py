"""The baseline that serving is held against: a ZeroMQ ROUTER in a poll loop that answers and does nothing.

    python -m bench.echo ipc:///some/path [ANSWER_BYTES]

Sends back what came, or with ANSWER_BYTES the first frames and so many bytes in place of the last one.
"""

from __future__ import annotations

import sys

import zmq


def main(endpoint: str, answer_bytes: int | None) -> None:
    router: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
    router.bind(endpoint)
    answer = None if answer_bytes is None else bytes(answer_bytes)
    poller = zmq.Poller()
    poller.register(router, zmq.POLLIN)
    print("ready", flush=True)
    while True:
        poller.poll()
        frames = router.recv_multipart(copy=False)
        if answer is not None:
            frames[-1] = answer
        router.send_multipart(frames, copy=False)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else None)
