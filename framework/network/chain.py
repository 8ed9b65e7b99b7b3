"""A recorded network as a chain of items, with one tensor alive between some of them, or two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from framework.network import glue
from framework.network.glue import Calls
from framework.network.records import Node, Trace
from framework.network.values import Own, Value, leaves

#: a step of a segment: a child of the network by its dotted name, or what stands between children
Step = str | Calls
Alive = tuple[Value, ...]


@dataclass(eq=False)
class Chain:
    """Items in order: calls that depend on the images, where a module with calls inside may be one item.

    Attributes:
        network: whose modules these are.
        trace: where they are from.
        items: the calls.
        makers: what made each tensor that does not depend on the images.
        limit: how many tensors may pass from one segment to the next.
        between: ``between[i]`` are the tensors alive after item i - 1; ``None`` if there are more than ``limit``. The
            first is the input, the last the output.
    """

    network: nn.Module
    trace: Trace
    items: list[Node]
    makers: dict[int, Node]
    limit: int = 1
    between: list[Alive | None] = field(init=False)

    def __post_init__(self) -> None:
        ends = (self.trace.image,), (self.trace.output,)
        self.between = alive(self.items, *ends, self.trace.dependent, self.limit)

    def parameters(self, item: Node) -> set[int]:
        """Identities of the parameters that an item uses, by way of tensors that don't depend on the images, too."""
        found: set[int] = set()
        if item.kind == "module":
            found.update(id(p) for p in self.network.get_submodule(item.target).parameters())
        for leaf in leaves((item.args, item.kwargs)):
            if isinstance(leaf, Own):
                tensor = _attribute(self.network, leaf.name)
                found.update({id(tensor)} if isinstance(tensor, nn.Parameter) else ())
            elif isinstance(leaf, Value) and leaf.number in self.makers:
                found |= self.parameters(self.makers[leaf.number])
        return found

    def steps(self, first: int, end: int) -> tuple[Step, ...]:
        """Items ``first`` to ``end - 1``, in as many steps as there are places where a cut could be."""
        steps: list[Step] = []
        start = first
        for i in range(first, end):
            if self.between[i + 1] is not None:
                steps += self._step(start, i + 1)
                start = i + 1
        return tuple(steps)

    def _step(self, start: int, end: int) -> list[Step]:
        nodes, given, wanted = self.items[start:end], self.between[start], self.between[end]
        assert given is not None and wanted is not None
        if len(nodes) == 1 and nodes[0].kind == "module":
            node = nodes[0]
            if len(given) == 1 and node.args == given and not node.kwargs and (node.output,) == wanted:
                return [node.target]
        return [glue.build(self.trace, nodes, given, wanted, self.makers)]


def alive(
    items: Sequence[Node], given: Alive, wanted: Alive, dependent: frozenset[int], limit: int
) -> list[Alive | None]:
    """The tensors alive before each item and after the last, ``None`` where there are more than ``limit``.

    Args:
        items: calls in order.
        given: the tensors that they begin with.
        wanted: the tensors that they end with.
        dependent: tensors that depend on the images.
        limit: at least one.
    """
    last_use = {value.number: len(items) for value in wanted}
    for i, item in enumerate(items):
        for number in item.uses:
            last_use[number] = max(i, last_use.get(number, 0))
    found: list[Alive | None] = [given]
    living = {value.number for value in given}
    for i, item in enumerate(items):
        living.update(number for number in item.defines if number in dependent)
        living = {number for number in living if last_use.get(number, -1) > i}
        found.append(tuple(map(Value, sorted(living))) if 1 <= len(living) <= limit else None)
    return found


def _attribute(network: nn.Module, name: str) -> object:
    path, _, last = name.rpartition(".")
    return getattr(network.get_submodule(path), last)
