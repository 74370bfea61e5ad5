"""An exponential moving average of the weights, for evaluation (Polyak & Juditsky 1992; decay warmed up as in TensorFlow's)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class EMA:
    """`shadow` holds the averaged weights by name, sharded as the model's own."""

    def __init__(self, model: nn.Module, decay: float):
        from torch.distributed.fsdp import FSDPModule  # half a second that only runs with an average pay

        self.decay = decay
        self.sharded = [part for part in model.modules() if isinstance(part, FSDPModule)]
        self.parameters = dict(model.named_parameters())
        self.shadow = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves the average towards the weights. Early steps move it further, or it would remember the random start."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(_local(self.shadow), _local(self.parameters), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model has the averaged weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for part in self.sharded:
            part.reshard()  # the root stays gathered after an evaluation: the next forward pass would use those weights
        for weight, average in zip(_local(self.parameters), _local(self.shadow), strict=True):
            held = weight.clone()
            weight.copy_(average)
            average.copy_(held)


def _local(tensors: dict[str, Tensor] | dict[str, nn.Parameter]) -> list[Tensor]:
    """This rank's shards, sharing memory with the tensors."""
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors.values()]
