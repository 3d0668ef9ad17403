"""Metrics of a real daemon: the file, the page, what a reload and the end make of them."""

from __future__ import annotations

import re
import signal
import socket
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests import zoo
from tests.e2e.harness import WAIT_S, Daemon, until

pytestmark = pytest.mark.e2e


def figures(text: str, name: str) -> list[float]:
    return [s.value for f in text_string_to_metric_families(text) for s in f.samples if s.name == name]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_the_file_follows_what_happens_and_goes_with_the_daemon(tmp_path: Path) -> None:
    """Written at its interval without a request; a reload moves it; an orderly end takes it away."""
    config = tmp_path / "edged.toml"
    first, second = tmp_path / "metrics" / "edged.prom", tmp_path / "other.prom"
    config.write_text(f'[metrics]\ntextfile = "{first}"\ninterval = "1s"\n')
    with Daemon(tmp_path, arguments=["--config", str(config)]) as daemon:
        zoo.write(daemon.models / "m.onnx", zoo.versioned(1))
        daemon.start()
        assert daemon.number() == 1
        until(lambda: figures(first.read_text(), "edged_model_inferences_total") == [1], what="it is told")
        assert first.stat().st_mode & 0o777 == 0o644
        assert figures(first.read_text(), "edged_model_serving") == [1]
        config.write_text(f'[metrics]\ntextfile = "{second}"\ninterval = "1s"\n')
        daemon.signal(signal.SIGHUP)
        until(lambda: second.exists() and not first.exists(), what="the file has moved")
        daemon.stop()
        assert not second.exists()
        assert '"daemon_bug"' not in daemon.log()


def test_http_is_opened_and_closed_by_a_reload(tmp_path: Path) -> None:
    """And answers with the loop's own word of this moment."""
    config, port = tmp_path / "edged.toml", free_port()
    url = f"http://127.0.0.1:{port}/metrics"
    config.write_text("")
    with Daemon(tmp_path, arguments=["--config", str(config)]) as daemon:
        zoo.write(daemon.models / "m.onnx", zoo.versioned(1))
        daemon.start()
        config.write_text(f'[metrics]\nlisten = "127.0.0.1:{port}"\n')
        daemon.signal(signal.SIGHUP)
        daemon.heard("RELOADING")
        daemon.heard("READY")
        for count in (1, 2):
            daemon.number()
            with urllib.request.urlopen(url, timeout=WAIT_S) as answer:
                text = answer.read().decode()
            assert figures(text, "edged_model_inferences_total") == [count]
        assert re.search(r"^edged_ready 1$", text, re.MULTILINE)
        config.write_text("")
        daemon.signal(signal.SIGHUP)
        daemon.heard("RELOADING")
        daemon.heard("READY")
        with pytest.raises(OSError):
            urllib.request.urlopen(url, timeout=WAIT_S)
        assert daemon.stop() == 0
