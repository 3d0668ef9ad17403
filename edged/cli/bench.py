"""`edgectl bench`: how long a model takes through the daemon, and what of that is the daemon.

One client's latency is measured in this process. Beside it, where ONNX Runtime and the model's file can be
had, the bare runtime with its defaults runs the same input; the two take turns in short slots, with a pause
between them, since a baseline whose threads still spin slows down whatever comes next. Several clients are
processes of their own: threads would share one interpreter, and the figure would be Python's.

A client process gets its orders as one JSON line and an `.npz` on stdin, says `ready`, waits for a line,
and answers with raw float64 latencies in µs.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from edged.cli.commands import model_specs
from edged.cli.inputs import InputError, read_inputs, read_shapes, synthetic
from edged.cli.session import EXIT_OK, EXIT_USAGE, Failure, Session
from edged.cli.tables import Column, bar, fields, micros_text, table
from edged.clientwire import InferResult
from edged.errors import EdgedError, InvalidArgument
from edged.sites import site_paths
from edged.sizes import LEAST, fit, have_free, shapes_text, size_text
from edged.tensors import TensorSpec
from edged.typical import least, typical

__all__ = ["CLIENTS_MAX", "Samples", "bench", "percentiles", "run_slots"]

CLIENTS_MAX = 64
"""More client processes than this measure the machine's scheduler."""

PAUSE_S = 0.1
"""Between slots: ONNX Runtime's threads spin for some milliseconds after a run; this is well beyond."""

_SLOT_S = 0.5
"""Short enough that both sides see the same machine, long enough for dozens of runs of a slow model."""

_WARMUP_RUNS = 5

_START_TIMEOUT_S = 30.0

_REFUSALS = ("RUNTIME_ERROR", "MEMORY_LIMIT")
"""Besides INVALID_ARGUMENT, what an answer to a size that a model does not take may have as its reason."""

_REFUSED_MAX = 120
"""Characters that are repeated of what the model said to it."""

Run = Callable[[], object]


@dataclass
class Samples:
    """Latencies in µs, how long they took to collect, and how many paced starts came late."""

    latencies_us: list[float] = field(default_factory=list)
    seconds: float = 0.0
    late: int = 0


def bench(session: Session, args: argparse.Namespace) -> int:
    """Measures, and says what came out."""
    _check(args)
    metadata = session.client.model_metadata(args.model, args.version, properties=False)
    specs = model_specs(metadata)
    inputs, size, first = _first(session, args, specs)

    def through_edged() -> object:
        return session.client.infer(args.model, inputs, version=args.version, timeout=args.timeout)

    document: dict[str, Any] = {
        "model": args.model,
        "version": first.model_version,
        "device": first.device,
        "runtime": first.runtime,
        "precision": first.precision,
        "size": size,
        "input_bytes": int(sum(a.nbytes for a in inputs.values())),
        "rate_hz": args.rate,
    }
    bare = _bare_runtime(session, args, inputs)
    targets: dict[str, Run] = {"edged": through_edged} | ({bare.name: bare.run} if bare else {})
    total_s = args.seconds * len(targets) + (args.seconds if args.clients > 1 else 0.0)
    with session.progress() as show:
        samples = run_slots(
            targets, args.seconds, rate_hz=args.rate, tick=lambda s: show(f"{bar(s, total_s)} 1 client")
        )
        many = None
        if args.clients > 1:
            spent = args.seconds * len(targets)
            many = _many_clients(
                session,
                args,
                inputs,
                tick=lambda s: show(f"{bar(spent + s, total_s)} {args.clients} clients"),
            )
    document["one_client"] = _figures(samples["edged"])
    if bare:
        document["bare"] = {"runtime": bare.name, **_figures(samples[bare.name])}
        document["overhead"] = _overhead(samples["edged"], samples[bare.name])
    if many is not None:
        document["clients"] = {"clients": args.clients, **_figures(many)}
    session.answer(document, _text(document, session))
    return EXIT_OK


def _check(args: argparse.Namespace) -> None:
    if not 1 <= args.clients <= CLIENTS_MAX:
        raise Failure(f"--clients takes 1 to {CLIENTS_MAX}", EXIT_USAGE)
    if not 0 < args.seconds <= 3600:
        raise Failure("--seconds takes more than 0 and at most 3600", EXIT_USAGE)
    if args.rate is not None and not 0 < args.rate <= 100_000:
        raise Failure("--rate takes more than 0 and at most 100000 requests a second", EXIT_USAGE)


