"""What trains what: a recipe's segments and local units, their cost, and a picture, before anything is trained.

    python tools/show_plan.py recipes/quickstart.yaml [key=value ...] [--json PATH] [--png PATH]
    python tools/show_plan.py recipes/quickstart.yaml --ranks 8
    python tools/show_plan.py --list                    all recipes, one line each

With ``pipeline.stages=N`` also which stage gets what, and how busy each will be if time goes as FLOPs do. With
``--ranks`` also what every rank holds and sends under ddp, DeepSpeed's ZeRO and fsdp.
Parameters, FLOPs and activations are counted with tensors that have no values; nothing is computed or loaded.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from framework.config import loading
from framework.config.recipe import Recipe
from framework.cost import readable
from framework.runtime.command import Parser, bounded, status
from framework.runtime.files import write_whole

if TYPE_CHECKING:
    from framework.cost.counting import PlanCost
    from framework.cost.ranks import RankCost
    from framework.pipeline.scheduling.balance import StageForecast

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
FOLDERS = ("", "cifar10", "stl10", "svhn")  # of recipes that can be trained; the others hold what these share


def main() -> None:
    """Parse, count, print."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", help="a file such as recipes/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as method.window=3")
    parser.add_argument("--list", action="store_true", help="list all recipes")
    parser.add_argument(
        "--ranks", type=bounded(int, 1), help="among which the batch is split: memory and traffic of each"
    )
    parser.add_argument("--json", type=Path, help="write segments, units and the memory saving here")
    parser.add_argument("--png", type=Path, help="draw the plan here")
    arguments = parser.parse_intermixed_args()
    if arguments.list:
        list_recipes()
        return
    if arguments.recipe is None:
        parser.error("name a recipe, or --list")
    named = any(text.startswith("data.path=") for text in arguments.overrides)
    recipe = loading.load([arguments.recipe, *arguments.overrides, *([] if named else ["data.path=unused"])])

    from framework.cost.counting import likely_classes, plan_cost
    from framework.cost.plan_picture import draw_plan
    from framework.cost.ranks import rank_costs
    from framework.model import recipe_network
    from framework.pipeline.scheduling.balance import stage_forecast

    classes = likely_classes(recipe)
    cost = plan_cost(recipe, classes, recipe.train.batch_size // recipe.micro_batches)
    stages = stage_forecast(recipe, recipe_network(recipe, classes), cost) if recipe.pipelined else []
    ranks = rank_costs(recipe, classes, arguments.ranks) if arguments.ranks else []
    show(recipe, cost)
    if stages:
        show_stages(recipe, stages)
    if ranks:
        show_ranks(recipe, ranks, arguments.ranks)
    if arguments.json:
        content = cost.as_dict() | ({"stages": [asdict(stage) for stage in stages]} if stages else {})
        content |= {"ranks": [asdict(rank) | {"memory": rank.memory} for rank in ranks]} if ranks else {}
        write_whole(arguments.json, json.dumps(content, indent=1) + "\n")
    if arguments.png:
        draw_plan(cost, arguments.png, f"{recipe.name}: {recipe.method.name} on {recipe.network.name}")


def list_recipes() -> None:
    """Print every recipe with the first line of its comment."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # ends quietly when piped into head
    paths = [path for folder in FOLDERS for path in sorted((RECIPES / folder).glob("*.yaml"))]
    comments = [path.read_text().partition("\n")[0].removeprefix("#").strip() for path in paths]
    print("\n".join(f"{p.relative_to(RECIPES.parent)}: {c}" for p, c in zip(paths, comments, strict=True)))


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _saving(ratio: float) -> str:
    return f"{ratio:.2f}x less" if ratio >= 1 else f"{1 / ratio:.2f}x more"


def show(recipe: Recipe, cost: PlanCost) -> None:
    """Print both tables and the memory line."""
    console = Console(width=110)
    segments, units = cost.segments, cost.units
    flop, segment_flops = readable.column([s.flops for s in segments], readable.FLOPS)
    size, segment_sizes = readable.column([s.activation_bytes for s in segments], readable.BYTES)
    table = _table(
        f"{recipe.network.name}: {_counted(len(segments), 'segment')}",
        ("segment",),
        ("parameters", f"forward {flop}", f"activations {size}"),
    )
    for s, *sizes in zip(segments, segment_flops, segment_sizes, strict=True):
        table.add_row(s.name, f"{s.parameters:,}", *sizes)
    console.print(table)
    flop, unit_flops = readable.column([u.flops for u in units], readable.FLOPS)
    size, unit_sizes = readable.column([u.activation_bytes for u in units], readable.BYTES)
    table = _table(
        f"{recipe.method.name}: {_counted(len(units), 'local unit')}",
        ("unit", "window", "head"),
        ("parameters", f"forward {flop}", f"activations {size}", "weight"),
    )
    for u, *sizes in zip(units, unit_flops, unit_sizes, strict=True):
        window = " ".join(s.name for s in segments[u.first : u.last + 1][:3])
        window += f" .. {segments[u.last].name}" if u.last - u.first > 2 else ""
        table.add_row(u.name, window, u.head, f"{u.parameters:,}", *sizes, f"{u.weight:g}")
    console.print(table)
    recompute = recipe.execution.recompute
    again = "" if recompute == "none" else f" with execution.recompute={recompute}"
    console.print(
        f"At {cost.images} views of {recipe.data.image_size} px: peak activations "
        f"{readable.text(cost.peak_activation_bytes, readable.BYTES)}{again}, end-to-end "
        f"{readable.text(cost.end_to_end_activation_bytes, readable.BYTES)}, "
        f"so {_saving(cost.memory_saving)} memory for activations.",
        highlight=False,
        soft_wrap=True,
    )
    if (teacher := cost.teacher) is not None:
        console.print(
            f"Its teacher: averages of {teacher.parameters:,} parameters "
            f"({readable.text(teacher.weight_bytes, readable.BYTES)}), forward "
            f"{readable.text(sum(teacher.flops), readable.FLOPS)}, features of a segment up to "
            f"{readable.text(teacher.feature_bytes, readable.BYTES)}.",
            highlight=False,
            soft_wrap=True,
        )


def _table(title: str, texts: Sequence[str], numbers: Sequence[str]) -> Table:
    table = Table(title=title)
    for name in texts:
        table.add_column(name)
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def show_stages(recipe: Recipe, stages: Sequence[StageForecast]) -> None:
    """Print what each pipeline stage has and how busy it will be."""
    console, pipeline = Console(width=110), recipe.pipeline
    balance = f"balance={pipeline.balance}" if isinstance(pipeline.balance, str) else "as listed"
    flop, flops = readable.column([stage.flops for stage in stages], readable.FLOPS)
    table = _table(
        f"{len(stages)} pipeline stages, {balance}, {recipe.micro_batches} micro-batch(es) a step",
        ("stage", "segments"),
        ("parameters", f"{flop} a micro-batch", "reads stage", "utilization"),
    )
    for number, (stage, work) in enumerate(zip(stages, flops, strict=True)):
        names = stage.segments if len(stage.segments) < 4 else (stage.segments[0], "..", stage.segments[-1])
        reads = ", ".join(map(str, stage.reads)) or "-"
        sizes = f"{stage.parameters:,}", work, reads, f"{stage.utilization:.2f}"
        table.add_row(str(number), " ".join(names), *sizes)
    console.print(table)
    mean = sum(stage.utilization for stage in stages) / len(stages)
    console.print(
        f"Predicted utilization {mean:.2f}, {stages[0].speedup:.2f}x the throughput of end-to-end 1F1B on the same "
        "stages, if time goes as FLOPs do and messages are free.",
        highlight=False,
        soft_wrap=True,
    )
    if pipeline.balance == "time":
        console.print("balance=time measures at the start of a run; here FLOPs stand in.", highlight=False)


def show_ranks(recipe: Recipe, costs: Sequence[RankCost], ranks: int) -> None:
    """Print what each rank has and sends under every engine."""
    columns = {
        "weights": [cost.weights for cost in costs],
        "gradients": [cost.gradients for cost in costs],
        "optimizer": [cost.optimizer for cost in costs],
        "gathered": [cost.gathered for cost in costs],
        "activations": [cost.activations for cost in costs],
        "together": [cost.memory for cost in costs],
        "sent a step": [cost.sent for cost in costs],
    }
    if recipe.sharding.offload:
        columns["in host memory"] = [cost.host for cost in costs]
    size, texts = readable.column([n for numbers in columns.values() for n in numbers], readable.BYTES)
    images = recipe.train.batch_size // (ranks * recipe.micro_batches)
    split = f"{_counted(ranks, 'rank')}, {_counted(images, 'image')} each in a micro-batch"
    table = _table(
        f"{split}, optim.name={recipe.optim.name}: {size} a rank",
        ("engine", "training"),
        tuple(columns),
    )
    for number, cost in enumerate(costs):
        table.add_row(cost.engine, cost.training, *texts[number :: len(costs)])
    Console(width=110).print(table)


if __name__ == "__main__":
    sys.exit(status(main))
