"""Many requests in flight on one connection, in any order: a driver for saturation and for open loops.

A bare DEALER with messages made beforehand, so that the driver takes little of the machine that it shares
with what it measures. Each reply is counted once, by what it says: answered, or refused with which code.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import msgpack
import zmq
from hdrh.histogram import HdrHistogram

from bench.targets import TIMEOUT_S, Target, dealer, frames_of, input_of

__all__ = ["AT_ONCE_S", "LATENCY_US_MAX", "OpenLoop", "Outcome", "Pipeline", "histogram", "opened_pipeline"]

LATENCY_US_MAX = 120_000_000
"""Beyond every timeout; a histogram has a highest value."""

AT_ONCE_S = 0.005
"""What is refused is told so by then: the time to refuse that is aimed at."""

DRAIN_S = 10.0
"""How long an open loop waits at its end for what is still out."""


def histogram() -> HdrHistogram:
    """Latencies in µs, three digits exact."""
    return HdrHistogram(1, LATENCY_US_MAX, 3)


@dataclass
class Outcome:
    """What became of an open loop's requests; times in µs from the intended send."""

    sent: int = 0
    in_time: int = 0
    """Answered with outputs within the deadline, or at all where there was none."""
    late: int = 0
    """Answered with outputs, but after it."""
    unanswered: int = 0
    seconds: float = 0.0
    behind_us: int = 0
    """How much later than intended the driver really sent, p99: what of the times is its own."""
    codes: Counter[str] = field(default_factory=Counter)
    """Errors by code and reason."""
    latency: HdrHistogram = field(default_factory=histogram)
    """Of requests answered with outputs."""
    at_once: int = 0
    """Of the errors, those that came within `AT_ONCE_S` of the send: refused, never queued."""
    refusal: HdrHistogram = field(default_factory=histogram)
    """Of requests answered with an error, from the real send."""

    def to_wire(self) -> dict[str, object]:
        """As JSON takes it."""
        return {
            "counts": [self.sent, self.in_time, self.late, self.unanswered],
            "seconds": self.seconds,
            "behind_us": self.behind_us,
            "at_once": self.at_once,
            "codes": dict(self.codes),
            "latency": self.latency.encode().decode(),
            "refusal": self.refusal.encode().decode(),
        }

    @classmethod
    def merged(cls, wires: Sequence[dict[str, object]]) -> Outcome:
        """Those of several drivers that ran at the same time."""
        total = cls()
        for wire in wires:
            sent, in_time, late, unanswered = wire["counts"]  # type: ignore[misc]  # from our own JSON
            total.sent += sent
            total.in_time += in_time
            total.late += late
            total.unanswered += unanswered
            total.seconds = max(total.seconds, float(wire["seconds"]))  # type: ignore[arg-type]  # likewise
            total.behind_us = max(total.behind_us, int(wire["behind_us"]))  # type: ignore[call-overload]  # likewise
            total.at_once += int(wire["at_once"])  # type: ignore[call-overload]  # likewise
            total.codes.update(wire["codes"])  # type: ignore[arg-type]  # likewise
            total.latency.add(HdrHistogram.decode(wire["latency"]))
            total.refusal.add(HdrHistogram.decode(wire["refusal"]))
        return total

    @property
    def goodput_hz(self) -> float:
        """Answers in time, per second of sending."""
        return self.in_time / self.seconds if self.seconds else 0.0

    @property
    def refused(self) -> int:
        """Requests answered with an error."""
        return sum(self.codes.values())


@dataclass(frozen=True)
class OpenLoop:
    """Requests that come when they come."""

    times_s: Sequence[float]
    deadline_s: float | None = None


