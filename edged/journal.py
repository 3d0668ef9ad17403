"""The log: one record for each event, to the journal, to a terminal, or as JSON lines.

`Journal.emit` takes a kind from the catalog and fields, and never blocks or raises: records go through
a bounded queue to one writer thread, since journald and a terminal may both stall. What does not fit is
counted and said as soon as there is room. What a client can provoke passes a `RateLimiter` first, which
is pure: it is told the time.

The journal gets structured fields through systemd-python, not through its `logging` handler (which
drops silently without journald, may block, and sends no extra fields). `MESSAGE` is the kind's constant
sentence followed by the fields, so that plain `journalctl` reads well; programs select by `MESSAGE_ID`
or by a field and never need to parse it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import re
import sys
import threading
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TextIO, cast

from edged.catalog import CATALOG, LEVELS, Event, LevelName

__all__ = ["CATALOG", "FORMATS", "Event", "Journal", "RateLimiter", "Summary"]

FORMATS: Final = ("auto", "text", "json", "journal")

#: About 1 MB at a usual record's size; a burst of every model changing state at once is far below it.
QUEUE_RECORDS_MAX: Final = 2000
#: A traceback fits; one field never fills a journal entry.
VALUE_CHARS_MAX: Final = 8192
#: Beyond it the `MESSAGE` is cut; the fields are whole.
MESSAGE_CHARS_MAX: Final = 2048
#: The journal's own limit for a field's name (systemd.journal-fields(7)).
NAME_CHARS_MAX: Final = 64
#: How long `close` waits for a stalled log before it gives up on it.
CLOSE_TIMEOUT_S: Final = 2.0

JOURNAL_SOCKET: Final = Path("/run/systemd/journal/socket")

#: Names that the record itself carries; a caller's field of that name gets a prefix.
_RESERVED: Final = frozenset(
    {"MESSAGE", "MESSAGE_ID", "PRIORITY", "EVENT", "SYSLOG_IDENTIFIER", "CODE_FILE", "CODE_LINE", "CODE_FUNC"}
)
_NOT_IN_NAME: Final = re.compile(r"[^A-Z0-9_]")
_PLAIN_VALUE: Final = re.compile(r"[^\s\"=\\\x00-\x1f\x7f-\x9f\u2028\u2029]+")

Scalar = str | int | float | bool


@dataclass(frozen=True, slots=True)
class _Record:
    kind: str
    event: Event
    fields: dict[str, Scalar]
    time_s: float
    where: tuple[str, int, str]


class Journal:
    """The daemon's log. A context manager; `close` writes out what is queued.

    `format` is `"journal"`, `"text"`, `"json"`, or `"auto"`: the journal when standard error is connected
    to it (`$JOURNAL_STREAM`), else text. When the journal is wanted and cannot be had, records go to
    `stream` as text and one `systemd_missing` record says why.
    """

    def __init__(
        self,
        level: LevelName = "info",
        format: str = "auto",
        *,
        stream: TextIO | None = None,
        environ: Mapping[str, str] | None = None,
        queue_records_max: int = QUEUE_RECORDS_MAX,
    ) -> None:
        if format not in FORMATS:
            raise ValueError(f"log format {format!r} is none of {', '.join(FORMATS)}")
        self._stream = sys.stderr if stream is None else stream
        self._threshold = LEVELS[level]
        self._level: LevelName = level
        under_journal = _is_journal_stream(self._stream, os.environ if environ is None else environ)
        wanted = ("journal" if under_journal else "text") if format == "auto" else format
        render: Callable[[_Record], str] = _render_json if wanted == "json" else _render_text
        if under_journal and wanted != "json":
            render = _render_prefixed
        self._to_stream = render
        self._send: Callable[..., Any] | None = None
        missing = ""
        if wanted == "journal":
            self._send, missing = _find_journal()
        self.format: Final = "journal" if self._send is not None else wanted.replace("journal", "text")
        self._queue: queue.SimpleQueue[_Record | threading.Event | None] = queue.SimpleQueue()
        self._queue_records_max = queue_records_max
        self._lock = threading.Lock()
        self._dropped = 0
        self._closed = False
        self._thread = threading.Thread(target=self._write_all, name="edged-journal", daemon=True)
        self._thread.start()
        if missing:
            self.emit("systemd_missing", REASON=missing)

    @property
    def level(self) -> LevelName:
        """The least level that is written."""
        return self._level

    def set_level(self, level: LevelName) -> None:
        """Write records of `level` and above from now on."""
        self._threshold = LEVELS[level]
        self._level = level

    def emit(self, kind: str, /, **fields: object) -> None:
        """Record an event of the catalog; never blocks, never raises.

        `fields` have upper-case names; a value of None leaves its field out. A kind that is not in the
        catalog is a fault of ours and is recorded as one.
        """
        event = CATALOG.get(kind)
        if event is None:
            fields = {**fields, "DETAIL": f"unknown kind of event {kind!r}"}
            kind, event = "daemon_bug", CATALOG["daemon_bug"]
        if LEVELS[event.level] > self._threshold:
            return
        code = sys._getframe(1)
        record = _Record(
            kind,
            event,
            _clean(fields),
            time.time(),
            (code.f_code.co_filename, code.f_lineno, code.f_code.co_qualname),
        )
        if self._closed:
            self._write(record)
        elif self._queue.qsize() >= self._queue_records_max:
            with self._lock:
                self._dropped += 1
        else:
            self._queue.put(record)

    def flush(self, timeout_s: float = CLOSE_TIMEOUT_S) -> bool:
        """Wait until everything emitted so far is written; False when that took too long."""
        if self._closed:
            return True
        done = threading.Event()
        self._queue.put(done)
        return done.wait(timeout_s)

    def close(self) -> None:
        """Write out what is queued and end the writer thread; waits for at most `CLOSE_TIMEOUT_S`.

        Records emitted later are written at once by the caller's own thread.
        """
        if self._closed:
            return
        self._closed = True
        self._queue.put(None)
        self._thread.join(CLOSE_TIMEOUT_S)
        # Another thread may have passed the check above us just before: its record stands behind the None.
        while not self._thread.is_alive() and not self._queue.empty():
            item = self._queue.get()
            if isinstance(item, _Record):
                self._write(item)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write_all(self) -> None:
        while (item := self._queue.get()) is not None:
            if isinstance(item, threading.Event):
                item.set()
                continue
            self._write(item)
            if self._dropped and self._queue.empty():
                self._write_dropped()
        if self._dropped:
            self._write_dropped()

    def _write_dropped(self) -> None:
        with self._lock:
            count, self._dropped = self._dropped, 0
        self._write(
            _Record(
                "log_dropped", CATALOG["log_dropped"], {"COUNT": count}, time.time(), (__file__, 0, __name__)
            )
        )

    def _write(self, record: _Record) -> None:
        # libsystemd reports success when journald's socket is gone, so we look for it ourselves.
        if self._send is not None and JOURNAL_SOCKET.exists():
            with contextlib.suppress(OSError):
                self._send(**_journal_fields(record))
                return
        # A log that nobody reads any more (a closed pipe, a full disk) must not stop the daemon.
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(self._to_stream(record) + "\n")
            self._stream.flush()


def _is_journal_stream(stream: TextIO, environ: Mapping[str, str]) -> bool:
    """Whether `stream` is the one systemd connected to the journal (systemd.exec(5), $JOURNAL_STREAM)."""
    device, _, inode = environ.get("JOURNAL_STREAM", "").partition(":")
    try:
        stat = os.fstat(stream.fileno())
        return (stat.st_dev, stat.st_ino) == (int(device), int(inode))
    except (OSError, ValueError):
        return False


def _find_journal() -> tuple[Callable[..., Any] | None, str]:
    """systemd-python's `send`, or None and why not."""
    if not JOURNAL_SOCKET.exists():
        return None, f"{JOURNAL_SOCKET} is not there"
    try:
        from systemd import journal
    except ImportError as error:
        return None, f"systemd-python cannot be imported: {error}"
    return cast("Callable[..., Any]", journal.send), ""


