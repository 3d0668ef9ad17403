"""The man pages, made of what the programs themselves are made of: `python -m edged.cli.man DIR`.

edged(8) and edgectl(1) come from their parsers, edged.toml(5) from the table of settings through its own
documentation. So a page cannot say anything that `--help` or the checks do not. Writes the portable part of
man(7), in ASCII, and no date: the same sources give the same bytes.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from edged.cli import edgectl, edged
from edged.cli.bundle import contents
from edged.config import render_documentation
from edged.version import __version__

__all__ = ["PAGES", "main", "pages", "roff_of_markdown"]

PAGES = ("edged.8", "edgectl.1", "edged.toml.5")

_COMMON = ("help", "json", "endpoint", "timeout")
"""Options of every command, told once."""

_SPECIAL = {
    "\\": r"\e",
    "–": r"\(en",
    "…": "...",
    "×": r"\(mu",
    "°": r"\(de",
    "µ": r"\(mc",
    "’": r"\(cq",
    "→": r"\(->",
    "≤": r"\(<=",
    "≥": r"\(>=",
    "−": r"\(mi",
}
_INLINE = re.compile(r"`([^`]+)`|\*\*([^*]+)\*\*|\[([^\]]+)\]\([^)]+\)")

_SIGNALS = (
    ("SIGTERM, SIGINT", "Stop: refuse what comes, finish what runs within server.shutdown_grace, and end."),
    ("SIGHUP", "Read the settings again; what needs a restart is named in the log."),
)
_FILES = (
    ("/etc/edged/edged.toml", "The service's settings; need not exist."),
    ("/var/lib/edged/models", "The service's models folder."),
    ("/var/lib/edged", "Private copies of models, and what was learned about them."),
    ("/var/cache/edged", "Compiled models; may be deleted while the service is stopped."),
    (
        "/run/edged",
        "The sockets: edged.sock, events.sock and lease.sock (group edged), admin.sock (group edged-admin).",
    ),
)
_BAD_DAY = (
    ("edgectl doctor", "what is wrong with the daemon, the installation and the machine, and what to type"),
    ("edgectl explain MODEL", "why a model is where it is, and what happened to it"),
    ("edgectl logs MODEL", "the model's part of the journal"),
    ("edgectl top", "what goes on now"),
    ("edgectl support-bundle", "one file for whoever helps"),
)


# ---- text -----------------------------------------------------------------------------------------------


def _text(text: str, *, code: bool = False) -> str:
    """Plain text as roff: what is special escaped, what is no ASCII named, a hyphen in code a minus."""
    plain = "".join(_SPECIAL.get(c) or (c if c.isascii() else f"\\[u{ord(c):04X}]") for c in text)
    return plain.replace("-", r"\-") if code else plain


def _line(text: str) -> str:
    """A line of text: one that begins like a request is not one."""
    return f"\\&{text}" if text.startswith((".", "'")) else text


def _prose(text: str) -> str:
    """Markdown's inline marks as fonts."""
    parts, at = [], 0
    for found in _INLINE.finditer(text):
        parts.append(_text(text[at : found.start()]))
        code, strong, link = found.groups()
        parts.append(_bold(code) if code else rf"\fB{_text(strong)}\fR" if strong else _text(link))
        at = found.end()
    return _line("".join([*parts, _text(text[at:])]))


def _bold(text: str) -> str:
    return rf"\fB{_text(text, code=True)}\fR"


def _head(name: str, section: str, title: str) -> Iterator[str]:
    yield rf".\" Made by `python -m edged.cli.man` of edged {__version__}; change the sources, not this file."
    yield f'.TH "{_text(name.upper(), code=True)}" {section} "" "edged {__version__}" "edged"'
    yield ".nh"
    yield ".ad l"
    yield ".SH NAME"
    yield rf"{_text(name, code=True)} \- {_text(title)}"


def _definitions(rows: Iterable[tuple[str, str]]) -> Iterator[str]:
    for term, text in rows:
        yield ".TP"
        yield _line(term)
        yield _prose(text)


def _example(lines: Iterable[str]) -> Iterator[str]:
    yield ".PP"
    yield ".nf"
    yield from (_line(_text(line, code=True)) for line in lines)
    yield ".fi"


