"""Tensors <-> files, without pickle: each rank writes the parts that it holds into one safetensors file, and reads what it
needs from any number of them, whatever world size and strategy wrote them.

torch.distributed.checkpoint does this too; but it unpickles what it reads, takes a flipped bit for a weight, and plans with
collectives, which a save in the background mustn't make.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from fairexp.errors import RunError
from fairexp.runtime.dist import Place

BLOCK = 1 << 23  # bytes of a write: large enough for the disk, small enough to show that it gets on
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Piece(NamedTuple):
    """A box of a tensor: its values, and where it begins in each dimension."""

    values: Tensor
    offset: tuple[int, ...]


def piece(tensor: Tensor) -> Piece:
    """What this rank holds of the tensor; it shares its memory."""
    if not isinstance(tensor, DTensor):
        return Piece(tensor.detach(), (0,) * tensor.ndim)
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return Piece(tensor.to_local().detach(), tuple(offset))


def mine(tensors: Mapping[str, Tensor], here: Place) -> dict[str, Piece]:
    """The pieces that this rank writes: each part of each tensor is written by one of the ranks that hold it, and all write
    about as much. Names that begin with `rng.` are this rank's own."""
    chosen = {}
    load = [0] * here.world_size
    for name in sorted(tensors, key=lambda name: (-tensors[name].nbytes, name)):
        tensor = tensors[name]
        if isinstance(tensor, DTensor):
            copies = [dim for dim, placement in enumerate(tensor.placements) if isinstance(placement, Replicate)]
            writes = all(
                tensor.device_mesh.get_local_rank(dim) == zlib.crc32(name.encode()) % tensor.device_mesh.size(dim)
                for dim in copies
            )
            if tensor.device_mesh.size() < here.world_size:  # each rank of a model's group holds it
                writes = writes and here.model_rank == zlib.crc32(name.encode()) % here.model_ranks
        elif name.startswith("rng."):
            writes = True
        else:
            rank = load.index(min(load))
            load[rank] += tensor.nbytes
            writes = rank == here.rank
        if writes and (part := piece(tensor)).values.numel():
            chosen[name] = part
    return chosen


class Staging:
    """Host memory that holds a copy of the pieces while they are written; kept from save to save, since fresh pages cost
    more than the copy."""

    def __init__(self, device: torch.device):
        self.pinned = device.type == "cuda"
        self.buffers: dict[str, Tensor] = {}

    def copy(self, pieces: Mapping[str, Piece]) -> dict[str, Piece]:
        copied = {}
        for name, (values, offset) in pieces.items():
            buffer = self.buffers.get(name)
            if buffer is None or buffer.shape != values.shape or buffer.dtype != values.dtype:
                buffer = self.buffers[name] = torch.empty(values.shape, dtype=values.dtype, pin_memory=self.pinned)
            buffer.copy_(values, non_blocking=self.pinned)
            copied[name] = Piece(buffer, offset)
        if self.pinned:
            torch.cuda.synchronize()
        return copied


