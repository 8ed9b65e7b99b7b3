"""Options that several methods share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from framework.config.method_options import SYNCHRONOUS, Execution, MethodOptions
from framework.config.schema import Fault, NonNegativeInt, PositiveInt


@dataclass(kw_only=True)
class Asynchronous(MethodOptions):
    """Options of methods whose modules may train without waiting for each other (DGL, InfoPro).

    Attributes:
        async_mode: "buffer": every module draws its input from a replay buffer of its predecessor's outputs (DGL,
            Algorithm 2). "sequential": one module after the other, each for the whole schedule, on the frozen lower
            ones (InfoPro).
        buffer_size: batches in a replay buffer, 30 in DGL's example; each holds activations, images and labels.
        buffer_order: order in which the modules run within a step: a new random one every time, or from the bottom up.
        module: number of the one that a sequential run trains; ``None`` lets ``train.py`` run them all.
    """

    async_mode: Literal["none", "sequential", "buffer"] = "none"
    buffer_size: PositiveInt = 30
    buffer_order: Literal["random", "sequence"] = "random"
    module: NonNegativeInt | None = None

    @property
    def execution(self) -> Execution:
        """As ``async_mode`` says."""
        if self.async_mode == "buffer":
            return Execution("replay buffer", self.buffer_size, self.buffer_order)
        if self.async_mode == "sequential":
            return Execution("one module at a time", module=self.module)
        return SYNCHRONOUS

    def check(self) -> None:
        """A module trains alone only where they are trained one after the other."""
        if self.module is not None and self.async_mode != "sequential":
            raise Fault("method.module", self.module, "goes with method.async_mode=sequential")
