"""Runs the cases of single operators on two runtimes, and says on which of them these agree.

The cases are those of `operators`; each is run with its own inputs and with what is known to part runtimes:
NaN and infinities, denormals, zeros of both signs, the largest and the smallest, what 24 bits of a float and
32 of an integer do not hold, divisors of zero, indices out of range. What one runtime refuses the other must
refuse. Each input is tried as data, and as what it mostly is beside it: a constant of the file, or a size.

A tiny model can end its runtime. So `main` does the work in a child, under limits of memory, and says before
each job which one it begins; `run_trials`, its parent, starts another child behind the job that ended one,
and notes that it did. Nothing here knows the daemon. Runs on Python 3.10 too.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import numpy as np

from edged.agreement import FULL, disagreement, edges, is_finite
from edged.runtimes.base import (
    DTYPES,
    LoadCancel,
    LoadRequest,
    Model,
    RunFailed,
    Runtime,
    clean_text,
    create_runtime,
    silence_telemetry,
)
from edged.runtimes.onnx_writer import Operator, Port, write_model
from edged.runtimes.operators import (
    BOUNDED,
    CONSTANT,
    DATA,
    TEXT_CHARS_MAX,
    Given,
    Row,
    Schema,
    Side,
    Table,
    cases_document,
    cases_sha256,
    instruction_set,
    load_schemas,
    numbers_of,
    signature,
)
from edged.runtimes.tiny import run_tiny_model

__all__ = ["Job", "TrialsFailed", "list_jobs", "main", "run_job", "run_trials"]

DATA_BYTES = 2 << 30
"""Of a child's own memory: both runtimes take 0.3 GB, and what takes more than this is refused there."""

JOB_S_MAX = 60.0
"""One job takes some 20 ms; one that hangs is ended, and that is its verdict."""

FRUITLESS_MAX = 3
"""Children that end before their first job: then it is not the job."""


_WEIGHTED = frozenset(
    {
        *("Conv", "ConvTranspose", "ConvInteger", "DeformConv", "Gemm", "LSTM", "GRU", "RNN", "PRelu"),
        *("BatchNormalization", "InstanceNormalization", "LayerNormalization", "GroupNormalization"),
        *("RMSNormalization", "QuantizeLinear", "DequantizeLinear", "QLinearConv", "QLinearMatMul"),
    }
)
"""Operators whose first input is the data and whose others are weights, which are constants mostly."""


class TrialsFailed(Exception):
    """The cases could not be run at all."""


@dataclass(frozen=True)
class Job:
    """A case in one version of its operator, with a place that each input comes from."""

    op: str
    opset: int
    since: int
    schema: Schema
    attributes: Mapping[str, Any]
    inputs: tuple[Mapping[str, Any] | None, ...]
    origins: tuple[str, ...]
    outputs: tuple[str, ...]
    fixed: tuple[bool, ...] = (True, False)
    """With which shapes it is run: with fixed sizes, with free ones, or with both."""

    @property
    def row(self) -> str:
        """The signature that it is a case of."""
        given = [
            None if wire is None else Given(wire["t"], origin)
            for wire, origin in zip(self.inputs, self.origins)  # noqa: B905 - one for each
        ]
        used = [n for n, datatype in enumerate(self.outputs) if datatype != "-"]
        return signature(
            self.op,
            self.since,
            self.schema,
            inputs=given,
            outputs=used,
            attributes=self.attributes,
            rank=len(self.inputs[0]["s"]) if self.inputs and self.inputs[0] else None,
        )


# ------------------------------------------------------------------ the jobs


def list_jobs(only: Sequence[str] = ()) -> list[Job]:
    """All there is to run, or that of these operators or signatures: the same list in parent and child."""
    schemas = load_schemas()
    found: dict[str, list[Job]] = {}
    for case in cases_document()["cases"]:
        if only and not any(each.partition("-")[0] == case["op"] for each in only):
            continue
        for opset in case["opsets"]:
            known = schemas.find(case["op"], "", opset)
            if known is None:
                continue
            since, schema = known
            inputs, attributes = tuple(case["in"]), _attributes(case["a"])
            for origins in _origins(case["op"], schema, inputs):
                job = Job(case["op"], opset, since, schema, attributes, inputs, origins, tuple(case["out"]))
                if not only or job.op in only or job.row in only:
                    found.setdefault(job.row, []).append(job)
    return [job for jobs in found.values() for job in _shared(jobs)]


