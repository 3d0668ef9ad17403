"""The service's files: systemd accepts them, the sandbox holds its promise, nothing generated is stale."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
UNIT = ROOT / "edged.service"
PACKAGING = ROOT / "packaging"

#: What we promise; the unit scored 1.0 and 0.8 when this was written (systemd 252).
EXPOSURE_MAX = 1.6
#: With HTTP on loopback, which takes the machine's own network; it scored 1.7 when this was written.
EXPOSURE_METRICS_MAX = 2.0
EXPOSURE_CPU_ONLY_MAX = 0.9


def tool(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return subprocess.run([path, *arguments], capture_output=True, text=True, timeout=60)


def settings(path: Path = UNIT) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in path.read_text("utf-8").splitlines():
        name, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(name, []).append(value)
    return found


def exposure(unit: Path) -> float:
    result = tool("systemd-analyze", "security", "--offline=true", "--no-pager", str(unit))
    found = re.search(r"exposure level for edged\.service: ([0-9.]+)", result.stdout)
    assert found is not None, result.stderr
    return float(found[1])


@pytest.mark.parametrize("source", [UNIT, PACKAGING / "edged@.service"], ids=lambda path: path.stem)
def test_systemd_accepts_the_unit_without_a_word(tmp_path: Path, source: Path) -> None:
    """`systemd-analyze verify` is clean with the daemon where the unit expects it."""
    program = tmp_path / "edged"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    unit = tmp_path / source.name.replace("@", "@cam")
    unit.write_text(source.read_text("utf-8").replace("/usr/lib/edged/bin/edged", str(program)))
    result = tool("systemd-analyze", "verify", "--man=no", str(unit))
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_a_second_daemon_shares_no_directory_with_the_first() -> None:
    """edged@NAME differs in its directories and names, and in nothing else."""
    one, more = settings(), settings(PACKAGING / "edged@.service")
    for name in ("RuntimeDirectory", "StateDirectory", "CacheDirectory", "ConfigurationDirectory"):
        assert (one.pop(name), more.pop(name)) == (["edged"], ["edged-%i"])
    assert more.pop("ExecStartPre")
    for name in ("Description", "SyslogIdentifier"):
        assert one.pop(name) != more.pop(name)
    assert one == more


def test_nothing_listens_for_the_daemon_while_it_is_stopped() -> None:
    """A socket unit would start it again for the next idle client: there is none."""
    assert not list(ROOT.glob("*.socket"))
    assert not list(PACKAGING.rglob("*.socket"))


def test_the_sandbox_is_tight_with_accelerators_allowed() -> None:
    """The exposure stays below what we promise."""
    assert exposure(UNIT) <= EXPOSURE_MAX


def test_the_sandbox_is_tighter_without_accelerators(tmp_path: Path) -> None:
    """With the drop-in in place no device node is left."""
    shutil.copy(UNIT, tmp_path)
    shutil.copytree(PACKAGING / "edged.service.d", tmp_path / "edged.service.d")
    assert exposure(tmp_path / "edged.service") <= EXPOSURE_CPU_ONLY_MAX


def test_the_sandbox_is_opened_for_metrics_to_loopback_only(tmp_path: Path) -> None:
    """The drop-in for `[metrics] listen` adds two families of addresses and takes none away."""
    shutil.copy(UNIT, tmp_path)
    folder = tmp_path / "edged.service.d"
    folder.mkdir()
    shutil.copy(PACKAGING / "prometheus" / "metrics-http.conf", folder)
    assert exposure(tmp_path / "edged.service") <= EXPOSURE_METRICS_MAX
    added = settings(folder / "metrics-http.conf")
    assert added["IPAddressAllow"] == ["localhost"]
    assert added["IPAddressDeny"] == ["any"]
    # An empty assignment would begin the list anew, without AF_UNIX.
    assert added["RestrictAddressFamilies"] == ["AF_INET AF_INET6"]


def test_what_the_daemon_relies_on_is_in_the_unit() -> None:
    """Settings whose loss would show only in the field, each with a reason in the unit or in docs."""
    unit = settings()
    for name, value in {
        "Type": "notify",
        "OOMPolicy": "continue",
        "KillMode": "mixed",
        "RuntimeDirectory": "edged",
        "RuntimeDirectoryPreserve": "yes",
        "RestrictAddressFamilies": "AF_UNIX",
        "ExecReload": "kill -HUP $MAINPID",
        "User": "edged",
        "Restart": "on-failure",
        "Delegate": "yes",
    }.items():
        assert unit[name] == [value]
    for name in ("WatchdogSec", "LimitNOFILE", "MemoryHigh", "MemoryMax", "CPUWeight", "IOWeight"):
        assert name in unit
    for name in ("StartLimitIntervalSec", "StartLimitBurst", "LogRateLimitIntervalSec", "LogRateLimitBurst"):
        assert unit[name] != ["0"], f"{name} is no bound"
    for name in ("MemoryDenyWriteExecute", "PrivateUsers", "ProcSubset", "DynamicUser"):
        assert name not in unit, f"{name} breaks the daemon: see the comment in the unit"
    allowed = " ".join(unit["DeviceAllow"])
    for node in ("char-nvidia*", "/dev/nvidiactl", "/dev/nvidia-uvm ", "char-drm", "char-accel"):
        assert node in allowed


def test_the_system_calls_that_the_daemon_needs_are_allowed() -> None:
    """Pinning threads, bounding workers, shared memory and giving the admin socket to its group."""
    listed = tool("systemd-analyze", "syscall-filter", "--no-pager")
    sets: dict[str, list[str]] = {}
    for line in listed.stdout.splitlines():
        if line.startswith("@"):
            current = sets.setdefault(line.strip(), [])
        elif line.startswith("    ") and not line.strip().startswith("#"):
            current.append(line.strip())

    def calls(name: str) -> set[str]:
        if not name.startswith("@"):
            return {name}
        return set().union(*(calls(item) for item in sets[name]))

    allowed: set[str] = set()
    for value in settings()["SystemCallFilter"]:
        names = set().union(*(calls(item) for item in value.removeprefix("~").split()))
        allowed = allowed - names if value.startswith("~") else allowed | names
    for call in (
        "sched_setaffinity",
        "prlimit64",
        "memfd_create",
        "ftruncate",
        "prctl",
        "chown",
        "sendmsg",
        "inotify_add_watch",
        "flock",
        "mbind",
    ):
        assert call in allowed, call
    for call in ("mount", "setuid", "bpf", "ptrace", "init_module", "reboot"):
        assert call not in allowed, call


def test_the_users_and_directories_are_accepted(tmp_path: Path) -> None:
    """systemd's own tools read the snippets and make what the unit and the daemon expect."""
    (tmp_path / "etc").mkdir()
    users = tool("systemd-sysusers", f"--root={tmp_path}", str(PACKAGING / "sysusers.conf"))
    assert users.returncode == 0, users.stderr
    groups = (tmp_path / "etc" / "group").read_text("utf-8")
    for group in ("video", "render", "edged-admin", "edged-drop"):
        assert re.search(rf"^{group}:x:\d+:edged$", groups, re.MULTILINE), groups
    directories = tool("systemd-tmpfiles", f"--root={tmp_path}", "--create", str(PACKAGING / "tmpfiles.conf"))
    assert "syntax" not in directories.stderr.lower()
    if directories.returncode == 0:
        assert (tmp_path / "var/lib/edged/models").stat().st_mode & 0o7777 == 0o2775


