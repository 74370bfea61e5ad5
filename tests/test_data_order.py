"""Which sample comes when is a function of the seed alone: the same on any number of ranks and workers, and after any resume."""

import contextlib
import itertools
import multiprocessing
import os
import random
import tracemalloc
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from fairexp.runtime.data import Batches, Fetcher, MicroBatch, evaluation_batches
from fairexp.runtime.dist import Place
from fairexp.runtime.order import EvaluationOrder, Part, TrainingOrder
from fairexp.runtime.packing import copy_stream, packed, to_device, unpacked

torch.set_num_threads(1)

LENGTH, GLOBAL = 65, 12  # six steps an epoch; the last one has five samples, unequal shares of any world
EPOCH = -(-LENGTH // GLOBAL)
worlds = pytest.mark.parametrize("world_size", [1, 2, 3, 4])
micro_batches = pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 5, 12])


def places(world_size: int) -> list[Place]:
    return [Place(rank, world_size, rank, torch.device("cpu")) for rank in range(world_size)]


def order(here: Place, micro_batch_size: int = GLOBAL, seed: int = 0) -> TrainingOrder:
    return TrainingOrder(LENGTH, GLOBAL, micro_batch_size, here, seed)


def steps(world_size: int, micro_batch_size: int, num: int, first: int = 0) -> Iterator[tuple[list[Part], ...]]:
    """The parts of each rank, step by step."""
    ranks = [order(here, micro_batch_size).steps(first) for here in places(world_size)]
    return itertools.islice(zip(*ranks, strict=True), num)


def counted(parts: list[Part]) -> list[int]:
    """The samples of the parts that count, in order."""
    return [index for part in parts for index in part.indices[: part.weight].tolist()]


def global_batches(world_size: int, micro_batch_size: int, num: int, first: int = 0) -> list[list[int]]:
    """The samples of each step, over all ranks."""
    return [[i for parts in ranks for i in counted(parts)] for ranks in steps(world_size, micro_batch_size, num, first)]


@worlds
@micro_batches
def test_the_ranks_of_any_world_share_the_same_global_batches(world_size: int, micro_batch_size: int) -> None:
    whole = global_batches(1, GLOBAL, 2 * EPOCH)
    assert [len(batch) for batch in whole[:EPOCH]] == [12, 12, 12, 12, 12, 5]
    assert global_batches(world_size, micro_batch_size, 2 * EPOCH) == whole


@worlds
@micro_batches
def test_every_sample_is_seen_once_an_epoch(world_size: int, micro_batch_size: int) -> None:
    batches = global_batches(world_size, micro_batch_size, 2 * EPOCH)
    first, second = (list(itertools.chain(*epoch)) for epoch in (batches[:EPOCH], batches[EPOCH:]))
    assert sorted(first) == sorted(second) == list(range(LENGTH))
    assert first != second


@worlds
@micro_batches
def test_all_ranks_pass_equally_often_and_their_shares_add_up(world_size: int, micro_batch_size: int) -> None:
    for ranks in steps(world_size, micro_batch_size, EPOCH):
        assert len({len(parts) for parts in ranks}) == 1, "a rank would wait for the others in a collective"
        parts = list(itertools.chain(*ranks))
        samples = sum(part.weight for part in parts)
        assert [part.share for part in parts] == pytest.approx([part.weight / samples * world_size for part in parts])
        assert all(1 <= len(part.indices) <= micro_batch_size for part in parts), "nothing to pass forward"
        assert all(part.weight in (0, len(part.indices)) for part in parts)


@worlds
@micro_batches
@pytest.mark.parametrize("length", [1, 2, 33, 360])
def test_evaluation_counts_every_sample_once(world_size: int, micro_batch_size: int, length: int) -> None:
    orders = [EvaluationOrder(length, micro_batch_size, here) for here in places(world_size)]
    ranks = [list(order) for order in orders]
    assert sorted(i for parts in ranks for i in counted(parts)) == list(range(length))
    assert len({len(parts) for parts in ranks}) == 1
    again = [counted(list(order)) for order in orders]
    assert again == [counted(parts) for parts in ranks], "each evaluation walks it anew"


