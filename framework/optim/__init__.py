"""Optimizers that can skip a step (``SkippableOptimizer``), parameter groups, and the learning rate."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Protocol

from torch import Tensor, nn

from framework.optim.groups import Decay, parameter_groups
from framework.optim.lars import LARS
from framework.optim.learning_rate import learning_rate, learning_rate_of_epoch
from framework.optim.torch_optimizers import SGD, AdamW
from framework.runtime.errors import UserError

__all__ = [
    "LARS",
    "SGD",
    "AdamW",
    "SkippableOptimizer",
    "build_optimizer",
    "learning_rate",
    "learning_rate_of_epoch",
    "parameter_groups",
]


class SkippableOptimizer(Protocol):
    """A ``torch.optim.Optimizer`` whose ``step`` leaves weights, state and counters alone while ``skip`` is set.

    ``skip`` is a bool scalar on the device, which the host does not read, or ``None`` where no step may be skipped. If
    it is a tensor once, it must be from the first step on, because AdamW then counts its steps there.
    """

    skip: Tensor | None
    param_groups: list[dict[str, Any]]
    state: Any

    def step(self) -> None: ...

    def zero_grad(self, set_to_none: bool = True) -> None: ...

    def register_step_pre_hook(self, hook: Any) -> Any: ...

    def register_step_post_hook(self, hook: Any) -> Any: ...


def build_optimizer(
    net: nn.Module,
    *,
    name: str = "lars",
    momentum: float = 0.9,
    nesterov: bool = False,
    weight_decay: float = 1e-6,
    trust: float = 0.001,
    decay: Decay = "weights",
    constant: Collection[nn.Parameter] = (),
    constant_lr: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    layer_decay: float = 1.0,
) -> LARS | SGD | AdamW:
    """An optimizer over ``parameter_groups(net)``. The rate of scheduled groups is 0 until someone sets one.

    Args:
        net: the network, already sharded if FSDP2 is to shard it.
        name: ``"lars"``, ``"sgd"`` or ``"adamw"`` (with decoupled decay).
        momentum: lars and sgd.
        nesterov: sgd only.
        weight_decay: of weights.
        trust: lars only.
        decay: whether norm parameters and biases get weight decay too ("all"); see ``parameter_groups``.
        constant: parameters whose rate no schedule changes.
        constant_lr: their rate.
        betas: adamw only.
        layer_decay: factor of the learning rate from one layer to the one below; see ``rate_scales``.

    Raises:
        UserError: another name, ``nesterov`` with an optimizer that has none, or layers that can't be told.
    """
    groups = parameter_groups(net, weight_decay, decay, layer_decay, constant)
    for group in groups:
        group["lr"] = 0.0 if group["scheduled"] else constant_lr
    if nesterov and name != "sgd":
        raise UserError(f"optim.nesterov=true: only sgd has it, and optim.name={name}")
    if name == "lars":
        return LARS(groups, lr=0.0, momentum=momentum, trust=trust)
    if name == "sgd":
        return SGD(groups, lr=0.0, momentum=momentum, nesterov=nesterov)
    if name == "adamw":
        return AdamW(groups, lr=0.0, betas=betas)
    raise UserError(f"optim.name={name}: must be one of lars, sgd, adamw")
