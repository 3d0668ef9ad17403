"""The metrics page: read back by Prometheus' own library, against the simulated world's state."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from edged.errors import InvalidArgument, ResourceExhausted
from edged.events import Sampled
from edged.families import FAMILIES
from edged.metrics import BUCKET_POWERS, Metrics
from edged.statistics import Histogram, ModelStatistics, Refusals
from tests.world import CPU, OV_CPU, World, config, sample

ROOT = Path(__file__).resolve().parent.parent
RULES = ROOT / "packaging" / "prometheus" / "edged.rules.yml"
OUTSIDE = {"edged_log_dropped_total": 3, "edged_disk_busy_seconds": 0.5}

Sample = tuple[str, frozenset[tuple[str, str]]]


def serving_world(*names: str) -> World:
    world = World()
    for name in names:
        world.put(name)
    world.settle()
    return world


def page(world: World, metrics: Metrics | None = None) -> dict[Sample, float]:
    """Every sample of a page; fails where Prometheus' reader would, and for a sample that comes twice."""
    text = (metrics or Metrics()).render(world.core, world.now_s, OUTSIDE)
    found: dict[Sample, float] = {}
    for family in text_string_to_metric_families(text):
        assert family.name in FAMILIES or f"{family.name}_total" in FAMILIES, family.name
        for each in family.samples:
            key = (each.name, frozenset(each.labels.items()))
            assert key not in found, key
            found[key] = each.value
    return found


def value(found: dict[Sample, float], name: str, **labels: str) -> float:
    return found[name, frozenset(labels.items())]


def ask(world: World, name: str = "m") -> None:
    world.infer(name)
    world.finish_runs()
    world.settle()


def test_a_model_that_serves_is_told_with_all_its_figures() -> None:
    """States, counters and gauges of one version, and the device's own."""
    world = serving_world("m")
    ask(world)
    ask(world)
    found = page(world)
    m = {"model": "m", "version": str(world.serving().version)}
    assert value(found, "edged_model_serving", model="m") == 1
    assert value(found, "edged_model_state", **m, state="READY") == 1
    assert value(found, "edged_model_state", **m, state="LOADING") == 0
    assert value(found, "edged_model_inferences_total", **m) == 2
    assert value(found, "edged_inferences_total") == 2
    assert value(found, "edged_model_latency_seconds_count", **m) == 2
    assert value(found, "edged_model_latency_seconds_bucket", **m, le="+Inf") == 2
    assert value(found, "edged_model_batch_rows_sum", **m) == 2
    assert value(found, "edged_model_batch_rows_bucket", **m, le="1") == 2
    assert value(found, "edged_model_cache_total", **m, result="hit") == 0
    world.serving().stats.hit(rows=1, total_ns=1000, epoch_ms=1)
    assert value(page(world), "edged_model_cache_total", **m, result="hit") == 1
    assert value(found, "edged_model_queue_length", **m) == 0
    assert value(found, "edged_model_fallback", **m) == 0
    assert value(found, "edged_log_dropped_total") == 3
    assert value(found, "edged_ready") == 1
    info = [dict(labels) for (name, labels) in found if name == "edged_model_info"]
    assert [(i["model"], i["runtime"], i["device"]) for i in info] == [("m", "onnxruntime", "CPU")]


def test_the_guard_s_word_and_the_sample_are_told() -> None:
    """Pressure by level, shares as ratios, and nothing for what the machine does not tell."""
    world = serving_world("m")
    world.send(Sampled(sample(free=1 << 30, psi_some_avg10=12.5, temperature_c=None, throttled=True)))
    found = page(world)
    assert value(found, "edged_pressure_level") == int(world.core.around.guard.level) > 0  # type: ignore[union-attr]  # it was sampled
    assert value(found, "edged_memory_pressure_ratio", kind="some") == 0.125
    assert value(found, "edged_throttled") == 1
    assert not [key for key in found if key[0] == "edged_temperature_celsius"]
    assert value(found, "edged_device_ok", runtime="onnxruntime", device="CPU") == 1


def test_a_counter_does_not_fall_when_an_instance_takes_over_from_one_of_the_same_version() -> None:
    """New settings, or another device, of the same content: what was counted stays counted."""
    world, metrics = serving_world("m"), Metrics()
    for _ in range(3):
        ask(world)
    m = {"model": "m", "version": str(world.serving().version)}
    assert value(page(world, metrics), "edged_model_inferences_total", **m) == 3
    first = world.serving()
    world.put("m", warmup=3)
    world.settle()
    assert world.serving() is not first
    assert world.serving().version == first.version
    ask(world)
    assert value(page(world, metrics), "edged_model_inferences_total", **m) == 4
    assert value(page(world, metrics), "edged_model_latency_seconds_count", **m) == 4


def test_two_daemons_on_one_machine_are_told_apart() -> None:
    """Each figure of the second carries its name; the first has no such label."""
    world = World(settings=config(metrics__name="left"))
    world.put("m")
    world.settle()
    assert all(("daemon", "left") in labels for _, labels in page(world))
    assert not [labels for _, labels in page(serving_world("m")) if "daemon" in dict(labels)]


def test_what_is_gone_is_not_told_and_not_kept() -> None:
    """A removed model leaves no series, and a version that comes back begins anew."""
    world, metrics = serving_world("m", "n"), Metrics()
    ask(world)
    page(world, metrics)
    world.remove("m")
    world.settle()
    world.pass_time(60)
    found = page(world, metrics)
    assert not [labels for _, labels in found if ("model", "m") in labels]
    assert value(found, "edged_model_serving", model="n") == 1
    world.put("m")
    world.settle()
    version = str(world.serving().version)
    assert value(page(world, metrics), "edged_model_inferences_total", model="m", version=version) == 0


