"""The man pages: all that the programs know, the same bytes each time, and nothing that man complains of."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edged.cli import edgectl, edged, man
from edged.config import render_documentation

ROOT = Path(__file__).resolve().parents[1]


def actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """The options and arguments of a parser and of all its commands."""
    found = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                found += actions(sub)
        else:
            found.append(action)
    return found


def plain(page: str) -> str:
    """A page without its escapes."""
    return page.replace(r"\-", "-").replace(r"\fB", "").replace(r"\fI", "").replace(r"\fR", "")


@pytest.mark.parametrize(
    ("page", "parser"), [("edged.8", edged.build_parser()), ("edgectl.1", edgectl.build_parser())]
)
def test_every_option_and_command_is_told(page: str, parser: argparse.ArgumentParser) -> None:
    """With its own words of help."""
    text = plain(man.pages()[page])
    for action in actions(parser):
        for option in action.option_strings:
            assert option in text
        words = str(action.help).replace("%%", "%").replace("…", "...").replace("×", r"\(mu")
        assert words[1:] in text
    for command in [
        c for a in parser._actions if isinstance(a, argparse._SubParsersAction) for c in a.choices
    ]:
        assert f'.SS "{command}"' in text


def test_every_setting_is_told_with_its_default() -> None:
    """Those of the daemon and those of a model, from the documentation that the checks are made of."""
    text = plain(man.pages()["edged.toml.5"])
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| ", render_documentation(), re.MULTILINE)
    assert len(rows) > 40
    for key, default in rows:
        assert f"\n.TP\n{key}\n" in text
        assert f"Default: {default.replace('`', '')}." in text
    for section in re.findall(r"^### (.*)", render_documentation(), re.MULTILINE):
        assert f'.SS "{section}"' in text


def test_the_pages_are_written_the_same_each_time(tmp_path: Path) -> None:
    """By the command, whatever the terminal, the locale and the clock; in plain ASCII."""
    for name, columns in (("a", "40"), ("b", "200")):
        environ = {**os.environ, "COLUMNS": columns, "LC_ALL": "C", "PYTHONPATH": str(ROOT)}
        subprocess.run(
            [sys.executable, "-m", "edged.cli.man", str(tmp_path / name)], check=True, env=environ, cwd=ROOT
        )
    assert sorted(each.name for each in (tmp_path / "a").iterdir()) == sorted(man.PAGES)
    for page in man.PAGES:
        raw = (tmp_path / "a" / page).read_bytes()
        assert raw == (tmp_path / "b" / page).read_bytes()
        assert raw.isascii()


@pytest.mark.parametrize("page", man.PAGES)
def test_man_has_nothing_to_complain_of(page: str, tmp_path: Path) -> None:
    """With every warning on, at the width of a terminal; what is shown has no escape left over."""
    if shutil.which("man") is None or shutil.which("groff") is None:
        pytest.skip("man-db and groff are not installed")
    file = tmp_path / page
    file.write_text(man.pages()[page])
    environ = {**os.environ, "LC_ALL": "C.UTF-8", "MANWIDTH": "80", "MAN_KEEP_FORMATTING": ""}
    done = subprocess.run(
        ["man", "--warnings", "-E", "UTF-8", "-l", str(file)],
        capture_output=True,
        text=True,
        env=environ,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "NAME" in done.stdout
    assert not re.search(r"\\f[BIR]|\\\(|\\\[", done.stdout)
    # Only what is shown as it is (an example, a path) may be wider than the page.
    wide = [line for line in done.stdout.splitlines() if len(line) > 80 and not line.startswith("       ")]
    assert wide == []


@pytest.mark.parametrize("page", man.PAGES)
def test_mandoc_has_nothing_to_complain_of(page: str, tmp_path: Path) -> None:
    """The stricter of the two; that there is no date is on purpose."""
    if shutil.which("mandoc") is None:
        pytest.skip("mandoc is not installed")
    file = tmp_path / page
    file.write_text(man.pages()[page])
    done = subprocess.run(
        ["mandoc", "-T", "lint", "-W", "warning", str(file)], capture_output=True, text=True, check=False
    )
    lines = [
        line
        for line in done.stdout.splitlines()
        if "date" not in line and "referenced manual not found" not in line
    ]
    assert lines == []


def test_text_that_roff_would_read_as_its_own_is_escaped() -> None:
    """A backslash, a line that begins with a dot, and what is no ASCII."""
    text = "- `.x` and `a-b` → **10 µs**\n  goes on\n\n```sh\n.hidden \\ -x\n```\n\n[a link](other.md) with ü"
    assert list(man.roff_of_markdown(text)) == [
        r".IP \(bu 2",
        r"\fB.x\fR and \fBa\-b\fR \(-> \fB10 \(mcs\fR goes on",
        ".PP",
        ".nf",
        r"\&.hidden \e \-x",
        ".fi",
        ".PP",
        r"a link with \[u00FC]",
    ]
    assert list(man.roff_of_markdown(".dot first")) == [".PP", r"\&.dot first"]


def test_bad_usage_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """64, as everywhere."""
    assert man.main([]) == 64
    assert man.main(["--help"]) == 64
    assert "usage" in capsys.readouterr().err
