"""What checkpoints cost: the time that saving takes from training, and how long a resumed run takes to its first step.

    python tools/bench_checkpoint.py [--recipe recipes/loco_r50_800ep.yaml] [--batch 8] [--image-size 64]

Saving: training steps are timed, then a save, then as many steps while the checkpoint is written beside them. Its cost
is the time that it holds training up, and what the steps beside the writing take more than the median of the others.
Resuming: a new process goes on from that checkpoint; the clock starts when its imports are done and stops at its first
step. The images are scikit-learn's digits, enlarged.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from framework.config import loading
from framework.runtime.command import Parser, bounded, status
from framework.runtime.launch import LAUNCH_VARIABLES

EPOCH = 1_281_167 // 4096  # steps between two saves by default: an epoch of ImageNet in LoCo's batches
ROOT = Path(__file__).resolve().parents[1]
TOY = [
    "data.prepare=digits",
    "data.num_classes=10",
    "data.workers=0",
    "train.precision=fp32",
    "network.channels_last=false",
    "optim.lr=0.01",
    "optim.warmup_epochs=0",
    "evaluate.knn=false",
]
CHILD = """
import sys, time
from framework import model, train
from framework.engines import deepspeed
from framework.pipeline import engine
from framework.training import run
from framework.training.loop import Loop

def first(loop, *rest):
    print("first step", time.time(), flush=True)
    return step(loop, *rest)

step, Loop._step = Loop._step, first
print("imported", time.time(), flush=True)
sys.exit(train.main(sys.argv[1:]))
"""


def main() -> None:
    """Measure and print."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default=str(ROOT / "recipes" / "loco_r50_800ep.yaml"))
    parser.add_argument("--batch", type=bounded(int, 1), default=8)
    parser.add_argument("--image-size", type=bounded(int, 1), default=64)
    parser.add_argument(
        "--steps", type=bounded(int, 1), default=8, help="before each save, and beside its writing"
    )
    parser.add_argument("--rounds", type=bounded(int, 1), default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        argv = [arguments.recipe, f"data.path={folder}/digits", f"run_dir={folder}/run", *TOY]
        argv += [f"data.image_size={arguments.image_size}", f"train.batch_size={arguments.batch}"]
        step, cost = saving(argv, arguments.steps, arguments.rounds)
        first = resuming([*argv, f"train.max_steps={1 + 2 * arguments.steps * arguments.rounds}"])
    print(
        f"a step takes {step:.3f} s, a save {cost:.3f} s of the training's time, or {cost / step:.2f} steps"
    )
    print(f"a save after every {EPOCH} such steps takes {cost / step / EPOCH:.2%} of their time")
    print(f"a resumed run begins its first step {first:.1f} s after its imports")


def saving(argv: list[str], steps: int, rounds: int) -> tuple[float, float]:
    """Median seconds of a step, and of what a save costs; a checkpoint is left."""
    from framework.data.splits import Splits
    from framework.model import recipe_network
    from framework.runtime import joining
    from framework.training.engine_choice import build_engine
    from framework.training.loop import Loop
    from framework.training.position import Position

    joining.start()
    recipe = loading.load(argv)
    splits = Splits.open(recipe)
    net = recipe_network(recipe, splits.num_classes)
    loader = splits.train_loader(net.plan.views)
    batches = loader.steps(0, sys.maxsize)
    loop = Loop(recipe, build_engine(recipe, net, splits.num_classes), loader, Position(), score=dict)

    def timed_step() -> float:
        start = time.perf_counter()
        loop.engine.step(next(batches), lambda: recipe.optim.lr).unit_losses.tolist()  # waits for the GPU
        loop.position.step += 1
        return time.perf_counter() - start

    timed_step()
    quiet, costs = [], []
    for _ in range(rounds):
        quiet += [timed_step() for _ in range(steps)]
        start = time.perf_counter()
        loop.save()
        held_up = time.perf_counter() - start
        beside = [timed_step() for _ in range(steps)]
        costs.append(held_up + sum(beside) - steps * statistics.median(quiet))
        loop.saver.wait()
    loop.position.step -= 1  # the first, which was not timed
    loop.save()
    loop.saver.wait()
    joining.stop()
    return statistics.median(quiet), statistics.median(costs)


def resuming(argv: list[str]) -> float:
    """Seconds from the end of a new process's imports to the beginning of its first step."""
    alone = {name: value for name, value in os.environ.items() if name not in LAUNCH_VARIABLES}
    command = [sys.executable, "-c", CHILD, *argv]
    times: dict[str, float] = {}
    with subprocess.Popen(command, env=alone, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        while "first step" not in times:
            line = child.stdout.readline()
            if not line:
                sys.exit(
                    f"the resumed run ended before its first step, with status {child.wait()}: see above"
                )
            event, _, when = line.rpartition(" ")
            if event in ("imported", "first step"):
                times[event] = float(when)
        child.kill()
    return times["first step"] - times["imported"]


if __name__ == "__main__":
    sys.exit(status(main))
