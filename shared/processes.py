"""Processes that do not outlive the one that started them."""

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def die_with_parent(parent: int | None = None) -> None:
    """From now on the kernel kills this process when the one that started it ends, however it ends.

    An experiment whose Snakemake was killed would otherwise work on beside the next run's. Call it
    in the new process: at its start, or as the `preexec_fn` of a subprocess.

    Args:
        parent: the number of the process that started this one, where that may have ended before
            this call; None: the parent that there is now.
    """
    parent = os.getppid() if parent is None else parent
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended in between
        os.kill(os.getpid(), signal.SIGKILL)
