"""`edgectl top`: the figures between two shots, and a screen that fits the terminal."""

from __future__ import annotations

from typing import Any

import pytest

from edged.cli.tables import Terminal
from edged.cli.top import SORTS, Shot, figures, frame

EIGHTY = Terminal(80, colour=False)


def entry(
    name: str, success: int, buckets: dict[int, int], *, fail: int = 0, version: str = "1"
) -> dict[str, Any]:
    """A model's statistics."""
    stats = {"success": {"count": success, "ns": 0}, "fail": {"count": fail, "ns": 0}}
    latency = {"count": success, "buckets": [[edge, n] for edge, n in buckets.items()]}
    return {"name": name, "version": version, "inference_stats": stats, "latency_us": latency}


def status(**changes: Any) -> dict[str, Any]:
    """What the daemon says beside the statistics."""
    sample = {
        "memory_total_bytes": 8 << 30,
        "memory_available_bytes": 5 << 30,
        "cpu_percent": 34.0,
        "cpus": 4,
        "temperature_c": 48.0,
        "throttled": False,
        "psi_some_avg10": 0.0,
        "disk_free_bytes": 10 << 30,
    }
    return {
        "version": "0.1.0",
        "state": "ready",
        "instance_id": "i",
        "uptime_s": 7300,
        "counters": {"requests": 0, "refused": 0},
        "clients": {"in_flight": 3},
        "resources": {"level": "OK", "reasons": [], "sample": sample},
        "devices": [
            {"runtime": "onnxruntime", "device": "CPU", "status": "ok"},
            {"runtime": "openvino", "device": "NPU", "status": "no_permission"},
            {"runtime": "openvino", "device": "GPU", "status": "absent"},
        ],
        "models": [row("digits"), row("vad")],
        **changes,
    }


def row(name: str, **more: Any) -> dict[str, Any]:
    """A model in the status."""
    plain = {"name": name, "version": "1", "state": "READY", "device": "CPU", "runtime": "onnxruntime"}
    return {**plain, "queue": 2, "rss_bytes": 50 << 20, **more}


BEFORE = Shot(100.0, status(), [entry("digits", 1000, {800: 990, 9000: 10}), entry("vad", 5, {100: 5})])
NOW = Shot(
    102.0,
    status(counters={"requests": 400, "refused": 4}),
    [entry("digits", 1200, {800: 1090, 1600: 98, 9000: 12}, fail=6), entry("vad", 5, {100: 5})],
)


def test_rates_and_percentiles_are_those_of_the_time_between() -> None:
    """What came before does not count: the slow ones of yesterday are not today's p99."""
    found = figures(NOW, BEFORE)
    digits, vad = found.models
    assert (found.seconds, found.requests_per_s, found.refused_per_s) == (2.0, 200.0, 2.0)
    assert (digits.requests_per_s, digits.errors_per_s) == (100.0, 3.0)
    assert (digits.p50_us, digits.p99_us) == (800.0, 1600.0)
    assert (vad.requests_per_s, vad.p50_us, vad.p99_us) == (0.0, None, None)
    assert (vad.queue, vad.rss_bytes) == (2, 50 << 20)


@pytest.mark.parametrize(
    "before",
    [
        None,
        Shot(100.0, away="gone"),
        Shot(100.0, status(instance_id="another"), BEFORE.statistics),
        Shot(102.0, status(), BEFORE.statistics),
    ],
)
def test_without_a_shot_of_the_same_daemon_before_there_are_no_rates(before: Shot | None) -> None:
    """None is not zero: nothing is invented."""
    found = figures(NOW, before)
    assert found.requests_per_s is None
    assert {(each.requests_per_s, each.p50_us) for each in found.models} == {(None, None)}
    assert [each.name for each in found.models] == ["digits", "vad"]


def test_a_version_that_came_in_between_began_at_zero() -> None:
    """And one whose counts fell is another than it was."""
    now = Shot(101.0, status(models=[]), [entry("new", 7, {5: 7}), entry("digits", 10, {800: 10})])
    found = {each.name: each for each in figures(now, BEFORE).models}
    assert found["new"].requests_per_s == 7.0
    assert found["digits"].requests_per_s == 10.0


