"""What a client or the folder may get wrong: each is answered in words, and nobody else notices."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest

from tests import zoo
from tests.e2e.harness import Daemon, Raw, code_of, until

pytestmark = pytest.mark.e2e

ORT = b'runtime = "onnxruntime"\n'
SHARED = ORT + b'isolation = "shared"\n'


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One daemon for the whole module: that it survives every test is part of each."""
    settings = {"EDGED_LIMITS_MESSAGE_BYTES": "4MiB"}
    with Daemon(tmp_path_factory.mktemp("bad"), settings) as daemon:
        for name, model in (
            ("neighbour", zoo.versioned(1)),
            ("x4", zoo.identity("FP32", [1, 4])),
            ("words", zoo.identity("BYTES")),
            ("flags", zoo.identity("BOOL")),
        ):
            zoo.write(daemon.models / f"{name}.toml", SHARED)
            zoo.write(daemon.models / f"{name}.onnx", model)
        pid = daemon.start().pid
        yield daemon
        assert daemon.process.poll() is None
        assert daemon.pid == pid
        assert all(row["restarts"] == 0 for row in daemon.rows() if row["serving"])
        assert '"daemon_bug"' not in daemon.log()


@pytest.fixture
def raw(daemon: Daemon) -> Iterator[Raw]:
    """A client that means harm; its neighbour must be served when it is done."""
    with daemon.raw() as client:
        yield client
    assert daemon.number("neighbour") == 1


def x4(**changes: Any) -> dict[str, Any]:
    """A good input of the model x4, except for the changes; None takes a key away."""
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 4], "data": bytes(16), **changes}
    return {k: v for k, v in tensor.items() if v is not None}


def refused(
    raw: Raw, request: Any, frames: list[bytes] | None = None, *, request_id: Any = "i"
) -> tuple[str, str, str]:
    """Code, reason and message of the one reply, after which the same connection still works."""
    raw.send(request, frames or [])
    reply, rest = raw.receive()
    assert rest == []
    assert set(reply) == {"id", "error"}
    assert reply["id"] == request_id
    error = reply["error"]
    assert set(error) <= {"code", "message", "reason", "retry_after_ms"}
    assert 10 < len(error["message"]) < 1000, error
    assert "Traceback" not in error["message"]
    assert "/tmp" not in error["message"]
    assert "\n" not in error["message"]
    assert raw.call("server_live") == {"live": True}
    return error["code"], error["reason"], error["message"]


def infer(tensors: list[Any], model: Any = "x4", **fields: Any) -> dict[str, Any]:
    """An inference's header."""
    return {"method": "model_infer", "id": "i", "model_name": model, "inputs": tensors, **fields}


# ---------------------------------------------------------------------- frames and headers


@pytest.mark.parametrize(
    "header",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\xff" * 100,
        b"\xc1",
        b"{}",
        msgpack.packb([]),
        msgpack.packb("server_live"),
        msgpack.packb(None),
        msgpack.packb({}),
        msgpack.packb({"method": "server_live"})[:-3],
        msgpack.packb({"method": "server_live"}) + b"\0",
        msgpack.packb({1: 2}),
        msgpack.packb({"method": 7}),
        msgpack.packb({"method": "model_infer", "inputs": "x"}),
        b"\x81\xa6method\xab\xff\xfeserver_li\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xdd\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
    ],
    ids=lambda header: header[:12].hex(),
)
def test_garbage_is_answered_with_what_is_wanted(raw: Raw, header: bytes) -> None:
    """Whatever cannot be decoded is an INVALID_ARGUMENT with the id nil."""
    code, reason, message = refused(raw, header, request_id=None)
    assert (code, reason) == ("INVALID_ARGUMENT", "BAD_HEADER")
    assert "send one msgpack map" in message


def test_an_empty_message_is_answered(raw: Raw) -> None:
    """An empty frame alone, a delimiter with nothing behind it, and a delimiter with an empty header."""
    for frames in ([b""], [b"", b""]):
        raw.socket.send_multipart(frames)
        reply = msgpack.unpackb(raw.socket.recv_multipart()[-1]) if raw.socket.poll(60_000) else {}
        assert code_of(reply)[0] == "INVALID_ARGUMENT"
        assert "send" in reply["error"]["message"]
    assert raw.call("server_live") == {"live": True}


