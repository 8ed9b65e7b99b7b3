"""Pipeline stages that contrast over the whole batch, and whose copies may lag, against definitions in one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from framework.data.batch import Batch
from framework.execution import LocalNetwork
from framework.network.norm import frozen_statistics
from framework.pipeline.scheduling.placement import Placement
from tests.support import networks
from tests.support.pipelines import (
    Outcome,
    Run,
    alone,
    errors,
    factory,
    micro_batches,
    network,
    rate,
    train,
)

PoolOf = Callable[[int], Any]


def contrasted_whole(run: Run) -> dict[str, Tensor]:
    """In plain autograd: embeddings of all micro-batches, BatchNorm a micro-batch at a time, one loss a unit."""
    net = network(run)
    optimizer = factory(run)(net)
    for step in range(run.steps):
        batches = micro_batches(run, net, step)
        net.start_micro_batch()  # of the step, where a teacher follows
        with frozen_statistics(net):
            total = sum(unit.weight * _whole_loss(net, unit, batches) for unit in net.plan.units)
        total.backward()
        net.end_micro_batch(batches[-1])
        for group in optimizer.param_groups:
            group["lr"] = rate(run, step)
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def by_view(parts: list[Tensor]) -> Tensor:
    """Of two views, as all of these cases have."""
    return torch.cat([part.unflatten(0, (2, -1)) for part in parts], 1).flatten(0, 1)


def _whole_loss(net: LocalNetwork, unit: Any, batches: list[Batch]) -> Tensor:
    embeddings, keys = [], []
    for batch in batches:
        keys.append(networks.taught_by(net, batch)[unit.head].teacher)
        x = batch.images
        for s in range(unit.last + 1):
            x = net.segments[s](x.detach() if s == unit.first else x)
        embeddings.append(unit.head.embed(x))
    labels = torch.cat([b.labels for b in batches]) if batches[0].labels is not None else None
    teacher = by_view(keys) if keys[0] is not None else None
    return unit.head.objective(by_view(embeddings), batches[0]._replace(labels=labels, teacher=teacher))


@pytest.mark.slow
@pytest.mark.parametrize(
    "run",
    [
        Run("gim", 2, 3, options={"contrast": "batch"}),
        Run("loco", 3, 2, options={"contrast": "batch"}),
        Run("loco-3", 4, 2, options={"contrast": "batch"}),
        Run("simclr", 1, 4, options={"contrast": "batch"}),
        Run("loco-vicreg", 2, 2, replicas=2, options={"contrast": "batch"}),
        Run("simclr-mocov3", 2, 2, replicas=2, options={"contrast": "batch"}),
    ],
    ids=str,
)
def test_contrast_over_the_whole_batch(pool: PoolOf, run: Run) -> None:
    ours, theirs = pool(run.ranks).run(train, run)[0], contrasted_whole(run)
    each = alone(run).model
    for name, value in theirs.items():
        assert (ours.model[name] - value).abs().max() < 1e-9 * value.abs().max().clamp_min(1e-3), name
    assert any((each[name] - value).norm() > 1e-6 * value.norm() for name, value in theirs.items())


def lagging(run: Run) -> Outcome:
    """One process in which copies follow the weights of ``lam_lag`` steps before, and catch up at the end."""
    net, lag = network(run), run.options["lam_lag"]
    optimizer, past = factory(run)(net), []
    heads = [head for head in net.plan.heads if head.reads]
    follow = [head.before_step for head in heads]
    for head in heads:
        head.will_lag()
        head.before_step = lambda *_: None
    stage_of = Placement(run.bounds).stage_of
    units = {unit.head: unit for unit in net.plan.units}

    def catch_up(step: int) -> None:
        now = {name: p.detach().clone() for name, p in net.backbone.named_parameters()}
        for head, move in zip(heads, follow, strict=True):
            if stage_of(head.reads[0]) != stage_of(units[head].last):
                net.backbone.load_state_dict(past[step], strict=False)
                move(net.segments, 1.0)
        net.backbone.load_state_dict(now, strict=False)

    losses = []
    for step in range(run.steps):
        if step > lag:
            catch_up(step - 1 - lag)
        past.append({name: p.detach().clone() for name, p in net.backbone.named_parameters()})
        outputs = []
        for batch in micro_batches(run, net, step):
            output = net(batch)
            (output.loss / run.micro_batches).backward()
            outputs.append(output.unit_losses)
        losses.append(torch.stack(outputs).mean(0))
        for head, move in zip(heads, follow, strict=True):
            if stage_of(head.reads[0]) == stage_of(units[head].last):
                move(net.segments, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate(run, step)
        optimizer.step()
        optimizer.zero_grad()
    for step in range(max(0, run.steps - 1 - lag), run.steps):
        catch_up(step)
    states = {name: dict(optimizer.state[p]) for name, p in net.named_parameters() if optimizer.state.get(p)}
    return Outcome(dict(net.state_dict()), states, torch.stack(losses))


@pytest.mark.slow
@pytest.mark.parametrize("lag", [0, 2])
def test_copies_that_may_lag_do_so_by_exactly_so_much(pool: PoolOf, lag: int) -> None:
    run = Run("lam", 3, 1, steps=6, bounds=(0, 2, 4, 6), options={"lam_lag": lag})
    assert max(errors(pool(3).run(train, run)[0], lagging(run)).values()) < 1e-10
    exact = errors(lagging(run), alone(run))
    assert (max(exact.values()) > 1e-6) == (lag > 0)
