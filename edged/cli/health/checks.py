"""Facts in, findings out: what is wrong with an installation, and what to type against it.

Pure. Each area is one function over the facts, which yields one finding for each thing that it looked at; an
area in which nothing is wrong says so, so that silence never stands for health. A level is a promise: `fail`
means that edged does not do its work, or not with what the machine has; `warn` that it will not for long, or
that somebody will be surprised; `note` that something is worth knowing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from edged.cli.health import folders, hardware
from edged.cli.health.facts import Facts, Node
from edged.cli.health.words import Rows, install, quoted, restart, times

__all__ = ["LEVELS", "Finding", "examine", "worst"]

LEVELS = ("ok", "note", "warn", "fail")

_GROUPS = {
    "edged": "whose members may ask for inference",
    "edged-drop": "whose members may put models into the folder",
    "edged-admin": "whose members may load, unload and read the status",
}
_DROP = "edged-drop"
_EXIT_TEXTS = {
    "64": "its command line makes no sense",
    "69": "a library that it needs is not installed",
    "78": "a setting is wrong",
}
_LOGS = "edgectl logs -n 50"
_DESCRIPTORS_MIN = 4096
"""Each app has some; libzmq ends the process at the first connection without one."""
_SOCKET_GROUPS = {
    "edged.sock": "edged",
    "events.sock": "edged",
    "lease.sock": "edged",
    "admin.sock": "edged-admin",
}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: a sentence, and what to type (empty where nothing needs to be)."""

    area: str
    level: str
    text: str
    fix: str = ""


def examine(facts: Facts) -> list[Finding]:
    """Every finding, in the order of the areas."""
    found: list[Finding] = []
    for area, check in _AREAS.items():
        rows = [Finding(area, level, text, fix) for level, text, fix in check(facts)]
        found += rows
    return found


def worst(findings: list[Finding]) -> str:
    """The highest level among them."""
    return max((each.level for each in findings), key=LEVELS.index, default="ok")


# ---- the daemon -----------------------------------------------------------------------------------------


def _daemon(facts: Facts) -> Rows:
    status, process = facts.daemon.status, facts.process
    if status is not None:
        text = f"edged {status.get('version', '?')} answers, {status.get('state')}, pid {status.get('pid')}"
        yield "ok" if status.get("state") == "ready" else "note", text, ""
        yield from _daemons_own_word(facts, status)
    elif facts.daemon.metadata is not None:
        yield "ok", f"edged {facts.daemon.metadata.get('version', '?')} answers", ""
        yield (
            "note",
            f"its status may not be read by {facts.caller.name}, so models and resources were not checked",
            f"sudo usermod -aG edged-admin {facts.caller.name}",
        )
    elif facts.daemon.reason == "DAEMON_NOT_RUNNING":
        start = f"systemctl start {facts.unit.name}" if facts.unit.known else "edged --models DIR"
        failed = facts.unit.properties.get("ActiveState") == "failed"
        yield "fail", "no daemon answers", _LOGS if failed else start
    elif facts.daemon.reason == "SOCKET_PERMISSION":
        # It is who asks that is kept out: nothing is wrong with the daemon, as far as can be seen.
        text = f"{facts.caller.name} may not ask the daemon, so it and its models were not checked"
        yield "warn", text, "sudo edgectl doctor"
    else:
        yield "fail", f"the daemon gives no answer: {facts.daemon.error}", f"{_LOGS}; {restart(facts)}"
    if process is not None and process.open_files_max is not None:
        few = process.open_files_max < _DESCRIPTORS_MIN
        text = f"the daemon may open {process.open_files_max} files"
        yield (
            "warn" if few else "ok",
            text + (", which its clients can use up" if few else ""),
            "systemctl edit edged  # [Service] LimitNOFILE=65536" if few else "",
        )


