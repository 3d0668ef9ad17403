"""Networks of real applications, answered through edged exactly as in process with ONNX Runtime.

Each test asks ONNX Runtime, and the daemon by `Client` and by the session that stands in for ONNX Runtime's.
Exactly is bit for bit: all run the same kernels.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from PIL import Image, ImageDraw, ImageFont

from edged import Client, InferenceSession
from edged.runtimes.base import LoadCancel, LoadRequest, RunFailed, create_runtime
from tests.apps.swap import run_program
from tests.apps.wheels import MAGIKA, RAPIDOCR, silero_network
from tests.e2e.harness import ROOT, WAIT_S, Daemon, running_daemon

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One daemon for the module; each test drops what it asks."""
    with running_daemon(tmp_path_factory.mktemp("apps")) as daemon:
        yield daemon


Three = tuple[Any, InferenceSession, Client]


@pytest.fixture
def three(daemon: Daemon) -> Iterator[Callable[[str, bytes], Three]]:
    """ONNX Runtime's session, edged's, and a client, of a network that is served from here on."""
    opened: list[Any] = []

    def serve(name: str, network: bytes) -> Three:
        _put(daemon, name, network)
        ours = InferenceSession(f"{name}.onnx", endpoint=daemon.endpoint)
        client = Client(daemon.endpoint, timeout=WAIT_S)
        opened.extend((ours, client))
        options = ort.SessionOptions()
        options.log_severity_level = 3  # some of the networks have initializers that nothing uses
        theirs = ort.InferenceSession(network, options, providers=["CPUExecutionProvider"])
        return theirs, ours, client

    yield serve
    for each in opened:
        each.close()


def _put(daemon: Daemon, name: str, network: bytes) -> None:
    if daemon.serving(name) is None:
        hidden = daemon.models / f".{name}.part"
        hidden.write_bytes(network)
        hidden.rename(daemon.models / f"{name}.onnx")
    daemon.wait_ready(name)


def _assert_same(three: Three, name: str, feeds: Mapping[str, Any]) -> list[Any]:
    """The outputs, which are the same three times: types, dtypes, shapes, bits."""
    theirs, ours, client = three
    want = theirs.run(None, feeds)
    names = [output.name for output in theirs.get_outputs()]
    result = client.infer(name, feeds)
    assert list(result) == names
    for got in (ours.run(None, feeds), [result[n] for n in names]):
        for value, wanted in zip(got, want, strict=True):
            assert type(value) is type(wanted)
            if isinstance(wanted, np.ndarray) and wanted.dtype != object:
                np.testing.assert_array_equal(value, wanted, strict=True)
            else:
                assert _plain(value) == _plain(wanted)
    return want


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


def _assert_described_alike(three: Three) -> None:
    theirs, ours, _ = three
    for what in ("get_inputs", "get_outputs"):
        for mine, real in zip(getattr(ours, what)(), getattr(theirs, what)(), strict=True):
            assert (mine.name, mine.shape) == (real.name, real.shape)
            assert mine.type == real.type or mine.type.endswith("(unknown)")
    mine, real = ours.get_modelmeta(), theirs.get_modelmeta()
    assert mine.custom_metadata_map == real.custom_metadata_map
    assert (mine.version, mine.producer_name, mine.graph_name) == (
        real.version,
        real.producer_name,
        real.graph_name,
    )


def test_silero_hears_the_same_over_a_recording(three: Callable[[str, bytes], Three]) -> None:
    """Its state goes round 60 times, and its rate comes as [16000], as apps feed it, and as 16000."""
    served = three("silero_vad", silero_network().read_bytes())
    _assert_described_alike(served)
    rng = np.random.default_rng(7)
    time_s = np.arange(60 * 512) / 16000
    tone = np.sin(2 * np.pi * 140 * time_s) * (np.sin(2 * np.pi * 3 * time_s) > 0)
    sound = np.float32(0.4 * tone + 0.02 * rng.standard_normal(len(tone)))
    for rate in (np.array([16000]), np.array(16000)):
        state, context = np.zeros((2, 1, 128), np.float32), np.zeros(64, np.float32)
        chances = []
        for chunk in sound.reshape(60, 512):
            feeds = {"input": np.concatenate([context, chunk])[np.newaxis], "state": state, "sr": rate}
            chance, state = _assert_same(served, "silero_vad", feeds)
            context = chunk[-64:]
            chances.append(float(chance[0, 0]))
        assert max(chances) > 2 * min(chances), "it hears no difference"


