"""Wheels: fetched for a release and an architecture, unpacked, thinned out, their licences set aside."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import zipfile
from pathlib import Path

from tree import HERE, ROOT, Build, BuildError, Tree, Unreachable

PIP_TIMEOUT_S = 900
"""Of one download; onnxruntime-gpu is 250 MB."""


DROPPED = (
    # Each thinning has its reason; what is left is what edged's processes import, and the licences.
    (r"(^|/)tests?/", "tests of libraries"),
    (r"\.(pyi|pxd|pyx|h|hpp|a|lib|cmake|pc)$|(^|/)include/|(^|/)cmake/", "for compilers and type checkers"),
    (r"^numpy/(f2py|distutils|_pyinstaller|typing/tests)/", "numpy's build tools"),
    (r"^numpy/_core/(_simd|_.*_tests)\.", "numpy's own tests in C"),
    (r"^onnxruntime/(tools|transformers|quantization|datasets)/", "makes models, runs none"),
    (r"^openvino/(torch|utils/.*/stubs)/", "makes models, runs none"),
    (r"\.dist-info/(RECORD|INSTALLER|REQUESTED|direct_url\.json|sboms/)", "pip's books"),
    (r"^[^/]+\.data/", "programs and headers beside the library"),
)

LICENCE = re.compile(
    r"(^|/)(licen[cs]e|copying|notice|thirdpartynotices|authors|.*third-party-programs)[^/]*$|"
    r"\.dist-info/(licenses|licensing)/",
    re.IGNORECASE,
)
"""What goes into the package's documentation, not beside the code."""


def fetch(build: Build, name: str) -> list[Path]:
    """The wheels of `wheels/NAME.txt`, from the cache or by pip for the release's Python and architecture."""
    listed = HERE / "wheels" / f"{name}.txt"
    key = hashlib.sha256(f"{build.release}{build.machine}".encode() + listed.read_bytes()).hexdigest()[:16]
    kept = build.cache / f"{build.release_name}-{build.arch}-{name}-{key}"
    if not kept.is_dir():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as scratch:
            tags = [f"manylinux_2_{minor}_{build.machine}" for minor in range(build.release.glibc, 16, -1)]
            tags += [f"manylinux2014_{build.machine}", f"manylinux2010_{build.machine}"]
            pip(
                build,
                Unreachable,
                "download",
                "--no-deps",
                "--only-binary=:all:",
                f"--python-version={build.release.python}",
                "--implementation=cp",
                *[f"--abi={abi}" for abi in (build.release.abi, "abi3", "none")],
                *[f"--platform={tag}" for tag in tags],
                f"--dest={scratch}",
                f"--requirement={listed}",
            )
            ready = Path(scratch) / "wheels"
            ready.mkdir()
            for wheel in Path(scratch).glob("*.whl"):
                wheel.rename(ready / wheel.name)
            ready.rename(kept)
    return sorted(kept.glob("*.whl"))


def own_wheel(build: Build) -> Path:
    """edged's own wheel, built from a copy, so that nothing is left in the checkout. Raises BuildError."""
    tools = fetch(build, "build")[0].parent
    copy = build.work / "source"
    copy.mkdir()
    for item in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / item, copy)
    shutil.copytree(ROOT / "edged", copy / "edged", ignore=shutil.ignore_patterns("__pycache__"))
    pip(
        build,
        BuildError,  # all that it needs is here, so what fails is the sources' fault
        "wheel",
        "--no-deps",
        "--no-index",
        f"--find-links={tools}",
        f"--wheel-dir={build.work}",
        str(copy),
    )
    (wheel,) = build.work.glob("edged-*.whl")
    return wheel


def pip(build: Build, error: type[Exception], *arguments: str) -> None:
    """Runs pip. Raises `error` with the end of what it said."""
    command = [build.python, "-m", "pip", "--disable-pip-version-check", "--no-input", "-q", *arguments]
    environ = {**os.environ, "SOURCE_DATE_EPOCH": str(build.epoch)}
    environ.pop("PYTHONPATH", None)
    done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_TIMEOUT_S, env=environ)
    if done.returncode:
        raise error(f"pip {arguments[0]} failed:\n{done.stderr[-2000:]}")


def unpack(tree: Tree, wheel: Path, sites: str, documents: str) -> None:
    """Puts a wheel's files into the site directory, without what nobody needs there."""
    distribution = wheel.name.split("-")[0]
    licence = ""
    with zipfile.ZipFile(wheel) as archive:
        for item in archive.infolist():
            name = item.filename
            if item.is_dir():
                continue
            if name.endswith(".dist-info/METADATA"):
                licence = _licence(archive.read(item).decode())
            outcome, why = fate(name)
            if outcome == "licence":
                flat = re.sub(r"^[^/]*\.dist-info/|^[^/]*\.data/", "", name).replace("/", "_")
                path = f"{documents}/licenses/{distribution}/{flat}"
            elif outcome == "dropped":
                tree.dropped_bytes[why] = tree.dropped_bytes.get(why, 0) + item.file_size
                continue
            else:
                path = f"{sites}/{name}"
            if ".." in Path(name).parts:
                raise BuildError(f"{wheel.name} holds {name}")
            target = tree.root / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(archive.read(item))
            target.chmod(0o644)
    tree.wheels.append((wheel.name, hashlib.sha256(wheel.read_bytes()).hexdigest(), licence))


def fate(name: str) -> tuple[str, str]:
    """What becomes of a wheel's file: `kept`, `licence`, or `dropped` with the reason."""
    if LICENCE.search(name) and not name.endswith((".py", ".so")):
        return "licence", ""
    why = next((why for rule, why in DROPPED if re.search(rule, name)), None)
    return ("kept", "") if why is None else ("dropped", why)


def _licence(metadata: str) -> str:
    for key in ("License-Expression", "License"):
        if found := re.search(rf"^{key}: (.+)$", metadata, re.MULTILINE):
            return found[1].strip()
    names = re.findall(r"^Classifier: License :: (?:OSI Approved :: )?(.+)$", metadata, re.MULTILINE)
    return ", ".join(names) or "see the texts"
