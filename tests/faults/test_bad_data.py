"""A sample that can't be read, a data loading process that is killed, a full /dev/shm: one line, and what the config says."""

import itertools
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, Fairexp
from torch import Tensor
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from fairexp.errors import MachineError, RunError
from fairexp.runtime.bad_samples import BadSamples
from fairexp.runtime.data import Batches, Fetcher
from fairexp.runtime.dist import Place
from fairexp.runtime.order import TrainingOrder

LENGTH = 24  # samples, in steps of 8
BAD = (3, 4, 20)


class Images:
    """Sample i is the number i, with noise that is its own; those in `bad` can't be read."""

    def __init__(self, bad: tuple[int, ...] = BAD) -> None:
        self.bad = bad

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> Tensor:
        if index in self.bad:
            raise OSError(f"image_{index}.jpg is\ntruncated")
        return torch.tensor([float(index), torch.rand(()).item()])


class Gathered(Images):
    """The same, a whole batch at once and without noise."""

    def __getitems__(self, indices: Tensor) -> Tensor:
        return torch.stack([self[index] for index in indices.tolist()])[:, :1]


class Killed(Images):
    """Its sample 20 kills whoever reads it."""

    def __init__(self, by: int) -> None:
        super().__init__(())
        self.by = by

    def __getitem__(self, index: int) -> Tensor:
        if index == 20:
            os.kill(os.getpid(), self.by)
        return super().__getitem__(index)


class Uneven(Images):
    def __getitem__(self, index: int) -> Tensor:
        return torch.zeros(2 if index == 7 else 3)


def take(
    logs: Path, dataset: Any, most: int, workers: int = 0, world_size: int = 1, first: int = 0, epochs: int = 2
) -> list[list[Tensor]]:
    """The batches of each rank, in the order of the steps."""
    got = []
    for rank in range(world_size):
        here = Place(rank, world_size, rank, torch.device("cpu"))
        fetcher = Fetcher(dataset, None, 0, BadSamples(logs, rank, most))
        batches = Batches(fetcher, TrainingOrder(LENGTH, 8, 3, here, 0), here, workers, first)
        try:
            got.append([micro.batch for step in itertools.islice(batches, 3 * epochs - first) for micro in step])
        finally:
            batches.close()
    return got


