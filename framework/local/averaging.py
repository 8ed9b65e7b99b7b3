"""How a teacher follows the network that it teaches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Averaging:
    """A plan's teacher: the exponential moving average of its segments and of what its heads embed with.

    After every optimizer step, teacher <- m teacher + (1 - m) student. The teacher runs without a graph, with its own
    batch statistics.

    Attributes:
        momentum: m, from 0 to 1.
        schedule: "constant"; or "cosine", where m rises to 1: 1 - (1 - momentum) (1 + cos(pi k / K)) / 2 at step k of
            K (BYOL, section 3.3; MoCo v3).
        one_sided: the student sees the first view of every image alone, and the teacher the last. Otherwise both
            see all.
        shuffle: the images that a rank's teacher sees together are drawn from all ranks (MoCo's shuffling BN).
    """

    momentum: float
    schedule: Literal["constant", "cosine"] = "constant"
    one_sided: bool = False
    shuffle: bool = False
