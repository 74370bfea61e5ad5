"""How a rank gets the samples that its steps take: read, augmented, mixed, by data loading processes or without.

Per-sample randomness is a function of (seed, epoch, sample index), so it is the same in any process and on any world size.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from fairexp.datasets.splitmix import GOLDEN, splitmix64
from fairexp.errors import RunError
from fairexp.runtime.bad_samples import Bad, BadSamples, reason
from fairexp.runtime.dist import Place
from fairexp.runtime.init import seed_of
from fairexp.runtime.order import Part, TrainingOrder, endless
from fairexp.runtime.packing import to_device
from fairexp.runtime.workers import SHM_FULL, Workers

Augment = Callable[[Any, Tensor], Any]

LOOKS_AT = 100  # samples, until one is found that takes a bad one's place


class Mix(Protocol):
    """What blends training samples with others of the data set, such as mixup. Which ones, and how, follows from a sample's
    seed alone: its micro batch, another on another world size, has no say."""

    def partners(self, seeds: Tensor, length: int) -> Tensor:
        """The indices of the samples to blend in."""

    def __call__(self, batch: Any, seeds: Tensor) -> Any:
        """The batch of those whose seeds these are; in `batch` the partners follow on them, in the order of `partners`."""


@runtime_checkable
class BatchDataset(Protocol):
    """A data set that gathers a whole batch: 6x faster than sample by sample for small samples (torch's own protocol)."""

    def __len__(self) -> int: ...

    def __getitems__(self, indices: Tensor) -> Any: ...


class MicroBatch(NamedTuple):
    """A rank's samples of one forward pass, on its device."""

    batch: Any
    weight: int
    share: float


class Fetcher:
    """Turns a part into a batch; it runs in the main process or in a data loading worker, with the same result.

    With `bad_samples`, a sample that can't be read is replaced by the next one that can, on any world size and after any
    interruption the same; without, as for evaluation, it ends the run: a metric over other samples is another metric.
    """

    def __init__(
        self,
        dataset: Any,
        augment: Augment | None,
        seed: int,
        bad_samples: BadSamples | None = None,
        mix: Mix | None = None,
        on_device: Callable[[Any], Any] | None = None,
    ):
        self.dataset = dataset
        self.augment = augment
        self.mix = mix
        self.on_device = on_device
        self.seed = seed
        self.bad_samples = bad_samples
        self.replaces = bad_samples is not None and bad_samples.most > 0
        self.gathers = isinstance(dataset, BatchDataset)
        self.endless = endless(dataset)

    def __getitem__(self, part: Part) -> Any:
        return self.judge(part, *self.fetch(part))

    def fetch(self, part: Part) -> tuple[Any, list[Bad]]:
        """The batch, and the samples that were replaced in it; no batch, where one couldn't be."""
        if self.gathers and not (self.augment or self.mix):
            return self._gather(part.indices)
        own = seeds = self.seeds(part)
        if self.mix:
            part = part._replace(indices=torch.cat([part.indices, self.mix.partners(own, len(self.dataset))]))
            seeds = self.seeds(part)  # a partner is augmented as it is itself in this epoch
        batch, bad = self._gather(part.indices) if self.gathers else self._collect(part.indices, seeds)
        if batch is not None and self.augment:
            batch = self.augment(batch, seeds)
        if batch is not None and self.mix:
            batch = self.mix(batch, own)
        return batch, bad

    def moved(self, batch: Any, device: torch.device) -> Any:
        """The batch on the device, and as the model takes it."""
        batch = to_device(batch, device)
        return self.on_device(batch) if self.on_device else batch

    def judge(self, part: Part, batch: Any, bad: list[Bad]) -> Any:
        """The batch, if the policy for bad samples allows it; in the main process."""
        if bad and self.bad_samples is None:
            raise RunError(f"dataset.eval: sample {bad[0].sample} can't be read: {bad[0].error}")
        if bad and self.bad_samples is not None:
            self.bad_samples.replace(bad, part.epoch, part.step)
        return batch

    def _gather(self, indices: Tensor) -> tuple[Any, list[Bad]]:
        bad: list[Bad] = []
        try:
            samples = self.dataset.__getitems__(indices)
        except Exception:  # which one was it?
            found = [pair for index in indices.tolist() if (pair := self._find(index, self._one, bad))]
            if len(found) < len(indices):
                return None, bad
            samples = self.dataset.__getitems__(torch.tensor([index for index, _ in found]))
        return default_collate(samples) if isinstance(samples, list) else samples, bad

    def _collect(self, indices: Tensor, seeds: Tensor) -> tuple[Any, list[Bad]]:
        bad: list[Bad] = []
        found = []
        with _isolated_random_state():
            for index, seed in zip(indices.tolist(), seeds.tolist(), strict=True):
                pair = self._find(index, partial(self._sample, seed=seed), bad)
                if pair is None:
                    return None, bad
                found.append(pair)
            return _collate(found), bad

    def _find(self, index: int, read: Callable[[int], Any], bad: list[Bad]) -> tuple[int, Any] | None:
        """The sample and its index; the next one that can be read, where it can't; None, where none takes its place."""
        why = ""
        for instead in range(index, index + (LOOKS_AT if self.replaces else 1)):
            if not self.endless:
                instead %= len(self.dataset)
            for _ in range(2):  # a network file system may hiccup
                try:
                    sample = read(instead)
                except MemoryError:
                    raise
                except Exception as error:
                    why = why or reason(error)
                else:
                    if instead != index:
                        bad.append(Bad(index, why, instead))
                    return instead, sample
        bad.append(Bad(index, why, None))
        return None

    def _one(self, index: int) -> Any:
        return self.dataset.__getitems__(torch.tensor([index]))

    def _sample(self, index: int, seed: int) -> Any:
        # whatever generator a transform uses, it draws the same numbers for the same sample. Not torch.manual_seed: that
        # seeds the devices' too, from which dropout draws, and where there are none notes a stack trace for each
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)
        random.seed(seed)
        return self.dataset[index]

    def seeds(self, part: Part) -> Tensor:
        """One seed a sample, from (seed, epoch, index)."""
        base = np.uint64(seed_of(self.seed, "sample", part.epoch))
        with np.errstate(over="ignore"):
            mixed = splitmix64(base + part.indices.numpy().astype(np.uint64) * GOLDEN)
        return torch.from_numpy((mixed >> np.uint64(1)).astype(np.int64))


