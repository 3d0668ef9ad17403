"""Facts in, findings out: each thing that can be wrong is told with its level and what to type."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from typing import Any

import pytest

from edged.cli.health.checks import LEVELS, Finding, examine, worst
from edged.cli.health.facts import (
    Account,
    Clock,
    Daemon,
    Devices,
    Facts,
    Heat,
    Inotify,
    Memory,
    ModelsFolder,
    Node,
    Package,
    PciDevice,
    Place,
    Process,
    Socket,
    Unit,
    may,
)

GIB = 1 << 30
SERVICE = Account("edged", 990, ("edged", "edged-admin", "render", "video"))
CAMERA = Account("camera", 1000, ("camera", "edged"))
ROOT = Account("root", 0, ("root",))
SITE = "/usr/lib/edged/lib/python3.11/site-packages"


def node(path: str, mode: int, owner: str = "edged", group: str = "edged", uid: int = 990) -> Node:
    """A file as stat saw it."""
    return Node(path, mode, uid, owner, group)


def render(group: str = "render", mode: int = 0o660) -> Node:
    """A GPU's render node."""
    return node("/dev/dri/renderD128", mode, "root", group, uid=0)


def place(role: str, path: str, mode: int = 0o750, **more: Any) -> Place:
    """A directory of the daemon's, with room on its disk."""
    room = {"total_bytes": 100 * GIB, "free_bytes": 50 * GIB, "free_inodes": 10**6}
    return Place(role, path, node(path, mode), **{**room, **more})


def row(name: str, state: str = "READY", **more: Any) -> dict[str, Any]:
    """A model in the daemon's status."""
    return {"name": name, "state": state, "serving": state == "READY", "restarts": 0, **more}


def status(**changes: Any) -> dict[str, Any]:
    """What a daemon says that has nothing to complain about."""
    return {
        "version": "0.1.0",
        "state": "ready",
        "pid": 77,
        "models": [row("digits")],
        "resources": {"level": "OK", "reasons": []},
        "devices": [{"runtime": "onnxruntime", "device": "CPU", "status": "ok"}],
        **changes,
    }


def unit(**changes: str) -> Unit:
    """A running service."""
    said = {
        "LoadState": "loaded",
        "ActiveState": "active",
        "SubState": "running",
        "Result": "success",
        "NRestarts": "0",
        "UnitFileState": "enabled",
        "Type": "notify",
        "WatchdogUSec": "30s",
        "OOMPolicy": "continue",
        "DevicePolicy": "closed",
        "DeviceAllow": "char-drm rw",
    }
    return Unit("edged.service", {**said, **changes})


def sockets(**changes: Any) -> tuple[Socket, ...]:
    """The four sockets as the service makes them."""
    groups = {"edged": "edged", "admin": "edged-admin", "events": "edged", "lease": "edged"}
    made = {
        name: Socket(f"{name}.sock", node(f"/run/edged/{name}.sock", 0o660, group=group), "answers")
        for name, group in groups.items()
    }
    for name, change in changes.items():
        made[name] = replace(made[name], **change)
    return tuple(made.values())


HEALTHY = Facts(
    system=True,
    caller=ROOT,
    caller_configured=ROOT,
    service=SERVICE,
    service_name="edged",
    groups={"edged": (), "edged-admin": (), "edged-drop": ()},
    daemon=Daemon(status(), {"version": "0.1.0"}),
    process=Process(77, SERVICE, "edged.service", python="/usr/lib/edged/bin/python", open_files_max=65536),
    unit=unit(),
    places=(
        place("models", "/var/lib/edged/models", 0o2775),
        place("state", "/var/lib/edged"),
        place("cache", "/var/cache/edged"),
        place("sockets", "/run/edged", 0o755),
    ),
    sockets=sockets(),
    config_file="/etc/edged/edged.toml",
    config_error="",
    disk_free_min_bytes=GIB // 4,
    temperature_max_c=95.0,
    client_version="0.1.0",
    packages=(Package("onnxruntime", "1.31.1", SITE), Package("openvino", "2026.4.1", SITE)),
    memory=Memory(8 * GIB, 6 * GIB, 7 * GIB, GIB, 0),
    inotify=Inotify(65536, 128, 16384),
    clock=Clock(1_780_000_000.0, True),
    heat=Heat(48.0, "x86_pkg_temp", 100.0, 0),
    models=ModelsFolder(entries=1),
)

