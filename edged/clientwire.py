"""What a client puts into a request and takes out of a reply: pure, for both kinds of client.

Owns the client's half of the protocol's form: which tensor goes inline, by lease or as a frame, what a
reply's header means, where the daemon's sockets lie. It never touches a socket: `link` carries the
frames, `lease` has the shared memory, `client` decides when.
"""

from __future__ import annotations

import functools
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import msgpack
import numpy as np

from edged.arrays import (
    DTYPES,
    VALUE_DATATYPES,
    Array,
    Buffer,
    RawTensor,
    datatype_of,
    dtype_of,
    from_raw,
    to_raw,
    value_from_wire,
)
from edged.errors import EdgedError, Internal, InvalidArgument, Unavailable, error_from_wire
from edged.plain import plain_values

__all__ = [
    "ADMIN_SOCKET",
    "EVENTS_SOCKET",
    "HEADER_BYTES_MAX",
    "INFER_SOCKET",
    "InferPlan",
    "InferResult",
    "Memory",
    "Place",
    "Recipe",
    "RecipeRequest",
    "Request",
    "answer",
    "by_name",
    "infer_request",
    "knows_region",
    "metadata_fields",
    "needs_metadata",
    "question",
    "read_infer",
    "socket_paths",
    "suit_recipe",
    "timeout_seconds",
    "typed_inputs",
]

INFER_SOCKET, ADMIN_SOCKET, EVENTS_SOCKET = "edged.sock", "admin.sock", "events.sock"

ONLY_INPUT = ""
"""The name of a model's only input where none is given; the daemon finds the real one."""

HEADER_BYTES_MAX = 64 * 1024
"""The daemon's default limit; a longer header is refused here, where the caller can be told by name."""

_INLINE_BYTES_MAX = 16 * 1024
"""A tensor up to this size goes inline: each frame more costs 7–10 µs, packing 16 KiB about 1."""

_INLINE_TOTAL_BYTES_MAX = 56 * 1024
"""Inline bytes of all inputs together, so that names and shapes still fit into the header."""

_SHARED_BYTES_MIN = 256 * 1024
"""From this size on a copy into a lease beats a frame by enough to hold shared memory for it. On two cores,
lease to frame: 64 KiB 317 to 329 µs, 128 KiB 335 to 356, 256 KiB 346 to 409, 588 KiB 351 to 484, 6 MiB 1143
to 2518."""

_SHOWN_BYTES_MAX = 40
"""Of a string in a message: enough to recognise it."""

_PLAIN_DTYPES = frozenset(DTYPES.values())
"""Those whose bytes are on the wire as they are in memory."""

_ALIGNMENT = 64
"""A tensor in a buffer begins on a cache line, as runtimes want it."""

_TIMEOUT_S_MAX = 1e6
"""Eleven days: poll(2) counts milliseconds in an int."""

_SOCKET_PATH_BYTES_MAX = 107
"""What sockaddr_un holds beside its terminating zero."""


class Request:
    """One request before it has an id: the header's map, and the frames that follow it.

    `release`, where there is one, is called once when the request's memory is its own no more: with True
    when nobody reads it any longer, with False when the daemon may still do so.
    """

    __slots__ = ("frames", "header", "parameters", "release")

    def __init__(
        self,
        header: dict[str, Any],
        frames: Sequence[Buffer] = (),
        release: Callable[[bool], None] | None = None,
    ) -> None:
        self.header = header
        self.parameters: dict[str, Any] | None = header.get("parameters")
        self.frames = frames
        self.release = release

    def packed(self, request_id: int, timeout_us: int | None, packer: msgpack.Packer) -> bytes:
        """The header as it is sent."""
        self.header["id"] = request_id
        if timeout_us is not None and self.parameters is not None:
            self.parameters["timeout"] = timeout_us
        packed: bytes = packer.pack(self.header)
        return packed


