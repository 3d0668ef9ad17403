"""What happened last to each model: the newest lines of the log about it, kept for `edgectl explain`.

Pure. It is fed with what the core tells the log anyway, so it can say nothing else than the journal does, and
is there where no journal is: in a container, or when the daemon runs in the foreground. It never decides
anything. A model that is gone keeps its lines for as long as there is room: why it went is asked afterwards.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edged.catalog import CATALOG

__all__ = ["HAPPENINGS_MAX", "MODELS_MAX", "Happening", "Happenings"]

HAPPENINGS_MAX = 24
"""Of one model: four crashes in a row with all that follows from them, and how it came before."""

MODELS_MAX = 256
"""Names that are remembered: with all their lines 3 MB, or 8 MB when every line is as long as it may be."""

_VALUE_CHARS_MAX = 300
"""A reason is a sentence; the journal has the whole of a long one."""


@dataclass(frozen=True, slots=True)
class Happening:
    """One line of the log: when (seconds since 1970), its kind in the catalog, and its fields."""

    time_s: float
    kind: str
    fields: Mapping[str, str]

    def to_wire(self) -> dict[str, Any]:
        """For `server_status`."""
        return {"time_ms": int(self.time_s * 1000), "event": self.kind, "fields": dict(self.fields)}


class Happenings:
    """The newest lines about each model, the oldest of them dropped beyond `HAPPENINGS_MAX`."""

    def __init__(self) -> None:
        self._models: dict[str, deque[Happening]] = {}

    def note(self, kind: str, fields: Mapping[str, Any], time_s: float) -> None:
        """Takes a line of the log; one without MODEL is about no model. What is only told to whoever debugs
        is left out: it would push out what matters."""
        name = fields.get("MODEL")
        event = CATALOG.get(kind)
        if not isinstance(name, str) or (event is not None and event.level == "debug"):
            return
        # Taken out and put in again: the name that was silent for longest is the first to be forgotten.
        lines = self._models.pop(name, None)
        if lines is None:
            lines = deque(maxlen=HAPPENINGS_MAX)
            if len(self._models) >= MODELS_MAX:
                del self._models[next(iter(self._models))]
        self._models[name] = lines
        said = {
            key: _cut(value) for key, value in fields.items() if key != "MODEL" and value not in (None, "")
        }
        lines.append(Happening(time_s, kind, said))

    def of(self, model: str) -> tuple[Happening, ...]:
        """What is known of a model, the oldest first."""
        return tuple(self._models.get(model, ()))


def _cut(value: object) -> str:
    text = str(value)
    return text if len(text) <= _VALUE_CHARS_MAX else f"{text[: _VALUE_CHARS_MAX - 1]}…"
