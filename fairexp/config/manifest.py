"""What a checkpoint's manifest.json says, and whether its files are still what was written; no torch.

The manifest is written last and the folder renamed into place after it: a folder that has its final name was complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
    return dict(sorted(found.items()))


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
    """The manifest's body. Damaged: it isn't what was written, or belongs to another step."""
    file = folder / FILE
    match = re.fullmatch(r'\{"sha256":"([0-9a-f]{64})",\n"body":(.*)\}\n', text, re.DOTALL)
    if match is None:
        raise Damaged(f"{file}: not a manifest")
    if digest(match[2].encode()) != match[1]:
        raise Damaged(f"{file}: its digest differs")
    body = parse(match[2], file)
    if body.get("schema") != SCHEMA:
        raise Damaged(f"{file}: written in format {body.get('schema')}, this is fairexp's format {SCHEMA}")
    step = STEP.fullmatch(folder.name)
    if step and body.get("step") != int(step[1]):
        raise Damaged(f"{file}: belongs to step {body.get('step')}")
    files = body.get("files")
    if not isinstance(files, dict) or not all(NAME.fullmatch(name) for name in files):
        raise Damaged(f"{file}: names files that fairexp doesn't write")
    return body


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
        with open(file, "rb") as opened:
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
    return file.read_bytes()


def _size(file: Path) -> int:
    try:
        found = os.lstat(file)
    except FileNotFoundError:
        raise Damaged(f"{file}: is missing") from None
    if not stat.S_ISREG(found.st_mode):  # a pipe would wait for ever, a link lead elsewhere
        raise Damaged(f"{file}: is not a regular file")
    return found.st_size
