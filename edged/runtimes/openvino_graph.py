"""An OpenVINO model as a graph that can be reasoned about, in the form of `onnx_graph`.

Its operators keep their own names and attributes and have the domain ``openvino``; tensors are named by their
operator's number and port. Constants are initializers, whose values are kept where they are small.
Takes a model that OpenVINO has read; imports nothing of it. Runs on Python 3.10 too.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edged.runtimes.onnx_graph import VALUES_MAX, Constant, Graph, Node, ValueInfo

__all__ = ["DATATYPES", "DOMAIN", "graph_of"]

DOMAIN = "openvino"

DATATYPES = {
    "boolean": "BOOL",
    "i8": "INT8",
    "i16": "INT16",
    "i32": "INT32",
    "i64": "INT64",
    "u8": "UINT8",
    "u16": "UINT16",
    "u32": "UINT32",
    "u64": "UINT64",
    "f16": "FP16",
    "f32": "FP32",
    "f64": "FP64",
    "bf16": "BF16",
}


def graph_of(model: Any) -> Graph:
    """The graph of an `openvino.Model`; a model with a state has its operators (ReadValue, Assign) in it.

    Raises ValueError for subgraphs (If, Loop, TensorIterator), which are not followed.
    """
    nodes: list[Node] = []
    initializers: dict[str, Constant] = {}
    inputs: list[ValueInfo] = []
    outputs: list[ValueInfo] = []
    numbers: dict[str, int] = {}

    def name_of(port: Any) -> str:
        return f"{numbers[port.get_node().get_name()]}:{port.get_index()}"

    for number, op in enumerate(model.get_ordered_ops()):
        numbers[op.get_name()] = number
        kind = op.get_type_name()
        if kind == "Constant":
            initializers[f"{number}:0"] = _constant(op)
        elif kind == "Parameter":
            names = sorted(op.output(0).get_names())
            friendly = op.get_friendly_name()
            name = friendly if friendly in names or not names else names[0]
            inputs.append(_declared(str(name), op.output(0)))
            # Its readers know it by number: an Identity gives it that name.
            nodes.append(Node("Identity", DOMAIN, str(name), (str(name),), (f"{number}:0",), {}))
        elif kind == "Result":
            port = op.input_value(0)
            outputs.append(_declared(name_of(port), port))
        else:
            if kind in ("If", "Loop", "TensorIterator"):
                raise ValueError(f"{kind} '{op.get_friendly_name()}' has a graph of its own")
            nodes.append(
                Node(
                    op=kind,
                    domain=DOMAIN,
                    name=op.get_friendly_name(),
                    inputs=tuple(name_of(op.input_value(at)) for at in range(op.get_input_size())),
                    outputs=tuple(
                        f"{number}:{at}" if op.output(at).get_target_inputs() else ""
                        for at in range(op.get_output_size())
                    ),
                    attributes={str(k): _attribute(v) for k, v in op.get_attributes().items()},
                )
            )
    return Graph(tuple(nodes), initializers, tuple(inputs), tuple(outputs), {DOMAIN: 1})


def _attribute(value: Any) -> Any:
    """Numbers and texts as they are, lists as tuples; what is neither as its text."""
    if isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple, np.ndarray)):
        return tuple(each.item() if isinstance(each, np.generic) else each for each in value)
    return str(value)


def _constant(op: Any) -> Constant:
    datatype = DATATYPES.get(op.get_element_type().get_type_name(), "")
    shape = tuple(int(size) for size in op.get_output_shape(0))
    values = None
    if datatype not in ("", "BF16") and int(np.prod(shape, dtype=np.int64)) <= VALUES_MAX:
        values = np.array(op.get_data()).reshape(shape)
    return Constant(datatype, shape, values)


def _declared(name: str, port: Any) -> ValueInfo:
    shape = port.get_partial_shape()
    datatype = DATATYPES.get(port.get_element_type().get_type_name(), "")
    if shape.rank.is_dynamic:
        return ValueInfo(name, "tensor", datatype)
    return ValueInfo(
        name, "tensor", datatype, tuple(None if d.is_dynamic else int(d.get_length()) for d in shape)
    )
