"""Which later blocks a module's LAM copies: the lists of MLAAN's code, and a rule for other networks.

Blocks are written ``stage.number``, stages from 1 and numbers from 0; ``1.0-1.4`` means all from 1.0 to 1.4.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from framework.local.blocks import Block

#: channels of the stages, blocks of the stages -> modules -> (ends of modules, copied blocks)
PUBLISHED: dict[tuple[tuple[int, ...], tuple[int, ...]], dict[int, list[tuple[str, str]]]] = {
    ((16, 32, 64), (5, 5, 5)): {
        8: [
            ("1.0 1.2", "2.0 3.0 3.2 3.4"),
            ("1.4", "2.0 3.0 3.3 3.4"),
            ("2.1 2.3", "3.0 3.2 3.3 3.4"),
            ("3.0", "3.2 3.3 3.4"),
            ("3.2", "3.3 3.4"),
        ],
        15: [
            ("1.0 1.1 1.3", "2.0 3.0 3.2 3.4"),
            ("1.2 1.4", "2.0 3.0 3.3 3.4"),
            ("2.0-2.4", "3.0 3.2 3.3 3.4"),
            ("3.0", "3.1 3.2 3.4"),
            ("3.1", "3.2 3.3 3.4"),
            ("3.2", "3.3 3.4"),
            ("3.3", "3.4"),
        ],
    },
    ((16, 32, 64), (18, 18, 18)): {
        32: [
            ("1.1-1.17", "2.0 3.0 3.2 3.17"),
            ("2.1-2.16", "3.0 3.2 3.3 3.17"),
            ("2.17", "3.0 3.3 3.4 3.17"),
            ("3.1-3.6", "3.8 3.17"),
            ("3.7 3.9", "3.14 3.17"),
            ("3.11", "3.15 3.17"),
            ("3.13", "3.16 3.17"),
            ("3.15", "3.17"),
        ],
        54: [
            ("1.0-1.17", "2.0 3.0 3.2 3.17"),
            ("2.0-2.16", "3.0 3.2 3.3 3.17"),
            ("2.17", "3.0 3.3 3.4 3.17"),
            ("3.0-3.6", "3.8 3.17"),
            ("3.7-3.10", "3.14 3.17"),
            ("3.11 3.12", "3.15 3.17"),
            ("3.13-3.15", "3.16 3.17"),
            ("3.16", "3.17"),
        ],
    },
    # ResNet-34. Several lists begin with an early block of the module's own stage, as in the authors' code.
    ((64, 128, 256, 512), (3, 4, 6, 3)): {
        16: [
            ("1.0-1.2", "2.0 2.1 3.0 4.0 4.2"),
            ("2.0-2.3", "2.1 3.0 4.0 4.2"),
            ("3.0-3.5", "3.1 4.0 4.1"),
            ("4.0", "4.1 4.1 4.2"),
            ("4.1", "4.1 4.2"),
        ],
    },
    ((256, 512, 1024, 2048), (3, 4, 23, 3)): {
        33: [
            ("1.0-1.2", "2.0 3.0 4.0 4.2"),
            ("2.0-2.3", "3.0 4.0 4.1"),
            ("3.0-3.22", "4.0 4.1"),
            ("4.0 4.1", "4.1 4.2"),
        ],
    },
    ((256, 512, 1024, 2048), (3, 8, 36, 3)): {
        50: [
            ("1.0-1.2", "2.0 3.0 4.0 4.2"),
            ("2.0-2.7", "3.0 4.0 4.1"),
            ("3.0-3.35", "4.0 4.1"),
            ("4.0 4.1", "4.1 4.2"),
        ],
    },
}


def published(
    channels: tuple[int, ...], blocks: tuple[Block, ...], modules: int, end: Block
) -> list[Block] | None:
    """The authors' list for a module that ends with ``end``.

    Args:
        channels: at the end of every stage.
        blocks: of the network.
        modules: that it is cut into, not counting a stem of its own.
        end: last block of the module.

    Returns:
        The blocks to copy, in order; ``None`` where the authors have no list.
    """
    counts = tuple(sum(b.stage == stage for b in blocks) for stage in range(1, blocks[-1].stage + 1))
    rows = PUBLISHED.get((channels, counts), {}).get(modules, [])
    by_place = {(b.stage, b.number): b for b in blocks}
    for ends, copied in rows:
        if any(_within((end.stage, end.number), item) for item in ends.split()):
            return [by_place[_place(text)] for text in copied.split()]
    return None


def stages_by_width(blocks: tuple[Block, ...], widths: list[int]) -> tuple[Block, ...]:
    """The blocks, numbered so that a stage also ends where the width changes (EfficientNet).

    Args:
        blocks: of the network, in order.
        widths: their output channels.
    """
    counted: list[Block] = []
    for i, block in enumerate(blocks):
        new = i == 0 or (block.stage, widths[i]) != (blocks[i - 1].stage, widths[i - 1])
        stage = counted[-1].stage + new if counted else 1
        counted.append(block._replace(stage=stage, number=0 if new else counted[-1].number + 1))
    return tuple(counted)


def by_rule(blocks: tuple[Block, ...], end: Block) -> list[Block]:
    """The first block of each later stage, then blocks of the last up to four in all, the very last included.

    A module of the last stage gets at most two. The rule is ours, drawn from the authors' lists.
    """
    last_stage = blocks[-1].stage
    chosen = [b for b in blocks if b.stage > end.stage and b.number == 0]
    after = chosen[-1] if chosen else end
    rest = [b for b in blocks if b.stage == last_stage and b.number > after.number]
    wanted = min(max(1, 4 - len(chosen)) if chosen else 2, len(rest))
    return chosen + [rest[-1 - (len(rest) * i) // wanted] for i in reversed(range(wanted))]


def _within(place: tuple[int, int], item: str) -> bool:
    first, _, last = item.partition("-")
    return _place(first) <= place <= _place(last or first)


def _place(text: str) -> tuple[int, int]:
    stage, _, number = text.partition(".")
    return int(stage), int(number)
