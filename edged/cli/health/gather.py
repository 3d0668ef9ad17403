"""Gathers the facts: whose daemon this is, where it lives, what it says, and what the machine is.

Owns the order in which things are found out; looks at files below a `Root`, asks systemd through the one
function it is given, and connects to the sockets. It starts nothing, changes nothing and opens no device.
"""

from __future__ import annotations

import errno
import os
import re
import socket as unix
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edged.cli.health import machine
from edged.cli.health.facts import (
    Account,
    Daemon,
    Facts,
    ModelsFolder,
    Node,
    Place,
    Process,
    Socket,
    Unit,
)
from edged.cli.health.root import Root, whole
from edged.config import Config, ConfigError, load_config
from edged.repository import IGNORED_SUFFIXES, scan
from edged.version import __version__

__all__ = [
    "SOCKETS",
    "Asked",
    "Found",
    "Run",
    "find",
    "gather",
    "is_system",
    "process_of",
    "run_command",
    "unit_directory",
    "unit_of",
]

Run = Callable[[Sequence[str]], tuple[int, str] | None]
"""Runs a command: its status and output, or None where there is no such command."""

SOCKETS = ("edged.sock", "admin.sock", "events.sock", "lease.sock")

_COMMAND_S_MAX = 5.0
"""systemctl answers in milliseconds; a bus that hangs must not hang the doctor."""
_LISTED_MAX = 50
"""Names of the models folder in each list: the first of them show what is wrong with all."""
_BASES = {"State": "/var/lib", "Cache": "/var/cache", "Runtime": "/run", "Configuration": "/etc"}
"""Below these systemd makes a unit's directories, and tells the service by `$STATE_DIRECTORY` and so on."""
_PROPERTIES = (
    *("Id", "LoadState", "ActiveState", "SubState", "UnitFileState", "Result", "StatusText", "MainPID"),
    *("NRestarts", "ExecMainStatus", "ExecMainCode", "NeedDaemonReload", "FragmentPath", "DropInPaths"),
    *("User", "Type", "WatchdogUSec", "MemoryMax", "MemoryHigh", "MemoryCurrent", "LimitNOFILE"),
    *("DevicePolicy", "DeviceAllow", "ExecStart", "ActiveEnterTimestamp", "InactiveEnterTimestamp"),
    *("OOMPolicy", "TasksMax", "CPUQuotaPerSecUSec", "RuntimeDirectoryPreserve", "ProtectHome"),
    *("PrivateTmp", "BindPaths", "BindReadOnlyPaths"),
    *("StateDirectory", "CacheDirectory", "RuntimeDirectory", "ConfigurationDirectory"),
)
_GROUPS = ("edged", "edged-drop", "edged-admin", "render", "video")
"""Whose members matter here; who is in the others is nobody's business."""
_SITE_GLOBS = (
    "usr/lib/edged/lib/python3*/site-packages",
    "usr/lib/edged/runtimes/*",
    "opt/edged/lib/python3*/site-packages",
    "opt/edged/runtimes/*",
)


@dataclass(frozen=True)
class Asked:
    """Who asks, and what was already found out: the daemon's words, and the endpoint if one was named."""

    daemon: Daemon = field(default_factory=Daemon)
    endpoint: str | None = None
    unit: str = "edged.service"
    uid: int = field(default_factory=os.getuid)
    gids: tuple[int, ...] = field(default_factory=lambda: (os.getgid(), *os.getgroups()))
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)


