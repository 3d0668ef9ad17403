"""What `edgectl explain` says of a model, from a status that a test has made up."""

from __future__ import annotations

from typing import Any

import pytest

from edged.cli.explain import Explanation, explain

NOW_S = 1_780_000_000.0


def row(**changes: Any) -> dict[str, Any]:
    """A model that serves on the processor."""
    return {
        "name": "digits",
        "version": "3",
        "state": "READY",
        "serving": True,
        "reason": "",
        "message": "",
        "sha256": "a" * 64,
        "size_bytes": 3 << 20,
        "format": "onnx",
        "runtime": "onnxruntime",
        "device": "CPU",
        "precision": "f32",
        "threads": 2,
        "choice": "default",
        "policy": "prefer",
        "pid": 4711,
        "rss_bytes": 50 << 20,
        "infer_count": 10,
        "error_count": 1,
        "p50_us": 800,
        "p99_us": 2100,
        "queue": 0,
        "in_flight": 1,
        "restarts": 0,
        "ready_ms": int((NOW_S - 3600 * 5) * 1000),
        "load_ms": 120,
        "source": "digits.onnx",
        "settings": {},
        "settings_file": None,
        "measured": [],
        "tried": [],
        **changes,
    }


def told(*rows: dict[str, Any], history: list[dict[str, Any]] | None = None, **status: Any) -> Explanation:
    """The explanation of `digits`."""
    devices = [
        {"runtime": "onnxruntime", "device": "CPU", "status": "ok"},
        {"runtime": "openvino", "device": "CPU", "status": "ok"},
        {"runtime": "openvino", "device": "NPU", "status": "no_permission", "hint": "join the group render"},
        {"runtime": "onnxruntime", "device": "CUDA:0", "status": "absent"},
    ]
    document = {"models_dir": "/models", "state_dir": "/state", "devices": devices, **status}
    return explain({**document, "models": list(rows), "history": history or []}, "digits", now_s=NOW_S)


def text(found: Explanation) -> str:
    """All of it as one text."""
    lines = [line for title, body in found.sections for line in (title, *body)]
    return "\n".join([found.headline, *lines])