CUDA = Package("onnxruntime-gpu", "1.31.1", SITE)
NVIDIA_NODES = (
    node("/dev/nvidia0", 0o666, "root", "root", uid=0),
    node("/dev/nvidiactl", 0o666, "root", "root", uid=0),
    node("/dev/nvidia-uvm", 0o666, "root", "root", uid=0),
)
INTEL_GPU = Devices((render(),), renderers={"renderD128": "0x8086"})
NPU = Devices((node("/dev/accel/accel0", 0o660, "root", "render", uid=0),))


def nvidia(*libraries: str, nodes: tuple[Node, ...] = NVIDIA_NODES) -> Devices:
    """A machine with an NVIDIA GPU."""
    return Devices(nodes, libraries=frozenset(libraries), nvidia_driver="570.1")


def found(level: str, words: str, **changes: Any) -> Finding:
    """The finding at this level with these words, of a healthy machine with some changes."""
    findings = examine(replace(HEALTHY, **changes))
    hits = [each for each in findings if each.level == level and words in each.text]
    assert hits, "\n".join(f"{each.level} {each.area}: {each.text}" for each in findings)
    return hits[0]


def test_a_healthy_machine_has_nothing_but_ok_in_every_area() -> None:
    """No advice where none is needed, and no area that says nothing."""
    findings = examine(HEALTHY)
    assert [each for each in findings if each.level != "ok"] == []
    assert all(not each.fix for each in findings)
    areas = (
        "daemon unit versions settings groups sockets devices drivers disk models memory inotify clock heat"
    )
    assert {each.area for each in findings} == set(areas.split())
    assert worst(findings) == "ok"


