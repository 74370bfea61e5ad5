"""Two attempts at one run at a time: the first is stopped, lives on when the second has begun, and must leave no trace."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple

from fairexp.config import attempt
from fairexp.config.rundir import RunDir
from fairexp.errors import Fenced
from fairexp.lifetime import leave
from fairexp.runtime import worker
from faults import lab
from faults.kills import state_of
from faults.lab import Calls, Fork

STEPS = 24
OVERRIDES = (f"trainer.max_steps={STEPS}", "trainer.eval_every=8", "checkpoint.every=3")
GOES_ON = ("when the second has begun", "when the second has trained", "when the second has finished")
RENAMES = "renames.jsonl"  # of the first attempt: (when, what)


def rank(path: Path, calls: Calls | None = None) -> Any:
    """One rank as torchrun starts it, which notes what it gives the run."""

    def run() -> None:
        try:
            if calls is None:
                leave(worker.main(RunDir(path)))
            rename = os.rename

            def noted(old: Any, new: Any) -> None:
                rename(old, new)
                with io.open(path.parent / RENAMES, "a") as file:  # noqa: UP020  # this one isn't counted
                    file.write(json.dumps([time.monotonic(), str(new)]) + "\n")

            os.rename = noted  # type: ignore[assignment]
            with calls.watched():
                leave(worker.main(RunDir(path)))
        except BaseException:  # Fenced, too: a user would see the traceback
            traceback.print_exc()
            leave(lab.SPEECHLESS)

    return run


def world(path: Path, num_ranks: int, calls: Calls | None = None) -> list[Fork]:
    functions = [rank(path, calls if number == 0 else None) for number in range(num_ranks)]
    if num_ranks == 1:
        return [Fork(functions[0], path.parent)]
    return lab.ranks(functions, path.parent)


class Result(NamedTuple):
    """What a finished run leaves."""

    rows: list[tuple[int, str, str]]
    tensors: str
    checkpoints: list[str]


def result(path: Path) -> Result:
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return Result(
        [
            (row["step"], key, float(row[key]).hex())
            for row in rows
            for key in row
            if key.startswith(("train/", "eval/"))
        ],
        state_of(path / lab.STEP.format(STEPS)),
        sorted(folder.name for folder in (path / "checkpoints").iterdir()),
    )


def undisturbed(folder: Path, num_ranks: int) -> tuple[Result, int]:
    """A run's result, and how many calls rank 0 made."""
    folder.mkdir()
    path = lab.new(folder / "tiny-calm", *OVERRIDES, num_ranks=num_ranks)
    calls = Calls(path)
    counted = folder / "count"

    def run() -> None:
        with calls.watched():
            code = worker.main(RunDir(path))
        counted.write_text(str(len(calls.log)))
        leave(code)

    functions = [run if number == 0 else rank(path) for number in range(num_ranks)]
    forks = lab.ranks(functions, folder) if num_ranks > 1 else [Fork(run, folder)]
    for fork in forks:
        assert (ended := fork.wait()).code == 0, ended.said
    return result(path), int(counted.read_text())


def stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def split_brain(
    folder: Path, num_ranks: int, at: float, goes_on: str, calm: tuple[Result, int], most_s: float = 20.0
) -> tuple[str, str]:
    """Stops an attempt at a part `at` of its calls, begins a second one, lets the first go on. (where it stopped, what is
    wrong or "")."""
    folder.mkdir()
    path = lab.new(folder / "tiny-split", *OVERRIDES, num_ranks=num_ranks)
    where = folder / "where"

    def stop() -> None:
        where.write_text(" ".join(calls.log[-1]))
        os.kill(os.getpid(), signal.SIGSTOP)

    calls = Calls(path, max(int(at * calm[1]), 6), stop)  # the first calls are those that take the number
    first = world(path, num_ranks, calls)
    second: list[Fork] = []
    try:
        _until(lambda: stopped(first[0].pid) or first[0].poll(), "the first attempt stops")
        for fork in first[1:]:
            os.kill(fork.pid, signal.SIGSTOP)
        place = where.read_text()
        second = world(path, num_ranks)
        begun = path / "attempts/0002/work"
        _until(lambda: begun.exists() or second[0].poll(), "the second attempt begins")
        if goes_on == GOES_ON[1]:
            _until(lambda: second[0].poll() or "(resumed)" in second[0].said.read_text() or _trained(path), "it trains")
        elif goes_on == GOES_ON[2]:
            _until(lambda: all(fork.poll() for fork in second), "it ends")
        before, heard = time.monotonic(), [fork.said.stat().st_size for fork in first]
        for fork in first:
            os.kill(fork.pid, signal.SIGCONT)
        try:
            ended = [fork.wait(most_s) for fork in first]
        except TimeoutError as error:
            return place, f"the first attempt: {error}"
        others = [fork.wait() for fork in second]
    finally:
        for fork in [*first, *second]:
            fork.kill()
    for one, skip in zip(ended, heard, strict=True):
        said = [line for line in one.said[skip:].splitlines() if "gloo" not in line]
        if one.code in (0, lab.SPEECHLESS) or len(said) != 1:
            return place, f"the first attempt ended with {one.code} and said {said}"
    if any(other.code for other in others):
        return place, f"the second attempt: {[other.said for other in others]}"
    renames = [json.loads(line) for line in (folder / RENAMES).read_text().splitlines()]
    if late := [file for when, file in renames if when > before and "/attempts/0001/" not in file]:
        return place, f"the first attempt still gave the run {late}"
    if (now := result(path)) != calm[0]:
        return place, f"another result: {[a for a, b in zip(now, calm[0], strict=True) if a != b]}"[:400]
    status = RunDir(path).status()
    if (status["attempts"], status["state"], status["step"]) != (2, "finished", STEPS):
        return place, f"its status: {status}"
    return place, ""


def _trained(path: Path) -> bool:
    return any((path / "attempts/0002/work").glob("step_*"))


def _until(condition: Any, what: str, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds} s: {what}")
        time.sleep(0.002)


def split_brains(folder: Path, count: int, num_ranks: int, seed: int) -> list[tuple[str, str]]:
    """So many, at random moments."""
    dice = random.Random(seed)
    calm = undisturbed(folder / f"calm-{num_ranks}", num_ranks)
    return [
        split_brain(folder / f"split-{num_ranks}-{number}", num_ranks, dice.random(), GOES_ON[number % 3], calm)
        for number in range(count)
    ]


# --- numbers ---


class Taken(NamedTuple):
    number: int
    returned: float  # when
    tried: float
    published: bool


def contended(folder: Path, processes: int, takes: int) -> list[Taken]:
    """Takes numbers in all processes at a time; each tries to publish after a moment."""
    path = folder / "contended"
    path.mkdir()
    gate = folder / "gate"

    def take() -> list[Taken]:
        while not gate.exists():
            time.sleep(0.001)
        return [_take_and_publish(path, chance) for chance in (random.Random(os.getpid()),) for _ in range(takes)]

    forks = [Fork(take, folder) for _ in range(processes)]
    gate.touch()
    return [one for fork in forks for one in lab.value(fork.wait())]


def _take_and_publish(path: Path, chance: random.Random) -> Taken:
    number = attempt.take(path)
    returned = time.monotonic()
    time.sleep(chance.random() * 0.003)
    tried = time.monotonic()
    made = attempt.workspace(path, number) / "made"
    try:
        made.touch()
        attempt.publish(made, path / f"published_{number}")
    except (FileNotFoundError, Fenced):
        return Taken(number, returned, tried, False)
    return Taken(number, returned, tried, True)
