"""How the copies in MLAAN's Leap Augmented Modules learn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Copies:
    """How the copies in a LAM learn.

    Attributes:
        form: "sum_first": the first listed block alone has a moving average, as in the authors' code. "ema_chain":
            every block has one, as in the paper's Figure 3.
        weights: "two_copies": a trained and an averaged copy, whose outputs add up. "trained_and_pulled": a single one,
            trained, and pulled towards its block at every step, as Eqs. 9 and 10 read.
        momentum: m of the moving average.
        statistics: whether BatchNorm's running statistics are averaged too; they are not in the authors' code.
        when: the average takes in the weights as they are before or after a step; before in the authors' code.
    """

    form: Literal["sum_first", "ema_chain"] = "sum_first"
    weights: Literal["two_copies", "trained_and_pulled"] = "two_copies"
    momentum: float = 0.995
    statistics: bool = False
    when: Literal["before", "after"] = "before"
