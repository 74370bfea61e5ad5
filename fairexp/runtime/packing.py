"""A batch's tensors, wherever they stand in it: onto the rank's device, and through shared memory in one piece."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from copy import copy
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

ALIGNED = 64  # bytes: where a tensor begins in shared memory


def each(kind: type, change: Callable[[Any], Any], batch: Any) -> Any:
    """The batch with what is of that kind changed; tuples, lists and mappings are walked, and stay what they are."""
    if isinstance(batch, kind):
        return change(batch)
    if isinstance(batch, MutableMapping):
        changed = copy(batch)  # an OrderedDict, or what transformers gives
        for key in batch:
            changed[key] = each(kind, change, batch[key])
        return changed
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(each(kind, change, value) for value in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(each(kind, change, value) for value in batch)
    return batch


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with every tensor on the device. A GPU copies it on a stream of its own, beside the step before, which it is
    still computing when this process is done with handing that out."""
    if device.type == "cpu":
        return batch
    copying, computing = copy_stream(device), torch.cuda.current_stream(device)

    def move(tensor: Tensor) -> Tensor:
        moved = tensor.to(device, non_blocking=True)
        # its memory comes from the other stream, which would write the next batch there while a step still reads this one
        moved.record_stream(computing)
        return moved

    with torch.cuda.stream(copying):
        batch = each(Tensor, move, batch)
    computing.wait_stream(copying)
    return batch


@cache
def copy_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream on which this process's batches go to the device."""
    return torch.cuda.Stream(device)


class Packed(NamedTuple):
    """A batch on its way from a data loading process: its tensors in one piece of shared memory, unless they are in some
    already. Each piece costs a file descriptor, which goes through a connection of its own."""

    piece: Tensor  # bytes
    form: Any  # the batch, with an Inside for each tensor


@dataclass(frozen=True, slots=True)
class Inside:
    """Where a tensor is in the piece."""

    dtype: torch.dtype
    shape: torch.Size
    begin: int
    end: int

    def of(self, piece: Tensor) -> Tensor:
        """The tensor: a view."""
        return piece[self.begin : self.end].view(self.dtype).view(self.shape)


def packed(batch: Any) -> Packed:
    """The batch with its tensors copied into shared memory. torch's RuntimeError where there is no room."""
    tensors: list[tuple[Tensor, Inside]] = []
    size = 0

    def place(tensor: Tensor) -> Tensor | Inside:
        nonlocal size
        if tensor.layout != torch.strided or tensor.is_shared():  # default_collate has put it there
            return tensor
        if type(tensor) is not Tensor or tensor.is_quantized or tensor.requires_grad:
            return tensor.share_memory_()
        inside = Inside(tensor.dtype, tensor.shape, size, size + tensor.nbytes)
        tensors.append((tensor, inside))
        size += -(-tensor.nbytes // ALIGNED) * ALIGNED
        return inside

    form = each(Tensor, place, batch)
    if not size:
        return Packed(torch.empty(0, dtype=torch.uint8), form)
    # as default_collate does it: filled in place, without a copy more
    piece = torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(size))
    for tensor, inside in tensors:
        inside.of(piece).copy_(tensor)
    return Packed(piece, form)


def unpacked(batch: Packed) -> Any:
    """The batch, whose tensors are views of the piece."""
    return each(Inside, lambda inside: inside.of(batch.piece), batch.form)
