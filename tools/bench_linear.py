"""Time of a linear evaluation on cached features.

    python tools/bench_linear.py [--images 50000] [--features 2048] [--classes 10 100 1000] [--preset loco]

The features are made up: classes are directions with noise around them. Threads are PyTorch's (OMP_NUM_THREADS).
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING

from framework.evaluation.linear_protocols import PROTOCOLS
from framework.runtime.command import Parser, bounded, status

if TYPE_CHECKING:
    from framework.evaluation.linear_classifier import Rows


def main() -> None:
    """Fit on all images, test on a tenth as many, print a line for every number of classes."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=bounded(int, 1), default=50_000)
    parser.add_argument("--features", type=bounded(int, 1), default=2048)
    parser.add_argument("--classes", type=bounded(int, 1), nargs="+", default=[10, 100, 1000])
    parser.add_argument("--preset", choices=PROTOCOLS, default="loco")
    arguments = parser.parse_args()

    import torch

    from framework.evaluation.linear_classifier import evaluate_rows

    protocol = PROTOCOLS[arguments.preset]
    for classes in arguments.classes:
        train, test = _rows(arguments.images, arguments.features, classes)
        started, used = time.perf_counter(), time.process_time()
        top1 = evaluate_rows(train, test, classes, protocol, seed=0)["top1"]
        seconds, cpu = time.perf_counter() - started, time.process_time() - used
        print(
            f"{arguments.images} x {arguments.features}, {classes} classes, {protocol.epochs} epochs, "
            f"{torch.get_num_threads()} threads: {seconds:.0f} s ({cpu:.0f} s of processor time), top-1 {top1:.1f} %",
            flush=True,
        )


def _rows(images: int, features: int, classes: int) -> tuple[Rows, Rows]:
    import torch

    from framework.evaluation.linear_classifier import Rows

    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(classes, features, generator=generator)
    count = images + images // 10
    labels = torch.randint(classes, (count,), generator=generator)
    x = (torch.randn(count, features, generator=generator) * 4 + centers[labels]).abs_().mul_(0.1)
    return Rows(x[:images], labels[:images]), Rows(x[images:], labels[images:])


if __name__ == "__main__":
    sys.exit(status(main))
