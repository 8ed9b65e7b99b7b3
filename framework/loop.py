"""The training loop: batches in, steps, numbers out, checkpoints now and then."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from framework import checkpoint, config, distributed, metrics
from framework.batch import Batch
from framework.config import Recipe
from framework.data.loader import TrainLoader
from framework.display import Progress
from framework.engines import Engine, StepResult
from framework.errors import LocalError, UserError
from framework.optim import learning_rate


@dataclass
class Position:
    """How far a run has come.

    Attributes:
        step: steps done, which is also the place in the data.
        updates: those that changed the weights; float16 overflows skip some, and the schedule waits for them.
        broken: images that were skipped because they could not be decoded, over all ranks.
    """

    step: int = 0
    updates: int = 0
    broken: int = 0


class Loop:
    """Runs a recipe's remaining steps.

    Args:
        recipe: of the run.
        engine: steps the network.
        loader: this rank's batches.
        position: where to go on.
    """

    def __init__(self, recipe: Recipe, engine: Engine, loader: TrainLoader, position: Position) -> None:
        self.recipe, self.engine, self.loader, self.position = recipe, engine, loader, position
        self.run_dir = Path(recipe.run_dir)
        self.per_epoch = loader.steps_per_epoch
        self.total = recipe.train.epochs * self.per_epoch
        self.stop = min(self.total, recipe.train.max_steps or self.total)
        self.units = [unit.name for unit in engine.net.plan.units]
        self.speed = metrics.Throughput()

    def run(self) -> None:
        """Train until the end.

        Raises:
            UserError: a loss that is not finite, data that can't be read, a checkpoint that can't be written.
        """
        start = self.position.step
        log = self._open_log(start)
        unread: deque[tuple[int, float, StepResult]] = deque()
        with Progress(self.stop, start, enabled=distributed.is_main()) as progress:
            for step, batches in enumerate(self._batches(start), start):
                _seed(self.recipe.seed, step)
                lr = self._learning_rate()
                unread.append((step, lr, self.engine.step(batches, lr)))
                self.position.step += 1
                self.position.updates += not unread[-1][-1].skipped
                due = self._checkpoint_due()
                while len(unread) > (0 if due else self.engine.lag):
                    self._report(*unread.popleft(), log, progress)
                if due:
                    self.save()
        if log:
            log.close()

    def save(self) -> None:
        """Write a checkpoint of this moment; collective."""
        self.position.broken = distributed.sum_over_ranks(self.loader.skipped)
        state = {"position": asdict(self.position), "recipe": config.to_yaml(self.recipe)}
        checkpoint.save(self.run_dir, self.engine, self.position.step, state, self.recipe.checkpoint.keep)

    def summary(self) -> dict[str, Any]:
        """What the loop knows about the run."""
        return {
            "steps": self.position.step,
            "epochs": self.position.step / self.per_epoch,
            "images_per_second": round(self.speed.mean, 2),
            "broken_images": self.position.broken,
        }

    def _batches(self, start: int) -> Iterator[list[Batch]]:
        """This rank's batches; an error in the data is this rank's alone to tell."""
        if not self.engine.loads:
            yield from ([] for _ in range(start, self.stop))
            return
        try:
            yield from self.loader.steps(start, self.stop)
        except UserError as error:
            where = f"rank {distributed.rank()}: " if distributed.world_size() > 1 else ""
            raise LocalError(f"{where}{error}") from error

    def _learning_rate(self) -> float:
        optim = self.recipe.optim
        warmup = round(optim.warmup_epochs * self.per_epoch)
        return learning_rate(self.position.updates, self.total, warmup, optim.lr)

    def _report(
        self, step: int, lr: float, result: StepResult, log: metrics.MetricLog | None, progress: Progress
    ) -> None:
        losses = dict(zip(self.units, result.losses(), strict=True))
        speed = self.speed.step(self.recipe.train.batch_size)
        epoch = (step + 1) / self.per_epoch
        if log:
            log.write(
                step, epoch=epoch, lr=lr, losses=losses, images_per_second=speed, skipped=result.skipped
            )
        progress.update(step, epoch, losses, speed)
        for unit, loss in losses.items():
            if not math.isfinite(loss) and not result.skipped:
                raise UserError(
                    f"the loss of unit {unit} is {loss} at step {step}: lower optim.lr={self.recipe.optim.lr}, or "
                    f"look at the data; the last checkpoint is as it was"
                )

    def _checkpoint_due(self) -> bool:
        step, every = self.position.step, self.recipe.checkpoint
        return (
            step == self.stop
            or step % (every.every_epochs * self.per_epoch) == 0
            or (every.every_steps is not None and step % every.every_steps == 0)
        )

    def _open_log(self, start: int) -> metrics.MetricLog | None:
        """Put the resolved recipe into the run folder and open the log there, on rank 0."""
        with distributed.same_outcome():
            if distributed.is_main():
                metrics.write_whole(self.run_dir / "recipe.yaml", config.to_yaml(self.recipe))
                environment = metrics.environment(distributed.world_size(), distributed.device())
                return metrics.MetricLog(self.run_dir / "metrics.jsonl", environment, start)
        return None


def _seed(seed: int, step: int) -> None:
    """Chance inside the network (dropout) is a function of seed, step and rank, so a resumed run repeats it."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, distributed.rank()]).generate_state(1)[0]))
