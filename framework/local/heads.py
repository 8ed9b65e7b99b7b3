"""Heads: the auxiliary networks on top of windows.

A head is a trunk and an objective, exchangeable independently of each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from framework.config.schema import NonNegativeInt, Positive, PositiveInt
from framework.data.batch import Batch
from framework.local.blocks import own_copy
from framework.local.objectives import BarlowTwins, CrossEntropy, InfoNCE, SupCon, VICReg
from framework.local.trunks import TRUNKS, Trunk, mlp, residual_block
from framework.local.units import Task
from framework.network import Shape
from framework.network.layers import GlobalAveragePool, initialize
from framework.runtime.errors import UserError

EMBEDDING = 128


class Head(nn.Module):
    """``objective(trunk(x), batch)``.

    Args:
        trunk: maps a segment's output (N, C, H, W) to logits or embeddings (N, D).
        objective: maps those and the batch to a scalar loss.
    """

    def __init__(self, trunk: nn.Module, objective: nn.Module) -> None:
        super().__init__()
        self.trunk, self.objective = trunk, objective
        initialize(self.trunk)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        """Scalar loss on the segment output ``x`` (N, C, H, W)."""
        return self.objective(self.trunk(x), batch)

    @property
    def contrasts(self) -> bool:
        """Whether the loss compares the images of a batch, so that it depends on which are in it."""
        return getattr(self.objective, "contrasts", False)

    def embed(self, x: Tensor) -> Tensor:
        """The trunk's output (N, D), for ``score``."""
        return self.trunk(x)

    def score(self, embeddings: Tensor, batch: Batch) -> Tensor:
        """Scalar loss of embeddings (N, D), which may be those of several micro-batches, view-major."""
        return self.objective(embeddings, batch)

    def predict(self, x: Tensor) -> Tensor:
        """The trunk's output (N, D): logits of a classifier, the embedding of a contrastive head."""
        return self.trunk(x)


class WeightedHeads(nn.Module):
    """Several heads on one input; the loss is the weighted sum of theirs."""

    def __init__(self, parts: Sequence[tuple[float, nn.Module]]) -> None:
        super().__init__()
        self.weights = [weight for weight, _ in parts]
        self.parts = nn.ModuleList(part for _, part in parts)

    @property
    def contrasts(self) -> bool:
        """Whether a part does."""
        return any(getattr(part, "contrasts", False) for part in self.parts)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        """Scalar loss on the segment output ``x`` (N, C, H, W)."""
        losses = [w * part(x, batch) for w, part in zip(self.weights, self.parts, strict=True)]
        return sum(losses[1:], losses[0])


@dataclass
class Classifier:
    """Auxiliary classifier of a supervised unit.

    Attributes:
        kind: ``linear`` pooling and one linear layer; ``mlp_sr`` DGL's head as published,
            ``mlp_sr_auglocal`` the version that AugLocal measured, ``mlp`` and ``cnn`` DGL's others;
            ``0c2f``, ``1c2f`` and (for ImageNet) ``4c1f`` InfoPro's, named by their convolutions and linear
            layers; ``2c1f`` and ``3c4f`` MLAAN's on ResNet-34 and for DGL*.
        task: cross entropy of logits, or the supervised contrast of 128-d embeddings (InfoPro).
    """

    kind: Trunk = "linear"
    task: Literal["cross_entropy", "contrast"] = "cross_entropy"

    def build(self, shape: Shape, num_classes: int) -> Head:
        """A head for segment outputs of ``shape``.

        Raises:
            UserError: there is no such kind (a recipe's is checked before).
        """
        if self.kind not in TRUNKS:
            raise UserError(f"kind={self.kind}: must be one of {', '.join(TRUNKS)}")
        if self.task == "contrast":
            return Head(TRUNKS[self.kind](shape, EMBEDDING), SupCon())
        return Head(TRUNKS[self.kind](shape, num_classes), CrossEntropy())


