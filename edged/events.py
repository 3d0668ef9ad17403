"""What goes into the core and what comes out of it.

Events are what happened (a request arrived, a worker died, a minute passed); effects are what the daemon
is to do about it (send, start, stage, log). Both are plain frozen values, so a test can write a whole day as
a list of the first and read off the second.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from edged.cache import Answer, Keep
from edged.config import Config
from edged.errors import EdgedError
from edged.messages import LaneRequest, Peer, RegionPart, Request, RequestId, Route, TensorData
from edged.repository import Entry, Snapshot
from edged.resources import Sample
from edged.scheduler import Job
from edged.wire import Output

__all__ = [
    "BadMessage",
    "CancelLoad",
    "CancelRun",
    "Collect",
    "ConfigChanged",
    "CopyHashed",
    "CopySetAside",
    "DevicesChanged",
    "Effect",
    "EndAttempt",
    "EndWorker",
    "Event",
    "Exit",
    "FolderScanned",
    "ForgetModel",
    "FreeRegion",
    "GrantRegion",
    "HashCopy",
    "InstanceLoadFailed",
    "InstanceLoaded",
    "InstanceProving",
    "Kept",
    "KeptSent",
    "KillWorker",
    "LandReply",
    "LaneClosed",
    "LaneOpened",
    "LanePacket",
    "LoadInstance",
    "LoadPrepared",
    "Log",
    "MarkGood",
    "Measured",
    "PrepareLoad",
    "Probe",
    "Probed",
    "Publish",
    "Ready",
    "RegionFailed",
    "RememberChoice",
    "RememberSizes",
    "RememberVerdict",
    "Reply",
    "RequestArrived",
    "RunDone",
    "RunFailed",
    "Sampled",
    "Scan",
    "SendKept",
    "SendResult",
    "SetAside",
    "SetLogLevel",
    "ShrinkWorkers",
    "ShutdownAsked",
    "Stage",
    "StageFailed",
    "Staged",
    "StartMeasure",
    "StartRun",
    "StartWorker",
    "StopMeasure",
    "Tick",
    "UnloadInstance",
    "Unsent",
    "WorkerGone",
    "WorkerHello",
]


class Event(msgspec.Struct, frozen=True):
    """Something that happened."""


class RequestArrived(Event, frozen=True):
    """A message that the wire accepted."""

    route: Route
    socket: str
    peer: Peer
    request: Request
    frames: Sequence[memoryview] = ()


class BadMessage(Event, frozen=True):
    """A message that the wire refused."""

    route: Route
    socket: str
    peer: Peer
    request_id: RequestId
    error: EdgedError


class LaneOpened(Event, frozen=True):
    """A peer connected to the lease socket."""

    connection: int
    peer: Peer


class LanePacket(Event, frozen=True):
    """A request for memory on the lease socket; `fresh_name` is a random name for what it may ask for."""

    connection: int
    peer: Peer
    request: LaneRequest
    fresh_name: str


class RegionFailed(Event, frozen=True):
    """A region's memory could not be made."""

    connection: int
    request_id: RequestId
    name: str
    why: str


class LaneClosed(Event, frozen=True):
    """A connection to the lease socket is gone, and its leases with it."""

    connection: int


class RunDone(Event, frozen=True):
    """A worker has finished a run; `outputs` are its descriptors, in the arena's slot."""

    worker: int
    run_id: int
    outputs: list[Any]
    compute_ns: int


class Kept(Event, frozen=True):
    """The outputs of a run, copied out of its slot to be kept; that took `ns`."""

    instance: int
    keep: Keep
    answer: Answer
    ns: int


class KeptSent(Event, frozen=True):
    """A kept answer was sent, `ns` after its question came."""

    instance: int
    rows: int
    ns: int


Counted = tuple[int, int, int, int]
"""What the statistics were told of an answer: rows, and nanoseconds in the queue, in the run and in all."""


class Unsent(Event, frozen=True):
    """An inference's outputs could not be sent: its client gets the error. `counted` if as a success."""

    route: Route
    request_id: RequestId
    instance: int
    arrived_s: float
    error: EdgedError
    counted: Counted | None = None


class RunFailed(Event, frozen=True):
    """A worker could not finish a run."""

    worker: int
    run_id: int
    code: str
    reason: str
    message: str


