"""Training samples that can't be read: how many a run may replace by others, and the record of those that it did."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fairexp.errors import RunError
from fairexp.runtime.track import one_line


class Bad(NamedTuple):
    """A sample that can't be read, why, and the one that took its place; none where the policy allows none."""

    sample: int  # its index
    error: str
    instead: int | None


def reason(error: Exception) -> str:
    """The error in one line, with the place that raised it: a bug in a data set's code is found without a traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{one_line(error)} ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else one_line(error)


class BadSamples:
    """Counts a run's bad samples, and ends the run at one more than `most`.

    A sample counts once, however often its turn comes, over all ranks and attempts: each rank writes its own rows
    (RUN_DIR/logs/bad_samples_<rank>.jsonl, one a sample and epoch) and reads the others'. Ranks that meet one in the same
    moment may each allow theirs.
    """

    def __init__(self, logs: Path, rank: int, most: int):
        self.logs = logs
        self.rank = rank
        self.most = most
        self._written: set[tuple[int, int]] | None = None  # (epoch, index), by this rank

    def replace(self, bad: Sequence[Bad], epoch: int, step: int) -> None:
        """Writes down the samples that were replaced; a RunError where that is one too many."""
        file = self.logs / f"bad_samples_{self.rank}.jsonl"
        if bad and self._written is None:
            self._written = {(row["epoch"], row["index"]) for row in _rows(file)}
        for index, error, instead in bad:
            what = f"dataset.train: sample {index} (step {step}, epoch {epoch}) can't be read: {error}"
            if self.most == 0:
                raise RunError(f"{what}; mend it, or set trainer.bad_samples to how many may be replaced")
            if instead is None:
                raise RunError(f"{what}; nor can the samples after it")
            assert self._written is not None
            if (epoch, index) in self._written:
                continue  # a resumed run meets it again
            known = replaced(self.logs)
            if len(known | {index}) > self.most:
                rows = f"{len(known)} others stand in {self.logs}/bad_samples_*.jsonl"
                raise RunError(f"{what}; trainer.bad_samples={self.most} allows no more: {rows}")
            row = {"step": step, "epoch": epoch, "index": index, "instead": instead, "error": error}
            self._written.add((epoch, index))
            with open(file, "ab", buffering=0) as out:
                out.write((json.dumps(row) + "\n").encode())
            print(f"{what}; sample {instead} takes its place", file=sys.stderr, flush=True)


def replaced(logs: Path) -> set[int]:
    """The samples that a run has replaced."""
    return {row["index"] for path in logs.glob("bad_samples_*.jsonl") for row in _rows(path)}


def _rows(path: Path) -> list[dict]:
    """What follows the last newline was torn by a kill, or is being written now."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
