"""Clock marks inside a training loop: the same few lines in the hand-written loop and in a fairexp run."""

import json
import os
import statistics
import time
from pathlib import Path


class Marks:
    """Call `after(step)` after every step. After the last one, rank 0 writes `out` and the process ends, as nothing that comes
    later (evaluation, a checkpoint) belongs to a step.

    CPU is the mean of the steps after the warm-up, which is the first `every` steps; wall is the median of the means over
    `every` steps, since neighbours on the machine lengthen some of them.
    """

    def __init__(self, out: str, every: int, last: int) -> None:
        assert last == 1 or last % every == 0
        self.out, self.every, self.last = Path(out), every, last
        self.first: dict[str, float] = {}
        self.times: list[tuple[float, float]] = []

    def after(self, step: int) -> None:
        """Notes the time at the end of step 1 and at the end of every `every`-th step."""
        if step == 1:
            self.first = {"first_step_at": time.monotonic(), "first_step_cpu": tree_cpu_s()}
        if step % self.every == 0:
            self.times.append((time.perf_counter(), time.process_time()))
        if step == self.last:
            if os.environ.get("RANK", "0") == "0":
                draft = self.out.with_suffix(".partial")
                draft.write_text(json.dumps(self.first | self.steps()))
                draft.rename(self.out)
            os._exit(0)

    def steps(self) -> dict[str, float]:
        """Microseconds a step; {} where only step 1 was asked for."""
        if len(self.times) < 2:
            return {}
        (wall_0, cpu_0), (_, cpu_1) = self.times[0], self.times[-1]
        walls = [wall for wall, _ in self.times]
        wall = statistics.median(b - a for a, b in zip([wall_0, *walls[1:]], walls[1:], strict=False))
        return {"wall": wall / self.every * 1e6, "cpu": (cpu_1 - cpu_0) / (len(self.times) - 1) / self.every * 1e6}


def tree_cpu_s() -> float:
    """CPU seconds of every process of this command, its ended children included; they are known by BENCH_RUN in the environment,
    since a launched run has left the session and the family of the command that started it."""
    mark = b"BENCH_RUN=" + os.environb[b"BENCH_RUN"]
    ticks = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (process / "environ").read_bytes().split(b"\0"):
                fields = (process / "stat").read_text().rpartition(")")[2].split()
                ticks += sum(map(int, fields[11:15]))  # user and system time, its own and its ended children's
        except OSError:
            continue  # another user's process, or one that has just ended
    return ticks / os.sysconf("SC_CLK_TCK")
