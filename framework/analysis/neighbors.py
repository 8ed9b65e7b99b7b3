"""Images of a test split, each beside the training images that lie nearest to it in feature space."""

from __future__ import annotations

import io
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from framework.config.recipe import Recipe
from framework.data.splits import Splits
from framework.evaluation.features import network_features, pixel_features
from framework.execution import LocalNetwork
from framework.runtime import distributed

KNOWN, ASKED = 2_000, 500  # training and test images that are looked at, at most
TILE = 40  # side of an image in the picture, in pixels
FRAME = 2  # width of the frames around the neighbors
RIGHT, WRONG = (0, 158, 115), (213, 94, 0)  # frame of a neighbor of the same class, and of another


class Neighbors(NamedTuple):
    """R test images and their K nearest training images, the nearest first.

    Attributes:
        rows: (R,) numbers of test images.
        nearest: (R, K) numbers of training images.
    """

    rows: Tensor
    nearest: Tensor


def neighbors_picture(recipe: Recipe, net: LocalNetwork, splits: Splits) -> bytes:
    """A PNG of ``draw_neighbors`` for a trained network and labeled splits, on rank 0; empty elsewhere."""
    train, test = splits.train.subsample(KNOWN), splits.held_out.subsample(ASKED)
    (train_x, train_y), (test_x, test_y) = (
        network_features(net, splits.eval_loader(shards)) for shards in (train, test)
    )
    images = [pixel_features(splits.eval_loader(shards))[0] for shards in (train, test)]
    if not distributed.is_main():
        return b""
    size = recipe.data.image_size
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (recipe.views.mean, recipe.views.std))
    train_images, test_images = (x.view(-1, 3, size, size).cpu() * std + mean for x in images)
    found = neighbors(train_x.cpu(), test_x.cpu(), test_y.cpu())
    return draw_neighbors(found, (train_images, train_y.cpu()), (test_images, test_y.cpu()))


def neighbors(
    train_x: Tensor, test_x: Tensor, test_y: Tensor, classes: int = 10, count: int = 10
) -> Neighbors:
    """The neighbors by cosine of the first test image of each class.

    Args:
        train_x: (N, C) features.
        test_x: (M, C) features.
        test_y: (M,) labels.
        classes: at most so many rows.
        count: neighbors of each, at most N.
    """
    rows = torch.stack([(test_y == label).nonzero()[0, 0] for label in test_y.unique()[:classes]])
    similarity = F.normalize(test_x[rows].float()) @ F.normalize(train_x.float()).T
    return Neighbors(rows, similarity.topk(min(count, len(train_x))).indices)


def draw_neighbors(found: Neighbors, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> bytes:
    """A PNG: a row for each test image, which stands on the left; green frames are of its class, red ones of others.

    Args:
        found: what to draw.
        train: pixels (N, 3, H, W) from 0 to 1 and labels (N,) of the training images.
        test: those of the test images.
    """
    rows = []
    for row, nearest in zip(found.rows, found.nearest, strict=True):
        right = train[1][nearest] == test[1][row]
        tiles = [
            _tile(test[0][row], (255, 255, 255)),
            torch.full((3, TILE, TILE // 2), 255, dtype=torch.uint8),
        ]
        tiles += [
            _tile(train[0][i], RIGHT if same else WRONG) for i, same in zip(nearest, right, strict=True)
        ]
        rows.append(torch.cat(tiles, dim=2))
    picture = Image.fromarray(torch.cat(rows, dim=1).permute(1, 2, 0).numpy())
    buffer = io.BytesIO()
    picture.save(buffer, format="png")
    return buffer.getvalue()


def _tile(image: Tensor, frame: tuple[int, int, int]) -> Tensor:
    """(3, TILE, TILE) uint8: the image with a frame, and a white edge around that."""
    tile = torch.full((3, TILE, TILE), 255, dtype=torch.uint8)
    tile[:, 1:-1, 1:-1] = torch.tensor(frame, dtype=torch.uint8).view(3, 1, 1)
    inside = TILE - 2 * (1 + FRAME)
    pixels = F.interpolate(image[None].cpu(), (inside, inside))[0].clamp(0, 1)
    tile[:, 1 + FRAME : -1 - FRAME, 1 + FRAME : -1 - FRAME] = (255 * pixels).round().to(torch.uint8)
    return tile
