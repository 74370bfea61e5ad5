"""Token shards that `fairexp prep` has made, as sequences of one length."""

import json
import mmap
import os
import resource
from collections import OrderedDict
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Generator, Tensor

from fairexp.datasets.windows import WindowOrder

FORMAT = 1
NOT_COUNTED = -100
# of neighbouring rows in an order by windows: a disk that seeks for 8 ms gives a MiB in about as long, and of 64 blocks there is
# one for each row of a batch of 32 and more
BLOCK_BYTES = 1 << 20
MOST_MAPS = 256  # shards that are open at once: each holds a file descriptor


class Tokens:
    """Sequences of `seq_len` tokens from the shards in `root`: dicts of tokens and targets, int64 [B, seq_len], and num_bytes,
    int64 [B], the text that the counted targets stand for, where the tokenizer knows.

    `pack="stream"`: sample i is tokens [i L, (i + 1) L) of all documents one after the other, and each token but the first
    of all is some sample's target once. With `mask_documents`, "documents", int32 [B, seq_len], says which document of the row
    each token is of, for attention that doesn't look into another one.
    `pack="documents"`: sample i is document i from its beginning, behind an end token; what doesn't fit is cut off, and
    targets behind its end are not counted (-100).

    `window`: the training order isn't one of all rows but takes blocks of neighbours, 1 MiB each, and mixes the rows of so many
    at a time (`WindowOrder`), for what doesn't fit in memory. Who looks at it has the kernel read the blocks ahead.

    `vocab_size` and `tokenizer` (bytes, or the digest of its tokenizer.json), where given, are what the set must have. A
    ValueError says what is wrong with the files; opening looks at meta.json and sizes, `verify` reads every byte.
    """

    def __init__(
        self,
        root: str | Path,
        split: Literal["train", "valid"],
        seq_len: int,
        mask_documents: bool = False,
        pack: Literal["stream", "documents"] = "stream",
        vocab_size: int | None = None,
        tokenizer: str | None = None,
        window: int | None = None,
    ) -> None:
        if pack not in ("stream", "documents"):
            raise ValueError(f"pack={pack!r}: takes stream or documents")
        if seq_len < 1:
            raise ValueError(f"seq_len={seq_len}: takes a number of tokens >= 1")
        if window is not None and window < 1:
            raise ValueError(f"window={window}: takes 1 or more blocks, or null to shuffle all rows")
        self.root = Path(root).expanduser()
        self.split, self.seq_len, self.mask_documents, self.pack = split, seq_len, mask_documents, pack
        self.window = window
        meta = read_meta(self.root)
        if split not in meta["splits"]:
            raise ValueError(f"split={split!r}: {self.root} has {' and '.join(meta['splits'])}")
        self.vocab_size: int = meta["vocab_size"]
        self.end: int = meta["end_of_document"]
        self.tokenizer: str = meta["tokenizer"]
        for what, wanted, there in (
            ("vocab_size", vocab_size, self.vocab_size),
            ("tokenizer", tokenizer, self.tokenizer),
        ):
            if wanted is not None and wanted != there:
                raise ValueError(f"{what}={wanted}, but {self.root} was made with {there}")
        facts = meta["splits"][split]
        self.num_tokens: int = facts["tokens"]
        self.num_documents: int = facts["documents"]
        if not self.num_tokens:
            raise ValueError(f"{self.root}: its {split} split is empty; `fairexp prep --valid` says how much it gets")
        self.dtype = np.dtype("<u2" if meta["dtype"] == "uint16" else "<u4")
        self.files = [self.root / shard["file"] for shard in facts["shards"]]
        self.ends = np.cumsum([shard["tokens"] for shard in facts["shards"]])  # of the shards, in the stream
        for file, shard in zip(self.files, facts["shards"], strict=True):
            check_size(file, shard["tokens"] * self.dtype.itemsize)
        self.block = max(1, BLOCK_BYTES * len(self) // (self.num_tokens * self.dtype.itemsize))  # rows
        self.digests = {shard["file"]: shard["sha256"] for shard in [*facts["shards"], facts["index"]]}
        self.index_file = self.root / facts["index"]["file"]
        check_size(self.index_file, self.num_documents * 8)
        self.token_bytes: np.ndarray | None = None
        if meta["token_bytes"]:
            check_size(self.root / meta["token_bytes"]["file"], self.vocab_size * 2)
            self.token_bytes = np.fromfile(self.root / meta["token_bytes"]["file"], "<u2").astype(np.int64)
        if self.token_bytes is not None and self.token_bytes[self.end]:
            raise ValueError(f"{self.root}: its end token stands for text")
        self.maps: OrderedDict[int, tuple[np.ndarray, mmap.mmap]] = OrderedDict()
        self.reads = (-1, -1)  # from disks, when the last rows were gathered
        self.fingerprint: dict[str, str | int] = {
            "content": meta["fingerprint"],
            "split": split,
            "tokens": self.num_tokens,
            "documents": self.num_documents,
            "vocab_size": self.vocab_size,
            "tokenizer": self.tokenizer,
            "seq_len": seq_len,
            "pack": pack,
        }

    def __len__(self) -> int:
        return self.num_documents if self.pack == "documents" else -(-(self.num_tokens - 1) // self.seq_len)

    def permutation(self, generator: Generator) -> WindowOrder | None:
        """The training order with a window; none of its own without."""
        if self.window is None:
            return None
        return WindowOrder(len(self), self.block, self.window, generator, self.ask_for_blocks)

    def ask_for_blocks(self, firsts: np.ndarray) -> None:
        """Has the kernel begin to read the blocks of these first rows."""
        begins, ends = self.begins(firsts), self.begins(np.minimum(firsts + self.block, len(self)))
        self.ask_for(begins, np.clip(ends - begins, 0, self.num_tokens))  # an index may be damaged

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {key: value[0] for key, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Tensor | list[int]) -> dict[str, Tensor]:
        numbers = np.asarray(indices, dtype=np.int64)
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < len(self):
            raise IndexError(f"sample {numbers.max()} of {len(self)}")
        length, begins = self.seq_len, self.begins(numbers)
        if self.pack == "documents":
            ends = self.document_ends[numbers].astype(np.int64)
            # from the token before: the end of the document before this one, which is what a model is to begin with
            rows = self.gather(begins - 1, length + 1)
            rows[:, 0] = self.end
            places = begins[:, None] - 1 + np.arange(length + 1)
            ends = ends[:, None]
        else:
            rows = self.gather(begins, length + 1)
            places = begins[:, None] + np.arange(length + 1)
            ends = np.full((len(numbers), 1), self.num_tokens)
        beyond = places >= ends
        rows[beyond] = self.end
        tokens, targets = rows[:, :-1].copy(), rows[:, 1:].copy()
        targets[beyond[:, 1:]] = NOT_COUNTED
        batch = {"tokens": torch.from_numpy(tokens), "targets": torch.from_numpy(targets)}
        if self.pack == "stream" and self.mask_documents:
            batch["documents"] = torch.from_numpy(self.documents_at(begins, length))
        if self.token_bytes is not None:
            counted = np.where(targets == NOT_COUNTED, self.end, targets)
            batch["num_bytes"] = torch.from_numpy(self.token_bytes[counted].sum(1))
        return batch

    def begins(self, numbers: np.ndarray) -> np.ndarray:
        """Where these samples begin in the stream."""
        if self.pack == "stream":
            return numbers * self.seq_len
        return np.where(numbers > 0, self.document_ends[np.maximum(numbers, 1) - 1].astype(np.int64), 0)

    def gather(self, begins: np.ndarray, length: int) -> np.ndarray:
        """Rows of tokens from these places of the stream on, int64; what lies outside of it is 0."""
        rows = np.zeros((len(begins), length), np.int64)
        shards = np.searchsorted(self.ends, np.maximum(begins, 0), "right")
        if (reads := disk_reads()) != self.reads:
            self.reads = reads
            self.ask_for(begins, np.full(len(begins), length))
        for shard in np.unique(shards).tolist():
            if shard == len(self.files):
                continue
            tokens = self.shard(shard)
            mine = np.flatnonzero(shards == shard)
            starts = begins[mine] - (self.ends[shard] - len(tokens))
            inside = (starts >= 0) & (starts + length <= len(tokens))
            if inside.any():
                # one gather for all rows: from a view of which each row is the tokens from one place on
                view = np.lib.stride_tricks.sliding_window_view(tokens, length)
                rows[mine[inside]] = view[starts[inside]]
            for row in mine[~inside].tolist():
                self.gather_across(rows[row], int(begins[row]))
        if len(rows) and (largest := rows.max()) >= self.vocab_size:
            raise ValueError(
                f"{self.root}: a token is {largest}, and there are {self.vocab_size}; the shards are damaged"
            )
        return rows

    def ask_for(self, begins: np.ndarray, lengths: np.ndarray) -> None:
        """Has the kernel begin to read so many tokens from each of these places on, all at once: faults would wait for the disk
        row by row, and each read around itself what the disk's read_ahead_kb says, 128 KiB to 8 MiB. It takes 2 us a row, so
        `gather` asks only where something has been read since it last did. Of what lies in two shards, the first part."""
        begins = np.maximum(begins, 0)
        shards = np.searchsorted(self.ends, begins, "right")
        for number, begin, length in zip(shards.tolist(), begins.tolist(), lengths.tolist(), strict=True):
            if number < len(self.files):
                tokens = self.shard(number)
                at = (begin - (int(self.ends[number]) - len(tokens))) * tokens.itemsize
                page = at - at % mmap.PAGESIZE
                self.maps[number][1].madvise(mmap.MADV_WILLNEED, page, at + length * tokens.itemsize - page)

    def gather_across(self, row: np.ndarray, begin: int) -> None:
        """A row that lies in several shards, or partly outside of all."""
        at = max(0, -begin)
        while at < len(row) and begin + at < self.num_tokens:
            shard = int(np.searchsorted(self.ends, begin + at, "right"))
            tokens = self.shard(shard)
            start = begin + at - (int(self.ends[shard]) - len(tokens))
            part = tokens[start : start + len(row) - at]
            row[at : at + len(part)] = part
            at += len(part)

    def shard(self, number: int) -> np.ndarray:
        """A shard's tokens, mapped into memory."""
        if number in self.maps:
            self.maps.move_to_end(number)
        else:
            size = int(self.ends[number]) - (int(self.ends[number - 1]) if number else 0)
            with open(self.files[number], "rb") as file:
                mapped = mmap.mmap(file.fileno(), size * self.dtype.itemsize, access=mmap.ACCESS_READ)
            self.maps[number] = np.frombuffer(mapped, self.dtype), mapped
            if len(self.maps) > MOST_MAPS:
                self.maps.popitem(last=False)
        return self.maps[number][0]

    @cached_property
    def document_ends(self) -> np.ndarray:
        """Where each document ends in the stream."""
        return np.memmap(self.index_file, "<u8", "r").view(np.ndarray)

    def __getstate__(self) -> dict[str, Any]:
        """Without what is mapped: another process maps it itself."""
        state = {key: value for key, value in self.__dict__.items() if key != "document_ends"}
        return state | {"maps": OrderedDict()}

    def documents_at(self, begins: np.ndarray, length: int) -> np.ndarray:
        """Which document each of so many places from these on is of, counted from 0 in each row, int32."""
        # only a row's first and last place are searched among all ends, of which there may be a thousand million
        edges = np.stack([begins, begins + length - 1]).astype(np.uint64)
        first, last = np.searchsorted(self.document_ends, edges, "right")
        counts = np.maximum(last - first, 0)
        rows = np.repeat(np.arange(len(begins)), counts)
        numbers = np.arange(len(rows)) + np.repeat(first - (np.cumsum(counts) - counts), counts)
        at = self.document_ends[numbers].astype(np.int64) - begins[rows]
        if (last < first).any() or ((at <= 0) | (at >= length)).any():
            raise ValueError(f"{self.index_file}: damaged: its documents don't end one after the other")
        steps = np.bincount(rows * length + at, minlength=len(begins) * length)
        return steps.reshape(-1, length).cumsum(1, dtype=np.int32)

    def verify(self) -> None:
        """Reads every byte. ValueError: a file isn't what was written."""
        import hashlib

        for name, sha256 in self.digests.items():
            with open(self.root / name, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                    raise ValueError(f"{self.root / name}: damaged: its digest differs")


def disk_reads() -> tuple[int, int]:
    """How often this process has waited for a disk, and the blocks that it had read from disks, ahead of it too."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_majflt, used.ru_inblock


def read_meta(root: Path) -> dict[str, Any]:
    """What meta.json says, of which nothing is believed that couldn't be. ValueError in one line."""
    file = root / "meta.json"
    try:
        meta = json.loads(file.read_bytes())
    except FileNotFoundError:
        begun = root.with_name(f"{root.name}.partial").is_dir()
        hint = "; it isn't whole yet, the same `fairexp prep` command goes on" if begun else ""
        raise ValueError(f"{file}: no such file: `fairexp prep FILES --out {root}` makes token shards{hint}") from None
    except (ValueError, RecursionError):
        raise ValueError(f"{file}: damaged: not JSON") from None
    if isinstance(meta, dict) and meta.get("format", FORMAT) != FORMAT:
        raise ValueError(f"{file}: written in format {meta['format']}, this fairexp's is {FORMAT}")
    try:
        good = _is_meta(meta)
    except (KeyError, TypeError, AttributeError):
        good = False
    if not good:
        raise ValueError(f"{file}: can't be what `fairexp prep` wrote")
    return meta


def _is_meta(meta: dict[str, Any]) -> bool:
    def count(value: Any) -> bool:
        return type(value) is int and 0 <= value < 1 << 62

    def file(value: dict[str, Any]) -> bool:
        return Path(value["file"]).name == value["file"] and isinstance(
            value["sha256"], str
        )  # nothing elsewhere is read

    return (
        meta["dtype"] in ("uint16", "uint32")
        and count(meta["vocab_size"])
        and meta["vocab_size"] <= 1 << 32
        and count(meta["end_of_document"])
        and meta["end_of_document"] < meta["vocab_size"]
        and all(isinstance(meta[key], str) for key in ("fingerprint", "tokenizer"))
        and (meta["token_bytes"] is None or file(meta["token_bytes"]))
        and all(
            count(split["tokens"])
            and count(split["documents"])
            and file(split["index"])
            and all(file(shard) and count(shard["tokens"]) for shard in split["shards"])
            and sum(shard["tokens"] for shard in split["shards"]) == split["tokens"]
            for split in meta["splits"].values()
        )
    )


def check_size(file: Path, size: int) -> None:
    """ValueError, where the file isn't there or has another size."""
    try:
        there = os.stat(file).st_size
    except FileNotFoundError:
        raise ValueError(f"{file}: is missing") from None
    if there != size:
        raise ValueError(f"{file}: damaged: has {there:,} bytes of {size:,}")
