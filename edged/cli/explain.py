"""`edgectl explain MODEL`: where it came from, why it runs where it does, what happened last, what to type.

`explain` is pure: the daemon's status, which has the model's history, becomes sections of sentences. It says
only what the daemon knows: a figure that was not measured is not shown, and a choice is explained by the rule
that made it.
"""

from __future__ import annotations

import argparse
import re
import shlex
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edged.catalog import CATALOG
from edged.cli.health.words import times
from edged.cli.session import EXIT_FAILED, EXIT_OK, Session
from edged.cli.tables import bytes_text, clean, duration_text, micros_text, paint
from edged.cli.waiting import reason_of
from edged.sizes import MEASURED_MAX, shapes_text, size_text

__all__ = ["Explanation", "explain", "explain_command"]

_Row = Mapping[str, Any]

_CHOICES = {
    "pinned": "its settings say so{pins}",
    "measured": "it was measured against the others; none shown to agree saves another tenth and 50 µs",
    "tuned": "its owner had it measured with `edgectl tune`, and it was the best",
    "remembered": "that was measured before, for this very content on this machine, and remembered",
    "inherited": "its version before ran there; the others are measured when nobody asks",
    "default": "it is the first of [devices] order that works; the others are measured when nobody asks",
}

_NEXT: dict[str, tuple[str, ...]] = {
    "MODEL_UNLOADED": ("edgectl load {name}",),
    "MODEL_LOADING": ("edgectl wait {name}",),
    "MODEL_QUARANTINED": ("edgectl put FILE --name {name} --wait", "edgectl load {name}"),
    "MODEL_INVALID": ("edgectl put FILE --name {name} --wait",),
    "MODEL_UNSUPPORTED": ("edgectl devices", "edgectl put FILE --name {name} --wait"),
    "GOLDEN_MISMATCH": ("edgectl put FILE --name {name} --wait", "edgectl logs {name}"),
    "NOT_BATCHABLE": ("edgectl put FILE --name {name} --settings SETTINGS --wait",),
    "SETTINGS_INVALID": ("edgectl put FILE --name {name} --settings SETTINGS --wait",),
    "COPY_DAMAGED": ("edgectl put FILE --name {name} --wait", "dmesg"),
    "COPY_UNREADABLE": ("edgectl doctor", "edgectl load {name}"),
    "FILE_DAMAGED": ("edgectl put FILE --name {name} --wait", "dmesg"),
    "CHECKSUM_MISMATCH": ("edgectl put FILE --name {name} --wait",),
    "EMPTY_FILE": ("edgectl put FILE --name {name} --wait",),
    "INCOMPLETE": ("edgectl put FILE --name {name} --wait",),
    "NAME_CLASH": ("ls -l {models}",),
    "NAME_INVALID": ("ls -l {models}",),
    "UNREADABLE": ("edgectl doctor", "ls -l {models}"),
    "UNSAFE_FILE": ("ls -l {models}",),
    "DISK_FULL": ("edgectl doctor", "df -h {state}"),
    "STORE_FULL": ("df -h {state}", "edgectl doctor"),
    "STORE_FAILED": ("edgectl doctor", "edgectl logs"),
    "MEMORY_PRESSURE": ("edgectl status", "edgectl unload OTHER"),
    "MEMORY_LIMIT": ("edgectl status", "edgectl logs {name}"),
    "DEVICE_UNAVAILABLE": ("edgectl devices", "edgectl doctor"),
    "DEVICE_FAILED": ("edgectl doctor", "edgectl load {name}"),
    "MODEL_LOAD_TIMEOUT": ("edgectl top", "edgectl load {name}"),
    "WORKER_CRASHED": ("edgectl logs {name}", "edgectl support-bundle"),
}
"""What helps against each reason; what is not here is in the journal."""

_HAPPENED_MAX = 12
"""Lines of history that fit a screen; --json has all."""


@dataclass(frozen=True)
class Explanation:
    """A headline, sections of a title and lines, and commands to type next; `serves` when it answers."""

    headline: str
    sections: tuple[tuple[str, tuple[str, ...]], ...]
    commands: tuple[str, ...]
    serves: bool


