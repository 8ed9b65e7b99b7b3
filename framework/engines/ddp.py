"""PyTorch's DistributedDataParallel: parameters, gradients and optimizer whole on every rank."""

from __future__ import annotations

import warnings
from contextlib import nullcontext

from torch.nn.parallel import DistributedDataParallel

from framework.data.batch import Batch
from framework.engines.base import Engine, EngineSettings, OptimizerFactory
from framework.engines.plain import PlainEngine, averaged
from framework.execution import LocalNetwork, StepOutput
from framework.runtime.distributed import device


def build(net: LocalNetwork, make_optimizer: OptimizerFactory, settings: EngineSettings) -> Engine:
    """``net`` under DDP."""
    optimizer = make_optimizer(net)
    with warnings.catch_warnings():
        # PyTorch 2.13 renames broadcast_buffers; 2.11 knows no other name.
        warnings.simplefilter("ignore", FutureWarning)
        ddp = DistributedDataParallel(
            net,
            device_ids=[device()] if device().type == "cuda" else None,
            broadcast_buffers=False,  # SyncBatchNorm and the loss scales keep them equal
            gradient_as_bucket_view=True,
        )

    def forward(batch: Batch) -> StepOutput:
        with (
            nullcontext() if batch.last else ddp.no_sync()
        ):  # read by the forward pass, for its backward pass
            output: StepOutput = ddp(batch)
        return output

    return PlainEngine(net, optimizer, settings.clip, averaged(forward))
