"""The exit statuses that job scripts read, as ``sysexits.h`` numbers them."""

from __future__ import annotations

from framework.runtime.errors import UserError

# srun reports the largest status of its tasks, so a transient failure on one rank outweighs a mistake told by others.
EXIT_USAGE = 64  # EX_USAGE: a mistake; starting the same command again would not help
EXIT_TRY_AGAIN = 75  # EX_TEMPFAIL: start the same command again


def exit_status(error: UserError) -> int:
    """``EXIT_TRY_AGAIN`` if the same command may succeed at its next start, else ``EXIT_USAGE``."""
    return EXIT_TRY_AGAIN if error.transient else EXIT_USAGE
