"""The order of samples, over every data source: the same samples in the same global batches for any number of ranks and data
loading processes, and across interruptions that change both. In one process, so without collectives; one test launches."""

import hashlib
import io
import itertools
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import Fairexp
from PIL import Image
from torch import Tensor

from fairexp import cli
from fairexp.datasets.augment import RandomAffine
from fairexp.datasets.digits import Digits
from fairexp.datasets.huggingface import HuggingFaceImages, HuggingFaceRows
from fairexp.datasets.image_folder import ImageFolder
from fairexp.datasets.json_lines import JSONLines
from fairexp.datasets.mixture import Mixture
from fairexp.datasets.parquet import ParquetImages, ParquetRows
from fairexp.datasets.tar_shards import TarImages
from fairexp.datasets.tokens import Tokens
from fairexp.runtime.data import Batches, Fetcher
from fairexp.runtime.dist import Place
from fairexp.runtime.order import TrainingOrder, endless

datasets = pytest.importorskip("datasets")
torch.set_num_threads(1)

BATCHES = 96
LENGTH, GLOBAL, MICRO = 41, 7, 2  # six steps an epoch, the last of six samples; shares that differ between ranks
Ways = Sequence[tuple[int, int]]  # (world size, data loading processes)
EVERY_WAY: Ways = list(itertools.product([1, 2, 3, 4], [0, 2, 4]))
SOME: Ways = [(1, 0), (2, 2), (3, 0), (1, 4), (4, 0)]  # of which few are started: that is what takes time


def picture(number: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (6 + number % 5, 6), (number, 255 - number, 128)).save(out, "PNG")
    return out.getvalue()


def digits(root: Path) -> Any:
    return Digits("test")


def image_folder(root: Path) -> Any:
    for number in range(LENGTH):
        folder = root / "train" / f"{number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.png").write_bytes(picture(number))
    return ImageFolder(root, "train", 4, 3, augment=True)


def tar(root: Path, **more: Any) -> Any:
    for shard, numbers in enumerate([range(0, 15), range(15, 20), range(20, LENGTH)]):
        with tarfile.open(root / f"{shard}.tar", "w") as file:
            for number in numbers:
                for suffix, data in (("png", picture(number)), ("cls", str(number).encode())):
                    info = tarfile.TarInfo(f"{number}.{suffix}")
                    info.size = len(data)
                    file.addfile(info, io.BytesIO(data))
    return TarImages(root, "*.tar", "cls", 4, LENGTH, augment=True, **more)


def tar_windows(root: Path) -> Any:
    return tar(root, window=2)


def parquet_images(root: Path) -> Any:
    table = pa.table({"image": [picture(number) for number in range(LENGTH)], "label": range(LENGTH)})
    pq.write_table(table, root / "a.parquet", row_group_size=5)
    return ParquetImages(root, "a.parquet", ["image", "label"], 4, LENGTH, augment=True, window=3)


def rows() -> list[dict[str, Any]]:
    return [{"id": i, "tokens": [i, i * i], "text": f"é{i}"} for i in range(LENGTH)]


def parquet_rows(root: Path) -> Any:
    pq.write_table(pa.Table.from_pylist(rows()), root / "a.parquet", row_group_size=4)
    return ParquetRows(root, "a.parquet", {"a": "id", "b": "tokens"}, window=2)


def json_lines(root: Path) -> Any:
    for name, some in (("a", rows()[:30]), ("b", rows()[30:])):
        (root / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in some))
    return JSONLines(root, "*.jsonl", ["id", "tokens"])


def hugging_face_rows(root: Path) -> Any:
    datasets.Dataset.from_list(rows()).save_to_disk(root / "saved", num_shards=2)
    return HuggingFaceRows(root / "saved", None, None, {"a": "id", "b": "tokens"})


def hugging_face_images(root: Path) -> Any:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    images = [{"bytes": picture(number), "path": None} for number in range(LENGTH)]
    data = datasets.Dataset.from_dict({"image": images, "label": list(range(LENGTH))}, features=features)
    data.save_to_disk(root / "saved")
    return HuggingFaceImages(root / "saved", None, None, ["image", "label"], 4, LENGTH, augment=True)


def shards(folder: Path, letter: str) -> Path:
    """Token shards of some 70 documents of other lengths, in files of 300 tokens; `letter` is in no other's."""
    lines = [f"{letter}{number}:{number**5 % 10 ** (number % 9 + 1)}" for number in range(70)]
    (folder / f"{letter}.txt").write_text("\n".join(lines))
    flags = ("--split-on", "\n", "--valid", "0", "--shard-tokens", "300", "--workers", "1")
    assert cli.main(["prep", f"{folder / letter}.txt", *flags, "--out", f"{folder / letter}"]) == 0
    return folder / letter


def tokens(root: Path) -> Any:
    return Tokens(shards(root, "t"), "train", seq_len=12, mask_documents=True)


def token_windows(root: Path) -> Any:
    data = Tokens(shards(root, "t"), "train", seq_len=12, mask_documents=True, window=3)
    data.block = 5
    return data


def token_documents(root: Path) -> Any:
    return Tokens(shards(root, "t"), "train", seq_len=12, pack="documents")


def token_mixture(root: Path) -> Any:
    sets = [Tokens(shards(root, letter), "train", seq_len=12, mask_documents=True) for letter in "abc"]
    return Mixture(sets, [0.5, 0.3, 0.2])


SOURCES: list[Callable[[Path], Any]] = [
    digits,
    tokens,
    token_windows,
    token_documents,
    token_mixture,
    image_folder,
    tar,
    tar_windows,
    parquet_images,
    parquet_rows,
    json_lines,
    hugging_face_rows,
    hugging_face_images,
]


