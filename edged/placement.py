"""Where each instance may run: the devices' verdicts, what they mean for a model, and remembered choices.

Pure. `devices.plan` knows how a selector meets a set of verdicts; this holds the verdicts, asks for new ones,
and keeps what was once found out about a content on this machine. A start relies on what an earlier life's
probes found where nothing has changed that they depend on, and asks again when the daemon is idle: a probe
takes longer than most loads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edged.devices import Candidate, Plan, Verdict, plan
from edged.events import Log, Probe, Publish, RememberChoice, RememberSizes, RememberVerdict
from edged.instances import Instance, Surroundings
from edged.setups import Setup

__all__ = ["Placement", "after_failure"]

PROBE_WAIT_S = 2.0
"""How long the first loads wait for a better device's verdict before they start on one that works."""

_LASTING = frozenset({"absent", "not_installed"})
"""Verdicts on what is not there. The others may pass by themselves, and are never relied upon."""

_BATCHES_MAX = 8
"""Setups of one content whose proofs are kept: more than a model is moved between."""

_MEASURED_MAX = 16
"""Of one content's measurements that are kept, so that a later life can explain the choice."""

_RULE = 2
"""Counts up when a model may be moved by other rules than before: what was allowed by those is forgotten."""

_FIGURES = tuple(f"{s}_{f}" for s in ("reference", "candidate") for f in ("p50_us", "p99_us", "rows_s"))

_MAY_BE_THE_DEVICE = ("DEVICE_FAILED", "WORKER_CRASHED", "MODEL_LOAD_TIMEOUT")


