"""The wire: what a client may send, every refusal, and that nothing else ever comes out of it."""

from __future__ import annotations

import struct
import time
from typing import Any

import msgpack
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edged.errors import EdgedError, InvalidArgument, ResourceExhausted
from edged.messages import METHODS, InputTensor, OutputRef, RegionPart, RegionReference, Request
from edged.tensors import DATATYPES
from edged.wire import (
    ID_INT_MAX,
    INLINE_BYTES_MAX,
    LANE_PACKET_BYTES_MAX,
    WireError,
    WireLimits,
    check_lane_reply,
    cut,
    decode_lane_request,
    decode_request,
    encode,
    encode_infer_reply,
    input_data,
    leased_input,
    region_reference,
    timing_parameters,
    unknown_parameters,
)

LIMITS = WireLimits()
TENSOR = {"name": "x", "datatype": "FP32", "shape": [1, 2], "data": b"\0" * 8}
INFER = {"method": "model_infer", "id": 7, "model_name": "m", "inputs": [TENSOR]}


def decode(header: Any, frames: tuple[int, ...] = (), socket: str = "infer", /, **limits: int) -> Request:
    """What the daemon does with a message that the client's library packed."""
    raw = header if isinstance(header, bytes) else msgpack.packb(header)
    return decode_request(raw, list(frames), socket, WireLimits(**limits))


def refused(header: Any, frames: tuple[int, ...] = (), socket: str = "infer", /, **limits: int) -> WireError:
    """The refusal of a message."""
    with pytest.raises(WireError) as caught:
        decode(header, frames, socket, **limits)
    return caught.value


