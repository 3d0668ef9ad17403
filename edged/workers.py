"""The worker processes: which there are, which instance is in which, what they are told, and their ends.

Pure: a worker here is a row of a table; the daemon has the process. One that is left by its last instance is
asked to exit, and one that does not do as it is told is killed; both are over when `gone` says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edged.config import OPERATORS_DIR, ModelSettings
from edged.devices import Candidate
from edged.events import CancelLoad, EndWorker, KillWorker, LoadInstance, Log, StartWorker, UnloadInstance
from edged.instances import SLOTS_AT_START, Instance, InstanceState, Surroundings, Worker
from edged.setups import Setup

__all__ = ["Workers"]

WORKER_END_S = 3.0
"""From asking a worker to exit until it is killed: a runtime's teardown takes tens of milliseconds."""

ARENA_MESSAGES, SLOT_MESSAGES = 8, 2
"""How many of the largest messages a worker's slots may hold together, and each of them at the least: the
inputs and outputs of one run."""


class Workers:
    """The table of worker processes."""

    def __init__(self, around: Surroundings) -> None:
        self.table: dict[int, Worker] = {}
        self._around = around
        self._ids = 0

    def of(self, instance: Instance) -> Worker | None:
        """The process that an instance is in."""
        return None if instance.worker is None else self.table.get(instance.worker)

    # ------------------------------------------------------------------ coming in

    def enter(self, instance: Instance, candidate: Candidate) -> Worker:
        """Gives an instance a place: in a worker that is there to be shared, or in a new one."""
        worker = self._to_share(instance, candidate) or self._start(instance, candidate)
        instance.worker = worker.id
        worker.instances.add(instance.id)
        worker.about = {key: worker.about[key] for key in worker.instances & worker.about.keys()}
        worker.about[instance.id] = instance.log_fields()
        return worker

    @staticmethod
    def _shares(settings: ModelSettings, candidate: Candidate) -> bool:
        return candidate.gpu_like or settings.isolation == "shared"

    def _to_share(self, instance: Instance, candidate: Candidate) -> Worker | None:
        if not self._shares(instance.settings, candidate):
            return None
        for worker in self.table.values():
            same = (worker.runtime, worker.device) == (candidate.runtime, candidate.device)
            if worker.shared and same and worker.kill_at_s is None:
                return worker
        return None

    def _start(self, instance: Instance, candidate: Candidate) -> Worker:
        self._ids += 1
        worker = Worker(
            self._ids, candidate.runtime, candidate.device, shared=self._shares(instance.settings, candidate)
        )
        worker.memory_max_bytes = instance.settings.memory_max_bytes
        self.table[worker.id] = worker
        slots = self.setup_of(instance, candidate).instances + 1
        messages = max(SLOT_MESSAGES, ARENA_MESSAGES // slots)
        self._around.emit(
            StartWorker(
                worker.id,
                candidate.runtime,
                candidate.gpu_like,
                # What a GPU's driver maps says nothing of memory used: there the guard's samples bound it.
                None if candidate.gpu_like else self.memory_max_bytes(instance.settings),
                messages * self._around.config.limits.message_bytes,
                SLOTS_AT_START,
            )
        )
        return worker

    def memory_max_bytes(self, settings: ModelSettings) -> int:
        """The bound of a model's worker."""
        return settings.memory_max_bytes or self._around.machine.memory_limit_bytes

    # ------------------------------------------------------------------ what they are told

    def load(self, instance: Instance, worker: Worker, known_batch: Mapping[str, Any] | None) -> None:
        """Tells a worker to load the instance that has entered it, and what it need not prove again."""
        spec = {
            **self._what(instance),
            **self._where(self.setup_of(instance, instance.plan[0]), instance.settings),
            "warmup": instance.settings.warmup,
            "timeout_s": self._around.config.loading.timeout_s,
        }
        if instance.sizes:
            spec["shapes"] = instance.sizes.most()
        if instance.never_batched:
            spec["max_batch_size"] = 1
        elif known_batch is not None:
            spec["known_batch"] = known_batch
        self._around.emit(LoadInstance(worker.id, instance.id, spec))

    def measure_spec(
        self,
        instance: Instance,
        setup: Setup,
        *,
        budget_s: float,
        nice: int,
        batches: bool,
        sizes: Mapping[str, Any],
    ) -> dict[str, Any]:
        """What a measurement is told: the instance's model, how it runs, how it might, and at which `sizes`.

        With `batches` each run has the rows that may share one, else a single one.
        """
        current = self.setup_of(instance, instance.plan[0])
        reference, candidate = (
            {**self._where(each, instance.settings), "rows": each.max_batch or 1 if batches else 1}
            for each in (current, setup)
        )
        return {
            **self._what(instance),
            "reference": reference,
            "candidate": candidate,
            "operators_dir": str(self._around.config.server.state_dir / OPERATORS_DIR),
            "budget_s": budget_s,
            "nice": nice,
            **sizes,
        }

    def _what(self, instance: Instance) -> dict[str, Any]:
        """The part of a load that says what: the same for every device."""
        settings = instance.settings
        golden = instance.staged.golden_dir
        return {
            "path": str(instance.staged.model_path),
            "format": instance.entry.format,
            "cache_dir": str(self._around.config.server.cache_dir),
            "content": instance.staged.digest,
            "golden_dir": None if golden is None else str(golden),
            "golden": [{"inputs": dict(g.inputs), "outputs": dict(g.outputs)} for g in settings.golden],
            "tolerance": {"rtol": settings.tolerance.rtol, "atol": settings.tolerance.atol},
            "rows": settings.rows,
            "exact": settings.exact,
            "finite_inputs": settings.finite_inputs,
        }

    def setup_of(self, instance: Instance, candidate: Candidate) -> Setup:
        """How an instance is run on a device: as its settings say, else as was chosen, else by itself."""
        settings, chosen = instance.settings, instance.setup
        if chosen is not None and chosen.candidate != candidate:
            chosen = None
        instances = self._instances(candidate, settings, chosen)
        threads = settings.threads
        if threads is None and chosen is not None and chosen.instances == instances:
            threads = chosen.threads
        batch = settings.max_batch_size or (chosen.max_batch if chosen is not None else 0)
        return Setup(candidate, threads or max(1, self._around.machine.cpus // instances), instances, batch)

    @staticmethod
    def _where(setup: Setup, settings: ModelSettings) -> dict[str, Any]:
        """The part of a load that says where and how."""
        return {
            "runtime": setup.candidate.runtime,
            "device": setup.candidate.device,
            "precision": settings.precision,
            "threads": setup.threads,
            "instances": setup.instances,
            "max_batch_size": setup.max_batch or None,
        }

    def _instances(self, candidate: Candidate, settings: ModelSettings, chosen: Setup | None) -> int:
        """How many runs at once a load is to allow; what shares a process takes its turn there."""
        if self._shares(settings, candidate):
            return 1
        if isinstance(settings.instances, int):
            return settings.instances
        return 1 if chosen is None else chosen.instances

    def remark(self, instance: Instance) -> str:
        """What of an instance's settings is without effect in its worker, for people; mostly nothing."""
        settings, candidate = instance.settings, instance.plan[0]
        wanted = settings.instances
        if not isinstance(wanted, int) or self._instances(candidate, settings, None) == wanted:
            return ""
        why = f"{candidate} runs" if candidate.gpu_like else 'isolation = "shared" means'
        return f"instances = {wanted} has no effect: {why} one thing at a time"

    # ------------------------------------------------------------------ going out

    def unload(self, instance: Instance, now_s: float) -> None:
        """Takes an instance out of its worker."""
        worker = self.of(instance)
        if worker is not None:
            self._around.emit(UnloadInstance(worker.id, instance.id))
        self.leave(instance, now_s)

    def stop_load(self, instance: Instance, now_s: float) -> None:
        """Ends a load that is under way, or done and not used yet; a worker that others share lives on."""
        worker = self.of(instance)
        if worker is None:
            return
        if worker.shared and instance.state is InstanceState.HASHING:
            self._around.emit(UnloadInstance(worker.id, instance.id))
        elif worker.shared:
            self._around.emit(CancelLoad(worker.id, instance.id))
        else:
            self.kill(worker, "superseded", now_s)
        self.leave(instance, now_s)

    def leave(self, instance: Instance, now_s: float) -> None:
        """An instance is no longer in its worker, which ends when it was the last."""
        worker = self.of(instance)
        instance.worker = None
        if worker is None:
            return
        worker.instances.discard(instance.id)
        if worker.instances:
            worker.about.pop(instance.id, None)
        if not worker.instances and worker.kill_at_s is None:
            worker.kill_at_s = now_s + WORKER_END_S
            self._around.emit(EndWorker(worker.id))

    def kill(self, worker: Worker, why: str, now_s: float) -> None:
        """Ends a worker that does not do as it is told; what follows is as after a crash."""
        worker.killed_for = worker.killed_for or why
        worker.kill_at_s = now_s + WORKER_END_S
        self._around.emit(KillWorker(worker.id))

    def gone(self, worker_id: int) -> Worker | None:
        """Takes a worker whose process has ended off the table; None when it was not on it."""
        return self.table.pop(worker_id, None)

    # ------------------------------------------------------------------ memory and time

    def budgets(self) -> dict[int, int]:
        """The memory that each process (by its id at the system) may take, where its model has a bound."""
        return {
            w.pid: w.memory_max_bytes
            for w in self.table.values()
            if w.pid is not None and w.memory_max_bytes is not None
        }

    def on_sampled(self, rss_bytes: Mapping[int, int], over_budget: tuple[int, ...], now_s: float) -> None:
        """The resource guard has looked, and names those that are over their budget."""
        for worker in self.table.values():
            if worker.pid is None:
                continue
            worker.rss_bytes = rss_bytes.get(worker.pid, worker.rss_bytes)
            if worker.pid in over_budget and not worker.killed_for:
                text = f"over its memory budget with {worker.rss_bytes} bytes"
                for about in worker.about.values():
                    fields = {**about, "PID": str(worker.pid), "REASON": text}
                    self._around.emit(Log("worker_over_budget", fields))
                self.kill(worker, text, now_s)

    def tick(self, now_s: float) -> None:
        """Kills those that were asked to exit and did not."""
        for worker in self.table.values():
            if worker.kill_at_s is not None and worker.kill_at_s <= now_s:
                self.kill(worker, "did not exit when asked", now_s)

    def next_due_s(self) -> float | None:
        """When `tick` has something to do, at the earliest."""
        return min((w.kill_at_s for w in self.table.values() if w.kill_at_s is not None), default=None)
