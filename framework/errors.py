"""Errors that the person at the keyboard can mend."""

from __future__ import annotations

import errno
from typing import Self

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

    _passing = False

    @property
    def passing(self) -> bool:
        """Whether a file system or network is behind it, which may work again at the next start."""
        cause = self.__cause__
        if isinstance(cause, UserError):
            return cause.passing
        return self._passing or (isinstance(cause, OSError) and cause.errno in _PASSING)

    def alone(self) -> Self:
        """The same without its cause and the frames it came through, which would stay alive with it."""
        error = type(self)(*self.args)
        error._passing = self.passing
        return error


class LocalError(UserError):
    """An error that this rank alone has met, and must therefore print itself."""


class LostRank(LocalError):
    """Another rank is gone or silent; the same command goes on from the last checkpoint."""
