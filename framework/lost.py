"""Ranks that die, and are named by those that are left: a broken collective tells only that a connection closed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from framework import distributed
from framework.errors import LostRank

_SOON = timedelta(milliseconds=100)  # for a death to be known on all connections


@contextmanager
def lost_ranks_named() -> Iterator[None]:
    """Inside, a collective that breaks off because ranks have died becomes a line that names them.

    Each rank waits for a message from every other one, which comes only if that one leaves because of a third. So
    who is gone without a message is who died first, wherever the break was noticed. Collective.

    Raises:
        LostRank: on every rank that is left.
    """
    others = [r for r in range(distributed.world_size()) if r != distributed.rank()]
    if not others:
        yield
        return
    group = dist.new_group(backend="gloo", timeout=distributed.PATIENCE)
    farewells = {r: _receive(r, group) for r in others}
    try:
        yield
    except (RuntimeError, LostRank) as error:
        if not isinstance(error, LostRank) and not _broken(error):
            raise
        said = [_send(r, group) for r in others]
        time.sleep(_SOON.total_seconds())
        if isinstance(error, LostRank):
            raise
        gone = [r for r, farewell in farewells.items() if _broken_off(farewell)]
        del said
        names = f"rank{'s' * (len(gone) > 1)} {', '.join(map(str, gone))}" if gone else "another rank"
        raise LostRank(
            f"rank {distributed.rank()}: {names} died or can't be reached ({reason(error)}); the same command goes "
            "on from the last checkpoint"
        ) from error


def reason(error: Exception) -> str:
    """The first sentence of a message, without the place in a source file before it."""
    text = str(error).splitlines()[0].split("] ", 1)[-1]
    return text.split(". ")[0].rstrip(".")


def _broken(error: Exception) -> bool:
    """Whether a collective has failed, rather than anything else."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def _receive(rank: int, group: dist.ProcessGroup) -> dist.Work:
    work = dist.irecv(torch.empty(1), rank, group=group)
    assert work is not None
    return work


def _send(rank: int, group: dist.ProcessGroup) -> dist.Work | None:
    with suppress(RuntimeError):  # to those who died
        return dist.isend(torch.zeros(1), rank, group=group)
    return None


def _broken_off(farewell: dist.Work) -> bool:
    """Whether the other end closed. The first wait that is not answered closes this end of all the others."""
    try:
        farewell.wait(_SOON)
    except RuntimeError as error:
        return "imed out" not in str(error) and "timeout" not in str(error)
    return False