# ---- parsers --------------------------------------------------------------------------------------------


def _value(action: argparse.Action) -> str:
    """How an option's value is called, as `--help` shows it."""
    if action.nargs == 0:
        return ""
    if action.choices is not None and action.metavar is None:
        return "{" + ",".join(map(str, action.choices)) + "}"
    return str(action.metavar or action.dest.upper())


def _term(action: argparse.Action) -> str:
    value = _value(action)
    if not action.option_strings:
        return rf"\fI{_text(value, code=True)}\fR"
    names = ", ".join(_bold(each) for each in action.option_strings)
    return rf"{names} \fI{_text(value, code=True)}\fR" if value else names


def _synopsis(words: Sequence[str], parser: argparse.ArgumentParser, skip: Sequence[str] = ()) -> list[str]:
    parts = [rf".B {_text(' '.join(words), code=True)}"]
    for action in parser._actions:
        if action.dest in skip or isinstance(action, argparse._SubParsersAction):
            continue
        term = _term(action).split(", ")[-1] if action.option_strings else _term(action)
        optional = action.option_strings or action.nargs in ("?", "*")
        again = " ..." if isinstance(action, argparse._AppendAction) else ""
        parts.append(f"[{term}]{again}" if optional else term)
    return parts


def _options(actions: Iterable[argparse.Action]) -> Iterator[str]:
    for action in actions:
        yield ".TP"
        yield _term(action)
        text = str(action.help or "").replace("%%", "%")
        first = text if "://" in text.partition(" ")[0] else text[:1].upper() + text[1:]
        yield _line(_text(first)) + "."


def _epilog(text: str | None) -> tuple[dict[str, str], list[str]]:
    """What an epilog says by title (`exit codes: ...`), and its other lines."""
    titled: dict[str, str] = {}
    rest: list[str] = []
    for line in (text or "").splitlines():
        title, colon, said = line.partition(": ")
        if colon and title in ("exit codes", "environment"):
            titled[title] = said
        else:
            rest.append(line)
    return titled, rest


def _exit_status(said: str) -> Iterator[str]:
    yield ".SH EXIT STATUS"
    for each in re.split(r", (?=\d)", said):
        code, _, what = each.partition(" ")
        yield from _definitions([(_bold(code), what[:1].upper() + what[1:] + ".")])


def edged_page() -> str:
    """edged(8)."""
    parser = edged.build_parser()
    titled, rest = _epilog(parser.epilog)
    lines = [
        *_head("edged", "8", "inference daemon for edge devices"),
        ".SH SYNOPSIS",
        *_synopsis(["edged"], parser),
    ]
    lines += [".SH DESCRIPTION", _prose(str(parser.description))]
    lines += [".PP", *(_prose(line) for line in rest if line)]
    lines += [".SH OPTIONS", *_options(parser._actions)]
    lines += _exit_status(titled["exit codes"])
    lines += [".SH SIGNALS", *_definitions((_bold(name), text) for name, text in _SIGNALS)]
    lines += [".SH FILES", *_definitions((_bold(name), text) for name, text in _FILES)]
    lines += [
        ".SH SEE ALSO",
        r"\fBedgectl\fR(1), \fBedged.toml\fR(5), \fBsystemctl\fR(1), \fBjournalctl\fR(1)",
    ]
    return _joined(lines)


