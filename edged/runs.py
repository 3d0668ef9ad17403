"""Runs: which jobs are with which worker, how each run ends, and the one answer that each job gets.

Pure. `dispatch` hands waiting jobs to a worker's free slots; from there a run ends in one of four ways, and
each of its jobs is answered or goes back into the queue:

- done: each job gets its rows of the outputs;
- failed: a job that ran by itself is answered with the error; those of a batch go back to run by themselves,
  so that one's bad row never fails another;
- the worker died: the runs that may have been running (the first `concurrency` at the worker) are to blame
  as above, those behind them had not begun and go back;
- past its hard limit: all are answered, the runtime is told to stop, and if it does not its worker is killed.

A deadline or a cancel answers a job at once; its run goes on for as long as another job of it is wanted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from edged.errors import Cancelled, DeadlineExceeded, EdgedError, Unavailable, make_error
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
    WorkerGone,
)
from edged.instances import Instance, InstanceState, Surroundings, Worker
from edged.messages import RequestId, Route
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
    started_s: float
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
        self._drained = drained
        """Called when a job of a draining instance has ended."""
        self._ids = 0
        self._check_s = math.inf

    def next_due_s(self) -> float:
        """When `tick` has something to do, at the earliest."""
        return self._check_s

    # ------------------------------------------------------------------ handing over

    def dispatch(self, worker: Worker, now_s: float) -> None:
        """Hands waiting jobs to a worker's free slots."""
        instances = self._registry.instances
        serving = [
            i
            for i in worker.instances
            if instances[i].state is InstanceState.READY or instances[i].state is InstanceState.DRAINING
        ]
        while worker.free_slots:
            job = self._scheduler.next(serving)
            if job is None:
                return
            self._start([job], instances[job.instance], worker, now_s)

    def _start(self, jobs: list[Job], instance: Instance, worker: Worker, now_s: float) -> None:
        slot = worker.free_slots.pop()
        self._ids += 1
        run_id = self._ids
        rows, deadline_s = 0, 0.0
        for job in jobs:
            job.run_id = run_id
            job.started_s = now_s
            rows += job.rows
            deadline_s = max(deadline_s, job.deadline_s)
            if job.regions:
                self._regions.hold(job.regions)
        run = self.table[run_id] = Run(run_id, jobs, rows, instance, worker, slot, now_s)
        worker.runs.append(run_id)
        if len(worker.runs) <= worker.concurrency:
            self._limit(run, now_s)
        if 0.0 < instance.mean_run_s < SPIN_RUN_MAX_S:
            self.spin_until_s = now_s + SPIN_S
        self._emit(StartRun(worker.id, run_id, instance.id, slot, jobs, rows, deadline_s))

    def _limit(self, run: Run, now_s: float) -> None:
        """A run's limit begins when the worker may run it: it is not blamed for those before it."""
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
                self._limit(first, now_s)
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
        compute_s = event.compute_ns / 1e9
        mean = instance.mean_run_s
        instance.mean_run_s = compute_s if mean == 0.0 else mean + 0.1 * (compute_s - mean)
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
            if job.state is not JobState.ANSWERED:
                job.alone = True
                self._scheduler.requeue(job)

    def _succeed(self, run: Run, job: Job, outputs: list[Any], compute_ns: int, now_s: float) -> None:
        instance = run.instance
        queue_s = max(0.0, job.started_s - job.arrived_s)
        instance.stats.success(
            queue_ns=int(queue_s * 1e9),
            compute_ns=compute_ns,
            total_ns=int((now_s - job.arrived_s) * 1e9),
            epoch_ms=int((now_s + self.epoch_offset_s) * 1000),
        )
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
        self._emit(SendResult(job, instance.name, version, run.worker.id, run.slot, outputs, parameters))
        self._answered(job)

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
                for job in run.jobs:
                    if job.state is not JobState.ANSWERED:
                        self._scheduler.requeue(job)
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

    def answer(self, job: Job, instance: Instance | None, error: EdgedError, now_s: float) -> None:
        """Answers a job with an error, wherever it is; its run stops when nobody wants it any more."""
        if instance is not None:
            kind = "cancel" if isinstance(error, Cancelled) else "fail"
            instance.stats.failure(kind, int((now_s - job.arrived_s) * 1e9))
        run = self.table.get(job.run_id) if job.state is JobState.RUNNING else None
        self.refuse(job.route, "infer", job.request_id, error)
        self._answered(job)
        if run is not None and not run.wanted:
            self._emit(CancelRun(run.worker.id, run.id))

    def withdraw(self, job: Job, error: EdgedError, now_s: float) -> None:
        """Answers a job whose client, or whose deadline, wants it no more."""
        instance = self._registry.instances.get(job.instance)
        self.answer(job, instance, error, now_s)
        if instance is not None and instance.state is InstanceState.DRAINING:
            self._drained(instance, now_s)

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

    # ------------------------------------------------------------------ time

    def tick(self, now_s: float) -> bool:
        """Ends what is past its deadline or its limit; whether a worker was killed for that."""
        for job in self._scheduler.expired(now_s):
            waited = "while it ran" if job.state is JobState.RUNNING else "while it waited"
            error = DeadlineExceeded(
                f"the deadline passed {waited}, {round((now_s - job.arrived_s) * 1000)} ms after it came",
                reason="DEADLINE_PASSED",
            )
            self.withdraw(job, error, now_s)
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


def _crashed(instance: Instance, why: str) -> Unavailable:
    return Unavailable(
        f"model '{instance.name}': the worker ended while this request ran ({why}); it is started again",
        reason="WORKER_CRASHED",
        retry_after_ms=500,
    )


def _not_rows(outputs: list[Any], rows: int) -> str:
    """What keeps a batch's outputs from being given to its jobs row by row; empty when nothing does."""
    for name, _, shape, _, nbytes, *_ in outputs:
        if not shape or shape[0] != rows or nbytes % rows:
            return f"output '{name}' of {rows} rows came with shape {shape} and {nbytes} bytes"
    return ""


def _cut_rows(output: list[Any], first: int, count: int) -> list[Any]:
    """A job's rows of one output of a batch."""
    name, datatype, shape, offset, nbytes, *_ = output
    row_bytes = nbytes // shape[0]
    return [name, datatype, [count, *shape[1:]], offset + first * row_bytes, count * row_bytes]
