"""Networks and arguments that are wrong: each is told in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch

from framework.network import create, cut
from framework.runtime.errors import UserError

MISTAKES = [
    (
        lambda folder: create("resnet18.nonsense"),
        "network.name=resnet18.nonsense: RuntimeError: Invalid pretrained",
    ),
    (
        lambda folder: create("resnet18", global_pool="foo"),
        "network.args={'global_pool': 'foo'}: resnet18 refuses",
    ),
    (
        lambda folder: create("resnet18", output_stride=7),
        "network.args={'output_stride': 7}: resnet18 refuses",
    ),
    (lambda folder: create("resnet18", layers=[1]), "network.args={'layers': [1]}: resnet18 refuses"),
    (lambda folder: create("resnet18", in_chans=1), "network.args.in_chans=1: images have 3 channels"),
    (
        lambda folder: create("resnet18", pretrained="yes"),
        "network.args.pretrained=yes: must be true or false",
    ),
    (
        lambda folder: create("resnet18", num_classes=10),
        "network.args.num_classes=10: not here: networks have no",
    ),
    (
        lambda folder: create("resnet18", features_only=True),
        "network.args.features_only=True: not here: the network",
    ),
    (
        lambda folder: create("resnet18", device="meta"),
        "network.args.device=meta: not here: the engine places",
    ),
    (
        lambda folder: create("resnet18", drop_rate="a"),
        "network.args.drop_rate=a: must be at least 0 and below 1",
    ),
    (lambda folder: create("resnet18", name="x"), "network.args={'name': 'x'}: resnet18 refuses"),
    (lambda folder: create("resnet18", layers=2), "network.args={'layers': 2}: resnet18 refuses"),
    (lambda folder: create("ResNet18"), "network.name=ResNet18: no such network; did you mean resnet18?"),
    (
        lambda folder: create("vit_tiny_patch16_224", depth=-1),
        "network.args={'depth': -1}: vit_tiny_patch16_224 refuses",
    ),
    (
        lambda folder: create("vit_tiny_patch16_224", img_size="big"),
        "network.args={'img_size': 'big'}: vit_tiny_patch16_224 refuses",
    ),
    (
        lambda folder: cut(create("vit_tiny_patch16_224", depth=1), image_size=64),
        "data.image_size=64: VisionTransformer takes no such images: Input height (64) doesn't match model (224). "
        "Set network.args.img_size=64.",
    ),
    (
        lambda folder: cut(create("vit_tiny_patch16_224", depth=1, dynamic_img_size=True), image_size=100),
        "data.image_size=100: VisionTransformer takes no such images: Input height (100) should be divisible",
    ),
    (lambda folder: create("resnet18", checkpoint_path=f"{folder}/no.pth"), "no.pth: no such file"),
    (
        lambda folder: create("resnet18", checkpoint_path=5),
        "network.args.checkpoint_path=5: must be the path",
    ),
    (
        lambda folder: create("resnet18", checkpoint_path=broken(folder)),
        "broken.pth: can't be loaded into resnet18",
    ),
    (
        lambda folder: create("resnet18", checkpoint_path=others(folder)),
        "others.pth: can't be loaded into resnet18",
    ),
]


def broken(folder: Path) -> str:
    """A file that is no checkpoint."""
    (folder / "broken.pth").write_text("hello")
    return str(folder / "broken.pth")


def others(folder: Path) -> str:
    """Weights of another network."""
    torch.save(create("resnet8").state_dict(), folder / "others.pth")
    return str(folder / "others.pth")


@pytest.mark.parametrize(("make", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_mistakes_are_told_in_one_line(make: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        make(tmp_path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_weights_that_can_not_be_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing answers at the address of the hub; the line names what was asked for."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as caught:
        create("resnet18", pretrained=True, cache_dir=str(tmp_path))
    message = str(caught.value)
    assert message.startswith("network.args.pretrained=true: the weights of resnet18 can't be fetched: ")
    assert "\n" not in message


def test_three_blocks_are_three_stages() -> None:
    """Of a network that has one resolution, and is cut into four groups where it has as many blocks."""
    assert len(cut(create("vit_tiny_patch16_224", depth=3), "stage", image_size=224)) == 3
