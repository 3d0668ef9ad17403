"""A short seeded run of `python -m tests.torture`, and that it can fail: each lock alone, and none at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.torture.differential import Outcome, try_graph

pytestmark = pytest.mark.filterwarnings(
    "ignore"
)  # numbers at the edges of their types overflow, as they should

GRAPHS = 200


def tried(folder: Path, *, reading: bool = True, trial: bool = True) -> list[Outcome]:
    """What came of the graphs of the first seeds."""
    return [try_graph(seed, folder, reading=reading, trial=trial) for seed in range(GRAPHS)]


@pytest.mark.slow
def test_no_answer_depends_on_who_else_asks(tmp_path: Path) -> None:
    """Of random graphs and rows, whatever the two locks let share a run is answered as it is alone."""
    found = tried(tmp_path)
    assert [f"{each.seed}: {each.wrong}" for each in found if each.wrong] == []
    assert sum(each.loads for each in found) > 0.9 * GRAPHS
    assert GRAPHS / 2 < sum(each.batched for each in found) < 0.9 * GRAPHS


@pytest.mark.slow
def test_without_a_proof_there_are_wrong_answers(tmp_path: Path) -> None:
    """Each lock alone keeps most from going wrong; without both, the same trial finds many wrong answers."""
    assert sum(bool(each.wrong) for each in tried(tmp_path, reading=False, trial=False)) > GRAPHS / 10
