"""How commands end: errors of one line, and the exit status that job scripts read."""

from __future__ import annotations

import argparse
import logging
import math
import sys
from collections.abc import Callable
from typing import NoReturn, TypeVar

from framework.runtime.errors import LocalError, UserError
from framework.runtime.exit_status import exit_status
from framework.runtime.launch import launched_rank
from framework.runtime.text import printable

Number = TypeVar("Number", int, float)


def bounded(kind: type[Number], low: float, high: float = math.inf) -> Callable[[str], Number]:
    """The ``type`` of an argument that is a finite number from ``low`` to ``high``."""

    def parsed(text: str) -> Number:
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            most = f" and at most {high:g}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text} must be at least {low:g}{most}")
        return value

    parsed.__name__ = kind.__name__  # argparse says "invalid int value"
    return parsed


class Parser(argparse.ArgumentParser):
    """Of a command's arguments. A mistake in them is one line and exit status 64, as everywhere, within ``status``."""

    def error(self, message: str) -> NoReturn:
        """Instead of argparse's usage and exit status 2.

        Raises:
            UserError: always.
        """
        raise UserError(f"{message}; --help lists the arguments")


def status(work: Callable[[], int | None], stopped: str = "stopped") -> int:
    """Do the work of a command; its exit status. What a person can mend becomes one line.

    Args:
        work: returns the exit status if it is not 0.
        stopped: what to say after Ctrl-C.
    """
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        return work() or 0
    except UserError as error:
        if launched_rank() == 0 or isinstance(error, LocalError):
            print(f"error: {printable(str(error))}", file=sys.stderr, flush=True)
        return exit_status(error)
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        return 130
