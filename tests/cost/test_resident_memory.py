"""What is counted for a rank is what a process has in memory."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from framework.config import loading
from framework.config.recipe import Recipe
from framework.cost.ranks import rank_costs
from framework.data.batch import Batch
from framework.runtime.distributed import world_size
from framework.training.engine_choice import build_engine, build_network
from tests.support.pool import Pool

ROOT = Path(__file__).resolve().parents[2]
CLASSES = 10
RANKS = 2
# Almost all of its memory is weights: 21 million in twelve blocks.
RECIPE = (
    str(ROOT / "recipes" / "dgl_vits16_300ep.yaml"),
    "data.path=unused",
    "network.cut=block",
    "train.batch_size=4",
    "train.ema=0",
)
# The same code, which is in memory from then on.
TINY = ("network.args={depth: 2, embed_dim: 48}",)
METHODS = {"dgl": ("method.head.kind=linear",), "bp": ("method.name=bp",)}
SETTINGS = {
    "ddp": ("engine=ddp",),
    "ZeRO-1": ("engine=deepspeed", "zero_stage=1"),
    "ZeRO-2": ("engine=deepspeed", "zero_stage=2"),
    "fsdp": ("engine=fsdp",),
}


def resident(kind: str) -> int:
    """Bytes of this process: ``VmRSS`` now, ``VmHWM`` at most since ``forget``."""
    found = re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return 1024 * int(found[1])


def forget() -> None:
    """``VmHWM`` begins anew (proc(5))."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_of_training(recipe: Recipe, tiny: Recipe) -> int:
    """Most bytes of this rank in two steps, above what it had before it made the network."""
    # glibc would keep freed blocks of some MB in its heap: mallopt(3), M_MMAP_THRESHOLD and M_TRIM_THRESHOLD.
    for parameter in (-3, -1):
        assert ctypes.CDLL(None).mallopt(parameter, 2**16)
    _train(tiny)
    before = resident("VmRSS")
    return _train(recipe) - before


def _train(recipe: Recipe) -> int:
    """``VmHWM`` of two steps after the first."""
    engine = build_engine(recipe, build_network(recipe, CLASSES), CLASSES)
    images, size = recipe.train.batch_size // world_size(), recipe.data.image_size
    batch = Batch(torch.randn(images, 3, size, size), torch.zeros(images, dtype=torch.int64), views=1)
    engine.step([batch], lambda: 1e-3)
    forget()
    for _ in range(2):
        engine.step([batch], lambda: 1e-3)
    engine.finish()
    peak = resident("VmHWM")
    engine.close()
    return peak


def measured(overrides: Sequence[str]) -> int:
    """The largest of the ranks, which are new processes."""
    pool = Pool(RANKS)
    try:
        return max(pool.run(peak_of_training, *(loading.load([*overrides, *more]) for more in ((), TINY))))
    finally:
        pool.close()


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("engine", SETTINGS)
def test_counted_memory_is_that_of_a_process(engine: str, method: str) -> None:
    overrides = [*RECIPE, *METHODS[method], *SETTINGS[engine]]
    costs = rank_costs(loading.load(overrides), CLASSES, RANKS)
    (counted,) = (cost for cost in costs if (cost.engine, cost.training) == (engine, "local"))
    assert measured(overrides) == pytest.approx(counted.memory, rel=0.15)
