"""The log: text, JSON, a real journal socket, its bounds, and the rate limiter."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edged.journal import CATALOG, Journal, RateLimiter, Summary

ROOT = Path(__file__).resolve().parent.parent


def written(level: str, format: str, *events: tuple[str, dict[str, object]]) -> str:
    stream = io.StringIO()
    with Journal(level, format, stream=stream, environ={}) as journal:  # type: ignore[arg-type]  # any level
        for kind, fields in events:
            journal.emit(kind, **fields)
    return stream.getvalue()


def test_the_catalog_has_one_id_for_each_kind() -> None:
    """Ids are 128-bit, unique, and each kind explains itself."""
    ids = [event.message_id for event in CATALOG.values()]
    assert len(set(ids)) == len(ids)
    for kind, event in CATALOG.items():
        assert re.fullmatch(r"[0-9a-f]{32}", event.message_id), kind
        assert re.fullmatch(r"[a-z_]+", kind)
        assert event.message
        assert not event.message.endswith(".")
        assert event.explain.endswith(".")
        assert event.level in ("debug", "info", "warning", "error")


def test_every_kind_says_what_to_do() -> None:
    """A command, a setting, a place to look, or that there is nothing to do."""
    verbs = "look|correct|raise|set|put|free|mount|unload|report|try|name|pin|see|run|ask|copy"
    for kind, event in CATALOG.items():
        told = re.search(rf"\b({verbs})\b|nothing to do|`[a-z]+ ", event.explain, re.IGNORECASE)
        assert told, f"{kind}: {event.explain}"


def test_text_is_one_readable_line() -> None:
    """Time, level, sentence and fields, values with spaces quoted, absent ones left out."""
    line = written(
        "info",
        "text",
        ("model_failed", {"MODEL": "digits", "REASON": "no such file", "PID": None, "N": 1.23456}),
    )
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d{4} error   A model version could not be loaded  "
        r'MODEL=digits REASON="no such file" N=1.235\n',
        line,
    )


@given(st.text())
def test_no_value_begins_a_line_or_fakes_a_field(value: str) -> None:
    """Whatever a client sends stays inside its own field."""
    text = written("info", "text", ("client_misbehaves", {"REASON": value, "CLIENT_UID": 7}))
    assert text.splitlines() == [text[:-1]]
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", text)
    assert text.endswith(" CLIENT_UID=7\n")


def test_json_lines_keep_types_and_stay_json() -> None:
    """Numbers are numbers, NaN and bytes that are no UTF-8 are text, and each line parses."""
    line = written(
        "info",
        "json",
        ("model_ready", {"MODEL": "a\udcffb\n", "MODEL_VERSION": 3, "X": float("nan"), "OK": True, "F": 1.5}),
    )
    record = json.loads(line)
    assert record["event"] == "model_ready"
    assert record["message_id"] == CATALOG["model_ready"].message_id
    assert record["level"] == "info"
    assert (record["MODEL_VERSION"], record["X"], record["OK"], record["F"]) == (3, "nan", True, 1.5)
    assert record["MODEL"] == "a\\udcffb\n"


def test_the_level_decides_and_can_be_changed() -> None:
    """What is below the level is not written; set_level holds from the next record on."""
    stream = io.StringIO()
    with Journal("warning", "text", stream=stream, environ={}) as journal:
        journal.emit("server_ready")
        journal.set_level("debug")
        journal.emit("worker_started", PID=1)
        assert journal.level == "debug"
    assert "The daemon is ready" not in stream.getvalue()
    assert "A worker process was started" in stream.getvalue()


def test_an_unknown_kind_is_recorded_as_our_own_fault() -> None:
    """A typing error in the daemon costs no record and no exception."""
    text = written("info", "text", ("no_such_kind", {"MODEL": "digits"}))
    assert CATALOG["daemon_bug"].message in text
    assert "MODEL=digits" in text
    assert "no_such_kind" in text


def test_odd_names_and_reserved_ones_are_made_to_fit() -> None:
    """The journal refuses a whole record for one bad name, so names are cleaned."""
    record = json.loads(
        written("info", "json", ("server_ready", {"_pid": 1, "a-b": 2, "MESSAGE": 3, "9": 4, "ok" * 60: 5}))
    )
    assert (record["PID"], record["A_B"], record["FIELD_MESSAGE"], record["FIELD_9"]) == (1, 2, 3, 4)
    assert record[("OK" * 60)[:64]] == 5


def test_a_huge_value_is_cut() -> None:
    """A field never fills the log; how much there was is said."""
    record = json.loads(written("info", "json", ("daemon_bug", {"DETAIL": "x" * 100_000})))
    assert len(record["DETAIL"]) < 9000
    assert record["DETAIL"].endswith("… (100000 characters)")


class StalledStream(io.StringIO):
    """A terminal that does not take anything until it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.entered = threading.Event()
        self.go_on = threading.Event()

    def write(self, text: str) -> int:
        self.entered.set()
        assert self.go_on.wait(30)
        return super().write(text)


