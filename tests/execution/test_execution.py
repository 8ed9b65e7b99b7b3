"""``execution:`` changes the speed of a step and none of its numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

from framework.analysis.gpu import allocator_peak, busy_seconds, covered
from framework.config import loading
from framework.engines import cuda_graph
from framework.execution.compilation import has_compiler
from framework.execution.graph import Outputs, RecordedStep, record_graph
from framework.model import recipe_network
from framework.network import create, cut
from framework.runtime.errors import UserError
from framework.training.engine_choice import build_engine
from tests.support import networks, training
from tests.support.runs import ROOT
from tests.support.training import Case

CASES = [
    Case("gim", steps=5, dtype="float64"),
    Case("loco", steps=5, dtype="float64", options={"soft_share": 0.01}),
    Case("loco", steps=5, dtype="float64", optimizer="adamw", clip=0.1),
    Case("mlaan", cut="block", steps=5, dtype="float64", optimizer="sgd"),
    Case(
        "mlaan",
        cut="block",
        steps=5,
        dtype="float64",
        options={"ema_when": "after"},
    ),
    Case("infopro", cut="block", steps=5, dtype="float64", optimizer="sgd"),
]


def record_nothing(work: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
    """Like ``record_graph`` without a GPU: what has been run before is run again, into the same tensors."""
    outputs = work()

    def replay() -> None:
        for place, value in zip(outputs, work(), strict=True):
            place.copy_(value)

    return replay, outputs


def graphed(case: Case, record: Callable[..., object], device: str) -> training.Run:
    """A training on steps that were recorded once."""
    net = training.network(case).to(device)
    engine = cuda_graph.build(net, training.optimizer_factory(case), training.settings(case), record)  # type: ignore[arg-type]
    results = []
    for step in range(case.steps):
        (batch,) = training.micro_batches(case, step)
        batch = batch._replace(images=batch.images.to(device), labels=batch.labels.to(device))
        results.append(engine.step([batch], partial(training.learning_rate, case, step)))
    losses = torch.tensor([result.losses()() for result in results], dtype=torch.float64)
    run = training.Run(engine.model_state(), engine.optimizer_state(), losses)
    engine.close()
    return run


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_recorded_step_is_fed_and_steps_like_any_other(case: Case) -> None:
    """Inputs, rates, statistics and copies in heads: to the last bit, if not for the recording itself."""
    assert training.differences(graphed(case, record_nothing, "cpu"), training.plain(case)) == {}


def test_a_recorded_step_has_the_layout_of_the_network() -> None:
    """Segments see it, whatever the loader's is; otherwise nothing changes (but sums' order)."""
    layouts = []
    net = networks.network("loco", "resnet8", channels_last=True).double()
    data, eager = networks.batch(net), copy.deepcopy(net)
    net.backbone.get_submodule("layer1.0").register_forward_hook(
        lambda module, inputs, output: layouts.append(output.is_contiguous(memory_format=torch.channels_last))
    )
    step = RecordedStep(net, data, record_nothing)
    step.run(data)
    eager(data).loss.backward()
    assert layouts == [True, True]
    for (name, ours), theirs in zip(net.named_parameters(), eager.parameters(), strict=True):
        assert torch.allclose(step.gradients[ours], theirs.grad, rtol=1e-9, atol=1e-12), name


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_cuda_graph_equals_eager_steps(gpu: torch.device, case: Case) -> None:
    found = training.differences(graphed(case, record_graph, "cuda"), graphed(case, record_nothing, "cuda"))
    assert all(error < 1e-9 for error in found.values()), found


def test_a_cuda_graph_needs_a_gpu(pool) -> None:
    if not torch.cuda.is_available():
        assert pool(1).run(refusal)[0] == "execution.cuda_graph=true: needs a GPU, and there is none"


def refusal() -> str:
    recipe = loading.load(
        [str(ROOT / "recipes" / "quickstart.yaml"), "execution.cuda_graph=true", "data.path=."]
    )
    with pytest.raises(UserError) as caught:
        build_engine(recipe, recipe_network(recipe, 10), 10)
    return str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("cuda_graph train.precision=fp16", "train.precision=fp16, whose skipped steps are not recorded"),
        ("cuda_graph train.accumulation=2", "train.accumulation above 1"),
        ("cuda_graph faults.nonfinite=skip", "faults.nonfinite=skip, whose skipped steps are not recorded"),
        (
            "cuda_graph method.name=dgl method.async_mode=buffer",
            "method.async_mode=buffer, where the host draws",
        ),
        ("cuda_graph pipeline.stages=2", "pipeline stages"),
        ("cuda_graph deepspeed.wall_clock_breakdown=true", "keys of deepspeed:"),
        ("cuda_graph execution.compile=true", "execution.compile=true"),
        ("compile pipeline.stages=2", "pipeline stages"),
        ("compile engine=fsdp", "engine=fsdp, which swaps the weights"),
    ],
)
def test_what_can_not_be_combined(overrides: str, message: str) -> None:
    key, *others = overrides.split()
    argv = [str(ROOT / "recipes" / "simclr_r50_100ep.yaml"), f"execution.{key}=true", *others]
    with pytest.raises(UserError, match=rf"execution.{key}=true: can't be combined with {message}") as caught:
        loading.load(argv)
    assert "\n" not in str(caught.value)


@pytest.mark.soak
@pytest.mark.skipif(not has_compiler(), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("case", ["bp", "simclr", "gim", "loco", "dgl", "infopro", "mlaan"])
def test_compiled_segments_have_the_same_gradients(case: str) -> None:
    net = networks.network(case, "resnet8").double()
    data, eager = networks.batch(net), copy.deepcopy(net)
    net.compile_segments()
    for _ in range(2):
        losses = [n(data).unit_losses for n in (net, eager)]
        for n in (net, eager):
            n(data).loss.backward()
        assert torch.allclose(*losses, rtol=1e-12)
        for (name, ours), (same, theirs) in zip(
            net.named_parameters(), eager.named_parameters(), strict=True
        ):
            assert name == same
            assert (ours.grad - theirs.grad).norm() < 1e-10 * theirs.grad.norm() + 1e-13, name
    for (name, ours), (same, theirs) in zip(net.named_buffers(), eager.named_buffers(), strict=True):
        assert name == same and torch.allclose(ours, theirs, rtol=1e-12), name


def test_what_stands_between_a_transformers_modules_is_compiled_with_them() -> None:
    """Class token and position embedding, in one graph (``fullgraph``), and with the same result."""
    network = create("vit_tiny_patch16_224", img_size=32, depth=1).eval()
    (segment,) = cut(network, image_size=32)
    runner = nn.Sequential(*segment.runs(training=True))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        found = torch.compile(runner, fullgraph=True, dynamic=False, backend="eager")(images)
        assert torch.equal(found, network.forward_features(images))


def test_overlapping_kernels_count_once() -> None:
    assert covered([(5, 6), (0, 4), (1, 2), (3, 4.5)]) == 5.5
    assert covered([]) == 0


@pytest.mark.gpu
def test_what_a_step_takes_of_a_gpu(gpu: torch.device) -> None:
    """A weight and its momentum of 4 MB each, its gradient, and one temporary of 64 MB; busy for some of the time."""
    layer = torch.nn.Linear(1024, 1024, bias=False, device="cuda")
    held = torch.empty(2**20, device="cuda")  # of others
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)

    def step() -> None:
        layer.weight.grad = torch.ones(2**24, device="cuda")[: 2**20].view(1024, 1024).clone()
        optimizer.step()
        optimizer.zero_grad()

    assert 76 * 2**20 <= allocator_peak(step, layer) <= 84 * 2**20 + held.numel()
    assert 0 < busy_seconds(step) < 0.1
