"""Where runtimes lie: site directories of their own, and what to type when there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from edged.runtimes.base import MODULES
from edged.sites import DIRECTORIES, get_hint, is_installed, site_paths


def put(prefix: Path, directory: str, module: str) -> str:
    package = prefix / "runtimes" / directory / module
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    return str(package.parent)


def test_every_runtime_has_its_row() -> None:
    """A runtime that the seam knows is one that can be packaged."""
    assert set(DIRECTORIES) == set(MODULES)


def test_without_directories_nothing_is_put_on_the_path(tmp_path: Path) -> None:
    """An environment made by pip has its runtimes among everything else."""
    assert site_paths("onnxruntime", prefix=str(tmp_path)) == []
    assert site_paths("", prefix=str(tmp_path)) == []


def test_cuda_comes_before_cpu_and_never_both(tmp_path: Path) -> None:
    """The two builds of ONNX Runtime are one module: a process has one of them."""
    cpu = put(tmp_path, "cpu", "onnxruntime")
    assert site_paths("onnxruntime", prefix=str(tmp_path)) == [cpu]
    cuda = put(tmp_path, "cuda", "onnxruntime")
    openvino = put(tmp_path, "openvino", "openvino")
    assert site_paths("onnxruntime", prefix=str(tmp_path)) == [cuda]
    assert site_paths("openvino", prefix=str(tmp_path)) == [openvino]
    assert site_paths("", prefix=str(tmp_path)) == [cuda, openvino]


def test_what_a_removal_left_behind_is_no_runtime(tmp_path: Path) -> None:
    """An empty directory, or one with caches only, hides no runtime elsewhere."""
    (tmp_path / "runtimes/cuda/onnxruntime/__pycache__").mkdir(parents=True)
    cpu = put(tmp_path, "cpu", "onnxruntime")
    assert site_paths("onnxruntime", prefix=str(tmp_path)) == [cpu]


def test_installed_is_what_a_worker_would_find(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the site directory, or on the interpreter's own path; nothing is imported to find out."""
    monkeypatch.setattr("sys.path", [])
    assert not is_installed("openvino", prefix=str(tmp_path))
    package = Path(put(tmp_path, "openvino", "openvino")) / "openvino/__init__.py"
    package.write_text("raise AssertionError('it was imported')\n")
    assert is_installed("openvino", prefix=str(tmp_path))
    monkeypatch.setattr("sys.path", [str(package.parent.parent)])
    assert is_installed("openvino", prefix=str(tmp_path / "elsewhere"))
    assert is_installed("fake", prefix=str(tmp_path))


@pytest.mark.parametrize(
    ("runtime", "device", "extra"),
    [("onnxruntime", "CPU", "cpu"), ("onnxruntime", "CUDA:0", "cuda"), ("openvino", "GPU.0", "openvino")],
)
def test_the_hint_is_the_way_edged_was_installed(
    runtime: str, device: str, extra: str, tmp_path: Path
) -> None:
    """A package for a packaged daemon, an extra for pip's."""
    assert f"'edged[{extra}]'" in get_hint(runtime, device, prefix=str(tmp_path))
    (tmp_path / "runtimes").mkdir()
    assert get_hint(runtime, device, prefix=str(tmp_path)) == f"install the package edged-runtime-{extra}"
