"""How a model runs best: measured when nobody asks or when its owner does, and remembered."""

from __future__ import annotations

from typing import Any

import pytest

from edged.choosing import ASKED_S, IDLE_FIRST_S, LIMIT_S, NICE, REQUESTS_MIN
from edged.events import (
    LoadInstance,
    PrepareLoad,
    Publish,
    RememberChoice,
    Sampled,
    ShutdownAsked,
    StopMeasure,
)
from edged.instances import InstanceState
from edged.messages import InputTensor
from edged.setups import Setup
from tests.world import CPU, OV_CPU, PEER, World, sample


def idle_world(**settings: Any) -> World:
    """A world that serves `m` on ONNX Runtime, and has been idle for long enough to measure."""
    world = World(verdicts={CPU: "ok", OV_CPU: "ok"})
    world.put("m", **settings)
    world.settle()
    world.pass_time(IDLE_FIRST_S + 0.5)
    return world


def remembered(world: World) -> list[str]:
    """The runtimes that were remembered."""
    return [c["runtime"] for c in choices(world)]


def choices(world: World) -> list[dict[str, Any]]:
    """The choices that were remembered; not what was learnt about batches."""
    return [e.choice for e in world.effects if isinstance(e, RememberChoice) and "runtime" in e.choice]


FASTER = {"reference_p50_us": 1000.0, "candidate_p50_us": 500.0, "agrees": True, "proven": True, "why": ""}


def test_an_idle_daemon_measures_the_other_device_and_switches() -> None:
    """Beside the one that serves; the choice is remembered and shown, and not measured again."""
    world = idle_world()
    (measure,) = world.measures.values()
    assert (measure.spec["reference"]["runtime"], measure.spec["candidate"]["runtime"]) == (
        "onnxruntime",
        "openvino",
    )
    world.measured(**FASTER)
    assert world.serving().candidate == OV_CPU
    assert world.serving().choice == "measured"
    assert remembered(world) == ["openvino"]
    assert world.logs("choice_switched")
    world.pass_time(100.0)
    assert not world.measures
    assert len(world.core.workers.table) == 1


@pytest.mark.parametrize(
    "result",
    [
        {**FASTER, "agrees": False},
        {**FASTER, "proven": False},
        {**FASTER, "candidate_p50_us": 950.0},
        {**FASTER, "candidate_p50_us": 1500.0},
        {**FASTER, "reference_p50_us": 100.0, "candidate_p50_us": 60.0},
        {"agrees": False, "proven": False, "why": "it does not load there"},
    ],
)
def test_no_switch_without_agreement_proof_and_gain(result: dict[str, Any]) -> None:
    """A tenth of the time and 50 µs; what serves is remembered instead."""
    world = idle_world()
    before = world.serving()
    world.measured(**result)
    assert world.serving() is before
    assert before.choice == "measured"
    assert remembered(world) == ["onnxruntime"]
    world.pass_time(100.0)
    assert not world.measures


@pytest.mark.parametrize("settings", [{"device": "cpu"}, {"runtime": "onnxruntime"}])
def test_what_the_owner_chose_is_not_measured(settings: dict[str, Any]) -> None:
    """A pinned device or runtime stays."""
    assert not idle_world(**settings).measures


def test_a_request_stops_the_measurement_and_the_next_waits_longer() -> None:
    """The device is needed; each time so interrupted, the idle time doubles."""
    world = idle_world()
    for wait in (2 * IDLE_FIRST_S, 4 * IDLE_FIRST_S):
        world.infer("m")
        assert not world.measures
        world.finish_runs()
        world.pass_time(wait - 0.5)
        assert not world.measures
        world.pass_time(1.0)
        assert world.measures
    assert len([e for e in world.effects if isinstance(e, StopMeasure)]) == 2


def test_a_measurement_that_takes_too_long_is_given_up() -> None:
    """It counts as done, and is not begun again."""
    world = idle_world()
    world.pass_time(LIMIT_S + 5.0)
    assert not world.measures
    assert world.serving().choice == "measured"
    world.pass_time(300.0)
    assert not world.measures


