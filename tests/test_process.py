"""Workers are started, end, and are told about, whatever happens to them or to their template."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgpack
import numpy as np
import pytest

from edged import process
from edged.process import Spawner, WorkerGone, WorkerLimits, describe_exit
from edged.runtimes.tiny import tiny_model
from edged.testing import write_fake_model
from tests.worker_helpers import WAIT_S, Handle, _wait_exit

X = np.arange(6, dtype=np.float32).reshape(3, 2)


@pytest.fixture(scope="module")
def spawner() -> Iterator[Spawner]:
    with Spawner(pythons={}, environ=os.environ) as spawner:
        yield spawner


@pytest.fixture
def echo(tmp_path: Path) -> Path:
    return write_fake_model(tmp_path / "echo.fake", inputs={"x": ("FP32", (-1, 2))})


def status_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: text.strip() for key, _, text in (line.partition(":") for line in lines)}


@pytest.mark.parametrize("gpu", [False, True], ids=["forked", "execed"])
def test_worker_says_hello_and_serves(spawner: Spawner, echo: Path, gpu: bool) -> None:
    """A worker of either birth says who it is, loads and answers."""
    with Handle(spawner, "fake", gpu=gpu) as worker:
        loaded = worker.load(echo)
        assert loaded[0] == "loaded"
        assert loaded[2]["device"] == "CPU"
        np.testing.assert_array_equal(worker.infer({"x": X})["x"], X)


@pytest.mark.parametrize("gpu", [False, True], ids=["forked", "execed"])
def test_worker_is_confined(spawner: Spawner, gpu: bool) -> None:
    """A worker is our child, has two sockets, no new privileges, no cores, and its limits."""
    with Handle(spawner, "fake", gpu=gpu, data_bytes=1 << 30, file_bytes=1 << 20) as worker:
        hello = worker.control("hello")
        pid = hello[1]
        status = status_of(pid)
        assert status["PPid"] == str(os.getpid())
        assert status["NoNewPrivs"] == "1"
        names = sorted(os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd"))
        sockets = [n for n in names if n.startswith("socket:")]
        assert len(sockets) == 2
        limits = Path(f"/proc/{pid}/limits").read_text()
        assert f"{1 << 30}" in limits.split("Max data size")[1].splitlines()[0]
        assert f"{1 << 20}" in limits.split("Max file size")[1].splitlines()[0]
        assert limits.split("Max core file size")[1].split()[0] == "0"


@pytest.mark.parametrize("gpu", [False, True], ids=["forked", "execed"])
def test_crash_is_told_by_signal(spawner: Spawner, tmp_path: Path, gpu: bool) -> None:
    """A model that ends its worker with SIGSEGV is seen as a hang-up, and the signal is named."""
    path = write_fake_model(tmp_path / "m.fake", inputs={"x": ("FP32", (-1, 2))}, run="crash")
    with Handle(spawner, "fake", gpu=gpu) as worker:
        assert worker.load(path, warmup=0)[0] == "loaded"
        worker.send({"x": X})
        with pytest.raises(WorkerGone):
            worker.answer()
        assert worker.ended() == "killed by SIGSEGV"


def test_crash_hurts_no_other_worker(spawner: Spawner, echo: Path, tmp_path: Path) -> None:
    """While one worker dies another, of the same template, goes on."""
    bad = write_fake_model(tmp_path / "m.fake", inputs={"x": ("FP32", (-1, 2))}, load="crash")
    with Handle(spawner, "fake") as good, Handle(spawner, "fake") as doomed:
        assert good.load(echo)[0] == "loaded"
        with pytest.raises(WorkerGone):
            doomed.load(bad)
        assert doomed.gone() == "killed by SIGSEGV"
        np.testing.assert_array_equal(good.infer({"x": X})["x"], X)


@pytest.mark.parametrize("gpu", [False, True], ids=["forked", "execed"])
def test_killed_worker_is_reaped(spawner: Spawner, gpu: bool) -> None:
    """A kill before the pid is known still ends the worker, and leaves no zombie."""
    worker = Handle(spawner, "fake", gpu=gpu)
    worker.process.kill()
    assert worker.ended() == "killed by SIGKILL"
    assert worker.process.pid is not None
    assert not Path(f"/proc/{worker.process.pid}").exists()
    worker.process.close()


def test_closing_ends_the_worker(spawner: Spawner, echo: Path) -> None:
    """A worker whose supervisor hangs up exits by itself, also in the middle of a run."""
    path = write_fake_model(echo.with_name("hang"), inputs={"x": ("FP32", (-1, 2))}, run="hang")
    worker = Handle(spawner, "fake")
    assert worker.load(path, warmup=0)[0] == "loaded"
    worker.send({"x": X})
    worker.process.close()
    assert worker.ended() == "exit 0"


def test_terminal_signals_are_ignored(spawner: Spawner, echo: Path) -> None:
    """SIGTERM and SIGINT, which systemd and a terminal send to the whole group, do not end a worker."""
    with Handle(spawner, "fake") as worker:
        assert worker.load(echo)[0] == "loaded"
        assert worker.process.pid is not None
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(worker.process.pid, number)
        np.testing.assert_array_equal(worker.infer({"x": X})["x"], X)


def test_dead_template_is_replaced(spawner: Spawner, echo: Path) -> None:
    """Workers outlive their template, and the next spawn starts another."""
    with Handle(spawner, "fake") as old:
        assert old.load(echo)[0] == "loaded"
        template = spawner.templates()["fake"]
        os.kill(template, signal.SIGKILL)
        _wait_exit(template, time.monotonic() + WAIT_S)
        with Handle(spawner, "fake") as new:
            assert new.load(echo)[0] == "loaded"
            assert spawner.templates()["fake"] != template
            np.testing.assert_array_equal(old.infer({"x": X})["x"], X)


def test_broken_runtime_is_told(tmp_path: Path) -> None:
    """A runtime that cannot be imported ends as a worker that is gone, with the reason."""
    broken = tmp_path / "onnxruntime"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise RuntimeError('libfoo.so is too old')\n")
    with Spawner(pythons={}, environ={**os.environ, "PYTHONPATH": str(tmp_path)}) as spawner:
        worker = Handle(spawner, "onnxruntime")
        assert "libfoo.so is too old" in worker.gone()
        worker.process.close()


def test_template_with_threads_execs(tmp_path: Path) -> None:
    """A runtime whose import starts a thread is not forked: the template execs, and we are the parent."""
    package = tmp_path / "openvino"
    package.mkdir()
    (package / "__init__.py").write_text(
        "import threading\n"
        "threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
        "__version__ = '9.9-threads'\n"
    )
    (package / "frontend.py").write_text("FrontEndManager = None\n")
    with (
        Spawner(pythons={}, environ={**os.environ, "PYTHONPATH": str(tmp_path)}) as spawner,
        Handle(spawner, "openvino") as worker,
    ):
        _, pid, versions = worker.control("hello")
        assert versions == {"openvino": "9.9"}
        assert "worker" in Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        assert status_of(pid)["PPid"] == str(os.getpid())
        worker.ask("exit")
        assert worker.ended() == "exit 0"


def test_template_has_one_thread(spawner: Spawner) -> None:
    """What is forked has one thread, with either real runtime imported."""
    for runtime in ("onnxruntime", "openvino"):
        with Handle(spawner, runtime) as worker:
            worker.control("hello")
            assert status_of(spawner.templates()[runtime])["Threads"] == "1"


def test_spawn_leaves_no_descriptors(spawner: Spawner) -> None:
    """A hundred workers that come and go leave no descriptor and no zombie behind."""
    with Handle(spawner, "fake") as worker:
        worker.control("hello")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        workers = [Handle(spawner, "fake") for _ in range(10)]
        for worker in workers:
            worker.control("hello")
            worker.process.close()
        for worker in workers:
            assert worker.ended() == "exit 0"
    assert len(os.listdir("/proc/self/fd")) == before


def test_workers_die_with_the_supervisor(tmp_path: Path) -> None:
    """When the supervisor is killed no worker, no template and no probe stays."""
    program = (
        "import os, sys, select\n"
        "from edged.process import *\n"
        "sp = Spawner(pythons={}, environ=os.environ)\n"
        "ws = [sp.spawn('fake', gpu=g, limits=WorkerLimits(None, 1 << 20), slots=1) for g in (0, 1)]\n"
        "for w in ws:\n"
        "    select.select([w.control_fd], [], []); w.recv_control()\n"
        "print(*[w.pid for w in ws], *sp.templates().values(), flush=True)\n"
        "sys.stdin.read()\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdin is not None
    assert child.stdout is not None
    pids = [int(p) for p in child.stdout.readline().split()]
    assert len(pids) == 3
    child.kill()
    child.wait()
    child.stdin.close()
    child.stdout.close()
    for pid in pids:
        _wait_exit(pid, time.monotonic() + WAIT_S)
        gone = not Path(f"/proc/{pid}").exists() or status_of(pid)["State"].startswith("Z")
        assert gone, f"{pid} is still there"


def test_supervisor_side_imports_no_runtime() -> None:
    """The supervisor's side of all this carries neither numpy nor a runtime."""
    program = (
        "import edged.process, sys\n"
        "print([m for m in ('numpy', 'onnxruntime', 'openvino') if m in sys.modules])\n"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_worker_needs_no_network_and_no_home(tmp_path: Path, echo: Path) -> None:
    """While a worker loads and runs, no runtime opens an internet socket or writes into $HOME."""
    strace = Path("/usr/bin/strace")
    if not strace.exists():
        pytest.skip("strace is not installed")
    home = tmp_path / "home"
    home.mkdir()
    model = tmp_path / "m.onnx"
    model.write_bytes(tiny_model())
    program = (
        "import os, sys, numpy as np\n"
        "from tests.worker_helpers import Handle\n"
        "from edged.process import Spawner\n"
        "from pathlib import Path\n"
        "with Spawner(pythons={}, environ=os.environ) as sp:\n"
        "    for runtime in ('onnxruntime', 'openvino'):\n"
        "        with Handle(sp, runtime) as w:\n"
        "            assert w.load(Path(sys.argv[1]))[0] == 'loaded'\n"
        "            w.infer({'x': np.zeros((1, 1, 4, 4), np.float32)})\n"
    )
    trace = tmp_path / "trace"
    subprocess.run(
        [
            str(strace),
            "-f",
            "-qq",
            "-e",
            "trace=socket,connect,execve",
            "-o",
            str(trace),
            sys.executable,
            "-c",
            program,
            str(model),
        ],
        check=True,
        env={**os.environ, "HOME": str(home), "PYTHONPATH": str(Path(__file__).parent.parent)},
    )
    assert "execve" in trace.read_text(), "nothing was traced"
    assert "AF_INET" not in trace.read_text()
    assert list(home.rglob("*")) == []


def test_probe_of_what_is_not_installed_costs_no_process(
    spawner: Spawner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A runtime that is not there gets its verdict at once, with the extra to install."""
    monkeypatch.setattr("edged.sites.is_installed", lambda runtime: False)
    probe = spawner.probe("openvino", "CPU")
    answer = probe.result()
    assert answer is not None
    assert (answer["status"], answer["hint"]) == ("not_installed", "pip install 'edged[openvino]'")


def test_children_find_a_runtime_in_its_own_site_directory(
    spawner: Spawner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies in PREFIX/runtimes/NAME goes before what the interpreter finds by itself."""
    package = tmp_path / "runtimes/openvino/openvino"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('this one was packaged')\n")
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    probe = spawner.probe("openvino", "CPU")
    assert select.select([probe.fd], [], [], 60)[0]
    while (answer := probe.result()) is None:
        select.select([probe.fd], [], [], 60)
    assert (answer["status"], answer["detail"]) == ("driver_error", "this one was packaged")


@pytest.mark.parametrize(
    ("status", "text"),
    [(0, "exit 0"), (70, "exit 70"), (-11, "killed by SIGSEGV"), (-99, "killed by signal 99")],
)
def test_exits_in_words(status: int, text: str) -> None:
    """A return code is told in words."""
    assert describe_exit(status) == text


_BATCH = {"max": 1, "times_us": [], "why": ""}
_INFO = {
    "inputs": [],
    "outputs": [],
    "runtime": "fake",
    "device": "CPU",
    "precision": "f32",
    "instances": 1,
    "batch": _BATCH,
    "metadata": msgpack.packb({"labels": "cat, dog"}),
}

_MEASURED = {
    **{
        f"{side}_{what}": 5.0
        for side in ("reference", "candidate")
        for what in ("p50_us", "p99_us", "rows_s")
    },
    "agrees": True,
    "proven": True,
    "why": "",
}


@pytest.mark.parametrize(
    ("socket", "said"),
    [
        ("data", ["done"]),
        ("data", ["done", 1, 0, [], "soon"]),
        ("data", ["done", 1, 0, None, 5]),
        ("data", ["done", 1, 0, [], 1 << 62]),
        ("data", ["done", 2, 0, [], 5]),
        ("data", ["failed", 1, 0, 7, None, ""]),
        ("data", ["done_large", 1, 0, 0, 1 << 40]),
        ("data", ["done_large", 1, 0, "x", 5]),
        ("data", [["done"]]),
        ("data", b"\x91\x81\x91\x01\x02"),
        ("data", b"\x91\xc7\x01\x05\x00"),
        ("data", b""),
        ("control", ["hello"]),
        ("control", ["hello", "x"]),
        ("control", ["hello", -5]),
        ("control", ["loaded", 1, None]),
        ("control", ["loaded", 1, {**_INFO, "inputs": [{"name": 1, "datatype": "FP32", "shape": [1]}]}]),
        ("control", ["loaded", 1, {**_INFO, "rss_bytes": "many"}]),
        ("control", ["loaded", 1, {**_INFO, "load_ms": "long"}]),
        ("control", ["loaded", 1, {**_INFO, "instances": 2}]),
        ("control", ["loaded", 1, {**_INFO, "golden_shapes": [{"x": [-1]}]}]),
        ("control", ["loaded", 1, {**_INFO, "golden_shapes": [{"x": [1]}] * 4}]),
        ("control", ["loaded", 1, {**_INFO, "golden_shapes": {"x": [1]}}]),
        ("control", ["loaded", 1, {**_INFO, "batch": {**_BATCH, "max": 0}}]),
        ("control", ["loaded", 1, {**_INFO, "batch": {**_BATCH, "times_us": [[1, float("nan")]]}}]),
        ("control", ["loaded", 1, {**_INFO, "batch": {**_BATCH, "times_us": [[1, 5]] * 65}}]),
        ("control", ["loaded", 1, {k: v for k, v in _INFO.items() if k != "metadata"}]),
        ("control", ["loaded", 1, {**_INFO, "metadata": {"labels": "cat"}}]),
        ("control", ["loaded", 1, {**_INFO, "metadata": msgpack.packb({"labels": 7})}]),
        ("control", ["loaded", 1, {**_INFO, "metadata": msgpack.packb(["labels"])}]),
        ("control", ["loaded", 1, {**_INFO, "metadata": b"\x81\xa1\xff\xa0"}]),
        ("control", ["loaded", 1, {**_INFO, "metadata": b"\xdf\xff\xff\xff\xff"}]),
        ("control", ["loaded", 1, {**_INFO, "metadata": _INFO["metadata"] + b"\x80"}]),
        ("control", ["loaded", 1, {**_INFO, "metadata_excess": [5, "labels"]}]),
        ("control", ["loaded", 1, {**_INFO, "metadata_excess": ["many", []]}]),
        ("control", ["part"]),
        ("control", ["part", 2, b"of no load of ours"]),
        ("control", ["part", [], b"x"]),
        ("control", ["part", 1, "text"]),
        ("control", ["whole", 1]),
        ("control", ["load_failed", 1]),
        ("control", ["load_failed", 1, 2, 3, 4]),
        ("control", ["measured"]),
        ("control", ["measured", 7]),
        ("control", ["measured", {**_MEASURED, "candidate_p50_us": None}]),
        ("control", ["measured", {**_MEASURED, "reference_rows_s": "many"}]),
        ("control", ["measured", {**_MEASURED, "candidate_p99_us": float("inf")}]),
        ("control", ["measured", {**_MEASURED, "why": None}]),
        ("control", ["measured", {**_MEASURED, "agrees": "yes"}]),
        (
            "control",
            ["measured", {**_MEASURED, "size": {"source": "owner", "shapes": {"x": "1"}, "note": ""}}],
        ),
        ("control", ["measured", {**_MEASURED, "size": "large"}]),
        ("control", [{}]),
    ],
)
def test_what_no_worker_says_ends_it(socket: str, said: list[object] | bytes) -> None:
    """A worker that was taken over may say anything: it is gone then, and nothing else happens."""
    worker, data, control = process._pair("fake", WorkerLimits(None, 1 << 20), 2)
    with data, control:
        worker.send_run(["run", 1])
        worker.send_control(["load", 1, {}])
        raw = said if isinstance(said, bytes) else msgpack.packb(said)
        (data if socket == "data" else control).send(raw)
        if not raw:
            (data if socket == "data" else control).close()
        with pytest.raises(WorkerGone):
            worker.recv_data() if socket == "data" else worker.recv_control()
    worker.close()


def in_parts(packet: object, size: int, instance: int = 1) -> list[list[object]]:
    """A packet as a worker sends one that is too large."""
    raw = packet if isinstance(packet, bytes) else msgpack.packb(packet)
    return [["part", instance, raw[at : at + size]] for at in range(0, len(raw), size)]


def hears(words: list[list[object]]) -> list[list[object]]:
    """What the supervisor hears of a worker that was told to load 1 and 2 and says all this."""
    worker, data, control = process._pair("fake", WorkerLimits(None, 1 << 20), 2)
    heard: list[list[object]] = []
    try:
        with data, control:
            for instance in (1, 2):
                worker.send_control(["load", instance, {}])
            for word in words:
                control.send(msgpack.packb(word))
                heard += worker.recv_control()
    finally:
        worker.close()
    return heard


@pytest.mark.parametrize("size", [1, 7, 1000, 200_000])
def test_an_answer_in_parts_is_one_answer(size: int) -> None:
    """However it was cut, and with other words in between."""
    metadata = msgpack.packb(
        {"character": "\n".join(chr(0x4E00 + n % 20_000) for n in range(min(40 * size, 200_000)))}
    )
    loaded = ["loaded", 1, {**_INFO, "metadata": metadata}]
    assert hears([*in_parts(loaded, size)[:-1], ["proving", 2]]) == [["proving", 2]]
    assert hears([*in_parts(loaded, size), ["proving", 2], ["whole", 1]]) == [["proving", 2], loaded]


@pytest.mark.parametrize(
    "words",
    [
        [*in_parts(["loaded", 1, _INFO], 50)[:-1], ["whole", 1]],
        [*in_parts(["loaded", 1, _INFO], 50), ["whole", 2]],
        [*in_parts(["loaded", 2, _INFO], 50), ["whole", 1]],
        [*in_parts(["loaded", 1, _INFO], 50), ["part", 2, b"\x80"], ["whole", 1]],
        [*in_parts(["loaded", 1, {**_INFO, "instances": 0}], 50), ["whole", 1]],
        [*in_parts(["hello", 1], 50), ["whole", 1]],
        [*in_parts(b"\xc1", 50), ["whole", 1]],
        [*in_parts(b"\x91" * 5000, 5000), ["whole", 1]],
        [*in_parts(["loaded", 1, _INFO], 50), ["whole", 1], ["whole", 1]],
        [*in_parts(["loaded", 1, _INFO], 50), ["whole", 1], ["part", 1, b"x"]],
    ],
)
def test_parts_that_are_no_answer_end_the_worker(words: list[list[object]]) -> None:
    """Left out, mixed up, of another load, twice, or of something else."""
    with pytest.raises(WorkerGone, match="it sent what no worker sends"):
        hears(words)


def test_an_answer_has_a_bound_before_it_is_looked_at() -> None:
    """So many bytes are kept, and not one more."""
    parts = in_parts(bytes(process.LOADED_BYTES_MAX), 1 << 17)
    assert hears(list(parts)) == []
    with pytest.raises(WorkerGone, match="more than 4194304 bytes"):
        hears([*parts, ["part", 1, b"x"]])


def test_a_worker_speaks_of_its_own_only() -> None:
    """Loads of other workers, a second answer and another process's pid are not passed on."""
    worker, data, control = process._pair("fake", WorkerLimits(None, 1 << 20), 2)
    with data, control:
        worker.send_run(["run", 1])
        worker.send_control(["load", 4, {}])
        for word in (
            ["hello", 99_999_999, {}],
            ["hello", 1, {}],
            ["load_failed", 5, "INTERNAL", "X", "another's"],
            ["loaded", 4, _INFO],
            ["loaded", 4, _INFO],
        ):
            control.send(msgpack.packb(word))
        heard = worker.recv_control()
        assert [packet[:2] for packet in heard] == [
            ["hello", 99_999_999],
            ["hello", 99_999_999],
            ["loaded", 4],
        ]
        data.send(msgpack.packb(["done", 1, 0, [], 5]))
        assert worker.recv_data() == [["done", 1, 0, [], 5]]
        data.send(msgpack.packb(["done", 1, 0, [], 5]))
        with pytest.raises(WorkerGone):
            worker.recv_data()
    worker.close()