def _daemons_own_word(facts: Facts, status: Any) -> Rows:
    if status.get("models_fault"):
        yield (
            "fail",
            str(status["models_fault"]),
            f"ls -ld {quoted(status.get('models_dir'))}; findmnt -T {quoted(status.get('models_dir'))}",
        )
    for row in status.get("models") or ():
        if row.get("state") == "UNAVAILABLE":
            why = str(row.get("reason") or "no reason given")
            level = "note" if why.startswith("MODEL_UNLOADED") else "fail"
            serving = any(r.get("name") == row.get("name") and r.get("serving") for r in status["models"])
            text = f"{row.get('name')} is not served: {why}"
            if serving:
                level, text = "warn", f"a new version of {row.get('name')} was refused: {why}"
            yield level, text, f"edgectl explain {quoted(row.get('name'))}"
        elif row.get("fallback_reason"):
            text = f"{row.get('name')} runs on {row.get('device')}: {row['fallback_reason']}"
            yield "warn", text, f"edgectl explain {quoted(row.get('name'))}"
        if int(row.get("restarts") or 0) > 0:
            text = f"{row.get('name')} was started again {times(row['restarts'])} since it was loaded"
            yield "warn", text, f"edgectl explain {quoted(row.get('name'))}"
    damaged = int((status.get("counters") or {}).get("damaged_copies") or 0)
    if damaged:
        text = f"stored copies of models were found damaged, {times(damaged)} since the start: a disk fails"
        yield "warn", text, f"dmesg; ls -l {quoted(status.get('state_dir'))}/store/damaged"
    level = (status.get("resources") or {}).get("level", "OK")
    if level != "OK":
        reasons = "; ".join((status.get("resources") or {}).get("reasons") or ())
        yield "warn", f"the daemon is short of a resource ({level}): {reasons}", "edgectl top"


def _unit(facts: Facts) -> Rows:
    unit, said = facts.unit, facts.unit.properties
    if unit.error:
        yield "note", f"systemd could not be asked: {unit.error}", ""
        return
    if not unit.known:
        level = "fail" if facts.system else "note"
        yield level, f"there is no unit {unit.name}; this daemon is not the system's service", ""
        return
    active, result = said.get("ActiveState", ""), said.get("Result", "success")
    state = f"{unit.name} is {active} ({said.get('SubState', '')})"
    if active == "active":
        yield "ok", state, ""
    elif active == "failed" or result != "success":
        status = said.get("ExecMainStatus", "")
        why = f"{result}, exit status {status}" if status not in ("", "0") else result
        if status in _EXIT_TEXTS:
            why += f": {_EXIT_TEXTS[status]}"
        yield "fail", f"{state}: {why}", f"{_LOGS}; systemctl restart {unit.name}"
    elif active in ("activating", "deactivating", "reloading"):
        yield "warn", state, f"systemctl status {unit.name}"
    else:
        yield "fail", state, f"systemctl start {unit.name}"
    restarts = said.get("NRestarts", "0")
    if restarts not in ("0", ""):
        yield "warn", f"systemd has started it again {times(restarts)}", "edgectl logs -n 200"
    if said.get("NeedDaemonReload") == "yes":
        yield "warn", "its unit file has changed since systemd read it", "systemctl daemon-reload"
    if said.get("UnitFileState") == "disabled":
        yield "note", "it will not start at the next boot", f"systemctl enable {unit.name}"
    if said.get("Type") == "notify" and said.get("WatchdogUSec") in ("0", "infinity"):
        yield "note", "no watchdog looks after it: WatchdogSec= is not set", f"systemctl cat {unit.name}"


def _versions(facts: Facts) -> Rows:
    said = facts.daemon.status or facts.daemon.metadata
    daemon = str(said.get("version", "")) if said else ""
    if daemon and daemon != facts.client_version:
        yield (
            "warn",
            f"the daemon runs version {daemon}, edgectl is {facts.client_version}: it was not started again "
            "after an upgrade, or there are two installations",
            "systemctl restart edged",
        )
    elif daemon:
        yield "ok", f"daemon and edgectl are both version {daemon}", ""
    else:
        yield "ok", f"edgectl is version {facts.client_version}", ""
    for name in ("onnxruntime", "onnxruntime-gpu", "openvino"):
        for package in facts.package(name):
            yield "ok", f"{name} {package.version} in {package.directory}", ""
    if not any(facts.package(n) for n in ("onnxruntime", "onnxruntime-gpu", "openvino")):
        devices = (facts.daemon.status or {}).get("devices") or ()
        works = any(d.get("status") == "ok" for d in devices)
        level = "note" if works or not facts.packages else "fail"
        yield level, "no runtime is installed where this edgectl can see it", install(facts, "cpu")
    for gpu in facts.package("onnxruntime-gpu"):
        if any(each.directory == gpu.directory for each in facts.package("onnxruntime")):
            yield (
                "fail",
                f"onnxruntime and onnxruntime-gpu lie in one directory, {gpu.directory}, and overwrite each "
                "other's files",
                "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'edged[cuda]'",
            )


def _config(facts: Facts) -> Rows:
    if facts.config_error:
        yield "fail", facts.config_error, f"edged --check --config {quoted(facts.config_file)}"
    else:
        yield "ok", f"the settings are good ({facts.config_file}, where it exists)", ""


