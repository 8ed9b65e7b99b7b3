"""PyTorch's FSDP2: parameters, gradients and optimizer sharded between steps, whole during the forward pass.

Only the root is wrapped. The forward pass of a local network also computes every gradient, and a segment
wrapped on its own would free its weights before they are used for that.
"""

from __future__ import annotations

from torch.distributed import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from framework.data.batch import Batch
from framework.engines.base import OptimizerFactory, StepResult, Tally, marked, update
from framework.engines.state import HoldsState
from framework.execution import LocalNetwork
from framework.runtime.distributed import device, world_size
from framework.runtime.errors import UserError


class FSDPEngine(HoldsState):
    """See ``Engine``.

    Raises:
        UserError: the network or a part of it was wrapped before.
    """

    loads, lag = True, 0

    def __init__(self, net: LocalNetwork, make_optimizer: OptimizerFactory, *, clip: float) -> None:
        for name, module in net.named_modules():
            if isinstance(module, FSDPModule):
                raise UserError(
                    f"engine=fsdp: {name or 'the network'} is wrapped by fully_shard already; only the whole "
                    "network may be, and the engine does it"
                )
        self.net = net
        self._root: FSDPModule = fully_shard(net, mesh=init_device_mesh(device().type, (world_size(),)))
        self.optimizer = make_optimizer(net)
        self._clip = clip

    def step(self, micro_batches: list[Batch], lr: float) -> StepResult:
        tally = Tally()
        for batch in marked(micro_batches):
            self._root.set_requires_gradient_sync(batch.last)
            output = self.net(batch)
            (output.loss / len(micro_batches)).backward()
            tally.add(output)
        result = tally.result()
        update(self.optimizer, self.net, result, lr, self._clip)
        return result

    def close(self) -> None:
        self.net.zero_grad()