def _shared(jobs: Sequence[Job]) -> Iterator[Job]:
    """The jobs of a row, with fixed and with free sizes in turns: to compile a model is what takes time."""
    if len(jobs) == 1:
        yield jobs[0]
    else:
        for n, job in enumerate(jobs):
            yield replace(job, fixed=(n % 2 == 0,))


def _attributes(wire: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: tuple(value) if isinstance(value, list) else _array(value) if isinstance(value, dict) else value
        for name, value in wire.items()
    }


def _origins(
    op: str, schema: Schema, inputs: Sequence[Mapping[str, Any] | None]
) -> Iterator[tuple[str, ...]]:
    """Where inputs come from, in each way that is tried; at least one is data."""
    there = [n for n, wire in enumerate(inputs) if wire is not None]
    free = [n for n in there if not schema.is_parameter(n)]
    told: set[tuple[str, ...]] = set()
    for data in _subsets(op, free):
        rest = [n for n in there if n not in data]
        whole = [n for n in rest if (inputs[n] or {})["t"] in ("INT64", "INT32", "BOOL")]
        for whole_from in (CONSTANT, BOUNDED) if whole else (CONSTANT,):
            origins = [DATA] * len(inputs)
            for n in rest:
                origins[n] = whole_from if n in whole else CONSTANT
            if tuple(origins) not in told:
                told.add(tuple(origins))
                yield tuple(origins)


def _subsets(op: str, free: Sequence[int]) -> Iterator[Sequence[int]]:
    """Which inputs are data: each combination of a few; all or the first where the others are weights."""
    if op in _WEIGHTED:
        yield free
        yield free[:1]
        yield [n for n in free if n == free[0] or n >= 5]  # the states of a recurrent network
    elif len(free) <= 3:
        for mask in range(1, 1 << len(free)):
            yield [n for at, n in enumerate(free) if mask >> at & 1]
    else:
        yield free
        yield free[:1]


# ------------------------------------------------------------------ values


def _array(wire: Mapping[str, Any]) -> Any:
    dtype, shape = DTYPES[wire["t"]], tuple(wire["s"])
    if "v" in wire:
        return (
            np.array([float(v) if isinstance(v, str) else v for v in wire["v"]]).astype(dtype).reshape(shape)
        )
    kind, seed, *bounds = wire["r"]
    rng = np.random.default_rng(seed)
    if kind == "whole":
        return rng.integers(bounds[0], bounds[1] + 1, shape).astype(dtype)
    values = rng.uniform(0, 1, shape) if kind == "uniform" else rng.standard_normal(shape)
    return (np.abs(values) if kind == "positive" else values).astype(dtype)


def _feeds(own: Mapping[str, Any], data: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The case's own inputs, then the edges of each input that is data, then of all of them at once."""
    yield "its own inputs", dict(own)
    found = {name: dict(edges(own[name])) for name in data}
    for name, each in found.items():
        for kind, array in each.items():
            yield kind, {**own, name: array}
    if len(data) > 1:
        for kind in dict.fromkeys(kind for each in found.values() for kind in each):
            yield f"{kind} in all", {**own, **{n: each[kind] for n, each in found.items() if kind in each}}


# ------------------------------------------------------------------ one job


@dataclass
class _Verdicts:
    finite: str = ""
    nonfinite: str = ""

    def note(self, why: str, *, finite: bool) -> None:
        if finite:
            self.finite = self.finite or why
        else:
            self.nonfinite = self.nonfinite or why


def run_job(job: Job, reference: Runtime, candidate: Runtime, devices: tuple[str, str]) -> _Verdicts | None:
    """The verdicts of a job; None where the reference does not take the model, so that nobody can ask it."""
    own = {f"x{n}": _array(wire) for n, wire in enumerate(job.inputs) if wire is not None}
    origin = {f"x{n}": o for n, o in enumerate(job.origins)}
    fed = {name: array for name, array in own.items() if origin[name] != CONSTANT}
    verdicts = _Verdicts()
    for fixed in job.fixed:
        with _as_file(_model(job, own, fixed=fixed)) as path:
            try:
                asked = reference.load(LoadRequest(path=path, device=devices[0]), LoadCancel())
            except Exception:  # noqa: BLE001 - whatever it raises, it does not take this model
                # Some are taken with fixed sizes and refused with free ones: then there is no more to ask.
                return verdicts if len(job.fixed) > 1 and not fixed else None
            try:
                tried = candidate.load(LoadRequest(path=path, device=devices[1]), LoadCancel())
            except Exception:  # noqa: BLE001 - a model that is not taken is a verdict
                verdicts.note(f"{candidate.name} does not load it", finite=True)
                return verdicts
            if len(tried.inputs) != len(fed):
                verdicts.note(f"{candidate.name} has other inputs", finite=True)
                return verdicts
            for kind, feeds in _feeds(fed, [n for n in fed if origin[n] == DATA]):
                _compare(asked, tried, kind, feeds, verdicts, (reference.name, candidate.name))
            tried.close()
            asked.close()
    return verdicts


def _model(job: Job, own: Mapping[str, Any], *, fixed: bool) -> bytes:
    names = [f"x{n}" if wire is not None else "" for n, wire in enumerate(job.inputs)]
    outputs = [f"y{n}" if datatype != "-" else "" for n, datatype in enumerate(job.outputs)]
    ports, constants = [], {}
    for name, wire, origin in zip(names, job.inputs, job.origins):  # noqa: B905 - one for each
        if wire is None:
            continue
        if origin == CONSTANT:
            constants[name] = (str(wire["t"]), own[name])
        else:
            shape: tuple[int | None, ...] = own[name].shape
            # How many sizes there are is known also where they are not.
            free = not fixed and origin != BOUNDED
            ports.append(Port(name, str(wire["t"]), (None,) * len(shape) if free else shape))
    return write_model(
        [Operator(job.op, names, outputs, job.attributes)],
        inputs=ports,
        outputs=[Port(n, t) for n, t in zip(outputs, job.outputs) if n],  # noqa: B905 - one for each
        constants=constants,
        opsets={"": job.opset},
    )


@contextlib.contextmanager
def _as_file(model: bytes) -> Iterator[str]:
    """Where the model lies as long as it is used: a runtime may read it again after a run has failed."""
    fd = os.memfd_create("edged-trial.onnx", os.MFD_CLOEXEC)
    try:
        os.write(fd, model)
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)