def explain_command(session: Session, args: argparse.Namespace) -> int:
    """Explains one model; exit code 1 when it does not serve."""
    status = session.client.server_status(args.model)
    rows = [row for row in status.get("models") or () if row.get("name") == args.model]
    found = explain(status, args.model, now_s=time.time())
    document = {
        "name": args.model,
        "headline": found.headline,
        "serves": found.serves,
        "sections": [{"title": title, "lines": list(lines)} for title, lines in found.sections],
        "next": list(found.commands),
        "models": rows,
        "history": status.get("history") or [],
    }
    session.answer(document, _text(found, session))
    return EXIT_OK if found.serves else EXIT_FAILED


def _text(found: Explanation, session: Session) -> str:
    parts = [paint(clean(found.headline), "good" if found.serves else "bad", session.out)]
    for title, lines in found.sections:
        body = "\n".join(part for line in lines for part in _wrapped(clean(line), session.out.width))
        parts.append(f"{paint(title, 'strong', session.out)}\n{body}")
    return "\n\n".join(parts)


def _wrapped(line: str, width: int | None) -> list[str]:
    if width is None:
        return [f"  {line}"]
    return textwrap.wrap(line, width, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)


def explain(status: Mapping[str, Any], name: str, *, now_s: float) -> Explanation:
    """All there is to say about the model `name`, whose history the status must have."""
    rows = [row for row in status.get("models") or () if row.get("name") == name]
    history = list(status.get("history") or ())
    serving = [row for row in rows if row.get("serving")]
    refused = [row for row in rows if row.get("state") == "UNAVAILABLE" and not row.get("serving")]
    coming = [row for row in rows if row.get("state") == "LOADING" and not row.get("serving")]
    sections: list[tuple[str, tuple[str, ...]]] = []
    for row in serving or coming[:1]:
        version = f" (version {row.get('version')})" if len(serving) > 1 else ""
        sections += [
            (f"Where it came from{version}", tuple(_origin(row, status, now_s))),
            (f"Why it runs there{version}", tuple(_place(row, status))),
            (f"How it runs{version}", tuple(_running(row))),
        ]
    if refused:
        sections.append(("What is refused", tuple(_refusal(row) for row in refused)))
    happened = tuple(_happening(each, now_s) for each in history[-_HAPPENED_MAX:])
    sections.append(("What happened last", happened or ("nothing since the daemon was started",)))
    commands = tuple(dict.fromkeys(_commands(name, rows, history, status)))
    sections.append(("What to type next", commands or ("nothing: it serves as it should",)))
    headline = _headline(name, serving, refused, coming, status)
    return Explanation(headline, tuple(s for s in sections if s[1]), commands, bool(serving))


def _headline(
    name: str, serving: Sequence[_Row], refused: Sequence[_Row], coming: Sequence[_Row], status: _Row
) -> str:
    if serving:
        versions = ", ".join(str(row.get("version")) for row in serving)
        row = serving[0]
        where = f"{row.get('runtime')} on {row.get('device')}"
        text = f"{name} version {versions} serves: {where}{_in_brackets(row.get('precision'))}"
        if row.get("state") != "READY":
            text = f"{name} version {versions} is {row.get('state')}: {reason_of(row)}"
        if refused:
            text += "; a newer content is refused"
        return text + ("; the next one is loading" if coming else "")
    if coming:
        return f"{name} is on its way: {reason_of(coming[0])}"
    if refused:
        return f"{name} does not serve: {reason_of(refused[0])}"
    fault = f"; {status['models_fault']}" if status.get("models_fault") else ""
    return f"{name} is not there any more{fault}"


def _in_brackets(value: object) -> str:
    return f" ({value})" if value else ""


def _origin(row: _Row, status: _Row, now_s: float) -> Iterator[str]:
    source = f"{status.get('models_dir')}/{row['source']}" if row.get("source") else "the models folder"
    size = bytes_text(row.get("size_bytes"))
    yield f"{source}{_in_brackets(', '.join(t for t in (row.get('format'), size) if t))}"
    yield f"version {row.get('version')}, SHA-256 {row.get('sha256') or 'unknown'}"
    if row.get("ready_ms"):
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row["ready_ms"] / 1000))
        ago = duration_text(max(0.0, now_s - row["ready_ms"] / 1000))
        load = f", its load took {micros_text(1000 * row['load_ms'])}" if row.get("load_ms") else ""
        yield f"ready since {since}, {ago} ago{load}"
    settings = row.get("settings") or {}
    if row.get("settings_file"):
        said = ", ".join(f"{key} = {value}" for key, value in settings.items()) or "nothing but defaults"
        yield f"settings {status.get('models_dir')}/{row['settings_file']}: {said}"
    else:
        yield "no settings file: everything is measured or the default"


