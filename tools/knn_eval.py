"""k-NN accuracy of the frozen encoders of runs, beside the same networks untrained and raw pixels.

    python tools/knn_eval.py RUN [RUN ...] [--neighbors 20] [key=value ...]

Weighted votes of the most similar training images by cosine (Wu et al. 2018), central crops.
"""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table

from framework.analysis.arguments import leave, parse, run_parser
from framework.runtime.command import bounded, status


def main() -> None:
    """Classify, print a table, leave ``knn_eval.json``."""
    parser = run_parser(__doc__)
    parser.add_argument(
        "--neighbors", type=bounded(int, 1), help="that vote; default: evaluate.neighbors of each recipe"
    )
    parser.add_argument(
        "--images", type=bounded(int, 1), help="at most so many images of each split; default: all"
    )
    arguments = parse(parser)

    from framework.evaluation.scoring import knn_scores
    from framework.runtime import distributed, joining

    first = arguments.runs[0]
    with (
        joining.joined(first.folder, first.recipe.faults.hang_seconds) as watchdog,
        watchdog.during("scoring"),
    ):
        scores = {run.label: knn_scores(run, arguments.neighbors, arguments.images) for run in arguments.runs}
        if distributed.is_main():
            _show(scores)
            leave(arguments.out, "knn_eval", scores)


def _show(scores: dict[str, dict[str, float]]) -> None:
    table = Table()
    table.add_column("k-NN top-1 in %")
    for name in next(iter(scores.values())):
        table.add_column("k" if name == "neighbors" else name, justify="right")
    for label, (k, *values) in ((label, row.values()) for label, row in scores.items()):
        table.add_row(label, str(k), *(f"{value:.1f}" for value in values))
    Console().print(table)


if __name__ == "__main__":
    sys.exit(status(main))
