"""The seam to the machine: real /proc, control groups laid out in a directory, real notify sockets."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edged.system import Notifier, Roots, Sampler, available_cpus, memory_limit_bytes

MIB = 1 << 20


def put(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def roots(tmp_path: Path) -> Roots:
    """An empty machine: no groups, no pressure, no sensors."""
    return Roots(proc=tmp_path / "proc", sys=tmp_path / "sys")


def make_v2(roots: Roots) -> None:
    """A service in a slice: the slice's memory.max is the tighter one, the service's quota is."""
    put(roots.proc, {"self/cgroup": "0::/system.slice/edged.service\n"})
    put(
        roots.cgroup,
        {
            "cgroup.controllers": "cpu memory\n",
            "system.slice/memory.max": f"{1000 * MIB}\n",
            "system.slice/memory.high": "max\n",
            "system.slice/memory.current": f"{700 * MIB}\n",
            "system.slice/memory.stat": f"anon 1\ninactive_file {100 * MIB}\nactive_file 5\n",
            "system.slice/cpu.max": "max 100000\n",
            "system.slice/edged.service/memory.max": f"{900 * MIB}\n",
            "system.slice/edged.service/memory.high": f"{800 * MIB}\n",
            "system.slice/edged.service/memory.current": f"{50 * MIB}\n",
            "system.slice/edged.service/memory.stat": "inactive_file 0\n",
            "system.slice/edged.service/memory.pressure": "some avg10=12.50 avg60=0.00 avg300=0.00 total=9\n"
            "full avg10=3.25 avg60=0.00 avg300=0.00 total=4\n",
            "system.slice/edged.service/cpu.max": "150000 100000\n",
        },
    )


def make_v1(roots: Roots) -> None:
    """A container on a v1 host whose own path is not mounted here: the mounted root is its own group."""
    put(
        roots.proc,
        {"self/cgroup": "4:memory:/docker/abc\n2:cpu,cpuacct:/docker/abc\n1:name=systemd:/\n0::/\n"},
    )
    put(
        roots.cgroup,
        {
            "memory/memory.limit_in_bytes": f"{512 * MIB}\n",
            "memory/memory.usage_in_bytes": f"{300 * MIB}\n",
            "memory/memory.stat": f"inactive_file 1\ntotal_inactive_file {100 * MIB}\n",
            "cpu/cpu.cfs_quota_us": "50000\n",
            "cpu/cpu.cfs_period_us": "100000\n",
        },
    )


def test_a_real_sample_of_this_machine(tmp_path: Path) -> None:
    """The figures of the machine we run on are plausible, and a worker that is gone is left out."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert child.stdin is not None
    with Sampler(tmp_path) as sampler:
        first = sampler.sample([child.pid])
        child.communicate(b"\n", timeout=30)
        second = sampler.sample([child.pid])
    assert 0 < first.memory_available_bytes <= first.memory_total_bytes
    assert first.supervisor_rss_bytes > MIB
    assert [worker.pid for worker in first.workers] == [child.pid]
    assert first.workers[0].rss_bytes > 0
    assert second.workers == ()
    assert first.disk_free_bytes is not None
    assert first.cpus == available_cpus() <= (os.cpu_count() or 1)
    assert 0.0 <= second.cpu_percent <= 100.0


def test_a_sample_takes_less_than_a_millisecond(tmp_path: Path) -> None:
    """It runs on the main loop once a second; a quartile of many, so that a busy machine does not judge."""
    with Sampler(tmp_path) as sampler:
        pids = [os.getpid()] * 10
        times = []
        for _ in range(100):
            begin = time.perf_counter()
            sampler.sample(pids)
            times.append(time.perf_counter() - begin)
    assert sorted(times)[25] < 0.001


def test_sampling_holds_no_more_descriptors_than_at_first(tmp_path: Path, roots: Roots) -> None:
    """Files are opened once, and closed with the sampler."""
    make_v2(roots)
    before = len(os.listdir("/proc/self/fd"))
    with Sampler(tmp_path, roots=roots) as sampler:
        sampler.sample()
        held = len(os.listdir("/proc/self/fd"))
        for _ in range(10):
            sampler.sample()
        assert len(os.listdir("/proc/self/fd")) == held
    assert len(os.listdir("/proc/self/fd")) == before


