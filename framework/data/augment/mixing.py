"""Mixup and CutMix: timm's, on pairs of neighbors, with random numbers that depend on the place in the data alone."""

from __future__ import annotations

import torch
from timm.data.mixup import Mixup
from torch import Tensor

from framework.config.mixing import Mixing
from framework.data.augment.drawing import generators_kept, seed_generators

_MIXING_STREAM = 2  # second word of the key; the order of an epoch uses 0, views 1


class Mixer:
    """Mixes the images of a step, and their labels.

    A function of the seed and of the images' places in the training, so every number of ranks and micro-batches, and a
    run that goes on, make the same of them. Nothing waits for the device.

    Args:
        mixing: the recipe's.
        classes: number of classes.
        seed: of the run.
    """

    def __init__(self, mixing: Mixing, classes: int, seed: int) -> None:
        self.by_pair, self._seed = mixing.mode == "pair", seed
        self._mixup = Mixup(
            mixing.mixup,
            mixing.cutmix,
            prob=mixing.probability,
            switch_prob=mixing.switch,
            mode="batch",  # of what it is given
            label_smoothing=0.0,  # the objective's
            num_classes=classes,
        )

    def mixed(self, images: Tensor, labels: Tensor, step: int, place: int) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) and labels (B, classes) that add up to 1.

        Args:
            images: (B, 3, H, W) with B even; overwritten.
            labels: (B,) int64.
            step: first place of the step in the training, counted in images.
            place: that of the first of these images, a multiple of 2.
        """
        if not self.by_pair:
            with generators_kept():
                seed_generators(self._seed, _MIXING_STREAM, step)
                order = _mirrored(len(images), images.device)
                mixed, targets = self._mixup(images[order], labels[order])
            back = order.argsort()
            return mixed[back], targets[back]
        targets = []
        with generators_kept():
            for row in range(0, len(images), 2):
                seed_generators(self._seed, _MIXING_STREAM, place + row)
                pair = slice(row, row + 2)
                images[pair], target = self._mixup(images[pair], labels[pair])
                targets.append(target)
        return images, torch.cat(targets)


def _mirrored(n: int, device: torch.device) -> Tensor:
    """An order of n rows that puts neighbors as far from its one end as from the other, since timm mixes those."""
    return torch.cat([torch.arange(0, n, 2, device=device), torch.arange(1, n, 2, device=device).flip(0)])