def _first(
    session: Session, args: argparse.Namespace, specs: Sequence[TensorSpec]
) -> tuple[dict[str, NDArray[Any]], dict[str, Any], InferResult]:
    """What to measure with, its size and where this comes from, and the first answer to it.

    Of the sizes that are known or guessed the first that the model takes.
    """
    try:
        if args.input:
            inputs = read_inputs(args.input, specs, image_scale=args.image_scale, note=session.note)
            return inputs, _size("owner", inputs, ""), _ask(session, args, inputs)
        sizes = _sizes(session, args, specs)
    except InputError as e:
        raise Failure(str(e)) from None
    refused = ""
    for source, shapes in sizes[:-1]:
        inputs = synthetic(specs, shapes)
        try:
            return inputs, _size(source, inputs, refused), _ask(session, args, inputs)
        except EdgedError as e:
            if not isinstance(e, InvalidArgument) and e.reason not in _REFUSALS:
                raise
            refused = f"{shapes_text(shapes)} was refused: {e.message[:_REFUSED_MAX]}"
            session.note(refused)
    source, shapes = sizes[-1]
    inputs = synthetic(specs, shapes)
    return inputs, _size(source, inputs, refused), _ask(session, args, inputs)


def _ask(session: Session, args: argparse.Namespace, inputs: Mapping[str, NDArray[Any]]) -> InferResult:
    return session.client.infer(args.model, inputs, version=args.version, timeout=args.timeout)


def _size(source: str, inputs: Mapping[str, NDArray[Any]], note: str) -> dict[str, Any]:
    shapes = {name: list(array.shape) for name, array in inputs.items()}
    return {"source": source, "shapes": shapes, "note": note}


def _sizes(
    session: Session, args: argparse.Namespace, specs: Sequence[TensorSpec]
) -> list[tuple[str, Mapping[str, Sequence[int]]]]:
    """(source, shapes), the best first: what was named, golden samples', requests', typical ones."""
    named = read_shapes(args.shape, specs)
    if named:
        return [("owner", shapes) for shapes in typical(specs, named)] or [("owner", named)]
    if not have_free(specs):
        return [("declared", least(specs))]
    known = [(str(row["source"]), row["shapes"]) for row in _known_sizes(session, args)]
    sizes = [(source, shapes) for source, shapes in known if fit(shapes, specs)]
    return [*sizes, *(("typical", shapes) for shapes in typical(specs)), (LEAST, least(specs))]


def _known_sizes(session: Session, args: argparse.Namespace) -> list[Mapping[str, Any]]:
    """What the daemon knows; nothing for those who may not ask its admin socket."""
    try:
        rows = session.client.server_status(args.model).get("models") or []
    except EdgedError as e:
        session.note(f"the sizes that requests had cannot be asked for: {e.message}")
        return []
    version = None if args.version is None else str(args.version)
    for row in rows:
        if row.get("name") == args.model and row.get("serving") and version in (None, row.get("version")):
            return list(row.get("sizes") or [])
    return []


def run_slots(
    targets: Mapping[str, Run],
    seconds: float,
    *,
    rate_hz: float | None = None,
    tick: Callable[[float], None] = lambda _: None,
) -> dict[str, Samples]:
    """Runs the targets in turns until each had `seconds`; returns the samples of each."""
    samples = {name: Samples() for name in targets}
    for run in targets.values():
        for _ in range(_WARMUP_RUNS):
            run()
    done_s = 0.0
    while any(s.seconds < seconds for s in samples.values()):
        for name, run in targets.items():
            if len(targets) > 1:
                time.sleep(PAUSE_S)  # time is what is wanted: see PAUSE_S
            collect(
                run, min(_SLOT_S, max(0.0, seconds - samples[name].seconds)), samples[name], rate_hz=rate_hz
            )
            done_s = sum(s.seconds for s in samples.values())
            tick(done_s)
    return samples


def collect(run: Run, seconds: float, into: Samples, *, rate_hz: float | None) -> None:
    """Calls `run` for `seconds`, paced to `rate_hz` where given; a call is timed from its start, and a start
    that came later than its turn is counted."""
    period = None if rate_hz is None else 1.0 / rate_hz
    clock = time.perf_counter
    started = now = clock()
    end = started + seconds
    due = started
    while True:
        before = clock()
        run()
        now = clock()
        into.latencies_us.append((now - before) * 1e6)
        if now >= end:
            break
        if period is not None:
            due += period
            if now > due:
                into.late += 1
                due = now
            else:
                time.sleep(due - now)  # the pace that was asked for
    into.seconds += now - started


def percentiles(latencies_us: Sequence[float] | NDArray[Any]) -> dict[str, float]:
    """p50, p90, p99, the best, the worst and the mean, in µs."""
    values = np.asarray(latencies_us, dtype=float)
    p50, p90, p99 = np.percentile(values, [50, 90, 99])
    return {
        "p50_us": float(p50),
        "p90_us": float(p90),
        "p99_us": float(p99),
        "min_us": float(values.min()),
        "max_us": float(values.max()),
        "mean_us": float(values.mean()),
    }


