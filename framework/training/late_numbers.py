"""What the host reads of a step: numbers that travel by themselves, and that ranks agree on."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from framework.engines import StepResult
from framework.engines.host_copy import read_later
from framework.runtime import distributed
from framework.runtime.requests import Request


class LateNumbers:
    """The numbers of a step on their way to the host. Every method waits for them, and for no later step.

    Ranks exchange one small tensor a step: requests, and whether a loss is infinite or NaN, so that all see it at the
    same step. The losses themselves are summed over the ranks where they are looked at: begun at once where they will
    be written anyway, else, after a step that is skipped or not finite, when that has been read. All ranks must do the
    same in the same order.

    Args:
        result: of the step.
        request: what this rank knows of by now.
        written: whether the losses will be.

    Attributes:
        share: this rank's part of the losses (U,), as a function that waits.
    """

    def __init__(self, result: StepResult, request: Request, written: bool) -> None:
        self._result = result
        self._losses = result.losses() if written else None
        self.share: Callable[[], list[float]] = read_later(result.unit_losses)
        self._flags = read_later(*distributed.start_max_over_ranks(_flags(result, request)))

    def request(self) -> Request:
        """The most urgent one of any rank."""
        return Request(self._read[0])

    def skipped(self) -> bool:
        """Whether weights and optimizer are as before the step. Does not wait where no step may be skipped."""
        return self._result.overflow is not None and bool(self._read[2])

    def hopeless(self) -> list[int]:
        """Numbers of the units for whose gradients the step was skipped, and no lower loss scale would help."""
        return [unit for unit, flag in enumerate(self._read[3:]) if flag]

    def losses(self) -> list[float] | None:
        """By unit, over all ranks; ``None`` where nobody needs to see them."""
        if self._losses is None and (self._read[1] or self.skipped()):
            self._losses = self._result.losses()
        return None if self._losses is None else self._losses()

    @cached_property
    def _read(self) -> list[int]:
        flags: list[int] = self._flags()
        return flags


def most_urgent(request: Request) -> Request:
    """Of all ranks' requests; collective, waits."""
    mine = torch.full((1,), int(request), device=distributed.device())
    return Request(read_later(*distributed.start_max_over_ranks(mine))()[0])


def _flags(result: StepResult, request: Request) -> Tensor:
    """Request, a loss that is infinite or NaN, overflow, hopeless units: (3 + U,) or, where there are none, (2,)."""
    asked = torch.full((1,), int(request), device=result.unit_losses.device)
    bad = ~torch.isfinite(result.unit_losses).all()
    flags = [asked, bad.reshape(1)]
    flags += [] if result.overflow is None else [result.overflow.reshape(1)]
    flags += [] if result.hopeless is None else [result.hopeless]
    return torch.cat(flags)
