"""The model that ships is what its script makes of the data, and as good as its README says."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # only effective before the import
import onnxruntime as ort

ROOT = Path(__file__).resolve().parent.parent
BUNDLE = ROOT / "models" / "digits"

sys.path.insert(0, str(ROOT / "models"))
train_digits = pytest.importorskip("train_digits", reason="training needs scikit-learn", exc_type=ImportError)
sys.path.pop(0)


def heldout() -> tuple[np.ndarray, np.ndarray]:
    """The held-out pictures as the examples read them."""
    with np.load(ROOT / "examples" / "digits-heldout.npz") as data:
        return data["images"].astype(np.float32), data["labels"].astype(np.int64)


def answers(model: bytes, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Label and probabilities for each picture."""
    label, probabilities = ort.InferenceSession(model).run(["label", "probabilities"], {"image": images})
    return label, probabilities


def test_accuracy_on_held_out_pictures_is_what_the_readme_says() -> None:
    """The shipped network reads as many held-out pictures as is claimed."""
    images, labels = heldout()
    label, probabilities = answers((BUNDLE / "model.onnx").read_bytes(), images)
    assert np.array_equal(label, probabilities.argmax(axis=1))
    right = int((label == labels).sum())
    text = (ROOT / "models" / "README.md").read_text()
    claimed = re.search(r"\| accuracy \| ([\d.]+) % of the (\d+) held-out pictures \((\d+) right\)", text)
    assert claimed
    assert (len(labels), right) == (int(claimed[2]), int(claimed[3]))
    assert 100 * right / len(labels) == pytest.approx(float(claimed[1]), abs=0.05)
    assert right / len(labels) > 0.95


def test_training_again_gives_the_shipped_network() -> None:
    """The same seed gives the same answers, but for what another linear algebra library rounds otherwise."""
    images, _ = heldout()
    again = train_digits.train()
    shipped = onnx.load(str(BUNDLE / "model.onnx"))
    stated = {p.key: p.value for p in shipped.metadata_props}
    assert again.accuracy == pytest.approx(float(stated["heldout_accuracy"]), abs=0.01)
    label, probabilities = answers((BUNDLE / "model.onnx").read_bytes(), images)
    label_again, probabilities_again = answers(again.model.SerializeToString(), images)
    assert (label == label_again).mean() > 0.99
    assert np.abs(probabilities - probabilities_again).max() < 0.05


def test_held_out_pictures_took_no_part_in_training() -> None:
    """No held-out picture, golden ones included, is among those that the network learned from."""
    data = train_digits.split()
    images, labels = heldout()
    assert np.array_equal(images, data.heldout_images)
    assert np.array_equal(labels, data.heldout_labels)
    with np.load(BUNDLE / "golden" / "digits.npz") as golden:
        seen = {row.tobytes() for row in golden["inputs/image"]}
        assert golden["outputs/label"].tolist() == [d for d in range(10) for _ in range(2)]
    assert seen <= {row.tobytes() for row in data.heldout_images}
    assert not seen & {row.tobytes() for row in data.train_images}


def test_another_seed_passes_the_golden_samples(tmp_path: Path) -> None:
    """A network trained from another start may replace the shipped one: it reads the golden pictures too."""
    trained = train_digits.train(seed=8)
    train_digits.write_bundle(tmp_path / "digits", trained)
    with np.load(BUNDLE / "golden" / "digits.npz") as golden:
        label, _ = answers((tmp_path / "digits" / "model.onnx").read_bytes(), golden["inputs/image"])
        assert np.array_equal(label, golden["outputs/label"])
    assert (tmp_path / "digits" / "model.onnx").read_bytes() != (BUNDLE / "model.onnx").read_bytes()
