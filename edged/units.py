"""The kinds of value that a setting can have: durations, sizes, numbers, choices, names, paths.

Each kind knows how to check what TOML gave, how to read the same from one line of text (an environment
variable, a flag), how to say what it wants, and how to show a value as TOML. Pure; a wrong value raises
`ValueProblem` with the half sentence "must be …, not …", to which the caller adds where it was found.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "Kind",
    "ValueProblem",
    "choice",
    "duration",
    "flag",
    "kind_of_text",
    "list_of",
    "memory",
    "number",
    "path",
    "quoted",
    "size",
    "whole",
    "whole_or",
]

SIZE_UNITS: dict[str, int] = {
    "B": 1,
    "kB": 1000,
    "KB": 1000,
    "MB": 1000**2,
    "GB": 1000**3,
    "TB": 1000**4,
    "KiB": 1 << 10,
    "MiB": 1 << 20,
    "GiB": 1 << 30,
    "TiB": 1 << 40,
}
DURATION_UNITS: dict[str, float] = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
SIZE_BYTES_MAX = 1 << 50
"""A pebibyte: beyond what any edge device has, so a larger figure is a slip of the pen."""
_QUOTE_CHARS_MAX = 80
_FIGURE_RE = re.compile(r"\s*([0-9]{1,18}(?:\.[0-9]{1,9})?)\s*([A-Za-z%]{0,3})\s*\Z")


class ValueProblem(ValueError):
    """What is wrong with one value: the half sentence that follows the key's name."""


@dataclass(frozen=True)
class Kind:
    """One kind of value: `wants` finishes "must be …"; `read` makes of a text what TOML would give."""

    wants: str
    parse: Callable[[object], object]
    read: Callable[[str], object]
    show: Callable[[object], str]


def quoted(value: object) -> str:
    """The value as it may stand in a message: one line, cut, control characters escaped."""
    text = repr(value)
    return text if len(text) <= _QUOTE_CHARS_MAX else text[: _QUOTE_CHARS_MAX - 1] + "…"


def _problem(wants: str, value: object) -> ValueProblem:
    return ValueProblem(f"must be {wants}, not {quoted(value)}")