class WorkerHello(Event, frozen=True):
    """A worker is up."""

    worker: int
    pid: int


class InstanceProving(Event, frozen=True):
    """A worker has loaded and warmed up an instance; what it does now is to try batches."""

    worker: int
    instance: int


class InstanceLoaded(Event, frozen=True):
    """A worker has loaded, warmed up and proved an instance."""

    worker: int
    instance: int
    info: dict[str, Any]


class InstanceLoadFailed(Event, frozen=True):
    """A worker could not load an instance."""

    worker: int
    instance: int
    code: str
    reason: str
    message: str


class WorkerGone(Event, frozen=True):
    """A worker's process has ended; `how` says how: `exit 0`, `killed by SIGSEGV`."""

    worker: int
    how: str


class FolderScanned(Event, frozen=True):
    """The models folder was looked at, at `wall_s` seconds since the epoch."""

    snapshot: Snapshot
    wall_s: float


class Staged(Event, frozen=True):
    """A private copy of an entry is in the store; `version` is its number, `quarantined` its record."""

    entry: Entry
    staged: Any
    quarantined: bool


class StageFailed(Event, frozen=True):
    """An entry could not be copied; `again` when it makes sense to look again by itself."""

    entry: Entry
    reason: str
    message: str
    again: bool


class LoadPrepared(Event, frozen=True):
    """The attempt to load is on record; `choice` is what was remembered for this content here.

    `sizes` are those of its requests, as `SizeTable.to_save` gives them.
    """

    instance: int
    choice: dict[str, Any] | None
    sizes: Any = None


class CopyHashed(Event, frozen=True):
    """The stored copy that an instance is loaded from was read; an empty `reason` says that it is sound.

    COPY_DAMAGED: its bytes are not what they were. COPY_UNREADABLE: that could not be found out.
    """

    instance: int
    reason: str = ""
    message: str = ""


class CopySetAside(Event, frozen=True):
    """A damaged copy is out of use; `before` has what the models that had it served before it."""

    digest: str
    before: Sequence[tuple[Entry, Any]] = ()


class Probed(Event, frozen=True):
    """A device's verdict."""

    verdict: Mapping[str, Any]


class Measured(Event, frozen=True):
    """A measurement ended; `result` is None when its worker died (`how`) or was stopped."""

    measure: int
    result: dict[str, Any] | None
    how: str = ""


class Sampled(Event, frozen=True):
    """The resource guard's sample; `pressed` if the system has asked for memory back since the last."""

    sample: Sample
    pressed: bool = False


class DevicesChanged(Event, frozen=True):
    """Device nodes came or went, or the machine slept: verdicts may be stale."""


class Tick(Event, frozen=True):
    """Time has passed."""


class ConfigChanged(Event, frozen=True):
    """A new configuration was read and checked; what needs a restart is in it as it was."""

    config: Config
    memory_limit_bytes: int | None = None
    """What `resources.memory` comes to on this machine; None leaves it as it is."""


class ShutdownAsked(Event, frozen=True):
    """SIGTERM or SIGINT."""


class Effect(msgspec.Struct, frozen=True):
    """Something to do."""


class Reply(Effect, frozen=True):
    """Send a header."""

    route: Route
    socket: str
    header: dict[str, Any]


class LandReply(Effect, frozen=True):
    """Write a reply into leased memory, and send the header that tells of it."""

    route: Route
    socket: str
    part: RegionPart
    raw: bytes
    header: dict[str, Any]


class SendResult(Effect, frozen=True):
    """Send an inference's outputs, which lie in the worker's slot."""

    job: Job
    name: str
    version: str
    worker: int
    slot: int
    outputs: list[Any]
    parameters: dict[str, Any]
    counted: Counted


class SendKept(Effect, frozen=True):
    """Send an answer that was kept."""

    route: Route
    request_id: RequestId
    instance: int
    name: str
    version: str
    rows: int
    outputs: tuple[Output, ...]
    parameters: dict[str, Any]
    arrived_s: float


