"""`edgectl logs`: the right journal, with the right fields.

Finds out whose daemon it is (the system's unit, a user's, or one that somebody started by hand) and hands
over to journalctl, which does the rest. A daemon without a unit writes to its standard error: where that is
a file its lines are shown from there, else a sentence says where they are.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from edged.cli.doctor import aim
from edged.cli.health.gather import Found, find
from edged.cli.health.root import Root
from edged.cli.session import EXIT_OK, Failure, Session

__all__ = ["about", "journal_command", "logs"]

_TAIL_BYTES_MAX = 16 << 20
"""Of a file, from its end: about 100,000 lines, of which one model's are looked for."""


def logs(session: Session, args: argparse.Namespace) -> int:
    """Shows the log of the daemon, or what of it is about one model."""
    asked = aim(session, args.unit)
    unit, found = asked.unit, find(asked, root=Root())
    process = found.process
    if process is not None and not process.unit:
        return _of_a_file(session, args, found)
    if not found.unit.known and process is None:
        why = f": {found.unit.error}" if found.unit.error else ""
        raise Failure(
            f"no daemon answers and there is no unit {unit}{why}; a daemon that was started by hand writes "
            "to its own standard error; `edgectl doctor` says more"
        )
    user = process is not None and process.user_unit
    command = journal_command(
        found.unit.name,
        user=user,
        model=args.model,
        lines=args.lines,
        follow=args.follow,
        since=args.since,
        explain=args.explain,
        as_json=session.as_json,
        pager=session.out.width is not None and not args.follow,
    )
    if shutil.which(command[0]) is None:
        raise Failure(f"journalctl is not installed here; elsewhere one would type: {shlex.join(command)}")
    sys.stdout.flush()
    try:
        code = subprocess.run(command, check=False).returncode
    except KeyboardInterrupt:
        return EXIT_OK
    if code != 0 and os.getuid() != 0 and not user:
        session.note(
            "the system's journal: `sudo edgectl logs`, or once `sudo usermod -aG systemd-journal $USER`"
        )
    return code


def journal_command(
    unit: str,
    *,
    user: bool,
    model: str | None,
    lines: int,
    follow: bool,
    since: str | None,
    explain: bool,
    as_json: bool,
    pager: bool,
) -> list[str]:
    """What is typed to see this unit's journal, or one model's part of it."""
    command = ["journalctl", "--user-unit" if user else "--unit", unit, "--lines", str(lines)]
    command += ["--follow"] if follow else []
    command += [] if pager else ["--no-pager"]
    command += ["--since", since] if since else []
    command += ["--catalog"] if explain else []
    command += ["--output", "json"] if as_json else []
    return command + ([f"MODEL={model}"] if model else [])


# ---- a daemon without a unit ----------------------------------------------------------------------------


def _of_a_file(session: Session, args: argparse.Namespace, found: Found) -> int:
    process = found.process
    assert process is not None
    where = process.stderr
    by_hand = f"this daemon (pid {process.pid}) is no service of systemd's: it writes to its standard error"
    path = Path(where)
    if not where.startswith("/") or not path.is_file():
        place = where or "which only its own user and root can see"
        raise Failure(
            f"{by_hand}, {place}; look there, in a container by the container's own `logs`, or start it with "
            "`edged --log-format json 2>FILE`"
        )
    if args.since:
        raise Failure(f"{by_hand}, {path}, and --since is the journal's; leave it out")
    if not os.access(path, os.R_OK):
        raise Failure(f"{by_hand}, {path}, which may not be read: `sudo tail -n {args.lines} {path}`")
    session.note(f"{by_hand}, {path}")
    for line in _last(about(_tail(path), args.model), args.lines):
        print(line)
    if args.follow:
        _follow(path, args.model)
    return EXIT_OK


def _tail(path: Path) -> Iterator[str]:
    with open(path, "rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - _TAIL_BYTES_MAX))
        raw = stream.read(_TAIL_BYTES_MAX)
    yield from raw.decode("utf-8", "replace").splitlines()


def _last(lines: Iterable[str], count: int) -> list[str]:
    return list(lines)[-count:]


def about(lines: Iterable[str], model: str | None) -> Iterator[str]:
    """The lines whose field MODEL is this one: of the log's JSON form or of its readable one."""
    if model is None:
        yield from lines
        return
    word = model if re.fullmatch(r"[^\s\"=\\]+", model) else json.dumps(model, ensure_ascii=False)
    readable = re.compile(rf"(?:^|\s)MODEL={re.escape(word)}(?:\s|$)")
    for line in lines:
        if line.startswith("{"):
            try:
                document = json.loads(line)
            except ValueError:
                continue
            if isinstance(document, dict) and document.get("MODEL") == model:
                yield line
        elif readable.search(line):
            yield line


def _follow(path: Path, model: str | None) -> None:
    """New lines as `tail` sees them, also when the file is replaced, until Ctrl-C."""
    sys.stdout.flush()
    with subprocess.Popen(
        ["tail", "-n", "0", "-F", str(path)],  # noqa: S607 - the one that the PATH has is the operator's
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        errors="replace",
    ) as tail:
        assert tail.stdout is not None
        try:
            for line in about((each.rstrip("\n") for each in tail.stdout), model):
                print(line, flush=True)
        except KeyboardInterrupt:
            return
        finally:
            tail.terminate()
