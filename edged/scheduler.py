"""Which request runs next: the queues, their order, their bounds, their deadlines.

Pure: takes the time, gives jobs. Every job is in the table of jobs in flight from its admission until it is
answered, whatever happens to it in between; that table is what makes "exactly one reply" checkable.

**Order.** Each serving instance has a queue; a queue has a level for each priority that is used; a level has
its clients; a client (the kernel's word: uid and pid) has its waiting jobs.

1. The best level goes first. But a level that waits is passed over for at most `AGE_S`, or for `AGE_PASSES`
   runs if those take longer; then one run of it goes first. So nothing starves, and a stream of priority 1
   loses at most one run in each second, and one in `AGE_PASSES`, to each level below it.
2. Within a level the client goes first that has been served least, in rows: each has a count that grows with
   what it is given, and who comes anew starts at the level's own clock, which is the count of whoever was
   served last (start-time fair queueing: Goyal, Vin, Cheng, SIGCOMM '96). So whoever floods waits behind
   itself. Equal counts: the earlier deadline, then who came first.
3. Within a client the earliest deadline goes first, then who came first.
4. What was admitted with a deadline is to be in time, whoever comes after: a job that would be late if 2.'s
   choice went before it goes first, unless its client has more waiting than its part (`PART_ROWS` and
   `PART_OF_OTHERS`), in which case it waits behind itself as ever.

Where instances share a worker, the best level of all goes first, and of equal ones the instance that had its
turn longest ago.

**Batches.** `mates` finds, in the same order, who may share the run of the job that goes first: the same
shapes, no deadline missed by the run's growing longer, and worse levels, or clients that flood, only where
they cost the others next to nothing (`RIDE_ALONG`). So who has little to ask waits for what runs, and then
has a run as short as if it were alone.

**Bounds.** A queue has a number of places. When all are taken, a job of a better level takes the place of one
of the worst level; within a level, a client takes the place of the last job of the client that has the most,
if that one has more than it would have itself. Bytes are bounded over all queues: a client that has some may
have as much as is still free (Choudhury and Hahne's dynamic threshold, INFOCOM '96), so one that floods gets
half, two get a third each, and there is always as much left for the next.

**Cost.** Everything is a heap or a table; a step looks at a bounded number of entries, and what is answered
early stays in its heap until it comes up, or until such entries outnumber the others.
"""

from __future__ import annotations

import bisect
import enum
import heapq
import math
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import msgspec

from edged.cache import Keep
from edged.errors import AlreadyExists, ResourceExhausted
from edged.estimate import RunTimes
from edged.messages import Peer, RegionPart, RequestId, Route, TensorData

__all__ = ["Job", "JobState", "Scheduler"]

AGE_S = 1.0
"""A level that waits is passed over no longer than this: what a person takes for `it hangs`, and rare enough
to cost a stream of 100 runs/s one in a hundred."""

AGE_PASSES = 10
"""Where runs take long, a level is passed over at least so often: ageing must not turn the order around."""

RIDE_ALONG = 1.1
"""Rows of a worse level, or of a client that floods, may make others' run this much longer: a tenth is within
what runs vary."""

PART_ROWS, PART_OF_OTHERS = 4, 1.5
"""A client has its part of the waiting rows with so many and so many times what the level's others have on
average: those that ask alike are below it, one that floods is far above."""

PROMISES_LOOKED_AT = 16
"""Jobs with the earliest deadlines that are looked at to see whether one more can go before them."""

MISSES_MAX = 16
"""Clients whose next job does not fit that are passed over while a batch is put together."""

CLIENTS_LOOKED_AT = 64
"""Clients of a level whose share is reckoned one by one when asked what is ahead; beyond, all as one."""

SLACK = 64
"""Entries of answered jobs that a heap may hold before they are thrown out."""

Client = tuple[int, int]
"""Whom a job counts for: uid and pid of the peer."""

ShapeKey = tuple[Any, ...]
"""Jobs of one instance with the same key may share a run."""


class Serving(Protocol):
    """An instance that serves, as far as the scheduler asks."""

    @property
    def id(self) -> int:
        """By which its jobs name it."""

    @property
    def times(self) -> RunTimes:
        """How long its runs take."""

    @property
    def batch_max(self) -> int:
        """Rows that may share a run."""


class JobState(enum.Enum):
    """Where a job is; `ANSWERED` may come before its run has ended (a deadline, a cancel)."""

    QUEUED = "queued"
    RUNNING = "running"
    ANSWERED = "answered"


