"""This process's place among the ranks, and the few collectives that the loop needs."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Place:
    """Which rank this is, of how many, on which device. `model_ranks` ranks in a row hold one model's parts and work on the
    same samples; to the data they are one rank of `data_size`."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    model_ranks: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        return self.rank // self.model_ranks

    @property
    def data_size(self) -> int:
        return self.world_size // self.model_ranks

    @property
    def model_rank(self) -> int:
        return self.rank % self.model_ranks


def place(device: str) -> Place:
    """The place that RANK, WORLD_SIZE and LOCAL_RANK say (one rank without them); `device`: auto, cpu or cuda."""
    rank, world_size, local_rank = (int(os.environ.get(key, default)) for key, default in RANK_VARIABLES.items())
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        torch.cuda.set_device(local_rank)
        return Place(rank, world_size, local_rank, torch.device("cuda", local_rank))
    return Place(rank, world_size, local_rank, torch.device("cpu"))


RANK_VARIABLES = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}


def join(here: Place) -> None:
    """Makes the process group. CPU tensors go through gloo on any machine, so that signals and counts never touch the GPU.

    On one machine the ranks meet in the file that RENDEZVOUS_FILE names: nothing listens on the network (torch's TCPStore
    would, on every interface). Elsewhere at MASTER_ADDR:MASTER_PORT, as torchrun sets them; where there is a
    RENDEZVOUS_TOKEN, rank 0 takes over the listening socket RENDEZVOUS_FD, whose port was free and has stayed ours.
    """
    backend = "cpu:gloo,cuda:nccl" if here.device.type == "cuda" else "gloo"
    file = os.environ.get("RENDEZVOUS_FILE")
    store: dist.Store | None = None
    if here.world_size == 1:
        store = dist.HashStore()
    elif file:
        store = dist.FileStore(str(Path(file)), here.world_size)
    elif token := os.environ.get("RENDEZVOUS_TOKEN"):
        store = dist.PrefixStore(token, _tcp_store(here))
    dist.init_process_group(
        backend,
        store=store,
        rank=here.rank,
        world_size=here.world_size,
        device_id=here.device if here.device.type == "cuda" else None,
    )


def _tcp_store(here: Place) -> dist.Store:
    listener = os.environ.get("RENDEZVOUS_FD") if here.first else None
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        here.world_size,
        is_master=here.first,
        wait_for_workers=False,
        master_listen_fd=int(listener) if listener else None,
    )


def alone() -> bool:
    """Whether there is no other rank."""
    return not (dist.is_initialized() and dist.get_world_size() > 1)


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The element-wise sum over all ranks, in place."""
    if not alone():
        dist.all_reduce(values)
    return values


def max_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The element-wise maximum over all ranks, in place."""
    if not alone():
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values


def any_rank(flag: bool) -> bool:
    """Whether it holds on any rank."""
    return bool(max_over_ranks(torch.tensor(float(flag))))


def said_by_first(text: str) -> str:
    """Rank 0's text, on every rank."""
    return _said_by(0, text)


def said_by_any(text: str) -> str:
    """The text of the last rank that has one, on every rank; "" where none has."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    speaker = int(max_over_ranks(torch.tensor(rank + 1.0 if text else 0.0)))
    return _said_by(speaker - 1, text) if speaker else ""


def _said_by(speaker: int, text: str) -> str:
    if alone():
        return text
    data = torch.frombuffer(bytearray(text.encode() or b" "), dtype=torch.uint8)
    size = torch.tensor([len(data) if text else 0])
    dist.broadcast(size, src=speaker)
    if not int(size):
        return ""
    if dist.get_rank() != speaker:
        data = torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(data, src=speaker)
    return data.numpy().tobytes().decode()


def collect(key: str, value: Any) -> list[Any] | None:
    """Every rank's JSON value, on rank 0; None on the others. No collective, so threads may call it; a key is used once."""
    if alone():
        return [value]
    store = dist.distributed_c10d._get_default_store()
    if dist.get_rank() != 0:
        store.set(f"{key}/{dist.get_rank()}", json.dumps(value))
        return None
    values = [value]
    for rank in range(1, dist.get_world_size()):
        while not store.check([f"{key}/{rank}"]):  # not get: the store can do nothing else while it waits
            time.sleep(0.02)
        values.append(json.loads(store.get(f"{key}/{rank}")))
        store.delete_key(f"{key}/{rank}")
    return values


def share_buffers(module: torch.nn.Module) -> None:
    """Gives every rank rank 0's buffers: each rank's batch norms have seen other samples, and a run has one evaluation and
    one checkpoint. DDP does so before each forward pass; FSDP never."""
    if not alone():
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def is_lost_peer(error: Exception) -> bool:
    """Whether a collective failed because another rank has gone: the consequence of an error, not the error."""
    return isinstance(error, RuntimeError) and any(text in str(error) for text in PEER_GONE)


# what gloo and NCCL say; neither has a type of its own for it
PEER_GONE = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection was likely closed",  # the store of rank 0, at the rendezvous
    "Broken pipe",
    "remote process exited",
    "socketPollConnect",
)


def leave(here: Place) -> None:
    """Ends the process group of a process that lives on (launcher=inline).

    Ranks that end with the run don't call it: gloo's threads free their work while destroy_process_group waits for them with
    the GIL that they need (two of some 230 runs hung). They leave by os._exit, which nothing can block.
    """
    if dist.is_initialized() and here.world_size == 1:
        dist.destroy_process_group()