def run_command(argv: Sequence[str]) -> tuple[int, str] | None:
    """What a command said, on both its streams; None where it is not there or did not end in time."""
    try:
        done = subprocess.run(
            list(argv), capture_output=True, text=True, timeout=_COMMAND_S_MAX, check=False, errors="replace"
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.returncode, done.stdout + (done.stderr if done.returncode else "")


@dataclass(frozen=True)
class Found:
    """Where the daemon in question is: its unit, its sockets' directory, and its process if it runs."""

    unit: Unit
    run_dir: str
    sockets: tuple[Socket, ...]
    pid: int | None
    process: Process | None


def find(asked: Asked, *, root: Root, run: Run = run_command) -> Found:
    """Finds the daemon, or the service that would be it."""
    unit = unit_of(run, asked.unit)
    run_dir = _run_dir(asked, root, unit)
    sockets, peer = _sockets(root, run_dir)
    pid = _pid(asked.daemon, peer, unit)
    process = None if pid is None else process_of(root, pid)
    if process is not None and process.unit and process.unit != unit.name:
        unit = unit_of(run, process.unit, user=process.user_unit)
    return Found(unit, run_dir, sockets, pid, process)


def gather(asked: Asked, *, root: Root, run: Run = run_command, now_s: float | None = None) -> Facts:
    """Everything that can be seen from here."""
    now_s = time.time() if now_s is None else now_s
    found = find(asked, root=root, run=run)
    unit, process = found.unit, found.process
    caller = root.account_of(asked.uid, list(asked.gids))
    system = is_system(asked, process, unit)
    service_name = _service_name(system, process, unit, caller)
    config, config_file, config_error = _config(asked, root, system, unit)
    status = asked.daemon.status or {}
    paths = {
        "models": str(status.get("models_dir") or (config.server.models if config else "")),
        "state": str(status.get("state_dir") or (config.server.state_dir if config else "")),
        "cache": str(status.get("cache_dir") or (config.server.cache_dir if config else "")),
        "sockets": found.run_dir,
    }
    cgroup = "" if found.pid is None else _cgroup(root, found.pid)
    return Facts(
        system=system,
        caller=caller,
        caller_configured=root.account(caller.name) or caller,
        service=root.account(service_name),
        service_name=service_name,
        groups={name: root.groups[name][1] for name in _GROUPS if name in root.groups},
        daemon=asked.daemon,
        process=process,
        unit=unit,
        places=tuple(_place(root, role, path) for role, path in paths.items() if path),
        sockets=found.sockets,
        config_file=config_file,
        config_error=config_error,
        disk_free_min_bytes=config.resources.disk_free_min_bytes if config else 0,
        temperature_max_c=config.resources.temperature_max_c if config else 95.0,
        client_version=__version__,
        packages=machine.packages(_site_directories(root, process, unit), root),
        machine=machine.machine(root),
        devices=machine.devices(root),
        memory=machine.memory(root, cgroup),
        inotify=machine.inotify(root),
        clock=machine.clock(now_s),
        heat=machine.heat(root),
        models=_models(root, paths["models"], now_s),
    )


# ---- systemd --------------------------------------------------------------------------------------------


def unit_of(run: Run, name: str, *, user: bool = False) -> Unit:
    """What systemd says of a unit."""
    said = run(
        ["systemctl", *(["--user"] if user else []), "show", f"--property={','.join(_PROPERTIES)}", name]
    )
    if said is None:
        return Unit(name, error="systemctl is not there or does not answer")
    code, text = said
    if code != 0:
        return Unit(name, error=" ".join(text.split())[:200] or f"systemctl ended with {code}")
    pairs = (line.partition("=") for line in text.splitlines() if "=" in line)
    return Unit(name, {key: value for key, _, value in pairs})


def is_system(asked: Asked, process: Process | None, unit: Unit) -> bool:
    """Whether this is about the system's service, not somebody's own daemon."""
    if process is not None:
        return bool(process.unit) and not process.user_unit
    named = asked.endpoint or asked.environ.get("EDGED_ENDPOINT")
    if named:
        return os.path.dirname(named.removeprefix("ipc://")) == unit_directory(unit, "Runtime")
    return unit.known


def _service_name(system: bool, process: Process | None, unit: Unit, caller: Account) -> str:
    if process is not None:
        return process.account.name
    return unit.properties.get("User") or "edged" if system else caller.name


# ---- the daemon's process and its sockets ---------------------------------------------------------------


def _pid(daemon: Daemon, peer: int | None, unit: Unit) -> int | None:
    said = daemon.status.get("pid") if daemon.status else None
    main = whole(unit.properties.get("MainPID", ""))
    return next((pid for pid in (said, peer, main) if isinstance(pid, int) and pid > 0), None)


def process_of(root: Root, pid: int) -> Process | None:
    """What /proc says of a process; None where it is not there or hidden from us."""
    status = {
        line.partition(":")[0]: line.partition(":")[2].split()
        for line in root.text(f"/proc/{pid}/status").splitlines()
    }
    if "Uid" not in status:
        return None
    gids = [whole(each) for each in (*status.get("Gid", [])[1:2], *status.get("Groups", []))]
    unit, user = _unit_in(_cgroup(root, pid, controller="name=systemd") or _cgroup(root, pid))
    files = re.search(r"^Max open files\s+(\d+)", root.text(f"/proc/{pid}/limits"), re.MULTILINE)
    argv = root.bytes(f"/proc/{pid}/cmdline").split(b"\0")
    return Process(
        pid,
        root.account_of(whole(status["Uid"][1]) or 0, [gid for gid in gids if gid is not None]),
        unit,
        user,
        argv[0].decode("utf-8", "replace"),
        None if files is None else int(files[1]),
        root.link(f"/proc/{pid}/fd/2"),
    )


def _cgroup(root: Root, pid: int, *, controller: str = "memory") -> str:
    """The process's control group: the unified one, or with v1 the controller's."""
    rows = [line.split(":", 2) for line in root.text(f"/proc/{pid}/cgroup").splitlines()]
    rows = [row for row in rows if len(row) == 3]
    unified = next((path for number, _, path in rows if number == "0"), "")
    return next((path for _, names, path in rows if controller in names.split(",")), unified)


def _unit_in(cgroup: str) -> tuple[str, bool]:
    """The service that a control group belongs to, and whether a user's systemd runs it."""
    parts = cgroup.split("/")
    services = [n for n, part in enumerate(parts) if part.endswith(".service")]
    user = any(part.startswith("user@") for part in parts)
    if not services or parts[services[-1]].startswith("user@"):
        return "", False
    return parts[services[-1]], user


def _run_dir(asked: Asked, root: Root, unit: Unit) -> str:
    said = str((asked.daemon.status or {}).get("endpoint") or asked.endpoint or "")
    said = said or asked.environ.get("EDGED_ENDPOINT", "")
    if said:
        return os.path.dirname(said.removeprefix("ipc://"))
    candidates = []
    if asked.environ.get("XDG_RUNTIME_DIR"):
        candidates.append(os.path.join(asked.environ["XDG_RUNTIME_DIR"], "edged"))
    home = asked.environ.get("HOME", "/")
    state = asked.environ.get("XDG_STATE_HOME") or os.path.join(home, ".local", "state")
    candidates.append(os.path.join(state, "edged", "run"))
    if not unit.known:
        for each in candidates:
            if root.node(each) is not None:
                return each
    return unit_directory(unit, "Runtime")


def unit_directory(unit: Unit, kind: str) -> str:
    """The unit's directory of this kind, `State`, `Cache`, `Runtime` or `Configuration`."""
    names = unit.properties.get(f"{kind}Directory", "").split()
    return f"{_BASES[kind]}/{names[0].partition(':')[0] if names else 'edged'}"


def _sockets(root: Root, directory: str) -> tuple[tuple[Socket, ...], int | None]:
    """The sockets, and the pid of who listens on the first that answers (SO_PEERCRED, unix(7))."""
    found, pid = [], None
    for name in SOCKETS:
        path = f"{directory}/{name}"
        node = root.node(path)
        answer, peer = ("absent", None) if node is None else _connect(root.at(path), name)
        pid = pid or peer
        found.append(Socket(name, node, answer))
    return tuple(found), pid


def _connect(path: Path, name: str) -> tuple[str, int | None]:
    kind = unix.SOCK_SEQPACKET if name == "lease.sock" else unix.SOCK_STREAM
    with unix.socket(unix.AF_UNIX, kind | unix.SOCK_NONBLOCK) as probe:
        try:
            error = probe.connect_ex(str(path))
        except OSError as e:  # a path too long for a socket's address
            return str(e), None
        if error == 0:
            credentials = probe.getsockopt(unix.SOL_SOCKET, unix.SO_PEERCRED, struct.calcsize("3i"))
            return "answers", struct.unpack("3i", credentials)[0] or None
    known = {
        errno.EAGAIN: "answers",  # it listens, and its backlog is full
        errno.ECONNREFUSED: "refused",
        errno.EACCES: "denied",
        errno.EPERM: "denied",
    }
    return known.get(error, os.strerror(error)), None


# ---- settings and directories ---------------------------------------------------------------------------


def _config(asked: Asked, root: Root, system: bool, unit: Unit) -> tuple[Config | None, str, str]:
    """The settings as the daemon would read them, the file, and what is wrong with it."""
    environ = dict(asked.environ)
    if system:
        environ = {f"{kind.upper()}_DIRECTORY": unit_directory(unit, kind) for kind in _BASES}
        file = f"{environ['CONFIGURATION_DIRECTORY']}/edged.toml"
        environ["CONFIGURATION_DIRECTORY"] = str(root.at(environ["CONFIGURATION_DIRECTORY"]))
    else:
        base = environ.get("XDG_CONFIG_HOME") or os.path.join(environ.get("HOME", "/"), ".config")
        file = environ.get("EDGED_CONFIG") or os.path.join(base, "edged", "edged.toml")
    try:
        return load_config(flags={}, environ=environ, file=None), file, ""
    except ConfigError as e:
        return None, file, e.message


def _place(root: Root, role: str, path: str) -> Place:
    above = tuple(
        node for parent in reversed(Path(path).parents) if (node := root.node(str(parent))) is not None
    )
    try:
        node = root.look(path)
        disk = os.statvfs(root.at(path))
    except OSError as e:
        return Place(role, path, error=e.strerror or str(e), above=above)
    return Place(
        role,
        path,
        node,
        above=above,
        total_bytes=disk.f_blocks * disk.f_frsize,
        free_bytes=disk.f_bavail * disk.f_frsize,
        free_inodes=disk.f_favail if disk.f_files else None,
        read_only=bool(disk.f_flag & os.ST_RDONLY),
    )


def _models(root: Root, path: str, now_s: float) -> ModelsFolder:
    """What lies there, looked at as the daemon does; only what the caller may list."""
    if not path:
        return ModelsFolder()
    snapshot = scan(root.at(path))
    everything = (*snapshot.entries.values(), *snapshot.rivals)
    problems = [(each.source, *each.problem) for each in everything if each.problem is not None]
    files: dict[str, Node] = {}
    directories: dict[str, Node] = {}
    for entry in everything:
        stamps = (*entry.files, *((entry.settings_file,) if entry.settings_file else ()))
        for stamp in stamps:
            for into, name, bits in (
                (files, stamp.path, 0o004),
                (directories, os.path.dirname(stamp.path), 0o005),
            ):
                node = root.node(f"{path}/{name}") if name and name not in into else None
                if node is not None and node.mode & bits != bits and len(into) < _LISTED_MAX:
                    into[name] = node
    return ModelsFolder(
        len(everything),
        snapshot.fault or "",
        tuple(problems[:_LISTED_MAX]),
        tuple(_ignored(root.at(path), now_s)),
        tuple(files.values()),
        tuple(directories.values()),
    )


def _ignored(folder: Path, now_s: float) -> Iterable[tuple[str, float]]:
    """Names that look like models and are never looked at, with their age."""
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda each: each.name)
    except OSError:
        return
    listed = 0
    for each in entries:
        hidden = each.name.startswith(".") and any(s in each.name for s in (".onnx", ".xml", ".bin"))
        if not (hidden or each.name.endswith(IGNORED_SUFFIXES)) or listed >= _LISTED_MAX:
            continue
        try:
            age_s = max(0.0, now_s - each.stat(follow_symlinks=False).st_mtime)
        except OSError:
            continue
        listed += 1
        yield each.name, age_s


def _site_directories(root: Root, process: Process | None, unit: Unit) -> list[str]:
    """Where the daemon's, its runtimes' and this client's packages may lie."""
    own = [entry for entry in sys.path if entry and os.path.isdir(entry)] if str(root.path) == "/" else []
    start = re.search(r"path=(\S+)", unit.properties.get("ExecStart", ""))
    programs = [process.python if process is not None else "", start[1] if start else ""]
    prefixes = [
        Path(program).parent.parent
        for program in (*programs, sys.executable if own else "")
        if program.startswith("/") and len(Path(program).parts) > 3
    ]
    globs = [
        f"{prefix}/{where}".lstrip("/")
        for prefix in prefixes
        for where in ("lib/python3*/site-packages", "runtimes/*")
    ]
    found = [path for pattern in (*globs, *_SITE_GLOBS) for path in root.glob(pattern)]
    return list(dict.fromkeys([*found, *own]))
