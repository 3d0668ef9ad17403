"""Where a runtime lies: in a site directory of its own, or where the interpreter finds everything else.

A package or an administrator may put a runtime into `PREFIX/runtimes/NAME`, PREFIX being the environment
that edged runs in. So `onnxruntime` and `onnxruntime-gpu`, one module from two distributions, lie beside each
other, and each comes and goes without a file of the other's. Only the processes that run models put these
directories on their path; the supervisor merely asks whether there is one.

Imports nothing but the standard library; runs on Python 3.10 too.
"""

from __future__ import annotations

import sys
from importlib.machinery import PathFinder
from pathlib import Path

__all__ = ["DIRECTORIES", "extra_for", "get_hint", "is_installed", "origin", "site_paths"]

DIRECTORIES = {"onnxruntime": ("cuda", "cpu"), "openvino": ("openvino",), "fake": ()}
"""The directories that may hold each runtime, the better one first: the one with CUDA has the CPU, too."""


def site_paths(runtime: str, *, prefix: str | None = None) -> list[str]:
    """What goes in front of `sys.path` in a process that runs this runtime; all runtimes' when it is empty.

    At most one directory for each runtime, so that none imports half of its neighbour.
    """
    root = _root(prefix)
    names = [runtime] if runtime else list(DIRECTORIES)
    found = (
        [root / each for each in DIRECTORIES[name] if (root / each / name / "__init__.py").is_file()]
        for name in names
    )
    return [str(sites[0]) for sites in found if sites]


def is_installed(runtime: str, *, prefix: str | None = None) -> bool:
    """Whether a runtime can be imported by edged's own interpreter, found out without importing it."""
    return runtime == "fake" or origin(runtime, prefix=prefix) is not None


def origin(runtime: str, *, prefix: str | None = None) -> str | None:
    """The first file of the runtime that edged's own interpreter would import; None when there is none."""
    found = PathFinder.find_spec(runtime, [*site_paths(runtime, prefix=prefix), *sys.path])
    return None if found is None else found.origin or ""


def extra_for(runtime: str, device: str) -> str:
    """What edged calls the set of libraries that runs this device: `cpu`, `cuda` or `openvino`."""
    return "openvino" if runtime == "openvino" else "cuda" if device.startswith("CUDA") else "cpu"


def get_hint(runtime: str, device: str, *, prefix: str | None = None) -> str:
    """What to type to get a runtime that is missing: the way this edged was installed itself."""
    extra = extra_for(runtime, device)
    if _root(prefix).is_dir():
        return f"install the package edged-runtime-{extra}"
    if extra == "cuda":
        return "pip uninstall onnxruntime; pip install 'edged[cuda]'"
    return f"pip install 'edged[{extra}]'"


def _root(prefix: str | None) -> Path:
    return Path(prefix or sys.prefix) / "runtimes"
