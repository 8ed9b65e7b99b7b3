"""Data parallelism: parameters, gradients and optimizer whole on every rank."""

from __future__ import annotations

from framework.engines.base import Engine, EngineSettings, OptimizerFactory
from framework.engines.late import LateUpdates, Ranks
from framework.engines.plain import PlainEngine
from framework.execution import LocalNetwork
from framework.runtime.distributed import world_size


def build(net: LocalNetwork, make_optimizer: OptimizerFactory, settings: EngineSettings) -> Engine:
    """An engine that averages gradients as they are finished, and updates weights before they are used next."""
    optimizer = make_optimizer(net)
    steps = LateUpdates(net, optimizer, settings.clip, Ranks(), world_size())
    return PlainEngine(net, optimizer, steps)