def _compare(
    asked: Model,
    tried: Model,
    kind: str,
    feeds: Mapping[str, Any],
    verdicts: _Verdicts,
    names: tuple[str, str],
) -> None:
    outputs = [s.name for s in asked.outputs]
    want, refusal = _run(asked, feeds, outputs)
    if want is None and refusal == "MEMORY_LIMIT":
        return  # what takes gigabytes here says nothing about the answers
    # A runtime may call an input that it passes on by the output's name: by their places they are the same.
    got, _ = _run(tried, dict(zip([s.name for s in tried.inputs], feeds.values())), outputs)  # noqa: B905
    # Denormals are as rare as NaN, and by the same word of the owner's nobody need ask for them here.
    finite = is_finite(feeds.values()) and (want is None or is_finite(want)) and "denormals" not in kind
    if want is None or got is None:
        if want is not None or got is not None:
            refuses, answers = names if want is None else names[::-1]
            verdicts.note(f"{kind}: {refuses} refuses what {answers} answers", finite=finite)
        return
    for spec, a, b in zip(asked.outputs, want, got):  # noqa: B905 - the same outputs were asked for
        why = disagreement(a, b, spec.datatype, FULL)
        if why:
            verdicts.note(f"{kind}: {why}", finite=finite)


def _run(model: Model, feeds: Mapping[str, Any], outputs: Sequence[str]) -> tuple[list[Any] | None, str]:
    try:
        return model.run(feeds, outputs), ""
    except RunFailed as e:
        return None, e.reason


# ------------------------------------------------------------------ child


def main(arguments: Sequence[str]) -> NoReturn:
    """One argument, JSON: `{sides, only, from, fd}`; a line of JSON to `fd` for each thing said."""
    settings = json.loads(arguments[0])
    silence_telemetry()
    os.dup2(2, 1)  # what a library prints must not be taken for anything
    os.environ["OMP_NUM_THREADS"] = "1"
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (DATA_BYTES, DATA_BYTES))
    out = os.fdopen(settings["fd"], "w", buffering=1)

    def say(**what: Any) -> None:
        out.write(json.dumps(what) + "\n")

    (one, one_device), (other, other_device) = settings["sides"]
    try:
        reference, candidate = create_runtime(one), create_runtime(other)
        for runtime, device in ((reference, one_device), (candidate, other_device)):
            run_tiny_model(runtime, device).close()
    except Exception as e:  # noqa: BLE001 - whatever it raises, nothing can be run there
        say(failed=clean_text(e))
        os._exit(1)
    say(versions=[reference.version, candidate.version])
    jobs = list_jobs(settings["only"])
    np.seterr(all="ignore")
    settled: set[str] = set()
    for number in range(settings["from"], len(jobs)):
        if jobs[number].row in settled:
            continue  # its row disagrees already, and one disagreement is enough
        say(begins=number)
        verdicts = run_job(jobs[number], reference, candidate, (one_device, other_device))
        if verdicts is not None:
            say(ends=number, finite=verdicts.finite, nonfinite=verdicts.nonfinite)
            if verdicts.finite:
                settled.add(jobs[number].row)
    say(done=True)
    os._exit(0)  # a runtime's destructors may hang, and nothing is left to do


