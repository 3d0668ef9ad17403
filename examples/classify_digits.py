"""Classifies handwritten digits that the network has never seen.

python examples/classify_digits.py [HOW_MANY]
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from edged import Client

SHADES = " .:-=+*#%@"


def picture(pixels: np.ndarray) -> str:
    """64 pixels from 0 to 16 as eight lines of text."""
    rows = pixels.reshape(8, 8).astype(int) * (len(SHADES) - 1) // 16
    return "\n".join("".join(SHADES[shade] * 2 for shade in row) for row in rows)


def main(how_many: int) -> int:
    with np.load(Path(__file__).with_name("digits-heldout.npz")) as data:
        images, labels = data["images"].astype(np.float32), data["labels"]

    right = 0
    with Client() as client:
        for image, label in zip(images[:how_many], labels, strict=False):
            result = client.infer("digits", {"image": image[np.newaxis]})
            answer = int(result["label"][0])
            chance = result["probabilities"][0, answer]
            right += answer == label
            print(picture(image))
            print(
                f"reads {answer} ({chance:.0%}), is {label}: version {result.model_version} on "
                f"{result.device} by {result.runtime}, {result.compute_us} µs\n"
            )
    print(f"{right} of {how_many} right")
    return 0 if right > 0.9 * how_many else 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 12))
