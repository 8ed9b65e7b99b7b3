"""A run that lasts some seconds, its command line, and what it leaves."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import torch
from torch import Tensor

from framework.checkpoints.folder import read_files
from framework.config import loading
from framework.runtime.errors import UserError
from framework.tracking.metric_log import read_log
from framework.training.run import train

ROOT = Path(__file__).resolve().parents[2]
# Of any recipe for ImageNet.
TOY = [
    "network.name=resnet8",
    "data.prepare=digits",
    "data.num_classes=10",
    "data.image_size=8",
    "data.workers=1",
    "train.batch_size=64",
    "train.precision=fp32",
    "optim.name=lars",
    "optim.lr=0.5",
    "optim.warmup_epochs=1",
    "evaluate.knn=false",
]


def toy(folder: Path, *overrides: str) -> list[str]:
    """Overrides for a toy run in ``folder / "run"``."""
    return [*TOY, f"data.path={folder.parent / 'digits'}", f"run_dir={folder / 'run'}", *overrides]


def run(argv: list[str]) -> str:
    """Train on this rank; the error's text if there is one."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        try:
            train(loading.load(argv))
        except UserError as error:
            return str(error)
    return ""


def weights(folder: Path, step: int) -> dict[str, Tensor]:
    """Weights and optimizer of a checkpoint of the run in ``folder``."""
    checkpoint = folder / "run" / "checkpoints" / f"step-{step:08d}"
    _, model, optimizer = read_files(checkpoint)
    flat = {f"{name}/{key}": value for name, values in optimizer.items() for key, value in values.items()}
    return {**model, **flat}


def losses(folder: Path) -> list[dict[str, float]]:
    """The losses of every step."""
    return [entry["losses"] for entry in read_log(folder / "run" / "metrics.jsonl") if "losses" in entry]


def starts(folder: Path) -> int:
    """How often the run was started."""
    return sum("environment" in entry for entry in read_log(folder / "run" / "metrics.jsonl"))


def assert_same_run(folder: Path, undisturbed: Path, step: int) -> None:
    """Weights, optimizer and losses of both runs are the same, bit by bit."""
    ours, theirs = weights(folder, step), weights(undisturbed, step)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
    assert losses(folder) == losses(undisturbed)
