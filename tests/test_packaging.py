"""The packages' parts: settings, the client's modules, what is left out, libraries, scripts."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from edged.config import load_config

ROOT = Path(__file__).resolve().parent.parent
PACKAGING = ROOT / "packaging"


@pytest.fixture
def deb(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script that builds the packages, as a module; its neighbours are found beside it."""
    monkeypatch.syspath_prepend(str(PACKAGING / "deb"))
    import build  # type: ignore[import-not-found]  # a script's directory, not a package

    return build


def test_the_commented_settings_are_the_defaults(tmp_path: Path) -> None:
    """Every line that is commented out in edged.toml shows a key that exists, and its default."""
    text = (PACKAGING / "edged.toml").read_text("utf-8")
    settings = re.sub(r"^#(?=[a-z_]+ = )", "", text, flags=re.MULTILINE)
    assert settings.count("\n") == text.count("\n")
    assert settings != text
    (tmp_path / "edged.toml").write_text(settings)
    environ = {"STATE_DIRECTORY": "/var/lib/edged", "RUNTIME_DIRECTORY": "/run/edged"}
    assert load_config(flags={}, environ=environ, file=tmp_path / "edged.toml") == load_config(
        flags={}, environ=environ, file=PACKAGING / "edged.toml"
    )


def test_the_container_sets_what_the_daemon_knows(tmp_path: Path) -> None:
    """The environment of the Containerfile is accepted and moves what it should."""
    text = (PACKAGING / "Containerfile").read_text("utf-8").replace("\\\n", " ")
    environ = dict(
        pair.split("=", 1) for line in re.findall(r"^ENV (.+)$", text, re.MULTILINE) for pair in line.split()
    )
    (tmp_path / "edged.toml").touch()
    server = load_config(flags={}, environ=environ, file=tmp_path / "edged.toml").server
    assert (server.endpoint, str(server.models)) == ("ipc:///run/edged/edged.sock", "/models")
    assert (str(server.state_dir), str(server.cache_dir)) == ("/state", "/cache")


def test_the_client_package_has_all_that_an_app_imports(deb: ModuleType, tmp_path: Path) -> None:
    """The modules that are found by reading imports are enough for every public name, and no daemon's."""
    modules = deb.client_modules()
    assert not {f"edged.{name}" for name in ("daemon", "core", "config", "worker")} & modules
    for module in modules:
        source = ROOT.joinpath(*module.split("."))
        inside = Path(*module.split("."))
        source, inside = (
            (source / "__init__.py", inside / "__init__.py")
            if source.is_dir()
            else (source.with_suffix(".py"), inside.with_suffix(".py"))
        )
        (tmp_path / inside).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, tmp_path / inside)
    code = (
        f"import sys; sys.path[:] = [{str(tmp_path)!r}, *(p for p in sys.path if p != {str(ROOT)!r})]\n"
        "import edged\n"
        f"assert edged.__file__.startswith({str(tmp_path)!r})\n"
        "for name in edged.__all__: getattr(edged, name)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, timeout=60)


@pytest.mark.parametrize(
    ("name", "outcome"),
    [
        ("numpy/_core/tests/test_umath.py", "dropped"),
        ("numpy/__init__.pyi", "dropped"),
        ("numpy/testing/__init__.py", "kept"),
        ("numpy/_core/_multiarray_umath.cpython-311-x86_64-linux-gnu.so", "kept"),
        ("numpy-2.4.6.dist-info/RECORD", "dropped"),
        ("numpy-2.4.6.dist-info/METADATA", "kept"),
        ("numpy-2.4.6.dist-info/licenses/LICENSE.txt", "licence"),
        ("onnxruntime/ThirdPartyNotices.txt", "licence"),
        ("onnxruntime/transformers/optimizer.py", "dropped"),
        ("onnxruntime/capi/libonnxruntime.so.1.32.0", "kept"),
        ("openvino/include/openvino/openvino.hpp", "dropped"),
        ("openvino/libs/cache.json", "kept"),
    ],
)
def test_what_is_left_out_of_wheels(deb: ModuleType, name: str, outcome: str) -> None:
    """Tests, headers and tools go; code and data stay; licences are set aside."""
    assert deb.fate(name)[0] == outcome


def test_needed_libraries_are_read_from_elf_files(deb: ModuleType, tmp_path: Path) -> None:
    """What a compiled module asks for becomes Debian's packages, and what nobody knows stops the build."""
    spec = importlib.util.find_spec("msgpack._cmsgpack")
    assert spec is not None
    assert spec.origin is not None
    (tmp_path / "a").mkdir()
    shutil.copy(spec.origin, tmp_path / "a" / "module.so")
    (tmp_path / "a" / "text.so").write_text("INPUT(libc.so.6)")
    assert "libc6 (>= 2.36)" in deb.shared_libraries(tmp_path / "a", 36)
    content = (tmp_path / "a/module.so").read_bytes()
    (tmp_path / "a/module.so").write_bytes(content.replace(b"libc.so.6\0", b"libd.so.6\0"))
    with pytest.raises(deb.BuildError, match=r"libd\.so\.6"):
        deb.shared_libraries(tmp_path / "a", 36)


@pytest.mark.parametrize(
    "script", sorted((PACKAGING / "deb/scripts").glob("*/p*")), ids=lambda p: f"{p.parent.name}-{p.name}"
)
def test_the_maintainers_scripts_are_shell(script: Path) -> None:
    """Each is accepted by the shell that dpkg runs it with."""
    assert script.read_text().startswith("#!/bin/sh\n")
    subprocess.run(["sh", "-n", str(script)], check=True, timeout=60)


def test_the_same_sources_give_the_same_bytes(
    deb: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package that was built twice is the same file, whose name says version, release and architecture."""
    if shutil.which("dpkg-deb") is None:
        pytest.skip("dpkg-deb is not installed")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    built = []
    for folder in ("one", "two"):
        arguments = ["--release=trixie", "--only", "python3-edged-client", f"--out={tmp_path / folder}"]
        assert deb.main(arguments) == 0
        (path,) = (tmp_path / folder).iterdir()
        built.append(path)
    assert built[0].name == built[1].name
    assert re.fullmatch(r"python3-edged-client_[0-9.]+-1~deb13_all\.deb", built[0].name)
    assert built[0].read_bytes() == built[1].read_bytes()
