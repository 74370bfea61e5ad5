"""One reader of one data source in a process of its own: `python readers.py FOLDER SOURCE READER WORKERS AT SECONDS`, which
prints a line of JSON. fairexp's readers go through what a run goes through, `Batches`; the others through what their
documentation shows.

Every reader gives shuffled batches of the same tensors; images are decoded by the same function.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

BATCH = {"small": 256, "tokens": 32, "images": 64, "rows": 256}
SEQ_LEN = 512
SIZE, NUM_CLASSES = 64, 10  # of the images

Reader = Callable[[Path, int, float], Iterator[Any]]  # folder, processes, part of an epoch -> the batches from there on
READERS: dict[tuple[str, str], Reader] = {}


def reads(source: str, name: str) -> Callable[[Reader], Reader]:
    """Enters a function as the reader of that name."""

    def enter(function: Reader) -> Reader:
        READERS[source, name] = function
        return function

    return enter


# What is read


class Small:
    """Pictures of 28 x 28 bytes in memory, and their classes, one at a time."""

    def __init__(self, folder: Path) -> None:
        import numpy as np
        import torch

        self.images = torch.from_numpy(np.load(folder / "images.npy"))
        self.labels = torch.from_numpy(np.load(folder / "labels.npy"))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Any:
        return self.images[index], self.labels[index]


class SmallBatches(Small):
    """The same, a batch at a time."""

    def __getitems__(self, indices: Any) -> Any:
        return self.images.index_select(0, indices), self.labels.index_select(0, indices)


class Rows:
    """Rows of SEQ_LEN tokens and their targets in one mapped file."""

    def __init__(self, file: Path) -> None:
        import numpy as np

        self.tokens = np.memmap(file, np.uint16, "r")

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // SEQ_LEN

    def __getitem__(self, index: int) -> dict[str, Any]:
        return inputs(self.tokens[index * SEQ_LEN : (index + 1) * SEQ_LEN + 1])


def inputs(tokens: Any) -> dict[str, Any]:
    """Tokens and targets of a row of one more."""
    import torch

    row = torch.from_numpy(tokens.astype("int64"))
    return {"tokens": row[:-1], "targets": row[1:]}


def decoded(data: bytes, label: int) -> Any:
    """The picture and its class as a model takes them, by fairexp's decoder."""
    import torch

    from fairexp.datasets.image_folder import image

    return normalized(image(io.BytesIO(data), SIZE, False, "an image")), torch.tensor(label)


def normalized(picture: Any) -> Any:
    """One picture as floats, where fairexp normalises whole batches."""
    from fairexp.datasets.image_folder import Normalize

    return Normalize().normalized(picture[None])[0]


# How it is read


def fairexp(dataset: Any, source: str, workers: int, at: float, on_device: Any = None) -> Iterator[Any]:
    """What a run's loop gets, from that part of an epoch on."""
    import torch

    from fairexp.runtime import heap
    from fairexp.runtime.data import Batches, Fetcher
    from fairexp.runtime.dist import Place
    from fairexp.runtime.order import TrainingOrder

    heap.keep()  # as a rank begins
    here, size = Place(0, 1, 0, torch.device("cpu")), BATCH[source]
    order = TrainingOrder(len(dataset), size, size, here, 0, dataset=dataset)
    return Batches(
        Fetcher(dataset, None, 0, on_device=on_device), order, here, workers, int(at * order.steps_per_epoch)
    )


def plain(dataset: Any, source: str, workers: int, at: float) -> Iterator[Any]:
    """torch's DataLoader as it comes; it gets to a place by reading what is before."""
    from torch.utils.data import DataLoader

    loader: DataLoader[Any] = DataLoader(dataset, BATCH[source], shuffle=True, num_workers=workers, drop_last=True)
    return forever(loader, int(at * len(loader)))


def forever(loader: Any, first: int) -> Iterator[Any]:
    """Its batches, epoch by epoch, after the first so many."""
    return itertools.islice(itertools.chain.from_iterable(itertools.repeat(loader)), first, None)


@reads("small", "fairexp")
def _(folder: Path, workers: int, at: float) -> Iterator[Any]:
    return fairexp(SmallBatches(folder), "small", workers, at)


@reads("small", "DataLoader")
def _(folder: Path, workers: int, at: float) -> Iterator[Any]:
    return plain(Small(folder), "small", workers, at)


@reads("tokens", "fairexp")
def _(folder: Path, workers: int, at: float) -> Iterator[Any]:
    from fairexp.datasets.tokens import Tokens

    return fairexp(Tokens(folder / "shards", "train", SEQ_LEN), "tokens", workers, at)


@reads("tokens", "DataLoader")
def _(folder: Path, workers: int, at: float) -> Iterator[Any]:
    return plain(Rows(folder / "tokens.bin"), "tokens", workers, at)


@reads("tokens", "litdata")
def _(folder: Path, workers: int, at: float) -> Iterator[Any]:
    from litdata import StreamingDataLoader, StreamingDataset
    from litdata.streaming.item_loader import TokensLoader

    class Inputs(StreamingDataset):
        def __getitem__(self, index: Any) -> Any:
            return inputs(super().__getitem__(index).numpy())

    dataset = Inputs(str(folder / "litdata"), shuffle=True, item_loader=TokensLoader(SEQ_LEN + 1))
    loader = StreamingDataLoader(dataset, batch_size=BATCH["tokens"], num_workers=workers)
    return forever(loader, int(at * len(loader)))


