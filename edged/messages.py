"""The protocol's messages as frozen values.

What a client may send, typed: decoding checks every field's type while it reads, and says where a wrong
one stands. Nothing here knows of sockets, models or limits; `wire` turns frames into these and back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

__all__ = [
    "METHODS",
    "Envelope",
    "InputTensor",
    "LaneRequest",
    "OutputRef",
    "Peer",
    "RegionPart",
    "RegionReference",
    "Request",
    "RequestId",
    "Route",
    "TensorData",
]

RequestId = str | int | None

Envelope = tuple[bytes, ...]
"""A ZeroMQ connection's identity, then the frames that the client's socket wants before a reply."""

Route = Envelope | tuple[int]
"""Where a reply goes: over ZeroMQ, or to a connection of the lease socket by its number. What is first in it
is the connection, and no identity, which a client may choose, is equal to a number."""

METHODS: dict[str, str] = {
    "server_live": "both",
    "server_ready": "both",
    "server_metadata": "both",
    "model_ready": "infer",
    "model_metadata": "infer",
    "model_infer": "infer",
    "model_statistics": "both",
    "repository_index": "both",
    "cancel": "infer",
    "repository_model_load": "admin",
    "repository_model_unload": "admin",
    "server_status": "admin",
    "log_settings": "admin",
    "model_tune": "admin",
    "lease_acquire": "lease",
    "lease_release": "lease",
}
"""Every method, and the socket that takes it: `infer`, `admin`, `both` of these, or `lease`."""


class InputTensor(msgspec.Struct, frozen=True, gc=False):
    """One input as it stands in a request's header; its name may be empty where the model has one input."""

    name: str
    datatype: str
    shape: list[int]
    data: bytes | list[Any] | None = None
    frame: int | None = None
    parameters: dict[str, Any] | None = None


class OutputRef(msgspec.Struct, frozen=True, gc=False):
    """An output that the client wants."""

    name: str
    parameters: dict[str, Any] | None = None


class Request(msgspec.Struct, frozen=True):
    """A request's header, of any method. Keys that are not named here are ignored when decoding."""

    method: str
    v: int = 1
    id: RequestId = None
    model_name: str = ""
    model_version: str = ""
    inputs: list[InputTensor] = []
    outputs: list[OutputRef] | None = None
    parameters: dict[str, Any] | None = None
    must_understand: list[str] = []
    cancel_id: RequestId = None
    settings: dict[str, Any] | None = None


class LaneRequest(Request, frozen=True):
    """A packet on the lease socket: any request of `edged.sock`, or one for memory."""

    byte_size: int | None = None
    region: str | None = None


class RegionReference(msgspec.Struct, frozen=True, gc=False):
    """A piece of leased memory as a request names it; nothing but its form has been checked."""

    name: str
    offset: int
    nbytes: int


class RegionPart(msgspec.Struct, frozen=True, gc=False):
    """A checked piece of leased memory: it lies wholly inside its region, which is the asking uid's own."""

    region: int
    name: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Peer:
    """Who is at the other end, by the kernel's word; the pid is for logs only."""

    uid: int
    gid: int
    pid: int

    def __str__(self) -> str:
        return f"uid {self.uid} pid {self.pid}"


class TensorData(msgspec.Struct, frozen=True, gc=False):
    """A checked input: its raw bytes have exactly the length that its datatype and shape ask for.

    One that lies in leased memory has no raw bytes but a `part`; nobody reads that before the worker does.
    """

    name: str
    datatype: str
    shape: list[int]
    raw: bytes | memoryview
    part: RegionPart | None = None
