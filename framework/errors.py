"""Errors that the person at the keyboard can mend."""

from __future__ import annotations


class UserError(Exception):
    """One line that names the file, key or number at fault and says what would be right."""


class LocalError(UserError):
    """An error that this rank alone has met, and must therefore print itself."""


class LostRank(LocalError):
    """Another rank is gone or silent; the same command goes on from the last checkpoint."""