def test_nothing_is_measured_under_pressure_or_while_something_loads() -> None:
    """A measurement takes memory and time that others need."""
    world = World(verdicts={CPU: "ok", OV_CPU: "ok"})
    world.put("m")
    world.settle()
    world.hold_loads = True
    world.put("n")
    world.settle()
    world.pass_time(20.0)
    assert not world.measures
    world.hold_loads = False
    world.finish_loads()
    world.send(Sampled(sample(free=1 << 30)))
    world.settle()
    world.pass_time(20.0)
    assert not world.measures
    world.send(Sampled(sample()))
    world.pass_time(20.0)
    assert world.measures


def test_a_switch_that_fails_changes_nothing() -> None:
    """What serves is as good as it was: no failure shows, no fallback, and it is remembered."""
    world = idle_world()
    before = world.serving()
    world.load_faults["m-1", OV_CPU] = "MODEL_LOAD_FAILED"
    world.measured(**FASTER)
    assert world.serving() is before
    assert world.registry.tracks["m", None].failure is None
    assert world.reasons() == {("m", "1"): "READY"}
    assert before.fallback_reason == ""
    assert remembered(world)[-1] == "onnxruntime"
    world.pass_time(300.0)
    assert not world.measures


def test_a_result_for_a_model_that_is_gone_is_dropped() -> None:
    """The measurement outlived what it measured."""
    world = idle_world()
    world.remove("m")
    world.pass_time(3.0)
    if world.measures:
        world.measured(**FASTER)
    assert not world.registry.instances


# ---- instances = "auto"


def figures(part: dict[str, Any]) -> float:
    """A machine of four CPUs where a run's p50 in µs is this, and threads help little."""
    alone_us = 1000.0 if part["runtime"] == "onnxruntime" else 950.0
    return alone_us * (0.7 + 0.3 * 4 / part["threads"]) if part["instances"] > 1 else alone_us


def answer(world: World) -> dict[str, Any]:
    """The measurement under way ends with what this machine would say; returns its candidate."""
    (measure,) = world.measures.values()
    result: dict[str, Any] = {"agrees": True, "proven": True, "why": "2 of 2 inputs agree"}
    for side in ("reference", "candidate"):
        part = measure.spec[side]
        p50_us = figures(part)
        rows = part["rows"]
        result |= {
            f"{side}_p50_us": p50_us,
            f"{side}_p99_us": p50_us * 1.1,
            f"{side}_rows_s": part["instances"] * rows * 1e6 / p50_us,
        }
    world.measured(**result)
    return measure.spec["candidate"]


def loaded(world: World) -> tuple[int, int]:
    """Instances and threads of the last load."""
    spec = [e.spec for e in world.effects if isinstance(e, LoadInstance)][-1]
    return spec["instances"], spec["threads"]


def test_open_instances_are_measured_when_nobody_asks_and_taken_by_a_swap() -> None:
    """It serves with one first; the device does not change for too small a gain, the instances do."""
    world = idle_world(instances="auto")
    assert loaded(world) == (1, 4)
    tried = []
    while world.measures:
        part = answer(world)
        tried.append((part["runtime"], part["instances"], part["threads"]))
    assert tried == [("openvino", 1, 4), ("onnxruntime", 2, 2), ("onnxruntime", 4, 1)]
    assert world.serving().candidate == CPU
    assert world.serving().choice == "measured"
    assert loaded(world) == (4, 1)
    (choice,) = choices(world)
    assert (choice["instances"], choice["threads"], choice["source"]) == (4, 1, "measured")
    world.pass_time(100.0)
    assert not world.measures


def test_a_pinned_device_keeps_its_instances_open() -> None:
    """What the owner left open is measured, and only that."""
    world = idle_world(instances="auto", runtime="onnxruntime")
    while world.measures:
        assert answer(world)["runtime"] == "onnxruntime"
    assert (loaded(world), world.serving().choice) == ((4, 1), "pinned")


