"""PyTorch's DistributedDataParallel: everything whole on every rank."""

from __future__ import annotations

import warnings
from contextlib import nullcontext

from torch.nn.parallel import DistributedDataParallel

from framework.data.batch import Batch
from framework.engines.base import OptimizerFactory, StepResult, Tally, marked, update
from framework.engines.state import HoldsState
from framework.execution import LocalNetwork
from framework.runtime.distributed import device


class DDPEngine(HoldsState):
    """See ``Engine``."""

    loads, lag = True, 0

    def __init__(self, net: LocalNetwork, make_optimizer: OptimizerFactory, *, clip: float) -> None:
        self.net = net
        self.optimizer = make_optimizer(net)
        self._clip = clip
        with warnings.catch_warnings():
            # PyTorch 2.13 renames broadcast_buffers; 2.11 knows no other name.
            warnings.simplefilter("ignore", FutureWarning)
            self._ddp = DistributedDataParallel(
                net,
                device_ids=[device()] if device().type == "cuda" else None,
                broadcast_buffers=False,  # SyncBatchNorm and the loss scales keep them equal
                gradient_as_bucket_view=True,
            )

    def step(self, micro_batches: list[Batch], lr: float) -> StepResult:
        tally = Tally()
        for batch in marked(micro_batches):
            with nullcontext() if batch.last else self._ddp.no_sync():
                output = self._ddp(batch)
                (output.loss / len(micro_batches)).backward()
            tally.add(output)
        result = tally.result()
        update(self.optimizer, self.net, result, lr, self._clip)
        return result

    def close(self) -> None:
        self._ddp.zero_grad()