def test_a_model_that_cannot_be_loaded_is_down_and_one_unloaded_by_request_is_not() -> None:
    """An alarm rings for what should serve, and only for that."""
    world = World()
    world.load_faults[CPU] = "MODEL_INVALID"
    world.put("m")
    world.settle()
    found = page(world)
    assert value(found, "edged_model_serving", model="m") == 0
    assert value(found, "edged_model_refused", model="m") == 1
    world.request("repository_model_unload", model_name="m")
    world.settle()
    assert not [labels for name, labels in page(world) if name == "edged_model_serving"]


def test_refusals_are_counted_by_code_and_reason() -> None:
    """What clients are told most, in closed words."""
    world = serving_world("m")
    world.infer("nobody")
    world.settle()
    assert value(page(world), "edged_refusals_total", code="NOT_FOUND", reason="MODEL_NOT_FOUND") == 1


def test_refusals_have_a_bound() -> None:
    """Reasons that somebody made up share one line."""
    refusals = Refusals()
    for number in range(1000):
        refusals.note(ResourceExhausted("x", reason=f"R{number}"))
    refusals.note(InvalidArgument("x", reason="R1"))
    assert len(refusals.counts) < 300
    assert sum(refusals.counts.values()) == 1001


@given(st.lists(st.integers(0, 2**40), max_size=50))
def test_the_buckets_are_exact(latencies_us: list[int]) -> None:
    """Each says how many latencies were below its bound, and merging adds."""
    histogram, other = Histogram(), Histogram()
    for latency in latencies_us:
        histogram.add(latency)
    below = histogram.below(BUCKET_POWERS)
    assert below == [sum(v < 2**power for v in latencies_us) for power in BUCKET_POWERS]
    other.merge(histogram)
    other.merge(histogram)
    assert other.below(BUCKET_POWERS) == [2 * n for n in below]
    assert other.count == 2 * len(latencies_us)


def test_merged_statistics_are_the_sum() -> None:
    """Counts, times and the last inference."""
    one, two = ModelStatistics(), ModelStatistics()
    one.executed(1, 2)
    two.executed(1, 20)
    two.executed(4, 60)
    one.success(rows=1, queue_ns=1, compute_ns=2, total_ns=30_000, epoch_ms=5)
    two.success(rows=1, queue_ns=10, compute_ns=20, total_ns=300_000, epoch_ms=9)
    two.failure("fail", 7)
    one.merge(two)
    assert (one.inference_count, one.execution_count, one.last_inference_ms) == (2, 3, 9)
    assert one.batches == {1: [2, 22], 4: [1, 60]}
    assert one.sums["queue"] == [2, 11]
    assert one.sums["fail"] == [1, 7]


@settings(max_examples=50)
@given(st.text())
def test_any_text_may_stand_in_a_label(text: str) -> None:
    """Quotes, backslashes and line breaks come back as they were."""
    world = serving_world("m")
    world.core.runs.refusals.counts["X", text] = 1
    text_page = Metrics().render(world.core, world.now_s, {})
    if "\r" in text or re.search(r"[\x0b\x0c\x1c-\x1e\x85\u2028\u2029]", text):
        return  # their reader takes these for line breaks, as the format does not say
    found = [
        each.labels["reason"]
        for family in text_string_to_metric_families(text_page)
        for each in family.samples
        if each.name == "edged_refusals_total"
    ]
    assert found == [text]


def test_the_names_keep_to_the_conventions() -> None:
    """https://prometheus.io/docs/practices/naming: counters end in _total, and help is one sentence."""
    for name, family in FAMILIES.items():
        assert re.fullmatch(r"edged_[a-z_]+[a-z]", name)
        assert (family.type == "counter") == name.endswith("_total")
        assert family.help[0].isupper() or family.help[0].isdigit()
        assert not family.help.endswith(".")


def test_every_alert_asks_for_metrics_that_there_are() -> None:
    """A renamed metric must not silence an alarm; and the alarms that an operator counts on are there."""
    text = RULES.read_text("utf-8")
    suffixes = ("", "_bucket", "_sum", "_count")
    known = {f"{name}{suffix}" for name in FAMILIES for suffix in suffixes}
    expressions = re.findall(r"expr: (?:>-\n)?((?:.+\n)(?:          [^ ].*\n)*)", text)
    named = {n for e in expressions for n in re.findall(r"edged_\w+", e)}
    assert named
    assert named <= known
    assert len(re.findall(r"- alert:", text)) == len(expressions)
    for metric in ("model_serving", "model_fallback", "pressure_level", "throttled", "model_restarts_total"):
        assert f"edged_{metric}" in named


def test_promtool_accepts_rules_and_page(tmp_path: Path) -> None:
    """Prometheus' own check of both, where it is installed."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed")
    rules = subprocess.run([promtool, "check", "rules", str(RULES)], capture_output=True, text=True)
    assert rules.returncode == 0, rules.stdout + rules.stderr
    world = serving_world("m", "n")
    ask(world)
    text = Metrics().render(world.core, world.now_s, OUTSIDE)
    lint = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True)
    assert (lint.returncode, lint.stderr) == (0, "")


def test_a_device_that_does_not_work_is_told_as_well() -> None:
    """Every candidate that was tried."""
    world = World(verdicts={CPU: "ok", OV_CPU: "driver_error"})
    world.settle()
    found = page(world)
    assert value(found, "edged_device_ok", runtime="onnxruntime", device="CPU") == 1
    assert value(found, "edged_device_ok", runtime="openvino", device="CPU") == 0
