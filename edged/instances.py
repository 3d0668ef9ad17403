"""What the deciding modules share: tracks, instances, workers, the table of an instance's states.

Pure data with its own small questions. The words:

- A *track* is what one entry of the folder stands for, for as long as the entry is there. It points to the
  instance that serves and, beside it, to the one that is on its way in.
- An *instance* is one content, under one set of settings, on one device. It lives by the table `MOVES`; every
  state carries a reason.
- A *worker* is a process. CPU instances have one each; GPU-like devices, and models that ask for it, share.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from edged import resources
from edged.config import Config, ModelSettings
from edged.devices import Candidate
from edged.errors import EdgedError
from edged.estimate import RunTimes
from edged.events import Effect, Publish
from edged.repository import Entry
from edged.setups import Setup
from edged.sizes import SizeTable, have_free
from edged.statistics import ModelStatistics
from edged.tensors import TensorSpec

__all__ = [
    "LOADS",
    "MOVES",
    "SLOTS_AT_START",
    "CopyState",
    "Failure",
    "Hooks",
    "Instance",
    "InstanceState",
    "Machine",
    "Surroundings",
    "Track",
    "Worker",
    "state_event",
]

SLOTS_AT_START = 2
"""Of a worker that runs one thing at a time: one more may wait at its socket, so that it never idles."""

BACKOFF_FIRST_S, BACKOFF_MAX_S = 0.5, 60.0
"""The pause before a restart: none after the first crash, then doubling."""

BACKOFF_DOUBLINGS_MAX = 10
"""More than it takes to the longest pause; a worker that crashes for days must not overflow the figure."""


class CopyState(enum.Enum):
    """What is known of the stored copy that an instance is loaded from, in this load of it."""

    UNKNOWN = "not looked at"
    HASHING = "being hashed"
    SOUND = "as it was stored"


class InstanceState(enum.Enum):
    """Where an instance is on its way."""

    WAITING = "waiting for its turn to load"
    PREPARING = "about to load"
    LOADING = "loading"
    HASHING = "its load has ended; its stored copy is still being hashed"
    READY = "ready"
    RESTARTING = "restarting"
    DRAINING = "finishing its last requests"
    FAILED = "failed"
    GONE = "gone"


_S = InstanceState
MOVES: dict[InstanceState, frozenset[InstanceState]] = {
    _S.WAITING: frozenset({_S.PREPARING, _S.FAILED, _S.GONE}),
    _S.PREPARING: frozenset({_S.LOADING, _S.FAILED, _S.GONE}),
    _S.LOADING: frozenset({_S.LOADING, _S.HASHING, _S.READY, _S.RESTARTING, _S.FAILED, _S.DRAINING, _S.GONE}),
    _S.HASHING: frozenset({_S.LOADING, _S.HASHING, _S.READY, _S.RESTARTING, _S.FAILED, _S.DRAINING, _S.GONE}),
    _S.READY: frozenset({_S.RESTARTING, _S.DRAINING}),
    _S.RESTARTING: frozenset({_S.LOADING, _S.RESTARTING, _S.DRAINING}),
    _S.DRAINING: frozenset({_S.GONE}),
    _S.FAILED: frozenset({_S.GONE}),
    _S.GONE: frozenset(),
}
"""The state table; a move that is not in it is a bug."""

LOADS = frozenset({_S.LOADING, _S.HASHING})
"""On the way from a worker's start to READY, whatever is still missing."""

_OIP_STATE = {
    _S.WAITING: "LOADING",
    _S.PREPARING: "LOADING",
    _S.LOADING: "LOADING",
    _S.HASHING: "LOADING",
    _S.READY: "READY",
    _S.RESTARTING: "UNAVAILABLE",
    _S.DRAINING: "UNLOADING",
    _S.FAILED: "UNAVAILABLE",
    _S.GONE: "UNAVAILABLE",
}


@dataclass(frozen=True)
class Machine:
    """What the choice of a device depends on, beside the devices."""

    name: str
    cpus: int
    memory_limit_bytes: int
    operators: str = ""
    """What the tables of operators are known by, by which a model may be moved."""


@dataclass(eq=False)
class Surroundings:
    """What each deciding module is given: the settings in force, the machine, and where effects go."""

    config: Config
    machine: Machine
    emit: Callable[[Effect], None]
    guard: resources.Verdict | None = None
    """The resource guard's last word."""


