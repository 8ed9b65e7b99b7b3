"""What was published with each self-supervised objective: the projection under it, its scale, its teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from framework.local.averaging import Averaging

PredictorRate = Literal["scheduled", "constant"]
ObjectiveName = Literal["infonce", "barlow", "vicreg", "moco", "mocov3", "byol", "simsiam"]


@dataclass(frozen=True)
class Published:
    """Defaults of ``heads.Projection``.

    Attributes:
        layers: linear layers of the projection.
        hidden: their width; ``None`` is that of the features.
        dim: of the embedding.
        bn: layers of the projection that BatchNorm follows.
        form: which views learn from which, and scale.
        temperature: tau, where there is one.
        pred_hidden: width of the predictor's hidden layer; ``None`` is a quarter of ``dim``.
        teacher: how it follows.
        pred_rate: the predictor's learning rate: as all others, or that of the recipe throughout.
    """

    layers: int
    hidden: int | None
    dim: int
    bn: Literal["none", "hidden", "all"] = "hidden"
    form: Literal["symmetric", "sum", "one_sided"] = "symmetric"
    temperature: float = 0.1
    pred_hidden: int | None = None
    teacher: Averaging | None = None
    pred_rate: PredictorRate = "scheduled"


#: Objectives with a predictor.
PREDICTS: frozenset[ObjectiveName] = frozenset(("mocov3", "byol", "simsiam"))

#: MoCo is its version 2 (Chen et al. 2020).
PUBLISHED: dict[ObjectiveName, Published] = {
    "infonce": Published(2, None, 128),
    "barlow": Published(3, 8192, 8192),
    "vicreg": Published(3, 8192, 8192),
    "moco": Published(2, None, 128, "none", "one_sided", 0.2, None, Averaging(0.999, shuffle=True)),
    "mocov3": Published(2, 4096, 256, "all", "sum", 1.0, 4096, Averaging(0.99, "cosine")),
    "byol": Published(2, 4096, 256, "hidden", "sum", pred_hidden=4096, teacher=Averaging(0.996, "cosine")),
    "simsiam": Published(3, 2048, 2048, "all", pred_rate="constant"),
}