def by_step(ranks: list[list[Tensor]]) -> list[list[float]]:
    """All numbers of each step, over the ranks."""
    micro_batches = len(ranks[0]) // 6
    steps = [[] for _ in range(6)]
    for batches in ranks:
        for number, batch in enumerate(batches):
            steps[number // micro_batches] += batch.flatten().tolist()
    return [sorted(step) for step in steps]


def rows(logs: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for file in sorted(logs.glob("*.jsonl")) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("dataset", [Images(), Gathered()])
def test_by_default_the_first_bad_sample_ends_the_run_in_one_line(
    tmp_path: Path, dataset: Images, workers: int
) -> None:
    with pytest.raises(RunError) as caught:
        take(tmp_path, dataset, 0, workers)
    assert re.fullmatch(
        r"dataset\.train: sample (3|4|20) \(step \d, epoch 0\) can't be read: OSError: image_\1\.jpg is truncated "
        r"\(test_bad_data\.py:\d+\); mend it, or set trainer\.bad_samples to how many may be replaced",
        str(caught.value),
    )
    assert rows(tmp_path) == []


@pytest.mark.parametrize("dataset", [Images(), Gathered()])
def test_what_is_replaced_by_what_depends_on_nothing_but_the_sample(tmp_path: Path, dataset: Images) -> None:
    def steps(name: str, **where: int) -> list[list[float]]:
        (tmp_path / name).mkdir()
        return by_step(take(tmp_path / name, dataset, 3, **where))

    alone = steps("alone")
    assert steps("workers", workers=2) == alone
    assert steps("ranks", world_size=2) == alone
    assert steps("ranks with workers", world_size=2, workers=1) == alone
    values = sorted(number for step in alone[:3] for number in step if number == int(number))
    instead = {3: 5, 4: 5, 20: 21}
    assert values == sorted(float(instead.get(index, index)) for index in range(LENGTH))
    resumed = take(tmp_path, dataset, 3, first=2)[0]
    assert all(map(torch.equal, resumed, take(tmp_path, dataset, 3)[0][6:]))

    written = rows(tmp_path / "alone")
    assert sorted((row["epoch"], row["index"], row["instead"]) for row in written) == [
        (epoch, *pair) for epoch in (0, 1) for pair in instead.items()
    ]
    assert {row["error"].partition(" (")[0] for row in written} == {
        f"OSError: image_{index}.jpg is truncated" for index in BAD
    }
    assert all(row["epoch"] == (row["step"] - 1) // 3 for row in written)
    keys = [(row["epoch"], row["index"]) for row in rows(tmp_path / "ranks with workers")]
    assert sorted(set(keys)) == sorted((row["epoch"], row["index"]) for row in written)


def test_one_more_than_the_run_may_replace_ends_it_over_all_ranks_and_attempts(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"trainer\.bad_samples=2 allows no more: 2 others stand in .*bad_samples_"):
        take(tmp_path, Images(), 2, world_size=2)
    with pytest.raises(RunError, match=r"allows no more"):
        take(tmp_path, Images(), 2)  # another attempt doesn't count from zero
    assert len({row["index"] for row in rows(tmp_path)}) == 2
    take(tmp_path, Images(), 3)


def test_a_read_that_fails_once_replaces_nothing(tmp_path: Path) -> None:
    class Hiccups(Images):
        def __getitem__(self, index: int) -> Tensor:
            self.bad = () if self.bad == (index,) else (index,)
            return super().__getitem__(index)

    assert by_step(take(tmp_path, Hiccups(), 0)) == by_step(take(tmp_path, Images(()), 0))


def test_evaluation_never_replaces_a_sample() -> None:
    part = next(TrainingOrder(LENGTH, LENGTH, LENGTH, Place(0, 1, 0, torch.device("cpu")), 0).steps(0))[0]
    with pytest.raises(
        RunError, match=r"dataset\.eval: sample \d+ can't be read: OSError: image_\d+\.jpg is truncated"
    ):
        Fetcher(Images(), None, 0)[part]


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_of_another_shape_are_named(tmp_path: Path, workers: int) -> None:
    with pytest.raises(RunError, match=r"samples (\d+ and 7|7 and \d+) don't go into one batch: RuntimeError: "):
        take(tmp_path, Uneven(), 5, workers)


@pytest.mark.parametrize(
    ("by", "words"), [("SIGKILL", "out of memory?"), ("SIGBUS", "/dev/shm is full"), ("SIGSEGV", "compiled code")]
)
def test_a_data_loading_process_that_is_killed_is_the_machines_fault(
    tmp_path: Path, by: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        _MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.5,)
    )  # s between looks; torch's 5
    handler = signal.getsignal(signal.SIGCHLD)
    with pytest.raises(MachineError) as caught:
        take(tmp_path, Killed(signal.Signals[by]), 0, workers=2)
    assert re.fullmatch(rf"data loading process \d+ was killed by {by}: .*", str(caught.value))
    assert words in str(caught.value)
    assert signal.getsignal(signal.SIGCHLD) in (handler, signal.SIG_DFL)  # torch's would raise in the middle of a save
    assert multiprocessing.active_children() == []  # though the error's frames still hold torch's iterator


def can_mount() -> bool:
    return (
        subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode == 0
    )


@pytest.mark.skipif(not can_mount(), reason="mounts a small /dev/shm: needs root")
@pytest.mark.parametrize("dataset", ["Images", "Gathered"])
def test_a_full_dev_shm_is_said_and_the_run_does_not_wait_for_ever(tmp_path: Path, dataset: str) -> None:
    program = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from pathlib import Path
import torch
from faults import test_bad_data as theirs
class Large(theirs.{dataset}):
    def __getitem__(self, index):
        return torch.rand(100_000)
if hasattr(Large, "__getitems__"):
    Large.__getitems__ = lambda self, indices: torch.rand(len(indices), 100_000)
try:
    theirs.take(Path({str(tmp_path)!r}), Large(()), 0, workers=1)
except theirs.MachineError as error:
    print(error)
"""
    words = 'mount -t tmpfs -o size=1m none /dev/shm && exec "$@"'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", words, "sh", sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"/dev/shm is full: enlarge it .*No space left on device.*\n", done.stdout)
    assert done.stderr == (
        "/dev/shm has 1 MiB free, and batches pass through it: enlarge it, or set trainer.num_workers=0\n"
    )


# whole runs

THEIRS = """
import os
from pathlib import Path

from fairexp.datasets.digits import Digits


class Scans:
    def __init__(self, split, kill_once=-1, broken=-1):
        self.digits, self.kill_once, self.broken = Digits(split), kill_once, broken

    def __len__(self):
        return len(self.digits)

    def __getitem__(self, index):
        if index == self.broken:
            raise ValueError(f"scan {index} is torn")
        if index == self.kill_once and any(Path("runs").glob("*/checkpoints/step_*")) and not os.path.exists("killed"):
            Path("killed").touch()
            os.kill(os.getpid(), 9)
        return self.digits[index]
"""
RUN = (*TINY, "dataset.train._target_=theirs.Scans", "trainer.num_workers=1", "trainer.eval_every=null")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "theirs.py").write_text(THEIRS)
    return tmp_path


def test_a_run_with_a_bad_sample_fails_in_one_line_and_goes_on_under_another_policy(
    folder: Path, fairexp: Fairexp
) -> None:
    words = ["train", *RUN, "+dataset.train.broken=7", "strategy=ddp", "launcher.num_processes=2"]
    failed = fairexp(*words, cwd=folder)
    assert failed.returncode == 1
    line = r"dataset\.train: sample 7 \(step \d+, epoch 0\) can't be read: ValueError: scan 7 is torn \(theirs\.py:\d+\); mend it"
    assert len(re.findall(line, failed.stderr)) >= 1
    (run,) = (folder / "runs").glob("*-*")
    assert re.match(rf"rank \d: {line}", json.loads((run / "status.json").read_text())["error"])
    assert "Traceback" not in failed.stderr + "".join(log.read_text() for log in (run / "logs").glob("*.log"))
    done = fairexp(*words, "trainer.bad_samples=1", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert json.loads((run / "summary.json").read_text())["bad_samples"] == 1


def test_a_run_whose_data_loading_process_was_killed_once_goes_on_under_a_scheduler(
    folder: Path, fairexp: Fairexp
) -> None:
    words = ["train", "-m", *RUN, "+dataset.train.kill_once=7", "checkpoint.every=5", "seed=0,1", "--follow"]
    done = fairexp(*words, "launcher.num_processes=1", cwd=folder)
    assert done.returncode == 0, done.stderr
    statuses = [json.loads(file.read_text()) for file in (folder / "runs").glob("*/status.json")]
    assert sorted((status["state"], status["attempts"]) for status in statuses) == [("finished", 1), ("finished", 2)]
