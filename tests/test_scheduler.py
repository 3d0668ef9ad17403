"""The queues: their order, their bounds, their deadlines, and that nothing is counted wrongly."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edged.errors import AlreadyExists, ResourceExhausted
from edged.messages import Peer, TensorData
from edged.scheduler import Job, JobState, Scheduler

PEER = Peer(1, 1, 1)


def scheduler(**bounds: int) -> Scheduler:
    """Queues with bounds that are out of the way."""
    return Scheduler(
        **{"queue_length": 100, "queue_bytes": 10_000, "inflight_per_client": 100, "clients": 100} | bounds
    )


def job(
    *,
    client: bytes = b"c",
    id: Any = None,
    instance: int = 1,
    nbytes: int = 4,
    deadline_s: float = math.inf,
    priority: int = 5,
) -> Job:
    """A job that would run."""
    tensor = TensorData("x", "FP32", [1], b"\0" * nbytes)
    return Job((client,), id, PEER, instance, [tensor], None, nbytes, 0.0, deadline_s, priority, [])


def admit(queues: Scheduler, each: Job, queue_length: int | None = None) -> Job:
    """As the core does it."""
    queues.check_room(each.route, each.request_id)
    queues.admit(each, queue_length=queue_length, mean_run_s=0.01)
    return each


def test_priority_then_deadline_then_arrival() -> None:
    """The order in which jobs are handed out."""
    queues = scheduler()
    late = admit(queues, job(deadline_s=9.0))
    none = admit(queues, job())
    soon = admit(queues, job(deadline_s=3.0))
    first = admit(queues, job(priority=1))
    last = admit(queues, job(priority=9, deadline_s=1.0))
    again = admit(queues, job())
    assert [queues.next([1]) for _ in range(6)] == [first, soon, late, none, again, last]
    assert queues.next([1]) is None


def test_the_best_of_several_instances_comes_first() -> None:
    """A shared worker takes from all its instances' queues in one order."""
    queues = scheduler()
    one = admit(queues, job(instance=1))
    two = admit(queues, job(instance=2))
    urgent = admit(queues, job(instance=2, priority=1))
    admit(queues, job(instance=3, priority=1))
    assert [queues.next([1, 2]) for _ in range(4)] == [urgent, one, two, None]
    assert queues.queued(3) == 1


def test_each_bound_refuses_with_its_own_reason() -> None:
    """Queue, bytes, requests of a client, clients; and each says when to ask again."""
    queues = scheduler(queue_length=2, queue_bytes=100, inflight_per_client=3, clients=2)
    admit(queues, job(client=b"a", nbytes=50))
    for reason, wrong in (("QUEUE_BYTES_FULL", job(client=b"a", nbytes=51)),):
        with pytest.raises(ResourceExhausted) as caught:
            admit(queues, wrong)
        assert caught.value.reason == reason
        assert caught.value.retry_after_ms
    admit(queues, job(client=b"a", nbytes=50))
    with pytest.raises(ResourceExhausted) as caught:
        admit(queues, job(client=b"a", nbytes=0))
    assert caught.value.reason == "QUEUE_FULL"
    assert caught.value.retry_after_ms == 20
    admit(queues, job(client=b"a", nbytes=0, instance=2))
    with pytest.raises(ResourceExhausted) as caught:
        admit(queues, job(client=b"a", nbytes=0, instance=2))
    assert caught.value.reason == "TOO_MANY_IN_FLIGHT"
    admit(queues, job(client=b"b", nbytes=0, instance=2))
    with pytest.raises(ResourceExhausted) as caught:
        admit(queues, job(client=b"d", nbytes=0, instance=3))
    assert caught.value.reason == "TOO_MANY_CLIENTS"
    assert queues.snapshot() == {"in_flight": 4, "clients": 2, "queued_bytes": 100}


def test_a_model_may_have_a_shorter_queue() -> None:
    """Its own setting goes before the daemon's."""
    queues = scheduler(queue_length=50)
    admit(queues, job(), queue_length=1)
    with pytest.raises(ResourceExhausted):
        admit(queues, job(), queue_length=1)


