"""Disks that are full or fail in the middle of a save: what is left, what is said, and does the run go on?"""

from __future__ import annotations

import errno
import io
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fairexp.errors import RunError
from fairexp.runtime import checkpoint, loop, shards
from faults import lab
from faults.lab import Run

PAGE = 4096
# what is left free, in pages or files, and whether statvfs says so: that of a quota doesn't
LEVELS = [
    *(("pages", free, False) for free in (0, 1, 3, 5, 7, 9, 11, 13, 15, 18)),
    *(("files", free, False) for free in (0, 1, 2, 3)),
    *(("pages", free, True) for free in (0, 10, 1000)),
    *(("files", free, True) for free in (0, 2, 4)),
]


class NoMount(Exception):
    """A small disk can't be had here, and why."""


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A tmpfs of 16 MiB."""
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m,nr_inodes=400", "none", folder], capture_output=True, text=True
    )
    if done.returncode:
        raise NoMount(f"mounting a tmpfs needs root: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@contextmanager
def filled(disk: Path, what: str, free: int) -> Iterator[None]:
    """Inside, just so much of it is free."""
    filler = disk / "filler"
    room = os.statvfs(disk)
    filler.mkdir()
    if what == "files":
        for number in range(room.f_favail - 1 - free):
            (filler / str(number)).touch()
    else:
        with open(filler / "bytes", "wb", buffering=0) as file:
            os.posix_fallocate(file.fileno(), 0, (room.f_bavail - free) * PAGE)
    try:
        yield
    finally:
        for file in filler.iterdir():  # type: ignore[assignment]
            file.unlink()  # type: ignore[attr-defined]
        filler.rmdir()


def fill_levels(folder: Path, levels: list[tuple[str, int, bool]]) -> list[tuple[str, str]]:
    """A save at each level. (which, what is wrong or ""). NoMount: not allowed."""
    with small_disk(folder / "disk") as disk:
        path = lab.new(disk / "tiny")

        def work() -> list[tuple[str, str]]:
            run = lab.begun(path, keep_last=9)
            lab.build.track(run)
            for _ in range(2):
                lab.train(run)
                lab.saved(run)
            second = lab.state(run)
            third = lab.value(lab.apart(lambda: (lab.train(run), lab.state(run))[1], folder))
            return [
                (
                    f"{free} {what} free{'' if told else ', unknown'}",
                    look(run, disk, what, free, told, second, third, folder),
                )
                for what, free, told in levels
            ]

        return lab.value(lab.apart(work, folder, seconds=600))


def look(
    run: Run, disk: Path, what: str, free: int, told: bool, second: dict[str, str], third: dict[str, str], folder: Path
) -> str:
    """What is wrong after a save with so much room; "" if nothing is."""
    path = run.dir.path

    def save(then: str) -> str:
        lab.again(run)
        lab.back(run)
        run.checkpoint = lab.build.schema.read(type(run.checkpoint), {**vars(run.checkpoint), "on_error": then})
        there = os.statvfs
        lab.train(run)
        with filled(disk, what, free):
            if not told:
                os.statvfs = lambda where: os.statvfs_result((PAGE, PAGE, *[1 << 30] * 6, 0, 255))  # type: ignore[assignment]
            error = ""
            try:
                lab.saved(run)
            except RunError as caught:
                error = str(caught)
            left = [file.name for file in run.dir.workspace.iterdir() if file.name.startswith("step_")]  # type: ignore[union-attr]
            assert not left, f"left: {left}"
            os.statvfs = there
        if then == "continue":
            lab.train(run)
            lab.saved(run)
            assert lab.steps(path)[-1] == 4, "no save where there was room again"
            assert lab.only_checkpoints(path)
        return error

    for then in ("stop", "continue"):
        ended = lab.apart(lambda then=then: save(then), folder)  # type: ignore[misc]
        if ended.code:
            return f"{then}: {ended.lines[-1]}"
        said = ended.value if then == "stop" else ended.said
        last = lab.value(lab.apart(lambda: (lab.again(run), lab.back(run))[1], folder))
        if then == "stop" and last not in (second, third):
            return f"{then}: another state than before"
        if then == "stop" and not said and last != third:
            return "nothing was said"
        if said and not (len(said.splitlines()) == 1 and str(path) in said and "needs" in said and "are free" in said):
            return f"{then}: it said {said!r}"
        for step in (3, 4):
            shutil.rmtree(path / lab.STEP.format(step), ignore_errors=True)
        if not (path / lab.STEP.format(2)).exists():
            return "the checkpoint before has gone"
    return ""


# --- a rank's own trouble ---


def too_large(run: Run) -> None:
    """The limit of a file's size, or a quota."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))


def failing_disk(run: Run) -> None:
    """EIO after the first half of the file."""

    class Failing(io.FileIO):
        def write(self, data: Any) -> int:
            if self.tell() > 5000:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return super().write(data[:1000])

    shards.open = lambda file, *mode, **more: Failing(file, "x")  # type: ignore[attr-defined]


def no_memory(run: Run) -> None:
    """What isn't an error of the disk."""

    def write(*arguments: Any) -> None:
        raise MemoryError("no room for a block")

    shards.write = write


TROUBLES: dict[str, Callable[[Run], None]] = {
    "File too large": too_large,
    "Input/output error": failing_disk,
    "MemoryError: no room for a block": no_memory,
}


def trouble_on(struck: int, trouble: str, folder: Path, on_error: str, background: bool = True) -> list[lab.Ended]:
    """Two ranks, of which one can't write its part of the checkpoint of step 2. How they end, in the order of their ranks; a
    run that goes on saves again at step 4, when the trouble is over."""
    path = lab.new(folder / f"tiny-{struck}-{on_error}-{trouble[:3]}", "trainer.max_steps=1000000", num_ranks=2)

    def rank(number: int) -> list[int]:
        run = lab.begun(path, on_error=on_error, background=background, every=None)
        lab.build.track(run)
        lab.train(run, 1)
        lab.saved(run)
        lab.train(run, 1)
        there = shards.write, resource.getrlimit(resource.RLIMIT_FSIZE)
        if number == struck:
            TROUBLES[trouble](run)
        checkpoint.save(run)
        if on_error == "stop":
            loop.fit(run)  # for ever, unless it comes to know
        lab.train(run, 1)
        run.saver.finish(run)
        shards.write = there[0]
        vars(shards).pop("open", None)
        resource.setrlimit(resource.RLIMIT_FSIZE, there[1])
        lab.train(run, 1)
        lab.saved(run)
        return lab.steps(path)

    return [fork.wait() for fork in lab.ranks([lambda: rank(0), lambda: rank(1)], folder)]
