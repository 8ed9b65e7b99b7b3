"""A run over two hosts whose link is cut: nobody hears of it, and all end in time and go on later."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from framework.runtime.exit_status import EXIT_TRY_AGAIN
from tests.support import two_hosts
from tests.support.marks import slow, soak
from tests.support.pool import Pool
from tests.support.ranks import Ranks
from tests.support.runs import ROOT, assert_same_run, toy
from tests.support.two_hosts import ADDRESSES, TwoHosts

pytestmark = pytest.mark.skipif(two_hosts.missing() is not None, reason=two_hosts.missing() or "")
STEPS, HANG = 40, 20


@pytest.fixture
def hosts() -> Iterator[TwoHosts]:
    with TwoHosts() as hosts:
        yield hosts


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, pool: Callable[[int], Pool]) -> Path:
    """The run to compare with; ``pool`` has the server import what ranks need."""
    folder = tmp_path_factory.mktemp("hosts") / "undisturbed"
    with Ranks(arguments(folder), 2, folder / "record") as ranks:
        assert ranks.statuses() == [0, 0], ranks.printed
    return folder


def arguments(folder: Path) -> list[str]:
    length = (f"train.max_steps={STEPS}", "train.epochs=10", "checkpoint.every_steps=2", "data.workers=0")
    more = (f"faults.hang_seconds={HANG}", "engine=ddp", *length)  # DeepSpeed may take longer to import
    return [str(ROOT / "recipes" / "loco_r50_800ep.yaml"), *toy(folder, *more)]


def logged(folder: Path) -> int:
    log = folder / "run" / "metrics.jsonl"
    return log.read_bytes().count(b'"losses"') if log.exists() else 0


def saving(folder: Path) -> bool:
    return logged(folder) > 4 and any(folder.glob("run/checkpoints/.step-*.partial"))


def errors(ranks: Ranks) -> list[str]:
    """What the ranks say in the end; a watchdog's report would mean that nobody was named in time."""
    assert "faults.hang_seconds" not in ranks.printed and "Traceback" not in ranks.printed, ranks.printed
    return [line for line in ranks.printed.splitlines() if line.startswith("error: ")]


@pytest.mark.slow
@pytest.mark.parametrize(
    "moment", [lambda folder: logged(folder) > 4, saving], ids=["in mid-step", "in mid-save"]
)
def test_a_link_that_is_cut_ends_the_run_and_the_next_start_goes_on(
    tmp_path: Path, undisturbed: Path, hosts: TwoHosts, moment: Callable[[Path], bool]
) -> None:
    with hosts.ranks(arguments(tmp_path), tmp_path / "record") as ranks:
        ranks.until(lambda: moment(tmp_path))
        hosts.cut()
        assert ranks.statuses() == [EXIT_TRY_AGAIN] * 2, ranks.printed
    goes_on = "the same command goes on from the last checkpoint"
    assert errors(ranks) == [
        f"error: rank 0: rank 1 died or can't be reached (on far); {goes_on}",
        f"error: rank 1: rank 0 died or can't be reached (on near); {goes_on}",
    ]
    assert 4 < logged(tmp_path) < STEPS
    hosts.mend()
    with hosts.ranks(arguments(tmp_path), tmp_path / "record") as ranks:
        assert ranks.statuses() == [0, 0], ranks.printed
    assert_same_run(tmp_path, undisturbed, STEPS)


@pytest.mark.parametrize("moment", [*slow(["", "meet"]), *soak(["_store"])])
def test_a_link_that_is_cut_while_ranks_join_ends_both(
    tmp_path: Path, hosts: TwoHosts, undisturbed: Path, moment: str
) -> None:
    if not moment:
        hosts.cut()
    with hosts.ranks(arguments(tmp_path), tmp_path / "record", cut_after=moment) as ranks:
        assert ranks.statuses() == [EXIT_TRY_AGAIN] * 2, ranks.printed
    if moment == "_store":  # over which rank 1 then waits without end; its watchdog ends it
        assert "error: rank 0 of 2 can't meet the others at" in ranks.printed
        assert (
            f"rank 1 on far: no sign of any rank for {HANG} s while joining the other ranks" in ranks.printed
        )
        assert "(no sign of rank 1)" in ranks.printed
    elif moment == "meet":
        for rank, line in enumerate(errors(ranks)):
            assert line.startswith(f"error: rank {rank}: rank {1 - rank} died or can't be reached (on ")
    else:
        for rank, line in enumerate(errors(ranks)):
            assert line.startswith(f"error: rank {rank} of 2 can't meet the others at {ADDRESSES[0]}:")
    assert not (tmp_path / "run" / "lock").exists()
    hosts.mend()
    with hosts.ranks(arguments(tmp_path), tmp_path / "record") as ranks:
        assert ranks.statuses() == [0, 0], ranks.printed
    assert_same_run(tmp_path, undisturbed, STEPS)