# ---- users, groups, sockets -----------------------------------------------------------------------------


def _groups(facts: Facts) -> Rows:
    caller = facts.caller
    if facts.system:
        if facts.service is None:
            text = f"the user {facts.service_name} that the service runs as does not exist"
            yield "fail", text, "systemd-sysusers"
        for name, what in _GROUPS.items():
            if name in facts.groups:
                yield "ok", f"the group {name} is there, {what}", ""
            else:
                # Without the third the folder's owner may still put models; nobody is kept from asking.
                level = "note" if name == _DROP else "fail"
                yield level, f"there is no group {name}, {what}", "systemd-sysusers"
        if caller.uid != 0:
            yield from _caller_groups(facts)
    else:
        yield "ok", f"the daemon is {facts.service_name}'s own, no group is needed to ask it", ""
    if facts.service is not None and facts.process is not None:
        missing = sorted(set(facts.service.groups) - set(facts.process.account.groups))
        if missing:
            text = f"{facts.service_name} has joined {', '.join(missing)} since the daemon was started"
            yield "warn", text, restart(facts)


def _caller_groups(facts: Facts) -> Rows:
    caller, wanted = facts.caller, facts.caller_configured
    for name, what in _GROUPS.items():
        if name in caller.groups:
            yield "ok", f"{caller.name} is in {name}", ""
        elif name in wanted.groups:
            text = f"{caller.name} is in {name}, but this session began before that"
            yield "warn", text, f"newgrp {name}  # or log in again"
        else:
            yield "note", f"{caller.name} is not in {name}, {what}", f"sudo usermod -aG {name} {caller.name}"


def _sockets(facts: Facts) -> Rows:
    place = facts.place("sockets")
    if place is not None and place.node is not None and place.node.mode & 0o002:
        yield (
            "fail",
            f"{place.path} is writable by everybody: anyone could take the sockets",
            f"chmod o-w {quoted(place.path)}",
        )
    there = [each for each in facts.sockets if each.node is not None]
    if not there:
        where = place.path if place is not None else "/run/edged"
        yield "note", f"there are no sockets in {where}: no daemon has bound them", ""
        return
    stale = [each for each in there if each.answer == "refused"]
    answering = [each for each in there if each.answer == "answers"]
    if stale and answering:
        names = ", ".join(each.name for each in stale)
        yield "fail", f"nobody listens on {names} any more, though the daemon runs", restart(facts)
    elif stale:
        where = place.path if place is not None else ""
        yield (
            "note",
            f"{where} holds the sockets of a daemon that is gone; the next one replaces them",
            "systemctl start edged" if facts.unit.known else "edged --models DIR",
        )
    for each in there:
        assert each.node is not None
        yield from _socket(facts, each.name, each.node, each.answer)


def _socket(facts: Facts, name: str, node: Node, answer: str) -> Rows:
    shown = f"{node.path} is {node.owner}:{node.group} {node.mode:04o}"
    if node.mode & 0o006:
        yield "warn", f"{shown}: everybody on this machine may use it", restart(facts)
        return
    group = _SOCKET_GROUPS[name]
    if facts.system and (node.group != group or node.mode & 0o060 != 0o060) and answer != "refused":
        text = f"{shown}, where the group {group} should have it: only {node.owner} can use it"
        joined = facts.service is not None and group in facts.service.groups
        fix = restart(facts) if joined else f"usermod -aG {group} {facts.service_name} && {restart(facts)}"
        yield "fail", text, fix
        return
    if answer == "denied":
        yield "note", f"{shown}; {facts.caller.name} may not use it", _join(facts, node.group)
    elif answer in ("answers", "refused"):
        yield "ok", shown, ""
    else:
        yield "warn", f"{shown}; connecting to it says: {answer}", restart(facts)


def _join(facts: Facts, group: str) -> str:
    return f"sudo usermod -aG {group} {facts.caller.name}  # then log in again"


_AREAS: dict[str, Callable[[Facts], Rows]] = {
    "daemon": _daemon,
    "unit": _unit,
    "versions": _versions,
    "settings": _config,
    "groups": _groups,
    "sockets": _sockets,
    "devices": hardware.devices,
    "drivers": hardware.drivers,
    "disk": folders.disk,
    "models": folders.models,
    "memory": hardware.memory,
    "inotify": hardware.inotify,
    "clock": hardware.clock,
    "heat": hardware.heat,
}
