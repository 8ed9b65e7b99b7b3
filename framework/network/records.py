"""What was recorded of a network: its calls, and the tensors between them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from framework.network.values import Value, leaves


@dataclass(eq=False)
class Node:
    """One call.

    Attributes:
        kind: of a "module" of the network, a "function" of PyTorch's, a "method" or an "attribute" of a tensor.
        target: the module's dotted name, the function, or the name of the method or attribute.
        args: with ``Value``, ``Own`` and ``Like`` in place of tensors, types and devices.
        kwargs: likewise.
        output: likewise.
        dependent: whether the result depends on the images.
        inner: what a module called in turn, where that was recorded.
    """

    kind: str
    target: Any
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    output: Any = None
    dependent: bool = True
    inner: list[Node] = field(default_factory=list)

    @property
    def uses(self) -> list[int]:
        """Numbers of the tensors that go in."""
        return [leaf.number for leaf in leaves((self.args, self.kwargs)) if isinstance(leaf, Value)]

    @property
    def defines(self) -> list[int]:
        """Numbers of the tensors that come out."""
        return [leaf.number for leaf in leaves(self.output) if isinstance(leaf, Value)]


@dataclass(eq=False)
class Trace:
    """What a network computes.

    Attributes:
        nodes: the calls in order.
        image: the images.
        output: the result, one tensor.
        shapes: of all tensors, by number; the first is that of the batch where there is one.
        changed: tensors that a later call changed in place.
        dependent: tensors that depend on the images.
    """

    nodes: list[Node]
    image: Value
    output: Value
    shapes: Mapping[int, tuple[int, ...]]
    changed: frozenset[int]
    dependent: frozenset[int]

    def several(self) -> Iterator[str]:
        """Names of the modules that return several tensors."""
        nodes = list(self.nodes)
        while nodes:
            node = nodes.pop()
            nodes += node.inner
            if node.kind == "module" and len(node.defines) > 1:
                yield node.target
