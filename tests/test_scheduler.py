"""The queues: their order, their fairness, their bounds, and that nothing is counted wrongly."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edged.errors import AlreadyExists, ResourceExhausted
from edged.estimate import RunTimes
from edged.messages import Peer, TensorData
from edged.scheduler import AGE_PASSES, AGE_S, MISSES_MAX, Job, JobState, Scheduler

FLAT = RunTimes([[1, 1000], [2, 1000], [4, 1000], [8, 1000], [16, 1000], [64, 1000]])
"""Rows that cost nothing."""

STEEP = RunTimes([[1, 1000], [2, 1500], [4, 2500], [8, 4500], [16, 8500], [64, 32500]])
"""Rows that cost half a run each."""


def scheduler(**bounds: int) -> Scheduler:
    """Queues with bounds that are out of the way."""
    return Scheduler(
        **{"queue_length": 1000, "queue_bytes": 100_000, "inflight_per_client": 1000, "clients": 1000}
        | bounds
    )


def job(
    *,
    client: int = 1,
    id: Any = None,
    instance: int = 1,
    nbytes: int = 4,
    deadline_s: float = math.inf,
    priority: int = 5,
    rows: int = 1,
    key: Any = "same",
    now_s: float = 0.0,
) -> Job:
    """A job that would run."""
    tensor = TensorData("x", "FP32", [rows], b"\0" * nbytes)
    peer = Peer(1000, 1000, client)
    return Job(
        (bytes([client]),),
        id,
        peer,
        instance,
        [tensor],
        None,
        nbytes,
        now_s,
        deadline_s,
        priority,
        [],
        rows=rows,
        shape_key=None if key is None else (key,),
        client=(peer.uid, peer.pid),
    )


def admit(queues: Scheduler, each: Job, queue_length: int | None = None) -> Job:
    """As it is done for a request that must wait; who has to give way is answered."""
    queues.check_room(each.route, each.request_id)
    victim = queues.make_room(each, queue_length=queue_length)
    if victim is not None:
        queues.answered(victim)
    queues.admit(each)
    queues.enqueue(each)
    return each


@dataclass
class Model:
    """An instance that serves."""

    id: int
    times: RunTimes
    batch_max: int = 1


def take(queues: Scheduler, *instances: int, now_s: float = 0.0, times: RunTimes | None = None) -> Job | None:
    """The next job, which goes to run."""
    serving = [Model(each, times or RunTimes()) for each in instances or (1,)]
    found = queues.best(serving, now_s)
    if found is not None:
        queues.take(found, serving, now_s)
    return found


def batch(queues: Scheduler, times: RunTimes = FLAT, rows_max: int = 64, now_s: float = 0.0) -> list[Job]:
    """The next run's jobs."""
    first = take(queues, now_s=now_s)
    assert first is not None
    return [first, *queues.mates(first, rows_max=rows_max, times=times, now_s=now_s)]


# ---- order ----------------------------------------------------------------------------------------------


def test_priority_then_deadline_then_arrival() -> None:
    """The order in which one client's jobs are handed out."""
    queues = scheduler()
    late = admit(queues, job(deadline_s=9.0))
    none = admit(queues, job())
    soon = admit(queues, job(deadline_s=3.0))
    first = admit(queues, job(priority=1))
    last = admit(queues, job(priority=9, deadline_s=1.0))
    again = admit(queues, job())
    assert [take(queues) for _ in range(6)] == [first, soon, late, none, again, last]
    assert take(queues) is None


def test_who_floods_waits_behind_itself() -> None:
    """One request of another client goes next, however many of the first's came before it."""
    queues = scheduler()
    flood = [admit(queues, job(client=1)) for _ in range(20)]
    assert [take(queues) for _ in range(3)] == flood[:3]
    other = [admit(queues, job(client=2)) for _ in range(2)]
    assert [take(queues) for _ in range(4)] == [other[0], flood[3], other[1], flood[4]]


