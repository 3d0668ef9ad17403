"""The daemon as a process: its locks, signals, sockets, notices to the service manager, descriptors."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import stat
import struct
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import msgpack
import psutil
import pytest
import zmq

from edged import Client
from edged.errors import EdgedError
from tests import zoo
from tests.e2e.harness import WAIT_S, Daemon, Raw, code_of, descendants, running_daemon, until

pytestmark = pytest.mark.e2e

ONE = {"m.onnx": zoo.versioned(1)}
SLOW = {"slow.onnx": zoo.slow()}
CPU = "onnxruntimeCPU"
RELIED_UPON = "as in the daemon's life before"


def slow_request(request_id: int, trips: int) -> dict[str, Any]:
    """A request of the slow model."""
    x = {"name": "x", "datatype": "FP32", "shape": [1, 256], "data": struct.pack("<256f", *[0.5] * 256)}
    rounds = {"name": "trips", "datatype": "INT64", "shape": [], "data": struct.pack("<q", trips)}
    return {"method": "model_infer", "id": request_id, "model_name": "slow", "inputs": [x, rounds]}


# ---------------------------------------------------------------------- one daemon at a time


def second(daemon: Daemon, tmp_path: Path, **changes: Path) -> subprocess.CompletedProcess[str]:
    """Runs another daemon until it gives up."""
    folders = {"state-dir": tmp_path / "state2", "run": tmp_path / "run2", **changes}
    command = daemon.command()
    command[command.index("--endpoint") + 1] = f"ipc://{folders['run']}/edged.sock"
    command[command.index("--state-dir") + 1] = str(folders["state-dir"])
    environ = {k: v for k, v in daemon.environ().items() if k != "NOTIFY_SOCKET"}
    return subprocess.run(
        command, env=environ, capture_output=True, text=True, timeout=WAIT_S, check=False, cwd=tmp_path
    )


def test_the_next_life_relies_on_what_the_last_one_probed(tmp_path: Path) -> None:
    """It loads before any probe has answered; a runtime that was touched since is probed anew."""
    with running_daemon(tmp_path, models=ONE) as daemon:
        assert daemon.stop() == 0
        daemon.start()
        first, again = (r["DETAIL"] for r in verdicts(daemon) if r["RUNTIME"] + r["DEVICE"] == CPU)
        assert (first == RELIED_UPON, again == RELIED_UPON) == (False, True)
        assert daemon.stop() == 0
        book = daemon.state / "store" / "verdicts.json"
        told = json.loads(book.read_bytes())
        assert {key for key, each in told.items() if each["mark"]} >= {"onnxruntime:CPU"}
        told["onnxruntime:CPU"]["mark"] += " of another build"
        book.write_text(json.dumps(told))
        daemon.start()
        last = [r for r in verdicts(daemon) if r["RUNTIME"] + r["DEVICE"] == CPU][-1]
        assert (last["REASON"], last["DETAIL"]) == ("ok", first)


def verdicts(daemon: Daemon) -> list[dict[str, Any]]:
    """The log's lines about devices."""
    return [r for line in daemon.log().splitlines() if (r := json.loads(line))["event"] == "device_verdict"]


def test_the_first_start_makes_the_models_folder(tmp_path: Path) -> None:
    """A newcomer's `edged` serves a folder that is there to be filled, not a fault."""
    with Daemon(tmp_path) as daemon:
        daemon.models.rmdir()
        daemon.start()
        assert daemon.models.is_dir()
        assert daemon.client.server_status()["models_fault"] is None


def test_a_second_daemon_on_the_same_endpoint_gives_way(tmp_path: Path) -> None:
    """It ends with a sentence; the first one's sockets are untouched."""
    with running_daemon(tmp_path, models=ONE) as daemon:
        inodes = [p.stat().st_ino for p in sorted(daemon.run_dir.iterdir())]
        other = second(daemon, tmp_path, run=daemon.run_dir)
        assert other.returncode == 75
        assert "another edged" in other.stderr
        assert "Traceback" not in other.stderr
        assert [p.stat().st_ino for p in sorted(daemon.run_dir.iterdir())] == inodes
        assert daemon.number() == 1
        with Client(daemon.endpoint, timeout=WAIT_S) as fresh:
            assert fresh.server_ready()


def test_a_second_daemon_on_the_same_state_gives_way(tmp_path: Path) -> None:
    """A state directory has one owner; the sockets that the second made are gone again."""
    with running_daemon(tmp_path, models=ONE) as daemon:
        other = second(daemon, tmp_path, **{"state-dir": daemon.state})
        assert other.returncode == 75
        assert str(daemon.state) in other.stderr
        assert "Traceback" not in other.stderr
        assert not list((tmp_path / "run2").glob("*.sock"))
        assert daemon.number() == 1


