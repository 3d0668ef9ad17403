"""The box: a Debian made by debootstrap, booted by systemd-nspawn, and commands run in it.

Owns the tree, the machine and everything that runs in it; leaving the context ends the machine by its own pid
and removes the tree, whatever happened. The machine has no network but its own loopback. It is registered
nowhere (`--register=no --keep-unit`), so that it works where the host runs no systemd.

What cannot be had here (root, a mirror, the permission to make namespaces) is `Missing`; what a command in
the box does wrong is the caller's to judge.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

__all__ = ["Box", "Missing", "NotYet", "base_tree", "until"]

PACKAGES = (
    # What the packages under test depend on, and nothing that they might be missing.
    *("systemd", "systemd-sysv", "dbus", "python3", "procps"),
    *("python3-msgpack", "python3-numpy", "python3-zmq"),
)

UBUNTU = ("noble",)
"""Releases that are not Debian's."""

BASE_TIMEOUT_S = 900
"""To make the tree that boxes are copied from; it takes a minute with a mirror nearby."""

BOOT_TIMEOUT_S = 120
"""From start to a system that is up; seconds on an idle machine."""

COMMAND_TIMEOUT_S = 60
"""Of a command in the box that does not say otherwise."""

REBOOT = 133
"""How systemd-nspawn ends when the machine wants to start again and nobody manages it."""

_PR_SET_PDEATHSIG = 1
"""From linux/prctl.h."""

_ENVIRONMENT = (
    "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LANG=C.UTF-8",
    "HOME=/root",
)

_T = TypeVar("_T")


class Missing(Exception):
    """This machine cannot have a box; the text says what is missing. No fault of edged's."""


class NotYet(AssertionError):
    """What was waited for did not come in time."""


def until(question: Callable[[], _T], *, what: str, timeout_s: float) -> _T:
    """Asks until the answer is true and returns it. Raises NotYet after `timeout_s`."""
    end = time.monotonic() + timeout_s
    while not (answer := question()):
        if time.monotonic() >= end:
            raise NotYet(f"not within {timeout_s:g} s: {what}")
        time.sleep(0.2)
    return answer


def base_tree(release: str, cache: Path) -> Path:
    """The tree that boxes are copied from, made once. Raises Missing."""
    key = hashlib.sha256(" ".join(PACKAGES).encode()).hexdigest()[:8]
    kept = cache / f"{release}-{key}"
    if kept.is_dir():
        return kept
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix="making-") as scratch:
        tree = Path(scratch) / "tree"
        _make(["debootstrap", "--variant=minbase", *_source(release, tree)])
        apt = ["chroot", str(tree), "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-q"]
        _make([*apt, "update"])
        _make([*apt, "install", "-y", "--no-install-recommends", *PACKAGES])
        _make([*apt, "clean"])
        tree.rename(kept)
    return kept


def _source(release: str, tree: Path) -> list[str]:
    """The end of debootstrap's command line. Ubuntu's releases have their keys, mirror and script named."""
    mirror = os.environ.get("EDGED_DEBIAN_MIRROR")
    if release not in UBUNTU:
        return [release, str(tree), *([mirror] if mirror else [])]
    keys = Path("/usr/share/keyrings/ubuntu-archive-keyring.gpg")
    if mirror is None or not keys.exists():
        raise Missing(
            f"{release} is Ubuntu's: EDGED_DEBIAN_MIRROR must name a mirror, and {keys} must be there."
        )
    options = [f"--keyring={keys}", "--components=main,universe"]
    return [*options, release, str(tree), mirror, "/usr/share/debootstrap/scripts/gutsy"]