def infer(*tensors: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """An inference's header."""
    return {**INFER, "inputs": list(tensors), **fields}


def frame(name: str, index: Any, **fields: Any) -> dict[str, Any]:
    """A tensor that lies in a frame."""
    return {"name": name, "datatype": "FP32", "shape": [2], "frame": index, **fields}


def test_a_request_survives_the_wire() -> None:
    """Every field, as the client's library packs it."""
    header = {
        "v": 1,
        "method": "model_infer",
        "id": "r-1",
        "model_name": "m",
        "model_version": "3",
        "inputs": [TENSOR, frame("y", 0, parameters={"binary_data_size": 8})],
        "outputs": [{"name": "z"}],
        "parameters": {"timeout": 5, "priority": 2},
        "must_understand": ["timeout", "outputs"],
        "unknown": {"to": ["us"]},
    }
    request = decode(header, (8,))
    assert (request.id, request.model_name, request.model_version) == ("r-1", "m", "3")
    assert request.inputs[0].data == b"\0" * 8
    assert request.inputs[1].frame == 0
    assert request.outputs is not None
    assert request.outputs[0].name == "z"
    assert decode(msgspec.msgpack.encode(request), (8,)) == request
    assert decode_request(memoryview(msgpack.packb(header)), [8], "infer", LIMITS) == request


def test_truncation_at_every_byte_is_refused() -> None:
    """Each shorter message is a typed refusal that keeps to its bounds."""
    raw = msgpack.packb(infer(TENSOR, frame("y", 0), parameters={"timeout": 1}))
    for length in range(len(raw)):
        error = refused(raw[:length], (8,)).error
        assert (error.code.value, error.reason) == ("INVALID_ARGUMENT", "BAD_HEADER")
    assert refused(raw + b"\0", (8,)).error.reason == "BAD_HEADER"


@pytest.mark.parametrize(
    ("header", "where"),
    [
        ([], "object"),
        (None, "object"),
        (b"", "truncated"),
        ({}, "method"),
        ({"method": 1}, "$.method"),
        ({"method": None}, "$.method"),
        (infer({**TENSOR, "shape": [1.5]}), "$.inputs[0].shape"),
        (infer({**TENSOR, "shape": [float("nan")]}), "$.inputs[0].shape"),
        (infer({**TENSOR, "shape": [True]}), "$.inputs[0].shape"),
        (infer({**TENSOR, "shape": ["1"]}), "$.inputs[0].shape"),
        (infer({**TENSOR, "shape": None}), "$.inputs[0].shape"),
        (infer({**TENSOR, "shape": 4}), "$.inputs[0].shape"),
        (infer({**TENSOR, "data": "text"}), "$.inputs[0].data"),
        (infer({**TENSOR, "data": {}}), "$.inputs[0].data"),
        (infer({**TENSOR, "frame": 0.0}), "$.inputs[0].frame"),
        (infer({**TENSOR, "frame": "0"}), "$.inputs[0].frame"),
        (infer({"datatype": "FP32", "shape": []}), "name"),
        ({**INFER, "inputs": {}}, "$.inputs"),
        ({**INFER, "inputs": None}, "$.inputs"),
        ({**INFER, "outputs": ["y"]}, "$.outputs[0]"),
        ({**INFER, "parameters": []}, "$.parameters"),
        ({**INFER, "parameters": {1: 2}}, "$.parameters"),
        ({**INFER, "model_version": 3}, "$.model_version"),
        ({**INFER, "v": "1"}, "$.v"),
        ({**INFER, "must_understand": "x"}, "$.must_understand"),
    ],
)
def test_a_field_of_the_wrong_type_is_refused_where_it_stands(header: Any, where: str) -> None:
    """The message says where; the request's id is found all the same."""
    error = refused(header)
    assert (error.error.code.value, error.error.reason) == ("INVALID_ARGUMENT", "BAD_HEADER")
    assert where in error.error.message
    assert error.request_id == (7 if isinstance(header, dict) and "id" in header else None)


@pytest.mark.parametrize("opener", [b"\x91", b"\x81\xa1k", b"\x81\x90"])
def test_deep_nesting_is_refused(opener: bytes) -> None:
    """Sixty thousand levels fit the header's bound, and must not reach Python's stack."""
    inside = opener * (60_000 // len(opener))
    assert refused(inside).error.reason == "BAD_HEADER"
    assert refused(b"\x81\xaaparameters\x81\xa1x" + inside).error.reason == "BAD_HEADER"
    assert refused(b"\x82\xa2id\x07\xa1x" + inside).request_id in (None, 7)


@pytest.mark.parametrize("count", [b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff"])
def test_a_length_that_the_bytes_do_not_have_is_refused(count: bytes) -> None:
    """Four billion elements in a few bytes: nothing is laid out for them."""
    for key in (b"\xa6inputs", b"\xaaparameters", b"\xa7unknown"):
        assert refused(b"\x81" + key + count).error.reason == "BAD_HEADER"


@pytest.mark.parametrize(
    ("header", "frames", "socket", "limits", "code", "reason"),
    [
        ({**INFER, "pad": "x" * 70_000}, (), "infer", {}, "RESOURCE_EXHAUSTED", "HEADER_TOO_LARGE"),
        ({**INFER, "v": 2}, (), "infer", {}, "UNIMPLEMENTED", "PROTOCOL_VERSION"),
        ({**INFER, "v": 0}, (), "infer", {}, "UNIMPLEMENTED", "PROTOCOL_VERSION"),
        ({"method": "fly"}, (), "infer", {}, "UNIMPLEMENTED", "UNKNOWN_METHOD"),
        ({"method": ""}, (), "infer", {}, "UNIMPLEMENTED", "UNKNOWN_METHOD"),
        (INFER, (), "admin", {}, "UNIMPLEMENTED", "WRONG_SOCKET"),
        ({"method": "server_status"}, (), "infer", {}, "UNIMPLEMENTED", "WRONG_SOCKET"),
        ({**INFER, "must_understand": ["sequence_id"]}, (), "infer", {}, "UNIMPLEMENTED", "MUST_UNDERSTAND"),
        (
            infer(TENSOR, {**TENSOR, "name": "y"}),
            (),
            "infer",
            {"tensors": 1},
            "RESOURCE_EXHAUSTED",
            "TOO_MANY_TENSORS",
        ),
        (
            {**INFER, "outputs": [{"name": "a"}, {"name": "b"}]},
            (),
            "infer",
            {"tensors": 1},
            "RESOURCE_EXHAUSTED",
            "TOO_MANY_TENSORS",
        ),
        (infer(frame("x", 0)), (8, 8), "infer", {"frames": 1}, "RESOURCE_EXHAUSTED", "TOO_MANY_FRAMES"),
        (
            infer(frame("x", 0)),
            (9,),
            "infer",
            {"message_bytes": 8},
            "RESOURCE_EXHAUSTED",
            "MESSAGE_TOO_LARGE",
        ),
        (infer(TENSOR, TENSOR), (), "infer", {}, "INVALID_ARGUMENT", "DUPLICATE_INPUT"),
        (infer({**TENSOR, "datatype": "FP8"}), (), "infer", {}, "INVALID_ARGUMENT", "BAD_DATATYPE"),
        (infer({**TENSOR, "datatype": "fp32"}), (), "infer", {}, "INVALID_ARGUMENT", "BAD_DATATYPE"),
        (infer({**TENSOR, "shape": [1] * 17}), (), "infer", {}, "INVALID_ARGUMENT", "BAD_SHAPE"),
        (infer({**TENSOR, "frame": 0}), (8,), "infer", {}, "INVALID_ARGUMENT", "BAD_DATA"),
        (infer(frame("x", 1)), (8,), "infer", {}, "INVALID_ARGUMENT", "MISSING_FRAME"),
        (infer(frame("x", 0)), (), "infer", {}, "INVALID_ARGUMENT", "MISSING_FRAME"),
        (infer(frame("x", -1)), (8,), "infer", {}, "INVALID_ARGUMENT", "MISSING_FRAME"),
        (infer(frame("x", 2**64 - 1)), (8,), "infer", {}, "INVALID_ARGUMENT", "MISSING_FRAME"),
        (infer(frame("x", 0), frame("y", 0)), (8,), "infer", {}, "INVALID_ARGUMENT", "DUPLICATE_FRAME"),
        (infer(frame("x", 0)), (8, 8), "infer", {}, "INVALID_ARGUMENT", "EXTRA_FRAME"),
        ({"method": "server_live"}, (8,), "infer", {}, "INVALID_ARGUMENT", "EXTRA_FRAME"),
        (
            infer(frame("x", 0, parameters={"shared_memory_region": "r"})),
            (8,),
            "infer",
            {},
            "INVALID_ARGUMENT",
            "BAD_DATA",
        ),
        (
            infer({**TENSOR, "parameters": {"shared_memory_offset": 0}}),
            (),
            "infer",
            {},
            "INVALID_ARGUMENT",
            "BAD_DATA",
        ),
    ],
)
def test_each_refusal_has_its_code_and_its_reason(
    header: Any, frames: tuple[int, ...], socket: str, limits: dict[str, int], code: str, reason: str
) -> None:
    """Nothing is refused in general."""
    error = refused(header, frames, socket, **limits).error
    assert (error.code.value, error.reason) == (code, reason)
    assert len(error.message) < 600
    assert error.message.isprintable()


@pytest.mark.parametrize("good", [None, 0, 1, ID_INT_MAX, "", "ä", "x" * 256])
def test_ids_that_are_echoed(good: Any) -> None:
    """A string or an int below 2^53, or none."""
    assert decode({**INFER, "id": good}).id == good


@pytest.mark.parametrize("bad", [-1, ID_INT_MAX + 1, 2**64 - 1, "x" * 257, 1.5, True, [], b"x"])
def test_ids_that_no_client_could_match_are_refused_with_none(bad: Any) -> None:
    """What could not be decoded is answered with no id."""
    error = refused({**INFER, "id": bad})
    assert error.request_id is None
    assert error.error.reason in ("BAD_ID", "BAD_HEADER")


def test_every_method_is_taken_on_its_own_sockets_only() -> None:
    """As the table of methods says."""
    for method, home in METHODS.items():
        for socket in ("infer", "admin"):
            if home in ("both", socket):
                assert decode({"method": method}, (), socket).method == method
            else:
                assert refused({"method": method}, (), socket).error.reason == "WRONG_SOCKET"


# ---- a tensor's bytes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 7, 9, 16])
def test_a_byte_too_few_or_too_many_is_refused(size: int) -> None:
    """Inline and in a frame; the message has both figures."""
    inline = InputTensor("x", "FP32", [2], data=b"\0" * size)
    framed = InputTensor("x", "FP32", [2], frame=0)
    for tensor, frames in ((inline, []), (framed, [memoryview(b"\0" * size)])):
        with pytest.raises(InvalidArgument) as caught:
            input_data(tensor, frames)
        assert caught.value.reason == "BAD_SIZE"
        assert "expected 8 bytes for FP32 [2]" in caught.value.message
        assert f"got {size}" in caught.value.message


@pytest.mark.parametrize("shape", [[-1], [2**63], [2**40, 2**40, 2], [0, 2**63], [-(2**63)]])
def test_shapes_that_overflow_are_refused(shape: list[int]) -> None:
    """The product is never trusted to fit."""
    header = infer({"name": "x", "datatype": "FP32", "shape": shape, "data": b""})
    with pytest.raises(InvalidArgument) as caught:
        input_data(decode(header).inputs[0], [])
    assert caught.value.reason == "BAD_SHAPE"


def test_the_three_ways_to_send_a_tensor_agree() -> None:
    """Raw bytes inline, a list flat or nested, a frame."""
    raw = struct.pack("<4f", 1, 2, 3, 4)
    ways = [
        InputTensor("x", "FP32", [2, 2], data=raw),
        InputTensor("x", "FP32", [2, 2], data=[1, 2, 3, 4]),
        InputTensor("x", "FP32", [2, 2], data=[[1, 2], [3.0, 4.0]]),
        InputTensor("x", "FP32", [2, 2], frame=0),
    ]
    assert {bytes(input_data(way, [memoryview(raw)]).raw) for way in ways} == {raw}


def test_a_tensor_of_no_bytes_may_leave_its_content_out() -> None:
    """One that has some may not."""
    assert input_data(InputTensor("x", "FP32", [0, 3]), []).raw == b""
    assert input_data(InputTensor("x", "BYTES", [0]), []).raw == b""
    with pytest.raises(InvalidArgument):
        input_data(InputTensor("x", "FP32", []), [])
    with pytest.raises(InvalidArgument):
        input_data(InputTensor("x", "BYTES", [1]), [])


def test_many_strings_are_not_walked_here() -> None:
    """16 million empty ones would take the loop seconds: the worker counts them; few are counted at once."""
    raw = bytes(64 << 20)
    began_s = time.perf_counter()
    assert input_data(InputTensor("x", "BYTES", [16 << 20], frame=0), [memoryview(raw)]).raw is not None
    with pytest.raises(InvalidArgument, match="the data more"):
        input_data(InputTensor("x", "BYTES", [4096], frame=0), [memoryview(raw)])
    assert time.perf_counter() - began_s < 0.5


def test_a_bool_is_a_zero_or_a_one() -> None:
    """Another byte would be a value that no model expects."""
    assert input_data(InputTensor("x", "BOOL", [2], data=b"\0\1"), []).raw == b"\0\1"
    with pytest.raises(InvalidArgument):
        input_data(InputTensor("x", "BOOL", [2], data=b"\0\2"), [])


# ---- parameters -----------------------------------------------------------------------------------------


def test_timing_parameters() -> None:
    """Microseconds, nanoseconds of the monotonic clock, priority with 5 for none."""
    assert timing_parameters(Request("m")) == (None, None, 5)
    asked = {"timeout": 1500, "deadline_ns": 2_000_000_000, "priority": 9}
    assert timing_parameters(Request("m", parameters=asked)) == (0.0015, 2.0, 9)
    assert timing_parameters(Request("m", parameters={"timeout": 0, "priority": 0})) == (None, None, 5)


@pytest.mark.parametrize("key", ["timeout", "deadline_ns", "priority"])
@pytest.mark.parametrize("bad", [-1, 1.0, float("nan"), True, "5", None, 2**63, []])
def test_timing_parameters_of_the_wrong_kind_are_refused(key: str, bad: Any) -> None:
    """Never taken for a default."""
    with pytest.raises(InvalidArgument) as caught:
        timing_parameters(Request("m", parameters={key: bad}))
    assert caught.value.reason == "BAD_PARAMETER"


def test_unknown_parameters_are_named() -> None:
    """Of the request, its inputs and its outputs; bounded in number and in length."""
    header = infer(
        {**TENSOR, "parameters": {"a": 1}},
        outputs=[{"name": "y", "parameters": {"b" * 500: 1}}],
        parameters={"timeout": 1, "sequence_id": 4},
    )
    found = unknown_parameters(decode(header))
    assert found[0] == "parameter 'sequence_id' was ignored"
    assert found[1] == "parameter 'a' of input 'x' was ignored"
    assert len(found) == 3
    assert len(found[2]) < 200
    assert len(unknown_parameters(Request("m", parameters=dict.fromkeys(map(str, range(99)))))) == 16


def test_a_clients_text_is_cut_and_made_printable() -> None:
    """It cannot break a line of the log, nor fill it."""
    assert cut("plain") == "plain"
    assert cut("a\nb") == "a\\nb"
    assert len(cut("x" * 10_000)) == 129
    assert cut("\u202e\x1b[31m").isprintable()


# ---- replies --------------------------------------------------------------------------------------------


def test_small_outputs_go_inline_and_large_ones_in_frames() -> None:
    """In the order of the outputs, and readable by the client's library."""
    small, large = b"\1" * INLINE_BYTES_MAX, b"\2" * (INLINE_BYTES_MAX + 1)
    outputs = [
        ("a", "UINT8", [len(large)], large),
        ("b", "UINT8", [len(small)], memoryview(small)),
        ("c", "SEQUENCE", None, msgpack.packb([{"datatype": "FP32"}])),
        ("d", "UINT8", [len(large)], memoryview(large)),
    ]
    frames = encode_infer_reply(3, "m", "1", outputs, {"device": "CPU"})
    header = msgpack.unpackb(frames[0])
    assert [o.get("frame") for o in header["outputs"]] == [0, None, None, 1]
    assert header["outputs"][1]["data"] == small
    assert header["outputs"][2] == {"name": "c", "datatype": "SEQUENCE", "data": [{"datatype": "FP32"}]}
    assert [bytes(f) for f in frames[1:]] == [large, large]
    assert {k: header[k] for k in ("id", "model_name", "model_version")} == {
        "id": 3,
        "model_name": "m",
        "model_version": "1",
    }


def test_a_replys_header_stays_below_a_requests_bound() -> None:
    """Many small outputs are not all inline."""
    outputs = [(f"o{i}", "UINT8", [9000], b"\0" * 9000) for i in range(20)]
    frames = encode_infer_reply(None, "m", "1", outputs, {})
    assert len(frames[0]) < LIMITS.header_bytes
    assert len(frames) > 10


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(st.dictionaries(st.text(), PLAIN, max_size=5))
def test_the_two_msgpack_libraries_agree(value: dict[str, Any]) -> None:
    """What the daemon's encodes the client's reads, and the other way round."""
    assert msgpack.unpackb(encode(value)) == value
    assert msgspec.msgpack.decode(msgpack.packb(value)) == value


# ---- leased memory --------------------------------------------------------------------------------------


def where(**changes: Any) -> dict[str, Any]:
    """Parameters that name a piece of a region; None takes one away."""
    found = {"region": "r", "offset": 4, "byte_size": 8, **changes}
    return {f"shared_memory_{k}": v for k, v in found.items() if v is not None}


def test_a_piece_of_a_region_is_named_by_three_parameters() -> None:
    """The offset may be left out; other parameters have nothing to do with it."""
    assert region_reference(where(), "x") == RegionReference("r", 4, 8)
    assert region_reference(where(offset=None), "x") == RegionReference("r", 0, 8)
    assert region_reference({"binary_data_size": 8}, "x") is None
    assert region_reference({}, "x") is None
    assert region_reference(None, "x") is None


@pytest.mark.parametrize("bad", [-1, True, False, 1.0, "8", None, [], 2**63, 2**64 - 1, -(2**63), b"8"])
@pytest.mark.parametrize("key", ["offset", "byte_size"])
def test_numbers_that_are_none(key: str, bad: Any) -> None:
    """Negative, beyond 63 bits, or of another type: refused before anybody adds them."""
    parameters = {**where(), f"shared_memory_{key}": bad}
    with pytest.raises(InvalidArgument) as caught:
        region_reference(parameters, "input 'x'")
    assert caught.value.reason == "BAD_REGION"
    assert key in caught.value.message


@pytest.mark.parametrize("bad", [None, 1, b"r", ["r"]])
def test_a_region_has_a_name(bad: Any) -> None:
    """A size or an offset alone names nothing."""
    with pytest.raises(InvalidArgument) as caught:
        region_reference(
            {**where(region=None), **({} if bad is None else {"shared_memory_region": bad})}, "x"
        )
    assert caught.value.reason == "BAD_REGION"


def test_a_leased_input_has_its_size_and_no_bytes_here() -> None:
    """Nobody in the daemon reads the client's memory; BYTES are the worker's to look at."""
    part = RegionPart(1, "r", 0, 8)
    data = leased_input(InputTensor("x", "FP32", [2]), part)
    assert (data.part, len(data.raw)) == (part, 0)
    assert leased_input(InputTensor("x", "BYTES", [3]), part).part is part
    for shape in ([1], [3], [], [-2], [2**62, 2**62]):
        with pytest.raises(InvalidArgument):
            leased_input(InputTensor("x", "FP32", shape), part)


def test_the_parameters_of_a_region_are_known() -> None:
    """No warning names them, and whoever insists on them is served."""
    tensor = InputTensor("x", "FP32", [2], parameters={**where(), "odd": 1})
    request = Request("model_infer", inputs=[tensor], outputs=[OutputRef("y", where())])
    assert unknown_parameters(request) == ["parameter 'odd' of input 'x' was ignored"]
    insists = {"name": "x", "datatype": "FP32", "shape": [2], "parameters": where()}
    assert decode(infer(insists, must_understand=["shared_memory_region"])).inputs[0].parameters == where()


def test_a_landed_output_is_told_by_where_it_lies() -> None:
    """With its real size, and neither data nor frame; the others are as ever."""
    (header,) = encode_infer_reply(
        1,
        "m",
        "1",
        [("y", "FP32", [1], b""), ("z", "FP32", [1], b"\0" * 4)],
        {},
        {"y": RegionPart(3, "r", 64, 4)},
    )
    y, z = msgpack.unpackb(header)["outputs"]
    assert y == {
        "name": "y",
        "datatype": "FP32",
        "shape": [1],
        "parameters": where(offset=64, byte_size=4),
    }
    assert z["data"] == b"\0" * 4


def lane(packet: Any) -> Any:
    """What the daemon makes of a packet on the lease socket."""
    raw = packet if isinstance(packet, bytes) else msgpack.packb(packet)
    return decode_lane_request(raw, LIMITS)


def test_what_the_lease_socket_takes() -> None:
    """Its own two methods, and those of edged.sock, which come out as they do there."""
    for method in sorted(m for m, home in METHODS.items() if home in ("infer", "both")):
        header = {**INFER, "method": method, "cancel_id": 3}
        there, here = msgspec.structs.asdict(decode(header)), msgspec.structs.asdict(lane(header))
        assert there == {key: here[key] for key in there}
    assert lane({"method": "lease_acquire", "id": 1, "byte_size": 9}).byte_size == 9
    assert lane({"v": 1, "method": "lease_release", "id": "a", "region": "r"}).region == "r"


@pytest.mark.parametrize(
    ("packet", "code", "reason"),
    [
        ({"method": "lease_acquire", "id": 7}, "INVALID_ARGUMENT", "BAD_HEADER"),
        ({"method": "lease_release", "id": 7}, "INVALID_ARGUMENT", "BAD_HEADER"),
        ({"method": "lease_acquire", "id": 7, "byte_size": True}, "INVALID_ARGUMENT", "BAD_HEADER"),
        ({"method": "lease_acquire", "id": 7, "byte_size": 1.5}, "INVALID_ARGUMENT", "BAD_HEADER"),
        ({"method": "lease_release", "id": 7, "region": b"r"}, "INVALID_ARGUMENT", "BAD_HEADER"),
        ({"method": "server_status", "id": 7}, "UNIMPLEMENTED", "WRONG_SOCKET"),
        ({"method": "repository_model_load", "id": 7}, "UNIMPLEMENTED", "WRONG_SOCKET"),
        ({**INFER, "id": 7, "inputs": [frame("x", 0)]}, "INVALID_ARGUMENT", "MISSING_FRAME"),
        ({**INFER, "id": 7, "must_understand": ["region"]}, "UNIMPLEMENTED", "MUST_UNDERSTAND"),
        ({"method": "dance", "id": 7}, "UNIMPLEMENTED", "UNKNOWN_METHOD"),
        ({"method": "lease_release", "v": 2, "id": 7, "region": "r"}, "UNIMPLEMENTED", "PROTOCOL_VERSION"),
        (
            {"method": "lease_release", "id": 7, "region": "r", "must_understand": ["fast"]},
            "UNIMPLEMENTED",
            "MUST_UNDERSTAND",
        ),
    ],
)
def test_what_the_lease_socket_refuses(packet: Any, code: str, reason: str) -> None:
    """With the id of who asked."""
    with pytest.raises(WireError) as caught:
        lane(packet)
    assert (caught.value.error.code.value, caught.value.error.reason) == (code, reason)
    assert caught.value.request_id == 7


def test_a_packet_that_was_cut_is_not_read() -> None:
    """Whatever its beginning says."""
    packet = msgpack.packb({"method": "lease_acquire", "id": 1, "byte_size": 9, "pad": b"x" * 70_000})
    with pytest.raises(WireError) as caught:
        lane(packet[: LANE_PACKET_BYTES_MAX + 1])
    assert caught.value.error.reason == "HEADER_TOO_LARGE"
    assert caught.value.request_id is None


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_packet_is_a_request_or_a_wire_error(data: st.DataObject) -> None:
    """Well-formed or not."""
    raw = data.draw(st.binary(max_size=80) | (ODD | WILD).map(msgpack.packb))
    try:
        request = lane(raw)
    except WireError as e:
        encode({"id": e.request_id, "error": e.error.to_wire()})
    else:
        assert METHODS[request.method] != "admin"


def test_what_was_ignored_is_told_or_counted() -> None:
    """A reply's warnings are few, and say how many more there would be."""
    for count, told in ((16, 16), (17, 16), (1000, 16)):
        request = decode({**INFER, "parameters": {f"odd{n}": 1 for n in range(count)}})
        warnings = unknown_parameters(request)
        assert len(warnings) == told
        assert warnings[0] == "parameter 'odd0' was ignored"
        assert warnings[-1] == (
            "parameter 'odd15' was ignored" if count == 16 else f"{count - 15} more were ignored"
        )


def test_a_reply_that_is_one_packet() -> None:
    """All that fits is inline, larger than over ZeroMQ; what does not is an error that says what to do."""

    def reply(*sizes: int) -> Any:
        outputs = [(f"y{at}", "UINT8", [size], bytes(size)) for at, size in enumerate(sizes)]
        frames = encode_infer_reply(4, "m", "1", outputs, {}, in_one=True)
        check_lane_reply(frames)
        (packet,) = frames
        assert len(packet) <= LANE_PACKET_BYTES_MAX
        return msgpack.unpackb(packet)

    assert [len(tensor["data"]) for tensor in reply(1, 60_000, 5_000)["outputs"]] == [1, 60_000, 5_000]
    for sizes in ((65_500,), (65_536,), (70_000,), (40_000, 40_000), (1, 1 << 20)):
        with pytest.raises(ResourceExhausted, match=r"edged\.sock") as refused:
            reply(*sizes)
        assert refused.value.reason == "REPLY_TOO_LARGE"
    overhead = len(encode({"id": 4, "models": bytes(60_000)})) - 60_000
    check_lane_reply([encode({"id": 4, "models": bytes(LANE_PACKET_BYTES_MAX - overhead)})])
    with pytest.raises(ResourceExhausted):
        check_lane_reply([encode({"id": 4, "models": bytes(LANE_PACKET_BYTES_MAX - overhead + 1)})])


# ---- anything at all ------------------------------------------------------------------------------------

WILD = PLAIN | st.floats() | st.lists(PLAIN)
ODD_TENSOR = st.fixed_dictionaries(
    {},
    optional={
        "name": st.sampled_from(["x", "y"]) | WILD,
        "datatype": st.sampled_from(DATATYPES) | WILD,
        "shape": st.lists(st.integers(-2, 5), max_size=4) | WILD,
        "data": st.binary(max_size=40) | st.lists(WILD, max_size=4) | WILD,
        "frame": st.integers(-1, 3) | WILD,
        "parameters": WILD
        | st.dictionaries(
            st.sampled_from([f"shared_memory_{k}" for k in ("region", "offset", "byte_size")]), WILD
        ),
    },
)
ODD = st.fixed_dictionaries(
    {"method": st.sampled_from(list(METHODS)) | WILD},
    optional={
        "byte_size": WILD,
        "region": WILD,
        "v": st.just(1) | WILD,
        "id": WILD,
        "model_name": WILD,
        "inputs": st.lists(ODD_TENSOR, max_size=3) | WILD,
        "outputs": st.lists(st.fixed_dictionaries({"name": WILD}), max_size=2) | WILD,
        "parameters": st.dictionaries(st.sampled_from(["timeout", "priority", "deadline_ns", "z"]), WILD)
        | WILD,
        "must_understand": st.lists(st.text(max_size=3)) | WILD,
        "cancel_id": WILD,
        "settings": WILD,
    },
)


def check(raw: bytes, sizes: list[int]) -> None:
    """A request or a refusal, nothing else; and so on through the tensors' bytes."""
    try:
        request = decode_request(raw, sizes, "infer", LIMITS)
    except WireError as e:
        assert e.error.reason  # noqa: PT017 - either way out is right
        encode({"id": e.request_id, "error": e.error.to_wire()})
        return
    frames = [memoryview(b"\0" * size) for size in sizes]
    for tensor in request.inputs:
        try:
            reference = region_reference(tensor.parameters, "x")
            if reference is not None:
                data = leased_input(tensor, RegionPart(1, reference.name, reference.offset, reference.nbytes))
            else:
                data = input_data(tensor, frames)
        except EdgedError as e:
            encode(e.to_wire())
        else:
            assert data.datatype in DATATYPES
    try:
        timing_parameters(request)
    except EdgedError as e:
        encode(e.to_wire())
    encode({"id": request.id, "warnings": unknown_parameters(request)})


@settings(max_examples=300, deadline=None)
@given(ODD | WILD, st.lists(st.integers(0, 64), max_size=3))
def test_any_map_is_a_request_or_a_wire_error(value: Any, sizes: list[int]) -> None:
    """Well-formed msgpack of any content."""
    check(msgpack.packb(value), sizes)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_bytes_are_a_request_or_a_wire_error(data: st.DataObject) -> None:
    """Noise, and good messages with bytes changed, cut out and put in."""
    raw = bytearray(data.draw(st.binary(max_size=80) | ODD.map(msgpack.packb)))
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.integers(0, len(raw)))
        raw[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
    check(bytes(raw), data.draw(st.lists(st.integers(0, 64), max_size=2)))