def test_a_directory_that_everybody_may_write_to_is_refused(tmp_path: Path) -> None:
    """Anyone could put sockets of his own there."""
    with Daemon(tmp_path) as daemon:
        daemon.run_dir.mkdir()
        daemon.run_dir.chmod(0o777)
        assert daemon.spawn().wait(WAIT_S) == 75
        assert "writable by everybody" in daemon.log()


def test_settings_that_are_wrong_are_told_with_file_and_line(tmp_path: Path) -> None:
    """Exit status 78, one sentence, the nearest known key."""
    config = tmp_path / "edged.toml"
    config.write_text("[loading]\nsetle = '1s'\n")
    with Daemon(tmp_path, arguments=["--config", str(config)]) as daemon:
        assert daemon.spawn().wait(WAIT_S) == 78
        log = daemon.log()
        assert "setle" in log
        assert "settle" in log
        assert "line 2" in log or ":2" in log
        assert "Traceback" not in log


# ---------------------------------------------------------------------- ending


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_under_load_finishes_what_runs_and_answers_the_rest(tmp_path: Path, number: int) -> None:
    """Every request has one answer, the sockets are removed, no process is left, exit status 0."""
    settings = {"EDGED_SERVER_SHUTDOWN_GRACE": "3s"}
    with running_daemon(tmp_path, settings, models=SLOW) as daemon:
        children = descendants(daemon.pid)
        with daemon.raw() as raw:
            raw.send(slow_request(0, 20_000))
            for n in range(1, 30):
                raw.send(slow_request(n, 2**40))
            assert raw.ask({"method": "server_live", "id": "all"})["id"] == "all"  # so all have arrived
            daemon.signal(number)
            daemon.heard("STOPPING")
            raw.send(slow_request(30, 1))
            replies = {r["id"]: r for r in (raw.receive()[0] for _ in range(31))}
            assert "outputs" in replies[0]
            assert code_of(replies[30]) == ("UNAVAILABLE", "SERVER_STOPPING")
            refused = [code_of(r) for r in replies.values() if "error" in r]
            assert set(refused) == {("UNAVAILABLE", "SERVER_STOPPING")}
            assert len(refused) == 30
            assert daemon.wait_end() == 0
            assert raw.quiet()
        assert not list(daemon.run_dir.glob("*.sock"))
        until(lambda: not [p for p in children if p.is_running()], what="every process has ended")
        assert '"server_stopped"' in daemon.log()
        assert '"daemon_bug"' not in daemon.log()


def test_an_idle_daemon_ends_at_once(tmp_path: Path) -> None:
    """No grace time is waited for when nothing runs; a second signal changes nothing."""
    with running_daemon(tmp_path, {"EDGED_SERVER_SHUTDOWN_GRACE": "50s"}, models=ONE) as daemon:
        began = time.monotonic()
        daemon.signal(signal.SIGTERM)
        daemon.signal(signal.SIGTERM)
        assert daemon.wait_end() == 0
        assert time.monotonic() - began < 20


def test_a_stop_while_a_model_loads_does_not_wait_for_it(tmp_path: Path) -> None:
    """A load that takes for ever ends with the daemon."""
    with running_daemon(tmp_path, models=ONE) as daemon:
        zoo.write(daemon.models / "endless.onnx", zoo.slow(2**40))
        daemon.wait_row("endless", lambda r: r["state"] == "LOADING" and bool(r.get("pid")), "loads")
        children = descendants(daemon.pid)
        assert daemon.stop() == 0
        until(lambda: not [p for p in children if p.is_running()], what="every process has ended")


def test_a_worker_does_not_mind_a_signal_to_the_whole_group(tmp_path: Path) -> None:
    """Ctrl-C reaches every process of a terminal: the workers finish their requests all the same."""
    with running_daemon(tmp_path, models=SLOW) as daemon, daemon.raw() as raw:
        raw.send(slow_request(0, 400_000))
        daemon.wait_row("slow", lambda r: r.get("in_flight") == 1, "it runs")
        for process in [psutil.Process(daemon.pid), *descendants(daemon.pid)]:
            process.send_signal(signal.SIGINT)
        assert "outputs" in raw.receive()[0]
        assert daemon.wait_end() == 0


# ---------------------------------------------------------------------- configuration


