"""Masked image modeling: masks, and losses and gradients against a plain network of its own in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from framework.data.batch import Batch
from framework.engines.base import EngineSettings
from framework.engines.cuda_graph import build
from framework.execution import LocalNetwork
from framework.execution.masks import Masks
from framework.local.masking import Masking
from framework.local.methods import mim
from framework.model import local_network
from framework.network import create
from framework.optim.groups import exempt_parameters
from framework.runtime.errors import UserError
from tests.support import networks

PATCH, SIDE = 4, 4
SMALL = mim.Options(decoder_depth=1, decoder_dim=16, decoder_heads=2)


def network(cut: Any = "block", **arguments: Any) -> LocalNetwork:
    torch.manual_seed(0)
    backbone = networks.transformer("vit", 16, **arguments)
    return local_network(backbone, "mim", SMALL, image_size=16, cut=cut, stem_as_module=True).double().train()


def loss_by_hand(head: Any, tokens: Tensor, image: Tensor, visible: list[int], prefix: int) -> Tensor:
    """Of one image, patch by patch."""
    tokens = head.embed_tokens(head.norm(tokens))
    rows = []
    for p in range(SIDE * SIDE):
        seen = tokens[prefix + visible.index(p)] if p in visible else head.mask_token[0, 0]
        rows.append(seen + head.positions[p])
    decoded = head.pixels(head.last_norm(head.blocks(torch.stack([*tokens[:prefix], *rows])[None])[0]))
    errors = []
    for p in set(range(SIDE * SIDE)) - set(visible):
        top, left = PATCH * (p // SIDE), PATCH * (p % SIDE)
        pixels = image[:, top : top + PATCH, left : left + PATCH].reshape(-1)
        wanted = (pixels - pixels.mean()) / (pixels.var() + 1e-6) ** 0.5
        errors.append((decoded[prefix + p] - wanted).square().mean())
    return torch.stack(errors).mean()


def by_hand(net: LocalNetwork, batch: Batch, visible: Tensor) -> dict[str, Tensor]:
    """Gradients of all units, whose windows run on their own, with timm's modules called one by one."""
    vit: Any = net.backbone
    tokens = vit.patch_embed(batch.images) + vit.pos_embed[:, vit.num_prefix_tokens :]
    front = torch.cat([t for t in (vit.cls_token, vit.reg_token) if t is not None], 1)
    front = front + vit.pos_embed[:, : vit.num_prefix_tokens]
    chosen = torch.stack([rows[numbers] for rows, numbers in zip(tokens, visible, strict=True)])
    x = torch.cat([front.expand(len(chosen), -1, -1), chosen], 1)
    prefix = front.shape[1]
    for number, unit in enumerate(net.plan.units):
        x = vit.blocks[number](x)
        last = number == len(net.plan.units) - 1
        x = vit.norm(x) if last else x
        losses = [
            loss_by_hand(unit.head, rows, image, numbers.tolist(), prefix)
            for rows, image, numbers in zip(x, batch.images, visible, strict=True)
        ]
        torch.stack(losses).mean().backward()
        x = x.detach()
    return networks.gradients(net)


@pytest.mark.parametrize(
    "arguments", [{}, {"reg_tokens": 2, "no_embed_class": False}], ids=["token", "registers"]
)
def test_losses_and_gradients_are_those_of_a_network_written_out(arguments: dict[str, Any]) -> None:
    net = network(**arguments)
    if arguments:
        assert net.plan.masking == Masking(0.75, 16, prefix=3)
    plain, batch = copy.deepcopy(net), networks.batch(net, size=3)
    net(batch).loss.backward()
    visible = net.masked(batch).visible
    assert visible is not None
    theirs, ours = by_hand(plain, batch, visible), networks.gradients(net)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).norm() < 1e-10 * gradient.norm() + 1e-13, name


