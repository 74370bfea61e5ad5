"""Data sets of Hugging Face's `datasets` (the extra `datasets`) on the local disk: saved ones, or Parquet, JSON and CSV files.

Rows are read as Arrow, so none of `datasets`' decoders runs: one of an image or a sound follows a path that stands in the
data. Nothing is looked up on the network.
"""

import glob
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fairexp.datasets.columns import Columns, batch, check, check_images, image_and_label, named, need
from fairexp.datasets.image_folder import need_pillow


class HuggingFaceRows:
    """Rows of a data set, a whole batch at a time: numbers, lists of numbers of one length, and text.

    `root`: a folder of `save_to_disk`, with its `split` if it has several; or, with a pattern in `files` such as
    `train*.parquet`, one of Parquet, JSON or CSV files. Those are copied once, as Arrow, to ~/.cache/huggingface.
    `columns` says what a batch is: a list of columns gives a tuple, a mapping {name in the batch: column} a dict.
    """

    def __init__(self, root: str | Path, files: str | None, split: str | None, columns: Columns) -> None:
        need("datasets")
        self.columns, self.where = columns, str(Path(root, files or split or ""))
        self.rows, self.fingerprint = load(Path(root), files, split, named(columns))
        check(self.rows.features.arrow_schema, columns, self.where)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: Tensor | list[int]) -> Any:
        return batch(self.rows[torch.as_tensor(indices).tolist()], self.columns, self.where)


class HuggingFaceImages:
    """Images and class labels of a data set: uint8 [3, image_size, image_size] and int64, as `ImageFolder` gives them.

    `root`, `files` and `split` as for `HuggingFaceRows`. `columns`: that of the image, and that of the class's number.
    """

    def __init__(
        self,
        root: str | Path,
        files: str | None,
        split: str | None,
        columns: Sequence[str],
        image_size: int,
        num_classes: int,
        augment: bool,
    ) -> None:
        need_pillow()
        need("datasets")
        self.columns, self.where = columns, str(Path(root, files or split or ""))
        self.rows, self.fingerprint = load(Path(root), files, split, columns)
        check_images(self.rows.features.arrow_schema, columns, self.where)
        self.image_size, self.num_classes, self.augment = image_size, num_classes, augment

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        row, name = self.rows[[index]].to_pylist()[0], f"{self.where}: row {index:,}"
        return image_and_label(row, self.columns, self.image_size, self.num_classes, self.augment, name)


def load(
    root: Path, pattern: str | None, split: str | None, columns: Sequence[str]
) -> tuple[Any, dict[str, str | int]]:
    """The columns of a `datasets.Dataset` that gives Arrow tables, and the facts that identify it."""
    import datasets

    files = sorted(root.rglob("*.arrow") if pattern is None else root.glob(pattern))
    path = root if pattern is None else root / pattern
    if not files:
        raise ValueError(f"{root} has no {pattern or 'data set of save_to_disk; for other files, set `files`'}")
    try:
        found = datasets.load_from_disk(str(root)) if pattern is None else read_files(files)
    except (OSError, ValueError, KeyError, TypeError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"{path}: can't be read as a data set: {' '.join(str(error).split())}") from None
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise ValueError(f"{path}: split={split!r}: it has {', '.join(found)}")
        found = found[split]
        files = [file for file in files if file.relative_to(root).parts[0] == split]
    elif split is not None:
        raise ValueError(f"{path}: split={split!r}: it has no splits; null")
    for name in columns:
        if name not in found.column_names:
            raise ValueError(f"{path} has no column {name!r}; it has {', '.join(found.column_names)}")
    listing = [f"{file.name} {file.stat().st_size}" for file in files]
    fingerprint: dict[str, str | int] = {
        "files": len(files),
        "samples": len(found),
        "bytes": sum(file.stat().st_size for file in files),
        "digest": hashlib.sha256("\n".join([*listing, str(found.features)]).encode()).hexdigest(),
    }
    return found.select_columns(list(columns)).with_format("arrow"), fingerprint


def read_files(files: Sequence[Path]) -> Any:
    """The rows of Parquet, JSON or CSV files, in the order of the files."""
    import datasets

    readers = {
        ".parquet": datasets.Dataset.from_parquet,
        ".json": datasets.Dataset.from_json,
        ".jsonl": datasets.Dataset.from_json,
        ".csv": datasets.Dataset.from_csv,
    }
    suffixes = {file.suffix for file in files}
    if len(suffixes) > 1 or not suffixes <= readers.keys():
        raise ValueError(f"takes files of one kind, {', '.join(readers)}; got {', '.join(sorted(suffixes))}")
    return readers[suffixes.pop()]([glob.escape(str(file)) for file in files])
