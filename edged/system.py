"""The seam to the machine: what it has left, how many CPUs are ours, and systemd's notifications.

`Sampler` reads /proc, /sys, the control groups and psutil, and judges nothing (`edged.resources` does).
It runs on the main loop, so it must stay under a millisecond: files are found once, kept open and read
with `pread`, and whatever cannot be read is None. psutil knows nothing of control groups and pressure
(PSI); those are read here, for cgroup v2 and v1, with every ancestor counted, since the tightest one rules.

`Notifier` speaks sd_notify(3) itself, since it is one datagram and must also work where systemd-python
is not installed.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import psutil

from edged.resources import Sample, WorkerSample

__all__ = ["Notifier", "Roots", "Sampler", "available_cpus", "memory_limit_bytes", "pressure_files"]

#: No file that we read is longer; memory.stat is about 1.5 kB.
_READ_BYTES_MAX: Final = 16384
#: cgroup v1 says "no limit" with the largest multiple of a page below 2^63.
_UNLIMITED_BYTES: Final = 1 << 60
#: Depth at which we stop looking for ancestors; systemd's user sessions are seven deep.
_ANCESTORS_MAX: Final = 32
#: Sensors beyond these are not read, so that a board with a hundred of them does not slow the loop.
_THERMAL_ZONES_MAX: Final = 32
#: A broken sensor reports absurdities such as -273 or 65535.
_PLAUSIBLE_C: Final = (-40.0, 150.0)
#: Longest text for `systemctl status`; it shows one line.
_STATUS_CHARS_MAX: Final = 256
#: READY and STOPPING must arrive; systemd reads within microseconds unless the machine is on its knees.
_NOTIFY_TIMEOUT_S: Final = 0.5


@dataclass(frozen=True, slots=True)
class Roots:
    """Where the kernel's file systems are; tests point it at a directory of their own."""

    proc: Path = Path("/proc")
    sys: Path = Path("/sys")

    @property
    def cgroup(self) -> Path:
        return self.sys / "fs" / "cgroup"


class _File:
    """A file of /proc or /sys that is kept open; it reads anew from the start each time."""

    def __init__(self, path: Path) -> None:
        self._fd = -1
        with contextlib.suppress(OSError):
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self) -> str | None:
        if self._fd < 0:
            return None
        try:
            return os.pread(self._fd, _READ_BYTES_MAX, 0).decode("ascii", "replace")
        except OSError:
            # PSI that is switched off, a sensor that sleeps, a control group that is gone.
            return None

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


@dataclass(frozen=True, slots=True)
class _MemoryGroup:
    """The memory files of one control group; `inactive_key` names the pages that can be dropped."""

    limits: tuple[_File, ...]
    current: _File
    stat: _File
    inactive_key: str

    def limit_bytes(self) -> int | None:
        values = [_bytes_or_none(file.read()) for file in self.limits]
        return min((value for value in values if value is not None), default=None)

    def current_bytes(self) -> int | None:
        used = _bytes_or_none(self.current.read())
        if used is None:
            return None
        inactive = _keyed(self.stat.read(), self.inactive_key)
        return max(0, used - (inactive or 0))

    def close(self) -> None:
        for file in (*self.limits, self.current, self.stat):
            file.close()


