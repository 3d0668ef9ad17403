"""Answers that are kept: the same question to the same model need not be run again.

Pure; by choice of a model's owner (`[cache]` in its settings). A question is known by its digest: the
instance (one content, on one device, under one set of settings), the inputs' names, datatypes, shapes and
bytes, and the outputs that are wanted. An answer is its outputs and how they were made. The one that was used
longest ago goes first, within what its model may keep; over all models together, it goes from the model that
keeps the most.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import msgspec

from edged.messages import TensorData
from edged.wire import Output

__all__ = ["Answer", "Keep", "ResponseCache", "question"]

ENTRY_BYTES = 1024
"""What an answer takes beside its outputs' bytes; it bounds the number of tiny ones too."""


class Answer(msgspec.Struct, frozen=True):
    """What was answered, and the part of the reply's parameters that tells how it was made."""

    outputs: tuple[Output, ...]
    parameters: dict[str, Any]

    @property
    def nbytes(self) -> int:
        """What it takes."""
        return ENTRY_BYTES + sum(len(each[3]) for each in self.outputs)


class Keep(msgspec.Struct, frozen=True):
    """That an answer is to be kept: under which digest, and how large it may be."""

    digest: bytes
    bytes_max: int


def question(inputs: Sequence[TensorData], outputs: Sequence[str] | None) -> bytes:
    """The digest of what is asked; no two questions have the same text before it is hashed."""
    digest = hashlib.blake2b(digest_size=32)
    for tensor in inputs:
        name, datatype, rank = tensor.name.encode(), tensor.datatype.encode(), len(tensor.shape)
        sizes = len(name), len(datatype), rank, *tensor.shape, len(tensor.raw)
        digest.update(struct.pack(f"<{len(sizes)}q", *sizes))
        digest.update(name)
        digest.update(datatype)
        digest.update(tensor.raw)
    digest.update(b"\0all" if outputs is None else repr(list(outputs)).encode())
    return digest.digest()


class _Kept:
    """One instance's answers, the one used longest ago first."""

    def __init__(self) -> None:
        self.answers: OrderedDict[bytes, tuple[float, Answer]] = OrderedDict()
        self.nbytes = 0

    def pop(self, digest: bytes) -> None:
        found = self.answers.pop(digest, None)
        if found is not None:
            self.nbytes -= found[1].nbytes

    def pop_oldest(self) -> None:
        _, (_, answer) = self.answers.popitem(last=False)
        self.nbytes -= answer.nbytes


class ResponseCache:
    """Bounded answers, by instance; `bytes_max` bounds them all together."""

    def __init__(self, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self._kept: dict[int, _Kept] = {}
        self._bytes = 0

    def get(self, instance: int, digest: bytes, now_s: float) -> Answer | None:
        """The answer to a question, if it is kept and not too old."""
        kept = self._kept.get(instance)
        found = None if kept is None else kept.answers.get(digest)
        if kept is None or found is None:
            return None
        until_s, answer = found
        if until_s <= now_s:
            self._bytes -= answer.nbytes
            kept.pop(digest)
            return None
        kept.answers.move_to_end(digest)
        return answer

    def put(
        self, instance: int, keep: Keep, answer: Answer, *, ttl_s: float | None = None, now_s: float
    ) -> None:
        """Keeps an answer; one that is too large is let go, and older ones give way to it."""
        size = answer.nbytes
        if size > min(keep.bytes_max, self.bytes_max):
            return
        kept = self._kept.setdefault(instance, _Kept())
        before = kept.nbytes
        kept.pop(keep.digest)
        kept.answers[keep.digest] = (math.inf if ttl_s is None else now_s + ttl_s, answer)
        kept.nbytes += size
        while kept.nbytes > keep.bytes_max:
            kept.pop_oldest()
        self._bytes += kept.nbytes - before
        self.shrink()

    def shrink(self) -> None:
        """Lets go of what is beyond `bytes_max`, from the instance that keeps the most."""
        while self._bytes > self.bytes_max:
            largest = max(self._kept.values(), key=lambda kept: kept.nbytes)
            before = largest.nbytes
            largest.pop_oldest()
            self._bytes += largest.nbytes - before

    def drop(self, instance: int) -> None:
        """An instance is gone, and its answers with it."""
        kept = self._kept.pop(instance, None)
        if kept is not None:
            self._bytes -= kept.nbytes

    def clear(self) -> None:
        """Memory is short."""
        self._kept.clear()
        self._bytes = 0

    def snapshot(self, instance: int | None = None) -> dict[str, int]:
        """How much is kept, of one instance or of all."""
        found = [kept for key, kept in self._kept.items() if instance is None or key == instance]
        return {
            "entries": sum(len(kept.answers) for kept in found),
            "bytes": sum(kept.nbytes for kept in found),
        }
