"""What a head is: the contract between local units and whatever executes them.

Everything that a head needs or offers stands in ``Head``. Nobody asks a head for anything else, and nobody asks what
kind of head it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from framework.data.batch import Batch
from framework.local.needs import Need
from framework.local.objectives import Objective
from framework.network import Segment
from framework.network.layers import initialize
from framework.network.layouts import ToMap, is_map
from framework.network.pooling import NetworkPooling
from framework.runtime.errors import UserError


class Head(nn.Module):
    """An auxiliary network and its objective, on the output of a segment.

    A head of your own sets what differs from the defaults below, and implements ``loss``.

    Attributes:
        needs: what the head uses besides its input. With ``Need.LABELS`` the method is a supervised one.
        contrasts: whether the loss compares the images of a batch with each other, so that it depends on which of
            them are in the batch.
        fewest_images: that the loss needs in a batch of all ranks together, to have something to learn from.
        separable: whether ``loss(x, batch)`` equals ``score(embed(x), batch)``. A loss that contrasts over several
            micro-batches (``pipeline.contrast=batch``) must be.
        classifies: whether ``predict`` gives logits of the classes.
        soft_labels: whether the loss also takes labels (B, classes), which mixed images have.
        reads: segments whose weights the head looks at, in one of the last three methods below.
        reads_after: of heads with ``reads``: whether ``after_step`` looks at weights. Where it does not, no step begins
            with waiting for them.
        penalizes: whether ``penalty`` gives one.
        kind: name of its trunk, if that has one, for tables of plans.
        native: whether it gets the segment's output in the network's own layout (tokens with a class token, for
            instance) and not as a map (V*B, C, H, W). Of heads that run copies of the network's blocks.
        borrows: names of the network's parameters that the head trains besides its own and those below it.
        may_lag: whether ``before_step`` may be called later than the optimizer's step, as long as it is called with
            the same weights and before the head's next forward. Pipeline stages then need not wait for each other.
        elementwise: of heads with ``reads``: whether the last three methods below treat every element of a weight on
            its own, so that they may see slices of all weights in place of the whole (a penalty is a sum over elements
            then). An engine that shards weights asks for it.
    """

    needs: frozenset[Need] = frozenset()
    contrasts: bool = False
    fewest_images: int = 1
    separable: bool = False
    classifies: bool = False
    soft_labels: bool = False
    reads: tuple[int, ...] = ()
    reads_after: bool = True
    penalizes: bool = False
    kind: str = ""
    native: bool = False
    borrows: tuple[str, ...] = ()
    may_lag: bool = True
    elementwise: bool = False

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        """The loss.

        Raises:
            UserError: ``loss`` gives something else than a scalar.
        """
        loss = self.loss(x, batch)
        if not isinstance(loss, Tensor) or loss.ndim or not loss.is_floating_point():
            found = f"{tuple(loss.shape)} {loss.dtype}" if isinstance(loss, Tensor) else type(loss).__name__
            raise UserError(
                f"{type(self).__name__}.loss gives {found}: must give a scalar, floating-point tensor"
            )
        return loss

    def seen(self, segment: Segment, x: Tensor) -> Tensor:
        """What the head gets of a segment's output ``x``."""
        return x if self.native else segment.to_map(x)

    def loss(self, x: Tensor, batch: Batch) -> Tensor:
        """Scalar loss of a segment's output as a map ``x`` (V*B, C, H, W)."""
        raise NotImplementedError

    def embed(self, x: Tensor) -> Tensor:
        """What the loss is a function of: (V*B, C, H, W) -> (V*B, D). Of separable heads."""
        raise NotImplementedError

    def score(self, embeddings: Tensor, batch: Batch) -> Tensor:
        """Scalar loss of embeddings (V*B, D), which may come from several micro-batches. Of separable heads."""
        raise NotImplementedError

    def embedder(self) -> nn.Module:
        """What maps (V*B, C, H, W) to (V*B, D), of which a teacher has the average. Of heads that need a teacher."""
        raise NotImplementedError

    def constant_rate(self) -> Iterator[nn.Parameter]:
        """Its parameters whose learning rate is ``optim.lr`` throughout, without warm-up and decay."""
        return iter(())

    def predict(self, x: Tensor) -> Tensor:
        """Logits: (B, C, H, W) -> (B, classes). Of heads that classify."""
        raise NotImplementedError

    def read_parameters(self, segments: Sequence[Segment]) -> list[nn.Parameter]:
        """The weights that the head looks at; fewer than all of ``reads`` make a pipeline send less."""
        return [parameter for s in self.reads for parameter in segments[s].parameters()]

    def penalty(self, segments: Sequence[Segment]) -> Tensor | None:
        """A scalar function of weights that is added to the loss as it is; all of them get its gradient.

        Weights are whole here and in the two methods below, unless the head is ``elementwise``.
        """
        return None

    def will_lag(self) -> None:
        """Told before training if ``before_step`` will be called late; see ``may_lag``."""

    def before_step(self, segments: Sequence[Segment], taken: Tensor | float) -> None:
        """Called once an optimizer step, after the last micro-batch's gradients, with the weights before the step.

        Args:
            segments: all of the network's.
            taken: 1, or 0 where the step is skipped (float16, ``faults.nonfinite=skip``); there it is a tensor, which
                must not be read by the host.
        """

    def after_step(self, segments: Sequence[Segment], taken: Tensor | float) -> None:
        """The same with the weights after the step: called before the first micro-batch of the next step."""


