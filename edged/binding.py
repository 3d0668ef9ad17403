"""IOBinding and OrtValue, as ONNX Runtime's session hands them out, over arrays in this process's memory.

An app that binds its inputs and outputs once and runs again and again works as it is. What ONNX Runtime
gains by it, no copy, it does not gain here: the model runs in another process. `Client.lease` is for that.
Memory of a device cannot be bound, since the device is the daemon's; an output bound to one arrives in the
CPU's.

Owns what is bound, and never asks the daemon: the session runs it.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from edged.arrays import DTYPES, Array, datatype_of
from edged.errors import InvalidArgument, Unimplemented

__all__ = ["ONNX_TYPES", "IOBinding", "OrtValue", "array_of"]

ONNX_TYPES: dict[str, tuple[str, int]] = {
    "BOOL": ("tensor(bool)", 9),
    "INT8": ("tensor(int8)", 3),
    "INT16": ("tensor(int16)", 5),
    "INT32": ("tensor(int32)", 6),
    "INT64": ("tensor(int64)", 7),
    "UINT8": ("tensor(uint8)", 2),
    "UINT16": ("tensor(uint16)", 4),
    "UINT32": ("tensor(uint32)", 12),
    "UINT64": ("tensor(uint64)", 13),
    "FP16": ("tensor(float16)", 10),
    "FP32": ("tensor(float)", 1),
    "FP64": ("tensor(double)", 11),
    "BF16": ("tensor(bfloat16)", 16),
    "BYTES": ("tensor(string)", 8),
}
"""Each datatype as ONNX Runtime writes it, and its number in ONNX's TensorProto.DataType."""

_NUMPY_OF_ONNX = {number: DTYPES[kind] for kind, (_, number) in ONNX_TYPES.items() if kind in DTYPES}


class OrtValue:
    """One value in the CPU's memory: an array, or for an ONNX sequence or map a list or dict.

    What was made from an array shares its memory, as ONNX Runtime's does.
    """

    def __init__(self, value: Any) -> None:
        self._value = value

    @staticmethod
    def ortvalue_from_numpy(
        numpy_obj: Array, device_type: str = "cpu", device_id: int = 0, vendor_id: Any = -1
    ) -> OrtValue:
        """A value over an array's memory. Raises Unimplemented for another device than the CPU."""
        _check_cpu(device_type)
        return OrtValue(np.asarray(numpy_obj))

    @staticmethod
    def ortvalue_from_shape_and_type(
        shape: Sequence[int],
        element_type: Any,
        device_type: str = "cpu",
        device_id: int = 0,
        vendor_id: Any = -1,
    ) -> OrtValue:
        """An array of that shape and type, to be filled. Raises Unimplemented as `ortvalue_from_numpy`."""
        _check_cpu(device_type)
        return OrtValue(np.zeros(tuple(shape), _dtype(element_type)))

    def numpy(self) -> Array:
        """The array. Raises InvalidArgument for a value that is none."""
        if not isinstance(self._value, np.ndarray):
            raise InvalidArgument(
                f"this OrtValue holds a {type(self._value).__name__} and no tensor; run() gives it as it is",
                reason="NOT_A_TENSOR",
            )
        return self._value

    def shape(self) -> list[int]:
        """Its dimensions."""
        return list(self.numpy().shape)

    def data_type(self) -> str:
        """As ONNX Runtime writes it: `tensor(float)`."""
        return ONNX_TYPES[datatype_of(self.numpy().dtype)][0]

    def element_type(self) -> int:
        """The number in ONNX's TensorProto.DataType."""
        return ONNX_TYPES[datatype_of(self.numpy().dtype)][1]

    def device_name(self) -> str:
        """`cpu`: where the value lies, whatever computed it."""
        return "cpu"

    def data_ptr(self) -> int:
        """The address of the first element."""
        return int(self.numpy().ctypes.data)

    def tensor_size_in_bytes(self) -> int:
        """Of all elements together."""
        return int(self.numpy().nbytes)

    def has_value(self) -> bool:
        """Whether there is one: an absent optional has none."""
        return self._value is not None

    def is_tensor(self) -> bool:
        """Whether it is an array."""
        return isinstance(self._value, np.ndarray)

    def is_tensor_sequence(self) -> bool:
        """Whether it is a list."""
        return isinstance(self._value, list)

    def is_sparse_tensor(self) -> bool:
        """False: the protocol has none."""
        return False

    def update_inplace(self, data: Array) -> None:
        """Copies an array of the same shape and type over its elements."""
        _put("this OrtValue", self.numpy(), np.asarray(data))


