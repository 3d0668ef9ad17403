"""The resource ladder: pure, so every rung is a table."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edged.resources import (
    Level,
    ResourceLimits,
    Sample,
    Verdict,
    WorkerSample,
    format_bytes,
    judge,
    may_load,
)

GIB = 1 << 30
MIB = 1 << 20
LIMITS = ResourceLimits(
    memory_bytes=6 * GIB, memory_pressure=20.0, disk_free_min_bytes=256 * MIB, temperature_max_c=95.0
)
CALM = Sample(
    memory_total_bytes=8 * GIB,
    memory_available_bytes=6 * GIB,
    cgroup_limit_bytes=None,
    cgroup_current_bytes=None,
    psi_some_avg10=0.0,
    psi_full_avg10=0.0,
    cpu_percent=10.0,
    load1=0.5,
    cpus=4,
    temperature_c=50.0,
    throttled=False,
    disk_free_bytes=10 * GIB,
    supervisor_rss_bytes=40 * MIB,
    workers=(),
)


def verdict(sample: Sample, previous: Verdict | None = None, **budgets: int) -> Verdict:
    return judge(
        sample, LIMITS, budgets={int(pid[1:]): size for pid, size in budgets.items()}, previous=previous
    )


def test_a_calm_device_is_ok_and_says_nothing() -> None:
    """Nothing to say means no reasons, and all that the limit leaves is free for models."""
    result = verdict(CALM)
    assert (result.level, result.reasons) == (Level.OK, ())
    assert result.free_for_models_bytes == 6 * GIB - 40 * MIB


@pytest.mark.parametrize(
    ("change", "level", "words"),
    [
        ({"memory_available_bytes": int(0.14 * 8 * GIB)}, Level.WARN, "1.1 GiB of the device's memory"),
        ({"memory_available_bytes": int(0.09 * 8 * GIB)}, Level.REFUSE_LOADS, "737 MiB"),
        ({"memory_available_bytes": int(0.05 * 8 * GIB)}, Level.SHRINK, "410 MiB"),
        ({"memory_available_bytes": int(0.02 * 8 * GIB)}, Level.SHED, "164 MiB"),
        ({"cgroup_limit_bytes": GIB, "cgroup_current_bytes": GIB}, Level.SHED, "0 B of the control group's"),
        ({"cgroup_limit_bytes": GIB, "cgroup_current_bytes": GIB // 2}, Level.OK, ""),
        ({"supervisor_rss_bytes": int(5.5 * GIB)}, Level.WARN, "edged uses 5.5 GiB of the 6 GiB it may"),
        ({"supervisor_rss_bytes": 6 * GIB}, Level.REFUSE_LOADS, "edged uses 6 GiB"),
        ({"psi_some_avg10": 11.0}, Level.WARN, "11 % of the time"),
        ({"psi_some_avg10": 21.0}, Level.REFUSE_LOADS, "21 % of the time"),
        ({"psi_some_avg10": 31.0}, Level.SHRINK, "31 % of the time"),
        ({"psi_some_avg10": 40.0, "psi_full_avg10": 20.0}, Level.SHED, "all at once 20 %"),
        ({"psi_some_avg10": None, "psi_full_avg10": None}, Level.OK, ""),
        ({"temperature_c": 86.0}, Level.WARN, "86 °C, its limit is 95 °C"),
        ({"temperature_c": 95.0}, Level.REFUSE_LOADS, "95 °C"),
        ({"temperature_c": None, "throttled": None}, Level.OK, ""),
        ({"throttled": True}, Level.WARN, "slows its processors down"),
        ({"disk_free_bytes": 0}, Level.WARN, "0 B are free on the state directory's disk, 256 MiB must"),
        ({"disk_free_bytes": None}, Level.WARN, "cannot be read"),
    ],
)
def test_each_measure_reaches_its_step_and_says_so_in_figures(
    change: dict[str, object], level: Level, words: str
) -> None:
    """Every measure alone climbs to its step, with a sentence that has the figures."""
    result = verdict(replace(CALM, **change))  # type: ignore[arg-type]  # a table of several fields
    assert result.level is level
    assert words in "; ".join(result.reasons)


def test_a_pressure_bound_of_zero_switches_the_measure_off() -> None:
    """Nobody wants a daemon that refuses everything because nothing waits."""
    limits = replace(LIMITS, memory_pressure=0.0)
    assert judge(replace(CALM, psi_some_avg10=50.0), limits, budgets={}, previous=None).level is Level.OK


def test_the_gravest_reason_comes_first() -> None:
    """What a person reads first is what decided."""
    result = verdict(replace(CALM, throttled=True, memory_available_bytes=100 * MIB))
    assert result.level is Level.SHED
    assert "memory are left" in result.reasons[0]


def test_falling_needs_a_margin_and_climbing_does_not() -> None:
    """A device that hovers at a bound keeps its level until it is clear of it."""
    over = verdict(replace(CALM, psi_some_avg10=20.5))
    assert over.level is Level.REFUSE_LOADS
    hovering = verdict(replace(CALM, psi_some_avg10=19.0), over)
    assert hovering.level is Level.REFUSE_LOADS
    assert hovering.reasons
    clear = verdict(replace(CALM, psi_some_avg10=17.0), hovering)
    assert clear.level is Level.WARN
    assert verdict(CALM, clear).level is Level.OK
    assert verdict(replace(CALM, psi_some_avg10=19.0)).level is Level.WARN


@given(
    available=st.lists(st.integers(0, 8 * GIB), min_size=1, max_size=20),
    pressure=st.floats(0, 100),
    heat=st.none() | st.floats(-20, 140),
)
def test_a_level_above_ok_always_has_a_reason(
    available: list[int], pressure: float, heat: float | None
) -> None:
    """In any sequence of samples, levels are never without a sentence, nor below the strict judgement."""
    previous = None
    for count in available:
        sample = replace(
            CALM,
            memory_available_bytes=count,
            psi_some_avg10=pressure,
            psi_full_avg10=0.0,
            temperature_c=heat,
        )
        strict = verdict(sample)
        previous = verdict(sample, previous)
        assert previous.level >= strict.level
        assert bool(previous.reasons) == (previous.level > Level.OK)
        assert previous.free_for_models_bytes >= 0


def test_a_worker_over_its_budget_is_ended_at_the_second_sample() -> None:
    """One sample may catch a passing peak; two in a row do not."""
    sample = replace(CALM, workers=(WorkerSample(7, 600 * MIB), WorkerSample(8, 100 * MIB)))
    first = verdict(sample, p7=500 * MIB, p8=500 * MIB)
    assert (first.over_budget, first.suspects) == ((), (7,))
    second = verdict(sample, first, p7=500 * MIB, p8=500 * MIB)
    assert second.over_budget == (7,)
    assert second.level is Level.OK


def test_a_peak_that_passed_is_forgiven() -> None:
    """Over, under, over is twice a first time."""
    over = replace(CALM, workers=(WorkerSample(7, 600 * MIB),))
    under = replace(CALM, workers=(WorkerSample(7, 400 * MIB),))
    result = None
    for sample in (over, under, over):
        result = verdict(sample, result, p7=500 * MIB)
        assert result.over_budget == ()


def test_when_memory_is_nearly_gone_one_sample_is_enough() -> None:
    """At SHED the worker over its budget goes at once, the largest first; one without a budget never does."""
    sample = replace(
        CALM,
        memory_available_bytes=10 * MIB,
        workers=(WorkerSample(7, 600 * MIB), WorkerSample(8, 900 * MIB), WorkerSample(9, 2 * GIB)),
    )
    assert verdict(sample, p7=500 * MIB, p8=500 * MIB).over_budget == (8, 7)
    assert verdict(sample).over_budget == ()


def test_what_is_free_is_the_least_of_limit_machine_and_group() -> None:
    """Free memory is what every bound leaves."""
    assert verdict(replace(CALM, memory_available_bytes=5 * GIB)).free_for_models_bytes == 5 * GIB
    grouped = replace(CALM, cgroup_limit_bytes=2 * GIB, cgroup_current_bytes=GIB)
    assert verdict(grouped).free_for_models_bytes == GIB
    worker = replace(CALM, workers=(WorkerSample(7, 5 * GIB),))
    assert verdict(worker).free_for_models_bytes == GIB - 40 * MIB


def test_a_load_is_allowed_or_refused_with_both_figures() -> None:
    """Needed and free bytes stand in the sentence, whatever the answer."""
    calm = verdict(CALM)
    assert may_load(calm, GIB) == (True, "1 GiB needed, 6.0 GiB free for models")
    allowed, why = may_load(calm, 7 * GIB)
    assert not allowed
    assert why == (
        "not enough memory: 7 GiB needed, 6.0 GiB free for models; unload a model or raise resources.memory"
    )
    allowed, why = may_load(verdict(replace(CALM, temperature_c=99.0)), MIB)
    assert not allowed
    assert "the device is at 99 °C" in why
    assert "1 MiB needed" in why


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (300 * MIB, "300 MiB"),
        (5 << 40, "5 TiB"),
    ],
)
def test_bytes_read_well(count: int, text: str) -> None:
    """Binary units, no needless digits."""
    assert format_bytes(count) == text