def samples(batch: Any, count: int) -> Iterator[str]:
    """What identifies each sample of a batch: all bits of it, with its augmentation."""
    tensors = batch.values() if isinstance(batch, dict) else batch
    for number in range(count):
        bits = b"".join(tensor[number].numpy().tobytes() for tensor in tensors if isinstance(tensor, Tensor))
        yield hashlib.sha256(bits).hexdigest()[:16]


def global_batches(data: Any, world_size: int, workers: int, first: int, last: int) -> list[list[str]]:
    """The samples of each step from first to last, over all ranks."""
    got: list[list[str]] = [[] for _ in range(last - first)]
    augment = RandomAffine(degrees=10) if isinstance(data, Digits) else None
    for rank in range(world_size):
        here = Place(rank, world_size, rank, torch.device("cpu"))
        order = TrainingOrder(len(data), GLOBAL, MICRO, here, 0, shuffle=not endless(data), dataset=data)
        batches = Batches(Fetcher(data, augment, 0), order, here, workers, first)
        for step, micro_batches in zip(got, batches, strict=False):
            step += [sample for micro in micro_batches for sample in samples(micro.batch, micro.weight)]
        batches.close()
    return got


def interrupted(data: Any, num: int, ways: Ways) -> list[list[str]]:
    """The same steps in turns of these ways, each going on where the one before was interrupted."""
    bounds = [num * turn // len(ways) for turn in range(len(ways) + 1)]
    turns = zip(ways, bounds[:-1], bounds[1:], strict=True)
    return [
        batch for (world, workers), first, last in turns for batch in global_batches(data, world, workers, first, last)
    ]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    datasets.disable_progress_bars()


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more processes than this machine has cores
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.__name__)
def test_every_source_keeps_its_order(source: Callable[[Path], Any], tmp_path: Path) -> None:
    data = source(tmp_path)
    uninterrupted = global_batches(data, 1, 0, 0, BATCHES)
    assert interrupted(data, BATCHES, EVERY_WAY if source is json_lines else SOME) == uninterrupted
    epoch = -(-len(data) // GLOBAL)
    firsts, seconds = uninterrupted[:epoch], uninterrupted[epoch : 2 * epoch]
    assert [len(batch) for batch in firsts] == [GLOBAL] * (epoch - 1) + [len(data) - GLOBAL * (epoch - 1)]
    assert firsts != seconds
    if not endless(data):  # a mixture repeats the samples of its smaller sets
        assert len(set(itertools.chain(*firsts))) == len(data), "a sample is missing, or two are alike"


NOTED = """
import os, signal

from fairexp.datasets.tar_shards import TarImages

class Noted(TarImages):
    read = 0

    def __getitem__(self, index):
        if self.read == int(os.environ["DIES_AFTER"]):
            os.kill(os.getpid(), signal.SIGKILL)
        self.read += 1
        with open(f"{os.environ['FAIREXP_ATTEMPT']}_{os.environ['RANK']}", "a") as out:
            out.write(f"{index} ")
        return super().__getitem__(index)
"""


def test_a_launched_run_reads_the_data_sets_own_order_on_two_and_then_on_three_ranks(
    fairexp: Fairexp, tmp_path: Path
) -> None:
    data = tar_windows(tmp_path)
    (tmp_path / "noted.py").write_text(NOTED)
    target = ("dataset=tar_images", "dataset.expects=[]", "dataset.train._target_=noted.Noted")
    words = [
        *(
            *target,
            "dataset.root=.",
            "dataset.train.shards=*.tar",
            "dataset.train.window=2",
            "dataset.eval.shards=*.tar",
        ),
        *(f"dataset.num_classes={LENGTH}", "dataset.image_size=4", "model=mlp", "model.hidden=[4]", "strategy=ddp"),
        *(
            "trainer.global_batch_size=6",
            "trainer.max_steps=8",
            "trainer.max_epochs=null",
            "trainer.device=cpu",
        ),
        *("trainer.eval_every=null", "trainer.num_workers=0", "checkpoint.every=4", "checkpoint.background=false"),
        *("tracker=none", "launcher.threads_per_process=1", "schedule.warmup=0"),
    ]
    first_four = [share(data, rank, 2, 0, 4) for rank in range(2)]
    died = fairexp(
        "train", *words, "launcher.num_processes=2", cwd=tmp_path, env={"DIES_AFTER": f"{len(first_four[0])}"}
    )
    assert died.returncode == 1, died.stderr
    done = fairexp("train", *words, "launcher.num_processes=3", cwd=tmp_path, env={"DIES_AFTER": "-1"})
    assert done.returncode == 0, done.stderr

    def read(attempt: int, rank: int) -> list[int]:
        return [int(word) for word in (tmp_path / f"{attempt}_{rank}").read_text().split()]

    assert read(1, 0) == first_four[0]
    assert read(1, 1)[: len(first_four[1])] == first_four[1]
    assert [read(2, rank) for rank in range(3)] == [share(data, rank, 3, 4, 8) for rank in range(3)]


def share(data: Any, rank: int, world_size: int, first: int, last: int) -> list[int]:
    """The samples that a rank reads from step first to last."""
    order = TrainingOrder(LENGTH, 6, 6, Place(rank, world_size, rank, torch.device("cpu")), 0, dataset=data)
    return [
        i
        for parts in itertools.islice(order.steps(first), last - first)
        for part in parts
        for i in part.indices.tolist()
    ]
