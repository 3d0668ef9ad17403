"""`edgectl doctor`: looks at the machine, the installation and the daemon, and says what to type.

Asks the daemon what it says of itself, has the facts gathered (`health.gather`) and judged
(`health.checks`), and shows the findings. Works without a daemon, since that is when it is needed most. Exit
code 1 when anything fails.
"""

from __future__ import annotations

import argparse
import dataclasses
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from edged.cli.health.checks import LEVELS, Finding, examine, worst
from edged.cli.health.facts import Daemon, Facts
from edged.cli.health.gather import Asked, gather, run_command, unit_directory, unit_of
from edged.cli.health.root import Root
from edged.cli.session import EXIT_FAILED, EXIT_OK, Session
from edged.cli.tables import clean, paint
from edged.errors import EdgedError

__all__ = ["aim", "ask", "doctor", "look"]

_ROLES = {"ok": "good", "note": "dim", "warn": "warn", "fail": "bad"}

_USUAL = "edged.service"

_TEXT_MIN = 30
"""Narrower, a sentence is a column of words."""

_ASK_S_MAX = 5.0
"""A daemon that stands still is a finding, and must not keep the others from being told."""


def doctor(session: Session, args: argparse.Namespace) -> int:
    """Everything that was looked at, the worst of it last, and what to type."""
    facts = look(session, args.unit)
    findings = examine(facts)
    shown = [each for each in findings if args.all or each.level != "ok"]
    session.answer(
        {"verdict": worst(findings), "findings": [dataclasses.asdict(each) for each in findings]},
        _text(shown, findings, session),
    )
    return EXIT_FAILED if worst(findings) == "fail" else EXIT_OK


def look(session: Session, unit: str) -> Facts:
    """The facts as they are seen from here."""
    return gather(aim(session, unit), root=Root())


def aim(session: Session, unit: str) -> Asked:
    """What is to be looked at: the daemon of this unit, or the one that the session's endpoint names."""
    name = unit if "." in unit else f"{unit}.service"
    if name != _USUAL and session.endpoint is None:
        # Another instance has sockets of its own, and the usual ones must not be taken for them.
        session.endpoint = f"ipc://{unit_directory(unit_of(run_command, name), 'Runtime')}/edged.sock"
    return Asked(ask(session), session.endpoint, name)


def ask(session: Session) -> Daemon:
    """What the daemon says, or why it says nothing. Raises InvalidArgument for an endpoint that is none."""
    timeout_s = min(session.timeout_s, _ASK_S_MAX)
    status: Mapping[str, Any] | None = None
    try:
        metadata = session.client.server_metadata(timeout=timeout_s)
    except EdgedError as e:
        if e.reason == "BAD_ENDPOINT":
            raise
        return Daemon(error=e.message, reason=e.reason or e.code.value)
    try:
        status = session.client.server_status(timeout=timeout_s)
    except EdgedError as e:
        return Daemon(None, metadata, e.message, e.reason or e.code.value)
    return Daemon(status, metadata)


def _text(shown: Sequence[Finding], findings: Sequence[Finding], session: Session) -> str:
    counts = Counter(each.level for each in findings)
    total = ", ".join(f"{counts[level]} {level}" for level in reversed(LEVELS) if counts[level])
    if not shown:
        return f"{paint('nothing to do', 'good', session.out)} ({total}; --all shows what was looked at)"
    ordered = sorted(shown, key=lambda each: LEVELS.index(each.level))
    areas = max(len(each.area) for each in ordered)
    lines = [line for each in ordered for line in _lines(each, areas, session)]
    return "\n".join([*lines, "", total])


def _lines(each: Finding, areas: int, session: Session) -> Iterator[str]:
    """A finding and, on a line that is never wrapped so that it can be copied, its fix."""
    indent = " " * (areas + 8)
    width = session.out.width or 10_000
    first, *rest = textwrap.wrap(clean(each.text), max(_TEXT_MIN, width - len(indent))) or [""]
    level = paint(each.level.ljust(4), _ROLES[each.level], session.out)
    yield f"{level}  {each.area.ljust(areas)}  {first}"
    yield from (indent + line for line in rest)
    if each.fix:
        yield indent + paint(f"→ {clean(each.fix)}", "strong", session.out)