def test_a_model_that_serves_is_explained_and_nothing_is_to_be_typed() -> None:
    """File, digest, version, since when; where and why; threads, memory, times; what was not taken."""
    found = told(row())
    assert found.serves
    assert found.commands == ()
    everything = text(found)
    for words in (
        "digits version 3 serves: onnxruntime on CPU (f32)",
        "/models/digits.onnx (onnx, 3.0 MiB)",
        "a" * 64,
        "5 h 0 min ago, its load took 120.00 ms",
        "no settings file",
        "the first of [devices] order that works",
        "precision f32: as the model says",
        "not taken: openvino on CPU: works; not measured yet",
        "not taken: openvino on NPU: no_permission: join the group render",
        "not taken: onnxruntime on CUDA:0: is not on this machine",
        "1 instance, 2 threads each, worker 4711, 50.0 MiB memory",
        "10 answered, 1 failed; p50 800 µs, p99 2.10 ms with the queue; 0 waiting, 1 running",
        "nothing since the daemon was started",
        "nothing: it serves as it should",
    ):
        assert words in everything


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"choice": "pinned", "settings": {"device": "cpu"}, "settings_file": "digits.toml"},
            [
                "its settings say so (device = cpu)",
                "settings /models/digits.toml: device = cpu",
                "the settings name another",
            ],
        ),
        (
            {"choice": "remembered"},
            ["measured before, for this very content", "compared when the choice was made"],
        ),
        ({"choice": "inherited"}, ["its version before ran there"]),
        (
            {
                "choice": "measured",
                "measured": [
                    {
                        "runtime": "openvino",
                        "device": "CPU",
                        "p50_us": 770.0,
                        "reference_p50_us": 800.0,
                        "agrees": True,
                        "why": "proven on ones",
                    }
                ],
            },
            [
                "measured: openvino on CPU: 770 µs against 800 µs (p50); its answers agree (proven on ones); "
                "the gain is too small"
            ],
        ),
        (
            {
                "choice": "measured",
                "measured": [
                    {
                        "runtime": "openvino",
                        "device": "CPU",
                        "p50_us": 400.0,
                        "reference_p50_us": 800.0,
                        "agrees": True,
                        "proven": False,
                        "size": {"source": "least", "shapes": {"x": [1, 1]}, "note": ""},
                        "why": "nothing is decided at free dimensions of 1",
                    }
                ],
            },
            [
                "measured: openvino on CPU: 400 µs against 800 µs, at x [1,1], with free dimensions of 1, "
                "which decides nothing (p50), 2.0 × as fast, but it may not serve: nothing is decided at free"
            ],
        ),
        (
            {
                "sizes": [
                    {"source": "golden", "shapes": {"x": [9]}, "count": None},
                    *({"source": "requests", "shapes": {"x": [n]}, "count": n} for n in (4, 3, 2, 1)),
                ]
            },
            ["sizes of its requests (how often): x [4] (4); x [3] (3); x [2] (2)\n"],
        ),
        (
            {
                "runtime": "openvino",
                "choice": "measured",
                "measured": [
                    {
                        "runtime": "openvino",
                        "device": "CPU",
                        "p50_us": 400.0,
                        "reference_p50_us": 800.0,
                        "agrees": True,
                        "why": "",
                    }
                ],
            },
            ["400 µs against 800 µs", "it runs so now"],
        ),
        (
            {
                "measured": [
                    {
                        "runtime": "openvino",
                        "device": "CPU",
                        "p50_us": 400.0,
                        "reference_p50_us": 800.0,
                        "agrees": False,
                        "why": "output y differs",
                    }
                ]
            },
            ["400 µs against 800 µs (p50), 2.0 × as fast, but it may not serve: output y differs"],
        ),
        (
            {
                "choice": "remembered",
                "measured": [
                    {
                        "runtime": "openvino",
                        "device": "CPU",
                        "p50_us": 1200.0,
                        "reference_p50_us": 4900.0,
                        "agrees": False,
                        "proven": False,
                        "why": "Relu answers NaN differently; finite_inputs = true would allow it",
                    }
                ],
            },
            [
                "1.20 ms against 4.90 ms (p50), 4.1 × as fast, but it may not serve: "
                "Relu answers NaN differently; finite_inputs = true would allow it"
            ],
        ),
        (
            {
                "choice": "measured",
                "measured": [
                    {
                        "runtime": "openvino",
                        "device": "CPU",
                        "p50_us": 100.0,
                        "reference_p50_us": 800.0,
                        "agrees": True,
                        "proven": False,
                        "why": "the reference answers the same to every input, which proves nothing",
                    }
                ],
            },
            ["8.0 × as fast, but it may not serve: the reference answers the same to every input"],
        ),
        (
            {"measured": [{"runtime": "openvino", "device": "CPU", "agrees": False, "why": "took too long"}]},
            ["measured: openvino on CPU: no figures: took too long"],
        ),
        (
            {"tried": [{"runtime": "openvino", "device": "NPU", "reason": "DEVICE_FAILED", "message": "no"}]},
            ["openvino on NPU was tried and failed: DEVICE_FAILED: no"],
        ),
        (
            {"fallback_reason": "openvino:NPU is busy"},
            ["a fallback: openvino:NPU is busy", 'policy = "require"'],
        ),
        (
            {
                "instances": 2,
                "batch": {"max": 8, "times_us": [[1, 900], [8, 2400]], "why": "rows stand alone"},
            },
            ["2 instances", "up to 8 rows", "rows stand alone", "1: 900 µs, 8: 2.40 ms"],
        ),
        (
            {"batch": {"max": 1, "times_us": [], "why": "a fixed first dimension"}},
            ["no batching: a fixed first"],
        ),
        ({"restarts": 3}, ["started again 3 times"]),
        (
            {
                "choice": "tuned",
                "measured": [
                    {
                        "runtime": "onnxruntime",
                        "device": "CPU",
                        "threads": 1,
                        "instances": 2,
                        "p50_us": 700.0,
                        "reference_p50_us": 800.0,
                        "rows_s": 2500.4,
                        "agrees": True,
                        "why": "",
                    }
                ],
            },
            [
                "had it measured with `edgectl tune`",
                "1 thread, 2 instances: 700 µs against 800 µs, 2500 rows/s (p50); its answers agree\n",
                "`edgectl tune` chose another",
            ],
        ),
    ],
)
def test_each_choice_is_explained_by_the_rule_that_made_it(changes: dict[str, Any], words: list[str]) -> None:
    """With its figures, where there are any."""
    everything = text(told(row(**changes)))
    for each in words:
        assert each in everything


