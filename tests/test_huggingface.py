"""Rows of Hugging Face's data sets and of JSON Lines files: whole batches, typed by the data, and nothing but data."""

import io
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from fairexp.datasets import json_lines
from fairexp.datasets.huggingface import HuggingFaceImages, HuggingFaceRows
from fairexp.datasets.image_folder import ImageFolder
from fairexp.datasets.json_lines import JSONLines

datasets = pytest.importorskip("datasets")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def caches(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "datasets")
    datasets.disable_progress_bars()

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)


COUNT = 50
COLUMNS = {"id": "id", "score": "score", "tokens": "tokens", "text": "text"}


def rows(first: int = 0, count: int = COUNT) -> list[dict[str, Any]]:
    return [
        {"id": i, "score": i / 4, "tokens": [i, i + 1], "text": f"é{i}", "grid": [[i, 0.5], [0.0, 1.0]]}
        for i in range(first, first + count)
    ]


def saved(root: Path) -> HuggingFaceRows:
    features = datasets.Features(
        {
            "id": datasets.Value("int32"),
            "score": datasets.Value("float64"),
            "tokens": datasets.List(datasets.Value("uint16")),
            "text": datasets.Value("string"),
            "grid": datasets.Array2D((2, 2), "float32"),
        }
    )
    data = datasets.Dataset.from_list(rows(), features=features)
    data.save_to_disk(root / "saved", num_shards=3)
    return HuggingFaceRows(root / "saved", None, None, COLUMNS | {"grid": "grid"})


def splits(root: Path) -> HuggingFaceRows:
    data = datasets.Dataset.from_list(rows())
    datasets.DatasetDict({"train": data, "test": data.select(range(5))}).save_to_disk(root / "splits")
    assert len(HuggingFaceRows(root / "splits", None, "test", COLUMNS)) == 5
    return HuggingFaceRows(root / "splits", None, "train", COLUMNS)


def parquet(root: Path) -> HuggingFaceRows:
    folder = root / "files [1]"
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(rows(30, 20)), folder / "b.parquet")
    pq.write_table(pa.Table.from_pylist(rows(0, 30)), folder / "a.parquet")
    return HuggingFaceRows(folder, "*.parquet", None, COLUMNS)


def write_lines(path: Path, rows: list[Any], end: str = "\n") -> None:
    path.write_bytes(end.join(json.dumps(row) for row in rows).encode())


def json_files(root: Path) -> HuggingFaceRows:
    write_lines(root / "b.jsonl", rows(30, 20))
    write_lines(root / "a.jsonl", rows(0, 30))
    return HuggingFaceRows(root, "*.jsonl", None, COLUMNS)


def lines(root: Path) -> JSONLines:
    write_lines(root / "b.jsonl", rows(30, 20), "\r\n")
    write_lines(root / "a.jsonl", rows(0, 30), "\n\n  \n")
    return JSONLines(root, "*.jsonl", COLUMNS)


@pytest.mark.parametrize("make", [saved, splits, parquet, json_files, lines])
def test_a_batch_is_gathered_in_the_order_that_was_asked(tmp_path: Path, make: Callable[[Path], Any]) -> None:
    data = make(tmp_path)
    assert len(data) == COUNT
    wanted = torch.tensor([49, 0, 31, 0, 29, 30, 7])
    batch = data.__getitems__(wanted)
    assert torch.equal(batch["id"], wanted)
    assert torch.equal(batch["score"], wanted.float() / 4)
    assert torch.equal(batch["tokens"], wanted[:, None] + torch.arange(2))
    assert batch["text"] == [f"é{i}" for i in wanted.tolist()]
    if "grid" in batch:
        assert torch.equal(batch["grid"][:, 0, 0], wanted.float())
    data.columns = ["id", "score"]
    ids, _ = data.__getitems__(wanted)
    assert torch.equal(ids, wanted)
    assert data.fingerprint["samples"] == COUNT
    assert data.fingerprint["bytes"] > 0


def picture(number: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 255, (30, 40, 3)).astype(np.uint8)).save(out, "JPEG")
    return out.getvalue()


