"""What a client puts into a request and takes out of a reply: pure, for both kinds of client.

Owns the client's half of the protocol's form: which tensor goes inline and which becomes a frame, what a
reply's header means, where the daemon's sockets lie. It never touches a socket: `link` carries the
frames, `client` decides when.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from edged.arrays import (
    VALUE_DATATYPES,
    Array,
    Buffer,
    RawTensor,
    dtype_of,
    from_raw,
    to_raw,
    value_from_wire,
)
from edged.errors import EdgedError, Internal, InvalidArgument, error_from_wire

__all__ = [
    "ADMIN_SOCKET",
    "EVENTS_SOCKET",
    "HEADER_BYTES_MAX",
    "INFER_SOCKET",
    "InferResult",
    "Request",
    "answer",
    "infer_request",
    "needs_metadata",
    "question",
    "read_infer",
    "socket_paths",
    "timeout_seconds",
    "typed_inputs",
]

INFER_SOCKET, ADMIN_SOCKET, EVENTS_SOCKET = "edged.sock", "admin.sock", "events.sock"

HEADER_BYTES_MAX = 64 * 1024
"""The daemon's default limit; a longer header is refused here, where the caller can be told by name."""

_INLINE_BYTES_MAX = 16 * 1024
"""A tensor up to this size goes inline: each frame more costs 7–10 µs, packing 16 KiB about 1."""

_INLINE_TOTAL_BYTES_MAX = 56 * 1024
"""Inline bytes of all inputs together, so that names and shapes still fit into the header."""

_TIMEOUT_S_MAX = 1e6
"""Eleven days: poll(2) counts milliseconds in an int."""

_SOCKET_PATH_BYTES_MAX = 107
"""What sockaddr_un holds beside its terminating zero."""


class Request:
    """One request before it has an id: the header's map, and the frames that follow it."""

    __slots__ = ("frames", "header", "parameters")

    def __init__(self, header: dict[str, Any], frames: Sequence[Buffer] = ()) -> None:
        self.header = header
        self.parameters: dict[str, Any] | None = header.get("parameters")
        self.frames = frames


class InferResult(Mapping[str, Any]):
    """The outputs of one inference by name, in the model's order, and how they were made.

    Tensors are numpy arrays that belong to the caller; ONNX sequences and maps are lists and dicts.
    `device` (`CPU`, `CUDA:0`, `GPU.0`, `NPU`), `runtime`, `precision` and `fallback_reason` are what the
    daemon says it really used. `queue_us` and `compute_us` are its own measurements. `warnings` names
    parameters that the daemon did not know. `parameters` is the reply's whole map.
    """

    __slots__ = ("_outputs", "model_name", "model_version", "parameters")

    def __init__(
        self, outputs: dict[str, Any], model_name: str, model_version: str, parameters: Mapping[str, Any]
    ) -> None:
        self._outputs = outputs
        self.model_name = model_name
        self.model_version = model_version
        self.parameters = parameters

    def __getitem__(self, name: str) -> Any:
        return self._outputs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._outputs)

    def __len__(self) -> int:
        return len(self._outputs)

    def __repr__(self) -> str:
        return (
            f"<InferResult of {self.model_name} version {self.model_version} on {self.device} "
            f"({self.runtime}, {self.precision}): {', '.join(self._outputs)}>"
        )

    @property
    def device(self) -> str:
        """Where it ran: `CPU`, `CUDA:0`, `GPU.0`, `NPU`."""
        return str(self.parameters.get("device", ""))

    @property
    def runtime(self) -> str:
        """`onnxruntime` or `openvino`."""
        return str(self.parameters.get("runtime", ""))

    @property
    def precision(self) -> str:
        """`f32`, `f16` or `bf16`: what the runtime computed in."""
        return str(self.parameters.get("precision", ""))

    @property
    def batch_size(self) -> int:
        """How many requests ran together."""
        return int(self.parameters.get("batch_size", 1))

    @property
    def queue_us(self) -> int:
        """Time that the request waited in the daemon, µs."""
        return int(self.parameters.get("queue_us", 0))

    @property
    def compute_us(self) -> int:
        """Time that the model ran, µs."""
        return int(self.parameters.get("compute_us", 0))

    @property
    def fallback_reason(self) -> str | None:
        """Why this is not the device that was asked for; None when it is."""
        reason = self.parameters.get("fallback_reason")
        return None if reason is None else str(reason)

    @property
    def warnings(self) -> list[str]:
        """What the daemon did not understand and left aside."""
        return list(self.parameters.get("warnings", ()))