class Sampler:
    """Takes a `Sample` of the machine and of the worker processes. A context manager; one thread only."""

    def __init__(self, state_dir: Path, *, roots: Roots | None = None) -> None:
        roots = Roots() if roots is None else roots
        self._state_dir = state_dir
        self._groups = _memory_groups(roots)
        own = _controller_dirs(roots, "memory")[:1]
        self._pressures = [_File(roots.proc / "pressure" / "memory")]
        self._pressures += [_File(path / "memory.pressure") for path in own]
        zones = sorted(roots.sys.glob("class/thermal/thermal_zone*/temp"))
        self._zones = [_File(path) for path in zones[:_THERMAL_ZONES_MAX]]
        self._throttle = _Throttle(roots)
        self._cpus = available_cpus(roots=roots)
        self._self = psutil.Process()
        self._workers: dict[int, psutil.Process] = {}
        psutil.cpu_percent(None)  # the first call only sets the mark that later ones measure from

    def sample(self, worker_pids: Iterable[int] = ()) -> Sample:
        """The machine now. A worker that has just ended is left out."""
        memory = psutil.virtual_memory()
        limit, current = self._tightest_group()
        some, full = self._pressure()
        return Sample(
            memory_total_bytes=memory.total,
            memory_available_bytes=memory.available,
            cgroup_limit_bytes=limit,
            cgroup_current_bytes=current,
            psi_some_avg10=some,
            psi_full_avg10=full,
            cpu_percent=psutil.cpu_percent(None),
            load1=os.getloadavg()[0],
            cpus=self._cpus,
            temperature_c=self._temperature_c(),
            throttled=self._throttle.read(),
            disk_free_bytes=_disk_free_bytes(self._state_dir),
            supervisor_rss_bytes=self._self.memory_info().rss,
            workers=self._worker_samples(worker_pids),
        )

    def close(self) -> None:
        """Close the files that were kept open."""
        for group in self._groups:
            group.close()
        for file in (*self._pressures, *self._zones):
            file.close()
        self._throttle.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _tightest_group(self) -> tuple[int | None, int | None]:
        """Limit and use of the ancestor with the least room."""
        rooms = []
        for group in self._groups:
            limit = group.limit_bytes()
            if limit is None:
                continue
            current = group.current_bytes()
            if current is not None:
                rooms.append((limit - current, limit, current))
        if not rooms:
            return None, None
        _, limit, current = min(rooms)
        return limit, current

    def _pressure(self) -> tuple[float | None, float | None]:
        """The worse of the machine's and our own control group's, as (some, full)."""
        texts = [text for file in self._pressures if (text := file.read()) is not None]
        some = max((v for text in texts if (v := _avg10(text, "some")) is not None), default=None)
        full = max((v for text in texts if (v := _avg10(text, "full")) is not None), default=None)
        return some, full

    def _temperature_c(self) -> float | None:
        texts = (file.read() for file in self._zones)
        degrees = [value / 1000 for text in texts if (value := _int_or_none(text)) is not None]
        low, high = _PLAUSIBLE_C
        return max((value for value in degrees if low <= value <= high), default=None)

    def _worker_samples(self, pids: Iterable[int]) -> tuple[WorkerSample, ...]:
        alive: dict[int, psutil.Process] = {}
        samples = []
        for pid in pids:
            # NoSuchProcess, or ZombieProcess until it is reaped.
            with contextlib.suppress(psutil.Error):
                process = self._workers.get(pid) or psutil.Process(pid)
                samples.append(WorkerSample(pid, process.memory_info().rss))
                alive[pid] = process
        self._workers = alive
        return tuple(samples)


class _Throttle:
    """Whether the processors are being slowed down; None where nothing tells.

    x86 counts events per core (thermal_throttle/), so a higher count than last time is "now". A
    Raspberry Pi's firmware has a bit for each cause, 0 to 3 being "now". Elsewhere the kernel's cooling
    devices of a cpufreq kind have a state above zero.
    """

    def __init__(self, roots: Roots) -> None:
        cpus = roots.sys / "devices" / "system" / "cpu"
        self._counts = [
            _File(path) for path in sorted(cpus.glob("cpu[0-9]*/thermal_throttle/core_throttle_count"))
        ]
        self._bits = [_File(path) for path in roots.sys.glob("devices/platform/soc/*firmware/get_throttled")]
        self._states = [
            _File(path / "cur_state")
            for path in sorted(roots.sys.glob("class/thermal/cooling_device*"))
            if "cpufreq" in _text(path / "type")
        ]
        self._total: int | None = None

    def read(self) -> bool | None:
        if self._bits:
            return bool((_int_or_none(self._bits[0].read(), base=16) or 0) & 0xF)
        if self._counts:
            before, self._total = self._total, sum(_int_or_none(file.read()) or 0 for file in self._counts)
            return before is not None and self._total > before
        if self._states:
            return any((_int_or_none(file.read()) or 0) > 0 for file in self._states)
        return None

    def close(self) -> None:
        for file in (*self._counts, *self._bits, *self._states):
            file.close()


def available_cpus(*, roots: Roots | None = None) -> int:
    """How many CPUs this process may really use: its affinity, bounded by every ancestor's quota.

    A quota of 2.5 CPUs counts as 2: a third thread would be stopped for most of each period, and the
    other two wait for it. At least 1.
    """
    roots = Roots() if roots is None else roots
    quotas = [quota for path in _controller_dirs(roots, "cpu") if (quota := _cpu_quota(path)) is not None]
    return max(1, math.floor(min([float(len(os.sched_getaffinity(0))), *quotas])))


