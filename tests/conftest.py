"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.pool import Pool, start_server

# As many as a rank of the pool has: float32 sums of two threads differ, and steps of training blow that up.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """``-m "not slow"`` takes the place of the default ``-m``, and must not let these in."""
    for item in items:
        if any(item.get_closest_marker(marker) for marker in ("slurm", "soak", "detectron2")):
            item.add_marker(pytest.mark.slow)


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


@pytest.fixture(scope="session")
def both_runs(pool: Callable[[int], Pool], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A LoCo run and a GIM run of the same small network on digits, four steps each; not to be changed."""
    from tests.support.trained import make_both  # needs the whole package, which most tests do not

    loco, gim = pool(1).run(make_both, tmp_path_factory.mktemp("runs"))[0]
    return Path(loco), Path(gim)
