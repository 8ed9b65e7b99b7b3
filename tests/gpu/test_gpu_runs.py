"""The command itself: a run of the quick start on one GPU, resumed, with images in memory, from a CUDA graph."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from framework.runtime.files import read_object
from tests.support import runs
from tests.support.runs import ROOT

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the runs and their digits."""
    return tmp_path_factory.mktemp("runs")


def trained(folder: Path, name: str, device: torch.device, *overrides: str) -> list[dict[str, float]]:
    """Train some steps of the quick start; the losses of every step so far."""
    command = [str(ROOT / "framework" / "train.py"), str(ROOT / "recipes" / "quickstart.yaml")]
    paths = [f"data.path={folder / 'digits'}", f"run_dir={folder / name / 'run'}"]
    hidden = {} if device.type == "cuda" else {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, *command, *paths, "data.workers=2", *overrides],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path), **hidden},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return runs.losses(folder / name)


def near(found: list[dict[str, float]], expected: list[dict[str, float]], tolerance: float) -> bool:
    """Whether the losses of the first steps are, before rounding has grown."""
    return all(
        abs(ours[unit] - theirs[unit]) < tolerance
        for ours, theirs in zip(found[:3], expected[:3], strict=True)
        for unit in theirs
    )


def test_a_run_on_the_device_is_the_cpus(folder: Path, device: torch.device) -> None:
    """Stopped after three steps and gone on with; scored at the end, from features that the device computes."""
    short = [] if device.type == "cuda" else ["evaluate.knn=false"]
    trained(folder, "deepspeed", device, "train.max_steps=3", "evaluate.knn=false")
    losses = trained(folder, "deepspeed", device, "train.max_steps=6", *short)
    assert len(losses) == 6 and runs.starts(folder / "deepspeed") == 2
    expected = trained(folder, "cpu", torch.device("cpu"), "train.max_steps=3", "evaluate.knn=false")
    assert near(losses, expected, 0.05)
    if not short:
        assert read_object(folder / "deepspeed" / "run" / "result.json")["knn_top1"] > 50


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.cache=memory", "engine=ddp"],
        ["data.cache=memory", "execution.cuda_graph=true"],
        ["train.precision=bf16", "network.channels_last=true", "engine=fsdp"],
        ["train.precision=fp16"],
    ],
    ids=" ".join,
)
def test_a_run_with_other_settings(folder: Path, gpu: torch.device, overrides: list[str]) -> None:
    name = "-".join(overrides).replace("=", "-").replace(".", "-")
    found = trained(folder, name, gpu, "train.max_steps=6", "evaluate.knn=false", *overrides)
    assert len(found) == 6 and all(0 < loss < 20 for step in found for loss in step.values())
