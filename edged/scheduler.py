"""Which request runs next: the queues, their bounds, their deadlines.

Pure: takes the time, gives jobs. One queue for each serving instance, ordered by priority, then by the
earliest deadline, then by arrival. Every job is in the table of jobs in flight from its admission until it is
answered, whatever happens to it in between; that table is what makes "exactly one reply" checkable.
"""

from __future__ import annotations

import enum
import heapq
import math
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from edged.errors import AlreadyExists, ResourceExhausted
from edged.messages import Peer, RegionPart, RequestId, Route, TensorData

__all__ = ["Job", "JobState", "Scheduler"]


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
    alone: bool = False
    """It was in a batch that failed: it must not share a run again."""


class Scheduler:
    """Bounded queues of jobs, by instance."""

    def __init__(
        self, *, queue_length: int, queue_bytes: int, inflight_per_client: int, clients: int
    ) -> None:
        self.queue_length = queue_length
        self.queue_bytes = queue_bytes
        self.inflight_per_client = inflight_per_client
        self.clients_max = clients
        self._queues: dict[int, list[tuple[int, float, int, Job]]] = {}
        self._lengths: dict[int, int] = {}
        self._deadlines: list[tuple[float, int, Job]] = []
        self._by_id: dict[tuple[bytes, RequestId], Job] = {}
        self._per_client: dict[bytes, int] = {}
        self._bytes = 0
        self._seq = 0
        self.in_flight = 0
        """Jobs admitted and not yet answered."""

    @property
    def clients(self) -> int:
        """Connections with a job in flight."""
        return len(self._per_client)

    def queued(self, instance: int) -> int:
        """Jobs waiting for this instance."""
        return self._lengths.get(instance, 0)

    def check_room(self, route: Route, request_id: RequestId) -> None:
        """Raises AlreadyExists or ResourceExhausted when this client cannot have one more in flight."""
        if request_id is not None and (route[0], request_id) in self._by_id:
            raise AlreadyExists(
                f"a request with id {request_id!r} is already in flight on this connection; "
                "give each request its own id",
                reason="DUPLICATE_ID",
            )
        mine = self._per_client.get(route[0], 0)
        if not mine and len(self._per_client) >= self.clients_max:
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

    def admit(self, job: Job, *, queue_length: int | None, mean_run_s: float) -> None:
        """Puts the job into its instance's queue. Raises ResourceExhausted when a bound is reached."""
        bound = queue_length or self.queue_length
        length = self._lengths.get(job.instance, 0)
        if length >= bound:
            raise ResourceExhausted(
                f"{length} requests wait for this model, which is the limit; ask again later",
                reason="QUEUE_FULL",
                retry_after_ms=max(1, math.ceil(mean_run_s * length * 1000)),
            )
        if self._bytes + job.nbytes > self.queue_bytes:
            raise ResourceExhausted(
                f"{self._bytes} bytes of tensors wait, {job.nbytes} more would pass {self.queue_bytes}",
                reason="QUEUE_BYTES_FULL",
                retry_after_ms=max(1, math.ceil(mean_run_s * (length + 1) * 1000)),
            )
        self._seq += 1
        job.seq = self._seq
        self._bytes += job.nbytes
        self.in_flight += 1
        if job.request_id is not None:
            self._by_id[job.route[0], job.request_id] = job
        self._per_client[job.route[0]] = self._per_client.get(job.route[0], 0) + 1
        if job.deadline_s != math.inf:
            if len(self._deadlines) > 2 * self.in_flight + 64:
                self._forget_answered()
            heapq.heappush(self._deadlines, (job.deadline_s, job.seq, job))
        self._push(job)

    def _push(self, job: Job) -> None:
        queue = self._queues.setdefault(job.instance, [])
        length = self._lengths.get(job.instance, 0)
        if len(queue) > 2 * length + 64:
            # Answered jobs stay in the heap until they come up; asking and cancelling must not fill it.
            queue[:] = [row for row in queue if row[3].state is JobState.QUEUED and row[3] is not job]
            heapq.heapify(queue)
        heapq.heappush(queue, (job.priority, job.deadline_s, job.seq, job))
        self._lengths[job.instance] = length + 1

    def _forget_answered(self) -> None:
        """Answered jobs stay in the heap until their time comes; with long timeouts that would be many."""
        self._deadlines = [row for row in self._deadlines if row[2].state is not JobState.ANSWERED]
        heapq.heapify(self._deadlines)

    def requeue(self, job: Job) -> None:
        """Puts a job that was handed out, and did not run, back to its place."""
        job.state = JobState.QUEUED
        self._push(job)

    def next(self, instances: Sequence[int]) -> Job | None:
        """Takes the best job that waits for any of these instances, now RUNNING."""
        best: tuple[int, float, int, Job] | None = None
        for instance in instances:
            heap = self._queues.get(instance)
            while heap and heap[0][3].state is not JobState.QUEUED:
                heapq.heappop(heap)
            if heap and (best is None or heap[0] < best):
                best = heap[0]
        if best is None:
            return None
        job = best[3]
        heapq.heappop(self._queues[job.instance])
        self._lengths[job.instance] -= 1
        job.state = JobState.RUNNING
        return job

    def find(self, route: Route, request_id: RequestId) -> Job | None:
        """The job in flight with this id on this connection."""
        return self._by_id.get((route[0], request_id))

    def answered(self, job: Job) -> None:
        """Takes the job out of every table; its reply is on its way."""
        if job.state is JobState.ANSWERED:
            raise AssertionError("a request is answered once")
        if job.state is JobState.QUEUED:
            self._lengths[job.instance] -= 1
        job.state = JobState.ANSWERED
        self._bytes -= job.nbytes
        self.in_flight -= 1
        job.inputs = []
        if job.request_id is not None:
            self._by_id.pop((job.route[0], job.request_id), None)
        left = self._per_client[job.route[0]] - 1
        if left:
            self._per_client[job.route[0]] = left
        else:
            del self._per_client[job.route[0]]

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

    def waiting(self, instance: int) -> list[Job]:
        """All jobs waiting for this instance, in no order."""
        return [entry[3] for entry in self._queues.get(instance, ()) if entry[3].state is JobState.QUEUED]

    def drop_queue(self, instance: int) -> None:
        """Forgets the queue of an instance that is gone; its jobs have been answered."""
        if self._lengths.pop(instance, 0):
            raise AssertionError("a queue with jobs in it was dropped")
        self._queues.pop(instance, None)

    def snapshot(self) -> dict[str, Any]:
        """For `server_status`."""
        return {"in_flight": self.in_flight, "clients": self.clients, "queued_bytes": self._bytes}
