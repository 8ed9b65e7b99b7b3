"""What a finished run leaves: scores beside their baselines, the loss curves, the backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from framework.analysis.curves import loss_curves
from framework.analysis.neighbors import neighbors_picture
from framework.checkpoints import snapshot
from framework.config.recipe import Recipe
from framework.data.splits import Splits
from framework.engines import Engine
from framework.evaluation.scoring import score
from framework.runtime import distributed
from framework.runtime.files import write_whole
from framework.tracking import metrics


def leave_results(recipe: Recipe, engine: Engine, splits: Splits, run: dict[str, Any]) -> dict[str, Any]:
    """Evaluate, print the scores and write ``result.json``, pictures and ``backbone.safetensors``.

    Args:
        recipe: of the run.
        engine: holds the trained network.
        splits: images to score on.
        run: what the training loop measured.

    Returns:
        What ``result.json`` holds.
    """
    run_dir = Path(recipe.run_dir)
    # Before the scores, which may fail over an image.
    snapshot.export_backbone(engine, run_dir / "backbone.safetensors")
    net = engine.whole_net()
    scores = score(recipe, net, splits)
    scored = splits.labeled and recipe.evaluate.knn
    picture = neighbors_picture(recipe, net, splits) if scored else b""
    result = {
        "name": recipe.name,
        "method": recipe.method.name,
        "network": recipe.network.name,
        **{key: round(value, 4) for key, value in scores.items()},
        **run,
        "train_images": len(splits.train),
        "peak_memory_bytes": metrics.peak_memory_bytes(distributed.device()),
        "seed": recipe.seed,
        **metrics.environment(distributed.world_size(), distributed.device()),
    }
    with distributed.same_outcome():
        if distributed.is_main():
            title = f"{recipe.name}: {recipe.method.name} on {recipe.network.name}"
            loss_curves(run_dir / "metrics.jsonl", run_dir / "loss_curves.png", title)
            if picture:
                write_whole(run_dir / "neighbors.png", picture)
            metrics.write_result(run_dir / "result.json", result)
            show(scores, result, run_dir)
    return result


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
