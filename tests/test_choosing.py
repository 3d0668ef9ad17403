"""Which device is fastest: measured when nobody asks, switched to for a reason, remembered."""

from __future__ import annotations

from typing import Any

import pytest

from edged.choosing import IDLE_FIRST_S, LIMIT_S
from edged.events import RememberChoice, Sampled, StopMeasure
from tests.world import CPU, OV_CPU, World, sample


def idle_world(**settings: Any) -> World:
    """A world that serves `m` on ONNX Runtime, and has been idle for long enough to measure."""
    world = World(verdicts={CPU: "ok", OV_CPU: "ok"})
    world.put("m", **settings)
    world.settle()
    world.pass_time(IDLE_FIRST_S + 0.5)
    return world


def remembered(world: World) -> list[str]:
    """The runtimes that were remembered."""
    return [e.choice["runtime"] for e in world.effects if isinstance(e, RememberChoice)]


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