class Pipeline:
    """One connection with many requests out."""

    def __init__(self, target: Target, sock: zmq.Socket[bytes]) -> None:
        self._target = target
        self._array = input_of(target)
        self._sock = sock

    def saturate(self, in_flight: int, seconds: float, begin_ns: int) -> tuple[int, float]:
        """Keeps so many out for so long: the answers that came, and in how many seconds.

        Counting begins when the pipeline is full and has turned over once, and lasts for two turnovers at
        least: in a shorter time it may be only another client's turn. Raises RuntimeError for an error.
        """
        _sleep_until(begin_ns)
        messages = [frames_of(self._target, self._array, request_id) for request_id in range(in_flight)]
        for message in messages:
            self._sock.send_multipart(message, copy=False)
        for _ in range(in_flight):
            self._sock.send_multipart(messages[self._answered()], copy=False)
        began = time.perf_counter()
        end = began + seconds
        count = 0
        while (now := time.perf_counter()) < end or count < 2 * in_flight:
            self._sock.send_multipart(messages[self._answered()], copy=False)
            count += 1
        for _ in range(in_flight):
            self._answered()
        return count, now - began

    def _answered(self) -> int:
        header = msgpack.unpackb(self._sock.recv_multipart()[0], strict_map_key=False)
        if "error" in header:
            raise RuntimeError(f"refused while it was only saturated: {header['error']}")
        return int(header["id"])

    def open_loop(self, load: OpenLoop, begin_ns: int) -> Outcome:
        """Sends at the intended times whatever comes back, and tells what came back."""
        outcome = Outcome(sent=len(load.times_s))
        intended_ns = [begin_ns + round(at * 1e9) for at in load.times_s]
        sent_ns: list[int] = []
        waiting = set(range(len(intended_ns)))
        _sleep_until(begin_ns)
        give_up_ns = (intended_ns[-1] if intended_ns else begin_ns) + round(DRAIN_S * 1e9)
        deadline_ns = None if load.deadline_s is None else round(load.deadline_s * 1e9)
        while waiting and (now := time.monotonic_ns()) < give_up_ns:
            number = len(sent_ns)
            if number < len(intended_ns) and now >= intended_ns[number]:
                parameters = {} if deadline_ns is None else {"deadline_ns": intended_ns[number] + deadline_ns}
                sent_ns.append(now)
                self._sock.send_multipart(
                    frames_of(self._target, self._array, number, **parameters), copy=False
                )
                continue
            until_ns = intended_ns[number] if number < len(intended_ns) else give_up_ns
            # poll(2) counts in ms: the last one before a send is slept away, so that a send is not early or 1
            # ms late.
            wait_ms = (until_ns - now) // 1_000_000
            if not self._sock.poll(wait_ms):
                if wait_ms == 0:
                    time.sleep(min(50e-6, max(0, until_ns - time.monotonic_ns()) / 1e9))
                continue
            self._take(outcome, intended_ns, sent_ns, waiting, deadline_ns)
        outcome.unanswered = len(waiting)
        outcome.seconds = load.times_s[-1] if load.times_s else 0.0
        behind = sorted(sent - meant for sent, meant in zip(sent_ns, intended_ns, strict=False))
        outcome.behind_us = behind[int(0.99 * len(behind))] // 1000 if behind else 0
        return outcome

    def _take(
        self,
        outcome: Outcome,
        intended_ns: Sequence[int],
        sent_ns: Sequence[int],
        waiting: set[int],
        deadline_ns: int | None,
    ) -> None:
        header = msgpack.unpackb(self._sock.recv_multipart()[0], strict_map_key=False)
        now = time.monotonic_ns()
        number = int(header["id"])
        waiting.remove(number)
        error = header.get("error")
        if error is not None:
            outcome.codes[f"{error['code']} {error.get('reason', '')}".strip()] += 1
            outcome.at_once += now - sent_ns[number] <= AT_ONCE_S * 1e9
            outcome.refusal.record_value(max(1, (now - sent_ns[number]) // 1000))
            return
        took_ns = now - intended_ns[number]
        outcome.latency.record_value(max(1, took_ns // 1000))
        if deadline_ns is None or took_ns <= deadline_ns:
            outcome.in_time += 1
        else:
            outcome.late += 1


def _sleep_until(begin_ns: int) -> None:
    time.sleep(max(0, begin_ns - time.monotonic_ns()) / 1e9)


@contextmanager
def opened_pipeline(target: Target) -> Iterator[Pipeline]:
    """A pipeline to edged."""
    with dealer(target.endpoint) as sock:
        sock.setsockopt(zmq.SNDHWM, 0)  # an open loop must never wait for its own socket
        sock.setsockopt(zmq.RCVHWM, 0)
        sock.setsockopt(zmq.RCVTIMEO, round(TIMEOUT_S * 1000))
        yield Pipeline(target, sock)
