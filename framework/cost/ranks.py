"""What training takes on each of some ranks, under every engine that there is: memory and traffic, before it runs.

Weights, gradients and optimizer states are counted from the network, activations from a step without values. Left out
are images, workspaces of kernels, and what the optimizer needs while it computes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from framework.config.recipe import Optim, Recipe, Sharding
from framework.cost.counting import countable, end_to_end, network_to_count, peak_of
from framework.cost.gathering import Sharded, backpropagation_turns, slice_bytes
from framework.execution import LocalNetwork
from framework.execution.hooks import Finishing
from framework.execution.uses import STAYS
from framework.local.copies import followers
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
        host: in the host's memory instead, by ``sharding.offload``.
    """

    engine: Engine
    training: Training
    weights: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    sent: int
    host: int = 0

    @property
    def memory(self) -> int:
        """All together, on the rank's device; not all of it need be there at the same time."""
        return self.weights + self.gradients + self.optimizer + self.gathered + self.activations


def rank_costs(recipe: Recipe, num_classes: int, ranks: int) -> list[RankCost]:
    """Every engine on ``ranks`` ranks, with the recipe's local units and end to end.

    Raises:
        UserError: the batch or the ranks can't be divided; as ``local_network``.
    """
    if ranks % recipe.sharding.replicas:
        raise UserError(f"sharding.replicas={recipe.sharding.replicas}: must divide the {ranks} ranks")
    parts = ranks * recipe.micro_batches
    if recipe.train.batch_size % parts:
        raise UserError(
            f"train.batch_size={recipe.train.batch_size}: must be a multiple of {parts} "
            f"(train.accumulation={recipe.micro_batches} x {ranks} ranks)"
        )
    images, states = recipe.train.batch_size // parts, states_per_weight(recipe.optim)
    net = network_to_count(countable(recipe), num_classes)
    whole = network_to_count(countable(end_to_end(recipe, net.plan)), num_classes)
    found = []
    for training, network in zip(TRAININGS, (net, whole), strict=True):
        held = Held.of(network, ranks, recipe.micro_batches, training, recipe.sharding)
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


@dataclass(frozen=True)
class Held:
    """What of a network has to be held and sent, in bytes.

    Attributes:
        ranks: their number.
        micro_batches: of a step.
        options: of fsdp.
        trained: weights that have gradients.
        sliced: a slice of them where all ranks share them.
        shard: a slice of them where the ranks of one replica share them (``sharding.replicas``).
        rest: frozen weights and buffers.
        shard_rest: a slice, as ``shard``, of frozen weights and of averages (a teacher's, ``train.ema``).
        buffers: all others.
        finished: largest gradients that are finished at once.
        travelling: largest gradients of two groups of which one is finished after the other.
        travelling_low: the same where the first is bf16 and the second is being made it.
        sharded: by segment.
    """

    ranks: int
    micro_batches: int
    options: Sharding
    trained: int
    sliced: int
    shard: int
    rest: int
    shard_rest: int
    buffers: int
    finished: int
    travelling: int
    travelling_low: int
    sharded: Sharded

    @classmethod
    def of(
        cls,
        net: LocalNetwork,
        ranks: int,
        micro_batches: int,
        training: Training,
        options: Sharding,
    ) -> Held:
        """Of a network; end to end as PyTorch's FSDP2 shards it, which gathers weights for either direction."""
        order, shards = Finishing(net.program).order, ranks // options.replicas
        trained = dict.fromkeys(parameter for group in order for parameter in group)
        frozen = [p for p in net.parameters() if p not in trained]
        moving = (module for module in (net.teacher, net.average) if module is not None)
        following = [*(b for module in moving for b in module.buffers()), *followers(net.heads)]
        buffers = _bytes(dict.fromkeys(net.buffers()).keys() - set(following))
        sizes = [_bytes(group) for group in order]
        backward = training == "end to end"
        done = backpropagation_turns(net.program) if backward else net.uses().turns
        stays = -1 if backward else STAYS
        return cls(
            ranks=ranks,
            micro_batches=micro_batches,
            options=options,
            trained=_bytes(trained),
            sliced=slice_bytes(trained, ranks),
            shard=slice_bytes(trained, shards),
            rest=_bytes(frozen) + _bytes(following) + buffers,
            shard_rest=slice_bytes([*frozen, *following], shards),
            buffers=buffers,
            finished=max(sizes),
            travelling=max(map(sum, pairwise([0, *sizes]))),
            travelling_low=max(one // 2 + 3 * other // 2 for one, other in pairwise([0, *sizes])),
            sharded=Sharded.of(net, done, stays, shards, options.gather == "bf16"),
        )

    def cost(self, engine: Engine, training: Training, states: int, activations: int) -> RankCost:
        """Under an engine whose optimizer keeps ``states`` numbers for each weight.

        ddp has gradients in buckets, and each once more until it is in one. ZeRO-1 has them, too, and slices of their
        sums; ZeRO-2 has slices, and whole what is finished and what travels. Either optimizes a copy of its slice of
        the weights.
        """
        if engine == "fsdp":
            return self._fsdp(training, states, activations)
        whole, part = self.trained, self.sliced
        gradients, optimizer = whole + self.finished, states * whole
        if engine != "ddp":
            gradients = part + self.finished + (self.travelling if engine == "ZeRO-2" else whole)
            optimizer = (states + 1) * part
        return RankCost(
            engine=engine,
            training=training,
            weights=whole + self.rest,
            gradients=gradients,
            optimizer=optimizer,
            gathered=0,
            activations=activations,
            sent=2 * whole * (self.ranks - 1) // self.ranks,
        )

    def _fsdp(self, training: Training, states: int, activations: int) -> RankCost:
        """Slices, and whole what is finished and what travels.

        If only the sums of several micro-batches are reduced, all gradients are whole. Replicas add up slices.
        """
        options, replicas = self.options, self.options.replicas
        shards = self.ranks // replicas
        often = options.reduce_every == "micro_batch"
        low = 2 if options.reduce == "bf16" else 1  # of the bytes of fp32
        scattered = (self.micro_batches if often else 1) * shards * self.shard // low
        gathered = self.micro_batches * self.sharded.gathers
        travelling = self.travelling if low == 1 else self.travelling_low
        if self.micro_batches > 1 and not often:
            travelling = self.trained
        weights, optimizer = self.shard + self.shard_rest, states * self.shard
        return RankCost(
            engine="fsdp",
            training=training,
            weights=self.buffers + (0 if options.offload else weights),
            gradients=self.shard + travelling + self.finished,
            optimizer=0 if options.offload else optimizer,
            gathered=self.sharded.gathered,
            activations=activations,
            sent=(gathered + scattered) * (shards - 1) // shards
            + 2 * self.shard * (replicas - 1) // replicas,
            host=weights + optimizer if options.offload else 0,
        )


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
