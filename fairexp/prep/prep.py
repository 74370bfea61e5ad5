"""The verb `prep`: text files -> a folder of token shards that `fairexp.datasets.tokens.Tokens` reads.

    DIR/meta.json              what is in it: tokenizer, counts, digests; written last
        tokenizer.json         unless the tokens are bytes
        token_bytes.bin        uint16: how many bytes of text each token stands for, where the tokenizer knows
        train_00000.bin ...    uint16 or uint32, little-endian: documents one after the other, each with its end token
        train_documents.bin    uint64: where each document ends in the stream of all shards
        valid_...              likewise

It grows as DIR.partial and gets its name by one rename. The same command goes on after any interruption, and makes the same
bytes with any number of workers.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fairexp.config.rundir import sync_folder
from fairexp.errors import FAILED, INTERRUPTED, UserError
from fairexp.lifetime import die_with
from fairexp.prep import shards, sources, tokenizer
from fairexp.prep.sources import Reading

FORMAT = 1
TRAIN_BYTES = 1 << 30  # of text are enough to train a BPE on; more cost memory and change few merges
SAY_EVERY_S = 5.0


@dataclass(frozen=True)
class Asked:
    """What the command line asks for."""

    sources: tuple[str, ...]  # files, globs, URLs
    out: Path
    tokenizer: str = "bytes"
    end: str | None = None
    reading: Reading = field(default_factory=Reading)
    valid: float = 0.01
    seed: int = 0
    shard_tokens: int = 1 << 28
    workers: int = 1

    def settings(self) -> dict[str, Any]:
        """What the result depends on; not on the number of workers."""
        known = self.tokenizer == "bytes" or tokenizer.wanted_vocab(self.tokenizer) is not None
        file = {} if known else {"tokenizer_sha256": tokenizer.digest(Path(self.tokenizer).expanduser())}
        return {
            "sources": list(self.sources),
            "tokenizer": self.tokenizer,
            "end_of_document": self.end,
            **asdict(self.reading),
            "valid": self.valid,
            "seed": self.seed,
            "shard_tokens": self.shard_tokens,
            **file,
        }


def prep(asked: Asked) -> int:
    """Makes `asked.out`, or goes on making it; the exit code."""
    asked.reading.check()
    vocab_size = tokenizer.wanted_vocab(asked.tokenizer)
    files = sources.find(asked.sources)
    out = asked.out
    plan = json.loads(json.dumps({"settings": asked.settings(), "files": sources.as_json(files)}))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        return _there(out, plan)
    draft = out.with_name(f"{out.name}.partial")
    try:
        draft.mkdir(parents=True, exist_ok=True)
        with _alone(draft):
            return _make(asked, files, plan, draft, vocab_size)
    except KeyboardInterrupt:
        _say(f"interrupted; the same command goes on in {draft}")
        return INTERRUPTED
    except BrokenProcessPool:
        _say("a worker was killed: out of memory? The same command goes on; fewer --workers need less memory")
        return FAILED
    except OSError as error:
        if isinstance(error, FileExistsError | NotADirectoryError | PermissionError):
            raise UserError(f"{error.filename or draft}: {error.strerror}") from None
        raise


def _make(asked: Asked, files: list[sources.File], plan: dict[str, Any], draft: Path, vocab_size: int | None) -> int:
    work, meta = draft / "work", draft / "meta.json"
    if not meta.is_file():
        work.mkdir(exist_ok=True)
        _begin(work / "plan.json", plan, draft)
        _check_room(asked, files, draft)
        os.environ.setdefault("RAYON_NUM_THREADS", str(asked.workers))  # before the tokenizers library counts the cores
        blocks = sources.blocks(files, asked.reading)
        file = "bytes" if asked.tokenizer == "bytes" else str(draft / "tokenizer.json")
        job = shards.Job(
            work, draft, tuple(files), asked.reading, file, asked.end, asked.valid, asked.seed, asked.shard_tokens
        )
        _tokenizer(asked, job, blocks, vocab_size)
        shards.write_json(meta, _tokens(asked, job, blocks, plan))
    elif not _same(json.loads(meta.read_text(encoding="utf-8")), plan):
        raise UserError(_other(draft, plan, json.loads(meta.read_text(encoding="utf-8"))))
    shutil.rmtree(work, ignore_errors=True)
    (draft / "lock").unlink(missing_ok=True)
    with shards.named(asked.out):
        draft.rename(asked.out)
        sync_folder(asked.out.absolute().parent)
    _say(_in_words(asked.out))
    return 0


# --- what is there already ---


def _begin(file: Path, plan: dict[str, Any], draft: Path) -> None:
    if not file.is_file():
        shards.write_json(file, plan)
        return
    before = json.loads(file.read_text(encoding="utf-8"))
    if before["settings"] != plan["settings"]:
        raise UserError(_other(draft, plan, before))
    if before["files"] != plan["files"]:
        _say(f"the sources have changed since {draft} was begun: it begins anew")
        for path in (*file.parent.iterdir(), *draft.glob("*.bin"), draft / "tokenizer.json"):
            path.unlink(missing_ok=True)
        shards.write_json(file, plan)


def _there(out: Path, plan: dict[str, Any]) -> int:
    """Exit code 0 where DIR is what the command would make. UserError: it's something else."""
    try:
        meta = json.loads((out / "meta.json").read_text(encoding="utf-8"))
        same = _same(meta, plan)
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"--out {out}: exists, and is no folder of token shards") from None
    if not same:
        raise UserError(_other(out, plan, meta))
    for split in shards.SPLITS:
        for each in meta["splits"][split]["shards"]:
            path = out / each["file"]
            if not path.is_file() or path.stat().st_size != each["tokens"] * (2 if meta["dtype"] == "uint16" else 4):
                raise UserError(f"{path}: is not whole; remove {out} to make it anew")
    _say(f"{_in_words(out)}; made before")
    return 0