def test_the_order_of_an_evaluation_of_any_length_is_there_at_once_and_takes_no_memory() -> None:
    tracemalloc.start()
    parts = itertools.islice(EvaluationOrder(10**12, 3, places(2)[1]), 1000)
    assert [part.indices.tolist() for part in parts] == [list(range(6 * n + 3, 6 * n + 6)) for n in range(1000)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize("first", [1, EPOCH - 1, EPOCH, 3 * EPOCH + 2])
def test_a_resume_goes_on_in_the_same_order(first: int) -> None:
    assert global_batches(2, 3, 8, first) == global_batches(2, 3, first + 8)[first:]
    epochs = [ranks[0][0].epoch for ranks in steps(2, 3, first + 8)]
    assert [ranks[0][0].epoch for ranks in steps(2, 3, 8, first)] == epochs[first:]


def test_another_seed_is_another_order() -> None:
    assert order(places(1)[0], seed=0).permutation(0).tolist() != order(places(1)[0], seed=1).permutation(0).tolist()


# What a rank gets


class Noisy:
    """A plain map-style data set: its samples are random, by each of the three generators that transforms use."""

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> dict[str, Tensor | float]:
        return {"index": index, "torch": torch.rand(3), "numpy": np.random.rand(), "python": random.random()}


def fetch(
    world_size: int, micro_batch_size: int, num: int = EPOCH + 2, first: int = 0, workers: int = 0
) -> list[list[MicroBatch]]:
    """What the ranks get, each in the order of its steps."""
    got = []
    for here in places(world_size):
        batches = Batches(Fetcher(Noisy(), None, 0), order(here, micro_batch_size), here, workers, first)
        got.append([micro for step in itertools.islice(batches, num) for micro in step])
        batches.close()
    return got


def samples(ranks: list[list[MicroBatch]]) -> dict[int, list[list[float]]]:
    """The random numbers of each sample by its index, in the order of the epochs."""
    seen: dict[int, list[list[float]]] = {}
    for micro in itertools.chain(*ranks):
        batch = micro.batch
        numbers = torch.column_stack([batch["torch"].double(), batch["numpy"], batch["python"]])
        for index, row in list(zip(batch["index"].tolist(), numbers.tolist(), strict=True))[: micro.weight]:
            seen.setdefault(index, []).append(row)
    return seen


def same(first: list[list[MicroBatch]], second: list[list[MicroBatch]]) -> bool:
    """Whether all batches are equal, bit for bit."""
    pairs = zip(itertools.chain(*first), itertools.chain(*second), strict=True)
    return all(a.weight == b.weight and all(torch.equal(a.batch[k], b.batch[k]) for k in a.batch) for a, b in pairs)


@worlds
@pytest.mark.parametrize("micro_batch_size", [1, 5])
def test_a_samples_randomness_does_not_depend_on_its_company(world_size: int, micro_batch_size: int) -> None:
    reference = samples(fetch(1, GLOBAL, EPOCH))
    assert len({number for rows in reference.values() for number in rows[0]}) == 5 * LENGTH, (
        "samples share their numbers"
    )
    assert samples(fetch(world_size, micro_batch_size, EPOCH)) == reference


def test_each_epoch_is_random_anew() -> None:
    assert all(first != second for first, second in samples(fetch(1, GLOBAL, 2 * EPOCH)).values())


@pytest.mark.parametrize("world_size", [1, 2])
def test_workers_change_nothing(world_size: int) -> None:
    assert same(fetch(world_size, 5, workers=2), fetch(world_size, 5))
    assert same(fetch(world_size, 5, num=4, first=EPOCH - 2, workers=2), fetch(world_size, 5, num=4, first=EPOCH - 2))


class Gathered(Noisy):
    """The same, a whole batch at once, and in which process."""

    def __getitems__(self, indices: Tensor) -> dict[str, Tensor]:
        return {"index": indices, "process": torch.full_like(indices, os.getpid())}


def test_an_evaluation_reads_in_workers_what_comes_sample_by_sample() -> None:
    class Where(Noisy):
        def __getitem__(self, index: int) -> dict[str, Tensor | float]:
            return super().__getitem__(index) | {"process": os.getpid()}

    here = places(2)[1]
    parts = EvaluationOrder(LENGTH, 4, here)
    got = {num: list(evaluation_batches(Fetcher(Where(), None, 0), parts, here, num)) for num in (0, 2)}
    processes = {
        num: {i for micro in micros for i in micro.batch.pop("process").tolist()} for num, micros in got.items()
    }
    assert processes[0] == {os.getpid()}
    assert len(processes[2] - processes[0]) == 2
    assert same([got[2]], [got[0]])
    assert [micro.weight for micro in got[2]] == [part.weight for part in parts]
    alone = evaluation_batches(Fetcher(Gathered(), None, 0), parts, here, 2)
    assert {i for micro in alone for i in micro.batch["process"].tolist()} == {os.getpid()}
    begun = evaluation_batches(Fetcher(Where(), None, 0), parts, here, 2)
    next(begun)
    before = multiprocessing.active_children()
    begun.close()
    assert len(before) == 2
    assert not multiprocessing.active_children(), "given up, it leaves processes behind"


def test_a_resume_gets_the_same_samples() -> None:
    walked = fetch(1, GLOBAL, EPOCH + 2)[0]
    assert same(fetch(1, GLOBAL, 3, first=EPOCH - 1), [walked[EPOCH - 1 :]])


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_leaves_the_generators_of_the_dropout_masks_alone(
    workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not workers:  # in a process of its own torch seeds them itself
        monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("a device's generator is seeded"))
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    fetch(1, 5, workers=workers)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]


