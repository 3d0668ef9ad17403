"""The core: methods, refusals, deadlines and crashes, and that every request is answered exactly once."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edged.config import CacheSettings
from edged.errors import InvalidArgument, ResourceExhausted
from edged.estimate import RunTimes
from edged.events import (
    BadMessage,
    CancelRun,
    ConfigChanged,
    DevicesChanged,
    KillWorker,
    LandReply,
    LaneClosed,
    Reply,
    RequestArrived,
    RunDone,
    Sampled,
    SendKept,
    SendResult,
    SetLogLevel,
    ShrinkWorkers,
    ShutdownAsked,
    StartRun,
    Unsent,
)
from edged.instances import SLOTS_AT_START, InstanceState
from edged.messages import InputTensor, OutputRef, Peer, Request
from edged.properties import METADATA_BYTES_MAX
from edged.runs import AHEAD_MAX_S, AHEAD_MIN_S, RUN_GRACE_S, RUN_LIMIT_S
from edged.wire import encode
from tests.world import CPU, CUDA, MIB, OV_CPU, PEER, World, config, sample


def ready_world(*, batch_max: int = 1, instances: int = 1, **settings: Any) -> World:
    """A world in which model `m` serves, under these settings."""
    world = World()
    world.batch_max, world.instances = batch_max, instances
    world.put("m", **settings)
    world.settle()
    assert world.serving().state is InstanceState.READY
    return world


# ---- any sequence of events -----------------------------------------------------------------------------

CLIENTS = st.sampled_from([b"\0a", b"\0b", b"\0d"])
PEERS = {b"\0a": PEER, b"\0b": PEER, b"\0d": Peer(1000, 1000, 77)}
MODELS = st.sampled_from(["m", "n", "g"])
STEPS = st.one_of(
    st.tuples(st.just("infer"), MODELS, CLIENTS, st.sampled_from([0, 500_000, 5_000_000]), st.integers(0, 9)),
    *[st.tuples(st.just("infer"), MODELS, CLIENTS, st.just(0), st.just(0))] * 4,
    *[st.tuples(st.just("crash"), st.integers(0, 9))] * 2,
    *[st.tuples(st.just("settle"))] * 2,
    *[st.tuples(st.just("burst"), MODELS)] * 2,
    st.tuples(st.just("cancel"), st.integers(0, 50)),
    st.tuples(st.just("deliver"), st.integers(0, 50)),
    st.tuples(st.just("settle")),
    st.tuples(st.just("time"), st.sampled_from([0.001, 0.6, 3.0, 31.0, 130.0])),
    st.tuples(st.just("run"), st.integers(0, 9), st.booleans()),
    st.tuples(st.just("crash"), st.integers(0, 9)),
    st.tuples(st.just("put"), MODELS, st.sampled_from("1234"), st.sampled_from(["beside", "replace"])),
    st.tuples(st.just("version"), st.integers(1, 3), st.sampled_from("12")),
    st.tuples(st.just("remove"), MODELS),
    st.tuples(st.just("remove_version"), st.integers(1, 3)),
    st.tuples(st.just("load"), MODELS),
    st.tuples(st.just("unload"), MODELS),
    st.tuples(st.just("hold"), st.booleans()),
    st.tuples(st.just("shape"), st.sampled_from([1, 4, 16]), st.sampled_from([1, 2, 3])),
    st.tuples(st.just("bad_batches"), st.booleans()),
    *[st.tuples(st.just("rows"), MODELS, CLIENTS, st.integers(1, 6), st.sampled_from([0, 3000, 900_000]))]
    * 2,
    st.tuples(st.just("finish_loads")),
    st.tuples(st.just("sample"), st.sampled_from([8 << 30, 1 << 20])),
    st.tuples(st.just("devices")),
    *[st.tuples(st.just("measured"), st.floats(1, 2000))] * 2,
    st.tuples(st.just("tune"), MODELS, st.sampled_from(["latency", "throughput"])),
    st.tuples(st.just("tuned"), st.sampled_from(["status", "cancel", "apply", "apply"])),
    st.tuples(st.just("fault"), st.booleans()),
    st.tuples(st.just("rot"), MODELS, st.sampled_from("12")),
    st.tuples(st.just("unreadable"), MODELS, st.booleans()),
    st.tuples(st.just("hold_hashes"), st.booleans()),
    st.tuples(st.just("lease")),
    *[st.tuples(st.just("infer_leased"), MODELS, st.integers(0, 9), st.sampled_from([0, 500_000]))] * 2,
    st.tuples(st.just("release"), st.integers(0, 9)),
    st.tuples(st.just("infer_by_lane"), MODELS, st.sampled_from([0, 500_000])),
    st.tuples(st.just("hang_up")),
)
FAULTS = {
    "m-3": "MODEL_INVALID",
    "n-3": "CRASH",
    "g-3": "DEVICE_FAILED",
    ("m-2", OV_CPU): "MODEL_LOAD_FAILED",
    ("n-2", CPU): "CRASH",
    ("g-2", CUDA): "DEVICE_FAILED",
}


def act(world: World, step: tuple[Any, ...]) -> None:
    """One step of a day."""
    match step:
        case ("infer", model, client, timeout, priority):
            world.infer(model, client=client, peer=PEERS[client], timeout=timeout, priority=priority)
        case ("rows", model, client, rows, timeout):
            world.infer(model, client=client, peer=PEERS[client], size=rows, timeout=timeout)
        case ("shape", batch_max, instances):
            world.batch_max, world.instances = batch_max, instances
        case ("bad_batches", on):
            world.bad_batches = on
        case ("infer_by_lane", model, timeout):
            world.infer(model, client=world.connected(), timeout=timeout)
        case ("burst", model):
            for _ in range(3):
                world.infer(model)
            busy = [w for w in world.workers.values() if w.alive and w.runs]
            for worker in busy:
                world.crash(worker)
        case ("cancel", which):
            open_ = [k for k in world.asked if k not in world.answers]
            if open_:
                client, request_id = open_[which % len(open_)]
                assert world.request("cancel", client=client, cancel_id=request_id) == {
                    "id": None,
                    "cancelled": True,
                }
        case ("deliver", which):
            if boxes := world.sources():
                world.deliver(boxes[which % len(boxes)])
        case ("settle",):
            world.settle()
        case ("time", seconds):
            world.pass_time(seconds, settle=False)
            world.settle()
        case ("run", which, fails):
            busy = [w for w in world.workers.values() if w.alive and w.runs]
            if busy:
                world.finish_run(busy[which % len(busy)], fails=fails)
        case ("crash", which):
            # Content whose load kills a worker on each of the three devices is rightly given up.
            spared = world.load_crashes >= 2
            alive = [w for w in world.workers.values() if w.alive and not (spared and w.loading)]
            if alive:
                worker = alive[which % len(alive)]
                world.load_crashes += bool(worker.loading)
                world.crash(worker)
        case ("put", model, content, swap):
            device = "cuda" if model == "g" else "auto"
            more = {
                "cache": CacheSettings(4096) if content == "2" else None,
                "instances": {"1": None, "2": "auto", "3": 2, "4": "auto"}[content],
                "max_queue_delay_s": 0.004 * int(content),
            }
            world.put(model, content, swap=swap, device=device, **more)
        case ("version", version, content):
            world.put("v", content, version)
        case ("remove", model):
            world.remove(model)
        case ("remove_version", version):
            world.remove("v", version)
        case ("load" | "unload" as what, model):
            world.request(f"repository_model_{what}", model_name=model)
        case ("hold", on):
            world.hold_loads = on
        case ("finish_loads",):
            world.finish_loads()
        case ("sample", free):
            world.send(Sampled(sample(free)))
        case ("devices",):
            world.send(DevicesChanged())
        case ("measured", figure):
            if world.measures:
                world.measured(
                    reference_p50_us=1000.0, candidate_p50_us=figure, agrees=True, proven=True, why=""
                )
        case ("tune", model, aim):
            world.request("model_tune", model_name=model, settings={"do": "start", "aim": aim})
        case ("tuned", what):
            tune = world.core.chooser.tune
            number = 0 if tune is None else tune.id
            world.request("model_tune", settings={"do": what, "tune": number})
        case ("fault", on):
            world.fault = "the models folder is gone" if on else None
            world.scans.append(world.now_s)
        case ("rot", model, content):
            world.damaged.add(f"{model}-{content}")
        case ("unreadable", model, on):
            world.unreadable = {f"{model}-1", f"{model}-2"} if on else set()
        case ("hold_hashes", on):
            world.hold_hashes = on
        case ("lease",):
            world.lease()
        case ("infer_leased", model, which, timeout):
            region = world.leased[which % len(world.leased)] if world.leased else world.lease()
            world.infer(model, region=region, timeout=timeout)
        case ("release", which):
            if world.leased:
                world.release(world.leased.pop(which % len(world.leased)))
        case ("hang_up",):
            world.hang_up()
        case _:
            raise AssertionError(step)


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from([(1, 1), (4, 1), (4, 2), (1, 3)]), st.lists(STEPS, min_size=25, max_size=70))
def test_any_day_ends_with_every_request_answered_once(
    shape: tuple[int, int], day: list[tuple[Any, ...]]
) -> None:
    """Whatever happens and in whatever order, stop finds each request with exactly one reply."""
    world = World(verdicts={CPU: "ok", OV_CPU: "ok", CUDA: "ok"})
    world.batch_max, world.instances = shape
    world.load_faults = dict(FAULTS)
    world.put("m")
    world.put("g", device="cuda")
    world.settle()
    for step in day:
        act(world, step)
    recovers(world)
    for model in ("m", "n", "g", "v"):
        world.infer(model)
    world.send(ShutdownAsked())
    world.pass_time(world.core.around.config.server.shutdown_grace_s)
    assert world.exits >= 1
    assert {key: len(world.answers.get(key, ())) for key in world.asked} == dict(world.asked)
    scheduler = world.core.scheduler
    assert (scheduler.in_flight, scheduler.clients, scheduler._bytes) == (0, 0, 0)
    assert not scheduler._bytes_of
    assert len(world.memory) == len(world.leased), "leased memory that nobody has was not reclaimed"
    world.hang_up()
    assert world.core.regions.snapshot() == {"regions": 0, "bytes": 0, "connections": 0}
    assert not world.memory


GIVEN_UP = ("WORKER_CRASHED", "MODEL_LOAD_TIMEOUT", "COPY_DAMAGED", "COPY_UNREADABLE")


def recovers(world: World) -> None:
    """With nothing more in the way, whatever the folder has serves or says why it does not."""
    world.fault = None
    world.hold_loads = world.hold_hashes = False
    world.unreadable = set()
    world.finish_loads()
    world.send(Sampled(sample()))
    world.scans.append(world.now_s)
    for _ in range(12):
        world.pass_time(25.0)
        world.finish_runs()
    given_up = {
        t.name
        for t in world.registry.tracks.values()
        if t.failure is not None and t.failure.reason in GIVEN_UP
    }
    for name in given_up:
        # Crashes and time-outs together may use up all its devices; then it waits to be asked for.
        world.request("repository_model_load", model_name=name)
    world.send(Sampled(sample()))
    world.pass_time(30.0)
    world.finish_runs()
    assert world.core.state == "ready"
    for key, entry in world.folder.items():
        track = world.registry.tracks[key]
        assert track.incoming is None
        if track.unloaded:
            assert track.serving is None
            continue
        digest = world.contents[entry.files]
        if digest not in FAULTS:
            assert track.serving is not None, f"{digest} does not serve: {track.failure}"
            assert track.serving.state is InstanceState.READY
            assert track.serving.staged.digest == digest
            assert track.failure is None
        else:
            assert track.failure is not None
    names = {name for name, _ in world.folder}
    assert world.registry.names() == names
    held = set(world.core.workers.table)
    assert held == {i.worker for i in world.registry.instances.values()}
    for worker in world.workers.values():
        want = world.core.workers.table[worker.id].instances if worker.id in held else set()
        assert not worker.alive or worker.loaded == want, "a worker holds models that nobody knows of"


# ---- methods --------------------------------------------------------------------------------------------


def test_what_the_server_tells_of_itself() -> None:
    """Live, ready and metadata, before and after it is ready."""
    world = World()
    assert world.request("server_live", id=4) == {"id": 4, "live": True}
    assert world.request("server_ready")["ready"] is False
    world.settle()
    assert world.request("server_ready")["ready"] is True
    meta = world.request("server_metadata")
    assert (meta["name"], meta["instance_id"], meta["protocol_versions"]) == ("edged", "i-1", [1])
    assert meta["limits"]["inflight_per_client"] == 16


def test_what_a_model_tells_of_itself() -> None:
    """Ready, metadata, index and statistics; unknown names are NOT_FOUND."""
    world = ready_world()
    key = world.infer()
    world.finish_runs()
    assert world.answer(key).parameters["device"] == "CPU"
    assert world.request("model_ready", model_name="m")["ready"] is True
    meta = world.request("model_metadata", model_name="m")
    assert meta["versions"] == ["1"]
    assert meta["platform"] == "onnxruntime_onnx"
    assert meta["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1]}]
    assert msgspec.msgpack.decode(meta["properties"]) == {"author": "nobody"}
    (row,) = world.request("repository_index")["models"]
    assert (row["name"], row["version"], row["state"], row["reason"]) == ("m", "1", "READY", "")
    (stats,) = world.request("model_statistics")["model_stats"]
    assert stats["inference_count"] == 1
    for method in ("model_ready", "model_metadata", "model_statistics"):
        assert world.request(method, model_name="nobody")["error"]["code"] == "NOT_FOUND"


def test_an_error_names_some_of_many_tensors() -> None:
    """All names of a large model would be more than a lane's packet, and then the answer another error."""
    world = ready_world()
    instance = world.serving()
    (spec,) = instance.inputs.values()
    instance.inputs |= {f"x{n}": spec for n in range(3000)}
    instance.outputs |= {f"y{n}": spec for n in range(3000)}
    for last, name in (("x18", "z"), ("y18", "x")):
        tensor = InputTensor(name, "FP32", [1], data=bytes(4))
        request = Request("model_infer", id=1, model_name="m", inputs=[tensor], outputs=[OutputRef("z")])
        (reply,) = [
            e for e in world.send(RequestArrived((b"a", b""), "infer", PEER, request)) if isinstance(e, Reply)
        ]
        assert reply.header["error"]["message"].endswith(f"'{last}' and 2981 more")


