"""Runs: which jobs are with which worker, how each run ends, and the one answer that each job gets.

Pure. `submit` takes a request in, or refuses it; `dispatch` hands waiting jobs to a worker as late as that
costs nothing (`AHEAD_MIN_S`), so that the order and the batches are those of the moment, and never waits for
more to come unless the owner asked for that (`max_queue_delay`). A run ends in one of four ways, and each of
its jobs is answered or goes back into the queue:

- done: each job gets its rows of the outputs;
- failed: a job that ran by itself is answered with the error; those of a batch go back to run by themselves,
  so that one's bad row never fails another;
- the worker died: the runs that may have been running (the first `concurrency` at the worker) are to blame
  as above, those behind them had not begun and go back;
- past its hard limit: all are answered, the runtime is told to stop, and if it does not its worker is killed.

A deadline or a cancel answers a job at once; its run goes on for as long as another job of it is wanted.

Deadlines are kept by not beginning what cannot be finished: a request is refused when it comes, and answered
instead of run when its turn comes, if by the estimate it is too late. Only what is ahead of it, running or
waiting, can make it so: a model with nothing to do always tries, so that a wrong estimate is found out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from edged.cache import ResponseCache
from edged.errors import Cancelled, DeadlineExceeded, EdgedError, ResourceExhausted, Unavailable, make_error
from edged.events import (
    CancelRun,
    Effect,
    FreeRegion,
    Log,
    Reply,
    RunDone,
    RunFailed,
    SendResult,
    StartRun,
    Unsent,
    WorkerGone,
)
from edged.instances import Instance, InstanceState, Surroundings, Worker
from edged.messages import RegionPart, RequestId, Route
from edged.regions import Regions
from edged.registry import Registry
from edged.scheduler import Job, JobState, Scheduler
from edged.statistics import Refusals
from edged.workers import Workers

__all__ = ["Run", "Runs"]

RUN_LIMIT_S = 120.0
"""The hard limit of a run when the model's settings name none: a hang must end."""

RUN_GRACE_S = 2.0
"""From asking the runtime to stop a run until its worker is killed."""

RUN_HUNG = "a run did not stop when told to"

AHEAD_MIN_S, AHEAD_MAX_S = 150e-6, 1e-3
"""How long before a worker is expected to come to its next run it is given it, to wait at its socket: then it
idles for no hand-over. The least: that takes 50 µs on an idle machine. On a full one the supervisor itself
comes late, and twice as much as it has been late of late is added, up to the most: what is handed over can
neither be overtaken nor join a batch."""

LATE_GAIN = 0.1
"""The weight of the newest hand-over in how late they are."""

SPIN_RUN_MAX_S, SPIN_S = 100e-6, 150e-6
"""The runs whose answer is looked for without sleeping, and the most that each may cost the supervisor."""


@dataclass(eq=False)
class Run:
    """One execution that a worker was told of."""

    id: int
    jobs: list[Job]
    rows: int
    instance: Instance
    worker: Worker
    slot: int
    expected_s: float
    """What it takes in the worker, by the estimate; 0 where nothing is known."""
    began_s: float
    """When the worker could begin it, at the earliest."""
    stop_at_s: float = math.inf
    kill_at_s: float = math.inf

    @property
    def wanted(self) -> bool:
        """Whether somebody waits for it still."""
        return any(job.state is not JobState.ANSWERED for job in self.jobs)


