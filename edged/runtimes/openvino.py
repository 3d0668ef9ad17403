"""OpenVINO behind the seam: CPU, GPU and NPU.

What is decided here and why: devices are named outright, never AUTO, which starts on the CPU and moves;
`INFERENCE_PRECISION_HINT=f32` unless `precision = "fast"`, since the default on a CPU that has bf16 is
bf16 with other answers; `ENABLE_CPU_PINNING=NO`, since two workers that pin share one core; tensors are set
on an infer request of the native API (17 µs for a small MLP, 34 by its dictionary), whose outputs are
copied, because the request writes the next run's into the same memory; each instance has a request and a
stream. Only an asynchronous run can be cancelled (between nodes), a synchronous one is 12 µs faster: so the
latter is for runs known to be short. After a run of free shapes that failed or was cancelled, a compiled
model may answer NaN to everybody, or raise, whatever it is asked (2026.4: RapidOCR's recognition after a
picture that is too small for it, one time in eight): so it is compiled again before the next run.

Strings are refused: a graph that only passes them through corrupts the heap in OpenVINO 2026.4. A load
cannot be interrupted from within; whoever must end one ends the worker. Runs on Python 3.10 too.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np

from edged.errors import Code
from edged.properties import merged
from edged.runtimes.base import (
    DTYPES,
    LoadCancel,
    LoadFailed,
    LoadRequest,
    RunFailed,
    clean_text,
    refuse_dangerous_onnx,
    silence_telemetry,
)
from edged.runtimes.compiled import BYTES_MAX, cache_folder, prune
from edged.runtimes.onnx_graph import Graph, metadata, read_graph
from edged.runtimes.openvino_graph import DATATYPES, graph_of
from edged.tensors import TensorSpec

silence_telemetry()

import openvino as ov  # noqa: E402 - it sends an event on import unless that was silenced before
from openvino.frontend import FrontEndManager  # noqa: E402 - comes with it

__all__ = ["OpenVino", "create"]

_FORMATS = ("onnx", "openvino_ir")

_INT32 = np.iinfo(np.int32)
_WIDE = ("INT64", "UINT64")
"""What OpenVINO computes in 32 bits without a word: 2**31 comes back as -2**31."""

QUICK_RUN_NS = 2_000_000
"""A run this short ends before a cancel could arrive."""

LOOSE_RANK_MAX = 2
"""Apps feed a scalar as [v] or [[v]]; each further rank would have the model's shapes inferred once more."""


