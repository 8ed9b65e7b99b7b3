"""Small layers, and the initialization of convolutions, that heads and networks share."""

from __future__ import annotations

from torch import Tensor, nn


class GlobalAveragePool(nn.Module):
    """Mean over height and width: (N, C, H, W) -> (N, C)."""

    def forward(self, x: Tensor) -> Tensor:
        """Pool; a flat (N, C) input is returned as it is."""
        return x.mean((2, 3)) if x.ndim == 4 else x


def initialize(module: nn.Module) -> None:
    """Convolutions from N(0, 2 / (k * k * out)), as in the papers' code; everything else keeps its default."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