class Placement:
    """The verdicts, and what follows from them for an instance."""

    def __init__(self, around: Surroundings, *, now_s: float) -> None:
        self.verdicts: dict[Candidate, Verdict | None] = {}
        """None while a probe is out."""
        self._around = around
        self._worked: set[Candidate] = set()
        self._wait_until_s: float | None = now_s + PROBE_WAIT_S
        self._assumed: list[Candidate] = []
        """Known from an earlier life, and not asked about again yet."""
        self._asked: Candidate | None = None
        """The one of them whose probe is out: one at a time."""

    # ------------------------------------------------------------------ verdicts

    def probe(self, candidate: Candidate) -> None:
        """Asks for a verdict, unless one is on its way."""
        if candidate not in self.verdicts or self.verdicts[candidate] is not None:
            self.verdicts[candidate] = None
            self._around.emit(Probe(candidate.runtime, candidate.device))

    def assume(self, verdict: Verdict) -> None:
        """Takes an earlier life's verdict for true until `verify` has asked again."""
        candidate = verdict.candidate
        self.verdicts[candidate] = verdict
        self._assumed.append(candidate)
        if verdict.status == "ok":
            self._worked.add(candidate)
        fields = {"RUNTIME": verdict.runtime, "DEVICE": verdict.device, "REASON": verdict.status}
        self._around.emit(Log("device_verdict", {**fields, "DETAIL": "as in the daemon's life before"}))

    @property
    def unverified(self) -> bool:
        """Whether something is assumed that should be asked about now."""
        return bool(self._assumed) and self._asked is None

    @property
    def verifying(self) -> bool:
        """Whether the probe of something assumed is out."""
        return self._asked is not None

    def verify(self) -> None:
        """Asks again about one of those that are assumed; meanwhile it counts as before."""
        candidate = self._assumed.pop(0)
        if self.verdicts.get(candidate) is not None:
            self._asked = candidate
            self._around.emit(Probe(candidate.runtime, candidate.device))

    def reprobe(self) -> None:
        """Asks anew for the devices that can come and go."""
        for candidate, verdict in list(self.verdicts.items()):
            if verdict is not None and candidate.gpu_like:
                self.probe(candidate)

    def on_probed(self, verdict: Verdict) -> bool:
        """Takes a verdict; whether a device works that did not, or was not known to."""
        candidate, works = verdict.candidate, verdict.status == "ok"
        if self._asked == candidate:
            self._asked = None
        worked = candidate in self._worked
        before, self.verdicts[candidate] = self.verdicts.get(candidate), verdict
        kept = verdict.to_wire() if _is_lasting(verdict) else None
        self._around.emit(RememberVerdict(verdict.runtime, verdict.device, kept))
        if before == verdict:
            return False
        fields = {"RUNTIME": verdict.runtime, "DEVICE": verdict.device, "REASON": verdict.status}
        if works:
            self._worked.add(candidate)
        elif worked:
            self._worked.discard(candidate)
            lost = {**fields, "HINT": verdict.hint, "DETAIL": verdict.detail}
            self._around.emit(Log("device_lost", lost))
        detail = verdict.hint or verdict.detail or verdict.full_name
        self._around.emit(Log("device_verdict", {**fields, "DETAIL": detail}))
        payload = {
            "runtime": verdict.runtime,
            "device": verdict.device,
            "status": verdict.status,
            "hint": verdict.hint,
        }
        self._around.emit(Publish("device.state", payload))
        return works and not worked

    # ------------------------------------------------------------------ plans

    def plan_for(self, instance: Instance) -> Plan:
        """The candidates for an instance under its settings; one that waits while they may become more."""
        settings, devices = instance.settings, self._around.config.devices
        found = plan(
            selector=settings.device,
            runtime=settings.runtime,
            policy=settings.policy,
            model_format=instance.entry.format,
            verdicts=self.verdicts,
            order=devices.order,
            exclude=devices.exclude,
            preferred=instance.preferred,
            may_wait=settings.device != "auto" or self._wait_until_s is not None,
        )
        if not found.candidates and None in self.verdicts.values():
            return Plan(waiting=True)
        return found

    def comparable(self, instance: Instance) -> tuple[Candidate, ...]:
        """Where an instance may run by its owner's word, as far as is known now."""
        settings, devices = instance.settings, self._around.config.devices
        return plan(
            selector=settings.device,
            runtime=settings.runtime,
            policy="require" if instance.pinned else "prefer",
            model_format=instance.entry.format,
            verdicts=self.verdicts,
            order=devices.order,
            exclude=devices.exclude,
            may_wait=False,
        ).candidates

    def tick(self, now_s: float) -> None:
        """The first loads have waited long enough for verdicts."""
        if self._wait_until_s is not None and self._wait_until_s <= now_s:
            self._wait_until_s = None

    def next_due_s(self) -> float | None:
        """When `tick` has something to do."""
        return self._wait_until_s

    # ------------------------------------------------------------------ remembered choices

    def choice_key(self, instance: Instance) -> str:
        """What a choice is remembered under: one content may be two models, by other words of their owner."""
        machine, settings = self._around.machine, instance.settings
        parts = [instance.staged.digest, settings.precision, machine.name, str(machine.cpus)]
        return "|".join([*parts, *(["finite inputs"] if settings.finite_inputs else [])])

    def remember(self, instance: Instance, setup: Setup, source: str, *, guessed: bool = False) -> None:
        """Keeps a choice, how it came about, among what it was made, and what was measured for it; `guessed`
        when at sizes that nobody had asked for."""
        compared = {str(c): version for c, version in self._working()}
        measured = [{**s.to_wire(), "result": _kept(m)} for s, m in instance.measured.items()]
        changes = {
            **setup.to_wire(),
            "compared": compared,
            "source": source,
            "guessed": guessed,
            "proof": self._proof(),
            "measured": measured[-_MEASURED_MAX:],
        }
        self._keep(instance, changes)

    def _proof(self) -> str:
        """By what a move was allowed, or was not: the rule, and the tables of operators."""
        return f"{_RULE} {self._around.machine.operators}"

    def keep_sizes(self, instance: Instance, now_s: float, *, last: bool = False) -> None:
        """Has the sizes of an instance's requests written, where they tell more than what is written."""
        sizes = instance.sizes.to_save(now_s, last=last) if instance.sizes else None
        if sizes:
            self._around.emit(RememberSizes(instance.staged.digest, sizes))

    def _keep(self, instance: Instance, changes: Mapping[str, Any]) -> None:
        instance.record = {**instance.record, **changes}
        self._around.emit(RememberChoice(self.choice_key(instance), dict(instance.record)))

    def note_batch(self, instance: Instance, setup: Setup) -> None:
        """Keeps what a load has found out about batches, so that the next one need not prove it again."""
        batch = instance.info.get("batch")
        if setup.max_batch or instance.never_batched or not isinstance(batch, Mapping):
            return
        key, known = self._batch_key(instance, setup), self._batches(instance)
        # That rows gain nothing together is no proof but a measurement: the next load may see it otherwise.
        if batch.get("max", 1) == 1 or not batch.get("times_us") or known.get(key) == batch:
            return
        rest = [(k, each) for k, each in known.items() if k != key]
        self._keep(instance, {"batches": {**dict(rest[-(_BATCHES_MAX - 1) :]), key: dict(batch)}})

    def known_batch(self, instance: Instance, setup: Setup) -> Mapping[str, Any] | None:
        """What was proved about this very content, run so, by this version of its runtime."""
        if setup.max_batch:
            return None  # it was asked for, or tuned: then each load proves it
        found = self._batches(instance).get(self._batch_key(instance, setup))
        return found if isinstance(found, Mapping) else None

    @staticmethod
    def _batches(instance: Instance) -> Mapping[str, Any]:
        found = instance.record.get("batches")
        return found if isinstance(found, Mapping) else {}

    def _batch_key(self, instance: Instance, setup: Setup) -> str:
        verdict = self.verdicts.get(setup.candidate)
        version = "" if verdict is None else verdict.runtime_version
        return f"{setup} {version} {instance.settings.sha256()[:16]}"

    def recall(self, instance: Instance, choice: Mapping[str, Any]) -> None:
        """Has an instance run as was remembered, where its owner leaves that open and it still holds."""
        if instance.choice not in ("default", "inherited", "pinned"):
            return
        setup = self._still_valid(choice)
        if setup is None or setup.candidate not in instance.plan:
            return
        if instance.pinned and setup.candidate != instance.plan[0]:
            return
        rest = tuple(c for c in instance.plan if c != setup.candidate)
        instance.plan = (setup.candidate, *rest)
        instance.setup = setup
        instance.settled = True
        instance.measured.update(_measured(choice, threads=self._around.machine.cpus))
        if choice.get("source") == "tuned":
            instance.choice = "tuned"
        elif not instance.pinned:
            instance.choice = "remembered"

    def _still_valid(self, choice: Mapping[str, Any]) -> Setup | None:
        """A remembered choice, unless a device or another version has come that it was not compared with.

        Nor where what allowed it is another now; what the owner has tuned is the owner's own word.
        """
        if choice.get("source") != "tuned" and choice.get("proof") != self._proof():
            return None
        compared = choice.get("compared")
        if not isinstance(compared, Mapping):
            return None
        if any(compared.get(str(candidate)) != version for candidate, version in self._working()):
            return None
        return Setup.from_wire(choice, threads=self._around.machine.cpus)

    def _working(self) -> list[tuple[Candidate, str]]:
        """What is known to work, with its runtime's version."""
        return [
            (c, v.runtime_version) for c, v in self.verdicts.items() if v is not None and v.status == "ok"
        ]


