"""`edgectl tune`: the daemon measures how a model runs best, and does so when its owner agrees.

The daemon measures and decides; this asks it to, shows what it has found, and tells it to apply it. Nothing
changes before that: Ctrl-C, or the death of this process, leaves everything as it was.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from edged.cli.commands import model_specs
from edged.cli.export import ExportError, export, settings_for
from edged.cli.session import EXIT_FAILED, EXIT_OK, EXIT_TIMEOUT, EXIT_USAGE, Failure, Session
from edged.cli.tables import Column, bar, clean, micros_text, table
from edged.errors import EdgedError
from edged.sizes import size_text

__all__ = ["budget", "plot", "setup_text", "tune"]

POLL_S = 0.2
"""How often the daemon is asked how far it is; each question costs it well under a millisecond."""

PLOT_WIDTH, PLOT_HEIGHT = 56, 12
"""Of the plot, in characters: with its labels it fits into 80 columns."""

LOG_FROM = 8.0
"""An axis over more than this ratio is logarithmic: points would else lie on one another."""

_BUDGET = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|min|h)?")
_UNITS_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}

_ROWS = (
    Column("runtime"),
    Column("device"),
    Column("threads", right=True),
    Column("instances", right=True),
    Column("batch", right=True),
    Column("p50", right=True),
    Column("p99", right=True, drop=1),
    Column("rows/s", right=True),
    Column("", role={"best": "good", "best, serves": "good", "pareto": "strong"}),
    Column("remark", flex=True, drop=2),
)


def budget(text: str) -> float:
    """`60s`, `2m`, `500ms` or a number of seconds."""
    match = _BUDGET.fullmatch(text)
    if match is None or not float(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no time such as 60s or 2m")
    return float(match[1]) * _UNITS_S[match[2] or "s"]


def tune(session: Session, args: argparse.Namespace) -> int:
    """Measures, shows, and applies with --yes or an answer on the terminal."""
    client = session.client
    target = _settings_file(session, args.model) if args.export else None
    report: dict[str, Any] = {}
    given = _given(session, args)
    try:
        with _interrupts_wait():
            budget_ms = max(1, round(args.budget * 1000))
            report = client.tune(args.model, aim=args.aim, budget_ms=budget_ms, **given)
        report = _wait(session, report, ("measuring",), math.inf, _follower(session))
        if report["state"] != "measured":
            raise Failure(_ending(report), EXIT_FAILED, reason=str(report["reason"]) or None)
        text = _text(session, report)
        if not session.as_json:
            print(text, flush=True)
        unproven = _accepted(session, report, args)
        applied = unproven or args.yes or _agreed(session, report)
        if applied:
            report = client.tune(args.model, "apply", tune=report["id"], unproven=unproven)
    except KeyboardInterrupt:
        with contextlib.suppress(EdgedError):
            client.tune(args.model, "cancel", tune=report.get("id"))
        session.note("cancelled: everything is as it was")
        raise
    if not applied:
        session.answer(report, "not applied: `--yes` does without a question")
        return EXIT_OK
    report = _wait(session, report, ("applying",), args.timeout, lambda _report: None)
    if report["state"] == "applying":
        raise Failure(f"'{args.model}' is still being loaded; `edgectl status` shows it", EXIT_TIMEOUT)
    if report["state"] != "applied":
        raise Failure(_ending(report), EXIT_FAILED, reason=str(report["reason"]) or None)
    done = f"'{args.model}' runs as {setup_text(report['best'])}, and will after a restart"
    if target is not None:
        try:
            changed = export(target[0], settings_for(report["best"]), within=target[1])
        except ExportError as e:
            raise Failure(f"{done}; but {e}", EXIT_FAILED, reason="NOT_EXPORTED") from None
        report = {**report, "exported": str(target[0])}
        done += f"\n{target[0]} {'says so now' if changed else 'said so already'}"
    session.answer(report, done)
    return EXIT_OK


def _given(session: Session, args: argparse.Namespace) -> dict[str, Any]:
    """What the person wants the model measured with: inputs, shapes, or neither."""
    if not args.input and not args.shape:
        return {}
    if args.input and args.shape:
        raise Failure(
            "-i gives inputs that have their shapes, --shape has some made up: take one", EXIT_USAGE
        )
    from edged.cli.inputs import InputError, read_inputs, read_shapes

    specs = model_specs(session.client.model_metadata(args.model))
    try:
        if args.shape:
            return {"shapes": read_shapes(args.shape, specs)}
        return {
            "inputs": read_inputs(args.input, specs, image_scale=args.image_scale, note=session.note),
            "timeout": args.timeout,
        }
    except InputError as e:
        raise Failure(str(e)) from None


@contextlib.contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Ctrl-C is heard at the end only: what was begun must be known before it can be cancelled."""
    if threading.current_thread() is not threading.main_thread():
        yield  # no signal is heard here
        return
    heard: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _frame: heard.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if heard:
        raise KeyboardInterrupt