def test_metadata_may_be_left_out_and_is_never_cut() -> None:
    """Too much of it is an error that names the keys; everything else is still told."""
    world = ready_world()
    asked = world.request("model_metadata", model_name="m", parameters={"properties": False})
    assert "properties" not in asked
    assert asked["inputs"]
    info = world.serving().info
    del info["metadata"]
    info["metadata_excess"] = [METADATA_BYTES_MAX + 1, ["character", "odd\nname"]]
    error = world.request("model_metadata", model_name="m")["error"]
    assert (error["code"], error["reason"]) == ("RESOURCE_EXHAUSTED", "METADATA_TOO_LARGE")
    for said in ("'character'", "1048577", "1048576", "properties", r"odd\nname"):
        assert said in error["message"]
    assert world.request("model_metadata", model_name="m", parameters={"properties": False}) == asked
    for odd in (0, "no", None):
        error = world.request("model_metadata", model_name="m", parameters={"properties": odd})["error"]
        assert (error["code"], error["reason"]) == ("INVALID_ARGUMENT", "BAD_PARAMETER")


def test_an_answer_may_land_in_leased_memory() -> None:
    """Whole, where it fits; the reply tells where, and of a place that is none nothing is done."""
    world = ready_world()
    name = world.lease(4096)
    where = {"shared_memory_region": name, "shared_memory_offset": 8, "shared_memory_byte_size": 4000}
    for method in ("model_metadata", "repository_index", "server_metadata"):
        plain = world.request(method, model_name="m")
        request = Request(method, id=plain["id"], model_name="m", parameters=where)
        (landed,) = world.send(RequestArrived((b"a", b""), "infer", PEER, request))
        assert isinstance(landed, LandReply)
        assert msgspec.msgpack.decode(landed.raw) == msgspec.msgpack.decode(encode(plain))
        assert (landed.part.name, landed.part.offset) == (name, 8)
        assert landed.header == {
            "id": plain["id"],
            "parameters": {**where, "shared_memory_byte_size": len(landed.raw)},
        }
    for change, reason in (
        ({"shared_memory_byte_size": 20}, "OUTPUT_DOES_NOT_FIT"),
        ({"shared_memory_byte_size": 5000}, "BAD_REGION"),
        ({"shared_memory_region": "another's"}, "REGION_NOT_FOUND"),
    ):
        asked = world.request("server_metadata", parameters={**where, **change})
        assert asked["error"]["reason"] == reason
    world.request("repository_model_unload", model_name="m", parameters={**where, **change})
    assert world.serving().admits