def test_garbage_on_the_admin_socket_is_answered_too(daemon: Daemon, raw: Raw) -> None:
    """The same decoder guards both."""
    with Raw(daemon.admin) as admin:
        assert refused(admin, b"\xff\xff", request_id=None)[:2] == ("INVALID_ARGUMENT", "BAD_HEADER")


def test_an_unknown_method_is_answered_with_those_there_are(raw: Raw) -> None:
    """UNIMPLEMENTED, and the id comes back."""
    code, reason, message = refused(raw, {"method": "model_train", "id": "i"})
    assert (code, reason) == ("UNIMPLEMENTED", "UNKNOWN_METHOD")
    assert "model_infer" in message
    refused(raw, {"method": "x" * 60_000, "id": "i"})
    refused(raw, {"method": "a\nb\0c", "id": "i"})


@pytest.mark.parametrize("version", [0, 2, -1, 2**40])
def test_an_unknown_protocol_version_is_answered_with_the_known_ones(raw: Raw, version: int) -> None:
    """UNIMPLEMENTED, with those that the daemon speaks."""
    code, reason, message = refused(raw, {"method": "server_live", "id": "i", "v": version})
    assert (code, reason) == ("UNIMPLEMENTED", "PROTOCOL_VERSION")
    assert "[1]" in message


def test_a_header_beyond_the_limit_is_refused_before_it_is_decoded(raw: Raw) -> None:
    """With its size, the limit and what to do instead."""
    header = {"method": "model_infer", "id": "i", "inputs": [x4(data=bytes(70_000))]}
    code, reason, message = refused(raw, header, request_id=None)
    assert (code, reason) == ("RESOURCE_EXHAUSTED", "HEADER_TOO_LARGE")
    assert "65536" in message
    assert "frames" in message
    refused(raw, b"\x80" * 3_000_000, request_id=None)


@pytest.mark.parametrize("opening", [b"\x91", b"\x81\xa1a"], ids=["lists", "maps"])
def test_deep_nesting_is_refused(raw: Raw, opening: bytes) -> None:
    """Where nothing is expected there, in data, and in what would be ignored."""
    deep = opening * 20_000 + b"\xc0"
    refused(raw, deep, request_id=None)
    for key in (b"\xa4junk", b"\xaaparameters", b"\xa6inputs"):
        head = b"\x83\xa6method\xabserver_live\xa2id\xa1i" + key + deep
        raw.send(head)
        reply, _ = raw.receive()
        assert reply.get("live") or code_of(reply)[0] == "INVALID_ARGUMENT"
    nested: Any = 1.0
    for _ in range(200):
        nested = [nested]
    code, reason, message = refused(raw, infer([x4(data=[nested])]))
    assert (code, reason) == ("INVALID_ARGUMENT", "BAD_DATA")
    assert "nested" in message


@pytest.mark.parametrize(
    "request_id", [1.5, -1, 2**53, 2**64 - 1, [], {}, True, b"bin", "x" * 1000], ids=repr
)
def test_an_id_of_another_kind_is_refused(raw: Raw, request_id: Any) -> None:
    """It is not echoed, since it may be anything."""
    raw.send({"method": "server_live", "id": request_id})
    reply, _ = raw.receive()
    assert reply["id"] is None
    assert code_of(reply)[0] == "INVALID_ARGUMENT"


# ---------------------------------------------------------------------- tensors


