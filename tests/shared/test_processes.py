"""A process that asked for it ends with the one that started it."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from shared import paths

CHILD = (
    "import time; from shared.processes import die_with_parent; {}"
    "print(1, flush=True); time.sleep(60)"
)
PARENT = (
    "import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', sys.argv[1]],"
    " stdout=subprocess.PIPE); child.stdout.readline(); print(child.pid, flush=True); child.wait()"
)


@pytest.mark.parametrize("asked", [True, False])
def test_a_process_that_asked_for_it_ends_with_its_parent(asked):
    code = CHILD.format("die_with_parent(); " if asked else "")
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, code], cwd=paths.ROOT, stdout=subprocess.PIPE, text=True
    )
    child = psutil.Process(int(parent.stdout.readline()))
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    if asked:
        psutil.wait_procs([child], timeout=30)
    else:
        time.sleep(0.2)
    alive = child.is_running() and child.status() != psutil.STATUS_ZOMBIE
    if alive:
        child.kill()
    assert alive == (not asked)
