"""Which Debian packages bring what the packaged libraries need and do not carry themselves."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from pathlib import Path

from tree import BuildError

SHARED = {
    "libc6": r"lib(c|m|dl|rt|pthread|util|resolv)\.so\.\d|ld-linux.*",
    "libgcc-s1": r"libgcc_s\.so\.1",
    "libstdc++6": r"libstdc\+\+\.so\.6",
    "zlib1g": r"libz\.so\.1",
}
"""Which package brings a shared library that the wheels do not carry."""

DRIVERS = (
    r"lib(cuda|cudart|cublas|cublasLt|curand|cufft|cudnn|nvrtc|nvinfer|nvonnxparser|nvinfer_plugin)\.so.*|"
    r"lib(OpenCL|ze_loader)\.so\.1"
)
"""Opened only where there is such a device; they come with its driver, from its maker."""


def shared_libraries(root: Path, glibc: int) -> list[str]:
    """The packages that bring what the tree's libraries need and the tree has not. Raises BuildError.

    Wheels were chosen for the release's C library, 2.`glibc`, so that is what they are known to run with.
    """
    needed: dict[str, Path] = {}
    carried: set[str] = set()
    for path in root.rglob("*"):
        if ".so" in path.name and path.is_file() and not path.is_symlink():
            carried.add(path.name)
            for name in needed_by(path):
                needed.setdefault(name, path)
    found: set[str] = set()
    for name, by in sorted(needed.items()):
        if name in carried or re.fullmatch(DRIVERS, name):
            continue
        package = next((p for p, rule in SHARED.items() if re.fullmatch(rule, name)), None)
        if package is None:
            raise BuildError(f"{by.name} needs {name}, and no package is known for it: add it to SHARED")
        found.add(package)
    return sorted(f"libc6 (>= 2.{glibc})" if each == "libc6" else each for each in found)


def needed_by(path: Path) -> Iterator[str]:
    """The names (DT_NEEDED) of the libraries that a shared library asks for; 64-bit little-endian only."""
    data = path.read_bytes()
    if data[:6] != b"\x7fELF\x02\x01":
        return
    offset, entry_bytes, entries = (
        struct.unpack_from("<Q", data, 32)[0],
        struct.unpack_from("<H", data, 54)[0],
        struct.unpack_from("<H", data, 56)[0],
    )
    headers = [struct.unpack_from("<IIQQQQQQ", data, offset + n * entry_bytes) for n in range(entries)]
    loads = [(h[3], h[2], h[5]) for h in headers if h[0] == 1]
    for kind, _, at, _, _, size, _, _ in headers:
        if kind != 2:
            continue
        tags = [struct.unpack_from("<qQ", data, at + n) for n in range(0, size, 16)]
        strings = next((value for tag, value in tags if tag == 5), None)
        if strings is None:
            return
        (table,) = (
            strings - start + where for start, where, length in loads if start <= strings < start + length
        )
        for tag, value in tags:
            if tag == 1:
                end = data.index(b"\0", table + value)
                yield data[table + value : end].decode()
