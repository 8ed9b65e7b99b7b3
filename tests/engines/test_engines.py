"""Engines against a plain loop in one process: weights, optimizer states, buffers and losses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from itertools import product
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import fully_shard

from framework.runtime.distributed import rank, world_size
from framework.runtime.errors import UserError
from tests.support import networks, training
from tests.support.marks import slow, soak
from tests.support.pairwise import pairwise_cover
from tests.support.training import Case, differences, plain, train

PoolOf = Callable[[int], Any]
OPTIMIZERS, RANKS = ("lars", "sgd", "adamw"), (1, 2, 4)


def zero(**options: Any) -> dict[str, Any]:
    return {"zero_optimization": options}


ENGINES = [
    Case(zero_stage=0),
    Case(zero_stage=1),
    Case(zero_stage=1, deepspeed=zero(overlap_comm=True)),
    Case(zero_stage=2),
    Case(zero_stage=2, deepspeed=zero(overlap_comm=True)),
    Case(engine="ddp"),
    Case(engine="fsdp"),
]
# What DeepSpeed lets one ask for and what moves parameters about in ZeRO's flat tensors.
LAYOUTS = [
    Case(zero_stage=1, deepspeed=zero(round_robin_gradients=True)),
    Case(zero_stage=2, deepspeed=zero(round_robin_gradients=True)),
    Case(zero_stage=2, deepspeed=zero(parameter_alignment=True)),
    Case(zero_stage=2, deepspeed=zero(reduce_scatter=False)),
    Case(zero_stage=2, deepspeed=zero(contiguous_gradients=False)),
    Case(zero_stage=2, deepspeed=zero(reduce_bucket_size=100, overlap_comm=True)),
    Case(zero_stage=1, deepspeed=zero(reduce_bucket_size=100, allgather_bucket_size=100)),
]


@lru_cache
def reference(method: str, optimizer: str, accumulation: int, clip: float, dtype: str) -> training.Run:
    return plain(Case(method=method, optimizer=optimizer, accumulation=accumulation, clip=clip, dtype=dtype))


def expected(case: Case) -> training.Run:
    if case.options:
        return plain(case)
    return reference(case.method, case.optimizer, case.accumulation, case.clip, case.dtype)


# An engine with its settings, a number of ranks, an optimizer, and micro-batches of a step.
OPTIONS = (ENGINES + LAYOUTS, RANKS, OPTIMIZERS, (1, 2, 4))


@pytest.mark.parametrize(("case", "ranks", "optimizer", "accumulation"), pairwise_cover(*OPTIONS), ids=str)
def test_every_engine_is_the_plain_loop_to_the_last_bit(
    pool: PoolOf, case: Case, ranks: int, optimizer: str, accumulation: int
) -> None:
    """Dyadic gradients leave nothing to rounding. Every two values of the options meet."""
    case = replace(case, optimizer=optimizer, accumulation=accumulation)
    assert differences(pool(ranks).run(train, case)[0], expected(case)) == {}


@pytest.mark.soak
@pytest.mark.parametrize(("case", "ranks"), list(product(*OPTIONS[:2])), ids=str)
def test_every_engine_with_every_combination_of_options(pool: PoolOf, case: Case, ranks: int) -> None:
    for optimizer, accumulation in product(*OPTIONS[2:]):
        one = replace(case, optimizer=optimizer, accumulation=accumulation)
        assert differences(pool(ranks).run(train, one)[0], expected(one)) == {}, one


@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_lars_finds_its_parameters_in_every_layout_of_zero(pool: PoolOf, case: Case) -> None:
    case = replace(case, accumulation=2)
    assert differences(pool(4).run(train, case)[0], expected(case)) == {}


@pytest.mark.parametrize("case", [*ENGINES[1:2], *slow([ENGINES[0], ENGINES[3], *ENGINES[5:]])], ids=str)
def test_clipping_is_by_the_global_norm(pool: PoolOf, case: Case) -> None:
    case = replace(case, clip=0.05, optimizer="sgd")
    run = pool(4).run(train, case)[0]
    assert all(error < 1e-6 for error in differences(run, expected(case)).values())
    unclipped = expected(replace(case, clip=0.0))
    assert any(error > 0.1 for name, error in differences(run, unclipped).items() if "momentum" in name)


@pytest.mark.parametrize(
    ("method", "engine", "ranks"),
    [("loco", "ddp", 2), ("mlaan", "fsdp", 2), *slow([("loco", "fsdp", 4), ("bp", "ddp", 4)])],
)
def test_local_networks_equal_one_process(pool: PoolOf, method: str, engine: str, ranks: int) -> None:
    """SyncBatchNorm, InfoNCE over all ranks and routing, in float64 so that nothing hides behind rounding."""
    case = Case(method=method, engine=engine, accumulation=2, dtype="float64")
    errors = differences(pool(ranks).run(train, case)[0], expected(case))
    assert max(errors.values()) < 1e-11


METHODS = ("loco", "simclr", "gim", "dgl", "mlaan", "bp")
LOCAL = (METHODS, RANKS, ("ddp", "fsdp"), OPTIMIZERS, (1, 2))


@pytest.mark.parametrize(
    ("method", "ranks", "engine", "optimizer", "accumulation"),
    [*slow(pairwise_cover(*LOCAL)), *soak(product(*LOCAL))],
)
def test_local_networks_with_other_options(
    pool: PoolOf, method: str, ranks: int, engine: str, optimizer: str, accumulation: int
) -> None:
    """Every two values of the options meet; ``-m soak`` has all combinations."""
    case = Case(method, engine=engine, optimizer=optimizer, accumulation=accumulation, dtype="float64")
    errors = differences(pool(ranks).run(train, case)[0], expected(case))
    assert max(errors.values(), default=0) < 1e-9


READERS = {
    "penalty": ("loco", "stage", {"soft_share": 0.5}),
    "pulled copies": (
        "mlaan",
        "block",
        {"ema_m": 0.9, "ema_when": "after"},
    ),
}


@pytest.mark.parametrize(
    ("head", "engine"),
    [("penalty", "fsdp"), *slow([("penalty", "ddp"), *product(["pulled copies"], ["ddp", "fsdp"])])],
)
def test_heads_that_read_weights_equal_one_process(pool: PoolOf, head: str, engine: str) -> None:
    """A penalty on weights alone, whose gradient is the same on every rank; copies that follow."""
    method, cut, options = READERS[head]
    case = Case(method, cut, engine=engine, optimizer="sgd", accumulation=2, dtype="float64", options=options)
    errors = differences(pool(2).run(train, case)[0], plain(case))
    assert max(errors.values(), default=0) < 1e-10


@pytest.mark.parametrize(
    ("head", "zero_stage"),
    [("penalty", 2), *slow([("pulled copies", 1), ("pulled copies", 2), ("penalty", 1)])],
)
def test_heads_that_read_weights_under_zero_equal_ddp(pool: PoolOf, head: str, zero_stage: int) -> None:
    method, cut, options = READERS[head]
    ddp = Case(method, cut, engine="ddp", options=options)
    run = pool(2).run(train, replace(ddp, engine="deepspeed", zero_stage=zero_stage))[0]
    assert differences(run, pool(2).run(train, ddp)[0]) == {}


def taught(method: str, objective: str, **settings: Any) -> Case:
    return Case(
        method, optimizer="sgd", accumulation=2, options={"head": networks.taught(objective)}, **settings
    )


@pytest.mark.parametrize(
    ("method", "objective", "engine", "ranks"),
    [
        ("loco", "moco", "fsdp", 2),
        *slow([("simclr", "mocov3", "ddp", 2), ("gim", "byol", "fsdp", 4), ("loco", "simsiam", "ddp", 2)]),
        *slow([("loco", "moco", "ddp", 4), ("loco", "mocov3", "fsdp", 2), ("loco", "byol", "ddp", 2)]),
    ],
)
def test_teachers_equal_one_process(
    pool: PoolOf, method: str, objective: str, engine: str, ranks: int
) -> None:
    """Averages, queues and predictors too; MoCo's shuffling changes nothing where BatchNorm is synchronized."""
    case = taught(method, objective, engine=engine, dtype="float64")
    reference = plain(case)
    errors = differences(pool(ranks).run(train, case)[0], reference)
    tensors = training.flat(reference)  # a bias that a predictor's BatchNorm takes out has a gradient of 0
    assert max(e for name, e in errors.items() if tensors[name].abs().max() > 1e-12) < 1e-9