def _make(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=BASE_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        raise Missing(f"{command[0]} took longer than {BASE_TIMEOUT_S} s: {shlex.join(command)}") from None
    except OSError as e:
        raise Missing(f"{command[0]}: {e.strerror}") from None
    if done.returncode:
        raise Missing(f"{shlex.join(command)} failed:\n{done.stdout[-1500:]}")


class Box:
    """One machine; a context manager."""

    def __init__(self, base: Path, *, scratch: Path) -> None:
        self._base = base
        self.tree = scratch / "tree"
        self._console = scratch / "console.log"
        self._machine: subprocess.Popen[bytes] | None = None
        self._leader = 0

    def __enter__(self) -> Box:
        _make(["cp", "-a", "--reflink=auto", str(self._base), str(self.tree)])
        # The host's name for the machine must not be looked up, nor its resolver asked.
        (self.tree / "etc/hostname").write_text("device\n")
        (self.tree / "etc/resolv.conf").write_text("")
        self.boot()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()
        shutil.rmtree(self.tree, ignore_errors=True)

    def boot(self) -> float:
        """Starts the machine; returns after how many seconds it was up. Raises Missing."""
        begin = time.monotonic()
        with self._console.open("ab") as console:
            self._machine = subprocess.Popen(
                [
                    "systemd-nspawn",
                    *("--register=no", "--keep-unit", "--boot", "--quiet", "--private-network"),
                    *("--resolv-conf=off", "--timezone=off", "--link-journal=no", "--console=pipe"),
                    f"--machine=edged-device-{os.getpid()}",
                    f"--directory={self.tree}",
                    # To the machine's systemd: one of 256 or later refuses a host that has control groups v1.
                    "SYSTEMD_CGROUP_ENABLE_LEGACY_FORCE=1",
                ],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                preexec_fn=_die_with_parent,
                start_new_session=True,
            )
        try:
            self._leader = until(
                self._find_leader, what="the machine's first process", timeout_s=BOOT_TIMEOUT_S
            )
            until(self._is_up, what="a system that is up", timeout_s=BOOT_TIMEOUT_S)
        except (NotYet, ChildProcessError) as e:
            raise Missing(f"no machine boots here ({e}):\n{self.console()}") from None
        return time.monotonic() - begin

    def console(self) -> str:
        """The end of what the machine has written to its console."""
        return self._console.read_text("utf-8", "replace")[-1500:]

    def end(self) -> None:
        """Ends the machine at once and waits for it; idempotent."""
        if self._machine is None:
            return
        with contextlib.suppress(ProcessLookupError):
            if self._leader:
                os.kill(self._leader, signal.SIGKILL)  # the first process takes all others with it
        if self._machine.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._machine.wait(10)
            self._machine.kill()
        self._machine.wait(10)
        self._machine, self._leader = None, 0

    def reboot(self) -> float:
        """Lets the machine start again, as an operator does; returns after how many seconds it was up."""
        begin = time.monotonic()
        assert self._machine is not None
        self.run(["systemctl", "reboot"], check=False)
        status = self._machine.wait(BOOT_TIMEOUT_S)
        assert status == REBOOT, f"systemd-nspawn ended with {status}:\n{self.console()}"
        self._machine, self._leader = None, 0
        self.boot()
        return time.monotonic() - begin

    def run(
        self,
        command: Sequence[str],
        *,
        user: str | None = None,
        check: bool = True,
        timeout_s: float = COMMAND_TIMEOUT_S,
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command in the box and returns how it ended; as root, or as a user with all its groups.

        With `check` a failure is an AssertionError with what was said.
        """
        as_user = ["runuser", "-u", user, "--"] if user else []
        try:
            done = subprocess.run(
                [*self._enter(), "env", "-i", *_ENVIRONMENT, *as_user, *command],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=timeout_s,
            )
        except subprocess.TimeoutExpired:
            raise NotYet(f"not within {timeout_s:g} s: {shlex.join(command)}") from None
        if check and done.returncode:
            raise AssertionError(
                f"{shlex.join(command)} ended with {done.returncode}: {(done.stderr or done.stdout)[-1500:]}"
            )
        return done

    def sh(self, script: str, **options: Any) -> str:
        """Runs a line of shell in the box and returns what it printed."""
        return self.run(["sh", "-euc", script], **options).stdout.strip()

    def write(self, path: str, content: str | bytes, mode: int = 0o644) -> None:
        """Writes a file of root's into the box."""
        target = self.tree / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content.encode() if isinstance(content, str) else content)
        target.chmod(mode)

    def _enter(self) -> list[str]:
        return [
            "nsenter",
            f"--target={self._leader}",
            *("--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup", "--root", "--wd", "--"),
        ]

    def _find_leader(self) -> int:
        assert self._machine is not None
        if self._machine.poll() is not None:
            raise ChildProcessError(f"systemd-nspawn ended with {self._machine.returncode}")
        wanted = self.tree.stat()
        for pid in _descendants(self._machine.pid):
            with contextlib.suppress(OSError):
                fields = dict(
                    line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
                )
                root = os.stat(f"/proc/{pid}/root")
                first = fields["NSpid"].split()[-1] == "1" and len(fields["NSpid"].split()) > 1
                if first and (root.st_dev, root.st_ino) == (wanted.st_dev, wanted.st_ino):
                    return pid
        return 0

    def _is_up(self) -> bool:
        assert self._machine is not None
        if self._machine.poll() is not None:
            raise ChildProcessError(f"systemd-nspawn ended with {self._machine.returncode}")
        state = self.run(["systemctl", "is-system-running"], check=False).stdout.strip()
        return state in ("running", "degraded")


def _descendants(pid: int) -> Iterator[int]:
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in task.read_text().split():
                yield int(child)
                yield from _descendants(int(child))


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
