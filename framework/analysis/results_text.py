"""Tables of results as Markdown, in files that name them.

Lines of the form ``<!-- KIND FILE -->``, FILE being one of ``recipes/results`` without suffix, stand before tables,
which end at the next empty line:

* ``results TABLE``: means over seeds; ``claims TABLE``: the claims;
* ``methods TABLE STEPS``: errors beside what a step costs;
* ``gpu STEPS``: steps on a GPU; ``memory MEMORY``: the peaks of its allocator.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from framework.analysis.results_claims import mean_and_deviation
from framework.analysis.results_runs import Row
from framework.analysis.results_tables import ResultsTable
from framework.runtime.errors import UserError

MARK = re.compile(
    r"^<!-- (results|claims|methods|gpu|memory) (\S+)(?: (\S+))? -->\n(?:[^\n]+\n)*", re.MULTILINE
)

#: column of a CSV -> its heading, and how a line's number is shown
COLUMNS: dict[str, tuple[str, Callable[[float], float]]] = {
    "error": ("{score}, error in %", float),
    "knn_top1": ("k-NN, error in %", lambda accuracy: 100 - accuracy),
    "early_top1": ("first third of segments, linear probe, error in %", lambda accuracy: 100 - accuracy),
    "cka": ("CKA with {reference}", float),
}
#: what stands below the rows -> heading's column -> column of the CSV, an accuracy that all rows of a seed share
BASELINES = {
    "untrained": {"error": "linear_top1_random", "knn_top1": "knn_top1_untrained"},
    "pixels": {"knn_top1": "knn_top1_pixels"},
}
#: heading -> column of ``bench_step``'s CSV, and how it is shown
STEPS = {
    "network": ("network", "{}"),
    "cut": ("cut", "{}"),
    "method": ("method", "{}"),
    "batch": ("batch", "{}"),
    "precision": ("precision", "{}"),
    "CUDA graph": ("cuda_graph", "{}"),
    "images/s": ("images_per_second", "{:.0f}"),
    "time / end-to-end": ("ratio_time", "{:.2f}"),
    "speed-up of the graph": ("speedup", "{:.2f}"),
    "allocator's peak, GiB": ("peak_bytes", "{:.2f}"),
    "end-to-end / peak": ("ratio_peak", "{:.2f}"),
    "GPU busy": ("busy", "{:.2f}"),
}
#: the same for the allocator's peaks beside the papers'
MEMORY = {
    "network, method": ("plan", "{}"),
    "images": ("images", "{}"),
    "precision": ("precision", "{}"),
    "end-to-end, GiB": ("allocated_end_to_end_gib", "{:.2f}"),
    "method, GiB": ("allocated_method_gib", "{:.2f}"),
    "times less": ("allocated_saving", "{:.2f}"),
    "the paper's": ("paper_saving", "{:.2f}"),
}
#: what turns a number of a CSV into the one that is shown
CONVERTED: dict[str, Callable[[float], float]] = {
    "peak_bytes": lambda number: number / 2**30,
    "ratio_peak": lambda number: 1 / number,
}
SCORES = {"test_top1": "test", "linear_top1": "linear evaluation"}


class Recorded:
    """A table of results and the lines of its CSV.

    Args:
        folder: that of the tables.
        name: of the table, without suffix.

    Raises:
        UserError: no such table, or CSVs of several devices, whose numbers are not to be mixed.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.table = ResultsTable.read(folder / f"{name}.yaml")
        found = sorted(folder.glob(f"{name}-*.csv"))
        if len(found) > 1:
            raise UserError(f"{folder / name}: has CSVs of several devices: {', '.join(map(str, found))}")
        self.lines = list(csv.DictReader(found[0].read_text().splitlines())) if found else []

    def of(self, row: Row) -> list[dict[str, str]]:
        """The lines of a row, by seed."""
        return sorted((line for line in self.lines if line["row"] == row.name), key=lambda line: line["seed"])

    def scores(self, row: str, column: str) -> dict[str, float]:
        """A column of a row, by seed."""
        lines = (line for line in self.lines if line["row"] == row and line.get(column))
        return {line["seed"]: float(line[column]) for line in lines}

    def results(self) -> list[list[str]]:
        """Means and standard deviations over seeds; n is their number."""
        measured = [key for key in COLUMNS if key == "error" or any(line.get(key) for line in self.lines)]
        names = {"score": SCORES[self.table.score], "reference": ""}
        if self.table.layers is not None:
            names["reference"] = self.table.layers.reference
        heads = [COLUMNS[key][0].format(**names) for key in measured]
        cells = [[self.table.title, "n", *heads, "the paper's", "logs"]]
        for row in self.table.rows:
            lines = self.of(row)
            shown = [self._shown(row, key) for key in measured]
            logs = ", ".join(f"[{line['seed']}]({line['log']})" for line in lines)
            cells.append([row.name, str(len(lines)), *shown, _number(row.paper), logs])
        for name, columns in BASELINES.items():
            values = [self._baseline(columns.get(key, "")) for key in measured]
            if any(values):
                means = [mean_and_deviation(list(value.values())) for value in values]
                cells.append([name, str(max(map(len, values))), *means, "", ""])
        return cells

    def claims(self) -> list[list[str]]:
        """Every claim with its verdict."""
        cells = [[self.table.title, "does it show?"]]
        for claim in self.table.claims:
            row, other = (self.scores(name, claim.score) for name in (claim.row, claim.other))
            cells.append([claim.says, claim.verdict(row, other)])
        return cells

    def methods(self, steps: str) -> list[list[str]]:
        """Errors beside what a step costs in proportion to end-to-end backpropagation."""
        with (self.folder / f"{steps}.csv").open() as file:
            costs = {line["method"]: line for line in csv.DictReader(file)}
        heads = [
            "time / BP",
            "the same, forwards repeated",
            "activations / BP",
            "n",
            "error in %",
            "the paper's",
        ]
        cells = [["method", *heads]]
        for row in self.table.rows:
            key = row.name.split()[0].lower()
            ratios = ("ratio_time", "ratio_time_naive", "ratio_peak_activations")
            cost = ["1"] * 3 if key == "bp" else ["", "", ""]
            if key in costs:
                cost = [f"{float(costs[key][ratio]):.2f}" for ratio in ratios]
            cells.append(
                [row.name, *cost, str(len(self.of(row))), self._shown(row, "error"), _number(row.paper)]
            )
        return cells

    def _baseline(self, column: str) -> dict[str, float]:
        """Errors by seed."""
        return {line["seed"]: 100 - float(line[column]) for line in self.lines if line.get(column)}

    def _shown(self, row: Row, column: str) -> str:
        convert = COLUMNS[column][1]
        return mean_and_deviation([convert(value) for value in self.scores(row.name, column).values()])


