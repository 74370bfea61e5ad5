"""Images and other samples in tar files in WebDataset's layout, read by index; nothing is extracted or unpickled.

A sample is the members that stand side by side and share a name up to its first dot: 0001.jpg, 0001.cls, 0001.json. The
order is that of the shards by name and of the samples in each. An index of every shard (`x.tar.index` beside it) holds
where each member's bytes are: it is made once, by reading the headers.
"""

import hashlib
import io
import json
import os
import re
import tarfile
import zlib
from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor

from fairexp.datasets.image_folder import SUFFIXES, Told, image, need_pillow
from fairexp.datasets.index_file import Index, ascends, index_of
from fairexp.datasets.open_files import OpenFiles
from fairexp.datasets.windows import window_permutation

BLOCK = 512
ZEROS = bytes(BLOCK)
LARGEST_HEADER = 2**16  # of a long name or of pax records; a real one is below 5 kB
PICKLES = ("pyd", "pickle", "pkl")
PICTURES = tuple(suffix[1:] for suffix in SUFFIXES)
ABOUT_THE_NEXT = (
    tarfile.XHDTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
REFUSED = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a named pipe",
}
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"(\xb5": "zstd"}


class TarImages:
    """Images and class labels from tar shards: uint8 [3, image_size, image_size] and int64, as `ImageFolder` gives them.

    `shards` is a pattern below `root`, such as `train*.tar`. Each sample has one image; `label` names the member with the
    class's number (`cls`), or one and a key of its JSON object (`json:label`). With `window`, the training order mixes the
    samples of so many shards at a time: for storage that reads neighbours faster. A damaged tar, or one that isn't plain
    files, is a ValueError.
    """

    def __init__(
        self,
        root: str | Path,
        shards: str,
        label: str,
        image_size: int,
        num_classes: int,
        augment: bool,
        window: int | None = None,
    ) -> None:
        need_pillow()
        self.shards = Shards(root, shards, window)
        self.label, self.image_size, self.num_classes, self.augment = label, image_size, num_classes, augment
        self.fingerprint = self.shards.fingerprint

    def __len__(self) -> int:
        return len(self.shards)

    def permutation(self, generator: Generator) -> Tensor:
        return self.shards.permutation(generator)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        label = value(self.shards, index, self.label)
        if type(label) is not int or not 0 <= label < self.num_classes:
            found = f"its {self.label} is {label!r}, not a class of 0 to {self.num_classes - 1}"
            raise ValueError(f"{self.shards.name(index)}: {found}")
        return picture(self.shards, index, PICTURES, self.image_size, self.augment), torch.tensor(label)


class TarSamples:
    """Samples of several kinds of members from tar shards, such as images and their captions: a dict each.

    `fields` says what stands under which key: a member's extension, or several of which each sample has one
    (`image: jpg;png`), or a key of a JSON member (`size: json:width`). Images are as `TarImages` gives them, `txt` is a
    str, `cls` an int.
    """

    def __init__(
        self,
        root: str | Path,
        shards: str,
        fields: Mapping[str, str],
        image_size: int,
        augment: bool,
        window: int | None = None,
    ) -> None:
        need_pillow()
        self.shards = Shards(root, shards, window)
        self.fields, self.image_size, self.augment = dict(fields), image_size, augment
        self.fingerprint = self.shards.fingerprint

    def __len__(self) -> int:
        return len(self.shards)

    def permutation(self, generator: Generator) -> Tensor:
        return self.shards.permutation(generator)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample: dict[str, Any] = {}
        for key, field in self.fields.items():
            extensions = field.lower().split(";")
            if set(extensions) <= set(PICTURES):
                sample[key] = picture(self.shards, index, extensions, self.image_size, self.augment)
            else:
                sample[key] = value(self.shards, index, field)
        return sample


def picture(shards: "Shards", index: int, extensions: Collection[str], size: int, augment: bool) -> Tensor:
    """The sample's image, uint8 [3, size, size]."""
    extension, data = shards.read(index, extensions)
    return image(io.BytesIO(data), size, augment, Told(lambda: f"{shards.name(index)}, {extension}"))


def value(shards: "Shards", index: int, field: str) -> Any:
    """A number of a .cls, the text of a .txt, or what stands under a key of a JSON member."""
    extension, _, key = field.partition(":")
    extension, data = shards.read(index, (extension.lower(),))
    try:
        if key:
            return json.loads(data)[key]
        text = data.decode()
        return int(text) if extension == "cls" else text
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{shards.name(index)}: can't read its {field}: {error!r}") from None


class Layout(NamedTuple):
    """Where a shard's samples are."""

    ends: np.ndarray  # int64 [samples], of each one's members
    offsets: np.ndarray  # int64 [members], of the bytes; the last header block stands in front of them
    sizes: np.ndarray  # int64 [members]
    checks: np.ndarray  # uint32 [members], crc32 of that header block
    kinds: np.ndarray  # uint16 [members], into `extensions`
    name_ends: np.ndarray  # int64 [samples], in `names`
    names: np.ndarray  # uint8, the stems in a row
    extensions: list[str]


