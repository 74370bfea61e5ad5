"""The files that text comes from: which they are, in which blocks they are read, and the documents of a block.

How the files are cut into blocks follows from their sizes alone, so what is made of them doesn't depend on who works on it.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import IO, Any, NamedTuple

from fairexp.config.nearest import nearest
from fairexp.errors import UserError

BLOCK_BYTES = 32 << 20  # the unit of work, and what a kill costs at most a worker
CHUNK = 1 << 20
REACH = 4096  # bytes: how long a separator with what it looks ahead at may be
PACKED = (".gz", ".dz")  # dictzip is gzip
LINES, TABLE = (".jsonl", ".ndjson"), ".parquet"


class Document(NamedTuple):
    """A text in UTF-8, and where it begins in its file: a byte of what was unpacked, or a row of a table."""

    begin: int
    text: bytes


@dataclass(frozen=True)
class File:
    """One source. `kind`: text, lines (JSON objects) or table (Parquet)."""

    path: str
    kind: str
    packed: bool
    size: int
    changed: str  # differs when the file does


@dataclass(frozen=True)
class Piece:
    """A part of a file: bytes of a plain one, row groups of a table, or all of one that can only be read from its start."""

    file: int
    begin: int
    end: int


Block = tuple[Piece, ...]


@dataclass(frozen=True)
class Reading:
    """How documents are found in files."""

    field: str = "text"
    split_on: str | None = None  # a regular expression; None: a text file is one document
    encoding: str = "utf-8"  # of text files

    @property
    def separator(self) -> re.Pattern[bytes] | None:
        return None if self.split_on is None else re.compile(self.split_on.encode())

    def check(self) -> None:
        """UserError for what can't be."""
        try:
            if self.separator and self.separator.match(b""):
                raise UserError(f"--split-on {self.split_on}: matches nothing at all, so everywhere")
        except re.error as error:
            raise UserError(f"--split-on {self.split_on}: not a regular expression: {error}") from None
        try:
            ascii_stays = bytes(range(128)).decode(self.encoding) == "".join(map(chr, range(128)))
        except (LookupError, UnicodeError):
            ascii_stays = False
        if not ascii_stays:
            raise UserError(f"--encoding {self.encoding}: takes utf-8, or one that holds ASCII: latin-1, cp1252 ...")


# --- which files ---


def find(sources: Sequence[str]) -> list[File]:
    """The files that the words name, each word's by name. UserError: one names none."""
    files: list[File] = []
    problems: list[str] = []
    for source in sources:
        try:
            files += _remote(source) if "://" in source else _local(source)
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)
    seen: set[str] = set()
    if twice := [file.path for file in files if file.path in seen or seen.add(file.path)]:  # type: ignore[func-returns-value]
        raise UserError(f"{twice[0]}: named twice; its documents would count twice")
    return files


def _local(source: str) -> list[File]:
    path = Path(source).expanduser()
    if path.is_dir():
        raise UserError(f"{source}: is a folder; name its files, such as '{source.rstrip('/')}/**/*.txt'")
    found = [str(path)] if path.exists() or not has_magic(source) else sorted(glob(str(path), recursive=True))
    files = []
    for name in found:
        if Path(name).is_dir():
            continue
        try:
            stat = Path(name).stat()
            open(name, "rb").close()
        except OSError as error:
            raise UserError(f"{name}: {error.strerror}") from None
        files.append(_file(name, stat.st_size, str(stat.st_mtime_ns)))
    if not files:
        raise UserError(f"{source}: no such file")
    return files


def _remote(source: str) -> list[File]:
    fs, path = _file_system(source)
    protocol = source.partition("://")[0]
    try:
        found = sorted(fs.glob(path)) if has_magic(path) else [path]
        infos = [fs.info(name) for name in found]
    except Exception as error:  # each file system has its own
        raise UserError(f"{source}: {_one_line(error)}") from None
    if not infos:
        raise UserError(f"{source}: no such file")
    return [
        _file(
            f"{protocol}://{info['name']}",
            info["size"],
            str(info.get("ETag") or info.get("etag") or info.get("mtime") or ""),
        )
        for info in infos
        if info.get("type") != "directory"
    ]


def _file_system(url: str) -> tuple[Any, str]:
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise UserError(f"{url}: reading URLs needs fsspec: pip install 'fairexp[text]'") from None
    try:
        return url_to_fs(url)
    except Exception as error:  # no such protocol, or its package is missing
        raise UserError(f"{url}: {_one_line(error)}") from None


