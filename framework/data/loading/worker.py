"""The workers' half of loading: from a job to uint8 crops, or to boxes where images lie decoded in memory."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from framework.config.views import Views
from framework.data.augment.views import (
    AugmentParams,
    augment_params,
    crop_box,
    crop_view,
    draw_uniforms,
)
from framework.data.loading.decode import BrokenImage, decode
from framework.data.loading.sample_order import Job
from framework.data.shards.index import ShardSet
from framework.runtime.errors import UserError

T = TypeVar("T")


class WorkerBatch(NamedTuple):
    """What a worker makes of a job.

    Attributes:
        crops: (V*B, 3, S, S) uint8, view-major; of ``CropSampler`` (V*B, 4) int64, the boxes to cut.
        params: of the device's half, for V*B images.
        samples: (B,) int64, the sample numbers used.
        broken: sample number and reason of every image that was passed over.
    """

    crops: Tensor
    params: AugmentParams
    samples: Tensor
    broken: dict[int, str]


def shield(worker: int) -> None:
    """Let only the training process end this worker.

    Slurm signals all processes of a job. Without its workers a rank could not finish its step, and they are told to
    end when it does. Only a thread that waits for a signal learns who sent it.
    """
    numbers = {signal.SIGTERM, signal.SIGUSR1}
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    threading.Thread(target=_await_parent, args=(numbers,), daemon=True).start()


def _await_parent(numbers: set[signal.Signals]) -> None:
    while signal.sigwaitinfo(numbers).si_pid != os.getppid():
        pass
    os._exit(0)


class Decoder(Dataset[WorkerBatch | UserError]):
    """Maps a job to its crops; keeps nothing between jobs.

    A ``UserError`` is returned: raised in a worker it would arrive with a traceback for its text.
    """

    def __init__(self, shards: ShardSet, views: Views, size: int, views_per_image: int, seed: int) -> None:
        self.shards, self.views, self.size = shards, views, size
        self.views_per_image, self.seed = views_per_image, seed
        self.by_view = [views.of(view) for view in range(views_per_image)]

    def __getitem__(self, job: Job) -> WorkerBatch | UserError:
        self.shards.prefetch(job.ahead)
        draws: Draws[Tensor] = Draws(job, self.views_per_image, self.seed)
        crops = np.empty((self.views_per_image, job.size, 3, self.size, self.size), np.uint8)
        try:
            for row, image in draws.images(lambda sample: decode(self.shards.read(sample)), self.shards):
                for view, (views, uniforms) in enumerate(
                    zip(self.by_view, draws.uniforms[:, row], strict=True)
                ):
                    crops[view, row] = crop_view(views, image, self.size, uniforms).numpy()
        except UserError as error:
            return error.alone()
        return draws.done(self.views, crops)


class CropSampler(Dataset[WorkerBatch | UserError]):
    """Maps a job to boxes in images that all have one size and lie decoded elsewhere; else like ``Decoder``.

    Args:
        shards: where they came from.
        broken: sample number and reason of those that could not be decoded.
        height: of the images.
        width: of the images.
    """

    def __init__(
        self,
        shards: ShardSet,
        views: Views,
        size: int,
        views_per_image: int,
        seed: int,
        broken: dict[int, str],
        height: int,
        width: int,
    ) -> None:
        self.shards, self.views, self.size = shards, views, size
        self.views_per_image, self.seed = views_per_image, seed
        self.broken, self.height, self.width = broken, height, width

    def __getitem__(self, job: Job) -> WorkerBatch | UserError:
        draws: Draws[None] = Draws(job, self.views_per_image, self.seed)
        boxes = np.empty((self.views_per_image, job.size, 4), np.int64)
        try:
            for row, _ in draws.images(self._present, self.shards):
                for view, uniforms in enumerate(draws.uniforms[:, row]):
                    boxes[view, row] = crop_box(self.views, self.height, self.width, self.size, uniforms)
        except UserError as error:
            return error.alone()
        return draws.done(self.views, boxes)

    def _present(self, sample: int) -> None:
        if sample in self.broken:
            raise BrokenImage(self.broken[sample])


class Draws(Generic[T]):
    """The rows of one job as they fill: which sample each took, its random numbers, what was passed over."""

    def __init__(self, job: Job, views_per_image: int, seed: int) -> None:
        self.job = job
        # By place in the job, moved up to the row where places before it are left out.
        self.uniforms = np.stack(
            [draw_uniforms(seed, job.epoch, view, job.first, job.size) for view in range(views_per_image)]
        )
        self.samples: list[int] = []
        self.broken: dict[int, str] = {}

    def images(self, fetch: Callable[[int], T], shards: ShardSet) -> Iterator[tuple[int, T]]:
        """Row and ``fetch(sample)`` of every position of the job.

        A position whose image is broken takes the next that is whole; where a job has no spare samples
        (evaluation) it is left out.

        Raises:
            UserError: all spares broken.
        """
        spares = len(self.job.samples) - self.job.size
        for place in range(self.job.size):
            for sample in self.job.samples[place : place + 1 + spares].tolist():
                try:
                    image = fetch(sample)
                except BrokenImage as error:
                    self.broken[sample] = str(error)
                    continue
                row = len(self.samples)
                self.uniforms[:, row] = self.uniforms[:, place]
                self.samples.append(sample)
                yield row, image
                break
            else:
                if spares:
                    where, reason = shards.where(sample), self.broken[sample]
                    raise UserError(
                        f"{shards.folder}: {spares} broken images in a row, last {where} ({reason})"
                    )

    def done(self, views: Views, crops: np.ndarray) -> WorkerBatch:
        """What the job came to; of ``crops`` (V, B, ...) the rows that were filled count."""
        whole = slice(len(self.samples))
        params = augment_params(views, self.uniforms[:, whole])
        flat = torch.from_numpy(crops[:, whole].reshape(-1, *crops.shape[2:]))
        return WorkerBatch(flat, params, torch.tensor(self.samples, dtype=torch.int64), self.broken)