def layout(index: Index) -> Layout:
    """What an index that `build` made says."""
    return Layout(extensions=index.words, **index.arrays)


def fits(index: Index, size: int) -> bool:
    """Whether the index is of samples in a tar of that size."""
    if index.arrays.keys() != set(Layout._fields[:-1]):
        return False
    found = layout(index)
    members = len(found.offsets)
    return (
        len(found.sizes) == len(found.checks) == len(found.kinds) == members
        and len(found.ends) == len(found.name_ends)
        and ascends(found.ends, members)
        and ascends(found.name_ends, len(found.names))
        and bool((found.offsets >= BLOCK).all() and (found.sizes >= 0).all() and (found.sizes <= size).all())
        and bool((found.offsets <= size - found.sizes).all())
        and bool((found.kinds < len(found.extensions)).all())
    )


class Shards:
    """The bytes of samples in tar files, by index."""

    def __init__(self, root: str | Path, pattern: str, window: int | None = None) -> None:
        self.root, self.window = Path(root), window
        self.paths = sorted(self.root.glob(pattern))
        if not self.paths:
            raise ValueError(f"{root} has no {pattern}")
        # Ranks that start together begin with different shards, so each reads few headers and the others' indexes.
        first = os.getpid() % len(self.paths)
        turns = [*range(first, len(self.paths)), *range(first)]
        with ThreadPoolExecutor(8) as pool:  # on a network file system each header is a wait
            looked = pool.map(lambda turn: index_of(self.paths[turn], "tar 1", build, fits), turns)
            found = dict(zip(turns, looked, strict=True))
        self.layouts = [layout(found[number][0]) for number in range(len(self.paths))]
        self.ends = list(accumulate(len(shard.ends) for shard in self.layouts))
        if not len(self):
            raise ValueError(f"{root}: the tars {pattern} have no sample")
        listing = [f"{path.relative_to(root)} {found[number][1]}" for number, path in enumerate(self.paths)]
        self.fingerprint: dict[str, str | int] = {
            "shards": len(self.paths),
            "samples": len(self),
            "bytes": sum(int(shard.sizes.sum()) for shard in self.layouts),
            "digest": hashlib.sha256("\n".join(listing).encode()).hexdigest(),
        }
        self._files = OpenFiles(self.paths)

    def __len__(self) -> int:
        return self.ends[-1]

    def permutation(self, generator: Generator) -> Tensor:
        return window_permutation([len(shard.ends) for shard in self.layouts], self.window, generator)

    def name(self, index: int) -> str:
        """What a person finds the sample by."""
        shard, place = self._place(index)
        found = self.layouts[shard]
        begin = found.name_ends[place - 1] if place else 0
        return f"{self.paths[shard]}: sample {os.fsdecode(found.names[begin : found.name_ends[place]].tobytes())!r}"

    def read(self, index: int, extensions: Collection[str]) -> tuple[str, bytes]:
        """The extension and the bytes of the one member that has one of the extensions."""
        shard, place = self._place(index)
        found = self.layouts[shard]
        first = int(found.ends[place - 1]) if place else 0
        named = [found.extensions[kind] for kind in found.kinds[first : int(found.ends[place])].tolist()]
        fitting = [number for number, extension in enumerate(named) if extension in extensions]
        if len(fitting) != 1:
            of = f"{len(fitting)} of {', '.join(extensions)}; it has {', '.join(named)}"
            raise ValueError(f"{self.name(index)} has {of}")
        extension, member = named[fitting[0]], first + fitting[0]
        offset, size = int(found.offsets[member]), int(found.sizes[member])
        data = self._files.read(shard, BLOCK + size, offset - BLOCK)
        if len(data) < BLOCK + size or zlib.crc32(memoryview(data)[:BLOCK]) != found.checks[member]:
            raise ValueError(f"{self.name(index)}: the tar has changed since its index was made; start again")
        return extension, data[BLOCK:]

    def _place(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        shard = bisect_right(self.ends, index)
        return shard, index - (self.ends[shard - 1] if shard else 0)


def build(path: Path, size: int) -> Index:
    """Reads the headers of a tar; a ValueError for one that isn't samples in plain files."""
    ends: list[int] = []
    rows: list[tuple[int, int, int, int]] = []
    stems: dict[bytes, None] = {}
    extensions: dict[str, int] = {}
    current, members = None, set[str]()
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        for name, offset, length, check in walk(descriptor, path, size):
            folder, _, base = name.rpartition("/")
            stem, dot, extension = base.partition(".")
            if not stem or not dot:
                continue  # hidden, such as the ._x.jpg that a Mac leaves behind; or a note to people
            extension = extension.lower()
            if extension.rpartition(".")[2] in PICKLES:
                raise ValueError(
                    f"{path}: {name!r} is a pickle, which could run any code: store it as json, txt or cls"
                )
            key = os.fsencode(f"{folder}/{stem}" if folder else stem)
            if key != current:
                if key in stems:
                    apart = "the members of a sample stand side by side, and its name is its own"
                    raise ValueError(f"{path}: sample {os.fsdecode(key)!r} comes twice: {apart}")
                stems[key] = None
                ends.append(len(rows))
                current, members = key, set()
            if extension in members:
                raise ValueError(f"{path}: {name!r} comes twice")
            members.add(extension)
            kind = extensions.setdefault(extension, len(extensions))
            if kind > np.iinfo(np.uint16).max:
                raise ValueError(f"{path}: more than {kind:,} different extensions")
            rows.append((offset, length, check, kind))
    finally:
        os.close(descriptor)
    columns = np.array(rows, np.int64).reshape(-1, 4)
    arrays: dict[str, np.ndarray] = {
        "ends": np.array([*ends[1:], len(rows)] if ends else [], np.int64),
        "offsets": columns[:, 0].copy(),
        "sizes": columns[:, 1].copy(),
        "checks": columns[:, 2].astype(np.uint32),
        "kinds": columns[:, 3].astype(np.uint16),
        "name_ends": np.cumsum([len(stem) for stem in stems], dtype=np.int64),
        "names": np.frombuffer(b"".join(stems), np.uint8),
    }
    return Index(arrays, list(extensions))


def walk(descriptor: int, path: Path, size: int) -> Iterator[tuple[str, int, int, int]]:
    """Each plain file in a tar: its name, where its bytes begin, how many they are, and the crc32 of its header block.

    One header at a time by tarfile's `TarInfo.frombuf`, and not `TarFile.next`: that reads as much as a header declares,
    recurses from header to header, and in Pythons of 2024 can be sent back to where it was.
    """
    offset, long_name, pax = 0, None, dict[str, bytes]()
    while (block := os.pread(descriptor, BLOCK, offset)) != ZEROS:
        if len(block) < BLOCK:
            raise ValueError(f"{path}: truncated: it ends at byte {size:,}, without the mark of a tar's end")
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            for magic, name in COMPRESSED.items():
                if offset == 0 and block.startswith(magic):
                    raise ValueError(
                        f"{path}: compressed ({name}): samples are read by their place; decompress it"
                    ) from None
            raise ValueError(f"{path}: no tar header at byte {offset:,}: {error}") from None
        offset += BLOCK
        name = long_name or info.name
        if "path" in pax:
            name = os.fsdecode(pax["path"])
        try:
            length = int(pax.get("size", info.size))
        except ValueError:
            raise ValueError(f"{path}: {name!r} has a size that is no number") from None
        if info.type == tarfile.DIRTYPE:
            length = 0
        if not 0 <= length <= size - offset:
            raise ValueError(
                f"{path}: {name!r} declares {length:,} bytes, {max(size - offset, 0):,} are left: truncated?"
            )
        if info.type in ABOUT_THE_NEXT:
            if length > LARGEST_HEADER:
                raise ValueError(f"{path}: a header of {length:,} bytes at byte {offset - BLOCK:,}")
            data = os.pread(descriptor, length, offset)
            if info.type == tarfile.GNUTYPE_LONGNAME:
                long_name = os.fsdecode(data.partition(b"\0")[0])
            elif info.type != tarfile.GNUTYPE_LONGLINK:
                found = records(data, path)
                if info.type != tarfile.XGLTYPE:
                    pax = found
                elif "path" in found or "size" in found:
                    raise ValueError(f"{path}: a global header sets the path or size of all members")
        else:
            sparse = info.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse") for key in pax)
            if info.type in tarfile.REGULAR_TYPES and not sparse:
                yield plain(name, path), offset, length, zlib.crc32(block)
            elif info.type != tarfile.DIRTYPE:
                kind = "a sparse file" if sparse else REFUSED.get(info.type, f"of type {info.type!r}")
                raise ValueError(f"{path}: {name!r} is {kind}, and samples are plain files")
            long_name, pax = None, {}
        offset += -(-length // BLOCK) * BLOCK
    while chunk := os.pread(descriptor, 1 << 20, offset):
        if chunk.strip(b"\0"):
            raise ValueError(f"{path}: goes on after a tar's end: tars that are joined need tar --concatenate")
        offset += len(chunk)


def records(data: bytes, path: Path) -> dict[str, bytes]:
    """The pax records `LENGTH key=value\\n`."""
    found, position = {}, 0
    while position < len(data):
        head = re.compile(rb"(\d{1,6}) ").match(data, position)
        end = position + int(head[1]) if head else 0
        if not head or not head.end() < end <= len(data) or data[end - 1 : end] != b"\n":
            raise ValueError(f"{path}: damaged pax header")
        key, _, text = data[head.end() : end - 1].partition(b"=")
        found[key.decode("utf-8", "surrogateescape")] = text
        position = end
    return found


def plain(name: str, path: Path) -> str:
    """The name without ./ in front; names that lead elsewhere, or aren't for eyes, are refused though nobody follows them."""
    parts = name.split("/")
    if name.startswith("/") or ".." in parts or any(ord(character) < 32 for character in name):
        raise ValueError(f"{path}: {name!r} is no name of a sample: absolute, with .. or with control characters")
    return "/".join(part for part in parts if part not in ("", "."))
