"""edgectl against the real daemon: what it prints, and the exit codes that scripts go by."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edged.cli.edgectl import main
from tests import zoo
from tests.e2e.harness import ROOT, WAIT_S, Daemon, Edgectl, running_daemon, until

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One daemon for the module."""
    models = {"digits.onnx": zoo.mlp(), "numbered.onnx": zoo.versioned(1), "bad.onnx": b"rubbish"}
    with running_daemon(tmp_path_factory.mktemp("edgectl"), models=models) as daemon:
        yield daemon


@pytest.fixture
def edgectl(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> Edgectl:
    """edgectl with the daemon's endpoint."""
    return Edgectl(daemon.endpoint, capsys)


def test_status_models_and_devices_show_what_is_so(daemon: Daemon, edgectl: Edgectl) -> None:
    """For people and as JSON."""
    for command in ("status", "models"):
        code, out, _ = edgectl(command)
        assert code == 0
        assert "digits" in out
        assert "READY" in out.upper()
        assert "bad" in out
    assert edgectl.json("status")["pid"] == daemon.pid
    listed = edgectl.json("models")
    rows = listed["models"] if isinstance(listed, dict) else listed
    assert {r["name"] for r in rows} >= {"digits", "numbered", "bad"}
    code, out, _ = edgectl("models", "--names")
    assert code == 0
    assert {"digits", "numbered"} <= set(out.split())
    code, out, _ = edgectl("devices")
    assert code == 0
    assert "onnxruntime" in out
    assert "ok" in out
    assert edgectl.json("devices")


def test_infer_takes_npy_json_and_pictures_and_gives_the_answer(edgectl: Edgectl, tmp_path: Path) -> None:
    """Each kind of input, and the outputs as JSON and as a file."""
    x = np.ones((1, 4), np.float32)
    np.save(tmp_path / "x.npy", x)
    (tmp_path / "x.json").write_text("[[1, 1, 1, 1]]")
    for given in ("x.npy", "x.json"):
        document = edgectl.json("infer", "numbered", "-i", f"x=@{tmp_path / given}", "-o", "sum")
        assert "5.0" in json.dumps(document)
    code, _, _ = edgectl(
        "infer", "numbered", "-i", f"x=@{tmp_path / 'x.npy'}", "--npz", str(tmp_path / "out.npz")
    )
    assert code == 0
    assert np.load(tmp_path / "out.npz")["sum"].tolist() == [[5.0]]
    code, _, err = edgectl("infer", "numbered", "-i", "y=1")
    assert code != 0
    assert "x" in err
    code, _, err = edgectl("infer", "nobody", "-i", "x=1")
    assert code == 1
    assert "nobody" in err


def test_stats_count(edgectl: Edgectl) -> None:
    """Of one model or of all."""
    code, out, _ = edgectl("stats", "numbered")
    assert code == 0
    assert "numbered" in out
    assert edgectl.json("stats")
    assert edgectl("stats", "nobody")[0] == 1


def test_put_waits_until_the_model_serves(daemon: Daemon, edgectl: Edgectl, tmp_path: Path) -> None:
    """0 when it serves, and what serves is what was put; 1 with the reason when it is refused."""
    source = zoo.write(tmp_path / "published.onnx", zoo.versioned(1))
    code, out, err = edgectl("put", str(source), "--wait", "--timeout", str(WAIT_S))
    assert code == 0, (out, err)
    assert daemon.number("published") == 1
    zoo.write(source, zoo.versioned(2))
    assert edgectl("put", str(source), "--wait", "--timeout", str(WAIT_S))[0] == 0
    assert daemon.number("published") == 2
    zoo.write(source, b"rubbish")
    code, out, err = edgectl("put", str(source), "--wait", "--timeout", str(WAIT_S))
    assert code == 1
    assert "refused" in out + err
    assert daemon.number("published") == 2
    zoo.write(source, zoo.versioned(2))
    assert edgectl("put", str(source), "--wait", "--timeout", str(WAIT_S))[0] == 0


def test_wait_tells_serving_refused_and_too_late_apart(daemon: Daemon, edgectl: Edgectl) -> None:
    """0, 1 and 2: what a fleet script goes by."""
    assert edgectl("wait", "digits", "--timeout", "20")[0] == 0
    digest = hashlib.sha256(zoo.mlp().SerializeToString()).hexdigest()
    assert edgectl("wait", "digits", "--sha256", digest, "--timeout", "20")[0] == 0
    code, out, err = edgectl("wait", "bad", "--timeout", "20")
    assert code == 1
    assert "bad" in out + err
    code, out, err = edgectl("wait", "digits", "--sha256", "0" * 64, "--timeout", "0.5")
    assert code == 2
    assert edgectl("wait", "never", "--timeout", "0.5")[0] == 2
    assert edgectl.json("wait", "digits", "--timeout", "20")


def test_unload_and_load(daemon: Daemon, edgectl: Edgectl) -> None:
    """Out of service with a reason that says how to get it back, and back again."""
    zoo.write(daemon.models / "switched.onnx", zoo.versioned(1))
    daemon.wait_ready("switched")
    assert edgectl("unload", "switched")[0] == 0
    until(lambda: daemon.serving("switched") is None, what="it is unloaded")
    code, _, err = edgectl("infer", "switched", "-i", "x=[[1,1,1,1]]")
    assert code == 1
    assert "MODEL_UNLOADED" in err
    assert edgectl("load", "switched")[0] == 0
    daemon.wait_ready("switched")
    assert edgectl("load", "nobody")[0] == 1


def test_watch_shows_events_as_they_come(daemon: Daemon) -> None:
    """A change of the folder shows in another process's lines, as JSON if wanted."""
    command = [sys.executable, "-m", "edged.cli.edgectl", "watch", "--count", "1", "--json"]
    command += ["--topic", "model.state", "--endpoint", daemon.endpoint]
    watching = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**daemon.environ(), "PYTHONPATH": str(ROOT)}
    )
    killer = threading.Timer(WAIT_S, watching.kill)
    killer.start()
    try:
        # When the subscription has come through cannot be heard: the folder changes until it has.
        number = [1]

        def heard() -> bool:
            if watching.poll() is not None:
                return True
            number[0] += 1
            zoo.write(daemon.models / "watched.onnx", zoo.versioned(number[0]))
            daemon.wait_number(number[0], "watched")
            return False

        until(heard, what="edgectl has seen an event")
        assert watching.stdout is not None
        line = watching.stdout.readline()
    finally:
        killer.cancel()
        watching.kill()
        watching.communicate()
    assert "watched" in line
    assert json.loads(line)


def test_a_daemon_that_is_not_there_gets_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What to start, on stderr, without a traceback; every command."""
    codes = set()
    for command in (
        ["status"],
        ["models"],
        ["devices"],
        ["stats"],
        ["load", "m"],
        ["infer", "m", "-i", "x=1"],
    ):
        codes.add(main([*command, "--endpoint", f"ipc://{tmp_path}/edged.sock"]))
        err = capsys.readouterr().err
        assert "start" in err
        assert "Traceback" not in err
    assert len(codes) == 1
    assert codes.isdisjoint({0, 1, 2})
