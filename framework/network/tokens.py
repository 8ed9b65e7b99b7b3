"""Whether a network's segments work on any of its tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from framework.network.recorded import computed
from framework.network.segments import Segment
from framework.runtime.errors import UserError

TRIED = 5  # tokens, in two orders


@torch.no_grad()
def takes_any_tokens(segments: Sequence[Segment], shape: tuple[int, ...]) -> bool:
    """Whether each of the segments maps any number of an image's tokens, in any order, to tokens in the same order.

    A vision transformer's do, since positions are added before them. Those that attend by windows or relative positions
    don't.

    Args:
        segments: which follow each other.
        shape: (tokens, channels) of the first one's input, for an image.
    """
    backbone, prefix = segments[0].backbone, segments[0].prefix
    if any(segment.prefix is None or segment.prefix != prefix for segment in segments):
        return False
    assert prefix is not None
    like = min(backbone.parameters(), key=Tensor.numel)
    generator = torch.Generator().manual_seed(0)
    few = torch.randn(1, prefix + TRIED, shape[1], generator=generator).to(like)
    turned = [*range(prefix), *reversed(range(prefix, prefix + TRIED))]
    modes = [(module, module.training) for module in backbone.modules()]
    backbone.eval()
    try:
        straight, other = _through(segments, few), _through(segments, few[:, turned])
    except (
        RuntimeError,
        AssertionError,
        ValueError,
        UserError,
    ):  # whatever a network does with too few tokens
        return False
    finally:
        for module, mode in modes:
            module.training = mode
    same = straight.shape == few.shape[:2] + straight.shape[2:]
    return same and torch.allclose(straight[:, turned], other, rtol=1e-3, atol=1e-4)


def _through(segments: Sequence[Segment], x: Tensor) -> Tensor:
    for segment in segments:
        x = computed(segment(x))  # so that not all of the weights are needed at once
    return x
