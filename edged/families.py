"""Every metric that edged tells, as data: the names that people's dashboards and alerts hang on.

Names and units follow Prometheus' conventions: base units, `_total` for what only grows. The page
(`edged.metrics`) and the table in `docs/operating.md` are made from here, and the shipped alert rules are
checked against it. Pure data: it must not import anything of edged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

__all__ = ["FAMILIES", "Family"]


@dataclass(frozen=True, slots=True)
class Family:
    """A metric: its type, what it says, and its labels."""

    type: str
    help: str
    labels: tuple[str, ...] = ()


_MODEL: Final = ("model", "version")

FAMILIES: Final[Mapping[str, Family]] = {
    # The daemon.
    "edged_build_info": Family("gauge", "Which edged this is; always 1", ("version", "protocol")),
    "edged_start_time_seconds": Family("gauge", "When the daemon started, since 1970"),
    "edged_metrics_time_seconds": Family("gauge", "When these figures were taken, since 1970"),
    "edged_ready": Family("gauge", "Whether the daemon is ready: not starting, not stopping"),
    "edged_requests_total": Family("counter", "Requests of all kinds that were received"),
    "edged_inferences_total": Family("counter", "Requests for inference that were answered with outputs"),
    "edged_refusals_total": Family("counter", "Requests answered with an error", ("code", "reason")),
    "edged_bad_messages_total": Family("counter", "Messages that were no request"),
    "edged_damaged_copies_total": Family("counter", "Stored copies of models that were found damaged"),
    "edged_requests_in_flight": Family("gauge", "Inferences that wait or run"),
    "edged_clients": Family("gauge", "Connections with inferences in flight"),
    "edged_lease_connections": Family("gauge", "Connections to lease.sock"),
    "edged_leased_regions": Family("gauge", "Regions of memory that clients lease"),
    "edged_leased_bytes": Family("gauge", "Memory that clients lease"),
    "edged_folder_fault": Family("gauge", "Whether the models folder is missing or unreadable"),
    "edged_log_dropped_total": Family("counter", "Records that the log had no room for"),
    "edged_disk_busy_seconds": Family("gauge", "How long a thread that uses the disk has been at its task"),
    "edged_memory_pressure_events_total": Family(
        "counter", "How often the system asked for memory back (PSI or $MEMORY_PRESSURE_WATCH)"
    ),
    # Models.
    "edged_model_serving": Family(
        "gauge",
        "Whether a version of the model serves; a model that was unloaded by request is left out",
        ("model",),
    ),
    "edged_model_refused": Family(
        "gauge", "Whether what is in the folder for the model was refused", ("model",)
    ),
    "edged_model_state": Family("gauge", "1 for the state that the version is in", (*_MODEL, "state")),
    "edged_model_info": Family(
        "gauge",
        "Where the version runs; always 1",
        (*_MODEL, "runtime", "device", "precision", "choice"),
    ),
    "edged_model_fallback": Family(
        "gauge", "Whether the version runs elsewhere than its settings ask for", _MODEL
    ),
    "edged_model_restarts_total": Family("counter", "How often its worker was started again", _MODEL),
    "edged_model_inferences_total": Family(
        "counter", "Inferences answered with outputs; a batch of n rows is n", _MODEL
    ),
    "edged_model_executions_total": Family("counter", "Runs of the model", _MODEL),
    "edged_model_batch_rows": Family("histogram", "Rows of a run, of all requests in it together", _MODEL),
    "edged_model_cache_total": Family(
        "counter",
        "Requests that were looked up among kept answers, where the model's settings keep any",
        (*_MODEL, "result"),
    ),
    "edged_model_errors_total": Family(
        "counter",
        "Requests that were not answered with outputs: failed, cancelled, or refused before they ran",
        (*_MODEL, "outcome"),
    ),
    "edged_model_latency_seconds": Family(
        "histogram", "From the arrival of a request to its answer, in the daemon", _MODEL
    ),
    "edged_model_queue_seconds_total": Family("counter", "Time that inferences waited", _MODEL),
    "edged_model_compute_seconds_total": Family("counter", "Time that inferences ran", _MODEL),
    "edged_model_queue_length": Family("gauge", "Requests that wait for the version", _MODEL),
    "edged_model_running": Family("gauge", "Runs that are with its worker", _MODEL),
    "edged_model_last_inference_time_seconds": Family(
        "gauge", "When the last inference was answered, since 1970", _MODEL
    ),
    "edged_model_load_seconds": Family("gauge", "How long its last load took", _MODEL),
    "edged_model_worker_memory_bytes": Family(
        "gauge", "Memory of the process that it runs in; several models may share one", _MODEL
    ),
    # The device.
    "edged_device_ok": Family("gauge", "Whether a trial run on the device worked", ("runtime", "device")),
    "edged_pressure_level": Family("gauge", "0 OK, 1 WARN, 2 REFUSE_LOADS, 3 SHRINK, 4 SHED"),
    "edged_memory_pressure_ratio": Family(
        "gauge", "Share of the last ten seconds in which tasks waited for memory", ("kind",)
    ),
    "edged_memory_bytes": Family("gauge", "Memory of edged's own processes", ("process",)),
    "edged_memory_limit_bytes": Family("gauge", "What edged's processes may use together"),
    "edged_memory_free_for_models_bytes": Family("gauge", "What further models may take"),
    "edged_temperature_celsius": Family("gauge", "The hottest sensor"),
    "edged_throttled": Family("gauge", "Whether the processors are slowed down for heat or lack of power"),
    "edged_disk_free_bytes": Family("gauge", "Free space on the state directory's disk"),
}
