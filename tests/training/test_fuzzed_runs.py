"""Whole runs of recipes drawn at random: two steps, scores and results, or one line."""

from __future__ import annotations

import contextlib
import gc
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings

from framework.config import loading
from framework.runtime.errors import UserError
from framework.training.run import train
from tests.support.fuzzing import Tree, run_recipes
from tests.support.pool import Pool

PoolOf = Callable[[int], Pool]
FUZZ = settings(
    deadline=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
    phases=[Phase.explicit, Phase.generate],
)
FIXED = ["data.prepare=digits", "data.workers=0", "train.max_steps=2", "name=fuzzed"]


def attempt(tree: Tree, digits: str) -> str:
    """What a run says at its end: nothing, one line, or the traceback of what must not come out."""
    with TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        file = Path(folder) / "fuzzed.yaml"
        file.write_text(yaml.safe_dump(tree))
        argv = [str(file), *FIXED, f"data.path={digits}", f"run_dir={folder}/run"]
        try:
            with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
                train(loading.load(argv))
        except UserError as error:
            return str(error)
        except Exception:
            return traceback.format_exc()
        finally:
            _forget_pipelines()
    return ""


def _forget_pipelines() -> None:
    """A run that ended with an error leaves its grid in a global of DeepSpeed's."""
    from deepspeed.utils import groups

    groups.mpu = None
    gc.collect()


def check(pool: PoolOf, tree: Tree, digits: Path) -> None:
    (message,) = pool(1).run(attempt, tree, str(digits))
    assert "\n" not in message, message


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzzed") / "digits"


@given(tree=run_recipes())
@settings(FUZZ, max_examples=3, derandomize=True)
def test_a_run_ends_well_or_with_one_line(pool: PoolOf, digits: Path, tree: Tree) -> None:
    check(pool, tree, digits)


@pytest.mark.slow
@given(tree=run_recipes())
@settings(FUZZ, max_examples=40, derandomize=True)
def test_many_runs_end_well_or_with_one_line(pool: PoolOf, digits: Path, tree: Tree) -> None:
    check(pool, tree, digits)


@pytest.mark.soak
@given(tree=run_recipes())
@settings(FUZZ, max_examples=1500)
def test_hundreds_of_runs_end_well_or_with_one_line(pool: PoolOf, digits: Path, tree: Tree) -> None:
    check(pool, tree, digits)