def test_cgroup_v2_the_tightest_ancestor_rules(tmp_path: Path, roots: Roots) -> None:
    """The group with the least room is told of, without the file pages that can be dropped."""
    make_v2(roots)
    with Sampler(tmp_path, roots=roots) as sampler:
        sample = sampler.sample()
        assert (sample.cgroup_limit_bytes, sample.cgroup_current_bytes) == (1000 * MIB, 600 * MIB)
        put(roots.cgroup, {"system.slice/edged.service/memory.current": f"{780 * MIB}\n"})
        sample = sampler.sample()
        assert (sample.cgroup_limit_bytes, sample.cgroup_current_bytes) == (800 * MIB, 780 * MIB)


def test_cgroup_v1_in_a_container(tmp_path: Path, roots: Roots) -> None:
    """Where the host's path is not mounted, the mounted root counts."""
    make_v1(roots)
    with Sampler(tmp_path, roots=roots) as sampler:
        sample = sampler.sample()
    assert (sample.cgroup_limit_bytes, sample.cgroup_current_bytes) == (512 * MIB, 200 * MIB)
    assert available_cpus(roots=roots) == 1


def test_no_limit_is_none_in_both_versions(tmp_path: Path, roots: Roots) -> None:
    """ "max", and v1's huge number, are no limits."""
    put(roots.proc, {"self/cgroup": "4:memory:/\n"})
    put(
        roots.cgroup,
        {"memory/memory.limit_in_bytes": "9223372036854771712\n", "memory/memory.usage_in_bytes": "1\n"},
    )
    with Sampler(tmp_path, roots=roots) as sampler:
        assert sampler.sample().cgroup_limit_bytes is None


def test_pressure_is_the_worse_of_machine_and_group(tmp_path: Path, roots: Roots) -> None:
    """PSI of the machine and of our own group, some and full each on its own."""
    make_v2(roots)
    put(
        roots.proc,
        {
            "pressure/memory": "some avg10=2.00 avg60=0.00 avg300=0.00 total=9\n"
            "full avg10=4.00 avg60=0.00 avg300=0.00 total=4\n"
        },
    )
    with Sampler(tmp_path, roots=roots) as sampler:
        sample = sampler.sample()
    assert (sample.psi_some_avg10, sample.psi_full_avg10) == (12.5, 4.0)


def test_what_a_machine_does_not_tell_is_none(tmp_path: Path, roots: Roots) -> None:
    """No groups, no PSI, no sensors, no state directory: None each, and no exception."""
    with Sampler(tmp_path / "gone", roots=roots) as sampler:
        sample = sampler.sample()
    assert sample.cgroup_limit_bytes is None
    assert sample.psi_some_avg10 is None
    assert sample.temperature_c is None
    assert sample.throttled is None
    assert sample.disk_free_bytes is None


def test_the_hottest_plausible_sensor_counts(tmp_path: Path, roots: Roots) -> None:
    """Broken sensors and empty files are passed over."""
    zones = {"0": "45000\n", "1": "61500\n", "2": "-274000\n", "3": "6553500\n", "4": ""}
    put(roots.sys, {f"class/thermal/thermal_zone{zone}/temp": text for zone, text in zones.items()})
    with Sampler(tmp_path, roots=roots) as sampler:
        assert sampler.sample().temperature_c == 61.5


def test_throttling_on_x86_is_a_count_that_grew(tmp_path: Path, roots: Roots) -> None:
    """Events from before the daemon's start are not "now"."""
    name = "devices/system/cpu/cpu0/thermal_throttle/core_throttle_count"
    put(roots.sys, {name: "7\n"})
    with Sampler(tmp_path, roots=roots) as sampler:
        assert sampler.sample().throttled is False
        put(roots.sys, {name: "9\n"})
        assert sampler.sample().throttled is True
        assert sampler.sample().throttled is False


@pytest.mark.parametrize(
    ("files", "throttled"),
    [
        ({"devices/platform/soc/soc:firmware/get_throttled": "50005\n"}, True),
        ({"devices/platform/soc/soc:firmware/get_throttled": "50000\n"}, False),
        (
            {
                "class/thermal/cooling_device0/type": "thermal-cpufreq-0\n",
                "class/thermal/cooling_device0/cur_state": "2\n",
            },
            True,
        ),
        (
            {
                "class/thermal/cooling_device0/type": "pwm-fan\n",
                "class/thermal/cooling_device0/cur_state": "2\n",
            },
            None,
        ),
    ],
)
def test_throttling_on_boards(
    tmp_path: Path, roots: Roots, files: dict[str, str], throttled: bool | None
) -> None:
    """A Raspberry Pi's bits for "now", and cpufreq cooling elsewhere; a fan that turns is no throttling."""
    put(roots.sys, files)
    with Sampler(tmp_path, roots=roots) as sampler:
        assert sampler.sample().throttled is throttled


