"""`edgectl support-bundle`: one file with all that a developer needs, and nothing that is nobody's business.

What goes in is a list of pieces, each bounded and each a text. No tensor, no model's bytes, no settings file
of a model (golden samples are tensors): of models their names, hashes, sizes and what the daemon says of
them. Of environments only variables from a list of harmless ones. Whatever looks like a secret is blotted out
of every text, the journal's too. The file is the caller's alone (0600), and says itself what is in it.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import platform
import re
import socket
import stat
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edged.cli.doctor import aim
from edged.cli.health.checks import examine
from edged.cli.health.facts import Facts
from edged.cli.health.gather import Run, gather, run_command
from edged.cli.health.root import Root
from edged.cli.logs import journal_command
from edged.cli.session import EXIT_OK, Failure, Session
from edged.cli.tables import bytes_text, clean
from edged.errors import EdgedError
from edged.version import __version__

__all__ = ["Piece", "Source", "blotted", "pieces", "support_bundle", "write"]

PIECE_BYTES_MAX = 2 << 20
"""Of each text; of a log this is the end, which is what was asked about."""
MODELS_MAX = 200
"""Whose history is asked for: a request each."""
LISTED_MAX = 2000
"""Files in the listing of a directory."""
JOURNAL_LINES_MAX = 5000

_KEY = r"[\w.-]*(?:passw(?:or)?d|passphrase|secret|token|credential|api[_-]?key|private[_-]?key)[\w.-]*"
_SECRETS = (
    # key = "value", KEY=value, "key": "value"; the value up to its end, quoted or not.
    re.compile(rf"""(?i)(["']?\b{_KEY}["']?\s*[:=]\s*)("(?:[^"\\]|\\.)*"|'[^']*'|[^\s,;}}]+)"""),
    re.compile(r"(?i)(\bauthorization\s*[:=]\s*)(.+)"),
    re.compile(r"(?i)(\bbearer\s+)(\S+)"),
    re.compile(r"(\w+://[^\s/:@]*:)([^\s/@]+)(?=@)"),
    re.compile(r"(-----BEGIN [A-Z ]*PRIVATE KEY-----)(.*?)(?=-----END|\Z)", re.DOTALL),
)
_BLOT = "(left out: it looks like a secret)"

_HARMLESS = re.compile(
    r"(EDGED|XDG|ORT|OMP|OPENBLAS|MKL|OV|OPENVINO|CUDA|NVIDIA|MALLOC|LC)_\w+|\w+_DIRECTORY|LANG|TZ|PATH|"
    r"LD_LIBRARY_PATH|PYTHON\w+|NOTIFY_SOCKET|WATCHDOG_\w+|JOURNAL_STREAM|MEMORY_PRESSURE_WATCH|INVOCATION_ID"
)
"""Variables that steer edged and its runtimes; of all others not even the names go in."""

_KERNEL_WORDS = "edged|out of memory|oom|nvidia|NVRM|i915|drm|amdgpu|vpu|thermal|thrott|hung task|segfault"
_PROC_FILES = (
    *("meminfo", "loadavg", "uptime", "version", "vmstat", "cpuinfo", "modules", "swaps"),
    *("pressure/memory", "pressure/cpu", "pressure/io", "sys/fs/inotify/max_user_watches"),
    *(
        "sys/fs/inotify/max_user_instances",
        "sys/vm/overcommit_memory",
        "sys/vm/swappiness",
        "driver/nvidia/version",
    ),
)
_PROCESS_FILES = ("status", "limits", "cgroup", "smaps_rollup", "io", "oom_score_adj")


@dataclass(frozen=True)
class Piece:
    """One file of the bundle: its name, a sentence about it, and its text."""

    name: str
    what: str
    text: str


@dataclass(frozen=True)
class Source:
    """Where the pieces come from: the daemon, if it answers, the facts, the files and systemd."""

    session: Session
    facts: Facts
    root: Root
    run: Run


def support_bundle(session: Session, args: argparse.Namespace) -> int:
    """Writes the bundle and says what is in it."""
    name = time.strftime(f"edged-support-{_host()}-%Y%m%d-%H%M%S")
    path = args.file if args.file is not None else Path(f"{name}.tar.gz")
    root = Root()
    facts = gather(aim(session, args.unit), root=root)
    found = list(pieces(Source(session, facts, root, run_command)))
    size = write(path, path.name.partition(".tar")[0], found)
    session.answer(
        {"path": str(path), "bytes": size, "files": [{"name": p.name, "what": p.what} for p in found]},
        "\n".join(
            [
                f"{path} ({bytes_text(size)}), which only you can read, holds:",
                *(f"  {p.name.ljust(24)} {clean(p.what)}" for p in found),
                "No tensors, no models' bytes; what looks like a secret is blotted out. Look through it",
                f"before you send it: tar -xzf {path}",
            ]
        ),
    )
    return EXIT_OK


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())[:64] or "device"


def write(path: Path, directory: str, found: list[Piece]) -> int:
    """Writes the pieces as a gzipped tar that only the caller may read; its size in bytes.

    Raises Failure where there is a file already or none can be written.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise Failure(f"{path} is there already; name another file: `edgectl support-bundle FILE`") from None
    except OSError as e:
        raise Failure(
            f"{path} cannot be written: {e.strerror}; name another: `edgectl support-bundle /tmp/FILE.tar.gz`"
        ) from None
    try:
        with open(descriptor, "wb") as stream, tarfile.open(fileobj=stream, mode="w:gz") as tar:
            for piece in found:
                raw = piece.text.encode("utf-8", "backslashreplace")
                info = tarfile.TarInfo(f"{directory}/{piece.name}")
                info.size, info.mode, info.mtime = len(raw), 0o600, int(time.time())
                tar.addfile(info, io.BytesIO(raw))
        return path.stat().st_size
    except OSError as e:
        path.unlink(missing_ok=True)
        raise Failure(f"{path} could not be written: {e.strerror}; make room, or name another file") from None