CASES: list[tuple[str, str, str, dict[str, Any]]] = [
    # the daemon's own word
    ("fail", "no daemon answers", "systemctl start edged", {"daemon": Daemon(reason="DAEMON_NOT_RUNNING")}),
    (
        "fail",
        "no daemon answers",
        "edgectl logs",
        {
            "daemon": Daemon(reason="DAEMON_NOT_RUNNING"),
            "unit": unit(ActiveState="failed", Result="exit-code"),
        },
    ),
    (
        "warn",
        "camera may not ask the daemon",
        "sudo edgectl doctor",
        {"daemon": Daemon(error="no", reason="SOCKET_PERMISSION"), "caller": CAMERA},
    ),
    ("fail", "no answer: stuck", "edgectl logs", {"daemon": Daemon(error="stuck", reason="CONNECTION_LOST")}),
    (
        "note",
        "may not be read by camera",
        "usermod -aG edged-admin camera",
        {"daemon": Daemon(None, {"version": "0.1.0"}), "caller": CAMERA},
    ),
    (
        "fail",
        "vad is not served: MODEL_INVALID",
        "edgectl explain vad",
        {"daemon": Daemon(status(models=[row("vad", "UNAVAILABLE", reason="MODEL_INVALID")]))},
    ),
    (
        "warn",
        "new version of vad was refused",
        "edgectl explain vad",
        {"daemon": Daemon(status(models=[row("vad"), row("vad", "UNAVAILABLE", reason="GOLDEN_MISMATCH")]))},
    ),
    (
        "note",
        "MODEL_UNLOADED",
        "edgectl explain vad",
        {"daemon": Daemon(status(models=[row("vad", "UNAVAILABLE", reason="MODEL_UNLOADED")]))},
    ),
    (
        "warn",
        "runs on CPU: NPU is busy",
        "edgectl explain vad",
        {"daemon": Daemon(status(models=[row("vad", device="CPU", fallback_reason="NPU is busy")]))},
    ),
    (
        "warn",
        "started again 3 times",
        "edgectl explain vad",
        {"daemon": Daemon(status(models=[row("vad", restarts=3)]))},
    ),
    (
        "warn",
        "found damaged, 2 times since the start",
        "ls -l /s/store/damaged",
        {"daemon": Daemon(status(counters={"damaged_copies": 2}, state_dir="/s"))},
    ),
    (
        "warn",
        "REFUSE_LOADS",
        "edgectl top",
        {"daemon": Daemon(status(resources={"level": "REFUSE_LOADS", "reasons": ["memory 95 %"]}))},
    ),
    (
        "fail",
        "the folder is gone",
        "findmnt",
        {"daemon": Daemon(status(models_fault="the folder is gone", models_dir="/m"))},
    ),
    (
        "warn",
        "may open 1024 files",
        "LimitNOFILE=65536",
        {"process": replace(HEALTHY.process, open_files_max=1024)},
    ),
    # systemd
    ("note", "could not be asked", "", {"unit": Unit("edged.service", error="no systemd")}),
    ("fail", "there is no unit", "", {"unit": Unit("edged.service", {"LoadState": "not-found"})}),
    (
        "fail",
        "exit status 78: a setting is wrong",
        "systemctl restart edged.service",
        {"unit": unit(ActiveState="failed", Result="exit-code", ExecMainStatus="78")},
    ),
    ("fail", "inactive", "systemctl start edged.service", {"unit": unit(ActiveState="inactive")}),
    ("warn", "activating", "systemctl status", {"unit": unit(ActiveState="activating", SubState="start")}),
    ("warn", "started it again 4 times", "edgectl logs", {"unit": unit(NRestarts="4")}),
    ("warn", "unit file has changed", "systemctl daemon-reload", {"unit": unit(NeedDaemonReload="yes")}),
    ("note", "next boot", "systemctl enable", {"unit": unit(UnitFileState="disabled")}),
    ("note", "no watchdog", "systemctl cat", {"unit": unit(WatchdogUSec="0")}),
    ("warn", "OOMPolicy=stop", "OOMPolicy=continue", {"unit": unit(OOMPolicy="stop")}),
    # versions
    ("warn", "edgectl is 0.2.0", "systemctl restart edged", {"client_version": "0.2.0"}),
    (
        "fail",
        "overwrite each other's",
        "pip uninstall",
        {"packages": (CUDA, Package("onnxruntime", "1.31.1", SITE))},
    ),
    (
        "fail",
        "no runtime is installed",
        "apt-get install edged-runtime-cpu",
        {"packages": (Package("edged", "0.1.0", SITE),), "daemon": Daemon(reason="DAEMON_NOT_RUNNING")},
    ),
    # settings, groups
    ("fail", "edged.toml, line 3", "edged --check", {"config_error": "edged.toml, line 3: unknown key"}),
    ("fail", "the user edged", "systemd-sysusers", {"service": None}),
    ("fail", "there is no group edged-admin", "systemd-sysusers", {"groups": {"edged": ()}}),
    (
        "note",
        "there is no group edged-drop",
        "systemd-sysusers",
        {"groups": {"edged": (), "edged-admin": ()}},
    ),
    (
        "warn",
        "this session began before that",
        "newgrp edged-admin",
        {"caller": CAMERA, "caller_configured": replace(CAMERA, groups=("camera", "edged", "edged-admin"))},
    ),
    (
        "note",
        "camera is not in edged-admin",
        "usermod -aG edged-admin camera",
        {"caller": CAMERA, "caller_configured": CAMERA},
    ),
    (
        "warn",
        "edged has joined render since",
        "systemctl restart edged.service",
        {
            "process": replace(
                HEALTHY.process, account=replace(SERVICE, groups=("edged", "video", "edged-admin"))
            )
        },
    ),
    # sockets
    (
        "fail",
        "nobody listens on lease.sock",
        "systemctl restart",
        {"sockets": sockets(lease={"answer": "refused"})},
    ),
    (
        "note",
        "a daemon that is gone",
        "systemctl start",
        {"sockets": tuple(replace(each, answer="refused") for each in sockets())},
    ),
    ("note", "no sockets in /run/edged", "", {"sockets": ()}),
    (
        "warn",
        "everybody on this machine",
        "systemctl restart",
        {"sockets": sockets(edged={"node": node("/run/edged/edged.sock", 0o666)})},
    ),
    (
        "fail",
        "where the group edged-admin should have it",
        "systemctl restart edged.service",
        {"sockets": sockets(admin={"node": node("/run/edged/admin.sock", 0o600)})},
    ),
    (
        "fail",
        "where the group edged-admin should have it",
        "usermod -aG edged-admin edged && systemctl restart",
        {
            "sockets": sockets(admin={"node": node("/run/edged/admin.sock", 0o600)}),
            "service": replace(SERVICE, groups=("edged",)),
        },
    ),
    (
        "note",
        "camera may not use it",
        "usermod -aG edged-admin camera",
        {"caller": CAMERA, "sockets": sockets(admin={"answer": "denied"})},
    ),
    (
        "fail",
        "writable by everybody",
        "chmod o-w /run/edged",
        {"places": (place("sockets", "/run/edged", 0o777),)},
    ),
    # devices and drivers
    (
        "fail",
        "may not be opened by edged",
        "usermod -aG gpu edged && systemctl restart edged.service",
        {"devices": Devices((render("gpu"),))},
    ),
    ("fail", "may not be opened by edged", "udevadm", {"devices": Devices((render("root", 0o600),))}),
    (
        "fail",
        "not by the daemon that runs since before",
        "systemctl restart",
        {
            "devices": Devices((render(),)),
            "process": replace(HEALTHY.process, account=replace(SERVICE, groups=("edged",))),
        },
    ),
    (
        "fail",
        "NVIDIA device at 0000:01:00.0 has no kernel driver",
        "dmesg",
        {"devices": Devices(pci=(PciDevice("0000:01:00.0", "0x10de", "0x030000", ""),))},
    ),
    (
        "warn",
        "driven by nouveau",
        "lspci",
        {"devices": Devices(pci=(PciDevice("0000:01:00.0", "0x10de", "0x030000", "nouveau"),))},
    ),
    (
        "warn",
        "allows no device node",
        "cpu-only.conf",
        {"devices": Devices((render(),)), "unit": unit(DeviceAllow="")},
    ),
    (
        "warn",
        "openvino on NPU: driver_error: install it",
        "edgectl devices",
        {
            "daemon": Daemon(
                status(
                    devices=[
                        {
                            "runtime": "openvino",
                            "device": "NPU",
                            "status": "driver_error",
                            "hint": "install it",
                        }
                    ]
                )
            )
        },
    ),
    ("fail", "libcuda.so.1 is not", "nvidia-driver", {"devices": nvidia(), "packages": (CUDA,)}),
    ("warn", "libcuda.so.1 is not", "nvidia-driver", {"packages": (CUDA,)}),
    ("warn", "cuDNN 9", "pip install", {"devices": nvidia("libcuda.so.1"), "packages": (CUDA,)}),
    ("warn", "onnxruntime-gpu is not installed", "edged-runtime-cuda", {"devices": nvidia()}),
    (
        "fail",
        "/dev/nvidia-uvm is missing",
        "modprobe nvidia-uvm",
        {"devices": nvidia("libcuda.so.1", nodes=NVIDIA_NODES[:2]), "packages": (CUDA,)},
    ),
    ("fail", "no OpenCL loader", "ocl-icd-libopencl1", {"devices": INTEL_GPU}),
    (
        "fail",
        "compute runtime is not registered",
        "intel-opencl-icd",
        {"devices": replace(INTEL_GPU, libraries=frozenset({"libOpenCL.so.1"}))},
    ),
    (
        "note",
        "openvino is not installed",
        "edged-runtime-openvino",
        {"devices": INTEL_GPU, "packages": (CUDA,)},
    ),
    ("fail", "no level-zero loader", "libze1", {"devices": NPU}),
    (
        "fail",
        "user-mode driver",
        "intel-level-zero-npu",
        {"devices": replace(NPU, libraries=frozenset({"libze_loader.so.1"}))},
    ),
    # directories
    (
        "fail",
        "new models are refused below",
        "du -xh",
        {"places": (place("state", "/var/lib/edged", free_bytes=1 << 20),)},
    ),
    (
        "warn",
        "new models are refused below",
        "du -xh",
        {"places": (place("state", "/var/lib/edged", free_bytes=GIB // 3),)},
    ),
    ("warn", "only 3 inodes", "df -i", {"places": (place("state", "/var/lib/edged", free_inodes=3),)}),
    (
        "fail",
        "cannot be written by edged",
        "chown -R edged: /var/lib/edged",
        {"places": (Place("state", "/var/lib/edged", node("/var/lib/edged", 0o755, "root", "root", 0)),)},
    ),
    ("fail", "mounted read-only", "dmesg", {"places": (place("state", "/var/lib/edged", read_only=True),)}),
    (
        "fail",
        "may not go through /home/ann",
        "chmod o+x /home/ann",
        {
            "places": (
                place("models", "/home/ann/m", above=(node("/home/ann", 0o700, "ann", "ann", uid=1001),)),
            )
        },
    ),
    (
        "fail",
        "cannot see home directories",
        "BindReadOnlyPaths=/home/ann/models",
        {"places": (place("models", "/home/ann/models"),), "unit": unit(ProtectHome="yes")},
    ),
    (
        "fail",
        "cannot see the machine's /tmp",
        "BindReadOnlyPaths=/tmp/models",
        {"places": (place("models", "/tmp/models"),), "unit": unit(PrivateTmp="yes")},
    ),
    (
        "warn",
        "anyone on this machine decides",
        "chmod o-w",
        {"places": (place("models", "/var/lib/edged/models", 0o777),)},
    ),
    (
        "fail",
        "the models directory /m: No such file",
        "mkdir -p /m",
        {"places": (Place("models", "/m", error="No such file or directory"),)},
    ),
    (
        "note",
        "cannot be looked at by root",
        "sudo edgectl doctor",
        {"places": (Place("state", "/s", error="Permission denied"),)},
    ),
    # the models folder
    (
        "warn",
        "bad.onnx is refused: it is empty",
        "ls -l",
        {"models": ModelsFolder(1, problems=(("bad.onnx", "EMPTY_FILE", "it is empty"),))},
    ),
    (
        "fail",
        "m.onnx cannot be read by edged",
        "chmod -R o+rX",
        {"models": ModelsFolder(1, files=(node("/var/lib/edged/models/m.onnx", 0o600, "ann", "ann", 1001),))},
    ),
    (
        "warn",
        "left from a copy that never ended",
        "rm -r '/var/lib/edged/models/a b.part'",
        {"models": ModelsFolder(1, ignored=(("a b.part", 3 * 86400.0),))},
    ),
    ("note", "not looked at", "mv ", {"models": ModelsFolder(1, ignored=((".m.onnx", 60.0),))}),
    # the machine
    ("fail", "memory is available", "edgectl status", {"memory": Memory(8 * GIB, GIB // 10)}),
    ("warn", "memory is available", "edgectl status", {"memory": Memory(8 * GIB, GIB // 2)}),
    ("warn", "the control group uses", "MemoryMax", {"memory": Memory(None, None, GIB, GIB - 1)}),
    ("warn", "too little for a runtime", "MemoryMax", {"memory": Memory(None, None, 100 << 20, 0)}),
    ("warn", "killed 2 of edged's", "journalctl -k", {"memory": Memory(oom_kills=2)}),
    ("warn", "max_user_watches is 1024", "sysctl --system", {"inotify": Inotify(1024, 128)}),
    ("warn", "max_user_instances is 8", "max_user_instances=256", {"inotify": Inotify(65536, 8)}),
    ("warn", "the clock says 1970", "timedatectl", {"clock": Clock(1000.0)}),
    ("note", "nothing keeps it right", "timedatectl", {"clock": Clock(1_780_000_000.0, False)}),
    ("fail", "is at 97 °C", "edgectl top", {"heat": Heat(97.0, "soc")}),
    ("warn", "near its limit", "edgectl top", {"heat": Heat(88.0, "soc")}),
    ("warn", "near its limit", "edgectl top", {"heat": Heat(80.0, "soc", 90.0)}),
    ("warn", "too little voltage, throttling", "vcgencmd", {"heat": Heat(firmware=0b101)}),
    ("note", "saw too little voltage", "edgectl top", {"heat": Heat(firmware=0x10000)}),
    ("note", "throttled 12 times", "edgectl top", {"heat": Heat(throttle_count=12)}),
    ("warn", "slows the processor down", "edgectl top", {"heat": Heat(cooling_now=True)}),
    ("warn", "governor powersave", "scaling_governor", {"heat": Heat(governor="powersave")}),
]


@pytest.mark.parametrize(("level", "words", "fix", "changes"), CASES, ids=[case[1] for case in CASES])
def test_what_is_wrong_is_told_with_what_to_type(
    level: str, words: str, fix: str, changes: dict[str, Any]
) -> None:
    """One change of a healthy machine, one finding of that level, one command."""
    finding = found(level, words, **changes)
    assert fix in finding.fix
    assert worst([finding]) == level


def test_what_warns_or_fails_nearly_always_has_something_to_type() -> None:
    """Only a unit that is not there has no command: which package it comes in is the owner's choice."""
    for _, words, _, changes in CASES:
        for each in examine(replace(HEALTHY, **changes)):
            assert each.level in LEVELS
            if each.level in ("warn", "fail"):
                assert each.fix or "there is no unit" in each.text, (words, each)


def test_a_home_that_is_bound_into_the_service_is_no_fault() -> None:
    """That is what the fix asks for."""
    bound = unit(ProtectHome="yes", BindReadOnlyPaths="/home/ann/models:/home/ann/models:rbind")
    findings = examine(replace(HEALTHY, places=(place("models", "/home/ann/models"),), unit=bound))
    assert worst(findings) == "ok"


def test_intels_own_governor_is_no_fault() -> None:
    """With a p-state driver, powersave is the name of the mode that scales."""
    findings = examine(replace(HEALTHY, heat=Heat(governor="powersave", governor_driver="intel_pstate")))
    assert worst(findings) == "ok"


def test_ones_own_daemon_needs_no_groups_and_no_unit() -> None:
    """Somebody who tries edged out in his home is not told to make system users."""
    own = replace(
        HEALTHY,
        system=False,
        caller=CAMERA,
        service=CAMERA,
        service_name="camera",
        groups={},
        process=replace(HEALTHY.process, account=CAMERA, unit=""),
        unit=Unit("edged.service", {"LoadState": "not-found"}),
        places=(),
        sockets=tuple(
            Socket(
                f"{n}.sock",
                node(f"/run/user/1000/edged/{n}.sock", 0o600, "camera", "camera", 1000),
                "answers",
            )
            for n in ("edged", "admin", "events", "lease")
        ),
    )
    assert worst(examine(own)) == "note"


@pytest.mark.parametrize(
    ("mode", "who", "bits", "want"),
    [
        (0o600, Account("ann", 1, ()), 4, False),
        (0o640, Account("ann", 1, ("g",)), 4, True),
        (0o640, Account("ann", 1, ("g",)), 2, False),
        (0o604, Account("ann", 1, ("g",)), 4, False),
        (0o604, Account("ann", 1, ()), 4, True),
        (0o066, Account("own", 5, ("g",)), 4, False),
        (0o000, Account("root", 0, ()), 6, True),
    ],
)
def test_permission_bits_are_read_as_the_kernel_reads_them(
    mode: int, who: Account, bits: int, want: bool
) -> None:
    """The first class that fits decides, even when a later one would allow more."""
    assert may(Node("/x", mode, 5, "own", "g"), who, bits) is want


def test_facts_are_plain_data() -> None:
    """A support bundle carries them as JSON."""
    plain = dataclasses.asdict(replace(HEALTHY, devices=nvidia("libcuda.so.1")))
    assert json.loads(json.dumps(plain, default=sorted))["service_name"] == "edged"