def test_hangup_takes_a_good_configuration_and_keeps_the_old_over_a_bad_one(tmp_path: Path) -> None:
    """The log says what was wrong; the manager hears RELOADING with its time, then READY."""
    config = tmp_path / "edged.toml"
    config.write_text("[limits]\nqueue_length = 100\n")
    with Daemon(tmp_path, arguments=["--config", str(config)]) as daemon:
        zoo.write(daemon.models / "m.onnx", zoo.versioned(1))
        daemon.start()
        limits = daemon.client.server_metadata()["limits"]
        assert limits["queue_length"] == 100

        config.write_text("[limits]\nqueue_length = 7\n")
        before_us = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        daemon.signal(signal.SIGHUP)
        notice = daemon.heard("RELOADING")
        assert int(notice["MONOTONIC_USEC"]) >= before_us
        daemon.heard("READY")
        assert daemon.client.server_metadata()["limits"]["queue_length"] == 7

        config.write_text("[limits]\nqueue_length = 7\nframes = 5\n[resources]\nmemory = '50%'\n")
        daemon.signal(signal.SIGHUP)
        daemon.heard("RELOADING")
        assert "a restart is needed for limits.frames" in daemon.heard("READY")["STATUS"]
        assert daemon.client.server_metadata()["limits"]["frames"] == 64
        until(lambda: daemon.log().count('"config_reloaded"') == 2, what="the log has both")
        first, second = (
            json.loads(line) for line in daemon.log().splitlines() if '"config_reloaded"' in line
        )
        assert (first["CHANGED"], first.get("NEEDS_RESTART")) == ("limits.queue_length", None)
        assert (second["CHANGED"], second["NEEDS_RESTART"]) == ("resources.memory", "limits.frames")

        config.write_text("[limits]\nqueue_lenght = 9\n")
        daemon.signal(signal.SIGHUP)
        daemon.heard("RELOADING")
        assert "the new configuration was refused" in daemon.heard("READY")["STATUS"]
        assert daemon.client.server_metadata()["limits"]["queue_length"] == 7
        until(lambda: '"config_rejected"' in daemon.log(), what="the log has it")
        line = next(json.loads(r) for r in daemon.log().splitlines() if '"config_rejected"' in r)
        assert "queue_lenght" in line["DETAIL"]
        assert "queue_length" in line["DETAIL"]
        assert daemon.number() == 1


def test_what_can_change_while_it_runs_does(tmp_path: Path) -> None:
    """Settings of different owners: the guard, the store, the log."""
    config = tmp_path / "edged.toml"
    config.write_text("[resources]\nmemory = '50%'\n")
    with Daemon(tmp_path, arguments=["--config", str(config)]) as daemon:
        zoo.write(daemon.models / "m.onnx", zoo.versioned(1))
        daemon.start()
        before = daemon.client.server_status()["resources"]["memory_limit_bytes"]
        config.write_text(
            "[resources]\nmemory = '25%'\ndisk_free_min = '1000TiB'\n[log]\nlevel = 'debug'\n"
            "[server]\nshutdown_grace = '1s'\n"
        )
        daemon.signal(signal.SIGHUP)
        daemon.heard("RELOADING")
        assert "restart" not in daemon.heard("READY")["STATUS"]
        assert abs(daemon.client.server_status()["resources"]["memory_limit_bytes"] - before / 2) <= 1
        zoo.write(daemon.models / "big.onnx", zoo.versioned(2))
        until(lambda: '"DISK_FULL"' in daemon.log(), what="the store keeps to its new bound")
        assert daemon.number() == 1
        config.write_text("[log]\nlevel = 'debug'\n")
        daemon.signal(signal.SIGHUP)
        daemon.wait_ready("big")
        until(lambda: '"worker_started"' in daemon.log(), what="the log tells more")


@pytest.mark.slow
def test_a_hangup_during_the_start_does_not_call_it_ready(tmp_path: Path) -> None:
    """The settings are read again, and READY waits for the models as before."""
    with Daemon(tmp_path, {"EDGED_SERVER_STARTUP_WAIT": "10s"}) as daemon:
        zoo.write(daemon.models / "endless.onnx", zoo.slow(2**40))
        daemon.spawn()
        until(lambda: '"server_starting"' in daemon.log(), what="it takes signals")
        daemon.signal(signal.SIGHUP)
        until(lambda: '"config_reloaded"' in daemon.log(), what="it has read them")
        ready = daemon.heard("READY")
        assert not [notice for notice in daemon.notices if "RELOADING" in notice]
        assert [notice for notice in daemon.notices if "EXTEND_TIMEOUT_USEC" in notice]
        assert ready["STATUS"].startswith("0 of 1 model ready; 1 loading")


# ---------------------------------------------------------------------- notices


