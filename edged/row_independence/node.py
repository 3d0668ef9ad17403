"""One operator at work, as its rule sees it. Runs on Python 3.10 too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from edged.row_independence.sizes import Names, Size
from edged.row_independence.values import Mixes, Value
from edged.runtimes.onnx_graph import Constant, Node

__all__ = ["At", "Rule"]


@dataclass(frozen=True)
class At:
    """A node with what is known of its inputs."""

    node: Node
    inputs: Sequence[Value | None]
    opset: int
    """The version of the operators of its domain."""
    names: Names
    limits: dict[str, int]
    """By input of the model, how many entries the tables have that it indexes: found along the way."""

    def attribute(self, name: str, absent: Any) -> Any:
        """An attribute's value. Raises Mixes for one of another type than the rule can read."""
        value = self.node.attributes.get(name)
        if value is None:
            return absent
        if absent is not None and type(value) is not type(absent):
            raise Mixes(f"has an attribute {name} of an unknown type")
        return value

    def integer(self, name: str, absent: int) -> int:
        """An attribute that is a whole number."""
        return int(self.attribute(name, absent))

    def integers(self, name: str) -> tuple[int, ...] | None:
        """An attribute that is a list of whole numbers; None where it is left out."""
        value = self.attribute(name, None)
        if value is None:
            return None
        if not isinstance(value, tuple) or not all(type(each) is int for each in value):
            raise Mixes(f"has an attribute {name} of an unknown type")
        return value

    def constant(self, name: str) -> Constant | None:
        """An attribute that is a tensor."""
        value = self.node.attributes.get(name)
        return value if isinstance(value, Constant) else None

    def get(self, at: int) -> Value | None:
        """An input, None where it is left out."""
        return self.inputs[at] if at < len(self.inputs) else None

    def need(self, at: int) -> Value:
        """An input that must be there."""
        value = self.get(at)
        if value is None:
            raise Mixes("misses an input")
        return value

    @property
    def given(self) -> list[Value]:
        """The inputs that are there."""
        return [value for value in self.inputs if value is not None]

    def fresh(self, count: int) -> list[Size]:
        """So many dimensions of which nothing is known."""
        return [self.names.fresh() for _ in range(count)]


Rule = Callable[[At], Sequence[Value]]
"""Gives what is known of a node's outputs, in order; raises Mixes where the rows do not stay apart."""
