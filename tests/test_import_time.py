"""What importing costs: the client stays thin, and the package itself is empty-handed."""

from __future__ import annotations

import subprocess
import sys

import pytest

import edged

HEAVY = ("onnxruntime", "openvino", "msgspec", "psutil", "watchdog", "systemd", "onnx")


def _modules_after(code: str) -> set[str]:
    out = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(out.stdout.split())


def test_the_package_imports_nothing_heavy() -> None:
    """The daemon imports `edged` too, and must not carry numpy for it."""
    assert not _modules_after("import edged; edged.__version__") & {"zmq", "numpy", "msgpack", *HEAVY}


@pytest.mark.parametrize("what", ["Client", "AsyncClient", "InferenceSession"])
def test_a_client_imports_only_pyzmq_msgpack_and_numpy(what: str) -> None:
    """An app that asks the daemon needs none of the daemon's libraries."""
    found = _modules_after(f"from edged import {what}")
    assert not found & set(HEAVY)
    assert {"zmq", "numpy", "msgpack"} <= found


def test_a_threaded_client_needs_no_asyncio() -> None:
    """asyncio costs a tenth of a second on a small board."""
    assert "edged.asyncclient" not in _modules_after("from edged import Client")


def test_errors_need_neither_sockets_nor_arrays() -> None:
    """An app may name the error classes without the client's libraries."""
    assert not _modules_after("from edged import Unavailable") & {"zmq", "numpy", "msgpack"}


def test_every_export_is_there() -> None:
    """Each name in __all__ can be had, and no other."""
    for name in edged.__all__:
        assert getattr(edged, name) is not None
    with pytest.raises(AttributeError, match="Cliemt"):
        edged.Cliemt  # noqa: B018  # the access is what is tested


def test_edgectls_help_needs_neither_sockets_arrays_nor_settings() -> None:
    """The command line is built at every completion of a word."""
    found = _modules_after("from edged.cli import edgectl; edgectl.build_parser()")
    assert not found & {"zmq", "numpy", "msgpack", "edged.config", *HEAVY}
