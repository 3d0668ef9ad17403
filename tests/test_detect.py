"""A device's verdict is the truth about it: absent, forbidden, broken or working, with what to do."""

from __future__ import annotations

import grp
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edged.process import Spawner
from edged.runtimes import detect
from edged.runtimes.detect import check_nodes, probe
from tests.worker_helpers import WAIT_S


@pytest.fixture(scope="module")
def spawner() -> Iterator[Spawner]:
    with Spawner(pythons={}, environ=os.environ) as spawner:
        yield spawner


def result_of(process: Any) -> dict[str, Any]:
    """The probe's verdict, waited for."""
    deadline = time.monotonic() + WAIT_S
    while True:
        answer = process.result()
        if answer is not None:
            return dict(answer)
        assert time.monotonic() < deadline
        select.select([process.fd], [], [], 0.05)


def pci(root: Path, vendor: str, pci_class: str) -> None:
    card = root / "sys/bus/pci/devices/0000:01:00.0"
    card.mkdir(parents=True)
    (card / "vendor").write_text(vendor + "\n")
    (card / "class").write_text(pci_class + "\n")


def renderer(root: Path, vendor: str, *, mode: int = 0o666) -> Path:
    node = root / "dev/dri/renderD128"
    node.parent.mkdir(parents=True)
    node.touch()
    node.chmod(mode)
    sys_node = root / "sys/class/drm/renderD128/device"
    sys_node.mkdir(parents=True)
    (sys_node / "vendor").write_text(vendor + "\n")
    return node


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_cpu_works(spawner: Spawner, runtime: str) -> None:
    """Each runtime's CPU runs the tiny model, in a child, and says its version."""
    answer = result_of(spawner.probe(runtime, "CPU"))
    assert answer["status"] == "ok", answer
    assert answer["runtime_version"]
    assert answer["full_name"]


def test_every_listed_probe_gets_a_verdict(spawner: Spawner) -> None:
    """Whatever this machine has, each candidate ends in a verdict with all its keys."""
    for runtime, device in spawner.list_probes():
        answer = result_of(spawner.probe(runtime, device))
        assert (answer["runtime"], answer["device"]) == (runtime, device)
        assert answer["status"] in ("ok", "absent", "no_permission", "driver_error", "busy", "not_installed")
        assert set(answer) == set(detect_keys())


def detect_keys() -> tuple[str, ...]:
    return ("runtime", "device", "status", "hint", "detail", "runtime_version", "full_name", "precision_fast")


def test_hanging_probe_is_a_timeout(spawner: Spawner) -> None:
    """A child that is killed for taking too long leaves the verdict timeout."""
    process = spawner.probe("openvino", "CPU")
    process.kill()
    assert result_of(process)["status"] == "timeout"


def test_crashing_probe_is_a_driver_error(tmp_path: Path) -> None:
    """A driver that ends the child with a signal gets a verdict that names it."""
    broken = tmp_path / "onnxruntime"
    broken.mkdir()
    (broken / "__init__.py").write_text("import os\nos.kill(os.getpid(), 11)\n")
    with Spawner(pythons={}, environ={**os.environ, "PYTHONPATH": str(tmp_path)}) as spawner:
        answer = result_of(spawner.probe("onnxruntime", "CPU"))
    assert answer["status"] == "driver_error"
    assert "SIGSEGV" in answer["detail"]


def test_runtime_that_cannot_be_imported_is_a_driver_error(tmp_path: Path) -> None:
    """A package that is there but broken is told from one that is not there."""
    broken = tmp_path / "onnxruntime"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise ImportError('libfoo.so.1: cannot open')\n")
    with Spawner(pythons={}, environ={**os.environ, "PYTHONPATH": str(tmp_path)}) as spawner:
        answer = result_of(spawner.probe("onnxruntime", "CPU"))
    assert answer["status"] == "driver_error"
    assert "libfoo.so.1" in answer["detail"]


