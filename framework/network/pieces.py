"""A recorded network as blocks, with what stands before each: where one segment may end and the next begin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from typing import NamedTuple

from torch import nn

from framework.network import anatomy
from framework.network.chain import Alive, Chain, Step, alive
from framework.network.layouts import ToMap, from_unordered_tokens, layout
from framework.network.packing import columns, from_packed, of_one_image
from framework.network.records import Node, Trace
from framework.network.values import BATCH, Value, leaves

Opened = Callable[[str, nn.Module], bool]


class Rule(NamedTuple):
    """One way to look for blocks.

    Attributes:
        counts: whether a module of this name is a block.
        opened: whether the calls inside a module of this name are recorded.
        tensors: how many may pass between blocks.
    """

    counts: Callable[[str, nn.Module], bool]
    opened: Opened
    tensors: int = 1


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
        """The items that are blocks."""
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
        return [i for i in lone if anatomy.is_composite(get(self.names[i]))] or lone

    @cached_property
    def cuts(self) -> dict[str, int]:
        """Name of every block after which a segment may end -> the number of items up to there."""
        found = {}
        starts = [*self.blocks[1:], len(self.chain.items)]
        for block, following in zip(self.blocks, starts, strict=False):
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
        values = self.chain.between[place]
        if values is None or self.to_map(place) is None:
            return False
        if any(value.number in self.chain.trace.changed for value in values):
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
        values = self.chain.between[place]
        if values is None:
            return None
        if len(values) == 1:
            return self._layout(values[0], place)
        shapes = self.shapes(place)
        if any(shape[0] % BATCH for shape in shapes):
            return None
        # Heads read the latest map, or else the latest tokens.
        order = sorted(
            range(len(values)), key=lambda i: (len(shapes[i]) == 4, values[i].number), reverse=True
        )
        for i in order:
            if shapes[i][0] == BATCH and (found := self._layout(values[i], place)) is not None:
                begin, shape = columns(shapes)[i], of_one_image(shapes[i])
                return partial(from_packed, begin=begin, shape=shape, to_map=found)
        return None

    def _layout(self, value: Value, place: int) -> ToMap | None:
        small = self.chain.trace.shapes[value.number]
        if len(small) == 3 and (reroll := anatomy.reordering(self.network)) is not None:
            return partial(
                from_unordered_tokens, reroll=reroll, block=sum(b < place - 1 for b in self.blocks)
            )
        large = self.larger.shapes.get(value.number) if self.larger else None
        return layout(small, large, anatomy.widths(self.network), anatomy.prefix_tokens(self.network))

    def shape(self, place: int) -> tuple[int, ...]:
        """Of what passes before the item ``place``, with the batch."""
        shapes = self.shapes(place)
        return shapes[0] if len(shapes) == 1 else (BATCH, columns(shapes)[-1])

    def shapes(self, place: int) -> list[tuple[int, ...]]:
        """The same for each of the tensors."""
        return [self.chain.trace.shapes[value.number] for value in self.chain.between[place] or ()]

    def _lone(self, item: int) -> bool:
        return self.chain.between[item] is not None and self.chain.between[item + 1] is not None


def chain_of(network: nn.Module, found: Trace, rule: Rule) -> Chain:
    """The calls of a network, down to its blocks.

    Args:
        network: any.
        found: what it computes.
        rule: which modules are blocks, and what may pass between them.
    """
    makers: dict[int, Node] = {}
    items = [item for node in found.nodes for item in _opened(network, node, found, makers, rule)]
    return Chain(network, found, items, makers, rule.tensors)


def _opened(
    network: nn.Module, node: Node, found: Trace, makers: dict[int, Node], rule: Rule, level: int = 0
) -> list[Node]:
    """The node itself, or the calls inside it if one of them is a block between two places where a cut could be.

    Blocks lie in stages, and stages in nothing that is numbered: ``level`` counts numbered modules around the node.
    """
    if not node.dependent:
        makers.update(dict.fromkeys(node.defines, node))
        return []
    if not node.inner:
        return [node]
    module = network.get_submodule(node.target)
    level += anatomy.is_block(node.target, module)
    if level > 1 and rule.counts is anatomy.is_block:
        return [node]
    inner = [item for child in node.inner for item in _opened(network, child, found, makers, rule, level)]
    given, wanted = _images(node.args, found), _images(node.output, found)
    if not 0 < len(given) <= rule.tensors or not 0 < len(wanted) <= rule.tensors:
        return [node]
    between = alive(inner, given, wanted, found.dependent, rule.tensors)
    for i, item in enumerate(inner):
        if between[i] is None or between[i + 1] is None or item.kind != "module":
            continue
        child = network.get_submodule(item.target)
        wide = (
            anatomy.is_composite(child) or not anatomy.is_composite(module) or rule.counts is anatomy.is_layer
        )
        if wide and rule.counts(item.target, child):
            return inner
    return [node]


def _images(tree: object, found: Trace) -> Alive:
    """The tensors that depend on the images, in order and each once."""
    numbers = {leaf.number for leaf in leaves(tree) if isinstance(leaf, Value)}
    return tuple(map(Value, sorted(numbers & found.dependent)))


def steps(chain: Chain, places: Sequence[int]) -> list[tuple[Step, ...]]:
    """The steps between consecutive places."""
    return [chain.steps(a, b) for a, b in pairwise(places)]
