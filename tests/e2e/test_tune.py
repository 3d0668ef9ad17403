"""`edgectl tune` with a real daemon: a small model, a tiny budget, and what is left of it afterwards."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import zoo
from tests.e2e.harness import WAIT_S, Daemon, running_daemon, until

pytestmark = pytest.mark.e2e

MLP = {"mlp.onnx": zoo.mlp()}
PINNED = """\
# Ours.
threads = 1 # enough
instances = 1
max_batch_size = 1
# The end of it.
"""


def command(daemon: Daemon, *arguments: str) -> list[str]:
    """The command line of an `edgectl tune mlp`."""
    return [
        *(sys.executable, "-m", "edged.cli.edgectl", "tune", "mlp"),
        *("--endpoint", daemon.endpoint, *arguments),
    ]


def tune(daemon: Daemon, *arguments: str) -> dict[str, Any]:
    """Runs it to its good end: the report."""
    done = subprocess.run(
        command(daemon, "--json", *arguments),
        env=daemon.environ(),
        capture_output=True,
        text=True,
        timeout=2 * WAIT_S,
        check=False,
        cwd=daemon.root,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert isinstance(report, dict)
    return report


def shape(row: dict[str, Any]) -> tuple[Any, ...]:
    """How a model runs, by a row of the status or of a report."""
    return row["runtime"], row["threads"], row["instances"]


def test_a_tuned_model_runs_so_and_will_after_a_restart(tmp_path: Path) -> None:
    """Measured, swapped in while it serves, and remembered."""
    with running_daemon(tmp_path, models=MLP) as daemon:
        before = daemon.wait_ready("mlp")
        shown = tune(daemon, "--budget", "500ms", "--aim", "throughput")
        assert (shown["state"], daemon.wait_ready("mlp")["pid"]) == ("measured", before["pid"])
        assert [row for row in shown["rows"] if row["best"]]
        assert [row for row in shown["rows"] if row["pareto"]]

        report = tune(daemon, "--budget", "500ms", "--aim", "throughput", "--yes")
        assert report["state"] == "applied"
        after = daemon.wait_row("mlp", lambda r: r["serving"] and r["choice"] == "tuned", "is tuned")
        assert shape(after) == shape(report["best"])
        assert daemon.stop() == 0
        daemon.start()
        again = daemon.wait_ready("mlp")
        assert (shape(again), again["choice"]) == (shape(after), "tuned")


def test_what_is_remembered_is_what_runs_and_a_strange_record_is_none(tmp_path: Path) -> None:
    """Instances, threads and batch come back with the daemon; what makes no sense is forgotten."""
    with running_daemon(tmp_path, models=MLP) as daemon:
        tune(daemon, "--budget", "100ms", "--yes")
        for record, want in (
            ({"threads": 1, "instances": 2, "max_batch_size": 4}, (2, 1, 4, "tuned")),
            ({"threads": 1, "instances": "many"}, (1, None, None, "default")),
        ):
            assert daemon.stop() == 0
            book = daemon.state / "store" / "choices.json"
            choices = json.loads(book.read_bytes())
            (key,) = choices
            book.write_text(json.dumps({key: {**choices[key], **record}}))
            daemon.start()
            row = daemon.wait_ready("mlp")
            found = row["instances"], row["threads"], row["batch"]["max"], row["choice"]
            assert all(b in (None, a) for a, b in zip(found, want, strict=True)), row
            x = np.ones((1, 64), np.float32)
            assert len(daemon.client.infer("mlp", {"x": x})["y"]) == 1


def test_an_export_says_how_the_model_runs_and_nobody_loads_it_again(tmp_path: Path) -> None:
    """The owner's lines stay; the daemon takes the settings over, since they change nothing."""
    with running_daemon(tmp_path, models=MLP) as daemon:
        file = daemon.models / "mlp.toml"
        file.write_text(PINNED)
        before = daemon.wait_row(
            "mlp", lambda r: r["serving"] and r["settings"].get("threads") == 1, "has one"
        )
        report = tune(daemon, "--budget", "100ms", "--yes", "--export")
        assert (report["state"], report["exported"]) == ("applied", str(file))
        assert file.read_text() == PINNED + 'runtime = "onnxruntime"\ndevice = "cpu"\n'
        after = daemon.wait_row("mlp", lambda r: r["serving"] and r["choice"] == "pinned", "took them over")
        assert (after["pid"], after["settings"]["device"]) == (before["pid"], "cpu")


def test_ctrl_c_leaves_everything_as_it_was(tmp_path: Path) -> None:
    """The measurement ends at once, nothing is remembered, and the next one may begin."""
    with running_daemon(tmp_path, models=MLP) as daemon:
        before = daemon.wait_ready("mlp")
        process = subprocess.Popen(
            command(daemon, "--budget", "10m", "--aim", "throughput", "--yes"),
            env=daemon.environ(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=daemon.root,
        )
        try:
            until(lambda: state(daemon) == "measuring", what="it measures")
            until(lambda: daemon.client.server_status()["measuring"], what="a measurer runs")
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=WAIT_S)
        finally:
            process.kill()
            process.wait()
        assert process.returncode in (130, -signal.SIGINT), errors
        assert b"everything is as it was" in errors
        assert state(daemon) == "cancelled"
        assert not daemon.client.server_status()["measuring"]
        after = daemon.wait_ready("mlp")
        assert (after["pid"], after["choice"]) == (before["pid"], before["choice"])
        book = daemon.state / "store" / "choices.json"
        assert not book.exists() or not [c for c in json.loads(book.read_bytes()).values() if "runtime" in c]
        assert tune(daemon, "--budget", "100ms")["state"] == "measured"


def state(daemon: Daemon) -> str | None:
    """How far the daemon's last tune is."""
    report = daemon.client.server_status()["tune"]
    return None if report is None else str(report["state"])