def test_ready_comes_when_the_models_are_settled(tmp_path: Path) -> None:
    """Not before the last one serves or is refused; the status is a sentence for people."""
    models = {"a.onnx": zoo.versioned(1), "b.onnx": zoo.versioned(2), "bad.onnx": b"rubbish"}
    with Daemon(tmp_path) as daemon:
        for name, model in models.items():
            zoo.write(daemon.models / name, model)
        daemon.spawn()
        notice = daemon.heard("READY")
        assert daemon.serving("a")
        assert daemon.serving("b")
        assert "2 of 3 models ready" in notice["STATUS"]
        assert "1 refused" in notice["STATUS"]
        assert daemon.client.server_ready()
        zoo.write(daemon.models / "c.onnx", zoo.versioned(3))
        until(lambda: "3 of 4 models ready" in daemon.heard("STATUS")["STATUS"], what="the status follows")
        daemon.signal(signal.SIGTERM)
        assert daemon.heard("STOPPING")["STOPPING"] == "1"
        assert daemon.wait_end() == 0


def test_ready_does_not_wait_for_ever(tmp_path: Path) -> None:
    """After `startup_wait` the daemon is ready with what it has, and goes on loading."""
    with Daemon(tmp_path, {"EDGED_SERVER_STARTUP_WAIT": "2s"}) as daemon:
        zoo.write(daemon.models / "endless.onnx", zoo.slow(2**40))
        daemon.start()
        assert [r["state"] for r in daemon.rows("endless")] == ["LOADING"]
        with pytest.raises(EdgedError) as error:
            daemon.client.infer("endless", {})
        assert error.value.reason == "MODEL_LOADING"


def test_an_empty_folder_is_ready_too(tmp_path: Path) -> None:
    """And says so; one that cannot be looked into is a fault that status names."""
    with Daemon(tmp_path) as daemon:
        assert "0 of 0 models ready" in daemon.start().notices[-1]["STATUS"]
        daemon.stop()
        daemon.models.rmdir()
        daemon.models.touch()
        daemon.start()
        assert daemon.client.server_status()["models_fault"]


def test_the_watchdog_hears_of_the_loop_s_own_progress(tmp_path: Path) -> None:
    """WATCHDOG=1 comes at least twice within its interval, and not from a loop that stands still."""
    with Daemon(tmp_path, {"WATCHDOG_USEC": "2000000"}) as daemon:
        daemon.start()
        times = []
        for _ in range(3):
            daemon.heard("WATCHDOG")
            times.append(time.monotonic())
        assert max(b - a for a, b in itertools.pairwise(times)) < 2


# ---------------------------------------------------------------------- sockets


def test_the_sockets_have_their_modes(tmp_path: Path) -> None:
    """A user's own daemon: for that user alone, in a directory for that user alone."""
    with running_daemon(tmp_path) as daemon:
        assert stat.S_IMODE(daemon.run_dir.stat().st_mode) == 0o700
        for name in ("edged.sock", "admin.sock", "events.sock"):
            mode = (daemon.run_dir / name).stat().st_mode
            assert stat.S_ISSOCK(mode)
            assert stat.S_IMODE(mode) == 0o600
        assert stat.S_IMODE(daemon.state.stat().st_mode) == 0o700
        assert stat.S_IMODE(daemon.cache.stat().st_mode) == 0o700


def test_sockets_of_a_daemon_that_was_killed_are_taken_over(tmp_path: Path) -> None:
    """Files that nobody listens on do not keep the next one from starting."""
    run = tmp_path / "run"
    run.mkdir(mode=0o700)
    for name in ("edged.sock", "admin.sock", "events.sock"):
        with socket.socket(socket.AF_UNIX) as s:
            s.bind(str(run / name))
    with running_daemon(tmp_path, models=ONE) as daemon:
        assert daemon.number() == 1


def test_events_are_told_in_order_without_gaps(tmp_path: Path) -> None:
    """A swap and a removal as a subscriber hears them: topic, `seq`, `instance_id`, state."""
    with running_daemon(tmp_path, models=ONE) as daemon:
        context = zmq.Context()
        with context.socket(zmq.SUB) as events:
            events.setsockopt(zmq.LINGER, 0)
            events.subscribe("")
            events.connect(f"ipc://{daemon.run_dir}/events.sock")
            seen: list[tuple[str, dict[str, Any]]] = []

            def told(**wanted: Any) -> bool:
                while events.poll(0):
                    topic, payload = events.recv_multipart()
                    seen.append((topic.decode(), msgpack.unpackb(payload)))
                return any(wanted.items() <= payload.items() for _, payload in seen)

            # A subscription takes effect in its own time: events are made until one is heard.
            number = 1.0
            while not told():
                if seen:
                    break
                number += 1
                zoo.write(daemon.models / "m.onnx", zoo.versioned(number))
                daemon.wait_number(number)
            zoo.write(daemon.models / "late.onnx", zoo.versioned(1))
            until(lambda: told(name="late", state="LOADING"), what="loading is told")
            until(lambda: told(name="late", state="READY"), what="ready is told")
            (daemon.models / "late.onnx").unlink()
            until(lambda: told(name="late", state="UNAVAILABLE", reason="MODEL_REMOVED"), what="its removal")
        context.term()
        numbers = [payload["seq"] for _, payload in seen]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        instance = daemon.client.server_metadata()["instance_id"]
        assert {payload["instance_id"] for _, payload in seen} == {instance}
        assert all(topic and payload["time_ns"] for topic, payload in seen)


