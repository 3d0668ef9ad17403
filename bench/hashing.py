"""What it adds to the first answer after a start that the stored copy is hashed beside the load.

The same daemon on the same folders is started in turns as it is, and with the hash left out. That is no
setting of edged's, so the latter is a daemon whose `check_copy` this module has taken out.
"""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench.harness import Daemon
from bench.load import Effort, median
from bench.report import Claim, Progress, Section, run_alone, table
from edged.copies import check_copy
from tests import zoo

COMMAND = "python -m bench.hashing"

WIDTHS = {"10 MB": 1581, "500 MB": 11180}
"""Of a square matrix of FP32 that an input row is multiplied by: next to no work, and all of it weights."""

STARTS_MAX = 9
"""Of each kind, in turns."""

AS_IT_IS = ("-m", "edged.cli.edged")
UNHASHED = (
    "-c",
    "import sys, edged.disk; edged.disk.check_copy = lambda copy: None; "
    "from edged.cli.edged import main; sys.exit(main())",
)


def measure(progress: Progress, effort: Effort) -> Section:
    """Each size with files in the page cache and without, what ONNX Runtime optimised kept and not."""
    starts = max(1, min(STARTS_MAX, effort.slots))
    rows, claims = [], []
    for size, width in WIDTHS.items():
        daemon = Daemon(program=AS_IT_IS)
        try:
            daemon.put("m", zoo.square(width))
            _first_answer_s(daemon, width)
            daemon.stop()
            hash_s = _hash_s(daemon.root)
            added = []
            for kept, cached in itertools.product((True, False), repeat=2):
                times = _in_turns(daemon, width, starts, kept=kept, cached=cached)
                with_ms, without_ms = (1000 * median(times[each]) for each in (AS_IT_IS, UNHASHED))
                added.append((with_ms - without_ms, with_ms))
                where = f"{'kept' if kept else 'to be optimised'}, {'warm' if cached else 'cold'}"
                figures = (without_ms, with_ms, with_ms - without_ms, 1000 * hash_s)
                rows.append((f"{size}, {where}", *(f"{figure:.0f}" for figure in figures)))
                progress(f"hashing: {rows[-1]}")
            text = f"start to first answer, {size}: the most that hashing the copy adds"
            claims.append(Claim(text, "told", "{:+.0f} ms of {:.0f}".format(*max(added)), None))
        finally:
            daemon.close()
    columns = (
        "model, its optimised form, files",
        "without, ms",
        "with, ms",
        "added, ms",
        "the hash alone, ms",
    )
    text = f"""
One model, a row times a square matrix, on ONNX Runtime. From the start of the daemon's process to the first
answer, the model known and its copy in the store: medians of {starts} starts with the copy hashed beside
the load, and as many with the hash left out, in turns. ONNX Runtime's optimised form of the model is kept in
the cache directory (a worker maps that, and hashes it itself, and does not read the model's weights), or was
deleted before each start. Cold: the daemon's files were dropped from the page cache before each start. The
hash alone is of a copy in the page cache.

{table(columns, rows)}
"""
    return Section("Hashing what is loaded", COMMAND, text, tuple(claims))


def _in_turns(
    daemon: Daemon, width: int, starts: int, *, kept: bool, cached: bool
) -> dict[tuple[str, ...], list[float]]:
    times: dict[tuple[str, ...], list[float]] = {AS_IT_IS: [], UNHASHED: []}
    for program in (AS_IT_IS, UNHASHED) * starts:
        files = [path for part in ("state", "cache", "models") for path in _files(daemon.root / part)]
        for path in files:
            if not kept and "cache" in path.relative_to(daemon.root).parts:
                path.unlink()
            elif not cached:
                _drop_from_cache(path)
            else:
                path.read_bytes()
        daemon.program = program
        times[program].append(_first_answer_s(daemon, width))
        daemon.stop()
    return times


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _drop_from_cache(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # only clean pages go
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _first_answer_s(daemon: Daemon, width: int) -> float:
    """Starts the daemon; from there to the model's first answer."""
    daemon.start()
    with daemon.client() as client:
        answer: Any = client.infer("m", {"x": np.ones((1, width), np.float32)})
        took_s = time.monotonic() - daemon.started_ns / 1e9
    assert answer["y"].shape == (1, width)
    _wait_kept(daemon)
    return took_s


def _wait_kept(daemon: Daemon) -> None:
    """Lets the worker finish writing down what it has optimised, which is no part of what is measured."""
    deadline = time.monotonic() + 60
    folder = daemon.root / "cache" / "onnxruntime"
    while time.monotonic() < deadline:
        names = [path.name for path in folder.iterdir()] if folder.exists() else []
        if names and not any(name.startswith(".") for name in names):
            return
        time.sleep(0.05)
    raise RuntimeError(f"nothing was kept in {folder}")


def _hash_s(root: Path) -> float:
    (copy,) = (root / "state" / "store" / "contents").iterdir()
    check_copy(copy)
    began = time.perf_counter()
    check_copy(copy)
    return time.perf_counter() - began


if __name__ == "__main__":
    run_alone(measure)
