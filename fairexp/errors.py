"""The errors that end a command, each with its exit code."""

DONE, FAILED, WRONG, PREEMPTED, INTERRUPTED = 0, 1, 2, 75, 130


class UserError(Exception):
    """What the user can mend: one line a problem, no traceback, exit code 2; nothing was started."""

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = problems


class RunError(Exception):
    """A run that can't go on, in words (exit code 1)."""
