"""How runs stand: what their folders say, and what the scheduler or this machine says of those that claim to live."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairexp.config.rundir import RunDir

STALE_AFTER_S = 60.0  # rank 0 beats every two seconds
SETTLES_S = 10.0  # a job that has just left the queue may still be writing how its run ended
OVER = ("finished", "failed", "cancelled")
LIVE = ("queued", "running")
WORDS = (*LIVE, *OVER, "interrupted", "lost")


@dataclass(frozen=True)
class State:
    """A run's state in one word, why, and the job that it lives in."""

    word: str  # queued, running, finished, failed, interrupted, cancelled, lost
    why: str = ""
    job: str | None = None
    kind: str = ""


def submissions(runs_dir: Path) -> Path:
    """Where the hand-overs to a scheduler are recorded, a folder each."""
    return runs_dir / "submissions"


def submission(runs_dir: Path, uid: str) -> dict[str, Any] | None:
    """The record of a hand-over; None if there is none."""
    try:
        return json.loads((submissions(runs_dir) / uid / "submission.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def states(runs: Sequence[RunDir], settled: bool = False) -> dict[Path, State]:
    """The state of each run, by its folder; one question to each scheduler for all of them. The word is "" where there is no
    run. `settled`: nobody is submitting now, so a run without a job has none."""
    statuses = {run.path: run.status() for run in runs}
    records: dict[tuple[Path, str], tuple[dict[str, Any] | None, dict[str, int]]] = {}
    claims: dict[Path, tuple[str, str | None, dict[str, Any] | None]] = {}
    for path, status in statuses.items():
        if status.get("state") in OVER or not status:
            continue
        uid = status.get("submission")
        record, index = None, None
        if uid:
            key = (path.parent, uid)
            if key not in records:
                found = submission(*key)
                order = {Path(run).name: at for at, run in enumerate((found or {}).get("runs", []))}
                records[key] = found, order
            record, order = records[key]
            index = order.get(path.name)
        claims[path] = (record["kind"] if record else "local", _job_of(status, record, index), record)
    queue = Queue(job for kind, job, _ in claims.values() if kind == "slurm" and job)
    found_states = {}
    for path, status in statuses.items():
        if path in claims and claims[path][0] == "slurm" and queue.answers and not queue.entry(claims[path][1] or ""):
            status = RunDir(path).status()  # it may have ended while the scheduler answered
        if path not in claims or status.get("state") in OVER:
            word, error = status.get("state", ""), str(status.get("error") or "")
            found_states[path] = State(word, error, status.get("job_id"))
            continue
        kind, job, record = claims[path]
        if settled and job is None and record is None and status.get("submission"):
            found_states[path] = State("lost", "not submitted")
        elif kind == "slurm":
            found_states[path] = _on_slurm(status, job, queue, settled)
        else:
            found_states[path] = _on_machine(status, job, record)
    return found_states


def state(run: RunDir) -> State:
    """One run's state."""
    return states([run])[run.path]


def _job_of(status: dict[str, Any], record: dict[str, Any] | None, index: int | None) -> str | None:
    if status.get("job_id") or record is None or record.get("job_id") is None:
        return status.get("job_id")
    return f"{record['job_id']}_{index}" if record.get("array") and index is not None else record["job_id"]


class Queue:
    """What Slurm says of jobs: those in the queue by squeue, those that have left it by sacct, asked only when needed."""

    def __init__(self, jobs: Iterable[str]):
        self.jobs = sorted({job.partition("_")[0] for job in jobs})
        self.entries: dict[str, tuple[str, str, str]] = {}
        self.answers = True
        self._history: dict[str, str] | None = None
        if self.jobs:
            self._ask()

    def _ask(self) -> None:
        # one unknown job alone is an error for squeue, among others it is left out; many are cheaper to ask for by user
        which = ["-j", ",".join(self.jobs)] if len(self.jobs) <= 200 else ["--me"]
        done = _output("squeue", "-h", "-r", "-a", *which, "-o", "%i|%T|%r|%N")
        if done is None:
            self.answers = False
            return
        for line in done.splitlines():
            job, word, reason, nodes = [*line.split("|"), "", "", ""][:4]
            self.entries[job] = (word, reason, nodes)

    def entry(self, job: str) -> tuple[str, str, str] | None:
        """State, reason and nodes of a job in the queue."""
        return self.entries.get(job)

    def ended(self, job: str) -> str:
        """How accounting says that a job ended, such as CANCELLED; "" where it can't tell."""
        if self._history is None:
            self._history = {}
            for start in range(0, len(self.jobs), 200):
                text = _output(
                    "sacct", "-n", "-X", "-P", "-j", ",".join(self.jobs[start : start + 200]), "-o", "JobID,State"
                )
                for line in (text or "").splitlines():
                    name, _, word = line.partition("|")
                    self._history[name] = word.split()[0] if word else ""  # CANCELLED by 0
                    if match := re.fullmatch(r"(\d+)_\[(.*?)(?:%\d+)?\]", name):  # cancelled before they began
                        for part in match[2].split(","):
                            low, _, high = part.partition("-")
                            for element in range(int(low), int(high or low) + 1):
                                self._history[f"{match[1]}_{element}"] = word.split()[0]
        word = self._history.get(job, "")
        return "" if word in ("RUNNING", "PENDING") else word  # it is some seconds late


def _output(*command: str) -> str | None:
    """The command's output; "" where it says that there is no such job, None where it doesn't answer."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode and "Invalid job id" not in done.stderr:
        return None
    return done.stdout


def _on_slurm(status: dict[str, Any], job: str | None, queue: Queue, settled: bool) -> State:
    word, age = status["state"], time.time() - status["heartbeat"]
    beats = age < STALE_AFTER_S
    if job is None:  # between the folder and sbatch's answer
        return State("queued" if beats and not settled else "lost", "not submitted", None, "slurm")
    if not queue.answers:
        alive = beats or word in ("queued", "preempted")
        return State(
            "queued" if word == "preempted" else word if alive else "lost", "squeue doesn't answer", job, "slurm"
        )
    entry = queue.entry(job)
    if entry and entry[0] not in ("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"):
        if entry[0] == "PENDING":
            return State("queued", "" if entry[1] in ("None", "Priority") else entry[1], job, "slurm")
        if word == "running":
            return State("running", "" if beats else f"silent for {age:.0f} s", job, "slurm")
        return State("queued", entry[0].lower(), job, "slurm")  # its node makes ready, or ends it
    if word == "interrupted":
        return State(word, str(status.get("error") or ""), job, "slurm")
    ended = queue.ended(job)
    if ended == "CANCELLED" or status.get("cancel"):
        return State("cancelled", "by scancel", job, "slurm")
    if word == "running" and not ended and age < SETTLES_S:
        return State(word, "", job, "slurm")
    if word != "running" and beats and not ended:
        return State("queued", "", job, "slurm")
    return State("lost", f"Slurm says {ended}" if ended else "not in the queue", job, "slurm")


def _on_machine(status: dict[str, Any], job: str | None, record: dict[str, Any] | None) -> State:
    word, age = status["state"], time.time() - status["heartbeat"]
    if word == "interrupted":
        return State(word, "", job, "local")
    host = (record or status).get("host")
    if host and host != socket.gethostname():  # of another machine only the heartbeat can be seen
        return State(word if age < STALE_AFTER_S else "lost", f"on {host}", job, "local")
    if word == "running" and alive(status.get("pid"), None):
        return State(word, "", job, "local")
    if record and alive(record.get("pid"), record.get("started")):
        return State("queued", "", job, "local")
    if record is None and job and job.isdigit() and alive(int(job), None):
        return State(word, "", job, "local")
    if age < 5.0 and job is None and record is None:
        return State("queued", "", job, "local")
    return State("lost", "its process has gone", job, "local")


def alive(pid: int | None, started: float | None) -> bool:
    """Whether that very process lives: `started` tells it from a later one with its number."""
    if not pid:
        return False
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return fields[0] != "Z" and (started is None or float(fields[19]) == started)


def start_time(pid: int) -> float:
    """When a process began, in the kernel's ticks since boot: a process id with it names one process for ever."""
    return float(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


def own_process() -> dict[str, Any]:
    """This process, for a record that others read."""
    return {"pid": os.getpid(), "started": start_time(os.getpid()), "host": socket.gethostname()}
