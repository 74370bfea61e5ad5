"""`fairexp prep`: the same shards from the same text, whoever works on it and however often it is interrupted; and what is wrong
with a source, in one line."""

import gzip
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fairexp import cli
from fairexp.prep import prep as prepping
from fairexp.prep import shards, sources

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "größe", "naïve", "東京", "runs"]


def text(number: int, words: int = 30) -> str:
    """A made-up document."""
    return " ".join(WORDS[(number * 7 + i * i) % len(WORDS)] for i in range(number % words + 1)) + f" {number}"


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that little text has several."""
    monkeypatch.setattr(sources, "BLOCK_BYTES", 2000)
    monkeypatch.setattr(sources, "CHUNK", 512)
    monkeypatch.setattr(sources, "REACH", 64)
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: None
    )  # no power failure is tested, and a slow disk would be waited for


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    """300 documents, one a line, and some blank lines."""
    path, blank = tmp_path / "lines.jsonl", {50: "\n", 100: "  \n", 299: "\n\n"}
    rows = [
        json.dumps({"id": n, "text": text(n)}, ensure_ascii=n % 2 == 0) + "\n" + blank.get(n, "") for n in range(300)
    ]
    path.write_text("".join(rows))
    return path


def prep(*words: object) -> int:
    return cli.main(["prep", *map(str, words)])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def meta_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "meta.json").read_text())


def texts(folder: Path, split: str) -> list[str]:
    """The documents of a folder of bytes."""
    meta = meta_of(folder)
    facts = meta["splits"][split]
    stream = np.concatenate(
        [np.zeros(0, meta["dtype"]), *(np.fromfile(folder / each["file"], "<u2") for each in facts["shards"])]
    )
    ends = np.fromfile(folder / facts["index"]["file"], "<u8").astype(int)
    found = [stream[begin:end] for begin, end in zip([0, *ends[:-1]], ends, strict=True)]
    assert all(each[-1] == 256 and (each[:-1] < 256).all() for each in found)
    assert (len(stream), len(found)) == (facts["tokens"], facts["documents"])
    return [each[:-1].astype(np.uint8).tobytes().decode() for each in found]


# What comes out


def test_every_line_is_a_document_once_and_in_order(lines: Path, tmp_path: Path) -> None:
    assert prep(lines, "--out", tmp_path / "out", "--valid", 0.2, "--workers", 1) == 0
    train, valid = (texts(tmp_path / "out", split) for split in ("train", "valid"))
    assert sorted(train + valid) == sorted(text(n) for n in range(300))
    assert train == sorted(train, key=lambda each: int(each.split()[-1]))
    assert 30 < len(valid) < 90
    files = ["train_00000.bin", "train_documents.bin", "valid_00000.bin", "valid_documents.bin"]
    assert list(contents(tmp_path / "out")) == ["meta.json", "token_bytes.bin", *files]
    assert not (tmp_path / "out.partial").exists()
    meta = meta_of(tmp_path / "out")
    assert sum(meta["splits"][split]["bytes"] for split in ("train", "valid")) == sum(
        len(text(n).encode()) for n in range(300)
    )
    for split in ("train", "valid"):
        for each in [*meta["splits"][split]["shards"], meta["splits"][split]["index"]]:
            assert hashlib.sha256((tmp_path / "out" / each["file"]).read_bytes()).hexdigest() == each["sha256"]


@pytest.mark.parametrize("kind", ["jsonl.gz", "parquet", "txt", "url"])
def test_any_kind_of_file_gives_the_same_documents(lines: Path, tmp_path: Path, kind: str) -> None:
    path, flags = tmp_path / f"other.{kind}", []
    if kind == "jsonl.gz":
        path.write_bytes(gzip.compress(lines.read_bytes()))
    elif kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        table = pyarrow.table({"id": range(300), "body": [text(n) for n in range(300)]})
        parquet.write_table(table, path, row_group_size=40)
        flags = ["--field", "body"]
    elif kind == "txt":
        path.write_text("\n\n".join(text(n) for n in range(300)))
        flags = ["--split-on", r"\n\n+"]
    else:
        pytest.importorskip("fsspec")
        path, _ = f"file://{tmp_path}/*.jsonl", flags  # type: ignore[assignment]
    assert prep(path, "--out", tmp_path / "out", "--valid", 0, "--workers", 1, *flags) == 0
    assert texts(tmp_path / "out", "train") == [text(n) for n in range(300)]


def test_a_tables_row_groups_change_nothing_and_what_is_no_text_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    def made(name: str, rows: list[Any], size: int, code: int = 0) -> str:
        parquet.write_table(pyarrow.table({"text": rows}), tmp_path / f"{name}.parquet", row_group_size=size)
        flags = ["--valid", 0.2, "--workers", 1]
        assert prep(tmp_path / f"{name}.parquet", "--out", tmp_path / name, *flags) == code
        return capsys.readouterr().err

    for size in (300, 7):
        made(str(size), [text(n) for n in range(300)], size)
    assert meta_of(tmp_path / "300")["fingerprint"] == meta_of(tmp_path / "7")["fingerprint"]
    assert texts(tmp_path / "7", "valid")
    assert f"{tmp_path}/null.parquet: row 12: its 'text' is null" in made("null", ["a"] * 11 + [None], 5, 2)
    assert "its column 'text' is not of texts but int64" in made("numbers", [1, 2], 5, 2)


def test_a_text_of_another_encoding_is_utf8_in_the_shards(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("Größe “a” — 5 €\n\nnaïve".encode("cp1252"))
    flags = ["--encoding", "cp1252", "--split-on", r"\n\n", "--valid", 0, "--workers", 1]
    assert prep(tmp_path / "a.txt", "--out", tmp_path / "out", *flags) == 0
    assert texts(tmp_path / "out", "train") == ["Größe “a” — 5 €", "naïve"]


def test_a_packed_file_gives_the_same_bytes_as_a_plain_one(lines: Path, tmp_path: Path) -> None:
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(lines.read_bytes()))
    for source, out in ((lines, "plain"), (tmp_path / "packed.jsonl.gz", "packed")):
        assert prep(source, "--out", tmp_path / out, "--valid", 0.2, "--workers", 1) == 0
    plain, packed = meta_of(tmp_path / "plain"), meta_of(tmp_path / "packed")
    assert plain["fingerprint"] == packed["fingerprint"]


@pytest.mark.parametrize("separator", [r"\n\n+(?=\S)", r"\n\n+", "\n", "(?:=|-){3,60}"])
def test_a_separator_is_found_wherever_blocks_and_reads_are_cut(separator: str, tmp_path: Path) -> None:
    draw = random.Random(0)
    for name in ("plain.txt", "packed.txt.gz"):
        parts = []
        for _ in range(3000):
            long = "w" * draw.randint(1, 700)  # so that the first separator of a block may lie across two reads
            parts += [
                draw.choice(["x", "some words", "größe\n", " y", long]),
                draw.choice("\n=-") * draw.randint(1, 30),
            ]
        whole = "".join(parts)
        data = whole.encode()
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
        out = tmp_path / name.partition(".")[0]
        assert prep(tmp_path / name, "--out", out, "--split-on", separator, "--valid", 0, "--workers", 1) == 0
        assert texts(out, "train") == [each for each in re.split(separator, whole) if each]


def test_each_text_file_is_a_document_and_empty_ones_are_left_out(tmp_path: Path) -> None:
    for number in range(20):
        mark = "\ufeff" * (number % 3 == 0)  # that some editors write
        (tmp_path / f"{number:02}.txt").write_text(mark + text(number) * (number % 5 > 0))
    assert prep(tmp_path / "*.txt", "--out", tmp_path / "out", "--valid", 0, "--workers", 1) == 0
    assert texts(tmp_path / "out", "train") == [text(number) for number in range(20) if number % 5]
    assert meta_of(tmp_path / "out")["empty_documents"] == 4
    assert prep(tmp_path / "*.txt", "--out", tmp_path / "some", "--valid", 0.4, "--workers", 1) == 0
    assert 2 < len(texts(tmp_path / "some", "valid")) < 14, "all begin at byte 0 of their file"


def test_documents_behind_others_leave_the_split_of_those_as_it_was(lines: Path, tmp_path: Path) -> None:
    assert prep(lines, "--out", tmp_path / "before", "--valid", 0.3, "--workers", 1) == 0
    with lines.open("a") as file:
        file.writelines(json.dumps({"text": text(n)}) + "\n" for n in range(300, 400))
    assert prep(lines, "--out", tmp_path / "after", "--valid", 0.3, "--workers", 1) == 0
    before, after = (texts(tmp_path / out, "valid") for out in ("before", "after"))
    assert after[: len(before)] == before
    assert len(after) > len(before)
    assert prep(lines, "--out", tmp_path / "seed", "--valid", 0.3, "--workers", 1, "--seed", 1) == 0
    assert texts(tmp_path / "seed", "valid") != after


def test_shards_have_one_size_and_are_one_stream(lines: Path, tmp_path: Path) -> None:
    for size in (1000, 10**6):
        flags = ["--shard-tokens", size, "--valid", 0.1, "--workers", 1]
        assert prep(lines, "--out", tmp_path / str(size), *flags) == 0
    sizes = [each["tokens"] for each in meta_of(tmp_path / "1000")["splits"]["train"]["shards"]]
    assert len(sizes) > 5
    assert set(sizes[:-1]) == {1000}
    for split in ("train", "valid"):
        assert texts(tmp_path / "1000", split) == texts(tmp_path / str(10**6), split)


# Tokenizers


def test_a_bpe_is_trained_alike_each_time_and_gives_the_text_back(lines: Path, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    for out in ("one", "two"):
        assert prep(lines, "--out", tmp_path / out, "--tokenizer", "bpe:300", "--valid", 0.2, "--workers", 1) == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    meta = meta_of(tmp_path / "one")
    assert meta["vocab_size"] == 300
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "one/tokenizer.json"))
    stream = np.fromfile(tmp_path / "one/train_00000.bin", "<u2")
    decoded = tokenizer.decode(stream.tolist(), skip_special_tokens=False).split("<|endoftext|>")
    assert prep(lines, "--out", tmp_path / "bytes", "--valid", 0.2, "--workers", 1) == 0
    assert decoded == [*texts(tmp_path / "bytes", "train"), ""]
    bytes_of = np.fromfile(tmp_path / "one/token_bytes.bin", "<u2").astype(int)
    assert bytes_of[stream].sum() == meta["splits"]["train"]["bytes"]


def test_a_bpe_sees_nothing_of_what_is_validated_on(lines: Path, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    flags = ["--valid", 0.3, "--workers", 1]
    lines.write_text("".join(line for line in lines.read_text().splitlines(True) if line.strip()))
    assert prep(lines, "--out", tmp_path / "bytes", *flags) == 0
    held_out = set(texts(tmp_path / "bytes", "valid"))
    for name, changes in (("before", False), ("after", True)):
        with (tmp_path / f"{name}.jsonl").open("w") as file:
            for line in lines.read_text().splitlines():
                row = json.loads(line)
                if changes and row["text"] in held_out:
                    line = json.dumps({"text": "q" * (len(line.encode()) - len('{"text": ""}'))})  # as long as it was
                file.write(line + "\n")
        assert prep(tmp_path / f"{name}.jsonl", "--out", tmp_path / name, "--tokenizer", "bpe:300", *flags) == 0
    before, after = contents(tmp_path / "before"), contents(tmp_path / "after")
    assert before["tokenizer.json"] == after["tokenizer.json"]
    assert before["train_00000.bin"] == after["train_00000.bin"]
    assert before["valid_00000.bin"] != after["valid_00000.bin"]


def test_a_tokenizer_that_is_given_is_copied_and_the_end_of_text_in_a_text_ends_nothing(
    lines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tokenizers")
    assert prep(lines, "--out", tmp_path / "one", "--tokenizer", "bpe:300", "--workers", 1) == 0
    file = tmp_path / "one/tokenizer.json"
    (tmp_path / "trap.txt").write_text("before <|endoftext|> after")
    flags = ["--tokenizer", file, "--valid", 0, "--workers", 1]
    assert prep(tmp_path / "trap.txt", "--out", tmp_path / "two", *flags) == 0
    assert (tmp_path / "two/tokenizer.json").read_bytes() == file.read_bytes()
    meta = meta_of(tmp_path / "two")
    assert meta["tokenizer"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert np.fromfile(tmp_path / "two/train_00000.bin", "<u2").tolist().count(meta["end_of_document"]) == 1
    assert meta["token_bytes"], "it stands for as many bytes as it is long"
    file.write_bytes((tmp_path / "one/tokenizer.json").read_bytes() + b"\n")
    assert prep(tmp_path / "trap.txt", "--out", tmp_path / "two", *flags) == 2
    assert f"two: was made with another {file}; remove" in capsys.readouterr().err


def test_what_a_tokenizer_adds_and_cuts_for_a_models_input_is_no_part_of_the_text(lines: Path, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    assert prep(lines, "--out", tmp_path / "one", "--tokenizer", "bpe:300", "--valid", 0, "--workers", 1) == 0
    file = tmp_path / "input.json"
    changed = tokenizers.Tokenizer.from_file(str(tmp_path / "one/tokenizer.json"))
    changed.enable_truncation(3)
    changed.enable_padding(length=9)
    changed.post_processor = tokenizers.processors.TemplateProcessing("<|endoftext|> $A", None, [("<|endoftext|>", 0)])
    changed.save(str(file))
    assert prep(lines, "--out", tmp_path / "two", "--tokenizer", file, "--valid", 0, "--workers", 1) == 0
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert one["train_00000.bin"] == two["train_00000.bin"]


def test_a_vocabulary_above_65_536_takes_four_bytes_a_token(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"</s>": 0, "fox": 70_000}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="</s>"))
    words.save(str(tmp_path / "words.json"))
    (tmp_path / "a.txt").write_text("fox")
    flags = ["--tokenizer", tmp_path / "words.json", "--valid", 0, "--workers", 1]
    assert prep(tmp_path / "a.txt", "--out", tmp_path / "out", *flags) == 0
    assert np.fromfile(tmp_path / "out/train_00000.bin", "<u4").tolist() == [70_000, 0]
    meta = meta_of(tmp_path / "out")
    assert (meta["dtype"], meta["vocab_size"], meta["token_bytes"]) == ("uint32", 70_001, None)


# Again, beside each other, and after a kill


def test_two_processes_make_the_same_bytes_as_one(lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "BLOCK_BYTES", 8000)
    for workers in (1, 2):
        flags = ["--valid", 0.1, "--workers", workers, "--shard-tokens", 3000]
        assert prep(lines, "--out", tmp_path / str(workers), *flags) == 0
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


class Killed(BaseException):
    """What nothing catches: the disk stays as it was at that moment."""


def test_it_goes_on_from_any_moment_to_the_same_bytes_and_makes_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = tmp_path / "lines.jsonl"
    lines.write_text("".join(json.dumps({"text": text(n)}) + "\n" for n in range(50)))
    flags = ["--valid", 0.1, "--workers", 1, "--shard-tokens", 1500]
    assert prep(lines, "--out", tmp_path / "whole", *flags) == 0
    whole = contents(tmp_path / "whole")
    assert len(whole) >= 6
    make_block, made = shards.make_block, []

    def noted(job: shards.Job, number: int, block: Any) -> Any:
        made.append(number)
        return make_block(job, number, block)

    for at in itertools.count(1):
        out, moment = tmp_path / str(at), itertools.count(1)

        def dies(function: Callable[..., Any], at: int = at, moment: Iterator[int] = moment) -> Callable[..., Any]:
            def call(*args: Any) -> Any:
                if next(moment) == at:
                    raise Killed
                return function(*args)

            return call

        def half(value: Any, file: Any, at: int = at, moment: Iterator[int] = moment, **style: Any) -> None:
            whole = json.dumps(value, **style)
            file.write(whole[: len(whole) // 2])
            file.flush()
            if next(moment) == at:
                raise Killed
            file.write(whole[len(whole) // 2 :])

        with monkeypatch.context() as patch:
            for name in ("write", "close"):
                patch.setattr(shards.Out, name, dies(getattr(shards.Out, name)))
            patch.setattr(shards, "write_json", dies(shards.write_json))
            patch.setattr(json, "dump", half)
            try:
                assert prep(lines, "--out", out, *flags) == 0
            except Killed:
                assert not out.exists()
            else:
                assert at > 40
                return
        done = {int(path.stem.partition("_")[2]) for path in (tmp_path / f"{at}.partial/work").glob("block_*.json")}
        made.clear()
        with monkeypatch.context() as patch:
            patch.setattr(shards, "make_block", noted)
            assert prep(lines, "--out", out, *flags) == 0
        assert contents(out) == whole
        assert not done & set(made), "a block that was done was made again"


def test_what_is_no_longer_whole_is_made_again(lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--valid", 0.1, "--workers", 1, "--shard-tokens", 2000]
    assert prep(lines, "--out", tmp_path / "whole", *flags) == 0
    out, draft = tmp_path / "out", tmp_path / "out.partial"
    monkeypatch.setattr(shards, "write_index", lambda *args: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        prep(lines, "--out", out, *flags)
    monkeypatch.undo()
    monkeypatch.setattr(sources, "BLOCK_BYTES", 2000)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    data = bytearray((draft / "train_00002.bin").read_bytes())
    data[100] ^= 1
    (draft / "train_00002.bin").write_bytes(data)
    (draft / "train_00003.bin").write_bytes(b"")
    (draft / "train_00001.bin").unlink()
    (draft / "work/block_000001.train.lengths").write_bytes(b"12345678")
    assert prep(lines, "--out", out, *flags) == 0
    assert contents(out) == contents(tmp_path / "whole")


def test_after_kill_9_its_workers_end_and_the_same_command_goes_on(tmp_path: Path, environment: dict[str, str]) -> None:
    source = tmp_path / "many.jsonl"
    with source.open("w") as file:
        file.writelines(json.dumps({"text": text(n, 400) * 20}) + "\n" for n in range(300))
    code = """
