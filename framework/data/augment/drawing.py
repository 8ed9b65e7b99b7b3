"""Seeds for code that draws from the global generators of Python and NumPy, as timm's augmentation does."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np


@contextmanager
def generators_kept() -> Iterator[None]:
    """Both generators go on afterwards as if nothing had been drawn."""
    numpy, python = np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        np.random.set_state(numpy)
        random.setstate(python)


def seed_generators(*key: int) -> None:
    """Numbers drawn from here on are a function of ``key``, which are whole numbers of at least 0."""
    words = np.random.SeedSequence(key).generate_state(4)
    np.random.seed(words)
    random.seed(words.tobytes())
