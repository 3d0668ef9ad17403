"""What is known of ONNX's operators: their versions and types, and on which of them two runtimes agree.

Two files of the package. `operator_cases.json` is written by `tools/make-operator-cases`: for each version of
an operator the types of its inputs and outputs and its defaults, and cases to run it on. A *table* is what
came of running these cases on two runtimes (`trials`): a row a *signature*, with a verdict for finite values
and one for NaN and infinities. A table holds for exactly the versions of the runtimes, the instruction set
and the cases that it was made with; elsewhere it says nothing. Those that come with edged lie beside the
cases, one that was made on the device in the state directory, where it is read as a stranger's file.

A signature names the operator and the version that the model's opset means, the datatype of each input and
where it comes from, and the attributes that decide: strings and flags by their value, as far as they are not
the default. Numbers count by their name only: a row lists those that its cases tried.

Owns the reading of both files; runs no model. Runs on Python 3.10 too.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

__all__ = [
    "BOUNDED",
    "CONSTANT",
    "DATA",
    "Given",
    "Row",
    "Schema",
    "Schemas",
    "Side",
    "Table",
    "TableError",
    "find_table",
    "fingerprint",
    "instruction_set",
    "load_schemas",
    "numbers_of",
    "read_table",
    "signature",
    "write_table",
]

DATA, CONSTANT, BOUNDED = "", "=", "#"
"""Where an input of an operator comes from, as a signature marks it: from the model's inputs; from the file,
so that it is the same in every run; from shapes, so that it is as large as tensors get."""

_FOLDER = Path(__file__).parent.parent / "data"
_CASES = _FOLDER / "operator_cases.json"

TABLE_BYTES_MAX = 8 << 20
"""Of a table; the one of all operators has less than 1 MB."""

ROWS_MAX = 50_000
TEXT_CHARS_MAX = 400
"""Of a signature or a reason."""

_FORM = 1
"""Counts up when the form of a table, or what a verdict means, changes."""

_FLAGS = frozenset(
    {
        *(
            "allowzero",
            "antialias",
            "case_change_action",
            "ceil_mode",
            "center_point_box",
            "count_include_pad",
        ),
        *("detect_negative", "detect_positive", "dtype", "exclude_outside", "exclusive", "fmod", "inclusive"),
        *("input_forget", "interleaved", "is_causal", "keepdims", "largest", "layout", "linear_before_reset"),
        *("noop_with_empty_axes", "normalize_variance", "output_datatype", "output_dtype", "precision"),
        *("qk_matmul_output_mode", "reverse", "saturate", "select_last_index", "softmax_precision", "sorted"),
        *("stash_type", "storage_order", "to", "training_mode", "transA", "transB", "unroll", "upper"),
    }
)
"""Integers that choose what is computed, not how much of it."""

_TELLING = {
    **dict.fromkeys(("Squeeze", "Unsqueeze", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd"), "axes"),
    **dict.fromkeys(("ReduceSum", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp"), "axes"),
    "ReduceSumSquare": "axes",
    "Transpose": "perm",
    "Split": "split",
    "ConvTranspose": "output_shape",
}
"""Numbers that change what an operator does by being there at all: without them it takes all, or halves."""

_BY_AXIS = frozenset(("Softmax", "LogSoftmax", "Hardmax"))
"""Of these the axis decides: up to opset 12 they take all dimensions from there on for one, which is the same
for the last one only."""

_NEUTRAL = {"dilations": 1, "strides": 1, "pads": 0, "output_padding": 0}
"""Lists of numbers that say nothing while each of them is this."""


class TableError(Exception):
    """A table that cannot be read, in words for people."""


# ------------------------------------------------------------------ operators


@dataclass(frozen=True)
class Schema:
    """One version of an operator. A type is a datatype, or the name of one that inputs and outputs share."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    variadic: bool
    """Whether the last input may stand any number of times."""
    defaults: Mapping[str, Any]

    def is_parameter(self, number: int) -> bool:
        """Whether an input is a size, an axis or a position and nothing else: of 64 bits by definition."""
        return self.type_of(number) == "INT64"

    def type_of(self, number: int) -> str:
        """The type of an input, also of one that stands several times."""
        if self.variadic and number >= len(self.inputs):
            return self.inputs[-1]
        return self.inputs[number] if number < len(self.inputs) else ""


