"""The seam between the worker and what runs a model.

A runtime is one module with a class that has the shape of `Runtime`: it loads a model file onto a device and
gives back a `Model` that runs arrays. Nothing here imports a runtime. What a runtime may never do: answer
from another device than it says, change precision without being asked, touch the network, or write outside
the cache directory that it was given. `edged.testing.check_runtime` is the test of that.

Runs on Python 3.10 too.
"""

from __future__ import annotations

import mmap
import os
import re
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

from edged import arrays
from edged.errors import Code
from edged.runtimes.onnx_graph import Graph
from edged.tensors import TensorSpec

__all__ = [
    "DTYPES",
    "MODULES",
    "TELEMETRY_OFF",
    "LoadCancel",
    "LoadFailed",
    "LoadRequest",
    "Model",
    "RunFailed",
    "Runtime",
    "clean_text",
    "create_runtime",
    "refuse_dangerous_onnx",
    "silence_telemetry",
]

MODULES = {
    "onnxruntime": "edged.runtimes.onnxruntime",
    "openvino": "edged.runtimes.openvino",
    "fake": "edged.testing",
}
"""Where each runtime's `create()` lives. A new accelerator runtime is one more row."""

TELEMETRY_OFF = {"ORT_DISABLE_TELEMETRY": "1"}
"""Environment that must stand before a runtime is imported: nothing here phones home."""

DTYPES: dict[str, np.dtype[Any]] = {**arrays.DTYPES, "BF16": np.dtype("<u2")}
"""How each datatype's raw bytes are seen as an array; BF16, which numpy lacks, as its bit patterns."""

TEXT_CHARS_MAX = 500
"""Of a runtime's message; ONNX Runtime's can hold a whole graph."""


class LoadFailed(Exception):
    """A model cannot be served: `reason` for programs, the text for people."""

    def __init__(self, reason: str, message: str, *, code: Code = Code.FAILED_PRECONDITION) -> None:
        super().__init__(message)
        self.code = code.value
        self.reason = reason
        self.message = message


class RunFailed(Exception):
    """A run gave no answer. `fatal`: the process is poisoned and must end."""

    def __init__(self, code: Code, reason: str, message: str, *, fatal: bool = False) -> None:
        super().__init__(message)
        self.code = code.value
        self.reason = reason
        self.message = message
        self.fatal = fatal


@dataclass(frozen=True)
class LoadRequest:
    """What to load, where and how; the control channel's `load` map as a value."""

    path: str
    format: str = "onnx"
    device: str = "CPU"
    precision: str = "f32"
    threads: int = 1
    instances: int = 1
    cache_dir: str | None = None
    content: str = ""
    """The hash of all that belongs to the model; while it is empty nothing is kept in the cache."""


@dataclass
class LoadCancel:
    """Lets another thread end a load: a runtime that can be interrupted registers how."""

    requested: threading.Event = field(default_factory=threading.Event)
    hook: Any = None

    def cancel(self) -> None:
        """Asks the load to end; safe from any thread, and more than once."""
        self.requested.set()
        hook = self.hook
        if hook is not None:
            hook()

    def on_cancel(self, hook: Any) -> None:
        """Registers what interrupts the load; called at once when that was asked for already."""
        self.hook = hook
        if self.requested.is_set() and hook is not None:
            hook()

    def check(self) -> None:
        """Raises LoadFailed when the load was withdrawn."""
        if self.requested.is_set():
            raise LoadFailed("LOAD_CANCELLED", "the load was cancelled", code=Code.CANCELLED)


