"""The template process: imports a runtime once and forks workers that have it already.

It has one thread and never makes a session, so a fork of it is safe; should a runtime's import have started
a thread, it forks and execs instead, which is always safe. A worker is forked twice, so that it becomes a
child of the supervisor (a subreaper), which then sees how it ends. The template never looks at a model.

Runs on Python 3.10 too.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NoReturn

import msgpack

from edged import worker
from edged.runtimes.base import Runtime, clean_text, create_runtime, silence_telemetry

__all__ = ["main"]

SPAWN_BYTES_MAX = 4096
"""Of one order to spawn: a handful of numbers."""

REPARENT_WAIT_S = 5.0
"""How long a new worker waits to become the supervisor's child; it takes the time of one exit."""


def main(arguments: Sequence[str]) -> NoReturn:
    """One argument, JSON: `{runtime, fd, bootstrap}`; `bootstrap` is how to exec a worker from here."""
    settings = json.loads(arguments[0])
    for ignored in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    silence_telemetry()
    worker.close_other_fds((settings["fd"],))
    with socket.socket(fileno=settings["fd"]) as orders:
        try:
            runtime = create_runtime(settings["runtime"])
        except Exception as e:  # noqa: BLE001 - a broken installation raises anything; said to the supervisor
            orders.send(msgpack.packb(["broken", clean_text(e)]))
            os._exit(1)
        gc.collect()
        gc.freeze()
        threads = len(os.listdir("/proc/self/task"))
        orders.send(msgpack.packb(["ready", {runtime.name: runtime.version}, threads]))
        while True:
            try:
                raw, fds, _, _ = socket.recv_fds(orders, SPAWN_BYTES_MAX, 2)
            except ConnectionResetError:  # the supervisor left with something of ours unread
                os._exit(0)
            if not raw:
                os._exit(0)
            _, spawn_id, wanted = msgpack.unpackb(raw)
            born = worker.WorkerSettings(**{**wanted, "data_fd": fds[0], "control_fd": fds[1]})
            _spawn(
                orders,
                spawn_id,
                born,
                {runtime.name: runtime},
                settings["bootstrap"] if threads > 1 else None,
            )
            for fd in fds:
                os.close(fd)


def _spawn(
    orders: socket.socket,
    spawn_id: int,
    born: worker.WorkerSettings,
    runtimes: Mapping[str, Runtime],
    bootstrap: Sequence[str] | None,
) -> None:
    try:
        middle = os.fork()
    except OSError as e:
        orders.send(msgpack.packb(["fork_failed", spawn_id, clean_text(e)]))
        return
    if middle:
        os.waitpid(middle, 0)
        return
    try:
        _be_middle(orders, spawn_id, born, runtimes, bootstrap)
    finally:
        os._exit(1)  # whatever happened, this copy must not go on as a second template


def _be_middle(
    orders: socket.socket,
    spawn_id: int,
    born: worker.WorkerSettings,
    runtimes: Mapping[str, Runtime],
    bootstrap: Sequence[str] | None,
) -> NoReturn:
    """The process between template and worker: it exits at once, and so gives the worker away."""
    middle = os.getpid()
    try:
        pid = os.fork()
    except OSError as e:
        orders.send(msgpack.packb(["fork_failed", spawn_id, clean_text(e)]))
        os._exit(1)
    if pid:
        orders.send(msgpack.packb(["forked", spawn_id, pid]))
        os._exit(0)
    orders.close()
    _await_reparenting(middle)
    if bootstrap is not None:
        _exec_worker(bootstrap, born)
    worker.run_worker(born, runtimes)


def _await_reparenting(middle: int) -> None:
    deadline = time.monotonic() + REPARENT_WAIT_S
    while os.getppid() == middle:
        if time.monotonic() > deadline:
            os._exit(1)
        time.sleep(0.0002)


def _exec_worker(bootstrap: Sequence[str], born: worker.WorkerSettings) -> NoReturn:
    for fd in (born.data_fd, born.control_fd):
        os.set_inheritable(fd, True)
    settings: dict[str, Any] = asdict(born)
    os.execv(sys.executable, [sys.executable, *bootstrap, json.dumps(settings)])  # noqa: S606 - no shell is wanted
