"""Processes that die, hang or eat memory: one request is lost at most, and everything else goes on."""

from __future__ import annotations

import os
import signal
import struct
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from edged.errors import EdgedError
from tests import zoo
from tests.e2e.harness import Daemon, code_of, descendants, running_daemon, until

pytestmark = pytest.mark.e2e

NEIGHBOUR = {"neighbour.onnx": zoo.versioned(1)}


def slow_request(request_id: int, trips: int) -> dict[str, Any]:
    """A request of the slow model."""
    return {
        "method": "model_infer",
        "id": request_id,
        "model_name": "slow",
        "inputs": [
            {"name": "x", "datatype": "FP32", "shape": [1, 256], "data": struct.pack("<256f", *[0.5] * 256)},
            {"name": "trips", "datatype": "INT64", "shape": [], "data": struct.pack("<q", trips)},
        ],
    }


def kill_worker(daemon: Daemon, name: str, number: int = signal.SIGKILL) -> int:
    """Sends the worker of this model a signal; its pid."""
    pid = int(daemon.wait_ready(name)["pid"])
    os.kill(pid, number)
    return pid


def wait_running(daemon: Daemon, name: str, running: int = 1) -> None:
    """Waits until the model's worker has so many requests."""
    daemon.wait_row(name, lambda r: r.get("in_flight") == running, f"{running} are with the worker")


def test_a_killed_worker_costs_the_request_that_ran_and_no_other(tmp_path: Path) -> None:
    """Eight wait behind it: all are served by the worker that takes its place."""
    with running_daemon(tmp_path, models={"slow.onnx": zoo.slow(), **NEIGHBOUR}) as daemon:
        with daemon.raw() as raw:
            raw.send(slow_request(0, 2**40))
            wait_running(daemon, "slow")
            for number in range(1, 9):
                raw.send(slow_request(number, 100))
            wait_running(daemon, "slow", 2)
            pid = kill_worker(daemon, "slow")
            replies = {r["id"]: r for r in (raw.receive()[0] for _ in range(9))}
            assert code_of(replies[0]) == ("UNAVAILABLE", "WORKER_CRASHED")
            assert replies[0]["error"]["retry_after_ms"] > 0
            assert "SIGKILL" in replies[0]["error"]["message"]
            assert [n for n in range(1, 9) if "outputs" not in replies[n]] == []
            assert raw.quiet()
        row = daemon.wait_ready("slow")
        assert (row["restarts"], row["version"]) == (1, "1")
        assert row["pid"] != pid
        neighbour = daemon.wait_ready("neighbour")
        assert neighbour["restarts"] == 0
        assert daemon.number("neighbour") == 1


def test_a_worker_that_dies_again_and_again_is_restarted_with_a_growing_pause(tmp_path: Path) -> None:
    """Meanwhile its model says so at once, with when to come again, and recovers by itself."""
    with running_daemon(tmp_path, models={"m.onnx": zoo.versioned(1), **NEIGHBOUR}) as daemon:
        for restarts in (1, 2):
            kill_worker(daemon, "m")
            until(lambda n=restarts: daemon.rows("m")[0]["restarts"] == n, what="the crash is counted")
            if restarts == 1:
                # The second must end a worker that serves, not one that loads: only an answer tells.
                until(lambda: ask(daemon, []), what="the model is back at once")
        errors = []
        until(lambda: ask(daemon, errors), what="the model is back")
        assert daemon.number() == 1
        assert {e.code.value for e in errors} <= {"UNAVAILABLE"}
        assert all(e.retry_after_ms for e in errors)
        assert daemon.number("neighbour") == 1


def ask(daemon: Daemon, errors: list[EdgedError]) -> bool:
    """One request; its error is kept."""
    try:
        return daemon.number() == 1
    except EdgedError as e:
        errors.append(e)
        return False


def test_a_request_that_crashes_its_worker_is_told_so(tmp_path: Path) -> None:
    """SIGFPE in the runtime, provoked by a client: typed for it, unseen by others."""
    with running_daemon(tmp_path, models={"divide.onnx": zoo.sigfpe_at_run(), **NEIGHBOUR}) as daemon:
        good = {"x": np.array([6], np.int64), "d": np.array([3], np.int64)}
        bad = {"x": np.array([zoo.INT64_MIN], np.int64), "d": np.array([-1], np.int64)}
        assert daemon.client.infer("divide", good)["y"].tolist() == [2]
        with pytest.raises(EdgedError) as error:
            daemon.client.infer("divide", bad)
        assert (error.value.code.value, error.value.reason) == ("UNAVAILABLE", "WORKER_CRASHED")
        assert "SIGFPE" in error.value.message
        assert daemon.number("neighbour") == 1
        daemon.wait_ready("divide")
        assert daemon.client.infer("divide", good)["y"].tolist() == [2]


