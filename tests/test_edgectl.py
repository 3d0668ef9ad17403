"""edgectl against a peer that speaks the protocol with canned replies, over real sockets."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import msgpack
import numpy as np
import pytest
import zmq

from edged.cli import completion, edgectl, publish
from edged.cli import edged as edged_cli
from edged.cli.bench import percentiles, run_slots
from edged.cli.images import ImageError, layout_of, picture
from edged.cli.inputs import InputError, json_values, read_inputs, read_shapes, synthetic
from edged.cli.tables import Column, Terminal, bytes_text, clean, duration_text, micros_text, table
from edged.cli.waiting import Goal, Wanted, judge, split_reason, unnamed_refusals
from edged.config import parse_model_settings
from edged.tensors import TensorSpec

ROOT = pathlib.Path(__file__).resolve().parents[1]

Reply = Callable[[dict[str, Any], list[bytes]], dict[str, Any]]


class Peer:
    """The daemon's sockets, answered from a table; a thread owns every socket."""

    def __init__(self, directory: pathlib.Path) -> None:
        self.directory = directory
        self.endpoint = f"ipc://{directory}/edged.sock"
        self.models_dir = directory / "models"
        self.models_dir.mkdir()
        self.models: list[dict[str, Any]] = []
        self.asked: list[dict[str, Any]] = []
        self.on_index: Callable[[int], None] = lambda _count: None
        self.replies: dict[str, Reply] = {
            "server_metadata": lambda h, f: {"name": "edged", "version": "1", "instance_id": "i"},
            "server_status": self._status,
            "repository_index": self._index,
            "repository_model_load": lambda h, f: {},
            "repository_model_unload": lambda h, f: {},
            "model_metadata": lambda h, f: {
                "name": h["model_name"],
                "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}],
                "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 4]}],
            },
            "model_infer": self._double,
            "model_statistics": lambda h, f: {"model_stats": [STATISTICS]},
        }
        self._asked_index = 0
        self._stop = threading.Event()
        self._events: list[tuple[str, dict[str, Any]]] = []
        self._context = zmq.Context()
        self._wake_read, self._wake_write = os.pipe()
        self._sockets = [self._bind(zmq.ROUTER, "edged.sock"), self._bind(zmq.ROUTER, "admin.sock")]
        self._publisher = self._bind(zmq.XPUB, "events.sock")
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Peer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        os.write(self._wake_write, b"x")
        self._thread.join(10)
        for socket in (*self._sockets, self._publisher):
            socket.close(0)
        self._context.term()
        os.close(self._wake_read)
        os.close(self._wake_write)

    def publish_on_subscribe(self, topic: str, **body: Any) -> None:
        """This event goes to whoever subscribes."""
        self._events.append((topic, body))

    def _bind(self, kind: int, name: str) -> Any:
        socket = self._context.socket(kind)
        socket.bind(f"ipc://{self.directory}/{name}")
        return socket

    def _run(self) -> None:
        poller = zmq.Poller()
        for each in (*self._sockets, self._publisher, self._wake_read):
            poller.register(each, zmq.POLLIN)
        while not self._stop.is_set():
            for ready, _ in poller.poll():
                if ready is self._publisher:
                    if self._publisher.recv()[:1] == b"\x01":
                        for seq, (topic, body) in enumerate(self._events):
                            packed = msgpack.packb({"seq": seq, "instance_id": "i", **body})
                            self._publisher.send_multipart([topic.encode(), packed])
                elif ready in self._sockets:
                    self._answer(ready)

    def _answer(self, socket: Any) -> None:
        identity, head, *frames = socket.recv_multipart()
        header = msgpack.unpackb(head)
        self.asked.append(header)
        reply = self.replies[header["method"]](header, frames)
        socket.send_multipart([identity, msgpack.packb({"id": header["id"], **reply})])

    def _status(self, _header: dict[str, Any], _frames: list[bytes]) -> dict[str, Any]:
        return {**STATUS, "models_dir": str(self.models_dir), "models": self.models}

    def _index(self, _header: dict[str, Any], _frames: list[bytes]) -> dict[str, Any]:
        self._asked_index += 1
        self.on_index(self._asked_index)
        keys = ("name", "version", "state", "reason", "sha256", "settings_sha256")
        return {"models": [{key: m[key] for key in keys if key in m} for m in self.models]}

    def _double(self, header: dict[str, Any], frames: list[bytes]) -> dict[str, Any]:
        wire = header["inputs"][0]
        array = np.frombuffer(wire.get("data") or frames[wire["frame"]], dtype="<f4") * 2
        output = {"name": "y", "datatype": "FP32", "shape": wire["shape"], "data": array.tobytes()}
        return {
            "model_name": header["model_name"],
            "model_version": "3",
            "outputs": [output],
            "parameters": {
                "device": "CPU",
                "runtime": "onnxruntime",
                "precision": "f32",
                "queue_us": 7,
                "compute_us": 42,
                "fallback_reason": "NPU: no_permission",
            },
        }


STATUS: dict[str, Any] = {
    "version": "0.1.0",
    "state": "ready",
    "pid": 77,
    "uptime_s": 7300,
    "endpoint": "ipc:///x/edged.sock",
    "resources": {
        "level": "WARN",
        "reasons": ["memory 81 % of 2.0 GiB"],
        "sample": {"memory_total_bytes": 2 << 30, "memory_available_bytes": 1 << 29, "cpu_percent": 12.0},
    },
    "devices": [
        {
            "runtime": "openvino",
            "device": "NPU",
            "status": "no_permission",
            "hint": "join the group render",
        }
    ],
    "clients": {"in_flight": 1, "seen": 5, "refused": 0},
}

