"""A short seeded run of `python -m tests.torture`, and that it can fail: each lock alone, and none at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from edged.runtimes.base import create_runtime
from edged.runtimes.operators import Side, find_table
from tests.torture.differential import Outcome, try_graph

# Numbers at the edges of their types overflow, as they should.
pytestmark = pytest.mark.filterwarnings("ignore")

GRAPHS = 200


def tried(folder: Path, **locks: bool) -> list[Outcome]:
    """What came of the graphs of the first seeds."""
    return [try_graph(seed, folder, **locks) for seed in range(GRAPHS)]


@pytest.mark.slow
def test_no_answer_depends_on_who_else_asks_or_on_the_runtime(tmp_path: Path) -> None:
    """Of random graphs, whatever shares a run or is moved is answered as it is alone and where it was."""
    found = tried(tmp_path)
    assert [f"{each.seed}: {each.wrong}" for each in found if each.wrong] == []
    assert sum(each.loads for each in found) > 0.9 * GRAPHS
    assert GRAPHS / 2 < sum(each.batched for each in found) < 0.9 * GRAPHS
    # Elsewhere than where the table was made nothing is moved, which is right, and proves nothing.
    least = GRAPHS / 10 if table_here() else 0
    assert least <= sum(each.moved for each in found) < GRAPHS / 2


@pytest.mark.slow
def test_without_a_proof_there_are_wrong_answers(tmp_path: Path) -> None:
    """Each lock alone keeps most from going wrong; without both, the same trial finds many wrong answers."""
    assert sum(bool(each.wrong) for each in tried(tmp_path, reading=False, trial=False)) > GRAPHS / 10


@pytest.mark.slow
def test_without_the_table_and_the_comparison_moves_are_wrong(tmp_path: Path) -> None:
    """So it is these that keep the answers as they were."""
    found = tried(tmp_path, table=False, compared=False)
    assert sum(each.wrong.startswith("moved") for each in found) > GRAPHS / 20


def table_here() -> bool:
    """Whether there is a table of operators for this machine's versions and processor."""
    sides = [Side.of(name, create_runtime(name).version, "CPU") for name in ("onnxruntime", "openvino")]
    return find_table(sides[0], sides[1], None)[0] is not None
