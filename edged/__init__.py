"""edged: models from a folder, answers over ZeroMQ.

`from edged import Client, AsyncClient, InferenceSession` and the error classes. What is named is imported
when it is first used: `import edged` itself costs nothing, since the daemon imports this package too and
must not carry numpy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from edged.version import __version__

if TYPE_CHECKING:
    from edged.arrays import RawTensor
    from edged.asyncclient import AsyncClient
    from edged.client import Client, InferResult, PendingResult
    from edged.errors import (
        AlreadyExists,
        Cancelled,
        Code,
        DeadlineExceeded,
        EdgedError,
        FailedPrecondition,
        Internal,
        InvalidArgument,
        NotFound,
        PermissionDenied,
        ResourceExhausted,
        Unavailable,
        Unimplemented,
    )
    from edged.lease import Lease
    from edged.session import InferenceSession

__all__ = [
    "AlreadyExists",
    "AsyncClient",
    "Cancelled",
    "Client",
    "Code",
    "DeadlineExceeded",
    "EdgedError",
    "FailedPrecondition",
    "InferResult",
    "InferenceSession",
    "Internal",
    "InvalidArgument",
    "Lease",
    "NotFound",
    "PendingResult",
    "PermissionDenied",
    "RawTensor",
    "ResourceExhausted",
    "Unavailable",
    "Unimplemented",
    "__version__",
]

_ELSEWHERE = {
    "AsyncClient": "edged.asyncclient",
    "Client": "edged.client",
    "InferResult": "edged.client",
    "InferenceSession": "edged.session",
    "Lease": "edged.lease",
    "PendingResult": "edged.client",
    "RawTensor": "edged.arrays",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'edged' has no attribute {name!r}")
    value = getattr(importlib.import_module(_ELSEWHERE.get(name, "edged.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
