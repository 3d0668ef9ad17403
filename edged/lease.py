"""Leases: shared memory that the daemon lends, so that large tensors need no copy through a socket.

Owns the connection to `lease.sock`, the mappings of what came over it, and a client's pool of buffers. Never
decides which tensor travels by lease: `clientwire` does. The daemon makes the memory and seals its size, so
that neither side can make the other's reads fault; an unsealed descriptor is refused here too.

A lease lives as long as the connection that took it. When the daemon goes, or this process is a forked
child, the connection is lost and with it every lease: the mapping stays readable, since arrays may lie in it,
but no daemon knows it any more.

Threads share a `Leases`. A mapping can be dropped by the garbage collector at any moment, in any thread: what
is then to be told to the daemon goes into a queue that whoever has the connection's lock empties.
"""

from __future__ import annotations

import bisect
import collections
import errno
import fcntl
import mmap
import os
import select
import socket as unix
import threading
import time
import weakref
from collections.abc import Iterable
from types import TracebackType
from typing import Any

import msgpack
import numpy as np
import numpy.typing as npt

from edged.arrays import Array
from edged.errors import (
    EdgedError,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    PermissionDenied,
    ResourceExhausted,
    Unavailable,
    Unimplemented,
    error_from_wire,
)

__all__ = ["LEASE_SOCKET", "Buffer", "Lease", "Leases", "Region"]

LEASE_SOCKET = "lease.sock"

_PACKET_BYTES_MAX = 64 * 1024
"""The protocol's bound; answers have 200 bytes."""

_ANSWER_S_MAX = 1.0
"""A daemon answers within a millisecond. One that takes this long is busy or stuck, and frames still work."""

_RETRY_S = 1.0
"""After a refusal (no lease.sock, quota, no answer) the pool asks no more for this long: asking costs a look
at the file system or a round trip for each request."""

_BUFFER_BYTES_MIN = 1024 * 1024
"""The smallest buffer of the pool, so that tensors of similar sizes share one."""

_POOL_BYTES_MAX = 128 * 1024 * 1024
"""All buffers of one client: half of what a daemon lends one user by default, so that two apps have room."""

_POOL_BUFFERS_MAX = 16
"""A quarter of the leases that a connection may have; more requests at once than that send frames."""

_IDLE_S_MAX = 30.0
"""A free buffer that was not needed for this long goes back to the daemon at the pool's next use."""

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL

_FLAGS = unix.MSG_DONTWAIT | unix.MSG_NOSIGNAL


