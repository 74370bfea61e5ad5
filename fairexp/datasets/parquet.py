"""Rows of Parquet files by index, read in place with pyarrow (the extra `parquet`).

A row costs the reading of its row group, the smallest piece that pyarrow reads; the last ones stay in memory, up to
`cache_mb` in each process. So the training order shuffles windows of row groups: see `windows`.
"""

import hashlib
import os
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from fairexp.datasets.columns import Columns, batch, check, check_images, image_and_label, named, need
from fairexp.datasets.image_folder import Told, need_pillow
from fairexp.datasets.windows import window_permutation

OPEN_FILES = 32  # kept open in each process


class ParquetImages:
    """Images and class labels from Parquet files: float32 [3, image_size, image_size] and int64, as `ImageFolder` gives
    them.

    `files` is a pattern below `root`, such as `train*.parquet`. `columns`: that of the image file's bytes, or of {bytes,
    path} as Hugging Face writes them, where only `bytes` is read; and that of the class's number. A damaged file is a
    ValueError.
    """

    def __init__(
        self,
        root: str | Path,
        files: str,
        columns: Sequence[str],
        image_size: int,
        num_classes: int,
        augment: bool,
        window: int | None = None,
        cache_mb: int = 256,
    ) -> None:
        need_pillow()
        need("parquet")
        self.table = Table(root, files, columns, cache_mb, window)
        check_images(self.table.schema, columns, str(root))
        self.columns = columns
        self.image_size, self.num_classes, self.augment = image_size, num_classes, augment
        self.fingerprint = self.table.fingerprint

    def __len__(self) -> int:
        return len(self.table)

    def permutation(self, generator: Generator) -> Tensor:
        return self.table.permutation(generator)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        row, name = self.table.row(index), Told(lambda: self.table.name(index))
        return image_and_label(row, self.columns, self.image_size, self.num_classes, self.augment, name)


class ParquetRows:
    """Rows of Parquet files, a whole batch at a time: numbers, lists of numbers of one length, and text.

    `columns` says what a batch is: a list of columns gives a tuple, a mapping {name in the batch: column} a dict.
    """

    def __init__(
        self, root: str | Path, files: str, columns: Columns, window: int | None = None, cache_mb: int = 256
    ) -> None:
        need("parquet")
        self.columns = columns
        self.table = Table(root, files, named(columns), cache_mb, window)
        check(self.table.schema, columns, str(root))
        self.fingerprint = self.table.fingerprint

    def __len__(self) -> int:
        return len(self.table)

    def permutation(self, generator: Generator) -> Tensor:
        return self.table.permutation(generator)

    def __getitems__(self, indices: Tensor | list[int]) -> Any:
        return batch(self.table.take(torch.as_tensor(indices)), self.columns, str(self.table.root))


