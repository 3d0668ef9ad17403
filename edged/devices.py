"""Where a model may run: verdicts of the prober, selectors of the settings, and the order to try.

Pure. A *candidate* is a runtime on a device, `("openvino", "GPU.0")`. The prober gives each a verdict; a
model's settings name a selector (`auto`, `cpu`, `cuda`, `openvino`, `openvino:GPU`, `onnxruntime:CPU`);
`plan` puts the two together into the candidates to try, in order, and says why the wanted one is missing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Candidate", "Plan", "Verdict", "matches", "plan"]


@dataclass(frozen=True, order=True)
class Candidate:
    """A runtime on a device."""

    runtime: str
    device: str

    def __str__(self) -> str:
        return f"{self.runtime}:{self.device}"

    @property
    def gpu_like(self) -> bool:
        """Whether its context is dear, so that all its models share one worker."""
        return self.device != "CPU"


@dataclass(frozen=True)
class Verdict:
    """What the prober found out about a candidate by running a tiny model on it."""

    runtime: str
    device: str
    status: str
    """`ok`, `absent`, `no_permission`, `driver_error`, `busy`, `timeout`, `not_installed`."""
    hint: str = ""
    detail: str = ""
    runtime_version: str = ""
    full_name: str = ""
    precision_fast: str = ""

    @property
    def candidate(self) -> Candidate:
        return Candidate(self.runtime, self.device)

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> Verdict:
        """From the prober's JSON; keys that are not known here are dropped."""
        known = cls.__dataclass_fields__
        return cls(**{key: str(value) for key, value in wire.items() if key in known})

    def to_wire(self) -> dict[str, str]:
        """For `server_status`."""
        return {key: getattr(self, key) for key in self.__dataclass_fields__}


@dataclass(frozen=True)
class Plan:
    """The candidates to try, in order.

    `missing` says why the selector's own device is not among them, and becomes the reply's
    `fallback_reason`; `waiting` is true while a verdict is out that the plan depends on.
    """

    candidates: tuple[Candidate, ...] = ()
    missing: str = ""
    waiting: bool = False
    refusal: str = field(default="")


def matches(selector: str, candidate: Candidate) -> bool:
    """Whether a selector names this candidate."""
    text = selector.lower()
    if text == "auto":
        return True
    runtime, device = candidate.runtime.lower(), candidate.device.lower()
    head, _, tail = text.partition(":")
    if head == "cuda":
        return device.startswith("cuda") and tail in ("", device.partition(":")[2])
    if head in ("cpu", "gpu", "npu"):
        return device.partition(".")[0] == head
    return runtime == head and (
        not tail or tail in (device, device.partition(".")[0], device.partition(":")[0])
    )


def _rank(candidate: Candidate, order: Sequence[str]) -> int:
    """Position in `order`; an entry that names the runtime outweighs one that names just a device."""
    best = len(order)
    for index, token in enumerate(order):
        if not matches(token, candidate):
            continue
        if ":" in token:
            return index
        # A bare `cpu` in the order means ONNX Runtime's, the one that every model format but IR has.
        if token.lower() == "cpu" and candidate.runtime != "onnxruntime":
            continue
        best = min(best, index)
    return best


def plan(
    *,
    selector: str,
    runtime: str | None,
    policy: str,
    model_format: str,
    verdicts: Mapping[Candidate, Verdict | None],
    order: Sequence[str],
    exclude: Iterable[str],
    preferred: Candidate | None = None,
    may_wait: bool = True,
) -> Plan:
    """The candidates for a model, in the order to try them.

    `verdicts` has None for a candidate whose probe is out. `preferred` is the remembered or inherited choice
    and goes first when it is usable. While `may_wait`, a plan whose wanted candidates are still being probed
    says so instead of falling back.
    """
    excluded = tuple(exclude)
    usable, wanted_pending, wanted_bad = [], False, []
    for candidate, verdict in verdicts.items():
        if any(matches(token, candidate) for token in excluded if token != "auto"):  # noqa: S105 - no secret
            continue
        if model_format == "openvino_ir" and candidate.runtime != "openvino":
            continue
        wanted = matches(selector, candidate) and runtime in (None, candidate.runtime)
        if verdict is None:
            wanted_pending = wanted_pending or wanted
        elif verdict.status == "ok":
            usable.append((not wanted, candidate != preferred, _rank(candidate, order), candidate))
        elif wanted:
            wanted_bad.append(verdict)
    usable.sort()
    if usable and usable[0][3] == preferred and not usable[0][0]:
        wanted_pending = False
    if wanted_pending and may_wait:
        return Plan(waiting=True)
    asked = selector if runtime is None else f"{selector} on {runtime}"
    found_wanted = bool(usable) and not usable[0][0]
    missing = "" if found_wanted else _why(asked, model_format, wanted_bad)
    if policy == "require":
        usable = [row for row in usable if not row[0]]
    if not usable:
        return Plan(refusal=missing or f"no device works for {asked}")
    return Plan(tuple(row[3] for row in usable), missing)


def _why(asked: str, model_format: str, bad: Sequence[Verdict]) -> str:
    if not bad:
        return f"{asked}: no such device here" + (
            " that runs OpenVINO IR; install edged[openvino]" if model_format == "openvino_ir" else ""
        )
    verdict = bad[0]
    text = verdict.hint or verdict.detail
    return f"{verdict.candidate} is {verdict.status}{': ' + text if text else ''}"