class Recipe:
    """The form of requests for one model that differ in nothing but their bytes, packed once.

    An app asks for the same thing again and again: then all that is made anew is what changes. It is for
    inputs that `suit_recipe`.
    """

    __slots__ = ("_first", "_last", "_outputs", "_priority", "_tensors", "_version")

    def __init__(
        self,
        model: str,
        inputs: Mapping[str, Array],
        *,
        version: str | int | None,
        outputs: list[str] | None,
        priority: int,
    ) -> None:
        self._version = version
        self._outputs = outputs
        self._priority = priority
        pack = msgpack.packb
        head: dict[str, Any] = {"method": "model_infer", "model_name": model}
        if version is not None:
            head["model_version"] = str(version)
        if outputs is not None:
            head["outputs"] = [{"name": name} for name in outputs]
        parts = [bytes([0x80 | len(head) + 3])]  # a map of so many keys: those, parameters, id and inputs
        parts += [pack(each) for pair in head.items() for each in pair]
        chosen = {"priority": priority} if priority else {}
        parts += [pack("parameters"), bytes([0x80 | len(chosen) + 1])]
        parts += [pack(each) for pair in chosen.items() for each in pair]
        parts += [pack("timeout"), b"\xcf"]  # and the 8 bytes of an unsigned int
        self._first = b"".join(parts)
        before = pack("inputs") + msgpack.Packer().pack_array_header(len(inputs))
        self._tensors: list[tuple[str, np.dtype[Any], tuple[int, ...], bytes]] = []
        for name, array in inputs.items():
            tensor = {"name": name, "datatype": datatype_of(array.dtype), "shape": list(array.shape)}
            packed = bytes([0x80 | len(tensor) + 1]) + pack(tensor)[1:] + pack("data")
            before += packed + b"\xc5" + array.nbytes.to_bytes(2, "big")  # bin 16
            self._tensors.append((name, array.dtype, array.shape, before))
            before = b""
        self._last = before

    def request(
        self, inputs: Mapping[str, Any], version: str | int | None, outputs: list[str] | None, priority: int
    ) -> RecipeRequest | None:
        """The request for these, which are copied; None where they are of another form."""
        if version != self._version or outputs != self._outputs or priority != self._priority:
            return None
        if len(inputs) != len(self._tensors):
            return None
        parts = [self._first, b""]
        for (name, dtype, shape, before), (given, array) in zip(self._tensors, inputs.items(), strict=True):
            if given != name or type(array) is not np.ndarray or array.shape != shape or array.dtype != dtype:
                return None
            parts.append(before)
            parts.append(array.tobytes())
        parts.append(self._last)
        return RecipeRequest(parts)


class RecipeRequest(Request):
    """A request by a recipe: small arrays and nothing else. It has no header but the packed one."""

    __slots__ = ("_parts",)

    _CHANGING = struct.Struct(">Q4sQ")  # timeout, then the key `id` and the byte that begins its value

    def __init__(self, parts: list[bytes]) -> None:
        self.frames = ()
        self.release = None
        self._parts = parts

    def packed(self, request_id: int, timeout_us: int | None, packer: msgpack.Packer) -> bytes:
        """The header as it is sent."""
        self._parts[1] = self._CHANGING.pack(timeout_us or 0, b"\xa2id\xcf", request_id)
        return b"".join(self._parts)


def suit_recipe(inputs: Mapping[str, Any]) -> bool:
    """Whether a request can be made by a recipe: of small arrays whose bytes are the wire's."""
    nbytes = 0
    for array in inputs.values():
        if type(array) is not np.ndarray or array.dtype not in _PLAIN_DTYPES:
            return False
        if array.nbytes > _INLINE_BYTES_MAX:
            return False
        nbytes += array.nbytes
    return nbytes <= _INLINE_TOTAL_BYTES_MAX


class Memory(Protocol):
    """A lease's memory as the wire sees it; `lease.Region` is one."""

    @property
    def name(self) -> str:
        """The region's name on the wire."""

    def __buffer__(self, flags: int, /) -> memoryview:
        """Its bytes."""


