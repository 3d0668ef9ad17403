"""ONNX Runtime behind the seam: CPU and CUDA.

What is decided here and why: `enable_fallback=0` and a look at what the session really got, because the
Python wrapper retries on the CPU in silence; spinning bounded to 200 µs, which keeps the speed of models
with many small operators and lets an idle worker sleep; TF32 off on CUDA unless `precision = "fast"`,
because it is a change of accuracy; plain numpy feeds, which are faster than OrtValues for small models
(5.7 against 41 µs for a small MLP), except where a bfloat16 tensor needs the latter.

Runs on Python 3.10 too.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import platform
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edged.errors import Code
from edged.properties import merged
from edged.runtimes.base import (
    LoadCancel,
    LoadFailed,
    LoadRequest,
    RunFailed,
    clean_text,
    refuse_dangerous_onnx,
    silence_telemetry,
)
from edged.runtimes.compiled import Kept, cpu_identity, key_of
from edged.runtimes.onnx_graph import Graph, read_graph, unranked
from edged.tensors import TensorSpec

silence_telemetry()

import onnxruntime as ort  # noqa: E402 - it opens a telemetry database on import unless that was silenced
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors  # noqa: E402 - comes with it

__all__ = ["OnnxRuntime", "create"]

_DATATYPES = {
    "bool": "BOOL",
    "int8": "INT8",
    "int16": "INT16",
    "int32": "INT32",
    "int64": "INT64",
    "uint8": "UINT8",
    "uint16": "UINT16",
    "uint32": "UINT32",
    "uint64": "UINT64",
    "float16": "FP16",
    "float": "FP32",
    "double": "FP64",
    "bfloat16": "BF16",
    "string": "BYTES",
}

_ONNX_BFLOAT16 = 16
"""TensorProto.DataType.BFLOAT16 in the ONNX specification."""

SPIN_US = 200
"""How long a pool thread spins for the next operator before it sleeps."""

SPIN_DURATION_SINCE = (1, 26)
"""Older releases do not know the duration; there, spinning ends with the run, which was as fast."""

KEEP_FROM_BYTES = 4 << 20
"""Smaller models are optimised in 10 to 30 ms. A ResNet-50 of 100 MB takes 460 ms of a processor and 310
MB of memory, 90 ms and 160 MB as it was kept, the hash included; keeping it costs the first load 290 ms."""

KEPT_FORM = 2
"""Counts up when what is kept, or how, changes."""

_READ_KEPT = (
    ("session.load_model_format", "ORT"),
    # The weights stay where the file is mapped: half the memory, and shared with whoever else loads it.
    ("session.use_memory_mapped_ort_model", "1"),
    ("session.use_ort_model_bytes_directly", "1"),
    ("session.use_ort_model_bytes_for_initializers", "1"),
)

OVERRIDABLE_MAX = 64
"""Initializers shown as optional inputs; a model that has more was exported with its weights as inputs."""

_ERRORS_OF_THE_MODEL = (
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.NoModel,
    UnicodeDecodeError,
)


class _OnnxModel:
    """A session on one device; see `base.Model`."""

    def __init__(
        self, session: Any, path: str, *, device: str, precision: str, threads: int, instances: int
    ) -> None:
        self._session = session
        self._run = session.run
        self._running: dict[int, Any] = {}
        """The options of the runs that are going on: by them a run is cancelled."""
        self._shrink_asked = False
        self.device = device
        self.precision = precision
        self.threads = threads
        self.instances = instances
        self.fallback_reason: str | None = None
        free = _free_ranks(session, path)
        self.inputs = _input_specs(session, free)
        self.outputs = tuple(_spec(arg, "output", free) for arg in session.get_outputs())
        self.metadata = _metadata(session.get_modelmeta())
        self._bf16_inputs = frozenset(s.name for s in self.inputs if s.datatype == "BF16")
        self._bytes_inputs = frozenset(s.name for s in self.inputs if s.datatype == "BYTES")
        self._plain = not self._bf16_inputs and all(s.datatype != "BF16" for s in self.outputs)

    def run(
        self, feeds: Mapping[str, Any], output_names: Sequence[str], run: int = 0, *, borrowed: bool = False
    ) -> list[Any]:
        options = self._running[run] = ort.RunOptions()
        if self._shrink_asked:
            self._ask_for_shrinkage(options)
        if self._bytes_inputs:
            feeds = {k: _decode_strings(k, v) if k in self._bytes_inputs else v for k, v in feeds.items()}
        try:
            if self._plain:
                return self._run(output_names, feeds, options)  # type: ignore[no-any-return]  # untyped library
            return self._run_ort_values(feeds, output_names, options)
        except Exception as e:
            raise self._run_failed(e, options) from e
        finally:
            del self._running[run]

    def cancel(self, run: int = 0) -> None:
        options = self._running.get(run)
        if options is not None:
            options.terminate = True

    def shrink(self) -> None:
        self._shrink_asked = True

    def close(self) -> None:
        del self._run, self._session

    def _run_ort_values(
        self, feeds: Mapping[str, Any], output_names: Sequence[str], options: Any
    ) -> list[Any]:
        values = {
            name: ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, _ONNX_BFLOAT16)
            if name in self._bf16_inputs
            else ort.OrtValue.ortvalue_from_numpy(array)
            for name, array in feeds.items()
        }
        results = self._session.run_with_ort_values(list(output_names), values, options)
        return [_from_ort_value(r) for r in results]

    def _ask_for_shrinkage(self, options: Any) -> None:
        arenas = "cpu:0"
        if self.device.startswith("CUDA:"):
            arenas += ";gpu:" + self.device.partition(":")[2]
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", arenas)
        self._shrink_asked = False

    def _run_failed(self, error: Exception, options: Any) -> RunFailed:
        text = clean_text(error)
        if options.terminate:
            return RunFailed(Code.CANCELLED, "CANCELLED", "the request was cancelled while it ran")
        if isinstance(error, RunFailed):
            return error
        if isinstance(error, (ort_errors.InvalidArgument, ValueError)):
            return RunFailed(Code.INVALID_ARGUMENT, "REFUSED_BY_RUNTIME", text)
        if _is_out_of_memory(error):
            return RunFailed(
                Code.RESOURCE_EXHAUSTED, "MEMORY_LIMIT", f"the run needs more memory than it may have: {text}"
            )
        if self.device != "CPU" and not _cuda_lives(self.device):
            return RunFailed(Code.UNAVAILABLE, "DEVICE_FAILED", f"{self.device} failed: {text}", fatal=True)
        return RunFailed(Code.INTERNAL, "RUNTIME_ERROR", text)


class OnnxRuntime:
    """See `base.Runtime`."""

    name = "onnxruntime"

    def __init__(self) -> None:
        self.version: str = ort.__version__
        # Fatal only: what goes wrong is raised, and the journal is no place for a library's chatter.
        ort.set_default_logger_severity(4)

    def load(self, request: LoadRequest, cancel: LoadCancel) -> _OnnxModel:
        if request.format != "onnx":
            raise LoadFailed(
                "MODEL_INVALID",
                f"ONNX Runtime reads ONNX files, not {request.format}",
                code=Code.INVALID_ARGUMENT,
            )
        model = self._load_kept(request, cancel)
        if model is not None:
            return model
        refuse_dangerous_onnx(request.path)
        providers, precision = _providers(request.device, request.precision)
        kept, key = _keeper(request)
        temporary = None if kept is None else kept.begin(key, 2 * Path(request.path).stat().st_size)
        session = None
        if kept is not None and temporary is not None:
            try:
                session = _session(request, cancel, providers, save_to=temporary)
            except LoadFailed:
                cancel.check()  # what cannot be saved may be loaded all the same
                kept.discard(temporary)
        if session is None:
            temporary = None
            session = _session(request, cancel, providers)
        if request.device != "CPU":
            _check_on_cuda(session, request.device)
        model = _model(session, request, precision)
        if kept is not None and temporary is not None:
            # Hashing takes as long as reading: nobody is to wait for it.
            arguments = (temporary, key, _note_of(model))
            threading.Thread(target=kept.publish, args=arguments, name="keeper", daemon=True).start()
        return model

    def _load_kept(self, request: LoadRequest, cancel: LoadCancel) -> _OnnxModel | None:
        """The model as an earlier load has optimised it, if that was kept and is whole."""
        kept, key = _keeper(request)
        if kept is None:
            return None
        with kept.find(key) as found:
            if found is None:
                return None
            path, note = found
            try:
                session = _session(request, cancel, ["CPUExecutionProvider"], kept_at=path)
                model = _model(session, request, "f32")
            except LoadFailed:
                cancel.check()
                return None
            if _note_of(model)["tensors"] != note["tensors"]:
                return None
            model.metadata = dict(note["metadata"])
            return model

    def graph(self, request: LoadRequest) -> Graph:
        return read_graph(request.path)

    def full_name(self, device: str) -> str:
        return _cuda_name(device) if device.startswith("CUDA:") else _cpu_name()

    def precision_fast(self, device: str) -> str:
        return "tf32" if device.startswith("CUDA:") else ""


def create() -> OnnxRuntime:
    """The runtime; what every runtime's module has."""
    return OnnxRuntime()


