"""Which setups are measured, and which is taken: made-up figures, no clock."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest

from edged.devices import Candidate
from edged.setups import (
    BATCHES,
    GAIN,
    Figures,
    Setup,
    Space,
    best,
    estimate_count,
    next_setup,
    pareto,
    reference_figures,
)

CPU = Candidate("onnxruntime", "CPU")
OV = Candidate("openvino", "CPU")
GPU = Candidate("openvino", "GPU.0")

Machine = Callable[[Setup], Figures]


def space(aim: str, **changes: Any) -> Space:
    """Eight CPUs, two runtimes, ONNX Runtime on all of them serves."""
    made = Space((CPU, OV), Setup(CPU, 8), 8, aim, instances=None)
    return replace(made, **changes)


def usable(p50_us: float, rows_s: float = 0.0, p99_us: float = 0.0) -> Figures:
    """Figures of a setup whose answers agree."""
    return Figures(p50_us, p99_us or p50_us, rows_s or 1e6 / p50_us, True, True)


def scaled(setup: Setup) -> Figures:
    """A machine where threads help by half as much as they should, and where a row of a batch is cheaper."""
    alone_us = 8000.0 if setup.candidate == CPU else 5000.0
    rows = max(1, setup.max_batch)
    p50_us = alone_us * (0.2 + 0.8 / setup.threads) * (0.5 + 0.5 * rows if rows < 16 else rows)
    return usable(p50_us, setup.instances * rows * 1e6 / p50_us)


def explore(around: Space, machine: Machine = scaled) -> dict[Setup, Figures]:
    """Measures for as long as there is something to measure; each setup once."""
    done = {around.current: machine(around.current)}
    while (setup := next_setup(around, done)) is not None:
        assert setup not in done
        done[setup] = machine(setup)
        assert len(done) <= 1 + estimate_count(around)
    return done


def test_the_search_for_latency_tries_devices_then_threads() -> None:
    """One instance always; the device that is far slower is not tried in other shapes."""
    around = space("latency")
    done = explore(around)
    assert [s for s in done if s.candidate == CPU] == [Setup(CPU, 8)]
    assert [s.threads for s in done if s.candidate == OV] == [8, 4, 2, 1]
    assert {s.instances for s in done} == {1}
    assert best(around, done) == Setup(OV, 8)


def test_the_search_for_throughput_tries_instances_then_batches() -> None:
    """The CPUs are divided; then sizes of a batch are tried on the best, while each gains a tenth."""
    around = space("throughput")
    done = explore(around)
    shapes = [(s.instances, s.threads) for s in done if s.candidate == OV and not s.max_batch]
    assert shapes == [(1, 8), (2, 4), (4, 2), (8, 1)]
    batches = [s.max_batch for s in done if s.max_batch]
    assert batches == [2, 4, 8, 16]
    assert {(s.instances, s.threads) for s in done if s.max_batch} == {(8, 1)}
    assert best(around, done) == Setup(OV, 1, 8, 8)


@pytest.mark.parametrize("aim", ["auto", "latency", "throughput"])
def test_what_the_owner_pinned_is_not_varied(aim: str) -> None:
    """Threads, instances and batch of the settings hold for whatever is tried."""
    around = space(aim, threads=3, instances=2, batch=4, current=Setup(CPU, 3, 2, 4))
    done = explore(around)
    assert {(s.threads, s.instances, s.max_batch) for s in done} == {(3, 2, 4)}
    assert {s.candidate for s in done} == {CPU, OV}


def test_a_model_whose_rows_are_fixed_is_tried_with_no_batch() -> None:
    """It would only be refused."""
    assert not [s for s in explore(space("throughput", rows_free=False)) if s.max_batch]


def test_what_shares_a_device_has_one_instance() -> None:
    """A GPU's context runs one thing at a time."""
    done = explore(space("throughput", candidates=(CPU, GPU)))
    assert {s.instances for s in done if s.candidate == GPU} == {1}


def test_auto_keeps_one_instance_unless_the_owner_left_that_open() -> None:
    """Devices only; with `instances = "auto"` the shapes of the faster device too."""
    assert set(explore(space("auto", instances=1))) == {Setup(CPU, 8), Setup(OV, 8)}
    done = explore(space("auto"))
    assert {s.instances for s in done if s.candidate == OV} == {1, 2, 4, 8}


def test_auto_takes_the_most_rows_that_do_not_make_a_run_twice_as_long() -> None:
    """More instances give more, but nobody who asks alone shall wait for it."""
    around = space("auto", candidates=(CPU,))
    times = {1: (1000.0, 1100.0), 2: (1300.0, 1500.0), 4: (1900.0, 2150.0), 8: (3400.0, 3900.0)}

    def machine(setup: Setup) -> Figures:
        p50_us, p99_us = times[setup.instances]
        return usable(p50_us, setup.instances * 1e6 / p50_us, p99_us)

    done = explore(around, machine)
    assert best(around, done) == Setup(CPU, 2, 4)


def test_auto_switches_device_only_for_a_tenth_and_so_many_microseconds() -> None:
    """As the owner has not asked for it."""
    around = space("auto", instances=1, gain_us=50.0)
    for there_us, want in ((950.0, CPU), (890.0, OV)):
        done = {Setup(CPU, 8): usable(1000), Setup(OV, 8): usable(there_us)}
        assert best(around, done).candidate == want
    tiny = {Setup(CPU, 8): usable(60), Setup(OV, 8): usable(20)}
    assert best(around, tiny).candidate == CPU
    assert best(replace(around, gain_us=0.0), tiny).candidate == OV