class TrunkHead(Head):
    """``objective(trunk(x), batch)``; trunk and objective can be exchanged independently of each other.

    Args:
        trunk: maps a segment's output (N, C, H, W) to logits or embeddings (N, D); its convolutions are initialized
            here.
        objective: maps those and the batch to a scalar loss.
        kind: of trunk, for tables of plans.
        native: whether the trunk works in the network's own layout.
        predictor: maps embeddings (N, D) to what the objective sees in their place; a teacher has none.
        unscheduled: parts of the head whose learning rate is constant.
    """

    separable = True

    def __init__(
        self,
        trunk: nn.Module,
        objective: Objective,
        kind: str = "",
        native: bool = False,
        predictor: nn.Module | None = None,
        unscheduled: Sequence[nn.Module] = (),
    ) -> None:
        super().__init__()
        self.trunk, self.objective, self.predictor = trunk, objective, predictor
        self._unscheduled = tuple(unscheduled)
        self.kind, self.native = kind, native
        self.needs, self.contrasts = objective.needs, objective.contrasts
        self.fewest_images, self.classifies = objective.fewest_images, objective.classifies
        self.soft_labels = objective.soft_labels
        initialize(self.trunk)

    def loss(self, x: Tensor, batch: Batch) -> Tensor:
        return self.objective(self.embed(x), batch)

    def embed(self, x: Tensor) -> Tensor:
        return self.trunk(x) if self.predictor is None else self.predictor(self.trunk(x))

    def score(self, embeddings: Tensor, batch: Batch) -> Tensor:
        return self.objective(embeddings, batch)

    def embedder(self) -> nn.Module:
        return self.trunk

    def constant_rate(self) -> Iterator[nn.Parameter]:
        return (parameter for part in self._unscheduled for parameter in part.parameters())

    def predict(self, x: Tensor) -> Tensor:
        return self.trunk(x)

    def before_step(self, segments: Sequence[Segment], taken: Tensor | float) -> None:
        self.objective.end_step(taken)

    def after_step(self, segments: Sequence[Segment], taken: Tensor | float) -> None:
        self.objective.start_step()


class PooledHead(TrunkHead):
    """A trunk that begins with the network's own pooling, whose parameters it trains; they stay the network's.

    Args:
        segment: the network's last.
        layers: what follows the pooling.
        objective: as in ``TrunkHead``.
        pools_with: names of the network's parameters that the pooling uses.
        kind: as in ``TrunkHead``.
        predictor: as in ``TrunkHead``.
        unscheduled: as in ``TrunkHead``.
    """

    def __init__(
        self,
        segment: Segment,
        layers: Sequence[nn.Module],
        objective: Objective,
        pools_with: Sequence[str],
        kind: str = "",
        predictor: nn.Module | None = None,
        unscheduled: Sequence[nn.Module] = (),
    ) -> None:
        trunk = nn.Sequential(NetworkPooling(segment), *layers)
        super().__init__(trunk, objective, kind, True, predictor, unscheduled)
        self._segment, self.borrows = (segment,), tuple(pools_with)
        for name in pools_with:
            segment.backbone.get_parameter(name).requires_grad_()

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Its own, and those of the network's pooling; these have names in the network alone."""
        yield from super().parameters(recurse)
        backbone = self._segment[0].backbone
        yield from (backbone.get_parameter(name) for name in self.borrows)


