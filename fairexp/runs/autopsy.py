"""Why a run died or hangs, in words, from what its folder, its scheduler and this machine say: `fairexp doctor RUN`."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fairexp.config.rundir import RunDir
from fairexp.errors import DONE, FAILED
from fairexp.runs.logs import log_of
from fairexp.runs.state import STALE_AFTER_S, State, state, submissions
from fairexp.runs.table import age

NUM_LINES = 5
# what stands in an error or at a log's end -> what it means and what to do
MEANINGS = {
    r"CUDA out of memory|OutOfMemoryError": "the GPU's memory was not enough: trainer.micro_batch_size=... makes the same steps",
    r"No space left|Disk quota|ENOSPC": "the disk was full: make room where runs_dir lies, lower checkpoint.keep_last",
    r"Bus error|SIGBUS|shared memory": "/dev/shm was full: fewer trainer.num_workers",
    r"DataLoader worker .* (killed|exited)": "a data loading worker died, mostly for want of memory: fewer trainer.num_workers",
    r"OUT_OF_MEMORY|oom-kill|oom_kill": "its memory limit was reached: launcher.mem_gb, or fewer trainer.num_workers",
    r"killed by SIGKILL": "the kernel kills so for want of memory, Slurm at the end of a job, a person by kill -9",
    r"killed by SIG(SEGV|ABRT|ILL|FPE)": "a library crashed: its last words are in the rank's log",
    r"Slurm says TIMEOUT": "its time limit was too short for a save: launcher.signal_lead_s",
    r"Slurm says NODE_FAIL": "its node failed",
    r"no progress in": "it failed again and again without a new checkpoint",
}


@dataclass(frozen=True)
class Autopsy:
    """How a run stands, the reasons found, most telling first, and what to do."""

    run_dir: str
    state: str
    wrong: bool
    reasons: list[str]
    then: str


def doctor(run: RunDir, as_json: bool) -> int:
    """Prints it; 1 where something is wrong with the run."""
    found = autopsy(run)
    if as_json:
        print(json.dumps(asdict(found)))
    else:
        print(f"{run.path.name}: {found.state}")
        for reason in found.reasons:
            print(f"  {reason}")
        print(f"  -> {found.then}")
    return FAILED if found.wrong else DONE


def autopsy(run: RunDir) -> Autopsy:
    """Looks at everything that may know."""
    status, now = run.status(), state(run)
    steps = f"{status['step']}" + (f" of {status['max_steps']}" if status.get("max_steps") else "")
    words = f"{now.word}, step {steps}, attempt {status['attempts']}, last sign {age(time.time() - status['heartbeat'])} ago"
    reasons = list(_of_state(run, status, now))
    wrong = now.word in ("failed", "lost") or (now.word == "running" and bool(reasons))
    reasons += _of_hangs(run, status)
    reasons += _of_attempts(status) if wrong else ()
    if wrong:
        said = " ".join((*reasons, *_last_lines(run, status)))
        reasons += [meaning for pattern, meaning in MEANINGS.items() if re.search(pattern, said)]
        free = shutil.disk_usage(run.path).free
        if free < 2**28:
            reasons.append(f"the disk is full now: {free / 2**20:.0f} MiB are free in {run.path}")
        reasons += _last_lines(run, status)
    return Autopsy(str(run.path), words, wrong, reasons or ["nothing is wrong with it"], _then(run, now))


def _of_state(run: RunDir, status: dict[str, Any], now: State) -> Iterator[str]:
    if now.word == "failed":
        yield str(status.get("error") or "it failed without a word")
        yield from _of_errors(run)
    elif now.word == "lost":
        yield f"it says {status['state']}, but {now.why}: its machine went down, or its processes were killed from outside"
        yield from _of_errors(run)
    elif now.word == "queued":
        yield f"it waits{f': {now.why}' if now.why else ''}"
    elif now.word in ("interrupted", "cancelled"):
        told = f" by {signal.Signals(status['signal']).name}" if status.get("signal") else ""
        yield f"it was told to stop{told}" + (f"; {status['error']}" if status.get("error") else "")
    elif now.word == "running":
        yield from _of_running(run, status)


def _of_running(run: RunDir, status: dict[str, Any]) -> Iterator[str]:
    """Signs of a hang that its supervisor hasn't ended yet."""
    silent = time.time() - status["heartbeat"]
    if silent > STALE_AFTER_S:
        yield f"rank 0 has given no sign for {age(silent)}: it is frozen, or its file system doesn't answer"
    if status.get("host") == socket.gethostname():
        for pid, letter in _children(status.get("pid") or 0):
            if letter in "TtD":
                how = (
                    "is stopped (kill -CONT lets it go on)"
                    if letter in "Tt"
                    else "is stuck in the kernel, at a disk or a driver"
                )
                yield f"process {pid} of a rank {how}"
    limit = run.config()["trainer"].get("hang_timeout_s")
    records = time.time() - run.metrics_file.stat().st_mtime if run.metrics_file.exists() else 0.0
    if limit and records > limit:
        yield f"no record for {age(records)}, phase {status.get('phase', 'start')}: it hangs, or trainer.log_every is large"


