"""What a person looks at while a run lasts."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.text import Text


class Progress:
    """A bar with every unit's loss and images/s; plain lines now and then where there is no terminal.

    Args:
        steps: steps of the whole run.
        start: steps that are done already.
        enabled: show anything at all; one rank does.
        console: where to print; standard output by default.
        interval: seconds between two plain lines; the first and the last step always get one.
    """

    def __init__(
        self,
        steps: int,
        start: int = 0,
        *,
        enabled: bool = True,
        console: Console | None = None,
        interval: float = 10.0,
    ) -> None:
        self._steps, self._enabled, self._interval = steps, enabled, interval
        self._console = console or Console()
        self._printed = -math.inf
        self._bar = RichProgress(
            TextColumn("epoch {task.fields[epoch]:.1f}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
        )
        self._task = self._bar.add_task("", total=steps, completed=start, epoch=0.0, speed=_speed(0.0))
        self._live = Live(self._bar, console=self._console, refresh_per_second=4)

    def __enter__(self) -> Progress:
        if self._enabled and self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._enabled and self._console.is_terminal:
            self._live.stop()

    def update(
        self,
        step: int,
        epoch: float,
        losses: Mapping[str, float],
        images_per_second: float,
        mfu: float | None = None,
    ) -> None:
        """Show that step ``step`` (counted from 0) is done; without losses where they are not known."""
        if not self._enabled:
            return
        text = "  ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
        if self._console.is_terminal:
            self._bar.update(
                self._task, completed=step + 1, epoch=epoch, speed=_speed(images_per_second, mfu)
            )
            if losses:
                self._live.update(Group(self._bar, Text(text, style="dim")))
            return
        now = time.monotonic()
        if losses and (now - self._printed >= self._interval or step + 1 == self._steps):
            self._printed = now
            speed = f"  {_speed(images_per_second, mfu)}" if images_per_second else ""
            head = f"step {step + 1}/{self._steps}  epoch {epoch:.1f}{speed}"
            print(f"{head}  {text}", file=self._console.file, flush=True)

    def note(self, text: str) -> None:
        """A line that stays, above the bar."""
        if self._enabled:
            self._console.print(text, highlight=False, soft_wrap=True)


def _speed(images_per_second: float, mfu: float | None = None) -> str:
    return f"{images_per_second:.0f} images/s" + ("" if mfu is None else f", MFU {mfu:.0%}")
