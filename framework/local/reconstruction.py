"""InfoPro's reconstruction term, and how much it weighs at each depth, as in its code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from framework.local.units import NetworkInfo
from framework.runtime.errors import UserError

if TYPE_CHECKING:
    from framework.local.head import Head
    from framework.network import Shape

Pair = tuple[float, float]
Source = Literal[
    "auglocal", "cifar10", "cifar10_balanced", "stl10", "stl10_balanced", "svhn", "imagenet_balanced", "mlaan"
]

#: source -> blocks of the stages -> modules K -> (lambda1, lambda2) of the first module, of the last but one.
#: ``balanced`` are the splits called InfoPro*; the other rows of ResNet-32 on CIFAR-10 go with the contrast.
LAMBDAS: dict[Source, dict[tuple[int, ...], dict[int, tuple[Pair, Pair]]]] = {
    "auglocal": {
        (5, 5, 5): {16: ((5, 0.05), (0.2, 0.5))},
        (18, 18, 18): {55: ((5, 0), (0.5, 1))},
    },
    "cifar10": {
        (5, 5, 5): {
            2: ((5, 1), (0, 0)),
            4: ((6, 0), (1, 2)),
            8: ((5, 0), (0, 2)),
            16: ((5, 0.05), (0.2, 0.5)),
        },
        (18, 18, 18): {
            2: ((5, 0.5), (0, 0)),
            4: ((1, 0), (0, 1)),
            8: ((5, 0), (0, 1)),
            16: ((5, 0), (0.5, 1)),
        },
    },
    "cifar10_balanced": {(18, 18, 18): {2: ((5, 0.1), (0, 0)), 3: ((5, 0), (5, 0.1)), 4: ((5, 0), (5, 0.1))}},
    "stl10": {
        (18, 18, 18): {
            2: ((10, 1), (0, 0)),
            4: ((20, 0.2), (5, 2)),
            8: ((20, 0.2), (5, 1)),
            16: ((20, 0.5), (10, 0.1)),
        }
    },
    "stl10_balanced": {(18, 18, 18): {2: ((20, 1), (0, 0)), 3: ((20, 0.5), (5, 2)), 4: ((20, 0.5), (10, 1))}},
    "svhn": {
        (18, 18, 18): {
            2: ((1, 0.1), (0, 0)),
            4: ((5, 0), (0.5, 1)),
            8: ((5, 0), (0.5, 2)),
            16: ((5, 0.2), (0.5, 1)),
        }
    },
    "imagenet_balanced": {
        (3, 4, 23, 3): {2: ((5, 0.75), (0, 0))},
        (3, 8, 36, 3): {2: ((5, 1), (0, 0))},
    },
}
#: MLAAN's runs of InfoPro*, at every K
MLAAN: tuple[Pair, Pair] = ((5, 0.5), (0, 0))


@dataclass
class Reconstruction:
    """A decoder beside a head: lambda1 times its loss, lambda2 times the head's.

    Attributes:
        lambdas: where the lambdas come from; ``auglocal`` has them for K=16 and 55, and those of K=16 serve
            for all other networks, ``mlaan`` has the same for all.
        first: (lambda1, lambda2) of the first module, in place of those of ``lambdas``.
        last: the same for the last module but one; between them they are linear in the depth.
        lambda_index: depth in modules, or in stages as MLAAN's code has it.
        decoder: ``cifar`` has one hidden convolution at full resolution, ``imagenet`` three on the way there;
            ``auto`` takes the latter from 128 pixels on.
        patches: 1, or 4 for a decoder of its own on each quarter of the image (HPFF), whose losses add up.
    """

    lambdas: Source = "auglocal"
    first: Pair | None = None
    last: Pair | None = None
    lambda_index: Literal["module", "stage"] = "module"
    decoder: Literal["auto", "cifar", "imagenet"] = "auto"
    patches: Literal[1, 4] = 1

    def beside(
        self, head: Head, network: NetworkInfo, segment: int, shape: Shape | None = None
    ) -> Head | None:
        """Decoder and head together on module ``segment``; ``None`` if both lambdas are 0.

        Args:
            head: the other term.
            network: has the images' shape and normalization, and the number of modules.
            segment: number of the module.
            shape: of the input; ``None`` means the module's output.
        """
        from framework.local.decoder import build_decoder
        from framework.local.head import WeightedHeads

        lambda1, lambda2 = self.weights(network, segment)
        parts: list[tuple[float, Head]] = []
        if lambda1 > 0:
            large = self.decoder == "imagenet" or (self.decoder == "auto" and network.image.height >= 128)
            decoder = build_decoder(network, shape or network.shapes[segment], self.patches, large)
            parts.append((lambda1, decoder))
        if lambda2 > 0:
            parts.append((lambda2, head))
        return WeightedHeads(parts) if parts else None

    def weights(self, network: NetworkInfo, segment: int) -> Pair:
        """lambda1 and lambda2 of a module.

        Raises:
            UserError: ``lambdas`` has none for this network and K.
        """
        first, last = self._ends(network)
        depth, span = segment, len(network) - 2
        if self.lambda_index == "stage":
            depth = max((b.stage for b in network.blocks if b.segment <= segment), default=1)
        fraction = min(1.0, depth / span) if span > 0 else 0.0
        lambda1, lambda2 = (a * (1 - fraction) + b * fraction for a, b in zip(first, last, strict=True))
        return lambda1, lambda2

    def _ends(self, network: NetworkInfo) -> tuple[Pair, Pair]:
        if self.first is not None and self.last is not None:
            return self.first, self.last
        first, last = MLAAN if self.lambdas == "mlaan" else self._listed(network)
        return self.first or first, self.last or last

    def _listed(self, network: NetworkInfo) -> tuple[Pair, Pair]:
        if self.lambdas not in LAMBDAS:  # a recipe's is checked before
            raise UserError(f"lambdas={self.lambdas}: must be one of {', '.join((*LAMBDAS, 'mlaan'))}")
        blocks = network.blocks
        counts = tuple(sum(b.stage == s for b in blocks) for s in sorted({b.stage for b in blocks}))
        rows = LAMBDAS[self.lambdas].get(counts, {})
        modules = len(network) + (len(network) == len(blocks))  # the papers count the stem
        if modules in rows:
            return rows[modules]
        if self.lambdas == "auglocal":
            return LAMBDAS["auglocal"][5, 5, 5][16]
        possible = ", ".join(f"K={k} of {sum(c)} blocks" for c, r in LAMBDAS[self.lambdas].items() for k in r)
        raise UserError(
            f"reconstruction.lambdas={self.lambdas}: has no values for K={modules} of {len(blocks)} blocks, only for "
            f"{possible}; give first and last"
        )
