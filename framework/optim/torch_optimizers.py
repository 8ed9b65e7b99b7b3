"""PyTorch's optimizers, skippable."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from framework.optim.skipping import put_back, step_unless


class SGD(torch.optim.SGD):
    """PyTorch's SGD, skippable."""

    skip: Tensor | None = None

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step, or none if ``skip`` is set."""
        step_unless(self.skip, self, super().step)


class AdamW(torch.optim.AdamW):
    """PyTorch's AdamW, skippable.

    Its bias corrections depend on the number of steps that were made. Where only the device knows whether a step is
    skipped, it counts them, and the corrections are computed there in float64, as PyTorch does on the host. Its own
    counters on the device (``capturable``) are float32, which leaves four digits of the first corrections.
    """

    skip: Tensor | None = None

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step, or none if ``skip`` is set."""
        if self.skip is None:
            super().step()
            return
        for group in self.param_groups:
            if trained := [p for p in group["params"] if p.grad is not None]:
                self._update(group, trained, self.skip)

    @torch.no_grad()
    def _update(self, group: dict[str, Any], trained: list[Any], skip: Tensor) -> None:
        states = [self._state(p) for p in trained]
        weights, gradients = [p.detach() for p in trained], [p.grad for p in trained]
        means, squares = ([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq"))
        before = [tensor.clone() for tensor in (*weights, *means, *squares)]
        (beta1, beta2), lr = group["betas"], group["lr"]
        counters = [state["step"] for state in states]
        made = (~skip).to(counters[0].dtype)
        torch._foreach_add_(counters, [made] * len(counters))  # a single tensor would be read as a number
        counts = torch.stack(counters).double()
        rates, roots = -lr / (1 - beta1**counts), (1 - beta2**counts).sqrt()
        if group["weight_decay"]:
            torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
        torch._foreach_lerp_(means, gradients, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
        deviations = torch._foreach_sqrt(squares)
        torch._foreach_div_(deviations, roots.unbind())
        torch._foreach_add_(deviations, group["eps"])
        changes = torch._foreach_mul(means, rates.unbind())
        torch._foreach_div_(changes, deviations)
        torch._foreach_add_(weights, changes)
        put_back(skip, [*weights, *means, *squares], before)

    def _state(self, p: Tensor) -> dict[str, Tensor]:
        """Of a parameter, with its counter on the device, where a checkpoint's is not."""
        state: dict[str, Tensor] = self.state[p]
        if not state:
            state["step"] = torch.zeros((), device=p.device)
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = torch.zeros_like(p, memory_format=torch.preserve_format)
        state["step"] = state["step"].to(p.device, non_blocking=True)
        return state
