"""LARS against its formula, against itself under ZeRO's flat slices, and the schedule."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from framework.network import create
from framework.optim import LARS, build_optimizer, learning_rate, learning_rate_of_epoch, parameter_groups
from framework.optim.lars import Piece, Shard
from framework.runtime.distributed import rank, world_size
from framework.runtime.errors import UserError

SHAPES = [(4, 3, 3, 3), (4,), (5, 36), (5,), (7, 5)]


def parameters(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [
        nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        for shape in SHAPES
    ]


def gradient(parameter: Tensor, step: int, number: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + number)
    return torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)


def groups(params: list[nn.Parameter]) -> list[dict[str, object]]:
    return [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": 0.01, "adapt": True},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0, "adapt": False},
    ]


def step_all(
    optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: int, lr: float = 2.0
) -> None:
    for step in range(steps):
        for number, p in enumerate(params):
            p.grad = gradient(p, step, number)
        for group in optimizer.param_groups:
            group["lr"] = lr / (step + 1)
        optimizer.step()


def test_follows_the_published_update() -> None:
    params = parameters()
    weights = [p.detach().clone() for p in params]
    velocities = [torch.zeros_like(w) for w in weights]
    step_all(LARS(groups(params), momentum=0.9, trust=0.001), params, steps=3)
    for step in range(3):
        for number, (w, v) in enumerate(zip(weights, velocities, strict=True)):
            g, rate = gradient(w, step, number), 2.0 / (step + 1)
            if w.ndim > 1:
                g = g + 0.01 * w
                rate *= 0.001 * w.norm() / g.norm()
            v.mul_(0.9).add_(rate * g)
            w.sub_(v)
    for p, w in zip(params, weights, strict=True):
        torch.testing.assert_close(p.detach(), w, rtol=1e-13, atol=1e-13)


def test_a_parameter_of_zeros_gets_the_plain_rate() -> None:
    p = nn.Parameter(torch.zeros(2, 2))
    p.grad = torch.ones(2, 2)
    LARS([p], lr=0.5).step()
    assert torch.equal(p, torch.full((2, 2), -0.5))


def test_a_gradient_of_zeros_leaves_the_weights() -> None:
    p = nn.Parameter(torch.ones(2, 2))
    p.grad = torch.zeros(2, 2)
    LARS([p], lr=0.5).step()
    assert torch.equal(p, torch.ones(2, 2))


def test_learning_rate_is_inside_the_momentum_buffer() -> None:
    """With the rate outside, a rate of 0 in the second step would stop the weights."""
    p = nn.Parameter(torch.ones(3))
    optimizer = LARS([{"params": [p], "adapt": False}], lr=0.5, momentum=0.9)
    p.grad = torch.ones(3)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((3,), 1 - 0.5 - 0.45))


def sharded_step(steps: int) -> list[Tensor] | None:
    """LARS on one flat slice a rank, cut at a place that is no parameter's edge; the gathered weights on rank 0."""
    params = parameters(torch.float32)
    kept = [p for p in params if p.ndim > 1]
    numbers = [number for number, p in enumerate(params) if p.ndim > 1]
    flat = torch.cat([p.detach().flatten() for p in kept])
    # Slices of 170: with 4 ranks the last parameter ends in the second and the others hold padding only.
    size = 170
    flat = nn.functional.pad(flat, (0, world_size() * size - len(flat)))
    begin, pieces, start = rank() * size, [], 0
    for index, p in enumerate(kept):
        first, last = max(start, begin), min(start + p.numel(), begin + size)
        if first < last:
            pieces.append(Piece(index, first - start, first - begin, last - first))
        start += p.numel()
    mine = nn.Parameter(flat[begin : begin + size].clone())
    optimizer = LARS([{"params": [mine], "weight_decay": 0.01, "adapt": True}])
    optimizer.param_groups[0]["shard"] = Shard(tuple(map(str, numbers)), tuple(pieces), None)
    for step in range(steps):
        whole = torch.cat([gradient(params[n], step, n).flatten() for n in numbers])
        mine.grad = nn.functional.pad(whole, (0, len(flat) - len(whole)))[begin : begin + size].clone()
        optimizer.param_groups[0]["lr"] = 2.0 / (step + 1)
        optimizer.step()
    parts = [torch.empty_like(mine) for _ in range(world_size())]
    torch.distributed.all_gather(parts, mine.detach())
    whole = torch.cat(parts)
    return list(whole[:start].split([p.numel() for p in kept])) if rank() == 0 else None


