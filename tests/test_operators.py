"""Operators are known by version, type, origin and attributes; a table holds where it was made."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edged.runtimes import operators
from edged.runtimes.operators import (
    BOUNDED,
    CONSTANT,
    Given,
    Row,
    Side,
    Table,
    TableError,
    cases_sha256,
    find_table,
    fingerprint,
    instruction_set,
    load_schemas,
    numbers_of,
    read_table,
    signature,
    table_name,
    write_table,
)

ORT, OV = Side("onnxruntime", "1.0", "CPU"), Side("openvino", "2.0", "CPU")
RELU = Row("", "NaN: NaN in other places", ("FP32",), frozenset(), 3)


def table(**rows: Row) -> Table:
    """A table of this machine and these cases."""
    return Table((ORT, OV), instruction_set(), rows or {"Relu-14(FP32)": RELU}, cases_sha256())


def name_of(
    op: str, opset: int, *inputs: Given | None, outputs: Sequence[int] = (0,), **attributes: Any
) -> str:
    """The signature of a node."""
    found = load_schemas().find(op, "", opset)
    assert found is not None
    return signature(op, *found, inputs=inputs, outputs=outputs, attributes=attributes)


F32, W32 = Given("FP32"), Given("FP32", CONSTANT)


@pytest.mark.parametrize(
    ("node", "wanted"),
    [
        (("Relu", 13, F32), "Relu-13(FP32)"),
        (("Relu", 20, F32), "Relu-14(FP32)"),
        (("Conv", 12, F32, W32), "Conv-11(FP32,FP32=)"),
        (("Clip", 12, F32, None, W32), "Clip-12(FP32,-,FP32=)"),
        (("Clip", 12, F32, W32, None), "Clip-12(FP32,FP32=)"),
        (("Concat", 13, F32, F32, F32), "Concat-13(FP32...)"),
        (("Concat", 13, F32, W32), "Concat-13(FP32|FP32=...)"),
        (("Reshape", 14, F32, Given("INT64", BOUNDED)), "Reshape-14(FP32,INT64#)"),
    ],
    ids=repr,
)
def test_a_signature_has_version_types_and_origins(node: tuple[Any, ...], wanted: str) -> None:
    """The version is the one that the opset means; how many inputs of one kind there are does not count."""
    assert name_of(*node) == wanted


def test_flags_and_texts_count_by_value_numbers_by_name_and_defaults_not_at_all() -> None:
    """`ceil_mode` chooses what is computed; a stride of 2 is one of many."""
    assert name_of("AveragePool", 19, F32, ceil_mode=1, strides=(2, 2)) == "AveragePool-19(FP32; ceil_mode=1)"
    assert name_of("AveragePool", 19, F32, ceil_mode=0, auto_pad="NOTSET") == "AveragePool-19(FP32)"
    assert name_of("Conv", 11, F32, W32, auto_pad="VALID") == "Conv-11(FP32,FP32=; auto_pad=VALID)"
    assert name_of("Squeeze", 11, F32, axes=(0,)) == "Squeeze-11(FP32; axes)" != name_of("Squeeze", 11, F32)
    assert name_of("MaxPool", 12, F32, outputs=(0, 1)) == "MaxPool-12(FP32; outputs=0+1)"
    assert name_of("Split", 13, F32, outputs=(0, 1), axis=1) == "Split-13(FP32)"
    assert name_of("Softmax", 13, F32) == "Softmax-13(FP32; axis=last)"
    assert name_of("Softmax", 11, F32) == "Softmax-11(FP32; axis=1)"
    schema = load_schemas().find("Conv", "", 11)
    assert schema is not None
    given = {"group": 1, "strides": (1, 1), "pads": (0, 1, 0, 1), "dilations": (2, 2), "auto_pad": "VALID"}
    assert numbers_of(schema[1], given) == {"pads", "dilations"}


@pytest.mark.parametrize(
    ("op", "domain", "opset"), [("Relu", "com.example", 13), ("Relu", "", 0), ("No", "", 13)]
)
def test_what_nobody_has_defined_is_not_known(op: str, domain: str, opset: int) -> None:
    """Another domain's operator may have the same name; an opset to come may mean something else."""
    assert load_schemas().find(op, domain, opset) is None
    assert load_schemas().find("Relu", "", load_schemas().newest + 1) is None


def test_a_table_is_what_was_written(tmp_path: Path) -> None:
    """A row a line, in the order of their names, so that a change of it can be read."""
    rows = {"B-1(FP32)": RELU, "A-1(FP32)": Row("no", "no", ("FP32", "INT64"), frozenset({"k", "axis"}), 1)}
    path = tmp_path / table_name((ORT, OV), "x86_64 avx2")
    write_table(table(**rows), path)
    assert read_table(path) == table(**rows)
    lines = [line.strip() for line in path.read_text().splitlines() if "-1(" in line]
    assert [line.partition(":")[0] for line in lines] == ['"A-1(FP32)"', '"B-1(FP32)"']
    assert path.stat().st_mode & 0o777 == 0o644


def document(**changes: Any) -> dict[str, Any]:
    """A table's file as it should be, but for these changes."""
    sides = [{"runtime": "onnxruntime", "version": "1.0", "device": "CPU"}] * 2
    row = {"finite": "", "nonfinite": "", "outputs": ["FP32"], "cases": 1}
    whole = {"form": 1, "sides": sides, "instructions": "x", "cases": "y", "rows": {"Relu-14(FP32)": row}}
    return whole | changes