def _place(row: _Row, status: _Row) -> Iterator[str]:
    settings = row.get("settings") or {}
    pins = ", ".join(f"{key} = {settings[key]}" for key in ("device", "runtime") if key in settings)
    choice = str(row.get("choice") or "default")
    why = _CHOICES.get(choice, "the daemon calls the choice {choice}")
    yield (
        f"{row.get('runtime')} on {row.get('device')} ({choice}): "
        f"{why.format(pins=f' ({pins})' if pins else '', choice=choice)}"
    )
    if row.get("fallback_reason"):
        yield f"a fallback: {row['fallback_reason']}"
        if row.get("policy") != "require":
            yield 'policy = "require" in its settings would refuse it instead'
    precise = "as the model says" if row.get("precision") == "f32" else "its settings allow precision = fast"
    if row.get("precision"):
        yield f"precision {row['precision']}: {precise}"
    told = {(row.get("runtime"), row.get("device"))}
    for measured in row.get("measured") or ():
        told.add((measured.get("runtime"), measured.get("device")))
        yield _measured(measured, row)
    for tried in row.get("tried") or ():
        told.add((tried.get("runtime"), tried.get("device")))
        yield (
            f"{tried.get('runtime')} on {tried.get('device')} was tried and failed: {tried.get('reason')}: "
            f"{tried.get('message')}"
        )
    yield from _not_taken(row, status, told)


def _measured(measured: _Row, row: _Row) -> str:
    where = _setup(measured)
    p50, reference = measured.get("p50_us"), measured.get("reference_p50_us")
    why = str(measured.get("why") or "")
    if p50 is None or reference is None:
        return f"measured: {where}: no figures{f': {why}' if why else ''}"
    figures = f"{micros_text(p50)} against {micros_text(reference)}"
    if measured.get("rows_s"):
        figures += f", {measured['rows_s']:.0f} rows/s"
    if measured.get("size"):
        figures += f", at {size_text(measured['size'])}"
    runs_so = all(measured.get(key) in (None, row.get(key)) for key in _SETUP)
    # An older daemon does not say what was proven.
    allowed = measured.get("agrees") and measured.get("proven", True)
    if not allowed and not runs_so:
        gain = f"{reference / p50:.1f} × as fast, but" if p50 < reference else "no faster, and"
        return f"measured: {where}: {figures} (p50), {gain} it may not serve: {why}"
    verdict = "its answers agree" if measured.get("agrees") else "its answers are not shown to agree"
    text = f"measured: {where}: {figures} (p50); {verdict}{f' ({why})' if why else ''}"
    if runs_so:
        return f"{text}; it runs so now"
    if p50 < reference and row.get("choice") in ("measured", "remembered"):
        return f"{text}; the gain is too small to switch for"
    return text


_SETUP = ("runtime", "device", "threads", "instances")


def _setup(measured: _Row) -> str:
    parts = [f"{measured.get('runtime')} on {measured.get('device')}"]
    if measured.get("threads"):
        parts.append(f"{measured['threads']} thread{'' if measured['threads'] == 1 else 's'}")
    if (measured.get("instances") or 1) > 1:
        parts.append(f"{measured['instances']} instances")
    return ", ".join(parts)


def _not_taken(row: _Row, status: _Row, told: set[tuple[Any, Any]]) -> Iterator[str]:
    for device in status.get("devices") or ():
        key = (device.get("runtime"), device.get("device"))
        if key in told:
            continue
        verdict = str(device.get("status"))
        if verdict == "ok":
            why = {
                "pinned": "works; the settings name another",
                "remembered": "works; it was compared when the choice was made",
                "tuned": "works; `edgectl tune` chose another",
            }.get(str(row.get("choice")), "works; not measured yet")
        elif verdict == "absent":
            why = "is not on this machine"
        else:
            why = f"{verdict}{': ' if device.get('hint') else ''}{device.get('hint') or ''}"
        yield f"not taken: {key[0]} on {key[1]}: {why}"