def test_who_may_not_ask_for_the_status_sees_the_models_all_the_same() -> None:
    """With why the rest is missing."""
    now = Shot(102.0, {"instance_id": "i"}, NOW.statistics, partly="join its group edged-admin")
    before = Shot(100.0, {"instance_id": "i"}, BEFORE.statistics)
    lines = frame(now, figures(now, before), EIGHTY, height=24)
    assert any("digits" in line and "100" in line for line in lines)
    assert lines[-1] == "join its group edged-admin"


def test_a_frame_fits_a_terminal_of_eighty_by_twenty_four() -> None:
    """However long the names and however many the models; what is hidden is counted."""
    rows = [row(f"model-with-a-very-long-name-{n}", state="UNAVAILABLE") for n in range(60)]
    devices = [{"runtime": "openvino", "device": f"GPU.{n}", "status": "driver_error"} for n in range(9)]
    statistics = [entry(each["name"], 10**6, {12_000_000: 1}) for each in rows]
    now = Shot(101.0, status(models=rows, devices=devices), statistics)
    lines = frame(now, figures(now, Shot(100.0, status(), ())), EIGHTY, height=23)
    assert len(lines) == 23
    assert max(len(line) for line in lines) <= 80
    assert lines[-1].startswith("and 4")


@pytest.mark.parametrize(("width", "height"), [(40, 10), (60, 6), (80, 24), (200, 60), (20, 2)])
def test_no_size_of_a_terminal_is_too_small(width: int, height: int) -> None:
    """It shows what fits."""
    lines = frame(NOW, figures(NOW, BEFORE), Terminal(width), height=height)
    assert 0 < len(lines) <= height


def test_the_head_tells_of_machine_pressure_and_devices() -> None:
    """An absent device is none to look at; one that could work and does not is."""
    text = "\n".join(frame(NOW, figures(NOW, BEFORE), EIGHTY))
    for words in (
        "edged 0.1.0 ready · up 2 h 1 min · requests 200/s · refused 2.0/s · in flight 3",
        "CPU 34 % of 4 · memory 3.0 GiB of 8.0 GiB · 48 °C · disk free 10.0 GiB",
        "pressure OK",
        "devices onnxruntime CPU, openvino NPU no_permission",
    ):
        assert words in text
    assert "GPU" not in text


def test_pressure_and_throttling_are_told() -> None:
    """In the daemon's own words."""
    hot = status()
    hot["resources"]["level"] = "WARN"
    hot["resources"]["reasons"] = ["memory 91 %"]
    hot["resources"]["sample"].update(throttled=True, psi_some_avg10=12.4)
    text = "\n".join(frame(Shot(1.0, hot), figures(Shot(1.0, hot), None), EIGHTY))
    assert "pressure WARN: memory 91 % · waiting for memory 12 %" in text
    assert "THROTTLED" in text


def test_a_daemon_that_is_away_is_said_and_waited_for() -> None:
    """Nothing stale is shown as if it were now."""
    away = Shot(1.0, away="no edged daemon answers")
    lines = frame(away, figures(away, BEFORE), EIGHTY, height=24)
    assert lines[-2:] == ["waiting for the daemon", "no edged daemon answers"]
    assert not any("digits" in line for line in lines)


@pytest.mark.parametrize("sort", SORTS)
def test_the_order_is_the_one_asked_for(sort: str) -> None:
    """The busiest, the slowest, the largest, or by name."""
    rows = [row("a", rss_bytes=1 << 20), row("b", rss_bytes=9 << 20), row("c", rss_bytes=2 << 20)]
    statistics = [entry("a", 5, {10: 5}), entry("b", 1, {20: 1}), entry("c", 9, {900: 9})]
    now = Shot(101.0, status(models=rows), statistics)
    lines = frame(now, figures(now, Shot(100.0, status(), ())), EIGHTY, sort=sort)
    names = [line.split()[0] for line in lines[-3:]]
    assert (
        names
        == {
            "requests": ["c", "a", "b"],
            "latency": ["c", "b", "a"],
            "memory": ["b", "c", "a"],
            "name": ["a", "b", "c"],
        }[sort]
    )


def test_what_a_model_is_called_cannot_steer_the_terminal() -> None:
    """Names come from files."""
    now = Shot(1.0, status(models=[row("a\x1b[2Jb")], models_dir="/m"))
    assert not any("\x1b" in line for line in frame(now, figures(now, None), EIGHTY))
