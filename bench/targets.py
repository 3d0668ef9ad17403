"""What can be asked: edged by each of its ways, a bare echo, a runtime in process, a server over HTTP.

A `Target` is a value that travels to a client process as JSON; `opened` makes it something to ask. The input
is seeded random numbers, made once, so that a request costs what asking costs and not what making a tensor
costs.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # only effective before a runtime's import
import msgpack
import numpy as np
import zmq

from bench.load import Ask
from edged import Client
from edged.runtimes.base import LoadCancel, LoadRequest, create_runtime

__all__ = ["TIMEOUT_S", "Target", "dealer", "frames_of", "input_of", "opened"]

Answer = TypeVar("Answer")

TIMEOUT_S = 60.0
"""Of each request: a benchmark ends, whatever happens to who is asked."""

PACKET_BYTES_MAX = 65536
"""Of the fast lane, either way."""

INLINE_BYTES_MAX = 16 * 1024
"""As the Python client does it: below, a tensor is in the header, above it has a frame of its own."""


@dataclass(frozen=True)
class Target:
    """One way to have one model run.

    `way` says how: `client` is `edged.Client` as it comes, `zeromq` the same without the fast lane, `lease`
    as it comes with the input in the app's own lease, `frames` a bare DEALER with a message made beforehand
    (an echo takes it too), `packets` a bare connection to the fast lane likewise, `defaults` ONNX Runtime in
    process with nothing set, `settings` a runtime in process as edged's worker sets it up, `post` a POST of
    the raw bytes by Python's own HTTP client over one connection that is kept, from array to array, `http`
    the same by a bare socket with a request made beforehand.
    """

    way: str
    endpoint: str = ""
    """edged's or the echo's, or for HTTP `unix:PATH` or `HOST:PORT`."""
    model: str = ""
    """The model's name, in process the file."""
    input_name: str = "x"
    shape: tuple[int, ...] = (1, 64)
    priority: int = 0
    runtime: str = "onnxruntime"
    precision: str = "f32"
    threads: int = 1
    device: str = "CPU"
    body: str = "raw"
    """Of HTTP: `raw` the tensor's bytes, `json` base64 in JSON, `triton` its binary extension; or `grpc`."""
    path: str = "{model}"
    """Of HTTP."""

    def to_json(self) -> str:
        """For a client process's stdin."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Target:
        """What `to_json` wrote."""
        fields = json.loads(text)
        return cls(**{**fields, "shape": tuple(fields["shape"])})


def input_of(target: Target) -> np.ndarray:
    """The input of every request to it: FP32, N(0, 1), the same for the same shape."""
    return np.random.default_rng(7).normal(0, 1, target.shape).astype(np.float32)


@contextlib.contextmanager
def opened(target: Target) -> Iterator[Ask]:
    """Something that asks it once and returns the answer."""
    array = input_of(target)
    with contextlib.ExitStack() as stack:
        match target.way:
            case "client" | "zeromq" | "lease":
                yield _edged(stack, target, array)
            case "frames":
                frames = frames_of(target, array)
                sock = stack.enter_context(dealer(target.endpoint))
                yield lambda: _exchange(sock, frames)
            case "packets":
                (packet,) = frames_of(target, array)
                lane = stack.enter_context(_lane(target.endpoint))
                yield lambda: _answered(lane, packet)
            case "defaults":
                yield _session(target, array)
            case "settings":
                yield _as_the_worker(target, array)
            case "post" | "http" if target.body == "grpc":
                yield _grpc(stack, target, array, made=target.way == "http")
            case "post":
                yield _post(stack, target, array)
            case "http":
                yield _http(stack, target, array)
            case _:
                raise ValueError(f"no way {target.way!r}")


def _edged(stack: contextlib.ExitStack, target: Target, array: np.ndarray) -> Ask:
    fast = target.way != "zeromq"
    client = stack.enter_context(Client(target.endpoint, timeout=TIMEOUT_S, fast=fast))
    if target.way == "lease":
        lease = stack.enter_context(client.lease(array.nbytes))
        leased = lease.array(array.shape, array.dtype)
        leased[:] = array
        array = leased
    inputs = {target.input_name: array}
    return lambda: client.infer(target.model, inputs, priority=target.priority)


def _lane(endpoint: str) -> socket.socket:
    lane = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    lane.connect(str(Path(endpoint.removeprefix("ipc://")).with_name("lease.sock")))
    lane.settimeout(TIMEOUT_S)
    return lane


def _answered(lane: socket.socket, packet: bytes) -> bytes:
    lane.send(packet)
    return lane.recv(PACKET_BYTES_MAX)


def _session(target: Target, array: np.ndarray) -> Ask:
    import onnxruntime as ort

    ort.set_default_logger_severity(4)
    if target.device == "CPU":
        session = ort.InferenceSession(target.model, providers=["CPUExecutionProvider"])
    else:
        session = ort.InferenceSession(target.model, providers=["CUDAExecutionProvider"])
        if "CUDAExecutionProvider" not in session.get_providers():
            raise RuntimeError("ONNX Runtime went back to the CPU in silence")
    feeds = {target.input_name: array}
    return lambda: session.run(None, feeds)


def _as_the_worker(target: Target, array: np.ndarray) -> Ask:
    """The very code by which edged's worker loads and runs: so the settings are the same by themselves."""
    request = LoadRequest(
        target.model, device=target.device, precision=target.precision, threads=target.threads
    )
    model = create_runtime(target.runtime).load(request, LoadCancel())
    feeds, names = {target.input_name: array}, [spec.name for spec in model.outputs]
    return lambda: model.run(feeds, names)


