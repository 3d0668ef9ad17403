"""An app written for ONNX Runtime, moved over to edged by one line.

    python examples/onnxruntime_drop_in.py

Before:  session = onnxruntime.InferenceSession("models/digits/model.onnx")
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

import edged


def main() -> int:
    session = edged.InferenceSession("digits")  # the one line

    feed = session.get_inputs()[0]
    print(f"input {feed.name} {feed.type} {feed.shape}")
    for output in session.get_outputs():
        print(f"output {output.name} {output.type} {output.shape}")
    print(f"providers {session.get_providers()}")

    with np.load(Path(__file__).with_name("digits-heldout.npz")) as data:
        images, labels = data["images"].astype(np.float32), data["labels"]
    (answers,) = session.run(["label"], {feed.name: images})

    right = int((answers == labels).sum())
    print(f"{right} of {len(labels)} right, in one batch")
    return 0 if right > 0.9 * len(labels) else 1


if __name__ == "__main__":
    sys.exit(main())
