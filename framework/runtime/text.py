"""Text that any terminal and any file can take."""

from __future__ import annotations

import re


def printable(name: str) -> str:
    r"""A file name as text: bytes that are no UTF-8, for which Python has surrogates, become ``\xe9``."""
    escaped = re.sub("[\udc80-\udcff]", lambda found: f"\\x{ord(found[0]) - 0xDC00:02x}", name)
    return escaped.encode("utf-8", "backslashreplace").decode()