def test_a_missing_frame_an_extra_one_and_one_used_twice(raw: Raw) -> None:
    """Each frame is used exactly once, and the answer says which is not."""
    one = {"name": "x", "datatype": "FP32", "shape": [1, 4], "frame": 0}
    two = {**one, "name": "z"}
    for request, frames, reason, says in (
        (infer([one]), [], "MISSING_FRAME", "0 tensor frames"),
        (infer([{**one, "frame": 1}]), [bytes(16)], "MISSING_FRAME", "frame 1"),
        (infer([{**one, "frame": -1}]), [bytes(16)], "MISSING_FRAME", "frame -1"),
        (infer([one]), [bytes(16), b"more"], "EXTRA_FRAME", "tensor frame 1"),
        (infer([x4()]), [b""], "EXTRA_FRAME", "tensor frame 0"),
        ({"method": "server_live", "id": "i"}, [b"x"], "EXTRA_FRAME", "tensor frame 0"),
        (infer([one, two]), [bytes(16)], "DUPLICATE_FRAME", "two inputs"),
        (infer([{**one, "data": bytes(16)}]), [bytes(16)], "BAD_DATA", "both data and a frame"),
    ):
        code, found, message = refused(raw, request, frames)
        assert (code, found) == ("INVALID_ARGUMENT", reason)
        assert says in message


def test_more_frames_bytes_or_tensors_than_the_limits(raw: Raw) -> None:
    """RESOURCE_EXHAUSTED with the limit, and the socket stays in step."""
    code, reason, message = refused(raw, infer([x4()]), [b"x"] * 500)
    assert (code, reason) == ("RESOURCE_EXHAUSTED", "TOO_MANY_FRAMES")
    assert "64" in message
    tensors = [{"name": str(i), "datatype": "INT8", "shape": [0]} for i in range(300)]
    assert refused(raw, infer(tensors))[:2] == ("RESOURCE_EXHAUSTED", "TOO_MANY_TENSORS")
    outputs = [{"name": str(i)} for i in range(300)]
    assert refused(raw, infer([x4()], outputs=outputs))[:2] == ("RESOURCE_EXHAUSTED", "TOO_MANY_TENSORS")
    halves = [{"name": n, "datatype": "INT8", "shape": [3_000_000], "frame": i} for i, n in enumerate("ab")]
    code, reason, message = refused(raw, infer(halves), [bytes(3_000_000)] * 2)
    assert (code, reason) == ("RESOURCE_EXHAUSTED", "MESSAGE_TOO_LARGE")
    assert "4194304" in message


@pytest.mark.parametrize("size", [0, 15, 17, 1_000_000])
def test_a_byte_count_that_is_off_is_told_with_both_counts(raw: Raw, size: int) -> None:
    """Inline and in a frame."""
    frame = {"name": "x", "datatype": "FP32", "shape": [1, 4], "frame": 0}
    if size < 60_000:
        code, reason, message = refused(raw, infer([x4(data=bytes(size))]))
        assert code == "INVALID_ARGUMENT"
        assert reason in ("BAD_SIZE", "BAD_DATA", "WRONG_BYTES", "BYTE_COUNT"), reason
        assert "expected 16 bytes for FP32 [1,4]" in message
        assert f"got {size}" in message
    code, _, message = refused(raw, infer([frame]), [bytes(size)])
    assert code == "INVALID_ARGUMENT"
    assert f"got {size}" in message
    assert "one frame" in message


@pytest.mark.parametrize(
    "shape",
    [
        [-1, 4],
        [1, -4],
        [1],
        [],
        [1, 5],
        [2**31, 2**31],
        [2**62, 2**62],
        [2**63 - 1, 4],
        [0, 2**63 - 1],
        [2**64 - 1],
        [2**64 - 1, 2**64 - 1],
        [1] * 17,
    ],
    ids=str,
)
def test_a_shape_that_cannot_be_is_refused(daemon: Daemon, raw: Raw, shape: list[int]) -> None:
    """Negative, overflowing, of another rank, beyond the rank's limit: no arithmetic goes wrong."""
    code, reason, _ = refused(raw, infer([x4(shape=shape)]))
    assert (code, reason) == ("INVALID_ARGUMENT", "BAD_SHAPE")


@pytest.mark.parametrize("size", [2**40 + 1, 2**63 - 1])
def test_a_free_dimension_takes_no_nonsense(raw: Raw, size: int) -> None:
    """An overflowing size, for datatypes of fixed size and for BYTES."""
    for datatype, model in (("BOOL", "flags"), ("BYTES", "words")):
        tensor = {"name": "x", "datatype": datatype, "shape": [size], "data": b""}
        code, reason, _ = refused(raw, infer([tensor], model))
        assert (code, reason) == ("INVALID_ARGUMENT", "BAD_SHAPE")


