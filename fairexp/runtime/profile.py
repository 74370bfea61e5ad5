"""What some steps of the run spend their time on, and on a GPU their memory: trainer.profile_steps, for chrome://tracing."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

from fairexp.config.attempt import publish
from fairexp.runtime.build import Run

MOST_EVENTS = 100_000  # of allocations in a snapshot of the memory: the last ones


class Profile:
    """Traces the steps trainer.profile_steps = [first, last] on every rank.

    RUN_DIR/profile/ then has steps_<first>-<last>_rank_<rank>.json.gz (ui.perfetto.dev, chrome://tracing) and on a GPU
    ..._memory.pickle (pytorch.org/memory_viz). A run that resumes within these steps traces the rest, one that resumes past
    them nothing.
    """

    def __init__(self, run: Run):
        self.run = run
        self.cuda = run.here.device.type == "cuda"
        first, last = run.trainer.profile_steps or (0, -1)
        self.steps = range(first, last + 1)
        self.trace: torch.profiler.profile | None = None
        self.recorded = (0, 0)  # the trace's first step and its last
        self.mark: torch.profiler.record_function | None = None  # around a step

    def begins(self, step: int) -> None:
        """The loop is about to fetch the step's batch."""
        if step not in self.steps:
            self.close()  # it was rolled back
            return
        if self.trace is None:
            self._start()
            self.recorded = (step, step)
        self.recorded = (self.recorded[0], step)
        self._unmark()
        self.mark = torch.profiler.record_function(f"step {step}")
        self.mark.__enter__()

    def ends(self, step: int) -> bool:
        """The step is done and logged. Whether the trace was written now, which takes as long as some steps."""
        if self.trace is None:
            return False
        self._unmark()
        if step + 1 in self.steps and step < self.run.max_steps:
            return False
        self.close()
        return True

    def close(self) -> None:
        """Writes what was recorded, if something is being: the run may end within these steps."""
        if self.trace is None:
            return
        self._unmark()
        trace, self.trace = self.trace, None
        first, last = self.recorded
        self.run.beacon.at("profile", last)
        trace.stop()
        name = f"steps_{first}-{last}_rank_{self.run.here.rank}"
        try:
            self._write(f"{name}.json.gz", trace.export_chrome_trace)
            if self.cuda:
                self._write(f"{name}_memory.pickle", torch.cuda.memory._dump_snapshot)
        except OSError as error:  # the run is worth more than its trace
            print(f"profile/{name}: {error.strerror}; the run goes on", file=sys.stderr, flush=True)
        finally:
            if self.cuda:
                torch.cuda.memory._record_memory_history(enabled=None)

    def _start(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.cuda:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=MOST_EVENTS)
        self.trace = torch.profiler.profile(activities=activities, record_shapes=True)
        self.trace.start()

    def _unmark(self) -> None:
        if self.mark is not None:
            self.mark.__exit__(None, None, None)
            self.mark = None

    def _write(self, name: str, write: Callable[[str], object]) -> None:
        """Under its final name once it is whole."""
        made = (self.run.dir.workspace or self.run.dir.path) / name
        write(str(made))
        folder = self.run.dir.path / "profile"
        folder.mkdir(exist_ok=True)
        publish(made, folder / name)
