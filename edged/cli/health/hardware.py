"""The checks of the machine: accelerators, their drivers, memory, inotify, the clock, heat.

Pure. Device nodes count when inference opens them; drivers are judged against the wheels that are installed.
"""

from __future__ import annotations

from edged.cli.health.facts import READ, WRITE, Facts, Node, may
from edged.cli.health.words import Rows, install, restart, times
from edged.cli.tables import bytes_text

__all__ = ["clock", "devices", "drivers", "heat", "inotify", "memory"]

_WATCHES_MIN, _INSTANCES_MIN = 4096, 32
"""One watch for each directory of models, and room for everything else on the machine that watches."""
_MEMORY_LIMIT_MIN_BYTES = 256 << 20
"""The daemon takes 40 MB and a runtime with a small model 100."""
_YEAR_S = 365.2425 * 86400
_SANE_S = 55 * _YEAR_S
"""2025: edged is not older, so a clock that says so has lost its battery."""
_HOT_MARGIN_C = 10.0
_CRITICAL_MARGIN_C = 15.0
_FIRMWARE_NOW = {0: "too little voltage", 1: "a capped clock", 2: "throttling", 3: "too much heat"}
_NVIDIA, _INTEL, _AMD = "0x10de", "0x8086", "0x1002"

# ---- devices and drivers --------------------------------------------------------------------------------


def devices(facts: Facts) -> Rows:
    """The nodes, whether the service may open them, and the daemon's verdicts."""
    seen = facts.devices
    nodes = [node for node in seen.nodes if _matters(node)]
    if not nodes and not seen.pci:
        yield "ok", "no accelerator on this machine; models run on the processor", ""
    for node in nodes:
        yield from _device_node(facts, node)
    yield from _drivers_of_the_bus(facts)
    policy, allowed = facts.unit.properties.get("DevicePolicy"), facts.unit.properties.get("DeviceAllow", "")
    if nodes and policy in ("closed", "strict") and not allowed.strip():
        yield (
            "warn",
            "the unit allows no device node, though there are accelerators",
            "rm /etc/systemd/system/edged.service.d/cpu-only.conf; systemctl daemon-reload; "
            "systemctl restart edged",
        )
    for verdict in (facts.daemon.status or {}).get("devices") or ():
        if verdict.get("status") in ("no_permission", "driver_error", "timeout"):
            what = f"{verdict.get('runtime')} on {verdict.get('device')}: {verdict['status']}"
            hint = str(verdict.get("hint") or verdict.get("detail") or "no hint")
            yield "warn", f"{what}: {hint}", "edgectl devices"
        elif verdict.get("status") == "ok":
            yield "ok", f"{verdict.get('runtime')} works on {verdict.get('device')}", ""


def _matters(node: Node) -> bool:
    """The nodes that inference opens: a card's own node is for those who set modes on screens."""
    name = node.path.rpartition("/")[2]
    return not name.startswith("card") and name not in ("nvidia-modeset", "nvidia-caps")


def _device_node(facts: Facts, node: Node) -> Rows:
    account = facts.service
    shown = f"{node.path} ({node.owner}:{node.group} {node.mode:04o})"
    if account is None:
        yield "note", f"{shown} is there", ""
    elif not may(node, account, READ | WRITE):
        open_to_group = node.mode & 0o060 == 0o060 and node.group not in ("root", "0")
        fix = (
            f"usermod -aG {node.group} {account.name} && {restart(facts)}"
            if open_to_group
            else _udev_rule(node)
        )
        yield "fail", f"{shown} may not be opened by {account.name}", fix
    elif facts.process is not None and not may(node, facts.process.account, READ | WRITE):
        text = f"{shown} may be opened by {account.name}, but not by the daemon that runs since before"
        yield "fail", text, restart(facts)
    else:
        yield "ok", f"{shown} may be opened by {account.name}", ""


def _udev_rule(node: Node) -> str:
    rule = f'KERNEL=="{node.path.rpartition("/")[2]}", GROUP="render", MODE="0660"'
    return f"echo '{rule}' >> /etc/udev/rules.d/70-edged.rules; udevadm control --reload; udevadm trigger"


def _drivers_of_the_bus(facts: Facts) -> Rows:
    for card in facts.devices.pci:
        maker = {_NVIDIA: "NVIDIA", _INTEL: "Intel", _AMD: "AMD"}.get(card.vendor)
        if maker is None:
            continue
        what = f"the {maker} device at {card.address}"
        if not card.driver:
            yield "fail", f"{what} has no kernel driver", "dmesg | grep -iE 'nvidia|i915|xe|amdgpu|vpu'"
        elif card.driver in ("vfio-pci", "nouveau"):
            text = f"{what} is driven by {card.driver}, with which no runtime can use it"
            yield "warn", text, f"lspci -nnk -s {card.address}"