class Place(NamedTuple):
    """Where an app's array lies in a lease of its own."""

    memory: Memory
    offset: int
    nbytes: int

    def to_wire(self) -> dict[str, Any]:
        """A tensor's parameters that name it."""
        return {
            "shared_memory_region": self.memory.name,
            "shared_memory_offset": self.offset,
            "shared_memory_byte_size": self.nbytes,
        }


_NO_NAMES: frozenset[str] = frozenset()


class InferResult(Mapping[str, Any]):
    """The outputs of one inference by name, in the model's order, and how they were made.

    Tensors are numpy arrays that belong to the caller, views of its lease where `out` said so, and of str
    where they hold strings; ONNX sequences and maps are lists and dicts. `to_dict` has all as plain values.
    `device` (`CPU`, `CUDA:0`, `GPU.0`, `NPU`), `runtime`, `precision` and `fallback_reason` are what the
    daemon says it really used. `queue_us` and `compute_us` are its own measurements. `warnings` names
    parameters that the daemon did not know. `parameters` is all that it said.
    """

    __slots__ = ("_bf16", "_outputs", "model_name", "model_version", "parameters")

    def __init__(
        self,
        outputs: dict[str, Any],
        model_name: str,
        model_version: str,
        parameters: Mapping[str, Any],
        bf16: frozenset[str] = _NO_NAMES,
    ) -> None:
        self._outputs = outputs
        self._bf16 = bf16
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

    def to_dict(self) -> dict[str, Any]:
        """The outputs by name as plain Python values, as `json.dumps` or a web handler takes them.

        Tensors are (nested) lists, BF16 and FP16 in them floats with each digit they have. NaN and the
        infinities are the strings "NaN", "Infinity" and "-Infinity", since JSON has no such numbers. Strings
        stay strings, and are base64 where bytes were asked for. Maps have strings as keys. An absent optional
        is None.
        """
        return {name: plain_values(value, bf16=name in self._bf16) for name, value in self._outputs.items()}

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