class Job(msgspec.Struct, eq=False):
    """One admitted inference."""

    route: Route
    request_id: RequestId
    peer: Peer
    instance: int
    inputs: list[TensorData]
    outputs: list[str] | None
    nbytes: int
    arrived_s: float
    deadline_s: float
    priority: int
    warnings: list[str]
    seq: int = 0
    state: JobState = JobState.QUEUED
    run_id: int = 0
    started_s: float = 0.0
    into: dict[str, RegionPart] | None = None
    """Outputs that are to land in leased memory."""
    regions: tuple[int, ...] = ()
    """The leased memory that it uses, as input or output."""
    rows: int = 1
    """The first dimension of its inputs where the model takes batches, else 1."""
    shape_key: ShapeKey | None = None
    """With whom it may share a run; None: with nobody."""
    client: Client = (0, 0)
    keep: Keep | None = None
    """That its answer is to be kept."""
    promised: bool = False
    """It was taken in because it would be in time, with others ahead of it."""
    charged: bool = False
    """Its client's count has grown for it: that happens once, however often it must be run."""


class _Waiting:
    """One client's waiting jobs in one level."""

    __slots__ = ("entry", "heap", "jobs", "recent", "rows", "served", "timed_rows")

    def __init__(self, served: float) -> None:
        self.served = served
        self.jobs = self.rows = self.timed_rows = 0
        self.heap: list[tuple[float, int, Job]] = []
        self.recent: deque[Job] = deque()
        """In the order of arrival, so that the last can be found."""
        self.entry: tuple[float, float, int, _Waiting] | None = None
        """The entry of the level's heap that stands for it; others are out of date."""

    def head(self) -> Job | None:
        """Its next job."""
        heap = self.heap
        while heap and heap[0][2].state is not JobState.QUEUED:
            heapq.heappop(heap)
        return heap[0][2] if heap else None

    def last(self) -> Job:
        """The job that came last."""
        while self.recent[-1].state is not JobState.QUEUED:
            self.recent.pop()
        return self.recent[-1]

    def add(self, job: Job) -> None:
        if len(self.heap) > 2 * self.jobs + SLACK:
            self.heap = [row for row in self.heap if row[2].state is JobState.QUEUED]
            heapq.heapify(self.heap)
        if len(self.recent) > 2 * self.jobs + SLACK:
            self.recent = deque(each for each in self.recent if each.state is JobState.QUEUED)
        heapq.heappush(self.heap, (job.deadline_s, job.seq, job))
        if job.charged:
            self.recent.appendleft(job)  # it had its turn, and is not the last that came
        else:
            self.recent.append(job)

    def count(self, job: Job, sign: int) -> None:
        self.jobs += sign
        self.rows += sign * job.rows
        if job.deadline_s != math.inf:
            self.timed_rows += sign * job.rows


