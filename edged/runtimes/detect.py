"""Which devices work: the probe, a child process that really runs a tiny model on one device.

A broken driver can crash or hang whoever touches it, so this never runs in the supervisor. It looks at the
device nodes first, since "no such device" and "you may not open it" cannot be told apart from what a driver's
library says afterwards. One JSON verdict goes to the descriptor that was given; a child that dies without
one is a verdict too, made by the supervisor. Runs on Python 3.10 too.
"""

from __future__ import annotations

import errno
import grp
import json
import os
import pwd
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from edged import sites
from edged.runtimes.base import Runtime, clean_text, create_runtime, silence_telemetry
from edged.runtimes.tiny import run_tiny_model

__all__ = ["NodeCheck", "check_nodes", "main", "probe"]

_NVIDIA, _INTEL = "0x10de", "0x8086"
"""PCI vendor ids, as sysfs writes them."""

_CLASS_DISPLAY, _CLASS_ACCELERATOR = "0x03", "0x12"
"""How a PCI class begins: display controllers, processing accelerators."""

_INTEL_NPU_DRIVER = "intel_vpu"
"""The kernel still calls the NPU by its old name."""

_BUSY = ("out of memory", "out_of_memory", "cuda-capable device(s) is/are busy", "resource busy")
"""What drivers say when somebody else has the device; they have no code that gets this far."""


@dataclass(frozen=True)
class NodeCheck:
    """What the device nodes say: `status` is `ok` when there is something to try."""

    status: str
    hint: str = ""
    detail: str = ""


def main(arguments: Sequence[str]) -> NoReturn:
    """One argument, JSON: `{runtime, device, fd}`; the verdict goes to `fd`."""
    settings = json.loads(arguments[0])
    silence_telemetry()
    os.dup2(2, 1)  # what a library prints must not be taken for anything
    answer = probe(settings["runtime"], settings["device"])
    os.write(settings["fd"], json.dumps(answer).encode())
    os._exit(0)  # a driver's destructors may hang, and nothing is left to do


def probe(runtime_name: str, device: str, *, root: Path = Path("/")) -> dict[str, Any]:
    """The verdict on a device. `root` is where /dev and /sys are."""
    verdict: dict[str, Any] = {
        "runtime": runtime_name,
        "device": device,
        "status": "ok",
        "hint": "",
        "detail": "",
        "runtime_version": "",
        "full_name": "",
        "precision_fast": "",
    }
    nodes = check_nodes(device, root=root)
    if nodes.status != "ok":
        return {**verdict, "status": nodes.status, "hint": nodes.hint, "detail": nodes.detail}
    try:
        runtime = create_runtime(runtime_name)
    except ModuleNotFoundError as e:
        return {**verdict, **_not_installed(runtime_name, device, str(e))}
    except Exception as e:  # noqa: BLE001 - a broken installation raises anything, and that is the verdict
        hint = f"the Python package {runtime_name} is installed but cannot be imported; install it again"
        return {**verdict, "status": "driver_error", "hint": hint, "detail": clean_text(e)}
    verdict["runtime_version"] = runtime.version
    if device.startswith("CUDA") and not _has_cuda():
        detail = "the installed onnxruntime was built without CUDA"
        return {**verdict, **_not_installed(runtime_name, device, detail)}
    return {**verdict, **_try(runtime, device)}


def _try(runtime: Runtime, device: str) -> dict[str, Any]:
    try:
        # An NPU has no FP32: what is asked here is whether it works, not how exactly.
        model = run_tiny_model(runtime, device, precision="fast" if device == "NPU" else "f32")
        model.close()
        full_name, fast = runtime.full_name(device), runtime.precision_fast(device)
    except Exception as e:  # noqa: BLE001 - whatever a driver makes the runtime raise is the verdict
        text = clean_text(e)
        busy = any(sign in text.lower() for sign in _BUSY)
        return {
            "status": "busy" if busy else "driver_error",
            "hint": "another process has the device or its memory; end it or wait" if busy else _hint(device),
            "detail": text,
        }
    return {"status": "ok", "full_name": full_name, "precision_fast": fast}


def _has_cuda() -> bool:
    ort = sys.modules["onnxruntime"]
    return "CUDAExecutionProvider" in ort.get_available_providers()


def _not_installed(runtime: str, device: str, detail: str) -> dict[str, str]:
    return {"status": "not_installed", "hint": sites.get_hint(runtime, device), "detail": detail}


def _hint(device: str) -> str:
    if device.startswith("CUDA"):
        return (
            "check that nvidia-smi works and that the CUDA and cuDNN libraries of this onnxruntime-gpu are "
            "installed (pip install 'onnxruntime-gpu[cuda,cudnn]')"
        )
    if device.startswith("GPU"):
        return "install Intel's compute runtime (on Debian: intel-opencl-icd and ocl-icd-libopencl1)"
    if device == "NPU":
        return "install Intel's NPU driver and level-zero (intel-level-zero-npu, intel-driver-compiler-npu)"
    return "the runtime is installed but does not work; install it again"


