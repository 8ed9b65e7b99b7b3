"""Tables of results, as their files declare them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from framework.analysis.results_claims import Claim
from framework.analysis.results_runs import Conditions, Layers, Row, RowRun
from framework.config.schema import Fault, NonNegativeInt, build
from framework.evaluation.linear_protocols import conditions_asked
from framework.runtime.errors import UserError


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
            table = build(cls, OmegaConf.to_container(OmegaConf.load(path)))
        except Fault as fault:
            raise UserError(f"{path}: {fault.key or 'the file'}: {fault.problem or 'unknown key'}") from fault
        except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
            raise UserError(f"{path}: not a table: {' '.join(str(error).split())}") from error
        if not table.rows or not table.seeds:
            raise UserError(f"{path}: {'seeds' if table.rows else 'rows'}: must name at least one")
        return table

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
        asked = Conditions(self.overrides, self.linear_eval, self.layers)
        return [
            RowRun(
                asked,
                row,
                seed,
                path.parent / row.recipe,
                overrides,
                folder / path.stem / f"{row.slug}-seed{seed}",
            )
            for seed in self.seeds
            for row in self.rows
        ]
