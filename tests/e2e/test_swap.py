"""Swaps under load: no request fails, and each answer is of one version."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from edged import Client
from edged.errors import EdgedError
from tests import zoo
from tests.e2e.harness import Daemon, ones, running_daemon, until, whole_number

pytestmark = pytest.mark.e2e

SWAPS = 20
CLIENTS = 4


class Load:
    """Clients that ask without a pause until they are told to stop, and what they were answered."""

    def __init__(self, daemon: Daemon, model: str = "m", clients: int = CLIENTS) -> None:
        self.answers: list[list[float]] = [[] for _ in range(clients)]
        self.faults: list[BaseException] = []
        self._daemon = daemon
        self._model = model
        self._done = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(seen,)) for seen in self.answers]

    def _ask(self, seen: list[float]) -> None:
        try:
            with Client(self._daemon.endpoint, timeout=60) as client:
                while not self._done.is_set():
                    seen.append(whole_number(client.infer(self._model, {"x": ones()})))
        except (EdgedError, AssertionError) as e:
            self.faults.append(e)

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        until(lambda: self.faults or all(self.answers), what="every client has an answer")
        return self

    def __exit__(self, *exc: object) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive()


def test_twenty_swaps_under_load_lose_nothing(tmp_path: Path) -> None:
    """Four clients see whole answers of versions that only ever go up, and none fails."""
    with running_daemon(tmp_path, models={"m.onnx": zoo.versioned(0)}) as daemon:
        with Load(daemon) as load:
            for number in range(1, SWAPS + 1):
                zoo.write(daemon.models / "m.onnx", zoo.versioned(number))
                until(
                    lambda n=number: load.faults or load.answers[0][-1] == n,
                    what=f"version {number} serves",
                )
            counts = [len(seen) for seen in load.answers]
            until(
                lambda: load.faults or all(len(s) > c + 5 for s, c in zip(load.answers, counts, strict=True)),
                what="every client goes on",
            )
        assert not load.faults
        for seen in load.answers:
            assert seen == sorted(seen)
            assert set(seen) <= set(range(SWAPS + 1))
            assert seen[-1] == SWAPS
        stats = daemon.client.statistics("m")[0]
        assert stats["inference_stats"]["fail"]["count"] == 0
        until(lambda: len(daemon.client.server_status()["workers"]) == 1, what="the old workers have ended")


def test_a_refused_version_costs_no_request(tmp_path: Path) -> None:
    """Bad bytes, a crash at load, a wrong golden answer, between good versions and under load."""
    with running_daemon(tmp_path, models={"m.onnx": zoo.versioned(1)}) as daemon:
        with Load(daemon, clients=2) as load:
            for bad in (b"rubbish", zoo.sigfpe(), zoo.depth_to_space_overflow()):
                before = {r["message"] for r in daemon.rows("m")}
                zoo.write(daemon.models / "m.onnx", bad)
                daemon.wait_row(
                    "m",
                    lambda r, before=before: r["state"] == "UNAVAILABLE" and r["message"] not in before,
                    "shows why the new version is refused",
                )
            zoo.write(daemon.models / "m.onnx", zoo.versioned(2))
            until(lambda: load.faults or load.answers[0][-1] == 2, what="the good version serves")
        assert not load.faults
        assert all(set(seen) <= {1, 2} for seen in load.answers)


def test_replace_unloads_first_and_puts_the_old_one_back(tmp_path: Path) -> None:
    """With `swap = "replace"` there are never two workers, and a bad version costs a gap, not the model."""
    with Daemon(tmp_path) as daemon:
        zoo.write(daemon.models / "m.toml", b'swap = "replace"\n')
        zoo.write(daemon.models / "m.onnx", zoo.versioned(1))
        daemon.start()
        zoo.write(daemon.models / "m.onnx", zoo.versioned(2))
        daemon.wait_number(2, gap=True)
        zoo.write(daemon.models / "m.onnx", zoo.sigfpe())
        daemon.wait_refused("m")
        daemon.wait_number(2, gap=True)
        assert daemon.stop() == 0