def _same(meta: dict[str, Any], plan: dict[str, Any]) -> bool:
    files = [{key: file[key] for key in ("path", "size")} for file in plan["files"]]
    return meta["settings"] == plan["settings"] and meta["files"] == files


def _other(out: Path, plan: dict[str, Any], before: dict[str, Any]) -> str:
    """What differs, a flag by its name."""
    now, then = plan["settings"], before["settings"]
    differ = [key for key in now if then.get(key) != now[key]]
    flags = [key for key in differ if key not in ("sources", "tokenizer_sha256")]
    parts = []
    if flags:
        parts = ["with " + ", ".join(f"--{key.replace('_', '-')} {then.get(key)} and not {now[key]}" for key in flags)]
    elif "tokenizer_sha256" in differ:
        parts = [f"with another {now['tokenizer']}"]
    if "sources" in differ or not differ:  # by their names, or by their sizes
        parts = ["from other sources", *parts]
    return f"--out {out}: was made {', '.join(parts)}; remove it, or choose another folder"


def _check_room(asked: Asked, files: Sequence[sources.File], draft: Path) -> None:
    """UserError, where the disk can't hold the shards: known beforehand of the bytes of plain text."""
    if asked.tokenizer != "bytes":
        return
    size = 2 * sum(file.size for file in files if file.kind == "text" and not file.packed)
    # the tokens of all blocks, and while a shard is written its blocks are there too
    need = size + min(size, 2 * asked.shard_tokens * asked.workers)
    need -= sum(path.stat().st_size for path in draft.rglob("*") if path.is_file())
    free = shutil.disk_usage(draft).free
    if need > free:
        raise UserError(f"{draft}: needs {need / 1e9:,.3f} GB, and its disk has {free / 1e9:,.3f} GB free")


def _in_words(out: Path) -> str:
    meta = json.loads((out / "meta.json").read_text(encoding="utf-8"))
    parts = [
        f"{split} {facts['tokens']:,} tokens of {facts['documents']:,} documents, {facts['bytes'] / 1e6:,.1f} MB of text"
        for split, facts in meta["splits"].items()
    ]
    return f"{out}: {'; '.join(parts)}; vocabulary {meta['vocab_size']:,}"


