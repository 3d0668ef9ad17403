"""`edgectl operators`: makes the table of operators on which two runtimes agree here, on this very device.

The table that comes with edged holds for the versions of the runtimes and the instruction set that it was
made on. This makes another: it runs the same cases in child processes of its own, as the user whom the
daemon's state directory belongs to, and puts the result there. So it is for that user, or for root. The
daemon is asked for nothing but the directory's name, and takes the table up when it is started the next time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from edged.cli.session import EXIT_FAILED, EXIT_OK, EXIT_USAGE, Failure, Session
from edged.cli.tables import bar, duration_text

__all__ = ["operators", "side"]

_RESTART = "the daemon takes it up when it is started the next time: `systemctl restart edged`"


def side(text: str) -> tuple[str, str]:
    """`openvino:CPU` as (runtime, device)."""
    runtime, separator, device = text.partition(":")
    if not separator or not runtime or not device:
        raise argparse.ArgumentTypeError(f"{text!r} is no runtime and device such as openvino:CPU")
    return runtime, device


def operators(session: Session, args: argparse.Namespace) -> int:
    """Runs the cases and writes the table; exit code 0 when it is in its place."""
    from edged.runtimes.operators import TableError, read_table, table_name, write_table
    from edged.runtimes.trials import TrialsFailed, run_trials

    folder = _folder(session, args.state_dir)
    owner = folder.parent.stat()
    only = args.only or ()
    began = time.monotonic()
    with session.progress() as progress:

        def show(done: int, of: int) -> None:
            spent_s = time.monotonic() - began
            left = (
                f", about {duration_text(spent_s * (of - done) / done)} left" if spent_s > 10 and done else ""
            )
            progress(f"{bar(done / of, 1.0)} {done} of {of} cases{left}")

        try:
            table = run_trials(
                lambda settings, fd: _start(settings, fd, owner),
                (args.reference, args.candidate),
                only=only,
                progress=show,
            )
        except TrialsFailed as e:
            raise Failure(f"no table was made: {e}", EXIT_FAILED, reason="TRIALS_FAILED") from None
    path = folder / table_name(table.sides, table.instructions)
    if only:
        with contextlib.suppress(TableError):
            before = read_table(path)
            if not before.why_not(*table.sides):
                table = replace(table, rows={**before.rows, **table.rows})
    try:
        folder.mkdir(mode=0o755, exist_ok=True)
        write_table(table, path)
        if os.geteuid() == 0:
            for each in (folder, path):
                os.chown(each, owner.st_uid, owner.st_gid)
    except OSError as e:
        raise Failure(f"{path} cannot be written: {e.strerror}", EXIT_FAILED, reason="NOT_WRITTEN") from None
    finite = sum(1 for row in table.rows.values() if not row.finite)
    every = sum(1 for row in table.rows.values() if not row.finite and not row.nonfinite)
    report = {
        "path": str(path),
        "sides": [str(each) for each in table.sides],
        "instructions": table.instructions,
        "signatures": len(table.rows),
        "agree_finite": finite,
        "agree": every,
    }
    text = (
        f"{table.sides[0]} and {table.sides[1]} on {table.instructions}:\n"
        f"of {len(table.rows)} signatures of operators {finite} agree on finite values, "
        f"{every} on NaN and Inf too\n"
        f"{path}; {_RESTART}"
    )
    session.answer(report, text)
    return EXIT_OK


def _folder(session: Session, given: Path | None) -> Path:
    """Where the table goes; said before anything is run."""
    from edged.config import OPERATORS_DIR

    if given is None:
        status = session.status()
        if status is None:
            raise Failure("no running daemon names its state directory; name it with --state-dir", EXIT_USAGE)
        given = Path(str(status["state_dir"]))
    folder = given / OPERATORS_DIR
    place = folder if folder.exists() else given
    if not given.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise Failure(
            f"{place} may not be written to; type it as root, or as the user that the daemon runs as",
            EXIT_FAILED,
            reason="NOT_WRITABLE",
        )
    return folder


def _start(settings: Mapping[str, Any], fd: int, owner: os.stat_result) -> subprocess.Popen[bytes]:
    """A child that runs cases; root's are the state directory's owner, as the daemon's workers are."""
    from edged import sites
    from edged.process import bootstrap

    identity: dict[str, Any] = {}
    if os.geteuid() == 0 and owner.st_uid != 0:
        identity = {"user": owner.st_uid, "group": owner.st_gid, "extra_groups": []}
    environ = dict(os.environ)
    with contextlib.suppress(KeyError):
        del environ["PYTHONPATH"]  # what is run is the package that this command is of
    return subprocess.Popen(
        [sys.executable, *bootstrap("runtimes.trials", sites.site_paths("")), json.dumps(settings)],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,  # runtimes chatter there, and what ends one is in the table
        env=environ,
        pass_fds=(fd,),
        **identity,
    )