@pytest.mark.parametrize("beyond", [-1, 0, 1])
def test_a_reply_beyond_the_bound_is_an_error_and_a_failure(beyond: int) -> None:
    """By what its outputs take that do not land elsewhere; the statistics and the client agree."""
    world = ready_world()
    bytes_max = world.core.around.config.limits.message_bytes
    key = world.infer()
    (worker,) = [w for w in world.workers.values() if w.runs]
    run = worker.runs[0]
    outputs = [
        ["y", "UINT8", [bytes_max - 1000], 64, bytes_max - 1000],
        ["s", "SEQUENCE", None, None, None, bytes(1000 + beyond)],
    ]
    world.send(RunDone(worker.id, run.run_id, outputs, 1))
    (stats,) = world.request("model_statistics")["model_stats"]
    counts = {kind: stats["inference_stats"][kind]["count"] for kind in ("success", "fail", "queue")}
    if beyond > 0:
        assert world.answer(key) == "REPLY_TOO_LARGE"
        assert counts == {"success": 0, "fail": 1, "queue": 0}
    else:
        assert isinstance(world.answer(key), SendResult)
        assert counts == {"success": 1, "fail": 0, "queue": 1}
    assert world.core.runs.counters["inferences"] == counts["success"] == stats["latency_us"]["count"]