def edgectl_page() -> str:
    """edgectl(1)."""
    parser = edgectl.build_parser()
    titled, _ = _epilog(parser.epilog)
    commands = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    lines = [*_head("edgectl", "1", "ask the edged inference daemon, and give it models"), ".SH SYNOPSIS"]
    lines += [*_synopsis(["edgectl"], parser), r"\fICOMMAND\fR ..."]
    lines += [".SH DESCRIPTION", _prose(str(parser.description))]
    lines += [".SH OPTIONS", "These may stand before the command or behind it."]
    lines += _options(a for a in parser._actions if a is not commands)
    timeout = next(a for a in commands.choices["status"]._actions if a.dest == "timeout")
    lines += _options([timeout])
    lines.append(".SH COMMANDS")
    for name, sub in commands.choices.items():
        told = [
            a for a in sub._actions if a.dest in _COMMON and (a.dest != "timeout" or a.help == timeout.help)
        ]
        lines += _command(name, sub, [a.dest for a in told])
    lines += [".SH ON A BAD DAY", *_definitions((_bold(name), f"{text}.") for name, text in _BAD_DAY)]
    lines += [".SH SUPPORT BUNDLE", "What a bundle holds, where it is to be had:"]
    lines += _definitions((_bold(name), f"{text}.") for name, text in contents().items())
    lines += _exit_status(titled["exit codes"])
    lines += [".SH ENVIRONMENT", _prose(titled["environment"] + ".")]
    lines += [".SH SEE ALSO", r"\fBedged\fR(8), \fBedged.toml\fR(5), \fBjournalctl\fR(1)"]
    return _joined(lines)


def _command(name: str, sub: argparse.ArgumentParser, told: Sequence[str]) -> Iterator[str]:
    """One command; `told` are the options that were told for all."""
    yield f'.SS "{_text(name, code=True)}"'
    yield from _synopsis(["edgectl", name], sub, told)
    yield ".PP"
    yield _prose(str(sub.description))
    yield from _options(a for a in sub._actions if a.dest not in told)
    _, rest = _epilog(sub.epilog)
    if rest:
        yield from _example(rest)


# ---- settings -------------------------------------------------------------------------------------------


def settings_page() -> str:
    """edged.toml(5)."""
    lines = [*_head("edged.toml", "5", "settings of the edged inference daemon and of its models")]
    lines += [".SH DESCRIPTION", *roff_of_markdown(render_documentation())]
    lines += [".SH SEE ALSO", r"\fBedged\fR(8), \fBedgectl\fR(1)"]
    return _joined(lines)


def roff_of_markdown(text: str) -> Iterator[str]:
    """The part of Markdown that our own pages are written in: headings, paragraphs, lists, tables, code."""
    for block in re.split(r"\n\s*\n", re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL).strip()):
        lines = block.splitlines()
        if not lines or lines[0].startswith("# "):
            continue
        if lines[0].startswith("#"):
            small, title = lines[0].startswith("###"), lines[0].lstrip("# ")
            macro = ".SS" if small else ".SH"
            yield f'{macro} "{_text(title if small else title.upper(), code=True)}"'
        elif lines[0].startswith("|"):
            yield from _table(lines)
        elif lines[0].startswith("```"):
            yield from _example(lines[1:-1])
        elif lines[0].startswith("- "):
            yield from _list(lines)
        else:
            yield ".PP"
            yield _prose(" ".join(lines))


def _list(lines: Sequence[str]) -> Iterator[str]:
    items: list[str] = []
    for line in lines:
        if line.startswith("- "):
            items.append(line[2:])
        else:
            items[-1] += f" {line.strip()}"
    for item in items:
        yield r".IP \(bu 2"
        yield _prose(item)


def _table(lines: Sequence[str]) -> Iterator[str]:
    """A row is a term, what it means, and where there are three columns its default between the two."""
    for row in lines[2:]:
        term, *middle, text = (cell.strip() for cell in row.strip().strip("|").split(" | "))
        yield ".TP"
        yield _prose(term)
        yield _prose(text)
        if middle:
            yield ".br"
            yield _prose(f"Default: {middle[0]}.")


# ---- pages ----------------------------------------------------------------------------------------------


def _joined(lines: Iterable[str]) -> str:
    kept: list[str] = []
    for line in lines:
        # A heading begins a paragraph by itself.
        if line and not (line == ".PP" and kept and kept[-1].startswith((".SH", ".SS"))):
            kept.append(line)
    return "\n".join(kept) + "\n"


def pages() -> dict[str, str]:
    """Each page's text by its file's name."""
    return dict(zip(PAGES, (edged_page(), edgectl_page(), settings_page()), strict=True))


def main(arguments: Sequence[str]) -> int:
    """Writes the pages into a directory; returns the exit code."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python -m edged.cli.man DIR", file=sys.stderr)
        return 64
    directory = Path(arguments[0])
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (directory / name).write_text(text, "ascii")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
