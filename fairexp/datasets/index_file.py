"""Where the samples are in a large file, found once and kept in a small file beside it."""

import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save


class Index(NamedTuple):
    """Arrays and words, and not objects: forked workers share the memory of arrays."""

    arrays: dict[str, np.ndarray]
    words: list[str]

    def digest(self) -> str:
        total = hashlib.sha256("\n".join(self.words).encode())
        for name, array in sorted(self.arrays.items()):
            total.update(f"\n{name} {array.dtype} {array.shape}".encode())
            total.update(np.ascontiguousarray(array).data)
        return total.hexdigest()


def index_of(
    path: Path, kind: str, build: Callable[[Path, int], Index], fits: Callable[[Index, int], bool]
) -> tuple[Index, str]:
    """The file's index and its digest: the index that was written, if it is of this very file (by size and time of change),
    or a new one, written for the next time.

    It stands beside the file or, where that can't be written, in ~/.cache/fairexp. Where that can't either, it is made
    at each start. Who builds at the same time writes the same file. `fits` judges whether an index speaks of places in a
    file of that size: an index is data, too.
    """
    state = path.stat()
    if not stat.S_ISREG(state.st_mode):
        raise ValueError(f"{path}: not a file")
    identity = {"kind": kind, "size": str(state.st_size), "mtime_ns": str(state.st_mtime_ns)}
    name = hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:24]
    places = [path.with_name(f"{path.name}.index"), Path.home() / f".cache/fairexp/indexes/{name}.index"]
    for place in places:
        if (found := load(place, identity)) and fits(found[0], state.st_size):
            return found
    index = build(path, state.st_size)
    digest = index.digest()
    data = save(index.arrays, identity | {"words": json.dumps(index.words), "digest": digest})
    for place in places:
        try:
            write(place, data)
            break
        except OSError:
            continue
    return index, digest


def load(path: Path, identity: Mapping[str, str]) -> tuple[Index, str] | None:
    """The index in that file and its digest; None where there is none, or of another file, or a damaged one."""
    try:
        with safe_open(path, framework="np") as file:
            facts = file.metadata() or {}
            if any(facts.get(key) != expected for key, expected in identity.items()):
                return None
            names = file.keys()
            index = Index({name: file.get_tensor(name) for name in names}, json.loads(facts["words"]))
            digest = index.digest()
            return (index, digest) if digest == facts["digest"] else None
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None


def write(path: Path, data: bytes) -> None:
    """The whole file at once, or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(descriptor, "wb") as file:
            os.fchmod(descriptor, 0o644)  # mkstemp's is for its owner alone
            file.write(data)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def ascends(ends: np.ndarray, last: int) -> bool:
    """Whether these are the ends of pieces, none of them empty, that fill 0 to `last`."""
    return bool((np.diff(ends, prepend=0) > 0).all()) and (int(ends[-1]) if len(ends) else 0) == last
