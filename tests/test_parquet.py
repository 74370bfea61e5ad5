"""Rows of Parquet files by index: the same as the whole table's, few at a time in memory; and an order made for them."""

import io
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from fairexp.datasets.columns import need
from fairexp.datasets.image_folder import ImageFolder
from fairexp.datasets.parquet import ParquetImages, ParquetRows, Table
from fairexp.datasets.windows import window_permutation

torch.set_num_threads(1)


def picture(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 255, (30, 40, 3)).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG")
    return out.getvalue()


def write_images(
    root: Path, nested: bool = False, label: Callable[[int], int | None] = lambda number: number % 3
) -> Path:
    for file, (first, count) in enumerate([(0, 5), (5, 0), (5, 7)]):
        images = [picture(number) for number in range(first, first + count)]
        column = [{"bytes": data, "path": "/etc/passwd"} for data in images] if nested else images
        kind = pa.struct({"bytes": pa.binary(), "path": pa.string()}) if nested else pa.binary()
        labels = [label(number) for number in range(first, first + count)]
        table = pa.table(
            {"note": ["x"] * count, "label": pa.array(labels, pa.int64()), "image": pa.array(column, kind)}
        )
        pq.write_table(table, root / f"train-{file}.parquet", row_group_size=3)
    return root


def images(root: Path, augment: bool = False, **more: Any) -> ParquetImages:
    return ParquetImages(root, "train*.parquet", ["image", "label"], 32, 3, augment, **more)


@pytest.mark.parametrize("nested", [False, True])
def test_images_come_by_file_and_row_with_the_pixels_of_an_image_folder(tmp_path: Path, nested: bool) -> None:
    data = images(write_images(tmp_path, nested))
    assert [int(data[index][1]) for index in range(len(data))] == [number % 3 for number in range(12)]
    for split in ("train", "val"):
        (tmp_path / split / "class").mkdir(parents=True)
    for number in range(12):
        (tmp_path / f"train/class/{number:02}.jpg").write_bytes(picture(number))
    for augment in (False, True):
        folder, rows = ImageFolder(tmp_path, "train", 32, 1, augment), images(tmp_path, augment)
        for index in (0, 5, 11):
            expected, got = (torch.manual_seed(index) and data[index][0] for data in (folder, rows))
            assert torch.equal(expected, got)
    assert data.fingerprint == images(tmp_path).fingerprint
    assert (data.fingerprint["files"], data.fingerprint["samples"], data.fingerprint["row_groups"]) == (3, 12, 5)


def numbers(root: Path, count: int = 100, group: int = 7) -> pa.Table:
    random = np.random.default_rng(0)
    table = pa.table(
        {
            "id": pa.array(np.arange(count, dtype=np.int32)),
            "score": pa.array(random.random(count)),
            "tokens": pa.array([[i, i + 1, i + 2] for i in range(count)], pa.list_(pa.uint16())),
            "grid": pa.array([[[i], [i]] for i in range(count)], pa.list_(pa.list_(pa.float32(), 1), 2)),
            "text": [f"é{i}" for i in range(count)],
            "true": [i % 2 == 0 for i in range(count)],
            "ragged": [[0] * (i % 3) for i in range(count)],
            "some": [None if i == 50 else i for i in range(count)],
            "when": pa.array([0] * count, pa.timestamp("s")),
        }
    )
    pq.write_table(table.slice(0, 60), root / "a.parquet", row_group_size=group)
    pq.write_table(table.slice(60), root / "b.parquet", row_group_size=group)
    return table


def test_a_batch_of_rows_is_gathered_in_the_order_that_was_asked(tmp_path: Path) -> None:
    numbers(tmp_path)
    columns = {name: name for name in ("id", "score", "tokens", "grid", "text", "true")}
    data = ParquetRows(tmp_path, "*.parquet", columns)
    wanted = torch.tensor([99, 0, 61, 0, 59, 60, 7])
    got = data.__getitems__(wanted)
    assert torch.equal(got["id"], wanted)
    assert torch.equal(got["tokens"], wanted[:, None] + torch.arange(3))
    assert torch.equal(got["grid"], wanted.float()[:, None, None].expand(-1, 2, 1))
    assert got["text"] == [f"é{i}" for i in wanted.tolist()]
    assert torch.equal(got["true"], wanted % 2 == 0)
    assert got["score"].dtype == torch.float32
    (ids, score) = ParquetRows(tmp_path, "*.parquet", ["id", "score"]).__getitems__(wanted)
    assert torch.equal(ids, wanted)
    assert torch.equal(score, got["score"])
    assert data.table.name(61) == f"{tmp_path}/b.parquet: row 1"
    assert data.table.name(59) == f"{tmp_path}/a.parquet: row 59"


@pytest.mark.parametrize(
    ("column", "line"),
    [
        ("ragged", r"column 'ragged' has lists of 0 to 2 numbers; a batch takes one length"),
        ("some", r"column 'some' has no value in 1 of these rows"),
        ("when", r"column 'when' is timestamp\[ms\]; a batch takes numbers, equally long lists of numbers, and text"),
        ("nosuch", r"a\.parquet has no column 'nosuch'; it has id, score, tokens"),
    ],
)
def test_a_column_that_makes_no_batch_is_named(tmp_path: Path, column: str, line: str) -> None:
    numbers(tmp_path)
    with pytest.raises(ValueError, match=line):
        ParquetRows(tmp_path, "*.parquet", [column]).__getitems__(torch.arange(100))


