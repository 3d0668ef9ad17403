"""Runs every benchmark and writes docs/benchmarks.md.

    python -m bench.run [overhead] [models] [idle] [swaps]

With names, only those are run and printed, and the document stays as it is.
"""

from __future__ import annotations

import datetime
import importlib
import sys

from bench.harness import ROOT
from bench.report import Section, machine

NAMES = ("overhead", "models", "idle", "swaps")

INTRODUCTION = """# Benchmarks

Written by `make bench`; nothing in here is typed by hand. Each section names its own command. A figure is
worth what its machine is worth: compare within one run, not between machines. p50 is the median, p99 what
one in a hundred exceeds.
"""


def main(names: list[str]) -> int:
    unknown = set(names) - set(NAMES)
    if unknown:
        print(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}", file=sys.stderr)
        return 2
    sections: list[Section] = []
    for name in names or NAMES:
        module = importlib.import_module(f"bench.{name}")
        sections.append(module.measure(lambda line: print(line, file=sys.stderr, flush=True)))
        print(sections[-1].markdown(), flush=True)
    if not names:
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        document = [INTRODUCTION, f"Measured on {today}.\n", machine() + "\n"]
        document += [section.markdown() for section in sections]
        (ROOT / "docs").mkdir(exist_ok=True)
        (ROOT / "docs" / "benchmarks.md").write_text("\n".join(document))
    missed = [claim for section in sections for claim in section.claims if not claim.held]
    for claim in missed:
        print(f"did not hold: {claim.text}: {claim.figure}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