class Model(Protocol):
    """A model on a device. As many threads run it as it has instances; `cancel`, `shrink` are another's."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    metadata: dict[str, str]
    device: str
    precision: str
    threads: int
    instances: int
    """How many runs it executes at once, each with `threads`."""
    fallback_reason: str | None

    def run(
        self, feeds: Mapping[str, Any], output_names: Sequence[str], run: int = 0, *, borrowed: bool = False
    ) -> list[Any]:
        """Runs once, known to `cancel` as `run`. Arrays as in `DTYPES`, BYTES as object arrays of bytes.

        With `borrowed` the memory under the inputs is not the worker's: nothing of it is kept afterwards.

        Returns one value per name: an array in native byte order (BF16 as uint16, strings as an object
        array of str or bytes), a list, a dict, or None. The values stay true after the next run.
        Raises RunFailed.
        """
        ...

    def cancel(self, run: int = 0) -> None:
        """Ends this run, if it is going on: it raises RunFailed with CANCELLED."""
        ...

    def shrink(self) -> None:
        """Gives back at the next run what memory can be given back."""
        ...

    def close(self) -> None:
        """Lets go of the model."""
        ...


class Runtime(Protocol):
    """One inference library, imported."""

    name: str
    version: str

    def load(self, request: LoadRequest, cancel: LoadCancel) -> Model:
        """Loads a model onto exactly the device asked for. Raises LoadFailed."""
        ...

    def graph(self, request: LoadRequest) -> Graph:
        """What the model's file says it does. Raises ValueError where that cannot be read."""
        ...

    def full_name(self, device: str) -> str:
        """What the device calls itself, for people; empty when it does not say."""
        ...

    def precision_fast(self, device: str) -> str:
        """What `precision = "fast"` would use there: `bf16`, `f16`, `tf32`, or empty for no difference."""
        ...


def silence_telemetry() -> None:
    """Stops both runtimes from phoning home; before either is imported, in every process."""
    os.environ.update(TELEMETRY_OFF)
    # OpenVINO takes its bundled stub when the telemetry package cannot be had.
    sys.modules.setdefault("openvino_telemetry", cast(Any, None))


def create_runtime(name: str) -> Runtime:
    """Imports a runtime. Raises ImportError when it is not installed, KeyError for an unknown name."""
    silence_telemetry()
    return cast(Runtime, import_module(MODULES[name]).create())


_PATH = re.compile(r"(?<![\w.])(?:/[^\s/'\":,;()\[\]<>]+)+/([^\s/'\":,;()\[\]<>]*)")
_ADDRESS = re.compile(r"\b0x[0-9a-fA-F]{4,}\b")


def clean_text(error: BaseException | str) -> str:
    """A library's message for a stranger's eyes: one line, no directories, no addresses, bounded."""
    text = str(error) or type(error).__name__
    text = _ADDRESS.sub("0x…", _PATH.sub(r"\1", text))
    text = " ".join(text.split())
    return text if len(text) <= TEXT_CHARS_MAX else text[: TEXT_CHARS_MAX - 1] + "…"


_EP_CONTEXT_NODE = b"\x22\x09EPContext"
"""NodeProto.op_type (field 4, 9 bytes long) of a node that carries a device's compiled code."""

_MEMORY_ADDRESS = b"_ORT_MEM_ADDR_"
"""External data "at a memory address": meant for use inside one process, in a file it is an attack."""


def refuse_dangerous_onnx(path: str) -> None:
    """Raises LoadFailed for what an ONNX file must not hold, found in its bytes without parsing them.

    Unsigned native code in an EPContext node, and external data that names a memory address: the first
    would run, the second ends OpenVINO with SIGSEGV.
    """
    try:
        size_bytes = os.path.getsize(path)
    except OSError as e:
        message = f"the model file cannot be read: {e.strerror}"
        raise LoadFailed("MODEL_INVALID", message, code=Code.NOT_FOUND) from None
    if size_bytes == 0:
        raise LoadFailed("MODEL_INVALID", "the model file is empty", code=Code.INVALID_ARGUMENT)
    with Path(path).open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data.find(_EP_CONTEXT_NODE) >= 0:
            raise LoadFailed(
                "MODEL_INVALID",
                "the model holds an EPContext node, compiled code for one device, which is not run; "
                "export the model without it",
                code=Code.INVALID_ARGUMENT,
            )
        if data.find(_MEMORY_ADDRESS) >= 0:
            raise LoadFailed(
                "MODEL_INVALID",
                "the model says that its weights lie at a memory address; save them in it or beside it",
                code=Code.INVALID_ARGUMENT,
            )
