"""Frames ⇄ messages: the whole of the wire format, and all of its limits.

Pure: no socket, no clock, no model. `decode_request` takes what a transport received and gives a typed
`Request` or raises `WireError`, which carries the error to answer and the id to answer it to; nothing
else may come out of it, whatever bytes come in. The bounds are checked before the work that they bound:
the header's size before it is decoded, the number of frames before they are looked at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from edged.errors import EdgedError, InvalidArgument, ResourceExhausted, Unimplemented
from edged.messages import (
    METHODS,
    InputTensor,
    LaneRequest,
    RegionPart,
    RegionReference,
    Request,
    RequestId,
    TensorData,
)
from edged.tensors import (
    DATATYPES,
    ITEM_BYTES,
    check_bytes_elements,
    element_count,
    pack_list,
    shape_text,
    tensor_nbytes,
)

__all__ = [
    "INLINE_BYTES_MAX",
    "LANE_PACKET_BYTES_MAX",
    "LEASE_METHODS",
    "PROTOCOL_VERSIONS",
    "Output",
    "WireError",
    "WireLimits",
    "check_lane_reply",
    "decode_lane_request",
    "decode_request",
    "encode",
    "encode_infer_reply",
    "input_data",
    "landed_reply",
    "leased_input",
    "region_reference",
    "timing_parameters",
    "unknown_parameters",
    "wants_properties",
]

PROTOCOL_VERSIONS = (1,)

INLINE_BYTES_MAX = 16 * 1024
"""An output up to this size goes inline: each further frame costs 7–10 µs, copying 16 KiB about 1."""

_INLINE_TOTAL_MAX = 48 * 1024
"""All inline outputs of one reply together, so that a reply's header stays below the request's limit."""

_WALKED_ELEMENTS_MAX = 4096
"""BYTES elements that are walked here, in about 1 ms; a worker walks what has more, and refuses it alike."""

_PARAMETERS = frozenset({"timeout", "deadline_ns", "priority"})
_PROPERTIES = "properties"
_REGION, _OFFSET, _BYTE_SIZE = "shared_memory_region", "shared_memory_offset", "shared_memory_byte_size"
_REGION_KEYS = frozenset({_REGION, _OFFSET, _BYTE_SIZE})
_HEADER_KEYS = frozenset(Request.__struct_fields__)
_LANE_KEYS = frozenset(LaneRequest.__struct_fields__)
_Header = TypeVar("_Header", bound=Request)

LANE_PACKET_BYTES_MAX = 65_536
"""The largest packet on the lease socket, either way: a third of what the kernel lets through."""

LEASE_METHODS = frozenset(name for name, home in METHODS.items() if home == "lease")
"""What only the lease socket takes; beside them it takes all that `edged.sock` does."""

_SOCKET_FILES = {"infer": "edged.sock", "admin": "admin.sock", "lease": "lease.sock"}
_TEXT_MAX = 128
"""How much of a client's own text an error repeats."""


_WARNINGS_MAX = 16
"""In a reply: they are for people, and a client may make thousands."""


@dataclass(frozen=True)
class WireLimits:
    """The wire's bounds; each is a setting, and `server_metadata` tells them to clients."""

    header_bytes: int = 65_536
    """A header is small; msgpack can blow up seventyfold when decoded, so it is bounded before that."""
    message_bytes: int = 256 * 1024 * 1024
    """The largest message, all frames together: what one request, or its reply, may pin in memory."""
    frames: int = 64
    """Tensor frames in a message."""
    tensors: int = 256
    """Inputs, and requested outputs, of a request."""
    rank: int = 16
    """Dimensions of a tensor; ONNX models in the wild stay below 8."""


class WireError(Exception):
    """A message that cannot be served: the error to answer, and the id to answer it to."""

    def __init__(self, error: EdgedError, request_id: RequestId) -> None:
        super().__init__(str(error))
        self.error = error
        self.request_id = request_id


class _Id(msgspec.Struct):
    id: RequestId = None


_decoder = msgspec.msgpack.Decoder(Request)
_lane_decoder = msgspec.msgpack.Decoder(LaneRequest)
_id_decoder = msgspec.msgpack.Decoder(_Id)
_raw_decoder = msgspec.msgpack.Decoder(msgspec.Raw)
_encoder = msgspec.msgpack.Encoder()

