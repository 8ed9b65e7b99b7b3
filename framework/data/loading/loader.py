"""Loaders: the same samples and views for any number of ranks and workers, from any step on.

Jobs (``sample_order.py``) are pure functions of (seed, step, rank) and workers (``worker.py``) keep nothing between
them, so that neither the number of workers nor the first step changes a byte.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from framework.config.views import Views
from framework.data.augment.mixing import Mixer
from framework.data.augment.views import finish_views
from framework.data.batch import Batch
from framework.data.loading.memory import Resident
from framework.data.loading.prefetch import finished
from framework.data.loading.sample_order import Job, TrainJobs, eval_jobs
from framework.data.loading.shared_memory import from_workers, to_shared_memory
from framework.data.loading.worker import CropSampler, Decoder, WorkerBatch, shield
from framework.data.shards.index import ShardSet
from framework.runtime import watchdog
from framework.runtime.errors import UserError

logger = logging.getLogger(__name__)

_FORGIVEN = 10  # broken images below this number never stop a run


class TrainLoader:
    """Endless training data in global steps.

    Position p of epoch e holds sample ``epoch_order(N, seed, e)[p]``. Step k of an epoch takes the
    ``batch_size`` positions from ``k * batch_size`` on; they are cut into ``accumulation`` consecutive
    micro-batches, and each of those into ``world_size`` consecutive parts, one per rank. The last, partial
    batch of an epoch is dropped.

    Attributes:
        steps_per_epoch: whole batches in an epoch.
    """

    def __init__(
        self,
        shards: ShardSet,
        views: Views,
        *,
        image_size: int,
        batch_size: int,
        views_per_image: int,
        accumulation: int,
        rank: int,
        world_size: int,
        seed: int,
        workers: int,
        device: torch.device | str,
        window: int = 0,
        in_memory: bool = False,
        mixer: Mixer | None = None,
        max_broken: float = 0.01,
    ) -> None:
        """
        Args:
            shards: the images.
            views: how views are made.
            image_size: side of a view in pixels.
            batch_size: images per step, over all ranks and micro-batches.
            views_per_image: V; every image comes in V independent views.
            accumulation: micro-batches per step.
            rank: of this process, below ``world_size``.
            world_size: processes that share a batch.
            seed: of order and views, at least 0.
            workers: processes that decode; 0 decodes in this one.
            device: where batches are finished.
            window: samples among which the order is mixed, so that few shards are in use at a time; 0 mixes
                the whole epoch.
            in_memory: decode every image now and keep it on the device.
            mixer: mixes images and labels, of which there is one view.
            max_broken: fraction of the images drawn above which broken ones stop the run.

        Raises:
            UserError: fewer samples than ``batch_size``; it is no multiple of ``world_size * accumulation``, or of
                twice that where images are mixed; a list in ``views`` too short for ``views_per_image``; images that
                cannot be kept in memory (see ``Resident``).
        """
        views.of(views_per_image - 1)
        if batch_size % (world_size * accumulation):
            raise UserError(
                f"batch_size={batch_size} must be a multiple of ranks (a stage's) times micro-batches "
                f"({world_size} x {accumulation} = {world_size * accumulation})"
            )
        if mixer is not None and (count := batch_size // (world_size * accumulation)) % 2:
            raise UserError(
                f"train.batch_size={batch_size}: mixing pairs images, and a rank's micro-batch has {count}; "
                f"must be a multiple of {2 * world_size * accumulation}"
            )
        if len(shards) < batch_size:
            raise UserError(
                f"{shards.folder}: holds {len(shards)} samples, fewer than batch_size={batch_size}"
            )
        self.steps_per_epoch = len(shards) // batch_size
        self._shards, self._views, self._device = shards, views, torch.device(device)
        self._size, self._views_per_image, self._accumulation = image_size, views_per_image, accumulation
        self._jobs = TrainJobs(shards.table.shard, batch_size, accumulation, rank, world_size, seed, window)
        self._resident = Resident(shards, workers, self._device) if in_memory else None
        draw = self._resident.sampler if self._resident else partial(Decoder, shards)
        self._loader = _data_loader(
            draw(views, image_size, views_per_image, seed), self._jobs, workers, self._device
        )
        self._tally, self._mixer = _Tally(shards, max_broken), mixer

    @property
    def skipped(self) -> int:
        """Broken images that this rank has met and replaced so far."""
        return self._tally.broken

    def steps(self, start: int, stop: int) -> Iterator[list[Batch]]:
        """Global steps ``start`` to ``stop - 1``, each as this rank's ``accumulation`` micro-batches.

        Nothing before ``start`` is read. A new call ends the iterator of the previous one.

        Raises:
            UserError: too many broken images; a shard that vanished.
        """
        self._jobs.steps = range(start, stop)
        batches = finished(map(_raised, from_workers(self._loader)), self._images, self._device)
        for step in range(start, stop):
            watchdog.sign()
            yield [self._batch(*next(batches), step, micro) for micro in range(self._accumulation)]

    def _images(self, drawn: WorkerBatch) -> Tensor:
        crops = self._resident.crops(drawn, self._views, self._size) if self._resident else drawn.crops
        return finish_views(self._views, crops, drawn.params, self._device)

    def _batch(self, drawn: WorkerBatch, images: Tensor, step: int, micro: int) -> Batch:
        self._tally.add(drawn)
        labels = _labels(self._shards, drawn.samples, self._device)
        if self._mixer is not None and labels is not None:
            place = step * self._jobs.batch_size
            images, labels = self._mixer.mixed(images, labels, place, place + self._jobs.offset(micro))
        return Batch(images, labels, self._views_per_image)


class EvalLoader:
    """Every sample exactly once over all ranks, in equally many batches on each: (sample numbers, images,
    labels).

    Images are cut by the central crop (``Views.kind`` "none", whatever ``views`` says). Broken images are
    left out. Ranks take turns: batch b of all ranks together is a run of consecutive samples.
    """

    def __init__(
        self,
        shards: ShardSet,
        views: Views,
        *,
        image_size: int,
        batch_size: int,
        rank: int,
        world_size: int,
        workers: int,
        device: torch.device | str,
        max_broken: float = 0.01,
    ) -> None:
        """
        Args:
            shards: the images.
            views: ``center``, ``mean`` and ``std`` count.
            image_size: side in pixels.
            batch_size: images per rank and batch, at most (one more where a rank would else run dry).
            rank: of this process, below ``world_size``.
            world_size: processes that share the samples.
            workers: processes that decode; 0 decodes in this one.
            device: where batches are finished.
            max_broken: fraction of the images above which broken ones stop the run.

        Raises:
            UserError: fewer samples than ranks.
        """
        if len(shards) < world_size:
            raise UserError(
                f"{shards.folder}: holds {len(shards)} samples, fewer than the {world_size} ranks"
            )
        self._shards, self._device = shards, torch.device(device)
        self._views = dataclasses.replace(views, kind="none")
        self._jobs = eval_jobs(shards.table.shard, batch_size, rank, world_size)
        decoder = Decoder(shards, self._views, image_size, views_per_image=1, seed=0)
        self._loader = _data_loader(decoder, self._jobs, workers, self._device)
        self._tally = _Tally(shards, max_broken)

    @property
    def skipped(self) -> int:
        """Broken images that this rank has left out so far."""
        return self._tally.broken

    def __len__(self) -> int:
        return len(self._jobs)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Sample numbers (B,) int64 on the CPU; images (B, 3, S, S) and labels (B,) (or ``None``) on the
        device."""
        for drawn, images in finished(map(_raised, from_workers(self._loader)), self._images, self._device):
            self._tally.add(drawn)
            watchdog.sign()
            yield drawn.samples, images, _labels(self._shards, drawn.samples, self._device)

    def _images(self, drawn: WorkerBatch) -> Tensor:
        return finish_views(self._views, drawn.crops, drawn.params, self._device)