class _Level:
    """The clients of one priority."""

    __slots__ = (
        "active",
        "clients",
        "clock",
        "heap",
        "jobs",
        "passed_since_s",
        "passes",
        "priority",
        "rows",
        "timed",
    )

    def __init__(self, priority: int) -> None:
        self.priority = priority
        self.clients: dict[Client, _Waiting] = {}
        self.active = 0
        """Clients with waiting jobs."""
        self.timed: list[tuple[float, int, Job]] = []
        """Jobs with a deadline, the earliest first."""
        self.heap: list[tuple[float, float, int, _Waiting]] = []
        self.clock = 0.0
        self.jobs = self.rows = 0
        self.passes = 0
        self.passed_since_s = 0.0

    def add(self, job: Job) -> None:
        client = self.clients.get(job.client)
        if client is None:
            if len(self.clients) > 2 * self.jobs + SLACK:
                self._forget_idle()
            client = self.clients[job.client] = _Waiting(self.clock)
        elif not client.jobs:
            client.served = max(client.served, self.clock)
        if not self.jobs:
            self.passes, self.passed_since_s = 0, job.arrived_s
        client.add(job)
        self.count(client, job, 1)
        if job.deadline_s != math.inf:
            if len(self.timed) > 2 * self.jobs + SLACK:
                self.timed = [row for row in self.timed if row[2].state is JobState.QUEUED]
            bisect.insort(self.timed, (job.deadline_s, job.seq, job))
        if client.jobs == 1 or client.heap[0][2] is job:
            self.enter(client)

    def _forget_idle(self) -> None:
        """Of those with nothing waiting only who is ahead of the clock is remembered, while that is few."""
        kept = {k: c for k, c in self.clients.items() if c.jobs or c.served > self.clock}
        if len(kept) > 2 * self.jobs + SLACK:
            kept = {k: c for k, c in self.clients.items() if c.jobs}
        self.clients = kept

    def count(self, client: _Waiting, job: Job, sign: int) -> None:
        self.jobs += sign
        self.rows += sign * job.rows
        client.count(job, sign)
        if client.jobs == (1 if sign > 0 else 0):
            self.active += sign

    def enter(self, client: _Waiting) -> None:
        """Puts a client with waiting jobs into its place."""
        head = client.head()
        if head is None:
            client.entry = None
            return
        if len(self.heap) > 2 * self.jobs + SLACK:
            self.heap = [row for row in self.heap if row[3].entry is row and row[3].jobs]
            heapq.heapify(self.heap)
        client.entry = (client.served, head.deadline_s, head.seq, client)
        heapq.heappush(self.heap, client.entry)

    def head(self) -> _Waiting | None:
        """The client that goes first."""
        heap = self.heap
        while heap:
            row = heap[0]
            client = row[3]
            if client.entry is row:
                head = client.head()
                if head is not None and head.seq == row[2]:
                    return client
                heapq.heappop(heap)
                self.enter(client)
            else:
                heapq.heappop(heap)
        return None

    def urgent(self, fair: Job, serving: Serving, now_s: float) -> Job | None:
        """The job to go before `fair`, if with that one first some that were promised would be late."""
        timed, times = self.timed, serving.times
        while timed and not self._promised(timed[0][2]):
            del timed[0]  # it ran, or its client has lost the right to be put before others
        best = times.best_rows(serving.batch_max)
        row_s = times.turn_s(best) / best
        at_s = now_s + times.turn_s(fair.rows) + times.margin_s(PROMISES_LOOKED_AT * row_s)
        first: Job | None = None
        for deadline_s, _, job in timed[:PROMISES_LOOKED_AT]:
            if not self._promised(job) or now_s + times.turn_s(job.rows) > deadline_s:
                continue
            first = first or job
            at_s += row_s * job.rows
            if at_s > deadline_s:
                return self.clients[first.client].head()
        return None

    def floods(self, client: _Waiting, first: Job) -> bool:
        """Whether a client has more than its part, and the one of `first`, which goes to run, has not."""
        mine = self.clients.get(first.client)
        if mine is None or mine is client:
            return False
        all_rows, active = self.rows + first.rows, self.active + (not mine.jobs)
        return _in_part(mine.rows, all_rows, active) and not _in_part(client.rows, all_rows, active)

    def _promised(self, job: Job) -> bool:
        if job.state is not JobState.QUEUED:
            return False
        return _in_part(self.clients[job.client].rows, self.rows, self.active)

    def serve(self, client: _Waiting, job: Job) -> None:
        """The client's next job, which is `job`, goes to run."""
        heapq.heappop(client.heap)
        if self.heap[0] is client.entry:
            heapq.heappop(self.heap)
        self.count(client, job, -1)
        if not job.charged:
            job.charged = True
            self.clock = max(self.clock, client.served)
            client.served += job.rows
        self.enter(client)

    def ahead(self, job: Job) -> int:
        """Rows that go before a job that is yet to come, if nobody else comes."""
        mine = self.clients.get(job.client)
        own = 0
        if mine is not None and mine.jobs:
            head = mine.head()
            if head is not None and head.deadline_s <= job.deadline_s:
                own = mine.rows if job.deadline_s == math.inf else mine.timed_rows
        share = own + job.rows
        active = self.active + (mine is None or not mine.jobs)
        rows, put_first, looked_at = own, own, 0
        for client in self.clients.values():
            if client is not mine and client.jobs:
                looked_at += 1
                if looked_at > CLIENTS_LOOKED_AT:
                    return self.rows
                rows += min(client.rows, share)
                if _in_part(client.rows, self.rows + job.rows, active):
                    put_first += client.timed_rows
        # Those with earlier deadlines may be put first so that they are in time.
        earlier = bisect.bisect_left(self.timed, (job.deadline_s,)) * self.rows // self.jobs
        return max(rows, min(put_first, earlier))

    def largest(self) -> _Waiting:
        """The client with the most waiting jobs."""
        return max(self.clients.values(), key=lambda c: c.jobs)

    def aged(self, now_s: float) -> bool:
        """Whether it has been passed over for too long."""
        return self.passes >= AGE_PASSES and now_s - self.passed_since_s > AGE_S


