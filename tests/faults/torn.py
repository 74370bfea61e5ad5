"""SIGKILL at each write, fsync, rename, mkdir and removal of a save, or of a start: what is loaded afterwards?"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from fairexp.runtime import track
from faults import damage, lab
from faults.lab import STEP, Calls, Run

LAST = 3  # the step whose save is killed; the run has saved each step before
Found = list[tuple[str, str]]  # (the call that was the process's last, the step that was loaded then or what is wrong)


def saves(folder: Path, keep_last: int) -> Found:
    """Kills a save at each of its calls, one after the other."""
    path = lab.new(folder / f"kept-{keep_last}")

    def work() -> Found:
        run = lab.begun(path, keep_last=keep_last)
        lab.build.track(run)
        for _ in range(LAST - 1):
            lab.train(run)
            lab.saved(run)
        before = lab.state(run)
        lab.train(run)
        after = lab.state(run)
        return each_call(run, lambda: lab.saved(run), before, after, folder, keep_last)

    return lab.value(lab.apart(work, folder, seconds=600))


def starts(folder: Path) -> Found:
    """The same of a start: another attempt, which clears what a killed save left, puts a damaged checkpoint aside, goes back to
    the one before and drops the metrics after it."""
    path = lab.new(folder / "started")

    def work() -> Found:
        run = lab.begun(path, keep_last=2)
        lab.build.track(run)
        for _ in range(LAST):
            before = lab.state(run)
            lab.train(run)
            lab.saved(run)
        calls = Calls(path, 12, lab.killed)
        with calls.watched():
            assert lab.apart(lambda: (lab.train(run), lab.saved(run)), folder).code == -9
        damage.truncated(path / STEP.format(LAST), damage.random.Random(0))

        def start() -> None:
            lab.again(run)
            lab.back(run)

        return each_call(run, start, before, {}, folder, 1)

    return lab.value(lab.apart(work, folder, seconds=600))


def each_call(
    run: Run, act: Callable[[], None], before: dict[str, str], after: dict[str, str], folder: Path, keep_last: int
) -> Found:
    """Runs `act` in forks that are killed at its first, second, ... last call, in copies of the folder as it is."""
    path = run.dir.path
    template = shutil.copytree(path, folder / f"{path.name}-template")

    def strike(at: int | None) -> list[str]:
        calls = Calls(path, at, lab.killed)
        with calls.watched():
            act()
        return [f"{name} {file}" for name, file in calls.log]

    found = []
    for at, call in enumerate(lab.value(lab.apart(lambda: strike(None), folder)), start=1):
        shutil.rmtree(path)
        shutil.copytree(template, path)
        ended = lab.apart(lambda at=at: strike(at), folder)  # type: ignore[misc]
        assert ended.code == -9, ended
        found.append((call, look(run, before, after, folder, keep_last)))
    return found


def look(run: Run, before: dict[str, str], after: dict[str, str], folder: Path, keep_last: int) -> str:
    """What the next attempt finds, in a fork: "2" or "3" for the step that it goes on from, else what is wrong."""
    path = run.dir.path

    def next_attempt() -> tuple[dict[str, str], list[str], list[int]]:
        lab.again(run)
        lab.train(run)  # nothing of this is to be left
        there = lab.back(run)
        return there, lab.leftovers(path), [row["step"] for row in track.read(path / "metrics.jsonl")]

    ended = lab.apart(next_attempt, folder)
    if ended.code or [
        line for line in ended.lines if not line.startswith("not bit for bit") and "not used" not in line
    ]:
        return f"exit code {ended.code}: {ended.said}"
    there, leftovers, rows = ended.value
    step = LAST if there == after else LAST - 1 if there == before else None
    if step is None:
        return f"a mixture: {[name for name in there if there[name] not in (before.get(name), after.get(name))]}"
    if leftovers:
        return f"left in a workspace: {leftovers}"
    if after and not lab.only_checkpoints(path):
        return "checkpoints/ holds something else"
    if not keep_last <= len(lab.steps(path)) <= keep_last + 1:
        return f"{lab.steps(path)} are kept"
    return str(step) if rows == list(range(1, step + 1)) else f"metrics of the steps {rows}"


def two_ranks(folder: Path, points: Sequence[tuple[int, float]] | None) -> Found:
    """A save by two ranks. `points`: (rank, at which part of its calls); None: all calls of both ranks."""
    path = lab.new(folder / "tiny-ddp2", num_ranks=2)

    def first() -> dict[str, str]:
        run = lab.begun(path)
        lab.build.track(run)
        for _ in range(LAST - 1):
            lab.train(run)
            lab.saved(run)
        return lab.state(run)

    def second(rank: int, at: int | None) -> tuple[list[str], dict[str, str]]:
        run = lab.begun(path)
        lab.back(run)
        lab.train(run)
        calls = Calls(path, at, lab.killed)
        with calls.watched():
            lab.saved(run)
        return [f"{name} {file}" for name, file in calls.log], lab.state(run)

    def world(struck: int | None, at: int | None) -> list[lab.Fork]:
        return lab.ranks([lambda rank=rank: second(rank, at if rank == struck else None) for rank in (0, 1)], folder)  # type: ignore[misc]

    before, _ = (lab.value(fork.wait()) for fork in lab.ranks([first, first], folder))
    template = shutil.copytree(path, folder / f"{path.name}-template")
    whole = [lab.value(fork.wait()) for fork in world(None, None)]
    after = whole[0][1]
    counts = [len(calls) for calls, _ in whole]
    if points is None:
        chosen = [(rank, at) for rank in (0, 1) for at in range(1, counts[rank] + 1)]
    else:
        chosen = [(rank, 1 + int(part * (counts[rank] - 1))) for rank, part in points]

    def work() -> Found:
        found = []
        run = lab.begun(lab.new(folder / "reader"))  # one process reads what two have written
        for rank, at in chosen:
            shutil.rmtree(path)
            shutil.copytree(template, path)
            forks = world(rank, at)
            assert forks[rank].wait().code == -9
            forks[1 - rank].kill()  # as the supervisor does
            run.dir = lab.RunDir(path)
            found.append((f"rank {rank}: {whole[rank][0][at - 1]}", look(run, before, after, folder, 2)))
        return found

    return lab.value(lab.apart(work, folder, seconds=1800))