def _clean(fields: Mapping[str, object]) -> dict[str, Scalar]:
    return {_clean_name(name): _clean_value(value) for name, value in fields.items() if value is not None}


def _clean_name(name: str) -> str:
    """A name that the journal takes: A-Z, 0-9 and _, not beginning with _ or a digit."""
    clean = _NOT_IN_NAME.sub("_", name.upper()).lstrip("_")
    if not clean or clean[0].isdigit() or clean in _RESERVED:
        clean = f"FIELD_{clean}"
    return clean[:NAME_CHARS_MAX]


def _clean_value(value: object) -> Scalar:
    match value:
        case bool() | int():
            return value
        case float() if math.isfinite(value):
            return round(value, 3)
    text = str(value)
    if len(text) > VALUE_CHARS_MAX:
        text = f"{text[:VALUE_CHARS_MAX]}… ({len(text)} characters)"
    # File names may hold bytes that are no UTF-8 (lone surrogates here), which no encoder takes.
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _quoted(value: Scalar) -> str:
    """One word or one JSON string: nothing that a client sends can begin a new line or fake a field."""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return text if _PLAIN_VALUE.fullmatch(text) else _escaped(text)


def _escaped(text: str) -> str:
    # JSON leaves C1 controls and line separators alone, which terminals and pagers act upon.
    return re.sub(
        "[\x7f-\x9f\u2028\u2029]",
        lambda found: f"\\u{ord(found[0]):04x}",
        json.dumps(text, ensure_ascii=False),
    )


