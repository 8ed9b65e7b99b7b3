"""What training takes on each of some ranks, under every engine that there is: memory and traffic, before it runs.

Weights, gradients and optimizer states are counted from the network, activations from a step without values. Left out
are images, workspaces of kernels, and what the optimizer needs while it computes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from framework.config.recipe import Optim, Recipe
from framework.cost.counting import countable, end_to_end, peak_of
from framework.execution import LocalNetwork
from framework.execution.hooks import Finishing
from framework.execution.program import Program
from framework.execution.uses import STAYS, Use
from framework.local.copies import followers
from framework.model import recipe_network
from framework.optim import build_optimizer
from framework.runtime.errors import UserError

Engine = Literal["ddp", "ZeRO-1", "ZeRO-2", "fsdp"]
Training = Literal["local", "end to end"]
ENGINES: tuple[Engine, ...] = ("ddp", "ZeRO-1", "ZeRO-2", "fsdp")
TRAININGS: tuple[Training, ...] = ("local", "end to end")


@dataclass(frozen=True)
class RankCost:
    """One rank under one engine. All but ``engine`` and ``training`` in bytes.

    Attributes:
        engine: what averages gradients and steps the optimizer.
        training: by the recipe's local units, or with one loss on top.
        weights: between uses, with buffers and moving averages.
        gradients: most at once.
        optimizer: states of the optimizer, with what the engine keeps beside them.
        gathered: most that is whole at once of what is sharded between uses.
        activations: most that autograd keeps.
        sent: in a step, in rings: of n bytes each rank sends (ranks - 1) / ranks to gather or to reduce and scatter
            them, and twice that for an all-reduce.
    """

    engine: Engine
    training: Training
    weights: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    sent: int

    @property
    def memory(self) -> int:
        """All together; not all of it need be there at the same time."""
        return self.weights + self.gradients + self.optimizer + self.gathered + self.activations


def rank_costs(recipe: Recipe, num_classes: int, ranks: int) -> list[RankCost]:
    """Every engine on ``ranks`` ranks, with the recipe's local units and end to end.

    Raises:
        UserError: the batch can't be divided; as ``local_network``.
    """
    parts = ranks * recipe.micro_batches
    if recipe.train.batch_size % parts:
        raise UserError(
            f"train.batch_size={recipe.train.batch_size}: must be a multiple of {parts} "
            f"(train.accumulation={recipe.micro_batches} x {ranks} ranks)"
        )
    images, states = recipe.train.batch_size // parts, states_per_weight(recipe.optim)
    net = recipe_network(countable(recipe), num_classes)
    whole = recipe_network(countable(end_to_end(recipe, net.plan)), num_classes)
    found = []
    for training, network in zip(TRAININGS, (net, whole), strict=True):
        held = Held.of(network, ranks, recipe.micro_batches, training)
        activations = peak_of(network, images, recipe.data.image_size)
        found += [held.cost(engine, training, states, activations) for engine in ENGINES]
    return found


def states_per_weight(optim: Optim) -> int:
    """Numbers that the recipe's optimizer keeps for each weight, seen on one that it steps."""
    like = nn.Linear(2, 3, bias=False)
    optimizer = build_optimizer(
        like, name=optim.name, momentum=optim.momentum, nesterov=optim.nesterov, betas=optim.betas
    )
    like.weight.grad = torch.ones_like(like.weight)
    optimizer.step()
    states = optimizer.state[like.weight].values()
    return sum(isinstance(state, Tensor) and state.shape == like.weight.shape for state in states)


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

    def gathered(self, ranks: int) -> int:
        """Bytes of it, each tensor padded to equal slices."""
        return ranks * slice_bytes(self.weights, ranks)


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
    def of(cls, net: LocalNetwork, done: Sequence[Sequence[Use]], stays: int, ranks: int) -> Sharded:
        """With weights that wait for their next use for ``stays`` turns, and are gathered again beyond that.

        One use is gathered ahead. Before that a group is copied to its place from the buffer that it was gathered in,
        and then it is there twice.
        """
        turn = [number for number, uses in enumerate(done) for _ in uses]
        groups = shard_groups(net, [use for uses in done for use in uses])
        sizes = {group: group.gathered(ranks) for group in groups}
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


@dataclass(frozen=True)
class Held:
    """What of a network has to be held and sent, in bytes.

    Attributes:
        ranks: their number.
        micro_batches: of a step.
        trained: weights that have gradients.
        sliced: a slice of them.
        rest: frozen weights and buffers.
        sliced_rest: a slice of frozen weights and of averages (a teacher's, ``train.ema``), other buffers whole.
        finished: largest gradients that are finished at once.
        travelling: largest gradients of two groups of which one is finished after the other.
        sharded: by segment.
    """

    ranks: int
    micro_batches: int
    trained: int
    sliced: int
    rest: int
    sliced_rest: int
    finished: int
    travelling: int
    sharded: Sharded

    @classmethod
    def of(cls, net: LocalNetwork, ranks: int, micro_batches: int, training: Training) -> Held:
        """Of a network; end to end as PyTorch's FSDP2 shards it, which gathers weights for either direction."""
        order = Finishing(net.program).order
        trained = dict.fromkeys(parameter for group in order for parameter in group)
        frozen = [p for p in net.parameters() if p not in trained]
        moving = (module for module in (net.teacher, net.average) if module is not None)
        following = [*(b for module in moving for b in module.buffers()), *followers(net.heads)]
        whole = dict.fromkeys(net.buffers()).keys() - set(following)
        sizes = [_bytes(group) for group in order]
        backward = training == "end to end"
        done = backpropagation_turns(net.program) if backward else net.uses().turns
        return cls(
            ranks=ranks,
            micro_batches=micro_batches,
            trained=_bytes(trained),
            sliced=slice_bytes(trained, ranks),
            rest=_bytes(frozen) + _bytes(following) + _bytes(whole),
            sliced_rest=slice_bytes([*frozen, *following], ranks) + _bytes(whole),
            finished=max(sizes),
            travelling=max(map(sum, pairwise([0, *sizes]))),
            sharded=Sharded.of(net, done, -1 if backward else STAYS, ranks),
        )

    def cost(self, engine: Engine, training: Training, states: int, activations: int) -> RankCost:
        """Under an engine whose optimizer keeps ``states`` numbers for each weight.

        ddp has gradients in buckets, and each once more until it is in one. ZeRO-1 has them, too, and slices of their
        sums; ZeRO-2 has slices, and whole what is finished and what travels. Either optimizes a copy of its slice of
        the weights. fsdp has slices, and whole what is finished and what travels; of several micro-batches only the
        sums are reduced, so that all are whole.
        """
        whole, part = self.trained, self.sliced
        gradients, optimizer, sent = whole + self.finished, states * whole, 2 * whole
        if engine.startswith("ZeRO"):
            gradients = part + self.finished + (self.travelling if engine == "ZeRO-2" else whole)
            optimizer = (states + 1) * part
        if engine == "fsdp":
            gradients = part + (self.travelling if self.micro_batches == 1 else whole) + self.finished
            optimizer = states * part
            sent = self.micro_batches * self.sharded.gathers + self.ranks * part
        return RankCost(
            engine=engine,
            training=training,
            weights=part + self.sliced_rest if engine == "fsdp" else whole + self.rest,
            gradients=gradients,
            optimizer=optimizer,
            gathered=self.sharded.gathered if engine == "fsdp" else 0,
            activations=activations,
            sent=sent * (self.ranks - 1) // self.ranks,
        )


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
