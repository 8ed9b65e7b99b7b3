"""What a training step takes of a GPU, besides time."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


def allocator_peak(step: Callable[[], None], net: nn.Module) -> int:
    """Most bytes of tensors during ``step``: weights, gradients, momenta (one a weight) and activations.

    What other networks hold on the device does not count.
    """
    step()  # momenta exist from here on
    own = sum(2 * p.numel() * p.element_size() for p in net.parameters())
    own += sum(b.numel() * b.element_size() for b in net.buffers())
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before + own


def busy_seconds(step: Callable[[], None], repeats: int = 3) -> float:
    """Seconds of ``step`` in which the GPU runs a kernel or a copy."""
    step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(repeats):
            step()
        torch.cuda.synchronize()
    # Regions that a program names, such as an optimizer's step, are events of the GPU, too, idle or not.
    events = (e for e in profiler.events() if e.device_type == DeviceType.CUDA and not e.is_user_annotation)
    ranges = (e.time_range for e in events)
    return covered((r.start, r.end) for r in ranges) / 1e6 / repeats


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
