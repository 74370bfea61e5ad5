"""Clock marks inside a training loop: the same few lines in the hand-written loop and in a fairexp run."""

import json
import os
import time
from pathlib import Path


class Marks:
    """Call `after(step)` after every step. It notes the end of step 1, hands the machine over after every `every` steps until its
    next turn, and ends the process after `last` steps: evaluation and a last checkpoint belong to no step.

    OUT gets the notes; OUT.done says that a turn has ended, OUT.go gives the next one. Rank 0 alone notes and waits: the other
    ranks wait for its gradients.
    """

    def __init__(self, out: str, every: int, last: int, num_parameters: int) -> None:
        self.out, self.every, self.last, self.num_parameters = Path(out), every, last, num_parameters
        self.first_rank = os.environ.get("RANK", "0") == "0"
        self.notes: dict[str, float] = {}
        self.turns: list[tuple[float, float]] = []  # wall and CPU seconds of each
        self.began = (0.0, 0.0)
        if last > 1 and self.first_rank:
            self.done, self.go = os.open(f"{out}.done", os.O_WRONLY), os.open(f"{out}.go", os.O_RDONLY)

    def after(self, step: int) -> None:
        """What is due after this step."""
        if step == 1:
            self.notes = {"first_step_at": time.monotonic(), "first_step_cpu": tree_cpu_s()}
        if step % self.every == 0 and step > 1 and self.first_rank:
            self.turns.append((time.perf_counter() - self.began[0], time.process_time() - self.began[1]))
            if step < self.last:
                os.write(self.done, b".")
                os.read(self.go, 1)
                self.began = (time.perf_counter(), time.process_time())
        if step == self.last:
            if self.first_rank:
                measured = self.turns[1:]  # the first was the warm-up
                self.out.write_text(
                    json.dumps({**self.notes, "num_parameters": self.num_parameters, "turns": measured})
                )
                if step > 1:
                    os.write(self.done, b".")
            os._exit(0)


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
