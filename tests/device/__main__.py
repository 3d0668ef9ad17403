"""Builds the packages, boots a Debian, and lives an operator's day in it: `python -m tests.device`.

Prints a table of what was checked. Exit codes: 0 all good, 1 edged failed, 77 this machine cannot do it (with
`--may-skip` that is 0, and said as loudly). It takes root, debootstrap, systemd-nspawn, nsenter, and a mirror
the first time. EDGED_DEVICE_CACHE (~/.cache/edged-device) keeps the Debian that boxes are copied from.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

from tests import zoo
from tests.device.box import Box, Missing, base_tree
from tests.device.checks import CHECKS, Check
from tests.device.device import Device

ROOT = Path(__file__).resolve().parents[2]

EXIT_MISSING = 77
"""automake's word for a test that was skipped."""

BUILD_TIMEOUT_S = 900
"""Of one build of the packages, wheels fetched anew included."""

LINT_TIMEOUT_S = 600
"""lintian reads every byte twice."""

CHECKS_TIMEOUT_S = 1500
"""Of all checks together; each has its own bounds, but a daemon that answers none would use them all up."""

TOOLS = {"debootstrap": "debootstrap", "systemd-nspawn": "systemd-container", "nsenter": "util-linux"}
"""What a box takes, and Debian's packages with it."""

PACKAGES = ("edged", "edged-runtime-cpu", "edged-runtime-openvino", "python3-edged-client")


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    outcome: str
    seconds: float
    title: str
    seen: str


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="A device in a box.")
    parser.add_argument("--release", default="bookworm", help="of Debian (default: %(default)s)")
    parser.add_argument("--may-skip", action="store_true", help="a machine that cannot do it is no failure")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, _end)
    try:
        return run(args.release)
    except Missing as e:
        say(f"\n*** NOT CHECKED: the device in a box was skipped. {e}\n")
        return 0 if args.may_skip else EXIT_MISSING


def run(release: str) -> int:
    """All of it; 0 when every check passed."""
    get_tools()
    cache = Path(os.environ.get("EDGED_DEVICE_CACHE") or Path.home() / ".cache/edged-device")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="edged-device-") as folder:
        scratch = Path(folder)
        say("building the packages, twice")
        for revision in ("1", "2"):
            build(release, revision, scratch / "packages" / revision)
        lint = start_lint(scratch / "packages/1")
        try:
            say(f"making a Debian {release}, if there is none yet in {cache}")
            base = base_tree(release, cache)
            with Box(base, scratch=scratch) as box:
                device = Device(box)
                device.bring(scratch / "packages", "/packages")
                put_models(device)
                end = time.monotonic() + CHECKS_TIMEOUT_S
                for title, check in CHECKS:
                    if time.monotonic() < end:
                        rows.append(live(device, title, check))
                    else:
                        rows.append(Row("FAILED", 0, title, "no time was left for it"))
            rows.append(end_lint(lint))
        finally:
            if lint is not None and lint.poll() is None:
                lint.kill()
                lint.wait()
    say(table(rows))
    return 1 if any(row.outcome == "FAILED" for row in rows) else 0


def live(device: Device, title: str, check: Check) -> Row:
    """Runs one check; what fails costs itself only."""
    begin = time.monotonic()
    try:
        outcome, seen = "ok", check(device)
    except AssertionError as e:
        outcome, seen = "FAILED", str(e) or traceback.format_exc()
    except Exception:  # noqa: BLE001 - a check that cannot be carried out is a check that failed
        outcome, seen = "FAILED", traceback.format_exc()
    row = Row(outcome, time.monotonic() - begin, title, seen)
    say(f"{row.outcome:7}{row.seconds:6.1f} s  {row.title}: {row.seen}")
    if outcome == "FAILED":
        done = device.box.run(["journalctl", "--no-pager", "-n", "40"], check=False)
        say("".join(f"        | {line}\n" for line in done.stdout.splitlines()))
    return row


