"""Pipeline stages with gradient boundaries against DeepSpeed's own 1F1B, measured or simulated.

    python tools/bench_pipeline.py --stages 2 --micro-batches 1,2,4,8 [--json PATH] [--png PATH] [--trace PATH]
    python tools/bench_pipeline.py --simulate --stages 4,8,16,64 --micro-batches 1,4,8 [--spread 0.5] [--lam-lag 1]

Measured: one process a stage, one CPU thread each, ours and 1F1B (end-to-end, on the same segments) in turns. With
fewer cores than stages each stage is given a slower one: all work but messages takes --slowness times its processor
time, the rest of it asleep. Overrun is the share of the time that other work on the cores added to that.
Simulated: forward and input gradients of a segment cost 1, weight gradients 2, a head 0.1, times a number drawn
from 1 - spread .. 1 + spread; one segment a stage. "lam" is GIM whose heads all follow the last stage's weights.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import socket
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from framework.runtime.command import Parser, bounded, status
from framework.runtime.errors import UserError
from framework.runtime.files import write_whole

if TYPE_CHECKING:
    from simulated_pipeline import Row, Stages

    from framework.pipeline.scheduling.schedule import Instruction, Layout
    from framework.pipeline.scheduling.simulation import Duration, Event


def main() -> int:
    """Parse, measure or simulate, print."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", default="2", help="one number, with --simulate several with commas")
    parser.add_argument("--micro-batches", default="1,2,4,8", help="per step, with commas")
    parser.add_argument("--methods", help="with commas; default gim,dgl,loco, with --simulate gim,loco,lam")
    parser.add_argument("--network", default="resnet50", help="any network that can be cut")
    parser.add_argument("--cut", default="stage", type=_cut, help="stage, block, or a number of segments")
    parser.add_argument(
        "--head", choices=("gap", "paper"), default="gap", help="GAP + linear, or the method's own head"
    )
    parser.add_argument("--image-size", type=bounded(int, 1), default=64)
    parser.add_argument(
        "--images", type=bounded(int, 1), default=16, help="in a micro-batch, both views counted"
    )
    parser.add_argument(
        "--rounds", type=bounded(int, 1), default=5, help="measured rounds, after one to warm up"
    )
    parser.add_argument(
        "--slowness", type=bounded(float, 1), help="default: 1.5 x stages / cores, or 1 with a core a stage"
    )
    parser.add_argument("--simulate", action="store_true", help="run no network")
    parser.add_argument(
        "--spread", type=bounded(float, 0, 0.99), default=0.0, help="of simulated costs, below 1"
    )
    parser.add_argument("--lam-lag", type=bounded(int, 0), default=0, help="with --simulate")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--png", type=Path, help="draw the timelines of the last row here")
    parser.add_argument("--trace", type=Path, help="write the last row's trace here, for ui.perfetto.dev")
    arguments = parser.parse_args()

    from simulated_pipeline import simulated

    from framework.pipeline.timeline import draw_timelines, write_trace

    rows, timelines = simulated(arguments) if arguments.simulate else measured(arguments)
    show(rows)
    if arguments.json and arguments.simulate:
        write_whole(arguments.json, json.dumps(rows, indent=1) + "\n")
    ours = list(timelines.values())[-1]
    if arguments.png:
        draw_timelines(timelines, arguments.png, seconds=_length(ours))
    if arguments.trace:
        write_trace(ours, arguments.trace)
    return 0


def _cut(text: str) -> str | int:
    if text in ("stage", "block"):
        return text
    if text.isdecimal() and int(text):
        return int(text)
    raise argparse.ArgumentTypeError(f"{text}: must be stage, block, or a whole number from 1")


def _length(stages: Stages) -> float:
    """Of the shortest row, so that all are full."""
    return min(events[-1].end for events in stages) - min(events[0].start for events in stages)


