"""How processes end: with their parent, or at once."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from contextlib import suppress
from typing import NoReturn


def die_with(parent: int) -> None:
    """This process gets SIGKILL when its parent ends, however that ends. `parent`: its id, as the parent itself saw it."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it ended before the call
        os.kill(os.getpid(), signal.SIGKILL)


def leave(code: int) -> NoReturn:
    """Ends the process without Python's finalization: gloo's threads race it, and up to one good run in ten would abort."""
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
