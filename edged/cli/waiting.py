"""Whether a model serves: the decision behind `edgectl wait` and `edgectl put --wait`.

A content is known by its SHA-256, and so are the settings that it is served with. The daemon names both in
each row of its index, so a verdict on other bytes or under other settings is never taken for one on these.
Only a refusal before the bytes were read has no such name: one that stood before the publication is no
answer (`Goal.old_refusals`), a new one is.

`judge` is pure: it sees the index and what events have refused since. `wait_for` asks again when an event
says that something moved. Events may be lost (a publisher drops what a slow or late subscriber does not
take), so it also asks again every `RECHECK_S`; between the two it sleeps.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = [
    "RECHECK_S",
    "Goal",
    "Outcome",
    "Row",
    "Wanted",
    "judge",
    "reason_of",
    "split_reason",
    "unnamed_refusals",
    "wait_for",
]

RECHECK_S = 2.0
"""A lost event costs at most this; asking costs the daemon well under a millisecond."""

Row = Mapping[str, Any]
"""One entry of the daemon's repository index."""

_PASSING = ("CHANGED_WHILE_COPYING", "BEING_WRITTEN", "MODEL_REMOVED")
"""No verdict: the daemon looks again by itself, or speaks of what was there before."""

_REASON = re.compile(r"([A-Z][A-Z0-9_]+)(?:: (.*))?", re.DOTALL)


@dataclass(frozen=True)
class Wanted:
    """A content, under these settings or (without) under any."""

    sha256: str
    settings_sha256: str = ""

    def is_in(self, row: Row) -> bool:
        """Whether a row is about it."""
        return _sha256(row) == self.sha256 and self.settings_sha256 in ("", row.get("settings_sha256"))


@dataclass(frozen=True)
class Goal:
    """What is waited for: all of `wanted`, or with none the model, whatever its content.

    `old_refusals` are the refusals without a content that stood before a publication, as
    `unnamed_refusals` gives them; None: nothing was published, and such refusals say nothing.
    """

    model: str
    wanted: frozenset[Wanted] = frozenset()
    old_refusals: frozenset[tuple[str, str]] | None = None


@dataclass(frozen=True)
class Outcome:
    """`state` is `serving`, `refused`, `pending` or, from `wait_for` alone, `timeout`."""

    state: str
    text: str
    row: Row | None = None


def unnamed_refusals(rows: Sequence[Row] | None, model: str) -> frozenset[tuple[str, str]]:
    """What refusals of the model without a content stand in the index."""
    mine = [row for row in rows or () if row.get("name") == model]
    return frozenset(_refusal(row) for row in mine if _is_unnamed_refusal(row))


def reason_of(entry: Mapping[str, Any]) -> str:
    """Why an entry of the status is not served: the reason for programs, and the daemon's words if any."""
    reason, message = str(entry.get("reason") or ""), str(entry.get("message") or "")
    return ": ".join(part for part in (reason, message) if part) or "no reason given"


def split_reason(row: Row) -> tuple[str, str]:
    """The reason for programs, and the daemon's words, where it gives both; else words alone."""
    text = str(row.get("reason") or "")
    match = _REASON.fullmatch(text)
    return ("", text) if match is None else (match[1], match[2] or "")


def judge(rows: Sequence[Row] | None, goal: Goal, refused: frozenset[str] = frozenset()) -> Outcome:
    """The outcome as of now; `rows` are the daemon's index, None while no daemon is there; `refused` are
    the reasons of refusals without a content that events have told."""
    if rows is None:
        return Outcome("pending", "the daemon is away")
    mine = [row for row in rows if row.get("name") == goal.model]
    refusal = _fresh_refusal(mine, goal, refused)
    if refusal is not None:
        return _refused(refusal, goal)
    if not goal.wanted:
        return _any_content(mine, goal)
    outcomes = [_one_content(wanted, mine, goal) for wanted in goal.wanted]
    return min(outcomes, key=lambda outcome: ("refused", "pending", "serving").index(outcome.state))