class IOBinding:
    """What a session's inputs and outputs are bound to, from `InferenceSession.io_binding`.

    Inputs are read when the session runs, not when they are bound. An output that is bound to memory must
    have its shape and type in every run.
    """

    def __init__(self, session: object) -> None:
        self.session = session
        self.inputs: dict[str, Any] = {}
        self.outputs: dict[str, Array | None] = {}
        """Where each output that is wanted goes; None is a new array for each run."""
        self._results: list[Any] = []

    def bind_cpu_input(self, name: str, arr_on_cpu: Any) -> None:
        """Binds an input to an array, or to a list."""
        self.inputs[name] = arr_on_cpu

    def bind_input(
        self,
        name: str,
        device_type: str,
        device_id: int,
        element_type: Any,
        shape: Sequence[int],
        buffer_ptr: int,
    ) -> None:
        """Binds an input to memory at an address, which the app keeps alive. Raises Unimplemented for a
        device's."""
        self.inputs[name] = _array_at(device_type, element_type, shape, buffer_ptr)

    def bind_ortvalue_input(self, name: str, ortvalue: Any) -> None:
        """Binds an input to an OrtValue, ours or ONNX Runtime's."""
        self.inputs[name] = ortvalue

    def bind_output(
        self,
        name: str,
        device_type: str = "cpu",
        device_id: int = 0,
        element_type: Any = None,
        shape: Sequence[int] | None = None,
        buffer_ptr: int | None = None,
    ) -> None:
        """Asks for an output, in memory at `buffer_ptr` if that is given, else in new memory of the CPU's."""
        if buffer_ptr is None:
            self.outputs[name] = None
        else:
            self.outputs[name] = _array_at(device_type, element_type, shape or (), buffer_ptr)

    def bind_ortvalue_output(self, name: str, ortvalue: Any) -> None:
        """Asks for an output in an OrtValue's memory, ours or ONNX Runtime's on the CPU."""
        _check_cpu(str(ortvalue.device_name()))
        if isinstance(ortvalue, OrtValue):
            self.outputs[name] = ortvalue.numpy()
        else:  # ONNX Runtime's own numpy() would be a copy.
            self.outputs[name] = _array_at(
                "cpu", ortvalue.element_type(), ortvalue.shape(), ortvalue.data_ptr()
            )

    def synchronize_inputs(self) -> None:
        """Nothing: what is bound lies in the CPU's memory."""

    def synchronize_outputs(self) -> None:
        """Nothing: outputs are there when the run has returned."""

    def get_outputs(self) -> list[OrtValue]:
        """The last run's outputs in the order in which they were bound."""
        return [OrtValue(value) for value in self._results]

    def get_outputs_as_ortvaluevector(self) -> Any:
        """Not here. Raises Unimplemented."""
        raise Unimplemented(
            "an OrtValueVector is memory of ONNX Runtime's own; get_outputs has the same values",
            reason="NOT_IN_A_SESSION",
        )

    def copy_outputs_to_cpu(self) -> list[Any]:
        """The last run's outputs as `run` gives them."""
        return [np.array(value) if isinstance(value, np.ndarray) else value for value in self._results]

    def clear_binding_inputs(self) -> None:
        """Forgets the inputs."""
        self.inputs.clear()

    def clear_binding_outputs(self) -> None:
        """Forgets the outputs, the last run's values among them."""
        self.outputs.clear()
        self._results = []

    def take(self, results: Sequence[Any]) -> None:
        """Puts a run's outputs, in the order in which they are bound, where they are to be."""
        placed: list[Any] = []
        for (name, where), value in zip(self.outputs.items(), results, strict=True):
            if where is None:
                placed.append(value)
            else:
                _put(f"output '{name}'", where, value)
                placed.append(where)
        self._results = placed


def array_of(value: Any) -> Any:
    """The array in an OrtValue, ours or ONNX Runtime's; anything else as it is."""
    return value.numpy() if hasattr(value, "is_tensor_sequence") else value


def _put(what: str, where: Array, value: Any) -> None:
    if not isinstance(value, np.ndarray) or (where.shape, where.dtype) != (value.shape, value.dtype):
        got = f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__
        raise InvalidArgument(
            f"{what} is bound to memory for {where.dtype} {list(where.shape)} and is {got}; bind it without "
            "memory of your own where its shape is not known before",
            reason="OUTPUT_DOES_NOT_FIT",
        )
    np.copyto(where, value)


def _array_at(device_type: str, element_type: Any, shape: Sequence[int], address: int) -> Array:
    _check_cpu(device_type)
    dtype = _dtype(element_type)
    nbytes = math.prod(shape) * dtype.itemsize
    memory = (ctypes.c_char * nbytes).from_address(address)
    return np.ndarray(tuple(shape), dtype, memoryview(memory))


def _dtype(element_type: Any) -> np.dtype[Any]:
    """Of one of numpy's types or ONNX's numbers; of those that have memory which can be shared."""
    dtype: np.dtype[Any] | None = None
    if isinstance(element_type, int):
        dtype = _NUMPY_OF_ONNX.get(element_type)
    elif element_type is not None:  # numpy would take None for float64
        with contextlib.suppress(TypeError):
            dtype = np.dtype(element_type)
    if dtype is None or dtype not in _NUMPY_OF_ONNX.values():
        raise InvalidArgument(
            f"no memory of element type {element_type!r} can be bound here; bind an array",
            reason="BAD_DATATYPE",
        )
    return dtype


def _check_cpu(device_type: str) -> None:
    if device_type.lower() != "cpu":
        raise Unimplemented(
            f"memory of {device_type!r} cannot be bound: the model runs in the daemon, on a device of its "
            "choice; bind the CPU's, or take a lease (Client.lease) to save the copies",
            reason="DEVICE_MEMORY",
        )
