"""The papers' protocols of linear evaluation, the options that change them, and how results name them.

Imports nothing that takes long: a command's ``--help`` lists the protocols.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from framework.runtime.command import Parser, bounded
from framework.runtime.errors import UserError

PLACES = {"run_dir", "data.path", "data.cache_dir", "data.workers"}  # may change between pieces of a run


@dataclass(frozen=True)
class Protocol:
    """How the classifier learns; no weight decay: MoCo and SimCLR have none, LoCo doesn't say.

    Attributes:
        lr: for a batch of 256; grows in proportion to the batch.
        momentum: of SGD.
        nesterov: kind of momentum.
        epochs: passes over the training images.
        batch_size: over all ranks.
        drops: epochs at which the rate is divided by ten; without any it falls as a cosine.
    """

    lr: float
    momentum: float
    nesterov: bool
    epochs: int
    batch_size: int
    drops: tuple[int, ...] = ()

    def learning_rate(self, step: int, steps_per_epoch: int) -> float:
        """Of a step, counted from 0."""
        peak = self.lr * self.batch_size / 256
        if self.drops:
            return peak * 0.1 ** sum(step // steps_per_epoch >= drop for drop in self.drops)
        return peak * (1 + math.cos(math.pi * step / (self.epochs * steps_per_epoch))) / 2

    def settings(self, **more: Any) -> dict[str, Any]:
        """The protocol and whatever else a fit depends on, for JSON."""
        return {**asdict(self), "drops": list(self.drops), **more}


#: SimCLR's has the cosine of its released code.
PROTOCOLS = {
    "loco": Protocol(lr=30.0, momentum=0.0, nesterov=False, epochs=100, batch_size=256, drops=(30, 60, 90)),
    "moco": Protocol(lr=30.0, momentum=0.9, nesterov=False, epochs=100, batch_size=256, drops=(60, 80)),
    "simclr": Protocol(lr=0.1, momentum=0.9, nesterov=True, epochs=90, batch_size=4096),
}


def add_arguments(parser: Parser) -> None:
    """Those that say how the classifier learns."""
    parser.add_argument("--preset", choices=PROTOCOLS, default="loco", help="protocol; default: loco")
    parser.add_argument("--cached", action="store_true", help="fast mode on features computed once")
    parser.add_argument("--epochs", type=bounded(int, 1), help="instead of the protocol's")
    parser.add_argument(
        "--batch-size", type=bounded(int, 1), help="over all ranks, instead of the protocol's"
    )
    parser.add_argument("--lr", type=float, help="for a batch of 256, instead of the protocol's")


def protocol_of(arguments: argparse.Namespace) -> Protocol:
    """The preset with what was given instead.

    Raises:
        UserError: a number that is not above 0.
    """
    given = {"epochs": arguments.epochs, "batch_size": arguments.batch_size, "lr": arguments.lr}
    for name, value in given.items():
        if value is not None and value <= 0:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be above 0")
    return replace(PROTOCOLS[arguments.preset], **{k: v for k, v in given.items() if v is not None})


def conditions(arguments: argparse.Namespace, overrides: Sequence[str]) -> dict[str, Any]:
    """What a result depends on, the checkpoint apart, as the result states it."""
    return {
        "preset": arguments.preset,
        "cached": arguments.cached,
        "overrides": [text for text in overrides if text.split("=")[0] not in PLACES],
        **protocol_of(arguments).settings(),
    }


def conditions_asked(texts: Sequence[str]) -> dict[str, Any]:
    """``conditions`` of a command line without a run folder.

    Raises:
        UserError: an argument is wrong.
    """
    parser = Parser(exit_on_error=False)
    add_arguments(parser)
    try:
        return conditions(*parser.parse_known_args(texts))
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from error


def result_name(found: dict[str, Any]) -> str:
    """What the file of a result, or of one under these conditions, is called, without its suffix."""
    return f"linear_eval_{found['preset']}{'_cached' * found['cached']}"
