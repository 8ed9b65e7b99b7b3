"""Errors that the person at the keyboard can mend."""

from __future__ import annotations


class UserError(Exception):
    """One line that names the file, key or number at fault and says what would be right."""


class LocalError(UserError):
    """An error that this rank alone has met, and must therefore print itself."""
