"""Blocks of documents -> token files, and these -> shards of one size. What is done says so in a JSON file that is renamed into
place after its data is on the disk, so a kill at any moment leaves nothing that looks whole and isn't.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

import numpy as np

from fairexp.config.rundir import sync_folder, write_atomically
from fairexp.prep.sources import Block, File, Reading, documents
from fairexp.prep.tokenizer import Tokenizer, digest, load

SPLITS = ("train", "valid")
BATCH_BYTES = 1 << 20  # of text that is encoded in one call
COPY_BYTES = 8 << 20
MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Job:
    """All that making a block or a shard depends on, besides its number."""

    work: Path
    out: Path
    files: tuple[File, ...]
    reading: Reading
    tokenizer: str  # bytes, or a tokenizer.json's path
    end: str | None
    valid: float
    seed: int
    shard_tokens: int

    def load(self) -> Tokenizer:
        return load("bytes" if self.tokenizer == "bytes" else "file", Path(self.tokenizer), self.end)


def dtype_of(vocab_size: int) -> np.dtype[Any]:
    """Two bytes a token where they suffice, else four; little-endian on any machine."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def is_valid(seed: int, file: int, begin: int, fraction: float) -> bool:
    """Whether a document is validated on: by its place alone, so it stays where it is whatever is added behind it."""
    return mixed(mixed(mixed(seed) ^ file) ^ begin) < fraction * (1 << 64)


def mixed(x: int) -> int:
    """Splitmix64 (Steele et al. 2014)."""
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


# --- a block ---


def block_files(work: Path, number: int, split: str) -> tuple[Path, Path]:
    """Its tokens, and the number of tokens of each document."""
    return work / f"block_{number:06d}.{split}.bin", work / f"block_{number:06d}.{split}.lengths"


def block_done(work: Path, number: int) -> dict[str, Any] | None:
    """What is known of the block, if it is done."""
    return _read(work / f"block_{number:06d}.json")


def make_block(job: Job, number: int, block: Block) -> dict[str, Any]:
    """Writes a block's tokens; what is known of it. The same at any time, by anyone."""
    tokenizer = job.load()
    dtype, table = dtype_of(tokenizer.vocab_size), tokenizer.token_bytes()
    facts: dict[str, dict[str, Any]] = {split: {"tokens": 0, "documents": 0, "bytes": 0} for split in SPLITS}
    lengths: dict[str, list[int]] = {split: [] for split in SPLITS}
    empty, exact = 0, table is not None
    with ExitStack() as stack:
        outs = {split: stack.enter_context(Out(block_files(job.work, number, split)[0])) for split in SPLITS}
        for batch in _batches(documents(job.files, block, job.reading)):
            encoded = tokenizer.encode([text for _, _, text in batch])
            for (file, begin, text), ids in zip(batch, encoded, strict=True):
                if not text:
                    empty += 1
                    continue
                split = SPLITS[is_valid(job.seed, file, begin, job.valid)]
                tokens = np.empty(len(ids) + 1, dtype)
                tokens[:-1], tokens[-1] = ids, tokenizer.end
                exact = exact and int(table[ids].sum(dtype=np.int64)) == len(text)  # type: ignore[index]
                outs[split].write(tokens)
                lengths[split].append(len(tokens))
                facts[split]["tokens"] += len(tokens)
                facts[split]["documents"] += 1
                facts[split]["bytes"] += len(text)
        for split in SPLITS:
            facts[split]["sha256"] = outs[split].close()
    for split in SPLITS:
        with Out(block_files(job.work, number, split)[1]) as index:
            index.write(np.array(lengths[split], "<u8"))
            facts[split]["lengths_sha256"] = index.close()
    done = {**facts, "empty": empty, "exact": exact}
    write_json(job.work / f"block_{number:06d}.json", done)
    return done


