"""Parameters whose learning rate is constant, under every engine."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from framework.config import loading
from framework.config.recipe import Recipe
from framework.model import recipe_network
from framework.optim import build_optimizer
from framework.runtime.distributed import rank
from framework.training.engine_choice import build_engine
from tests.support import networks
from tests.support.marks import slow
from tests.support.runs import ROOT

IMAGES, SIZE, LR, FACTOR = 8, 16, 0.1, 0.25
OVERRIDES = [
    *(
        "network.name=resnet8",
        "network.sync_bn=false",
        f"data.image_size={SIZE}",
        f"train.batch_size={IMAGES}",
    ),
    *("method.head.proj_hidden=16", "method.head.dim=8", "method.head.pred_hidden=8", "method.head.queue=16"),
    *("optim.name=sgd", f"optim.lr={LR}", "optim.weight_decay=0", "train.precision=fp32"),
]


def recipe_of(overrides: Sequence[str]) -> Recipe:
    return loading.load([str(ROOT / "recipes" / "quickstart.yaml"), *OVERRIDES, *overrides])


def changes(overrides: Sequence[str], data: int, parts: int) -> dict[str, Tensor]:
    """What a step does to every parameter, where the schedule has come to a quarter of the rate."""
    torch.manual_seed(0)
    recipe = recipe_of(overrides)
    net = recipe_network(recipe, networks.CLASSES).train()
    names = [name for name, _ in net.named_parameters()]
    engine = build_engine(recipe, net, networks.CLASSES)
    before = engine.model_state()
    batches = [part(net, data + (rank() if parts == 2 else 0))] if engine.loads else []
    engine.step(batches, lambda: LR * FACTOR)
    after = engine.model_state()
    engine.close()
    return {name: after[name] - before[name] for name in names if name in after}


def part(net: Any, seed: int) -> Any:
    data = networks.batch(net, IMAGES // 2, SIZE, seed)
    return data._replace(images=data.images.float())


def expected(overrides: Sequence[str], parts: int) -> dict[str, Tensor]:
    """The formula: - rate * gradient, averaged over the ranks' parts of the batch."""
    torch.manual_seed(0)
    net = recipe_network(recipe_of(overrides), networks.CLASSES).train()
    gradients = [networks.routed(net, part(net, seed)) for seed in range(parts)]
    return {
        name: -(LR if "predictor" in name and "simsiam" in overrides[0] else LR * FACTOR)
        * torch.stack([g[name] for g in gradients]).mean(0)
        for name in gradients[0]
    }


@pytest.mark.parametrize(
    ("objective", "engine"),
    [
        ("simsiam", ["zero_stage=2"]),
        *slow([("simsiam", ["engine=fsdp"]), ("simsiam", ["zero_stage=0"]), ("simsiam", ["zero_stage=1"])]),
        *slow([("simsiam", ["engine=ddp"]), ("byol", ["engine=ddp"])]),
        *slow([("simsiam", ["pipeline.stages=2", f"zero_stage={stage}"]) for stage in (0, 1)]),
    ],
    ids=str,
)
def test_a_predictor_keeps_its_rate_where_the_schedule_has_fallen(
    pool: Callable[[int], Any], objective: str, engine: list[str]
) -> None:
    """SimSiam's; BYOL's falls with all others."""
    overrides = [f"method.head.objective={objective}", *engine]
    parts = 1 if "pipeline.stages=2" in engine else 2
    found, right = pool(2).run(changes, overrides, 0, parts)[0], expected(overrides[:1], parts)
    assert found.keys() == right.keys() and any("predictor" in name for name in found)
    changed = [name for name in right if "predictor" in name and right[name].abs().max() > 1e-3]
    assert changed  # by more than the rounding of weights around 1
    assert all(torch.allclose(found[name], right[name], rtol=1e-4, atol=2e-7) for name in right)


def test_which_parameters_are_constant() -> None:
    """Those of the predictors, also in copies of a network, behind other modules, and where the recipe asks for it."""
    net = copy.deepcopy(recipe_network(recipe_of(["method.head.objective=simsiam"]), networks.CLASSES))
    predictors = [p for name, p in net.named_parameters() if "predictor" in name]
    assert predictors and list(map(id, net.constant_rate())) == list(map(id, predictors))
    constant, rate = net.constant_rate(), 0.3
    for decay, count in (("weights", 4), ("all", 4)):
        groups = build_optimizer(net, decay=decay, constant=constant, constant_lr=rate).param_groups  # type: ignore[arg-type]
        assert [(g["scheduled"], g["lr"]) for g in groups] == [(True, 0.0)] * 2 + [(False, rate)] * 2
        assert len(groups) == count and sum(len(g["params"]) for g in groups) == len(list(net.parameters()))
        assert {id(p) for g in groups[2:] for p in g["params"]} == set(map(id, predictors))
    soft = recipe_network(
        recipe_of(["method.head.objective=simsiam", "method.soft_share=0.1"]), networks.CLASSES
    )
    assert len(soft.constant_rate()) == len(predictors)
    for overrides, found in (
        (["method.head.objective=simsiam", "method.head.pred_rate=scheduled"], 0),
        (["method.head.objective=mocov3", "method.head.pred_rate=constant"], len(predictors)),
        (["method.head.objective=moco", "method.head.pred_rate=constant"], 0),
        (["method.head.objective=byol"], 0),
    ):
        assert len(recipe_network(recipe_of(overrides), networks.CLASSES).constant_rate()) == found, overrides
