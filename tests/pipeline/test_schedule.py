"""Schedules of pipeline stages, without a process: order, deadlocks, memory, waiting."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from itertools import product

import pytest

from framework.execution.program import InputGradient, WeightGradient, segment_programs
from framework.pipeline.scheduling.placement import Costs, Placement, balanced
from framework.pipeline.scheduling.schedule import (
    Contrast,
    Forward,
    Heads,
    Instruction,
    Layout,
    OptimizerStep,
    ReceiveActivation,
    ReceiveCotangents,
    ReceiveWeights,
    SendActivation,
    SendCotangents,
    SendWeights,
    Walk,
    all_instructions,
    step_instructions,
)
from framework.pipeline.scheduling.simulation import Deadlock, Duration, Event, costs_of, simulate
from tests.support.plans import named_plan, unit_costs

STEPS = 4


def layouts() -> Iterator[Layout]:
    """Windows of all kinds, deep and shallow stages, few and many micro-batches, copies that follow, both contrasts."""
    for name, stages, per_stage, micro_batches in product(
        ("bp", "gim", "loco", "mlaan-3"), (1, 2, 3, 5), (1, 2), (1, 2, 5)
    ):
        segments = stages * per_stage
        placement = balanced([1.0] * segments, stages)
        programs = segment_programs(named_plan(name, segments))
        reads = frozenset((k, min(k + 2, stages - 1)) for k in range(stages - 1))
        yield Layout(programs, placement, micro_batches)
        yield Layout(programs, placement, micro_batches, contrast_batch=True)
        for lag in (0, 2):
            yield Layout(programs, placement, micro_batches, reads, lam_lag=lag)


def channel(stage: int, instruction: Instruction) -> tuple[str, int, int] | None:
    """(kind, from, to), spelled out once more, independently of the simulation."""
    match instruction:
        case SendActivation() | ReceiveCotangents():
            return ("down" if isinstance(instruction, SendActivation) else "up", stage, stage + 1)
        case ReceiveActivation() | SendCotangents():
            return ("down" if isinstance(instruction, ReceiveActivation) else "up", stage - 1, stage)
        case SendWeights(reader):
            return ("weights", reader, stage)
        case ReceiveWeights(owner):
            return ("weights", stage, owner)
    return None


def test_both_sides_of_every_edge_agree_on_the_order() -> None:
    for layout in layouts():
        sent, received = defaultdict(list), defaultdict(list)
        for stage in range(layout.placement.stages):
            for instruction in all_instructions(layout, stage, STEPS):
                where = channel(stage, instruction)
                message = tuple(v for k, v in instruction.kwargs.items() if k not in ("reader", "owner"))
                if where and type(instruction).__name__.startswith("Send"):
                    sent[where].append(message)
                elif where:
                    received[where].append(message)
        assert sent == received


@pytest.mark.parametrize("ahead", [1, 2])
def test_nobody_waits_for_ever(ahead: int) -> None:
    """Whatever the pieces cost."""
    for layout in layouts():
        ran = simulate(layout, lambda stage, what: (1 + stage * 7 % 3) * len(what.kwargs), STEPS, ahead)
        for stage, events in enumerate(ran.events):
            assert [e.instruction for e in events] == list(all_instructions(layout, stage, STEPS))


def test_a_message_that_never_comes_is_named() -> None:
    layout = Layout(segment_programs(named_plan("bp", 2)), Placement((0, 1, 2)), 1)
    silent = Layout(segment_programs(named_plan("gim", 2)), Placement((0, 1, 2)), 1)
    mixed = {0: layout, 1: silent}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "framework.pipeline.scheduling.simulation.all_instructions",
            lambda _, stage, steps: all_instructions(mixed[stage], stage, steps),
        )
        with pytest.raises(Deadlock, match="stage 0 at ReceiveCotangents"):
            simulate(layout, lambda *_: 1.0, 2)


def test_every_piece_of_work_is_done_once_by_the_owner_and_in_order() -> None:
    for layout in layouts():
        for stage in range(layout.placement.stages):
            instructions = list(step_instructions(layout, stage, 9))
            assert isinstance(instructions[-1], OptimizerStep)
            span = layout.placement.span(stage)
            for micro_batch in range(layout.micro_batches):
                done: list[object] = []
                for instruction in instructions:
                    if instruction.kwargs.get("micro_batch") != micro_batch:
                        continue
                    if isinstance(instruction, Forward):
                        done.append(instruction.segment)
                    elif isinstance(instruction, Walk):
                        walk = layout.programs[instruction.after].walk
                        done += [work for work in walk if work.segment in span]
                work = [w for program in layout.programs for w in program.walk if w.segment in span]
                assert sorted(map(repr, done)) == sorted(map(repr, [*span, *work]))
                released = [w.segment for w in done if isinstance(w, WeightGradient)]
                assert sorted(released) == list(span)
                for w in done:
                    if isinstance(w, InputGradient | WeightGradient):
                        assert done.index(w.segment) < done.index(w)
                        assert all(
                            done.index(w) <= done.index(r)
                            for r in done
                            if isinstance(r, WeightGradient) and r.segment == w.segment
                        )


def test_memory_is_bounded_by_the_window() -> None:
    """No more micro-batches have graphs in a stage than stages above it are spanned by its windows, and one."""
    for layout in layouts():
        if layout.contrast_batch:
            continue
        for stage in range(layout.placement.stages):
            alive: set[tuple[int, int]] = set()
            for instruction in all_instructions(layout, stage, 3):
                if isinstance(instruction, Forward):
                    alive.add((instruction.micro_batch, instruction.segment))
                elif isinstance(instruction, Walk):
                    for work in layout.programs[instruction.after].walk:
                        if isinstance(work, WeightGradient):
                            alive.discard((instruction.micro_batch, work.segment))
                assert len({b for b, _ in alive}) <= layout.reach(stage) + 1
            assert not alive
        top = layout.placement.stages - 1
        for stage in range(top + 1):
            last = layout.placement.span(stage)[-1]
            spanned = [
                s for s in range(last + 1, len(layout.programs)) if layout.programs[s].crossing(last + 1)
            ]
            furthest = layout.placement.stage_of(spanned[-1]) - stage if spanned else 0
            assert layout.reach(stage) == furthest


def test_a_stage_runs_ahead_by_no_more_than_the_bound() -> None:
    """GIM waits for nothing: a first stage that is quick is held back by what the second has not taken."""
    layout = Layout(segment_programs(named_plan("gim", 2)), Placement((0, 1, 2)), 2)
    duration: Duration = lambda stage, what: 10.0 * stage if isinstance(what, Forward) else 0.0  # noqa: E731
    for ahead in (1, 2, 5):
        ran = simulate(layout, duration, STEPS, ahead)
        sends = [e.end for e in ran.events[0] if isinstance(e.instruction, SendActivation)]
        taken = [e.end for e in ran.events[1] if isinstance(e.instruction, ReceiveActivation)]
        for time in [0.0, *taken]:
            assert sum(s <= time for s in sends) - sum(t <= time for t in taken) <= ahead


def test_one_window_over_everything_is_deepspeeds_1f1b() -> None:
    from deepspeed.runtime.pipe import schedule as deepspeed

    for stages, micro_batches in product((1, 2, 3, 4, 8), (1, 2, 4, 7)):
        layout = Layout(
            segment_programs(named_plan("bp", stages)), balanced([1.0] * stages, stages), micro_batches
        )
        for stage in range(stages):
            ours = [
                ("forward" if isinstance(i, Forward) else "backward", i.micro_batch)
                for i in step_instructions(layout, stage, 0)
                if isinstance(i, Forward | Walk)
            ]
            buffers = deepspeed.TrainSchedule(micro_batches, stages, stage)
            theirs, counts = [], {"forward": 0, "backward": 0}
            for instructions in buffers:
                for i in instructions:
                    if isinstance(i, deepspeed.ForwardPass | deepspeed.BackwardPass):
                        kind = "forward" if isinstance(i, deepspeed.ForwardPass) else "backward"
                        theirs.append((kind, counts[kind]))
                        counts[kind] += 1
            assert ours == theirs


@pytest.mark.parametrize(
    ("stages", "micro_batches", "bp", "loco", "gim"),
    [(4, 8, 0.73, 0.97, 1.3), (8, 4, 0.37, 1.9, 2.6), (16, 8, 0.35, 2.0, 2.8)],
)
def test_the_bubble_does_not_grow_with_depth(
    stages: int, micro_batches: int, bp: float, loco: float, gim: float
) -> None:
    """Utilization of 1F1B, and the throughput of LoCo and GIM against it, on stages of equal cost."""
    ran = {}
    for name in ("bp", "loco", "gim"):
        layout = Layout(
            segment_programs(named_plan(name, stages)), balanced([1.0] * stages, stages), micro_batches
        )
        ran[name] = simulate(layout, costs_of(layout, unit_costs(stages)))
    assert ran["bp"].utilization()[0] == pytest.approx(bp, abs=0.03)
    assert ran["bp"].period() / ran["loco"].period() == pytest.approx(loco, rel=0.08)
    assert ran["bp"].period() / ran["gim"].period() == pytest.approx(gim, rel=0.08)
    assert ran["gim"].utilization() == pytest.approx([1.0] * stages)


def test_steps_are_not_flushed() -> None:
    """GIM on equal stages: nobody waits once the pipeline is full, whatever the depth; T steps and the fill."""
    for stages, micro_batches in product((2, 4, 16), (1, 4)):
        layout = Layout(
            segment_programs(named_plan("gim", stages)), balanced([1.0] * stages, stages), micro_batches
        )
        ran = simulate(layout, costs_of(layout, unit_costs(stages)), 10)
        work = 10 * micro_batches * (1 + 0.1 + 2)
        assert ran.events[0][-1].end == pytest.approx(work)
        assert ran.events[-1][-1].end == pytest.approx(work + (stages - 1) * 1)


def test_copies_that_follow_cost_nothing_until_the_owner_is_more_than_a_step_behind() -> None:
    stages = 6
    programs = segment_programs(named_plan("gim", stages))

    def period(micro_batches: int, lag: int, reads: set[tuple[int, int]]) -> float:
        layout = Layout(
            programs, balanced([1.0] * stages, stages), micro_batches, frozenset(reads), lam_lag=lag
        )
        return simulate(layout, costs_of(layout, unit_costs(stages)), 40).period() / micro_batches

    far, near = {(0, stages - 1)}, {(0, 1)}
    free = period(1, 0, set())
    assert period(1, 0, near) == pytest.approx(free)
    # Step t + 1 begins when the owner has done step t - 1, five forwards after it began here.
    assert period(1, 0, far) == pytest.approx((5 * 1.0 + free) / 2)
    assert period(1, 1, far) == pytest.approx(free)
    assert period(1, 4, far) == pytest.approx(free) and period(8, 0, far) == pytest.approx(free)


def test_contrast_over_the_whole_batch_comes_after_all_heads_and_before_all_walks() -> None:
    layout = Layout(segment_programs(named_plan("loco", 4)), Placement((0, 2, 4)), 3, contrast_batch=True)
    for stage in range(2):
        kinds = [type(i) for i in step_instructions(layout, stage, 0)]
        cut = kinds.index(Contrast)
        assert Walk not in kinds[:cut] and not {Heads, Forward} & set(kinds[cut:])


def test_the_work_of_a_segment_is_counted_once() -> None:
    """LoCo on three segments: what each does, added up by hand."""
    costs = Costs((1, 10, 100), (2, 20, 200), (4, 40, 400), (0.1, 0.2))
    per_segment = costs.per_segment(segment_programs(named_plan("loco", 3)))
    assert per_segment == pytest.approx([1 + 4, 10 + 0.1 + 20 + 40, 100 + 0.2 + 400])


def busy(events: tuple[Event, ...]) -> float:
    return sum(event.end - event.start for event in events)


def test_simulated_work_is_the_work_of_the_plan() -> None:
    for layout in layouts():
        n = len(layout.programs)
        costs = unit_costs(n, calls=sum(len(m.heads) for m in layout.programs))
        ran = simulate(layout, costs_of(layout, costs), 2)
        total = sum(costs.per_segment(layout.programs)) * layout.micro_batches * 2
        assert sum(map(busy, ran.events)) == pytest.approx(total)
