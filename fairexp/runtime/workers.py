"""Data loading processes: torch's DataLoader, less what doesn't go with a run that may be killed, signalled or out of memory."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from fairexp.errors import MachineError, RunError
from fairexp.lifetime import die_with
from fairexp.runtime.bad_samples import Bad, reason
from fairexp.runtime.dist import Place
from fairexp.runtime.order import Part
from fairexp.runtime.packing import Packed, packed, unpacked
from fairexp.runtime.preempt import SIGNALS

SMALL_SHM_MIB = 64  # what a container has by default; a few batches fill it
SHM_FULL = "shared memory"  # of torch's words for it
SHM = "/dev/shm is full: enlarge it (mount -o remount,size=8G /dev/shm; docker run --shm-size=8g), or set trainer.num_workers=0"
LIKELY = {
    signal.SIGKILL: "out of memory? Fewer trainer.num_workers need less of it, or ask for more",
    signal.SIGBUS: SHM,
    signal.SIGSEGV: "a crash in compiled code that the data set calls",
}

Fetch = Callable[[Part], tuple[Any, list[Bad]]]
# a Part on its way: its indices, which as a tensor would go in shared memory of their own, and the rest
Key = tuple[np.ndarray, list[Any]]


class Workers:
    """An iterator over what `fetch` gives for each of the parts, in their order: a batch and the samples replaced in it.

    RunError: what `fetch` raised. MachineError: a process was killed, or /dev/shm is full.
    """

    def __init__(self, fetch: Fetch, parts: Iterator[Part], num_workers: int, here: Place):
        free = os.statvfs("/dev/shm")
        free_mib = free.f_bavail * free.f_frsize / 2**20
        if free_mib <= SMALL_SHM_MIB and here.local_rank == 0:
            line = f"/dev/shm has {free_mib:.0f} MiB free, and batches pass through it: enlarge it, or set trainer.num_workers=0"
            print(line, file=sys.stderr, flush=True)
        others, handler = multiprocessing.active_children(), signal.getsignal(signal.SIGCHLD)
        loader = DataLoader(
            _InWorker(fetch),
            batch_size=None,
            sampler=_Keys(parts),
            num_workers=num_workers,
            collate_fn=_identity,
            generator=torch.Generator(),  # the loader draws its base seed: not from the dropout masks' generator
            worker_init_fn=partial(_begin_worker, os.getpid()),
            pin_memory=here.device.type == "cuda",
        )
        # until a worker ignores them: a signal would end it, or be handled by a copy of this process's handler
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        self._batches: Iterator[Any] | None = iter(loader)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        self._processes = [child for child in multiprocessing.active_children() if child not in others]
        # torch raises a worker's death wherever this process just is, such as in a save; here it is seen where a batch is
        # taken, within torch's five seconds
        if signal.getsignal(signal.SIGCHLD) is not handler:
            signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)

    def __iter__(self) -> Workers:
        return self

    def __next__(self) -> tuple[Any, list[Bad]]:
        assert self._batches is not None
        try:
            got = next(self._batches)
        except Exception as error:
            # torch has several for a worker that has gone; the process itself says which end it had
            multiprocessing.connection.wait([process.sentinel for process in self._processes], timeout=1.0)
            for process in self._processes:
                if process.exitcode:
                    raise _died(process.pid, process.exitcode) from error
            raise
        if isinstance(got, RunError):
            raise got
        batch, bad = got
        return unpacked(batch), bad

    def close(self) -> None:
        """Ends the processes."""
        # that ends them, unless something else holds torch's iterator, such as an exception's frames
        self._batches = None
        for process in self._processes:
            if process.is_alive():
                process.kill()  # they ignore the gentler signals
                process.join()
        self._processes = []


class _Keys(Sampler[Key]):
    """The parts as they go to the processes."""

    def __init__(self, parts: Iterator[Part]):
        self.parts = parts

    def __iter__(self) -> Iterator[Key]:
        return ((indices.numpy(), rest) for indices, *rest in self.parts)


class _InWorker(Dataset[Any]):
    """`fetch` as a data loading process calls it. What goes wrong for which there are words comes back as a value: an
    exception would come wrapped in the process's traceback."""

    def __init__(self, fetch: Fetch):
        self.fetch = fetch

    def __getitem__(self, key: Key) -> tuple[Packed, list[Bad]] | RunError:
        indices, rest = key
        try:
            batch, bad = self.fetch(Part(torch.from_numpy(indices), *rest))
            # now and not on the way: the queue's thread would print a traceback, drop the batch, and the run would wait for ever
            return packed(batch), bad
        except RunError as error:
            return error
        except RuntimeError as error:
            if SHM_FULL not in str(error):
                raise
            return MachineError(f"{SHM}: {reason(error)}")


def _begin_worker(parent: int, worker: int) -> None:
    die_with(parent)  # torch's own watch over the parent takes five seconds
    # Slurm signals each process of a job, and a terminal each of its group: the ranks still need their data to save
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _identity(batch: Any) -> Any:
    return batch


def _died(pid: int | None, code: int) -> RunError:
    what = f"data loading process {pid}"
    if code > 0:
        return RunError(f"{what} ended with exit code {code}; trainer.num_workers=0 shows why")
    number = signal.Signals(-code)
    return MachineError(f"{what} was killed by {number.name}: {LIKELY.get(number, 'by whom?')}")
