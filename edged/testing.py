"""What tests need and everybody may use: a runtime that obeys, and the checks that every runtime passes.

`FakeRuntime` loads "models" that are JSON files saying what to do: echo, wait, raise, crash, hang, eat
memory. It runs inside a real worker process (`spawn("fake", ...)`), so that what a bad model does to the
daemon can be tested without one. `check_runtime` is what a new runtime has to pass; the fake passes it too.
"""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from edged.errors import Code
from edged.runtimes.base import DTYPES, LoadCancel, LoadFailed, LoadRequest, RunFailed, Runtime
from edged.runtimes.onnx_graph import Graph, Node, ValueInfo
from edged.tensors import DATATYPES, TensorSpec

__all__ = ["FakeRuntime", "check_runtime", "create", "write_fake_model"]

HANG_S = 3600.0
"""What never ends, as far as a test is concerned."""


def write_fake_model(
    path: Path,
    *,
    inputs: Mapping[str, tuple[str, Sequence[int]]],
    outputs: Mapping[str, tuple[str, Sequence[int]]] | None = None,
    load: str = "ok",
    run: str = "echo",
    seconds: float = 0.0,
) -> Path:
    """Writes a model for `FakeRuntime`: names to `(datatype, shape)`; output n is input n.

    `load`: `ok`, `raise`, `crash`, `hang`. `run`: `echo`, `raise`, `crash`, `hang`, `eat` (memory without
    end), `double` (twice the input, a wrong answer where an echo is right). `seconds` is what a run takes.
    """
    tensors = {
        kind: [{"name": n, "datatype": d, "shape": list(s)} for n, (d, s) in named.items()]
        for kind, named in (("inputs", inputs), ("outputs", outputs or inputs))
    }
    path.write_text(json.dumps({"fake": 1, **tensors, "load": load, "run": run, "seconds": seconds}))
    return path


class _FakeModel:
    """See `runtimes.base.Model`."""

    def __init__(self, settings: Mapping[str, Any], request: LoadRequest) -> None:
        self.inputs = tuple(TensorSpec.from_wire(t) for t in settings["inputs"])
        self.outputs = tuple(TensorSpec.from_wire(t) for t in settings["outputs"])
        self.metadata = {"fake": "yes"}
        self.device = request.device
        self.precision = "f32"
        self.threads = request.threads
        self.instances = request.instances
        self.fallback_reason: str | None = None
        self._behaviour = settings["run"]
        self._seconds = HANG_S if self._behaviour == "hang" else float(settings["seconds"])
        self._cancels: dict[int, threading.Event] = {}

    def run(
        self, feeds: Mapping[str, Any], output_names: Sequence[str], run: int = 0, *, borrowed: bool = False
    ) -> list[Any]:
        cancelled = self._cancels[run] = threading.Event()
        try:
            return self._run(feeds, output_names, cancelled)
        finally:
            del self._cancels[run]

    def _run(
        self, feeds: Mapping[str, Any], output_names: Sequence[str], cancelled: threading.Event
    ) -> list[Any]:
        for spec in self.inputs:
            if spec.name not in feeds and not spec.optional:
                raise RunFailed(Code.INVALID_ARGUMENT, "MISSING_INPUT", f"input '{spec.name}' is missing")
        for name, array in feeds.items():
            self._check(name, array)
        if self._seconds and cancelled.wait(self._seconds):
            raise RunFailed(Code.CANCELLED, "CANCELLED", "the request was cancelled while it ran")
        self._behave()
        sources = dict(zip([s.name for s in self.outputs], [s.name for s in self.inputs]))  # noqa: B905 - as many as there are
        unknown = [n for n in output_names if n not in sources]
        if unknown:
            raise RunFailed(Code.INVALID_ARGUMENT, "UNKNOWN_OUTPUT", f"the model has no outputs {unknown}")
        factor = 2 if self._behaviour == "double" else None
        return [
            np.array(feeds[sources[n]]) * factor if factor else np.array(feeds[sources[n]])
            for n in output_names
        ]

    def cancel(self, run: int = 0) -> None:
        going_on = self._cancels.get(run)
        if going_on is not None:
            going_on.set()

    def shrink(self) -> None:
        return

    def close(self) -> None:
        return

    def _check(self, name: str, array: Any) -> None:
        spec = next((s for s in self.inputs if s.name == name), None)
        if spec is None:
            raise RunFailed(Code.INVALID_ARGUMENT, "UNKNOWN_INPUT", f"the model has no input '{name}'")
        dtype = DTYPES.get(spec.datatype, np.dtype(object))
        if array.dtype != dtype:
            raise RunFailed(
                Code.INVALID_ARGUMENT, "REFUSED_BY_RUNTIME", f"input '{name}' is {array.dtype}, not {dtype}"
            )

    def _behave(self) -> None:
        if self._behaviour == "raise":
            raise RunFailed(Code.INTERNAL, "RUNTIME_ERROR", "the fake model raises, as it was told")
        if self._behaviour == "crash":
            signal.raise_signal(signal.SIGSEGV)  # at this thread, at once, as a real one comes
        if self._behaviour == "eat":
            eaten = []
            while True:
                eaten.append(np.ones(1 << 24, np.uint8))


