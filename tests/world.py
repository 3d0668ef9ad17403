"""A small simulated world around the core: a folder, a store, workers, devices and time.

It carries out the core's effects as the daemon would, but in one thread and with a clock that the test moves.
What the daemon would hear back waits in a queue for each source; sources are delivered in whatever order the
test wants, each source's own events in their order. Whatever the core may never ask for is an assertion.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from edged.cache import Answer
from edged.catalog import CATALOG, OF_A_MODEL
from edged.config import Config, LimitsConfig, ModelSettings, ServerConfig
from edged.core import Core, Identity
from edged.devices import Candidate
from edged.events import (
    CancelLoad,
    CancelRun,
    CopyHashed,
    CopySetAside,
    Effect,
    EndWorker,
    Event,
    Exit,
    FolderScanned,
    FreeRegion,
    GrantRegion,
    HashCopy,
    InstanceLoaded,
    InstanceLoadFailed,
    InstanceProving,
    Kept,
    KeptSent,
    KillWorker,
    LaneClosed,
    LaneOpened,
    LanePacket,
    LoadInstance,
    LoadPrepared,
    Log,
    Measured,
    PrepareLoad,
    Probe,
    Probed,
    Ready,
    RememberSizes,
    Reply,
    RequestArrived,
    RunDone,
    RunFailed,
    Sampled,
    Scan,
    SendKept,
    SendResult,
    SetAside,
    Stage,
    Staged,
    StageFailed,
    StartMeasure,
    StartRun,
    StartWorker,
    StopMeasure,
    Tick,
    UnloadInstance,
    WorkerGone,
    WorkerHello,
)
from edged.instances import CopyState, Instance, InstanceState, Machine
from edged.messages import InputTensor, LaneRequest, OutputRef, Peer, Request, RequestId, Route
from edged.repository import Entry, FileStamp, Snapshot
from edged.resources import Sample
from edged.scheduler import JobState
from edged.store import Staged as StoredCopy

CPU = Candidate("onnxruntime", "CPU")
OV_CPU = Candidate("openvino", "CPU")
CUDA = Candidate("onnxruntime", "CUDA:0")
GPU = Candidate("openvino", "GPU.0")

PEER = Peer(1000, 1000, 4242)
MIB = 1024 * 1024


def config(**changes: Any) -> Config:
    """A configuration for the simulated machine; keys are fields of `Config`, or of its sections."""
    folder = Path("/nowhere")
    made = Config(
        ServerConfig("ipc:///nowhere/edged.sock", folder / "models", folder / "state", folder / "cache"),
        limits=LimitsConfig(queue_length=8, inflight_per_client=16),
    )
    for key, value in changes.items():
        section, _, name = key.partition("__")
        made = replace(made, **{section: replace(getattr(made, section), **{name: value}) if name else value})
    return made


def sample(free: int = 8 << 30, **changes: Any) -> Sample:
    """The device at ease, with this much memory left."""
    calm = Sample(
        memory_total_bytes=16 << 30,
        memory_available_bytes=free,
        cgroup_limit_bytes=None,
        cgroup_current_bytes=None,
        psi_some_avg10=0.0,
        psi_full_avg10=0.0,
        cpu_percent=1.0,
        load1=0.1,
        cpus=4,
        temperature_c=40.0,
        throttled=False,
        disk_free_bytes=100 << 30,
        supervisor_rss_bytes=40 * MIB,
        workers=(),
    )
    return replace(calm, **changes)


@dataclass
class SimWorker:
    """A worker process as the supervisor sees it."""

    id: int
    runtime: str
    gpu: bool
    slots: int
    alive: bool = True
    loaded: set[int] = field(default_factory=set)
    loading: dict[int, dict[str, Any]] = field(default_factory=dict)
    concurrency: int = 1
    runs: deque[StartRun] = field(default_factory=deque)
    """What it was given and has not ended; the first `concurrency` run, the others wait at its socket."""
    batch_max: dict[int, int] = field(default_factory=dict)
    """What it told of each instance."""
    taken: set[int] = field(default_factory=set)
    """Those that it has begun."""
    outbox: deque[Event] = field(default_factory=deque)


class World:
    """Carries out effects; holds what comes back until it is delivered."""

    def __init__(
        self,
        *,
        verdicts: dict[Candidate, str] | None = None,
        settings: Config | None = None,
        boot: bool = True,
        last_good: Iterable[tuple[Entry, Any]] = (),
    ) -> None:
        self.now_s = 1000.0
        self.core = Core(
            settings or config(),
            machine=Machine("a simulated cpu", 4, 4 << 30),
            identity=Identity("0", "i-1", 1),
            now_s=self.now_s,
        )
        self.registry = self.core.registry
        self.statuses = {CPU: "ok"} if verdicts is None else verdicts
        self.effects: list[Effect] = []
        self.workers: dict[int, SimWorker] = {}
        self.helper: deque[Event] = deque()
        self.hasher: deque[Event] = deque()
        self.damaged: set[str] = set()
        """Digests whose stored copy is rotten."""
        self.unreadable: set[str] = set()
        """Those that cannot be hashed."""
        self.rot_again = False
        """A copy that is made again is rotten as well."""
        self.before: list[tuple[Entry, Any]] = []
        """What the store has of older versions that served."""
        self.hold_hashes = False
        """What the hasher says stays with it."""
        self.probes: deque[Event] = deque()
        self.measures: dict[int, StartMeasure] = {}
        self.scans: list[float] = []
        self.folder: dict[tuple[str, int | None], Entry] = {}
        self.root_id = (1, 1)
        self.fault: str | None = None
        self.versions: dict[str, list[str]] = {}
        self.quarantined: set[str] = set()
        self.served: set[str] = set()
        """Digests that have served in an earlier life."""
        self.interrupted: dict[str, int] = {}
        """How often the daemon ended while it loaded them."""
        self.stage_faults: dict[str, tuple[str, bool]] = {}
        self.choices: dict[str, dict[str, Any]] = {}
        self.sizes: dict[str, list[dict[str, Any]]] = {}
        """What was remembered of requests' sizes, by digest."""
        self.batch_max = 1
        """What workers that load from now on tell of batches."""
        self.instances = 1
        self.batch_times_us: list[list[float]] = []
        """How many runs at once they tell that they execute, if no others share them."""
        self.bad_batches = False
        """Batches come back with outputs that have not a row for each of the inputs'."""
        self.load_crashes = 0
        self.hold_loads = False
        """Loads stay under way until `finish_loads`."""
        self.load_faults: dict[Any, str] = {}
        """Reasons by (name-content digest), by Candidate, or by both."""
        self.exits = 0
        self.readies = 0
        self.asked: Counter[tuple[bytes | int, RequestId]] = Counter()
        self.answers: dict[tuple[bytes | int, RequestId], list[Any]] = {}
        self.lane: int | None = None
        self.leased: list[str] = []
        """The names of regions, in the order in which they were granted."""
        self.memory: set[int] = set()
        """Regions whose memory is there."""
        self._serial = itertools.count(1)
        if boot:
            self.boot(last_good)

    def boot(self, last_good: Iterable[tuple[Entry, Any]] = ()) -> None:
        """What the daemon does when it starts, up to the first scan."""
        self.core.entries.restore(last_good)
        for candidate in self.statuses:
            self.core.placement.probe(candidate)
        self.scans.append(self.now_s)
        self.send(Tick())

    # ------------------------------------------------------------------ the folder

    def entry(self, name: str, content: str = "1", version: int | None = None, **settings: Any) -> Entry:
        """An entry that has rested for long, whose digest is `NAME-CONTENT`."""
        path = f"{name}.onnx" if version is None else f"{name}/{version}/model.onnx"
        form = settings.pop("format", "onnx")
        stamp = FileStamp(path, 1, abs(hash((name, content, version))) % 10**9, 1000, 1, 1)
        made = Entry(name, version, form, path, "", (stamp,), settings=ModelSettings(**settings))
        self.contents[made.files] = f"{name}-{content}"
        return made

    @property
    def contents(self) -> dict[Any, str]:
        """Digests by files."""
        return self.__dict__.setdefault("_contents", {})

    def put(self, name: str, content: str = "1", version: int | None = None, **settings: Any) -> Entry:
        """Drops a model and has the folder looked at soon."""
        made = self.entry(name, content, version, **settings)
        self.folder[made.key] = made
        self.scans.append(self.now_s)
        return made

    def remove(self, name: str, version: int | None = None) -> None:
        """Deletes a model."""
        self.folder.pop((name, version), None)
        self.scans.append(self.now_s)

    def snapshot(self) -> Snapshot:
        """The folder as it is now."""
        if self.fault is not None:
            return Snapshot("/models", self.fault)
        return Snapshot("/models", None, self.root_id, dict(self.folder))

    def copy_of(self, entry: Entry) -> StoredCopy:
        """What the store has of an entry."""
        digest = self.contents.get(entry.files, f"{entry.name}-restored")
        known = self.versions.setdefault(entry.name, [])
        if entry.version is None and digest not in known:
            known.append(digest)
        version = entry.version if entry.version is not None else known.index(digest) + 1
        path = Path("/store") / digest
        good, interrupted = digest in self.served, self.interrupted.get(digest, 0)
        return StoredCopy(digest, path, path / "model.onnx", None, 1000, version, good, interrupted)

    # ------------------------------------------------------------------ events in

    def send(self, event: Event) -> list[Effect]:
        """An event to the core; its effects are carried out and returned."""
        effects = self.core.handle(event, self.now_s)
        self.effects += effects
        for effect in effects:
            self.carry(effect)
        self.check()
        return effects

    def sources(self) -> list[deque[Event]]:
        """Every source that has something to tell."""
        boxes = [w.outbox for w in self.workers.values()]
        hasher = deque() if self.hold_hashes else self.hasher
        return [box for box in (self.helper, hasher, self.probes, *boxes) if box]

    def deliver(self, box: deque[Event]) -> None:
        """The next event of a source."""
        self.send(box.popleft())

    def settle(self) -> None:
        """Delivers everything that is there to be delivered; time stands still."""
        for _ in range(10_000):
            boxes = self.sources()
            if boxes:
                self.deliver(boxes[0])
            elif self.scans and min(self.scans) <= self.now_s:
                self.scan()
            else:
                return
        raise AssertionError("the world does not come to rest")

    def scan(self) -> None:
        """The folder is looked at."""
        self.scans = [at for at in self.scans if at > self.now_s]
        self.send(FolderScanned(self.snapshot(), 1e9))

    def pass_time(self, seconds: float, *, settle: bool = True) -> None:
        """Lets time pass as the daemon does: a tick whenever the core wants one, scans when they are due."""
        end_s = self.now_s + seconds
        for _ in range(10_000):
            if settle:
                self.settle()
            due = [self.core.next_due_s(), min(self.scans, default=None) if settle else None]
            at_s = min([s for s in due if s is not None] + [end_s])
            self.now_s = max(self.now_s, at_s)
            if self.now_s >= end_s:
                self.now_s = end_s
                self.tick()
                if settle:
                    self.settle()
                return
            if settle and any(at <= self.now_s for at in self.scans):
                self.scan()
            self.tick()
        raise AssertionError("the core wants more ticks than any daemon should make")

    def tick(self) -> list[Effect]:
        """A tick; nothing may be due any more right after it."""
        effects = self.send(Tick())
        due_s = self.core.next_due_s()
        assert due_s is None or due_s > self.now_s, f"after a tick the next is due {self.now_s - due_s} s ago"
        return effects

    # ------------------------------------------------------------------ requests

    def request(
        self, method: str, *, client: bytes | int = b"\0c", id: RequestId = None, **fields: Any
    ) -> Any:
        """A call of a method that is answered at once: the reply's header."""
        socket = "admin" if method.startswith(("repository_model", "server_status", "log_")) else "infer"
        event = RequestArrived(route_of(client), socket, PEER, Request(method, id=id, **fields))
        replies = [e for e in self.send(event) if isinstance(e, Reply) and e.header.get("id") == id]
        assert len(replies) == 1, f"{method} was answered {len(replies)} times"
        return replies[0].header

    def infer(
        self,
        model: str = "m",
        *,
        client: bytes | int = b"\0c",
        peer: Peer = PEER,
        version: str = "",
        id: RequestId = None,
        size: int = 2,
        region: str | None = None,
        **parameters: Any,
    ) -> tuple[bytes | int, RequestId]:
        """Sends an inference, over ZeroMQ or by lane; the key under which its answers are listed."""
        key = client, f"r{next(self._serial)}" if id is None else id
        self.asked[key] += 1
        where = {"shared_memory_region": region, "shared_memory_byte_size": 4 * size}
        tensor = InputTensor(
            "x",
            "FP32",
            [size],
            data=None if region else b"\0\0\0\0" * size,
            parameters=where if region else None,
        )
        request = Request(
            "model_infer",
            id=key[1],
            model_name=model,
            model_version=version,
            inputs=[tensor],
            outputs=[OutputRef("y", where)] if region else None,
            parameters=parameters or None,
        )
        self.send(RequestArrived(route_of(client), "infer", peer, request))
        return key

    def connected(self) -> int:
        """The connection to the lease socket, made where there is none."""
        if self.lane is None:
            self.lane = next(self._serial)
            self.send(LaneOpened(self.lane, PEER))
        return self.lane

    def lease(self, nbytes: int = 4096) -> str:
        """Acquires a region; its name."""
        lane = self.connected()
        name = f"{next(self._serial):032x}"
        self.send(LanePacket(lane, PEER, LaneRequest("lease_acquire", byte_size=nbytes), name))
        return name

    def release(self, name: str) -> None:
        """Gives a region back."""
        assert self.lane is not None
        self.send(LanePacket(self.lane, PEER, LaneRequest("lease_release", region=name), ""))

    def hang_up(self) -> None:
        """The connection with the leases ends."""
        if self.lane is not None:
            self.send(LaneClosed(self.lane))
            self.lane = None
            self.leased.clear()

    def answer(self, key: tuple[bytes | int, RequestId]) -> Any:
        """The one answer to a request so far, None while there is none: a reason, or the result."""
        found = self.answers.get(key, [])
        assert len(found) <= 1
        return found[0] if found else None

    # ------------------------------------------------------------------ effects out

    def carry(self, effect: Effect) -> None:
        """As the daemon would."""
        if isinstance(effect, Log):
            check_line(effect)
        act: Callable[[Any], None] | None = getattr(self, f"_on_{type(effect).__name__}", None)
        if act is not None:
            act(effect)

    def _on_Reply(self, e: Reply) -> None:  # noqa: N802 - named after the effect
        key = e.route[0], e.header.get("id")
        if key in self.asked:
            self.answers.setdefault(key, []).append(e.header["error"]["reason"])

    def _on_SendResult(self, e: SendResult) -> None:  # noqa: N802 - named after the effect
        self.answers.setdefault((e.job.route[0], e.job.request_id), []).append(e)

        if e.job.keep is not None:
            outputs = tuple((name, kind, shape, b"\1" * nbytes) for name, kind, shape, _, nbytes in e.outputs)
            answer = Answer(outputs, {"device": e.parameters["device"]})
            self.helper.append(Kept(e.job.instance, e.job.keep, answer, 1000))

    def _on_SendKept(self, e: SendKept) -> None:  # noqa: N802 - named after the effect
        self.answers.setdefault((e.route[0], e.request_id), []).append(e)
        self.helper.append(KeptSent(e.instance, e.rows, 1000))

    def _on_GrantRegion(self, e: GrantRegion) -> None:  # noqa: N802 - named after the effect
        assert e.region not in self.memory
        self.memory.add(e.region)
        self.leased.append(e.name)

    def _on_FreeRegion(self, e: FreeRegion) -> None:  # noqa: N802 - named after the effect
        self.memory.remove(e.region)
        used = [job.regions for run in self.core.runs.table.values() for job in run.jobs]
        assert not any(e.region in regions for regions in used), "memory was let go of under a run"

    def _on_Scan(self, e: Scan) -> None:  # noqa: N802 - named after the effect
        self.scans.append(self.now_s + e.after_s)

    def _on_Stage(self, e: Stage) -> None:  # noqa: N802 - named after the effect
        assert e.entry.problem is None
        copy = self.copy_of(e.entry)
        fault = self.stage_faults.get(copy.digest)
        if fault is not None:
            self.helper.append(StageFailed(e.entry, fault[0], "a fault of the store", fault[1]))
        else:
            self.helper.append(Staged(e.entry, copy, copy.digest in self.quarantined))

    def _on_PrepareLoad(self, e: PrepareLoad) -> None:  # noqa: N802 - named after the effect
        self.helper.append(LoadPrepared(e.instance, self.choices.get(e.digest), self.sizes.get(e.digest)))

    def _on_RememberSizes(self, e: RememberSizes) -> None:  # noqa: N802 - named after the effect
        self.sizes[e.digest] = e.sizes

    def _on_HashCopy(self, e: HashCopy) -> None:  # noqa: N802 - named after the effect
        if e.digest in self.damaged:
            self.hasher.append(CopyHashed(e.instance, "COPY_DAMAGED", "model.onnx has other bytes"))
        elif e.digest in self.unreadable:
            self.hasher.append(CopyHashed(e.instance, "COPY_UNREADABLE", "Too many open files"))
        else:
            self.hasher.append(CopyHashed(e.instance))

    def _on_SetAside(self, e: SetAside) -> None:  # noqa: N802 - named after the effect
        assert e.digest in self.damaged, "a sound copy was set aside"
        if not self.rot_again:
            self.damaged.discard(e.digest)
        before = [(entry, copy) for entry, copy in self.before if copy.digest != e.digest]
        self.helper.append(CopySetAside(e.digest, before))

    def _on_StartWorker(self, e: StartWorker) -> None:  # noqa: N802 - named after the effect
        assert e.worker not in self.workers
        worker = self.workers[e.worker] = SimWorker(e.worker, e.runtime, e.gpu, e.slots)
        worker.outbox.append(WorkerHello(e.worker, 100 + e.worker))

    def _on_LoadInstance(self, e: LoadInstance) -> None:  # noqa: N802 - named after the effect
        worker = self.workers[e.worker]
        assert worker.runtime == e.spec["runtime"]
        if worker.alive:
            worker.loading[e.instance] = e.spec
            if not self.hold_loads:
                self.finish_load(worker, e.instance)

    def finish_load(self, worker: SimWorker, instance: int) -> None:
        """A load ends, as `load_faults` says."""
        spec = worker.loading.pop(instance)
        digest = Path(spec["path"]).parent.name
        where = Candidate(spec["runtime"], spec["device"])
        fault = next(
            (self.load_faults[k] for k in ((digest, where), digest, where) if k in self.load_faults), ""
        )
        if fault == "PROVED" or (fault == "PROVING" and spec["max_batch_size"] != 1):
            worker.outbox.append(InstanceProving(worker.id, instance))
            self.crash(worker, "killed by SIGFPE")
        elif fault == "PROVING":
            worker.loaded.add(instance)
            worker.outbox.append(InstanceLoaded(worker.id, instance, info_of(spec)))
        elif fault == "CRASH":
            self.crash(worker)
        elif fault:
            text = f"{digest} on {where}: {fault}"
            worker.outbox.append(InstanceLoadFailed(worker.id, instance, "UNAVAILABLE", fault, text))
        else:
            worker.loaded.add(instance)
            alone = not self.core.workers.table[worker.id].shared
            wanted = max(self.instances, spec["instances"])
            if alone and wanted > worker.concurrency:
                worker.concurrency, worker.slots = wanted, wanted + 1
            worker.batch_max[instance] = self.batch_max
            info = info_of(spec, batch_max=self.batch_max, instances=worker.concurrency)
            info["batch"]["times_us"] = self.batch_times_us
            worker.outbox.append(InstanceLoaded(worker.id, instance, info))

    def finish_loads(self) -> None:
        """All loads under way end."""
        for worker in list(self.workers.values()):
            for instance in list(worker.loading):
                if instance in worker.loading:
                    self.finish_load(worker, instance)

    def _on_CancelLoad(self, e: CancelLoad) -> None:  # noqa: N802 - named after the effect
        worker = self.workers[e.worker]
        if worker.loading.pop(e.instance, None) is not None:
            failed = InstanceLoadFailed(e.worker, e.instance, "CANCELLED", "LOAD_CANCELLED", "cancelled")
            worker.outbox.append(failed)

    def _on_UnloadInstance(self, e: UnloadInstance) -> None:  # noqa: N802 - named after the effect
        if e.worker in self.workers:
            self.workers[e.worker].loaded.discard(e.instance)

    def _on_StartRun(self, e: StartRun) -> None:  # noqa: N802 - named after the effect
        worker = self.workers[e.worker]
        assert e.instance in worker.loaded or not worker.alive, "a run of what is not loaded"
        assert self.registry.instances[e.instance].copy is CopyState.SOUND, "a run of what may be rotten"
        assert 0 <= e.slot < worker.slots
        assert e.slot not in [run.slot for run in worker.runs], "a slot was used twice"
        assert all(job.inputs for job in e.jobs), "a run lost its inputs"
        parts = [t.part for job in e.jobs for t in job.inputs if t.part is not None]
        parts += [part for job in e.jobs for part in (job.into or {}).values()]
        assert {part.region for part in parts} <= self.memory, "a run without its memory"
        assert len(worker.runs) <= worker.concurrency, "more at once than one waiting at the socket"
        assert all(job.state is JobState.RUNNING and job.instance == e.instance for job in e.jobs)
        assert e.deadline_s == max(job.deadline_s for job in e.jobs) > self.now_s, "an expired run"
        assert e.rows == sum(job.rows for job in e.jobs)
        if len(e.jobs) > 1:
            assert e.rows <= worker.batch_max[e.instance]
            assert not any(job.into for job in e.jobs)
            assert len({(job.inputs[0].name, *job.inputs[0].shape[1:]) for job in e.jobs}) == 1
        worker.runs.append(e)
        self.take_runs(worker)

    def take_runs(self, worker: SimWorker) -> None:
        """The worker takes what waits at its socket while it can; what nobody wants any more it refuses."""
        for run in list(worker.runs):
            if len(worker.taken) >= worker.concurrency:
                return
            if run.run_id in worker.taken:
                continue
            if run.deadline_s <= self.now_s:
                worker.runs.remove(run)
                failed = RunFailed(worker.id, run.run_id, "DEADLINE_EXCEEDED", "DEADLINE_PASSED", "too late")
                worker.outbox.append(failed)
            else:
                worker.taken.add(run.run_id)

    def _on_CancelRun(self, e: CancelRun) -> None:  # noqa: N802 - named after the effect
        assert e.worker in self.workers

    def finish_run(self, worker: SimWorker, *, fails: bool = False) -> None:
        """The oldest run of a worker ends."""
        if not worker.alive or not worker.runs:
            return
        run = worker.runs.popleft()
        worker.taken.discard(run.run_id)
        if fails:
            worker.outbox.append(RunFailed(worker.id, run.run_id, "INTERNAL", "RUNTIME_ERROR", "a fault"))
        else:
            rows = run.rows + (self.bad_batches and len(run.jobs) > 1)
            outputs = [["y", "FP32", [rows], 64, 4 * rows]]
            worker.outbox.append(RunDone(worker.id, run.run_id, outputs, 500_000))
        self.take_runs(worker)

    def finish_runs(self) -> None:
        """Every run ends, and those that follow too."""
        while any(w.runs and w.alive for w in self.workers.values()):
            for worker in list(self.workers.values()):
                self.finish_run(worker)
            self.settle()

    def crash(self, worker: SimWorker, how: str = "killed by SIGSEGV") -> None:
        """A worker's process ends; that is told after whatever it has said before."""
        if worker.alive:
            worker.alive = False
            worker.loading.clear()
            worker.outbox.append(WorkerGone(worker.id, how))

    def _on_EndWorker(self, e: EndWorker) -> None:  # noqa: N802 - named after the effect
        self.crash(self.workers[e.worker], "exit 0")

    def _on_KillWorker(self, e: KillWorker) -> None:  # noqa: N802 - named after the effect
        self.crash(self.workers[e.worker], "killed by SIGKILL")

    def _on_Probe(self, e: Probe) -> None:  # noqa: N802 - named after the effect
        status = self.statuses[Candidate(e.runtime, e.device)]
        verdict = {"runtime": e.runtime, "device": e.device, "status": status, "runtime_version": "1.0"}
        if status != "ok":
            verdict["hint"] = f"a hint about {e.device}"
        self.probes.append(Probed(verdict))

    def _on_StartMeasure(self, e: StartMeasure) -> None:  # noqa: N802 - named after the effect
        assert not self.measures, "two measurements at once"
        self.measures[e.measure] = e

    def _on_StopMeasure(self, e: StopMeasure) -> None:  # noqa: N802 - named after the effect
        self.measures.pop(e.measure, None)

    def measured(self, **result: Any) -> None:
        """The measurement under way ends with this result."""
        (measure,) = self.measures
        del self.measures[measure]
        self.send(Measured(measure, result))
        self.settle()

    def _on_Ready(self, e: Ready) -> None:  # noqa: N802 - named after the effect
        self.readies += 1
        assert self.readies == 1

    def _on_Exit(self, e: Exit) -> None:  # noqa: N802 - named after the effect
        self.exits += 1

    # ------------------------------------------------------------------ what must always hold

    def check(self) -> None:
        """The invariants of the core's tables."""
        core, registry = self.core, self.registry
        for worker in core.workers.table.values():
            assert worker.instances <= set(registry.instances), "a worker has an instance that is gone"
            out = [run for run in core.runs.table.values() if run.worker is worker]
            assert worker.runs == [run.id for run in out]
            slots = sorted([*worker.free_slots, *[run.slot for run in out]])
            assert slots == list(range(worker.concurrency + 1)), "a slot leaked"
        for instance in registry.instances.values():
            worker_of = core.workers.of(instance)
            assert instance.worker is None or worker_of is None or instance.id in worker_of.instances
            holders = [t for t in registry.tracks.values() if instance in t.instances()]
            assert len(holders) <= 1
            assert holders or instance.state is InstanceState.DRAINING, f"{instance} belongs to nobody"
            assert instance.state is not InstanceState.GONE
            assert instance.state is not InstanceState.READY or instance.copy is CopyState.SOUND
            assert (instance.outcome is not None) == (instance.state is InstanceState.HASHING)
        for track in registry.tracks.values():
            if track.incoming is not None:
                waiting = track.incoming in core.lifecycle.turns.queue
                assert waiting == (track.incoming.state is InstanceState.WAITING)
        in_flight = sum(1 for key, n in self.asked.items() if n > len(self.answers.get(key, ())))
        assert core.scheduler.in_flight == in_flight

    def serving(self, name: str = "m", version: int | None = None) -> Instance:
        """The instance that serves an entry."""
        instance = self.registry.tracks[name, version].serving
        assert instance is not None
        return instance

    def process(self, name: str = "m", version: int | None = None) -> SimWorker:
        """The process that an entry's serving instance is in."""
        worker = self.serving(name, version).worker
        assert worker is not None
        return self.workers[worker]

    def logs(self, kind: str) -> list[dict[str, Any]]:
        """The fields of every line of a kind."""
        return [e.fields for e in self.effects if isinstance(e, Log) and e.kind == kind]

    def loads(self) -> list[Candidate]:
        """Where loads were begun, in order."""
        return [
            Candidate(e.spec["runtime"], e.spec["device"])
            for e in self.effects
            if isinstance(e, LoadInstance)
        ]

    def reasons(self) -> dict[tuple[str, str], str]:
        """State by name and version, as `repository_index` tells it."""
        return {(r["name"], r["version"]): r["state"] for r in self.request("repository_index")["models"]}


