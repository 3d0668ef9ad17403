"""What edgectl's commands do, but for `put`, `wait` (in `updates`) and `bench`.

Each takes the session and the parsed arguments, says its answer through the session, and returns the exit
code. Errors of the daemon pass through: `edgectl.main` turns them into a sentence and a code.
"""

from __future__ import annotations

import argparse
import time
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edged.cli.inputs import InputError, json_values, read_inputs
from edged.cli.publish import NAME
from edged.cli.session import EXIT_FAILED, EXIT_OK, Failure, Session
from edged.cli.tables import Column, bytes_text, clean, duration_text, fields, micros_text, paint, table
from edged.cli.waiting import reason_of
from edged.errors import PermissionDenied
from edged.tensors import TensorSpec, shape_text

__all__ = ["devices", "infer", "load", "model_specs", "models", "stats", "status", "unload", "watch"]

STATE_ROLES = {
    "READY": "good",
    "LOADING": "warn",
    "UNLOADING": "warn",
    "UNKNOWN": "warn",
    "UNAVAILABLE": "bad",
    "ready": "good",
    "starting": "warn",
    "stopping": "warn",
    "ok": "good",
    "absent": "dim",
    "not_installed": "dim",
    "no_permission": "bad",
    "driver_error": "bad",
    "busy": "warn",
    "timeout": "bad",
    "OK": "good",
    "WARN": "warn",
    "REFUSE_LOADS": "bad",
    "SHRINK": "bad",
    "SHED": "bad",
}

_VALUES_SHOWN = 12
"""More numbers than this say nothing on a terminal; --json and --npz have them all."""


def status(session: Session, args: argparse.Namespace) -> int:
    """The daemon, its devices, resources and models on one page."""
    del args
    document = session.client.server_status()
    resources = document.get("resources") or {}
    sample = resources.get("sample") or {}
    parts = [
        fields(_about(document, resources, sample, session), session.out),
        paint("Models", "strong", session.out),
        _models_table(document.get("models") or [], session) or "none",
        paint("Devices", "strong", session.out),
        _devices_table(document.get("devices") or [], session) or "none probed yet",
    ]
    session.answer(document, "\n\n".join(parts))
    return EXIT_OK


def _about(
    document: Mapping[str, Any], resources: Mapping[str, Any], sample: Mapping[str, Any], session: Session
) -> list[tuple[str, object]]:
    state = str(document.get("state", "unknown"))
    clients = document.get("clients") or {}
    level = str(resources.get("level") or "not measured yet")
    reasons = "; ".join(str(r) for r in resources.get("reasons") or ())
    fault = document.get("models_fault")
    available, total = (
        bytes_text(sample.get("memory_available_bytes")),
        bytes_text(sample.get("memory_total_bytes")),
    )
    return [
        ("edged", f"{document.get('version', '?')}, {state}, pid {document.get('pid', '?')}"),
        ("up", duration_text(document.get("uptime_s"))),
        ("endpoint", document.get("endpoint")),
        ("models", f"{document.get('models_dir', '?')}{f' (FAULT: {fault})' if fault else ''}"),
        ("resources", f"{level}{f': {reasons}' if reasons else ''}"),
        ("memory", f"{available} of {total} available" if available and total else None),
        ("for models", bytes_text(resources.get("memory_limit_bytes"))),
        ("daemon", bytes_text(sample.get("supervisor_rss_bytes"))),
        ("processor", _percent(sample.get("cpu_percent"))),
        ("temperature", _celsius(sample.get("temperature_c"))),
        ("disk free", bytes_text(sample.get("disk_free_bytes"))),
        ("requests", _clients_text(clients)),
        ("stored copies", _damaged_text(document.get("counters") or {})),
    ]


def _damaged_text(counters: Mapping[str, Any]) -> str | None:
    count = counters.get("damaged_copies")
    return f"{count} damaged since the start: see `edgectl logs`, and look at the disk" if count else None


def _percent(value: object) -> str | None:
    return f"{value:.0f} %" if isinstance(value, (int, float)) else None


def _celsius(value: object) -> str | None:
    return f"{value:.0f} °C" if isinstance(value, (int, float)) else None


def _clients_text(clients: Mapping[str, Any]) -> str | None:
    if not clients:
        return None
    return ", ".join(f"{value} {name.replace('_', ' ')}" for name, value in clients.items())


