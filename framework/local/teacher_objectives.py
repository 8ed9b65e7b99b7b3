"""Objectives of two views of which one is a target without gradient: the teacher's, or in SimSiam the network's own.

Their ``form`` says which views learn from which. "one_sided": the first view from the last. "symmetric": the last
from the first, too, and the loss is the mean of both; "sum": it is their sum.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from framework.data.batch import Batch
from framework.local.needs import Need
from framework.local.objectives import Objective
from framework.runtime import distributed
from framework.runtime.errors import UserError

Form = Literal["symmetric", "sum", "one_sided"]


class MoCo(Objective):
    """InfoNCE with the teacher's embedding as positive and a queue of earlier ones as negatives (He et al. 2020).

    The mean over this rank's queries of -log(exp(q k / tau) / (exp(q k / tau) + sum_j exp(q n_j / tau))), Eq. 1. After
    the step the teacher's embeddings of all ranks and micro-batches enter the queue, in the order of the images.

    Every rank has a copy of it: 4 bytes x size x dim, 32 MiB as published. Keeping only a part on each rank took as
    long, and four times as many bytes exchanged, to save 64 of the 128 MiB that four units have on two ranks.

    Args:
        dim: of the embeddings.
        size: of the queue; 65,536 as published.
        temperature: tau; 0.07 in MoCo v1, 0.2 in v2.
        form: see above; "one_sided" as published.
    """

    needs = frozenset({Need.TEACHER, Need.VIEWS})

    def __init__(
        self, dim: int, size: int = 65536, temperature: float = 0.2, form: Form = "one_sided"
    ) -> None:
        super().__init__()
        self.temperature, self.form = temperature, form
        self.queue: Tensor
        self.oldest: Tensor
        self.register_buffer("queue", F.normalize(torch.randn(size, dim), dim=1))
        self.register_buffer("oldest", torch.zeros((), dtype=torch.int64))
        self._entering: list[Tensor] = []

    def forward(self, embeddings: Tensor, batch: Batch) -> Tensor:
        """Embeddings (N, D) and as many of the teacher, not yet normalized -> scalar loss.

        Raises:
            UserError: the queue is smaller than a step's keys.
        """
        with torch.autocast(embeddings.device.type, enabled=False):
            q, k = _normalized(embeddings), _normalized(_targets(batch))
            if self.training and torch.is_grad_enabled():
                self._enter(k)
            positive = (q * _opposite(k, self.form)).sum(1, keepdim=True)
            logits = torch.cat([positive, q @ self.queue.to(q.dtype).T], 1) / self.temperature
            return _scaled(-F.log_softmax(logits, dim=1)[:, 0].mean(), self.form)

    def start_step(self) -> None:
        """Forget keys of micro-batches that no step followed."""
        self._entering = []

    @torch.no_grad()
    def end_step(self, taken: Tensor | float) -> None:
        """Put the keys in place of the oldest ones, unless the step is skipped."""
        if not self._entering:
            return
        keys = torch.cat(self._entering).to(self.queue.dtype)
        rows = (self.oldest + torch.arange(len(keys), device=keys.device)) % len(self.queue)
        take = keys.new_ones(()) * taken > 0
        self.queue[rows] = torch.where(take, keys, self.queue[rows])
        self.oldest.copy_((self.oldest + take * len(keys)) % len(self.queue))
        self._entering = []

    def _enter(self, keys: Tensor) -> None:
        by_image = keys.unflatten(0, (1 if self.form == "one_sided" else 2, -1)).transpose(0, 1).flatten(0, 1)
        self._entering.append(distributed.gather_with_gradient(by_image))
        count = sum(map(len, self._entering))
        if count > len(self.queue):
            raise UserError(
                f"method.head.queue={len(self.queue)}: must be at least {count}, the keys of a step"
            )


class MoCoV3(Objective):
    """InfoNCE of predictions q, with the teacher's embeddings of the global batch as positives and negatives.

    Chen, Xie and He 2021, Algorithm 1: 2 tau times the cross entropy of q k / tau, without a queue.

    Args:
        temperature: tau; 1.0 for ResNet-50 and 0.2 for ViT in the authors' code.
        form: see above; "sum" as published.
    """

    needs = frozenset({Need.TEACHER, Need.VIEWS})
    contrasts = True

    def __init__(self, temperature: float = 1.0, form: Form = "sum") -> None:
        super().__init__()
        self.temperature, self.form = temperature, form

    def forward(self, predictions: Tensor, batch: Batch) -> Tensor:
        """Predictions (N, D) and as many embeddings of the teacher, not yet normalized -> scalar loss."""
        with torch.autocast(predictions.device.type, enabled=False):
            q, k = _normalized(predictions), _normalized(_targets(batch))
            directions = 1 if self.form == "one_sided" else 2
            keys = _opposite(k, self.form).chunk(directions)
            losses = [
                self._contrast(own, other) for own, other in zip(q.chunk(directions), keys, strict=True)
            ]
            return _scaled(2 * self.temperature * torch.stack(losses).mean(), self.form)

    def _contrast(self, q: Tensor, k: Tensor) -> Tensor:
        logits = q @ distributed.gather_with_gradient(k).T / self.temperature
        return F.cross_entropy(logits, torch.arange(len(q), device=q.device) + distributed.rank() * len(q))


class BYOL(Objective):
    """Squared distance of normalized predictions and teacher's embeddings, 2 - 2 cos (Grill et al. 2020, Eqs. 2, 3).

    Args:
        form: see above; "sum" as published.
    """

    needs = frozenset({Need.TEACHER, Need.VIEWS})

    def __init__(self, form: Form = "sum") -> None:
        super().__init__()
        self.form = form

    def forward(self, predictions: Tensor, batch: Batch) -> Tensor:
        """Predictions (N, D) and as many embeddings of the teacher -> scalar loss."""
        with torch.autocast(predictions.device.type, enabled=False):
            p, z = _normalized(predictions), _normalized(_targets(batch))
            return _scaled(2 - 2 * (p * _opposite(z, self.form)).sum(1).mean(), self.form)


class SimSiam(Objective):
    """Negative cosine of one view's prediction and the other's embedding without gradient (Chen and He 2021, Eq. 2).

    Args:
        predictor: (N, D) -> (N, D).
        form: see above; "symmetric" as published.
    """

    needs = frozenset({Need.VIEWS})

    def __init__(self, predictor: nn.Module, form: Form = "symmetric") -> None:
        super().__init__()
        self.predictor, self.form = predictor, form

    def forward(self, embeddings: Tensor, batch: Batch) -> Tensor:
        """Embeddings (2B, D), views stacked view-major -> scalar loss."""
        first, last = embeddings.chunk(2)
        one_sided = self.form == "one_sided"
        predictions = self.predictor(first if one_sided else embeddings)
        targets = last.detach() if one_sided else torch.cat([last, first]).detach()
        with torch.autocast(embeddings.device.type, enabled=False):
            cosines = (_normalized(predictions) * _normalized(targets)).sum(1)
            return _scaled(-cosines.mean(), self.form)


def _targets(batch: Batch) -> Tensor:
    if batch.teacher is None:
        raise UserError("an objective with a teacher needs batch.teacher, and the batch has none")
    return batch.teacher


def _opposite(targets: Tensor, form: Form) -> Tensor:
    """What each row is to resemble: the other view."""
    return targets if form == "one_sided" else targets.roll(len(targets) // 2, 0)


def _scaled(mean: Tensor, form: Form) -> Tensor:
    return 2 * mean if form == "sum" else mean


def _normalized(x: Tensor) -> Tensor:
    return F.normalize(x.float() if x.dtype in (torch.float16, torch.bfloat16) else x, dim=1)
