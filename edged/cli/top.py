"""`edgectl top`: what the daemon does now, on a terminal of 80 × 24.

`Shot` is what the daemon said at one moment; `figures` is pure and makes of two of them what went on in
between: rates, and latency percentiles from the difference of the two histograms, so that they are of the
last seconds and not of the daemon's whole life. `frame` lays that out in lines of the terminal's size.
`Screen` owns the terminal and gives it back whatever happens.

Statistics are anyone's who may ask for inference; what the machine does is for members of edged-admin, and is
left out for others.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import shutil
import signal
import sys
import termios
import textwrap
import time
import tty
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from types import FrameType
from typing import Any, TextIO

from edged.cli.commands import STATE_ROLES
from edged.cli.session import EXIT_OK, Session
from edged.cli.tables import Column, Terminal, bytes_text, clean, duration_text, micros_text, paint, table
from edged.errors import EdgedError, PermissionDenied

__all__ = ["SORTS", "Figures", "ModelFigures", "Shot", "figures", "frame", "top"]

SORTS = ("requests", "latency", "memory", "name")

_ASK_S_MAX = 2.0
"""A daemon that stands still for longer is shown as not answering; keys are heard at the latest then."""
_ALONE = "\x1b[?1049h\x1b[?25l\x1b[?7l\x1b[2J"
_BACK = "\x1b[?7h\x1b[?25h\x1b[?1049l"
"""xterm's: the alternate screen, no cursor, no wrapping of long lines; and all of it undone."""
_SIZE = (80, 24)


@dataclass(frozen=True)
class Shot:
    """What the daemon said at `at_s` (monotonic). `away` says why it said nothing, `partly` why not all."""

    at_s: float
    status: Mapping[str, Any] = field(default_factory=dict)
    statistics: Sequence[Mapping[str, Any]] = ()
    away: str = ""
    partly: str = ""


@dataclass(frozen=True)
class ModelFigures:
    """One model version; rates are per second, latencies those of the time between the two shots."""

    name: str
    version: str
    state: str
    device: str
    runtime: str
    requests_per_s: float | None
    errors_per_s: float | None
    p50_us: float | None
    p99_us: float | None
    queue: int | None
    rss_bytes: int | None


@dataclass(frozen=True)
class Figures:
    """What went on between two shots. None stands for what is not known."""

    seconds: float
    models: tuple[ModelFigures, ...]
    requests_per_s: float | None
    refused_per_s: float | None


# ---- figures --------------------------------------------------------------------------------------------


def figures(now: Shot, before: Shot | None) -> Figures:
    """What happened from `before` to `now`; another daemon's counts, or none, give no rates."""
    seconds = now.at_s - before.at_s if before is not None else 0.0
    if before is None or seconds <= 0 or before.away or not _same_daemon(now, before):
        before = None
    earlier = {_key(entry): entry for entry in before.statistics} if before is not None else {}
    entries = {_key(entry): entry for entry in now.statistics}
    rows = {_key(row): row for row in now.status.get("models") or ()}
    models = [
        _model(
            key, entries.get(key), earlier.get(key), rows.get(key), seconds if before is not None else None
        )
        for key in dict.fromkeys([*entries, *rows])
    ]
    was = before.status.get("counters") if before is not None else None
    counters = now.status.get("counters")
    return Figures(
        seconds,
        tuple(models),
        _rate(counters, was, "requests", seconds),
        _rate(counters, was, "refused", seconds),
    )


def _key(entry: Mapping[str, Any]) -> tuple[str, str]:
    return str(entry.get("name")), str(entry.get("version"))


def _same_daemon(now: Shot, before: Shot) -> bool:
    return now.status.get("instance_id") == before.status.get("instance_id")


def _rate(
    now: Mapping[str, Any] | None, before: Mapping[str, Any] | None, key: str, seconds: float
) -> float | None:
    if now is None or before is None or key not in now or key not in before:
        return None
    return max(0.0, (int(now[key]) - int(before[key])) / seconds)


