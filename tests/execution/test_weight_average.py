"""The average of the weights: timm's formula, in every engine, in checkpoints, and where a network is evaluated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from framework.checkpoints.saver import save_checkpoint
from framework.checkpoints.snapshot import load_checkpoint
from framework.data.batch import Batch
from framework.engines import Engine
from framework.evaluation.features import averaged, evaluating
from framework.execution import LocalNetwork
from framework.execution.weight_average import PREFIX, WeightAverage, evaluated_backbone
from framework.model import local_network
from framework.runtime.distributed import is_main
from framework.runtime.errors import UserError
from tests.support import pipelines, training
from tests.support.marks import slow
from tests.support.pipelines import Run
from tests.support.training import Case

PoolOf = Callable[[int], Any]
DECAY = 0.75
State = dict[str, Tensor]


def network(method: str = "dgl") -> LocalNetwork:
    torch.manual_seed(0)
    net = local_network("resnet8", method, image_size=8, num_classes=4).train()
    net.keep_average(DECAY)
    return net


def step(net: LocalNetwork, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    images, labels = torch.randn(8, 3, 8, 8, generator=generator), torch.arange(8) % 4
    net(Batch(images, labels)).loss.backward()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.sub_(0.1 * parameter.grad)
    net.zero_grad()


def test_the_average_is_timms() -> None:
    """Of the backbone with its buffers and of the classifier, the first update a copy."""
    net = network()
    last = net.heads[net.plan.units[-1].name]
    theirs = ModelEmaV3(net.backbone, decay=DECAY), ModelEmaV3(last, decay=DECAY)
    for number in range(4):
        step(net, number)
        net.average.update(net)
        for average, module in zip(theirs, (net.backbone, last), strict=True):
            average.update(module, step=number + 1)
        ours = net.average.state_dict()
        for average, prefix in zip(theirs, ("backbone.", "heads.layer3."), strict=True):
            for name, value in average.module.state_dict().items():
                torch.testing.assert_close(ours.pop(prefix + name), value)
        assert ours == {"updates": torch.tensor(number + 1)}


def test_a_skipped_step_moves_nothing() -> None:
    net = network("bp")
    step(net, 0)
    net.average.update(net)
    before = {name: value.clone() for name, value in net.average.state_dict().items()}
    step(net, 1)
    net.average.update(net, torch.zeros(()))
    for name, value in net.average.state_dict().items():
        assert torch.equal(value, before[name]) or "num_batches" in name


def test_inside_the_network_is_its_average_and_afterwards_itself() -> None:
    net = network()
    for number in range(3):
        step(net, number)
        net.average.update(net)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    images = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with averaged(net), evaluating(net):
        found = net.features(images), net.predict(images)
    after = net.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    other = network()
    averages = {n.removeprefix(PREFIX): t for n, t in before.items() if n.startswith(PREFIX)}
    other.load_state_dict(before | averages, strict=False)
    with evaluating(other):
        assert torch.equal(other.features(images), found[0]) and torch.equal(other.predict(images), found[1])
    assert all(torch.equal(t, before[f"{PREFIX}backbone.{n}"]) for n, t in evaluated_backbone(before).items())


def test_a_weight_of_two_names_is_exchanged_once() -> None:
    net = nn.Module()
    net.first = net.second = nn.Linear(2, 3)
    average, before = WeightAverage(net, ["first", "second"], DECAY), net.first.weight.detach().clone()
    with torch.no_grad():
        net.first.weight.add_(1.0)
    average.exchange(net)
    assert torch.equal(net.second.weight, before)
    average.exchange(net)
    assert torch.equal(net.second.weight, before + 1.0)


def features(net: LocalNetwork) -> Tensor:
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return net.features(images.to(next(net.parameters()).dtype))


def followed(engine: Engine, advance: Callable[[int], Any], steps: int) -> list[State]:
    """The state after each step, and after an evaluation."""
    states = []
    for number in range(steps):
        advance(number)
        engine.finish()
        engine.net.average.update(engine.net)
        states.append(engine.model_state())
    with averaged(engine.whole_net()) as net, evaluating(net):
        found = {"features": features(net)}
    states += [engine.model_state(), found]
    engine.close()
    return states if is_main() else []


def in_engine(case: Case) -> list[State]:
    net = training.network(case)
    net.keep_average(DECAY)
    engine = training.build(case, net)
    return followed(engine, lambda n: training.advance(engine, case, range(n, n + 1)), case.steps)


def in_stages(run: Run) -> list[State]:
    network = pipelines.network(run)
    network.keep_average(DECAY)
    engine = pipelines.build(run, net=network)
    return followed(engine, lambda n: pipelines.advance(engine, run, range(n, n + 1)), run.steps)


def check(states: list[State], net: LocalNetwork) -> None:
    """Averages of what the states of the steps hold, by the formula, with which ``net`` has the same features."""
    *steps, last, found = states
    names = [name for name in last if name.startswith(PREFIX) and last[name].is_floating_point()]
    assert len(names) > 40
    for name in names:
        expected = steps[0][name.removeprefix(PREFIX)].double()
        for state in steps[1:]:
            expected = DECAY * expected + (1 - DECAY) * state[name.removeprefix(PREFIX)].double()
        torch.testing.assert_close(last[name].double(), expected, rtol=1e-5, atol=1e-7)
    assert all(torch.equal(steps[-1][name], value) for name, value in last.items())
    net.backbone.load_state_dict(evaluated_backbone(last))
    with evaluating(net):
        torch.testing.assert_close(found["features"], features(net))


ENGINES = [
    Case("bp", engine="fsdp"),
    *slow(
        [
            Case("bp", engine="ddp"),
            Case("bp", zero_stage=1),
            Case("mlaan", zero_stage=0, cut="block"),
            Case("dgl", zero_stage=2),
        ]
    ),
]


@pytest.mark.parametrize("case", ENGINES, ids=str)
def test_engines_average_the_weights_that_they_step(pool: PoolOf, case: Case) -> None:
    check(pool(2).run(in_engine, case)[0], training.network(case))


@pytest.mark.slow
@pytest.mark.parametrize("run", [Run("dgl"), Run("bp", zero_stage=1, replicas=2)], ids=str)
def test_stages_average_the_weights_that_they_step(pool: PoolOf, run: Run) -> None:
    check(pool(run.ranks).run(in_stages, run)[0], pipelines.network(run))


def save(case: Case, folder: Path, steps: range, begin: Path | None, average: bool = True) -> str | State:
    """Go on from ``begin``; the state that is saved, or the error."""
    net = training.network(case)
    if average:
        net.keep_average(DECAY)
    engine = training.build(case, net)
    try:
        if begin:
            load_checkpoint(begin, engine)
        for number in steps:
            training.advance(engine, case, range(number, number + 1))
            if average:
                engine.finish()
                engine.net.average.update(engine.net)
        save_checkpoint(folder, engine, steps.stop, {})
        return engine.model_state()
    except UserError as error:
        return str(error)
    finally:
        engine.close()


@pytest.mark.slow
def test_averages_move_between_engines(pool: PoolOf, tmp_path: Path) -> None:
    first, second = Case("dgl", engine="fsdp", dtype="float64"), Case("dgl", engine="ddp", dtype="float64")
    straight = pool(1).run(save, second, tmp_path / "straight", range(4), None)[0]
    pool(2).run(save, first, tmp_path / "moved", range(2), None)
    begin = tmp_path / "moved" / "checkpoints" / "step-00000002"
    moved = pool(1).run(save, second, tmp_path / "moved", range(2, 4), begin)[0]
    assert moved.keys() == straight.keys()
    for name, value in moved.items():
        torch.testing.assert_close(value, straight[name], rtol=1e-9, atol=1e-12)


def test_a_checkpoint_without_an_average_is_refused_and_one_with_it_is_taken(
    pool: PoolOf, tmp_path: Path
) -> None:
    case, begin = Case("dgl", engine="ddp"), Path("checkpoints/step-00000000")
    (whole,) = pool(1).run(save, case, tmp_path / "with", range(0), None)
    (bare,) = pool(1).run(save, case, tmp_path / "without", range(0), tmp_path / "with" / begin, False)
    assert bare.keys() == {name for name in whole if not name.startswith(PREFIX)}
    (message,) = pool(1).run(save, case, tmp_path / "no", range(0), tmp_path / "without" / begin)
    assert message.endswith(
        "step-00000000: has no average of the weights (train.ema); set train.ema=0, or another run_dir"
    )
