"""Looks at the machine: accelerators and their drivers, memory, inotify, the clock, heat, installed packages.

Reads files below a `Root` and judges nothing. What it looks for in /dev and /sys is what the prober tries
(`edged.runtimes.detect`), which may not be asked here: it belongs to the worker's side and opens the devices.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
from collections.abc import Iterable
from importlib.metadata import distributions
from pathlib import Path

from edged.cli.health.facts import Clock, Devices, Heat, Inotify, Machine, Memory, Package, PciDevice
from edged.cli.health.root import Root, whole

__all__ = ["clock", "devices", "heat", "inotify", "machine", "memory", "packages"]

_NODES = ("dev/dri/*", "dev/nvidia*", "dev/accel/accel*", "dev/kfd", "dev/nvhost-gpu", "dev/nvgpu", "dev/dxg")
_NODES_MAX = 64
"""Of device nodes: a server with sixteen GPUs has forty."""

_LIBRARIES = (
    "libcuda.so.1",
    "libcudnn.so.9",
    "libOpenCL.so.1",
    "libze_loader.so.1",
    "libze_intel_npu.so.1",
    "libze_intel_vpu.so.1",
)
_LIBRARY_DIRS = (
    "lib/*-linux-gnu",
    "usr/lib/*-linux-gnu",
    "usr/lib/*-linux-gnu/tegra",
    "usr/lib/*-linux-gnu/nvidia",
    "usr/lib64",
    "usr/lib",
    "usr/local/lib",
    "usr/lib/wsl/lib",
    "usr/local/cuda*/compat",
    "usr/local/cuda*/lib64",
)
_PACKAGES = (
    *("edged", "onnxruntime", "onnxruntime-gpu", "openvino", "numpy", "pyzmq", "msgpack", "msgspec"),
    *("psutil", "watchdog", "systemd-python", "pillow"),
)
_PACKAGE_PREFIXES = ("nvidia-", "onnxruntime-")
_UNLIMITED_BYTES = 1 << 60
"""cgroup v1 says "no limit" with the largest multiple of a page below 2^63."""

_ADJTIMEX_BYTES = 512
"""More than struct timex has on any platform; all zero asks and changes nothing."""
_TIME_ERROR = 5
_DISPLAY, _ACCELERATOR = "0x03", "0x12"
"""How a PCI class begins: display controllers, processing accelerators."""


def devices(root: Root) -> Devices:
    """The accelerators' nodes, the bus, and the libraries that talk to them."""
    paths = [path for pattern in _NODES for path in root.glob(pattern) if not root.at(path).is_dir()]
    cards = []
    for path in root.glob("sys/bus/pci/devices/*"):
        pci_class = root.text(f"{path}/class")
        if pci_class.startswith((_DISPLAY, _ACCELERATOR)):
            driver = Path(root.link(f"{path}/driver")).name
            cards.append(PciDevice(Path(path).name, root.text(f"{path}/vendor"), pci_class, driver))
    version = root.text("/proc/driver/nvidia/version").partition("\n")[0]
    return Devices(
        nodes=tuple(node for path in paths[:_NODES_MAX] if (node := root.node(path)) is not None),
        pci=tuple(cards),
        renderers={
            Path(path).name: root.text(f"{path}/device/vendor")
            for path in root.glob("sys/class/drm/renderD*")
        },
        libraries=frozenset(_libraries(root)),
        opencl_vendors=tuple(root.text(path) for path in root.glob("etc/OpenCL/vendors/*.icd")),
        nvidia_driver=next((word for word in version.split() if word[:1].isdigit() and "." in word), ""),
    )


def _libraries(root: Root) -> Iterable[str]:
    """Those that the dynamic linker would find: in its cache, or where a cache is built from."""
    cache = root.bytes("/etc/ld.so.cache")
    for name in _LIBRARIES:
        listed = b"\0" + name.encode() + b"\0" in cache
        if listed or any(next(root.glob(f"{where}/{name}"), "") for where in _LIBRARY_DIRS):
            yield name


def memory(root: Root, cgroup: str) -> Memory:
    """The machine's memory, and the limit that holds for the control group `cgroup` (as /proc names it)."""
    table = {
        name: 1024 * (whole(rest.split()[0]) or 0)
        for line in root.text("/proc/meminfo").splitlines()
        if (name := line.partition(":")[0]) and (rest := line.partition(":")[2]).split()
    }
    limit, used, kills = _group(root, cgroup)
    return Memory(table.get("MemTotal"), table.get("MemAvailable"), limit, used, kills)