@pytest.mark.parametrize("bomb", ["sigfpe", "depth_to_space_overflow", "openvino_killer", "ep_context"])
def test_a_file_that_kills_its_runtime_is_refused(tmp_path: Path, bomb: str) -> None:
    """Both runtimes may try; the neighbour notices nothing, and nothing tries again without a reason."""
    settings = {"EDGED_DEVICES_EXCLUDE": "cuda"}
    zoo.write(tmp_path / "models" / "neighbour.toml", b'runtime = "onnxruntime"\n')
    with running_daemon(
        tmp_path, settings, models={"bomb.onnx": getattr(zoo, bomb)(), **NEIGHBOUR}
    ) as daemon:
        row = daemon.wait_row("bomb", lambda r: r["state"] in ("UNAVAILABLE", "READY"), "is settled")
        if row["state"] == "READY":  # the other runtime took it, and says why
            assert row["fallback_reason"]
        else:
            assert row["reason"] in ("WORKER_CRASHED", "MODEL_INVALID", "MODEL_LOAD_FAILED"), row
            assert row["message"]
            with pytest.raises(EdgedError) as error:
                daemon.client.infer("bomb", {"x": np.ones(1, np.float32)})
            assert error.value.code.value == "UNAVAILABLE"
        assert daemon.wait_ready("neighbour")["restarts"] == 0
        assert daemon.number("neighbour") == 1
        assert len(daemon.client.server_status()["workers"]) <= 2


def test_memory_bombs_are_bounded(tmp_path: Path) -> None:
    """At load and at run: a typed error, the bound in words, and the neighbour is served."""
    with Daemon(tmp_path) as daemon:
        bound = b'runtime = "onnxruntime"\nmemory_max = "600MiB"\n'
        for name, model in (("at_load", zoo.memory_bomb(4)), ("at_run", zoo.memory_bomb_at_run())):
            zoo.write(daemon.models / f"{name}.toml", bound)
            zoo.write(daemon.models / f"{name}.onnx", model)
        zoo.write(daemon.models / "neighbour.onnx", zoo.versioned(1))
        daemon.start()
        # Refused at load, or, by a runtime that gives up folding under its bound, at each run.
        if daemon.serving("at_load") is None:
            assert daemon.wait_refused("at_load")["reason"] in ("MEMORY_LIMIT", "WORKER_CRASHED")
        with pytest.raises(EdgedError) as error:
            daemon.client.infer("at_load", {})
        assert error.value.code.value in ("RESOURCE_EXHAUSTED", "UNAVAILABLE")
        small = daemon.client.infer("at_run", {"n": np.array([5], np.int64)})
        assert small["y"].shape == (5,)
        with pytest.raises(EdgedError) as error:
            daemon.client.infer("at_run", {"n": np.array([1 << 29], np.int64)})
        assert error.value.code.value in ("RESOURCE_EXHAUSTED", "UNAVAILABLE")
        assert error.value.reason
        assert daemon.number("neighbour") == 1
        daemon.wait_ready("at_run")
        assert daemon.client.infer("at_run", {"n": np.array([5], np.int64)})["y"].shape == (5,)
        assert daemon.wait_ready("neighbour")["restarts"] == 0


