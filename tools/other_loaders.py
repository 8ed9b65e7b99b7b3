"""The loaders that ``bench_loader.py`` measures beside ours, each as its documentation shows it."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import webdataset
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms as v1
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from framework.config.views import Views
from framework.data.shards.index import ShardSet

Pass = Callable[[], int]  # loads every image once, returns their number
BICUBIC = v2.InterpolationMode.BICUBIC
MEAN, STD = Views().mean, Views().std


def supervised(size: int) -> v1.Compose:
    """What most training scripts do with an image."""
    return v1.Compose(
        [
            v1.RandomResizedCrop(size, interpolation=BICUBIC),
            v1.RandomHorizontalFlip(),
            v1.ToTensor(),
            v1.Normalize(MEAN, STD),
        ]
    )


def simclr(size: int) -> Callable[[Image.Image], Tensor]:
    """Two views by torchvision's v2 on tensors, image by image."""
    view = v2.Compose(
        [
            v2.RandomResizedCrop(size, interpolation=BICUBIC, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, 0.2)], p=0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(23, (0.1, 2.0))], p=0.5),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )

    def views(image: Image.Image) -> Tensor:
        tensor = v2.functional.pil_to_tensor(image)
        return torch.stack([view(tensor), view(tensor)])

    return views


def counted(loader: Iterable[Any]) -> int:
    """Images in a loader's batches of (B, ...)."""
    return sum(len(batch[0]) for batch in loader)


def webdataset_passes(shards: ShardSet, size: int, batch: int) -> dict[str, Pass]:
    """Plain webdataset."""
    urls = [str(Path(shards.folder) / name) for name in shards.shards]

    def run(transform: Callable[[Image.Image], Any], collated: bool = True) -> Pass:
        def once() -> int:
            found = webdataset.WebDataset(urls, shardshuffle=False).decode("pil")
            pairs = found.to_tuple("jpg;png;jpeg;webp;ppm", "cls").map_tuple(transform, lambda label: label)
            if not collated:
                return sum(1 for _ in pairs)
            return counted(webdataset.WebLoader(pairs.batched(batch), batch_size=None, num_workers=0))

        return once

    return {
        "decode": run(lambda image: image, collated=False),
        "supervised": run(supervised(size)),
        "simclr": run(simclr(size)),
    }


def imagefolder_passes(shards: ShardSet, size: int, batch: int, root: Path) -> dict[str, Pass]:
    """torchvision's ImageFolder and DataLoader on the same files, written to ``root`` first."""
    for i in range(len(shards)):
        folder = root / f"{shards.labels[i]:04d}"
        folder.mkdir(exist_ok=True)
        (folder / f"{i:07d}.jpg").write_bytes(shards.read(i))

    def run(transform: Callable[[Image.Image], Tensor]) -> Pass:
        return lambda: counted(DataLoader(ImageFolder(str(root), transform), batch, shuffle=True))

    files = ImageFolder(str(root))
    return {
        "decode": lambda: sum(1 for _ in files),
        "supervised": run(supervised(size)),
        "simclr": run(simclr(size)),
    }


def litdata_passes(shards: ShardSet, size: int, batch: int, root: Path) -> dict[str, Pass]:
    """litdata, on the same bytes; its loader starts a thread of its own."""
    import litdata

    litdata.optimize(
        fn=partial(_sample, shards),
        inputs=list(range(len(shards))),
        output_dir=str(root),
        chunk_bytes="64MB",
        num_workers=1,
    )
    stored = litdata.StreamingDataset(str(root))

    def run(transform: Callable[[Image.Image], Any]) -> Pass:
        def collate(samples: list[tuple[bytes, int]]) -> list[Tensor]:
            images = [Image.open(io.BytesIO(data)).convert("RGB") for data, _ in samples]
            return [torch.stack([transform(image) for image in images])]

        return lambda: counted(litdata.StreamingDataLoader(stored, batch_size=batch, collate_fn=collate))

    return {"supervised": run(supervised(size)), "simclr": run(simclr(size))}


def _sample(shards: ShardSet, i: int) -> tuple[bytes, int]:
    return shards.read(i), int(shards.labels[i])
