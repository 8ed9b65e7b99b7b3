"""The half of ``bench_pipeline.py`` that runs no network: schedules against a clock, up to any number of stages."""

from __future__ import annotations

import argparse
import random
import statistics
from itertools import product
from typing import Any

from framework.execution.program import segment_programs
from framework.local import LocalUnit, Plan, sliding_windows
from framework.local.head import Head
from framework.pipeline.scheduling.placement import Costs, balanced
from framework.pipeline.scheduling.schedule import Layout
from framework.pipeline.scheduling.simulation import Event, Simulation, costs_of, simulate
from framework.runtime.errors import UserError

Row = dict[str, Any]
Stages = list[list[Event]]


def numbers(text: str) -> list[int]:
    """Those of a list with commas.

    Raises:
        UserError: one is no whole number above 0.
    """
    found = [int(number) if number.strip().isdecimal() else 0 for number in text.split(",")]
    if not all(found):
        raise UserError(f"{text}: must be whole numbers from 1, with commas")
    return found


def simulated(arguments: argparse.Namespace) -> tuple[list[Row], dict[str, Stages]]:
    """Every method on every number of stages and micro-batches."""
    rows, timelines = [], {}
    methods = (arguments.methods or "gim,loco,lam").split(",")
    if unknown := set(methods) - {"gim", "loco", "lam"}:
        raise UserError(f"--methods {min(unknown)}: with --simulate one of gim, loco, lam")
    for stages, micro_batches in product(numbers(arguments.stages), numbers(arguments.micro_batches)):
        end_to_end = _simulation("bp", stages, micro_batches, arguments)
        for method in methods:
            ran = _simulation(method, stages, micro_batches, arguments)
            idle = [1 - u for u in ran.utilization()]
            rows.append(
                {
                    "method": method,
                    "stages": stages,
                    "micro_batches": micro_batches,
                    "ratio_throughput": end_to_end.period() / ran.period(),
                    "idle_fraction": None,
                    "idle_fraction_simulated": statistics.mean(idle),
                    "idle_fraction_1f1b": 1 - statistics.mean(end_to_end.utilization()),
                    "idle_fraction_simulated_per_rank": idle,
                    "overrun": None,
                    "slowness": None,
                }
            )
            timelines = {"1F1B": _all_events(end_to_end), method: _all_events(ran)}
    return rows, timelines


def _all_events(ran: Simulation) -> Stages:
    return [list(events) for events in ran.events]


def _simulation(method: str, stages: int, micro_batches: int, arguments: argparse.Namespace) -> Simulation:
    length = {"bp": stages, "loco": min(2, stages)}.get(method, 1)
    units = [LocalUnit(str(last), first, last, Head()) for first, last in sliding_windows(stages, length)]
    plan = Plan(tuple(units), stages)
    reads = frozenset((stage, stages - 1) for stage in range(stages - 1) if method == "lam")
    layout = Layout(
        segment_programs(plan),
        balanced([1.0] * stages, stages),
        micro_batches,
        reads,
        lam_lag=arguments.lam_lag,
    )
    draw = random.Random(0)
    factors = [draw.uniform(1 - arguments.spread, 1 + arguments.spread) for _ in range(stages)]
    heads = [0.1 * factors[unit.last] for unit in units]
    costs = Costs(tuple(factors), tuple(factors), tuple(2 * f for f in factors), tuple(heads))
    return simulate(layout, costs_of(layout, costs))
