"""How alike the segments of runs are to those of a reference: minibatch linear CKA (MLAAN Figure 6).

    python tools/cka.py REFERENCE RUN [RUN ...] [key=value ...]

MLAAN's reference is a run of end-to-end backpropagation. All runs are cut where the reference is.
"""

from __future__ import annotations

import sys

from framework.analysis.arguments import leave, parse, run_parser
from framework.runtime.command import bounded, status
from framework.runtime.errors import UserError


def main() -> None:
    """Compare, print the means, leave ``cka.json`` and ``cka.png``."""
    parser = run_parser(__doc__)
    parser.add_argument("--images", type=bounded(int, 1), help="at most so many test images; default: all")
    arguments = parse(parser)

    from framework.analysis.cka import draw_cka, run_cka

    reference, *runs = arguments.runs
    if not runs:
        raise UserError("name two run folders at least: the reference and what is compared with it")
    segments = [segment.name for segment in reference.segments(reference.encoder())]
    matrices = {run.label: run_cka(reference, run, arguments.images).T for run in runs}
    for label, matrix in matrices.items():
        print(f"{label}: mean CKA to {reference.label}, same segment, {matrix.diagonal().nanmean():.3f}")
    numbers = {
        "reference": reference.label,
        "segments": segments,
        "runs": [
            {
                "run": label,
                "same_segment": m.diagonal().tolist(),
                "mean": float(m.diagonal().nanmean()),
                "matrix": m.tolist(),
            }
            for label, m in matrices.items()
        ],
    }
    leave(arguments.out, "cka", numbers, draw_cka(segments, reference.label, matrices))


if __name__ == "__main__":
    sys.exit(status(main))