def _in_part(rows: int, all_rows: int, clients: int) -> bool:
    """Whether a client with so many waiting rows has no more than its part of all."""
    return (rows - PART_ROWS) * (clients - 1) <= PART_OF_OTHERS * (all_rows - rows)


class _Queue:
    """What waits for one instance."""

    __slots__ = ("jobs", "levels", "rows", "since_s", "turn")

    def __init__(self) -> None:
        self.levels: list[_Level] = []
        """Those that were ever used, the best first."""
        self.jobs = self.rows = 0
        self.turn = 0
        """When it was last served, in turns of all queues."""
        self.since_s = 0.0
        """When it last was empty."""

    def level(self, priority: int) -> _Level:
        for level in self.levels:
            if level.priority == priority:
                return level
        self.levels.append(_Level(priority))
        self.levels.sort(key=lambda each: each.priority)
        return self.level(priority)

    def add(self, job: Job) -> None:
        if not self.jobs:
            self.since_s = job.arrived_s
        self.level(job.priority).add(job)
        self.jobs += 1
        self.rows += job.rows

    def remove(self, job: Job) -> None:
        """A waiting job is answered; its entry in the heap is passed over when it comes up."""
        level = self.level(job.priority)
        level.count(level.clients[job.client], job, -1)
        self.jobs -= 1
        self.rows -= job.rows

    def first(self, now_s: float) -> tuple[int, _Level] | None:
        """The level that goes first, with its rank among other queues' levels: 0 for one that has aged."""
        best: _Level | None = None
        old: _Level | None = None
        for level in self.levels:
            if level.jobs:
                best = best or level
                if level.aged(now_s) and (old is None or level.passed_since_s < old.passed_since_s):
                    old = level
        if best is None:
            return None
        return (best.priority, best) if old is None else (0, old)


