"""What heads declare is what they do, whatever they are wrapped in; and plans refuse what nothing provides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from framework.data.batch import Batch
from framework.execution import LocalNetwork
from framework.local import LocalUnit, Need, NetworkInfo, Plan
from framework.local.head import Head, TrunkHead, WeightedHeads
from framework.local.lam import LamBuilder
from framework.local.lam_copies import Copies
from framework.local.methods import infopro, mlaan
from framework.local.objectives import CrossEntropy, InfoNCE, SupCon
from framework.local.reconstruction import Reconstruction
from framework.local.soft_sharing import SoftSharedHead
from framework.local.trunks import mlp
from framework.model import local_network
from framework.network import Segment, create, cut
from framework.runtime.errors import UserError
from tests.support import networks
from tests.support.networks import CASES, CLASSES

LABELS, IMAGES = frozenset({Need.LABELS}), frozenset({Need.IMAGES})


@torch.no_grad()
@pytest.mark.parametrize(
    "case", [case for case in CASES if case != "dfa"]
)  # whose heads wait for the top one
def test_heads_do_what_they_declare(case: str) -> None:
    """Labels, images, the teacher and other images of the batch change a loss exactly where the head says so."""
    net = networks.network(case).double()
    whole = networks.batch(net)
    seen, x = networks.taught_by(net, whole), net.first_input(whole)
    for number, segment in enumerate(net.segments):
        x = segment(x).detach()
        for head in {unit.head: None for unit in net.plan.units if unit.last == number}:
            data = seen[head]
            loss = head(x, data)
            if head.separable:
                assert torch.equal(head.score(head.embed(x), data), loss)
            if head.classifies:
                logits = head.predict(x)
                assert logits.shape == (len(data.images), CLASSES)
                assert torch.allclose(nn.functional.cross_entropy(logits, data.labels), loss)
            noise = data._replace(images=torch.rand_like(data.images))
            assert torch.equal(head(x, noise), loss) == (Need.IMAGES not in head.needs)
            if Need.TEACHER in head.needs:
                with pytest.raises(UserError, match=r"needs batch.teacher"):
                    head(x, data._replace(teacher=None))
            else:
                assert data.teacher is None
            if Need.LABELS in head.needs:
                with pytest.raises(UserError, match="needs labels"):
                    head(x, data._replace(labels=None))
            else:
                assert torch.equal(head(x, data._replace(labels=None)), loss)


def test_supervised_methods_are_those_whose_heads_need_labels() -> None:
    found = {
        case: networks.network(case).plan for case in ("gim", "loco-soft", "bp", "mlaan", "infopro", "hpff")
    }
    assert {case: plan.supervised for case, plan in found.items()} == {
        "gim": False,
        "loco-soft": False,
        "bp": True,
        "mlaan": True,
        "infopro": True,
        "hpff": True,
    }
    assert found["mlaan"].needs == LABELS and found["infopro"].needs == LABELS | IMAGES
    assert {case for case, plan in found.items() if plan.contrasts} == {"gim", "loco-soft"}


def network_info() -> NetworkInfo:
    return NetworkInfo.of(cut(create("resnet8"), "block"), 16, CLASSES)


@pytest.mark.parametrize("objective", [CrossEntropy, InfoNCE, SupCon])
def test_a_head_behind_something_is_what_it_was(objective: type[nn.Module]) -> None:
    """LAM and soft sharing keep what the inner head declares; the sum of several heads is not separable."""
    network = network_info()
    inner = TrunkHead(nn.Flatten(), objective())
    declared = (
        inner.needs,
        inner.contrasts,
        inner.fewest_images,
        inner.separable,
        inner.classifies,
        inner.soft_labels,
    )
    assert inner.soft_labels == (objective is CrossEntropy)
    lam, _ = LamBuilder(network, {}, Copies()).build(0)
    for wrapped in (lam.under(inner), SoftSharedHead(network, 1, inner, 0.1)):
        found = (
            wrapped.needs,
            wrapped.contrasts,
            wrapped.fewest_images,
            wrapped.separable,
            wrapped.classifies,
            wrapped.soft_labels,
        )
        assert found == declared
    both = Reconstruction(first=(1, 1), last=(1, 1)).beside(inner, network, 0)
    assert isinstance(both, WeightedHeads)
    assert (both.needs, both.contrasts) == (inner.needs | IMAGES, inner.contrasts)
    assert (both.fewest_images, both.soft_labels) == (inner.fewest_images, inner.soft_labels)
    assert not both.separable and not both.classifies


def test_what_heads_read_and_penalize_is_kept_by_what_wraps_them() -> None:
    network = network_info()
    segments = network.segments
    inner = SoftSharedHead(network, 1, TrunkHead(nn.Flatten(), InfoNCE()), 0.5)
    with torch.no_grad():
        for parameter in segments[1].parameters():
            parameter.add_(2.0)
    own = inner.penalty(segments)
    assert own.item() == pytest.approx(0.5 * 4 * sum(p.numel() for p in segments[1].parameters()))
    lam, _ = LamBuilder(network, {}, Copies()).build(1)
    behind = lam.under(inner)
    assert behind.reads == (2, 1) and behind.penalizes and behind.penalty(segments) == own
    assert set(behind.read_parameters(segments)) == {*segments[2].parameters(), *segments[1].parameters()}
    half = WeightedHeads([(0.5, inner), (1.0, TrunkHead(nn.Flatten(), CrossEntropy()))])
    assert half.reads == (1,) and half.penalty(segments) == own / 2


@pytest.mark.parametrize(
    ("copies", "may_lag"),
    [
        (Copies(), True),
        (Copies(when="after"), False),
        (Copies(statistics=True), False),
        (Copies(weights="trained_and_pulled"), True),
    ],
)
def test_which_copies_may_follow_later(copies: Copies, may_lag: bool) -> None:
    lam, _ = LamBuilder(network_info(), {}, copies).build(0)
    assert lam.under(TrunkHead(nn.Flatten(), CrossEntropy())).may_lag == may_lag


@pytest.mark.parametrize(
    ("need", "text"),
    [
        (Need.IDS, "the numbers of the images in the data set, which nothing provides yet"),
        (Need.TEACHER, "a teacher: make the plan with teacher="),
    ],
)
def test_needs_that_nothing_provides_are_refused(need: Need, text: str) -> None:
    head = Head()
    head.needs = frozenset({need, Need.LABELS})
    with pytest.raises(UserError, match=f"^unit u: its head needs {text}"):
        Plan((LocalUnit("u", 0, 0, head),), 1)


class Diary(Head):
    """Notes the first weight of a segment at every call around a step."""

    reads = (0,)

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[tuple[str, float, float]] = []

    def loss(self, x: Tensor, batch: Batch) -> Tensor:
        return x.square().mean()

    def before_step(self, segments: Sequence[Segment], taken: Tensor | float) -> None:
        self._note("before", segments, taken)

    def after_step(self, segments: Sequence[Segment], taken: Tensor | float) -> None:
        self._note("after", segments, taken)

    def _note(self, when: str, segments: Sequence[Segment], taken: Tensor | float) -> None:
        self.noted.append((when, next(segments[0].parameters()).flatten()[0].item(), float(taken)))


@pytest.mark.parametrize("accumulation", [1, 3])
def test_heads_are_called_before_and_after_every_optimizer_step(accumulation: int) -> None:
    backbone = create("resnet8")
    diary = Diary()
    behind = WeightedHeads([(1.0, diary)])
    net = LocalNetwork(backbone, cut(backbone, 1), Plan((LocalUnit("u", 0, 0, behind),), 1)).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    weights = [backbone.conv1.weight.flatten()[0].item()]
    for step in range(2):
        for number in range(1, accumulation + 1):
            images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(step))
            net(Batch(images, last=number == accumulation)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        weights.append(backbone.conv1.weight.flatten()[0].item())
    assert len(set(weights)) == 3
    assert diary.noted == [
        ("after", weights[0], 1.0),
        ("before", weights[0], 1.0),
        ("after", weights[1], 1.0),
        ("before", weights[1], 1.0),
    ]


def test_checkpoints_keep_the_names_of_heads() -> None:
    """As they were before heads had a common base class."""
    lam = networks.network("mlaan-infopro")
    names = [n for n in lam.state_dict() if n.startswith("heads.layer2_0/window")]
    assert "heads.layer2_0/window.lam.aug.0.conv1.weight" in names
    assert "heads.layer2_0/window.lam.ema.0.block.conv1.weight" in names
    assert "heads.layer2_0/window.head.parts.0.trunks.0.0.weight" in names
    assert "heads.layer2_0/window.head.parts.1.trunk.0.weight" in names
    soft = networks.network("loco-soft").state_dict()
    assert {"heads.layer2.copy.0.conv1.weight", "heads.layer2.head.trunk.0.conv1.weight"} <= set(soft)


def test_pulled_copies_have_their_name_in_the_state() -> None:
    plan = mlaan.plan(network_info(), mlaan.Options(window=2))
    assert any(name.endswith("_pull") for name in plan.heads[1].state_dict())


def test_a_module_with_a_decoder_alone_needs_no_labels() -> None:
    options = infopro.Options(reconstruction=Reconstruction(first=(5, 0), last=(5, 1)))
    plan = infopro.plan(network_info(), options)
    assert plan.supervised and not plan.only(0).supervised and plan.only(1).needs == LABELS | IMAGES


@pytest.mark.parametrize(("bn", "affine"), [("hidden", 2), ("all", 4), ("all_plain", 2)])
def test_batch_norm_in_projections(bn: str, affine: int) -> None:
    """Behind the hidden layer or behind both, where the last one may have no weights (MoCo v3, SimSiam)."""
    torch.manual_seed(0)
    layers = nn.Sequential(*mlp((3, 4, 2), bn)).double()
    x = torch.randn(6, 3, dtype=torch.float64)
    first, *_, last = (layer.weight for layer in layers if isinstance(layer, nn.Linear))
    expected = standardized(torch.relu(standardized(x @ first.T)) @ last.T)
    found = layers(x)
    if bn == "hidden":
        found = standardized(found)
    torch.testing.assert_close(found, expected)
    norms = [layer for layer in layers if isinstance(layer, nn.BatchNorm1d)]
    assert sum(len(list(norm.parameters())) for norm in norms) == affine


def standardized(x: Tensor) -> Tensor:
    """Without mean and with variance 1 over the images, but for BatchNorm's epsilon."""
    return (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()


def test_a_loss_of_two_views_needs_a_plan_and_a_batch_with_two() -> None:
    """Otherwise it would pair different images, and train."""
    net = local_network("resnet8", "gim", image_size=16)
    with pytest.raises(UserError, match=r"unit layer1: its head needs two views of every image: .* views=2"):
        replace(net.plan, views=1)
    with pytest.raises(
        UserError, match=r"a batch with 1 view of every image: the plan has 2; Batch\(images, views=2\)"
    ):
        net(Batch(torch.randn(4, 3, 16, 16)))