class _OpenVinoModel:
    """A compiled model with an infer request for each instance; see `base.Model`."""

    def __init__(
        self,
        model: Any,
        compiled: Any,
        compile_again: Callable[[], Any],
        *,
        metadata: dict[str, str],
        names: Mapping[str, tuple[str | None, ...]],
        device: str,
        precision: str,
        threads: int,
        instances: int,
    ) -> None:
        self._compiled = compiled
        self._idle = _requests(compiled, instances)
        self._compile_again = compile_again if model.is_dynamic() else None
        self._renewing = threading.Lock()
        self._gone: RunFailed | None = None
        """Why there is no model any more: what asks from then on must not wait for a request to be free."""
        self._running: dict[int, Any] = {}
        """The requests of the runs that are going on: by them a run is cancelled."""
        self._cancelled: dict[int, None] = {}
        self._has_state = bool(model.get_variables())
        self._quick_bytes = -1  # inputs of up to this size were run in less than QUICK_RUN_NS
        self.device = device
        self.precision = precision
        self.threads = threads
        self.instances = instances
        self.fallback_reason: str | None = None
        self.inputs = tuple(_spec(port, _input_name(port), names) for port in model.inputs)
        names_in = {s.name for s in self.inputs}
        self.outputs = tuple(_spec(port, _output_name(port, names_in), names) for port in model.outputs)
        self.metadata = metadata
        self._input_at = {s.name: (at, s.datatype) for at, s in enumerate(self.inputs)}
        self._output_at = {s.name: (at, DTYPES[s.datatype]) for at, s in enumerate(self.outputs)}
        self._wide_inputs = tuple(s.name for s in self.inputs if s.datatype in _WIDE)
        self._loose_scalars = _loose_scalars(model, self.inputs)

    def run(
        self, feeds: Mapping[str, Any], output_names: Sequence[str], run: int = 0, *, borrowed: bool = False
    ) -> list[Any]:
        missing = [s.name for s in self.inputs if s.name not in feeds]
        if missing:
            raise RunFailed(Code.INVALID_ARGUMENT, "MISSING_INPUT", f"inputs {missing} are missing")
        for name in self._wide_inputs:
            if name in feeds:
                _refuse_wide(name, feeds[name])
        with self._renewing:
            idle = self._idle
            if self._gone is not None:
                raise self._gone
        request = self._running[run] = idle.get()
        failed: RunFailed | None = None
        try:
            if self._has_state:
                # Each run begins from the initial state: what another request left is not for this one.
                request.reset_state()
            return self._run(request, feeds, output_names, run)
        except _Spoiled as e:
            failed = e.failed
        finally:
            del self._running[run]
            if self._cancelled:
                self._cancelled.pop(run, None)
            if failed is None or self._compile_again is None:
                if borrowed:
                    self._forget_inputs(request)
                idle.put(request)
        assert failed is not None, "the run returned, or raised something else"
        if self._compile_again is not None:
            del idle, request  # with the last of them goes the memory that compiling needs
            failed = self._renewed(self._compile_again, failed)
        raise failed

    def _renewed(self, compile_again: Callable[[], Any], failed: RunFailed) -> RunFailed:
        """Compiles again while new runs wait. What is to be raised: fatal if there is no model any more."""
        with self._renewing:
            self._compiled, self._idle = None, SimpleQueue()
            try:
                self._compiled = compile_again()
                self._idle = _requests(self._compiled, self.instances)
            except Exception as e:  # noqa: BLE001 - of whatever kind, this process serves the model no more
                text = f"{failed.message} (and the model could not be compiled again: {clean_text(e)})"
                self._gone = RunFailed(Code(failed.code), failed.reason, text, fatal=True)
                return self._gone
        return failed

    def _run(
        self, request: Any, feeds: Mapping[str, Any], output_names: Sequence[str], run: int
    ) -> list[Any]:
        try:
            for name, array in feeds.items():
                at, datatype = self._input_at[name]
                if array.ndim in self._loose_scalars.get(name, ()) and array.size == 1:
                    array = array.reshape(())
                request.set_input_tensor(at, _tensor(array, datatype))
        except KeyError as e:
            raise RunFailed(Code.INVALID_ARGUMENT, "UNKNOWN_INPUT", f"the model has no input {e}") from None
        except Exception as e:
            raise RunFailed(Code.INVALID_ARGUMENT, "REFUSED_BY_RUNTIME", clean_text(e)) from e
        try:
            self._infer(request, sum([array.nbytes for array in feeds.values()]))
            return [self._output(request, name) for name in output_names]
        except Exception as e:  # noqa: BLE001 - whatever its kind, the run has failed, and is answered so
            raise _Spoiled(self._run_failed(e, run)) from None

    def _forget_inputs(self, request: Any) -> None:
        # The request keeps the last tensors, and with them the memory under them.
        for at in range(len(self.inputs)):
            with contextlib.suppress(RuntimeError):  # an input of free shape that never was set has no tensor
                last = request.get_input_tensor(at)
                request.set_input_tensor(at, ov.Tensor(last.element_type, last.shape))

    def cancel(self, run: int = 0) -> None:
        request = self._running.get(run)
        if request is not None:
            self._cancelled[run] = None
            request.cancel()
            if run not in self._running:
                # It ended meanwhile; what was meant for it must not stay for another run of this number.
                self._cancelled.pop(run, None)

    def shrink(self) -> None:
        release = getattr(self._compiled, "release_memory", None)  # since 2024.6
        if release is not None:
            # It refuses while a run is going on; the next call of the guard comes when that is over.
            try:
                release()
            except RuntimeError:
                return

    def close(self) -> None:
        del self._idle, self._compiled

    def _infer(self, request: Any, input_bytes: int) -> None:
        began_ns = time.perf_counter_ns()
        if input_bytes <= self._quick_bytes:
            request.infer()
        else:
            request.start_async()
            request.wait()
        quick = time.perf_counter_ns() - began_ns < QUICK_RUN_NS
        self._quick_bytes = max(self._quick_bytes, input_bytes) if quick else -1

    def _output(self, request: Any, name: str) -> Any:
        at, dtype = self._output_at[name]
        data = request.get_output_tensor(at).data
        # bfloat16 comes as its bits in numpy's float16; a copy, since the next run writes to the same place.
        return np.array(data if data.dtype == dtype else data.view(dtype))

    def _run_failed(self, error: Exception, run: int) -> RunFailed:
        if run in self._cancelled:
            return RunFailed(Code.CANCELLED, "CANCELLED", "the request was cancelled while it ran")
        text = clean_text(error)
        if isinstance(error, MemoryError) or "bad_alloc" in text or "could not allocate" in text:
            return RunFailed(
                Code.RESOURCE_EXHAUSTED, "MEMORY_LIMIT", f"the run needs more memory than it may have: {text}"
            )
        if self.device != "CPU" and not _device_lives(self.device):
            return RunFailed(Code.UNAVAILABLE, "DEVICE_FAILED", f"{self.device} failed: {text}", fatal=True)
        return RunFailed(Code.INTERNAL, "RUNTIME_ERROR", text)


