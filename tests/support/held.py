"""A process that nothing but KILL wakes. After STOP, Slurm's time limit would: it sends CONT before TERM.

    python tests/support/held.py PID

holds the main thread of a process, as a debugger does, until the process ends. Prints a line when it is held.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

SEIZE, INTERRUPT = 0x4206, 0x4207  # of ptrace(2)


def hold(pid: int) -> None:
    """Return when it is held; the holder is a process of its own, which ends with the one it holds.

    Raises:
        RuntimeError: the system does not allow it.
    """
    command = [sys.executable, __file__, str(pid)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    if not holder.stdout.readline():
        raise RuntimeError(f"process {pid} can't be held")


def main() -> None:
    """Hold the process that the command line names."""
    pid = int(sys.argv[1])
    libc = ctypes.CDLL(None, use_errno=True)
    for request in (SEIZE, INTERRUPT):
        if libc.ptrace(ctypes.c_long(request), ctypes.c_long(pid), None, None):
            raise OSError(ctypes.get_errno(), "ptrace")
    os.waitpid(pid, 0)
    print("held", flush=True)
    while os.WIFSTOPPED(os.waitpid(pid, 0)[1]):
        pass  # signals, which it does not get


if __name__ == "__main__":
    main()
