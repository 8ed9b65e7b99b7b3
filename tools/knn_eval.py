"""k-NN accuracy of the frozen encoders of runs, beside the same networks untrained and raw pixels.

    python tools/knn_eval.py RUN [RUN ...] [--neighbors 20] [key=value ...]

Weighted votes of the most similar training images by cosine (Wu et al. 2018), central crops.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from framework.analysis.arguments import leave, parse, run_parser
from framework.runtime.command import status

if TYPE_CHECKING:
    from framework.evaluation.run_folder import Run
    from framework.execution import LocalNetwork


def main() -> None:
    """Classify, print a table, leave ``knn_eval.json``."""
    parser = run_parser(__doc__)
    parser.add_argument("--neighbors", type=int, help="that vote; default: evaluate.neighbors of each recipe")
    parser.add_argument("--images", type=int, help="at most so many images of each split; default: all")
    arguments = parse(parser)

    from framework.runtime import distributed

    distributed.start()
    scores = {run.label: knn(run, arguments.neighbors, arguments.images) for run in arguments.runs}
    if distributed.is_main():
        _show(scores)
        leave(arguments.out, "knn_eval", scores)
    distributed.stop()


def knn(run: Run, neighbors: int | None, images: int | None) -> dict[str, float]:
    """Per cent by kind of features, on rank 0."""
    from framework.evaluation import features
    from framework.runtime import distributed

    splits = run.splits
    some = replace(splits, train=splits.train.subsample(images), test=splits.held_out.subsample(images))
    k = neighbors or run.recipe.evaluate.neighbors
    scores: dict[str, float] = {"neighbors": k}
    encoders: dict[str, LocalNetwork | None] = {
        "trained": run.encoder(),
        "untrained": run.encoder(trained=False),
        "raw pixels": None,
    }
    for name, net in encoders.items():
        loaders = (some.eval_loader(shards) for shards in (some.train, some.held_out))
        train, test = (features.features(net, x) if net else features.pixels(x) for x in loaders)
        with distributed.same_outcome():
            if distributed.is_main():
                scores[name] = features.knn_top1(*train, *test, k)
    return scores


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