class _Spoiled(Exception):
    """A run began and did not end well."""

    def __init__(self, failed: RunFailed) -> None:
        super().__init__(failed.message)
        self.failed = failed


def _requests(compiled: Any, count: int) -> SimpleQueue[Any]:
    """Infer requests that no run uses."""
    idle: SimpleQueue[Any] = SimpleQueue()
    for _ in range(count):
        idle.put(compiled.create_infer_request())
    return idle


class OpenVino:
    """See `base.Runtime`."""

    name = "openvino"

    def __init__(self) -> None:
        self.version: str = str(ov.__version__).partition("-")[0]

    def load(self, request: LoadRequest, cancel: LoadCancel) -> _OpenVinoModel:
        if request.format not in _FORMATS:
            raise LoadFailed(
                "MODEL_INVALID", f"edged does not read {request.format} here", code=Code.INVALID_ARGUMENT
            )
        if request.format == "onnx":
            refuse_dangerous_onnx(request.path)
        core = ov.Core()
        try:
            model = _read(core, request)
        except Exception as e:
            raise _load_failed("MODEL_INVALID", e, code=Code.INVALID_ARGUMENT) from e
        cancel.check()
        _check_ports(model)
        try:
            compiled = core.compile_model(model, request.device, _properties(request))
        except Exception as e:
            raise self._compile_failed(core, request, e) from e
        cancel.check()
        _check_device(compiled, request.device)
        return _OpenVinoModel(
            model,
            compiled,
            partial(_compile, request),
            metadata=_metadata(model, request),
            names=_dim_names(request),
            device=request.device,
            precision=_precision(compiled, request),
            threads=request.threads,
            instances=request.instances,
        )

    def graph(self, request: LoadRequest) -> Graph:
        if request.format == "onnx":
            return read_graph(request.path)
        try:
            return graph_of(ov.Core().read_model(request.path))
        except RuntimeError as e:
            raise ValueError(clean_text(e)) from e

    def full_name(self, device: str) -> str:
        return str(ov.Core().get_property(device, "FULL_DEVICE_NAME"))

    def precision_fast(self, device: str) -> str:
        try:
            able = ov.Core().get_property(device, "OPTIMIZATION_CAPABILITIES")
        except RuntimeError:
            return ""
        if device == "CPU":
            return "bf16" if "BF16" in able else "f16" if "FP16" in able else ""
        return "f16" if "FP16" in able else ""

    def _compile_failed(self, core: Any, request: LoadRequest, error: Exception) -> LoadFailed:
        kind = request.device.partition(".")[0]
        if not any(name.partition(".")[0] == kind for name in core.available_devices):
            return LoadFailed(
                "DEVICE_FAILED",
                f"OpenVINO sees no {request.device} here: {clean_text(error)}",
                code=Code.UNAVAILABLE,
            )
        return _load_failed("MODEL_LOAD_FAILED", error, code=Code.FAILED_PRECONDITION)


def create() -> OpenVino:
    """The runtime; what every runtime's module has."""
    return OpenVino()


