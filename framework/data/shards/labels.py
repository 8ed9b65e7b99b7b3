"""What the numbers in shards' labels mean."""

from __future__ import annotations

import numpy as np

_CERTAIN = 1000  # labels below are numbers of classes, however few of them there are


def are_identifiers(labels: np.ndarray) -> bool:
    """Whether labels are identifiers, such as the 1440764 of n01440764, rather than the numbers of classes from 0 on.

    They are where fewer than a tenth of the numbers up to the highest occur.
    """
    highest = int(labels.max(initial=-1))
    return highest >= _CERTAIN and highest >= 10 * len(np.unique(labels))
