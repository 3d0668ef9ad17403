"""A model's way, move by move: loading, swapping, draining, failing, coming back."""

from __future__ import annotations

from typing import Any

import pytest

from edged.choosing import IDLE_FIRST_S
from edged.devices import Candidate, Verdict
from edged.errors import NotFound, Unavailable
from edged.events import (
    CancelLoad,
    Collect,
    DevicesChanged,
    EndAttempt,
    EndWorker,
    ForgetModel,
    HashCopy,
    KillWorker,
    LoadInstance,
    Log,
    MarkGood,
    PrepareLoad,
    Probe,
    Publish,
    Ready,
    RememberChoice,
    RememberVerdict,
    Sampled,
    Stage,
    StartWorker,
    UnloadInstance,
    WorkerGone,
)
from edged.instances import BACKOFF_MAX_S, MOVES, InstanceState
from edged.lifecycle import SPOILT_MAX, STABLE_S
from edged.retirement import DRAIN_S
from tests.test_core import ready_world
from tests.world import CPU, CUDA, GPU, MIB, OV_CPU, World, config, sample

S = InstanceState


PROOF = "2 "
"""By what a choice was allowed, where there are no tables."""


def reason_of(world: World, name: str = "m", version: str = "") -> str | None:
    """Why a model cannot be asked."""
    with pytest.raises((Unavailable, NotFound)) as caught:
        world.registry.lookup(name, version)
    assert caught.value.message.strip().rstrip(":") != f"model '{name}'"
    return caught.value.reason


# ---- the table ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", S)
def test_a_move_that_is_not_in_the_table_is_a_bug(state: InstanceState) -> None:
    """Every state can be left only for those that the table names, and every state is in it."""
    world = ready_world()
    instance = world.serving()
    assert set(MOVES) == set(S)
    for target in S:
        instance.state = state
        if target in MOVES[state]:
            instance.move(target, "R", "a message")
            assert (instance.state, instance.reason) == (target, "R")
        else:
            with pytest.raises(AssertionError):
                instance.move(target, "R", "a message")


def test_every_state_leads_to_the_end() -> None:
    """No instance can be stuck for want of a move."""
    for state in S:
        reached = {state}
        while more := {t for s in reached for t in MOVES[s]} - reached:
            reached |= more
        assert S.GONE in reached


# ---- loading and swapping -------------------------------------------------------------------------------


def test_a_dropped_model_serves_after_its_stations() -> None:
    """Staged, recorded, loaded, remembered as good, told."""
    world = ready_world()
    kinds = [type(e) for e in world.effects]
    way = [Stage, PrepareLoad, StartWorker, LoadInstance, EndAttempt, MarkGood, Collect]
    assert [k for k in kinds if k in way] == way
    states = [
        e.payload["state"] for e in world.effects if isinstance(e, Publish) and e.topic == "model.state"
    ]
    assert states == ["LOADING", "LOADING", "READY"]
    seqs = [e.payload["seq"] for e in world.effects if isinstance(e, Publish)]
    assert seqs == list(range(1, len(seqs) + 1))
    assert world.core.state == "ready"


def test_the_old_version_serves_until_the_new_one_has_loaded() -> None:
    """Traffic moves in one step; what the old one runs is finished before it ends."""
    world = ready_world()
    old = world.serving()
    world.hold_loads = True
    world.put("m", "2")
    world.settle()
    assert world.serving() is old
    running = world.infer("m")
    world.finish_loads()
    world.settle()
    new = world.serving()
    assert (new.version, old.state) == (2, S.DRAINING)
    assert world.answer(running) is None
    assert not [e for e in world.effects if isinstance(e, UnloadInstance)]
    world.finish_runs()
    assert world.answer(running).version == "1"
    assert old.state is S.GONE
    assert set(world.registry.instances) == {new.id}
    assert set(world.core.workers.table) == {new.worker}


def test_content_that_fails_leaves_the_old_version_serving() -> None:
    """The failure shows beside the version that serves, and is not tried again by itself."""
    world = ready_world()
    old = world.serving()
    world.load_faults["m-2"] = "GOLDEN_MISMATCH"
    world.put("m", "2")
    world.settle()
    assert world.serving() is old
    assert world.reasons() == {("m", "1"): "READY", ("m", "2"): "UNAVAILABLE"}
    assert reason_of(world, "m", "2") == "GOLDEN_MISMATCH"
    loads = len(world.loads())
    world.pass_time(300.0)
    world.put("m", "2")
    world.settle()
    assert len(world.loads()) == loads
    world.put("m", "1")
    world.settle()
    assert world.serving() is old
    assert world.reasons() == {("m", "1"): "READY"}


def test_content_on_its_way_is_given_up_for_newer_content() -> None:
    """The worker that loads it is ended; only the newest comes to serve."""
    world = World()
    world.hold_loads = True
    world.put("m", "1")
    world.settle()
    world.put("m", "2")
    world.settle()
    world.hold_loads = False
    world.finish_loads()
    world.settle()
    assert world.serving().staged.digest == "m-2"
    assert len(world.core.workers.table) == 1
    assert len([e for e in world.effects if isinstance(e, KillWorker)]) == 1


def test_settings_alone_make_a_new_instance() -> None:
    """The same bytes under other settings are loaded beside."""
    world = ready_world()
    world.put("m", "1", precision="fast")
    world.settle()
    assert world.serving().settings.precision == "fast"
    assert len(world.loads()) == 2


@pytest.mark.parametrize("busy", [False, True])
def test_replace_makes_room_before_it_loads(busy: bool) -> None:
    """`swap = "replace"` ends the old version first, whether it is idle or has something to finish."""
    world = World()
    world.put("m", "1", swap="replace")
    world.settle()
    key = world.infer("m") if busy else None
    world.put("m", "2", swap="replace")
    world.settle()
    if busy:
        assert len(world.loads()) == 1
        assert reason_of(world) == "MODEL_LOADING"
        world.finish_runs()
        assert world.answer(key).version == "1"
    assert world.serving().version == 2
    kinds = [type(e) for e in world.effects if isinstance(e, (UnloadInstance, LoadInstance))]
    assert kinds == [LoadInstance, UnloadInstance, LoadInstance]