import sys
from fairexp import cli
from fairexp.prep import sources

sources.BLOCK_BYTES = 1 << 18
if __name__ == "__main__":
    sys.exit(cli.main())
"""
    (tmp_path / "small_blocks.py").write_text(code)
    command = [sys.executable, str(tmp_path / "small_blocks.py"), "prep", str(source), "--tokenizer", "bytes"]

    def words(out: str, workers: int) -> list[str]:
        return [*command, "--workers", str(workers), "--out", str(tmp_path / out)]

    first = subprocess.Popen(words("out", 2), env=environment, stderr=subprocess.DEVNULL)
    work = tmp_path / "out.partial/work"
    while first.poll() is None and len(list(work.glob("block_*.json"))) < 3:
        time.sleep(0.002)
    workers = [Path(f"/proc/{pid}") for pid in Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()]
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert len(workers) >= 2
    until = time.monotonic() + 10
    while any(alive(worker) for worker in workers):
        assert time.monotonic() < until, "a worker outlives the command"
        time.sleep(0.01)
    assert not (tmp_path / "out").exists()
    for out in ("out", "again"):
        assert subprocess.run(words(out, 1), env=environment).returncode == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "again")


def alive(process: Path) -> bool:
    """Whether it runs: one that has ended may wait for somebody who asks how."""
    try:
        return (process / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt, 130, "interrupted; the same command goes on in "),
        (
            BrokenProcessPool,
            1,
            "a worker was killed: out of memory? The same command goes on; fewer --workers need less",
        ),
    ],
)
def test_what_ends_it_is_said_in_a_line(
    error: type[BaseException],
    code: int,
    message: str,
    lines: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shards, "make_shard", lambda *args: (_ for _ in ()).throw(error))
        assert prep(lines, "--out", tmp_path / "out", "--workers", 1) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"prep: {message}")
    assert prep(lines, "--out", tmp_path / "out", "--workers", 1) == 0


def test_asked_again_it_is_there_and_asked_otherwise_it_is_something_else(
    lines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert prep(lines, "--out", out, "--workers", 1) == 0
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert prep(lines, "--out", out, "--workers", 2) == 0
    assert "made before" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    assert prep(lines, "--out", out, "--valid", 0.5) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"fairexp: --out {out}: was made with --valid 0.01 and not 0.5; remove it, or choose another folder"
    (tmp_path / "b.jsonl").write_text(GOOD)
    assert prep(lines, tmp_path / "b.jsonl", "--out", out, "--field", "body") == 2
    assert re.search("was made from other sources, with --field text and not body; remove", capsys.readouterr().err)
    with lines.open("a") as file:
        file.write(GOOD)
    assert prep(lines, "--out", out) == 2
    assert "was made from other sources; " in capsys.readouterr().err
    os.truncate(lines, lines.stat().st_size - len(GOOD))
    os.truncate(out / "train_00000.bin", 10)
    assert prep(lines, "--out", out) == 2
    assert "train_00000.bin: is not whole" in capsys.readouterr().err


def test_a_source_that_has_changed_meanwhile_makes_it_begin_anew(
    lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shards, "write_index", lambda *args: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        prep(lines, "--out", tmp_path / "out", "--workers", 1)
    monkeypatch.undo()
    lines.write_text(lines.read_text().replace("fox", "cat"))
    assert prep(lines, "--out", tmp_path / "out", "--workers", 1, "--valid", 0) == 2
    assert prep(lines, "--out", tmp_path / "out", "--workers", 1) == 0
    assert "begins anew" in capsys.readouterr().err
    assert "fox" not in " ".join(texts(tmp_path / "out", "train"))


def test_one_works_in_a_folder_at_a_time(lines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out.partial").mkdir()
    with prepping._alone(tmp_path / "out.partial"):
        assert prep(lines, "--out", tmp_path / "out") == 2
    assert "another `fairexp prep` is at work there" in capsys.readouterr().err


def test_a_full_disk_is_one_line_that_names_the_file(
    lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = shards.Out.__init__

    def full(self: shards.Out, path: Path) -> None:
        opened(self, path)
        self.file.close()
        self.file = open("/dev/full", "wb")  # noqa: SIM115

    monkeypatch.setattr(shards.Out, "__init__", full)
    assert prep(lines, "--out", tmp_path / "out", "--workers", 1) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"fairexp: {tmp_path}/out.partial/work/block_000000.train.bin: No space left on device")
    monkeypatch.undo()
    assert prep(lines, "--out", tmp_path / "out", "--workers", 1) == 0


def test_a_disk_that_is_too_small_is_told_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "a.txt", tmp_path / "out"
    source.write_bytes(b"some text\n\n" * 1_000_000)  # 22 MB of tokens
    room = shutil.disk_usage(tmp_path)
    flags = ["--split-on", r"\n\n", "--workers", 1, "--shard-tokens", 1_000_000]
    monkeypatch.setattr(sources, "BLOCK_BYTES", 32 << 20)
    for free, code in ((23_900_000, 2), (24_000_000, None)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: room._replace(free=free))
        monkeypatch.setattr(shards, "make_block", lambda *args: (_ for _ in ()).throw(Killed))
        if code:
            assert prep(source, "--out", out, *flags) == code
            (line,) = capsys.readouterr().err.splitlines()
            assert line == f"fairexp: {out}.partial: needs 0.024 GB, and its disk has 0.024 GB free"
        else:
            with pytest.raises(Killed):
                prep(source, "--out", out, *flags)


def test_blocks_go_as_soon_as_shards_have_their_tokens(
    lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_shard, rooms = shards.make_shard, []

    def noted(job: shards.Job, *what: Any) -> Any:
        done = make_shard(job, *what)
        rooms.append(sum(path.stat().st_size for path in (tmp_path / "out.partial").rglob("*.bin")))
        return done

    monkeypatch.setattr(shards, "make_shard", noted)
    assert prep(lines, "--out", tmp_path / "out", "--workers", 1, "--shard-tokens", 1000) == 0
    tokens = sum(split["tokens"] for split in meta_of(tmp_path / "out")["splits"].values())
    assert len(rooms) > 10
    # a shard, and the blocks of which a part is in it and the rest in none yet, are there twice
    assert max(rooms) < 2 * tokens + 2 * 1000 + 2 * 2 * sources.BLOCK_BYTES < 3 * tokens
    assert not list((tmp_path / "out").rglob("block*"))


# What is wrong, in one line


GOOD = '{"text": "a"}\n'
BAD: dict[str, tuple[str, bytes, list[str], str]] = {
    "not JSON": ("a.jsonl", (GOOD * 400 + '{"text": \n').encode(), [], "a.jsonl:401: is not JSON"),
    "a field": ("a.jsonl", (GOOD + '{"txt": "a"}\n').encode(), [], "a.jsonl:2: has no field 'text'; nearest: txt"),
    "no text": ("a.jsonl", (GOOD + '{"text": 3}\n').encode(), [], "a.jsonl:2: its 'text' is not a text but a int"),
    "no object": ("a.jsonl", (GOOD + "[1]\n").encode(), [], "a.jsonl:2: is not a JSON object but a list"),
    "surrogate": ("a.jsonl", (GOOD + '{"text": "\\ud800"}\n').encode(), [], "a.jsonl:2: its 'text' holds half of"),
    "UTF-8 line": ("a.jsonl", GOOD.encode() + b'{"text": "\xff"}\n', [], "a.jsonl:2: is not UTF-8 (byte 0xff)"),
    "UTF-8 text": ("a.txt", b"x\n" * 3000 + b"\xe9\n", [], "a.txt:3001: is not UTF-8 (byte 0xe9); --encoding names"),
    "UTF-8 part": (
        "a.txt",
        b"x\n\n" * 3000 + b"\xe9\n",
        ["--split-on", r"\n\n"],
        "a.txt:6001: is not UTF-8 (byte 0xe9); --encoding names",
    ),
    "damaged": ("a.txt.gz", gzip.compress(b"x" * 5000)[:-9], [], "a.txt.gz: damaged: "),
    "no gzip": ("a.txt.gz", b"text", [], "a.txt.gz: damaged: Not a gzipped file"),
    "no table": ("a.parquet", b"text", [], "a.parquet: not a Parquet file"),
    "one JSON": ("a.json", b"{}", [], "a.json: JSON is taken as one object a line, in files that end in .jsonl"),
    "nothing": ("a.txt", b"", [], "no text to train on"),
    "regex": ("a.txt", b"x", ["--split-on", "("], "--split-on (: not a regular expression"),
    "nothing to split on": ("a.txt", b"x", ["--split-on", r"\n*"], r"--split-on \n*: matches nothing at all"),
    "encoding": ("a.txt", b"x", ["--encoding", "utf-16"], "--encoding utf-16: takes utf-8, or one that holds ASCII"),
    "spec": ("a.txt", b"x", ["--tokenizer", "bpe"], "--tokenizer bpe: bpe:SIZE takes a vocabulary of 257 to"),
    "word": ("a.txt", b"x", ["--tokenizer", "byte"], "--tokenizer byte: no such file; takes bytes, bpe:SIZE or"),
    "its file": ("a.txt", b"x", ["--tokenizer", "a.txt"], "tokenizer.json: not a tokenizer.json"),
    "workers": ("a.txt", b"x", ["--workers", "0"], "--workers: takes a whole number >= 1, got 0"),
    "valid": ("a.txt", b"x", ["--valid", "1"], "--valid: takes a fraction from 0 to below 1, got 1"),
    "flag": ("a.txt", b"x", ["--worker", "1"], "--worker: no such flag of this verb; nearest: --workers"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_with_a_source_is_one_line_that_names_it(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    name, data, flags, message = BAD[case]
    Path(name).write_bytes(data)
    assert prep(name, "--out", "out", "--workers", 1, *flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert line.startswith("fairexp: ")
    assert not Path("out").exists()


def test_sources_that_are_none_are_all_named(
    lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    assert prep("missing.txt", "*.none", "folder", lines, "--out", "out") == 2
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "fairexp: missing.txt: No such file or directory"
    assert said[1] == "fairexp: *.none: no such file"
    assert said[2].startswith("fairexp: folder: is a folder; name its files, such as 'folder/**/*.txt'")
    assert prep(lines, lines, "--out", "out") == 2
    assert "named twice" in capsys.readouterr().err
    assert prep(lines) == 2
    assert "--out DIR is missing" in capsys.readouterr().err
    Path("file").touch()
    assert prep(lines, "--out", "file/out") == 2
    assert "Not a directory" in capsys.readouterr().err


def test_prep_loads_no_torch(lines: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    code = "import sys; from fairexp import cli; code = cli.main(sys.argv[1:]); print(*sys.modules); sys.exit(code)"
    command = [sys.executable, "-c", code, "prep", str(lines), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert not {"torch", "wandb", "submitit", "hydra"} & set(done.stdout.split())
