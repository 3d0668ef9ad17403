"""`edgectl put` and `edgectl wait`: a model goes into the folder, and a script learns how that ended."""

from __future__ import annotations

import argparse
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edged.cli.content import Content, contents, standing
from edged.cli.publish import Published, PublishError, publish
from edged.cli.session import (
    AWAY,
    EXIT_FAILED,
    EXIT_OK,
    EXIT_TIMEOUT,
    EXIT_USAGE,
    START_HINT,
    Failure,
    Session,
    Subscription,
)
from edged.cli.tables import bytes_text, clean
from edged.cli.waiting import Goal, Outcome, Row, Wanted, split_reason, unnamed_refusals, wait_for
from edged.errors import Unavailable

__all__ = ["put", "wait"]

_TOPICS = ("model.state",)

_EXIT_OF = {"serving": EXIT_OK, "refused": EXIT_FAILED, "timeout": EXIT_TIMEOUT}

_SHA256 = re.compile(r"[0-9a-f]{64}")


def put(session: Session, args: argparse.Namespace) -> int:
    """Publishes a model into the folder; with --wait, stays until the daemon serves or refuses it.

    What the folder's own rules refuse is told at once, as the daemon will tell it.
    """
    source: Path = args.path
    settings = None if args.no_settings else args.settings or _settings_beside(source)
    if args.wait:
        session.client.server_metadata()  # nobody to wait for: say so before anything is written
    status = session.status()
    models = session.models_dir(args.models, status)
    if not args.wait:
        published = _publish(source, models, args.name, settings)
        found, problem = contents(models, standing(models, published.path.name))
        text = _put_text(published, found) + ("" if status else f"\nno daemon was reached; {START_HINT}")
        if problem is not None:
            return _refused_by_folder(session, published, problem, text)
        session.answer(_put_document(published, found), text)
        return EXIT_OK
    if status is not None:
        _require_same_folder(models, status)
    with _Asking(session) as asking:
        return _put_and_wait(session, args, models, settings, asking)


def _put_and_wait(
    session: Session, args: argparse.Namespace, models: Path, settings: Path | None, asking: _Asking
) -> int:
    rows = asking.index()
    published = _publish(args.path, models, args.name, settings)
    found, problem = contents(models, standing(models, published.path.name))
    text = _put_text(published, found)
    if problem is not None:
        return _refused_by_folder(session, published, problem, text)
    if not session.as_json:
        print(text, flush=True)
    wanted = frozenset(Wanted(each.sha256, each.settings_sha256) for each in found)
    goal = Goal(published.name, wanted, unnamed_refusals(rows, published.name))
    outcome = _wait(session, goal, asking, args.timeout)
    document = {**_put_document(published, found), **_outcome_document(outcome)}
    session.answer(document, clean(outcome.text))
    return _EXIT_OF[outcome.state]


def _refused_by_folder(session: Session, published: Published, problem: tuple[str, str], text: str) -> int:
    """The daemon will say so too; nothing needs to be waited for."""
    reason, words = problem
    if not session.as_json:
        print(text, flush=True)
    message = f"{published.name} was refused: {reason}: {words}"
    row = {"state": "UNAVAILABLE", "reason": f"{reason}: {words}"}
    outcome = Outcome("refused", message, row)
    session.answer({**_put_document(published, ()), **_outcome_document(outcome)}, clean(message))
    return EXIT_FAILED


def wait(session: Session, args: argparse.Namespace) -> int:
    """Stays until the model, or that very content of it, serves or is refused."""
    digest = args.sha256.lower() if args.sha256 else None
    if digest is not None and not _SHA256.fullmatch(digest):
        raise Failure("--sha256 takes 64 hexadecimal digits, as `edgectl put --json` tells them", EXIT_USAGE)
    session.client.server_metadata()
    with _Asking(session) as asking:
        goal = Goal(args.model, frozenset({Wanted(digest)} if digest else ()))
        outcome = _wait(session, goal, asking, args.timeout)
    session.answer({"name": args.model, **_outcome_document(outcome)}, clean(outcome.text))
    return _EXIT_OF[outcome.state]