class FakeRuntime:
    """See `runtimes.base.Runtime`. It has one device, `CPU`."""

    name = "fake"
    version = "1"

    def load(self, request: LoadRequest, cancel: LoadCancel) -> _FakeModel:
        cancel.check()
        if request.device != "CPU":
            raise LoadFailed("DEVICE_FAILED", f"the fake has no {request.device}", code=Code.UNAVAILABLE)
        try:
            settings = json.loads(Path(request.path).read_text())
            behaviour = settings["load"]
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise LoadFailed("MODEL_INVALID", "this is no fake model", code=Code.INVALID_ARGUMENT) from e
        if behaviour == "crash":
            signal.raise_signal(signal.SIGSEGV)  # at this thread, at once, as a real one comes
        if behaviour == "hang":
            cancel.requested.wait(HANG_S)
        cancel.check()
        if behaviour == "raise":
            raise LoadFailed("MODEL_LOAD_FAILED", "the fake model does not load, as it was told")
        return _FakeModel(settings, request)

    def graph(self, request: LoadRequest) -> Graph:
        settings = json.loads(Path(request.path).read_text())
        values = {
            kind: tuple(
                ValueInfo(t["name"], "tensor", t["datatype"], tuple(None if d < 0 else d for d in t["shape"]))
                for t in settings[kind]
            )
            for kind in ("inputs", "outputs")
        }
        return Graph(
            nodes=tuple(
                Node("Identity", "", "", (a.name,), (b.name,), {})
                for a, b in zip(values["inputs"], values["outputs"])  # noqa: B905 - some may give nothing
                if a.name != b.name
            ),
            initializers={},
            inputs=values["inputs"],
            outputs=values["outputs"],
            opsets={"": 17},
        )

    def full_name(self, device: str) -> str:
        return f"fake {device}"

    def precision_fast(self, device: str) -> str:
        return ""


def create() -> FakeRuntime:
    """The runtime; what every runtime's module has."""
    return FakeRuntime()


def check_runtime(
    runtime: Runtime, *, make_echo: Callable[[str, Sequence[int]], Path], directory: Path, device: str = "CPU"
) -> tuple[str, ...]:
    """Raises AssertionError where a runtime does not keep to the seam; else the datatypes that it takes.

    `make_echo(datatype, shape)` writes a model whose output `y` is its input `x`, -1 for a free dimension;
    `directory` is scratch space.
    """

    def load(path: Path, where: str = device) -> Any:
        return runtime.load(LoadRequest(path=str(path), device=where), LoadCancel())

    taken = []
    for datatype in DATATYPES:
        try:
            model = load(make_echo(datatype, (-1, 2)))
        except LoadFailed as e:
            if e.reason != "MODEL_UNSUPPORTED":
                raise AssertionError(f"{datatype}: {e.reason}: {e}") from e
            continue
        taken.append(datatype)
        _check_model(model, runtime, datatype, device)
        model.close()
    assert "FP32" in taken, "a runtime without FP32 serves nobody"
    _check_scalar(load(make_echo("FP32", ())))
    _check_refusals(load(make_echo("FP32", (-1, 2))))
    _check_bad_loads(load, directory, make_echo)
    cancelled = LoadCancel()
    cancelled.cancel()
    request = LoadRequest(path=str(make_echo("FP32", (2,))), device=device)
    _expect_load_failed(lambda: runtime.load(request, cancelled), "LOAD_CANCELLED")
    return tuple(taken)