ID_INT_MAX = 2**53 - 1
_ID_TEXT_MAX = 256


def cut(text: str) -> str:
    """A client's own text, short enough to repeat, with nothing in it that breaks a line."""
    text = text if len(text) <= _TEXT_MAX else text[:_TEXT_MAX] + "…"
    return text.encode("unicode_escape").decode("ascii") if not text.isprintable() else text


def _salvage_id(header: bytes | memoryview) -> RequestId:
    """The id of a header that is wrong elsewhere, or None."""
    try:
        found = _id_decoder.decode(header).id
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return None
    return found if _id_ok(found) else None


def _id_ok(value: RequestId) -> bool:
    if isinstance(value, int):
        return 0 <= value <= ID_INT_MAX
    return value is None or len(value) <= _ID_TEXT_MAX


def decode_request(
    header: bytes | memoryview, frame_bytes: Sequence[int], socket: str, limits: WireLimits
) -> Request:
    """The request in `header`, with every check that needs no model.

    `frame_bytes` are the sizes of the tensor frames behind the header; `socket` is `infer` or `admin`.
    Raises WireError, and nothing else.
    """
    request = _decode(_decoder, header, limits)
    try:
        _check_request(request, frame_bytes, socket, limits)
    except EdgedError as e:
        raise WireError(e, request.id) from None
    return request


def _decode(
    decoder: msgspec.msgpack.Decoder[_Header], header: bytes | memoryview, limits: WireLimits
) -> _Header:
    if len(header) > limits.header_bytes:
        error: EdgedError = ResourceExhausted(
            f"the header has {len(header)} bytes, the limit is {limits.header_bytes}; "
            "send large tensors as frames of their own",
            reason="HEADER_TOO_LARGE",
        )
        raise WireError(error, None)
    try:
        request = decoder.decode(header)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as e:
        text = str(e) if isinstance(e, msgspec.MsgspecError) else "nested too deeply or not UTF-8"
        error = InvalidArgument(
            f"the header is not a request: {cut(text)}; send one msgpack map as docs/protocol.md says",
            reason="BAD_HEADER",
        )
        raise WireError(error, _salvage_id(header)) from None
    if not _id_ok(request.id):
        raise WireError(
            InvalidArgument(
                "id must be a string of at most 256 characters or an int below 2^53", reason="BAD_ID"
            ),
            None,
        )
    return request


def _check_version(request: Request) -> None:
    if request.v not in PROTOCOL_VERSIONS:
        raise Unimplemented(
            f"protocol version {request.v} is not spoken here; this daemon speaks {list(PROTOCOL_VERSIONS)}",
            reason="PROTOCOL_VERSION",
        )


def _check_request(request: Request, frame_bytes: Sequence[int], socket: str, limits: WireLimits) -> None:
    _check_version(request)
    home = METHODS.get(request.method)
    if home is None:
        raise Unimplemented(
            f"unknown method '{cut(request.method)}'; there are {', '.join(METHODS)}", reason="UNKNOWN_METHOD"
        )
    if home not in ("both", socket):
        raise Unimplemented(
            f"method '{request.method}' belongs to {_SOCKET_FILES[home]}",
            reason="WRONG_SOCKET",
        )
    if request.must_understand:
        _check_must_understand(request)
    if len(request.inputs) > limits.tensors or (request.outputs and len(request.outputs) > limits.tensors):
        raise ResourceExhausted(f"more than {limits.tensors} tensors in a request", reason="TOO_MANY_TENSORS")
    if len(frame_bytes) > limits.frames:
        raise ResourceExhausted(
            f"{len(frame_bytes)} tensor frames, the limit is {limits.frames}", reason="TOO_MANY_FRAMES"
        )
    if frame_bytes and sum(frame_bytes) > limits.message_bytes:
        raise ResourceExhausted(
            f"{sum(frame_bytes)} bytes in one message, the limit is {limits.message_bytes}",
            reason="MESSAGE_TOO_LARGE",
        )
    _check_tensors(request.inputs, frame_bytes, limits)


def _check_must_understand(request: Request) -> None:
    for key in request.must_understand:
        if key not in _HEADER_KEYS | _PARAMETERS | _REGION_KEYS and key != _PROPERTIES:
            raise _not_understood(key)


def _not_understood(key: str) -> Unimplemented:
    return Unimplemented(
        f"the request must not be served without '{cut(key)}', which this daemon does not know",
        reason="MUST_UNDERSTAND",
    )


