"""Turn a pretrained backbone into a file that Detectron2 (or torchvision, or mmdetection) starts from.

    python tools/convert_to_detectron2.py RUN_DIR -o backbone.pkl [--verify]
    python tools/convert_to_detectron2.py --timm resnet50.tv_in1k --pretrained -o supervised.pkl

It takes a run folder, a checkpoint, or a safetensors or .pth file with timm's names, of a ResNet-18, 34, 50, 101 or
152, a PResNet-50 or a ShuffleNet v2-50. Every tensor of the network must be there, or nothing is written.
--verify loads the file into Detectron2's backbone and compares the features of one image, level by level.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from framework.detection.layouts import NETWORKS, SUFFIXES, layout
from framework.runtime.command import Parser, status
from framework.runtime.errors import UserError

if TYPE_CHECKING:
    from framework.detection.conversion import Match


def main() -> None:
    """Convert."""
    arguments = _arguments()

    from framework.detection import conversion, weight_files

    if arguments.timm:
        weights = conversion.from_timm(arguments.timm, arguments.pretrained)
    else:
        weights = conversion.read(arguments.weights)
    match = conversion.match(weights)
    names = layout(arguments.to, match.network)
    if names is None:
        raise UserError(f"--to {arguments.to}: {arguments.to} has no {match.network}; --to detectron2 has")
    weight_files.write(arguments.output, arguments.to, match.network, match.renamed(names), match.pixels)
    _report(weights.where, match, arguments.output)
    _report_normalization(match, arguments.to)
    if arguments.verify:
        _verify(match, arguments.output)


def _report(where: str, match: Match, output: Path) -> None:
    count = len(match.tensors)
    print(f"{where}: {match.network}: {count} of {count} tensors matched, written to {output}")
    for why, number in Counter(match.unused.values()).items():
        names = [name for name, reason in match.unused.items() if reason == why]
        print(f"not used: {number} ({why}): {', '.join(names[:3])}{' ...' if number > 3 else ''}")


def _report_normalization(match: Match, to: str) -> None:
    """Where images are not to be normalized as every recipe for detectors does it."""
    from framework.detection.normalization import Normalization

    if match.normalization is None:
        print("it is not known how images were normalized: ImageNet's mean and std are assumed")
    elif match.normalization != Normalization():
        told = "the file says so, and tools/train_detectron2.py does the same"
        print(
            f"images were normalized by {match.normalization}: "
            f"{told if to == 'detectron2' else f'set this in {to}, since its files can not carry it'}"
        )


def _verify(match: Match, output: Path) -> None:
    try:
        from framework.detection import verification
    except ModuleNotFoundError as error:
        raise UserError(
            f"--verify needs Detectron2 ({error}); recipes/detectron2/README.md says how to install it"
        ) from error
    levels = verification.compare(match, output)
    table = Table("level", "shape", "largest feature", "largest difference", title=match.network)
    for level in levels:
        shape = "x".join(map(str, level.shape))
        table.add_row(level.name, shape, f"{level.largest:.4g}", f"{level.difference:.3g}")
    Console().print(table)
    verification.check(levels)


def _arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    weights = parser.add_mutually_exclusive_group(required=True)
    weights.add_argument(
        "weights", nargs="?", type=Path, help="run folder, checkpoint, .safetensors or .pth file"
    )
    weights.add_argument("--timm", metavar="ARCH", help=f"random weights of {', '.join(NETWORKS)}")
    parser.add_argument("--pretrained", action="store_true", help="timm's weights instead (downloads them)")
    parser.add_argument("-o", "--output", type=Path, required=True, help="file to write")
    parser.add_argument("--to", choices=list(SUFFIXES), default="detectron2", help="whose names and format")
    parser.add_argument("--verify", action="store_true", help="compare features; needs Detectron2")
    arguments = parser.parse_args()
    if arguments.verify and arguments.to != "detectron2":
        parser.error("--verify compares with Detectron2, so it goes with --to detectron2")
    if arguments.pretrained and not arguments.timm:
        parser.error("--pretrained goes with --timm")
    return arguments


if __name__ == "__main__":
    sys.exit(status(main))