def _keeper(request: LoadRequest) -> tuple[Kept | None, str]:
    """Where this load's result is kept, and its name there; None for what is not worth it, or not known.

    The name is the file's too, not only its content's: a load does not know whether the stored copy is sound,
    which is found out meanwhile, and what was made of one that is not must never be found again.
    """
    if request.device != "CPU" or not request.cache_dir or not request.content:
        return None, ""
    try:
        file = Path(request.path).stat()
        if file.st_size < KEEP_FROM_BYTES:
            return None, ""
    except OSError:
        return None, ""
    parts = {
        "form": KEPT_FORM,
        "content": request.content,
        "file": f"{file.st_ino} {file.st_mtime_ns}",
        "runtime": f"onnxruntime {ort.__version__}",
        "cpu": cpu_identity(),
    }
    return Kept(Path(request.cache_dir) / "onnxruntime"), key_of(parts)


def _session(
    request: LoadRequest,
    cancel: LoadCancel,
    providers: list[Any],
    *,
    save_to: Path | None = None,
    kept_at: str | None = None,
) -> Any:
    """A session; one that also writes down what it has optimised, or one of what was written down."""
    options = _session_options(request.threads, request.instances)
    if save_to is not None:
        options.optimized_model_filepath = str(save_to)
        options.add_session_config_entry("session.save_model_format", "ORT")
    if kept_at is not None:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        for name, value in _READ_KEPT:
            options.add_session_config_entry(name, value)
    if hasattr(options, "set_load_cancellation_flag"):
        cancel.on_cancel(lambda: options.set_load_cancellation_flag(True))
    cancel.check()
    try:
        session = ort.InferenceSession(
            kept_at or request.path, options, providers=providers, enable_fallback=0
        )
    except Exception as e:
        cancel.check()
        raise _load_failed(e, request.device) from e
    finally:
        cancel.on_cancel(None)
    cancel.check()
    return session


