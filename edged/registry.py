"""What is served under which name: the tables of tracks and instances, and the way from a name to one.

Pure. `lookup` is asked once for each request and answers from a table of routes, which whoever changes what
serves has to clear (`changed`). For what does not serve it raises the error that says why, and whether it is
worth asking again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from edged.errors import NotFound, Unavailable
from edged.instances import Instance, InstanceState, Track
from edged.wire import cut

__all__ = ["FolderState", "Registry"]

ROUTES_MAX = 4096
"""Names and versions whose answer is kept: clients choose them, so they need a bound."""

NAMES_SHOWN = 20
"""How many models an error lists."""


@dataclass
class FolderState:
    """What the last look at the models folder said about the folder itself."""

    scanned: bool = False
    resting: bool = False
    """Whether something in it has changed too recently to be touched."""
    fault: str = ""


class Registry:
    """All tracks and instances, and which of them a request means."""

    def __init__(self) -> None:
        self.tracks: dict[tuple[str, int | None], Track] = {}
        self.instances: dict[int, Instance] = {}
        self.folder = FolderState()
        self._routes: dict[tuple[str, str], Instance] = {}

    def lookup(self, name: str, version: str) -> Instance:
        """The instance that serves `name`; raises NotFound, or Unavailable with the reason."""
        instance = self._routes.get((name, version))
        if instance is not None and instance.state is InstanceState.READY:
            return instance
        instance = self._resolve(name, version)
        if instance.state is InstanceState.READY and len(self._routes) < ROUTES_MAX:
            self._routes[name, version] = instance
        return instance

    def changed(self) -> None:
        """Something else serves now."""
        self._routes.clear()

    def named(self, name: str) -> list[Track]:
        """A model's tracks: one for each of its versions."""
        return [t for t in self.tracks.values() if t.name == name]

    def names(self) -> set[str]:
        """Every model that the folder has."""
        return {t.name for t in self.tracks.values()}

    def digests_in_use(self) -> frozenset[str]:
        """The contents that serve, are on their way, or would be fallen back on."""
        used = {i.staged.digest for i in self.instances.values()}
        used.update(t.last_good[1].digest for t in self.tracks.values() if t.last_good is not None)
        return frozenset(used)

    def settled(self) -> bool:
        """Whether everything that the folder has serves, or is known not to for now."""
        return (self.folder.scanned and not self.folder.resting) and all(
            (t.lost is None and t.serving is not None)
            or t.unloaded
            or (t.lost is None and t.incoming is None and (t.failure is not None or t.entry is None))
            or (t.incoming is not None and t.incoming.reason == "MEMORY_PRESSURE")
            for t in self.tracks.values()
        )

    # ------------------------------------------------------------------ from a name to an instance

    def _resolve(self, name: str, version: str) -> Instance:
        tracks = self.named(name)
        if not tracks:
            raise self._no_model(name)
        admitting = _admitting(tracks)
        if version:
            admitting = [i for i in admitting if str(i.version) == version]
            tracks = [t for t in tracks if _may_have(t, version)]
            if not tracks:
                raise self._no_version(name, version)
        if admitting:
            return max(admitting, key=lambda i: i.version)
        raise _unavailable(name, version, tracks)

    def _no_model(self, name: str) -> NotFound | Unavailable:
        if not self.folder.scanned:
            return Unavailable(
                "the daemon is starting and has not looked at its models yet; ask again shortly",
                reason="SERVER_STARTING",
                retry_after_ms=200,
            )
        known = ", ".join(sorted(self.names())[:NAMES_SHOWN])
        return NotFound(f"no model '{cut(name)}'; there are: {known or 'none yet'}", reason="MODEL_NOT_FOUND")

    def _no_version(self, name: str, version: str) -> NotFound:
        served = ", ".join(str(i.version) for i in _admitting(self.named(name)))
        return NotFound(
            f"model '{name}' has no version '{cut(version)}'; it serves {served or 'none'}",
            reason="VERSION_NOT_FOUND",
        )


def _admitting(tracks: Iterable[Track]) -> list[Instance]:
    return [i for t in tracks if (i := t.serving) is not None and i.admits]


def _may_have(track: Track, version: str) -> bool:
    """Whether a track has this version, or nothing yet that would tell which it has."""
    if track.explicit_version is not None:
        return str(track.explicit_version) == version
    known = [i.version for i in (track.serving, track.incoming) if i is not None]
    if track.failure is not None and track.failure.version is not None:
        known.append(track.failure.version)
    return version in map(str, known) or not known


def _unavailable(name: str, version: str, tracks: list[Track]) -> Unavailable:
    """Why none of a model's tracks serves: the nearest to serving is the one to tell of."""
    for track in tracks:
        for instance in (track.serving, track.incoming):
            if instance is not None and version in ("", str(instance.version)):
                return _restarting(instance) if instance is track.serving else _loading(instance)
    for track in tracks:
        if track.unloaded:
            return Unavailable(
                f"model '{name}' was unloaded; `edgectl load {name}` brings it back",
                reason="MODEL_UNLOADED",
            )
        if track.failure is not None:
            return Unavailable(f"model '{name}': {track.failure.message}", reason=track.failure.reason)
    return Unavailable(
        f"model '{name}' is being copied; ask again shortly", reason="MODEL_LOADING", retry_after_ms=500
    )


def _restarting(instance: Instance) -> Unavailable:
    return Unavailable(
        f"model '{instance.name}': {instance.message}",
        reason=instance.reason,
        retry_after_ms=int(1000 * instance.backoff_s()),
    )


def _loading(instance: Instance) -> Unavailable:
    text = instance.message or instance.state.value
    return Unavailable(
        f"model '{instance.name}' is loading ({text}); ask again shortly",
        reason="MODEL_LOADING",
        retry_after_ms=500,
    )
