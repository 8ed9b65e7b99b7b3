"""How good a representation is: k-NN and a linear probe on frozen features, top-1 of a trained classifier.

Accuracies are in per cent. The encoder runs in evaluation mode and gets its own modes back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from framework.execution import LocalNetwork
from framework.runtime import distributed
from framework.runtime.errors import UserError

SIMILARITIES = 2**26  # computed at a time, 256 MiB of float32
EvalBatches = Iterable[tuple[Tensor, Tensor, Tensor | None]]  # sample numbers (B,), images, labels (B,)


def features(net: LocalNetwork, loader: EvalBatches) -> tuple[Tensor, Tensor]:
    """Pooled features of every image of a split, in the order of the split.

    Args:
        net: the network, the same on all ranks.
        loader: this rank's share of the split.

    Returns:
        On rank 0: features (N, C) float32 and labels (N,). Elsewhere: no rows.

    Raises:
        UserError: the split has no labels.
    """
    with evaluating(net):
        return _collect(loader, net.features)


def pixels(loader: EvalBatches) -> tuple[Tensor, Tensor]:
    """As ``features``, the images themselves being the features (N, 3*H*W): what an encoder has to beat."""
    return _collect(loader, lambda images: images.flatten(1))


def test_top1(net: LocalNetwork, loader: EvalBatches) -> float:
    """Top-1 accuracy of the last head, the same number on all ranks."""
    with evaluating(net):
        right, total = 0, 0
        for _, images, labels in own(loader):
            right += int((net.predict(images).argmax(1) == _given(labels)).sum())
            total += len(images)
    counts = torch.tensor([right, total], dtype=torch.float64, device=distributed.device())
    mean_right, mean_total = distributed.mean_over_ranks(counts).tolist()
    return 100 * mean_right / mean_total


def knn_top1(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, k: int = 20) -> float:
    """Weighted k-NN (Wu et al. 2018): the k most similar images by cosine s vote with exp(s / 0.07).

    A plain matrix product and ``topk``, where the features are: on a GPU ImageNet takes seconds, which on a
    CPU, scikit-learn's included, would be hours.

    Args:
        train_x: (N, C) features of the images that vote.
        train_y: (N,) their labels.
        test_x: (M, C) features to classify.
        test_y: (M,) their labels.
        k: number of voters.

    Raises:
        UserError: features that are not finite, a single class, or fewer than ``k`` images that vote.
    """
    _check(train_x, train_y, test_x)
    if len(train_x) < k:
        raise UserError(
            f"evaluate.neighbors={k}: must be at most {len(train_x)}, the number of training images"
        )
    voters = nn.functional.normalize(train_x.float())
    classes = int(train_y.max()) + 1
    rows = max(1, SIMILARITIES // len(voters))
    right = 0
    for x, y in zip(nn.functional.normalize(test_x.float()).split(rows), test_y.split(rows), strict=True):
        similarity, neighbors = (x @ voters.T).topk(k)
        votes = x.new_zeros(len(x), classes).scatter_add_(1, train_y[neighbors], (similarity / 0.07).exp())
        right += int((votes.argmax(1) == y).sum())
    return 100 * right / len(test_y)


def linear_top1(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor) -> float:
    """Accuracy of ``linear_probe``, for sets that fit one machine. Arguments as ``knn_top1``.

    Raises:
        UserError: features that are not finite, or a single class.
    """
    _check(train_x, train_y, test_x)
    probe = linear_probe(train_x, train_y)
    return 100 * float(probe.score(test_x.double().cpu().numpy(), test_y.cpu().numpy()))


def linear_probe(x: Tensor, y: Tensor) -> Pipeline:
    """Logistic regression on standardized features (N, C), run close to its one optimum in float64."""
    # On digits, 64 to 2048 dimensions, C from 0.1 to 1 changes about a point. Features of a network that has hardly
    # begun are nearly parallel: with 10,000 iterations a ResNet-50's took more than ten minutes.
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, tol=1e-8, max_iter=1_000))
    return probe.fit(x.double().cpu().numpy(), y.cpu().numpy())


def own(loader: EvalBatches) -> EvalBatches:
    """A loader whose errors, which other ranks don't meet, name this rank."""
    with distributed.own_errors():
        yield from loader


@contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every module has the mode it had, frozen ones among them.

    What FSDP2 shards is whole inside: its own hooks act on ``forward`` only, not on ``features``.
    """
    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    if isinstance(net, FSDPModule):
        net.unshard()
    try:
        yield
    finally:
        if isinstance(net, FSDPModule):
            net.reshard()
        for module, mode in modes:
            module.training = mode


def _collect(loader: EvalBatches, encode: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """``encode`` of every image of all ranks, on rank 0, sorted by index."""
    device = distributed.device()
    indices, rows, labels = [], [], []
    for index, images, target in own(loader):
        indices.append(index)
        rows.append(encode(images).float())
        labels.append(_given(target))
    none = torch.empty(0, dtype=torch.int64)
    index = _to_main(torch.cat(indices or [none]).to(device))
    order = index.argsort()
    x = _to_main(torch.cat(rows or [torch.empty(0, 0)]).to(device))[order]
    return x, _to_main(torch.cat(labels or [none]).to(device))[order]


def _given(labels: Tensor | None) -> Tensor:
    if labels is None:
        raise UserError("evaluation needs labels, and the shards have none")
    return labels


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


def _check(train_x: Tensor, train_y: Tensor, test_x: Tensor) -> None:
    for split, x in (("training", train_x), ("test", test_x)):
        if not len(x):
            raise UserError(f"there are no {split} images to evaluate")
        if broken := int((~x.isfinite()).any(1).sum()):
            raise UserError(
                f"features of {broken} of {len(x)} {split} images are not finite: training diverged"
            )
    if len(train_y.unique()) < 2:
        raise UserError(f"all {len(train_y)} training images have label {int(train_y[0])}: one class only")
