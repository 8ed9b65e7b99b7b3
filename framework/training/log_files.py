"""What a start writes into the run folder before its first step."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime
from pathlib import Path

from framework.config import loading
from framework.config.recipe import Recipe
from framework.evaluation.run_folder import recipe_values
from framework.runtime import distributed
from framework.runtime.files import write_whole
from framework.tracking.environment import environment
from framework.tracking.metric_log import MetricLog
from framework.tracking.trackers import Logs, open_trackers


def open_logs(
    recipe: Recipe, start: int, stop: int, check: Callable[[], None]
) -> AbstractContextManager[Logs | None]:
    """Put the resolved recipe into the run folder and open the logs there, on rank 0; collective.

    Where no step is left to make, both stay as they are: they tell of the steps that were made.

    Args:
        recipe: of the run.
        start: the first step to make.
        stop: the step before which the run ends.
        check: raises if another process has the folder.

    Raises:
        UserError: on every rank, if rank 0 can't.
    """
    folder = Path(recipe.run_dir)
    resolved, log = folder / "recipe.yaml", folder / "metrics.jsonl"
    with distributed.same_outcome():
        if distributed.is_main() and start >= stop and resolved.exists() and log.exists():
            _say_that_all_is_done(resolved, recipe)
        elif distributed.is_main():
            check()
            write_whole(resolved, loading.to_yaml(recipe))
            of_this_start = {
                "started": datetime.now(UTC).isoformat(timespec="seconds"),
                "job": os.environ.get("SLURM_JOB_ID"),
                **environment(distributed.world_size(), distributed.device()),
            }
            trackers = open_trackers(recipe, start)
            return Logs(
                MetricLog(log, of_this_start, start, check), trackers, recipe.logging.every_steps, stop - 1
            )
    return nullcontext()


def _say_that_all_is_done(resolved: Path, recipe: Recipe) -> None:
    made, asked = recipe_values(resolved.read_text()), recipe_values(loading.to_yaml(recipe))
    changed = [key for key in made.keys() & asked.keys() if made[key] != asked[key]]
    without_effect = f"; of no effect on them: {', '.join(sorted(changed))}" if changed else ""
    print(f"all steps are made, by the settings in {resolved}{without_effect}", flush=True)
