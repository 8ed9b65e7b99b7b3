"""Fine-tune a run's network on some of the labels: SimCLR's semi-supervised protocol.

    deepspeed tools/finetune.py RUN --labels 0.01 [--from-scratch] [key=value ...]

The encoder and a new linear classifier learn end to end: SGD with Nesterov momentum 0.9, learning rate 0.05 for a
batch of 256 and in proportion, cosine without warm-up, no weight decay, crop and flip; 60 epochs on 1 % of the
labels, 30 on 10 % and more. The labels are drawn by the recipe's seed, evenly over the classes; SimCLR's own lists
of ImageNet images are others. The result is a run of its own, RUN/finetune-LABELS, which goes on where it stopped.
"""

from __future__ import annotations

import argparse
import sys

from framework.analysis.arguments import folders_and_overrides, only_run
from framework.config.recipe import Recipe
from framework.runtime.command import Parser, status
from framework.runtime.errors import UserError


def main() -> int:
    """Train by that recipe; returns the exit status."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="a finished run; after it key=value")
    parser.add_argument(
        "--labels", type=float, required=True, help="fraction of the labels, such as 0.01 or 0.1"
    )
    parser.add_argument("--from-scratch", action="store_true", help="without the run's weights, to compare")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_intermixed_args()
    folders, overrides = folders_and_overrides(arguments.runs)
    if not 0 < arguments.labels <= 1:
        raise UserError(f"--labels {arguments.labels}: must be above 0 and at most 1")

    from framework.evaluation.run_folder import open_runs
    from framework.training.fine_tuning import fine_tuning_recipe
    from framework.training.run import train_all

    run = only_run(open_runs(folders))

    def read() -> list[Recipe]:
        return [fine_tuning_recipe(run, arguments.labels, arguments.from_scratch, overrides)]

    return train_all(read, run.folder, run.recipe.faults.hang_seconds)


if __name__ == "__main__":
    sys.exit(status(main))
