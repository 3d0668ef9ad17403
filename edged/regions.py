"""Leased memory, as the core knows it: who holds which region, which runs use it, when it may go.

Pure: a table of numbers and names; the memory itself is the daemon's (`lanes` makes it, the workers map it).
A region belongs to the lease connection that asked for it and to that connection's uid, by the kernel's word.
It ends when it is given back or its connection is gone, and its memory is reclaimed once no request uses it;
until then its bytes count against its uid.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from edged.errors import InvalidArgument, NotFound, ResourceExhausted
from edged.messages import RegionPart, RegionReference

__all__ = ["Region", "Regions"]

REGION_BYTES_MAX = 1 << 40
"""Beyond this a size is nonsense, whatever the quota says."""


@dataclass(eq=False)
class Region:
    """One piece of leased memory."""

    id: int
    name: str
    uid: int
    connection: int
    nbytes: int
    uses: int = 0
    """Requests and runs that hold it."""


@dataclass
class _Connection:
    uid: int
    names: set[str] = field(default_factory=set)


class Regions:
    """Every region, by its number and, while it is leased, by its name.

    `bytes_per_uid` and `per_connection` are the quotas; `count_max` bounds all regions together, since each
    takes a descriptor of the daemon's.
    """

    def __init__(
        self, *, bytes_per_uid: int, per_connection: int, count_max: int, page_bytes: int = 4096
    ) -> None:
        self.bytes_per_uid = bytes_per_uid
        self.per_connection = per_connection
        self.count_max = count_max
        self._page_bytes = page_bytes
        self._regions: dict[int, Region] = {}
        self._by_name: dict[str, Region] = {}
        self._connections: dict[int, _Connection] = {}
        self._bytes_by_uid: dict[int, int] = {}
        self._ids = 0

    def connect(self, connection: int, uid: int) -> None:
        """A peer has connected."""
        self._connections[connection] = _Connection(uid)

    def disconnect(self, connection: int) -> list[int]:
        """A peer is gone; returns the regions to reclaim now. The others follow when their last use ends."""
        gone = self._connections.pop(connection, None)
        return [] if gone is None else self._end([self._by_name[name] for name in gone.names])

    def acquire(self, connection: int, byte_size: int, name: str) -> Region:
        """A new region of at least `byte_size` bytes, called `name`, which nobody can guess.

        Raises InvalidArgument, or ResourceExhausted beyond a quota.
        """
        if not 0 < byte_size <= REGION_BYTES_MAX:
            raise InvalidArgument(f"byte_size must be an int from 1, not {byte_size}", reason="BAD_REGION")
        owner = self._connections[connection]
        nbytes = -(-byte_size // self._page_bytes) * self._page_bytes
        used = self._bytes_by_uid.get(owner.uid, 0)
        if used + nbytes > self.bytes_per_uid:
            raise ResourceExhausted(
                f"{nbytes} bytes cannot be leased: uid {owner.uid} has {used} of {self.bytes_per_uid} "
                "(`lease_bytes`); release some first",
                reason="LEASE_QUOTA",
            )
        if len(owner.names) >= self.per_connection:
            raise ResourceExhausted(
                f"this connection has {len(owner.names)} regions, the limit (`leases`); release one, "
                "or lay several tensors into one region",
                reason="LEASE_QUOTA",
            )
        if len(self._regions) >= self.count_max:
            raise ResourceExhausted(
                f"{len(self._regions)} regions are leased in all, as many as the daemon has descriptors for",
                reason="LEASE_QUOTA",
            )
        self._ids += 1
        region = Region(self._ids, name, owner.uid, connection, nbytes)
        self._regions[region.id] = self._by_name[name] = region
        self._bytes_by_uid[owner.uid] = used + nbytes
        owner.names.add(name)
        return region

    def release(self, connection: int, name: str) -> list[int]:
        """Gives a region back; returns what is to be reclaimed now. Raises NotFound."""
        region = self._by_name.get(name)
        if region is None or region.connection != connection:
            raise _not_there()
        self._connections[connection].names.discard(name)
        return self._end([region])

    def resolve(self, uid: int, reference: RegionReference) -> RegionPart:
        """The piece of memory that a request of `uid` names.

        Raises NotFound, in the same words for a region of another uid and for none at all, and
        InvalidArgument for what is not wholly inside.
        """
        region = self._by_name.get(reference.name)
        if region is None or region.uid != uid:
            raise _not_there()
        offset, nbytes = reference.offset, reference.nbytes
        if offset < 0 or nbytes < 0 or offset + nbytes > region.nbytes:
            raise InvalidArgument(
                f"{nbytes} bytes from {offset} on are not inside the region, which has {region.nbytes}",
                reason="BAD_REGION",
            )
        return RegionPart(region.id, region.name, offset, nbytes)

    def hold(self, regions: Iterable[int]) -> None:
        """A request or a run begins to use these."""
        for each in regions:
            self._regions[each].uses += 1

    def drop(self, regions: Iterable[int]) -> list[int]:
        """A request or a run has ended; returns what is to be reclaimed now."""
        found = [self._regions[each] for each in regions]
        for region in found:
            region.uses -= 1
        return self._reclaim([r for r in found if r.name not in self._by_name])

    def snapshot(self) -> dict[str, int]:
        """For `server_status`."""
        return {
            "regions": len(self._regions),
            "bytes": sum(self._bytes_by_uid.values()),
            "connections": len(self._connections),
        }

    def _end(self, regions: Iterable[Region]) -> list[int]:
        """Nobody can name these any more."""
        ended = list(regions)
        for region in ended:
            del self._by_name[region.name]
        return self._reclaim(ended)

    def _reclaim(self, ended: Iterable[Region]) -> list[int]:
        free = [r for r in ended if r.uses == 0]
        for region in free:
            del self._regions[region.id]
            left = self._bytes_by_uid[region.uid] - region.nbytes
            if left:
                self._bytes_by_uid[region.uid] = left
            else:
                del self._bytes_by_uid[region.uid]
        return [r.id for r in free]


def _not_there() -> NotFound:
    return NotFound(
        "no such region; acquire one on lease.sock and keep that connection open", reason="REGION_NOT_FOUND"
    )
