"""Recipes on shards of JPEGs: only data, batch, image size and length are overridden, and worker processes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from framework.config import loading
from framework.tracking.metric_log import read_log
from framework.training.run import train
from tests.support.pool import Pool

ROOT = Path(__file__).resolve().parents[2]
CLASSES, EACH = 10, 2
#: recipe -> batch and image size; one of each method, and of each table's protocol
RUNS = {
    "loco_r50_800ep": (4, 64),
    "gim_sh50_100ep": (4, 64),
    "cifar10/mlaan_r32_k8_cifar10": (8, 32),
    "svhn/dgl_r32_k16_svhn": (8, 32),
    "stl10/infopro_r32_k8_stl10": (8, 32),
    "mlaan_r34": (4, 64),
}
LONG = {"mlaan_r34"}  # the heads of 7 units read copies of 512-channel blocks


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """WorkerBatch photos in class folders, packed by the tool; there is no held-out split."""
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for label in range(CLASSES):
        for number in range(EACH):
            path = folder / "images" / "train" / f"class{label}" / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((120, 90)).save(path)
    command = [sys.executable, "tools/make_shards.py", str(folder / "images"), str(folder / "shards")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folder / "shards"


def two_steps(argv: list[str]) -> None:
    train(loading.load(argv))


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.soak) if n in LONG else n for n in RUNS])
def test_two_steps(name: str, shards: Path, tmp_path: Path, pool: Callable[[int], Pool]) -> None:
    batch, size = RUNS[name]
    overrides = [f"data.path={shards}", f"train.batch_size={batch}", f"data.image_size={size}"]
    overrides += [
        "data.workers=0",
        "train.max_steps=2",
        f"run_dir={tmp_path}",
    ]  # ranks of the pool have no children
    pool(1).run(two_steps, [str(ROOT / "recipes" / f"{name}.yaml"), *overrides], timeout=600)
    losses = [entry["losses"] for entry in read_log(tmp_path / "metrics.jsonl") if "losses" in entry]
    recipe = loading.load([str(tmp_path / "recipe.yaml")])
    assert len(losses) == 2 and all(np.isfinite(list(step.values())).all() for step in losses)
    assert json.loads((tmp_path / "result.json").read_text())["method"] == recipe.method.name
    backbone = load_file(tmp_path / "backbone.safetensors")
    assert {int(value) for key, value in backbone.items() if "num_batches" in key} == {2}