def memory_limit_bytes(configured: int | float, *, roots: Roots | None = None) -> int:
    """What edged's processes may use together.

    `configured` is in bytes (int), or a share (float) of what there is: the machine's memory, or less
    where a control group allows less. Never more than there is.
    """
    groups = _memory_groups(Roots() if roots is None else roots)
    limits = [limit for group in groups if (limit := group.limit_bytes()) is not None]
    for group in groups:
        group.close()
    total_bytes: int = psutil.virtual_memory().total
    there_is = min([total_bytes, *limits])
    wanted = int(there_is * configured) if isinstance(configured, float) else configured
    return min(wanted, there_is)


def pressure_files(*, roots: Roots | None = None) -> list[Path]:
    """Where memory pressure is told, the nearest first: our own control group, then the machine."""
    roots = Roots() if roots is None else roots
    own = _controller_dirs(roots, "memory")[:1]
    return [*(path / "memory.pressure" for path in own), roots.proc / "pressure" / "memory"]


def _controller_dirs(roots: Roots, controller: str) -> list[Path]:
    """Our control group of `controller` and its ancestors, ours first.

    In a container the path in /proc/self/cgroup may be one of the host's that is not mounted here; then
    what is mounted as the root is our own.
    """
    for line in _text(roots.proc / "self" / "cgroup").splitlines():
        _, names, path = line.split(":", 2)
        if controller in names.split(","):
            return _existing_ancestors(roots.cgroup / controller, path)
    for line in _text(roots.proc / "self" / "cgroup").splitlines():
        if line.startswith("0::"):
            hybrid = roots.cgroup / "unified"
            return _existing_ancestors(hybrid if hybrid.is_dir() else roots.cgroup, line[3:])
    return []


def _existing_ancestors(root: Path, path: str) -> list[Path]:
    parts = [part for part in path.split("/") if part not in ("", "..")][:_ANCESTORS_MAX]
    candidates = [root.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]
    return [candidate for candidate in candidates if candidate.is_dir()]


def _memory_groups(roots: Roots) -> list[_MemoryGroup]:
    return list(_iter_memory_groups(_controller_dirs(roots, "memory")))


def _iter_memory_groups(paths: Iterable[Path]) -> Iterator[_MemoryGroup]:
    for path in paths:
        stat = _File(path / "memory.stat")
        if (path / "memory.max").exists():
            bounds = (_File(path / "memory.max"), _File(path / "memory.high"))
            yield _MemoryGroup(bounds, _File(path / "memory.current"), stat, "inactive_file")
        elif (path / "memory.limit_in_bytes").exists():
            bound = _File(path / "memory.limit_in_bytes")
            current = _File(path / "memory.usage_in_bytes")
            yield _MemoryGroup((bound,), current, stat, "total_inactive_file")
        else:
            stat.close()


def _cpu_quota(path: Path) -> float | None:
    """The quota in CPUs of one control group, v2 (`cpu.max`) or v1; None when it has none."""
    quota, _, period = _text(path / "cpu.max").strip().partition(" ")
    if not quota:
        quota, period = _text(path / "cpu.cfs_quota_us"), _text(path / "cpu.cfs_period_us")
    quota_us, period_us = _int_or_none(quota), _int_or_none(period)
    if quota_us is None or quota_us <= 0 or not period_us:
        return None
    return quota_us / period_us


def _text(path: Path) -> str:
    try:
        return path.read_text("ascii", "replace")
    except OSError:
        return ""


def _int_or_none(text: str | None, *, base: int = 10) -> int | None:
    try:
        return int((text or "").strip(), base)
    except ValueError:
        return None


def _bytes_or_none(text: str | None) -> int | None:
    """A number of bytes; None for "max", for v1's way of saying it, and for what is no number."""
    value = _int_or_none(text)
    return None if value is None or value >= _UNLIMITED_BYTES else value


def _keyed(text: str | None, key: str) -> int | None:
    """The value of `key` in a file of "key value" lines."""
    for line in (text or "").splitlines():
        name, _, value = line.partition(" ")
        if name == key:
            return _int_or_none(value)
    return None


