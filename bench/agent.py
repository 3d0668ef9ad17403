"""A client process of the benchmarks: an app of its own, with an interpreter of its own.

    python -m bench.agent

Reads a `Target` as one line of JSON, says `ready` when it has asked it once, then takes one order a line and
answers each with one line, until stdin ends. See `bench.crowd`, which starts it.
"""

from __future__ import annotations

import contextlib
import gc
import json
import sys
import time
from typing import Any

from bench.load import closed, paced, poisson_s
from bench.pipeline import OpenLoop, Pipeline, opened_pipeline
from bench.targets import Target, opened

__all__ = ["main"]


def main() -> None:
    """Serves its orders."""
    target = Target.from_json(sys.stdin.readline())
    with contextlib.ExitStack() as stack:
        pipeline: Pipeline | None = None
        ask = stack.enter_context(opened(target))
        ask()
        _say("ready")
        gc.freeze()
        for line in sys.stdin:
            order = json.loads(line)
            cpu_s = time.process_time()
            if order["do"] in ("saturate", "open"):
                if pipeline is None:
                    pipeline = stack.enter_context(opened_pipeline(target))
                answer = _pipelined(pipeline, order)
            else:
                time.sleep(max(0, order["begin_ns"] - time.monotonic_ns()) / 1e9)
                answer = _one_by_one(ask, order)
            _say(json.dumps({**answer, "cpu_s": time.process_time() - cpu_s}))


def _one_by_one(ask: Any, order: dict[str, Any]) -> dict[str, Any]:
    began = time.perf_counter()
    if order["do"] == "paced":
        times = paced(ask, order["seconds"], order["rate_hz"])
    else:
        times = closed(ask, order["seconds"])
    seconds = time.perf_counter() - began
    return {"count": len(times) + 1, "seconds": seconds, "latencies_us": [round(t * 1e6, 1) for t in times]}


def _pipelined(pipeline: Pipeline, order: dict[str, Any]) -> dict[str, Any]:
    if order["do"] == "saturate":
        count, seconds = pipeline.saturate(order["in_flight"], order["seconds"], order["begin_ns"])
        return {"count": count, "seconds": seconds}
    times_s = poisson_s(order["rate_hz"], order["seconds"], order["seed"])
    return pipeline.open_loop(OpenLoop(times_s, order["deadline_s"]), order["begin_ns"]).to_wire()


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main()
