"""Which rank the others wait for: from what is known of each rank of a run that stands still, to one line in words."""

from __future__ import annotations

import linecache
import re
import sysconfig
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cmp_to_key
from pathlib import Path

from fairexp.launch.stacks import Frame

FAIREXP = f"{Path(__file__).parents[1]}/"
STATES = {"T": "stopped by a signal", "t": "stopped by a debugger", "D": "stuck in the kernel, at a disk or a driver"}
THIN = ("data.py", "dist.py", "precision.py", "preempt.py")  # their callers tell more
# a host that waits for its GPU, which waits for the others; or for a collective that it began before
WAITS = re.compile(r"\.wait\(|synchronize\(|\.item\(|\.tolist\(|\.cpu\(|\bfloat\(")


@dataclass(frozen=True)
class Fact:
    """What is known of a rank that stands still. `since`: the time of its last sign; `state`: its letter in /proc; `busy`: it
    uses the processor; `stack`: its main thread's frames, innermost first; `workers`: data loading workers, less idle ones."""

    rank: int
    host: str
    step: int
    phase: str
    marks: int
    since: float
    state: str
    busy: bool
    stack: Sequence[Frame]
    workers: Sequence[Worker] = field(default_factory=tuple)

    @property
    def waits(self) -> bool:
        """Whether it stands in a collective, or in what waits for one."""
        if not self.stack or self.state in STATES:
            return False
        inner = [frame for frame in self.stack if not _is_library(frame)] or list(self.stack)
        if not _is_torch(inner[0]):
            return WAITS.search(linecache.getline(inner[0].file, inner[0].line)) is not None
        if inner[0].file.endswith(("torch/nn/parallel/distributed.py", "torch/autograd/graph.py")):
            return not self.busy  # DDP's and the engine's own waiting; FSDP's stands below
        for frame in inner:
            if "/torch/distributed/" in frame.file:
                return "/torch/distributed/checkpoint/" not in frame.file  # that writes files
            if not _is_torch(frame):
                return False
        return False

    @property
    def place(self) -> str:
        """The innermost line of the user's code, else of fairexp's, else any."""
        return place(self.stack)

    @property
    def where(self) -> str:
        """Its step, phase and line."""
        return f"step {self.step}, phase {self.phase}, {self.place}"


@dataclass(frozen=True)
class Worker:
    """A data loading process."""

    pid: int
    state: str
    stack: Sequence[Frame]


@dataclass(frozen=True)
class Verdict:
    """The rank at fault, and all about it in a line."""

    rank: int
    host: str
    line: str


def judge(facts: Sequence[Fact]) -> Verdict:
    """The rank that holds the others up."""
    for fits in (
        lambda fact: fact.state in STATES,
        lambda fact: any(worker.state in STATES for worker in fact.workers),
        lambda fact: fact.phase == "data",
        lambda fact: not fact.waits,
    ):
        if found := [fact for fact in facts if fits(fact)]:
            guilty = min(found, key=lambda fact: (fact.step, fact.marks))
            return Verdict(guilty.rank, guilty.host, f"{_named(guilty)}: {_why(guilty)}{_others(guilty, facts)}")
    return _of_waiting(facts)


def _of_waiting(facts: Sequence[Fact]) -> Verdict:
    """All wait: the one that waits elsewhere, and of two the one that is ahead, has missed a collective."""
    counts = Counter((fact.step, fact.place) for fact in facts)
    if len(counts) == 1:
        words = f"all {len(facts)} ranks wait in the same collective" if len(facts) > 1 else "it waits in a collective"
        line = f"{_named(facts[0])}: {words}: what lies between them (network, driver) is at fault"
        return Verdict(facts[0].rank, facts[0].host, line)
    rarest = min(counts.values())
    few = [fact for fact in facts if counts[fact.step, fact.place] == rarest]
    guilty = max(few, key=cmp_to_key(_ahead))
    return Verdict(
        guilty.rank,
        guilty.host,
        f"{_named(guilty)}: it missed a collective, or waits in one too many{_others(guilty, facts)}",
    )


def _ahead(one: Fact, other: Fact) -> int:
    """Which of two is further: by step and marks, then by the line where their stacks, from outside, part."""
    if (one.step, one.marks) != (other.step, other.marks):
        return 1 if (one.step, one.marks) > (other.step, other.marks) else -1
    for mine, theirs in zip(reversed(one.stack), reversed(other.stack), strict=False):
        if mine != theirs:
            same = (mine.file, mine.function) == (theirs.file, theirs.function)
            return mine.line - theirs.line if same else 0
    return 0


def _named(fact: Fact) -> str:
    return f"rank {fact.rank} on {fact.host} hangs in {fact.where}"


def _why(fact: Fact) -> str:
    if fact.state in STATES:
        return f"it is {STATES[fact.state]}"
    if fact.phase == "data" and fact.workers:
        worker = next((worker for worker in fact.workers if worker.state in STATES), fact.workers[0])
        return f"its data loading worker, process {worker.pid}, {_does(worker.state)} at {place(worker.stack)}"
    if fact.phase == "data":
        return "its next batch doesn't come"
    return "it computes without an end" if fact.busy else "it waits for something that isn't a collective"


def _does(state: str) -> str:
    return f"is {STATES[state]}" if state in STATES else "hangs"


def _others(guilty: Fact, facts: Sequence[Fact]) -> str:
    waiting = [fact for fact in facts if fact.rank != guilty.rank]
    if not waiting:
        return ""
    more = f", and {len(waiting) - 1} more" if len(waiting) > 1 else ""
    return f"; rank {waiting[0].rank} waits in {waiting[0].where}{more}"


def place(stack: Sequence[Frame]) -> str:
    """The line that tells most: of the user's code, else of fairexp's, else the innermost."""
    own = [frame for frame in stack if not _is_torch(frame) and not _is_library(frame)]
    users = [frame for frame in own if not frame.file.startswith(FAIREXP)]
    chosen = (users or [frame for frame in own if not frame.file.endswith(THIN)] or list(stack))[:1]
    return str(chosen[0]) if chosen else "a place that can't be seen"


def _is_torch(frame: Frame) -> bool:
    return re.search(r"-packages/torch/", frame.file) is not None


def _is_library(frame: Frame) -> bool:
    """Of Python's own."""
    file = frame.file
    return file.startswith((sysconfig.get_paths()["stdlib"], "<frozen")) and "-packages/" not in file