class Schemas:
    """All operators that are known, by name and version."""

    def __init__(self, known: Mapping[str, Mapping[str, Any]]) -> None:
        self._of: dict[str, list[tuple[int, Schema]]] = {}
        for name, each in known.items():
            op, _, since = name.rpartition("-")
            schema = Schema(
                tuple(each["in"]), tuple(each["out"]), bool(each.get("variadic")), each.get("defaults", {})
            )
            self._of.setdefault(op, []).append((int(since), schema))
        for versions in self._of.values():
            versions.sort(key=lambda pair: pair[0])
        self.newest = max((v[-1][0] for v in self._of.values()), default=0)
        """The last opset that is known: what a later one changed nobody has tried."""

    def find(self, op: str, domain: str, opset: int) -> tuple[int, Schema] | None:
        """The version of an operator that an opset means; None where it is not known."""
        if domain or not 0 < opset <= self.newest:
            return None
        found = None
        for since, schema in self._of.get(op, ()):
            if since <= opset:
                found = since, schema
        return found


@lru_cache(maxsize=1)
def load_schemas() -> Schemas:
    """Those that come with edged."""
    return Schemas(cases_document()["operators"])


@lru_cache(maxsize=1)
def cases_document() -> dict[str, Any]:
    """The file of cases, as it is."""
    found: dict[str, Any] = json.loads(_CASES.read_bytes())
    return found


@lru_cache(maxsize=1)
def cases_sha256() -> str:
    """What a table is tied to: the cases that were run."""
    return hashlib.sha256(_CASES.read_bytes()).hexdigest()


# ------------------------------------------------------------------ signatures


@dataclass(frozen=True)
class Given:
    """What is known of one input of a node; of a datatype ``""`` nothing. None in its place: left out."""

    datatype: str
    origin: str = DATA

    def __str__(self) -> str:
        return self.datatype + self.origin


def signature(
    op: str,
    since: int,
    schema: Schema,
    *,
    inputs: Sequence[Given | None],
    outputs: Sequence[int],
    attributes: Mapping[str, Any],
    rank: int | None = None,
) -> str:
    """The name of a row; `outputs` are the places of those in use, `rank` is the first one's, if known."""
    texts = ["-" if each is None else str(each) for each in inputs]
    while texts and texts[-1] == "-":
        texts.pop()
    if schema.variadic and len(texts) >= len(schema.inputs):
        fixed = len(schema.inputs) - 1
        # Any number of the same: what counts is which kinds there are.
        texts = [*texts[:fixed], "|".join(sorted(set(texts[fixed:]))) + "..."]
    flags = sorted(
        f"{name}={_text(value)}"
        for name, value in _telling(schema, attributes)
        if name in _FLAGS or _is_text(value)
    )
    if op in _BY_AXIS:
        axis = attributes.get("axis", schema.defaults.get("axis"))
        flags.append("axis=last" if axis == -1 or (rank and axis == rank - 1) else f"axis={axis}")
    if _TELLING.get(op) in attributes:
        flags.append(_TELLING[op])
    if len(schema.outputs) > 1 and list(outputs) != [0]:
        flags.append("outputs=" + "+".join(str(n) for n in outputs))
    return f"{op}-{since}({','.join(texts)}{'; ' if flags else ''}{' '.join(flags)})"


def numbers_of(schema: Schema, attributes: Mapping[str, Any]) -> frozenset[str]:
    """The attributes that count by their name, as far as they are not the default."""
    return frozenset(
        name for name, value in _telling(schema, attributes) if name not in _FLAGS and not _is_text(value)
    )


