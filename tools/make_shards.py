"""Pack images into WebDataset shards with an index.

    python tools/make_shards.py SRC DEST [--shorter-side 256] [--encode jpg] [--workers 8]

Every split becomes a folder below DEST; a source without splits becomes DEST itself. What SRC was taken for, and what
is left out of it, is printed; nothing is written there. Stopped, the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from framework.data.packing.place import kinds_text
from framework.data.packing.readers import all_readers, read
from framework.data.packing.reading import Choices, Reading, check_apart
from framework.data.packing.rows import counted_classes
from framework.runtime.command import Parser, bounded, status
from framework.runtime.errors import UserError
from framework.runtime.text import printable


def main() -> None:
    """Pack."""
    arguments = _arguments()
    dest: Path = arguments.dest
    for source in arguments.src:
        check_apart(source, dest)
    parent = dest.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{parent}: cannot be written: {error.strerror}") from error
    choices = Choices(arguments.reader, arguments.skip, arguments.file_column, arguments.label_column)
    cache = parent / f".{dest.name}.cache"
    reading = read(arguments.src, choices, parent, cache, round(arguments.cache_gb * 1e9))
    _pack(reading, arguments)


def _pack(reading: Reading, arguments: argparse.Namespace) -> None:
    from framework.data.packing.packer import Packing, pack_splits, training_needs  # with PyTorch

    source = " ".join(arguments.src[:1] + ["..."] * (len(arguments.src) > 1))
    splits = reading.open()
    classes = next((images.classes for images in splits.values() if images.classes), None)
    counts = ", ".join(f"{split} {len(images)} images".strip() for split, images in splits.items())
    names = (
        f"{counted_classes(classes)}, {', '.join(classes[:5])}{' ...' * (len(classes) > 5)}"
        if classes
        else ""
    )
    _say(f"{source}: read as '{reading.reader}': {counts}; {names or 'no names of classes'}")
    if reading.unpacked:
        _say(f"{source}: not packed: {kinds_text(reading.unpacked)}")
    packing = Packing(
        arguments.samples_per_shard, arguments.shorter_side, arguments.encode, arguments.quality
    )
    left_out = dict.fromkeys(splits, 0)
    bar = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*bar, console=Console(stderr=True)) as progress:
        tasks = {
            split: progress.add_task(printable(split or arguments.dest.name), total=len(images))
            for split, images in splits.items()
        }
        for split, samples, broken in pack_splits(splits, arguments.dest, packing, arguments.workers):
            progress.advance(tasks[split], samples)
            for line in broken:
                progress.console.print(f"left out: {line}", markup=False)
            left_out[split] += len(broken)
    for split, images in splits.items():
        whole = len(images) - left_out[split]
        _say(f"{arguments.dest / split}: {whole} images, {left_out[split]} left out")
    _say(f"to train on them: {training_needs(arguments.dest, splits)}")


def _say(line: str) -> None:
    print(printable(line), flush=True)


def _arguments() -> argparse.Namespace:
    parser = Parser(
        description=__doc__, epilog=_readers(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("src", nargs="+", help="where the images are (several: shards of one folder)")
    parser.add_argument("dest", type=Path, help="folder to make")
    parser.add_argument("--samples-per-shard", type=bounded(int, 1), default=1000, help="default: 1000")
    parser.add_argument(
        "--shorter-side", type=bounded(int, 1), help="shrink larger images to this many pixels"
    )
    parser.add_argument(
        "--encode",
        choices=("keep", "jpg", "png", "webp"),
        default="keep",
        help="keep (default): the bytes as they are where a shard may hold them, else PNG",
    )
    parser.add_argument(
        "--quality", type=bounded(int, 1, 100), default=90, help="of JPEG and WebP, up to 100; default: 90"
    )
    parser.add_argument(
        "--workers", type=bounded(int, 0), default=os.cpu_count() or 1, help="default: one per core"
    )
    parser.add_argument(
        "--cache-gb", type=bounded(float, 1e-9), default=10.0, help="for shards of a URL; default: 10"
    )
    parser.add_argument(
        "--as",
        dest="reader",
        choices=[reader.name for reader in all_readers()],
        help="how to read SRC; see below",
    )
    parser.add_argument(
        "--skip",
        action="append",
        default=[],
        metavar="GLOB",
        help="folders or files below SRC to leave out; may repeat",
    )
    parser.add_argument(
        "--file-column", metavar="NAME", help="column of a table of labels that names the image"
    )
    parser.add_argument(
        "--label-column", metavar="NAME", help="column of its labels, or key of shards' .json"
    )
    return parser.parse_args()


def _readers() -> str:
    """What SRC may be, from the registry."""
    lines = ["what SRC may be, and the splits that come of it:"]
    for reader in all_readers():
        text = f"{reader.recognizes} -> {reader.becomes}".replace("`", "")
        lines += textwrap.wrap(
            f"{reader.name:12} {text}", 100, initial_indent="  ", subsequent_indent=" " * 15
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(status(main, stopped="stopped; the same command goes on from here"))
