"""Shows a run that other processes execute, from its folder's own files: the same for any launcher."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from fairexp.config.rundir import RunDir
from fairexp.errors import DONE, FAILED, INTERRUPTED
from fairexp.launch.job import first_error
from fairexp.runs.state import LIVE, OVER, alive, state

ENDED = {"finished": DONE, "failed": FAILED, "interrupted": INTERRUPTED, "cancelled": INTERRUPTED, "lost": FAILED}


def follow(run_dir: RunDir, attempt: int) -> int:
    """Shows the progress from that attempt on until the run ends; its exit code. Ctrl-C is passed on, a second one kills."""
    interrupts: list[int] = []
    before = {
        number: signal.signal(number, lambda number, frame: interrupts.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    gc.enable()  # this may take days
    told = 0
    rows = Tail(run_dir.metrics_file)
    output = Tail(run_dir.logs / f"rank_0.attempt_{attempt}.log")
    try:
        with view() as shown:
            while True:
                status = run_dir.status()  # before the rows: those of the last step are there when it says finished
                if not (lives := job_lives(status)):
                    status = run_dir.status()  # its last one: what is read from here on is all there will be
                for line in output.lines():
                    shown.text(line)
                if status["attempts"] > attempt:  # the last one hung
                    attempt = status["attempts"]
                    output = Tail(run_dir.logs / f"rank_0.attempt_{attempt}.log", from_start=True)
                    for line in output.lines():
                        shown.text(line)
                for line in rows.lines():
                    shown.row(json.loads(line), status.get("max_steps"))
                if told < len(interrupts) and status["attempts"] == attempt:  # the job has started: it can be told
                    stop(status["pid"], signal.SIGINT if told == 0 else signal.SIGKILL)
                    told = len(interrupts)
                if not lives:
                    status = _lost(run_dir)
                    break
                time.sleep(0.1)
            if status["state"] == "failed":
                for line in last_words(run_dir):
                    shown.text(line)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return ENDED[status["state"]]


def watch(run_dir: RunDir) -> int:
    """Shows the progress of a run wherever it runs until it ends, or a Ctrl-C; its exit code."""
    attempt, output = 0, None
    rows = Tail(run_dir.metrics_file)
    try:
        with view() as shown:
            told, now, look_at = "", state(run_dir), time.monotonic() + 2.0
            while True:
                status = run_dir.status()
                if time.monotonic() > look_at or status["state"] in OVER:  # a look is a question to the scheduler
                    now, look_at = state(run_dir), time.monotonic() + 2.0
                if status["attempts"] > attempt:
                    attempt = status["attempts"]
                    output = Tail(run_dir.logs / f"rank_0.attempt_{attempt}.log", from_start=True)
                for line in output.lines() if output else ():
                    shown.text(line)
                for line in rows.lines():
                    shown.row(json.loads(line), status.get("max_steps"))
                words = f"{now.word} {now.why}".strip()
                if words != told and now.word != "running":
                    shown.text(f"{run_dir.path.name}: {words}")
                told = words
                if now.word not in LIVE:
                    return ENDED.get(now.word, DONE)
                time.sleep(0.2)
    except KeyboardInterrupt:
        return INTERRUPTED


@contextlib.contextmanager
def lines_beside(run_dir: RunDir) -> Iterator[None]:
    """Inside, a thread shows the log records of the run that this very process executes."""
    rows, shown, over = Tail(run_dir.metrics_file), Lines(), threading.Event()

    def show() -> None:
        for line in rows.lines():
            shown.row(json.loads(line), run_dir.status().get("max_steps"))

    def watch() -> None:
        while not over.wait(0.2):
            show()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        show()


def last_words(run_dir: RunDir) -> list[str]:
    """The traceback of the rank that failed first. Rank 0's was shown as it came."""
    error = first_error(run_dir)
    return error["traceback"].splitlines() if error and error["rank"] != 0 else []


