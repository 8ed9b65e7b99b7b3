"""Engines: what averages gradients over ranks and steps the optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from framework.config.recipe import Pipeline
from framework.engines.base import Engine, OptimizerFactory, StepResult
from framework.execution import LocalNetwork
from framework.pipeline.scheduling.placement import Placement
from framework.runtime.distributed import broadcast_weights, device, world_size
from framework.runtime.errors import UserError

__all__ = ["Engine", "StepResult", "build"]


def build(
    name: str,
    net: LocalNetwork,
    make_optimizer: OptimizerFactory,
    *,
    batch_size: int,
    accumulation: int = 1,
    clip: float = 0.0,
    zero_stage: int = 1,
    deepspeed: Mapping[str, Any] | None = None,
    pipeline: Pipeline | None = None,
    placement: Placement | None = None,
    cuda_graph: bool = False,
) -> Engine:
    """Move ``net`` to this rank's device, make all ranks start from rank 0's weights, and wrap it.

    Weights become contiguous. A network still computes in channels-last order if its images come in it.

    Args:
        name: ``"deepspeed"``, ``"ddp"`` or ``"fsdp"``.
        net: ``net(batch) -> StepOutput``, float32 (under ddp and fsdp also float64).
        make_optimizer: e.g. ``partial(build_optimizer, name="lars")``; called once parameters are placed.
        batch_size: images per step over all ranks and micro-batches.
        accumulation: micro-batches per step.
        clip: largest norm of the whole averaged gradient; 0 for no clipping.
        zero_stage: deepspeed only: 0, 1 or 2.
        deepspeed: deepspeed only: further keys of DeepSpeed's configuration.
        pipeline: deepspeed only: how pipeline stages work together.
        placement: deepspeed only: segments of the stages; ``None`` for no pipeline.
        cuda_graph: replay the step on one GPU, in place of the engine named.

    Raises:
        UserError: another name; a ``deepspeed`` section that contradicts the recipe; batch size indivisible; a
            CUDA graph without a GPU, or on several.
    """
    replicas = world_size() // (placement.stages if placement else 1)
    if batch_size % (accumulation * replicas):
        raise UserError(
            f"train.batch_size={batch_size}: must be a multiple of {accumulation * replicas} "
            f"(train.accumulation={accumulation} x {replicas} {'replicas' if placement else 'ranks'})"
        )
    if cuda_graph:
        _check_one_gpu()
    net.to(device())
    net.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # DeepSpeed and FSDP2 take no other
    broadcast_weights(net)
    if cuda_graph:
        from framework.engines.cuda_graph import GraphedEngine

        return GraphedEngine(net, make_optimizer, clip=clip)
    if placement is not None:
        from framework.pipeline.engine import PipelinedEngine

        return PipelinedEngine(
            net,
            make_optimizer,
            placement,
            batch_size=batch_size,
            micro_batches=accumulation,
            clip=clip,
            zero_stage=zero_stage,
            section=deepspeed or {},
            options=pipeline or Pipeline(),
        )
    if name == "deepspeed":
        from framework.engines.deepspeed import DeepSpeedEngine  # the library takes seconds to import

        return DeepSpeedEngine(
            net,
            make_optimizer,
            batch_size=batch_size,
            accumulation=accumulation,
            clip=clip,
            zero_stage=zero_stage,
            section=deepspeed or {},
        )
    if name == "ddp":
        from framework.engines.ddp import DDPEngine

        return DDPEngine(net, make_optimizer, clip=clip)
    if name == "fsdp":
        from framework.engines.fsdp import FSDPEngine

        return FSDPEngine(net, make_optimizer, clip=clip)
    raise UserError(f"engine={name}: must be one of deepspeed, ddp, fsdp")


def _check_one_gpu() -> None:
    if device().type != "cuda":
        raise UserError("execution.cuda_graph=true: needs a GPU, and there is none")
    if world_size() > 1:
        raise UserError(f"execution.cuda_graph=true: is for one GPU, and there are {world_size()} ranks")
