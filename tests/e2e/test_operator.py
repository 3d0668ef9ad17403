"""The operator's commands against the real daemon: on a good day, on a bad one, and with no daemon at all."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import pty
import select
import signal
import stat
import struct
import subprocess
import sys
import tarfile
import termios
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests import zoo
from tests.e2e.harness import ROOT, WAIT_S, Daemon, Edgectl, running_daemon, until

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One daemon for the module, with a model that serves and one that is refused."""
    models = {"numbered.onnx": zoo.versioned(1), "bad.onnx": b"rubbish"}
    with running_daemon(tmp_path_factory.mktemp("operator"), models=models) as daemon:
        daemon.wait_ready("numbered")
        daemon.wait_refused("bad")
        yield daemon


@pytest.fixture
def edgectl(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> Edgectl:
    """edgectl with the daemon's endpoint."""
    return Edgectl(daemon.endpoint, capsys)


# ---- doctor ---------------------------------------------------------------------------------------------


def test_doctor_finds_the_bad_model_and_nothing_else_that_fails(edgectl: Edgectl) -> None:
    """Of a daemon that somebody runs for himself."""
    document = edgectl.json("doctor", code=1)
    assert document["verdict"] == "fail"
    # What the machine that runs the test is short of is not the daemon's.
    own = ("daemon", "unit", "versions", "settings", "groups", "sockets", "models")
    failed = [f for f in document["findings"] if f["level"] == "fail" and f["area"] in own]
    assert len(failed) == 1, failed
    assert failed[0]["fix"] == "edgectl explain bad"
    code, out, _ = edgectl("doctor")
    assert code == 1
    assert "→ edgectl explain bad" in out
    assert " fail, " in out


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


# ---- explain --------------------------------------------------------------------------------------------


def test_explain_tells_where_a_model_came_from_and_what_it_does(daemon: Daemon, edgectl: Edgectl) -> None:
    """The file, the digest, the choice and its rule, and what happened."""
    code, out, _ = edgectl("explain", "numbered")
    assert code == 0
    row = daemon.serving("numbered")
    assert row is not None
    for words in (
        "numbered version 1 serves: onnxruntime on CPU",
        f"{daemon.models}/numbered.onnx",
        row["sha256"],
        "the first of [devices] order that works",
        f"worker {row['pid']}",
        "A model version is ready",
    ):
        assert words in out
    assert edgectl.json("explain", "numbered")["serves"] is True


def test_explain_tells_of_a_crash_and_of_the_restart(daemon: Daemon, edgectl: Edgectl) -> None:
    """With the signal, from the daemon's own memory of it."""
    zoo.write(daemon.models / "hit.onnx", zoo.versioned(1))
    row = daemon.wait_ready("hit")
    psutil.Process(row["pid"]).kill()

    def is_restarted() -> bool:
        history = daemon.client.server_status("hit")["history"]
        return "worker_restarted" in [each["event"] for each in history]

    until(is_restarted, what="it is restarted")
    document = edgectl.json("explain", "hit")
    events = [each["event"] for each in document["history"]]
    assert events.index("worker_crashed") < events.index("worker_restarted")
    crash = next(each for each in document["history"] if each["event"] == "worker_crashed")
    assert "SIGKILL" in crash["fields"]["REASON"]
    assert "edgectl logs hit" in document["next"]


def test_explain_of_a_refused_model_is_exit_1_with_what_to_type(edgectl: Edgectl) -> None:
    """And of one that never was, with where to look."""
    code, out, _ = edgectl("explain", "bad")
    assert code == 1
    assert "bad does not serve: MODEL_INVALID" in out
    assert "edgectl put FILE --name bad --wait" in out
    code, _, err = edgectl("explain", "nobody")
    assert code == 1
    assert "edgectl models" in err


# ---- logs -----------------------------------------------------------------------------------------------


def test_logs_of_a_daemon_that_was_started_by_hand_come_from_its_standard_error(
    daemon: Daemon, edgectl: Edgectl
) -> None:
    """The file is found by the kernel's word; only the model's lines are shown."""
    code, out, err = edgectl("logs", "numbered")
    assert code == 0
    assert f"pid {daemon.pid}" in err
    assert str(daemon.log_path) in err
    lines = [json.loads(line) for line in out.splitlines()]
    assert {each["MODEL"] for each in lines} == {"numbered"}
    assert "model_ready" in [each["event"] for each in lines]
    code, out, _ = edgectl("logs", "-n", "3")
    assert len(out.splitlines()) == 3
    code, _, err = edgectl("logs", "--since", "today")
    assert code == 1
    assert "--since is the journal's" in err


# ---- top ------------------------------------------------------------------------------------------------


def test_top_once_shows_one_interval(daemon: Daemon, edgectl: Edgectl) -> None:
    """As text for a pipe, and as JSON for a script."""
    code, out, _ = edgectl("top", "--once", "--interval", "0.1")
    assert code == 0
    assert "edged " in out
    assert "REQ/S" in out
    assert "numbered" in out
    assert "\x1b" not in out
    document = edgectl.json("top", "--interval", "0.1")
    model = next(each for each in document["models"] if each["name"] == "numbered")
    assert model["requests_per_s"] == 0.0
    assert document["resources"]["level"]


class Terminal:
    """`edgectl top` on a terminal of its own, whose keys and signals are the test's."""

    def __init__(self, endpoint: str) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
        self.before = termios.tcgetattr(slave)
        self._slave = slave
        command = [
            sys.executable,
            "-m",
            "edged.cli.edgectl",
            "top",
            "--endpoint",
            endpoint,
            "--interval",
            "0.2",
        ]
        environ = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "LINES": "", "COLUMNS": ""}
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, env=environ, cwd=ROOT
        )
        self.output = ""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(WAIT_S)
        os.close(self.master)
        os.close(self._slave)

    def read(self) -> str:
        """All that came so far."""
        while select.select([self.master], [], [], 0)[0]:
            self.output += os.read(self.master, 65536).decode("utf-8", "replace")
        return self.output

    def shows(self, words: str) -> None:
        """Waits until the words come, from now on."""
        self.read()
        start = len(self.output)
        until(lambda: words in self.read()[start:], what=lambda: f"{words!r} in {self.output[start:]!r}")

    def key(self, key: str) -> None:
        """Presses a key."""
        os.write(self.master, key.encode())

    def is_as_before(self) -> bool:
        """Whether the terminal's settings are those of the start, and its screen was given back."""
        return termios.tcgetattr(self._slave) == self.before and "\x1b[?1049l" in self.read()