def _settings_file(session: Session, model: str) -> tuple[Path, Path]:
    """Where a model's settings are, or would be, and the models folder; said before anything is measured."""
    status = session.client.server_status()
    rows = [row for row in status["models"] if row.get("name") == model and row.get("serving")]
    if not rows:
        raise Failure(f"'{model}' does not serve; `edgectl models` says why")
    models = session.models_dir(None, status)
    named = rows[0].get("settings_file")
    if named:
        path = models / str(named)
    elif (models / model).is_dir():
        path = models / model / "model.toml"
    else:
        path = models / f"{model}.toml"
    sums = path.parent / "SHA256SUMS"
    if path.name == "model.toml" and sums.is_file() and "model.toml" in sums.read_text(errors="replace"):
        raise Failure(
            f"{sums} names model.toml: written to, the bundle would not pass; export it where it is made"
        )
    return path, models


def _wait(
    session: Session,
    report: Mapping[str, Any],
    states: Sequence[str],
    timeout_s: float,
    show: Callable[[Mapping[str, Any]], None],
) -> dict[str, Any]:
    """Asks until the tune has left these states, or time is up."""
    until = time.monotonic() + timeout_s
    with session.progress() as progress:
        while True:
            show(report)
            if report["state"] not in states or time.monotonic() >= until:
                return dict(report)
            share = min(1.0, report["elapsed_s"] / report["budget_s"])
            now = report.get("measuring")
            what = f" {setup_text(now)}" if now else ""
            progress(f"{bar(share, 1.0)}{what}")
            time.sleep(POLL_S)  # a person watches: see POLL_S; `until` bounds it
            report = session.client.tune(report["name"], "status", tune=report["id"])


def _follower(session: Session) -> Callable[[Mapping[str, Any]], None]:
    """Says each setup once that was measured, where there is no terminal for a bar."""
    told: set[str] = set()

    def show(report: Mapping[str, Any]) -> None:
        for row in report["rows"]:
            text = setup_text(row)
            if session.err.width is None and text not in told:
                told.add(text)
                session.note(f"{text}: {_row_text(row)}")

    return show


def _row_text(row: Mapping[str, Any]) -> str:
    if not row["p50_us"]:
        return str(row["why"])
    return f"p50 {micros_text(row['p50_us'])}, {row['rows_s']:.0f} rows/s"


def setup_text(setup: Mapping[str, Any]) -> str:
    """`onnxruntime on CPU, 2 × 1 thread, batch 8`."""
    threads, instances = setup["threads"], setup["instances"]
    shape = f"{threads} thread{'' if threads == 1 else 's'}"
    if instances != 1:
        shape = f"{instances} × {shape}"
    batch = f", batch {setup['max_batch_size']}" if setup.get("max_batch_size") else ""
    return clean(f"{setup['runtime']} on {setup['device']}, {shape}{batch}")


def _ending(report: Mapping[str, Any]) -> str:
    return f"the tune of '{report['name']}' {report['state']}: {report['message'] or report['reason']}"


def _agreed(session: Session, report: Mapping[str, Any]) -> bool:
    """Asks the person at the terminal; without one nobody has agreed."""
    if session.as_json or not (sys.stdin.isatty() and session.out.width is not None):
        return False
    try:
        answer = input(f"run '{report['name']}' as {setup_text(report['best'])}? [Y/n] ")
    except EOFError:
        return False
    return answer.strip().lower() in ("", "y", "yes")


def _accepted(session: Session, report: Mapping[str, Any], args: argparse.Namespace) -> bool:
    """Whether the owner takes a setup whose answers may differ: by a flag of its own, or asked separately."""
    setup = report.get("best_unproven")
    if not setup:
        return False
    if args.yes:
        return bool(args.accept_unproven)
    if session.as_json or not (sys.stdin.isatty() and session.out.width is not None):
        return False
    try:
        answer = input(
            f"run '{report['name']}' as {setup_text(setup)}, though its answers may differ? [y/N] "
        )
    except EOFError:
        return False
    return answer.strip().lower() in ("y", "yes")