def build(release: str, revision: str, out: Path) -> None:
    """Builds the packages. Raises Missing when their wheels cannot be fetched."""
    command = [sys.executable, str(ROOT / "packaging/deb/build.py"), f"--release={release}"]
    command += [f"--revision={revision}", "--compression=quick", f"--out={out}", "--only", *PACKAGES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S)
    if done.returncode in (69, 75):
        raise Missing(done.stderr.strip())
    if done.returncode:
        raise SystemExit(f"the packages cannot be built:\n{done.stdout}{done.stderr}")
    if revision == "1":
        say(done.stdout.strip())


def start_lint(packages: Path) -> subprocess.Popen[str] | None:
    """lintian beside everything else, since it takes a minute."""
    if shutil.which("lintian") is None and not apt_install("lintian"):
        return None
    return subprocess.Popen(
        ["nice", "lintian", "--allow-root", "--fail-on=error", *map(str, sorted(packages.glob("*.deb")))],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def end_lint(lint: subprocess.Popen[str] | None) -> Row:
    """What lintian had to say."""
    title = "lintian finds no errors"
    if lint is None:
        return Row("skipped", 0, title, "lintian is not installed and cannot be")
    begin = time.monotonic()
    said, _ = lint.communicate(timeout=LINT_TIMEOUT_S)
    seen = f"{said.count('W: ')} warnings" if lint.returncode == 0 else said[-1500:]
    return Row("FAILED" if lint.returncode else "ok", time.monotonic() - begin, title, seen)


def put_models(device: Device) -> None:
    """Models for the device that are not in the packages."""
    folder = device.box.tree / "opt/models"
    folder.mkdir(parents=True)
    zoo.write(folder / "mlp.onnx", zoo.mlp(seed=1))
    zoo.write(folder / "mlp2.onnx", zoo.mlp(seed=2))
    zoo.write(folder / "large.onnx", zoo.mlp((64, 4096, 300, 10), seed=3))  # 6 MB
    np.save(folder / "image.npy", np.ones((1, 64), np.float32))
    for each in folder.iterdir():
        each.chmod(0o644)
    folder.chmod(0o755)


def get_tools() -> None:
    """Sees to root and the tools. Raises Missing."""
    if os.geteuid() != 0:
        raise Missing("it takes root.")
    missing = [package for tool, package in TOOLS.items() if shutil.which(tool) is None]
    if missing and not apt_install(*missing):
        raise Missing(f"these are not installed, and could not be: {', '.join(missing)}.")


def apt_install(*packages: str) -> bool:
    """Tries to install Debian packages on this machine; says what it does."""
    if shutil.which("apt-get") is None:
        return False
    say(f"installing {', '.join(packages)}")
    environ = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (
        ["apt-get", "-qq", "update"],
        ["apt-get", "-qq", "-y", "--no-install-recommends", "install", *packages],
    ):
        try:
            subprocess.run(
                command,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                timeout=300,
                check=True,
            )
        except (OSError, subprocess.SubprocessError) as e:
            say(f"{' '.join(command)}: {e}")
            return False
    return True


def table(rows: Sequence[Row]) -> str:
    """What was checked, for people."""
    width = max(len(row.title) for row in rows)
    lines = [f"\n{'':8}{'seconds':>8}  {'what':{width}}  seen"]
    lines += [
        f"{r.outcome:8}{r.seconds:8.1f}  {r.title:{width}}  {' '.join(r.seen.split())[:160]}" for r in rows
    ]
    failed = sum(row.outcome == "FAILED" for row in rows)
    lines.append(f"\n{len(rows)} checks, {failed} failed, {sum(row.seconds for row in rows):.0f} s")
    return "\n".join(lines)


def say(text: str) -> None:
    print(text, flush=True)


def _end(_number: int, _frame: object) -> NoReturn:
    raise SystemExit(143)


if __name__ == "__main__":
    sys.exit(main())