class Table:
    """Some columns of Parquet files, by row; in the order of the files by name."""

    def __init__(
        self, root: str | Path, pattern: str, columns: Sequence[str], cache_mb: int, window: int | None
    ) -> None:
        self.root, self.columns, self.cache_bytes, self.window = Path(root), list(columns), cache_mb * 2**20, window
        self.paths = sorted(self.root.glob(pattern))
        if not self.paths:
            raise ValueError(f"{root} has no {pattern}")
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(self._look, self.paths))
        self.schema = found[0][0]
        for path, (schema, _) in zip(self.paths, found, strict=True):
            for name in columns:
                if name not in schema.names:
                    raise ValueError(f"{path} has no column {name!r}; it has {', '.join(schema.names)}")
                if schema.field(name).type != self.schema.field(name).type:
                    kinds = f"{schema.field(name).type}, but {self.schema.field(name).type} in {self.paths[0].name}"
                    raise ValueError(f"{path}: column {name!r} is {kinds}")
        groups = [(file, group, *row) for file, (_, rows) in enumerate(found) for group, row in enumerate(rows)]
        self.groups = np.array(groups, np.int64).reshape(-1, 4)  # file, number in it, rows, uncompressed bytes
        self.groups = self.groups[self.groups[:, 2] > 0]
        if not len(self.groups):
            raise ValueError(f"{root}: the files {pattern} have no row")
        self.ends = np.cumsum(self.groups[:, 2])
        largest = int(self.groups[:, 3].max())
        at_once = (window or 1) * largest
        if at_once > self.cache_bytes:
            what = f"window={window} row groups take" if window else "a row group takes"
            raise ValueError(
                f"{root}: {what} up to {at_once / 2**20:,.0f} MiB, and cache_mb={cache_mb}: raise it"
                f"{' or lower window' if window and window > 1 else ', or write the files with smaller row groups'}"
            )
        listing = [
            f"{path.relative_to(root)} {path.stat().st_size} {rows}"
            for path, (_, rows) in zip(self.paths, found, strict=True)
        ]
        self.fingerprint: dict[str, str | int] = {
            "files": len(self.paths),
            "samples": len(self),
            "row_groups": len(self.groups),
            "bytes": sum(path.stat().st_size for path in self.paths),
            "digest": hashlib.sha256("\n".join([*listing, str(self.schema.remove_metadata())]).encode()).hexdigest(),
        }
        self._forget()

    def _forget(self) -> None:
        self._process = os.getpid()
        self._files: OrderedDict[int, Any] = OrderedDict()
        self._held: OrderedDict[int, Any] = OrderedDict()  # row group -> its columns
        self._held_bytes = 0

    def __getstate__(self) -> dict[str, Any]:
        fresh = {"_files": OrderedDict(), "_held": OrderedDict(), "_held_bytes": 0}
        return self.__dict__ | fresh

    def __len__(self) -> int:
        return int(self.ends[-1])

    def _look(self, path: Path) -> tuple[Any, list[tuple[int, int]]]:
        """The schema, and the rows and bytes of each row group, from the file's footer."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(path) as file:
                footer, schema = file.metadata, file.schema_arrow
                mine = [
                    column
                    for column in range(footer.num_columns)
                    if footer.schema.column(column).path.partition(".")[0] in self.columns
                ]
                groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
                return schema, [
                    (group.num_rows, sum(group.column(column).total_uncompressed_size for column in mine))
                    for group in groups
                ]
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path}: can't read this Parquet file: {error}") from None

    def permutation(self, generator: Generator) -> Tensor:
        return window_permutation(self.groups[:, 2], self.window, generator)

    def name(self, index: int) -> str:
        """What a person finds the row by."""
        group = int(np.searchsorted(self.ends, index, side="right"))
        file = self.groups[group, 0]
        first = self.ends[group] - self.groups[group, 2]
        before = self.groups[(self.groups[:, 0] == file) & (self.groups[:, 1] < self.groups[group, 1]), 2].sum()
        return f"{self.paths[file]}: row {int(before + index - first):,}"

    def row(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        group = int(np.searchsorted(self.ends, index, side="right"))
        place = int(index - self.ends[group] + self.groups[group, 2])
        return self._group(group).slice(place, 1).to_pylist()[0]

    def take(self, indices: Tensor) -> Any:
        """A table of these rows, in this order."""
        import pyarrow as pa

        wanted = indices.numpy()
        groups = np.searchsorted(self.ends, wanted, side="right")
        order = np.argsort(groups, kind="stable")
        places = wanted - self.ends[groups] + self.groups[groups, 2]
        pieces = []
        for group in np.unique(groups):
            mine = order[groups[order] == group]
            pieces.append(self._group(int(group)).take(pa.array(places[mine])))
        return pa.concat_tables(pieces).take(pa.array(np.argsort(order, kind="stable")))

    def _group(self, number: int) -> Any:
        """A row group's columns; the last ones read stay, as many as fit."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        if self._process != os.getpid():
            self._forget()  # a forked worker has the files of its own
        if number in self._held:
            self._held.move_to_end(number)
            return self._held[number]
        file, group = (int(value) for value in self.groups[number, :2])
        path = self.paths[file]
        try:
            if file not in self._files:
                while len(self._files) >= OPEN_FILES:
                    self._files.popitem(last=False)[1].close()
                # not mapped into memory: a file that is cut short would kill the process
                self._files[file] = pq.ParquetFile(path, memory_map=False)
            self._files.move_to_end(file)
            # one thread: the data loading processes are the parallel part
            table = self._files[file].read_row_group(group, columns=self.columns, use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path}: can't read row group {group}: {error}") from None
        if len(table) != self.groups[number, 2]:
            raise ValueError(
                f"{path}: row group {group} has {len(table):,} rows, its footer says {self.groups[number, 2]:,}"
            )
        self._held[number] = table
        self._held_bytes += table.nbytes
        while self._held_bytes > self.cache_bytes and len(self._held) > 1:
            self._held_bytes -= self._held.popitem(last=False)[1].nbytes
        return table
