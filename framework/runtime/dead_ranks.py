"""Names ranks that die: the error of a collective says only that a connection closed."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from framework.runtime import distributed
from framework.runtime.errors import DeadRank, LocalError

logger = logging.getLogger(__name__)

_CONNECTING = timedelta(minutes=1)
_SOON = timedelta(milliseconds=100)  # for all connections to notice a death


@contextmanager
def dead_ranks_named() -> Iterator[None]:
    """Inside, a collective that fails because ranks have ended becomes an error that names them. Collective.

    Each rank has a receive pending from every other one. A rank that leaves with an error, its own or a broken
    collective's, sends a message first. So a rank whose connection closes without a message is one that died.

    Raises:
        DeadRank: on every rank that is left, after a death.
        LocalError: on the others, after an error that one rank has met alone.
    """
    others = [r for r in range(distributed.world_size()) if r != distributed.rank()]
    if not others:
        yield
        return
    group = _connected()
    if group is None:
        yield
        return
    words = {r: torch.zeros(1) for r in others}
    farewells = {r: dist.irecv(word, r, group=group) for r, word in words.items()}
    try:
        yield
    except (RuntimeError, LocalError) as error:
        own = isinstance(error, LocalError)
        if not own and not _broken(error):
            raise
        mine = torch.tensor([float(own and not isinstance(error, DeadRank))])
        for r in others:
            with suppress(RuntimeError):  # to those who died
                dist.isend(mine, r, group=group)
        time.sleep(_SOON.total_seconds())
        if own:
            raise
        gone = [r for r, farewell in farewells.items() if _broken_off(farewell)]
        failed = [r for r, word in words.items() if word]
        where = f"rank {distributed.rank()}: "
        if failed:
            raise LocalError(
                f"{where}{_named(failed)} stopped with an error, which tells what to mend"
            ) from error
        raise DeadRank(
            f"{where}{_named(gone)} died or can't be reached ({_reason(error)}); the same command goes on from the "
            "last checkpoint"
        ) from error


def _connected() -> dist.ProcessGroup | None:
    """A gloo group beside the training's; ``None`` if some rank can't connect, where NCCL may do without."""
    try:
        group = distributed.new_group(backend="gloo", timeout=_CONNECTING)
    except RuntimeError as error:
        group = None
        logger.warning(
            "ranks that die won't be named: gloo can't connect them (see GLOO_SOCKET_IFNAME): %s",
            _reason(error),
        )
    return None if distributed.max_over_ranks(int(group is None))() else group


def _named(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}" if ranks else "another rank"


def _reason(error: Exception) -> str:
    """The first sentence of a message, without the place in a source file before it."""
    text = str(error).splitlines()[0].split("] ", 1)[-1]
    return text.split(". ")[0].rstrip(".")


def _broken(error: Exception) -> bool:
    """Whether a collective has failed, rather than anything else."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def _broken_off(farewell: dist.Work | None) -> bool:
    """Whether the other end closed the connection. A wait that times out closes all of this rank's connections."""
    assert farewell is not None
    try:
        farewell.wait(_SOON)
    except RuntimeError as error:
        return "imed out" not in str(error) and "timeout" not in str(error)
    return False
