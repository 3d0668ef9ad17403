"""InferenceSession: stands in for onnxruntime.InferenceSession, so that an app moves over by one line.

    from edged import InferenceSession          # instead of: from onnxruntime import InferenceSession
    session = InferenceSession("digits.onnx")   # the model called `digits` in the daemon's folder

The daemon has the model; nothing is loaded here, and the device is the daemon's choice. What ONNX Runtime
would raise as its own exceptions are edged's typed errors here. Every method of ONNX Runtime's is there; one
that has no counterpart, such as profiling, raises Unimplemented and says what to do instead.
"""

from __future__ import annotations

import os
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import PurePath
from types import TracebackType
from typing import Any, NoReturn

from edged.binding import ONNX_TYPES, IOBinding, OrtValue, array_of
from edged.client import Client, InferResult
from edged.errors import EdgedError, InvalidArgument, ResourceExhausted, Unimplemented
from edged.properties import parted

__all__ = ["InferenceSession", "ModelMeta", "NodeArg", "model_of"]

_TYPES = {datatype: name for datatype, (name, _) in ONNX_TYPES.items()} | {
    # The protocol does not say what these hold.
    "SEQUENCE": "seq(unknown)",
    "MAP": "map(unknown)",
    "OPTIONAL": "optional(unknown)",
}

_MODEL_SUFFIXES = {".onnx", ".ort", ".xml"}

_NO_VERSION = (1 << 63) - 1
"""What ONNX Runtime says of a model that has no version."""

_ASYNC_THREADS_MAX = 8
"""Runs of `run_async` in flight at once; more wait here. A model seldom has as many instances."""


@dataclass(frozen=True)
class NodeArg:
    """An input or output as ONNX Runtime describes it.

    `shape` has an int for a fixed dimension, its name (or None) for a free one; it is empty for a free rank.
    `type` is ONNX's, as in `tensor(float)`.
    """

    name: str
    shape: list[int | str | None]
    type: str

    def __str__(self) -> str:
        return f"NodeArg(name={self.name!r}, type={self.type!r}, shape={self.shape!r})"


@dataclass(frozen=True)
class ModelMeta:
    """The model's own metadata, by ONNX Runtime's names; `version` is 2^63 - 1 where the model has none."""

    producer_name: str = ""
    graph_name: str = ""
    domain: str = ""
    description: str = ""
    graph_description: str = ""
    version: int = _NO_VERSION
    custom_metadata_map: dict[str, str] = field(default_factory=dict)


def _not_here(what: str, instead: str) -> Callable[..., NoReturn]:
    """A method of ONNX Runtime's that has no counterpart."""

    def method(_session: object, *_arguments: object, **_named: object) -> NoReturn:
        raise Unimplemented(f"{what}; {instead}", reason="NOT_IN_A_SESSION")

    method.__doc__ = f"Not here, since {what}. Raises Unimplemented."
    return method