def by_name(inputs: Any) -> Mapping[str, Any]:
    """The inputs by name: a value alone is the only input's, which on the wire needs no name."""
    return inputs if isinstance(inputs, Mapping) else {ONLY_INPUT: inputs}


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
    not fit the datatype, and for a value without a name where the model has several inputs. Names that the
    model does not have are left to the daemon's answer.
    """
    listed = metadata.get("inputs", ())
    specs = {spec["name"]: spec for spec in listed}
    if ONLY_INPUT in inputs:
        needed = [spec for spec in listed if not spec.get("optional")] or listed
        if len(needed) != 1:
            raise InvalidArgument(
                f"the model has several inputs: give a dict with {', '.join(map(repr, specs)) or 'none'}",
                reason="INPUT_NOT_NAMED",
            )
        specs[ONLY_INPUT] = needed[0]
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
        raise InvalidArgument(f"{_what(name)}: not a {datatype} tensor: {e}", reason="BAD_DATA") from None
    if array.ndim == 0 and shape:
        array = array.reshape([1] * len(shape))
    if datatype == "BF16" and array.dtype == np.uint16:
        return RawTensor("BF16", array.shape, array.tobytes())
    return array


def _what(name: str) -> str:
    return f"input '{name}'" if name else "the input"


def _bf16_bits(value: Any) -> Array:
    """BF16 patterns without ml_dtypes: the upper half of FP32, rounded to nearest even; NaN stays NaN."""
    array = np.asarray(value, np.float32)
    bits = np.ascontiguousarray(array).view(np.uint32).reshape(array.shape).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(array), (bits >> 16) | 0x40, rounded).astype("<u2")


Locate = Callable[[Array], tuple[Memory, int] | None]
"""The region in which an array wholly lies, and its offset there."""


class InferPlan:
    """One inference, up to what only the connection tells: whether there is a lease for its large tensors.

    Small tensors are inline already, arrays in the app's own leases are named. What is left goes through a
    buffer of `shared_bytes`, if the client has one, or as frames. `memories` are the app's leases in use.
    Raises InvalidArgument for an input that has no datatype, or an `out` that the daemon could not write to.
    """

    __slots__ = ("_header", "_large", "memories", "places", "shared_bytes")

    def __init__(
        self,
        model: str,
        inputs: Mapping[str, Any],
        *,
        version: str | int | None = None,
        outputs: Sequence[str] | None = None,
        priority: int = 0,
        out: Mapping[str, Array] | None = None,
        locate: Locate | None = None,
    ) -> None:
        self.shared_bytes = 0
        self.memories: list[Memory] = []
        self.places: dict[str, Place] = {}
        self._large: list[tuple[dict[str, Any], Array | Buffer, int]] = []
        tensors: list[dict[str, Any]] = []
        inline_bytes_left = _INLINE_TOTAL_BYTES_MAX
        for name, value in inputs.items():
            try:
                datatype, shape, data = _wire_form(value)
            except EdgedError as e:
                raise InvalidArgument(f"{_what(name)}: {e.message}", reason=e.reason) from None
            tensor: dict[str, Any] = {"name": name, "datatype": datatype, "shape": shape}
            tensors.append(tensor)
            nbytes = data.nbytes if isinstance(data, np.ndarray) else len(data)
            if nbytes <= _INLINE_BYTES_MAX and nbytes <= inline_bytes_left:
                inline_bytes_left -= nbytes
                tensor["data"] = data
            elif locate is None or nbytes <= _INLINE_BYTES_MAX or not self._leased(tensor, data, locate):
                offset = -1
                if nbytes >= _SHARED_BYTES_MIN:
                    offset = self.shared_bytes
                    self.shared_bytes += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
                self._large.append((tensor, data, offset))
        parameters: dict[str, Any] = {}
        self._header: dict[str, Any] = {
            "method": "model_infer",
            "model_name": model,
            "inputs": tensors,
            "parameters": parameters,
        }
        if version is not None:
            self._header["model_version"] = str(version)
        if outputs is not None:
            self._header["outputs"] = [{"name": name} for name in outputs]
        if out is not None:
            self._place_outputs(out, locate)
        if priority:
            parameters["priority"] = priority

    def request(self, buffer: Memory | None = None, release: Callable[[bool], None] | None = None) -> Request:
        """What is sent: the tensors meant for the buffer copied into it, or all large ones as frames.

        Replaces what an earlier call for the same plan made. `release` is the request's; it keeps the app's
        leases too, since one that goes before the daemon has read the request is not found.
        """
        if self.memories:
            release = functools.partial(_release, tuple(self.memories), release)
        try:
            frames = self._fill(buffer)
        except BaseException:
            if release is not None:
                release(True)
            raise
        return Request(self._header, frames, release)

    @property
    def needs_frames(self) -> bool:
        """Whether a tensor goes as a frame even if there is a lease."""
        return any(offset < 0 for _, _, offset in self._large)

    def _fill(self, buffer: Memory | None) -> list[Buffer]:
        frames: list[Buffer] = []
        for tensor, data, offset in self._large:
            tensor.pop("frame", None)
            tensor.pop("parameters", None)
            if buffer is None or offset < 0:
                tensor["frame"] = len(frames)
                frames.append(to_raw(data)[2] if isinstance(data, np.ndarray) else data)
            else:
                source = data if isinstance(data, np.ndarray) else np.frombuffer(data, np.uint8)
                dtype = source.dtype.newbyteorder("<")
                np.copyto(np.ndarray(source.shape, dtype, memoryview(buffer), offset), source)
                tensor["parameters"] = Place(buffer, offset, source.nbytes).to_wire()
        return frames

    def _leased(self, tensor: dict[str, Any], data: Array | Buffer, locate: Locate) -> bool:
        if isinstance(data, np.ndarray):
            if not data.dtype.isnative:
                return False
        else:
            data = np.frombuffer(data, np.uint8)
        found = locate(data)
        if found is not None:
            memory, offset = found
            self.memories.append(memory)
            tensor["parameters"] = Place(memory, offset, data.nbytes).to_wire()
        return found is not None

    def _place_outputs(self, out: Mapping[str, Array], locate: Locate | None) -> None:
        wanted = self._header.setdefault("outputs", [{"name": name} for name in out])
        entries = {entry["name"]: entry for entry in wanted}
        for name, array in out.items():
            if name not in entries:
                raise InvalidArgument(
                    f"out: output '{name}' is not among those wanted, {list(entries)}",
                    reason="UNKNOWN_OUTPUT",
                )
            found = locate(array) if locate is not None and isinstance(array, np.ndarray) else None
            if found is None or not array.flags.writeable:
                raise InvalidArgument(
                    f"out: '{name}': expected a contiguous, writable array in a lease that this client took",
                    reason="NOT_IN_LEASE",
                )
            place = Place(*found, array.nbytes)
            self.memories.append(place.memory)
            self.places[name] = place
            entries[name]["parameters"] = place.to_wire()


def infer_request(
    model: str,
    inputs: Mapping[str, Any],
    *,
    version: str | int | None = None,
    outputs: Sequence[str] | None = None,
    priority: int = 0,
) -> Request:
    """The request for one inference without leases."""
    return InferPlan(model, inputs, version=version, outputs=outputs, priority=priority).request()


def _release(_memories: Sequence[Memory], release: Callable[[bool], None] | None, reusable: bool) -> None:
    if release is not None:
        release(reusable)


def _wire_form(value: Any) -> tuple[str, list[int], Array | Buffer]:
    """Datatype, shape and content of an input; a large array as it is, so that it is copied only once."""
    if isinstance(value, RawTensor):
        return value.datatype, list(value.shape), value.data
    array = value if isinstance(value, np.ndarray) else np.asarray(value)
    if array.nbytes > _INLINE_BYTES_MAX and array.dtype.kind in "biuf":
        return datatype_of(array.dtype), list(array.shape), array
    return to_raw(array)


def question(
    method: str,
    name: str | None,
    version: str | int | None,
    fields: Mapping[str, Any],
    inputs: Mapping[str, Any] | None = None,
) -> Request:
    """The request of a method other than an inference; `inputs` go along as one's would."""
    header: dict[str, Any] = {"method": method, **fields}
    frames: Sequence[Buffer] = ()
    if inputs:
        tensors = infer_request("", inputs)
        header["inputs"], frames = tensors.header["inputs"], tensors.frames
    if name is not None:
        header["model_name"] = name
    if version is not None:
        header["model_version"] = str(version)
    return Request(header, frames)


