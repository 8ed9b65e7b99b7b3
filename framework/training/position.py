"""How far a run has come: what a checkpoint says besides weights."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Position:
    """How far a run has come.

    Attributes:
        step: steps done, which is also the place in the data.
        updates: those that changed the weights; skipped ones do not, and the schedule waits for them.
        skipped: whether the last step did not.
        broken: images that were skipped because they could not be decoded, over all ranks.
        nonfinite: steps that were skipped for losses or gradients that were infinite or NaN.
        images: those that were timed, over all starts.
        seconds: that their steps took.
        waited: seconds of them that rank 0 waited for the loader.
        peak_memory_bytes: the largest of rank 0.
    """

    step: int = 0
    updates: int = 0
    skipped: bool = False
    broken: int = 0
    nonfinite: int = 0
    images: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    peak_memory_bytes: int = 0