def test_images_are_an_image_folders_and_no_path_is_followed(tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / split / "class").mkdir(parents=True)
    for number in range(4):
        (tmp_path / f"train/class/{number}.jpg").write_bytes(picture(number))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    images: list[dict] = [{"bytes": picture(number), "path": None} for number in range(3)]
    images.append({"bytes": None, "path": str(tmp_path / "train/class/3.jpg")})
    data = datasets.Dataset.from_dict({"image": images, "label": [0, 1, 1, 0]}, features=features)
    data.to_parquet(tmp_path / "a.parquet")
    for augment in (False, True):
        read = HuggingFaceImages(tmp_path, "a.parquet", None, ["image", "label"], 32, 2, augment)
        folder = ImageFolder(tmp_path, "train", 32, 1, augment)
        for index in range(3):
            expected, got = (torch.manual_seed(index) and data[index][0] for data in (folder, read))
            assert torch.equal(expected, got)
    assert [int(read[index][1]) for index in range(3)] == [0, 1, 1]
    with pytest.raises(ValueError, match=r"a\.parquet: row 3 has no bytes in 'image': paths to other files aren't"):
        read[3]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("splits", None, "nosuch", ["id"]), "split='nosuch': it has train, test"),
        (("splits/test", None, "test", ["id"]), "split='test': it has no splits; null"),
        (("splits/test", None, None, ["nosuch"]), "has no column 'nosuch'; it has id, score, tokens, text, grid"),
        ((".", "*.txt", None, ["id"]), "has no *.txt"),
        (("empty", None, None, ["id"]), "empty has no data set of save_to_disk; for other files, set `files`"),
        ((".", "broken.parquet", None, ["id"]), "broken.parquet: can't be read as a data set: "),
        ((".", "code.*", None, ["id"]), "takes files of one kind, .parquet, .json, .jsonl, .csv; got .pkl, .py"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_line(tmp_path: Path, arguments: tuple, line: str) -> None:
    splits(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no PAR1")
    for name in ("code.py", "code.pkl"):
        (tmp_path / name).write_text("raise SystemExit('it ran')")
    with pytest.raises(ValueError, match=re.escape(line)) as caught:
        HuggingFaceRows(tmp_path / arguments[0], *arguments[1:])
    assert "\n" not in str(caught.value)


# JSON Lines


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({"id": 1, "score": "high"}, "row 1 (byte 32): its 'score' is 'high', not double as in the first row"),
        ({"id": 0.5, "score": 1}, "row 1 (byte 32): its 'id' is '0.5', not int64 as in the first row"),
        ({"id": 10**30, "score": 1}, "its 'id' is '1000000"),
        ({"id": True, "score": 1}, "its 'id' is 'True', not int64"),
        ({"id": "5", "score": 1}, "its 'id' is '5', not int64"),
        ({"id": 1}, "column 'score' has no value in 1 of these rows"),
        ([1], "row 1 (byte 32) is no JSON object: a list, not an object"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: Any, line: str) -> None:
    write_lines(tmp_path / "a.jsonl", [{"id": 0, "score": 0.5, "x": 0}, row])
    data = JSONLines(tmp_path, "*.jsonl", ["id", "score"])
    with pytest.raises(ValueError, match=re.escape(line)):
        data.__getitems__(torch.arange(2))


def test_a_line_that_is_no_json_is_named_and_does_not_end_the_process(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"id": 1}\n{"id": 2\n' + b"[" * 100_000 + b'\n{"id": 3}')
    data = JSONLines(tmp_path, "*.jsonl", ["id"])
    assert data.__getitems__([0, 3])[0].tolist() == [1, 3]
    for index in (1, 2):
        with pytest.raises(ValueError, match=rf"a\.jsonl: row {index} \(byte \d+\) is no JSON object: "):
            data.__getitems__([index])


def test_a_whole_number_is_a_float_where_the_first_row_has_one(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [{"score": 0.5}, {"score": 2}])
    data = JSONLines(tmp_path, "*.jsonl", ["score"])
    assert data.__getitems__([1])[0].dtype == torch.float32


def test_lines_are_found_over_reads_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = ["{}", "", '{"a": 1}', " ", '{"b": "' + "x" * 40 + '"}', "", "{}"]
    path = tmp_path / "a.jsonl"
    for end in ("", "\n"):
        path.write_bytes(("\n".join(text) + end).encode())
        size = path.stat().st_size
        whole = json_lines.build(path, size)
        found = [
            path.read_bytes()[a:b].decode() for a, b in zip(*map(whole.arrays.get, ("starts", "ends")), strict=True)
        ]
        assert found == [line for line in text if line.strip()]
        assert json_lines.fits(whole, size)
        assert not json_lines.fits(whole, size - 3)
        for chunk in (1, 2, 3, 7, 64):
            monkeypatch.setattr(json_lines, "CHUNK", chunk)
            assert json_lines.build(path, size).digest() == whole.digest()


def test_an_index_of_lines_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = lines(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"a.jsonl", "b.jsonl", "a.jsonl.index", "b.jsonl.index"}
    monkeypatch.setattr(json_lines, "build", lambda path, size: pytest.fail("built again"))
    assert JSONLines(tmp_path, "*.jsonl", COLUMNS).fingerprint == data.fingerprint
    monkeypatch.undo()
    os.truncate(tmp_path / "a.jsonl", 1000)
    assert len(JSONLines(tmp_path, "*.jsonl", COLUMNS)) < COUNT


def test_a_window_of_lines_is_a_permutation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lines, "BLOCK_LINES", 8)
    lines(tmp_path)
    order = JSONLines(tmp_path, "*.jsonl", COLUMNS, window=2).permutation(torch.Generator().manual_seed(0)).tolist()
    assert sorted(order) == list(range(COUNT))
    assert len({index // 8 for index in order[:8]}) <= 4
