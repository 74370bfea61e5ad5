"""Rows of Parquet files by index, read in place with pyarrow (the extra `parquet`): on the disk, or over the network.

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
from fairexp.datasets.node_cache import NodeCache
from fairexp.datasets.remote import Remote
from fairexp.datasets.windows import window_permutation

OPEN_FILES = 32  # kept open in each process


class ParquetImages:
    """Images and class labels from Parquet files: uint8 [3, image_size, image_size] and int64, as `ImageFolder` gives
    them.

    `root`: a folder, or a URL that fsspec knows. `files` is a pattern below it, such as `train*.parquet`. `columns`: that of
    the image file's bytes, or of {bytes, path} as Hugging Face writes them, where only `bytes` is read; and that of the
    class's number. `node_cache_gb`: GiB of what a URL gave on the node's disk. A damaged file is a ValueError.
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
        node_cache_gb: float = 2,
    ) -> None:
        need_pillow()
        need("parquet")
        self.table = Table(root, files, columns, cache_mb, window, node_cache_gb)
        check_images(self.table.schema, columns, self.table.where)
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

    `root`: a folder, or a URL that fsspec knows; `files` is a pattern below it.
    `columns` says what a batch is: a list of columns gives a tuple, a mapping {name in the batch: column} a dict.
    """

    def __init__(
        self,
        root: str | Path,
        files: str,
        columns: Columns,
        window: int | None = None,
        cache_mb: int = 256,
        node_cache_gb: float = 2,
    ) -> None:
        need("parquet")
        self.columns = columns
        self.table = Table(root, files, named(columns), cache_mb, window, node_cache_gb)
        check(self.table.schema, columns, self.table.where)
        self.fingerprint = self.table.fingerprint

    def __len__(self) -> int:
        return len(self.table)

    def permutation(self, generator: Generator) -> Tensor:
        return self.table.permutation(generator)

    def __getitems__(self, indices: Tensor | list[int]) -> Any:
        return batch(self.table.take(torch.as_tensor(indices)), self.columns, self.table.where)


class Table:
    """Some columns of Parquet files, by row; in the order of the files by name.

    Behind a URL, the footers are read at the start and kept, and a row group is fetched when one of its rows is asked for.
    The fingerprint says what is true of any copy of the data: names, sizes and the footers' facts. A store's checksums are
    left out: they differ between stores, and with how a file was uploaded, and a run may go on with a copy.
    """

    def __init__(
        self,
        root: str | Path,
        pattern: str,
        columns: Sequence[str],
        cache_mb: int,
        window: int | None,
        node_cache_gb: float = 2,
    ) -> None:
        self.columns, self.cache_bytes, self.window = list(columns), cache_mb * 2**20, window
        self.remote = Remote(str(root)) if "://" in str(root) else None
        self.where = str(self.remote or root)  # what messages call it
        self.node_cache = NodeCache(node_cache_gb)
        listed = self._list(Path(root), pattern)
        if not listed:
            raise ValueError(f"{self.where} has no {pattern}")
        self.names = list(listed)
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(self._look, listed, listed.values()))
        self.sizes = [size for size, *_ in found]
        self.footers = [footer for _, footer, *_ in found]
        self.schema = found[0][2]
        for path, (_, _, schema, _) in zip(map(self._path, self.names), found, strict=True):
            for name in columns:
                if name not in schema.names:
                    raise ValueError(f"{path} has no column {name!r}; it has {', '.join(schema.names)}")
                if schema.field(name).type != self.schema.field(name).type:
                    first = f"{self.schema.field(name).type} in {Path(self.names[0]).name}"
                    raise ValueError(f"{path}: column {name!r} is {schema.field(name).type}, but {first}")
        groups = [(file, group, *row) for file, (*_, rows) in enumerate(found) for group, row in enumerate(rows)]
        self.groups = np.array(groups, np.int64).reshape(-1, 4)  # file, number in it, rows, uncompressed bytes
        self.groups = self.groups[self.groups[:, 2] > 0]
        if not len(self.groups):
            raise ValueError(f"{self.where}: the files {pattern} have no row")
        self.ends = np.cumsum(self.groups[:, 2])
        largest = int(self.groups[:, 3].max())
        at_once = (window or 1) * largest
        if at_once > self.cache_bytes:
            what = f"window={window} row groups take" if window else "a row group takes"
            raise ValueError(
                f"{self.where}: {what} up to {at_once / 2**20:,.0f} MiB, and cache_mb={cache_mb}: raise it"
                f"{' or lower window' if window and window > 1 else ', or write the files with smaller row groups'}"
            )
        listing = [f"{name} {size} {rows}" for name, (size, _, _, rows) in zip(self.names, found, strict=True)]
        self.fingerprint: dict[str, str | int] = {
            "files": len(self.names),
            "samples": len(self),
            "row_groups": len(self.groups),
            "bytes": sum(self.sizes),
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

    def _list(self, root: Path, pattern: str) -> dict[str, int | None]:
        """The files by name below the root, and their sizes where those are known."""
        if self.remote is None:
            return {str(path.relative_to(root)): path.stat().st_size for path in sorted(root.glob(pattern))}
        try:
            return self.remote.find(pattern)
        except OSError as error:
            raise ValueError(f"{self.where}: can't list its files: {error}") from None

    def _path(self, name: str) -> str:
        return f"{self.where}/{name}" if self.remote else str(Path(self.where, name))

    def _look(self, name: str, size: int | None) -> tuple[Any, Any, Any, list[tuple[int, int]]]:
        """The file's size, its footer where that is kept, its schema, and the rows and bytes of each row group."""
        import pyarrow as pa

        try:
            if self.remote is None:
                footer, schema = _end(Path(self.where, name))
            else:
                size, footer, schema = self.remote.read(
                    name, size, lambda file: (file.seek(0, os.SEEK_END), *_end(file))
                )
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{self._path(name)}: can't read this Parquet file: {error}") from None
        mine = [
            column
            for column in range(footer.num_columns)
            if footer.schema.column(column).path.partition(".")[0] in self.columns
        ]
        groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
        rows = [
            (group.num_rows, sum(group.column(column).total_uncompressed_size for column in mine)) for group in groups
        ]
        return size, footer if self.remote else None, schema, rows

    def permutation(self, generator: Generator) -> Tensor:
        return window_permutation(self.groups[:, 2], self.window, generator)

    def name(self, index: int) -> str:
        """What a person finds the row by."""
        group = int(np.searchsorted(self.ends, index, side="right"))
        file = self.groups[group, 0]
        first = self.ends[group] - self.groups[group, 2]
        before = self.groups[(self.groups[:, 0] == file) & (self.groups[:, 1] < self.groups[group, 1]), 2].sum()
        return f"{self._path(self.names[file])}: row {int(before + index - first):,}"

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

        if self._process != os.getpid():
            self._forget()  # a forked worker has the files of its own
        if number in self._held:
            self._held.move_to_end(number)
            return self._held[number]
        file, group = (int(value) for value in self.groups[number, :2])
        path = self._path(self.names[file])
        try:
            table = self._read(file, group) if self.remote is None else self._fetch(self.remote, file, group)
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

    def _read(self, file: int, group: int) -> Any:
        import pyarrow.parquet as pq

        if file not in self._files:
            while len(self._files) >= OPEN_FILES:
                self._files.popitem(last=False)[1].close()
            # not mapped into memory: a file that is cut short would kill the process
            self._files[file] = pq.ParquetFile(Path(self.where, self.names[file]), memory_map=False)
        self._files.move_to_end(file)
        # one thread: the data loading processes are the parallel part
        return self._files[file].read_row_group(group, columns=self.columns, use_threads=False)

    def _fetch(self, remote: Remote, file: int, group: int) -> Any:
        import pyarrow.parquet as pq

        def fetched(handle: Any) -> Any:
            # with the footer nothing is asked for but the columns, and pre_buffer joins neighbours into one request. The
            # ParquetFile isn't kept: it would hold on to the bytes
            opened = pq.ParquetFile(handle, metadata=footer, pre_buffer=True)
            return opened.read_row_group(group, columns=self.columns, use_threads=False)

        name, size, footer = self.names[file], self.sizes[file], self.footers[file]
        # the footer tells a file from one that has taken its place: its columns' places, sizes and smallest and largest values
        facts = [self.where, name, size, group, self.columns, footer.row_group(group).to_dict()]
        digest = hashlib.sha256(repr(facts).encode()).hexdigest()[:32]
        return self.node_cache.get(digest, lambda: remote.read(name, size, fetched))


def _end(source: Any) -> tuple[Any, Any]:
    """A Parquet file's footer, and the schema in it."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(source) as file:
        return file.metadata, file.schema_arrow
