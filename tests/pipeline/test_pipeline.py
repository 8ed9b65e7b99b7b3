"""Pipeline stages equal one process: weights, optimizer states, statistics, copies and losses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from framework.optim.groups import exempt_parameters
from framework.pipeline.engine import PipelinedEngine
from framework.runtime.distributed import is_main, rank
from framework.runtime.errors import UserError
from tests.support import networks, pipelines
from tests.support.marks import slow, soak
from tests.support.pipelines import (
    Outcome,
    Run,
    advance,
    alone,
    build,
    errors,
    micro_batches,
    network,
    train,
)
from tests.support.waiting import until

PoolOf = Callable[[int], Any]

# Long windows, copies of later blocks and a teacher; the long tests have every method.
# ResNet-14 has 3 stages and 6 blocks.
QUICK = [
    Run("bp", 4, 4),
    Run("lam", 4, 1, steps=5),
    Run("loco-moco", 2, 2),
]
SPLIT = [
    case for case in networks.CASES if case not in ("loco-soft", "mlaan-after", "dfa")
]  # those are refused
METHODS = [Run(case, 2, 1 + number % 4) for number, case in enumerate(SPLIT)]
METHODS += [Run("loco", 3, 2, steps=5), Run("dgl", 2, 4, steps=5), Run("mim", 2, 2)]
DEEPER = [Run(case, 4, 1 + n % 4) for n, case in enumerate(SPLIT) if networks.CASES[case][2] == "block"]
GRIDS = [
    Run("loco", 2, 2, replicas=2, optimizer="lars"),
    Run("mlaan", 2, 1, replicas=2),
    Run("infopro-contrast", 2, 2, replicas=2, optimizer="adamw"),
    Run("loco-vicreg", 2, 2, replicas=2),
    Run("loco-barlow", 2, 1, replicas=2),
    Run("loco-moco", 3, 2, replicas=2),
    Run("gim-byol", 2, 2, replicas=2),
    Run("simclr-mocov3", 2, 2, replicas=2),
    Run("mim", 2, 2, replicas=2),
    Run("mim", 2, 1, replicas=2, bounds=(0, 1, 5)),  # the stem alone
]


def worst(pool: PoolOf, run: Run) -> float:
    return max(errors(pool(run.ranks).run(train, run)[0], alone(run)).values())


@pytest.mark.parametrize("run", QUICK, ids=str)
def test_stages_equal_one_process(pool: PoolOf, run: Run) -> None:
    assert worst(pool, run) < 1e-10


@pytest.mark.parametrize("run", [*slow(METHODS), *soak(DEEPER)], ids=str)
def test_every_method_equals_one_process(pool: PoolOf, run: Run) -> None:
    assert worst(pool, run) < 1e-10


@pytest.mark.parametrize("run", slow(GRIDS), ids=str)
def test_grids_of_stages_and_replicas_equal_one_process(pool: PoolOf, run: Run) -> None:
    """SyncBatchNorm and contrasts among the replicas of a stage."""
    assert worst(pool, run) < 1e-10


@pytest.mark.parametrize(
    ("name", "optimizer", "layer_decay"),
    [
        ("swin", "lars", 0.5),
        *slow([("vit", "lars", 1.0), ("vit", "adamw", 0.5), ("swin", "sgd", 1.0)]),
        *slow([("vit", "sgd", 1.0), ("vit", "lars", 0.5), ("swin", "adamw", 0.5), ("vit", "adamw", 1.0)]),
    ],
)
def test_what_takes_no_decay_takes_none_in_stages(
    pool: PoolOf, name: str, optimizer: str, layer_decay: float
) -> None:
    """Class tokens, position embeddings and tables of relative positions; nor LARS's adaptation.

    Layers are counted over the whole network, whatever a stage has of it.
    """
    run = Run("dgl", 2, 2, network=name, optimizer=optimizer, layer_decay=layer_decay)
    net = network(run)
    assert exempt_parameters(net) and all(p.ndim > 1 for p in exempt_parameters(net))
    assert worst(pool, run) < 1e-10


def seen_by_norms(run: Run) -> list[list[int]]:
    """Ranks that PyTorch's own SyncBatchNorms, which serve GPUs, take their statistics from."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipelines, "network", lambda of: nn.SyncBatchNorm.convert_sync_batchnorm(network(of)))
        engine = build(run)
    groups = [m.process_group for m in engine.net.modules() if isinstance(m, nn.SyncBatchNorm)]
    found = [dist.get_process_group_ranks(group) for group in groups]
    engine.close()
    return found


