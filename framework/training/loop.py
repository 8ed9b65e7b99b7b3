"""The training loop: batches in, steps, numbers out, checkpoints now and then."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from framework.checkpoints.retention import Keep
from framework.checkpoints.saver import Saver
from framework.config import loading
from framework.config.recipe import Recipe
from framework.cost.utilization import Utilization
from framework.data.batch import Batch
from framework.data.loading.loader import TrainLoader
from framework.engines import Engine
from framework.engines.norms import Norms, UnitNorms
from framework.network.norm import RunningStatistics
from framework.optim import learning_rate, learning_rate_of_epoch
from framework.runtime import distributed
from framework.runtime.errors import UserError
from framework.runtime.files import unlocked
from framework.runtime.requests import Request, Requests
from framework.tracking.measuring import PeakMemory, Throughput
from framework.tracking.profiling import StepProfiler, steps_to_profile
from framework.tracking.progress import Progress
from framework.tracking.trackers import Logs, noted
from framework.training.late_numbers import LateNumbers, most_urgent
from framework.training.log_files import open_logs
from framework.training.nonfinite import count_nonfinite, nonfinite
from framework.training.position import Position


class Pending(NamedTuple):
    """A step that is launched. Its numbers, and requests made meanwhile, are read up to ``engine.lag`` steps later."""

    step: int
    lr: float
    numbers: LateNumbers
    speeds: dict[str, float]
    unit_norms: Callable[[], Norms]


class Loop:
    """Runs a recipe's remaining steps.

    Args:
        recipe: of the run.
        engine: steps the network.
        loader: this rank's batches.
        position: where to go on.
        score: measures the network during training: accuracies in per cent, on rank 0.
        check: raises if another process has the run's folder; called before whatever is written there.
        utilization: of the GPUs, where it can be told.

    Raises:
        UserError: steps are to be profiled, and none of them will be made.
    """

    def __init__(
        self,
        recipe: Recipe,
        engine: Engine,
        loader: TrainLoader,
        position: Position,
        score: Callable[[], dict[str, float]],
        check: Callable[[], None] = unlocked,
        utilization: Utilization | None = None,
    ) -> None:
        self.recipe, self.engine, self.loader, self.position = recipe, engine, loader, position
        self.score, self.check, self.utilization = score, check, utilization
        self.run_dir = Path(recipe.run_dir)
        self.per_epoch = loader.steps_per_epoch
        self.total = recipe.train.epochs * self.per_epoch
        self.stop = min(self.total, recipe.train.max_steps or self.total)
        self.units = [unit.name for unit in engine.net.plan.units]
        self.weights = [unit.weight for unit in engine.net.plan.units]
        self.speed = Throughput(position.images, position.seconds, waited=position.waited)
        self.memory = PeakMemory(distributed.device(), position.peak_memory_bytes)
        self.norms = RunningStatistics(engine.net) if recipe.faults.nonfinite == "skip" else None
        self.unit_norms = UnitNorms(engine, recipe.pipeline.stages) if recipe.logging.norms else None
        self.profiled = steps_to_profile(recipe.logging.profile, position.step, self.stop)
        self.broken_before = position.broken
        self.since_save: list[float] = []  # this rank's shares of the steps' losses
        # Of the last step, as long as nobody has asked whether it was skipped.
        self.uncounted: LateNumbers | None = None
        every = recipe.checkpoint.keep_every_epochs
        keep = Keep(recipe.checkpoint.keep, every and every * self.per_epoch, recipe.checkpoint.keep_best)
        self.saver = Saver(self.run_dir, keep, check)

    def run(self, alive: Callable[[int], None] = lambda steps: None) -> Request:
        """Train until the end, or until somebody asks to stop.

        Args:
            alive: called after each step with the number of those done.

        Returns:
            What was asked for; below ``STOP`` the run has come to its end.

        Raises:
            UserError: a loss that is not finite, data that can't be read, a last checkpoint that can't be written.
        """
        start = self.position.step
        pending: deque[Pending] = deque()
        request = Request.NOTHING
        with (
            Requests(self.run_dir) as requests,
            self.saver,
            open_logs(self.recipe, start, self.stop, self.check) as logs,
            Progress(self.stop, start, enabled=distributed.is_main()) as progress,
            StepProfiler(
                self.profiled, self.run_dir, distributed.device(), self._paused, self.check
            ) as profiler,
        ):
            for step, batches in enumerate(self._batches(start), start):
                profiler.begin(step)
                request = Request.NOTHING
                pending.append(self._step(step, batches, requests))
                due = self._checkpoint_due()
                while len(pending) > (0 if due or self._score_due() or request else self.engine.lag):
                    request = max(request, self._read(pending.popleft(), logs, progress))
                alive(self.position.step)
                if request or due:
                    self.save()
                if request:
                    requests.done(request)
                if self._score_due() and request is not Request.LEAVE:  # which leaves no time
                    self._measure(step, logs, progress)
                if request >= Request.STOP:
                    break
            try:
                self.saver.wait()
            except UserError:
                if request is not Request.LEAVE:  # the next start goes on from an earlier one
                    raise
            last = most_urgent(requests.on_this_rank())
            requests.done(last)
            return max(request, last)

    def save(self) -> None:
        """Begin to write a checkpoint of the current step; all ranks must call it."""
        self._count_updates()
        own_loss = float(np.mean(self.since_save)) if self.since_save else None
        loss = None if own_loss is None else distributed.total_over_ranks(own_loss)
        self.position.broken = self.broken_before + distributed.sum_over_ranks(self.loader.skipped)
        self.position.images, self.position.seconds = self.speed.images, self.speed.seconds
        self.position.waited = self.speed.waited
        self.position.peak_memory_bytes = self.memory.bytes
        state = {
            "position": asdict(self.position),
            "ranks": distributed.world_size(),
            "steps_per_epoch": self.per_epoch,
            "loss": loss,
            "recipe": loading.to_yaml(self.recipe),
        }
        self.since_save = []
        self.saver.save(self.engine, self.position.step, state)
        self.engine.net.clear_replay_buffers()

    def summary(self) -> dict[str, Any]:
        """What the loop knows about the run."""
        return {
            "steps": self.position.step,
            "epochs": self.position.step / self.per_epoch,
            **self._speeds(round(self.speed.mean, 2), self.speed.mean_waited),
            "broken_images": self.position.broken,
            "nonfinite_steps": self.position.nonfinite,
            "peak_memory_bytes": self.memory.bytes,
        }

    def _batches(self, start: int) -> Iterator[list[Batch]]:
        """This rank's batches."""
        if not self.engine.loads:
            yield from ([] for _ in range(start, self.stop))
            return
        with distributed.own_errors():
            yield from self.speed.waiting(self.loader.steps(start, self.stop))

    def _step(self, step: int, batches: list[Batch], requests: Requests) -> Pending:
        _seed(self.recipe.seed, step, self.recipe.pipeline.stages)
        if self.norms:
            self.norms.remember()
        written = noted(step, self.recipe.logging.every_steps, self.stop - 1)
        measured = self.unit_norms if written else None
        if measured:
            measured.measure()
        result = self.engine.step(batches, self._learning_rate)
        lr = self._learning_rate()
        unit_norms = measured.result() if measured else dict
        if self.norms and result.overflow is not None:
            self.norms.put_back(result.overflow)
        if self.engine.net.average is not None:
            self.engine.finish()
            self.engine.net.average.update(self.engine.net, self.engine.net.taken)
        self.memory.step()
        speed = self.speed.step(self.recipe.train.batch_size)
        self.position.step += 1
        speeds = self._speeds(speed, self.speed.waited_lately)
        self.uncounted = LateNumbers(result, requests.on_this_rank(), written)
        return Pending(step, lr, self.uncounted, speeds, unit_norms)

    def _read(self, pending: Pending, logs: Logs | None, progress: Progress) -> Request:
        """Log a step, and check its losses; returns what people have asked for."""
        step, lr, numbers, speeds, unit_norms = pending
        skipped, norms, found = numbers.skipped(), unit_norms(), numbers.losses()
        losses = dict(zip(self.units, found, strict=True)) if found is not None else {}
        epoch = (step + 1) / self.per_epoch
        more = {"skipped": skipped} | ({} if skipped else norms)
        if logs:
            logs.write(step, epoch=epoch, lr=lr, losses=losses, **speeds, **more)
        progress.update(step, epoch, losses, speeds["images_per_second"], speeds.get("mfu"))
        bad = nonfinite(losses, [self.units[number] for number in numbers.hopeless()])
        count_nonfinite(self.recipe, self.position, step, bad, skipped)
        if bad is None and not skipped:
            self.since_save.append(float(np.dot(self.weights, numbers.share())))
        return numbers.request()

    def _count_updates(self) -> None:
        """Count the last step if it was made; waits for it where steps may be skipped."""
        if self.uncounted is not None:
            self.position.skipped, self.uncounted = self.uncounted.skipped(), None
            self.position.updates += not self.position.skipped

    def _learning_rate(self) -> float:
        """Of a step whose gradients are launched; it depends on how many before it were made."""
        self._count_updates()
        optim = self.recipe.optim
        if optim.schedule == "cosine_of_epochs":
            epoch = self.position.updates // self.per_epoch
            return learning_rate_of_epoch(epoch, self.recipe.train.epochs, optim.warmup_epochs, optim.lr)
        warmup = round(optim.warmup_epochs * self.per_epoch)
        return learning_rate(self.position.updates, self.total, warmup, optim.lr)

    def _score_due(self) -> bool:
        """At every interval but the end, which ``leave_results`` measures."""
        every, step = self.recipe.evaluate.every_epochs, self.position.step
        return every is not None and step % (every * self.per_epoch) == 0 and step < self.stop

    def _measure(self, step: int, logs: Logs | None, progress: Progress) -> None:
        with self._paused():
            scores = self.score()
        epoch = (step + 1) / self.per_epoch
        if logs:
            logs.write_scores(step, epoch=epoch, scores=scores)
            progress.note(f"epoch {epoch:g}: " + ", ".join(f"{k} {v:.1f} %" for k, v in scores.items()))

    @contextmanager
    def _paused(self) -> Iterator[None]:
        """What the block takes counts neither for speed nor for memory."""
        with self.speed.paused(), self.memory.paused():
            yield

    def _speeds(self, images_per_second: float, loader_wait: float) -> dict[str, float]:
        """These and, where it can be told, model FLOPs utilization."""
        speeds = {"images_per_second": images_per_second, "loader_wait": round(loader_wait, 4)}
        mfu = {"mfu": round(self.utilization.at(images_per_second), 4)} if self.utilization else {}
        return speeds | mfu

    def _checkpoint_due(self) -> bool:
        step, every = self.position.step, self.recipe.checkpoint
        return (
            step == self.stop
            or step % (every.every_epochs * self.per_epoch) == 0
            or (every.every_steps is not None and step % every.every_steps == 0)
        )


def _seed(seed: int, step: int, stages: int) -> None:
    """Chance inside the network (dropout, noise) is a function of seed, step and rank, so a resumed run repeats it.

    The stages of a pipeline count as one rank.
    """
    replica = distributed.rank() % (distributed.world_size() // stages)
    torch.manual_seed(int(np.random.SeedSequence([seed, step, replica]).generate_state(1)[0]))
