"""Many requests at once from asyncio: one socket, no threads.

python examples/async_client.py
"""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

import numpy as np

from edged import AsyncClient


async def main() -> int:
    with np.load(Path(__file__).with_name("digits-heldout.npz")) as data:
        images, labels = data["images"].astype(np.float32), data["labels"]

    async with AsyncClient() as client:
        gate = asyncio.Semaphore(16)  # the daemon bounds what one client may have in flight; stay below

        async def classify(image: np.ndarray) -> int:
            async with gate:
                result = await client.infer("digits", {"image": image[np.newaxis]}, outputs=["label"])
            return int(result["label"][0])

        began = time.perf_counter()
        answers = await asyncio.gather(*(classify(image) for image in images))
        took_s = time.perf_counter() - began

    right = int((np.array(answers) == labels).sum())
    print(f"{len(answers)} requests in {took_s * 1000:.0f} ms, {len(answers) / took_s:.0f} a second")
    print(f"{right} of {len(answers)} right")
    return 0 if right > 0.9 * len(answers) else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