class _Tally:
    """Counts and logs broken images."""

    def __init__(self, shards: ShardSet, max_broken: float) -> None:
        self.shards, self.max_broken = shards, max_broken
        self.drawn = self.broken = 0

    def add(self, drawn: WorkerBatch) -> None:
        """Raises:
        UserError: broken images beyond ``max_broken``.
        """
        self.drawn += len(drawn.samples) + len(drawn.broken)
        self.broken += len(drawn.broken)
        for sample, reason in drawn.broken.items():
            logger.warning("broken image skipped: %s (%s)", self.shards.where(sample), reason)
        if self.broken >= _FORGIVEN and self.broken > self.max_broken * self.drawn:
            raise UserError(
                f"{self.shards.folder}: {self.broken} of {self.drawn} images are broken (named in the log), "
                f"more than {self.max_broken:.1%}"
            )


def _data_loader(
    drawer: Decoder | CropSampler, jobs: Iterable[Job], workers: int, device: torch.device
) -> DataLoader[WorkerBatch | UserError]:
    return DataLoader(
        drawer,
        sampler=jobs,  # one job is one batch: nothing is left to collate
        batch_size=None,
        collate_fn=to_shared_memory,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,  # Python 3.14's default would pickle the data
        worker_init_fn=shield,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # else every iterator would draw from the global one
    )


def _raised(drawn: WorkerBatch | UserError) -> WorkerBatch:
    if isinstance(drawn, UserError):
        raise drawn.alone()  # raising ``drawn`` itself would tie its frame, and the workers, to it
    return drawn


def _labels(shards: ShardSet, samples: Tensor, device: torch.device) -> Tensor | None:
    if not shards.labeled:
        return None
    return torch.from_numpy(shards.labels[samples.numpy()]).to(device, non_blocking=True)
