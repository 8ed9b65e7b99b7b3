"""Masked image modeling block by block, as BIM (Luo, Ren and Zhang, arXiv 2311.17218) has it, with MAE's losses.

Windows: the stem and the first group of blocks, then ``[i..i]``. Heads: a decoder each, which reconstructs the pixels
of the patches that are masked (MAE, He et al. 2022); only the visible patches pass through the segments. With
``network.cut=2``, stem and all blocks, it is MAE itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from framework.config.schema import Fault, Fraction, PositiveInt
from framework.local import LocalUnit, MethodOptions, NetworkInfo, Plan
from framework.local.masking import Masking
from framework.runtime.errors import UserError

if TYPE_CHECKING:
    from framework.local.masked_decoder import MaskedDecoder


@dataclass
class Options(MethodOptions):
    """Masks, decoder and target as MAE's for ViT-B and ViT-L.

    Attributes:
        masked: fraction of an image's patches.
        decoder_depth: transformer blocks of a decoder.
        decoder_dim: width of its tokens.
        decoder_heads: of its attention.
        normalize: compare pixels after each patch's own mean and deviation.
    """

    masked: Fraction = 0.75
    decoder_depth: PositiveInt = 8
    decoder_dim: PositiveInt = 512
    decoder_heads: PositiveInt = 16
    normalize: bool = True

    def check(self) -> None:
        if self.decoder_dim % self.decoder_heads or self.decoder_dim % 4:
            wanted = f"must be a multiple of 4 and of method.decoder_heads={self.decoder_heads}"
            raise Fault("method.decoder_dim", self.decoder_dim, wanted)


def plan(network: NetworkInfo, options: Options) -> Plan:
    """One unit a group of blocks; that of the first trains the stem, too.

    Raises:
        UserError: the network is no vision transformer, or its stem is no segment; no patch is masked, or all are.
    """
    masking = _masking(network, options)
    units = [
        LocalUnit(network.names[i], i if i > 1 else 0, i, _decoder(network, i, masking, options))
        for i in range(1, len(network))
    ]
    return Plan(tuple(units), len(network), masking=masking)


def _masking(network: NetworkInfo, options: Options) -> Masking:
    from framework.network.tokens import takes_any_tokens

    stem, *others = network.segments
    if stem.prefix is None or (others and not takes_any_tokens(others, network.outputs[0])):
        raise UserError(
            f"method.name=mim: needs a network whose blocks take any of an image's tokens, such as timm's vit_*; "
            f"{type(stem.backbone).__name__} has none"
        )
    if stem.blocks or not others:
        raise UserError(
            "network.stem_as_module=false: must be true with method.name=mim, which masks behind the stem"
        )
    masking = Masking(options.masked, network.outputs[0][0] - stem.prefix, stem.prefix)
    if not 0 < masking.visible < masking.patches:
        raise UserError(
            f"method.masked={options.masked}: leaves {masking.visible} of {masking.patches} patches visible; some must "
            "be, and not all"
        )
    return masking


def _decoder(network: NetworkInfo, segment: int, masking: Masking, options: Options) -> MaskedDecoder:
    from framework.local.masked_decoder import MaskedDecoder

    return MaskedDecoder(
        masking,
        channels=network.outputs[segment][1],
        patch=network.image.height // network.shapes[0].height,
        dim=options.decoder_dim,
        depth=options.decoder_depth,
        heads=options.decoder_heads,
        normalize=options.normalize,
        norm=segment < len(network) - 1,
    )