class StartRun(Effect, frozen=True):
    """Put the jobs' inputs into a slot, row below row where there are several, and tell the worker to run.

    Several jobs have the same inputs but for their first dimension, whose sum is `rows`, and the same wanted
    `outputs`, and none has its outputs in leased memory. At `deadline_s` (infinite: never) nobody wants the
    run any more.
    """

    worker: int
    run_id: int
    instance: int
    slot: int
    jobs: list[Job]
    rows: int
    deadline_s: float


class GrantRegion(Effect, frozen=True):
    """Make a region's memory and hand it out, as the answer to who asked for it."""

    connection: int
    request_id: RequestId
    region: int
    name: str
    nbytes: int


class FreeRegion(Effect, frozen=True):
    """Nobody uses this region any more: let go of its memory."""

    region: int


class CancelRun(Effect, frozen=True):
    """Ask the runtime to stop."""

    worker: int
    run_id: int


class StartWorker(Effect, frozen=True):
    """Start a process for a runtime."""

    worker: int
    runtime: str
    gpu: bool
    data_bytes: int | None
    file_bytes: int
    slots: int


class LoadInstance(Effect, frozen=True):
    """Tell a worker to load."""

    worker: int
    instance: int
    spec: dict[str, Any]


class CancelLoad(Effect, frozen=True):
    """Tell a worker to stop loading."""

    worker: int
    instance: int


class UnloadInstance(Effect, frozen=True):
    """Tell a worker to forget an instance."""

    worker: int
    instance: int


class EndWorker(Effect, frozen=True):
    """Tell a worker to exit."""

    worker: int


class KillWorker(Effect, frozen=True):
    """SIGKILL."""

    worker: int


class ShrinkWorkers(Effect, frozen=True):
    """Ask every worker to give memory back, and shrink the arenas."""


class Stage(Effect, frozen=True):
    """Copy an entry into the store."""

    entry: Entry


class PrepareLoad(Effect, frozen=True):
    """Record the attempt and look up what was remembered."""

    instance: int
    digest: str
    choice_key: str


class HashCopy(Effect, frozen=True):
    """Find out whether the stored copy that an instance is loaded from is sound."""

    instance: int
    digest: str
    size_bytes: int


class SetAside(Effect, frozen=True):
    """Take a damaged copy out of use, and say what there is in its place."""

    digest: str


class EndAttempt(Effect, frozen=True):
    """The attempt did not take the machine down."""

    digest: str


class MarkGood(Effect, frozen=True):
    """This content served: remember it as the last good."""

    entry: Entry
    staged: Any


class ForgetModel(Effect, frozen=True):
    """The entry was deleted from a healthy folder."""

    name: str
    version: int | None


class RememberChoice(Effect, frozen=True):
    """Keep a measured choice in the state directory."""

    key: str
    choice: dict[str, Any]


class RememberSizes(Effect, frozen=True):
    """Keep the sizes that a content's requests had, when the disk has nothing else to do."""

    digest: str
    sizes: list[dict[str, Any]]


class RememberVerdict(Effect, frozen=True):
    """Keep what a probe found out for the next start; None when it is not to be relied upon."""

    runtime: str
    device: str
    verdict: dict[str, str] | None


class Collect(Effect, frozen=True):
    """Evict from the store what nobody needs."""

    in_use: frozenset[str]


class Scan(Effect, frozen=True):
    """Look at the models folder, after a delay."""

    after_s: float


class Probe(Effect, frozen=True):
    """Probe a device in a child."""

    runtime: str
    device: str


class StartMeasure(Effect, frozen=True):
    """Measure a candidate against the reference, in a worker of its own."""

    measure: int
    spec: dict[str, Any]
    data_bytes: int | None
    inputs: tuple[TensorData, ...] = ()
    """What the owner wants it measured with."""


class StopMeasure(Effect, frozen=True):
    """The device is needed: stop measuring."""

    measure: int


class Publish(Effect, frozen=True):
    """An event for subscribers."""

    topic: str
    payload: dict[str, Any]


class Log(Effect, frozen=True):
    """A line for the journal; `kind` is a key of its catalog."""

    kind: str
    fields: dict[str, Any] = {}


class SetLogLevel(Effect, frozen=True):
    """From `log_settings`."""

    level: str


class Ready(Effect, frozen=True):
    """The first scan's models are settled, or `startup_wait` is over."""


class Exit(Effect, frozen=True):
    """Everything is answered: leave the loop."""