@pytest.mark.parametrize(
    "odd", [[], [["y"]], [[]], [["y", "FP32", [1], 0, "many"]], [["y", "F", None, 1, 1]]]
)
def test_outputs_that_make_no_sense_are_still_answered(odd: list[Any]) -> None:
    """The core takes them as they are: who reads them finds out, and answers."""
    world = ready_world()
    key = world.infer()
    (worker,) = [w for w in world.workers.values() if w.runs]
    world.send(RunDone(worker.id, worker.runs[0].run_id, odd, 1))
    assert isinstance(world.answer(key), SendResult)


def test_what_could_not_be_sent_has_failed() -> None:
    """It was counted as a success when its run ended; that is taken back, and its client answered."""
    world = ready_world()
    first, key = world.infer(), world.infer()
    world.finish_runs()
    before = world.request("model_statistics")["model_stats"][0]
    result = world.answer(key)
    job = result.job
    error = ResourceExhausted("no room", reason="REPLIES_UNREAD")
    unsent = Unsent(job.route, job.request_id, job.instance, job.arrived_s, error, result.counted)
    (reply,) = world.send(unsent)
    assert isinstance(reply, Reply)
    assert (reply.route, reply.header["id"]) == (job.route, job.request_id)
    assert reply.header["error"]["reason"] == "REPLIES_UNREAD"
    assert world.core.runs.refusals.counts["RESOURCE_EXHAUSTED", "REPLIES_UNREAD"] == 1
    after = world.request("model_statistics")["model_stats"][0]
    assert isinstance(world.answer(first), SendResult)
    for kind in ("success", "queue", "compute_infer"):
        assert after["inference_stats"][kind]["count"] == 1
        assert before["inference_stats"][kind]["count"] == 2
    assert after["inference_stats"]["fail"]["count"] == 1
    assert after["latency_us"]["count"] == after["inference_count"] == 1
    assert after["execution_count"] == 2
    assert world.core.runs.counters["inferences"] == 1
    kept = Unsent((b"gone", b""), 9, job.instance, job.arrived_s, error)  # a kept answer, counted as nothing
    world.send(kept)
    assert world.request("model_statistics")["model_stats"][0]["inference_stats"]["fail"]["count"] == 2
    world.send(Unsent((b"gone", b""), 9, 999, job.arrived_s, error))  # its instance is gone


def test_status_tells_everything_and_can_be_sent() -> None:
    """Every part of it is plain data, at each stage of a model's life."""
    world = World(verdicts={CPU: "ok", CUDA: "driver_error"})
    world.load_faults["bad-1"] = "MODEL_INVALID"
    for name in ("m", "bad"):
        world.put(name)
    encode(world.request("server_status"))
    world.settle()
    world.send(Sampled(sample()))
    status = world.request("server_status")
    encode(status)
    assert {row["name"]: row["state"] for row in status["models"]} == {"m": "READY", "bad": "UNAVAILABLE"}
    assert [d["status"] for d in status["devices"]] == ["ok", "driver_error"]
    assert len(status["workers"]) == 1
    assert status["resources"]["level"] == "OK"


def test_log_settings_set_the_level() -> None:
    """A level that does not exist is refused."""
    world = World()
    assert world.request("log_settings", settings={"level": "debug"})["settings"] == {"level": "debug"}
    assert [e.level for e in world.effects if isinstance(e, SetLogLevel)] == ["debug"]
    for bad in ("loud", 3, [], {"a": 1}):
        assert world.request("log_settings", settings={"level": bad})["error"]["reason"] == "BAD_PARAMETER"


def test_a_bad_message_is_answered_and_noted() -> None:
    """With the id that could be found, and one line for the log."""
    world = World()
    error = InvalidArgument("no", reason="BAD_HEADER")
    (reply,) = [e for e in world.send(BadMessage((b"\0c",), "infer", PEER, 9, error)) if isinstance(e, Reply)]
    assert reply.header == {"id": 9, "error": error.to_wire()}
    assert world.logs("client_misbehaves")[0]["REASON"] == "BAD_HEADER"


# ---- inference ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"model_name": "nobody"}, "MODEL_NOT_FOUND"),
        ({"model_version": "7"}, "VERSION_NOT_FOUND"),
        ({"inputs": []}, "MISSING_INPUT"),
        ({"inputs": [InputTensor("z", "FP32", [1], data=b"\0" * 4)]}, "UNKNOWN_INPUT"),
        ({"inputs": [InputTensor("x", "INT32", [1], data=b"\0" * 4)]}, "BAD_DATATYPE"),
        ({"inputs": [InputTensor("x", "FP32", [1, 1], data=b"\0" * 4)]}, "BAD_SHAPE"),
        ({"inputs": [InputTensor("x", "FP32", [2], data=b"\0" * 4)]}, "BAD_SIZE"),
        ({"outputs": [OutputRef("z")]}, "UNKNOWN_OUTPUT"),
        ({"outputs": [OutputRef("y"), OutputRef("y")]}, "DUPLICATE_OUTPUT"),
        ({"parameters": {"timeout": -1}}, "BAD_PARAMETER"),
        ({"parameters": {"deadline_ns": 1}}, "EXPIRED_ON_ARRIVAL"),
    ],
)
def test_each_refusal_has_its_reason(fields: dict[str, Any], reason: str) -> None:
    """Nothing that is refused reaches a worker or stays in a table."""
    world = ready_world()
    good = {"id": 1, "model_name": "m", "inputs": [InputTensor("x", "FP32", [1], data=b"\0" * 4)]}
    effects = world.send(RequestArrived((b"\0c",), "infer", PEER, Request("model_infer", **(good | fields))))
    (reply,) = [e for e in effects if isinstance(e, Reply)]
    assert reply.header["error"]["reason"] == reason
    assert reply.header["id"] == 1
    assert not [e for e in effects if isinstance(e, StartRun)]
    assert world.core.scheduler.in_flight == 0


