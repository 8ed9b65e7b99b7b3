"""Wires between ranks for ``bench_step``: one that takes time and no processor, and one that takes none."""

from __future__ import annotations

import time

from torch import Tensor

from framework.engines.host_copy import Pending
from framework.runtime.distributed import world_size


class SlowWire:
    """A ``Wire`` and a ``PartitionWire`` that take time and no processor.

    A sum is there bytes / rate after the one before it. Where parts are exchanged gradients have half of the rate and
    weights the other half, since neither waits for the other; each is half of an all-reduce.

    Attributes:
        rate: bytes a second.
        bytes: sent so far, as an all-reduce counts them.
    """

    def __init__(self) -> None:
        self.rate, self.bytes = float("inf"), 0.0
        self._free = {"sums": 0.0, "gradients": 0.0, "weights": 0.0}

    def sum(self, x: Tensor) -> Pending:
        """See ``Wire``; ``x`` stays as it is."""
        return self._sent("sums", x, 1.0)

    def scatter(self, flat: Tensor) -> tuple[Tensor, Pending]:
        """See ``PartitionWire``; this process has all parts."""
        return flat, self._sent("gradients", flat, 0.5)

    def gather(self, flat: Tensor, part: Tensor) -> Pending:
        """See ``PartitionWire``."""
        return self._sent("weights", flat, 0.5)

    def close(self) -> None:
        """See ``Wire``."""

    def _sent(self, lane: str, x: Tensor, share: float) -> Pending:
        """A tensor that is sent now, at this share of the rate and as this share of an all-reduce."""
        size = x.numel() * x.element_size() * share
        self.bytes += size
        self._free[lane] = max(self._free[lane], time.perf_counter()) + size / (self.rate * share)
        return Arrival(self._free[lane])


class Arrival:
    """``Pending``: is there at this time, by ``time.perf_counter``."""

    def __init__(self, at: float) -> None:
        self._at = at

    def wait(self) -> None:
        """Return when it is there."""
        time.sleep(max(0.0, self._at - time.perf_counter()))


class Silence:
    """A ``Wire`` and a ``PartitionWire`` on which nothing travels, for the time of the computation alone."""

    def sum(self, x: Tensor) -> Pending:
        """See ``Wire``."""
        return Arrival(0.0)

    def scatter(self, flat: Tensor) -> tuple[Tensor, Pending]:
        """See ``PartitionWire``."""
        return flat[: flat.numel() // world_size()], Arrival(0.0)

    def gather(self, flat: Tensor, part: Tensor) -> Pending:
        """See ``PartitionWire``."""
        return Arrival(0.0)

    def close(self) -> None:
        """See ``Wire``."""
