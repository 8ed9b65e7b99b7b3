"""Which checkpoints stay."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from framework.checkpoints.retention import Keep, superfluous


def kept(losses: dict[int, float | None], **keep: object) -> set[int]:
    return set(losses) - set(superfluous(losses, Keep(**keep)))  # type: ignore[arg-type]


def test_each_part_of_the_policy_keeps_its_own() -> None:
    losses = {10: 3.0, 20: 1.0, 30: None, 40: 2.0, 50: 1.5}
    assert kept(losses, last=1) == {50}
    assert kept(losses, last=2) == {40, 50}
    assert kept(losses, last=1, every_steps=20) == {20, 40, 50}
    assert kept(losses, last=1, best=True) == {20, 50}
    assert kept({10: 1.0, 20: 1.0, 30: 2.0}, last=1, best=True) == {20, 30}, "of equals the newest"
    assert kept({10: None, 20: None}, last=1, best=True) == {20}


@given(st.lists(st.tuples(st.floats(0, 9), st.booleans()), min_size=1, max_size=40))
def test_deleting_as_one_goes_is_deleting_at_the_end(run: list[tuple[float, bool]]) -> None:
    """Whatever is deleted after each save would be deleted by looking at all of them together."""
    keep = Keep(last=2, every_steps=5, best=True)
    whole = {step: loss if known else None for step, (loss, known) in enumerate(run, 1)}
    there: dict[int, float | None] = {}
    for step, loss in whole.items():
        there[step] = loss
        for old in superfluous(there, keep):
            del there[old]
    assert set(there) == set(whole) - set(superfluous(whole, keep))
