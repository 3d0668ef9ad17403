"""`edgectl logs`: what is handed over to journalctl, and what is found in a log without a journal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edged.cli import edgectl
from edged.cli.logs import about, journal_command

PLAIN = {"follow": False, "since": None, "explain": False, "as_json": False, "pager": False}


def test_the_journal_is_asked_by_unit_and_field() -> None:
    """So that the lines about one model are found without reading the others."""
    command = journal_command("edged.service", user=False, model="digits", lines=50, **PLAIN)  # type: ignore[arg-type]
    assert command == [
        *("journalctl", "--unit", "edged.service", "--lines", "50", "--no-pager"),
        "MODEL=digits",
    ]


def test_every_option_has_its_place() -> None:
    """A user's own unit, following, since when, explained, as JSON, with the pager."""
    command = journal_command(
        "edged.service",
        user=True,
        model=None,
        lines=7,
        follow=True,
        since="-2h",
        explain=True,
        as_json=True,
        pager=True,
    )
    assert command == [
        *("journalctl", "--user-unit", "edged.service", "--lines", "7", "--follow", "--since", "-2h"),
        *("--catalog", "--output", "json"),
    ]


TEXT = [
    "2026-11-22T10:00:00.000+0000 info    A model version is ready  MODEL=digits MODEL_VERSION=3",
    "2026-11-22T10:00:01.000+0000 info    A model version is ready  MODEL=digits2 MODEL_VERSION=1",
    '2026-11-22T10:00:02.000+0000 error   A worker died  MODEL="an odd name" REASON=x',
    '2026-11-22T10:00:03.000+0000 info    The daemon is ready  DETAIL="MODEL=other"',
]
JSON = [
    json.dumps({"event": "model_ready", "MODEL": "digits"}),
    json.dumps({"event": "server_ready"}),
    "{ broken",
    "[]",
]


@pytest.mark.parametrize(
    ("model", "want"),
    [(None, [*TEXT, *JSON]), ("digits", [TEXT[0], JSON[0]]), ("an odd name", [TEXT[2]]), ("other", [])],
)
def test_a_models_lines_are_found_in_both_forms_of_the_log(model: str | None, want: list[str]) -> None:
    """By the field, whole: a name that begins the same is another model."""
    assert list(about([*TEXT, *JSON], model)) == want


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH with a systemctl that knows the unit and a journalctl that says how it was called."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("EDGED_ENDPOINT", f"ipc://{tmp_path}/edged.sock")
    systemctl, journalctl = tmp_path / "systemctl", tmp_path / "journalctl"
    systemctl.write_text("#!/bin/sh\necho LoadState=loaded\n")
    journalctl.write_text('#!/bin/sh\necho "$@" > "${0%/*}/called"\nexit 5\n')
    for each in (systemctl, journalctl):
        each.chmod(0o755)
    return tmp_path


def test_a_service_that_is_down_has_its_journal_shown_all_the_same(tools: Path) -> None:
    """That is when one wants to read it; journalctl's own exit code is passed on."""
    assert edgectl.main(["logs", "digits", "-n", "9", "--since", "today"]) == 5
    called = (tools / "called").read_text()
    assert called == "--unit edged.service --lines 9 --no-pager --since today MODEL=digits\n"


def test_another_units_journal_is_shown_by_name(tools: Path) -> None:
    """A second instance has a unit of its own."""
    assert edgectl.main(["logs", "--unit", "edged@two"]) == 5
    assert "--unit edged@two.service" in (tools / "called").read_text()


def test_neither_daemon_nor_unit_is_a_sentence(tools: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With what to type next."""
    (tools / "systemctl").write_text("#!/bin/sh\necho LoadState=not-found\n")
    assert edgectl.main(["logs"]) == 1
    err = capsys.readouterr().err
    assert "there is no unit edged.service" in err
    assert "edgectl doctor" in err