def _batches(found: Iterator[tuple[int, Any]]) -> Iterator[list[tuple[int, int, bytes]]]:
    batch, size = [], 0
    for file, document in found:
        batch.append((file, document.begin, document.text))
        size += len(document.text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def block_whole(work: Path, number: int, done: dict[str, Any], tokens_too: bool) -> bool:
    """Whether the block's files are what was written. Its tokens go when they are in shards, its lengths stay."""
    for split in SPLITS:
        tokens, lengths = block_files(work, number, split)
        wanted = [(lengths, done[split]["lengths_sha256"]), *([(tokens, done[split]["sha256"])] if tokens_too else [])]
        if any(not path.is_file() or digest(path) != sha256 for path, sha256 in wanted):
            return False
    return True


# --- a shard ---


@dataclass(frozen=True)
class Shard:
    """Tokens begin to end of a split; `parts`: block, and which of its tokens."""

    split: str
    number: int
    parts: tuple[tuple[int, int, int], ...]

    @property
    def file(self) -> str:
        return f"{self.split}_{self.number:05d}.bin"

    @property
    def tokens(self) -> int:
        return sum(end - begin for _, begin, end in self.parts)


def cut(split: str, blocks: Sequence[dict[str, Any]], shard_tokens: int) -> list[Shard]:
    """The split's shards: all of one size but the last."""
    shards: list[Shard] = []
    parts: list[tuple[int, int, int]] = []
    room = shard_tokens
    for number, block in enumerate(blocks):
        begin, size = 0, block[split]["tokens"]
        while begin < size:
            end = min(size, begin + room)
            parts.append((number, begin, end))
            room -= end - begin
            begin = end
            if not room:
                shards.append(Shard(split, len(shards), tuple(parts)))
                parts, room = [], shard_tokens
    return [*shards, Shard(split, len(shards), tuple(parts))] if parts else shards


def shard_done(job: Job, shard: Shard, itemsize: int) -> dict[str, Any] | None:
    """What is known of the shard, if it is done and whole."""
    done = _read(job.work / f"{shard.file}.json")
    path = job.out / shard.file
    if not done or not path.is_file() or path.stat().st_size != shard.tokens * itemsize:
        return None
    return done if digest(path) == done["sha256"] else None


def make_shard(job: Job, shard: Shard, itemsize: int) -> dict[str, Any]:
    """Writes a shard; what is known of it."""
    with Out(job.out / shard.file) as out:
        for number, begin, end in shard.parts:
            with open(block_files(job.work, number, shard.split)[0], "rb") as tokens:
                tokens.seek(begin * itemsize)
                left = (end - begin) * itemsize
                while left and (data := tokens.read(min(COPY_BYTES, left))):
                    out.write(data)
                    left -= len(data)
            if left:
                raise OSError(0, "ended early; was it changed meanwhile?", tokens.name)
        done = {"file": shard.file, "tokens": shard.tokens, "sha256": out.close()}
    write_json(job.work / f"{shard.file}.json", done)
    return done


def write_index(job: Job, split: str, num_blocks: int) -> dict[str, Any]:
    """Where each document of a split ends: its last token's place, plus one."""
    file = f"{split}_documents.bin"
    place = np.uint64(0)
    with Out(job.out / file) as out:
        for number in range(num_blocks):
            ends = np.fromfile(block_files(job.work, number, split)[1], "<u8").cumsum(dtype=np.uint64) + place
            if len(ends):
                out.write(ends.astype("<u8"))
                place = ends[-1]
        return {"file": file, "sha256": out.close()}


# --- files ---


class Out:
    """A file that is being written, with its digest. An OSError names it."""

    def __init__(self, path: Path):
        self.path = path
        self.sha256 = hashlib.sha256()
        with named(path):
            self.file: IO[bytes] = open(path, "wb")  # noqa: SIM115

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # what it is about has been said
            self.file.close()

    def write(self, data: np.ndarray | bytes) -> None:
        view = data if isinstance(data, bytes) else data.tobytes()
        self.sha256.update(view)
        with named(self.path):
            self.file.write(view)

    def close(self) -> str:
        """Brings it to the disk; its digest."""
        with named(self.path):
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
        return self.sha256.hexdigest()


@contextmanager
def named(path: Path) -> Iterator[None]:
    """An OSError of the code inside says which file it is about: a full disk's doesn't."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None


def write_json(path: Path, value: Any) -> None:
    """The file appears whole, or not at all."""
    with named(path):
        write_atomically(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")
        sync_folder(path.parent)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