def models(session: Session, args: argparse.Namespace) -> int:
    """Each model version with its state; more of it where the admin socket may be asked."""
    if args.names:
        names = {str(e.get("name")) for e in session.client.repository_index()}
        for name in sorted(filter(NAME.fullmatch, names)):  # the index also lists what has no proper name
            print(name)
        return EXIT_OK
    entries = model_entries(session)
    session.answer({"models": entries}, _models_table(entries, session) or "no models in the folder yet")
    return EXIT_OK


def model_entries(session: Session) -> list[dict[str, Any]]:
    """What the daemon says of its models: the status where it may be asked, else the repository index."""
    try:
        return list(session.client.server_status().get("models") or [])
    except PermissionDenied:  # its admin socket is not for us
        return list(session.client.repository_index())


def _models_table(entries: Sequence[Mapping[str, Any]], session: Session) -> str:
    if not entries:
        return ""
    detailed = any("device" in e or "runtime" in e for e in entries)
    columns = [
        Column("model"),
        Column("version", right=True),
        Column("state", role=STATE_ROLES),
    ]
    if detailed:
        columns += [
            Column("device", drop=1),
            Column("runtime", drop=3),
            Column("prec", drop=5),
            Column("choice", drop=6),
            Column("threads", drop=7, right=True),
            Column("batch", drop=7, right=True),
            Column("p50", drop=2, right=True),
            Column("count", drop=4, right=True),
            Column("errors", drop=4, right=True),
            Column("memory", drop=5, right=True),
        ]
    columns.append(Column("reason", flex=True))
    rows = []
    for e in entries:
        row: list[object] = [e.get("name"), e.get("version"), e.get("state")]
        if detailed:
            p50 = e.get("p50_us")
            row += [
                e.get("device"),
                e.get("runtime"),
                e.get("precision"),
                e.get("choice"),
                _threads_text(e),
                (e.get("batch") or {}).get("max"),
                micros_text(p50) if p50 else None,
                e.get("infer_count"),
                e.get("error_count"),
                bytes_text(e.get("rss_bytes")) if e.get("rss_bytes") else None,
            ]
        why = reason_of(e) if e.get("reason") or e.get("message") else None
        row.append("; ".join(str(t) for t in (why, e.get("fallback_reason")) if t))
        rows.append(row)
    return table(columns, rows, session.out)


def _threads_text(entry: Mapping[str, Any]) -> str | None:
    """`4`, or `2 × 4` with two instances."""
    threads, instances = entry.get("threads"), entry.get("instances") or 1
    if not threads:
        return None
    return str(threads) if instances == 1 else f"{instances} × {threads}"


def devices(session: Session, args: argparse.Namespace) -> int:
    """Each device that was tried, with the verdict and what to do."""
    del args
    verdicts = session.client.server_status().get("devices") or []
    session.answer({"devices": verdicts}, _devices_table(verdicts, session) or "no device was probed yet")
    return EXIT_OK


def _devices_table(verdicts: Sequence[Mapping[str, Any]], session: Session) -> str:
    if not verdicts:
        return ""
    columns = [
        Column("runtime"),
        Column("device"),
        Column("status", role=STATE_ROLES),
        Column("version", drop=3),
        Column("fast", drop=4),
        Column("name", drop=2),
        Column("hint", flex=True),
    ]
    rows = [
        [
            v.get("runtime"),
            v.get("device"),
            v.get("status"),
            v.get("runtime_version"),
            v.get("precision_fast"),
            v.get("full_name"),
            v.get("hint"),
        ]
        for v in verdicts
    ]
    return table(columns, rows, session.out)


def stats(session: Session, args: argparse.Namespace) -> int:
    """Counts and mean times of each model version, as the statistics extension has them."""
    entries = session.client.statistics(args.model)
    columns = [
        Column("model"),
        Column("version", right=True),
        Column("ok", right=True),
        Column("failed", right=True),
        Column("refused", drop=5, right=True),
        Column("cancelled", drop=6, right=True),
        Column("queue", drop=3, right=True),
        Column("compute", drop=2, right=True),
        Column("mean", right=True),
        Column("p50", drop=1, right=True),
        Column("p90", drop=4, right=True),
        Column("p99", drop=1, right=True),
        Column("last", drop=7),
    ]
    session.answer(
        {"model_stats": entries},
        table(columns, [_stats_row(e) for e in entries], session.out)
        if entries
        else "no model was asked yet",
    )
    return EXIT_OK


