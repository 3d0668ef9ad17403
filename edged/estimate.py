"""How long a run of a model takes, by the rows in it: what its worker measured, corrected by what happens.

Pure. Times are kept for sizes 1, 2, 3–4, 5–8 and so on, each as a running mean of the runs whose rows fell
into it, and read off by straight lines between them. Three things are known of each model: `expect_s`, the
run itself; `turn_s`, the run and what goes around it, which is what a queue is worked off by; `margin_s`,
what is to be added to a sum of turns, by how much turns have varied of late and promises were broken, for a
promise to be kept. All are 0 while nothing is known: who asks must then try.

A mean follows slowly (`GAIN`), and a run that took very long counts as a long one and no more (`OUTLIER`), so
that one page fault does not make a model refuse. Should a whole size have had bad luck, it forgets: what was
measured at load wins ground again as long as that size is not run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["RunTimes"]

GAIN = 0.1
"""The weight of the newest run: the mean of about the last ten."""

OUTLIER = 2.0
"""A run counts as at most this many times the mean: so a mean grows by a tenth with each, and a lasting
change of threefold is learned within some twenty runs."""

VARIATIONS = 4.0
"""Mean deviations on top of the mean for what must be kept: as for TCP's time-out (RFC 6298, 2.3). Those of
several turns grow with the root of their number."""

SLACK_TURNS_MAX, KEPT_PER_BROKEN = 32, 1000
"""A promise that was broken adds a turn to what is allowed for from then on, one that was kept takes a
thousandth of a turn off again: so one in a thousand is broken, whatever turns vary by and whoever comes in
between. At most as much as was expected, and 32 turns: a bad minute must not be remembered for long."""

RATE_GAIN_MIN = 1.05
"""More rows are worth waiting for only where they raise rows/s by a twentieth: less is noise."""

REVIEW_RUNS = 64
"""Runs between two looks at which size is the best, and at which sizes have not been seen."""


class _Size:
    """The runs of one range of sizes."""

    __slots__ = ("rows", "runs", "runs_reviewed", "seconds", "seed")

    def __init__(self, rows: float, seconds: float, *, seed: tuple[float, float] | None = None) -> None:
        self.rows = rows
        self.seconds = seconds
        self.seed = seed
        self.runs = self.runs_reviewed = 0


class RunTimes:
    """The times of one model where it runs.

    `seed` are `[rows, µs]` as measured at load, by growing rows; wrong entries are passed over, since they
    come from a worker.
    """

    def __init__(self, seed: Iterable[Sequence[Any]] = ()) -> None:
        self._sizes: dict[int, _Size] = {}
        self._order: list[_Size] = []
        self._around_s = 0.0
        """What a turn takes beyond the run."""
        self._deviation = 0.0
        """How far turns are from what was expected, as a share of it."""
        self._slack_turns = 0.0
        """What broken promises have shown to be missing in the margin."""
        self._best: dict[int, int] = {}
        self._runs = 0
        for each in seed:
            if len(each) == 2 and type(each[0]) is int and each[0] > 0 and each[1] > 0:
                rows, seconds = each[0], each[1] / 1e6
                self._add(rows, _Size(rows, seconds, seed=(rows, seconds)))

    def _add(self, rows: int, size: _Size) -> None:
        self._sizes[(rows - 1).bit_length()] = size
        self._order = [self._sizes[key] for key in sorted(self._sizes)]
        self._best.clear()

    # ------------------------------------------------------------------ asking

    def expect_s(self, rows: int) -> float:
        """How long a run of so many rows takes in the worker; 0 while nothing is known."""
        order = self._order
        if not order:
            return 0.0
        if rows == 1 or len(order) == 1:
            first = order[0]
            return first.seconds if rows <= first.rows else first.seconds * rows / first.rows
        below = order[0]
        for above in order:
            if above.rows >= rows:
                break
            below = above
        else:
            # Beyond the largest that was seen each row costs what a row of that costs.
            return below.seconds * rows / below.rows
        if above is below or above.rows <= below.rows:
            return above.seconds
        share = (rows - below.rows) / (above.rows - below.rows)
        return below.seconds + share * (above.seconds - below.seconds)

    def turn_s(self, rows: int) -> float:
        """From the moment the worker is free until such a run is over and told; 0 while nothing is known."""
        return self.expect_s(rows) + self._around_s if self._order else 0.0

    def margin_s(self, turns_s: float) -> float:
        """By how much turns that are expected to take so long together may take longer."""
        one_s = self.turn_s(1)
        return VARIATIONS * self._deviation * math.sqrt(turns_s * one_s) + min(
            self._slack_turns * one_s, turns_s
        )

    def drain_s(self, rows: int, batch_max: int) -> float:
        """How long so many waiting rows take in the best batches."""
        if rows <= 0 or not self._order:
            return 0.0
        best = self.best_rows(batch_max)
        full, rest = divmod(rows, best)
        return full * self.turn_s(best) + (self.turn_s(rest) if rest else 0.0)

    def best_rows(self, batch_max: int) -> int:
        """The number of rows at a time, up to `batch_max`, at which rows/s is the highest."""
        best = self._best.get(batch_max)
        if best is None:
            best = self._best[batch_max] = self._find_best(batch_max) if batch_max > 1 else 1
        return best

    def _find_best(self, batch_max: int) -> int:
        if not self._order:
            return batch_max
        best, best_rate = 1, 1.0 / self.turn_s(1)
        rows = 2
        while True:
            rows = min(rows, batch_max)
            rate = rows / self.turn_s(rows)
            known = (rows - 1).bit_length() in self._sizes
            # Of a size that was never tried nothing is known but that it must be tried.
            if rate > best_rate * RATE_GAIN_MIN or (not known and rate >= best_rate):
                best, best_rate = rows, max(rate, best_rate)
            if rows == batch_max:
                return best
            rows *= 2

    # ------------------------------------------------------------------ learning

    def observe(self, rows: int, seconds: float, turn_s: float) -> None:
        """A run of so many rows took `seconds` in the worker, and `turn_s` in all."""
        if seconds <= 0.0:
            return
        size = self._sizes.get((rows - 1).bit_length())
        if size is None:
            self._around_s = self._around_s or max(0.0, turn_s - seconds)
            size = _Size(rows, seconds)
            size.runs = 1
            self._add(rows, size)
            return
        expected_s = self.expect_s(rows) + self._around_s
        size.runs += 1
        gain = max(GAIN, 1.0 / (size.runs + 1))
        size.rows += gain * (rows - size.rows)
        size.seconds += gain * (min(seconds, OUTLIER * size.seconds) - size.seconds)
        around_s = max(0.0, turn_s - seconds)
        self._around_s += GAIN * (min(around_s, OUTLIER * self._around_s + 100e-6) - self._around_s)
        off = abs(turn_s - expected_s) / expected_s
        self._deviation += GAIN * (min(off, OUTLIER) - self._deviation)
        self._runs += 1
        if self._runs >= REVIEW_RUNS:
            self._review()

    def promised(self, *, kept: bool) -> None:
        """A request that was taken in on the word of `margin_s` was in time, or was not."""
        change = -1.0 / KEPT_PER_BROKEN if kept else 1.0
        self._slack_turns = min(SLACK_TURNS_MAX, max(0.0, self._slack_turns + change))

    def _review(self) -> None:
        """Sizes that were not run since the last look go halfway back to what was measured at load."""
        self._runs = 0
        self._best.clear()
        for size in self._order:
            if size.runs == size.runs_reviewed and size.seed is not None:
                size.rows, size.seconds = size.seed[0], (size.seconds + size.seed[1]) / 2
            size.runs_reviewed = size.runs
        self._order = [self._sizes[key] for key in sorted(self._sizes)]
