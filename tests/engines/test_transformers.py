"""Transformers under every engine: what takes no decay, and layers that learn at their own rates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from framework.local.heads import Classifier, Projection
from tests.support.marks import slow
from tests.support.training import Case, differences, plain, train

PoolOf = Callable[[int], Any]
# Without BatchNorm, which would take biases out, whose gradient were rounding that AdamW follows.
HEAD = {"head": Projection(pool="both", proj_hidden=16, dim=8, proj_bn="none")}
LINEAR = {"head": Classifier("linear")}
DECODER = {"decoder_depth": 1, "decoder_dim": 16, "decoder_heads": 2}
CASES = {
    "vit, layers": Case("gim", "block", "adamw", options=HEAD, network="vit", layer_decay=0.5),
    "vit, lars": Case("gim", "block", "lars", options=HEAD, network="vit"),
    "mim": Case("mim", "block", "sgd", options=DECODER, network="vit"),
    "swin, layers": Case("dgl", "block", "adamw", options=LINEAR, network="swin", layer_decay=0.5),
}


@pytest.mark.parametrize(
    ("name", "engine", "ranks"),
    [
        ("vit, layers", "fsdp", 2),
        *slow([("mim", "ddp", 2), ("mim", "ddp", 4), ("mim", "fsdp", 2)]),
        *slow([("vit, layers", "ddp", 4), ("vit, lars", "ddp", 2), ("vit, lars", "fsdp", 4)]),
        *slow([("swin, layers", "ddp", 2), ("swin, layers", "fsdp", 2)]),
    ],
)
def test_transformers_equal_one_process(pool: PoolOf, name: str, engine: str, ranks: int) -> None:
    case = replace(CASES[name], engine=engine, dtype="float64", accumulation=2)
    errors = differences(pool(ranks).run(train, case)[0], plain(case))
    assert max(errors.values(), default=0) < 1e-9


@pytest.mark.parametrize(
    ("name", "zero_stage"),
    [
        ("vit, layers", 2),
        *slow(
            [
                ("mim", 0),
                ("mim", 1),
                ("mim", 2),
                ("vit, layers", 1),
                ("vit, lars", 1),
                ("vit, lars", 2),
                ("swin, layers", 1),
            ]
        ),
    ],
)
def test_transformers_under_zero_equal_ddp(pool: PoolOf, name: str, zero_stage: int) -> None:
    """To the last bit: float32, and two addends have one sum."""
    case = CASES[name]
    run = pool(2).run(train, replace(case, zero_stage=zero_stage))[0]
    assert differences(run, pool(2).run(train, replace(case, engine="ddp"))[0]) == {}
