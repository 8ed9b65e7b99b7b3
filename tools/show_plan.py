"""What trains what: a recipe's segments and local units, their cost, and a picture, before anything is trained.

    python tools/show_plan.py recipes/quickstart.yaml [key=value ...] [--json PATH] [--png PATH]

Parameters, FLOPs and activations are counted with tensors that have no values; nothing is computed or loaded.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from framework import config
from framework.config import Recipe
from framework.cost import PlanCost, plan_cost
from framework.errors import UserError
from framework.plan_picture import draw_plan

CLASSES = 1000  # where neither the recipe nor its data say


def main() -> int:
    """Parse, count, print; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help="a file such as recipes/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as method.window=3")
    parser.add_argument("--json", type=Path, help="write segments, units and the memory saving here")
    parser.add_argument("--png", type=Path, help="draw the plan here")
    arguments = parser.parse_intermixed_args()
    try:
        recipe = config.load([arguments.recipe, "data.path=unused", *arguments.overrides])
        classes = 10 if recipe.data.source == "digits" else recipe.data.num_classes or CLASSES
        cost = plan_cost(recipe, classes, recipe.train.batch_size // recipe.train.accumulation)
        show(recipe, cost)
        if arguments.json:
            arguments.json.write_text(json.dumps(cost.as_dict(), indent=1) + "\n")
        if arguments.png:
            draw_plan(cost, arguments.png, f"{recipe.name}: {recipe.method.name} on {recipe.network.name}")
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def show(recipe: Recipe, cost: PlanCost) -> None:
    """Print both tables and the memory line."""
    console = Console(width=110)
    segments = Table(title=f"{recipe.network.name}: {len(cost.segments)} segments")
    units = Table(title=f"{recipe.method.name}: {len(cost.units)} local units")
    for table, columns in (
        (segments, ("segment", "parameters", "forward GFLOP", "activations MiB")),
        (units, ("unit", "window", "head", "parameters", "forward GFLOP", "activations MiB", "weight")),
    ):
        for column in columns:
            left = column in ("segment", "unit", "window", "head")
            table.add_column(column, justify="left" if left else "right")
    for s in cost.segments:
        segments.add_row(
            s.name, f"{s.parameters:,}", f"{s.flops / 1e9:.2f}", f"{s.activation_bytes / 2**20:.1f}"
        )
    for u in cost.units:
        window = " ".join(s.name for s in cost.segments[u.first : u.last + 1][:3])
        window += f" .. {cost.segments[u.last].name}" if u.last - u.first > 2 else ""
        sizes = f"{u.parameters:,}", f"{u.flops / 1e9:.2f}", f"{u.activation_bytes / 2**20:.1f}"
        units.add_row(u.name, window, u.head, *sizes, f"{u.weight:g}")
    console.print(segments)
    console.print(units)
    console.print(
        f"At {cost.images} images of {recipe.data.image_size} px: peak activations "
        f"{cost.peak_activation_bytes / 2**20:.1f} MiB, end-to-end {cost.end_to_end_activation_bytes / 2**20:.1f} MiB, "
        f"so {cost.memory_saving:.2f}x less memory for activations.",
        highlight=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    sys.exit(main())