def _stats_row(e: Mapping[str, Any]) -> list[object]:
    parts = e.get("inference_stats") or {}
    latency = e.get("latency_us") or {}

    def count(key: str) -> object:
        return (parts.get(key) or {}).get("count")

    return [
        e.get("name"),
        e.get("version"),
        count("success"),
        count("fail"),
        count("reject"),
        count("cancel"),
        _mean(parts.get("queue")),
        _mean(parts.get("compute_infer")),
        _mean(parts.get("success")),
        micros_text(latency.get("p50")) if latency.get("count") else None,
        micros_text(latency.get("p90")) if latency.get("count") else None,
        micros_text(latency.get("p99")) if latency.get("count") else None,
        _ago(e.get("last_inference")),
    ]


def _mean(part: Mapping[str, Any] | None) -> str | None:
    if not part or not part.get("count"):
        return None
    return micros_text(part["ns"] / part["count"] / 1e3)


def _ago(epoch_ms: object) -> str | None:
    if not isinstance(epoch_ms, (int, float)) or epoch_ms <= 0:
        return None
    ago = duration_text(max(0.0, time.time() - epoch_ms / 1e3))
    return f"{ago} ago"


def load(session: Session, args: argparse.Namespace) -> int:
    """Asks the daemon to look at the model again."""
    session.client.load(args.model)
    session.answer(
        {"name": args.model, "asked": "load"},
        f"{clean(args.model)}: load asked for; `edgectl wait {clean(args.model)}` says how it ends",
    )
    return EXIT_OK


def unload(session: Session, args: argparse.Namespace) -> int:
    """Takes the model out of service until load is asked for or its bytes change."""
    session.client.unload(args.model)
    session.answer({"name": args.model, "asked": "unload"}, f"{clean(args.model)}: unload asked for")
    return EXIT_OK


def watch(session: Session, args: argparse.Namespace) -> int:
    """Events as they come, until Ctrl-C or the count is full."""
    session.client.server_metadata()  # a subscription to nobody would wait in silence
    seen = 0
    with session.subscription(args.topic or ()) as subscription:
        if not session.as_json:
            session.note("waiting for events; Ctrl-C ends")
        while args.count is None or seen < args.count:
            event = subscription.next(None)
            if event is None:
                continue
            topic, body = event
            session.line({"topic": topic, **body}, _event_line(topic, body, session))
            seen += 1
    return EXIT_OK


_ENVELOPE = ("seq", "instance_id", "time_ns")


def _event_line(topic: str, body: Mapping[str, Any], session: Session) -> str:
    stamp = body.get("time_ns")
    moment = time.time() if not isinstance(stamp, int) or stamp < 1e18 else stamp / 1e9
    words = []
    for key, value in body.items():
        if key in _ENVELOPE or value in (None, "", []):
            continue
        text = clean("; ".join(map(str, value)) if isinstance(value, (list, tuple)) else value)
        if key == "sha256":
            text = text[:12]
        role = STATE_ROLES.get(text) if key in ("state", "status", "level") else None
        words.append(f"{clean(key)}={paint(text, role, session.out)}")
    clock = time.strftime("%H:%M:%S", time.localtime(moment))
    return f"{paint(clock, 'dim', session.out)}  {topic:<17} {' '.join(words)}"


def model_specs(metadata: Mapping[str, Any]) -> list[TensorSpec]:
    """The inputs that a model's metadata declares."""
    return [TensorSpec.from_wire(dict(wire)) for wire in metadata.get("inputs") or ()]


