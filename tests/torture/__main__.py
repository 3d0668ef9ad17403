"""`python -m tests.torture [--graphs N] [--seed S]`: random graphs against ONNX Runtime; 1 where one differs.

The graphs are tried in child processes, a few hundred in each: a runtime that dies of one ends its child,
whose seeds are named, and the rest goes on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

PORTION = 250
"""Graphs of one child process."""

PORTION_LIMIT_S = 1800.0
"""After which a child is ended: hundreds of small graphs take a minute."""


def main() -> int:
    """Tries the graphs and says what came of them."""
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__)
    parser.add_argument("--graphs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0, help="the first graph's")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return _child(arguments.seed, arguments.graphs)
    began_s = time.monotonic()
    total: Counter[str] = Counter()
    for seed in range(arguments.seed, arguments.seed + arguments.graphs, PORTION):
        count = min(PORTION, arguments.seed + arguments.graphs - seed)
        total += _portion(seed, count)
        done = seed + count - arguments.seed
        print(f"\r{done} graphs, {total['wrong']} wrong", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    took_s = time.monotonic() - began_s
    print(
        f"{arguments.graphs} graphs in {took_s:.0f} s: {total['loads']} load, {total['batched']} are "
        f"batched, {total['moved']} are moved; {total['wrong']} answered otherwise"
    )
    return 1 if total["wrong"] or not total["batched"] else 0


def _portion(seed: int, count: int) -> Counter[str]:
    command = [sys.executable, "-W", "ignore", "-m", "tests.torture", "--child"]
    command += ["--seed", str(seed), "--graphs", str(count)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=PORTION_LIMIT_S, check=False)
    if run.returncode:
        print(f"\nseeds {seed} to {seed + count - 1}: the process ended with {run.returncode}")
        print(run.stderr[-2000:])
        return Counter(wrong=1)
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    for line in found.pop("lines"):
        print(f"\n{line}")
    return Counter(found)


def _child(seed: int, count: int) -> int:
    from tests.torture.differential import try_graph

    total: Counter[str] = Counter()
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for each in range(seed, seed + count):
            outcome = try_graph(each, Path(folder))
            total.update({name: int(getattr(outcome, name)) for name in ("loads", "batched", "moved")})
            if outcome.wrong:
                total["wrong"] += 1
                lines.append(f"seed {each}: {outcome.wrong}")
    print(json.dumps({**total, "lines": lines}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
