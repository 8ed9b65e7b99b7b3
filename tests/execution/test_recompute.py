"""Segments and blocks that are run again in place of keeping their activations change nothing but the memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from framework.config import loading
from framework.cost.activations import LiveActivations
from framework.cost.counting import plan_cost
from framework.data.batch import Batch
from framework.execution import LocalNetwork
from framework.execution.compilation import has_compiler
from framework.local.methods import dgl
from framework.model import local_network
from framework.network import Segment
from framework.runtime.errors import UserError
from tests.network.test_own_networks import Blocks, Centers, Counts
from tests.support import networks, pipelines, training
from tests.support.commands import run_tool
from tests.support.marks import slow
from tests.support.networks import CLASSES
from tests.support.runs import ROOT

PoolOf = Callable[[int], Any]


class Outcome:
    """What some steps leave.

    Attributes:
        losses: of the units, by step.
        tensors: gradients by step, weights and buffers, by name.
        random: state of the generator of random numbers at the end.
    """

    def __init__(self, net: LocalNetwork, batches: Sequence[Batch]) -> None:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        torch.manual_seed(3)
        self.losses, self.tensors = [], {}
        for number, batch in enumerate(batches):
            output = net(batch)
            output.loss.backward()
            self.losses.append(output.unit_losses)
            for name, gradient in networks.gradients(net).items():
                self.tensors[f"{number}/{name}"] = gradient
            optimizer.step()
            optimizer.zero_grad()
        self.tensors |= {name: value.detach() for name, value in net.state_dict().items()}
        self.random = torch.get_rng_state()


def assert_the_same(make: Callable[[str], LocalNetwork], recompute: str, micro_batches: int = 1) -> None:
    """Two steps with and without: losses, gradients, weights, buffers and random numbers to the last bit."""
    kept, again = make("none"), make(recompute)
    assert again.program.recomputation.segments
    dtype = next(kept.parameters()).dtype
    data = [networks.batch(kept, size=4, seed=seed) for seed in range(2 * micro_batches)]
    data = [
        batch._replace(images=batch.images.to(dtype), last=(number + 1) % micro_batches == 0)
        for number, batch in enumerate(data)
    ]
    expected, found = (Outcome(net, data) for net in (kept, again))
    assert all(torch.equal(*losses) for losses in zip(found.losses, expected.losses, strict=True))
    assert found.tensors.keys() == expected.tensors.keys()
    assert [n for n, tensor in expected.tensors.items() if not torch.equal(found.tensors[n], tensor)] == []
    assert torch.equal(found.random, expected.random)


@pytest.mark.parametrize(
    ("case", "recompute"),
    [
        ("mlm-2", "segment"),
        *slow([("simclr", "block")]),
        *slow(
            [
                (c, r)
                for c in ("bp", "loco", "mlaan", "mlm-3", "loco-3", "loco-soft", "loco-moco")
                for r in ("segment", "block")
            ]
        ),
        *slow([(c, "segment") for c in ("simclr", "dfa", "fa", "sign-2", "mim", "hpff", "loco-upper")]),
        *slow([(c, "block") for c in ("gim", "gim-byol", "blockwise", "mim", "scpl", "dfa")]),
    ],
)
def test_nothing_but_the_memory_changes(case: str, recompute: str) -> None:
    """Windows, copies of later blocks, teachers, masks, noise, order from the top: every kind of plan."""

    def make(recompute: str) -> LocalNetwork:
        return networks.network(case, recompute=recompute)

    assert_the_same(make, recompute)


@pytest.mark.parametrize(
    ("case", "precision", "recompute"),
    [
        *slow([("loco", "bf16", "segment")]),
        *slow([("bp", "bf16", "block"), ("mlm-3", "fp16", "segment"), ("simclr", "fp16", "block")]),
    ],
)
def test_precision_repeats(case: str, precision: str, recompute: str) -> None:
    def make(recompute: str) -> LocalNetwork:
        net = networks.network(case, "resnet8", precision=precision, recompute=recompute)
        if net.scales is not None:
            net.scales.scale.mul_(2.0**-8)  # as after some steps: at first they may overflow
        return net

    assert_the_same(make, recompute)


@pytest.mark.parametrize(
    ("case", "recompute"),
    [
        *slow([("loco-3", "segment")]),
        *slow([("simclr", "block"), ("bp", "segment"), ("mlm-3", "block"), ("loco", "block")]),
    ],
)
def test_dropout_and_stochastic_depth_repeat_their_draw(case: str, recompute: str) -> None:
    def make(recompute: str) -> LocalNetwork:
        backbone = networks.transformer(
            "vit", 16, drop_path_rate=0.5, proj_drop_rate=0.3, attn_drop_rate=0.2, pos_drop_rate=0.1
        )
        return networks.network(case, backbone, recompute=recompute)

    assert_the_same(make, recompute)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["segment", "block"])
def test_micro_batches_move_statistics_once_each(recompute: str) -> None:
    assert_the_same(lambda r: networks.network("loco", recompute=r), recompute, micro_batches=2)


@pytest.mark.slow
def test_replay_buffers_feed_blocks_that_are_run_again() -> None:
    """The modules run in any order, each on an input of its own."""

    def make(recompute: str) -> LocalNetwork:
        torch.manual_seed(0)
        options = dgl.Options(async_mode="buffer", buffer_size=2, buffer_order="random")
        return local_network(
            "resnet8", "dgl", options, image_size=16, num_classes=CLASSES, cut="stage", recompute=recompute
        ).train()

    assert_the_same(make, "block", micro_batches=1)


class Both(Centers):
    """Subtracts a running mean, and counts in a buffer that it replaces where no one records: in a module."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[1].add_module("3", Replaces())


