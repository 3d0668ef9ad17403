"""What a reload changes: which settings are different, and which of them hold at once.

Pure. What was built into sockets, processes, the lock on the state directory or the log's thread stays as it
was; everything else is looked up where it is used, or told to its owner by whoever carries the reload out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from edged.config import Config, flattened

__all__ = ["NEEDS_RESTART", "Reload", "compare"]

NEEDS_RESTART = frozenset(
    {
        *("server.endpoint", "server.models", "server.state_dir", "server.cache_dir"),
        *("limits.frames", "limits.message_bytes"),  # libzmq's own bounds of a socket, and the arenas' size
        "log.format",
    }
)
"""And every `runtimes.NAME.python`, which the templates of that runtime were started with."""


@dataclass(frozen=True, slots=True)
class Reload:
    """The settings to go on with, and the names of those that changed, as they stand in `edged.toml`."""

    config: Config
    live: tuple[str, ...]
    waiting: tuple[str, ...]
    """What `config` still has as it was."""


def compare(old: Config, new: Config) -> Reload:
    """What follows from `new`, which was read while `old` is in force."""
    before, after = flattened(old), flattened(new)
    changed = [name for name in after if before[name] != after[name]]
    waiting = tuple(name for name in changed if _needs_restart(name))
    kept = replace(
        new,
        server=replace(
            new.server,
            endpoint=old.server.endpoint,
            models=old.server.models,
            state_dir=old.server.state_dir,
            cache_dir=old.server.cache_dir,
        ),
        limits=replace(new.limits, frames=old.limits.frames, message_bytes=old.limits.message_bytes),
        log=replace(new.log, format=old.log.format),
        runtimes=old.runtimes,
    )
    return Reload(kept, tuple(name for name in changed if name not in waiting), waiting)


def _needs_restart(name: str) -> bool:
    return name in NEEDS_RESTART or name.startswith("runtimes.")