def drivers(facts: Facts) -> Rows:
    """Whether each wheel finds its driver, and each device a runtime."""
    seen = facts.devices
    names = {node.path.rpartition("/")[2] for node in seen.nodes}
    nvidia = any(name.removeprefix("nvidia").isdigit() for name in names if name.startswith("nvidia"))
    tegra = bool(names & {"nvhost-gpu", "nvgpu", "dxg"})
    cuda_wheel = facts.package("onnxruntime-gpu")
    ours = False
    if cuda_wheel:
        ours = True
        if "libcuda.so.1" not in seen.libraries:
            text = (
                "onnxruntime-gpu is installed, but NVIDIA's libcuda.so.1 is not: it can only run on the CPU"
            )
            yield "fail" if nvidia or tegra else "warn", text, "apt-get install nvidia-driver libcuda1"
        else:
            yield "ok", f"libcuda.so.1 is there{_driver_text(seen.nvidia_driver)}", ""
        cudnn = "libcudnn.so.9" in seen.libraries or any(
            package.name.startswith("nvidia-cudnn") for package in facts.packages
        )
        if not cudnn and not tegra:
            text = "onnxruntime-gpu needs cuDNN 9, which was not found"
            yield "warn", text, "pip install 'onnxruntime-gpu[cuda,cudnn]'"
    if nvidia and not cuda_wheel:
        ours = True
        text = "there is an NVIDIA GPU, and no runtime that can use it: onnxruntime-gpu is not installed"
        yield "warn", text, install(facts, "cuda")
    if nvidia and not {"nvidia-uvm", "nvidiactl"} <= names:
        ours = True
        text = "/dev/nvidia-uvm is missing, without which CUDA finds no device in a service"
        yield (
            "fail",
            text,
            "modprobe nvidia-uvm; echo nvidia-uvm > /etc/modules-load.d/edged-nvidia.conf; "
            "systemctl restart edged",
        )
    intel = [name for name, vendor in seen.renderers.items() if vendor == _INTEL and name in names]
    if intel:
        ours = True
        yield from _intel_gpu(facts)
    if any(name.startswith("accel") for name in names):
        ours = True
        yield from _npu(facts)
    if not ours:
        yield "ok", "no accelerator's driver is needed", ""


def _driver_text(version: str) -> str:
    return f", the kernel's driver is {version}" if version else ""


def _intel_gpu(facts: Facts) -> Rows:
    seen = facts.devices
    if not facts.package("openvino"):
        text = "there is an Intel GPU, and no runtime that can use it: openvino is not installed"
        yield "note", text, install(facts, "openvino")
        return
    if "libOpenCL.so.1" not in seen.libraries:
        text = "there is an Intel GPU, but no OpenCL loader (libOpenCL.so.1)"
        yield "fail", text, "apt-get install ocl-icd-libopencl1 intel-opencl-icd"
    elif not any("igdrcl" in vendor or "intel" in vendor.lower() for vendor in seen.opencl_vendors):
        text = "there is an Intel GPU, but Intel's compute runtime is not registered in /etc/OpenCL/vendors"
        yield "fail", text, "apt-get install intel-opencl-icd"
    else:
        yield "ok", "Intel's compute runtime is there", ""


def _npu(facts: Facts) -> Rows:
    libraries = facts.devices.libraries
    if not facts.package("openvino"):
        text = "there is an NPU, and no runtime that can use it: openvino is not installed"
        yield "note", text, install(facts, "openvino")
    elif "libze_loader.so.1" not in libraries:
        yield "fail", "there is an NPU, but no level-zero loader", "apt-get install libze1"
    elif not libraries & {"libze_intel_npu.so.1", "libze_intel_vpu.so.1"}:
        text = "there is an NPU, but Intel's user-mode driver for it is not installed"
        yield "fail", text, "apt-get install intel-level-zero-npu intel-driver-compiler-npu"
    else:
        yield "ok", "the NPU's user-mode driver is there", ""


# ---- the machine ----------------------------------------------------------------------------------------


