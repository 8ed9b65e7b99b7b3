"""Features of images: the loop that computes them, and their way from all ranks to rank 0.

The encoder runs in evaluation mode and gets its own modes back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from framework.execution import LocalNetwork
from framework.network import Segment
from framework.runtime import distributed
from framework.runtime.errors import UserError

EvalBatches = Iterable[tuple[Tensor, Tensor, Tensor | None]]  # sample numbers (B,), images, labels (B,)
Encode = Callable[[Tensor], Tensor]  # images (B, 3, H, W) -> features (B, ...)


class Features(NamedTuple):
    """Features of images.

    Attributes:
        numbers: (N,) of the images in their split.
        x: (N, ...) features.
        y: (N,) labels.
    """

    numbers: Tensor
    x: Tensor
    y: Tensor


def extract(encode: Encode, loader: EvalBatches) -> Features:
    """Features of this rank's images, in the order of the loader, which may be empty.

    Raises:
        UserError: the split has no labels. Errors of the loader, which other ranks don't meet, name this rank.
    """
    indices, rows, labels = [], [], []
    for index, images, target in _named(loader):
        if target is None:
            raise UserError("evaluation needs labels, and the shards have none")
        indices.append(index)
        rows.append(encode(images))
        labels.append(target)
    none = torch.empty(0, dtype=torch.int64)
    return Features(
        torch.cat(indices or [none]), torch.cat(rows or [torch.empty(0, 0)]), torch.cat(labels or [none])
    )


def network_features(net: LocalNetwork, loader: EvalBatches) -> tuple[Tensor, Tensor]:
    """Pooled features of every image of a split, in the order of the split.

    Args:
        net: the network, the same on all ranks.
        loader: this rank's share of the split.

    Returns:
        On rank 0: features (N, C) float32 and labels (N,). Elsewhere: no rows.

    Raises:
        UserError: as ``extract``.
    """
    with evaluating(net):
        return _on_main(extract(net.features, in_step(net, loader)))


def pixel_features(loader: EvalBatches) -> tuple[Tensor, Tensor]:
    """As ``network_features``, but the features are the images themselves (N, 3*H*W): what an encoder has to beat."""
    return _on_main(extract(lambda images: images.flatten(1), loader))


@torch.no_grad()
def segment_outputs(net: LocalNetwork, segments: Sequence[Segment], images: Tensor) -> list[Tensor]:
    """Every segment's output (N, C, H, W) for images (N, 3, S, S), in the network's precision."""
    outputs = []
    x = images.to(memory_format=net.layout)
    with net.autocast(x):
        for segment in segments:
            x = segment(x)
            outputs.append(segment.to_map(x))
    return outputs


def in_step(net: LocalNetwork, loader: EvalBatches) -> EvalBatches:
    """The loader's batches. Where each needs weights of all ranks, a rank without more takes part until the last."""
    if not net.in_slices:
        yield from loader
        return
    batches = iter(loader)
    while True:
        batch = next(batches, None)
        if not distributed.any_over_ranks(torch.tensor(batch is not None, device=distributed.device())):
            return
        if batch is None:
            net.accompany()
        else:
            yield batch


@contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every module has the mode it had, frozen ones among them."""
    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def averaged(net: LocalNetwork) -> Iterator[LocalNetwork]:
    """The network with its averaged weights inside, if it has some; afterwards it has its own again."""
    if net.average is not None:
        net.average.exchange(net)
    try:
        yield net
    finally:
        if net.average is not None:
            net.average.exchange(net)


def check_usable(train_x: Tensor, train_y: Tensor, test_x: Tensor) -> None:
    """Refuse features (N, C) that no classifier could be fitted to or tested on.

    Raises:
        UserError: a split is empty, features are not finite, or all training labels are the same.
    """
    for split, x in (("training", train_x), ("test", test_x)):
        if not len(x):
            raise UserError(f"there are no {split} images to evaluate")
        if broken := int((~x.isfinite()).any(1).sum()):
            raise UserError(
                f"features of {broken} of {len(x)} {split} images are not finite: training diverged"
            )
    if len(train_y.unique()) < 2:
        raise UserError(f"all {len(train_y)} training images have label {int(train_y[0])}: one class only")


def _named(loader: EvalBatches) -> EvalBatches:
    with distributed.own_errors():
        yield from loader


def _on_main(found: Features) -> tuple[Tensor, Tensor]:
    """Features of all ranks as float32, and labels, on rank 0, sorted by number."""
    numbers, x, y = (_to_main(t.to(distributed.device())) for t in (found.numbers, found.x.float(), found.y))
    order = numbers.argsort()
    return x[order], y[order]


def _to_main(x: Tensor) -> Tensor:
    """Rows of all ranks on rank 0, none elsewhere; ranks may hold different numbers of rows, or none."""
    if distributed.world_size() == 1:
        return x
    shape = torch.tensor([len(x), *x.shape[1:]], device=x.device)
    shapes = [torch.empty_like(shape) for _ in range(distributed.world_size())]
    dist.all_gather(shapes, shape)
    longest, *width = torch.stack(shapes).amax(0).tolist()
    padded = x.new_zeros(longest, *width)
    padded[: len(x)] = x if len(x) else 0
    if not distributed.is_main():
        dist.gather(padded, dst=0)
        return padded[:0]
    gathered = [torch.empty_like(padded) for _ in shapes]
    dist.gather(padded, gathered, dst=0)
    return torch.cat([rows[: int(s[0])] for rows, s in zip(gathered, shapes, strict=True)])