# ---- pieces ---------------------------------------------------------------------------------------------


def pieces(source: Source) -> Iterator[Piece]:
    """Every piece there is to be had, the contents' list first."""
    found: list[Piece] = []
    missing: list[str] = []
    for name, what, collect in _PIECES:
        try:
            text = collect(source)
        except EdgedError as e:
            missing.append(f"{name}: {e.message}")
            continue
        except (OSError, ValueError, UnicodeError) as e:
            missing.append(f"{name}: {e}")
            continue
        if text is None:
            missing.append(f"{name}: there is nothing of the kind here")
        else:
            found.append(Piece(name, what, _bounded(blotted(text))))
    yield Piece("CONTENTS.txt", "this list", _contents(found, missing))
    yield from found


def _contents(found: list[Piece], missing: list[str]) -> str:
    lines = ["What an edged daemon and its machine looked like, made by `edgectl support-bundle`.", ""]
    lines += [f"{piece.name.ljust(24)} {piece.what}" for piece in found]
    lines += ["", "Not in it:", *(f"- {each}" for each in missing)] if missing else []
    lines += [
        "",
        "No tensors, no models' bytes, no settings of models but what the daemon says of them, and of",
    ]
    lines += ["environments only harmless variables. What looked like a secret reads as:", _BLOT, ""]
    return "\n".join(lines)


def blotted(text: str) -> str:
    """The text without what looks like a secret."""
    for pattern in _SECRETS:
        text = pattern.sub(_blot, text)
    return text


def _blot(found: re.Match[str]) -> str:
    quote = found[2][:1] if found[2][:1] in "\"'" else ""  # what was JSON stays JSON
    return f"{found[1]}{quote}{_BLOT}{quote}"


def _bounded(text: str) -> str:
    """The end of a text that is too long: of a log the newest lines."""
    raw = text.encode("utf-8", "backslashreplace")
    if len(raw) <= PIECE_BYTES_MAX:
        return text
    kept = raw[-PIECE_BYTES_MAX:].decode("utf-8", "ignore")
    return f"(the first {len(raw) - PIECE_BYTES_MAX} bytes were left out)\n{kept}"