def test_a_quarter_of_the_patches_passes_through_the_segments_in_training_and_all_in_scoring() -> None:
    net = network()
    seen: list[int] = []
    for block in net.backbone.blocks:  # type: ignore[union-attr]
        block.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    batch = networks.batch(net)
    net(batch)
    assert seen == [1 + 4] * 4
    seen.clear()
    features = net.eval().features(batch.images)
    assert seen == [1 + 16] * 4
    assert torch.allclose(features, net.backbone(batch.images))  # timm's, of whole images
    assert torch.equal(net(batch).unit_losses, net(batch).unit_losses)


def drawn(step: int = 0, micro_batch: int = 0, seed: int = 3) -> Tensor:
    batch = Masks(Masking(0.75, 196, 1), seed, step, micro_batch).on(Batch(torch.empty(64, 3, 8, 8)))
    assert batch.visible is not None
    return batch.visible


def test_masks_differ_by_image_step_micro_batch_and_seed_and_by_nothing_else() -> None:
    visible = drawn()
    assert visible.shape == (64, 49) and bool((visible.diff(dim=1) > 0).all())
    assert len({tuple(row) for row in visible.tolist()}) == 64
    torch.rand(3)
    assert torch.equal(drawn(), visible)
    for other in (drawn(step=1), drawn(micro_batch=1), drawn(seed=4)):
        assert not torch.equal(other, visible)
    counts = torch.cat([drawn(step).flatten() for step in range(100)]).bincount(minlength=196)
    expected, deviation = 6400 / 4, (6400 * 0.25 * 0.75) ** 0.5
    assert float((counts - expected).abs().max()) < 5 * deviation


def test_the_tokens_that_take_the_place_of_hidden_patches_are_no_weights() -> None:
    net = network()
    tokens = {head.mask_token for head in net.heads.values()}
    assert tokens <= exempt_parameters(net) and len(tokens) == 4


def test_in_two_segments_it_is_mae() -> None:
    net = network(cut=2)
    (unit,) = net.plan.units
    assert (unit.first, unit.last, len(net.segments)) == (0, 1, 2)
    assert isinstance(unit.head.norm, nn.Identity)  # the network's own norm stands before the decoder


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "a CNN": ("resnet8", {}, r"method.name=mim: needs a network whose blocks take any of an image's tokens"),
    "windows": ("swin", {}, r"needs .* timm's vit_\*; SwinTransformer has none"),
    "one segment": ("vit", {"cut": 1, "stem_as_module": False}, "network.stem_as_module=false: must be true"),
    "a stem within": ("vit", {"stem_as_module": False}, "network.stem_as_module=false: must be true"),
    "nothing visible": ("vit", {"masked": 0.95}, r"method.masked=0.95: leaves 0 of 16 patches visible"),
    "nothing hidden": ("vit", {"masked": 0.0}, r"method.masked=0.0: leaves 16 of 16"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_can_not_train_is_refused(case: str) -> None:
    name, settings, message = REFUSED[case]
    options = mim.Options(masked=settings.pop("masked", 0.75), decoder_depth=1)
    backbone = networks.transformer(name, 16) if name in networks.TRANSFORMERS else create(name)
    with pytest.raises(UserError, match=message):
        local_network(backbone, "mim", options, image_size=16, **{"stem_as_module": True, **settings})


def test_relative_positions_are_found_by_trying() -> None:
    """BEiT's blocks have tokens in and out like a ViT's."""
    backbone = create("beit_base_patch16_224", img_size=32, depth=2, embed_dim=24, num_heads=2)
    with pytest.raises(UserError, match="Beit has none"):
        local_network(backbone, "mim", SMALL, image_size=32, stem_as_module=True)


def test_no_graph_repeats_masks() -> None:
    with pytest.raises(UserError, match="would repeat the masks of one step for ever"):
        build(network(), lambda net: None, EngineSettings(8))  # type: ignore[arg-type,return-value]