def _running(row: _Row) -> Iterator[str]:
    instances = row.get("instances") or 1
    parts = [f"{instances} instance{'' if instances == 1 else 's'}"]
    if row.get("threads"):
        parts.append(f"{row['threads']} thread{'' if row['threads'] == 1 else 's'} each")
    if row.get("pid"):
        parts.append(f"worker {row['pid']}")
    if row.get("rss_bytes"):
        parts.append(f"{bytes_text(row['rss_bytes'])} memory")
    yield ", ".join(parts)
    sizes = [each for each in row.get("sizes") or () if each.get("source") == "requests"]
    if sizes:
        named = "; ".join(f"{shapes_text(e['shapes'])} ({e['count']})" for e in sizes[:MEASURED_MAX])
        yield f"sizes of its requests (how often): {named}"
    batch = row.get("batch")
    if isinstance(batch, Mapping):
        most = batch.get("max") or 1
        what = f"up to {most} rows of different requests share a run" if most > 1 else "no batching"
        yield _batch_text(what, batch)
    if row.get("changes"):
        yield f"the same request may be answered otherwise each time: {row['changes']}"
    count, errors = row.get("infer_count") or 0, row.get("error_count") or 0
    text = f"{count} answered, {errors} failed"
    if count and row.get("p50_us"):
        text += f"; p50 {micros_text(row['p50_us'])}, p99 {micros_text(row.get('p99_us'))} with the queue"
    yield f"{text}; {row.get('queue') or 0} waiting, {row.get('in_flight') or 0} running"
    if row.get("restarts"):
        yield f"its worker was started again {times(row['restarts'])}"


def _batch_text(what: str, batch: Mapping[str, Any]) -> str:
    sizes = ", ".join(f"{rows}: {micros_text(us)}" for rows, us in batch.get("times_us") or ())
    return (
        what + (f": {batch['why']}" if batch.get("why") else "") + (f" (rows: time {sizes})" if sizes else "")
    )


def _refusal(row: _Row) -> str:
    version = f"version {row['version']}: " if row.get("version") else ""
    digest = f" (SHA-256 {str(row['sha256'])[:12]}…)" if row.get("sha256") else ""
    return f"{version}{reason_of(row)}{digest}"


def _happening(each: Mapping[str, Any], now_s: float) -> str:
    time_s = float(each.get("time_ms") or 0) / 1000
    when = time.strftime(
        "%Y-%m-%d %H:%M:%S" if now_s - time_s > 43_200 else "%H:%M:%S", time.localtime(time_s)
    )
    kind = str(each.get("event"))
    said = CATALOG[kind].message if kind in CATALOG else kind
    fields = {k: v for k, v in (each.get("fields") or {}).items() if v}
    words = [f"{key.lower().replace('_', ' ')} {value}" for key, value in fields.items()]
    return f"{when}  {said}{': ' if words else ''}{', '.join(words)}"


def _commands(name: str, rows: Sequence[_Row], history: Sequence[_Row], status: _Row) -> Iterator[str]:
    """What helps, the most likely first; nothing for a model that serves as it should."""
    words = {
        "name": shlex.quote(name),
        "models": shlex.quote(str(status.get("models_dir"))),
        "state": shlex.quote(str(status.get("state_dir"))),
    }
    for row in rows:
        if row.get("serving") and row.get("state") == "READY":
            if row.get("fallback_reason"):
                yield from ("edgectl devices", "edgectl doctor")
            for measured in row.get("measured") or ():
                yield from re.findall(r"`(edgectl operators[^`]*)`", str(measured.get("remedy") or ""))
            if row.get("restarts"):
                yield f"edgectl logs {words['name']}"
        else:
            reason = str(row.get("reason") or "").partition(":")[0]
            for command in _NEXT.get(reason, ("edgectl logs {name}",)):
                yield command.format(**words)
    if not rows:
        yield "edgectl models"
        if history:
            yield f"edgectl logs {words['name']}"
