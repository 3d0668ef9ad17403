"""The table of leased memory: quotas, owners, bounds, and that nothing is reclaimed under a run."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edged.errors import InvalidArgument, NotFound, ResourceExhausted
from edged.messages import RegionPart, RegionReference
from edged.regions import Regions

PAGE = 4096
MINE, OTHERS = 1000, 1001


def table(*, bytes_per_uid: int = 16 * PAGE, per_connection: int = 4, count_max: int = 100) -> Regions:
    """A table with connections 1 and 2 of one user, and 3 of another."""
    made = Regions(
        bytes_per_uid=bytes_per_uid, per_connection=per_connection, count_max=count_max, page_bytes=PAGE
    )
    made.connect(1, MINE)
    made.connect(2, MINE)
    made.connect(3, OTHERS)
    return made


def test_a_region_has_whole_pages_and_ends_with_its_release() -> None:
    """Its bytes are its uid's again."""
    regions = table()
    region = regions.acquire(1, PAGE + 1, "a")
    assert region.nbytes == 2 * PAGE
    assert regions.snapshot() == {"regions": 1, "bytes": 2 * PAGE, "connections": 3}
    assert regions.release(1, "a") == [region.id]
    assert regions.snapshot() == {"regions": 0, "bytes": 0, "connections": 3}
    with pytest.raises(NotFound):
        regions.release(1, "a")


@pytest.mark.parametrize("size", [0, -1, -(2**63), 2**63, 2**64 - 1])
def test_sizes_that_are_none(size: int) -> None:
    """Refused as the request's fault, and nothing is leased."""
    regions = table()
    with pytest.raises(InvalidArgument) as caught:
        regions.acquire(1, size, "a")
    assert caught.value.reason == "BAD_REGION"
    assert regions.snapshot()["regions"] == 0


def test_the_quota_is_the_uids_over_all_its_connections() -> None:
    """Another user's is his own."""
    regions = table()
    regions.acquire(1, 10 * PAGE, "a")
    with pytest.raises(ResourceExhausted) as caught:
        regions.acquire(2, 7 * PAGE, "b")
    assert caught.value.reason == "LEASE_QUOTA"
    regions.acquire(2, 6 * PAGE, "b")
    regions.acquire(3, 16 * PAGE, "c")


def test_regions_are_counted_by_connection_and_in_all() -> None:
    """Each takes a descriptor."""
    regions = table(per_connection=2, count_max=3)
    regions.acquire(1, 1, "a")
    regions.acquire(1, 1, "b")
    with pytest.raises(ResourceExhausted):
        regions.acquire(1, 1, "c")
    regions.acquire(2, 1, "c")
    with pytest.raises(ResourceExhausted):
        regions.acquire(3, 1, "d")


def test_another_users_region_is_not_there() -> None:
    """In the very words for one that never was."""
    regions = table()
    regions.acquire(1, PAGE, "a")
    with pytest.raises(NotFound) as foreign:
        regions.resolve(OTHERS, RegionReference("a", 0, 4))
    with pytest.raises(NotFound) as none:
        regions.resolve(OTHERS, RegionReference("made up", 0, 4))
    assert foreign.value.to_wire() == none.value.to_wire()
    assert foreign.value.reason == "REGION_NOT_FOUND"
    with pytest.raises(NotFound):
        regions.release(2, "a")  # of the same user, on a connection that does not have it


def test_every_connection_of_a_uid_may_name_its_regions() -> None:
    """Requests come over another socket than the lease."""
    regions = table()
    region = regions.acquire(1, PAGE, "a")
    assert regions.resolve(MINE, RegionReference("a", 64, PAGE - 64)) == RegionPart(
        region.id, "a", 64, PAGE - 64
    )


@given(st.integers(-(2**64), 2**64), st.integers(-(2**64), 2**64))
def test_no_offset_and_size_lead_outside(offset: int, nbytes: int) -> None:
    """What is resolved lies within the region, for any two numbers."""
    regions = table()
    regions.acquire(1, PAGE, "a")
    try:
        part = regions.resolve(MINE, RegionReference("a", offset, nbytes))
    except InvalidArgument as e:
        assert e.reason == "BAD_REGION"  # noqa: PT017 - either way out is right
        assert offset < 0 or nbytes < 0 or offset + nbytes > PAGE
    else:
        assert 0 <= part.offset <= part.offset + part.nbytes <= PAGE


@pytest.mark.parametrize(("offset", "nbytes"), [(0, PAGE), (PAGE, 0), (PAGE - 1, 1)])
def test_the_edges_are_inside(offset: int, nbytes: int) -> None:
    """The last byte, and nothing at the end."""
    regions = table()
    regions.acquire(1, PAGE, "a")
    assert regions.resolve(MINE, RegionReference("a", offset, nbytes)).nbytes == nbytes


def test_memory_outlives_its_lease_while_a_run_uses_it() -> None:
    """It counts against its uid until then, and nobody can name it any more."""
    regions = table()
    region = regions.acquire(1, PAGE, "a")
    regions.hold([region.id])
    regions.hold([region.id])
    assert regions.disconnect(1) == []
    with pytest.raises(NotFound):
        regions.resolve(MINE, RegionReference("a", 0, 1))
    assert regions.drop([region.id]) == []
    assert regions.snapshot()["bytes"] == PAGE
    assert regions.drop([region.id]) == [region.id]
    assert regions.snapshot()["bytes"] == 0


def test_a_hang_up_ends_all_leases_of_that_connection_only() -> None:
    """Told once."""
    regions = table()
    mine = {regions.acquire(1, PAGE, name).id for name in "ab"}
    regions.acquire(2, PAGE, "c")
    assert set(regions.disconnect(1)) == mine
    assert regions.disconnect(1) == []
    assert regions.snapshot() == {"regions": 1, "bytes": PAGE, "connections": 2}


def test_a_use_that_ends_reclaims_nothing_that_is_leased() -> None:
    """The next request finds it where it was."""
    regions = table()
    region = regions.acquire(1, PAGE, "a")
    regions.hold([region.id])
    assert regions.drop([region.id]) == []
    assert regions.resolve(MINE, RegionReference("a", 0, 1)).region == region.id
