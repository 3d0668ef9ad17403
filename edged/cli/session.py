"""What every command of edgectl has at hand: the daemon, the terminal, and how to say things.

Owns the connection and the two ways of answering: text for a person on a terminal, or one JSON document
with `--json`. Notes and progress go to stderr, so that stdout holds the answer and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edged.cli.tables import Terminal, clean, paint
from edged.errors import EdgedError

if TYPE_CHECKING:
    from edged.client import Client
    from edged.link import EventLink

__all__ = [
    "AWAY",
    "EXIT_FAILED",
    "EXIT_NOT_RUNNING",
    "EXIT_OK",
    "EXIT_TIMEOUT",
    "EXIT_USAGE",
    "START_HINT",
    "SYSTEM_MODELS",
    "Failure",
    "Session",
    "Subscription",
]

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_TIMEOUT = 2
EXIT_NOT_RUNNING = 3
EXIT_USAGE = 64
"""sysexits.h's EX_USAGE: apart from every answer of the daemon."""

AWAY = ("DAEMON_NOT_RUNNING", "CONNECTION_LOST")
"""The client's reasons for a daemon that is not there, or not any longer."""

START_HINT = "start it with `systemctl start edged`, or your own with `edged --models DIR`"

SYSTEM_MODELS = Path("/var/lib/edged/models")
"""Where the system service keeps its models folder (its unit's StateDirectory)."""


class Failure(Exception):
    """The command ends here, with this sentence and this exit code."""

    def __init__(self, message: str, code: int = EXIT_FAILED, *, reason: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.reason = reason


def _plain(document: Any) -> Any:
    from edged.cli.inputs import json_values  # here, so that `--help` and completion need no numpy

    return json_values(document)


class Subscription:
    """The daemon's events from now on, one at a time, each waited for as long as the caller likes."""

    def __init__(self, link: EventLink) -> None:
        self._link = link

    def __enter__(self) -> Subscription:
        return self

    def __exit__(self, *_: object) -> None:
        self._link.close()

    def next(self, timeout_s: float | None) -> tuple[str, dict[str, Any]] | None:
        """The next event, or None when none came in time. Raises Unavailable when the daemon is gone."""
        until = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            event = self._link.take()
            if event is not None:
                return event
            left_s = None if until is None else until - time.monotonic()
            if left_s is not None and left_s <= 0:
                return None
            self._link.wait(left_s)


class Session:
    """One run of edgectl. A context manager: it closes the connection, if one was opened."""

    def __init__(self, *, endpoint: str | None, as_json: bool, timeout_s: float) -> None:
        self.endpoint = endpoint
        self.as_json = as_json
        self.timeout_s = timeout_s
        self.out = Terminal.of(sys.stdout)
        self.err = Terminal.of(sys.stderr)
        self._client: Client | None = None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        if self._client is not None:
            self._client.close()

    @property
    def client(self) -> Client:
        """The connection, opened at first use."""
        if self._client is None:
            from edged.client import Client  # here, so that `--help` and completion need no ZeroMQ

            self._client = Client(self.endpoint, timeout=self.timeout_s)
        return self._client

    def subscription(self, topics: Sequence[str]) -> Subscription:
        """Listens to these topics, or to all."""
        from edged.clientwire import EVENTS_SOCKET
        from edged.link import EventLink, find_socket

        return Subscription(EventLink(find_socket(self.endpoint, EVENTS_SOCKET), topics))

    def answer(self, document: Any, text: str) -> None:
        """The command's answer: `document` with --json, else `text`."""
        if self.as_json:
            print(json.dumps(_plain(document), indent=2, ensure_ascii=False, allow_nan=False))
        elif text:
            print(text)

    def line(self, document: Any, text: str) -> None:
        """One of many answers, on a line of its own, delivered at once."""
        print(json.dumps(_plain(document), ensure_ascii=False) if self.as_json else text, flush=True)

    def note(self, text: str) -> None:
        """Something to know beside the answer."""
        print(paint(clean(text), "dim", self.err), file=sys.stderr)

    @contextlib.contextmanager
    def progress(self) -> Iterator[Callable[[str], None]]:
        """Gives a function that shows one changing line, on a terminal only; wiped at the end."""
        if self.err.width is None:
            yield lambda _text: None
            return
        room = self.err.width - 1

        def show(text: str) -> None:
            print(f"\r\x1b[K{clean(text)[:room]}", end="", file=sys.stderr, flush=True)

        try:
            yield show
        finally:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def status(self) -> dict[str, Any] | None:
        """The daemon's status, or None where it is not there or not for us to ask."""
        try:
            return self.client.server_status()
        except EdgedError:
            return None

    def models_dir(self, given: Path | None, status: dict[str, Any] | None) -> Path:
        """The models folder: the one named, the running daemon's, else where a daemon would look."""
        if given is not None:
            return given
        if status is not None and status.get("models_dir"):
            return Path(str(status["models_dir"]))
        from edged.config import ConfigError, load_config  # here: it is half of what `--help` would import

        candidates = []
        with contextlib.suppress(ConfigError):
            candidates.append(load_config(flags={}, environ=os.environ, file=None).server.models)
        candidates.append(SYSTEM_MODELS)
        for candidate in candidates:
            if candidate.is_dir():
                return candidate
        looked = " nor ".join(str(c) for c in candidates)
        raise Failure(
            f"no models folder: neither a running daemon names one, nor is there {looked}; use --models DIR"
        )
