"""What a benchmark hands back, and how it is written down. Pure but for the figures of the machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.load import FULL, QUICK, Effort

__all__ = [
    "Claim",
    "Measure",
    "Progress",
    "Section",
    "at_least",
    "at_most",
    "machine",
    "micros",
    "not_measured",
    "run_alone",
    "table",
]

Progress = Callable[[str], None]
"""Called with one line now and then, for whoever waits."""


@dataclass(frozen=True)
class Claim:
    """A figure that is aimed at, what was measured, and whether it was reached.

    None where that cannot be said: it was not measured, or the goal is no number.
    """

    text: str
    goal: str
    figure: str
    held: bool | None

    @property
    def sign(self) -> str:
        """One sign for a table."""
        return {True: "✓", False: "✗", None: "–"}[self.held]

    def __str__(self) -> str:
        return f"- {self.sign} {self.text}, {self.goal}: **{self.figure}**"


def at_most(text: str, value: float, bound: float, unit: str = "×", *, note: str = "") -> Claim:
    """Something that is to be small."""
    return Claim(text, f"at most {bound:g} {unit}", _figure(value, unit, note), value <= bound)


def at_least(text: str, value: float, bound: float, unit: str = "×", *, note: str = "") -> Claim:
    """Something that is to be large."""
    return Claim(text, f"at least {bound:g} {unit}", _figure(value, unit, note), value >= bound)


def not_measured(text: str, goal: str, why: str) -> Claim:
    """A figure that this machine or this version cannot give, and the reason."""
    return Claim(text, goal, f"not measured: {why}", None)


def _figure(value: float, unit: str, note: str) -> str:
    digits = 2 if abs(value) < 100 else 1
    return f"{value:.{digits}f} {unit}" + (f" ({note})" if note else "")


@dataclass(frozen=True)
class Section:
    """One benchmark's part of the document. `text` is Markdown that says what was measured and how."""

    title: str
    command: str
    text: str
    claims: Sequence[Claim] = field(default_factory=tuple)

    def markdown(self) -> str:
        """The section as it stands in the document."""
        claims = "\n".join(str(claim) for claim in self.claims)
        return f"## {self.title}\n\n`{self.command}`\n\n{self.text.strip()}\n\n{claims}\n"


Measure = Callable[[Progress, Effort], Section]
"""What each benchmark's module has as `measure`."""


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; the first column to the left, the others to the right."""
    lines = ["| " + " | ".join(head) + " |", "| --- " + "| ---: " * (len(head) - 1) + "|"]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def micros(seconds: float) -> str:
    """A time in µs, as it stands in a table."""
    return f"{seconds * 1e6:,.0f}"


def machine() -> str:
    """What the figures were measured on, as Markdown."""
    packages = ("pyzmq", "msgpack", "msgspec", "numpy", "onnxruntime", "openvino", "onnx")
    versions = []
    for package in packages:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"no {package}")
    total_kib = int(_field(Path("/proc/meminfo"), "MemTotal").split()[0])
    system = platform.freedesktop_os_release().get("PRETTY_NAME", "unknown system")
    rows = [
        ("CPU", f"{_field(Path('/proc/cpuinfo'), 'model name')}, {len(os.sched_getaffinity(0))} CPUs usable"),
        ("Memory", f"{total_kib / 2**20:.1f} GiB"),
        ("System", f"{system}, Linux {platform.release()}"),
        ("Python", platform.python_version()),
        ("Packages", ", ".join(versions)),
    ]
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)])


def _field(path: Path, name: str) -> str:
    for line in path.read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return "0 unknown"


def run_alone(measure: Measure) -> None:
    """Runs one benchmark, `--quick` if told so, and prints its section; exits 1 if a goal was missed."""
    effort = QUICK if "--quick" in sys.argv[1:] else FULL
    section = measure(lambda line: print(line, file=sys.stderr, flush=True), effort)
    print(section.markdown())
    sys.exit(1 if any(claim.held is False for claim in section.claims) else 0)
