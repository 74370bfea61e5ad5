"""fairexp's own loop with clock marks, for `loop._target_`. `fit` itself is not touched: the marks are in what it asks after each
step, whether to stop."""

import itertools
import json
import time
from collections.abc import Iterator
from typing import Any

import torch
from marks import Marks
from torch.utils.data import DataLoader, TensorDataset

from fairexp.config.rundir import write_atomically
from fairexp.runtime.build import Run
from fairexp.runtime.loop import fit
from fairexp.runtime.order import Part
from fairexp.runtime.preempt import Stop


def timed(run: Run, out: str, every: int, last: int, loader: str = "own") -> None:
    """`fit`, with the times written to `out`; loader=torch gives it the batches of the DataLoader that the plain loop has."""
    if loader == "torch":
        digits = run.fetch_training.dataset
        dataset = TensorDataset(digits.images, digits.labels)
        loader_of_torch = DataLoader(dataset, run.trainer.global_batch_size, shuffle=True)
        run.fetch_training = FromLoader(loader_of_torch)  # type: ignore[assignment]
        anything = next(run.training.steps(0))  # the DataLoader has its own order
        run.training.steps = lambda first_step: itertools.repeat(anything)  # type: ignore[method-assign]
    num_parameters = sum(parameter.numel() for parameter in run.module.parameters())
    run.stop = Marked(run.stop, Marks(out, every, last, num_parameters))  # type: ignore[assignment]
    fit(run)


def recorded(run: Run, file: str) -> None:
    """`fit`, with the first and last weights and the order of the samples written to `file`."""
    start = {name: value.clone() for name, value in run.module.state_dict().items()}
    epochs = -(-run.max_steps // run.training.steps_per_epoch)
    fit(run)
    orders = [run.training.permutation(epoch) for epoch in range(epochs)]
    torch.save({"start": start, "orders": orders, "end": run.module.state_dict()}, file)


def noted(run: Run) -> None:
    """`fit`, with the times of its first step's end and of its own end in the run's folder."""
    run.stop = FirstStep(run)  # type: ignore[assignment]
    fit(run)
    run.stop.note("ended_at")  # type: ignore[attr-defined]


class FirstStep:
    """A Stop that notes when it is asked first: after the first step."""

    def __init__(self, run: Run) -> None:
        self.stop, self.file = run.stop, run.dir.path / "notes.json"
        self.notes: dict[str, float] = {}

    @property
    def signal(self) -> int:
        return self.stop.signal

    def agreed(self, step: int) -> bool:
        if not self.notes:
            self.note("first_step_at")
        return self.stop.agreed(step)

    def note(self, what: str) -> None:
        self.notes[what] = time.monotonic()
        write_atomically(self.file, json.dumps(self.notes))


class Marked:
    """A Stop that notes the time of each question."""

    def __init__(self, stop: Stop, marks: Marks) -> None:
        self.stop, self.marks = stop, marks

    def agreed(self, step: int) -> bool:
        stopping = self.stop.agreed(step)
        self.marks.after(step)
        return stopping


class FromLoader:
    """A Fetcher that gives the next batch of a DataLoader, epoch after epoch, whatever part is asked for."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.batches: Iterator[Any] = itertools.chain.from_iterable(itertools.repeat(loader))

    def __getitem__(self, part: Part) -> Any:
        return next(self.batches)

    def moved(self, batch: Any, device: torch.device) -> Any:
        return batch
