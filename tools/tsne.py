"""Features of a few classes in the plane, one panel a run (LoCo's t-SNE figure).

    python tools/tsne.py RUN [RUN ...] [--classes 0 1 2 ...] [--umap] [key=value ...]

LoCo shows 500 validation images of ImageNet's first ten classes, which is the default.
"""

from __future__ import annotations

import sys

from framework.analysis.arguments import leave, parse, run_parser
from framework.runtime.command import bounded, status


def main() -> None:
    """Lay out, leave ``tsne`` (or ``umap``) ``.json`` and ``.png``."""
    parser = run_parser(__doc__)
    parser.add_argument("--classes", type=int, nargs="+", default=range(10), help="default: 0 to 9")
    parser.add_argument("--per-class", type=bounded(int, 1), default=50, help="images of each; default: 50")
    parser.add_argument("--perplexity", type=bounded(float, 1e-3), default=30.0, help="of t-SNE; default: 30")
    parser.add_argument("--umap", action="store_true", help="UMAP instead of t-SNE (stagewise[umap])")
    parser.add_argument(
        "--seed", type=bounded(int, 0, 2**32 - 1), default=0, help="of the layout; default: 0"
    )
    arguments = parse(parser)

    from framework.analysis.embedding import draw_points, embed

    runs = {
        run.label: embed(
            run,
            arguments.classes,
            arguments.per_class,
            perplexity=arguments.perplexity,
            umap=arguments.umap,
            seed=arguments.seed,
        )
        for run in arguments.runs
    }
    known = arguments.runs[0].splits.held_out.classes or []
    names = {c: known[c] if c < len(known) else str(c) for c in arguments.classes}
    method = "UMAP" if arguments.umap else "t-SNE"
    numbers = {
        "method": method,
        "runs": [
            {"run": label, "silhouette": p.silhouette, "label": p.label.tolist(), "xy": p.xy.tolist()}
            for label, p in runs.items()
        ],
    }
    leave(arguments.out, "umap" if arguments.umap else "tsne", numbers, draw_points(runs, names, method))


if __name__ == "__main__":
    sys.exit(status(main))
