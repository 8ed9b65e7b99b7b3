"""Two small runs of the same network, trained for a few steps, that the tests of the analyses share."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from framework.config import loading
from framework.training.run import train

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "network.name=resnet8",
    "engine=ddp",
    "train.batch_size=64",
    "train.epochs=2",
    "optim.warmup_epochs=1",
]


def make_run(folder: Path, name: str, *overrides: str) -> Path:
    """Train on this rank: recipes/quickstart.yaml, smaller; the data lie in ``folder`` for all runs."""
    run_dir = folder / name
    argv = [str(ROOT / "recipes" / "quickstart.yaml"), f"name={name}", f"run_dir={run_dir}"]
    argv += [f"data.path={folder / 'digits'}", "train.max_steps=4", *SMALL, *overrides]
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        train(loading.load(argv))
    return run_dir


def make_both(folder: Path) -> tuple[str, str]:
    """A LoCo run and a GIM run, as text, since they cross a pipe."""
    loco = make_run(folder, "loco", "checkpoint.every_steps=2")
    return str(loco), str(make_run(folder, "gim", "method.name=gim", "evaluate.knn=false"))