BLOCKED = {
    **FASTER,
    "agrees": False,
    "proven": False,
    "why": "Relu answers NaN differently; say so",
    "obstacles": ["Relu answers NaN differently"],
    "remedy": "say so",
}
"""A gain that may not be taken."""


def test_what_keeps_a_model_where_it_is_is_shown_and_outlives_a_restart() -> None:
    """The reason, what would change it, and the figures: beside the remembered choice."""
    world = idle_world()
    world.measured(**BLOCKED)
    (choice,) = choices(world)
    again = World(verdicts={CPU: "ok", OV_CPU: "ok"})
    again.choices["m-1"] = choice
    again.put("m")
    again.settle()
    again.pass_time(100.0)
    assert not again.measures
    for each in (world, again):
        (row,) = [r for r in each.request("server_status")["models"] if r["serving"]]
        (measured,) = row["measured"]
        assert (row["runtime"], measured["runtime"]) == ("onnxruntime", "openvino")
        assert (measured["p50_us"], measured["reference_p50_us"]) == (500.0, 1000.0)
        assert (measured["agrees"], measured["proven"]) == (False, False)
        assert (measured["why"], measured["obstacles"]) == (BLOCKED["why"], BLOCKED["obstacles"])
        assert measured["remedy"] == "say so"


@pytest.mark.parametrize(
    "strange",
    [
        3,
        ["x"],
        [{"runtime": "openvino", "device": "CPU"}],
        [{"runtime": "openvino", "device": "CPU", "result": {"candidate_p50_us": "fast"}}],
        [{"runtime": "openvino", "device": "CPU", "result": {"obstacles": [3]}}],
        [{"runtime": 1, "device": "CPU", "result": {}}],
        [{"runtime": "openvino", "device": "CPU", "result": {}}] * 100,
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_strange_record_of_what_was_measured_is_passed_over(strange: Any) -> None:
    """The book may be another version's, or damaged: the choice itself holds."""
    world = idle_world()
    world.measured(**BLOCKED)
    (choice,) = choices(world)
    again = World(verdicts={CPU: "ok", OV_CPU: "ok"})
    again.choices["m-1"] = {**choice, "measured": strange}
    again.put("m")
    again.settle()
    assert again.serving().choice == "remembered"
    assert len(again.serving().measured) <= 1


def test_the_owners_word_on_nan_is_part_of_what_a_choice_is_known_by() -> None:
    """Given or taken back, also where two models have the same bytes: each has a choice of its own."""
    keys = []
    for settings in ({}, {"finite_inputs": True}):
        world = idle_world(**settings)
        (measure,) = world.measures.values()
        assert measure.spec["finite_inputs"] == bool(settings)
        world.measured(**FASTER)
        (asked,) = {e.choice_key for e in world.effects if isinstance(e, PrepareLoad)}
        (kept,) = {e.key for e in world.effects if isinstance(e, RememberChoice)}
        assert asked == kept
        keys.append(kept)
    assert keys[0] != keys[1]


def test_a_choice_by_older_rules_or_other_tables_is_made_again() -> None:
    """What they allowed may be wrong; what the owner has tuned stays the owner's word."""
    world = idle_world()
    world.measured(**FASTER)
    (choice,) = choices(world)
    older = {key: value for key, value in choice.items() if key != "proof"}
    for record, candidate in (
        (choice, OV_CPU),
        (older, CPU),
        ({**choice, "proof": "2 another"}, CPU),
        ({**older, "source": "tuned"}, OV_CPU),
    ):
        again = World(verdicts={CPU: "ok", OV_CPU: "ok"})
        again.choices["m-1"] = record
        again.put("m")
        again.settle()
        assert again.serving().candidate == candidate


def test_what_was_remembered_is_how_it_starts() -> None:
    """Instances and threads too; settings that pin one of them have the last word."""
    compared = {str(CPU): "1.0", str(OV_CPU): "1.0"}
    choice = Setup(OV_CPU, 1, 3, 8).to_wire() | {"compared": compared, "source": "tuned"}
    for settings, want in (
        ({"instances": "auto"}, (3, 1, 8)),
        ({}, (3, 1, 8)),
        ({"instances": 2}, (2, 2, 8)),
        ({"threads": 2, "max_batch_size": 4}, (3, 2, 4)),
    ):
        world = World(verdicts={CPU: "ok", OV_CPU: "ok"})
        world.choices["m-1"] = choice
        world.put("m", **settings)
        world.settle()
        (spec,) = [e.spec for e in world.effects if isinstance(e, LoadInstance)]
        assert (spec["instances"], spec["threads"], spec["max_batch_size"]) == want
        assert world.serving().choice == "tuned"
        world.pass_time(100.0)
        assert not world.measures


def test_a_remembered_batch_that_cannot_be_any_more_keeps_nobody_from_serving() -> None:
    """It was chosen, not asked for: the model is loaded without."""
    world = World(verdicts={CPU: "ok"})
    compared = {str(CPU): "1.0"}
    world.choices["m-1"] = Setup(CPU, 4, 1, 8).to_wire() | {"compared": compared, "source": "tuned"}
    world.load_faults["m-1"] = "NOT_BATCHABLE"
    world.hold_loads = True
    world.put("m")
    world.settle()
    world.finish_loads()
    del world.load_faults["m-1"]
    world.settle()
    world.finish_loads()
    world.settle()
    specs = [e.spec["max_batch_size"] for e in world.effects if isinstance(e, LoadInstance)]
    assert specs == [8, None]
    assert world.serving().candidate == CPU


# ---- at which sizes


def asked(world: World, times: int, size: int, model: str = "m") -> None:
    """Requests of one size, answered."""
    for _ in range(times):
        world.infer(model, size=size)
        world.finish_runs()


def at(size: int, source: str = "requests") -> dict[str, Any]:
    """A measurement's word on its size."""
    return {"source": source, "shapes": {"x": [size]}, "note": ""}


def test_a_measurement_is_handed_what_requests_had() -> None:
    """The most frequent first; a load too, for its warm-up."""
    world = serving_world()
    asked(world, 2, 7)
    asked(world, 5, 3)
    world.pass_time(IDLE_FIRST_S + 0.5)
    (measure,) = world.measures.values()
    assert measure.spec["shapes"] == [{"x": [3]}, {"x": [7]}]
    world.measured(**FASTER, size=at(3))
    loads = [e for e in world.effects if isinstance(e, LoadInstance)]
    assert [e.spec.get("shapes") for e in loads] == [None, [{"x": [3]}, {"x": [7]}]]
    row = world.request("server_status")["models"][0]
    assert row["sizes"][0] == {"source": "requests", "shapes": {"x": [3]}, "count": 5}


def test_a_request_that_was_not_answered_is_not_counted() -> None:
    """What the model refuses is no size to measure it at."""
    world = serving_world()
    world.infer(size=9)
    (worker,) = [w for w in world.workers.values() if w.alive]
    world.finish_run(worker, fails=True)
    assert not world.serving().sizes


def test_all_setups_of_a_model_are_measured_at_the_same_sizes() -> None:
    """Else they could not be compared, whatever is asked in between."""
    world = serving_world(instances="auto")
    asked(world, 3, 5)
    world.pass_time(IDLE_FIRST_S + 0.5)
    world.measured(**{**FASTER, "agrees": False}, size=at(5))
    asked(world, 9, 6)
    world.pass_time(10 * IDLE_FIRST_S)
    (measure,) = world.measures.values()
    assert measure.spec["shapes"] == [{"x": [5]}]


def test_a_measurement_that_requests_stopped_is_made_again_at_theirs() -> None:
    """One that began before anybody asked had nothing to go by; it has no result to be compared with."""
    world = idle_world()
    (measure,) = world.measures.values()
    assert measure.spec["shapes"] == []
    asked(world, 1, 5)
    assert not world.measures
    world.pass_time(2 * IDLE_FIRST_S + 0.5)
    (measure,) = world.measures.values()
    assert measure.spec["shapes"] == [{"x": [5]}]


def test_sizes_outlive_the_daemon_and_another_content() -> None:
    """Written within a second and when it stops; a new content begins with those that fit it."""
    world = serving_world()
    asked(world, 3, 5)
    world.send(Sampled(sample()))
    assert world.sizes["m-1"] == [{"shapes": {"x": [5]}, "count": 3, "uid": PEER.uid}]
    asked(world, 1, 6)
    world.send(Sampled(sample()))
    assert len(world.sizes["m-1"]) == 1
    world.send(ShutdownAsked())
    assert len(world.sizes["m-1"]) == 2

    again = World(verdicts={CPU: "ok", OV_CPU: "ok"}, boot=False)
    again.sizes = world.sizes
    again.boot()
    again.put("m")
    again.settle()
    assert [e.spec.get("shapes") for e in again.effects if isinstance(e, LoadInstance)] == [
        [{"x": [5]}, {"x": [6]}]
    ]
    again.put("m", "2")
    again.settle()
    asked(again, 9, 6)
    sizes = again.serving().sizes
    assert sizes is not None
    assert sizes.most() == [{"x": [6]}, {"x": [5]}]
    again.send(ShutdownAsked())
    assert again.sizes["m-2"][0]["count"] == 10
    assert again.sizes["m-1"] == world.sizes["m-1"]


def test_a_choice_at_guessed_sizes_is_made_again_when_requests_have_told_theirs() -> None:
    """Once, and not for a trial or two; after a restart too."""
    before = idle_world()
    before.measured(**{**FASTER, "proven": False}, size=at(16_000, "typical"))
    (choice,) = choices(before)
    assert choice["guessed"] is True
    world = World(verdicts={CPU: "ok", OV_CPU: "ok"}, boot=False)
    world.choices["m-1"] = choice
    world.boot()
    world.put("m")
    world.settle()
    assert world.serving().choice == "remembered"
    asked(world, REQUESTS_MIN - 1, 4)
    world.send(Sampled(sample()))
    world.pass_time(100.0)
    assert not world.measures
    asked(world, 1, 4)
    world.send(Sampled(sample()))
    world.pass_time(2 * IDLE_FIRST_S)
    (measure,) = world.measures.values()
    assert measure.spec["shapes"] == [{"x": [4]}]
    world.measured(**FASTER, size=at(4))
    assert (world.serving().candidate, choices(world)[-1]["guessed"]) == (OV_CPU, False)
    asked(world, 2 * REQUESTS_MIN, 5)
    world.send(Sampled(sample()))
    world.pass_time(1000.0)
    assert not world.measures


def test_a_choice_that_requests_sizes_led_to_is_not_made_again() -> None:
    """Also where the model refused them in the measurement, which would go on for ever."""
    world = serving_world()
    asked(world, REQUESTS_MIN, 4)
    world.pass_time(IDLE_FIRST_S + 0.5)
    world.measured(**{**FASTER, "proven": False}, size=at(16_000, "typical"))
    asked(world, REQUESTS_MIN, 4)
    world.send(Sampled(sample()))
    world.pass_time(1000.0)
    assert not world.measures


def test_a_load_that_dies_of_its_warm_up_is_made_without_it() -> None:
    """A size that one request had must not keep a model from serving."""
    world = World(verdicts={CPU: "ok", OV_CPU: "ok"}, boot=False)
    world.sizes["m-1"] = [{"shapes": {"x": [1 << 20]}, "count": 1, "uid": 0}]
    world.boot()
    world.hold_loads = True
    world.put("m")
    world.settle()
    world.crash(next(w for w in world.workers.values() if w.loading))
    world.settle()
    world.hold_loads = False
    world.finish_loads()
    world.settle()
    loads = [e.spec.get("shapes") for e in world.effects if isinstance(e, LoadInstance)]
    assert loads == [[{"x": [1 << 20]}], None]
    assert (world.serving().state, world.serving().candidate) == (InstanceState.READY, CPU)


# ---- edgectl tune


def ask(world: World, do: str = "start", **settings: Any) -> dict[str, Any]:
    """A word of the owner's tool: the report."""
    reply = world.request("model_tune", model_name="m", settings={"do": do, **settings})
    assert "error" not in reply, reply
    return dict(reply["tune"])


def refusal(world: World, do: str = "start", model: str = "m", **settings: Any) -> str:
    """The reason of a refusal."""
    reply = world.request("model_tune", model_name=model, settings={"do": do, **settings})
    return str(reply["error"]["reason"])


def serving_world(**settings: Any) -> World:
    """A world that serves `m`, and in which nothing was measured yet."""
    world = World(verdicts={CPU: "ok", OV_CPU: "ok"})
    world.put("m", **settings)
    world.settle()
    return world


def test_an_owners_tune_changes_nothing_until_it_is_applied() -> None:
    """Measured, shown, and then taken by a swap that loses nothing; remembered as tuned."""
    world = serving_world()
    before = world.serving()
    report = ask(world, aim="throughput", budget_ms=60_000)
    assert (report["state"], report["aim"]) == ("measuring", "throughput")
    assert report["measuring"] == Setup(OV_CPU, 4).to_wire()
    while world.measures:
        (measure,) = world.measures.values()
        assert measure.spec["nice"] == NICE
        answer(world)
    report = ask(world, "status", tune=report["id"])
    assert (report["state"], world.serving()) == ("measured", before)
    assert not remembered(world)
    assert report["best"]["instances"] == 4
    assert len([row for row in report["rows"] if row["best"]]) == 1
    assert {"model.tune"} <= {e.topic for e in world.effects if isinstance(e, Publish)}
    running = world.infer("m")
    world.hold_loads = True
    assert ask(world, "apply", tune=report["id"])["state"] == "applying"
    world.settle()
    world.finish_loads()
    world.finish_runs()
    assert world.answer(running).version == "1"
    assert ask(world, "status", tune=report["id"])["state"] == "applied"
    assert (world.serving().choice, loaded(world)) == ("tuned", (4, 1))
    assert [c["source"] for c in choices(world)] == ["tuned"]
    world.pass_time(100.0)
    assert not world.measures


def test_an_owners_shapes_and_inputs_are_what_is_measured_with() -> None:
    """For all its setups, and no longer: inputs may be large."""
    world = serving_world()
    asked(world, 3, 5)
    report = ask(world, aim="throughput", shapes={"x": [48]})
    (measure,) = world.measures.values()
    assert (measure.spec["owner_shapes"], measure.spec["shapes"]) == ({"x": [48]}, [{"x": [5]}])
    world.measured(**FASTER, size=at(48, "owner"))
    asked(world, 9, 6)
    (measure,) = world.measures.values()
    assert (measure.spec["owner_shapes"], measure.spec["shapes"]) == ({"x": [48]}, [{"x": [5]}])
    rows = ask(world, "status", tune=report["id"])["rows"]
    assert [row["size"] for row in rows if row["runtime"] == "openvino"] == [at(48, "owner")]
    ask(world, "cancel", tune=report["id"])

    tensor = InputTensor("x", "FP32", [2], data=b"\0\0\0\0" * 2)
    reply = world.request("model_tune", model_name="m", settings={"do": "start"}, inputs=[tensor])
    (measure,) = world.measures.values()
    assert [(t.name, t.shape, bytes(t.raw)) for t in measure.inputs] == [("x", [2], b"\0" * 8)]
    assert "owner_shapes" not in measure.spec
    ask(world, "cancel", tune=reply["tune"]["id"])
    assert world.core.chooser.tune is not None
    assert not world.core.chooser.tune.inputs


@pytest.mark.parametrize(
    ("shapes", "reason"),
    [
        ("x=1", "BAD_PARAMETER"),
        ({"x": 5}, "BAD_PARAMETER"),
        ({"x": [-1]}, "BAD_PARAMETER"),
        ({"x": [True]}, "BAD_PARAMETER"),
        ({"x": [1] * 1000}, "BAD_PARAMETER"),
        ({"y": [1]}, "UNKNOWN_INPUT"),
        ({"x": [1, 1]}, "BAD_SHAPE"),
        ({"x": [0]}, "BAD_SHAPE"),
        ({"x": [1 << 30]}, "BAD_SHAPE"),
    ],
)
def test_shapes_that_cannot_be_are_refused(shapes: Any, reason: str) -> None:
    """With a code, before anything is measured or made up."""
    world = serving_world()
    assert refusal(world, shapes=shapes) == reason
    assert not world.measures


def test_inputs_that_no_request_may_have_are_refused() -> None:
    """By the rules of a request, and never beside shapes or in leased memory."""
    world = serving_world()
    name = world.lease()
    leased = {"shared_memory_region": name, "shared_memory_byte_size": 8}
    good = InputTensor("x", "FP32", [2], data=b"\0" * 8)
    for tensor, more, reason in (
        (InputTensor("y", "FP32", [2], data=b"\0" * 8), {}, "UNKNOWN_INPUT"),
        (InputTensor("x", "FP32", [3], data=b"\0" * 8), {}, "BAD_SIZE"),
        (InputTensor("x", "INT64", [1], data=b"\0" * 8), {}, "BAD_DATATYPE"),
        (InputTensor("x", "FP32", [2], parameters=leased), {}, "BAD_REGION"),
        (good, {"shapes": {"x": [2]}}, "BAD_PARAMETER"),
    ):
        settings = {"do": "start", **more}
        reply = world.request("model_tune", model_name="m", settings=settings, inputs=[tensor])
        assert reply["error"]["reason"] == reason
    assert not world.measures


def test_requests_do_not_stop_an_owners_tune_and_are_counted() -> None:
    """It stands back behind them instead, and its figures are known to be the worse for it."""
    world = serving_world()
    report = ask(world)
    world.infer("m")
    world.finish_runs()
    assert world.measures
    assert ask(world, "status", tune=report["id"])["requests"] == 1


def test_an_owners_tune_can_be_cancelled_and_leaves_everything_as_it_was() -> None:
    """By word, and by an owner's tool that is not heard of any more."""
    world = serving_world()
    before = world.serving()
    report = ask(world, "cancel", tune=ask(world)["id"])
    assert (report["state"], report["reason"]) == ("cancelled", "CANCELLED")
    assert not world.measures
    assert refusal(world, "apply", tune=report["id"]) == "NOT_MEASURED"
    number = ask(world)["id"]
    world.pass_time(ASKED_S - 1)
    ask(world, "status", tune=number)
    world.pass_time(ASKED_S - 1)
    assert world.measures
    world.pass_time(2.0)
    assert ask(world, "status", tune=number)["reason"] == "OWNER_GONE"
    assert world.serving() is before
    assert not remembered(world)
    world.pass_time(IDLE_FIRST_S)
    assert world.measures  # the daemon's own, as if nothing had been


def test_an_owners_tune_takes_the_place_of_the_daemons_own() -> None:
    """One measurement at a time, and the owner's comes first."""
    world = idle_world()
    assert world.measures
    ask(world)
    (measure,) = world.measures.values()
    assert measure.spec["nice"] == NICE


def test_a_budget_ends_a_tune_with_what_is_known_by_then() -> None:
    """At least one setup is measured, however small it is."""
    world = serving_world()
    number = ask(world, aim="throughput", budget_ms=100)["id"]
    world.pass_time(1.0)
    answer(world)
    assert not world.measures
    report = ask(world, "status", tune=number)
    assert (report["state"], len(report["rows"])) == ("measured", 2)


def test_what_runs_best_already_is_remembered_without_a_load() -> None:
    """There is nothing to swap."""
    world = serving_world()
    number = ask(world, aim="latency")["id"]
    while world.measures:
        answer(world)
    loads = world.loads()
    assert ask(world, "apply", tune=number)["state"] == "applied"
    assert (world.loads(), world.serving().choice) == (loads, "tuned")
    assert remembered(world) == ["onnxruntime"]


def test_a_tune_whose_best_does_not_load_says_so_and_the_model_serves_on() -> None:
    """What was remembered is taken back."""
    world = serving_world()
    number = ask(world)["id"]
    world.measured(**FASTER)
    while world.measures:
        world.measured(agrees=False, proven=False, why="no")
    world.load_faults["m-1", OV_CPU] = "MODEL_LOAD_FAILED"
    before = world.serving()
    ask(world, "apply", tune=number)
    world.settle()
    report = ask(world, "status", tune=number)
    assert (report["state"], report["reason"]) == ("failed", "SWITCH_FAILED")
    assert world.serving() is before
    assert remembered(world)[-1] == "onnxruntime"


def test_a_tune_takes_what_is_not_proven_only_by_a_word_of_its_own() -> None:
    """Every disagreement is in the report, and the best is the best of what is proven."""
    for accepted, runs_on in ((False, CPU), (True, OV_CPU)):
        world = serving_world()
        number = ask(world)["id"]
        while world.measures:
            other = answers_on(world) != "onnxruntime"
            world.measured(**(BLOCKED if other else {**FASTER, "candidate_p50_us": 1000.0}))
        report = ask(world, "status", tune=number)
        assert report["best"]["runtime"] == "onnxruntime"
        assert report["best_unproven"]["runtime"] == "openvino"
        (row,) = [r for r in report["rows"] if r["runtime"] == "openvino"]
        assert (row["obstacles"], row["remedy"]) == (BLOCKED["obstacles"], "say so")
        ask(world, "apply", tune=number, unproven=accepted)
        world.settle()
        report = ask(world, "status", tune=number)
        assert (report["state"], world.serving().candidate) == ("applied", runs_on)
        assert report["best"]["runtime"] == runs_on.runtime


def answers_on(world: World) -> str:
    """The runtime that is being measured."""
    (measure,) = world.measures.values()
    return str(measure.spec["candidate"]["runtime"])


def test_a_tune_is_refused_with_a_reason() -> None:
    """One at a time; none while memory is short or the model is on its way; and only what makes sense."""
    world = serving_world()
    assert refusal(world, aim="beauty") == "BAD_PARAMETER"
    assert refusal(world, budget_ms=0) == "BAD_PARAMETER"
    assert refusal(world, budget_ms="long") == "BAD_PARAMETER"
    assert refusal(world, "dance") == "BAD_PARAMETER"
    assert refusal(world, model="nobody") == "MODEL_NOT_FOUND"
    assert refusal(world, "status", tune=77) == "NO_TUNE"
    ask(world)
    assert refusal(world) == "TUNE_RUNNING"
    world.send(Sampled(sample(free=1 << 30)))
    report = world.request("server_status")["tune"]
    assert (report["state"], report["reason"]) == ("failed", "MEMORY_PRESSURE")
    assert refusal(world) == "MEMORY_PRESSURE"
    world.send(Sampled(sample()))
    world.hold_loads = True
    world.put("m", "2")
    world.settle()
    assert refusal(world) == "MODEL_LOADING"


def test_a_tune_ends_when_the_model_is_replaced() -> None:
    """Its figures are another content's."""
    world = serving_world()
    number = ask(world)["id"]
    world.put("m", "2")
    world.settle()
    report = ask(world, "status", tune=number)
    assert (report["state"], report["reason"]) == ("failed", "MODEL_LOADING")


def test_settings_that_say_how_it_runs_anyhow_are_taken_over_without_a_load() -> None:
    """As after `edgectl tune --export`; settings that say anything else load it anew."""
    world = serving_world()
    before = world.serving()
    world.put("m", runtime="onnxruntime", device="cpu", threads=4, instances=1)
    world.settle()
    assert world.serving() is before
    assert (before.choice, before.settings.threads, len(world.loads())) == ("pinned", 4, 1)
    row = world.request("repository_index")["models"][0]
    assert row["settings_sha256"] == before.entry.settings.sha256()
    world.put("m", runtime="onnxruntime", device="cpu", threads=2, instances=1)
    world.settle()
    assert (world.serving() is before, len(world.loads())) == (False, 2)
