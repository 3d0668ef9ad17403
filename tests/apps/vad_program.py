"""What faster-whisper's voice activity detection, a Silero network, says of each recording named (.npy)."""

import json
import sys

import numpy as np

from tests.apps.swap import swap_if_asked

swap_if_asked()

from faster_whisper.vad import get_speech_timestamps, get_vad_model  # noqa: E402 - after the swap

found = {}
for path in sys.argv[1:]:
    sound = np.load(path)
    chances = get_vad_model()(sound[: len(sound) // 512 * 512])
    found[path] = {"chances": np.asarray(chances).tolist(), "speech": get_speech_timestamps(sound)}
print(json.dumps(found))