@pytest.mark.parametrize(
    "changes",
    [
        {"form": 2},
        {"sides": []},
        {"sides": [{"runtime": 1, "version": "1", "device": "CPU"}] * 2},
        {"sides": [{"runtime": "a", "version": "1", "device": "CPU"}] * 3},
        {"rows": []},
        {"rows": {"Relu-14(FP32)": None}},
        {"rows": {"Relu-14(FP32)": {"finite": "", "nonfinite": "", "outputs": ["FP32"]}}},
        {"rows": {"Relu-14(FP32)": {"finite": False, "nonfinite": "", "outputs": [], "cases": 1}}},
        {"rows": {"Relu-14(FP32)": {"finite": "", "nonfinite": "", "outputs": [], "cases": 0}}},
        {"rows": {"Relu-14(FP32)": {"finite": "", "nonfinite": "", "outputs": [], "cases": True}}},
        {"rows": {"Relu-14(FP32)": {"finite": "\x1b[2J", "nonfinite": "", "outputs": [], "cases": 1}}},
        {"rows": {"R" * 500: {"finite": "", "nonfinite": "", "outputs": [], "cases": 1}}},
        {"instructions": None},
        {"cases": 3},
    ],
    ids=repr,
)
def test_what_is_no_table_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    """A wrong value anywhere: nothing is believed of it."""
    path = tmp_path / "operators-a.json"
    path.write_text(json.dumps(document()))
    assert read_table(path).rows
    path.write_text(json.dumps(document(**changes)))
    with pytest.raises(TableError, match=r"operators-a\.json is no table"):
        read_table(path)


@given(st.binary(max_size=200) | st.integers(0, 400).map(lambda n: json.dumps(document()).encode()[:n]))
def test_no_bytes_raise_anything_else(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    """Garbage, and a file that was cut off."""
    path = tmp_path_factory.mktemp("t") / "operators-a.json"
    path.write_bytes(content)
    try:
        read_table(path)
    except TableError:
        return
    assert json.loads(content)["form"] == 1


def test_a_table_that_others_may_write_is_not_believed(tmp_path: Path) -> None:
    """Nor a link, a pipe, a file of gigabytes, or brackets without end."""
    path = tmp_path / "operators-a.json"
    path.write_text(json.dumps(document()))
    path.chmod(0o666)
    with pytest.raises(TableError, match="may be written by others"):
        read_table(path)
    path.chmod(0o644)
    link = tmp_path / "operators-b.json"
    link.symlink_to(path)
    with pytest.raises(TableError, match="cannot be read"):
        read_table(link)
    os.mkfifo(tmp_path / "operators-c.json")
    with pytest.raises(TableError, match="is no file"):
        read_table(tmp_path / "operators-c.json")
    with path.open("r+b") as file:
        file.truncate(operators.TABLE_BYTES_MAX + 1)
    with pytest.raises(TableError, match="is no file of at most"):
        read_table(path)
    path.write_text("[" * 100_000)
    with pytest.raises(TableError, match="is no table"):
        read_table(path)


def test_a_table_holds_for_what_it_was_made_on_and_nothing_else(tmp_path: Path) -> None:
    """Versions, devices, instruction set, cases: of each the reason says what is another."""
    path = tmp_path / "operators-a.json"
    write_table(table(), path)
    found, why = find_table(ORT, OV, str(tmp_path))
    assert (found and found.rows, why) == (table().rows, "")
    assert find_table(OV, ORT, str(tmp_path))[0] is not None  # that two agree is true of both

    def reason(**changes: Any) -> str:
        write_table(replace(table(), **changes), path)
        found, why = find_table(ORT, OV, str(tmp_path))
        assert found is None
        return why

    assert "it is for onnxruntime 1.0 CPU and openvino 2.1 CPU" in reason(
        sides=(ORT, replace(OV, version="2.1"))
    )
    assert "openvino 2.0 GPU" in reason(sides=(ORT, replace(OV, device="GPU")))
    assert f"it was made on z80, this is {instruction_set()}" in reason(instructions="z80")
    assert "with other cases" in reason(cases="0" * 64)
    path.unlink()
    other = Side("onnxruntime", "1.0", "CUDA")
    assert find_table(ORT, other, str(tmp_path)) == (None, "none was made for these two")


def test_a_table_made_here_adds_to_others_and_goes_first(tmp_path: Path) -> None:
    """One that was made of a single operator does not hide what else is known."""
    write_table(table(**{"A-1(FP32)": RELU, "B-1(FP32)": RELU}), tmp_path / "operators-1.json")
    write_table(
        table(**{"B-1(FP32)": replace(RELU, finite="no"), "C-1(FP32)": RELU}), tmp_path / "operators-2.json"
    )
    found, _ = find_table(ORT, OV, str(tmp_path))
    assert found is not None
    assert {name: row.finite for name, row in found.rows.items()} == {
        "A-1(FP32)": "",
        "B-1(FP32)": "",
        "C-1(FP32)": "",
    }


def test_tables_have_a_fingerprint_that_a_new_one_changes(tmp_path: Path) -> None:
    """What was decided by the old ones is looked at again."""
    before = fingerprint(str(tmp_path))
    assert before == fingerprint(str(tmp_path))
    write_table(table(), tmp_path / "operators-a.json")
    assert fingerprint(str(tmp_path)) not in (before, fingerprint(None))


def test_what_comes_with_edged_was_made_of_its_cases() -> None:
    """A change of the cases asks for a new table: `edgectl operators`, as docs/hacking.md says."""
    shipped = sorted(operators._FOLDER.glob("operators-*.json"))
    assert shipped
    for path in shipped:
        found = read_table(path, trusted=True)
        assert found.cases == cases_sha256(), path.name
        assert path.name == table_name(found.sides, found.instructions)
        assert len(found.rows) > 5000
