"""Memory that was freed goes back to the system."""

from __future__ import annotations

import ctypes


class Heap:
    """Counts what is freed, and trims the heap now and then.

    glibc keeps freed blocks of up to 32 MiB that lie between small ones in use: a loop that makes and frees large
    tensors and keeps something small of each would grow by all of them.

    Args:
        every: bytes after which it is trimmed.
    """

    def __init__(self, every: int = 2**25) -> None:
        self._every, self._freed = every, 0

    def freed(self, nbytes: int) -> None:
        """Bytes that were freed just now."""
        self._freed += nbytes
        if self._freed >= self._every:
            self._freed = 0
            try:
                ctypes.CDLL(None).malloc_trim(0)
            except AttributeError:  # another C library
                self._every = 2**63