def test_top_lives_on_a_terminal_and_gives_it_back_at_q(daemon: Daemon) -> None:
    """Rates appear, s changes the order, q ends it with 0."""
    with Terminal(daemon.endpoint) as terminal:
        terminal.shows("q quits, s sorts (by requests)")
        daemon.number("numbered")
        terminal.shows("requests ")
        terminal.key("s")
        terminal.shows("by latency")
        terminal.key("q")
        assert terminal.process.wait(WAIT_S) == 0
        assert terminal.is_as_before()
        assert terminal.output.endswith("\x1b[?1049l")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_top_gives_the_terminal_back_when_it_is_told_to_end(daemon: Daemon, number: int) -> None:
    """By a signal as well as by a key."""
    with Terminal(daemon.endpoint) as terminal:
        terminal.shows("q quits")
        terminal.process.send_signal(number)
        assert terminal.process.wait(WAIT_S) == 0
        assert terminal.is_as_before()


def test_top_survives_a_restart_of_the_daemon(tmp_path: Path) -> None:
    """It says that the daemon is away, and goes on when it is back."""
    with running_daemon(tmp_path / "d", models={"numbered.onnx": zoo.versioned(1)}) as daemon:
        daemon.wait_ready("numbered")
        with Terminal(daemon.endpoint) as terminal:
            terminal.shows("numbered")
            daemon.stop()
            terminal.shows("waiting for the daemon")
            daemon.start()
            terminal.shows("numbered")
            terminal.key("q")
            assert terminal.process.wait(WAIT_S) == 0
            assert terminal.is_as_before()


# ---- support-bundle -------------------------------------------------------------------------------------


def test_a_bundle_has_what_a_developer_needs_and_no_secret_and_no_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a daemon that was started with a secret in its environment."""
    secret = "correct-horse-battery"
    with running_daemon(tmp_path / "d", {"MQTT_PASSWORD": secret}, models={"m.onnx": zoo.mlp()}) as daemon:
        daemon.wait_ready("m")
        edgectl = Edgectl(daemon.endpoint, capsys)
        path = tmp_path / "bundle.tar.gz"
        code, out, _ = edgectl("support-bundle", str(path))
        assert code == 0
        assert f"tar -xzf {path}" in out
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with tarfile.open(path) as tar:
            texts = {
                member.name.partition("/")[2]: tar.extractfile(member).read()  # type: ignore[union-attr]
                for member in tar.getmembers()
            }
        assert all(name in out for name in texts)
        assert not any(secret.encode() in text for text in texts.values())
        model = (daemon.models / "m.onnx").read_bytes()
        assert not any(model[at : at + 32] in text for text in texts.values() for at in (64, len(model) // 2))
        document = json.loads(texts["models.json"])
        assert document["m"]["rows"][0]["sha256"] == hashlib.sha256(model).hexdigest()
        assert document["m"]["history"][-1]["event"] == "model_ready"
        assert json.loads(texts["status.json"])["pid"] == daemon.pid
        assert b"model_ready" in texts["journal.txt"]
        assert b"EDGED_LOADING_SETTLE=100ms" in texts["environment.txt"]
        assert b"MQTT" not in texts["environment.txt"]
        assert edgectl("support-bundle", str(path))[0] == 1