def _of_errors(run: RunDir) -> Iterator[str]:
    """The ranks' own exceptions, the first first, and who only lost the others."""
    errors = [json.loads(path.read_text(encoding="utf-8")) for path in run.logs.glob("error_*.json")]
    for error in sorted(errors, key=lambda error: (error["lost_peer"], error["time"])):
        yield f"rank {error['rank']} on {error['host']}: {error['error']}"


def _of_hangs(run: RunDir, status: dict[str, Any]) -> Iterator[str]:
    for path in sorted(run.logs.glob("hang.attempt_*.json"), key=lambda path: path.stat().st_mtime)[-3:]:
        number = path.stem.rpartition("_")[2]
        verdict = json.loads(path.read_text(encoding="utf-8"))
        if verdict["line"] not in str(status.get("error")):
            yield f"attempt {number} hung: {verdict['line']}"
        yield f"the stacks of attempt {number}: {run.logs}/stacks_rank_*.attempt_{number}.txt"


def _of_attempts(status: dict[str, Any]) -> Iterator[str]:
    if status.get("failures"):
        yield f"{status['failures']} failed attempts in a row without a new checkpoint"
    if status.get("failed_hosts"):
        yield f"it failed on {', '.join(status['failed_hosts'])}"


def _last_lines(run: RunDir, status: dict[str, Any]) -> list[str]:
    """The end of the log of the rank that is blamed, else of rank 0; what the scheduler wrote, where no rank began."""
    blamed = re.search(r"rank (\d+)", str(status.get("error") or ""))
    for path in (
        log_of(run, int(blamed[1]) if blamed else 0, status["attempts"]),
        log_of(run, 0, status["attempts"]),
        *_scheduler_output(run, status),
    ):
        if path.exists() and (lines := _tail(path)):
            return [f"the end of {path}:", *(f"  {line}" for line in lines)]
    return []


def _scheduler_output(run: RunDir, status: dict[str, Any]) -> list[Path]:
    folder = submissions(run.path.parent) / str(status.get("submission"))
    found = [*run.submit.rglob("*.out"), *folder.glob(f"{status.get('job_id')}_*.out"), *folder.glob("pool.out")]
    return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)


def _tail(path: Path) -> list[str]:
    with open(path, "rb") as file:
        file.seek(max(path.stat().st_size - 8192, 0))
        lines = file.read().decode(errors="replace").splitlines()
    return [line.rstrip() for line in lines if line.strip()][-NUM_LINES:]


def _then(run: RunDir, now: State) -> str:
    if now.word in ("finished", "queued", "running"):
        return f"fairexp {'show' if now.word == 'finished' else 'watch'} {run.id}"
    saved = sorted(run.checkpoints.glob("step_*"))
    after = (
        f"goes on after step {int(saved[-1].name.rpartition('_')[2])}"
        if saved
        else "starts it again: there is no checkpoint"
    )
    return f"the same command {after}: {(run.path / 'command.txt').read_text(encoding='utf-8').strip()}"


def _children(pid: int) -> list[tuple[int, str]]:
    """The processes below one, with their states, a letter each."""
    parents: dict[int, tuple[int, str]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                letter, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            except (FileNotFoundError, ProcessLookupError):
                continue
            parents[int(entry.name)] = int(parent), letter
    below, found = {pid}, []
    for child in sorted(parents):  # a child's number is larger, but where they began anew
        if parents[child][0] in below:
            below.add(child)
            found.append((child, parents[child][1]))
    return found