def refusal(reason: str, **changes: Any) -> dict[str, Any]:
    """The row of a content that is not served."""
    plain = {"name": "digits", "version": "4", "state": "UNAVAILABLE", "serving": False, "sha256": "b" * 64}
    return {**plain, "reason": reason, "message": "what the daemon said", **changes}


@pytest.mark.parametrize(
    ("reason", "command"),
    [
        ("MODEL_UNLOADED: by request", "edgectl load digits"),
        ("MODEL_INVALID", "edgectl put FILE --name digits --wait"),
        ("MODEL_QUARANTINED", "edgectl load digits"),
        ("DEVICE_UNAVAILABLE", "edgectl devices"),
        ("NAME_CLASH", "ls -l /models"),
        ("DISK_FULL", "df -h /state"),
        ("WORKER_CRASHED", "edgectl logs digits"),
        ("SOMETHING_NEW", "edgectl logs digits"),
    ],
)
def test_what_does_not_serve_has_a_reason_and_a_command(reason: str, command: str) -> None:
    """Known reasons have what helps against them, an unknown one has the journal."""
    found = told(refusal(reason))
    assert not found.serves
    assert command in found.commands
    assert found.headline.startswith(f"digits does not serve: {reason}")
    assert "what the daemon said" in text(found)


def test_a_refused_new_version_does_not_hide_the_one_that_serves() -> None:
    """Both are told."""
    found = told(row(), refusal("GOLDEN_MISMATCH"))
    assert found.serves
    assert "a newer content is refused" in found.headline
    assert "version 4: GOLDEN_MISMATCH: what the daemon said (SHA-256 bbbbbbbbbbbb…)" in text(found)
    assert "edgectl logs digits" in found.commands


def test_a_model_on_its_way_and_one_that_is_gone() -> None:
    """The first has a command to wait with, the second its history."""
    coming = row(state="LOADING", serving=False, reason="MODEL_LOADING", message="loading on CPU", ready_ms=0)
    found = told(coming)
    assert found.headline == "digits is on its way: MODEL_LOADING: loading on CPU"
    assert found.commands == ("edgectl wait digits",)
    gone = [{"time_ms": int(NOW_S * 1000), "event": "model_removed", "fields": {}}]
    found = told(history=gone, models_fault="the folder is not mounted")
    assert found.headline == "digits is not there any more; the folder is not mounted"
    assert "A model was removed" in text(found)


def test_history_is_told_in_the_catalogs_words_the_newest_last_and_not_without_end() -> None:
    """An event that this edgectl does not know is shown by its name."""
    history = [
        {
            "time_ms": int((NOW_S - 100 + n) * 1000),
            "event": "worker_crashed",
            "fields": {"REASON": f"crash {n}"},
        }
        for n in range(30)
    ]
    history.append({"time_ms": int(NOW_S * 1000), "event": "of_the_future", "fields": {"WORKER_PID": "9"}})
    lines = dict(told(row(), history=history).sections)["What happened last"]
    assert len(lines) == 12
    assert lines[-2].endswith("A worker process died: reason crash 29")
    assert lines[-1].endswith("of_the_future: worker pid 9")


def test_a_name_for_the_shell_is_quoted() -> None:
    """Whatever lies in the folder under a strange name."""
    status = {"models": [{**refusal("NAME_INVALID"), "name": "a b; rm"}], "models_dir": "/my models"}
    found = explain(status, "a b; rm", now_s=NOW_S)
    assert found.commands == ("ls -l '/my models'",)


def test_a_table_that_is_missing_is_made_by_a_command() -> None:
    """It is what to type next, with the two that it is for."""
    remedy = "`edgectl operators --candidate openvino:GPU.0` makes one on this device"
    measured = {
        "runtime": "openvino",
        "device": "GPU.0",
        "agrees": False,
        "why": "no table",
        "remedy": remedy,
    }
    assert told(row(measured=[measured])).commands == ("edgectl operators --candidate openvino:GPU.0",)