class Hooks(Protocol):
    """What the core does for those that move instances: it has the requests."""

    def busy(self, instance: Instance) -> bool:
        """Whether jobs wait or run for it."""

    def flush(self, instance: Instance, error: EdgedError) -> None:
        """Answers everything that waits for it."""

    def forget(self, instance: Instance) -> None:
        """It is gone; nothing waits for it any more."""


@dataclass(frozen=True)
class Failure:
    """Why a content does not serve."""

    reason: str
    message: str
    digest: str = ""
    version: int | None = None
    settings: ModelSettings | None = None

    def is_of(self, entry: Entry, staged: Any) -> bool:
        """Whether it was this content, under these settings, that failed."""
        return bool(self.digest == staged.digest and self.settings == entry.settings)


@dataclass(eq=False)
class Worker:
    """A process that runs instances."""

    id: int
    runtime: str
    device: str
    shared: bool
    instances: set[int] = field(default_factory=set)
    about: dict[int, dict[str, str]] = field(default_factory=dict)
    """What a line of the log about it says of each instance in it, and when it is empty of the last one."""
    concurrency: int = 1
    """How many runs it executes at once; it has one slot more than that."""
    free_slots: list[int] = field(default_factory=lambda: list(range(SLOTS_AT_START)))
    runs: list[int] = field(default_factory=list)
    """What it was given and has not finished, the oldest first; the first `concurrency` may be running."""
    pid: int | None = None
    rss_bytes: int = 0
    memory_max_bytes: int | None = None
    kill_at_s: float | None = None
    """Set when it was asked to exit."""
    killed_for: str = ""
    """Why the daemon itself killed it."""

    def widen(self, concurrency: int) -> None:
        """It has told that it executes this many runs at once; it never takes that back."""
        if concurrency > self.concurrency:
            self.free_slots += range(self.concurrency + 1, concurrency + 1)
            self.concurrency = concurrency