def metadata_fields(*, properties: bool) -> dict[str, Any]:
    """What a `model_metadata` request has beside the model's name."""
    return {} if properties else {"parameters": {"properties": False}}


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


def knows_region(header: Mapping[str, Any]) -> bool:
    """Whether a reply does not say that the daemon lacks a lease which the request named."""
    error = header.get("error")
    return not (isinstance(error, Mapping) and error.get("reason") == "REGION_NOT_FOUND")


def read_infer(
    header: Mapping[str, Any],
    frames: Sequence[Any],
    places: Mapping[str, Place] | None = None,
    *,
    decode_strings: bool = True,
) -> InferResult:
    """The outputs of a `model_infer` reply, `frames` being what followed its header.

    `places` are where outputs were to go: those are views of the app's lease. Strings are str, as ONNX
    Runtime gives them, or bytes by `decode_strings=False`. Raises the typed error that the reply carries,
    InvalidArgument for a string that is no text, or Internal for a reply that breaks the protocol.
    """
    if "error" in header:
        if not knows_region(header):
            raise Unavailable(
                "the daemon does not know a lease that the request named; take a new one with Client.lease, "
                "or send the arrays without",
                reason="LEASE_LOST",
            )
        _check_error(header)
    outputs: dict[str, Any] = {}
    bf16 = _NO_NAMES
    try:
        for wire in header["outputs"]:
            datatype = wire["datatype"]
            dtype = DTYPES.get(datatype)
            data = wire.get("data")
            if data and dtype is not None and "parameters" not in wire:
                # The usual case, as `_tensor` has it but in one step.
                array: Array = np.ndarray(wire["shape"], dtype, bytearray(data))
                if array.nbytes != len(data):
                    raise InvalidArgument(f"{len(data)} bytes for the shape {wire['shape']} of {datatype}")
                outputs[wire["name"]] = array
                continue
            name = wire["name"]
            text_of = name if decode_strings else None
            if datatype in VALUE_DATATYPES:
                seen: set[str] = set()
                tensor = functools.partial(_tensor, frames, text_of=text_of, seen=seen)
                outputs[name] = value_from_wire(datatype, data, tensor)
                if "BF16" in seen:
                    bf16 |= {name}
            elif wire.get("parameters") and "shared_memory_region" in wire["parameters"]:
                outputs[name] = _in_place(wire, (places or {})[name])
            else:
                outputs[name] = _tensor(frames, wire, text_of=text_of)
            if datatype == "BF16":
                bf16 |= {name}
        return InferResult(
            outputs,
            header["model_name"],
            str(header["model_version"]),
            header.get("parameters") or {},
            bf16,
        )
    except _NotText as e:
        raise InvalidArgument(str(e), reason="NOT_UTF8") from None
    except (KeyError, TypeError, ValueError, IndexError, InvalidArgument) as e:
        raise Internal(
            f"the daemon's reply breaks the protocol: {type(e).__name__}: {e}", reason="BAD_REPLY"
        ) from e


