"""A real daemon moves a model to another runtime by itself, or leaves it where it is and says why."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from tests import zoo
from tests.e2e.harness import ROOT, Daemon, Edgectl, running_daemon, until
from tests.operator_tables import table_of, write_into

pytestmark = pytest.mark.e2e

SIGNATURES = (
    *("Mul-14(FP32,FP32=)", "Add-14(FP32,FP32=)", "Relu-14(FP32)", "Mul-14(INT64,INT64)"),
    "ReduceMean-18(FP32,INT64=; keepdims=0)",
)
"""What the models below need; a table of these alone is made in seconds, on whatever machine this is."""

FINITE = b"finite_inputs = true\n"
NODE = helper.make_node("Mul", ["n", "n"], ["r"])
AREA = zoo.elementwise(NODE, inputs=[("n", "INT64", [1])], outputs=[("r", "INT64", [1])])


@pytest.fixture
def daemon_with_table(tmp_path: Path) -> Any:
    """A daemon that may measure, with a table of this machine's runtimes."""
    write_into(tmp_path / "state" / "operators", table_of(*SIGNATURES))
    with running_daemon(tmp_path, {"EDGED_DEVICES_EXCLUDE": "openvino:GPU,openvino:NPU"}) as daemon:
        yield daemon


def chosen(daemon: Daemon, name: str) -> dict[str, Any]:
    """The model's row once it was measured, and serves where it is to serve."""

    def done() -> dict[str, Any]:
        row = daemon.serving(name)
        measured = row is not None and row["state"] == "READY" and row["choice"] in ("measured", "remembered")
        return row if measured and row is not None and not daemon.client.server_status()["measuring"] else {}

    return until(done, what=lambda: f"{name} is measured: {daemon.rows(name)}")


def picture(*, nan: bool = False) -> Any:
    """An image, by wish of a sensor that is broken in a corner."""
    x = np.random.default_rng(3).standard_normal((1, 3, 256, 256)).astype("f4")
    if nan:
        x[0, 0, :5] = np.nan
    return x


