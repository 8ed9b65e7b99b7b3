"""Small networks and batches that several tests share."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from framework.data.batch import Batch
from framework.execution import LocalNetwork
from framework.local import NetworkInfo
from framework.local.head import Head
from framework.local.heads import Classifier, Projection
from framework.local.methods import blockwise, dgl, gim, infopro, loco, mim, mlaan, names, scpl, sign, simclr
from framework.local.reconstruction import Reconstruction
from framework.model import local_network
from framework.network import create, cut

CLASSES = 10

#: label -> timm's name, arguments besides the side of the images
TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", {"patch_size": 4, "depth": 4, "embed_dim": 24, "num_heads": 2}),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"window_size": 2, "depths": (1, 1), "num_heads": (1, 2), "embed_dim": 16},
    ),
}


def transformer(label: str, image_size: int, **arguments: Any) -> nn.Module:
    """A small transformer, always with the same weights."""
    name, small = TRANSFORMERS[label]
    torch.manual_seed(0)
    return create(name, img_size=image_size, **small, **arguments)


def taught(objective: Any) -> Projection:
    """A small projection under an objective with a teacher or predictor; a fast teacher, a queue that goes round."""
    small = {"proj_hidden": 16, "dim": 8, "pred_hidden": 8, "queue": 40, "momentum": 0.9}
    return Projection(objective=objective, conv_blocks=1, **small)


def barlow(expand: int) -> Projection:
    """A small projection behind an expansion, under Barlow Twins."""
    return Projection(expand=expand, objective="barlow", proj_hidden=32, dim=16)


#: label -> method, options, cut: every method, with its own heads, on windows of several lengths
CASES: dict[str, tuple[str, Any, str]] = {
    "bp": ("bp", None, "block"),
    "simclr": ("simclr", None, "stage"),
    "gim": ("gim", None, "stage"),
    "gim-1-stage": ("gim", gim.Options(head=Projection(dec_trunk="next_stage")), "stage"),
    "loco": ("loco", None, "stage"),
    "loco-3": ("loco", loco.Options(window=3), "block"),
    "loco-upper": ("loco", loco.Options(shared_grad="upper"), "stage"),
    "loco-soft": ("loco", loco.Options(soft_share=0.01), "stage"),
    "loco-1-block": ("loco", loco.Options(share_blocks=1), "block"),
    "loco-monitor": ("loco", loco.Options(loco_losses="monitor_first_stage"), "stage"),
    "loco-barlow": (
        "loco",
        loco.Options(head=Projection(objective="barlow", proj_hidden=32, dim=16)),
        "stage",
    ),
    "loco-vicreg": (
        "loco",
        loco.Options(head=Projection(objective="vicreg", proj_hidden=32, dim=16)),
        "stage",
    ),
    "simclr-mocov3": ("simclr", simclr.Options(head=taught("mocov3")), "block"),
    "gim-byol": ("gim", gim.Options(head=taught("byol")), "stage"),
    "loco-moco": ("loco", loco.Options(head=taught("moco")), "stage"),
    "loco-simsiam": ("loco", loco.Options(head=taught("simsiam")), "stage"),
    "blockwise": (
        "blockwise",
        blockwise.Options(head=barlow(32)),
        "stage",
    ),
    "dgl": ("dgl", None, "block"),
    "dgl-1c2f": ("dgl", dgl.Options(head=Classifier("1c2f")), "block"),
    "dgl-mlp-sr": ("dgl", dgl.Options(head=Classifier("mlp_sr")), "stage"),
    "infopro": ("infopro", None, "block"),
    "infopro-contrast": ("infopro", infopro.Options(head=Classifier("1c2f", "contrast")), "stage"),
    "mlm-1": ("mlaan", mlaan.Options(window=1, lam_on="none"), "block"),
    "mlm-2": ("mlaan", mlaan.Options(window=2, lam_on="none"), "block"),
    "mlm-3": ("mlaan", mlaan.Options(window=3, lam_on="none"), "block"),
    "mlm-6": ("mlaan", mlaan.Options(window=6, lam_on="none"), "block"),
    "mlaan": ("mlaan", mlaan.Options(window=2), "block"),  # networks of three blocks have one window of three
    "mlaan-code": ("mlaan", mlaan.Options(window=2, lam_weights="two_copies"), "block"),
    "lam": ("mlaan", mlaan.Options(window=1, w_indep=1, w_casc=0, lam_on="independent"), "block"),
    "mlaan-infopro": (
        "mlaan",
        mlaan.Options(
            window=3,
            casc_head=Classifier("1c2f"),
            indep_head=Classifier("1c2f"),
            reconstruction=Reconstruction("mlaan"),
            lam_on="both",
            lam_weights="two_copies",
        ),
        "block",
    ),
    "mlaan-after": (
        "mlaan",
        mlaan.Options(window=2, lam_form="ema_chain", ema_when="after", ema_buffers=True),
        "block",
    ),
    "fa": ("fa", None, "block"),
    "sign-2": ("sign", sign.Options(window=2), "block"),
    "dfa": ("dfa", None, "block"),
    "scpl": ("scpl", scpl.Options(proj_hidden=16, dim=8), "stage"),
    "mim": (
        "mim",
        mim.Options(decoder_depth=1, decoder_dim=16, decoder_heads=2),
        "block",
    ),  # on the small ViT
    "auglocal": ("auglocal", None, "block"),
    "hpff": ("hpff", None, "block"),
    "man": ("man", None, "block"),
}

#: one case a method, with its own heads
OF_METHODS = {
    method: method if method in CASES else next(case for case, (name, *_) in CASES.items() if name == method)
    for method in names()
}

#: cases whose losses are recorded: one a method, and MLAAN's other window
GOLDEN = (
    "bp",
    "simclr",
    "gim",
    "loco",
    "loco-soft",
    "loco-barlow",
    "loco-vicreg",
    "simclr-mocov3",
    "gim-byol",
    "loco-moco",
    "loco-simsiam",
    "blockwise",
    "dgl",
    "infopro",
    "mlm-2",
    "mlm-3",
    "mlaan",
    "mlaan-code",
    "fa",
    "sign-2",
    "dfa",
    "scpl",
    "mim",
    "auglocal",
    "hpff",
    "man",
)


def network(
    case: str, name: str | nn.Module = "resnet14", image_size: int = 16, seed: int = 0, **arguments: Any
) -> LocalNetwork:
    """The network of a case in training mode."""
    method, options, cut = CASES[case]
    if method == "mim":
        name, arguments = transformer("vit", image_size), {"stem_as_module": True, **arguments}
    torch.manual_seed(seed)
    return local_network(
        name, method, options, image_size=image_size, num_classes=CLASSES, cut=cut, **arguments
    ).train()


def batch(net: LocalNetwork, size: int = 8, image_size: int = 16, seed: int = 0) -> Batch:
    """Random images (float64) as the plan of ``net`` wants them: two views, or labels."""
    generator = np.random.default_rng(seed)
    images = torch.from_numpy(generator.standard_normal((size * net.plan.views, 3, image_size, image_size)))
    labels = torch.from_numpy(generator.integers(CLASSES, size=size))
    return Batch(images, labels if net.plan.supervised else None, net.plan.views)


def on(device: str | torch.device, data: Batch, dtype: torch.dtype | None = None) -> Batch:
    """A batch on a device, its images in ``dtype``."""
    labels = None if data.labels is None else data.labels.to(device)
    return data._replace(images=data.images.to(device, dtype), labels=labels)


def taught_by(net: LocalNetwork, data: Batch) -> dict[Head, Batch]:
    """The batch as each head sees it."""
    teacher = net.teacher_pass(data)
    found = [teacher.forward(s) for s in range(len(net.segments))] if teacher is not None else []
    keys = {head: embeddings for each in found for head, embeddings in each.items()}
    return {head: data._replace(teacher=keys.get(head)) for head in net.plan.heads}


def gradients(net: LocalNetwork) -> dict[str, Tensor]:
    """Copies of all gradients by parameter name."""
    return {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}


def relative_error(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||."""
    return float((a - b).norm() / b.norm().clamp_min(1e-300))


def routed(net: LocalNetwork, data: Batch) -> dict[str, Tensor]:
    """Gradients of one routed step on a copy of ``net``."""
    net = copy.deepcopy(net)
    net(data).loss.backward()
    return gradients(net)


def modules_of(name: str, ends: list[tuple[int, int]]) -> NetworkInfo:
    """A CIFAR ResNet cut after the blocks (stage, number) in ``ends``."""
    segments = cut(create(name), [f"layer{stage}.{number}" for stage, number in ends])
    return NetworkInfo.of(segments, 32, CLASSES, (0.5,) * 3, (0.25,) * 3)
