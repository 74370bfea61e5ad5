"""Samples in tar files: which they are and in which order. A damaged or hostile tar: one line, and never a step outside."""

import io
import os
import re
import stat
import struct
import tarfile
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fairexp.datasets import index_file, open_files, tar_shards
from fairexp.datasets.image_folder import ImageFolder
from fairexp.datasets.index_file import Index
from fairexp.datasets.tar_shards import Shards, TarImages, TarSamples

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(home))
    return home


def picture(number: int, size: tuple[int, int] = (40, 30), format: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(number).integers(0, 255, (*size[::-1], 3)).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format)
    return out.getvalue()


Member = tuple[str, bytes] | tarfile.TarInfo


def write_tar(path: Path, members: Iterable[Member], format: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return path


def samples(first: int, count: int) -> list[Member]:
    return [
        member
        for number in range(first, first + count)
        for member in (
            (f"{number:04}.jpg", picture(number)),
            (f"{number:04}.cls", str(number % 3).encode()),
            (f"{number:04}.json", b'{"label": %d, "width": 40}' % (number % 3)),
            (f"{number:04}.txt", f"image ñ {number}".encode()),
        )
    ]


def write_shards(root: Path) -> Path:
    write_tar(root / "train-0.tar", samples(0, 4))
    write_tar(root / "train-1.tar", samples(4, 3), tarfile.GNU_FORMAT)
    write_tar(root / "train-2.tar", samples(7, 5), tarfile.USTAR_FORMAT)
    return root


def images(root: Path, label: str = "cls", augment: bool = False, num_classes: int = 3) -> TarImages:
    return TarImages(root, "train*.tar", label, 32, num_classes, augment)


def names(shards: Shards) -> list[str]:
    return [re.sub(r".*/(.*): sample '(.*)'", r"\1 \2", shards.name(index)) for index in range(len(shards))]


@pytest.mark.parametrize("label", ["cls", "json:label"])
def test_samples_come_by_shard_and_place_with_the_pixels_of_an_image_folder(tmp_path: Path, label: str) -> None:
    data = images(write_shards(tmp_path), label)
    assert len(data) == 12
    assert names(data.shards)[3:6] == ["train-0.tar 0003", "train-1.tar 0004", "train-1.tar 0005"]
    assert [int(data[index][1]) for index in range(12)] == [number % 3 for number in range(12)]
    for split in ("train", "val"):
        (tmp_path / split / "class").mkdir(parents=True)
    for number in range(12):
        (tmp_path / f"train/class/{number:02}.jpg").write_bytes(picture(number))
    for augment in (False, True):
        folder, tars = ImageFolder(tmp_path, "train", 32, 1, augment), images(tmp_path, label, augment)
        for index in (0, 5, 11):
            expected, got = (torch.manual_seed(index) and data[index][0] for data in (folder, tars))
            assert torch.equal(expected, got)


def test_a_sample_of_several_kinds_is_a_dict(tmp_path: Path) -> None:
    fields = {"image": "png;JPG", "caption": "txt", "label": "cls", "width": "json:width"}
    sample = TarSamples(write_shards(tmp_path), "*.tar", fields, 16, augment=False)[7]
    assert sample["image"].shape == (3, 16, 16)
    assert {**sample, "image": 0} == {"image": 0, "caption": "image ñ 7", "label": 1, "width": 40}
    with pytest.raises(ValueError, match=r"train-0.tar: sample '0001' has 0 of png; it has jpg, cls, json, txt"):
        TarSamples(tmp_path, "*.tar", {"image": "png"}, 16, augment=False)[1]
    with pytest.raises(ValueError, match=r"sample '0001': can't read its json:nosuch: KeyError"):
        TarSamples(tmp_path, "*.tar", {"x": "json:nosuch"}, 16, augment=False)[1]


def test_what_is_not_a_sample_is_left_out_and_stems_end_at_the_first_dot(tmp_path: Path) -> None:
    folder = tarfile.TarInfo("./a")
    folder.type = tarfile.DIRTYPE
    long = "x" * 150
    members = [folder, ("./a/._1.jpg", b"mac"), ("README", b"text"), ("./a/1.jpg", b"1"), ("a/1.seg.PNG", b"2")]
    for kind in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        path = write_tar(tmp_path / "train.tar", [*members, (f"b/{long}é.jpg", b"3"), ("b/1.jpg", b"4")], kind)
        shards = Shards(tmp_path, "train.tar")
        assert [shards.name(index).split("sample ")[1] for index in range(3)] == ["'a/1'", f"'b/{long}é'", "'b/1'"]
        assert shards.read(0, ["jpg"])[1] == b"1"
        assert shards.read(0, ["seg.png"])[1] == b"2"
        assert [shards.read(index, ["jpg"])[1] for index in (1, 2)] == [b"3", b"4"]
        os.utime(path, ns=(0, 0))  # so that the second is another


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # it leaves files open
def test_the_order_is_webdatasets(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    shards = Shards(write_shards(tmp_path), "*.tar")
    urls = [str(path) for path in sorted(tmp_path.glob("*.tar"))]
    theirs = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    assert [shards.read(index, ["txt"])[1] for index in range(len(shards))] == [sample["txt"] for sample in theirs]


# The index


def test_an_index_is_made_once_and_again_when_the_tar_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[str] = []
    build = tar_shards.build
    monkeypatch.setattr(tar_shards, "build", lambda path, size: built.append(path.name) or build(path, size))
    write_shards(tmp_path)
    first = Shards(tmp_path, "train*.tar")
    assert sorted(built) == ["train-0.tar", "train-1.tar", "train-2.tar"]
    assert {path.name for path in tmp_path.glob(".*")} == set(), "left behind"
    assert stat.S_IMODE((tmp_path / "train-0.tar.index").stat().st_mode) == 0o644
    again = Shards(tmp_path, "train*.tar")
    assert len(built) == 3
    assert again.fingerprint == first.fingerprint
    assert first.fingerprint["samples"] == 12

    write_tar(tmp_path / "train-1.tar", samples(40, 3), tarfile.GNU_FORMAT)
    changed = Shards(tmp_path, "train*.tar")
    assert built[3:] == ["train-1.tar"]
    assert changed.fingerprint != first.fingerprint
    assert changed.read(4, ["txt"])[1] == "image ñ 40".encode()
    with pytest.raises(ValueError, match=r"train-1.tar: sample '0004': the tar has changed since its index was made"):
        first.read(4, ["txt"])
    for damage in (lambda data: data[: len(data) // 2], lambda data: data[:-9] + b"\1" * 9, lambda data: b""):
        index = tmp_path / "train-2.tar.index"
        index.write_bytes(damage(index.read_bytes()))
        assert Shards(tmp_path, "train*.tar").fingerprint == changed.fingerprint
    assert built[4:] == ["train-2.tar"] * 3


def test_an_index_that_speaks_of_places_outside_the_tar_is_not_believed(tmp_path: Path) -> None:
    index = tar_shards.build(write_tar(tmp_path / "a.tar", samples(0, 2)), size := (tmp_path / "a.tar").stat().st_size)
    assert tar_shards.fits(index, size)
    for name, worse in {
        "offsets": index.arrays["offsets"] + size,
        "sizes": index.arrays["sizes"] + np.int64(2**62),
        "ends": index.arrays["ends"] + 1,
        "name_ends": index.arrays["name_ends"][::-1],
        "kinds": index.arrays["kinds"] + np.uint16(4),
        "checks": index.arrays["checks"][1:],
        "more": index.arrays["checks"],
    }.items():
        assert not tar_shards.fits(Index(index.arrays | {name: worse}, index.words), size), name
    assert not tar_shards.fits(Index(index.arrays | {"offsets": -index.arrays["offsets"]}, index.words), size)


@pytest.mark.parametrize("where", ["data", "nowhere"])
def test_a_folder_that_cannot_be_written_has_its_indexes_in_the_cache_or_in_memory(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    write = index_file.write

    def refuse(path: Path, data: bytes) -> None:  # root writes where the mode forbids it
        if where == "nowhere" or path.parent == tmp_path:
            raise OSError(30, "Read-only file system")
        write(path, data)

    monkeypatch.setattr(index_file, "write", refuse)
    assert len(Shards(write_shards(tmp_path), "*.tar")) == 12
    assert not list(tmp_path.glob("*.index"))
    cached = list((home / ".cache/fairexp/indexes").glob("*.index"))
    assert len(cached) == (3 if where == "data" else 0)
    monkeypatch.setattr(tar_shards, "build", lambda path, size: pytest.fail("built again"))
    if where == "data":
        assert len(Shards(tmp_path, "*.tar")) == 12


def test_those_who_build_at_once_get_the_same(tmp_path: Path) -> None:
    for number in range(8):
        write_tar(tmp_path / f"{number}.tar", samples(5 * number, 5))
    found: list[dict] = []
    threads = [threading.Thread(target=lambda: found.append(Shards(tmp_path, "*.tar").fingerprint)) for _ in range(6)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert found == [Shards(tmp_path, "*.tar").fingerprint] * 6
    assert len(list(tmp_path.iterdir())) == 16


# What is not samples in plain files


def special(type: bytes, name: str = "2.jpg", link: str = "/etc/passwd", size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = type, link, size
    return info


def raw(name: str, size: bytes, type: bytes = b"0", data: bytes = b"") -> bytes:
    """A header block with any size field, and its bytes."""
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT))
    block[124:136], block[156:157] = size.ljust(12, b"\0"), type
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + data.ljust(-(-len(data) // 512) * 512, b"\0")


END = bytes(1024)
HUGE = b"\x80" + struct.pack(">xxxQ", 2**63 - 1)
NEGATIVE = b"\xff" * 8 + struct.pack(">i", -1024)
plain = ("1.jpg", b"1")


@pytest.mark.parametrize(
    ("members", "line"),
    [
        ([plain, special(tarfile.SYMTYPE)], "'2.jpg' is a symbolic link, and samples are plain files"),
        ([plain, special(tarfile.LNKTYPE)], "'2.jpg' is a hard link, and"),
        ([plain, special(tarfile.CHRTYPE)], "'2.jpg' is a device, and"),
        ([plain, special(tarfile.BLKTYPE)], "'2.jpg' is a device, and"),
        ([plain, special(tarfile.FIFOTYPE)], "'2.jpg' is a named pipe, and"),
        ([plain, special(b"Q")], "'2.jpg' is of type b'Q', and"),
        ([plain, ("../1.jpg", b"")], "'../1.jpg' is no name of a sample: absolute, with .. or"),
        ([plain, ("a/../../1.jpg", b"")], "'a/../../1.jpg' is no name of a sample"),
        ([plain, ("/etc/1.jpg", b"")], "'/etc/1.jpg' is no name of a sample"),
        ([plain, ("a\nb.jpg", b"")], r"'a\nb.jpg' is no name of a sample"),
        ([plain, ("1.pyd", b"")], "'1.pyd' is a pickle, which could run any code"),
        ([plain, ("1.meta.PICKLE", b"")], "'1.meta.PICKLE' is a pickle"),
        ([plain, plain], "'1.jpg' comes twice"),
        ([plain, ("2.jpg", b""), ("1.cls", b"")], "sample '1' comes twice: the members of a sample stand side by side"),
        (raw("1.jpg", HUGE) + END, "'1.jpg' declares 9,223,372,036,854,775,807 bytes, 1,024 are left: truncated?"),
        (raw("1.jpg", NEGATIVE) + END, "'1.jpg' declares -1,024 bytes"),
        (raw("1.jpg", b"00000003000") + END, "'1.jpg' declares 1,536 bytes, 1,024 are left"),
        (raw("x", b"00001000000", b"L", bytes(2**18)) + END, "a header of 262,144 bytes at byte 0"),
        (raw("x", HUGE, b"x") + END, "'x' declares 9,223,372,036,854,775,807 bytes"),
        (raw("x", b"20", b"x", b"9999 size=5\n1234") + END, "damaged pax header"),
        (raw("x", b"13", b"x", b"11 size=-9\n") + raw("1.jpg", b"0") + END, "'1.jpg' declares -9 bytes"),
        (raw("x", b"12", b"x", b"10 size=a\n") + raw("1.jpg", b"0") + END, "'1.jpg' has a size that is no number"),
        (raw("x", b"26", b"x", b"22 GNU.sparse.major=1\n") + raw("1.jpg", b"0") + END, "'1.jpg' is a sparse file"),
        (raw("1.jpg", b"0", b"S") + END, "'1.jpg' is a sparse file"),
        (raw("x", b"14", b"g", b"12 path=/etc\n") + END, "damaged pax header"),
        (raw("x", b"15", b"g", b"13 path=/etc\n") + END, "a global header sets the path or size of all members"),
        (raw("1.jpg", b"2", data=b"ab"), "truncated: it ends at byte 1,024, without the mark of a tar's end"),
        (raw("1.jpg", b"2", data=b"ab")[:700] + b"", "truncated: it ends at byte 700"),
        (b"text" * 512, "no tar header at byte 0"),
        (b"\x1f\x8b" + b"z" * 1022, "compressed (gzip): samples are read by their place; decompress it"),
        (b"", "truncated: it ends at byte 0"),
        (raw("1.jpg", b"0") + END + raw("2.jpg", b"0") + END, "goes on after a tar's end: tars that are joined need"),
        (END, "have no sample"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_other_tars_are_refused_in_one_line(tmp_path: Path, members: list[Member] | bytes, line: str) -> None:
    path = tmp_path / "a.tar"
    if isinstance(members, bytes):
        path.write_bytes(members)
    else:
        write_tar(path, members)
    began = time.perf_counter()
    with pytest.raises(ValueError, match=re.escape(line)) as caught:
        Shards(tmp_path, "*.tar")
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert time.perf_counter() - began < 1
    assert {file.name for file in tmp_path.iterdir()} <= {"a.tar", "a.tar.index"}, "something was extracted"


def test_a_tar_that_would_send_tarfile_back_or_down_ends(tmp_path: Path) -> None:
    digits = b"1" * 60_000  # pax records that a regular expression would read for minutes
    deep = raw("x", b"15", b"x", b"13 a=bcdefgh\n") * 3000  # each header of these calls the next in tarfile
    (tmp_path / "a.tar").write_bytes(deep + raw("1.jpg", b"1", data=b"1") + END)
    assert len(Shards(tmp_path, "a.tar")) == 1
    (tmp_path / "b.tar").write_bytes(raw("x", b"%o" % len(digits), b"x", digits) + END)
    with pytest.raises(ValueError, match="damaged pax header"):
        Shards(tmp_path, "b.tar")


def test_a_shard_that_is_no_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(ValueError, match=r"a\.tar: not a file"):
        Shards(tmp_path, "*.tar")
    with pytest.raises(ValueError, match=r"has no train\*\.tar"):
        Shards(tmp_path, "train*.tar")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda members: [members[0], ("0000.cls", b"3")], "its cls is 3, not a class of 0 to 2"),
        (lambda members: [members[0], ("0000.cls", b"cat")], "can't read its cls: ValueError"),
        (lambda members: members[:1], "has 0 of cls; it has jpg"),
        (lambda members: [("0000.jpg", b"not one"), members[1]], "jpg: can't read this image: cannot identify"),
        (lambda members: [*members[:2], ("0000.png", b"")], "has 2 of jpg, jpeg, png"),
        (lambda members: [("0000.jpg", picture(0)[:500]), members[1]], "can't read this image: "),
    ],
)
def test_a_bad_sample_is_named(tmp_path: Path, change: Callable, line: str) -> None:
    data = images(write_tar(tmp_path / "train.tar", change(samples(0, 1))).parent)
    with pytest.raises(ValueError, match=re.escape(line)) as caught:
        data[0]
    assert f"{tmp_path}/train.tar: sample '0000'" in str(caught.value)


def test_a_postscript_file_is_not_run_whatever_its_name(tmp_path: Path) -> None:
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n"
    data = images(write_tar(tmp_path / "train.tar", [("0.jpg", eps), ("0.cls", b"0")]).parent)
    with pytest.raises(ValueError, match="can't read this image: cannot identify"):
        data[0]


def test_few_files_are_open_at_once_and_a_copy_opens_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    monkeypatch.setattr(open_files, "MOST", 2)
    data = images(write_shards(tmp_path))
    before = len(os.listdir("/proc/self/fd"))
    labels = [int(data[index][1]) for index in range(12)]
    assert len(os.listdir("/proc/self/fd")) == before + 2
    copy = pickle.loads(pickle.dumps(data))
    assert copy.shards._files.descriptors == {}
    assert [int(copy[index][1]) for index in range(12)] == labels
    del copy, data
    assert len(os.listdir("/proc/self/fd")) == before