def test_row_groups_are_read_once_a_window_and_memory_is_bounded(tmp_path: Path) -> None:
    count = 40
    blob = [bytes([i]) * 200_000 for i in range(count)]
    table = pa.table({"id": range(count), "blob": pa.array(blob, pa.binary())})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=4, use_dictionary=False)
    with pytest.raises(
        ValueError, match=r"window=3 row groups take up to 2 MiB, and cache_mb=2: raise it or lower window"
    ):
        Table(tmp_path, "*.parquet", ["blob"], 2, 3)
    with pytest.raises(
        ValueError, match=r"a row group takes up to 1 MiB, and cache_mb=0: raise it, or write the files with"
    ):
        Table(tmp_path, "*.parquet", ["blob"], 0, None)
    data, reads = Table(tmp_path, "*.parquet", ["id", "blob"], 3, 3), []
    order = data.permutation(torch.Generator().manual_seed(0)).tolist()
    assert sorted(order) == list(range(count))
    for index in order:
        before = list(data._held)
        assert data.row(index) == {"id": index, "blob": blob[index]}
        reads += [group for group in data._held if group not in before]
        assert sum(held.nbytes for held in data._held.values()) <= 3 * 2**20
    assert sorted(reads) == list(range(10))


def test_a_window_is_a_permutation_of_its_generator() -> None:
    blocks = [3, 1, 7, 4, 4]
    for window in (None, 1, 2, 5, 9):
        first, again, other = (window_permutation(blocks, window, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
        assert first.tolist() == again.tolist() != other.tolist()
        assert sorted(first.tolist()) == list(range(19))
    with pytest.raises(ValueError, match="window=0: takes 1 or more blocks, or null"):
        window_permutation(blocks, 0, torch.Generator())
    equal = np.repeat(range(6), 4)[window_permutation([4] * 6, 2, torch.Generator().manual_seed(0)).numpy()]
    assert [len(set(window)) for window in np.split(equal, 3)] == [2, 2, 2]
    assert any(len(set(half)) == 2 for window in np.split(equal, 3) for half in np.split(window, 2)), "not mixed"


@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: b"", lambda data: b"text" * 9])
def test_a_file_that_is_not_parquet_is_refused_in_one_line(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = write_images(tmp_path) / "train-2.parquet"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"train-2\.parquet: can't read this Parquet file: [^\n]*$"):
        images(tmp_path)


def test_a_damaged_row_group_is_named(tmp_path: Path) -> None:
    path = write_images(tmp_path) / "train-0.parquet"
    data = bytearray(path.read_bytes())
    data[4:400] = bytes(396)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"train-0\.parquet: can't read row group 0: "):
        images(tmp_path)[0]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda root: write_images(root, label=lambda number: 3), "row 4: its 'label' is 3, not a class of 0 to 2"),
        (lambda root: write_images(root, label=lambda number: None), "row 4: its 'label' is None, not a class"),
        (lambda root: write_table(root, image=[b"no"], label=[0]), "row 0: can't read this image: cannot identify"),
        (
            lambda root: write_table(root, image=pa.array([None], pa.binary()), label=[0]),
            "row 0 has no bytes in 'image'",
        ),
        (lambda root: write_table(root, image=["a.jpg"], label=[0]), "column 'image' is string, not an image file's"),
        (lambda root: write_table(root, image=[b""], label=[0.5]), "column 'label' is double, not a class's number"),
        (lambda root: write_table(root, image=[b""]), "has no column 'label'; it has image"),
        (
            lambda root: write_table(write_images(root), image=[b""], label=pa.array([1], pa.int8())),
            "column 'label' is int8, but int64 in train-0.parquet",
        ),
        (lambda root: root, "has no train*.parquet"),
        (
            lambda root: write_table(root, image=pa.array([], pa.binary()), label=pa.array([], pa.int64())),
            "have no row",
        ),
    ],
)
def test_a_bad_sample_or_file_is_named(tmp_path: Path, change: Callable[[Path], Any], line: str) -> None:
    change(tmp_path)
    with pytest.raises(ValueError, match=re.escape(line)):
        images(tmp_path)[4 if "row 4" in line else 0]


def write_table(root: Path, **columns: Any) -> None:
    pq.write_table(pa.table(columns), root / "train-9.parquet")


def test_a_path_in_an_image_column_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes(picture(0))
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    column = pa.array([{"bytes": None, "path": str(tmp_path / "secret.jpg")}], kind)
    write_table(tmp_path, image=column, label=[0])
    with pytest.raises(ValueError, match="row 0 has no bytes in 'image': paths to other files aren't followed"):
        images(tmp_path)[0]


@pytest.mark.parametrize(("module", "extra"), [("pyarrow", "parquet"), ("datasets", "datasets")])
def test_without_the_library_the_error_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, module: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"this data set needs {module}: pip install 'fairexp\[{extra}\]'"):
        need(extra)
