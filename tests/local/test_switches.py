"""Each switch of what the papers leave open changes what it says, by a formula written out here."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.models.resnet import Bottleneck
from torch import Tensor, nn

from framework.data.batch import Batch
from framework.execution import LocalNetwork
from framework.execution.naive import naive_gradients
from framework.local import Classifier, NetworkInfo, Projection
from framework.local.decoder import Decoder
from framework.local.head import WeightedHeads
from framework.local.lam_head import LamHead
from framework.local.methods import gim, loco, mlaan
from framework.local.objectives import InfoNCE, SupCon
from framework.local.reconstruction import Reconstruction
from framework.model import local_network
from framework.network import create, cut
from framework.runtime.distributed import rank, world_size
from framework.runtime.errors import UserError
from tests.support import networks
from tests.support.networks import CLASSES
from tests.support.pool import Pool

HEAD = "layer2_0/window"


def mlaan_network(name: str = "resnet8", **options: Any) -> LocalNetwork:
    torch.manual_seed(0)
    chosen = mlaan.Options(**{"window": 2, "lam_weights": "two_copies"} | options)
    net = local_network(name, "mlaan", chosen, image_size=16, num_classes=CLASSES, cut="block")
    return net.double().train()


def train(net: LocalNetwork, steps: int, lr: float = 0.5) -> list[dict[str, Tensor]]:
    """Plain SGD; the backbone's weights before each step and after the last."""
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    seen = []
    for step in range(steps):
        seen.append(copy.deepcopy(net.backbone.state_dict()))
        net(networks.batch(net, seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return [*seen, copy.deepcopy(net.backbone.state_dict())]


def test_lam_form_ema_chain() -> None:
    """Figure 3: every block of the chain has an average beside it, and each follows its own block."""
    net = mlaan_network("resnet14", lam_form="ema_chain", ema_m=0.9)
    lam = net.heads["layer1_1/window"].lam
    assert [len(lam.aug), len(lam.ema)] == [3, 3]
    x = torch.randn(2, 16, 16, 16, dtype=torch.float64)
    by_hand = x
    for trained, average in zip(lam.aug, lam.ema, strict=True):
        by_hand = trained(by_hand) + average.block(by_hand)
    assert torch.allclose(lam(x), by_hand)
    before, *_ = train(net, 1)
    train(net, 1)
    for average, block in zip(lam.ema, lam.followed, strict=True):
        name = f"{block.name}.conv1.weight"
        start, now = before[name], net.backbone.get_parameter(name)
        moved = average.block.get_buffer("conv1.weight")
        assert not torch.equal(moved, start) and (moved - start).norm() < (now - start).norm()
    assert net.plan.units[1].head.reads == tuple(b.segment for b in lam.followed)


@pytest.mark.parametrize("form", ["sum_first", "ema_chain"])
def test_lam_weights_trained_and_pulled(form: str) -> None:
    """Eqs. 9 and 10: gamma takes an SGD step and goes m of the way from the later block's weights."""
    net = mlaan_network(lam_form=form, lam_weights="trained_and_pulled", ema_m=0.9)
    pulled = net.heads[HEAD].lam.aug[0]
    assert not net.heads[HEAD].lam.ema
    gamma = {n: pulled._weights()[n].detach().clone() for n in pulled.names}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    for step in range(3):
        live = {n: p.detach().clone() for n, p in net.backbone.layer3[0].named_parameters()}
        net(networks.batch(net, seed=step)).loss.backward()
        for name in gamma:
            gradient = pulled.block.get_parameter(name).grad
            gamma[name] = 0.9 * gamma[name] + 0.1 * live[name] - 0.5 * gradient
        optimizer.step()
        optimizer.zero_grad()
    for name, expected in gamma.items():
        assert torch.allclose(pulled._weights()[name], expected, rtol=1e-10, atol=1e-12), name
        assert not torch.allclose(live[name], expected, rtol=1e-3)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_ema_when_after(accumulation: int) -> None:
    """The third forward pass has averages that took in the weights after the second step."""
    net = mlaan_network(ema_when="after", ema_m=0.9)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    live = net.backbone.layer3[0].conv1.weight
    expected = live.detach().clone()
    for step in range(3):
        expected = 0.9 * expected + 0.1 * live.detach()
        data = networks.batch(net, seed=step)
        for number in range(1, accumulation + 1):
            net(data._replace(last=number == accumulation)).loss.backward()
            average = net.heads[HEAD].lam.ema[0].block.get_buffer("conv1.weight")
            assert torch.allclose(average, expected, rtol=1e-12)
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.allclose(live, expected, rtol=1e-3)


@pytest.mark.parametrize("follows", [False, True])
def test_ema_buffers(follows: bool) -> None:
    net = mlaan_network(ema_buffers=follows, ema_m=0.9)
    average = net.heads[HEAD].lam.ema[0].block
    own = average.bn1.running_mean.clone()
    net.backbone.layer3[0].bn1.running_mean.fill_(100.0)
    train(net, 1)
    moved = (average.bn1.running_mean - own).abs().max()
    assert (moved > 8) == follows


@pytest.mark.parametrize(("window", "runs"), [(2, 2), (3, 3)])
def test_bn_update_all(window: int, runs: int) -> None:
    """MLAAN's code runs a middle module once for the single loss and once for every window it is in."""
    batches = {}
    for update in ("once", "all"):
        net = networks.network("mlm-2" if window == 2 else "mlm-3").double()
        naive_gradients(net, networks.batch(net), update)  # type: ignore[arg-type]
        batches[update] = int(net.backbone.layer2[1].bn1.num_batches_tracked)
    assert batches == {"once": 1, "all": runs + 1}


def decoder(**options: Any) -> nn.Module:
    network = NetworkInfo.of(cut(create("resnet50")), 64)
    return Projection(conv_blocks=1, **options).build(network, 0).trunk[0]


@pytest.mark.parametrize(
    ("width", "groups", "inside"), [(None, 1, 64), (128, 1, 128), (None, 4, 64), (96, 32, 96), (100, 1, 100)]
)
def test_dec_width_and_dec_groups(width: int | None, groups: int, inside: int) -> None:
    block = decoder(dec_width=width, dec_groups=groups)
    assert isinstance(block, Bottleneck)
    assert (block.conv2.in_channels, block.conv2.out_channels, block.conv2.groups) == (inside, inside, groups)
    parameters = 256 * inside * 2 + 9 * inside * inside // groups + 256 * 256 + 2 * (2 * inside + 2 * 256)
    assert sum(p.numel() for p in block.parameters()) == parameters


def test_a_bottleneck_that_is_impossible() -> None:
    with pytest.raises(
        UserError, match=r"64 inside can't have 7 groups; method.head.dec_block=basic is possible"
    ):
        decoder(dec_groups=7)


def infonce_by_hand(a: Tensor, b: Tensor, tau: float) -> Tensor:
    """Sum over the first views of -log softmax; the other 2N - 1 embeddings of both views compete."""
    a, b = F.normalize(a, dim=1), F.normalize(b, dim=1)
    total = torch.zeros((), dtype=a.dtype)
    for i in range(len(a)):
        others = [a[j] for j in range(len(a)) if j != i] + list(b)
        scores = torch.stack([a[i] @ other for other in others]) / tau
        total = total - (a[i] @ b[i] / tau - scores.logsumexp(0))
    return total


@pytest.mark.parametrize("form", ["symmetric", "sum", "one_sided"])
def test_loss_form(form: Any) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 6, 4, dtype=torch.float64)
    there, back = infonce_by_hand(a, b, 0.2) / 6, infonce_by_hand(b, a, 0.2) / 6
    expected = {"symmetric": (there + back) / 2, "sum": there + back, "one_sided": there}[form]
    loss = InfoNCE(0.2, form)(torch.cat([a, b]), Batch(torch.empty(0), views=2))
    assert torch.allclose(loss, expected)


def local_gradient() -> Tensor:
    """Gradient of this rank's embeddings (2, 3, D) where other ranks' are constants."""
    z = gathered().chunk(world_size(), 1)[rank()].clone().requires_grad_()
    loss = InfoNCE(0.2, gather_grad=False)(z.flatten(0, 1), Batch(torch.empty(0), views=2))
    return torch.autograd.grad(loss, z)[0]


def gathered() -> Tensor:
    return torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_gather_grad(pool) -> None:
    ours: Pool = pool(2)
    found = ours.run(local_gradient)
    for part in range(2):
        mine = gathered()[:, 3 * part : 3 * part + 3].clone().requires_grad_()
        other = gathered()[:, 3 * (1 - part) : 3 * (1 - part) + 3]
        pair = [mine, other] if part == 0 else [other, mine]
        z = F.normalize(torch.cat(pair, 1), dim=2)
        loss = torch.zeros((), dtype=torch.float64)
        for view in range(2):
            for i in range(3 * part, 3 * part + 3):
                scores = (z[view, i] @ z.flatten(0, 1).T) / 0.2
                keep = torch.ones(12, dtype=torch.bool)
                keep[6 * view + i] = False
                loss = loss - (z[view, i] @ z[1 - view, i] / 0.2 - scores[keep].logsumexp(0)) / 6
        assert torch.allclose(found[part], torch.autograd.grad(loss, mine)[0])


@pytest.mark.parametrize("method", [gim, loco])
def test_unit_loss_weights_and_reduce(method: Any) -> None:
    name = method.__name__.rpartition(".")[2]
    plain = local_network("resnet14", name, image_size=16)
    weights = tuple(float(i + 1) for i in range(len(plain.plan.units)))
    options = method.Options(unit_loss_weights=weights, unit_loss_reduce="mean")
    torch.manual_seed(0)
    net = local_network("resnet14", name, options, image_size=16).double().train()
    output = net(networks.batch(net))
    expected = sum(w * loss for w, loss in zip(weights, output.unit_losses, strict=True)) / len(weights)
    assert torch.allclose(output.loss, expected)
    with pytest.raises(UserError, match=r"unit_loss_weights: 1 weights for the [23] units layer"):
        local_network("resnet14", name, method.Options(unit_loss_weights=(1.0,)), image_size=16)


@pytest.mark.parametrize("norm", [True, False])
def test_soft_share_norm(norm: bool) -> None:
    net = local_network("resnet14", "loco", loco.Options(soft_share=0.5, soft_share_norm=norm), image_size=16)
    with torch.no_grad():
        net.backbone.layer2[0].bn1.weight.add_(2.0)
    penalty = net.penalty()
    assert penalty is not None and penalty.item() == (0.5 * 4 * 32 if norm else 0)


def test_lambda_index_stage() -> None:
    """MLAAN's code interpolates with the stage's number over M - 2: 4.6, 4.2 and 3.8 at M=15."""
    options = mlaan.Options(reconstruction=Reconstruction("mlaan", lambda_index="stage"))
    net = local_network("resnet32", "mlaan", options, image_size=32, num_classes=CLASSES, cut=16)
    lambdas = {}
    for unit in net.plan.units:
        for module in unit.head.modules():
            if isinstance(module, WeightedHeads) and isinstance(module.parts[0], Decoder):
                lambdas[unit.name[:6]] = round(module.weights[0], 1)
    assert lambdas == {"layer1": 4.6, "layer2": 4.2, "layer3": 3.8}


def test_infopro_indep_loss_supcon() -> None:
    """The authors' InfoPro* contrasts on single modules, by an oversight; an option of the head."""
    options = mlaan.Options(indep_head=Classifier("1c2f", "contrast"), casc_head=Classifier("1c2f"))
    net = mlaan_network(**{k: getattr(options, k) for k in ("indep_head", "casc_head")})
    single, window = net.heads["layer2_0/single"], net.heads[HEAD]
    assert isinstance(single.objective, SupCon) and isinstance(window, LamHead)
    assert isinstance(window.head.objective, nn.Module) and not isinstance(window.head.objective, SupCon)


def test_last_loss_and_indep_on_first() -> None:
    usual = {u.name: u.weight for u in mlaan_network("resnet14", window=3).plan.units}
    changed = mlaan_network("resnet14", window=3, last_loss="cascaded_only", indep_on_first=True)
    now = {u.name: (u.first, u.last, u.weight) for u in changed.plan.units}
    assert usual["layer3.1/single"] == 0.001 and usual["layer3.1/window"] == 0.999
    assert "layer3.1/single" not in now and now["layer3.1/window"] == (3, 5, 1.0)
    assert now["layer1.0/single"] == (0, 0, 0.001) and now["layer1.1/single"] == (1, 1, 0.001)
    assert "layer1.0/single" not in usual


def test_stem_as_module() -> None:
    merged, own = cut(create("resnet32"), 16), cut(create("resnet32"), 16, stem_as_module=True)
    assert (len(merged), len(own)) == (15, 16)
    assert own[0].paths == ("conv1", "bn1", "act1") and merged[0].paths == (*own[0].paths, *own[1].paths)