def memory(facts: Facts) -> Rows:
    """Of the machine and of the control group."""
    seen = facts.memory
    if seen.total_bytes and seen.available_bytes is not None:
        share = seen.available_bytes / seen.total_bytes
        text = f"{bytes_text(seen.available_bytes)} of {bytes_text(seen.total_bytes)} memory is available"
        level = "fail" if share < 0.03 else "warn" if share < 0.10 else "ok"
        yield level, text, "" if level == "ok" else "edgectl status; ps -eo rss,comm --sort=-rss | head"
    if seen.group_limit_bytes is not None:
        limit, used = seen.group_limit_bytes, seen.group_used_bytes or 0
        text = f"the control group uses {bytes_text(used)} of the {bytes_text(limit)} that it may"
        fix = "systemctl edit edged  # [Service] MemoryMax="
        if limit < _MEMORY_LIMIT_MIN_BYTES:
            yield "warn", f"{text}, too little for a runtime with any model", fix
        elif used > 0.9 * limit:
            yield "warn", text, fix
        else:
            yield "ok", text, ""
    if seen.oom_kills:
        text = f"the kernel has killed {seen.oom_kills} of edged's processes for want of memory"
        yield "warn", text, "journalctl -k --grep='out of memory|oom-kill'"
    if facts.unit.properties.get("OOMPolicy") not in (None, "", "continue"):
        text = f"OOMPolicy={facts.unit.properties['OOMPolicy']}: one killed worker stops the whole service"
        yield "warn", text, "systemctl edit edged  # [Service] OOMPolicy=continue"


def inotify(facts: Facts) -> Rows:
    """The kernel's bounds on watching folders."""
    seen = facts.inotify
    bounds = (
        ("max_user_watches", seen.watches_max, _WATCHES_MIN, 65536),
        ("max_user_instances", seen.instances_max, _INSTANCES_MIN, 256),
    )
    for name, have, least, better in bounds:
        if have is None:
            continue
        text = f"fs.inotify.{name} is {have}"
        if have < least:
            fix = f"echo fs.inotify.{name}={better} > /etc/sysctl.d/60-edged.conf; sysctl --system"
            yield "warn", f"{text}: when they are used up, new models are noticed on a timer only", fix
        else:
            yield "ok", text, ""


def clock(facts: Facts) -> Rows:
    """The wall clock, by which the journal's times go."""
    year = int(1970 + facts.clock.now_s / _YEAR_S)
    if facts.clock.now_s < _SANE_S:
        text = f"the clock says {year}: the journal's times are wrong, edged's own timing is not"
        yield "warn", text, "timedatectl set-ntp true  # or: timedatectl set-time 'YYYY-MM-DD HH:MM'"
    elif facts.clock.synchronised is False:
        yield "note", f"the clock says {year} and nothing keeps it right", "timedatectl set-ntp true"
    else:
        how = "and is synchronised" if facts.clock.synchronised else "(whether it is kept right is not known)"
        yield "ok", f"the clock says {year} {how}", ""


def heat(facts: Facts) -> Rows:
    """Temperature, throttling, and a clock that is held down."""
    seen = facts.heat
    told = False
    if seen.hottest_c is not None:
        told = True
        text = f"{seen.hottest} is at {seen.hottest_c:.0f} °C"
        bound = facts.temperature_max_c
        if seen.hottest_c >= bound:
            text = f"{text}; from {bound:.0f} °C on no model is loaded"
            yield "fail", text, "edgectl top  # and look at fan, dust and sun"
        elif seen.hottest_c >= bound - _HOT_MARGIN_C or (
            seen.critical_c is not None and seen.hottest_c >= seen.critical_c - _CRITICAL_MARGIN_C
        ):
            yield "warn", f"{text}, near its limit", "edgectl top  # and look at fan, dust and sun"
        else:
            yield "ok", text, ""
    if seen.firmware is not None:
        told = True
        now = [word for bit, word in _FIRMWARE_NOW.items() if seen.firmware >> bit & 1]
        past = [word for bit, word in _FIRMWARE_NOW.items() if seen.firmware >> (bit + 16) & 1]
        if now:
            yield (
                "warn",
                f"the firmware reports {', '.join(now)}",
                "vcgencmd get_throttled  # a better supply, or a fan",
            )
        elif past:
            yield "note", f"since it was switched on the firmware saw {', '.join(past)}", "edgectl top"
        else:
            yield "ok", "the firmware reports no throttling", ""
    if seen.throttle_count:
        told = True
        text = f"the processor was throttled {times(seen.throttle_count)} since it was switched on"
        yield "note", text, "edgectl top"
    if seen.cooling_now:
        told = True
        yield (
            "warn",
            "the kernel slows the processor down to cool it",
            "edgectl top  # and look at fan, dust and sun",
        )
    if seen.governor == "powersave" and "pstate" not in seen.governor_driver:
        told = True
        text = "the processor is held at its lowest clock (governor powersave)"
        yield "warn", text, "echo schedutil | tee /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor"
    if not told:
        yield "ok", "nothing on this machine tells of heat or throttling", ""