def test_replace_puts_the_old_version_back_when_the_new_one_fails() -> None:
    """Making room must not end in nothing."""
    world = World()
    world.put("m", "1", swap="replace")
    world.settle()
    world.load_faults["m-2"] = "MODEL_INVALID"
    world.put("m", "2", swap="replace")
    world.settle()
    assert world.serving().version == 1
    assert world.reasons() == {("m", "1"): "READY", ("m", "2"): "UNAVAILABLE"}


def test_replace_needs_no_memory_for_two() -> None:
    """What the old version holds counts as free for the one that takes its place."""
    world = World()
    world.put("m", "1", swap="replace")
    world.settle()
    world.send(Sampled(sample(supervisor_rss_bytes=(4 << 30) * 95 // 100)))
    assert world.core.around.guard is not None
    world.core.workers.table[world.serving().worker].rss_bytes = 1 << 30
    world.put("m", "2", swap="replace")
    world.settle()
    assert world.serving().version == 2


# ---- refusals -------------------------------------------------------------------------------------------


def test_a_folder_of_models_that_no_device_runs_is_refused_one_by_one() -> None:
    """Hundreds of refusals in one go: each has its reason, and none disturbs the next."""
    world = World(verdicts={CPU: "not_installed", OV_CPU: "not_installed"})
    for i in range(300):
        world.put(f"m{i}")
    world.settle()
    assert {t.failure.reason for t in world.registry.tracks.values() if t.failure} == {"DEVICE_UNAVAILABLE"}
    assert reason_of(world, "m7") == "DEVICE_UNAVAILABLE"
    assert world.core.state == "ready"


def test_a_refusal_before_another_model_does_not_hold_it_up() -> None:
    """The queue of loads goes on behind a model that cannot be loaded at all."""
    world = World(verdicts={CPU: "ok"}, boot=False)
    world.put("a", device="cuda", policy="require")
    world.put("b")
    world.boot()
    world.settle()
    assert reason_of(world, "a") == "DEVICE_UNAVAILABLE"
    assert world.serving("b").state is S.READY


def test_a_quarantined_content_is_loaded_only_when_asked() -> None:
    """It took the machine down twice: other content is tried by itself, the same by request."""
    world = World()
    world.quarantined.add("m-1")
    world.put("m")
    world.settle()
    assert reason_of(world) == "MODEL_QUARANTINED"
    assert not world.loads()
    world.request("repository_model_load", model_name="m")
    world.settle()
    assert world.serving().state is S.READY


def test_a_copy_that_was_disturbed_is_tried_again_without_a_word() -> None:
    """Someone still writes: no failure in the log, and the model serves when it is whole."""
    world = World()
    world.stage_faults["m-1"] = ("BEING_WRITTEN", True)
    world.put("m")
    world.settle()
    assert reason_of(world) == "BEING_WRITTEN"
    assert not world.logs("model_failed")
    del world.stage_faults["m-1"]
    world.pass_time(10.0)
    assert world.serving().state is S.READY
    assert world.registry.tracks["m", None].failure is None


def test_memory_pressure_holds_a_load_back_until_it_eases() -> None:
    """The refusal is told once, with figures, and considered again."""
    world = World()
    world.send(Sampled(sample(free=100 * MIB)))
    world.put("m")
    world.settle()
    world.pass_time(20.0)
    assert not world.loads()
    assert world.core.state == "ready"
    assert len(world.logs("load_refused")) == 1
    assert reason_of(world) == "MODEL_LOADING"
    world.send(Sampled(sample()))
    world.pass_time(6.0)
    assert world.serving().state is S.READY


# ---- where ----------------------------------------------------------------------------------------------


def test_a_load_falls_back_to_the_next_device_and_says_why() -> None:
    """The reply's reason names the device that was wanted and what it said."""
    world = World(verdicts={CPU: "ok", OV_CPU: "ok", CUDA: "ok"})
    world.load_faults[CUDA] = "DEVICE_FAILED"
    world.put("m", device="cuda")
    world.settle()
    assert world.loads() == [CUDA, CPU]
    assert "onnxruntime:CUDA:0" in world.serving().fallback_reason
    assert world.logs("device_fallback")
    assert [e.device for e in world.effects if isinstance(e, Probe)][-1] == "CUDA:0"


def test_a_missing_device_is_a_fallback_with_its_hint() -> None:
    """`prefer` runs elsewhere and says what is missing, `require` does not run."""
    verdicts = {CPU: "ok", CUDA: "no_permission"}
    world = World(verdicts=verdicts)
    world.put("m", device="cuda")
    world.put("r", device="cuda", policy="require")
    world.settle()
    assert world.serving().fallback_reason == "onnxruntime:CUDA:0 is no_permission: a hint about CUDA:0"
    assert reason_of(world, "r") == "DEVICE_UNAVAILABLE"
    verdicts[CUDA] = "ok"
    world.core.placement.probe(CUDA)
    for effect in world.core._out:
        world.carry(effect)
    world.settle()
    assert world.serving("r").candidate == CUDA


def test_content_that_one_runtime_refuses_is_offered_to_another() -> None:
    """A model that every runtime refuses has the first one's reason."""
    world = World(verdicts={CPU: "ok", OV_CPU: "ok", CUDA: "ok"})
    world.load_faults["m-1", CUDA] = "MODEL_INVALID"
    world.put("m")
    world.settle()
    assert world.loads() == [CUDA, OV_CPU]
    world.load_faults["n-1"] = "MODEL_INVALID"
    world.put("n")
    world.settle()
    assert world.loads()[2:] == [CUDA, OV_CPU]
    assert world.registry.tracks["n", None].failure.message.startswith("n-1 on onnxruntime:CUDA:0")


def test_a_remembered_choice_goes_first() -> None:
    """What was measured before is where it starts."""
    world = World(verdicts={CPU: "ok", OV_CPU: "ok"})
    compared = {str(CPU): "1.0", str(OV_CPU): "1.0"}
    choice = {"runtime": "openvino", "device": "CPU", "compared": compared, "proof": PROOF}
    world.choices["m-1"] = choice
    world.put("m")
    world.settle()
    assert world.loads() == [OV_CPU]
    assert world.serving().choice == "remembered"


def test_a_new_content_does_not_start_where_only_the_old_one_was_proven() -> None:
    """That one answered alike on another runtime; whether this one does is found out first."""
    world = World(verdicts={CPU: "ok", OV_CPU: "ok"})
    compared = {str(CPU): "1.0", str(OV_CPU): "1.0"}
    choice = {"runtime": "openvino", "device": "CPU", "compared": compared, "proof": PROOF}
    world.choices["m-1"] = choice
    world.put("m")
    world.settle()
    world.put("m", "2")
    world.settle()
    assert world.loads() == [OV_CPU, CPU]
    assert (world.serving().candidate, world.serving().choice) == (CPU, "default")
    world.put("m", "3")
    world.settle()
    assert (world.serving().candidate, world.serving().choice) == (CPU, "inherited")


def test_loads_take_turns() -> None:
    """One at a time on a device, the others wait; another device's load does not."""
    world = World(verdicts={CPU: "ok", GPU: "ok"})
    world.hold_loads = True
    for name in ("a", "b", "c"):
        world.put(name, device="cpu")
    world.put("g", device="gpu")
    world.settle()
    assert world.loads() == [CPU, GPU]
    for n in (3, 4):
        world.finish_loads()
        world.settle()
        assert len(world.loads()) == n


def test_small_content_that_has_served_loads_beside_others() -> None:
    """As many as there are CPUs, and the large or new one beside them; what is new takes its turn."""
    world = World()
    world.hold_loads = True
    world.served = {f"{name}-1" for name in "abcdefg"}
    for name in ("new", *"abcdefg", "newer"):
        world.put(name, device="cpu")
    world.settle()
    loading = [i.name for i in world.registry.instances.values() if i.state is S.LOADING]
    assert loading == ["new", "a", "b", "c", "d"]
    world.finish_loads()
    world.settle()
    assert len(world.loads()) == 9


def test_what_was_proved_about_batches_is_not_proved_again_at_the_next_start() -> None:
    """By the same version of the runtime, in the same setup."""
    world = World()
    world.batch_max, world.batch_times_us = 4, [[1, 100.0], [4, 200.0]]
    world.put("m")
    world.settle()
    (kept,) = [e.choice for e in world.effects if isinstance(e, RememberChoice)]
    for version, settings, want in (("1.0", {}, True), ("0.9", {}, False), ("1.0", {"threads": 2}, False)):
        again = World()
        again.choices["m-1"] = {"batches": {k.replace("1.0", version): v for k, v in kept["batches"].items()}}
        again.put("m", **settings)
        again.settle()
        (spec,) = [e.spec for e in again.effects if isinstance(e, LoadInstance)]
        assert ("known_batch" in spec) == want
        if want:
            assert spec["known_batch"] == {"max": 4, "times_us": [[1, 100.0], [4, 200.0]], "why": ""}


def test_a_worker_that_is_started_again_proves_nothing_again() -> None:
    """Requests wait for it, and what the same content showed in the same setup moments ago still holds."""
    world = World()
    world.batch_max, world.batch_times_us = 4, [[1, 100.0], [4, 200.0]]
    world.put("m")
    world.settle()
    found = world.registry.tracks["m", None].serving
    assert found is not None
    world.crash(world.process())
    world.settle()
    first, second = [e.spec for e in world.effects if isinstance(e, LoadInstance)]
    assert "known_batch" not in first
    assert second["known_batch"] == found.info["batch"]
    assert second["known_batch"]["max"] == 4


def test_content_whose_load_was_interrupted_loads_alone() -> None:
    """If it takes the daemon with it again, nobody else was loading, so nobody else is blamed."""
    world = World()
    world.hold_loads = True
    world.served = {"a-1", "b-1", "c-1"}
    world.interrupted = {"b-1": 1}
    for name in "abc":
        world.put(name)
    world.settle()
    seen = []
    for _ in range(2):
        seen.append(sorted(i.name for i in world.registry.instances.values() if i.state is S.LOADING))
        world.finish_loads()
        world.settle()
    assert seen == [["a", "c"], ["b"]]


def test_what_an_earlier_life_probed_is_relied_upon_until_it_is_asked_again() -> None:
    """A start waits for no probe; when the daemon is idle each device is asked, and what is true is told."""
    world = World(verdicts={}, boot=False)
    world.statuses = {CPU: "ok", OV_CPU: "ok", CUDA: "ok"}
    placement = world.core.placement
    placement.assume(Verdict("onnxruntime", "CPU", "ok", runtime_version="1.0"))
    placement.assume(Verdict("onnxruntime", "CUDA:0", "absent"))
    placement.assume(Verdict("openvino", "CPU", "ok", runtime_version="1.0"))
    world.put("m")
    world.settle()
    assert world.loads() == [CPU]
    assert not [e for e in world.effects if isinstance(e, Probe)]
    world.pass_time(IDLE_FIRST_S + 0.5)
    assert [e.device for e in world.effects if isinstance(e, Probe)] == ["CPU", "CUDA:0", "CPU"]
    assert placement.verdicts[CUDA] == Verdict("onnxruntime", "CUDA:0", "ok", runtime_version="1.0")
    assert [fields["DEVICE"] for fields in world.logs("device_verdict")][3:] == ["CUDA:0"]
    assert {m.spec["candidate"]["device"] for m in world.measures.values()} == {"CUDA:0"}


def test_only_verdicts_that_last_are_kept_for_the_next_start() -> None:
    """A CPU that works, and what is not there; a driver that worked may hang the next time."""
    world = World(
        verdicts={CPU: "ok", CUDA: "ok", GPU: "absent", Candidate("openvino", "NPU"): "busy"},
    )
    world.settle()
    kept = {(e.device, e.verdict is not None) for e in world.effects if isinstance(e, RememberVerdict)}
    assert kept == {("CPU", True), ("CUDA:0", False), ("GPU.0", True), ("NPU", False)}


def test_the_first_load_waits_a_moment_for_a_better_device() -> None:
    """Two seconds for the verdict that is out, and no longer; and nothing spins meanwhile."""
    for late, want in ((1.0, CUDA), (5.0, CPU)):
        world = World(verdicts={CPU: "ok", CUDA: "ok"}, boot=False)
        world.put("m")
        world.boot()
        cuda = next(p for p in world.probes if p.verdict["device"] == "CUDA:0")
        world.probes.remove(cuda)
        world.pass_time(late)
        world.send(cuda)
        world.settle()
        assert world.loads() == [want]


# ---- crashes --------------------------------------------------------------------------------------------


def test_a_worker_that_dies_is_started_again_at_once_then_with_growing_pauses() -> None:
    """What waits is kept over the first restart; later ones refuse at once and say when to come back."""
    world = ready_world()
    pauses = []
    for turn in range(9):
        at = world.now_s
        world.crash(world.process())
        world.settle()
        if turn:
            assert world.serving().state is S.RESTARTING
            assert reason_of(world) == "WORKER_CRASHED"
        while world.serving().state is not S.READY:
            world.pass_time(0.25)
        pauses.append(world.now_s - at)
    assert pauses == sorted(pauses)
    assert pauses[:4] == [0.0, 0.5, 1.0, 2.0]
    assert pauses[-1] == BACKOFF_MAX_S
    assert world.serving().restarts == 9
    world.pass_time(STABLE_S + 1)
    world.crash(world.process())
    world.settle()
    assert world.serving().state is S.READY


def test_a_worker_may_crash_for_days() -> None:
    """The pause stays the longest one: no figure overflows, however often it was doubled."""
    world = ready_world()
    world.serving().crashes = 5000
    world.crash(world.process())
    world.settle()
    assert world.serving().due_s == world.now_s + BACKOFF_MAX_S
    assert reason_of(world) == "WORKER_CRASHED"


def test_a_load_that_takes_too_long_is_ended() -> None:
    """The worker is killed, the reason says it, and the next model has its turn."""
    world = World()
    world.hold_loads = True
    world.put("m")
    world.settle()
    world.put("n")
    world.pass_time(121.0)
    assert reason_of(world) == "MODEL_LOAD_TIMEOUT"
    world.finish_loads()
    world.settle()
    assert world.serving("n").state is S.READY


def test_a_neighbours_crash_does_not_condemn_a_model_that_loads() -> None:
    """On a shared worker the load is tried once more; a load that itself crashes ends there."""
    world = World(verdicts={CUDA: "ok"})
    world.put("m")
    world.settle()
    world.hold_loads = True
    world.put("n")
    world.settle()
    world.crash(world.process())
    world.settle()
    world.hold_loads = False
    world.finish_loads()
    world.settle()
    assert world.serving("m").state is S.READY
    assert world.serving("n").state is S.READY
    world.load_faults["o-1"] = "CRASH"
    world.put("o")
    world.settle()
    world.pass_time(10.0)
    assert reason_of(world, "o") == "WORKER_CRASHED"
    assert world.serving("m").state is S.READY


def test_a_worker_that_dies_of_made_up_rows_is_loaded_without_them() -> None:
    """What the trial of batches does to a model is not held against it; it serves, one request at a time."""
    world = World()
    world.load_faults["m-1"] = "PROVING"
    world.put("m")
    world.settle()
    assert world.serving().state is S.READY
    assert [e.spec["max_batch_size"] for e in world.effects if isinstance(e, LoadInstance)] == [None, 1]
    assert "killed by SIGFPE" in world.logs("batch_refused")[0]["DETAIL"]
    world.crash(world.process())
    world.settle()
    assert world.serving().state is S.READY
    assert [e for e in world.effects if isinstance(e, LoadInstance)][-1].spec["max_batch_size"] == 1


def test_a_worker_that_dies_of_something_else_by_then_is_no_endless_loop() -> None:
    """Batches are given up once; who ends without them, too, has failed."""
    world = World()
    world.load_faults["m-1"] = "PROVED"
    world.put("m")
    world.settle()
    assert reason_of(world) == "WORKER_CRASHED"
    assert [e.spec["max_batch_size"] for e in world.effects if isinstance(e, LoadInstance)] == [None, 1]


def test_an_owners_batch_that_ends_the_worker_is_a_failure() -> None:
    """Who asks for batches is told that they cannot be had."""
    world = World()
    world.load_faults["m-1"] = "PROVING"
    world.put("m", max_batch_size=8)
    world.settle()
    assert reason_of(world) == "WORKER_CRASHED"


def test_a_load_given_up_in_a_shared_worker_leaves_nothing_there() -> None:
    """Cancelled, or unloaded when the word that it is loaded was already on its way."""
    world = World(verdicts={CUDA: "ok"})
    world.put("m")
    world.settle()
    world.hold_loads = True
    world.put("n")
    world.settle()
    world.remove("n")
    world.pass_time(3.0)
    assert len([e for e in world.effects if isinstance(e, CancelLoad)]) == 1
    world.hold_loads = False
    world.put("o")
    world.scan()
    world.deliver(world.helper)
    world.deliver(world.helper)
    while world.helper:
        world.deliver(world.helper)
    world.request("repository_model_unload", model_name="o")
    world.infer("m")
    world.settle()
    (worker,) = world.core.workers.table.values()
    assert worker.instances == world.workers[worker.id].loaded == {world.serving("m").id}


def test_what_drains_on_a_dead_worker_is_answered_at_once() -> None:
    """Nothing waits for the end of the draining time when nobody will run it."""
    world = ready_world()
    keys = [world.infer("m") for _ in range(5)]
    dying = world.process()
    world.put("m", "2")
    world.settle()
    world.crash(dying)
    world.settle()
    assert [world.answer(k) for k in keys] == ["WORKER_CRASHED"] * 5
    assert len(world.registry.instances) == 1


def test_draining_has_a_limit() -> None:
    """A run that does not end is answered and its worker killed."""
    world = ready_world()
    key = world.infer("m")
    world.put("m", "2")
    world.settle()
    world.pass_time(DRAIN_S + 1.0)
    assert world.answer(key) == "MODEL_RETIRED"
    assert len(world.core.workers.table) == 1


# ---- the folder -----------------------------------------------------------------------------------------


def test_a_removed_model_ends_after_its_last_request() -> None:
    """New requests are refused at once, the one that runs is answered, the store forgets it."""
    world = ready_world()
    key = world.infer("m")
    world.remove("m")
    world.pass_time(3.0)
    assert reason_of(world) == "MODEL_NOT_FOUND"
    world.finish_runs()
    assert world.answer(key).version == "1"
    assert (world.registry.instances, world.registry.tracks) == ({}, {})
    world.settle()
    assert world.core.workers.table == {}
    assert [e.name for e in world.effects if isinstance(e, ForgetModel)] == ["m"]


def test_a_renamed_model_serves_under_its_new_name_only() -> None:
    """A rename is a removal and an arrival."""
    world = ready_world()
    world.remove("m")
    world.put("renamed")
    world.pass_time(3.0)
    assert reason_of(world) == "MODEL_NOT_FOUND"
    assert world.serving("renamed").state is S.READY


def test_a_version_that_went_serves_until_its_successor_does() -> None:
    """Version 2 comes in version 1's place: 1 serves until 2 has loaded."""
    world = World()
    world.put("v", "1", 1)
    world.pass_time(3.0)
    world.hold_loads = True
    world.remove("v", 1)
    world.put("v", "2", 2)
    world.pass_time(3.0)
    assert world.registry.lookup("v", "").version == 1
    world.finish_loads()
    world.pass_time(1.0)
    assert world.registry.lookup("v", "").version == 2
    assert list(world.registry.tracks) == [("v", 2)]
    assert reason_of(world, "v", "1") == "VERSION_NOT_FOUND"


def test_a_superseded_version_goes_with_the_successor_that_never_served() -> None:
    """When the folder has no version any more, nothing serves."""
    world = World()
    world.put("v", "1", 1)
    world.pass_time(3.0)
    world.load_faults["v-2"] = "MODEL_INVALID"
    world.remove("v", 1)
    world.put("v", "2", 2)
    world.pass_time(3.0)
    assert world.registry.lookup("v", "").version == 1
    world.remove("v", 2)
    world.pass_time(3.0)
    assert world.registry.tracks == {}
    assert reason_of(world, "v") == "MODEL_NOT_FOUND"


def test_versions_side_by_side_serve_side_by_side() -> None:
    """The highest that serves answers when no version is named."""
    world = World()
    world.put("v", "1", 1)
    world.put("v", "2", 2)
    world.pass_time(3.0)
    assert world.registry.lookup("v", "").version == 2
    assert world.registry.lookup("v", "1").version == 1
    world.hold_loads = True
    world.put("v", "3", 3)
    world.pass_time(2.0)
    assert world.registry.lookup("v", "").version == 2
    assert reason_of(world, "v", "3") == "MODEL_LOADING"
    assert reason_of(world, "v", "9") == "VERSION_NOT_FOUND"


def test_a_version_beside_the_one_that_serves_is_refused_with_its_own_reason() -> None:
    """Loading, retired and never there are told apart, though another version serves."""
    world = ready_world()
    world.hold_loads = True
    world.put("m", "2")
    world.settle()
    assert reason_of(world, "m", "2") == "MODEL_LOADING"
    world.infer("m")
    world.finish_loads()
    world.settle()
    assert reason_of(world, "m", "1") == "VERSION_NOT_FOUND"
    world.request("repository_model_unload", model_name="m")
    assert reason_of(world, "m", "1") == "MODEL_UNLOADED"


def test_a_folder_that_is_gone_takes_nothing_with_it() -> None:
    """A fault of the root is told, and what serves goes on."""
    world = ready_world()
    world.fault = "the models folder is not there"
    world.scans.append(world.now_s)
    world.pass_time(60.0)
    assert world.serving().state is S.READY
    assert world.registry.folder.fault == world.fault
    world.fault = None
    world.scans.append(world.now_s)
    world.settle()
    assert world.registry.folder.fault == ""
    assert len(world.logs("folder_fault")) == len(world.logs("folder_healed")) == 1


def last_good(world: World, content: str = "good") -> tuple[Any, Any]:
    """What the store remembers."""
    entry = world.entry("m", content)
    return entry, world.copy_of(entry)


def test_the_last_good_content_serves_when_the_folder_is_gone_or_bad() -> None:
    """After a restart, with nothing mounted, or with content that does not load, however often."""
    world = World(boot=False)
    world.fault = "nothing is mounted"
    world.boot([last_good(world)])
    world.settle()
    assert world.serving().staged.digest == "m-good"

    world = World(boot=False)
    world.load_faults = {"m-bad": "MODEL_INVALID", "m-worse": "MODEL_INVALID"}
    world.put("m", "bad")
    world.boot([last_good(world)])
    world.hold_loads = True
    world.settle()
    world.finish_loads()
    world.settle()
    assert world.registry.tracks["m", None].incoming.staged.digest == "m-good"
    world.put("m", "worse")
    world.settle()
    world.hold_loads = False
    world.finish_loads()
    world.settle()
    assert world.serving().staged.digest == "m-good"
    assert world.registry.tracks["m", None].failure.digest == "m-worse"


def test_the_last_good_content_that_fails_too_is_not_tried_for_ever() -> None:
    """One attempt each."""
    world = World(boot=False)
    world.load_faults = {"m-bad": "MODEL_INVALID", "m-good": "MODEL_INVALID"}
    world.put("m", "bad")
    world.boot([last_good(world)])
    world.pass_time(60.0)
    assert len(world.loads()) == 2
    assert reason_of(world) == "MODEL_INVALID"


# ---- asked for ------------------------------------------------------------------------------------------


def test_unload_ends_a_model_until_it_is_asked_for_or_changes() -> None:
    """Scans alone do not bring it back; a load or other bytes do."""
    world = ready_world()
    world.request("repository_model_unload", model_name="m")
    world.scans.append(world.now_s)
    world.pass_time(5.0)
    assert reason_of(world) == "MODEL_UNLOADED"
    assert world.core.workers.table == {}
    assert world.reasons() == {("m", ""): "UNAVAILABLE"}
    world.request("repository_model_load", model_name="m")
    world.settle()
    assert world.serving().state is S.READY
    world.request("repository_model_unload", model_name="m")
    world.put("m", "2")
    world.settle()
    assert world.serving().version == 2


def test_load_and_unload_of_what_is_not_there_are_refused() -> None:
    """NOT_FOUND, and for a load the folder is looked at."""
    world = World()
    for what in ("load", "unload"):
        header = world.request(f"repository_model_{what}", model_name="nobody")
        assert header["error"]["code"] == "NOT_FOUND"
    assert world.scans


def test_load_tries_again_what_failed() -> None:
    """By request the same bytes are tried once more."""
    world = World()
    world.load_faults["m-1"] = "MODEL_INVALID"
    world.put("m")
    world.settle()
    world.load_faults.clear()
    world.request("repository_model_load", model_name="m")
    world.settle()
    assert world.serving().state is S.READY


# ---- ready ----------------------------------------------------------------------------------------------


def test_ready_is_said_once_everything_of_the_first_look_has_settled() -> None:
    """With an empty folder at once, with models when each serves or has failed, or after the wait."""
    world = World()
    world.settle()
    assert world.readies == 1
    world = World(boot=False)
    world.hold_loads = True
    world.put("m")
    world.boot()
    world.settle()
    assert world.core.state == "starting"
    world.pass_time(19.0)
    assert world.readies == 0
    world.pass_time(1.5)
    assert world.readies == 1
    states = [
        e.payload["state"] for e in world.effects if isinstance(e, Publish) and e.topic == "server.state"
    ]
    assert states == ["ready"]


def test_a_worker_that_does_not_exit_when_asked_is_killed() -> None:
    """Three seconds for a runtime's teardown."""
    world = ready_world()
    worker = world.process()
    world._on_EndWorker = lambda e: None
    world.request("repository_model_unload", model_name="m")
    world.settle()
    assert worker.alive
    world.pass_time(3.5)
    assert not worker.alive
    assert world.core.workers.table == {}
    assert [e for e in world.effects if isinstance(e, (EndWorker, KillWorker))]


def test_the_word_of_a_worker_that_is_gone_changes_nothing() -> None:
    """A second end of the same worker, or of one that never was."""
    world = ready_world()
    world.send(WorkerGone(9999, "exit 0"))
    assert world.serving().state is S.READY
    assert config().limits.queue_length == 8


def test_a_choice_made_among_other_devices_or_versions_is_forgotten() -> None:
    """A device that came, or a new version of a runtime, deserves to be measured."""
    for compared in ({str(OV_CPU): "1.0"}, {str(CPU): "0.9", str(OV_CPU): "1.0"}, None):
        world = World(verdicts={CPU: "ok", OV_CPU: "ok"})
        choice = {"runtime": "openvino", "device": "CPU", "compared": compared, "proof": PROOF}
        world.choices["m-1"] = choice
        world.put("m")
        world.settle()
        assert (world.serving().candidate, world.serving().choice) == (CPU, "default")


def test_a_model_returns_to_the_device_that_works_again() -> None:
    """Who asked for a device and had to fall back gets it when it is there."""
    world = World(verdicts={CPU: "ok", CUDA: "absent"})
    world.put("m", device="cuda")
    world.settle()
    assert (world.serving().candidate, bool(world.serving().fallback_reason)) == (CPU, True)
    world.statuses[CUDA] = "ok"
    world.send(DevicesChanged())
    world.settle()
    assert (world.serving().candidate, world.serving().fallback_reason) == (CUDA, "")


def test_a_load_that_hangs_holds_up_nobody_for_long() -> None:
    """One load at a time, but one that takes ten seconds lets the next begin."""
    world = World(verdicts={CPU: "ok"})
    world.hold_loads = True
    world.put("a")
    world.put("b")
    world.settle()
    assert len(world.loads()) == 1
    world.pass_time(9.0, settle=False)
    world.settle()
    assert len(world.loads()) == 1
    world.pass_time(2.0, settle=False)
    world.settle()
    assert len(world.loads()) == 2


# ---- copies that rot ------------------------------------------------------------------------------------


def hashed(world: World) -> list[str]:
    """The contents whose copies were asked about, in order."""
    return [e.digest for e in world.effects if isinstance(e, HashCopy)]


def test_traffic_moves_only_when_the_new_versions_copy_was_hashed() -> None:
    """The worker loads meanwhile; loaded and not hashed yet, the old version goes on serving."""
    world = ready_world()
    world.hold_hashes = True
    world.put("m", "2")
    world.settle()
    incoming = world.registry.tracks["m", None].incoming
    assert incoming is not None
    assert (incoming.state, incoming.oip_state()) == (S.HASHING, "LOADING")
    assert "being hashed" in incoming.message
    key = world.infer()
    world.finish_runs()
    assert world.answer(key).version == "1"
    world.hold_hashes = False
    world.settle()
    assert world.serving() is incoming
    assert incoming.state is S.READY


def test_a_hash_that_is_there_first_holds_nothing_up() -> None:
    """The hash of a small copy is there before its load is."""
    world = ready_world()
    world.hold_loads = True
    world.put("m", "2")
    world.settle()
    world.finish_loads()
    world.settle()
    assert world.serving().version == 2


def test_requests_wait_through_the_hash_of_a_restart() -> None:
    """A worker that is started again reads the disk again, so its copy is hashed again before it answers."""
    world = ready_world()
    world.crash(world.process())
    world.hold_hashes = True
    world.settle()
    assert world.serving().state is S.HASHING
    key = world.infer()
    world.finish_runs()
    assert world.answer(key) is None
    world.hold_hashes = False
    world.settle()
    world.finish_runs()
    assert world.answer(key).version == "1"
    assert hashed(world) == ["m-1", "m-1"]


def test_a_rotten_copy_never_serves_and_is_copied_again() -> None:
    """It loads and would answer; instead its content is copied again from the folder, under its number."""
    world = World(boot=False)
    world.damaged.add("m-1")
    world.boot()
    world.put("m")
    world.settle()
    assert world.serving().version == 1
    assert len([e for e in world.effects if isinstance(e, Stage)]) == 2
    (line,) = world.logs("copy_damaged")
    assert line["MODEL"] == "m"
    assert "m-1" in line["DETAIL"]
    assert not world.logs("model_failed")
    assert world.core.counters["damaged_copies"] == 1


def test_while_a_rotten_copy_is_made_again_the_daemon_is_not_ready() -> None:
    """A start is over when what is in the folder serves or is known not to; this is neither."""
    world = World(boot=False)
    world.damaged.add("m-1")
    world.hold_hashes = True
    world.boot()
    world.put("m")
    world.settle()
    world.deliver(world.hasher)
    assert reason_of(world) == "MODEL_LOADING"
    assert world.reasons() == {("m", ""): "LOADING"}
    assert not world.readies
    world.hold_hashes = False
    world.settle()
    assert world.readies == 1


def test_a_load_that_failed_on_a_rotten_copy_is_not_held_against_its_content() -> None:
    """The reason of the failure may be the rot: nothing is said or tried elsewhere before that is known."""
    world = World(verdicts={CPU: "ok", OV_CPU: "ok"})
    world.settle()
    world.hold_hashes = True
    world.damaged.add("m-1")
    world.load_faults["m-1"] = "MODEL_INVALID"
    world.put("m")
    world.settle()
    assert len(world.loads()) == 1
    assert not world.logs("model_failed")
    del world.load_faults["m-1"]
    world.hold_hashes = False
    world.settle()
    assert world.serving().state is S.READY
    assert not world.logs("model_failed")


def test_a_load_that_failed_on_a_sound_copy_fails() -> None:
    """Held until the hash is there, then tried on the next device, and said; hashed once for all devices."""
    world = World(verdicts={CPU: "ok", OV_CPU: "ok"})
    world.load_faults["m-1"] = "MODEL_INVALID"
    world.hold_hashes = True
    world.put("m")
    world.settle()
    assert not world.logs("model_failed")
    world.hold_hashes = False
    world.settle()
    assert len(world.loads()) == 2
    assert [line["REASON"] for line in world.logs("model_failed")] == ["MODEL_INVALID"]
    assert hashed(world) == ["m-1"]


def test_a_worker_that_dies_of_a_rotten_copy_is_no_crash_of_its_content() -> None:
    """A flipped bit may well kill a runtime."""
    world = ready_world()
    world.hold_hashes = True
    world.damaged.add("m-2")
    world.load_faults["m-2"] = "CRASH"
    world.put("m", "2")
    world.settle()
    del world.load_faults["m-2"]
    world.hold_hashes = False
    world.settle()
    assert world.serving().version == 2
    assert not world.logs("model_failed")


@pytest.mark.parametrize("moment", ["loading", "hashing"])
def test_a_worker_that_dies_before_the_hash_is_there_fails_its_load(moment: str) -> None:
    """Sound copy, dead worker: what follows is as ever, only later."""
    world = ready_world()
    world.hold_hashes = True
    world.hold_loads = moment == "loading"
    world.put("m", "2")
    world.settle()
    incoming = world.registry.tracks["m", None].incoming
    assert incoming is not None
    assert incoming.worker is not None
    world.crash(world.workers[incoming.worker])
    world.settle()
    assert incoming.state is S.HASHING
    world.hold_hashes = False
    world.settle()
    assert [line["REASON"] for line in world.logs("model_failed")] == ["WORKER_CRASHED"]
    assert world.serving().version == 1


def test_a_disk_that_spoils_every_copy_is_not_fed_for_ever() -> None:
    """A few copies, then the model is refused with the reason; asked for, it is tried once more."""
    world = World(boot=False)
    world.rot_again = True
    world.damaged.add("m-1")
    world.boot()
    world.put("m")
    world.settle()
    assert len([e for e in world.effects if isinstance(e, Stage)]) == 1 + SPOILT_MAX
    assert reason_of(world) == "COPY_DAMAGED"
    failure = world.registry.tracks["m", None].failure
    assert failure is not None
    assert "edgectl load m" in failure.message
    assert world.readies == 1
    world.rot_again = False
    world.damaged.clear()
    world.request("repository_model_load", model_name="m")
    world.settle()
    assert world.serving().state is S.READY


@pytest.mark.parametrize("before", ["good", "rotten", "none"])
def test_where_the_folder_has_not_the_content_the_version_before_serves(before: str) -> None:
    """Unless that has rotted, too: then nothing does, and the reason is the rot."""
    world = World(boot=False)
    old, new = (world.entry("m", content) for content in "12")
    copies = [world.copy_of(old), world.copy_of(new)]
    world.served = {"m-1", "m-2"}
    world.damaged.add("m-2")
    if before != "none":
        world.before = [(old, copies[0])]
    if before == "rotten":
        world.damaged.add("m-1")
        world.rot_again = True
    world.fault = "the models folder is gone"
    world.boot([(new, copies[1])])
    world.settle()
    assert world.logs("copy_damaged")[0]["MODEL_VERSION"] == "2"
    kinds = [e.kind if isinstance(e, Log) else "ready" for e in world.effects if isinstance(e, Log | Ready)]
    assert kinds.index("ready") > kinds.index("model_ready" if before == "good" else "model_failed")
    if before == "good":
        assert world.serving().version == 1
        assert world.logs("model_restored")
    else:
        assert reason_of(world) == "COPY_DAMAGED"
        assert len(world.logs("copy_damaged")) == (2 if before == "rotten" else 1)
    assert world.readies == 1


def test_a_file_that_rotted_in_the_folder_too_leaves_the_version_before_serving() -> None:
    """The copy cannot be made again, so what served before comes back beside the reason."""
    world = World(boot=False)
    old = world.entry("m", "1")
    world.before = [(old, world.copy_of(old))]
    world.damaged.add("m-2")
    world.hold_hashes = True
    world.boot()
    world.put("m", "2")
    world.settle()
    world.stage_faults["m-2"] = ("FILE_DAMAGED", False)
    world.hold_hashes = False
    world.settle()
    assert world.serving().version == 1
    failure = world.registry.tracks["m", None].failure
    assert failure is not None
    assert failure.reason == "FILE_DAMAGED"


def test_all_that_was_loaded_from_a_copy_stops_when_it_is_found_rotten() -> None:
    """Two models of one content: what the one's load found out is true of what the other maps."""
    world = ready_world()
    twin = world.entry("twin")
    world.contents[twin.files] = "m-1"
    key = world.infer()
    world.damaged.add("m-1")
    world.folder[twin.key] = twin
    world.scans.append(world.now_s)
    world.settle()
    assert world.answer(key) == "COPY_DAMAGED"
    world.finish_runs()
    assert {line["MODEL"] for line in world.logs("copy_damaged")} == {"m", "twin"}
    assert world.serving().state is S.READY
    assert world.serving("twin").state is S.READY
    again = world.infer()
    world.finish_runs()
    assert world.answer(again).version == "1"


def test_a_copy_that_rotted_beside_a_serving_version_leaves_that_alone() -> None:
    """An older file put back, whose copy in the store has rotted: what serves goes on until it is whole."""
    world = ready_world()
    world.put("m", "2")
    world.settle()
    world.damaged.add("m-1")
    world.hold_hashes = True
    world.put("m", "1")
    world.settle()
    key = world.infer()
    world.finish_runs()
    assert world.answer(key).version == "2"
    world.hold_hashes = False
    world.settle()
    assert world.serving().version == 1


def test_a_copy_that_cannot_be_read_for_another_reason_is_not_given_up() -> None:
    """No descriptors left, say: the load is refused with the reason, and the copy stays."""
    world = ready_world()
    world.unreadable.add("m-2")
    world.put("m", "2")
    world.settle()
    assert [line["REASON"] for line in world.logs("model_failed")] == ["COPY_UNREADABLE"]
    assert world.serving().version == 1
    assert not world.logs("copy_damaged")
    world.unreadable.clear()
    world.request("repository_model_load", model_name="m")
    world.settle()
    assert world.serving().version == 2


def test_a_restart_whose_copy_cannot_be_read_is_tried_again() -> None:
    """As with any restart that fails: with growing pauses, and never from bytes that nobody has hashed."""
    world = ready_world()
    world.unreadable.add("m-1")
    world.crash(world.process())
    world.settle()
    assert world.serving().state is S.RESTARTING
    assert reason_of(world) == "COPY_UNREADABLE"
    world.unreadable.clear()
    world.pass_time(10.0)
    assert world.serving().state is S.READY


def test_a_hash_that_never_comes_fails_the_load() -> None:
    """A disk that hangs: after the load's time limit the model is refused, and what serves goes on."""
    world = ready_world()
    world.hold_hashes = True
    world.put("m", "2")
    world.settle()
    world.pass_time(world.core.around.config.loading.timeout_s + 1)
    (line,) = world.logs("model_failed")
    assert line["REASON"] == "COPY_UNREADABLE"
    assert "does its disk hang" in line["DETAIL"]
    assert world.serving().version == 1
    world.hold_hashes = False
    world.settle()
    assert world.serving().version == 1, "the word came too late to matter"


def test_a_shared_worker_forgets_what_it_loaded_from_a_rotten_copy() -> None:
    """It lives on for its other models, without the one that is not to answer."""
    world = World(verdicts={CPU: "ok", CUDA: "ok"})
    world.put("g", device="cuda")
    world.settle()
    worker = world.process("g")
    world.hold_hashes = True
    world.damaged.add("h-1")
    world.put("h", device="cuda")
    world.settle()
    assert len(worker.loaded) == 2
    world.hold_hashes = False
    world.settle()
    assert worker.alive
    assert worker.loaded == {world.serving("g").id, world.serving("h").id}
