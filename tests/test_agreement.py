"""Two answers agree by the rule or they do not, and what proves nothing is not taken for proof."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edged.agreement import (
    FAST,
    GoldenMismatch,
    NoInputs,
    check_golden,
    disagreement,
    read_golden,
    synthetic_inputs,
)
from edged.errors import Code
from edged.measuring import measure
from edged.runtimes.base import RunFailed
from edged.tensors import TensorSpec

F = np.float32


class Function:
    """A model that is a Python function of its inputs."""

    def __init__(self, function: Callable[..., Any], *, seconds: float = 0.0, datatype: str = "FP32") -> None:
        self.inputs = (TensorSpec("x", "FP32", (-1, 4)),)
        self.outputs = (TensorSpec("y", datatype, (-1, 4)),)
        self.metadata: dict[str, str] = {}
        self.device, self.precision, self.threads, self.instances = "CPU", "f32", 1, 1
        self.fallback_reason: str | None = None
        self._function, self._seconds = function, seconds

    def run(
        self, feeds: Mapping[str, Any], output_names: Sequence[str], run: int = 0, *, borrowed: bool = False
    ) -> list[Any]:
        time.sleep(self._seconds)
        with np.errstate(all="ignore"):  # the edges are there to overflow
            return [self._function(feeds["x"])]

    def cancel(self, run: int = 0) -> None:
        return

    def shrink(self) -> None:
        return

    def close(self) -> None:
        return


def compare(
    reference: Callable[..., Any], candidate: Callable[..., Any], *, precision: str = "f32", **settings: Any
) -> dict[str, Any]:
    """Measures two functions against each other."""
    models = {"r": Function(reference), "c": Function(candidate)}
    return measure(
        lambda part: models[part["m"]],
        {"budget_s": 0, "reference": {"m": "r"}, "candidate": {"m": "c", "precision": precision}, **settings},
    )


def raises(_x: Any) -> Any:
    raise RunFailed(Code.INTERNAL, "RUNTIME_ERROR", "no")


@pytest.mark.parametrize(
    ("a", "b", "agree"),
    [
        (F([1, 2]), F([1, 2.0005]), True),
        (F([1, 2]), F([1, 2.01]), False),
        (F([1000, 0]), F([1000, 0.5]), True),
        (F([1, 2]), F([[1, 2]]), False),
        (F([1, 2]), np.array([1, 2.0]), False),
        (F([1, np.nan]), F([1, np.nan]), True),
        (F([1, np.nan]), F([1, 2]), False),
        (F([1, np.inf]), F([1, np.inf]), True),
        (F([1, np.inf]), F([1, -np.inf]), False),
        (F([1, np.inf]), F([1, 3e38]), False),
        (F([]), F([]), True),
        (F([0, 0]), F([0, 5e-6]), True),
        (np.int64([1, 2]), np.int64([1, 2]), True),
        (np.int64([1, 2]), np.int64([1, 3]), False),
        (np.array([True]), np.array([False]), False),
        (np.array(["a"], object), np.array([b"a"], object), True),
        (np.array(["a"], object), np.array(["b"], object), False),
        ([{1: 0.5}], [{1: 0.50001}], True),
        ([{1: 0.5}], [{1: 0.6}], False),
        ([{1: 0.5}], [{2: 0.5}], False),
        ([{1: 0.5}], [], False),
        (None, None, True),
        (None, F([1]), False),
    ],
)
def test_rule(a: Any, b: Any, agree: bool) -> None:
    """Floats within the norm and the maximum, all else exactly, NaN and infinities in the same places."""
    assert (disagreement(a, b, "FP32") is None) == agree


def test_bf16_is_compared_as_numbers() -> None:
    """Two bit patterns of bfloat16 that differ by a rounding are far apart by the rule for floats."""
    assert disagreement(np.uint16([0x3F80]), np.uint16([0x3F80]), "BF16") is None
    assert disagreement(np.uint16([0x3F80]), np.uint16([0x3F81]), "BF16") is not None


@given(st.lists(st.floats(width=32), max_size=8))
def test_everything_agrees_with_itself(values: list[float]) -> None:
    """No array, whatever is in it, disagrees with itself."""
    assert disagreement(F(values), F(values), "FP32") is None


def test_agreement_that_is_proven() -> None:
    """Equal answers that depend on the input are proof, and both sides are timed."""
    result = compare(lambda x: x * 2, lambda x: x + x)
    assert (result["agrees"], result["proven"]) == (True, True)
    assert result["runs"] > 0
    assert result["candidate_p50_us"] > 0


def test_other_answer_is_no_agreement() -> None:
    """A candidate that answers otherwise is timed all the same: its owner sees what it would bring."""
    result = compare(lambda x: x * 2, lambda x: x * 2.1)
    assert (result["agrees"], result["proven"]) == (False, False)
    assert "output 'y'" in result["why"]
    assert result["obstacles"] == [result["why"]]
    assert result["candidate_p50_us"] > 0


@pytest.mark.parametrize(
    ("candidate", "words"),
    [
        (lambda x: np.where(np.isnan(x), 0, x), "NaN in input 'x', output 'y': NaN in other places"),
        (lambda x: np.clip(x, -3e38, 3e38), "Inf in input 'x', output 'y'"),
        (lambda x: np.where(np.abs(x) < 1e-38, 1, x), "zeros in input 'x'"),
        (lambda x: np.minimum(x, 2**24), "Inf in input 'x'"),
    ],
    ids=["nan", "inf", "zero", "large"],
)
def test_what_differs_at_the_edges_only_is_found(candidate: Callable[[Any], Any], words: str) -> None:
    """Ones and normal numbers say nothing about it."""
    result = compare(lambda x: x, lambda x: candidate(x).astype("f4"))
    assert not result["agrees"]
    assert words in result["why"]


def test_what_never_comes_is_not_asked_for() -> None:
    """By the owner's word; where the reference's own answer is no number, nothing is compared."""

    def loses_nan(x: Any) -> Any:
        return np.where(np.isfinite(x), x, 0).astype("f4")

    assert not compare(lambda x: x * 2, lambda x: loses_nan(x * 2))["agrees"]
    result = compare(lambda x: x * 2, lambda x: loses_nan(x * 2), finite_inputs=True)
    assert (result["agrees"], result["proven"]) == (True, True)
    assert not compare(lambda x: x, lambda x: np.minimum(x, F(2**24)), finite_inputs=True)["agrees"]


def test_what_16_bits_do_not_hold_is_not_asked_of_who_chose_speed() -> None:
    """Of floats; NaN is, and so are integers."""

    def rounds(x: Any) -> Any:
        return np.minimum(x, F(2**24))

    assert not compare(lambda x: x, rounds, finite_inputs=True)["agrees"]
    assert compare(lambda x: x, rounds, finite_inputs=True, precision="fast")["agrees"]
    assert not compare(lambda x: x, lambda x: np.where(np.isnan(x), F(0), x), precision="fast")["agrees"]


def test_what_the_reference_refuses_the_candidate_must_refuse() -> None:
    """An error that becomes a made-up number is the worst of all answers."""

    def refuses_large(x: Any) -> Any:
        if np.nanmax(np.abs(x)) > 1e9:
            raises(x)
        return x

    result = compare(refuses_large, lambda x: x)
    assert not result["agrees"]
    assert "the candidate answers what the reference refuses" in result["why"]
    assert compare(refuses_large, refuses_large)["agrees"]


def test_constant_answer_proves_nothing() -> None:
    """A reference that answers the same to everything agrees with anybody, so it proves nothing."""
    result = compare(lambda x: np.ones_like(x), lambda x: np.ones_like(x))
    assert (result["agrees"], result["proven"]) == (True, False)


def test_inputs_that_raise_prove_nothing() -> None:
    """A reference that takes no made-up input leaves all as it is."""
    result = compare(raises, lambda x: x)
    assert (result["agrees"], result["proven"]) == (False, False)


def test_candidate_that_raises_does_not_agree() -> None:
    """What the reference can answer the candidate must."""
    result = compare(lambda x: x, raises)
    assert not result["agrees"]
    assert "candidate raises" in result["why"]


def test_candidate_that_does_not_load_is_told() -> None:
    """A candidate that fails to load is a result, not an error."""

    def load(part: Mapping[str, Any]) -> Any:
        if part["m"] == "c":
            raise ValueError("cannot compile /tmp/secret/model.onnx")
        return Function(lambda x: x)

    result = measure(load, {"budget_s": 0, "reference": {"m": "r"}, "candidate": {"m": "c"}})
    assert result["why"] == "the candidate does not load: cannot compile model.onnx"


def test_golden_samples_come_first(tmp_path: Path) -> None:
    """A disagreement that only the owner's samples show is found."""
    np.savez(tmp_path / "a.npz", **{"inputs/x": F([[7, 7, 7, 7]])})
    result = compare(lambda x: x, lambda x: np.where(x == 7, x + 1, x), golden_dir=str(tmp_path))
    assert not result["agrees"]
    assert "a.npz" in result["why"]