def test_fairness_counts_rows() -> None:
    """Whoever asks for four rows at a time has a quarter of the turns of who asks for one."""
    queues = scheduler()
    wide = [admit(queues, job(client=1, rows=4)) for _ in range(10)]
    narrow = [admit(queues, job(client=2)) for _ in range(40)]
    taken = [take(queues) for _ in range(20)]
    assert sum(1 for each in taken if each in wide) == 4
    assert sum(1 for each in taken if each in narrow) == 16


def test_idling_saves_nothing_up_and_forgives_nothing() -> None:
    """Who comes back starts at the level's clock, but no lower than it left."""
    queues = scheduler()
    for _ in range(30):
        admit(queues, job(client=1))
    for _ in range(10):
        take(queues)
    back = admit(queues, job(client=2))
    assert take(queues) is back
    again = admit(queues, job(client=2))
    assert [take(queues), take(queues)].count(again) == 1
    for _ in range(5):
        more = admit(queues, job(client=2))
        assert more in (take(queues), take(queues)), "one in two is its part, whether it keeps a queue or not"


def test_between_equal_clients_the_earlier_deadline_goes_first() -> None:
    """Fairness leaves the choice open among those that were served alike."""
    queues = scheduler()
    none = admit(queues, job(client=1))
    late = admit(queues, job(client=2, deadline_s=9.0))
    soon = admit(queues, job(client=3, deadline_s=2.0))
    assert [take(queues) for _ in range(3)] == [soon, late, none]


def test_a_job_that_is_more_urgent_moves_its_client_up() -> None:
    """What comes later can go first within its client, and bring it before another."""
    queues = scheduler()
    admit(queues, job(client=1, deadline_s=5.0))
    other = admit(queues, job(client=2, deadline_s=4.0))
    urgent = admit(queues, job(client=1, deadline_s=3.0))
    assert [take(queues), take(queues)] == [urgent, other]


def test_a_level_is_passed_over_for_a_bounded_time() -> None:
    """After a second and ten runs one of its jobs goes first; then the better level has its second again."""
    queues = scheduler()
    low = [admit(queues, job(client=2, priority=9)) for _ in range(3)]
    order = []
    for tick in range(400):
        admit(queues, job(client=1, priority=1))
        order.append(take(queues, now_s=tick * 0.01))
    at = [index for index, each in enumerate(order) if each in low]
    assert len(at) == 3
    assert all(abs(gap - AGE_S / 0.01) <= 2 for gap in (at[1] - at[0], at[2] - at[1]))


def test_long_runs_do_not_turn_the_order_around() -> None:
    """Where a run takes longer than the ageing, the worse level has one turn in eleven and not each other."""
    queues = scheduler()
    low = [admit(queues, job(client=2, priority=9)) for _ in range(3)]
    order = []
    for tick in range(30):
        admit(queues, job(client=1, priority=1))
        order.append(take(queues, now_s=tick * 5.0))
    assert [index for index, each in enumerate(order) if each in low] == [AGE_PASSES, 2 * AGE_PASSES + 1]


def test_no_level_starves_another_of_nine() -> None:
    """With every level full, each has its turn."""
    queues = scheduler()
    for priority in range(1, 10):
        for _ in range(3):
            admit(queues, job(priority=priority, client=priority))
    seen = set()
    for tick in range(3000):
        found = take(queues, now_s=tick * 0.01)
        assert found is not None
        seen.add(found.priority)
        if len(seen) == 9:
            break
        admit(queues, job(priority=1, client=1))
    assert len(seen) == 9


def test_instances_of_a_worker_take_turns_within_a_level() -> None:
    """The best level of all goes first; among equals, the instance that had its turn longest ago."""
    queues = scheduler()
    one = [admit(queues, job(instance=1)) for _ in range(3)]
    two = [admit(queues, job(instance=2, client=2)) for _ in range(2)]
    urgent = admit(queues, job(instance=2, priority=1))
    admit(queues, job(instance=3, priority=1))
    assert [take(queues, 1, 2) for _ in range(7)] == [urgent, one[0], two[0], one[1], two[1], one[2], None]
    assert queues.queued(3) == 1


