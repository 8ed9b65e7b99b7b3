"""Arguments of ``tools/linear_eval.py``, and what its result says of them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from framework.checkpoints.folder import MANIFEST
from framework.evaluation.linear_eval import PROTOCOLS, Protocol, settings
from framework.runtime.errors import UserError

PLACES = {"run_dir", "data.path", "data.cache_dir", "data.workers"}  # may change between pieces of a run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those that say how the classifier learns."""
    parser.add_argument("--preset", choices=PROTOCOLS, default="loco", help="protocol; default: loco")
    parser.add_argument("--cached", action="store_true", help="fast mode on features computed once")
    parser.add_argument("--epochs", type=int, help="instead of the protocol's")
    parser.add_argument("--batch-size", type=int, help="over all ranks, instead of the protocol's")
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
    """What the result depends on but for the checkpoint, as the result says it."""
    return {
        "preset": arguments.preset,
        "cached": arguments.cached,
        "overrides": [text for text in overrides if text.split("=")[0] not in PLACES],
        **settings(protocol_of(arguments)),
    }


def conditions_asked(texts: Sequence[str]) -> dict[str, Any]:
    """``conditions`` of a command line without a run folder.

    Raises:
        UserError: an argument is wrong.
    """
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_arguments(parser)
    try:
        return conditions(*parser.parse_known_args(texts))
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from error


def of_checkpoint(folder: Path) -> dict[str, str]:
    """A checkpoint's name and the SHA-256 of its weights, for a run that is trained again has the same names."""
    manifest = json.loads((folder / MANIFEST).read_text())
    return {"checkpoint": folder.name, "weights": manifest["model.safetensors"]}


def result_name(found: dict[str, Any]) -> str:
    """What the file of a result, or of one under these conditions, is called, without its suffix."""
    return f"linear_eval_{found['preset']}{'_cached' * found['cached']}"
