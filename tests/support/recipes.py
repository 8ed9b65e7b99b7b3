"""What is said of a recipe that is wrong."""

from __future__ import annotations

import pytest

from framework.config.loading import load
from framework.runtime.errors import UserError


def fails(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        load(argv)
    message = str(caught.value)
    assert "\n" not in message
    return message