class InferenceSession:
    """A model that the daemon serves, used as ONNX Runtime's session is.

    `path_or_bytes` is the model's name, or a path in the folder's forms: `NAME.onnx`, `NAME/model.onnx`,
    `NAME/3/model.onnx` (which asks for version 3). `sess_options`, `providers`, `provider_options` and any
    other argument of ONNX Runtime's are taken and ignored: threads, device and precision are settings of the
    daemon's. `endpoint` and `timeout` (seconds for each call) are Client's; `version` asks for one version.

    May be used by any number of threads. Raises NotFound for a model that the daemon does not have, and
    Unavailable when it does not serve now, or no daemon is there.
    """

    def __init__(
        self,
        path_or_bytes: str | os.PathLike[str],
        sess_options: object = None,
        providers: Sequence[Any] | None = None,
        provider_options: Sequence[Any] | None = None,
        *,
        endpoint: str | None = None,
        timeout: float = 30.0,
        version: str | int | None = None,
        **_ignored: object,
    ) -> None:
        self._name, found_version = model_of(path_or_bytes)
        self._version = version if version is not None else found_version
        self._options = sess_options
        self._client = Client(endpoint, timeout=timeout)
        try:
            metadata = self._metadata()
        except BaseException:
            self._client.close()
            raise
        specs = metadata["inputs"]
        self._inputs = [_node_arg(spec) for spec in specs if not spec.get("optional")]
        self._optional_inputs = [_node_arg(spec) for spec in specs if spec.get("optional")]
        self._outputs = [_node_arg(spec) for spec in metadata["outputs"]]
        self._properties: dict[str, str] = dict(metadata.get("properties") or {})
        self._last_result: InferResult | None = None
        self._threads: ThreadPoolExecutor | None = None
        self._making = threading.Lock()

    def _metadata(self) -> dict[str, Any]:
        """Inputs and outputs, and what the model says of itself, all of the same version."""
        self._too_large: ResourceExhausted | None = None
        try:
            return self._client.model_metadata(self._name, self._version)
        except ResourceExhausted as e:
            if e.reason != "METADATA_TOO_LARGE":
                raise
            self._too_large = e
            return self._client.model_metadata(self._name, self._version, properties=False)

    def run(
        self,
        output_names: Sequence[str] | None,
        input_feed: Mapping[str, Any],
        run_options: object = None,
    ) -> list[Any]:
        """Runs the model; the outputs named, or all for None, in order, as numpy arrays, lists and dicts.

        Raises ValueError, as ONNX Runtime does, when a required input is missing; edged's typed errors for
        everything that the daemon refuses. `run_options` is ignored.
        """
        self._check_feed(input_feed)
        names = list(dict.fromkeys(output_names)) if output_names else None
        feed = {name: array_of(value) for name, value in input_feed.items()}
        result = self._client.infer(self._name, feed, version=self._version, outputs=names)
        self._last_result = result
        return [result[name] for name in output_names or result]

    def run_async(
        self,
        output_names: Sequence[str] | None,
        input_feed: Mapping[str, Any],
        callback: Callable[[list[Any], Any, str], object],
        user_data: Any,
        run_options: object = None,
    ) -> None:
        """`run` in a thread of the session's, which calls `callback(results, user_data, error)` at its end.

        `error` is empty, or says why `results` is. Leave the arrays alone until then. Raises as `run` for a
        missing input.
        """
        self._check_feed(input_feed)
        feed = dict(input_feed)
        with self._making:
            if self._threads is None:
                self._threads = ThreadPoolExecutor(_ASYNC_THREADS_MAX, thread_name_prefix="edged-run")
            self._threads.submit(self._run_and_call, output_names, feed, callback, user_data)

    def _run_and_call(
        self,
        output_names: Sequence[str] | None,
        input_feed: Mapping[str, Any],
        callback: Callable[[list[Any], Any, str], object],
        user_data: Any,
    ) -> None:
        try:
            results, error = self.run(output_names, input_feed), ""
        except (EdgedError, ValueError, TypeError) as e:
            results, error = [], str(e) or type(e).__name__
        try:
            callback(results, user_data, error)
        except Exception:  # noqa: BLE001 - the app's own; shown as a thread's uncaught ones are
            traceback.print_exc()

    def run_with_ort_values(
        self,
        output_names: Sequence[str] | None,
        input_dict_ort_values: Mapping[str, Any],
        run_options: object = None,
    ) -> list[OrtValue]:
        """`run` with OrtValues, ours or ONNX Runtime's, for inputs, and ours for outputs."""
        return [OrtValue(value) for value in self.run(output_names, input_dict_ort_values)]

    def io_binding(self) -> IOBinding:
        """A new IOBinding, for `run_with_iobinding`."""
        return IOBinding(self)

    def run_with_iobinding(self, iobinding: IOBinding, run_options: object = None) -> None:
        """`run` from and to what is bound. Raises InvalidArgument where that does not fit."""
        if not isinstance(iobinding, IOBinding) or iobinding.session is not self:
            raise ValueError("IOBinding must be used with the session that created it.")
        if not iobinding.outputs:
            raise InvalidArgument("no output is bound; bind_output those that are wanted", reason="NO_OUTPUT")
        iobinding.take(self.run(list(iobinding.outputs), iobinding.inputs))

    def create_ortvalue_from_shape_and_type(
        self,
        shape: Sequence[int],
        element_type: Any,
        device_type: str,
        device_id: int = 0,
        vendor_id: Any = -1,
    ) -> OrtValue:
        """An OrtValue of zeros in the CPU's memory. Raises Unimplemented for another device."""
        return OrtValue.ortvalue_from_shape_and_type(shape, element_type, device_type, device_id)

    def _check_feed(self, input_feed: Mapping[str, Any]) -> None:
        if not isinstance(input_feed, Mapping):
            raise InvalidArgument(
                f"input_feed: expected a dict of names and arrays, got {type(input_feed).__name__}; "
                "Client.infer takes an array alone",
                reason="BAD_FEED",
            )
        missing = [arg.name for arg in self._inputs if arg.name not in input_feed]
        if missing:
            raise ValueError(f"Required inputs ({missing}) are missing from input feed ({list(input_feed)}).")

    def get_inputs(self) -> list[NodeArg]:
        """The inputs that must be given."""
        return list(self._inputs)

    def get_outputs(self) -> list[NodeArg]:
        """The outputs, in the order in which `run` returns them."""
        return list(self._outputs)

    def get_overridable_initializers(self) -> list[NodeArg]:
        """The inputs that may be left out."""
        return list(self._optional_inputs)

    def get_modelmeta(self) -> ModelMeta:
        """The model's own metadata. Raises ResourceExhausted where it is more than the daemon tells."""
        if self._too_large is not None:
            raise self._too_large
        fields, own = parted(self._properties)
        version = fields.pop("version")
        return ModelMeta(
            **fields, version=int(version) if version.isdecimal() else _NO_VERSION, custom_metadata_map=own
        )

    def get_providers(self) -> list[str]:
        """ONNX Runtime's name for what the last `run` really used; before the first, what is always there."""
        if self._last_result is None:
            return ["CPUExecutionProvider"]
        if self._last_result.runtime == "openvino":
            return ["OpenVINOExecutionProvider", "CPUExecutionProvider"]
        if self._last_result.device.startswith("CUDA"):
            return ["CUDAExecutionProvider", "CPUExecutionProvider"]
        return ["CPUExecutionProvider"]

    def get_provider_options(self) -> dict[str, dict[str, str]]:
        """Nothing for each provider: they are the daemon's."""
        return {provider: {} for provider in self.get_providers()}

    def get_session_options(self) -> Any:
        """The options that the session was made with, none of them used. Raises Unimplemented without."""
        if self._options is None:
            raise Unimplemented(
                "the session was made without options, and the daemon has its own; `edgectl explain MODEL` "
                "shows threads and device, the model's settings change them",
                reason="NOT_IN_A_SESSION",
            )
        return self._options

    def set_providers(self, providers: Sequence[Any] | None = None, provider_options: Any = None) -> None:
        """Nothing, as the constructor's: the device is a setting of the daemon's, get_providers tells it."""

    def disable_fallback(self) -> None:
        """Nothing: the daemon never falls back in silence, `last_result.fallback_reason` tells."""

    def enable_fallback(self) -> None:
        """Nothing; see `disable_fallback`."""

    _PROFILING = "the model runs in the daemon, which writes no profile of ONNX Runtime's"
    _TIMES = "`last_result.compute_us` and `edgectl top` have times"
    _PLACES = "where the model runs is the daemon's choice"
    _EXPLAIN = "`last_result.device` and `edgectl explain MODEL` tell it"
    _TUNING = "the daemon tunes models itself"
    end_profiling = _not_here(_PROFILING, _TIMES)
    get_profiling_start_time_ns = _not_here(_PROFILING, _TIMES)
    get_input_memory_infos = _not_here(_PLACES, _EXPLAIN)
    get_output_memory_infos = _not_here(_PLACES, _EXPLAIN)
    get_input_epdevices = _not_here(_PLACES, _EXPLAIN)
    get_provider_graph_assignment_info = _not_here(_PLACES, _EXPLAIN)
    set_ep_dynamic_options = _not_here(_PLACES, "the model's settings (edged.toml) change it")
    release_captured_graph = _not_here("no graph is captured in this process", "leave the call out")
    get_tuning_results = _not_here(_TUNING, "`edgectl tune MODEL` measures and shows how it runs best")
    set_tuning_results = _not_here(_TUNING, "`edgectl tune MODEL` measures and applies what is best")
    run_with_ortvaluevector = _not_here(
        "an OrtValueVector is memory of ONNX Runtime's own", "use run, run_with_ort_values or an IOBinding"
    )

    @property
    def last_result(self) -> InferResult | None:
        """The last run's whole answer: model version, device, runtime, timings. None before the first."""
        return self._last_result

    def close(self) -> None:
        """Ends the connection to the daemon. Runs of `run_async` that were not over end with an error."""
        self._client.close()
        with self._making:
            threads, self._threads = self._threads, None
        if threads is not None:
            threads.shutdown(wait=False)

    def __enter__(self) -> InferenceSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def model_of(path_or_bytes: str | os.PathLike[str]) -> tuple[str, str | None]:
    """The model's name, and its version where the path holds one: the inverse of the folder's forms.

    Raises InvalidArgument for a model's bytes, which only the daemon may load.
    """
    if isinstance(path_or_bytes, (bytes, bytearray, memoryview)):
        raise InvalidArgument(
            "a session of edged's takes a model's name or path, not its bytes; put the file into the "
            "daemon's folder (edgectl put FILE)",
            reason="MODEL_BYTES",
        )
    path = PurePath(path_or_bytes)
    name = path.stem if path.suffix in _MODEL_SUFFIXES else path.name
    if path.suffix in _MODEL_SUFFIXES and name == "model" and path.parent.name:
        if path.parent.name.isdecimal() and path.parent.parent.name:
            return path.parent.parent.name, path.parent.name
        return path.parent.name, None
    return name, None


def _node_arg(spec: Mapping[str, Any]) -> NodeArg:
    names = spec.get("dim_names") or ()
    shape: list[int | str | None] = []
    for at, dim in enumerate(spec["shape"] or ()):
        shape.append(dim if dim >= 0 else names[at] if at < len(names) else None)
    return NodeArg(spec["name"], shape, _TYPES.get(spec["datatype"], spec["datatype"]))
