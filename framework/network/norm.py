"""BatchNorm over all ranks; freezing and restoring BatchNorm's running statistics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm as _PyTorchs

from framework.runtime import distributed
from framework.runtime.errors import UserError

_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d)


def synchronize(network: nn.Module) -> nn.Module:
    """Let every BatchNorm of ``network`` use the statistics of all ranks; parameter names are kept.

    PyTorch's own SyncBatchNorm waits for the GPU in every forward pass, and refuses CPU tensors.

    Raises:
        UserError: a kind of BatchNorm that can't be synchronized.
    """
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.modules.batchnorm._BatchNorm) and not isinstance(child, SyncBatchNorm):
                setattr(module, name, _synchronized(child))
    return network


def _synchronized(norm: nn.modules.batchnorm._BatchNorm) -> nn.Module:
    if type(norm) in _PLAIN:
        return SyncBatchNorm.like(norm)
    if isinstance(norm, BatchNormAct2d):
        return SyncBatchNormAct.like(norm)
    raise UserError(f"network.sync_bn=true can't synchronize {type(norm).__name__}")


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm over the batch of all ranks: one differentiable all-gather of their counts, means and variances.

    They are combined as Chan et al. (1983) do, without a difference of large numbers. On GPUs PyTorch's kernels do it.
    """

    @classmethod
    def like(cls, norm: nn.modules.batchnorm._BatchNorm) -> Self:
        """The same parameters and buffers under synchronized statistics."""
        new = cls(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        new._parameters, new._buffers, new.training = norm._parameters, norm._buffers, norm.training
        return new

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"expected (N, C, ...), got {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, ...) -> the same, normalized; one collective in training, none in evaluation."""
        if not self.training or distributed.world_size() == 1:
            return super().forward(input)
        if input.is_cuda:
            return self._by_kernels(input)
        x = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
        own = torch.var_mean(x, [0, *range(2, x.ndim)], correction=0)
        count = x.new_full((1,), x.numel() // x.shape[1])
        ranks = distributed.gather_with_gradient(torch.cat([count, *own])[None])
        counts, variances, means = ranks.split([1, self.num_features, self.num_features], dim=1)
        n = counts.sum()
        mean = (counts * means).sum(0) / n
        variance = (counts * (variances + (means - mean).square())).sum(0) / n
        self._move_statistics(mean.detach(), variance.detach(), n.detach())
        shape = (1, -1) + (1,) * (x.ndim - 2)
        scale = torch.rsqrt(variance + self.eps)
        if not self.affine:
            return ((x - mean.view(shape)) * scale.view(shape)).to(input.dtype)
        scale = scale * self.weight
        return ((x - mean.view(shape)) * scale.view(shape) + self.bias.view(shape)).to(input.dtype)

    def _by_kernels(self, input: Tensor) -> Tensor:
        moved: tuple[Tensor | None, Tensor | None, float] = (None, None, 0.0)
        if self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            moved = (self.running_mean, self.running_var, self._momentum(self.num_batches_tracked))
        mean, variance, momentum = moved
        output: Tensor = Kernels.apply(
            input,
            self.weight,
            self.bias,
            mean,
            variance,
            self.eps,
            momentum,
            distributed.group(),
            distributed.world_size(),
        )
        return output

    def _momentum(self, batches: Tensor) -> float:
        """That of timm's networks is a number; ``None``, the mean over all batches, is read from the device."""
        return self.momentum if self.momentum is not None else 1.0 / float(batches)

    @torch.no_grad()
    def _move_statistics(self, mean: Tensor, variance: Tensor, n: Tensor) -> None:
        if not self.track_running_stats or self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        momentum = self._momentum(self.num_batches_tracked)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_((variance * n / (n - 1)).to(self.running_var.dtype), momentum)


class Kernels(_PyTorchs):
    """PyTorch's function for GPUs, with its backward pass.

    PyTorch's forward pass waits for the GPU, to leave out ranks without images; here every rank has some.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        eps: float,
        momentum: float,
        process_group: dist.ProcessGroup | None,
        world_size: int,
    ) -> Tensor:
        if not input.is_contiguous(memory_format=torch.channels_last):
            input = input.contiguous()
        channels = input.shape[1]
        mean, inverse = torch.batch_norm_stats(input, eps)
        own = torch.cat([mean, inverse, mean.new_full((1,), input.numel() // channels)])
        parts = [torch.empty_like(own) for _ in range(world_size)]
        dist.all_gather(parts, own, group=process_group)
        ranks = torch.stack(parts).split([channels, channels, 1], 1)
        means, inverses, counts = (part.contiguous() for part in ranks)
        like = counts.dtype if running_mean is None else running_mean.dtype
        mean, inverse = torch.batch_norm_gather_stats_with_counts(
            input, means, inverses, running_mean, running_var, momentum, eps, counts.flatten().to(like)
        )
        ctx.save_for_backward(input, weight, mean, inverse, counts.to(torch.int32))
        ctx.process_group = process_group
        return torch.batch_norm_elemt(input, weight, bias, mean, inverse, eps)


class SyncBatchNormAct(SyncBatchNorm):
    """The same for timm's BatchNorm with an activation behind it."""

    drop: nn.Module
    act: nn.Module

    @classmethod
    def like(cls, norm: nn.modules.batchnorm._BatchNorm) -> Self:
        """The same parameters, buffers and activation under synchronized statistics."""
        new = super().like(norm)
        new.drop, new.act = norm.drop, norm.act  # type: ignore[assignment]
        return new

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) -> the same, normalized and activated."""
        return self.act(self.drop(super().forward(input)))


def synchronize_among(modules: Iterable[nn.Module], group: dist.ProcessGroup) -> None:
    """Let PyTorch's own SyncBatchNorms communicate in ``group``; ours take the group from ``distributed``."""
    for module in modules:
        if isinstance(module, nn.SyncBatchNorm):
            module.process_group = group


@contextmanager
def frozen_statistics(*networks: nn.Module) -> Iterator[None]:
    """Within the context, BatchNorms in training mode normalize with the batch and keep their running statistics."""
    moving = [
        m
        for network in networks
        for m in network.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training and m.track_running_stats
    ]
    for norm in moving:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in moving:
            norm.track_running_stats = True


class RunningStatistics:
    """A copy of all BatchNorms' running statistics, which one batch with infinite values would make useless for good.

    Args:
        network: has the BatchNorms.
    """

    def __init__(self, network: nn.Module) -> None:
        norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        statistics = [b for m in norms for b in (m.running_mean, m.running_var) if b is not None]
        counters = [m.num_batches_tracked for m in norms if m.num_batches_tracked is not None]
        self._kinds = [
            kind for kind in (statistics, counters) if kind
        ]  # one data type each, hence one kernel each
        self._copies = [[torch.empty_like(b) for b in kind] for kind in self._kinds]

    @torch.no_grad()
    def remember(self) -> None:
        """Before a step."""
        for copies, buffers in zip(self._copies, self._kinds, strict=True):
            torch._foreach_copy_(copies, buffers)

    @torch.no_grad()
    def put_back(self, skipped: Tensor) -> None:
        """After a step, if it was skipped (bool scalar, which the host doesn't read)."""
        for copies, buffers in zip(self._copies, self._kinds, strict=True):
            for copy, buffer in zip(copies, buffers, strict=True):
                torch.where(skipped, copy, buffer, out=buffer)
