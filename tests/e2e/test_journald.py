"""The log against systemd's own journald: frozen, killed, started anew, its socket held as by systemd."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.harness import ROOT

pytestmark = pytest.mark.e2e

JOURNALD = Path("/lib/systemd/systemd-journald")

IN_NAMESPACE = """
import json, os, signal, socket, subprocess, sys, time
from pathlib import Path
from edged.journal import Journal

subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/run"], check=True)
for name in ("systemd/journal", "systemd/journald.conf.d", "log/journal"):
    Path("/run", name).mkdir(parents=True)
Path("/run/systemd/journald.conf.d/test.conf").write_text(
    "[Journal]\\nStorage=volatile\\nAudit=no\\nReadKMsg=no\\nRateLimitBurst=0\\nForwardToWall=no\\n"
)
held = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
held.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
held.bind("/run/systemd/journal/socket")


def journald():
    os.dup2(os.dup(held.fileno()), 3)  # not of 3 to itself, which would stay closed to the child
    start = 'LISTEN_FDS=1 LISTEN_PID=$$ exec "$0"'
    command = ["setpriv", "--pdeathsig", "KILL", "sh", "-c", start, sys.argv[1]]
    return subprocess.Popen(command, close_fds=False, stderr=subprocess.DEVNULL)


def numbers():
    command = ["journalctl", "-D", "/run/log/journal", "--no-pager", "-o", "json", "MODEL=m"]
    found = subprocess.run(command, capture_output=True, text=True).stdout
    return [json.loads(line)["NUMBER"] for line in found.splitlines()]


def wait_for(count):
    end = time.monotonic() + 60
    while len(numbers()) < count and time.monotonic() < end:
        time.sleep(0.05)


process = journald()
with Journal("info", "journal", environ={}) as journal:
    def emit(begin, end):
        for number in range(begin, end):
            journal.emit("model_ready", MODEL="m", NUMBER=number)

    emit(0, 50)
    wait_for(50)
    os.kill(process.pid, signal.SIGSTOP)
    emit(50, 500)
    stalled = not journal.flush(0.2)
    os.kill(process.pid, signal.SIGCONT)
    wait_for(500)
    process.kill()
    process.wait()
    emit(500, 800)
    process = journald()
    emit(800, 900)
    journal.emit("daemon_bug", MODEL="m", NUMBER=900, **{f"F{n}": "y" * 8000 for n in range(60)})
    wait_for(901)
    got = numbers()
process.terminate()
process.wait()
print(json.dumps({"stalled": stalled, "numbers": got, "dropped": journal.dropped}))
"""


def test_nothing_is_lost_while_journald_hangs_and_is_started_again() -> None:
    """Nine hundred records, each once and in order, and one that is too large for a datagram."""
    if not JOURNALD.exists() or shutil.which("setpriv") is None or os.geteuid() != 0:
        pytest.skip("needs systemd-journald, setpriv, and root to start them")
    command = ["unshare", "--mount", sys.executable, "-c", IN_NAMESPACE, str(JOURNALD)]
    if subprocess.run(
        [*command[:2], "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True
    ).returncode:
        pytest.skip("no mount namespace can be made here")
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environ)
    assert run.returncode == 0, run.stderr
    told = json.loads(run.stdout)
    assert [int(n) for n in told["numbers"]] == list(range(901))
    assert told["dropped"] == 0
    assert told["stalled"]
    assert run.stderr == ""