@dataclass(eq=False)
class Instance:
    """One content under one set of settings."""

    id: int
    track: Track
    entry: Entry
    staged: Any
    settings: ModelSettings
    state: InstanceState = InstanceState.WAITING
    reason: str = ""
    message: str = ""
    setup: Setup | None = None
    """How it is to be run, as was measured, remembered or inherited; it holds on its own device."""
    choice: str = "default"
    settled: bool = False
    """Nothing is left to be measured."""
    plan: tuple[Candidate, ...] = ()
    fallback_reason: str = ""
    errors: list[tuple[Candidate, str, str]] = field(default_factory=list)
    worker: int | None = None
    info: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, TensorSpec] = field(default_factory=dict)
    outputs: dict[str, TensorSpec] = field(default_factory=dict)
    required: frozenset[str] = frozenset()
    stats: ModelStatistics = field(default_factory=ModelStatistics)
    times: RunTimes = field(default_factory=RunTimes)
    batch_max: int = 1
    """Rows of different requests that may share a run; 1 where they must not."""
    proving: int | None = None
    """The worker that has loaded it and tries batches."""
    copy: CopyState = CopyState.UNKNOWN
    outcome: dict[str, Any] | tuple[str, str] | None = None
    """How its load ended, while its copy is still being hashed: its worker's word, or reason and message."""
    record: Mapping[str, Any] = field(default_factory=dict)
    """What is remembered of its content on this machine: the choice, and what was proved about batches."""
    never_batched: str = ""
    """Why batches are not tried any more."""
    hold_s: float = 0.0
    """How long a free slot waits for a batch to fill."""
    restarts: int = 0
    crashes: int = 0
    """Since it last was stable."""
    due_s: float | None = None
    """The time of the next step: a load's limit, a restart, the end of draining."""
    ready_s: float = 0.0
    load_started_s: float = 0.0
    measured: dict[Setup, dict[str, Any]] = field(default_factory=dict)
    """The measurers' results."""
    sizes: SizeTable | None = field(default_factory=SizeTable)
    """The sizes that its requests had; None where the model leaves none open."""
    measured_shapes: list[dict[str, list[int]]] = field(default_factory=list)
    """Those that its requests had when its first setup was measured: the others are at the same."""
    makes_room: bool = False
    """The version before was ended for its sake: it waits for no more memory."""

    @property
    def name(self) -> str:
        return self.track.name

    @property
    def version(self) -> int:
        version: int = self.staged.version
        return version

    @property
    def candidate(self) -> Candidate | None:
        """Where it runs, or is being loaded."""
        return self.plan[0] if self.plan else None

    @property
    def admits(self) -> bool:
        """Whether a request may be queued for it: it serves, or will again in moments."""
        if self.state is InstanceState.READY:
            return True
        returns = self.state is _S.RESTARTING or self.state in LOADS
        return self.track.serving is self and self.crashes <= 1 and returns

    @property
    def pinned(self) -> bool:
        """Whether its owner has said where it is to run."""
        return self.settings.runtime is not None or self.settings.device != "auto"

    @property
    def preferred(self) -> Candidate | None:
        """Where it is to be tried first."""
        return None if self.setup is None else self.setup.candidate

    def backoff_s(self) -> float:
        """The pause before a restart, if there is to be one at all."""
        doublings = min(max(0, self.crashes - 2), BACKOFF_DOUBLINGS_MAX)
        return min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2.0**doublings)

    def is_of(self, entry: Entry, staged: Any) -> bool:
        """Whether it is this content under these settings."""
        return bool(self.staged.digest == staged.digest and self.settings == entry.settings)

    def learn(self, info: dict[str, Any]) -> None:
        """Takes what its worker told about it when it had loaded."""
        self.info = info
        self.inputs = {w["name"]: TensorSpec.from_wire(w) for w in info["inputs"]}
        self.outputs = {w["name"]: TensorSpec.from_wire(w) for w in info["outputs"]}
        if self.sizes is not None:
            self.sizes.keep_fitting(self.inputs)
            if not have_free(self.inputs.values()):
                self.sizes = None
        self.required = frozenset(n for n, spec in self.inputs.items() if not spec.optional)
        batch = info.get("batch") or {}
        self.times = RunTimes(batch.get("times_us") or ())
        self.batch_max = max(1, int(batch.get("max") or 1))
        self.hold_s = self.settings.max_queue_delay_s if self.batch_max > 1 else 0.0
        if info.get("fallback_reason"):
            self.fallback_reason = str(info["fallback_reason"])

    def batch_rows(self) -> int:
        """Rows to put into a run: as many as the owner says, else as give the most in a second."""
        if self.settings.max_batch_size is not None:
            return self.batch_max
        return self.times.best_rows(self.batch_max)

    def log_fields(self) -> dict[str, str]:
        """Which model a line of the log is about."""
        return {"MODEL": self.name, "MODEL_VERSION": str(self.version)}

    def event(self) -> Publish:
        """Its state, for subscribers."""
        return state_event(self.name, self.version, self.oip_state(), self.reason, self.staged.digest)

    def oip_state(self) -> str:
        """The state's name in the Open Inference Protocol."""
        if self.track.serving is self and self.state in LOADS:
            return "READY" if self.admits else "UNAVAILABLE"
        return _OIP_STATE[self.state]

    def move(self, state: InstanceState, reason: str, message: str) -> None:
        """To another state, with its reason."""
        if state not in MOVES[self.state]:
            raise AssertionError(f"{self.name}: {self.state.name} → {state.name} is not a move")
        if state is not InstanceState.HASHING:
            self.outcome = None  # what was held for the hash is done now, or of no use any more
        self.state, self.reason, self.message = state, reason, message


@dataclass(eq=False)
class Track:
    """What one entry of the folder stands for."""

    name: str
    explicit_version: int | None
    entry: Entry | None = None
    serving: Instance | None = None
    incoming: Instance | None = None
    draining: list[Instance] = field(default_factory=list)
    failure: Failure | None = None
    unloaded: bool = False
    superseded: bool = False
    """Its entry went because another version came, which does not serve yet."""
    asked: bool = False
    """Someone asked for a load: try the same content again, quarantined or not."""
    last_good: tuple[Entry, Any] | None = None
    """What to fall back on when the folder's content cannot serve."""
    lost: Failure | None = None
    """Why its content cannot serve any more, while the store is asked what did before."""
    spoilt: int = 0
    """Copies that were damaged in a row, with nothing serving in between."""

    @property
    def key(self) -> tuple[str, int | None]:
        return self.name, self.explicit_version

    def instances(self) -> list[Instance]:
        """Everything that is alive, the serving one first."""
        found = [i for i in (self.serving, self.incoming) if i is not None]
        return found + self.draining


def state_event(name: str, version: int | None, state: str, reason: str, digest: str = "") -> Publish:
    """What subscribers of `model.state` are told."""
    text = "" if version is None else str(version)
    payload = {"name": name, "version": text, "state": state, "reason": reason, "sha256": digest}
    return Publish("model.state", payload)
