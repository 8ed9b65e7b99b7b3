"""The picture of nearest neighbors shows the images that it should, in frames of the right color."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image

from framework.analysis.neighbors import FRAME, RIGHT, TILE, WRONG, draw_neighbors, neighbors


def test_the_nearest_come_first() -> None:
    """By direction, not length: angles 0, 10, 50 and 90 degrees, asked at 12 and at 80."""
    angles = torch.deg2rad(torch.tensor([0.0, 10.0, 50.0, 90.0]))
    train_x = torch.stack([angles.cos(), angles.sin()], 1) * torch.tensor([[1.0], [100.0], [1.0], [0.01]])
    asked = torch.deg2rad(torch.tensor([12.0, 30.0, 80.0]))
    test_x = torch.stack([asked.cos(), asked.sin()], 1)
    found = neighbors(train_x, test_x, torch.tensor([3, 3, 7]), count=3)
    assert found.rows.tolist() == [0, 2]
    assert found.nearest.tolist() == [[1, 0, 2], [3, 2, 1]]


def test_the_picture() -> None:
    """Two rows of three tiles and a gap: gray levels tell the images, frames whether the class is the same."""
    train = torch.tensor([0.2, 0.4, 0.6]).view(3, 1, 1, 1).expand(3, 3, 8, 8), torch.tensor([0, 1, 1])
    test = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 8, 8), torch.tensor([0, 1])
    x = torch.eye(3)
    found = neighbors(x, torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]]), test[1], count=2)
    pixels = np.asarray(Image.open(io.BytesIO(draw_neighbors(found, train, test))))
    assert pixels.shape == (2 * TILE, 3 * TILE + TILE // 2, 3)
    middle, left = TILE // 2, TILE + TILE // 2
    for row, (asked, shown, colors) in enumerate(
        [(0, (51, 102), (RIGHT, WRONG)), (255, (153, 102), (RIGHT, RIGHT))]
    ):
        line = pixels[row * TILE + middle]
        assert line[middle].tolist() == [asked] * 3
        assert [line[left + k * TILE + middle].tolist() for k in range(2)] == [[level] * 3 for level in shown]
        assert [tuple(line[left + k * TILE + FRAME].tolist()) for k in range(2)] == list(colors)
