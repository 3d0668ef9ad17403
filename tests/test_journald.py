"""journald's protocol against a real datagram socket that reads, does not, goes and comes back."""

from __future__ import annotations

import array
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edged.journald import JournalSocket, Outcome, encode_entry


@pytest.fixture
def server(tmp_path: Path) -> Iterator[socket.socket]:
    with bound(tmp_path / "socket") as there:
        yield there


def bound(path: Path) -> socket.socket:
    there = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    there.bind(str(path))
    there.settimeout(30)
    return there


def decoded(data: bytes) -> dict[str, str]:
    """An entry read by the protocol's two rules."""
    found = {}
    while data:
        line, _, rest = data.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            size = int.from_bytes(rest[:8], "little")
            value, rest = rest[8 : 8 + size], rest[8 + size :]
            assert rest[:1] == b"\n"
            rest = rest[1:]
        found[name.decode()] = value.decode()
        data = rest
    return found


@given(st.dictionaries(st.from_regex(r"[A-Z][A-Z0-9_]{0,20}", fullmatch=True), st.text()))
def test_an_entry_is_read_back_as_it_was(fields: dict[str, str]) -> None:
    """Whatever stands in a value, line breaks and equals signs too."""
    fields = {name: text.encode("utf-8", "backslashreplace").decode() for name, text in fields.items()}
    assert decoded(encode_entry(fields)) == fields


def test_a_full_journald_is_not_waited_for_and_loses_nothing(tmp_path: Path, server: socket.socket) -> None:
    """It takes what its queue holds; the rest is refused at once and taken when there is room."""
    with JournalSocket(tmp_path / "socket") as way:
        sent = 0
        while way.send(b"N=%d\n" % sent) is Outcome.SENT:
            sent += 1
        assert 0 < sent < 10_000
        assert way.send(b"N=x\n", timeout_s=0.01) is Outcome.FULL
        assert [server.recv(99) for _ in range(sent)] == [b"N=%d\n" % n for n in range(sent)]
        assert way.send(b"N=x\n") is Outcome.SENT


def test_a_huge_entry_travels_as_a_sealed_memory_file(tmp_path: Path, server: socket.socket) -> None:
    """What no datagram holds comes whole."""
    entry = encode_entry({"MESSAGE": "x" * (16 << 20)})
    with JournalSocket(tmp_path / "socket") as way:
        assert way.send(entry) is Outcome.SENT
        payload, ancillary, _, _ = server.recvmsg(99, socket.CMSG_SPACE(4))
    assert payload == b""
    (_, kind, data) = ancillary[0]
    assert kind == socket.SCM_RIGHTS
    (fd,) = array.array("i", data)
    try:
        assert os.pread(fd, len(entry) + 1, 0) == entry
        with pytest.raises(PermissionError):
            os.write(fd, b"y")
    finally:
        os.close(fd)


def test_nobody_there_is_said_and_a_new_one_is_found(tmp_path: Path) -> None:
    """Before it starts, between two, and when its successor has taken the path without a pause."""
    path = tmp_path / "socket"
    with JournalSocket(path) as way:
        assert not way.present
        assert way.send(b"N=1\n") is Outcome.ABSENT
        first = bound(path)
        assert way.present
        assert way.send(b"N=2\n") is Outcome.SENT
        first.close()
        assert way.send(b"N=3\n") is Outcome.ABSENT
        path.unlink()
        with bound(path) as second:
            assert way.send(b"N=4\n") is Outcome.SENT
            assert second.recv(99) == b"N=4\n"
            path.unlink()
            assert way.send(b"N=5\n") is Outcome.ABSENT
            with bound(path) as third:
                assert way.send(b"N=6\n") is Outcome.SENT
                assert third.recv(99) == b"N=6\n"


SAME_FIELDS = {"MESSAGE": "two\nlines", "PRIORITY": "6", "MODEL": "digits=ü", "MESSAGE_ID": "0" * 32}

IN_NAMESPACE = f"""
import os, socket, subprocess, sys
subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/run"], check=True)
os.makedirs("/run/systemd/journal")
server = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
server.bind("/run/systemd/journal/socket")
from systemd import journal
journal.send(**{SAME_FIELDS!r})
sys.stdout.buffer.write(server.recv(65536))
"""


def test_systemd_s_own_library_says_the_same() -> None:
    """The reference for the protocol, where it is installed: the same fields with the same values."""
    pytest.importorskip("systemd.journal", reason="systemd-python is not installed")
    unshare = shutil.which("unshare") or pytest.skip("unshare is not installed")
    command = [unshare, "--mount"] if os.geteuid() == 0 else [unshare, "--user", "--map-root-user", "--mount"]
    if subprocess.run([*command, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True).returncode:
        pytest.skip("no mount namespace can be made here")
    run = subprocess.run([*command, sys.executable, "-c", IN_NAMESPACE], capture_output=True, timeout=60)
    assert run.returncode == 0, run.stderr
    theirs = decoded(run.stdout)
    assert {name: theirs[name] for name in SAME_FIELDS} == decoded(encode_entry(SAME_FIELDS))