def _wait(session: Session, goal: Goal, asking: _Asking, timeout_s: float) -> Outcome:
    started = time.monotonic()
    with session.progress() as show:
        return wait_for(
            goal,
            index=asking.index,
            next_event=asking.next_event,
            timeout_s=timeout_s,
            on_change=lambda outcome: show(f"{time.monotonic() - started:.0f} s: {outcome.text}"),
        )


class _Asking:
    """What the daemon says of its models, and when it is worth asking again.

    The index is anyone's to ask who may infer. A daemon that goes away while we wait is expected back: it
    may be restarting, and what was put is served then. A context manager: it holds the subscription.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._subscription: Subscription | None = None

    def __enter__(self) -> _Asking:
        self._subscription = self._session.subscription(_TOPICS)
        return self

    def __exit__(self, *_: object) -> None:
        self._unsubscribe()

    def index(self) -> Sequence[Row] | None:
        """The models, or None while no daemon is there."""
        try:
            return self._session.client.repository_index()
        except Unavailable as e:
            if e.reason not in AWAY:
                raise
            return None

    def next_event(self, timeout_s: float) -> Row | None:
        """The body of the next event, or None when the time is over."""
        try:
            if self._subscription is None:
                self._subscription = self._session.subscription(_TOPICS)
            event = self._subscription.next(timeout_s)
        except Unavailable:
            self._unsubscribe()
            time.sleep(timeout_s)
            return None
        return None if event is None else event[1]

    def _unsubscribe(self) -> None:
        if self._subscription is not None:
            self._subscription.__exit__()
            self._subscription = None


def _publish(source: Path, models: Path, name: str | None, settings: Path | None) -> Published:
    with _terminated_cleanly():
        try:
            return publish(source, models, name=name, settings=settings)
        except PublishError as e:
            raise Failure(str(e)) from None


@contextmanager
def _terminated_cleanly() -> Iterator[None]:
    """SIGTERM ends the copy as Ctrl-C does, so that the hidden copy is taken away: a fleet tool's time-out
    sends it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before: Callable[..., Any] | int | None = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _settings_beside(source: Path) -> Path | None:
    """`digits.toml` of a `digits.onnx`; a bundle carries its own inside."""
    if source.is_dir():
        return None
    beside = source.with_suffix(".toml")
    return beside if beside.is_file() else None


def _require_same_folder(models: Path, status: Mapping[str, Any]) -> None:
    daemons = status.get("models_dir")
    if daemons and Path(str(daemons)).resolve() != models.resolve():
        raise Failure(
            f"the daemon looks into {daemons}, not {models}: nothing put there would ever serve", EXIT_USAGE
        )


def _put_document(published: Published, found: Sequence[Content]) -> dict[str, Any]:
    return {
        "name": published.name,
        "path": str(published.path),
        "size_bytes": published.size_bytes,
        "sha256": found[0].sha256 if len(found) == 1 else None,
        "contents": [{"version": each.version, "sha256": each.sha256} for each in found],
        "settings": str(published.settings) if published.settings else None,
        "replaced": published.replaced,
        "unchanged": published.unchanged,
    }


def _put_text(published: Published, found: Sequence[Content]) -> str:
    what = (
        "was there already, unchanged"
        if published.unchanged
        else ("replaced" if published.replaced else "put")
    )
    settings = f", settings {published.settings.name}" if published.settings else ""
    digest = f", sha256 {found[0].sha256[:12]}…" if len(found) == 1 else ""
    return f"{published.path}: {what} ({bytes_text(published.size_bytes)}{digest}{settings})"


def _outcome_document(outcome: Outcome) -> dict[str, Any]:
    row = outcome.row or {}
    reason, message = split_reason(row)
    return {
        "outcome": outcome.state,
        "message": outcome.text,
        "version": row.get("version"),
        "state": row.get("state"),
        "reason": reason,
        "reason_message": message,
    }