@dataclass
class Projection:
    """Decoder of a self-supervised unit: residual blocks, pooling, MLP, objective (LoCo, section 5.4).

    LoCo leaves kind, channels and stride of its block open; the defaults give its memory saving (section 5.6).

    Attributes:
        conv_blocks: residual convolution blocks before the pooling.
        dec_block: their kind: a bottleneck or a basic block that keeps the channels, or the bottleneck that
            would open the next stage, with twice the channels.
        dec_strides: their strides; blocks beyond the list have 1.
        dec_width: channels of a bottleneck's 3x3 convolution; ``None`` takes a quarter.
        dec_groups: groups of that convolution.
        dec_trunk: own copies of the next segment ("1 stage") or of all that follow ("full network") before
            the pooling; on the last segment, which none follows, there are none.
        dec_on_top: blocks on the last segment too; LoCo doesn't say.
        layers: linear layers of the MLP; ``None`` takes 2, for Barlow Twins and VICReg 3.
        proj_hidden: width of the hidden layers; ``None`` takes the channels that enter the pooling, or 8192.
        dim: size of the embedding; ``None`` takes 128, or 8192.
        proj_bn: BatchNorm after none, the hidden, or all layers (SimCLR's paper: none, its code: all).
        objective: what scores the embeddings of the two views.
        temperature: tau of InfoNCE.
        loss_form: of InfoNCE: anchors and scale.
        gather_grad: whether the gradient of InfoNCE reaches other ranks' embeddings.
        redundancy: lambda of Barlow Twins.
        vicreg: weights of VICReg's invariance, variance and covariance.
    """

    conv_blocks: NonNegativeInt = 0
    dec_block: Literal["bottleneck", "basic", "next_stage"] = "bottleneck"
    dec_strides: tuple[Literal[1, 2], ...] = (2,)
    dec_width: PositiveInt | None = None
    dec_groups: PositiveInt = 1
    dec_trunk: Literal["none", "next_stage", "full_network"] = "none"
    dec_on_top: bool = True
    layers: PositiveInt | None = None
    proj_hidden: PositiveInt | None = None
    dim: PositiveInt | None = None
    proj_bn: Literal["none", "hidden", "all"] = "hidden"
    objective: Literal["infonce", "barlow", "vicreg"] = "infonce"
    temperature: Positive = 0.1
    loss_form: Literal["symmetric", "sum", "one_sided"] = "symmetric"
    gather_grad: bool = True
    redundancy: float = 0.0051
    vicreg: tuple[float, float, float] = (25.0, 25.0, 1.0)

    def build(self, task: Task, segment: int) -> Head:
        """A head on the end of a segment.

        Raises:
            UserError: a decoder block that these channels can't have.
        """
        blocks, channels = self._blocks(task, segment)
        published = (2, channels, 128) if self.objective == "infonce" else (3, 8192, 8192)
        layers, hidden, dim = (
            own or default
            for own, default in zip((self.layers, self.proj_hidden, self.dim), published, strict=True)
        )
        widths = [channels, *[hidden] * (layers - 1), dim]
        return Head(
            nn.Sequential(*blocks, GlobalAveragePool(), *mlp(widths, self.proj_bn)), self._objective()
        )

    def _blocks(self, task: Task, segment: int) -> tuple[list[nn.Module], int]:
        """What comes before the pooling, and the channels that enter it."""
        reach = {"none": 0, "next_stage": 1, "full_network": len(task)}[self.dec_trunk]
        copied = range(segment + 1, min(segment + 1 + reach, len(task)))
        blocks = [module for s in copied for module in own_copy(task.segments[s])]
        channels = task.shapes[copied[-1] if copied else segment].channels
        top = segment == len(task) - 1
        for i in range(self.conv_blocks if self.dec_on_top or not top else 0):
            stride = self.dec_strides[i] if i < len(self.dec_strides) else 1
            out = 2 * channels if self.dec_block == "next_stage" and i == 0 else channels
            bottleneck = self.dec_block != "basic"
            blocks.append(residual_block(channels, out, stride, bottleneck, self.dec_width, self.dec_groups))
            channels = out
        return blocks, channels

    def _objective(self) -> nn.Module:
        if self.objective == "barlow":
            return BarlowTwins(self.redundancy)
        if self.objective == "vicreg":
            return VICReg(*self.vicreg)
        return InfoNCE(self.temperature, self.loss_form, self.gather_grad)
