"""The benchmarks' drivers: schedules, ratios and reports are right, and each load really reaches a daemon."""

from __future__ import annotations

import itertools
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from bench import cuda, environments, loadgen, overhead, peers, targets
from bench.crowd import Crowd
from bench.harness import Daemon
from bench.load import (
    Effort,
    closed,
    interleaved,
    median,
    paced,
    percentile,
    poisson_s,
    turns,
)
from bench.pipeline import OpenLoop, Outcome, opened_pipeline
from bench.report import Claim, Section, at_least, at_most, not_measured, table
from bench.run import NAMES, document, main
from bench.targets import Target, _read_response, opened
from tests import zoo

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # only effective before the import
import onnxruntime as ort

SHORT = Effort(slots=1, slot_s=0.02, open_s=0.1, swaps=1, pause_s=0.0)


@pytest.fixture(scope="module")
def tiny() -> Iterator[Target]:
    """The tiny model of a real daemon."""
    daemon = Daemon()
    daemon.put("tiny", zoo.mlp(seed=1))
    with daemon:
        yield Target("client", daemon.endpoint, "tiny")


def test_percentile_takes_a_sample_that_was_measured() -> None:
    """No interpolation: a figure in a table is a time that some request really took."""
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert median([4.0, 1.0, 3.0, 2.0]) == 3.0
    assert percentile(list(map(float, range(100))), 0.99) == 99.0
    assert percentile([5.0], 0.99) == 5.0


def test_poisson_schedule_follows_from_its_seed() -> None:
    """The same seed gives the same load, and another one another, of the rate that was asked for."""
    times = poisson_s(1000, 10, seed=3)
    assert times == poisson_s(1000, 10, seed=3)
    assert times != poisson_s(1000, 10, seed=4)
    assert times == sorted(times)
    assert all(0 < at < 10 for at in times)
    assert 9_500 < len(times) < 10_500
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert sum(gap > 0.001 for gap in gaps) / len(gaps) == pytest.approx(0.368, abs=0.02)  # exp(-1)


def test_slots_take_turns_and_the_first_turn_is_left_out() -> None:
    """Each variant has its slot in every turn, in the order given, and what warmed up is not counted."""
    asked: list[str] = []

    def slot(name: str) -> int:
        asked.append(name)
        return len(asked)

    given = turns({"a": lambda: slot("a"), "b": lambda: slot("b")}, replace(SHORT, slots=2))
    assert asked == ["a", "b"] * 3
    assert given == {"a": [3, 5], "b": [4, 6]}


def test_closed_loop_leaves_its_first_request_out() -> None:
    """The first one finds caches cold; the ones that are timed are all the others."""
    asked: list[float] = []
    times = closed(lambda: asked.append(time.perf_counter()), 0.001)
    assert len(times) == len(asked) - 1 >= 1


def test_paced_loop_keeps_its_ticks() -> None:
    """Never before its tick, and as often as the rate and the time say."""
    asked: list[float] = []
    times = paced(lambda: asked.append(time.perf_counter()), 0.05, 200)
    assert len(asked) == 10
    assert len(times) == 9
    assert all(at - asked[0] >= tick / 200 - 0.005 for tick, at in enumerate(asked))


def test_claims_say_whether_they_were_reached() -> None:
    """A bound is held at the bound itself; what was not measured is neither reached nor missed."""
    assert at_most("a", 1.5, 1.5).held is True
    assert at_most("a", 1.51, 1.5).held is False
    assert at_least("a", 2.0, 2.1).held is False
    assert at_least("a", 2.1, 2.1, note="why").figure == "2.10 × (why)"
    missing = not_measured("a", "at most 1 ×", "no GPU here")
    assert missing.held is None
    assert str(missing) == "- – a, at most 1 ×: **not measured: no GPU here**"


def test_document_has_all_goals_first_and_every_command() -> None:
    """A reader finds each goal with its figure in one table, and how to measure it again."""
    claim = Claim("round trip", "at most 2 ×", "3.00 ×", False)
    text = document("Measured by hand.", [Section("One", "python -m bench.one", "Words.", (claim,))])
    assert text.index("| round trip | at most 2 × | 3.00 × | ✗ |") < text.index("## One")
    assert "`python -m bench.one`" in text
    assert table(("a", "b"), [(1, 2)]) == "| a | b |\n| --- | ---: |\n| 1 | 2 |"


