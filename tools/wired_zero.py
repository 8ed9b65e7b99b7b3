"""Steps under ZeRO whose gradients and weights travel: what ``bench_step --wire --zero-stage`` times."""

from __future__ import annotations

import time

from torch import Tensor
from wired_steps import LR, Arrival, SlowWire, Training

from framework.data.batch import Batch
from framework.engines.base import EngineSettings
from framework.engines.deepspeed import DeepSpeedEngine
from framework.engines.host_copy import Pending
from framework.engines.late import Ranks, Wire
from framework.execution.local_network import LocalNetwork
from framework.optim import SGD
from framework.runtime.distributed import world_size


class Lanes:
    """A ``PartitionWire`` that takes time and no processor.

    Gradients have half of the wire's rate, weights the other half, since neither waits for the other. Of an all-reduce
    each is half.

    Args:
        wire: whose rate, and whose bytes.
    """

    def __init__(self, wire: SlowWire) -> None:
        self._wire = wire
        self._free = {"gradients": 0.0, "weights": 0.0}

    def scatter(self, flat: Tensor) -> tuple[Tensor, Pending]:
        """See ``PartitionWire``; one rank has all parts."""
        return flat, self._send("gradients", flat)

    def gather(self, flat: Tensor, part: Tensor) -> Pending:
        """See ``PartitionWire``."""
        return self._send("weights", flat)

    def close(self) -> None:
        """See ``PartitionWire``."""

    def _send(self, lane: str, flat: Tensor) -> Pending:
        size = flat.numel() * flat.element_size() / 2
        self._wire.bytes += size
        self._free[lane] = max(self._free[lane], time.perf_counter()) + size / (self._wire.rate / 2)
        return Arrival(self._free[lane])


class Silence:
    """A ``PartitionWire`` on which nothing travels."""

    def scatter(self, flat: Tensor) -> tuple[Tensor, Pending]:
        """See ``PartitionWire``."""
        return flat[: flat.numel() // world_size()], Arrival(0.0)

    def gather(self, flat: Tensor, part: Tensor) -> Pending:
        """See ``PartitionWire``."""
        return Arrival(0.0)

    def close(self) -> None:
        """See ``PartitionWire``."""


def zero(network: LocalNetwork, batch: Batch, wire: Wire, stage: int) -> Training:
    """This package's steps under ZeRO-1 or 2."""
    settings = EngineSettings(batch.images.shape[0] * world_size(), zero_stage=stage)
    between = Lanes(wire) if isinstance(wire, SlowWire) else None if isinstance(wire, Ranks) else Silence()
    engine = DeepSpeedEngine(
        network, lambda net: SGD(net.parameters(), lr=LR, momentum=0.9), settings, between
    )
    return Training(lambda: engine.step([batch], LR), engine.finish)
