"""A linear classifier on features, trained by SGD on all ranks; its accuracy."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from framework.data.loading.sample_order import epoch_order
from framework.evaluation.linear_protocols import Protocol
from framework.runtime import distributed, watchdog
from framework.runtime.errors import UserError
from framework.runtime.files import unlocked, write_whole

AT_ONCE = 4096  # rows that are classified at a time
Batches = Iterator[tuple[Tensor, Tensor]]  # features (B, C) and labels (B,) of this rank


class Rows(NamedTuple):
    """This rank's share of a split's features.

    Attributes:
        x: (N, C).
        y: (N,) labels.
    """

    x: Tensor
    y: Tensor

    def batches(self, start: int, protocol: Protocol, seed: int) -> Batches:
        """Endless batches from step ``start`` on, in a new order every epoch."""
        share, per_epoch = protocol.batch_size // distributed.world_size(), self.steps_per_epoch(protocol)
        epoch, skipped = divmod(start, per_epoch)
        while True:
            order = torch.from_numpy(epoch_order(len(self.x), seed, epoch)).to(self.x.device)
            for step in range(skipped, per_epoch):
                rows = order[step * share : (step + 1) * share]
                yield self.x[rows], self.y[rows]
            epoch, skipped = epoch + 1, 0

    def steps_per_epoch(self, protocol: Protocol) -> int:
        """Whole batches that every rank can fill; collective.

        Raises:
            UserError: not even one.
        """
        check_batch(protocol)
        share = protocol.batch_size // distributed.world_size()
        steps = min(int(text) for text in distributed.gather_text(str(len(self.x) // share)))
        if not steps:
            raise UserError(
                f"--batch-size {protocol.batch_size}: more than the {distributed.sum_over_ranks(len(self.x))} "
                f"training images"
            )
        return steps


def check_batch(protocol: Protocol) -> None:
    """Raises:
    UserError: ranks can't share a batch evenly.
    """
    if protocol.batch_size % distributed.world_size():
        raise UserError(
            f"--batch-size {protocol.batch_size}: must be a multiple of the {distributed.world_size()} ranks"
        )


class State:
    """Where a fit stands, in a file: an interrupted one goes on after its last whole epoch.

    Args:
        path: the file.
        settings: what the fit depends on; a file of other settings is not used.
        check: called before each write; raises if somebody else may write.
    """

    def __init__(self, path: Path, settings: dict[str, Any], check: Callable[[], None] = unlocked) -> None:
        self.path, self._settings, self._check = path, json.dumps(settings, sort_keys=True), check

    def load(self) -> tuple[int, dict[str, Tensor]]:
        """Epochs done and the tensors; 0 and none without a file that fits."""
        try:
            with safe_open(self.path, "pt") as file:
                metadata = file.metadata()
                if metadata["settings"] == self._settings:
                    return int(metadata["epoch"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError):
            pass
        return 0, {}

    def save(self, epoch: int, tensors: dict[str, Tensor]) -> None:
        """Replace the file by one for ``epoch`` epochs done."""
        self._check()
        write_whole(self.path, save(tensors, {"settings": self._settings, "epoch": str(epoch)}))


def fit(
    batches: Callable[[int], Batches],
    steps_per_epoch: int,
    sizes: tuple[int, int],
    protocol: Protocol,
    *,
    like: Tensor,
    state: State | None = None,
    on_epoch: Callable[[int, float], None] = lambda epoch, loss: None,
) -> nn.Linear:
    """Train a linear classifier; all ranks must call it, and end with the same one.

    Args:
        batches: this rank's batches from a step on.
        steps_per_epoch: steps, the same on every rank.
        sizes: features C and classes K.
        protocol: optimizer, schedule and length.
        like: gives device and type of the weights.
        state: where to save after every epoch, and to go on from.
        on_epoch: told the epochs done and the last mean loss of this rank.

    Raises:
        UserError: the loss is not finite, or the state can't be written.
    """
    classifier = _classifier(*sizes, like)
    start, tensors = state.load() if state else (0, {})
    start = min(int(text) for text in distributed.gather_text(str(start)))  # a rank may not see the file
    parameters = list(classifier.parameters())
    momenta = [torch.zeros_like(p) for p in parameters]
    names = ["weight", "bias", "weight momentum", "bias momentum"]
    if start:
        for name, place in zip(names, [*parameters, *momenta], strict=True):
            place.data.copy_(tensors[name])
    optimizer = torch.optim.SGD(parameters, 1.0, momentum=protocol.momentum, nesterov=protocol.nesterov)
    if protocol.momentum:
        for p, momentum in zip(parameters, momenta, strict=True):
            optimizer.state[p]["momentum_buffer"] = momentum
    stream = batches(start * steps_per_epoch)
    for epoch in range(start, protocol.epochs):
        losses = torch.zeros((), device=like.device)
        for step in range(epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch):
            x, y = next(stream)
            watchdog.sign()
            loss = nn.functional.cross_entropy(classifier(x), y)
            gradients = torch.autograd.grad(loss, parameters)
            for p, gradient in zip(parameters, gradients, strict=True):
                p.grad = distributed.mean_over_ranks(gradient)
            optimizer.param_groups[0]["lr"] = protocol.learning_rate(step, steps_per_epoch)
            optimizer.step()
            losses += loss.detach()
        mean = float(losses) / steps_per_epoch
        _check_finite(mean, epoch)
        if state:
            with distributed.same_outcome():
                if distributed.is_main():
                    places = zip(names, [*parameters, *momenta], strict=True)
                    state.save(epoch + 1, {name: place.detach().cpu() for name, place in places})
        on_epoch(epoch + 1, mean)
    return classifier


@torch.no_grad()
def accuracy(classifier: nn.Linear, rows: Rows) -> dict[str, float]:
    """Top-1, and top-5 where there are more classes, in per cent over all ranks.

    Args:
        classifier: the same on all ranks.
        rows: this rank's share of the test split.
    """
    ranks = (1, 5) if classifier.out_features > 5 else (1,)
    right, total = dict.fromkeys(ranks, 0), 0
    for x, y in zip(rows.x.split(AT_ONCE), rows.y.split(AT_ONCE), strict=True):
        best = classifier(x).topk(max(ranks)).indices == y[:, None]
        total += len(y)
        for k in ranks:
            right[k] += int(best[:, :k].sum())
    whole = distributed.sum_over_ranks(total)
    return {f"top{k}": 100 * distributed.sum_over_ranks(right[k]) / whole for k in ranks}


def evaluate_rows(
    train: Rows,
    test: Rows,
    classes: int,
    protocol: Protocol,
    seed: int,
    on_epoch: Callable[[int, float], None] = lambda epoch, loss: None,
) -> dict[str, float]:
    """The fast mode: fit on features that are computed once, without augmentation; ``accuracy`` on ``test``.

    Raises:
        UserError: as ``fit``, or fewer rows than a batch.
    """
    classifier = fit(
        lambda start: train.batches(start, protocol, seed),
        train.steps_per_epoch(protocol),
        (train.x.shape[1], classes),
        protocol,
        like=train.x,
        on_epoch=on_epoch,
    )
    return accuracy(classifier, test)


def _classifier(features: int, classes: int, like: Tensor) -> nn.Linear:
    """Normal weights of deviation 0.01 and no bias, as MoCo and SimCLR start."""
    classifier = nn.Linear(features, classes, device=like.device, dtype=like.dtype)
    generator = torch.Generator().manual_seed(0)
    classifier.weight.data.copy_(0.01 * torch.randn(classes, features, generator=generator, dtype=like.dtype))
    nn.init.zeros_(classifier.bias)
    return classifier


def _check_finite(loss: float, epoch: int) -> None:
    """The loss is this rank's, the error everyone's."""
    with distributed.same_outcome():
        if not math.isfinite(loss):
            raise UserError(f"the classifier's loss is {loss} in epoch {epoch + 1}: lower --lr")