def show(rows: list[Row]) -> None:
    """Print the rows as a table."""
    table = Table()
    for column in (
        "method",
        "stages",
        "micro-batches",
        "throughput / 1F1B",
        "idle",
        "simulated",
        "1F1B idle",
        "overrun",
    ):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in rows:
        keys = (
            "ratio_throughput",
            "idle_fraction",
            "idle_fraction_simulated",
            "idle_fraction_1f1b",
            "overrun",
        )
        numbers = ("-" if row[key] is None else f"{row[key]:.2f}" for key in keys)
        table.add_row(row["method"], str(row["stages"]), str(row["micro_batches"]), *numbers)
    Console(width=110).print(table)
    if rows[0]["slowness"]:
        print(f"Each stage on a core {rows[0]['slowness']:g} times slower than this machine's.")


def measured(arguments: argparse.Namespace) -> tuple[list[Row], dict[str, Stages]]:
    """Start one process a stage, let both engines take turns, and put the ranks' events together."""
    from simulated_pipeline import numbers
    from slow_cores import slowness

    stages, *more = numbers(arguments.stages)
    if more:
        raise UserError(f"--stages {arguments.stages}: several only with --simulate")
    arguments.slowness = arguments.slowness or slowness(stages)
    methods = (arguments.methods or "gim,dgl,loco").split(",")
    cases = list(product(methods, numbers(arguments.micro_batches)))
    rows, timelines = [], {}
    with _Ranks(stages, arguments) as ranks, Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("measuring", total=len(cases))
        for method, micro_batches in cases:
            for rank in ranks:
                rank.send((method, micro_batches))
            answers = [_answer(rank) for rank in ranks]
            layout = answers[0]["layout"]
            rows.append({**_row(method, micro_batches, layout, answers), "slowness": arguments.slowness})
            first = [[answer[kind][0] for answer in answers] for kind in ("theirs", "ours")]
            names = (
                f"DeepSpeed 1F1B, {micro_batches} micro-batches",
                f"{method}, {micro_batches} micro-batches",
            )
            timelines = dict(zip(names, first, strict=True))
            progress.advance(task)
            if arguments.json:
                write_whole(arguments.json, json.dumps(rows, indent=1) + "\n")
    return rows, timelines


def _row(method: str, micro_batches: int, layout: Layout, answers: list[dict[str, Any]]) -> Row:
    """Medians over the rounds, once the pipeline is full; a period is that of the slowest rank."""
    from framework.pipeline.scheduling.simulation import simulate
    from framework.pipeline.timeline import idle_fraction

    rounds, fill = range(len(answers[0]["ours"])), _fill(layout.placement.stages, micro_batches)

    def periods(kind: str) -> list[float]:
        return [max(_period(answer[kind][i], fill) for answer in answers) for i in rounds]

    def idle(kind: str) -> list[float]:
        return [statistics.median(idle_fraction(answer[kind][i], fill) for i in rounds) for answer in answers]

    ratios = [b / a for a, b in zip(periods("ours"), periods("theirs"), strict=True)]
    predicted = simulate(layout, _measured_costs([answer["ours"] for answer in answers]))
    per_rank = {
        "idle_fraction": idle("ours"),
        "idle_fraction_simulated": [1 - u for u in predicted.utilization()],
        "idle_fraction_1f1b": idle("theirs"),
    }
    return {
        "method": method,
        "stages": layout.placement.stages,
        "micro_batches": micro_batches,
        "ratio_throughput": statistics.median(ratios),
        **{key: statistics.mean(values) for key, values in per_rank.items()},
        **{f"{key}_per_rank": values for key, values in per_rank.items()},
        "overrun": max(answer["overrun"] for answer in answers),
        "seconds_per_step": statistics.median(periods("ours")),
        "seconds_per_step_1f1b": statistics.median(periods("theirs")),
        "ratios": ratios,
    }