def test_a_model_moves_only_by_the_owners_word_that_no_nan_comes(
    daemon_with_table: Daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    """With it the daemon moves the model by itself. Without, it stays, and says why and what it costs."""
    daemon, edgectl = daemon_with_table, Edgectl(daemon_with_table.endpoint, capsys)
    model = zoo.elementwise()
    (daemon.models / "moves.toml").write_bytes(FINITE)
    zoo.write(daemon.models / "moves.onnx", model)
    daemon.wait_ready("moves")
    row = daemon.wait_row("moves", lambda r: r["serving"] and r["runtime"] == "openvino", "has moved")
    assert (row["state"], row["choice"]) == ("READY", "measured")

    zoo.write(daemon.models / "stays.onnx", model)
    daemon.wait_ready("stays")
    before = daemon.client.infer("stays", {"x": picture(nan=True)})["score"]
    assert np.isnan(before).all()
    assert chosen(daemon, "stays")["runtime"] == "onnxruntime"
    for _ in range(2):
        code, out, _ = edgectl("explain", "stays")
        assert code == 0
        told = " ".join(out.split())
        assert "it may not serve: Relu-14(FP32) differs on NaN, Inf or denormals (NaN: " in told
        assert "finite_inputs = true in the model's settings would allow it" in told
        assert " × as fast, but" in told
        np.testing.assert_array_equal(daemon.client.infer("stays", {"x": picture(nan=True)})["score"], before)
        one, other = (daemon.client.infer(name, {"x": picture()})["score"] for name in ("stays", "moves"))
        np.testing.assert_allclose(one, other, rtol=1e-3)
        # And so it is in the daemon's next life.
        assert daemon.stop() == 0
        daemon.start()
        assert daemon.wait_ready("stays")["choice"] == "remembered"
        assert daemon.wait_ready("moves")["runtime"] == "openvino"

    (daemon.models / "moves.toml").unlink()
    daemon.wait_row("moves", lambda r: r["serving"] and r["runtime"] == "onnxruntime", "is back without it")


def test_an_owner_may_accept_what_is_not_proven(
    daemon_with_table: Daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a flag of its own; the disagreements are in the report, and it holds after a restart."""
    daemon, edgectl = daemon_with_table, Edgectl(daemon_with_table.endpoint, capsys)
    zoo.write(daemon.models / "m.onnx", zoo.elementwise())
    daemon.wait_ready("m")
    report = edgectl.json("tune", "m", "--budget", "500ms", "--yes")
    assert report["best"]["runtime"] == "onnxruntime"
    assert report["best_unproven"]["runtime"] == "openvino"
    (row,) = [row for row in report["rows"] if row["runtime"] == "openvino"]
    assert "Relu-14(FP32) differs on NaN" in row["obstacles"][0]
    report = edgectl.json("tune", "m", "--budget", "500ms", "--yes", "--accept-unproven")
    assert report["best"]["runtime"] == "openvino"
    assert daemon.stop() == 0
    daemon.start()
    row = daemon.wait_ready("m")
    assert (row["runtime"], row["choice"]) == ("openvino", "tuned")


def test_integers_that_another_runtime_cuts_off_keep_a_model(daemon_with_table: Daemon) -> None:
    """Whatever the owner says of NaN; the answer is right before and after the daemon has looked."""
    daemon = daemon_with_table
    (daemon.models / "area.toml").write_bytes(FINITE)
    zoo.write(daemon.models / "area.onnx", AREA)
    daemon.wait_ready("area")
    row = chosen(daemon, "area")
    assert row["runtime"] == "onnxruntime"
    (measured,) = row["measured"]
    assert measured["obstacles"][0].startswith("Mul-14(INT64,INT64) disagrees")
    assert (measured["agrees"], measured["remedy"]) == (False, "")
    assert measured["p50_us"] > 0
    answer = daemon.client.infer("area", {"x": picture(), "n": np.array([100_000])})
    assert answer["r"].tolist() == [10_000_000_000]


def test_a_daemon_without_a_table_moves_nothing_until_one_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`edgectl operators` makes one beside the running daemon, which takes it up at its next start."""
    # An edged without the tables that it comes with: they may hold on this machine.
    package = tmp_path / "package"
    shutil.copytree(ROOT / "edged", package / "edged", ignore=shutil.ignore_patterns("operators-*.json"))
    settings = {"EDGED_DEVICES_EXCLUDE": "openvino:GPU,openvino:NPU", "PYTHONPATH": str(package)}
    models = {"moves.onnx": zoo.elementwise(), "moves.toml": FINITE}
    with running_daemon(tmp_path / "daemon", settings, models=models) as daemon:
        edgectl = Edgectl(daemon.endpoint, capsys)
        (measured,) = chosen(daemon, "moves")["measured"]
        assert "there is no table of operators for onnxruntime" in measured["why"]
        assert "edgectl operators" in measured["remedy"]
        assert measured["p50_us"] > 0
        assert edgectl("explain", "moves")[1].rstrip().endswith("edgectl operators")

        only = [part for name in SIGNATURES for part in ("--only", name)]
        report = edgectl.json("operators", *only)
        path = Path(report["path"])
        assert path.parent == daemon.state / "operators"
        assert report["signatures"] == len(SIGNATURES)
        assert path.stat().st_uid == daemon.state.stat().st_uid
        assert path.stat().st_mode & 0o022 == 0
        assert daemon.stop() == 0

        path.chmod(0o666)  # a stranger could have written it, and nothing is believed of it
        daemon.start()
        (measured,) = chosen(daemon, "moves")["measured"]
        assert "may be written by others" in measured["why"]
        assert daemon.stop() == 0
        assert edgectl("operators", "--state-dir", str(daemon.state), "--only", SIGNATURES[0])[0] == 0
        assert path.stat().st_mode & 0o022 == 0  # and that one took nothing over from it
        assert edgectl.json("operators", "--state-dir", str(daemon.state), *only)["signatures"] == 5
        daemon.start()
        daemon.wait_row("moves", lambda r: r["serving"] and r["runtime"] == "openvino", "has moved")


@pytest.mark.slow
def test_a_real_network_moves(tmp_path: Path) -> None:
    """One that reads text, as its authors publish it: the daemon finds out that another runtime is faster."""
    spec = find_spec("rapidocr_onnxruntime")
    if spec is None or spec.origin is None:
        pytest.skip("its weights are in a package: pip install --no-deps rapidocr-onnxruntime")
    model = onnx.load(Path(spec.origin).parent / "models" / "ch_ppocr_mobile_v2.0_cls_infer.onnx")
    for dim, size in zip(model.graph.input[0].type.tensor_type.shape.dim, (1, 3, 48, 192), strict=True):
        dim.dim_value = size
    settings = {"EDGED_DEVICES_EXCLUDE": "openvino:GPU,openvino:NPU"}
    models = {"a.onnx": model, "a.toml": FINITE, "b.onnx": model}
    with running_daemon(tmp_path, settings, models=models) as daemon:
        row = chosen(daemon, "a")
        if any("edgectl operators" in measured["remedy"] for measured in row["measured"]):
            pytest.skip(f"no table holds on this machine: {row['measured']}")
        (measured,) = row["measured"]
        assert (measured["agrees"], measured["proven"]) == (True, True)
        if measured["p50_us"] < 0.85 * measured["reference_p50_us"] - 50:  # else it may not be worth it here
            daemon.wait_row("a", lambda r: r["serving"] and r["runtime"] == "openvino", "has moved")
        row = chosen(daemon, "b")
        assert row["runtime"] == "onnxruntime"
        assert "finite_inputs" in row["measured"][0]["remedy"]
