"""Whether a model serves: the decision behind `edgectl wait` and `edgectl put --wait`.

`judge` is pure: it sees what the daemon says of one model, and for how long it has been asked, and says
serving, refused or not yet. `wait_for` asks again when an event says that something moved. Events may be
lost (a publisher drops what a slow or late subscriber does not take), so it also asks again every
`RECHECK_S`; between the two it sleeps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = [
    "RECHECK_S",
    "STALE_AFTER_S",
    "Goal",
    "Outcome",
    "fingerprint",
    "judge",
    "merged",
    "reason_of",
    "wait_for",
]

RECHECK_S = 2.0
"""A lost event costs at most this; asking costs the daemon well under a millisecond."""

STALE_AFTER_S = 6.0
"""How long an old verdict may stand before it is taken as the verdict on the new bytes: longer than the
folder's settle time and a pass of the watcher, so that a fresh verdict has come by then if one does."""

_FAILED = ("UNAVAILABLE",)


@dataclass(frozen=True)
class Goal:
    """What is waited for. `sha256`: this content, not just any of the name. `before`: what the daemon said
    of the model before a publication (None: there was none); what still reads the same is an old verdict,
    and counts only when `STALE_AFTER_S` have brought no new one."""

    model: str
    sha256: str | None = None
    before: frozenset[tuple[object, ...]] | None = None


@dataclass(frozen=True)
class Outcome:
    """`state` is `serving`, `refused`, `pending` or, from `wait_for` alone, `timeout`."""

    state: str
    text: str
    entry: Mapping[str, Any] | None = None


def fingerprint(entry: Mapping[str, Any]) -> tuple[object, ...]:
    """What changes about an entry when the daemon has dealt with it anew."""
    return tuple(entry.get(key) for key in ("version", "sha256", "state", "reason", "load_ms"))


def reason_of(entry: Mapping[str, Any]) -> str:
    """Why an entry is not served: the reason for programs, and the daemon's words where it has any."""
    reason, message = str(entry.get("reason") or ""), str(entry.get("message") or "")
    return ": ".join(part for part in (reason, message) if part) or "no reason given"


def judge(entries: Sequence[Mapping[str, Any]] | None, goal: Goal, elapsed_s: float) -> Outcome:
    """The outcome as of now; `entries` are the daemon's `models` of every name, None while no daemon is
    there."""
    if entries is None:
        return Outcome("pending", "the daemon is away")
    mine = [e for e in entries if e.get("name") == goal.model]
    wanted = [e for e in mine if goal.sha256 is None or e.get("sha256") == goal.sha256]
    fresh = [e for e in wanted if fingerprint(e) not in (goal.before or ())]
    if fresh or elapsed_s < STALE_AFTER_S:
        wanted = fresh
    loading = [e for e in wanted if e.get("state") == "LOADING"]
    ready = [e for e in wanted if e.get("state") == "READY"]
    failed = [e for e in wanted if e.get("state") in _FAILED]
    published = goal.before is not None
    if ready and not loading and not (published and failed):
        return Outcome("serving", f"{goal.model} version {ready[-1].get('version')} serves", ready[-1])
    if loading:
        return Outcome(
            "pending", f"{goal.model} version {loading[-1].get('version')} is loading", loading[-1]
        )
    if failed:
        return Outcome(
            "refused",
            f"{goal.model} was refused: {reason_of(failed[-1])}",
            failed[-1],
        )
    return _without_content(mine, goal, elapsed_s)


def _without_content(mine: Sequence[Mapping[str, Any]], goal: Goal, elapsed_s: float) -> Outcome:
    """The wanted content is not among the entries: refused before it had a hash, or not seen yet."""
    unhashed = [e for e in mine if e.get("state") in _FAILED and not e.get("sha256")]
    for entry in unhashed:
        is_new = goal.before is not None and fingerprint(entry) not in goal.before
        if is_new or elapsed_s >= STALE_AFTER_S:
            return Outcome("refused", f"{goal.model} was refused: {reason_of(entry)}", entry)
    serving = next((e for e in mine if e.get("state") == "READY"), None)
    if serving is not None and goal.sha256 is not None:
        digest = str(serving.get("sha256") or "unknown")[:12]
        return Outcome(
            "pending",
            f"{goal.model} version {serving.get('version')} serves other content ({digest}…)",
            serving,
        )
    return Outcome("pending", f"the daemon has not seen {goal.model} yet")


def wait_for(
    goal: Goal,
    *,
    entries: Callable[[], Sequence[Mapping[str, Any]] | None],
    next_event: Callable[[float], object],
    timeout_s: float,
    on_change: Callable[[Outcome], None] = lambda _: None,
) -> Outcome:
    """Asks until `judge` decides or `timeout_s` is over.

    `entries` asks the daemon; `next_event(seconds)` returns when an event came or the seconds are over.
    """
    started = time.monotonic()
    last: Outcome | None = None
    while True:
        elapsed = time.monotonic() - started
        outcome = judge(entries(), goal, elapsed)
        if outcome.state != "pending":
            return outcome
        if last is None or outcome.text != last.text:
            on_change(outcome)
        last = outcome
        left = timeout_s - (time.monotonic() - started)
        if left <= 0:
            return Outcome("timeout", f"not within {timeout_s:g} s: {outcome.text}", outcome.entry)
        next_event(min(left, RECHECK_S))


def merged(index: Iterable[Mapping[str, Any]], hashes: Mapping[tuple[str, str], str]) -> list[dict[str, Any]]:
    """The repository index with the content hashes that events told, for those who may not ask for status."""
    return [
        {**entry, "sha256": hashes.get((str(entry.get("name")), str(entry.get("version"))))}
        for entry in index
    ]
