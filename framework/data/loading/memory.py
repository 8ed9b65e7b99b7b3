"""Small sets, decoded once and kept on the device as bytes (``data.cache=memory``)."""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from framework.config.views import Views
from framework.data.augment import crops
from framework.data.loading.decode import BrokenImage, decode
from framework.data.loading.shared_memory import from_workers, to_shared_memory
from framework.data.loading.worker import CropSampler, WorkerBatch
from framework.data.shards.index import ShardSet
from framework.runtime import watchdog
from framework.runtime.errors import UserError

logger = logging.getLogger(__name__)


class Resident:
    """Every image of a set as uint8 on the device, (N, 3, H, W); 50,000 of CIFAR's are 154 MB.

    Order, crop boxes and all other random choices are those of the images on disk. Crops of "cifar" views are
    equal to the bit, resized ones to one gray level (two where the filter clips).

    Attributes:
        images: black where broken.
        broken: sample number and reason.
    """

    def __init__(self, shards: ShardSet, workers: int, device: torch.device) -> None:
        """Decode all; ``workers`` processes share the work.

        Raises:
            UserError: images of different sizes, no whole image, or more than the device holds.
        """
        self.shards, self.device = shards, device
        self.broken: dict[int, str] = {}
        whole: Tensor | None = None
        for sample, image in enumerate(from_workers(_decoded(shards, workers))):
            watchdog.sign()
            if isinstance(image, UserError):
                raise image.alone()
            if isinstance(image, str):
                self.broken[sample] = image
                continue
            if whole is None:
                whole = self._room(image)
            if image.shape != whole.shape[1:]:
                raise UserError(
                    f"data.cache=memory: {shards.folder}: {shards.where(sample)} is {_size(image)} and "
                    f"others are {_size(whole)}; resize them, or set data.cache=none"
                )
            whole[sample] = image
        if whole is None:
            raise UserError(f"{shards.folder}: all {len(shards)} images are broken")
        self.images = self._on_device(whole)

    def sampler(self, views: Views, size: int, views_per_image: int, seed: int) -> CropSampler:
        """The workers' half for these images.

        Raises:
            UserError: "cifar" views of another size than the images, or "none" views.
        """
        height, width = self.images.shape[2:]
        if views.kind == "none" or (views.kind == "cifar" and (height, width) != (size, size)):
            raise UserError(
                f"data.cache=memory: {views.kind} views of {size} pixels need images of that size, and "
                f"{self.shards.folder} has {_size(self.images)}; set data.cache=none"
            )
        return CropSampler(self.shards, views, size, views_per_image, seed, self.broken, height, width)

    def crops(self, drawn: WorkerBatch, views: Views, size: int) -> Tensor:
        """(V*B, 3, size, size) uint8 on the device."""
        boxes = drawn.crops.to(self.device, non_blocking=True)
        samples = drawn.samples.to(self.device, non_blocking=True)
        images = self.images[samples.repeat(len(boxes) // max(1, len(samples)))]
        if views.kind == "cifar":
            return crops.shifted_batch(images, boxes, views.edge)
        return crops.resized_batch(images, boxes, size)

    def _room(self, image: Tensor) -> Tensor:
        try:
            return torch.zeros(len(self.shards), *image.shape, dtype=torch.uint8)
        except RuntimeError as error:
            raise self._too_large(image.numel()) from error

    def _on_device(self, whole: Tensor) -> Tensor:
        try:
            return whole.to(self.device)
        except torch.OutOfMemoryError as error:
            raise self._too_large(whole[0].numel()) from error

    def _too_large(self, each: int) -> UserError:
        size = len(self.shards) * each / 2**30
        return UserError(
            f"data.cache=memory: {self.shards.folder} needs {size:.1f} GiB decoded; set data.cache=none"
        )


class _Whole(Dataset[Tensor | str | UserError]):
    """Sample number to pixels, or to what is wrong with the image."""

    def __init__(self, shards: ShardSet) -> None:
        self.shards = shards

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, sample: int) -> Tensor | str | UserError:
        try:
            return decode(self.shards.read(sample))
        except BrokenImage as error:
            return str(error)
        except UserError as error:
            return error.alone()


def _decoded(shards: ShardSet, workers: int) -> DataLoader[Tensor | str | UserError]:
    return DataLoader(
        _Whole(shards),
        batch_size=None,
        collate_fn=to_shared_memory,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,  # Python 3.14's default would pickle the data
        generator=torch.Generator(),
    )


def _size(images: Tensor) -> str:
    return f"{images.shape[-1]}x{images.shape[-2]}"
