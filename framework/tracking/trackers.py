"""Where the numbers of a run go: ``metrics.jsonl`` always, TensorBoard and Weights & Biases if asked for."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from framework.config.loading import to_yaml
from framework.config.recipe import Recipe
from framework.runtime.errors import UserError
from framework.runtime.files import write_whole
from framework.tracking.metric_log import MetricLog

logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """Takes the numbers of a step."""

    def write(self, step: int, numbers: Mapping[str, Any]) -> None:
        """``numbers`` as ``MetricLog.write`` takes them by keyword."""

    def close(self) -> None:
        """Send what is not sent yet."""


class Logs:
    """All trackers of a run, on rank 0. One that fails is dropped with a warning, and training goes on.

    Args:
        log: the JSONL file.
        trackers: whatever else.
        every: steps between two entries.
        last: number of the last step, which is noted too.
    """

    def __init__(self, log: MetricLog, trackers: list[Tracker], every: int, last: int) -> None:
        self._log, self._trackers, self._every, self._last = log, trackers, every, last

    def __enter__(self) -> Logs:
        return self

    def __exit__(self, *exception: object) -> None:
        self._log.close()
        for tracker in self._trackers:
            try:
                tracker.close()
            except Exception as error:
                logger.warning("%s may lack the last numbers: %s", type(tracker).__name__, error)

    def write(self, step: int, **numbers: Any) -> None:
        """Note a step, counted from 0, if it is one of those that are noted, or was skipped."""
        if not noted(step, self._every, self._last) and not numbers.get("skipped"):
            return
        self._log.write(step, **numbers)
        self._track(step, numbers)

    def write_scores(self, step: int, *, epoch: float, scores: Mapping[str, float]) -> None:
        """Note accuracies in per cent, measured after ``step``."""
        self._log.write_scores(step, epoch=epoch, scores=scores)
        self._track(step, {"scores": scores})

    def _track(self, step: int, numbers: Mapping[str, Any]) -> None:
        for tracker in list(self._trackers):
            try:
                tracker.write(step, numbers)
            except Exception as error:  # a service that is down must not end a run of weeks
                logger.warning("%s is left out from step %d on: %s", type(tracker).__name__, step, error)
                self._trackers.remove(tracker)


def noted(step: int, every: int, last: int) -> bool:
    """Whether a step, counted from 0, is one of those that are noted whatever happens: every so many, and the last."""
    return step % every == 0 or step == last


class TensorBoard:
    """Event files in ``run_dir/tensorboard``; what lies past ``start`` of an earlier start is hidden.

    Raises:
        UserError: TensorBoard is not installed, or can't write there.
    """

    def __init__(self, run_dir: Path, start: int) -> None:
        module = _import("torch.utils.tensorboard", "logging.tensorboard=true", "tensorboard")
        folder = run_dir / "tensorboard"
        try:
            self._writer = module.SummaryWriter(str(folder), purge_step=start, flush_secs=30)
        except OSError as error:
            raise UserError(f"{folder}: can't be written: {error.strerror}") from error

    def write(self, step: int, numbers: Mapping[str, Any]) -> None:
        for name, value in flat(numbers).items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, one however often it is started again: its id is kept in the run folder.

    Raises:
        UserError: wandb is not installed, or refuses to start.
    """

    def __init__(self, recipe: Recipe, mode: str) -> None:
        wandb = _import("wandb", f"logging.wandb={mode}", "wandb")
        known = Path(recipe.run_dir) / "wandb-id.txt"
        try:
            if not known.exists():
                write_whole(known, uuid.uuid4().hex[:12])
            self._run = wandb.init(
                project=recipe.logging.project,
                name=recipe.name,
                id=known.read_text(),
                resume="allow",
                mode=mode,
                dir=recipe.run_dir,
                config={"recipe": to_yaml(recipe)},
            )
        except Exception as error:  # wandb has many
            raise UserError(f"logging.wandb={mode}: {' '.join(str(error).split())}") from error

    def write(self, step: int, numbers: Mapping[str, Any]) -> None:
        self._run.log(flat(numbers), step=step)

    def close(self) -> None:
        self._run.finish()


def open_trackers(recipe: Recipe, start: int) -> list[Tracker]:
    """What the recipe's ``logging`` section asks for; once the run is under way, what of it can be had.

    Args:
        recipe: of the run; its folder must exist.
        start: step to go on from.

    Raises:
        UserError: at step 0, something is not installed or can't be reached.
    """
    asked: list[Callable[[], Tracker]] = []
    if recipe.logging.tensorboard:
        asked.append(lambda: TensorBoard(Path(recipe.run_dir), start))
    if recipe.logging.wandb != "none":
        asked.append(lambda: WeightsAndBiases(recipe, recipe.logging.wandb))
    trackers = []
    for make in asked:
        try:
            trackers.append(make())
        except UserError as error:
            if start == 0:
                raise
            logger.warning("left out from step %d on: %s", start, error)
    return trackers


def flat(numbers: Mapping[str, Any]) -> dict[str, float]:
    """``{"losses": {"layer2": 1.0}}`` -> ``{"losses/layer2": 1.0}``, every value a number."""
    found: dict[str, float] = {}
    for name, value in numbers.items():
        inner = (
            {f"{name}/{key}": v for key, v in value.items()} if isinstance(value, Mapping) else {name: value}
        )
        found |= {key: float(v) for key, v in inner.items()}
    return found


def _import(module: str, key: str, extra: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise UserError(f"{key}: {error}; install stagewise[{extra}]") from error
