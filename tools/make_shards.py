"""Pack images into WebDataset shards with an index.

    python tools/make_shards.py SRC DEST [--shorter-side 256] [--encode jpg] [--workers 8]

SRC is a folder of images (split/class/image, split/image, class/image or image), a tar or tar.gz of one, the
root folder of CIFAR-10, CIFAR-100, STL-10, SVHN or ImageNet as torchvision keeps them, or shards (a folder,
one folder per split, or a URL). Every split becomes a folder below DEST. Stopped, the same command goes on
where it was.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from framework.runtime.command import status
from framework.runtime.errors import UserError


def main() -> None:
    """Pack."""
    arguments = _arguments()

    from framework.data.packing.packer import Packing, pack
    from framework.data.packing.sources import open_sources

    packing = Packing(
        arguments.samples_per_shard, arguments.shorter_side, arguments.encode, arguments.quality
    )
    parent = arguments.dest.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{parent}: cannot be written: {error.strerror}") from error
    cache = parent / f".{arguments.dest.name}.cache"
    sources = open_sources(arguments.src, parent, cache, round(arguments.cache_gb * 1e9))
    bar = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*bar, console=Console(stderr=True)) as progress:
        for split, source in sources.items():
            task = progress.add_task(split or arguments.dest.name, total=len(source))
            left_out = 0
            for samples, broken in pack(source, arguments.dest / split, packing, arguments.workers):
                progress.advance(task, samples)
                for line in broken:
                    progress.console.print(f"left out: {line}", markup=False)
                left_out += len(broken)
            print(f"{arguments.dest / split}: {len(source) - left_out} images, {left_out} left out")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("src", help="where the images are")
    parser.add_argument("dest", type=Path, help="folder to make")
    parser.add_argument("--samples-per-shard", type=_positive, default=1000, help="default: 1000")
    parser.add_argument("--shorter-side", type=_positive, help="shrink larger images to this many pixels")
    parser.add_argument(
        "--encode",
        choices=("keep", "jpg", "png", "webp"),
        default="keep",
        help="keep (default): the bytes as they are where a shard may hold them, else PNG",
    )
    parser.add_argument("--quality", type=_positive, default=90, help="of JPEG and WebP; default: 90")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="default: one per core")
    parser.add_argument("--cache-gb", type=float, default=10.0, help="for shards of a URL; default: 10")
    return parser.parse_args()


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


if __name__ == "__main__":
    sys.exit(status(main, stopped="stopped; the same command goes on from here"))