def _sentence(record: _Record) -> str:
    words = [f"{name}={_quoted(value)}" for name, value in record.fields.items()]
    message = "  ".join([record.event.message, " ".join(words)]) if words else record.event.message
    return message if len(message) <= MESSAGE_CHARS_MAX else message[:MESSAGE_CHARS_MAX] + "…"


def _journal_fields(record: _Record) -> dict[str, object]:
    path, line, function = record.where
    return {
        "MESSAGE": _sentence(record),
        "MESSAGE_ID": record.event.message_id,
        "PRIORITY": LEVELS[record.event.level],
        "SYSLOG_IDENTIFIER": "edged",
        "EVENT": record.kind,
        "CODE_FILE": path,
        "CODE_LINE": line,
        "CODE_FUNC": function,
        **record.fields,
    }


def _render_text(record: _Record) -> str:
    return f"{_time(record.time_s)} {record.event.level:<7} {_sentence(record)}"


def _render_prefixed(record: _Record) -> str:
    """For a standard error that the journal reads: it keeps the time, and takes the level from <N>."""
    return f"<{LEVELS[record.event.level]}>{_sentence(record)}"


def _render_json(record: _Record) -> str:
    head: dict[str, Scalar] = {
        "time": _time(record.time_s),
        "level": record.event.level,
        "event": record.kind,
        "message": record.event.message,
        "message_id": record.event.message_id,
    }
    return json.dumps({**head, **record.fields}, ensure_ascii=True)


def _time(time_s: float) -> str:
    local = time.localtime(time_s)
    return time.strftime(f"%Y-%m-%dT%H:%M:%S.{int(time_s % 1 * 1000):03d}%z", local)


@dataclass(frozen=True, slots=True)
class Summary:
    """`count` occurrences of `key` were kept out of the log since the last line about it."""

    key: Hashable
    count: int


@dataclass(slots=True)
class _Counter:
    due_s: float
    count: int


class RateLimiter:
    """Lets the first occurrence of each key through and counts the others; pure, it is told the time.

    After each `interval_s` a key that went on gets one summary; one that was quiet is forgotten, and its
    next occurrence is a first one again. At most `keys_max` keys are kept: those beyond share `OVERFLOW`,
    so that a flood of invented keys is one line and one count as well.
    """

    OVERFLOW: Final = "(others)"

    def __init__(self, *, interval_s: float = 60.0, keys_max: int = 256) -> None:
        self._interval_s = interval_s
        self._keys_max = keys_max
        self._counters: dict[Hashable, _Counter] = {}

    def admit(self, key: Hashable, now_s: float) -> bool:
        """Whether this occurrence is to be logged; if not, it is counted."""
        if key not in self._counters and len(self._counters) >= self._keys_max:
            key = self.OVERFLOW
        counter = self._counters.get(key)
        if counter is None:
            self._counters[key] = _Counter(now_s + self._interval_s, 0)
            return True
        counter.count += 1
        return False

    def due(self, now_s: float) -> list[Summary]:
        """The summaries to log now, in the order in which their keys first came."""
        summaries = []
        for key, counter in list(self._counters.items()):
            if now_s < counter.due_s:
                continue
            if counter.count == 0:
                del self._counters[key]
                continue
            summaries.append(Summary(key, counter.count))
            counter.count, counter.due_s = 0, now_s + self._interval_s
        return summaries