@contextmanager
def _alone(draft: Path) -> Iterator[None]:
    with open(draft / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{draft}: another `fairexp prep` is at work there") from None
        yield


# --- the work ---


def _tokenizer(asked: Asked, job: shards.Job, blocks: Sequence[sources.Block], vocab_size: int | None) -> None:
    """Puts tokenizer.json into the folder, if there is one, and sees that it can be used."""
    file = job.out / "tokenizer.json"
    if job.tokenizer != "bytes" and not file.is_file():
        draft = job.work / "tokenizer.json"
        if vocab_size is None:
            with shards.named(draft):
                shutil.copyfile(Path(asked.tokenizer).expanduser(), draft)
            tokenizer.FromFile(draft, asked.end)
        else:
            _say(f"training a byte-level BPE of {vocab_size:,} tokens")
            tokenizer.train(_some_texts(job, blocks), vocab_size, draft)
        draft.replace(file)
    found = job.load()
    if vocab_size is not None and found.vocab_size < vocab_size:
        _say(f"the text has words for a vocabulary of {found.vocab_size:,} only, not {vocab_size:,}")


def _some_texts(job: shards.Job, blocks: Sequence[sources.Block]) -> Iterator[bytes]:
    """Texts to train a tokenizer on: of evenly spaced blocks, without what is validated on."""
    every = -(-sum(file.size for file in job.files) // TRAIN_BYTES) or 1
    for block in blocks[::every]:
        for file, document in sources.documents(job.files, block, job.reading):
            if not shards.is_valid(job.seed, file, document.begin, job.valid):
                yield document.text


def _tokens(asked: Asked, job: shards.Job, blocks: Sequence[sources.Block], plan: dict[str, Any]) -> dict[str, Any]:
    """Makes all that isn't made yet: what meta.json says."""
    found = job.load()
    dtype, table = shards.dtype_of(found.vocab_size), found.token_bytes()
    facts = [shards.block_done(job.work, number) for number in range(len(blocks))]
    with _Workers(asked.workers) as workers:
        missing = [number for number, done in enumerate(facts) if done is None]
        for number, done in workers.each("blocks", shards.make_block, job, [(n, blocks[n]) for n in missing]):
            facts[number] = done
        known: list[dict[str, Any]] = facts  # type: ignore[assignment]
        if not any(block["train"]["tokens"] for block in known):
            raise UserError(f"{' '.join(asked.sources)}: no text to train on" + _all_valid(known, asked.valid))
        cuts = [shard for split in shards.SPLITS for shard in shards.cut(split, known, asked.shard_tokens)]
        # in order, so that the blocks whose tokens are all in shards can go: both together would need twice the room
        cuts.sort(key=lambda shard: (shard.parts[-1][0], shard.split))
        made = {shard.file: shards.shard_done(job, shard, dtype.itemsize) for shard in cuts}
        pending = [shard for shard in cuts if made[shard.file] is None]
        needed = {block for shard in pending for block, _, _ in shard.parts}
        again = [
            (n, blocks[n])
            for n in set(range(len(blocks))) - set(missing)
            if not shards.block_whole(job.work, n, known[n], n in needed)
        ]
        for _ in workers.each("blocks", shards.make_block, job, again):
            pass
        left = {shard.file: {block for block, _, _ in shard.parts} for shard in pending}
        for number, done in workers.each(
            "shards", _numbered_shard, job, [(n, (shard, dtype.itemsize)) for n, shard in enumerate(pending)]
        ):
            shard = pending[number]
            made[shard.file] = done
            gone = left.pop(shard.file)
            for block in gone - {block for blocks_of in left.values() for block in blocks_of}:
                for split in shards.SPLITS:
                    shards.block_files(job.work, block, split)[0].unlink(missing_ok=True)
    splits = {}
    for split in shards.SPLITS:
        totals = {key: sum(block[split][key] for block in known) for key in ("tokens", "documents", "bytes")}
        mine = [made[shard.file] for shard in sorted(cuts, key=lambda shard: shard.file) if shard.split == split]
        splits[split] = {**totals, "index": shards.write_index(job, split, len(blocks)), "shards": mine}
    exact = None
    if table is not None and all(block["exact"] for block in known):
        with shards.Out(job.out / "token_bytes.bin") as file:
            file.write(table.astype("<u2"))
            exact = {"file": file.path.name, "sha256": file.close()}
    about = {
        "vocab_size": found.vocab_size,
        "end_of_document": found.end,
        "dtype": dtype.name,
        "tokenizer": "bytes" if job.tokenizer == "bytes" else tokenizer.digest(Path(job.tokenizer)),
        "token_bytes": exact,
        "splits": splits,
    }
    return {
        "format": FORMAT,
        # of the content: where it came from and how it was cut into blocks doesn't matter
        "fingerprint": hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest(),
        **about,
        "empty_documents": sum(block["empty"] for block in known),  # left out
        "settings": plan["settings"],
        "files": [{key: file[key] for key in ("path", "size")} for file in plan["files"]],
    }


def _all_valid(known: Sequence[dict[str, Any]], fraction: float) -> str:
    there = sum(block["valid"]["documents"] for block in known)
    return f"; --valid {fraction} has taken all {there} documents" if there else ""


def _numbered_shard(job: shards.Job, number: int, what: tuple[shards.Shard, int]) -> dict[str, Any]:
    return shards.make_shard(job, *what)


class _Workers:
    """Processes that work beside each other; this one alone, where one is asked for."""

    def __init__(self, number: int):
        self.number = number
        self.pool: ProcessPoolExecutor | None = None
        self.others = set(multiprocessing.active_children())

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.pool is None:
            return
        if kind is not None:  # what they are at is lost in any case
            self.pool.shutdown(wait=False, cancel_futures=True)
            for child in set(multiprocessing.active_children()) - self.others:
                child.kill()
        else:
            self.pool.shutdown()

    def each(
        self, what: str, work: Callable[[shards.Job, int, Any], Any], job: shards.Job, items: Sequence[tuple[int, Any]]
    ) -> Iterator[tuple[int, Any]]:
        """Each item's number and what the work gave, in their order; says how far it is."""
        progress = _Progress(what, len(items))
        if min(self.number, len(items)) <= 1:
            for number, item in items:
                done = work(job, number, item)
                progress.add(done)
                yield number, done
            return
        if self.pool is None:
            # spawned, not forked: the tokenizers library has threads, which a fork loses
            context = multiprocessing.get_context("spawn")
            self.pool = ProcessPoolExecutor(self.number, context, initializer=_begin_worker, initargs=(os.getpid(),))
        queue: list[tuple[int, Future[Any]]] = []
        waiting = iter(items)
        for number, item in waiting:
            queue.append((number, self.pool.submit(work, job, number, item)))
            if len(queue) < 2 * self.number:
                continue
            first, future = queue.pop(0)
            progress.add(future.result())
            yield first, future.result()
        for first, future in queue:
            progress.add(future.result())
            yield first, future.result()


def _begin_worker(parent: int) -> None:
    die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it and ends this
    os.environ["RAYON_NUM_THREADS"] = "1"  # the processes are the parallelism


class _Progress:
    def __init__(self, what: str, count: int):
        self.what, self.count = what, count
        self.done, self.bytes = 0, 0
        self.began = self.said = time.monotonic()

    def add(self, facts: dict[str, Any]) -> None:
        self.done += 1
        self.bytes += sum(facts[split]["bytes"] for split in shards.SPLITS if split in facts)
        now = time.monotonic()
        if now - self.said >= SAY_EVERY_S or (self.done == self.count and now - self.began >= SAY_EVERY_S):
            self.said = now
            rate = f", {self.bytes / 1e6 / (now - self.began):.1f} MB of text/s" if self.bytes else ""
            _say(f"{self.done} of {self.count} {self.what}{rate}")


def _say(text: str) -> None:
    print(f"prep: {text}", file=sys.stderr, flush=True)
