"""What the tests on a GPU share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from framework.data.batch import Batch
from framework.execution.masks import Masks
from framework.execution.noise import Noise


@pytest.fixture
def drawn_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks and noise that are the same on every device and in every precision: a GPU's random numbers are others."""
    masks = Masks.on

    def masked(drawn: Masks, batch: Batch) -> Batch:
        visible = masks(drawn, batch._replace(images=batch.images.cpu())).visible
        assert visible is not None
        return batch._replace(visible=visible.to(batch.images.device))

    def noisy(drawn: Noise, x: Tensor, segment: int) -> Tensor:
        generator = drawn.generator(segment, torch.device("cpu"))
        normal = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        return x + drawn.rule * (x.std() * normal.to(x))

    monkeypatch.setattr(Masks, "on", masked)
    monkeypatch.setattr(Noise, "on", noisy)


@pytest.fixture
def no_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions in float32, not in TF32, which cuDNN takes by default."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
