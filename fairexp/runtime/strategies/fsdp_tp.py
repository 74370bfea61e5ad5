"""Tensor parallelism within groups of ranks, FSDP2 across them: for models whose layers are too large, or batches too small,
to be spread over samples alone.

`tp_size` ranks in a row hold a slice of each large matrix and work on the same samples (Shoeybi et al. 2019,
arXiv:1909.08053). Which matrix is cut which way is data: the model's attribute `tensor_parallel`, or `strategy.plan`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from fairexp.errors import RunError
from fairexp.runtime.dist import Place
from fairexp.runtime.strategies.fsdp import FSDP
from fairexp.runtime.strategies.units import names_of


class SharedInput(ParallelStyle):
    """The module's first argument is marked as the same on all ranks of a group, once for all layers that read it: backward
    then sums its gradient over the ranks once, not once a layer."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def share(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x, *rest = args
            return DTensor.from_local(x, device_mesh, [Replicate()], run_check=False), *rest

        module.register_forward_pre_hook(share)
        return module


# what a plan may say of a module
STYLES: dict[str, ParallelStyle] = {
    "colwise": ColwiseParallel(),  # a Linear's outputs are cut: each rank goes on with its own
    "colwise_gather_output": ColwiseParallel(output_layouts=Replicate()),  # ... and gets the others' for its output
    "rowwise": RowwiseParallel(),  # a Linear's inputs are cut, as a colwise layer left them; outputs are summed over ranks
    "embedding_rowwise": RowwiseParallel(input_layouts=Replicate()),  # an Embedding's rows
    "shared_input": SharedInput(),
}


class FSDPTP(FSDP):
    """A (replicate,) shard x tp mesh: tp_size neighbours cut each layer, and what each of them holds is sharded as by FSDP over
    the ranks that hold the same slice. What the plan doesn't name is computed by all of a group, from the same numbers.

    `plan`: globs on module names -> colwise, colwise_gather_output, rowwise, embedding_rowwise or shared_input.
    """

    def __init__(
        self,
        tp_size: int,
        shard_size: int | None = None,
        reshard_after_forward: bool = True,
        param_dtype: str | None = None,
        reduce_dtype: str = "fp32",
        units: Sequence[str] | None = None,
        plan: Mapping[str, str] | None = None,
    ):
        super().__init__(shard_size, reshard_after_forward, param_dtype, reduce_dtype, False, units)
        self.model_ranks = tp_size
        self.plan = plan
        self.meshes: DeviceMesh | None = None

    def _meshes(self, here: Place) -> DeviceMesh:
        if self.meshes is None:
            size = self.shard_size or here.data_size
            shape = (here.data_size // size, size, self.model_ranks)
            self.meshes = init_device_mesh(here.device.type, shape, mesh_dim_names=("replicate", "shard", "tp"))
        return self.meshes

    def mesh(self, here: Place) -> DeviceMesh:
        meshes = self._meshes(here)
        return meshes["shard"] if meshes.size(0) == 1 else meshes["replicate", "shard"]

    def cut(self, model: nn.Module, here: Place) -> None:
        plan = self.plan if self.plan is not None else getattr(model, "tensor_parallel", None)
        if not isinstance(plan, Mapping) or not plan:
            raise RunError(
                f"strategy: {type(model).__name__} doesn't say how its layers are cut (an attribute tensor_parallel); give "
                f"strategy.plan: globs on module names, each with one of {', '.join(STYLES)}"
            )
        modules = {name: module for name, module in model.named_modules() if name}
        for pattern, style in plan.items():
            names = [name for name in modules if fnmatchcase(name, pattern)]
            if style not in STYLES:
                raise RunError(f"tensor-parallel plan: {pattern!r} has {style!r}; takes {', '.join(STYLES)}")
            if not names:
                raise RunError(f"tensor-parallel plan: no module matches {pattern!r}; modules: {names_of(model)}")
            for name in names:
                # not parallelize_module's own globs: they cross no dot. src_data_rank: all ranks have the same weights
                parallelize_module(modules[name], self._meshes(here)["tp"], STYLES[style], src_data_rank=None)

    def grad_norm(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        # torch takes no norm over tensors of several meshes
        squares = [
            norm.full_tensor().square() if isinstance(norm, DTensor) else norm.square()
            for norm in (
                get_total_norm([p.grad for p in group if p.grad is not None]) for group in _by_mesh(parameters)
            )
        ]
        return torch.stack(squares).sum().sqrt()

    def clip_grad_norm(self, parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
        parameters = list(parameters)
        norm = self.grad_norm(parameters)
        for group in _by_mesh(parameters):
            clip_grads_with_norm_(group, max_norm, norm)
        return norm


def _by_mesh(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """The parameters that the plan cut, and the others."""
    groups: dict[Any, list[nn.Parameter]] = {}
    for parameter in parameters:
        groups.setdefault(parameter.device_mesh if isinstance(parameter, DTensor) else None, []).append(parameter)
    return list(groups.values())
