"""The operator's commands against the real daemon: on a good day, on a bad one, and with no daemon at all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edged.cli.edgectl import main
from tests import zoo
from tests.e2e.harness import Daemon, running_daemon

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One daemon for the module, with a model that serves and one that is refused."""
    models = {"numbered.onnx": zoo.versioned(1), "bad.onnx": b"rubbish"}
    with running_daemon(tmp_path_factory.mktemp("operator"), models=models) as daemon:
        daemon.wait_ready("numbered")
        daemon.wait_refused("bad")
        yield daemon


class Edgectl:
    """Runs edgectl in this process and reads what it printed."""

    def __init__(self, endpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
        self._endpoint = endpoint
        self._capsys = capsys

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        """Exit status, stdout, stderr."""
        code = main([*arguments, "--endpoint", self._endpoint])
        out, err = self._capsys.readouterr()
        return code, out, err

    def json(self, *arguments: str, code: int = 0) -> Any:
        """The JSON document that it printed."""
        found, out, err = self(*arguments, "--json")
        assert found == code, (out, err)
        return json.loads(out)


@pytest.fixture
def edgectl(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> Edgectl:
    """edgectl with the daemon's endpoint."""
    return Edgectl(daemon.endpoint, capsys)


# ---- doctor ---------------------------------------------------------------------------------------------


def test_doctor_finds_the_bad_model_and_nothing_else_that_fails(edgectl: Edgectl) -> None:
    """Of a daemon that somebody runs for himself."""
    document = edgectl.json("doctor", code=1)
    assert document["verdict"] == "fail"
    failed = [each for each in document["findings"] if each["level"] == "fail"]
    assert len(failed) == 1, failed
    assert failed[0]["fix"] == "edgectl explain bad"
    code, out, _ = edgectl("doctor")
    assert code == 1
    assert "→ edgectl explain bad" in out
    assert "1 fail" in out


def test_doctor_sees_the_daemons_sockets_and_directories(daemon: Daemon, edgectl: Edgectl) -> None:
    """All four sockets answer, and what is told is about this daemon's folders."""
    _, out, _ = edgectl("doctor", "--all")
    for name in ("edged.sock", "admin.sock", "events.sock", "lease.sock"):
        assert f"{daemon.run_dir}/{name} is " in out
    assert str(daemon.models) in out
    assert str(daemon.state) in out


def test_doctor_without_a_daemon_says_so_first_of_all_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """That is when it is needed most."""
    edgectl = Edgectl(f"ipc://{tmp_path}/edged.sock", capsys)
    document = edgectl.json("doctor", code=1)
    assert document["findings"][0]["text"] == "no daemon answers"
    assert len({each["area"] for each in document["findings"]}) > 10


def test_doctor_tells_of_the_sockets_that_a_killed_daemon_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are harmless, and that is what it says."""
    with running_daemon(tmp_path / "d") as daemon:
        daemon.process.kill()
        daemon.wait_end()
        document = Edgectl(daemon.endpoint, capsys).json("doctor", code=1)
        texts = [each["text"] for each in document["findings"] if each["area"] == "sockets"]
        assert any("of a daemon that is gone" in text for text in texts)