def test_a_worse_level_of_another_instance_ages_too() -> None:
    """On a shared worker nothing starves behind another model's stream."""
    queues = scheduler()
    low = admit(queues, job(instance=2, priority=9))
    for tick in range(200):
        admit(queues, job(instance=1, priority=1))
        if take(queues, 1, 2, now_s=tick * 0.02) is low:
            assert tick * 0.02 <= AGE_S + 0.04
            return
    raise AssertionError("it starved")


# ---- batches --------------------------------------------------------------------------------------------


def test_a_batch_is_what_waits_in_order_and_fairly() -> None:
    """Rows up to the bound; the clients' turns are those that they would have had one by one."""
    queues = scheduler()
    flood = [admit(queues, job(client=1)) for _ in range(20)]
    other = [admit(queues, job(client=2)) for _ in range(2)]
    assert batch(queues, STEEP, rows_max=6) == [flood[0], other[0], flood[1], other[1], flood[2], flood[3]]
    assert queues.queued_rows(1) == 16


def test_a_batch_has_one_shape() -> None:
    """What differs waits for its own turn, and who is behind it is found all the same."""
    queues = scheduler()
    a1 = admit(queues, job(client=1, key="a"))
    b = admit(queues, job(client=2, key="b"))
    alone = admit(queues, job(client=3, key=None))
    a2 = admit(queues, job(client=4, key="a"))
    assert batch(queues) == [a1, a2]
    assert batch(queues) == [b]
    assert batch(queues) == [alone]


def test_rows_beyond_the_bound_stay() -> None:
    """A job is whole: one that does not fit waits, a smaller one behind it goes along."""
    queues = scheduler()
    first = admit(queues, job(client=1, rows=3))
    large = admit(queues, job(client=2, rows=6))
    small = admit(queues, job(client=3, rows=4))
    assert batch(queues, rows_max=8) == [first, small]
    assert batch(queues, rows_max=8) == [large]


def test_a_batch_grows_no_longer_than_its_earliest_deadline() -> None:
    """Neither the first's nor a later one's is given up for more rows."""
    queues = scheduler()
    jobs = [admit(queues, job(client=1, deadline_s=0.0026)) for _ in range(8)]
    assert batch(queues, STEEP) == jobs[:4], "four rows take 2.5 ms"
    queues = scheduler()
    admit(queues, job(client=2))
    take(queues)
    easy = [admit(queues, job(client=1)) for _ in range(6)]
    tight = admit(queues, job(client=2, deadline_s=0.0026))
    assert batch(queues, STEEP) == [easy[0], tight, easy[1], easy[2]]


def test_worse_levels_ride_along_only_where_that_costs_nothing() -> None:
    """A run of priority 1 gets longer by a tenth at most for rows that could wait."""
    for times, rides in ((FLAT, True), (STEEP, False)):
        queues = scheduler()
        low = [admit(queues, job(client=2, priority=9)) for _ in range(4)]
        first = admit(queues, job(client=1, priority=1))
        found = batch(queues, times)
        assert found == ([first, *low] if rides else [first])


def test_a_flood_rides_along_only_where_that_costs_nothing() -> None:
    """Who has little to ask has a run as short as alone, and shares it with those that have little too."""
    for times, rides in ((FLAT, True), (STEEP, False)):
        queues = scheduler()
        flood = [admit(queues, job(client=1)) for _ in range(20)]
        assert take(queues) is flood[0]
        little = [admit(queues, job(client=client)) for client in (2, 3)]
        found = batch(queues, times, rows_max=8)
        assert found[:2] == little
        assert len(found) == (8 if rides else 2)
        assert len(batch(queues, STEEP, rows_max=8)) == 8, "its own run is as large as it pays"