class Scheduler:
    """Bounded queues of jobs, by instance."""

    def __init__(
        self, *, queue_length: int, queue_bytes: int, inflight_per_client: int, clients: int
    ) -> None:
        self.queue_length = queue_length
        self.queue_bytes = queue_bytes
        self.inflight_per_client = inflight_per_client
        self.clients_max = clients
        self._queues: dict[int, _Queue] = {}
        self._deadlines: list[tuple[float, int, Job]] = []
        self._by_id: dict[tuple[bytes | int, RequestId], Job] = {}
        self._per_connection: dict[bytes | int, int] = {}
        self._bytes_of: dict[Client, int] = {}
        self._bytes = 0
        self._seq = 0
        self._turns = 0
        self.in_flight = 0
        """Jobs admitted and not yet answered."""

    @property
    def clients(self) -> int:
        """Connections with a job in flight."""
        return len(self._per_connection)

    # ------------------------------------------------------------------ coming in

    def check_room(self, route: Route, request_id: RequestId) -> None:
        """Raises AlreadyExists or ResourceExhausted when this client cannot have one more in flight."""
        if request_id is not None and (route[0], request_id) in self._by_id:
            raise AlreadyExists(
                f"a request with id {request_id!r} is already in flight on this connection; "
                "give each request its own id",
                reason="DUPLICATE_ID",
            )
        mine = self._per_connection.get(route[0], 0)
        if not mine and len(self._per_connection) >= self.clients_max:
            raise ResourceExhausted(
                f"{self.clients_max} connections have requests in flight, the limit; ask again later",
                reason="TOO_MANY_CLIENTS",
                retry_after_ms=100,
            )
        if mine >= self.inflight_per_client:
            raise ResourceExhausted(
                f"{self.inflight_per_client} requests of this connection are in flight, which is the limit; "
                "wait for replies",
                reason="TOO_MANY_IN_FLIGHT",
                retry_after_ms=10,
            )

    def make_room(self, job: Job, *, queue_length: int | None) -> Job | None:
        """Whether there is a place for a job: the waiting one that must be answered first, if any.

        Raises ResourceExhausted when a bound is reached and nobody has to give way.
        """
        if job.nbytes:
            mine = self._bytes_of.get(job.client, 0)
            free = self.queue_bytes - self._bytes
            if job.nbytes > free or (mine and mine + job.nbytes > free):
                raise ResourceExhausted(
                    f"{self._bytes} bytes of tensors are in flight, {mine} of them this client's; "
                    f"{job.nbytes} more would take others' part of {self.queue_bytes} (`queue_bytes`)",
                    reason="QUEUE_BYTES_FULL",
                )
        queue = self._queues.get(job.instance)
        if queue is None or queue.jobs < (queue_length or self.queue_length):
            return None
        worst = next(level for level in reversed(queue.levels) if level.jobs)
        if worst.priority > job.priority:
            return worst.largest().last()
        if worst.priority == job.priority:
            mine_waiting = worst.clients.get(job.client)
            largest = worst.largest()
            if largest.jobs > (0 if mine_waiting is None else mine_waiting.jobs) + 1:
                return largest.last()
        raise ResourceExhausted(
            f"{queue.jobs} requests wait for this model, which is the limit; ask again later",
            reason="QUEUE_FULL",
        )

    def admit(self, job: Job) -> None:
        """Takes a job into the table of those in flight; it is to run at once or to be queued."""
        self._seq += 1
        job.seq = self._seq
        self.in_flight += 1
        connection = job.route[0]
        if job.request_id is not None:
            self._by_id[connection, job.request_id] = job
        self._per_connection[connection] = self._per_connection.get(connection, 0) + 1
        if job.nbytes:
            self._bytes += job.nbytes
            self._bytes_of[job.client] = self._bytes_of.get(job.client, 0) + job.nbytes
        if job.deadline_s != math.inf:
            if len(self._deadlines) > 2 * self.in_flight + SLACK:
                self._forget_answered()
            heapq.heappush(self._deadlines, (job.deadline_s, job.seq, job))

    def _forget_answered(self) -> None:
        """Answered jobs stay in the heap until their time comes; with long timeouts that would be many."""
        self._deadlines = [row for row in self._deadlines if row[2].state is not JobState.ANSWERED]
        heapq.heapify(self._deadlines)

    def enqueue(self, job: Job) -> None:
        """Puts an admitted job, or one that was handed out and must run again, into its place."""
        job.state = JobState.QUEUED
        job.run_id = 0
        queue = self._queues.get(job.instance)
        if queue is None:
            queue = self._queues[job.instance] = _Queue()
        queue.add(job)

    # ------------------------------------------------------------------ going out

    def best(self, instances: Sequence[Serving], now_s: float) -> Job | None:
        """The job that is to run next of all that wait for these instances; it stays where it is."""
        found: tuple[int, int] | None = None
        first: _Level | None = None
        serving: Serving | None = None
        for instance in instances:
            queue = self._queues.get(instance.id)
            if queue is None or not queue.jobs:
                continue
            candidate = queue.first(now_s)
            if candidate is not None:
                rank = candidate[0], queue.turn
                if found is None or rank < found:
                    found, first, serving = rank, candidate[1], instance
        client = None if first is None else first.head()
        fair = None if client is None else client.head()
        if fair is None or first is None or serving is None or not first.timed:
            return fair
        return first.urgent(fair, serving, now_s) or fair

    def take(self, job: Job, instances: Sequence[Serving], now_s: float) -> None:
        """The job that `best` gave goes to run, and so the others of these instances are passed over."""
        queue = self._queues[job.instance]
        self._turns += 1
        queue.turn = self._turns
        for instance in instances:
            other = self._queues.get(instance.id)
            if other is not None and other.jobs:
                for level in other.levels:
                    level.passes += 1
        level = queue.level(job.priority)
        level.passes, level.passed_since_s = 0, now_s
        self._serve(queue, level, job)

    def _serve(self, queue: _Queue, level: _Level, job: Job) -> None:
        level.serve(level.clients[job.client], job)
        queue.jobs -= 1
        queue.rows -= job.rows
        job.state = JobState.RUNNING

    def mates(self, first: Job, *, rows_max: int, times: RunTimes, now_s: float) -> list[Job]:
        """Takes the waiting jobs that are to share the run of `first`, in their order."""
        queue = self._queues.get(first.instance)
        found: list[Job] = []
        if queue is None or not queue.jobs or first.shape_key is None:
            return found
        rows, due_s, best, misses = first.rows, first.deadline_s, first.priority, 0
        rightful = rows
        for level in queue.levels:
            if not level.jobs:
                continue
            passed: list[_Waiting] = []
            while rows < rows_max and misses < MISSES_MAX and (client := level.head()) is not None:
                job = client.head()
                assert job is not None
                total, job_due_s = rows + job.rows, min(due_s, job.deadline_s)
                rides = level.priority > best or level.floods(client, first)
                if (
                    job.shape_key == first.shape_key
                    and total <= rows_max
                    and (job_due_s == math.inf or now_s + times.turn_s(total) <= job_due_s)
                    and (not rides or times.expect_s(total) <= RIDE_ALONG * times.expect_s(rightful))
                ):
                    self._serve(queue, level, job)
                    level.passes, level.passed_since_s = 0, now_s
                    found.append(job)
                    rows, due_s, best = total, job_due_s, min(best, level.priority)
                    rightful += 0 if rides else job.rows
                else:
                    misses += 1
                    heapq.heappop(level.heap)
                    passed.append(client)
            for client in passed:
                level.enter(client)
        return found

    # ------------------------------------------------------------------ asking

    def queued(self, instance: int) -> int:
        """Jobs waiting for this instance."""
        queue = self._queues.get(instance)
        return 0 if queue is None else queue.jobs

    def queued_rows(self, instance: int) -> int:
        """Their rows."""
        queue = self._queues.get(instance)
        return 0 if queue is None else queue.rows

    def queued_since_s(self, instance: int) -> float:
        """Since when there is something in this instance's queue."""
        return self._queues[instance].since_s

    def rows_ahead(self, job: Job) -> int:
        """Rows that would go before a job that is not admitted yet, if nobody else came.

        Of its own client's jobs without a deadline none, of those with one all but where it is the earliest;
        of each other client's in its level as many as its own, itself included.
        """
        queue = self._queues.get(job.instance)
        if queue is None or not queue.jobs:
            return 0
        rows = 0
        for level in queue.levels:
            if level.jobs and level.priority <= job.priority:
                rows += level.ahead(job) if level.priority == job.priority else level.rows
        return rows

    def find(self, route: Route, request_id: RequestId) -> Job | None:
        """The job in flight with this id on this connection."""
        return self._by_id.get((route[0], request_id))

    def waiting(self, instance: int) -> list[Job]:
        """All jobs waiting for this instance, in no order."""
        queue = self._queues.get(instance)
        if queue is None:
            return []
        rows = [row for level in queue.levels for client in level.clients.values() for row in client.heap]
        return [row[2] for row in rows if row[2].state is JobState.QUEUED]

    def snapshot(self) -> dict[str, Any]:
        """For `server_status`."""
        return {"in_flight": self.in_flight, "clients": self.clients, "queued_bytes": self._bytes}

    # ------------------------------------------------------------------ ends

    def answered(self, job: Job) -> None:
        """Takes the job out of every table; its reply is on its way."""
        if job.state is JobState.ANSWERED:
            raise AssertionError("a request is answered once")
        if job.state is JobState.QUEUED:
            self._queues[job.instance].remove(job)
        job.state = JobState.ANSWERED
        self.in_flight -= 1
        job.inputs = []
        connection = job.route[0]
        if job.request_id is not None:
            self._by_id.pop((connection, job.request_id), None)
        left = self._per_connection[connection] - 1
        if left:
            self._per_connection[connection] = left
        else:
            del self._per_connection[connection]
        if job.nbytes:
            self._bytes -= job.nbytes
            left = self._bytes_of[job.client] - job.nbytes
            if left:
                self._bytes_of[job.client] = left
            else:
                del self._bytes_of[job.client]

    def expired(self, now_s: float) -> Iterator[Job]:
        """Jobs whose deadline has passed and which are not answered; the caller answers each."""
        heap = self._deadlines
        while heap and (heap[0][2].state is JobState.ANSWERED or heap[0][0] <= now_s):
            job = heapq.heappop(heap)[2]
            if job.state is not JobState.ANSWERED:
                yield job

    def next_deadline_s(self) -> float | None:
        """When `expired` has something to give, at the earliest."""
        heap = self._deadlines
        while heap and heap[0][2].state is JobState.ANSWERED:
            heapq.heappop(heap)
        return heap[0][0] if heap else None

    def in_flight_of(self, connection: bytes | int) -> int:
        """How many jobs of this connection are in flight."""
        return self._per_connection.get(connection, 0)

    def drop_queue(self, instance: int) -> None:
        """Forgets the queue of an instance that is gone; its jobs have been answered."""
        queue = self._queues.pop(instance, None)
        if queue is not None and queue.jobs:
            raise AssertionError("a queue with jobs in it was dropped")