def _against(report: Mapping[str, Any]) -> str:
    """What speaks against each setup that was measured, all of it, each setup's device once."""
    parts: dict[str, list[str]] = {}
    for row in report["rows"]:
        if not row["current"] and not (row["agrees"] and row["proven"]):
            told = [*(row.get("obstacles") or [row["why"]]), *([row["remedy"]] if row.get("remedy") else [])]
            parts.setdefault(f"{row['runtime']} on {row['device']}", [clean(each) for each in told])
    return "\n".join(
        f"not proven: {where}" + "".join(f"\n  - {each}" for each in told) for where, told in parts.items()
    )


def _text(session: Session, report: Mapping[str, Any]) -> str:
    rows = sorted(report["rows"], key=lambda row: row["p50_us"] or math.inf)
    parts = [table(_ROWS, [_cells(row) for row in rows], session.out)] if rows else []
    points = [row for row in rows if row["p50_us"] and row["rows_s"]]
    if len(points) > 1:
        parts.append(plot(points))
    sizes = {size_text(row["size"]): None for row in rows if row.get("size")}
    parts += [f"measured at {text}" for text in sizes]
    if report["requests"]:
        parts.append(f"{report['requests']} requests came meanwhile: the figures are worse for it")
    same = report["best"] == report["current"]
    reached = "it serves so already" if same else f"it serves as {setup_text(report['current'])}"
    parts.append(f"best for {report['aim']}: {setup_text(report['best'])}; {reached}")
    against = _against(report)
    if against:
        parts.append(against)
    if report.get("best_unproven"):
        parts.append(
            f"best if that is accepted: {setup_text(report['best_unproven'])}; "
            "`--yes --accept-unproven` runs it so"
        )
    if report["message"]:
        parts.append(str(report["message"]))
    return "\n\n".join(parts)


def _cells(row: Mapping[str, Any]) -> list[object]:
    marks = [name for name in ("best", "current") if row[name]] or (["pareto"] if row["pareto"] else [])
    return [
        row["runtime"],
        row["device"],
        row["threads"],
        row["instances"],
        row["max_batch_size"] or "auto",
        micros_text(row["p50_us"]),
        micros_text(row["p99_us"]),
        f"{row['rows_s']:.0f}" if row["rows_s"] else None,
        ", ".join(marks).replace("current", "serves"),
        row["why"],
    ]


def plot(rows: Sequence[Mapping[str, Any]], *, width: int = PLOT_WIDTH, height: int = PLOT_HEIGHT) -> str:
    """The time of a run over the rows a second, in plain characters: `*` the best, `@` what serves, `o` those
    that no other one beats in both, `.` the rest."""
    across, up = _Axis([r["rows_s"] for r in rows], width), _Axis([r["p50_us"] for r in rows], height)
    grid = [[" "] * width for _ in range(height)]
    # The most telling mark is drawn last, and so over the others.
    for row in sorted(rows, key=lambda r: _MARKS.index(_mark(r))):
        grid[height - 1 - up.place(row["p50_us"])][across.place(row["rows_s"])] = _mark(row)
    labels = {0: micros_text(up.high), height - 1: micros_text(up.low)}
    left = max(len(text or "") for text in labels.values())
    lines = [f"{labels.get(n) or '':>{left}} |{''.join(line).rstrip()}" for n, line in enumerate(grid)]
    low, high = f"{across.low:.0f}", f"{across.high:.0f} rows/s"
    lines.append(f"{'':>{left}} +{'-' * width}")
    lines.append(f"{'':>{left}}  {low}{high:>{width - len(low)}}")
    lines.append(f"{'':>{left}}  p50 over rows/s; * best  @ serves  o pareto  . others")
    return "\n".join(lines)


_MARKS = ".o@*"


def _mark(row: Mapping[str, Any]) -> str:
    if row["best"]:
        return "*"
    if row["current"]:
        return "@"
    return "o" if row["pareto"] else "."


class _Axis:
    """Values of one kind and their places among `cells`."""

    def __init__(self, values: Sequence[float], cells: int) -> None:
        self.low, self.high = min(values), max(values)
        self._cells = cells
        self._scale = math.log if self.high > LOG_FROM * self.low else float

    def place(self, value: float) -> int:
        low, high = self._scale(self.low), self._scale(self.high)
        share = 0.5 if high <= low else (self._scale(value) - low) / (high - low)
        return round(share * (self._cells - 1))
