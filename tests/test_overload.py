"""What the scheduler promises under load, simulated: floods, priorities, deadlines, twice the capacity."""

from __future__ import annotations

import pytest

from tests.load import HAND_OVER_S, Load, quantile


def steep(rows: int) -> float:
    """A run whose rows cost half of what a run costs."""
    return 0.0005 + 0.0005 * rows


def flat(rows: int) -> float:
    """A run whose rows cost next to nothing."""
    return 0.002 + 0.00005 * rows


def plain(rows: int) -> float:
    """A run that gains nothing by batches."""
    return 0.005 * rows


@pytest.mark.parametrize(("run_s", "batch_max"), [(steep, 16), (flat, 16), (plain, 1)])
@pytest.mark.parametrize("timeout_s", [0.0, 0.5])
def test_a_flood_costs_another_client_one_run_of_waiting(
    run_s: object, batch_max: int, timeout_s: float
) -> None:
    """Two hundred requests in flight of one client, one now and then of the other: it waits for what runs."""
    assert callable(run_s)
    load = Load(run_s, batch_max=batch_max)
    load.closed(1, 200, timeout_s=timeout_s)
    load.paced(2, 0.053)
    load.run(6.0)
    took = [each.took_s for each in load.of(2, after_s=1.0)]
    assert len(took) > 80
    assert all(each.outcome == "ok" for each in load.of(2))
    assert max(took) <= run_s(batch_max) + 1.1 * run_s(1) + 5 * HAND_OVER_S, (
        "what ran when it came, and its own"
    )


@pytest.mark.parametrize(("run_s", "batch_max"), [(steep, 16), (flat, 16), (plain, 1)])
def test_priority_one_waits_for_one_run_under_full_load(run_s: object, batch_max: int) -> None:
    """Its own run takes a tenth longer at the most for rows that ride along."""
    assert callable(run_s)
    load = Load(run_s, batch_max=batch_max)
    for client in range(4):
        load.closed(client, 50)
    load.paced(9, 0.053, priority=1)
    load.run(6.0)
    took = [each.took_s for each in load.of(9, after_s=1.0)]
    assert len(took) > 80
    alone_s = run_s(1) + 2 * HAND_OVER_S
    assert quantile(took, 0.99) <= 1.1 * (alone_s + run_s(batch_max)) + 2 * HAND_OVER_S


@pytest.mark.parametrize("clients", [1, 4, 20])
@pytest.mark.parametrize(
    ("timeout_s", "noise", "drift"), [(0.02, 0.0, 0.0), (0.05, 0.1, 0.3), (0.2, 0.3, 0.0), (0.2, 0.1, 0.3)]
)
def test_twice_the_capacity_is_as_good_as_the_capacity(
    clients: int, timeout_s: float, noise: float, drift: float
) -> None:
    """Nine tenths of what could be is answered in time, nothing expired is run, the rest refused at once."""
    load = Load(plain, noise=noise, drift=drift)
    load.poisson(clients, 400.0, timeout_s=timeout_s)
    load.run(31.0)
    asked = load.of(after_s=1.0)
    good = sum(1 for each in asked if each.good)
    refused = [each for each in asked if each.outcome != "ok"]
    assert good >= 0.9 * 30.0 / plain(1)
    assert load.expired_runs == 0
    assert quantile([each.took_s for each in refused], 0.99) <= 0.005


@pytest.mark.parametrize("clients", [1, 4, 20])
@pytest.mark.parametrize(("timeout_s", "noise"), [(0.02, 0.1), (0.05, 0.1), (0.05, 0.3), (0.2, 0.3)])
def test_what_is_admitted_is_in_time_at_four_fifths_of_the_capacity(
    clients: int, timeout_s: float, noise: float
) -> None:
    """99.9 % of it, come as it may, with deadlines of four to forty runs."""
    load = Load(plain, noise=noise)
    load.poisson(clients, 160.0, timeout_s=timeout_s)
    load.run(41.0)
    asked = load.of(after_s=1.0)
    admitted = [each for each in asked if each.outcome != "CANNOT_MEET_DEADLINE" or each.took_s > 0.0]
    assert len(admitted) > 0.75 * len(asked)
    assert sum(1 for each in admitted if each.good) >= 0.999 * len(admitted)


def test_several_instances_and_batches_keep_deadlines_too() -> None:
    """Four fifths of what three instances with batches can do."""
    load = Load(steep, batch_max=8, instances=3, noise=0.1)
    load.poisson(8, 0.8 * 3 * 8 / steep(8), timeout_s=0.05)
    load.run(4.0)
    asked = load.of(after_s=0.5)
    assert load.expired_runs == 0
    assert sum(1 for each in asked if each.good) >= 0.98 * len(asked)


def test_batches_carry_what_single_runs_cannot() -> None:
    """Three times what runs one by one could do is served, with no delay while little comes."""
    load = Load(flat, batch_max=16)
    load.poisson(8, 3.0 / flat(1))
    load.run(6.0)
    asked = load.of(after_s=1.0)
    assert all(each.outcome == "ok" for each in asked)
    assert load.runs < 0.6 * len(asked)
    calm = Load(flat, batch_max=16)
    calm.paced(1, 0.02)
    calm.run(4.0)
    assert max(each.took_s for each in calm.of()) <= flat(1) + 2.1 * HAND_OVER_S


def test_nobody_starves() -> None:
    """Priority nine is served while priority one takes all that it gets; bounded ageing."""
    load = Load(plain)
    load.closed(1, 20, priority=1)
    load.closed(2, 3, priority=9)
    load.run(20.0)
    low = load.of(2)
    assert 15 <= len(low) <= 21, "one run in each second"
    assert len(load.of(1)) >= 0.97 * 20.0 / plain(1)


def test_equal_clients_get_equal_shares() -> None:
    """However many requests each keeps in flight."""
    load = Load(plain)
    for client, depth in ((1, 1), (2, 5), (3, 100)):
        load.closed(client, depth)
    load.run(10.0)
    counts = [len(load.of(client)) for client in (1, 2, 3)]
    assert min(counts[1:]) >= 0.9 * max(counts[1:])
    assert counts[0] >= 0.7 * max(counts), "who asks only after each answer misses a turn now and then"


def test_a_model_that_has_become_slow_is_still_tried() -> None:
    """An estimate that no deadline can be kept with refuses only while something is ahead."""
    load = Load(plain)
    load.core.registry.tracks["m", None].serving.times.observe(1, 10.0, 10.0)  # type: ignore[union-attr] # it serves
    load.poisson(3, 50.0, timeout_s=0.02)
    load.run(5.0)
    assert sum(1 for each in load.of(after_s=2.0) if each.good) > 100
