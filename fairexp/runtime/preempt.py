"""Stopping: a signal to any rank becomes one decision of all ranks at one step boundary."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType

import torch

from fairexp.runtime import dist

LOOK_EVERY_S = 0.2
SAME_S = 0.5  # who signals every process of a job reaches a rank twice: the job's process passes it on
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Stop:
    """Asks for the end of the run when SIGINT, SIGTERM or one of the SIGUSRs (Slurm's --signal) arrives.

    That only sets a flag: saving there would start a collective that the other ranks don't join. A second SIGINT kills at
    once. The ranks compare flags about every 0.2 s, not every step, since that is a collective; one alone just looks.
    """

    def __init__(self) -> None:
        self.signal = 0  # what the ranks have agreed to stop for
        self.trouble = False  # something in the background needs the ranks at a step boundary
        self.stopped = False  # they have; a signal after their last step comes too late
        self._came = 0  # to this rank, perhaps while it compared: not the same as `signal`
        self._look_at = 0
        self._looked: tuple[int, float] | None = None  # at which step, when

    def listen(self) -> Stop:
        """From now on the signals are for it."""
        # Python's handlers wait until the main thread comes back from a collective; a thread doesn't
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._look_out, args=(reader,), daemon=True).start()
        for number in SIGNALS:
            signal.signal(number, self._notice)
        # blocked by the process that started the ranks: one that came meanwhile is delivered now
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return self

    def _look_out(self, reader: int) -> None:
        first_at = 0.0
        while True:
            for number in os.read(reader, 64):
                if number not in SIGNALS:
                    continue
                if not first_at:
                    first_at = time.monotonic()
                    self._came = number
                    what = f"{signal.Signals(number).name} at {time.strftime('%T')}: saves and ends after this step"
                    print(what, file=sys.stderr, flush=True)
                elif number == signal.SIGINT and time.monotonic() - first_at > SAME_S:
                    os.kill(os.getpid(), signal.SIGKILL)

    def _notice(self, number: int, frame: FrameType | None) -> None:
        self._came = number

    def goes_back(self) -> None:
        """The steps count from an earlier one again; all ranks say so."""
        self._look_at, self._looked = 0, None

    def agreed(self, step: int) -> bool:
        """Whether all ranks stop after this step; all call it after every step."""
        if step < self._look_at and not (self._came and dist.alone()):
            return False
        step_time = LOOK_EVERY_S  # of the first look nothing is known: look again at the next step
        if self._looked:
            step_time = (time.monotonic() - self._looked[1]) / (step - self._looked[0])
        mine = [float(self._came), step_time, float(self.trouble)]
        worst = dist.max_over_ranks(torch.tensor(mine, dtype=torch.float64))
        self.signal, step_time = int(worst[0]), float(worst[1])
        self._looked = (step, time.monotonic())
        self._look_at = step + min(max(int(LOOK_EVERY_S / max(step_time, 1e-6)), 1), 1000)
        self.stopped = self.signal != 0
        return self.stopped or bool(worst[2])
