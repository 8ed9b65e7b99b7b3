"""One HTML page about one or several runs, with everything inside it: it opens offline, and on a phone."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from framework.analysis.curves import Losses, draw_units, read_losses, read_scores, score_curves
from framework.analysis.pictures import dress, png, run_colors
from framework.config import loading
from framework.cost import readable
from framework.cost.counting import PlanCost, likely_classes, plan_cost
from framework.cost.plan_picture import plan_figure
from framework.evaluation.run_folder import Run, recipe_values
from framework.runtime.files import read_object
from framework.tracking.metric_log import read_log

_SIZE = (5.4, 3.5)  # inches: the text of a picture stays legible at the width of a phone
#: file of ``analysis`` -> caption
ANALYSES = {
    "probe_layers": "Linear probe on every segment's frozen output, test accuracy.",
    "cka": "Similarity of segments (minibatch linear CKA).",
    "tsne": "Features of test images in the plane (t-SNE); the silhouette says how tight classes are.",
    "umap": "Features of test images in the plane (UMAP).",
    "feature_maps": "Mean absolute activation over test images, one color scale.",
    "memory": "Activation memory against end-to-end training.",
}


class Picture(NamedTuple):
    """A picture inside the page: ``data`` is a data URI, ``width`` the least that can be read, in CSS pixels."""

    data: str
    caption: str
    width: int


class Section(NamedTuple):
    """A heading and its pictures."""

    title: str
    pictures: list[Picture]


def write_report(runs: Sequence[Run]) -> str:
    """The page.

    Raises:
        UserError: a run has not logged a step yet, or its recipe can't be planned.
    """
    losses = {run.label: read_losses(run.folder / "metrics.jsonl") for run in runs}
    costs = {run.label: _cost(run) for run in runs}
    sections = [
        Section("What trains what", [_plan(run, costs[run.label]) for run in runs]),
        Section("Losses", list(_curves(losses))),
        Section("On the way", list(_on_the_way(runs))),
        Section("What was learned", list(_analyses(runs))),
    ]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template("report.html").render(
        title=" and ".join(run.label for run in runs),
        labels=[run.label for run in runs],
        summary=_table([_summary(run, losses[run.label], costs[run.label]) for run in runs]),
        differences=_differing([_settings(run) for run in runs]) if len(runs) > 1 else [],
        sections=[section for section in sections if section.pictures],
        environment=_table([_environment(run) for run in runs]),
        recipes={run.label: loading.to_yaml(run.recipe) for run in runs},
    )


def _summary(run: Run, losses: Losses, cost: PlanCost) -> dict[str, str]:
    result, recipe = run.result, run.recipe
    last = losses.smooth()[-1]
    rows = {
        "network": f"{recipe.network.name}, {len(cost.segments)} segments, {recipe.data.image_size} px",
        "method": f"{recipe.method.name}, {len(cost.units)} local units",
        "steps": f"{losses.trained}" + ("" if result else " (not finished)"),
        "batch": f"{recipe.train.batch_size} on {result.get('world_size', '?')} rank(s), {recipe.engine}",
        "last loss of the highest unit": f"{last[-1]:.3f}",
    }
    if result:
        rows["images/s"] = f"{result['images_per_second']:.0f}"
        rows["peak memory of a process"] = readable.text(result["peak_memory_bytes"], readable.BYTES)
    activations = readable.text(cost.peak_activation_bytes, readable.BYTES)
    end_to_end = readable.text(cost.end_to_end_activation_bytes, readable.BYTES)
    rows["activations counted"] = f"{activations} ({end_to_end} end-to-end, {cost.memory_saving:.2f}x less)"
    return rows | scores(run)


def scores(run: Run) -> dict[str, str]:
    """Every accuracy that was measured of a run, with what it has to be compared with in brackets."""
    rows = {}
    for key, name in (("knn_top1", "k-NN"), ("linear_top1", "linear probe"), ("test_top1", "classifier")):
        beside = {
            "untrained": run.result.get(f"{key}_untrained"),
            "raw pixels": run.result.get(f"{key}_pixels"),
        }
        if key in run.result:
            rows[name] = _per_cent(run.result[key], beside)
    for path in sorted((run.folder / "analysis").glob("linear_eval_*.json")):
        found = read_object(path)
        name = f"linear evaluation, {found['preset']}" + (", cached" if found["cached"] else "")
        rows[name] = _per_cent(found["top1"], {"random encoder": found["top1_random_encoder"]})
    for path in sorted(run.folder.glob("finetune-*/result.json")):
        rows[path.parent.name.replace("-", " ")] = _per_cent(read_object(path)["test_top1"], {})
    return rows


def _per_cent(value: float, beside: Mapping[str, float | None]) -> str:
    others = ", ".join(f"{name} {other:.1f}" for name, other in beside.items() if other is not None)
    return f"{value:.1f} %" + (f" ({others})" if others else "")


def _environment(run: Run) -> dict[str, str]:
    logged = [e["environment"] for e in read_log(run.folder / "metrics.jsonl") if "environment" in e]
    rows = {**logged[-1], **logged[-1].get("versions", {})} if logged else {}
    rows.pop("versions", None)
    return {"seed": str(run.recipe.seed), **{key: str(value) for key, value in rows.items()}}


def _cost(run: Run) -> PlanCost:
    recipe = run.recipe
    return plan_cost(recipe, likely_classes(recipe), recipe.train.batch_size // recipe.micro_batches)


def _plan(run: Run, cost: PlanCost) -> Picture:
    caption = (
        f"{run.label}: {run.recipe.method.name}. Boxes are segments, darker with more activations; an arrow is a "
        "unit's gradient, from its loss to the gradient boundary."
    )
    return _picture(plan_figure(cost), caption)


def _curves(runs: Mapping[str, Losses]) -> Iterator[Picture]:
    if len(runs) > 1:
        figure, axes = _axes()
        for (label, losses), color in zip(runs.items(), run_colors(len(runs)), strict=True):
            axes.plot(losses.steps, losses.smooth()[:, -1], color=color, linewidth=1.6, label=label)
        dress(axes, "highest unit of every run", "step", "loss")
        axes.legend(frameon=False)
        yield _picture(figure, "The loss on top of the network, smoothed.")
    for label, losses in runs.items():
        figure, axes = _axes()
        draw_units(figure, axes, losses, label, inside=True)
        yield _picture(figure, f"{label}: the loss of every local unit.")


def _on_the_way(runs: Sequence[Run]) -> Iterator[Picture]:
    """Throughput and learning rate, and scores where they were measured."""
    logs = {run.label: read_log(run.folder / "metrics.jsonl") for run in runs}
    for key, name in (("images_per_second", "images/s"), ("lr", "learning rate")):
        figure, axes = _axes()
        for (label, log), color in zip(logs.items(), run_colors(len(runs)), strict=True):
            points = np.array([(e["step"], e[key]) for e in log if key in e], dtype=float)[1:]
            axes.plot(points[:, 0], points[:, 1], color=color, linewidth=1.2, label=label)
        dress(axes, name, "step", name)
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False)
        yield _picture(figure, f"{name} over the steps.")
    measured = {run.label: found for run in runs if (found := read_scores(run.folder / "metrics.jsonl"))}
    if measured:
        figure = score_curves(measured)
        figure.set_size_inches(_SIZE)
        yield _picture(figure, "Accuracies measured during training.")


def _analyses(runs: Sequence[Run]) -> Iterator[Picture]:
    """What the other tools have left in the run folders."""
    for run in runs:
        for name, caption in ANALYSES.items():
            path = run.folder / "analysis" / f"{name}.png"
            if path.exists():
                image = path.read_bytes()
                width = int.from_bytes(image[16:20], "big")  # of the PNG's header
                yield Picture(_uri(image), f"{run.label}/analysis: {caption}", min(width // 2, 700))


def _axes() -> Any:
    figure = Figure(figsize=_SIZE, layout="constrained")
    return figure, figure.add_subplot()


def _picture(figure: Figure, caption: str) -> Picture:
    width = figure.get_size_inches()[0]
    return Picture(_uri(png(figure, dpi=160)), caption, min(700, int(62 * width)))


def _uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _table(columns: Sequence[Mapping[str, str]]) -> list[tuple[str, list[str]]]:
    """A row for every key of any column."""
    keys = dict.fromkeys(key for column in columns for key in column)
    return [(key, [column.get(key, "-") for column in columns]) for key in keys]


def _differing(columns: Sequence[Mapping[str, str]]) -> list[tuple[str, list[str]]]:
    return [(key, values) for key, values in _table(columns) if len(set(values)) > 1]


def _settings(run: Run) -> dict[str, str]:
    """The recipe, less what always differs."""
    values = recipe_values(loading.to_yaml(run.recipe))
    return {key: str(value) for key, value in values.items() if key not in ("name", "run_dir")}