def needs_metadata(inputs: Mapping[str, Any]) -> bool:
    """Whether an input is a Python list or scalar, whose datatype only the model's metadata tells."""
    return any(_is_plain(value) for value in inputs.values())


def _is_plain(value: Any) -> bool:
    if isinstance(value, (np.ndarray, RawTensor, np.generic)):
        return False
    return isinstance(value, (list, tuple, bool, int, float, str, bytes))


def typed_inputs(inputs: Mapping[str, Any], metadata: Mapping[str, Any]) -> dict[str, Any]:
    """`inputs` with Python lists and scalars turned into arrays as the model's metadata declares them.

    A scalar for an input of rank n gets the shape [1] * n. Raises InvalidArgument for an element that does
    not fit the datatype. Names that the model does not have are left to the daemon's answer.
    """
    specs = {spec["name"]: spec for spec in metadata.get("inputs", ())}
    typed = dict(inputs)
    for name, value in inputs.items():
        spec = specs.get(name)
        if spec is not None and _is_plain(value):
            typed[name] = _typed(name, value, spec["datatype"], spec["shape"])
    return typed


def _typed(name: str, value: Any, datatype: str, shape: Sequence[int] | None) -> Any:
    try:
        dtype = dtype_of(datatype)
        if datatype == "BF16":
            array = np.asarray(value, np.float32).astype(dtype) if dtype.kind == "V" else _bf16_bits(value)
        elif dtype.kind in "iu":
            given = np.asarray(value)
            with np.errstate(invalid="ignore"):  # A NaN is found by the comparison.
                array = given.astype(dtype)
            if not np.array_equal(array, given):
                raise ValueError(f"an element does not fit {datatype}")
        else:
            array = np.asarray(value, dtype)
    except (ValueError, TypeError, OverflowError) as e:
        raise InvalidArgument(f"input '{name}': not a {datatype} tensor: {e}", reason="BAD_DATA") from None
    if array.ndim == 0 and shape:
        array = array.reshape([1] * len(shape))
    if datatype == "BF16" and array.dtype == np.uint16:
        return RawTensor("BF16", array.shape, array.tobytes())
    return array


def _bf16_bits(value: Any) -> Array:
    """BF16 patterns without ml_dtypes: the upper half of FP32, rounded to nearest even; NaN stays NaN."""
    array = np.asarray(value, np.float32)
    bits = np.ascontiguousarray(array).view(np.uint32).reshape(array.shape).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(array), (bits >> 16) | 0x40, rounded).astype("<u2")


def infer_request(
    model: str,
    inputs: Mapping[str, Any],
    *,
    version: str | int | None = None,
    outputs: Sequence[str] | None = None,
    priority: int = 0,
) -> Request:
    """The request for one inference. Raises InvalidArgument for an input that has no datatype."""
    tensors: list[dict[str, Any]] = []
    frames: list[Buffer] = []
    inline_bytes_left = _INLINE_TOTAL_BYTES_MAX
    for name, value in inputs.items():
        try:
            if isinstance(value, np.ndarray):
                datatype, shape, data = to_raw(value)
            elif isinstance(value, RawTensor):
                datatype, shape, data = value.datatype, list(value.shape), value.data
            else:
                datatype, shape, data = to_raw(np.asarray(value))
        except EdgedError as e:
            raise InvalidArgument(f"input '{name}': {e.message}", reason=e.reason) from None
        nbytes = len(data)
        if nbytes <= _INLINE_BYTES_MAX and nbytes <= inline_bytes_left:
            inline_bytes_left -= nbytes
            tensors.append({"name": name, "datatype": datatype, "shape": shape, "data": data})
        else:
            tensors.append({"name": name, "datatype": datatype, "shape": shape, "frame": len(frames)})
            frames.append(data)
    parameters: dict[str, Any] = {}
    header = {"method": "model_infer", "model_name": model, "inputs": tensors, "parameters": parameters}
    if version is not None:
        header["model_version"] = str(version)
    if outputs is not None:
        header["outputs"] = [{"name": name} for name in outputs]
    if priority:
        parameters["priority"] = priority
    return Request(header, frames)