def test_a_run_past_its_limit_is_answered_and_its_worker_replaced(tmp_path: Path) -> None:
    """A worker that hears nothing any more: DEADLINE_EXCEEDED in time, then another takes its place."""
    with Daemon(tmp_path) as daemon:
        zoo.write(daemon.models / "slow.toml", b'timeout = "1s"\n')
        zoo.write(daemon.models / "slow.onnx", zoo.slow())
        zoo.write(daemon.models / "neighbour.onnx", zoo.versioned(1))
        daemon.start()
        with daemon.raw() as raw:
            raw.send(slow_request(1, 2**40))
            wait_running(daemon, "slow")
            reply, _ = raw.receive()
            assert code_of(reply) == ("DEADLINE_EXCEEDED", "RUN_TIMEOUT")
            assert "timeout" in reply["error"]["message"]
            wait_running(daemon, "slow", 0)  # it was stopped, and its worker lives
            pid = kill_worker(daemon, "slow", signal.SIGSTOP)
            until(
                lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED, what="the worker stands still"
            )
            raw.send(slow_request(2, 1))
            assert code_of(raw.receive()[0]) == ("DEADLINE_EXCEEDED", "RUN_TIMEOUT")
            assert daemon.number("neighbour") == 1
            daemon.wait_row(
                "slow", lambda r: r["serving"] and r["pid"] not in (None, pid), "has another worker"
            )
            daemon.wait_ready("slow")
            raw.send(slow_request(3, 1))
            assert "outputs" in raw.receive()[0]
        until(lambda: not psutil.pid_exists(pid), what="the hung worker is gone")


def test_a_load_that_never_ends_is_ended(tmp_path: Path) -> None:
    """The load's time-out refuses that model, and the next in line is loaded."""
    settings = {"EDGED_LOADING_TIMEOUT": "1s"}
    models = {"a_hanging.onnx": zoo.slow(2**40), "neighbour.onnx": zoo.versioned(1)}
    with running_daemon(tmp_path, settings, models=models) as daemon:
        assert daemon.wait_refused("a_hanging")["message"]
        daemon.wait_ready("neighbour")
        assert daemon.number("neighbour") == 1


def test_a_killed_template_is_replaced(tmp_path: Path) -> None:
    """What serves goes on; the next model still gets its worker."""
    with running_daemon(tmp_path, models=NEIGHBOUR) as daemon:
        workers = {w["pid"] for w in daemon.client.server_status()["workers"]}
        for process in descendants(daemon.pid):
            if process.pid not in workers:
                process.kill()
        assert daemon.number("neighbour") == 1
        zoo.write(daemon.models / "m.onnx", zoo.versioned(2))
        daemon.wait_number(2)
        assert daemon.wait_ready("neighbour")["restarts"] == 0


def test_a_killed_daemon_leaves_no_process_and_the_next_one_serves(tmp_path: Path) -> None:
    """SIGKILL under load: workers and templates end by themselves; the same folders serve again."""
    with running_daemon(tmp_path, models={"slow.onnx": zoo.slow(), **NEIGHBOUR}) as daemon:
        with daemon.raw() as raw:
            raw.send(slow_request(1, 2**40))
            wait_running(daemon, "slow")
            children = descendants(daemon.pid)
            assert len(children) >= 3
            daemon.process.kill()
            assert daemon.wait_end() == -signal.SIGKILL
        until(
            lambda: not [p for p in children if p.is_running() and p.status() != psutil.STATUS_ZOMBIE],
            what=lambda: f"all have ended: {[p for p in children if p.is_running()]}",
        )
        daemon.forget_client()
        daemon.start()
        assert daemon.number("neighbour") == 1
        assert daemon.wait_ready("slow")["version"] == "1"
        assert daemon.stop() == 0


def test_a_model_that_took_the_daemon_down_twice_is_quarantined(tmp_path: Path) -> None:
    """An attempt is recorded before it begins; an administrator's word tries again."""
    with running_daemon(tmp_path, {"EDGED_LOADING_CONCURRENCY": "2"}, models=NEIGHBOUR) as daemon:
        zoo.write(daemon.models / "heavy.toml", b'runtime = "onnxruntime"\n')
        zoo.write(daemon.models / "heavy.onnx", zoo.slow(2**40))
        for _ in range(2):
            until(lambda: [r for r in daemon.rows("heavy") if r.get("pid")], what="it is loading")
            daemon.process.kill()
            daemon.wait_end()
            daemon.forget_client()
            daemon.spawn()
            until(lambda: serves(daemon), what="the daemon is back")
        row = daemon.wait_refused("heavy", "MODEL_QUARANTINED")
        assert "edgectl load heavy" in row["message"]
        assert daemon.number("neighbour") == 1
        daemon.client.load("heavy")
        daemon.wait_row("heavy", lambda r: r["state"] == "LOADING", "is tried again")


def serves(daemon: Daemon) -> bool:
    """Whether the neighbour serves; a daemon that is not there yet does not count as a fault."""
    try:
        return daemon.serving("neighbour") is not None
    except EdgedError:
        return False
