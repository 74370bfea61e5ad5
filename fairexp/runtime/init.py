"""Initial weights that depend on the seed and the parameter's name alone: not on the world size, the sharding or the device."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from fairexp.runtime.pretrained import Pretrained
from fairexp.runtime.shards import piece


@runtime_checkable
class NamedInit(Protocol):
    """A model that can fill each of its tensors by name."""

    def init_tensor(self, name: str, tensor: Tensor) -> None:
        """Fills the full parameter or buffer `name` in place, from torch's global generator."""


def construct(make_model: Callable[[], nn.Module], target: Any, seed: int) -> nn.Module:
    """The model: on the meta device (no memory) if its class fills its tensors by name, else built here by its constructor.

    Every rank builds from the same seed, so a model of any class starts with the same weights on any world size.
    """
    if isinstance(target, type) and issubclass(target, NamedInit):
        with torch.device("meta"):
            return make_model()
    seed_generators(seed)
    return make_model()


def seed_generators(seed: int) -> None:
    """Seeds torch's, numpy's and Python's global generators."""
    torch.manual_seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    random.seed(seed)


def materialize(model: nn.Module, device: torch.device, seed: int) -> None:
    """Puts the model on the device; one that was built on the meta device gets its weights now, its own shard of each.

    The full tensor is drawn on the CPU and sliced: DTensor's own random numbers on CPU give every rank the same shard, and
    a GPU's generator would give other weights than the CPU's. A model whose attribute `weights` names a folder starts from
    the safetensors there.
    """
    if not any(tensor.is_meta for _, tensor in tensors(model)):
        model.to(device)
        return
    assert isinstance(model, NamedInit)
    model.to_empty(device=device)
    weights = getattr(model, "weights", None)
    if isinstance(weights, str):
        _read(Pretrained(Path(weights).expanduser(), model, tensors(model)), model)
        return
    for name, tensor in tensors(model):
        full = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed_of(seed, name))
            model.init_tensor(name, full)
            if isinstance(tensor, DTensor):
                shard = distribute_tensor(full.to(device), tensor.device_mesh, tensor.placements, src_data_rank=None)
                tensor.to_local().copy_(shard.to_local())
            else:
                tensor.copy_(full)


@torch.no_grad()
def _read(pretrained: Pretrained, model: nn.Module) -> None:
    """Fills each tensor with what this rank holds of it; no rank reads the others' part."""
    for name, tensor in tensors(model):
        values, offset = piece(tensor)
        if values.numel():
            ends = zip(offset, values.shape, strict=True)
            where = [(begin, begin + size) for begin, size in ends]
            values.copy_(pretrained.read(name, tensor.shape, where))


def tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer by name, each once."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def seed_of(seed: int, *parts: object) -> int:
    """A seed for torch.manual_seed from the run's seed and what it is for."""
    text = "/".join(map(str, (seed, *parts)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
