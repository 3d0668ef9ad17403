"""Text for people: tables fitted to the terminal, colours, figures with units.

Owns how a cell is laid out and whether a colour is used; knows nothing of what the cells mean. Pure but
for `Terminal.of`, which looks at a stream once. Strings from the daemon may hold anything a model's author
wrote, so whatever is no printable character is shown as an escape and can not steer the terminal.
"""

from __future__ import annotations

import os
import shutil
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

__all__ = [
    "Column",
    "Terminal",
    "bar",
    "bytes_text",
    "clean",
    "duration_text",
    "fields",
    "micros_text",
    "paint",
    "table",
]

WIDTH_MIN = 40
"""Narrower than this nothing is readable; such a terminal gets lines that wrap by themselves."""

_FLEX_MIN = 26
"""A column that wraps keeps at least this: shorter lines would cut most words."""

_GAP = "  "

_COLOURS = {"good": "32", "warn": "33", "bad": "31", "dim": "2", "strong": "1"}


@dataclass(frozen=True)
class Terminal:
    """What a stream can show. `width` is None where it is no terminal: then nothing is cut or wrapped."""

    width: int | None = None
    colour: bool = False

    @classmethod
    def of(cls, stream: TextIO, environ: Mapping[str, str] | None = None) -> Terminal:
        """Looks at `stream`. Colours only on a terminal that is not dumb, and never with NO_COLOR
        (https://no-color.org: any value but the empty one)."""
        env = os.environ if environ is None else environ
        if not stream.isatty():
            return cls()
        width = max(WIDTH_MIN, shutil.get_terminal_size().columns)
        return cls(width=width, colour=not env.get("NO_COLOR") and env.get("TERM") != "dumb")


@dataclass(frozen=True)
class Column:
    """One column. `drop` above 0 may be left out where the terminal is narrow, the highest first; `flex`
    wraps; `right` aligns figures; `role` paints a cell by its value."""

    title: str
    drop: int = 0
    flex: bool = False
    right: bool = False
    role: Mapping[str, str] | None = None


def clean(value: object) -> str:
    """One line of printable text; what can not be printed is shown escaped."""
    text = " ".join(str(value).split())
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def paint(text: str, role: str | None, terminal: Terminal) -> str:
    """`text` in the colour of `role` (good, warn, bad, dim, strong), where the terminal has colours."""
    code = _COLOURS.get(role or "")
    return f"\x1b[{code}m{text}\x1b[0m" if code and text and terminal.colour else text


def table(columns: Sequence[Column], rows: Iterable[Sequence[object]], terminal: Terminal) -> str:
    """The rows under their titles, as wide as they need or as the terminal is.

    An empty cell (None or "") shows as `-`. Without a terminal every column is there in full.
    """
    cells = [[clean(c) if c is not None and c != "" else "-" for c in row] for row in rows]
    natural = [max([len(c.title), *(len(row[i]) for row in cells)]) for i, c in enumerate(columns)]
    shown, widths = _fit(columns, natural, terminal.width)
    lines = [
        _line(
            [(columns[i].title.upper(), widths[n], columns[i], "dim") for n, i in enumerate(shown)], terminal
        )
    ]
    for row in cells:
        wrapped = [_wrap(row[i], widths[n]) for n, i in enumerate(shown)]
        for part in range(max(len(w) for w in wrapped)):
            parts = []
            for n, i in enumerate(shown):
                text = wrapped[n][part] if part < len(wrapped[n]) else ""
                role = (columns[i].role or {}).get(row[i])
                parts.append((text, widths[n], columns[i], role))
            lines.append(_line(parts, terminal))
    return "\n".join(lines)


def fields(pairs: Iterable[tuple[str, object]], terminal: Terminal) -> str:
    """`name  value` lines, the values aligned and wrapped; pairs without a value are left out."""
    kept = [(name, clean(value)) for name, value in pairs if value is not None and value != ""]
    left = max((len(name) for name, _ in kept), default=0) + len(_GAP)
    lines = []
    for name, value in kept:
        room = None if terminal.width is None else max(_FLEX_MIN, terminal.width - left)
        first, *rest = _wrap(value, room)
        lines.append(paint(name.ljust(left), "dim", terminal) + first)
        lines.extend(" " * left + part for part in rest)
    return "\n".join(lines)


def _fit(
    columns: Sequence[Column], natural: Sequence[int], width: int | None
) -> tuple[list[int], list[int | None]]:
    """Which columns are shown, and how wide each may be."""
    shown = list(range(len(columns)))
    if width is None:
        return shown, [natural[i] for i in shown]

    def least(i: int) -> int:
        return min(natural[i], _FLEX_MIN) if columns[i].flex else natural[i]

    def needed(chosen: Sequence[int]) -> int:
        return sum(least(i) for i in chosen) + len(_GAP) * (len(chosen) - 1)

    while needed(shown) > width and any(columns[i].drop for i in shown):
        shown.remove(max(shown, key=lambda i: (columns[i].drop, i)))
    spare = max(0, width - needed(shown))
    widths: list[int | None] = []
    for i in shown:
        grow = min(natural[i] - least(i), spare)
        spare -= grow
        widths.append(least(i) + grow)
    return shown, widths


def _wrap(text: str, width: int | None) -> list[str]:
    if width is None or len(text) <= width:
        return [text]
    return textwrap.wrap(text, width) or [text]


def _line(parts: Sequence[tuple[str, int | None, Column, str | None]], terminal: Terminal) -> str:
    out = []
    for n, (text, width, column, role) in enumerate(parts):
        last = n == len(parts) - 1
        pad = 0 if width is None else max(0, width - len(text))
        painted = paint(text, role, terminal)
        if column.right:
            out.append(" " * pad + painted)
        else:
            out.append(painted if last else painted + " " * pad)
    return _GAP.join(out).rstrip()


def bytes_text(count: Any) -> str | None:
    """`12.3 MiB`; None stays None, so that a figure that was not measured is not shown as one."""
    if not isinstance(count, (int, float)):
        return None
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def micros_text(value_us: Any) -> str | None:
    """`85 µs`, `2.31 ms`, `1.20 s`."""
    if not isinstance(value_us, (int, float)):
        return None
    if value_us < 1000:
        return f"{value_us:.0f} µs"
    if value_us < 1e6:
        return f"{value_us / 1e3:.2f} ms"
    return f"{value_us / 1e6:.2f} s"


def duration_text(value_s: Any) -> str | None:
    """`45 s`, `12 min`, `3 h 20 min`, `4 d 2 h`."""
    if not isinstance(value_s, (int, float)):
        return None
    seconds = int(value_s)
    if seconds < 120:
        return f"{seconds} s"
    if seconds < 7200:
        return f"{seconds // 60} min"
    if seconds < 172_800:
        return f"{seconds // 3600} h {seconds % 3600 // 60} min"
    return f"{seconds // 86_400} d {seconds % 86_400 // 3600} h"


def bar(done: float, total: float, width: int = 30) -> str:
    """`[##########          ]  33 %`."""
    share = 1.0 if total <= 0 else min(1.0, max(0.0, done / total))
    filled = round(share * width)
    return f"[{'#' * filled}{' ' * (width - filled)}] {share * 100:3.0f} %"