def write(file: Path, pieces: Mapping[str, Piece], wrote: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Writes the pieces and gets them onto the disk: {"bytes": ..., "sha256": ...} of the file, digested on the way.

    `wrote` is called after each block. OSError: the disk is full, or the file is there already.
    """
    header: dict[str, Any] = {}
    end = 0
    for name, (values, _) in pieces.items():
        begin, end = end, end + values.nbytes
        header[name] = {"dtype": NAMES[values.dtype], "shape": list(values.shape), "data_offsets": [begin, end]}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    digest, size = hashlib.sha256(), 0
    with open(file, "xb", buffering=0) as out:
        for block in _blocks(len(head).to_bytes(8, "little") + head, pieces):
            digest.update(block)
            size += len(block)
            while block:
                block = block[out.write(block) :]  # a disk that is nearly full takes a part
            wrote()
        os.fsync(out.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def _blocks(head: bytes, pieces: Mapping[str, Piece]) -> Iterator[memoryview]:
    yield memoryview(head)
    for values, _ in pieces.values():
        data = values.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        for begin in range(0, len(data), BLOCK):
            yield data[begin : begin + BLOCK]


class Part(NamedTuple):
    """What a file has of a tensor that is wanted here."""

    target: Tensor
    file: str
    where: tuple[slice, ...]  # in the file's piece


class Stored:
    """A checkpoint's tensors. `tensors`: the manifest's index, {name: {"dtype", "shape", "pieces": [[file, offset, shape]]}};
    `files`: what the manifest says of the files, which have been checked. RunError: the index can't be true."""

    def __init__(self, folder: Path, tensors: Mapping[str, Any], files: Mapping[str, Any]):
        self.folder = folder
        self.tensors = tensors
        self.opened: dict[str, Any] = {}
        for name, entry in tensors.items():
            if not _is_sound(entry, files):
                raise RunError(f"{folder}: what its manifest says of the tensor {name[:99]!r} can't be")

    def shape(self, name: str) -> torch.Size:
        return torch.Size(self.tensors[name]["shape"])

    def dtype(self, name: str) -> torch.dtype:
        return DTYPES[self.tensors[name]["dtype"]]

    def fits(self, name: str, tensor: Tensor) -> None:
        """RunError, where the stored tensor has another shape or type."""
        if self.shape(name) != tensor.shape or self.dtype(name) != tensor.dtype:
            there = f"{self.tensors[name]['dtype']} {list(self.shape(name))}"
            here = f"{NAMES.get(tensor.dtype, tensor.dtype)} {list(tensor.shape)}"
            raise RunError(f"{self.folder}: {name} is {there} there and {here} here")

    def parts(self, name: str, into: Tensor) -> list[Part]:
        """Where to find what this rank holds of the tensor. RunError: not all of it is there, or not once."""
        values, offset = piece(into)
        found = []
        missing = values.numel()
        for file, begin, shape in self.tensors[name]["pieces"]:
            low = [max(a, b) for a, b in zip(offset, begin, strict=True)]
            high = [min(a + n, b + m) for a, n, b, m in zip(offset, values.shape, begin, shape, strict=True)]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            stored = self._open(file).get_slice(name)
            if stored.get_shape() != shape or stored.get_dtype() != self.tensors[name]["dtype"]:
                raise RunError(f"{self.folder / file}: {name} isn't what the manifest says")
            here = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, offset, strict=True))
            there = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, begin, strict=True))
            missing -= values[here].numel()
            found.append((here, Part(values[here], file, there)))
        if missing == 0 and len(found) > 1:  # as many as it should: no overlap either?
            seen = torch.zeros(values.shape, dtype=torch.bool)
            for here, _ in found:
                seen[here] = True
            missing = int(seen.numel() - seen.sum())
        if missing:
            raise RunError(f"{self.folder}: parts of {name} are missing, or there twice")
        return [part for _, part in found]

    @torch.no_grad()
    def read(self, name: str, parts: list[Part]) -> None:
        """Fills the parts of the tensor."""
        for target, file, where in parts:
            source = self._open(file)
            target.copy_(source.get_slice(name)[where] if where else source.get_tensor(name))

    def _open(self, file: str) -> Any:
        if file not in self.opened:
            self.opened[file] = safe_open(self.folder / file, framework="pt")
        return self.opened[file]


def _is_sound(entry: Any, files: Mapping[str, Any]) -> bool:
    """Whether a tensor's entry in the index is one that fairexp writes: nothing is opened, and no memory taken, for another."""
    match entry:
        case {"dtype": str(dtype), "shape": shape, "pieces": list(pieces)} if dtype in DTYPES and _is_box(shape):
            size = 0
            for each in pieces:
                match each:
                    case [str(file), offset, part] if _is_box(offset) and _is_box(part) and file in files:
                        bytes_ = math.prod(part) * DTYPES[dtype].itemsize
                        if len(part) != len(shape) or len(offset) != len(shape) or bytes_ > files[file]["bytes"]:
                            return False
                        if not all(n > 0 and begin + n <= m for begin, n, m in zip(offset, part, shape, strict=True)):
                            return False
                        size += math.prod(part)
                    case _:
                        return False
            return size == math.prod(shape)
    return False


def _is_box(numbers: Any) -> bool:
    return (
        isinstance(numbers, list) and len(numbers) <= 64 and all(type(n) is int and 0 <= n < 1 << 48 for n in numbers)
    )
