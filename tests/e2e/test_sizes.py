"""A model of free sizes with a real daemon: measured where it is used, and said where that was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import zoo
from tests.e2e.harness import Daemon, Edgectl, running_daemon

pytestmark = pytest.mark.e2e

CONV = {"conv.onnx": zoo.fully_conv(multiple=8)}
ASKED, RARE, GOLDEN = [1, 3, 48, 80], [1, 3, 16, 16], [1, 3, 24, 40]


def ask(daemon: Daemon, shape: list[int], times: int) -> None:
    """Requests of one size."""
    for _ in range(times):
        daemon.client.infer("conv", {"x": np.ones(shape, np.float32)})


def tuned(edgectl: Edgectl, *arguments: str, model: str = "conv") -> dict[str, Any]:
    """The size at which a short `edgectl tune` measured, and where it came from: the same for all setups."""
    report = edgectl.json("tune", model, "--budget", "200ms", *arguments)
    assert report["state"] == "measured"
    sizes = [row["size"] for row in report["rows"] if row["size"]]
    assert sizes
    assert all(size == sizes[0] for size in sizes)
    return dict(sizes[0])


def of(size: dict[str, Any]) -> tuple[str, list[int]]:
    return size["source"], size["shapes"]["x"]


def test_a_model_is_measured_at_the_sizes_of_its_requests_after_a_restart_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By `edgectl tune` and by `edgectl bench`; `explain` names them."""
    with running_daemon(tmp_path, models=CONV) as daemon:
        daemon.wait_ready("conv")
        edgectl = Edgectl(daemon.endpoint, capsys)
        assert of(tuned(edgectl)) == ("typical", [1, 3, 224, 224])
        ask(daemon, RARE, 3)
        ask(daemon, ASKED, 9)
        assert of(tuned(edgectl)) == ("requests", ASKED)
        assert daemon.stop() == 0
        daemon.start()
        row = daemon.wait_ready("conv")
        assert row["sizes"] == [
            {"source": "requests", "shapes": {"x": ASKED}, "count": 9},
            {"source": "requests", "shapes": {"x": RARE}, "count": 3},
        ]
        assert of(tuned(edgectl)) == ("requests", ASKED)
        code, text, _ = edgectl("tune", "conv", "--budget", "200ms")
        assert code == 0
        assert "measured at x [1,3,48,80], as most requests had it" in text
        code, text, _ = edgectl("bench", "conv", "--seconds", "0.1", "--no-bare")
        assert (code, "x [1,3,48,80], as most requests had it" in text) == (0, True), text
        code, text, _ = edgectl("explain", "conv")
        assert "sizes of its requests (how often): x [1,3,48,80] (" in text


def test_the_daemon_measures_by_itself_at_the_sizes_of_requests(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """When nobody asks; the choice tells at which, and so does `explain`."""
    pytest.importorskip("openvino")
    with running_daemon(tmp_path, {"EDGED_DEVICES_EXCLUDE": ""}, models=CONV) as daemon:
        daemon.wait_ready("conv")
        ask(daemon, ASKED, 4)
        row = daemon.wait_row("conv", lambda r: r["serving"] and r["measured"], "is measured")
        (found,) = row["measured"]
        assert of(found["size"]) == ("requests", ASKED)
        assert found["p50_us"]
        assert found["reference_p50_us"]
        _, text, _ = Edgectl(daemon.endpoint, capsys)("explain", "conv")
        assert "at x [1,3,48,80], as most requests had it (p50)" in text


def test_golden_samples_and_the_owners_word_come_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this order: what a command names, golden samples, requests."""
    with running_daemon(tmp_path) as daemon:
        folder = daemon.models / ".conv"
        (folder / "golden").mkdir(parents=True)
        zoo.write(folder / "model.onnx", zoo.fully_conv(multiple=8))
        np.savez(folder / "golden" / "a.npz", **{"inputs/x": np.ones(GOLDEN, np.float32)})
        folder.rename(daemon.models / "conv")
        daemon.wait_ready("conv")
        ask(daemon, ASKED, 5)
        edgectl = Edgectl(daemon.endpoint, capsys)
        assert of(tuned(edgectl)) == ("golden", GOLDEN)
        bench = edgectl.json("bench", "conv", "--seconds", "0.1", "--no-bare")
        assert of(bench["size"]) == ("golden", GOLDEN)

        named = [2, 3, 32, 32]
        assert of(tuned(edgectl, "--shape", "x=2x3x32x32")) == ("owner", named)
        bench = edgectl.json("bench", "conv", "--seconds", "0.1", "--no-bare", "--shape", "x=2x3x32x32")
        assert of(bench["size"]) == ("owner", named)
        large = np.random.default_rng(0).standard_normal((1, 3, 256, 512)).astype(np.float32)
        np.save(tmp_path / "x.npy", large)
        np.savez(tmp_path / "all.npz", x=large)
        assert of(tuned(edgectl, "-i", f"x=@{tmp_path}/x.npy")) == ("owner", list(large.shape))
        assert of(tuned(edgectl, "-i", f"@{tmp_path}/all.npz")) == ("owner", list(large.shape))

        report = edgectl.json("tune", "conv", "--budget", "200ms", "--shape", "x=1x3x9x9")
        assert all(not row["proven"] for row in report["rows"] if not row["current"])
        assert all("x [1,3,9,9] was refused" in row["why"] for row in report["rows"] if not row["current"])
        for wrong in (["--shape", "x=1x4x8x8"], ["--shape", "y=1"], ["-i", "x=1", "--shape", "x=1x3x8x8"]):
            code, _, err = edgectl("tune", "conv", "--budget", "200ms", *wrong)
            assert code != 0, err


def test_at_single_elements_nothing_is_decided_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model serves as it did; the table of a tune and `explain` have the reason."""
    with running_daemon(tmp_path, models={"one.onnx": zoo.only_one()}) as daemon:
        before = daemon.wait_ready("one")
        edgectl = Edgectl(daemon.endpoint, capsys)
        report = edgectl.json("tune", "one", "--budget", "200ms", "--yes")
        rows = [row for row in report["rows"] if row["size"]]
        assert rows
        for row in rows:
            assert (row["proven"], of(row["size"])) == (False, ("least", [1, 1]))
            assert "nothing is decided at free dimensions of 1" in row["why"]
        assert json.dumps(report["best"]) == json.dumps(report["current"])
        bench = edgectl.json("bench", "one", "--seconds", "0.1", "--no-bare")
        assert of(bench["size"]) == ("least", [1, 1])
        assert daemon.wait_ready("one")["pid"] == before["pid"]


def test_what_a_hostile_client_sends_pushes_nothing_out(tmp_path: Path) -> None:
    """A new size with each request has one place at a time, and is refused by no rule: it is only counted."""
    with running_daemon(tmp_path, models={"conv.onnx": zoo.fully_conv()}) as daemon:
        daemon.wait_ready("conv")
        ask(daemon, ASKED, 20)
        for width in range(1, 200):
            daemon.client.infer("conv", {"x": np.zeros((1, 3, 1, width), np.float32)})
        sizes = daemon.wait_ready("conv")["sizes"]
        assert sizes[0] == {"source": "requests", "shapes": {"x": ASKED}, "count": 20}
        assert len(sizes) <= 8