@reads("tokens", "streaming")
def _(folder: Path, workers: int, at: float) -> Iterator[Any]:
    return mosaic(folder, "tokens", workers, at, lambda sample: inputs(sample["tokens"]))


def mosaic(folder: Path, source: str, workers: int, at: float, made: Callable[[Any], Any]) -> Iterator[Any]:
    """mosaicml-streaming's batches of what `made` makes of its samples."""
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory
    from torch.utils.data import DataLoader

    clean_stale_shared_memory()

    class Made(StreamingDataset):
        def __getitem__(self, index: Any) -> Any:
            return made(super().__getitem__(index))

    size = BATCH[source]
    dataset = Made(local=str(folder / "mds"), shuffle=True, batch_size=size)
    loader: DataLoader[Any] = DataLoader(dataset, size, num_workers=workers, drop_last=True)
    return forever(loader, int(at * len(dataset) / size))


@reads("images", "fairexp")
def _(folder: Path, workers: int, at: float) -> Iterator[Any]:
    from fairexp.datasets.image_folder import Normalize
    from fairexp.datasets.tar_shards import TarImages

    dataset = TarImages(folder / "tar", "*.tar", "cls", SIZE, NUM_CLASSES, False)
    return fairexp(dataset, "images", workers, at, Normalize())


@reads("images", "DataLoader")
def _(folder: Path, workers: int, at: float) -> Iterator[Any]:
    """Over one file an image."""
    from fairexp.datasets.image_folder import ImageFolder

    class Floats(ImageFolder):
        def __getitem__(self, index: int) -> Any:
            picture, label = super().__getitem__(index)
            return normalized(picture), label

    return plain(Floats(folder / "files", "train", SIZE, NUM_CLASSES, False), "images", workers, at)


@reads("images", "webdataset")
def _(folder: Path, workers: int, at: float) -> Iterator[Any]:
    import webdataset
    from torch.utils.data import DataLoader

    shards = sorted(str(path) for path in (folder / "tar").glob("*.tar"))
    dataset = (
        webdataset.WebDataset(shards, shardshuffle=len(shards), seed=0, empty_check=False)
        .shuffle(1000)
        .to_tuple("jpg", "cls")
        .map(lambda sample: decoded(sample[0], int(sample[1])))
    )
    count = json.loads((folder / "count.json").read_text()) // BATCH["images"]
    return forever(DataLoader(dataset, BATCH["images"], num_workers=workers, drop_last=True), int(at * count))


@reads("images", "streaming")
def _(folder: Path, workers: int, at: float) -> Iterator[Any]:
    return mosaic(folder, "images", workers, at, lambda sample: decoded(sample["jpg"], sample["cls"]))


@reads("images", "litdata")
def _(folder: Path, workers: int, at: float) -> Iterator[Any]:
    from litdata import StreamingDataLoader, StreamingDataset

    class Decoded(StreamingDataset):
        def __getitem__(self, index: Any) -> Any:
            sample = super().__getitem__(index)
            return decoded(sample["jpg"], sample["cls"])

    dataset = Decoded(str(folder / "litdata"), shuffle=True)
    loader = StreamingDataLoader(dataset, batch_size=BATCH["images"], num_workers=workers)
    return forever(loader, int(at * len(loader)))


COLUMNS = {"id": "id", "values": "values"}


@reads("rows", "fairexp")
def _(folder: Path, workers: int, at: float) -> Iterator[Any]:
    from fairexp.datasets.parquet import ParquetRows

    return fairexp(ParquetRows(folder, "*.parquet", COLUMNS, window=8), "rows", workers, at)


@reads("rows", "fairexp, saved")
def _(folder: Path, workers: int, at: float) -> Iterator[Any]:
    from fairexp.datasets.huggingface import HuggingFaceRows

    return fairexp(HuggingFaceRows(folder / "saved", None, None, COLUMNS), "rows", workers, at)


@reads("rows", "DataLoader")
def _(folder: Path, workers: int, at: float) -> Iterator[Any]:
    """Over the same rows as Hugging Face's datasets give them."""
    import datasets

    datasets.disable_progress_bars()
    return plain(datasets.load_from_disk(str(folder / "saved")).with_format("torch"), "rows", workers, at)


def main() -> int:
    """Reads for so many seconds, and says how fast."""
    folder, source, reader, workers, at, seconds = sys.argv[1:]
    import torch

    torch.set_num_threads(1)
    import torch.utils.data  # what every run has loaded by then

    import fairexp.runtime.data  # noqa: F401

    began = time.perf_counter()
    try:
        batches = READERS[source, reader](Path(folder), int(workers), float(at))
    except ImportError as error:
        print(json.dumps({"missing": f"{error.name}"}))
        return 0
    next(batches)
    first_s = time.perf_counter() - began
    count, began = 0, time.perf_counter()
    while (lasted := time.perf_counter() - began) < float(seconds):
        next(batches)
        count += 1
    rate = count * BATCH[source] / lasted if count else 0.0
    print(json.dumps({"first_s": first_s, "samples_per_s": rate}))
    sys.stdout.flush()
    # not through a peer's exit handlers, some of which wait
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
