"""A recorded network as blocks, with what stands before each: where one segment may end and the next begin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from torch import nn

from framework.network import anatomy
from framework.network.chain import Chain, Step, alive
from framework.network.layouts import ToMap, layout
from framework.network.tracing import Node, Trace, Untraceable
from framework.network.values import Value

Counts = Callable[[str, nn.Module], bool]  # whether a module of this name is a block


@dataclass(eq=False)
class Pieces:
    """Where a network can be cut.

    Attributes:
        chain: its calls.
        larger: the same calls for larger images, where the network takes them and calls the same.
    """

    chain: Chain
    larger: Trace | None

    @property
    def network(self) -> nn.Module:
        """Whose pieces these are."""
        return self.chain.network

    @cached_property
    def names(self) -> list[str]:
        """Dotted name of each item, "" where it is no module."""
        return [item.target if item.kind == "module" else "" for item in self.chain.items]

    @cached_property
    def blocks(self) -> list[int]:
        """The items that are blocks.

        Raises:
            Untraceable: there are none.
        """
        get = self.network.get_submodule
        found = [i for i, name in enumerate(self.names) if name and anatomy.is_block(name, get(name))]
        wide = [i for i in found if anatomy.is_composite(get(self.names[i]))]
        body = anatomy.body(self.network, [self.names[i] for i in wide])
        wide = [i for i in wide if self.names[i].partition(".")[0] in body]
        if wide:
            return [i for i in found if i >= wide[0]]
        lone = [
            i for i, name in enumerate(self.names) if name and self._lone(i) and anatomy.weighty(get(name))
        ]
        found = [i for i in lone if anatomy.is_composite(get(self.names[i]))] or lone
        if not found:
            raise Untraceable("no tensor passes alone between any of its modules")
        return found

    @cached_property
    def cuts(self) -> dict[str, int]:
        """Name of every block after which a segment may end -> the number of items up to there."""
        found = {}
        starts = [*self.blocks[1:], len(self.chain.items)]
        for block, following in zip(self.blocks, starts, strict=True):
            places = [p for p in range(block + 1, following + 1) if self.may_cut(p)]
            if places:
                found[self.names[block]] = places[0]
        return found

    @cached_property
    def stem(self) -> int:
        """Number of items before the first block and what may not be cut from it."""
        return max((p for p in range(1, self.blocks[0] + 1) if self.may_cut(p)), default=0)

    def may_cut(self, place: int) -> bool:
        """Whether segments may meet before the item ``place``."""
        value = self.chain.between[place]
        if value is None or value.number in self.chain.trace.changed or self.to_map(place) is None:
            return False
        return not any(first < place <= last for first, last in self._spans)

    @cached_property
    def _spans(self) -> set[tuple[int, int]]:
        """First and last item that use a parameter, for those that several use."""
        spans: dict[int, tuple[int, int]] = {}
        for i, item in enumerate(self.chain.items):
            for parameter in self.chain.parameters(item):
                spans[parameter] = (spans.get(parameter, (i, i))[0], i)
        return {span for span in spans.values() if span[0] < span[1]}

    def to_map(self, place: int) -> ToMap | None:
        """How what passes before the item ``place`` becomes a map; ``None`` where that can't be told."""
        value = self.chain.between[place]
        if value is None:
            return None
        small = self.chain.trace.shapes[value.number]
        if len(small) == 3 and not anatomy.in_order(self.network):
            return None
        large = self.larger.shapes.get(value.number) if self.larger else None
        return layout(small, large, anatomy.widths(self.network), anatomy.prefix_tokens(self.network))

    def shape(self, place: int) -> tuple[int, ...]:
        """Of what passes before the item ``place``, with the batch."""
        value = self.chain.between[place]
        assert value is not None
        return self.chain.trace.shapes[value.number]

    def _lone(self, item: int) -> bool:
        return self.chain.between[item] is not None and self.chain.between[item + 1] is not None


def chain_of(network: nn.Module, found: Trace, counts: Counts) -> Chain:
    """The calls of a network, down to its blocks.

    Args:
        network: any.
        found: what it computes.
        counts: which modules are blocks.
    """
    makers: dict[int, Node] = {}
    items = [item for node in found.nodes for item in _opened(network, node, found, makers, counts)]
    return Chain(network, found, items, makers)


def _opened(
    network: nn.Module, node: Node, found: Trace, makers: dict[int, Node], counts: Counts, level: int = 0
) -> list[Node]:
    """The node itself, or the calls inside it if one of them is a block between two places where a cut could be.

    Blocks lie in stages, and stages in nothing that is numbered: ``level`` counts numbered modules around the node.
    """
    if not node.dependent:
        makers.update(dict.fromkeys(node.defines, node))
        return []
    if (
        not node.inner
        or not node.args
        or not isinstance(node.args[0], Value)
        or not isinstance(node.output, Value)
    ):
        return [node]
    module, own = network.get_submodule(node.target), dict[int, Node]()
    level += anatomy.is_block(node.target, module)
    if level > 1 and counts is anatomy.is_block:
        return [node]
    inner = [item for child in node.inner for item in _opened(network, child, found, own, counts, level)]
    between = alive(inner, node.args[0], node.output, found.dependent)
    for i, item in enumerate(inner):
        if between[i] is None or between[i + 1] is None or item.kind != "module":
            continue
        child = network.get_submodule(item.target)
        wide = anatomy.is_composite(child) or not anatomy.is_composite(module) or counts is anatomy.is_layer
        if wide and counts(item.target, child):
            makers.update(own)
            return inner
    return [node]


def steps(chain: Chain, places: Sequence[int]) -> list[tuple[Step, ...]]:
    """The steps between consecutive places."""
    return [chain.steps(a, b) for a, b in pairwise(places)]