def _count(entry: Mapping[str, Any], kind: str) -> int:
    return int(((entry.get("inference_stats") or {}).get(kind) or {}).get("count") or 0)


def _model(
    key: tuple[str, str],
    entry: Mapping[str, Any] | None,
    before: Mapping[str, Any] | None,
    row: Mapping[str, Any] | None,
    seconds: float | None,
) -> ModelFigures:
    requests = errors = p50 = p99 = None
    if entry is not None and seconds is not None:
        # A version that came in between began at zero; one whose counts fell is another than it was.
        was = before if before is not None and _count(before, "success") <= _count(entry, "success") else {}
        requests = (_count(entry, "success") - _count(was, "success")) / seconds
        errors = max(0.0, (_count(entry, "fail") - _count(was, "fail")) / seconds)
        between = _between(_buckets(entry), _buckets(was))
        p50, p99 = _quantile(between, 0.5), _quantile(between, 0.99)
    row = row or {}
    return ModelFigures(
        *key,
        str(row.get("state") or ("READY" if entry is not None else "")),
        str(row.get("device") or ""),
        str(row.get("runtime") or ""),
        requests,
        errors,
        p50,
        p99,
        row.get("queue"),
        row.get("rss_bytes"),
    )


def _buckets(entry: Mapping[str, Any]) -> dict[int, int]:
    return {int(edge): int(n) for edge, n in (entry.get("latency_us") or {}).get("buckets") or ()}


def _between(now: Mapping[int, int], before: Mapping[int, int]) -> dict[int, int]:
    return {edge: n - before.get(edge, 0) for edge, n in sorted(now.items()) if n > before.get(edge, 0)}


def _quantile(buckets: Mapping[int, int], q: float) -> float | None:
    rank, seen = q * sum(buckets.values()), 0
    for edge, n in buckets.items():
        seen += n
        if seen >= rank:
            return float(edge)
    return None


# ---- lines ----------------------------------------------------------------------------------------------


def frame(
    now: Shot, shown: Figures, terminal: Terminal, *, height: int | None = None, sort: str = "requests"
) -> list[str]:
    """The lines to show, none wider than the terminal and no more than `height`."""
    head = [_cut(line, terminal) for line in _head(now, shown)]
    if now.away:
        why = textwrap.wrap(clean(now.away), terminal.width or 10_000)
        waiting = paint(_cut("waiting for the daemon", terminal), "bad", terminal)
        return [*head, "", waiting, *why][:height]
    foot = [now.partly] if now.partly else []
    room = None if height is None else max(1, height - len(head) - len(foot) - 3)
    ordered = _sorted(shown.models, sort)
    lines = _models(ordered if room is None else ordered[:room], terminal) if ordered else ["no models yet"]
    hidden = 0 if room is None else max(0, len(ordered) - room)
    more = [f"and {hidden} more"] if hidden else []
    lines = [*head, "", *lines, *more, *(paint(_cut(each, terminal), "dim", terminal) for each in foot)]
    return lines if height is None else lines[:height]


def _cut(line: str, terminal: Terminal) -> str:
    text = clean(line)
    return text if terminal.width is None or len(text) <= terminal.width else text[: terminal.width - 1] + "…"