@pytest.mark.parametrize(
    "shape", [[float("nan"), 4], [1.0, 4.0], ["1", 4], None, "1,4", [None], {}], ids=repr
)
def test_a_shape_of_another_type_is_refused_with_its_place(raw: Raw, shape: Any) -> None:
    """NaN, text, nil: the answer says where in the header."""
    tensor = {"name": "x", "datatype": "FP32", "shape": shape, "data": bytes(16)}
    code, _, message = refused(raw, infer([tensor]))
    assert code == "INVALID_ARGUMENT"
    assert "shape" in message


def test_a_wrong_datatype_is_told_from_an_unknown_one(raw: Raw) -> None:
    """The first with the one that the model wants, the second with all that there are."""
    code, reason, message = refused(raw, infer([x4(datatype="FP64", data=bytes(32))]))
    assert (code, reason) == ("INVALID_ARGUMENT", "BAD_DATATYPE")
    assert "expected FP32, got FP64" in message
    code, reason, message = refused(raw, infer([x4(datatype="FLOAT")]))
    assert (code, reason) == ("INVALID_ARGUMENT", "BAD_DATATYPE")
    assert "FP32" in message


def test_names_that_are_unknown_missing_or_there_twice(raw: Raw) -> None:
    """Inputs and outputs; the answer says what there is."""
    for request, reason, says in (
        (infer([x4(name="y")]), "UNKNOWN_INPUT", "it has 'x'"),
        (infer([x4(name="a\nb" * 300)]), "UNKNOWN_INPUT", "it has 'x'"),
        (infer([x4(), x4()]), "DUPLICATE_INPUT", "twice"),
        (infer([]), "MISSING_INPUT", "FP32 [1,4]"),
        (infer([x4()], outputs=[{"name": "z"}]), "UNKNOWN_OUTPUT", "it has 'y'"),
        (infer([x4()], outputs=[{"name": "y"}, {"name": "y"}]), "DUPLICATE_OUTPUT", "twice"),
    ):
        code, found, message = refused(raw, request)
        assert (code, found) == ("INVALID_ARGUMENT", reason)
        assert says in message


def test_values_that_do_not_fit_their_datatype(raw: Raw) -> None:
    """Nothing is rounded, cut or guessed."""
    for data in ([1, 2, 3], [1, 2, 3, "4"], [1, 2, 3, None], [[1, 2], [3, 4, 5]], [1, 2, 3, 1e300]):
        code, reason, _ = refused(raw, infer([x4(data=data)]))
        assert (code, reason) == ("INVALID_ARGUMENT", "BAD_DATA")
    flag = {"name": "x", "datatype": "BOOL", "shape": [1]}
    assert refused(raw, infer([{**flag, "data": [2]}], "flags"))[0] == "INVALID_ARGUMENT"
    assert refused(raw, infer([{**flag, "data": b"\2"}], "flags"))[0] == "INVALID_ARGUMENT"


@pytest.mark.parametrize(
    "data",
    [b"\1\0\0", b"\5\0\0\0abc", b"\xff\xff\xff\xffabc", struct.pack("<I", 1) + b"a" + b"\0", b"", b"\0" * 8],
    ids=bytes.hex,
)
def test_bytes_elements_that_do_not_add_up(raw: Raw, data: bytes) -> None:
    """A length beyond the data, half a length, too few, too many."""
    tensor = {"name": "x", "datatype": "BYTES", "shape": [1], "data": data}
    code, reason, message = refused(raw, infer([tensor], "words"))
    assert (code, reason) == ("INVALID_ARGUMENT", "BAD_BYTES")
    assert "'x'" in message


