"""The closed set of errors that edged can answer.

One exception class for each code of the protocol. The same classes are raised by the daemon's own
code, travel over the wire as `{code, message, reason, retry_after_ms}`, and are raised again in the
client, so an app catches exactly what the daemon meant. Codes are the gRPC status names that the Open
Inference Protocol's implementations use; nothing outside this module may invent one.

Runs on Python 3.10 too: the worker's side may use a vendor's interpreter.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any, ClassVar

__all__ = [
    "AlreadyExists",
    "Cancelled",
    "Code",
    "DeadlineExceeded",
    "EdgedError",
    "FailedPrecondition",
    "Internal",
    "InvalidArgument",
    "NotFound",
    "PermissionDenied",
    "ResourceExhausted",
    "Unavailable",
    "Unimplemented",
    "error_from_wire",
    "make_error",
]


class Code(str, enum.Enum):
    """gRPC status names; the set is closed."""

    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    NOT_FOUND = "NOT_FOUND"
    ALREADY_EXISTS = "ALREADY_EXISTS"
    FAILED_PRECONDITION = "FAILED_PRECONDITION"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    RESOURCE_EXHAUSTED = "RESOURCE_EXHAUSTED"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    UNAVAILABLE = "UNAVAILABLE"
    CANCELLED = "CANCELLED"
    UNIMPLEMENTED = "UNIMPLEMENTED"
    INTERNAL = "INTERNAL"


class EdgedError(Exception):
    """Base of every error that edged answers.

    `message` says what happened, where and what to do. `reason` is a stable SCREAMING_SNAKE identifier
    for programs. `retry_after_ms`, where given, is when it makes sense to ask again.
    """

    code: ClassVar[Code] = Code.INTERNAL

    def __init__(self, message: str, *, reason: str | None = None, retry_after_ms: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason
        self.retry_after_ms = retry_after_ms

    def __str__(self) -> str:
        return f"{self.message} [{self.code.value}{'/' + self.reason if self.reason else ''}]"

    def to_wire(self) -> dict[str, Any]:
        """The protocol's error map; absent fields are left out."""
        wire: dict[str, Any] = {"code": self.code.value, "message": self.message}
        if self.reason is not None:
            wire["reason"] = self.reason
        if self.retry_after_ms is not None:
            wire["retry_after_ms"] = self.retry_after_ms
        return wire


class InvalidArgument(EdgedError):
    """The request itself is wrong; sending it again cannot help."""

    code = Code.INVALID_ARGUMENT


class NotFound(EdgedError):
    """No such model, version, method or region."""

    code = Code.NOT_FOUND


class AlreadyExists(EdgedError):
    """The request's id is already in flight on this connection."""

    code = Code.ALREADY_EXISTS


class FailedPrecondition(EdgedError):
    """The system is not in the state that the call needs."""

    code = Code.FAILED_PRECONDITION


class PermissionDenied(EdgedError):
    """The peer may not do this."""

    code = Code.PERMISSION_DENIED


class ResourceExhausted(EdgedError):
    """A bound was reached: a queue, a quota, memory."""

    code = Code.RESOURCE_EXHAUSTED


class DeadlineExceeded(EdgedError):
    """The request's time ran out, or cannot suffice."""

    code = Code.DEADLINE_EXCEEDED


class Unavailable(EdgedError):
    """Not now: loading, failed, stopping, or the daemon is not there."""

    code = Code.UNAVAILABLE


class Cancelled(EdgedError):
    """The client withdrew the request."""

    code = Code.CANCELLED


class Unimplemented(EdgedError):
    """The method, version or feature is not one that this daemon has."""

    code = Code.UNIMPLEMENTED


class Internal(EdgedError):
    """A fault of edged or of the runtime, never of the request."""

    code = Code.INTERNAL


_BY_CODE: dict[str, type[EdgedError]] = {
    cls.code.value: cls
    for cls in (
        InvalidArgument,
        NotFound,
        AlreadyExists,
        FailedPrecondition,
        PermissionDenied,
        ResourceExhausted,
        DeadlineExceeded,
        Unavailable,
        Cancelled,
        Unimplemented,
        Internal,
    )
}


def make_error(
    code: str, message: str, *, reason: str | None = None, retry_after_ms: int | None = None
) -> EdgedError:
    """The exception for a code's name; an unknown code becomes `Internal`, named in the message."""
    cls = _BY_CODE.get(code)
    if cls is None:
        return Internal(f"{message} (unknown code {code!r})", reason=reason, retry_after_ms=retry_after_ms)
    return cls(message, reason=reason, retry_after_ms=retry_after_ms)


def error_from_wire(wire: Mapping[str, Any]) -> EdgedError:
    """The exception for a reply's `error` map."""
    retry = wire.get("retry_after_ms")
    reason = wire.get("reason")
    return make_error(
        str(wire.get("code", "INTERNAL")),
        str(wire.get("message", "")),
        reason=None if reason is None else str(reason),
        retry_after_ms=retry if isinstance(retry, int) else None,
    )
