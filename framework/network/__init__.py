"""Networks and their segments."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import timm
from torch import nn
from torch.nn.parameter import is_lazy

import framework.network.cifar
import framework.network.presnet
import framework.network.shufflenet  # noqa: F401  these three register networks with timm
from framework.network import own
from framework.network.segments import Cut, Segment, Shape, cut, output_shapes, outputs
from framework.runtime.errors import UserError

__all__ = ["Cut", "Segment", "Shape", "create", "cut", "freeze", "output_shapes", "outputs"]


#: arguments of timm's that other keys decide
DECIDED = {
    "num_classes": "networks have no classifier here; heads classify",
    "features_only": "the network itself is cut; network.cut says where",
    "device": "the engine places the network",
    "dtype": "train.precision decides",
}


def create(name: str, /, **arguments: Any) -> nn.Module:
    """A timm network without its classifier, or one of ``framework/network/own``.

    Args:
        name: timm's, or that of a file in ``own``.
        arguments: go to ``timm.create_model``, or to the file's ``create``.

    Raises:
        UserError: nobody knows such a network, or it refuses the arguments; names the argument where that can be told.
    """
    if arguments.get("in_chans", 3) != 3:
        raise UserError(f"network.args.in_chans={arguments['in_chans']}: images have 3 channels")
    for key in DECIDED.keys() & arguments.keys():
        raise UserError(f"network.args.{key}={arguments[key]}: not here: {DECIDED[key]}")
    if not isinstance(arguments.get("pretrained", False), bool):
        raise UserError(f"network.args.pretrained={arguments['pretrained']}: must be true or false")
    checkpoint = arguments.get("checkpoint_path")
    if checkpoint is not None and not isinstance(checkpoint, str):
        raise UserError(f"network.args.checkpoint_path={checkpoint}: must be the path of a file")
    if checkpoint and not Path(checkpoint).is_file():
        raise UserError(f"network.args.checkpoint_path={checkpoint}: no such file")
    if name in own.names():
        make = own.load(name)
    elif timm.is_model(name.split(".")[0]):
        make = partial(timm.create_model, name, num_classes=0)
    else:
        near = get_close_matches(name, [*timm.list_models(), *own.names()], n=1)
        raise UserError(
            f"network.name={name}: no such network" + (f"; did you mean {near[0]}?" if near else "")
        )
    for key, value in arguments.items():
        # timm takes any number, and the first step of training fails.
        rate = key.endswith(("drop_rate", "drop_path_rate")) and value is not None
        if rate and not (isinstance(value, int | float) and 0 <= value < 1):
            raise UserError(f"network.args.{key}={value}: must be at least 0 and below 1")
    try:
        with _hub_silent():
            network = make(**arguments)
    except Exception as error:  # whatever timm, its network or the user's file does with the arguments
        raise UserError(_refusal(name, arguments, error)) from error
    if not isinstance(network, nn.Module):
        raise UserError(
            f"network.name={name}: create() gives {type(network).__name__}, must be a torch.nn.Module"
        )
    if lazy := [key for key, p in network.named_parameters() if is_lazy(p)]:
        raise UserError(
            f"network.name={name}: {lazy[0]} has no shape yet; name the layer's channels, or call it once"
        )
    return network


@contextmanager
def _hub_silent() -> Iterator[None]:
    """Without a connection the hub's library prints lines for each of its tries; the error in the end says it all."""
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    hub.setLevel(logging.ERROR)
    try:
        yield
    finally:
        hub.setLevel(level)


def freeze(network: nn.Module, names: Sequence[str]) -> None:
    """Keep parameters from being trained.

    Args:
        network: of which.
        names: dotted, of modules and parameters.

    Raises:
        UserError: there is none of a name.
    """
    for name in names:
        below = [p for own, p in network.named_parameters() if own == name or own.startswith(f"{name}.")]
        if not below:
            raise UserError(f"network.freeze: {type(network).__name__} has no parameters under {name}")
        for parameter in below:
            parameter.requires_grad_(False)


def _refusal(name: str, arguments: dict[str, Any], error: Exception) -> str:
    """One line: which argument, and what was wrong with it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    what = f"{type(error).__name__}: {' '.join(lines[:2])[:200]}" if lines else type(error).__name__
    if "." in name and "tag" in what.lower():
        return f"network.name={name}: {what}"
    if arguments.get("checkpoint_path"):
        return f"network.args.checkpoint_path={arguments['checkpoint_path']}: can't be loaded into {name}: {what}"
    if arguments.get("pretrained") and isinstance(error, OSError | EOFError):
        return f"network.args.pretrained=true: the weights of {name} can't be fetched: {what}"
    if isinstance(error, TypeError | ValueError) and lines:
        what = " ".join(lines[:2])
    return f"network.args={arguments}: {name} refuses them: {what}"