@pytest.mark.parametrize(
    ("objective", "zero_stage"), [("moco", 2), *slow(product(["moco", "mocov3", "byol"], [0, 1, 2]))]
)
def test_teachers_under_zero_equal_ddp(pool: PoolOf, objective: str, zero_stage: int) -> None:
    ddp = replace(taught("loco", objective, engine="ddp"), accumulation=1)
    run = pool(2).run(train, replace(ddp, engine="deepspeed", zero_stage=zero_stage))[0]
    assert differences(run, pool(2).run(train, ddp)[0]) == {}


@pytest.mark.parametrize("case", [*slow(ENGINES[:3]), ENGINES[3], *slow(ENGINES[4:5])], ids=str)
def test_local_networks_under_zero_equal_ddp(pool: PoolOf, case: Case) -> None:
    """DeepSpeed is float32 only; two addends have one sum, so two ranks agree with DDP to the last bit."""
    case = replace(case, method="loco")
    ddp = pool(2).run(train, Case(method="loco", engine="ddp"))[0]
    assert differences(pool(2).run(train, case)[0], ddp) == {}


LATER: dict[str, tuple[str, dict[str, Any]]] = {
    "blockwise": ("stage", {"noise": 0.0, "head": networks.barlow(32)}),
    "scpl": ("stage", {"proj_hidden": 16, "dim": 8}),
    "fa": ("block", {}),
    "sign": ("block", {"window": 2}),
    "dfa": ("block", {}),
}


