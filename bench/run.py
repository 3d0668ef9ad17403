"""Runs every benchmark and writes docs/benchmarks.md.

    python -m bench.run [--quick] [NAME ...]

With names or `--quick`, what was measured is only printed, and the document stays as it is.
"""

from __future__ import annotations

import datetime
import importlib
import sys
import time
import traceback
from collections.abc import Sequence

from bench.harness import ROOT
from bench.load import FULL, QUICK
from bench.report import Claim, Section, machine, table

__all__ = ["NAMES", "document", "main"]

NAMES = (
    *("overhead", "peers", "models", "batching", "overload", "idle"),
    *("answers", "hashing", "loadgen", "cuda", "swaps"),
)

INTRODUCTION = """# Benchmarks

Written by `make bench`; nothing in here is typed by hand. Each section names its own command. A figure is
worth what its machine is worth, so most are ratios: of the medians of edged and of a baseline that took turns
with it in the same run, in short slots with a pause between them. p50 is the median, p99 what one in a
hundred exceeds. Signs: ✓ the goal was reached, ✗ it was not, – there is no number to reach, or it could not
be measured here.
"""


def main(arguments: Sequence[str]) -> int:
    """Measures what is named, or everything; 1 when a goal was missed."""
    quick = "--quick" in arguments
    names = [argument for argument in arguments if argument != "--quick"]
    unknown = set(names) - set(NAMES)
    if unknown:
        print(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}", file=sys.stderr)
        return 2
    sections: list[Section] = []
    began = time.monotonic()
    for name in names or NAMES:
        module = importlib.import_module(f"bench.{name}")
        try:
            sections.append(module.measure(_say, QUICK if quick else FULL))
        except Exception as e:  # noqa: BLE001 - the others' figures are not lost for it, and it is told
            traceback.print_exc()
            failed = Claim(
                f"the benchmark `{name}`", "runs to its end", f"{type(e).__name__}: {e}"[:300], False
            )
            sections.append(Section(name, f"python -m bench.{name}", "No figures: it failed.", (failed,)))
        print(sections[-1].markdown(), flush=True)
        _say(f"{name}: done, {time.monotonic() - began:.0f} s since the start")
    if not names and not quick:
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        minutes = (time.monotonic() - began) / 60
        head = f"Measured on {today} by `make bench`, in {minutes:.0f} minutes.\n\n{machine()}\n"
        (ROOT / "docs" / "benchmarks.md").write_text(document(head, sections))
    missed = [claim for section in sections for claim in section.claims if claim.held is False]
    for claim in missed:
        print(f"not reached: {claim.text}, {claim.goal}: {claim.figure}", file=sys.stderr)
    return 1 if missed else 0


def document(head: str, sections: Sequence[Section]) -> str:
    """The whole text: first all goals in one table, then how each was measured."""
    rows = [
        (claim.text, claim.goal, claim.figure, claim.sign) for section in sections for claim in section.claims
    ]
    goals = f"## All goals\n\n{table(('what', 'goal', 'measured', ''), rows)}\n"
    return "\n".join([INTRODUCTION, head, goals, *(section.markdown() for section in sections)])


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