def test_bytes_that_are_no_text_are_refused_where_the_runtime_takes_text_only(raw: Raw) -> None:
    """ONNX Runtime's strings are UTF-8; others are an error, and no other string."""
    tensor = {"name": "x", "datatype": "BYTES", "shape": [1], "data": struct.pack("<I", 2) + b"\xff\xfe"}
    assert refused(raw, infer([tensor], "words"))[:2] == ("INVALID_ARGUMENT", "BAD_BYTES")


@pytest.mark.parametrize(
    "parameters",
    [
        {"timeout": -1},
        {"timeout": "1s"},
        {"timeout": float("nan")},
        {"timeout": 2**63},
        {"deadline_ns": -1},
        {"deadline_ns": "soon"},
        {"priority": 10},
        {"priority": -1},
        {"priority": "high"},
    ],
    ids=str,
)
def test_parameters_of_no_sense_are_refused_by_name(raw: Raw, parameters: dict[str, Any]) -> None:
    """None is taken for a default."""
    raw.send(infer([x4()], parameters=parameters))
    reply, _ = raw.receive()
    code, _ = code_of(reply)
    assert code in ("INVALID_ARGUMENT", "DEADLINE_EXCEEDED")
    if code == "INVALID_ARGUMENT":
        assert next(iter(parameters)) in reply["error"]["message"]


def test_shared_memory_that_nobody_leased(raw: Raw) -> None:
    """NOT_FOUND, with what to do."""
    tensor = x4(data=None, parameters={"shared_memory_region": "r", "shared_memory_byte_size": 16})
    code, reason, message = refused(raw, infer([tensor]))
    assert (code, reason) == ("NOT_FOUND", "REGION_NOT_FOUND")
    assert "lease.sock" in message


# ---------------------------------------------------------------------- models by name


@pytest.mark.parametrize(
    "name",
    [
        "nobody",
        "",
        "../x4",
        "/etc/passwd",
        "x4/../x4",
        "x4\n",
        "x4\0",
        "x" * 300,
        "x4.onnx",
        "X4",
        "ü",
        "..",
        ".",
    ],
    ids=lambda name: ascii(name)[:20],
)
def test_an_unknown_model_is_not_found_whatever_its_name(raw: Raw, name: str) -> None:
    """Every method that takes a name; the answer says what there is, in one line."""
    for method in ("model_infer", "model_metadata", "model_ready"):
        request = {"method": method, "id": "i", "model_name": name}
        code, reason, message = refused(raw, request)
        assert code in ("NOT_FOUND", "INVALID_ARGUMENT")
        assert code == "NOT_FOUND" or not name
        assert reason
        assert "x4" in message or not name


def test_an_administrator_is_told_of_an_unknown_model_too(daemon: Daemon, raw: Raw) -> None:
    """Load and unload, whatever the name."""
    with Raw(daemon.admin) as admin:
        for name in ("nobody", "../x", "a\nb", "x" * 300, ""):
            for method in ("repository_model_load", "repository_model_unload"):
                code = refused(admin, {"method": method, "id": "i", "model_name": name})[0]
                assert code in ("NOT_FOUND", "INVALID_ARGUMENT")


def test_a_model_that_is_loading_says_so_at_once(daemon: Daemon, raw: Raw) -> None:
    """UNAVAILABLE with when to come again, and not after the load."""
    zoo.write(daemon.models / "warming.toml", ORT)
    zoo.write(daemon.models / "warming.onnx", zoo.slow(2**40))
    daemon.wait_row("warming", lambda r: r["state"] == "LOADING" and r.get("pid"), "loads")
    raw.send(infer([], "warming"))
    reply, _ = raw.receive(10)
    assert code_of(reply) == ("UNAVAILABLE", "MODEL_LOADING")
    assert reply["error"]["retry_after_ms"] > 0
    assert "ask again" in reply["error"]["message"]
    assert raw.call("model_ready", model_name="warming")["ready"] is False
    (daemon.models / "warming.onnx").unlink()
    daemon.wait_gone("warming")


# ---------------------------------------------------------------------- files


