"""Single operators on both real runtimes, in children that may die of them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest

from edged.runtimes.trials import TrialsFailed, list_jobs, run_trials
from tests.operator_tables import SIDES, start, table_of


@pytest.fixture(scope="module")
def rows() -> Mapping[str, Any]:
    """What this machine's runtimes do with one operator of each kind."""
    return table_of(
        "Mul-14(FP32,FP32=)",
        "Relu-14(FP32)",
        "Mul-14(INT64,INT64)",
        "Div-14(INT32,INT32)",
        "Gather-13(FP32,INT64=)",
        "Gather-13(FP32=,INT64)",
        "Sub-14(UINT8,UINT8)",
        "Cast-13(FP32; to=2)",
        "Reshape-14(FP32,INT64=)",
        "Reshape-14(FP32,INT64#)",
    ).rows


@pytest.mark.parametrize("name", ["Mul-14(FP32,FP32=)", "Gather-13(FP32,INT64=)", "Reshape-14(FP32,INT64=)"])
def test_what_agrees_is_found_to_agree(rows: Mapping[str, Any], name: str) -> None:
    """Else nothing could ever be moved."""
    assert (rows[name].finite, rows[name].nonfinite) == ("", "")
    assert rows[name].outputs == ("FP32",)
    assert rows[name].cases > 1


def test_a_rectifier_that_loses_nan_agrees_on_finite_values_only(rows: Mapping[str, Any]) -> None:
    """One column each."""
    assert rows["Relu-14(FP32)"].finite == ""
    assert "NaN" in rows["Relu-14(FP32)"].nonfinite


@pytest.mark.parametrize(
    "name",
    [
        "Mul-14(INT64,INT64)",
        "Div-14(INT32,INT32)",
        "Gather-13(FP32=,INT64)",
        "Sub-14(UINT8,UINT8)",
        "Cast-13(FP32; to=2)",
    ],
)
def test_integers_and_positions_that_come_from_the_data_do_not_agree(
    rows: Mapping[str, Any], name: str
) -> None:
    """64 bits in 32, a divisor of zero, a position outside, a wrapped byte, a number that no byte holds."""
    assert rows[name].finite


def test_an_operator_that_ends_its_runtime_is_a_verdict_and_the_others_go_on() -> None:
    """The rest is run in another child."""
    ended: list[int] = []

    def dying(settings: Mapping[str, Any], fd: int) -> subprocess.Popen[bytes]:
        # The first child really dies in its second job, of a signal.
        if settings["from"] == 0:
            code = (
                "import json, os, sys; from edged.runtimes import trials; run = trials.run_job; done = []\n"
                "def once(*a):\n"
                "    done.append(1)\n"
                "    return run(*a) if len(done) < 2 else os.kill(os.getpid(), 11)\n"
                "trials.run_job = once; trials.main(sys.argv[1:])"
            )
            ended.append(0)
            return subprocess.Popen(
                [sys.executable, "-c", code, json.dumps(settings)], pass_fds=(fd,), stderr=subprocess.DEVNULL
            )
        return start(settings, fd)

    only = ("Relu-14(FP32)", "Identity-14(FP32)", "Abs-13(FP32)")
    jobs = list_jobs(only)
    found = run_trials(dying, SIDES, only=only)
    assert ended == [0]
    assert set(found.rows) == set(only)
    assert found.rows[jobs[1].row].finite == "it ends a runtime: signal 11"
    assert [name for name, row in found.rows.items() if not row.finite] == [
        n for n in found.rows if n != jobs[1].row
    ]


def test_runtimes_that_do_not_start_make_no_table() -> None:
    """Nor does a child that is not there, or an operator that has no case."""
    with pytest.raises(TrialsFailed, match="do not start"):
        run_trials(start, (("onnxruntime", "CPU"), ("no_such_runtime", "CPU")), only=["Relu"])
    with pytest.raises(TrialsFailed, match="do not start"):
        run_trials(start, (("onnxruntime", "CPU"), ("openvino", "NO_SUCH_DEVICE")), only=["Relu"])

    def exits(_settings: Mapping[str, Any], fd: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", "pass"], pass_fds=(fd,))

    with pytest.raises(TrialsFailed, match="do not start"):
        run_trials(exits, SIDES, only=["Relu"])

    def nowhere(_settings: Mapping[str, Any], _fd: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen(["/no/such/python"])

    with pytest.raises(TrialsFailed, match="no child could be started: No such file"):
        run_trials(nowhere, SIDES, only=["Relu"])
    with pytest.raises(TrialsFailed, match="no case"):
        run_trials(start, SIDES, only=["NoSuchOperator"])


def test_jobs_are_the_same_in_parent_and_child() -> None:
    """They are named by their number alone."""
    jobs = [[(job.row, job.opset, job.fixed) for job in list_jobs(["Conv", "Relu"])] for _ in range(2)]
    assert jobs[0] == jobs[1]
    assert {job.op for job in list_jobs(["Relu-14(FP32)"])} == {"Relu"}
    assert {job.row for job in list_jobs(["Relu-14(FP32)"])} == {"Relu-14(FP32)"}
