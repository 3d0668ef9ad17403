"""What is remembered of each model, and that it is never more than it may be."""

from __future__ import annotations

from edged.happenings import HAPPENINGS_MAX, MODELS_MAX, Happenings
from tests.world import World


def test_the_newest_lines_of_a_model_are_kept_in_order() -> None:
    """The oldest go first, and another model's are another model's."""
    kept = Happenings()
    kept.note("model_ready", {"MODEL": "other"}, 0.0)
    for number in range(HAPPENINGS_MAX + 5):
        kept.note("worker_crashed", {"MODEL": "m", "REASON": f"crash {number}"}, float(number))
    found = kept.of("m")
    assert [each.time_s for each in found] == [float(n) for n in range(5, HAPPENINGS_MAX + 5)]
    assert found[-1].to_wire() == {
        "time_ms": (HAPPENINGS_MAX + 4) * 1000,
        "event": "worker_crashed",
        "fields": {"REASON": f"crash {HAPPENINGS_MAX + 4}"},
    }
    assert len(kept.of("other")) == 1


def test_a_line_about_no_model_is_about_none() -> None:
    """The daemon's own lines are not a model's life."""
    kept = Happenings()
    kept.note("folder_fault", {"PATH": "/models"}, 1.0)
    assert kept.of("") == ()
    assert kept.of("/models") == ()


def test_what_is_only_for_debugging_is_not_kept() -> None:
    """A worker that starts and ends as it should is no news of its model."""
    kept = Happenings()
    kept.note("worker_started", {"MODEL": "m"}, 0.0)
    kept.note("worker_exited", {"MODEL": "m"}, 1.0)
    assert kept.of("m") == ()
    kept.note("of_the_future", {"MODEL": "m"}, 2.0)
    assert len(kept.of("m")) == 1


def test_names_without_end_take_no_memory_without_end() -> None:
    """The model that was silent for longest is forgotten, not the one that is talked about."""
    kept = Happenings()
    kept.note("model_ready", {"MODEL": "first"}, 0.0)
    for number in range(MODELS_MAX - 1):
        kept.note("entry_refused", {"MODEL": f"x{number}"}, 1.0)
    kept.note("worker_crashed", {"MODEL": "first"}, 2.0)
    kept.note("entry_refused", {"MODEL": "one more"}, 3.0)
    assert len(kept.of("first")) == 2
    assert kept.of("x0") == ()
    assert kept.of("one more")


def test_a_long_reason_is_cut_and_an_empty_field_left_out() -> None:
    """What a worker says may be long; the journal has all of it."""
    kept = Happenings()
    kept.note("model_failed", {"MODEL": "m", "DETAIL": "x" * 10_000, "HINT": ""}, 0.0)
    fields = kept.of("m")[0].fields
    assert len(fields["DETAIL"]) == 300
    assert fields["DETAIL"].endswith("…")
    assert "HINT" not in fields


def test_the_core_tells_a_models_life_with_the_clocks_time() -> None:
    """What it tells the log about a model is in the status when that model is asked for, and only then."""
    world = World()
    world.core.runs.epoch_offset_s = 1_700_000_000.0
    world.put("m")
    world.settle()
    world.crash(next(iter(world.workers.values())))
    world.settle()
    status = world.request("server_status", model_name="m")
    events = [each["event"] for each in status["history"]]
    assert events[:2] == ["model_loading", "model_ready"]
    assert "worker_crashed" in events
    assert events[-1] == "worker_restarted"
    crash = next(each for each in status["history"] if each["event"] == "worker_crashed")
    assert crash["fields"]["REASON"] == "killed by SIGSEGV"
    assert abs(crash["time_ms"] / 1000 - 1_700_000_000.0 - world.now_s) < 60
    row = next(each for each in status["models"] if each["name"] == "m")
    assert row["restarts"] == 1
    assert row["ready_ms"] > 1_700_000_000_000
    assert row["source"]
    assert "history" not in world.request("server_status")


def test_what_a_removed_model_did_can_still_be_asked_and_what_never_was_can_not() -> None:
    """Why it went is asked when it is gone."""
    world = World()
    world.put("m")
    world.settle()
    world.remove("m")
    world.pass_time(3.0)
    status = world.request("server_status", model_name="m")
    assert status["models"] == []
    assert status["history"][-1]["event"] == "model_removed"
    assert world.request("server_status", model_name="n")["error"]["reason"] == "MODEL_NOT_FOUND"