@pytest.mark.parametrize("device", ["CUDA:0", "GPU.0", "NPU"])
def test_machine_without_the_device(tmp_path: Path, device: str) -> None:
    """No node and nothing on the bus: absent."""
    assert check_nodes(device, root=tmp_path).status == "absent"


@pytest.mark.parametrize(
    ("device", "vendor", "pci_class"),
    [("CUDA:0", "0x10de", "0x030000"), ("GPU.0", "0x8086", "0x030000"), ("NPU", "0x8086", "0x120000")],
)
def test_device_without_its_kernel_driver(tmp_path: Path, device: str, vendor: str, pci_class: str) -> None:
    """On the bus but without a node: the driver is missing, which is another thing than absent."""
    pci(tmp_path, vendor, pci_class)
    check = check_nodes(device, root=tmp_path)
    assert check.status == "driver_error"
    assert "driver" in check.hint


def test_another_makers_render_node_is_not_intels(tmp_path: Path) -> None:
    """A render node of a GPU that OpenVINO cannot use does not make one that it can."""
    renderer(tmp_path, "0x1002")
    assert check_nodes("GPU.0", root=tmp_path).status == "absent"


def test_node_that_can_be_opened(tmp_path: Path) -> None:
    """A node that this user may open lets the probe go on."""
    renderer(tmp_path, "0x8086")
    assert check_nodes("GPU.0", root=tmp_path).status == "ok"


def test_second_card_of_one(tmp_path: Path) -> None:
    """A card beyond the last is absent."""
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidia0").touch()
    assert check_nodes("CUDA:0", root=tmp_path).status == "ok"
    assert check_nodes("CUDA:1", root=tmp_path).status == "absent"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to make nodes that nobody else may open")
@pytest.mark.parametrize(
    ("mode", "group", "says"),
    [
        (0o660, "video", "join the group video: usermod -aG video nobody"),
        (0o600, "video", "udev rule"),
        (0o660, "root", "udev rule"),
    ],
)
def test_forbidden_node_names_the_group_to_join(tmp_path: Path, mode: int, group: str, says: str) -> None:
    """A user who may not open the node is told the group, or that no group may."""
    node = renderer(tmp_path, "0x8086", mode=mode)
    os.chown(node, 0, grp.getgrnam(group).gr_gid)
    for folder in (tmp_path, *tmp_path.parents):
        if folder != Path("/tmp") and folder != Path("/"):
            folder.chmod(0o755)
    program = (
        "import json, os, sys\nfrom pathlib import Path\nfrom edged.runtimes.detect import check_nodes\n"
        "os.setgroups([]); os.setegid(65534); os.seteuid(65534)\n"
        "c = check_nodes('GPU.0', root=Path(sys.argv[1]))\nprint(json.dumps([c.status, c.hint]))\n"
    )
    out = subprocess.run(
        [sys.executable, "-B", "-c", program, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    status, hint = json.loads(out.stdout)
    assert status == "no_permission"
    assert says in hint


def test_cuda_card_without_a_cuda_build(tmp_path: Path) -> None:
    """A card that could be used, and a runtime without CUDA: not_installed, with the extra to install."""
    ort = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidia0").touch()
    answer = probe("onnxruntime", "CUDA:0", root=tmp_path)
    assert answer["status"] == "not_installed"
    assert "edged[cuda]" in answer["hint"]


@pytest.mark.parametrize(
    ("text", "status"),
    [("CUDA failure 2: out of memory", "busy"), ("no kernel image is available", "driver_error")],
)
def test_what_a_driver_says(monkeypatch: pytest.MonkeyPatch, text: str, status: str) -> None:
    """A device that somebody else uses up is busy; any other failure is the driver's."""

    def fail(*_a: Any, **_k: Any) -> Any:
        raise RuntimeError(text)

    monkeypatch.setattr(detect, "run_tiny_model", fail)
    assert probe("fake", "CPU")["status"] == status