def _file(path: str, size: int, changed: str) -> File:
    packed = path.endswith(PACKED)
    suffix = Path(path.removesuffix(".gz").removesuffix(".dz")).suffix
    if suffix == ".json":
        raise UserError(f"{path}: JSON is taken as one object a line, in files that end in .jsonl")
    if suffix == TABLE and packed:
        raise UserError(f"{path}: a Parquet file is compressed inside; unpack this one")
    kind = "table" if suffix == TABLE else "lines" if suffix in LINES else "text"
    return File(path, kind, packed, size, changed)


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


# --- in which blocks ---


def blocks(files: Sequence[File], reading: Reading) -> list[Block]:
    """The units of work, in order: parts of large files, or several small files."""
    found: list[Block] = []
    open_block: list[Piece] = []
    size = 0
    for number, file in enumerate(files):
        for piece, weight in _pieces(number, file, reading):
            if open_block and size + weight > BLOCK_BYTES:
                found.append(tuple(open_block))
                open_block, size = [], 0
            open_block.append(piece)
            size += weight
    return [*found, tuple(open_block)] if open_block else found


def _pieces(number: int, file: File, reading: Reading) -> Iterator[tuple[Piece, int]]:
    if file.kind == "table":
        with opened(file) as handle:
            metadata = _parquet(handle, file, reading).metadata
            sizes = [metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)]
        for group, size in enumerate(sizes):
            yield Piece(number, group, group + 1), size
    elif file.packed or (file.kind == "text" and reading.split_on is None):
        yield Piece(number, 0, file.size), file.size
    else:
        for begin in range(0, file.size, BLOCK_BYTES):
            end = min(begin + BLOCK_BYTES, file.size)
            yield Piece(number, begin, end), end - begin


# --- what stands in them ---


def documents(files: Sequence[File], block: Block, reading: Reading) -> Iterator[tuple[int, Document]]:
    """The block's documents, each with its file's number. UserError names file and line of what can't be read."""
    for piece in block:
        file = files[piece.file]
        try:
            with opened(file) as handle:
                for document in _documents(handle, file, piece, reading):
                    yield piece.file, document
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{file.path}: damaged: {error}") from None
        except FileNotFoundError as error:
            raise UserError(f"{file.path}: {error.strerror or error}") from None


@contextmanager
def opened(file: File) -> Iterator[IO[bytes]]:
    """The file's bytes, unpacked."""
    if "://" in file.path:
        fs, path = _file_system(file.path)
        handle = fs.open(path, "rb")
    else:
        handle = open(file.path, "rb")  # noqa: SIM115
    with handle:
        if file.packed:
            with gzip.open(handle) as unpacked:
                yield unpacked  # type: ignore[misc]
        else:
            yield handle


def _documents(handle: IO[bytes], file: File, piece: Piece, reading: Reading) -> Iterator[Document]:
    if file.kind == "table":
        yield from _rows(handle, file, piece, reading)
        return
    separator = re.compile(b"\n") if file.kind == "lines" else reading.separator
    if file.packed:
        found = _stream(handle, separator)
    elif separator is None:
        found = iter([Document(0, handle.read())])
    else:
        found = _part(handle, piece, separator)
    for begin, data in found:
        if begin == 0:
            data = data.removeprefix(b"\xef\xbb\xbf")  # the byte order mark that some editors write
        if file.kind == "lines":
            if data.strip():
                yield Document(begin, _of_line(data, file, begin, reading.field))
            continue
        try:
            text = data.decode(reading.encoding)
        except UnicodeError as error:
            at = error.start if isinstance(error, UnicodeDecodeError) else 0
            where = f"{file.path}:{_line(file, begin + at)}"
            hint = "; --encoding names another" if reading.encoding == "utf-8" else ""
            raise UserError(f"{where}: is not {reading.encoding.upper()} (byte {data[at]:#04x}){hint}") from None
        yield Document(begin, data if reading.encoding == "utf-8" else text.encode())