def _head(now: Shot, shown: Figures) -> Iterator[str]:
    status = now.status
    resources = status.get("resources") or {}
    sample = resources.get("sample") or {}
    yield " · ".join(
        part
        for part in (
            f"edged {status.get('version', '')} {status.get('state', '')}".strip(),
            _titled("up", duration_text(status.get("uptime_s"))),
            _per_s("requests", shown.requests_per_s),
            _per_s("refused", shown.refused_per_s),
            _titled("in flight", (status.get("clients") or {}).get("in_flight")),
            "measuring" if status.get("measuring") else "",
        )
        if part
    )
    if not sample:
        return
    total, available = sample.get("memory_total_bytes"), sample.get("memory_available_bytes")
    cpu, cpus = sample.get("cpu_percent"), sample.get("cpus")
    hot = sample.get("temperature_c")
    yield " · ".join(
        part
        for part in (
            f"CPU {cpu:.0f} % of {cpus}" if cpu is not None else "",
            f"memory {bytes_text(total - available)} of {bytes_text(total)}" if total and available else "",
            f"{hot:.0f} °C" if hot is not None else "",
            "THROTTLED" if sample.get("throttled") else "",
            _titled("disk free", bytes_text(sample.get("disk_free_bytes"))),
        )
        if part
    )
    psi = sample.get("psi_some_avg10")
    reasons = "; ".join(str(each) for each in resources.get("reasons") or ())
    level = f"pressure {resources.get('level', '?')}{f': {reasons}' if reasons else ''}"
    yield level + (f" · waiting for memory {psi:.0f} %" if psi else "")
    devices = [
        f"{each.get('runtime')} {each.get('device')}"
        + ("" if each.get("status") == "ok" else f" {each.get('status')}")
        for each in status.get("devices") or ()
        if each.get("status") not in ("absent", "not_installed")
    ]
    if devices:
        yield f"devices {', '.join(devices)}"


def _titled(title: str, value: object) -> str:
    return "" if value is None else f"{title} {value}"


def _per_s(title: str, value: float | None) -> str:
    return "" if value is None else f"{title} {_rate_text(value)}/s"


