"""The core: methods, refusals, deadlines and crashes, and that every request is answered exactly once."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edged.core import RUN_GRACE_S, RUN_LIMIT_S
from edged.errors import InvalidArgument
from edged.events import (
    BadMessage,
    CancelRun,
    ConfigChanged,
    DevicesChanged,
    KillWorker,
    Reply,
    RequestArrived,
    RunDone,
    Sampled,
    SendResult,
    SetLogLevel,
    ShrinkWorkers,
    ShutdownAsked,
    StartRun,
)
from edged.instances import SLOTS_PER_WORKER, InstanceState
from edged.messages import InputTensor, OutputRef, Request
from tests.world import CPU, CUDA, MIB, OV_CPU, PEER, World, config, sample


def ready_world(**kinds: Any) -> World:
    """A world in which model `m` serves."""
    world = World(**kinds)
    world.put("m")
    world.settle()
    assert world.serving().state is InstanceState.READY
    return world


# ---- any sequence of events -----------------------------------------------------------------------------

CLIENTS = st.sampled_from([b"\0a", b"\0b", b"\0d"])
MODELS = st.sampled_from(["m", "n", "g"])
STEPS = st.one_of(
    st.tuples(st.just("infer"), MODELS, CLIENTS, st.sampled_from([0, 500_000, 5_000_000]), st.integers(0, 9)),
    st.tuples(st.just("infer"), MODELS, CLIENTS, st.just(0), st.just(0)),
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
    st.tuples(st.just("finish_loads")),
    st.tuples(st.just("sample"), st.sampled_from([8 << 30, 1 << 20])),
    st.tuples(st.just("devices")),
    st.tuples(st.just("measured"), st.floats(1, 2000)),
    st.tuples(st.just("fault"), st.booleans()),
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
            world.infer(model, client=client, timeout=timeout, priority=priority)
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
            alive = [w for w in world.workers.values() if w.alive]
            if alive:
                world.crash(alive[which % len(alive)])
        case ("put", model, content, swap):
            world.put(model, content, swap=swap, device="cuda" if model == "g" else "auto")
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
        case ("fault", on):
            world.fault = "the models folder is gone" if on else None
            world.scans.append(world.now_s)
        case _:
            raise AssertionError(step)


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(STEPS, max_size=60))
def test_any_day_ends_with_every_request_answered_once(day: list[tuple[Any, ...]]) -> None:
    """Whatever happens and in whatever order, stop finds each request with exactly one reply."""
    world = World(verdicts={CPU: "ok", OV_CPU: "ok", CUDA: "ok"})
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
    world.pass_time(world.core.config.server.shutdown_grace_s)
    assert world.exits >= 1
    assert {key: len(world.answers.get(key, ())) for key in world.asked} == dict(world.asked)
    scheduler = world.core.scheduler
    assert (scheduler.in_flight, scheduler.clients, scheduler._bytes) == (0, 0, 0)


def recovers(world: World) -> None:
    """With nothing more in the way, whatever the folder has serves or says why it does not."""
    world.fault = None
    world.hold_loads = False
    world.finish_loads()
    world.send(Sampled(sample()))
    world.scans.append(world.now_s)
    for _ in range(12):
        world.pass_time(25.0)
        world.finish_runs()
    world.send(Sampled(sample()))
    world.pass_time(30.0)
    world.finish_runs()
    assert world.core.state == "ready"
    for key, entry in world.folder.items():
        track = world.life.tracks[key]
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
    assert world.life.names() == names
    held = {w for w in world.life.workers}
    assert held == {i.worker for i in world.life.instances.values()}
    for worker in world.workers.values():
        want = world.life.workers[worker.id].instances if worker.id in held else set()
        assert not worker.alive or worker.loaded == want, "a worker holds models that nobody knows of"