class Replaces(nn.Module):
    """Its output depends on how often it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return x * (1 + self.calls / 8)


@pytest.mark.parametrize(
    ("network", "recompute"),
    [(Both, "segment"), *slow([(Both, "block"), (Counts, "segment"), (Centers, "block")])],
)
def test_buffers_of_own_networks_move_once(network: type[Blocks], recompute: str) -> None:
    def make(recompute: str) -> LocalNetwork:
        torch.manual_seed(0)
        return local_network(
            network(), "bp", image_size=16, num_classes=CLASSES, cut="block", recompute=recompute
        ).train()

    assert_the_same(make, recompute)


FORWARDS = {
    ("bp", "segment"): [2, 2, 1],
    ("bp", "block"): [2, 2, 2],
    ("gim", "segment"): [1, 1, 1],
    ("gim", "block"): [2, 2, 2],
    ("loco", "segment"): [2, 2, 1],
    ("loco", "block"): [2, 3, 2],
    ("loco-3", "segment"): [2, 2, 1],
    ("dfa", "segment"): [2, 2, 1],
}


@pytest.mark.parametrize(
    ("case", "recompute"),
    [("loco", "block"), *slow([("loco", "segment")]), *slow(key for key in FORWARDS if key[0] != "loco")],
)
def test_how_often_a_segment_runs_in_a_step(case: str, recompute: str) -> None:
    """Of three segments; with "block" each has two blocks, and runs once more in each pass through it."""
    method, options, _ = networks.CASES[case]
    net = local_network(
        "resnet14", method, options, image_size=16, num_classes=CLASSES, cut="stage", recompute=recompute
    )
    counts: Counter[str] = Counter()
    for stage in range(1, 4):
        for block in range(2):
            name = f"layer{stage}.{block}"
            net.backbone.get_submodule(f"{name}.conv1").register_forward_hook(
                lambda *_, name=name: counts.update([name])
            )
    data = networks.batch(net)
    net.train()(data._replace(images=data.images.float()))
    expected = FORWARDS[case, recompute]
    assert counts == {f"layer{s}.{b}": expected[s - 1] for s in range(1, 4) for b in range(2)}


def saved(run: Callable[[Tensor], Any], x: Tensor, net: LocalNetwork) -> int:
    """Bytes that autograd saves of a run, less its input."""
    x = x.detach().requires_grad_()
    with LiveActivations([*net.parameters(), *net.buffers(), x]) as live:
        kept = run(x)
    del kept
    return live.peak


def bytes_of(x: Tensor) -> int:
    return x.numel() * x.element_size()


def peak(net: LocalNetwork, data: Batch) -> int:
    with LiveActivations([*net.parameters(), *net.buffers(), data.images]) as live:
        net(data)
    assert live.now == 0
    return live.peak


def inputs(parts: Sequence[Segment], images: Tensor) -> list[Tensor]:
    xs = [images]
    with torch.no_grad():
        for part in parts[:-1]:
            xs.append(part(xs[-1]))
    return xs


@pytest.mark.parametrize(
    ("case", "recompute"), [("loco", "segment"), *slow([("bp", "segment"), ("simclr", "block")])]
)
def test_the_peak_is_what_arithmetic_says(case: str, recompute: str) -> None:
    """From the bytes that each part saves when it is run alone."""
    net = networks.network(case, recompute=recompute, image_size=32)
    data = networks.batch(net, image_size=32)
    data = data._replace(images=data.images.float())
    parts = list(net.segments)
    if recompute == "block":
        parts = [piece for segment in parts for piece in segment.pieces()]
    xs = inputs(parts, data.images)
    x = [0, *map(bytes_of, xs[1:])]  # images are alive anyway
    graph = [saved(part, own, net) for part, own in zip(parts, xs, strict=True)]
    heads = {unit.last: unit.head for unit in net.plan.units}

    def under_head(s: int) -> int:
        part, head = net.segments[s], heads[s]
        return saved(lambda own: head(head.seen(part, part(own)), data), xs[s], net)

    last = len(parts) - 1
    if case == "loco":
        # A graph is dropped behind the pass of its own window, and made again for that of the one above it.
        with_head = [x[s - 1] + x[s] + under_head(s) for s in range(1, last + 1)]
        again = [x[s - 1] + (x[s] if s < last else 0) + graph[s - 1] for s in range(1, last + 1)]
        expected = max(with_head + again)
    elif recompute == "segment":
        expected = max([sum(x[: s + 1]) + graph[s] for s in range(last)] + [sum(x) + under_head(last)])
    else:
        top = parts[last](xs[last]).detach()
        head = heads[len(net.segments) - 1]
        of_head = saved(lambda own: head(head.seen(net.segments[-1], own), data), top, net) + bytes_of(top)
        expected = max([sum(x[: p + 1]) + graph[p] for p in range(last + 1)] + [sum(x) + of_head])
    found = peak(net, data)
    assert found == expected
    assert found < 0.8 * peak(networks.network(case, image_size=32), data)


@pytest.mark.slow
def test_hooks_that_move_saved_tensors_see_kept_inputs() -> None:
    """Here to a copy, as ``torch.autograd.graph.save_on_cpu`` does."""
    moved: list[torch.Size] = []

    def pack(tensor: Tensor) -> Tensor:
        moved.append(tensor.shape)
        return tensor.clone()

    net = networks.network("bp", "resnet8", recompute="segment")
    data = networks.batch(net)
    data = data._replace(images=data.images.float())
    expected = networks.routed(net, data)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        found = networks.routed(net, data)
    assert data.images.shape in moved
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


@pytest.mark.parametrize(
    ("method", "recompute", "engine", "zero_stage"),
    [
        *slow(
            [
                ("loco", "segment", "ddp", 1),
                ("loco", "block", "ddp", 1),
                ("simclr", "block", "fsdp", 1),
                ("mlaan", "segment", "fsdp", 1),
                ("bp", "segment", "deepspeed", 0),
                ("simclr", "segment", "deepspeed", 2),
                ("loco", "segment", "deepspeed", 1),
            ]
        ),
    ],
)
def test_engines(pool: PoolOf, method: str, recompute: str, engine: str, zero_stage: int) -> None:
    """Two ranks, SyncBatchNorm, two micro-batches: the same bits, statistics and optimizer states included."""
    case = training.Case(
        method,
        engine=engine,
        zero_stage=zero_stage,
        accumulation=2,
        optimizer="sgd",
        steps=1,
    )
    kept, again = (pool(2).run(training.train, one)[0] for one in (case, replace(case, recompute=recompute)))
    assert training.differences(again, kept) == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    "run",
    [
        pipelines.Run("loco-3", 2, 2),
        pipelines.Run("loco", 3, 2, recompute="block"),
        pipelines.Run("simclr", 2, 2, replicas=2),
        pipelines.Run("mlaan", 2, 2, precision="fp16", dtype="float32"),
        pipelines.Run("gim", 2, 2, options={"contrast": "batch"}, recompute="block"),
    ],
    ids=str,
)
def test_pipeline_stages(pool: PoolOf, run: pipelines.Run) -> None:
    again = run if run.recompute != "none" else replace(run, recompute="segment")
    kept, found = (
        pool(run.ranks).run(pipelines.train, one)[0] for one in (replace(run, recompute="none"), again)
    )
    assert set(pipelines.errors(found, kept).values()) == {0.0}


def test_what_is_refused() -> None:
    with pytest.raises(UserError, match=r"execution.recompute=layer: must be one of none, segment, block"):
        networks.network("bp", "resnet8", recompute="layer")
    if has_compiler():
        with pytest.raises(
            UserError, match=r"execution.compile=true: can't be combined with execution.recom"
        ):
            networks.network("bp", "resnet8", recompute="segment").compile_segments()


class Draws(nn.Module):
    """From a generator that nobody sets back."""

    def __init__(self) -> None:
        super().__init__()
        self.own = torch.Generator()

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rand(1, generator=self.own)


def test_modules_with_a_generator_of_their_own_are_refused() -> None:
    net = networks.network("bp", "resnet8")
    net.backbone.get_submodule("layer2.0").add_module("drawn", Draws())
    with pytest.raises(
        UserError, match=r"execution.recompute: Draws in segment layer2.0 has a torch.Generator"
    ):
        LocalNetwork(net.backbone, net.segments, net.plan, recompute="segment")


@pytest.mark.parametrize("key", ["compile", "cuda_graph"])
def test_recipes_that_are_refused(key: str) -> None:
    recipe = str(ROOT / "recipes" / "quickstart.yaml")
    with pytest.raises(
        UserError, match=rf"execution.{key}=true: can't be combined with execution.recompute, "
    ):
        loading.load([recipe, f"execution.{key}=true", "execution.recompute=block"])


@pytest.mark.slow
def test_the_forecast_is_what_a_step_keeps() -> None:
    """The count on tensors without values is that of a real step."""
    recipe = str(ROOT / "recipes" / "quickstart.yaml")
    overrides = ["network.name=resnet14", "data.image_size=16", "execution.recompute=segment"]
    cost = plan_cost(loading.load([recipe, *overrides]), CLASSES, 4)
    net = networks.network("loco", recompute="segment")
    data = networks.batch(net, size=4)
    assert cost.peak_activation_bytes == peak(net, data._replace(images=data.images.float()))


@pytest.mark.slow
def test_show_plan_says_what_is_computed_again(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(ROOT / "recipes" / "quickstart.yaml")
    overrides = ["network.name=resnet8", "data.image_size=16", "execution.recompute=segment"]
    assert run_tool("show_plan", recipe, *overrides, "train.batch_size=4") == 0
    assert "with execution.recompute=segment, end-to-end" in " ".join(capsys.readouterr().out.split())
