"""Which blocks MLAAN's Leap Augmented Modules copy; ``lam_head`` has the modules themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from framework.local import lam_tables
from framework.local.lam_copies import Copies
from framework.local.units import NetworkInfo
from framework.runtime.errors import UserError

if TYPE_CHECKING:
    from framework.local.blocks import Block
    from framework.local.lam_head import Lam
    from framework.network import Shape


@dataclass(frozen=True)
class LamBuilder:
    """Builds the LAMs of a plan.

    Attributes:
        network: has the blocks that are copied.
        lists: names of blocks to copy, by name of the segment, in place of the published list or the rule's.
        copies: how they learn.

    Raises:
        UserError: ``lists`` names a segment or block that does not exist, or a block that is not later.
    """

    network: NetworkInfo
    lists: Mapping[str, Sequence[str]]
    copies: Copies

    def __post_init__(self) -> None:
        if unknown := set(self.lists) - set(self.network.names):
            raise UserError(
                f"method.lam_blocks: no segment {min(unknown)}; they are called {', '.join(self.network.names)}"
            )

    def build(self, segment: int) -> tuple[Lam, Shape]:
        """The LAM on the end of a segment, and the shape of its output.

        Raises:
            UserError: the blocks do not fit on top of each other.
        """
        return self._lam(segment, self.blocks(segment))

    def next_block(self, segment: int) -> tuple[Lam, Shape]:
        """The same with a list of one block, the next."""
        return self._lam(segment, self._later_blocks(segment)[:1])

    def _lam(self, segment: int, blocks: Sequence[Block]) -> tuple[Lam, Shape]:
        from framework.local.lam_head import Lam

        lam = Lam(blocks, self.network.segments, self.copies)
        try:
            return lam, lam.output_shape(self.network.outputs[segment])
        except (RuntimeError, UserError) as error:
            copied = ", ".join(b.name for b in blocks)
            name = self.network.names[segment]
            raise UserError(
                f"method.lam_blocks.{name}: {copied} can't follow each other: {str(error).splitlines()[0]}"
            ) from error

    def blocks(self, segment: int) -> list[Block]:
        """What the LAM of a segment copies."""
        later = self._later_blocks(segment)
        name, blocks = self.network.names[segment], self.network.blocks
        if name in self.lists:
            by_name = {b.name: b for b in later}
            if not self.lists[name]:
                raise UserError(f"method.lam_blocks.{name}: must name at least one of {', '.join(by_name)}")
            if wrong := [wanted for wanted in self.lists[name] if wanted not in by_name]:
                raise UserError(
                    f"method.lam_blocks.{name}: {wrong[0]} is no later block; {', '.join(by_name)} are"
                )
            return [by_name[wanted] for wanted in self.lists[name]]
        # A segment that is the stem alone, without a block, is treated like the first block.
        end = max(0, sum(b.segment <= segment for b in blocks) - 1)
        widths = [b.channels for b in blocks]
        of_stages = tuple({b.stage: width for b, width in zip(blocks, widths, strict=True)}.values())
        modules = len({b.segment for b in blocks})
        listed = lam_tables.published(of_stages, blocks, modules, blocks[end])
        if listed is not None:
            return listed
        by_width = lam_tables.stages_by_width(blocks, widths)
        return lam_tables.by_rule(by_width, by_width[end])

    def _later_blocks(self, segment: int) -> list[Block]:
        later = [b for b in self.network.blocks if b.segment > segment]
        if not later:
            name = self.network.names[segment]
            raise UserError(
                f"a head that copies later blocks can't stand on segment {name}: no block follows it"
            )
        return later