@pytest.mark.parametrize(
    ("method", "engine", "ranks"),
    slow(pairwise_cover(list(LATER), ("ddp", "fsdp"), RANKS)),
)
def test_later_methods_equal_one_process(pool: PoolOf, method: str, engine: str, ranks: int) -> None:
    """Without noise, which differs from rank to rank."""
    cut, options = LATER[method]
    case = Case(method, cut, "sgd", engine, accumulation=2, dtype="float64", options=options)
    reference = plain(case)
    errors, tensors = differences(pool(ranks).run(train, case)[0], reference), training.flat(reference)
    assert max((e for name, e in errors.items() if tensors[name].abs().max() > 1e-12), default=0) < 1e-9


@pytest.mark.parametrize("case", slow([ENGINES[1], ENGINES[3], ENGINES[6]]), ids=str)
def test_noise_is_the_same_under_every_engine(pool: PoolOf, case: Case) -> None:
    ddp = Case("blockwise", "stage", "sgd", "ddp", options={"head": networks.barlow(32)})
    run = pool(2).run(train, replace(ddp, engine=case.engine, zero_stage=case.zero_stage))[0]
    assert differences(run, pool(2).run(train, ddp)[0]) == {}


def overflow_in_the_middle(case: Case) -> tuple[list[bool], training.Run]:
    """Step 0, a step that overflows in one micro-batch of the last rank, then steps 1 and 2."""
    engine = training.build(case, training.Dyadic(may_skip=True))
    training.advance(engine, case, range(1))
    before = training.flat(training.Run(engine.model_state(), engine.optimizer_state(), torch.zeros(1)))
    batches = training.micro_batches(case, 9, rank(), world_size())
    if rank() == world_size() - 1:
        batches[0].images[0, 0, 0, 0] = torch.inf
    overflow = engine.step(batches, lambda: 1.0).overflow
    after = training.flat(training.Run(engine.model_state(), engine.optimizer_state(), torch.zeros(1)))
    same = all(torch.equal(value, after[name]) for name, value in before.items() if name != "seen")
    losses = training.advance(engine, case, range(1, 3))
    run = training.Run(engine.model_state(), engine.optimizer_state(), losses)
    engine.close()
    return [bool(overflow), same], run


@pytest.mark.parametrize(
    ("case", "accumulation"),
    [
        (ENGINES[4], 2),
        *slow(product(ENGINES[:2], (1, 2))),
        *slow([(ENGINES[4], 1)]),
        *slow(product(ENGINES[5:], (1, 2))),
    ],
    ids=str,
)
def test_an_overflow_skips_the_step_on_every_rank(pool: PoolOf, case: Case, accumulation: int) -> None:
    """As if the step had not been: gradients of its other micro-batches are dropped too."""
    case = replace(case, accumulation=accumulation, optimizer="adamw" if accumulation == 1 else "lars")
    results = pool(2).run(overflow_in_the_middle, case)
    assert [flags for flags, _ in results] == [[True, True]] * 2
    run = results[0][1]
    seen = run.model.pop("seen")
    plain_run = expected(case)
    assert seen == plain_run.model["seen"] + accumulation
    model = {name: value for name, value in plain_run.model.items() if name != "seen"}
    assert differences(run, plain_run._replace(model=model, losses=plain_run.losses[1:])) == {}


def fp16_overflow(case: Case) -> tuple[bool, bool, bool]:
    net = training.network(case)
    net.scales.scale.fill_(2.0**100)
    engine = training.build(case, net)
    before = engine.model_state()
    result = engine.step(training.micro_batches(case, 0, rank(), world_size()), lambda: 1.0)
    after = engine.model_state()
    same = all(torch.equal(value, after[name]) for name, value in before.items() if "weight" in name)
    finite = bool(torch.isfinite(result.unit_losses).all())
    engine.close()
    return bool(result.overflow), same, finite


@pytest.mark.parametrize("engine", ["deepspeed", "fsdp"])
def test_an_fp16_network_skips_when_its_scale_is_too_large(pool: PoolOf, engine: str) -> None:
    case = Case(method="dgl", engine=engine, precision="fp16", accumulation=2)
    assert pool(2).run(fp16_overflow, case) == [(True, True, True)] * 2


