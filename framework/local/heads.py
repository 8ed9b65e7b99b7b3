"""Heads as recipes describe them: options with a method ``build`` that makes the head on a segment.

``build(network, segment)`` is for the segment's output; a third argument says the shape where something else stands
between the segment and the head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from framework.config.schema import NonNegativeInt, Positive, PositiveInt, Probability
from framework.local.averaging import Averaging
from framework.local.published import PREDICTS, PUBLISHED, ObjectiveName, PredictorRate, Published
from framework.local.units import NetworkInfo
from framework.runtime.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from framework.local.head import TrunkHead
    from framework.local.objectives import Objective
    from framework.network import Shape
    from framework.network.pooling import TokenPooling

EMBEDDING = 128
Pool = Literal["auto", "token", "avg", "both"]
Kind = Literal["linear", "mlp_sr", "mlp_sr_auglocal", "mlp", "cnn", "0c2f", "1c2f", "2c1f", "3c4f", "4c1f"]


@dataclass
class Classifier:
    """Auxiliary classifier of a supervised unit.

    Attributes:
        kind: ``linear`` pooling and one linear layer; ``mlp_sr`` DGL's head as published,
            ``mlp_sr_auglocal`` the version that AugLocal measured, ``mlp`` and ``cnn`` DGL's others;
            ``0c2f``, ``1c2f`` and (for ImageNet) ``4c1f`` InfoPro's, named by their convolutions and linear
            layers; ``2c1f`` and ``3c4f`` MLAAN's on ResNet-34 and for DGL*.
        task: cross entropy of logits, or the supervised contrast of 128-d embeddings (InfoPro).
        pool: what ``linear`` and ``0c2f`` see; see ``Projection``.
    """

    kind: Kind = "linear"
    task: Literal["cross_entropy", "contrast"] = "cross_entropy"
    pool: Pool = "auto"

    def build(self, network: NetworkInfo, segment: int, shape: Shape | None = None) -> TrunkHead:
        """The head on a segment.

        Args:
            network: has the number of classes.
            segment: number of the segment.
            shape: of the head's input; ``None`` means the segment's output.

        Raises:
            UserError: there is no such kind, or no class token, or this kind sees none.
        """
        from torch import nn

        from framework.local.head import PooledHead, TrunkHead
        from framework.local.objectives import CrossEntropy, SupCon
        from framework.local.trunks import TRUNKS
        from framework.network import Shape

        if self.kind not in TRUNKS:  # a recipe's was checked before
            raise UserError(f"Classifier({self.kind!r}): its kind must be one of {', '.join(TRUNKS)}")
        contrast, cross_entropy = self.task == "contrast", CrossEntropy(network.label_smoothing)
        objective, out = (SupCon(), EMBEDDING) if contrast else (cross_entropy, network.num_classes)
        if self.pool in ("token", "both"):
            if self.kind not in ("linear", "0c2f"):
                raise UserError(
                    f"method.head.pool={self.pool}: kind={self.kind} sees the map; set kind=linear"
                )
            tokens, width = _tokens(self.pool, network, segment, shape)
            trunk = nn.Sequential(tokens, TRUNKS[self.kind](Shape(width, 1, 1), out))
            return TrunkHead(trunk, objective, self.kind, native=True)
        own = self.kind == "linear" and self.pool == "auto"
        if own and shape is None and (pooled := network.pooling(segment)) is not None:
            channels, names = pooled
            return PooledHead(
                network.segments[segment], [nn.Linear(channels, out)], objective, names, self.kind
            )
        return TrunkHead(TRUNKS[self.kind](shape or network.shapes[segment], out), objective, self.kind)


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
        dec_trunk: own copies of the next segment ("next_stage") or of all that follow ("full_network") before
            the pooling; on the last segment, which none follows, there are none.
        dec_on_top: whether the last segment's head has the blocks too; LoCo doesn't say.
        expand: channels of a 1x1 convolution, with BatchNorm and ReLU, before the pooling.
        pool: what of tokens the MLP sees: the class token ("token"), the mean of the patches ("avg"), or both; "auto":
            what the network itself pools on the last segment (``network.args.global_pool``), on others the mean.
        layers: linear layers of the MLP; ``None`` takes what is published with the objective (``published.py``), as
            it does wherever it may stand.
        proj_hidden: width of the hidden layers; for InfoNCE and MoCo the channels that enter the pooling.
        dim: size of the embedding.
        proj_bn: BatchNorm after none, the hidden, or all layers (SimCLR's paper: none, its code: all); all_plain: all,
            the last without weights (the code of SimSiam and MoCo v3).
        objective: the loss of the embeddings of the two views.
        temperature: tau of InfoNCE, MoCo and MoCo v3.
        loss_form: which views learn from which, and scale.
        pred_hidden: width of the predictor's hidden layer (MoCo v3, BYOL, SimSiam).
        pred_bn: the predictor's BatchNorm (MoCo v3's has it after all layers).
        pred_rate: the predictor's learning rate: as all others, or ``optim.lr`` throughout (SimSiam, section 4.2).
        queue: keys of earlier steps (MoCo).
        momentum: of the teacher (MoCo, MoCo v3, BYOL).
        momentum_schedule: constant, or up to 1 by a cosine over the training.
        shuffle_bn: the teacher sees the images of all ranks in another order than the network (MoCo).
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
    expand: PositiveInt | None = None
    pool: Pool = "auto"
    layers: PositiveInt | None = None
    proj_hidden: PositiveInt | None = None
    dim: PositiveInt | None = None
    proj_bn: Literal["none", "hidden", "all", "all_plain"] | None = None
    objective: ObjectiveName = "infonce"
    temperature: Positive | None = None
    loss_form: Literal["symmetric", "sum", "one_sided"] | None = None
    pred_hidden: PositiveInt | None = None
    pred_bn: Literal["hidden", "all", "all_plain"] = "hidden"
    pred_rate: PredictorRate | None = None
    queue: PositiveInt = 65536
    momentum: Probability | None = None
    momentum_schedule: Literal["constant", "cosine"] | None = None
    shuffle_bn: bool | None = None
    gather_grad: bool = True
    redundancy: float = 0.0051
    vicreg: tuple[float, float, float] = (25.0, 25.0, 1.0)

    def build(self, network: NetworkInfo, segment: int, shape: Shape | None = None) -> TrunkHead:
        """The head on a segment.

        Args:
            network: has the segments that the head may copy.
            segment: number of the segment.
            shape: of the head's input; ``None`` means the segment's output.

        Raises:
            UserError: a decoder block that these channels can't have; no class token, or convolutions before it.
        """
        from torch import nn

        from framework.local.head import PooledHead, TrunkHead
        from framework.local.trunks import mlp
        from framework.network.layers import GlobalAveragePool
        from framework.network.layouts import Mapped
        from framework.network.pooling import TokenPooling

        blocks, channels = self._blocks(network, segment, shape or network.shapes[segment])
        own = self.pool == "auto" and shape is None and not blocks
        pooled = network.pooling(segment) if own else None
        channels = pooled[0] if pooled else channels
        pooling: nn.Module = GlobalAveragePool()
        if self.pool in ("token", "both"):
            if blocks:
                raise UserError(
                    f"method.head.pool={self.pool}: a class token passes through no convolution; set "
                    "method.head.conv_blocks=0 (and no dec_trunk or expand)"
                )
            pooling, channels = _tokens(self.pool, network, segment, shape)
        published = PUBLISHED[self.objective]
        hidden = self.proj_hidden or published.hidden or channels
        dim = self.dim or published.dim
        widths = [channels, *[hidden] * ((self.layers or published.layers) - 1), dim]
        layers = mlp(widths, self.proj_bn or published.bn)
        predictor = self._predictor(published, dim) if self.objective in PREDICTS else None
        objective = self._objective(published, dim, predictor)
        constant = (self.pred_rate or published.pred_rate) == "constant"
        unscheduled = [predictor] if predictor is not None and constant else []
        if self.objective == "simsiam":
            predictor = None  # it is the objective's
        if pooled:
            return PooledHead(
                network.segments[segment],
                layers,
                objective,
                pooled[1],
                predictor=predictor,
                unscheduled=unscheduled,
            )
        trunk = nn.Sequential(*blocks, pooling, *layers)
        native = any(isinstance(layer, Mapped | TokenPooling) for layer in trunk)
        return TrunkHead(trunk, objective, native=native, predictor=predictor, unscheduled=unscheduled)

    @property
    def teacher(self) -> Averaging | None:
        """The one that the objective needs."""
        published = PUBLISHED[self.objective].teacher
        if published is None:
            return None
        return Averaging(
            published.momentum if self.momentum is None else self.momentum,
            self.momentum_schedule or published.schedule,
            (self.loss_form or PUBLISHED[self.objective].form) == "one_sided",
            published.shuffle if self.shuffle_bn is None else self.shuffle_bn,
        )

    def _blocks(self, network: NetworkInfo, segment: int, shape: Shape) -> tuple[list[nn.Module], int]:
        """What comes before the pooling, and the channels that enter it."""
        from framework.local.copies import own_copy
        from framework.local.trunks import conv_bn_relu, residual_block
        from framework.network.layouts import Mapped, is_map

        reach = {"none": 0, "next_stage": 1, "full_network": len(network)}[self.dec_trunk]
        copied = range(segment + 1, min(segment + 1 + reach, len(network)))
        blocks = [module for s in copied for module in own_copy(network.segments[s])]
        if copied and (to_map := network.segments[copied[-1]].to_map) is not is_map:
            blocks.append(Mapped(to_map))
        channels = network.shapes[copied[-1]].channels if copied else shape.channels
        top = segment == len(network) - 1
        for i in range(self.conv_blocks if self.dec_on_top or not top else 0):
            stride = self.dec_strides[i] if i < len(self.dec_strides) else 1
            out = 2 * channels if self.dec_block == "next_stage" and i == 0 else channels
            bottleneck = self.dec_block != "basic"
            blocks.append(residual_block(channels, out, stride, bottleneck, self.dec_width, self.dec_groups))
            channels = out
        if self.expand is not None:
            blocks += conv_bn_relu(channels, self.expand, 1)
            channels = self.expand
        return blocks, channels

    def _objective(self, published: Published, dim: int, predictor: nn.Module | None) -> Objective:
        from framework.local.objectives import BarlowTwins, InfoNCE, VICReg
        from framework.local.teacher_objectives import BYOL, MoCo, MoCoV3, SimSiam

        form, tau = self.loss_form or published.form, self.temperature or published.temperature
        if self.objective == "barlow":
            return BarlowTwins(self.redundancy)
        if self.objective == "vicreg":
            return VICReg(*self.vicreg)
        if self.objective == "infonce":
            return InfoNCE(tau, form, self.gather_grad)
        if self.objective == "moco":
            return MoCo(dim, self.queue, tau, form)
        if self.objective == "mocov3":
            return MoCoV3(tau, form)
        if self.objective == "byol":
            return BYOL(form)
        assert predictor is not None
        return SimSiam(predictor, form)

    def _predictor(self, published: Published, dim: int) -> nn.Module:
        from torch import nn

        from framework.local.trunks import mlp

        hidden = self.pred_hidden or published.pred_hidden or -(-dim // 4)
        return nn.Sequential(*mlp((dim, hidden, dim), self.pred_bn))


def _tokens(pool: Pool, network: NetworkInfo, segment: int, shape: Shape | None) -> tuple[TokenPooling, int]:
    """Pooling with the class token, and the width of what it gives."""
    from framework.network.pooling import TokenPooling

    found, channels = network.segments[segment], network.shapes[segment].channels
    if shape is not None or not found.has_class_token:
        where = "behind copies of later blocks" if shape is not None else f"in segment {found.name}"
        raise UserError(f"method.head.pool={pool}: there is no class token {where}; must be auto or avg")
    return TokenPooling(found.to_map, mean=pool == "both"), channels * (2 if pool == "both" else 1)