def _read(core: Any, request: LoadRequest) -> Any:
    if request.format != "onnx":
        return core.read_model(request.path)
    # The frontend by name: read_model would offer a broken file to every parser that it has.
    frontend = FrontEndManager().load_by_framework("onnx")
    return frontend.convert(frontend.load(request.path))


def _compile(request: LoadRequest) -> Any:
    core = ov.Core()
    return core.compile_model(_read(core, request), request.device, _properties(request))


def _dim_names(request: LoadRequest) -> dict[str, tuple[str | None, ...]]:
    """What an ONNX file calls its free dimensions, which OpenVINO forgets."""
    if request.format != "onnx":
        return {}
    try:
        graph = read_graph(request.path)
    except ValueError:
        return {}
    return {
        value.name: tuple(dim if isinstance(dim, str) else None for dim in value.shape)
        for value in (*graph.inputs, *graph.outputs)
        if value.shape is not None
    }


def _properties(request: LoadRequest) -> dict[str, Any]:
    properties: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
    kind = request.device.partition(".")[0]
    if kind == "NPU":
        if request.precision != "fast":
            raise LoadFailed(
                "DEVICE_FAILED",
                'the NPU computes in f16 only; set precision = "fast" if that is good enough',
                code=Code.FAILED_PRECONDITION,
            )
    elif request.precision != "fast":
        properties["INFERENCE_PRECISION_HINT"] = "f32"
        # Without this a GPU may still round, as the hint for execution allows more than the one for types.
        properties["EXECUTION_MODE_HINT"] = "ACCURACY"
    if kind == "CPU":
        properties |= {
            "NUM_STREAMS": str(request.instances),
            "INFERENCE_NUM_THREADS": request.threads * request.instances,
            "ENABLE_CPU_PINNING": "NO",
        }
    elif request.cache_dir and (folder := cache_folder(Path(request.cache_dir), "openvino")) is not None:
        # Compiling for an accelerator takes seconds; for the CPU it is not worth keeping unsigned code.
        # OpenVINO names an entry by model, device, version and properties, but never deletes one.
        prune(folder, bytes_max=BYTES_MAX)
        properties["CACHE_DIR"] = str(folder)
    return properties


def _check_ports(model: Any) -> None:
    for kind, ports in (("input", model.inputs), ("output", model.outputs)):
        for port in ports:
            type_name = port.get_element_type().get_type_name()
            if type_name not in DATATYPES:
                raise LoadFailed(
                    "MODEL_UNSUPPORTED",
                    f"{kind} '{_output_name(port, ())}' is of type {type_name}, not served with OpenVINO",
                    code=Code.UNIMPLEMENTED,
                )


def _check_device(compiled: Any, device: str) -> None:
    """Raises LoadFailed unless the model is really compiled for the device that was asked for."""
    try:
        used = [str(name) for name in compiled.get_property("EXECUTION_DEVICES")]
    except RuntimeError:
        return  # not every plugin says it; a device that was named outright is used or raises
    kind = device.partition(".")[0]
    if not used or any(name.strip("()").partition(".")[0] != kind for name in used):
        raise LoadFailed(
            "DEVICE_FAILED", f"asked for {device}, the model is compiled for {used}", code=Code.UNAVAILABLE
        )


def _precision(compiled: Any, request: LoadRequest) -> str:
    """What the compiled model says it computes in."""
    try:
        hint = compiled.get_property("INFERENCE_PRECISION_HINT")
        name = str(hint.get_type_name())
    except (RuntimeError, AttributeError):
        name = "f16" if request.device.startswith("NPU") else ""
    if name in ("f32", "f16", "bf16"):
        return name
    return "f32" if request.precision != "fast" else "unknown"


def _load_failed(reason: str, error: Exception, *, code: Code) -> LoadFailed:
    text = clean_text(error)
    if isinstance(error, LoadFailed):
        return error
    if isinstance(error, MemoryError) or "bad_alloc" in text:
        return LoadFailed(
            "MEMORY_LIMIT",
            f"loading needs more memory than the worker may have: {text}",
            code=Code.RESOURCE_EXHAUSTED,
        )
    return LoadFailed(reason, text, code=code)


