"""Steps of an optimizer that are skipped, which only the device knows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def step_unless(skip: Tensor | None, optimizer: torch.optim.Optimizer, step: Callable[[], object]) -> None:
    """Make a step, or none if ``skip`` is set.

    The host doesn't read it: the step is made, and undone where it is set. This takes as much memory again as the
    optimizer's weights and state have, until the step is done.

    Args:
        skip: whether to make none (bool scalar); ``None`` for no.
        optimizer: whose state is tensors only, which begin as zeros.
        step: makes it.
    """
    if skip is None:
        step()
        return
    before = {place: tensor.clone() for place, tensor in _tensors(optimizer).items()}
    step()
    after = _tensors(optimizer)
    known = [place for place in after if place in before]
    put_back(skip, [after[place] for place in known], [before[place] for place in known])
    for new in (tensor for place, tensor in after.items() if place not in before):
        new.masked_fill_(skip, 0.0)


def put_back(skip: Tensor, tensors: Sequence[Tensor], before: Sequence[Tensor]) -> None:
    """Overwrite tensors with what they were before, if ``skip`` (bool scalar) is set."""
    for tensor, old in zip(tensors, before, strict=True):
        torch.where(skip, old, tensor, out=tensor)


def _tensors(optimizer: torch.optim.Optimizer) -> dict[tuple[Tensor, str], Tensor]:
    """What a step changes: weights and their state."""
    trained = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    found = {(p, ""): p for p in trained}
    found |= {(p, name): value for p in trained for name, value in optimizer.state.get(p, {}).items()}
    return {place: value.detach() for place, value in found.items()}
