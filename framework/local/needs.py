"""What a head may need besides its input."""

from __future__ import annotations

from enum import Enum


class Need(Enum):
    """The value completes "needs ..."."""

    IMAGES = "the images"
    LABELS = "labels"
    IDS = "the numbers of the images in the data set"
    TEACHER = "a teacher"
    VIEWS = "two views of every image"


#: Nothing fills these in yet; a plan with a head that needs them is refused.
NOT_PROVIDED = frozenset({Need.IDS})
