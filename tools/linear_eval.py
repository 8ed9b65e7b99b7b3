"""Linear evaluation: train a linear classifier on the frozen encoder of a run, and test it.

    python tools/linear_eval.py RUN [--preset loco|moco|simclr] [--cached] [key=value ...]

Start it with deepspeed, torchrun or srun to share the work. Every epoch is saved, and the same command goes on.
--cached computes the features once, without augmentation, which takes minutes where the protocol takes hours.
Beside the accuracy stands that of a random encoder: a checkpoint that was not loaded would show.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from framework.analysis.arguments import leave, only_run, parse, run_parser, told_apart
from framework.evaluation.linear_eval_conditions import (
    add_arguments,
    conditions,
    of_checkpoint,
    protocol_of,
    result_name,
)
from framework.runtime.command import status
from framework.runtime.errors import UserError

OnEpoch = Callable[[int, float], None]


if TYPE_CHECKING:
    from framework.data.loading.loader import TrainLoader
    from framework.evaluation.linear_eval import Batches, Protocol
    from framework.evaluation.run_folder import Run


def main() -> None:
    """Evaluate, print, leave ``linear_eval_PRESET.json``, or ``..._cached.json``."""
    parser = run_parser(__doc__)
    add_arguments(parser)
    _, overrides = told_apart(parser.parse_intermixed_args().runs)
    arguments = parse(parser)

    from framework.evaluation.linear_eval import check_batch
    from framework.runtime import distributed

    run, protocol = only_run(arguments.runs), protocol_of(arguments)
    distributed.start()
    check_batch(protocol)
    run.checkpoint  # noqa: B018  a missing one is an error before the long work
    started = time.perf_counter()
    measure = _cached if arguments.cached else _augmented
    scores = measure(run, protocol, arguments.preset)
    random = _cached(run, protocol, "random encoder", trained=False)
    if distributed.is_main():
        seconds = time.perf_counter() - started
        _report(arguments.out, run, conditions(arguments, overrides), scores, random, seconds)
    distributed.stop()


def _cached(run: Run, protocol: Protocol, name: str, trained: bool = True) -> dict[str, float]:
    from framework.evaluation.encoding import cached_rows
    from framework.evaluation.linear_eval import evaluate_rows

    train, test = (cached_rows(run, shards, trained) for shards in (run.splits.train, run.splits.held_out))
    with _bar(protocol.epochs, name) as on_epoch:
        return evaluate_rows(train, test, run.splits.num_classes, protocol, run.recipe.seed, on_epoch)


def _augmented(run: Run, protocol: Protocol, preset: str) -> dict[str, float]:
    """The protocol itself: a new random crop and flip of every image in every epoch."""
    from framework.evaluation.linear_eval import State, accuracy, fit, settings
    from framework.runtime import distributed

    loader, net, splits = _train_loader(run, protocol), run.encoder(), run.splits

    def batches(start: int) -> Batches:
        for (batch,) in loader.steps(start, protocol.epochs * loader.steps_per_epoch):
            assert batch.labels is not None
            yield net.features(batch.images), batch.labels

    def test() -> Iterator[Any]:
        for _, images, labels in splits.eval_loader(splits.held_out):
            yield net.features(images), labels

    state = State(
        run.folder / "linear_eval" / f"{preset}.safetensors",
        settings(
            protocol,
            **of_checkpoint(run.checkpoint),
            ranks=distributed.world_size(),
            data=asdict(run.recipe.data),
        ),
    )
    one = net.features(next(iter(splits.eval_loader(splits.held_out)))[1][:1])
    with _bar(protocol.epochs, preset) as on_epoch:
        classifier = fit(
            batches,
            loader.steps_per_epoch,
            (one.shape[1], splits.num_classes),
            protocol,
            like=one,
            state=state,
            on_epoch=on_epoch,
        )
    return accuracy(classifier, test())


def _train_loader(run: Run, protocol: Protocol) -> TrainLoader:
    recipe = run.splits.recipe
    if not run.splits.train.labeled:
        raise UserError(
            f"{run.splits.train.folder}: has no labels; name a split that has, such as data.train=train"
        )
    views = recipe.views if recipe.views.kind == "cifar" else replace(recipe.views, kind="supervised")
    train = replace(recipe.train, batch_size=protocol.batch_size, accumulation=1)
    return replace(run.splits, recipe=replace(recipe, views=views, train=train)).train_loader(
        views_per_image=1
    )


@contextmanager
def _bar(epochs: int, name: str) -> Iterator[OnEpoch]:
    """A bar over the epochs with the loss, on rank 0."""
    from framework.runtime import distributed

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
    )
    with Progress(*columns, TimeRemainingColumn(), disable=not distributed.is_main()) as progress:
        task = progress.add_task(name, total=epochs, loss=float("nan"))
        yield lambda epoch, loss: progress.update(task, completed=epoch, loss=loss)


def _report(
    out: Path,
    run: Run,
    how: dict[str, Any],
    scores: dict[str, float],
    random: dict[str, float],
    seconds: float,
) -> None:
    from framework.runtime import distributed

    text = ", ".join(f"{name.replace('top', 'top-')} {value:.2f} %" for name, value in scores.items())
    print(
        f"{run.label}, {run.checkpoint.name}: {text}; random encoder {random['top1']:.2f} % ({seconds:.0f} s)"
    )
    if scores["top1"] <= random["top1"]:
        print(
            "warning: no better than a random encoder: is this the right checkpoint, and did its training work?"
        )
    numbers = {
        "run": run.label,
        **of_checkpoint(run.checkpoint),
        **scores,
        **{f"{name}_random_encoder": value for name, value in random.items()},
        "seconds": round(seconds, 1),
        "ranks": distributed.world_size(),
        **how,
    }
    leave(out, result_name(how), numbers)


if __name__ == "__main__":
    sys.exit(status(main))