def _check_tensors(inputs: list[InputTensor], frame_bytes: Sequence[int], limits: WireLimits) -> None:
    used = 0
    names = set()
    for tensor in inputs:
        if tensor.name in names:
            raise InvalidArgument(f"input '{cut(tensor.name)}' is there twice", reason="DUPLICATE_INPUT")
        names.add(tensor.name)
        if tensor.datatype not in DATATYPES:
            raise InvalidArgument(
                f"input '{cut(tensor.name)}': unknown datatype '{cut(tensor.datatype)}'; "
                f"there are {', '.join(DATATYPES)}",
                reason="BAD_DATATYPE",
            )
        if len(tensor.shape) > limits.rank:
            raise InvalidArgument(
                f"input '{cut(tensor.name)}': {len(tensor.shape)} dimensions, the limit is {limits.rank}",
                reason="BAD_SHAPE",
            )
        if tensor.parameters and not _REGION_KEYS.isdisjoint(tensor.parameters):
            if tensor.data is not None or tensor.frame is not None:
                raise InvalidArgument(
                    f"input '{cut(tensor.name)}' has a region and data or a frame; send one of them",
                    reason="BAD_DATA",
                )
            continue
        if tensor.frame is None:
            continue
        if tensor.data is not None:
            raise InvalidArgument(
                f"input '{cut(tensor.name)}' has both data and a frame; send one of them", reason="BAD_DATA"
            )
        if not 0 <= tensor.frame < len(frame_bytes):
            raise InvalidArgument(
                f"input '{cut(tensor.name)}' is in frame {tensor.frame}, but the message has "
                f"{len(frame_bytes)} tensor frames",
                reason="MISSING_FRAME",
            )
        bit = 1 << tensor.frame
        if used & bit:
            raise InvalidArgument(f"frame {tensor.frame} is used by two inputs", reason="DUPLICATE_FRAME")
        used |= bit
    if used != (1 << len(frame_bytes)) - 1:
        spare = [i for i in range(len(frame_bytes)) if not used >> i & 1]
        raise InvalidArgument(
            f"no input names tensor frame {spare[0]}; send only frames that inputs use", reason="EXTRA_FRAME"
        )


def input_data(tensor: InputTensor, frames: Sequence[memoryview]) -> TensorData:
    """The tensor's raw bytes, of exactly the length that its datatype and shape ask for.

    A BYTES tensor of many elements is left to the worker, since walking 64 MiB of them takes seconds.
    Raises InvalidArgument. `decode_request` has checked the frame's index before.
    """
    name, datatype, shape = tensor.name, tensor.datatype, tensor.shape
    raw: bytes | memoryview
    if tensor.frame is not None:
        raw = frames[tensor.frame]
    elif isinstance(tensor.data, bytes):
        raw = tensor.data
    elif tensor.data is not None:
        return TensorData(name, datatype, shape, pack_list(cut(name), datatype, tensor.data, shape))
    else:
        raw = b""
    if datatype in ITEM_BYTES:
        want = tensor_nbytes(cut(name), datatype, shape)
        if len(raw) != want:
            raise InvalidArgument(
                f"input '{cut(name)}': expected {want} bytes for {datatype} {shape_text(shape)}, "
                f"got {len(raw)}; send the whole tensor{' as one frame' if tensor.frame is not None else ''}",
                reason="BAD_SIZE",
            )
        if datatype == "BOOL" and bytes(raw).translate(None, b"\x00\x01"):
            raise InvalidArgument(f"input '{cut(name)}': a BOOL byte is 0 or 1", reason="BAD_DATA")
    else:
        count = element_count(cut(name), shape)
        if count <= _WALKED_ELEMENTS_MAX:
            check_bytes_elements(cut(name), raw, count)
    return TensorData(name, datatype, shape, raw)


