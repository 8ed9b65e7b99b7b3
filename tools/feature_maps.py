"""Where networks look: the activation of a segment over images, one row a run (MLAAN Figure 4).

    python tools/feature_maps.py RUN [RUN ...] [key=value ...] [--segment layer1] [--images 3 14 15]

The absolute activation is averaged over channels; all runs share one color scale.
"""

from __future__ import annotations

import sys

import numpy as np

from framework.analysis.arguments import leave, parse, run_parser
from framework.runtime.command import bounded, status

SHOWN = 6


def main() -> None:
    """Draw, leave ``feature_maps.json`` and ``feature_maps.png``."""
    parser = run_parser(__doc__)
    parser.add_argument("--segment", help="stage or block; default: the first stage")
    parser.add_argument(
        "--images",
        type=bounded(int, 0),
        nargs="+",
        help=f"numbers in the test split; default: {SHOWN} of all",
    )
    arguments = parse(parser)

    from framework.analysis.feature_maps import activation_maps, breadth, draw_maps

    runs = arguments.runs
    samples = arguments.images
    if samples is None:
        count = len(runs[0].splits.held_out)
        samples = np.linspace(0, count, min(SHOWN, count), endpoint=False).astype(int).tolist()
    segment, images, values = activation_maps(runs, arguments.segment, samples)
    labels = [run.label for run in runs]
    numbers = {
        "segment": segment,
        "images": samples,
        "runs": [
            {"run": label, "mean": of_run.mean((1, 2)).tolist(), "share_above_half_of_largest": share}
            for label, of_run, share in zip(labels, values, breadth(values), strict=True)
        ],
    }
    leave(arguments.out, "feature_maps", numbers, draw_maps(labels, images, values, segment))


if __name__ == "__main__":
    sys.exit(status(main))
