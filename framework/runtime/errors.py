"""Errors that the person at the keyboard can mend."""

from __future__ import annotations

import errno
from typing import Self

# Of file systems and networks. What is missing or forbidden is a mistake, and stays so.
_TRANSIENT = {
    errno.EAGAIN,
    errno.EIO,
    errno.EREMOTEIO,
    errno.ESTALE,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.ENOTCONN,
    errno.ESHUTDOWN,
    errno.ETIMEDOUT,
}


def is_transient(error: BaseException | None) -> bool:
    """Whether a file system or network is behind an error, which may work again at the next start."""
    if isinstance(error, UserError):
        return error.transient
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    return isinstance(error, OSError) and error.errno in _TRANSIENT


class UserError(Exception):
    """One line that names the file, key or number at fault and says what would be right."""

    _transient = False

    @property
    def transient(self) -> bool:
        """Whether the next start may do without it, unmended: ``is_transient`` of its cause."""
        return self._transient or is_transient(self.__cause__)

    def alone(self) -> Self:
        """The same without its cause and the frames it came through, which would stay alive with it."""
        return self.as_transient(*self.args) if self.transient else type(self)(*self.args)

    @classmethod
    def as_transient(cls, *args: str) -> Self:
        """One that the next start may do without, whatever its cause."""
        error = cls(*args)
        error._transient = True
        return error


class LocalError(UserError):
    """An error that this rank alone has met, and must therefore print itself."""


class DeadRank(LocalError):
    """Another rank is gone or silent; the same command goes on from the last checkpoint."""

    _transient = True