def region_reference(parameters: Mapping[str, Any] | None, what: str) -> RegionReference | None:
    """The piece of leased memory that a tensor's parameters name; None when they name none.

    Raises InvalidArgument, in which `what` tells whose parameters they are.
    """
    if not parameters or _REGION_KEYS.isdisjoint(parameters):
        return None
    name = parameters.get(_REGION)
    if not isinstance(name, str):
        raise InvalidArgument(f"{what}: {_REGION} must be the name of a region", reason="BAD_REGION")
    offset: Any = parameters.get(_OFFSET, 0)
    nbytes: Any = parameters.get(_BYTE_SIZE)
    for key, value in ((_OFFSET, offset), (_BYTE_SIZE, nbytes)):
        if type(value) is not int or not 0 <= value < 2**63:
            raise InvalidArgument(f"{what}: {key} must be an int from 0", reason="BAD_REGION")
    return RegionReference(name, offset, nbytes)


def leased_input(tensor: InputTensor, part: RegionPart) -> TensorData:
    """An input that lies in leased memory; its size is checked, its bytes are the worker's to look at.

    Raises InvalidArgument.
    """
    name, datatype, shape = tensor.name, tensor.datatype, tensor.shape
    if datatype in ITEM_BYTES:
        want = tensor_nbytes(cut(name), datatype, shape)
        if part.nbytes != want:
            raise InvalidArgument(
                f"input '{cut(name)}': expected {want} bytes for {datatype} {shape_text(shape)}, "
                f"{_BYTE_SIZE} says {part.nbytes}",
                reason="BAD_SIZE",
            )
    else:
        element_count(cut(name), shape)
    return TensorData(name, datatype, shape, b"", part)


def decode_lane_request(packet: bytes | memoryview, limits: WireLimits) -> LaneRequest:
    """The request in a packet of the lease socket: one for memory, or any that `edged.sock` takes.

    Raises WireError, and nothing else.
    """
    if len(packet) > LANE_PACKET_BYTES_MAX:
        error = ResourceExhausted(
            f"a packet has at most {LANE_PACKET_BYTES_MAX} bytes; large tensors belong into a region",
            reason="HEADER_TOO_LARGE",
        )
        raise WireError(error, None)
    request = _decode(_lane_decoder, packet, limits)
    try:
        if request.method in LEASE_METHODS:
            _check_lease_request(request)
        else:
            if request.method == "model_infer":
                _check_no_frames(request)
            _check_request(request, (), "infer", limits)
    except EdgedError as e:
        raise WireError(e, request.id) from None
    return request


def _check_no_frames(request: Request) -> None:
    for tensor in request.inputs:
        if tensor.frame is not None:
            raise InvalidArgument(
                f"input '{cut(tensor.name)}' names a frame, and packets of lease.sock have none; put it into "
                "a region or, if it is small, into data, or ask over edged.sock",
                reason="MISSING_FRAME",
            )


def _check_lease_request(request: LaneRequest) -> None:
    _check_version(request)
    for key in request.must_understand:
        if key not in _LANE_KEYS:
            raise _not_understood(key)
    if request.method == "lease_acquire" and request.byte_size is None:
        raise InvalidArgument("lease_acquire needs byte_size", reason="BAD_HEADER")
    if request.method == "lease_release" and request.region is None:
        raise InvalidArgument("lease_release needs region", reason="BAD_HEADER")


def timing_parameters(request: Request) -> tuple[float | None, float | None, int]:
    """`(timeout_s, deadline_s, priority)` of a request; `deadline_s` is on CLOCK_MONOTONIC.

    Raises InvalidArgument. A timeout of 0 is none; priority 0 is the default, 5.
    """
    parameters = request.parameters
    if not parameters:
        return None, None, 5
    timeout_us = parameters.get("timeout", 0)
    deadline_ns = parameters.get("deadline_ns", 0)
    priority = parameters.get("priority", 0)
    for key, value in (("timeout", timeout_us), ("deadline_ns", deadline_ns)):
        if type(value) is not int or not 0 <= value < 2**63:
            raise InvalidArgument(f"parameter '{key}' must be an int from 0", reason="BAD_PARAMETER")
    if type(priority) is not int or not 0 <= priority <= 9:
        raise InvalidArgument("parameter 'priority' must be an int from 0 to 9", reason="BAD_PARAMETER")
    return timeout_us / 1e6 or None, deadline_ns / 1e9 or None, priority or 5


def wants_properties(request: Request) -> bool:
    """Whether `model_metadata` is to tell what the model says of itself. Raises InvalidArgument."""
    wanted = (request.parameters or {}).get(_PROPERTIES, True)
    if type(wanted) is not bool:
        raise InvalidArgument(f"parameter '{_PROPERTIES}' must be true or false", reason="BAD_PARAMETER")
    return wanted


