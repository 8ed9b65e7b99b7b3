"""The workers' half of loading: from a job to uint8 crops."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from framework.data.index import ShardSet
from framework.data.order import Job
from framework.data.views import CHANCES, BrokenImage, Look, Views, chances, decode
from framework.errors import UserError


class Crops(NamedTuple):
    """What a worker makes of a job.

    Attributes:
        pixels: [V*B, 3, S, S] uint8, view-major.
        look: parameters of the device half, for V*B images.
        samples: [B] int64, the sample numbers used.
        broken: sample number and reason of every image that was passed over.
    """

    pixels: Tensor
    look: Look
    samples: Tensor
    broken: dict[int, str]


class Decoder(Dataset[Crops | UserError]):
    """Maps a job to its crops; keeps nothing between jobs."""

    def __init__(self, shards: ShardSet, views: Views, size: int, views_per_image: int, seed: int) -> None:
        self.shards, self.views, self.size = shards, views, size
        self.views_per_image, self.seed = views_per_image, seed

    def __getitem__(self, job: Job) -> Crops | UserError:
        """A ``UserError`` is returned: raised in a worker it would arrive with a traceback for its text."""
        try:
            return self._crops(job)
        except UserError as error:
            return error

    def _crops(self, job: Job) -> Crops:
        broken: dict[int, str] = {}
        pixels = np.empty((self.views_per_image, job.size, 3, self.size, self.size), np.uint8)
        chance = np.empty((self.views_per_image, job.size, CHANCES))
        used: list[int] = []
        for position, sample, image in self._images(job, broken):
            for view in range(self.views_per_image):
                chance[view, len(used)] = chances(self.seed, job.epoch, position, view)
                pixels[view, len(used)] = self.views.crop(image, self.size, chance[view, len(used)])
            used.append(sample)
        whole = slice(len(used))
        look = self.views.look(chance[:, whole].reshape(-1, CHANCES))
        flat = torch.from_numpy(pixels[:, whole].reshape(-1, 3, self.size, self.size))
        return Crops(flat, look, torch.tensor(used, dtype=torch.int64), broken)

    def _images(self, job: Job, broken: dict[int, str]) -> Iterator[tuple[int, int, Image.Image]]:
        """Position, sample number and image of every sample; what gave way is added to ``broken``."""
        spares = len(job.samples) - job.size
        for row in range(job.size):
            for sample in job.samples[row : row + 1 + spares].tolist():
                try:
                    image = decode(self.shards.read(sample))
                except BrokenImage as error:
                    broken[sample] = str(error)
                else:
                    yield job.first + row, sample, image
                    break
            else:
                if spares:
                    where, reason = self.shards.where(sample), broken[sample]
                    raise UserError(
                        f"{self.shards.folder}: {spares} broken images in a row, last {where} ({reason})"
                    )