# ---------------------------------------------------------------------- leaks


def test_ten_swaps_leave_no_descriptor_and_no_process(tmp_path: Path) -> None:
    """Under requests from clients that come and go."""
    with running_daemon(tmp_path, models={"m.onnx": zoo.versioned(0), "n.onnx": zoo.versioned(0)}) as daemon:
        supervisor = psutil.Process(daemon.pid)

        def swap(number: int) -> None:
            zoo.write(daemon.models / "m.onnx", zoo.versioned(number))
            daemon.wait_number(number)
            with Raw(daemon.endpoint) as fresh:
                fresh.call("server_live")

        def figures() -> tuple[int, int]:
            return supervisor.num_fds(), len(descendants(daemon.pid))

        def settled() -> bool:
            return len(daemon.client.server_status()["workers"]) == 2

        for number in (1, 2):
            swap(number)
        until(settled, what="the old worker has ended")
        before = figures()
        for number in range(3, 13):
            swap(number)
        until(settled, what="the old worker has ended")
        until(
            lambda: figures()[0] <= before[0] and figures()[1] <= before[1],
            what=lambda: f"descriptors and processes are as before: {before}, {figures()}",
        )
        assert not [p for p in supervisor.children() if p.status() == psutil.STATUS_ZOMBIE]


def test_clients_that_come_and_go_leave_nothing(tmp_path: Path) -> None:
    """A hundred connections, some ending in the middle of a request."""
    with running_daemon(tmp_path, models={**ONE, **SLOW}) as daemon:
        supervisor = psutil.Process(daemon.pid)
        assert daemon.number() == 1
        before = supervisor.num_fds()
        for number in range(100):
            with daemon.raw() as raw:
                if number % 3 == 0:
                    raw.send(slow_request(1, 1000))
                else:
                    raw.call("server_live")
        until(lambda: supervisor.num_fds() <= before, what="descriptors are as before")
        until(lambda: daemon.client.server_status()["clients"]["in_flight"] == 0, what="nothing is in flight")
        assert daemon.number() == 1


def test_hangups_and_stops_at_once_end_it_once(tmp_path: Path) -> None:
    """Six signals from six threads: exit status 0."""
    with running_daemon(tmp_path, models=ONE) as daemon:
        threads = [
            threading.Thread(target=os.kill, args=(daemon.pid, n))
            for n in (signal.SIGHUP, signal.SIGTERM) * 3
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert daemon.wait_end() == 0
        assert '"daemon_bug"' not in daemon.log()


# ---------------------------------------------------------------------- memory pressure


def test_a_service_manager_that_asks_for_memory_is_heard_at_once(tmp_path: Path) -> None:
    """By a FIFO of systemd's protocol: no timer is waited for, the workers are told, the log says it once."""
    fifo = tmp_path / "pressure"
    os.mkfifo(fifo)
    manager = os.open(fifo, os.O_RDWR | os.O_NONBLOCK)
    settings = {
        "MEMORY_PRESSURE_WATCH": str(fifo),
        "MEMORY_PRESSURE_WRITE": "c29tZQ==",
        "EDGED_RESOURCES_SAMPLE": "60s",
        "EDGED_METRICS_TEXTFILE": str(tmp_path / "edged.prom"),
        "EDGED_METRICS_INTERVAL": "1s",
    }
    try:
        with running_daemon(tmp_path, settings, models=ONE) as daemon:
            for count in (1, 2):
                os.write(manager, b"!")
                wanted = f"edged_memory_pressure_events_total {count}\n"
                until(lambda wanted=wanted: wanted in (tmp_path / "edged.prom").read_text(), what=wanted)  # type: ignore[misc]  # a default binds it
            assert daemon.log().count('"memory_pressed"') == 1
            assert daemon.number() == 1
    finally:
        os.close(manager)