def _avg10(text: str, kind: str) -> float | None:
    """PSI's avg10 in percent, from `some avg10=0.00 avg60=0.00 avg300=0.00 total=0`."""
    for line in text.splitlines():
        if line.startswith(f"{kind} avg10="):
            with contextlib.suppress(ValueError):
                return float(line.split(" ", 2)[1].removeprefix("avg10="))
    return None


def _disk_free_bytes(path: Path) -> int | None:
    try:
        stat = os.statvfs(path)
    except OSError:
        return None
    return stat.f_bavail * stat.f_frsize


class Notifier:
    """Tells systemd how the daemon is doing (sd_notify(3)); does nothing when systemd did not ask.

    Each method returns whether the message was handed over. `watchdog_interval_s` is how often
    `watchdog` is to be called, half of WatchdogSec, or None when no watchdog waits for this process.
    """

    def __init__(self, environ: Mapping[str, str] | None = None) -> None:
        environ = os.environ if environ is None else environ
        self.watchdog_interval_s: Final = _watchdog_interval_s(environ)
        self._address = _notify_address(environ.get("NOTIFY_SOCKET", ""))
        self._socket: socket.socket | None = None
        if self._address is not None:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)

    @property
    def active(self) -> bool:
        """Whether somebody listens."""
        return self._socket is not None

    def ready(self, status: str = "") -> bool:
        """The daemon serves; also ends a reload."""
        return self._send(_lines("READY=1", status), timeout_s=_NOTIFY_TIMEOUT_S)

    def status(self, text: str) -> bool:
        """The line that `systemctl status` shows."""
        return self._send(_lines("", text), timeout_s=0.0)

    def reloading(self, status: str = "") -> bool:
        """A reload begins; `ready` ends it. systemd tells reloads apart by the monotonic time."""
        now_us = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        return self._send(
            _lines(f"RELOADING=1\nMONOTONIC_USEC={now_us}", status), timeout_s=_NOTIFY_TIMEOUT_S
        )

    def starting(self, status: str, *, longer_s: float) -> bool:
        """The start goes on, and may take so much longer, whatever TimeoutStartSec says."""
        return self._send(_lines(_extend(longer_s), status), timeout_s=0.0)

    def stopping(self, status: str = "", *, longer_s: float = 0.0) -> bool:
        """The daemon has begun to stop, and may take so long, whatever TimeoutStopSec says."""
        state = f"STOPPING=1\n{_extend(longer_s)}" if longer_s else "STOPPING=1"
        return self._send(_lines(state, status), timeout_s=_NOTIFY_TIMEOUT_S)

    def watchdog(self) -> bool:
        """The main loop has made progress. Never call it from anywhere else."""
        return self._send("WATCHDOG=1", timeout_s=0.0)

    def close(self) -> None:
        """Close the socket; later calls do nothing."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _send(self, message: str, *, timeout_s: float) -> bool:
        if self._socket is None or self._address is None:
            return False
        try:
            self._socket.settimeout(timeout_s)
            self._socket.sendto(message.encode("utf-8", "replace"), self._address)
        except OSError:
            # Nobody reads, or not fast enough: the daemon goes on, and systemd's own time limits judge.
            return False
        return True


def _notify_address(value: str) -> str | None:
    """The socket's address; a leading @ stands for the abstract namespace."""
    if value.startswith("@"):
        return "\0" + value[1:]
    return value if value.startswith("/") else None


def _watchdog_interval_s(environ: Mapping[str, str]) -> float | None:
    """Half of the time systemd waits (sd_watchdog_enabled(3)), if it waits for this very process."""
    wait_us = _int_or_none(environ.get("WATCHDOG_USEC"))
    if not wait_us or wait_us < 0:
        return None
    if environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    return wait_us / 2e6


def _extend(longer_s: float) -> str:
    return f"EXTEND_TIMEOUT_USEC={round(longer_s * 1e6)}"


def _lines(state: str, status: str) -> str:
    """State and status as one message; the status keeps to its one line."""
    words = " ".join(status.split())
    if len(words) > _STATUS_CHARS_MAX:
        words = words[: _STATUS_CHARS_MAX - 1] + "…"
    return "\n".join(part for part in (state, f"STATUS={words}" if words else "") if part)
