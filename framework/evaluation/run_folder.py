"""A run folder: its recipe, its network with and without training, its images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from torch import Tensor, nn

from framework import network
from framework.checkpoints.folder import read_weights
from framework.checkpoints.run_checkpoints import newest_checkpoint
from framework.config import loading
from framework.config.recipe import Execution, Method, Pipeline, Recipe
from framework.config.renamed import up_to_date
from framework.data.splits import Splits
from framework.execution import LocalNetwork
from framework.execution.weight_average import evaluated_backbone
from framework.local.methods import bp
from framework.model import recipe_network
from framework.network import Segment
from framework.runtime import distributed
from framework.runtime.errors import UserError
from framework.runtime.files import read_object


@dataclass(frozen=True)
class Run:
    """What a training left.

    Attributes:
        folder: of the run.
        recipe: resolved, with the overrides of whoever looks.
        label: a short name, unique among the runs that are looked at together.
    """

    folder: Path
    recipe: Recipe
    label: str

    @classmethod
    def open(cls, folder: Path, overrides: Sequence[str] = ()) -> Run:
        """
        Args:
            folder: of the run.
            overrides: ``key=value`` over its recipe, such as ``data.path=/elsewhere``.

        Raises:
            UserError: no run folder, or an override that does not fit.
        """
        if not (folder / "recipe.yaml").is_file():
            raise UserError(
                f"{folder}: is no run folder (it has no recipe.yaml); train first, or name another"
            )
        recipe = loading.load([str(folder / "recipe.yaml"), *overrides])
        return cls(folder, replace(recipe, run_dir=str(folder)), folder.resolve().name)

    @cached_property
    def result(self) -> dict[str, Any]:
        """``result.json``; empty while the run has not come to its end."""
        path = self.folder / "result.json"
        return read_object(path) if path.exists() else {}

    @property
    def network_arguments(self) -> dict[str, Any]:
        """What timm builds the network with, less weights that the run began with."""
        return self.recipe.network.architecture

    @cached_property
    def splits(self) -> Splits:
        """The images, shared among ranks that don't form a pipeline; may pack and index them first."""
        return Splits.open(replace(self.recipe, pipeline=Pipeline()))

    @cached_property
    def checkpoint(self) -> Path:
        """The newest whole checkpoint; all ranks must ask for it.

        Raises:
            UserError: there is none.
        """
        folder = newest_checkpoint(self.folder)
        if folder is None:
            raise UserError(
                f"{self.folder}: has no checkpoint yet (checkpoints/step-*); let it train until one is"
            )
        return folder

    def weights(self) -> dict[str, Tensor]:
        """The newest checkpoint's backbone, averaged if the run averages its weights, under timm's names.

        Raises:
            UserError: there is no checkpoint, or it can't be read.
        """
        return evaluated_backbone(read_weights(self.checkpoint))

    def encoder(self, trained: bool = True) -> LocalNetwork:
        """The network in evaluation mode on this rank's device, with a bare classifier in place of its heads.

        Args:
            trained: with the weights of the newest checkpoint, or random ones by the run's seed.

        Raises:
            UserError: as ``weights``, or the checkpoint is one of another network.
        """
        bare = replace(
            self.recipe,
            network=replace(self.recipe.network, sync_bn=False, args=self.network_arguments),
            method=Method("bp", bp.Options()),
            train=replace(self.recipe.train, ema=0.0),
            execution=Execution(),
        )
        net = recipe_network(bare, num_classes=1)
        if trained:
            self._load(net.backbone)
        return net.eval().requires_grad_(False).to(distributed.device())

    def backbone(self) -> nn.Module:
        """The trained network alone, as timm makes it, in evaluation mode on the CPU; needs no images.

        Raises:
            UserError: as ``encoder``.
        """
        backbone = network.create(self.recipe.network.name, **self.network_arguments)
        self._load(backbone)
        return backbone.eval().requires_grad_(False)

    def segments(self, net: LocalNetwork) -> list[Segment]:
        """``net``, of this or another run, cut where this run cuts."""
        own = self.recipe
        return network.cut(net.backbone, own.network.cut, own.network.stem_as_module, own.data.image_size)

    def _load(self, backbone: nn.Module) -> None:
        try:
            backbone.load_state_dict(self.weights())
        except RuntimeError as error:
            what = str(error).splitlines()[1].strip()
            raise UserError(f"{self.checkpoint}: does not fit {self.recipe.network.name}: {what}") from error


def open_runs(folders: Sequence[Path], overrides: Sequence[str] = ()) -> list[Run]:
    """Runs to look at together; two folders of one name are told apart by their paths.

    Raises:
        UserError: as ``Run.open``, or a folder is named twice.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError(f"a run is named twice: {' '.join(map(str, folders))}")
    runs = [Run.open(folder, overrides) for folder in folders]
    labels = [run.label for run in runs]
    return [replace(r, label=str(r.folder)) if labels.count(r.label) > 1 else r for r in runs]


def check_comparable(runs: Sequence[Run]) -> None:
    """Check that segments of the runs can stand side by side, and that one set of images serves all.

    Raises:
        UserError: different networks, or images prepared differently; names two runs and what differs.
    """
    first = runs[0]
    for other in runs[1:]:
        for what, a, b in zip(("network.name", "images"), _kind(first), _kind(other), strict=True):
            if a != b:
                raise UserError(
                    f"runs that are compared must have the same {what}: {first.folder} has {a}, {other.folder} {b}"
                )


def recipe_values(recipe: str) -> dict[str, Any]:
    """The values of a recipe in YAML by dotted key, as the keys are called now."""

    def walk(node: Any, key: str) -> Iterator[tuple[str, Any]]:
        if isinstance(node, dict):
            for name, value in node.items():
                yield from walk(value, f"{key}.{name}")
        else:
            yield key.removeprefix("."), node

    tree: Any = OmegaConf.to_container(OmegaConf.create(recipe))
    return dict(walk(up_to_date(tree), ""))


def _kind(run: Run) -> tuple[str, str]:
    views, size = run.recipe.views, run.recipe.data.image_size
    return run.recipe.network.name, f"{size} px, mean {views.mean}, std {views.std}, center {views.center:g}"