def _rate_text(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _sorted(models: Sequence[ModelFigures], sort: str) -> list[ModelFigures]:
    keys: dict[str, Callable[[ModelFigures], float]] = {
        "requests": lambda m: -(m.requests_per_s or 0.0),
        "latency": lambda m: -(m.p99_us or 0.0),
        "memory": lambda m: -(m.rss_bytes or 0),
        "name": lambda _: 0.0,
    }
    return sorted(models, key=lambda m: (keys[sort](m), m.name, m.version))


_COLUMNS = (
    Column("model"),
    Column("ver", right=True, drop=4),
    Column("state", role=STATE_ROLES, drop=3),
    Column("device", drop=2),
    Column("runtime", drop=6),
    Column("req/s", right=True),
    Column("p50", right=True),
    Column("p99", right=True),
    Column("queue", right=True, drop=1),
    Column("err/s", right=True, drop=5),
    Column("memory", right=True, drop=4),
)
_NAME_CHARS_MAX = 24
"""A longer name would push the figures off a terminal of 80 columns."""


def _models(models: Sequence[ModelFigures], terminal: Terminal) -> list[str]:
    rows = [
        [
            each.name if len(each.name) <= _NAME_CHARS_MAX else each.name[: _NAME_CHARS_MAX - 1] + "…",
            each.version,
            each.state,
            each.device,
            each.runtime,
            None if each.requests_per_s is None else _rate_text(each.requests_per_s),
            micros_text(each.p50_us),
            micros_text(each.p99_us),
            each.queue,
            None if each.errors_per_s is None else _rate_text(each.errors_per_s),
            bytes_text(each.rss_bytes) if each.rss_bytes else None,
        ]
        for each in models
    ]
    return table(_COLUMNS, rows, terminal).split("\n")


# ---- asking ---------------------------------------------------------------------------------------------


def shoot(session: Session) -> Shot:
    """Asks the daemon; one that is away, or does not answer in time, is a shot as well."""
    timeout_s = min(session.timeout_s, _ASK_S_MAX)
    status: Mapping[str, Any] = {}
    partly = ""
    try:
        statistics = session.client.statistics(timeout=timeout_s)
        try:
            status = session.client.server_status(timeout=timeout_s)
        except PermissionDenied as e:
            partly = e.message
            metadata = session.client.server_metadata(timeout=timeout_s)
            status = {key: metadata.get(key) for key in ("instance_id", "version")}
    except EdgedError as e:
        return Shot(time.monotonic(), away=e.message)
    return Shot(time.monotonic(), status, statistics, partly=partly)


def top(session: Session, args: argparse.Namespace) -> int:
    """Shows what goes on until q or Ctrl-C; once, where it is asked so or the output is no terminal."""
    session.client.server_metadata()  # a daemon that is not there at the start is said as everywhere else
    if args.once or session.as_json or session.out.width is None or not sys.stdin.isatty():
        return _once(session, args)
    with contextlib.suppress(KeyboardInterrupt), Screen(sys.stdin, sys.stdout) as screen:
        _live(session, args, screen)
    return EXIT_OK


def _once(session: Session, args: argparse.Namespace) -> int:
    before = shoot(session)
    time.sleep(args.interval)  # rates are of this much time, as asked for
    now = shoot(session)
    if now.away:
        session.client.server_metadata()  # raises what `away` says
    found = figures(now, before)
    document = {
        **asdict(found),
        "resources": now.status.get("resources"),
        "devices": now.status.get("devices"),
        "partly": now.partly,
    }
    session.answer(document, "\n".join(frame(now, found, session.out, sort=args.sort)))
    return EXIT_OK


def _live(session: Session, args: argparse.Namespace, screen: Screen) -> None:
    before: Shot | None = None
    sort = args.sort
    while True:
        now = shoot(session)
        found = figures(now, before)
        due_s = time.monotonic() + args.interval
        key = ""
        while key != "q" and (time.monotonic() < due_s):
            width, height = shutil.get_terminal_size(_SIZE)
            terminal = Terminal(max(1, width), session.out.colour)
            keys = f"q quits, s sorts (by {sort}), every {args.interval:g} s"
            lines = frame(now, found, terminal, height=max(1, height - 1), sort=sort)
            screen.show([*lines, paint(_cut(keys, terminal), "dim", terminal)])
            key = screen.key(max(0.0, due_s - time.monotonic()))
            if key == "s":
                sort = SORTS[(SORTS.index(sort) + 1) % len(SORTS)]
        if key == "q":
            return
        before = now if not now.away else before


class Screen:
    """The terminal, taken for as long as the context lasts and given back at its end, whatever ends it.

    Also while the process is stopped by Ctrl-Z, and when it is told to end by SIGTERM or the connection's
    end (SIGHUP), which leave the context as Ctrl-C does.
    """

    def __init__(self, keys: TextIO, out: TextIO) -> None:
        self._keys = keys.fileno()
        self._out = out
        self._before: list[Any] | None = None
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Screen:
        for number, handler in (
            (signal.SIGTERM, self._end),
            (signal.SIGHUP, self._end),
            (signal.SIGTSTP, self._stop),
        ):
            self._handlers[number] = signal.signal(number, handler)
        self._take()
        return self

    def __exit__(self, *_: object) -> None:
        self._give_back()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def show(self, lines: Sequence[str]) -> None:
        """Puts the lines in place of those before, in one write so that nothing flickers."""
        body = "\x1b[K\n".join(lines)
        self._out.write(f"\x1b[H{body}\x1b[K\x1b[J")
        self._out.flush()

    def key(self, timeout_s: float) -> str:
        """The next key, or "" when none came in time; the end of the input counts as q."""
        ready, _, _ = select.select([self._keys], [], [], timeout_s)
        if not ready:
            return ""
        with contextlib.suppress(OSError):
            return os.read(self._keys, 1).decode("ascii", "replace").lower() or "q"
        return "q"

    def _take(self) -> None:
        self._before = termios.tcgetattr(self._keys)
        tty.setcbreak(self._keys)
        self._out.write(_ALONE)
        self._out.flush()

    def _give_back(self) -> None:
        if self._before is None:
            return
        # The terminal may be gone (SIGHUP): then there is nothing to give back.
        with contextlib.suppress(OSError, termios.error):
            termios.tcsetattr(self._keys, termios.TCSADRAIN, self._before)
        with contextlib.suppress(OSError):
            self._out.write(_BACK)
            self._out.flush()
        self._before = None

    def _end(self, _number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    def _stop(self, _number: int, _frame: FrameType | None) -> None:
        self._give_back()
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)
        # Here again after `fg`.
        signal.signal(signal.SIGTSTP, self._stop)
        self._take()