def _stream(handle: IO[bytes], separator: re.Pattern[bytes] | None) -> Iterator[Document]:
    """Documents of what can only be read from its start."""
    if separator is None:
        yield Document(0, handle.read())
        return
    begin, data, ended = 0, b"", False
    while not ended:
        chunk = handle.read(CHUNK)
        ended = not chunk
        data += chunk
        at = 0
        for match in separator.finditer(data):
            if not ended and match.end() > len(data) - REACH:
                break  # more of it, or what it looks ahead at, may come
            yield Document(begin + at, data[at : match.start()])
            at = match.end()
        begin, data = begin + at, data[at:]
    if data:
        yield Document(begin, data)


def _part(handle: IO[bytes], piece: Piece, separator: re.Pattern[bytes]) -> Iterator[Document]:
    """Documents that begin in a part of a file: from the first separator in it to the first in the next part."""
    begin = 0 if piece.begin == 0 else _after_separator(handle, piece.begin, separator)
    end = _after_separator(handle, piece.end, separator)
    handle.seek(begin)
    data = handle.read(max(0, end - begin) + REACH)
    at, size = 0, end - begin
    for match in separator.finditer(data):
        if match.end() > size or at >= size:
            break
        yield Document(begin + at, data[at : match.start()])
        at = match.end()
    if at < size:
        yield Document(begin + at, data[at:size])


def _after_separator(handle: IO[bytes], offset: int, separator: re.Pattern[bytes]) -> int:
    """Where the first separator at or after the offset ends; the file's end, if there is none."""
    handle.seek(offset)
    data, ended = b"", False
    while not ended:
        chunk = handle.read(CHUNK)
        ended = not chunk
        data += chunk
        if (match := separator.search(data)) and (ended or match.end() <= len(data) - REACH):
            return offset + match.end()
    return offset + len(data)


def _of_line(line: bytes, file: File, begin: int, field: str) -> bytes:
    try:
        row = json.loads(line)
    except UnicodeDecodeError as error:
        what = f"is not UTF-8 (byte {line[error.start]:#04x})"
    except (ValueError, RecursionError) as error:
        what = f"is not JSON: {error}"
    else:
        if not isinstance(row, dict):
            what = f"is not a JSON object but a {type(row).__name__}"
        elif field not in row:
            what = f"has no field {field!r}{nearest(field, row)}"
        elif not isinstance(row[field], str):
            what = f"its {field!r} is not a text but a {type(row[field]).__name__}"
        else:
            try:
                return row[field].encode()
            except UnicodeEncodeError:
                what = f"its {field!r} holds half of a surrogate pair, which is no text"
    raise UserError(f"{file.path}:{_line(file, begin)}: {what}")


def _line(file: File, offset: int) -> int:
    """The number of the line that holds this byte, from 1."""
    count = 1
    with opened(file) as handle:
        while offset > 0 and (chunk := handle.read(min(CHUNK, offset))):
            count += chunk.count(b"\n")
            offset -= len(chunk)
    return count


def _parquet(handle: IO[bytes], file: File, reading: Reading) -> Any:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{file.path}: reading Parquet needs pyarrow: pip install 'fairexp[text]'") from None
    try:
        table = parquet.ParquetFile(handle)
        names = table.schema_arrow.names
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file.path}: not a Parquet file: {_one_line(error)}") from None
    if reading.field not in names:
        raise UserError(f"{file.path}: has no column {reading.field!r}{nearest(reading.field, names)}")
    kind = table.schema_arrow.field(reading.field).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise UserError(f"{file.path}: its column {reading.field!r} is not of texts but {kind}")
    return table


def _rows(handle: IO[bytes], file: File, piece: Piece, reading: Reading) -> Iterator[Document]:
    import pyarrow

    table = _parquet(handle, file, reading)
    row = sum(table.metadata.row_group(group).num_rows for group in range(piece.begin))
    try:
        for batch in table.iter_batches(1024, range(piece.begin, piece.end), [reading.field]):
            for text in batch.column(0).to_pylist():
                if text is None:
                    raise UserError(f"{file.path}: row {row + 1}: its {reading.field!r} is null")
                yield Document(row, text.encode())
                row += 1
    except pyarrow.ArrowException as error:
        raise UserError(f"{file.path}: damaged: {_one_line(error)}") from None
    except UnicodeDecodeError:
        raise UserError(f"{file.path}: a text after row {row} is not UTF-8") from None


def as_json(files: Sequence[File]) -> list[dict[str, Any]]:
    """The files as JSON values."""
    return [asdict(file) for file in files]
