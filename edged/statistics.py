"""Counts and times of one model, in the shape of the Open Inference Protocol's statistics extension.

Pure. Latencies go into a histogram of geometric buckets (eight to a doubling, so a quantile is at most
9 % off), which costs one list increment for a request and never grows.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate
from typing import Any

from edged.errors import EdgedError

__all__ = ["Histogram", "ModelStatistics", "Refusals"]

BATCH_SIZES_MAX = 64
"""Batch sizes that are counted one by one; those that come after are counted as the next power of two."""

_SUB = 8
_REFUSALS_MAX = 200
"""Kinds of refusals that are told apart. Ours are about 70; a runtime's reasons may come on top."""

_BUCKETS = 40 * _SUB


class Histogram:
    """Latencies in µs; quantiles within 9 %."""

    __slots__ = ("_counts", "count")

    def __init__(self) -> None:
        self._counts = [0] * _BUCKETS
        self.count = 0

    def add(self, latency_us: int) -> None:
        """Counts one latency; below 8 µs exactly, above by bucket."""
        self._counts[self._index(latency_us)] += 1
        self.count += 1

    def remove(self, latency_us: int) -> None:
        """Takes back one that was counted."""
        self._counts[self._index(latency_us)] -= 1
        self.count -= 1

    @staticmethod
    def _index(latency_us: int) -> int:
        value = latency_us if latency_us > 0 else 0
        shift = value.bit_length() - 4
        # Below 16 the value is its own bucket; above, the top four bits choose one of eight per doubling.
        index = value if shift <= 0 else shift * _SUB + (value >> shift)
        return index if index < _BUCKETS else _BUCKETS - 1

    def quantile_us(self, q: float) -> int:
        """The lower edge of the bucket in which the quantile lies; 0 when nothing was counted."""
        rank = q * self.count
        seen = 0
        for index, n in enumerate(self._counts):
            seen += n
            if n and seen >= rank:
                return _lower_edge_us(index)
        return 0

    def below(self, powers: Iterable[int]) -> list[int]:
        """How many latencies were below each power of two of µs, from 16 on; exact: buckets end there."""
        total = list(accumulate(self._counts))
        return [total[(power - 2) * _SUB - 1] for power in powers]

    def merge(self, other: Histogram) -> None:
        """Counts what another has counted, too."""
        self._counts = [mine + theirs for mine, theirs in zip(self._counts, other._counts, strict=True)]
        self.count += other.count

    def buckets(self) -> list[list[int]]:
        """`[lower edge in µs, count]` of each bucket that holds anything: two of these, taken at two times,
        tell the quantiles of the time between."""
        return [[_lower_edge_us(index), n] for index, n in enumerate(self._counts) if n]


def _lower_edge_us(index: int) -> int:
    return index if index < 16 else (index % _SUB + _SUB) << (index // _SUB - 1)


class ModelStatistics:
    """What one model version has done since it began to serve."""

    __slots__ = ("batches", "execution_count", "histogram", "inference_count", "last_inference_ms", "sums")

    def __init__(self) -> None:
        self.inference_count = 0
        self.execution_count = 0
        self.last_inference_ms = 0
        self.histogram = Histogram()
        self.batches: dict[int, list[int]] = {}
        """Runs and their nanoseconds by the rows in them."""
        self.sums: dict[str, list[int]] = {
            kind: [0, 0]
            for kind in (
                "success",
                "fail",
                "queue",
                "compute_infer",
                "cancel",
                "reject",
                "cache_hit",
                "cache_miss",
            )
        }

    def executed(self, rows: int, compute_ns: int) -> None:
        """Counts one run that ended well."""
        self.execution_count += 1
        pair = self.batches.get(rows) or self._batch(rows)
        pair[0] += 1
        pair[1] += compute_ns

    def _batch(self, rows: int) -> list[int]:
        if rows not in self.batches and len(self.batches) >= BATCH_SIZES_MAX:
            rows = 1 << (rows - 1).bit_length()
        return self.batches.setdefault(rows, [0, 0])

    def success(self, *, rows: int, queue_ns: int, compute_ns: int, total_ns: int, epoch_ms: int) -> None:
        """Counts one request that was answered with outputs."""
        self.inference_count += rows
        self.last_inference_ms = epoch_ms
        sums = self.sums
        for kind, ns in (("success", total_ns), ("queue", queue_ns), ("compute_infer", compute_ns)):
            pair = sums[kind]
            pair[0] += 1
            pair[1] += ns
        self.histogram.add(total_ns // 1000)

    def unsent(self, *, rows: int, queue_ns: int, compute_ns: int, total_ns: int) -> None:
        """A request that `success` has counted failed after all: its outputs could not be sent."""
        self.inference_count -= rows
        for kind, ns in (("success", total_ns), ("queue", queue_ns), ("compute_infer", compute_ns)):
            pair = self.sums[kind]
            pair[0] -= 1
            pair[1] -= ns
        self.histogram.remove(total_ns // 1000)

    def hit(self, *, rows: int, total_ns: int, epoch_ms: int) -> None:
        """Counts one request that was answered with what was kept."""
        self.inference_count += rows
        self.last_inference_ms = epoch_ms
        for kind in ("success", "cache_hit"):
            pair = self.sums[kind]
            pair[0] += 1
            pair[1] += total_ns
        self.histogram.add(total_ns // 1000)

    def failure(self, kind: str, total_ns: int) -> None:
        """Counts a request answered with an error: `fail`, `cancel` or `reject` (refused before it ran)."""
        pair = self.sums[kind]
        pair[0] += 1
        pair[1] += total_ns

    def merge(self, other: ModelStatistics) -> None:
        """Counts what another has counted, too."""
        self.inference_count += other.inference_count
        self.execution_count += other.execution_count
        self.last_inference_ms = max(self.last_inference_ms, other.last_inference_ms)
        self.histogram.merge(other.histogram)
        for rows, (count, ns) in other.batches.items():
            pair = self._batch(rows)
            pair[0] += count
            pair[1] += ns
        for kind, (count, ns) in other.sums.items():
            pair = self.sums[kind]
            pair[0] += count
            pair[1] += ns

    @property
    def error_count(self) -> int:
        """Requests that failed; cancelled ones are not failures."""
        return self.sums["fail"][0]

    def to_wire(self, name: str, version: str) -> dict[str, Any]:
        """One entry of `model_stats`."""
        quantile = self.histogram.quantile_us
        return {
            "name": name,
            "version": version,
            "last_inference": self.last_inference_ms,
            "inference_count": self.inference_count,
            "execution_count": self.execution_count,
            "batch_stats": [
                {"batch_size": rows, "compute_infer": {"count": n, "ns": ns}}
                for rows, (n, ns) in sorted(self.batches.items())
            ],
            "inference_stats": {kind: {"count": n, "ns": ns} for kind, (n, ns) in self.sums.items()},
            "latency_us": {
                "p50": quantile(0.5),
                "p90": quantile(0.9),
                "p99": quantile(0.99),
                "count": self.histogram.count,
                "buckets": self.histogram.buckets(),
            },
        }


class Refusals:
    """How many requests were answered with which error; closed words, and a bound in case they are not."""

    OTHERS = ("OTHER", "OTHER")

    def __init__(self) -> None:
        self.counts: dict[tuple[str, str], int] = {}
        """By code and reason."""

    def note(self, error: EdgedError) -> None:
        """Counts one answer."""
        key = (error.code.value, error.reason or "")
        if key not in self.counts and len(self.counts) >= _REFUSALS_MAX:
            key = self.OTHERS
        self.counts[key] = self.counts.get(key, 0) + 1
