"""Where a model may run: selectors, order, fallbacks and their reasons."""

from __future__ import annotations

from typing import Any

import pytest

from edged.config import DevicesConfig
from edged.devices import Candidate, Plan, Verdict, matches, plan
from tests.world import CPU, CUDA, GPU, OV_CPU

NPU = Candidate("openvino", "NPU")
CUDA_1 = Candidate("onnxruntime", "CUDA:1")
ALL = (CPU, OV_CPU, CUDA, CUDA_1, GPU, NPU)


@pytest.mark.parametrize(
    ("selector", "found"),
    [
        ("auto", ALL),
        ("cpu", (CPU, OV_CPU)),
        ("CPU", (CPU, OV_CPU)),
        ("cuda", (CUDA, CUDA_1)),
        ("cuda:1", (CUDA_1,)),
        ("gpu", (GPU,)),
        ("npu", (NPU,)),
        ("openvino", (OV_CPU, GPU, NPU)),
        ("openvino:GPU", (GPU,)),
        ("openvino:GPU.0", (GPU,)),
        ("openvino:GPU.1", ()),
        ("openvino:CPU", (OV_CPU,)),
        ("onnxruntime", (CPU, CUDA, CUDA_1)),
        ("onnxruntime:CPU", (CPU,)),
        ("onnxruntime:CUDA", (CUDA, CUDA_1)),
        ("onnxruntime:CUDA:1", (CUDA_1,)),
        ("tpu", ()),
        ("", ()),
    ],
)
def test_a_selector_names_its_candidates(selector: str, found: tuple[Candidate, ...]) -> None:
    """By device, by runtime, by both, in any case of letters."""
    assert tuple(c for c in ALL if matches(selector, c)) == found


def planned(selector: str = "auto", **kinds: Any) -> Plan:
    """A plan on a machine whose verdicts are given as statuses."""
    statuses = kinds.pop("verdicts", dict.fromkeys(ALL, "ok"))
    verdicts = {
        c: None
        if s is None
        else Verdict(c.runtime, c.device, s, hint="" if s == "ok" else f"mend {c.device}")
        for c, s in statuses.items()
    }
    defaults: dict[str, Any] = {
        "runtime": None,
        "policy": "prefer",
        "model_format": "onnx",
        "order": DevicesConfig().order,
        "exclude": (),
    }
    return plan(selector=selector, verdicts=verdicts, **{**defaults, **kinds})


@pytest.mark.parametrize(
    ("kinds", "candidates", "missing"),
    [
        ({}, (CUDA, CUDA_1, GPU, NPU, CPU, OV_CPU), ""),
        ({"selector": "cpu"}, (CPU, OV_CPU, CUDA, CUDA_1, GPU, NPU), ""),
        ({"selector": "cpu", "policy": "require"}, (CPU, OV_CPU), ""),
        ({"selector": "openvino:GPU", "policy": "require"}, (GPU,), ""),
        ({"model_format": "openvino_ir"}, (GPU, NPU, OV_CPU), ""),
        ({"exclude": ("cuda", "openvino")}, (CPU,), ""),
        ({"order": ("openvino", "cpu")}, (OV_CPU, GPU, NPU, CPU, CUDA, CUDA_1), ""),
        ({"preferred": OV_CPU}, (OV_CPU, CUDA, CUDA_1, GPU, NPU, CPU), ""),
        ({"selector": "cuda", "preferred": OV_CPU}, (CUDA, CUDA_1, OV_CPU, GPU, NPU, CPU), ""),
        ({"runtime": "openvino"}, (GPU, NPU, OV_CPU, CUDA, CUDA_1, CPU), ""),
        (
            {"selector": "cuda", "verdicts": {CPU: "ok", CUDA: "no_permission"}},
            (CPU,),
            "onnxruntime:CUDA:0 is no_permission: mend CUDA:0",
        ),
        ({"selector": "npu", "verdicts": {CPU: "ok"}}, (CPU,), "npu: no such device here"),
        (
            {"selector": "cpu", "runtime": "openvino", "verdicts": {CPU: "ok"}},
            (CPU,),
            "cpu on openvino: no such device here",
        ),
    ],
)
def test_the_order_to_try(kinds: dict[str, Any], candidates: tuple[Candidate, ...], missing: str) -> None:
    """The wanted first, then the preferred, then the order of the settings; and why the wanted is missing."""
    found = planned(**kinds)
    assert found.candidates == candidates
    assert found.missing == missing
    assert not found.waiting


@pytest.mark.parametrize(
    ("kinds", "refusal"),
    [
        ({"verdicts": {}}, "no such device here"),
        ({"verdicts": {CPU: "ok"}, "selector": "cuda", "policy": "require"}, "cuda: no such device"),
        ({"verdicts": {CPU: "ok"}, "model_format": "openvino_ir"}, "install edged[openvino]"),
        ({"verdicts": {CPU: "driver_error"}}, "onnxruntime:CPU is driver_error"),
        ({"exclude": ("cpu", "cuda", "openvino")}, "no such device"),
    ],
)
def test_nothing_to_try_has_its_reason(kinds: dict[str, Any], refusal: str) -> None:
    """A refusal says what would help."""
    found = planned(**kinds)
    assert found.candidates == ()
    assert refusal in found.refusal


def test_a_verdict_that_is_out_is_waited_for_while_that_is_allowed() -> None:
    """Unless the preferred device works already, or what is out was not wanted."""
    verdicts = {CPU: "ok", CUDA: None}
    assert planned(verdicts=verdicts).waiting
    assert planned(verdicts=verdicts, may_wait=False).candidates == (CPU,)
    assert not planned(verdicts=verdicts, preferred=CPU).waiting
    assert not planned("cpu", verdicts=verdicts).waiting
    assert planned("cuda", verdicts=verdicts, preferred=CPU).waiting


def test_a_verdict_from_the_prober_keeps_what_is_known() -> None:
    """Keys that a later prober adds are dropped, those that an older one lacks are empty."""
    wire = {"runtime": "openvino", "device": "NPU", "status": "busy", "new": 1, "detail": None}
    found = Verdict.from_wire(wire)
    assert found.candidate == NPU
    assert found.to_wire()["status"] == "busy"
    assert found.hint == ""


def test_only_the_processor_is_not_like_a_gpu() -> None:
    """What has a dear context shares one worker."""
    assert [c.gpu_like for c in ALL] == [False, False, True, True, True, True]
    assert str(CUDA) == "onnxruntime:CUDA:0"
