"""Tokens that a network does not see while it trains."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Masking:
    """Which part of an image's patches is dropped behind the first segment, in training.

    Attributes:
        fraction: of the patches, drawn at random for every image and step.
        patches: L, that an image has there.
        prefix: class and register tokens before them, which stay.
    """

    fraction: float
    patches: int
    prefix: int

    @property
    def visible(self) -> int:
        """K, patches of an image that stay."""
        return int(self.patches * (1 - self.fraction))