def infer(session: Session, args: argparse.Namespace) -> int:
    """One request, its inputs from the command line and files, its answer as text, JSON or .npz."""
    metadata = session.client.model_metadata(args.model, args.version, properties=False)
    try:
        inputs = read_inputs(
            args.input, model_specs(metadata), image_scale=args.image_scale, note=session.note
        )
    except InputError as e:
        raise Failure(str(e)) from None
    result = session.client.infer(
        args.model,
        inputs,
        version=args.version,
        outputs=args.output or None,
        timeout=args.timeout,
        decode_strings=False,  # a string that is not UTF-8 is shown escaped
    )
    outputs = dict(result.items())
    document: dict[str, Any] = {
        "model_name": result.model_name,
        "model_version": result.model_version,
        "device": result.device,
        "runtime": result.runtime,
        "precision": result.precision,
        "queue_us": result.queue_us,
        "compute_us": result.compute_us,
        "fallback_reason": result.fallback_reason,
        "warnings": result.warnings,
        "outputs": {name: _output_document(value) for name, value in outputs.items()},
    }
    exit_code = EXIT_OK
    if args.npz is not None:
        exit_code = _save(session, args.npz, outputs)
    for warning in document["warnings"]:
        session.note(f"warning: {warning}")
    session.answer(document, _infer_text(document, outputs, session))
    return exit_code


def _output_document(value: Any) -> Any:
    if not isinstance(value, np.ndarray):
        return {"datatype": type(value).__name__, "data": json_values(value)}
    return {"datatype": str(value.dtype), "shape": list(value.shape), "data": json_values(value)}


def _infer_text(document: Mapping[str, Any], outputs: Mapping[str, Any], session: Session) -> str:
    rows = [[name, *_output_cells(value)] for name, value in outputs.items()]
    columns = [
        Column("output"),
        Column("type", drop=2),
        Column("shape"),
        Column("largest", drop=1),
        Column("values", flex=True),
    ]
    where = f"{document['device']}, {document['runtime']} {document['precision'] or ''}".rstrip()
    head = fields(
        [
            ("model", f"{document['model_name']} version {document['model_version']}"),
            ("on", where),
            ("fallback", document["fallback_reason"]),
            ("compute", micros_text(document["compute_us"])),
            ("queue", micros_text(document["queue_us"])),
        ],
        session.out,
    )
    return f"{head}\n\n{table(columns, rows, session.out)}"


def _output_cells(value: Any) -> list[object]:
    if not isinstance(value, np.ndarray):
        text = str(json_values(value))
        return [type(value).__name__, None, None, text if len(text) < 300 else text[:299] + "…"]
    flat = value.reshape(-1)
    shown = " ".join(_number(v) for v in flat[:_VALUES_SHOWN])
    if flat.size > _VALUES_SHOWN:
        shown += f" … ({flat.size} in all)"
    return [str(value.dtype), shape_text(value.shape), _largest(value), shown]


def _number(value: Any) -> str:
    if isinstance(value, (float, np.floating)):
        return f"{float(value):.5g}"
    return str(json_values(value))


def _largest(value: np.ndarray[Any, Any]) -> str | None:
    """The place of the largest number in a vector: for a classifier, the class."""
    if value.dtype.kind != "f" or value.size < 2 or max(value.shape) != value.size or np.isnan(value).any():
        return None
    at = int(np.argmax(value))
    return f"[{at}] {_number(value.reshape(-1)[at])}"


def _save(session: Session, path: Path, outputs: Mapping[str, Any]) -> int:
    """Writes the tensors to `path`; what an .npz cannot hold is named.

    Without pickle that is what is no tensor, and strings that end in zero bytes: numpy takes those off.
    """
    plain: dict[str, Any] = {}
    left_out = []
    for name, value in outputs.items():
        if isinstance(value, np.ndarray) and value.dtype.kind != "O":
            plain[name] = value
        elif isinstance(value, np.ndarray):
            texts = [v if isinstance(v, bytes) else str(v).encode() for v in value.reshape(-1)]
            if any(text.endswith(b"\0") for text in texts):
                left_out.append(name)
                continue
            plain[name] = np.array(texts, dtype="S").reshape(value.shape)
        else:
            left_out.append(name)
    try:
        with zipfile.ZipFile(path, "w") as archive:  # np.savez can not take an output that is called `file`
            for name, array in plain.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as f:
                    np.lib.format.write_array(f, array, allow_pickle=False)
    except OSError as e:
        raise Failure(f"{path} could not be written: {e.strerror}") from None
    if left_out:
        session.note(
            f"not in {path}, since they are no tensors, or strings that end in zero bytes: "
            f"{', '.join(left_out)}; --json has them"
        )
        return EXIT_FAILED
    return EXIT_OK