def test_faster_candidate_is_seen() -> None:
    """The one that takes longer is measured as such."""
    models = {"r": Function(lambda x: x, seconds=0.005), "c": Function(lambda x: x, seconds=0.001)}
    result = measure(
        lambda part: models[part["m"]], {"budget_s": 0, "reference": {"m": "r"}, "candidate": {"m": "c"}}
    )
    assert result["reference_p50_us"] > 1.5 * result["candidate_p50_us"]


def test_golden_tolerance_is_the_owners() -> None:
    """What differs by less than the owner allows passes, what differs by more fails with the figure."""
    model = Function(lambda x: x + 0.01)
    samples = read_golden(
        None,
        [{"inputs": {"x": [[1, 2, 3, 4]]}, "outputs": {"y": [[1, 2, 3, 4]]}}],
        model.inputs,
        model.outputs,
    )
    assert check_golden(model, samples, tolerance={"rtol": 0, "atol": 0.02}) == 1
    with pytest.raises(GoldenMismatch, match=r"4 of 4 elements differ by up to 0\.01"):
        check_golden(model, samples, tolerance={})


@pytest.mark.parametrize(
    "sample",
    [
        {"inputs": {"nobody": [1]}},
        {"inputs": {"x": [["a"]]}},
        {"inputs": {"x": [[1, 2], [3]]}},
        {"inputs": {"x": [[1]]}, "outputs": {"nobody": [1]}},
    ],
)
def test_unusable_golden_sample_is_a_mismatch(sample: dict[str, Any]) -> None:
    """A check that cannot be made is not one that passed."""
    model = Function(lambda x: x)
    with pytest.raises(GoldenMismatch):
        read_golden(None, [sample], model.inputs, model.outputs)


