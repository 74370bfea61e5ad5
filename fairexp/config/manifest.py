"""What a checkpoint's manifest.json says, and whether its files are still what was written; no torch.

The manifest is written last and the folder renamed into place after it: a folder that has its final name was complete.
A digest shows damage and not who made it: what a checkpoint from elsewhere says is data, of which nothing is believed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fairexp.errors import RunError

FILE = "manifest.json"
STEP = re.compile(r"step_(\d{8,18})")
NAME = re.compile(r"[a-z0-9_]+\.(safetensors|json)")
MOST_BYTES = 1 << 28  # of JSON: a model of 8B parameters over 1,024 ranks needs a tenth
SCHEMA = 1


class Damaged(Exception):
    """A file of a checkpoint that is not what was written: which, and how one sees it."""


def committed(checkpoints: Path) -> dict[int, Path]:
    """The checkpoints by step, oldest first."""
    found = {int(match[1]): path for path in checkpoints.glob("step_*") if (match := STEP.fullmatch(path.name))}
    return {step: path for step, path in sorted(found.items()) if path.name == f"step_{step:08d}"}


def encode(body: Mapping[str, Any]) -> str:
    """The manifest's text: the body under its own digest."""
    text = json.dumps(body, separators=(",", ":"))
    return f'{{"sha256":"{digest(text.encode())}",\n"body":{text}}}\n'


def digest(data: bytes) -> str:
    """The SHA-256, in hex digits."""
    return hashlib.sha256(data).hexdigest()


def text_of(folder: Path) -> str:
    """The text of the folder's manifest. Damaged: there is none."""
    return _read(folder / FILE).decode(errors="replace")


def decode(text: str, folder: Path) -> dict[str, Any]:
    """The manifest's body. Damaged: it isn't what was written, or belongs to another step. RunError: a later format."""
    file = folder / FILE
    match = re.fullmatch(r'\{"sha256":"([0-9a-f]{64})",\n"body":(.*)\}\n', text, re.DOTALL)
    if match is None:
        raise Damaged(f"{file}: not a manifest")
    if digest(match[2].encode()) != match[1]:
        raise Damaged(f"{file}: its digest differs")
    body = parse(match[2], file)
    if not all(key in body and fits(body[key]) for key, fits in KEYS.items()):
        wrong = [key for key, fits in KEYS.items() if key not in body or not fits(body[key])]
        raise Damaged(f"{file}: its {' and '.join(wrong[:3])} can't be what fairexp wrote")
    if body["schema"] != SCHEMA:  # nothing is wrong with it
        raise RunError(f"{file}: written in format {body['schema']}, this fairexp's is {SCHEMA}")
    step = STEP.fullmatch(folder.name)
    if step and body["step"] != int(step[1]):
        raise Damaged(f"{file}: belongs to step {body['step']}")
    return body


def is_number(value: Any) -> bool:
    """Whether it is a JSON number that a float or an int64 holds."""
    return isinstance(value, float) or is_int(value)


def is_int(value: Any) -> bool:
    """Whether it is an int64, and not a bool, which Python takes for one."""
    return type(value) is int and -(1 << 63) <= value < 1 << 63


def are_numbers(value: Any) -> bool:
    """Whether it is a JSON object of numbers."""
    return isinstance(value, dict) and all(map(is_number, value.values()))


def _is_count(value: Any) -> bool:
    return is_int(value) and value >= 0


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable() and len(value) < 1000


def _are_files(value: Any) -> bool:
    """Names that fairexp writes, none of which leads elsewhere, with sizes and digests."""
    return (
        isinstance(value, dict)
        and "state.json" in value
        and all(NAME.fullmatch(name) and isinstance(entry, dict) for name, entry in value.items())
        and all(_is_count(entry.get("bytes")) and _is_word(entry.get("sha256")) for entry in value.values())
        and all(entry["bytes"] <= MOST_BYTES for name, entry in value.items() if name.endswith(".json"))
    )


KEYS = {
    "schema": _is_count,
    "step": _is_count,
    "time": is_number,
    "metrics": are_numbers,
    "world_size": _is_count,
    "threads": _is_count,
    "strategy": _is_word,
    "device": _is_word,
    "torch": _is_word,
    "files": _are_files,
    "tensors": lambda value: isinstance(value, dict),  # shards.Stored looks at each
}


def parse(text: str | bytes, file: Path) -> dict[str, Any]:
    """A JSON object from a file. Damaged: it is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{file}: {type(error).__name__} in its JSON") from None
    if not isinstance(value, dict):
        raise Damaged(f"{file}: not a JSON object")
    return value


def read_json(file: Path) -> dict[str, Any]:
    """One of the checkpoint's JSON files."""
    return parse(_read(file), file)


def check(file: Path, size: int, sha256: str, thorough: bool = True) -> None:
    """Damaged, where the file isn't what was written; without `thorough` its bytes are not read."""
    there = _size(file)
    if there != size:
        raise Damaged(f"{file}: has {there:,} bytes of {size:,}")
    if thorough:
        with _reading(file), open(file, "rb") as opened:
            if hashlib.file_digest(opened, "sha256").hexdigest() != sha256:
                raise Damaged(f"{file}: its digest differs")


def check_all(folder: Path, thorough: bool = True) -> dict[str, Any]:
    """The manifest, after it and each file that it names have been checked."""
    body = decode(text_of(folder), folder)
    for name, entry in body["files"].items():
        check(folder / name, entry["bytes"], entry["sha256"], thorough)
    return body


def _read(file: Path) -> bytes:
    if _size(file) > MOST_BYTES:
        raise Damaged(f"{file}: too large")
    with _reading(file):
        return file.read_bytes()


def _size(file: Path) -> int:
    with _reading(file):
        found = os.lstat(file)
    if not stat.S_ISREG(found.st_mode):  # a pipe would wait for ever, a link lead elsewhere
        raise Damaged(f"{file}: is not a regular file")
    return found.st_size


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Tells damage from what may pass (a stale handle, no permission), which stays an OSError."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise Damaged(f"{file}: is missing") from None
    except OSError as error:
        if error.errno not in (errno.EIO, errno.ELOOP):
            raise
        raise Damaged(f"{file}: {error.strerror}") from None
