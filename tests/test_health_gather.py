"""Gathering: what is read from a machine's files, from systemd's words and from real sockets."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from edged.cli.health import machine
from edged.cli.health.checks import examine
from edged.cli.health.facts import Daemon, Facts
from edged.cli.health.gather import Asked, gather, process_of, run_command, unit_of
from edged.cli.health.root import Root
from tests import zoo

NOW_S = 1_780_000_000.0

UNIT = """\
Id=edged.service
LoadState=loaded
ActiveState=active
SubState=running
MainPID=77
User=edged
ExecStart={ path=/opt/edged/bin/edged ; argv[]=/opt/edged/bin/edged ; ignore_errors=no }
NRestarts=0
"""


class Box:
    """A directory that looks like a machine's root."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.commands: list[Sequence[str]] = []
        self.said: tuple[int, str] | None = (0, UNIT)
        self.write("etc/passwd", "root:x:0:0::/:/bin/sh\nedged:x:990:990::/:/bin/false\n#x\n")
        self.write(
            "etc/group",
            "root:x:0:\nedged:x:990:ann,bob\nedged-admin:x:991:edged\nrender:x:105:edged\nvideo:x:44:\n",
        )

    def write(self, path: str, text: str | bytes = "") -> Path:
        """A file with this text."""
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return file

    def process(self, pid: int, cgroup: str, groups: str = "990 105") -> None:
        """A process in /proc."""
        self.write(
            f"proc/{pid}/status",
            f"Name:\tedged\nUid:\t990\t990\t990\t990\nGid:\t990\t990\nGroups:\t{groups}\n",
        )
        self.write(f"proc/{pid}/cgroup", cgroup)
        self.write(
            f"proc/{pid}/limits",
            "Limit   Soft Limit   Hard Limit\nMax open files    1024    524288   files\n",
        )
        self.write(f"proc/{pid}/cmdline", b"/opt/edged/bin/python\0-m\0edged\0")

    def run(self, argv: Sequence[str]) -> tuple[int, str] | None:
        """Answers as systemctl would."""
        self.commands.append(argv)
        return self.said

    def facts(self, **asked: object) -> Facts:
        """What is gathered from it, asked by nobody in particular."""
        given = {"environ": {"HOME": "/home/ann"}, "uid": 1001, "gids": (990,), **asked}
        return gather(Asked(**given), root=Root(self.root), run=self.run, now_s=NOW_S)  # type: ignore[arg-type]


@pytest.fixture
def box(tmp_path: Path) -> Box:
    """A machine with the service's user and groups."""
    return Box(tmp_path)


def test_the_service_is_found_with_its_user_its_groups_and_its_directories(box: Box) -> None:
    """All from files and the unit's properties, though no daemon answers."""
    box.process(77, "0::/system.slice/edged.service\n")
    facts = box.facts()
    assert facts.system
    assert facts.service_name == "edged"
    assert facts.service is not None
    assert set(facts.service.groups) == {"edged", "edged-admin", "render"}
    assert facts.process is not None
    assert facts.process.unit == "edged.service"
    assert facts.process.open_files_max == 1024
    assert set(facts.process.account.groups) == {"edged", "render"}
    assert [each.path for each in facts.places] == [
        "/var/lib/edged/models",
        "/var/lib/edged",
        "/var/cache/edged",
        "/run/edged",
    ]
    assert facts.groups["edged"] == ("ann", "bob")
    assert facts.caller.groups == ("edged",)
    assert facts.config_file == "/etc/edged/edged.toml"


def test_a_setting_that_is_wrong_is_found_in_the_services_own_file(box: Box) -> None:
    """As the daemon would say it, with file and line."""
    box.write("etc/edged/edged.toml", "[server]\nmodls = '/x'\n")
    facts = box.facts()
    assert "line 2" in facts.config_error
    assert "modls" in facts.config_error
    box.write("etc/edged/edged.toml", "[store]\n[resources]\ndisk_free_min = '1GiB'\ntemperature_max = 70\n")
    facts = box.facts()
    assert (facts.config_error, facts.disk_free_min_bytes, facts.temperature_max_c) == ("", 1 << 30, 70.0)


def test_a_daemon_that_somebody_started_by_hand_is_not_the_service(box: Box) -> None:
    """Its control group is a session's; paths are the ones that it tells."""
    box.process(500, "0::/user.slice/user-1000.slice/session-3.scope\n")
    box.said = (0, "LoadState=not-found\n")
    status = {
        "pid": 500,
        "endpoint": "ipc:///tmp/x/edged.sock",
        "models_dir": "/m",
        "state_dir": "/s",
        "cache_dir": "/c",
    }
    facts = box.facts(daemon=Daemon(status))
    assert not facts.system
    assert [each.path for each in facts.places] == ["/m", "/s", "/c", "/tmp/x"]
    assert facts.service_name == "edged"