def stop(pid: int, number: int) -> None:
    """Sends the signal to the run's job, which passes it on to its ranks."""
    with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
        os.kill(pid, number)


def job_lives(status: dict[str, Any]) -> bool:
    """Whether the local job's controller still runs."""
    return status.get("job_id") is not None and alive(int(status["job_id"]), None)


def _lost(run_dir: RunDir) -> dict[str, Any]:
    """The job ended without a word of how: it was killed."""
    status = run_dir.status()
    if status["state"] not in ENDED:
        log = next(iter(sorted(run_dir.submit.glob("*_log.out"), key=os.path.getmtime, reverse=True)), None)
        tail = log.read_text(errors="replace").strip().splitlines()[-1:] if log else []
        run_dir.set_status(state="failed", error=" ".join(["the job ended without a word; its log's end:", *tail]))
    return run_dir.status()


class Tail:
    """The lines that are added to a file which may not exist yet."""

    def __init__(self, path: Path, from_start: bool = False):
        self.path = path
        self.file: TextIO | None = None
        self.inode = 0
        self.rest = ""
        self.torn = False  # the file is read from the middle of a line
        if path.exists() and not from_start:
            self._open()
            assert self.file is not None
            self.file.seek(0, os.SEEK_END)

    def _open(self) -> None:
        self.file = open(self.path, encoding="utf-8", errors="replace")  # noqa: SIM115
        self.inode = os.fstat(self.file.fileno()).st_ino

    def lines(self) -> list[str]:
        """The whole lines since the last call; a file that was replaced (a resume drops rows) is read from where it was, or
        from the next line on where it has grown beyond that."""
        try:
            replaced = self.path.stat().st_ino != self.inode
        except FileNotFoundError:
            return []
        if self.file is None or replaced:
            position = self.file.tell() if self.file else 0
            if self.file:
                self.file.close()
            self._open()
            assert self.file is not None
            self.file.seek(max(min(position, os.fstat(self.file.fileno()).st_size) - 1, 0))
            self.rest, self.torn = "", position > 0
        *whole, self.rest = (self.rest + self.file.read()).split("\n")
        if self.torn and whole:
            del whole[0]
            self.torn = False
        return whole


def view() -> Bar | Lines:
    """A progress bar on a terminal, plain lines elsewhere."""
    return Bar() if sys.stderr.isatty() else Lines()


class Lines:
    """One line a log record: for files, pipes and CI."""

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def text(self, line: str) -> None:
        """What rank 0 said."""
        print(line, file=sys.stderr, flush=True)

    def row(self, row: dict[str, Any], max_steps: int | None) -> None:
        """A row of metrics.jsonl."""
        print(f"step {row['step']}{f'/{max_steps}' if max_steps else ''}  {words(row)}", file=sys.stderr, flush=True)


class Bar:
    """rich's progress bar with the newest numbers."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=Console(stderr=True, highlight=False),
        )
        self.task = self.progress.add_task("", total=None, numbers="starting")

    def __enter__(self) -> Bar:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def text(self, line: str) -> None:
        """What rank 0 said, above the bar."""
        self.progress.console.print(line, markup=False)

    def row(self, row: dict[str, Any], max_steps: int | None) -> None:
        """A row of metrics.jsonl."""
        if any(key.startswith("eval/") for key in row):
            self.progress.console.print(f"step {row['step']}  {words(row)}", markup=False)
        else:
            self.progress.update(self.task, completed=row["step"], total=max_steps, numbers=words(row))


def words(row: dict[str, Any]) -> str:
    """The numbers that a person watches."""
    rate = row.get("perf/samples_per_s")
    parts = [
        f"{key.removeprefix('train/').replace('/', ' ')} {float(row[key]):.4g}"
        for key in row
        if key == "train/loss" or key == "train/lr" or key.startswith("eval/")
    ]
    return "  ".join(parts + ([f"{rate:,.0f} samples/s"] if rate else []))