STATISTICS = {
    "name": "digits",
    "version": "3",
    "last_inference": 0,
    "inference_stats": {"success": {"count": 2, "ns": 400_000}, "fail": {"count": 1, "ns": 5}},
    "latency_us": {"p50": 190, "p90": 200, "p99": 210, "count": 2},
}


def model(name: str, state: str, **more: Any) -> dict[str, Any]:
    """One entry of the status."""
    return {"name": name, "version": "1", "state": state, "reason": "", **more}


def settings_sha256(text: str) -> str:
    """What the daemon knows these settings by."""
    return parse_model_settings(text, source="m.toml").sha256()


@pytest.fixture
def peer(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Peer]:
    """A running peer that EDGED_ENDPOINT names."""
    with Peer(tmp_path) as running:
        monkeypatch.setenv("EDGED_ENDPOINT", running.endpoint)
        yield running


@pytest.fixture
def nobody(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """An endpoint and directories where no daemon ever was."""
    monkeypatch.setenv("EDGED_ENDPOINT", f"ipc://{tmp_path}/edged.sock")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path


def run_json(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, Any]:
    """The exit code and the document."""
    code = edgectl.main([*argv, "--json"])
    return code, json.loads(capsys.readouterr().out)


# ---- questions ------------------------------------------------------------------------------------------


def test_status_shows_models_devices_and_what_to_do(peer: Peer, capsys: pytest.CaptureFixture[str]) -> None:
    """The page has the state, the pressure with its figures, each model and each device's hint."""
    peer.models = [model("digits", "READY", device="CPU", runtime="onnxruntime", p50_us=85)]
    assert edgectl.main(["status"]) == 0
    out = capsys.readouterr().out
    for text in (
        "0.1.0, ready, pid 77",
        "2 h 1 min",
        "WARN: memory 81 %",
        "digits",
        "85 µs",
        "join the group render",
    ):
        assert text in out


def test_json_may_stand_before_or_behind_the_command(peer: Peer, capsys: pytest.CaptureFixture[str]) -> None:
    """Both give the same one document, which is the daemon's own."""
    assert edgectl.main(["--json", "status"]) == 0
    before = json.loads(capsys.readouterr().out)
    code, behind = run_json(capsys, "status")
    assert code == 0
    assert before == behind
    assert before["pid"] == 77


def test_endpoint_flag_wins_over_the_environment(
    peer: Peer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """--endpoint is asked, whatever EDGED_ENDPOINT says."""
    monkeypatch.setenv("EDGED_ENDPOINT", "ipc:///nowhere/edged.sock")
    assert edgectl.main(["--endpoint", peer.endpoint, "devices"]) == 0
    assert "no_permission" in capsys.readouterr().out


def test_models_falls_back_to_the_index_without_admin_rights(
    peer: Peer, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who may not ask for status still sees each model's state and reason."""
    peer.models = [model("vad", "UNAVAILABLE", reason="MODEL_INVALID: truncated")]
    peer.replies["server_status"] = lambda h, f: {"error": {"code": "PERMISSION_DENIED", "message": "no"}}
    code, document = run_json(capsys, "models")
    assert code == 0
    assert document["models"] == [
        {"name": "vad", "version": "1", "state": "UNAVAILABLE", "reason": "MODEL_INVALID: truncated"}
    ]


def test_names_for_completion_are_never_shell_code(peer: Peer, capsys: pytest.CaptureFixture[str]) -> None:
    """The index also lists entries with impossible names, which bash would expand."""
    peer.models = [model("b", "READY"), model("$(touch pwned)", "UNAVAILABLE"), model("a.1", "READY")]
    assert edgectl.main(["models", "--names"]) == 0
    assert capsys.readouterr().out == "a.1\nb\n"


def test_stats_shows_means_and_percentiles(peer: Peer, capsys: pytest.CaptureFixture[str]) -> None:
    """A mean is the nanoseconds over the count; what never happened is no zero."""
    assert edgectl.main(["stats", "digits"]) == 0
    out = capsys.readouterr().out
    assert "200 µs" in out
    assert "190 µs" in out
    assert peer.asked[-1]["model_name"] == "digits"


def test_load_and_unload_go_to_the_admin_socket(peer: Peer, capsys: pytest.CaptureFixture[str]) -> None:
    """Both name the model and succeed."""
    assert edgectl.main(["load", "digits"]) == 0
    assert edgectl.main(["unload", "digits"]) == 0
    assert [a["method"] for a in peer.asked] == ["repository_model_load", "repository_model_unload"]
    assert "load asked for" in capsys.readouterr().out


def test_watch_ends_after_count(peer: Peer, capsys: pytest.CaptureFixture[str]) -> None:
    """One line for each event, with --json one document a line."""
    peer.publish_on_subscribe("model.state", name="digits", state="LOADING")
    peer.publish_on_subscribe("model.state", name="digits", state="READY")
    assert edgectl.main(["watch", "--count", "2", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["state"] for line in lines] == ["LOADING", "READY"]
    assert lines[0]["topic"] == "model.state"


# ---- errors and exit codes ------------------------------------------------------------------------------


@pytest.mark.parametrize("argv", [["status"], ["wait", "m"], ["watch"], ["infer", "m", "-i", "1"]])
def test_no_daemon_is_exit_3_and_says_what_to_start(
    nobody: pathlib.Path, argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Every command that needs the daemon says how to start one."""
    assert edgectl.main(argv) == 3
    err = capsys.readouterr().err
    assert "systemctl start edged" in err
    assert "edged --models DIR" in err


def test_refusal_is_exit_1_with_the_reason(peer: Peer, capsys: pytest.CaptureFixture[str]) -> None:
    """The daemon's error comes through, in words and as JSON."""
    error = {"code": "NOT_FOUND", "message": "no model 'x' in the folder", "reason": "MODEL_NOT_FOUND"}
    peer.replies["model_metadata"] = lambda h, f: {"error": error}
    assert edgectl.main(["--json", "infer", "x", "-i", "1"]) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["error"]["reason"] == "MODEL_NOT_FOUND"
    assert captured.err == (
        "edgectl: no model 'x' in the folder [MODEL_NOT_FOUND]; `edgectl models` lists what there is\n"
    )


@pytest.mark.parametrize(
    ("code", "command"),
    [
        ("NOT_FOUND", "`edgectl models`"),
        ("INVALID_ARGUMENT", "--help`"),
        ("UNAVAILABLE", "`edgectl explain m`"),
        ("FAILED_PRECONDITION", "`edgectl explain m`"),
        ("RESOURCE_EXHAUSTED", "`edgectl top`"),
        ("DEADLINE_EXCEEDED", "`edgectl top`"),
        ("INTERNAL", "`edgectl logs`"),
        ("PERMISSION_DENIED", "`edgectl doctor`"),
        ("UNIMPLEMENTED", "--help`"),
    ],
)
def test_every_refusal_names_the_next_command(
    peer: Peer, code: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unless the daemon's own words name one."""
    peer.replies["model_metadata"] = lambda h, f: {"error": {"code": code, "message": "it is so"}}
    assert edgectl.main(["infer", "m", "-i", "1"]) in (1, 2)
    assert command in capsys.readouterr().err
    said = {"code": code, "message": "type `this`"}
    peer.replies["model_metadata"] = lambda h, f: {"error": said}
    edgectl.main(["infer", "m", "-i", "1"])
    assert capsys.readouterr().err.endswith("type `this`\n")


def test_a_deadline_is_exit_2(peer: Peer) -> None:
    """A fleet script can tell a time-out from a refusal."""
    peer.replies["model_infer"] = lambda h, f: {"error": {"code": "DEADLINE_EXCEEDED", "message": "late"}}
    assert edgectl.main(["infer", "m", "-i", "[1,2,3,4]"]) == 2


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["nonsense"],
        ["wait"],
        ["wait", "m", "--timeout", "-1"],
        ["watch", "--count", "0"],
        ["status", "--js"],
    ],
)
def test_bad_usage_is_exit_64(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """And nothing is asked of anyone."""
    assert edgectl.main(argv) == 64
    assert "usage: edgectl" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--help"], ["put", "--help"], ["infer", "--help"], ["--version"]])
def test_help_is_exit_0(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Help needs no daemon."""
    assert edgectl.main(argv) == 0
    assert "edgectl" in capsys.readouterr().out


def test_a_closed_pipe_is_no_traceback(peer: Peer) -> None:
    """`edgectl status | true` ends quietly."""
    peer.models = [model(f"m{i}", "READY") for i in range(3000)]
    process = subprocess.Popen(
        [sys.executable, "-m", "edged.cli.edgectl", "status"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    with process.stderr:
        assert process.stderr.read() == b""
    assert process.wait(30) == 141


# ---- wait -----------------------------------------------------------------------------------------------


def test_wait_serving_refused_and_time_out(peer: Peer, capsys: pytest.CaptureFixture[str]) -> None:
    """The three ends of a wait, each with its code."""
    digest = "a" * 64
    peer.models = [model("m", "READY", sha256=digest)]
    assert edgectl.main(["wait", "m", "--sha256", digest]) == 0
    peer.models = [
        model("m", "READY", sha256="b" * 64),
        model("m", "UNAVAILABLE", sha256=digest, reason="GOLDEN_MISMATCH: off by 3"),
    ]
    assert edgectl.main(["wait", "m", "--sha256", digest]) == 1
    assert "GOLDEN_MISMATCH: off by 3" in capsys.readouterr().out
    peer.models = [model("m", "LOADING")]
    assert edgectl.main(["wait", "m", "--timeout", "0.1"]) == 2
    assert "is loading" in capsys.readouterr().out


def test_wait_needs_no_admin_rights(peer: Peer) -> None:
    """Whoever may infer may wait: the index has the digests."""
    peer.replies["server_status"] = lambda h, f: {"error": {"code": "PERMISSION_DENIED", "message": "no"}}
    peer.models = [model("m", "READY", sha256="a" * 64)]
    assert edgectl.main(["wait", "m", "--sha256", "A" * 64]) == 0
    assert not any(asked["method"] == "server_status" for asked in peer.asked)


def test_wait_follows_an_event_instead_of_polling(peer: Peer) -> None:
    """The event of the last step makes it ask again at once."""
    peer.models = [model("m", "LOADING")]
    peer.publish_on_subscribe("model.state", name="m", version="1", state="READY")

    def then_ready(count: int) -> None:
        if count > 1:
            peer.models = [model("m", "READY")]

    peer.on_index = then_ready
    assert edgectl.main(["wait", "m", "--timeout", "20"]) == 0
    assert sum(a["method"] == "repository_index" for a in peer.asked) == 2


def test_wait_rejects_what_is_no_digest(peer: Peer) -> None:
    """A truncated digest would wait for ever."""
    assert edgectl.main(["wait", "m", "--sha256", "abc"]) == 64


def test_only_a_verdict_on_the_wanted_content_counts() -> None:
    """What the daemon says of other bytes, good or bad, is not waited for and not believed."""
    goal = Goal("m", frozenset({Wanted("a")}), frozenset())
    others = [model("m", "READY", sha256="b"), model("n", "UNAVAILABLE", sha256="a")]
    assert judge(others, goal).text == "m version 1 serves other content (b…)"
    assert judge([*others, model("m", "UNAVAILABLE", sha256="c", reason="x")], goal).state == "pending"
    assert judge([*others, model("m", "LOADING", sha256="a")], goal).state == "pending"
    assert judge([*others, model("m", "UNAVAILABLE", sha256="a", reason="x")], goal).state == "refused"
    assert judge([*others, model("m", "READY", sha256="a")], goal).state == "serving"
    assert judge([model("m", "UNLOADING", sha256="a")], goal).state == "pending"
    assert judge(None, goal).text == "the daemon is away"


def test_every_version_of_a_bundle_is_waited_for() -> None:
    """One that is refused decides, one that is not there yet holds up."""
    goal = Goal("m", frozenset({Wanted("a"), Wanted("b")}), frozenset())
    ready = model("m", "READY", sha256="a")
    assert judge([ready], goal).state == "pending"
    assert judge([ready, model("m", "UNAVAILABLE", version="2", sha256="b")], goal).state == "refused"
    assert judge([ready, model("m", "READY", version="2", sha256="b")], goal).state == "serving"


def test_only_a_verdict_under_the_wanted_settings_counts() -> None:
    """The same content serves already with the old ones; the new ones may be refused beside it."""
    goal = Goal("m", frozenset({Wanted("a", "new")}), frozenset())
    old = model("m", "READY", sha256="a", settings_sha256="old")
    assert judge([old], goal).text == "m version 1 serves with other settings"
    assert judge([old, {**old, "state": "LOADING", "settings_sha256": "new"}], goal).state == "pending"
    assert judge([old, {**old, "state": "UNAVAILABLE", "settings_sha256": "new"}], goal).state == "refused"
    assert judge([{**old, "settings_sha256": "new"}], goal).state == "serving"
    # Whoever waits for the content itself has it, whatever becomes of the settings.
    assert judge([old], Goal("m", frozenset({Wanted("a")}))).state == "serving"


def test_a_refusal_without_a_content_counts_when_it_is_new() -> None:
    """A disk that was full before is no verdict; one that is full again, or differently, is."""
    old = model("m", "UNAVAILABLE", version="", reason="DISK_FULL: 5 bytes are needed")
    wanted = frozenset({Wanted("a")})
    goal = Goal("m", wanted, unnamed_refusals([old], "m"))
    assert judge([old], goal).state == "pending"
    assert judge([old], goal, frozenset({"DISK_FULL"})).state == "refused"
    assert judge([{**old, "reason": "DISK_FULL: 6 bytes are needed"}], goal).state == "refused"
    busy = {**old, "reason": "BEING_WRITTEN: m.onnx is open for writing: it is looked at again"}
    assert judge([busy], goal).state == "pending"
    assert judge([old], Goal("m", wanted), frozenset({"DISK_FULL"})).state == "pending"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("GOLDEN_MISMATCH: y: off by 3", ("GOLDEN_MISMATCH", "y: off by 3")),
        ("MODEL_UNLOADED", ("MODEL_UNLOADED", "")),
        ("loading on cpu", ("", "loading on cpu")),
        (None, ("", "")),
    ],
)
def test_a_reason_is_told_from_its_words(text: str | None, parts: tuple[str, str]) -> None:
    """The index has both in one field; a script wants the first alone."""
    assert split_reason({"reason": text}) == parts


# ---- put ------------------------------------------------------------------------------------------------


def test_put_learns_the_folder_from_the_daemon_and_waits(
    peer: Peer, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file is in the daemon's folder, and the wait is for its very content."""
    source = tmp_path / "digits.onnx"
    source.write_bytes(b"model two")
    beside = 'device = "cpu"\n'
    (tmp_path / "digits.toml").write_text(beside)
    digest = hashlib.sha256(b"model two").hexdigest()
    peer.models = [model("digits", "READY", sha256="0" * 64)]

    def serve_what_was_put(_count: int) -> None:
        if (peer.models_dir / "digits.onnx").exists():
            peer.models = [
                model("digits", "READY", version="2", sha256=digest, settings_sha256=settings_sha256(beside))
            ]

    peer.on_index = serve_what_was_put
    assert edgectl.main(["put", str(source), "--wait"]) == 0
    assert "digits version 2 serves" in capsys.readouterr().out
    assert (peer.models_dir / "digits.onnx").read_bytes() == b"model two"
    assert (peer.models_dir / "digits.toml").read_text() == 'device = "cpu"\n'


def test_put_wait_of_a_bundle_is_for_its_very_content(
    peer: Peer, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The old version goes on serving beside the refusal: that is no success, however it stands there."""
    bundle = tmp_path / "bundle" / "m"
    (bundle / "golden").mkdir(parents=True)
    (bundle / "model.onnx").write_bytes(b"graph")
    (bundle / "golden" / "0.json").write_bytes(b"{}")
    listing = "".join(
        f"{name}\0{len(data)}\0{hashlib.sha256(data).hexdigest()}\n"
        for name, data in (("golden/0.json", b"{}"), ("model.onnx", b"graph"))
    )
    digest = hashlib.sha256(f"edged bundle 1\n{listing}".encode()).hexdigest()
    old = model("m", "READY", sha256="0" * 64)
    peer.models = [old]

    def refuse_what_was_put(count: int) -> None:
        if count > 2:
            known_by = {"sha256": digest, "settings_sha256": settings_sha256("")}
            peer.models = [old, model("m", "UNAVAILABLE", reason="GOLDEN_MISMATCH: off", **known_by)]

    peer.on_index = refuse_what_was_put
    code, document = run_json(capsys, "put", str(bundle), "--wait")
    assert (code, document["sha256"]) == (1, digest)
    assert (document["reason"], document["reason_message"]) == ("GOLDEN_MISMATCH", "off")


def test_put_wait_of_new_settings_waits_for_the_daemon_to_take_them(
    peer: Peer, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The content serves already; that is no success until it serves under the settings that were put."""
    source = tmp_path / "m.onnx"
    source.write_bytes(b"m")
    (tmp_path / "m.toml").write_text("threads = 1\n")
    row = model("m", "READY", sha256=hashlib.sha256(b"m").hexdigest(), settings_sha256=settings_sha256(""))
    peer.models = [row]
    assert edgectl.main(["put", str(source), "--wait", "--timeout", "0.3"]) == 2
    assert "serves with other settings" in capsys.readouterr().out
    peer.models = [{**row, "settings_sha256": settings_sha256("# one will do\nthreads = 1")}]
    assert edgectl.main(["put", str(source), "--wait", "--timeout", "20"]) == 0


@pytest.mark.parametrize("flags", [[], ["--wait"]])
def test_put_says_at_once_what_the_folders_rules_refuse(
    peer: Peer, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    """Bad settings need no daemon to be seen."""
    source = tmp_path / "m.onnx"
    source.write_bytes(b"m")
    (tmp_path / "m.toml").write_text("thread = 1\n")
    code, document = run_json(capsys, "put", str(source), *flags)
    assert (code, document["outcome"], document["reason"]) == (1, "refused", "SETTINGS_INVALID")
    assert "threads" in document["message"]
    assert document["sha256"] is None


def test_put_wait_says_the_reason_of_a_refusal(
    peer: Peer, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit 1, and the daemon's reason."""
    source = tmp_path / "m.onnx"
    source.write_bytes(b"bad")
    digest = hashlib.sha256(b"bad").hexdigest()
    known_by = {"sha256": digest, "settings_sha256": settings_sha256("")}
    peer.models = [model("m", "UNAVAILABLE", reason="MODEL_INVALID: no graph", **known_by)]
    code, document = run_json(capsys, "put", str(source), "--wait", "--name", "m")
    assert code == 1
    assert document["outcome"] == "refused"
    assert document["message"] == "m was refused: MODEL_INVALID: no graph"
    assert document["sha256"] == digest


def test_put_wait_refuses_another_folder_than_the_daemons(peer: Peer, tmp_path: pathlib.Path) -> None:
    """Nothing put there would ever be served, so nothing is put."""
    other = tmp_path / "other"
    other.mkdir()
    (tmp_path / "m.onnx").write_bytes(b"m")
    assert edgectl.main(["put", str(tmp_path / "m.onnx"), "--models", str(other), "--wait"]) == 64
    assert not list(other.iterdir())


def test_put_without_a_daemon_publishes_and_says_so(
    nobody: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A device is provisioned before its daemon runs; with --wait it is exit 3 and nothing is written."""
    models = nobody / "data" / "edged" / "models"
    models.mkdir(parents=True)
    (nobody / "m.onnx").write_bytes(b"m")
    assert edgectl.main(["put", str(nobody / "m.onnx"), "--wait"]) == 3
    assert not list(models.iterdir())
    capsys.readouterr()
    assert edgectl.main(["put", str(nobody / "m.onnx")]) == 0
    assert "no daemon was reached" in capsys.readouterr().out
    assert (models / "m.onnx").read_bytes() == b"m"


def test_sigterm_leaves_nothing_behind(nobody: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A put that is ended in the middle of the copy takes its hidden copy away."""
    models = nobody / "models"
    models.mkdir()
    (nobody / "m.onnx").write_bytes(b"m")

    def ended(_reader: object, writer: Any) -> str:
        writer.write(b"half")
        assert len(list(models.iterdir())) == 1
        os.kill(os.getpid(), signal.SIGTERM)
        return ""

    monkeypatch.setattr(publish, "_pump", ended)
    assert edgectl.main(["put", str(nobody / "m.onnx"), "--models", str(models)]) == 130
    assert not list(models.iterdir())
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


# ---- infer and its inputs -------------------------------------------------------------------------------


def test_infer_shows_the_answer_and_where_it_was_made(peer: Peer, capsys: pytest.CaptureFixture[str]) -> None:
    """Values, device and the reason of a fallback are on the page."""
    assert edgectl.main(["infer", "digits", "-i", "x=[1, 2, 3, 4.5]"]) == 0
    out = capsys.readouterr().out
    for text in ("2 4 6 9", "[3] 9", "CPU, onnxruntime f32", "NPU: no_permission", "digits version 3"):
        assert text in out


def test_infer_reads_npy_and_writes_npz(
    peer: Peer, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A float64 array is converted, and said; the outputs land in the file and in the JSON."""
    np.save(tmp_path / "x.npy", np.arange(8.0).reshape(2, 4))
    code = edgectl.main(
        ["infer", "m", "-i", f"@{tmp_path}/x.npy", "--npz", str(tmp_path / "out.npz"), "--json"]
    )
    captured = capsys.readouterr()
    assert code == 0
    assert "float64 was converted to FP32" in captured.err
    assert json.loads(captured.out)["outputs"]["y"]["shape"] == [2, 4]
    with np.load(tmp_path / "out.npz", allow_pickle=False) as saved:
        assert saved["y"].tolist() == (np.arange(8).reshape(2, 4) * 2).tolist()


def test_infer_writes_no_npz_that_cuts_a_string(
    peer: Peer, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """numpy takes the zero bytes off a string's end: such an output is named, and the others are written."""

    def strings(_header: dict[str, Any], _frames: list[Any]) -> dict[str, Any]:
        outputs = []
        for name, items in (("whole", [b"a", b"\0b"]), ("padded", [b"a\0", b"b"])):
            raw = b"".join(len(item).to_bytes(4, "little") + item for item in items)
            outputs.append({"name": name, "datatype": "BYTES", "shape": [2], "data": raw})
        return {"model_name": "m", "model_version": "1", "outputs": outputs, "parameters": {}}

    peer.replies["model_infer"] = strings
    path = tmp_path / "out.npz"
    assert edgectl.main(["infer", "m", "-i", "x=[1, 2, 3, 4]", "--npz", str(path)]) == 1
    assert "zero bytes: padded; --json has them" in capsys.readouterr().err
    with np.load(path, allow_pickle=False) as saved:
        assert saved.files == ["whole"]
        assert saved["whole"].tolist() == [b"a", b"\0b"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["z=1"], "names no input"),
        ([], "needs more inputs: -i x=… (FP32 [?,4])"),
        (["x=[1", "x=1"], "is not JSON"),
        (["x=[[1],[2,3]]"], "no regular array"),
        (['x="text"'], "has something else"),
        (["x=@/nowhere.npy"], "could not be read"),
        (["x=@/etc/passwd"], "none of .npy"),
        (["x=1", "x=2"], "given twice"),
        (["x=" + "[" * 100_000], "nested too deep"),
    ],
)
def test_bad_inputs_say_what_would_do(given: list[str], words: str) -> None:
    """Each with a sentence."""
    spec = TensorSpec("x", "FP32", (-1, 4))
    with pytest.raises(InputError) as caught:
        read_inputs(given, [spec], image_scale=None, note=lambda _: None)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("datatype", "shape", "text", "want"),
    [
        ("FP32", (-1, 4), "[1,2,3,4]", (1, 4)),
        ("FP32", (1, 2, 2), "[1,2,3,4]", (1, 2, 2)),
        ("INT64", (-1, 2), "[1,2,3,4]", (2, 2)),
        ("FP32", (), "7", ()),
        ("INT64", None, "[[7]]", (1, 1)),
        ("FP32", (2, 2), "[1,2,3]", (3,)),
        ("BYTES", (-1,), "plain text", (1,)),
        ("BOOL", (2,), "[true, false]", (2,)),
        ("FP32", (0,), "[]", (0,)),
    ],
)
def test_json_takes_the_declared_type_and_shape(
    datatype: str, shape: tuple[int, ...] | None, text: str, want: tuple[int, ...]
) -> None:
    """Missing dimensions are filled in only where there is one way to do it."""
    spec = TensorSpec("x", datatype, shape)
    array = read_inputs([f"x={text}"], [spec], image_scale=None, note=lambda _: None)["x"]
    assert array.shape == want


@pytest.mark.parametrize(
    ("datatype", "text"), [("INT8", "[300]"), ("INT64", "[1.5]"), ("FP16", "[1e9]"), ("UINT8", "[-1]")]
)
def test_values_that_do_not_fit_are_refused(datatype: str, text: str) -> None:
    """No wrap-around, no cut, no infinity out of a number."""
    with pytest.raises(InputError, match="do not fit"):
        read_inputs([f"x={text}"], [TensorSpec("x", datatype, (1,))], image_scale=None, note=lambda _: None)


def test_json_has_a_word_for_every_value() -> None:
    """What JSON has no number for becomes a string, as protobuf does it."""
    value = {"a": np.array([np.nan, np.inf, -np.inf, 1.5]), "b": [b"\xff", np.int64(3)], 4: None}
    assert json_values(value) == {"a": ["NaN", "Infinity", "-Infinity", 1.5], "b": ["\\xff", 3], "4": None}


def test_synthetic_inputs_fit_the_model() -> None:
    """Of the shapes that are given; without one free dimensions are 1."""
    specs = [TensorSpec("x", "FP32", (-1, 3)), TensorSpec("n", "INT64", ()), TensorSpec("s", "BYTES", (2,))]
    arrays = synthetic(specs, {"x": [5, 3]})
    assert {k: v.shape for k, v in arrays.items()} == {"x": (5, 3), "n": (), "s": (2,)}


@pytest.mark.parametrize("text", ["x=5x3", "x=5,3", "n=5"])
def test_a_shape_is_typed_with_x_or_commas(text: str) -> None:
    """As people write sizes, and as lists are written; a name may hold an equals sign."""
    specs = [TensorSpec("x", "FP32", (-1, 3)), TensorSpec("n", "INT64", (-1,)), TensorSpec("a=b", "FP32", ())]
    name, _, dims = text.partition("=")
    assert read_shapes([text, "a=b="], specs) == {
        name: [int(d) for d in dims.replace(",", "x").split("x")],
        "a=b": [],
    }


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (["q=1"], "names no input of this model: 'q'; it has: x"),
        (["x=5x4"], r"expected shape \[\?,3\], got \[5,4\]"),
        (["x=5"], "expected 2 dimensions"),
        (["x=0x3"], "takes NAME=1x3x224x224"),
        (["x=-1x3"], "takes NAME=1x3x224x224"),
        (["x=ax3"], "takes NAME=1x3x224x224"),
        (["5x3"], "takes NAME=1x3x224x224"),
        (["x=5x3", "x=6x3"], "twice"),
        (["x=99999999999999999999x3"], "more elements than any memory holds"),
        (["x=" + "9" * 5000 + "x3"], "takes NAME=1x3x224x224"),
    ],
)
def test_a_shape_that_the_model_does_not_take_is_refused(given: list[str], why: str) -> None:
    """Before anything is made up."""
    with pytest.raises(InputError, match=why):
        read_shapes(given, [TensorSpec("x", "FP32", (-1, 3))])


def test_an_npz_is_all_inputs_at_once(tmp_path: pathlib.Path) -> None:
    """Under their names, or as a golden sample has them; what is none of the model's is refused."""
    specs = [TensorSpec("x", "FP32", (-1, 2)), TensorSpec("n", "INT64", ())]

    def read(*given: str, **arrays: Any) -> dict[str, Any]:
        np.savez(tmp_path / "s.npz", **arrays)
        return read_inputs([f"@{tmp_path}/s.npz", *given], specs, image_scale=None, note=lambda _: None)

    x = np.ones((1, 2), np.float32)
    assert read(x=x, n=np.int64(3)).keys() == {"x", "n"}
    golden = read("n=3", **{"inputs/x": x, "outputs/y": x})
    assert (golden["x"].shape, golden["n"]) == ((1, 2), 3)
    with pytest.raises(InputError, match="'q' is no input of this model; it has: x, n"):
        read(q=x)
    with pytest.raises(InputError, match="'n' is given twice"):
        read("n=3", x=x, n=np.int64(3))
    with pytest.raises(InputError, match=r"no \.npz that can be read"):
        read(x=np.array([{}], dtype=object), n=np.int64(3))
    (tmp_path / "s.npz").write_bytes(b"PK\3\4 and no more")
    with pytest.raises(InputError, match=r"no \.npz that can be read"):
        read_inputs([f"@{tmp_path}/s.npz"], specs, image_scale=None, note=lambda _: None)


# ---- pictures -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "order", "height", "width", "channels"),
    [
        ((1, 3, 224, 200), "NCHW", 224, 200, 3),
        ((-1, -1, -1, -1), "NCHW", None, None, 3),
        ((-1, 224, 200, 3), "NHWC", 224, 200, 3),
        ((1, 8, 8), "CHW", 8, 8, 1),
        ((-1, 8, 9), "NHW", 8, 9, 1),
        ((1, 784), "flat", 28, 28, 1),
        ((-1, 64), "flat", 8, 8, 1),
        ((28, 20), "HW", 28, 20, 1),
    ],
)
def test_layout_is_read_off_the_shape(
    shape: tuple[int, ...], order: str, height: int | None, width: int | None, channels: int
) -> None:
    """Where the channels are decides."""
    layout = layout_of("x", shape)
    assert (layout.order, layout.height, layout.width, layout.channels) == (order, height, width, channels)


@pytest.mark.parametrize("shape", [None, (4, 3, 8, 8), (1,), (1, 2, 3, 4, 5)])
def test_shapes_that_are_no_picture_are_refused(shape: tuple[int, ...] | None) -> None:
    """With what to give instead."""
    with pytest.raises(ImageError, match=r"give an \.npy"):
        layout_of("x", shape)


def test_a_picture_becomes_a_tensor(tmp_path: pathlib.Path) -> None:
    """Resized to the declared size, scaled as documented, in the declared layout."""
    image = pytest.importorskip("PIL.Image")
    image.new("RGB", (10, 6), (255, 0, 51)).save(tmp_path / "p.png")
    path = tmp_path / "p.png"
    chw = picture("x", path, shape=(1, 3, 4, 5), dtype="<f4", scale=None)
    assert chw.shape == (1, 3, 4, 5)
    assert chw.dtype == np.float32
    np.testing.assert_allclose(chw[0, :, 0, 0], [1, 0, 0.2], atol=1e-6)
    hwc = picture("x", path, shape=(-1, -1, -1, 3), dtype="u1", scale=None)
    assert hwc.shape == (1, 6, 10, 3)
    assert hwc[0, 0, 0].tolist() == [255, 0, 51]
    image.new("L", (8, 8), 255).save(path)
    assert picture("x", path, shape=(-1, 64), dtype="<f4", scale=16).tolist() == [[16.0] * 64]
    path.write_bytes(b"no picture")
    with pytest.raises(ImageError, match="no picture that pillow knows"):
        picture("x", path, shape=(-1, 64), dtype="<f4", scale=None)


def test_without_pillow_a_clear_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """It names the package and the other ways."""
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImageError, match="pip install pillow"):
        picture("x", pathlib.Path("x.png"), shape=(1, 64), dtype="<f4", scale=None)


# ---- bench ----------------------------------------------------------------------------------------------


def test_bench_measures_one_and_several_clients(peer: Peer, capsys: pytest.CaptureFixture[str]) -> None:
    """Figures for one client and for two processes at once, without a file to compare with."""
    code, document = run_json(capsys, "bench", "m", "--seconds", "0.3", "--clients", "2")
    assert code == 0
    assert document["one_client"]["count"] > 5
    assert document["one_client"]["p50_us"] <= document["one_client"]["p99_us"]
    assert document["clients"]["clients"] == 2
    assert document["clients"]["count"] > 5
    assert "bare" not in document


def test_bench_compares_with_the_bare_runtime(
    peer: Peer, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the model's file in the folder, the same input runs in process too."""
    pytest.importorskip("onnxruntime")
    helper = pytest.importorskip("onnx.helper")
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", 1, ["n", 4])],
        [helper.make_tensor_value_info("y", 1, ["n", 4])],
    )
    built = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    (peer.models_dir / "m.onnx").write_bytes(built.SerializeToString())
    assert edgectl.main(["bench", "m", "--seconds", "0.2", "--shape", "x=2,4"]) == 0
    out = capsys.readouterr().out
    assert "in process" in out
    assert "× the bare runtime at p50" in out


def test_paced_runs_keep_their_rate() -> None:
    """At 200 Hz a fast call is made about 200 times a second, and not more."""
    samples = run_slots({"a": lambda: None}, 0.25, rate_hz=200)
    assert 10 <= len(samples["a"].latencies_us) <= 60
    assert percentiles([1.0, 2.0, 3.0])["p50_us"] == 2.0


# ---- tables ---------------------------------------------------------------------------------------------

COLUMNS = [Column("model"), Column("memory", drop=1, right=True), Column("reason", flex=True)]
ROWS = [["digits", "12.0 MiB", "the golden sample 3 differs by more than the tolerance"], ["v", None, ""]]


@pytest.mark.parametrize("width", [40, 48, 60, 200])
def test_tables_fit_the_terminal(width: int) -> None:
    """No line is longer than the terminal, and no word of the reason is lost."""
    text = table(COLUMNS, ROWS, Terminal(width=width))
    assert max(map(len, text.splitlines())) <= width
    assert "tolerance" in text
    assert ("MEMORY" in text) == (width > 40)


def test_a_pipe_gets_whole_lines() -> None:
    """One line for each row, nothing cut, nothing coloured."""
    lines = table(COLUMNS, ROWS, Terminal()).splitlines()
    assert len(lines) == 3
    assert lines[1].endswith("more than the tolerance")
    assert lines[2].split() == ["v", "-", "-"]


def test_colours_only_on_a_terminal_that_wants_them() -> None:
    """NO_COLOR, a dumb terminal and a pipe each turn them off."""

    class Tty(io.StringIO):
        def isatty(self) -> bool:
            return True

    assert Terminal.of(Tty(), {}).colour
    assert Terminal.of(Tty(), {"NO_COLOR": ""}).colour
    assert not Terminal.of(Tty(), {"NO_COLOR": "1"}).colour
    assert not Terminal.of(Tty(), {"TERM": "dumb"}).colour
    assert Terminal.of(io.StringIO(), {}) == Terminal()


def test_text_from_the_daemon_can_not_steer_the_terminal() -> None:
    """Escapes and line ends are shown, not obeyed."""
    assert clean("a\x1b[2Jb\nc\u202e") == "a\\x1b[2Jb c\\u202e"


def test_figures_have_units() -> None:
    """And what was not measured stays nothing."""
    assert [bytes_text(v) for v in (None, 0, 1023, 1536, 5 << 30)] == [
        None,
        "0 B",
        "1023 B",
        "1.5 KiB",
        "5.0 GiB",
    ]
    assert [micros_text(v) for v in (None, 85, 2310, 1.2e6)] == [None, "85 µs", "2.31 ms", "1.20 s"]
    assert [duration_text(v) for v in (45, 720, 12_000, 180_000)] == [
        "45 s",
        "12 min",
        "3 h 20 min",
        "2 d 2 h",
    ]


# ---- completion -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shell", "name"), [("bash", "edgectl.bash"), ("zsh", "_edgectl")])
def test_the_packaged_completion_is_current(
    shell: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """`edgectl completion SHELL > packaging/completion/NAME` brings it up to date."""
    assert edgectl.main(["completion", shell]) == 0
    assert capsys.readouterr().out == (ROOT / "packaging" / "completion" / name).read_text()


@pytest.mark.parametrize(
    ("words", "want"),
    [
        ("edgectl st", ["status", "stats"]),
        ("edgectl put --no", ["--no-settings"]),
        ("edgectl completion z", ["zsh"]),
        ("edgectl load di", ["digits"]),
        ("edgectl wait m --timeout 3", []),
    ],
)
def test_bash_completes(words: str, want: list[str], tmp_path: pathlib.Path) -> None:
    """Commands, options, choices and models, in a real bash."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash here")
    program = f"""
    source {ROOT}/packaging/completion/edgectl.bash
    edgectl() {{ [[ "$*" == "models --names --timeout 1" ]] && printf 'digits\\nvad\\n'; }}
    COMP_WORDS=({words}); COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 ))
    _edgectl; printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    out = subprocess.run(
        [bash, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=30, check=True
    )
    assert out.stderr == ""
    assert out.stdout.split() == want


def test_every_command_has_a_handler() -> None:
    """What the parser offers is what dispatch knows."""
    commands = set(completion._commands(edgectl.build_parser()))
    assert commands == {*edgectl._handlers(), "completion"}


# ---- edged ----------------------------------------------------------------------------------------------


def test_edged_check_says_the_settings(nobody: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--check ends without starting anything."""
    argv = [
        "--check",
        "--models",
        str(nobody / "m"),
        "--endpoint",
        f"ipc://{nobody}/edged.sock",
        "--log-level",
        "debug",
    ]
    assert edged_cli.main(argv) == 0
    out = capsys.readouterr().out
    assert str(nobody / "m") in out
    assert "log debug/auto" in out


def test_edged_with_a_bad_setting_is_exit_78_in_one_line(
    nobody: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The line names the file, the line in it and the key."""
    file = nobody / "edged.toml"
    file.write_text("[server]\nmodls = '/x'\n")
    assert edged_cli.main(["--config", str(file)]) == 78
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "modls" in err
    assert "models" in err


def test_edged_bad_usage_is_exit_64(capsys: pytest.CaptureFixture[str]) -> None:
    """An unknown flag is told from a bad setting."""
    assert edged_cli.main(["--modls", "x"]) == 64
    assert "--modls" in capsys.readouterr().err


def test_edged_without_its_libraries_names_the_extra(
    nobody: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The thin client has the command too, and it says what to install."""
    monkeypatch.setattr(edged_cli, "_LIBRARIES", ("zmq", "no_such_library"))
    assert edged_cli.main(["--models", str(nobody)]) == 69
    assert "no_such_library; install `edged[cpu]`" in capsys.readouterr().err


def test_edged_takes_the_descriptors_that_it_may_have() -> None:
    """libzmq ends the process at the first connection without one, and a shell's 1024 are soon used."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, before[1]), before[1]))
        edged_cli._raise_descriptor_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (min(65536, before[1]), before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
