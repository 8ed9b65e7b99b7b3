"""The results of a finished run: scores beside their baselines, loss curves, the backbone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from framework.analysis.curves import loss_curves
from framework.analysis.neighbors import neighbors_picture
from framework.checkpoints.snapshot import export_backbone
from framework.config.recipe import Recipe
from framework.data.splits import Splits
from framework.engines import Engine
from framework.evaluation.features import averaged
from framework.evaluation.scoring import score
from framework.runtime import distributed
from framework.runtime.files import read_object, write_whole
from framework.tracking.metric_log import read_log, write_result
from framework.training.engine_choice import untrained


def leave_results(
    recipe: Recipe, engine: Engine, splits: Splits, run: Mapping[str, Any], check: Callable[[], None]
) -> None:
    """Evaluate, print the scores and write ``result.json``, pictures and ``backbone.safetensors``.

    Args:
        recipe: of the run.
        engine: holds the trained network.
        splits: images to score on.
        run: what the training loop measured.
        check: raises if another process has the run's folder.

    Raises:
        UserError: by ``check``; images that can't be scored on, files that can't be written.
    """
    run_dir = Path(recipe.run_dir)
    # Before the scores, which may fail over an image.
    views = {"mean": recipe.views.mean, "std": recipe.views.std}
    about = {"network": recipe.network.name, "views": views}
    with distributed.same_outcome():
        check()
    export_backbone(engine, run_dir / "backbone.safetensors", about)
    with averaged(engine.whole_net()) as net:
        scores = score(recipe, net, splits, lambda: untrained(recipe, splits.num_classes))
        scored = splits.labeled and recipe.evaluate.knn
        picture = neighbors_picture(recipe, net, splits) if scored else b""
    with distributed.same_outcome():
        if distributed.is_main():
            result = {
                "name": recipe.name,
                "method": recipe.method.name,
                "network": recipe.network.name,
                **{key: round(value, 4) for key, value in scores.items()},
                **_measured(run_dir, run),
                "train_images": len(splits.train),
                "seed": recipe.seed,
                **_environment(run_dir),
            }
            check()
            title = f"{recipe.name}: {recipe.method.name} on {recipe.network.name}"
            write_whole(run_dir / "loss_curves.png", loss_curves(run_dir / "metrics.jsonl", title))
            if picture:
                write_whole(run_dir / "neighbors.png", picture)
            write_result(run_dir / "result.json", result)
            show(scores, result, run_dir)


def _measured(run_dir: Path, run: Mapping[str, Any]) -> dict[str, Any]:
    """What the loop measured. Checkpoints of older versions don't tell a start without steps of speed and memory."""
    path = run_dir / "result.json"
    if run["images_per_second"] or not path.exists():
        return dict(run)
    before = read_object(path)
    measured = ("images_per_second", "loader_wait", "mfu", "peak_memory_bytes")
    kept = {key: before[key] for key in measured if key in before}
    return {**run, **kept} if before["steps"] == run["steps"] else dict(run)


def _environment(run_dir: Path) -> dict[str, Any]:
    """That of the last start that made steps."""
    starts = [entry["environment"] for entry in read_log(run_dir / "metrics.jsonl") if "environment" in entry]
    return {key: value for key, value in starts[-1].items() if key not in ("started", "job")}


def show(scores: dict[str, float], result: dict[str, Any], run_dir: Path) -> None:
    """Print the scores as a table, and where everything is."""
    table = Table()
    table.add_column("top-1 in %")
    columns = {"": "trained", "_untrained": "untrained", "_pixels": "raw pixels"}
    for column in columns.values():
        table.add_column(column, justify="right")
    for key, label in (("knn_top1", "k-NN"), ("linear_top1", "linear probe"), ("test_top1", "classifier")):
        if key in scores:
            cells = (f"{scores[key + c]:.1f}" if key + c in scores else "-" for c in columns)
            table.add_row(label, *cells)
    console = Console()
    if scores:
        console.print(f"{result['name']}, scored on the held-out split:", highlight=False)
        console.print(table)
    console.print(
        f"{result['steps']} steps, {result['images_per_second']:.0f} images/s; "
        f"recipe, metrics, curves, checkpoint and backbone are in {run_dir}",
        highlight=False,
        soft_wrap=True,
    )