def test_what_is_generated_is_current() -> None:
    """The journal's catalog file and the operator's table are those of the catalog."""
    result = subprocess.run(
        [sys.executable, str(PACKAGING / "generate.py"), "--check"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (result.returncode, result.stderr) == (0, "")


def test_journald_takes_the_catalog(tmp_path: Path) -> None:
    """journalctl compiles the catalog file and finds each entry by its id."""
    from edged.catalog import CATALOG

    folder = tmp_path / "usr/lib/systemd/catalog"
    folder.mkdir(parents=True)
    shutil.copy(PACKAGING / "edged.catalog", folder)
    (tmp_path / "var/lib/systemd/catalog").mkdir(parents=True)
    made = tool("journalctl", f"--root={tmp_path}", "--update-catalog")
    assert (made.returncode, made.stderr) == (0, "")
    ready = CATALOG["model_ready"]
    shown = tool("journalctl", f"--root={tmp_path}", "--no-pager", "--dump-catalog", ready.message_id)
    assert f"Subject: {ready.message}" in shown.stdout, shown.stderr
    listed = tool("journalctl", f"--root={tmp_path}", "--no-pager", "--list-catalog")
    assert {line.split()[0] for line in listed.stdout.splitlines()} == {
        e.message_id for e in CATALOG.values()
    }