def moved(first: Case, state: training.Run | None, steps: range) -> training.Run:
    engine = training.build(first)
    if state:
        engine.load_model_state(state.model)
        engine.load_optimizer_state(state.optimizer)
    losses = training.advance(engine, first, steps)
    run = training.Run(engine.model_state(), engine.optimizer_state(), losses)
    engine.close()
    return run


@pytest.mark.parametrize("optimizer", ["lars", *slow(["sgd", "adamw"])])
def test_states_move_between_engines_and_numbers_of_ranks(pool: PoolOf, optimizer: str) -> None:
    """Every step of one training under another engine equals the plain loop that never stopped."""
    journey = [
        (2, Case(zero_stage=2)),
        (4, Case(engine="fsdp")),
        (1, Case(zero_stage=1)),
        (4, Case(zero_stage=1, deepspeed=zero(round_robin_gradients=True))),
        (2, Case(engine="ddp")),
        (4, Case(zero_stage=0)),
    ]
    run = None
    for step, (ranks, case) in enumerate(journey):
        case = replace(case, optimizer=optimizer)
        run = pool(ranks).run(moved, case, run, range(step, step + 1))[0]
    whole = plain(Case(optimizer=optimizer, steps=len(journey)))
    assert run is not None
    assert differences(run, whole._replace(losses=whole.losses[-1:])) == {}


def test_only_rank_0_holds_states(pool: PoolOf) -> None:
    for case in (Case(zero_stage=2), Case(engine="fsdp"), Case(engine="ddp")):
        runs = pool(2).run(moved, case, None, range(1))
        assert runs[0].model and runs[0].optimizer and not runs[1].model and not runs[1].optimizer


def different_weights(case: Case) -> training.Run | None:
    net = training.Dyadic()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(rank())
    return train(case, net)


@pytest.mark.parametrize("case", [Case(), Case(engine="ddp"), Case(engine="fsdp")], ids=str)
def test_all_ranks_start_from_rank_0s_weights(pool: PoolOf, case: Case) -> None:
    assert differences(pool(2).run(different_weights, case)[0], expected(case)) == {}


def train_in_channels_last(case: Case) -> training.Run | None:
    return train(case, training.network(case).to(memory_format=torch.channels_last))


@pytest.mark.parametrize("case", [*ENGINES[:2], *slow(ENGINES[3:4]), *slow(ENGINES[5:])], ids=str)
def test_weights_may_come_in_channels_last_order(pool: PoolOf, case: Case) -> None:
    case = replace(case, method="dgl", steps=1)
    contiguous = pool(2).run(train, Case(method="dgl", engine="ddp", steps=1))[0]
    assert differences(pool(2).run(train_in_channels_last, case)[0], contiguous) == {}


def nonfinite_gradient(case: Case) -> str:
    engine = training.build(case)
    batches = training.micro_batches(case, 0, rank(), world_size())
    for weight in engine.net.weights:
        weight.register_hook(lambda gradient: gradient * torch.nan)
    try:
        engine.step(batches, lambda: 1.0)
    except UserError as error:
        return str(error)
    finally:
        engine.close()
    return ""


def test_zero_does_not_pass_over_a_gradient_that_is_not_finite(pool: PoolOf) -> None:
    """With clipping on, DeepSpeed by itself would skip such steps for ever without a word."""
    messages = pool(2).run(nonfinite_gradient, Case(clip=1.0))
    assert messages[0] == messages[1] and "gradient is not finite" in messages[0]


def wrapped_by_hand() -> str:
    net = training.network(taught("gim", "byol", engine="fsdp"))
    fully_shard(net.backbone.layer1)
    try:
        net(training.micro_batches(Case(method="gim"), 0)[0])
    except UserError as error:
        return str(error)
    return ""


def test_a_teacher_refuses_weights_that_are_not_whole(pool: PoolOf) -> None:
    assert pool(2).run(wrapped_by_hand)[0] == (
        "a teacher follows whole weights: use engine=fsdp in place of fully_shard"
    )


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["moco", "byol"])
def test_teachers_move_between_engines_and_numbers_of_ranks(pool: PoolOf, objective: str) -> None:
    """Averages, what is due to them, queue and predictors, in the middle of a training."""
    case = taught("loco", objective, dtype="float64")
    run = pool(2).run(moved, replace(case, engine="fsdp"), None, range(2))[0]
    run = pool(4).run(moved, replace(case, engine="ddp"), run, range(2, 4))[0]
    whole = plain(replace(case, steps=4))
    errors, tensors = differences(run, whole._replace(losses=whole.losses[2:])), training.flat(whole)
    assert max(e for name, e in errors.items() if tensors[name].abs().max() > 1e-12) < 1e-9
