"""Tables of operators for tests, made on the machine that runs them: edged's own may be for another.

Each has only the signatures that are named, and takes a second or two.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edged.process import bootstrap
from edged.runtimes.operators import Table, table_name, write_table
from edged.runtimes.trials import run_trials

__all__ = ["SIDES", "start", "table_of", "write_into"]

SIDES = (("onnxruntime", "CPU"), ("openvino", "CPU"))


def start(settings: Mapping[str, Any], fd: int) -> subprocess.Popen[bytes]:
    """A child that runs cases, as `edgectl operators` starts it."""
    return subprocess.Popen(
        [sys.executable, *bootstrap("runtimes.trials"), json.dumps(settings)],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=(fd,),
    )


def table_of(*signatures: str) -> Table:
    """What both runtimes do with these."""
    return run_trials(start, SIDES, only=signatures)


def write_into(folder: Path, table: Table) -> Path:
    """The table's file in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / table_name(table.sides, table.instructions)
    write_table(table, path)
    return path
