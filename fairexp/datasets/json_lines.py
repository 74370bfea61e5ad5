"""Rows of JSON Lines files by index, read in place: nothing is converted or copied to the disk first."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from fairexp.datasets.columns import Columns, batch, check, named, need
from fairexp.datasets.index_file import Index, ascends, index_of
from fairexp.datasets.open_files import OpenFiles
from fairexp.datasets.windows import window_permutation

BLOCK_LINES = 1024
CHUNK = 2**24
SPACE = b" \t\r"


class JSONLines:
    """Rows of JSON Lines files, a whole batch at a time: numbers, lists of numbers of one length, and text.

    `files` is a pattern below `root`, such as `train*.jsonl`. `columns` says what a batch is: a list of keys gives a tuple,
    a mapping {name in the batch: key} a dict. The first row says of what type each key's values are. With `window`, the
    training order mixes so many blocks of 1,024 rows at a time: for storage that reads neighbours faster.
    """

    def __init__(self, root: str | Path, files: str, columns: Columns, window: int | None = None) -> None:
        need("parquet")
        import pyarrow as pa

        self.root, self.columns, self.window = Path(root), columns, window
        self.paths = sorted(self.root.glob(files))
        if not self.paths:
            raise ValueError(f"{root} has no {files}")
        first = os.getpid() % len(self.paths)  # ranks that start together share the work, and find each other's indexes
        turns = [*range(first, len(self.paths)), *range(first)]
        with ThreadPoolExecutor(8) as pool:
            looked = pool.map(lambda turn: index_of(self.paths[turn], "lines 1", build, fits), turns)
            found = dict(zip(turns, looked, strict=True))
        self.lines = [found[number][0].arrays["ends"] for number in range(len(self.paths))]
        self.starts = [found[number][0].arrays["starts"] for number in range(len(self.paths))]
        self.ends = np.cumsum([len(ends) for ends in self.lines])
        if not len(self):
            raise ValueError(f"{root}: the files {files} have no row")
        listing = [
            f"{path.relative_to(root)} {path.stat().st_size} {found[number][1]}"
            for number, path in enumerate(self.paths)
        ]
        self.fingerprint: dict[str, str | int] = {
            "files": len(self.paths),
            "samples": len(self),
            "bytes": sum(path.stat().st_size for path in self.paths),
            "digest": hashlib.sha256("\n".join(listing).encode()).hexdigest(),
        }
        self._files = OpenFiles(self.paths)
        row = self._row(0)
        missing = [name for name in named(columns) if row.get(name) is None]
        if missing:
            raise ValueError(f"{self.name(0)} has no value for {missing[0]!r}; it has {', '.join(row)}")
        self.types = {name: pa.infer_type([row[name]]) for name in named(columns)}
        check(pa.schema(list(self.types.items())), columns, self.name(0))

    def __len__(self) -> int:
        return int(self.ends[-1])

    def permutation(self, generator: Generator) -> Tensor:
        blocks = [min(BLOCK_LINES, len(lines) - at) for lines in self.lines for at in range(0, len(lines), BLOCK_LINES)]
        return window_permutation(blocks, self.window, generator)

    def __getitems__(self, indices: Tensor | list[int]) -> Any:
        import pyarrow as pa

        wanted = torch.as_tensor(indices).tolist()
        rows = [self._row(index) for index in wanted]
        columns = {name: self._column(wanted, [row.get(name) for row in rows], name) for name in self.types}
        return batch(pa.table(columns), self.columns, str(self.root))

    def name(self, index: int) -> str:
        """What a person finds the row by."""
        file, place = self._place(index)
        return f"{self.paths[file]}: row {place:,} (byte {self.starts[file][place]:,})"

    def _column(self, indices: list[int], values: list[Any], name: str) -> Any:
        """The values as an array of the first row's type. Given a type, Arrow would cut 0.5 down to 0 without a word."""
        import pyarrow as pa

        kind = self.types[name]
        try:
            array = pa.array(values)
            if array.type == kind:
                return array
        except (pa.ArrowException, OverflowError):
            pass  # one of them is of another type: which?
        for index, value in zip(indices, values, strict=True):
            try:
                good = agrees(pa.array([value]).type, kind)
            except (pa.ArrowException, OverflowError):
                good = False
            if not good:
                expected = f"not {kind} as in the first row"
                raise ValueError(f"{self.name(index)}: its {name!r} is {str(value)[:60]!r}, {expected}")
        return pa.array(values, kind)

    def _place(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        file = int(np.searchsorted(self.ends, index, side="right"))
        return file, int(index - self.ends[file] + len(self.lines[file]))

    def _row(self, index: int) -> dict[str, Any]:
        file, place = self._place(index)
        start, end = int(self.starts[file][place]), int(self.lines[file][place])
        data = self._files.read(file, end - start, start)
        try:
            row = json.loads(data)
            if not isinstance(row, dict):
                raise ValueError(f"a {type(row).__name__}, not an object")
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.name(index)} is no JSON object: {error}") from None
        return row


def agrees(kind: Any, expected: Any) -> bool:
    """Whether a value of a type goes into a column of another: a whole number among others, an empty list."""
    import pyarrow.types as types

    if types.is_list(kind) and types.is_list(expected):
        return agrees(kind.value_type, expected.value_type)
    return kind == expected or types.is_null(kind) or (types.is_int64(kind) and types.is_floating(expected))


def build(path: Path, size: int) -> Index:
    """Where the lines are that aren't empty, less what ends them."""
    starts, ends = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    offset = begin = 0
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(CHUNK):
            found = np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + offset
            offset += len(chunk)
            if len(found):
                starts.append(np.concatenate([[begin], found[:-1] + 1]))
                ends.append(found)
                begin = int(found[-1]) + 1
    starts.append(np.array([begin], np.int64))  # the last line may lack its end
    ends.append(np.array([offset], np.int64))
    first, last = np.concatenate(starts), np.concatenate(ends)
    keep = last > first
    # a line of a few spaces is empty, too; longer ones are for the parser to complain about
    with open(path, "rb", buffering=0) as file:
        for number in np.flatnonzero(keep & (last - first < 4)):
            line = os.pread(file.fileno(), int(last[number] - first[number]), int(first[number]))
            keep[number] = bool(line.strip(SPACE))
    return Index({"starts": first[keep], "ends": last[keep]}, [])


def fits(index: Index, size: int) -> bool:
    """Whether the index is of lines in a file of that size."""
    if index.arrays.keys() != {"starts", "ends"}:
        return False
    starts, ends = index.arrays["starts"], index.arrays["ends"]
    last = int(ends[-1]) if len(ends) else 0
    return (
        len(starts) == len(ends)
        and last <= size
        and ascends(ends, last)
        and bool((starts >= 0).all() and (starts < ends).all() and (starts[1:] > ends[:-1]).all())
    )