def _json(document: Any) -> str:
    return json.dumps(document, indent=1, ensure_ascii=False, default=_plain) + "\n"


def _plain(value: object) -> object:
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)


def _versions(source: Source) -> str:
    facts = source.facts
    said = facts.daemon.status or facts.daemon.metadata or {}
    return _json(
        {
            "edgectl": __version__,
            "daemon": said.get("version"),
            "python": platform.python_version(),
            "machine": dataclasses.asdict(facts.machine),
            "packages": [dataclasses.asdict(each) for each in facts.packages],
            "made": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
    )


def _status(source: Source) -> str | None:
    status = source.facts.daemon.status
    return None if status is None else _json(status)


def _statistics(source: Source) -> str:
    return _json(source.session.client.statistics())


def _models(source: Source) -> str:
    """Of each name its rows, with hashes, and its history where the daemon may be asked for it."""
    client = source.session.client
    index = client.repository_index()
    names = sorted({str(row.get("name")) for row in index})
    models: dict[str, Any] = {}
    for name in names:
        models[name] = {"index": [row for row in index if row.get("name") == name]}
        if source.facts.daemon.status is None or len(models) > MODELS_MAX:
            continue
        status = client.server_status(name)
        models[name]["rows"] = [row for row in status.get("models") or () if row.get("name") == name]
        models[name]["history"] = status.get("history")
    return _json(models)


def _doctor(source: Source) -> str:
    return _json([dataclasses.asdict(each) for each in examine(source.facts)])


def _facts(source: Source) -> str:
    plain = dataclasses.asdict(source.facts)
    plain.pop("daemon")  # that is status.json
    return _json(plain)


def _config(source: Source) -> str | None:
    return source.root.text(source.facts.config_file) or None


def _unit(source: Source) -> str | None:
    user = source.facts.process is not None and source.facts.process.user_unit
    name = source.facts.unit.name
    said = source.run(["systemctl", *(["--user"] if user else []), "cat", name])
    if said is None or said[0] != 0:
        return None
    shown = source.run(["systemctl", *(["--user"] if user else []), "show", name])
    return said[1] + ("\n# systemctl show\n" + shown[1] if shown is not None else "")


def _journal(source: Source) -> str | None:
    process = source.facts.process
    if process is not None and not process.unit:
        return _end_of_file(process.stderr)
    if not source.facts.unit.known:
        return None
    command = journal_command(
        source.facts.unit.name,
        user=process is not None and process.user_unit,
        model=None,
        lines=JOURNAL_LINES_MAX,
        follow=False,
        since=None,
        explain=False,
        as_json=False,
        pager=False,
    )
    said = source.run([*command, "--output", "short-iso-precise"])
    return said[1] if said is not None and said[0] == 0 else None


def _end_of_file(path: str) -> str | None:
    if not path.startswith("/") or not os.path.isfile(path):
        return None
    with open(path, "rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - PIECE_BYTES_MAX))
        return stream.read(PIECE_BYTES_MAX).decode("utf-8", "replace")


def _kernel(source: Source) -> str | None:
    command = ["journalctl", "--dmesg", "--no-pager", "--lines", "500", "--case-sensitive=no"]
    said = source.run([*command, f"--grep={_KERNEL_WORDS}"])
    return said[1] if said is not None and said[0] == 0 and said[1].strip() else None


def _devices(source: Source) -> str:
    seen = source.facts.devices
    lines = [f"{stat.filemode(n.mode)[1:]} {n.owner}:{n.group} {n.path}" for n in seen.nodes]
    lines += [
        f"PCI {c.address} vendor {c.vendor} class {c.pci_class} driver {c.driver or '-'}" for c in seen.pci
    ]
    lines += [f"library {name}" for name in sorted(seen.libraries)]
    return "\n".join(lines or ["no accelerator's node, card or library"]) + "\n"


def _proc(source: Source) -> str:
    root = source.root
    parts = [(f"/proc/{name}", root.text(f"/proc/{name}")) for name in _PROC_FILES]
    workers = (source.facts.daemon.status or {}).get("workers") or ()
    pids = [source.facts.process.pid] if source.facts.process is not None else []
    pids += [worker["pid"] for worker in workers if isinstance(worker.get("pid"), int)]
    for pid in pids[:64]:
        parts += [(f"/proc/{pid}/{name}", root.text(f"/proc/{pid}/{name}")) for name in _PROCESS_FILES]
    text = "\n".join(f"==> {path}\n{text}\n" for path, text in parts if text)
    return re.sub(r"(?m)^Serial\b.*\n", "", text)  # a board's own number says nothing about a fault


def _mounts(source: Source) -> str:
    """The mounts that edged's directories lie on, and no others: options of those may hold credentials."""
    rows = [line.split(" ") for line in source.root.text("/proc/self/mounts").splitlines()]
    mounts = {row[1]: row for row in rows if len(row) >= 4}
    lines = []
    for place in source.facts.places:
        above = [str(p) for p in (Path(place.path), *Path(place.path).parents) if str(p) in mounts]
        if above:
            _, point, kind, options, *_ = mounts[above[0]]
            lines.append(f"{place.role}: {place.path} on {point}, {kind}, {options}")
    return "\n".join(lines) + "\n"


def _environment(source: Source) -> str | None:
    process = source.facts.process
    raw = source.root.bytes(f"/proc/{process.pid}/environ") if process is not None else b""
    lines = [
        line
        for line in raw.decode("utf-8", "replace").split("\0")
        if _HARMLESS.fullmatch(line.partition("=")[0])
    ]
    return "\n".join(sorted(lines)) + "\n" if lines else None


def _files(source: Source) -> str:
    """What lies in edged's directories: modes, owners, sizes and names."""
    lines: list[str] = []
    for place in source.facts.places:
        lines.append(f"==> {place.role}: {place.path}")
        for directory, folders, files in os.walk(source.root.at(place.path)):
            folders.sort()
            for name in sorted(files):
                if len(lines) >= LISTED_MAX:
                    return "\n".join([*lines, f"(and more than {LISTED_MAX} in all)", ""])
                lines.append(_listed(Path(directory, name), source.root))
    return "\n".join([*lines, ""])


def _listed(path: Path, root: Root) -> str:
    try:
        seen = path.lstat()
    except OSError as e:
        return f"? {path}: {e.strerror}"
    owner = f"{root.user_name(seen.st_uid)}:{root.group_name(seen.st_gid)}"
    when = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(seen.st_mtime))
    return f"{stat.filemode(seen.st_mode)} {owner} {seen.st_size:>12} {when} {path}"


_PIECES: tuple[tuple[str, str, Callable[[Source], str | None]], ...] = (
    ("versions.json", "versions of edged, Python, runtimes, libraries; the machine", _versions),
    ("doctor.json", "the findings of `edgectl doctor`", _doctor),
    ("facts.json", "what they rest on: users, groups, sockets, directories, unit, devices, memory", _facts),
    ("status.json", "what the daemon says of itself, its models, devices and resources", _status),
    ("statistics.json", "counts and times of each model", _statistics),
    ("models.json", "each model's hashes, states and what happened last", _models),
    ("edged.toml", "the daemon's settings", _config),
    ("unit.txt", "the service's unit with its drop-ins, and what systemd says of it", _unit),
    ("journal.txt", "the end of the daemon's log", _journal),
    ("kernel.txt", "what the kernel said of memory, devices and heat", _kernel),
    ("devices.txt", "accelerators' nodes, cards and libraries", _devices),
    ("proc.txt", "memory, processors, pressure, and limits of edged's processes", _proc),
    ("mounts.txt", "the file systems of edged's directories", _mounts),
    ("environment.txt", "variables that steer the daemon and its runtimes", _environment),
    ("files.txt", "names and sizes of the files in edged's directories", _files),
)


def contents() -> Mapping[str, str]:
    """What a bundle may hold, for the manual."""
    return {name: what for name, what, _ in _PIECES}