def test_unknown_benchmark_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """A misspelt name is an error that tells the right ones, and nothing is measured."""
    assert main(["overheat"]) == 2
    said = capsys.readouterr().err
    assert all(name in said for name in NAMES)


def test_outcomes_of_several_drivers_add_up() -> None:
    """Counts, codes and histograms of processes that ran together become one; JSON carries them."""
    one = Outcome(sent=3, in_time=1, late=1, seconds=2.0, behind_us=7, at_once=1)
    one.codes["RESOURCE_EXHAUSTED QUEUE_FULL"] += 1
    one.latency.record_value(1000)
    one.latency.record_value(9000)
    one.refusal.record_value(50)
    wire = json.loads(json.dumps(one.to_wire()))
    both = Outcome.merged([wire, wire])
    assert (both.sent, both.in_time, both.late, both.refused, both.at_once) == (6, 2, 2, 2, 2)
    assert (both.seconds, both.behind_us, both.goodput_hz) == (2.0, 7, 1.0)
    assert both.latency.get_total_count() == 4
    assert both.latency.get_value_at_percentile(99) == pytest.approx(9000, rel=0.01)


def test_target_travels_as_json() -> None:
    """A client process gets exactly what was meant."""
    target = Target("http", "127.0.0.1:80", "m", shape=(2, 3), body="json", path="v2/{model}", priority=1)
    assert Target.from_json(target.to_json()) == target
    with pytest.raises(ValueError, match="no way 'pigeon'"), opened(replace(target, way="pigeon")):
        pass


@pytest.mark.parametrize("cut", [1, 17, 40, 60])
def test_http_response_is_read_however_it_arrives(cut: int) -> None:
    """Head and body come in any pieces; a status other than 200 is an error, not an answer."""
    response = b"HTTP/1.1 200 OK\r\nX: y\r\nContent-Length: 10\r\n\r\n0123456789"
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(response[:cut])
        theirs.sendall(response[cut:])
        assert _read_response(ours) == b"0123456789"
        theirs.sendall(response.replace(b"200 OK", b"500 NO"))
        with pytest.raises(RuntimeError, match="unexpected answer"):
            _read_response(ours)


def test_loadgen_summary_is_read_by_its_own_words() -> None:
    """Each figure is found under its label, in the unit that is shown; its absence is an error."""
    summary = "Scenario : SingleStream\n90.00 percentile latency (ns)   : 2500000\nSamples per second: 17.5\n"
    assert loadgen.figure_of(summary, "SingleStream") == 2.5
    assert loadgen.figure_of(summary, "Offline") == 17.5
    with pytest.raises(RuntimeError, match=r"99\.00 percentile"):
        loadgen.figure_of(summary, "Server")


def test_gpu_is_missed_with_a_reason() -> None:
    """Without a GPU the section says so, and no goal of its is reached or missed."""
    if not cuda.missing():
        pytest.skip("there is a GPU here")
    section = cuda.measure(lambda _: None, SHORT)
    assert [claim.held for claim in section.claims] == [None]
    assert cuda.missing() in section.text


def test_batches_of_resnet_are_rows_that_stand_alone() -> None:
    """The graph that comes with a batch of one takes any, and a row's answer stays the same."""
    session = ort.InferenceSession(cuda.with_batches(onnx.load(str(zoo.real("resnet50")))))
    x = np.random.default_rng(0).normal(0, 1, (2, 3, 224, 224)).astype(np.float32)
    (spec,) = session.get_inputs()
    (both,) = session.run(None, {spec.name: x})
    (second,) = session.run(None, {spec.name: x[1:]})
    assert both.shape == (2, 1000)
    assert np.allclose(both[1], second[0], rtol=1e-3, atol=1e-5)


def test_peer_that_is_not_set_up_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No environment is a reason and not a crash, and one that did not install says why."""
    monkeypatch.setattr(environments, "ENVIRONMENTS", tmp_path)
    (peer, *_) = environments.PEERS
    with pytest.raises(environments.PeerFailed, match="make bench-peers"):
        environments.check_set_up(peer)
    peer.refusal.write_text("it does not install here: no wheel\n")
    with pytest.raises(environments.PeerFailed, match="no wheel"):
        environments.check_set_up(peer)


def test_grpc_message_is_what_the_protocol_says() -> None:
    """Field by field, lengths above 127 in two bytes: a server's own library must be able to read it."""
    message = targets.grpc_message("m", np.zeros((1, 150), np.float32))
    tensor = b"\x0a\x01x" + b"\x12\x04FP32" + b"\x1a\x03\x01\x96\x01"
    head = b"\x0a\x01m" + b"\x2a" + bytes([len(tensor)]) + tensor
    assert message == head + b"\x3a\xd8\x04" + bytes(600)