def _values(datatype: str, rows: int) -> Any:
    if datatype == "BYTES":
        out = np.empty((rows, 2), object)
        out[...] = "å".encode()
        return out
    bits = np.arange(rows * 2).reshape(rows, 2)
    if datatype == "BOOL":
        return bits % 2 == 0
    return (bits + 16000 if datatype == "BF16" else bits).astype(DTYPES[datatype])


def _same(datatype: str, got: Any, want: Any) -> bool:
    if datatype == "BYTES":
        flat = [e.encode() if isinstance(e, str) else e for e in got.reshape(-1)]
        return bool(got.shape == want.shape and flat == want.reshape(-1).tolist())
    return bool(got.dtype == want.dtype and got.shape == want.shape and np.array_equal(got, want))


def _check_model(model: Any, runtime: Runtime, datatype: str, device: str) -> None:
    says = f"{runtime.name}, {datatype}"
    assert model.device == device, f"{says}: asked for {device}, it says {model.device}"
    assert model.precision == "f32", f"{says}: precision {model.precision} without being asked"
    assert [s.name for s in model.inputs] == ["x"], f"{says}: inputs {model.inputs}"
    assert [s.name for s in model.outputs] == ["y"], f"{says}: outputs {model.outputs}"
    assert model.inputs[0].datatype == model.outputs[0].datatype == datatype, f"{says}: {model.inputs}"
    assert model.inputs[0].shape == (-1, 2), f"{says}: shape {model.inputs[0].shape}"
    kept = []
    for rows in (3, 1, 0, 5):
        want = _values(datatype, rows)
        want.flags.writeable = rows != 1  # a request's bytes may be read-only
        (got,) = model.run({"x": want}, ["y"])
        kept.append((got, want))
    for got, want in kept:
        assert _same(datatype, got, want), f"{says}: {want.tolist()} came back as {got.tolist()}"


def _check_scalar(model: Any) -> None:
    (got,) = model.run({"x": np.array(2.5, np.float32)}, ["y"])
    assert got.shape == (), f"a scalar came back with shape {got.shape}"
    assert got == 2.5, f"2.5 came back as {got}"
    model.close()


def _check_refusals(model: Any) -> None:
    right = _values("FP32", 1)
    for what, feeds in (
        ("no input", {}),
        ("an unknown input", {"x": right, "nobody": right}),
        ("another dtype", {"x": right.astype(np.int64)}),
    ):
        failed = _failure_of(partial(model.run, feeds, ["y"]))
        assert isinstance(failed, RunFailed), f"{what} gave {failed!r}"
        assert failed.code == "INVALID_ARGUMENT", f"{what}: {failed.code} {failed.message}"
        assert "/" not in failed.message, f"{what}: the message names a path: {failed.message}"
    assert _same("FP32", model.run({"x": right}, ["y"])[0], right), "after refusals it answers otherwise"
    model.cancel()  # with nothing running it must be harmless
    assert _same("FP32", model.run({"x": right}, ["y"])[0], right), "a cancel of nothing spoiled the next run"
    model.close()


def _check_bad_loads(load: Callable[..., Any], directory: Path, make_echo: Any) -> None:
    good = make_echo("FP32", (2,))
    for name, content in (
        ("empty", b""),
        ("garbage", b"\x00garbage" * 99),
        ("truncated", good.read_bytes()[:-3]),
    ):
        bad = directory / f"{name}{good.suffix}"
        bad.write_bytes(content)
        _expect_load_failed(partial(load, bad))
    _expect_load_failed(partial(load, directory / "nothing.onnx"))
    _expect_load_failed(partial(load, good, "NOSUCH:9"), "DEVICE_FAILED")


def _expect_load_failed(work: Callable[[], Any], reason: str | None = None) -> None:
    failed = _failure_of(work)
    assert isinstance(failed, LoadFailed), f"a load that must fail ({reason}) gave {failed!r}"
    assert reason is None or failed.reason == reason, f"{failed.reason} instead of {reason}: {failed}"
    assert failed.message, "a failure without a message"


def _failure_of(work: Callable[[], Any]) -> Exception | None:
    """What `work` raises."""
    try:
        work()
    except Exception as e:  # noqa: BLE001 - the caller judges whatever it is
        return e
    return None