def unknown_parameters(request: Request) -> list[str]:
    """What was ignored, for the reply's warnings."""
    found: list[str] = []
    if request.parameters:
        found.extend(f"parameter '{cut(k)}' was ignored" for k in request.parameters if k not in _PARAMETERS)
    for tensor in request.inputs:
        if tensor.parameters:
            found.extend(
                f"parameter '{cut(k)}' of input '{cut(tensor.name)}' was ignored"
                for k in tensor.parameters
                if k not in _REGION_KEYS
            )
    for ref in request.outputs or ():
        if ref.parameters:
            found.extend(
                f"parameter '{cut(k)}' of output '{cut(ref.name)}' was ignored"
                for k in ref.parameters
                if k not in _REGION_KEYS
            )
    if len(found) > _WARNINGS_MAX:
        found[_WARNINGS_MAX - 1 :] = [f"{len(found) - _WARNINGS_MAX + 1} more were ignored"]
    return found


def encode(reply: dict[str, Any]) -> bytes:
    """A reply's header."""
    return _encoder.encode(reply)


def landed_reply(request_id: RequestId, part: RegionPart, nbytes: int) -> dict[str, Any]:
    """The header that tells of a reply in leased memory. Raises InvalidArgument if it has no room there."""
    if nbytes > part.nbytes:
        raise InvalidArgument(
            f"the reply has {nbytes} bytes, the place for it {part.nbytes}; name a larger piece of a region",
            reason="OUTPUT_DOES_NOT_FIT",
        )
    return {"id": request_id, "parameters": {_REGION: part.name, _OFFSET: part.offset, _BYTE_SIZE: nbytes}}


Output = tuple[str, str, Sequence[int] | None, Any]
"""`(name, datatype, shape, raw bytes)`; for SEQUENCE, MAP and OPTIONAL `(name, datatype, None, msgpack)`."""


def check_lane_reply(frames: Sequence[bytes | memoryview]) -> None:
    """Raises ResourceExhausted for a reply that is not one packet of the lease socket."""
    nbytes = sum([len(frame) for frame in frames])
    if len(frames) > 1 or nbytes > LANE_PACKET_BYTES_MAX:
        raise ResourceExhausted(
            f"the reply has {nbytes} bytes, a packet of lease.sock at most {LANE_PACKET_BYTES_MAX}; name "
            "regions for large outputs, one in `parameters` where there are none, or ask over edged.sock",
            reason="REPLY_TOO_LARGE",
        )


def encode_infer_reply(
    request_id: RequestId,
    name: str,
    version: str,
    outputs: Sequence[Output],
    parameters: dict[str, Any],
    landed: Mapping[str, RegionPart] | None = None,
    *,
    in_one: bool = False,
) -> list[bytes | memoryview]:
    """The frames of an inference's reply: small outputs inline, large ones in frames behind the header.

    `landed` are the outputs that the worker has put into leased memory, and where. With `in_one` all that a
    packet of the lease socket could hold is inline.
    """
    each_max, total_max = (LANE_PACKET_BYTES_MAX,) * 2 if in_one else (INLINE_BYTES_MAX, _INLINE_TOTAL_MAX)
    listed: list[dict[str, Any]] = []
    frames: list[bytes | memoryview] = [b""]
    inline = 0
    for out_name, datatype, shape, content in outputs:
        if shape is None:
            # It is looked through, and not taken apart: 300,000 maps would be seconds.
            listed.append({"name": out_name, "datatype": datatype, "data": _raw_decoder.decode(content)})
            continue
        if landed is not None and out_name in landed:
            part = landed[out_name]
            where = {_REGION: part.name, _OFFSET: part.offset, _BYTE_SIZE: part.nbytes}
            listed.append({"name": out_name, "datatype": datatype, "shape": shape, "parameters": where})
            continue
        size = len(content)
        if size <= each_max and inline + size <= total_max:
            inline += size
            listed.append({"name": out_name, "datatype": datatype, "shape": shape, "data": content})
        else:
            listed.append({"name": out_name, "datatype": datatype, "shape": shape, "frame": len(frames) - 1})
            frames.append(content)
    frames[0] = _encoder.encode(
        {
            "id": request_id,
            "model_name": name,
            "model_version": version,
            "outputs": listed,
            "parameters": parameters,
        }
    )
    return frames