class Runs:
    """The runs that are out, and the answers to all admitted jobs."""

    def __init__(
        self,
        around: Surroundings,
        emit: Callable[[Effect], None],
        *,
        registry: Registry,
        workers: Workers,
        scheduler: Scheduler,
        regions: Regions,
        cache: ResponseCache,
        drained: Callable[[Instance, float], None],
        epoch_offset_s: float = 0.0,
    ) -> None:
        self.table: dict[int, Run] = {}
        """Every run that is out, in the order in which they were handed over."""
        self.counters = {"refused": 0, "inferences": 0}
        self.refusals = Refusals()
        self.spin_until_s = 0.0
        """Until then the answer of a short run is so near that sleeping for it would take longer."""
        self.epoch_offset_s = epoch_offset_s
        """Wall-clock time minus monotonic time; the daemon keeps it current."""
        self._around = around
        self._emit = emit
        """As `around.emit`, for what is neither published nor remembered."""
        self._registry = registry
        self._workers = workers
        self._scheduler = scheduler
        self._regions = regions
        self._cache = cache
        self._drained = drained
        """Called when a job of a draining instance has ended."""
        self._ids = 0
        self._check_s = math.inf
        self._ahead_s, self._late_s = AHEAD_MIN_S, 0.0
        self._held_until_s: dict[int, float] = {}
        """Workers for which jobs are held back, until it is time to hand over or so that a batch may fill."""

    def next_due_s(self) -> float:
        """When `tick` has something to do beside deadlines, at the earliest."""
        return min(self._check_s, *self._held_until_s.values()) if self._held_until_s else self._check_s

    def _look_again(self, worker: Worker, at_s: float) -> None:
        """Has `tick` hand over to a worker at `at_s`; the end of a run does so in any case."""
        if at_s != math.inf:
            self._held_until_s[worker.id] = min(at_s, self._held_until_s.get(worker.id, math.inf))

    # ------------------------------------------------------------------ coming in

    def submit(self, job: Job, instance: Instance, now_s: float) -> None:
        """Takes a request in and starts it if it can. Raises DeadlineExceeded or ResourceExhausted."""
        scheduler = self._scheduler
        worker = None if instance.worker is None else self._workers.table.get(instance.worker)
        serves = worker is not None and instance.state is InstanceState.READY
        if worker is not None and serves and job.deadline_s != math.inf:
            self._check_in_time(job, instance, worker, now_s)
        try:
            victim = scheduler.make_room(job, queue_length=instance.settings.queue_length)
        except ResourceExhausted as error:
            error.retry_after_ms = _ms(self._busy_s(instance, scheduler.queued_rows(instance.id), now_s))
            raise
        if victim is not None:
            self._give_way(victim, instance, now_s)
        scheduler.admit(job)
        if job.regions:
            self._regions.hold(job.regions)
        if worker is None or not serves:
            scheduler.enqueue(job)
        elif len(worker.instances) > 1 or instance.hold_s or scheduler.queued(instance.id):
            scheduler.enqueue(job)
            self.dispatch(worker, now_s)
        elif (hand_over_s := self._begins_s(worker, now_s) - self._ahead_s) <= now_s:
            job.state = JobState.RUNNING
            self._start([job], job.rows, instance, worker, now_s)
        else:
            scheduler.enqueue(job)
            self._look_again(worker, hand_over_s)

    def _check_in_time(self, job: Job, instance: Instance, worker: Worker, now_s: float) -> None:
        rows = self._scheduler.rows_ahead(job)
        if not rows and len(worker.runs) < worker.concurrency:
            return
        times = instance.times
        left_s = self._busy_s(instance, rows, now_s) + times.turn_s(job.rows)
        late_s = now_s + left_s + times.margin_s(left_s) - job.deadline_s
        if late_s > 0.0:
            raise DeadlineExceeded(
                f"it would be {_ms(late_s)} ms late, with {rows} rows ahead of it; ask again later, or with "
                "more time",
                reason="CANNOT_MEET_DEADLINE",
                retry_after_ms=_ms(late_s),
            )
        job.promised = True

    def _busy_s(self, instance: Instance, rows: int, now_s: float) -> float:
        """How long a worker takes with what it has, and with so many of an instance's rows after that."""
        worker = self._workers.of(instance)
        if worker is None:
            return 0.0
        left_s = instance.times.drain_s(rows, instance.batch_max)
        for position, run_id in enumerate(worker.runs):
            run = self.table[run_id]
            turn_s = run.instance.times.turn_s(run.rows)
            left_s += turn_s if position >= worker.concurrency else max(0.0, run.began_s + turn_s - now_s)
        return left_s / worker.concurrency

    def _give_way(self, job: Job, instance: Instance, now_s: float) -> None:
        error = ResourceExhausted(
            "the queue is full, and its place was needed for a request of better priority, or of a client "
            "that has fewer waiting; ask again later",
            reason="QUEUE_FULL",
            retry_after_ms=_ms(self._busy_s(instance, self._scheduler.queued_rows(instance.id), now_s)),
        )
        self.answer(job, instance, error, now_s, kind="reject")

    # ------------------------------------------------------------------ handing over

    def _begins_s(self, worker: Worker, now_s: float) -> float:
        """When a worker would begin one run more, as far as is known; infinite while one waits already."""
        runs, concurrency, table = worker.runs, worker.concurrency, self.table
        if len(runs) < concurrency:
            return now_s
        if len(runs) > concurrency:
            return math.inf
        return max(now_s, min([table[each].began_s + table[each].expected_s for each in runs]))

    def dispatch(self, worker: Worker, now_s: float) -> None:
        """Hands waiting jobs to a worker that is free, or soon will be."""
        scheduler = self._scheduler
        if self._held_until_s:
            self._held_until_s.pop(worker.id, None)
        serving = self._serving(worker, now_s)
        while serving:
            begins_s = self._begins_s(worker, now_s)
            if begins_s - self._ahead_s > now_s:
                if any(scheduler.queued(each.id) for each in serving):
                    self._look_again(worker, begins_s - self._ahead_s)
                return
            job = scheduler.best(serving, now_s)
            if job is None:
                return
            instance = self._registry.instances[job.instance]
            if job.deadline_s != math.inf and self._too_late(job, instance, now_s, begins_s):
                continue
            scheduler.take(job, serving, now_s)
            jobs, rows = [job], job.rows
            if job.shape_key is not None and instance.batch_max > rows:
                jobs += scheduler.mates(
                    job, rows_max=self._rows_max(rows, instance, worker), times=instance.times, now_s=begins_s
                )
                rows = sum([each.rows for each in jobs])
            self._start(jobs, rows, instance, worker, now_s)

    def _serving(self, worker: Worker, now_s: float) -> list[Instance]:
        """The instances of a worker that have something for it to do now."""
        found = []
        for each in worker.instances:
            instance = self._registry.instances[each]
            if (
                self._scheduler.queued(each)
                and (instance.state is InstanceState.READY or instance.state is InstanceState.DRAINING)
                and not (instance.hold_s and self._held(instance, worker, now_s))
            ):
                found.append(instance)
        return found

    def _held(self, instance: Instance, worker: Worker, now_s: float) -> bool:
        """Whether what waits is still to wait for more; the tick that ends this is seen to."""
        scheduler, times = self._scheduler, instance.times
        rows = scheduler.queued_rows(instance.id)
        if rows >= instance.batch_rows():
            return False
        until_s = scheduler.queued_since_s(instance.id) + instance.hold_s
        deadline_s = scheduler.next_deadline_s()
        if deadline_s is not None:
            turn_s = times.turn_s(rows)
            until_s = min(until_s, deadline_s - turn_s - times.margin_s(turn_s))
        if until_s <= now_s:
            return False
        self._look_again(worker, until_s)
        return True

    def _too_late(self, job: Job, instance: Instance, now_s: float, begins_s: float) -> bool:
        """Answers a job that would begin too late, at `begins_s`, if another waits for its place."""
        if job.deadline_s > now_s:
            in_time = begins_s + instance.times.turn_s(job.rows) <= job.deadline_s
            if in_time or self._scheduler.queued(instance.id) == 1:
                return False
        error = DeadlineExceeded(
            f"it waited {_ms(now_s - job.arrived_s)} ms, and what is left of its time is too short for a run",
            reason="CANNOT_MEET_DEADLINE",
        )
        if job.promised:
            instance.times.promised(kept=False)
        self.withdraw(job, error, now_s, kind="reject")
        return True

    def _rows_max(self, rows: int, instance: Instance, worker: Worker) -> int:
        """Rows of the next run, which has some: what is best, divided among the threads that are free."""
        best = instance.batch_rows()
        free = worker.concurrency - len(worker.runs)
        if free > 1:
            best = min(best, -(-(self._scheduler.queued_rows(instance.id) + rows) // free))
        return best

    def _start(self, jobs: list[Job], rows: int, instance: Instance, worker: Worker, now_s: float) -> None:
        slot = worker.free_slots.pop()
        self._ids += 1
        run_id = self._ids
        deadline_s = 0.0
        for job in jobs:
            job.run_id = run_id
            job.started_s = now_s
            deadline_s = max(deadline_s, job.deadline_s)
            if job.regions:
                self._regions.hold(job.regions)
        expected_s = instance.times.expect_s(rows)
        run = self.table[run_id] = Run(run_id, jobs, rows, instance, worker, slot, expected_s, now_s)
        worker.runs.append(run_id)
        if len(worker.runs) <= worker.concurrency:
            self._begins(run, now_s)
        if 0.0 < expected_s < SPIN_RUN_MAX_S:
            self.spin_until_s = now_s + SPIN_S
        self._emit(StartRun(worker.id, run_id, instance.id, slot, jobs, rows, deadline_s))

    def _begins(self, run: Run, now_s: float) -> None:
        """The worker may run it from now on; its limit begins: it is not blamed for those before it."""
        run.began_s = now_s
        run.stop_at_s = now_s + (run.instance.settings.timeout_s or RUN_LIMIT_S)
        if run.stop_at_s < self._check_s:
            self._check_s = run.stop_at_s

    # ------------------------------------------------------------------ ends

    def _end(self, run: Run, now_s: float) -> None:
        """A run is no longer with its worker."""
        del self.table[run.id]
        worker = run.worker
        worker.free_slots.append(run.slot)
        worker.runs.remove(run.id)
        if len(worker.runs) >= worker.concurrency:
            first = self.table[worker.runs[worker.concurrency - 1]]
            if first.stop_at_s == first.kill_at_s == math.inf:
                self._begins(first, now_s)
        if not self.table:
            self.spin_until_s = 0.0
        for job in run.jobs:
            if job.regions:
                self._drop(job.regions)

    def _after(self, run: Run, now_s: float) -> None:
        self.dispatch(run.worker, now_s)
        if run.instance.state is InstanceState.DRAINING:
            self._drained(run.instance, now_s)

    def on_done(self, event: RunDone, now_s: float) -> None:
        """A worker has finished a run."""
        run = self.table.get(event.run_id)
        if run is None:
            return
        self._end(run, now_s)
        instance = run.instance
        instance.times.observe(run.rows, event.compute_ns / 1e9, now_s - run.began_s)
        instance.stats.executed(run.rows, event.compute_ns)
        if len(run.jobs) == 1:
            if run.jobs[0].state is not JobState.ANSWERED:
                self._succeed(run, run.jobs[0], event.outputs, event.compute_ns, now_s)
        else:
            self._done_batch(run, event, now_s)
        self._after(run, now_s)

    def _done_batch(self, run: Run, event: RunDone, now_s: float) -> None:
        problem = _not_rows(event.outputs, run.rows)
        if problem:
            self._refuse_batches(run.instance, problem)
            self._apart(run)
            return
        first = 0
        for job in run.jobs:
            if job.state is not JobState.ANSWERED:
                outputs = [_cut_rows(row, first, job.rows) for row in event.outputs]
                self._succeed(run, job, outputs, event.compute_ns, now_s)
            first += job.rows

    def _refuse_batches(self, instance: Instance, problem: str) -> None:
        """A model whose outputs have no row for each of the inputs' must not be given several requests."""
        instance.batch_max = 1
        self._around.emit(Log("batch_refused", {**instance.log_fields(), "DETAIL": problem}))

    def _apart(self, run: Run) -> None:
        """The jobs of a batch go back into the queue, to run by themselves."""
        for job in run.jobs:
            job.shape_key = None
        self._requeue(run)

    def _requeue(self, run: Run) -> None:
        for job in run.jobs:
            if job.state is not JobState.ANSWERED:
                self._scheduler.enqueue(job)

    def _succeed(self, run: Run, job: Job, outputs: list[Any], compute_ns: int, now_s: float) -> None:
        instance = run.instance
        nbytes, bytes_max = _reply_bytes(outputs, job.into), self._around.config.limits.message_bytes
        if nbytes > bytes_max:
            self.answer(job, instance, _too_large(instance, nbytes, bytes_max), now_s)
            return
        queue_s = max(0.0, job.started_s - job.arrived_s)
        queue_ns, total_ns = int(queue_s * 1e9), int((now_s - job.arrived_s) * 1e9)
        epoch_ms = int((now_s + self.epoch_offset_s) * 1000)
        instance.stats.success(
            rows=job.rows, queue_ns=queue_ns, compute_ns=compute_ns, total_ns=total_ns, epoch_ms=epoch_ms
        )
        if instance.sizes is not None:
            instance.sizes.note(job.inputs, job.peer.uid)
        self.counters["inferences"] += 1
        info = instance.info
        parameters = {
            "device": info["device"],
            "runtime": info["runtime"],
            "precision": info["precision"],
            "batch_size": run.rows,
            "queue_us": int(queue_s * 1e6),
            "compute_us": compute_ns // 1000,
        }
        if instance.fallback_reason:
            parameters["fallback_reason"] = instance.fallback_reason
        if job.warnings:
            parameters["warnings"] = job.warnings
        version = str(instance.version)
        if job.promised:
            instance.times.promised(kept=now_s <= job.deadline_s)
        counted = (job.rows, queue_ns, compute_ns, total_ns)
        self._emit(
            SendResult(job, instance.name, version, run.worker.id, run.slot, outputs, parameters, counted)
        )
        self._answered(job)

    def on_unsent(self, event: Unsent, now_s: float) -> None:
        """Outputs that could not be sent: the request failed, whatever was counted before."""
        instance = self._registry.instances.get(event.instance)
        if event.counted is not None:
            self.counters["inferences"] -= 1
        if instance is not None:
            if event.counted is not None:
                rows, queue_ns, compute_ns, total_ns = event.counted
                instance.stats.unsent(rows=rows, queue_ns=queue_ns, compute_ns=compute_ns, total_ns=total_ns)
            instance.stats.failure("fail", int((now_s - event.arrived_s) * 1e9))
        self.refuse(event.route, "infer", event.request_id, event.error)

    def on_failed(self, event: RunFailed, now_s: float) -> None:
        """A worker could not finish a run."""
        run = self.table.get(event.run_id)
        if run is None:
            return
        self._end(run, now_s)
        if len(run.jobs) > 1 and event.code != DeadlineExceeded.code.value:
            self._apart(run)
        else:
            for job in run.jobs:
                if job.state is not JobState.ANSWERED:
                    self._fail(job, run.instance, event, now_s)
        self._after(run, now_s)

    def _fail(self, job: Job, instance: Instance, event: RunFailed, now_s: float) -> None:
        if event.code == "INTERNAL":
            fields = {
                **instance.log_fields(),
                "REQUEST_ID": str(job.request_id),
                "REASON": event.reason,
                "DETAIL": event.message,
            }
            self._emit(Log("request_internal_error", fields))
        text = f"model '{instance.name}': {event.message}"
        self.answer(job, instance, make_error(event.code, text, reason=event.reason), now_s)

    def on_worker_gone(self, event: WorkerGone, now_s: float) -> None:
        """A worker died: who may have been running is to blame, the others had not begun."""
        worker = self._workers.table.get(event.worker)
        if worker is None:
            return
        why = worker.killed_for or event.how
        lost = [self.table[run_id] for run_id in worker.runs]
        for position, run in enumerate(lost):
            self._end(run, now_s)
            again = run.instance.state is InstanceState.READY
            if again and position >= worker.concurrency:
                self._requeue(run)
            elif again and len(run.jobs) > 1:
                self._apart(run)
            else:
                for job in run.jobs:
                    if job.state is not JobState.ANSWERED:
                        self.answer(job, run.instance, _crashed(run.instance, why), now_s)

    # ------------------------------------------------------------------ answers

    def refuse(self, route: Route, socket: str, request_id: RequestId, error: EdgedError) -> None:
        """Answers with an error what was never admitted, or what `answer` gives it."""
        self.counters["refused"] += 1
        self.refusals.note(error)
        self._emit(Reply(route, socket, {"id": request_id, "error": error.to_wire()}))

    def answer(
        self, job: Job, instance: Instance | None, error: EdgedError, now_s: float, *, kind: str = "fail"
    ) -> None:
        """Answers a job with an error, wherever it is; its run stops when nobody wants it any more.

        `kind` is that of the statistics.
        """
        if instance is not None:
            kind = "cancel" if isinstance(error, Cancelled) else kind
            instance.stats.failure(kind, int((now_s - job.arrived_s) * 1e9))
        run = self.table.get(job.run_id) if job.state is JobState.RUNNING else None
        self.refuse(job.route, "infer", job.request_id, error)
        self._answered(job)
        if run is not None and not run.wanted:
            self._emit(CancelRun(run.worker.id, run.id))

    def withdraw(self, job: Job, error: EdgedError, now_s: float, *, kind: str = "fail") -> None:
        """Answers a job that nobody wants any more, or in vain; it may be the last of its instance's."""
        instance = self._registry.instances.get(job.instance)
        self.answer(job, instance, error, now_s, kind=kind)
        if instance is not None and instance.state is InstanceState.DRAINING:
            self._drained(instance, now_s)

    def jobs_of(self, client: bytes | int) -> list[Job]:
        """What a connection has in flight, waiting and running."""
        jobs = [job for each in self._registry.instances for job in self._scheduler.waiting(each)]
        jobs += [job for run in self.table.values() for job in run.jobs if job.state is not JobState.ANSWERED]
        return [job for job in jobs if job.route[0] == client]

    def _answered(self, job: Job) -> None:
        self._scheduler.answered(job)
        if job.regions:
            self._drop(job.regions)

    def _drop(self, regions: tuple[int, ...]) -> None:
        """A request or a run has ended: what nobody leases and nobody uses any more is reclaimed."""
        for each in self._regions.drop(regions):
            self._emit(FreeRegion(each))

    # ------------------------------------------------------------------ hooks of those that move instances

    def running(self, instance: Instance) -> int:
        """How many of an instance's runs are with its worker."""
        return sum(1 for run in self.table.values() if run.instance is instance)

    def busy(self, instance: Instance) -> bool:
        """Whether jobs wait or run for an instance."""
        return bool(self._scheduler.queued(instance.id) or self.running(instance))

    def flush(self, instance: Instance, error: EdgedError) -> None:
        """Answers everything that is in flight for an instance."""
        jobs = self._scheduler.waiting(instance.id)
        for run in self.table.values():
            if run.instance is instance:
                jobs += [job for job in run.jobs if job.state is not JobState.ANSWERED]
        for job in jobs:
            self.answer(job, instance, error, job.arrived_s)

    def forget(self, instance: Instance) -> None:
        """An instance is gone."""
        self._scheduler.drop_queue(instance.id)
        self._cache.drop(instance.id)

    # ------------------------------------------------------------------ time

    def tick(self, now_s: float) -> bool:
        """Ends what is past its deadline or its limit; whether a worker was killed for that."""
        for job in self._scheduler.expired(now_s):
            waited = "while it ran" if job.state is JobState.RUNNING else "while it waited"
            error = DeadlineExceeded(
                f"the deadline passed {waited}, {round((now_s - job.arrived_s) * 1000)} ms after it came",
                reason="DEADLINE_PASSED",
            )
            instance = self._registry.instances.get(job.instance)
            if job.promised and instance is not None:
                instance.times.promised(kept=False)
            self.withdraw(job, error, now_s)
        for worker_id in [w for w, until_s in self._held_until_s.items() if until_s <= now_s]:
            late_s = now_s - self._held_until_s.pop(worker_id)
            if worker_id in self._workers.table:
                self.dispatch(self._workers.table[worker_id], now_s)
            self._late_s += LATE_GAIN * (min(late_s, AHEAD_MAX_S) - self._late_s)
            self._ahead_s = min(AHEAD_MAX_S, AHEAD_MIN_S + 2.0 * self._late_s)
        return now_s >= self._check_s and self._check_limits(now_s)

    def _check_limits(self, now_s: float) -> bool:
        """Stops runs past their hard limit, and kills workers whose runs do not stop."""
        due, killed = math.inf, False
        for run in list(self.table.values()):
            if now_s >= run.kill_at_s:
                self._workers.kill(run.worker, RUN_HUNG, now_s)
                run.kill_at_s, killed = math.inf, True
            elif now_s >= run.stop_at_s:
                run.stop_at_s, run.kill_at_s = math.inf, now_s + RUN_GRACE_S
                self._stop(run, now_s)
            due = min(due, run.stop_at_s, run.kill_at_s)
        self._check_s = due
        return killed

    def _stop(self, run: Run, now_s: float) -> None:
        limit_s = run.instance.settings.timeout_s or RUN_LIMIT_S
        if not run.wanted:
            self._emit(CancelRun(run.worker.id, run.id))  # it was told before; a deaf runtime is told again
        for job in run.jobs:
            if job.state is not JobState.ANSWERED:
                error = DeadlineExceeded(
                    f"model '{run.instance.name}' ran longer than its limit of {limit_s:g} s "
                    "(`timeout` in its settings)",
                    reason="RUN_TIMEOUT",
                )
                self.answer(job, run.instance, error, now_s)


def _ms(seconds: float) -> int:
    """For `retry_after_ms`: at least one."""
    return max(1, math.ceil(seconds * 1000))


def _crashed(instance: Instance, why: str) -> Unavailable:
    return Unavailable(
        f"model '{instance.name}': the worker ended while this request ran ({why}); it is started again",
        reason="WORKER_CRASHED",
        retry_after_ms=500,
    )


def _reply_bytes(outputs: list[Any], into: Mapping[str, RegionPart] | None) -> int:
    """What a run's outputs take in a reply; those that landed in leased memory take nothing.

    As the worker says; what makes no sense takes nothing here, and is found out when it is read.
    """
    total = 0
    try:
        for output in outputs:
            if output[2] is None:
                total += len(output[5])
            elif into is None or output[0] not in into:
                total += output[4]
    except (IndexError, TypeError):
        return 0
    return total


def _too_large(instance: Instance, nbytes: int, bytes_max: int) -> ResourceExhausted:
    return ResourceExhausted(
        f"model '{instance.name}': the outputs take {nbytes} bytes, a reply may have {bytes_max} "
        "(`limits.message_bytes`); have large outputs land in leased memory, or ask for fewer",
        reason="REPLY_TOO_LARGE",
    )


def _not_rows(outputs: list[Any], rows: int) -> str:
    """What keeps a batch's outputs from being given to its jobs row by row; empty when nothing does."""
    for output in outputs:
        if type(output) is not list or len(output) < 5 or type(output[3]) is not int:
            return f"{str(output)[:200]} is no tensor"
        name, _, shape, _, nbytes, *_ = output
        if type(shape) is not list or type(nbytes) is not int:
            return f"output '{name}' of {rows} rows is no tensor"
        if not shape or shape[0] != rows or nbytes % rows:
            return f"output '{name}' of {rows} rows came with shape {shape} and {nbytes} bytes"
    return ""


def _cut_rows(output: list[Any], first: int, count: int) -> list[Any]:
    """A job's rows of one output of a batch."""
    name, datatype, shape, offset, nbytes, *_ = output
    row_bytes = nbytes // shape[0]
    return [name, datatype, [count, *shape[1:]], offset + first * row_bytes, count * row_bytes]
