"""Trains the digit classifier that ships with edged, and writes its bundle.

    python models/train_digits.py                    # models/digits/ and examples/digits-heldout.npz
    python models/train_digits.py --seed 8 --out DIR # the same network from another start, into DIR

A network of one hidden layer learns 80 % of scikit-learn's 1797 digits; the other 20 % never take part in
training and are what its accuracy is measured on, what the golden samples are taken from and what the
examples classify. The split is the same for every seed, so that no network ever saw a held-out picture.
The graph is written with plain ONNX operators, so that every runtime can load it.
"""

from __future__ import annotations

import argparse
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier

__all__ = ["SEED", "Split", "Trained", "export", "split", "train", "write_bundle"]

SEED = 7
"""The seed of the network that is shipped."""

_SPLIT_SEED = 2026
_PIXEL_MAX = 16.0
_GOLDEN_PER_DIGIT = 2
_HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Split:
    """Pictures as FP32 [N,64], pixels 0 to 16 row by row, and their digits as INT64 [N]."""

    train_images: NDArray[np.float32]
    train_labels: NDArray[np.int64]
    heldout_images: NDArray[np.float32]
    heldout_labels: NDArray[np.int64]


@dataclass(frozen=True)
class Trained:
    """A network and how many of the held-out pictures it classifies right, from 0 to 1."""

    model: onnx.ModelProto
    accuracy: float
    predicted: NDArray[np.int64]
    confidence: NDArray[np.float64]


def split() -> Split:
    """The one split of the data into training and held-out pictures, each digit in proportion."""
    data = load_digits()
    train_x, heldout_x, train_y, heldout_y = train_test_split(
        data.data.astype(np.float32),
        data.target.astype(np.int64),
        test_size=0.2,
        random_state=_SPLIT_SEED,
        stratify=data.target,
    )
    return Split(train_x, train_y, heldout_x, heldout_y)


def train(seed: int = SEED) -> Trained:
    """Trains from `seed` alone: the same seed and libraries give the same network."""
    data = split()
    network = MLPClassifier(
        hidden_layer_sizes=(64,), alpha=0.3, solver="adam", max_iter=120, tol=0.0, random_state=seed
    )
    with warnings.catch_warnings():
        # The number of rounds is fixed, so "did not converge" is no news; nothing else may warn.
        warnings.simplefilter("ignore", ConvergenceWarning)
        network.fit(data.train_images / _PIXEL_MAX, data.train_labels)
    chances = network.predict_proba(data.heldout_images / _PIXEL_MAX)
    predicted = chances.argmax(axis=1).astype(np.int64)
    accuracy = float((predicted == data.heldout_labels).mean())
    return Trained(export(network, seed=seed, accuracy=accuracy), accuracy, predicted, chances.max(axis=1))


def export(network: MLPClassifier, *, seed: int, accuracy: float) -> onnx.ModelProto:
    """The network as ONNX: `image` FP32 [N,64] → `label` INT64 [N], `probabilities` FP32 [N,10]."""
    constants = {"scale": np.array(1 / _PIXEL_MAX, np.float32)}
    nodes = [helper.make_node("Mul", ["image", "scale"], ["hidden_0"])]
    layers = list(zip(network.coefs_, network.intercepts_, strict=True))
    for number, (weight, bias) in enumerate(layers, start=1):
        constants[f"weight_{number}"] = weight.astype(np.float32)
        constants[f"bias_{number}"] = bias.astype(np.float32)
        inputs = [f"hidden_{number - 1}", f"weight_{number}", f"bias_{number}"]
        if number == len(layers):
            nodes.append(helper.make_node("Gemm", inputs, ["scores"]))
        else:
            nodes.append(helper.make_node("Gemm", inputs, [f"sum_{number}"]))
            nodes.append(helper.make_node("Relu", [f"sum_{number}"], [f"hidden_{number}"]))
    nodes.append(helper.make_node("Softmax", ["scores"], ["probabilities"], axis=1))
    nodes.append(helper.make_node("ArgMax", ["scores"], ["label"], axis=1, keepdims=0))
    graph = helper.make_graph(
        nodes,
        "digits",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 64])],
        [
            helper.make_tensor_value_info("label", TensorProto.INT64, ["N"]),
            helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["N", 10]),
        ],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
        doc_string="Handwritten digits of 8 x 8 pixels, 0 (white) to 16 (black), row by row.",
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name="edged"
    )
    helper.set_model_props(
        model,
        {
            "labels": "0,1,2,3,4,5,6,7,8,9",
            "seed": str(seed),
            "heldout_accuracy": f"{accuracy:.4f}",
            "data": "Optical Recognition of Handwritten Digits (Alpaydin, Kaynak 1998), CC BY 4.0",
        },
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def write_bundle(folder: Path, trained: Trained) -> None:
    """Writes `folder`/golden/digits.npz, then `folder`/model.onnx by a rename.

    The golden samples say the digit and not the probabilities: a network that is trained anew passes
    them when it reads these pictures right, and one that does not is never served.
    """
    data = split()
    chosen: list[int] = []
    for digit in range(10):
        right = np.flatnonzero((data.heldout_labels == digit) & (trained.predicted == digit))
        surest = right[np.argsort(-trained.confidence[right], kind="stable")]
        chosen += surest[:_GOLDEN_PER_DIGIT].tolist()
    (folder / "golden").mkdir(parents=True, exist_ok=True)
    np.savez(
        folder / "golden" / "digits.npz",
        **{"inputs/image": data.heldout_images[chosen], "outputs/label": data.heldout_labels[chosen]},
    )
    temporary = folder / ".model.onnx"
    temporary.write_bytes(trained.model.SerializeToString())
    os.replace(temporary, folder / "model.onnx")


def _main() -> None:
    parser = argparse.ArgumentParser(description="Train the digit classifier and write its bundle.")
    parser.add_argument("--seed", type=int, default=SEED, help=f"where training starts (default {SEED})")
    parser.add_argument("--out", type=Path, help="the bundle's folder (default models/digits)")
    options = parser.parse_args()
    trained = train(options.seed)
    write_bundle(options.out or _HERE / "digits", trained)
    if options.out is None:
        data = split()
        np.savez_compressed(
            _HERE.parent / "examples" / "digits-heldout.npz",
            images=data.heldout_images.astype(np.uint8),
            labels=data.heldout_labels.astype(np.uint8),
        )
    print(f"seed {options.seed}: {trained.accuracy:.2%} of {len(trained.predicted)} held-out digits right")


if __name__ == "__main__":
    _main()