def test_one_that_has_aged_takes_better_ones_with_it() -> None:
    """Its turn is a run, and there is room in it."""
    queues = scheduler()
    low = [admit(queues, job(client=2, priority=9)) for _ in range(2)]
    for tick in range(AGE_PASSES):
        admit(queues, job(client=1, priority=1))
        take(queues, now_s=tick * 0.2)
    high = admit(queues, job(client=1, priority=1))
    assert batch(queues, STEEP, now_s=5.0) == [low[0], high]


def test_the_search_for_mates_is_bounded() -> None:
    """Clients whose shapes differ are passed over up to a bound, and keep their places."""
    queues = scheduler()
    first = admit(queues, job(client=1, key="a"))
    others = [admit(queues, job(client=2 + n, key=f"b{n}")) for n in range(MISSES_MAX)]
    admit(queues, job(client=200, key="a"))
    assert batch(queues) == [first]
    assert [take(queues) for _ in others] == others


# ---- bounds ---------------------------------------------------------------------------------------------


def test_each_bound_refuses_with_its_own_reason() -> None:
    """Queue, bytes, requests of a client, clients."""
    queues = scheduler(queue_length=2, queue_bytes=100, inflight_per_client=3, clients=2)

    def refused(each: Job) -> str | None:
        with pytest.raises(ResourceExhausted) as caught:
            admit(queues, each)
        return caught.value.reason

    assert refused(job(nbytes=101)) == "QUEUE_BYTES_FULL"
    admit(queues, job(nbytes=40))
    assert refused(job(nbytes=61)) == "QUEUE_BYTES_FULL"
    admit(queues, job(nbytes=0))
    assert refused(job(nbytes=0)) == "QUEUE_FULL"
    admit(queues, job(nbytes=0, instance=2))
    assert refused(job(nbytes=0, instance=2)) == "TOO_MANY_IN_FLIGHT"
    admit(queues, job(client=2, nbytes=0, instance=2))
    assert refused(job(client=3, nbytes=0, instance=3)) == "TOO_MANY_CLIENTS"
    assert queues.snapshot() == {"in_flight": 4, "clients": 2, "queued_bytes": 40}


