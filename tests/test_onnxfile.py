"""Which inputs and outputs of an ONNX file have no declared rank."""

from __future__ import annotations

from pathlib import Path

import pytest

from edged.runtimes.onnxfile import unranked
from tests import zoo


def test_a_free_rank_is_told_from_a_scalar(tmp_path: Path) -> None:
    """No shape at all is a free rank; a shape of no dimensions is a scalar."""
    assert unranked(str(zoo.write(tmp_path / "free.onnx", zoo.free_rank()))) == {"x", "y"}
    assert unranked(str(zoo.write(tmp_path / "scalar.onnx", zoo.identity("FP32", [])))) == frozenset()
    assert unranked(str(zoo.write(tmp_path / "zipmap.onnx", zoo.zipmap()))) == frozenset()
    assert unranked(str(zoo.write(tmp_path / "slow.onnx", zoo.slow()))) == frozenset()


def test_a_file_that_cannot_be_walked_says_nothing(tmp_path: Path) -> None:
    """Every truncation and every flipped byte gives a set, never an exception."""
    whole = zoo.free_rank().SerializeToString()
    for length in range(1, len(whole)):
        assert unranked(str(zoo.write(tmp_path / "cut.onnx", whole[:length]))) <= {"x", "y"}
    for at in range(len(whole)):
        unranked(str(zoo.write(tmp_path / "bent.onnx", whole[:at] + b"\xff" + whole[at + 1 :])))


@pytest.mark.parametrize("name", ["free", "scalar"])
def test_onnx_runtime_takes_the_file_s_word(tmp_path: Path, name: str) -> None:
    """The loaded model declares what the file does."""
    from edged.runtimes.base import LoadCancel, LoadRequest, create_runtime

    model = zoo.free_rank() if name == "free" else zoo.identity("FP32", [])
    path = zoo.write(tmp_path / "m.onnx", model)
    loaded = create_runtime("onnxruntime").load(LoadRequest(str(path)), LoadCancel())
    wanted = None if name == "free" else ()
    assert (loaded.inputs[0].shape, loaded.outputs[0].shape) == (wanted, wanted)