def test_a_stalled_log_never_blocks_and_says_what_it_lost() -> None:
    """The caller goes on at once; the bound holds; the loss is counted in the log itself."""
    stream = StalledStream()
    with Journal("info", "text", stream=stream, environ={}, queue_records_max=5) as journal:
        journal.emit("server_ready")
        assert stream.entered.wait(30)
        begin = time.monotonic()
        for _ in range(105):
            journal.emit("server_ready")
        assert time.monotonic() - begin < 1.0
        assert not journal.flush(0.01)
        stream.go_on.set()
    assert stream.getvalue().count("The daemon is ready") == 6
    assert "Log records were dropped  COUNT=100\n" in stream.getvalue()


def test_a_log_that_is_gone_is_survived() -> None:
    """A closed pipe behind standard error stops nothing, and records after close are written at once."""
    read_fd, write_fd = os.pipe()
    os.close(read_fd)
    pipe = os.fdopen(write_fd, "w")
    journal = Journal("info", "text", stream=pipe, environ={})
    journal.emit("server_ready")
    assert journal.flush(30)
    journal.close()
    with contextlib.suppress(BrokenPipeError):
        pipe.close()
    stream = io.StringIO()
    other = Journal("info", "text", stream=stream, environ={})
    other.close()
    other.emit("server_stopped")
    assert "The daemon has stopped" in stream.getvalue()


def test_a_format_that_is_none_is_refused() -> None:
    """A wrong format is a fault of the configuration's check, and is named."""
    with pytest.raises(ValueError, match="'xml' is none of auto, text, json, journal"):
        Journal("info", "xml")


def test_emitting_is_cheap() -> None:
    """The main loop pays a few microseconds, whatever the log does."""
    with Journal("info", "json", stream=io.StringIO(), environ={}, queue_records_max=10_000) as journal:
        times = []
        for index in range(500):
            begin = time.perf_counter()
            journal.emit("model_ready", MODEL="digits", MODEL_VERSION=index, DEVICE="CPU")
            times.append(time.perf_counter() - begin)
    assert sorted(times)[250] < 0.0005


# What runs inside a mount namespace of its own: journald's socket is bound where libsystemd looks for it.
IN_NAMESPACE = """
import json, os, socket, subprocess, sys
from pathlib import Path
subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/run"], check=True)
Path("/run/systemd/journal").mkdir(parents=True)
server = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
server.bind("/run/systemd/journal/socket")
server.settimeout(30)
from edged.journal import Journal
stat = os.fstat(2)
with Journal("info", "auto", environ={"JOURNAL_STREAM": f"{stat.st_dev}:{stat.st_ino}"}) as journal:
    assert journal.format == "journal", journal.format
    journal.emit("model_ready", MODEL="digits", MODEL_VERSION=3, REASON="two\\nlines")
    assert journal.flush(30)
    print(json.dumps(server.recv(65536).decode("latin-1")))
    os.unlink("/run/systemd/journal/socket")
    journal.emit("server_stopped")
"""