def up_to_date(text: str, folder: Path) -> str:
    """A text in which every marked table is that of the files in ``folder``.

    Links to logs are relative to that folder.

    Raises:
        UserError: as ``Recorded``.
    """

    def table(found: re.Match[str]) -> str:
        kind, name, steps = found.groups()
        if kind in ("gpu", "memory"):
            cells = measured(folder / f"{name}.csv", STEPS if kind == "gpu" else MEMORY)
            return f"{found.group(0).splitlines()[0]}\n{_markdown(cells)}"
        recorded = Recorded(folder, name)
        if kind == "methods":
            cells = recorded.methods(steps)
        else:
            cells = recorded.claims() if kind == "claims" else recorded.results()
        return f"{found.group(0).splitlines()[0]}\n{_markdown(cells)}"

    return MARK.sub(table, text)


def measured(path: Path, columns: dict[str, tuple[str, str]]) -> list[list[str]]:
    """Columns of a CSV, with their headings; one line that says so, where there is no CSV yet."""
    if not path.exists():
        return [list(columns), ["not run yet", *[""] * (len(columns) - 1)]]
    cells = [list(columns)]
    for line in csv.DictReader(path.read_text().splitlines()):
        shown = []
        for key, form in columns.values():
            value = line.get(key) or ""
            if value and form != "{}":
                shown.append(form.format(CONVERTED.get(key, float)(float(value))))
            else:
                shown.append({"True": "yes", "False": ""}.get(value, value))
        cells.append(shown)
    return cells


def _markdown(cells: Sequence[Sequence[str]]) -> str:
    """Rows of cells; the first holds the headings. What holds numbers alone stands right."""
    numbers = [all(re.fullmatch(r"[\d.± ]*", row[i]) for row in cells[1:]) for i in range(len(cells[0]))]
    rule = ["--:" if number else "---" for number in numbers]
    return "".join(f"| {' | '.join(row)} |\n" for row in (cells[0], rule, *cells[1:]))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:g}"
