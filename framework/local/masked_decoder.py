"""MAE's decoder as a head: it reconstructs the pixels of patches that the segments have not seen."""

from __future__ import annotations

from math import isqrt

import torch
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from framework.data.batch import Batch
from framework.local.head import Head
from framework.local.masking import Masking
from framework.local.needs import Need


class MaskedDecoder(Head):
    """Transformer blocks over the tokens that a segment gives and a learned token in place of each hidden patch.

    The loss is the mean squared error over the pixels of the hidden patches (He et al. 2022); where nothing is hidden,
    as in evaluation, over all.

    Args:
        masking: patches and prefix of the network.
        channels: of its tokens.
        patch: side of a patch in pixels.
        dim: of the decoder's tokens, a multiple of 4 and of ``heads``.
        depth: of its blocks.
        heads: of their attention.
        normalize: whether a patch's pixels are compared after its mean is subtracted and its deviation divided by.
        norm: whether the tokens need a norm first; the network's last have had one.
    """

    needs = frozenset({Need.IMAGES})
    native = True

    def __init__(
        self,
        masking: Masking,
        channels: int,
        patch: int,
        dim: int,
        depth: int,
        heads: int,
        normalize: bool,
        norm: bool,
    ) -> None:
        super().__init__()
        self._patch, self._prefix, self._normalize = patch, masking.prefix, normalize
        self.norm = nn.LayerNorm(channels, eps=1e-6) if norm else nn.Identity()
        self.embed_tokens = nn.Linear(channels, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.blocks = nn.Sequential(
            *(Block(dim, heads, qkv_bias=True, norm_layer=nn.LayerNorm) for _ in range(depth))
        )
        self.last_norm = nn.LayerNorm(dim, eps=1e-6)
        self.pixels = nn.Linear(dim, 3 * patch * patch)
        side = isqrt(masking.patches)
        self.positions: Tensor
        self.register_buffer("positions", build_sincos2d_pos_embed([side, side], dim), persistent=False)
        nn.init.normal_(self.mask_token, std=0.02)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def no_weight_decay(self) -> set[str]:
        """timm's convention: the token is no weight."""
        return {"mask_token"}

    def loss(self, x: Tensor, batch: Batch) -> Tensor:
        target = self.target(batch.images)
        error = (self.reconstruct(x, batch.visible).to(target.dtype) - target).square().mean(2)
        if batch.visible is None:
            return error.mean()
        hidden = torch.ones_like(error).scatter(1, batch.visible, 0.0)
        return (error * hidden).sum() / hidden.sum()

    def reconstruct(self, x: Tensor, visible: Tensor | None) -> Tensor:
        """Tokens (N, prefix + K, C) and the numbers of their patches (N, K) -> pixels of all patches (N, L, 3 p p)."""
        x = self.embed_tokens(self.norm(x))
        front, patches = x[:, : self._prefix], x[:, self._prefix :]
        if visible is not None:
            everywhere = self.mask_token.to(x.dtype).expand(len(x), len(self.positions), -1)
            patches = everywhere.scatter(1, visible.unsqueeze(2).expand_as(patches), patches)
        x = torch.cat([front, patches + self.positions], 1)
        return self.pixels(self.last_norm(self.blocks(x)))[:, self._prefix :]

    def target(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) as patches (N, L, 3 p p), row by row."""
        patches = images.unfold(2, self._patch, self._patch).unfold(3, self._patch, self._patch)
        patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
        if not self._normalize:
            return patches
        variance, mean = torch.var_mean(patches, 2, keepdim=True)
        return (patches - mean) / (variance + 1e-6).sqrt()