def test_what_does_not_agree_or_load_is_never_taken() -> None:
    """However fast it is."""
    around = space("latency")
    fast = usable(10)
    for bad in (replace(fast, agrees=False), replace(fast, proven=False), Figures(why="does not load")):
        done = {around.current: usable(1000), Setup(OV, 8): bad}
        assert best(around, done) == around.current
        assert next_setup(around, done) == Setup(CPU, 4)


def test_ties_go_to_the_fewest_threads() -> None:
    """What is within the noise is alike; threads that bring nothing are left to others."""
    around = space("latency", candidates=(CPU,), current=Setup(CPU, 8))
    done = {Setup(CPU, 8): usable(1000), Setup(CPU, 4): usable(700), Setup(CPU, 2): usable(720)}
    assert best(around, done) == Setup(CPU, 2)
    around = space("throughput", candidates=(CPU,))
    done = {Setup(CPU, 8): usable(1000, 1000), Setup(CPU, 2, 4): usable(1500, 2700)}
    done[Setup(CPU, 1, 4)] = usable(1600, 2650)
    assert best(around, done) == Setup(CPU, 1, 4)


def test_less_than_a_tenth_is_no_reason_to_change() -> None:
    """Neither in time nor in rows; a swap is not free."""
    gain = 1 - GAIN / 2
    done = {Setup(CPU, 8): usable(1000, 1000), Setup(CPU, 4): usable(1000 * gain, 1000 / gain)}
    for aim in ("latency", "throughput"):
        assert best(space(aim, candidates=(CPU,)), done) == Setup(CPU, 8)


@pytest.mark.parametrize("aim", ["auto", "latency", "throughput"])
def test_noise_never_leads_to_what_is_much_worse(aim: str) -> None:
    """With timings off by up to 4 %, the choice is within a tenth and the noise of the true best."""
    for seed in range(100):
        rng = random.Random(seed)
        around = space(aim)

        def noisy(setup: Setup, rng: random.Random = rng) -> Figures:
            off = rng.uniform(0.96, 1.04)
            true = scaled(setup)
            return replace(true, p50_us=true.p50_us * off, p99_us=true.p99_us * off, rows_s=true.rows_s / off)

        done = explore(around, noisy)
        chosen = scaled(best(around, done))
        if aim == "throughput":
            top = max(scaled(s).rows_s for s in done)
            assert chosen.rows_s > 0.8 * top
        else:
            top = min(scaled(s).p50_us for s in done)
            assert chosen.p50_us < (2.5 if aim == "auto" else 1.25) * top


def test_figures_are_scaled_by_what_the_reference_reached_in_the_same_minute() -> None:
    """A machine that slows down while it measures one setup does not make that one slow."""
    results = [
        {"reference_p50_us": 100.0, "reference_p99_us": 110.0, "reference_rows_s": 10_000.0}
        | {"candidate_p50_us": 50.0, "candidate_p99_us": 60.0, "candidate_rows_s": 20_000.0},
        {"reference_p50_us": 100.0, "candidate_p50_us": 100.0},
        {"reference_p50_us": 200.0, "reference_p99_us": 220.0, "reference_rows_s": 5_000.0}
        | {"candidate_p50_us": 100.0, "candidate_p99_us": 120.0, "candidate_rows_s": 10_000.0},
    ]
    reference = reference_figures(results)
    assert reference is not None
    assert reference.p50_us == 100.0
    fast, same, slowed = (Figures.of({**r, "agrees": True, "proven": True}, reference) for r in results)
    assert fast == slowed
    assert (same.p50_us, same.rows_s) == (100.0, 10_000.0)
    assert reference_figures([{"agrees": False, "reference_p50_us": None}]) is None
    assert not Figures.of({"agrees": True, "proven": True, "candidate_p50_us": None}, reference).usable


def test_pareto_has_what_no_other_beats_in_both() -> None:
    """And never what may not be taken."""
    done = {
        Setup(CPU, 8): usable(100, 100),
        Setup(CPU, 4): usable(120, 90),
        Setup(CPU, 4, 2): usable(150, 200),
        Setup(CPU, 2, 4): usable(150, 150),
        Setup(OV, 8): Figures(10, 10, 1e6, False, True),
    }
    assert pareto(done) == {Setup(CPU, 8), Setup(CPU, 4, 2)}


@pytest.mark.parametrize(
    "wire",
    [
        {},
        {"runtime": "onnxruntime"},
        {"runtime": 1, "device": "CPU"},
        {"runtime": "onnxruntime", "device": "CPU", "threads": 0},
        {"runtime": "onnxruntime", "device": "CPU", "threads": True},
        {"runtime": "onnxruntime", "device": "CPU", "instances": "many"},
        {"runtime": "onnxruntime", "device": "CPU", "max_batch_size": 1 << 40},
    ],
    ids=repr,
)
def test_a_record_that_is_none_of_ours_is_no_setup(wire: Mapping[str, Any]) -> None:
    """Another version may have written it: it is forgotten, and nothing falls over."""
    assert Setup.from_wire(wire, threads=4) is None


def test_setups_survive_their_books() -> None:
    """Also a record of the time when only runtime and device were chosen."""
    for setup in (Setup(CPU, 8), Setup(OV, 2, 4, BATCHES[-1])):
        assert Setup.from_wire(setup.to_wire(), threads=1) == setup
    old = {"runtime": "openvino", "device": "CPU", "compared": {}}
    assert Setup.from_wire(old, threads=4) == Setup(OV, 4)
    assert str(Setup(OV, 1, 2, 8)) == "openvino:CPU, 2 × 1 thread, batch 8"
