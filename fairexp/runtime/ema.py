"""Averaged weights for evaluation: an exponential moving average (Polyak & Juditsky 1992; decay warmed up as in TensorFlow's),
or those of an optimizer that averages by itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class EMA:
    """`shadow` holds the averaged weights by name, sharded as the model's own."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.sharded = _sharded(model)
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
        _give_up_gathered(self.sharded)
        for weight, average in zip(_local(self.parameters), _local(self.shadow), strict=True):
            held = weight.clone()
            weight.copy_(average)
            average.copy_(held)


class ScheduleFree:
    """The averaged weights of a schedule-free optimizer (Defazio et al. 2024), which makes them from the training weights and
    its state when its `eval` is called."""

    def __init__(self, model: nn.Module, optimizer: Any):
        self.optimizer = optimizer
        self.sharded = _sharded(model)
        self.parameters = dict(model.named_parameters())
        optimizer.train()  # it refuses to step before

    @contextmanager
    @torch.no_grad()
    def applied(self) -> Iterator[None]:
        """Inside, the model has the averaged weights. Afterwards it has the very bits that it had: the optimizer's own way back
        rounds, and training would depend on how often a run evaluates."""
        _give_up_gathered(self.sharded)
        weights = _local(self.parameters)
        held = [weight.clone() for weight in weights]
        self.optimizer.eval()
        try:
            yield
        finally:
            _give_up_gathered(self.sharded)
            self.optimizer.train()
            torch._foreach_copy_(weights, held)


def _sharded(model: nn.Module) -> list[Any]:
    from torch.distributed.fsdp import FSDPModule  # half a second that only runs with an average pay

    return [part for part in model.modules() if isinstance(part, FSDPModule)]


def _give_up_gathered(sharded: list[Any]) -> None:
    """The root stays gathered after an evaluation: the next forward pass would use those weights."""
    for part in sharded:
        part.reshard()


def _local(tensors: dict[str, Tensor] | dict[str, nn.Parameter]) -> list[Tensor]:
    """This rank's shards, sharing memory with the tensors."""
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors.values()]
