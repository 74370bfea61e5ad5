"""How a rank gets the samples that its steps take: read, augmented, mixed, by data loading processes or without.

Per-sample randomness is a function of (seed, epoch, sample index), so it is the same in any process and on any world size.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from fairexp.datasets.splitmix import GOLDEN, splitmix64
from fairexp.errors import MachineError, RunError
from fairexp.lifetime import die_with
from fairexp.runtime.bad_samples import Bad, BadSamples, reason
from fairexp.runtime.dist import Place
from fairexp.runtime.init import seed_of
from fairexp.runtime.order import Part, TrainingOrder, endless
from fairexp.runtime.preempt import SIGNALS

Augment = Callable[[Any, Tensor], Any]

LOOKS_AT = 100  # samples, until one is found that takes a bad one's place
ALIGNED = 64  # bytes: where a tensor begins in shared memory
SMALL_SHM_MIB = 64  # what a container has by default; a few batches fill it


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
    ):
        self.dataset = dataset
        self.augment = augment
        self.mix = mix
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


class _Keys:
    """A sampler for DataLoader: what a function yields."""

    def __init__(self, make: Callable[[], Iterator[Part]]):
        self.make = make

    def __iter__(self) -> Iterator[Part]:
        return self.make()


class _InWorker:
    """The fetcher as a data loading process calls it. What goes wrong for which there are words comes back as a value: an
    exception would come wrapped in the process's traceback."""

    def __init__(self, fetcher: Fetcher):
        self.fetcher = fetcher

    def __getitem__(self, part: Part) -> tuple[Packed, list[Bad]] | RunError:
        part = part._replace(indices=torch.from_numpy(part.indices))
        try:
            batch, bad = self.fetcher.fetch(part)
            # now and not on the way: the queue's thread would print a traceback, drop the batch, and the run would wait for ever
            return packed(batch), bad
        except RunError as error:
            return error
        except RuntimeError as error:
            if SHM_FULL not in str(error):
                raise
            return MachineError(f"{SHM}: {reason(error)}")


SHM_FULL = "shared memory"  # of torch's words for it
SHM = "/dev/shm is full: enlarge it (mount -o remount,size=8G /dev/shm; docker run --shm-size=8g), or set trainer.num_workers=0"
LIKELY = {
    signal.SIGKILL: "out of memory? Fewer trainer.num_workers need less of it, or ask for more",
    signal.SIGBUS: SHM,
    signal.SIGSEGV: "a crash in compiled code that the data set calls",
}


class Packed(NamedTuple):
    """A batch on its way from a data loading process: its tensors in one piece of shared memory, unless they are in some
    already. Each piece costs a file descriptor, which goes through a connection of its own."""

    piece: Tensor  # bytes
    form: Any  # the batch, with an Inside for each tensor


@dataclass(frozen=True, slots=True)
class Inside:
    """Where a tensor is in the piece."""

    dtype: torch.dtype
    shape: torch.Size
    begin: int
    end: int


def packed(batch: Any) -> Packed:
    """The batch with its tensors copied into shared memory; tuples, lists and dicts are walked."""
    tensors: list[tuple[Tensor, Inside]] = []
    size = 0

    def place(tensor: Tensor) -> Tensor | Inside:
        nonlocal size
        if tensor.layout != torch.strided or tensor.is_shared():  # default_collate has put it there
            return tensor
        if type(tensor) is not Tensor or tensor.is_quantized or tensor.requires_grad:
            return tensor.share_memory_()
        inside = Inside(tensor.dtype, tensor.shape, size, size + tensor.nbytes)
        tensors.append((tensor, inside))
        size += -(-tensor.nbytes // ALIGNED) * ALIGNED
        return inside

    form = each(Tensor, place, batch)
    if not size:
        return Packed(torch.empty(0, dtype=torch.uint8), form)
    piece = torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(size))
    for tensor, inside in tensors:
        view(piece, inside).copy_(tensor)
    return Packed(piece, form)


def unpacked(batch: Packed) -> Any:
    """The batch, whose tensors are views of the piece."""
    return each(Inside, partial(view, batch.piece), batch.form)


def view(piece: Tensor, inside: Inside) -> Tensor:
    return piece[inside.begin : inside.end].view(inside.dtype).view(inside.shape)


