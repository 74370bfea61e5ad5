"""A run's metrics: `metrics.jsonl`, which is the truth, and one tracker beside it, which may fail.

The worker builds a `Metrics` on rank 0, the other ranks hold a `Nothing`; the loop calls `log` every `log_every` steps.
"""

import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from fairexp.config.attempt import publish
from fairexp.errors import Fenced, RunError
from fairexp.runtime.trackers.nothing import Nothing

# Bare NaN and Infinity are not JSON, and most readers stop at them. `default` takes 0-d tensors and numpy's numbers.
_encode = json.JSONEncoder(allow_nan=False, default=float).encode


class Tracker(Protocol):
    """Where metrics go besides the file: built from `tracker:`, on rank 0 only, with what the worker adds:

    `run_dir: Path, run_id: str, name: str, config: dict, resumed: bool`. Any method may raise: it ends the tracker,
    not the run.
    """

    def log(self, record: Mapping[str, float], step: int) -> None: ...

    def finish(self, exit_code: int) -> None: ...


class Metrics:
    """Appends rows to RUN_DIR/metrics.jsonl and hands them on to the tracker.

    A row is one call: `{"step": 100, "train/loss": 0.5, ...}`. A step may have several rows with different metrics, as
    from training and evaluation. Before the first `log` of an attempt call `drop_after` with the step it starts from.
    `workspace`: the attempt's. The file is replaced once by each attempt and then written through the descriptor: what an
    older one still writes goes into a file that has no name any more.
    """

    def __init__(self, run_dir: Path, tracker: Tracker, workspace: Path | None = None) -> None:
        self._path = run_dir / "metrics.jsonl"
        self._draft = (workspace or run_dir) / "metrics.jsonl.tmp"
        self._file: int | None = None  # its descriptor
        self.tracker = tracker
        self._step = 0
        self._logged: set[str] = set()  # the metrics that stand at self._step

    def log(self, record: Mapping[str, float], step: int) -> None:
        """Steps never decrease, and a metric stands once a step: the first value wins.

        A resumed run may evaluate its checkpoint's step a second time.
        """
        if step < self._step:
            raise ValueError(f"metrics of step {step} came after those of step {self._step}")
        if step > self._step:
            self._step, self._logged = step, set()
        new = {metric: value for metric, value in record.items() if metric not in self._logged}
        if not new:
            return
        self._logged.update(new)
        if self._file is None:
            self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        self._append(_line({"step": step, **new}))
        self._tell(self.tracker.log, new, step)

    def drop_after(self, step: int) -> None:
        """Forgets the rows after `step`, and a line that a kill tore; the file is replaced in one piece."""
        rows = [row for row in read(self._path) if row["step"] <= step] if self._path.exists() else []
        if self._file is not None:
            os.close(self._file)
        try:
            self._file = os.open(self._draft, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_TRUNC, 0o666)
        except FileNotFoundError:
            raise Fenced(self._path) from None
        except OSError as error:
            raise _unwritten(self._path, error) from error
        self._append("".join(map(_line, rows)))
        os.fsync(self._file)  # before the rename: a crash must not leave an empty file under the final name
        publish(self._draft, self._path)
        self._step = rows[-1]["step"] if rows else 0
        self._logged = {metric for row in rows if row["step"] == self._step for metric in row} - {"step"}

    def sync(self) -> None:
        """The rows so far are on the disk."""
        if self._file is not None:
            os.fsync(self._file)

    def _append(self, text: str) -> None:
        """All of the text or, where the disk is full, nothing: a kill -9 can't tear it either, since it is one call."""
        assert self._file is not None
        data, size = text.encode(), os.fstat(self._file).st_size
        try:
            while data:
                data = data[os.write(self._file, data) :]
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._file, size)  # half a row would be in the way of the next one
            raise _unwritten(self._path, error) from error

    def finish(self, exit_code: int) -> None:
        """Closes the tracker, which tells its page how the run ended."""
        self._tell(self.tracker.finish, exit_code)

    def _tell(self, method: Callable[..., None], *arguments: Any) -> None:
        try:
            method(*arguments)
        except Exception as error:
            what = f"{type(self.tracker).__name__}.{method.__name__}: {one_line(error)}"
            print(f"tracker off, the run and metrics.jsonl go on: {what}", file=sys.stderr, flush=True)
            self.tracker = Nothing()


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, with NaN and the infinities as floats again.

    What follows the last newline was torn by a kill, or is being written now, and is left out.
    """
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [{metric: _number(value) for metric, value in json.loads(line).items()} for line in lines]


def _unwritten(path: Path, error: OSError) -> RunError:
    return RunError(f"{path}: {error.strerror}; the same command goes on from the last checkpoint when that is mended")


def one_line(error: Exception) -> str:
    """An error's type and text, fit for one line of a log: wandb's may hold a proxy's whole HTML page."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def _line(row: dict[str, Any]) -> str:
    try:
        return _encode(row) + "\n"
    except ValueError:  # NaN or an infinity: rare, so the good rows don't pay for the search
        return _encode({metric: number(float(value)) for metric, value in row.items()} | {"step": row["step"]}) + "\n"


def number(value: float) -> float | str:
    """As JSON can hold it."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _number(value: Any) -> Any:
    return float(value) if value in ("NaN", "Infinity", "-Infinity") else value
