"""Token shards as sequences: each token once, documents apart; mixtures exact at every sample; the order of very many samples."""

import ctypes
import json
import mmap
import os
import pickle
import random
import string
import time
import tracemalloc
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fairexp import cli
from fairexp.config.compose import compose
from fairexp.config.rundir import RunDir
from fairexp.datasets.mixture import Mixture, periods, schedule
from fairexp.datasets.permutation import permuted
from fairexp.datasets.tokens import Tokens
from fairexp.datasets.windows import WindowOrder
from fairexp.runtime import order as runtime_order
from fairexp.runtime.bad_samples import BadSamples
from fairexp.runtime.build import Run, build
from fairexp.runtime.data import Batches, Fetcher
from fairexp.runtime.dist import Place
from fairexp.runtime.loop import evaluate, train_step
from fairexp.runtime.order import Computed, TrainingOrder
from fairexp.runtime.preempt import Stop

torch.set_num_threads(1)

END, L = 256, 16
LENGTHS = [(7 * n) % 41 + 1 for n in range(60)]  # bytes; several a row, and several rows
HERE = Place(0, 1, 0, torch.device("cpu"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 documents of letters in shards of 100 tokens, the last of 40."""
    folder = tmp_path_factory.mktemp("tokens")
    documents = [chr(97 + n % 26) * length for n, length in enumerate(LENGTHS)]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": each}) + "\n" for each in documents))
    flags = ["--out", str(folder / "out"), "--valid", "0.0", "--shard-tokens", "100", "--workers", "1"]
    assert cli.main(["prep", str(folder / "a.jsonl"), *flags]) == 0
    return folder / "out"


@pytest.fixture(scope="module")
def stream(root: Path) -> Tensor:
    """All tokens, one after the other."""
    found = np.concatenate([np.fromfile(path, "<u2") for path in sorted(root.glob("train_0*.bin"))])
    assert len(found) == sum(LENGTHS) + len(LENGTHS)
    return torch.from_numpy(found.astype(np.int64))


def damaged(root: Path, copy: Path, **changes: Any) -> Path:
    """A copy whose meta.json says otherwise."""
    copy.mkdir()
    for path in root.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    meta = json.loads((root / "meta.json").read_text())
    (copy / "meta.json").write_text(json.dumps(meta | changes))
    return copy


# One stream


@pytest.mark.parametrize("seq_len", [1, 7, L, 99, 100, 101, 250, 5000])
def test_each_token_is_a_target_once_and_stands_behind_its_input(root: Path, stream: Tensor, seq_len: int) -> None:
    rows = Tokens(root, "train", seq_len)
    batch = rows.__getitems__(torch.arange(len(rows)))
    assert batch.keys() == {"tokens", "targets", "num_bytes"}
    assert {value.dtype for value in batch.values()} == {torch.int64}
    assert batch["tokens"].shape == (len(rows), seq_len)
    counted = batch["targets"] != -100
    assert torch.equal(batch["targets"][counted], stream[1:])
    assert torch.equal(batch["tokens"][counted], stream[:-1])
    assert not counted.flatten()[len(stream) - 1 :].any()
    assert counted.any(1).all(), "a row without a target"
    assert batch["num_bytes"].tolist() == ((batch["targets"] < END) & counted).sum(1).tolist()


def test_a_batch_is_its_samples_in_any_order(root: Path) -> None:
    for flags in ({}, {"mask_documents": True}, {"pack": "documents"}):
        rows = Tokens(root, "train", L, **flags)  # type: ignore[arg-type]
        numbers = torch.tensor([5, 0, len(rows) - 1, 5, 13])
        batch = rows.__getitems__(numbers)
        for place, number in enumerate(numbers.tolist()):
            one = rows[number]
            assert all(torch.equal(batch[key][place], one[key]) for key in batch)
    with pytest.raises(IndexError, match=f"sample {len(rows)} of {len(rows)}"):
        rows.__getitems__([0, len(rows)])


def test_a_rows_documents_are_those_of_its_tokens(root: Path, stream: Tensor) -> None:
    rows = Tokens(root, "train", L, mask_documents=True)
    batch = rows.__getitems__(torch.arange(len(rows)))
    assert batch["documents"].dtype == torch.int32
    of_token = (stream == END).cumsum(0) - (stream == END).long()  # the end token is its document's
    for row in range(len(rows)):
        mine = of_token[row * L : (row + 1) * L]
        assert batch["documents"][row, : len(mine)].tolist() == (mine - mine[0]).tolist()
    assert batch["documents"].max() >= 2


def test_documents_are_found_whatever_their_lengths_empty_ones_too(root: Path, stream: Tensor, tmp_path: Path) -> None:
    splits, chance = json.loads((root / "meta.json").read_text())["splits"], np.random.default_rng(0)
    for trial, seq_len in enumerate([1, 2, 7, L, 99, 100, 101, 250, 5000]):
        cuts = chance.integers(0, len(stream), chance.integers(0, 2 * len(stream)))  # alike, where a document is empty
        ends = np.sort(np.append(cuts, len(stream))).astype("<u8")
        train = splits["train"] | {"documents": len(ends)}
        copy = damaged(root, tmp_path / str(trial), splits=splits | {"train": train})
        ends.tofile(copy / "train_documents.bin")
        rows = Tokens(copy, "train", seq_len, mask_documents=True)
        numbers = chance.integers(0, len(rows), 40)
        numbers[0] = len(rows) - 1
        of_place = np.searchsorted(ends, numbers[:, None] * seq_len + np.arange(seq_len), "right")
        found = rows.__getitems__(torch.from_numpy(numbers))["documents"]
        assert found.dtype == torch.int32
        assert found.tolist() == (of_place - of_place[:, :1]).tolist()


def test_few_shards_are_open_at_once(root: Path, stream: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fairexp.datasets.tokens.MOST_MAPS", 2)
    rows = Tokens(root, "train", L)
    targets = rows.__getitems__(torch.arange(len(rows)))["targets"]
    assert torch.equal(targets[targets != -100], stream[1:])
    assert len(rows.maps) == 2


def test_it_goes_to_another_process_without_what_is_mapped(root: Path) -> None:
    rows = Tokens(root, "train", L, mask_documents=True)
    before = rows.__getitems__([3, 4])
    packed = pickle.dumps(rows)
    assert len(packed) < 10_000
    copy = pickle.loads(packed)
    assert not copy.maps
    assert "document_ends" not in vars(copy)
    after = copy.__getitems__([3, 4])
    assert all(torch.equal(before[key], after[key]) for key in before)


def resident(path: Path) -> np.ndarray:
    """Whether each page of the file is in memory."""
    pages = np.zeros(-(-path.stat().st_size // mmap.PAGESIZE), np.uint8)
    mapped = np.memmap(path, np.uint8, "r")
    there = ctypes.c_void_p(mapped.ctypes.data), ctypes.c_size_t(len(mapped)), ctypes.c_void_p(pages.ctypes.data)
    assert ctypes.CDLL(None).mincore(*there) == 0
    return (pages & 1).astype(bool)


def drop(path: Path) -> None:
    """Its pages leave memory, or the test is skipped: a file system in memory keeps them."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if resident(path).any():
        pytest.skip("this file system doesn't drop what it holds in memory")


SEQ_LEN = 1000


@pytest.fixture
def on_disk(tmp_path: Path) -> tuple[Path, list[Path]]:
    """Token shards that aren't in memory, and the two files: 3,000,000 and 1,000,000 tokens."""
    (tmp_path / "a.txt").write_text(f"{'a' * 79}\n" * 50_000)
    flags = ["--out", str(tmp_path / "out"), "--split-on", "\n", "--valid", "0", "--shard-tokens", "3000000"]
    assert cli.main(["prep", str(tmp_path / "a.txt"), *flags, "--workers", "1"]) == 0
    files = [tmp_path / "out" / f"train_0000{number}.bin" for number in (0, 1)]
    for file in files:
        drop(file)
    return tmp_path / "out", files


def only_these_come(files: list[Path], begins: list[int], size: int) -> bool:
    """Whether within 5 s the pages of so many bytes from these places of both files on are in memory, and no others."""
    wanted = [np.zeros(len(resident(file)), bool) for file in files]
    for begin in begins:
        number, at = divmod(begin, 6_000_000)
        wanted[number][at // mmap.PAGESIZE : (at + size - 1) // mmap.PAGESIZE + 1] = True
    until = time.monotonic() + 5
    while time.monotonic() < until:
        if all((resident(file) == pages).all() for file, pages in zip(files, wanted, strict=True)):
            return True
    return False


def test_rows_on_a_disk_are_asked_for_all_at_once_and_rows_in_memory_are_not(
    on_disk: tuple[Path, list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, files = on_disk
    asked, ask_for, numbers = [], Tokens.ask_for, torch.arange(3, 3990, 400)

    def noted(self: Tokens, *words: Any) -> None:
        ask_for(self, *words)
        begins = (2 * SEQ_LEN * numbers).tolist()
        asked.append(only_these_come(files, begins, 2 * SEQ_LEN + 2))

    monkeypatch.setattr(Tokens, "ask_for", noted)
    rows = Tokens(root, "train", SEQ_LEN)
    batch = rows.__getitems__(numbers)
    assert asked == [True]
    monkeypatch.setattr(Tokens, "ask_for", lambda self, *words: asked.append(True))
    for _ in range(5):  # what a process reads elsewhere has it ask once more, and no longer
        again = rows.__getitems__(numbers)
    assert all(torch.equal(batch[key], again[key]) for key in batch)
    assert len(asked) < 4


@pytest.mark.parametrize("pack", ["stream", "documents"])
def test_who_looks_at_an_order_by_windows_has_its_blocks_read_and_those_of_the_next(
    on_disk: tuple[Path, list[Path]], pack: Any
) -> None:
    root, files = on_disk
    rows = Tokens(root, "train", SEQ_LEN, pack=pack, window=2)
    rows.block //= 16  # 64 KiB
    order = rows.permutation(torch.Generator().manual_seed(1))
    assert order is not None
    order[5:6]
    firsts = [*order.begins(0), *order.begins(1)]
    assert len(firsts) == 4
    row_bytes = 2 * SEQ_LEN if pack == "stream" else 2 * 80
    assert only_these_come(files, [int(first) * row_bytes for first in firsts], rows.block * row_bytes)


# Document by document


def test_a_row_is_a_document_from_its_beginning_padded_or_cut(root: Path) -> None:
    rows = Tokens(root, "train", L, pack="documents")
    assert len(rows) == 60
    batch = rows.__getitems__(torch.arange(60))
    for number, length in enumerate(LENGTHS):
        expected = [END, *[97 + number % 26] * length, END]
        tokens, targets = batch["tokens"][number].tolist(), batch["targets"][number].tolist()
        seen = min(length + 1, L)
        assert tokens[:seen] == expected[:seen]
        assert targets == expected[1 : L + 1] + [-100] * (L - seen)
        assert batch["num_bytes"][number] == min(length, L)


# What is wrong with the files


def test_what_is_wrong_is_said_in_one_line(root: Path, tmp_path: Path) -> None:
    def says(message: str, folder: Path = root, **flags: Any) -> None:
        with pytest.raises(ValueError, match=message) as caught:
            Tokens(folder, **({"split": "train", "seq_len": L} | flags))
        assert "\n" not in str(caught.value)

    says("its valid split is empty", split="valid")
    says("split='test': .* has train and valid", split="test")
    says("vocab_size=50257, but .* was made with 257", vocab_size=50257)
    says("tokenizer=abc, but .* was made with bytes", tokenizer="abc")
    says("pack='rows': takes stream or documents", pack="rows")
    says("`fairexp prep FILES --out .*/none` makes token shards", tmp_path / "none")
    (tmp_path / "half.partial").mkdir()
    says("it isn't whole yet, the same `fairexp prep` command goes on", tmp_path / "half")
    splits = json.loads((root / "meta.json").read_text())["splits"]
    for number, changes in enumerate(
        [
            {"vocab_size": "many"},
            {"vocab_size": -1},
            {"end_of_document": 257},
            {"dtype": "float64"},
            {"splits": {"train": {}}},
            {"splits": splits | {"train": splits["train"] | {"tokens": splits["train"]["tokens"] + 1}}},
            {"splits": []},
            {"token_bytes": {"file": "/etc/passwd", "sha256": ""}},
            {"token_bytes": {"file": "../out/token_bytes.bin", "sha256": ""}},
        ]
    ):
        says("meta.json: can't be what `fairexp prep` wrote", damaged(root, tmp_path / str(number), **changes))
    says("written in format 2, this fairexp's is 1", damaged(root, tmp_path / "later", format=2))
    ends = damaged(root, tmp_path / "ends")
    np.ones(257, "<u2").tofile(ends / "token_bytes.bin")
    says("its end token stands for text", ends)
    short = damaged(root, tmp_path / "short")
    os.truncate(short / "train_00003.bin", 50)
    says("train_00003.bin: damaged: has 50 bytes of 200", short)
    (short / "train_00003.bin").unlink()
    says("train_00003.bin: is missing", short)
    (short / "meta.json").write_text("{")
    says("meta.json: damaged: not JSON", short)


def test_a_token_that_cannot_be_and_a_changed_byte_are_found(root: Path, tmp_path: Path) -> None:
    copy = damaged(root, tmp_path / "copy")
    Tokens(copy, "train", L).verify()
    values = np.fromfile(copy / "train_00001.bin", "<u2")
    values[5] = 300
    values.tofile(copy / "train_00001.bin")
    rows = Tokens(copy, "train", L)
    with pytest.raises(ValueError, match="a token is 300, and there are 257; the shards are damaged"):
        rows.__getitems__(torch.arange(len(rows)))
    with pytest.raises(ValueError, match=r"train_00001\.bin: damaged: its digest differs"):
        rows.verify()


def test_documents_that_do_not_end_one_after_the_other_are_told(root: Path, tmp_path: Path) -> None:
    copy = damaged(root, tmp_path / "copy")
    ends = np.fromfile(copy / "train_documents.bin", "<u8")
    for bad in (ends[::-1], np.where(np.arange(60) == 30, 2**63, ends)):
        bad.astype("<u8").tofile(copy / "train_documents.bin")
        by_windows = Tokens(copy, "train", L, pack="documents", window=2)
        by_windows.block = 4
        by_windows.ask_for_blocks(np.arange(60))  # which is no place to find that out
        rows = Tokens(copy, "train", 250, mask_documents=True)
        with pytest.raises(ValueError, match=r"train_documents\.bin: damaged: its documents don't end one after"):
            rows.__getitems__(torch.arange(len(rows)))


# Mixtures


class Numbers:
    """Samples that say whose they are."""

    def __init__(self, name: int, length: int, **attributes: Any):
        self.name, self.length = name, length
        self.__dict__ |= attributes

    def __len__(self) -> int:
        return self.length

    def __getitems__(self, indices: Tensor) -> dict[str, Tensor]:
        return {"of": torch.full((len(indices),), self.name), "index": indices}


@pytest.mark.parametrize(
    "weights",
    [(1,), (0.7, 0.2, 0.1), (2, 1), (1, 1, 1), (0.9, 0.05, 0.05), (0.31, 0.07, 0.2, 0.42), (1e-6, 1, 0.123456)],
)
def test_a_mixture_is_less_than_a_sample_off_at_any_moment(weights: tuple[float, ...]) -> None:
    shares = periods(weights)
    period = sum(shares)
    set_at, before = schedule(shares)
    moments = np.arange(1, period + 1)
    for number, share in enumerate(shares):
        drawn = np.cumsum(set_at == number)
        assert np.abs(drawn * period - moments * share).max() < period
        assert before[set_at == number].tolist() == list(range(share))
        exact = Fraction(str(weights[number])) / sum(Fraction(str(weight)) for weight in weights)
        assert abs(Fraction(share, period) - exact) <= (0 if period < 65_536 else Fraction(1, 65_536))


def test_a_mixtures_sets_are_walked_through_each_time_in_another_order() -> None:
    mixture = Mixture([Numbers(0, 10), Numbers(1, 1000)], [0.25, 0.75])
    assert len(mixture) == 1334  # 1,000 of the second, and the first 33 times
    batch = mixture.__getitems__(torch.arange(len(mixture)))
    small = batch["index"][batch["of"] == 0][:330].view(-1, 10)
    assert (small.sort(1).values == torch.arange(10)).all()
    assert len({tuple(walk) for walk in small.tolist()}) > 30
    assert sorted(batch["index"][batch["of"] == 1][:1000].tolist()) == list(range(1000))
    some = torch.tensor([1000, 3, 77, 3])
    got = mixture.__getitems__(some)
    assert all(torch.equal(got[key], batch[key][some]) for key in batch)
    other = Mixture([Numbers(0, 10), Numbers(1, 1000)], [0.25, 0.75], seed=1).__getitems__(torch.arange(100))
    assert not torch.equal(other["index"], batch["index"][:100])


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders of token shards: a of small letters, b of capitals."""
    folder, letters = tmp_path_factory.mktemp("mixed"), random.Random(0)
    for name, alphabet, documents in (("a", string.ascii_lowercase, 60), ("b", string.ascii_uppercase, 25)):
        texts = ["".join(letters.choices(alphabet, k=L)) for _ in range(documents)]
        (folder / f"{name}.txt").write_text("\n".join(texts))
        flags = ["--out", str(folder / name), "--split-on", "\n", "--valid", "0.2", "--workers", "1"]
        assert cli.main(["prep", str(folder / f"{name}.txt"), *flags]) == 0
    return folder


def mixed_run(folder: Path, work: Path) -> Run:
    """What one process holds of a run on both, 7 to 3, by the config dataset=token_mixture."""
    (work / "logs").mkdir()
    config = compose(
        [
            *("model=transformer", "model.width=8", "model.depth=1", "model.hidden=8", "model.num_heads=2"),
            *("task=next_token", "dataset=token_mixture", f"dataset.roots=[{folder}/a,{folder}/b]"),
            *("dataset.weights=[0.7,0.3]", "dataset.vocab_size=257", f"dataset.seq_len={L}", "tracker=none"),
            *("trainer.device=cpu", "trainer.global_batch_size=9", "trainer.max_steps=6"),
        ]
    ).config
    return build(RunDir(work), config, HERE, Stop())


def test_a_run_on_a_mixture_keeps_its_proportions_and_goes_on_where_an_epoch_ends(mixed: Path, tmp_path: Path) -> None:
    run = mixed_run(mixed, tmp_path)
    sets = [Tokens(mixed / name, "train", L) for name in "ab"]
    whose = {
        tuple(row): (number, index)
        for number, rows in enumerate(sets)
        for index, row in enumerate(rows.__getitems__(torch.arange(len(rows)))["tokens"].tolist())
    }
    length, per_epoch = run.training.length, run.training.steps_per_epoch
    assert length == max(-(-len(sets[0]) * 10 // 7), -(-len(sets[1]) * 10 // 3))

    def seen(first: int, num: int, world_size: int = 1) -> list[tuple[int, int]]:
        given, ranks = run.training, []
        for rank in range(world_size):
            here = Place(rank, world_size, rank, HERE.device)
            order = TrainingOrder(length, 9, 4, here, given.seed, given.shuffle, run.fetch_training.dataset)
            ranks.append(islice(Batches(run.fetch_training, order, here, 0, first), num))
        micros = [micro for step in zip(*ranks, strict=True) for micros in step for micro in micros]
        return [whose[tuple(row)] for micro in micros for row in micro.batch["tokens"][: micro.weight].tolist()]

    epochs = 4
    samples = seen(0, epochs * per_epoch)
    assert len(samples) == epochs * length
    of_a = np.cumsum([number == 0 for number, _ in samples])
    assert np.abs(of_a * 10 - 7 * np.arange(1, len(samples) + 1)).max() < 10, "a whole sample off"
    for number, rows in enumerate(sets):
        drawn = [index for other, index in samples if other == number]
        walks = [tuple(drawn[at : at + len(rows)]) for at in range(0, len(drawn) - len(rows) + 1, len(rows))]
        assert len(walks) >= 4 - number
        assert all(sorted(walk) == list(range(len(rows))) for walk in walks), "not all before any comes again"
        assert len(set(walks)) == len(walks), "an order has come again"
    assert samples[:length] != samples[length : 2 * length]
    assert seen(per_epoch + 2, per_epoch) == seen(0, 2 * per_epoch + 2)[length + 18 :]
    assert seen(0, epochs * per_epoch, world_size=2) == samples

    for micros in islice(Batches(run.fetch_training, run.training, HERE, 0, 0), 6):
        train_step(run, micros, wants_norm=False)
    first, again = evaluate(run), evaluate(run)
    assert first == again
    assert 0 < first["bits_per_byte"] < 9


def test_what_cannot_be_mixed_is_told() -> None:
    for message, sets, weights in (
        ("weights: 1 for 2 sets", [Numbers(0, 1), Numbers(1, 1)], [1]),
        ("weights: takes numbers above 0, got 0", [Numbers(0, 1)], [0]),
        ("sets: number 1 is empty", [Numbers(0, 1), Numbers(1, 0)], [1, 1]),
        ("their vocab_size differ: 3 and 4", [Numbers(0, 1, vocab_size=3), Numbers(1, 1, vocab_size=4)], [1, 1]),
    ):
        with pytest.raises(ValueError, match=message):
            Mixture(sets, weights)  # type: ignore[arg-type]
    plain, more = Numbers(0, 5), Numbers(1, 5)
    more.__getitems__ = lambda indices: plain.__getitems__(indices) | {"more": indices}  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="sets: not all give more"):
        Mixture([plain, more], [1, 1]).__getitems__(torch.arange(4))


def test_a_mixtures_fingerprint_is_of_all_that_its_order_follows_from() -> None:
    def fingerprint(weights: Any = (1, 2), length: int | None = None, seed: int = 0, tokens: int = 5) -> frozenset[Any]:
        sets = [Numbers(0, 5, fingerprint={"tokens": tokens}), Numbers(1, 5, fingerprint={"tokens": 5})]
        return frozenset(Mixture(sets, weights, length, seed).fingerprint.items())

    assert fingerprint() == fingerprint((0.5, 1))
    others = [fingerprint((2, 1)), fingerprint(length=99), fingerprint(seed=1), fingerprint(tokens=6)]
    assert len({fingerprint(), *others}) == 5


# The order of very many samples


@pytest.mark.parametrize("length", [1, 2, 3, 10, 97, 1000, 4096, 70_001])
def test_a_computed_order_has_each_sample_once(length: int) -> None:
    one, two = (permuted(np.arange(length), length, seed) for seed in (1, 2))
    assert sorted(one.tolist()) == sorted(two.tolist()) == list(range(length))
    if length > 20:
        assert (one == two).mean() < 0.2
        assert abs(np.corrcoef(np.arange(length), one)[0, 1]) < 4 / length**0.5
    if length >= 1000:
        side = -(-length // int(np.ceil(length**0.5)))
        for lag in (1, side):
            for part in (one % side, one // side):
                steps = np.bincount((part[lag:] - part[:-lag]) % side)
                assert steps.max() < 3 * steps.mean(), "places that far apart keep their distance"


def test_a_computed_order_is_the_same_in_any_slices() -> None:
    length = 3 * runtime_order.CHUNK + 100
    order = Computed(length, 5)
    whole = torch.from_numpy(permuted(np.arange(length), length, 5))
    for begin, end in (
        (0, 10),
        (runtime_order.CHUNK - 5, runtime_order.CHUNK + 5),
        (7, 2 * runtime_order.CHUNK + 9),
        (length - 3, length + 50),
        (4, 4),
    ):
        assert torch.equal(order[begin:end], whole[begin:end])
    assert Computed(length, None)[5:8].tolist() == [5, 6, 7]
    assert torch.equal(
        Computed(length, 5, first=length)[7 : runtime_order.CHUNK + 5], whole[7 : runtime_order.CHUNK + 5] + length
    )


def test_ranks_and_resumes_share_one_computed_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime_order, "MOST_IN_MEMORY", 50)

    def batches(world_size: int, first: int) -> list[list[int]]:
        places = [Place(rank, world_size, rank, torch.device("cpu")) for rank in range(world_size)]
        ranks = [TrainingOrder(65, 12, 5, here, seed=0).steps(first) for here in places]
        steps = islice(zip(*ranks, strict=True), 14 - first)
        return [[i for parts in step for part in parts for i in part.indices[: part.weight].tolist()] for step in steps]

    whole = batches(1, 0)
    assert sorted(i for batch in whole[:6] for i in batch) == sorted(i for batch in whole[6:12] for i in batch)
    assert sorted(i for batch in whole[:6] for i in batch) == list(range(65))
    assert whole[:6] != whole[6:12]
    assert batches(3, 0) == whole
    assert batches(2, 8) == whole[8:]
    order = TrainingOrder(65, 12, 5, HERE, seed=0)
    assert order.samples(7)[1] == [whole[7]]


def test_a_resume_at_step_100_000_of_a_billion_samples_costs_what_one_at_10_does() -> None:
    def seconds(first: int) -> float:
        began = time.perf_counter()
        ((part,),) = islice(TrainingOrder(10**9, 1024, 1024, HERE, seed=0).steps(first), 1)
        assert len(part.indices) == 1024
        return time.perf_counter() - began

    seconds(0)
    early, late = min(seconds(10) for _ in range(5)), min(seconds(100_000) for _ in range(5))
    assert late < 3 * early < 3


@pytest.mark.parametrize("window", [1, 2, 7, 1000])
@pytest.mark.parametrize("block", [1, 5, 64])
@pytest.mark.parametrize("length", [1, 2, 4, 5, 63, 64, 65, 1000])
def test_an_order_by_windows_has_each_row_once_and_so_many_blocks_at_a_time(
    length: int, block: int, window: int
) -> None:
    def order(seed: int) -> WindowOrder:
        return WindowOrder(length, block, window, torch.Generator().manual_seed(seed))

    whole = order(0)[:].tolist()
    assert sorted(whole) == list(range(length))
    assert len(order(0)) == length
    for begin in {0, length // 3, length - 1}:  # none has looked at what is before
        assert order(0)[begin : begin + 3 * block].tolist() == whole[begin : begin + 3 * block]
    assert order(0)[length // 2 : length // 2].tolist() == []
    for first in range(0, length, block * window):
        rows = set(whole[first : first + block * window])
        assert sum((row - 1) % length not in rows for row in rows) <= window, "more blocks than a window has"
    if length >= 1000:
        others = [order(seed)[:].tolist() for seed in (1, 2)]
        assert all(np.equal(whole, other).mean() < 0.1 for other in others), "the epochs are alike"
        if length % block:
            rests = {tuple(sorted(each[-(length % block) :])) for each in (whole, *others)}
            assert len(rests) == 3, "the same rows are the rest each time"
        if 1 < block < length / window:
            steps = np.abs(np.diff(whole[: block * window]))
            assert (steps == 1).mean() < 0.3, "a window's rows aren't shuffled"
        if length > 10 * (size := block * window) > 40:
            windows = np.array(whole[: length // size * size]).reshape(-1, size)
            steps = np.diff(windows.min(1))
            assert (abs(steps) <= size).mean() < 0.5, "the blocks aren't shuffled"
            assert len(np.unique(windows.argsort(1), axis=0)) > 10, "the windows are shuffled alike"


def test_an_order_by_windows_of_a_million_million_rows_needs_a_windows_memory() -> None:
    tracemalloc.start()
    order = WindowOrder(10**12, 512, 64, torch.Generator().manual_seed(0))
    for begin in (0, 5 * 10**11 + 7, 10**12 - 1000):
        assert len(order[begin : begin + 1000].unique()) == 1000
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 8 << 20


def test_a_window_is_the_training_order_and_no_window_changes_nothing(root: Path) -> None:
    def epoch(number: int, **flags: Any) -> list[int]:
        rows = Tokens(root, "train", L, **flags)
        rows.block = 4
        return TrainingOrder(len(rows), 8, 8, HERE, 0, dataset=rows).permutation(number)[:].tolist()

    length = len(Tokens(root, "train", L))
    plain = TrainingOrder(length, 8, 8, HERE, 0).permutation(0)[:].tolist()
    assert epoch(0) == plain
    assert epoch(0, window=2) != plain
    assert sorted(epoch(0, window=2)) == list(range(length))
    assert epoch(0, window=2) != epoch(1, window=2)
    assert len({row // 4 for row in epoch(0, window=1)[:4]}) <= 2
    for pack, row_bytes in (("stream", 2 * L), ("documents", 2 * (1 + sum(LENGTHS) / len(LENGTHS)))):
        block = Tokens(root, "train", L, pack=pack).block  # type: ignore[arg-type]
        assert block * row_bytes == pytest.approx(1 << 20, rel=0.02)
    with pytest.raises(ValueError, match="window=0: takes 1 or more blocks, or null"):
        Tokens(root, "train", L, window=0)


def test_without_a_shuffle_the_samples_come_as_they_are() -> None:
    steps = islice(TrainingOrder(10, 4, 4, HERE, seed=0, shuffle=False).steps(0), 4)
    assert [part.indices.tolist() for (part,) in steps] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9], [0, 1, 2, 3]]


class Endless:
    """A plain set of one sample at a time, with others in each epoch; number 14 can't be read."""

    endless = True

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> int:
        if index == 14:
            raise OSError("gone")
        return index


def test_an_endless_set_gives_the_next_samples_each_epoch_shuffled_within_it_or_not(tmp_path: Path) -> None:
    for shuffle in (False, True):
        order = TrainingOrder(10, 4, 4, HERE, seed=0, shuffle=shuffle, dataset=Endless())
        fetcher = Fetcher(Endless(), None, 0, BadSamples(tmp_path, 0, most=9))
        epochs = [[i for (part,) in islice(order.steps(3 * n), 3) for i in fetcher[part].tolist()] for n in range(3)]
        there = [list(range(10 * n, 10 * n + 10)) for n in range(3)]
        there[1][4] = 15  # in the bad one's place
        assert [sorted(epoch) for epoch in epochs] == there
        assert (epochs == there) is not shuffle
