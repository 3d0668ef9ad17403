"""What a benchmark hands back, and how it is written down. Pure but for the figures of the machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Claim", "Progress", "Section", "machine", "percentile", "run_alone", "table"]

Progress = Callable[[str], None]
"""Called with one line now and then, for whoever waits."""


@dataclass(frozen=True)
class Claim:
    """Something that the project promises, the figure measured for it, and whether it held."""

    text: str
    figure: str
    held: bool

    def __str__(self) -> str:
        return f"- {'✓' if self.held else '✗'} {self.text}: **{self.figure}**"


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


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; the first column to the left, the others to the right."""
    lines = ["| " + " | ".join(head) + " |", "| --- " + "| ---: " * (len(head) - 1) + "|"]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def percentile(samples: Sequence[float], share: float) -> float:
    """The sample below which `share` of all lie: 0.5 is the median, no interpolation."""
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


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


def run_alone(measure: Callable[[Progress], Section]) -> None:
    """Runs one benchmark and prints its section; exits 1 if a claim did not hold."""
    section = measure(lambda line: print(line, file=sys.stderr, flush=True))
    print(section.markdown())
    sys.exit(0 if all(claim.held for claim in section.claims) else 1)