def route_of(client: bytes | int) -> Route:
    """Where a client's replies go."""
    return (client,) if isinstance(client, int) else (client, b"")


def check_line(line: Log) -> None:
    """A line of the log has what its kind promises: its model, and the fields that are explained."""
    explained = CATALOG[line.kind].explain
    # Words in capitals are names of fields, but for reasons, levels and states that clients see.
    others = {"UNAVAILABLE", "MODEL_LOADING", "MODEL_UNLOADED", "WORKER_CRASHED", "INTERNAL"}
    others |= {"WARN", "REFUSE_LOADS", "SHRINK", "SHED"}
    promised = set(re.findall(r"\b[A-Z][A-Z_]{2,}\b", explained)) - others
    if line.kind in OF_A_MODEL:
        promised.add("MODEL")
    assert promised <= {name for name, value in line.fields.items() if value is not None}, line


def info_of(spec: dict[str, Any], *, batch_max: int = 1, instances: int = 1) -> dict[str, Any]:
    """What a worker tells about what it has loaded."""
    return {
        "instances": instances,
        "batch": {"max": batch_max, "times_us": [], "why": ""},
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1]}],
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1]}],
        "metadata": msgspec.msgpack.encode({"author": "nobody"}),
        "device": spec["device"],
        "runtime": spec["runtime"],
        "runtime_version": "1.0",
        "precision": spec["precision"],
        "threads": spec["threads"],
        "load_ms": 5,
        "warmup_ms": 1,
        "golden": 0,
        "rss_bytes": 50 * MIB,
        "fallback_reason": None,
    }


__all__ = ["CPU", "CUDA", "GPU", "MIB", "OV_CPU", "PEER", "Sampled", "World", "config", "info_of", "sample"]
