"""The runs that a table of results asks for: their commands, and what these have left so far."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from framework.checkpoints.folder import identity_of
from framework.checkpoints.run_checkpoints import newest_checkpoint
from framework.config import loading
from framework.config.recipe import Recipe
from framework.config.schema import PositiveInt
from framework.evaluation.linear_protocols import PLACES, conditions_asked, result_name
from framework.evaluation.run_folder import recipe_values
from framework.runtime.errors import UserError
from framework.runtime.files import read_object
from framework.tracking.environment import ROOT

PATHS = {"data.path", "data.cache_dir"}  # not logged if the command line gives them


@dataclass
class Row:
    """One line of a table.

    Attributes:
        name: what the line is called.
        recipe: path of the file, from the table's folder.
        overrides: of that recipe.
        paper: the published error in per cent, often of a longer training.
    """

    name: str
    recipe: str
    overrides: list[str] = field(default_factory=list)
    paper: float | None = None

    @property
    def slug(self) -> str:
        """The name as part of a file name."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower().replace("*", "star")).strip("-")


@dataclass
class Layers:
    """Looks at every segment of a run, after its training (MLAAN Figures 5 and 6).

    Attributes:
        reference: row whose run of the same seed the others are compared with by CKA; end-to-end backpropagation.
        images: of each split, evenly spaced.
    """

    reference: str
    images: PositiveInt


@dataclass
class Conditions:
    """What all runs of a table share.

    Attributes:
        overrides: of every recipe.
        linear_eval: arguments of ``tools/linear_eval.py``; none if there is no linear evaluation.
        layers: what is measured on every segment.
    """

    overrides: list[str]
    linear_eval: list[str]
    layers: Layers | None


class Step(NamedTuple):
    """One command of a run.

    Attributes:
        kind: what it leaves: "training", "linear evaluation", "probes" or "CKA".
        command: path of a script with arguments.
    """

    kind: str
    command: list[str]


class RowRun:
    """One row with one seed.

    Attributes:
        row: the row.
        seed: the seed.
        folder: of the run.
        steps: what makes it, one after the other.
    """

    def __init__(
        self, asked: Conditions, row: Row, seed: int, recipe: Path, overrides: list[str], folder: Path
    ) -> None:
        self.row, self.seed, self.folder = row, seed, folder
        self._asked, self._recipe, self._overrides = asked, recipe.resolve(), overrides
        self.steps = self._steps(folder, overrides)
        try:
            self.recipe = loading.load(self.steps[0].command[1:])
        except UserError as error:
            raise UserError(f"row {row.name!r}: {error}") from error
        self._check(self.recipe)

    @property
    def reference(self) -> Path | None:
        """The run folder that this one is compared with."""
        layers = self._asked.layers
        if layers is None or layers.reference == self.row.name:
            return None
        return self.folder.with_name(f"{Row(layers.reference, '').slug}-seed{self.seed}")

    @property
    def results(self) -> list[dict[str, Any]]:
        """What each step left, as far as they have come; an evaluation of something else counts for none."""
        left = {
            "training": lambda: self._left("result.json"),
            "linear evaluation": self._linear_evaluation,
            "probes": lambda: self._left("analysis/probe_layers.json", self.asked("probes")),
            "CKA": lambda: self._left("analysis/cka.json"),
        }
        found = []
        for step in self.steps:
            if (result := left[step.kind]()) is None:
                break
            found.append(result)
        return found

    @property
    def ended(self) -> bool:
        """Whether nothing is left to do."""
        return len(self.results) == len(self.steps)

    def asked(self, kind: str) -> dict[str, Any]:
        """What the result of a step of this kind must say, where it says it at all."""
        if kind == "linear evaluation":
            return conditions_asked(self._asked.linear_eval)
        if kind == "probes" and self._asked.layers is not None:
            return {"images": self._asked.layers.images}
        return {}

    def shown(self, threads: str) -> list[str]:
        """The commands without this machine's paths, with the number of threads, on which results depend.

        Args:
            threads: as the log of the run says; several numbers, if it ran in pieces, are not shown.
        """
        folder = Path("runs", *self.folder.parts[-2:])
        steps = self._steps(folder, [text for text in self._overrides if text.split("=")[0] not in PATHS])
        before = [f"OMP_NUM_THREADS={threads}"] if threads.isdigit() else []
        return [
            shlex.join([*before, "python", *(text.removeprefix(f"{ROOT}/") for text in step.command)])
            for step in steps
        ]

    def _steps(self, folder: Path, overrides: list[str]) -> list[Step]:
        settings = [*self._asked.overrides, *self.row.overrides, *overrides, f"seed={self.seed}"]
        training = [str(self._recipe), *settings, f"run_dir={folder}"]
        steps = [Step("training", [str(ROOT / "framework" / "train.py"), *training])]
        places = [text for text in overrides if text.split("=")[0] in PLACES]
        tools = ROOT / "tools"
        if self._asked.linear_eval:
            evaluation = [str(folder), *self._asked.linear_eval, *places]
            steps.append(Step("linear evaluation", [str(tools / "linear_eval.py"), *evaluation]))
        if self._asked.layers is not None:
            more = ["--images", str(self._asked.layers.images), *places]
            steps.append(Step("probes", [str(tools / "probe_layers.py"), str(folder), *more]))
            if self.reference is not None:
                compared = [str(folder.with_name(self.reference.name)), str(folder)]
                out = ["--out", str(folder / "analysis")]
                steps.append(Step("CKA", [str(tools / "cka.py"), *compared, *out, *more]))
        return steps

    def _left(self, name: str, asked: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
        path = self.folder / name
        if not path.exists():
            return None
        found = read_object(path)
        return found if fits(found, asked or {}) else None

    def _linear_evaluation(self) -> dict[str, Any] | None:
        """The result of the evaluation that the table asks for, of the newest checkpoint, if there is one."""
        asked = self.asked("linear evaluation")
        wanted = {**asked, **self._checkpoint}
        for folder in ("analysis", "evidence"):  # the second is that of older versions
            path = self.folder / folder / f"{result_name(asked)}.json"
            if path.exists():
                found = read_object(path)
                if fits(found, wanted):
                    return found
        return None

    @cached_property
    def _checkpoint(self) -> dict[str, str]:
        """What a linear evaluation says of the newest checkpoint; nothing where that is gone or damaged."""
        with suppress(UserError):
            if folder := newest_checkpoint(self.folder):
                return identity_of(folder)
        return {}

    def _check(self, wanted: Recipe) -> None:
        """Raises:
        UserError: the folder holds a run of another recipe.
        """
        path = self.folder / "recipe.yaml"
        if not path.exists():
            return
        there, here = settings_of(path.read_text()), settings_of(loading.to_yaml(wanted))
        for key in sorted(there.keys() | here.keys()):
            if there.get(key) != here.get(key):
                raise UserError(
                    f"{path}: {key} is {there.get(key)} there and {here.get(key)} in the table: "
                    f"remove the folder, or name another with --runs"
                )


def fits(found: Mapping[str, Any], asked: Mapping[str, Any]) -> bool:
    """Whether a result says what is asked, where it says it at all."""
    return all(found.get(key, value) == value for key, value in asked.items())


def settings_of(text: str) -> dict[str, Any]:
    """A recipe's values by dotted key, but for places."""
    return {key: value for key, value in recipe_values(text).items() if key not in PLACES}