@contextmanager
def _isolated_random_state() -> Iterator[None]:
    """The main process's generators (dropout draws from them) don't notice the samples'."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


def _collate(samples: list[tuple[int, Any]]) -> Any:
    """One batch of the samples; a RunError in words where one isn't like the first."""
    try:
        return default_collate([sample for _, sample in samples])
    except Exception as error:
        if SHM_FULL in str(error):
            raise
        first = samples[0]
        for other in samples[1:]:
            try:
                default_collate([first[1], other[1]])
            except Exception as found:
                same = f"samples {first[0]} and {other[0]} don't go into one batch"
                raise RunError(f"the data set's {same}: {reason(found)}") from None
        raise


class Batches:
    """An iterator over steps: each a list of this rank's micro batches on its device. `waited_s` adds up the time inside."""

    def __init__(self, fetcher: Fetcher, order: TrainingOrder, here: Place, num_workers: int, first_step: int):
        self.here = here
        self.order = order
        self.fetcher = fetcher
        self.num_workers = num_workers
        self.waited_s = 0.0
        self._workers: Workers | None = None
        self.restart(first_step)

    def restart(self, first_step: int) -> None:
        """Goes on with this step, by the order as it is now."""
        self.close()
        self._steps = self.order.steps(first_step)
        if self.num_workers:
            parts = chain.from_iterable(self.order.steps(first_step))
            self._workers = Workers(self.fetcher.fetch, parts, self.num_workers, self.here)

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> list[MicroBatch]:
        began = time.perf_counter()
        step = [
            MicroBatch(self.fetcher.moved(self._batch(part), self.here.device), part.weight, part.share)
            for part in next(self._steps)
        ]
        self.waited_s += time.perf_counter() - began
        return step

    def _batch(self, part: Part) -> Any:
        # the workers walk the same order, micro batch by micro batch
        return self.fetcher.judge(part, *next(self._workers)) if self._workers else self.fetcher[part]

    def close(self) -> None:
        """Ends the data loading processes."""
        if self._workers:
            self._workers.close()
            self._workers = None


def evaluation_batches(fetcher: Fetcher, parts: Iterable[Part], here: Place, num_workers: int) -> Iterator[MicroBatch]:
    """The batches of the parts, for an evaluation. Data loading processes read them where samples come one by one: one that
    gathers a batch at once is done before a process has started."""
    workers = Workers(fetcher.fetch, iter(parts), num_workers, here) if num_workers and not fetcher.gathers else None
    try:
        for part in parts:
            batch = fetcher.judge(part, *next(workers)) if workers else fetcher[part]
            yield MicroBatch(fetcher.moved(batch, here.device), part.weight, part.share)
    finally:
        if workers:
            workers.close()


def length(dataset: Any, what: str) -> int:
    """The number of samples; a RunError in words for what has none."""
    try:
        size = len(dataset)
    except TypeError:
        raise RunError(
            f"dataset.{what}: {type(dataset).__qualname__} has no length. fairexp takes map-style data sets (__len__ and "
            "__getitem__): the order of samples must not depend on the number of ranks and workers"
        ) from None
    if size == 0:
        raise RunError(f"dataset.{what}: {type(dataset).__qualname__} is empty")
    return size
