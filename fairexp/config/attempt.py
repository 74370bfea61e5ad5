"""Attempts at a run, of which only the newest may write: a scheduler that has lost a node starts its run elsewhere, while the
node may live on.

No locks, which many shared file systems don't have. An attempt makes whatever it gives the run inside attempts/0003/work and
renames it into place; the next attempt first renames that folder away, and from then on each such rename of the old one fails.
"""

from __future__ import annotations

import os
import shutil
import uuid
from contextlib import suppress
from pathlib import Path

from fairexp.errors import Fenced


def take(run: Path) -> int:
    """The number of a new attempt at the run, from 1; every earlier one is fenced when this returns."""
    folder = run / "attempts"
    folder.mkdir(exist_ok=True)
    draft = folder / f".{uuid.uuid4().hex}"
    (draft / "work").mkdir(parents=True)
    number = last(run) + 1
    while True:
        try:
            os.rename(draft, folder / f"{number:04d}")  # whole, or not at all where there is one
            break
        except OSError:
            if not (folder / f"{number:04d}").exists():
                raise
            number += 1
    for earlier in range(1, number):  # by number: a list of the folder may be stale on a network file system
        over = folder / f"{earlier:04d}" / "over"
        with suppress(FileNotFoundError):
            os.rename(over.with_name("work"), over)
        for left in over.glob("*") if over.is_dir() else ():
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
    return number


def last(run: Path) -> int:
    """The number of the newest attempt; 0 before the first."""
    return max((int(entry.name) for entry in (run / "attempts").glob("*") if entry.name.isdigit()), default=0)


def workspace(run: Path, number: int) -> Path:
    """Where the attempt makes what it gives the run; gone once a later attempt has begun."""
    return run / "attempts" / f"{number:04d}" / "work"


def publish(made: Path, final: Path) -> None:
    """Gives the run what was made in the workspace, file or folder, under its final name. Fenced: a later attempt has begun."""
    try:
        os.rename(made, final)
    except FileNotFoundError:
        raise Fenced(final) from None
