"""Objectives against formulas in NumPy, and on two ranks against one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from timm.data.mixup import mixup_target
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from framework.data.batch import Batch
from framework.local.objectives import BarlowTwins, CrossEntropy, InfoNCE, SupCon, VICReg
from framework.runtime.distributed import rank, world_size
from tests.support.pool import Pool

IMAGES, DIM = 8, 5
OBJECTIVES: dict[str, Callable[[], nn.Module]] = {
    "infonce": InfoNCE,
    "barlow": BarlowTwins,
    "vicreg": VICReg,
    "supcon": SupCon,
}


def embeddings() -> tuple[Tensor, Tensor]:
    """Two views (2, images, D) in float64 and labels; one class occurs once."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, IMAGES, DIM, generator=generator, dtype=torch.float64)
    z[1] = 0.7 * z[0] + 0.5 * z[1]
    return z, torch.tensor([0, 1, 2, 0, 1, 0, 3, 1])


def loss_of(name: str, part: int = 0, parts: int = 1) -> tuple[Tensor, Tensor]:
    """Loss on one part of the batch, and its gradient for that part (views, images / parts, D)."""
    z, labels = embeddings()
    z = z[:1] if name == "supcon" else z
    mine = z.chunk(parts, 1)[part].clone().requires_grad_()
    batch = Batch(torch.empty(0), labels.chunk(parts)[part], len(z))
    loss = OBJECTIVES[name]()(mine.flatten(0, 1), batch)
    (gradient,) = torch.autograd.grad(loss, mine)
    return loss.detach(), gradient


def on_this_rank(name: str) -> tuple[Tensor, Tensor]:
    return loss_of(name, rank(), world_size())


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("ranks", [2])
def test_ranks_together_equal_one_process(pool: Callable[[int], Pool], name: str, ranks: int) -> None:
    """The mean over ranks is the loss of the whole batch, and so is its gradient."""
    loss, gradient = loss_of(name)
    results = pool(ranks).run(on_this_rank, name)
    torch.testing.assert_close(torch.stack([r[0] for r in results]).mean(), loss, rtol=1e-10, atol=1e-12)
    together = torch.cat([r[1] for r in results], 1) / ranks
    torch.testing.assert_close(together, gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_nothing_is_learned_from_fewer_images_than_an_objective_declares(name: str) -> None:
    z, _ = embeddings()
    objective, gradients = OBJECTIVES[name](), []
    for images in (objective.fewest_images - 1, objective.fewest_images):
        few = z[: 1 if name == "supcon" else 2, :images].flatten(0, 1).requires_grad_()
        loss = objective(few, Batch(torch.empty(0), torch.tensor([0, 0, 1])[:images]))
        gradients.append(torch.autograd.grad(loss, few)[0])
    assert gradients[0].nan_to_num(0.0).abs().max() < 1e-3  # Barlow Twins has an epsilon
    assert torch.isfinite(gradients[1]).all() and gradients[1].abs().max() > 1e-3


def test_barlow_twins_is_equation_1() -> None:
    a, b = (z.numpy() for z in embeddings()[0])
    correlation = np.corrcoef(a.T, b.T)[:DIM, DIM:]
    off_diagonal = correlation[~np.eye(DIM, dtype=bool)]
    expected = ((1 - np.diag(correlation)) ** 2).sum() + 0.0051 * (off_diagonal**2).sum()
    assert loss_of("barlow")[0].item() == pytest.approx(expected, rel=1e-4)


def test_vicreg_is_equations_1_to_6() -> None:
    a, b = (z.numpy() for z in embeddings()[0])
    variance = covariance = 0.0
    for z in (a, b):
        variance += np.maximum(0, 1 - np.sqrt(z.var(0, ddof=1) + 1e-4)).mean() / 2
        c = np.cov(z.T)
        covariance += (c[~np.eye(DIM, dtype=bool)] ** 2).sum() / DIM
    expected = 25 * ((a - b) ** 2).mean() + 25 * variance + covariance
    assert loss_of("vicreg")[0].item() == pytest.approx(expected, rel=1e-10)


def test_infonce_is_nt_xent() -> None:
    z = embeddings()[0].flatten(0, 1).numpy()
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    similarity = np.exp(z @ z.T / 0.1)
    n = 2 * IMAGES
    terms = [
        -np.log(similarity[i, (i + IMAGES) % n] / (similarity[i].sum() - similarity[i, i])) for i in range(n)
    ]
    assert loss_of("infonce")[0].item() == pytest.approx(np.mean(terms), rel=1e-10)


def test_supcon_averages_over_positives() -> None:
    z, labels = embeddings()[0][0].numpy(), embeddings()[1].numpy()
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    similarity = np.exp(z @ z.T / 0.07)
    terms = []
    for i in range(IMAGES):
        positives = [j for j in range(IMAGES) if j != i and labels[j] == labels[i]]
        others = similarity[i].sum() - similarity[i, i]
        if positives:
            terms.append(-np.mean([np.log(similarity[i, j] / others) for j in positives]))
    assert loss_of("supcon")[0].item() == pytest.approx(np.mean(terms), rel=1e-9)


def test_smoothed_and_mixed_targets_are_timms() -> None:
    """timm smooths labels where it mixes them, here the objective does."""
    logits, labels = 3 * torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 5
    hard, soft = (Batch(torch.empty(0), y) for y in (labels, mixup_target(labels, 5, 0.7)))
    torch.testing.assert_close(
        CrossEntropy(0.1)(logits, hard), LabelSmoothingCrossEntropy(0.1)(logits, labels)
    )
    for smoothing in (0.0, 0.1):
        expected = SoftTargetCrossEntropy()(logits, mixup_target(labels, 5, 0.7, smoothing))
        torch.testing.assert_close(CrossEntropy(smoothing)(logits, soft), expected)
    assert CrossEntropy(0.1)(logits.double(), soft).dtype == torch.float64