class Region(mmap.mmap):
    """One lease's memory, mapped.

    It is never unmapped but by going: arrays lie in it, and keep it. When the last is gone, or by `give_back`
    before, the daemon is told.
    """

    name: str
    address: int
    link: LeaseLink
    give_back: weakref.finalize[[str], Region]
    used_at: float

    @classmethod
    def of(cls, fd: int, nbytes: int, name: str, link: LeaseLink) -> Region:
        """Maps a descriptor that came from the daemon. Raises Internal for one that is not as promised."""
        try:
            seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        except OSError:
            seals = 0
        if seals & _SEALS != _SEALS or os.fstat(fd).st_size < nbytes:
            raise Internal(
                f"the daemon at {link.path} lent memory that is not sealed, or smaller than it said",
                reason="BAD_REPLY",
            )
        region = cls(fd, nbytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        region.name = name
        region.link = link
        region.used_at = 0.0
        region.address = np.frombuffer(region, np.uint8).__array_interface__["data"][0]
        region.give_back = weakref.finalize(region, link.release, name)
        region.give_back.atexit = False  # The kernel closes the connection, which says the same.
        return region


class LeaseLink:
    """One connection to `lease.sock`. It never reconnects; `lost` never goes back."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._lost = False
        self._lock = threading.Lock()
        self._released: collections.deque[str] = collections.deque()
        self._last_id = 0
        try:
            self._socket = unix.socket(unix.AF_UNIX, unix.SOCK_SEQPACKET | unix.SOCK_NONBLOCK)
        except OSError as e:
            raise ResourceExhausted(
                f"{path}: this process can open no socket: {e}", reason="CLIENT_RESOURCES"
            ) from None
        weakref.finalize(self, self._socket.close)
        error = self._socket.connect_ex(path)
        if error:
            self._socket.close()
            raise _refusal(path, error)
        _links.add(self)

    @property
    def lost(self) -> bool:
        """Whether the daemon has hung up; asked of the kernel."""
        if not self._lost:
            try:
                hangup = select.poll()
                hangup.register(self._socket, 0)
                self._lost = bool(hangup.poll(0))
            except ValueError:  # Closed in another thread.
                self._lost = True
        return self._lost

    def acquire(self, nbytes: int, until: float) -> Region:
        """Takes a lease. Raises what the daemon refuses with, and Unavailable when it does not answer."""
        until = min(until, time.monotonic() + _ANSWER_S_MAX)
        with self._lock:
            self._last_id += 1
            self._send({"v": 1, "method": "lease_acquire", "id": self._last_id, "byte_size": nbytes})
            answer, fd = self._answer_to(self._last_id, until)
        self._tell_released()
        error = answer.get("error")
        if error is not None and fd is None:
            raise error_from_wire(error if isinstance(error, dict) else {})
        try:
            name, size = answer.get("region"), answer.get("byte_size")
            if fd is None or not isinstance(name, str) or not isinstance(size, int) or size < nbytes:
                raise Internal(f"{self.path}: an answer breaks the protocol", reason="BAD_REPLY")
            return Region.of(fd, size, name, self)
        except Internal:
            self.close()
            raise
        except OSError as e:
            self._released.append(str(name))
            raise ResourceExhausted(
                f"{self.path}: this process cannot map a lease: {e}", reason="CLIENT_RESOURCES"
            ) from None
        finally:
            if fd is not None:
                os.close(fd)

    def release(self, name: str) -> None:
        """Gives a lease back; never blocks, never raises."""
        self._released.append(name)
        self._tell_released()

    def close(self) -> None:
        """Ends the connection, and all its leases."""
        self._lost = True
        with self._lock:
            self._socket.close()

    def abandon(self) -> None:
        """In a forked child: the leases are the parent's, and a lock may have been held at the fork."""
        self._lost = True
        self._lock = threading.Lock()
        self._socket.close()  # Else the parent's leases would outlive it.

    def _tell_released(self) -> None:
        while self._released and not self._lost and self._lock.acquire(blocking=False):
            try:
                self._next_answer()  # Reads what answered earlier releases.
                while self._released:
                    self._send({"method": "lease_release", "id": 0, "region": self._released[0]})
                    self._released.popleft()
            except EdgedError:
                return  # Lost; or the daemon does not read now, and the next call tries again.
            finally:
                self._lock.release()

    # What follows runs under the lock.

    def _send(self, packet: dict[str, Any]) -> None:
        try:
            self._socket.send(msgpack.packb(packet), _FLAGS)
        except BlockingIOError:
            raise Unavailable(f"{self.path} takes no more packets", reason="SOCKET_FULL") from None
        except OSError:
            raise self._gone() from None

    def _answer_to(self, request_id: int, until: float) -> tuple[dict[str, Any], int | None]:
        readable = select.poll()
        readable.register(self._socket, select.POLLIN)
        while True:
            answer = self._next_answer(request_id)
            if answer is not None:
                return answer
            remaining_s = until - time.monotonic()
            if remaining_s <= 0:
                raise Unavailable(f"{self.path} did not answer in time", reason="NO_ANSWER")
            readable.poll(remaining_s * 1000)

    def _next_answer(self, request_id: int = 0) -> tuple[dict[str, Any], int | None] | None:
        """The answer to a request if it is there; reads past those that nobody waits for any more."""
        while True:
            answer, fd = self._read()
            if answer is None:
                return None
            if request_id and answer.get("id") == request_id:
                return answer, fd
            if fd is not None:
                os.close(fd)
            if isinstance(answer.get("region"), str):
                self._released.append(answer["region"])  # Of a call that waited too long.

    def _read(self) -> tuple[dict[str, Any] | None, int | None]:
        """The next answer and its descriptor; `(None, None)` when none is there."""
        try:
            packet, fds, flags, _ = unix.recv_fds(
                self._socket, _PACKET_BYTES_MAX, 1, unix.MSG_DONTWAIT | unix.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return None, None
        except OSError:
            raise self._gone() from None
        fd = fds[0] if fds else None
        if not packet:
            raise self._gone()
        try:
            answer = msgpack.unpackb(packet, strict_map_key=False)
        except ValueError:
            answer = None
        if flags & unix.MSG_TRUNC or not isinstance(answer, dict):
            answer = {}
        return answer, fd

    def _gone(self) -> Unavailable:
        self._lost = True
        return Unavailable(f"the connection to {self.path} was lost", reason="CONNECTION_LOST")


def _refusal(path: str, error: int) -> EdgedError:
    if error in (errno.EACCES, errno.EPERM):
        return PermissionDenied(f"{path} may not be opened by this user", reason="SOCKET_PERMISSION")
    if error in (errno.ENOENT, errno.ECONNREFUSED):
        return Unimplemented(
            f"the daemon lends no shared memory: nobody listens at {path}; update edged, or send the arrays "
            "without a lease",
            reason="NO_LEASES",
        )
    return Unavailable(f"{path}: {os.strerror(error)}", reason="CONNECTION_LOST")


def _check(region: Region) -> None:
    """Raises Unavailable when the daemon that lent a region no longer does."""
    if region.link.lost:
        raise Unavailable(
            "the lease is lost, since the daemon restarted or this process was forked after it was taken; "
            "take a new one with Client.lease and make the arrays anew",
            reason="LEASE_LOST",
        )


class Lease:
    """Memory that this app and the daemon share, from `Client.lease`.

    Arrays made by `array` are read by the daemon from where they lie, and outputs may be put into them. Leave
    an array alone while a request that names it is in flight. A context manager: leaving it gives the memory
    back. Arrays that are still there stay usable as plain memory, and are then sent as any other array is.

    When the daemon restarts, the lease is lost: `array` and requests with its arrays raise Unavailable with
    reason LEASE_LOST; take a new one. So it is in a forked child.
    """

    def __init__(self, region: Region, leases: Leases) -> None:
        self._region = region
        self._leases = leases
        self._closed = False
        self.region: str = region.name
        """The name by which the daemon knows the memory."""
        self.nbytes: int = len(region)
        """What was asked for, rounded up to whole pages."""

    @property
    def lost(self) -> bool:
        """Whether the daemon that lent it is gone."""
        return self._region.link.lost

    def array(
        self, shape: int | tuple[int, ...], dtype: npt.DTypeLike = np.float32, offset: int = 0
    ) -> Array:
        """An array of this shape and dtype that begins `offset` bytes into the lease; not zeroed when reused.

        Raises InvalidArgument when it does not fit or `offset` is not a multiple of an element's size,
        FailedPrecondition after `close`, and Unavailable when the lease is lost.
        """
        if self._closed:
            raise FailedPrecondition("the lease is closed; take a new one", reason="LEASE_CLOSED")
        _check(self._region)
        dtype = np.dtype(dtype)
        lengths = (shape,) if isinstance(shape, int) else tuple(shape)
        if dtype.hasobject:
            raise InvalidArgument(f"a lease holds no {dtype}: only plain numbers", reason="BAD_DATATYPE")
        if offset < 0 or offset % max(1, dtype.itemsize) or any(length < 0 for length in lengths):
            raise InvalidArgument(
                f"offset {offset}, shape {lengths}: expected lengths from 0, and an offset from 0 that is a "
                f"multiple of {dtype.itemsize}, the size of {dtype}",
                reason="BAD_REGION",
            )
        try:
            return np.ndarray(lengths, dtype, self._region, offset)
        except (TypeError, ValueError) as e:
            raise InvalidArgument(
                f"{dtype} {list(lengths)} at {offset} does not lie in a lease of {self.nbytes} bytes: {e}",
                reason="BAD_REGION",
            ) from None

    def close(self) -> None:
        """Gives the memory back; the daemon takes it once no request in flight uses it."""
        if not self._closed:
            self._closed = True
            self._leases.remove(self._region)
            self._region.give_back()

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "lost" if self.lost else f"region {self.region}"
        return f"<Lease of {self.nbytes} bytes, {state}>"


class Buffer:
    """A buffer of the pool that belongs to one request, until `release`."""

    __slots__ = ("_leases", "memory")

    def __init__(self, memory: Region, leases: Leases) -> None:
        self.memory = memory
        self._leases = leases

    def release(self, reusable: bool) -> None:
        """Ends the request's use. Unless `reusable` the daemon may still read it, and no request gets it."""
        self._leases.put(self.memory, reusable)


class Leases:
    """What one client has of leases: its connection, its app's regions by address, and its pool."""

    def __init__(self) -> None:
        self._link: LeaseLink | None = None
        self._linking = threading.Lock()
        self._lock = threading.Lock()
        self._starts: list[int] = []
        self._regions: list[weakref.ref[Region]] = []
        self._free: list[Region] = []
        self._pool: dict[object, int] = {}  # The size of every buffer, free or not, by its lease's name.
        self._retry_at = 0.0
        _alive.add(self)

    def lease(self, path: str, nbytes: int, until: float) -> Lease:
        """Takes a lease for the app from the daemon whose socket for inference lies at `path`."""
        if isinstance(nbytes, bool) or not isinstance(nbytes, int) or nbytes <= 0:
            raise InvalidArgument(f"a lease has bytes from 1, got {nbytes!r}", reason="BAD_REGION")
        region = self._linked(path).acquire(nbytes, until)
        with self._lock:
            kept = [(r.address, ref) for ref in self._regions if (r := ref()) is not None]
            kept = sorted([*kept, (region.address, weakref.ref(region))], key=lambda pair: pair[0])
            self._set_regions(kept)
        return Lease(region, self)

    def remove(self, region: Region) -> None:
        """Arrays in this region are no longer looked for."""
        with self._lock:
            kept = [(r.address, ref) for ref in self._regions if (r := ref()) not in (None, region) and r]
            self._set_regions(kept)

    def _set_regions(self, entries: list[tuple[int, weakref.ref[Region]]]) -> None:
        self._starts, self._regions = [start for start, _ in entries], [ref for _, ref in entries]

    def check(self, memories: Iterable[object]) -> None:
        """Raises Unavailable when one of these regions, which `locate` found, is lost."""
        for memory in memories:
            if isinstance(memory, Region):
                _check(memory)

    def locate(self, array: Array) -> tuple[Region, int] | None:
        """The region of the app's in which a contiguous array wholly lies, and its offset there."""
        if not self._starts or not array.flags.c_contiguous:
            return None
        address = array.__array_interface__["data"][0]
        with self._lock:
            at = bisect.bisect_right(self._starts, address) - 1
            region = self._regions[at]() if at >= 0 else None
        if region is None:
            return None
        offset: int = address - region.address
        return (region, offset) if offset + array.nbytes <= len(region) else None

    def take(self, path: str, nbytes: int, until: float, *, grow: bool = True) -> Buffer | None:
        """A buffer for one request; None when there is none, and the request must do without.

        With `grow` False the daemon is not asked for more: then this never waits.
        """
        link = self._link
        if link is None or link.lost or not _beside(path, link.path):
            if not grow or time.monotonic() < self._retry_at:
                return None
            try:
                link = self._linked(path)
            except EdgedError:
                self._retry_at = time.monotonic() + _RETRY_S
                return None
        with self._lock:
            fits = [region for region in self._free if len(region) >= nbytes]
            if fits:
                region = min(reversed(fits), key=len)  # The smallest, of these the last used.
                self._free.remove(region)
                return Buffer(region, self)
            size = self._growth(nbytes) if grow and time.monotonic() >= self._retry_at else 0
            if not size:
                return None
            ticket = object()
            self._pool[ticket] = size
        try:
            region = link.acquire(size, until)
        except EdgedError:
            self._retry_at = time.monotonic() + _RETRY_S
            return None
        else:
            self._pool[region.name] = len(region)
            return Buffer(region, self)
        finally:
            self._pool.pop(ticket, None)

    def may_grow(self) -> bool:
        """Whether `take` with `grow` would ask the daemon, and so may wait."""
        return time.monotonic() >= self._retry_at

    def put(self, region: Region, reusable: bool) -> None:
        """Takes a request's buffer back into the pool, or gives it back to the daemon."""
        now = time.monotonic()
        unwanted: list[Region] = []
        if reusable and not region.link.lost and region.link is self._link:
            region.used_at = now
            with self._lock:
                self._free.append(region)
                while self._free[0].used_at < now - _IDLE_S_MAX:
                    unwanted.append(self._free.pop(0))
        else:
            unwanted.append(region)
        for each in unwanted:
            self._drop(each)

    def reset(self) -> None:
        """Ends the connection: the daemon said that it does not know a lease which came from it."""
        with self._linking:
            self._unlink()

    def close(self) -> None:
        """Gives everything back."""
        self.reset()

    def abandon(self) -> None:
        """In a forked child: the parent's buffers are not ours to use."""
        self._lock = threading.Lock()
        self._linking = threading.Lock()
        self._link = None
        self._free = []
        self._pool = {}
        self._retry_at = 0.0

    def _linked(self, path: str) -> LeaseLink:
        """The connection to the daemon at `path`, made anew when it was lost."""
        with self._linking:
            link = self._link
            if link is not None and not link.lost and _beside(path, link.path):
                return link
            self._unlink()
            self._link = LeaseLink(os.path.join(os.path.dirname(path), LEASE_SOCKET))
            return self._link

    def _unlink(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            link.close()
        with self._lock:
            idle, self._free = self._free, []
        for region in idle:
            self._drop(region)

    def _growth(self, nbytes: int) -> int:
        """How large a new buffer for `nbytes` is; 0 when the bounds have no room for one. Under the lock."""
        size = max(_BUFFER_BYTES_MIN, 1 << (nbytes - 1).bit_length())
        while True:
            room = _POOL_BYTES_MAX - sum(tuple(self._pool.values()))
            many = len(self._pool) >= _POOL_BUFFERS_MAX
            if not many and room >= size:
                return size
            if not self._free:
                return nbytes if not many and room >= nbytes else 0
            self._drop(self._free.pop(0))  # Too small, or it would have been taken: it makes room.

    def _drop(self, region: Region) -> None:
        self._pool.pop(region.name, None)
        region.give_back()


def _beside(path: str, lease_path: str) -> bool:
    return lease_path == os.path.join(os.path.dirname(path), LEASE_SOCKET)


_links: weakref.WeakSet[LeaseLink] = weakref.WeakSet()
_alive: weakref.WeakSet[Leases] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    # A buffer that parent and child both filled would mix their tensors, so the child starts with none. The
    # links first: a region that goes with the pool must not be given back over what is the parent's too.
    for link in list(_links):
        link.abandon()
    for leases in list(_alive):
        leases.abandon()


os.register_at_fork(after_in_child=_after_fork_in_child)
