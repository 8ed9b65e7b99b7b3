"""Means over seeds, and which of the papers' claims they show."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

#: Student's t that 5 % of differences exceed, by degrees of freedom less 1
STUDENT = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833)


@dataclass
class Claim:
    """One of the papers' claims, as two rows of a table can show it.

    Attributes:
        says: the claim.
        row: the row of which something is said.
        other: the row that it is compared with.
        relation: "above" or "below": beyond what seeds explain; "not above": by at most one standard error.
        score: column of the CSV that is compared.
    """

    says: str
    row: str
    other: str
    relation: Literal["above", "below", "not above"]
    score: str = "error"

    def verdict(self, row: dict[str, float], other: dict[str, float]) -> str:
        """Whether it shows, with the mean difference over the seeds that both rows have.

        "yes" and "no" of "above" and "below" are a paired, one-sided t-test at 5 %, either way; between them it is
        "open". "not above" is "yes" up to one standard error of the mean difference.

        Args:
            row: score by seed.
            other: likewise.
        """
        differences = [row[seed] - other[seed] for seed in row if seed in other]
        if not differences:
            return "not run yet"
        mean = statistics.fmean(differences)
        if len(differences) == 1:
            return f"open: {mean:+.2f} with one seed"
        error = statistics.stdev(differences) / math.sqrt(len(differences))
        needed = STUDENT[min(len(differences) - 2, len(STUDENT) - 1)] * error
        if self.relation == "not above":
            word = "yes" if mean <= error else "no"
        else:
            signed = mean if self.relation == "above" else -mean
            word = "yes" if signed > needed else "no" if signed < -needed else "open"
        return f"{word}: {mean:+.2f} ± {error:.2f}, n={len(differences)}"


def mean_and_deviation(values: Sequence[float]) -> str:
    """Such as ``12.34 ± 0.56``, with the standard deviation over seeds; the value alone where there is one."""
    if len(values) < 2:
        return f"{values[0]:.2f}" if values else ""
    return f"{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f}"
