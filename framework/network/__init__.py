"""Networks and their segments."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

import timm
from torch import nn

import framework.network.cifar
import framework.network.presnet
import framework.network.shufflenet  # noqa: F401  these three register networks with timm
from framework.network.segments import Cut, Segment, Shape, cut, output_shapes, outputs
from framework.runtime.errors import UserError

__all__ = ["Cut", "Segment", "Shape", "create", "cut", "output_shapes", "outputs"]


def create(name: str, **arguments: Any) -> nn.Module:
    """A timm network without its classifier; ``arguments`` go to ``timm.create_model``.

    Raises:
        UserError: timm (and this package) know no such network, or it refuses the arguments.
    """
    if not timm.is_model(name.split(".")[0]):
        near = get_close_matches(name, timm.list_models(), n=1)
        raise UserError(
            f"network.name={name}: no such network" + (f"; did you mean {near[0]}?" if near else "")
        )
    try:
        return timm.create_model(name, num_classes=0, **arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"network.args={arguments}: {name} refuses them: {error}") from error
