"""FSDP2 (torch's fully_shard): parameters, gradients and optimizer state are sharded over the ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from fairexp.runtime import init
from fairexp.runtime.dist import Place
from fairexp.runtime.strategies.units import units

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class FSDP:
    """Each unit (an element of an nn.ModuleList, or what `units` names) is gathered for its forward and backward, then freed."""

    needs_group = True
    model_ranks = 1

    def __init__(
        self,
        shard_size: int | None = None,
        reshard_after_forward: bool = True,
        param_dtype: str | None = None,
        reduce_dtype: str = "fp32",
        cpu_offload: bool = False,
        units: Sequence[str] | None = None,
    ):
        self.shard_size = shard_size
        self.reshard_after_forward = reshard_after_forward
        self.mixed_precision = MixedPrecisionPolicy(
            param_dtype=DTYPES[param_dtype] if param_dtype else None, reduce_dtype=DTYPES[reduce_dtype]
        )
        self.cpu_offload = cpu_offload
        self.units = units

    def mesh(self, here: Place) -> DeviceMesh:
        """One dimension for full sharding; (replicate, shard) where shard_size is smaller than the world."""
        size = self.shard_size or here.world_size
        if size == here.world_size:
            return init_device_mesh(here.device.type, (size,), mesh_dim_names=("shard",))
        shape = (here.world_size // size, size)
        return init_device_mesh(here.device.type, shape, mesh_dim_names=("replicate", "shard"))

    def cut(self, model: nn.Module, here: Place) -> None:
        """Cuts layers themselves, before they are sharded: nothing, here."""

    def wrap(self, model: nn.Module, here: Place, seed: int) -> nn.Module:
        # pinned memory needs an accelerator, and torch asks for it by default
        offload = CPUOffloadPolicy(pin_memory=here.device.type != "cpu") if self.cpu_offload else OffloadPolicy()
        shard = partial(fully_shard, mesh=self.mesh(here), mp_policy=self.mixed_precision, offload_policy=offload)
        if not any(tensor.is_meta for _, tensor in init.tensors(model)):
            model.to(here.device)  # built by its constructor, with the same weights on every rank: shard what is there
        self.cut(model, here)
        for unit in units(model, self.units).values():
            shard(unit, reshard_after_forward=self.reshard_after_forward)
        shard(model)  # the root keeps its parameters gathered: backward needs them at once
        init.materialize(model, torch.device("cpu") if self.cpu_offload else here.device, seed)
        return model

    def last_micro_batch(self, model: nn.Module, last: bool) -> AbstractContextManager[None]:
        assert isinstance(model, FSDPModule)
        model.set_requires_gradient_sync(last)
        return nullcontext()

    def grad_norm(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        return norm.full_tensor() if isinstance(norm, DTensor) else norm  # each rank holds the norm of its shards

    def clip_grad_norm(self, parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
        parameters = list(parameters)
        norm = self.grad_norm(parameters)
        clip_grads_with_norm_(parameters, max_norm, norm)
        return norm
