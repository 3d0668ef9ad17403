"""What a service depends on and cannot trust: a journald and a disk that hang. Both are real, and do."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from edged.journal import LATE_S
from tests import zoo
from tests.e2e.harness import Daemon, until

pytestmark = pytest.mark.e2e


def in_namespace(journal: Path) -> list[str]:
    """A command that runs another with `journal` in the place of journald's directory."""
    unshare = shutil.which("unshare") or pytest.skip("unshare is not installed")
    own = [unshare, "--mount"] if os.geteuid() == 0 else [unshare, "--user", "--map-root-user", "--mount"]
    if subprocess.run([*own, "mount", "-t", "tmpfs", "tmpfs", "/run"], capture_output=True).returncode:
        pytest.skip("no mount namespace can be made here")
    steps = ("mount -t tmpfs tmpfs /run", "mkdir -p /run/systemd/journal")
    script = " && ".join([*steps, 'mount --bind "$0" /run/systemd/journal', 'exec "$@"'])
    return [*own, "sh", "-c", script, str(journal)]


def entries(journald: socket.socket) -> list[dict[str, str]]:
    """All that journald's socket holds."""
    found = []
    journald.setblocking(False)
    try:
        while True:
            lines = journald.recv(65536).decode().splitlines()
            found.append(dict(line.split("=", 1) for line in lines if "=" in line))
    except BlockingIOError:
        return found


def test_a_journald_that_hangs_stops_nothing(tmp_path: Path) -> None:
    """The daemon starts, serves, swaps and reloads; when journald reads again everything is there."""
    folder = tmp_path / "journal"
    folder.mkdir()
    arguments = ["--log-format", "journal", "--log-level", "debug"]
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journald,
        Daemon(tmp_path, arguments=arguments) as daemon,
    ):
        journald.bind(str(folder / "socket"))
        zoo.write(daemon.models / "m.onnx", zoo.versioned(1))
        began_s = time.monotonic()
        daemon.start(in_namespace(folder))
        for number in range(2, 8):
            zoo.write(daemon.models / "m.onnx", zoo.versioned(number))
            daemon.wait_number(number)
        daemon.signal(signal.SIGHUP)
        daemon.heard("RELOADING")
        daemon.heard("READY")
        until(lambda: time.monotonic() > began_s + 2 * LATE_S + 1, what="the first records are late")
        seen: list[dict[str, str]] = []

        def read_on() -> bool:
            seen.extend(entries(journald))
            return any(entry["EVENT"] == "config_reloaded" for entry in seen)

        until(read_on, what="journald has read what waited")
        kinds = [entry["EVENT"] for entry in seen]
        assert kinds[0] == "server_starting"
        assert "log_dropped" not in kinds
        swaps = [e["MODEL_VERSION"] for e in seen if e["EVENT"] == "model_swapped"]
        assert [int(version) for version in swaps] == list(range(2, 8))
        assert [e for e in seen if "OCCURRED" in e], "some must have waited for long"
        life = [e["EVENT"] for e in seen if e.get("MODEL") == "m"]
        assert {"worker_started", "model_loading", "model_ready", "worker_exited"} <= set(life)
        assert daemon.stop() == 0
    assert not [line for line in daemon.log().splitlines() if "daemon_bug" in line]


@pytest.mark.slow
def test_a_disk_that_hangs_does_not_stop_what_serves(tmp_path: Path) -> None:
    """Each fsync takes half a second: requests are answered and the watchdog is fed all the while."""
    strace = shutil.which("strace")
    if strace is None or subprocess.run([strace, "-o", "/dev/null", "true"], capture_output=True).returncode:
        pytest.skip("strace is not installed, or may not trace here")
    hang_s = 0.5
    slow = ["-e", "trace=fsync", "-e", f"inject=fsync:delay_enter={round(hang_s * 1e6)}"]
    prefix = [strace, "-D", "-f", "-qq", "--seccomp-bpf", *slow, "-o", str(tmp_path / "trace")]
    settings = {
        "WATCHDOG_USEC": "1000000",
        "EDGED_RESOURCES_SAMPLE": "100ms",
        "EDGED_METRICS_TEXTFILE": str(tmp_path / "edged.prom"),
        "EDGED_METRICS_INTERVAL": "1s",
    }
    with Daemon(tmp_path, settings) as daemon:
        zoo.write(daemon.models / "m.onnx", zoo.versioned(1))
        daemon.start(prefix)
        daemon.wait_ready("m")
        zoo.write(daemon.models / "other.onnx", zoo.versioned(2))
        page = tmp_path / "edged.prom"
        until(
            lambda: (
                page.exists()
                and any(
                    float(line.split()[1]) > 0.2
                    for line in page.read_text().splitlines()
                    if line.startswith("edged_disk_busy_seconds ")
                )
            ),
            what="the disk's thread hangs",
        )
        fed = 0
        while daemon.serving("other") is None:
            assert daemon.number() == 1
            daemon.heard("WATCHDOG")
            fed += 1
        assert fed > 1
        assert daemon.stop() == 0
    assert "fsync" in (tmp_path / "trace").read_text()
