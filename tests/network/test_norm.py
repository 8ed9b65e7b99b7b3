"""BatchNorm over all ranks, against PyTorch's BatchNorm on the whole batch in one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from framework.network.norm import Kernels, RunningStatistics, synchronize
from framework.runtime.distributed import rank, world_size

PoolOf = Callable[[int], Any]
SIZES = {1: [8], 2: [3, 5], 4: [1, 4, 2, 1]}  # images of each rank
CHANNELS = 3


class Result(NamedTuple):
    """Output and gradients of a rank's part of the batch, running mean and variance after it."""

    output: Tensor
    input: Tensor
    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor


def images(mean: float, dtype: torch.dtype) -> Tensor:
    """(8, 3, 4, 4), of deviation 1 around means that differ."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, CHANNELS, 4, 4, generator=generator, dtype=torch.float64)
    x = x + mean * torch.tensor([1.0, -1.0, 0.1], dtype=torch.float64).view(CHANNELS, 1, 1)
    return x.float().to(dtype)  # numbers that float32 can hold, in either type


def normalized(mean: float, dtype: torch.dtype, ranks: int) -> Result:
    """On a rank of ``ranks``, or on the whole batch. The loss weighs every element differently."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.BatchNorm2d(CHANNELS, dtype=dtype))
    nn.init.normal_(net[0].weight), nn.init.normal_(net[0].bias)
    whole = images(mean, dtype)
    weights = torch.linspace(-1, 1, whole.numel(), dtype=dtype).view_as(whole).sin()
    x, w = (t.split(SIZES[ranks])[rank() if ranks == world_size() else 0] for t in (whole, weights))
    x = x.clone().requires_grad_()
    net = synchronize(net) if ranks > 1 else net
    output = net(x)
    (output * w).sum().backward()
    norm = net[0]
    return Result(
        output.detach(), x.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var
    )


def worst(results: list[Result], reference: Result) -> float:
    """Largest absolute difference; gradients of weight and bias are summed over ranks."""
    ours = Result(
        *(torch.cat([getattr(r, name) for r in results]) for name in ("output", "input")),
        *(sum(getattr(r, name) for r in results) for name in ("weight", "bias")),
        results[-1].running_mean,
        results[-1].running_var,
    )
    return max(float((a.double() - b.double()).abs().max()) for a, b in zip(ours, reference, strict=True))


@pytest.mark.parametrize("ranks", [2, 4])
def test_it_is_batch_norm_of_the_whole_batch(pool: PoolOf, ranks: int) -> None:
    """Ranks may have different numbers of images."""
    reference = normalized(1.0, torch.float64, 1)
    assert worst(pool(ranks).run(normalized, 1.0, torch.float64, ranks), reference) < 1e-12


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_large_mean_costs_no_digits(pool: PoolOf, ranks: int) -> None:
    """A mean of 1000 deviations in float32, where E[x^2] - E[x]^2 has an error of 0.1 (and NaN beyond)."""
    exact = normalized(1e3, torch.float64, 1)
    theirs = worst([normalized(1e3, torch.float32, 1)], exact)
    assert worst(pool(ranks).run(normalized, 1e3, torch.float32, ranks), exact) < 3 * theirs < 0.01


@pytest.mark.parametrize("skipped", [torch.tensor(True), torch.tensor(False)], ids=str)
def test_statistics_are_put_back_where_a_step_was_skipped(skipped: Tensor) -> None:
    net = nn.Sequential(nn.BatchNorm2d(CHANNELS), nn.BatchNorm2d(CHANNELS))
    kept = RunningStatistics(net)
    net(torch.ones(4, CHANNELS, 2, 2))
    kept.remember()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    net(torch.full((4, CHANNELS, 2, 2), torch.nan))
    kept.put_back(skipped)
    same = [
        torch.equal(value, before[name]) for name, value in net.state_dict().items() if "weight" not in name
    ]
    assert all(same) == bool(skipped)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_its_kernels_for_gpus_are_batch_norm_and_do_not_wait(
    layout: torch.memory_format, gpu: torch.device
) -> None:
    """One rank, because there is one GPU."""
    x = images(1.0, torch.float32).cuda().contiguous(memory_format=layout)
    found = []
    dist.init_process_group("nccl", rank=0, world_size=1, store=dist.HashStore())
    try:
        dist.all_reduce(torch.zeros(1, device="cuda"))  # connects
        for ours in (True, False):
            torch.manual_seed(0)
            learned = [torch.randn(CHANNELS).cuda().requires_grad_() for _ in range(2)]
            running = [torch.zeros(CHANNELS, device="cuda"), torch.ones(CHANNELS, device="cuda")]
            into = x.clone().requires_grad_()
            torch.cuda.set_sync_debug_mode("error" if ours else "default")
            if ours:
                output = Kernels.apply(into, *learned, *running, 1e-5, 0.1, None, 1)
            else:
                output = nn.functional.batch_norm(into, *running, *learned, True, 0.1, 1e-5)
            output.sin().sum().backward()
            torch.cuda.set_sync_debug_mode("default")
            found.append([output, into.grad, *(p.grad for p in learned), *running])
    finally:
        torch.cuda.set_sync_debug_mode("default")
        dist.destroy_process_group()
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
