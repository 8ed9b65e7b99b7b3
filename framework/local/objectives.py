"""Objectives: the losses of what a head's trunk gives."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from framework.data.batch import Batch
from framework.local.needs import Need
from framework.runtime import distributed
from framework.runtime.errors import UserError


class Objective(nn.Module):
    """``objective(outputs, batch)`` is a scalar loss; outputs are logits or embeddings (V*B, D), view-major.

    Attributes:
        needs: what the loss uses besides the outputs.
        contrasts: whether it compares the images of a batch with each other.
        fewest_images: of all ranks together, from which there is something to learn.
        classifies: whether the outputs are logits of the classes.
        soft_labels: whether labels may be (B, classes), as of mixed images.
    """

    needs: frozenset[Need] = frozenset()
    contrasts: bool = False
    fewest_images: int = 1
    classifies: bool = False
    soft_labels: bool = False

    def start_step(self) -> None:
        """Called before the first micro-batch of an optimizer step."""

    def end_step(self, taken: Tensor | float) -> None:
        """Called after the last one; see ``Head.before_step``."""


class CrossEntropy(Objective):
    """Cross entropy of logits (B, classes) against ``batch.labels``, (B,) or (B, classes).

    Args:
        smoothing: part s of the target that all classes share equally, (1 - s) target + s / classes (Szegedy et al.
            2016, section 7).
    """

    needs = frozenset({Need.LABELS})
    classifies = True
    soft_labels = True

    def __init__(self, smoothing: float = 0.0) -> None:
        super().__init__()
        self.smoothing = smoothing

    def forward(self, logits: Tensor, batch: Batch) -> Tensor:
        """Scalar loss, in float32 or better.

        Raises:
            UserError: the batch has no labels.
        """
        logits, labels = _at_least_float32(logits), _labels(batch)
        if labels.is_floating_point():
            labels = labels.to(logits.dtype)
        return F.cross_entropy(logits, labels, label_smoothing=self.smoothing)


class InfoNCE(Objective):
    """NT-Xent (SimCLR Eq. 1; LoCo Eq. 1 for one query) with the negatives of all ranks.

    Every view of every image is an anchor, the other view of the image its positive, and all other embeddings of the
    global batch are its negatives; the mean is over this rank's anchors.

    Args:
        temperature: tau, 0.1 on ImageNet (SimCLR Table 5).
        form: "symmetric": the mean over all anchors. "sum": the sum of the means over the first and over the second
            views, as in SimCLR's code, which is twice as much. "one_sided": the mean over the first views. LoCo
            doesn't say which.
        gather_grad: the gradient flows through the embeddings of other ranks, so that the mean over ranks is
            the loss of the whole batch, as in SimCLR's code; otherwise those embeddings are constants.
    """

    needs = frozenset({Need.VIEWS})
    contrasts = True
    fewest_images = 2

    def __init__(
        self,
        temperature: float = 0.1,
        form: Literal["symmetric", "sum", "one_sided"] = "symmetric",
        gather_grad: bool = True,
    ) -> None:
        super().__init__()
        self.temperature, self.form, self.gather_grad = temperature, form, gather_grad

    def forward(self, embeddings: Tensor, batch: Batch) -> Tensor:
        """Embeddings (2B, D), views stacked view-major, not yet normalized -> scalar loss."""
        with torch.autocast(embeddings.device.type, enabled=False):
            z = F.normalize(_at_least_float32(embeddings), dim=1)
            everyone = self._everyone(z)
            anchors = torch.arange(len(z) // 2 if self.form == "one_sided" else len(z), device=z.device)
            logits = z[: len(anchors)] @ everyone.T / self.temperature
            offset = distributed.rank() * len(z)
            itself = F.one_hot(anchors + offset, len(everyone)).bool()
            positives = (anchors + len(z) // 2) % len(z) + offset
            loss = F.cross_entropy(logits.masked_fill(itself, -torch.inf), positives)
            return 2 * loss if self.form == "sum" else loss

    def _everyone(self, z: Tensor) -> Tensor:
        if self.gather_grad:
            return distributed.gather_with_gradient(z)
        parts = list(distributed.gather_with_gradient(z.detach()).split(len(z)))
        parts[distributed.rank()] = z
        return torch.cat(parts)


class SupCon(Objective):
    """Supervised contrast (Khosla et al. 2020, L_out): all samples of the same class are positives.

    Over the global batch, like ``InfoNCE``; anchors whose class occurs once do not count.

    Args:
        temperature: tau; 0.07 in InfoPro's code.
    """

    needs = frozenset({Need.LABELS})
    contrasts = True
    fewest_images = 3  # an anchor, its positive, and a negative

    def __init__(self, temperature: float = 0.07) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, embeddings: Tensor, batch: Batch) -> Tensor:
        """Embeddings (B, D), not yet normalized -> scalar loss.

        Raises:
            UserError: the batch has no labels.
        """
        own_labels = _labels(batch)
        with torch.autocast(embeddings.device.type, enabled=False):
            z = F.normalize(_at_least_float32(embeddings), dim=1)
            everyone, labels = (
                distributed.gather_with_gradient(z),
                distributed.gather_with_gradient(own_labels),
            )
            offset = distributed.rank() * len(z)
            itself = F.one_hot(torch.arange(len(z), device=z.device) + offset, len(everyone)).bool()
            positive = (own_labels[:, None] == labels[None, :]) & ~itself
            logits = (z @ everyone.T / self.temperature).masked_fill(itself, -torch.inf)
            logs = F.log_softmax(logits, dim=1).masked_fill(~positive, 0.0)
            per_anchor = -logs.sum(1) / positive.sum(1).clamp_min(1)
            # Ranks may have different numbers of anchors that count; the mean over ranks must be the global mean.
            counting = ((labels[:, None] == labels[None, :]).sum(1) > 1).sum().clamp_min(1)
            return per_anchor.sum() * distributed.world_size() / counting


class BarlowTwins(Objective):
    """Distance between two views' cross-correlation, over the global batch, and 1 (Zbontar et al. 2021, Eq. 1).

    Args:
        redundancy: lambda, 0.0051 as published.
    """

    needs = frozenset({Need.VIEWS})
    contrasts = True
    fewest_images = 3  # two are standardized to 1 and -1, whatever they are

    def __init__(self, redundancy: float = 0.0051) -> None:
        super().__init__()
        self.redundancy = redundancy

    def forward(self, embeddings: Tensor, batch: Batch) -> Tensor:
        """Embeddings (2B, D), views stacked view-major -> scalar loss, the same on every rank."""
        with torch.autocast(embeddings.device.type, enabled=False):
            a, b = (_standardized(z) for z in _two_views(embeddings))
            correlation = a.T @ b / len(a)
            diagonal = correlation.diagonal()
            off_diagonal = correlation.square().sum() - diagonal.square().sum()
            return (1 - diagonal).square().sum() + self.redundancy * off_diagonal


class VICReg(Objective):
    """Invariance, variance and covariance (Bardes et al. 2022, Eqs. 1-6), of the global batch.

    Args:
        invariance: weight of the mean squared distance between the views; 25 as published.
        variance: weight of the hinge on every dimension's standard deviation; 25.
        covariance: weight of the squared covariances between dimensions; 1.
    """

    needs = frozenset({Need.VIEWS})
    contrasts = True
    fewest_images = 2

    def __init__(self, invariance: float = 25.0, variance: float = 25.0, covariance: float = 1.0) -> None:
        super().__init__()
        self.invariance, self.variance, self.covariance = invariance, variance, covariance

    def forward(self, embeddings: Tensor, batch: Batch) -> Tensor:
        """Embeddings (2B, D), views stacked view-major -> scalar loss, the same on every rank."""
        with torch.autocast(embeddings.device.type, enabled=False):
            views = _two_views(embeddings)
            loss = self.invariance * F.mse_loss(*views)
            for z in views:
                centered = z - z.mean(0)
                covariance = centered.T @ centered / (len(z) - 1)
                variances = covariance.diagonal()
                hinge = F.relu(1 - (variances + 1e-4).sqrt()).mean()
                off_diagonal = covariance.square().sum() - variances.square().sum()
                loss = loss + self.variance * hinge / 2 + self.covariance * off_diagonal / z.shape[1]
            return loss


def _labels(batch: Batch) -> Tensor:
    if batch.labels is None:
        raise UserError("a supervised head needs labels, and the batch has none")
    return batch.labels


def _two_views(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """The global batch: (2B, D) of this rank -> twice (world * B, D)."""
    everyone = distributed.gather_with_gradient(_at_least_float32(embeddings))
    by_view = everyone.unflatten(0, (distributed.world_size(), 2, -1))
    return by_view[:, 0].flatten(0, 1), by_view[:, 1].flatten(0, 1)


def _standardized(z: Tensor) -> Tensor:
    return (z - z.mean(0)) / (z.var(0, unbiased=False) + 1e-5).sqrt()


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