def each(kind: type, change: Callable[[Any], Any], batch: Any) -> Any:
    """The batch with what is of that kind changed; tuples, lists and dicts are walked."""
    if isinstance(batch, kind):
        return change(batch)
    if isinstance(batch, dict):
        return {key: each(kind, change, value) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(each(kind, change, value) for value in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(each(kind, change, value) for value in batch)
    return batch


def _begin_worker(parent: int, worker: int) -> None:
    die_with(parent)  # torch's own watch over the parent takes five seconds
    # Slurm signals each process of a job, and a terminal each of its group: the ranks still need their data to save
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _identity(batch: Any) -> Any:
    return batch


class Batches:
    """An iterator over steps: each a list of this rank's micro batches on its device. `waited_s` adds up the time inside."""

    def __init__(self, fetcher: Fetcher, order: TrainingOrder, here: Place, num_workers: int, first_step: int):
        self.here = here
        self.order = order
        self.fetcher = fetcher
        self.num_workers = num_workers
        self.waited_s = 0.0
        self._batches: Iterator[Any] | None = None
        self._workers: list[multiprocessing.process.BaseProcess] = []
        self.restart(first_step)

    def restart(self, first_step: int) -> None:
        """Goes on with this step, by the order as it is now."""
        self.close()
        self._steps = self.order.steps(first_step)
        if self.num_workers:
            self._start_workers(first_step)

    def _start_workers(self, first_step: int) -> None:
        free = os.statvfs("/dev/shm")
        free_mib = free.f_bavail * free.f_frsize / 2**20
        if free_mib <= SMALL_SHM_MIB and self.here.local_rank == 0:
            line = f"/dev/shm has {free_mib:.0f} MiB free, and batches pass through it: enlarge it, or set trainer.num_workers=0"
            print(line, file=sys.stderr, flush=True)
        others, handler = multiprocessing.active_children(), signal.getsignal(signal.SIGCHLD)
        # the workers walk the same order, micro batch by micro batch; they hand tensors over, never objects
        loader: DataLoader[Any] = DataLoader(
            _InWorker(self.fetcher),  # type: ignore[arg-type]
            batch_size=None,
            sampler=_Keys(lambda: self._keys(first_step)),  # type: ignore[arg-type]
            num_workers=self.num_workers,
            collate_fn=_identity,
            generator=torch.Generator(),  # the loader draws its base seed: not from the dropout masks' generator
            worker_init_fn=partial(_begin_worker, os.getpid()),
            pin_memory=self.here.device.type == "cuda",
        )
        # until a worker ignores them: a signal would end it, or be handled by a copy of this process's handler
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        self._batches = iter(loader)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        self._workers = [child for child in multiprocessing.active_children() if child not in others]
        # torch raises a worker's death wherever this process just is, such as in a save; here it is seen where a batch is
        # taken, within torch's five seconds
        if signal.getsignal(signal.SIGCHLD) is not handler:
            signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)

    def _keys(self, first_step: int) -> Iterator[Part]:
        """The parts as a data loading process gets them: a tensor would go there in shared memory of its own."""
        for step in self.order.steps(first_step):
            for part in step:
                yield part._replace(indices=part.indices.numpy())  # type: ignore[arg-type]

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> list[MicroBatch]:
        began = time.perf_counter()
        step = [
            MicroBatch(
                to_device(self.fetcher[part] if self._batches is None else self._take(part), self.here.device),
                part.weight,
                part.share,
            )
            for part in next(self._steps)
        ]
        self.waited_s += time.perf_counter() - began
        return step

    def _take(self, part: Part) -> Any:
        """The next batch of the workers, which is the part's."""
        assert self._batches is not None
        try:
            got = next(self._batches)
        except Exception as error:
            # torch has several for a worker that has gone; the process itself says which end it had
            multiprocessing.connection.wait([worker.sentinel for worker in self._workers], timeout=1.0)
            for worker in self._workers:
                if worker.exitcode:
                    raise _died(worker.pid, worker.exitcode) from error
            raise
        if isinstance(got, RunError):
            raise got
        batch, bad = got
        return self.fetcher.judge(part, unpacked(batch), bad)

    def close(self) -> None:
        """Ends the workers."""
        # that ends them, unless something else holds torch's iterator, such as an exception's frames
        self._batches = None
        for worker in self._workers:
            if worker.is_alive():
                worker.kill()  # they ignore the gentler signals
                worker.join()
        self._workers = []


def _died(pid: int | None, code: int) -> RunError:
    what = f"data loading process {pid}"
    if code > 0:
        return RunError(f"{what} ended with exit code {code}; trainer.num_workers=0 shows why")
    number = signal.Signals(-code)
    return MachineError(f"{what} was killed by {number.name}: {LIKELY.get(number, 'by whom?')}")


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with every tensor on the device; tuples, lists and dicts are walked."""
    if device.type == "cpu":
        return batch
    return each(Tensor, lambda tensor: tensor.to(device, non_blocking=True), batch)


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
