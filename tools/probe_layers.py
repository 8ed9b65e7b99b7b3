"""How linear the labels are after every segment: a linear probe on each, runs in one plot (MLAAN Figure 5).

    python tools/probe_layers.py RUN [RUN ...] [key=value ...]

All runs are cut where the first is. Features are averaged over positions, images are not augmented.
"""

from __future__ import annotations

import sys

from rich.progress import Progress

from framework.analysis.arguments import leave, parse, run_parser
from framework.runtime.command import bounded, status


def main() -> None:
    """Probe, print the accuracies, leave ``probe_layers.json`` and ``probe_layers.png``."""
    parser = run_parser(__doc__)
    parser.add_argument(
        "--images", type=bounded(int, 1), help="at most so many images of each split; default: all"
    )
    parser.add_argument("--flatten", action="store_true", help="probe whole maps instead of their averages")
    arguments = parse(parser)

    from framework.analysis.probes import draw_layers, probe_layers
    from framework.evaluation.run_folder import check_comparable

    runs = arguments.runs
    check_comparable(runs)
    top1 = {}
    with Progress(transient=True) as progress:
        for run in runs:
            task = progress.add_task(run.label, total=len(runs[0].segments(run.encoder())))
            top1[run.label] = probe_layers(
                run,
                runs[0],
                images=arguments.images,
                flatten=arguments.flatten,
                on_segment=lambda task=task: progress.advance(task),  # type: ignore[misc]
            )
    for label, of_run in top1.items():
        print(f"{label}: " + ", ".join(f"{segment} {value:.1f} %" for segment, value in of_run.items()))
    numbers = {"flatten": arguments.flatten, "images": arguments.images, "top1": top1}
    leave(arguments.out, "probe_layers", numbers, draw_layers(top1))


if __name__ == "__main__":
    sys.exit(status(main))