# ------------------------------------------------------------------ parent

Start = Callable[[Mapping[str, Any], int], "subprocess.Popen[bytes]"]
"""Starts a child with these settings, which inherits this descriptor."""


def run_trials(
    start: Start,
    sides: Sequence[tuple[str, str]],
    *,
    only: Sequence[str] = (),
    progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> Table:
    """Runs all jobs in children, one after the other, and makes a table of what they say.

    Raises TrialsFailed where they cannot be run.
    """
    jobs = list_jobs(only)
    if not jobs:
        raise TrialsFailed("there is no case of these operators")
    versions: list[str] = []
    rows: dict[str, Row] = {}
    at = fruitless = 0
    while at < len(jobs):
        before = at
        for said in _child(start, {"sides": list(sides), "only": list(only), "from": at}):
            if "failed" in said:
                raise TrialsFailed(f"the runtimes do not start: {said['failed']}")
            if "versions" in said:
                versions = [str(each) for each in said["versions"]]
            elif "ends" in said:
                _add(rows, jobs[said["ends"]], str(said["finite"]), str(said["nonfinite"]))
                at = said["ends"] + 1
            elif "begins" in said:
                at = said["begins"]
                progress(at, len(jobs))
            elif "done" in said:
                at = len(jobs)
            elif "died" in said and versions:
                # It began this one and said no more.
                text = f"it ends a runtime: {said['died']}"
                _add(rows, jobs[at], text, text)
                at += 1
            else:
                raise TrialsFailed(f"the runtimes do not start: {said.get('died')}")
        fruitless = fruitless + 1 if at == before else 0
        if fruitless >= FRUITLESS_MAX:
            raise TrialsFailed("the children end before their first case")
    found = [Side.of(runtime, version, device) for (runtime, device), version in zip(sides, versions)]  # noqa: B905 - two each
    return Table((found[0], found[1]), instruction_set(), rows, cases_sha256())


def _add(rows: dict[str, Row], job: Job, finite: str, nonfinite: str) -> None:
    """A case's verdict into its row: one disagreement is enough."""
    name, before = job.row, rows.get(job.row)
    numbers = numbers_of(job.schema, job.attributes)
    outputs = tuple(datatype for datatype in job.outputs)
    if before is not None:
        finite, nonfinite = before.finite or finite, before.nonfinite or nonfinite
        numbers |= before.numbers
        outputs = max(before.outputs, outputs, key=len)
    cases = 1 if before is None else before.cases + 1
    rows[name] = Row(_cut(finite), _cut(nonfinite), outputs, numbers, cases)


def _cut(text: str) -> str:
    printable = "".join(c if c.isprintable() else " " for c in text)
    return printable if len(printable) <= TEXT_CHARS_MAX else printable[: TEXT_CHARS_MAX - 1] + "…"


def _child(start: Start, settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What one child says, at last `died` where it ended before its work did."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    try:
        process = start({**settings, "fd": writer}, writer)
    except OSError as e:
        os.close(reader)
        raise TrialsFailed(f"no child could be started: {e.strerror}") from e
    finally:
        os.close(writer)
    done = False
    try:
        for line in _lines(reader):
            said = json.loads(line)
            done = done or "done" in said
            yield said
    except TimeoutError:
        process.kill()
        process.wait()
        yield {"died": f"no answer for {JOB_S_MAX:g} s"}
        return
    finally:
        os.close(reader)
        if process.poll() is None and not done:
            process.kill()
        code = process.wait()
    if not done:
        yield {"died": f"signal {-code}" if code < 0 else f"exit code {code}"}


def _lines(fd: int) -> Iterator[bytes]:
    """Whole lines until the end. Raises TimeoutError where none comes for too long."""
    waiting = b""
    while True:
        if not select.select([fd], [], [], JOB_S_MAX)[0]:
            raise TimeoutError
        part = os.read(fd, 1 << 16)
        if not part:
            return
        *whole, waiting = (waiting + part).split(b"\n")
        yield from whole


if __name__ == "__main__":
    main(sys.argv[1:])
