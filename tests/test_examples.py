"""Every example is a program that works, run as a user would run it, against a real daemon."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from bench.harness import ROOT, Daemon

pytestmark = pytest.mark.e2e

sys.path.insert(0, str(ROOT / "examples"))
import silero  # noqa: E402 - found by the line above

sys.path.pop(0)


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    """A daemon that serves models/."""
    with Daemon(ROOT / "models") as running:
        yield running


def example(daemon: Daemon, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs an example to its end."""
    environ = {**os.environ, "EDGED_ENDPOINT": daemon.endpoint, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "examples" / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environ, timeout=100, check=False)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("classify_digits.py", "12 of 12 right"),
        ("async_client.py", "of 360 right"),
        ("onnxruntime_drop_in.py", "of 360 right, in one batch"),
        ("req_client.py", "made by"),
    ],
)
def test_example_ends_well(daemon: Daemon, name: str, says: str) -> None:
    """It exits 0, says what it should, and has nothing to complain about."""
    done = example(daemon, name)
    assert done.returncode == 0, done.stdout + done.stderr
    assert says in done.stdout
    assert done.stderr == ""


def test_req_client_says_what_to_start_when_nothing_is_there(daemon: Daemon, tmp_path: Path) -> None:
    """No daemon is a sentence and an exit status, not a traceback."""
    done = example(daemon, "req_client.py", f"ipc://{tmp_path}/none.sock")
    assert done.returncode == 1
    assert "no daemon answers" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def fast_lane(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example in C, compiled without a complaint."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler is installed")
    program = tmp_path_factory.mktemp("c") / "fast_lane"
    command = [
        compiler,
        "-std=c11",
        "-D_GNU_SOURCE",
        "-O2",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-o",
        str(program),
    ]
    subprocess.run([*command, str(ROOT / "examples" / "fast_lane.c")], check=True, timeout=100)
    return program


def test_the_fast_lane_from_c(daemon: Daemon, fast_lane: Path) -> None:
    """The protocol's page is enough to write a client from, in a language without its libraries."""
    lane = str(daemon.root / "run" / "lease.sock")
    with np.load(ROOT / "examples" / "digits-heldout.npz") as data:
        for image, label in zip(data["images"][:8], data["labels"][:8], strict=True):
            pixels = " ".join(str(float(pixel)) for pixel in image)
            done = subprocess.run([fast_lane, lane], input=pixels, capture_output=True, text=True, timeout=60)
            assert done.stdout == f"reads {int(label)}\n", done.stderr


def test_the_fast_lane_from_c_says_what_is_wrong(daemon: Daemon, fast_lane: Path, tmp_path: Path) -> None:
    """No daemon, and no digit."""
    pixels = "0 " * 64
    done = subprocess.run([fast_lane, tmp_path / "no.sock"], input=pixels, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    done = subprocess.run([fast_lane], input="1 2", capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")


def test_vad_hears_the_sentence_between_the_silences(daemon: Daemon) -> None:
    """A stateful network through the daemon: silence, speech, silence."""
    if shutil.which("espeak-ng") is None:
        pytest.skip("espeak-ng is not installed: no speech to listen to")
    try:
        model = silero.silero_model()
    except silero.NotAvailable as reason:
        pytest.skip(f"no Silero network: {reason}")
    environ = {**os.environ, "EDGED_ENDPOINT": daemon.endpoint, "PYTHONPATH": str(ROOT)}
    put = [sys.executable, "-m", "edged.cli.edgectl", "put", str(model), "--name", "silero_vad"]
    put += ["--models", str(daemon.models), "--wait", "--timeout", "60"]
    done = subprocess.run(put, capture_output=True, text=True, env=environ, timeout=90, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    done = example(daemon, "vad.py")
    assert done.returncode == 0, done.stdout + done.stderr
    bars = done.stdout.splitlines()[0]
    assert set(bars[:25]) <= set("▁▂▃"), "a second of silence comes first"
    assert set(bars[-20:]) <= set("▁▂▃"), "and last"
    assert bars.count("█") > 40