@pytest.mark.parametrize(
    ("cgroup", "unit", "user"),
    [
        ("0::/system.slice/edged.service\n", "edged.service", False),
        ("0::/system.slice/edged.service/supervisor\n", "edged.service", False),
        ("0::/system.slice/system-edged.slice/edged@two.service\n", "edged@two.service", False),
        ("0::/user.slice/user-1000.slice/user@1000.service/app.slice/edged.service\n", "edged.service", True),
        ("0::/user.slice/user-1000.slice/user@1000.service/app.slice/vte.scope\n", "", False),
        ("9:name=systemd:/system.slice/edged.service\n4:memory:/x\n0::/\n", "edged.service", False),
        ("0::/\n", "", False),
    ],
)
def test_the_unit_is_read_off_the_control_group(box: Box, cgroup: str, unit: str, user: bool) -> None:
    """Version 1, version 2, with groups below the unit's, a second instance, a user's own."""
    box.process(5, cgroup)
    process = process_of(Root(box.root), 5)
    assert process is not None
    assert (process.unit, process.user_unit) == (unit, user)


def test_a_process_that_is_gone_is_none(box: Box) -> None:
    """It may end while we look."""
    assert process_of(Root(box.root), 4242) is None


def test_a_second_instance_has_directories_of_its_own(box: Box) -> None:
    """They are the unit's, by the names that systemd tells."""
    box.said = (
        0,
        UNIT + "StateDirectory=edged/two\nRuntimeDirectory=edged-two\nCacheDirectory=edged/two\n"
        "ConfigurationDirectory=edged/two\n",
    )
    facts = box.facts(unit="edged@two.service")
    assert facts.system
    assert [each.path for each in facts.places] == [
        "/var/lib/edged/two/models",
        "/var/lib/edged/two",
        "/var/cache/edged/two",
        "/run/edged-two",
    ]
    assert facts.config_file == "/etc/edged/two/edged.toml"


@pytest.fixture
def listening(box: Box) -> Iterator[tuple[Box, Path]]:
    """A run directory with one socket that is listened on, one that was, and nothing else."""
    directory = box.root / "run/edged"
    directory.mkdir(parents=True)
    here = os.getcwd()
    os.chdir(directory)  # a socket's address is short, and pytest's paths are long
    try:
        live, dead = (socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(2))
        with live:
            with dead:
                dead.bind("admin.sock")
            live.bind("edged.sock")
            live.listen()
            yield box, directory
    finally:
        os.chdir(here)


def test_sockets_are_asked_and_tell_who_listens(listening: tuple[Box, Path]) -> None:
    """The kernel knows who answers, who once did, and the pid of who does."""
    box, directory = listening
    if len(str(directory)) > 90:
        pytest.skip("pytest's directory is too deep for a socket's address")
    facts = box.facts()
    assert {each.name: each.answer for each in facts.sockets} == {
        "edged.sock": "answers",
        "admin.sock": "refused",
        "events.sock": "absent",
        "lease.sock": "absent",
    }
    box.process(os.getpid(), "0::/system.slice/edged.service\n")
    process = box.facts().process
    assert process is not None
    assert process.pid == os.getpid()


def test_the_models_folder_is_looked_at_as_the_daemon_does(box: Box) -> None:
    """Refused entries, names that are never looked at with their age, files that not everybody may read."""
    folder = box.root / "var/lib/edged/models"
    folder.mkdir(parents=True)
    zoo.write(folder / "good.onnx", zoo.versioned(1))
    (folder / "good.onnx").chmod(0o640)
    box.write("var/lib/edged/models/empty.onnx")
    part = box.write("var/lib/edged/models/late.onnx.part", "x")
    os.utime(part, (NOW_S - 7200, NOW_S - 7200))
    box.write("var/lib/edged/models/.DS_Store", "x")
    models = box.facts().models
    assert models.entries == 2
    assert [(source, reason) for source, reason, _ in models.problems] == [("empty.onnx", "EMPTY_FILE")]
    assert models.ignored == (("late.onnx.part", 7200.0),)
    assert [node.path for node in models.files] == ["/var/lib/edged/models/good.onnx"]


def test_accelerators_are_found_where_the_kernel_shows_them(box: Box) -> None:
    """Nodes, the bus with its drivers, the linker's cache and its directories."""
    for name in ("dri/renderD128", "dri/card0", "nvidia0", "nvidiactl"):
        box.write(f"dev/{name}")
    box.write("dev/dri/by-path/pci-0")
    card = "sys/bus/pci/devices/0000:01:00.0"
    box.write(f"{card}/vendor", "0x10de\n")
    box.write(f"{card}/class", "0x030000\n")
    (box.root / card / "driver").symlink_to("../../../bus/pci/drivers/nvidia")
    box.write("sys/bus/pci/devices/0000:02:00.0/class", "0x020000\n")
    box.write("sys/class/drm/renderD128/device/vendor", "0x8086\n")
    box.write("etc/ld.so.cache", b"glibc-ld.so.cache1.1\0libcuda.so.1\0/usr/lib/libcuda.so.1\0")
    box.write("usr/lib/x86_64-linux-gnu/libOpenCL.so.1")
    box.write("etc/OpenCL/vendors/intel.icd", "libigdrcl.so\n")
    box.write(
        "proc/driver/nvidia/version", "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu Jan\n"
    )
    seen = machine.devices(Root(box.root))
    assert [node.path for node in seen.nodes] == [
        "/dev/dri/card0",
        "/dev/dri/renderD128",
        "/dev/nvidia0",
        "/dev/nvidiactl",
    ]
    assert [(each.vendor, each.driver) for each in seen.pci] == [("0x10de", "nvidia")]
    assert seen.renderers == {"renderD128": "0x8086"}
    assert seen.libraries == {"libcuda.so.1", "libOpenCL.so.1"}
    assert seen.opencl_vendors == ("libigdrcl.so",)
    assert seen.nvidia_driver == "570.86.15"


