"""The checks of what edged keeps and is given: its directories, their disks, the models folder.

Pure. Whether the service may read or write is decided by permission bits (`facts.may`): who asks may be
somebody else.
"""

from __future__ import annotations

from edged.cli.health.facts import READ, SEARCH, WRITE, Account, Facts, Place, may
from edged.cli.health.words import NAMED_MAX, Rows, are, names_text, quoted, restart
from edged.cli.tables import bytes_text, duration_text

__all__ = ["disk", "models"]

_INODES_MIN = 1000
_LEFT_BEHIND_S = 86400.0


# ---- directories ----------------------------------------------------------------------------------------


def disk(facts: Facts) -> Rows:
    """The directories: are they there, whose are they, and is there room?"""
    for role in ("state", "cache", "models"):
        place = facts.place(role)
        if place is None:
            continue
        yield from _hidden(facts, place)
        if place.node is None:
            yield from _no_directory(facts, place)
            continue
        yield from _owner(facts, place)
        yield from _space(facts, place)


def _hidden(facts: Facts, place: Place) -> Rows:
    """What the service's sandbox keeps from its eyes, whatever the permission bits say."""
    said = facts.unit.properties
    if not facts.system or place.path in said.get("BindPaths", "") + said.get("BindReadOnlyPaths", ""):
        return
    homes = place.path.startswith(("/home/", "/root/", "/run/user/"))
    if homes and said.get("ProtectHome") in ("yes", "true", "tmpfs"):
        hidden = "home directories (ProtectHome=)"
    elif place.path.startswith(("/tmp/", "/var/tmp/")) and said.get("PrivateTmp") in ("yes", "true"):  # noqa: S108 - nothing is written there
        hidden = "the machine's /tmp (PrivateTmp=)"
    else:
        return
    yield (
        "fail",
        f"the service cannot see {hidden}, where the {place.role} directory {place.path} lies",
        f"systemctl edit {facts.unit.name}  # [Service] BindReadOnlyPaths={quoted(place.path)}",
    )


def _no_directory(facts: Facts, place: Place) -> Rows:
    running = facts.daemon.status is not None
    what = f"the {place.role} directory {place.path}"
    if place.error == "Permission denied":
        yield "note", f"{what} cannot be looked at by {facts.caller.name}", "sudo edgectl doctor"
    elif place.role == "models":
        yield "fail", f"{what}: {place.error}", f"mkdir -p {quoted(place.path)}"
    elif running:
        yield "fail", f"{what}: {place.error}", restart(facts)
    else:
        yield "note", f"{what} is not there yet; the daemon makes it", ""


def _owner(facts: Facts, place: Place) -> Rows:
    assert place.node is not None
    account, node = facts.service, place.node
    if account is None:
        return
    need = READ | SEARCH if place.role == "models" else READ | WRITE | SEARCH
    shown = f"{place.path} ({node.owner}:{node.group} {node.mode:04o})"
    blocked = next((each for each in place.above if not may(each, account, SEARCH)), None)
    if blocked is not None:
        text = f"{account.name} may not go through {blocked.path} to the {place.role} directory"
        yield "fail", text, f"chmod o+x {quoted(blocked.path)}"
    elif not may(node, account, need):
        words = "read" if place.role == "models" else "written"
        fix = (
            f"chmod o+rx {quoted(place.path)}"
            if place.role == "models"
            else f"chown -R {account.name}: {quoted(place.path)}"
        )
        yield "fail", f"{shown} cannot be {words} by {account.name}", fix
    if place.role == "models" and node.mode & 0o002 and not node.mode & 0o1000:
        text = f"{shown} is writable by everybody: anyone on this machine decides what is served"
        yield "warn", text, f"chmod o-w {quoted(place.path)}"
    if place.read_only and place.role != "models":
        yield "fail", f"{place.path} lies on a file system that is mounted read-only", "dmesg | tail -n 50"


def _space(facts: Facts, place: Place) -> Rows:
    if place.free_bytes is None or not place.total_bytes:
        return
    free, minimum = place.free_bytes, facts.disk_free_min_bytes
    text = f"{bytes_text(free)} of {bytes_text(place.total_bytes)} are free for {place.path}"
    if place.role == "models":
        return
    fix = f"du -xh --max-depth=2 {quoted(place.path)} | sort -h | tail"
    if free < minimum:
        yield "fail", f"{text}; new models are refused below {bytes_text(minimum)}", fix
    elif free < 2 * minimum:
        yield "warn", f"{text}; new models are refused below {bytes_text(minimum)}", fix
    else:
        yield "ok", text, ""
    if place.free_inodes is not None and place.free_inodes < _INODES_MIN:
        yield (
            "warn",
            f"only {place.free_inodes} inodes are left for {place.path}",
            f"df -i {quoted(place.path)}",
        )


def models(facts: Facts) -> Rows:
    """The models folder: what is refused, cannot be read, or was left behind."""
    folder, place = facts.models, facts.place("models")
    path = place.path if place is not None else "the models folder"
    if place is None or place.node is None:
        yield "note", f"{path} was not looked into", ""
        return
    if folder.fault:
        yield "note", folder.fault, "sudo edgectl doctor"
        return
    for source, reason, message in folder.problems:
        if reason == "UNREADABLE" and facts.caller != facts.service:
            continue  # that is about who asks; whether the daemon may read it is looked at below
        yield "warn", f"{source} is refused: {message}", f"ls -l {quoted(f'{path}/{source}')}"
    yield from _unreadable(facts)
    old = [name for name, age_s in folder.ignored if age_s > _LEFT_BEHIND_S]
    new = [name for name, age_s in folder.ignored if age_s <= _LEFT_BEHIND_S]
    if old:
        age = duration_text(max(age_s for _, age_s in folder.ignored))
        text = f"{names_text(old)} {are(old)} left from a copy that never ended (up to {age} old)"
        yield "warn", text, f"rm -r {' '.join(quoted(f'{path}/{name}') for name in old[:NAMED_MAX])}"
    if new:
        text = f"{names_text(new)} {are(new)} not looked at: such names are taken for unfinished copies"
        yield "note", text, f"mv {quoted(f'{path}/{new[0]}')} {quoted(path)}/NAME.onnx"
    yield "ok", f"{path} holds {folder.entries} {'entry' if folder.entries == 1 else 'entries'}", ""


def _unreadable(facts: Facts) -> Rows:
    account: Account | None = facts.service
    if account is None:
        return
    closed = [node for node in facts.models.directories if not may(node, account, READ | SEARCH)]
    closed += [node for node in facts.models.files if not may(node, account, READ)]
    if closed:
        names = [node.path.rpartition("/")[2] for node in closed]
        text = f"{names_text(names)} cannot be read by {account.name}"
        yield "fail", text, f"chmod -R o+rX {' '.join(quoted(node.path) for node in closed[:NAMED_MAX])}"
