"""Fixtures shared by all tests, and what the default run leaves out."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch

pytest.register_assert_rewrite("tests.support")

from tests.support.pool import Pool, start_server  # noqa: E402

# As many as a rank of the pool has: float32 sums of two threads differ, and steps of training blow that up.
os.environ["OMP_NUM_THREADS"] = "1"

# Each is selected by its own name, so that no test has two.
LEFT_OUT = {"slow", "soak", "slurm", "detectron2", "gpu"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="where the tests marked gpu compute; cpu rehearses those that can do without a GPU",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device") == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = (
            ""  # also for the code under test, which takes a GPU that it finds
        )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        found = LEFT_OUT & {marker.name for marker in item.iter_markers()}
        if len(found) > 1:
            raise pytest.UsageError(
                f"{item.nodeid}: has the markers {sorted(found)}, and may have one of them"
            )


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two processes for all default tests or all long ones; whatever was picked runs in this one."""
    everything = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    return 2 if everything and config.option.markexpr in (_default(config), "slow") else 0


def _default(config: pytest.Config) -> str:
    """The expression by which the default run selects."""
    addopts = config.getini("addopts")
    return str(addopts[addopts.index("-m") + 1])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.option.markexpr == _default(config):
        terminalreporter.write_line(
            "Left out: the long tests (uv run pytest -m slow) and those marked soak, slurm, detectron2 and gpu; "
            "tests/README.md says what they need. .ci/run runs all that CI does."
        )


def pytest_collection_finish(session: pytest.Session) -> None:
    if any("pool" in getattr(item, "fixturenames", ()) for item in session.items):
        start_server()


@pytest.fixture(scope="session")
def pool() -> Iterator[Callable[[int], Pool]]:
    """``pool(world_size)``: the standing pool of that many ranks, started on first use."""
    pools: dict[int, Pool] = {}

    def get(world_size: int) -> Pool:
        if world_size not in pools or pools[world_size].closed:
            pools[world_size] = Pool(world_size)
        return pools[world_size]

    yield get
    for standing in pools.values():
        standing.close()


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Where a test marked ``gpu`` computes.

    After a kernel that went wrong every other would fail in this process, too: then the session ends.
    """
    import torch

    if request.config.getoption("--device") == "cpu":
        yield torch.device("cpu")
        return
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU (--device cpu rehearses what can do without)")
    yield torch.device("cuda")
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        pytest.exit(f"{request.node.nodeid} left the GPU unusable for this process: {error}", returncode=70)


@pytest.fixture
def gpu(device: torch.device) -> torch.device:
    """The same for what a CPU can't do at all."""
    if device.type == "cpu":
        pytest.skip("needs a GPU")
    return device


@pytest.fixture(scope="session")
def both_runs(pool: Callable[[int], Pool], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A LoCo run and a GIM run of the same small network on digits, four steps each; not to be changed.

    Both of pytest's processes share them; whoever comes first makes them.
    """
    from tests.support.trained import make_both  # needs the whole package, which most tests do not

    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "runs"
    folder.mkdir(exist_ok=True)
    paths = folder / "paths.json"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not paths.exists():
            paths.write_text(json.dumps(pool(1).run(make_both, tmp_path_factory.mktemp("both"))[0]))
    loco, gim = json.loads(paths.read_text())
    return Path(loco), Path(gim)
