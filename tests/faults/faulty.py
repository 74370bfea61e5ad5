"""A model and a data set that go wrong where they are told to: copied into the folder of a run."""

import os
import re
import signal
import time
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fairexp.datasets.digits import Digits as Good
from fairexp.runtime import checkpoint

SLOW_S = 6.5
NUM_BATCHES = 6  # of an evaluation, on a rank


def here(rank: int) -> bool:
    """Whether this is that rank in the run's first attempt."""
    return os.environ["RANK"] == str(rank) and os.environ["FAIREXP_ATTEMPT"] == "1"


def hold_the_gil() -> None:
    re.match(r"(a?){40}a{40}", "a" * 40)


class Model(nn.Linear):
    """Linear. `fault`: what happens on a rank in a step."""

    def __init__(self, in_features: int, out_features: int, fault: str, rank: int, step: int) -> None:
        super().__init__(in_features, out_features)
        self.fault, self.rank, self.step, self.calls, self.evaluated = fault, rank, step, 0, 0
        self.group = dist.new_group() if fault == "skips" else None
        if fault == "is slow":
            checkpoint.save = slow(checkpoint.save)

    def forward(self, images: Tensor) -> Tensor:
        self.calls += self.training
        now = here(self.rank) and self.training and self.calls == self.step
        if self.fault == "stops" and now:
            os.kill(os.getpid(), signal.SIGSTOP)
        elif self.fault == "holds the GIL" and now:
            hold_the_gil()
        elif self.fault == "skips" and not now:
            dist.all_reduce(torch.zeros(1), group=self.group)
        elif self.fault == "is slow" and self.calls == 1:
            time.sleep(SLOW_S if self.training else 0)
        elif self.fault == "is slow" and not self.training:
            self.evaluated += 1
            time.sleep(SLOW_S / NUM_BATCHES if self.evaluated <= NUM_BATCHES else 0)
        return super().forward(images.flatten(1))


def slow(save: Callable[[Any], None]) -> Callable[[Any], None]:
    def slow_save(run: Any) -> None:
        time.sleep(SLOW_S if run.here.first and not any(run.dir.checkpoints.iterdir()) else 0)
        save(run)

    return slow_save


class Digits(Good):
    """The digits. A data loading worker stops itself at its n-th batch on a rank."""

    def __init__(self, split: Literal["train", "test"], rank: int | None, batch: int) -> None:
        super().__init__(split)
        self.rank, self.batch, self.taken = rank, batch, 0

    def __getitems__(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        self.taken += 1
        if self.rank is not None and here(self.rank) and self.taken == self.batch:
            os.kill(os.getpid(), signal.SIGSTOP)
        return super().__getitems__(indices)