def test_cpus_are_bounded_by_quota_and_affinity(roots: Roots) -> None:
    """A quota of one and a half CPUs is one; no quota leaves the affinity; at least one always."""
    assert available_cpus(roots=roots) == len(os.sched_getaffinity(0))
    make_v2(roots)
    assert available_cpus(roots=roots) == 1
    put(roots.cgroup, {"system.slice/edged.service/cpu.max": "10000 100000\n"})
    assert available_cpus(roots=roots) == 1
    put(roots.cgroup, {"system.slice/edged.service/cpu.max": "nonsense\n"})
    assert available_cpus(roots=roots) == len(os.sched_getaffinity(0))


def test_the_memory_limit_is_a_share_of_what_there_is(roots: Roots) -> None:
    """A share of the tightest group, bytes as they are, and never more than there is."""
    make_v2(roots)
    assert memory_limit_bytes(0.5, roots=roots) == 400 * MIB
    assert memory_limit_bytes(100 * MIB, roots=roots) == 100 * MIB
    assert memory_limit_bytes(1 << 50, roots=roots) == 800 * MIB


@pytest.fixture(params=["path", "abstract"])
def listener(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[socket.socket]:
    """systemd's end: a datagram socket, as a file and in the abstract namespace."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.settimeout(30)
        server.bind(
            f"\0edged-test-{os.getpid()}" if request.param == "abstract" else str(tmp_path / "notify")
        )
        yield server


def environment(listener: socket.socket) -> dict[str, str]:
    name = listener.getsockname()
    return {"NOTIFY_SOCKET": name if isinstance(name, str) else "@" + name[1:].decode()}


def test_systemd_is_told_each_state(listener: socket.socket) -> None:
    """Every message arrives as sd_notify(3) writes it; a status keeps to one line."""
    with Notifier(environment(listener)) as notify:
        assert notify.active
        assert notify.ready("serving 3 models")
        assert listener.recv(4096) == b"READY=1\nSTATUS=serving 3 models"
        assert notify.status("two\nlines\nREADY=1")
        assert listener.recv(4096) == b"STATUS=two lines READY=1"
        assert notify.status("x" * 1000)
        assert len(listener.recv(4096).decode()) == len("STATUS=") + 256
        before_us = time.monotonic_ns() // 1000
        assert notify.reloading()
        first, _, second = listener.recv(4096).decode().partition("\n")
        assert first == "RELOADING=1"
        assert before_us <= int(second.removeprefix("MONOTONIC_USEC=")) <= time.monotonic_ns() // 1000
        assert notify.watchdog()
        assert listener.recv(4096) == b"WATCHDOG=1"
        assert notify.stopping("draining")
        assert listener.recv(4096) == b"STOPPING=1\nSTATUS=draining"
        assert notify.stopping("draining", longer_s=15)
        assert listener.recv(4096) == b"STOPPING=1\nEXTEND_TIMEOUT_USEC=15000000\nSTATUS=draining"
        assert notify.starting("1 loading", longer_s=30)
        assert listener.recv(4096) == b"EXTEND_TIMEOUT_USEC=30000000\nSTATUS=1 loading"
    assert not notify.ready()


def test_nobody_who_reads_blocks_nothing(tmp_path: Path) -> None:
    """A full socket, and one that is gone, are answered with False at once."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(str(tmp_path / "notify"))
        with Notifier({"NOTIFY_SOCKET": str(tmp_path / "notify")}) as notify:
            assert any(not notify.watchdog() for _ in range(100_000))
    with Notifier({"NOTIFY_SOCKET": str(tmp_path / "gone")}) as notify:
        assert not notify.ready()


@pytest.mark.parametrize("environ", [{}, {"NOTIFY_SOCKET": ""}, {"NOTIFY_SOCKET": "vsock:2:1234"}])
def test_without_systemd_nothing_is_said(environ: dict[str, str]) -> None:
    """No variable, or a kind of address that is not ours: every method does nothing."""
    with Notifier(environ) as notify:
        assert not notify.active
        assert not notify.ready("x")
        assert not notify.watchdog()


@pytest.mark.parametrize(
    ("environ", "interval_s"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_the_watchdog_interval_is_half_of_systemds(environ: dict[str, str], interval_s: float | None) -> None:
    """Only when it waits for this very process."""
    assert Notifier(environ).watchdog_interval_s == interval_s