class _NotText(Exception):
    """A string that was asked for as str is not UTF-8."""


def _tensor(
    frames: Sequence[Any], wire: Mapping[str, Any], *, text_of: str | None, seen: set[str] | None = None
) -> Array:
    """The array; BYTES as str for the output called `text_of`. `seen` gathers the datatypes of a value's."""
    index = wire.get("frame")
    # Inline data is copied, so that the array is the caller's to change, as ONNX Runtime's are.
    buffer = bytearray(wire.get("data") or b"") if index is None else frames[index].buffer
    datatype = wire["datatype"]
    if seen is not None:
        seen.add(datatype)
    array = from_raw(datatype, wire["shape"], buffer)
    return _as_text(text_of, array) if datatype == "BYTES" and text_of is not None else array


def _as_text(name: str, array: Array) -> Array:
    texts = np.empty(array.shape, dtype=object)
    flat = texts.reshape(-1)
    for at, item in enumerate(array.reshape(-1).tolist()):
        try:
            flat[at] = item.decode()
        except UnicodeDecodeError:
            raise _NotText(
                f"output '{name}': element {at}, {item[:_SHOWN_BYTES_MAX]!r}, is not UTF-8; "
                "decode_strings=False gives strings as bytes"
            ) from None
    return texts


def _in_place(wire: Mapping[str, Any], place: Place) -> Array:
    """An output that the daemon has put into the app's lease."""
    where = wire["parameters"]
    nbytes = where["shared_memory_byte_size"]
    asked = (place.memory.name, place.offset)
    if (where["shared_memory_region"], where.get("shared_memory_offset", 0)) != asked:
        raise InvalidArgument("an output lies where it was not asked to")
    if not isinstance(nbytes, int) or not 0 <= nbytes <= place.nbytes:
        raise InvalidArgument(f"an output has {nbytes!r} bytes in a place of {place.nbytes}")
    return from_raw(wire["datatype"], wire["shape"], memoryview(place.memory)[place.offset :][:nbytes])


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