def frames_of(target: Target, array: np.ndarray, request_id: int = 1, **parameters: int) -> list[bytes]:
    """A whole request as it goes over the wire: small tensors in the header, large ones in a frame."""
    tensor: dict[str, Any] = {"name": target.input_name, "datatype": "FP32", "shape": list(array.shape)}
    inline = array.nbytes <= INLINE_BYTES_MAX
    tensor.update({"data": array.tobytes()} if inline else {"frame": 0})
    header: dict[str, Any] = {
        "method": "model_infer",
        "id": request_id,
        "model_name": target.model,
        "inputs": [tensor],
    }
    if target.priority:
        parameters["priority"] = target.priority
    if parameters:
        header["parameters"] = parameters
    return [msgpack.packb(header)] if inline else [msgpack.packb(header), array.tobytes()]


def _exchange(sock: zmq.Socket[bytes], frames: Sequence[bytes]) -> list[zmq.Frame]:
    sock.send_multipart(frames, copy=False)
    return sock.recv_multipart(copy=False)


@contextlib.contextmanager
def dealer(endpoint: str) -> Iterator[zmq.Socket[bytes]]:
    """A bare DEALER socket."""
    sock: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    sock.setsockopt(zmq.LINGER, 0)
    sock.setsockopt(zmq.RCVTIMEO, round(TIMEOUT_S * 1000))
    sock.connect(endpoint)
    try:
        yield sock
    finally:
        sock.close()


def _http(stack: contextlib.ExitStack, target: Target, array: np.ndarray) -> Ask:
    """A bare socket and a request made beforehand: what a library for HTTP would add is not the server's."""
    headers, body = _http_body(target, array)
    lines = [f"POST /{target.path.format(model=target.model)} HTTP/1.1", "Host: localhost"]
    lines += [f"{name}: {value}" for name, value in headers.items()] + [f"Content-Length: {len(body)}"]
    request = "\r\n".join([*lines, "", ""]).encode() + body
    connection = _Kept(stack, target.endpoint)

    def ask(sock: socket.socket) -> bytes:
        sock.sendall(request)
        return _read_response(sock)

    return lambda: connection.asked(ask)


class _Kept:
    """A connection that is kept, and made anew when the server has ended it: many end one that idles."""

    def __init__(self, stack: contextlib.ExitStack, endpoint: str) -> None:
        self._stack = stack
        self._endpoint = endpoint
        self._sock = stack.enter_context(_connected(endpoint))

    def asked(self, ask: Callable[[socket.socket], Answer]) -> Answer:
        """One request over it; over a new one when the old one turns out to be ended."""
        try:
            return ask(self._sock)
        except (ConnectionError, http.client.BadStatusLine):
            self._sock.close()
            self._sock = self._stack.enter_context(_connected(self._endpoint))
            return ask(self._sock)