def _telling(schema: Schema, attributes: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    for name, value in attributes.items():
        default = schema.defaults.get(name)
        if default is not None and (list(value) if isinstance(value, tuple) else value) == default:
            continue
        neutral = _NEUTRAL.get(name)
        if neutral is not None and isinstance(value, (tuple, list)) and all(v == neutral for v in value):
            continue
        yield name, value


def _is_text(value: Any) -> bool:
    first = value[0] if isinstance(value, (tuple, list)) and value else value
    return isinstance(first, (str, bytes))


def _text(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return "+".join(_text(each) for each in value)
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


# ------------------------------------------------------------------ tables


@dataclass(frozen=True)
class Side:
    """A runtime of a version on a kind of device."""

    runtime: str
    version: str
    device: str
    """Without a number: `CUDA`, not `CUDA:0`."""

    def __str__(self) -> str:
        return f"{self.runtime} {self.version} {self.device}"

    @classmethod
    def of(cls, runtime: str, version: str, device: str) -> Side:
        return cls(runtime, version, re.split(r"[:.]", device)[0])


@dataclass(frozen=True)
class Row:
    """A verdict: why the runtimes disagree, or ``""`` where no case showed that they do."""

    finite: str
    nonfinite: str
    outputs: tuple[str, ...]
    numbers: frozenset[str] = frozenset()
    cases: int = 1


@dataclass(frozen=True)
class Table:
    """What came of running the cases on two runtimes here."""

    sides: tuple[Side, Side]
    """In no order: that two agree is true of both."""
    instructions: str
    rows: Mapping[str, Row]
    cases: str = ""
    path: str = field(default="", compare=False)

    def why_not(self, one: Side, other: Side) -> str:
        """Why it says nothing about these two on this machine; empty when it does."""
        if {str(one), str(other)} != {str(side) for side in self.sides}:
            return f"it is for {self.sides[0]} and {self.sides[1]}"
        if self.instructions != instruction_set():
            return f"it was made on {self.instructions}, this is {instruction_set()}"
        if self.cases != cases_sha256():
            return "it was made with other cases than this edged has"
        return ""


@lru_cache(maxsize=1)
def instruction_set() -> str:
    """What decides which kernels a runtime takes on this machine's CPU.

    `x86-64` or `aarch64`, and of the extensions that runtimes look for those that there are.
    """
    machine = platform.machine()
    flags: set[str] = set()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("flags", "Features"):
                flags = set(value.split())
                break
    except OSError:
        pass
    return f"{machine} {' '.join(name for name, of in _EXTENSIONS if set(of.split()) <= flags)}".strip()


_EXTENSIONS = (
    ("avx", "avx"),
    ("avx2", "avx2 fma f16c"),
    ("avx-vnni", "avx_vnni"),
    ("avx512", "avx512f avx512bw avx512dq avx512vl"),
    ("avx512-vnni", "avx512_vnni"),
    ("avx512-bf16", "avx512_bf16"),
    ("avx512-fp16", "avx512_fp16"),
    ("amx", "amx_tile amx_int8 amx_bf16"),
    ("asimdhp", "asimdhp"),
    ("asimddp", "asimddp"),
    ("i8mm", "i8mm"),
    ("bf16", "bf16"),
    ("sve", "sve"),
    ("sve2", "sve2"),
)
"""By their names here: the processor's own flags, all of which are needed."""


def find_table(one: Side, other: Side, made_here: str | None) -> tuple[Table | None, str]:
    """The table that holds for these two here, else why there is none.

    `made_here` is the folder of those that were made on this device; what they say comes first.
    """
    why = ""
    found: Table | None = None
    for path in [*_tables_in(made_here), *_tables_in(str(_FOLDER))]:
        try:
            table = read_table(path, trusted=path.parent == _FOLDER)
        except TableError as e:
            why = why or str(e)
            continue
        reason = table.why_not(one, other)
        if not reason:
            found = table if found is None else replace(found, rows={**table.rows, **found.rows})
        elif {s.runtime for s in table.sides} == {one.runtime, other.runtime}:
            why = why or f"{path.name}: {reason}"
    return found, "" if found is not None else why or "none was made for these two"


def fingerprint(made_here: str | None) -> str:
    """What changes when a table comes, goes or is made again; the tables themselves are not read."""
    found = [cases_sha256()]
    for path in [*_tables_in(made_here), *_tables_in(str(_FOLDER))]:
        with contextlib.suppress(OSError):
            status = path.stat()
            found.append(f"{path.name} {status.st_size} {status.st_mtime_ns}")
    return hashlib.sha256("\n".join(found).encode()).hexdigest()[:16]


def _tables_in(folder: str | None) -> list[Path]:
    if not folder:
        return []
    try:
        return sorted(Path(folder).glob("operators-*.json"))
    except OSError:
        return []


def read_table(path: Path, *, trusted: bool = False) -> Table:
    """A table from a file. Raises TableError for what is none, or may have been written by somebody else."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as e:
        raise TableError(f"{path.name} cannot be read: {e.strerror}") from None
    with os.fdopen(fd, "rb") as file:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_size > TABLE_BYTES_MAX:
            raise TableError(f"{path.name} is no file of at most {TABLE_BYTES_MAX} bytes")
        if not trusted and (found.st_uid not in (0, os.geteuid()) or found.st_mode & 0o022):
            raise TableError(f"{path.name} may be written by others than root and the daemon's user")
        raw = file.read(TABLE_BYTES_MAX + 1)
    try:
        return _parse(json.loads(raw), str(path))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise TableError(f"{path.name} is no table of operators: {e}") from None


def _parse(document: Any, path: str) -> Table:
    if document["form"] != _FORM:
        raise ValueError(f"its form is {document['form']!r}, not {_FORM}")
    rows = document["rows"]
    if not isinstance(rows, dict) or len(rows) > ROWS_MAX:
        raise ValueError("it has too many rows, or none")
    one, other = (
        Side(_word(side["runtime"]), _word(side["version"]), _word(side["device"]))
        for side in document["sides"]
    )
    return Table(
        sides=(one, other),
        instructions=_word(document["instructions"]),
        rows={_word(name): _parse_row(row) for name, row in rows.items()},
        cases=_word(document["cases"]),
        path=path,
    )


def _parse_row(row: Mapping[str, Any]) -> Row:
    cases = row["cases"]
    if type(cases) is not int or cases < 1:
        raise ValueError("a row of no case")
    return Row(
        finite=_word(row["finite"]),
        nonfinite=_word(row["nonfinite"]),
        outputs=tuple(_word(each) for each in row["outputs"]),
        numbers=frozenset(_word(each) for each in row.get("numbers", ())),
        cases=cases,
    )


def _word(value: Any) -> str:
    if not isinstance(value, str) or len(value) > TEXT_CHARS_MAX or not value.isprintable():
        raise ValueError("a text that is none")
    return value


def table_name(sides: Sequence[Side], instructions: str) -> str:
    """What a table's file is called."""
    text = "-".join([*(str(side) for side in sides), instructions])
    return f"operators-{re.sub(r'[^A-Za-z0-9.]+', '-', text)}.json"


def write_table(table: Table, path: Path) -> None:
    """Writes it beside its place and renames: a row a line, in the order of their names."""
    lines = []
    for name in sorted(table.rows):
        row = table.rows[name]
        wire: dict[str, Any] = {"finite": row.finite, "nonfinite": row.nonfinite, "outputs": row.outputs}
        if row.numbers:
            wire["numbers"] = sorted(row.numbers)
        wire["cases"] = row.cases
        lines.append(f"  {json.dumps(name)}: {json.dumps(wire)}")
    head = {
        "form": _FORM,
        "sides": [{"runtime": s.runtime, "version": s.version, "device": s.device} for s in table.sides],
        "instructions": table.instructions,
        "cases": table.cases,
    }
    text = json.dumps(head, indent=1)[:-2] + ',\n "rows": {\n' + ",\n".join(lines) + "\n }\n}\n"
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    with os.fdopen(fd, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(fd)
    os.replace(temporary, path)