class WrappingHead(Head):
    """A head behind copies of blocks, which transform its input; everything else is the inner head's.

    Args:
        name: attribute under which the module is registered; part of its parameters' names.
        module: the copies, which work in the layout of the network.
        head: the inner head.
        to_map: turns their output into the map that the inner head gets, unless that is native.
    """

    head: Head
    native = True

    def __init__(self, name: str, module: nn.Module, head: Head, to_map: ToMap = is_map) -> None:
        super().__init__()
        self._name, self._to_map = name, to_map
        self.add_module(name, module)
        self.head = head
        self.needs, self.contrasts, self.fewest_images = head.needs, head.contrasts, head.fewest_images
        self.separable, self.classifies, self.soft_labels = head.separable, head.classifies, head.soft_labels
        self.reads, self.penalizes, self.may_lag = head.reads, head.penalizes, head.may_lag
        self.elementwise = head.elementwise
        self.kind = head.kind

    def transform(self, x: Tensor) -> Tensor:
        """The inner head's input."""
        x = self.get_submodule(self._name)(x)
        return x if self.head.native else self._to_map(x)

    def loss(self, x: Tensor, batch: Batch) -> Tensor:
        return self.head(self.transform(x), batch)

    def embed(self, x: Tensor) -> Tensor:
        return self.head.embed(self.transform(x))

    def score(self, embeddings: Tensor, batch: Batch) -> Tensor:
        return self.head.score(embeddings, batch)

    def embedder(self) -> nn.Module:
        return nn.Sequential(self.get_submodule(self._name), self.head.embedder())

    def constant_rate(self) -> Iterator[nn.Parameter]:
        return self.head.constant_rate()

    def predict(self, x: Tensor) -> Tensor:
        return self.head.predict(self.transform(x))

    def penalty(self, segments: Sequence[Segment]) -> Tensor | None:
        return self.head.penalty(segments)

    def will_lag(self) -> None:
        self.head.will_lag()

    def before_step(self, segments: Sequence[Segment], taken: Tensor | float) -> None:
        self.head.before_step(segments, taken)

    def after_step(self, segments: Sequence[Segment], taken: Tensor | float) -> None:
        self.head.after_step(segments, taken)


class WeightedHeads(Head):
    """Several heads on one input; loss and penalty are the weighted sums of theirs.

    It is not separable, and does not predict, whatever its parts are.

    Args:
        parts: pairs (weight, head).
    """

    def __init__(self, parts: Sequence[tuple[float, Head]]) -> None:
        super().__init__()
        heads = [head for _, head in parts]
        self.weights = [weight for weight, _ in parts]
        self.parts = nn.ModuleList(heads)
        self.needs = frozenset().union(*(head.needs for head in heads))
        self.contrasts = any(head.contrasts for head in heads)
        self.fewest_images = max(head.fewest_images for head in heads)
        labeled = [head for head in heads if Need.LABELS in head.needs]
        self.soft_labels = bool(labeled) and all(head.soft_labels for head in labeled)
        self.reads = tuple(dict.fromkeys(s for head in heads for s in head.reads))
        self.reads_after = any(head.reads_after for head in heads if head.reads)
        self.penalizes = any(head.penalizes for head in heads)
        self.may_lag = all(head.may_lag for head in heads)
        self.elementwise = all(head.elementwise for head in heads if head.reads)
        self.kind = ", ".join(dict.fromkeys(head.kind for head in heads if head.kind))

    def loss(self, x: Tensor, batch: Batch) -> Tensor:
        losses = [w * part(x, batch) for w, part in zip(self.weights, self.parts, strict=True)]
        return sum(losses[1:], losses[0])

    def constant_rate(self) -> Iterator[nn.Parameter]:
        for head in self._heads:
            yield from head.constant_rate()

    def penalty(self, segments: Sequence[Segment]) -> Tensor | None:
        pairs = zip(self.weights, (head.penalty(segments) for head in self._heads), strict=True)
        penalties = [weight * penalty for weight, penalty in pairs if penalty is not None]
        return torch.stack(penalties).sum() if penalties else None

    def will_lag(self) -> None:
        for head in self._heads:
            head.will_lag()

    def before_step(self, segments: Sequence[Segment], taken: Tensor | float) -> None:
        for head in self._heads:
            head.before_step(segments, taken)

    def after_step(self, segments: Sequence[Segment], taken: Tensor | float) -> None:
        for head in self._heads:
            head.after_step(segments, taken)

    @property
    def _heads(self) -> list[Head]:
        return [cast(Head, part) for part in self.parts]
