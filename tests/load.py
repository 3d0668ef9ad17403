"""A model under load, simulated: clients, a clock, and a worker that takes as long as is said.

Between the two stands the real core. Time is that of a heap of events, so minutes pass in a moment; the same
seed gives the same day.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from edged.estimate import RunTimes
from edged.events import Reply, RequestArrived, RunDone, RunFailed, SendResult, StartRun, Tick
from edged.messages import InputTensor, Peer, Request
from tests.world import World, config

HAND_OVER_S = 50e-6
"""From the supervisor to the worker, and back."""


@dataclass
class Asked:
    """One request and what became of it."""

    client: int
    at_s: float
    deadline_s: float
    priority: int
    answered_s: float = math.nan
    outcome: str = ""

    @property
    def took_s(self) -> float:
        return self.answered_s - self.at_s

    @property
    def good(self) -> bool:
        """Answered with outputs, and in time."""
        return self.outcome == "ok" and self.answered_s <= self.deadline_s


@dataclass
class Load:
    """A model whose runs take `run_s(rows)`, give or take `noise` of it (one deviation)."""

    run_s: Callable[[int], float]
    batch_max: int = 1
    instances: int = 1
    noise: float = 0.0
    drift: float = 0.0
    """By what share runs become slower and faster again, in each three seconds."""
    queue_length: int = 256
    seed: int = 1
    asked: dict[Any, Asked] = field(default_factory=dict)
    expired_runs: int = 0
    """Requests that a worker ran though their deadline had passed."""
    runs: int = 0

    def __post_init__(self) -> None:
        world = World(
            settings=config(limits__queue_length=self.queue_length, limits__inflight_per_client=4096)
        )
        world.batch_max, world.instances = self.batch_max, self.instances
        world.put("m")
        world.settle()
        sizes = [1 << n for n in range(self.batch_max.bit_length())]
        world.serving().times = RunTimes([[rows, self.run_s(rows) * 1e6] for rows in sizes])
        self.core = world.core
        self.now_s = self.began_s = world.now_s
        self.random = random.Random(self.seed)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._serial = itertools.count()
        self._socket: deque[StartRun] = deque()
        self._busy = 0
        self._then: dict[Any, Callable[[str], None]] = {}

    # ------------------------------------------------------------------ clients

    def at(self, at_s: float, act: Callable[[], None]) -> None:
        """Does something at a time."""
        heapq.heappush(self._events, (at_s, next(self._serial), act))

    def ask(
        self,
        client: int,
        *,
        priority: int = 0,
        timeout_s: float = 0.0,
        then: Callable[[str], None] | None = None,
    ) -> None:
        """Sends a request now; `then` is told its outcome."""
        key = next(self._serial)
        deadline_s = self.now_s + timeout_s if timeout_s else math.inf
        self.asked[key] = Asked(client, self.now_s, deadline_s, priority or 5)
        if then is not None:
            self._then[key] = then
        parameters = {"priority": priority, "timeout": round(timeout_s * 1e6)}
        tensor = InputTensor("x", "FP32", [1], data=b"\0\0\0\0")
        request = Request("model_infer", id=key, model_name="m", inputs=[tensor], parameters=parameters)
        route = bytes([client % 256, client // 256]), b""
        self._send(RequestArrived(route, "infer", Peer(1000, 1000, client), request))

    def closed(self, client: int, depth: int, **fields: Any) -> None:
        """A client with so many requests in flight at all times; after a refusal it waits a moment."""

        def again(outcome: str) -> None:
            pause_s = 1e-5 if outcome == "ok" else 0.01
            self.at(self.now_s + pause_s, lambda: self.ask(client, then=again, **fields))

        for _ in range(depth):
            again("ok")

    def paced(self, client: int, every_s: float, **fields: Any) -> None:
        """A client that asks at fixed times."""

        def again() -> None:
            self.ask(client, **fields)
            self.at(self.now_s + every_s, again)

        self.at(self.now_s + every_s / 2, again)

    def poisson(self, clients: int, per_s: float, **fields: Any) -> None:
        """Requests that come when they come, each of one of so many clients."""

        def again() -> None:
            self.ask(self.random.randrange(clients), **fields)
            self.at(self.now_s + self.random.expovariate(per_s), again)

        self.at(self.now_s, again)

    # ------------------------------------------------------------------ the worker

    def _take(self) -> None:
        while self._socket and self._busy < self.instances:
            run = self._socket.popleft()
            if run.deadline_s <= self.now_s:
                failed = RunFailed(run.worker, run.run_id, "DEADLINE_EXCEEDED", "DEADLINE_PASSED", "too late")
                self.at(self.now_s + HAND_OVER_S, lambda failed=failed: self._send(failed))
                continue
            self.expired_runs += sum(1 for job in run.jobs if job.deadline_s <= self.now_s)
            self.runs += 1
            self._busy += 1
            drift = 1.0 + self.drift * math.sin(2.0 * math.pi * self.now_s / 3.0)
            seconds = self.run_s(run.rows) * max(0.2, self.random.gauss(drift, self.noise))
            self.at(self.now_s + seconds, lambda run=run, seconds=seconds: self._done(run, seconds))

    def _done(self, run: StartRun, seconds: float) -> None:
        self._busy -= 1
        outputs = [["y", "FP32", [run.rows], 64, 4 * run.rows]]
        done = RunDone(run.worker, run.run_id, outputs, int(seconds * 1e9))
        self.at(self.now_s + HAND_OVER_S, lambda: self._send(done))
        self._take()

    def _arrive(self, run: StartRun) -> None:
        self._socket.append(run)
        self._take()

    # ------------------------------------------------------------------ the loop

    def _send(self, event: Any) -> None:
        for effect in self.core.handle(event, self.now_s):
            match effect:
                case StartRun():
                    self.at(self.now_s + HAND_OVER_S, lambda run=effect: self._arrive(run))
                case SendResult(job=job):
                    self._answered(job.request_id, "ok")
                case Reply(header=header):
                    self._answered(header["id"], header["error"]["reason"])

    def _answered(self, key: Any, outcome: str) -> None:
        asked = self.asked[key]
        assert not asked.outcome, "answered twice"
        asked.answered_s, asked.outcome = self.now_s, outcome
        then = self._then.pop(key, None)
        if then is not None:
            then(outcome)

    def run(self, seconds: float) -> None:
        """Lets so much time pass."""
        end_s = self.now_s + seconds
        while True:
            due_s = self.core.next_due_s()
            event_s = self._events[0][0] if self._events else math.inf
            if due_s is not None and due_s <= event_s and due_s <= end_s:
                self.now_s = max(self.now_s, due_s)
                self._send(Tick())
            elif event_s <= end_s:
                self.now_s, _, act = heapq.heappop(self._events)
                act()
            else:
                self.now_s = end_s
                return

    # ------------------------------------------------------------------ what came of it

    def of(
        self, client: int | None = None, *, priority: int | None = None, after_s: float = 0.0
    ) -> list[Asked]:
        """The answered requests of a client or of a priority, asked after so many seconds."""
        return [
            each
            for each in self.asked.values()
            if each.outcome
            and client in (None, each.client)
            and priority in (None, each.priority)
            and each.at_s >= self.began_s + after_s
        ]


def quantile(values: list[float], q: float) -> float:
    """The value that a share `q` of them does not exceed."""
    return sorted(values)[min(len(values) - 1, math.ceil(q * len(values)) - 1)]
