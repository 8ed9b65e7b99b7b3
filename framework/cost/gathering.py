"""What sharding by segment gathers in a step, and how much of it is whole at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from framework.execution import LocalNetwork
from framework.execution.program import Program
from framework.execution.uses import Use


def backpropagation_turns(program: Program) -> list[list[Use]]:
    """What PyTorch's FSDP2 sees of a micro-batch: the backward pass is another way through all segments."""
    segments = range(len(program.segments))
    down = [[Use("backward", s)] for s in reversed(segments)]
    return [*([Use("forward", s)] for s in segments), [Use("heads", segments[-1])], *down]


@dataclass(frozen=True, eq=False)
class ShardGroup:
    """Weights that are used together, and therefore gathered together.

    Attributes:
        weights: parameters, trained or not, and averages that a teacher runs with.
        places: of its uses, in the order of a micro-batch.
    """

    weights: tuple[Tensor, ...]
    places: tuple[int, ...]

    def gathered(self, ranks: int, low: bool) -> int:
        """Bytes of it, each tensor padded to equal slices; ``low``: weights of two dimensions and more as bf16."""
        sizes = ((w, 2 if low and w.ndim > 1 else w.element_size()) for w in self.weights)
        return sum(ranks * -(-w.numel() // ranks) * size for w, size in sizes)


def shard_groups(net: LocalNetwork, order: Sequence[Use]) -> list[ShardGroup]:
    """Those of a network whose micro-batches use weights in this order."""
    places: dict[Tensor, list[int]] = {}
    used = net.uses().weights
    for place, use in enumerate(order):
        for weight in dict.fromkeys(used[use]):
            places.setdefault(weight, []).append(place)
    together: dict[tuple[int, ...], list[Tensor]] = {}
    for weight, own in places.items():
        together.setdefault(tuple(own), []).append(weight)
    return [ShardGroup(tuple(weights), own) for own, weights in together.items()]


def slice_bytes(tensors: Iterable[Tensor], ranks: int) -> int:
    """Bytes of one of ``ranks`` equal slices of every tensor; the last ones are padded."""
    return sum(-(-t.numel() // ranks) * t.element_size() for t in tensors)


@dataclass(frozen=True)
class Sharded:
    """What sharding by segment takes in a micro-batch.

    Attributes:
        gathered: bytes that are whole at most.
        gathers: bytes that are gathered.
    """

    gathered: int
    gathers: int

    @classmethod
    def of(
        cls, net: LocalNetwork, done: Sequence[Sequence[Use]], stays: int, ranks: int, low: bool = False
    ) -> Sharded:
        """With weights that wait for their next use for ``stays`` turns, and are gathered again beyond that.

        ``ranks`` share them; ``low`` as in ``ShardGroup``. One use is gathered ahead. Before that a group is copied to
        its place from the buffer that it was gathered in, and then it is there twice.
        """
        turn = [number for number, uses in enumerate(done) for _ in uses]
        groups = shard_groups(net, [use for uses in done for use in uses])
        sizes = {group: group.gathered(ranks, low) for group in groups}
        present: list[set[ShardGroup]] = [set() for _ in turn]
        gathers = 0
        for group in groups:
            gathers += sizes[group]
            for place in group.places:
                present[place].add(group)
            for one, other in pairwise(group.places):
                if turn[other] - turn[one] <= stays:
                    for place in range(one, other):
                        present[place].add(group)
                else:
                    gathers += sizes[group]
        at_most = 0
        for place, here in enumerate(present):
            before = present[place - 1] if place else set()
            copied = sum(sizes[group] for group in here - before)
            ahead = sum(sizes[group] for group in _next_missing(place, here, groups, turn))
            at_most = max(at_most, sum(sizes[group] for group in here) + max(copied, ahead))
        return cls(at_most, gathers)


def _next_missing(
    place: int, present: set[ShardGroup], groups: Sequence[ShardGroup], turn: Sequence[int]
) -> list[ShardGroup]:
    """What is gathered ahead at a use: what the next use in this turn or the one after it lacks."""
    for later in range(place + 1, len(turn)):
        if turn[later] > turn[place] + 1:
            break
        if missing := [group for group in groups if later in group.places and group not in present]:
            return missing
    return []