def test_a_worker_has_two_requests_at_once_and_the_rest_wait() -> None:
    """The second waits at the worker so that it never idles; the queue has its bound."""
    world = ready_world()
    keys = [world.infer(client=bytes([0, i // 8])) for i in range(SLOTS_AT_START + 8)]
    assert len(world.process().runs) == SLOTS_AT_START
    over = world.infer(client=b"\0z")
    assert world.answer(over) == "QUEUE_FULL"
    world.finish_runs()
    assert all(isinstance(world.answer(k), SendResult) for k in keys)


def test_the_reply_tells_what_was_ignored() -> None:
    """Unknown parameters are named in the warnings."""
    world = ready_world()
    key = world.infer(sequence_id=5)
    world.finish_runs()
    assert world.answer(key).parameters["warnings"] == ["parameter 'sequence_id' was ignored"]


def test_a_deadline_is_kept_whether_it_waits_or_runs() -> None:
    """Answered when it passes; the run is asked to stop, and its late end changes nothing."""
    world = ready_world()
    keys = [world.infer(timeout=500_000) for _ in range(4)]
    world.pass_time(0.6)
    assert [world.answer(k) for k in keys] == ["DEADLINE_PASSED"] * 4
    assert len([e for e in world.effects if isinstance(e, CancelRun)]) == SLOTS_AT_START
    later = world.infer()
    world.finish_runs()
    assert isinstance(world.answer(later), SendResult)


def test_cancel_withdraws_what_waits_and_what_runs() -> None:
    """Only one's own, and only what is in flight."""
    world = ready_world()
    keys = [world.infer(id=i) for i in range(4)]
    assert world.request("cancel", client=b"\0other", cancel_id=3)["error"]["code"] == "NOT_FOUND"
    assert world.request("cancel", cancel_id=3)["cancelled"] is True
    assert world.request("cancel", cancel_id=0)["cancelled"] is True
    assert world.request("cancel", cancel_id=0)["error"]["reason"] == "NOT_IN_FLIGHT"
    assert world.request("cancel")["error"]["reason"] == "NOT_IN_FLIGHT"
    world.finish_runs()
    found = [world.answer(k) for k in keys]
    assert (found[0], found[3]) == ("CANCELLED_BY_CLIENT", "CANCELLED_BY_CLIENT")
    assert all(isinstance(f, SendResult) for f in found[1:3])


def test_an_id_in_flight_is_refused_a_second_time() -> None:
    """The first is answered as if nothing had happened."""
    world = ready_world()
    key = world.infer(id="same")
    world.infer(id="same")
    assert world.answers[key] == ["DUPLICATE_ID"]
    world.finish_runs()
    assert isinstance(world.answers[key][1], SendResult)


def test_a_crash_costs_the_request_that_ran_and_no_other() -> None:
    """Those behind it go back into the queue and are answered by the worker's successor."""
    world = ready_world()
    keys = [world.infer() for _ in range(5)]
    world.crash(world.process())
    world.settle()
    world.finish_runs()
    found = [world.answer(k) for k in keys]
    assert found[0] == "WORKER_CRASHED"
    assert all(isinstance(f, SendResult) for f in found[1:])


def test_a_run_that_hangs_is_stopped_then_its_worker_is_killed() -> None:
    """The request is answered at its limit; the worker has a moment to obey."""
    world = ready_world()
    key = world.infer()
    world.pass_time(RUN_LIMIT_S + 0.1)
    assert world.answer(key) == "RUN_TIMEOUT"
    assert not [e for e in world.effects if isinstance(e, KillWorker)]
    world.pass_time(RUN_GRACE_S)
    assert [e for e in world.effects if isinstance(e, KillWorker)]
    world.settle()
    assert world.serving().state is InstanceState.READY


def test_a_run_is_not_blamed_for_the_one_before_it() -> None:
    """Waiting at the worker behind a long run is no part of one's own limit."""
    world = World()
    world.put("m", timeout_s=10.0)
    world.settle()
    first, second = world.infer(), world.infer()
    world.pass_time(8.0)
    world.finish_run(world.process())
    world.pass_time(8.0)
    world.finish_run(world.process())
    world.settle()
    assert isinstance(world.answer(first), SendResult)
    assert isinstance(world.answer(second), SendResult)
    third = world.infer()
    world.pass_time(11.0)
    assert world.answer(third) == "RUN_TIMEOUT"


def outcomes(world: World, keys: list[Any]) -> list[str]:
    """Each request's answer: a reason, `ok`, or nothing yet."""
    found = [world.answer(key) for key in keys]
    return ["ok" if isinstance(each, SendResult) else each or "" for each in found]


def filled(world: World, count: int, **fields: Any) -> list[Any]:
    """So many requests that wait behind the two that the worker has; those two end first."""
    for _ in range(SLOTS_AT_START):
        world.infer(client=b"\0first")
    return [world.infer(**fields) for _ in range(count)]


def test_what_waits_shares_a_run() -> None:
    """One packet for all that fits; each gets its rows of the outputs; rows and runs are counted apart."""
    world = ready_world(batch_max=8)
    keys = filled(world, 3, size=2)
    world.finish_run(world.process())
    world.settle()
    run = world.process().runs[-1]
    assert (len(run.jobs), run.rows) == (3, 6)
    world.finish_runs()
    offsets = []
    for key in keys:
        result = world.answer(key)
        ((name, datatype, shape, offset, nbytes),) = result.outputs
        assert (name, datatype, shape, nbytes) == ("y", "FP32", [2], 8)
        assert result.parameters["batch_size"] == 6
        offsets.append(offset)
    assert offsets == [64, 72, 80]
    (stats,) = world.request("model_statistics")["model_stats"]
    assert (stats["inference_count"], stats["execution_count"]) == (2 * 2 + 6, 3)
    assert [each["batch_size"] for each in stats["batch_stats"]] == [2, 6]


def test_outputs_in_leased_memory_are_never_in_a_batch() -> None:
    """They are written where the client said, by a run of their own; leased inputs may share one."""
    world = ready_world(batch_max=8)
    region = world.lease()
    keys = filled(world, 2)
    keys.append(world.infer(region=region, peer=Peer(1000, 1000, 77)))
    keys.append(world.infer())
    world.finish_run(world.process())
    world.settle()
    assert len(world.process().runs[-1].jobs) == 3
    world.finish_runs()
    assert outcomes(world, keys) == ["ok"] * 4


def test_one_bad_row_fails_nobody_else() -> None:
    """The jobs of a batch that failed run again by themselves; who fails then is told so."""
    world = ready_world(batch_max=8)
    keys = filled(world, 3)
    for _ in range(SLOTS_AT_START):
        world.finish_run(world.process())
        world.settle()
    assert [len(run.jobs) for run in world.process().runs] == [3]
    world.finish_run(world.process(), fails=True)
    world.settle()
    assert [len(run.jobs) for run in world.process().runs] == [1], "the others wait for their turns"
    world.finish_run(world.process(), fails=True)
    world.settle()
    world.finish_runs()
    assert outcomes(world, keys) == ["RUNTIME_ERROR", "ok", "ok"]


def test_a_batch_that_cannot_be_taken_apart_is_run_one_by_one_from_then_on() -> None:
    """The model is told to be no model for batches, once."""
    world = ready_world(batch_max=8)
    world.bad_batches = True
    keys = filled(world, 3)
    world.finish_runs()
    assert outcomes(world, keys) == ["ok"] * 3
    (line,) = world.logs("batch_refused")
    assert "6 rows came with shape [7]" in line["DETAIL"]
    again = filled(world, 3)
    world.finish_runs()
    assert outcomes(world, again) == ["ok"] * 3
    assert len(world.logs("batch_refused")) == 1


@pytest.mark.parametrize(
    "output",
    [
        7,
        ["y", "FP32"],
        ["y", "FP32", None, None, None, b""],
        ["y", "FP32", "NN", 64, 8],
        ["y", "FP32", [6], "64", 24],
        ["y", "FP32", [6], 64, None],
    ],
)
def test_what_is_no_output_costs_nobody_of_a_batch_his_answer(output: Any) -> None:
    """A worker may say what it will: the requests run by themselves, where each is looked at alone."""
    world = ready_world(batch_max=8)
    keys = filled(world, 3)
    world.finish_run(world.process())
    world.finish_run(world.process())
    world.settle()
    run = world.process().runs.popleft()
    assert len(run.jobs) == 3
    world.process().outbox.append(RunDone(run.worker, run.run_id, [output], 1000))
    world.settle()
    world.finish_runs()
    assert outcomes(world, keys) == ["ok"] * 3
    assert world.logs("batch_refused")


def test_a_crash_in_a_batch_blames_who_crashes_again() -> None:
    """All of it run once more by themselves; the others are answered."""
    world = ready_world(batch_max=8)
    keys = filled(world, 3)
    for _ in range(SLOTS_AT_START):
        world.finish_run(world.process())
        world.settle()
    world.crash(world.process())
    world.settle()
    assert outcomes(world, keys) == [""] * 3
    assert [len(run.jobs) for run in world.process().runs] == [1, 1]
    world.finish_runs()
    assert outcomes(world, keys) == ["ok"] * 3


def test_who_ends_the_worker_takes_no_neighbour_along() -> None:
    """Even where it is the first to run again: the others wait through the pause that follows."""
    world = ready_world(batch_max=8)
    keys = filled(world, 3)
    for _ in range(SLOTS_AT_START):
        world.finish_run(world.process())
        world.settle()
    for _ in range(2):
        world.crash(world.process())
        world.settle()
    assert outcomes(world, keys) == ["WORKER_CRASHED", "", ""]
    world.pass_time(0.6)
    world.finish_runs()
    assert outcomes(world, keys) == ["WORKER_CRASHED", "ok", "ok"]


def test_a_batch_goes_on_for_as_long_as_somebody_wants_it() -> None:
    """Cancelling one of it answers that one; the run is stopped with the last."""
    world = ready_world(batch_max=8)
    keys = filled(world, 3)
    for _ in range(SLOTS_AT_START):
        world.finish_run(world.process())
        world.settle()
    for index, (client, request_id) in enumerate(keys):
        assert world.request("cancel", client=client, cancel_id=request_id)["cancelled"]
        assert len([e for e in world.effects if isinstance(e, CancelRun)]) == (index == 2)
    world.finish_runs()
    assert outcomes(world, keys) == ["CANCELLED_BY_CLIENT"] * 3


def test_several_runs_at_once_and_one_that_waits() -> None:
    """As many as the worker says that it executes, and what waits is divided among those that are free."""
    world = ready_world(instances=3, batch_max=8)
    keys = [world.infer() for _ in range(4)]
    assert len(world.process().runs) == 4
    more = [world.infer() for _ in range(6)]
    world.finish_run(world.process())
    world.finish_run(world.process())
    world.settle()
    world.finish_runs()
    assert outcomes(world, keys + more) == ["ok"] * 10


def test_a_crash_among_several_runs_costs_those_that_may_have_run() -> None:
    """The first as many as run at once; the one at the socket had not begun."""
    world = ready_world(instances=2)
    keys = [world.infer() for _ in range(4)]
    world.crash(world.process())
    world.settle()
    world.finish_runs()
    assert outcomes(world, keys) == ["WORKER_CRASHED", "WORKER_CRASHED", "ok", "ok"]


def test_the_next_run_is_there_just_before_its_turn() -> None:
    """Nothing else is: should what runs take longer than expected, only that one cannot be overtaken."""
    world = ready_world()
    world.serving().times = RunTimes([[1, 50_000]])
    keys = [world.infer() for _ in range(4)]
    world.pass_time(0.050 - 1.1 * AHEAD_MIN_S)
    assert len(world.process().runs) == 1
    world.pass_time(0.2 * AHEAD_MIN_S)
    assert len(world.process().runs) == 2
    world.pass_time(0.3)
    assert len(world.process().runs) == 2
    world.finish_runs()
    assert outcomes(world, keys) == ["ok"] * 4


def test_who_is_late_hands_over_earlier() -> None:
    """On a full machine the supervisor's turn comes late: by what it was late it begins before."""
    world = ready_world()
    for _ in range(50):
        world.serving().times = RunTimes([[1, 50_000]])
        keys = [world.infer() for _ in range(2)]
        world.now_s += 0.051
        world.tick()
        assert len(world.process().runs) == 2
        world.finish_runs()
        assert outcomes(world, keys) == ["ok"] * 2
    world.serving().times = RunTimes([[1, 50_000]])
    keys = [world.infer() for _ in range(2)]
    world.pass_time(0.050 - 1.1 * AHEAD_MAX_S)
    assert len(world.process().runs) == 1
    world.pass_time(0.2 * AHEAD_MAX_S)
    assert len(world.process().runs) == 2


def test_long_runs_are_handed_over_one_by_one() -> None:
    """So that a request of priority 1 waits for the run that runs, and for no other."""
    world = ready_world()
    world.serving().times = RunTimes([[1, 50_000]])
    keys = [world.infer() for _ in range(3)]
    assert len(world.process().runs) == 1
    urgent = world.infer(priority=1)
    world.finish_run(world.process())
    world.settle()
    assert world.process().runs[0].jobs[0].request_id == urgent[1]
    world.finish_runs()
    assert outcomes(world, keys) == ["ok"] * 3


def test_a_batch_may_be_waited_for_where_the_owner_says_so() -> None:
    """No longer than that, no longer than a deadline allows, and not once it is full."""
    world = ready_world(batch_max=8, max_queue_delay_s=0.1)
    early = world.infer()
    world.pass_time(0.05)
    later = world.infer()
    assert not world.process().runs
    world.pass_time(0.051)
    assert [len(run.jobs) for run in world.process().runs] == [2]
    world.finish_runs()
    urgent = world.infer(timeout=20_000)
    world.pass_time(0.0195)
    assert world.process().runs, "it runs before its deadline, and not after the delay"
    world.finish_runs()
    full = [world.infer() for _ in range(4)]
    assert len(world.process().runs) == 1, "a full batch waits for nothing"
    world.finish_runs()
    assert outcomes(world, [early, later, urgent, *full]) == ["ok"] * 7


def test_a_batch_is_as_large_as_it_pays_or_as_the_owner_says() -> None:
    """Rows that cost what a run costs are not put together, unless `max_batch_size` asks for it."""
    for owners, jobs in (({}, [1, 1]), ({"max_batch_size": 4}, [3])):
        world = ready_world(batch_max=4, **owners)
        world.serving().times = RunTimes([[1, 60], [2, 120], [4, 240]])
        filled(world, 3, size=1)
        for _ in range(SLOTS_AT_START):
            world.finish_run(world.process())
            world.settle()
        assert [len(run.jobs) for run in world.process().runs] == jobs


def test_what_cannot_be_in_time_is_refused_at_once() -> None:
    """By what is ahead of it; with when to ask again; and never while nothing is ahead."""
    world = ready_world()
    world.serving().times = RunTimes([[1, 50_000]])
    tries = world.infer(timeout=10_000)
    assert world.process().runs, "an idle model tries, whatever it thinks"
    fits = world.infer(timeout=120_000)
    late = world.infer(timeout=120_000)
    assert outcomes(world, [tries, fits, late]) == ["", "", "CANNOT_MEET_DEADLINE"]
    (error,) = [e.header["error"] for e in world.effects if isinstance(e, Reply) and "error" in e.header]
    assert error["code"] == "DEADLINE_EXCEEDED"
    assert 25 <= error["retry_after_ms"] <= 35
    ahead = world.infer(timeout=120_000, priority=1)
    assert outcomes(world, [ahead]) == [""], "what waits in a worse level is not ahead of it"


def test_a_turn_that_comes_too_late_is_given_to_the_next() -> None:
    """What can no longer be in time is answered instead of run, unless nobody waits for its place."""
    world = ready_world()
    world.serving().times = RunTimes([[1, 50_000]])
    for _ in range(2):
        world.infer(priority=1)
    first = world.infer(timeout=175_000)
    second = world.infer()
    world.pass_time(0.11)
    world.finish_run(world.process())
    world.settle()
    world.pass_time(0.055)
    assert outcomes(world, [first]) == ["CANNOT_MEET_DEADLINE"]
    assert len(world.process().runs) == 2
    world.finish_runs()
    assert outcomes(world, [second]) == ["ok"]


def test_a_full_queue_gives_way_to_a_better_priority_and_to_another_client() -> None:
    """Who loses its place is told so, with when to ask again."""
    world = ready_world()
    world.serving().times = RunTimes([[1, 50_000]])
    keys = [world.infer() for _ in range(9)]
    other = world.infer(client=b"\0o", peer=Peer(1, 1, 1))
    high = world.infer(client=b"\0o", peer=Peer(1, 1, 1), priority=1)
    assert outcomes(world, [other, high]) == ["", ""]
    assert outcomes(world, keys) == [""] * 7 + ["QUEUE_FULL"] * 2
    error = next(e.header["error"] for e in reversed(world.effects) if isinstance(e, Reply))
    assert 300 <= error["retry_after_ms"] <= 500
    world.finish_runs()
    assert outcomes(world, [*keys[:7], other, high]) == ["ok"] * 9


def test_the_same_question_is_answered_without_a_run() -> None:
    """Where the owner says so: the same bytes, names, shapes and wanted outputs; and it is counted."""
    world = ready_world(cache=CacheSettings(1 << 20))
    first = world.infer(size=3)
    world.finish_runs()
    assert outcomes(world, [first]) == ["ok"]
    again, other = world.answer(world.infer(size=3)), world.infer(size=4)
    assert isinstance(again, SendKept)
    assert again.parameters["cache"] == "hit"
    assert again.outputs == (("y", "FP32", [1], b"\1" * 4),)
    assert len(world.process().runs) == 1
    world.finish_runs()
    assert outcomes(world, [other]) == ["ok"]
    (stats,) = world.request("model_statistics")["model_stats"]
    assert (stats["inference_count"], stats["execution_count"]) == (3, 2)
    assert stats["inference_stats"]["cache_hit"] == {"count": 1, "ns": 1000}
    assert stats["inference_stats"]["cache_miss"] == {"count": 2, "ns": 2000}
    status = world.request("server_status")
    assert status["cache"]["entries"] == status["models"][0]["cache"]["entries"] == 2


def test_what_is_kept_goes_with_its_model_and_when_memory_is_short() -> None:
    """Nothing of a version that was replaced is answered; the guard's word empties all."""
    world = ready_world(cache=CacheSettings(1 << 20))
    world.infer()
    world.finish_runs()
    world.put("m", "2", cache=CacheSettings(1 << 20))
    world.settle()
    assert world.core.cache.snapshot() == {"entries": 0, "bytes": 0}
    key = world.infer()
    world.finish_runs()
    assert outcomes(world, [key]) == ["ok"]
    assert world.core.cache.snapshot()["entries"] == 1
    world.send(Sampled(sample(free=1 << 20)))
    assert world.core.cache.snapshot() == {"entries": 0, "bytes": 0}
    key = world.infer(size=7)
    world.finish_runs()
    assert outcomes(world, [key]) == ["ok"]
    assert world.core.cache.snapshot()["entries"] == 0, "nothing is kept while memory is short"


def test_leased_memory_and_models_without_a_cache_are_never_kept() -> None:
    """The client may change the one; the other's owner did not ask for it."""
    world = ready_world(cache=CacheSettings(1 << 20))
    region = world.lease()
    keys = [world.infer(region=region), world.infer(region=region)]
    world.finish_runs()
    plain = ready_world()
    keys_of_plain = [plain.infer(), plain.infer()]
    plain.finish_runs()
    assert outcomes(world, keys) == outcomes(plain, keys_of_plain) == ["ok"] * 2
    assert world.core.cache.snapshot()["entries"] == plain.core.cache.snapshot()["entries"] == 0


def test_a_failed_run_is_answered_with_its_reason() -> None:
    """And logged, since it is the daemon's or the runtime's fault."""
    world = ready_world()
    key = world.infer()
    world.finish_run(world.process(), fails=True)
    world.settle()
    assert world.answer(key) == "RUNTIME_ERROR"
    assert world.logs("request_internal_error")


def test_the_end_of_a_run_that_nobody_knows_changes_nothing() -> None:
    """A worker that tells twice, or of what never was."""
    world = ready_world()
    assert world.send(RunDone(1, 999, [], 1)) == []


# ---- the rest -------------------------------------------------------------------------------------------


def test_pressure_is_told_and_memory_given_back() -> None:
    """Once for each change of level."""
    world = ready_world()
    for _ in range(3):
        world.send(Sampled(sample(free=500 * MIB)))
    assert len(world.logs("pressure_changed")) == 1
    assert len([e for e in world.effects if isinstance(e, ShrinkWorkers)]) == 1


def test_a_new_configuration_holds_for_what_can_change() -> None:
    """Bounds and the level of the log; what serves goes on."""
    world = ready_world()
    new = config(limits__queue_length=1, log__level="debug")
    world.send(ConfigChanged(new))
    assert [e.level for e in world.effects if isinstance(e, SetLogLevel)] == ["debug"]
    for _ in range(SLOTS_AT_START + 1):
        world.infer()
    assert world.answer(world.infer()) == "QUEUE_FULL"


def test_stopping_finishes_what_runs_and_refuses_what_comes() -> None:
    """The daemon leaves with the last answer, not at the end of the grace."""
    world = ready_world()
    keys = [world.infer() for _ in range(4)]
    world.send(ShutdownAsked())
    world.send(ShutdownAsked())
    assert world.answer(world.infer()) == "SERVER_STOPPING"
    assert world.exits == 0
    world.finish_runs()
    assert all(isinstance(world.answer(k), SendResult) for k in keys)
    assert world.exits == 1
    assert world.core.next_due_s() is None or world.core.next_due_s() != math.inf


def test_stopping_ends_with_the_grace_at_the_latest() -> None:
    """What has not finished is answered so."""
    world = ready_world()
    keys = [world.infer() for _ in range(4)]
    world.send(ShutdownAsked())
    world.pass_time(world.core.around.config.server.shutdown_grace_s + 0.1)
    assert [world.answer(k) for k in keys] == ["SERVER_STOPPING"] * 4
    assert world.exits == 1


def test_no_memory_is_leased_while_it_is_short() -> None:
    """Quotas are per user; the guard's word holds for all together."""
    world = World()
    world.send(Sampled(sample(free=200 << 20)))
    world.lease()
    (reply,) = [e for e in world.effects if isinstance(e, Reply)]
    assert reply.route == (world.lane,)
    assert reply.header["error"]["reason"] == "MEMORY_PRESSURE"
    assert world.core.regions.snapshot()["bytes"] == 0


def test_memory_that_the_system_asks_for_is_given_back_at_any_level() -> None:
    """By one order, which the guard's own word does not double."""
    world = ready_world()
    assert [type(e) for e in world.send(Sampled(sample(), pressed=True))].count(ShrinkWorkers) == 1
    assert [type(e) for e in world.send(Sampled(sample()))].count(ShrinkWorkers) == 0
    low = sample(free=100 * MIB)
    assert [type(e) for e in world.send(Sampled(low, pressed=True))].count(ShrinkWorkers) == 1


def test_a_lane_that_ends_takes_its_requests_along() -> None:
    """Those that wait never run, the one that runs is stopped, others keep their place."""
    world = ready_world()
    lane = world.connected()
    mine = [world.infer(client=lane) for _ in range(5)]
    other = world.infer()
    running = list(world.process().runs)
    effects = world.send(LaneClosed(lane))
    assert [world.answer(key) for key in mine] == ["CANCELLED_BY_CLIENT"] * 5
    assert {e.run_id for e in effects if isinstance(e, CancelRun)} == {run.run_id for run in running}
    world.finish_runs()
    assert isinstance(world.answer(other), SendResult)
    assert len(world.process().runs) == 0
    assert not world.core.scheduler.clients


def test_a_lane_is_a_client_like_others() -> None:
    """Its ids and its bound in flight are its own, and it withdraws only what is its own."""
    world = ready_world()
    world.send(ConfigChanged(config(limits__inflight_per_client=2)))
    lane = world.connected()
    first = world.infer(client=lane, id=1)
    second = world.infer(id=1)
    world.infer(client=lane, id=1)
    assert world.answers.pop(first) == ["DUPLICATE_ID"]
    world.asked[first] -= 1
    third = world.infer(client=lane, id=2)
    assert world.answer(world.infer(client=lane, id=3)) == "TOO_MANY_IN_FLIGHT"
    assert world.request("cancel", client=lane, cancel_id=2)["cancelled"]
    assert world.answer(third) == "CANCELLED_BY_CLIENT"
    world.finish_runs()
    assert isinstance(world.answer(first), SendResult)
    assert isinstance(world.answer(second), SendResult)
