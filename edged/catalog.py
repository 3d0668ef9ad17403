"""Every kind of event that edged writes to the log, as data.

Owns the names, the stable 128-bit `MESSAGE_ID`s, the levels, the constant sentences and the
explanations that `journalctl -x` shows. An id is never changed and never used again for another kind:
people's queries and alerts hang on it. The journal's catalog file (`packaging/edged.catalog`) and the
table in `docs/operating.md` are generated from here by `packaging/generate.py`; a test holds them
together.

Pure data: it must not import anything of edged.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

__all__ = ["CATALOG", "LEVELS", "OF_A_MODEL", "Event", "LevelName"]

LevelName = Literal["debug", "info", "warning", "error"]

#: syslog priorities (RFC 5424, table 2); the higher the number, the less it matters.
LEVELS: MappingProxyType[LevelName, int] = MappingProxyType(
    {"error": 3, "warning": 4, "info": 6, "debug": 7},
)


@dataclass(frozen=True, slots=True)
class Event:
    """One kind of event.

    `message` is a constant sentence without its full stop: what varies stands in fields. `explain` says
    what happened and what to do about it, for a person who sees it for the first time.
    """

    message_id: str
    level: LevelName
    message: str
    explain: str


_EVENTS: dict[str, Event] = {
    # The daemon itself.
    "server_starting": Event(
        "c8f2f72fe7434161ab6850e651acb04d",
        "info",
        "The daemon is starting",
        "The configuration is read and the locks are taken; models are looked for next. Nothing to do.",
    ),
    "server_ready": Event(
        "9c49ec38703741019ac7544272f72139",
        "info",
        "The daemon is ready",
        "Clients are answered from now on. Models that are still loading answer UNAVAILABLE with reason "
        "MODEL_LOADING until they are done; `edgectl models` shows them.",
    ),
    "server_stopping": Event(
        "92e9e480e02d4de084e902d1932c980d",
        "info",
        "The daemon is stopping",
        "New requests are refused, running ones are finished within server.shutdown_grace. Nothing to do.",
    ),
    "server_stopped": Event(
        "cad04ba8af4d4eb39b33de644f8f5693",
        "info",
        "The daemon has stopped",
        "All workers have ended and the sockets are gone. Nothing to do.",
    ),
    "server_failed": Event(
        "e37855892d8a48529c8e29e96fac3702",
        "error",
        "The daemon cannot run",
        "REASON and DETAIL say what is missing or in the way: another daemon on the same endpoint or "
        "state directory, a directory that cannot be written, a package that is not installed. Put that "
        "right; systemd tries again by itself.",
    ),
    "config_reloaded": Event(
        "fe2f49cc9c194cd0a0bfd71b4985d6a3",
        "info",
        "The configuration was read again",
        "CHANGED names the settings that hold from now on, NEEDS_RESTART those that will at the next start; "
        "without either nothing was different. `systemctl restart edged` when it suits.",
    ),
    "config_rejected": Event(
        "5e2f7e50a87c430db53fdf41b829126e",
        "error",
        "The new configuration was refused, the old one holds",
        "DETAIL names file, line and key. Correct it and run `systemctl reload edged` again.",
    ),
    "log_level_changed": Event(
        "f51876ee61444a69893f1a8264b51c92",
        "info",
        "The log level was changed",
        "LEVEL was set through the admin socket or by a reload; set so by hand it holds until the daemon "
        "restarts. Nothing to do.",
    ),
    # Models.
    "model_loading": Event(
        "10d41690a3864edcb1c5691421b6f183",
        "info",
        "A model version is loading",
        "Its files were copied into the store and a worker loads them. An older version goes on serving. "
        "Nothing to do.",
    ),
    "model_ready": Event(
        "0a90e1ebda52472682f6498f10b1742d",
        "info",
        "A model version is ready",
        "It has been loaded, warmed up and checked against its golden samples. DEVICE and RUNTIME say "
        "where it runs. Nothing to do.",
    ),
    "model_swapped": Event(
        "2264b6d1e2884ebd83c9a1bbf62ef352",
        "info",
        "A model's new version took over",
        "New requests go to MODEL_VERSION; the one in PREVIOUS_VERSION finishes what it has begun and is "
        "ended. Nothing to do; an older file put back into the folder takes over again.",
    ),
    "model_failed": Event(
        "b3a23a4e656b4f9e8e2488308002ece0",
        "error",
        "A model version could not be loaded",
        "REASON and DETAIL say why. An older version, if there is one, goes on serving. It is tried again "
        "when its file changes or after `edgectl load MODEL`.",
    ),
    "model_retired": Event(
        "d618fa877b9e4c58b2f216b21ae221e7",
        "info",
        "A model version was retired",
        "A newer version serves in its place and its worker has ended. Its files stay in the store as "
        "long as store.keep_versions says. Nothing to do.",
    ),
    "model_removed": Event(
        "fa44571369da47d3b7bb0e46577b41bf",
        "info",
        "A model was removed",
        "It is gone from the models folder, or someone asked for `edgectl unload`. Requests for it are "
        "refused.",
    ),
    "model_unloaded": Event(
        "4843a3201f2f4818ad26386f5f9511c0",
        "info",
        "A model was unloaded by request",
        "It answers UNAVAILABLE with reason MODEL_UNLOADED until `edgectl load` or other content brings it "
        "back.",
    ),
    "model_quarantined": Event(
        "4d7c30d475dd41ada6cfcd7cdaf2f145",
        "error",
        "A model version was put in quarantine",
        "Loading it took the daemon or the machine down more than once, or its worker kept crashing. It "
        "is left alone until its file changes or someone runs `edgectl load MODEL`.",
    ),
    "model_restored": Event(
        "5bf91c95378e436dbefff4bbd3bdc719",
        "warning",
        "A model serves its last good copy from the store",
        "What is in the models folder cannot be used, or the folder is not there. REASON says which; put "
        "a good file in the folder or mount it again.",
    ),
    "copy_damaged": Event(
        "6c61e0a1a3d90be8ebe17c210e6ed61e",
        "error",
        "A stored copy of a model is damaged and is not used any more",
        "The private copy that MODEL was loaded from has other bytes than were stored: DETAIL names content "
        "and file. Nothing is answered from it. It is copied again from the models folder if that still has "
        "the content, else the version before serves. The damaged copy is kept below store/damaged in the "
        "state directory until four others have followed it or its room is needed. A disk that does this "
        "once will do it again: look at it (dmesg, smartctl), and replace a card.",
    ),
    "entry_refused": Event(
        "d546500e5ba8478e9077114c40a501ae",
        "warning",
        "An entry of the models folder was refused",
        "What the folder has for MODEL cannot be served; REASON and DETAIL say why (its name, its "
        "settings, two entries with one name, an empty or unreadable file). Correct it: it is taken as "
        "soon as it changes.",
    ),
    "disk_stalled": Event(
        "f9bc78a13fdd4c8491a39c6bcb681db4",
        "warning",
        "A disk does not answer",
        "One task on the models folder or the state directory has taken DURATION_MS so far. What serves "
        "goes on; new files are not seen until it ends. Look at disks and mounts (dmesg, `findmnt`). Copying "
        "a huge model from a slow one takes long, too.",
    ),
    "disk_answers": Event(
        "1a3b19368abc4cac9016bb26830d02cf",
        "info",
        "The disk answers again",
        "The task has ended, and new files are seen again. Nothing to do.",
    ),
    "store_failed": Event(
        "316d183f4bd1443f8cd97a2de30b716c",
        "error",
        "The state directory could not be read or written",
        "What serves goes on; DETAIL names the file. Free space on the disk, or look at its health.",
    ),
    "folder_fault": Event(
        "4f96980761b04294abcb1dad4c55c3dd",
        "error",
        "The models folder has a fault",
        "It is missing, unreadable or on another file system than before. This is not taken for a "
        "deletion: all models go on serving. Mount it again or correct its rights.",
    ),
    "folder_healed": Event(
        "d22392b1a4e34c28971d2250439c4d27",
        "info",
        "The models folder is back",
        "Changes in it are seen again. Nothing to do.",
    ),
    "folder_polled": Event(
        "72c75a3719ec45f39149859d656f7e44",
        "warning",
        "The models folder is looked at on a timer only",
        "The kernel gave no inotify watch (REASON), so a new file is noticed at the next loading.rescan. "
        "Raise fs.inotify.max_user_watches or max_user_instances.",
    ),
    # Workers.
    "worker_started": Event(
        "f2c5ecef57c349ffb3e64b16e4d0ada8",
        "debug",
        "A worker process was started",
        "The process PID runs MODEL. Nothing to do.",
    ),
    "worker_exited": Event(
        "0fa54f7c7f654ec4a8328592d22ee251",
        "debug",
        "A worker process has ended as asked",
        "Its memory went back to the system. Nothing to do.",
    ),
    "worker_crashed": Event(
        "13cf40f541f34f0ba742d4fe5d0d40ec",
        "error",
        "A worker process died",
        "The requests it had were answered UNAVAILABLE with reason WORKER_CRASHED; other models are "
        "untouched. REASON names the signal or exit status. If it recurs, try another runtime or device "
        "in the model's settings.",
    ),
    "worker_hung": Event(
        "3d2fed57e12e4408bfcbcf898be8f626",
        "error",
        "A worker process gave no answer in time and was ended",
        "A run or a load went past its limit and did not react to being cancelled, so the process was "
        "killed. A new one is started. Look at the driver's log (dmesg) if DEVICE is an accelerator.",
    ),
    "worker_restarting": Event(
        "5e0e08816ea4486ab53a5c43c1da7e94",
        "warning",
        "A worker process is started again",
        "DURATION_MS is the pause before it, which grows with each crash in a row. Nothing to do unless it "
        "goes on.",
    ),
    "worker_restarted": Event(
        "d0a8d345dcfa43c4952d5ab952eeb1b7",
        "info",
        "A model serves again after its worker died",
        "DURATION_MS is how long the load took. Nothing to do.",
    ),
    "worker_over_budget": Event(
        "49c0ac6c60484c4dad1406caedd85ee1",
        "error",
        "A worker process used more memory than its budget and was ended",
        "REASON has the figure. Raise memory_max in the model's settings if the model needs "
        "that much; otherwise it leaks, and the restart has cured it for now.",
    ),
    "template_crashed": Event(
        "a1ea2b7839264003bdeee433d1c02d32",
        "error",
        "The process that workers are forked from died",
        "Running workers are untouched and it is started again. If it recurs, the installation of RUNTIME "
        "is broken: try importing it by hand.",
    ),
    # Devices and choices.
    "device_verdict": Event(
        "b3a16cd0d6514242b1c08033290bf1a7",
        "info",
        "A device was tried",
        "REASON tells how it went, DETAIL what to do if it should work and does not. `edgectl devices` shows "
        "all.",
    ),
    "device_lost": Event(
        "8e782e5171ed43fd83689ccdca1d7b7d",
        "error",
        "A device that worked does not work any more",
        'Models with policy "prefer" move to another device, those with "require" become UNAVAILABLE. See '
        "HINT and the driver's log (dmesg).",
    ),
    "device_fallback": Event(
        "edc1f777e1bd40c1a4a2089adbcff5d3",
        "warning",
        "A model runs on another device than the one asked for",
        "WANTED was asked for, DEVICE is what it runs on, REASON says why. Every reply carries the reason "
        'too. Set policy = "require" to be refused instead.',
    ),
    "choice_measured": Event(
        "5bfe784afb7e478e8294d7d43f9245af",
        "info",
        "A model was measured on another runtime or device",
        "DETAIL has both times (median). It switches only when the answers agree and the gain is real. "
        "Nothing to do.",
    ),
    "choice_switched": Event(
        "faf1c102b76c44c6972f1942a7f41a35",
        "info",
        "A model switched to a faster runtime or device",
        "Measured on the model itself, with answers that agree. The choice is remembered. Pin runtime and "
        "device in the model's settings to forbid it.",
    ),
    # Resources.
    "pressure_changed": Event(
        "a55f2641bad54915bbcbbdd1c08ba751",
        "warning",
        "The device is short of a resource",
        "LEVEL is the step of the ladder (WARN, REFUSE_LOADS, SHRINK, SHED), REASON has the figures. "
        "Unload models or end other programs; `edgectl status` shows who uses what.",
    ),
    "pressure_eased": Event(
        "b3bc7fe7cca34376a0c13f2dcb503d19",
        "info",
        "The shortage has eased",
        "LEVEL is the step of the ladder that still holds; OK means none. Nothing to do.",
    ),
    "memory_pressed": Event(
        "43226358adcf42f8bb64f3ff48d844fc",
        "info",
        "The system asks for memory back",
        "The service manager or the kernel (SOURCE) told of memory pressure; workers give back what they "
        "hold in reserve. Further ones are only counted (the metric edged_memory_pressure_events_total) and "
        "said again after ten quiet minutes. Nothing to do unless models are refused as well.",
    ),
    "pressure_watch_failed": Event(
        "e0722f0a5a7249a8a7a948649ea0d17f",
        "warning",
        "Memory pressure is not told as the service manager asked",
        "REASON says what is wrong with $MEMORY_PRESSURE_WATCH or $MEMORY_PRESSURE_WRITE. The guard looks at "
        "memory once a second all the same. See MemoryPressureWatch= in systemd.resource-control(5).",
    ),
    "load_refused": Event(
        "836435439c194eb3b6130149c7e190a8",
        "warning",
        "A model was not loaded for want of memory",
        "DETAIL has what is needed and what is free. It is tried again when memory is free: unload a "
        "model, or raise resources.memory.",
    ),
    # Metrics.
    "metrics_failed": Event(
        "574e83033adf4c0bbb6bae5cbfa5f5b4",
        "error",
        "Metrics cannot be given out",
        "PATH cannot be written or ENDPOINT not be listened on, for REASON; everything else goes on. Correct "
        "[metrics] in edged.toml; for an endpoint the unit's sandbox must be opened, too: copy "
        "packaging/prometheus/metrics-http.conf. Said again only when the reason changes.",
    ),
    "metrics_on_disk": Event(
        "229ec07243064f34915081ee01b76a2e",
        "warning",
        "The file for metrics is not in memory",
        "PATH is on a disk, which is written at each metrics.interval. Name a place below /run, or a longer "
        "interval, if the disk wears out.",
    ),
    # Clients.
    "batch_refused": Event(
        "36b3c947a43648dfa88bb0889825d0fc",
        "error",
        "A model's answer to several requests at once could not be taken apart",
        "DETAIL says which output had not one row for each row that went in. The requests are run again one "
        "by one, and the model is given one at a time until it is loaded again; `max_batch_size = 1` in its "
        "settings says so for good.",
    ),
    "client_misbehaves": Event(
        "bdc7febeed5b4db4b64503d793d2c8a4",
        "warning",
        "A client sent something that cannot be served",
        "CLIENT_UID and CLIENT_PID name the sender, REASON and DETAIL what was wrong: look into that "
        "program. Further ones of this kind are only counted, once a minute.",
    ),
    "client_misbehaves_count": Event(
        "adb39ccfff2d45d8ac6d7da90d0b1d79",
        "warning",
        "A client went on sending what cannot be served",
        "COUNT more of the kind in REASON since the last line about it. Look into the client that the first "
        "one names.",
    ),
    "client_slow": Event(
        "e302dae20bfb45279fd3ecf310a8eeb1",
        "warning",
        "A client does not read its replies",
        "Its queue is full and COUNT replies for it were discarded. Nobody else is slowed. Look for a "
        "program that asks and does not read.",
    ),
    "request_internal_error": Event(
        "3eeeac0f294e4b278f82078b72eb52ae",
        "error",
        "A request failed inside the runtime",
        "The client got INTERNAL. DETAIL has what the runtime said: try the request with another runtime or "
        "device in the model's settings. Further ones are counted once a minute.",
    ),
    # Faults of edged and of its log.
    "daemon_bug": Event(
        "b5f3288a61b349fc9660e3700290231a",
        "error",
        "A fault in edged itself",
        "Please report it with the traceback in DETAIL. INCIDENT is the number that the client was given, "
        "if there was one.",
    ),
    "log_dropped": Event(
        "15001985f2e74dcc88a4bdeec148da60",
        "warning",
        "Log records were dropped",
        "The log could not be written as fast as records came, or not at all for a while; COUNT are missing "
        "at this point. If journald did not read, `systemctl status systemd-journald` says why.",
    ),
    "systemd_missing": Event(
        "73a02c5d50d443629d7a202068b72f4b",
        "info",
        "Records go to standard error instead of the journal",
        "The journal was asked for and REASON says why it cannot be had. Searchable fields come as soon as "
        "journald listens; until then the same records are lines on standard error. Nothing to do where "
        "there is meant to be no journal.",
    ),
}

CATALOG: MappingProxyType[str, Event] = MappingProxyType(_EVENTS)

OF_A_MODEL: frozenset[str] = frozenset(
    {
        *("model_loading", "model_ready", "model_swapped", "model_failed", "model_retired", "model_removed"),
        *("model_unloaded", "model_quarantined", "model_restored", "entry_refused", "load_refused"),
        "copy_damaged",
        *("worker_started", "worker_exited", "worker_crashed", "worker_hung", "worker_restarting"),
        *("worker_restarted", "worker_over_budget", "device_fallback", "choice_measured", "choice_switched"),
        *("batch_refused", "request_internal_error"),
    }
)
"""What `journalctl -u edged MODEL=name` tells of a model: each of these kinds carries its MODEL."""