def test_an_id_is_in_flight_once_on_its_connection() -> None:
    """The same id again is refused until the first is answered; another connection may have it too."""
    queues = scheduler()
    first = admit(queues, job(client=b"a", id=7))
    admit(queues, job(client=b"b", id=7))
    admit(queues, job(client=b"a", id="7"))
    with pytest.raises(AlreadyExists) as caught:
        admit(queues, job(client=b"a", id=7))
    assert caught.value.reason == "DUPLICATE_ID"
    assert queues.find((b"a",), 7) is first
    queues.answered(first)
    assert queues.find((b"a",), 7) is None
    admit(queues, job(client=b"a", id=7))
    assert queues.next([1]) is not first


def test_a_refused_job_leaves_no_trace() -> None:
    """What is not admitted is counted nowhere."""
    queues = scheduler(queue_bytes=3)
    with pytest.raises(ResourceExhausted):
        admit(queues, job(id=1, deadline_s=1.0))
    assert queues.snapshot() == {"in_flight": 0, "clients": 0, "queued_bytes": 0}
    assert queues.find((b"c",), 1) is None
    assert queues.next_deadline_s() is None


def test_expiry_gives_each_job_once_and_in_order() -> None:
    """Waiting and running ones alike; those answered before are passed over."""
    queues = scheduler()
    jobs = [admit(queues, job(deadline_s=float(at))) for at in (3, 1, 2, 4)]
    running = queues.next([1])
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


def test_a_requeued_job_is_back_in_its_place() -> None:
    """One whose worker died before it began keeps its order, its bytes and its deadline."""
    queues = scheduler()
    first = admit(queues, job(nbytes=8, deadline_s=5.0))
    admit(queues, job())
    assert queues.next([1]) is first
    assert queues.queued(1) == 1
    queues.requeue(first)
    assert queues.queued(1) == 2
    assert queues.next([1]) is first
    assert first.state is JobState.RUNNING
    queues.requeue(first)
    assert list(queues.expired(6.0)) == [first]
    assert queues.snapshot()["queued_bytes"] == 12


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
    for _ in range(5000):
        queues.answered(admit(queues, job(deadline_s=1e9)))
    assert len(queues._queues[1]) < 200
    assert len(queues._deadlines) < 200
    assert queues.waiting(1) == [keep]
    assert queues.next([1]) is keep


OPS = st.lists(
    st.one_of(
        st.tuples(
            st.just("admit"), st.integers(1, 3), st.integers(0, 3), st.integers(1, 9), st.integers(0, 40)
        ),
        st.tuples(st.just("next"), st.integers(1, 3)),
        st.tuples(st.just("answer"), st.integers(0, 99)),
        st.tuples(st.just("requeue"), st.integers(0, 99)),
        st.tuples(st.just("expire"), st.integers(0, 40)),
    ),
    max_size=80,
)


@given(OPS)
def test_the_accounts_are_exact_whatever_happens(ops: list[tuple[Any, ...]]) -> None:
    """Lengths, bytes, clients and the order agree with a plain list of jobs after every step."""
    queues = scheduler(queue_length=6, queue_bytes=60, inflight_per_client=5, clients=3)
    live: list[Job] = []
    for op in ops:
        match op:
            case ("admit", instance, client, priority, deadline):
                each = job(
                    client=bytes([client]),
                    instance=instance,
                    nbytes=7,
                    priority=priority,
                    deadline_s=deadline or math.inf,
                )
                try:
                    live.append(admit(queues, each))
                except ResourceExhausted:
                    assert each.state is JobState.QUEUED
            case ("next", instance):
                waiting = [j for j in live if j.state is JobState.QUEUED and j.instance == instance]
                best = min(waiting, key=lambda j: (j.priority, j.deadline_s, j.seq), default=None)
                assert queues.next([instance]) is best
            case ("answer", which) if live:
                queues.answered(live.pop(which % len(live)))
            case ("requeue", which):
                running = [j for j in live if j.state is JobState.RUNNING]
                if running:
                    queues.requeue(running[which % len(running)])
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
            assert sorted(j.seq for j in queues.waiting(instance)) == sorted(j.seq for j in waiting)
        assert queues.next_deadline_s() == min(
            (j.deadline_s for j in live if j.deadline_s != math.inf), default=None
        )