def _figures(samples: Samples) -> dict[str, Any]:
    return {
        "count": len(samples.latencies_us),
        "per_second": len(samples.latencies_us) / samples.seconds,
        "late": samples.late,
        **percentiles(samples.latencies_us),
    }


def _overhead(edged: Samples, bare: Samples) -> dict[str, float]:
    ours, theirs = percentiles(edged.latencies_us)["p50_us"], percentiles(bare.latencies_us)["p50_us"]
    return {"p50_ratio": ours / theirs, "p50_added_us": ours - theirs}


# ---- the bare runtime -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Bare:
    name: str
    run: Run


def _bare_runtime(
    session: Session, args: argparse.Namespace, inputs: Mapping[str, NDArray[Any]]
) -> _Bare | None:
    """ONNX Runtime with its defaults on the same file, or None with a note that says why not."""
    if args.no_bare:
        return None
    path = args.onnx or _file_in_folder(session, args.model)
    if path is None:
        session.note(
            "no comparison with the bare runtime: the model's file can not be read here; name it with --onnx"
        )
        return None
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # before the import: it looks a host up otherwise
    sys.path[:0] = site_paths("onnxruntime")
    try:
        import onnxruntime
    except ImportError:
        if args.onnx is not None:
            raise Failure("--onnx needs ONNX Runtime in this Python: `pip install onnxruntime`") from None
        session.note("no comparison with the bare runtime: onnxruntime is not installed in this Python")
        return None
    feeds = {name: _feed(array) for name, array in inputs.items()}
    try:
        own = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        own.run(None, feeds)
    except Exception as e:  # noqa: BLE001 - its exceptions have no common base, and a failed comparison must not end the measurement
        if args.onnx is not None:
            raise Failure(f"ONNX Runtime could not run {path}: {str(e)[:300]}") from None
        session.note(f"no comparison with the bare runtime: {str(e)[:200]}")
        return None
    return _Bare(f"onnxruntime {onnxruntime.__version__} in process", lambda: own.run(None, feeds))


def _feed(array: NDArray[Any]) -> NDArray[Any]:
    return (
        np.array(
            [v.decode() if isinstance(v, bytes) else v for v in array.reshape(-1)], dtype=object
        ).reshape(array.shape)
        if array.dtype == object
        else array
    )


def _file_in_folder(session: Session, model: str) -> Path | None:
    """The file that a model of this name has in the folder; of several versions, the highest."""
    try:
        folder = session.models_dir(None, session.status())
    except Failure:
        return None
    bundle = folder / model
    versions = sorted(
        (p for p in bundle.glob("*/model.onnx") if p.parent.name.isdigit()), key=lambda p: int(p.parent.name)
    )
    for path in (folder / f"{model}.onnx", bundle / "model.onnx", *reversed(versions)):
        if path.is_file() and os.access(path, os.R_OK):
            return path
    return None


# ---- several clients ------------------------------------------------------------------------------------


def _many_clients(
    session: Session,
    args: argparse.Namespace,
    inputs: Mapping[str, NDArray[Any]],
    *,
    tick: Callable[[float], None],
) -> Samples:
    orders = {
        "endpoint": session.endpoint,
        "model": args.model,
        "version": args.version,
        "timeout_s": args.timeout,
        "seconds": args.seconds,
        "rate_hz": args.rate,
    }
    payload = json.dumps(orders).encode() + b"\n" + _pack(inputs)
    processes = [_start_client(payload) for _ in range(args.clients)]
    try:
        for process in processes:
            _expect_ready(process)
        started = time.monotonic()
        for process in processes:
            _stdin(process).write(b"go\n")
            _stdin(process).flush()
        while (elapsed := time.monotonic() - started) < args.seconds:
            tick(elapsed)
            time.sleep(min(0.2, args.seconds - elapsed))  # for the bar; --seconds bounds it
        merged = Samples()
        spans = []
        for process in processes:
            out, err = process.communicate(timeout=args.seconds + args.timeout + _START_TIMEOUT_S)
            if process.returncode != 0:
                raise Failure(f"a client failed: {err.decode(errors='replace').strip()[-300:]}")
            head, _, raw = out.partition(b"\n")
            report = json.loads(head)
            merged.latencies_us.extend(np.frombuffer(raw, dtype="<f8").tolist())
            merged.late += int(report["late"])
            spans.append(float(report["seconds"]))
        merged.seconds = max(spans)
        return merged
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None and not stream.closed:
                    stream.close()


def _start_client(payload: bytes) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-m", "edged.cli.bench"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    _stdin(process).write(len(payload).to_bytes(8, "little") + payload)
    _stdin(process).flush()
    return process