def test_memory_is_the_machines_and_the_tightest_groups(box: Box) -> None:
    """An ancestor's limit counts when it leaves less room."""
    box.write("proc/meminfo", "MemTotal: 8388608 kB\nMemFree: 1 kB\nMemAvailable: 4194304 kB\n")
    box.write("sys/fs/cgroup/system.slice/edged.service/memory.max", "max\n")
    box.write("sys/fs/cgroup/system.slice/edged.service/memory.current", "1000\n")
    box.write("sys/fs/cgroup/system.slice/edged.service/memory.events", "low 0\noom_kill 3\n")
    box.write("sys/fs/cgroup/system.slice/memory.max", "5000\n")
    box.write("sys/fs/cgroup/system.slice/memory.current", "4000\n")
    seen = machine.memory(Root(box.root), "/system.slice/edged.service")
    assert (seen.total_bytes, seen.available_bytes) == (8 << 30, 4 << 30)
    assert (seen.group_limit_bytes, seen.group_used_bytes, seen.oom_kills) == (5000, 4000, 3)


def test_heat_is_that_of_the_hottest_sensor_that_is_sane(box: Box) -> None:
    """A broken sensor's absurdity is no heat; the firmware's word is hexadecimal."""
    for number, (kind, milli) in enumerate(
        [("acpitz", "27800"), ("x86_pkg_temp", "61000"), ("bad", "65535000")]
    ):
        box.write(f"sys/class/thermal/thermal_zone{number}/type", kind)
        box.write(f"sys/class/thermal/thermal_zone{number}/temp", milli)
    box.write("sys/class/thermal/thermal_zone1/trip_point_0_type", "critical")
    box.write("sys/class/thermal/thermal_zone1/trip_point_0_temp", "100000")
    box.write("sys/devices/platform/soc/soc:firmware/get_throttled", "50005\n")
    for core in range(2):
        box.write(f"sys/devices/system/cpu/cpu{core}/thermal_throttle/core_throttle_count", "7\n")
    seen = machine.heat(Root(box.root))
    assert (seen.hottest_c, seen.hottest, seen.critical_c) == (61.0, "x86_pkg_temp", 100.0)
    assert (seen.throttle_count, seen.firmware) == (14, 0x50005)


def test_packages_are_found_beside_the_daemons_interpreter(box: Box) -> None:
    """The runtime that the service uses is not the one of who asks."""
    site = "opt/edged/lib/python3.11/site-packages"
    for name in ("onnxruntime_gpu-1.31.1", "nvidia_cudnn_cu12-9.1", "something_else-1.0"):
        plain, _, version = name.rpartition("-")
        box.write(
            f"{site}/{name}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {plain}\nVersion: {version}\n"
        )
    box.process(77, "0::/system.slice/edged.service\n")
    found = {(each.name, each.version): each.directory for each in box.facts().packages}
    assert found == {("onnxruntime-gpu", "1.31.1"): f"/{site}", ("nvidia-cudnn-cu12", "9.1"): f"/{site}"}


def test_an_empty_machine_gives_facts_and_findings_all_the_same(tmp_path: Path) -> None:
    """Nothing of what is read may be taken for granted."""
    box = Box(tmp_path)
    for name in ("passwd", "group"):
        (tmp_path / "etc" / name).unlink()
    box.said = None
    facts = box.facts()
    assert facts.unit.error
    assert facts.service is None
    assert examine(facts)


def test_systemds_refusal_is_an_error_and_no_unit(box: Box) -> None:
    """In a container systemctl is there and says that it can do nothing."""
    box.said = (1, "System has not been booted with systemd as init system (PID 1).\n")
    unit = unit_of(box.run, "edged.service")
    assert "not been booted" in unit.error
    assert not unit.known
    box.said = None
    assert unit_of(box.run, "edged.service").error


def test_a_command_that_is_not_there_or_hangs_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """The doctor goes on without it."""
    assert run_command(["no-such-command-anywhere"]) is None
    assert run_command(["sh", "-c", "echo out; echo err >&2; exit 3"]) == (3, "out\nerr\n")
    assert run_command(["echo", "fine"]) == (0, "fine\n")
    monkeypatch.setattr("edged.cli.health.gather._COMMAND_S_MAX", 0.05)
    assert run_command(["sleep", "60"]) is None


def test_the_clock_is_asked_and_not_changed() -> None:
    """Of this very machine."""
    seen = machine.clock(NOW_S)
    assert seen.now_s == NOW_S
    assert seen.synchronised in (True, False, None)
