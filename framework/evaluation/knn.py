"""Weighted k-nearest-neighbor classification of features (Wu et al. 2018)."""

from __future__ import annotations

from torch import Tensor, nn

from framework.evaluation.features import check_usable
from framework.runtime.errors import UserError

SIMILARITIES = 2**26  # computed at a time, 256 MiB of float32


def knn_top1(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, k: int = 20) -> float:
    """Top-1 in per cent: the k most similar training images by cosine s vote with exp(s / 0.07).

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
    check_usable(train_x, train_y, test_x)
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
