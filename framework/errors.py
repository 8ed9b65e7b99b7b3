"""Errors that the person at the keyboard can mend."""

from __future__ import annotations

import errno

# Of file systems and networks. What is missing or forbidden is a mistake, and stays so.
_PASSING = {
    errno.EIO,
    errno.ESTALE,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EHOSTDOWN,
    errno.ENOTCONN,
    errno.ESHUTDOWN,
    errno.ETIMEDOUT,
}


class UserError(Exception):
    """One line that names the file, key or number at fault and says what would be right."""


class LocalError(UserError):
    """An error that this rank alone has met, and must therefore print itself."""


class LostRank(LocalError):
    """Another rank is gone or silent; the same command goes on from the last checkpoint."""


def may_pass(error: BaseException | None) -> bool:
    """Whether a file system or network is behind an error, which may work again at the next start."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _PASSING:
            return True
        error = error.__cause__
    return False
