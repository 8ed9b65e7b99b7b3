"""Commands answer at once: help and mistakes come before the libraries that take seconds to import."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.marks import slow

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ROOT / "framework" / "train.py"
RECIPE = "recipes/quickstart.yaml"
SLOW = ("torch", "timm", "torchvision", "deepspeed", "sklearn", "scipy", "webdataset")
COMMANDS = [path for path in sorted((ROOT / "tools").glob("*.py")) if "__main__" in path.read_text()]

#: runs a file as a command, and says which of the modules it has imported at the end
PROGRAM = """
import json, runpy, sys
sys.argv = sys.argv[1:]
slow, sys.argv = sys.argv[0].split(","), sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as left:
    status = left.code or 0
print(json.dumps({"status": status, "imported": [name for name in slow if name in sys.modules]}))
"""


def run(command: Path, *arguments: str) -> tuple[int, list[str], str]:
    """Exit status, slow modules that were imported, and what was printed."""
    program = [sys.executable, "-c", PROGRAM, ",".join(SLOW), str(command), *arguments]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True)
    printed, _, last = done.stdout.rstrip().rpartition("\n")
    said = json.loads(last)
    return said["status"], said["imported"], printed + done.stderr


SOME = [path for path in COMMANDS if path.stem in ("knn_eval", "make_shards", "show_plan", "status")]


@pytest.mark.parametrize(
    "command",
    [TRAIN, *SOME, *slow([path for path in COMMANDS if path not in SOME])],
    ids=lambda path: path.stem,
)
def test_help(command: Path) -> None:
    status, imported, printed = run(command, "--help")
    assert (status, imported) == (0, []) and printed.startswith("usage: ")


MISTAKES = {
    "a typo": ([RECIPE, "optim.lrr=1"], "command line: optim.lrr=1: unknown key; the nearest is optim.lr"),
    "a typo in the method's options": ([RECIPE, "method.windw=3"], "the nearest is method.window"),
    "a wrong value": ([RECIPE, "optim.lr=-1"], "command line: optim.lr=-1: must be greater than 0"),
    "a missing recipe": (["recipes/quickstrat.yaml"], "no such recipe; recipes/ has quickstart.yaml"),
    "a missing folder": (
        ["recipes/loco_r50_800ep.yaml", "data.path=/nowhere"],
        "/nowhere/train: no such folder",
    ),
    "no recipe": ([], "error: name a recipe, such as recipes/quickstart.yaml"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_a_training_command(mistake: str) -> None:
    arguments, message = MISTAKES[mistake]
    status, imported, printed = run(TRAIN, *arguments)
    assert imported == [] and message in printed
    assert status == 64  # EXIT_USAGE


@pytest.mark.parametrize("command", [TRAIN, *slow(COMMANDS)], ids=lambda path: path.stem)
def test_an_unknown_argument(command: Path) -> None:
    status, imported, printed = run(command, "--nonsense")
    assert (status, imported) == (64, [])
    assert printed.startswith("error: ") and printed.count("\n") == 1


NUMBERS = {
    "knn_eval": ["RUN", "--images", "-5"],
    "tsne": ["RUN", "--perplexity", "nan"],
    "probe_layers": ["RUN", "--images", "0"],
    "linear_eval": ["RUN", "--epochs", "0"],
    "bench_step": ["--method", "bp", "--rounds", "0"],
    "bench_linear": ["--classes", "0"],
    "bench_checkpoint": ["--steps", "0"],
    "make_shards": ["SRC", "DEST", "--quality", "101"],
    "status": ["RUN", "--every", "inf"],
}


@pytest.mark.parametrize("tool", ["knn_eval", *slow([name for name in NUMBERS if name != "knn_eval"])])
def test_a_number_that_can_not_be(tool: str) -> None:
    status, imported, printed = run(ROOT / "tools" / f"{tool}.py", *NUMBERS[tool])
    option = next(text for text in NUMBERS[tool] if text.startswith("--") and text != "--method")
    assert (status, imported) == (64, []) and printed.count("\n") == 1
    assert printed.startswith(f"error: argument {option}: {NUMBERS[tool][-1]} must be at least ")


@pytest.mark.slow
def test_what_is_checked_is_what_a_command_needs() -> None:
    """A command that computes does import PyTorch, so that the absence of its name above means something."""
    assert "torch" in run(ROOT / "tools" / "show_plan.py", RECIPE)[1]


def test_the_list_of_recipes() -> None:
    status, imported, printed = run(ROOT / "tools" / "show_plan.py", "--list")
    assert (status, imported) == (0, [])
    listed = dict(line.split(": ", 1) for line in printed.splitlines())
    everything = {str(path.relative_to(ROOT)) for path in (ROOT / "recipes").rglob("*.yaml")}
    assert set(listed) == {
        p for p in everything if not p.startswith(("recipes/base/", "recipes/det", "recipes/res"))
    }
    assert all(len(comment) > 20 for comment in listed.values())
    assert listed[RECIPE].startswith("LoCo on handwritten digits")
