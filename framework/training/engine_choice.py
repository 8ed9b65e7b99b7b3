"""Which engine a recipe gets: the one it names, pipeline stages, or a CUDA graph."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from framework import engines
from framework.config.recipe import Recipe
from framework.engines.base import Engine, EngineSettings, prepare
from framework.execution import LocalNetwork
from framework.model import recipe_network, sliced_network
from framework.optim import SkippableOptimizer, build_optimizer
from framework.pipeline.scheduling.balance import place
from framework.runtime.distributed import device, rank, world_size
from framework.runtime.errors import UserError


def build_network(recipe: Recipe, num_classes: int) -> LocalNetwork:
    """The recipe's network, as its engine wants it: on the CPU, and whole unless the engine cuts it into slices.

    Raises:
        UserError: the network can't be built so; replicas that don't divide the ranks.
    """
    if recipe.engine != "fsdp":
        return recipe_network(recipe, num_classes)
    replicas = recipe.sharding.replicas
    if world_size() % replicas:
        raise UserError(f"sharding.replicas={replicas}: must divide the {world_size()} ranks")
    shards = world_size() // replicas
    return sliced_network(recipe, num_classes, rank() % shards, shards)


@contextmanager
def untrained(recipe: Recipe, num_classes: int) -> Iterator[LocalNetwork]:
    """The recipe's network as its seed makes it, on this rank's device, to be evaluated on all ranks; collective.

    It is whole, or can be gathered, within the context only.
    """
    net = build_network(recipe, num_classes)
    if recipe.engine != "fsdp":
        yield net.to(device())
        return
    engine = build_engine(recipe, net, num_classes)
    try:
        yield engine.whole_net()
    finally:
        engine.close()


def build_engine(recipe: Recipe, net: LocalNetwork, num_classes: int) -> Engine:
    """The network under the recipe's engine and optimizer; collective.

    Args:
        recipe: of the run.
        net: the network, the same on all ranks.
        num_classes: of the data; for the cost of heads, where pipeline stages are balanced.

    Raises:
        UserError: settings that the engine refuses, a batch size that can't be divided, stages that can't be placed.
    """
    optim = recipe.optim

    def make_optimizer(module: nn.Module) -> SkippableOptimizer:
        return build_optimizer(
            module,
            name=optim.name,
            momentum=optim.momentum,
            nesterov=optim.nesterov,
            weight_decay=optim.weight_decay,
            decay=optim.decay,
            trust=optim.trust,
            betas=optim.betas,
            layer_decay=optim.layer_decay,
            constant=net.constant_rate(),
            constant_lr=optim.lr,
        )

    settings = EngineSettings(
        batch_size=recipe.train.batch_size,
        micro_batches=recipe.micro_batches,
        clip=optim.clip,
        zero_stage=recipe.zero_stage,
        deepspeed=recipe.deepspeed,
        sharding=recipe.sharding,
    )
    if recipe.pipelined:
        from framework.pipeline.engine import PipelinedEngine  # DeepSpeed takes seconds to import

        placement = place(recipe, net, num_classes)
        return PipelinedEngine(net, make_optimizer, settings, placement, recipe.pipeline)
    if recipe.execution.cuda_graph:
        from framework.engines import cuda_graph

        cuda_graph.check_one_gpu()
        prepare(net, settings)
        return cuda_graph.build(net, make_optimizer, settings)
    return engines.build(recipe.engine, net, make_optimizer, settings)
