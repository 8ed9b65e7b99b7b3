"""Recipes on shards of JPEGs: only data, batch, image size, length and, with SGD, the rate are overridden."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from framework.config import loading
from framework.tracking.metric_log import read_log
from framework.training.run import train
from tests.support.commands import run_tool
from tests.support.marks import slow, soak
from tests.support.pool import Pool

ROOT = Path(__file__).resolve().parents[2]
CLASSES, EACH, STEPS = 10, 2, 6
# LARS needs no other rate for a small batch; that of SGD goes with the batch, from 1024 or 256 to 20.
SGD = ("optim.lr=0.02", "optim.warmup_epochs=0")
#: recipe -> batch, image size and optimizer; one of each method, and of each table's protocol
RUNS = {
    "loco_r50_800ep": (10, 64),
    "gim_sh50_100ep": (10, 64),
    "cifar10/mlaan_r32_k8_cifar10": (20, 32, *SGD),
    "svhn/dgl_r32_k16_svhn": (20, 32, *SGD),
    "stl10/infopro_r32_k8_stl10": (20, 32, *SGD),
    "mlaan_r34": (20, 64, *SGD),
}


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
    assert run_tool("make_shards", folder / "images", folder / "shards") == 0
    return folder / "shards"


def steps(argv: list[str]) -> None:
    train(loading.load(argv))


@pytest.mark.parametrize(
    "name",
    [
        "svhn/dgl_r32_k16_svhn",
        *slow(["cifar10/mlaan_r32_k8_cifar10", "loco_r50_800ep", "gim_sh50_100ep"]),
        *slow(["stl10/infopro_r32_k8_stl10"]),
        *soak(["mlaan_r34"]),  # the heads of 7 units read copies of 512-channel blocks
    ],
)
def test_a_recipe_learns_from_its_first_steps(
    name: str, shards: Path, tmp_path: Path, pool: Callable[[int], Pool]
) -> None:
    batch, size, *optimizer = RUNS[name]
    overrides = [f"data.path={shards}", f"train.batch_size={batch}", f"data.image_size={size}", *optimizer]
    # Ranks of the pool have no children.
    overrides += ["data.workers=0", f"train.max_steps={STEPS}", f"run_dir={tmp_path}"]
    pool(1).run(steps, [str(ROOT / "recipes" / f"{name}.yaml"), *overrides])
    losses = [entry["losses"] for entry in read_log(tmp_path / "metrics.jsonl") if "losses" in entry]
    assert len(losses) == STEPS
    total = [sum(step.values()) for step in losses]
    assert np.mean(total[-2:]) < 0.98 * np.mean(total[:2]), total
    recipe = loading.load([str(tmp_path / "recipe.yaml")])
    assert json.loads((tmp_path / "result.json").read_text())["method"] == recipe.method.name
    backbone = load_file(tmp_path / "backbone.safetensors")
    assert {int(value) for key, value in backbone.items() if "num_batches" in key} == {STEPS}
