"""What the loop asks of a strategy."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor, nn

from fairexp.runtime.dist import Place


class Strategy(Protocol):
    """How one model is spread over the ranks. All strategies give the same losses for the same config."""

    needs_group: bool
    """Whether a process group is needed even for one rank."""

    model_ranks: int
    """How many ranks in a row hold one model's parts and so work on the same samples; 1, but for tensor parallelism."""

    def wrap(self, model: nn.Module, here: Place, seed: int) -> nn.Module:
        """The model on its device, its weights initialised, spread over the ranks. `model` itself keeps its names."""

    def last_micro_batch(self, model: nn.Module, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of a micro batch: gradients are averaged over ranks in the last one only."""

    def grad_norm(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        """The 2-norm of all gradients, of all ranks' shards, on the device."""

    def clip_grad_norm(self, parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
        """Scales the gradients down to the norm where they exceed it; the norm before."""
