"""Train a network with local losses.

    deepspeed framework/train.py recipes/quickstart.yaml [key=value ...]

Shards become views, views go through the network's segments, heads give losses, the network routes their
gradients, an engine averages them over ranks and steps the optimizer: see ``training/run.py``.

PyTorch, timm and DeepSpeed take ten seconds to import. The recipe is read before that, so that what is wrong in it is
told at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from framework.config import loading
from framework.data.split_paths import check_train_folder
from framework.runtime.command import status
from framework.runtime.files import check_name


def main(argv: Sequence[str] | None = None) -> int:
    """Read a recipe and train it; returns the exit status: 0, ``EXIT_USAGE`` or ``EXIT_TRY_AGAIN``."""

    def work() -> int:
        recipe = loading.load(sys.argv[1:] if argv is None else argv)
        check_name(recipe.run_dir, "run_dir")
        check_train_folder(recipe.data)
        from framework.model import parts
        from framework.training.run import train_all

        return train_all(lambda: parts(recipe), Path(recipe.run_dir), recipe.faults.hang_seconds)

    return status(work, stopped="stopped without saving; touch RUN_DIR/stop-now saves first")


if __name__ == "__main__":
    sys.exit(main())