def _one_content(wanted: Wanted, mine: Sequence[Row], goal: Goal) -> Outcome:
    rows = {str(row.get("state")): row for row in mine if wanted.is_in(row)}
    for state, tell in (("READY", _serving), ("LOADING", _loading), ("UNAVAILABLE", _refused)):
        if state in rows:
            return tell(rows[state], goal)
    return _not_there(wanted, mine, goal)


def _any_content(mine: Sequence[Row], goal: Goal) -> Outcome:
    rows = {str(row.get("state")): row for row in mine}
    for state, tell in (("LOADING", _loading), ("READY", _serving), ("UNAVAILABLE", _refused)):
        if state in rows:
            return tell(rows[state], goal)
    return _not_there(None, mine, goal)


def _fresh_refusal(mine: Sequence[Row], goal: Goal, refused: frozenset[str]) -> Row | None:
    """A refusal that came after the publication, and before the bytes were read."""
    if goal.old_refusals is None:
        return None
    for row in filter(_is_unnamed_refusal, mine):
        if _refusal(row) not in goal.old_refusals or split_reason(row)[0] in refused:
            return row
    return None


def _not_there(wanted: Wanted | None, mine: Sequence[Row], goal: Goal) -> Outcome:
    """What is waited for is not in the index."""
    for state, words in (("LOADING", "is being copied"), ("UNAVAILABLE", "is refused for something else")):
        for row in mine:
            if row.get("state") == state:
                return Outcome("pending", f"{goal.model} {words}: {row.get('reason') or state}", row)
    for row in mine:
        if row.get("state") == "READY":
            same = wanted is not None and _sha256(row) == wanted.sha256
            what = "with other settings" if same else f"other content ({_sha256(row)[:12]}…)"
            return Outcome("pending", f"{goal.model} version {row.get('version')} serves {what}", row)
    return Outcome("pending", f"the daemon has not seen {goal.model} yet")


def _serving(row: Row, goal: Goal) -> Outcome:
    return Outcome("serving", f"{goal.model} version {row.get('version')} serves", row)


def _loading(row: Row, goal: Goal) -> Outcome:
    version = f" version {row.get('version')}" if row.get("version") else ""
    why = f": {row['reason']}" if row.get("reason") else ""
    return Outcome("pending", f"{goal.model}{version} is loading{why}", row)


def _refused(row: Row, goal: Goal) -> Outcome:
    return Outcome("refused", f"{goal.model} was refused: {row.get('reason') or 'no reason given'}", row)


def _sha256(row: Row) -> str:
    return str(row.get("sha256") or "")


def _refusal(row: Row) -> tuple[str, str]:
    return str(row.get("version") or ""), str(row.get("reason") or "")


def _is_unnamed_refusal(row: Row) -> bool:
    return row.get("state") == "UNAVAILABLE" and not _sha256(row) and split_reason(row)[0] not in _PASSING


def wait_for(
    goal: Goal,
    *,
    index: Callable[[], Sequence[Row] | None],
    next_event: Callable[[float], Row | None],
    timeout_s: float,
    on_change: Callable[[Outcome], None] = lambda _: None,
) -> Outcome:
    """Asks until `judge` decides or `timeout_s` is over.

    `index` asks the daemon; `next_event(seconds)` returns the body of an event, or None when the seconds
    are over.
    """
    started = time.monotonic()
    last: Outcome | None = None
    refused: frozenset[str] = frozenset()
    while True:
        outcome = judge(index(), goal, refused)
        if outcome.state != "pending":
            return outcome
        if last is None or outcome.text != last.text:
            on_change(outcome)
        last = outcome
        left = timeout_s - (time.monotonic() - started)
        if left <= 0:
            return Outcome("timeout", f"not within {timeout_s:g} s: {outcome.text}", outcome.row)
        event = next_event(min(left, RECHECK_S))
        if event is not None and event.get("name") == goal.model and _is_unnamed_refusal(event):
            refused |= {str(event["reason"])}
