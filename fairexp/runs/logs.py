"""A run's output in words: the log file of one rank, as it stands or as it grows."""

from __future__ import annotations

import codecs
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fairexp.config.rundir import RunDir
from fairexp.errors import DONE, INTERRUPTED, UserError
from fairexp.runs.state import STALE_AFTER_S, state, submissions

ENDED = ("finished", "failed", "cancelled", "interrupted")
WAITING = ("queued", "preempted")
LOOK_EVERY_S = 0.2
CHUNK_BYTES = 1 << 16
LOG_NAME = re.compile(r"rank_(\d+)\.attempt_(\d+)\.log")


def logs(run: RunDir, rank: int | None, follow: bool, attempt: int | None) -> int:
    """Prints the log of a rank (0) of an attempt (the newest); with `follow`, also what is added until the run ends.

    Where no rank has a log (the job died before they began): what the scheduler wrote. Exit code 0, and 130 after a Ctrl-C.
    """
    check(run, rank, follow, attempt)
    try:
        if follow:
            follow_log(run, rank or 0, attempt)
        else:
            show_log(run, rank or 0, attempt)
    except KeyboardInterrupt:
        return INTERRUPTED
    return DONE


def check(run: RunDir, rank: int | None, follow: bool, attempt: int | None) -> None:
    """UserError for an attempt or a rank that the run hasn't, with those that it has."""
    there = attempts(run)
    newest = newest_attempt(run)
    if attempt is not None and attempt not in there and attempt != newest:
        listed = f"; there are: {', '.join(map(str, there))}" if there else "; there is none yet"
        raise UserError(f"--attempt {attempt}: {run.path.name} has no such attempt{listed}")
    ranks = there.get(attempt or newest, [])
    # without a rank of the user's, a log that will come is waited for: the nodes of a job begin one after the other
    if ranks and (rank or 0) not in ranks and not (follow and rank is None):
        raise UserError(
            f"--rank {rank or 0}: has no log in attempt {attempt or newest} of {run.path.name}; there are: {spans(ranks)}"
        )


def attempts(run: RunDir) -> dict[int, list[int]]:
    """The attempts that have logs, and the ranks of each."""
    found: dict[int, list[int]] = {}
    for path in run.logs.glob("rank_*.log"):
        if match := LOG_NAME.fullmatch(path.name):
            found.setdefault(int(match[2]), []).append(int(match[1]))
    return {number: sorted(found[number]) for number in sorted(found)}


def newest_attempt(run: RunDir) -> int:
    """The attempt that began last, also where its ranks haven't said a word; 0 before the first."""
    return max([run.status().get("attempts", 0), *attempts(run)])


def log_of(run: RunDir, rank: int, attempt: int) -> Path:
    """Where the launcher puts that log."""
    return run.logs / f"rank_{rank}.attempt_{attempt}.log"


def show_log(run: RunDir, rank: int, attempt: int | None) -> None:
    """Prints the log as it stands."""
    state, number = run.status().get("state"), attempt or newest_attempt(run)
    if log_of(run, rank, number).exists():
        output = Output(log_of(run, rank, number))
        output.drain()
        output.finish()
        if attempt is None and state in WAITING:
            say(f"{run.path.name} is {state}: attempt {number + 1} has not begun")
    else:
        say(no_log(run, rank, number))
        show_scheduler_output(run)


def follow_log(run: RunDir, rank: int, attempt: int | None) -> None:
    """Prints the log and what is added to it until the run ends; where no attempt was chosen, goes over to newer ones.

    A chosen attempt has also ended when a newer one has begun.
    """
    number = attempt or newest_attempt(run)  # the one that is shown or waited for
    output: Output | None = None
    said: set[str] = set()
    was_over = False
    while True:
        status = run.status()  # before the log: its last words are there when this says finished
        newest = newest_attempt(run)
        over = status.get("state") in ENDED or (attempt is not None and newest > attempt)
        if output:
            output.drain()
        next_one = number if output is None else number + 1
        last = newest if attempt is None else attempt
        if begun := [each for each in range(next_one, last + 1) if log_of(run, rank, each).exists()]:
            if output:
                output.finish()
                print(f"--- attempt {begun[0]}", flush=True)
            number, output = begun[0], Output(log_of(run, rank, begun[0]))
            continue
        if over and was_over:  # looked twice: a process may say something after its last word to status.json
            break
        was_over = over
        if not over and (why := why_nothing_comes(run, status, rank, attempt or newest, output is not None)):
            kind, line = why
            if kind not in said:
                say(line)
                said.add(kind)
        time.sleep(LOOK_EVERY_S)
    if output:
        output.finish()
    else:
        say(no_log(run, rank, attempt or newest))
        show_scheduler_output(run)


def why_nothing_comes(
    run: RunDir, status: dict[str, Any], rank: int, attempt: int, begun: bool
) -> tuple[str, str] | None:
    """What to tell a person who waits, once for each kind."""
    if status.get("state") == "running" and time.time() - status["heartbeat"] > STALE_AFTER_S:
        return "lost", f"{run.path.name} has had no heartbeat for a minute: it may be lost"
    if not begun:
        return "no log", no_log(run, rank, attempt)
    if status.get("state") in WAITING:
        return f"attempt {attempt + 1}", f"{run.path.name} is {status['state']}: attempt {attempt + 1} has not begun"
    return None


def no_log(run: RunDir, rank: int, attempt: int) -> str:
    """That there is nothing to print."""
    state = run.status().get("state")
    what = (
        f"attempt {attempt} has no log of rank {rank}" if attempt else f"no attempt has begun, rank {rank} has no log"
    )
    earlier = [number for number, ranks in attempts(run).items() if number < attempt and rank in ranks]
    hint = f"; --attempt {earlier[-1]} is the one before" if earlier else ""
    return f"{run.path.name} is {state}: {what}{'' if state in ENDED else ' yet'}{hint}"


def show_scheduler_output(run: RunDir) -> None:
    """Prints what the scheduler wrote of the run, the newest last: why a job died before its ranks began."""
    found = list(run.submit.rglob("*.out"))
    if uid := run.status().get("submission"):
        folder = submissions(run.path.parent) / uid
        found += [*folder.glob(f"{state(run).job}_*.out"), *folder.glob("pool.out")]
    for path in sorted(found, key=lambda path: path.stat().st_mtime):
        if path.stat().st_size:
            print(f"--- {os.path.relpath(path, run.path)}")
            output = Output(path)
            output.drain()
            output.finish()


class Output:
    """A file on its way to stdout, a piece at a time: it may be of any size, and grow, and hold what isn't UTF-8."""

    def __init__(self, path: Path):
        self.path = path
        self.position = 0
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")  # keeps half a character for the next piece
        self.last = "\n"

    def drain(self) -> None:
        """Prints what has come since the last call. The file is opened each time: on NFS that shows what other hosts wrote."""
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.position)
            while piece := file.read(CHUNK_BYTES):
                self.position += len(piece)
                self._print(self.decoder.decode(piece))
        sys.stdout.flush()

    def finish(self) -> None:
        """Ends the last line, so that the next thing begins its own."""
        self._print(self.decoder.decode(b"", final=True))
        if self.last != "\n":
            self._print("\n")
        sys.stdout.flush()

    def _print(self, text: str) -> None:
        sys.stdout.write(text)
        self.last = text[-1:] or self.last


def spans(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> 0-2, 5"""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


def say(line: str) -> None:
    """Human words go to stderr: stdout is the log."""
    print(f"fairexp: {line}", file=sys.stderr, flush=True)