@pytest.mark.parametrize("ranks", [2, 4])
def test_slices_give_the_very_same_weights(pool, ranks: int) -> None:
    params = parameters(torch.float32)
    step_all(LARS(groups(params)), params, steps=3)
    whole = [p.detach().flatten() for p in params if p.ndim > 1]
    for mine, theirs in zip(whole, pool(ranks).run(sharded_step, 3)[0], strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
def test_a_skipped_step_leaves_weights_state_and_counters(name: str) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)).double()
    optimizer = build_optimizer(net, name=name)
    params = list(net.parameters())
    step_all(optimizer, params, steps=1)
    before = [p.detach().clone() for p in params]
    states = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in params]
    optimizer.skip = torch.tensor(True)
    step_all(optimizer, params, steps=1)
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    assert all(
        torch.equal(optimizer.state[p][k], v)
        for p, s in zip(params, states, strict=True)
        for k, v in s.items()
    )
    optimizer.skip = torch.tensor(False)
    step_all(optimizer, params, steps=1)
    assert not any(torch.equal(p, b) for p, b in zip(params, before, strict=True))


def test_norms_and_biases_are_neither_decayed_nor_adapted() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    adapted, excluded = parameter_groups(net, 0.1)
    assert [p.ndim for p in adapted["params"]] == [4, 2]
    assert [tuple(p.shape) for p in excluded["params"]] == [(4,), (4,), (4,), (2,)]
    assert (adapted["weight_decay"], adapted["adapt"]) == (0.1, True)
    assert (excluded["weight_decay"], excluded["adapt"]) == (0.0, False)


def test_decay_of_everything() -> None:
    """MLAAN's code; LARS then adapts everything too."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    assert [(g["weight_decay"], g["adapt"]) for g in parameter_groups(net, 0.1, "all")] == [(0.1, True)] * 2
    kept = build_optimizer(copy.deepcopy(net), name="sgd", weight_decay=0.1)
    decayed = build_optimizer(net, name="sgd", weight_decay=0.1, decay="all")
    for optimizer in (kept, decayed):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.zeros_like(p)
            group["lr"] = 1.0
        optimizer.step()
    assert torch.allclose(net[1].weight, torch.full((4,), 0.9))
    assert torch.equal(kept.param_groups[1]["params"][1], torch.ones(4))


def test_position_embeddings_are_no_weights() -> None:
    """Nor are class tokens and tables of relative positions, whatever their dimensions."""
    for name, exempt in (
        ("vit_tiny_patch16_224", ["cls_token", "pos_embed"]),
        (
            "swin_tiny_patch4_window7_224",
            [f"layers.0.blocks.{i}.attn.relative_position_bias_table" for i in (0, 1)],
        ),
    ):
        net = nn.ModuleDict({"backbone": create(name)})
        weights, others = parameter_groups(net, 0.1)
        for parameter in exempt:
            p = net["backbone"].get_parameter(parameter)
            assert p.ndim > 1 and any(p is other for other in others["params"])
        assert sum(len(g["params"]) for g in (weights, others)) == len(list(net.parameters()))


def test_unknown_optimizers_and_nesterov_where_there_is_none() -> None:
    with pytest.raises(UserError, match=r"optim.name=adam: must be one of lars, sgd, adamw"):
        build_optimizer(nn.Linear(2, 2), name="adam")
    with pytest.raises(UserError, match=r"optim.nesterov=true: only sgd"):
        build_optimizer(nn.Linear(2, 2), nesterov=True)


def test_schedule_is_simclrs() -> None:
    rates = [learning_rate(step, 100, 10, 4.8) for step in range(101)]
    assert rates[0] == 0 and rates[5] == 2.4 and rates[10] == max(rates) == 4.8
    assert rates[55] == pytest.approx(2.4) and rates[100] == pytest.approx(0, abs=1e-12)
    assert rates[30] == pytest.approx(4.8 * 0.5 * (1 + math.cos(math.pi * 20 / 90)))
    assert learning_rate(0, 10, 0, 1.0) == 1.0
    assert learning_rate(10, 10, 10, 1.0) == 1.0
    with pytest.raises(ValueError, match="outside a run of 10"):
        learning_rate(11, 10, 0, 1.0)


def test_the_schedule_of_epochs_is_that_of_the_authors_code() -> None:
    """0.8 and 400 epochs: e = 1 has 0.01, e = 11 the cosine alone, e = 400 nothing."""
    rates = [learning_rate_of_epoch(epoch, 400, 10, 0.8) for epoch in range(401)]
    assert rates[0] == pytest.approx(0.01)
    blended = 0.4 * (1 + math.cos(math.pi * 4 / 400)) * 3 / 10 + 0.01 * 7 / 10
    assert rates[3] == pytest.approx(blended)
    assert rates[10] == pytest.approx(0.4 * (1 + math.cos(math.pi * 11 / 400)))
    assert rates[399] == rates[400] == 0
    ours = sum(learning_rate(step, 4000, 100, 0.8) for step in range(4000)) / 10
    assert ours / sum(rates) == pytest.approx(1.031, abs=1e-3)
    with pytest.raises(ValueError, match="outside"):
        learning_rate_of_epoch(401, 400, 10, 0.8)
