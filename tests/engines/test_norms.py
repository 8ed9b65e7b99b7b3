"""Norms of gradient, weights and update by unit, against a plain loop in one process that keeps every tensor whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from framework.data.batch import Batch
from framework.engines.base import marked, set_learning_rate
from framework.engines.norms import KINDS, Norms, UnitNorms, owning_units
from framework.execution import LocalNetwork
from tests.support import networks, pipelines, training
from tests.support.marks import slow
from tests.support.training import Case

PoolOf = Callable[[int], Any]
Units = Mapping[str, list[str]]  # names of every unit's parameters
MEASURED = (0, 2)  # steps; the one between is not


def expected(
    net: LocalNetwork,
    units: Units,
    make_optimizer: Callable[[nn.Module], Any],
    batches: Callable[[int], list[Batch]],
    rate: Callable[[int], float],
    clip: float,
) -> list[Norms]:
    """By a plain loop of three steps."""
    optimizer, named, found = make_optimizer(net), dict(net.named_parameters()), []
    assert sorted(name for names in units.values() for name in names) == sorted(named)

    def norms(tensors: Mapping[str, Tensor]) -> dict[str, float]:
        parts = {
            unit: [tensors[name].double().flatten() for name in names if name in tensors]
            for unit, names in units.items()
        }
        return {unit: float(torch.cat(part).norm()) for unit, part in parts.items() if part}

    for step in range(3):
        torch.manual_seed(step)
        micro_batches = batches(step)
        for batch in marked(micro_batches):
            (net(batch).loss / len(micro_batches)).backward()
        if clip:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        before = {name: p.detach().clone() for name, p in named.items()}
        gradients = {name: p.grad.clone() for name, p in named.items() if p.grad is not None}
        set_learning_rate(optimizer, rate(step))
        optimizer.step()
        optimizer.zero_grad()
        after = {name: p.detach() for name, p in named.items()}
        updates = {name: after[name] - before[name] for name in named}
        if step in MEASURED:
            kinds = zip(KINDS, (gradients, after, updates), strict=True)
            found.append({kind: norms(tensors) for kind, tensors in kinds})
    return found


def assert_same(ours: list[Norms], theirs: list[Norms], tolerance: float) -> None:
    assert len(ours) == len(theirs) == len(MEASURED)
    for mine, other in zip(ours, theirs, strict=True):
        assert list(mine) == list(KINDS)
        for kind in KINDS:
            assert mine[kind] == pytest.approx(other[kind], rel=tolerance), kind
            assert all(value > 0 for value in mine[kind].values())


# ResNet-8 under LoCo: the first unit has the whole of its window, the second what is above.
LOCO = {
    "layer2": ("backbone.conv1.", "backbone.bn1.", "backbone.layer1.", "backbone.layer2.", "heads.layer2."),
    "layer3": ("backbone.layer3.", "heads.layer3."),
}


def measured(case: Case) -> list[Norms]:
    """Under an engine, on every rank of a pool."""
    engine = training.build(case)
    norms, found = UnitNorms(engine), []
    for step in range(3):
        if step in MEASURED:
            norms.measure()
        training.advance(engine, case, range(step, step + 1))
        if step in MEASURED:
            found.append(norms.result()())
    engine.close()
    return found


MOVED = {"zero_optimization": {"round_robin_gradients": True}}  # to other places of ZeRO's flat tensors
LOCAL, FLOAT32 = Case(method="loco", dtype="float64"), Case(method="loco")


@pytest.mark.parametrize(
    ("case", "ranks"),
    [
        (replace(FLOAT32, zero_stage=2), 2),
        *slow((replace(LOCAL, engine="ddp"), ranks) for ranks in (1, 2)),
        *slow([(replace(LOCAL, engine="ddp", optimizer="adamw"), 4), (replace(FLOAT32, deepspeed=MOVED), 4)]),
        *slow([(replace(LOCAL, engine="ddp", accumulation=2, clip=0.05), 2)]),
        *slow((replace(LOCAL, engine="fsdp"), ranks) for ranks in (1, 2, 4)),
        *slow([(replace(LOCAL, engine="fsdp", optimizer="sgd", clip=0.05, accumulation=2), 2)]),
        *slow((replace(FLOAT32, zero_stage=z), ranks) for z, ranks in product((0, 1, 2), (1, 4))),
        *slow((replace(FLOAT32, zero_stage=z, optimizer="adamw", clip=0.05), 2) for z in (0, 1, 2)),
    ],
    ids=str,
)
def test_norms_are_those_of_one_process(pool: PoolOf, case: Case, ranks: int) -> None:
    net = training.network(case)
    units = {
        unit: [name for name, _ in net.named_parameters() if name.startswith(prefixes)]
        for unit, prefixes in LOCO.items()
    }
    reference = expected(
        net,
        units,
        training.optimizer_factory(case),
        lambda step: training.micro_batches(case, step),
        lambda step: training.learning_rate(case, step),
        case.clip,
    )
    results = pool(ranks).run(measured, case)
    assert_same(results[0], reference, 1e-11 if case.dtype == "float64" else 1e-4)
    sharded = case.engine == "fsdp" or (case.engine == "deepspeed" and case.zero_stage > 0)
    for other in results[1:]:
        assert other == (results[0] if sharded else [{}, {}])


def measured_in_stages(run: pipelines.Run) -> list[Norms]:
    """The same in a pipeline; read at the end, since stages run behind each other."""
    engine = pipelines.build(run)
    norms, found = UnitNorms(engine, run.stages), []
    for step in range(3):
        if step in MEASURED:
            norms.measure()
        pipelines.advance(engine, run, range(step, step + 1))
        if step in MEASURED:
            found.append(norms.result())
    numbers = [read() for read in found]
    engine.close()
    return numbers


@pytest.mark.parametrize(
    "run",
    slow(
        [
            pipelines.Run("loco"),
            pipelines.Run("mlaan", stages=2, replicas=2, optimizer="lars"),
            pipelines.Run("dgl", stages=4, clip=0.05),
            pipelines.Run("gim", replicas=2, zero_stage=1, dtype="float32", optimizer="adamw"),
        ]
    ),
    ids=str,
)
def test_norms_of_stages_are_those_of_one_process(pool: PoolOf, run: pipelines.Run) -> None:
    net = pipelines.network(run)
    reference = expected(
        net,
        owned(net),
        pipelines.factory(run),
        lambda step: pipelines.micro_batches(run, net, step),
        lambda step: pipelines.rate(run, step),
        run.clip,
    )
    for result in pool(run.ranks).run(measured_in_stages, run):
        assert_same(result, reference, 1e-9 if run.dtype == "float64" and not run.clip else 1e-4)


def owned(net: LocalNetwork) -> Units:
    owners, units = owning_units(net), net.plan.units
    return {
        unit.name: [name for name, p in net.named_parameters() if owners.get(p) == number]
        for number, unit in enumerate(units)
    }


@pytest.mark.parametrize("case", ["mlaan", *slow(c for c in networks.CASES if c != "mlaan")])
def test_every_trained_parameter_belongs_to_one_unit(case: str) -> None:
    net = networks.network(case)
    units = owned(net)
    trained = [name for name, parameter in net.named_parameters() if parameter.requires_grad]
    assert sorted(name for names in units.values() for name in names) == sorted(trained)
    for unit in net.plan.units:
        inside = {p for s in unit.learns for p in net.segments[s].parameters()} | {*unit.head.parameters()}
        assert inside >= {net.get_parameter(name) for name in units[unit.name]}
