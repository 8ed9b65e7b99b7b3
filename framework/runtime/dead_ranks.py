"""Names ranks that die, and ends those that would wait for them for ever."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from framework.runtime.errors import DeadRank, LocalError, UserError
from framework.runtime.exit_status import exit_status
from framework.runtime.peers import End, Peers

SOON = 5.0  # seconds for the news of a death to follow the error of a collective
TURN = 0.1  # between two looks


@contextmanager
def dead_ranks_named(peers: Peers, patience: float) -> Iterator[None]:
    """Inside, a collective that fails because ranks have ended becomes an error that names them.

    Where it does not fail but waits for ever, as under NCCL or over a link that is cut, this process prints that
    error after ``patience`` seconds and ends.

    Args:
        peers: the other ranks; they are told how this one ends, unless it ends well.
        patience: below the half minute that Slurm scripts give the other ranks.

    Raises:
        DeadRank: on every rank that is left, after a death.
        LocalError: on the others, after an error that one rank has met alone.
    """
    over = threading.Event()
    thread = threading.Thread(
        target=_end_in_time, args=(peers, patience, over), name="dead ranks", daemon=True
    )
    thread.start()
    try:
        yield
    except UserError as error:
        own = isinstance(error, LocalError) and not isinstance(error, DeadRank)
        peers.leave((End.TRANSIENT if error.transient else End.MISTAKE) if own else End.LEFT)
        raise
    except RuntimeError as error:
        if not _broken(error) or not peers.hosts[1:]:
            raise
        cause = _news(peers) or DeadRank(
            f"rank {peers.rank}: another rank died or can't be reached ({_reason(error)}); {GOES_ON}"
        )
        peers.leave(End.LEFT)
        raise cause from error
    finally:
        over.set()
        thread.join()


GOES_ON = "the same command goes on from the last checkpoint"


def _news(peers: Peers) -> LocalError | None:
    deadline = time.monotonic() + SOON
    while blame(peers) is None and time.monotonic() < deadline:
        time.sleep(TURN)
    time.sleep(TURN)  # for others that died at the same time
    return blame(peers)


def blame(peers: Peers) -> LocalError | None:
    """Why this rank can't go on: others that died, or met an error of their own; ``None`` if it can."""
    ends = dict(peers.ends)
    where = f"rank {peers.rank}: "
    for end in (End.MISTAKE, End.TRANSIENT):
        if failed := [r for r in sorted(ends) if ends[r] is end and r != peers.rank]:
            kind = LocalError if end is End.MISTAKE else LocalError.as_transient
            return kind(f"{where}{_named(failed)} stopped with an error, which tells what to mend")
    if gone := [r for r in sorted(ends) if ends[r] is End.GONE]:
        hosts = ", ".join(dict.fromkeys(peers.hosts[r] for r in gone))
        return DeadRank(f"{where}{_named(gone)} died or can't be reached (on {hosts}); {GOES_ON}")
    return None


def _end_in_time(peers: Peers, patience: float, over: threading.Event) -> None:
    while not over.wait(TURN):
        if blame(peers) is not None:
            if over.wait(patience):
                return
            error = blame(peers)
            assert error is not None
            peers.leave(End.LEFT)
            print(f"error: {error}", file=sys.stderr, flush=True)
            os._exit(exit_status(error))


def _named(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def _reason(error: Exception) -> str:
    """The first sentence of a message, without the place in a source file before it."""
    text = str(error).splitlines()[0].split("] ", 1)[-1]
    return text.split(". ")[0].rstrip(".")


def _broken(error: Exception) -> bool:
    """Whether a collective has failed, rather than anything else."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)