def _kept(result: Mapping[str, Any]) -> dict[str, Any]:
    """What of a measurement is kept in the books."""
    words = ("agrees", "proven", "why", "obstacles", "remedy", *_FIGURES)
    return {word: result[word] for word in words if word in result}


def _measured(choice: Mapping[str, Any], *, threads: int) -> dict[Setup, dict[str, Any]]:
    """What an earlier life measured, as far as its book has the shape that this one writes."""
    found: dict[Setup, dict[str, Any]] = {}
    rows = choice.get("measured")
    for row in rows[:_MEASURED_MAX] if isinstance(rows, list) else ():
        setup = Setup.from_wire(row, threads=threads) if isinstance(row, Mapping) else None
        result = row.get("result") if setup is not None else None
        if setup is not None and isinstance(result, Mapping) and _is_result(result):
            found[setup] = _kept(result)
    return found


def _is_result(result: Mapping[str, Any]) -> bool:
    figures = [result.get(name) for name in _FIGURES]
    obstacles = result.get("obstacles", [])
    return (
        all(figure is None or (type(figure) in (int, float) and figure > 0) for figure in figures)
        and isinstance(obstacles, list)
        and all(
            isinstance(text, str) for text in (*obstacles, result.get("why", ""), result.get("remedy", ""))
        )
    )


def _is_lasting(verdict: Verdict) -> bool:
    """Whether the next start may rely on a verdict, if the machine is the same.

    A driver that worked may hang at the next start, and it is the probe that has a time limit.
    """
    if verdict.status == "ok":
        return not verdict.candidate.gpu_like
    return verdict.status in _LASTING


def after_failure(plan: tuple[Candidate, ...], reason: str) -> tuple[Candidate, ...]:
    """The candidates that are left when the first of a plan failed for `reason`.

    Another runtime may read what this one cannot; the same one elsewhere only mends a failed device.
    """
    if reason == "MEMORY_LIMIT":
        return ()
    failed, *rest = plan
    return tuple(c for c in rest if reason in _MAY_BE_THE_DEVICE or c.runtime != failed.runtime)
