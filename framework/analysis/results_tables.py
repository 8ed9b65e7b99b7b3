"""Tables of results: their rows, and the runs that they ask for."""

from __future__ import annotations

import json
import re
import shlex
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf

from framework.checkpoints.folder import identity_of
from framework.checkpoints.run_checkpoints import newest_checkpoint
from framework.config import loading
from framework.config.recipe import Recipe
from framework.config.schema import Fault, NonNegativeInt, build
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
class ResultsTable:
    """A table of results.

    Attributes:
        title: what is compared, under which conditions.
        score: the accuracy, in per cent, whose error is compared.
        rows: in the order of the table.
        overrides: conditions that all rows share.
        seeds: every row is trained with each.
        linear_eval: arguments of ``tools/linear_eval.py``, which then follows the training.
    """

    title: str
    score: Literal["test_top1", "linear_top1"]
    rows: list[Row]
    overrides: list[str] = field(default_factory=list)
    seeds: list[NonNegativeInt] = field(default_factory=lambda: [0])
    linear_eval: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
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
        commands: what makes it, one after the other: paths of scripts with arguments.
    """

    def __init__(
        self, table: ResultsTable, row: Row, seed: int, recipe: Path, overrides: list[str], folder: Path
    ) -> None:
        self.row, self.seed, self.folder = row, seed, folder
        self._table, self._recipe, self._overrides = table, recipe.resolve(), overrides
        self.commands = self._commands(folder, overrides)
        self._check(loading.load(self.commands[0][1:]))

    @property
    def results(self) -> list[dict[str, Any]]:
        """What each command left, as far as they have come; a linear evaluation of something else counts for none."""
        path = self.folder / "result.json"
        if not path.exists():
            return []
        return [json.loads(path.read_text()), *self._linear_evaluation()]

    @property
    def ended(self) -> bool:
        """Whether nothing is left to do."""
        return len(self.results) == len(self.commands)

    def shown(self, threads: str) -> list[str]:
        """The commands without this machine's paths, with the number of threads, on which results depend.

        Args:
            threads: as the log of the run says; several numbers, if it ran in pieces, are not shown.
        """
        folder = Path("runs", *self.folder.parts[-2:])
        commands = self._commands(
            folder, [text for text in self._overrides if text.split("=")[0] not in PATHS]
        )
        before = [f"OMP_NUM_THREADS={threads}"] if threads.isdigit() else []
        return [
            shlex.join([*before, "python", *(text.removeprefix(f"{ROOT}/") for text in command)])
            for command in commands
        ]

    def _commands(self, folder: Path, overrides: list[str]) -> list[list[str]]:
        settings = [*self._table.overrides, *self.row.overrides, *overrides, f"seed={self.seed}"]
        training = [str(self._recipe), *settings, f"run_dir={folder}"]
        commands = [[str(ROOT / "framework" / "train.py"), *training]]
        if self._table.linear_eval:
            places = [text for text in overrides if text.split("=")[0] in PLACES]
            evaluation = [str(folder), *self._table.linear_eval, *places]
            commands.append([str(ROOT / "tools" / "linear_eval.py"), *evaluation])
        return commands

    def _linear_evaluation(self) -> list[dict[str, Any]]:
        """The result of the evaluation that the table asks for, of the newest checkpoint; none if there is none."""
        if not self._table.linear_eval:
            return []
        asked = conditions_asked(self._table.linear_eval)
        wanted = {**asked, **self._checkpoint}
        for folder in ("analysis", "evidence"):  # the second is that of older versions
            path = self.folder / folder / f"{result_name(asked)}.json"
            if path.exists():
                found = json.loads(path.read_text())
                if all(found.get(key, value) == value for key, value in wanted.items()):
                    return [found]
        return []

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


def settings_of(text: str) -> dict[str, Any]:
    """A recipe's values by dotted key, but for places."""
    return {key: value for key, value in recipe_values(text).items() if key not in PLACES}