def _connected(endpoint: str) -> socket.socket:
    if endpoint.startswith("unix:"):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(endpoint[len("unix:") :])
    else:
        host, _, port = endpoint.rpartition(":")
        sock = socket.create_connection((host, int(port)))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.settimeout(TIMEOUT_S)
    return sock


def _http_body(target: Target, array: np.ndarray) -> tuple[dict[str, str], bytes]:
    """The headers and the body that carry an array, in the leanest form that the server understands."""
    raw = array.tobytes()
    match target.body:
        case "raw":
            return {"Content-Type": "application/octet-stream"}, raw
        case "json":
            data = base64.b64encode(raw).decode()
            document = json.dumps({"name": target.model, "data": data})
            return {"Content-Type": "application/json"}, document.encode()
        case "triton":
            tensor = {"name": "x", "shape": array.shape, "datatype": "FP32"}
            head = json.dumps(
                {
                    "inputs": [{**tensor, "parameters": {"binary_data_size": len(raw)}}],
                    "outputs": [{"name": "y", "parameters": {"binary_data": True}}],
                }
            ).encode()
            return {
                "Content-Type": "application/octet-stream",
                "Inference-Header-Content-Length": str(len(head)),
            }, head + raw
    raise ValueError(f"no body {target.body!r}")


def _grpc(stack: contextlib.ExitStack, target: Target, array: np.ndarray, *, made: bool) -> Ask:
    """A call of the Open Inference Protocol's gRPC service; its message is written by hand, it is short."""
    import grpc

    channel = stack.enter_context(grpc.insecure_channel(target.endpoint))
    call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
    message = grpc_message(target.model, array)
    if made:
        return lambda: call(message, timeout=TIMEOUT_S)
    return lambda: call(grpc_message(target.model, array), timeout=TIMEOUT_S)


def grpc_message(model: str, array: np.ndarray) -> bytes:
    """A ModelInferRequest of the Open Inference Protocol.

    model_name = 1, inputs = 5 (name = 1, datatype = 2, shape = 3), raw_input_contents = 7.
    """
    shape = b"".join(_varint(length) for length in array.shape)
    tensor = _field(1, b"x") + _field(2, b"FP32") + _field(3, shape)
    return _field(1, model.encode()) + _field(5, tensor) + _field(7, array.tobytes())


def _field(number: int, data: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])


def _post(stack: contextlib.ExitStack, target: Target, array: np.ndarray) -> Ask:
    """As an app in Python would do it that wants to be quick: what it has and what it gets are arrays."""
    kept = _Kept(stack, target.endpoint)
    connection = http.client.HTTPConnection("localhost", timeout=TIMEOUT_S)
    path = f"/{target.path.format(model=target.model)}"

    def ask(sock: socket.socket) -> np.ndarray:
        if connection.sock is not sock:
            connection.close()
            connection.sock = sock
        headers, body = _http_body(target, array)
        connection.request("POST", path, body, headers)
        response = connection.getresponse()
        answer = response.read()
        if response.status != 200:
            raise RuntimeError(f"unexpected answer: {response.status} {answer[:200]!r}")
        return np.frombuffer(answer, np.uint8)

    return lambda: kept.asked(ask)


def _read_response(sock: socket.socket) -> bytes:
    """The body of a response with a Content-Length; raises RuntimeError for any status but 200."""
    data = sock.recv(65536)
    while (end := data.find(b"\r\n\r\n")) < 0:
        more = sock.recv(65536)
        if not more:
            raise ConnectionResetError("the server hung up")
        data += more
    head = data[:end].lower()
    at = head.find(b"content-length:")
    if head[9:12] != b"200" or at < 0:
        raise RuntimeError(f"unexpected answer: {data[:300]!r}")
    length = int(head[at + 15 :].split(b"\r\n", 1)[0])
    body = data[end + 4 :]
    while len(body) < length:
        more = sock.recv(65536)
        if not more:
            raise ConnectionResetError("the server hung up")
        body += more
    return body
