"""How images are mixed with each other: the ``mixing:`` section of a recipe.

``framework/data/augment/mixing.py`` mixes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from framework.config.schema import NonNegative, Probability


@dataclass(frozen=True)
class Mixing:
    """Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019), timm's; labels are mixed as the images are.

    Both mix neighbors: images 0 and 1 of a step, 2 and 3, and so on, whose order is random anyhow. So any number of
    ranks and micro-batches makes the same of a step's images. (timm mixes the first of a rank's batch with its last.)

    Attributes:
        mixup: alpha of Mixup: an image counts lambda, its partner 1 - lambda, with lambda of Beta(alpha, alpha). 0
            for none.
        cutmix: alpha of CutMix, whose lambda is the part of an image that stays beside a box of its partner. 0 for
            none.
        probability: of mixing at all.
        switch: probability of CutMix, where there are both.
        mode: what has one draw: a step's whole "batch", or each "pair", which starts some dozen kernels a pair.
    """

    mixup: NonNegative = 0.0
    cutmix: NonNegative = 0.0
    probability: Probability = 1.0
    switch: Probability = 0.5
    mode: Literal["batch", "pair"] = "batch"

    @property
    def key(self) -> str | None:
        """The key that asks for mixing; ``None`` where nothing does."""
        if self.probability == 0 or (self.mixup == 0 and self.cutmix == 0):
            return None
        return f"mixing.mixup={self.mixup:g}" if self.mixup else f"mixing.cutmix={self.cutmix:g}"