def _device_lives(device: str) -> bool:
    from edged.runtimes.tiny import run_tiny_model  # only wanted after an error

    try:
        run_tiny_model(OpenVino(), device)
    except Exception:  # noqa: BLE001 - whatever it raises, the device is not usable from here
        return False
    return True


def _tensor(array: Any, datatype: str) -> Any:
    if datatype == "BF16":
        return ov.Tensor(np.ascontiguousarray(array), ov.Shape(array.shape), ov.Type.bf16)
    if DTYPES[datatype] != array.dtype:
        raise ValueError(f"a {array.dtype} array where {datatype} is needed")
    if array.flags.writeable and array.flags.c_contiguous:
        return ov.Tensor(array, shared_memory=True)
    return ov.Tensor(array, shared_memory=False)


def _refuse_wide(name: str, array: Any) -> None:
    if array.size and (array.max() > _INT32.max or array.min() < _INT32.min):
        raise RunFailed(
            Code.INVALID_ARGUMENT,
            "OUT_OF_RANGE",
            f"input '{name}' has an integer beyond 32 bits, which OpenVINO would cut off; "
            'set runtime = "onnxruntime" in the model\'s settings',
        )


def _loose_scalars(model: Any, specs: Sequence[TensorSpec]) -> dict[str, frozenset[int]]:
    """For each scalar input the ranks at which one element is answered as the scalar is.

    ONNX Runtime takes one element of any rank and computes with that rank; a compiled model here takes the
    declared shape alone. So a rank is taken where it leaves the shapes of all outputs as they are, and is
    refused where the answer would be another than ONNX Runtime's.
    """
    found: dict[str, frozenset[int]] = {}
    declared = [port.get_partial_shape() for port in model.outputs]
    for at, spec in enumerate(specs):
        if spec.shape != ():
            continue
        ranks = set()
        for rank in range(1, LOOSE_RANK_MAX + 1):
            copy = model.clone()
            # Operators that want a scalar there raise.
            with contextlib.suppress(RuntimeError):
                copy.reshape({at: ov.PartialShape([1] * rank)})
                if [port.get_partial_shape() for port in copy.outputs] == declared:
                    ranks.add(rank)
        found[spec.name] = frozenset(ranks)
    return found


def _input_name(port: Any) -> str:
    names = sorted(port.get_names())
    friendly = port.get_node().get_friendly_name()
    return str(friendly if friendly in names or not names else names[0])


def _output_name(port: Any, inputs: Any) -> str:
    """The name that the model's author gave: a tensor that is input and output has several."""
    names = port.get_names()
    friendly = re.sub(r"/sink_port_\d+$", "", port.get_node().get_friendly_name())
    if friendly in names or not names:
        return str(friendly)
    return str(min(names, key=lambda n: (n in inputs, n)))


def _spec(port: Any, name: str, names: Mapping[str, tuple[str | None, ...]]) -> TensorSpec:
    datatype = DATATYPES[port.get_element_type().get_type_name()]
    partial_shape = port.get_partial_shape()
    if partial_shape.rank.is_dynamic:
        return TensorSpec(name, datatype, None)
    shape = tuple(-1 if d.is_dynamic else d.get_length() for d in partial_shape)
    called = names.get(name, ())
    if len(called) != len(shape):
        return TensorSpec(name, datatype, shape)
    free = tuple(text if dim < 0 else None for text, dim in zip(called, shape))  # noqa: B905 - as long, see above
    return TensorSpec(name, datatype, shape, dim_names=free)


def _metadata(model: Any, request: LoadRequest) -> dict[str, str]:
    """What the file says of itself. Of an ONNX file OpenVINO keeps only a part: so it is asked itself."""
    if request.format == "onnx":
        return merged(*metadata(request.path))
    return merged({"graph_name": model.get_friendly_name()}, dict(_flat("", model.get_rt_info())))


def _flat(prefix: str, info: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Runtime info by its path: a model's labels stand in a map of their own, as `model_info.labels`."""
    for key, value in info.items():
        if isinstance(value, Mapping):
            yield from _flat(f"{prefix}{key}.", value)
            continue
        with contextlib.suppress(
            RuntimeError, AttributeError, TypeError
        ):  # no text: of use to OpenVINO alone
            yield f"{prefix}{key}", str(value.astype(str))
