"""The errors that end a command, each with its exit code."""

import errno

DONE, FAILED, WRONG, PREEMPTED, INTERRUPTED = 0, 1, 2, 75, 130
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # the machine's fault, told in a line


class UserError(Exception):
    """What the user can mend: one line a problem, no traceback, exit code 2; nothing was started."""

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = problems


class RunError(Exception):
    """A run that can't go on, in words (exit code 1)."""


class Fenced(RunError):
    """A later attempt has the run: this one may not write any more, and ends."""

    def __init__(self, what: object):
        super().__init__(f"another attempt has this run: {what} is not written, this one ends")


class MachineError(RunError):
    """What the machine did and not the run's code: under a scheduler the run starts again, as long as it gets on."""
