"""The log: one record for each event, to the journal, to a terminal, or as JSON lines.

`Journal.emit` takes a kind from the catalog and fields, and never blocks or raises: records go through
a bounded queue to one writer thread, since journald and a terminal may both stall. A journald that does
not read is waited for, by that thread alone; one that is not there is passed over for standard error. What
does not fit into the queue meanwhile is counted and said as soon as there is room. What a client can
provoke passes a `RateLimiter` first, which is pure: it is told the time.

The journal gets structured fields (`edged.journald`). `MESSAGE` is the kind's constant sentence followed by
the fields, so that plain `journalctl` reads well; programs select by `MESSAGE_ID` or by a field and never
need to parse it.
"""

from __future__ import annotations

import json
import math
import os
import queue
import re
import select
import stat
import sys
import threading
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Final, Self, TextIO

from edged import journald
from edged.catalog import CATALOG, LEVELS, Event, LevelName
from edged.journald import JournalSocket, Outcome, encode_entry

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
#: From `close` on a journald that does not read is waited for this long; then standard error gets the rest.
CLOSE_PATIENCE_S: Final = 1.0
#: How long the writer waits for journald before it looks whether it is being closed.
STALL_LOOK_S: Final = 0.1
#: The journal dates an entry when it gets it; one that comes later than this says itself when it happened.
LATE_S: Final = 1.0

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
    where: tuple[str, int, str]
    time_s: float = field(default_factory=time.time)
    queued_s: float = field(default_factory=time.monotonic)


class Journal:
    """The daemon's log. A context manager; `close` writes out what is queued.

    `format` is `"journal"`, `"text"`, `"json"`, or `"auto"`: the journal when standard error is connected
    to it (`$JOURNAL_STREAM`), else text. While the journal is wanted and cannot be had, records go to
    `stream` as text; when that is so from the start, one `systemd_missing` record says why.
    """

    def __init__(
        self,
        level: LevelName = "info",
        format: str = "auto",
        *,
        stream: TextIO | None = None,
        environ: Mapping[str, str] | None = None,
        queue_records_max: int = QUEUE_RECORDS_MAX,
        socket_path: Path = journald.SOCKET,
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
        self._socket_path = socket_path
        self._journald = JournalSocket(socket_path) if wanted == "journal" else None
        missing = self._journald is not None and not self._journald.present
        self.format: Final = "text" if missing else wanted
        self._queue: queue.SimpleQueue[_Record | threading.Event | None] = queue.SimpleQueue()
        self._queue_records_max = queue_records_max
        self._lock = threading.Lock()
        self._dropped = 0
        self._dropped_ever = 0
        self._closed = False
        self._patient_until_s = math.inf
        self._thread = threading.Thread(target=self._write_all, name="edged-journal", daemon=True)
        self._thread.start()
        if missing:
            self.emit("systemd_missing", REASON=f"nobody listens on {socket_path}")

    @property
    def level(self) -> LevelName:
        """The least level that is written."""
        return self._level

    @property
    def dropped(self) -> int:
        """Records that were written nowhere, since the start."""
        return self._dropped_ever

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
        where = (code.f_code.co_filename, code.f_lineno, code.f_code.co_qualname)
        record = _Record(kind, event, _clean(fields), where)
        if self._closed:
            self._write_last(record)
        elif self._queue.qsize() >= self._queue_records_max:
            self._note_dropped()
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

        Records emitted later are written at once by the caller's own thread, if that can be done without
        waiting.
        """
        if self._closed:
            return
        self._patient_until_s = time.monotonic() + CLOSE_PATIENCE_S
        self._closed = True
        self._queue.put(None)
        self._thread.join(CLOSE_TIMEOUT_S)
        if self._thread.is_alive():
            return
        # Another thread may have passed the check above us just before: its record stands behind the None.
        while not self._queue.empty():
            item = self._queue.get()
            if isinstance(item, _Record):
                self._write_last(item)
        if self._journald is not None:
            self._journald.close()

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

    def _note_dropped(self) -> None:
        with self._lock:
            self._dropped += 1
            self._dropped_ever += 1

    def _write_dropped(self) -> None:
        with self._lock:
            count, self._dropped = self._dropped, 0
        said = _Record("log_dropped", CATALOG["log_dropped"], {"COUNT": count}, (__file__, 0, __name__))
        if not self._try(said):
            with self._lock:
                self._dropped += count

    def _write(self, record: _Record) -> None:
        if not self._try(record):
            self._note_dropped()

    def _try(self, record: _Record) -> bool:
        """Writes a record where it can be written; False when that is nowhere."""
        if self._journald is not None:
            while True:
                entry = encode_entry(_journal_fields(record))  # anew each time: it says when it is late
                patient = time.monotonic() < self._patient_until_s
                outcome = self._journald.send(entry, timeout_s=STALL_LOOK_S if patient else 0.0)
                if outcome is Outcome.SENT:
                    return True
                if outcome is Outcome.ABSENT or not patient:
                    break
        return self._write_stream(record)

    def _write_stream(self, record: _Record) -> bool:
        # A log that nobody reads any more (a closed pipe, a full disk) must not stop the daemon.
        try:
            self._stream.write(self._to_stream(record) + "\n")
            self._stream.flush()
        except (OSError, ValueError):
            return False
        return True

    def _write_last(self, record: _Record) -> None:
        """After the end of the writer thread, by the caller's own, which must not wait for anybody."""
        if self._journald is not None:
            # One of its own: the writer may still be using the other, if it did not end in time.
            with JournalSocket(self._socket_path) as fresh:
                if fresh.send(encode_entry(_journal_fields(record))) is Outcome.SENT:
                    return
        if _takes_a_line(self._stream):
            self._write_stream(record)


def _takes_a_line(stream: TextIO) -> bool:
    """Whether a line can be written now; only pipes, sockets and terminals may ever be full."""
    try:
        fd = stream.fileno()
        if stat.S_ISREG(os.fstat(fd).st_mode):
            return True
        poll = select.poll()
        poll.register(fd, select.POLLOUT)
        return any(found & select.POLLOUT for _, found in poll.poll(0))
    except (OSError, ValueError):
        return not stream.closed


def _is_journal_stream(stream: TextIO, environ: Mapping[str, str]) -> bool:
    """Whether `stream` is the one systemd connected to the journal (systemd.exec(5), $JOURNAL_STREAM)."""
    device, _, inode = environ.get("JOURNAL_STREAM", "").partition(":")
    try:
        found = os.fstat(stream.fileno())
        return (found.st_dev, found.st_ino) == (int(device), int(inode))
    except (OSError, ValueError):
        return False


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


def _dated(record: _Record) -> _Record:
    """For a log that dates what it gets: a record that waited says when it happened."""
    if time.monotonic() - record.queued_s < LATE_S:
        return record
    return replace(record, fields={**record.fields, "OCCURRED": _time(record.time_s)})


def _sentence(record: _Record) -> str:
    words = [f"{name}={_quoted(value)}" for name, value in record.fields.items()]
    message = "  ".join([record.event.message, " ".join(words)]) if words else record.event.message
    return message if len(message) <= MESSAGE_CHARS_MAX else message[:MESSAGE_CHARS_MAX] + "…"


def _journal_fields(record: _Record) -> dict[str, object]:
    record = _dated(record)
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
    return f"<{LEVELS[record.event.level]}>{_sentence(_dated(record))}"


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