def _fill(stages: int, micro_batches: int) -> int:
    """Steps until the slowest stage holds back all others: before that they run ahead, and would look busy."""
    from framework.pipeline.scheduling.simulation import AHEAD

    return 1 + -(-(stages - 1) * (1 + AHEAD) // micro_batches)


def _period(events: Sequence[Event], fill: int) -> float:
    from framework.pipeline.timeline import window

    begin, end, steps = window(events, fill)
    return (end - begin) / steps


def _measured_costs(ranks: list[list[list[Event]]]) -> Duration:
    """What each instruction took on each stage: the median over steps and rounds, messages nothing."""
    taken: dict[tuple[int, type[Instruction], int | None], list[float]] = defaultdict(list)
    for stage, rounds in enumerate(ranks):
        for event in (event for events in rounds for event in events):
            taken[stage, *_kind(event.instruction)].append(event.end - event.start)
    costs = {key: statistics.median(seconds) for key, seconds in taken.items()}

    def duration(stage: int, instruction: Instruction) -> float:
        messages = type(instruction).__name__.startswith(("Send", "Receive"))
        return 0.0 if messages else costs[stage, *_kind(instruction)]

    return duration


def _kind(instruction: Instruction) -> tuple[type[Instruction], int | None]:
    fields = instruction.kwargs
    return type(instruction), fields.get("segment", fields.get("after"))


class _Ranks:
    """One process a stage, each with its end of a pipe; gone afterwards."""

    def __init__(self, stages: int, arguments: argparse.Namespace) -> None:
        import stock_pipeline  # noqa: F401  # once for all ranks

        context = mp.get_context("fork")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._processes, self._pipes = [], []
        for rank in range(stages):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, rank, stages, port, arguments), daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def __enter__(self) -> list[Any]:
        return self._pipes

    def __exit__(self, *error: object) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def _answer(rank: Any) -> dict[str, Any]:
    try:
        return rank.recv()
    except EOFError:
        sys.exit("a rank died; its message is above")


def _serve(pipe: Any, rank: int, stages: int, port: int, arguments: argparse.Namespace) -> None:
    import torch

    from framework.runtime import joining
    from framework.runtime.launch import LAUNCH_VARIABLES

    values = (rank, stages, rank, "127.0.0.1", port)
    os.environ.update(zip(LAUNCH_VARIABLES, map(str, values), strict=True))
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)
    joining.start()
    while True:
        method, micro_batches = pipe.recv()
        pipe.send(_compare(method, micro_batches, stages, arguments))


def _compare(method: str, micro_batches: int, stages: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """This rank's events of every round: ours, and 1F1B on the same segments."""
    from functools import partial

    from slow_cores import SlowCore
    from stock_pipeline import OneForwardOneBackward, batches_of, network, placement

    from framework.config.recipe import Pipeline
    from framework.engines import EngineSettings
    from framework.optim import build_optimizer
    from framework.pipeline.engine import PipelinedEngine

    optimizer = partial(build_optimizer, name="sgd")
    net = network(method, arguments)
    end_to_end = network("bp" if net.plan.supervised else "simclr", arguments)
    batches = batches_of(net, micro_batches, arguments)
    spread = placement(end_to_end, batches[0], stages)
    settings = EngineSettings(micro_batches * arguments.images // net.plan.views, micro_batches, zero_stage=0)
    ours = PipelinedEngine(net, optimizer, settings, spread, Pipeline(stages=stages))
    theirs = OneForwardOneBackward(end_to_end, optimizer, spread, batches)
    steps = _fill(stages, micro_batches) + 1 + -(-4 // micro_batches)
    found: dict[str, Any] = {"ours": [], "theirs": [], "layout": ours.layout}
    overrun = time = 0.0
    for round_ in range(1 + arguments.rounds):
        ours.events = own = SlowCore(arguments.slowness)
        for _ in range(steps):
            ours.step(batches if ours.loads else [], lambda: 1e-3)
        ours.whole_net()  # waits until all ranks have come to the end
        events = SlowCore(arguments.slowness)
        theirs.run(steps, events)
        if round_:
            found["ours"].append(list(own))
            found["theirs"].append(list(events))
            overrun += own.overrun + events.overrun
            time += sum(e[-1].end - e[0].start for e in (own, events))
    ours.close()
    theirs.close()
    return {**found, "overrun": overrun / time}


if __name__ == "__main__":
    sys.exit(status(main))
