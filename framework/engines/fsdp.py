"""PyTorch's FSDP2: parameters, gradients and optimizer sharded between steps, whole during the forward pass.

Only the root is wrapped. The forward pass of a local network also computes every gradient, and a segment
wrapped on its own would free its weights before they are used for that.
"""

from __future__ import annotations

from torch.distributed import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from framework.data.batch import Batch
from framework.engines.base import Engine, EngineSettings, OptimizerFactory
from framework.engines.plain import PlainEngine, UpdatesAtTheEnd, averaged
from framework.execution import LocalNetwork, StepOutput
from framework.runtime.distributed import device, world_size
from framework.runtime.errors import UserError


def build(net: LocalNetwork, make_optimizer: OptimizerFactory, settings: EngineSettings) -> Engine:
    """``net``, wrapped in place.

    Raises:
        UserError: the network or a part of it was wrapped before.
    """
    for name, module in net.named_modules():
        if isinstance(module, FSDPModule):
            raise UserError(
                f"engine=fsdp: {name or 'the network'} is wrapped by fully_shard already; only the whole "
                "network may be, and the engine does it"
            )
    root: FSDPModule = fully_shard(net, mesh=init_device_mesh(device().type, (world_size(),)))

    if net.average is not None:
        net.average.shard_like(net)

    def forward(batch: Batch) -> StepOutput:
        root.set_requires_gradient_sync(batch.last)
        output: StepOutput = net(batch)
        return output

    optimizer = make_optimizer(net)
    steps = UpdatesAtTheEnd(net, optimizer, settings.clip, averaged(forward))
    return PlainEngine(net, optimizer, steps)