def _figure(value: object) -> float | None:
    """A finite TOML number; None for anything else, booleans too."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        figure = float(value)
    except OverflowError:
        return None
    return figure if math.isfinite(figure) else None


def _text_show(value: object) -> str:
    return f'"{value}"'


def _number_show(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _number_read(text: str) -> object:
    """An int or float when the text is one, else the text itself, which the check then refuses or reads."""
    try:
        return int(text)
    except ValueError:
        try:
            return float(text)
        except ValueError:
            return text


def whole(low: int, high: int) -> Kind:
    """A whole number from `low` to `high`."""
    wants = f"a whole number from {low} to {high}"

    def parse(value: object) -> object:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise _problem(wants, value)
        return value

    return Kind(wants, parse, _number_read, _number_show)


def flag() -> Kind:
    """True or false."""
    wants = "true or false"

    def parse(value: object) -> object:
        if not isinstance(value, bool):
            raise _problem(wants, value)
        return value

    def read(text: str) -> object:
        return {"true": True, "false": False}.get(text, text)

    return Kind(wants, parse, read, lambda v: "true" if v else "false")


def whole_or(word: str, low: int, high: int) -> Kind:
    """A whole number from `low` to `high`, or one word that leaves it open."""
    numbers = whole(low, high)
    wants = f'"{word}" or {numbers.wants}'

    def parse(value: object) -> object:
        if value == word:
            return value
        try:
            return numbers.parse(value)
        except ValueProblem:
            raise _problem(wants, value) from None

    return Kind(wants, parse, numbers.read, lambda v: _text_show(v) if v == word else numbers.show(v))


def number(low: float, high: float) -> Kind:
    """A number from `low` to `high`, as a float."""
    wants = f"a number from {low:g} to {high:g}"

    def parse(value: object) -> object:
        figure = _figure(value)
        if figure is None or not low <= figure <= high:
            raise _problem(wants, value)
        return figure

    return Kind(wants, parse, _number_read, _number_show)


def duration(low_s: float, high_s: float) -> Kind:
    """Seconds as a float, written `"20s"`, `"500ms"`, `"2m"`, `"1h"` or as a number of seconds."""
    wants = f'a duration from {show_duration(low_s)} to {show_duration(high_s)} such as "20s"'

    def parse(value: object) -> object:
        seconds = _figure(value)
        if isinstance(value, str):
            match = _FIGURE_RE.match(value)
            if match is not None and match[2] in DURATION_UNITS:
                seconds = float(match[1]) * DURATION_UNITS[match[2]]
        if seconds is None or not low_s <= seconds <= high_s:
            raise _problem(wants, value)
        return seconds

    return Kind(wants, parse, _number_read, lambda value: f'"{show_duration(value)}"')


def show_duration(value: object) -> str:
    """Seconds in the largest unit that keeps them whole."""
    seconds = float(str(value))
    if seconds == 0:
        return "0s"
    for unit in ("h", "m", "s"):
        if seconds % DURATION_UNITS[unit] == 0:
            return f"{seconds / DURATION_UNITS[unit]:g}{unit}"
    return f"{seconds * 1000:g}ms"


def _parse_size(value: object) -> int | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if not isinstance(value, str):
        return None
    match = _FIGURE_RE.match(value)
    if match is None or match[2] not in SIZE_UNITS:
        return None
    return int(float(match[1]) * SIZE_UNITS[match[2]])


def size(low: int = 0, high: int = SIZE_BYTES_MAX) -> Kind:
    """Bytes as an int, written `"256MiB"`, `"2GB"` or as a number of bytes."""
    wants = f'a size from {show_size(low)} to {show_size(high)} such as "256MiB"'

    def parse(value: object) -> object:
        size_bytes = _parse_size(value)
        if size_bytes is None or not low <= size_bytes <= high:
            raise _problem(wants, value)
        return size_bytes

    return Kind(wants, parse, _number_read, lambda value: f'"{show_size(value)}"')


def show_size(value: object) -> str:
    """Bytes in the largest binary unit that keeps them whole."""
    size_bytes = int(str(value))
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if size_bytes and size_bytes % SIZE_UNITS[unit] == 0:
            return f"{size_bytes // SIZE_UNITS[unit]}{unit}"
    return f"{size_bytes}B"


def memory() -> Kind:
    """A percentage as a float from 0 to 1, or a size as an int of bytes."""
    wants = 'a percentage such as "80%", or a size such as "2GiB"'

    def parse(value: object) -> object:
        if isinstance(value, str):
            match = _FIGURE_RE.match(value)
            if match is not None and match[2] == "%" and 0 < float(match[1]) <= 100:
                return float(match[1]) / 100
        size_bytes = _parse_size(value)
        if size_bytes is None or not 0 < size_bytes <= SIZE_BYTES_MAX:
            raise _problem(wants, value)
        return size_bytes

    def show(value: object) -> str:
        return f'"{value * 100:g}%"' if isinstance(value, float) else f'"{show_size(value)}"'

    return Kind(wants, parse, _number_read, show)


def choice(*names: str) -> Kind:
    """One of a few words."""
    wants = "one of " + ", ".join(f'"{name}"' for name in names)

    def parse(value: object) -> object:
        if value not in names:
            raise _problem(wants, value)
        return value

    return Kind(wants, parse, str, _text_show)


def kind_of_text(wants: str, pattern: str) -> Kind:
    """A text that the whole of `pattern` matches."""
    compiled = re.compile(pattern)

    def parse(value: object) -> object:
        if not isinstance(value, str) or compiled.fullmatch(value) is None:
            raise _problem(wants, value)
        return value

    return Kind(wants, parse, str, _text_show)


def path() -> Kind:
    """A path as a Path; `~` and relative ones are the caller's to resolve, who knows against what."""
    wants = "a path"

    def parse(value: object) -> object:
        if not isinstance(value, str | Path) or not str(value) or "\0" in str(value):
            raise _problem(wants, value)
        return Path(value)

    return Kind(wants, parse, str, _text_show)


def list_of(item: Kind, *, length_max: int) -> Kind:
    """A list of at most `length_max` of one kind, as a tuple; comma-separated in a line of text."""
    wants = f"a list of at most {length_max}, each {item.wants}"

    def parse(value: object) -> object:
        if not isinstance(value, list | tuple) or len(value) > length_max:
            raise _problem(wants, value)
        return tuple(item.parse(each) for each in value)

    def read(text: str) -> object:
        return [item.read(part.strip()) for part in text.split(",") if part.strip()]

    def show(value: object) -> str:
        assert isinstance(value, tuple)
        return "[" + ", ".join(item.show(each) for each in value) + "]"

    return Kind(wants, parse, read, show)