def _group(root: Root, cgroup: str) -> tuple[int | None, int | None, int | None]:
    rooms: list[tuple[int, int, int]] = []
    kills: int | None = None
    path = Path(cgroup or "/")
    for directory in (path, *path.parents):
        base = f"/sys/fs/cgroup{str(directory).rstrip('/')}"
        limits = [
            value
            for name in ("memory.max", "memory.high")
            if (value := root.number(f"{base}/{name}")) is not None and value < _UNLIMITED_BYTES
        ]
        used = root.number(f"{base}/memory.current")
        if limits and used is not None:
            rooms.append((min(limits) - used, min(limits), used))
        for line in root.text(f"{base}/memory.events").splitlines():
            name, _, count = line.partition(" ")
            if name == "oom_kill" and kills is None:
                kills = whole(count)
    if not rooms:
        return None, None, kills
    _, limit, used = min(rooms)
    return limit, used, kills


def inotify(root: Root) -> Inotify:
    """How much may be watched."""
    base = "/proc/sys/fs/inotify"
    return Inotify(
        root.number(f"{base}/max_user_watches"),
        root.number(f"{base}/max_user_instances"),
        root.number(f"{base}/max_queued_events"),
    )


def clock(now_s: float) -> Clock:
    """The wall clock, and whether the kernel takes it for synchronised (adjtimex(2), only asked)."""
    synchronised: bool | None = None
    with contextlib.suppress(OSError, AttributeError):
        state = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(_ADJTIMEX_BYTES))
        synchronised = None if state < 0 else state != _TIME_ERROR
    return Clock(now_s, synchronised)


def heat(root: Root) -> Heat:
    """The hottest sensor, and every sign of slowing down."""
    hottest, where, critical = None, "", None
    for zone in root.glob("sys/class/thermal/thermal_zone*"):
        milli = root.number(f"{zone}/temp")
        if milli is None or not -40_000 <= milli <= 150_000:  # a broken sensor says absurdities
            continue
        if hottest is None or milli / 1000 > hottest:
            hottest, where = milli / 1000, root.text(f"{zone}/type") or Path(zone).name
            critical = _trip_c(root, zone)
    counts = [
        count
        for path in root.glob("sys/devices/system/cpu/cpu[0-9]*/thermal_throttle/core_throttle_count")
        if (count := root.number(path)) is not None
    ]
    firmware = next(iter(root.glob("sys/devices/platform/soc/*firmware/get_throttled")), None)
    cooling = [
        (root.number(f"{path}/cur_state") or 0) > 0
        for path in root.glob("sys/class/thermal/cooling_device*")
        if "cpufreq" in root.text(f"{path}/type")
    ]
    frequency = "/sys/devices/system/cpu/cpu0/cpufreq"
    return Heat(
        hottest,
        where,
        critical,
        sum(counts) if counts else None,
        None if firmware is None else root.number(firmware, 16),
        root.text(f"{frequency}/scaling_governor"),
        root.text(f"{frequency}/scaling_driver"),
        any(cooling) if cooling else None,
    )


def _trip_c(root: Root, zone: str) -> float | None:
    """From where on the chip is switched off."""
    for path in root.glob(f"{zone.lstrip('/')}/trip_point_*_type"):
        milli = root.number(path.removesuffix("type") + "temp")
        if root.text(path) == "critical" and milli is not None and milli > 0:
            return milli / 1000
    return None


def packages(directories: Iterable[str], root: Root) -> tuple[Package, ...]:
    """The distributions of interest in these directories."""
    found: dict[tuple[str, str], Package] = {}
    for directory in directories:
        path = str(root.at(directory))
        for each in distributions(path=[path]):
            name = (each.metadata["Name"] or "").lower().replace("_", "-")
            if name in _PACKAGES or name.startswith(_PACKAGE_PREFIXES):
                found[name, directory] = Package(name, each.version, directory)
    return tuple(found[key] for key in sorted(found))


def machine(root: Root) -> Machine:
    """What it is, in the words of its own files."""
    release = {
        name: value.strip('"')
        for line in root.text("/etc/os-release").splitlines()
        if (name := line.partition("=")[0]) and (value := line.partition("=")[2])
    }
    virtual = root.text("/run/systemd/container") or ("docker" if root.node("/.dockerenv") else "")
    return Machine(
        release.get("PRETTY_NAME", ""),
        root.text("/proc/sys/kernel/osrelease"),
        platform.machine(),
        root.text("/proc/device-tree/model") or root.text("/sys/class/dmi/id/product_name"),
        os.cpu_count() or 0,
        virtual,
    )
