"""Says where somebody speaks in a recording, with a network that carries state from chunk to chunk.

    edgectl put "$(python examples/silero.py)" --name silero_vad  # once: gives the daemon the network
    python examples/vad.py [RECORDING.wav]

Without a recording, espeak-ng speaks a sentence between two silences, if it is installed. The state
belongs to the app: it goes with each request and comes back with the answer, so that the daemon keeps
nothing between requests, and may restart between two of them.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import wave
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from edged import Client

RATE_HZ = 16000
CHUNK = 512  # what the network wants at 16 kHz: 32 ms ...
CONTEXT = 64  # ... and the end of the chunk before
SENTENCE = "The quick brown fox jumps over the lazy dog, and nobody lost a request."


def main(recording: str | None) -> int:
    if recording is not None:
        sound = read_wave(Path(recording).read_bytes())
    elif shutil.which("espeak-ng"):
        silence = np.zeros(RATE_HZ, np.float32)
        sound = np.concatenate([silence, spoken(SENTENCE), silence])
    else:
        print("give a recording, or install espeak-ng to have one spoken", file=sys.stderr)
        return 2

    with Client() as client:
        chances = np.array(list(voice_chances(client, sound)))
    speaking = chances > 0.5
    print("".join("▁▂▃▄▅▆▇█"[min(7, int(chance * 8))] for chance in chances))
    for begin, end in stretches(speaking):
        print(f"speech from {begin * CHUNK / RATE_HZ:.2f} s to {end * CHUNK / RATE_HZ:.2f} s")
    print(f"{speaking.mean():.0%} of {len(sound) / RATE_HZ:.1f} s")
    return 0 if speaking.any() else 1


def voice_chances(client: Client, sound: np.ndarray) -> Iterator[float]:
    """For each chunk, how likely it holds a voice."""
    state = np.zeros((2, 1, 128), np.float32)
    context = np.zeros(CONTEXT, np.float32)
    rate = np.array(RATE_HZ, np.int64)
    for at in range(0, len(sound) - CHUNK + 1, CHUNK):
        chunk = sound[at : at + CHUNK]
        feeds = {"input": np.concatenate([context, chunk])[np.newaxis], "state": state, "sr": rate}
        answer = client.infer("silero_vad", feeds)
        state, context = answer["stateN"], chunk[-CONTEXT:]
        yield float(answer["output"][0, 0])


def stretches(speaking: np.ndarray) -> Iterator[tuple[int, int]]:
    """Where a run of true begins and ends."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], speaking, [False]]).astype(int)))
    yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)


def spoken(sentence: str) -> np.ndarray:
    """The sentence in espeak-ng's voice."""
    done = subprocess.run(["espeak-ng", "--stdout", sentence], capture_output=True, check=True, timeout=30)
    return read_wave(done.stdout)


def read_wave(data: bytes) -> np.ndarray:
    """16-bit PCM of any rate and number of channels as FP32 at 16 kHz, one channel, -1 to 1."""
    with wave.open(io.BytesIO(data)) as file:
        if file.getsampwidth() != 2:
            raise SystemExit("the recording must be 16-bit PCM")
        rate, channels = file.getframerate(), file.getnchannels()
        raw = file.readframes(file.getnframes())
    samples = np.frombuffer(raw[: len(raw) // (2 * channels) * 2 * channels], "<i2")
    sound = samples.reshape(-1, channels).mean(axis=1) / 32768
    wanted = np.arange(int(len(sound) * RATE_HZ / rate)) * rate / RATE_HZ
    return np.interp(wanted, np.arange(len(sound)), sound).astype(np.float32)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else None))
