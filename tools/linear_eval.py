"""Linear evaluation: train a linear classifier on the frozen encoder of a run, and test it.

    python tools/linear_eval.py RUN [--preset loco|moco|simclr] [--cached] [key=value ...]

Start it with deepspeed, torchrun or srun to share the work. Every epoch is saved, and the same command goes on.
--cached computes the features once, without augmentation, which takes minutes where the protocol takes hours.
Beside the accuracy stands that of a random encoder: a checkpoint that was not loaded would show.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from framework.analysis.arguments import folders_and_overrides, leave, only_run, parse, run_parser
from framework.evaluation.linear_protocols import add_arguments, conditions, protocol_of, result_name
from framework.runtime.command import status

if TYPE_CHECKING:
    from framework.evaluation.linear_eval import OnEpoch
    from framework.evaluation.run_folder import Run


def main() -> None:
    """Evaluate, print, leave ``linear_eval_PRESET.json``, or ``..._cached.json``."""
    parser = run_parser(__doc__)
    add_arguments(parser)
    _, overrides = folders_and_overrides(parser.parse_intermixed_args().runs)
    arguments = parse(parser)

    from framework.evaluation.linear_classifier import check_batch
    from framework.evaluation.linear_eval import evaluate_augmented, evaluate_cached
    from framework.runtime import distributed, joining

    run, protocol = only_run(arguments.runs), protocol_of(arguments)
    with joining.joined(run.folder, run.recipe.faults.hang_seconds) as watchdog, watchdog.during("scoring"):
        check_batch(protocol)
        run.checkpoint  # noqa: B018  a missing one is an error before the long work
        started = time.perf_counter()
        with _bar(protocol.epochs, arguments.preset) as on_epoch:
            if arguments.cached:
                scores = evaluate_cached(run, protocol, on_epoch)
            else:
                scores = evaluate_augmented(run, protocol, arguments.preset, on_epoch)
        with _bar(protocol.epochs, "random encoder") as on_epoch:
            random = evaluate_cached(run, protocol, on_epoch, trained=False)
        if distributed.is_main():
            seconds = time.perf_counter() - started
            _report(arguments.out, run, conditions(arguments, overrides), scores, random, seconds)


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
    from framework.checkpoints.folder import identity_of
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
        **identity_of(run.checkpoint),
        **scores,
        **{f"{name}_random_encoder": value for name, value in random.items()},
        "seconds": round(seconds, 1),
        "ranks": distributed.world_size(),
        **how,
    }
    leave(out, result_name(how), numbers)


if __name__ == "__main__":
    sys.exit(status(main))