def test_figures_are_held_against_the_better_way_to_the_yardstick() -> None:
    """A server that can be reached by two ways is the faster of them, in each figure by itself."""
    measured = peers.Figures(
        {"edged": [1.0], "FastAPI, unix": [2.0], "FastAPI, tcp": [4.0]},
        {"edged": [3.0], "FastAPI, unix": [2.0], "FastAPI, tcp": [1.0]},
        {"edged": 90.0, "FastAPI, unix": 30.0, "FastAPI, tcp": 45.0},
    )
    assert measured.over("edged") == (0.5, 3.0, 2.0)


@pytest.mark.parametrize("way", ["http", "post"])
def test_connection_that_the_server_ended_is_made_anew(way: str, tmp_path: Path) -> None:
    """A server that ends idle connections costs a new one, and no answer."""
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nabcd"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()

        def serve() -> None:
            for _ in range(3):
                connection, _ = listener.accept()
                with connection:
                    request = b""
                    while len(request.partition(b"\r\n\r\n")[2]) < 256:  # of the body, which may come apart
                        request += connection.recv(65536)
                    connection.sendall(answer)

        server = threading.Thread(target=serve)
        server.start()
        with opened(Target(way, f"unix:{tmp_path}/s", "m")) as ask:
            assert [bytes(ask()) for _ in range(3)] == [b"abcd"] * 3  # type: ignore[call-overload]  # bytes-like
        server.join()


@pytest.mark.e2e
def test_each_way_reaches_the_daemon_and_answers_alike(tiny: Target) -> None:
    """Over ZeroMQ and the fast lane, by the client or made beforehand: each has its answer."""
    ways = ("client", "zeromq", "lease", "frames", "packets")
    with ExitStack() as stack:
        asks = {way: stack.enter_context(opened(replace(tiny, way=way))) for way in ways}
        times = interleaved(asks, SHORT)
    assert all(seconds > 0 for samples in times.values() for seconds in samples)
    assert all(times.values())
    assert list(times) == list(ways)
    assert overhead.compute_s(replace(tiny, way="frames")) >= 0


@pytest.mark.e2e
def test_crowd_of_processes_asks_at_the_same_time(tiny: Target) -> None:
    """Each loop of two processes counts answers; an open one accounts for every request."""
    with Crowd([tiny, tiny]) as crowd:
        slot = crowd.closed(0.05)
        assert slot.requests_hz > 0
        assert len(slot.latencies_s) >= 2
        assert crowd.paced(0.05, 100).requests_hz > 0
        assert crowd.saturate(4, 0.05).requests_hz > 0
        outcome = crowd.open_loop(100, 0.2, deadline_s=30.0, seed=1)
    schedule = [at for seed in (1000, 1001) for at in poisson_s(50, 0.2, seed)]
    assert outcome.sent == len(schedule)
    assert outcome.in_time == outcome.sent
    assert outcome.latency.get_total_count() == outcome.sent


@pytest.mark.e2e
def test_open_loop_counts_what_the_daemon_refuses(tiny: Target) -> None:
    """A deadline that is over when the request is sent is an error by its code, and no answer."""
    with opened_pipeline(tiny) as pipeline:
        outcome = pipeline.open_loop(OpenLoop([0.0, 0.001], deadline_s=-1.0), time.monotonic_ns())
    assert outcome.in_time == outcome.late == outcome.unanswered == 0
    assert outcome.refused == outcome.refusal.get_total_count() == 2
    assert {code.split()[0] for code in outcome.codes} == {"DEADLINE_EXCEEDED"}


@pytest.mark.e2e
def test_client_process_that_fails_is_an_error(tiny: Target) -> None:
    """A crowd whose app cannot ask says so instead of waiting for it."""
    with pytest.raises(RuntimeError, match="a client process ended"), Crowd([replace(tiny, model="none")]):
        pass


@pytest.mark.e2e
@pytest.mark.slow
def test_a_whole_benchmark_runs(tiny: Target) -> None:
    """The overhead's section has its figures and its goals after slots too short to be worth anything."""
    said: list[str] = []
    section = overhead.measure(said.append, SHORT)
    assert said
    assert section.command == "python -m bench.overhead"
    assert "| edged over the fast lane, `Client` | 1000 Hz |" in section.text
    assert len(section.claims) >= 5
