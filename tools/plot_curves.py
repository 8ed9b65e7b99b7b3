"""Every unit's loss over the steps, of one or several runs (LoCo's training-curve figure).

    python tools/plot_curves.py RUN [RUN ...]

Runs may still be training. Accuracies measured on the way (``evaluate.every_epochs``) get a picture too.
"""

from __future__ import annotations

import sys

from framework.analysis.arguments import leave, parse, run_parser
from framework.runtime.command import status


def main() -> None:
    """Draw, leave ``curves.json`` and ``curves.png``, and ``scores.png`` where there are scores."""
    arguments = parse(run_parser(__doc__))

    from framework.analysis.curves import compare_curves, read_losses, read_scores, score_curves

    logs = {run.label: run.folder / "metrics.jsonl" for run in arguments.runs}
    losses = {label: read_losses(log) for label, log in logs.items()}
    leave(
        arguments.out,
        "curves",
        {label: run.summary() for label, run in losses.items()},
        compare_curves(losses),
    )
    scores = {label: found for label, log in logs.items() if (found := read_scores(log))}
    if scores:
        leave(arguments.out, "scores", scores, score_curves(scores))


if __name__ == "__main__":
    sys.exit(status(main))
