"""InferenceSession: stands in for onnxruntime.InferenceSession, so that an app moves over by one line.

    from edged import InferenceSession          # instead of: from onnxruntime import InferenceSession
    session = InferenceSession("digits.onnx")   # the model called `digits` in the daemon's folder

The daemon has the model; nothing is loaded here, and the device is the daemon's choice. What ONNX Runtime
would raise as its own exceptions are edged's typed errors here. IO binding, OrtValues and profiling have no
counterpart.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from types import TracebackType
from typing import Any

import numpy as np

from edged.client import Client, InferResult
from edged.errors import InvalidArgument, ResourceExhausted
from edged.properties import parted

__all__ = ["InferenceSession", "ModelMeta", "NodeArg", "model_of"]

_TYPES = {
    "BOOL": "tensor(bool)",
    "INT8": "tensor(int8)",
    "INT16": "tensor(int16)",
    "INT32": "tensor(int32)",
    "INT64": "tensor(int64)",
    "UINT8": "tensor(uint8)",
    "UINT16": "tensor(uint16)",
    "UINT32": "tensor(uint32)",
    "UINT64": "tensor(uint64)",
    "FP16": "tensor(float16)",
    "FP32": "tensor(float)",
    "FP64": "tensor(double)",
    "BF16": "tensor(bfloat16)",
    "BYTES": "tensor(string)",
    # The protocol does not say what these hold.
    "SEQUENCE": "seq(unknown)",
    "MAP": "map(unknown)",
    "OPTIONAL": "optional(unknown)",
}

_MODEL_SUFFIXES = {".onnx", ".ort", ".xml"}


@dataclass(frozen=True)
class NodeArg:
    """An input or output as ONNX Runtime describes it.

    `shape` has an int for a fixed dimension, its name (or None) for a free one; it is empty for a free rank.
    `type` is ONNX's, as in `tensor(float)`.
    """

    name: str
    shape: list[int | str | None]
    type: str


@dataclass(frozen=True)
class ModelMeta:
    """The model's own metadata, by ONNX Runtime's names; `version` is 0 where the model has none."""

    producer_name: str = ""
    graph_name: str = ""
    domain: str = ""
    description: str = ""
    graph_description: str = ""
    version: int = 0
    custom_metadata_map: dict[str, str] = field(default_factory=dict)


class InferenceSession:
    """A model that the daemon serves, used as ONNX Runtime's session is.

    `path_or_name` is the model's name, or a path in the folder's forms: `NAME.onnx`, `NAME/model.onnx`,
    `NAME/3/model.onnx` (which asks for version 3). `sess_options`, `providers`, `provider_options` and any
    other argument of ONNX Runtime's are taken and ignored: threads, device and precision are settings of the
    daemon's. `endpoint` and `timeout` (seconds for each call) are Client's; `version` asks for one version.

    May be used by any number of threads. Raises NotFound for a model that the daemon does not have, and
    Unavailable when it does not serve now, or no daemon is there.
    """

    def __init__(
        self,
        path_or_name: str | os.PathLike[str],
        sess_options: object = None,
        providers: Sequence[Any] | None = None,
        provider_options: Sequence[Any] | None = None,
        *,
        endpoint: str | None = None,
        timeout: float = 30.0,
        version: str | int | None = None,
        **_ignored: object,
    ) -> None:
        self._name, found_version = model_of(path_or_name)
        self._version = version if version is not None else found_version
        self._client = Client(endpoint, timeout=timeout)
        try:
            metadata = self._metadata()
        except BaseException:
            self._client.close()
            raise
        specs = metadata["inputs"]
        self._inputs = [_node_arg(spec) for spec in specs if not spec.get("optional")]
        self._optional_inputs = [_node_arg(spec) for spec in specs if spec.get("optional")]
        self._outputs = [_node_arg(spec) for spec in metadata["outputs"]]
        self._strings = {spec["name"] for spec in metadata["outputs"] if spec["datatype"] == "BYTES"}
        self._properties: dict[str, str] = dict(metadata.get("properties") or {})
        self._last_result: InferResult | None = None

    def _metadata(self) -> dict[str, Any]:
        """Inputs and outputs, and what the model says of itself, all of the same version."""
        self._too_large: ResourceExhausted | None = None
        try:
            return self._client.model_metadata(self._name, self._version)
        except ResourceExhausted as e:
            if e.reason != "METADATA_TOO_LARGE":
                raise
            self._too_large = e
            return self._client.model_metadata(self._name, self._version, properties=False)

    def run(
        self,
        output_names: Sequence[str] | None,
        input_feed: Mapping[str, Any],
        run_options: object = None,
    ) -> list[Any]:
        """Runs the model; the outputs named, or all for None, in order, as numpy arrays, lists and dicts.

        Raises ValueError, as ONNX Runtime does, when a required input is missing; edged's typed errors for
        everything that the daemon refuses. `run_options` is ignored.
        """
        missing = [arg.name for arg in self._inputs if arg.name not in input_feed]
        if missing:
            raise ValueError(f"Required inputs ({missing}) are missing from input feed ({list(input_feed)}).")
        names = list(output_names) if output_names else None
        result = self._client.infer(self._name, input_feed, version=self._version, outputs=names)
        self._last_result = result
        return [
            _as_strings(result[name]) if name in self._strings else result[name] for name in names or result
        ]

    def get_inputs(self) -> list[NodeArg]:
        """The inputs that must be given."""
        return list(self._inputs)

    def get_outputs(self) -> list[NodeArg]:
        """The outputs, in the order in which `run` returns them."""
        return list(self._outputs)

    def get_overridable_initializers(self) -> list[NodeArg]:
        """The inputs that may be left out."""
        return list(self._optional_inputs)

    def get_modelmeta(self) -> ModelMeta:
        """The model's own metadata. Raises ResourceExhausted where it is more than the daemon tells."""
        if self._too_large is not None:
            raise self._too_large
        fields, own = parted(self._properties)
        version = fields.pop("version")
        return ModelMeta(
            **fields, version=int(version) if version.isdecimal() else 0, custom_metadata_map=own
        )

    def get_providers(self) -> list[str]:
        """ONNX Runtime's name for what the last `run` really used; before the first, what is always there."""
        if self._last_result is None:
            return ["CPUExecutionProvider"]
        if self._last_result.runtime == "openvino":
            return ["OpenVINOExecutionProvider", "CPUExecutionProvider"]
        if self._last_result.device.startswith("CUDA"):
            return ["CUDAExecutionProvider", "CPUExecutionProvider"]
        return ["CPUExecutionProvider"]

    def get_provider_options(self) -> dict[str, dict[str, str]]:
        """Nothing for each provider: they are the daemon's."""
        return {provider: {} for provider in self.get_providers()}

    @property
    def last_result(self) -> InferResult | None:
        """The last run's whole answer: model version, device, runtime, timings. None before the first."""
        return self._last_result

    def close(self) -> None:
        """Ends the connection to the daemon."""
        self._client.close()

    def __enter__(self) -> InferenceSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def model_of(path_or_name: str | os.PathLike[str]) -> tuple[str, str | None]:
    """The model's name, and its version where the path holds one: the inverse of the folder's forms.

    Raises InvalidArgument for a model's bytes, which only the daemon may load.
    """
    if isinstance(path_or_name, (bytes, bytearray, memoryview)):
        raise InvalidArgument(
            "a session of edged's takes a model's name or path, not its bytes; put the file into the "
            "daemon's folder (edgectl put FILE)",
            reason="MODEL_BYTES",
        )
    path = PurePath(path_or_name)
    name = path.stem if path.suffix in _MODEL_SUFFIXES else path.name
    if path.suffix in _MODEL_SUFFIXES and name == "model" and path.parent.name:
        if path.parent.name.isdecimal() and path.parent.parent.name:
            return path.parent.parent.name, path.parent.name
        return path.parent.name, None
    return name, None


def _node_arg(spec: Mapping[str, Any]) -> NodeArg:
    names = spec.get("dim_names") or ()
    shape: list[int | str | None] = []
    for at, dim in enumerate(spec["shape"] or ()):
        shape.append(dim if dim >= 0 else names[at] if at < len(names) else None)
    return NodeArg(spec["name"], shape, _TYPES.get(spec["datatype"], spec["datatype"]))


def _as_strings(array: Any) -> Any:
    """BYTES as ONNX Runtime gives strings: an array of str objects."""
    if not isinstance(array, np.ndarray):
        return array
    texts = np.empty(array.shape, dtype=object)
    texts.ravel()[:] = [item.decode() for item in array.ravel()]
    return texts