def _model(session: Any, request: LoadRequest, precision: str) -> _OnnxModel:
    return _OnnxModel(
        session,
        request.path,
        device=request.device,
        precision=precision,
        threads=request.threads,
        instances=request.instances,
    )


def _note_of(model: _OnnxModel) -> dict[str, Any]:
    """What an entry is recognised by beside its hash."""
    tensors = [spec.to_wire() for spec in (*model.inputs, *model.outputs)]
    return {"tensors": tensors, "metadata": model.metadata}


def _session_options(threads: int, instances: int) -> Any:
    """One session serves all instances: each run works in its own thread, the others are one pool."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = instances * (threads - 1) + 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    if _release() >= SPIN_DURATION_SINCE:
        options.add_session_config_entry("session.intra_op.spin_duration_us", str(SPIN_US))
    else:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    # Tells which nodes run where; unknown keys are ignored by older versions.
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    return options


def _release() -> tuple[int, int]:
    major, minor = str(ort.__version__).split(".")[:2]
    return int(major), int(minor)


def _providers(device: str, precision: str) -> tuple[list[Any], str]:
    """What to ask the session for, and the precision that this gives."""
    if device == "CPU":
        return ["CPUExecutionProvider"], "f32"
    kind, _, number = device.partition(":")
    if kind != "CUDA" or not number.isdecimal():
        raise LoadFailed(
            "DEVICE_FAILED", f"ONNX Runtime has no device {device!r} here", code=Code.UNAVAILABLE
        )
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        raise LoadFailed(
            "DEVICE_FAILED",
            "this ONNX Runtime was built without CUDA; install edged[cuda] in place of edged[cpu]",
            code=Code.UNAVAILABLE,
        )
    if hasattr(ort, "preload_dlls"):
        # Finds CUDA and cuDNN in NVIDIA's wheels; it prints what it misses, which the session then raises.
        with contextlib.suppress(OSError, RuntimeError):
            ort.preload_dlls()
    fast = precision == "fast"
    cuda = {
        "device_id": number,
        "use_tf32": "1" if fast else "0",
        # The default, EXHAUSTIVE, tries every algorithm for each new shape: seconds, and a lot of memory.
        "cudnn_conv_algo_search": "HEURISTIC",
        # Grow by what is asked for, not by doubling: several models share the device.
        "arena_extend_strategy": "kSameAsRequested",
    }
    return [("CUDAExecutionProvider", cuda), "CPUExecutionProvider"], "tf32" if fast else "f32"


def _check_on_cuda(session: Any, device: str) -> None:
    """Raises LoadFailed unless the session really is on the GPU, nodes and all."""
    if "CUDAExecutionProvider" not in session.get_providers():
        raise LoadFailed(
            "DEVICE_FAILED",
            f"{device} could not be used: the CUDA provider did not start (driver, CUDA or cuDNN libraries)",
            code=Code.UNAVAILABLE,
        )
    assigned = getattr(session, "get_provider_graph_assignment_info", None)
    if assigned is None:
        return
    try:
        providers = {part.ep_name for part in assigned()}
    except Exception:  # noqa: BLE001 - a version that cannot tell says so by raising; the check above stands
        return
    if providers and "CUDAExecutionProvider" not in providers:
        raise LoadFailed(
            "DEVICE_FAILED",
            f"no operator of this model runs on {device}: the provider has none of them",
            code=Code.UNAVAILABLE,
        )


def _load_failed(error: Exception, device: str) -> LoadFailed:
    text = clean_text(error)
    if isinstance(error, ort_errors.NoSuchFile):
        return LoadFailed("MODEL_INVALID", text, code=Code.NOT_FOUND)
    if isinstance(error, _ERRORS_OF_THE_MODEL):
        return LoadFailed("MODEL_INVALID", text, code=Code.INVALID_ARGUMENT)
    if _is_out_of_memory(error):
        return LoadFailed(
            "MEMORY_LIMIT",
            f"loading needs more memory than the worker may have: {text}",
            code=Code.RESOURCE_EXHAUSTED,
        )
    if device != "CPU" and isinstance(error, (ort_errors.EPFail, ort_errors.RuntimeException)):
        return LoadFailed("DEVICE_FAILED", f"{device}: {text}", code=Code.UNAVAILABLE)
    return LoadFailed("MODEL_LOAD_FAILED", text)


def _is_out_of_memory(error: Exception) -> bool:
    # ONNX Runtime has no status of its own for this: the allocator's sentence is all there is.
    if isinstance(error, MemoryError):
        return True
    text = str(error)
    return "bad_alloc" in text or "bad allocation" in text or "Failed to allocate memory" in text


def _cuda_lives(device: str) -> bool:
    """Whether a fresh tiny session still runs there: after a CUDA error nothing in the process does."""
    from edged.runtimes.tiny import run_tiny_model  # only wanted after an error

    try:
        run_tiny_model(OnnxRuntime(), device)
    except Exception:  # noqa: BLE001 - whatever it raises, the device is not usable from here
        return False
    return True


def _free_ranks(session: Any, path: str) -> frozenset[str]:
    """The inputs and outputs of any rank; the session shows them as scalars, so the file is asked."""
    if all(arg.shape for arg in (*session.get_inputs(), *session.get_outputs())):
        return frozenset()
    return unranked(path)


def _input_specs(session: Any, free: frozenset[str]) -> tuple[TensorSpec, ...]:
    specs = [_spec(arg, "input", free) for arg in session.get_inputs()]
    initializers = session.get_overridable_initializers()
    if len(initializers) <= OVERRIDABLE_MAX:
        for arg in initializers:
            spec = _spec(arg, "input", frozenset())
            specs.append(TensorSpec(spec.name, spec.datatype, spec.shape, optional=True))
    return tuple(specs)


def _spec(arg: Any, kind: str, free: frozenset[str]) -> TensorSpec:
    """The spec of an input or output; raises LoadFailed for a type that the protocol cannot carry."""
    text: str = arg.type
    optional = text.startswith("optional(")
    if optional and kind == "input":
        text = text[len("optional(") : -1]
    datatype = None
    if text.startswith("tensor("):
        datatype = _DATATYPES.get(text[len("tensor(") : -1])
    elif kind == "output":
        datatype = {"seq": "SEQUENCE", "map": "MAP", "optional": "OPTIONAL"}.get(text.partition("(")[0])
    if datatype is None:
        raise LoadFailed(
            "MODEL_UNSUPPORTED",
            f"{kind} '{arg.name}' is a {arg.type}, which the protocol has no datatype for",
            code=Code.UNIMPLEMENTED,
        )
    if datatype in ("SEQUENCE", "MAP", "OPTIONAL") or arg.shape is None or arg.name in free:
        return TensorSpec(arg.name, datatype, None, optional=optional and kind == "input")
    return TensorSpec(
        arg.name,
        datatype,
        tuple(d if isinstance(d, int) and d >= 0 else -1 for d in arg.shape),
        optional=optional and kind == "input",
        dim_names=tuple(d if isinstance(d, str) else None for d in arg.shape),
    )


def _metadata(meta: Any) -> dict[str, str]:
    fields = {
        "producer_name": meta.producer_name,
        "graph_name": meta.graph_name,
        "domain": meta.domain,
        "description": meta.description,
        "graph_description": meta.graph_description,
    }
    if 0 <= meta.version < (1 << 62):  # an unset version is the largest int64
        fields["version"] = str(meta.version)
    return merged(fields, meta.custom_metadata_map)


def _decode_strings(name: str, array: Any) -> Any:
    """Object arrays of str, the only form in which the runtime does not turn bytes into their repr."""
    try:
        flat = [e.decode() if isinstance(e, bytes) else e for e in array.reshape(-1)]
    except UnicodeDecodeError as e:
        raise RunFailed(
            Code.INVALID_ARGUMENT, "BAD_BYTES", f"input '{name}': ONNX Runtime takes UTF-8 strings only: {e}"
        ) from None
    out = np.empty(len(flat), object)
    out[:] = flat
    return out.reshape(array.shape)


def _from_ort_value(value: Any) -> Any:
    if not value.has_value():
        return None
    if value.is_tensor() and value.element_type() == _ONNX_BFLOAT16:
        # numpy has no such type and OrtValue.numpy() refuses, so the bytes are copied from where they lie.
        shape = tuple(value.shape())
        raw = ctypes.string_at(value.data_ptr(), 2 * math.prod(shape))
        return np.frombuffer(raw, np.uint16).reshape(shape)
    return value.numpy()


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "Model")):
                return line.partition(":")[2].strip()
    return platform.machine()


def _cuda_name(device: str) -> str:
    number = int(device.partition(":")[2])
    cards = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    with contextlib.suppress(OSError, IndexError):
        for line in cards[number].read_text().splitlines():
            if line.startswith("Model:"):
                return line.partition(":")[2].strip()
    with contextlib.suppress(OSError):  # Jetson: no PCI device, the board says who it is
        return Path("/proc/device-tree/model").read_text().strip("\0\n ")
    return ""
