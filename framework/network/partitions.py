"""Partitions into K modules that MLAAN's and InfoPro's code list, as far as they differ from an even split."""

from __future__ import annotations

#: blocks a stage -> K -> last block of every module, as (stage from 1, block from 0)
PUBLISHED: dict[tuple[int, ...], dict[int, tuple[tuple[int, int], ...]]] = {
    # ResNet-32 (MLAAN)
    (5, 5, 5): {8: ((1, 0), (1, 2), (1, 4), (2, 1), (2, 3), (3, 0), (3, 2), (3, 4))},
    (18, 18, 18): {
        # ResNet-110, balanced for memory (InfoPro)
        2: ((1, 14), (3, 17)),
        3: ((1, 9), (2, 2), (3, 17)),
        4: ((1, 6), (1, 14), (2, 8), (3, 17)),
        # ResNet-110 (MLAAN)
        32: (
            *((stage, block) for stage in (1, 2) for block in (1, 2, 4, 5, 7, 9, 11, 13, 14, 16, 17)),
            *((3, block) for block in (1, 3, 4, 6, 7, 9, 11, 13, 15, 17)),
        ),
    },
    # ResNet-101 and ResNet-152, balanced for memory (InfoPro)
    (3, 4, 23, 3): {2: ((2, 0), (4, 2))},
    (3, 8, 36, 3): {2: ((2, 5), (4, 2))},
}