def _stdin(process: subprocess.Popen[bytes]) -> IO[bytes]:
    assert process.stdin is not None
    return process.stdin


def _expect_ready(process: subprocess.Popen[bytes]) -> None:
    assert process.stdout is not None
    assert process.stderr is not None
    if process.stdout.readline() != b"ready\n":
        text = process.stderr.read().decode(errors="replace").strip()
        raise Failure(f"a client could not start: {text[-300:]}")


def _pack(inputs: Mapping[str, NDArray[Any]]) -> bytes:
    """Name, dtype, shape and bytes of each input; strings as JSON, since nothing here may be pickled."""
    head, raws = [], []
    for name, array in inputs.items():
        if array.dtype == object:
            texts = [
                v.decode(errors="surrogateescape") if isinstance(v, bytes) else v for v in array.reshape(-1)
            ]
            raw = json.dumps(texts).encode()
        else:
            raw = array.tobytes()
        head.append([name, array.dtype.str, list(array.shape), len(raw)])
        raws.append(raw)
    return json.dumps(head).encode() + b"\n" + b"".join(raws)


def _unpack(stream: IO[bytes]) -> dict[str, NDArray[Any]]:
    inputs: dict[str, NDArray[Any]] = {}
    for name, dtype, shape, size in json.loads(stream.readline()):
        raw = stream.read(size)
        if dtype == "|O":
            texts = [v.encode(errors="surrogateescape") for v in json.loads(raw)]
            array: NDArray[Any] = np.empty(len(texts), dtype=object)
            array[:] = texts
        else:
            array = np.frombuffer(raw, dtype=dtype)
        inputs[name] = array.reshape(shape)
    return inputs


def client_main() -> int:
    """One client process."""
    from edged.client import Client

    size = int.from_bytes(sys.stdin.buffer.read(8), "little")
    stream = io.BytesIO(sys.stdin.buffer.read(size))
    orders = json.loads(stream.readline())
    inputs = _unpack(stream)
    samples = Samples()
    try:
        with Client(orders["endpoint"], timeout=orders["timeout_s"]) as client:

            def run() -> object:
                return client.infer(
                    orders["model"], inputs, version=orders["version"], timeout=orders["timeout_s"]
                )

            for _ in range(_WARMUP_RUNS):
                run()
            sys.stdout.buffer.write(b"ready\n")
            sys.stdout.buffer.flush()
            if not sys.stdin.buffer.readline():
                return 1
            collect(run, orders["seconds"], samples, rate_hz=orders["rate_hz"])
    except EdgedError as e:
        print(e, file=sys.stderr)
        return 1
    report = json.dumps({"seconds": samples.seconds, "late": samples.late}).encode()
    sys.stdout.buffer.write(report + b"\n" + np.asarray(samples.latencies_us, dtype="<f8").tobytes())
    return 0


# ---- the answer -----------------------------------------------------------------------------------------


def _text(document: Mapping[str, Any], session: Session) -> str:
    rows = [_row("edged, 1 client", document["one_client"])]
    if "bare" in document:
        rows.append(_row(document["bare"]["runtime"], document["bare"]))
    if "clients" in document:
        rows.append(_row(f"edged, {document['clients']['clients']} clients", document["clients"]))
    columns = [
        Column("", flex=True),
        Column("p50", right=True),
        Column("p90", right=True),
        Column("p99", right=True),
        Column("max", drop=1, right=True),
        Column("per second", right=True),
        Column("runs", drop=2, right=True),
        Column("late", drop=3, right=True),
    ]
    over = document.get("overhead")
    head = fields(
        [
            ("model", f"{document['model']} version {document['version']}"),
            ("on", f"{document['device']}, {document['runtime']} {document['precision'] or ''}".rstrip()),
            ("input", f"{document['input_bytes']} bytes: {size_text(document['size'])}"),
            ("paced", f"{document['rate_hz']:g} Hz" if document["rate_hz"] else None),
        ],
        session.out,
    )
    tail = ""
    if over:
        added = micros_text(abs(over["p50_added_us"]))
        sign = "more" if over["p50_added_us"] >= 0 else "less"
        tail = f"\n\nthrough edged: {over['p50_ratio']:.2f} × the bare runtime at p50, {added} {sign}"
    return f"{head}\n\n{table(columns, rows, session.out)}{tail}"


def _row(name: str, figures: Mapping[str, Any]) -> list[object]:
    return [
        name,
        *(micros_text(figures[key]) for key in ("p50_us", "p90_us", "p99_us", "max_us")),
        f"{figures['per_second']:.0f}" if figures["per_second"] >= 10 else f"{figures['per_second']:.2f}",
        figures["count"],
        figures["late"] or None,
    ]


if __name__ == "__main__":
    sys.exit(client_main())
