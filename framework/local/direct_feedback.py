"""The heads of direct feedback alignment."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from framework.data.batch import Batch
from framework.local.head import Head, TrunkHead, WrappingHead
from framework.local.needs import Need
from framework.network import Shape


class ErrorHead(WrappingHead):
    """A separable head that keeps the gradient of its loss with respect to what it embeds.

    Attributes:
        error: (N, D) of the latest batch.
    """

    separable = False

    def __init__(self, head: TrunkHead) -> None:
        super().__init__("front", nn.Identity(), head)
        self.native = head.native
        self.separable = False  # whoever scores embeddings leaves no error here
        self.error: Tensor | None = None

    def loss(self, x: Tensor, batch: Batch) -> Tensor:
        logits = self.embed(x)
        with torch.enable_grad():
            constant = logits.detach().requires_grad_()
            (self.error,) = torch.autograd.grad(self.score(constant, batch), constant)
        return self.score(logits, batch)


class DirectFeedback(Head):
    """Gives its input the gradient B e, with e of the head on top, which must have run on the same batch before.

    The value of the loss, the sum of x * (B e), is no measure of anything.

    Args:
        shape: of the input.
        dim: of the error.
        segment: that the head is on, from which B is drawn; B is in no checkpoint.
        top: where the error comes from.
    """

    needs = frozenset({Need.LABELS})
    soft_labels = True  # they are in the error

    def __init__(self, shape: Shape, dim: int, segment: int, top: ErrorHead) -> None:
        super().__init__()
        self._top = (top,)  # in a tuple, so that it is no child of this module
        size = shape.channels * shape.height * shape.width
        normal = np.random.default_rng(segment).standard_normal((dim, size))
        self.matrix: Tensor
        self.register_buffer("matrix", torch.from_numpy(normal / size**0.5).float(), persistent=False)

    def loss(self, x: Tensor, batch: Batch) -> Tensor:
        error = self._top[0].error
        assert error is not None
        return (x.flatten(1) * (error @ self.matrix.to(error.dtype))).sum()
