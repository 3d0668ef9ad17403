"""Nothing phones home, and nothing is written where it does not belong: the kernel's own account."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests import zoo
from tests.e2e.harness import Daemon, until

pytestmark = pytest.mark.e2e

_CALLS = "socket,socketpair,openat,open,creat,mkdir,mkdirat,rename,renameat,renameat2,unlink,unlinkat,symlink"

_WRITES = re.compile(
    r'(?:openat\(AT_FDCWD, |open\()"(?P<open>[^"]*)", [^)]*(?:O_WRONLY|O_RDWR|O_CREAT)'
    r'|(?:mkdir|creat|unlink)\("(?P<plain>[^"]*)"'
    r'|(?:mkdirat|unlinkat)\(AT_FDCWD, "(?P<at>[^"]*)"'
    r'|rename\("[^"]*", "(?P<rename>[^"]*)"'
)

_KERNEL = ("/dev/", "/proc/", "/sys/", "/memfd:")
"""What is no file system of a disk: devices, the kernel's figures, memory."""


def traced(tmp_path: Path) -> list[str]:
    """The system calls of a daemon and all its processes, through a whole life with both runtimes."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    if subprocess.run(["strace", "-o", "/dev/null", "true"], check=False, capture_output=True).returncode:
        pytest.skip("strace may not trace here")
    trace = tmp_path / "trace"
    home = tmp_path / "home"
    home.mkdir()
    settings = {
        "HOME": str(home),
        "EDGED_DEVICES_EXCLUDE": "cuda",
        "PYTHONDONTWRITEBYTECODE": "1",  # else the interpreter keeps its own files beside the sources
        "XDG_CACHE_HOME": str(home / ".cache"),
        "TMPDIR": str(home / "tmp"),
    }
    with Daemon(tmp_path, settings) as daemon:
        for runtime in ("onnxruntime", "openvino"):
            zoo.write(
                daemon.models / f"{runtime}.toml", f'runtime = "{runtime}"\npolicy = "require"\n'.encode()
            )
            zoo.write(daemon.models / f"{runtime}.onnx", zoo.mlp())
        zoo.write(daemon.models / "bad.onnx", b"rubbish")
        zoo.write(daemon.models / "bomb.onnx", zoo.sigfpe())
        process = daemon.spawn(
            ["strace", "-f", "-qq", "--seccomp-bpf", "-e", f"trace={_CALLS}", "-o", str(trace)]
        )
        daemon.heard("READY")
        x = {"x": np.ones((1, 64), np.float32)}
        for runtime in ("onnxruntime", "openvino"):
            daemon.wait_ready(runtime)
            assert daemon.client.infer(runtime, x).runtime == runtime
        zoo.write(daemon.models / "onnxruntime.onnx", zoo.mlp(seed=1))
        daemon.wait_row("onnxruntime", lambda r: r["version"] == "2" and r["serving"], "serves version 2")
        until(lambda: len(daemon.client.server_status()["workers"]) <= 3, what="the old worker has ended")
        # The signal goes to the daemon: strace itself would not hand it on.
        os.kill(daemon.client.server_status()["pid"], signal.SIGTERM)
        daemon.forget_client()
        assert process.wait(60) == 0
    assert list(home.rglob("*")) == []
    return trace.read_text(errors="replace").splitlines()


def test_no_network_is_touched_and_nothing_is_written_elsewhere(tmp_path: Path) -> None:
    """No inet socket by any process; writes only below state, cache and run; HOME stays empty."""
    lines = traced(tmp_path)
    assert sum("AF_UNIX" in line for line in lines) > 2
    assert [line for line in lines if "AF_INET" in line] == []
    allowed = tuple(f"{tmp_path}/{name}" for name in ("state", "cache", "run"))
    written, seen = [], 0
    for line in lines:
        found = _WRITES.search(line)
        if found is None or " = -1 " in line:
            continue
        path = next(p for p in found.groups() if p is not None)
        seen += path.startswith(allowed)
        if not path.startswith((*allowed, *_KERNEL)) and path.startswith("/"):
            written.append(line)
    assert written == []
    assert seen > 10, "the trace shows the writes that there must be"
    assert len({line.split()[0] for line in lines}) > 6, "and it is of every process"
