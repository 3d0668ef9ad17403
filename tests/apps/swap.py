"""Runs an application's own code with ONNX Runtime's session, or with edged's in its place.

What an application would change is done here for it: `onnxruntime.InferenceSession` is edged's before the
application is imported, if EDGED_ENDPOINT names a daemon. Nothing else of either is touched.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.e2e.harness import ROOT

__all__ = ["run_program", "swap_if_asked"]

_PROGRAM_TIMEOUT_S = 100
"""The slowest takes ten seconds on a machine that does nothing else."""


def swap_if_asked() -> None:
    """Puts edged's session in place, for a program that `run_program` starts."""
    if "EDGED_ENDPOINT" in os.environ:
        import onnxruntime

        from edged import InferenceSession

        onnxruntime.InferenceSession = InferenceSession


def run_program(
    name: str, *arguments: Path, endpoint: str | None = None, packages: Path | None = None
) -> dict[str, Any]:
    """What `tests/apps/NAME.py` prints: by ONNX Runtime, or by edged with an `endpoint`."""
    environ = {key: value for key, value in os.environ.items() if key != "EDGED_ENDPOINT"}
    environ["PYTHONPATH"] = os.pathsep.join(str(p) for p in (ROOT, packages) if p is not None)
    environ["ORT_DISABLE_TELEMETRY"] = "1"
    if endpoint is not None:
        environ["EDGED_ENDPOINT"] = endpoint
    done = subprocess.run(
        [sys.executable, "-m", f"tests.apps.{name}", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environ,
        timeout=_PROGRAM_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