def test_norms_of_a_stage_see_its_replicas_alone(pool: PoolOf) -> None:
    for number, found in enumerate(pool(4).run(seen_by_norms, Run("dgl", 2, 2, replicas=2))):
        assert found and all(ranks == [number // 2 * 2, number // 2 * 2 + 1] for ranks in found)


@pytest.mark.parametrize("optimizer", slow(["lars", "sgd", "adamw"]))
def test_zero_1_changes_nothing(pool: PoolOf, optimizer: str) -> None:
    """Two addends have one sum, so two replicas agree to the last bit, LARS's norms included."""
    run = Run("loco", 2, 2, replicas=2, optimizer=optimizer, dtype="float32")
    sharded, whole = (pool(4).run(train, replace(run, zero_stage=stage))[0] for stage in (1, 0))
    assert set(errors(sharded, whole).values()) == {0.0}


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 1])
def test_float32_stays_near_one_process(pool: PoolOf, zero_stage: int) -> None:
    assert worst(pool, Run("dgl", 2, 2, steps=10, zero_stage=zero_stage, dtype="float32")) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(("zero_stage", "replicas"), [(0, 1), (1, 2)])
def test_clipping_is_by_the_norm_of_all_stages(pool: PoolOf, zero_stage: int, replicas: int) -> None:
    """DeepSpeed computes the norm in float32."""
    run = Run("dgl", 2, 2, replicas=replicas, clip=0.05, zero_stage=zero_stage, dtype="float32")
    outcome = pool(run.ranks).run(train, run)[0]
    assert max(errors(outcome, alone(run)).values()) < 1e-3
    assert max(errors(outcome, alone(replace(run, clip=0.0))).values()) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("case", ["mlaan", "loco-3", "infopro"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_precision_is_that_of_one_process(pool: PoolOf, case: str, precision: str) -> None:
    """Loss scales of float16 included, which move once an optimizer step in both."""
    assert worst(pool, Run(case, 3, 2, precision=precision, dtype="float32")) < 1e-6


def overflow(run: Run) -> tuple[list[bool], Outcome, Outcome]:
    """A step whose last stage overflows, between two that don't."""
    engine = build(run)
    advance(engine, run, range(1))
    before = Outcome(engine.model_state(), engine.optimizer_state(), torch.zeros(1))
    batches = micro_batches(run, engine.net, 7) if engine.loads else []
    if rank() == run.stages - 1:
        engine.net.scales.scale.mul_(2.0**60)
    skipped = [bool(engine.step(batches, lambda: 1.0).overflow)]
    after = Outcome(engine.model_state(), engine.optimizer_state(), torch.zeros(1))
    if rank() == run.stages - 1:
        engine.net.scales.scale.mul_(2.0**-60)
    skipped.append(bool(engine.step(batches, lambda: 0.01).overflow))
    engine.close()
    return skipped, before, after


@pytest.mark.slow
def test_an_overflow_in_one_stage_skips_the_step_in_all(pool: PoolOf) -> None:
    results = pool(2).run(overflow, Run("mlaan", 2, 2, precision="fp16", dtype="float32"))
    assert [flags for flags, *_ in results] == [[True, False]] * 2
    _, before, after = results[0]
    moved = {
        name.rsplit(".", 1)[1]
        for name, value in before.model.items()
        if not torch.equal(value, after.model[name])
    }
    assert moved <= {"running_mean", "running_var", "num_batches_tracked", "scale", "clean_steps"}
    assert all(
        torch.equal(value, after.optimizer[name][key])
        for name, state in before.optimizer.items()
        for key, value in state.items()
    )


def moved(run: Run, state: Outcome | None, steps: range) -> Outcome | None:
    """Some steps under another grid, from another's state."""
    engine = build(run)
    if state:
        engine.load_model_state(state.model)
        engine.load_optimizer_state(state.optimizer)
    losses = advance(engine, run, steps)
    outcome = Outcome(engine.model_state(), engine.optimizer_state(), losses)
    engine.close()
    return outcome if is_main() else None


@pytest.mark.slow
@pytest.mark.parametrize("case", ["mlaan", "loco-3"])
def test_states_move_between_grids(pool: PoolOf, case: str) -> None:
    """Every step under another number of stages and replicas equals the process that never stopped."""
    journey = [
        Run(case, 2),
        Run(case, 4),
        Run(case, 1, replicas=2),
        Run(case, 2, replicas=2),
        Run(case, 1),
        Run(case, 3, bounds=(0, 1, 5, 6)),
    ]
    state = None
    for step, run in enumerate(journey):
        state = pool(run.ranks).run(moved, run, state, range(step, step + 1))[0]
    whole = alone(Run(case, steps=len(journey)))
    assert state is not None
    assert max(errors(state, whole._replace(losses=whole.losses[-1:])).values()) < 1e-10


def saved_in_the_middle(run: Run) -> Outcome:
    """States read between steps, which must disturb nothing."""
    engine = build(run)
    losses = []
    for step in range(run.steps):
        losses.append(advance(engine, run, range(step, step + 1)))
        engine.model_state()
        engine.whole_net()
    outcome = Outcome(engine.model_state(), engine.optimizer_state(), torch.cat(losses))
    engine.close()
    return outcome


@pytest.mark.slow
def test_reading_states_disturbs_nothing(pool: PoolOf) -> None:
    run = Run("lam", 3, 2, steps=2)
    assert max(errors(pool(3).run(saved_in_the_middle, run)[0], alone(run)).values()) < 1e-10


def everywhere(run: Run) -> Tensor:
    engine = build(run)
    advance(engine, run, range(2))
    net = engine.whole_net()
    features = net.eval().features(torch.ones(2, 3, 16, 16, dtype=torch.float64).cumsum(2))
    engine.close()
    return features


def test_every_rank_can_evaluate_the_whole_network(pool: PoolOf) -> None:
    run = Run("mlaan", 3, 2, steps=2)
    net = network(run)
    net.load_state_dict(alone(run).model)
    expected = net.eval().features(torch.ones(2, 3, 16, 16, dtype=torch.float64).cumsum(2))
    for features in pool(3).run(everywhere, run):
        assert torch.allclose(features, expected, rtol=1e-10)


def silent(run: Run, named: Path) -> str:
    """The last stage takes no part in the second step; it stays until the first has made the file ``named``."""
    engine = build(run, timeout=10.0)
    assert isinstance(engine, PipelinedEngine)
    advance(engine, run, range(1))
    if rank() == run.stages - 1:
        until(named.exists)
        return ""
    try:
        advance(engine, run, range(1, 9))
    except UserError as error:
        return str(error)
    finally:
        named.touch()
    return "nothing happened"


@pytest.mark.slow
@pytest.mark.parametrize("case", ["gim", "loco"])
def test_a_silent_stage_is_named_within_the_timeout(pool: PoolOf, tmp_path: Path, case: str) -> None:
    """GIM's first stage waits for the last to take activations, LoCo's for cotangents."""
    try:
        message, _ = pool(2).run(silent, Run(case, 2, 4), tmp_path / "named")
    finally:
        pool(2).close()  # its group is no good after that
    assert "rank 1 (stage 1 of 0..1)" in message and "for 10 s" in message


def refused(run: Run) -> str:
    try:
        build(run).close()
    except UserError as error:
        return str(error)
    return ""


def test_soft_sharing_over_an_edge_is_refused(pool: PoolOf) -> None:
    """Its penalty pulls at both copies; on one stage it works."""
    assert "soft sharing" in pool(2).run(refused, Run("loco-soft", 2, bounds=(0, 1, 3)))[0]
    assert worst(pool, Run("loco-soft", 2, bounds=(0, 2, 3))) < 1e-10