def _namespace_command() -> list[str]:
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("unshare is not installed")
    command = [unshare, "--mount"] if os.geteuid() == 0 else [unshare, "--user", "--map-root-user", "--mount"]
    if subprocess.run([*command, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True).returncode:
        pytest.skip("no mount namespace can be made here")
    return command


def test_the_journal_gets_structured_fields() -> None:
    """A record reaches journald's socket as fields; when journald goes, standard error gets the next."""
    run = subprocess.run(
        [*_namespace_command(), sys.executable, "-c", textwrap.dedent(IN_NAMESPACE)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert run.returncode == 0, run.stderr
    datagram = json.loads(run.stdout)
    lines = datagram.split("\n")
    for line in (
        f"MESSAGE_ID={CATALOG['model_ready'].message_id}",
        "MODEL=digits",
        "MODEL_VERSION=3",
        "PRIORITY=6",
        "SYSLOG_IDENTIFIER=edged",
        "EVENT=model_ready",
        r'MESSAGE=A model version is ready  MODEL=digits MODEL_VERSION=3 REASON="two\nlines"',
    ):
        assert line in lines
    # A value of two lines goes in journald's binary form: the name alone, eight bytes of length, the value.
    assert "REASON\n\x09\0\0\0\0\0\0\0two\nlines\n" in datagram
    assert run.stderr == "<6>The daemon has stopped\n"


def test_without_a_journal_the_wish_for_one_is_answered_in_words(tmp_path: Path) -> None:
    """Records go to the stream, and one of them says why."""
    stream = io.StringIO()
    with Journal("info", "journal", stream=stream, environ={}, socket_path=tmp_path / "none") as journal:
        assert journal.format == "text"
        journal.emit("server_ready")
    first, second = stream.getvalue().splitlines()
    assert "Records go to standard error instead of the journal" in first
    assert f"nobody listens on {tmp_path / 'none'}" in first
    assert second.endswith("The daemon is ready")


class Journald:
    """A socket where journald's would be: it reads when it is asked to, goes away, and comes back."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.come()

    def come(self) -> None:
        self.socket.close()
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(self.path))
        self.socket.settimeout(30)

    def go(self) -> None:
        self.path.unlink()
        self.socket.close()

    def entry(self) -> dict[str, str]:
        text = self.socket.recv(65536).decode()
        return dict(line.split("=", 1) for line in text.splitlines() if "=" in line)


@pytest.fixture
def journald(tmp_path: Path) -> Iterator[Journald]:
    there = Journald(tmp_path / "socket")
    yield there
    there.socket.close()


def test_a_journald_that_does_not_read_costs_no_time_and_no_record(journald: Journald) -> None:
    """More records than its queue takes are accepted at once, and come in order when it reads again."""
    stream = io.StringIO()
    with Journal("info", "journal", stream=stream, environ={}, socket_path=journald.path) as journal:
        assert journal.format == "journal"
        for number in range(200):
            journal.emit("server_ready", NUMBER=number)
        assert not journal.flush(0.05)
        assert [journald.entry()["NUMBER"] for _ in range(200)] == [str(n) for n in range(200)]
        assert journal.flush(30)
    assert stream.getvalue() == ""


def test_a_record_that_waited_says_when_it_happened(journald: Journald, monkeypatch: Any) -> None:
    """The journal dates an entry when it gets it, which may be long after."""
    with Journal("info", "journal", environ={}, socket_path=journald.path) as journal:
        journal.emit("server_ready")
        assert "OCCURRED" not in journald.entry()
        monkeypatch.setattr("edged.journal.LATE_S", -1.0)
        journal.emit("server_ready")
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d{4}", journald.entry()["OCCURRED"])


def test_what_a_stalled_journald_has_no_room_for_is_counted(journald: Journald) -> None:
    """The queue's bound holds, and the journal itself is told how many are missing."""
    arguments = {"stream": io.StringIO(), "environ": {}, "queue_records_max": 20}
    with Journal("info", "journal", socket_path=journald.path, **arguments) as journal:  # type: ignore[arg-type]  # as above
        for _ in range(500):
            journal.emit("server_ready")
        seen, missing = 0, 0
        while seen + missing < 500:
            entry = journald.entry()
            seen += entry["EVENT"] == "server_ready"
            missing += int(entry.get("COUNT", 0))
        assert missing > 0
        assert seen + missing == 500


def test_a_journald_that_goes_and_comes_back(journald: Journald) -> None:
    """Standard error has what happened meanwhile; the journal gets the next record as soon as it is there."""
    stream = io.StringIO()
    with Journal("info", "journal", stream=stream, environ={}, socket_path=journald.path) as journal:
        journal.emit("server_ready", N=1)
        assert journald.entry()["N"] == "1"
        journald.go()
        journal.emit("server_ready", N=2)
        assert journal.flush(30)
        assert stream.getvalue().endswith("The daemon is ready  N=2\n")
        journald.come()
        journal.emit("server_ready", N=3)
        assert journald.entry()["N"] == "3"
    assert stream.getvalue().count("\n") == 1


def test_a_journald_that_comes_late_is_found(tmp_path: Path) -> None:
    """It need not have been there at the start."""
    stream = io.StringIO()
    with Journal("info", "journal", stream=stream, environ={}, socket_path=tmp_path / "socket") as journal:
        assert journal.flush(30)
        late = Journald(tmp_path / "socket")
        journal.emit("server_ready")
        assert late.entry()["EVENT"] == "server_ready"
        late.socket.close()
    assert "nobody listens" in stream.getvalue()
    assert stream.getvalue().count("\n") == 1


def test_closing_does_not_wait_for_journald(journald: Journald) -> None:
    """What a journald that hangs has not taken goes to standard error, and the end comes all the same."""
    stream = io.StringIO()
    journal = Journal("info", "journal", stream=stream, environ={}, socket_path=journald.path)
    for number in range(100):
        journal.emit("server_ready", NUMBER=number)
    journal.close()
    journal.emit("server_stopped")
    got = []
    journald.socket.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            got.append(int(journald.entry()["NUMBER"]))
    lines = stream.getvalue().splitlines()
    assert got
    assert "The daemon has stopped" in lines.pop()
    assert got + [int(line.rpartition("=")[2]) for line in lines] == list(range(100))


def test_a_log_that_can_be_written_nowhere_is_counted_once_it_can(journald: Journald) -> None:
    """Neither journald nor standard error: the loss is said by the first record that arrives."""

    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    with Journal("info", "journal", stream=Closed(), environ={}, socket_path=journald.path) as journal:
        journald.go()
        journal.emit("server_ready")
        journal.emit("server_ready")
        assert journal.flush(30)
        journald.come()
        journal.emit("server_ready")
        assert journald.entry()["EVENT"] == "server_ready"
        entry = journald.entry()
        assert (entry["EVENT"], entry["COUNT"]) == ("log_dropped", "2")


def test_after_the_end_a_full_pipe_is_not_waited_for() -> None:
    """A record from the very last moment is given up rather than have the process hang."""
    read_fd, write_fd = os.pipe()
    os.set_blocking(write_fd, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(write_fd, b"x" * 4096)
    os.set_blocking(write_fd, True)
    with os.fdopen(write_fd, "w") as pipe:
        journal = Journal("info", "text", stream=pipe, environ={})
        journal.close()
        journal.emit("server_stopped")
    assert b"stopped" not in os.read(read_fd, 1 << 20)
    os.close(read_fd)


def test_every_event_that_the_daemon_emits_is_in_the_catalog() -> None:
    """A kind that is emitted anywhere in the package exists."""
    kinds = {
        match
        for path in (ROOT / "edged").rglob("*.py")
        for match in re.findall(r"\.emit\(\s*\"(\w+)\"", path.read_text("utf-8"))
    }
    assert kinds - set(CATALOG) == set()


def test_first_passes_then_a_count_each_minute() -> None:
    """A flood is one line, then one count a minute, until it ends."""
    limiter = RateLimiter(interval_s=60.0)
    assert [limiter.admit("bad", 100.0 + i) for i in range(5)] == [True, False, False, False, False]
    assert limiter.due(159.0) == []
    assert limiter.due(160.0) == [Summary("bad", 4)]
    assert not limiter.admit("bad", 170.0)
    assert limiter.due(220.0) == [Summary("bad", 1)]
    assert limiter.due(280.0) == []
    assert limiter.admit("bad", 281.0)


def test_invented_keys_share_one_line() -> None:
    """The number of keys is bounded, and what is beyond is counted together."""
    limiter = RateLimiter(keys_max=2)
    assert [limiter.admit(key, 0.0) for key in "abcde"] == [True, True, True, False, False]
    assert limiter.due(60.0) == [Summary(RateLimiter.OVERFLOW, 2)]


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.floats(0, 30)), max_size=200))
def test_no_occurrence_is_lost(occurrences: list[tuple[str, float]]) -> None:
    """Lines and counts together are as many as occurrences, in any order of keys and times."""
    limiter, now, seen = RateLimiter(keys_max=4), 0.0, 0
    for key, pause in occurrences:
        now += pause
        seen += limiter.admit(key, now) + sum(summary.count for summary in limiter.due(now))
    seen += sum(summary.count for summary in limiter.due(now + 60.0))
    assert seen == len(occurrences)