def question(method: str, name: str | None, version: str | int | None, fields: Mapping[str, Any]) -> Request:
    """The request of a method without tensors."""
    header: dict[str, Any] = {"method": method, **fields}
    if name is not None:
        header["model_name"] = name
    if version is not None:
        header["model_version"] = str(version)
    return Request(header)


def answer(header: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a reply without tensors. Raises the typed error that it carries, if it carries one."""
    _check_error(header)
    return {key: value for key, value in header.items() if key != "id"}


def timeout_seconds(timeout: float) -> float:
    """A caller's `timeout`, checked. Raises InvalidArgument unless it is above 0."""
    if not timeout > 0:
        raise InvalidArgument(f"timeout: expected seconds above 0, got {timeout!r}", reason="BAD_TIMEOUT")
    return min(float(timeout), _TIMEOUT_S_MAX)


def _check_error(header: Mapping[str, Any]) -> None:
    error = header.get("error")
    if error is not None:
        raise error_from_wire(error if isinstance(error, Mapping) else {})


def read_infer(header: Mapping[str, Any], frames: Sequence[Any]) -> InferResult:
    """The outputs of a `model_infer` reply, `frames` being what followed its header.

    Raises the typed error that the reply carries, or Internal for a reply that breaks the protocol.
    """
    _check_error(header)

    def tensor(wire: Mapping[str, Any]) -> Array:
        index = wire.get("frame")
        if index is not None:
            return from_raw(wire["datatype"], wire["shape"], frames[index].buffer)
        # A copy, so that the array is the caller's to change, as ONNX Runtime's are.
        return from_raw(wire["datatype"], wire["shape"], bytearray(wire.get("data") or b""))

    outputs: dict[str, Any] = {}
    try:
        for wire in header["outputs"]:
            datatype = wire["datatype"]
            if datatype in VALUE_DATATYPES:
                outputs[wire["name"]] = value_from_wire(datatype, wire.get("data"), tensor)
            else:
                outputs[wire["name"]] = tensor(wire)
        return InferResult(
            outputs, header["model_name"], str(header["model_version"]), header.get("parameters") or {}
        )
    except (KeyError, TypeError, IndexError, InvalidArgument) as e:
        raise Internal(
            f"the daemon's reply breaks the protocol: {type(e).__name__}: {e}", reason="BAD_REPLY"
        ) from e


def socket_paths(endpoint: str | None, name: str, environ: Mapping[str, str]) -> list[str]:
    """Where the socket called `name` may lie, first choice first.

    An endpoint given or in `EDGED_ENDPOINT` is the only one; else the user's runtime directory, the
    private directory under the user's state directory, and the system's. Raises InvalidArgument for an
    endpoint that is not `ipc://DIR/FILE`, or too long for a socket's address.
    """
    endpoint = endpoint or environ.get("EDGED_ENDPOINT")
    if endpoint:
        if not endpoint.startswith("ipc:///"):
            raise InvalidArgument(
                f"endpoint {endpoint!r}: expected ipc:// and an absolute path, "
                "as in ipc:///run/edged/edged.sock",
                reason="BAD_ENDPOINT",
            )
        main = endpoint.removeprefix("ipc://")
        paths = [main if name == INFER_SOCKET else os.path.join(os.path.dirname(main), name)]
    else:
        state = environ.get("XDG_STATE_HOME") or os.path.join(environ.get("HOME", "/"), ".local", "state")
        runtime = environ.get("XDG_RUNTIME_DIR")
        directories = [os.path.join(runtime, "edged")] if runtime else []
        directories += [os.path.join(state, "edged", "run"), "/run/edged"]
        paths = [os.path.join(directory, name) for directory in directories]
        paths = [path for path in paths if len(os.fsencode(path)) <= _SOCKET_PATH_BYTES_MAX]
    if any(len(os.fsencode(path)) > _SOCKET_PATH_BYTES_MAX for path in paths):
        raise InvalidArgument(
            f"endpoint {endpoint!r}: a socket's path has at most {_SOCKET_PATH_BYTES_MAX} bytes",
            reason="BAD_ENDPOINT",
        )
    return paths