@pytest.mark.parametrize("what", ["truncated", "empty", "garbage", "zeros", "text", "html"])
def test_a_file_that_is_no_model_is_refused_with_its_reason(daemon: Daemon, raw: Raw, what: str) -> None:
    """The index, the reply and the journal agree, and a good file in its place is served."""
    whole = zoo.versioned(5).SerializeToString()
    bad = {
        "truncated": whole[: len(whole) * 2 // 3],
        "empty": b"",
        "garbage": bytes(range(256)) * 8,
        "zeros": bytes(5000),
        "text": b"not a model\n",
        "html": b"<!doctype html><title>404 Not Found</title>",
    }[what]
    name = f"bad_{what}"
    zoo.write(daemon.models / f"{name}.toml", SHARED)
    zoo.write(daemon.models / f"{name}.onnx", bad)
    row = daemon.wait_refused(name)
    assert len(row["message"]) > 10
    code, reason, message = refused(raw, infer([], name))
    assert (code, reason) == ("UNAVAILABLE", row["reason"])
    assert name in message
    index = [r for r in raw.call("repository_index")["models"] if r["name"] == name]
    assert [r["state"] for r in index] == ["UNAVAILABLE"]
    assert row["reason"] in index[0]["reason"]
    zoo.write(daemon.models / f"{name}.onnx", whole)
    daemon.wait_number(5, name)
    (daemon.models / f"{name}.onnx").unlink()


def test_a_directory_named_like_a_file_is_refused(daemon: Daemon, raw: Raw) -> None:
    """`x.onnx/` is neither a file nor a bundle; the reason says what is wanted."""
    (daemon.models / "folder.onnx").mkdir()
    (daemon.models / "folder.onnx" / "weights").write_bytes(b"w")

    def row() -> dict[str, Any]:
        return next((r for r in daemon.rows() if r["name"].startswith("folder")), {})

    found = until(row, what="the directory is refused")
    assert found["state"] == "UNAVAILABLE"
    assert found["reason"]
    assert refused(raw, infer([], found["name"]))[0] == "UNAVAILABLE"


@pytest.mark.parametrize("kind", ["fifo", "socket", "dangling", "outside", "device"])
def test_what_is_no_plain_file_is_never_opened(daemon: Daemon, raw: Raw, kind: str) -> None:
    """A pipe would block, a device may do anything, a link may lead out of the folder."""
    import os
    import socket

    path = daemon.models / f"odd_{kind}.onnx"
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "socket":
            with socket.socket(socket.AF_UNIX) as s:
                # Bound by a relative name: a socket's path has 107 bytes at most.
                fd = os.open(daemon.models, os.O_PATH)
                s.bind(f"/proc/self/fd/{fd}/{path.name}")
                os.close(fd)
        case "dangling":
            path.symlink_to("nowhere.onnx")
        case "outside":
            path.symlink_to(zoo.write(daemon.root / "elsewhere.onnx", zoo.versioned(3)))
        case "device":
            path.symlink_to("/dev/zero")
    row = daemon.wait_refused(f"odd_{kind}")
    assert row["message"]
    assert refused(raw, infer([], f"odd_{kind}"))[0] == "UNAVAILABLE"
    path.unlink()
    daemon.wait_gone(f"odd_{kind}")


@pytest.mark.parametrize(
    "stem", ["with space", "new\nline", "naïve", "x" * 140, "-", "semi;colon"], ids=ascii
)
def test_a_file_whose_name_cannot_be_a_model_s_is_refused(daemon: Daemon, raw: Raw, stem: str) -> None:
    """It shows in the index with the rule, and in the journal on one line."""
    path = zoo.write(daemon.models / f"{stem}.onnx", zoo.versioned(1))

    def rows() -> list[dict[str, Any]]:
        return [r for r in daemon.rows() if r["reason"] == "NAME_INVALID" or r["name"] == stem]

    if stem == "-":
        daemon.wait_ready("-")
    else:
        found = until(rows, what="the name is refused")
        assert found[0]["state"] == "UNAVAILABLE"
        assert "letters" in found[0]["message"]
    path.unlink()
    until(lambda: not rows(), what="the file is gone")


def test_a_setting_that_nobody_knows_is_named_with_the_nearest(daemon: Daemon, raw: Raw) -> None:
    """Key, line and the key that was meant; mended, the model is served."""
    zoo.write(daemon.models / "set.toml", b'runtime = "onnxruntime"\nprecison = "fast"\n')
    zoo.write(daemon.models / "set.onnx", zoo.versioned(2))
    message = daemon.wait_refused("set", "SETTINGS_INVALID")["message"]
    assert "precison" in message
    assert "`precision`" in message or "'precision'" in message or "precision?" in message
    assert "line 2" in message or ":2" in message
    assert str(daemon.models) not in message
    assert refused(raw, infer([], "set"))[:2] == ("UNAVAILABLE", "SETTINGS_INVALID")
    for bad in (b"threads = 0\n", b"device = [", b'device = "tpu"\n', b"\xff\xfe", b"a." * 5000 + b"a = 1\n"):
        before = daemon.wait_refused("set")["message"]
        zoo.write(daemon.models / "set.toml", bad)
        daemon.wait_row("set", lambda r, before=before: r["message"] != before, "has another reason")
        daemon.wait_refused("set", "SETTINGS_INVALID")
    zoo.write(daemon.models / "set.toml", ORT)
    daemon.wait_number(2, "set")


def test_a_file_that_may_not_be_read_is_refused_until_it_may(tmp_path: Path) -> None:
    """The daemon runs without the right to read everything, which root has."""
    import os
    import shutil
    import subprocess

    prefix: list[str] = []
    if os.geteuid() == 0:
        prefix = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
        if not shutil.which("setpriv") or subprocess.run([*prefix, "true"], check=False).returncode:
            pytest.skip("setpriv cannot take root's right to read everything away here")
    with Daemon(tmp_path) as daemon:
        path = zoo.write(daemon.models / "m.onnx", zoo.versioned(1))
        path.chmod(0)
        daemon.start(prefix)
        row = daemon.wait_refused("m")
        assert row["reason"] == "UNREADABLE"
        assert "ermission" in row["message"]
        path.chmod(0o644)
        daemon.wait_number(1)


# ---------------------------------------------------------------------- floods


def test_a_flood_of_bad_requests_leaves_the_journal_readable(daemon: Daemon, raw: Raw) -> None:
    """5000 are answered, the neighbour is served meanwhile, and the journal says it once for each kind."""
    lines_before = daemon.log().count("\n")
    header = msgpack.packb({"method": "no_such_method_" + "x" * 100})
    with daemon.raw() as neighbour:
        answered = 0
        for batch in range(50):
            for _ in range(100):
                raw.send(header)
            inputs = [
                {"name": "x", "datatype": "FP32", "shape": [1, 4], "data": struct.pack("<4f", *[1] * 4)}
            ]
            assert "outputs" in neighbour.infer("neighbour", inputs), batch
            for _ in range(100):
                assert code_of(raw.receive()[0]) == ("UNIMPLEMENTED", "UNKNOWN_METHOD")
                answered += 1
        assert answered == 5000
        assert raw.quiet()
    new = [json.loads(line) for line in daemon.log().splitlines()[lines_before:]]
    mine = [line for line in new if line["event"] == "client_misbehaves"]
    assert len(mine) <= 1, mine
    assert len(new) < 10, new


def test_a_client_that_never_reads_harms_nobody(daemon: Daemon, raw: Raw) -> None:
    """It is owed thousands of replies; others are served, and its going away leaves nothing."""
    with daemon.raw() as deaf:
        for _ in range(20_000):
            deaf.send({"method": "repository_index"})
            if not deaf.socket.poll(0, 2):
                break
        assert daemon.number("neighbour") == 1
    assert raw.call("server_live") == {"live": True}


def test_a_message_beyond_what_the_socket_takes_costs_only_that_connection(daemon: Daemon, raw: Raw) -> None:
    """One frame far over the limit is never read into memory; the neighbour does not notice."""
    with daemon.raw() as huge:
        huge.send(infer([x4(data=None, frame=0)]), [bytes(64 * 1024 * 1024)])
        assert daemon.number("neighbour") == 1
        assert raw.call("server_live") == {"live": True}
