"""Tables of results: their rows, and the runs that they ask for."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from omegaconf import OmegaConf

from framework.analysis.results_claims import Claim
from framework.checkpoints.folder import identity_of
from framework.checkpoints.run_checkpoints import newest_checkpoint
from framework.config import loading
from framework.config.recipe import Recipe
from framework.config.schema import Fault, NonNegativeInt, PositiveInt, build
from framework.evaluation.linear_protocols import PLACES, conditions_asked, result_name
from framework.evaluation.run_folder import recipe_values
from framework.runtime.errors import UserError
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


class Step(NamedTuple):
    """One command of a run.

    Attributes:
        kind: what it leaves: "training", "linear evaluation", "probes" or "CKA".
        command: path of a script with arguments.
    """

    kind: str
    command: list[str]


@dataclass
class ResultsTable:
    """A table of results.

    Attributes:
        title: what is compared, under which conditions.
        score: the accuracy, in per cent, whose error is compared.
        rows: in the order of the table.
        overrides: conditions that all rows share.
        seeds: every row is trained with each.
        linear_eval: arguments of ``tools/linear_eval.py``, which then follows the training.
        layers: what is measured on every segment, after that.
        claims: of the papers, which the lines of the CSV show or not.
    """

    title: str
    score: Literal["test_top1", "linear_top1"]
    rows: list[Row]
    overrides: list[str] = field(default_factory=list)
    seeds: list[NonNegativeInt] = field(default_factory=lambda: [0])
    linear_eval: list[str] = field(default_factory=list)
    layers: Layers | None = None
    claims: list[Claim] = field(default_factory=list)

    def __post_init__(self) -> None:
        names = [row.name for row in self.rows]
        named = [
            (f"claims: {claim.says}", name) for claim in self.claims for name in (claim.row, claim.other)
        ]
        named += [("layers.reference", self.layers.reference)] if self.layers is not None else []
        for place, name in named:
            if name not in names:
                raise ValueError(f"{place}: no row {name!r}; the table has {', '.join(names)}")
        slugs = [row.slug for row in self.rows]
        if len(set(slugs)) < len(slugs):
            raise ValueError(f"two rows have the same file name: {', '.join(slugs)}")
        if (self.score == "linear_top1") != bool(self.linear_eval):
            raise ValueError("linear_eval goes with score=linear_top1, and only with it")
        if self.linear_eval and "--preset" not in self.linear_eval[:-1]:
            raise ValueError("linear_eval: must name a --preset, which its result is called after")
        try:
            conditions_asked(self.linear_eval)
        except UserError as error:
            raise ValueError(f"linear_eval: {error}") from error

    @classmethod
    def read(cls, path: Path) -> ResultsTable:
        """The table at ``path``.

        Raises:
            UserError: no such file, or not a table.
        """
        if not path.is_file():
            raise UserError(f"{path}: no such table")
        try:
            return build(cls, OmegaConf.to_container(OmegaConf.load(path)))
        except Fault as fault:
            raise UserError(f"{path}: {fault.key or 'the file'}: {fault.problem or 'unknown key'}") from fault

    def named(self, text: str) -> list[Row]:
        """The rows of a list such as ``BP,dgl-k-16``; behind the comma of a list is no space.

        Raises:
            UserError: there is no such row.
        """
        rows, names = {row.slug: row for row in self.rows}, re.split(r",(?! )", text)
        for name in names:
            if Row(name, "").slug not in rows:
                raise UserError(f"--rows: no row {name!r}; the table has {', '.join(rows)}")
        return [rows[Row(name, "").slug] for name in names]

    def seeds_named(self, text: str) -> list[int]:
        """The seeds of a list such as ``0,2``.

        Raises:
            UserError: there is no such seed.
        """
        seeds = {str(seed): seed for seed in self.seeds}
        for name in text.split(","):
            if name not in seeds:
                raise UserError(f"--seeds: no seed {name!r}; the table has {', '.join(seeds)}")
        return [seeds[name] for name in text.split(",")]

    def runs(self, path: Path, folder: Path, overrides: list[str]) -> list[RowRun]:
        """Every run, seed after seed.

        Args:
            path: of the table.
            folder: below which run folders are.
            overrides: of the command line.

        Raises:
            UserError: a recipe or an override is wrong; a run folder has other settings.
        """
        return [
            RowRun(
                self,
                row,
                seed,
                path.parent / row.recipe,
                overrides,
                folder / path.stem / f"{row.slug}-seed{seed}",
            )
            for seed in self.seeds
            for row in self.rows
        ]


class RowRun:
    """One row with one seed.

    Attributes:
        row: the row.
        seed: the seed.
        folder: of the run.
        steps: what makes it, one after the other.
    """

    def __init__(
        self, table: ResultsTable, row: Row, seed: int, recipe: Path, overrides: list[str], folder: Path
    ) -> None:
        self.row, self.seed, self.folder = row, seed, folder
        self._table, self._recipe, self._overrides = table, recipe.resolve(), overrides
        self.steps = self._steps(folder, overrides)
        self.recipe = loading.load(self.steps[0].command[1:])
        self._check(self.recipe)

    @property
    def reference(self) -> Path | None:
        """The run folder that this one is compared with."""
        layers = self._table.layers
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
            return conditions_asked(self._table.linear_eval)
        if kind == "probes" and self._table.layers is not None:
            return {"images": self._table.layers.images}
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
        settings = [*self._table.overrides, *self.row.overrides, *overrides, f"seed={self.seed}"]
        training = [str(self._recipe), *settings, f"run_dir={folder}"]
        steps = [Step("training", [str(ROOT / "framework" / "train.py"), *training])]
        places = [text for text in overrides if text.split("=")[0] in PLACES]
        tools = ROOT / "tools"
        if self._table.linear_eval:
            evaluation = [str(folder), *self._table.linear_eval, *places]
            steps.append(Step("linear evaluation", [str(tools / "linear_eval.py"), *evaluation]))
        if self._table.layers is not None:
            more = ["--images", str(self._table.layers.images), *places]
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
        found: dict[str, Any] = json.loads(path.read_text())
        return found if fits(found, asked or {}) else None

    def _linear_evaluation(self) -> dict[str, Any] | None:
        """The result of the evaluation that the table asks for, of the newest checkpoint, if there is one."""
        asked = self.asked("linear evaluation")
        wanted = {**asked, **self._checkpoint}
        for folder in ("analysis", "evidence"):  # the second is that of older versions
            path = self.folder / folder / f"{result_name(asked)}.json"
            if path.exists():
                found = json.loads(path.read_text())
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
