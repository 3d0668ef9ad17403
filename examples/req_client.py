"""The protocol by hand: pyzmq and msgpack, nothing of edged, as it would be in any other language.

    python examples/req_client.py ipc:///run/edged/edged.sock

docs/protocol.md says what each key means.
"""

from __future__ import annotations

import os
import struct
import sys
from pathlib import Path

import msgpack
import numpy as np
import zmq

TIMEOUT_MS = 5000


def main(endpoint: str) -> int:
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.REQ)
    socket.setsockopt(zmq.IMMEDIATE, 1)  # queue nothing for a daemon that is not there
    socket.setsockopt(zmq.REQ_RELAXED, 1)  # after a time-out, ask again on the same socket ...
    socket.setsockopt(zmq.REQ_CORRELATE, 1)  # ... and take no late reply for the new one
    socket.setsockopt(zmq.SNDTIMEO, TIMEOUT_MS)
    socket.setsockopt(zmq.RCVTIMEO, TIMEOUT_MS)
    socket.setsockopt(zmq.LINGER, 0)
    socket.connect(endpoint)

    with np.load(Path(__file__).with_name("digits-heldout.npz")) as data:
        pixels, truth = [float(p) for p in data["images"][0]], int(data["labels"][0])
    header = {
        "v": 1,
        "method": "model_infer",
        "id": 1,
        "model_name": "digits",
        "inputs": [
            # Small tensors go inline: 64 numbers of 4 bytes, little-endian. A large one is a frame of its
            # own, behind the header, and says "frame": 0 in place of "data".
            {"name": "image", "datatype": "FP32", "shape": [1, 64], "data": struct.pack("<64f", *pixels)}
        ],
    }
    try:
        socket.send_multipart([msgpack.packb(header)])
        frames = socket.recv_multipart()
    except zmq.Again:
        print(f"no daemon answers at {endpoint}; `make run` starts one", file=sys.stderr)
        return 1
    finally:
        socket.close()

    reply = msgpack.unpackb(frames[0])
    if "error" in reply:
        print(f"{reply['error']['code']}: {reply['error']['message']}", file=sys.stderr)
        return 1
    outputs = {}
    for tensor in reply["outputs"]:
        outputs[tensor["name"]] = tensor["data"] if "data" in tensor else frames[1 + tensor["frame"]]
    (answer,) = struct.unpack("<q", outputs["label"])
    print(f"reads {answer}, is {truth}; made by {reply['parameters']}")
    return 0 if answer == truth else 1


if __name__ == "__main__":
    default = os.environ.get("EDGED_ENDPOINT", "ipc:///run/edged/edged.sock")
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else default))
