"""Networks of your own: each file here is one, and ``network.name`` is the file's name.

It defines ``create(**arguments)``, which gets a recipe's ``network.args`` and returns a module that maps images
(N, 3, H, W) to maps (N, C, H, W), tokens (N, L, C) or features (N, D), without a classifier:

    from torch import nn
    from torchvision import models

    def create(**arguments):
        net = models.resnet18(**arguments)
        net.fc = nn.Identity()
        return net

It is cut as timm's networks are: at its numbered blocks, ``layer2.0``.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from typing import cast

from torch import nn

from framework.runtime.errors import UserError
from framework.runtime.imports import import_found


def names() -> list[str]:
    """The networks there are."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> Callable[..., nn.Module]:
    """What makes the network ``name``.

    Raises:
        UserError: its file can't be imported, or defines no ``create``.
    """
    module = import_found(f"{__name__}.{name}")
    create = vars(module).get("create")
    if not callable(create):
        raise UserError(
            f"{module.__file__}: must define create(**arguments), which returns a torch.nn.Module"
        )
    return cast(Callable[..., nn.Module], create)