def check_nodes(device: str, *, root: Path = Path("/")) -> NodeCheck:
    """Whether there is a device node to try, and whether this user may open it."""
    kind, _, number = device.replace(".", ":").partition(":")
    if kind == "CPU":
        return NodeCheck("ok")
    if kind == "CUDA":
        return _check_cuda(int(number or 0), root)
    if kind == "GPU":
        nodes = _intel_renderers(root)
        return _check_nth(nodes, int(number or 0), device, root, (_INTEL, _CLASS_DISPLAY, "i915 or xe"))
    if kind == "NPU":
        return _check_nth(
            _intel_npus(root), int(number or 0), device, root, (_INTEL, _CLASS_ACCELERATOR, _INTEL_NPU_DRIVER)
        )
    return NodeCheck("ok")  # a device of a runtime that this module does not know: running it will tell


def _check_cuda(number: int, root: Path) -> NodeCheck:
    dev = root / "dev"
    # A Jetson's GPU is no PCI card and has nodes of its own; under WSL there is one for all.
    for shared in ("nvhost-gpu", "nvgpu", "dxg"):
        if (dev / shared).exists() and number == 0:
            node = dev / shared
            return _check_access([node] if not node.is_dir() else sorted(node.glob("*/*")), f"CUDA:{number}")
    cards = sorted(
        (p for p in dev.glob("nvidia[0-9]*") if p.name[len("nvidia") :].isdecimal()),
        key=lambda p: int(p.name[len("nvidia") :]),
    )
    check = _check_nth(cards, number, f"CUDA:{number}", root, (_NVIDIA, _CLASS_DISPLAY, "nvidia"))
    if check.status != "ok":
        return check
    return _check_access([n for n in (dev / "nvidiactl", dev / "nvidia-uvm") if n.exists()], f"CUDA:{number}")


def _check_nth(
    nodes: Sequence[Path], number: int, device: str, root: Path, pci: tuple[str, str, str]
) -> NodeCheck:
    if number < len(nodes):
        return _check_access([nodes[number]], device)
    vendor, pci_class, driver = pci
    if not nodes and _on_pci_bus(root, vendor, pci_class):
        return NodeCheck(
            "driver_error",
            hint=f"install or load the kernel driver ({driver}); look at dmesg",
            detail="the device is on the PCI bus, but no driver has made its node in /dev",
        )
    return NodeCheck("absent", detail="no such device on this machine")


def _check_access(nodes: Sequence[Path], device: str) -> NodeCheck:
    for node in nodes:
        try:
            os.close(os.open(node, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK))
        except OSError as e:
            if e.errno in (errno.EACCES, errno.EPERM):
                return _no_permission(node, e.errno)
            if e.errno == errno.EBUSY:
                return NodeCheck(
                    "busy", "another process has the device; end it or wait", f"{node.name} is busy"
                )
            return NodeCheck("driver_error", _hint(device), f"{node.name}: {e.strerror}")
    return NodeCheck("ok")


def _no_permission(node: Path, error: int) -> NodeCheck:
    detail = f"{node} may not be opened: {os.strerror(error)}"
    status = node.stat()
    if error == errno.EPERM or (status.st_mode & 0o666) == 0o666:
        return NodeCheck(
            "no_permission", "the service's sandbox forbids it: allow the node with DeviceAllow=", detail
        )
    if status.st_gid == 0 or not status.st_mode & 0o020:
        return NodeCheck(
            "no_permission",
            f'no group may open {node}: give it one with a udev rule (GROUP="render")',
            detail,
        )
    try:
        group = grp.getgrgid(status.st_gid).gr_name
    except KeyError:
        group = str(status.st_gid)
    try:
        user = pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        user = str(os.geteuid())
    return NodeCheck(
        "no_permission", f"join the group {group}: usermod -aG {group} {user}, then start edged again", detail
    )


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _intel_renderers(root: Path) -> list[Path]:
    """Intel's render nodes: other makers have such nodes too, which OpenVINO cannot use."""
    return [
        node
        for node in sorted((root / "dev/dri").glob("renderD*"))
        if _read(root / "sys/class/drm" / node.name / "device/vendor") == _INTEL
    ]


def _intel_npus(root: Path) -> list[Path]:
    found = []
    for node in sorted((root / "dev/accel").glob("accel*")):
        driver = root / "sys/class/accel" / node.name / "device/driver"
        if driver.is_symlink() and Path(os.readlink(driver)).name == _INTEL_NPU_DRIVER:
            found.append(node)
    return found


def _on_pci_bus(root: Path, vendor: str, pci_class: str) -> bool:
    return any(
        _read(card / "vendor") == vendor and _read(card / "class").startswith(pci_class)
        for card in (root / "sys/bus/pci/devices").glob("*")
    )
