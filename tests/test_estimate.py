"""Run times: read off between what was measured, learned from what happens, not misled by one run."""

from __future__ import annotations

import pytest

from edged.estimate import REVIEW_RUNS, RunTimes


def test_nothing_known_is_zero() -> None:
    """Who asks must then try."""
    times = RunTimes()
    assert (times.expect_s(1), times.turn_s(4), times.margin_s(1.0), times.drain_s(100, 8)) == (0, 0, 0, 0)
    assert times.best_rows(8) == 8


def test_between_what_was_measured_straight_lines() -> None:
    """Beyond the largest each row costs what one of that costs."""
    times = RunTimes([[1, 1000], [4, 2500], [8, 4500]])
    for rows, ms in ((1, 1.0), (2, 1.5), (4, 2.5), (6, 3.5), (8, 4.5), (16, 9.0)):
        assert times.expect_s(rows) == pytest.approx(ms / 1000)


def test_one_size_known_is_a_start() -> None:
    """More rows are reckoned in proportion, fewer as the same."""
    times = RunTimes([[4, 2000]])
    assert times.expect_s(1) == pytest.approx(0.002)
    assert times.expect_s(8) == pytest.approx(0.004)


def test_a_seed_that_makes_no_sense_is_passed_over() -> None:
    """It comes from a worker."""
    times = RunTimes([[0, 5], [1, -3], ["x", 1], [2], [1, 700]])
    assert times.expect_s(1) == pytest.approx(0.0007)


def test_the_mean_follows_what_happens() -> None:
    """A model that has become three times as slow is known to be so after some twenty runs."""
    times = RunTimes([[1, 1000]])
    for _ in range(25):
        times.observe(1, 0.003, 0.003)
    assert times.expect_s(1) == pytest.approx(0.003, rel=0.15)


def test_one_outlier_moves_it_little() -> None:
    """A run of a hundred times the length counts as one of twice."""
    times = RunTimes([[1, 1000]])
    for _ in range(50):
        times.observe(1, 0.001, 0.001)
    times.observe(1, 0.1, 0.1)
    assert times.expect_s(1) <= 0.0011


def test_a_turn_is_the_run_and_what_goes_around_it() -> None:
    """Queues are worked off in turns."""
    times = RunTimes([[1, 1000]])
    for _ in range(100):
        times.observe(1, 0.001, 0.0015)
    assert times.expect_s(1) == pytest.approx(0.001)
    assert times.turn_s(1) == pytest.approx(0.0015, rel=0.05)
    assert times.drain_s(10, 1) == pytest.approx(0.015, rel=0.05)


def test_a_promise_has_room_for_how_much_turns_vary() -> None:
    """None when they do not; several deviations when they do."""
    steady, varying = RunTimes([[1, 1000]]), RunTimes([[1, 1000]])
    for n in range(200):
        steady.observe(1, 0.001, 0.001)
        varying.observe(1, *[0.0008 + 0.0004 * (n % 2)] * 2)
    assert steady.margin_s(0.001) < 0.00001
    assert varying.margin_s(0.001) == pytest.approx(4 * 0.0002, rel=0.2)
    assert varying.margin_s(0.016) == pytest.approx(4 * varying.margin_s(0.001)), "the root of sixteen turns"


def test_the_best_size_is_that_of_the_most_rows_in_a_second() -> None:
    """More rows are not worth it where a row costs the same in any company."""
    assert RunTimes([[1, 1000], [2, 1100], [4, 1300], [8, 2700]]).best_rows(8) == 4
    assert RunTimes([[1, 1000], [2, 2000], [4, 4000]]).best_rows(4) == 1
    assert RunTimes([[1, 1000], [2, 1100]]).best_rows(1) == 1
    assert RunTimes([[1, 1000], [6, 1500]]).best_rows(6) == 6


def test_a_size_that_was_never_tried_is_tried() -> None:
    """An owner's bound goes beyond what was measured."""
    assert RunTimes([[1, 1000], [8, 2000]]).best_rows(32) == 32


def test_a_queue_is_worked_off_in_the_best_batches() -> None:
    """Full ones, and what is left."""
    times = RunTimes([[1, 1000], [4, 2000], [8, 6000]])
    assert times.drain_s(9, 8) == pytest.approx(2 * 0.002 + 0.001)


def test_bad_luck_of_a_size_is_forgotten() -> None:
    """One that is no longer chosen, since it once was slow, wins back what was measured at load."""
    times = RunTimes([[1, 1000], [8, 2000]])
    for _ in range(30):
        times.observe(8, 0.05, 0.05)
    assert times.best_rows(8) < 8
    for _ in range(10 * REVIEW_RUNS):
        times.observe(1, 0.001, 0.001)
    assert times.expect_s(8) == pytest.approx(0.002, rel=0.1)
    assert times.best_rows(8) == 8


def test_broken_promises_widen_the_margin_and_kept_ones_narrow_it() -> None:
    """By a turn and by a thousandth of one, never by more than what was expected anyway."""
    times = RunTimes([[1, 1000.0]])
    before_s = times.margin_s(0.05)
    times.promised(kept=False)
    assert times.margin_s(0.05) == pytest.approx(before_s + 0.001)
    for _ in range(1000):
        times.promised(kept=True)
    assert times.margin_s(0.05) == pytest.approx(before_s)
    for _ in range(100):
        times.promised(kept=False)
    assert times.margin_s(0.05) == pytest.approx(before_s + 0.032)
    assert times.margin_s(0.002) <= before_s + 0.002
