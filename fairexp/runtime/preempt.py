"""Stopping: a signal to any rank becomes one decision of all ranks at one step boundary."""

from __future__ import annotations

import signal
import time
from types import FrameType

import torch

from fairexp.runtime import dist

LOOK_EVERY_S = 0.2
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Stop:
    """Asks for the end of the run when SIGINT, SIGTERM or one of the SIGUSRs (Slurm's --signal) arrives.

    The handler only sets a flag: saving there would start a collective that the other ranks don't join. A second SIGINT
    kills at once. The ranks compare flags about every 0.2 s, not every step, since that is a collective.
    """

    def __init__(self) -> None:
        self.signal = 0
        self.trouble = False  # something in the background needs the ranks at a step boundary
        self.stopped = False  # the ranks have agreed to; a signal after their last step comes too late
        self._look_at = 0
        self._looked: tuple[int, float] | None = None  # at which step, when
        for number in SIGNALS:
            signal.signal(number, self._notice)
        # blocked by the process that started the ranks: one that came meanwhile is delivered now
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def _notice(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def goes_back(self) -> None:
        """The steps count from an earlier one again; all ranks say so."""
        self._look_at, self._looked = 0, None

    def agreed(self, step: int) -> bool:
        """Whether all ranks stop after this step; all call it after every step."""
        if step < self._look_at:
            return False
        step_time = LOOK_EVERY_S  # of the first look nothing is known: look again at the next step
        if self._looked:
            step_time = (time.monotonic() - self._looked[1]) / (step - self._looked[0])
        worst = dist.max_over_ranks(torch.tensor([float(self.signal), step_time, float(self.trouble)], dtype=torch.float64))
        self.signal, step_time = int(worst[0]), float(worst[1])
        self._looked = (step, time.monotonic())
        self._look_at = step + min(max(int(LOOK_EVERY_S / max(step_time, 1e-6)), 1), 1000)
        self.stopped = self.signal != 0
        return self.stopped or bool(worst[2])
