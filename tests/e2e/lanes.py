"""A client of lease.sock that is a socket, a descriptor and a mapping, nothing more."""

from __future__ import annotations

import mmap
import os
import socket
from collections.abc import Mapping, Sequence
from typing import Any

import msgpack
import numpy as np

from tests.e2e.harness import WAIT_S, Daemon

__all__ = ["Lane", "Leased"]


class Lane:
    """A connection to lease.sock."""

    def __init__(self, daemon: Daemon) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # A socket with a timeout does not wait for room in the listener's queue.
        self.socket.connect(str(daemon.run_dir / "lease.sock"))
        self.socket.settimeout(WAIT_S)
        self._ids = 0

    def send(self, header: Any) -> None:
        """A packet: bytes as they are, anything else as msgpack."""
        self.socket.send(header if isinstance(header, bytes) else msgpack.packb(header))

    def receive(self) -> dict[str, Any]:
        """The next reply, whosever it is."""
        raw = self.socket.recv(65536)
        assert raw, "the daemon hung up"
        header: dict[str, Any] = msgpack.unpackb(raw, strict_map_key=False)
        return header

    def ask(self, header: Any) -> dict[str, Any]:
        """One request, and its reply."""
        self.send(header)
        return self.receive()

    def infer(self, model: str, inputs: Sequence[Mapping[str, Any]], **fields: Any) -> dict[str, Any]:
        """An inference."""
        header, _ = self.call("model_infer", model_name=model, inputs=list(inputs), **fields)
        return header

    def call(self, method: str, **fields: Any) -> tuple[dict[str, Any], list[int]]:
        """One request; its reply, and the descriptors that came with it."""
        self._ids += 1
        self.send({"method": method, "id": self._ids, **fields})
        return self.reply(self._ids)

    def reply(self, wanted: Any) -> tuple[dict[str, Any], list[int]]:
        """The next reply."""
        raw, fds, _, _ = socket.recv_fds(self.socket, 65536, 4)
        assert raw, "the daemon hung up"
        header = msgpack.unpackb(raw, strict_map_key=False)
        assert header["id"] == wanted
        return header, fds

    def acquire(self, byte_size: int) -> Leased:
        """A region, mapped."""
        header, fds = self.call("lease_acquire", byte_size=byte_size)
        assert "error" not in header, header
        return Leased(header["region"], header["byte_size"], fds[0])

    def release(self, region: str) -> dict[str, Any]:
        """Gives a region back."""
        return self.call("lease_release", region=region)[0]

    def close(self) -> None:
        """Ends the connection, and its leases."""
        self.socket.close()

    def __enter__(self) -> Lane:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Leased:
    """A region as the client sees it."""

    def __init__(self, name: str, nbytes: int, fd: int) -> None:
        self.name = name
        self.nbytes = nbytes
        self.memory = mmap.mmap(fd, nbytes)
        os.close(fd)

    def array(self, shape: tuple[int, ...], dtype: Any = np.float32, offset: int = 0) -> Any:
        """A view of the memory."""
        return np.ndarray(shape, dtype, self.memory, offset)

    def where(self, nbytes: int, offset: int = 0) -> dict[str, Any]:
        """The parameters that name a piece of it."""
        return {
            "shared_memory_region": self.name,
            "shared_memory_offset": offset,
            "shared_memory_byte_size": nbytes,
        }

    def tensor(self, name: str, shape: tuple[int, ...], datatype: str, nbytes: int, offset: int = 0) -> Any:
        """An input that lies in it."""
        return {
            "name": name,
            "datatype": datatype,
            "shape": list(shape),
            "parameters": self.where(nbytes, offset),
        }
