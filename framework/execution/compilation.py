"""Segments compiled by ``torch.compile``, for training steps."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable

import torch
from torch import Tensor, nn

from framework.network.norm import SyncBatchNorm
from framework.network.segments import Segment
from framework.runtime.errors import UserError


def compiled(segment: Segment) -> Callable[[Tensor], Tensor]:
    """What the segment runs, compiled at the first call; segments of equal structure share the compiled code.

    The modules stay where they are: names, hooks and weights are those of the segment. A compiled backward always
    computes the gradients of weights and input together, so a pass for the input's alone costs as much as both.

    Raises:
        UserError: there is no compiler.
    """
    from torch._dynamo import config as dynamo  # takes seconds
    from torch._functorch import config as functorch

    if not has_compiler():
        raise UserError("execution.compile=true: needs a C++ compiler such as g++, and there is none")
    steps = segment.runs(training=True)
    communicates = any(
        isinstance(module, nn.SyncBatchNorm | SyncBatchNorm)
        for step in segment.modules()
        for module in step.modules()
    )
    # PyTorch has both settings for the whole process only. Donated buffers are freed by a graph's first backward, and
    # windows go through a graph several times. Segments that differ count as recompilations of one another, of which
    # 8 are allowed.
    functorch.donated_buffer = False
    dynamo.recompile_limit = max(dynamo.recompile_limit, 64)
    return torch.compile(nn.Sequential(*steps), fullgraph=not communicates, dynamic=False)


def has_compiler() -> bool:
    """Whether the C++ compiler that PyTorch would call is there."""
    return shutil.which(os.environ.get("CXX", "g++")) is not None