@pytest.fixture
def files(tmp_path: Path) -> dict[Path, str]:
    """Files of several kinds, and what Magika calls them."""
    kinds = {
        "program.bin": ((ROOT / "edged" / "client.py").read_bytes(), "python"),
        "table": (b"name,age,town\n" + b"Ada,36,London\nAlan,41,Wilmslow\n" * 40, "csv"),
        "settings": (json.dumps([{"name": f"m{i}", "on": True} for i in range(60)], indent=1), "json"),
        "page": (b"<!doctype html><html><head><title>t</title></head><body>a</body></html>\n" * 9, "html"),
        "tiny": (b"hi", "txt"),
        "empty": (b"", "empty"),
    }  # fmt: skip
    found = {}
    for name, (content, label) in kinds.items():
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
        found[tmp_path / name] = label
    Image.new("RGB", (40, 30), "teal").save(tmp_path / "picture.dat", "PNG")
    found[tmp_path / "picture.dat"] = "png"
    with zipfile.ZipFile(tmp_path / "archive", "w") as archive:
        archive.writestr("a.txt", "words " * 400)
    found[tmp_path / "archive"] = "zip"
    return found


def test_magika_itself_names_the_same_kinds(daemon: Daemon, files: dict[Path, str]) -> None:
    """Its own code, out of its wheel: once as it is, once with the session swapped."""
    network = MAGIKA.network("standard_v3_3")
    _put(daemon, "standard_v3_3", network.read_bytes())
    before = daemon.client.statistics("standard_v3_3")[0]["inference_count"]
    theirs = run_program("magika_program", *files, packages=MAGIKA.unpacked())
    assert daemon.client.statistics("standard_v3_3")[0]["inference_count"] == before
    ours = run_program("magika_program", *files, packages=MAGIKA.unpacked(), endpoint=daemon.endpoint)
    assert daemon.client.statistics("standard_v3_3")[0]["inference_count"] > before
    assert ours == theirs
    assert {name: label for name, (label, _) in ours["together"].items()} == {
        path.name: label for path, label in files.items()
    }


def test_magika_s_network_answers_an_array_alone(three: Callable[[str, bytes], Three]) -> None:
    """One input, so it needs no name; a list is INT32 because the network says so."""
    served = three("standard_v3_3", MAGIKA.network("standard_v3_3").read_bytes())
    _assert_described_alike(served)
    tokens = np.random.default_rng(3).integers(0, 257, (5, 2048), dtype=np.int32)
    (want,) = _assert_same(served, "standard_v3_3", {"bytes": tokens})
    for given in (tokens, tokens.tolist()):
        np.testing.assert_array_equal(served[2].infer("standard_v3_3", given)["target_label"], want)


TEXT = "edged 2026 reads"


@pytest.fixture(scope="module")
def line() -> Any:
    """A line of text as a picture, 48 pixels high."""
    font = ImageFont.load_default(size=34)
    picture = Image.new("RGB", (round(font.getlength(TEXT)) + 20, 48), "white")
    ImageDraw.Draw(picture).text((10, 3), TEXT, "black", font)
    return np.asarray(picture)


def _network_input(picture: Any) -> Any:
    """As PaddleOCR's networks want it: BGR, from -1 to 1, channels first."""
    return np.float32(picture[:, :, ::-1] / 127.5 - 1).transpose(2, 0, 1)[np.newaxis]


