"""What a model says of itself: its fields, its own metadata, and how much of both is told.

Pure, and the one place where the two become the `properties` of the protocol, and are told apart again.
Metadata is data: an app reads its labels there, or its alphabet, and one that was cut short would give wrong
answers. So it is told whole, or not at all and in words. Runs on Python 3.10 too.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = [
    "FIELDS",
    "METADATA_BYTES_MAX",
    "TENSORS_BYTES_MAX",
    "largest",
    "merged",
    "metadata_bytes",
    "parted",
]

FIELDS = ("producer_name", "graph_name", "domain", "description", "graph_description", "version")
"""What a model file says in places of their own (onnx.proto), by ONNX Runtime's names."""

METADATA_BYTES_MAX = 1 << 20
"""Of one model's properties, keys and values together as UTF-8. An alphabet of 13,000 characters takes 50 KB,
the largest that are known a few hundred; the daemon keeps it for as long as the model serves."""

TENSORS_BYTES_MAX = 1 << 20
"""Of one model's inputs and outputs, names and shapes, as msgpack. Twenty thousand of them; the zoo's largest
models have a few hundred."""

_FIELD_PREFIX = "model."
_NAMED_MAX = 8
_NAME_CHARS_MAX = 64


def merged(fields: Mapping[str, str], own: Mapping[str, str]) -> dict[str, str]:
    """The properties: a file's fields, without the empty ones, and the metadata that is its own.

    A name that both have is the file's own, and the field stands under `model.` and its name, also if it is
    empty: so neither hides the other, and `parted` knows whose is which.
    """
    found = {name: fields[name] for name in FIELDS if fields.get(name) and name not in own}
    found.update({_FIELD_PREFIX + name: fields.get(name, "") for name in FIELDS if name in own})
    found.update(own)
    return found


def parted(properties: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """The inverse of `merged`: every field, empty where there is none, and the file's own metadata."""
    moved = [name for name in FIELDS if _FIELD_PREFIX + name in properties]
    places = {name: _FIELD_PREFIX + name if name in moved else name for name in FIELDS}
    fields = {name: properties.get(place, "") for name, place in places.items()}
    taken = set(places.values())
    return fields, {key: value for key, value in properties.items() if key not in taken}


def metadata_bytes(metadata: Mapping[str, str]) -> int:
    """What counts against `METADATA_BYTES_MAX`."""
    return sum(_size(key, value) for key, value in metadata.items())


def largest(metadata: Mapping[str, str]) -> list[str]:
    """The keys to name when it is too much: the largest, until the rest would fit; few, cut for people."""
    excess = metadata_bytes(metadata) - METADATA_BYTES_MAX
    found: list[str] = []
    for key, value in sorted(metadata.items(), key=lambda item: -_size(*item)):
        if excess <= 0 or len(found) == _NAMED_MAX:
            break
        found.append(key if len(key) <= _NAME_CHARS_MAX else key[:_NAME_CHARS_MAX] + "…")
        excess -= _size(key, value)
    return found


def _size(key: str, value: str) -> int:
    return len(key.encode()) + len(value.encode())
