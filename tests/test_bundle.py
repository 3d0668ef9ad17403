"""The support bundle: what is blotted out, what is bounded, and that a piece that is missing is said."""

from __future__ import annotations

import json
import os
import stat
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from edged.cli import bundle
from edged.cli.bundle import Piece, Source, blotted, pieces, write
from edged.cli.health.facts import Daemon, Process, Unit
from edged.cli.health.root import Root
from edged.cli.session import Failure, Session
from edged.errors import Unavailable
from tests.test_health_checks import HEALTHY, place, status


@pytest.mark.parametrize(
    "text",
    [
        "password = hunter2",
        'db_password="hunter2"',
        '{"api_key": "hunter2", "models": []}',
        "Environment=AWS_SECRET_ACCESS_KEY=hunter2",
        "MQTT_TOKEN: hunter2",
        "Authorization: Bearer hunter2",
        "https://ann:hunter2@example.org/models",
        "-----BEGIN EC PRIVATE KEY-----\nhunter2\n-----END EC PRIVATE KEY-----",
        "private-key='hunter2 and more'",
    ],
)
def test_what_looks_like_a_secret_is_blotted_out(text: str) -> None:
    """However it is written; the key stays, so that one sees that there was one."""
    found = blotted(text)
    assert "hunter2" not in found
    assert "looks like a secret" in found
    assert found[:5] == text[:5]


def test_what_is_none_stays_as_it_is() -> None:
    """Paths, hashes, names of models and sentences about tokens."""
    text = "models = '/var/lib/edged/models'\nsha256 abc\nMODEL=tokenizer MODEL_VERSION=3\nkey unknown\n"
    assert blotted(text) == text


def test_json_stays_json() -> None:
    """So that a tool can read it."""
    document = json.loads(blotted(json.dumps({"token": 'a "quoted" one', "b": [1], "secret_key": "x"})))
    assert document["b"] == [1]
    assert "looks like" in document["token"]


class Silent:
    """A session whose daemon is not there."""

    @property
    def client(self) -> Any:
        """Any question is refused."""
        raise Unavailable("no edged daemon answers", reason="DAEMON_NOT_RUNNING")


class Told:
    """A session whose daemon knows one model."""

    @property
    def client(self) -> Told:
        """Itself."""
        return self

    def statistics(self) -> list[dict[str, Any]]:
        """Of one model."""
        return [{"name": "digits"}]

    def repository_index(self) -> list[dict[str, Any]]:
        """Of one model."""
        return [{"name": "digits", "sha256": "a" * 64}]

    def server_status(self, model: str) -> dict[str, Any]:
        """With its history."""
        return {**status(), "history": [{"event": "model_ready", "model": model}]}


def source(root: Path, session: object, said: dict[str, tuple[int, str]], **changes: Any) -> Source:
    """Where pieces come from: a directory, a session, and commands by their first two words."""

    def run(argv: Sequence[str]) -> tuple[int, str] | None:
        return said.get(" ".join(argv[:2]))

    facts = replace(HEALTHY, config_file="/etc/edged/edged.toml", places=(place("state", "/var/lib/edged"),))
    return Source(cast(Session, session), replace(facts, **changes), Root(root), run)


def write_text(path: Path, text: str) -> None:
    """A file and its directories."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_every_piece_is_collected_and_listed(tmp_path: Path) -> None:
    """From the daemon, from systemd, from files; the list names each."""
    write_text(tmp_path / "etc/edged/edged.toml", "[server]\nmodels = '/m'\n")
    write_text(tmp_path / "proc/77/environ", "EDGED_MODELS=/m\0AWS_SECRET_ACCESS_KEY=hunter2\0HOME=/root\0")
    write_text(tmp_path / "proc/77/limits", "Max open files 65536\n")
    write_text(
        tmp_path / "proc/self/mounts", "/dev/sda1 / ext4 rw 0 0\n//nas/x /other cifs rw,user=ann 0 0\n"
    )
    write_text(tmp_path / "var/lib/edged/store/models.json", "{}")
    commands = {
        "systemctl cat": (0, "[Service]\nEnvironment=MQTT_PASSWORD=hunter2\n"),
        "systemctl show": (0, "ActiveState=active\n"),
        "journalctl --unit": (0, "a line\n"),
        "journalctl --dmesg": (0, "oom-kill\n"),
    }
    found = {each.name: each for each in pieces(source(tmp_path, Told(), commands))}
    assert set(found) == {"CONTENTS.txt", *bundle.contents()}
    assert not any("hunter2" in each.text for each in found.values())
    for name, each in found.items():
        if name.endswith(".json"):
            json.loads(each.text)
    assert found["environment.txt"].text == "EDGED_MODELS=/m\n"
    assert "ann" not in found["mounts.txt"].text
    assert "on /, ext4, rw" in found["mounts.txt"].text
    assert "store/models.json" in found["files.txt"].text
    assert json.loads(found["models.json"].text)["digits"]["history"][0]["model"] == "digits"
    assert "/proc/77/limits" in found["proc.txt"].text
    assert all(name in found["CONTENTS.txt"].text for name in found if name != "CONTENTS.txt")


def test_what_is_not_to_be_had_is_said_and_the_rest_is_there(tmp_path: Path) -> None:
    """No daemon, no systemd, no file: the bundle is written all the same."""
    changes = {
        "daemon": Daemon(reason="DAEMON_NOT_RUNNING"),
        "process": None,
        "unit": Unit("edged.service", error="no systemd"),
    }
    found = {each.name: each for each in pieces(source(tmp_path, Silent(), {}, **changes))}
    assert {"versions.json", "doctor.json", "facts.json"} <= set(found)
    assert "status.json" not in found
    assert "- statistics.json: no edged daemon answers" in found["CONTENTS.txt"].text
    assert "- journal.txt: there is nothing of the kind here" in found["CONTENTS.txt"].text


def test_a_log_too_long_keeps_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest lines are what was asked about."""
    monkeypatch.setattr(bundle, "PIECE_BYTES_MAX", 1000)
    log = tmp_path / "log"
    log.write_text("\n".join(f"line {n}" for n in range(500)))
    process = Process(77, HEALTHY.process.account, stderr=str(log)) if HEALTHY.process else None
    found = {each.name: each for each in pieces(source(tmp_path, Silent(), {}, process=process))}
    assert found["journal.txt"].text.endswith("line 499")
    assert len(found["journal.txt"].text) < 1100


def test_the_file_is_its_makers_alone_and_never_overwrites(tmp_path: Path) -> None:
    """0600 whatever the umask, and what is there stays."""
    path = tmp_path / "b.tar.gz"
    before = os.umask(0)
    try:
        size = write(path, "b", [Piece("a.txt", "a", "text \udcff")])
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert size == path.stat().st_size
    with tarfile.open(path) as tar:
        (member,) = tar.getmembers()
        assert (member.name, member.mode, member.uname) == ("b/a.txt", 0o600, "")
    with pytest.raises(Failure, match="is there already; name another file: `edgectl support-bundle FILE`"):
        write(path, "b", [])
    with pytest.raises(Failure, match="cannot be written"):
        write(tmp_path / "no" / "b.tar.gz", "b", [])
