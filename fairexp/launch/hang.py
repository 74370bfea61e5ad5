"""Watches the ranks of a node from outside: says when they stand still, and which one holds the others up.

A process of its own sees a rank that is stopped, or holds the GIL. A hang is when no rank of the run gets on: while one saves, or
evaluates batch after batch, those that wait for it don't hang.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fairexp.beacon import Beacon, Mark
from fairexp.config.rundir import RunDir, write_atomically
from fairexp.launch import stacks
from fairexp.launch.guilty import Fact, Verdict, Worker, judge
from fairexp.launch.node import Node
from fairexp.launch.stacks import Frame

PATIENCE = 10.0  # how much longer may take what is slow by nature: the start, a first step (compilation), a save
LATE_S = 1.5  # a look that comes so much too late: we were suspended, and the ranks with us
LOOKS_S = 2.0  # the most that a look and the taking of the stacks need: the limit holds for them too
LEAVES_S = 25.0  # Slurm kills 30 s after the end of a job's time (KillWait): before, it can say what it hung on
NODES_ANSWER_S = 30.0  # a network file system shows a new file late
MOST_WORKERS = 8


class Watch:
    """The ranks of a node in one attempt at a run. `limit_s`: trainer.hang_timeout_s."""

    def __init__(self, run_dir: RunDir, node: Node, attempt: int, beacons: Sequence[Beacon], limit_s: float | None):
        self.run_dir = run_dir
        self.node = node
        self.attempt = attempt
        self.beacons = beacons
        looks_s = LOOKS_S if len(node.hosts) == 1 else 2 * LOOKS_S
        self.limit_s = math.inf if limit_s is None else limit_s - min(looks_s, limit_s / 2)
        self.looked = self.since = time.monotonic()
        self.said = False  # that this node's ranks stand still

    def stacks_of(self, k: int) -> Path:
        """The file that takes the stacks of the k-th rank here."""
        return self.run_dir.logs / f"stacks_rank_{self._rank(k)}.attempt_{self.attempt}.txt"

    def hangs(self, pids: Mapping[int, int], last: bool) -> bool:
        """Whether the run stands still, of which these are the ranks that live here; then the files say why. To be asked about
        twice a second. `last`: the job's time is over, it is killed in a moment."""
        now = time.monotonic()
        if now - self.looked > LATE_S:
            self.since = now
        self.looked = now
        limit = min(self.limit_s, LEAVES_S) if last else self.limit_s
        over = min(self._stood_still(self.beacons[k].last()) / limit for k in pids)
        if not (self._all_nodes(over) if len(self.node.hosts) > 1 else over > 1):
            return False
        facts = self._of_all_nodes(self._facts(pids))
        record(self.run_dir, self.attempt, judge(facts), facts)
        return True

    def close(self) -> None:
        """Removes the files that no stack was written to."""
        for k in range(len(self.beacons)):
            path = self.stacks_of(k)
            if path.exists() and not path.stat().st_size:
                path.unlink()

    def _rank(self, k: int) -> int:
        return self.node.index * len(self.beacons) + k

    def _stood_still(self, mark: Mark) -> float:
        """For how long, in seconds of a step."""
        if mark.phase == "loop":  # of the user's own that doesn't say where it is
            return 0.0
        return (time.monotonic() - max(mark.time, self.since)) / (PATIENCE if mark.slow else 1.0)

    # --- what is known ---

    def _facts(self, pids: Mapping[int, int]) -> list[Fact]:
        """Looks at each rank before it asks for its stack, and stops it then: none gets on while it is judged."""
        began = time.monotonic()
        marks = {k: self.beacons[k].last() for k in pids}
        before = {k: _process(pid) for k, pid in pids.items()}
        if len(self.node.hosts) > 1 and any(state in "Tt" for state, _ in before.values()):
            time.sleep(LOOKS_S)  # the other nodes look first: when a stopped rank runs again, theirs get on
        workers = {k: _workers(pid)[:MOST_WORKERS] if marks[k].phase == "data" else [] for k, pid in pids.items()}
        running = [k for k in pids if before[k][0] not in "Tt"]
        # a stopped rank runs for its answer; alone, and with the others stopped again, it doesn't get far
        taken: dict[int, tuple[list[Frame], float]] = {}
        for group in (running, *([k] for k in pids if k not in running)):
            headings = {
                k: f"{time.strftime('%F %T')} rank {self._rank(k)}, process {pids[k]}, "
                f"step {marks[k].step}, phase {marks[k].phase} for {began - marks[k].time:.0f} s"
                for k in group
            }
            found = stacks.take([(pids[k], self.stacks_of(k), heading) for k, heading in headings.items()])
            for k, stack in zip(group, found, strict=True):
                taken[k] = stack, (_process(pids[k])[1] - before[k][1]) / (time.monotonic() - began)
                with suppress(ProcessLookupError):
                    os.kill(pids[k], signal.SIGSTOP)
        facts = []
        for k in pids:
            (state, _), (stack, load) = before[k], taken[k]
            seen = [
                Worker(
                    child, letter, _ours(stacks.take([(child, self.stacks_of(k), f"data loading worker {child}")])[0])
                )
                for child, letter in workers[k]
            ]
            facts.append(
                Fact(
                    rank=self._rank(k),
                    host=self.node.host,
                    step=marks[k].step,
                    phase=marks[k].phase,
                    marks=marks[k].count,
                    since=time.time() - (time.monotonic() - marks[k].time),
                    state=state,
                    busy=state == "R" or load > 0.5,
                    stack=_ours(stack),
                    workers=[worker for worker in seen if not _idle(worker)],
                )
            )
        return facts

    # --- the other nodes ---

    def _file(self, what: str, index: int) -> Path:
        return self.run_dir.submit / f"{what}_{self.attempt}.{index}.json"

    def _all_nodes(self, over: float) -> bool:
        """Whether the other nodes' ranks stand still too. A node that says nothing for long is taken to hang itself."""
        mine = self._file("still", self.node.index)
        if self.said != (over > 1):
            self.said = over > 1
            if self.said:
                mine.touch()
            else:
                mine.unlink(missing_ok=True)
        if not self.said:
            return False
        return over > PATIENCE or all(self._file("still", k).exists() for k in range(len(self.node.hosts)))

    def _of_all_nodes(self, facts: list[Fact]) -> list[Fact]:
        """The facts of all nodes that hand them in in time; each judges the same ones, so it doesn't matter who speaks."""
        count = len(self.node.hosts)
        if count == 1:
            return facts
        write_atomically(self._file("facts", self.node.index), json.dumps([asdict(fact) for fact in facts]))
        files = [self._file("facts", k) for k in range(count)]
        deadline = time.monotonic() + NODES_ANSWER_S
        while not all(file.exists() for file in files) and time.monotonic() < deadline:
            time.sleep(0.1)
        return [
            _fact(values) for file in files if file.exists() for values in json.loads(file.read_text(encoding="utf-8"))
        ]