def test_pickle_in_a_golden_file_is_refused(tmp_path: Path) -> None:
    """Nothing is unpickled, also from a file that the owner put there."""
    np.savez(tmp_path / "a.npz", **{"inputs/x": np.array([{"a": 1}], object)}, allow_pickle=True)
    model = Function(lambda x: x)
    with pytest.raises(GoldenMismatch, match=r"a\.npz cannot be read|neither"):
        read_golden(str(tmp_path), [], model.inputs, model.outputs)


@pytest.mark.parametrize("content", [b"", b"junk", b"PK\x03\x04junk", b"\x93NUMPY\x01\x00"], ids=repr)
def test_a_broken_golden_file_is_a_mismatch_that_names_it(tmp_path: Path, content: bytes) -> None:
    """Whatever zipfile and numpy raise for it; an .npy under that name is none either."""
    (tmp_path / "a.npz").write_bytes(content)
    model = Function(lambda x: x)
    with pytest.raises(GoldenMismatch, match=r"a\.npz cannot be read"):
        read_golden(str(tmp_path), [], model.inputs, model.outputs)
    with (tmp_path / "a.npz").open("wb") as stream:
        np.save(stream, np.ones(3))
    with pytest.raises(GoldenMismatch, match=r"a\.npz cannot be read"):
        read_golden(str(tmp_path), [], model.inputs, model.outputs)


def test_synthetic_integers_stay_small() -> None:
    """Made-up integers are 0 or 1, since they are often sizes; free dimensions are 1."""
    specs = [
        TensorSpec("i", "INT64", (-1, 100)),
        TensorSpec("f", "FP16", ()),
        TensorSpec("s", "BYTES", (2,)),
        TensorSpec("b", "BF16", (2,)),
        TensorSpec("o", "FP32", (1,), optional=True),
    ]
    feeds = synthetic_inputs(specs, "normal")
    assert set(feeds) == {"i", "f", "s", "b"}
    assert feeds["i"].shape == (1, 100)
    assert set(np.unique(feeds["i"])) <= {0, 1}
    assert feeds["f"].dtype == np.float16
    assert feeds["b"].dtype == np.uint16


def test_inputs_too_large_to_make_up() -> None:
    """A declared shape of gigabytes is not filled."""
    with pytest.raises(NoInputs):
        synthetic_inputs([TensorSpec("x", "FP32", (1 << 20, 1 << 20))], "ones")


def test_fast_bounds_let_bf16_pass_and_another_answer_not() -> None:
    """An owner who chose speed accepts bf16's rounding, never another network's answer."""
    rng = np.random.default_rng(5)
    reference = rng.standard_normal(1000).astype("f4")
    rounded = (reference.view("u4") & 0xFFFF0000).view("f4")
    assert disagreement(reference, rounded, "FP32") is not None
    assert disagreement(reference, rounded, "FP32", FAST) is None
    other = rng.standard_normal(1000).astype("f4")
    assert disagreement(reference, other, "FP32", FAST) is not None