# On the way from a data loading process


class Pair(NamedTuple):
    first: Any
    second: Any


def test_a_batch_comes_out_of_one_piece_of_shared_memory_as_it_went_in() -> None:
    batch = {
        "numbers": torch.arange(12).view(3, 4).T,
        "pair": Pair(torch.rand(3, dtype=torch.float64), [torch.tensor(True), "a text", None]),
        "halves": (torch.rand(5).bfloat16(), torch.empty(0, 7), torch.tensor(2.5)),
        "sparse": torch.eye(2).to_sparse(),
        "ordered": OrderedDict(b=torch.ones(2), a=1),
    }
    sent = packed(batch)
    assert sent.piece.is_shared()
    assert not any(
        isinstance(value, Tensor) for value in (sent.form["numbers"], *sent.form["pair"], *sent.form["halves"])
    )
    got = unpacked(sent)
    assert got.keys() == batch.keys()
    assert type(got["pair"]) is Pair
    assert type(got["ordered"]) is OrderedDict
    assert [*got["ordered"]] == ["b", "a"]
    assert batch["ordered"]["b"] is not got["ordered"]["b"], "the data set's own mapping was changed"
    assert got["pair"].second[1:] == ["a text", None]
    tensors = (
        (got["numbers"], batch["numbers"]),
        (got["pair"].first, batch["pair"].first),
        (got["pair"].second[0], batch["pair"].second[0]),
        *zip(got["halves"], batch["halves"], strict=True),
        (got["sparse"].to_dense(), torch.eye(2)),
    )
    for mine, theirs in tensors:
        assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
        assert torch.equal(mine, theirs)
    assert unpacked(packed("no tensor")) == "no tensor"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_are_whole_though_the_gpu_copies_them_while_it_computes() -> None:
    device, num = torch.device("cuda", 0), 50
    busy = torch.randn(4096, 4096, device=device)
    sums = []
    for number in range(num):
        batch = (torch.full((1 << 20,), float(number)).pin_memory(), {"id": torch.tensor([number]).pin_memory()})
        images, more = to_device(batch, device)
        for _ in range(3):
            busy = busy @ busy / 64.0  # the copy of the next batch is asked for long before this is done
        sums.append(images.mean() + more["id"].sum() + 0.0 * busy[0, 0].isnan())
        del batch, images, more
    assert torch.stack(sums).tolist() == [2.0 * number for number in range(num)]


def test_a_gpu_computes_with_a_batch_once_it_is_copied_and_its_memory_stays_until_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The calls that torch's documentation asks for, in their order; the GPU itself is the test's above."""
    calls: list[str] = []

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait_stream(self, other: "Stream") -> None:
            calls.append(f"{self.name} waits for {other.name}")

    class Moving(Tensor):
        def to(self, device: torch.device, non_blocking: bool) -> Tensor:  # type: ignore[override]
            calls.append(f"copy, blocking: {not non_blocking}")
            return self

        def record_stream(self, stream: Stream) -> None:  # type: ignore[override]
            calls.append(f"memory stays for {stream.name}")

    @contextlib.contextmanager
    def on(stream: Stream) -> Iterator[None]:
        calls.append(f"on {stream.name}")
        yield
        calls.append(f"no longer on {stream.name}")

    copy_stream.cache_clear()
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("copies"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("steps"))
    monkeypatch.setattr(torch.cuda, "stream", on)
    to_device([torch.zeros(2).as_subclass(Moving)], torch.device("cuda", 0))
    copy_stream.cache_clear()
    copy = ["copy, blocking: False", "memory stays for steps"]
    assert calls == ["on copies", *copy, "no longer on copies", "steps waits for copies"]
