"""Transformers: one feature for the last head, k-NN, linear evaluation and the models that are exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from framework.analysis.export import export_timm
from framework.evaluation.cached_features import cached_features
from framework.evaluation.features import network_features
from framework.evaluation.run_folder import Run
from tests.support import networks
from tests.support.marks import slow
from tests.support.runs import ROOT, run, toy

#: label -> network, its arguments besides the small ones, method
RUNS: dict[str, tuple[str, str, str]] = {
    "class token": ("vit", "", "gim"),
    "mean": ("vit", ",global_pool:avg,reg_tokens:2", "gim"),
    "swin": ("swin", "", "gim"),
    "masked": ("vit", "", "mim"),
}
MIM = ["network.stem_as_module=true", "method={decoder_depth:1,decoder_dim:16,decoder_heads:2}"]


def trained(folder: Path, label: str) -> Run:
    """A run of two steps on digits."""
    network, more, method = RUNS[label]
    name, small = networks.TRANSFORMERS[network]
    values = ",".join(f"{key}:{list(v) if isinstance(v, tuple) else v}" for key, v in small.items())
    arguments = f"network.args={{img_size:16,{values}{more}}}"
    overrides = [
        f"network.name={name}",
        arguments,
        "network.cut=block",
        "data.image_size=16",
        "data.workers=0",
    ]
    overrides += [f"method.name={method}", f"name={method}", "train.max_steps=2", "optim.name=adamw"]
    overrides += ["engine=ddp", "optim.lr=1e-3", *(MIM if method == "mim" else [])]
    assert run([str(ROOT / "recipes" / "quickstart.yaml"), *toy(folder, *overrides)]) == ""
    return Run.open(folder / "run")


@pytest.mark.parametrize("label", ["class token", *slow(["mean", "swin", "masked"])])
def test_every_feature_is_the_exported_models(pool: Any, tmp_path: Path, label: str) -> None:
    run_folder = pool(1).run(path_of_trained, tmp_path, label)[0]
    found = Run.open(Path(run_folder))
    net = found.encoder()
    backbone = found.backbone()
    export_timm(found, backbone, tmp_path / "export")
    exported = timm.create_model(f"local-dir:{tmp_path / 'export'}", pretrained=True).eval()
    name, _ = networks.TRANSFORMERS[RUNS[label][0]]
    plain = timm.create_model(
        name,
        num_classes=0,
        checkpoint_path=str(found.folder / "backbone.safetensors"),
        **found.network_arguments,
    ).eval()
    images = torch.cat([images for _, images, _ in found.splits.eval_loader(found.splits.held_out)])
    with torch.no_grad():
        expected = exported.forward_head(exported.forward_features(images), pre_logits=True)
        assert torch.equal(plain(images), exported(images))
    ours = [
        network_features(net, found.splits.eval_loader(found.splits.held_out))[0],  # k-NN and probes
        cached_features(found, found.splits.held_out).x,  # linear evaluation
        net.features(images),
    ]
    for features in ours:
        torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)


def path_of_trained(folder: Path, label: str) -> str:
    return str(trained(folder, label).folder)
