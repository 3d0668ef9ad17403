"""Counts, times and quantiles of one model."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edged.statistics import BATCH_SIZES_MAX, Histogram, ModelStatistics


def test_nothing_counted_is_zero() -> None:
    """No division, no invented latency."""
    assert Histogram().quantile_us(0.5) == 0


@given(st.integers(0, 2**42 - 1))
def test_a_bucket_is_at_most_an_eighth_wide(value: int) -> None:
    """The quantile of one latency is its bucket's lower edge."""
    histogram = Histogram()
    histogram.add(value)
    found = histogram.quantile_us(0.5)
    assert found <= value
    assert value - found <= value / 8
    if value < 16:
        assert found == value


def test_buckets_tell_what_came_between_two_looks() -> None:
    """Only those that hold something, by their lower edges, in order."""
    histogram = Histogram()
    assert histogram.buckets() == []
    for value in (3, 3, 100, 5000):
        histogram.add(value)
    before = dict(histogram.buckets())
    assert before == {3: 2, 96: 1, 4608: 1}
    histogram.add(101)
    after = dict(histogram.buckets())
    assert {edge: n - before.get(edge, 0) for edge, n in after.items() if n != before.get(edge)} == {96: 1}


@pytest.mark.parametrize("value", [-5, 2**60, 2**80])
def test_absurd_latencies_are_counted_all_the_same(value: int) -> None:
    """A clock's jump must not raise on the hot path."""
    histogram = Histogram()
    histogram.add(value)
    assert histogram.count == 1
    assert histogram.quantile_us(1.0) >= 0


@given(st.lists(st.integers(0, 10**7), min_size=1, max_size=200), st.sampled_from([0.5, 0.9, 0.99, 1.0]))
def test_quantiles_are_within_a_bucket_of_the_real_ones(values: list[int], q: float) -> None:
    """Against the sorted list."""
    histogram = Histogram()
    for value in values:
        histogram.add(value)
    rank = max(0, -(-int(q * len(values) * 1000) // 1000) - 1)
    real = sorted(values)[rank]
    assert real * 7 // 8 - 1 <= histogram.quantile_us(q) <= sorted(values)[min(rank + 1, len(values) - 1)]


def test_the_wire_form_is_that_of_the_extension() -> None:
    """Counts and nanoseconds by kind; refusals and cancellations are no failures."""
    stats = ModelStatistics()
    stats.executed(1, 2000)
    stats.success(rows=1, queue_ns=1000, compute_ns=2000, total_ns=10_000_000, epoch_ms=77)
    stats.executed(1, 2000)
    stats.success(rows=1, queue_ns=1000, compute_ns=2000, total_ns=10_000_000, epoch_ms=78)
    for kind in ("fail", "cancel", "reject"):
        stats.failure(kind, 5)
    assert stats.error_count == 1
    wire = stats.to_wire("m", "3")
    assert (wire["name"], wire["version"], wire["last_inference"]) == ("m", "3", 78)
    assert (wire["inference_count"], wire["execution_count"]) == (2, 2)
    assert wire["inference_stats"]["success"] == {"count": 2, "ns": 20_000_000}
    assert wire["inference_stats"]["queue"] == {"count": 2, "ns": 2000}
    assert wire["inference_stats"]["compute_infer"] == {"count": 2, "ns": 4000}
    assert wire["inference_stats"]["reject"] == {"count": 1, "ns": 5}
    assert wire["latency_us"]["count"] == 2
    assert 8750 <= wire["latency_us"]["p50"] <= 10_000


@given(st.lists(st.integers(0, 2**30), min_size=1, max_size=20), st.data())
def test_what_was_not_sent_was_never_a_success(latencies_us: list[int], data: st.DataObject) -> None:
    """Taking one back leaves what would be there without it."""
    unsent = data.draw(st.integers(0, len(latencies_us) - 1))

    def counted(which: list[int]) -> ModelStatistics:
        stats = ModelStatistics()
        for us in which:
            stats.success(rows=2, queue_ns=us, compute_ns=7, total_ns=1000 * us, epoch_ms=0)
        return stats

    taken_back = counted(latencies_us)
    us = latencies_us[unsent]
    taken_back.unsent(rows=2, queue_ns=us, compute_ns=7, total_ns=1000 * us)
    without = counted(latencies_us[:unsent] + latencies_us[unsent + 1 :])
    assert taken_back.to_wire("m", "1") == without.to_wire("m", "1")


def test_rows_and_runs_are_counted_apart() -> None:
    """Inferences are rows, executions are runs; sizes beyond a bound are counted as the next power of two."""
    stats = ModelStatistics()
    stats.executed(4, 700)
    stats.success(rows=3, queue_ns=1, compute_ns=700, total_ns=800, epoch_ms=1)
    stats.success(rows=1, queue_ns=1, compute_ns=700, total_ns=800, epoch_ms=1)
    wire = stats.to_wire("m", "1")
    assert (wire["inference_count"], wire["execution_count"]) == (4, 1)
    assert wire["inference_stats"]["success"]["count"] == 2
    assert wire["batch_stats"] == [{"batch_size": 4, "compute_infer": {"count": 1, "ns": 700}}]
    for rows in range(1, 1000):
        stats.executed(rows, 1)
    sizes = [each["batch_size"] for each in stats.to_wire("m", "1")["batch_stats"]]
    assert len(sizes) <= BATCH_SIZES_MAX + 10
    assert sum(n for n, _ in stats.batches.values()) == 1000
    assert {128, 256, 512, 1024} <= set(sizes)
