"""How a network arranges what passes between its blocks, and as maps (N, C, H, W), which heads read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt

from torch import Tensor, nn

ToMap = Callable[[Tensor], Tensor]


class Mapped(nn.Module):
    """A layout as a module."""

    def __init__(self, to_map: ToMap) -> None:
        super().__init__()
        self.to_map = to_map

    def forward(self, x: Tensor) -> Tensor:
        """Any layout -> (N, C, H, W)."""
        return self.to_map(x)


def is_map(x: Tensor) -> Tensor:
    """(N, C, H, W) as it is."""
    return x


def from_channels_last(x: Tensor) -> Tensor:
    """(N, H, W, C) -> (N, C, H, W), a view."""
    return x.permute(0, 3, 1, 2)


@dataclass(frozen=True)
class FromTokens:
    """(N, prefix + side * side, C) -> (N, C, side, side), without the class and register tokens; a view.

    Attributes:
        prefix: number of those.
    """

    prefix: int

    def __call__(self, x: Tensor) -> Tensor:
        side = isqrt(x.shape[1] - self.prefix)
        return x[:, self.prefix :].transpose(1, 2).unflatten(2, (side, side))


def from_unordered_tokens(x: Tensor, reroll: nn.Module, block: int) -> Tensor:
    """(N, side * side, C), as a block leaves them -> (N, C, side, side), with the network's own reordering."""
    return from_channels_last(reroll(x, block))


def from_channels_first_tokens(x: Tensor) -> Tensor:
    """(N, C, side * side) -> (N, C, side, side), a view."""
    side = isqrt(x.shape[2])
    return x.unflatten(2, (side, side))


def from_features(x: Tensor) -> Tensor:
    """(N, C) -> (N, C, 1, 1), a view."""
    return x[:, :, None, None]


def layout(
    small: tuple[int, ...], large: tuple[int, ...] | None, channels: set[int], prefix: int
) -> ToMap | None:
    """How a tensor of this shape becomes a map; ``None`` if that can't be told.

    Args:
        small: shape of a batch's tensor.
        large: the same for larger images, where the network takes them.
        channels: widths that the network says it has.
        prefix: class and register tokens that it says it has.
    """
    if len(small) == 4:
        return _of_four(small, large, channels)
    if len(small) == 3:
        return _of_three(small, large, channels, prefix)
    return from_features if len(small) == 2 else None


def _of_four(small: tuple[int, ...], large: tuple[int, ...] | None, channels: set[int]) -> ToMap | None:
    _, a, b, c = small
    grows = [x != y for x, y in zip(small[1:], large[1:], strict=True)] if large else None
    first = b == c and grows in (None, [False, True, True])
    last = a == b and grows in (None, [True, True, False])
    if first and last:  # a cube, of a network that takes images of one size only
        return from_channels_last if c in channels and a not in channels else is_map
    if grows == [False, False, False] and b == c:  # maps of one size whatever the images
        return is_map
    return is_map if first else from_channels_last if last else None


def _of_three(
    small: tuple[int, ...], large: tuple[int, ...] | None, channels: set[int], prefix: int
) -> ToMap | None:
    _, a, b = small
    grows = [x != y for x, y in zip(small[1:], large[1:], strict=True)] if large else None
    if grows in (None, [True, False]):
        for count in dict.fromkeys((prefix, 0, 1, 2)):
            squares = [a] if large is None else [a, large[1]]
            square = all(
                length > count and isqrt(length - count) ** 2 == length - count for length in squares
            )
            if square and (large is not None or b in channels or a not in channels):
                return FromTokens(count)
    if grows in (None, [False, True]) and isqrt(b) ** 2 == b and (large is not None or a in channels):
        return from_channels_first_tokens
    return None