def test_rapidocr_s_recognition_reads_the_same_text(three: Callable[[str, bytes], Three], line: Any) -> None:
    """With the alphabet that it carries in its metadata: 6,623 characters."""
    name = "ch_PP-OCRv4_rec_infer"
    served = three(name, RAPIDOCR.network(name).read_bytes())
    (scores,) = _assert_same(served, name, {"x": _network_input(line)})
    best = scores[0].argmax(1)
    texts = []
    for session in served[:2]:
        alphabet = session.get_modelmeta().custom_metadata_map["character"].splitlines()
        alphabet = ["", *alphabet, " "]
        kept = [at for before, at in zip([0, *best], best, strict=False) if at not in (0, before)]
        texts.append(
            "".join(alphabet[at] if at < len(alphabet) else "\N{REPLACEMENT CHARACTER}" for at in kept)
        )
    assert texts == [TEXT, TEXT]
    _assert_described_alike(served)


@pytest.mark.parametrize("name", ["ch_PP-OCRv4_det_infer", "ch_ppocr_mobile_v2.0_cls_infer"])
def test_rapidocr_s_other_networks_answer_the_same(
    three: Callable[[str, bytes], Three], line: Any, name: str
) -> None:
    """Where text stands, 600 KB in and 200 out, and which way up it is."""
    served = three(name, RAPIDOCR.network(name).read_bytes())
    _assert_described_alike(served)
    height, width = (480, 640) if "det" in name else (48, 192)
    page = np.full((height, width, 3), 255, np.uint8)
    shown = line[:, :width]
    page[: len(shown), : shown.shape[1]] = shown
    (answer,) = _assert_same(served, name, {"x": _network_input(page)})
    assert answer.max() > 0.5 > answer.min()


def test_a_request_that_fails_leaves_openvino_s_answers_as_they_were() -> None:
    """Pictures too small for the network: OpenVINO would answer NaN to everybody after some of them."""
    path = RAPIDOCR.network("ch_PP-OCRv4_rec_infer")
    model = create_runtime("openvino").load(LoadRequest(str(path), threads=2), LoadCancel())
    names = [spec.name for spec in model.outputs]
    feeds = {"x": np.random.default_rng(0).uniform(-1, 1, (1, 3, 48, 64)).astype(np.float32)}
    (before,) = model.run(feeds, names)
    assert np.isfinite(before).all()
    for number in range(20):
        with pytest.raises(RunFailed) as caught:
            model.run({"x": np.ones((1, 3, 1 + number % 2 * 31, 1 + number % 2 * 63), np.float32)}, names)
        assert not caught.value.fatal
        np.testing.assert_array_equal(model.run(feeds, names)[0], before)
    model.close()


@pytest.mark.parametrize("labels", ["numbers", "words"])
@pytest.mark.parametrize("zipmap", [True, False])
def test_a_forest_of_scikit_learn_says_what_it_says_at_home(
    three: Callable[[str, bytes], Three], zipmap: bool, labels: str
) -> None:
    """Labels as numbers and as words; probabilities as maps or as a table; scikit-learn agrees."""
    from skl2onnx import to_onnx
    from sklearn.datasets import load_iris
    from sklearn.ensemble import RandomForestClassifier

    data = load_iris()
    x, y = data.data.astype(np.float32), data.target
    if labels == "words":
        y = np.array(["setosa", "versicolor", "Köln"])[y]
    forest = RandomForestClassifier(n_estimators=30, random_state=0).fit(x, y)
    network = to_onnx(forest, x[:1], options={"zipmap": zipmap}, target_opset=18).SerializeToString()
    name = f"forest_{labels}_{zipmap}"
    served = three(name, network)
    _assert_described_alike(served)
    found, chances = _assert_same(served, name, {"X": x})
    assert found.tolist() == forest.predict(x).tolist()
    plain = served[2].infer(name, x[:2]).to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    plain_labels, plain_chances = plain.values()
    assert plain_labels == y[:2].tolist()
    if zipmap:
        assert list(chances[0]) == list(forest.classes_)
        assert list(plain_chances[0]) == [str(each) for each in forest.classes_]
    else:
        np.testing.assert_allclose(chances, forest.predict_proba(x), atol=1e-6)