# --- the verdict ---


def file_of(run_dir: RunDir, attempt: int) -> Path:
    """Where the verdict on an attempt stands."""
    return run_dir.logs / f"hang.attempt_{attempt}.json"


def record(run_dir: RunDir, attempt: int, verdict: Verdict, facts: Sequence[Fact]) -> None:
    """Says it in every rank's log, and in the run's folder with what is known of each rank."""
    print(verdict.line, file=sys.stderr, flush=True)
    for fact in facts:
        with open(run_dir.logs / f"rank_{fact.rank}.attempt_{attempt}.log", "a", encoding="utf-8") as log:
            log.write(f"{verdict.line}\n")
    ranks = [
        {"rank": fact.rank, "host": fact.host, "where": fact.where, "since": fact.since, "state": fact.state}
        for fact in facts
    ]
    text = json.dumps({**asdict(verdict), "time": time.time(), "ranks": ranks}, indent=1)
    write_atomically(file_of(run_dir, attempt), text + "\n")


def verdict(run_dir: RunDir, attempt: int | None) -> Verdict | None:
    """Why the attempt was ended, if it hung."""
    if attempt is None or not file_of(run_dir, attempt).exists():
        return None
    found = json.loads(file_of(run_dir, attempt).read_text(encoding="utf-8"))
    return Verdict(found["rank"], found["host"], found["line"])


def _fact(values: dict[str, Any]) -> Fact:
    def frames(stack: list[list[Any]]) -> list[Frame]:
        return [Frame(*frame) for frame in stack]

    workers = [Worker(**worker | {"stack": frames(worker["stack"])}) for worker in values["workers"]]
    return Fact(**values | {"stack": frames(values["stack"]), "workers": workers})


# --- processes ---


def _process(pid: int) -> tuple[str, float]:
    """A process's state, a letter of /proc, and the processor time that it has used; of one that has gone X."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return "X", 0.0
    return fields[0], (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _workers(rank: int) -> list[tuple[int, str]]:
    """The data loading workers of a rank, with their states: its children that run the same program, not another."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if not entry.name.isdigit() or _parent(entry) != rank:
                continue
            if (entry / "cmdline").read_bytes() == Path(f"/proc/{rank}/cmdline").read_bytes():
                found.append((int(entry.name), _process(int(entry.name))[0]))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return sorted(found)


def _parent(entry: Path) -> int:
    return int((entry / "stat").read_text().rpartition(")")[2].split()[1])


def _idle(worker: Worker) -> bool:
    """Whether it waits for work: then no line of the data set's is on its stack."""
    return worker.state == "S" and not any(frame.function == "fetch" for frame in worker.stack)


def _ours(stack: Sequence[Frame]) -> list[Frame]:
    """The frames from the start of the rank on: below lies what forked it."""
    ends = [k for k, frame in enumerate(stack) if frame.file.endswith("fairexp/launch/supervise.py")]
    return list(stack[: ends[0]]) if ends else list(stack)
