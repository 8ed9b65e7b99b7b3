"""Means over seeds, verdicts on claims, and the Markdown that is made of them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from framework.analysis.results_claims import STUDENT, Claim
from framework.analysis.results_tables import ResultsTable
from framework.analysis.results_text import up_to_date
from framework.runtime.errors import UserError
from tests.support.results import named, table

SEEDS = ("0", "1", "2")


@pytest.mark.parametrize("relation", ["above", "below"])
@pytest.mark.parametrize("shift", [-2.0, -0.2, 0.0, 0.3, 2.0])
def test_a_verdict_is_a_paired_t_test(relation: str, shift: float) -> None:
    generator = np.random.default_rng(0)
    row, other = (generator.normal(size=3) / 4 for _ in range(2))
    row += shift
    claim = Claim("c", "a", "b", relation)  # type: ignore[arg-type]
    found = claim.verdict(dict(zip(SEEDS, row, strict=True)), dict(zip(SEEDS, other, strict=True)))
    greater = stats.ttest_rel(row, other, alternative="greater").pvalue < 0.05
    less = stats.ttest_rel(row, other, alternative="less").pvalue < 0.05
    yes, no = (greater, less) if relation == "above" else (less, greater)
    assert found.split(":")[0] == ("yes" if yes else "no" if no else "open")
    assert f"{(row - other).mean():+.2f} ± {stats.sem(row - other):.2f}, n=3" in found


def test_students_t() -> None:
    assert tuple(round(float(stats.t.ppf(0.95, df)), 3) for df in range(1, 10)) == STUDENT


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({}, "not run yet"),
        ({"4": 1.0}, "not run yet"),
        ({"0": 11.0}, "open: +1.00 with one seed"),
        ({"0": 10.0, "1": 9.0, "2": 15.0}, "yes: +1.33 ± 1.86, n=3"),
        ({"0": 11.0, "1": 11.5}, "no: +1.25 ± 0.25, n=2"),
    ],
)
def test_level_means_up_to_one_standard_error(row: dict[str, float], found: str) -> None:
    assert Claim("c", "a", "b", "not above").verdict(row, dict.fromkeys(SEEDS, 10.0)) == found


def test_a_claim_names_rows_of_its_table(tmp_path: Path) -> None:
    claim = {"says": "c", "row": "A", "other": "C", "relation": "above"}
    with pytest.raises(UserError, match="claims: c: no row 'C'; the table has A, B"):
        named(table(tmp_path), "A", "B", claims=[claim])


def test_marked_tables_are_made_of_the_csv(tmp_path: Path) -> None:
    claim = {"says": "A is better", "row": "A", "other": "B", "relation": "below"}
    path = table(tmp_path)
    found = named(path, "A", "B", claims=[claim])
    assert isinstance(found, ResultsTable)
    lines = [
        {"row": row, "seed": seed, "error": error, "knn_top1": 60, "log": f"logs/{row}{seed}.jsonl"}
        for row, seed, error in (("A", 0, 10.5), ("A", 1, 11.5), ("B", 0, 12.25))
    ]
    with (path.parent / "digits-cpu.csv").open("w") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    text = "Before\n<!-- results digits -->\n| old |\n| --- |\n\n<!-- claims digits -->\n\nAfter\n"
    now = up_to_date(text, path.parent)
    assert now == (
        "Before\n<!-- results digits -->\n| digits | n | test, error in % | k-NN, error in % | the paper's | logs |\n"
        "| --- | --: | --: | --: | --: | --- |\n"
        "| A | 2 | 11.00 ± 0.71 | 40.00 ± 0.00 | 1.5 | [0](logs/A0.jsonl), [1](logs/A1.jsonl) |\n"
        "| B | 1 | 12.25 | 40.00 | 1.5 | [0](logs/B0.jsonl) |\n\n"
        "<!-- claims digits -->\n| digits | does it show? |\n| --- | --- |\n"
        "| A is better | open: -1.75 with one seed |\n\nAfter\n"
    )
    assert up_to_date(now, path.parent) == now
    (path.parent / "steps.csv").write_text(
        "method,ratio_time,ratio_time_naive,ratio_peak_activations\na,1.234,2,0.5\n"
    )
    assert "| A | 1.23 | 2.00 | 0.50 | 2 | 11.00 ± 0.71 | 1.5 |" in up_to_date(
        "<!-- methods digits steps -->\n", path.parent
    )
    (path.parent / "digits-gpu.csv").write_text((path.parent / "digits-cpu.csv").read_text())
    with pytest.raises(UserError, match="has CSVs of several devices"):
        up_to_date(now, path.parent)
    assert json.loads(path.read_text())["title"] == "digits"