def test_a_client_may_have_as_many_bytes_as_are_still_free() -> None:
    """One that floods gets half of them; there is always room for the next."""
    queues = scheduler(queue_bytes=1200)
    for client, bytes_max in ((1, 600), (2, 300), (3, 160)):
        for _ in range(bytes_max // 20):
            admit(queues, job(client=client, nbytes=20))
        with pytest.raises(ResourceExhausted, match="queue_bytes"):
            admit(queues, job(client=client, nbytes=20))
    admit(queues, job(client=4, nbytes=140))


def test_a_model_may_have_a_shorter_queue() -> None:
    """Its own setting goes before the daemon's."""
    queues = scheduler(queue_length=50)
    admit(queues, job(), queue_length=1)
    with pytest.raises(ResourceExhausted):
        admit(queues, job(), queue_length=1)


def test_a_full_queue_gives_way_to_a_better_priority() -> None:
    """The last job of whoever has the most in the worst level; never the other way round."""
    queues = scheduler(queue_length=4)
    few = admit(queues, job(client=1, priority=7))
    many = [admit(queues, job(client=2, priority=7)) for _ in range(2)]
    high = admit(queues, job(client=2, priority=3))
    admit(queues, job(client=3, priority=2))
    assert [each.state for each in (few, *many, high)] == [
        JobState.QUEUED,
        JobState.QUEUED,
        JobState.ANSWERED,
        JobState.QUEUED,
    ]
    with pytest.raises(ResourceExhausted) as caught:
        admit(queues, job(client=4, priority=8))
    assert caught.value.reason == "QUEUE_FULL"


def test_a_flood_gives_way_to_who_has_less_until_they_are_even() -> None:
    """Places are shared by clients, whoever came first; the flood's newest go."""
    queues = scheduler(queue_length=9)
    flood = [admit(queues, job(client=1)) for _ in range(9)]
    admit(queues, job(client=2))
    assert [each for each in flood if each.state is JobState.ANSWERED] == [flood[8]]
    for client in (2, 2, 3, 3, 3):
        admit(queues, job(client=client))
    for client in (1, 2, 3):
        with pytest.raises(ResourceExhausted):
            admit(queues, job(client=client))
    assert [each.state for each in flood] == [JobState.QUEUED] * 3 + [JobState.ANSWERED] * 6
    assert queues.queued(1) == 9


def test_what_had_its_turn_is_not_the_last_that_came() -> None:
    """One that goes back into the queue after a crash does not lose its place to a newcomer."""
    queues = scheduler(queue_length=3)
    first, second = admit(queues, job()), admit(queues, job())
    assert take(queues) is first
    queues.enqueue(first)
    third = admit(queues, job())
    admit(queues, job(client=2))
    assert (first.state, second.state, third.state) == (
        JobState.QUEUED,
        JobState.QUEUED,
        JobState.ANSWERED,
    )


def test_an_id_is_in_flight_once_on_its_connection() -> None:
    """The same id again is refused until the first is answered; another connection may have it too."""
    queues = scheduler()
    first = admit(queues, job(client=1, id=7))
    admit(queues, job(client=2, id=7))
    admit(queues, job(client=1, id="7"))
    with pytest.raises(AlreadyExists) as caught:
        admit(queues, job(client=1, id=7))
    assert caught.value.reason == "DUPLICATE_ID"
    assert queues.find((b"\1",), 7) is first
    queues.answered(first)
    assert queues.find((b"\1",), 7) is None
    admit(queues, job(client=1, id=7))
    assert take(queues) is not first


def test_a_refused_job_leaves_no_trace() -> None:
    """What is not admitted is counted nowhere."""
    queues = scheduler(queue_bytes=3)
    with pytest.raises(ResourceExhausted):
        admit(queues, job(id=1, deadline_s=1.0))
    assert queues.snapshot() == {"in_flight": 0, "clients": 0, "queued_bytes": 0}
    assert queues.find((b"\1",), 1) is None
    assert queues.next_deadline_s() is None


# ---- what is ahead --------------------------------------------------------------------------------------


def test_what_is_ahead_of_a_request_is_reckoned_in_its_order() -> None:
    """All of better levels, none of worse ones, of its own level as much of each client as it has itself."""
    queues = scheduler()
    assert queues.rows_ahead(job(deadline_s=1.0)) == 0
    for _ in range(12):
        admit(queues, job(client=1, deadline_s=5.0))
    assert queues.rows_ahead(job(client=1, deadline_s=6.0)) == 12
    assert queues.rows_ahead(job(client=1, deadline_s=4.0)) == 0
    assert queues.rows_ahead(job(client=2, deadline_s=6.0)) == 1
    admit(queues, job(client=2, deadline_s=5.0, rows=3))
    assert queues.rows_ahead(job(client=2, deadline_s=6.0)) == 3 + 4
    assert queues.rows_ahead(job(client=3, deadline_s=6.0)) == 3
    admit(queues, job(client=4, priority=1, rows=20))
    admit(queues, job(client=4, priority=9, rows=20))
    assert queues.rows_ahead(job(client=3, deadline_s=6.0)) == 23
    assert queues.rows_ahead(job(client=3, deadline_s=6.0, priority=9)) == 35 + 1


def test_promises_may_be_put_first_and_so_they_are_ahead() -> None:
    """Those of clients that have no more than their part, as far as their deadlines are earlier."""
    queues = scheduler()
    for client in range(4):
        for n in range(3):
            admit(queues, job(client=client, deadline_s=1.0 + n))
    assert queues.rows_ahead(job(client=9, deadline_s=5.0)) == 12
    assert queues.rows_ahead(job(client=9, deadline_s=1.5)) == 4
    assert queues.rows_ahead(job(client=9, deadline_s=0.5)) == 4, "each client's first"


def test_what_was_promised_goes_before_what_is_fair() -> None:
    """A job that would be late otherwise; not one of a client that floods, nor one that is late anyway."""
    times = RunTimes([[1, 1000]])
    for waiting, late, first in ((1, False, True), (3, False, True), (30, False, False), (1, True, False)):
        queues = scheduler()
        admit(queues, job(client=1))
        take(queues)
        promised = admit(queues, job(client=1, deadline_s=0.0005 if late else 0.0015))
        for _ in range(waiting - 1):
            admit(queues, job(client=1))
        fresh = admit(queues, job(client=2))
        assert take(queues, times=times) is (promised if first else fresh), (waiting, late)


def test_promises_are_kept_together() -> None:
    """Not only the most urgent is looked at: one run for the sake of fairness may be one too many for all."""
    times = RunTimes([[1, 1000]])
    for count, first in ((3, False), (4, True)):
        queues = scheduler()
        for client in range(count):
            admit(queues, job(client=client))
            take(queues)
        promised = [admit(queues, job(client=c, deadline_s=0.0045)) for c in range(count)]
        fresh = admit(queues, job(client=9))
        assert take(queues, times=times) is (promised[0] if first else fresh)


def test_ones_own_jobs_without_a_deadline_are_not_ahead() -> None:
    """They are run after those that have one."""
    queues = scheduler()
    for _ in range(5):
        admit(queues, job(client=1))
    admit(queues, job(client=1, deadline_s=2.0))
    assert queues.rows_ahead(job(client=1, deadline_s=3.0)) == 1


def test_reckoning_is_bounded_with_many_clients() -> None:
    """Beyond some clients all that waits counts as ahead."""
    queues = scheduler()
    for client in range(100):
        for _ in range(2):
            admit(queues, job(client=client))
    assert queues.rows_ahead(job(client=101, deadline_s=1.0)) == 200


# ---- ends -----------------------------------------------------------------------------------------------


def test_expiry_gives_each_job_once_and_in_order() -> None:
    """Waiting and running ones alike; those answered before are passed over."""
    queues = scheduler()
    jobs = [admit(queues, job(deadline_s=float(at))) for at in (3, 1, 2, 4)]
    running = take(queues)
    assert running is jobs[1]
    queues.answered(jobs[2])
    assert queues.next_deadline_s() == 1.0
    found = []
    for each in queues.expired(3.0):
        found.append(each)
        queues.answered(each)
    assert found == [jobs[1], jobs[0]]
    assert list(queues.expired(3.0)) == []
    assert queues.next_deadline_s() == 4.0
    queues.answered(jobs[3])
    assert queues.next_deadline_s() is None


def test_a_requeued_job_is_back_in_its_place_and_not_charged_twice() -> None:
    """One whose worker died before it began keeps its order, its bytes and its deadline."""
    queues = scheduler()
    first = admit(queues, job(nbytes=8, deadline_s=5.0))
    admit(queues, job())
    assert take(queues) is first
    assert queues.queued(1) == 1
    queues.enqueue(first)
    assert queues.queued(1) == 2
    assert take(queues) is first
    other = admit(queues, job(client=2, deadline_s=9.0))
    queues.enqueue(first)
    assert take(queues) is other, "its client has had one row, and not two"
    assert take(queues) is first
    queues.enqueue(first)
    assert list(queues.expired(6.0)) == [first]
    assert queues.snapshot()["queued_bytes"] == 16


def test_answering_twice_is_a_bug() -> None:
    """The table makes `exactly once` checkable."""
    queues = scheduler()
    each = admit(queues, job())
    queues.answered(each)
    with pytest.raises(AssertionError):
        queues.answered(each)


def test_a_queue_with_jobs_in_it_is_not_dropped() -> None:
    """Forgetting an instance before its jobs are answered would lose them."""
    queues = scheduler()
    each = admit(queues, job())
    with pytest.raises(AssertionError):
        queues.drop_queue(1)
    queues = scheduler()
    each = admit(queues, job())
    queues.answered(each)
    queues.drop_queue(1)
    queues.drop_queue(2)
    assert queues.waiting(1) == []


def test_asking_and_cancelling_does_not_fill_the_heaps() -> None:
    """Answered jobs that have not come up yet are thrown out before they outnumber the others."""
    queues = scheduler()
    keep = admit(queues, job(priority=1, deadline_s=0.5))
    for n in range(5000):
        queues.answered(admit(queues, job(client=n % 200, deadline_s=1e9)))
    (level,) = [each for each in queues._queues[1].levels if each.priority == 5]
    assert len(level.heap) < 200
    assert len(level.clients) < 200
    assert sum(len(c.heap) + len(c.recent) for c in level.clients.values()) < 400
    assert len(queues._deadlines) < 200
    assert queues.waiting(1) == [keep]
    assert take(queues) is keep


OPS = st.lists(
    st.one_of(
        st.tuples(
            st.just("admit"), st.integers(1, 3), st.integers(0, 3), st.integers(1, 9), st.integers(0, 40)
        ),
        st.tuples(st.just("take"), st.integers(1, 3)),
        st.tuples(st.just("batch"), st.integers(1, 3), st.integers(2, 6)),
        st.tuples(st.just("answer"), st.integers(0, 99)),
        st.tuples(st.just("requeue"), st.integers(0, 99)),
        st.tuples(st.just("expire"), st.integers(0, 40)),
    ),
    max_size=80,
)


@given(OPS)
def test_the_accounts_are_exact_whatever_happens(ops: list[tuple[Any, ...]]) -> None:
    """Lengths, rows, bytes, clients and the order agree with a plain list of jobs after every step."""
    queues = scheduler(queue_length=6, queue_bytes=60, inflight_per_client=5, clients=3)
    live: list[Job] = []
    for op in ops:
        match op:
            case ("admit", instance, client, priority, deadline):
                each = job(
                    client=client,
                    instance=instance,
                    nbytes=7,
                    priority=priority,
                    deadline_s=deadline or math.inf,
                    rows=1 + deadline % 3,
                    key=deadline % 2,
                )
                try:
                    live.append(admit(queues, each))
                except ResourceExhausted:
                    assert each.state is JobState.QUEUED
                live = [j for j in live if j.state is not JobState.ANSWERED]
            case ("take", instance):
                waiting = [j for j in live if j.state is JobState.QUEUED and j.instance == instance]
                found = take(queues, instance)
                assert (found is None) == (not waiting)
                if found is not None:
                    assert found.priority == min(j.priority for j in waiting)
                    own = [j for j in waiting if (j.priority, j.client) == (found.priority, found.client)]
                    assert found is min(own, key=lambda j: (j.deadline_s, j.seq))
            case ("batch", instance, rows_max):
                first = take(queues, instance)
                if first is not None:
                    found = queues.mates(first, rows_max=rows_max, times=STEEP, now_s=0.0)
                    assert all(j.shape_key == first.shape_key and j.instance == instance for j in found)
                    assert not found or first.rows + sum(j.rows for j in found) <= rows_max
            case ("answer", which) if live:
                queues.answered(live.pop(which % len(live)))
            case ("requeue", which):
                running = [j for j in live if j.state is JobState.RUNNING]
                if running:
                    queues.enqueue(running[which % len(running)])
            case ("expire", now):
                due = [j for j in live if j.deadline_s <= now]
                found = []
                for each in queues.expired(now):
                    found.append(each)
                    queues.answered(each)
                assert sorted(j.seq for j in found) == sorted(j.seq for j in due)
                live = [j for j in live if j not in found]
            case _:
                pass
        assert queues.in_flight == len(live)
        assert queues.clients == len({j.route for j in live})
        assert queues.snapshot()["queued_bytes"] == 7 * len(live)
        for instance in (1, 2, 3):
            waiting = [j for j in live if j.state is JobState.QUEUED and j.instance == instance]
            assert queues.queued(instance) == len(waiting)
            assert queues.queued_rows(instance) == sum(j.rows for j in waiting)
            assert sorted(j.seq for j in queues.waiting(instance)) == sorted(j.seq for j in waiting)
        assert queues.next_deadline_s() == min(
            (j.deadline_s for j in live if j.deadline_s != math.inf), default=None
        )
