"""Which samples each step takes.

The order is a function of (seed, epoch) alone and a step's place in it of the step number, so it is the same on any world size
and after any interruption.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from fairexp.datasets.permutation import CHUNK, permuted
from fairexp.errors import RunError
from fairexp.runtime.dist import Place
from fairexp.runtime.init import seed_of

# samples whose order is drawn by torch.randperm: 8 bytes each, in every data loading process too
MOST_IN_MEMORY = 1 << 24


class Order(Protocol):
    """A sample's index for each place of an epoch."""

    def __len__(self) -> int: ...

    def __getitem__(self, places: slice) -> Tensor: ...


@runtime_checkable
class ShuffledDataset(Protocol):
    """A data set that shuffles itself, since some orders are cheaper to read: a permutation of its indices, of the generator, in
    memory or computed slice by slice; None, where it would have any."""

    def permutation(self, generator: torch.Generator) -> Order | None: ...


class Part(NamedTuple):
    """One micro batch's samples on one rank. `weight` of them count: none, where a rank has no sample and sends a copy.
    `share`: of the global batch's mean, times the number of data ranks, by which DDP and FSDP divide."""

    indices: Tensor
    weight: int
    share: float
    epoch: int
    step: int = 0  # the optimizer step that takes it, counted from one; 0: an evaluation


class Computed:
    """An order of the samples from `first` on, of any length in no memory: computed where it is looked at, some ten thousand
    places at once. Without a seed the samples stand as they are."""

    def __init__(self, length: int, seed: int | None, first: int = 0):
        self.length = length
        self.first = first
        self.seed = seed
        self.chunk = -1  # the number of the one that is at hand
        self.indices = torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, places: slice) -> Tensor:
        begin, end = places.start or 0, min(self.length if places.stop is None else places.stop, self.length)
        if self.seed is None:
            return torch.arange(self.first + begin, self.first + max(begin, end))
        found = []
        while begin < end:
            chunk = begin // CHUNK
            if chunk != self.chunk:
                there = np.arange(chunk * CHUNK, min((chunk + 1) * CHUNK, self.length))
                self.chunk, self.indices = chunk, torch.from_numpy(self.first + permuted(there, self.length, self.seed))
            part = self.indices[begin - chunk * CHUNK : end - chunk * CHUNK]
            found.append(part)
            begin += len(part)
        return found[0] if len(found) == 1 else torch.cat(found) if found else self.indices[:0]


def split(
    order: Order, begin: int, end: int, here: Place, micro_batch_size: int, epoch: int, step: int = 0
) -> list[Part]:
    """This rank's micro batches of the global batch order[begin:end]. Every rank gets the same number of them: a rank short of
    samples would leave the others waiting in a collective."""
    size = end - begin
    mine = begin + size * here.data_rank // here.data_size
    num_mine = begin + size * (here.data_rank + 1) // here.data_size - mine
    largest = -(-size // here.data_size)
    count = -(-largest // micro_batch_size)
    scale = here.data_size / size
    parts = []
    for k in range(count):
        first, last = mine + num_mine * k // count, mine + num_mine * (k + 1) // count
        weight = last - first
        # one slice of the order a part: of a small step's time each is a percent
        mine_of_it = order[first:last] if weight else order[begin : begin + 1]
        parts.append(Part(mine_of_it, weight, weight * scale, epoch, step))
    return parts


class TrainingOrder:
    """The parts of every step from `first_step` on: an epoch is a seeded permutation, cut into global batches. The last one of
    an epoch may be smaller: every sample is seen once an epoch. `left_out`: the numbers of the batches that no step takes.
    Without `shuffle` the samples come as the data set has them: it brings its own order; so does one with a permutation of its
    own. An endless `dataset` has other samples each epoch: where one ends the next goes on."""

    def __init__(
        self,
        length: int,
        global_batch_size: int,
        micro_batch_size: int,
        here: Place,
        seed: int,
        shuffle: bool = True,
        dataset: Any = None,
    ):
        self.length = length
        self.shuffled = dataset if isinstance(dataset, ShuffledDataset) else None
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.here = here
        self.seed = seed
        self.steps_per_epoch = -(-length // global_batch_size)
        self.shuffle = shuffle
        self.endless = endless(dataset)
        self.left_out: list[int] = []

    def permutation(self, epoch: int) -> Order:
        """The epoch's order."""
        first, seed = epoch * self.length if self.endless else 0, seed_of(self.seed, "order", epoch)
        if not self.shuffle:
            return Computed(self.length, None, first)
        generator = torch.Generator().manual_seed(seed)
        own = self.shuffled.permutation(generator) if self.shuffled else None
        if own is None and self.length > MOST_IN_MEMORY:
            return Computed(self.length, seed, first)
        if own is None:
            return first + torch.randperm(self.length, generator=generator)
        if len(own) != self.length:
            what = type(self.shuffled).__qualname__
            raise RunError(f"dataset.train: {what}.permutation gave {len(own):,} of {self.length:,} samples")
        return own

    def batch_of(self, step: int) -> int:
        """The number of the global batch that the step takes, both from 0: the step-th of those that aren't left out."""
        number = step
        for gone in sorted(self.left_out):
            number += gone <= number
        return number

    def samples(self, batch: int) -> tuple[int, list[list[int]]]:
        """The global batch's epoch, and its samples by rank."""
        epoch, within = divmod(batch, self.steps_per_epoch)
        start = within * self.global_batch_size
        samples = self.permutation(epoch)[start : start + self.global_batch_size].tolist()
        parts, size = self.here.data_size, len(samples)
        by_part = [samples[size * part // parts : size * (part + 1) // parts] for part in range(parts)]
        return epoch, [by_part[rank // self.here.model_ranks] for rank in range(self.here.world_size)]

    def steps(self, first_step: int) -> Iterator[list[Part]]:
        epoch, within = divmod(self.batch_of(first_step), self.steps_per_epoch)
        step = first_step
        while True:
            order = self.permutation(epoch)
            first = epoch * self.steps_per_epoch
            left_out = {number - first for number in self.left_out}
            for batch in range(within, self.steps_per_epoch):
                start = batch * self.global_batch_size
                end = min(start + self.global_batch_size, self.length)
                if batch not in left_out:
                    step += 1
                    yield split(order, start, end, self.here, self.micro_batch_size, epoch, step)
            epoch, within = epoch + 1, 0


@dataclass(frozen=True)
class EvaluationOrder:
    """Every sample exactly once over all ranks, in order; the last batch is ragged. It is walked as often as one likes, and
    holds nothing: a list of the parts of a billion samples would."""

    length: int
    batch_size: int
    here: Place

    def __iter__(self) -> Iterator[Part]:
        order, size = Computed(self.length, None), self.batch_size * self.here.data_size
        for start in range(0, self.length, size):
            yield from split(order, start, min(start + size, self.length), self.here, self.batch_size, epoch=0)


def endless(dataset: Any) -> bool:
    """Whether the set has samples behind its length, which then is an epoch's: those of the next one."""
    return bool(getattr(dataset, "endless", False))
