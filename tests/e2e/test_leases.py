"""Leases with the real daemon, and a client that is a socket, a descriptor and a mapping, nothing of edged's."""

from __future__ import annotations

import mmap
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest

from tests import zoo
from tests.e2e.harness import WAIT_S, Daemon, Raw, code_of, running_daemon, until


class Lane:
    """A connection to lease.sock."""

    def __init__(self, daemon: Daemon) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(WAIT_S)
        self.socket.connect(str(daemon.run_dir / "lease.sock"))
        self._ids = 0

    def call(self, method: str, **fields: Any) -> tuple[dict[str, Any], list[int]]:
        """One request; its reply, and the descriptors that came with it."""
        self._ids += 1
        self.socket.send(msgpack.packb({"method": method, "id": self._ids, **fields}))
        return self.reply(self._ids)

    def reply(self, wanted: Any) -> tuple[dict[str, Any], list[int]]:
        """The next reply."""
        raw, fds, _, _ = socket.recv_fds(self.socket, 65536, 4)
        assert raw, "the daemon hung up"
        header = msgpack.unpackb(raw)
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


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One daemon for all tests here that do no harm to it."""
    models = {
        "same.onnx": zoo.identity("FP32", [None]),
        "ints.onnx": zoo.identity("INT64", [None]),
        "text.onnx": zoo.identity("BYTES", [None]),
        "flags.onnx": zoo.identity("BOOL", [None]),
    }
    root = tmp_path_factory.mktemp("leases")
    with running_daemon(root, {"EDGED_LIMITS_LEASE_BYTES": "8MiB"}, models=models) as daemon:
        for name in models:
            daemon.wait_ready(name.removesuffix(".onnx"))
        yield daemon


@pytest.fixture
def raw(daemon: Daemon) -> Iterator[Raw]:
    with daemon.raw() as raw:
        yield raw


@pytest.fixture
def lane(daemon: Daemon) -> Iterator[Lane]:
    with Lane(daemon) as lane:
        yield lane


def leases(daemon: Daemon) -> dict[str, int]:
    """What the daemon says of its leases."""
    found: dict[str, int] = daemon.client.server_status()["leases"]
    return found


def test_an_input_is_read_where_it_lies_and_an_output_lands_there(raw: Raw, lane: Lane) -> None:
    """Nothing but names travels: the numbers are written and read in the client's own mapping."""
    region = lane.acquire(8192)
    x, y = region.array((16,)), region.array((16,), offset=4096)
    for turn in range(3):
        x[:] = np.arange(16) + turn
        reply = raw.infer(
            "same",
            [region.tensor("x", (16,), "FP32", 64)],
            outputs=[{"name": "y", "parameters": region.where(4096, 4096)}],
        )
        (output,) = reply["outputs"]
        assert "data" not in output
        assert output["shape"] == [16]
        assert output["parameters"] == region.where(64, 4096)
        np.testing.assert_array_equal(y, np.arange(16) + turn)
        assert "warnings" not in reply["parameters"]
